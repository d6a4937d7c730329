"""Imports only go down, and plug-ins do not know each other."""

import importlib

import pytest

from guards.source import imports, modules

LAYERS = (
    ("errors", "allocation"),
    ("registry", "progress", "processes", "positions", "sink_metrics"),
    ("params", "artifacts"),
    ("metrics", "statistics", "triggers", "dictionary", "architectures", "figures", "cache", "benchmarks", "sinks"),
    ("evaluated", "seeds", "revisions", "certainty", "gates", "gate_reports", "memory", "verdict"),
    ("batches", "kept", "losses", "prompts", "tiny", "embedded", "sources", "tokenizer", "project", "cards"),
    ("quantization", "models", "probe", "elementwise", "folded", "packed", "sharded", "answers"),
    ("forward", "shared"),
    ("methods", "objective"),
    ("trainer", "scoring"),
    ("tasks", "durability", "suspects", "exports"),
    ("detectors", "mitigations", "report"),
    ("stages",),
    ("api", "session", "terminal"),
    ("completion", "cli"),
    ("__main__",),
)
"""Modules and folders from the bottom up. Within a layer imports may go sideways, but not in a circle."""

PLUGINS = ("methods", "benchmarks", "mitigations")
NAMES = sorted(set(modules()) - {"unsink"})


def layer(module: str) -> int:
    part = module.split(".")[1]
    return next(i for i, parts in enumerate(LAYERS) if part in parts)


@pytest.mark.parametrize("module", NAMES)
def test_every_module_imports_only_from_its_layer_or_below(module: str) -> None:
    above = {name for name in imports(modules()[module]) - {"unsink"} if layer(name) > layer(module)}
    assert not above, f"{module} imports from above: {sorted(above)}"


def test_no_module_imports_itself_in_a_circle() -> None:
    graph = {name: imports(path) - {name, "unsink"} for name, path in modules().items()}
    while leaves := {name for name, needs in graph.items() if not needs & set(graph)}:
        graph = {name: needs for name, needs in graph.items() if name not in leaves}
    assert not graph, f"in circles, or above one: {sorted(graph)}"


@pytest.mark.parametrize("folder", PLUGINS)
def test_plugins_do_not_import_each_other(folder: str) -> None:
    there = {name for name in NAMES if name.startswith(f"unsink.{folder}.")}
    plugins = {name for name in there if not name.rpartition(".")[2].startswith("_")}  # others are shared
    assert plugins
    for plugin in plugins:
        assert not imports(modules()[plugin]) & (plugins - {plugin}), plugin


@pytest.mark.parametrize("module", [name for name in NAMES if name != "unsink.__main__"])
def test_every_module_can_be_imported(module: str) -> None:
    importlib.import_module(module)


def test_only_the_command_line_prints() -> None:
    printing = {name for name, path in modules().items() if "print(" in path.read_text().replace("_print(", "")}
    assert printing <= {"unsink.cli", "unsink.progress", "unsink.terminal"}
