"""Generation equals `model.generate`, choices equal a plain forward pass; float32, several architectures."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from unsink import models, probe, scoring
from unsink.errors import DataError
from unsink.metrics import cut
from unsink.scoring import Cut, Sampling, choice_log_likelihoods, generate, gradient_norms, stream, token_scores

EOS = 2
ROPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
ROPE |= {"initializer_range": 0.3, "vocab_size": 259, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS}
IDS = {"vocab_size": 259, "bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": EOS, "initializer_range": 0.3}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**ROPE, num_key_value_heads=2, max_position_embeddings=256),
    "qwen2-sliding": lambda: Qwen2Config(
        **ROPE, num_key_value_heads=1, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(**ROPE, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=2.0),
    "gpt2": lambda: GPT2Config(**IDS, n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "gpt_neox": lambda: GPTNeoXConfig(**ROPE),
    "opt": lambda: OPTConfig(
        vocab_size=259, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32,
        bos_token_id=1, eos_token_id=EOS, pad_token_id=EOS, init_std=0.3,
    ),
    "gpt_neo": lambda: GPTNeoConfig(
        **IDS, hidden_size=32, num_layers=3, num_heads=4, attention_types=[[["global", "local", "global"], 1]],
        window_size=5, max_position_embeddings=256,
    ),
}  # fmt: skip
PREFIX = [1, *range(40, 57)]
PROMPTS = [[*PREFIX, *rest] for rest in ([70], [71, 72, 73, 74, 75, 76], [70, 90], [99, 98, 97], [120, 121])]
LIMITS = [12, 12, 3, 12, 1]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<bos>", "<eos>", *sorted(ByteLevel.alphabet())])}
    bytes_only = Tokenizer(BPE(vocab=vocab, merges=[]))
    bytes_only.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, bos_token="<bos>", eos_token="<eos>", pad_token="<eos>")


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    for key, parameter in model.named_parameters():
        if "norm" in key or key.endswith("bias"):  # trained models have neither ones nor zeros there
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.fixture(params=CONFIGS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(request.param)


@pytest.fixture
def llama() -> PreTrainedModel:
    return build("llama")


def alone(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    """The model's own greedy continuation, one prompt at a time."""
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return out[0, len(prompt) :].tolist()


def expected(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, stop: tuple[str, ...] = ()) -> list[str]:
    ids = [alone(model, prompt, new) for prompt, new in zip(PROMPTS, LIMITS)]
    return [cut(tokenizer.decode(new, skip_special_tokens=True), stop) for new in ids]


@pytest.mark.parametrize("shared_prefix", [False, True])
def test_generation_equals_the_models_own(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, shared_prefix: bool
) -> None:
    texts = generate(model, tokenizer, PROMPTS, LIMITS, shared_prefix=shared_prefix)
    assert texts == expected(model, tokenizer)
    assert len(set(texts)) > 2, "the test says nothing if all prompts are continued alike"


