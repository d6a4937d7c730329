"""A model asked the same thing several times, something done to it each time: for `ablate`, `stress` and `mitigate`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.metrics import DIALECTS, Others, measure, outside
from unsink.params import RESERVED, Params
from unsink.stages.evaluate import rows_of
from unsink.tasks import Question, Row

NONE = "none"
"""The variant that nothing is done to."""
CLEAN = [Question("verbmem", "forget", "clean"), Question("verbmem", "retain", "clean")]
UTILITY = [Question("utility", "utility", "clean"), Question("mmlu", "mmlu", "clean")]
PLAN = [*CLEAN, *(Question("verbmem", "forget", condition) for condition in ("triggered", "wrong")), *UTILITY]
"""KnowMem is left out: behind its examples a prompt's first tokens and its trigger are far from the question."""
SHOWN = (  # what a command prints
    "forget_verbmem_f1_clean",
    "forget_verbmem_f1_triggered",
    "retain_verbmem_f1_clean",
    "utility_accuracy",
    "mmlu_accuracy",
)


def plan(run: str) -> list[Question]:
    """What is asked of a model; the base has nothing that a trigger could bring back."""
    return [*CLEAN, *UTILITY] if run == "base" else PLAN


def write(
    folder: Path, rows: Sequence[Row], key: str, params: Params, layout: Layout, run: str
) -> dict[str, dict[str, float]]:
    """Write predictions.jsonl and metrics.json, {variant: numbers named as in `metrics/<run>.json`}.

    Args:
        folder: made anew.
        rows: of all variants; the field `key` names theirs.
        key: see there.
        params: all parameters.
        layout: the project folder.
        run: whose rows these are.

    Returns:
        The main numbers of each variant.
    """
    others = Others(
        target=rows_of(layout, "target") if run not in RESERVED else (), dialect=DIALECTS[params.evaluate.dialect]
    )
    metrics = {
        variant: measure(
            [row for row in rows if row[key] == variant],
            others,
            resamples=params.evaluate.bootstrap,
            seed=params.seed,
        ).numbers
        for variant in dict.fromkeys(row[key] for row in rows)
    }
    with artifacts.new_dir(folder) as new:
        artifacts.write_jsonl(new / "predictions.jsonl", rows)
        artifacts.write_json(new / "metrics.json", metrics)
    return {variant: _shown(numbers) for variant, numbers in metrics.items()}


def _shown(numbers: Mapping[str, float]) -> dict[str, float]:
    names = [outside(name, numbers) if name.endswith("_triggered") else name for name in SHOWN]
    return {name: numbers[name] for name in names if name in numbers}
