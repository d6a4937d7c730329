"""The harness of `make bench` on the tiny model: the plain path of benchmarks/ and ours give the same numbers."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import measures  # noqa: E402
import performance  # noqa: E402
import performance_page  # noqa: E402
import plain  # noqa: E402
import workload  # noqa: E402


@pytest.fixture(autouse=True)
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workload, "KEPT", tmp_path)


def tiny(method: str) -> workload.Workload:
    return workload.Workload(method, "tiny", "float32", "cpu", passages=4, batch=2, steps=3)


@pytest.mark.parametrize("method", ["npo", "rmu"])
def test_the_plain_path_trains_with_the_same_losses(method: str) -> None:
    found = measures.training(tiny(method))
    assert found["largest_relative_difference_of_losses"] < 1e-3
    assert len(set(found["losses"])) == 3
    assert found["plain"]["n"] == found["ours"]["n"] == 2
    assert found["needed_gflop_per_step"] > 0
    assert found["gemm_gflops"]["least"] > 0
    assert found["gemm_gflops"]["n"] == 2


def test_a_share_is_what_a_step_needs_by_what_the_peak_would_do_in_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measures.Product, "gflops", lambda *_: 20.0)
    monkeypatch.setattr(measures, "_flops", lambda *_: {"needed": 4e9})
    found = measures.share(tiny("rmu"))
    times = found["seconds"]
    assert found["share"]["least"] == pytest.approx(4 / 20 / times["most"])
    assert found["share"]["most"] == pytest.approx(4 / 20 / times["least"])
    assert found["share"]["n"] == times["n"] == 2


def test_the_plain_path_says_the_same_texts() -> None:
    found = measures.evaluation(tiny("rmu"), repetitions=1, every=3)
    assert found["texts_different"] == 0
    assert found["texts_compared"] >= 4


def test_numbers_that_differ_are_no_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    step = plain.Training.step
    monkeypatch.setattr(plain.Training, "step", lambda self, number: 1.01 * step(self, number))
    with pytest.raises(measures.DifferentNumbers, match="rmu: losses"):
        measures.training(tiny("rmu"))


def test_the_committed_page_is_that_of_the_committed_numbers() -> None:
    results = ROOT / "docs" / "results"
    page = performance_page.page(json.loads((results / "performance.json").read_text()))
    assert (results / "performance.md").read_text() == page


def test_the_page_says_what_was_reached() -> None:
    times = {"plain": {"median": 6.0, "least": 5.0, "most": 7.0, "n": 5}}
    trained = {
        **times,
        "ours": {"median": 1.5, "least": 1.0, "most": 2.0, "n": 5},
        "ratio": 4.0,
        "once_seconds": 5.0,
        "once_samples": 50,
        "largest_relative_difference_of_losses": 1e-5,
        "needed_gflop_per_step": 90.0,
        "reference_logits_gflop_per_step": 9.0,
        "real_tokens_per_step": 700.0,
        "gemm_gflops": {"median": 100.0, "least": 90.0, "most": 110.0, "n": 5},
    }
    asked = {"prompts": 320, "plain_prompts_each_time": 20, "texts_compared": 40, "texts_different": 0}
    memory = {
        f"memory {what} {who}": {"peak_mib": peak, "libraries_mib": 400.0}
        for what in ("npo", "rmu", "evaluation")
        for who, peak in (("plain", 4000.0), ("ours", 1000.0))
    }
    share = {"median": 0.6, "least": 0.5, "most": 0.71, "n": 5}
    alone = {"share": share, "seconds": times["plain"], "gemm_gflops": trained["gemm_gflops"]}
    peaks = {"square_gflops": 120.0, "own_gflops": 80.0, "square_shape": [8, 8, 8], "own_shape": [9, 5, 6]}
    machine = {"device": "cpu", "processor": "x86_64", "cores": 2, "instructions": ["avx2"], "dtype": "float32"}
    result = {
        "machine": machine,
        "workload": {"model": "embedded", "dtype": "auto", "device": "cpu", "joined": 2, "batch": 6},
        "parts": {"npo": trained, "rmu": trained, "evaluation": {**trained, **asked}, "gemm": peaks, **memory}
        | {"share npo": alone, "share rmu": alone},
    }
    lines = {row[0]: row[1:] for row in performance_page.rows(result)}
    step = "training step, NPO + KL + value norm"
    assert lines[step] == ("6.00 s (5.00–7.00)", "1.50 s (1.00–2.00)", "4.0 ×", "≥ 3", "yes")
    assert lines["training step, RMU"][-2:] == ("≥ 5", "no")
    assert lines[f"peak memory, {step}"] == ("4000 MiB", "1000 MiB", "0.25 ×", "≤ 0.45", "yes")
    assert lines[f"share of the GEMM peak, {step}"] == ("0.15", "0.600 (0.50–0.71)", "", "≥ 0.7", "no")
    page = performance_page.page(result)
    assert "2 cores with AVX2; numbers of type float32" in page
    assert "Made by `python benchmarks/performance.py --joined 2` from" in page
    assert "5 steps of NPO and 5 of RMU took 6.00 s (5.00–7.00) and" in page
    assert "with peaks of 100 (90–110) and 100 (90–110) GFLOP/s" in page
    assert "4.0 ×" in performance_page.table(result)
    assert "## Growth" not in page


def test_growth_is_a_table_for_each_kind_of_work_in_order_of_size() -> None:
    parts = {name: {"seconds": 2.0, "peak_mib": 100.0} for name, *_ in performance.parts(growth=True)}
    parts |= {name: {"seconds": 9.0, "peak_mib": 400.0} for name in parts if name.endswith("plain")}
    answered = {"plain": {"median": 90.0}, "ours": {"median": 9.0}, "prompts": 320}
    answered |= {"texts_different": 0, "texts_compared": 16}
    parts |= {name: answered for name in parts if name.startswith("growth evaluation")}
    lines = list(performance_page._growth(parts))
    steps = [line for line in lines if "| 9.00 s | 2.00 s | 4.5 × | 400 MiB | 100 MiB | 0.25 × |" in line]
    assert len(steps) == 2 * sum(map(len, performance.GROWTH.values()))
    assert [line.split(" | ")[1] for line in steps[:3]] == ["50 passages", "100 passages", "200 passages"]
    answers = [line for line in lines if line.endswith("| 320 | 90.00 s | 9.00 s | 10.0 × | 0 of 16 |")]
    sizes = [line.split(" | ")[1].split()[0] for line in answers]
    assert sizes == ["50", "100", "200", "embedded", "360m"]
