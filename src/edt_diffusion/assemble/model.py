"""The network, the autoencoder and the pipeline that the settings and the data ask for."""

import sys
from collections.abc import Callable
from inspect import signature
from typing import Any

from accelerate.utils import set_seed
from torch import Tensor

from ..config import RunConfig, parse_config
from ..data import ImageDataset, LatentStore, require_classes
from ..data.codec import LatentScaling
from ..data.dataset import described
from ..data.vae import load_vae
from ..models import BACKBONES
from ..objectives import OBJECTIVES
from ..pipelines import ClassConditionalPipeline, make_scheduler
from ..util.errors import UserError
from ..util.lookup import lookup
from ..util.weights import weights_sha256

# What of a trained model's arguments a fine-tuned one does not take over: the pictures decide, or the user.
_NOT_ARCHITECTURE = ("self", "sample_size", "in_channels", "num_classes", "attention_modulation")


def complete(config: RunConfig, dataset: ImageDataset | LatentStore) -> RunConfig:
    """Fill in what the data and the objective decide about the model, and refuse what contradicts them."""
    model = dict(config.model)
    channels, height, width = dataset.shape
    told: dict[str, Any] = {
        "sample_size": height if height == width else [height, width],
        "in_channels": channels,
    }
    if dataset.class_names is None:  # unlabelled pictures make an unconditional model
        model.setdefault("num_classes", None)
    if model.get("num_classes", 0) is not None:
        require_classes(dataset)
        told["num_classes"] = len(dataset.class_names or [])
    kind = "latents" if isinstance(dataset, LatentStore) and dataset.manifest.kind != "pixels" else "pictures"
    for name, value in told.items():
        if model.setdefault(name, value) != value:
            raise UserError(f"model.{name}={model[name]} does not fit the {kind}, which need {value}: leave it out")
    if OBJECTIVES[config.objective.name].continuous:  # flow matching learns no variance
        model.setdefault("learn_sigma", False)
    data = described(config.data, dataset)
    return parse_config({**config.model_dump(mode="json"), "model": model, "data": data.model_dump(mode="json")})


def with_architecture_of(config: RunConfig, source: Any) -> RunConfig:
    """Settings whose model is built like `source`, a trained network, as far as they do not say otherwise."""
    given = told_of_model(config)
    if "size" in given:
        return config
    name = next(name for name, kind in BACKBONES.items() if isinstance(source, kind))
    if given.get("name", "EDT") not in (name, "EDT"):
        raise UserError(f"model.name={given['name']}: the trained model is of {name}, leave it out")
    given = {**given, "name": name}
    arguments = list(signature(type(source).__init__).parameters)
    taken = {argument: source.config[argument] for argument in arguments if argument not in _NOT_ARCHITECTURE}
    taken = {name: list(value) if isinstance(value, tuple) else value for name, value in taken.items()}
    if OBJECTIVES[config.objective.name].continuous:  # flow matching learns no variance
        taken.pop("learn_sigma")
    return parse_config({**config.model_dump(mode="json"), "model": {**taken, **given}})


def told_of_model(config: RunConfig) -> dict[str, Any]:
    """What settings say of the model themselves: those that say nothing do not ask for the default size."""
    return config.model if "model" in config.model_fields_set else {}


def build_model(config: RunConfig) -> Any:
    """The untrained network; its weights depend on `config.seed` only."""
    arguments = {name: value for name, value in config.model.items() if name not in ("name", "size")}
    backbone = lookup(BACKBONES, config.model.get("name", "EDT"), "model")
    set_seed(config.seed)
    try:
        if size := config.model.get("size"):
            return backbone.from_size(size, **arguments)
        return backbone(**arguments)
    except KeyError as error:
        raise UserError(f"the model cannot be built: a setting of it lacks {error}") from None
    except (ValueError, TypeError, RuntimeError) as error:
        hint = "; sample_size is data.size" if str(error).startswith("sample_size") else ""
        raise UserError(f"the model cannot be built: {error}{hint}") from None


