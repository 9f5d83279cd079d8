"""A pipeline folder with its network in 8-bit integers, small enough to be committed; read back as an ordinary one.

    python benchmarks/compact_model.py runs/cifar/model benchmarks/models/cifar-32

Matrices are stored as int8 with one float32 scale per row (its largest magnitude over 127), all else as float16. What
is read back is a float32 pipeline with the rounded weights: *that* is the model which a benchmark measures, so nothing
of the rounding enters a comparison of settings.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file, save_file

from edt_diffusion.models import EDTTransformer2DModel
from edt_diffusion.pipelines import ClassConditionalPipeline

WEIGHTS, CLASSES = "weights.int8.safetensors", "classes.json"


def is_compact(folder: Path) -> bool:
    """Whether `write_compact` wrote this folder."""
    return (folder / WEIGHTS).is_file()


def write_compact(source: Path, target: Path) -> int:
    """Write a saved pipeline without autoencoder, whose scheduler is ancestral sampling; returns the bytes written."""
    pipeline = ClassConditionalPipeline.from_pretrained(source)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in pipeline.transformer.state_dict().items():
        if name.endswith("weight") and tensor.ndim == 2:
            scale = (tensor.abs().amax(1, keepdim=True) / 127).clamp_min(1e-12)
            stored[f"{name}.int8"] = (tensor / scale).round().to(torch.int8)
            stored[f"{name}.scale"] = scale
        else:
            stored[name] = tensor.to(torch.float16)
    target.mkdir(parents=True, exist_ok=True)
    save_file(stored, target / WEIGHTS)
    pipeline.transformer.save_config(target)
    config = json.loads((target / "config.json").read_text())
    config.pop("_name_or_path", None)  # where it lay
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    pipeline.scheduler.save_config(target)
    (target / CLASSES).write_text(json.dumps(pipeline.class_names, indent=1) + "\n")
    return sum(file.stat().st_size for file in target.iterdir())


def read_compact(folder: Path) -> ClassConditionalPipeline:
    """The pipeline of a folder that `write_compact` wrote, in float32."""
    stored = load_file(folder / WEIGHTS)
    state = {name: tensor.float() for name, tensor in stored.items() if not name.endswith((".int8", ".scale"))}
    for name in (name.removesuffix(".int8") for name in stored if name.endswith(".int8")):
        state[name] = stored[f"{name}.int8"].float() * stored[f"{name}.scale"]
    network = EDTTransformer2DModel.from_config(EDTTransformer2DModel.load_config(folder))
    network.load_state_dict(state)
    scheduler = DDPMScheduler.from_config(DDPMScheduler.load_config(folder))
    classes = json.loads((folder / CLASSES).read_text())
    return ClassConditionalPipeline(network.eval(), scheduler, class_names=classes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="folder of a saved pipeline")
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    print(f"{options.target}: {write_compact(options.source, options.target) / 1e6:.2f} MB")
