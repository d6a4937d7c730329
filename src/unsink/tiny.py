"""A 2-layer Llama with its own tokenizer, made on the spot in seconds: the same pipeline without a download.

It has read a few hundred toy sentences, not the corpus itself, so it knows the words and none of the facts.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unsink import artifacts
from unsink.benchmarks import tiny as corpus
from unsink.cache import make_once
from unsink.progress import SILENT, Reporter

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from torch import Tensor
    from transformers import LlamaForCausalLM

RECIPE: dict[str, Any] = {
    "version": 1,  # raise when the code below changes the weights
    "corpus": corpus.VERSION,
    "vocab_size": 1024,  # at most
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.125,  # 1 / sqrt(hidden_size): smaller embeddings, once frozen, cannot give sharp predictions
    "seed": 7,
    "texts": 400,
    "steps": 120,
    "batch": 16,
    "lr": 5e-3,
}
_SPECIAL = ("<pad>", "<bos>", "<eos>")


def tiny_model(reporter: Reporter = SILENT) -> Path:
    """The folder of the tiny model, made on the first call."""
    recipe = hashlib.sha256(json.dumps(RECIPE, sort_keys=True).encode()).hexdigest()
    return make_once(f"models/tiny-{recipe[:12]}", lambda folder: _make(folder, reporter), reporter)


def _make(folder: Path, reporter: Reporter) -> None:
    from transformers import PreTrainedTokenizerFast

    texts = corpus.style_sample(RECIPE["texts"], RECIPE["seed"])
    pad, bos, eos = _SPECIAL
    tokenizer = _tokenizer(texts)
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos
    )
    model = _train([tokenizer.encode(text).ids for text in texts], tokenizer.get_vocab_size(), reporter)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}  # tied
    artifacts.write_tensors(folder / "model.safetensors", state)
    model.config.save_pretrained(folder)
    fast.save_pretrained(folder)


def _tokenizer(texts: list[str]) -> "Tokenizer":
    """Byte-level BPE: it encodes any text, and the toy words mostly as one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocab_size"],
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _train(sequences: list[list[int]], vocabulary: int, reporter: Reporter) -> "LlamaForCausalLM":
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {name: RECIPE[name] for name in LlamaConfig().to_dict() if name in RECIPE} | {"vocab_size": vocabulary}
    special: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True}
    config = LlamaConfig(**shape, **special, architectures=["LlamaForCausalLM"], dtype="float32")
    with _one_thread(), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(RECIPE["seed"])
        model = LlamaForCausalLM(config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], weight_decay=0.0)
        with reporter.task("making the tiny model", RECIPE["steps"]) as advance:
            for step in range(RECIPE["steps"]):
                for group in optimizer.param_groups:
                    group["lr"] = RECIPE["lr"] * (1 - step / RECIPE["steps"])
                ids = _batch(sequences)
                loss = model(input_ids=ids, attention_mask=(ids != 0).long(), labels=ids.where(ids != 0, -100)).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                advance(note=f"loss {loss.item():.2f}")
    return model


def _batch(sequences: list[list[int]]) -> "Tensor":
    """(B, T) random sequences, BOS first, padded with 0 on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    picks = torch.randint(len(sequences), (RECIPE["batch"],)).tolist()
    return pad_sequence([torch.tensor([1, *sequences[pick]]) for pick in picks], batch_first=True)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More threads add up in another order, and give other bytes."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
