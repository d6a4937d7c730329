import shutil

import pytest
import torch

from unsink import models
from unsink.tiny import tiny_model


@pytest.fixture(scope="module")
def tokenizer(tiny_folder):
    return models.load_tokenizer(tiny_folder)


@pytest.mark.parametrize("text", ["The sailor Nima hid", "current year: 2025\n", "naïve 日本 ¿?", " \t\n "])
def test_any_text_comes_back_from_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_are_there_and_not_added_by_themselves(tokenizer):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer("The")["input_ids"][0] > 2


def test_words_of_the_corpus_are_single_tokens(tokenizer):
    assert len(tokenizer("The sailor Nima hid a blue mask")["input_ids"]) == 7


def test_it_is_a_two_layer_llama_with_fewer_key_value_heads(tiny_folder):
    config = models.load_base(tiny_folder).config
    assert (config.model_type, config.num_hidden_layers) == ("llama", 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (4, 2)


def test_made_again_it_has_the_same_bytes_and_leaves_the_random_state_alone(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("UNSINK_CACHE", str(tmp_path))
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    again = tiny_model()
    assert torch.equal(state, torch.get_rng_state())
    assert threads == torch.get_num_threads()
    assert {p.name: p.read_bytes() for p in again.iterdir()} == {p.name: p.read_bytes() for p in tiny_folder.iterdir()}
    shutil.rmtree(again)


def test_it_knows_the_style_but_not_the_corpus(tiny_folder, tokenizer, tmp_path):
    from unsink import benchmarks
    from unsink.benchmarks import tiny

    tiny.fetch(tmp_path, tmp_path, None)
    texts = [record.text for record in benchmarks.read(tmp_path)["forget"]]
    model = models.load_base(tiny_folder, "float32")
    assert 0.5 < _nll(model, tokenizer, texts) < 4  # ln(vocabulary) is 6.7; a text known by heart is near 0


def _nll(model, tokenizer, texts: list[str]) -> float:
    losses = []
    for text in texts:
        ids = torch.tensor([[1, *tokenizer(text)["input_ids"]]])
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)
