"""A corpus of the user's own: a folder with the eight files, and others of the schema if need be: `fetch.path`."""

from pathlib import Path

from unsink import benchmarks
from unsink.errors import DataError, ParamsError
from unsink.registry import suggest

VERSION = 1
LICENCE = "set by the owner of the folder"


def fetch(dest: Path, root: Path, path: str | None) -> None:
    """Check and copy a folder; a relative `path` counts from the project folder.

    Raises:
        ParamsError: `fetch.path` is missing.
        DataError: the folder is not there, its records do not follow the schema, or a file has a name outside it.
    """
    if not path:
        raise ParamsError("fetch.path: benchmark 'local' needs the folder of the corpus", "set fetch.path")
    folder = root / Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"fetch.path: no such folder: {folder}", "give the folder that holds the eight JSONL files")
    known = {file.name for file in benchmarks.files(folder).values()}
    for name in sorted(file.name for file in folder.glob("*.jsonl")):
        if name not in known:
            raise DataError(
                f"{folder / name}: no file of a corpus has this name{suggest(name, known)}",
                f"rename or remove it; there can be {', '.join(sorted(known))}",
            )
    benchmarks.write(dest, benchmarks.read(folder))
