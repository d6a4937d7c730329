"""Names of all artefacts, and their atomic reading and writing.

A file or folder appears under its name only when it is complete: it is written beside its place, synced, and renamed.
Text has sorted keys and neither timestamps nor absolute paths, so that the same seed gives the same bytes.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from unsink import processes
from unsink.errors import Busy, DataError, MissingPrerequisite, ParamsError, UnsinkError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

LOG = logging.getLogger(__name__)

_TEMPORARY = ".tmp-"
_FILE_MODE = 0o644  # temporary files are made 0600; other users may read results
_FOLDER_MODE = 0o755
_FULL = (errno.ENOSPC, errno.EDQUOT)


@dataclass(frozen=True)
class Layout:
    """Where everything lies in a project folder."""

    root: Path

    @classmethod
    def of(cls, params: Path) -> "Layout":
        """Layout of the project a params file belongs to: its folder, or the parent of a folder named `params`."""
        folder = params.absolute().parent
        return cls(folder.parent if folder.name == "params" else folder)

    @property
    def fetched(self) -> Path:
        """The corpus in its one schema, and the manifest."""
        return self.root / "data" / "fetched"

    def adapter(self, name: str) -> Path:
        """Folder of the `target` adapter or of a run's."""
        return self.root / "adapters" / name

    def checkpoint(self, name: str) -> Path:
        """Folder of the state of a training that is not finished."""
        return self.root / "checkpoints" / name

    def kept(self, name: str) -> Path:
        """Folder of what frozen models say, until the training is finished."""
        return self.checkpoint(name) / "kept"

    def split(self, run: str) -> Path:
        """Folder of a run's training samples."""
        return self.root / "splits" / run

    def probe(self, name: str) -> Path:
        """Folder of the sink statistics of base, target or a run."""
        return self.root / "probes" / name

    def ablation(self, name: str, how: str) -> Path:
        """Folder of what a model says without some of its keys; never that of its ordinary predictions."""
        return self.root / "ablations" / name / how

    def stress(self, name: str) -> Path:
        """Folder of what a model says after rounding or further training."""
        return self.root / "stress" / name

    def audit(self, name: str) -> Path:
        """Folder of the verdict on a model, and of what it rests on."""
        return self.root / "audits" / named(name)

    def mitigation(self, suspect: str, name: str) -> Path:
        """Folder of a repair, or of what a guard does."""
        return self.root / "mitigations" / named(suspect) / name

    @property
    def report(self) -> Path:
        """Folder of the page and its figures."""
        return self.root / "report"

    def predictions(self, name: str) -> Path:
        """File with one row per prompt."""
        return self.root / "predictions" / f"{name}.jsonl"

    def metrics(self, name: str) -> Path:
        """File with flat numbers."""
        return self.root / "metrics" / f"{name}.json"

    def settings(self, name: str) -> Path:
        """File with the conventions behind the numbers of `metrics`."""
        return self.root / "settings" / f"{name}.json"


def named(name: str) -> str:
    """Return a name that a folder of results can have.

    Raises:
        ParamsError: It stands for another folder.
    """
    if name in ("", ".", ".."):
        raise ParamsError(f"'{name}' is no name for a folder of results", "give the model's folder by its own name")
    return name


def require(path: Path) -> Path:
    """Return `path` if it exists.

    Raises:
        MissingPrerequisite: It does not; the hint names the command that writes it.
    """
    if not path.exists():
        raise MissingPrerequisite(f"{path}: not found", hint=_producer(path))
    return path


