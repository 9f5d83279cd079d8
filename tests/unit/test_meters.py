"""Means, losses by timestep, and throughput, against values worked out by hand."""

import math
import os
import subprocess
import sys

import pytest
import torch
from accelerate import Accelerator

from edt_diffusion import EDTTransformer2DModel
from edt_diffusion.training.meters import MeanMetrics, Throughput, TimestepBins, training_flops
from edt_diffusion.util import hardware
from edt_diffusion.util.hardware import measured_matmul_peak, memory_name, peak_memory


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_means_over_micro_batches_then_over_steps_by_weight(accelerator):
    means = MeanMetrics()
    assert means.read(accelerator) == {}
    means.add(
        [{"loss": torch.tensor(1.0), "mse": torch.tensor(8.0)}, {"loss": torch.tensor(3.0), "mse": torch.tensor(0)}]
    )
    means.add([{"loss": torch.tensor(5.0), "mse": torch.tensor(1.0)}], weight=3)
    assert means.read(accelerator) == {"loss": (2 + 15) / 4, "mse": (4 + 3) / 4}
    assert means.read(accelerator) == {}


def test_timestep_bins_hold_the_mean_of_each_tenth(accelerator):
    bins = TimestepBins()
    assert bins.read(accelerator) == {}
    share = torch.tensor([0.0, 0.099, 0.1, 0.999, 0.95])
    bins.add(share, {"full": torch.tensor([1.0, 3.0, 7.0, 2.0, 4.0]), "masked": torch.full((5,), 9.0)})
    bins.add(torch.tensor([0.05]), {"full": torch.tensor([8.0])})
    values = bins.read(accelerator)
    assert {name: value for name, value in values.items() if "full" in name} == {
        "loss_full_t0": 4.0, "loss_full_t1": 7.0, "loss_full_t9": 3.0,
    }  # fmt: skip
    assert {name: value for name, value in values.items() if "masked" in name} == {
        "loss_masked_t0": 9.0, "loss_masked_t1": 9.0, "loss_masked_t9": 9.0,
    }  # fmt: skip
    bins.add(torch.tensor([0.5]), {"full": torch.tensor([1.0])})
    assert bins.read(accelerator) == {"loss_full_t5": 1.0}  # nothing of before


def test_timestep_bins_pass_over_what_is_not_finite_and_bound_the_share(accelerator):
    bins = TimestepBins(4)
    share = torch.tensor([0.1, 0.1, 0.1, 1.0, -0.1])
    bins.add(share, {"full": torch.tensor([2.0, math.nan, math.inf, 6.0, 4.0])})
    assert bins.read(accelerator) == {"loss_full_t0": 3.0, "loss_full_t3": 6.0}


def test_timestep_bins_never_ask_the_device():
    """On the meta device a wait is an error."""
    bins = TimestepBins()
    for _ in range(2):
        bins.add(torch.empty(4, device="meta"), {"full": torch.empty(4, device="meta")})


BINS_OF_TWO = """
import os, sys
import torch, torch.distributed as dist
from accelerate import Accelerator
from edt_diffusion.training.meters import MeanMetrics, TimestepBins
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
bins, means = TimestepBins(2), MeanMetrics()
bins.add(torch.tensor([0.1, 0.1 if rank else 0.9]), {"full": torch.tensor([1.0, 4.0]) + rank})
means.add([{"loss": torch.tensor(1.0 + rank)}])
values = bins.read(accelerator) | means.read(accelerator)
# process 0: 1 in the first half, 4 in the second; process 1: 2 and 5, both in the first
assert values == {"loss_full_t0": (1 + 2 + 5) / 3, "loss_full_t1": 4.0, "loss": 1.5}, values
print("good", flush=True)
dist.barrier()
os._exit(0)
"""


