"""`unsink sink-probe --run A --against B`: the value norms of two probed models beside each other.

No model is run: what both probes saved is compared, on the prompts that both have read. Runs whose triggers or
placements differ share the prompts without a trigger alone.

`probes/<A>.against.<B>/` gets comparison.json and value_norms.png and .svg; `dvc repro` neither makes nor removes it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from statistics import fmean
from typing import Any

from unsink import artifacts, figures
from unsink.artifacts import Layout
from unsink.errors import ParamsError
from unsink.params import RESERVED, Params
from unsink.probe import Statistics
from unsink.progress import SILENT, Reporter
from unsink.stages.sink_probe import MAPS, STATISTICS, compare, norm_panels, rounded


def run(params: Params, layout: Layout, *, run: str, against: str, reporter: Reporter = SILENT) -> dict[str, Any]:
    """Write `probes/<run>.against.<against>/`; return correlations and norms as means over positions.

    Args:
        params: all parameters.
        layout: the project folder.
        run: an entry of `runs:`, or `base` or `target`.
        against: another one.
        reporter: is told which prompts cannot be compared.

    Raises:
        ParamsError: no such run, the same one twice, or their probes read different prompts or different models.
        MissingPrerequisite: one of them was not probed.
        DataError: a file of a probe is damaged.
    """
    names = (run, against)
    for name in {*names} - {*RESERVED}:
        params.run(name)
    if run == against:
        raise ParamsError(f"--against: {against!r} is the run itself", "name another run, or base or target")
    found = {name: artifacts.read_json(layout.probe(name) / STATISTICS) for name in names}
    conditions = _shared(found)
    if "triggered" not in conditions:
        reporter.log(f"sink-probe: triggers of {run} and {against} differ, so prompts without one alone are compared")
    ours, theirs = (_saved(layout, name, conditions) for name in names)

    panels = norm_panels(run, ours, {against: theirs})
    result = {
        condition: {**numbers, "value_norm": {name: rounded(norm.tolist()) for name, norm in panel.magnitude.items()}}
        for (condition, numbers), panel in zip(compare(ours, theirs).items(), panels, strict=True)
    }
    folder = layout.probe(f"{run}.against.{against}")  # no run can have such a name
    with artifacts.lock(folder), artifacts.new_dir(folder) as new:
        artifacts.write_json(new / "comparison.json", {"run": run, "against": against, **result})
        figures.save(figures.value_norms(run, panels, found[run]["trigger"]["span"]), new / "value_norms")
    means = {condition: _means(numbers) for condition, numbers in result.items()}
    return {"run": run, "against": against, "output": f"probes/{folder.name}", **means}


def _shared(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The conditions whose prompts both probes have read, in models of one shape."""
    again = " and ".join(f"`unsink sink-probe --run {name}`" for name in found)
    shapes = {name: {key: one[key] for key in ("layers", "kv_heads")} for name, one in found.items()}
    digests = [one.get("prompts_sha256", {}) for one in found.values()]
    shared = [condition for condition in ("clean", "triggered") if len({one.get(condition) for one in digests}) == 1]
    if not all(digests) or "clean" not in shared:
        told = ", ".join(f"{name} {one['prompts']} of {one['tokens']} tokens" for name, one in found.items())
        raise ParamsError(f"--against: the two probes did not read the same prompts: {told}", f"run {again} once more")
    if len({tuple(shape.values()) for shape in shapes.values()}) > 1:
        raise ParamsError(f"--against: the two probes are of different models: {shapes}", f"run {again} once more")
    return shared


def _saved(layout: Layout, name: str, conditions: Sequence[str]) -> dict[str, Statistics]:
    """Condition -> what a probe saved of it; attention maps are left out, of which it saved means alone."""
    tensors = artifacts.read_tensors(layout.probe(name) / MAPS)
    arrays = [field.name for field in fields(Statistics) if field.name != "attention"]
    return {one: Statistics(**{key: tensors[f"{one}.{key}"] for key in arrays}, attention=None) for one in conditions}


def _means(numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Means over positions; norms also at position 0."""
    norms: Mapping[str, list[float]] = numbers["value_norm"]
    return {
        **{name: _mean(numbers[name]) for name in ("pearson", "spearman")},
        "value_norm": {name: _mean(norm) for name, norm in norms.items()},
        "bos_value_norm": {name: norm[0] for name, norm in norms.items()},
    }


def _mean(numbers: Sequence[float | None]) -> float | None:
    there = [number for number in numbers if number is not None]
    return rounded(fmean(there)) if there else None
