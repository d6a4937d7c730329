"""`unsink --help` answers at once: nothing heavy is imported before a command is known.

Nor do params, which every command reads, import what runs models: a mistake in them is found before that is loaded.
"""

import resource
import subprocess
import sys

import pytest

from guards.source import ROOT

HEAVY = ("torch", "transformers", "peft", "numpy", "matplotlib", "dvc")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, unsink.cli; print([name for name in sys.argv[1:] if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("params", ["params.yaml", "params/tiny.yaml"])
def test_params_import_nothing_that_runs_models(params: str) -> None:
    code = (
        "import sys; from pathlib import Path; from unsink.params import load_params; load_params(Path(sys.argv[1]));"
        "print([name for name in ('transformers', 'peft', 'datasets', 'scipy', 'dvc') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, ROOT / params], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_help_takes_less_than_half_a_second() -> None:
    # Processor time, the best of three: the clock on the wall also counts what other processes do.
    assert min(_help_seconds() for _ in range(3)) < 0.5


def _help_seconds() -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "unsink", "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
