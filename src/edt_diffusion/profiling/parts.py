"""A network's parts by stage and kind, and hooks that tell when they compute."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Part:
    """Where time goes.

    Attributes:
        stage: number of the stage, None for what is before and after the stages.
        kind: of work, such as "attention".
    """

    stage: int | None
    kind: str


OTHER = Part(None, "other")

# Children of a model, of its blocks, and whole blocks by class. What is not listed has its own name as its kind.
_MODEL_KINDS = {
    "patch_embed": "patch embedding",
    "time_proj": "timestep, class",
    "timestep_embedder": "timestep, class",
    "class_embedder": "timestep, class",
    "norm_out": "final layer",
    "proj_out": "final layer",
}
_CHILD_KINDS = {"attn": "attention", "ff": "MLP", "mlp": "MLP", "adaln": "adaLN", "skip_linear": "long skip"}
_BLOCK_KINDS = {"DownSample": "down-sampling", "UpSample": "up-sampling", "SideInterpolater": "side interpolater"}
_REST = "norms, gates"
COMPILED = "compiled blocks"


def parts_of(network: nn.Module) -> dict[str, Part]:
    """The part of each module that is one, by its name; within a block the block's own name is what remains of it.

    Works for any model with `blocks`; their stages are `block_stages`, or one stage.
    """
    found: dict[str, Part] = {}
    for name, child in network.named_children():
        if name != "blocks":
            found[name] = Part(None, _MODEL_KINDS.get(name, name))
            continue
        stages = getattr(network, "block_stages", None) or [0] * len(list(child.children()))
        for (number, block), stage in zip(child.named_children(), stages, strict=True):
            kinds = {key: _CHILD_KINDS[key] for key, _ in block.named_children() if key in _CHILD_KINDS}
            whole = f"blocks.{number}"
            if "attention" not in kinds.values():
                found[whole] = Part(stage, _BLOCK_KINDS.get(type(block).__name__, type(block).__name__))
            elif is_compiled(block):
                found[whole] = Part(stage, COMPILED)
            else:
                found[whole] = Part(stage, _REST)
                found |= {f"{whole}.{key}": Part(stage, kind) for key, kind in kinds.items()}
    return found


def owner(name: str, parts: dict[str, Part]) -> str | None:
    """The name of the innermost part that holds the module `name`, None if it is in none."""
    while name and name not in parts:
        name = name.rpartition(".")[0]
    return name or None


def is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called: nothing within it can be watched."""
    return getattr(module, "_compiled_call_impl", None) is not None


@contextlib.contextmanager
def watched(module: nn.Module, before: Callable[[], None], after: Callable[[], None]) -> Iterator[None]:
    """Call `before` and `after` around each call of a module; of a compiled one from outside the graph."""
    if is_compiled(module):
        inner: Any = module._compiled_call_impl

        def timed(*args: Any, **kwargs: Any) -> Any:
            before()
            try:
                return inner(*args, **kwargs)
            finally:
                after()

        module._compiled_call_impl = timed
        try:
            yield
        finally:
            module._compiled_call_impl = inner
        return
    handles = [
        module.register_forward_pre_hook(lambda *_: before()),
        module.register_forward_hook(lambda *_: after()),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
