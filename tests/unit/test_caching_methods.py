"""Feature caches against closed forms, against diffusers' own, and against schedules counted by hand."""

import itertools
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig
from diffusers.hooks import MagCacheConfig
from test_caching import DEEP, NEEDS_CACHE_DIT, Loop, rows_computed, untouched
from tiny_backbones import tiny_backbone
from tiny_models import tiny_model

from edt_diffusion.caching import CACHES, calibrate_magnitudes, feature_cache, reset
from edt_diffusion.caching.extrapolation import Extrapolation
from edt_diffusion.caching.magnitudes import magnitude_at, timesteps_of_points
from edt_diffusion.caching.residuals import _Ratios
from edt_diffusion.caching.spans import closed, taken_skips
from edt_diffusion.models import backbone
from edt_diffusion.util.errors import UserError


def polynomial(degree: int, step: float) -> torch.Tensor:
    """Another polynomial of the step in each of four places."""
    generator = torch.Generator().manual_seed(degree)
    return sum(torch.randn(4, generator=generator).double() * step**power for power in range(degree + 1))  # pyright: ignore


@pytest.mark.parametrize("steps", [(0, 1, 2, 3), (0, 1, 4, 9), (2, 3, 7, 8)])
@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_polynomials_are_extrapolated_exactly(order, steps):
    exact, beyond = Extrapolation(order), Extrapolation(order)
    for count, step in enumerate(steps):
        assert exact.complete == (count > order)
        exact.record(step, polynomial(order, step))
        beyond.record(step, polynomial(order + 1, step))
    for step in (10, 13):
        torch.testing.assert_close(exact.at(step), polynomial(order, step), atol=1e-9, rtol=1e-9)
        assert (beyond.at(step) - polynomial(order + 1, step)).abs().max() > 0.1


def test_extrapolation_does_not_touch_what_it_was_given():
    values = [torch.tensor([float(2**step)]) for step in range(4)]
    extrapolation = Extrapolation(2)
    for step, value in enumerate(values):
        extrapolation.record(step, value)
    extrapolation.at(7)
    assert [float(value) for value in values] == [1, 2, 4, 8]


def features(loop: Loop, cache: str | None, module: torch.nn.Module, argument: bool = False) -> list[torch.Tensor]:
    """Outputs (or first arguments) of a module in each step."""
    seen: list[torch.Tensor] = []
    if argument:
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: seen.append(output))
    loop.run(cache)
    handle.remove()
    return seen


@pytest.mark.parametrize("order", [0, 1, 2])
def test_taylor_extrapolates_each_attention_and_mlp(order):
    loop = Loop(tiny_model(), steps=5)
    block: Any = loop.model.blocks[3]
    for module in (block.attn, block.ff):
        first = features(loop, f"taylor:order={order},warmup=3,interval=3", module)
        zero, one, two = first[:3]
        # Through steps 0, 1, 2, at 3 and 4.
        if order == 0:
            expected = [two, two]
        elif order == 1:
            expected = [2 * two - one, 3 * two - 2 * one]
        else:
            expected = [3 * two - 3 * one + zero, 6 * two - 8 * one + 3 * zero]
        for got, wanted in zip(first[3:], expected, strict=True):
            torch.testing.assert_close(got, wanted, atol=2e-5, rtol=1e-5)


def steps_computed(loop: Loop, cache: str, block: int, how: str = "cond") -> list[int]:
    module: Any = loop.model.blocks[block]
    out: list[int] = []
    with rows_computed(module.attn) as rows:
        seen: list[int] = []
        loop.run(cache, how, at=lambda _: seen.append(len(rows)))
        seen.append(len(rows))
    for step in range(loop.steps):
        if seen[step + 1] > seen[step]:
            out.append(step)
    return out


