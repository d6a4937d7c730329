"""What is kept in files is what was said, whoever asks for it; and nothing else is taken for it."""

import re
from pathlib import Path

import pytest
import torch

from unsink import kept
from unsink.batches import Sample
from unsink.errors import DataError, ParamsError
from unsink.kept import Lot, Said, Shelf

BATCH = (Sample("a", "forget", (1, 2, 3)), Sample("b", "retain", (1, 4), labels_from=2))


def said(lot: Lot, dtype: torch.dtype = torch.float32, width: int = 4) -> list[Said]:
    draw = torch.Generator().manual_seed(len(lot))
    return [
        {
            "below": torch.randn(len(sample.ids), width, generator=draw).to(dtype),
            "states": torch.randn(len(sample.ids) - sample.labels_from, width, generator=draw).to(dtype),
            "nll": torch.randn(len(sample.ids) - sample.labels_from, generator=draw),
            "values/3": torch.randn(len(sample.ids), 1, generator=draw),
        }
        for sample in lot
    ]


def unasked(_: Lot) -> list[Said]:
    raise AssertionError("asked although a file is there")


def same(one: Said, two: Said) -> bool:
    return one.keys() == two.keys() and all(
        tensor.dtype == two[name].dtype and torch.equal(tensor, two[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_gives_back_the_bits_that_were_said(tmp_path: Path, dtype: torch.dtype) -> None:
    shelf = Shelf(tmp_path / "kept", "model", room=0)
    name = shelf.keep(BATCH, lambda batch: said(batch, dtype))
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [name]
    found = shelf.collect([{BATCH: name}])
    assert all(same(found[sample], one) for sample, one in zip(BATCH, said(BATCH, dtype), strict=True))
    assert shelf.keep(BATCH, unasked) == name


def test_where_it_is_to_ask_anew_a_file_is_replaced(tmp_path: Path) -> None:
    name = Shelf(tmp_path, "model", room=0).keep(BATCH, said)
    anew = Shelf(tmp_path, "model", room=0, anew=True)
    other = [{one: tensor + 1 for one, tensor in some.items()} for some in said(BATCH)]
    assert anew.keep(BATCH, lambda _: other) == name
    assert same(anew.collect([{BATCH: name}])[BATCH[0]], other[0])


def test_what_fits_into_memory_stays_there(tmp_path: Path) -> None:
    size = sum(tensor.nbytes for one in said(BATCH) for tensor in one.values())
    fits, too_little = (Shelf(tmp_path / "kept", "model", room) for room in (size / 5, size / 5 - 0.1))
    assert isinstance(fits.keep(BATCH, said), list)
    assert isinstance(Shelf(None, "model", room=0).keep(BATCH, said), list)
    assert not (tmp_path / "kept").exists()
    assert isinstance(too_little.keep(BATCH, said), str)


def test_another_model_or_sample_gets_a_file_of_its_own(tmp_path: Path) -> None:
    other = (BATCH[0], Sample("b", "retain", (1, 5), labels_from=2))
    shelf = Shelf(tmp_path, "model", room=0)
    names = [one.keep(batch, said) for one in (shelf, Shelf(tmp_path, "another", 0)) for batch in (BATCH, other)]
    assert len(set(map(str, names))) == 4


def test_files_of_other_settings_and_torn_ones_go_when_all_is_found(tmp_path: Path) -> None:
    shelf, old = Shelf(tmp_path, "model", room=0), Shelf(tmp_path, "before", room=0)
    stale = old.keep(BATCH, said)
    (tmp_path / f".{stale}.tmp-1").write_bytes(b"half")
    mine, others = shelf.keep(BATCH, said), shelf.keep(BATCH[:1], said)
    (tmp_path / f".{mine}.tmp-1").write_bytes(b"half")
    assert others != mine
    shelf.collect([{BATCH: mine}])
    assert [path.name for path in tmp_path.iterdir()] == [mine]


def test_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match="the disk is full"):
        Shelf(tmp_path, "model", room=0).keep(BATCH, said)
    assert [*tmp_path.iterdir()] == []


def test_processes_may_send_some_answers_and_name_files_for_others(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "model", room=0)
    here, there = BATCH[:1], BATCH[1:]
    found = shelf.collect([{here: said(here)}, {there: shelf.keep(there, said)}])
    assert same(found[BATCH[0]], said(here)[0])
    assert same(found[BATCH[1]], said(there)[0])


def anonymous() -> int:
    """Resident memory of this process that no file stands behind, bytes."""
    found = re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells")
def test_mapped_files_take_no_memory_of_the_process(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path, "model", room=0)
    batches = [(Sample(str(number), "forget", tuple(range(2, 130))),) for number in range(8)]
    before = anonymous()
    found = shelf.collect([{batch: shelf.keep(batch, lambda batch: said(batch, width=2**14)) for batch in batches}])
    size = sum(tensor.nbytes for one in found.values() for tensor in one.values())
    assert sum(float(tensor.sum()) for one in found.values() for tensor in one.values())  # all pages are read
    assert size > 2**26
    assert anonymous() - before < size / 2


@pytest.mark.parametrize("text", ["much", "-1", "0.5"])
def test_room_that_is_no_whole_number_is_an_error(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kept.ROOM, text)
    with pytest.raises(ParamsError, match=f"{kept.ROOM}={text}: a whole number of MiB is expected"):
        kept.room()


def test_room_is_given_in_mebibytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kept.ROOM, "3")
    assert kept.room() == 3 * 2**20
    monkeypatch.delenv(kept.ROOM)
    assert kept.room() == 512 * 2**20
