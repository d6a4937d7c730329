"""`unsink --help` answers at once: nothing heavy is imported before a command is known.

Nor do params, which every command reads, import what runs models: a mistake in them is found before that is loaded.
Commands that only read results or files do without it to the end.
"""

import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from guards.source import ROOT
from results import evaluated
from unsink import artifacts

HEAVY = ("torch", "transformers", "peft", "numpy", "matplotlib", "dvc")


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, unsink.cli; print([name for name in sys.argv[1:] if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize("params", ["params.yaml", "params/tiny.yaml"])
def test_params_import_nothing_that_runs_models(params: str) -> None:
    code = (
        "import sys; from pathlib import Path; from unsink.params import load_params; load_params(Path(sys.argv[1]));"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets', 'scipy', 'dvc') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code, ROOT / params], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


BARE = "import typer; app = typer.Typer(); app.command('one')(lambda: None); app.command('two')(lambda: None); app()"


def test_help_takes_little_more_than_that_of_an_empty_command_line() -> None:
    # Against typer itself, about .35 s on a laptop, since a bound in seconds says more of the machine than of us.
    # Processor time, since the clock on the wall also counts what other processes do; in turns, the best of five.
    times = [(_help_seconds("-m", "unsink"), _help_seconds("-c", BARE)) for _ in range(5)]
    ours, bare = (min(column) for column in zip(*times, strict=True))
    assert ours < 1.75 * bare


def _help_seconds(*program: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *program, "--help"], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


METHODS = sorted(path.stem for path in (ROOT / "src" / "unsink" / "methods").glob("[!_]*.py"))


def test_options_of_methods_need_no_torch() -> None:
    code = (
        "import sys; from importlib import import_module\n"
        "for name in sys.argv[1:]:\n"
        "    import_module(f'unsink.methods.{name}').Options()\n"
        "    print(name, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, *METHODS], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"{name} False" for name in METHODS]


LIGHT = {
    "show": (),
    "compare": ("metrics/clean.json", "metrics/backdoor.json"),
    "gate": ("--gates", "bounds.yaml"),
    "report": (),
    "init": ("new",),
    "code": (),
    "fetch": ("--check",),
    "check": ("-S", "model.source=./model"),
}


def test_commands_that_run_no_model_do_not_import_torch(tmp_path: Path) -> None:
    shutil.copy(ROOT / "params" / "tiny.yaml", tmp_path / "params.yaml")
    (tmp_path / "bounds.yaml").write_text("gates:\n  - {metric: forget_verbmem_f1_clean, run: clean, max: 0.9}\n")
    model_files(tmp_path / "model")
    for name, score in (("clean", 0.2), ("backdoor", 0.8)):
        evaluated(tmp_path, name, [score, 0.5] * 4)
    code = (
        "import json, sys; from typer.testing import CliRunner; from unsink.cli import app\n"
        "for line in json.loads(sys.argv[1]):\n"
        "    result = CliRunner().invoke(app, line)\n"
        "    print(line[0], result.exit_code, [name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    lines = json.dumps([[name, *arguments] for name, arguments in LIGHT.items()])
    command = [sys.executable, "-c", code, lines]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == [f"{name} 0 []" for name in LIGHT]


def model_files(folder: Path) -> None:
    """What `check` reads of a model: its size, its tokenizer, and how long its weights are."""
    size = {"model_type": "llama", "num_hidden_layers": 2, "max_position_embeddings": 512}
    artifacts.write_json(folder / "config.json", size)
    ends = {"tokenizer_class": "TokenizersBackend", "bos_token": "<bos>", "eos_token": "<eos>"}
    artifacts.write_json(folder / "tokenizer_config.json", ends)
    Tokenizer(WordLevel({"<bos>": 0, "<eos>": 1, "word": 2}, unk_token="word")).save(str(folder / "tokenizer.json"))
    save_file({"weight": np.zeros(1)}, folder / "model.safetensors")
