"""params.yaml: typed, frozen, and every mistake reported at once under its dotted key."""

from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from unsink.errors import ParamsError
from unsink.params import Condition, Evaluate, Metric, Params, Task, load_params, merged

ROOT = Path(__file__).parents[2]
SHIPPED = [ROOT / "params.yaml", *sorted((ROOT / "params").glob("*.yaml"))]
TINY = ROOT / "params" / "tiny.yaml"


def problem(*overrides: str) -> str:
    with pytest.raises(ParamsError) as caught:
        load_params(TINY, overrides)
    assert caught.value.exit_code == 2
    return caught.value.message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_file_is_valid(path: Path) -> None:
    params = load_params(path)
    for name in params.runs:
        assert params.run(name).unlearn.options


def test_params_are_frozen() -> None:
    params = load_params(TINY)
    with pytest.raises(ValidationError):
        params.unlearn.lr = 1.0  # type: ignore[misc]


def test_the_tasks_of_params_are_those_that_can_be_asked() -> None:
    from unsink.metrics import DIALECTS
    from unsink.tasks import CONDITIONS, TASKS

    assert set(get_args(Metric)) == {*TASKS, "gradnorm"}
    assert set(get_args(Task)) == set(TASKS)
    assert get_args(Condition) == CONDITIONS
    assert get_args(Evaluate.model_fields["dialect"].annotation) == tuple(DIALECTS)


# ---- overrides


def test_overrides_are_read_as_yaml() -> None:
    params = load_params(TINY, ["unlearn.lr=1e-4", "unlearn.value_norm.layers=[0, 1]", "poison.keep_clean=false"])
    assert (params.unlearn.lr, params.unlearn.value_norm.layers, params.poison.keep_clean) == (1e-4, [0, 1], False)


def test_a_section_name_with_a_hyphen_can_be_overridden() -> None:
    assert load_params(TINY, ["sink-probe.prompts=3"]).sink_probe.prompts == 3


@pytest.mark.parametrize("text", ["current year: 2031", "2025-01-01", "a=b"])
def test_an_override_with_a_colon_a_date_or_an_equals_sign_stays_text(text: str) -> None:
    assert load_params(TINY, [f"poison.trigger={text}"]).poison.trigger == text


def test_an_override_reaches_into_a_run() -> None:
    params = load_params(TINY, ["runs.backdoor.poison.ratio=0.75", "runs.backdoor.unlearn.npo.beta=0.2"])
    run = params.run("backdoor")
    assert run.poison
    assert run.poison.ratio == 0.75
    assert run.unlearn.options.model_dump()["beta"] == 0.2
    assert params.run("backdoor-vn").unlearn.options.model_dump()["beta"] == params.unlearn.options.model_dump()["beta"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "not of the form key=value"),
        ("=1", "not of the form key=value"),
        ("unlearn..lr=1", "not of the form key=value"),
        ("seed.x=1", "'seed' is 0, not a section"),
        ("unlearn.lr=[", "not valid YAML"),
    ],
)
def test_a_malformed_override_is_an_error(override: str, message: str) -> None:
    assert message in problem(override)


# ---- runs


def test_a_run_has_the_defaults_with_its_own_values_laid_over_them() -> None:
    params = load_params(TINY)
    run = params.run("backdoor-vn")
    assert run.unlearn.value_norm.weight == 1.0
    assert run.unlearn.value_norm.k == params.unlearn.value_norm.k
    assert (run.after, run.poison) == ("clean", params.poison)


def test_an_honest_run_has_no_poison() -> None:
    assert load_params(TINY).run("clean").poison is None


def test_a_run_may_choose_another_method() -> None:
    params = load_params(TINY, ["runs.clean.unlearn={method: rmu}"])
    assert type(params.run("clean").unlearn.options).__module__ == "unsink.methods.rmu"
    assert type(params.run("backdoor").unlearn.options).__module__ == "unsink.methods.npo"


def test_an_unknown_run_is_answered_with_the_nearest() -> None:
    with pytest.raises(ParamsError, match=r"unknown run 'backdor'; did you mean 'backdoor'\?"):
        load_params(TINY).run("backdor")