@pytest.mark.parametrize(("cache", "steps"), [
    ("fora:interval=3", [0, 3, 6, 9]),
    ("fora:interval=3,last=2", [0, 3, 6, 9, 10, 11]),
    ("taylor:interval=4,warmup=2", [0, 1, 5, 9]),
    ("taylor:interval=4,warmup=3,last=1", [0, 1, 2, 6, 10, 11]),
    ("delta:interval=3,warmup=1", [0, 3, 6, 9]),
    ("delta:interval=3,warmup=2,last=3", [0, 1, 4, 7, 9, 10, 11]),
    # Timesteps are 999 - 83 k: 999 916 833 750 667 584 501 418 335 252 169 86; reused between 100 and 800.
    ("pab", [0, 1, 2, 4, 6, 8, 10, 11]),
    ("pab:interval=3,from=-1,to=1000", [0, 3, 6, 9]),
    ("mag:threshold=100,max_skip=3,retain=0.5", [0, 1, 2, 3, 4, 5, 9]),
])  # fmt: skip
@pytest.mark.parametrize("how", ["cond", "both"])
def test_schedules(cache, steps, how):
    assert steps_computed(Loop(tiny_model()), cache, 3, how) == steps


@pytest.mark.parametrize("how", ["cond", "both"])
def test_delta_skips_the_last_stage_and_later_the_first(how):
    loop = Loop(tiny_model(**DEEP))
    cache = "delta:range=stages,interval=2,warmup=1,outline=0.5"
    first, middle, last = 0, 5, len(loop.model.blocks) - 1
    everything = list(range(12))
    assert steps_computed(loop, cache, middle, how) == everything
    assert steps_computed(loop, cache, last, how) == [0, 2, 4, *range(6, 12)]
    assert steps_computed(loop, cache, first, how) == [*range(6), 6, 8, 10]
    assert steps_computed(loop, cache + ",last=1", first, how) == [*range(6), 6, 8, 10, 11]


# Blocks of DEEP: 0 1 E, 2 down, 3 E, 4 down, 5 E, 6 up, 7 8 E, 9 up, 10 11 12 E. The first up-sampling takes what the
# first down-sampling left, the second what the patch embedding left.
@pytest.mark.parametrize(("first", "last", "taken"), [
    (0, 12, 1), (1, 11, 1), (2, 10, 1), (4, 8, 1), (0, 1, 0), (10, 12, 0), (3, 3, 0), (7, 8, 0), (3, 8, 1), (2, 9, 1),
])  # fmt: skip
def test_ranges_that_can_be_skipped(first, last, taken):
    model = tiny_model(**DEEP)
    assert closed(model, first, last)
    assert taken_skips(list(model.blocks)[first : last + 1]) == taken


@pytest.mark.parametrize(("first", "last"), [(3, 9), (5, 7), (6, 6), (2, 2), (0, 2), (9, 12), (0, 13), (2, 1)])
def test_ranges_that_cannot(first, last):
    assert not closed(tiny_model(**DEEP), first, last)


# Blocks of MDTv2: 0 1 leave long skips, 2 3 take them, 4 side interpolater, 5 6 decoder.
@pytest.mark.parametrize(("first", "last", "taken"), [
    (0, 6, 0), (1, 5, 1), (2, 4, 2), (3, 3, 1), (4, 4, 0), (4, 6, 0), (1, 2, 0), (0, 3, 0),
    (0, 2, -1), (0, 0, -1), (0, 1, -1),
])  # fmt: skip
def test_ranges_of_mdt(first, last, taken):
    model = tiny_backbone("MDTv2")
    assert taken_skips(list(model.blocks)[first : last + 1]) == taken
    assert closed(model, first, last) == (taken >= 0)


def test_any_range_of_dit_can_be_skipped():
    model = tiny_backbone("DiT")
    assert all(closed(model, first, last) for first in range(4) for last in range(first, 4))
    assert taken_skips(model.blocks) == 0


def test_delta_on_one_stage_skips_the_second_half_and_later_the_first():
    loop = Loop(tiny_backbone("DiT"))
    cache = "delta:range=stages,interval=2,warmup=1,outline=0.5"
    assert [steps_computed(loop, cache, block) for block in range(4)] == [
        *[[*range(6), 6, 8, 10]] * 2,
        *[[0, 2, 4, *range(6, 12)]] * 2,
    ]


def test_delta_says_where_no_block_of_a_stage_can_be_skipped():
    model = tiny_backbone("MDTv2")
    with (
        pytest.raises(UserError, match=r"every block of the first stage leaves a long skip, .*use range=u"),
        feature_cache(model, "delta:range=stages", 4, lambda: 0),
    ):
        pass
    assert untouched(model)
    assert steps_computed(Loop(model), "delta:edge=1,warmup=1", 3) == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize("family", ["DiT", "MDTv2"])
