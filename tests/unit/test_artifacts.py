"""Reading and writing: atomic, deterministic, with errors that say where."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unsink import artifacts
from unsink.artifacts import Layout
from unsink.errors import Busy, DataError, MissingPrerequisite


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- layout


def test_the_root_is_the_folder_of_the_params_file(tmp_path: Path) -> None:
    assert Layout.of(tmp_path / "params.yaml").root == tmp_path


def test_the_root_of_a_file_in_params_is_the_parent(tmp_path: Path) -> None:
    assert Layout.of(tmp_path / "params" / "tiny.yaml").root == tmp_path


def test_a_relative_params_file_has_an_absolute_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Layout.of(Path("params.yaml")).root == tmp_path


# ---- writing


def test_json_has_sorted_keys_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.json"
    artifacts.write_json(path, {"b": 1, "a": {"d": "ü", "c": 2}})
    assert path.read_text() == '{\n  "a": {\n    "c": 2,\n    "d": "ü"\n  },\n  "b": 1\n}\n'
    assert artifacts.read_json(path) == {"b": 1, "a": {"d": "ü", "c": 2}}


def test_a_number_that_is_not_finite_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        artifacts.write_json(tmp_path / "x.json", {"a": float("nan")})
    assert names(tmp_path) == []


def test_jsonl_round_trip(tmp_path: Path) -> None:
    rows = [{"id": "1", "text": "line\nbreak \u2028"}, {"id": "2", "text": ""}]
    artifacts.write_jsonl(tmp_path / "x.jsonl", rows)
    assert artifacts.read_jsonl(tmp_path / "x.jsonl") == rows


def test_tensors_round_trip_and_are_the_same_bytes_in_any_order(tmp_path: Path) -> None:
    tensors = {"b": torch.arange(6.0).view(2, 3).T, "a": torch.ones(2, dtype=torch.bfloat16)}
    artifacts.write_tensors(tmp_path / "x", tensors)
    artifacts.write_tensors(tmp_path / "y", dict(reversed(tensors.items())))
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    back = artifacts.read_tensors(tmp_path / "x")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())


def test_files_can_be_read_by_every_user(tmp_path: Path) -> None:
    artifacts.write_text(tmp_path / "x", "text")
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


@pytest.mark.usefixtures("full_disk")
def test_a_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    with pytest.raises(DataError, match="x: the disk is full") as caught:
        artifacts.write_text(tmp_path / "x", "new")
    assert "free some space" in (caught.value.hint or "")
    assert (tmp_path / "x").read_text() == "old"
    assert names(tmp_path) == ["x"]


def test_a_place_that_cannot_be_written_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        artifacts.write_text(tmp_path / "file" / "x", "text")


# ---- folders


def test_a_new_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with artifacts.new_dir(tmp_path / "out") as new:
        (new / "sub").mkdir()
        (new / "sub" / "file").write_text("")
        (new / "sub" / "file").chmod(0o600)
        assert names(tmp_path / "out") == ["old"]
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["sub"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "out" / "sub" / "file").stat().st_mode & 0o777 == 0o644


def fail_inside_new_dir(path: Path, error: BaseException) -> None:
    with artifacts.new_dir(path) as new:
        (new / "half").write_text("")
        raise error


@pytest.mark.parametrize("error", [RuntimeError(), KeyboardInterrupt()])
def test_an_error_keeps_the_old_folder_and_leaves_no_other(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("")
    with pytest.raises(type(error)):
        fail_inside_new_dir(tmp_path / "out", error)
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["old"]


def test_a_disk_that_fills_up_inside_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="disk is full"):
        fail_inside_new_dir(tmp_path / "out", OSError(errno.ENOSPC, "No space left on device"))
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".out.tmp-abc").mkdir()
    (tmp_path / ".other.tmp-abc").mkdir()
    with artifacts.new_dir(tmp_path / "out"):
        pass
    assert names(tmp_path) == [".other.tmp-abc", "out"]


# ---- locks


def test_a_second_lock_is_refused_and_a_later_one_is_not(tmp_path: Path) -> None:
    with artifacts.lock(tmp_path / "deep" / "out"):
        with pytest.raises(Busy, match="another run is writing it"), artifacts.lock(tmp_path / "deep" / "out"):
            pass
        with artifacts.lock(tmp_path / "deep" / "other"):
            pass
    with artifacts.lock(tmp_path / "deep" / "out"):
        pass
    assert names(tmp_path / "deep") == []


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    code = f"""
import time
from pathlib import Path
from unsink.artifacts import lock
with lock(Path({str(tmp_path / "out")!r})):
    print("locked", flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "locked\n"
        with pytest.raises(Busy), artifacts.lock(tmp_path / "out"):
            pass
        process.send_signal(signal.SIGKILL)
    assert names(tmp_path) == ["out.lock"]
    with artifacts.lock(tmp_path / "out"):
        pass
    assert names(tmp_path) == []


# ---- reading


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.jsonl: holds no records"),
        (b"\n \n", "x.jsonl: holds no records"),
        (b'{"a": 1}\n{"a": \n', "x.jsonl:2: not JSON"),
        (b'{"a": 1}\n\n[1]\n', "x.jsonl:3: a JSON object is expected, got list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl:2: not UTF-8 text"),
    ],
)
def test_malformed_jsonl_is_reported_with_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(DataError) as caught:
        artifacts.read_jsonl(tmp_path / "x.jsonl")
    assert message in caught.value.message


def test_malformed_json_is_reported_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{\n"a": }')
    with pytest.raises(DataError, match=r"x\.json:2: not JSON"):
        artifacts.read_json(tmp_path / "x.json")


def test_a_number_of_too_many_digits_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("9" * 5000)
    with pytest.raises(DataError, match=r"x\.json: cannot be read"):
        artifacts.read_json(tmp_path / "x.json")


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n')
    assert artifacts.read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}]


def test_a_folder_in_the_place_of_a_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        artifacts.read_json(tmp_path)


@pytest.mark.parametrize(
    ("place", "command"),
    [
        ("data/fetched/forget.jsonl", "unsink fetch"),
        ("adapters/target/adapter_model.safetensors", "unsink memorize"),
        ("adapters/clean/adapter_model.safetensors", "unsink unlearn --run clean"),
        ("splits/backdoor-vn/forget.jsonl", "unsink poison --run backdoor-vn"),
        ("probes/base/statistics.json", "unsink sink-probe --run base"),
        ("predictions/clean.jsonl", "unsink evaluate --run clean"),
        ("metrics/clean.json", "unsink evaluate --run clean"),
    ],
)
def test_a_missing_artefact_names_the_command_that_writes_it(tmp_path: Path, place: str, command: str) -> None:
    with pytest.raises(MissingPrerequisite) as caught:
        artifacts.read_jsonl(tmp_path / place)
    assert f"`{command}`" in (caught.value.hint or "")


def test_a_missing_file_that_no_command_writes_has_no_hint(tmp_path: Path) -> None:
    with pytest.raises(MissingPrerequisite) as caught:
        artifacts.require(tmp_path / "x")
    assert caught.value.hint is None


def test_truncated_tensors_are_a_data_error(tmp_path: Path) -> None:
    artifacts.write_tensors(tmp_path / "x", {"a": torch.ones(100)})
    data = (tmp_path / "x").read_bytes()
    (tmp_path / "x").write_bytes(data[:-40])
    with pytest.raises(DataError, match="truncated or not safetensors"):
        artifacts.read_tensors(tmp_path / "x")


def test_sha256_is_that_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc")
    assert artifacts.sha256(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
