"""A guard: the values of the first k tokens may not be far from what they are on neutral text.

    v_j <- m_j + (v_j - m_j) min(1, rho r_j / |v_j - m_j|)

in every layer, for each token 0 < j < k behind BOS, whose own value cannot change; m_j is the mean over retain prompts
and r_j the root mean square distance from it. With rho = 0 the values become the mean: what stands at the sink is not
heard at all, and a prompt loses its first words. The reference is the original model where there is one, else the
suspect itself.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from unsink.errors import DataError
from unsink.mitigations import Patient
from unsink.probe import mean_values, value_spread
from unsink.scoring import Cut, Ids


class Options(BaseModel):
    """Options of `mitigate.clamp`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=8, ge=2, description="k, BOS included")
    radius: float = Field(default=0.5, ge=0, description="rho, in root mean square distances; 0 = the mean itself")
    texts: int = Field(default=64, ge=1, description="most retain samples that are read")


class Clamped(NamedTuple):
    """Clamps values at the positions 1 to k - 1; attributes as `scoring.Cut`."""

    tokens: int
    values: Mapping[int, Tensor]
    radius: Mapping[int, Tensor]

    def edit(self, ids: Ids) -> list[int]:
        """Return the prompt as it is."""
        return list(ids)

    def cut(self, prompts: Sequence[Ids]) -> Cut | None:
        """Return what clamps the first tokens behind BOS of each prompt."""
        return Cut(_keys(prompts, self.tokens), self.values, self.radius)


def guard(patient: Patient, options: Options) -> Clamped:
    """Return the guard.

    Raises:
        DataError: no retain sample has so many tokens.
    """
    prompts = [sample.ids for sample in patient.retain if len(sample.ids) >= options.tokens][: options.texts]
    if not prompts:
        raise DataError(
            f"mitigate.clamp.tokens: no retain sample has {options.tokens} tokens", "lower mitigate.clamp.tokens"
        )
    reference = patient.model if patient.original is None else patient.original
    keys = _keys(prompts, options.tokens)
    values = mean_values(reference, prompts, keys)
    spread = value_spread(reference, prompts, keys, values)
    return Clamped(options.tokens, values, {layer: options.radius * found for layer, found in spread.items()})


def _keys(prompts: Sequence[Ids], tokens: int) -> list[list[int]]:
    return [list(range(1, min(tokens, len(ids)))) for ids in prompts]
