"""Kill a training at random moments, restart it each time, and compare what comes out with an undisturbed run.

    python benchmarks/fault_harness.py --kills 50 --objective masked --json

Both runs are `edt train` with loader processes. Half of the kills (SIGKILL) come a random number of steps after the
restart, half as soon as a save is seen to be under way. At the end every tensor and number of the last checkpoint, the
exported model and the metric lines must be equal bit for bit. Exit code 1 if they are not.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

OBJECTIVES = {
    "masked": ["objective.name=learned_variance", "optimizer.name=adan", "objective.timesteps=loss_second_moment"],
    "flow": ["objective.name=flow", "optimizer.name=adamw"],
}
# What tells of the clock and the machine, not of the training.
_CLOCKS = ("seconds", "images_per_second", "step_seconds", "data_wait_share", "mfu", "memory_gib")


def start(folder: Path, arguments: argparse.Namespace) -> int:
    """Begin or continue the run in a forked process of its own, which spares the imports; return its number."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 1
    try:
        from edt_diffusion.cli import main

        main([
            "train", "digits", "--quiet", "--out", str(folder), *OBJECTIVES[arguments.objective],
            "model.dims=[32,48,64,48,32]", "model.num_heads=[2,2,2,2,2]", f"train.steps={arguments.steps}",
            "train.batch_size=16", "train.log_every=1", "train.sample_every=0",
            f"train.save_every={arguments.save_every}",
            f"data.workers={arguments.workers}", "ema.power=[0.05,0.10]", "optimizer.decay_steps=1000",
            "train.keep_checkpoints=2", "validation.share=0.05", "validation.every=20", "validation.pictures=32",
        ])  # fmt: skip
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    finally:
        os._exit(code)


def last_step(folder: Path) -> int:
    """Steps told in the run's log."""
    try:
        lines = (folder / "log.jsonl").read_text().splitlines()
        return int(json.loads(lines[-1])["step"]) if lines else 0
    except (OSError, ValueError, KeyError):
        return 0


def saving(folder: Path) -> bool:
    """Whether a save is under way: a temporary file or folder is there."""
    return any(
        any(place.glob(".*.tmp")) for place in (folder, folder / "checkpoints", folder / "ema") if place.is_dir()
    )


def ended(child: int) -> int | None:
    """Exit code of the process, None while it runs."""
    done, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if done else None


def kill_once(folder: Path, arguments: argparse.Namespace, draw: random.Random) -> dict[str, Any] | None:
    """Continue the run and kill it; None if it came to its end before."""
    child = start(folder, arguments)
    first = last_step(folder)
    during_save = draw.random() < 0.5
    target = first + draw.randint(1, max(1, int(1.4 * arguments.steps / (arguments.kills + 1))))
    patience = time.monotonic() + 300
    while time.monotonic() < patience:
        code = ended(child)
        if code is not None:
            if code:
                raise SystemExit(f"the run ended with code {code}: see {folder.with_suffix('.log')}")
            return None
        step = last_step(folder)
        if step >= target and (not during_save or saving(folder)):
            break
        time.sleep(0.0005 if during_save else 0.002)
    time.sleep(draw.random() * 0.01)
    found = {"step": last_step(folder), "during_save": saving(folder)}
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return found


def compare(whole: Path, hurt: Path, steps: int) -> list[str]:
    """What differs between two runs that should be the same."""
    import torch
    from safetensors.torch import load_file

    differing = []
    places = [f"checkpoints/step-{steps:08d}", "model/transformer", "best/transformer", "ema"]
    for place in places:
        names = sorted(file.name for file in (whole / place).glob("*.safetensors"))
        if names != sorted(file.name for file in (hurt / place).glob("*.safetensors")) or not names:
            differing.append(f"{place}: other files")
            continue
        for name in names:
            one, other = load_file(whole / place / name), load_file(hurt / place / name)
            if one.keys() != other.keys():
                differing.append(f"{place}/{name}: other names")
            differing += [f"{place}/{name}:{key}" for key in one if not torch.equal(one[key], other[key])]
    states = [json.loads((run / places[0] / "state.json").read_text()) for run in (whole, hurt)]
    for state in states:
        state.pop("seconds")
    if states[0] != states[1]:
        differing.append("state.json")
    logs = [
        [{k: v for k, v in json.loads(line).items() if k not in _CLOCKS} for line in (run / "log.jsonl").open()]
        for run in (whole, hurt)
    ]
    if logs[0] != logs[1]:
        differing.append("log.jsonl")
    if any(hurt.rglob(".*.tmp")):
        differing.append("temporary files are left")
    return differing


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """The whole experiment in `folder`; see the module."""
    import edt_diffusion.assemble
    import edt_diffusion.cli.app  # noqa: F401  forked processes find everything imported

    whole, hurt = folder / "whole", folder / "hurt"
    begun = time.perf_counter()
    child = start(whole, arguments)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"the undisturbed run failed: see {whole.with_suffix('.log')}")
    undisturbed = time.perf_counter() - begun
    draw = random.Random(arguments.seed)
    kills: list[dict[str, Any]] = []
    finished = False
    begun = time.perf_counter()
    while len(kills) < arguments.kills and not finished:
        found = kill_once(hurt, arguments, draw)
        finished = found is None
        if found is not None:
            kills.append(found)
            if not arguments.quiet:
                print(
                    f"kill {len(kills)}: step {found['step']}{', in a save' if found['during_save'] else ''}",
                    file=sys.stderr,
                )
    if not finished:
        child = start(hurt, arguments)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(f"the last restart failed: see {hurt.with_suffix('.log')}")
    differing = compare(whole, hurt, arguments.steps)
    return {
        "objective": arguments.objective,
        "steps": arguments.steps,
        "workers": arguments.workers,
        "kills": len(kills),
        "kills_during_a_save": sum(kill["during_save"] for kill in kills),
        "undisturbed_seconds": round(undisturbed, 1),
        "disturbed_seconds": round(time.perf_counter() - begun, 1),
        "differing": differing,
        "equal": not differing,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--save-every", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--objective", choices=sorted(OBJECTIVES), default="masked")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    parser.add_argument("--quiet", action="store_true")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # bits are equal at an equal number of threads
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        outcome = run(arguments, folder)
    if arguments.json:
        print(json.dumps(outcome))
    else:
        verdict = "equal bit for bit" if outcome["equal"] else f"DIFFERENT in {outcome['differing'][:5]}"
        print(f"{outcome['kills']} kills, {outcome['kills_during_a_save']} of them in a save: {verdict}")
    sys.exit(0 if outcome["equal"] else 1)


if __name__ == "__main__":
    main()
