"""EDT, DiT and MDTv2 trained for equal seconds on the CPU, and EDT with its own masks, MDT's, and none.

    python benchmarks/equal_seconds.py --train TRAIN --test TEST --extractor NETWORK.ts --work FOLDER
        [--budget 10m-cpu] [--seeds 3] [--processes 2] [--only backbones,masks] [--rates 1e-3,2e-3,4e-3]

Colour pictures at 16 px. The three networks have the same number of parameters in use when they sample, within 2 %:
EDT-S and DiT-S with narrower blocks (72 to 120, and 96 channels); MDTv2 with 4 + 4 + 3 blocks of 96. Data, objective,
optimizer, batch, precision, average and schedule are the same; only `model` and the masks differ. Each run gets the
same seconds, of one thread; measuring, saving and sampling are not charged. The rate of learning follows the share of
the seconds used. Runs of one seed see the same pictures and noise.

Every point is scored by the Fréchet distance of the network's features of 2,000 samples (DDIM, 18 steps, no guidance,
the same noise and labels everywhere) to those of the training pictures; the ceiling is that of 2,000 test pictures.
All pictures are of 16 px and brought to 32 px before the network. The distance is not FID.

Run it again to go on: what is in FOLDER is not made again.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from machine import machine

from edt_diffusion.models import BACKBONES
from edt_diffusion.studies.matrix import Arm, Budget, Matrix, Results, Variant, run_matrix
from edt_diffusion.studies.matrix.results import Estimate, draw_curves, new_figure, save_figure
from edt_diffusion.util.errors import UserError
from edt_diffusion.util.files import atomic_write_json, atomic_write_text, make_folder

HERE = Path(__file__).parent
SAMPLING = {"scheduler": "ddim", "steps": 18, "guidance": 1.0}
POINTS = (0.25, 0.5, 1.0)
METRICS = ("fid", "is", "kid")
DRAWN = {"fid": "Fréchet distance of features", "kid": "kernel distance of features (KID)"}

EDT = {
    "name": "EDT", "patch_size": 2, "depths": [2, 2, 2, 3, 3], "dims": [72, 96, 120, 96, 72],
    "num_heads": [3, 4, 5, 4, 3],
}  # fmt: skip
DIT = {"name": "DiT", "patch_size": 2, "depth": 12, "hidden_size": 96, "num_heads": 4}
MDT = {"name": "MDTv2", "patch_size": 2, "depth": 11, "hidden_size": 96, "num_heads": 4, "decode_layers": 3}
MDT_MASKS = {"input": [0.3, 0.5], "down": []}

ARMS = (
    Arm("edt", "EDT, its masks", {"model": EDT, "objective.passes": "full+masked"}),
    Arm("dit", "DiT", {"model": DIT, "objective.passes": "full"}),
    Arm(
        "mdt", "MDTv2, its masks",
        {"model": MDT, "objective.passes": "full+masked", "objective.masks": MDT_MASKS},
    ),
    Arm("edt-nomask", "EDT, no masks", {"model": EDT, "objective.passes": "full"}),
    Arm(
        "edt-mdtmask", "EDT, MDT's masks",
        {
            "model": {**EDT, "side_interpolater": True}, "objective.passes": "full+masked",
            "objective.masks": MDT_MASKS,
        },
    ),
)  # fmt: skip
GROUPS = {"backbones": ("edt", "dit", "mdt"), "masks": ("edt", "edt-mdtmask", "edt-nomask")}
TITLES = {"backbones": "three backbones, equal parameters", "masks": "EDT with three kinds of masks"}
# Arms whose rate is tried out, and who takes it over.
TRIED = {"edt": ("edt", "edt-nomask", "edt-mdtmask"), "dit": ("dit",), "mdt": ("mdt",)}


def precision(word: str) -> str:
    """bf16 where the processor multiplies in it, else float32."""
    if word != "auto":
        return word
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "no"


def matrix(options: argparse.Namespace, arms: list[Arm], budget: str, seeds: int, **more: Any) -> Matrix:
    """The common part of all runs."""
    word = precision(options.precision)
    return Matrix(
        base="small-32",
        settings={
            "data": {"path": options.train, "size": 16, "channels": 3, "flip": True},
            "optimizer.lr": options.lr,
            "train.batch_size": 64,
            "train.mixed_precision": word,
            "train.log_every": 50,
        },
        arms=tuple(arms),
        budget=Budget.parse(budget),
        seeds=tuple(range(seeds)),
        variants=(Variant("plain", "DDIM, 18 steps", {**SAMPLING, "precision": "bf16" if word == "bf16" else "fp32"}),),
        extractor=options.extractor,
        score_size=32,
        ceiling=options.test,
        **more,
    )


def tried_rates(options: argparse.Namespace, names: list[str]) -> dict[str, Any]:
    """The best rate of each backbone in a short trial with one seed, and the distances it was chosen by."""
    rates = [float(word) for word in options.rates.split(",")]
    trained = [name for name, users in TRIED.items() if set(users) & set(names)]
    arms = [
        Arm(f"{arm.name}-{rate:g}", f"{arm.title}, {rate:g}", {**arm.settings, "optimizer.lr": rate})
        for arm in ARMS if arm.name in trained for rate in rates
    ]  # fmt: skip
    asked = matrix(options, arms, options.trial, 1, images=min(options.images, 1000), metrics=("fid",))
    if options.report:
        found = Results.read(options.work / "rates", asked)
    else:
        found = run_matrix(asked, options.work / "rates", options.processes, options.threads)
    if not found.complete:
        raise UserError(f"the trial of rates is not complete: run again ({found.failed or 'stopped'})")
    distances: dict[str, dict[str, float]] = {}
    for name in trained:
        scored = {f"{rate:g}": found.mean(f"{name}-{rate:g}") for rate in rates}
        distances[name] = {rate: estimate.mean for rate, estimate in scored.items() if estimate is not None}
    best = {name: float(min(scored, key=scored.__getitem__)) for name, scored in distances.items()}
    return {"budget": str(asked.budget), "images": asked.images, "distances": distances, "chosen": best}


def main() -> None:
    """Run what is missing and write the results."""
    options = _options()
    make_folder(options.out)
    wanted = [name for group in options.only.split(",") for name in GROUPS[group]]
    arms = [arm for arm in ARMS if arm.name in wanted]
    trial = tried_rates(options, [arm.name for arm in arms]) if options.rates else None
    if trial is not None:
        rate_of = {user: trial["chosen"][name] for name, users in TRIED.items() if name in trial["chosen"]
                   for user in users}  # fmt: skip
        arms = [Arm(arm.name, arm.title, {**arm.settings, "optimizer.lr": rate_of[arm.name]}) for arm in arms]
    asked = matrix(
        options, arms, options.budget, options.seeds, points=POINTS, images=options.images, metrics=METRICS
    )  # fmt: skip
    if options.report:
        results = Results.read(options.work / "runs", asked)
    else:
        results = run_matrix(asked, options.work / "runs", options.processes, options.threads)
    write(results, trial, options)
    if not results.complete:
        print(f"{len(results.missing)} cells are missing: run again to go on", file=sys.stderr)
        sys.exit(1)


def write(results: Results, trial: dict[str, Any] | None, options: argparse.Namespace) -> None:
    """JSON, a page and a picture, of what is there."""
    told = results.summary()
    told["cells"] = [{name: cell[name] for name in cell if name != "details"} for cell in told["cells"]]
    told = {
        **told, "rate_trial": trial, "rate": options.lr if trial is None else trial["chosen"],
        "machine": machine(), "command": command(options),
    }  # fmt: skip
    atomic_write_json(options.out / "equal_seconds.json", without_folders(json.loads(json.dumps(told))))
    atomic_write_text(options.out / "equal_seconds.md", page(results, trial, options))
    scored = {name: [arm for arm in GROUPS[name] if results.mean(arm)] for name in options.only.split(",")}
    panels = [(name, metric) for name, arms in scored.items() if len(arms) > 1 for metric in DRAWN]
    if not panels:
        return
    figure, pyplot = new_figure(len(panels))
    try:
        for axes, (name, metric) in zip(figure.axes, panels, strict=True):
            draw_curves(axes, results, metric, scored[name], label=DRAWN[metric])
            axes.set_title(TITLES[name])
        save_figure(figure, options.out / "equal_seconds.png")
    finally:
        pyplot.close(figure)


def without_folders(told: Any) -> Any:
    """The same without the folders that files lie in."""
    if isinstance(told, dict):
        return {name: without_folders(value) for name, value in told.items()}
    if isinstance(told, list):
        return [without_folders(value) for value in told]
    return Path(told).name if isinstance(told, str) and Path(told).is_absolute() else told


def page(results: Results, trial: dict[str, Any] | None, options: argparse.Namespace) -> str:
    """The results as Markdown."""
    asked = results.matrix
    there = {arm.name for arm in asked.arms}

    def difference(arm: Arm, other: str, metric: str) -> str:
        """At the end, paired by seed."""
        if arm.name == other or other not in there:
            return ""
        return text(results.difference(arm.name, other, metric), signed=True)

    ceiling = (results.ceiling or {}).get("metrics", {}).get("fid")
    lines = [
        "# EDT, DiT and MDTv2 at equal seconds",
        "",
        f"{asked.budget.words()} a run, {len(asked.seeds)} seeds, {asked.images} samples a point, 16 px pictures. The "
        "Fréchet distance is of features of a small network, pictures brought to 32 px for it: it is not FID. Intervals"
        " are 95 % of Student's t over seeds. Lower is better.",
        "",
        "| arm | parameters | multiply-adds of a step's picture | steps | wall seconds | images/s | "
        + " | ".join(f"distance at {point:.0%}" for point in asked.points)
        + " | difference to EDT | difference to DiT |",
        "|---|---|---|---|---|---|" + "---|" * (len(asked.points) + 2),
    ]
    for arm in asked.arms:
        done = [
            results.done[name] for name in (f"{arm.name}-seed{seed}" for seed in asked.seeds) if name in results.done
        ]
        spent = results.spent(arm.name)
        seconds = spent.get(f"charged_{asked.budget.kind}_seconds", spent.get("charged_wall_seconds", 0.0))
        speed = f"{spent['images'] / seconds:.0f}" if seconds else ""
        cells = [text(results.mean(arm.name, "fid", point)) for point in asked.points]
        against = [difference(arm, other, "fid") for other in ("edt", "dit")]
        lines.append(
            f"| {arm.title} | {done[0]['parameters']:,} | {work(arm)} | {steps(done)} | {walls(done)} | {speed} | "
            if done and spent else f"| {arm.title} | | {work(arm)} | | | | "
        )  # fmt: skip
        lines[-1] += " | ".join([*cells, *against]) + " |"
    lines += ["", f"Held-out real pictures: {ceiling['value']:.3f}." if ceiling else "No ceiling was measured."]
    lines += [
        "",
        "The same samples by other measures, at the end: kernel distance (lower is better; the number of samples does "
        "not bias it) and class score (higher is better).",
        "",
        "| arm | kernel distance | difference to EDT | difference to DiT | class score | difference to DiT |",
        "|---|---|---|---|---|---|",
    ]
    for arm in asked.arms:
        kernel, classes = (text(results.mean(arm.name, name)) for name in ("kid", "is"))
        cells = [
            kernel,
            difference(arm, "edt", "kid"),
            difference(arm, "dit", "kid"),
            classes,
            difference(arm, "dit", "is"),
        ]
        lines.append(f"| {arm.title} | {' | '.join(cells)} |")
    real = (results.ceiling or {}).get("metrics", {})
    if "kid" in real and "is" in real:
        lines.append(f"| held-out real pictures | {real['kid']['value']:.3f} | | | {real['is']['value']:.3f} | |")
    lines.append("")
    if trial is None:
        lines.append(f"The rate of learning is {options.lr:g} for all.")
    else:
        lines.append(
            f"The rate of learning was chosen for each backbone by a trial of {trial['budget']} with one seed: "
            + "; ".join(
                f"{name} {', '.join(f'{distance:.2f} at {rate}' for rate, distance in scored.items())}: "
                f"{trial['chosen'][name]:g}"
                for name, scored in trial["distances"].items()
            )
            + "."
        )
        edge = at_the_edge(trial)
        if edge:
            lines.append(
                f"The rate chosen is the lowest or the highest tried for {', '.join(edge)}: a better one may lie "
                "beyond."
            )
    lines += [
        "Parameters are those trained: MDT's side interpolater, not used when sampling, is among them. Multiply-adds "
        "are of one forward pass on all tokens, times the passes of a step. Points before the last are of runs whose "
        "rate of learning is still high, not of shorter runs. Fewer steps fit into a second of CPU time where other "
        "work shares a core's caches: steps, and the wall-clock seconds that tell how much there was beside a run, are "
        "given from the fewest to the most of a seed. Differences are paired by seed, not by load.",
        *(f"Runs were not made alike ({told})." for told in results.unlike()),
    ]
    if results.missing:
        lines.append(f"Missing: {', '.join(results.missing)}.")
    return "\n".join(lines) + "\n"


def walls(done: list[dict[str, Any]]) -> str:
    """Wall-clock seconds charged, from the fewest to the most of a seed."""
    least, most = (chosen(run["charged_wall_seconds"] for run in done) for chosen in (min, max))
    return f"{least:.0f} to {most:.0f}"


def work(arm: Arm) -> str:
    """Multiply-adds of one picture in all passes of a step, a masked pass counted as a full one."""
    arguments = dict(arm.settings["model"])
    network = BACKBONES[arguments.pop("name")](sample_size=16, in_channels=3, num_classes=10, **arguments)
    passes = len(arm.settings["objective.passes"].split("+"))
    return f"{sum(network.multiply_adds().values()) / 1e6:.1f} M x {passes}"


def steps(done: list[dict[str, Any]]) -> str:
    """The steps of an arm's runs, the fewest and the most."""
    made = [facts["steps"] for facts in done]
    return f"{min(made)}" if min(made) == max(made) else f"{min(made)} to {max(made)}"


