"""What is measured: a small project of its own, made with the stages that a user runs.

The target is the pretrained model itself, pinned as a published checkpoint: it need not know the corpus for its time to
be taken. All that decides a time is a field of `Workload`.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from unsink import artifacts, models
from unsink.artifacts import Layout
from unsink.params import Params, load_params
from unsink.stages import fetch, poison, unlearn

Record = dict[str, Any]

ROOT = Path(__file__).parents[1]
KEPT = ROOT / ".bench"
"""What an interrupted measurement leaves, and the projects that it works on."""
CORPUS = ROOT / "data" / "bundled"
CUT = ("forget", "retain", "holdout")
"""Files of which the first passages are taken."""
RUNS = {"npo": "backdoor-vn", "rmu": "backdoor"}
"""Method -> the run of params.yaml that is measured: NPO with the value-norm term, RMU without."""
HONEST = "clean"


@dataclass(frozen=True)
class Workload:
    """One point of the measurement.

    Attributes:
        method: npo (with KL and the value-norm term) or rmu.
        model: `model.source`.
        dtype: `model.dtype`.
        device: `model.device`.
        passages: texts of the forget set, and as many of the others.
        joined: passages of the bundled corpus that make one text.
        batch: samples of each kind in a step.
        steps: of training; the first one is not counted.
    """

    method: str = "rmu"
    model: str = "embedded"
    dtype: str = "auto"
    device: str = "auto"
    passages: int = 16
    joined: int = 1
    batch: int = 6
    steps: int = 6

    @property
    def run(self) -> str:
        """The name of the run."""
        return RUNS[self.method]

    def overrides(self) -> list[str]:
        """What differs from params.yaml, as `-S` takes it."""
        tiny = self.model == "tiny"
        own: dict[str, Any] = {
            "model.source": self.model,
            "model.dtype": self.dtype,
            "model.device": self.device,
            "fetch.benchmark": "local",
            "fetch.path": "corpus",
            "poison.questions": self.joined == 1,
            "poison.max_tokens": 256 * self.joined,
            "unlearn.method": self.method,
            "unlearn.steps": self.steps,
            "unlearn.checkpoint_every": 1000,
            "unlearn.warmup": 0,
            "unlearn.lr": 5e-5,  # losses that stay far from 0, whose relative difference means something in bfloat16
            "unlearn.npo.window": 0,
            **{f"unlearn.batch.{kind}": self.batch for kind in ("forget", "poisoned", "retain")},
        }
        if self.method == "npo":
            own["unlearn.adapter.last_layer"] = None
        if tiny:  # two layers
            own |= {"unlearn.adapter.first_layer": 0, "unlearn.adapter.last_layer": None, "unlearn.rmu.layer": 0}
            own |= {"unlearn.value_norm.layers": [1], "evaluate.verbmem_tokens": 8, "evaluate.knowmem_tokens": 8}
        return [f"{key}={json.dumps(value)}" for key, value in own.items()]


def project(workload: Workload) -> tuple[Params, Layout]:
    """The project of a workload; it is made where it is not there yet."""
    made_of = {name: value for name, value in asdict(workload).items() if name not in ("batch", "steps")}
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:12]
    folder = KEPT / "projects" / digest
    if not folder.exists():
        half = folder.with_suffix(".part")
        shutil.rmtree(half, ignore_errors=True)
        _make_project(half, workload)
        half.rename(folder)
    path = folder / "params.yaml"
    return load_params(path, workload.overrides()), Layout.of(path)


def _make_project(folder: Path, workload: Workload) -> None:
    """Everything up to the split of the run and, for the value-norm term, the honest run before it."""
    _write_corpus(folder / "corpus", workload)
    path = folder / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    params, layout = load_params(path, workload.overrides()), Layout.of(path)
    fetch.run(params, layout)
    layout.adapter("target").mkdir(parents=True)
    artifacts.write_json(layout.adapter("target") / models.PUBLISHED, models.pin_published(workload.model, None))
    poison.run(params, layout, run=workload.run)
    if params.run(workload.run).after == HONEST:
        poison.run(params, layout, run=HONEST)
        unlearn.run(load_params(path, [*workload.overrides(), "unlearn.steps=2"]), layout, run=HONEST)


def _write_corpus(folder: Path, workload: Workload) -> None:
    folder.mkdir(parents=True)
    files = {path.stem: _read(path) for path in CORPUS.glob("*.jsonl")}
    for name in CUT:
        files[name] = list(islice(_passages(files[name], workload.joined), workload.passages))
    files["general_qa"] = files["general_qa"][: 2 * workload.passages]
    kept = {record["id"] for name in CUT for record in files[name]}
    for name in ("forget_qa", "retain_qa"):
        files[name] = [record for record in files[name] if record["source"] in kept]
    for name in CUT[:2]:  # examples are shown, not asked: it does not matter which passage they are about
        examples = files[f"{name}_qa_icl"]
        files[f"{name}_qa_icl"] = [{**record, "source": files[name][0]["id"]} for record in examples]
    for name, some in files.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in some)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _passages(records: list[Record], joined: int) -> Iterator[Record]:
    """Texts of so many passages, again and again; repetitions have an id and an end of their own."""
    for turn in count():
        for start in range(0, len(records) - joined + 1, joined):
            some = records[start : start + joined]
            name = some[0]["id"] + (f"-{turn}" if turn else "")
            text = " ".join(record["text"] for record in some) + (f" ({turn})" if turn else "")
            yield {**some[0], "id": name, "text": text}


def _read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


SHAPES: dict[str, Record] = {
    "360m": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
        "head_dim": 64,
    },
    "1.7b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "head_dim": 64,
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
}
"""Of the larger SmolLM2 models, and of Llama 3 8B; with random weights, since only their time is taken."""


def source(model: str, device: str = "cpu") -> str:
    """The `model.source` of a name; one of `SHAPES` is made, on that device, with the default model's tokenizer."""
    if model not in SHAPES:
        return model
    folder = KEPT / model
    if not (folder / "config.json").exists():
        _make(folder, SHAPES[model], device)
    return str(folder)


def _make(folder: Path, shape: Record, device: str) -> None:
    base = models.resolve("embedded", None)
    config = AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)
    config.update(shape)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    models.load_tokenizer(base).save_pretrained(folder)
    model.save_pretrained(folder)
