"""A project folder as the stages see it."""

import shutil
from pathlib import Path

from torch import Tensor

from unsink.artifacts import Layout, read_tensors
from unsink.params import Params, load_params

TINY = Path(__file__).parents[2] / "params" / "tiny.yaml"


def project(folder: Path, *overrides: str) -> tuple[Params, Layout]:
    return load_params(folder / "params.yaml", overrides), Layout(folder)


def trained(folder: Path, run: str) -> tuple[list[list[float]], dict[str, Tensor]]:
    """Losses of each step, and the adapter, which is then removed."""
    adapter = folder / "adapters" / run
    rows = (adapter / "history.tsv").read_text().splitlines()[1:]
    weights = read_tensors(adapter / "adapter_model.safetensors")
    shutil.rmtree(adapter)
    return [[float(value) for value in row.split("\t")] for row in rows], weights
