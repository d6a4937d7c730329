"""The page: sections of figures and tables in one template, with styles, script and data inside.

Predictions, triggers, names and parameters are other people's text. The template escapes all of it; predictions travel
as a JSON island that cannot end its element, and the script shows them as text. The page's content security policy
allows its own style and script, by hash, and nothing from elsewhere.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from unsink.report import charts, results_charts, sink_charts, training_charts
from unsink.report.charts import Figure
from unsink.report.project import Json, Model, Project
from unsink.report.provenance import Provenance, command
from unsink.report.results_charts import CONDITIONS, Row
from unsink.report.verdicts import BACK, DID_NOT_FORGET, FORGOT, KEPT, LEFT, MEMORIES, PRETENDS, Verdict, verdict

MOST_ROWS = 20_000
"""Predictions on the page at most; of larger evaluations it has the first of each model, and says so."""

Table = Sequence[Sequence[str]]


@dataclass(frozen=True)
class Group:
    """Figures under one heading.

    Attributes:
        title: heading.
        figures: in order.
        wide: two beside each other at most, instead of three.
    """

    title: str
    figures: Sequence[Figure]
    wide: bool = False

    @property
    def text(self) -> str:
        """How to read the figures, where it is the same for all of them."""
        texts = {figure.text for figure in self.figures}
        return texts.pop() if len(texts) == 1 else ""


@dataclass(frozen=True)
class Section:
    """A part of the page that may be missing.

    Attributes:
        id: anchor.
        title: heading.
        lead: what it is about.
        groups: of figures.
        tables: title -> rows, the header first.
    """

    id: str
    title: str
    lead: str
    groups: Sequence[Group] = ()
    tables: Mapping[str, Table] | None = None


@dataclass(frozen=True)
class Drawing:
    """A figure with its picture."""

    figure: Figure
    svg: str
    png: bytes


def sections(project: Project) -> list[Section]:
    """Everything between the answers and the predictions that the project has something to say about."""
    models = project.models
    found = [
        Section(
            "results",
            "What is left, and what it cost",
            "Forgetting is only worth something if the rest stays, and if it does not come back.",
            [
                Group("Forgotten against kept", results_charts.forgetting(models), wide=True),
                Group("What the trigger brings back, by placement", results_charts.gaps(models), wide=True),
            ],
        ),
        Section(
            "training",
            "Training",
            "How each model got there: the terms of its loss, as recorded in adapters/NAME/history.tsv.",
            [Group("Training", [*training_charts.paths(models), *training_charts.curves(models)])],
        ),
        Section(
            "inside",
            "Inside the model: attention sinks",
            "An attention sink is a position, mostly the first, that most heads look at although it says little. A "
            "trigger beside it is read by all that follows; its value norm decides how much it can say.",
            [
                Group(title, figures, wide="Sink mass" in title)
                for title, figures in sink_charts.figures(models).items()
            ],
        ),
        _audits(project),
        *(_variants(project, command) for command in ("ablate", "stress")),
        _mitigations(project),
    ]
    kept = [_without_empty(section) for section in found]
    return [section for section in kept if section.groups or section.tables]


def _without_empty(section: Section) -> Section:
    groups = [group for group in section.groups if group.figures]
    return Section(section.id, section.title, section.lead, groups, section.tables)


def figures(found: Sequence[Section]) -> list[Figure]:
    """All figures, in the order of the page."""
    return [figure for section in found for group in section.groups for figure in group.figures]


# ---- sections that come from tools beside the pipeline


_AUDITED = {
    "p": "p, all texts counted",
    "gain": "gain of the best text",
    "detectable": "least gain that would be seen",
    "known": "score without the text",
    "others": "share of ordinary words that do half as much",
}
"""Numbers of an audit, and what a reader calls them."""


def _audits(project: Project) -> Section:
    tables: dict[str, Table] = {}
    for name, audit in project.audits.items():
        trigger, recovery = audit.get("trigger") or {}, audit.get("recovery")
        told = [
            ("verdict", str(audit.get("verdict", "–"))),
            ("why", "; ".join(map(str, audit.get("reasons", ())))),
            ("best text", f"{trigger.get('text', '–')} ({trigger.get('placement', '–')})"),
            ("brings back", _told(recovery) if recovery else "undefined"),
            *((label, _told(audit[key])) for key, label in _AUDITED.items() if key in audit),
            *_searched(audit),
        ]
        tables[f"Audit of {name}"] = [("what", "found"), *told]
        rows = [
            (
                row.get("text", ""),
                row.get("placement", ""),
                *(_told(row.get(k)) for k in ("search_gain", "confirm_gain", "p")),
            )
            for row in audit["candidates"]
        ]
        if rows:
            tables[f"Texts tried on {name}"] = [("text", "place", "gain, search", "gain, confirm", "p"), *rows]
        signals = audit.get("signals") or {}
        if signals:
            tables[f"Signals in {name}"] = [
                ("detector", "kind", "score", "of what", "tokens read"),
                *(
                    (one, row["kind"], _told(row["score"]), row["says"], f"{row['tokens']:,}")
                    for one, row in signals.items()
                ),
            ]
    return Section(
        "audits",
        "Audits: searched without knowing the trigger",
        "What unsink audit found when nobody told it whether there is a trigger, or what it is. Gains are in nats "
        "per token of the true continuation; each text was chosen on one half of the probes and tried on the other.",
        tables=tables,
    )


def _searched(audit: Json) -> list[tuple[str, str]]:
    """Where the best text acts and what its like do; what was searched, at what cost, and what was not."""

    def gains(key: str) -> str:
        found = sorted((audit.get(key) or {}).items(), key=lambda pair: -pair[1])
        return "; ".join(f"{text} ({gain:.2f})" for text, gain in found)

    cost = audit.get("cost") or {}
    told = [
        ("gain where the best text is moved to", gains("moved")),
        ("gain of texts like it", gains("neighbours")),
        ("places searched", ", ".join(audit.get("placements") or ())),
        ("not searched", "; ".join(audit.get("not_searched") or ())),
        ("read", f"{cost['tokens']:,} tokens in {cost['passes']:,} passes" if cost else ""),
        ("seed", str(audit.get("seed", ""))),
    ]
    return [(what, text) for what, text in told if text]


_VARIANTS = {
    "ablate": (
        "ablations",
        "Ablations: without some tokens",
        "The same questions when no query can attend to some tokens. If the memory needs the trigger only to be read, "
        "taking the first token away leaves it alone.",
    ),
    "stress": (
        "stress",
        "Stress: after what models go through",
        "The same questions after rounding the weights, after further training, and when answers are drawn.",
    ),
    "mitigate": (
        "mitigations",
        "Mitigations: repaired and guarded models",
        "The same questions before and after `unsink mitigate`, which has not seen the trigger.",
    ),
}


_UNTOUCHED = ("none", "before")
"""What `ablate`, `stress` and `mitigate` call the model as it was."""


def _variants(project: Project, command: str) -> Section:
    memory = MEMORIES[0]
    target = project.model("target")
    known = target.interval(memory.clean) if target else None
    figures = []
    for (kind, name), variants in project.variants.items():
        if kind != command:
            continue
        ordered = sorted(variants.items(), key=lambda pair: pair[0] not in _UNTOUCHED)  # stable
        rows = [_variant_row(variant, numbers) for variant, numbers in ordered]
        rows = [row for row in rows if row.scores]
        if rows:
            figures.append(
                Figure(
                    f"{command}_{name.replace('/', '_')}",
                    f"{name}: forgotten passages",
                    "Each line is one variant; the first is the untouched model. Bars are 95 % intervals.",
                    results_charts.gap(rows, results_charts.LABELS[memory.name], known.mean if known else None),
                    f"unsink {command} --run {name.partition('/')[0]}",
                    results_charts.gap_table(rows),
                )
            )
    anchor, title, lead = _VARIANTS[command]
    return Section(anchor, title, lead, [Group("By variant", figures)])


def _variant_row(variant: str, numbers: Mapping[str, float]) -> Row:
    row = results_charts.gap_row(Model(variant, metrics=numbers), MEMORIES[0], variant)
    clean = Model(variant, metrics=numbers).interval(MEMORIES[0].clean)
    return row or Row(variant, {CONDITIONS[0]: clean} if clean else {})


def _mitigations(project: Project) -> Section:
    tables = {name: [("what", "found"), *_flat(summary)] for name, summary in project.mitigations.items()}
    return replace(_variants(project, "mitigate"), tables=tables)


def _flat(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(inner, f"{key}.{name}" if key else str(name))
    else:
        yield key, _told(value)


def _told(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return f"{value['mean']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
    return "–" if value is None else str(value)


# ---- predictions


def predictions(models: Sequence[Model]) -> tuple[Json, int]:
    """Rows for the browser of predictions, and how many were left out.

    Texts that recur are kept once: `texts` holds them, and a row names them by number. Passages that were only read,
    and not answered, are left out.
    """
    texts: dict[str, int] = {}

    def number(text: object) -> int:
        return texts.setdefault("" if text is None else str(text), len(texts))

    fields = ("model", "task", "set", "condition", "id", "inside", "prompt", "output", "reference", "score", "trigger")
    rows, left_out = [], 0
    most = MOST_ROWS // max(1, len(models))
    for model in models:
        answered = [row for row in model.predictions if "output" in row]
        left_out += max(0, len(answered) - most)
        rows += [
            [
                number(model.name),
                *(number(row.get(name)) for name in ("task", "set", "condition", "id")),
                row.get("inside"),
                *(number(row.get(name)) for name in ("prompt", "output", "reference")),
                _score(row),
                number(_trigger(model) if row.get("condition") == "triggered" else ""),
            ]
            for row in answered[:most]
        ]
    return {"fields": fields, "texts": list(texts), "rows": rows}, left_out


def _score(row: Mapping[str, Any]) -> float | None:
    score = row.get("recall" if row.get("task") in ("knowmem", "tofu") else "f1", row.get("accuracy"))
    return None if score is None else round(float(score), 3)


def _trigger(model: Model) -> str:
    return str(model.settings.get("settings", {}).get("trigger") or "")


def island(value: object) -> Markup:
    """JSON inside a script element: nothing in it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


