"""What `edt reproduce` was asked for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """Options of the command; each table takes those that mean something to it.

    Attributes:
        table: a name of `tables.TABLES`.
        out: folder of the page and of everything that is trained for it.
        command: how the command was called, for the page.
        data: pictures or a latent store, as `data.path` of a configuration.
        budget: of each training, such as "60s", "10m-cpu" or "500steps".
        seeds: trainings of each arm.
        size: "S", "B" or "XL" of the paper, or "small" or "tiny"; None chooses.
        image_size: side of the pictures in pixels; None chooses.
        config: preset or YAML file instead of the chosen base.
        overrides: settings to change, as "key.path=value".
        images: sampled for each score; None chooses by the budget.
        extractor: as `edt evaluate --extractor`; None chooses.
        reference: real pictures for the scores; None takes those that are trained on.
        processes: trainings at once.
        threads: of each training; None shares the cores.
        amm_blocks: where attention modulation acts in EDT, such as "7+10"; None chooses.
        measure: time training steps on this machine for table 7.
        device: for what is timed here; None is the GPU if there is one.
        quiet: no progress.
    """

    table: str
    out: Path
    command: str = "edt reproduce"
    data: str | None = None
    budget: str | None = None
    seeds: int = 3
    size: str | None = None
    image_size: int | None = None
    config: str | None = None
    overrides: Sequence[str] = ()
    images: int | None = None
    extractor: str | None = None
    reference: str | None = None
    processes: int = 1
    threads: int | None = None
    amm_blocks: str | None = None
    measure: bool = False
    device: str | None = None
    quiet: bool = False
