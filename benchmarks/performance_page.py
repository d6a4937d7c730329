"""The table and the page of `make bench`, from its numbers alone."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

Numbers = dict[str, Any]

DEFAULTS: Numbers = {"model": "embedded", "dtype": "auto", "device": "cpu", "joined": 1, "batch": 6}
"""Options of performance.py that make its workload."""
STEPS, SAMPLES = 120, 306
"""Of a run with the parameters as they come; what we compute once per sample is shared out over the steps."""


class Target(NamedTuple):
    """A quantity, its bounds, and whether it should be large."""

    cpu: float
    gpu: float
    large: bool = True


TARGETS = {
    "npo": Target(3, 3),
    "rmu": Target(5, 5),
    "evaluation": Target(10, 10),
    "memory": Target(0.45, 0.35, large=False),
    "share": Target(0.70, 0.45),
}
NAMES = {
    "npo": "training step, NPO + KL + value norm",
    "rmu": "training step, RMU",
    "evaluation": "evaluation, KnowMem + VerbMem, clean and triggered",
}
UNITS = {"forget set": "passages", "sequence length": "passages in one", "batch": "of each kind", "model size": ""}
"""What grows, and what it is counted in."""
SIZES = ("embedded", "360m")
"""Models by size."""

Row = tuple[str, str, str, str, str, str]
HEAD: Row = ("what", "plain", "ours", "ratio", "target", "reached")


def rows(result: Numbers) -> list[Row]:
    """What was measured, a line each."""
    parts, gpu = result["parts"], _on_gpu(result)
    found = []
    for name in ("npo", "rmu", "evaluation"):
        part = parts[name]
        times = f"{part['ratio']:.1f} ×"
        found.append(
            (NAMES[name], _seconds(part["plain"]), _seconds(part["ours"]), times, *_reached(name, part["ratio"], gpu))
        )
    for name in ("npo", "rmu", "evaluation"):
        plain, ours = (parts[f"memory {name} {who}"]["peak_mib"] for who in ("plain", "ours"))
        what = f"peak memory, {NAMES[name]}"
        share = ours / plain
        reached = (
            ("", "") if name == "evaluation" else _reached("memory", share, gpu)
        )  # one prompt needs less than many
        found.append((what, f"{plain:.0f} MiB", f"{ours:.0f} MiB", f"{share:.2f} ×", *reached))
    for name in ("npo", "rmu"):
        part, ours = parts[name], parts[f"share {name}"]["share"]
        plain = part["needed_gflop_per_step"] / part["plain"]["median"] / part["gemm_gflops"]["median"]
        cells = f"{plain:.2f}", "{median:.3f} ({least:.2f}–{most:.2f})".format(**ours)
        what = f"share of the GEMM peak, {NAMES[name]}"
        found.append((what, *cells, "", *_reached("share", ours["median"], gpu)))
    return found


def _on_gpu(result: Numbers) -> bool:
    return bool(result["machine"]["device"] != "cpu")


def table(result: Numbers) -> str:
    """The rows for a terminal."""
    lines = [HEAD, *rows(result)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEAD))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def page(result: Numbers) -> str:
    """The page in Markdown."""
    return "\n".join(_page(result)) + "\n"


def _page(result: Numbers) -> Iterator[str]:
    parts, machine, gpu = result["parts"], result["machine"], _on_gpu(result)
    yield "# Speed and memory"
    yield ""
    yield f"Made by `{_command(result)}` from `performance.json` beside it, not by hand."
    yield ""
    known = ", ".join(name.replace("_", "-").upper() for name in machine["instructions"]) or "no vector extension named"
    yield (
        f"Machine: {machine['device']}, {machine['processor']}, {machine['cores']} cores with {known}; "
        f"numbers of type {machine['dtype']}. Model: `{result['workload']['model']}`."
    )
    if earlier := result.get("earlier"):
        yield f"Of an earlier revision, measured another day: {', '.join(earlier)}."
    if not gpu:
        yield "What was measured on a GPU, with a larger model and more tokens in a step: [scale](../scale.md#one-gpu)."
    yield ""
    yield "| " + " | ".join(HEAD) + " |"
    yield "|---|---|---|---|---|---|"
    for row in rows(result):
        yield "| " + " | ".join(row) + " |"
    yield ""
    yield from _explained(parts, gpu)
    if _grew(parts):
        yield from _growth(parts)


def _command(result: Numbers) -> str:
    """What was typed; options that were left alone are left out."""
    options = [f"--{name} {value}" for name, value in result["workload"].items() if value != DEFAULTS[name]]
    return " ".join(["python benchmarks/performance.py", *options, *(["--growth"] if _grew(result["parts"]) else [])])


def _grew(parts: Numbers) -> bool:
    """Whether growth was measured, too."""
    return any(name.startswith("growth") for name in parts)


def _explained(parts: Numbers, gpu: bool) -> Iterator[str]:
    npo, rmu, evaluation, gemm = parts["npo"], parts["rmu"], parts["evaluation"], parts["gemm"]
    yield "## How it was measured"
    yield ""
    yield (
        "- **Plain**: `benchmarks/plain.py`, the work as published code does it. Policy, reference and unlearned model "
        "are three models (two for RMU); each kind of samples has a pass of its own in each of them, at every step, "
        "with the hidden states of all layers and full logits. Prompts are answered one by one with the library's "
        "`generate`."
    )
    yield (
        "- **Ours**: the functions behind `unsink unlearn` and `unsink evaluate`. Both train the same adapter on the "
        "same samples in the same order, in one process, a step each in turn; times are medians (least to most)."
    )
    apart = [part["largest_relative_difference_of_losses"] for part in (npo, rmu)]
    yield (
        f"- **Equal numbers**, or the command fails: losses differ by at most {apart[0]:.1e} (NPO) and {apart[1]:.1e} "
        f"(RMU) of their size in {npo['ours']['n'] + 1} steps; {evaluation['texts_different']} of "
        f"{evaluation['texts_compared']} greedy texts differ."
    )
    for name, part in (("NPO", npo), ("RMU", rmu)):
        each = part["once_seconds"] / part["once_samples"]
        whole = part["plain"]["median"] * STEPS / (part["ours"]["median"] * STEPS + SAMPLES * each)
        yield (
            f"- **Once per run**, {name}: ours reads each sample once with the target, {each:.3f} s each. With the "
            f"{SAMPLES} samples and {STEPS} steps of the project as it comes, that makes {whole:.1f} × for a training."
        )
    yield (
        f"- **Evaluation**: {evaluation['prompts']} prompts. Ours answers all of them each time; the plain path "
        f"{evaluation['plain_prompts_each_time']}, others each time, and its time is scaled up group by group."
    )
    resident = (
        "largest resident memory of a process that does nothing else, its libraries "
        f"({parts['memory npo ours']['libraries_mib']:.0f} MiB) and the loading of the model included"
    )
    given = "the most that was allocated on the GPU by a process that does nothing else, the loading included"
    yield f"- **Memory**: {given if gpu else resident}."
    alone = [parts[f"share {name}"] for name in ("npo", "rmu")]
    peaks = " and ".join("{median:.0f} ({least:.0f}–{most:.0f})".format(**part["gemm_gflops"]) for part in alone)
    seconds = " and ".join(_seconds(part["seconds"]) for part in alone)
    square, own = gemm["square_gflops"], gemm["own_gflops"]
    yield (
        f"- **GEMM peak**: the best of twelve products of {_shape(gemm['square_shape'])}, measured after each step, of "
        "which each has its share, since the machine's speed moves. Our share is that of a process that trains as a "
        f"user does, without the plain path: {alone[0]['share']['n']} steps of NPO and {alone[1]['share']['n']} of RMU "
        f"took {seconds}, with peaks of {peaks} GFLOP/s. In a process of its own the peak was {square:.0f}, and "
        f"{own:.0f} at a shape of the model's own, {_shape(gemm['own_shape'])}. "
        f"Needed per step, {npo['real_tokens_per_step']:.0f} tokens: "
        f"{npo['needed_gflop_per_step']:.0f} GFLOP (NPO), {rmu['needed_gflop_per_step']:.0f} (RMU): forward and "
        "backward pass of the adapted layers on real tokens, and logits at labelled ones. Nothing is counted that is "
        "the same at each step. The reference's logits, made again from its last states, would add "
        f"{npo['reference_logits_gflop_per_step']:.0f} (NPO)."
    )
    yield ""


def _growth(parts: Numbers) -> Iterator[str]:
    yield "## Growth"
    yield ""
    yield (
        "Each side in a process of its own, so not in turns. As above, the project has 16 passages in each set where a "
        "row does not say otherwise, for the evaluation 50; the corpus that comes with unsink has 50 to forget."
    )
    for label, name in (("", "npo"), ("rmu ", "rmu")):
        yield ""
        yield f"{NAMES[name][0].upper()}{NAMES[name][1:]}:"
        yield ""
        yield "| what grows | to | plain | ours | ratio | plain, peak | ours, peak | ratio |"
        yield "|---|---|---|---|---|---|---|---|"
        for axis, size, plain in _points(parts, f"growth {label}", " plain"):
            ours = parts[f"growth {label}{axis} {size} ours"]
            less = ours["peak_mib"] / plain["peak_mib"]
            yield (
                f"| {axis} | {size} {UNITS[axis]} | {_times(plain['seconds'], ours['seconds'])} "
                f"| {plain['peak_mib']:.0f} MiB | {ours['peak_mib']:.0f} MiB | {less:.2f} × |"
            )
    yield ""
    yield (
        "Evaluation, once; the plain path answers as many prompts as texts are compared, and its time is scaled up. "
        "With the forget set only the passages to continue grow; the questions are those of the 50:"
    )
    yield ""
    yield "| what grows | to | prompts | plain | ours | ratio | texts that differ |"
    yield "|---|---|---|---|---|---|---|"
    for axis, size, both in _points(parts, "growth evaluation ", ""):
        times = _times(both["plain"]["median"], both["ours"]["median"])
        differ = f"{both['texts_different']} of {both['texts_compared']}"
        yield f"| {axis} | {size} {UNITS[axis]} | {both['prompts']} | {times} | {differ} |"
    yield ""


def _points(parts: Numbers, start: str, end: str) -> list[tuple[str, str, Numbers]]:
    """(what grows, to, numbers) of the parts whose name is that between this start and this end, in order."""
    found = []
    for name, numbers in parts.items():
        axis, _, size = name.removeprefix(start).removesuffix(end).rpartition(" ")
        if name.startswith(start) and name.endswith(end) and axis in UNITS:
            place = int(size) if size.isdigit() else list(SIZES).index(size)
            found.append((list(UNITS).index(axis), place, (axis, size, numbers)))
    return [point for *_, point in sorted(found, key=lambda one: one[:2])]


def _times(plain: float, ours: float) -> str:
    return f"{plain:.2f} s | {ours:.2f} s | {plain / ours:.1f} ×"


def _seconds(numbers: Numbers) -> str:
    return f"{numbers['median']:.2f} s ({numbers['least']:.2f}–{numbers['most']:.2f})"


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(str(size) for size in shape)


def _reached(name: str, value: float, gpu: bool) -> tuple[str, str]:
    target = TARGETS[name]
    bound = target.gpu if gpu else target.cpu
    sign, good = ("≥", value >= bound) if target.large else ("≤", value <= bound)
    return f"{sign} {bound:g}", "yes" if good else "no"
