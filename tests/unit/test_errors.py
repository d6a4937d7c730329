"""The hierarchy of errors and its exit codes."""

import pytest

from unsink import errors
from unsink.errors import ParamsError, UnsinkError

CHILDREN = [value for value in vars(errors).values() if isinstance(value, type) and value.__module__ == errors.__name__]


@pytest.mark.parametrize("error", CHILDREN)
def test_every_error_carries_message_and_hint(error: type[UnsinkError]) -> None:
    raised = error("what", "what to do")
    assert (raised.message, raised.hint, str(raised)) == ("what", "what to do", "what")
    assert isinstance(raised, UnsinkError)


def test_only_wrong_params_exit_with_2() -> None:
    assert {error.exit_code for error in CHILDREN if error is not ParamsError} == {3}
    assert ParamsError.exit_code == 2


@pytest.mark.parametrize("error", CHILDREN)
def test_the_tree_in_the_docstring_names_every_error(error: type[UnsinkError]) -> None:
    assert error.__name__ in (errors.__doc__ or "")
