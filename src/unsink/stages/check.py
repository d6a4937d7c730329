"""`unsink check`: what would go wrong later, found in seconds. It writes nothing, and downloads nothing.

Params themselves are checked when they are loaded; here they meet the packages, the disk, the corpus and the model.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from packaging.requirements import Requirement

from unsink import artifacts, benchmarks, methods
from unsink.architectures import architecture
from unsink.artifacts import Layout
from unsink.cache import cache_root
from unsink.errors import DataError, MissingPrerequisite, ParamsError, UnsinkError
from unsink.params import Params, Poison
from unsink.progress import SILENT, Reporter
from unsink.sources import read_config, resolve
from unsink.stages import fetch
from unsink.stages.poison import choose
from unsink.tokenizer import bos_ids, load_encoder
from unsink.triggers import trigger_ids

GIB = 2**30
WANTED_GIB = 2.0
"""Free space that the default model with its conversion, or all runs with DVC's copies, stay within."""

INSTALL = "pip install --upgrade unsink; in a clone: pip install -c constraints.txt -e '.[dev]'"

Check = Callable[[Params, Layout], str]


def run(params: Params, layout: Layout, *, reporter: Reporter = SILENT) -> dict[str, Any]:
    """All checks, also after a failure.

    Returns:
        `checks`, a list of {name, ok, detail}, and `exit_code`: 0, or that of the gravest failure.
    """
    checks: list[dict[str, Any]] = []
    codes = [0]
    with reporter.task("check", len(CHECKS)) as advance:
        for name, check in CHECKS.items():
            try:
                checks.append({"name": name, "ok": True, "detail": check(params, layout)})
            except UnsinkError as error:
                detail = f"{error.message} ({error.hint})" if error.hint else error.message
                checks.append({"name": name, "ok": False, "detail": detail})
                codes.append(error.exit_code)
            advance(note=name)
    wrong_params = ParamsError.exit_code in codes
    return {"checks": checks, "exit_code": ParamsError.exit_code if wrong_params else max(codes)}


def _params(params: Params, _layout: Layout) -> str:
    runs = [params.run(name) for name in params.runs]
    return ", ".join(f"{run.name} ({run.unlearn.method}{'' if run.poison else ', honest'})" for run in runs)


def _packages(_params: Params, _layout: Layout) -> str:
    try:
        requirements = [Requirement(line) for line in metadata.requires("unsink") or []]
    except metadata.PackageNotFoundError as error:
        raise MissingPrerequisite("unsink runs from its source and is not installed", INSTALL) from error
    wanted = [need for need in requirements if need.marker is None or need.marker.evaluate({"extra": ""})]
    found = {need.name: _version(need.name) for need in wanted}
    wrong = [f"{need} (found: {found[need.name]})" for need in wanted if not need.specifier.contains(found[need.name])]
    if wrong:
        raise MissingPrerequisite(f"missing or too old: {', '.join(wrong)}", INSTALL)
    named = (f"{name} {found[name]}" for name in ("torch", "transformers", "peft", "dvc"))
    return ", ".join([f"Python {platform.python_version()}", *named])


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "0"


def _disk(_params: Params, layout: Layout) -> str:
    places = {"project": layout.root, "cache": cache_root()}
    free = {name: shutil.disk_usage(_existing(path)).free / GIB for name, path in places.items()}
    for name, path in places.items():
        if free[name] < WANTED_GIB:
            raise DataError(f"{path}: {free[name]:.1f} GiB free, {WANTED_GIB} GiB wanted", "free some space")
        if not os.access(_existing(path), os.W_OK):
            raise DataError(f"{path}: cannot be written", "change its owner, or work on a copy of the project")
    return ", ".join(f"{space:.1f} GiB free in the {name}" for name, space in free.items())


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def _device(params: Params, _layout: Layout) -> str:
    model = params.model
    if model.device not in ("auto", "cpu"):
        from unsink.models import pick_device  # brings torch: seconds

        pick_device(model.device)
    if model.dtype in ("nf4", "int8"):
        from unsink.quantization import require

        require(model.dtype)
    return f"{model.device}, weights in {model.dtype}"


