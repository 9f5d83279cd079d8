import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from edt_diffusion.training.ema import EMA, EMAConfig, EMASet, PowerEMA
from edt_diffusion.training.power import power_exponent


class Net(nn.Module):
    def __init__(self, value: float = 0.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value, dtype=dtype))
        self.bias = nn.Parameter(torch.full((2,), 2 * value, dtype=dtype))
        self.frozen = nn.Parameter(torch.full((2,), value), requires_grad=False)
        self.register_buffer("table", torch.full((2,), value))

    def fill(self, value: float) -> None:
        with torch.no_grad():
            for tensor in (self.weight, self.bias, self.frozen, self.table):
                tensor.fill_(value)


def average(ema: EMA, name: str = "weight") -> torch.Tensor:
    return ema.state_dict()["parameters"][name]


def test_constant_decay_closed_form():
    net = Net(0.0)
    ema = EMA(net, decay=0.9, warmup=False)
    net.fill(1.0)
    for _ in range(5):
        ema.update(net)
    torch.testing.assert_close(average(ema), torch.full((3,), 1 - 0.9**5), rtol=1e-6, atol=0)
    assert ema.num_updates == 5


def test_warm_up_closed_form():
    """Toward a constant, what is left of the start after n updates is the product of the decays."""
    net = Net(0.0)
    ema = EMA(net, decay=0.5)
    net.fill(1.0)
    left = 1.0
    for k in range(20):
        ema.update(net)
        left *= min(0.5, (1 + k) / (10 + k))  # 1/10, 2/11, ..., and 1/2 from k = 8 on
        np.testing.assert_allclose(average(ema).numpy(), 1 - left, rtol=1e-6)
    net = Net(0.0)
    ema = EMA(net)
    net.fill(1.0)
    ema.update(net)
    torch.testing.assert_close(average(ema), torch.full((3,), 0.9))


def test_only_trainable_parameters_are_averaged():
    net = Net(1.0)
    ema = EMA(net, decay=0.5, warmup=False)
    assert set(ema.state_dict()["parameters"]) == {"weight", "bias"}
    net.fill(3.0)
    ema.update(net)
    ema.copy_to(net)
    assert net.weight.tolist() == [2.0] * 3
    assert net.bias.tolist() == [2.5] * 2
    assert net.frozen.tolist() == net.table.tolist() == [3.0, 3.0]


def test_swap_restores_bits_even_after_an_error():
    net = Net(1.0)
    ema = EMA(net)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([0.1, -0.0, float("nan")]))
    before = net.weight.detach().clone().view(torch.int32)
    with ema.swap(net):
        assert net.weight.tolist() == [1.0] * 3
        assert net.weight.requires_grad
    assert torch.equal(net.weight.detach().view(torch.int32), before)
    with pytest.raises(KeyError), ema.swap(net):
        raise KeyError
    assert torch.equal(net.weight.detach().view(torch.int32), before)
    with ema.swap(net):
        assert net.weight.tolist() == [1.0] * 3


def test_swap_is_visible_to_caches_keyed_by_the_version_counter():
    net = Net(1.0)
    ema = EMA(net)
    versions = [net.weight._version]
    with ema.swap(net):
        versions.append(net.weight._version)
    versions.append(net.weight._version)
    assert versions == sorted(set(versions))


def test_misuse_inside_swap():
    net = Net(1.0)
    ema = EMA(net)
    with ema.swap(net):
        with pytest.raises(RuntimeError, match=r"inside EMA\.swap"):
            ema.update(net)
        with pytest.raises(RuntimeError, match=r"inside EMA\.swap"), ema.swap(net):
            pass
        assert net.weight.tolist() == [1.0] * 3
    ema.update(net)
    assert ema.num_updates == 1


def test_bfloat16_parameters_keep_a_float32_average():
    net = Net(1.0, torch.bfloat16)
    ema = EMA(net, decay=0.9999, warmup=False)
    net.fill(2.0)
    for _ in range(10):
        ema.update(net)
    assert average(ema).dtype == torch.float32
    torch.testing.assert_close(average(ema), torch.full((3,), 2 - 0.9999**10), rtol=1e-6, atol=0)
    with ema.swap(net):
        assert net.weight.dtype == torch.bfloat16
        assert net.weight.tolist() == [1.0] * 3
    assert net.weight.tolist() == [2.0] * 3


