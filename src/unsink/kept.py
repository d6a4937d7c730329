"""What frozen models say about fixed samples, for as long as a run lasts: in memory, or in mapped files if it is much.

Pages of a mapped file are the system's: it drops them when memory is short, and reads them again. A file is about one
lot of samples, is there as a whole or not at all, and is named by a hash of weights, samples and what is kept of them:
an interrupted run finds it again, and what another model said, or what was said about other samples, is never taken
for it. As with a checkpoint, that the code is the same is taken for granted.
"""

import hashlib
import os
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from unsink import artifacts, processes
from unsink.batches import Sample
from unsink.errors import ParamsError

Said = dict[str, Tensor]
"""What a model says about one sample, by name; the first dimension counts the sample's tokens or labels."""
Lot = tuple[Sample, ...]
Found = dict[Lot, list[Said] | str]
"""For each lot what a model says about its samples, or the name of the file that holds it."""
Ask = Callable[[Lot], list[Said]]
Keep = Callable[[Lot], list[Said] | str]

ROOM = "UNSINK_IN_MEMORY_MIB"
"""Environment variable: MiB that what is kept may take in memory. It changes no result, so it is no parameter."""
_DEFAULT_ROOM = 512


def room() -> int:
    """Return how many bytes may be kept in memory.

    Raises:
        ParamsError: the environment variable is not a whole number.
    """
    text = os.environ.get(ROOM, "").strip() or str(_DEFAULT_ROOM)
    if not text.isdecimal():
        raise ParamsError(
            f"{ROOM}={text}: a whole number of MiB is expected", f"0 keeps all in files; without it {_DEFAULT_ROOM}"
        )
    return int(text) * 2**20


@dataclass(frozen=True)
class Shelf:
    """Where a run keeps what one frozen model says.

    Attributes:
        folder: of the files, for this run and model alone; None: there are none, and all stays in memory.
        depends: what the answers depend on, beside the samples.
        room: bytes of memory for each token; a lot that takes more goes into a file.
        anew: ask again where there is a file already.
    """

    folder: Path | None
    depends: str
    room: float
    anew: bool = False

    def keep(self, lot: Lot, ask: Ask) -> list[Said] | str:
        """Return what `ask` says about a lot, or the name of the file that holds it; asks only if it has to.

        Raises:
            DataError: the file cannot be written.
        """
        if not self.folder:
            return ask(lot)
        name = f"{self._prefix}-{_hash(repr(lot))}.safetensors"
        if self.anew or not (self.folder / name).exists():
            said = ask(lot)
            size = sum(tensor.nbytes for one in said for tensor in one.values())
            if size <= self.room * sum(len(sample.ids) for sample in lot):
                return said
            tensors = {f"{row}/{key}": tensor for row, one in enumerate(said) for key, tensor in one.items()}
            artifacts.write_tensors(self.folder / name, tensors)
        return name

    def collect(self, parts: Sequence[Found]) -> dict[Sample, Said]:
        """Return what all processes have found, by sample; what is in files is mapped and lies on the CPU.

        Raises:
            MissingPrerequisite: another process has written a file that this one does not see.
        """
        lots = [(lot, what) for found in parts for lot, what in found.items()]
        together = {
            sample: said
            for lot, what in lots
            for sample, said in zip(lot, self._mapped(what, len(lot)) if isinstance(what, str) else what, strict=True)
        }
        if processes.first():
            self._clear({what for _, what in lots if isinstance(what, str)})
        return together

    def _mapped(self, name: str, count: int) -> list[Said]:
        assert self.folder
        said: list[Said] = [{} for _ in range(count)]
        for label, tensor in artifacts.map_tensors(self.folder / name).items():
            row, _, key = label.partition("/")
            said[int(row)][key] = tensor
        return said

    def _clear(self, names: Collection[str]) -> None:
        """Remove what interrupted runs have left: what is torn, or about other models or other samples."""
        for path in self.folder.iterdir() if self.folder and self.folder.is_dir() else ():
            if path.name not in names:
                path.unlink()

    @property
    def _prefix(self) -> str:
        return _hash(self.depends)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
