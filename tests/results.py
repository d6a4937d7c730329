"""Results without a model: a run as `evaluate` would leave it."""

from pathlib import Path
from typing import Any

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.metrics import DIALECTS, Others, measure

SETTINGS = {"dialect": "muse", "stemmer": False, "retrained": 0.5, "seed": 0, "few_shot": 3}


def evaluated(folder: Path, name: str, scores: list[float], **settings: Any) -> Path:
    """A run with VerbMem of some passages; returns its metrics file."""
    layout, flat = Layout(folder), {**SETTINGS, **settings}
    rows = [
        {
            **{"id": f"p{i}", "task": "verbmem", "set": "forget", "condition": "clean", "inside": None},
            **{"prompt": f"p{i}", "reference": "r", "f1": score, "recall": score},
        }
        for i, score in enumerate(scores)
    ]
    measured = measure(rows, Others(dialect=DIALECTS[flat["dialect"]]), resamples=100, seed=0)
    artifacts.write_jsonl(layout.predictions(name), rows)
    artifacts.write_json(layout.metrics(name), measured.numbers)
    artifacts.write_json(layout.settings(name), {"settings": flat, "undefined": measured.undefined})
    return layout.metrics(name)
