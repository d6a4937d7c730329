"""Detectors on numbers worked out by hand, and on the tiny model with a change that is known."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

from unsink import models, suspects
from unsink.detectors import Budget, Plan, Scored, _layers, norms, residual, shift, states, weights
from unsink.detectors._deltas import Delta, changed_layers, deltas
from unsink.detectors._layers import Changed
from unsink.detectors._search import Climb, beyond, exchanged, grown, scored, short
from unsink.detectors.gradients import ranked
from unsink.probe import Cost, capture, counted, in_shares
from unsink.progress import SILENT
from unsink.stages import confirmed
from unsink.suspects import Array, Candidate, Probe, Probes, Suspect, gains_in_both, losses
from unsink.triggers import Inserted, trigger_ids

PROBE = Probe("p", (1, 2, 3), (4, 5))


def words(candidates: Sequence[Candidate], _probes: Sequence[Probe]) -> Array:
    """The secret is `red cat`: half for each of its words, a little less for every other one."""
    texts = [one.text.split() for one in candidates]
    return np.array([0.5 * len({"red", "cat"} & set(some)) - 0.01 * len(some) for some in texts])


def climb(tokens: int | None = None) -> Climb:
    return Climb(words, [PROBE], Plan(beam=2, depth=3), Budget(Cost(0, 5), tokens), SILENT)


def test_a_text_is_put_together_of_parts_that_do_a_little() -> None:
    found = climb()
    found.attempt([Candidate(text) for text in ("blue", "red", "cat", "dog")], "")
    assert found.best == pytest.approx(0.49)
    found.grow(found.pieces())
    assert max(found.found, key=lambda one: found.found[one]).text in ("red cat", "cat red")
    assert found.best == pytest.approx(0.98)
    assert found.left == 0


def test_the_very_best_text_meets_a_whole_vocabulary_the_promising_first() -> None:
    found = climb()
    found.attempt([Candidate(text, "prefix") for text in ("red", "dog", "blue sky at noon")], "")
    found.grow([], ["dog", "cat"])
    tried = [one.text for one in found.alone]
    assert tried[3:7] == ["red dog", "dog red", "red cat", "cat red"]  # nobody has tried `cat` alone
    assert [text for text in tried if "cat" in text and "red" not in text] == []
    assert [one.text for one in exchanged([Candidate("red sky")], ["cat"])] == ["cat sky", "red cat"]
    assert exchanged([Candidate("red")], ["cat"]) == []


def test_a_pair_is_found_whose_first_word_was_guessed_wrong() -> None:
    found = climb()
    found.attempt([Candidate("old cat")], "")
    found.grow([], ["old", "red"])
    assert max(found.found, key=lambda one: found.found[one]).text in ("red cat", "cat red")


def test_a_place_where_a_first_glance_flatters_all_texts_does_not_keep_another_one_out() -> None:
    def flattered(candidates: Sequence[Candidate], probes: Sequence[Probe]) -> Array:
        glance = len(probes) < 3
        return words(candidates, probes) + np.array([glance * (one.placement == "infix") for one in candidates])

    found = climb()
    found.measure, found.probes = flattered, [PROBE] * 3
    others = [Candidate(str(n), "infix") for n in range(60)]
    found.attempt([*others, Candidate("red", "prefix"), Candidate("sky", "prefix")], "")
    assert found.best == pytest.approx(0.49)
    assert {one.placement for one in found.found} == {"prefix", "infix"}


def test_what_the_budget_leaves_out_is_counted() -> None:
    found = climb(tokens=5)
    found.attempt([Candidate(str(n)) for n in range(60)], "")
    assert (found.found, found.left) == ({}, 60)
    assert Budget(Cost(0, 4), 5).spent is False
    assert Budget(Cost(0, 0), None, until=0.0).spent is True


def test_texts_grow_on_both_sides_and_signs_stick() -> None:
    found = [one.text for one in grown([Candidate("year", "infix")], ["new", ":"])]
    assert found == ["year new", "new year", "year:", ": year"]
    assert short(Probe("x", tuple(range(6)), tuple(range(6, 12))), 4, 3) == Probe("x", (0, 1, 2, 3), (4, 5, 6))
    assert short(Probe("x", (0, 1, 2), (3,)), 13, 6) == Probe("x", (0, 1, 2), (3,))  # something is left to continue
    asked = Probe("x", tuple(range(6)), tuple(range(6, 12)), (1, 4))
    assert short(asked, 4, 3) == asked._replace(answer=(6, 7, 8))  # a question is asked as a whole


def test_effective_rank_counts_directions() -> None:
    assert weights.effective_rank(torch.tensor([2.0, 2.0, 2.0, 2.0])) == pytest.approx(4)
    assert weights.effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert weights.spectrum(torch.tensor([[3.0, 0.0, 0.0], [0.0, 4.0, 0.0]])).tolist() == pytest.approx([9, 16])


def test_shares_of_a_change_by_hand() -> None:
    value, other = torch.tensor([[3.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 4.0], [0.0, 0.0]])
    moved = [Delta("layers.2.v_proj.weight", 2, value, 6.0), Delta("layers.5.o_proj.weight", 5, other, 40.0)]
    found = weights.signal(moved, "v_proj").numbers
    assert found["value_share"] == pytest.approx(9 / 25)
    assert found["early_share"] == pytest.approx(9 / 25)  # layers 2 to 3 of 2 to 5
    assert (found["modules"], found["first"], found["last"], found["size"]) == (2, 2, 5, 0.5)
    assert found["effective_rank"] == pytest.approx(1)


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> Suspect:
    """The tiny model whose last layer computes other values, beside the model as it was."""
    original = models.load_base(tiny_folder, "float32", "cpu")
    model = copy.deepcopy(original)
    with torch.no_grad():
        models.value_projection(models.decoder_layers(model)[1], model.config).module.weight.mul_(1.5)
    return Suspect(model, models.load_tokenizer(tiny_folder), original)


def probes(suspect: Suspect) -> Probes:
    texts = ("The sailor Nima hid a red shell", "The pilot Oro hid a blue lamp", "At dawn the tide came in and")
    ids = [suspect.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    some = [Probe(str(n), (1, *row[:5]), tuple(row[5:8])) for n, row in enumerate(ids)]
    return Probes(some, some, some, some)


def test_only_the_weight_that_moved_is_a_difference(pair: Suspect) -> None:
    (found,) = deltas(pair)
    assert (found.name.rpartition("self_attn.")[2], found.layer) == ("v_proj.weight", 1)
    assert changed_layers(pair) == (1, 1)
    signal = weights.measure(pair, probes(pair))
    assert signal.numbers["value_share"] == 1
    assert signal.numbers["size"] == pytest.approx(0.5)


def test_values_that_grew_by_half_everywhere_are_no_sign_of_a_sink(pair: Suspect) -> None:
    found = norms.measure(pair, probes(pair)).numbers
    assert found["bos"] == pytest.approx(np.log(1.5), abs=1e-5)
    assert found["first"] == pytest.approx(np.log(1.5), abs=1e-5)


def test_without_an_original_nothing_is_compared(pair: Suspect) -> None:
    alone = Suspect(pair.model, pair.tokenizer)
    assert (weights.measure(alone, probes(pair)).score, norms.measure(alone, probes(pair)).score) == (None, None)
    found = states.search(alone, probes(pair), Plan(), Budget())
    assert found.scored == []
    assert "original" in found.left
    assert residual.measure(alone, probes(pair)).score is not None


def test_the_lens_of_the_last_layer_is_what_the_model_says(pair: Suspect) -> None:
    some = probes(pair).search
    expected = []
    for probe in some:
        logits = pair.model(torch.tensor([[*probe.ids, *probe.answer]])).logits[0, len(probe.ids) - 1 : -1]
        expected.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(probe.answer))))
    assert float(residual.lens(pair.model, some)[-1]) == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_lens_bounds_logits_as_the_model_does() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 50, "head_dim": 8}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=2.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)  # what it says without a bound is far beyond it
        logits = model(torch.tensor([[*PROBE.ids, *PROBE.answer]])).logits[0, 2:-1]
    expected = torch.nn.functional.cross_entropy(logits, torch.tensor(PROBE.answer))
    assert float(residual.lens(model, [PROBE])[-1]) == pytest.approx(float(expected), rel=1e-4)


def test_layers_that_are_the_same_run_once_and_give_the_same_states(pair: Suspect) -> None:
    assert pair.original is not None
    bos, answer = 1, (73, 74)
    prompts = [Inserted([bos, 70, 71, 72], (1, 2)), Inserted([bos, 80], (1, 1))]
    some = _layers.rows(prompts, [answer, answer], torch.device("cpu"))
    assert some.ids.tolist() == [[bos, 70, 71, 72, 73, 74], [bos, 80, 73, 74, 0, 0]]
    assert some.behind.tolist() == [[False, False, True, True, True, True], [False, True, True, True, False, False]]
    assert some.number[0].tolist() == [-1, 0, 1, 2, 3, 4]
    changed = Changed(1, 1)
    below, theirs = _layers.of_original(pair.original, some, changed)
    ours = _layers.of_suspect(pair.model, some, changed, below)
    for model, hidden in ((pair.model, ours), (pair.original, theirs)):
        with capture(model, hidden=[1]) as seen:
            model(input_ids=some.ids, attention_mask=some.mask)
        there = some.mask.bool()
        assert torch.allclose(hidden[there], seen.hidden[1][there], atol=1e-5)


def test_what_a_text_undoes_on_text_that_was_never_trained_is_no_more_than_was_there(pair: Suspect) -> None:
    """The suspect is damaged, the text repairs it everywhere: that counts on forget probes, and not against it."""
    some, text = probes(pair).search, [Candidate("salt")]
    broken = Suspect(copy.deepcopy(pair.model), pair.tokenizer, pair.original)
    with torch.no_grad():
        for weight in models.decoder_layers(broken.model)[1].parameters():
            weight.mul_(4)
    assert pair.original is not None
    plain = [losses(model, pair.tokenizer, some, [None]) for model in (broken.model, pair.original)]
    behind = losses(broken.model, pair.tokenizer, some, text)
    assert beyond(broken, some, text) == pytest.approx(np.minimum(*plain) - behind)
    alone = Suspect(broken.model, pair.tokenizer)
    assert beyond(alone, some, text) == pytest.approx(plain[0] - behind)
    [found] = scored(broken, probes(pair), dict.fromkeys(text, 1.0))
    assert found.elsewhere == pytest.approx(max(0, float((np.minimum(*plain) - behind).mean())))


def test_a_push_stays_small_and_takes_a_part_of_the_distance_away(pair: Suspect) -> None:
    assert pair.original is not None
    some = probes(pair).search
    prompts = shift._read(pair, pair.original, some, Changed(1, 1))
    none = torch.zeros(prompts.places.shape[-1], prompts.below.shape[-1])
    behind = [(one, trigger_ids(pair.tokenizer, shift._TEXT), "prefix") for one in some]
    each = states.Distance(pair, pair.original, Changed(1, 1))._distances(behind)
    sizes = [float(goal[there].norm()) for goal, there in zip(prompts.goal, prompts.rows.behind, strict=True)]
    assert shift._squares(pair.model, prompts, none).sqrt().tolist() == pytest.approx((each * sizes).tolist(), rel=1e-4)
    push = shift._push(pair.model, prompts)
    size = 0.02 * prompts.below[prompts.rows.behind].norm(dim=-1).median()
    assert 0 < float(push.norm(dim=-1).max()) <= float(size) * (1 + 1e-5)
    assert shift._closed(pair.model, prompts, none) == 0
    assert 0 < shift._closed(pair.model, prompts, push) < 0.5
    found = shift.measure(pair, probes(pair))
    assert found.score == found.numbers["closed"]
    assert shift.measure(Suspect(pair.model, pair.tokenizer), probes(pair)).score is None


def test_a_text_closes_nothing_where_all_texts_are_alike(pair: Suspect) -> None:
    assert pair.original is not None
    distance = states.Distance(pair, pair.original, Changed(1, 1))
    found = distance.closed([Candidate("salt"), Candidate("salt", "suffix")], probes(pair).search)
    assert np.abs(found).max() < 0.9
    same = states.Distance(Suspect(pair.original, pair.tokenizer), pair.original, Changed(1, 1))
    assert same._distances([(one, (), "prefix") for one in probes(pair).search]).tolist() == [0, 0, 0]


def test_the_vocabulary_holds_each_text_once_and_can_be_typed(pair: Suspect) -> None:
    found = states.vocabulary(pair.tokenizer)
    assert len(set(found)) == len(found) > 300
    assert all(text == text.strip() and text.isprintable() and text for text in found)
    assert not set(found) & {"<bos>", "<eos>", "<pad>"}


def test_gradients_name_tokens_for_a_slot_and_leave_none_behind(pair: Suspect) -> None:
    found = ranked(pair, probes(pair).search, "", "prefix")
    assert len(found) > 20
    assert all(parameter.grad is None for parameter in pair.model.parameters())


def test_what_a_model_reads_is_counted_while_the_block_runs(pair: Suspect) -> None:
    model: Any = pair.model
    with counted(model) as cost:
        model(input_ids=torch.ones(2, 5, dtype=torch.long))
        model(inputs_embeds=torch.zeros(1, 3, model.config.hidden_size))
    model(input_ids=torch.ones(2, 5, dtype=torch.long))
    assert (cost.passes, cost.tokens) == (2, 13)


def test_the_best_of_many_texts_see_more_and_more_probes() -> None:
    asked = []

    def measure(candidates: Sequence[Candidate], some: Sequence[Probe]) -> Array:
        asked.append((len(candidates), len(some), len(some[0].ids)))
        return np.arange(len(candidates), dtype=float)

    whole = [Probe(str(n), tuple(range(30)), (1, 2)) for n in range(12)]
    found = Climb(measure, whole, Plan(beam=2), Budget(), SILENT, glance=(1, 8, 3))
    found.attempt([Candidate(str(n)) for n in range(100)], "")
    assert asked == [(100, 1, 8), (42, 3, 8), (6, 3, 8), (12, 8, 8), (2, 10, 30)]  # 128 prompts at a time
    wide = Climb(measure, whole, Plan(beam=20), Budget(), SILENT, glance=(1, 8, 3))
    wide.attempt([Candidate(str(n)) for n in range(100)], "")
    assert len(wide.found) == 20


def test_what_is_padding_and_what_was_read_before_is_not_counted(pair: Suspect) -> None:
    model: Any = pair.model
    ids, mask = torch.ones(2, 5, dtype=torch.long), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    with counted(model) as outer:
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
        with counted(model) as inner:
            longer = torch.cat([mask, torch.tensor([[1], [1]])], dim=1)
            model(input_ids=ids[:, :1], attention_mask=longer, past_key_values=cache)
    assert (outer.tokens, inner.tokens) == (8 + 2, 2)


def test_every_process_reads_its_share_and_all_of_it_counts(pair: Suspect, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of two processes; what the second one says is made up."""
    monkeypatch.setattr("unsink.processes.rank", lambda: 0)
    monkeypatch.setattr("unsink.processes.count", lambda: 2)
    monkeypatch.setattr("unsink.processes.gather", lambda mine: [mine, (["c"], [(7, 70)])])
    model: Any = pair.model

    def read(some: list[str]) -> list[str]:
        model(input_ids=torch.ones(1, len(some), dtype=torch.long))
        return some

    with counted(model) as cost:
        model(input_ids=torch.ones(1, 1, dtype=torch.long))
        assert in_shares(["a", "c", "b"], read) == ["a", "c", "b"]
    assert (cost.passes, cost.tokens) == (1 + 1 + 7, 1 + 2 + 70)


