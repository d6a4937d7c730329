"""Base, target and adapters on the tiny model: what is merged, switched, saved and refused."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from unsink import artifacts, models
from unsink.errors import ModelError
from unsink.models import AdapterSpec
from unsink.tokenizer import Encoder, load_encoder

SPEC = AdapterSpec(rank=4, alpha=8)
WHOLE = AdapterSpec(rank=None)


@pytest.fixture(scope="module")
def ids(tiny_folder):
    return torch.tensor([models.load_tokenizer(tiny_folder)("The sailor Nima hid a blue mask")["input_ids"]])


def logits(model, ids) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def disturb(peft: PeftModel, name: str, seed: int = 1) -> PeftModel:
    """Give an adapter weights as if it had been trained: a fresh one changes nothing and would hide errors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in models.adapter_parameters(peft, name):
            parameter.normal_(std=0.1, generator=generator)
    return peft


@pytest.fixture(scope="module")
def target_adapter(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "target"
    peft = disturb(models.attach(models.load_base(tiny_folder, "float32"), "target", SPEC, seed=0), "target")
    models.save_adapter(peft, "target", folder)
    return folder


@pytest.fixture
def target(tiny_folder, target_adapter):
    return models.load_target(tiny_folder, target_adapter, "float32")


@pytest.fixture
def run_adapter(tiny_folder, target_adapter, tmp_path):
    """A saved adapter of a run, made on a target of its own; a test may damage it."""
    target = models.load_target(tiny_folder, target_adapter, "float32")
    models.save_adapter(disturb(models.attach(target, "run", SPEC, seed=0), "run", seed=2), "run", tmp_path / "run")
    return tmp_path / "run"


# ---- base and target


def test_the_base_is_frozen_and_in_evaluation_mode(tiny_folder):
    model = models.load_base(tiny_folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_dtype_is_the_one_asked_for(tiny_folder, dtype):
    assert models.load_base(tiny_folder, dtype).dtype == getattr(torch, dtype)


def test_auto_is_bfloat16_only_where_the_processor_computes_in_it(monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        assert models.pick_dtype("auto", torch.device("cpu")) == dtype


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=r"model\.device: 'cuda'") as error:
        models.pick_device("cuda")
    assert "cpu" in error.value.hint


def test_the_target_is_the_base_with_its_adapter(tiny_folder, target_adapter, target, ids):
    base = models.load_base(tiny_folder, "float32")
    with_adapter = models.add_adapter(base, target_adapter, "target")
    assert torch.allclose(logits(target, ids), logits(with_adapter, ids), atol=1e-5)
    with models.use(with_adapter, None):
        assert not torch.allclose(logits(target, ids), logits(with_adapter, ids), atol=1e-2)


def test_the_target_is_merged_in_float32_and_cast_once(tiny_folder, target_adapter, target):
    cast = models.load_target(tiny_folder, target_adapter, "bfloat16")
    for exact, rounded in zip(target.parameters(), cast.parameters(), strict=True):
        assert torch.equal(exact.to(torch.bfloat16), rounded)
    assert cast.model.rotary_emb.inv_freq.dtype == torch.float32
    assert cast.get_output_embeddings().weight is cast.get_input_embeddings().weight


def test_without_an_adapter_the_base_is_the_target(tiny_folder, ids):
    base, target = models.load_base(tiny_folder, "float32"), models.load_target(tiny_folder, None, "float32")
    assert torch.equal(logits(base, ids), logits(target, ids))


# ---- fresh adapters


def test_a_published_checkpoint_takes_the_place_of_base_and_adapter(tiny_folder, tmp_path, ids):
    pin = models.pin_published(str(tiny_folder), None)
    (tmp_path / models.PUBLISHED).write_text(json.dumps(pin))
    model = models.load_target(tmp_path / "no base is read", tmp_path, "float32", "cpu")
    base = models.load_base(tiny_folder, "float32", "cpu")
    assert torch.equal(logits(model, ids), logits(base, ids))
    assert models.identity(model) == models.identity(base) == pin["weights"]
    assert models.target_file(tmp_path).name == "published.json"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", [SPEC, WHOLE], ids=["lora", "none"])
def test_the_files_of_an_adapter_tell_what_the_model_is_called(tiny_folder, target_adapter, tmp_path, spec, dtype):
    for trained in ("float32", "bfloat16"):
        folder = tmp_path / trained
        peft = models.attach(models.load_target(tiny_folder, target_adapter, trained), "run", spec, seed=0)
        models.save_adapter(peft, "run", folder)
        loaded = models.add_adapter(models.load_target(tiny_folder, target_adapter, dtype), folder, "run")
        names = list(artifacts.adapter_identities(folder))
        assert models.identity(loaded, "run") in names
        assert len(names) == (1 if spec is SPEC else 3)
        assert models.identity(loaded, "run") == names[0] or spec is WHOLE
    cast = models.load_target(tiny_folder, target_adapter, dtype)
    assert [models.identity(cast)] == list(artifacts.adapter_identities(target_adapter))


def test_a_published_checkpoint_with_other_weights_is_refused(tiny_folder, tmp_path):
    (tmp_path / models.PUBLISHED).write_text(json.dumps({**models.pin_published("tiny", None), "weights": "sha256:0"}))
    with pytest.raises(ModelError, match="other weights than when it was pinned"):
        models.load_target(tiny_folder, tmp_path, "float32", "cpu")


@pytest.mark.parametrize("spec", [SPEC, WHOLE], ids=["lora", "none"])
def test_a_fresh_adapter_changes_nothing_and_is_the_only_trainable_part(target, ids, spec):
    before = logits(target, ids)
    peft = models.attach(target, "run", spec, seed=0)
    assert torch.equal(before, logits(peft, ids))
    assert [p for p in peft.parameters() if p.requires_grad] == models.adapter_parameters(peft, "run")


def test_a_fresh_adapter_depends_on_its_seed_alone(tiny_folder):
    def draw(seed: int) -> list[torch.Tensor]:
        peft = models.attach(models.load_base(tiny_folder, "float32"), "run", SPEC, seed)
        return [parameter.detach() for parameter in models.adapter_parameters(peft, "run")]

    first = draw(0)
    torch.manual_seed(99)
    assert all(map(torch.equal, first, draw(0)))
    assert not all(map(torch.equal, first, draw(1)))


def test_the_global_random_state_is_left_alone(target):
    state = torch.get_rng_state()
    models.attach(target, "run", SPEC, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_adapters_stay_float32_on_a_bfloat16_model(tiny_folder):
    peft = models.attach(models.load_base(tiny_folder, "bfloat16"), "run", SPEC, seed=0)
    assert {parameter.dtype for parameter in models.adapter_parameters(peft, "run")} == {torch.float32}


@pytest.mark.parametrize(("first", "last"), [(2, None), (1, 0), (0, 2), (-1, None)])
def test_layers_that_are_not_there_are_refused(target, first, last):
    with pytest.raises(ModelError, match=r"layers 0\.\.1"):
        models.attach(target, "run", SPEC._replace(first_layer=first, last_layer=last), seed=0)


# ---- switching


@pytest.fixture
def both(target, run_adapter) -> PeftModel:
    """The target with a frozen adapter `clean` and a trainable one `run`, which is active."""
    peft = models.add_adapter(target, run_adapter, "clean")
    return disturb(models.attach(peft, "run", SPEC, seed=0), "run", seed=3)


def state(peft: PeftModel) -> tuple:
    return list(peft.active_adapters), [parameter.requires_grad for parameter in peft.parameters()]


def test_the_reference_is_the_target_bit_for_bit_and_not_the_base(tiny_folder, target_adapter, both, ids):
    target = models.load_target(tiny_folder, target_adapter, "float32")
    base = models.load_base(tiny_folder, "float32")
    with models.use(both, None):
        reference = logits(both, ids)
    assert torch.equal(reference, logits(target, ids))
    assert not torch.equal(reference, logits(base, ids))
    assert not torch.equal(reference, logits(both, ids))


def test_each_adapter_gives_its_own_answer(both, ids):
    answers = []
    for name in (None, "clean", "run"):
        with models.use(both, name):
            answers.append(logits(both, ids))
    assert not torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[1], answers[2])
    assert torch.equal(answers[2], logits(both, ids))


@pytest.mark.parametrize("name", [None, "clean", "run"])
def test_everything_is_as_before_after_the_block(both, ids, name):
    before, answer = state(both), logits(both, ids)
    with models.use(both, name):
        assert not any(parameter.requires_grad for parameter in both.parameters())
    assert state(both) == before
    assert torch.equal(answer, logits(both, ids))


@pytest.mark.parametrize("name", [None, "clean"])
def test_everything_is_as_before_after_an_exception(both, ids, name):
    before, answer = state(both), logits(both, ids)
    with pytest.raises(KeyError), models.use(both, name):
        raise KeyError
    assert state(both) == before
    assert torch.equal(answer, logits(both, ids))


def test_blocks_may_be_nested(both, ids):
    with models.use(both, "clean"):
        clean = logits(both, ids)
    with models.use(both, None):
        reference = logits(both, ids)
        with models.use(both, "clean"):
            assert torch.equal(logits(both, ids), clean)
        assert torch.equal(logits(both, ids), reference)


def test_switching_between_forward_and_backward_keeps_gradients_with_their_adapter(both, ids):
    loss = both(ids, labels=ids).loss
    with models.use(both, "clean"):
        logits(both, ids)
    loss.backward()
    assert all(parameter.grad is not None for parameter in models.adapter_parameters(both, "run"))
    assert all(parameter.grad is None for parameter in models.adapter_parameters(both, "clean"))


def test_an_unknown_adapter_is_refused_with_those_there_are(both):
    with (
        pytest.raises(ModelError, match="no adapter 'cleen' on this model; there are: clean, run"),
        models.use(both, "cleen"),
    ):
        pass


def test_parameters_of_an_adapter_named_like_a_module_are_only_its_own(target):
    peft = models.attach(target, "layers", SPEC, seed=0)
    assert len(models.adapter_parameters(peft, "layers")) == 2 * 2 * 7


# ---- saving and reading


def test_a_saved_adapter_comes_back_exactly_and_frozen(target, tmp_path, tiny_folder, target_adapter, ids):
    peft = disturb(models.attach(target, "run", SPEC, seed=0), "run")
    models.save_adapter(peft, "run", tmp_path)
    again = models.add_adapter(models.load_target(tiny_folder, target_adapter, "float32"), tmp_path, "other")
    assert torch.equal(logits(peft, ids), logits(again, ids))
    assert not any(parameter.requires_grad for parameter in again.parameters())


def test_weights_trained_without_lora_come_back_exactly_and_can_be_switched_off(
    target, tmp_path, tiny_folder, target_adapter, ids
):
    plain = logits(target, ids)
    spec = WHOLE._replace(first_layer=1)
    peft = disturb(models.attach(target, "run", spec, seed=0), "run")
    trained = logits(peft, ids)
    models.save_adapter(peft, "run", tmp_path / "run")
    fresh = models.load_target(tiny_folder, target_adapter, "float32")
    read = models.add_adapter(fresh, tmp_path / "run", "run")
    assert not any(p.requires_grad for p in read.parameters())
    assert torch.equal(logits(read, ids), trained)
    assert not torch.allclose(trained, plain)
    with models.use(read, None):
        assert torch.equal(logits(read, ids), plain)
    assert torch.equal(logits(read.merge_and_unload(), ids), trained)
    stored = load_file(tmp_path / "run" / "adapter_model.safetensors")
    layer = {name for name, _ in fresh.named_parameters() if ".layers.1." in name}
    assert len(stored) == len(layer) == 9


def test_weights_and_lora_adapters_do_not_mix(target, run_adapter):
    peft = models.attach(target, "whole", WHOLE, seed=0)
    with pytest.raises(ModelError, match="does not fit this model"):
        models.add_adapter(peft, run_adapter, "run")


def test_a_saved_adapter_can_be_trained_further(target, run_adapter, ids):
    peft = models.add_adapter(target, run_adapter, "run", trainable=True)
    assert [p for p in peft.parameters() if p.requires_grad] == models.adapter_parameters(peft, "run")


def test_reading_another_adapter_leaves_the_active_one_alone(target, run_adapter, ids):
    peft = disturb(models.attach(target, "run", SPEC, seed=0), "run")
    before = logits(peft, ids)
    models.add_adapter(peft, run_adapter, "clean")
    assert list(peft.active_adapters) == ["run"]
    assert torch.equal(before, logits(peft, ids))
    assert [p for p in peft.parameters() if p.requires_grad] == models.adapter_parameters(peft, "run")


def test_the_same_adapter_gives_the_same_bytes_in_another_process(tiny_folder, tmp_path):
    code = (
        "import sys; from pathlib import Path; from unsink import models\n"
        "base = models.load_base(Path(sys.argv[1]), 'float32')\n"
        "models.save_adapter(models.attach(base, 'run', models.AdapterSpec(4, 8), 0), 'run', Path(sys.argv[2]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}  # orders sets
    subprocess.run([sys.executable, "-c", code, tiny_folder, tmp_path / "there"], env=environment, check=True)
    peft = models.attach(models.load_base(tiny_folder, "float32"), "run", SPEC, seed=0)
    models.save_adapter(peft, "run", tmp_path / "here")
    here, there = ({p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("here", "there"))
    assert here == there
    assert set(here) == {"adapter_config.json", "adapter_model.safetensors"}


def test_files_are_readable_by_all_and_hold_no_path(run_adapter, tiny_folder):
    for path in run_adapter.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
    config = (run_adapter / "adapter_config.json").read_text()
    assert str(tiny_folder) not in config
    assert json.loads(config)["base_model_name_or_path"].startswith("sha256:")


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_peft_itself_can_read_the_adapter(target, run_adapter, tiny_folder, target_adapter, ids):
    ours = models.add_adapter(target, run_adapter, "run")
    other = models.load_target(tiny_folder, target_adapter, "float32")
    theirs = PeftModel.from_pretrained(other, run_adapter)
    assert torch.equal(logits(ours, ids), logits(theirs, ids))


# ---- refused


def test_a_missing_adapter_is_named_with_what_makes_it(target, tmp_path):
    with pytest.raises(ModelError, match="no adapter in") as error:
        models.add_adapter(target, tmp_path, "run")
    assert "dvc repro" in error.value.hint


def test_an_adapter_of_another_base_is_refused(tiny_folder, run_adapter):
    with pytest.raises(ModelError, match="made for another model"):
        models.add_adapter(models.load_base(tiny_folder, "float32"), run_adapter, "run")


def _resize(tensors):
    key = min(tensors)
    return tensors | {key: torch.zeros(4, 3)}


def _drop(tensors):
    return {key: tensors[key] for key in sorted(tensors)[1:]}


def _add(tensors):
    return tensors | {"base_model.model.extra.lora_A.weight": torch.zeros(4, 3)}


@pytest.mark.parametrize(("change", "words"), [(_resize, "has shape"), (_drop, "is missing"), (_add, "is unknown")])
def test_tensors_that_do_not_fit_are_refused_and_the_model_is_as_before(target, run_adapter, ids, change, words):
    weights = run_adapter / "adapter_model.safetensors"
    save_file(change(load_file(weights)), weights)
    before = logits(target, ids)
    with pytest.raises(ModelError, match=f"does not fit this model: .*{words}"):
        models.add_adapter(target, run_adapter, "run")
    assert torch.equal(before, logits(target, ids))
    assert not any("lora" in name for name, _ in target.named_parameters())


def test_a_misfit_beside_another_adapter_leaves_that_one_active(both, run_adapter, ids):
    weights = run_adapter / "adapter_model.safetensors"
    save_file(_drop(load_file(weights)), weights)
    before, answer = state(both), logits(both, ids)
    with pytest.raises(ModelError, match="does not fit"):
        models.add_adapter(both, run_adapter, "third")
    assert state(both) == before
    assert torch.equal(answer, logits(both, ids))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"target_modules": ["nothing"]}, "does not fit this model"),
        ({"r": "four"}, "does not fit this model"),
        ({"peft_type": "IA3"}, "not a plain LoRA adapter"),
        ({"init_lora_weights": "pissa"}, "not a plain LoRA adapter"),
    ],
)
def test_other_kinds_of_adapter_are_refused(target, run_adapter, change, words):
    path = run_adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError, match=words):
        models.add_adapter(target, run_adapter, "run")


