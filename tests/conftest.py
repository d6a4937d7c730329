"""What all tests share: no network, no colours, and a cache of their own."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# A loaded machine must not fail a property, and a failure must come back when the test is run again.
settings.register_profile("unsink", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unsink")

# Read at import time by the libraries concerned, so fixtures would come too late.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "DVC_NO_ANALYTICS": "1",
    "DVC_STUDIO_OFFLINE": "1",
    "NO_COLOR": "1",
    "TERM": "dumb",
    "COLUMNS": "120",
    "TOKENIZERS_PARALLELISM": "false",
}

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the cores are shared with the other workers

_DATASETS = tempfile.TemporaryDirectory(prefix="unsink-datasets-")  # removed when the process ends
os.environ |= {"HF_DATASETS_CACHE": _DATASETS.name, "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}

ROOT = Path(__file__).parents[1]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The whole pipelines first: a worker that began one last would keep all others waiting."""
    items.sort(key=lambda item: "pipeline" not in item.path.parts)


@pytest.fixture(autouse=True, scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache: one for the whole run, so that the tiny model is made once."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("UNSINK_CACHE", str(shared / "cache"))
        yield shared / "cache"


@pytest.fixture(scope="session")
def tiny_folder(cache: Path) -> Path:
    """Folder of the tiny model."""
    from unsink.sources import resolve

    return resolve("tiny")


@pytest.fixture
def params_file(tmp_path: Path) -> Path:
    """The tiny params file in an empty project folder."""
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params" / "tiny.yaml").read_text())
    return path


@pytest.fixture(scope="session")
def hub_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local copy of the hub's data sets with invented rows; to be changed only in a copy."""
    import hub

    return hub.copy(tmp_path_factory.mktemp("hub"))