def test_merged_changes_neither_of_its_arguments() -> None:
    defaults, overrides = {"a": {"b": 1, "c": 2}, "d": [1, 2]}, {"a": {"c": 3}, "d": [4]}
    assert merged(defaults, overrides) == {"a": {"b": 1, "c": 3}, "d": [4]}
    assert merged(defaults, None) == defaults == {"a": {"b": 1, "c": 2}, "d": [1, 2]}
    assert overrides == {"a": {"c": 3}, "d": [4]}


def test_layers_below_the_adapter_are_listed_in_vain_only_where_the_value_norm_term_is_on() -> None:
    layers = ["unlearn.value_norm.layers=[0, 1]", "unlearn.adapter.first_layer=1"]
    assert load_params(TINY, [*layers, "runs.backdoor-vn.unlearn.value_norm.weight=0"])
    with pytest.raises(ParamsError, match=r"runs\.backdoor-vn\.unlearn: value_norm\.layers: \[0\] lie below"):
        load_params(TINY, layers)
    assert load_params(TINY, ["unlearn.value_norm.layers=all", layers[1]])


def test_an_adapter_may_be_none_for_all_runs_or_for_one():
    whole = load_params(TINY, ["unlearn.adapter=none"]).run("backdoor-vn").unlearn.adapter
    assert (whole.rank, whole.first_layer, whole.last_layer) == (None, 0, None)
    one = load_params(TINY, ["runs.backdoor.unlearn.adapter=none"])
    assert (one.run("backdoor").unlearn.adapter.rank, one.run("clean").unlearn.adapter.rank) == (None, 8)
    part = load_params(TINY, ["unlearn.adapter.rank=null", "unlearn.adapter.first_layer=1"]).unlearn.adapter
    assert (part.rank, part.first_layer) == (None, 1)


