"""`edt amm show`: the modulation matrix, which pairs of tokens it keeps, and what it does to a model's attention."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..assemble.editing import open_model, read_original
from ..models.summary import named_model
from ..nn.modulation import AttentionModulation
from ..pipelines import ClassConditionalPipeline
from ..pipelines.editing import picture_shape, prepare
from ..pipelines.schedulers import prediction_type_of
from ..util.errors import UserError
from ..util.files import atomic_write_json, make_folder
from ..util.rng import Purpose, normals
from .amm_attention import attention_facts, attention_maps, matrix_facts
from .amm_pictures import draw_attention, draw_matrices
from .amm_search.candidates import parse_blocks, parse_formulas, parse_radii, words

FACTS = "amm_show.json"

# How the picture is sampled that attention is looked at on, when none is given.
_SCHEDULER, _STEPS = "dpm++", 20
# Where on the way from noise (1) to the picture (0) attention is looked at, when nobody says otherwise.
_LEVEL = 0.3


@dataclass
class Request:
    """What `edt amm show` was asked for.

    Attributes:
        model: run folder, diffusers folder, hub name, or a size such as "EDT-S/2", of which there are matrices only.
        image_size: pixels, for a size.
        blocks: numbers in words; None is the modulation that is saved in the model, or else the suggested one.
        formula, radius: with blocks; None is "exp" and the default radius.
        guidance: scale that a suggestion is for.
        classes: name or number of the class, None the first one.
        picture: a file to look at; None samples a picture.
        timestep: noise level in 0 ... 999 of the noising process; None is 30 % of the way.
        heads: of which attention is drawn alone, beside the mean.
        seed: of the sampled picture and of the noise.
        out: folder.
        device: None is the GPU if there is one.
    """

    model: str
    image_size: str = "256"
    blocks: str | None = None
    formula: str | None = None
    radius: str | None = None
    guidance: float = 1.0
    classes: str | None = None
    picture: Path | None = None
    timestep: int | None = None
    heads: Sequence[int] = ()
    seed: int = 0
    out: Path = Path("amm")
    device: str | None = None


@dataclass
class Outcome:
    """What came of it.

    Attributes:
        facts: `setting`, `matrices` (one for each grid), `blocks`, and of a trained model `attention`.
        written: files.
        notes: what to tell.
    """

    facts: dict[str, Any]
    written: list[Path]
    notes: list[str] = field(default_factory=list)


def show(request: Request) -> Outcome:
    """Compute, draw and write what there is to see.

    Raises:
        UserError: for anything the user can put right.
    """
    network, pipeline = named_model(request.model, request.image_size), None
    if network is None:
        pipeline, _ = open_model(request.model, request.device, None, quiet=True)
        pipeline.set_progress_bar_config(disable=True)
        network = pipeline.transformer
    setting, chosen_by = _setting(network, request)
    grids = [grid for _, grid in network.attention_layers()]
    make_folder(request.out)
    of_grids = dict.fromkeys(grids[block] for block in setting.blocks)
    facts: dict[str, Any] = {
        "model": request.model,
        "setting": setting.to_config(),
        "words": words(setting),
        "chosen_by": chosen_by,
        "blocks": [{"block": block, "grid": list(grids[block])} for block in setting.blocks],
        "matrices": [matrix_facts(height, width, setting.formula, setting.radius) for height, width in of_grids],
    }
    drawn = draw_matrices(list(of_grids), setting, request.out / "matrix.png")
    notes = (
        [] if drawn else ["matplotlib is not installed: no pictures were drawn (pip install 'edt-diffusion[train]')"]
    )
    if pipeline is not None:
        noisy, told = _noisy_input(pipeline, request)
        maps = attention_maps(network, noisy, setting)
        heads = _heads(request.heads, [len(without) for without, _ in maps.values()])
        facts["input"] = told
        facts["attention"] = [{"block": block, **attention_facts(*pair, grids[block])} for block, pair in maps.items()]
        drawn += draw_attention(maps, grids, heads, facts, request.out / "attention.png")
    elif request.picture is not None or request.classes is not None or request.timestep is not None:
        notes.append(f"{request.model} is a size without weights: only its matrices are shown")
    atomic_write_json(request.out / FACTS, json.loads(json.dumps(facts)))
    return Outcome(facts, [request.out / FACTS, *drawn], notes)


def table(facts: dict[str, Any]) -> list[str]:
    """The numbers as lines for a terminal."""
    lines = [f"AMM {facts['words']} ({facts['chosen_by']})"]
    lines.append("grid    radius  pairs zeroed  weights       gain: corner  edge  centre  seen from corner, centre")
    for each in facts["matrices"]:
        gain, seen, (low, high) = each["gain"], each["seen"], each["weights"]
        lines.append(
            f"{'x'.join(map(str, each['grid'])):<7} {each['radius_cells']:<7.3g} {each['zeroed']:<13.1%} "
            f"{low:.2f} to {high:<5.2f} {gain['corner']:>12.2f} {gain['edge']:>5.2f} {gain['centre']:>7.2f}  "
            f"{seen['corner']:.0%}, {seen['centre']:.0%}"
        )
    if "attention" not in facts:
        return lines
    lines.append("block  grid    looks over (cells)  entropy         sum: mean  least  largest")
    for each, block in zip(facts["attention"], facts["blocks"], strict=True):
        distance, entropy, sums, gain = each["distance"], each["entropy"], each["row_sum"], each["gain"]
        lines.append(
            f"{each['block']:>5}  {'x'.join(map(str, block['grid'])):<7} {distance['without']:.2f} -> "
            f"{distance['with']:<11.2f} {entropy['without']:.2f} -> {entropy['with']:<6.2f} {sums['with']:>10.2f} "
            f"{gain['least']:>6.2f} {gain['largest']:>8.2f}"
        )
    return lines


def _setting(network: Any, request: Request) -> tuple[AttentionModulation, str]:
    """The modulation to show, and who chose it."""
    formula = None if request.formula is None else parse_formulas(request.formula)[0]
    radius = None if request.radius is None else parse_radii(request.radius, "--radius")[0]
    if request.blocks is not None:
        blocks, by = tuple(parse_blocks(request.blocks, len(network.attention_layers()))), "asked for"
        base = AttentionModulation(blocks)
    elif network.attention_modulation is not None:
        base, by = network.attention_modulation, "saved in the model"
    else:
        published = network.published_modulation(request.guidance)
        base = published or network.suggested_modulation(request.guidance)
        by = f"{'published' if published else 'suggested'} at guidance {request.guidance:g}"
    if base is None:
        raise UserError("no modulation is saved in this model or suggested for it: name blocks by --blocks")
    if formula is not None or request.radius is not None:
        by += ", changed" if request.blocks is None else ""
    setting = AttentionModulation(
        base.blocks, formula or base.formula, base.radius if request.radius is None else radius
    )
    for block in setting.blocks:
        height, width = network.attention_layers()[block][1]
        if min(height, width) < 3:
            raise UserError(f"block {block} has a {height}x{width} token grid: modulation needs at least 3x3")
    return setting, by


def _noisy_input(pipeline: ClassConditionalPipeline, request: Request) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of one call of the network, and what to say of them."""
    steps = pipeline.scheduler.config["num_train_timesteps"]
    timestep = round(_LEVEL * steps) if request.timestep is None else request.timestep
    if not 0 <= timestep < steps:
        raise UserError(f"--timestep {timestep}: expected 0 to {steps - 1}")
    conditional = pipeline.transformer.config.num_classes is not None
    if request.classes is not None and not conditional:
        raise UserError(f"--class {request.classes}: this model is unconditional, leave it out")
    named = request.classes if request.classes is None or not request.classes.isdigit() else int(request.classes)
    labels = pipeline.resolve_labels([0 if named is None else named]) if conditional else None
    if request.picture is None:
        with pipeline.transformer.suspend_attention_modulation():
            clean = pipeline(
                labels, num_inference_steps=_STEPS, scheduler=_SCHEDULER, seeds=[request.seed], output_type="latent"
            ).images  # pyright: ignore[reportAttributeAccessIssue]
    else:
        original = read_original(request.picture, None, picture_shape(pipeline))
        clean = prepare(
            pipeline, original.picture, labels, [request.seed], 1.0, "constant", "all", None, "latent"
        ).latents  # fmt: skip
    if prediction_type_of(pipeline.scheduler) == "flow":
        signal, noise = 1 - timestep / steps, timestep / steps
    else:
        kept = float(pipeline.scheduler.alphas_cumprod[timestep])
        signal, noise = kept**0.5, (1 - kept) ** 0.5
    drawn = normals(request.seed, Purpose.SAMPLER_NOISE, 0, [0], tuple(clean.shape[1:])).to(clean.device)
    network = pipeline.transformer
    inputs: dict[str, Any] = {
        "hidden_states": (signal * clean + noise * drawn).to(network.device, network.dtype),
        "timestep": torch.tensor([timestep], device=network.device),
    }
    told: dict[str, Any] = {"timestep": timestep, "noise": noise, "seed": request.seed}
    told["picture"] = "sampled" if request.picture is None else request.picture.name
    if labels is not None:
        inputs["class_labels"] = torch.tensor(labels, device=network.device)
        told["label"] = labels[0]
    return inputs, told


def _heads(wanted: Sequence[int], counts: Sequence[int]) -> list[int]:
    for head in wanted:
        if not 0 <= head < min(counts):
            raise UserError(f"--heads {head}: the blocks shown have heads 0 to {min(counts) - 1}")
    return list(dict.fromkeys(wanted))
