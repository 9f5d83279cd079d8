"""Where a cache is installed: the network, the sampling, and the hooks that were put in for it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from ..util.errors import UserError
from .diffusers_hooks import BaseState, ModelHook, StateManager, install, mark, remove, tree_changed
from .settings import CacheSetting, Value

_PREFIX = "edt_cache"


@dataclass(frozen=True)
class Schedule:
    """The first `warmup` calls are computed in full, then every `interval`-th, counted from the last of them."""

    interval: int
    warmup: int = 1

    def computes(self, call: int) -> bool:
        return call < self.warmup or (call - self.warmup + 1) % self.interval == 0


class CacheHook(ModelHook):
    """A hook of ours; what it keeps is in `states`, apart for each context."""

    _is_stateful = True
    fn_ref: Any
    states: StateManager

    def reset_state(self, module: nn.Module) -> nn.Module:
        self.states.reset()
        return module


class Clock(CacheHook):
    """Counts the steps of a sampling, at the network itself.

    A step has one call, or one in each context; a step begins when a context is called again or the timestep changes.

    Attributes:
        step: of the current call, from 0; forgetting features does not touch it.
    """

    def __init__(self, timestep: Callable[[], int]) -> None:
        super().__init__()
        self.states = StateManager(BaseState)  # pyright: ignore[reportArgumentType]
        self.timestep = timestep
        self.step = -1
        self._called: set[str] = set()
        self._last: int | None = None

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        name, now = self.states.context.name, self.timestep()
        if name in self._called or now != self._last:
            self.step += 1
            self._called = set()
        self._called.add(name)
        self._last = now
        return args, kwargs

    def reset_state(self, module: nn.Module) -> nn.Module:
        return module


@dataclass
class Site:
    """What the installers of caches are given.

    Attributes:
        network: the denoiser; `network.blocks` are called as `block(hidden_states, temb, skips)`.
        setting: for error messages.
        options: every option of the cache, checked.
        steps: calls of the network in each context.
        timestep: returns the current one, 0 ... 999.
        guided: whether both halves of guidance are in one batch.
    """

    network: Any
    setting: CacheSetting
    options: dict[str, Value]
    steps: int
    timestep: Callable[[], int]
    guided: bool
    _installed: list[tuple[nn.Module, str]] = field(default_factory=list)
    _clock: Clock | None = None

    def add(self, module: nn.Module, hook: Any) -> None:
        """Put a hook around `module.forward` until `close`."""
        name = f"{_PREFIX}_{type(hook).__name__}"
        install(module, name, hook)
        self._installed.append((module, name))

    @property
    def clock(self) -> Clock:
        """The sampling's clock, put in when first asked for."""
        if self._clock is None:
            self._clock = Clock(self.timestep)
            self.add(self.network, self._clock)
        return self._clock

    def blocks(self, least: int = 1) -> Sequence[nn.Module]:
        """The blocks in execution order.

        Raises:
            UserError: there are fewer than the cache needs.
        """
        blocks = list(self.network.blocks)
        if len(blocks) < least:
            raise UserError(f"cache {str(self.setting)!r} needs a network of {least} blocks or more, not {len(blocks)}")
        return blocks

    def open(self) -> None:
        """Hooks are in place."""
        tree_changed(self.network)
        mark(self.network, self.setting)

    def close(self) -> None:
        """Remove the hooks and all that they keep."""
        while self._installed:
            remove(*self._installed.pop())
        tree_changed(self.network)
        mark(self.network, None)
        registry = self.network._diffusers_hook
        if not registry.hooks:  # made by `cache_context`
            del self.network._diffusers_hook
