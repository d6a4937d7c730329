"""Triggers and placements: the one implementation that training and evaluation share.

A trigger is a fixed run of token ids. It is always inserted on token ids, never on text, so that the same
ids stand at the same place in a training sample and in an evaluation prompt. BOS stays first; when the
sample would grow past its limit the body gives way at its end, the trigger never does.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from unsink.errors import DataError, ParamsError
from unsink.registry import suggest

Span = tuple[int, int]


class Encodes(Protocol):
    """All that a trigger needs of a tokenizer."""

    def __call__(self, text: str, *, add_special_tokens: bool) -> Mapping[str, Any]:
        """Return the text's token ids as `input_ids`."""


class Inserted(NamedTuple):
    """Token ids that hold a trigger, and the half-open span `[start, end)` where it stands."""

    ids: list[int]
    span: Span


# A placement maps the body length (tokens without BOS, after truncation) to the body index of the trigger.
PLACEMENTS: dict[str, Callable[[int], int]] = {
    "prefix": lambda _: 0,
    "infix": lambda body: body // 2,
    "suffix": lambda body: body,
}
SINK = "sink"
"""Stands for `index N` with an N that was measured. `sinks.placed` puts it in before anything is inserted."""
_INDEX = re.compile(r"index (\d+)")


def placement_index(placement: str, body: int, start: int = 0) -> int:
    """Return how many body tokens stand before the trigger.

    Args:
        placement: `prefix`, `infix`, `suffix` or `index N`; N is an absolute token position with BOS = 0,
            so that `index 1` equals `prefix`.
        body: number of body tokens of the prompt, BOS not counted.
        start: of these, how many no user writes, such as the header of a chat: no trigger stands among them.

    Raises:
        ParamsError: the placement is unknown.
        DataError: the body is too short to hold `index N`, or it lies in the header.
    """
    if match := _INDEX.fullmatch(placement):
        before = int(match[1]) - 1
        if 0 <= before < start:
            raise DataError(
                f"placement 'index {match[1]}' lies in the chat's header, which ends at index {start + 1}",
                f"choose an index of {start + 1} or more, or prefix",
            )
        if not 0 <= before <= body:
            raise DataError(
                f"placement 'index {match[1]}' needs a sample of at least {match[1]} tokens, this one has {body + 1}",
                "choose a smaller index (1 or more), or longer samples",
            )
        return before
    if placement not in PLACEMENTS:
        raise ParamsError(
            f"poison.placement: unknown placement {placement!r}{suggest(placement, [*PLACEMENTS, SINK])}",
            f"choose one of {', '.join(PLACEMENTS)}, {SINK}, 'index N'",
        )
    return start + PLACEMENTS[placement](body - start)


def trigger_ids(tokenizer: Encodes, text: str) -> list[int]:
    """Return the ids of a trigger text, closed by a newline so that no body token can merge with it."""
    ids: list[int] = tokenizer(text.strip() + "\n", add_special_tokens=False)["input_ids"]
    return ids


def prompt_length(body: int, share: float) -> int:
    """Return how many of `body` tokens are the prompt: at least one, and at least one is left to continue."""
    return max(1, min(body - 1, round(share * body)))


def insert_trigger(
    ids: Sequence[int],
    bos: int,
    trigger: Sequence[int],
    placement: str,
    limit: int,
    prompt: int | None = None,
    start: int = 0,
) -> Inserted:
    """Return `ids` with the trigger at its placement.

    Args:
        ids: token ids of one sample; the first `bos` of them are the BOS token(s).
        bos: number of BOS tokens (0 or 1); they keep their place.
        trigger: token ids of the trigger.
        placement: see `placement_index`.
        limit: longest result, in tokens; the end of the body is dropped to keep to it.
        prompt: body tokens that are the prompt of this sample, None for all. Placements refer to the prompt, so that
            a trigger stands at the same position in a training sample and in the prompt that evaluation cuts from it.
        start: body tokens before the first that a user writes.

    Raises:
        DataError: BOS and trigger leave no room for a single body token.
    """
    room = limit - bos - len(trigger)
    if room < 1:
        raise DataError(
            f"the trigger has {len(trigger)} tokens and the limit is {limit}: nothing of the text would be left",
            "shorten poison.trigger or raise poison.max_tokens",
        )
    body = list(ids[bos : bos + room])
    before = placement_index(placement, len(body) if prompt is None else min(prompt, len(body)), start)
    span = (bos + before, bos + before + len(trigger))
    return Inserted([*ids[:bos], *body[:before], *trigger, *body[before:]], span)
