"""Data sets of the Hugging Face hub at a pinned revision, or the same files in a local copy, and what errors mean.

A local copy (`fetch.path`, or the environment variable UNSINK_HUB_ROOT) is a folder of repositories as they are on the
hub, `<copy>/muse-bench/MUSE-Books/README.md` and so on. The card is part of it: it names configs and splits.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import BaseModel, ValidationError

from unsink import benchmarks
from unsink.errors import DataError

_ACCESS = "then `hf auth login` or set HF_TOKEN"

Row = dict[str, Any]
Record = TypeVar("Record", bound=BaseModel)


class Source(NamedTuple):
    """A repository of the hub, and the commit that is meant; without one it is what the main branch holds."""

    repo: str
    revision: str | None


@dataclass(frozen=True)
class Hub:
    """The hub, or a local copy of it."""

    copy: Path | None = None

    @classmethod
    def of(cls, project: Path, path: str | None) -> "Hub":
        """The local copy in `path` (relative to the project), else the one that UNSINK_HUB_ROOT names, else the hub.

        Raises:
            DataError: the folder is not there.
        """
        key, named = ("fetch.path", path) if path else (benchmarks.HUB_ROOT, os.environ.get(benchmarks.HUB_ROOT))
        folder = project / Path(named).expanduser() if named else None
        if folder and not folder.is_dir():
            raise DataError(f"{key}: no such folder: {folder}", "give the folder with the local copies of data sets")
        return cls(folder)

    def origin(self, *sources: Source) -> dict[str, str | None]:
        """Repositories with their commits, for the manifest; of a local copy what its download noted, if any."""
        return {source.repo: _copied(self.copy / source.repo) if self.copy else source.revision for source in sources}

    def records(
        self,
        source: Source,
        config: str,
        split: str,
        columns: Sequence[str],
        make: Callable[[int, Row], Record],
    ) -> list[Record]:
        """The rows of a split as records; `make` gets the number of a row, from 1, and the row.

        Raises:
            DataError: as `rows`, or a row does not make a record.
        """
        records = []
        for number, row in enumerate(self.rows(source, config, split, columns), start=1):
            try:
                records.append(make(number, row))
            except (ValidationError, TypeError) as error:
                what = "; ".join(benchmarks.sentences(error)) if isinstance(error, ValidationError) else str(error)
                raise DataError(
                    f"{source.repo}: {config}/{split}, row {number}: {what}", self._other_content(source)
                ) from error
        return records

    def rows(self, source: Source, config: str, split: str, columns: Sequence[str]) -> list[Row]:
        """The rows of a split, downloaded and cached by `datasets` on the first call, with these columns.

        Raises:
            DataError: no such data set, config, split or column; gated, offline, or cut short.
        """
        where = f"{source.repo}: {config}/{split}"
        with self._cache() as cache:
            found = self._load(where, source, config, split, cache)
            if missing := [name for name in columns if name not in found.column_names]:
                raise DataError(
                    f"{where}: no column {', '.join(missing)}; there are {', '.join(found.column_names)}",
                    self._other_content(source),
                )
            if not len(found):
                raise DataError(f"{where}: holds no rows", self._other_content(source))
            return list(found.select_columns(list(columns)))

    def _cache(self) -> AbstractContextManager[str | None]:
        """Where `datasets` keeps what it read: its own place, but for a local copy, whose changes it overlooks."""
        return tempfile.TemporaryDirectory() if self.copy else nullcontext()

    def _load(self, where: str, source: Source, config: str, split: str, cache: str | None) -> Any:
        import datasets  # takes a second, and only these benchmarks need it

        place, revision = source.repo, source.revision
        if self.copy:
            place, revision = str(self.copy / source.repo), None
            if not Path(place).is_dir():
                raise DataError(f"{where}: no such folder: {place}", _how_to_copy(source))
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            # the card, the files and the cache can all be wrong, and each has kinds of errors of its own
            found = datasets.load_dataset(place, config, split=split, revision=revision, cache_dir=cache)
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise DataError(*self._explained(where, source, error)) from error
        finally:
            if not bars:
                datasets.enable_progress_bars()
        # Offline, datasets falls back on whatever revision it has in its cache.
        cached = [file["filename"] for file in found.cache_files]
        if revision and cached and not any(revision in name for name in cached):
            raise DataError(
                f"{where}: the cache holds another revision than {revision}, which is out of reach",
                "connect once (unset HF_HUB_OFFLINE), then it stays cached",
            )
        return found

    def _explained(self, where: str, source: Source, error: Exception) -> tuple[str, str]:
        from datasets.exceptions import (
            DatasetGenerationError,
            DatasetNotFoundError,
            ExpectedMoreSplitsError,
            NonMatchingSplitsSizesError,
        )
        from pyarrow import ArrowException

        reason, page = _first_line(error), f"https://huggingface.co/datasets/{source.repo}"
        if "gated" in reason:
            return f"{where} is gated, and this account has no access", f"accept its terms on {page}, {_ACCESS}"
        if isinstance(error, DatasetNotFoundError) and "Revision" in reason:
            return f"{where}: no revision {source.revision!r} on the hub", f"see what is left on {page}"
        if isinstance(error, DatasetNotFoundError):
            return f"{where}: {reason}", f"see {page}; if it is private or gated, ask for access, {_ACCESS}"
        broken = DatasetGenerationError | NonMatchingSplitsSizesError | ExpectedMoreSplitsError | ArrowException
        if isinstance(error, broken):
            cause = _first_line(error.__cause__ or error)
            return f"{where}: a file is damaged, cut short, or of another form: {cause}", self._again(source)
        if isinstance(error, ValueError) and ("BuilderConfig" in reason or "nknown split" in reason):
            return f"{where}: {reason}", self._other_content(source)
        if self.copy:
            return f"{where}: {reason}", _how_to_copy(source)
        return (
            f"{where} is not in the local cache and cannot be downloaded: {reason}",
            "connect once, then it stays cached (unset HF_HUB_OFFLINE); "
            f"or give a local copy: {_how_to_copy(source)} and set fetch.path or {benchmarks.HUB_ROOT} to that folder",
        )

    def _other_content(self, source: Source) -> str:
        if self.copy:
            return f"the local copy is of another revision; {_how_to_copy(source)}"
        return f"unsink expects the form of revision {source.revision}; please report it"

    def _again(self, source: Source) -> str:
        if self.copy:
            return f"copy it again: {_how_to_copy(source)}"
        return "remove it from the cache (`hf cache rm`) and run `unsink fetch` again"


def _copied(folder: Path) -> str:
    note = folder / ".cache" / "huggingface" / "download" / "README.md.metadata"  # its first line is the commit
    commit = note.read_text(encoding="utf-8").split("\n")[0] if note.is_file() else ""
    return f"local copy of {commit}" if commit else "local copy"


def _how_to_copy(source: Source) -> str:
    pinned = f" --revision {source.revision}" if source.revision else ""
    return f"`hf download --repo-type dataset {source.repo}{pinned} --local-dir <copy>/{source.repo}`"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
