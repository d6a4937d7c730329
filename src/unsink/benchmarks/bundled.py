"""Our own corpus: fictional worlds written for this project, and a real-world quiz as the utility set."""

from pathlib import Path

from unsink import benchmarks
from unsink.errors import DataError

VERSION = 1
LICENCE = "Apache-2.0"

_IN_PACKAGE = Path(__file__).parent / "bundled_data"  # put there when the wheel is built
_IN_REPOSITORY = Path(__file__).parents[3] / "data" / "bundled"


def fetch(dest: Path, root: Path, path: str | None) -> None:
    """Check and copy the corpus: the project's own, else the installed one.

    Raises:
        ParamsError: `fetch.path` is set.
        DataError: the corpus is not there, or was damaged.
    """
    benchmarks.refuse_path("bundled", path)
    own = root / "data" / "bundled"
    benchmarks.write(dest, benchmarks.read(own if own.is_dir() else installed()))


def installed() -> Path:
    """The folder that came with the package.

    Raises:
        DataError: it is not there.
    """
    places = [_IN_PACKAGE, _IN_REPOSITORY]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(f"the bundled corpus is in none of {', '.join(map(str, places))}", "install unsink again")
    return folder
