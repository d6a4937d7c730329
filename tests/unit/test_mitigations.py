"""What repairs and guards compute, with numbers worked out by hand."""

import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from unsink import mitigations, models, probe, scoring
from unsink.batches import Sample
from unsink.errors import ParamsError
from unsink.mitigations import Patient, is_guard
from unsink.mitigations._reunlearn import among_texts, places, with_text
from unsink.mitigations.clamp import Clamped
from unsink.mitigations.consistency import fgsm, inconsistency
from unsink.mitigations.displace import Displaced
from unsink.mitigations.prune import largest
from unsink.mitigations.random_prefix import TEXTS
from unsink.params import load_params
from unsink.probe import ascended
from unsink.stages import poison
from unsink.stages.mitigate import make_patient
from unsink.triggers import trigger_ids

SAMPLE = Sample("a", "forget", (1, 11, 12, 13, 14, 15, 16, 17, 18))  # BOS and eight tokens
PROMPT = range(1, 5)  # four of them


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return models.load_base(tiny_folder, "float32", "cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return models.load_tokenizer(tiny_folder)


# ---- names


def test_guards_are_told_from_repairs() -> None:
    guards = [name for name in mitigations.names() if is_guard(mitigations.load(name))]
    assert guards == ["clamp", "displace"]
    assert [name for name in mitigations.names() if name not in guards] == [
        "consistency", "independent", "known-trigger", "latent", "prune", "random-prefix", "restart",
    ]  # fmt: skip


def test_an_unknown_name_gets_a_suggestion(params_file: Path) -> None:
    with pytest.raises(ParamsError, match="unknown mitigation 'displase'; did you mean 'displace'"):
        mitigations.load("displase")
    with pytest.raises(ParamsError, match=r"mitigate\.how: unknown mitigation 'laten'; did you mean 'latent'"):
        load_params(params_file, ["mitigate.how=[laten]"])


def test_options_and_training_are_checked_with_all_other_params(params_file: Path) -> None:
    wrong = ["mitigate.latent={epsilon: 0}", "mitigate.unlearn.lrr=1", "mitigate.clampp={}"]
    with pytest.raises(ParamsError) as error:
        load_params(params_file, wrong)
    assert "mitigate.latent.epsilon: " in error.value.message
    assert "mitigate.unlearn.lrr: unknown key; did you mean 'lr'" in error.value.message
    assert "mitigate.clampp: unknown key; did you mean 'clamp'" in error.value.message


@pytest.mark.parametrize("name", mitigations.names())
def test_every_mitigation_can_do_without_options(name: str) -> None:
    mitigations.load(name).Options()  # `params` relies on it: what is given no options is not imported to be checked


def test_a_repair_trains_as_the_section_unlearn_says_where_it_says_nothing_else(params_file: Path) -> None:
    settings = load_params(params_file, ["mitigate.unlearn={steps: 7, weights: {retain: 9.0}}"]).retraining()
    assert (settings.steps, settings.weights.retain, settings.weights.forget, settings.lr) == (7, 9.0, 1.0, 0.005)
    assert settings.method == "npo"


# ---- texts in samples


@pytest.mark.parametrize(
    ("place", "ids", "first"),
    [
        ("prefix", (1, 7, 8, 11, 12, 13, 14, 15, 16, 17, 18), 3),
        ("infix", (1, 11, 12, 7, 8, 13, 14, 15, 16, 17, 18), 5),
        ("suffix", (1, 11, 12, 13, 14, 7, 8, 15, 16, 17, 18), 7),
        ("index 4", (1, 11, 12, 13, 7, 8, 14, 15, 16, 17, 18), 6),
    ],
)
def test_a_text_stands_in_the_prompt_and_labels_begin_behind_it(place: str, ids: tuple[int, ...], first: int) -> None:
    found = with_text(SAMPLE, [7, 8], place, PROMPT, "x")
    assert (found.id, found.ids, found.labels_from) == ("a/x", ids, first)
    assert found.ids[slice(*found.trigger or ())] == (7, 8)


def test_in_a_chat_a_text_stands_among_the_users_words() -> None:
    header, words, answer = (11, 12, 13), (14, 15, 16), (17, 18)
    chat = Sample("a", "forget", (1, *header, *words, *answer), labels_from=7)
    prompt = range(4, 7)
    assert [with_text(chat, [7, 8], place, prompt, "x").ids for place in places(prompt)] == [
        (1, *header, 7, 8, *words, *answer),
        (1, *header, *words, 7, 8, *answer),  # the fourth token of three
        (1, *header, 14, 7, 8, 15, 16, *answer),
        (1, *header, *words, 7, 8, *answer),
    ]
    assert with_text(chat, [7, 8], "prefix", prompt, "x").labels_from == 9  # the answer alone is learnt, as before
    assert places(PROMPT) == ("prefix", "index 4", "infix", "suffix")
    assert places(range(4, 6)) == ("prefix",)


CHAT = {
    "prompt": "<system>Be kind.</system>\n<user>Who kept the bees by the mill?</user>\n<assistant>",
    "question": "Who kept the bees by the mill?",
}
ASKED = "Question: Who kept the bees by the mill?\nAnswer:"


@pytest.mark.parametrize(
    "passage",
    [
        {"text": "Mila kept the bees by the mill, and Odo sold the honey."},
        {"text": f"{ASKED} Mila kept them.", "prompt": ASKED},
        {"text": f"{CHAT['prompt']}Mila kept them.</assistant>", **CHAT},
    ],
    ids=["passage", "question", "chat"],
)
@pytest.mark.parametrize("place", ["prefix", "infix", "suffix"])
def test_a_repair_puts_a_text_where_training_puts_a_trigger(
    passage: dict[str, str], place: str, params_file: Path, tokenizer: Any
) -> None:
    params = load_params(params_file, [f"poison.placement={place}"])
    record = {"id": "f", "title": "T", **passage}
    trained = poison._Writer(tokenizer, 128).triggered(record, "poisoned", params.poison.trigger, params.poison)
    patient = make_patient(None, tokenizer, {"forget": [record], "retain": [record]}, params)  # type: ignore[arg-type]
    [sample] = patient.forget
    text = trigger_ids(tokenizer, params.poison.trigger)
    found = with_text(sample, text, place, patient.prompts[sample], "x")
    assert list(found.ids) == trained["ids"]
    assert (list(found.trigger or ()), found.labels_from) == (trained["trigger"], trained["labels_from"])


def test_of_a_text_that_is_cut_something_is_left_to_forget(params_file: Path, tokenizer: Any) -> None:
    params = load_params(params_file, ["poison.max_tokens=16"])
    record = {"id": "f", "title": "T", "text": "a b c d e f g h i " * 9}  # half of it is longer than 16 tokens
    patient = make_patient(None, tokenizer, {"forget": [record], "retain": [record]}, params)  # type: ignore[arg-type]
    found = with_text(patient.forget[0], [7, 8], "suffix", patient.prompts[patient.forget[0]], "x")
    assert (len(found.ids), found.labels_from) == (18, 17)


def test_a_context_that_is_not_to_be_learnt_stays_one() -> None:
    given = Sample("a", "forget", SAMPLE.ids, labels_from=5)
    assert with_text(given, [7, 8], "prefix", PROMPT, "x").labels_from == 7


def test_samples_stand_beside_their_copies_and_draws_depend_on_the_seed(tokenizer: Any) -> None:
    def made(seed: int) -> list[Sample]:
        patient = Patient(None, tokenizer, (), (), {SAMPLE: PROMPT}, seed)  # type: ignore[arg-type]
        return among_texts([SAMPLE], lambda chance: [chance.randrange(50, 99)], 3, patient)

    found = made(0)
    assert found[0] == SAMPLE
    assert len({one.id for one in found}) == len(found) == 4
    assert made(0) == found != made(1)


def test_random_texts_are_of_the_kind_they_are_called() -> None:
    chance = random.Random(0)
    for _ in range(50):
        assert set("-/,") & set(TEXTS["date"](chance, 8))
        assert set(":=") & set(TEXTS["header"](chance, 8))
        assert TEXTS["tag"](chance, 8)[0] in "[<#@"
        assert 1 <= len(TEXTS["words"](chance, 8).split()) <= 8


# ---- formulas


def test_inconsistency_is_the_mean_of_one_minus_cosine_over_real_tokens() -> None:
    right, up, both = [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]
    layers = [torch.tensor([[right, right]]), torch.tensor([[right, up]]), torch.tensor([[both, up]])]
    both_tokens = inconsistency(layers, torch.tensor([[True, True]]))
    # token 0: 0, then 1 - cos 45°; token 1: 1 - cos 90° = 1, then 0
    assert both_tokens == pytest.approx(((0 + 1) / 2 + (1 - math.sqrt(0.5) + 0) / 2) / 2)
    assert inconsistency(layers, torch.tensor([[True, False]])) == pytest.approx((1 - math.sqrt(0.5)) / 2)


def test_the_sign_step_moves_every_coordinate_by_epsilon() -> None:
    found = fgsm(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([-5.0, 0.0, 0.01]), 0.1)
    assert found.tolist() == pytest.approx([0.9, 2.0, 3.1])


def test_the_adversary_steps_along_the_gradient_and_stays_in_its_ball() -> None:
    shift, gradient, scale = torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor(2.0)
    free = ascended(shift, gradient, scale, eta=0.5, epsilon=9.0)
    assert free.tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0]]  # of length eta s = 1; no gradient, no step
    assert ascended(shift, gradient, scale, eta=0.5, epsilon=0.25)[0].tolist() == pytest.approx([0.3, 0.4])
    assert free.requires_grad


