"""DBCache of the package cache-dit (optional), with its TaylorSeer calibrator.

Its own entry point replaces `network.blocks` and patches the class of the pipeline. Here only its unified block list is
used, called by a hook of the first block, with a manager for each of our contexts: nothing is patched, and the halves
of guidance cannot meet.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..util.errors import UserError
from .diffusers_hooks import BaseState, StateManager
from .site import CacheHook, Site
from .spans import taken_skips

_NAME = "edt"
_LOGGER = "cache_dit.caching.cache_blocks.pattern_base"


@contextmanager
def _quiet() -> Iterator[None]:
    """cache-dit's line "Match Blocks: ..." on standard output is left out; warnings are not."""
    logger = logging.getLogger(_LOGGER)
    level = logger.level
    logger.setLevel(max(level, logging.WARNING))
    try:
        yield
    finally:
        logger.setLevel(level)


class UnifiedState(BaseState):
    """cache-dit's list of one context."""

    def __init__(self, network: nn.Module, settings: dict[str, Any], calibrator: dict[str, Any] | None) -> None:
        import cache_dit  # pyright: ignore[reportMissingImports]
        from cache_dit.caching import CachedBlocks, CachedContextManager  # pyright: ignore[reportMissingImports]

        manager = CachedContextManager(name=_NAME, persistent_context=True)
        calibration = None if calibrator is None else cache_dit.TaylorSeerCalibratorConfig(**calibrator)
        manager.new_context(  # pyright: ignore[reportAttributeAccessIssue]
            name=_NAME, cache_config=cache_dit.DBCacheConfig(**settings), calibrator_config=calibration
        )
        self.manager = manager
        with _quiet():
            self.blocks: Any = CachedBlocks(
                network.blocks,  # pyright: ignore[reportArgumentType]
                transformer=network,
                forward_pattern=cache_dit.ForwardPattern.Pattern_3,
                check_forward_pattern=True,
                cache_prefix="blocks",
                cache_context=_NAME,
                context_manager=manager,
            )
        self.inside = False
        self.computed = 0  # blocks, in the current call

    def reset(self) -> None:
        self.manager.clear_contexts()


class UnifiedHook(CacheHook):
    """One block of the network: the first calls cache-dit's list, which calls all blocks; then the others pass."""

    def __init__(self, states: StateManager, first: bool, taken: int) -> None:
        super().__init__()
        self.states, self.first, self.taken = states, first, taken

    def new_forward(self, module: nn.Module, hidden_states: Tensor, temb: Tensor, skips: Any) -> Tensor:
        state: Any = self.states.get_state()
        if state.inside:
            state.computed += 1
            return self.fn_ref.original_forward(hidden_states, temb, skips)
        if not self.first:
            return hidden_states
        state.inside, state.computed = True, 0
        try:
            output = state.blocks(hidden_states, temb, skips)
        finally:
            state.inside = False
        if state.computed == 1:  # the rest was skipped
            for _ in range(self.taken):
                skips.pop()
        return output


def install_cache_dit(site: Site) -> None:
    """Options threshold, order, warmup and max_skip.

    Raises:
        UserError: cache-dit is not installed.
    """
    try:
        import cache_dit  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            f"cache 'cache-dit' needs a package that is not installed ({error}): "
            'pip install "edt-diffusion[cache-dit]"'
        ) from error
    options: Any = site.options
    settings = {
        "Fn_compute_blocks": 1,
        "Bn_compute_blocks": 0,
        "residual_diff_threshold": options["threshold"],
        "max_warmup_steps": options["warmup"],
        "max_continuous_cached_steps": options["max_skip"],
        "num_inference_steps": site.steps,
        "enable_separate_cfg": False,
    }
    calibrator = {"taylorseer_order": options["order"]} if options["order"] else None
    blocks = site.blocks(2)
    states = StateManager(UnifiedState, init_args=(site.network, settings, calibrator))  # pyright: ignore[reportArgumentType]
    for block in blocks:
        site.add(block, UnifiedHook(states, block is blocks[0], taken_skips(blocks[1:])))
