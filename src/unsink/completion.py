"""What the shell offers behind an option: runs, and params keys with the values that are names.

It has to answer at once and must not fail, so the params file is read as it stands, unchecked.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
import yaml
from pydantic import BaseModel

from unsink.params import BENCHMARKS, METHODS, RESERVED, Params
from unsink.registry import names
from unsink.triggers import PLACEMENTS, SINK


def runs(context: typer.Context, incomplete: str) -> list[str]:
    """Entries of `runs:`."""
    return [name for name in _runs(context) if name.startswith(incomplete)]


def models(context: typer.Context, incomplete: str) -> list[str]:
    """Base, target, and entries of `runs:`."""
    return [name for name in (*RESERVED, *_runs(context)) if name.startswith(incomplete)]


def settings(context: typer.Context, incomplete: str) -> list[str]:
    """Keys of the params file as `key=`; behind the sign, the values that a key can have where these are names."""
    key, sign, _ = incomplete.partition("=")
    if not sign:
        return [f"{name}=" for name in _keys(_read(context)) if name.startswith(key)]
    return [f"{key}={value}" for value in _values(key) if f"{key}={value}".startswith(incomplete)]


def _runs(context: typer.Context) -> list[str]:
    found = _read(context).get("runs")
    return [str(name) for name in found] if isinstance(found, Mapping) else []


def _read(context: typer.Context) -> Mapping[str, Any]:
    try:
        found = yaml.safe_load(Path(context.params.get("params") or "params.yaml").read_bytes())
    except (OSError, yaml.YAMLError):
        return {}
    return found if isinstance(found, Mapping) else {}


def _keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in section.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _values(key: str) -> list[str]:
    match key.split(".")[-2:]:
        case ["unlearn", "method"]:
            return names(METHODS)
        case ["poison", "placement"]:
            return [*PLACEMENTS, SINK]
        case ["fetch", "benchmark" | "utility"]:
            return names(BENCHMARKS)
    return _literals(Params, key.split("."))


def _literals(model: type[BaseModel], path: list[str]) -> list[str]:
    """The values of a field that takes one of a few words or true and false."""
    kind = {field.alias or name: field.annotation for name, field in model.model_fields.items()}.get(path[0])
    if isinstance(kind, type) and issubclass(kind, BaseModel) and path[1:]:
        return _literals(kind, path[1:])
    if path[1:]:
        return []
    if kind is bool:
        return ["true", "false"]
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []
