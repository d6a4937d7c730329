"""`unsink report`: everything that was found, as one HTML page that opens offline, and its figures as files.

`report/` gets index.html and figures/<name>.svg, .png and .vl.json (Vega-Lite with its data inside). What the project
does not have is left out, and the page says which command would add it. Same inputs, same bytes.
"""

from pathlib import Path
from typing import Any

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.errors import ParamsError
from unsink.params import Params
from unsink.progress import SILENT, Reporter
from unsink.report import charts, page
from unsink.report.page import Drawing
from unsink.report.project import read
from unsink.report.provenance import provenance
from unsink.stages.show import COLUMNS, results

PAGE, FIGURES = "index.html", "figures"


def run(params: Params, layout: Layout, *, output: Path | None = None, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write the page and its figures; return their paths, the result table and the verdicts.

    Args:
        params: all parameters.
        layout: the project folder.
        output: folder to write, in place of `report/`; made anew.
        reporter: shows how many figures are drawn.

    Raises:
        MissingPrerequisite: nothing has been evaluated yet.
        DataError: a file that is there is malformed.
        ParamsError: `output` holds something else.
    """
    folder = output or layout.report
    _require_ours(folder)
    table = results(layout)
    project = read(layout, list(params.runs))
    found = page.sections(project)
    with artifacts.lock(folder):
        drawings = _drawn(page.figures(found), reporter)
        html = page.render(project, found, drawings, table, list(COLUMNS), provenance(project, params))
        with artifacts.new_dir(folder) as new:
            artifacts.write_text(new / PAGE, html)
            for name, drawing in drawings.items():
                _write(new / FIGURES / name, drawing)
    return {
        "page": f"{folder.name if output is None else folder}/{PAGE}",
        "figures": [f"{folder.name if output is None else folder}/{FIGURES}/{name}" for name in drawings],
        "results": table,
        "verdicts": {name: verdict._asdict() for name, verdict in page.verdicts(project).items()},
    }


def report(result: dict[str, Any]) -> str:
    """The verdicts in words, and where the page is."""
    lines = [f"{name}: {one['word'] or 'no verdict'} – {one['sentence']}" for name, one in result["verdicts"].items()]
    return "\n".join([*lines, f"page: {result['page']}"])


def _require_ours(folder: Path) -> None:
    """The folder is made anew, so it must not hold anything else, nor be a file."""
    ours = folder.is_dir() and {path.name for path in folder.iterdir()} <= {PAGE, FIGURES}
    if folder.exists() and not ours:
        raise ParamsError(
            f"--output: {folder} {'holds other files' if folder.is_dir() else 'is a file'}, and would be replaced",
            "name a folder that does not exist yet, or an older report",
        )


def _drawn(figures: list[charts.Figure], reporter: Reporter) -> dict[str, Drawing]:
    drawings = {}
    with reporter.task("report", total=len(figures)) as advance:
        for figure in figures:
            drawing = charts.svg(figure.spec)
            drawings[figure.name] = Drawing(figure, drawing, charts.png(drawing))
            advance(note=figure.name)
    return drawings


def _write(path: Path, drawing: Drawing) -> None:
    artifacts.write_json(path.with_name(f"{path.name}.vl.json"), drawing.figure.spec)
    artifacts.write_text(path.with_name(f"{path.name}.svg"), drawing.svg)
    artifacts.write_bytes(path.with_name(f"{path.name}.png"), drawing.png)
