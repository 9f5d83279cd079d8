"""The course of a search: successive halving of single blocks, then of combinations of the best.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): all candidates are measured on few pictures, the best
share of them on more, and so on. Here the seeds and classes of the pictures are the same for all, and a rung's pictures
are the first of the next one's, so that a candidate that goes on needs the new ones only.

Nothing in this file knows what is measured; less is better throughout.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...nn.modulation import AttentionModulation
from ...util.errors import UserError
from .candidates import extended

# (setting, or None for off; number of pictures) -> value, less being better.
Measure = Callable[[AttentionModulation | None, int], float]


@dataclass(frozen=True)
class Plan:
    """How a search proceeds.

    Attributes:
        first: pictures of each candidate in the first rung.
        growth: how many times as many the next rung has.
        keep: one candidate in so many goes on.
        finalists: how many end a round.
        max_blocks: of a setting; each round beyond the first adds one block to the finalists.
        partners: how many of the best single blocks may be added.
    """

    first: int = 200
    growth: int = 2
    keep: int = 3
    finalists: int = 3
    max_blocks: int = 2
    partners: int = 6

    def sizes(self, candidates: int) -> list[int]:
        """Pictures of each rung of a search that begins with so many candidates."""
        cuts, alive = 1, candidates
        while (alive := math.ceil(alive / self.keep)) > self.finalists:
            cuts += 1
        return [self.first * self.growth**rung for rung in range(cuts + 1)]

    def ladder(self, candidates: int, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """(pictures, candidates) of each rung of a round; once only finalists are left, the last rung comes next."""
        out, rung, alive = [(sizes[0], candidates)], 0, candidates
        while rung < len(sizes) - 1:
            alive = min(alive, max(math.ceil(alive / self.keep), self.finalists))
            rung = len(sizes) - 1 if alive <= self.finalists else rung + 1
            out.append((sizes[rung], alive))
        return out

    def most_pictures(self, candidates: int) -> int:
        """The most pictures that the search makes, off included, the confirmation not."""
        sizes = self.sizes(candidates)
        total = sizes[-1] + _new_pictures(self.ladder(candidates, sizes))
        children = self.finalists * self.partners
        later = self.ladder(children + self.finalists, sizes)
        of_a_round = _new_pictures(later) - self.finalists * sizes[0]  # the parents have theirs
        return total + (self.max_blocks - 1) * of_a_round

    def within(self, budget: int, candidates: int, step: int) -> "Plan":
        """This plan with as many pictures in the first rung, in multiples of `step`, as a budget allows.

        Raises:
            UserError: it does not even allow `step`.
        """
        for first in range(self.first, 0, -step):
            plan = Plan(first, self.growth, self.keep, self.finalists, self.max_blocks, self.partners)
            if plan.most_pictures(candidates) <= budget:
                return plan
        least = Plan(step, self.growth, self.keep, self.finalists, self.max_blocks, self.partners)
        raise UserError(
            f"--budget-images {budget}: {candidates} candidates may take {least.most_pictures(candidates)} with "
            f"{step} in the first rung: give so many, or fewer --blocks, --radii or --formulas, or a "
            "smaller --batch-size"
        )


def _new_pictures(ladder: Sequence[tuple[int, int]]) -> int:
    before, total = 0, 0
    for pictures, alive in ladder:
        total += (pictures - before) * alive
        before = pictures
    return total


@dataclass(frozen=True)
class Rung:
    """One comparison of all that were left.

    Attributes:
        round: 1 for the first.
        pictures: of each candidate.
        off: the value without modulation.
        values: those of the candidates, the best first.
        kept: those that went on, or at the end of a round its finalists.
    """

    round: int
    pictures: int
    off: float
    values: dict[AttentionModulation, float]
    kept: tuple[AttentionModulation, ...]


@dataclass
class Course:
    """What a search found on the way.

    Attributes:
        rungs: in their order.
        best: the setting with the least value in the last rung, or None where off has it.
    """

    rungs: list[Rung] = field(default_factory=list)
    best: AttentionModulation | None = None


def run(pool: Sequence[AttentionModulation], measure: Measure, plan: Plan) -> Course:
    """Search.

    A block may be added that was better than off by itself in the first rung; rounds end when the best setting of one
    has no block more than those it began with, or when none is better than off.

    Args:
        pool: candidates of the first round.
        measure: called with rising numbers of pictures for each candidate.
        plan: see `Plan`.
    """
    course = Course()
    sizes = plan.sizes(len(pool))
    _round(course, pool, measure, plan, sizes)
    partners = _partners(course.rungs[0], plan.partners)
    for _ in range(1, plan.max_blocks):
        last = course.rungs[-1]
        parents = [setting for setting in last.kept if last.values[setting] < last.off]
        children = [
            extended(parent, block)
            for parent in parents
            for block in partners
            if block not in parent.blocks and len(parent.blocks) < plan.max_blocks
        ]
        children = [child for child in dict.fromkeys(children) if child not in pool]
        if not children:
            break
        _round(course, [*parents, *children], measure, plan, sizes)
        if course.best in parents or course.best is None:
            break
    return course


def _round(
    course: Course, pool: Sequence[AttentionModulation], measure: Measure, plan: Plan, sizes: Sequence[int]
) -> None:
    number = course.rungs[-1].round + 1 if course.rungs else 1
    alive = list(pool)
    ladder = plan.ladder(len(pool), sizes)
    for rung, (pictures, _) in enumerate(ladder):
        off = measure(None, pictures)
        found = {setting: measure(setting, pictures) for setting in alive}
        alive = sorted(alive, key=lambda setting: found[setting])
        going = ladder[rung + 1][1] if rung + 1 < len(ladder) else plan.finalists
        values = {setting: found[setting] for setting in alive}
        alive = alive[:going]
        course.rungs.append(Rung(number, pictures, off, values, tuple(alive)))
    last = course.rungs[-1]
    course.best = alive[0] if last.values[alive[0]] < last.off else None


def _partners(first: Rung, number: int) -> list[int]:
    """The single blocks that were better than off, the best first."""
    better = [setting for setting, value in first.values.items() if len(setting.blocks) == 1 and value < first.off]
    return list(dict.fromkeys(setting.blocks[0] for setting in better))[:number]