@pytest.mark.parametrize(
    ("cache", "steps"), [("fora:interval=3", [0, 3, 6, 9]), ("taylor:interval=4,warmup=2", [0, 1, 5, 9])]
)
def test_schedules_of_other_backbones(family, cache, steps):
    loop = Loop(tiny_backbone(family))
    for block in range(len(loop.model.blocks)):
        if hasattr(loop.model.blocks[block], "attn"):
            assert steps_computed(loop, cache, block) == steps


@pytest.mark.parametrize("family", ["EDT", "MDTv2"])
@pytest.mark.parametrize("cache", [
    "delta:edge=0", "delta:edge=1", "delta:edge=2", "delta:edge=4", "delta:range=stages", "confident:threshold=100",
    "first-block:threshold=100", "mag:threshold=100", pytest.param("cache-dit:threshold=100", marks=NEEDS_CACHE_DIT),
])  # fmt: skip
def test_long_skips_are_those_of_their_own_step(cache, family, monkeypatch):
    """Whoever skips takes the long skips that the skipped blocks would have taken, and later blocks get theirs."""
    made: list[Any] = []

    class Watched(backbone.Skips):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)
            self.pushed: list[torch.Tensor] = []
            self.popped: list[torch.Tensor] = []

        def push(self, hidden_states: torch.Tensor) -> None:
            super().push(hidden_states)
            self.pushed.append(hidden_states)

        def pop(self) -> torch.Tensor:
            self.popped.append(super().pop())
            return self.popped[-1]

    monkeypatch.setattr(backbone, "Skips", Watched)
    loop = Loop(tiny_model(**DEEP) if family == "EDT" else tiny_backbone("MDTv2", depth=10))
    if family == "MDTv2" and cache == "delta:range=stages":
        return  # refused
    loop.run(cache)
    assert len(made) == loop.steps
    own = cache.split(":")[0] in ("delta", "confident", "cache-dit")
    for skips in made:
        assert all(a is b for a, b in zip(skips.popped, reversed(skips.pushed), strict=False))
        # diffusers' hooks leave on the stack what nobody takes any more.
        assert skips._newest.hidden_states is None or not own


@torch.no_grad()
def test_delta_adds_the_old_difference_to_the_current_tokens():
    loop = Loop(tiny_model(**DEEP), steps=2)
    model: Any = loop.model
    before: list[torch.Tensor] = []
    cache = "delta:edge=1,order=0,warmup=1"
    handle = model.blocks[0].register_forward_hook(lambda _, __, output: before.append(output))
    after = features(loop, cache, model.blocks[-1], argument=True)
    handle.remove()
    torch.testing.assert_close(after[1], before[1] + (after[0] - before[0]), atol=1e-6, rtol=0)
    assert (before[1] - before[0]).abs().max() > 1e-2


def test_delta_names_the_edges_that_fit():
    model = tiny_model(**DEEP)
    with (
        pytest.raises(UserError, match=r"'delta:edge=3'.*edge=0, 1, 2, 4$"),
        feature_cache(model, "delta:edge=3", 4, lambda: 0),
    ):
        pass
    assert untouched(model)


@torch.no_grad()
def test_confident_predicts_the_last_block_where_the_first_was_predicted():
    loop = Loop(tiny_model(), steps=3)
    model: Any = loop.model
    zero, one, two = features(loop, None, model.blocks[0])
    error = float((2 * one - zero - two).abs().mean() / two.abs().mean())
    exact = features(loop, None, model.norm_out, argument=True)
    below, above = f"confident:threshold={0.999 * error}", f"confident:threshold={1.001 * error}"
    assert steps_computed(loop, below, 3, "cond_uncond") == [0, 1, 2]
    assert steps_computed(loop, above, 3, "cond_uncond") == [0, 1]
    assert steps_computed(loop, above, 0, "cond_uncond") == [0, 1, 2]
    predicted = features(loop, above, model.norm_out, argument=True)
    torch.testing.assert_close(predicted[2], 2 * exact[1] - exact[0], atol=1e-5, rtol=0)
    assert (predicted[2] - exact[2]).abs().max() > 1e-3


@pytest.mark.parametrize("threshold", [0.0, 0.3, 100.0])
def test_first_block_is_that_of_diffusers(threshold):
    loop = Loop(tiny_model())
    ours = loop.run(f"first-block:threshold={threshold}")
    loop.model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    assert torch.equal(loop.run(None), ours)


def test_mag_is_that_of_diffusers_with_ratios_of_the_curve():
    loop = Loop(tiny_model())
    curve = tuple(2.0**i for i in range(11))
    timesteps = [999 - step * 999 // loop.steps for step in range(loop.steps)]
    lengths = [magnitude_at(curve, timestep) for timestep in timesteps]
    ratios = [1.0] + [now / before for before, now in itertools.pairwise(lengths)]
    word = "/".join(map(str, curve))
    middle: Any = loop.model.blocks[3]
    with rows_computed(middle.attn) as rows:
        ours = loop.run(f"mag:threshold=0.6,max_skip=3,retain=0.2,magnitudes={word}")
    assert len(rows) == 7
    # By hand, accumulating |1 - product of ratios|: 0.6 is passed after one step skipped each time.
    word = f"mag:threshold=0.6,max_skip=3,retain=0.2,magnitudes={word}"
    assert steps_computed(loop, word, 3) == [0, 1, 3, 5, 7, 9, 11]
    with rows_computed(middle.attn) as rows:
        loop.run(word, "both")
    assert len(rows) == 2 * 7  # both halves take the same steps
    loop.model.enable_cache(MagCacheConfig(
        threshold=0.6, max_skip_steps=3, retention_ratio=0.2, num_inference_steps=loop.steps,
        mag_ratios=torch.tensor(ratios, dtype=torch.float64),
    ))  # fmt: skip
    assert torch.equal(loop.run(None), ours)


# The default curve at the twelve timesteps of `Loop`, 999 916 833 750 666 583 500 417 333 250 167 84, to three digits:
# 52.5 52.5 52.4 52.2 51.9 51.3 50.6 48.9 46.5 42.8 36.9 27.3. Lengths fall by 0.04 at most in one step down to 417, by
# 0.05 and 0.08 in the two after, by 0.14 and 0.26 in the last two.
@pytest.mark.parametrize(("options", "steps"), [
    ("", [0, 1, 2, 3, 5, 7, 9, 10, 11]),  # 0.3 of twelve is four; every second until 0.14 is more than 0.1
    ("retain=0", [0, 2, 4, 6, 8, 10, 11]),  # the first has nothing to reuse
    ("retain=0.5", [0, 1, 2, 3, 4, 5, 7, 9, 10, 11]),
    # Skipped: 2 3 4 (0.001 + 0.005 + 0.011, and three is the most), 6 7 (0.014 + 0.047; 8 would add 0.094), 9 (0.08).
    ("retain=0.2,max_skip=3", [0, 1, 5, 8, 10, 11]),
])  # fmt: skip
def test_mag_skips_from_the_first_step_after_those_retained(options, steps):
    assert steps_computed(Loop(tiny_model()), f"mag:{options}", 3) == steps


def test_the_first_ratio_of_mag_is_one():
    """Lengths 64 and 32 at timesteps 999 and 999 x 0.9^2; before the first there is none to compare with."""
    site: Any = SimpleNamespace(clock=SimpleNamespace(step=0), timestep=lambda: now, steps=2)
    curve, now = tuple(float(2 ** (i - 4)) for i in range(11)), 999.0
    ratios = _Ratios(site, curve)
    assert [ratios[0], ratios[0]] == [1.0, 1.0]  # twice: in both contexts
    site.clock.step, now = 1, 999 * 0.9**2
    assert [ratios[1], ratios[1]] == pytest.approx([0.5, 0.5])


def test_it_is_told_whose_the_default_magnitudes_are():
    assert "one small CIFAR-10 model" in CACHES["mag"].options["magnitudes"].text


@NEEDS_CACHE_DIT
@pytest.mark.parametrize("level", [logging.DEBUG, logging.INFO, logging.ERROR])
def test_cache_dit_prints_nothing(level, monkeypatch):
    """Its logger writes to standard output as it was when the package was imported, so a handler listens here."""
    import cache_dit  # noqa: F401  # pyright: ignore[reportMissingImports]
    from cache_dit.caching.cache_blocks import pattern_base  # pyright: ignore[reportMissingImports]

    told: list[str] = []
    handler = logging.Handler()
    monkeypatch.setattr(handler, "emit", lambda record: told.append(record.getMessage()))
    logger = pattern_base.logger
    monkeypatch.setattr(logger, "handlers", [handler])
    before = logger.level
    logger.setLevel(level)
    try:
        Loop(tiny_model()).run("cache-dit")
        assert logger.level == level  # as it was
        assert not [line for line in told if "Match Blocks" in line]
    finally:
        logger.setLevel(before)


def test_mag_does_not_begin_anew_where_features_were_forgotten():
    """Half of the steps are always computed: not half of what is left after a reset, which costs one step."""
    loop = Loop(tiny_model())
    middle: Any = loop.model.blocks[3]
    with rows_computed(middle.attn) as rows:
        loop.run("mag:threshold=100,max_skip=9,retain=0.5", at=lambda step: reset(loop.model) if step == 8 else None)
    assert len(rows) == 6 + 1


def test_a_curve_has_its_numbers_at_its_points():
    curve = tuple(float(2**i) for i in range(11))
    points = timesteps_of_points()
    assert points[0] == 0
    assert points[-1] == 999
    assert [magnitude_at(curve, timestep) for timestep in points] == pytest.approx(list(curve))
    assert magnitude_at(curve, 999 * 0.25**2) == pytest.approx((curve[2] + curve[3]) / 2)
    assert magnitude_at(curve, 1500) == curve[-1]


@torch.no_grad()
def test_calibration_measures_the_length_of_what_all_blocks_add():
    loop = Loop(tiny_model())
    model: Any = loop.model
    seen: dict[str, torch.Tensor] = {}
    handles = [
        model.blocks[0].register_forward_pre_hook(lambda _, args: seen.update(first=args[0])),
        model.norm_out.register_forward_pre_hook(lambda _, args: seen.update(last=args[0])),
    ]
    lengths = {}
    with calibrate_magnitudes(model) as magnitudes:
        for loop.now in (999, 499, 0):
            loop.predict("cond", loop.noise)
            lengths[loop.now] = float((seen["last"] - seen["first"]).pow(2).sum(-1).sqrt().mean())
    for handle in handles:
        handle.remove()
    curve = magnitudes.curve()
    assert curve[0] == pytest.approx(lengths[0], rel=1e-3)
    assert curve[10] == pytest.approx(lengths[999], rel=1e-3)
    share = (timesteps_of_points()[5] - 0) / 499
    assert curve[5] == pytest.approx(lengths[0] * (1 - share) + lengths[499] * share, rel=1e-3)
    setting = magnitudes.setting(max_skip=1)
    assert str(setting).startswith("mag:max_skip=1,magnitudes=")
    assert loop.run(str(setting)).isfinite().all()
    assert not model._forward_pre_hooks
    with calibrate_magnitudes(model) as nothing:
        pass
    with pytest.raises(UserError, match="0 timesteps were seen"):
        nothing.curve()


@pytest.mark.filterwarnings("ignore:torch.meshgrid")
def test_faster_is_that_of_diffusers():
    loop = Loop(tiny_model(sample_size=16))
    generator = torch.Generator().manual_seed(3)
    loop.noise = torch.randn(2, 3, 16, 16, generator=generator)
    ours = loop.run("faster:uncond=4,interval=2,to=700,low=1.1,high=1.3,weight=0.3")
    loop.model.enable_cache(FasterCacheConfig(
        spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(-1, 700),
        unconditional_batch_skip_range=4, unconditional_batch_timestep_skip_range=(-1, 700),
        low_frequency_weight_callback=lambda _: 1.1, high_frequency_weight_callback=lambda _: 1.3,
        attention_weight_callback=lambda _: 0.3, tensor_format="BCHW", current_timestep_callback=lambda: loop.now,
        _unconditional_conditional_input_kwargs_identifiers=["hidden_states", "class_labels"],
    ))  # fmt: skip
    theirs = loop.run(None)
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)
    loop.model.disable_cache()
    assert (loop.run(None) - theirs).abs().max() > 1e-2


@torch.no_grad()
def test_faster_computes_the_conditional_half_and_adds_the_last_difference():
    loop = Loop(tiny_model())
    model, batch = loop.model, len(loop.noise)
    labels = torch.cat([loop.null(), loop.labels])  # pyright: ignore
    inputs = [torch.cat([loop.noise + shift] * 2) for shift in (0.0, 0.1)]
    loop.now = 300
    full = [loop.call("cond_uncond", x, labels) for x in inputs]
    with feature_cache(model, "faster", 2, lambda: loop.now, guided=True):
        cached = [loop.call("cond_uncond", x, labels) for x in inputs]
    assert torch.equal(cached[0], full[0])
    torch.testing.assert_close(cached[1][batch:], full[1][batch:], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        cached[1][:batch] - cached[1][batch:], full[0][:batch] - full[0][batch:], atol=1e-5, rtol=0
    )
    assert (cached[1][:batch] - full[1][:batch]).abs().max() > 1e-3


@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_faster_computes_one_half_alone_in_full(batch):
    """As in the steps of a guided sampling that have no guidance."""
    loop = Loop(tiny_model(), batch=batch)
    inputs = [loop.noise * scale for scale in (1.0, 0.9, 0.8, 0.7)]
    loop.now = 300
    expected = [loop.call("cond", x, loop.labels) for x in inputs]
    with feature_cache(loop.model, "faster:interval=2", 4, lambda: loop.now, guided=True):
        for x, wanted in zip(inputs, expected, strict=True):
            assert torch.equal(loop.call("cond", x, loop.labels), wanted)


