"""Where the parts of a matrix lie in its folder, and whether the folder is of the matrix that is asked for.

matrix.json      what was asked for
base.yaml        the base configuration as it was then
runs/            a run folder each: <arm>-seed<k>, with `spent.json` when it is done
points/          <run>-<share>: averaged weights as model folders, with `point.json`
evaluations/     <run>-<share>: features, samples and results of `edt evaluate`
scores/          <run>-<share>-<variant>.json: one line of the outcome each
ceiling.json     the score of held-out real pictures
logs/            what the processes said
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...config import presets
from ...util.errors import UserError
from ...util.files import atomic_write_json, atomic_write_text, make_folder
from .plan import Arm, Matrix, Variant

# What may grow in a matrix that was begun; all else must stay.
_GROWING = ("arms", "variants", "seeds")
# What says how the work is done and decides no number.
_FREE = ("save_every", "keep")
# Exit code of a piece of work that was asked to stop.
STOPPED = 75


@dataclass(frozen=True)
class Run:
    """One training of a matrix."""

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @classmethod
    def parse(cls, name: str) -> "Run":
        """What `str` gave."""
        arm, _, seed = name.rpartition("-seed")
        return cls(arm, int(seed))


@dataclass(frozen=True)
class MatrixFolder:
    """Names within the folder of a matrix."""

    path: Path

    def run(self, run: Run) -> Path:
        """A run folder."""
        return self.path / "runs" / str(run)

    def spent(self, run: Run) -> Path:
        """The record of what a run that is done has taken."""
        return self.run(run) / "spent.json"

    def point(self, run: Run, point: float) -> Path:
        """The averaged weights of a point."""
        return self.path / "points" / f"{run}-{point:g}"

    def evaluation(self, run: Run, point: float) -> Path:
        """Features, samples and results of a point."""
        return self.path / "evaluations" / f"{run}-{point:g}"

    def score(self, run: Run, point: float, variant: Variant) -> Path:
        """One cell."""
        return self.path / "scores" / f"{run}-{point:g}-{variant.name}.json"

    @property
    def base(self) -> Path:
        """The base configuration as it was when the matrix was begun."""
        return self.path / "base.yaml"

    @property
    def ceiling(self) -> Path:
        """The score of held-out real pictures."""
        return self.path / "ceiling.json"

    @property
    def prepared(self) -> Path:
        """Made when real pictures and extractor have been looked at."""
        return self.path / "logs" / "prepared.json"

    def log(self, what: str) -> Path:
        """What a process said."""
        return self.path / "logs" / f"{what}.txt"

    def missing_scores(self, matrix: Matrix, run: Run) -> list[tuple[float, Variant]]:
        """Cells of a run that are not there."""
        if not matrix.images:
            return []
        cells = [(point, variant) for point in matrix.points for variant in matrix.variants]
        return [cell for cell in cells if not self.score(run, *cell).is_file()]

    def load(self) -> Matrix:
        """The matrix that is there.

        Raises:
            UserError: there is none, or its file is damaged.
        """
        path = self.path / "matrix.json"
        try:
            return Matrix.of_tree(json.loads(path.read_text("utf-8"))["matrix"])
        except FileNotFoundError:
            raise UserError(f"{self.path} holds no matrix: expected a folder with a matrix.json") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}): copy it anew, or choose another folder") from None

    def begin(self, matrix: Matrix) -> None:
        """Make the folder, or make sure that it is of this matrix, to which arms, variants and seeds may be added.

        Raises:
            UserError: it holds another matrix, or an arm's settings do not work.
        """
        make_folder(self.path)
        text = presets().get(matrix.base) or _text(matrix.base)
        asked = json.loads(json.dumps(matrix.as_tree()))
        if (self.path / "matrix.json").is_file():
            there = self.load()
            self._refuse_changes(json.loads(json.dumps(there.as_tree())), asked, matrix, text)
            asked = {**asked, **_joined(there, matrix)}
        elif any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no matrix: choose another folder")
        else:
            atomic_write_text(self.base, text)
        for arm in matrix.arms:
            for seed in matrix.seeds:
                matrix.config(arm, seed, self.base)
        atomic_write_json(self.path / "matrix.json", {"version": 1, "matrix": asked})
        for name in ("runs", "points", "evaluations", "scores", "logs"):
            make_folder(self.path / name)

    def _refuse_changes(self, there: dict[str, Any], asked: dict[str, Any], matrix: Matrix, text: str) -> None:
        changed = [
            f"{name}: {there[name]} -> {asked[name]}"
            for name in asked
            if name not in (*_GROWING, *_FREE) and there[name] != asked[name]
        ]
        if matrix.base not in presets() and text != self.base.read_text("utf-8"):
            changed.append(f"the content of {matrix.base}")
        for what, told in (("arms", "settings"), ("variants", "sampling")):
            before = {entry["name"]: entry[told] for entry in there[what]}
            changed += [
                f"{told} of {entry['name']}: {before[entry['name']]} -> {entry[told]}"
                for entry in asked[what]
                if before.get(entry["name"], entry[told]) != entry[told]
            ]
        if changed:
            hint = ""
            if there["budget"] != asked["budget"]:
                hint = " (a longer budget has another learning rate at every step: its runs begin anew)"
            raise UserError(
                f"{self.path} holds another matrix ({'; '.join(changed[:3])}){hint}: choose another folder, or ask "
                "for the same; arms, variants and seeds may be added"
            )


def _text(base: str) -> str:
    path = Path(base)
    if not path.is_file():
        raise UserError(f"base {base!r}: expected a YAML file, or a preset ({', '.join(sorted(presets()))})")
    return path.read_text("utf-8")


def _joined(there: Matrix, asked: Matrix) -> dict[str, Any]:
    """Arms, variants and seeds of both, the later ones behind."""

    def both(old: tuple[Any, ...], new: tuple[Any, ...]) -> list[dict[str, Any]]:
        entries: dict[str, Arm | Variant] = {entry.name: entry for entry in (*old, *new)}
        return [dict(vars(entry)) for entry in entries.values()]

    return {
        "arms": both(there.arms, asked.arms),
        "variants": both(there.variants, asked.variants),
        "seeds": list(dict.fromkeys([*there.seeds, *asked.seeds])),
    }
