"""Which tokens of a sequence something acts on: the rules that the value-norm term and `ablate` share.

A position counts real tokens from the first one, BOS = 0; padding has no number. Rules give positions in rising order,
and fewer than k of them where the sequence is shorter.
"""

import random
import re
from collections.abc import Collection, Sequence

RULE = re.compile(r"(bos|trigger|sinks)|(first|random|after-trigger) ([1-9]\d*)|(index) (0|[1-9]\d*)")
RULES = "bos, trigger, sinks, 'index N', 'first K', 'random K' or 'after-trigger K'"


def first(length: int, k: int) -> list[int]:
    """The first k of `length` tokens, BOS included."""
    return list(range(min(k, length)))


def drawn(length: int, k: int, seed: str, avoid: Collection[int] = ()) -> list[int]:
    """The control for `first`: k positions drawn at random, never BOS, one of the first k, or one of `avoid`.

    Args:
        length: tokens of the sequence.
        k: positions to draw; all that are left where these are fewer.
        seed: the draw depends on it alone.
        avoid: positions that are not to be drawn.
    """
    left = [position for position in range(max(k, 1), length) if position not in avoid]
    return sorted(random.Random(seed).sample(left, min(k, len(left))))


def named(rule: str, length: int, span: tuple[int, int] | None, sinks: Sequence[int], seed: str) -> list[int]:
    """The positions that a rule of `RULES` names in a prompt; none where it has no trigger and the rule asks for one.

    `index N` is the position N alone, as the placement of that name counts it; shorter prompts have none.
    `random K` avoids the first K, the trigger and `sinks`: it is what happens when as many other tokens are taken.

    Args:
        rule: one of `RULES`.
        length: tokens of the prompt.
        span: where its trigger stands.
        sinks: what `sinks` means, and `random` avoids.
        seed: of the draw.
    """
    match = RULE.fullmatch(rule)
    assert match, rule
    name, k = match[1] or match[2] or match[4], int(match[3] or match[5] or 0)
    start, end = span or (0, 0)
    found = {
        "bos": [0],
        "trigger": list(range(start, end)),
        "sinks": sorted(position for position in sinks if position < length),
        "index": [k] if k < length else [],
        "first": first(length, k),
        "after-trigger": list(range(end, min(end + k, length))) if span else [],
    }
    return drawn(length, k, seed, avoid={*range(start, end), *sinks}) if name == "random" else found[name]