def test_resume_is_exact():
    def walk(ema, net, steps):
        for step in steps:
            net.fill(float(np.sin(step)))
            ema.update(net)

    straight_net, net = Net(), Net()
    straight, first = EMA(straight_net), EMA(net)
    walk(straight, straight_net, range(20))
    walk(first, net, range(11))
    state = copy.deepcopy(first.state_dict())
    second = EMA(net)
    second.load_state_dict(state)
    walk(second, net, range(11, 20))
    assert torch.equal(average(second), average(straight))
    assert second.num_updates == 20
    state["parameters"]["weight"].fill_(1e9)
    assert torch.equal(average(second), average(straight))


def test_errors():
    net = Net()
    with pytest.raises(ValueError, match=r"decay = 1\.0"):
        EMA(net, decay=1.0)
    ema = EMA(net)
    with pytest.raises(ValueError, match=r"no parameter 'weight'.*wrapper"):
        ema.update(nn.Sequential(net))
    state = ema.state_dict()
    with pytest.raises(ValueError, match="differ in 1"):
        ema.load_state_dict({**state, "parameters": {"weight": average(ema)}})
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(3,\)"):
        ema.load_state_dict({**state, "parameters": {**state["parameters"], "weight": torch.zeros(4)}})


def test_power_average_closed_form():
    """The average of 1, 2, ..., T under the weights (t^(g + 1) - (t - 1)^(g + 1)) / T^(g + 1)."""
    net = Net(1e6)  # the random start, which the first update replaces
    ema = PowerEMA(net, 0.15)
    steps = 40
    for t in range(1, steps + 1):
        net.fill(float(t))
        ema.update(net)
        if t == 1:
            assert average(ema).tolist() == [1.0] * 3
    times = np.arange(steps + 1) / steps
    weights = np.diff(times ** (power_exponent(0.15) + 1))
    np.testing.assert_allclose(average(ema).numpy(), (weights * np.arange(1, steps + 1)).sum(), rtol=1e-5)


def test_a_set_is_its_averages():
    config = EMAConfig(decay=0.9, warmup=False, power=(0.05, 0.1))
    net = Net()
    averages = EMASet(net, config)
    alone = {"ema": EMA(net, 0.9, False), "ema-0.050": PowerEMA(net, 0.05), "ema-0.100": PowerEMA(net, 0.1)}
    for step in range(7):
        net.fill(float(np.sin(step)))
        averages.update(net)
        for ema in alone.values():
            ema.update(net)
    state = averages.state_dict()
    assert state["num_updates"] == averages.num_updates == 7
    assert list(state["groups"]) == list(alone)
    for name, ema in alone.items():
        assert torch.equal(state["groups"][name]["weight"], average(ema))
        assert torch.equal(state["groups"][name]["bias"], average(ema, "bias"))
    assert len({float(group["weight"][0]) for group in state["groups"].values()}) == 3
    with averages.swap(net):
        assert torch.equal(net.weight, average(averages.main))
        with pytest.raises(RuntimeError, match=r"inside EMA\.swap"):
            averages.update(net)
    assert averages.state_dict()["num_updates"] == 7
    updates, widths = averages.snapshot()
    assert updates == 7
    assert torch.equal(widths[0.05]["weight"], average(alone["ema-0.050"]))
    assert list(widths) == [0.05, 0.1]