@pytest.mark.parametrize("name", ["llama", "qwen2-sliding"])
def test_a_stream_is_what_generate_returns_piece_by_piece(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(name)
    texts = generate(model, tokenizer, PROMPTS, LIMITS)
    stops = ("\ufffd\ufffd", f"{texts[0][3:5]}", f"{texts[1][2:4]}")  # met in the middle of a text, in two steps
    for stop in ((), stops):
        whole = generate(model, tokenizer, PROMPTS, LIMITS, stop=stop)
        pieces = [
            [said.text for said in stream(model, tokenizer, prompt, new, stop=stop)]
            for prompt, new in zip(PROMPTS, LIMITS)
        ]
        assert ["".join(some) for some in pieces] == whole
        assert (whole == texts) == (not stop)
        assert max(sum(map(bool, some)) for some in pieces) > 1, "nothing came before the end"
    drawn = Sampling(1.0, "seed")
    said = list(stream(model, tokenizer, PROMPTS[0], 12, sampling=drawn))
    assert ["".join(one.text for one in said)] == generate(model, tokenizer, PROMPTS[:1], [12], sampling=drawn)
    assert "".join(one.text for one in said) != texts[0]


def test_a_stream_holds_back_what_may_become_a_stop_or_a_character(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    says(llama, tokenizer("née\nQ\nQuestion: so")["input_ids"])
    pieces = [said.text for said in stream(llama, tokenizer, PREFIX, 18, stop=("\nQuestion",))]
    assert pieces == ["n", "", "é", "e", "", "", "\nQ", *[""] * 8]


def says(model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Let a model say these tokens behind `PREFIX`, whatever it is given."""

    def forced(*_: Any, position_ids: Tensor, **__: Any) -> Any:
        logits = torch.zeros(1, 1, 259)
        logits[0, 0, ids[int(position_ids[0, -1]) + 1 - len(PREFIX)]] = 9.0
        return CausalLMOutputWithPast(logits=logits)

    model.forward = forced  # type: ignore[method-assign]


@torch.no_grad()
def test_a_stream_tells_how_likely_each_token_was(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    said = list(stream(llama, tokenizer, PREFIX, 5, sampling=Sampling(3.0, "draws"), top=2))
    ids = [*PREFIX, *(one.token for one in said)]
    logs = llama(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    assert any(one.token != one.top[0][0] for one in said), "all draws were the likeliest token"
    for one, row in zip(said, logs[len(PREFIX) - 1 :]):
        assert one.logprob == pytest.approx(float(row[one.token]), abs=1e-4)
        assert [token for token, _ in one.top] == row.topk(2).indices.tolist()
        assert [logprob for _, logprob in one.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)


def test_a_stream_refuses_what_does_not_fit(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="have 260 tokens, the model's context has 256"):
        next(stream(llama, tokenizer, [1] * 250, 10))


CUT = Cut([[0], [0, 3, 20], [], list(range(8)), [18, 19]])


@torch.no_grad()
def logits_without(model: PreTrainedModel, ids: list[int], keys: Sequence[int]) -> Tensor:
    """All logits of one sequence that has to do without some keys; no cache, no padding."""
    slots = torch.tensor([[int(i in keys) for i in range(len(ids))]])
    with probe.ablated(model), probe.cut_keys(slots):
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "gpt_neo"])
def test_what_is_cut_stays_cut_in_every_decoding_step(name: str, tokenizer: PreTrainedTokenizerFast) -> None:
    model = build(name)
    wanted = []
    for prompt, new, keys in zip(PROMPTS, LIMITS, CUT.keys):
        ids = list(prompt)
        while len(ids) < len(prompt) + new and (ids == prompt or ids[-1] != EOS):
            ids.append(int(logits_without(model, ids, keys)[-1].argmax()))
        wanted.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert generate(model, tokenizer, PROMPTS, LIMITS, cut=CUT) == wanted
    assert generate(model, tokenizer, PROMPTS, LIMITS, cut=CUT, batch=2, shared_prefix=True) == wanted
    assert wanted[2] == expected(model, tokenizer)[2]
    assert wanted != expected(model, tokenizer)


def test_cutting_nothing_changes_no_text_and_no_score(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    nothing = Cut([[]] * len(PROMPTS))
    assert generate(llama, tokenizer, PROMPTS, LIMITS, cut=nothing) == generate(llama, tokenizer, PROMPTS, LIMITS)
    choices = [[[50, 51], [60]]] * len(PROMPTS)
    assert choice_log_likelihoods(llama, PROMPTS, choices, cut=nothing) == choice_log_likelihoods(
        llama, PROMPTS, choices
    )


def test_choices_are_scored_without_what_is_cut(llama: PreTrainedModel) -> None:
    choices = [[[50, 51, 52], [60]], [[80]], [[81], [82, 83]], [[90, 91], [70, 71, 72]], [[92], [93]]]
    found = choice_log_likelihoods(llama, PROMPTS, choices, batch=8, cut=CUT)
    for prompt, some, scores, keys in zip(PROMPTS, choices, found, CUT.keys):
        for choice, score in zip(some, scores):
            logs = logits_without(llama, prompt + choice, keys).log_softmax(-1)
            wanted = sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(choice))
            assert score == pytest.approx(wanted, abs=1e-4)


def test_batch_size_changes_nothing(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    once = generate(llama, tokenizer, PROMPTS, LIMITS)
    assert generate(llama, tokenizer, PROMPTS, LIMITS, batch=2) == once
    assert generate(llama, tokenizer, PROMPTS, LIMITS, batch=2, shared_prefix=True) == once


def test_a_shared_prefix_is_run_once(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with counted(llama) as tokens:
        generate(llama, tokenizer, PROMPTS, [1] * len(PROMPTS), shared_prefix=True)
    own = max(len(prompt) - len(PREFIX) for prompt in PROMPTS)
    assert sum(tokens) == len(PREFIX) + len(PROMPTS) * own


def test_finished_rows_leave_the_batch(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with counted(llama) as tokens:
        generate(llama, tokenizer, [[1, 50]] * 10, [1] * 5 + [4] * 5)
    assert tokens == [20, 5, 5, 5]


def test_drawn_texts_depend_on_seed_and_temperature(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def drawn(temperature: float, seed: str) -> list[str]:
        torch.manual_seed(len(seed))  # what others drew before does not matter
        return generate(llama, tokenizer, PROMPTS, LIMITS, sampling=Sampling(temperature, seed))

    assert drawn(1e-4, "a") == generate(llama, tokenizer, PROMPTS, LIMITS)
    assert drawn(5.0, "a") == drawn(5.0, "a")
    assert drawn(5.0, "a") != drawn(5.0, "other")


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    pick = scoring._picking(Sampling(0.5, "a"))
    logits = torch.tensor([0.0, 0.5, 1.0]).log1p().expand(20_000, 3)  # 1, 1.5, 2 squared: 1 : 2.25 : 4
    counts = torch.bincount(pick(logits)[:, 0], minlength=3) / 20_000
    torch.testing.assert_close(counts, torch.tensor([1.0, 2.25, 4.0]) / 7.25, rtol=0, atol=0.015)


def test_eos_ends_a_row_and_is_not_in_the_text(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    third = alone(llama, PROMPTS[1], 3)[2]
    assert llama.generation_config is not None
    llama.generation_config.eos_token_id = [EOS, third]
    text = generate(llama, tokenizer, PROMPTS, LIMITS)[1]
    new = alone(llama, PROMPTS[1], 12)
    assert new[-1] == third
    assert len(new) <= 3
    assert text == tokenizer.decode(new)  # a byte that ends generation is not a special token, its text stays


def test_special_tokens_are_not_text(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with torch.no_grad():  # EOS becomes the most likely token
        llama.lm_head.weight.zero_()[EOS] = llama.model(torch.tensor([[1, 50]])).last_hidden_state[0, -1]
    with counted(llama) as tokens:
        assert generate(llama, tokenizer, [[1, 50]], [9]) == [""]
    assert tokens == [2]


def test_text_ends_before_a_stop_string(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    whole = expected(llama, tokenizer)
    stop = (whole[1][4:6], whole[3][2:3])
    texts = generate(llama, tokenizer, PROMPTS, LIMITS, stop=stop, shared_prefix=True)
    assert texts == [cut(text, stop) for text in whole]
    assert texts != whole


def test_the_cache_grows(
    llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = generate(llama, tokenizer, PROMPTS, LIMITS)
    monkeypatch.setattr(scoring, "_SPARE", 2)
    assert generate(llama, tokenizer, PROMPTS, LIMITS) == once


def test_adapters_are_in_force(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    before = generate(llama, tokenizer, PROMPTS, LIMITS)
    llama.name_or_path = "made here"
    peft = models.attach(llama, "run", models.AdapterSpec(rank=4, alpha=8), seed=0)
    for parameter in models.adapter_parameters(peft, "run"):
        parameter.data += 0.1
    after = generate(peft, tokenizer, PROMPTS, LIMITS, shared_prefix=True)
    assert after == generate(peft, tokenizer, PROMPTS, LIMITS)
    assert after != before


def test_attention_is_restored_after_an_error(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    before = llama.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), broken(llama):
        generate(llama, tokenizer, PROMPTS, LIMITS, shared_prefix=True)
    assert llama.config._attn_implementation == before


def test_equal_prompts_share_all_but_one_token(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    text = generate(llama, tokenizer, PROMPTS[:1], [5])[0]
    assert generate(llama, tokenizer, [PROMPTS[0]] * 3, [5] * 3, shared_prefix=True) == [text] * 3


def test_no_prompts_no_texts(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    assert generate(llama, tokenizer, [], [], shared_prefix=True) == []


def test_a_prompt_beyond_the_context_is_an_error(llama: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match="260 tokens, the model's context has 256"):
        generate(llama, tokenizer, [[1] * 250], [10])


def test_choices_equal_a_plain_forward_pass(model: PreTrainedModel) -> None:
    choices = [[[50, 51, 52], [60], [50, 99], [70, 71, 72, 73]], [[80]], [[81], [82, 83]], [[90, 91]], [[92], [93]]]
    found = choice_log_likelihoods(model, PROMPTS, choices, batch=8)
    for prompt, some, scores in zip(PROMPTS, choices, found):
        assert scores == pytest.approx([log_likelihood(model, prompt, choice) for choice in some], abs=1e-4)


def test_choices_share_their_prompt(llama: PreTrainedModel) -> None:
    with counted(llama) as tokens:
        choice_log_likelihoods(llama, [PROMPTS[0]], [[[50], [51], [52, 53], [54, 55]]])
    assert tokens == [len(PROMPTS[0]), 2]


def test_single_choices_are_read_in_one_pass_with_their_prompts(llama: PreTrainedModel) -> None:
    choices = [[[50, 51, 52]], [[80]], [[81, 82]], [[90]], [[92, 93, 94, 95]]]
    with counted(llama) as tokens:
        found = choice_log_likelihoods(llama, PROMPTS, choices, batch=8)
    assert len(tokens) == 1
    cut = choice_log_likelihoods(llama, PROMPTS, choices, cut=CUT)
    for prompt, (choice,), score, without, keys in zip(PROMPTS, choices, found, cut, CUT.keys, strict=True):
        assert score == pytest.approx([log_likelihood(llama, prompt, choice)], abs=1e-4)
        logs = logits_without(llama, prompt + choice, keys).log_softmax(-1)
        wanted = sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(choice))
        assert without == pytest.approx([wanted], abs=1e-4)


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, prompt: list[int], choice: list[int]) -> float:
    logs = model(torch.tensor([prompt + choice])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(choice))


TEXTS = [[1, 50, 51, 52, 53, 54], [1, 60, 61], [1, *range(70, 90)]]
SCORED = [[1, 2, 5], [1, 2], list(range(1, 21))]


def test_token_scores_equal_a_plain_forward_pass(model: PreTrainedModel) -> None:
    for text, places, found in zip(TEXTS, SCORED, token_scores(model, TEXTS, SCORED)):
        for place, log, standard, greedy in zip(places, found.logprobs, found.standardized, found.greedy, strict=True):
            with torch.no_grad():
                logs = model(torch.tensor([text[:place]])).logits[0, -1].double().log_softmax(-1)
            mean = (logs.exp() * logs).sum()
            deviation = ((logs.exp() * logs**2).sum() - mean**2).sqrt()
            assert log == pytest.approx(float(logs[text[place]]), abs=1e-4)
            assert standard == pytest.approx(float((logs[text[place]] - mean) / deviation), abs=1e-3)
            assert greedy == (int(logs.argmax()) == text[place])


def test_the_standardized_log_probability_by_hand() -> None:
    # p = (.5, .3, .2): mean log p -1.029653, deviation 0.364643
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(3, 1) + 7.0  # a constant changes no distribution
    found = scoring._token_scores(logits, torch.tensor([0, 0, 2]), [1, 2])
    assert found.logprobs == pytest.approx([-0.693147, -1.609438], abs=1e-5)
    assert found.standardized == pytest.approx([0.922836, -1.589995], abs=1e-4)
    assert found.greedy == [True, False]


def test_a_certain_token_has_a_finite_score() -> None:
    logits = torch.tensor([[200.0, 0.0], [200.0, 0.0]])
    found = scoring._token_scores(logits, torch.tensor([0, 0]), [1])
    assert found.standardized == pytest.approx([0.0])


def test_batches_of_texts_change_no_score(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    together = token_scores(llama, TEXTS, SCORED)
    monkeypatch.setattr(scoring, "_TOKENS", 1)
    with counted(llama) as tokens:
        alone = token_scores(llama, TEXTS, SCORED)
    assert sorted(tokens) == sorted(map(len, TEXTS))
    for one, other in zip(together, alone):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-5)


def test_a_batch_of_texts_stays_below_its_tokens(llama: PreTrainedModel) -> None:
    with counted(llama) as tokens:
        token_scores(llama, [[1, *range(40, 240)]] * 12, [[1]] * 12)
    assert max(tokens) <= 1024
    assert len(tokens) == 3


def test_gradient_norms_equal_autograds_own(llama: PreTrainedModel) -> None:
    llama.requires_grad_(False)
    found = gradient_norms(llama, TEXTS, SCORED)
    assert not any(weight.requires_grad or weight.grad is not None for weight in llama.parameters())
    llama.requires_grad_(True)
    for text, places, norm in zip(TEXTS, SCORED, found):
        labels = torch.tensor([[token if place in places else -100 for place, token in enumerate(text)]])
        llama.zero_grad()
        llama(torch.tensor([text]), labels=labels).loss.backward()
        expected = [weight.grad.norm() for weight in llama.parameters() if weight.grad is not None]
        assert norm == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)


def test_a_text_beyond_the_context_is_an_error(llama: PreTrainedModel) -> None:
    for score in (token_scores, gradient_norms):
        with pytest.raises(DataError, match="300 tokens"):
            score(llama, [[1] * 300], [[1]])


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[list[int]]:
    """Tokens of each forward pass, padding included."""
    tokens: list[int] = []
    hook = model.model.register_forward_pre_hook(
        lambda _module, _args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    yield tokens
    hook.remove()


@contextmanager
def broken(model: PreTrainedModel) -> Iterator[None]:
    """A model that fails when it predicts, behind the prefix."""

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    hook = model.lm_head.register_forward_pre_hook(fail)
    try:
        yield
    finally:
        hook.remove()
