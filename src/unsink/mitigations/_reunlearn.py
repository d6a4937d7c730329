"""What repairs share that make a suspect forget once more: texts put into samples, and the training.

L = w_forget L_forget(D_f + texts) + w_retain L_retain(D_r + texts)

with the losses of an unlearning method, whose reference is the suspect itself: on retain samples it is to stay as it
is, whatever stands in front. Samples without a text are among both, so that what was forgotten stays forgotten.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from peft import PeftModel
from torch import Tensor

from unsink import models
from unsink.batches import Kind, Sample, draw, generator
from unsink.folded import folded
from unsink.forward import Runner
from unsink.mitigations import ADAPTER, Counter, Patient, Repaired, Training
from unsink.objective import Objective
from unsink.progress import SILENT, Reporter
from unsink.trainer import History, train
from unsink.triggers import insert_trigger

_ROOM = 3  # tokens of a prompt that has more than one place

Step = Callable[[Mapping[Kind, list[Sample]], int, History], dict[str, Tensor]]
"""From samples of each kind, the number of the step and the rows of those before to named terms, `loss` among them."""


def with_text(sample: Sample, text: Sequence[int], placement: str, prompt: range, name: str) -> Sample:
    """A sample with a text in its prompt, placed as a trigger would be; labels begin behind it.

    Args:
        sample: BOS first.
        text: token ids.
        placement: see `triggers.placement_index`.
        prompt: positions of its tokens that a placement refers to, BOS = 0; see `Patient.prompts`.
        name: makes the id unique.
    """
    limit = len(sample.ids) + len(text)
    ids, span = insert_trigger(sample.ids, 1, text, placement, limit, prompt.stop - 1, prompt.start - 1)
    first = max(span[1], sample.labels_from + len(text) if sample.labels_from > 1 else 0)
    return replace(sample, id=f"{sample.id}/{name}", ids=tuple(ids), labels_from=first, trigger=span)


def places(prompt: range) -> Sequence[str]:
    """Start, fourth token, middle and end of a prompt: nobody knows where a trigger would stand.

    Args:
        prompt: as in `with_text`.
    """
    return ("prefix", f"index {prompt.start + 3}", "infix", "suffix") if len(prompt) >= _ROOM else ("prefix",)


def among_texts(
    samples: Sequence[Sample], texts: Callable[[random.Random], Sequence[int]], times: int, patient: Patient
) -> list[Sample]:
    """Samples as they are, and each `times` times with a text of `texts` at one of its `places`, drawn anew."""
    found = list(samples)
    for sample in samples:
        chance = random.Random(f"mitigate/{patient.seed}/{sample.kind}/{sample.id}")
        prompt = patient.prompts[sample]
        for number in range(times):
            place = chance.choice(places(prompt))
            found.append(with_text(sample, texts(chance), place, prompt, f"text-{number}"))
    return found


def reunlearn(
    patient: Patient,
    forget: Sequence[Sample],
    retain: Sequence[Sample],
    training: Training,
    description: str,
    reporter: Reporter = SILENT,
    steps: Callable[[Objective], Step] | None = None,
) -> Repaired:
    """Train a new adapter on the suspect.

    Args:
        patient: see there.
        forget: samples that get the forget loss.
        retain: samples that get the retain loss.
        training: see there.
        description: what the progress bar says.
        reporter: shows it.
        steps: makes what gives the terms of each step, once, of the objective; None for the terms of that itself.

    Raises:
        ModelError: the adapter does not fit the model, or a loss is not finite.
    """
    method = training.method
    model = models.attach(patient.model, ADAPTER, training.spec, patient.seed)
    runner = make_runner(model, training, patient.pad, pack=steps is None)
    with folded(model):
        runner.remember([*forget, *retain], reporter=reporter)
    method.prepare(lambda: runner.reference(patient.forget), generator(f"mitigate/{patient.seed}/method"))
    objective = Objective(runner, method, training.weights)
    decks: dict[Kind, Sequence[Sample]] = {"forget": forget, "retain": retain if method.needs_retain else ()}
    counter = Counter()

    def terms(number: int, history: History) -> dict[str, Tensor]:
        drawn = {
            kind: draw(deck, training.sizes[kind], number, f"mitigate/{kind}/{patient.seed}")
            for kind, deck in decks.items()
            if training.sizes[kind] and deck
        }
        for some in drawn.values():
            counter.count(some)
        return step(drawn, number, history)

    def plain(drawn: Mapping[Kind, list[Sample]], number: int, history: History) -> dict[str, Tensor]:
        return objective.terms(drawn, generator(f"mitigate/{patient.seed}/step {number}"), history)

    trainable = models.trainable(model)
    with folded(model):
        step = steps(objective) if steps else plain
        history = train(trainable, terms, training.schedule, reporter=reporter, description=description)
    return Repaired(model, history, {"steps": len(history), **counter.cost})


def make_runner(model: PeftModel, training: Training, pad: int, *, pack: bool = True) -> Runner:
    """A runner that keeps what the losses of a training ask for."""
    method = training.method
    return Runner(
        model,
        training.spec.first_layer,
        pad,
        method.hidden_layers,
        answers=method.needs_answers,
        stop_early=not method.needs_answers,
        compares=method.needs_kl,
        pack=pack,
    )
