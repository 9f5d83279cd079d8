"""How much one forward pass keeps for its backward pass, measured on tensors that have shapes and no content."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from ..models.masking import TokenMasks

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def activation_bytes(
    model: Any,
    steps: Sequence[Sequence[tuple[int, bool]]],
    device: str,
    precision: str,
    checkpointing: bool | Sequence[int] | None,
) -> list[int]:
    """Bytes kept beside the weights by the forward passes of each of several steps.

    The model is left as it is, nothing is computed, and nothing drawn.

    Args:
        model: see `training.memory.estimate_training_memory`.
        steps: each a list of forward passes as (samples, whether they have token masks), all followed by one backward
            pass.
        device: type of device.
        precision: "no", "bf16" or "fp16".
        checkpointing: True, False, stages, or None for what the model has.
    """
    with FakeTensorMode(), torch.enable_grad(), _NoValues():
        double = _without_content(model, device, checkpointing)
        return [_activations(double, calls, device, precision) for calls in steps]


def _activations(double: Any, calls: Sequence[tuple[int, bool]], device: str, precision: str) -> int:
    """Bytes that forward passes, given as (batch, has masks), keep for their backward pass beside the weights."""
    parameters = [*double.parameters(), *double.buffers()]
    weights = {tensor.untyped_storage()._cdata for tensor in parameters}
    saved = _Saved(weights)
    recomputed = _count_checkpoints(double, saved, weights)
    with _autocast(device, precision), saved:
        # All outputs stay alive, as those of a step do: what hangs on them is counted by storages.
        outputs = [double(**_inputs(double, *call, device), return_dict=False) for call in calls]
    del outputs
    # A checkpointed block is recomputed, and its activations exist, one block at a time.
    return saved.bytes + max(recomputed, default=0)


class _Saved(saved_tensors_hooks):
    """Adds up the distinct storages that operations keep for their backward."""

    def __init__(self, known: set[int]) -> None:
        super().__init__(self.add, lambda tensor: tensor)
        self._known = known
        self._kept: dict[int, Tensor] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in self._known:
            self._kept.setdefault(storage, tensor.detach())  # kept alive, so that no other storage takes its number
        return tensor

    @property
    def bytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self._kept.values())


def _count_checkpoints(model: nn.Module, saved: _Saved, weights: set[int]) -> list[int]:
    """Let checkpointed blocks keep what checkpointing keeps, their inputs; returns the (growing) list of the bytes that
    each needs while it is recomputed.
    """  # fmt: skip
    recomputed: list[int] = []

    def checkpoint(block: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                saved.add(value)
        inside = _Saved(weights | set(saved._kept))
        with inside:
            output = block(*args, **kwargs)
        recomputed.append(inside.bytes)
        return output

    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            setattr(module, "_gradient_checkpointing_func", checkpoint)  # noqa: B010
    return recomputed


def _without_content(model: nn.Module, device: str, checkpointing: bool | Sequence[int] | None) -> Any:
    """A copy in training mode whose parameters and buffers have shapes only; to be called under a `FakeTensorMode`."""

    def empty(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=device)

    # What `deepcopy` finds here it takes for copied already.
    memo: dict[int, Any] = {id(buffer): empty(buffer) for buffer in model.buffers()}
    memo |= {id(p): nn.Parameter(empty(p), requires_grad=p.requires_grad) for p in model.parameters()}
    double: Any = copy.deepcopy(model, memo).train()
    if checkpointing is True:
        double.enable_gradient_checkpointing()
    elif checkpointing is not None and not checkpointing:
        double.disable_gradient_checkpointing()
    elif checkpointing is not None:
        double.set_checkpointed_stages(checkpointing)
    return double


def _inputs(model: Any, batch: int, masks: bool, device: str) -> dict[str, Any]:
    config = model.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs: dict[str, Any] = {
        "hidden_states": torch.empty(batch, config.in_channels, height, width, device=device),
        "timestep": torch.empty(batch, dtype=torch.int64, device=device),
        "class_labels": None,
    }
    if config.num_classes is not None:
        inputs["class_labels"] = torch.empty(batch, dtype=torch.int64, device=device)
    # Without tokens that are left out at the input: the estimate is for the whole picture.
    if masks and (grids := getattr(model, "down_grids", ())):
        down = tuple(torch.empty(batch, h * w, dtype=torch.bool, device=device) for h, w in grids)
        inputs["token_masks"] = TokenMasks(down)
    return inputs


class _NoValues(TorchFunctionMode):
    """Whoever looks at the values of integers, as checks of labels do, sees zeros."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.min, Tensor.max) and len(args) == 1 and not kwargs and not args[0].is_floating_point():
            return 0
        return func(*args, **(kwargs or {}))


@contextmanager
def _autocast(device: str, precision: str) -> Iterator[None]:
    """As `torch.autocast`, which refuses to act for a device that is not there."""
    if precision not in _AUTOCAST:
        yield
        return
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, _AUTOCAST[precision])
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])