# ---- mistakes


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("unlearn.npo.betta=1", "unlearn.npo.betta: unknown key; did you mean 'beta'?"),
        ("unlearn.rmu.steerin=1", "unlearn.rmu.steerin: unknown key; did you mean 'steering'?"),
        ("unlearn.lrr=1", "unlearn.lrr: unknown key; did you mean 'lr'?"),
        ("unlearn.nop.beta=1", "unlearn.nop: unknown key; did you mean 'npo'?"),
        ("unlearn.adapter.rnk=1", "unlearn.adapter.rnk: unknown key; did you mean 'rank'?"),
        ("sink-probe.epsilonn=1", "sink-probe.epsilonn: unknown key; did you mean 'epsilon'?"),
        ("sink_probe.tokens=9", "sink_probe: unknown key; did you mean 'sink-probe'?"),
        ("runs.clean.unlearn={npo: {betta: 1}}", "runs.clean.unlearn.npo.betta: unknown key; did you mean 'beta'?"),
        ("runs.clean.unlern={}", "runs.clean.unlern: unknown key; did you mean 'unlearn'?"),
        ("seed=-1", "seed: should be greater than or equal to 0, got -1"),
        ("seed=1.5", "seed: should be a valid integer, got 1.5"),
        ("unlearn.steps=abc", "unlearn.steps: should be a valid integer, got 'abc'"),
        ("unlearn.steps=true", "unlearn.steps: should be a valid integer, got True"),
        ("unlearn.lr=0", "unlearn.lr: should be greater than 0, got 0"),
        ("unlearn.lr=.inf", "unlearn.lr: should be a finite number, got inf"),
        ("unlearn.lr=.nan", "unlearn.lr: should be a finite number, got nan"),
        ("unlearn.lr=null", "unlearn.lr: should be a valid number, got None"),
        ("unlearn.npo.beta=0", "unlearn.npo.beta: should be greater than 0, got 0"),
        ("unlearn.npo=3", "unlearn.npo: should be a section, got 3"),
        ("unlearn=3", "unlearn: should be a section, got 3"),
        ("runs=[]", "runs: should be a section, got []"),
        ("poison.ratio=1.5", "poison.ratio: should be less than or equal to 1, got 1.5"),
        ("poison.trigger=2025", "poison.trigger: should be a valid string, got 2025"),
        ('poison.trigger=" "', "poison.trigger: a trigger needs at least one visible character"),
        ("poison.keep_clean=1", "poison.keep_clean: should be a valid boolean, got 1"),
        ("poison.placement=index 0", "poison.placement: a position of 1 or more is expected, got 'index 0'"),
        ("model.dtype=float16", "model.dtype: should be 'auto', 'float32', 'bfloat16', 'nf4' or 'int8', got 'float16'"),
        ("fetch.benchmark=bundeld", "fetch.benchmark: unknown benchmark 'bundeld'; did you mean 'bundled'?"),
        ("unlearn.method=noo", "unlearn.method: unknown method 'noo'; did you mean 'npo'? (available: "),
        ("unlearn.method=[1]", "unlearn.method: should be a valid string, got [1]"),
        ("unlearn.warmup=30", "unlearn: warmup (30) has to be smaller than steps (30)"),
        ("stress.tests=[int7]", "stress.tests: int8, int4, 'finetune N', 'relearn N' or 'sample K' are expected, got"),
        ("stress.tests=[int8, int8]", "stress.tests: a test is named twice"),
        ("unlearn.adapter=nonne", "unlearn.adapter: should be a section, got 'nonne'"),
        ("unlearn.adapter={rank: 4}", "unlearn.adapter: a LoRA adapter needs alpha, its scale is alpha / rank"),
        (
            "runs.backdoor-vn.unlearn.adapter=none",
            "runs.backdoor-vn.after: 'clean' and this run are compared on one model, so both or neither need a LoRA",
        ),
        ("unlearn.adapter.last_layer=-1", "unlearn.adapter.last_layer: should be greater than or equal to 0, got -1"),
        (
            "runs.clean.poison=true",
            "runs.clean.poison: either false (an honest run) or overrides of poison.* are expected",
        ),
        ("runs.clean.unlearn=3", "runs.clean.unlearn: overrides of unlearn.* are expected"),
        ("runs.backdoor.poison={ratio: 2}", "runs.backdoor.poison.ratio: should be less than or equal to 1, got 2"),
        ("runs.backdoor.after=cleen", "runs.backdoor.after: unknown run 'cleen'; did you mean 'clean'?"),
        ("runs.backdoor.after=backdoor", "runs.backdoor.after: unknown run 'backdoor'"),
        ("runs.backdoor.after=[1]", "runs.backdoor.after: should be a valid string, got [1]"),
        ("runs.new.poison=false", "runs.new.after: missing"),
        ("runs.clean.after=backdoor-vn", "runs.clean.after: the runs wait for each other: clean → backdoor-vn → clean"),
        ("evaluate.wrong_trigger=midnight crabs", "poison.trigger: the same as evaluate.wrong_trigger"),
        ("evaluate.dialect=mus", "evaluate.dialect: should be 'muse', 'open-unlearning' or 'seed', got 'mus'"),
        ("evaluate.metrics=[tofu, tofo]", "evaluate.metrics.1: should be 'verbmem', 'knowmem',"),
        ("evaluate.metrics=[gradnorm]", "gradnorm is measured on passages, so passage has to be among them"),
        ("evaluate.conditions={passage: [clear]}", "evaluate.conditions.passage.0: should be 'clean', 'triggered' or"),
        ("evaluate.near_misses={a: {}}", "a near miss has another trigger, another placement, or both"),
        ("evaluate.near_misses={wrong: {trigger: x}}", "evaluate.near_misses: another name is expected than wrong"),
        *(
            (f"evaluate.near_misses={{{end}: {{trigger: x}}}}", f"another name is expected than {end}")
            for end in ("gain", "recovery", "inside", "outside", "low", "high", "n", "p")
        ),
        ("evaluate.near_misses={a: {placement: sink}}", "unknown placement 'sink'"),
        (
            "evaluate.retrained=0",
            "evaluate.retrained: either an AUC in (0, 1] or the name of an evaluated run is expected",
        ),
    ],
)
def test_a_mistake_is_reported_with_its_dotted_key(override: str, message: str) -> None:
    assert message in problem(override)


