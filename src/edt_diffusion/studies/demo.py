"""`edt demo`: train on real handwritten digits, look at the result, and have it judged."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..assemble import build_trainer, open_data
from ..config import load_config, run_source
from ..data import ImageDataset, require_classes, stratified_split
from ..evaluation.judge import PixelJudge, diversity_ratio, memorisation_ratio
from ..pipelines import ClassConditionalPipeline
from ..training.curves import draw_curves
from ..training.lines import read_log
from ..util.errors import UserError
from ..util.files import atomic_write_json
from ..util.pictures import beside, grid, save_png
from ..util.rng import image_seed

HELD_OUT = 0.2
PER_CLASS = 50
GUIDANCE = 1.5
SCHEDULER, STEPS = "dpm++", 20


@dataclass(frozen=True)
class _Setting:
    name: str
    guidance: float
    amm: bool


SETTINGS = (
    _Setting("guided", GUIDANCE, amm=False),
    _Setting("guided_amm", GUIDANCE, amm=True),
    _Setting("unguided", 1.0, amm=False),
    _Setting("unguided_amm", 1.0, amm=True),
)


def run_demo(folder: Path, overrides: list[str] | None = None, quiet: bool = False) -> dict[str, Any] | None:
    """Train, sample every class with AMM off and on from the same seeds, judge, and write the report.

    Args:
        folder: run folder; a run already there is continued.
        overrides: settings to change, as "key.path=value".
        quiet: no progress on the terminal.

    Returns:
        What `report.json` holds, or None if training was stopped by a signal (run again to go on).
    """
    config = load_config(run_source("digits", folder), overrides)
    if config.model.get("num_classes", 0) is None:
        raise UserError("model.num_classes=null: the demo asks for digits by class; use edt train for such a model")
    digits = open_data(config)
    if not isinstance(digits, ImageDataset):
        raise UserError("the demo trains on pixels: leave data.codec out, and data.path a set of pictures")
    require_classes(digits)
    training, held_out = stratified_split(digits, HELD_OUT, config.seed)
    trainer = build_trainer(config, folder, training, quiet=quiet, preset="digits")
    if not trainer.fit():
        return None
    pipeline = ClassConditionalPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    report = _judge(pipeline, folder, training, held_out)
    report["train_seconds"] = round(trainer.seconds, 1)
    report["train_steps"] = trainer.step
    report |= _losses(folder)
    atomic_write_json(folder / "report.json", report)
    return report


def _pictures(dataset: ImageDataset) -> tuple[np.ndarray, np.ndarray]:
    labels = dataset.labels
    assert labels is not None
    return np.stack([dataset.image(index) for index in range(len(dataset))]), labels


def _judge(
    pipeline: ClassConditionalPipeline, folder: Path, training: ImageDataset, held_out: ImageDataset
) -> dict[str, Any]:
    real, real_labels = _pictures(training)
    unseen, unseen_labels = _pictures(held_out)
    judge = PixelJudge(real, real_labels)
    classes = len(training.class_names or [])
    labels = np.repeat(np.arange(classes), PER_CLASS)
    seeds = [image_seed(1, index) for index in range(len(labels))]
    report: dict[str, Any] = {"judge_accuracy_on_held_out_real_digits": judge.accuracy(unseen, unseen_labels)}
    images: dict[str, np.ndarray] = {}
    results: dict[str, dict[str, float]] = {}
    suggested = pipeline.transformer.suggested_modulation()
    amm_blocks = [] if suggested is None else list(suggested.blocks)
    start = time.perf_counter()
    for setting in SETTINGS:
        pipeline.transformer.set_attention_modulation(amm_blocks if setting.amm else None)
        images[setting.name] = pipeline(
            labels.tolist(),
            guidance_scale=setting.guidance,
            num_inference_steps=STEPS,
            scheduler=SCHEDULER,
            seeds=seeds,
            output_type="uint8",
        ).images  # pyright: ignore[reportAttributeAccessIssue]
        made = images[setting.name]
        results[setting.name] = {
            "guidance_scale": setting.guidance,
            "class_fidelity": judge.accuracy(made, labels),
            "memorisation_ratio": memorisation_ratio(made, real, unseen),
            "diversity_ratio": diversity_ratio(made, labels, real, real_labels),
        }
    report["sample_seconds"] = round(time.perf_counter() - start, 1)
    shown = np.concatenate([np.arange(10) + label * PER_CLASS for label in range(classes)])
    off, on = (grid(images[name][shown], 10, training.class_names, 32) for name in ("guided", "guided_amm"))
    save_png(off, folder / "samples.png")
    save_png(beside([off, on], ["AMM off", "AMM on"]), folder / "amm.png")
    headline = results["guided"]
    report |= {
        "class_fidelity": headline["class_fidelity"],
        "class_fidelity_amm": results["guided_amm"]["class_fidelity"],
        "class_fidelity_unguided": results["unguided"]["class_fidelity"],
        "memorisation_ratio": headline["memorisation_ratio"],
        "diversity_ratio": headline["diversity_ratio"],
        "generated_digits": len(labels),
        "guidance_scale": GUIDANCE,
        "scheduler": SCHEDULER,
        "num_inference_steps": STEPS,
        "amm_blocks": amm_blocks,
        "settings": results,
    }
    return report


def _losses(folder: Path) -> dict[str, float]:
    """Draw the curves of the run, and return the means of its losses over the first and last tenth of the log."""
    draw_curves([folder], None, folder / "loss.png")
    lines = read_log(folder)
    facts = {}
    for name in ("full", "masked"):  # those that the run has
        values = [line[f"loss_{name}"] for line in lines if f"loss_{name}" in line]
        if not values:
            continue
        tenth = max(1, len(values) // 10)
        facts[f"loss_{name}_first"] = float(np.mean(values[:tenth]))
        facts[f"loss_{name}_last"] = float(np.mean(values[-tenth:]))
    return facts