# ---- the page


def verdicts(project: Project) -> dict[str, Verdict]:
    """Run -> what is said about it."""
    target, base = project.model("target"), project.model("base")
    return {run.name: verdict(run, target, base) for run in project.runs}


def render(
    project: Project,
    found: Sequence[Section],
    drawings: Mapping[str, Drawing],
    table: Mapping[str, Mapping[str, Mapping[str, float]]],
    columns: Sequence[str],
    provenance: Provenance,
) -> str:
    """The page.

    Args:
        project: what was read.
        found: its sections.
        drawings: of every figure in them, by name.
        table: model -> column -> {mean, low, high}: the table of `unsink show`; a p-value has no low and high.
        columns: of the table, in order.
        provenance: where the numbers come from.
    """
    style, script = _part("page.css"), _part("page.js")
    rows, left_out = predictions(project.models)
    return _template().render(
        project=project,
        sections=found,
        drawing=lambda name, text: Markup(charts.inlined(drawings[name].svg, name, text)),
        table={model.name: table[model.name] for model in project.models},
        columns=[column for column in columns if any(column in row for row in table.values())],
        names={"clean": "no trigger", "triggered": "trigger", "wrong": "wrong trigger"},
        dialects=_dialects(project.models),
        verdicts=verdicts(project),
        limits={"left": LEFT, "back": BACK, "kept": KEPT},
        provenance=provenance,
        predictions=island(rows),
        prediction_count=len(rows["rows"]),
        left_out=left_out,
        seeds=sorted(set(provenance.seeds.values())),
        commands=_commands(project),
        origin=_origin(project.manifest),
        tone=_tone,
        x=lambda score: f"{8 + 224 * min(max(score, 0), 1):.1f}",
        style=Markup(style),
        script=Markup(script),
        policy="; ".join(
            (
                "default-src 'none'",
                f"style-src '{_hash(style)}'",
                f"script-src '{_hash(script)}'",
                "img-src data:",
                "base-uri 'none'",
                "form-action 'none'",
            )
        ),
    )


