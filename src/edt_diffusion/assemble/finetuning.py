"""Starting from a trained model: its architecture, its weights, what of it stays as it is, and what is exported."""

from pathlib import Path
from typing import Any

from ..config import RunConfig, parse_config
from ..models.transfer import transfer_weights
from ..pipelines import ClassConditionalPipeline
from ..pipelines.loading import load_pipeline
from ..training.finetune import prepare_finetuning
from ..training.lora import has_adapters, save_lora
from .model import told_of_model, with_architecture_of


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
    return lines + prepare_finetuning(model, config.finetune, config.seed).lines()


def save_adapters(model: Any, folder: Path) -> None:
    """Write what LoRA has learned as `lora/`, beside the merged model; nothing where there is none."""
    if has_adapters(model):
        save_lora(model, folder / "lora")
