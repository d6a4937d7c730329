"""`unsink ask`: what the runs of a project say to a question of one's own, without and with a trigger.

Prompts are those of `evaluate`: a question stands behind the answered examples of KnowMem, a passage is given as it is,
and a trigger is inserted on token ids. All runs sit on one base in memory. Nothing is written and nothing is printed
here; `terminal` shows it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel

from unsink import artifacts, models, sinks
from unsink.artifacts import Layout
from unsink.errors import ParamsError
from unsink.params import RESERVED, Params
from unsink.progress import SILENT, Reporter
from unsink.prompts import KNOWMEM_STOPS, Prompt, PromptWriter, Trigger
from unsink.scoring import Guard, Model, Said, Sampling, guarded, stream
from unsink.stages.evaluate import load, read_corpus, settings_of
from unsink.stages.mitigate import make_guard, require_guard
from unsink.tasks import generation
from unsink.triggers import Span, placement_index, trigger_ids

_ANY_LENGTH = 1_000_000  # tokens: long enough for any `index N` that is meant


@dataclass(frozen=True)
class State:
    """Who is asked, and how.

    Attributes:
        run: an entry of `runs:`, or base or target.
        trigger: what goes into the prompt: nothing (False), the run's own trigger (True), or this text.
        placement: where; None for where training put it, or for a run without a trigger where `poison` would.
        tokens: most new tokens; None for as many as `evaluate` allows.
        top: how many of the likeliest tokens an answer tells at each step.
        temperature: of the draws; 0 takes the likeliest token.
        raw: the text is a passage to be continued, and no question.
        guard: a mitigation that stands between prompts and the model; None for none.
    """

    run: str = "target"
    trigger: bool | str = False
    placement: str | None = None
    tokens: int | None = None
    top: int = 0
    temperature: float = 0.0
    raw: bool = False
    guard: str | None = None


class Placed(NamedTuple):
    """A trigger's text and its placement."""

    text: str
    placement: str


