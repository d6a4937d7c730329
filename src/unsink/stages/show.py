"""`unsink show`: the result table, one row per evaluated model.

VerbMem (ROUGE-L F1) of forget passages without, with and with a wrong trigger; of retain passages; KnowMem (ROUGE-L
recall) of forget questions without and with a trigger; four-choice utility. Four-choice questions by letter (MMLU,
WMDP) have their own columns, and what no model was asked has none.
"""

from pathlib import Path

from unsink.artifacts import Layout, read_json
from unsink.errors import MissingPrerequisite
from unsink.params import RESERVED

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
}
"""Column of the table -> key in metrics/<name>.json."""

OUTSIDE = ("triggered", "wrong", "knowmem triggered")
"""Columns that leave out poisoned samples, where a run has them: those were trained, and only the rest is recovery."""

Row = dict[str, dict[str, float]]


def results(layout: Layout) -> dict[str, Row]:
    """Mean and 95 % interval of each column for each model in metrics/, base and target first.

    Raises:
        MissingPrerequisite: Nothing has been evaluated yet.
    """
    files = sorted(layout.metrics("*").parent.glob("*.json"), key=_rank)
    if not files:
        raise MissingPrerequisite(f"{layout.metrics('*').parent}: no results yet", hint="run `dvc repro` first")
    return {file.stem: _row(read_json(file)) for file in files}


def _rank(file: Path) -> tuple[int, str]:
    return (RESERVED.index(file.stem) if file.stem in RESERVED else len(RESERVED), file.stem)


def _row(metrics: dict[str, float]) -> Row:
    row = {}
    for column, key in COLUMNS.items():
        outside = f"{key}_outside"
        name = outside if column in OUTSIDE and outside in metrics else key
        if name in metrics:
            row[column] = {"mean": metrics[name], "low": metrics[f"{name}_low"], "high": metrics[f"{name}_high"]}
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
    return "-" if value is None else f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