@torch.no_grad()
def test_faster_takes_a_timestep_for_each_row_and_gives_a_model_output():
    loop = Loop(tiny_model())
    labels = torch.cat([loop.null(), loop.labels])  # pyright: ignore
    outputs = []
    with feature_cache(loop.model, "faster", 3, lambda: 300, guided=True):
        for _ in range(2):
            with loop.model.cache_context("cond_uncond"):
                outputs.append(loop.model(hidden_states=torch.cat([loop.noise] * 2), timestep=torch.full((4,), 300),
                                          class_labels=labels).sample)  # fmt: skip
    assert outputs[1].shape == (4, 6, 8, 8)
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-5, rtol=0)


def test_moved_names_of_diffusers_are_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "edt_diffusion.caching.diffusers_hooks", raising=False)
    monkeypatch.delitem(sys.modules, "edt_diffusion.caching.site", raising=False)
    monkeypatch.setitem(sys.modules, "diffusers.hooks.mag_cache", None)
    with (
        pytest.raises(UserError, match=r"diffusers >= 0.42, < 0.43"),
        feature_cache(tiny_model(), "fora", 4, lambda: 0),
    ):
        pass


def test_a_missing_package_is_told_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "cache_dit", None)
    model = tiny_model()
    with (
        pytest.raises(UserError, match=r"pip install \"edt-diffusion\[cache-dit\]\""),
        feature_cache(model, "cache-dit", 4, lambda: 0),
    ):
        pass
    assert untouched(model)


@pytest.mark.parametrize("name", ["first-block", "mag", "confident", "cache-dit", "delta:range=stages"])
def test_one_block_is_too_few(name):
    if name == "cache-dit":
        pytest.importorskip("cache_dit")
    model = tiny_model(depths=(1,), dims=(16,), num_heads=(2,))
    with pytest.raises(UserError, match="2 blocks or more, not 1"), feature_cache(model, name, 4, lambda: 0):
        pass
    assert untouched(model)


def test_the_hooks_of_others_stay(monkeypatch):
    """Layerwise casting also puts hooks into modules; a cache comes and goes around them."""
    loop = Loop(tiny_model())
    loop.model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    expected = loop.run(None)
    hooked = [name for name, part in loop.model.named_modules() if hasattr(part, "_diffusers_hook")]
    loop.run("fora")
    loop.run("delta")
    now = [name for name, part in loop.model.named_modules() if hasattr(part, "_diffusers_hook")]
    assert [name for name in now if name] == [name for name in hooked if name]
    assert torch.equal(loop.run(None), expected)


def test_every_default_is_an_allowed_value():
    for name, choice in CACHES.items():
        for option in choice.options.values():
            assert option.check(name, option.default) == option.default
