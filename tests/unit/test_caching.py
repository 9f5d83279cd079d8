"""What every feature cache promises; a cache is tested by being in the table."""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from tiny_backbones import tiny_backbone
from tiny_models import tiny_model

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.caching import CACHES, feature_cache, reset
from edt_diffusion.util.errors import UserError

NEEDS_CACHE_DIT = pytest.mark.skipif(importlib.util.find_spec("cache_dit") is None, reason="cache-dit is not installed")
ALL = [pytest.param(name, marks=[NEEDS_CACHE_DIT] if name == "cache-dit" else []) for name in CACHES]
JOINT_ONLY = {"faster"}
APART = [parameter for parameter in ALL if parameter.values[0] not in JOINT_ONLY]

# Settings under which every step is computed in full.
NEVER = {
    "first-block": "threshold=0", "mag": "max_skip=0", "taylor": "interval=1", "fora": "interval=1",
    "pab": "interval=1", "faster": "uncond=1", "delta": "interval=1", "confident": "threshold=0",
    "cache-dit": "threshold=0",
}  # fmt: skip
# Settings that skip often on random weights, where features change much from step to step.
OFTEN = {"first-block": "first-block:threshold=100", "confident": "confident:threshold=100", "cache-dit":
         "cache-dit:threshold=100", "mag": "mag:threshold=100"}  # fmt: skip
# Where a difference is kept and added again (or passes through a Fourier transform): rounding. Others: bit for bit.
ROUNDING = {"first-block", "mag", "faster", "delta", "cache-dit"}

DEEP: dict[str, Any] = {
    "sample_size": 8, "patch_size": 1, "depths": (2, 1, 1, 2, 3), "dims": (16, 24, 32, 24, 16),
    "num_heads": (2, 3, 4, 3, 2),
}  # fmt: skip
MODELS: dict[str, Callable[[], EDTTransformer2DModel]] = {
    "three stages": tiny_model,
    "five stages": lambda: tiny_model(**DEEP),
    "unconditional": lambda: tiny_model(num_classes=None),
    "modulated": lambda: modulated(),
    "DiT": lambda: tiny_backbone("DiT"),
    "MDTv2": lambda: tiny_backbone("MDTv2"),
}
BASELINES = ("DiT", "MDTv2")


def modulated() -> EDTTransformer2DModel:
    model = tiny_model()
    model.set_attention_modulation([0, 3])
    return model


