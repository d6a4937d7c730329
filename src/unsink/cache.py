"""Models made on this computer: one folder each in the user's cache, complete or not there at all."""

import json
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import platformdirs

from unsink.artifacts import lock, new_dir, write_json
from unsink.errors import Busy
from unsink.progress import SILENT, Reporter

_SIZES = ".complete.json"
_POLL_SECONDS = 0.5


def cache_root() -> Path:
    """The user's cache folder; the environment variable UNSINK_CACHE overrides it."""
    override = os.environ.get("UNSINK_CACHE")
    return Path(override).expanduser() if override else platformdirs.user_cache_path("unsink")


def make_once(name: str, make: Callable[[Path], None], reporter: Reporter = SILENT) -> Path:
    """Return the cached folder `name`, made by `make(empty folder)` if it is not there or no longer complete.

    A second process waits for the first. An error or Ctrl-C leaves nothing behind.
    """
    folder = cache_root() / name
    if _complete(folder):
        return folder
    with ExitStack() as stack:
        _wait_for_lock(stack, folder, reporter)
        if not _complete(folder):
            with new_dir(folder) as fresh:
                make(fresh)
                write_json(fresh / _SIZES, _sizes(fresh))
    return folder


def _wait_for_lock(stack: ExitStack, folder: Path, reporter: Reporter) -> None:
    told = False
    while True:
        try:
            stack.enter_context(lock(folder))
        except Busy:
            if not told:
                reporter.log(f"waiting for another process that is making {folder}")
            told = True
            time.sleep(_POLL_SECONDS)
        else:
            return


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != _SIZES}


def _complete(folder: Path) -> bool:
    """Sizes are compared, so that a file cut short by hand or by a full disk is made again."""
    try:
        return bool(json.loads((folder / _SIZES).read_text()) == _sizes(folder))
    except (OSError, ValueError):
        return False
