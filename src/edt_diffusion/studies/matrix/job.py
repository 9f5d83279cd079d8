"""One piece of work of a matrix in a process of its own.

`python -m edt_diffusion.studies.matrix.job FOLDER WORK [RUN]`, where WORK is "prepare", "train" or "score". A process
of its own has a clean clock of CPU time, and a crash ends one run only. It ends with 0 when the work is done, `STOPPED`
when it was asked to stop, 2 on a user's mistake. Its standard input is a pipe from its parent: when that closes, the
parent is gone, and it stops as on a signal.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from ...assemble import build_trainer
from ...util.errors import UserError
from ...util.files import atomic_write_json
from .folder import STOPPED, MatrixFolder, Run
from .plan import Matrix
from .scoring import prepare, score


def train(matrix: Matrix, folder: MatrixFolder, run: Run) -> bool:
    """Train a run to the end of its budget, from where it was; False if it was asked to stop."""
    import torch

    config = matrix.config(matrix.arm(run.arm), run.seed, folder.base)
    pace = matrix.pace(config, {point: folder.point(run, point) for point in matrix.points})
    trainer = build_trainer(config, folder.run(run), quiet=True, pace=pace)
    if not trainer.fit():
        return False
    parameters = sum(p.numel() for p in trainer.network.parameters() if p.requires_grad)
    facts = {
        **pace.told(), "budget": str(matrix.budget), "steps": trainer.step,
        "images": trainer.step * config.train.batch_size, "run_seconds": trainer.seconds, "parameters": parameters,
        "threads": torch.get_num_threads(), "device": str(trainer.accelerator.device),
        "mixed_precision": config.train.mixed_precision,
    }  # fmt: skip
    atomic_write_json(folder.spent(run), facts)
    return True


def _stop_with_parent() -> None:
    def watch() -> None:
        while sys.stdin.buffer.raw.read(1):  # pyright: ignore[reportAttributeAccessIssue]
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def work(words: list[str]) -> int:
    """Do what the words name; the exit code."""
    folder = MatrixFolder(Path(words[0]))
    try:
        matrix = folder.load()
        if words[1] == "prepare":
            prepare(matrix, folder)
        elif words[1] == "train":
            return 0 if train(matrix, folder, Run.parse(words[2])) else STOPPED
        else:
            score(matrix, folder, Run.parse(words[2]))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return STOPPED
    return 0


def main() -> int:
    """Do what the command line names, with the threads that the parent allows."""
    _stop_with_parent()
    import torch

    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "0")) or torch.get_num_threads())
    return work(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
