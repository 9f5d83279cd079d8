"""`edt profile` from top to bottom."""

import importlib.util
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..caching import parse_cache
from ..models.summary import named_model
from ..pipelines import ClassConditionalPipeline, default_scheduler, make_scheduler
from ..pipelines.loading import load_pipeline
from ..pipelines.modulation import choose_modulation
from ..pipelines.precision import PRECISIONS, compile_network, in_precision
from ..util.errors import UserError
from ..util.files import atomic_write_json, make_folder
from ..util.hardware import measured_matmul_peak
from ..util.rng import Purpose, stream
from .clock import Clock, clock_for
from .counting import counting
from .generation import SamplingProfile, profile_sampling
from .measure import ForwardProfile, count_work, example_inputs, profile_forward
from .memory import MemoryProfile, profile_memory
from .plot import draw


@dataclass(frozen=True)
class ProfileRequest:
    """What to profile.

    Attributes:
        model: run folder, diffusers folder, hub name, or a published size such as "EDT-S/2" (with random weights).
        image_size: pixels, with a published size only.
        batch: images of a forward pass, and pictures of the sampling.
        precision: a name of `pipelines.precision.PRECISIONS`.
        cache, scheduler, steps, guidance, amm: of the sampling, as for `edt sample`.
        compiled: compile the transformer blocks.
        repeats: timed forward passes.
        sampling: whether pictures are made.
        threads: of the CPU; None leaves them.
        device: None is the GPU if there is one.
    """

    model: str
    image_size: str | None = None
    batch: int = 4
    precision: str = "fp32"
    cache: str = "none"
    scheduler: str | None = None
    steps: int | None = None
    guidance: float = 2.0
    amm: str = "saved"
    compiled: bool = False
    repeats: int = 10
    sampling: bool = True
    threads: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Profile:
    """All that was measured.

    Attributes:
        request: what was asked for.
        machine: device, threads, versions, and the measured peak of matrix products in multiply-adds a second.
        forward, memory: of one pass.
        sampling: None where it was left out.
    """

    request: ProfileRequest
    machine: dict[str, Any]
    forward: ForwardProfile
    memory: MemoryProfile
    sampling: SamplingProfile | None

    def facts(self) -> dict[str, Any]:
        """Everything as plain values; times in seconds, sizes in bytes, multiply-adds of one image."""
        forward, sampling = self.forward, self.sampling
        parts = []
        for part, spread in forward.parts.items():
            work = forward.work.get(part, 0)
            rate = work * forward.batch / spread.seconds if spread.seconds > 0 else None
            share = spread.seconds / forward.whole.seconds
            parts.append({**asdict(part), **asdict(spread), "share": share, "multiply_adds": work, "per_second": rate})
        rate = forward.multiply_adds * forward.batch / forward.whole.seconds
        return {
            "settings": asdict(self.request),
            "machine": self.machine,
            "forward": {
                "batch": forward.batch,
                "repeats": forward.repeats,
                **asdict(forward.whole),
                "multiply_adds": forward.multiply_adds,
                "per_second": rate,
                "share_of_peak": rate / self.machine["peak_per_second"],
                "parts": parts,
            },
            "memory": asdict(self.memory),
            "sampling": None
            if sampling is None
            else {**asdict(sampling), "seconds_per_picture": sampling.seconds_per_picture},
        }


def profile_model(request: ProfileRequest, clock: Clock | None = None) -> Profile:
    """Measure a model on this machine.

    Args:
        request: what, and how.
        clock: another than the device's own, for tests.

    Raises:
        UserError: a model that is not there, or settings that do not fit it or this machine.
    """
    if request.compiled and parse_cache(request.cache) is not None:
        raise UserError(f"--compile and --cache {request.cache}: nothing looks into compiled blocks; leave one out")
    device = _device(request.device)
    pipeline = open_model(request).to(device)
    threads = torch.get_num_threads()
    try:
        if request.threads is not None:
            torch.set_num_threads(request.threads)
        return _profile(request, pipeline, clock or clock_for(device))
    finally:
        torch.set_num_threads(threads)


def write_profile(profile: Profile, folder: Path) -> list[Path]:
    """Write `profile.json`, and `profile.png` where matplotlib is installed; returns what was written."""
    make_folder(folder)
    written = [folder / "profile.json"]
    atomic_write_json(written[0], profile.facts())
    if importlib.util.find_spec("matplotlib") is not None:
        written.append(folder / "profile.png")
        draw(profile.facts(), written[-1])
    return written


def _profile(request: ProfileRequest, pipeline: Any, clock: Clock) -> Profile:
    network = in_precision(pipeline.transformer, request.precision)
    pipeline.transformer = network
    guidance = request.guidance if network.config.num_classes is not None else 1.0
    choose_modulation(network, request.amm, guidance_scale=guidance)
    pipeline.sampler(request.scheduler, request.steps)  # what is wrong is told before anything is measured
    work, block_work = count_work(network, request.batch), None if request.compiled else _block_work(network)
    if request.compiled:
        compile_network(network)
    forward = profile_forward(network, request.batch, request.repeats, work, clock)
    memory = profile_memory(network, example_inputs(network, request.batch))
    sampling = None
    if request.sampling:
        sampling = profile_sampling(
            pipeline, request.batch, clock, block_work, request.scheduler, request.steps, guidance, request.cache
        )
    return Profile(request, _machine(network, request), forward, memory, sampling)


@torch.no_grad()
def _block_work(network: Any) -> dict[int, int]:
    """Multiply-adds of one image by block, and of what is in no block under -1."""
    with counting(network) as counter:
        network(**example_inputs(network, 1))
    blocks = dict(counter.by_block[0])
    return {**blocks, -1: counter.total - sum(blocks.values())}


def _machine(network: Any, request: ProfileRequest) -> dict[str, Any]:
    dtype = PRECISIONS[request.precision].compute
    return {
        "device": str(network.device),
        "name": torch.cuda.get_device_name(network.device) if network.device.type == "cuda" else None,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "peak_per_second": measured_matmul_peak(network.device, dtype) / 2,
    }


def open_model(request: ProfileRequest) -> ClassConditionalPipeline:
    """The pipeline of a request in float32; that of a published size has random weights and makes latents."""
    named = named_model(request.model, request.image_size or "256")
    if named is None:
        if request.image_size is not None:
            raise UserError(
                f"--image-size {request.image_size}: {request.model} has a size of its own: give it with names such as "
                "EDT-S/2 only"
            )
        pipeline = load_pipeline(request.model)
        pipeline.transformer.eval()
    else:
        network = type(named).from_config(named.config).eval()  # `named` has no storage
        _fill_zeros(network)
        scheduler = make_scheduler(default_scheduler("epsilon"), learned_variance=network.config.learn_sigma)
        pipeline = ClassConditionalPipeline(network, scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def _fill_zeros(network: nn.Module) -> None:
    """Small random numbers for matrices that begin as zeros: a new network returns zeros, whatever is skipped in it."""
    for position, parameter in enumerate(network.parameters()):
        if parameter.ndim > 1 and not parameter.any():
            draws = stream(0, Purpose.MODULE, position=position).standard_normal(parameter.shape, dtype="float32")
            parameter.copy_(torch.from_numpy(draws) * 0.02)


def _device(name: str | None) -> torch.device:
    wanted = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"--device {name} cannot be used ({reason}): expected such as cpu or cuda:0") from None
    return torch.device(wanted)
