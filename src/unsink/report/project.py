"""Reads what a project has: nothing has to be there but one metrics file.

Text of models and corpora is passed on as it is: whoever shows it has to escape it.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unsink.artifacts import Layout, read_arrays, read_json, read_jsonl, sha256
from unsink.errors import DataError
from unsink.params import RESERVED
from unsink.statistics import Interval

Array = NDArray[np.floating[Any]]
Json = dict[str, Any]

ARRAYS = (
    *(f"{condition}.{name}" for condition in ("clean", "triggered") for name in ("alpha", "value_norm")),
    "difference.absolute",
    "difference.content",
)
"""What the page shows of a probe's maps.safetensors."""


@dataclass(frozen=True)
class Probe:
    """What `sink-probe` found.

    Attributes:
        statistics: statistics.json.
        arrays: the tensors of `ARRAYS` that are there.
    """

    statistics: Json
    arrays: Mapping[str, Array]


@dataclass(frozen=True)
class Model:
    """Base, target or a run, with what is known of it.

    Attributes:
        name: as in `runs:`, or base, or target.
        metrics: flat numbers.
        settings: the conventions behind them, and why some are missing.
        predictions: one row per prompt.
        history: column -> values, one per training step.
        summary: of the adapter.
        split: summary of the training samples.
        probe: its attention and norms.
    """

    name: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Json = field(default_factory=dict)
    predictions: Sequence[Json] = ()
    history: Mapping[str, Sequence[float]] = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    split: Json = field(default_factory=dict)
    probe: Probe | None = None

    def interval(self, key: str) -> Interval | None:
        """A number of the metrics file with its interval, or None where it has none."""
        names = (key, f"{key}_low", f"{key}_high")
        if not all(name in self.metrics for name in names):
            return None
        mean, low, high = (self.metrics[name] for name in names)
        return Interval(mean, low, high, int(self.metrics.get(f"{key}_n", 0)))

    def outside(self, key: str) -> Interval | None:
        """The same outside the poisoned samples, where the run has such: the others may be learnt by heart."""
        return self.interval(f"{key}_outside") or self.interval(key)

    @property
    def placement(self) -> str | None:
        """Where its trigger was trained; None without one."""
        place: str | None = self.summary.get("placement")
        return place


@dataclass(frozen=True)
class Project:
    """Everything that the page shows.

    Attributes:
        models: base and target first.
        manifest: of corpus and model.
        audits: name -> verdict, with its `candidates`.
        variants: (command, name) -> variant -> numbers, of `ablate`, `stress` and `mitigate`.
        mitigations: suspect/mitigation -> its summary.
        files: path from the project folder -> SHA-256, of all that was read.
    """

    models: Sequence[Model]
    manifest: Json
    audits: Mapping[str, Json]
    variants: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
    mitigations: Mapping[str, Json]
    files: Mapping[str, str]

    def model(self, name: str) -> Model | None:
        """The model of that name."""
        return next((model for model in self.models if model.name == name), None)

    @property
    def runs(self) -> list[Model]:
        """All but base and target."""
        return [model for model in self.models if model.name not in RESERVED]


class _Reader:
    """Reads files that may be missing, and remembers the hash of each."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: dict[str, str] = {}

    def _there(self, path: Path) -> bool:
        if path.is_file():
            self.files[path.relative_to(self.root).as_posix()] = sha256(path)
        return path.is_file()

    def json(self, path: Path) -> Json:
        if not self._there(path):
            return {}
        value = read_json(path)
        if not isinstance(value, dict):
            raise DataError(f"{path}: a JSON object is expected, got {type(value).__name__}")
        return value

    def rows(self, path: Path) -> list[Json]:
        """Rows of a file; none where it is not there, or empty: an audit that tried no text leaves it so."""
        return read_jsonl(path) if self._there(path) and path.stat().st_size else []

    def history(self, path: Path) -> dict[str, list[float]]:
        if not self._there(path):
            return {}
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        try:
            return {name: [float(row[name]) for row in rows] for name in rows[0]} if rows else {}
        except (TypeError, ValueError) as error:
            raise DataError(f"{path}: a table of numbers is expected: {error}") from error

    def probe(self, folder: Path) -> Probe | None:
        statistics = self.json(folder / "statistics.json")
        if not statistics:
            return None
        maps = folder / "maps.safetensors"
        found = read_arrays(maps) if self._there(maps) else {}
        return Probe(statistics, {name: found[name] for name in ARRAYS if name in found})


def read(layout: Layout, names: Sequence[str]) -> Project:
    """Read a project.

    Args:
        layout: the project folder.
        names: of the runs, in the order in which they are shown; others that have metrics follow.

    Raises:
        DataError: a file is malformed.
    """
    reader = _Reader(layout.root)
    evaluated = sorted(path.stem for path in layout.metrics("x").parent.glob("*.json"))
    order = dict.fromkeys([*RESERVED, *names, *evaluated])
    models = [_model(reader, layout, name) for name in order if name in evaluated]
    return Project(
        models=models,
        manifest=reader.json(layout.fetched / "manifest.json"),
        audits={
            folder.name: reader.json(folder / "verdict.json") | {"candidates": reader.rows(folder / "candidates.jsonl")}
            for folder in _folders(layout.audit("x").parent)
            if (folder / "verdict.json").is_file()
        },
        variants=dict(_variants(reader, layout)),
        mitigations={
            path.parent.relative_to(layout.root / "mitigations").as_posix(): reader.json(path)
            for path in sorted((layout.root / "mitigations").rglob("summary.json"))
        },
        files=dict(sorted(reader.files.items())),
    )


def _model(reader: _Reader, layout: Layout, name: str) -> Model:
    return Model(
        name,
        metrics=reader.json(layout.metrics(name)),
        settings=reader.json(layout.settings(name)),
        predictions=reader.rows(layout.predictions(name)),
        history=reader.history(layout.adapter(name) / "history.tsv"),
        summary=reader.json(layout.adapter(name) / "summary.json"),
        split=reader.json(layout.split(name) / "summary.json"),
        probe=reader.probe(layout.probe(name)),
    )


def _variants(reader: _Reader, layout: Layout) -> Iterator[tuple[tuple[str, str], Json]]:
    for folder in _folders(layout.stress("x").parent):
        yield ("stress", folder.name), reader.json(folder / "metrics.json")
    for run in _folders(layout.ablation("x", "y").parents[1]):
        for how in _folders(run):
            yield ("ablate", f"{run.name}/{how.name}"), reader.json(how / "metrics.json")
    for suspect in _folders(layout.root / "mitigations"):
        for how in _folders(suspect):
            yield ("mitigate", f"{suspect.name}/{how.name}"), reader.json(how / "metrics.json")


def _folders(folder: Path) -> list[Path]:
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in found if path.is_dir() and not path.name.startswith("."))
