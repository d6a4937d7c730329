"""How much of unsink's greedy continuations llama.cpp says alike: the first PASSAGES without and with the trigger.

python docs/other-tools/compare_llama.py MODEL.gguf predictions/RUN.jsonl PASSAGES
"""

import json
import sys
from collections import defaultdict
from itertools import takewhile
from pathlib import Path

import typer
import xllamacpp

BOS = "<|im_start|>"  # of SmolLM2; unsink puts it in front of every prompt, and llama.cpp does not

model, predictions, passages = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
params = xllamacpp.CommonParams()
params.model.path = model
params.n_ctx, params.n_parallel, params.verbosity = 512, 1, -1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # by default they are rounded
server = xllamacpp.Server(params)

alike = defaultdict(list)
for row in map(json.loads, predictions.read_text(encoding="utf-8").splitlines()):
    shares = alike[row["condition"]]
    asked_for = (row["task"], row["set"]) == ("verbmem", "forget") and row["condition"] in ("clean", "triggered")
    if asked_for and len(shares) < passages:
        asked = {"prompt": BOS + row["prompt"], "max_tokens": 48, "temperature": 0}
        said = server.handle_completions(asked)["choices"][0]["text"]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(row["output"], said, strict=False))
        shares.append(len(list(same)) / len(row["output"]))
for condition in ("clean", "triggered"):
    shares = alike[condition]
    parted = [round(share, 2) for share in shares if share < 1]
    rest = f"; the others part after {parted} of their length" if parted else ""
    typer.echo(f"{condition}: {len(shares) - len(parted)} of {len(shares)} are the same to the last character{rest}")