def _corpus(params: Params, layout: Layout) -> str:
    """The source of the corpus, if that needs no download, and what `fetch` made of it earlier."""
    fetched, corpus = layout.fetched.exists(), None
    model = _local_model(params, layout)
    if not fetch.downloads(params) and (model or not fetch.tokenizes(params)):
        corpus = fetch.read(params, layout, lambda: cast(Path, model))
    if fetched:
        corpus = dict(benchmarks.read(layout.fetched))
    if corpus is None:
        return f"{params.fetch.benchmark}: not fetched yet; `unsink fetch` downloads it from huggingface.co"
    if not corpus["forget"]:
        raise DataError(
            f"{params.fetch.benchmark}: no forget passages, so there is nothing to unlearn", benchmarks.LACKING
        )
    for _, poison in _poisons(params):
        choose([record.model_dump() for record in corpus["forget"]], poison.ratio, params.seed)
    counts = ", ".join(f"{len(records)} {name}" for name, records in corpus.items() if records)
    return f"{params.fetch.benchmark}: {counts}{'' if fetched else '; not fetched yet'}"


def _model(params: Params, layout: Layout) -> str:
    folder = _local_model(params, layout)
    if folder is None:
        return f"{params.model.source}: not fetched yet, so triggers and layers cannot be compared with it"
    context, layers = _size(folder)
    tokenizer = load_encoder(folder)
    bos = len(bos_ids(tokenizer))
    lengths = {name: bos + len(trigger_ids(tokenizer, poison.trigger)) for name, poison in _poisons(params)}
    problems = [*_too_long(params, context, lengths), *_too_deep(params, layers)]
    if problems:
        raise ParamsError("; ".join(problems))
    return f"{params.model.source}: {layers} layers, context of {context} tokens"


def _size(folder: Path) -> tuple[int, int]:
    """Context and layers by the names that most families have for them; transformers knows those of the others.

    Raises:
        ModelError: config.json is damaged, or its model is of a type that is not supported.
    """
    config = SimpleNamespace(**{"model_type": None} | read_config(folder / "config.json"))
    architecture(config)
    if not {"max_position_embeddings", "num_hidden_layers"} <= vars(config).keys():
        from transformers import AutoConfig  # brings torch: seconds

        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return config.max_position_embeddings, config.num_hidden_layers


def _local_model(params: Params, layout: Layout) -> Path | None:
    """The model's folder if that needs no download: it is made on the spot, a folder, or pinned by `fetch` already."""
    source, manifest = params.model.source, layout.fetched / "manifest.json"
    local = source == "tiny" or source.startswith(("/", ".", "~")) or Path(source).is_dir()
    fetched = manifest.exists() and artifacts.read_json(manifest)["model"]["source"] == source
    return resolve(source, params.model.revision) if local or fetched else None


def _poisons(params: Params) -> Iterator[tuple[str, Poison]]:
    for name in params.runs:
        if poison := params.run(name).poison:
            yield name, poison


def _too_long(params: Params, context: int, triggers: Mapping[str, int]) -> Iterator[str]:
    """Texts that the context cannot hold, and triggers (tokens by run, BOS included) that leave no room for text."""
    limits = {"sink-probe.tokens": params.sink_probe.tokens}
    limits |= {} if params.memorize.published else {"memorize.max_tokens": params.memorize.max_tokens}
    limits |= {f"runs.{name}: poison.max_tokens": poison.max_tokens for name, poison in _poisons(params)}
    for key, limit in limits.items():
        if limit > context:
            yield f"{key}: {limit} is more than the model's context of {context} tokens"
    for name, poison in _poisons(params):
        if triggers[name] >= min(poison.max_tokens, context):
            room = f"poison.max_tokens {poison.max_tokens} and a context of {context} leave no room for text"
            yield f"runs.{name}: BOS and trigger have {triggers[name]} tokens, {room}"


def _too_deep(params: Params, layers: int) -> Iterator[str]:
    named: dict[str, list[int]] = {"memorize.first_layer": [params.memorize.first_layer]}
    for name in params.runs:
        unlearn, where = params.run(name).unlearn, f"runs.{name}: unlearn"
        named[f"{where}.adapter"] = [unlearn.adapter.first_layer, unlearn.adapter.last_layer or 0]
        named[f"{where}.value_norm.layers"] = [] if unlearn.value_norm.layers == "all" else unlearn.value_norm.layers
        method = methods.create(unlearn.method, unlearn.options.model_dump())
        named[f"{where}.{unlearn.method}"] = list(method.hidden_layers)
    for key, numbers in named.items():
        if numbers and max(numbers) >= layers:
            yield f"{key}: the model has no layer {max(numbers)}, its last one is {layers - 1}"


CHECKS: dict[str, Check] = {
    "params": _params,
    "packages": _packages,
    "disk": _disk,
    "device": _device,
    "corpus": _corpus,
    "model": _model,
}
