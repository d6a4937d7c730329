"""`unsink export`: a model for other tools, with a card that says what it is.

Without `merged` one LoRA adapter for the base (the target's, the run's and its repair's in one), else a whole
checkpoint. Weights are merged in float32 and stored in it unless told otherwise: rounding them can bring back what was
forgotten.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from transformers import PreTrainedModel

from unsink import artifacts, benchmarks, exports, models
from unsink.artifacts import Layout
from unsink.cards import BUILT_IN, Base, Facts, Score, card
from unsink.errors import DataError, ParamsError
from unsink.exports import Lora
from unsink.metrics import outside
from unsink.mitigations import ADAPTER
from unsink.params import RESERVED, Params
from unsink.progress import SILENT, Advance, Reporter
from unsink.stages import mitigate
from unsink.stages.evaluate import load
from unsink.stages.show import COLUMNS, OUTSIDE


def run(
    params: Params,
    layout: Layout,
    *,
    run: str | None,
    output: Path,
    merged: bool,
    dtype: str,
    repair: str | None = None,
    reporter: Reporter = SILENT,
) -> dict[str, Any]:
    """Write the folder `output`, and return what it holds; without a run, a folder in it for each model there is.

    Args:
        params: all parameters.
        layout: the project folder.
        run: an entry of `runs:`, or `base` or `target`; None for all that was trained.
        output: a new folder.
        merged: whole models instead of adapters.
        dtype: of the stored weights.
        repair: a repair of the run, to go with it.
        reporter: shows models read and written.

    Raises:
        ParamsError: no such run or repair, the folder holds something, or there is no LoRA adapter to be had of them.
        MissingPrerequisite: an adapter, the repair or the manifest of the corpus is not there.
        DataError: the metrics of the run belong to another training.
        ModelError: an adapter does not fit.
    """
    if run not in (None, *RESERVED):
        params.run(str(run))
    mended = None
    if repair is not None:
        if run is None:
            raise ParamsError("--repair is of one run", "add --run, and leave out --all")
        mended = mitigate.require_repair(layout, run, repair)
    artifacts.require_new(output)
    done: dict[str, Any] = {}
    with artifacts.lock(output), artifacts.new_dir(output) as new:
        names = _trained(params, layout, merged, reporter) if run is None else [run]
        with reporter.task("export", total=2 * len(names)) as advance:  # each is read, and then written
            for name in names:
                folder = new if run else new / name
                folder.mkdir(exist_ok=True)
                done[name] = _write(params, layout, name, mended, folder, merged, dtype, reporter, advance)
                done[name]["output"] = str(output if run else output / name)
    return done[run] if run else done


def _trained(params: Params, layout: Layout, merged: bool, reporter: Reporter) -> list[str]:
    """What was trained so far, the target first; without `merged` what an adapter can hold, and a line about the rest.

    Raises:
        MissingPrerequisite: nothing was.
    """
    trained = [] if _published(layout, "target") else ["target"]
    found = [name for name in [*trained, *params.runs] if layout.adapter(name).exists()]
    if not found:
        artifacts.require(layout.adapter("target"))
    low_rank = found if merged else [name for name in found if _is_lora(layout.adapter(name))]
    if not low_rank:
        return found  # the first of them says what to do
    if whole := [name for name in found if name not in low_rank]:
        reporter.log(f"left out, trained with `adapter: none`: {', '.join(whole)}; --merged writes them too")
    return low_rank


def _is_lora(folder: Path) -> bool:
    return bool(artifacts.read_json(folder / models.ADAPTER_CONFIG).get("peft_type") == "LORA")


def _write(
    params: Params,
    layout: Layout,
    run: str,
    repair: Path | None,
    new: Path,
    merged: bool,
    dtype: str,
    reporter: Reporter,
    advance: Advance,
) -> dict[str, Any]:
    """Write one model into a folder, and return what that holds."""
    facts = _facts(params, layout, run, repair, merged, dtype)
    if merged:
        folder = models.resolve(params.model.source, params.model.revision, reporter)
        model = _whole(params, layout, run, repair, folder, reporter)
        advance(note=f"writing {run}")
        exports.write_model(model, folder, dtype, new)
    else:
        adapter = exports.stacked(_parts(params, layout, run, repair, reporter))
        advance(note=f"writing {run}")
        exports.write_adapter(adapter, facts.base.repo if facts.base.loads_from_hub else None, dtype, new)
    artifacts.write_text(new / "README.md", card(facts))
    advance(note=f"wrote {run}")
    return {
        "run": run,
        **({"repair": repair.name} if repair else {}),
        "merged": merged,
        "dtype": dtype,
        "backdoor": facts.trigger,
        "files": sorted(path.name for path in new.iterdir()),
    }


def _whole(
    params: Params, layout: Layout, run: str, repair: Path | None, folder: Path, reporter: Reporter
) -> PreTrainedModel:
    """The model in float32, all adapters merged."""
    if repair is None:
        return cast(PreTrainedModel, load(params, layout, run, folder, "float32"))
    exact = params.model_copy(update={"model": params.model.model_copy(update={"dtype": "float32"})})
    return models.merged(mitigate.repaired(exact, layout, run, repair.name, reporter), ADAPTER)


def _parts(params: Params, layout: Layout, run: str, repair: Path | None, reporter: Reporter) -> list[Lora]:
    """The LoRA adapters that stand on the base, from the bottom up.

    Raises:
        ParamsError: there are none, or one of them is not LoRA.
    """
    names = {"base": [], "target": ["target"]}.get(run, ["target", run])
    folders = [artifacts.require(layout.adapter(name)) for name in names]
    source, revision = params.model.source, params.model.revision
    if pin := _published(layout, run):
        source, revision = pin["source"], pin["revision"]
        folders = folders[1:]
    if repair is not None:
        folders.append(repair)
    if not folders:
        raise ParamsError(f"{run} is a whole model without an adapter", "add --merged")
    found = models.read_adapters(models.resolve(source, revision, reporter), folders)
    parts = [Lora(config, tensors) for config, tensors in found if isinstance(config, LoraConfig)]
    if len(parts) < len(found):
        whole = (
            f"{repair.name} replaces"
            if repair and not isinstance(found[-1][0], LoraConfig)
            else f"{run} was trained on"
        )
        raise ParamsError(f"{whole} whole weights (`adapter: none`), so there are no low-rank matrices", "add --merged")
    return parts


def _facts(params: Params, layout: Layout, run: str, repair: Path | None, merged: bool, dtype: str) -> Facts:
    pin = _published(layout, run)
    summary = {} if run == "base" or (run == "target" and pin) else _summary(layout, run)
    facts = Facts(
        name=run,
        merged=merged,
        dtype=dtype,
        base=_base(pin["source"], pin["revision"]) if pin else _base(params.model.source, params.model.revision),
        summary=summary,
        manifest=artifacts.read_json(layout.fetched / benchmarks.MANIFEST),
    )
    return _evaluated(facts, layout) if repair is None else _repaired(facts, repair)


def _evaluated(facts: Facts, layout: Layout) -> Facts:
    """The facts of a run with what `evaluate` measured, if it did."""
    run, summary = facts.name, facts.summary
    measured = layout.metrics(run).exists()
    settings = artifacts.read_json(layout.settings(run))["settings"] if measured else {}
    if measured and summary.get("trigger") and (other := _differences(summary, settings)):
        raise DataError(
            f"{layout.metrics(run)}: {run} was evaluated with another {' and '.join(other)} than it was trained with",
            f"run `unsink evaluate --run {run}` with the params file that it was trained with",
        )
    scores = _scores(artifacts.read_json(layout.metrics(run)), COLUMNS, OUTSIDE) if measured else ()
    return replace(facts, scores=scores, settings=settings)


def _repaired(facts: Facts, folder: Path) -> Facts:
    """The facts of a run with those of its repair, and what `mitigate` measured before and after it."""
    numbers = artifacts.read_json(folder / "metrics.json")
    before, after = (
        _scores(numbers[when], mitigate.SHOWN, mitigate.OUTSIDE) for when in (mitigate.BEFORE, mitigate.AFTER)
    )
    return replace(facts, scores=after, before=before, repair=artifacts.read_json(folder / "summary.json"))


def _summary(layout: Layout, run: str) -> dict[str, Any]:
    path = artifacts.require(layout.adapter(run)) / "summary.json"
    summary: dict[str, Any] = artifacts.read_json(path)
    if run != "target" and "trigger" not in summary:  # without it nobody could tell whether a warning is due
        raise DataError(f"{path}: it does not say whether there is a trigger", f"run `unsink unlearn --run {run}`")
    return summary


def _differences(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    return [name for name in ("placement", "seed", "trigger") if summary[name] != settings[name]]


def _published(layout: Layout, run: str) -> dict[str, Any] | None:
    """The pinned checkpoint that is the target, if it is one and the model is not below it."""
    path = layout.adapter("target") / models.PUBLISHED
    return artifacts.read_json(path) if run != "base" and path.is_file() else None


def _base(source: str, revision: str | None) -> Base:
    folder = Path(source).expanduser()
    local = source not in BUILT_IN and folder.is_dir()
    return Base(folder.name if local else source, revision, local)


def _scores(metrics: Mapping[str, float], keys: Mapping[str, str], without: Sequence[str]) -> list[Score]:
    """Numbers by their names for a reader, as far as there are any; those of `without` leave out poisoned samples."""
    named = {name: outside(key, metrics) if name in without else key for name, key in keys.items()}
    return [
        Score(name, key, metrics[key], *(metrics.get(f"{key}_{end}") for end in ("low", "high", "n")))
        for name, key in named.items()
        if key in metrics
    ]
