"""Processes of a job that do not see the same run folder, or have other settings, are refused before the first step."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_trainer import trainer_in

WORKER = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from edt_diffusion.util.errors import UserError
from test_trainer import trainer_in
rank = int(os.environ["RANK"])
here = Path(sys.argv[2])
told = []
for case in (
    {"folder": here / ("seen" if rank == 0 else "elsewhere")},
    {"folder": here / ("elsewhere2" if rank == 0 else "seen2")},
    {"folder": here / "fresh", "optimizer": {"lr": 0.001 * (1 + rank)}},
    {"folder": here / "damaged"},
):
    try:
        trainer_in(**case)
        told.append("trained")
    except UserError as error:
        told.append(str(error))
(here / f"rank{rank}.txt").write_text("\\n".join(told))
os._exit(0)  # gloo may abort at interpreter exit
"""


@pytest.mark.slow
def test_processes_that_do_not_see_the_same_are_refused(tmp_path):
    for name in ("seen", "seen2", "damaged"):
        assert trainer_in(tmp_path / name, train={"steps": 2}).fit()
    weights = tmp_path / "damaged" / "checkpoints" / "step-00000002" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*launcher, str(Path(__file__).parent), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [(tmp_path / f"rank{rank}.txt").read_text().splitlines() for rank in (0, 1)]
    assert all(told[0].startswith("not every process sees the checkpoints of") for told in ranks)
    assert ranks[0][1:] == ranks[1][1:]
    _, _, differing, damaged = ranks[0]
    assert differing.startswith("the processes of this job have different settings or pictures: give all the same")
    assert damaged.startswith(f"no usable checkpoint in {tmp_path / 'damaged' / 'checkpoints'}: ")