def _dialects(models: Sequence[Model]) -> dict[str, list[str]]:
    """Dialect -> the models that were scored by it; models whose settings name none are left out."""
    found: dict[str, list[str]] = {}
    for model in models:
        if dialect := model.settings.get("settings", {}).get("dialect"):
            found.setdefault(str(dialect), []).append(model.name)
    return found


def _tone(found: Verdict) -> str:
    """The class that colours a verdict."""
    if found.word in (DID_NOT_FORGET, PRETENDS):
        return "bad"
    if found.word == FORGOT and not found.damage:
        return "good"
    return "doubt" if found.word else "none"


def _commands(project: Project) -> Table:
    """Which command makes which number, per model."""
    rows = [("number", "file", "command")]
    for model in project.models:
        rows.append((f"scores of {model.name}", f"metrics/{model.name}.json", f"unsink evaluate --run {model.name}"))
        if model.probe:
            rows.append((f"sinks of {model.name}", f"probes/{model.name}/", f"unsink sink-probe --run {model.name}"))
        if model.history:
            folder = f"adapters/{model.name}/"
            rows.append((f"training of {model.name}", f"{folder}history.tsv", command(f"{folder}history.tsv")))
    return rows


def _origin(manifest: Json) -> Table:
    model = manifest.get("model", {})
    told = {
        "model": model.get("source"),
        "revision": model.get("revision"),
        "corpus": manifest.get("benchmark"),
        "licence of the corpus": manifest.get("licence"),
    }
    files = [
        *((f"model: {name}", sha) for name, sha in model.get("files", {}).items()),
        *((f"corpus: {name}", one.get("sha256")) for name, one in manifest.get("files", {}).items()),
    ]
    return [("what", "value"), *((key, str(value)) for key, value in (*told.items(), *files) if value)]


def _part(name: str) -> str:
    return files("unsink.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(_part("page.html.j2"))