def check_masks(config: RunConfig, model: Any, begun: RunConfig | None = None) -> None:
    """Refuse token masks that the network does not take; without a masked pass, freeze what only such passes use.

    Args:
        config: the run's settings, settled.
        model: the network they make.
        begun: the settings of the run that is continued, if there is one.

    Raises:
        UserError: for such masks, or a run would go on with passes that train other parameters.
    """
    masks, name = config.objective.masks, config.model.get("name", "EDT")
    unused = set(model.masked_only())
    full = config.objective.passes == "full"
    if begun is not None and unused and (begun.objective.passes == "full") != full:
        raise UserError(
            f"objective.passes={config.objective.passes}: the run was begun with objective.passes="
            f"{begun.objective.passes}, and what only masked passes use in {name} (such as {min(unused)!r}) is trained "
            "from the start or not at all: begin another run in another --out; edt train --from takes the weights over"
        )
    if full:
        for parameter_name, parameter in model.named_parameters():
            if parameter_name in unused:
                parameter.requires_grad_(False)
        return
    assert masks is not None
    if not model.mask_grids:
        what = "without down-sampling" if name == "EDT" else ""
        raise UserError(
            f"objective.passes={config.objective.passes}: {name} {what + ' ' if what else ''}takes no token masks; use "
            "objective.passes=full"
        )
    if masks.down and len(masks.down) != len(model.down_grids):
        raise UserError(
            f"objective.masks.down has {len(masks.down)} ranges, the model {len(model.down_grids)} down-samplings: "
            f"give one (low, high) each{', or objective.masks.down=[]' if not model.down_grids else ''}"
        )
    if masks.stage0 is not None and not model.down_grids:
        raise UserError("objective.masks.stage0 is given, but the model has no down-sampling: leave it out")
    if masks.input is not None and name == "EDT" and not model.config.side_interpolater:
        raise UserError("objective.masks.input needs model.side_interpolater=true: set it, or leave the masks out")
    if masks.input is not None and masks.stage0 is not None:
        raise UserError("objective.masks.input and objective.masks.stage0 are both given: give one of them")
    if masks.input is None and masks.stage0 is None and not masks.down:
        raise UserError(f"objective.passes={config.objective.passes} with masks that hide nothing: use passes=full")


def with_weights(config: RunConfig, prepare: Callable[[Any], Any], network: Any, state: dict[str, Tensor]) -> Any:
    """A network on the CPU with whole weights, made like a sharded one.

    Args:
        config: the run's settings.
        prepare: what was done to the network after it was built, such as adding LoRA.
        network: the sharded one, whose attention modulation is taken over.
        state: its whole state dict.
    """
    copy = build_model(config)
    prepare(copy)
    copy.load_state_dict(state)
    copy._set_modulation(network.attention_modulation)
    return copy.eval()


def open_codec(config: RunConfig, dataset: ImageDataset | LatentStore) -> Any:
    """The autoencoder behind the latents of a store; None if the model sees pixels.

    Raises:
        UserError: the store has no copy and none is named, or the one named is another than made the store.
    """
    if not isinstance(dataset, LatentStore) or dataset.manifest.kind == "pixels":
        return None
    source = config.data.codec or dataset.codec_folder
    facts = dataset.manifest.codec
    if source is None:
        told = f"it was made by {facts.id}" if facts else "it does not say by which it was made"
        raise UserError(f"{dataset.source} holds no copy of its autoencoder ({told}): name it with data.codec")
    vae = load_vae(source)
    if facts is not None and weights_sha256(vae) != facts.sha256:
        raise UserError(
            f"the autoencoder {source!r} is not the one that made {dataset.source} ({facts.id}): its weights differ; "
            "give that one, or encode the pictures anew"
        )
    return vae


def build_pipeline(
    model: Any,
    class_names: list[str] | None,
    vae: Any = None,
    scaling: LatentScaling | None = None,
    pixels: bool = True,
    prediction_type: str = "epsilon",
    shift: float = 1.0,
) -> ClassConditionalPipeline:
    """The pipeline around a model, with the scheduler of its training process; predictions of pixels are clamped.

    Args:
        model: the network.
        class_names: in label order, or None.
        vae: the autoencoder of a model of latents.
        scaling: what was applied to the latents in training, if not what the autoencoder's configuration says.
        pixels: whether the model sees pixels.
        prediction_type: what the network predicts: "epsilon", "v_prediction" or "flow".
        shift: of the times of flow matching towards noise.
    """
    scheduler = make_scheduler(
        "euler" if prediction_type == "flow" else "ddpm",
        learned_variance=model.config.learn_sigma,
        clip_sample=pixels and vae is None,
        prediction_type=prediction_type,
        shift=shift,
    )
    own = {}
    if vae is not None and scaling is not None and scaling != LatentScaling.of_config(vae.config):
        own = {"latents_mean": list(scaling.shift), "latents_std": [1 / scale for scale in scaling.scale]}
    pipeline = ClassConditionalPipeline(model, scheduler, vae=vae, class_names=class_names, **own)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tell_about_classes(dataset: ImageDataset | LatentStore, config: RunConfig) -> None:
    """Say on stderr what a user might not expect of the classes."""
    if config.model["num_classes"] is None:
        print("training an unconditional model" + ("" if dataset.class_names else ": the pictures have no classes"),
              file=sys.stderr)  # fmt: skip
        return
    empty = [name for name, count in dataset.class_counts().items() if not count]
    if empty:
        listed = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        print(f"{len(empty)} classes have no pictures and will not be learned: {listed}", file=sys.stderr)