def require_new(folder: Path) -> None:
    """Make sure that nothing is lost where a command writes a folder that it was told to.

    Raises:
        ParamsError: A file or a folder that is not empty stands there.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ParamsError(f"--output: {folder} is there already", "name a new folder, or remove that one first")


PRODUCERS = {
    "splits": "poison",
    "adapters": "unlearn",
    "probes": "sink-probe",
    "predictions": "evaluate",
    "metrics": "evaluate",
    "settings": "evaluate",
    "audits": "audit",
    "stress": "stress",
    "ablations": "ablate",
    "mitigations": "mitigate",
}
"""Folder -> the command that writes it, a run at a time."""


def _producer(path: Path) -> str | None:
    if "fetched" in path.parts:
        return "run `unsink fetch` first"
    for folder, inside in reversed(list(zip(path.parts, path.parts[1:], strict=False))):
        if folder in PRODUCERS:
            run = Path(inside).stem if folder in ("predictions", "metrics", "settings") else inside
            target = (folder, run) == ("adapters", "target")
            return f"run `unsink {'memorize' if target else f'{PRODUCERS[folder]} --run {run}'}` first"
    return None


# ---- writing


def _note(what: str, path: Path) -> None:
    """Say it to the log, by the name that a user in the project folder would type; not of parts of a `new_dir`."""
    if _TEMPORARY not in str(path):
        here = Path.cwd()
        LOG.debug("%s %s", what, path.relative_to(here) if path.is_relative_to(here) else path)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_bytes(path, text.encode())


def append_text(path: Path, text: str) -> None:
    """Append UTF-8 text to a file that others write as well."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise write_error(path, error) from error


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys.

    Raises:
        ValueError: A number is not finite; JSON has no word for it.
    """
    write_text(path, json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line atomically, with sorted keys."""
    lines = (json.dumps(row, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    write_text(path, "".join(lines))


def write_tensors(path: Path, tensors: "Mapping[str, Tensor]") -> None:
    """Write tensors as safetensors atomically, readable by every user."""
    write_bytes(path, packed(tensors))


def packed(tensors: "Mapping[str, Tensor]") -> bytes:
    """The bytes of a safetensors file, the same for the same tensors."""
    from safetensors.torch import save

    return save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})


def write_bytes(path: Path, data: bytes) -> None:
    """Write bytes atomically."""
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}{_TEMPORARY}")
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_FILE_MODE)
        temporary.replace(path)
        _note("wrote", path)
    except OSError as error:
        raise write_error(path, error) from error
    finally:
        if temporary:
            temporary.unlink(missing_ok=True)


def write_error(path: Path, error: OSError) -> UnsinkError:
    """The user's view of a failed write to `path`."""
    if error.errno in _FULL:
        return DataError(
            f"{path}: the disk is full", hint="free some space and run the same command again; nothing was half-written"
        )
    return DataError(f"{path}: cannot be written: {error.strerror or error}")


@contextmanager
def new_dir(path: Path) -> Iterator[Path]:
    """Yield an empty folder beside `path` that takes its place on success and vanishes on any error.

    Hold `lock(path)` around it: what a killed process left beside `path` is cleared away first.
    """
    prefix = f".{path.name}{_TEMPORARY}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(f"{prefix}*"):
            remove_dir(leftover)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=prefix))
    except OSError as error:
        raise write_error(path, error) from error
    try:
        yield temporary
        _open_to_all(temporary)
        _swap(temporary, path)
        _note("wrote", path)
    except OSError as error:
        raise (write_error(path, error) if error.errno in _FULL else error) from error
    finally:
        remove_dir(temporary)


def remove_dir(path: Path) -> None:
    """Remove a folder if it is there."""
    shutil.rmtree(path, ignore_errors=True)


def _open_to_all(folder: Path) -> None:
    for item in (folder, *folder.rglob("*")):
        item.chmod(_FOLDER_MODE if item.is_dir() else _FILE_MODE)


def _swap(new: Path, path: Path) -> None:
    """Put `new` in the place of `path`; the old content is kept until the new one stands."""
    old = new.with_name(f"{new.name}.old")
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except OSError:
        if old.exists():
            old.rename(path)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
    else:
        old.unlink(missing_ok=True)


@contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold `<path>.lock` so that no second process writes `path`; a killed process leaves no lock behind.

    Raises:
        Busy: Another process, or another block in this one, holds it.
    """
    name = path.with_name(f"{path.name}.lock")
    with _lock_file(name) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            current = os.fstat(file.fileno()).st_ino == name.stat().st_ino
        except (BlockingIOError, FileNotFoundError):
            current = False
        if not current:  # held, or just removed by its holder
            raise Busy(
                f"{path}: another run is writing it",
                hint="wait until it is done, or stop it; then run the command again",
            )
        try:
            yield
        finally:
            name.unlink(missing_ok=True)


def _lock_file(name: Path) -> TextIO:
    try:
        name.parent.mkdir(parents=True, exist_ok=True)
        return name.open("a")
    except OSError as error:
        raise write_error(name, error) from error


# ---- reading


def read_json(path: Path) -> Any:
    """Read one JSON file.

    Raises:
        MissingPrerequisite: There is no such file.
        DataError: It is not JSON.
    """
    try:
        return json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; blank lines are skipped.

    Raises:
        MissingPrerequisite: There is no such file.
        DataError: It is empty, or a line is not a JSON object.
    """
    lines = enumerate(_read_text(path).split("\n"), start=1)
    rows = [_row(f"{path}:{number}", line) for number, line in lines if line.strip()]
    if not rows:
        raise DataError(f"{path}: holds no records")
    return rows


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets without end
        raise DataError(f"{where}: not JSON that can be read: {error}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, got {type(row).__name__}")
    return row


def _read_text(path: Path) -> str:
    data = _read_bytes(path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text") from error


def _read_bytes(path: Path) -> bytes:
    _note("reading", path)
    try:
        return require(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def read_tensors(path: Path) -> "dict[str, Tensor]":
    """Read a safetensors file.

    Raises:
        MissingPrerequisite: There is no such file.
        DataError: It is truncated or not safetensors.
    """
    from safetensors.torch import load

    with _whole(path):
        return load(_read_bytes(path))


def map_tensors(path: Path) -> "dict[str, Tensor]":
    """Map a safetensors file into memory, to be read where and when its tensors are; raises as `read_tensors` does."""
    from safetensors.torch import load_file

    _note("mapping", path)
    with _whole(path):
        return load_file(require(path))


def read_arrays(path: Path) -> "dict[str, NDArray[Any]]":
    """Read a safetensors file without torch; raises as `read_tensors` does."""
    from safetensors.numpy import load

    with _whole(path):
        return load(_read_bytes(path))


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise DataError(f"{path}: truncated or not safetensors: {error}", hint=_producer(path)) from error


# ---- going on after an interruption


@dataclass(frozen=True)
class Parts:
    """Rows of a stage part by part, in a checkpoint folder until all are done; an interrupted call does not lose them.

    Args:
        folder: made when the first part is done; the stage removes it at its end.
        digest: hash of all that the rows depend on. Parts of another one are not taken.
    """

    folder: Path
    digest: str

    def rows(self, name: str, make: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of a part, made unless they are there; read from the file once it is, so that both are equal.

        Several processes make them together, and the first one writes and reads them; the others keep what they made.
        """
        path = self.folder / f"{name}-{self.digest[:16]}.jsonl"
        if not processes.agreed(path.exists()):
            rows = make()
            if not rows or not processes.first():
                return rows
            write_jsonl(path, rows)
        return read_jsonl(path)

    def remove(self) -> None:
        """Forget them."""
        remove_dir(self.folder)


# ---- hashes

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"


def adapter_identities(folder: Path) -> Iterator[str]:
    """What `models.identity` may call the target with a saved adapter of ours on it, from its files, without the model.

    A LoRA adapter has one name. Whole weights (`rank: null`) are held in the dtype of the model that they are read
    onto: their names follow as they are stored, in float32 and in bfloat16, the latter two with torch.

    Raises:
        MissingPrerequisite: a file is not there.
        DataError: the config is not one that `models.save_adapter` writes.
    """
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    stored = read_json(config)
    base = stored.get("base_model_name_or_path") if isinstance(stored, dict) else None
    if not isinstance(base, str):
        raise DataError(f"{config}: not the config of an adapter of unsink", "make the adapter again (`dvc repro`)")
    yield combined(base, sha256(require(weights)))
    if stored.get("peft_type") == "LORA":
        return
    import torch  # seconds, and seldom needed

    tensors = read_tensors(weights)
    for dtype in (torch.float32, torch.bfloat16):
        cast = packed({name: tensor.to(dtype) for name, tensor in tensors.items()})
        yield combined(base, hashlib.sha256(cast).hexdigest())


def combined(*hashes: str) -> str:
    """One hash of several, as models are called: `sha256:` and hexadecimal digits."""
    return "sha256:" + hashlib.sha256("\n".join(hashes).encode()).hexdigest()


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    _note("hashing", path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
