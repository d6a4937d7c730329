"""MUSE-Books: four Harry Potter novels to forget, fan-wiki pages to retain (arXiv 2407.06460); see `_muse.py`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from unsink.benchmarks import _muse
from unsink.benchmarks._hub import Hub, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
LICENCE = "cc-by-4.0 by its card; the novels are under copyright: do not pass them on"
PUBLISHED = True
TOKENIZES = True
DATA = Source("muse-bench/MUSE-Books", "051ba90319e920d410d87cfdbd61f25843c1b892")
MODELS = {
    "target": Source("muse-bench/MUSE-Books_target", "c8dd3fb23a726762ec66d277933c7cff6767f3c2"),
    "retrained": Source("muse-bench/MUSE-Books_retrain", "1d67430e4e8bdf2a65823740e909792519175ac2"),
}


class Options(_muse.Options):
    """`fetch.muse-books`."""


def fetch(
    dest: Path, root: Path, path: str | None, *, tokens: int = _muse.TOKENS, tokenizer: "PreTrainedTokenizerBase"
) -> dict[str, Any]:
    """Write MUSE-Books; `path` is a local copy of the hub.

    Raises:
        DataError: the data set cannot be had, or is not as expected.
    """
    return _muse.fetch(dest, Hub.of(root, path), DATA, "MUSE-Books", ("raw", "forget"), tokens, tokenizer)
