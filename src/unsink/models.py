"""Base, target and adapters: one model in memory, LoRA adapters on top.

The *target* is the base with the `target` adapter merged in float32 and cast once. Every other adapter sits on the
target, so "no adapter" *is* the target: `use(peft, None)` gives the reference model without a second copy.
"""

import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import (
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PeftType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from unsink import artifacts
from unsink.allocation import keep_freed
from unsink.architectures import (
    architecture,
    attention,
    bare,
    decoder,
    decoder_layers,
    kv_heads,
    neurons,
    value_projection,
)
from unsink.errors import ModelError
from unsink.progress import SILENT, Reporter
from unsink.quantization import FORMATS, exact, hush, quantize, quantized, require
from unsink.sources import check_folder, check_weights, read_config, resolve, weight_files
from unsink.tokenizer import bos_ids, load_tokenizer

__all__ = [
    "FORMATS",
    "AdapterSpec",
    "adapted_layers",
    "adapter_folder",
    "adapter_parameters",
    "add_adapter",
    "attach",
    "attention",
    "bare",
    "bos_ids",
    "bounded",
    "decoder",
    "decoder_layers",
    "gradient_checkpointing",
    "identity",
    "kv_heads",
    "load_base",
    "load_merged",
    "load_target",
    "load_tokenizer",
    "logit_bound",
    "merge",
    "neurons",
    "pick_device",
    "pick_dtype",
    "pin_published",
    "quantized",
    "read_adapters",
    "resolve",
    "save_adapter",
    "target_file",
    "use",
    "value_projection",
]

LOG = logging.getLogger(__name__)

ADAPTER_WEIGHTS = artifacts.ADAPTER_WEIGHTS
ADAPTER_CONFIG = artifacts.ADAPTER_CONFIG
PUBLISHED = "published.json"
"""In the place of the target adapter: the checkpoint that is the target, and the hash of its weights."""


# ---- loading


def pick_device(device: str = "auto") -> torch.device:
    """The device for `model.device`: auto is CUDA, else MPS, else the CPU.

    Raises:
        ModelError: the device asked for is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, available in there.items() if available)
    if not there.get(device, False):
        raise ModelError(
            f"model.device: {device!r} is not available",
            f"available: {', '.join(name for name in there if there[name])}",
        )
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype for `model.dtype`: auto is bfloat16 where the processor computes in it, else float32.

    So it is for rounded weights, which are computed with in that dtype.
    """
    if dtype not in ("auto", *FORMATS):
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def load_base(folder: Path, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """The pretrained model, frozen, in evaluation mode. Its `name_or_path` is the hash of its weights (see `identity`).

    Raises:
        ModelError: unsupported architecture, weights that are missing or do not fit the config, remote code.
    """
    check_folder(folder)
    if dtype in FORMATS:
        require(dtype)
    place = pick_device(device)
    LOG.debug("loading the model in %s, %s on %s", folder, pick_dtype(dtype, place), place)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        architecture(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=pick_dtype(dtype, place),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
        )
    except ModelError:
        raise
    except ImportError as error:
        raise ModelError(
            f"cannot load the model in {folder}: {error}",
            "install what its weights were rounded with; for bitsandbytes: pip install 'unsink[quantized]'",
        ) from error
    # ValueError, OSError, KeyError, RuntimeError, SafetensorError: whatever does not fit in the files
    except Exception as error:
        raise ModelError(
            f"cannot load the model in {folder}: {error}",
            "download it again; models that need their own code are refused",
        ) from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{folder}: {len(missing)} weights are missing, first {missing[0]}", "download the model again"
        )
    model.name_or_path = _weights_identity(folder)
    return _frozen(model, dtype, place)


def _frozen(model: PreTrainedModel, dtype: str, device: torch.device) -> PreTrainedModel:
    keep_freed()
    rounded = dtype in FORMATS and not quantized(model)  # what is rounded already stays as it is
    held = quantize(model, dtype, device) if rounded else model
    if quantized(held):
        hush()
    return cast(PreTrainedModel, cast(nn.Module, held).to(device).eval().requires_grad_(False))


def _exact(folder: Path) -> PreTrainedModel:
    """A model in float32 on the CPU, to merge into; rounded weights are what they stand for."""
    model = load_base(folder, "float32", "cpu")
    name, plain = identity(model), exact(model)
    plain.name_or_path = name
    return _frozen(plain, "float32", torch.device("cpu"))


def _weights_identity(folder: Path) -> str:
    return artifacts.combined(*(artifacts.sha256(path) for path in weight_files(folder)))


def identity(model: nn.Module, adapter: str | None = None) -> str:
    """What a model's adapters call their base: a hash of its weights files and, for a target, of the merged adapter.

    With one of its adapters: what it would be called with that merged.
    """
    name = str(bare(model).name_or_path)
    if adapter is None:
        return name
    return artifacts.combined(
        name, sha256(artifacts.packed(_adapter_tensors(cast(PeftModel, model), adapter))).hexdigest()
    )


def logit_bound(model: nn.Module) -> float | None:
    """What no logit of the model exceeds, as in Gemma 2; None where they have no bound."""
    bound: float | None = getattr(bare(model).config, "final_logit_softcapping", None)
    return bound


def bounded(model: nn.Module, logits: Tensor) -> Tensor:
    """What the model makes of its head's output: c tanh(logits / c) where it has a bound c, else the same."""
    bound = logit_bound(model)
    return logits if bound is None else bound * torch.tanh(logits / bound)


def merged(model: PeftModel, adapter: str, *, copied: bool = False) -> PreTrainedModel:
    """The model with its one adapter merged into its weights, and a name that says so (see `identity`); in place.

    With `copied` each weight is copied first: another model may hold the same one.
    """
    name = identity(model, adapter)
    plain = cast(PreTrainedModel, _tuner(model).merge_and_unload(safe_merge=copied))
    plain.name_or_path = name
    return plain


def held(model: nn.Module) -> str:
    """How the weights of a model are held, in words: the dtype that it computes in, and whether they are rounded."""
    dtype = bare(model).get_input_embeddings().weight.dtype
    return f"{dtype}{', rounded' if quantized(model) else ''}"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training moves, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def replaces_weights(model: PeftModel, adapter: str) -> bool:
    """Whether an adapter holds whole weights in place of the model's (`rank: null`), so that merging it is exact."""
    return model.peft_config[adapter].peft_type == PeftType.LN_TUNING


def load_target(folder: Path, adapter: Path | None, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """The model to unlearn, frozen: the base with the target adapter merged in float32 and cast once.

    Merging in bfloat16 would move logits by 1e-2. Without an adapter the base is the target. Where the folder `adapter`
    pins a published checkpoint, that is the target, and the base is not loaded.

    Raises:
        ModelError: as `load_base` and `add_adapter`, or the published checkpoint is not the one that was pinned.
    """
    if adapter is None:
        return load_base(folder, dtype, device)
    if (adapter / PUBLISHED).is_file():
        return _load_published(adapter / PUBLISHED, dtype, device)
    return merge(_exact(folder), adapter, "target", dtype, device)


def load_beside(
    folder: Path, target: Path, adapters: Mapping[str, Path], dtype: str = "auto", device: str = "auto"
) -> PreTrainedModel | PeftModel:
    """The target with saved adapters on it by name, none merged, the first one active; the target itself without any.

    Raises:
        ModelError: as `load_target` and `add_adapter`.
    """
    model: PreTrainedModel | PeftModel = load_target(folder, target, dtype, device)
    for name, stored in adapters.items():
        model = add_adapter(model, stored, name)
    return model


def merge(model: nn.Module, adapter: Path, name: str, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """A model in float32 on the CPU with a saved adapter merged, then cast once, and frozen.

    It is a model of its own: adapters made for it fit neither the model before nor the same with another adapter.

    Raises:
        ModelError: as `add_adapter`.
    """
    place = pick_device(device)
    peft = add_adapter(model, adapter, name)
    name = artifacts.combined(identity(peft), artifacts.sha256(adapter / ADAPTER_WEIGHTS))
    return _cast(cast(PreTrainedModel, _tuner(peft).merge_and_unload()), name, dtype, place)


def adapter_folder(source: str) -> Path:
    """The folder of a LoRA adapter of somebody else's.

    Raises:
        ModelError: no such folder, no adapter in it, or one that is a pickle.
    """
    folder = Path(source).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        raise ModelError(
            f"--adapter: no {ADAPTER_CONFIG} in {folder}", "give the folder of an adapter in PEFT's format"
        )
    if not (folder / ADAPTER_WEIGHTS).is_file():
        pickles = ", ".join(sorted(path.name for path in folder.glob("*.bin")))
        found = f"; {pickles} is not read: pickles can run code" if pickles else ""
        raise ModelError(f"--adapter: no {ADAPTER_WEIGHTS} in {folder}{found}", "convert it to safetensors")
    return folder


def made_for(adapter: Path) -> str:
    """What an adapter of somebody else's calls its base, a name or a path; empty where it says nothing, or is ours."""
    stored = read_config(adapter / ADAPTER_CONFIG)
    name = stored.get("base_model_name_or_path") if isinstance(stored, dict) else None
    return "" if name is None or str(name).startswith("sha256:") else str(name)


_OTHER_MODEL = "an adapter fits the model that it was made for: name that as --model"


def load_merged(folder: Path, adapter: Path, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
    """A model with an adapter of any maker merged in float32, cast once, frozen.

    Raises:
        ModelError: as `load_base`; or it is no LoRA adapter, changes the model below it, is damaged, or does not fit.
    """
    place = pick_device(device)
    check_weights(adapter / ADAPTER_WEIGHTS)
    stored = read_config(adapter / ADAPTER_CONFIG)
    kind = stored.get("peft_type") if isinstance(stored, dict) else None
    if kind not in _CONFIGS:
        raise ModelError(
            f"--adapter: {adapter / ADAPTER_CONFIG}: peft_type is {kind!r}", f"supported: {', '.join(_CONFIGS)}"
        )
    if (start := stored.get("init_lora_weights", True)) not in (True, False, "gaussian"):
        raise ModelError(
            f"--adapter: {adapter} was initialised by {start!r}, which changes the weights below it",
            "merge it yourself",
        )
    base = _exact(folder)
    made_for = str(stored.get("base_model_name_or_path"))
    if made_for.startswith("sha256:") and made_for != identity(base):  # one of ours names exact weights
        raise ModelError(
            f"the adapter in {adapter} was made for another model: {made_for}, not {identity(base)}", _OTHER_MODEL
        )
    name = artifacts.combined(identity(base), artifacts.sha256(adapter / ADAPTER_WEIGHTS))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be left as drawn
            peft = PeftModel.from_pretrained(base, adapter, torch_device="cpu")
    # KeyError, ValueError, RuntimeError, TypeError, the warnings above: whatever PEFT says of a file that does not fit
    except Exception as error:
        raise ModelError(f"the adapter in {adapter} does not fit {folder}: {error}", _OTHER_MODEL) from error
    stored_tensors = artifacts.read_tensors(adapter / ADAPTER_WEIGHTS)
    if unknown := sorted(stored_tensors.keys() - _adapter_tensors(peft, "default").keys()):  # PEFT would ignore them
        raise ModelError(f"the adapter in {adapter} does not fit {folder}: {unknown[0]} is unknown", _OTHER_MODEL)
    return _cast(cast(PreTrainedModel, _tuner(peft).merge_and_unload()), name, dtype, place)


def _cast(model: PreTrainedModel, name: str, dtype: str, place: torch.device) -> PreTrainedModel:
    final = pick_dtype(dtype, place)
    for parameter in model.parameters():  # parameters only: rotary frequencies are buffers and stay float32
        parameter.data = parameter.data.to(final)
    model.config.dtype = final
    model.name_or_path = name
    return _frozen(model, dtype, place)


def pin_published(source: str, revision: str | None, reporter: Reporter = SILENT) -> dict[str, Any]:
    """What `published.json` says of a checkpoint: source, revision, and the hash of its weights.

    Raises:
        ModelError: as `resolve`.
    """
    weights = _weights_identity(resolve(source, revision, reporter, "memorize.published"))
    return {"source": source, "revision": revision, "weights": weights}


def _load_published(path: Path, dtype: str, device: str) -> PreTrainedModel:
    pin = artifacts.read_json(path)
    model = load_base(resolve(pin["source"], pin["revision"], key="memorize.published"), dtype, device)
    if identity(model) != pin["weights"]:
        raise ModelError(
            f"{path}: {pin['source']} has other weights than when it was pinned", "run `unsink memorize` again"
        )
    return model


def target_file(adapter: Path) -> Path:
    """The file whose bytes decide what the model in an adapter folder is: its weights, or the pin of a checkpoint."""
    published = adapter / PUBLISHED
    return published if published.is_file() else adapter / ADAPTER_WEIGHTS


@contextmanager
def gradient_checkpointing(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Let a backward pass compute the inside of each decoder layer again instead of keeping it, while the block runs.

    That takes a third more computation, and memory for one layer in place of all; losses and gradients stay the same.
    The layers themselves stay in evaluation mode: nothing is dropped out.

    Raises:
        ModelError: the architecture does not offer it.
    """
    layers: list[Any] = list(decoder_layers(model)) if on else []
    for layer in layers:
        if not isinstance(layer, GradientCheckpointingLayer):
            raise ModelError(
                f"model.gradient_checkpointing: {type(layer).__name__} does not offer it",
                "set it to false, and lower unlearn.batch instead",
            )
        again: Any = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        layer._gradient_checkpointing_func = again
        layer.gradient_checkpointing = layer.training = True
    # Some layers, such as OPT's, drop out by themselves in training, which is what they take this for.
    rates = [
        (layer, name, rate)
        for layer in layers
        for name, rate in vars(layer).items()
        if name.endswith("dropout") and isinstance(rate, float)
    ]
    for layer, name, _ in rates:
        setattr(layer, name, 0.0)
    try:
        yield
    finally:
        for layer, name, rate in rates:
            setattr(layer, name, rate)
        for layer in layers:
            layer.gradient_checkpointing = layer.training = False


# ---- adapters


class AdapterSpec(NamedTuple):
    """What is trained on the decoder layers `first_layer` to `last_layer`, both included.

    With a rank, a LoRA adapter on all linear modules. Without, all weights of these layers: a copy of each module takes
    its place while the adapter is active, so that "no adapter" is the untouched model here too. Without `last_layer`
    it goes up to the last one.
    """

    rank: int | None
    alpha: float | None = None
    first_layer: int = 0
    last_layer: int | None = None


def adapted_layers(model: nn.Module, spec: AdapterSpec) -> range:
    """Return the decoder layers that an adapter is on, up to the model's last where the spec names none.

    Raises:
        ModelError: the layers are not there.
    """
    count = len(decoder_layers(model))
    last = count - 1 if spec.last_layer is None else spec.last_layer
    if not 0 <= spec.first_layer <= last < count:
        raise ModelError(
            f"adapter layers {spec.first_layer}..{last} do not fit this model, which has layers 0..{count - 1}",
            "set first_layer and last_layer within the model's layers",
        )
    return range(spec.first_layer, last + 1)


def attach(model: nn.Module, name: str, spec: AdapterSpec, seed: int) -> PeftModel:
    """Put a fresh, trainable, active adapter on a model; it changes no output until it is trained.

    The matrices are drawn from `seed`; the global random state is left alone.

    Raises:
        ModelError: the layers are not there.
    """
    config = _config(model, spec, adapted_layers(model, spec))
    config.base_model_name_or_path = identity(model) or None
    peft = _inject(model, name, config, seed)
    peft.set_adapter(name)
    return peft


def _config(model: nn.Module, spec: AdapterSpec, layers: range) -> PeftConfig:
    row = architecture(bare(model).config)
    if spec.rank is None:
        # PEFT's "LN tuning" trains copies of modules of any kind, here all that have weights, and toggles them.
        parts = decoder_layers(model)[layers[0]].named_modules()
        names = sorted(name for name, part in parts if next(part.parameters(recurse=False), None) is not None)
        where = rf"{row.layers}\.({'|'.join(map(str, layers))})"
        return LNTuningConfig(
            target_modules=rf".*\b{where}\.({'|'.join(map(re.escape, names))})", task_type="CAUSAL_LM"
        )
    return LoraConfig(
        r=spec.rank,
        lora_alpha=cast(int, spec.alpha),
        target_modules=sorted(row.linear),
        layers_to_transform=list(layers),
        layers_pattern=row.layers,
        fan_in_fan_out=row.transposed,
        task_type="CAUSAL_LM",
    )


def _inject(model: nn.Module, name: str, config: PeftConfig, seed: int) -> PeftModel:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Unsupported layer type", category=UserWarning)  # norms, copied whole
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed: that one would reseed accelerators too
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            return model
        return cast(PeftModel, get_peft_model(cast(PreTrainedModel, model), config, adapter_name=name))


def adapter_parameters(peft: PeftModel, name: str) -> list[nn.Parameter]:
    """The parameters of one adapter, in the order of the modules: what an optimizer gets."""
    layers = [module for module in peft.modules() if isinstance(module, BaseTunerLayer)]
    kinds = [getattr(layer, kind) for layer in layers for kind in layer.adapter_layer_names]
    return list(chain.from_iterable(kind[name].parameters() for kind in kinds if name in kind))


def share_adapter(peft: PeftModel, other: PeftModel) -> None:
    """Let `other` have the very parameters that are trained in `peft`; it has an adapter of the same name and shape."""
    for name, parameter in peft.named_parameters():
        if parameter.requires_grad:
            module, _, own = name.rpartition(".")
            setattr(other.get_submodule(module), own, parameter)


def detach(peft: PeftModel) -> None:
    """Take all adapters off; the model below is plain again."""
    _tuner(peft).unload()


def add_adapter(model: nn.Module, folder: Path, name: str, *, trainable: bool = False) -> PeftModel:
    """Read a saved adapter onto the model it was made for.

    Adapters that were active stay active; the first adapter on a plain model becomes the active one. It is frozen
    unless `trainable`.

    Raises:
        ModelError: no adapter, a damaged one, another base, or tensors that do not fit. The model is then as it was.
    """
    LOG.debug("loading the adapter %s", name)
    config, tensors = _read_adapter(folder, identity(model))
    active = list(model.active_adapters) if isinstance(model, PeftModel) else [name]
    try:
        peft = _inject(model, name, config, seed=0)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"the adapter in {folder} does not fit this model: {error}", _MAKE_AGAIN) from error
    if misfit := _misfit(peft, name, tensors):
        peft.delete_adapter(name) if isinstance(model, PeftModel) else _tuner(peft).unload()
        raise ModelError(f"the adapter in {folder} does not fit this model: {misfit}", _MAKE_AGAIN)
    set_peft_model_state_dict(peft, tensors, adapter_name=name)
    mine = {id(parameter) for parameter in adapter_parameters(peft, name)}
    grads = [(p, trainable if id(p) in mine else p.requires_grad) for p in peft.parameters()]
    _tuner(peft).set_adapter(active)
    _set_grads(grads)
    return peft


_MAKE_AGAIN = "make the adapter again for this model (`dvc repro`), or restore the model it was made for"


def _read_adapter(folder: Path, base: str) -> tuple[PeftConfig, dict[str, Tensor]]:
    config, weights = folder / ADAPTER_CONFIG, folder / ADAPTER_WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise ModelError(f"no adapter in {folder}: no {path.name}", "run the stage that makes it (`dvc repro`)")
    stored = read_config(config)
    # other initialisations (PiSSA, OLoRA) change the base: "adapter off" would not be the target
    if (
        not isinstance(stored, dict)
        or stored.get("peft_type") not in _CONFIGS
        or stored.get("init_lora_weights", True) is not True
    ):
        raise ModelError(f"{config}: not a plain LoRA adapter", "give an adapter that unsink made")
    made_for = stored.get("base_model_name_or_path")
    if made_for != base:
        raise ModelError(f"the adapter in {folder} was made for another model: {made_for}, not {base}", _MAKE_AGAIN)
    check_weights(weights)
    kind, keys = _CONFIGS[stored["peft_type"]]
    return kind(**{key: stored[key] for key in keys if key in stored}), artifacts.read_tensors(weights)


def read_adapters(model: Path, folders: Sequence[Path]) -> list[tuple[PeftConfig, dict[str, Tensor]]]:
    """Configs and tensors of saved adapters of which each stands on the one before, the first on a model's folder.

    Raises:
        ModelError: no adapter, a damaged one, or one that was made for another model.
    """
    base, found = _weights_identity(model), []
    for folder in folders:
        found.append(_read_adapter(folder, base))
        base = artifacts.combined(base, artifacts.sha256(folder / ADAPTER_WEIGHTS))
    return found


def _misfit(peft: PeftModel, name: str, tensors: dict[str, Tensor]) -> str | None:
    """The first way in which stored tensors differ from the adapter's own in name or shape."""
    expected = _adapter_tensors(peft, name)
    for key in sorted(expected.keys() ^ tensors.keys()):
        return f"{key} is {'missing' if key in expected else 'unknown'}"
    for key, tensor in expected.items():
        if tensor.shape != tensors[key].shape:
            return f"{key} has shape {tuple(tensors[key].shape)}, expected {tuple(tensor.shape)}"
    return None


def _adapter_tensors(peft: PeftModel, name: str) -> dict[str, Tensor]:
    # "auto" would ask the hub for the base model's vocabulary
    found: dict[str, Tensor] = get_peft_model_state_dict(peft, adapter_name=name, save_embedding_layers=False)
    return found


_CONFIG_KEYS = ("base_model_name_or_path", "target_modules", "task_type")
_LORA_KEYS = ("fan_in_fan_out", "layers_pattern", "layers_to_transform", "lora_alpha", "r")

_CONFIGS: dict[str, tuple[type[PeftConfig], tuple[str, ...]]] = {
    "LORA": (LoraConfig, (*_CONFIG_KEYS, *_LORA_KEYS)),
    "LN_TUNING": (LNTuningConfig, _CONFIG_KEYS),
}
"""The kinds of adapter that can be read, and what is stored of each."""


def save_adapter(peft: PeftModel, name: str, folder: Path) -> None:
    """Write one adapter in PEFT's format, the same bytes for the same weights.

    PEFT's own `save_pretrained` is not used: it writes a set in hash order, an absolute path, and files with mode 0600.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = peft.peft_config[name]
    kind = str(config.peft_type.value)
    stored = {key: getattr(config, key) for key in _CONFIGS[kind][1]}
    modules = config.target_modules
    stored |= {
        "target_modules": modules if isinstance(modules, str) else sorted(modules),
        "peft_type": kind,
        "inference_mode": True,
    }
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in _adapter_tensors(peft, name).items()}
    artifacts.write_tensors(folder / ADAPTER_WEIGHTS, tensors)
    artifacts.write_json(folder / ADAPTER_CONFIG, stored)


@contextmanager
def use(peft: PeftModel, name: str | None) -> Iterator[PeftModel]:
    """Make `name` the only active adapter within the block, frozen; None is the bare target.

    Afterwards active adapters, their on/off state and each parameter's `requires_grad` are as before, after an
    exception too. (PEFT's own `disable_adapter()` turns `requires_grad` on for every active adapter when it is left,
    frozen ones included.) Blocks may be nested, and may stand between a forward and its backward pass. Autograd is
    not switched off: add `torch.no_grad()`.

    Raises:
        ModelError: no such adapter.
    """
    if name is not None and name not in peft.peft_config:
        raise ModelError(f"no adapter {name!r} on this model; there are: {', '.join(sorted(peft.peft_config))}")
    active, off = list(peft.active_adapters), _switched_off(peft)
    grads = [(parameter, parameter.requires_grad) for parameter in peft.parameters()]
    try:
        _switch(peft, [name] if name is not None else active, off=name is None)
        _set_grads([(parameter, False) for parameter, _ in grads])
        yield peft
    finally:
        _switch(peft, active, off=off)
        _set_grads(grads)


def _set_grads(grads: Sequence[tuple[nn.Parameter, bool]]) -> None:
    for parameter, grad in grads:
        parameter.requires_grad_(grad)


def _switch(peft: PeftModel, adapters: list[str], *, off: bool) -> None:
    _tuner(peft).enable_adapter_layers()
    _tuner(peft).set_adapter(adapters)
    if off:
        _tuner(peft).disable_adapter_layers()


def _tuner(peft: PeftModel) -> BaseTuner:
    return cast(BaseTuner, peft.base_model)


def _switched_off(peft: PeftModel) -> bool:
    return next(module.disable_adapters for module in peft.modules() if isinstance(module, BaseTunerLayer))
