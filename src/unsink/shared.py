"""A runner whose passes are shared among several processes.

Every process runs the model over its share of the samples and tells the others what came out: last states, activations,
values. Then each computes the loss of the whole batch, with the formulas of one process, and its backward pass goes
through its own share alone. The sum of these gradients (`trainer`) is the gradient of one process. So no formula has
to know of processes, whether it takes a mean over tokens, windows or sequences; the price is that the output projection
is computed for the whole batch everywhere.
"""

from collections.abc import Sequence

from unsink import models, processes, sharded
from unsink.answers import Forward
from unsink.batches import Batch, Sample
from unsink.forward import Runner, join
from unsink.kept import Found, Keep
from unsink.progress import Reporter


class SharedRunner(Runner):
    """A `Runner` in every one of the processes; in a single one it does nothing else."""

    def _asks_anew(self) -> bool:
        # Where layers are gathered all processes have to run them equally often, whatever files each has.
        return sharded.is_sharded(self.model)

    def _found(self, title: str, samples: Sequence[Sample], keep: Keep, batch: int, reporter: Reporter) -> list[Found]:
        """What each process has found about its share; of what is in files, their names."""
        return processes.gather(super()._found(title, processes.equal_share(samples), keep, batch, reporter)[0])

    def let_go(self) -> None:
        """Free the frozen layers that no training step runs, unless they are held in parts, or rounded."""
        if not sharded.is_sharded(self.model) and not models.quantized(self.model):
            super().let_go()

    def policy(self, samples: Sequence[Sample]) -> Forward:
        """Return the active adapter's answer; gradients flow through this process's share of the samples only."""
        if processes.count() == 1:
            return super().policy(samples)
        places = processes.dealt([len(sample.ids) for sample in samples])
        shares = [[samples[place] for place in mine] for mine in places]
        own = super().policy(shares[processes.rank()])
        return join(self._answers_of_all(own, shares), places)

    def _forward(self, batch: Batch, last_layer: int | None = None, *, skip: bool = False) -> Forward:
        found = super()._forward(batch, last_layer, skip=skip)
        if sharded.is_sharded(self.model):
            found.values = {layer: sharded.reaching(found.states, values) for layer, values in found.values.items()}
        return found

    def _can_pack(self) -> bool:
        return all(processes.gather(super()._can_pack()))  # all have to know how wide each other's batches are

    def _skipping_is_exact(self, batch: Batch) -> bool:
        return all(processes.gather(super()._skipping_is_exact(batch)))

    def _answers_of_all(self, own: Forward, shares: Sequence[Sequence[Sample]]) -> list[Forward]:
        batches = [self._collate(samples) for samples in shares]
        sizes = [tuple(batch.input_ids.shape) for batch in batches]
        states = processes.exchange(own.states, [(len(batch.rows), *own.states.shape[1:]) for batch in batches])
        hidden, values = (
            {layer: processes.exchange(found, [(*size, *found.shape[2:]) for size in sizes]) for layer, found in some}
            for some in (sorted(own.hidden.items()), sorted(own.values.items()))
        )
        return [
            self._answer(
                batch,
                states[number],
                {layer: found[number] for layer, found in hidden.items()},
                {layer: found[number] for layer, found in values.items()},
            )
            for number, batch in enumerate(batches)
        ]