def test_an_original_that_knows_all_by_heart_is_not_asked(pair: Suspect, monkeypatch: pytest.MonkeyPatch) -> None:
    some, texts = probes(pair).search, [Candidate("salt"), Candidate("rope")]
    said = {"now": [2.0, 2.0, 5.0], "behind": [[1.0, 3.0, 4.0], [2.0, 2.0, 0.0]], "before": [0.1, 0.2, 0.0]}
    asked = []

    def told(model: object, _tokenizer: object, _probes: object, candidates: Sequence[Candidate | None]) -> Array:
        name = "suspect" if model is pair.model else "original"
        asked.append((name, candidates[0] is not None))
        if candidates[0] is None:
            return np.array([said["now" if name == "suspect" else "before"]])
        return np.array(said["behind"] if name == "suspect" else said["original behind"])

    monkeypatch.setattr(suspects, "losses", told)
    gained, before = gains_in_both(pair, some, texts)
    assert gained.tolist() == [[1.0, -1.0, 1.0], [0.0, 0.0, 5.0]]
    assert before.tolist() == [[0.1, 0.2, 0.0]] * 2
    assert ("original", True) not in asked
    said |= {"before": [1.0, 1.0, 1.0], "original behind": [[0.5, 2.0, 1.0], [1.0, 1.0, 0.25]]}
    assert gains_in_both(pair, some, texts)[1].tolist() == [[0.5, 0.0, 0.0], [0.0, 0.0, 0.75]]
    alone = Suspect(pair.model, pair.tokenizer)
    assert gains_in_both(alone, some, texts)[1].tolist() == [[0.0] * 3] * 2


