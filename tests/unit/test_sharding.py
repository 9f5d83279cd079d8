"""FSDP2 over two CPU processes: it trains as one process does, and its checkpoints open on one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import Poison, trainer_in

from edt_diffusion.training.guards import all_finite
from edt_diffusion.training.log import read_log
from edt_diffusion.training.sharding import copy_into, is_sharded, like, local, whole, whole_state
from edt_diffusion.training.state import CheckpointStore

WORKER = """
import os, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_sharding import trainer_of
trainer = trainer_of(Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4], "fsdp2")
assert all(isinstance(p, DTensor) for p in trainer.network.parameters())
largest = max(trainer.network.parameters(), key=lambda p: p.numel())
assert largest.to_local().shape[0] * 2 == largest.shape[0]
assert all(isinstance(t, DTensor) for t in trainer.ema.state_dict()["groups"]["ema"].values())
trainer.fit()
assert all(isinstance(p, DTensor) for p in trainer.network.parameters())
entry = trainer.optimizer.state[largest]["exp_avg"]
assert isinstance(entry, DTensor) and entry.to_local().shape == largest.to_local().shape
trainer.accelerator.wait_for_everyone()
os._exit(0)  # gloo may abort at interpreter exit
"""


pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_of(folder: Path, steps: int, optimizer: str, sharding: str = "none"):
    train = {"steps": steps, "batch_size": 4, "sharding": sharding, "sample_every": 2, "max_grad_norm": 0.5}
    return trainer_in(
        folder,
        # A large eps: with the usual one, Adan makes whole steps out of rounding errors where the gradient is zero.
        optimizer={"eps": 1e-2, "name": optimizer},
        ema={"decay": 0.9, "power": [0.05, 0.10], "snapshot_every": 2},
        validation={"share": 0.2, "every": 2},
        train={**train, "save_every": 2},
    )


HURT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_sharding import hurt
trainer = hurt(Path(sys.argv[2]), "fsdp2")
assert trainer.fit()
assert (trainer.guards.skipped, trainer.guards.rollbacks) == (4, 1)
trainer.accelerator.wait_for_everyone()
os._exit(0)
"""


def hurt(folder: Path, sharding: str = "none"):
    """A run with a bad step just before a save, and bad ones in a row that send it back, until it has gone back."""
    trainer = trainer_of(folder, 8, "adamw", sharding)
    trainer.guards.settings = replace(trainer.guards.settings, max_skipped=3)
    bad = {1, 4, 5, 6}
    trainer.update.objective = Poison(
        trainer.objective, lambda step: step in bad and not (trainer.guards.rollbacks and step != 1)
    )
    return trainer


def run_sharded(tmp_path: Path, folder: str, steps: int, optimizer: str, code: str = WORKER) -> None:
    script = tmp_path / "worker.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*launcher, str(Path(__file__).parent), str(tmp_path / folder), str(steps), optimizer],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def assert_close(tmp_path: Path, one: str, other: str, step: int) -> None:
    left = whole_checkpoint(tmp_path / one, step)
    right = whole_checkpoint(tmp_path / other, step)
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-4, atol=1e-5, msg=name)


def whole_checkpoint(folder: Path, step: int) -> dict[str, torch.Tensor]:
    tensors = CheckpointStore(folder / "checkpoints").load(step).tensors
    return {
        f"{group}/{name}": t for group, named in tensors.items() for name, t in named.items() if group != "optimizer"
    }


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adan", "adamw"])
def test_two_sharded_processes_train_as_one_and_their_checkpoint_opens_on_one(tmp_path, optimizer):
    assert trainer_of(tmp_path / "one", 4, optimizer).fit()
    run_sharded(tmp_path, "two", 4, optimizer)
    assert_close(tmp_path, "two", "one", 4)
    files = sorted(p.name for p in (tmp_path / "two" / "checkpoints" / "step-00000004").iterdir())
    assert "model.00000-of-00002.safetensors" in files
    assert "optimizer.00001-of-00002.safetensors" in files
    assert CheckpointStore(tmp_path / "two" / "checkpoints").damage(4) is None
    # What both wrote for people is the same too.
    for name in ("model", "best"):
        exported, expected = (
            load_file(tmp_path / run_ / name / "transformer" / "diffusion_pytorch_model.safetensors")
            for run_ in ("two", "one")
        )
        assert exported.keys() == expected.keys()
        for key in expected:
            torch.testing.assert_close(exported[key], expected[key], rtol=1e-4, atol=1e-5)
    snapshots = [sorted(p.name for p in (tmp_path / run_ / "ema").glob("*")) for run_ in ("one", "two")]
    assert snapshots[0] == snapshots[1] != []
    losses = [[line["val_loss"] for line in read_log(tmp_path / run_) if "val_loss" in line] for run_ in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # One goes on from what two have saved, and two sharded ones from what one has.
    assert trainer_of(tmp_path / "two", 6, optimizer).fit()
    run_sharded(tmp_path, "one", 6, optimizer)
    assert_close(tmp_path, "two", "one", 6)


@pytest.mark.slow
def test_bad_steps_of_a_sharded_run_are_left_out_and_sent_back_as_those_of_one_process(tmp_path):
    one = hurt(tmp_path / "one")
    assert one.fit()
    assert (one.guards.skipped, one.guards.rollbacks) == (4, 1)
    run_sharded(tmp_path, "two", 8, "adamw", HURT)
    assert_close(tmp_path, "two", "one", 8)


def test_ordinary_tensors_pass_through():
    tensor = torch.arange(6.0).view(3, 2)
    assert not is_sharded(tensor)
    assert local(tensor) is tensor
    assert whole(tensor) is tensor
    assert like(tensor, torch.zeros(3, 2)) is tensor
    target = torch.zeros(3, 2)
    copy_into(target, tensor)
    assert torch.equal(target, tensor)
    assert torch.equal(whole_state({"a": tensor})["a"], tensor)
    assert all_finite([tensor])