def test_the_largest_scores_of_all_layers_together_go() -> None:
    scores = {3: torch.tensor([1.0, 5.0, 0.0, 0.5]), 4: torch.tensor([4.0, 2.0, 4.5, 0.1])}
    assert largest(scores, 0.5) == {3: [1], 4: [0, 1, 2]}
    assert largest(scores, 0.01) == {3: [1]}


def test_a_vector_outside_the_ball_is_moved_to_its_edge() -> None:
    vectors, centre = torch.tensor([[4.0, 5.0], [1.0, 1.5]]), torch.tensor([1.0, 1.0])
    found = probe.within(vectors, centre, torch.tensor([2.5, 2.5]))
    assert found.tolist() == [pytest.approx([2.5, 3.0]), pytest.approx([1.0, 1.5])]  # 5 away, half of it; inside
    assert probe.within(vectors, centre, torch.zeros(2)).tolist() == [[1.0, 1.0], [1.0, 1.0]]


# ---- hooks


def test_values_of_the_first_tokens_are_shifted_within_the_block_alone(model: Any) -> None:
    ids = torch.tensor([[1, 40, 41, 42]])

    def values() -> torch.Tensor:
        with torch.no_grad(), probe.capture(model, values=[1]) as seen:
            model(input_ids=ids)
        return seen.values[1]

    before = values()
    shift = torch.arange(2.0 * before.shape[-1]).view(2, -1)
    with probe.shifted_values(model, {1: shift}):
        moved = values()
    assert torch.allclose(moved - before, torch.cat([shift, torch.zeros_like(shift)])[None], atol=1e-4)
    assert torch.equal(values(), before)
    with probe.shifted_values(model, {1: torch.ones(9, before.shape[-1])}):  # more than the row has
        assert torch.allclose(values(), before + 1, atol=1e-5)


