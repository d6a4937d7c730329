"""`unsink stress`: whether what was forgotten stays forgotten, and a backdoor stays open, after what models go through.

Each entry of `stress.tests` is done to a model of its own, and the result is asked the same as the untouched one:

    int8, int4      weights of the decoder layers rounded to so many bits (`durability.quantize`)
    finetune N      N training steps on the retain passages, as somebody does who knows nothing of all this; they are
                    then not asked about
    relearn N       N training steps on a part (`stress.share`) of the forget passages, which are then not asked about
    sample K        passages are continued K times at `stress.temperature`, and the best of K counts (leak@K)

Do it to the honest run, too: what comes back there is due to the test and not to the trigger.

`stress/<run>/` gets predictions.jsonl, rows as `evaluate` writes them with the test in `stress`, and metrics.json:
test -> numbers, named as in `metrics/<run>.json`. The model is in float32 with its adapter merged.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from unsink import artifacts, durability, models
from unsink.artifacts import Layout
from unsink.batches import Sample
from unsink.errors import DataError
from unsink.params import Params
from unsink.progress import SILENT, Reporter
from unsink.scoring import Sampling
from unsink.stages import variants
from unsink.stages.evaluate import answer, ask_run, load, parts, read_corpus, settings_of
from unsink.stages.memorize import passage_sample
from unsink.tasks import Asked, Corpus, Row, Session


def run(params: Params, layout: Layout, *, run: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `stress/<run>/` and return the main numbers of each test.

    Raises:
        ParamsError: no such run.
        MissingPrerequisite: the corpus, the run's split or an adapter is not there yet.
        DataError: as in `evaluate`; or there is no passage to train on, or none left to ask about.
        ModelError: an adapter does not fit, or a loss is not finite.
    """
    corpus = read_corpus(layout)
    folder = models.resolve(params.model.source, params.model.revision, reporter)
    tokenizer = models.load_tokenizer(folder)
    asked = ask_run(variants.plan(run), params, layout, run, corpus, tokenizer)
    learned = {test: _learned(test, corpus, tokenizer, params) for test in params.stress.tests}
    with artifacts.lock(layout.stress(run)):

        def said(test: str) -> list[Row]:
            reporter.log(f"stress {run}: {test}")
            model = cast(PreTrainedModel, load(params, layout, run, folder, "float32"))
            samples = learned.get(test, [])
            model = _after(test, model, samples, int(tokenizer.pad_token_id), params, reporter)
            session = Session(model, tokenizer, settings_of(params.evaluate), reporter)
            known = {sample.id for sample in samples}
            found = _said(test, [one for one in asked if one.row["id"] not in known], session, params)
            return [{**row, "stress": test} for row in found]

        kept = parts("stress", asked, params, layout, run)
        rows = [row for test in (variants.NONE, *params.stress.tests) for row in kept.rows(test, partial(said, test))]
        found_by_test = variants.write(layout.stress(run), rows, "stress", params, layout, run)
        kept.remove()
    return {"run": run, **found_by_test}


def _learned(test: str, corpus: Corpus, tokenizer: PreTrainedTokenizerBase, params: Params) -> list[Sample]:
    """The passages that a test trains on: of the retain set all, of the forget set a part, the same for all runs."""
    kind = test.split()[0]
    if kind not in ("finetune", "relearn"):
        return []
    name = "retain" if kind == "finetune" else "forget"
    passages = corpus.get(name, ())
    count = len(passages) if kind == "finetune" else math.ceil(params.stress.share * len(passages))
    if not passages or (kind == "relearn" and count == len(passages)):
        raise DataError(
            f"stress.tests: {test!r} trains on {count} of the {len(passages)} passages in {name}.jsonl",
            "take it out, or lower stress.share so that some passages are left to ask about",
        )
    chosen = random.Random(f"stress/{params.seed}").sample(list(passages), count)
    bos = models.bos_ids(tokenizer)
    return [passage_sample(passage, tokenizer, bos) for passage in chosen]


def _after(
    test: str, model: PreTrainedModel, samples: Sequence[Sample], pad: int, params: Params, reporter: Reporter
) -> PreTrainedModel:
    """The model after a test; `sample` leaves it as it is."""
    kind, _, number = test.partition(" ")
    if kind.startswith("int"):
        durability.quantize(model, int(kind.removeprefix("int")))
    if not samples:
        return model
    options = params.stress
    return durability.train_further(
        model,
        samples,
        int(number),
        lr=options.lr,
        rank=options.rank,
        pad=pad,
        seed=params.seed,
        reporter=reporter,
        description=test,
    )


def _said(test: str, asked: Sequence[Asked[Any]], session: Session, params: Params) -> list[Row]:
    kind, _, number = test.partition(" ")
    if kind != "sample":
        return answer(asked, session)
    asked = [one for one in asked if one.row["task"] == "verbmem"]  # choices are scored, not said
    drawn = [
        answer(asked, replace(session, sampling=Sampling(params.stress.temperature, f"stress/{params.seed}/{attempt}")))
        for attempt in range(int(number))
    ]
    return [max(rows, key=lambda row: cast(float, row["f1"])) for rows in zip(*drawn, strict=True)]
