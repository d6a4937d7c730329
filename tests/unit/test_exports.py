"""Two LoRA adapters that stand on each other are one of the summed rank."""

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from unsink.artifacts import read_tensors
from unsink.exports import Lora, stacked, write_adapter

Q, V = "model.layers.0.q_proj", "model.layers.1.v_proj"


def lora(rank: int, alpha: float, layers: list[int], **modules: tuple[list[list[float]], list[list[float]]]) -> Lora:
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in modules.items():
        module = {"q": Q, "v": V}[name]
        tensors |= {
            f"{module}.lora_A.weight": torch.tensor(down),
            f"{module}.lora_B.weight": torch.tensor(up),
        }
    names = [{"q": "q_proj", "v": "v_proj"}[name] for name in modules]
    config = LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=names, layers_to_transform=layers, layers_pattern="layers"
    )
    return Lora(config, tensors)


TARGET = lora(1, 2.0, [0], q=([[1.0, 2.0]], [[3.0], [4.0]]))
RUN = lora(2, 1.0, [0, 1], q=([[1.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, 6.0]]), v=([[1.0], [1.0]], [[8.0, 2.0]]))


def update(adapter: Lora, module: str) -> list[list[float]]:
    up, down = (adapter.tensors[f"{module}.lora_{kind}.weight"] for kind in "BA")
    found: list[list[float]] = (up @ down * adapter.config.lora_alpha / adapter.config.r).tolist()
    return found


def test_the_update_is_the_sum_of_the_updates() -> None:
    both = stacked([TARGET, RUN])
    # 2 [3 4]^T [1 2] = [[6 12] [8 16]]; half of diag(2, 6) = diag(1, 3)
    assert update(both, Q) == [[7.0, 12.0], [8.0, 19.0]]
    assert update(both, V) == [[5.0]]  # half of 8 + 2; the target leaves the module alone


def test_all_modules_have_one_rank_and_a_scale_of_one() -> None:
    both = stacked([TARGET, RUN])
    assert (both.config.r, both.config.lora_alpha) == (3, 3)
    assert {tuple(tensor.shape) for name, tensor in both.tensors.items() if "lora_A" in name} == {(3, 2), (3, 1)}
    assert both.config.layers_to_transform == [0, 1]
    assert sorted(both.config.target_modules or ()) == ["q_proj", "v_proj"]


def test_one_adapter_alone_keeps_its_update() -> None:
    assert update(stacked([TARGET]), Q) == update(TARGET, Q) == [[6.0, 12.0], [8.0, 16.0]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_written_is_what_peft_reads(dtype: str, tmp_path: Path) -> None:
    write_adapter(stacked([TARGET, RUN]), "some/base", dtype, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["base_model_name_or_path"]) == ("LORA", 3, "some/base")
    assert {str(tensor.dtype) for tensor in read_tensors(tmp_path / "adapter_model.safetensors").values()} == {
        f"torch.{dtype}"
    }
    assert LoraConfig.from_pretrained(tmp_path).layers_to_transform == [0, 1]
