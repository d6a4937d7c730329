"""The pages that `make docs` writes are those of the code, and every page is reached from the index."""

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def script(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["cli", "params", "api"])
def test_a_reference_page_is_what_the_code_says(name: str) -> None:
    pages = script(DOCS / "reference" / "generate.py").pages()
    path = DOCS / "reference" / f"{name}.md"
    assert path.read_text() == pages[path], "run `make docs`"


def test_the_reference_has_every_parameter_with_its_comment() -> None:
    page = (DOCS / "reference" / "params.md").read_text()
    assert (
        "| `unlearn.lr` | `0.001` |  | number > 0 | AdamW, falls linearly to a tenth; warmup multiplies that |" in page
    )
    assert "| `model.device` | `auto` | `auto` | `auto`, `cpu`, `cuda`, `mps` |" in page


def test_the_reference_of_commands_names_defaults() -> None:
    page = (DOCS / "reference" / "cli.md").read_text()
    assert "| `--run RUN` | An entry of `runs:` in the params file, or base, or target. Default: `target`. |" in page
    assert "| `--output DIR` | A new folder. Required. |" in page
    assert "| `--json` | Print the result as JSON. |" in page  # a flag


def test_the_picture_shows_the_table_of_the_readme() -> None:
    assert (DOCS / "show.svg").read_text() == script(DOCS / "picture.py").picture(), "run `make docs`"


def test_the_picture_loads_nothing_from_the_network() -> None:
    svg = (DOCS / "show.svg").read_text()
    assert "@font-face" not in svg
    assert "url(http" not in svg
    assert "href" not in svg


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


def test_the_index_leads_to_every_page() -> None:
    index = (DOCS / "README.md").read_text()
    pages = {page.relative_to(DOCS).as_posix() for page in PAGES} - {"README.md"}
    assert sorted(page for page in pages if f"({page})" not in index) == []