def at_the_edge(trial: dict[str, Any]) -> list[str]:
    """Backbones whose best rate is the lowest or the highest of those tried."""
    tried = {name: [float(rate) for rate in scored] for name, scored in trial["distances"].items()}
    return [name for name, rate in trial["chosen"].items() if rate in (min(tried[name]), max(tried[name]))]


def command(options: argparse.Namespace) -> str:
    """What was run, without the names of files."""
    told = ["budget", "seeds", "images", "only", "precision", "processes", "threads"]
    told += ["rates", "trial"] if options.rates else ["lr"]
    words = [f"--{name} {getattr(options, name)}" for name in told]
    return " ".join(["python benchmarks/equal_seconds.py --train TRAIN --test TEST --extractor NETWORK.ts", *words])


def text(estimate: Estimate | None, signed: bool = False) -> str:
    """A mean with its interval."""
    if estimate is None:
        return ""
    sign = "+" if signed else ""
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{sign}.3f}"
    return f"{estimate.mean:{sign}.3f} ({estimate.low:{sign}.3f} to {estimate.high:{sign}.3f})"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", required=True, help="pictures with classes, as edt train --data")
    parser.add_argument("--test", help="held-out pictures: the ceiling")
    parser.add_argument("--extractor", required=True, help="as edt evaluate --extractor")
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs; run again to go on")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of equal_seconds.{json,md,png}")
    parser.add_argument("--budget", default="10m-cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--only", default="backbones,masks", help="groups of arms: backbones, masks")
    parser.add_argument("--lr", type=float, default=2e-3, help="for all, where no rates are tried")
    parser.add_argument("--rates", default="", help="try these for each backbone, such as 1e-3,2e-3,4e-3")
    parser.add_argument("--trial", default="90s-cpu", help="budget of each trial of a rate")
    parser.add_argument("--report", action="store_true", help="train nothing: tell what is in --work")
    parser.add_argument("--precision", default="auto", help="auto, bf16 or no (float32)")
    options = parser.parse_args()
    unknown = [name for name in options.only.split(",") if name not in GROUPS]
    if unknown:
        parser.error(f"--only {unknown[0]}: expected {' or '.join(GROUPS)}")
    return options


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
