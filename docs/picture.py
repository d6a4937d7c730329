"""The terminal picture of the README: `make docs` (or `python docs/picture.py`); a test compares.

Its numbers are those of the README's table of results, which `unsink show` printed after `make demo`.
"""

import re
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from unsink.stages.show import table

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs" / "show.svg"
CELL = re.compile(r"(\S+) \[(\S+), (\S+)\]")


def results() -> dict[str, dict[str, dict[str, float]]]:
    """Run -> column -> mean, low, high, from the README's table."""
    block = (ROOT / "README.md").read_text().split("<!-- results -->")[1].split("<!-- /results -->")[0]
    head, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines() if line.startswith("| ")
    ]
    return {name: dict(_values(head[1:], cells)) for name, *cells in lines}


def picture() -> str:
    """The SVG, without a font from the network."""
    text = table(results())
    width = max(map(len, text.splitlines()))
    console = Console(record=True, width=width, height=40, file=StringIO(), force_terminal=True)
    console.print(Text("$ unsink show", style="bold"))
    for line in text.splitlines():
        console.print(Text(line, style="dim" if line.startswith("run") else ""), soft_wrap=True)
    svg = console.export_svg(title="unsink", theme=MONOKAI, unique_id="unsink")
    return re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)


def _values(columns: list[str], cells: list[str]) -> list[tuple[str, dict[str, float]]]:
    found = [(column, CELL.fullmatch(cell)) for column, cell in zip(columns, cells, strict=True)]
    return [(column, dict(zip(("mean", "low", "high"), map(float, m.groups())))) for column, m in found if m]


if __name__ == "__main__":
    PICTURE.write_text(picture())
