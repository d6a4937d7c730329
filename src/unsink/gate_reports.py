"""What `unsink gate` found, as text, Markdown and JUnit XML."""

import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

from unsink.gates import ERROR, FAIL, OUTCOMES, PASS, UNDECIDED

Result = Mapping[str, Any]
"""As `stages.gate.run` returns it; a `Row` is one of its `checks`."""
Row = Mapping[str, Any]

_HEADER = ("outcome", "gate", "run", "value [95 % interval]", "bound")
_SIGNS = {PASS: "✅", FAIL: "❌", UNDECIDED: "❔", ERROR: "⛔"}
_NO_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_ENDINGS = {
    0: "passed",
    1: "failed (exit code 1)",
    3: "not all gates could be evaluated (exit code 3)",
}


def table(result: Result) -> str:
    """Aligned columns, what there is to say about each bound that was not kept, and the sum."""
    cells = [_HEADER, *((_outcome(row), *_cells(row)) for row in result["checks"])]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells]
    notes = ["\n  ".join([f"{_title(row)}: {_reason(row)}", *_why(row)]) for row in _telling(result)]
    return "\n".join([*lines, "", *notes, *([""] if notes else []), _sum(result)])


def markdown(result: Result) -> str:
    """A heading, the table, and below it what there is to say; for comments and summaries."""
    lines = [f"### unsink gate: {_sum(result)}", "", _columns(_HEADER), _columns(["---"] * len(_HEADER))]
    lines += [_columns([f"{_SIGNS[row['outcome']]} {_outcome(row)}", *_cells(row)]) for row in result["checks"]]
    notes = [
        f"- **{_escaped(_title(row))}**: {_escaped('; '.join([_reason(row), *_why(row)]))}" for row in _telling(result)
    ]
    return "\n".join([*lines, *(["", *notes] if notes else []), ""])


def junit(result: Result) -> str:
    """JUnit XML: a test case for each bound; what does not count for the exit code is `skipped`."""
    rows = result["checks"]
    kinds = [_kind(row) for row in rows]
    counts = {
        "tests": str(len(rows)),
        **{f"{kind}s": str(kinds.count(kind)) for kind in ("failure", "error")},
        "skipped": str(kinds.count("skipped")),
    }
    suites = ElementTree.Element("testsuites", {"name": "unsink gate", **counts})
    suite = ElementTree.SubElement(suites, "testsuite", {"name": "gates", **counts})
    for row, kind in zip(rows, kinds):
        case = ElementTree.SubElement(
            suite, "testcase", {"classname": _xml(row["run"]), "name": _xml(f"{row['gate']}: {_bound(row)}")}
        )
        if kind:
            reason = _xml(_reason(row))
            told = ElementTree.SubElement(case, kind, {"message": reason, "type": row["outcome"]})
            told.text = "\n".join([reason, *map(_xml, _why(row))])  # readers show one or the other
    ElementTree.indent(suites)
    return ElementTree.tostring(suites, encoding="unicode", xml_declaration=True) + "\n"


def _telling(result: Result) -> list[Row]:
    return [row for row in result["checks"] if row["outcome"] != PASS]


def _kind(row: Row) -> str | None:
    if row["outcome"] == PASS:
        return None
    if not row["blocks"]:
        return "skipped"
    return "error" if row["outcome"] == ERROR else "failure"


def _cells(row: Row) -> Sequence[str]:
    return row["gate"], row["run"], _value(row), _bound(row)


def _outcome(row: Row) -> str:
    """In capitals where it counts for the exit code."""
    if row["blocks"]:
        return str(row["outcome"]).upper()
    return f"{row['outcome']}{'' if row['outcome'] == PASS else ' (soft)' if row['soft'] else ' (warning)'}"


def _value(row: Row) -> str:
    value = row["value"]
    if not isinstance(value, Mapping):
        return value or "-"
    sign = "+" if row["bound"] == "max_regression" else ""
    mean, low, high = (f"{value[part]:{sign}.3g}" for part in ("mean", "low", "high"))
    return f"{mean} [{low}, {high}]" if value["n"] else mean


def _bound(row: Row) -> str:
    match row["bound"]:
        case "min":
            return f"at least {row['limit']:g}"
        case "max":
            return f"at most {row['limit']:g}"
        case "max_regression":
            return f"at most {row['limit']:g} worse than {row['against'] or 'the baseline'}"
        case _:
            return " or ".join(row["limit"])


def _title(row: Row) -> str:
    return f"{row['gate']}, {row['run']}"


def _reason(row: Row) -> str:
    """What was found beside what was wanted."""
    return "; ".join(filter(None, (_found(row), row["detail"])))


def _found(row: Row) -> str:
    match row["outcome"]:
        case "fail":
            return f"{_value(row)}, but {_bound(row)} is wanted"
        case "undecided":
            return f"{_value(row)} does not decide it: {_bound(row)} is wanted"
        case "error":
            return "could not be evaluated"
        case _:
            return ""


def _why(row: Row) -> list[str]:
    return [f"why: {row['why']}"] if row["why"] else []


def _sum(result: Result) -> str:
    found = [row["outcome"] for row in result["checks"]]
    counts = ", ".join(f"{found.count(outcome)} {outcome}" for outcome in OUTCOMES if outcome in found)
    return f"{_ENDINGS[result['exit_code']]}: {counts}"


def _columns(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_escaped, cells))} |"


def _escaped(text: str) -> str:
    """Text that is neither markup nor the end of a cell."""
    return re.sub(r"([\\|<>*_`\[\]])", r"\\\1", " ".join(text.split()))


def _xml(text: str) -> str:
    return _NO_XML.sub("?", text)
