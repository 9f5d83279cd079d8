"""The one file that imports what diffusers keeps private: its hook registry, and the hooks of its own caches.

Import it inside functions: where diffusers has moved these names, only who asks for a cache is told.
"""

from typing import Any

from torch import nn

from ..util.errors import UserError

try:
    from diffusers.hooks.faster_cache import FasterCacheBlockHook, FasterCacheBlockState
    from diffusers.hooks.first_block_cache import FBCBlockHook, FBCHeadBlockHook, FBCSharedBlockState
    from diffusers.hooks.hooks import BaseState, HookRegistry, ModelHook, StateManager
    from diffusers.hooks.mag_cache import MagCacheBlockHook, MagCacheHeadHook, MagCacheState
    from diffusers.hooks.pyramid_attention_broadcast import (
        PyramidAttentionBroadcastHook,
        PyramidAttentionBroadcastState,
    )
except ImportError as error:
    import diffusers

    raise UserError(
        f"feature caches need diffusers >= 0.42, < 0.43, and {diffusers.__version__} is installed ({error}): "
        "install that version, or sample without a cache"
    ) from error

__all__ = [
    "BaseState", "FBCBlockHook", "FBCHeadBlockHook", "FBCSharedBlockState", "FasterCacheBlockHook",
    "FasterCacheBlockState", "HookRegistry", "MagCacheBlockHook", "MagCacheHeadHook", "MagCacheState", "ModelHook",
    "PyramidAttentionBroadcastHook", "PyramidAttentionBroadcastState", "StateManager", "install", "mark", "marked",
    "remove", "reset", "tree_changed",
]  # fmt: skip


def install(module: nn.Module, name: str, hook: Any) -> None:
    """Put a hook around `module.forward`, outside those that are there."""
    HookRegistry.check_if_exists_or_initialize(module).register_hook(hook, name)


def remove(module: nn.Module, name: str) -> None:
    """Undo `install`; a module without other hooks is as it was before the first."""
    registry: Any = module._diffusers_hook
    registry.remove_hook(name, recurse=False)
    if not registry.hooks:
        # The registry puts a bound method back where the class's own was found.
        if getattr(module.__dict__.get("forward"), "__func__", None) is type(module).forward:
            del module.__dict__["forward"]
        del module._diffusers_hook


def tree_changed(network: nn.Module) -> None:
    """Tell the network that hooks of its parts came or went; `cache_context` keeps a list of them."""
    HookRegistry.check_if_exists_or_initialize(network).invalidate_child_registries_cache()


def reset(network: nn.Module) -> None:
    """Let every hook in the network forget."""
    HookRegistry.check_if_exists_or_initialize(network).reset_stateful_hooks()


def marked(network: nn.Module) -> bool:
    """Whether a cache is on, by us or by `enable_cache`."""
    return getattr(network, "_cache_config", None) is not None


def mark(network: Any, setting: Any) -> None:
    """Say what `is_cache_enabled` should see, so that `enable_cache` refuses a second cache."""
    network._cache_config = setting
