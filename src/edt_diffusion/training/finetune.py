"""Training a part of a trained model: what is frozen, and what low-rank adapters take over.

The order for a fine-tuning run: `models.transfer.transfer_weights` into the new model, `prepare_finetuning`, then
optimizer and EMA, which take the parameters that still require a gradient. What is saved for sampling is
`lora.without_adapters(model)`, taken with the EMA weights in the model.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

from ..models import Backbone
from ..models.class_rows import NEW_CLASS_ROWS
from ..models.edt import DownSample, UpSample
from ..nn.transformer_block import AdaLNZeroBlock, SideInterpolater
from ..util.errors import UserError
from ..util.lookup import lookup
from .lora import LoraSettings, add_lora


class FinetuneConfig(BaseModel):
    """What is trained of a trained model (`finetune:` in a configuration)."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(default=None, description="run folder, diffusers folder or hub name")
    freeze: tuple[str, ...] = Field(default=(), description="parts that stay as they are: see `parameter_parts`")
    lora: LoraSettings | None = None
    new_classes: str = Field(default="null", description="what new classes start from: null or mean")

    def given(self) -> list[str]:
        """Names of the settings, beside `model`, that are not as they are by default."""
        fields = type(self).model_fields
        return [name for name, field in fields.items() if name != "model" and getattr(self, name) != field.default]

    @model_validator(mode="after")
    def _consistent(self) -> "FinetuneConfig":
        lookup(NEW_CLASS_ROWS, self.new_classes, "start of new classes")
        if self.lora is not None and self.lora.train_classes and "class_embedder" in self.freeze:
            raise UserError(
                "finetune.freeze names class_embedder, which finetune.lora.train_classes=true trains: drop one of them"
            )
        return self


@dataclass(frozen=True)
class TrainableSummary:
    """Sizes, in numbers.

    Attributes:
        trainable: of the parameters that are trained, adapters included.
        adapters: of the adapters' parameters that are trained.
        total: of all parameters.
        parts: (trained, all) of each part of `parameter_parts`, without adapters.
    """

    trainable: int
    adapters: int
    total: int
    parts: dict[str, tuple[int, int]]

    def lines(self) -> list[str]:
        """The summary for people."""
        share = 100 * self.trainable / max(self.total, 1)
        out = [f"trains {self.trainable:,} of {self.total:,} parameters ({share:.1f} %)"]
        frozen = [part for part, (trained, size) in self.parts.items() if not trained and size]
        if frozen:
            out.append(f"frozen: {', '.join(frozen)}")
        if self.adapters:
            out.append(f"low-rank adapters: {self.adapters:,} parameters")
        return out


def parameter_parts(model: Backbone) -> dict[str, list[str]]:
    """Names of the parameters of each part that can be frozen; adapters belong to none.

    "stage0", "stage1", ... are the transformer blocks of a stage (in MDTv2 in-, out- and decoder blocks), "down" and
    "up" the modules between stages, "side" what guesses tokens left out at the input, "positions" learned position
    tables, "position_bias" the relative-position biases (which are parts of stages or of "side" too), "final" the
    output layer.
    """
    own = [name for name, _ in model.named_parameters() if ".lora_" not in name]

    def under(*prefixes: str) -> list[str]:
        return [name for name in own if name.startswith(prefixes)]

    def blocks(kind: type[nn.Module], stage: int | None = None) -> list[str]:
        numbers = [
            number
            for number, (block, of) in enumerate(zip(model.blocks, model.block_stages, strict=True))
            if isinstance(block, kind) and stage in (None, of)
        ]
        return under(*(f"blocks.{number}." for number in numbers))

    parts = {f"stage{stage}": blocks(AdaLNZeroBlock, stage) for stage in range(len(model.grids))}
    positions = [name for name in own if name.endswith("pos_embed")]
    side = [name for name in blocks(SideInterpolater) if name not in positions]
    parts |= {"down": blocks(DownSample), "up": blocks(UpSample), "side": side, "positions": positions}
    parts |= {part: under(f"{part}.") for part in ("patch_embed", "timestep_embedder", "class_embedder")}
    parts["position_bias"] = [name for name in own if ".position_bias." in name]
    parts["final"] = under("norm_out.", "proj_out.")
    return {part: names for part, names in parts.items() if names} | {"all": own}


def freeze_parts(model: Backbone, names: Sequence[str]) -> list[str]:
    """Stop the training of the named parts; adapters in them go on being trained.

    Call it before the optimizer and the EMA are built: frozen parameters then get no gradient, no state and no average,
    and stay the same bit for bit.

    Args:
        model: the network, before or after `add_lora`.
        names: keys of `parameter_parts`.

    Returns:
        The names of the frozen parameters, in the model's order.

    Raises:
        UserError: for a part that this model does not have.
    """
    parts = parameter_parts(model)
    frozen = {parameter for name in names for parameter in lookup(parts, name, "part to freeze")}
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
            parameter.grad = None
    return [name for name in parts["all"] if name in frozen]


def prepare_finetuning(model: Backbone, config: FinetuneConfig, seed: int) -> TrainableSummary:
    """Freeze parts and add adapters as configured.

    With LoRA, a part that is frozen by its name gets no adapters and keeps its function, and so does what only passes
    with token masks use, where it is frozen already; "all" freezes the weights and leaves the adapters everywhere.

    Raises:
        UserError: as `freeze_parts` and `add_lora`, or if nothing is left to be trained.
    """
    idle = {name for name in model.masked_only() if not model.get_parameter(name).requires_grad}
    freeze_parts(model, config.freeze)
    if config.lora is not None:
        parts = parameter_parts(model)
        named = {name for part in config.freeze if part != "all" for name in parts[part]}
        add_lora(model, config.lora, seed, named | idle)
    summary = trainable_summary(model)
    if not summary.trainable:
        raise UserError(f"finetune.freeze={list(config.freeze)} freezes the whole model: leave a part out, or add LoRA")
    return summary


def trainable_summary(model: Backbone) -> TrainableSummary:
    """Count what is trained."""
    sizes = {name: (p.numel() if p.requires_grad else 0, p.numel()) for name, p in model.named_parameters()}
    adapters = sum(trained for name, (trained, _) in sizes.items() if ".lora_" in name)
    parts = {
        part: (sum(sizes[name][0] for name in names), sum(sizes[name][1] for name in names))
        for part, names in parameter_parts(model).items()
        if part != "all"
    }
    trained, total = (sum(size[i] for size in sizes.values()) for i in (0, 1))
    return TrainableSummary(trained, adapters, total, parts)
