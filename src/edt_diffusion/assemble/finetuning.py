"""Starting from a trained model: its architecture, its weights, what of it stays as it is, and what is exported."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..config import RunConfig, load_config, parse_config
from ..data.codec import LatentScaling
from ..models.transfer import transfer_weights
from ..objectives import OBJECTIVES
from ..pipelines import ClassConditionalPipeline
from ..pipelines.loading import load_pipeline
from ..pipelines.schedulers import prediction_type_of
from ..training.finetune import prepare_finetuning
from ..training.lora import has_adapters, save_lora
from ..training.state import CheckpointStore
from ..util.errors import UserError
from ..util.weights import weights_sha256
from .model import told_of_model, with_architecture_of, with_weights

_PREDICTED = {"epsilon": "noise", "v_prediction": "v", "flow": "velocity"}


def begin(config: RunConfig, begun: RunConfig | None) -> tuple[RunConfig, ClassConditionalPipeline | None]:
    """The settings with the architecture of the model that is started from, and that model.

    A run that is continued has its weights in its checkpoint: the model it began with is not needed any more.
    """
    if config.finetune is None or config.finetune.model is None:
        return config, None
    if begun is not None and begun.finetune is not None and begun.finetune.model == config.finetune.model:
        given = told_of_model(config)
        known = given if "size" in given else {**begun.model, **given}
        return parse_config({**config.model_dump(mode="json"), "model": known}), None
    source = load_pipeline(config.finetune.model)
    return with_architecture_of(config, source.transformer), source


def prepare(
    config: RunConfig,
    model: Any,
    class_names: list[str] | None,
    source: ClassConditionalPipeline | None,
) -> list[str]:
    """Give an untrained model the weights of `source`, freeze what shall stay, add LoRA; lines that tell of it."""
    if config.finetune is None:
        return []
    lines: list[str] = []
    if source is not None:
        report = transfer_weights(
            source.transformer, model, source.class_names, class_names, new_classes=config.finetune.new_classes
        )
        lines += report.lines()
        was, now = prediction_type_of(source.scheduler), OBJECTIVES[config.objective.name].prediction_type
        if was != now:
            lines.append(
                f"the model predicted {_PREDICTED.get(was, was)}, this run trains {_PREDICTED[now]}: its output layer "
                "starts from weights made for something else"
            )
    return lines + prepare_finetuning(model, config.finetune, config.seed).lines()


def latent_lines(source: ClassConditionalPipeline | None, vae: Any, scaling: LatentScaling | None) -> list[str]:
    """What differs between the latents that a trained model knows and those of the run; nothing if they mean the same.

    Args:
        source: the model that is started from.
        vae: the run's autoencoder, None for pixels.
        scaling: of the run's latents; None is as the autoencoder's configuration says.
    """
    if source is None or source.vae is None:  # of pixels, or of latents of which it tells nothing
        return []
    if vae is None:
        return ["the model was trained on latents, this run trains on pixels: they mean something else to it"]
    if weights_sha256(source.vae) != weights_sha256(vae):
        return ["the model's autoencoder is not the one of these latents: they mean something else to it"]
    mean, deviation = source.config["latents_mean"], source.config["latents_std"]
    known = LatentScaling.of_config(source.vae.config) if mean is None else LatentScaling.measured(mean, deviation)
    own = scaling or LatentScaling.of_config(vae.config)
    if all(np.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in ((known.shift, own.shift), (known.scale, own.scale))):
        return []
    return ["the model's latents were shifted and scaled by other figures than these: they mean something else to it"]


def averaged(run: Path, pipeline: ClassConditionalPipeline, averages: dict[str, Tensor]) -> Any:
    """The network of a run with adapters, which hold averages in the place of their weights.

    What the adapters stand beside is not in `pipeline`, whose weights are merged, but in the run's checkpoints.

    Args:
        run: its folder.
        pipeline: the one it exported.
        averages: of all that was trained, by name.

    Raises:
        UserError: the run has no configuration or checkpoint any more, or the averages are of another model.
    """
    store = CheckpointStore(run / "checkpoints")
    step = store.newest()
    if step is None or not (run / "config.yaml").is_file():
        raise UserError(
            f"{run} holds {'no checkpoint' if step is None else 'no config.yaml'}: averages of low-rank adapters need "
            "it for the weights beside them; give the whole run folder"
        )
    state = store.load(step).tensors["model"]
    refuse_strange(run, averages, state)
    config = load_config(run / "config.yaml")
    names = pipeline.class_names
    return with_weights(
        config, lambda model: prepare(config, model, names, None), pipeline.transformer, state | averages
    )


def refuse_strange(run: Path, averages: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse averages that are not of a run's model.

    Raises:
        UserError: a name or a shape is not among the model's `own` tensors.
    """
    strange = [name for name in averages if name not in own or own[name].shape != averages[name].shape]
    if strange:
        raise UserError(
            f"the averages in {run / 'ema'} are not of the model in {run / 'model'}: {len(strange)} parameters differ, "
            f"such as {strange[0]}; give the run they belong to"
        )


def save_adapters(model: Any, folder: Path) -> None:
    """Write what LoRA has learned as `lora/`, beside the merged model; nothing where there is none."""
    if has_adapters(model):
        save_lora(model, folder / "lora")
