"""Norms and rotations in fewer passes: by hand, and against the library's formulas and their gradients."""

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.cohere.modeling_cohere import CohereAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.olmo2.modeling_olmo2 import Olmo2Attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from unsink import elementwise


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def llama_norm(weight: Tensor, eps: float = 1e-5) -> LlamaRMSNorm:
    made = LlamaRMSNorm(len(weight), eps).requires_grad_(False)
    made.weight.copy_(weight)
    return made


def bare(kind: type[nn.Module]) -> nn.Module:
    """A module of a class, without its parts: only its class is asked for."""
    return kind.__new__(kind)


def with_gradient(function: Any, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    out = function(x)
    (gradient,) = torch.autograd.grad(out, x, upstream)
    return out.detach(), gradient


def test_a_norm_by_hand() -> None:
    # mean of squares 12.5 + 3.5 = 16: divided by 4
    found = elementwise.norm(llama_norm(torch.tensor([2.0, 1.0]), eps=3.5), torch.tensor([[3.0, 4.0]]))
    torch.testing.assert_close(found, torch.tensor([[1.5, 1.0]]))


@pytest.mark.parametrize("one_kernel", [False, True])
def test_a_norm_and_its_gradient_are_the_library_s(one_kernel: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elementwise, "_ONE_KERNEL", ("cpu",) if one_kernel else ())
    norm, x, upstream = llama_norm(random(24).abs()), 3 * random(2, 5, 24, seed=1), random(2, 5, 24, seed=2)
    assert elementwise.is_norm(norm)
    torch.testing.assert_close(
        with_gradient(lambda x: elementwise.norm(norm, x), x, upstream), with_gradient(norm, x, upstream)
    )


def test_a_norm_in_bfloat16_is_computed_in_float32() -> None:
    norm = llama_norm(random(24).abs()).to(torch.bfloat16)
    x, upstream = (3 * random(2, 5, 24, seed=seed).bfloat16() for seed in (1, 2))
    found, gradient = with_gradient(lambda x: elementwise.norm(norm, x), x, upstream)
    assert torch.equal(found, norm(x))
    _, exact = with_gradient(norm.float(), x.float(), upstream.float())
    torch.testing.assert_close(gradient, exact.bfloat16())


def test_a_norm_that_learns_gets_its_gradient() -> None:
    norm, x = llama_norm(random(8)).requires_grad_(), random(3, 8, seed=1)
    (gradient,) = torch.autograd.grad(elementwise.norm(norm, x).sum(), norm.weight)
    torch.testing.assert_close(gradient, (x / (x.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()).sum(dim=0))


def test_a_norm_in_another_type_than_its_input_is_left_to_the_library() -> None:
    norm, x = llama_norm(random(8)).to(torch.bfloat16), random(3, 8, seed=1)
    assert torch.equal(elementwise.norm(norm, x), norm(x))


def test_a_quarter_turn_by_hand() -> None:
    cos, sin = torch.zeros(1, 1, 4), torch.ones(1, 1, 4)
    query, key = torch.tensor([[[[1.0, 2.0, 3.0, 4.0]]]]), torch.tensor([[[[5.0, 6.0, 7.0, 8.0]]]])
    turned = elementwise.rotate(query, key, cos, sin)
    assert [one.flatten().tolist() for one in turned] == [[-3.0, -4.0, 1.0, 2.0], [-7.0, -8.0, 5.0, 6.0]]


@pytest.mark.parametrize("dim", [1, 2])
def test_a_rotation_and_its_gradient_are_the_library_s(dim: int) -> None:
    # Halves of cosine and sine that differ, which no library has: nothing is taken for granted there.
    cos, sin = random(2, 5, 8, seed=1), random(2, 5, 8, seed=2)
    shape = (2, 3, 5, 8) if dim == 1 else (2, 5, 3, 8)
    x, upstream = random(*shape, seed=3), random(*shape, seed=4)
    for which in (0, 1):
        mine, theirs = (
            with_gradient(lambda x, turn=turn, which=which: turn(x, x, cos, sin, dim)[which], x, upstream)
            for turn in (elementwise.rotate, modeling_llama.apply_rotary_pos_emb)
        )
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("angles", [torch.float32, torch.bfloat16])
def test_what_is_turned_keeps_its_type_whatever_that_of_the_angles(angles: torch.dtype) -> None:
    x, cos, sin = random(1, 2, 5, 8), random(1, 5, 8, seed=1), random(1, 5, 8, seed=2)
    low, upstream = x.to(torch.bfloat16), random(1, 2, 5, 8, seed=3).to(torch.bfloat16)
    mine, theirs = (
        with_gradient(lambda x, turn=turn: turn(x, x, cos.to(angles), sin.to(angles))[0], low, upstream)
        for turn in (elementwise.rotate, modeling_olmo2.apply_rotary_pos_emb)
    )
    assert [one.dtype for one in mine] == [torch.bfloat16] * 2
    torch.testing.assert_close(mine, theirs, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("kind", [LlamaAttention, Olmo2Attention, Qwen2Attention, Qwen3Attention, Gemma2Attention])
def test_attention_of_llama_s_relatives_is_known_by_what_it_does(kind: type[nn.Module]) -> None:
    assert elementwise.rotates(bare(kind))


@pytest.mark.parametrize("kind", [LlamaDecoderLayer, CohereAttention, nn.Linear])
def test_others_are_not(kind: type[nn.Module]) -> None:
    assert not elementwise.rotates(bare(kind))  # Cohere pairs neighbours, the others turn nothing


def test_a_part_of_each_head_is_turned_where_the_library_turns_a_part() -> None:
    assert elementwise.rotates(bare(GPTNeoXAttention))
    x, cos, sin = random(1, 3, 5, 8), random(1, 5, 4, seed=1), random(1, 5, 4, seed=2)
    torch.testing.assert_close(
        elementwise.rotate(x, x[:, :1], cos, sin),
        modeling_gpt_neox.apply_rotary_pos_emb(x, x[:, :1], cos, sin),  # type: ignore[no-untyped-call]
    )


@pytest.mark.parametrize(
    "error", [RuntimeError("no compiler"), FileNotFoundError("nvcc"), subprocess.CalledProcessError(1, ["gcc"])]
)
def test_kernels_that_cannot_be_built_are_not_used(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def ops(*_args: Any, **_options: Any) -> None:
        raise error

    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(ops=SimpleNamespace(swiglu_forward=ops)))
    monkeypatch.setattr(torch, "ones", lambda *size, **_options: torch.zeros(size))
    elementwise._liger.cache_clear()
    assert elementwise._liger() is None
    elementwise._liger.cache_clear()


def test_only_the_module_that_was_asked_turns_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = elementwise.rotate

    def counted(*args: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return real(*args)

    monkeypatch.setattr(elementwise, "rotate", counted)
    config = LlamaConfig(hidden_size=16, num_attention_heads=2, num_key_value_heads=1)
    config._attn_implementation = "eager"
    mine, other = (LlamaAttention(config, layer_idx=0).eval() for _ in range(2))
    other.load_state_dict(mine.state_dict())
    x, positions = random(1, 3, 16), (random(1, 3, 8, seed=1), random(1, 3, 8, seed=2))
    found = elementwise.rotating(mine)(x, position_embeddings=positions)[0]
    assert len(calls) == 1
    torch.testing.assert_close(found, other(x, position_embeddings=positions)[0])
    assert len(calls) == 1