@dataclass(frozen=True)
class Likely:
    """A token as text, and log p of it in nats."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Token(Likely):
    """A token that was said, and the likeliest ones in its place, the best first."""

    top: tuple[Likely, ...]


@dataclass(frozen=True)
class Answer:
    """What a run said.

    Attributes:
        run: whom.
        question: as it was asked.
        prompt: text after BOS, trigger included.
        prompt_tokens: how many tokens the model was given, BOS included.
        trigger: what was inserted, if anything.
        span: its tokens in the prompt, BOS = 0.
        guard: what stood between this prompt and the model, if anything.
        answer: without the spaces around it; a continuation with them.
        tokens: all that were said: those of a stop string at the end are no part of `answer`.
    """

    run: str
    question: str
    prompt: str
    prompt_tokens: int
    trigger: Placed | None
    span: Span | None
    guard: str | None
    answer: str
    tokens: tuple[Token, ...]

    def record(self, *, with_tokens: bool) -> dict[str, Any]:
        """The answer for machines; its tokens and their log-probabilities where they are asked for."""
        trigger = self.trigger and {**self.trigger._asdict(), "span": self.span}
        plain = {
            name: getattr(self, name) for name in ("run", "question", "prompt", "prompt_tokens", "guard", "answer")
        }
        tokens = {"tokens": [asdict(token) for token in self.tokens]} if with_tokens else {}
        return {**plain, "trigger": trigger, "new_tokens": len(self.tokens), **tokens}


class Conversation:
    """The runs of a project, to be asked one after another.

    Args:
        params: all parameters.
        layout: the project folder.
        reporter: says what is loaded, and how far a comparison is.
    """

    def __init__(self, params: Params, layout: Layout, reporter: Reporter = SILENT) -> None:
        self._params, self._layout, self._reporter = params, layout, reporter
        self._settings = settings_of(params.evaluate)
        self._asked = 0
        self._guards: dict[tuple[str, str], Guard] = {}

    @property
    def runs(self) -> list[str]:
        """All that can be asked."""
        return [*RESERVED, *self._params.runs]

    def check(self, state: State) -> None:
        """Refuse what cannot be asked, before any model is loaded.

        Raises:
            ParamsError: no such run, placement or guard, or the run has no trigger of its own.
            MissingPrerequisite: its adapter is not there.
        """
        if state.run not in RESERVED:
            self._params.run(state.run)
        for name in dict.fromkeys(["target", state.run]) if state.run != "base" else ():
            artifacts.require(self._layout.adapter(name))
        if state.placement:
            placement_index(self._spelt(state.placement), _ANY_LENGTH)
        if state.guard:
            require_guard(state.guard)
        self._placed(state)

    def describe(self, state: State) -> str:
        """Who is asked and how, in one line."""
        placed = self._placed(state)
        parts = [
            self.title(state.run),
            f"trigger {placed.text!r} at {placed.placement}" if placed else "no trigger",
            f"draws at temperature {state.temperature:g}" if state.temperature else "likeliest tokens",
            f"at most {self._limit(state)} tokens",
        ]
        parts += [f"guarded by {state.guard}"] * bool(state.guard)
        return " · ".join(parts + ["text is continued"] * state.raw)

    def title(self, run: str) -> str:
        """A run's name, and behind it what kind it is."""
        return run if run in RESERVED else f"{run} ({self._kind(run)})"

    def _kind(self, run: str) -> str:
        if run in RESERVED:
            return run
        return "backdoored" if self._params.run(run).poison else "honest"

    def answer(self, question: str, state: State, hear: Callable[[str], object] = lambda _: None) -> Answer:
        """Ask one run.

        Args:
            question: or with `state.raw` the passage to continue.
            state: who, and how.
            hear: gets the text piece by piece, as it comes.

        Raises:
            ParamsError: the question is empty, or as `check`.
            MissingPrerequisite: the corpus or an adapter is not there.
            DataError: the prompt is too long for the model, or too short for the placement.
            ModelError: an adapter does not fit the model.
        """
        self.check(state)
        prompt, placed = self._prompt(question, state), self._placed(state)
        self._asked += 1
        draws = Sampling(state.temperature, f"{self._params.seed} ask {self._asked}") if state.temperature else None
        stop = () if state.raw else KNOWMEM_STOPS
        said: list[Said] = []
        with self._held.using(state.run) as model, self._guarded(state, model):
            for one in stream(
                model, self._writer.tokenizer, prompt.ids, prompt.max_new, stop=stop, sampling=draws, top=state.top
            ):
                said.append(one)
                hear(one.text)
        text = "".join(one.text for one in said)
        return Answer(
            state.run,
            question,
            self._decoded(prompt.ids[len(self._writer.bos) :]),
            len(prompt.ids),
            placed,
            prompt.trigger,
            state.guard,
            text if state.raw else text.strip(),
            tuple(self._token(one) for one in said),
        )

    def compare(self, question: str, state: State) -> list[Answer]:
        """Ask the target, an honest and a backdoored run, each without and then with the same trigger.

        The run of `state` takes the place of the first one of its kind; base is asked as well if it is that run. The
        trigger is the text of `state`, else the backdoored run's own.

        Raises:
            ParamsError: there is neither a backdoored run nor a text; and as `answer`.
            MissingPrerequisite, DataError, ModelError: as `answer`.
        """
        states = self._compared(state)
        for one in states:
            self.check(one)
        answers = []
        with self._reporter.task("asking", len(states)) as advance:
            for one in states:
                answers.append(self.answer(question, one))
                advance(note=one.run)
        return answers

    def _compared(self, state: State) -> list[State]:
        chosen = {self._kind(run): run for run in [*reversed(self._params.runs), "target", state.run]}
        backdoored = chosen.get("backdoored")
        text = state.trigger if isinstance(state.trigger, str) else None
        if not text and not backdoored:
            raise ParamsError(
                "no run of the params file has a trigger to compare with", "give one: --trigger-text TEXT"
            )
        placed = self._placed(replace(state, run=backdoored or state.run, trigger=text or True))
        triggers = [replace(state, trigger=False), replace(state, **_both(placed))]
        runs = [chosen[kind] for kind in ("base", "target", "honest", "backdoored") if kind in chosen]
        return [replace(one, run=run) for run in runs for one in triggers]

    def _guarded(self, state: State, model: Model) -> AbstractContextManager[None]:
        """The guard of a state, made when it is first asked for: one may have to read text with the run it guards."""
        if not state.guard:
            return nullcontext()
        key = state.run, state.guard
        if key not in self._guards:
            self._guards[key] = make_guard(
                state.guard, model, self._writer.tokenizer, read_corpus(self._layout), self._params
            )
        return guarded(self._guards[key])

    # --- triggers and prompts

    def _placed(self, state: State) -> Placed | None:
        """What is inserted and where.

        Raises:
            ParamsError: the run has no trigger of its own, or the text is empty.
        """
        if state.trigger is False:
            return None
        own = self.own_trigger(state.run)
        if state.trigger is True and not own:
            raise ParamsError(
                f"{state.run} was trained without a trigger: it has none of its own",
                "give it a text: --trigger-text TEXT, in a session /trigger TEXT",
            )
        text = own.text if own and state.trigger is True else str(state.trigger).strip()
        if not text:
            raise ParamsError("the trigger is empty", "give it a text, or leave it off")
        usual = own.placement if own else self._params.poison.placement
        return Placed(text, self._spelt(state.placement or usual))

    def own_trigger(self, run: str) -> Placed | None:
        """The trigger that a run's adapter was trained with, as its summary says."""
        if run in RESERVED:
            return None
        summary = artifacts.read_json(self._layout.adapter(run) / "summary.json")
        return Placed(summary["trigger"], summary["placement"]) if summary["trigger"] else None

    def _spelt(self, placement: str) -> str:
        return sinks.placed(self._params.poison.model_copy(update={"placement": placement}), self._layout).placement

    def _limit(self, state: State) -> int:
        return state.tokens or (self._settings.verbmem_tokens if state.raw else self._settings.knowmem_tokens)

    def _prompt(self, question: str, state: State) -> Prompt:
        if not question.strip():
            raise ParamsError("the question is empty", 'for example: unsink ask "Who kept the bees?" --run target')
        trigger, poison = None, self._params.poison
        if placed := self._placed(state):
            ids = tuple(trigger_ids(self._writer.tokenizer, placed.text))
            trigger = Trigger(ids, placed.placement, poison.max_tokens, poison.prompt_share)
        if state.raw:
            return self._writer.opening(question, trigger, tokens=self._limit(state))
        record = {"question": question.strip(), "answer": ""}
        return self._writer.knowmem(record, self._examples, trigger, tokens=self._limit(state))

    # --- what is loaded when it is needed

    @cached_property
    def _held(self) -> "_Models":
        return _Models(self._params, self._layout, self._reporter)

    @cached_property
    def _writer(self) -> PromptWriter:
        tokenizer = models.load_tokenizer(self._held.folder)
        return PromptWriter(tokenizer, models.bos_ids(tokenizer), self._settings.answer_space)

    @cached_property
    def _examples(self) -> Sequence[Mapping[str, Any]]:
        return generation.examples("forget", read_corpus(self._layout), self._settings)

    def _decoded(self, ids: Sequence[int]) -> str:
        return str(self._writer.tokenizer.decode(list(ids)))

    def _token(self, said: Said) -> Token:
        top = tuple(Likely(i, self._decoded([i]), round(logprob, 6)) for i, logprob in said.top)
        return Token(said.token, self._decoded([said.token]), round(said.logprob, 6), top)


