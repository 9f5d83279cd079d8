"""Where time goes: sums and shares by a clock of our own, multiply-adds by the paper's count, skipped work by hand."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from tiny_models import tiny_model
from torch import nn

from edt_diffusion import ClassConditionalPipeline, EDTTransformer2DModel
from edt_diffusion.pipelines import make_scheduler
from edt_diffusion.profiling.clock import Clock, Stopwatch
from edt_diffusion.profiling.counting import counting
from edt_diffusion.profiling.generation import profile_sampling
from edt_diffusion.profiling.job import Profile, ProfileRequest, _block_work, profile_model, write_profile
from edt_diffusion.profiling.measure import count_work, example_inputs, middle_half, profile_forward, spread
from edt_diffusion.profiling.memory import kept_bytes, profile_memory
from edt_diffusion.profiling.parts import COMPILED, OTHER, Part, parts_of, watched
from edt_diffusion.profiling.report import table
from edt_diffusion.util.errors import UserError


class HandClock(Clock):
    """Time that passes only when it is told to."""

    def __init__(self):
        self.time = 0.0
        super().__init__(lambda: self.time)

    def passes(self, seconds):
        self.time += seconds


def test_time_goes_to_the_innermost_piece():
    clock = HandClock()
    watch = Stopwatch(clock)
    clock.passes(100)  # before anything
    for name, seconds in [("whole", 1), ("a", 2), ("b", 4), (None, 8), (None, 16), ("a", 32), (None, 64), (None, 128)]:
        watch.leave() if name is None else watch.enter(name)
        clock.passes(seconds)
    # whole: 1, 16 after the first a, 64 after the second; a: 2, 8, 32; b: 4; the 128 are after the end.
    assert watch.seconds() == {"whole": 81, "a": 42, "b": 4}
    assert watch.seconds() == {}


def test_the_middle_half_and_quartiles():
    assert sorted(middle_half([5.0, 1.0, 9.0, 2.0, 7.0])) == [0, 3, 4]
    assert middle_half([3.0]) == [0]
    assert len(middle_half([1.0, 2.0, 3.0])) == 3
    found = spread([5.0, 1.0, 9.0, 2.0, 7.0], [0, 3, 4])
    assert (found.seconds, found.low, found.high) == (pytest.approx(14 / 3), 2.0, 7.0)
    assert spread([3.0], [0]).low == 3.0


COST = {"attn": 3.0, "ff": 5.0, "adaln": 0.5, "down": 7.0, "up": 11.0, "embed": 13.0, "final": 17.0, "time": 19.0}


def costly(model, clock, scale=None):
    """Let each kind of module take a known time, and each block one second of its own."""

    def slow(module, seconds):
        forward = module.forward

        def costs(*args, **kwargs):
            clock.passes(seconds * (1.0 if scale is None else scale()))
            return forward(*args, **kwargs)

        module.forward = costs

    for block in model.blocks:
        kind = type(block).__name__
        if kind == "EDTBlock":
            for name in ("attn", "ff", "adaln"):
                slow(getattr(block, name), COST[name])
            slow(block, 1.0)
        else:
            slow(block, COST["down" if kind == "DownSample" else "up"])
    slow(model.patch_embed, COST["embed"])
    slow(model.proj_out, COST["final"])
    slow(model.timestep_embedder, COST["time"])
    slow(model, 23.0)


EXPECTED = {
    Part(None, "patch embedding"): 13.0,
    Part(None, "timestep, class"): 19.0,
    Part(0, "norms, gates"): 2.0, Part(0, "attention"): 6.0, Part(0, "MLP"): 10.0, Part(0, "adaLN"): 1.0,
    Part(0, "down-sampling"): 7.0,
    Part(1, "norms, gates"): 1.0, Part(1, "attention"): 3.0, Part(1, "MLP"): 5.0, Part(1, "adaLN"): 0.5,
    Part(2, "up-sampling"): 11.0,
    Part(2, "norms, gates"): 2.0, Part(2, "attention"): 6.0, Part(2, "MLP"): 10.0, Part(2, "adaLN"): 1.0,
    Part(None, "final layer"): 17.0,
    OTHER: 23.0,
}  # fmt: skip


def test_a_forward_pass_by_stage_and_kind():
    model, clock = tiny_model(), HandClock()
    work = count_work(model, 2)
    costly(model, clock)
    found = profile_forward(model, 2, 3, work, clock)
    assert {part: each.seconds for part, each in found.parts.items()} == EXPECTED
    assert found.whole.seconds == sum(EXPECTED.values()) == 137.5
    assert (found.batch, found.repeats) == (2, 3)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_parts_add_up_over_unequal_passes():
    model, clock = tiny_model(), HandClock()
    passes = itertools.chain([1.0, 1.0], [1.0, 8.0, 2.0, 3.0])  # two untimed
    factor = [0.0]
    costly(model, clock, lambda: factor[0])
    model.register_forward_pre_hook(lambda *_: factor.__setitem__(0, next(passes)), prepend=True)
    found = profile_forward(model, 1, 4, {}, clock)
    # The middle half are the passes of 2 and 3.
    assert found.whole.seconds == pytest.approx(2.5 * 137.5)
    for part, seconds in EXPECTED.items():
        assert found.parts[part].seconds == pytest.approx(2.5 * seconds)
        assert (found.parts[part].low, found.parts[part].high) == pytest.approx((1.75 * seconds, 4.25 * seconds))
    assert sum(each.seconds for each in found.parts.values()) == pytest.approx(found.whole.seconds)


def test_multiply_adds_are_those_of_the_paper():
    """EDT-S at 256 px: 2.66 G; the counts of hooks and of formulas are independent of each other."""
    model = EDTTransformer2DModel.from_size("S", sample_size=32).eval()
    work = count_work(model, 1)
    assert sum(work.values()) / 1e9 == pytest.approx(2.66, abs=0.01)
    stages = {part.stage: 0 for part in work}
    for part, done in work.items():
        stages[part.stage] += 0 if part.kind in ("down-sampling", "up-sampling") else done
    known = model.multiply_adds()
    assert [stages[stage] for stage in range(5)] == [known[f"stage {stage}"] for stage in range(5)]
    for stage, name in ((0, "down 0"), (1, "down 1")):
        assert work[Part(stage, "down-sampling")] == known[name]
    for stage, name in ((3, "up 0"), (4, "up 1")):
        assert work[Part(stage, "up-sampling")] == known[name]
    for part, name in (("patch embedding", "patch embedding"), ("timestep, class", "timestep embedding"),
                       ("final layer", "final layer")):  # fmt: skip
        assert work[Part(None, part)] == known[name]
    # Two blocks of stage 0 at 16x16 tokens of 312 channels: 4 N C^2 + 2 N^2 C, 8 N C^2, 6 C^2.
    assert work[Part(0, "attention")] == 2 * (4 * 256 * 312**2 + 2 * 256**2 * 312)
    assert work[Part(0, "MLP")] == 2 * 8 * 256 * 312**2
    assert work[Part(0, "adaLN")] == 2 * 6 * 312**2


@pytest.mark.parametrize("batch", [1, 3])
def test_work_is_that_of_one_image(batch):
    model = tiny_model()
    assert sum(count_work(model, batch).values()) == sum(model.multiply_adds().values())


class Other(nn.Module):
    """A backbone of another paper: one stage, blocks of another class, a mixer without attention."""

    def __init__(self):
        super().__init__()
        self.tokenizer = nn.Conv2d(3, 4, 2, stride=2, groups=1)
        block = nn.Module()
        block.attn, block.mlp, block.gate = nn.Identity(), nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList([block, nn.Linear(4, 4)])


def test_other_backbones_are_grouped_by_what_their_children_are_called():
    assert parts_of(Other()) == {
        "tokenizer": Part(None, "tokenizer"),
        "blocks.0": Part(0, "norms, gates"),
        "blocks.0.attn": Part(0, "attention"),
        "blocks.0.mlp": Part(0, "MLP"),
        "blocks.1": Part(0, "Linear"),
    }


def test_convolutions_are_counted():
    model = nn.Sequential(nn.Conv2d(6, 4, (2, 3), groups=2, bias=False))
    with counting(model) as counter:
        model(torch.zeros(2, 6, 5, 7))
    assert counter.total == 2 * 4 * (4 * 5) * 3 * 6  # outputs times 3 channels of the group times 2x3
    assert (counter.calls, counter.rows) == (1, 2)


def compiled(model):
    """As `compile_repeated_blocks`, without a compiler."""
    for block in model.blocks:
        if type(block).__name__ == "EDTBlock":
            block._compiled_call_impl = block._call_impl
    return model


def test_compiled_blocks_are_timed_from_outside():
    model, clock = tiny_model(), HandClock()
    work = count_work(model, 2)
    costly(model, clock)
    impls = [block._compiled_call_impl for block in compiled(model).blocks]
    found = profile_forward(model, 2, 2, work, clock)
    inside = COST["attn"] + COST["ff"] + COST["adaln"] + 1
    assert [found.parts[Part(stage, COMPILED)].seconds for stage in range(3)] == [2 * inside, inside, 2 * inside]
    assert found.whole.seconds == 137.5
    known = model.multiply_adds()
    assert [found.work[Part(stage, COMPILED)] for stage in range(3)] == [known[f"stage {stage}"] for stage in range(3)]
    assert found.multiply_adds == sum(known.values())
    assert [block._compiled_call_impl for block in model.blocks] == impls


def test_a_call_that_fails_is_left_all_the_same():
    clock = HandClock()
    watch, block = Stopwatch(clock), nn.Linear(2, 2)
    block._compiled_call_impl = lambda x: block.forward(x)
    watch.enter("whole")
    with watched(block, lambda: watch.enter("block"), watch.leave), pytest.raises(RuntimeError):
        block(torch.zeros(3))
    clock.passes(5)
    watch.leave()
    assert watch.seconds()["whole"] == 5


def pipeline(**overrides) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(tiny_model(**overrides), make_scheduler("ddim"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling(clock=None, pipe=None, **settings):
    pipe = pipe or pipeline()
    return profile_sampling(pipe, 3, clock or Clock(), _block_work(pipe.transformer), **settings)


def test_passes_with_and_without_guidance():
    plain = sampling(steps=4)
    assert (plain.calls, plain.passes, plain.pictures, plain.steps) == (4, 4, 3, 4)
    assert plain.scheduler == "RespacedDDIMScheduler"
    assert (plain.blocks_skipped, plain.work_skipped) == (0, 0)
    assert sampling(steps=4, guidance=2.0).passes == 8
    assert sampling(pipe=pipeline(num_classes=None), steps=4, guidance=2.0).passes == 4


def test_a_cached_sampling_computes_less():
    """Every third step is computed; of the others attention and MLP are reused, adaLN and the rest are not."""
    pipe = pipeline()
    found = sampling(pipe=pipe, steps=7, cache="fora:interval=3")
    known = pipe.transformer.multiply_adds()
    total, reused = sum(known.values()), 0
    for part, done in count_work(pipe.transformer, 1).items():
        reused += done if part.kind in ("attention", "MLP") else 0
    assert found.calls == 7
    share = found.work_skipped / (reused / total) * 7
    assert share == pytest.approx(round(share))  # whole steps
    assert 2 <= round(share) <= 4
    assert found.blocks_skipped == pytest.approx(round(share) / 7 * 5 / 7)  # five of the seven blocks are transformers
    assert not any(module._forward_hooks for module in pipe.transformer.modules())


def test_a_sampling_by_piece(monkeypatch):
    clock, pipe = HandClock(), pipeline()
    costly(pipe.transformer, clock)
    kind = type(pipe.scheduler)
    step = kind.step

    def slow_step(self, *args, **kwargs):
        clock.passes(29)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(kind, "step", slow_step)
    decode = pipe.decode
    monkeypatch.setattr(pipe, "decode", lambda *args, **kwargs: (clock.passes(31), decode(*args, **kwargs))[1])
    found = profile_sampling(pipe, 2, clock, None, steps=3, guidance=1.0)
    assert found.seconds == {"network": 3 * 137.5, "scheduler": 3 * 29, "decoding": 0, "other": 31}
    assert found.seconds_per_picture == (3 * 137.5 + 3 * 29 + 31) / 2
    assert (found.blocks_skipped, found.work_skipped) == (None, None)
    assert kind.step is slow_step


@pytest.mark.parametrize("steps", [2, 5])
def test_what_only_a_first_call_takes_is_not_timed(monkeypatch, steps):
    clock, pipe = HandClock(), pipeline()
    forward, rows = pipe.transformer.forward, []

    def compiling(hidden_states, *args, **kwargs):
        clock.passes(1.0 if rows else 1000.0)
        rows.append(len(hidden_states))
        return forward(hidden_states, *args, **kwargs)

    monkeypatch.setattr(pipe.transformer, "forward", compiling)
    found = profile_sampling(pipe, 3, clock, None, steps=steps, guidance=2.0)
    assert found.seconds["network"] == found.calls == steps
    assert rows == [6] * (2 + steps)  # both halves of the guidance, in both samplings
    assert found.passes == 2 * steps


def test_decoding_is_told_apart(monkeypatch):
    from diffusers import AutoencoderTiny

    clock = HandClock()
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    ).eval()  # fmt: skip
    forward = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda *args: (clock.passes(37), forward(*args))[1])
    pipe = ClassConditionalPipeline(tiny_model(in_channels=4), make_scheduler("ddim"), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    assert profile_sampling(pipe, 2, clock, None, steps=2).seconds["decoding"] == 37


def test_memory():
    model = tiny_model()
    inputs = example_inputs(model, 4)
    with torch.no_grad():
        model(**inputs)
    found = profile_memory(model, inputs)
    tensors = [*model.parameters(), *model.buffers()]
    assert found.weights == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    # Gathered biases of five blocks (64 tokens and 2 heads, but 16 and 3 in the middle), and their tables.
    gathered = 4 * (4 * 2 * 64**2 + 3 * 16**2)
    tables = 4 * (4 * 2 * 15**2 + 3 * 7**2)
    assert found.kept == kept_bytes(model) == gathered + tables
    # The MLP's hidden layer of 64 tokens and 64 channels before and after the activation, beside its input.
    hidden = 4 * 64 * 64 * 4
    assert 2 * hidden < found.forward < 8 * hidden
    twice = profile_memory(model, example_inputs(model, 8))
    assert twice.forward == pytest.approx(2 * found.forward, rel=0.05)


class ByItself(nn.Module):
    device = torch.device("cpu")

    def forward(self):
        first = torch.empty(1000, 1000)
        second = torch.empty(500, 1000)
        del first
        return second + torch.empty(300, 1000).sum()


def test_the_peak_is_the_largest_sum_of_living_tensors():
    assert profile_memory(ByItself(), {}).forward == pytest.approx(4 * 1_500_000, rel=0.001)


@pytest.fixture
def folder(tmp_path):
    pipeline().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_whole_profile(folder, tmp_path):
    request = ProfileRequest(
        folder, batch=2, steps=3, repeats=3, scheduler="dpm++", cache="fora:interval=2", threads=1, device="cpu",
        amm="0,3",
    )  # fmt: skip
    before = torch.get_num_threads()
    profile = profile_model(request)
    assert torch.get_num_threads() == before
    facts = profile.facts()
    assert facts["machine"]["threads"] == 1
    assert facts["machine"]["dtype"] == "float32"
    forward = facts["forward"]
    assert sum(part["seconds"] for part in forward["parts"]) == pytest.approx(forward["seconds"])
    assert sum(part["share"] for part in forward["parts"]) == pytest.approx(1)
    known = sum(tiny_model().multiply_adds().values())
    assert sum(part["multiply_adds"] for part in forward["parts"]) == forward["multiply_adds"] == known
    assert forward["per_second"] == pytest.approx(2 * known / forward["seconds"])
    assert forward["share_of_peak"] == pytest.approx(forward["per_second"] / facts["machine"]["peak_per_second"])
    assert facts["settings"]["amm"] == "0,3"
    assert facts["sampling"]["calls"] == 3
    assert facts["sampling"]["passes"] == 6
    assert facts["sampling"]["blocks_skipped"] > 0
    written = write_profile(profile, tmp_path / "out")
    assert [path.name for path in written] == ["profile.json", "profile.png"]
    assert json.loads(written[0].read_text()) == json.loads(json.dumps(facts))
    with Image.open(written[1]) as picture:
        picture.load()
        assert picture.format == "PNG"
        assert min(picture.size) > 400


def test_the_table(folder):
    profile = profile_model(ProfileRequest(folder, batch=2, steps=2, repeats=1, cache="fora"))
    known = Profile(
        profile.request,
        {**profile.machine, "device": "cpu", "name": None, "threads": 1, "cores": 8, "peak_per_second": 4e9},
        replace(
            profile.forward,
            whole=spread([2.0], [0]),
            parts={Part(0, "attention"): spread([0.5], [0]), OTHER: spread([1.5], [0])},
            work={Part(0, "attention"): 250_000_000},
        ),
        replace(profile.memory, weights=157_000_000, kept=8_700_000, forward=2_500_000_000),
        replace(profile.sampling, seconds={"network": 3.0, "scheduler": 1.0, "decoding": 0.0, "other": 0.0}),
    )
    lines = table(known.facts()).splitlines()
    assert max(map(len, lines)) <= 80
    rows = {line.split("  ")[0]: line.split() for line in lines}
    assert ["0", "attention", "500.0", "500.0", "-", "500.0", "25.0%", "0.500", "1"] in [line.split() for line in lines]
    assert ["other", "1500", "1500", "-", "1500", "75.0%"] in [line.split() for line in lines]
    assert ["a", "pass", "2000", "2000", "-", "2000", "100.0%", "0.500", "0.25"] in [line.split() for line in lines]
    assert "0.25 G multiply-adds/s, 6% of what matrix products reach here" in " ".join(rows["speed"])
    assert "weights 157.0 MB, kept position biases 8.7 MB, a pass 2.50 GB more" in " ".join(rows["memory"])
    text = " ".join(" ".join(lines).split())
    assert "2 s a picture: RespacedDDIMScheduler, 2 steps, guidance 2 network 75.0%, scheduler 25.0%" in text
    assert "2 calls of the network, 4 passes for each picture fora:" in text
    assert "decoding" not in text


def test_a_published_size_computes_something(monkeypatch):
    """A new network returns zeros whatever is in it; the profile's does not."""
    from edt_diffusion.profiling import job

    pipe = job.open_model(ProfileRequest("EDT-S/2", image_size="64"))
    assert tuple(pipe.transformer.config.sample_size) == (8, 8)
    with torch.no_grad():
        assert pipe.transformer(**example_inputs(pipe.transformer, 1))[0].std() > 1e-4


@pytest.mark.parametrize(("change", "words"), [
    ({"precision": "bf61"}, "unknown precision 'bf61'.*bf16"),
    ({"precision": "fp16"}, "a CPU computes it a hundred times slower"),
    ({"cache": "taylr"}, "taylor"),
    ({"scheduler": "dpmm"}, r"dpm\+\+"),
    ({"steps": 2000}, "2000: the model's noising process has 1000 steps"),
    ({"amm": "99"}, "--amm 99"),
    ({"image_size": "64"}, "has a size of its own"),
    ({"compiled": True, "cache": "taylor"}, "leave one out"),
    ({"device": "cuda:63"}, "--device cuda:63 cannot be used"),
    ({"model": "EDT-Q/2"}, "unknown EDT size 'Q'"),
    ({"model": "/no/such/run"}, "does not exist"),
])  # fmt: skip
def test_mistakes(folder, change, words):
    with pytest.raises(UserError, match=words):
        profile_model(replace(ProfileRequest(folder, device="cpu"), **change))
