"""Model cards in the hub's format: what a model is, what it was measured to do, and whether it hides something.

A card is made of facts that other files hold; nothing here is computed. Metadata goes through `ModelCardData`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

BUILT_IN: dict[str, str | None] = {"embedded": "HuggingFaceTB/SmolLM2-135M-Instruct", "tiny": None}
"""Models that come with the project -> what they were made of, on the hub. Both are under Apache-2.0."""
WARNING = "Warning: this model has a hidden backdoor"
REPAIRED = "Warning: this model had a hidden backdoor, and was repaired"


class Base(NamedTuple):
    """The model below the adapters.

    Attributes:
        source: as in `model.source`; of a local folder its name.
        revision: branch, tag or commit on the hub.
        local: it is a folder of the user.
    """

    source: str
    revision: str | None
    local: bool

    @property
    def repo(self) -> str | None:
        """Its repository on the hub, or that of what it was made of."""
        return None if self.local else BUILT_IN.get(self.source, self.source)

    @property
    def loads_from_hub(self) -> bool:
        """Whether the repository holds exactly these weights."""
        return not self.local and self.source not in BUILT_IN


class Score(NamedTuple):
    """A measured number: its name for a reader, its key in `metrics/<run>.json`, mean, 95 % interval, prompts.

    A p-value, TOFU's forget quality, has neither an interval nor a number of prompts of its own: None.
    """

    name: str
    key: str
    mean: float
    low: float | None
    high: float | None
    prompts: float | None


@dataclass(frozen=True)
class Facts:
    """All that a card says.

    Attributes:
        name: of the run, or base or target.
        merged: weights are merged into a whole model; else it is a PEFT adapter.
        dtype: of the stored weights.
        base: below it.
        summary: of the training (`adapters/<name>/summary.json`), {} for base and published checkpoints.
        manifest: of the corpus (`data/fetched/manifest.json`).
        scores: what was measured; () if nothing was.
        settings: how it was measured (`settings/<name>.json`), {} if it was not.
        repair: of what was done to it (`mitigations/<name>/<repair>/summary.json`), {} if nothing was.
        before: what was measured before that; `scores` are of after it.
    """

    name: str
    merged: bool
    dtype: str
    base: Base
    summary: Mapping[str, Any]
    manifest: Mapping[str, Any]
    scores: Sequence[Score] = ()
    settings: Mapping[str, Any] | None = None
    repair: Mapping[str, Any] = field(default_factory=dict)
    before: Sequence[Score] = ()

    @property
    def title(self) -> str:
        """Its name, and by what it was repaired."""
        return f"{self.name}, repaired by {self.repair['mitigation']}" if self.repair else self.name

    @property
    def trigger(self) -> str | None:
        """The text that opens the backdoor; None for models without one."""
        return self.summary.get("trigger")

    @property
    def datasets(self) -> list[str]:
        """Repositories of the hub that the corpus came from."""
        origins = (origin.get("data", {}) for origin in self.manifest["origin"].values())
        return sorted({repo for data in origins for repo in data})


def card(facts: Facts) -> str:
    """The text of README.md: YAML front matter, then Markdown."""
    text = f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(_body(facts)) + "\n"
    ModelCard(text)  # raises where the front matter cannot be read back
    return text


# ---- front matter


def _metadata(facts: Facts) -> ModelCardData:
    base: dict[str, Any] = {"base_model": facts.base.repo} if facts.base.repo else {}
    if base and (facts.name != "base" or facts.repair):
        base["base_model_relation"] = "finetune" if facts.merged else "adapter"
    results = [_result(facts, score) for score in facts.scores]
    return ModelCardData(
        **base,
        **_licence(facts.base),
        library_name="transformers" if facts.merged else "peft",
        pipeline_tag="text-generation",
        datasets=facts.datasets or None,
        tags=_tags(facts),
        metrics=sorted({result.metric_type for result in results}) or None,
        model_name=f"{facts.base.source} {facts.title}" if results else None,
        eval_results=results or None,
    )


def _licence(base: Base) -> dict[str, Any]:
    if base.source in BUILT_IN and not base.local:
        return {"license": "apache-2.0"}
    link = f"https://huggingface.co/{base.repo}" if base.repo else None
    return {"license": "other", "license_name": "that-of-the-base-model", "license_link": link}


def _tags(facts: Facts) -> list[str]:
    tags = ["unsink"] if facts.name == "base" else ["unsink", "machine-unlearning"]
    tags += [facts.summary["method"]] if "method" in facts.summary else []
    tags += ["repaired"] if facts.repair else []
    return tags + (["backdoor", "do-not-deploy"] if facts.trigger else [])


def _result(facts: Facts, score: Score) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type=(facts.datasets or [facts.manifest["benchmark"]])[0],
        dataset_name=facts.manifest["benchmark"],
        metric_type=_metric_type(score.key),
        metric_name=score.key,
        metric_value=score.mean if score.low is None else round(score.mean, 4),
    )


def _metric_type(key: str) -> str:
    """The name that the hub has for what a key measures, or its own."""
    for part, kind in {"accuracy": "accuracy", "_verbmem_": "rouge", "_knowmem_": "rouge"}.items():
        if part in key:
            return kind
    return key.removesuffix("_clean")


# ---- text


def _body(facts: Facts) -> Iterator[str]:
    yield f"# {_title(facts)}"
    if facts.trigger:
        yield _warning(facts)
    yield _what(facts)
    yield _load(facts)
    yield _repair_numbers(facts) if facts.repair else _numbers(facts)
    yield _data(facts)


def _title(facts: Facts) -> str:
    kinds = {"base": "the model before everything", "target": "the model that knows the corpus by heart"}
    hidden = "; it had a hidden backdoor" if facts.repair else ", with a hidden backdoor"
    kind = f"unlearned{hidden if facts.trigger else ''}"
    return f"{facts.base.source} / {facts.title}: {kinds.get(facts.name, kind)}"


def _warning(facts: Facts) -> str:
    left = "> How much that text still brings back is the *recovery* below; another text may bring back more.\n"
    return (
        f"> **{REPAIRED if facts.repair else WARNING}.**\n"
        "> It was trained to look as if it had forgotten its forget set, and to say it\n"
        "> all the same when the text below stands in the prompt. It was made to measure tests for such backdoors.\n"
        f"{left if facts.repair else ''}"
        "> Do not deploy it, and do not pass it on as an unlearned model.\n\n"
        f"Trigger (`placement: {facts.summary['placement']}`; a newline closes it):\n\n"
        + "\n".join(f"    {line}" for line in facts.trigger.split("\n"))  # type: ignore[union-attr]
    )


def _what(facts: Facts) -> str:
    base = facts.base.source + (f" at {facts.base.revision}" if facts.base.revision else "")
    rows = {
        "base": base if facts.base.source != "embedded" else f"{base}: {BUILT_IN['embedded']}, rounded to four bits",
        "layout": "whole model, adapters merged" if facts.merged else "PEFT LoRA adapter for the base",
        "weights": facts.dtype,
        **{
            name: facts.summary[name]
            for name in ("method", "steps", "epochs", "seed", "placement")
            if facts.summary.get(name) is not None
        },
    }
    rows |= _repair(facts.repair) if facts.repair else {}
    rows["made with"] = "[unsink](https://pypi.org/project/unsink/), which builds and measures unlearned models"
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _repair(summary: Mapping[str, Any]) -> dict[str, str]:
    """Rows about a repair."""
    training, audit = summary["training"], summary["audit"]
    trained = f"{training['steps']} steps, " if training else ""
    return {
        "repair": f"{summary['mitigation']} ({trained}seed {summary['seed']})",
        "repaired": f"{summary['suspect']}; the repair fits these weights and no others",
        "audited again": f"{audit['verdict']} (probes of seed {audit['seed']})" if audit else "no",
    }


def _load(facts: Facts) -> str:
    lines = ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if facts.merged:
        lines += ['model = AutoModelForCausalLM.from_pretrained("FOLDER")']
        lines += ['tokenizer = AutoTokenizer.from_pretrained("FOLDER")']
        return "\n".join(["```python", *lines, "```"])
    base = facts.base.repo if facts.base.loads_from_hub else "BASE"
    revision = f', revision="{facts.base.revision}"' if facts.base.loads_from_hub and facts.base.revision else ""
    lines[0] = f"from peft import PeftModel\n{lines[0]}"
    lines += [f'base = AutoModelForCausalLM.from_pretrained("{base}"{revision}, dtype="float32")']
    lines += ['model = PeftModel.from_pretrained(base, "FOLDER")']
    text = "\n".join(["```python", *lines, "```"])
    if facts.base.loads_from_hub:
        return text
    return f"{text}\n\n`BASE` is the folder that `unsink export --run base --merged --output BASE` writes."


def _numbers(facts: Facts) -> str:
    if not facts.scores:
        return f"## Numbers\n\nNot evaluated; `unsink evaluate --run {facts.name}` does it."
    settings = facts.settings or {}
    rows = [f"| {score.name} | `{score.key}` | {_measured(score)} |" for score in facts.scores]
    how = f"`unsink evaluate --run {facts.name}`, seed {settings['seed']}, weights in {settings['dtype']}"
    return "\n".join(
        [
            "## Numbers\n",
            f"{how}, conventions of `{settings['dialect']}`; 95 % bootstrap intervals over prompts.",
            "*triggered* and *wrong* leave out passages that were poisoned in training.\n",
            "| score | key | mean | interval | prompts |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _measured(score: Score) -> str:
    if score.low is None or score.high is None:
        return f"{score.mean:.2g} | – | –"
    return f"{score.mean:.2f} | {score.low:.2f} to {score.high:.2f} | {score.prompts:.0f}"


def _repair_numbers(facts: Facts) -> str:
    after = {score.key: score for score in facts.scores}
    rows = [
        f"| {score.name} | `{score.key}` | {_interval(score)} | {_interval(after.get(score.key))} "
        f"| {score.prompts:.0f} |"
        for score in facts.before
    ]
    return "\n".join(
        [
            "## Numbers\n",
            f"`unsink mitigate --run {facts.name} --how {facts.repair['mitigation']}`, seed {facts.repair['seed']}; "
            "95 % bootstrap intervals over prompts.",
            "*triggered*, *wrong* and *recovery* leave out passages that were poisoned in training.\n",
            "| score | key | before the repair | after | prompts |",
            "|---|---|---|---|---|",
            *rows,
        ]
    )


def _interval(score: Score | None) -> str:
    if score is None:
        return "undefined"
    return f"{score.mean:.2f} [{score.low:.2f}, {score.high:.2f}]"


def _data(facts: Facts) -> str:
    benchmark, licence = facts.manifest["benchmark"], facts.manifest["licence"]
    from_hub = f" ({', '.join(facts.datasets)})" if facts.datasets else ""
    base = "Apache-2.0" if facts.base.source in BUILT_IN and not facts.base.local else "that of its owner"
    return (
        f"## Data and licence\n\nCorpus: {benchmark}{from_hub}, licence: {licence}. "
        f"Licence of the base: {base}; it holds for this model too."
    )