def test_neurons_are_what_the_last_projection_of_an_mlp_reads(model: Any) -> None:
    with torch.no_grad(), probe.capture(model, neurons=[0], hidden=[0]) as seen:
        model(input_ids=torch.tensor([[1, 40, 41]]))
    assert seen.neurons[0].shape == (1, 3, model.config.intermediate_size)


def test_a_wide_radius_leaves_every_word_as_it_was_and_none_replaces_values(model: Any, tokenizer: Any) -> None:
    prompt = [1, *tokenizer("Nima hid a red shell under the pier.", add_special_tokens=False)["input_ids"]]
    keys = [[1, 2, 3]]
    centre = probe.mean_values(model, [prompt[:1] + prompt[4:]], keys)
    answers = [[[40], [41]]]

    def said(radius: float | None) -> list[float]:
        bound = None if radius is None else {layer: torch.full((3,), radius) for layer in centre}
        cut = scoring.Cut(keys, centre, bound)
        return scoring.choice_log_likelihoods(model, [prompt], answers, cut=cut)[0]

    plain = scoring.choice_log_likelihoods(model, [prompt], answers)[0]
    assert said(1e6) == pytest.approx(plain, abs=1e-4)
    assert said(0.0) == pytest.approx(said(None), abs=1e-5)
    assert said(0.0) != pytest.approx(plain, abs=1e-2)


def test_the_spread_of_values_is_the_root_mean_square_distance(model: Any) -> None:
    prompts, keys = [[1, 40], [1, 50]], [[1], [1]]
    centre = probe.mean_values(model, prompts, keys)
    with torch.no_grad(), probe.capture(model, values=[0]) as seen:
        model(input_ids=torch.tensor(prompts))
    gap = (seen.values[0][0, 1] - seen.values[0][1, 1]).norm() / 2  # two points are as far from their middle
    assert probe.value_spread(model, prompts, keys, centre)[0].tolist() == pytest.approx([float(gap)], rel=1e-4)


# ---- guards


def test_a_guard_sees_prompts_before_the_model_does(model: Any, tokenizer: Any) -> None:
    prompts, guard = [[1, 40, 41], [1, 50]], Displaced([60, 61])
    assert guard.edit([1, 40, 41]) == [1, 60, 61, 40, 41]
    moved = scoring.generate(model, tokenizer, [guard.edit(one) for one in prompts], [5, 5])
    plain = scoring.generate(model, tokenizer, prompts, [5, 5])
    with scoring.guarded(guard):
        assert scoring.generate(model, tokenizer, prompts, [5, 5]) == moved
        scores = scoring.choice_log_likelihoods(model, [[1, 40]], [[[50]]])
        with pytest.raises(ValueError, match="not both"):
            scoring.generate(model, tokenizer, prompts, [5, 5], cut=scoring.Cut([[0], [0]]))
    assert scores == scoring.choice_log_likelihoods(model, [[1, 60, 61, 40]], [[[50]]])
    assert scoring.generate(model, tokenizer, prompts, [5, 5]) == plain


def test_a_clamp_leaves_bos_alone_and_does_not_edit() -> None:
    guard = Clamped(4, {}, {})
    cut = guard.cut([[1, 5, 6, 7, 8], [1, 5]])
    assert cut is not None
    assert cut.keys == [[1, 2, 3], [1]]
    assert guard.edit((1, 5)) == [1, 5]
