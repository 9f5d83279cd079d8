"""A feature cache around one sampling: installed on entry, removed on exit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ..util.errors import UserError
from .choices import CACHES, parse_cache
from .settings import CacheSetting


@contextmanager
def feature_cache(
    network: Any,
    setting: CacheSetting | str | None,
    steps: int,
    timestep: Callable[[], int],
    guided: bool = False,
) -> Iterator[None]:
    """Features of one step are reused in later ones within the body, which is one sampling.

    The body calls the network as `with network.cache_context(name): network(hidden_states=..., timestep=..., ...)`.
    Each name has features of its own. All state is made on entry and removed on exit, also after an exception, so
    that the next sampling may have another batch size, other pictures and another cache.

    Args:
        network: the denoiser, a diffusers model with `blocks` in execution order.
        setting: see `parse_cache`; None does nothing, and leaves alone what `enable_cache` of diffusers turned on.
        steps: calls of the network in each context (two a step for two-stage solvers such as Heun's).
        timestep: returns the timestep of the current step, 0 ... 999.
        guided: whether the call of every step holds both halves of guidance in one batch, the unconditional half first.

    Raises:
        UserError: an unknown cache or option, one that this network or sampling cannot have, or another cache is on.
    """
    setting = parse_cache(setting)
    if setting is None:
        yield
        return
    from .diffusers_hooks import marked
    from .site import Site

    if marked(network):
        raise UserError(
            f"cache {str(setting)!r}: another cache is on already; call disable_cache() on the network first"
        )
    choice = CACHES[setting.name]
    if choice.joint_guidance_only and not guided:
        raise UserError(
            f"cache {setting.name!r} needs guidance with both halves in one batch in every step: set a guidance scale "
            "other than 1, one batch for both, and the guidance schedule 'constant', or choose another cache"
        )
    site = Site(network, setting, choice.with_defaults(setting), steps, timestep, guided)
    try:
        choice.install(site)
        site.open()
        yield
    finally:
        site.close()


def reset(network: Any) -> None:
    """Forget all features now, for instance where guidance begins or ends within a sampling.

    The next step is computed in full. Hooks of ours and those of `enable_cache` alike.
    """
    from .diffusers_hooks import reset as reset_hooks

    reset_hooks(network)
