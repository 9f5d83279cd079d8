"""What a network computes in and what its weights take: copies in other precisions, compiled blocks, offloading.

Three of the precisions keep the matrices of the linear layers in eight bits and compute in bfloat16; patch embedding,
position tables, norms and the last projection stay in bfloat16:

* fp8: float8_e4m3fn, made bfloat16 again for each use (diffusers' layerwise casting). Smaller, not faster.
* int8-weights: one scale per row, made bfloat16 again for each use (torchao).
* int8: the same weights; the inputs are rounded too, one scale per token and call, and products are of integers.
"""

import contextlib
import copy
import importlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN
from torch import Tensor, nn

from ..util.errors import UserError
from ..util.lookup import lookup

# Names of layers that eight-bit precisions leave alone; a model adds its own in `_skip_layerwise_casting_patterns`.
_KEPT_LAYERS = tuple(DEFAULT_SKIP_MODULES_PATTERN)


@dataclass(frozen=True)
class PrecisionChoice:
    """A precision by name.

    Attributes:
        what: in words.
        compute: dtype of activations, and so of the network.
        store: changes a network in place so that its linear layers are stored in less; None where they are not.
        devices: types of device that can do it; empty for all.
    """

    what: str
    compute: torch.dtype
    store: Callable[[Any], None] | None = None
    devices: tuple[str, ...] = ()


def in_precision(network: Any, name: str) -> Any:
    """The network in a precision of `PRECISIONS`.

    Args:
        network: a backbone; it is not changed. Compile or offload what is returned, not this.
        name: such as "bf16".

    Returns:
        The network itself if it is that already, else a copy.

    Raises:
        UserError: an unknown name, a device that cannot do it, torchao missing, or a network that is stored in eight
            bits and no longer has what another precision needs.
    """
    choice = lookup(PRECISIONS, name, "precision")
    have, device = precision_of(network), network.device.type
    if have == name:
        return network
    if name == "fp16" and device == "cpu":
        raise UserError("precision=fp16: a CPU computes it a hundred times slower: use fp32 or bf16")
    if choice.devices and device not in choice.devices:
        raise UserError(f"precision={name}: expected a device of type {' or '.join(choice.devices)}, not {device}")
    if have is not None and PRECISIONS[have].store is not None:
        raise UserError(f"precision={name}: this network is stored as {have} already: load the model again")
    made = copy.deepcopy(network)
    if choice.store is None:
        nn.Module.to(made, choice.compute)  # diffusers' own `to` says on each cast that it may be inconsistent
    else:
        choice.store(made)
        made._stored_precision = name
    return made


def precision_of(network: Any) -> str | None:
    """The name in `PRECISIONS` of what a network is in; None for another dtype."""
    stored = getattr(network, "_stored_precision", None)
    plain = (name for name, choice in PRECISIONS.items() if choice.store is None and choice.compute == network.dtype)
    return stored or next(plain, None)


def weight_bytes(network: nn.Module) -> int:
    """Bytes of the parameters and buffers of a network as they are stored, shared ones once."""
    tensors = {id(tensor): tensor for tensor in [*network.parameters(), *network.buffers()]}
    return sum(_stored_bytes(tensor) for tensor in tensors.values())


def compile_network(network: Any) -> Any:
    """Compile the transformer blocks of a network in place; the first calls then take long. Returns the network.

    Raises:
        UserError: the machine lacks what compiling needs.
    """
    if missing := missing_for_compiling(network.device.type):
        raise UserError(f"compiling on {network.device.type} needs {missing}: install it, or do without compiling")
    network.compile_repeated_blocks(fullgraph=True)
    return network


def missing_for_compiling(device_type: str) -> str | None:
    """What torch's compiler would miss on this machine, in words; None if nothing is known to be missing."""
    if device_type != "cpu":
        return None if importlib.util.find_spec("triton") is not None else "the package triton"
    usual = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
    compiler = os.environ.get("CXX") or usual
    if shutil.which(compiler) is None:
        return f"a C++ compiler ({compiler} is not found)"
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        return "Python's header files (Python.h is not found)"
    return None


