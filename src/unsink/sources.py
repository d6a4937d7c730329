"""Where a model's files are: made on the spot, downloaded, or in a local folder. Only safetensors, never code."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unsink.embedded import fetch_embedded
from unsink.errors import ModelError
from unsink.progress import SILENT, Reporter
from unsink.registry import suggest
from unsink.tiny import tiny_model

_WANTED = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]  # never pickles or code
_INDEX = "model.safetensors.index.json"
_SOURCES = "give a folder, a Hugging Face id, 'embedded' or 'tiny'"


def resolve(source: str, revision: str | None = None, reporter: Reporter = SILENT, key: str = "model.source") -> Path:
    """The local folder of a model, made or downloaded first if need be.

    Args:
        source: "embedded", "tiny", a local folder, or a Hugging Face id.
        revision: branch, tag or commit of a Hugging Face model.
        reporter: told about downloads.
        key: the parameter that names the model, for errors.

    Raises:
        ModelError: no such model, gated, offline, no weights or broken ones.
    """
    if source == "embedded":
        return fetch_embedded(reporter)
    if source == "tiny":
        return tiny_model(reporter)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        if source.startswith(("/", ".", "~")) or source.count("/") > 1:
            raise ModelError(f"{key}: no such folder: {source}", _SOURCES)
        folder = _download(source, revision, reporter, key)
    check_folder(folder, key)
    return folder


def _download(repo: str, revision: str | None, reporter: Reporter, key: str) -> Path:
    reporter.log(f"looking for {repo} in the local Hugging Face cache and on the hub")
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_WANTED))
    # LocalEntryNotFoundError: not in the cache, and the hub is offline or out of reach. ValueError, OSError: bad
    # replies, no network, disk full. Which of them it is, their text says.
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise _hub_error(repo, revision, error, key) from error


def _hub_error(repo: str, revision: str | None, error: Exception, key: str) -> ModelError:
    where, typo = f"{key}: {repo}", suggest(repo, ("embedded", "tiny"))
    if isinstance(error, GatedRepoError):
        return ModelError(
            f"{where} is gated, and this account has no access",
            f"accept its terms on https://huggingface.co/{repo}, then `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, RevisionNotFoundError):
        return ModelError(
            f"{where} has no revision {revision!r}",
            f"set {key.partition('.source')[0]}.revision to a branch, tag or commit",
        )
    if isinstance(error, (RepositoryNotFoundError, HFValidationError)):
        return ModelError(
            f"{where} is neither a folder here nor a public Hugging Face model{typo}",
            f"check the spelling; for a private model `hf auth login` or set HF_TOKEN; or {_SOURCES}",
        )
    reason = str(error).strip().split("\n")[0]
    return ModelError(
        f"{where} is not in the local cache and cannot be downloaded: {reason}{typo}",
        "connect once, then it stays cached (unset HF_HUB_OFFLINE); or copy its files to a folder and name that",
    )


def check_folder(folder: Path, key: str = "model.source") -> None:
    """Check that a folder holds a whole model in safetensors; reads headers only. `key` names it in errors.

    Raises:
        ModelError: no config, no safetensors, a file missing or cut short.
    """
    if not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        what = "holds a LoRA adapter, not a model" if is_adapter else "holds no config.json"
        raise ModelError(f"{key}: {folder} {what}", "give the folder of a model in the Hugging Face format")
    for path in weight_files(folder, key):
        check_weights(path)


def weight_files(folder: Path, key: str = "model.source") -> list[Path]:
    """The safetensors files of a model, by name. `key` names it in errors.

    Raises:
        ModelError: there is none, or one that the index names is missing.
    """
    names = ["model.safetensors"]
    if (folder / _INDEX).is_file():
        listed = read_config(folder / _INDEX)
        if not isinstance(listed, dict) or not isinstance(listed.get("weight_map"), dict):
            raise ModelError(f"{folder / _INDEX}: no weight_map in it", "download the model again")
        names = sorted(set(map(str, listed["weight_map"].values())))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        found = f"; {pickles} is not read: pickles can run code" if pickles else ""
        raise ModelError(
            f"{key}: no {', '.join(missing)} in {folder}{found}",
            "download the model again, or convert it to safetensors",
        )
    return [folder / name for name in names]


def model_files(folder: Path) -> list[Path]:
    """All files of a model that a load reads: weights, configs, tokenizer; by name."""
    others = {path for pattern in _WANTED[1:] for path in folder.glob(pattern) if not path.name.startswith(".")}
    return sorted({*weight_files(folder), *others})


def check_weights(path: Path) -> None:
    """Compare a safetensors file's size with what its header promises.

    Raises:
        ModelError: it is cut short, damaged, or a Git LFS pointer.
    """
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        size = path.stat().st_size
        header = file.read(length) if 8 + length <= size else b""
    if start == b"version ":
        raise ModelError(f"{path} is a Git LFS pointer, not the weights", "run `git lfs pull` in that folder")
    if _promised_size(header) != size:
        raise ModelError(f"{path} is cut short or damaged: {size} bytes", "download or make it again")


def _promised_size(header: bytes) -> int | None:
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        return 8 + len(header) + max((int(entry["data_offsets"][1]) for entry in entries.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return None


def read_config(path: Path) -> Any:
    """Read a model's or adapter's JSON file.

    Raises:
        ModelError: it is not there or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}", "download or make it again") from error
