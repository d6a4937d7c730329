"""`unsink fetch`: bring corpus and model to this computer, and pin both in a manifest.

Every benchmark arrives in one schema. Weights stay in the user's cache; the manifest holds their hashes.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

from unsink import artifacts, benchmarks, registry
from unsink.artifacts import Layout
from unsink.errors import ParamsError
from unsink.params import BENCHMARKS, Params
from unsink.progress import SILENT, Reporter
from unsink.sources import model_files, resolve


def run(params: Params, layout: Layout, *, check: bool = False, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `data/fetched/` and return its manifest; with `check` read the corpus only, and count its records.

    Raises:
        ParamsError: `fetch.path` is missing, or given to a benchmark that has its own text.
        DataError: the corpus is missing or malformed.
        ModelError: a model cannot be had.
    """
    if check:
        return {"benchmark": params.fetch.benchmark, "rows": count(params, layout)}
    models = getattr(_load(params.fetch.benchmark), "MODELS", {})
    with artifacts.lock(layout.fetched), artifacts.new_dir(layout.fetched) as new:
        folder = cache(lambda: resolve(params.model.source, params.model.revision, reporter))
        origin = collect(params, layout, new, folder)  # before the model, if it can: mistakes here show at once
        manifest = {
            **describe(params, new),
            **_terms(params.fetch.benchmark),
            "utility": params.fetch.utility and {"benchmark": params.fetch.utility, **_terms(params.fetch.utility)},
            "origin": origin,
            "models": {name: source._asdict() for name, source in models.items()},
            "model": _model(params.model.source, params.model.revision, folder()),
        }
        if target := params.memorize.published:
            there = resolve(target.source, target.revision, reporter, "memorize.published")
            manifest["target"] = _model(target.source, target.revision, there)
        artifacts.write_json(new / benchmarks.MANIFEST, manifest)
    return manifest


def count(params: Params, layout: Layout) -> dict[str, int]:
    """Read the corpus as `run` does, and leave nothing behind; the number of records by file."""
    model = partial(resolve, params.model.source, params.model.revision)
    return {name: len(records) for name, records in read(params, layout, model).items() if records}


def read(params: Params, layout: Layout, model: Callable[[], Path]) -> dict[str, list[Any]]:
    """The records that `run` would write, checked; `model` gives the folder of `model.source`, where that is needed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        collect(params, layout, folder, model)
        artifacts.write_json(folder / benchmarks.MANIFEST, describe(params, folder))
        return dict(benchmarks.read(folder))


def downloads(params: Params) -> bool:
    """Whether `run` would ask the hub for data."""
    return any(map(_published, _used(params))) and not (params.fetch.path or os.environ.get(benchmarks.HUB_ROOT))


def tokenizes(params: Params) -> bool:
    """Whether `run` needs the model's tokenizer to make the corpus."""
    return any(_tokenizes(params, name) for name in _used(params))


def collect(params: Params, layout: Layout, dest: Path, model: Callable[[], Path]) -> dict[str, Any]:
    """Let the benchmark write its files, and another one the utility questions if it is to; say what they come from."""
    origin = {params.fetch.benchmark: _fetch(params, layout, params.fetch.benchmark, dest, model)}
    if other := params.fetch.utility:
        with tempfile.TemporaryDirectory() as folder:
            origin[other] = _fetch(params, layout, other, Path(folder), model)
            found = [benchmarks.files(Path(folder))[name] for name in benchmarks.GENERAL]
            if not any(path.exists() for path in found):
                raise ParamsError(f"fetch.utility: {other} has no four-choice questions of general knowledge")
            for path in found:
                if path.exists():
                    shutil.copy(path, dest / path.name)
    return {name: said for name, said in origin.items() if said}


def _fetch(params: Params, layout: Layout, name: str, dest: Path, model: Callable[[], Path]) -> Any:
    # One path for two benchmarks can only be a local copy of the hub.
    own = name == params.fetch.benchmark or all(map(_published, _used(params)))
    path, options = params.fetch.path if own else None, params.fetch.options(name)
    if _tokenizes(params, name):
        from unsink.tokenizer import load_tokenizer  # takes seconds, and few benchmarks need it

        options["tokenizer"] = load_tokenizer(model())
    return _load(name).fetch(dest, layout.root, path, **options)


def _load(name: str) -> ModuleType:
    return registry.load("benchmark", BENCHMARKS, name)


def _terms(name: str) -> dict[str, Any]:
    benchmark = _load(name)
    return {"version": benchmark.VERSION, "licence": benchmark.LICENCE}


def _used(params: Params) -> list[str]:
    return [name for name in (params.fetch.benchmark, params.fetch.utility) if name]


def _tokenizes(params: Params, name: str) -> bool:
    always_or_option: bool | str = getattr(_load(name), "TOKENIZES", False)
    if isinstance(always_or_option, str):
        return bool(params.fetch.options(name)[always_or_option])
    return always_or_option


def _published(name: str) -> bool:
    return getattr(_load(name), "PUBLISHED", False)


def describe(params: Params, folder: Path) -> dict[str, Any]:
    """The part of the manifest that `benchmarks.read` goes by: which files were written, and whose work they are."""
    return {
        "benchmark": params.fetch.benchmark,
        "published": any(map(_published, _used(params))),
        "files": {path.name: _pin(path) for path in benchmarks.files(folder).values() if path.exists()},
    }


def _model(source: str, revision: str | None, folder: Path) -> dict[str, Any]:
    files = model_files(folder)
    return {
        "source": _without_folder(source),
        "revision": revision,
        "files": {path.name: artifacts.sha256(path) for path in files},
    }


def _pin(path: Path) -> dict[str, Any]:
    return {"sha256": artifacts.sha256(path), "rows": len(artifacts.read_jsonl(path))}


def _without_folder(source: str) -> str:
    """A local model by its last name only: outputs hold no paths of this computer."""
    folder = Path(source).expanduser()
    return folder.name if folder.is_dir() else source
