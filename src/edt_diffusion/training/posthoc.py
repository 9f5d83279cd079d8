"""Snapshots of power-function averages, and averages of any width made of them after the training.

Karras et al. 2024 ("EDM2", arXiv 2312.02696, section 3.2 and appendix C): every snapshot is a weighted sum of the
parameters of all updates, whose weights over time are known. The weights of a wanted average are approximated by a
linear combination of those, and the same combination of the snapshots is the average.

    ema/step-00002000.safetensors    every power-function average after 2000 steps, float32
"""

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util.errors import UserError
from ..util.files import atomic_path, remove_temporaries
from .power import power_exponent, solve_profile, width_name

_NAME = re.compile(r"^step-(\d+)\.safetensors$")
# Below, a factor is rounding: an average that was stored comes back bit for bit, and no file is read in vain.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True)
class SnapshotFacts:
    """What a snapshot says of itself: its step, the updates made, and its widths."""

    step: int
    updates: int
    widths: tuple[float, ...]


@dataclass(frozen=True)
class Reconstruction:
    """An average made afterwards.

    Attributes:
        parameters: the trainable parameters, float32, by name.
        sigma_rel: its relative width.
        step: the training step it belongs to.
        fit_error: root of the integrated squared difference of its weights over time to the wanted ones, over the
            wanted ones' own; 0 is exact.
        snapshots: how many files were there to combine.
    """

    parameters: dict[str, Tensor]
    sigma_rel: float
    step: int
    fit_error: float
    snapshots: int


class SnapshotStore:
    """The `ema` folder of a run.

    Args:
        folder: made on the first save.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def steps(self) -> list[int]:
        """Steps that have a snapshot, ascending."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match.group(1)) for path in self.folder.iterdir() if (match := _NAME.match(path.name)))

    def path(self, step: int) -> Path:
        """File of the snapshot of `step`."""
        return self.folder / f"step-{step:08d}.safetensors"

    def save(self, step: int, updates: int, averages: Mapping[float, Mapping[str, Tensor]]) -> None:
        """Write a snapshot; whenever the process is killed, the file is whole or not there.

        Args:
            step: training steps made.
            updates: updates of the averages, as `EMASet.snapshot` returns them.
            averages: whole tensors by relative width and name, likewise; without a width nothing is written.

        Raises:
            OSError: the folder cannot be written to, or the disk is full.
        """
        if not averages:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{width_name(width)}.{name}": tensor.detach().to("cpu", torch.float32).contiguous()
            for width, parameters in averages.items()
            for name, tensor in parameters.items()
        }
        facts = {"updates": str(updates), "widths": json.dumps(list(averages))}
        with atomic_path(self.path(step)) as temporary:
            save_file(tensors, temporary, metadata=facts)

    def drop_after(self, step: int) -> None:
        """Remove snapshots of a future that the run has left, and what a kill left of an unfinished one."""
        remove_temporaries(self.folder)
        for later in self.steps():
            if later > step:
                self.path(later).unlink()

    def snapshots(self, step: int | None = None) -> list[SnapshotFacts]:
        """What the snapshots up to that of `step` (default: the newest) say of themselves, ascending.

        Raises:
            UserError: if there is none, none of that step, or a damaged one.
        """
        steps = self.steps()
        if not steps:
            raise UserError(f"{self.folder} holds no snapshots of averages: train with ema.power=[0.05,0.10]")
        last = _known_step(steps, step)
        return [self.facts(other) for other in steps if other <= last]

    def facts(self, step: int) -> SnapshotFacts:
        """Read what the snapshot of `step` says of itself.

        Raises:
            UserError: if the file is damaged.
        """
        path = self.path(step)
        try:
            with safe_open(path, framework="pt") as file:
                told = file.metadata()
            return SnapshotFacts(step, int(told["updates"]), tuple(float(w) for w in json.loads(told["widths"])))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no whole snapshot ({error}): delete it to do without") from None


def reconstruct(folder: Path, sigma_rel: float, step: int | None = None) -> Reconstruction:
    """Make the average of any relative width from the snapshots in a folder.

    One tensor at a time is in memory beside the result; sums are float64.

    Args:
        folder: a run's `ema` folder.
        sigma_rel: wanted relative width.
        step: the step it shall belong to, one that has a snapshot; by default the newest.

    Raises:
        UserError: if there are no snapshots, of one width only (and it is not that very average), none of that step,
            or a width out of range.
    """
    power_exponent(sigma_rel)
    store = SnapshotStore(folder)
    snapshots = store.snapshots(step)
    widths = known_widths(snapshots)
    if len(widths) < 2 and sigma_rel not in widths:
        raise UserError(
            f"{folder} holds averages of one width ({widths[0]:g}) only, which give no other: train with two, such as "
            "ema.power=[0.05,0.10]"
        )
    factors, error = fit(snapshots, sigma_rel)
    return Reconstruction(_combine(store, factors), sigma_rel, snapshots[-1].step, error, len(snapshots))


def known_widths(snapshots: Sequence[SnapshotFacts]) -> list[float]:
    """The relative widths of which there are snapshots, ascending."""
    return sorted({width for snapshot in snapshots for width in snapshot.widths})


def fit(snapshots: Sequence[SnapshotFacts], sigma_rel: float) -> tuple[dict[tuple[int, float], float], float]:
    """How an average at the last of the snapshots is combined of them.

    Returns:
        Factors by (step, width), without those that are nothing, and the error; see `Reconstruction`.
    """
    rows = [(snapshot, width) for snapshot in snapshots for width in snapshot.widths]
    factors, error = solve_profile(
        np.array([power_exponent(width) for _, width in rows]),
        np.array([float(snapshot.updates) for snapshot, _ in rows]),
        power_exponent(sigma_rel),
        float(snapshots[-1].updates),
    )
    found = {(snapshot.step, width): float(f) for (snapshot, width), f in zip(rows, factors, strict=True)}
    return {key: factor for key, factor in found.items() if abs(factor) > _NEGLIGIBLE}, error


def _known_step(steps: list[int], step: int | None) -> int:
    if step is None or step in steps:
        return steps[-1] if step is None else step
    if step > steps[-1]:
        raise UserError(f"step {step} is not reached: the newest snapshot is of step {steps[-1]}")
    near = min(steps, key=lambda other: abs(other - step))
    raise UserError(f"step {step} has no snapshot: the nearest one is of step {near}")


def _combine(store: SnapshotStore, factors: Mapping[tuple[int, float], float]) -> dict[str, Tensor]:
    """Sum of the averages of (step, width) times their factors."""
    (first, width), *_ = factors
    with ExitStack() as stack:
        files = {step: stack.enter_context(safe_open(store.path(step), framework="pt")) for step, _ in factors}
        prefix = f"{width_name(width)}."
        names = [key.removeprefix(prefix) for key in files[first].keys() if key.startswith(prefix)]  # noqa: SIM118
        out = {}
        for name in names:
            total: Tensor | float = 0.0
            for (step, width), factor in factors.items():
                try:
                    total = files[step].get_tensor(f"{width_name(width)}.{name}").double().mul_(factor).add_(total)
                except (SafetensorError, RuntimeError) as error:
                    raise UserError(
                        f"{store.path(step)} does not fit the other snapshots ({error}): delete it to do without"
                    ) from None
            assert isinstance(total, Tensor)
            out[name] = total.float()
        return out