class Counted(TorchDispatchMode):
    """Counts the operations that reach a device."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_an_update_is_one_operation_per_average():
    net = nn.Sequential(*[nn.Linear(4, 4) for _ in range(10)])
    averages = EMASet(net, EMAConfig(power=(0.05, 0.1)))
    with Counted() as counted:
        averages.update(net)
    assert counted.names == ["aten::_foreach_lerp_.Scalar"] * 3
    half = nn.Sequential(*[nn.Linear(4, 4, dtype=torch.bfloat16) for _ in range(10)])
    averages = EMASet(half, EMAConfig(power=(0.05, 0.1)))
    with Counted() as counted:
        averages.update(half)
    assert counted.names.count("aten::_to_copy") == 20  # one cast per tensor, whatever the number of averages
    assert len(counted.names) == 23


def test_a_replaced_parameter_is_followed():
    net = Net(0.0)
    averages = EMASet(net, EMAConfig(decay=0.5, warmup=False, power=(0.1,)))
    averages.update(net)
    net.weight = nn.Parameter(torch.full((3,), 4.0))
    averages.update(net)
    assert average(averages.main).tolist() == [2.0] * 3
    with averages.swap(net):
        assert net.weight.tolist() == [2.0] * 3
    assert net.weight.tolist() == [4.0] * 3


def test_resuming_a_set_is_exact():
    config = EMAConfig(power=(0.05, 0.1))
    straight_net, net = Net(), Net()
    straight, first = EMASet(straight_net, config), EMASet(net, config)
    for step in range(20):
        straight_net.fill(float(np.sin(step)))
        straight.update(straight_net)
        if step < 11:
            net.fill(float(np.sin(step)))
            first.update(net)
    second = EMASet(net, config)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for step in range(11, 20):
        net.fill(float(np.sin(step)))
        second.update(net)
    wanted, found = straight.state_dict(), second.state_dict()
    assert found["num_updates"] == 20
    for name, group in wanted["groups"].items():
        for key, tensor in group.items():
            assert torch.equal(found["groups"][name][key], tensor)


def test_a_set_takes_over_all_or_nothing():
    net = Net(1.0)
    two = EMASet(net, EMAConfig(power=(0.05, 0.1)))
    net.fill(2.0)
    two.update(net)
    one = EMASet(net, EMAConfig(power=(0.05,)))
    with pytest.raises(
        ValueError, match=r"are ema, ema-0\.050, ema-0\.100, this run's ema, ema-0\.050: keep ema\.power"
    ):
        one.load_state_dict(two.state_dict())
    fresh = EMASet(Net(7.0), EMAConfig(power=(0.05, 0.1)))
    state = two.state_dict()
    state["groups"]["ema-0.100"] = {**state["groups"]["ema-0.100"], "weight": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"shape \(4,\), expected \(3,\)"):
        fresh.load_state_dict(state)
    assert average(fresh.main).tolist() == [7.0] * 3
    assert fresh.num_updates == 0


def test_config():
    assert EMAConfig().power == ()
    assert EMAConfig().interval(320) == 10
    assert EMAConfig().interval(321) == 11  # at most 32 snapshots
    assert EMAConfig().interval(5) == 1
    assert EMAConfig(snapshot_every=7).interval(320) == 7
    for power, said in [((0.0,), "between 0 and"), ((0.28,), "between 0 and"), ((0.1, 0.1001), "three decimals")]:
        with pytest.raises(ValidationError, match=said):
            EMAConfig(power=power)
    with pytest.raises(ValidationError):
        EMAConfig(powers=(0.1,))  # pyright: ignore[reportCallIssue]


SHARDED = """
import os
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from edt_diffusion.training.ema import EMAConfig, EMASet
dist.init_process_group("gloo", init_method="file://FILE", rank=RANK, world_size=2)
torch.manual_seed(0)
plain = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
shard = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
shard.load_state_dict(plain.state_dict())
fully_shard(shard, mesh=init_device_mesh("cpu", (2,)))
config = EMAConfig(power=(0.05, 0.1))
wanted, found = EMASet(plain, config), EMASet(shard, config)
for step in range(5):
    for net, averages in ((plain, wanted), (shard, found)):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        net(torch.ones(3, 4) * step).square().mean().backward()
        optimizer.step()
        averages.update(net)
state = found.state_dict()
for name, group in wanted.state_dict()["groups"].items():
    for key, tensor in group.items():
        own = state["groups"][name][key]
        assert isinstance(own, DTensor) and own.dtype == torch.float32 and own.to_local().numel() * 2 == tensor.numel()
        torch.testing.assert_close(own.full_tensor(), tensor)
with found.swap(shard):
    torch.testing.assert_close(shard[0].weight.full_tensor(), wanted.main.state_dict()["parameters"]["0.weight"])
torch.testing.assert_close(shard[0].weight.full_tensor(), plain[0].weight)
updates, widths = found.snapshot()
assert type(widths[0.1]["0.weight"]) is torch.Tensor
for saved in (state, wanted.state_dict()):  # sharded, and whole
    again = EMASet(shard, config)
    again.load_state_dict(saved)
    for name, group in wanted.state_dict()["groups"].items():
        for key, tensor in group.items():
            torch.testing.assert_close(again.state_dict()["groups"][name][key].full_tensor(), tensor)
dist.barrier()
print("done", flush=True)
os._exit(0)  # gloo may abort at interpreter exit
"""


@pytest.mark.slow
def test_sharded_parameters(tmp_path):
    """The averages of parameters under `fully_shard` are sharded like them, and equal those of whole parameters."""
    code = SHARDED.replace("FILE", str(tmp_path / "rendezvous"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code.replace("RANK", str(rank))],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outcomes = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0, 0], outcomes
        assert [out.split() for out, _ in outcomes] == [["done"], ["done"]]
    finally:
        for process in processes:
            process.kill()