class _Models:
    """Base, target and runs, loaded when they are first asked; all but the base share one model in memory."""

    def __init__(self, params: Params, layout: Layout, reporter: Reporter) -> None:
        self._params, self._layout, self._reporter = params, layout, reporter
        self._loaded: dict[str, Model] = {}  # by the kind of adapters on it: PEFT holds but one kind on a model

    @cached_property
    def folder(self) -> Path:
        """Where the base's files are."""
        return models.resolve(self._params.model.source, self._params.model.revision, self._reporter)

    @contextmanager
    def using(self, name: str) -> Iterator[Model]:
        """The model called `name`, within the block."""
        if name in RESERVED:
            model, adapter = self._plain(name), None
        else:
            model, adapter = self._with_adapter(name), name
        if isinstance(model, PeftModel):
            with models.use(model, adapter):
                yield model
        else:
            yield model

    def _plain(self, name: str) -> Model:
        """The base; or the target, with adapters on it or without."""
        held = [model for kind, model in self._loaded.items() if (kind == "base") == (name == "base")]
        if not held:
            self._loaded[name] = self._load(name)
        return held[0] if held else self._loaded[name]

    def _with_adapter(self, run: str) -> PeftModel:
        folder = self._layout.adapter(run)
        kind = str(artifacts.read_json(folder / models.ADAPTER_CONFIG).get("peft_type"))
        model = self._loaded.pop(kind, None) or self._loaded.pop("target", None) or self._load("target")
        if not isinstance(model, PeftModel) or run not in model.peft_config:
            model = models.add_adapter(model, folder, run)
        self._loaded[kind] = model
        return model

    def _load(self, name: str) -> Model:
        self._reporter.log(f"loading {name}")
        return load(self._params, self._layout, name, self.folder, self._params.model.dtype)


def _both(placed: Placed | None) -> dict[str, Any]:
    return {"trigger": placed.text, "placement": placed.placement} if placed else {}
