"""Official Adan (sail-sg), six steps on one tensor.

The golden data names no tolerance for this trace; the strictest it names for float32 arrays is used: atol 5e-6.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from edt_diffusion.training.optim import Adan

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 5e-6


@pytest.mark.parametrize("foreach", [True, False])
def test_trajectory_and_state(foreach, record_property):
    with np.load(GOLDEN / "adan_trace_1.npz", allow_pickle=False) as arrays:
        golden = dict(arrays)
    p = torch.nn.Parameter(torch.from_numpy(golden["p0"]).clone())
    settings = {name: float(golden[name]) for name in ("lr", "weight_decay", "max_grad_norm")}
    optimizer = Adan([p], **settings, foreach=foreach)
    errors = []
    for grad, expected in zip(golden["grads"], golden["traj"], strict=True):
        p.grad = torch.from_numpy(grad).clone()
        optimizer.step()
        errors.append(np.abs(p.detach().numpy() - expected).max())
    assert optimizer.param_groups[0]["step"] == len(golden["grads"]) == 6
    for name in ("exp_avg", "exp_avg_sq", "exp_avg_diff", "neg_pre_grad"):
        errors.append(np.abs(optimizer.state[p][name].numpy() - golden[name]).max())
    error = float(max(errors))
    record_property("largest_error", error)
    assert error <= TOLERANCE
