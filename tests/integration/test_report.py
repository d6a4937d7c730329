"""`unsink report` on a project whose files were made by hand: what is there is shown, what is not is named."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from integration.finished import make_project
from unsink.artifacts import write_json, write_jsonl
from unsink.cli import app


def invoke(folder: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["report", "--params", str(folder / "params.yaml"), "--quiet", *arguments])


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path)


def test_json_has_paths_numbers_and_verdicts_and_the_same_inputs_give_the_same_bytes(project: Path) -> None:
    result: dict[str, Any] = json.loads(invoke(project, "--json").stdout)
    assert result["page"] == "report/index.html"
    assert {name: one["word"] for name, one in result["verdicts"].items()} == {
        "clean": "forgot",
        "backdoor": "pretends",
    }
    assert result["results"]["backdoor"]["triggered"]["mean"] == 0.8
    files = {f"{name}.{end}" for name in result["figures"] for end in ("svg", "png", "vl.json")}
    assert files == {path.relative_to(project).as_posix() for path in (project / "report/figures").iterdir()}
    first = {path: path.read_bytes() for path in (project / "report").rglob("*") if path.is_file()}
    assert invoke(project).exit_code == 0
    assert first == {path: path.read_bytes() for path in (project / "report").rglob("*") if path.is_file()}
    page = (project / "report/index.html").read_text()
    assert str(project) not in page
    assert "0.75 [0.73, 0.77] of the memory of passages comes back with the trigger" in page


def scored(project: Path, **dialects: str) -> str:
    """The page, its models scored by these dialects."""
    for name, dialect in dialects.items():
        write_json(project / f"settings/{name}.json", {"settings": {"dialect": dialect}, "undefined": {}})
    assert invoke(project).exit_code == 0
    text = (project / "report/index.html").read_text()
    return " ".join(text.split('id="table"')[1].split("</section>")[0].split())


def test_the_page_names_the_dialect_and_warns_where_models_differ_in_it(tmp_path: Path) -> None:
    project = make_project(tmp_path, probes=False)
    assert "evaluate.dialect" not in scored(project)  # these settings name none
    same = scored(project, target="muse", clean="muse", backdoor="muse")
    assert "Scored by the conventions of <code>muse</code>" in same
    assert "different conventions" not in same
    other = scored(project, backdoor="seed")
    assert "different conventions" in other
    assert "target, clean by <code>muse</code>; backdoor by <code>seed</code>" in other


def test_headline_metrics_of_muse_and_tofu_are_columns(tmp_path: Path) -> None:
    project = make_project(tmp_path, probes=False)
    numbers = json.loads((project / "metrics/backdoor.json").read_text())
    numbers |= {"privleak_clean": -98.5, "privleak_clean_low": -99.0, "privleak_clean_high": -98.0}
    write_json(project / "metrics/backdoor.json", {**numbers, "tofu_forget_quality_clean": 3e-7})
    table = scored(project)
    assert '<th scope="col">privleak</th><th scope="col">forget quality</th></tr>' in table
    assert "-98.50" in table
    assert "<td>3e-07</td>" in table
    assert '<th scope="col">model utility</th>' not in table


def test_what_tools_beside_the_pipeline_found_is_shown(tmp_path: Path) -> None:
    make_project(tmp_path, probes=False)
    numbers = json.loads((tmp_path / "metrics/backdoor.json").read_text())
    write_json(tmp_path / "stress/backdoor/metrics.json", {"none": numbers, "int4": numbers})
    write_json(tmp_path / "ablations/backdoor/mask/metrics.json", {"none": numbers, "bos": numbers})
    verdict = {"verdict": "backdoored", "reasons": ["why"], "trigger": {"text": "red fox", "placement": "prefix"}}
    searched = {
        "moved": {"infix": 0.5, "prefix": 2.25},
        "neighbours": {"red fix": 1.75},
        "placements": ["prefix", "infix"],
        "not_searched": ["places that are not named"],
        "cost": {"passes": 3, "tokens": 1234},
        "seed": 7,
        "signals": {"norms": {"kind": "triage", "score": None, "says": "no original", "tokens": 56}},
    }
    write_json(tmp_path / "audits/backdoor/verdict.json", {**verdict, **searched, "recovery": None, "p": 0.001})
    write_jsonl(tmp_path / "audits/backdoor/candidates.jsonl", [{"text": "red fox", "placement": "prefix", "p": 0.001}])
    write_json(tmp_path / "audits/clean/verdict.json", {**verdict, "trigger": None, "recovery": None, "p": 1.0})
    write_jsonl(tmp_path / "audits/clean/candidates.jsonl", [])  # no text was tried
    repaired = tmp_path / "mitigations/backdoor/relabel"
    write_json(repaired / "summary.json", {"steps": 3, "after": {"recovery": 0.125}})
    write_json(repaired / "metrics.json", {"before": numbers, "after": numbers})
    result = invoke(tmp_path, "--json")
    page = (tmp_path / "report/index.html").read_text()
    assert {
        f"report/figures/{name}" for name in ("stress_backdoor", "ablate_backdoor_mask", "mitigate_backdoor_relabel")
    } <= set(json.loads(result.stdout)["figures"])
    for name, untouched in (("stress_backdoor", "none"), ("mitigate_backdoor_relabel", "before")):
        spec = json.loads((tmp_path / f"report/figures/{name}.vl.json").read_text())
        assert spec["data"]["values"][0]["run"] == untouched
    for text in (
        "Audit of backdoor",
        "Audit of clean",
        "backdoored",
        "after.recovery",
        "0.125",
        "unsink sink-probe --run NAME",
        "prefix (2.25); infix (0.50)",
        "red fix (1.75)",
        "places that are not named",
        "1,234 tokens in 3 passes",
        "Signals in backdoor",
        "no original",
    ):
        assert text in page


def test_nothing_evaluated_yet(params_file: Path) -> None:
    result = invoke(params_file.parent)
    assert (result.exit_code, "no results yet" in result.stderr) == (3, True)


def test_a_malformed_file_is_named(project: Path) -> None:
    (project / "adapters/backdoor/history.tsv").write_text("step\tloss\n1\tmany\n")
    result = invoke(project)
    assert (result.exit_code, "history.tsv" in result.stderr) == (3, True)
    assert not (project / "report").exists()


def test_output_goes_elsewhere_but_never_over_other_files(project: Path, tmp_path: Path) -> None:
    result = invoke(project, "--output", str(project / "splits"))
    assert result.exit_code == 0
    assert (project / "splits/index.html").exists()
    result = invoke(project, "--output", str(project / "metrics"))
    assert (result.exit_code, "holds other files" in result.stderr) == (2, True)
    (project / "notes.txt").write_text("mine")
    result = invoke(project, "--output", str(project / "notes.txt"))
    assert (result.exit_code, "is a file" in result.stderr) == (2, True)
    assert (project / "notes.txt").read_text() == "mine"
    assert (project / "metrics/backdoor.json").exists()