def test_a_truncated_adapter_is_refused(target, run_adapter):
    weights = run_adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(ModelError, match="cut short or damaged"):
        models.add_adapter(target, run_adapter, "run")


def test_a_config_that_is_not_json_is_refused(target, run_adapter):
    (run_adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        models.add_adapter(target, run_adapter, "run")


@pytest.fixture
def damaged(tiny_folder, tmp_path):
    return shutil.copytree(tiny_folder, tmp_path / "model")


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_weights_missing_from_the_file_are_an_error_and_not_random(damaged):
    weights = damaged / "model.safetensors"
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"1 weights are missing, first model\.layers\.1\.mlp\.up_proj"):
        models.load_base(damaged)


def test_weights_of_another_shape_are_refused(damaged):
    _edit(damaged / "config.json", intermediate_size=64)
    with pytest.raises(ModelError, match="cannot load the model"):
        models.load_base(damaged)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "mamba"}, "'mamba' are not supported"),
        ({"model_type": "my-own", "auto_map": {"AutoConfig": "mine.Config"}}, "cannot load the model"),
    ],
)
def test_unknown_and_remote_architectures_are_refused(damaged, change, words):
    _edit(damaged / "config.json", **change)
    with pytest.raises(ModelError, match=words):
        models.load_base(damaged)


