"""Train the digits demo once with each objective, and have the samples judged.

    python benchmarks/objectives.py --json

Goal: at least 90 % of 500 generated digits are recognised (guidance 1.5, AMM off) by a classifier that has seen real
digits only, which recognises 98.6 % of held-out real ones. Some minutes a run on two CPU cores; a run begun earlier in
`--folder` goes on. A missed goal is reported and is no failure of the script.
"""

import argparse
import json
import tempfile
from pathlib import Path

from edt_diffusion.studies.demo import run_demo

OBJECTIVES = ("learned_variance", "v_prediction", "flow")
GOAL = 0.90


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=OBJECTIVES, default=OBJECTIVES)
    parser.add_argument("--folder", type=Path, help="where the runs go (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print the outcome as JSON")
    arguments = parser.parse_args()
    outcome = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for name in arguments.only:
            report = run_demo(folder / name, [f"objective.name={name}"], quiet=True)
            if report is None:
                raise SystemExit("stopped; run the same command again with --folder to go on")
            told = ("class_fidelity", "class_fidelity_amm", "class_fidelity_unguided", "memorisation_ratio",
                    "diversity_ratio", "train_seconds")  # fmt: skip
            outcome[name] = {key: report[key] for key in told} | {"reached": report["class_fidelity"] >= GOAL}
    if arguments.json:
        print(json.dumps({"goal": GOAL, **outcome}))
        return
    for name, figures in outcome.items():
        print(f"{name:<18} {figures['class_fidelity']:.1%} recognised{'' if figures['reached'] else ' (goal 90 %)'}")


if __name__ == "__main__":
    main()