class Loop:
    """A small sampling loop: x <- x - 0.3 prediction at evenly spaced timesteps, in the contexts of a pipeline."""

    def __init__(self, model: EDTTransformer2DModel, steps: int = 12, batch: int = 2, seed: int = 0) -> None:
        self.model, self.steps = model, steps
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(batch, 3, 8, 8, generator=generator)
        self.labels = None if model.null_label is None else torch.randint(0, 5, (batch,), generator=generator)
        self.now = 0

    def call(self, context: str, x: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        arguments = {} if labels is None else {"class_labels": labels}
        with self.model.cache_context(context):
            output = self.model(hidden_states=x, timestep=torch.tensor(self.now), **arguments, return_dict=False)[0]
        return output[:, :3]

    def null(self) -> torch.Tensor | None:
        return None if self.labels is None else torch.full_like(self.labels, self.model.null_label)  # pyright: ignore

    def predict(self, how: str, x: torch.Tensor) -> torch.Tensor:
        """The (guided) prediction: "cond_uncond", "both" (two calls), "swapped" (in the other order) or "cond"."""
        if how == "cond":
            return self.call("cond", x, self.labels)
        if how == "cond_uncond":
            labels = None if self.labels is None else torch.cat([self.null(), self.labels])
            without, with_class = self.call("cond_uncond", torch.cat([x, x]), labels).chunk(2)
        else:
            calls = {"uncond": self.null(), "cond": self.labels}
            names = list(calls) if how == "both" else list(calls)[::-1]
            found = {name: self.call(name, x, calls[name]) for name in names}
            without, with_class = found["uncond"], found["cond"]
        return without + 1.5 * (with_class - without)

    @torch.no_grad()
    def run(self, cache: str | None, how: str = "cond_uncond", frozen: bool = False, stop: int | None = None, at=None):
        """All predictions, (steps, B, 3, 8, 8); `frozen` gives each step the same input."""
        x, out = self.noise, []
        with feature_cache(self.model, cache, self.steps, lambda: self.now, guided=how == "cond_uncond"):
            for step in range(self.steps):
                self.now = 500 if frozen else 999 - step * 999 // self.steps
                if step == stop:
                    raise RuntimeError("in the middle")
                if at is not None:
                    at(step)
                out.append(self.predict(how, x))
                x = x if frozen else x - 0.3 * out[-1]
        return torch.stack(out)


@contextmanager
def rows_computed(module: torch.nn.Module) -> Iterator[list[int]]:
    """Batch rows in each forward of `module`."""
    rows: list[int] = []
    original = type(module).forward

    def forward(self, hidden_states, *args, **kwargs):
        if self is module:
            rows.append(len(hidden_states))
        return original(self, hidden_states, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(module), "forward", forward)
        yield rows


def untouched(model: EDTTransformer2DModel) -> bool:
    """No module has a hook or a forward of its own, and no cache is on."""
    clean = all("forward" not in part.__dict__ and not hasattr(part, "_diffusers_hook") for part in model.modules())
    return clean and not model.is_cache_enabled


def test_the_table_and_the_settings_of_these_tests_agree():
    assert set(CACHES) == set(NEVER)
    assert {name for name, choice in CACHES.items() if choice.joint_guidance_only} == JOINT_ONLY
    # What is skipped by step and timestep alone leaves a picture its own, whoever is in its batch.
    assert {name for name, choice in CACHES.items() if choice.batch_decides} == {
        "first-block",
        "confident",
        "cache-dit",
    }


# 12 steps on one input; the number of them in which the attention of a middle block is computed, derived by hand.
COMPUTED = {
    "first-block": 1,
    "mag": 8,  # four, which is 0.3 of twelve, then one after each that is skipped: 5 7 9 11
    "taylor": 7,  # 0 1 2, then every second: 4 6 8 10
    "fora": 6,  # 0 2 4 6 8 10
    "pab": 6,
    "faster": 8,  # four whole steps, 0 3 6 9, and eight halves
    "delta": 7,  # the same
    "confident": 4,  # a straight line needs 0 1; then one after each three skipped: 5 9
    "cache-dit": 4,  # the same
}  # fmt: skip


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("name", ALL)
def test_the_same_input_gives_what_full_computation_gives(name, kind):
    loop = Loop(MODELS[kind]())
    expected = loop.run(None, frozen=True)
    middle: Any = loop.model.blocks[3]
    with rows_computed(middle.attn) as rows:
        outputs = loop.run(name, frozen=True)
    assert sum(rows) / (2 * len(loop.noise)) == COMPUTED[name]
    if name in ROUNDING:
        torch.testing.assert_close(outputs, expected, atol=2e-5, rtol=0)
    else:
        assert torch.equal(outputs, expected)


@pytest.mark.parametrize("how", ["cond_uncond", "both", "cond"])
@pytest.mark.parametrize("name", ALL)
def test_a_setting_that_never_skips_changes_no_bit(name, how):
    if name in JOINT_ONLY and how != "cond_uncond":
        pytest.skip("needs both halves in one batch")
    loop = Loop(tiny_model(**DEEP))
    expected = loop.run(None, how)
    assert torch.equal(loop.run(f"{name}:{NEVER[name]}", how), expected)
    assert not torch.equal(loop.run(OFTEN.get(name, name), how), expected)


@pytest.mark.parametrize("kind", BASELINES)
@pytest.mark.parametrize("name", ALL)
def test_a_setting_that_never_skips_changes_no_bit_of_other_backbones(name, kind):
    loop = Loop(MODELS[kind](), steps=6)
    expected = loop.run(None)
    assert torch.equal(loop.run(f"{name}:{NEVER[name]}"), expected)
    assert not torch.equal(loop.run(OFTEN.get(name, name)), expected)


@pytest.mark.parametrize("name", ALL)
def test_nothing_stays_after_a_sampling(name):
    model = tiny_model()
    assert untouched(model)
    loop = Loop(model)
    cache = OFTEN.get(name, name)
    first = loop.run(cache)
    assert untouched(model)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    other = Loop(model, steps=5, batch=3, seed=1).run(cache)
    assert torch.equal(loop.run(cache), first)
    with pytest.raises(RuntimeError, match="in the middle"):
        loop.run(cache, stop=7)
    assert untouched(model)
    assert torch.equal(Loop(model, steps=5, batch=3, seed=1).run(cache), other)
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert torch.equal(loop.run(None), Loop(tiny_model()).run(None))


@pytest.mark.parametrize("name", APART)
@pytest.mark.parametrize("how", ["both", "swapped"])
@torch.no_grad()
def test_halves_in_two_contexts_are_two_samplings(name, how):
    """Both halves along one path; each half sees what it would see alone along this path."""
    loop = Loop(tiny_model())
    cache = OFTEN.get(name, name)
    path = [loop.noise + 0.1 * step * loop.noise.flip(0) for step in range(loop.steps)]

    def along(names: list[str]) -> dict[str, list[torch.Tensor]]:
        out: dict[str, list[torch.Tensor]] = {context: [] for context in names}
        with feature_cache(loop.model, cache, loop.steps, lambda: loop.now):
            for step, x in enumerate(path):
                loop.now = 999 - 80 * step
                for context in names:
                    out[context].append(loop.call(context, x, loop.labels if context == "cond" else loop.null()))
        return out

    together = along(["uncond", "cond"] if how == "both" else ["cond", "uncond"])
    for context in ("uncond", "cond"):
        for alone, beside in zip(along([context])[context], together[context], strict=True):
            assert torch.equal(alone, beside)
    assert not torch.equal(torch.stack(together["cond"]), torch.stack(together["uncond"]))


@pytest.mark.parametrize("name", ALL)
def test_after_a_reset_the_next_step_is_computed_in_full(name):
    loop = Loop(tiny_model())
    middle: Any = loop.model.blocks[3]
    with rows_computed(middle.attn) as rows:
        before: list[int] = []

        def at(step: int) -> None:
            before.append(sum(rows))
            reset(loop.model)

        cached = loop.run(OFTEN.get(name, name), at=at)
    full = 2 * len(loop.noise)
    assert before == [step * full for step in range(loop.steps)]
    if name not in {"mag"}:  # its states leave out the first steps only
        assert torch.equal(cached, loop.run(None))


@pytest.mark.parametrize("name", ALL)
def test_guidance_that_ends_within_a_sampling(name):
    """Two halves in one batch, then one half with another batch size, as in guidance over an interval."""
    loop = Loop(tiny_model())

    @torch.no_grad()
    def run(cache: str | None) -> torch.Tensor:
        x = loop.noise
        with feature_cache(loop.model, cache, loop.steps, lambda: loop.now, guided=True):
            for step in range(loop.steps):
                loop.now = 900 - 70 * step
                if step == 6:
                    reset(loop.model)
                x = x - 0.3 * loop.predict("cond_uncond" if step < 6 else "cond", x)
        return x

    assert run(OFTEN.get(name, name)).isfinite().all()
    torch.testing.assert_close(run(f"{name}:{NEVER[name]}"), run(None), atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name, choice in CACHES.items() if not choice.batch_decides])