def offload_network(
    network: Any, device: torch.device | str, *, kept_on: torch.device | str = "cpu", folder: Path | None = None
) -> Any:
    """Keep the weights elsewhere and bring each layer's to the device while it computes, in place.

    The outputs are the same, bit for bit. For networks that do not fit a device's memory: every pass moves all the
    weights, beside the computing where the device has streams.

    Args:
        network: a backbone in the precision it shall have.
        device: where to compute.
        kept_on: where the weights rest.
        folder: keep them in files there instead; an existing, empty folder.

    Returns:
        The network.

    Raises:
        UserError: a device that is not there, or a network that is stored in eight bits, whose weights cannot be moved
            layer by layer.
    """
    stored = precision_of(network)
    if stored is not None and PRECISIONS[stored].store is not None:
        raise UserError(f"offloading a network in {stored} is not possible: use fp32, bf16 or fp16")
    device = torch.device(device)
    try:
        torch.empty(0, device=device)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"offloading to compute on {device}: the device cannot be used ({reason})") from None
    network.enable_group_offload(
        onload_device=device,
        offload_device=torch.device(kept_on),
        offload_type="leaf_level",
        use_stream=device.type == "cuda",
        offload_to_disk_path=None if folder is None else str(folder),
    )
    return network


def _store_fp8(network: Any) -> None:
    network.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    for tensor in (*network.parameters(), *network.buffers()):
        if tensor.dtype.is_floating_point and tensor.dtype != torch.float8_e4m3fn:
            tensor.data = tensor.data.to(torch.bfloat16)


def _store_int8(network: Any) -> None:
    _quantise(network, "Int8DynamicActivationInt8WeightConfig")


def _store_int8_weights(network: Any) -> None:
    _quantise(network, "Int8WeightOnlyConfig")


def _quantise(network: Any, config: str) -> None:
    nn.Module.to(network, torch.float32)  # scales are made, and stay, in what the weights are in
    patterns = (*_KEPT_LAYERS, *(network._skip_layerwise_casting_patterns or ()))

    def small(module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Linear) and not any(re.search(pattern, name) for pattern in patterns)

    module = "torchao.quantization"
    with _quiet_import():
        try:
            quantization = importlib.import_module(module)
        except ImportError as error:
            what = (
                "torchao is missing" if error.name in (module, "torchao") else f"torchao cannot be imported ({error})"
            )
            raise UserError(f'precision int8: {what}: pip install "edt-diffusion[int8]"') from None
        quantization.quantize_(network, getattr(quantization, config)(), filter_fn=small)
    nn.Module.to(network, torch.bfloat16)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Keep torchao from telling which of its kernels for other processors it passes over."""
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _stored_bytes(tensor: Tensor) -> int:
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is not None:  # torchao's tensors are made of others and state a dtype they are not in
        return sum(_stored_bytes(getattr(tensor, name)) for name in flatten()[0])
    return tensor.numel() * tensor.element_size()


_EIGHT_BITS = ("cpu", "cuda")

PRECISIONS: dict[str, PrecisionChoice] = {
    "fp32": PrecisionChoice("float32", torch.float32),
    "bf16": PrecisionChoice("bfloat16", torch.bfloat16),
    "fp16": PrecisionChoice("float16", torch.float16),
    "fp8": PrecisionChoice("weights in float8, bfloat16", torch.bfloat16, _store_fp8, _EIGHT_BITS),
    "int8": PrecisionChoice("products of 8-bit integers, bfloat16", torch.bfloat16, _store_int8, _EIGHT_BITS),
    "int8-weights": PrecisionChoice("weights in int8, bfloat16", torch.bfloat16, _store_int8_weights, _EIGHT_BITS),
}
