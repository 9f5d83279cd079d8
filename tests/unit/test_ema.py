import copy

import numpy as np
import pytest
import torch
from torch import nn

from edt_diffusion.training.ema import EMA


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
