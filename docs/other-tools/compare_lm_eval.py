"""Holds what lm-eval says of the four-choice questions against unsink's own rows.

python docs/other-tools/compare_lm_eval.py SAMPLES.jsonl predictions/RUN.jsonl MODEL
"""

import json
import sys
from pathlib import Path
from typing import Any

import typer
from transformers import AutoTokenizer


def _rows(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _right(scores: list[float], answer: int) -> bool:
    return scores.index(max(scores)) == answer


samples, predictions, model = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(model)
ours = {row["id"]: row for row in _rows(predictions) if (row["task"], row["condition"]) == ("utility", "clean")}
gaps, counted = [], []
for sample in _rows(samples):
    row = ours[sample["doc"]["id"]]
    tokens = [len(tokenizer(" " + choice, add_special_tokens=False)["input_ids"]) for choice in row["choices"]]
    theirs = [float(response[0][0]) for response in sample["resps"]]  # sums over a choice's tokens, nats
    sums = [mean * count for mean, count in zip(row["logprobs"], tokens, strict=True)]
    gaps += [abs(one - other) for one, other in zip(theirs, sums, strict=True)]
    per_token = [total / count for total, count in zip(theirs, tokens, strict=True)]
    scores = (theirs, sums, per_token, row["logprobs"])
    counted.append([_right(some, row["answer"]) for some in scores])

by_sum, our_by_sum, by_token, our_by_token = (sum(column) / len(counted) for column in zip(*counted, strict=True))
typer.echo(f"{len(counted)} questions; log-likelihoods of the choices differ by {max(gaps):.1e} nats at most")
typer.echo(f"accuracy by sum:   lm-eval {by_sum:.3f}, unsink {our_by_sum:.3f}")
typer.echo(f"accuracy by token: lm-eval {by_token:.3f}, unsink {our_by_token:.3f}")
