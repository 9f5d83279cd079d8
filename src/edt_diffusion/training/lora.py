"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: added, merged, saved."""

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import init_empty_weights
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models import Backbone
from ..util.errors import UserError
from ..util.files import atomic_directory
from ..util.lookup import lookup
from ..util.rng import Purpose, stream

LORA_FILE = "pytorch_lora_weights.safetensors"
REST_FILE = "other_trained_weights.safetensors"
_PREFIX = "transformer"  # diffusers' name for the network of a pipeline; the default of its `load_lora_adapter`


class LoraSettings(BaseModel):
    """Low-rank adapters: W x becomes W x + (alpha / rank) B A x, of which only A and B are trained."""

    model_config = ConfigDict(extra="forbid")

    rank: int = Field(default=8, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="null = rank, a factor of 1")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of the adapters' input, in training")
    targets: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"),
        description="ends of the names of linear layers; ff.net.0.proj and ff.net.2 are the MLPs'",
    )
    train_classes: bool = Field(default=True, description="train the class table too; new classes need it")


def add_lora(model: Backbone, settings: LoraSettings, seed: int, frozen: Collection[str] = ()) -> list[str]:
    """Put adapters beside the linear layers named by `settings.targets`, and freeze all else but the class table.

    Adapters are float32 whatever the model is. A is uniform in +-1 / sqrt(inputs), drawn from the streams of `seed`,
    and B is zero, so the model's function is at first unchanged.

    Args:
        model: the network; changed in place.
        settings: rank, targets and so on.
        seed: the run's seed.
        frozen: names of parameters; layers whose weight is among them get no adapter.

    Returns:
        Names of the adapted layers.

    Raises:
        UserError: peft is not installed, the model has adapters already, or no layer fits a target.
    """
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError("LoRA needs peft, which is not installed: pip install 'edt-diffusion[finetune]'") from None
    if has_adapters(model):
        raise UserError("the model has adapters already: merge them into its weights first")
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    for target in settings.targets:
        if not any(_ends_with(name, target) for name in linear):
            ends = [name.split(".", 2)[2] if name.startswith("blocks.") else name for name in linear]
            known = dict.fromkeys(end.removeprefix("attn.") for end in ends)
            lookup(known, target, "LoRA target")  # raises, with the nearest name
    layers = [
        name
        for name in linear
        if f"{name}.weight" not in frozen and any(_ends_with(name, target) for target in settings.targets)
    ]
    if not layers:
        raise UserError(f"every layer of the LoRA targets {', '.join(settings.targets)} is frozen: freeze fewer parts")
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank if settings.alpha is None else settings.alpha,  # pyright: ignore[reportArgumentType]
        lora_dropout=settings.dropout,
        target_modules=layers,
    )
    with torch.random.fork_rng(devices=[]):  # peft fills the factors from the global generator
        model.add_adapter(config)
    for position, name in enumerate(layers):
        adapter: Any = model.get_submodule(name)
        down, up = adapter.lora_A["default"], adapter.lora_B["default"]
        draw = stream(seed, Purpose.MODULE, step=-1, position=position)  # step -1: before the first
        bound = down.weight.shape[1] ** -0.5
        values = draw.uniform(-bound, bound, tuple(down.weight.shape)).astype(np.float32)
        down.weight.data = torch.from_numpy(values).to(down.weight.device)
        up.weight.data = torch.zeros_like(up.weight, dtype=torch.float32)
    if settings.train_classes and model.class_embedder is not None:
        model.class_embedder.weight.requires_grad_(True)
    return layers


def has_adapters(model: nn.Module) -> bool:
    """Whether the model has adapters of peft."""
    return bool(getattr(model, "peft_config", None))


@torch.no_grad()
def merged_state_dict(model: Backbone) -> dict[str, Tensor]:
    """The weights of the same function without adapters: W + (alpha / rank) B A, added up in float32.

    Names are those of a model that never had adapters. Tensors without an adapter are the model's own, not copies.
    """
    adapters = dict(_adapted(model))
    merged: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        plain = name.replace(".base_layer.", ".")
        layer = adapters.get(plain.removesuffix(".weight")) if plain.endswith(".weight") else None
        if layer is not None:
            delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
            tensor = (tensor.float() + delta).to(tensor.dtype)
        merged[plain] = tensor
    return merged


def without_adapters(model: Backbone) -> Backbone:
    """The model itself if it has no adapters, else a copy with the weights of `merged_state_dict`, in eval mode."""
    if not has_adapters(model):
        return model
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with init_empty_weights():  # buffers that no file holds are still made
        plain = type(model)(**settings)
    plain.load_state_dict({name: value.clone() for name, value in merged_state_dict(model).items()}, assign=True)
    return cast(nn.Module, plain).to(model.device).eval()  # pyright: ignore[reportReturnType]


def lora_state_dict(model: Backbone) -> dict[str, Tensor]:
    """The adapters' tensors under diffusers' names, "transformer.<layer>.lora_A.weight" and so on."""
    from peft.utils import get_peft_model_state_dict

    return {f"{_PREFIX}.{name}": value for name, value in get_peft_model_state_dict(model).items()}


def save_lora(model: Backbone, folder: Path) -> None:
    """Write the adapters as `LORA_FILE`, which diffusers' `load_lora_adapter` reads, into a new folder.

    Other trained parameters (the class table) go into `REST_FILE` beside it, under their names in the model.
    """
    settings = {k: sorted(v) if isinstance(v, set) else v for k, v in model.peft_config["default"].to_dict().items()}
    described = json.dumps(
        {f"{_PREFIX}.{name}": value for name, value in settings.items()}, sort_keys=True, default=str
    )
    adapters = {name: value.detach().cpu().contiguous() for name, value in lora_state_dict(model).items()}
    rest = {
        name: parameter.detach().cpu().contiguous()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and ".lora_" not in name
    }
    with atomic_directory(folder) as temporary:
        save_file(adapters, temporary / LORA_FILE, metadata={"format": "pt", "lora_adapter_metadata": described})
        if rest:
            save_file(rest, temporary / REST_FILE)


def load_lora(model: Backbone, folder: Path) -> None:
    """Put what `save_lora` wrote into the model it was trained from.

    Raises:
        UserError: there are no adapters in the folder, or its class table is that of another model.
    """
    if not (Path(folder) / LORA_FILE).is_file():
        raise UserError(f"{folder} holds no {LORA_FILE}: expected a folder of adapters that edt train wrote")
    rest = load_file(Path(folder) / REST_FILE) if (Path(folder) / REST_FILE).is_file() else {}
    own = dict(model.named_parameters())
    for name, value in rest.items():
        if name not in own or own[name].shape != value.shape:
            has = tuple(own[name].shape) if name in own else "nothing of that name"
            raise UserError(f"{folder} has a {name} of shape {tuple(value.shape)}, the model {has}: give its own model")
    with torch.no_grad():
        for name, value in rest.items():
            own[name].copy_(value)
    model.load_lora_adapter(str(folder), weight_name=LORA_FILE)


def _adapted(model: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