def test_a_missing_tokenizer_is_named(damaged):
    for path in damaged.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(ModelError, match="no usable tokenizer"):
        models.load_tokenizer(damaged)


def test_a_tokenizer_without_padding_pads_with_eos(damaged):
    config = damaged / "tokenizer_config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "pad_token"}))
    assert models.load_tokenizer(damaged).pad_token == "<eos>"


def test_sequences_begin_with_eos_where_there_is_no_bos(tiny_folder):
    tokenizer = models.load_tokenizer(tiny_folder)
    assert models.bos_ids(tokenizer) == [1]
    tokenizer.bos_token = None
    assert models.bos_ids(tokenizer) == [2]
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="neither a BOS nor an EOS"):
        models.bos_ids(tokenizer)


def test_an_encoder_gives_the_ids_of_the_tokenizer(tiny_folder):
    encoder, tokenizer = load_encoder(tiny_folder), models.load_tokenizer(tiny_folder)
    assert isinstance(encoder, Encoder)
    text = " The sailor  Nima hid <bos> a blue mask: 1984\n"
    ids = encoder(text, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert models.bos_ids(encoder) == models.bos_ids(tokenizer) == [1]


def test_a_tokenizer_that_its_files_do_not_tell_all_about_is_left_to_transformers(damaged):
    _edit(damaged / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    assert not isinstance(load_encoder(damaged), Encoder)


def test_an_encoder_that_cannot_be_had_is_named_as_a_tokenizer_is(damaged):
    (damaged / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no usable tokenizer"):
        load_encoder(damaged)
