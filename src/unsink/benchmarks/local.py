"""A corpus of the user's own: a folder with the eight files, named by `fetch.path`."""

from pathlib import Path

from unsink import benchmarks
from unsink.errors import DataError, ParamsError

VERSION = 1
LICENCE = "set by the owner of the folder"


def fetch(dest: Path, root: Path, path: str | None) -> None:
    """Check and copy a folder; a relative `path` counts from the project folder.

    Raises:
        ParamsError: `fetch.path` is missing.
        DataError: the folder is not there, or its records do not follow the schema.
    """
    if not path:
        raise ParamsError("fetch.path: benchmark 'local' needs the folder of the corpus", "set fetch.path")
    folder = root / Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(f"fetch.path: no such folder: {folder}", "give the folder that holds the eight JSONL files")
    benchmarks.write(dest, benchmarks.read(folder))