def test_a_picture_does_not_depend_on_the_others(name):
    """Up to the rounding of a matrix product of another size."""
    loop = Loop(tiny_model(), batch=4)
    whole = loop.run(name)
    loop.noise, loop.labels = loop.noise[2:3], loop.labels[2:3]  # pyright: ignore[reportOptionalSubscript]
    torch.testing.assert_close(loop.run(name), whole[:, 2:3], atol=2e-3, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_bfloat16(name):
    loop = Loop(tiny_model().to(torch.bfloat16))
    loop.noise = loop.noise.to(torch.bfloat16)
    out = loop.run(OFTEN.get(name, name))
    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


def test_faster_needs_both_halves_in_one_batch():
    with pytest.raises(UserError) as told:
        Loop(tiny_model()).run("faster", "both")
    assert str(told.value) == (
        "cache 'faster' needs guidance with both halves in one batch in every step: set a guidance scale other than 1, "
        "one batch for both, and the guidance schedule 'constant', or choose another cache"
    )


def test_no_cache_leaves_alone_what_the_user_turned_on():
    loop = Loop(tiny_model())
    expected = loop.run("first-block:threshold=100")
    loop.model.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    middle: Any = loop.model.blocks[3]
    with rows_computed(middle.attn) as rows:
        assert torch.equal(loop.run(None), expected)
    assert len(rows) == 1
    assert loop.model.is_cache_enabled
    with pytest.raises(UserError, match=r"'fora'.*disable_cache"):
        loop.run("fora")
    assert loop.model.is_cache_enabled  # the refusal changed nothing
    loop.model._reset_stateful_cache()
    assert torch.equal(loop.run(None), expected)
    loop.model.disable_cache()
    assert torch.equal(loop.run(None), Loop(tiny_model()).run(None))


def test_reset_reaches_the_users_cache():
    loop = Loop(tiny_model())
    loop.model.enable_cache(FirstBlockCacheConfig(threshold=100.0))
    middle: Any = loop.model.blocks[3]
    with rows_computed(middle.attn) as rows:
        loop.run(None, at=lambda step: reset(loop.model) if step == 6 else None)
    assert len(rows) == 2


def test_a_second_cache_within_the_first_is_refused():
    model = tiny_model()
    with feature_cache(model, "fora", 4, lambda: 0):
        assert model.is_cache_enabled
        with pytest.raises(UserError, match="another cache"), feature_cache(model, "delta", 4, lambda: 0):
            pass
        with pytest.raises(ValueError, match="already been enabled"):
            model.enable_cache(FirstBlockCacheConfig())
        assert model.is_cache_enabled
    assert untouched(model)
