"""40 steps straight equal 20 steps, SIGKILL, and 20 more, bit for bit: with loader workers, and with two processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_trainer import assert_same_run, trainer_in

PATHS = {
    "masked-adan": {
        "objective": {"name": "learned_variance", "timesteps": "loss_second_moment"},
        "optimizer": {"name": "adan"},
    },
    "flow-adamw": {"objective": {"name": "flow"}, "optimizer": {"name": "adamw"}},
    "mdtv2-adan": {
        "model": {"name": "MDTv2", "patch_size": 1, "depth": 4, "hidden_size": 16, "num_heads": 2, "decode_layers": 2},
        "objective": {"timesteps": "loss_second_moment"},
    },
}
WORKER = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_exact_resume import trainer_of
trainer = trainer_of(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
trainer.fit()
trainer.accelerator.wait_for_everyone()
os._exit(0)  # gloo may abort at interpreter exit
"""


def trainer_of(folder: Path, path: str, kill_at: int = 0):
    """A run of 40 steps that saves at 20, and kills all of its process group at `kill_at`, if that is not 0."""

    def killed(_pipeline):
        return [(kill_at, lambda step: os.killpg(0, signal.SIGKILL) if step == kill_at else None)]

    changes = PATHS[path]
    return trainer_in(
        folder,
        callbacks=killed,
        data={"workers": 2, "flip": True},
        ema={"decay": 0.9, "power": [0.05, 0.10], "snapshot_every": 7},
        validation={"share": 0.2, "every": 8},
        train={"steps": 40, "batch_size": 4, "micro_batches": 2, "save_every": 20, "log_every": 3},
        **changes,
    )


def run(tmp_path: Path, folder: str, path: str, processes: int, kill_at: int = 0) -> int:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), str(Path(__file__).parent)]
    done = subprocess.run(
        [*command, str(tmp_path / folder), path, str(kill_at)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        start_new_session=True,
    )
    assert kill_at or done.returncode == 0, done.stderr[-3000:]
    return done.returncode


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_forty_steps_equal_twenty_a_sigkill_and_twenty(tmp_path, path, processes):
    run(tmp_path, "straight", path, processes)
    assert run(tmp_path, "killed", path, processes, kill_at=25) != 0
    folder = tmp_path / "killed"
    assert [p.name for p in (folder / "checkpoints").iterdir() if p.name.startswith("step-")] == ["step-00000020"]
    run(tmp_path, "killed", path, processes)
    assert_same_run(folder, tmp_path / "straight", 40)
    # The order of a file's metadata is not fixed: the tensors are compared.
    kept, expected = ({p.name: load_file(p) for p in (f / "ema").iterdir()} for f in (folder, tmp_path / "straight"))
    assert len(expected) == 6  # 7, 14, 21, 28, 35 and the last
    assert kept.keys() == expected.keys()
    assert all(torch.equal(kept[file][name], t) for file, named in expected.items() for name, t in named.items())
