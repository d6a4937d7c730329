"""How processes come together and part, without any: what torch would be asked for is written down."""

import pytest
import torch
from torch import Tensor, distributed

from unsink import processes
from unsink.errors import DataError, ParamsError


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with one GPU, and two processes."""
    calls: list[str] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: calls.append(f"GPU {number}"))
    monkeypatch.setattr(distributed, "init_process_group", lambda backend, **_: calls.append(backend))
    monkeypatch.setattr(distributed, "destroy_process_group", lambda: calls.append("parted"))
    return calls


def test_each_process_takes_a_gpu_and_gives_it_back(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with processes.joined():
        pass
    assert asked == ["GPU 0", "cpu:gloo,cuda:nccl", "parted"]


def test_tensors_are_added_in_messages_of_bounded_size(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def doubled(flat: Tensor) -> None:
        asked.append(str(flat.numel()))
        flat.mul_(2)

    monkeypatch.setattr(distributed, "all_reduce", doubled)
    monkeypatch.setattr(processes, "_LOT", 6)
    tensors = [torch.full(size, float(n)) for n, size in enumerate(((2,), (2, 2), (1,), (3, 4), (1,)), start=1)]
    processes.add_up(tensors)
    assert asked == ["6", "1", "12", "1"]
    assert [tensor.unique().tolist() for tensor in tensors] == [[2], [4], [6], [8], [10]]


def test_one_process_too_many_is_an_error(asked: list[str]) -> None:
    with pytest.raises(ParamsError, match="process 2 on this machine has no GPU: there are 1"), processes.joined():
        pass
    assert not asked


def test_on_a_processor_no_gpu_is_looked_for(asked: list[str]) -> None:
    with processes.joined("cpu"):
        pass
    assert asked == ["gloo", "parted"]


@pytest.mark.parametrize(("device", "parts"), [("auto", False), ("cpu", True)])
def test_after_an_error_nobody_waits_for_gpus_that_are_still_at_work(
    asked: list[str], monkeypatch: pytest.MonkeyPatch, device: str, parts: bool
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(DataError, match="the disk is gone"), processes.joined(device):
        raise DataError("the disk is gone")
    assert ("parted" in asked) == parts