@pytest.mark.slow
def test_two_processes_share_their_bins(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(BINS_OF_TWO)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("good") == 2  # their lines may come together


def test_throughput_is_the_time_from_reading_to_reading_without_pauses():
    clock = Clock()
    meter = Throughput(64, flops_per_step=3e12, peak_flops=4e12, seconds=100.0, clock=clock)
    assert meter.read() == {}
    for _ in range(4):  # 2 s each, of which 0.5 s wait for data
        meter.start_step()
        with meter.data_wait():
            clock.now += 0.5
        clock.now += 1.5
        meter.end_step()
    values = meter.read()
    assert 0.05 < values.pop("memory_gib") < 100
    assert values == {
        "images_per_second": 4 * 64 / 8,
        "step_seconds": 2.0,
        "data_wait_share": 0.25,
        "mfu": 4 * 3e12 / 8 / 4e12,
        "seconds": 108.0,
    }
    with meter.pause():  # a sampling, between two steps
        clock.now += 20
        with meter.pause():  # with a save in it
            clock.now += 30
    clock.now += 1  # logging counts
    meter.start_step()
    clock.now += 2
    with meter.pause():  # and within one
        clock.now += 30
    clock.now += 2
    meter.end_step()
    with meter.pause():  # a save after the last step
        clock.now += 7
    assert meter.seconds == 113.0
    values = meter.read()
    assert (values["step_seconds"], values["seconds"], values["data_wait_share"]) == (5.0, 113.0, 0.0)
    meter.start_step()
    clock.now += 3
    meter.end_step()
    assert meter.read()["step_seconds"] == 3.0  # the save is not in this window either
    assert meter.seconds == 116.0


def test_throughput_without_a_peak_names_no_utilisation():
    clock = Clock()
    meter = Throughput(1, 1e9, None, clock=clock)
    meter.start_step()
    clock.now += 1
    meter.end_step()
    assert "mfu" not in meter.read()
    assert meter.read() == {}


def test_training_flops_are_those_that_torch_counts():
    """FlopCounterMode counts the products of a real forward and backward pass; ours come from the shapes."""
    from torch.utils.flop_counter import FlopCounterMode

    layers = torch.nn.Sequential(torch.nn.Linear(32, 64, bias=False), torch.nn.Linear(64, 16, bias=False))
    inputs = torch.randn(8, 32, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        layers(inputs).sum().backward()
    multiply_adds = 32 * 64 + 64 * 16
    assert training_flops(multiply_adds, batch=8, passes=1) == counter.get_total_flops()
    assert training_flops(multiply_adds, 8, 2) == 2 * counter.get_total_flops()
    assert training_flops(multiply_adds, 8, 1, checkpointed=True) == counter.get_total_flops() * 4 / 3


def test_training_flops_of_the_papers_model():
    with torch.device("meta"):
        model = EDTTransformer2DModel.from_size("EDT-S/2")
    flops = training_flops(sum(model.multiply_adds().values()), batch=256, passes=2)
    assert flops == pytest.approx(6 * 2.667e9 * 512, rel=1e-3)


def test_the_measured_peak_bounds_a_product_timed_alone(monkeypatch):
    """The clock is made to say that a product of size n takes n**2 units: the largest size is the fastest."""
    sizes = []

    def timed(left, right, out, device):
        sizes.append(left.shape[0])
        return left.shape[0] ** 2 * 1e-9

    monkeypatch.setattr(hardware, "_timed", timed)
    monkeypatch.setattr(hardware, "_SIZES", (8, 16, 32))
    assert measured_matmul_peak("cpu", torch.float32) == pytest.approx(2 * 32 * 1e9)
    assert set(sizes) == {8, 16, 32}


def test_the_measured_peak_leaves_the_random_state_alone(monkeypatch):
    monkeypatch.setattr(hardware, "_BUDGET", 0.01)
    before = torch.random.get_rng_state()
    assert measured_matmul_peak("cpu", torch.bfloat16) > 1e6
    assert torch.equal(torch.random.get_rng_state(), before)


def test_peak_memory_sees_a_large_tensor():
    code = (
        "import torch; from edt_diffusion.util.hardware import peak_memory; before = peak_memory('cpu');"
        "block = torch.ones(80 * 2**20); print(peak_memory('cpu') - before); del block; "
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 310 * 2**20 < float(done.stdout) < 400 * 2**20
    assert (memory_name("cpu"), memory_name("cuda:1")) == ("process memory", "GPU memory")
    assert isinstance(peak_memory("cpu"), float)
