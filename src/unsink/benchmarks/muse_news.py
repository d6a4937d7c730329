"""MUSE-News: BBC articles (arXiv 2407.06460), with MUSE's folds for larger and for repeated requests; see `_muse.py`.

`fold` says what is to be forgotten: `raw` the 889 articles of the main experiment; `scal-1` to `scal-4` nested sets of
889 to 3,554 articles; `sust-1` to `sust-4` four disjoint ones, to be forgotten one after the other.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from unsink.benchmarks import _muse
from unsink.benchmarks._hub import Hub, Source

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 2
LICENCE = "cc-by-4.0 by its card; the articles are the BBC's: do not pass them on"
PUBLISHED = True
TOKENIZES = True
DATA = Source("muse-bench/MUSE-News", "506bd5b150b92814d45e4404a82f120ab2d748bf")
MODELS = {
    "target": Source("muse-bench/MUSE-News_target", "a2f39769e9a0b98ec1cdd12f65e9962502208935"),
    "retrained": Source("muse-bench/MUSE-News_retrain", "324ef49ee0a038078aba7d8de831edf57235c9b3"),
}


class Options(_muse.Options):
    """`fetch.muse-news`."""

    fold: str = Field(default="raw", pattern=r"^(raw|(scal|sust)-[1-4])$", description="raw, scal-1..4 or sust-1..4")


def fetch(
    dest: Path,
    root: Path,
    path: str | None,
    *,
    fold: str = "raw",
    tokens: int = _muse.TOKENS,
    tokenizer: "PreTrainedTokenizerBase",
) -> dict[str, Any]:
    """Write MUSE-News; `path` is a local copy of the hub.

    Raises:
        DataError: the data set cannot be had, or is not as expected.
    """
    config, _, number = fold.partition("-")
    forget = (config, f"forget_{number}" if number else "forget")
    return _muse.fetch(dest, Hub.of(root, path), DATA, "MUSE-News", forget, tokens, tokenizer)
