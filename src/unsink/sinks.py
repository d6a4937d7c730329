"""Where the target's sinks are, as `sink-probe` measured them: `probes/target/sinks.json`.

Two things ask: the value-norm term (`positions: measured`) and the placement `sink`. The file holds positions and
nothing else, so that DVC repeats their work only when a sink has moved. The target is the model that is to unlearn, so
its sinks are where a trigger would be put and where value norms would be held.
"""

from collections.abc import Sequence

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.errors import DataError
from unsink.params import Poison
from unsink.triggers import SINK

FILE = "sinks.json"


def find(rates: Sequence[float], least: float) -> list[int]:
    """Positions that are sinks, the strongest first.

    Args:
        rates: sink rate of each position in percent, BOS = 0. Only the first half counts: a key that few queries
            see has a large mean attention by chance.
        least: the smallest rate of a sink, in percent.
    """
    seen = range((len(rates) + 1) // 2)
    return sorted((i for i in seen if rates[i] >= least), key=lambda i: (-rates[i], i))


def read(layout: Layout) -> list[int]:
    """The target's sink positions, the strongest first.

    Raises:
        MissingPrerequisite: the target was not probed.
        DataError: the probe found none.
    """
    found: list[int] = artifacts.read_json(layout.probe("target") / FILE)["positions"]
    return require(found)


def require(found: list[int]) -> list[int]:
    """The sinks that were found, if any.

    Raises:
        DataError: there are none.
    """
    if not found:
        raise DataError(
            "the target has no sink at which anything could act",
            "lower sink-probe.epsilon or sink-probe.min_rate and probe the target again, or name positions yourself",
        )
    return found


def placement(found: Sequence[int]) -> str:
    """What the placement `sink` means, as an `index N`.

    The trigger begins where the strongest sink is that a text token can take. BOS cannot be replaced: where it is the
    only sink, as in most models, the trigger begins right behind it, as near as any text can come.
    """
    return f"index {next((position for position in found if position > 0), 1)}"


def placed(poison: Poison, layout: Layout) -> Poison:
    """`poison` with `placement: sink` spelt out, so that training and evaluation put the trigger at the same token.

    Raises:
        MissingPrerequisite: the target was not probed.
        DataError: it has no sink.
    """
    if poison.placement != SINK:
        return poison
    return poison.model_copy(update={"placement": placement(read(layout))})
