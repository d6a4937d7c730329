"""Model folders that are whole, and every way in which they are not."""

import json
import shutil

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from unsink import sources
from unsink.errors import ModelError


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def test_a_local_folder_is_taken_as_it_is(folder):
    assert sources.resolve(str(folder)) == folder


@pytest.mark.parametrize("source", ["/no/such/folder", "./here", "~/nowhere", "a/b/c"])
def test_a_missing_folder_is_named(source):
    with pytest.raises(ModelError, match="no such folder"):
        sources.resolve(source)


def test_offline_the_error_says_how_to_go_on():
    with pytest.raises(ModelError, match="not in the local cache") as error:
        sources.resolve("someone/some-model")
    assert "copy its files to a folder" in error.value.hint


def test_a_misspelt_name_is_recognised():
    with pytest.raises(ModelError, match="did you mean 'embedded'"):
        sources.resolve("embeded")


@pytest.mark.parametrize(
    ("kind", "message", "hint"),
    [
        (GatedRepoError, "is gated", "hf auth login"),
        (RepositoryNotFoundError, "neither a folder here nor a public", "check the spelling"),
        (RevisionNotFoundError, "no revision 'v9'", "model.revision"),
        (LocalEntryNotFoundError, "cannot be downloaded", "copy its files"),
    ],
)
def test_answers_of_the_hub_are_explained(monkeypatch, kind, message, hint):
    def refuse(*_args, **_kwargs):
        raise kind.__new__(kind, "no")

    monkeypatch.setattr(sources, "snapshot_download", refuse)
    with pytest.raises(ModelError, match=message) as error:
        sources.resolve("someone/some-model", "v9")
    assert hint in error.value.hint


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        sources.resolve(str(tmp_path))


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="LoRA adapter, not a model"):
        sources.resolve(str(tmp_path))


def test_pickled_weights_are_never_read(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is not read"):
        sources.resolve(str(folder))


@pytest.mark.parametrize("kept", [0, 4, 100, 100_000])
def test_truncated_weights_are_refused(folder, kept):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:kept])
    with pytest.raises(ModelError, match="cut short or damaged"):
        sources.resolve(str(folder))


def test_a_git_lfs_pointer_is_recognised(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(ModelError, match="Git LFS"):
        sources.resolve(str(folder))


def test_a_missing_shard_is_named(folder):
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"no model-00002-of-00002\.safetensors"):
        sources.resolve(str(folder))


def test_a_damaged_index_is_named_and_so_is_the_option(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ModelError, match="no weight_map in it"):
        sources.resolve(str(folder))
    (folder / "model.safetensors.index.json").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"--original: no model\.safetensors"):
        sources.resolve(str(folder), key="--original")


def test_the_files_of_a_model_are_weights_config_and_tokenizer(tiny_folder):
    assert [path.name for path in sources.model_files(tiny_folder)] == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
