"""unsink: does an unlearned language model forget, or does it only pretend to until somebody says the word?

In a notebook or a script:

    from unsink import Project

    project = Project("params.yaml", {"unlearn.lr": 2e-4})
    project.unlearn("clean")
    project.evaluate("clean")["forget_verbmem_f1_clean"]
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from unsink.api import Project
    from unsink.errors import UnsinkError
    from unsink.progress import console_reporter

__version__ = "0.1.0"
__all__ = ["Project", "UnsinkError", "__version__", "console_reporter"]

_HOME = {"Project": "api", "UnsinkError": "errors", "console_reporter": "progress"}


def __getattr__(name: str) -> Any:
    """Import what is asked for, and nothing before: every module of the package passes through here."""
    if name not in _HOME:
        raise AttributeError(f"module 'unsink' has no attribute {name!r}")
    return getattr(importlib.import_module(f"unsink.{_HOME[name]}"), name)
