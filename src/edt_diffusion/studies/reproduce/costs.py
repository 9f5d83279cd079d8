"""Tables 5, 6 and 7: sizes and costs from first principles. Nothing is trained.

FLOPs are counted as the paper counts them: multiply-adds of one picture, matrix products and convolutions only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...models import BACKBONES
from ...models.edt import SIZES
from ...models.flops import transformer_block
from ...models.masking import INPUT_MASKS
from ...models.summary import describe
from ...util.errors import UserError
from ...util.lookup import lookup
from .page import Cell, Column, Grid, Page
from .published import (
    BATCH,
    FID,
    GFLOPS,
    GUIDED_FID,
    IMAGENET_PICTURES,
    PARAMETERS,
    Published,
    sentence,
)
from .request import Request

# A layout of 28 blocks whose parameters and multiply-adds are those published for XL, which the released layout's are
# not: 12 blocks in the two outer stages together, 12 in the next two, 4 in the middle.
COUNTED_XL = (5, 5, 4, 7, 7)
_FACTOR = 8  # of the autoencoder
_GIGA, _MEGA = 1e9, 1e6
# A backward pass costs two forward passes; a multiply-add is two operations.
_PASSES_OF_A_STEP, _OPERATIONS = 3, 2


def latent_side(image_size: int | None) -> int:
    """Side of the latents of square pictures, which are 256 pixels a side unless told.

    Raises:
        UserError: a side that patches of 2 and two down-samplings do not divide.
    """
    image_size = image_size or 256
    if image_size < 64 or image_size % 64:
        raise UserError(f"--image-size {image_size}: expected a multiple of 64, such as 256 or 512")
    return image_size // _FACTOR


def on_meta(name: str, size: str, **arguments: Any) -> Any:
    """A network of a published size without storage."""
    with torch.device("meta"):
        return lookup(BACKBONES, name, "model").from_size(size, **arguments)


def table5(request: Request) -> Page:
    """Model details of EDT-S, B and XL."""
    side = latent_side(request.image_size)
    at_256 = side * _FACTOR == 256
    layouts = [
        *((f"EDT-{size}", size, tuple(SIZES[size]["depths"])) for size in SIZES),
        ("EDT-XL, layout that the published counts belong to", "XL", COUNTED_XL),
    ]
    rows, counted = [], {}
    for title, size, depths in layouts:
        facts = describe(on_meta("EDT", size, depths=depths, sample_size=side))
        stages = facts["stages"]
        counted[title] = facts
        rows.append({
            "model": title,
            "stages": len(stages),
            "depths": _list(stage["blocks"] for stage in stages),
            "dims": _list(stage["width"] for stage in stages),
            "heads": _list(stage["heads"] for stage in stages),
            "grids": _list(stage["grid"][0] for stage in stages),
            "parameters": facts["parameters"]["trainable"] / _MEGA,
            "parameters_paper": PARAMETERS[size].value if size in PARAMETERS else None,
            "gflops": facts["multiply_adds"] / _GIGA,
            "gflops_paper": GFLOPS[size].value if at_256 else None,
        })  # fmt: skip
    columns = [
        Column("model", "model"),
        Column("stages", "stages", "{:d}"),
        Column("depths", "blocks"),
        Column("dims", "width"),
        Column("heads", "heads"),
        Column("grids", "side of the tokens"),
        Column("parameters", "parameters, M", "{:.2f}"),
        Column("parameters_paper", "parameters, M (paper)", "{:.2f}", published=True),
        Column("gflops", "GFLOPs", "{:.2f}"),
        Column("gflops_paper", "GFLOPs (paper)", "{:.2f}", published=True),
    ]
    released, other = counted["EDT-XL"], counted[layouts[-1][0]]

    def gap(size: str) -> float:
        title = layouts[-1][0] if size == "XL" else f"EDT-{size}"
        return abs(counted[title]["multiply_adds"] / _GIGA / GFLOPS[size].value - 1)

    said = [
        f"Counted here to the last product: S and B come out {gap('S'):.1%} and {gap('B'):.1%} from the published "
        f"GFLOPs, the layout that XL's belong to {gap('XL'):.1%}."
    ]
    pixels = request.image_size or 256
    return Page(
        "table5",
        "model details of EDT-S, B and XL",
        [Grid(columns, rows, f"{pixels}x{pixels} pixels, latents of {side}x{side}, 1000 classes")],
        differs=[] if at_256 else ["Published figures are for 256 pixels."],
        notes=[
            "Parameters are those that are trained; the sine-cosine tables of positions come on top "
            f"(EDT-S: {counted['EDT-S']['parameters']['total'] / _MEGA:.2f} M with them).",
            "GFLOPs are multiply-adds of one picture, as in the paper.",
            *(said if at_256 else []),
            f"XL: the layout of the released code (blocks {_list(SIZES['XL']['depths'])}) has "
            f"{released['parameters']['trainable'] / _MEGA:.2f} M parameters and "
            f"{released['multiply_adds'] / _GIGA:.2f} GFLOPs. The published counts belong to any 28 "
            "blocks with 12 in the two outermost stages together, 12 in the next two and 4 in the middle, "
            f"such as {_list(COUNTED_XL)} "
            f"({other['parameters']['trainable'] / _MEGA:.2f} M, {other['multiply_adds'] / _GIGA:.2f} GFLOPs); the "
            "released layout has 13, 11 and 4.",
        ],
        sources=[sentence("GFLOPs", *GFLOPS.values()), sentence("Parameters of XL", *PARAMETERS.values())],
        more={"models": counted},
    )  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """An operation of a DiT block of N tokens and width C.

    Attributes:
        name: what it is.
        products: formula of its multiply-adds, in words.
        weights: formula of its parameters, in words.
        count: (N, C) -> multiply-adds.
        parameters: C -> parameters.
    """

    name: str
    products: str
    weights: str
    count: Callable[[int, int], int]
    parameters: Callable[[int], int]


OPERATIONS = (
    Operation("adaLN", "6 C²", "6 C² + 6 C", lambda n, c: 6 * c * c, lambda c: 6 * c * c + 6 * c),
    Operation("queries, keys, values", "3 N C²", "3 C² + 3 C", lambda n, c: 3 * n * c * c, lambda c: 3 * c * c + 3 * c),
    Operation("scores, queries times keys", "N² C", "0", lambda n, c: n * n * c, lambda c: 0),
    Operation("attention times values", "N² C", "0", lambda n, c: n * n * c, lambda c: 0),
    Operation("output projection", "N C²", "C² + C", lambda n, c: n * c * c, lambda c: c * c + c),
    Operation("MLP", "8 N C²", "8 C² + 5 C", lambda n, c: 8 * n * c * c, lambda c: 8 * c * c + 5 * c),
)

# Widths of the DiT sizes (arXiv 2212.09748).
DIT_WIDTHS = {"S": 384, "B": 768, "L": 1024, "XL": 1152}


def table6(request: Request) -> Page:
    """FLOPs and parameters of the operations of a DiT block."""
    tokens = (latent_side(request.image_size) // 2) ** 2
    widths = DIT_WIDTHS if request.size is None else {request.size: lookup(DIT_WIDTHS, request.size, "DiT size")}
    rows: list[dict[str, Cell]] = []
    for operation in OPERATIONS:
        row: dict[str, Cell] = {
            "operation": operation.name, "products": operation.products, "weights": operation.weights,
        }  # fmt: skip
        for size, width in widths.items():
            row[f"mflops_{size}"] = operation.count(tokens, width) / _MEGA
            row[f"parameters_{size}"] = operation.parameters(width) / _MEGA
        rows.append(row)
    total: dict[str, Cell] = {"operation": "block", "products": "6 C² + 12 N C² + 2 N² C", "weights": "18 C² + 15 C"}
    for size, width in widths.items():
        total[f"mflops_{size}"] = sum(operation.count(tokens, width) for operation in OPERATIONS) / _MEGA
        total[f"parameters_{size}"] = sum(operation.parameters(width) for operation in OPERATIONS) / _MEGA
    rows.append(total)
    columns = [Column("operation", "operation"), Column("products", "multiply-adds"), Column("weights", "parameters")]
    for size, width in widths.items():
        columns.append(Column(f"mflops_{size}", f"MFLOPs, {size} (C = {width})", "{:.3f}"))
        columns.append(Column(f"parameters_{size}", f"parameters, M, {size}", "{:.3f}"))
    return Page(
        "table6",
        "FLOPs and parameters of the operations of a DiT block",
        [Grid(columns, rows, f"N = {tokens} tokens, a block of width C whose condition has width C, MLP of ratio 4")],
        notes=[
            "FLOPs are multiply-adds of one picture, as in the paper; softmax, norms, biases and activations count as "
            "nothing.",
            "Attention proper (scores and their products with the values) costs 2 N² C against 12 N C² of the linear "
            "layers: it outweighs them only where N > 6 C. With fewer tokens, what saves is to compute wide layers on "
            "fewer tokens, which is what EDT's stages do.",
            "The figures of the paper's table are not known to this project.",
        ],
    )


# Rows of table 7: backbone, size, thousands of iterations.
TRAININGS = (
    ("EDT", "S", 400), ("EDT", "B", 400), ("EDT", "B", 1000), ("EDT", "XL", 400), ("EDT", "XL", 2000),
    ("MDTv2", "S", 400), ("MDTv2", "B", 400), ("MDTv2", "XL", 400),
    ("DiT", "S", 400), ("DiT", "B", 400), ("DiT", "XL", 400), ("DiT", "XL", 7000),
)  # fmt: skip
# Forward passes of a training step: the full and the masked input, or the full one.
PASSES = {"EDT": 2, "MDTv2": 2, "DiT": 1}


def training_operations(step_multiply_adds: float, pictures: float) -> float:
    """Operations of a training: two a multiply-add, a backward pass for two forward ones."""
    return _OPERATIONS * _PASSES_OF_A_STEP * step_multiply_adds * pictures


def step_multiply_adds(name: str, network: Any) -> float:
    """Multiply-adds of the forward passes of a training step for one picture.

    EDT's masked pass computes every token. MDTv2's leaves tokens out of its encoder, at the mean share here, and has a
    block more, which guesses them.
    """
    full = sum(network.multiply_adds().values())
    if name != "MDTv2":
        return PASSES[name] * full
    config, tokens = network.config, network.grids[0][0] * network.grids[0][1]
    width, encoder = config.hidden_size, config.depth - config.decode_layers
    kept = tokens * (1 - sum(INPUT_MASKS) / 2)
    whole, fusion = (sum(transformer_block(tokens, width, width, config.mlp_ratio).values()), 2 * width * width)
    # adaLN does not depend on the number of tokens.
    linear, attention = 4 + 2 * config.mlp_ratio, 2
    partial = 6 * width**2 + linear * kept * width**2 + attention * kept**2 * width
    saved = encoder * (whole - partial) + encoder // 2 * fusion * (tokens - kept)
    return 2 * full - saved + whole


def table7(request: Request) -> Page:
    """Cost of training EDT, MDTv2 and DiT."""
    side = latent_side(request.image_size)
    wanted = [row for row in TRAININGS if request.size in (None, row[1])]
    if not wanted:
        raise UserError(f"--size {request.size}: table 7 has S, B and XL")
    rates = _measured_rates(request, side) if request.measure else {}
    rows: list[Mapping[str, Cell]] = []
    for name, size, thousands in wanted:
        network = on_meta(name, size, sample_size=side)
        count, step = sum(network.multiply_adds().values()), step_multiply_adds(name, network)
        pictures = thousands * 1000 * BATCH
        fid = FID.get((size, thousands)) if name == "EDT" and side == 32 else None
        guided = GUIDED_FID.get((size, thousands)) if name == "EDT" and side == 32 else None
        rate = rates.get((name, size))
        rows.append({
            "model": f"{name}-{size}",
            "iterations": thousands,
            "pictures": pictures / _MEGA,
            "epochs": pictures / IMAGENET_PICTURES,
            "gflops": count / _GIGA,
            "gflops_paper": GFLOPS[size].value if name == "EDT" and side == 32 else None,
            "passes": PASSES[name],
            "exaflops": training_operations(step, pictures) / 1e18,
            "rate": rate,
            "days": None if rate is None else pictures / rate / 86400,
            "fid": f"{guided.value:.2f}, guided" if guided else None if fid is None else fid.value,
        })  # fmt: skip
    columns = [
        Column("model", "model"),
        Column("iterations", "iterations, thousands", "{:d}"),
        Column("pictures", "pictures seen, M", "{:.1f}"),
        Column("epochs", "epochs", "{:.1f}"),
        Column("gflops", "GFLOPs", "{:.2f}"),
        Column("gflops_paper", "GFLOPs (paper)", "{:.2f}", published=True),
        Column("passes", "passes a step", "{:d}"),
        Column("exaflops", "training, 10^18 operations", "{:.2f}"),
        Column("rate", "pictures a second, here", "{:.3g}"),
        Column("days", "days on this device", "{:.3g}"),
        Column("fid", "FID (paper)", "{:.2f}", published=True),
    ]
    measured = (
        "Days are what this device would take at the pictures a second measured here; the paper's GPU days are not "
        "known to this project."
        if request.measure
        else "Days are left empty: --measure times training steps on this machine. The paper's GPU days are not known "
        "to this project."
    )
    return Page(
        "table7",
        "cost of training EDT, MDTv2 and DiT",
        [Grid(columns, rows, f"ImageNet at {side * _FACTOR} pixels, batches of {BATCH}")],
        differs=["Iterations of MDTv2 and DiT are ours, chosen for the comparison; those of EDT are the authors'."],
        notes=[
            f"Pictures seen are iterations times {BATCH}; an epoch is {IMAGENET_PICTURES:,} pictures.",
            "Operations of a training are 2 a multiply-add, times 3 for forward and backward, times the passes of a "
            "step: 2 for EDT and MDTv2 (full and masked input), 1 for DiT.",
            "EDT's masked pass computes every token. MDTv2's is counted at the mean share of tokens left out of its "
            f"encoder ({sum(INPUT_MASKS) / 2:.0%}, that of MDTv2-S), with the block that guesses them.",
            measured,
        ],
        sources=[sentence("GFLOPs", *GFLOPS.values()), sentence("FID", *FID.values(), *GUIDED_FID.values())],
    )  # fmt: skip


def _measured_rates(request: Request, side: int) -> dict[tuple[str, str], float]:
    """Pictures a second in training, of one size."""
    from .speed import published_rates

    return published_rates(request.size or "S", side, request.device)


def _list(values: Any) -> str:
    return ", ".join(str(value) for value in values)


__all__ = ["COUNTED_XL", "OPERATIONS", "Published", "table5", "table6", "table7", "training_operations"]
