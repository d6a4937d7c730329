import threading
import time

import pytest

from unsink.artifacts import lock
from unsink.cache import cache_root, make_once


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("UNSINK_CACHE", str(tmp_path))
    return tmp_path


def write(folder):
    (folder / "weights").write_text("complete")


def never(_folder):
    pytest.fail("made again")


def test_the_cache_is_where_the_variable_says(root):
    assert cache_root() == root


def test_a_folder_is_made_once(root):
    folder = make_once("models/a", write)
    assert folder == root / "models" / "a"
    assert make_once("models/a", never) == folder


def test_a_file_cut_short_is_made_again():
    folder = make_once("a", write)
    (folder / "weights").write_text("comp")
    assert (make_once("a", write) / "weights").read_text() == "complete"


def test_an_error_leaves_nothing(root):
    def fail(folder):
        write(folder)
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        make_once("a", fail)
    assert list(root.iterdir()) == []


def test_a_second_process_waits_for_the_first(root):
    held = threading.Event()

    def first():
        with lock(root / "a"):
            held.set()
            time.sleep(0.2)
            write_complete()

    def write_complete():
        # what the first process does before it lets go
        from unsink.artifacts import new_dir, write_json

        with new_dir(root / "a") as fresh:
            write(fresh)
            write_json(fresh / ".complete.json", {"weights": len("complete")})

    thread = threading.Thread(target=first)
    thread.start()
    held.wait()
    assert (make_once("a", never) / "weights").read_text() == "complete"
    thread.join()