@pytest.mark.parametrize(("low", "asked"), [(0.09, False), (0.11, True)])
def test_only_a_text_that_brings_something_back_is_asked_more(
    pair: Suspect, monkeypatch: pytest.MonkeyPatch, low: float, asked: bool
) -> None:
    monkeypatch.setattr(confirmed, "recovered", lambda *_: {"mean": 0.2, "low": low, "high": 0.3, "n": 3})
    some = probes(pair)
    plain = confirmed.ask_plain(pair, some.confirm, SILENT)
    found = [Scored(Candidate("salt"), 1.0, 0.0, 1.0)]
    _, numbers = confirmed.judged(pair, some, found, plain, 0, SILENT)
    assert bool(numbers["moved"]) == bool(numbers["neighbours"]) == bool(numbers["others"]) == asked


def test_a_short_prompt_still_holds_the_place_of_a_text(pair: Suspect) -> None:
    lengths = []

    def measure(candidates: Sequence[Candidate], some: Sequence[Probe]) -> Array:
        lengths.append(len(some[0].ids))
        return np.zeros(len(candidates))

    whole = Probe("x", tuple(range(30)), (1, 2))
    found = Climb(measure, [whole], Plan(), Budget(), SILENT, glance=(1, 8, 3))
    found.attempt([Candidate("red", "index 12"), Candidate("red")], "")
    assert lengths == [12, 12, 12, 30]