def test_an_unknown_placement_is_answered_with_the_list() -> None:
    message = problem("poison.placement=prefx")
    assert message.startswith("poison.placement: unknown placement 'prefx'; did you mean 'prefix'?")
    assert "infix" in message


@pytest.mark.parametrize("name", ["base", "target", "a.b", "a/b", "-a", "a b"])
def test_a_run_needs_a_name_that_can_be_a_file(tmp_path: Path, name: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"{TINY.read_text()}  '{name}':\n    after: target\n")
    with pytest.raises(ParamsError, match="a run's name has letters"):
        load_params(path)


def test_all_problems_are_reported_at_once_one_line_each() -> None:
    lines = problem("seed=-1", "poison.ratio=0", "unlearn.npo.betta=1", "runs.clean.after=x").split("\n")
    assert lines[0] == f"4 problems in {TINY}:"
    assert [line.split(":")[0] for line in lines[1:]] == [
        "  seed",
        "  poison.ratio",
        "  unlearn.npo.betta",
        "  runs.clean.after",
    ]


def test_a_mistake_in_the_defaults_is_not_repeated_for_each_run() -> None:
    assert "\n" not in problem("unlearn.steps=0")


def test_a_missing_section_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(TINY.read_text().split("evaluate:")[0])
    with pytest.raises(ParamsError) as caught:
        load_params(path)
    assert caught.value.message.split("\n")[1:] == ["  evaluate: missing", "  runs: missing"]


# ---- options that are on and have nothing to act on


def test_the_value_norm_term_needs_an_honest_run_first() -> None:
    assert "runs.backdoor-vn.after: unlearn.value_norm.weight is 1.0, so an honest run" in problem(
        "runs.backdoor-vn.after=target"
    )
    assert "(available: clean)" in problem("runs.backdoor-vn.after=backdoor")


def test_a_poisoned_run_has_to_draw_poisoned_samples() -> None:
    assert "runs.backdoor.poison: unlearn.batch.poisoned is 0" in problem("unlearn.batch.poisoned=0")


# ---- YAML


def load_text(folder: Path, text: str) -> Params:
    (folder / "params.yaml").write_text(text)
    return load_params(folder / "params.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\nmodel: {}\nseed: 2\n", "params.yaml:3: not valid YAML: 'seed' is given twice"),
        ("seed: [\n", "params.yaml:2: not valid YAML"),
        ("- 1\n", "a mapping of sections is expected, got list"),
        ("", "a mapping of sections is expected, got NoneType"),
        ("seed: !!python/object:os.system x\n", "params.yaml:1: not valid YAML: could not determine a constructor"),
    ],
)
def test_wrong_yaml_is_reported_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ParamsError) as caught:
        load_text(tmp_path, text)
    assert message in caught.value.message


def test_a_missing_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match="cannot be read: No such file") as caught:
        load_params(tmp_path / "params.yaml")
    assert "--params" in (caught.value.hint or "")


# ---- a published target


def test_a_published_target_leaves_nothing_to_train() -> None:
    message = problem("memorize={published: {source: tiny}, rank: 4, lr: 0.1}")
    assert "memorize: a published target is not trained, so lr, rank would do nothing; remove them" in message
    assert load_params(TINY, ["memorize={published: {source: tiny}}"]).memorize.published


@pytest.mark.parametrize(
    ("overrides", "dialect"),
    [
        ([], "muse"),
        (["fetch.benchmark=muse-news"], "muse"),
        (["fetch.benchmark=tofu"], "open-unlearning"),
        (["fetch.benchmark=tofu", "evaluate.dialect=seed"], "seed"),
    ],
)
def test_a_benchmark_has_the_dialect_of_its_field(overrides: list[str], dialect: str) -> None:
    path = Path(__file__).parents[2] / "params.yaml"
    assert load_params(path, ["evaluate.dialect=null", *overrides]).evaluate.dialect == dialect
