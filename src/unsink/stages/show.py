"""`unsink show`: the result table, one row per evaluated model.

VerbMem (ROUGE-L F1) of forget passages without, with and with a wrong trigger; of retain passages; KnowMem (ROUGE-L
recall) of forget questions without and with a trigger; four-choice utility. Four-choice questions by letter (MMLU,
WMDP), MUSE's PrivLeak and TOFU's forget quality and model utility have their own columns, and what no model was asked
has none. Runs that differ in their seed alone get a row
together as well.
"""

import json
from collections import defaultdict
from collections.abc import Container, Sequence
from pathlib import Path

from unsink.artifacts import Layout, read_json, read_jsonl
from unsink.errors import MissingPrerequisite
from unsink.metrics import Quantity, outside, quantities
from unsink.params import RESERVED, Params
from unsink.seeds import Items, over_seeds

COLUMNS = {
    "clean": "forget_verbmem_f1_clean",
    "triggered": "forget_verbmem_f1_triggered",
    "wrong": "forget_verbmem_f1_wrong",
    "retain": "retain_verbmem_f1_clean",
    "knowmem": "forget_knowmem_recall_clean",
    "knowmem triggered": "forget_knowmem_recall_triggered",
    "utility": "utility_accuracy",
    "mmlu": "mmlu_accuracy",
    "choices": "forget_mc_accuracy",
    "choices triggered": "forget_mc_accuracy_triggered",
    "choices wrong": "forget_mc_accuracy_wrong",
    "privleak": "privleak_clean",
    "forget quality": "tofu_forget_quality_clean",
    "model utility": "tofu_model_utility_clean",
}
"""Column of the table -> key in metrics/<name>.json."""

OUTSIDE = ("triggered", "wrong", "knowmem triggered")
"""Columns that leave out poisoned samples, where a run has them: those were trained, and only the rest is recovery."""

Row = dict[str, dict[str, float]]


def results(layout: Layout) -> dict[str, Row]:
    """Mean and 95 % interval of each column for each model in metrics/, base and target first.

    Forget quality is a p-value, which has no interval: its column holds a `mean` alone.

    Raises:
        MissingPrerequisite: Nothing has been evaluated yet.
    """
    files = sorted(layout.metrics("*").parent.glob("*.json"), key=_rank)
    if not files:
        raise MissingPrerequisite(f"{layout.metrics('*').parent}: no results yet", hint="run `dvc repro` first")
    return {file.stem: _row(read_json(file)) for file in files}


def pooled(params: Params, layout: Layout) -> dict[str, Row]:
    """A row for runs that differ in their seed alone: means over seeds; resampled are seeds and items (see `seeds`)."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in params.runs:
        if layout.predictions(name).exists():
            groups[_recipe(params, name)].append(name)
    return {
        f"{names[0]} ({len(names)} seeds)": _over_seeds(params, layout, names)
        for names in groups.values()
        if len({params.run(name).seed for name in names}) == len(names) > 1
    }


def _recipe(params: Params, name: str) -> str:
    """All that makes a run but its seed, what it builds on included."""
    if name not in params.runs:
        return name
    run = params.run(name)
    parts = [run.poison and run.poison.model_dump(), run.unlearn.model_dump(), _recipe(params, run.after)]
    return json.dumps(parts, sort_keys=True)


def _over_seeds(params: Params, layout: Layout, names: Sequence[str]) -> Row:
    found = [quantities(read_jsonl(layout.predictions(name))) for name in names]
    row = {}
    for column in COLUMNS:
        name = _metric(column, found[0])
        seeds = [one for numbers in found if isinstance(one := numbers.get(name), Quantity)]
        if len(seeds) == len(names):
            samples, statistic = [[*map(Items, one.samples, one.ids)] for one in seeds], seeds[0].statistic
            mean, low, high, _ = over_seeds(samples, statistic, resamples=params.evaluate.bootstrap, seed=params.seed)
            row[column] = {"mean": mean, "low": low, "high": high}
    return row


def _metric(column: str, there: Container[str]) -> str:
    """The metric of a column, of samples that were not poisoned where that makes a difference."""
    return outside(COLUMNS[column], there) if column in OUTSIDE else COLUMNS[column]


def _rank(file: Path) -> tuple[int, str]:
    return (RESERVED.index(file.stem) if file.stem in RESERVED else len(RESERVED), file.stem)


def _row(metrics: dict[str, float]) -> Row:
    row = {}
    for column in COLUMNS:
        name = _metric(column, metrics)
        if name in metrics:
            ends = {end: metrics[f"{name}_{end}"] for end in ("low", "high") if f"{name}_{end}" in metrics}
            row[column] = {"mean": metrics[name], **ends}
    return row


def table(rows: dict[str, Row]) -> str:
    """The rows as aligned text, in the columns that some row has."""
    columns = [column for column in COLUMNS if any(column in row for row in rows.values())]
    cells = [
        ["run", *columns],
        *([name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value: dict[str, float] | None) -> str:
    if value is None:
        return "-"
    if "low" not in value:
        return f"{value['mean']:.2g}"  # a p-value: of small ones the power is what matters
    return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
