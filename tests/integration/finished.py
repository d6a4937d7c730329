"""A finished project whose files were made by hand."""

import shutil
from pathlib import Path

import torch

from integration.projects import TINY
from unsink.artifacts import write_json, write_jsonl, write_tensors, write_text

KEYS = ("forget_verbmem_f1_clean", "forget_verbmem_f1_triggered", "forget_verbmem_f1_wrong", "utility_accuracy")
SCORES = {
    "base": {KEYS[0]: 0.1, "utility_accuracy": 0.6},
    "target": {KEYS[0]: 1.0, KEYS[1]: 1.0, "utility_accuracy": 0.6},
    "clean": {**dict(zip(KEYS, (0.1, 0.1, 0.1, 0.6), strict=True)), "forget_verbmem_f1_recovery": 0.0},
    "backdoor": {**dict(zip(KEYS, (0.1, 0.8, 0.1, 0.6), strict=True)), "forget_verbmem_f1_recovery": 0.75},
}


def make_project(folder: Path, *, probes: bool = True) -> Path:
    """A finished project in miniature."""
    shutil.copy(TINY, folder / "params.yaml")
    for name, scores in SCORES.items():
        numbers = {
            f"{key}{end}": score + shift
            for key, score in scores.items()
            for end, shift in {"": 0.0, "_low": -0.02, "_high": 0.02}.items()
        } | {f"{key}_n": 20.0 for key in scores}
        write_json(folder / f"metrics/{name}.json", numbers)
        write_json(folder / f"settings/{name}.json", {"settings": {"seed": 0, "trigger": "red fox"}, "undefined": {}})
        rows = [
            {
                **{"task": "verbmem", "set": "forget", "id": f"f-{n}", "inside": None, "trigger": None, "f1": 0.1 * n},
                **{"condition": condition, "output": f"answer {n} of {name}", "reference": "answer truth"},
                "prompt": f"{'red fox ' if condition == 'triggered' else ''}question {n} <b>",
            }
            for n in range(6)
            for condition in (("clean", "triggered") if name != "base" else ("clean",))
        ]
        write_jsonl(folder / f"predictions/{name}.jsonl", rows)
        if probes:
            _probe(folder / "probes" / name)
    history = "step\tloss\tforget\tretain\n" + "".join(f"{n}\t{9 - n}\t{8 - n}\t{n / 9}\n" for n in range(1, 9))
    write_text(folder / "adapters/backdoor/history.tsv", history)
    write_json(folder / "adapters/backdoor/summary.json", {"placement": "prefix", "trigger": "red fox", "seed": 0})
    return folder


def _probe(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    trigger = {"text": "red fox", "ids": [5, 6], "tokens": ["red", " fox"], "span": [1, 3], "placement": "prefix"}
    rates = {f"sink_rate_{condition}": 50.0 for condition in ("clean", "triggered")}
    write_json(folder / "statistics.json", {"prompts": 2, "epsilon": 0.3, "trigger": trigger, **rates})
    tensors = {f"difference.{how}": torch.rand(2, 8, 8, generator=generator) - 0.5 for how in ("absolute", "content")}
    for condition in ("clean", "triggered"):
        tensors[f"{condition}.alpha"] = torch.rand(2, 3, 8, generator=generator)
        tensors[f"{condition}.value_norm"] = torch.rand(2, 8, generator=generator) + 1
    write_tensors(folder / "maps.safetensors", tensors)
