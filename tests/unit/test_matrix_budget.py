"""Budgets in words, clocks that charge training only, rates by the share of time, and Student's t."""

import math

import pytest
from scipy import stats

from edt_diffusion.studies.matrix.budget import Budget
from edt_diffusion.studies.matrix.student import t_interval, t_probability, t_quantile
from edt_diffusion.training.config import OptimizerConfig
from edt_diffusion.training.pace import Pace
from edt_diffusion.util.errors import UserError


@pytest.mark.parametrize(
    ("text", "kind", "amount"),
    [
        ("600s", "wall", 600.0),
        ("10m", "wall", 600.0),
        ("2h", "wall", 7200.0),
        ("1d", "wall", 86400.0),
        ("1h30m", "wall", 5400.0),
        ("10m-cpu", "cpu", 600.0),
        (" 90s CPU ", "cpu", 90.0),
        ("2000steps", "steps", 2000),
        ("1 step", "steps", 1),
        ("5_000_000images", "images", 5_000_000),
    ],
)
def test_what_users_write(text, kind, amount):
    budget = Budget.parse(text)
    assert (budget.kind, budget.amount) == (kind, amount)
    assert Budget.parse(str(budget)) == budget  # as matrix.json keeps it


@pytest.mark.parametrize("text", ["", "soon", "0s", "0steps", "10m-gpu", "-5s", "10epochs", "cpu", "1.5steps"])
def test_what_is_no_budget_is_refused_with_what_is(text):
    with pytest.raises(UserError, match="10m-cpu, or 2000steps"):
        Budget.parse(text)


def test_steps_of_each_kind():
    assert Budget.parse("2000steps").steps(64) == 2000
    assert Budget.parse("1000images").steps(64) == 16  # 15 steps would be 960 pictures
    assert Budget.parse("1000images").allowed(64) == 16
    assert Budget.parse("1000images").unit == "steps"
    assert Budget.parse("1m").steps(64) >= 10**9
    assert Budget.parse("1m").allowed(64) == 60


def test_a_schedule_in_steps_does_not_go_with_seconds():
    with pytest.raises(UserError, match=r"optimizer\.decay_steps=100"):
        Budget.parse("1m").check(OptimizerConfig(decay_steps=100))
    Budget.parse("1m").check(OptimizerConfig(decay_steps=None))
    Budget.parse("10steps").check(OptimizerConfig(decay_steps=100))


class Clocks:
    """Two clocks that move when they are told to."""

    def __init__(self):
        self.wall = self.cpu = 0.0

    def pass_by(self, wall, cpu):
        self.wall += wall
        self.cpu += cpu

    def pace(self, unit, amount, **more):
        return Pace(unit, amount, clocks={"wall": lambda: self.wall, "cpu": lambda: self.cpu}, **more)


def test_only_what_is_between_begin_and_end_and_outside_pauses_is_charged():
    clocks = Clocks()
    pace = clocks.pace("cpu", 10.0)
    clocks.pass_by(100, 100)  # opening the data
    pace.begin()
    clocks.pass_by(3, 2)
    with pace.pause(), pace.pause():
        clocks.pass_by(50, 40)
    clocks.pass_by(2, 1)
    pace.made(1)
    assert pace.seconds() == {"wall": 5.0, "cpu": 3.0}
    assert pace.share == 0.3
    assert not pace.done
    clocks.pass_by(8, 7)
    assert not pace.done  # the clock is looked at after steps
    pace.made(2)
    assert pace.done
    pace.end()
    clocks.pass_by(9, 9)
    with pace.pause():
        clocks.pass_by(9, 9)
    assert pace.seconds() == {"wall": 13.0, "cpu": 10.0}


def test_points_come_once_and_a_late_step_reaches_several(tmp_path):
    clocks = Clocks()
    pace = clocks.pace("wall", 8.0, points={0.25: tmp_path / "a", 0.5: tmp_path / "b", 1.0: tmp_path / "c"})
    pace.begin()
    clocks.pass_by(1.9, 0)
    pace.made(1)
    assert pace.reached() == []
    clocks.pass_by(2.2, 1)
    pace.made(2)
    assert pace.reached() == [0.25, 0.5]
    told = pace.kept(0.25)
    assert told == {
        "point": 0.25, "share": 4.1 / 8, "step": 2, "charged_wall_seconds": pytest.approx(4.1),
        "charged_cpu_seconds": 1.0,
    }  # fmt: skip
    assert pace.reached() == [0.5]
    pace.kept(0.5)
    assert pace.reached() == []
    assert clocks.pace("steps", 10, points={0.5: tmp_path}).reached() == []


def test_what_a_checkpoint_kept_is_gone_on_with_and_nothing_after_it_is_charged(tmp_path):
    clocks = Clocks()
    points = {0.5: tmp_path / "a", 1.0: tmp_path / "b"}
    pace = clocks.pace("wall", 8.0, points=points, save_every=3.0)
    pace.begin()
    clocks.pass_by(4.5, 4)
    pace.made(9)
    pace.kept(0.5)
    assert pace.save_due()
    state = pace.state()
    assert not pace.save_due()
    clocks.pass_by(3.25, 1)  # is lost with the process
    assert pace.save_due()
    other = clocks.pace("wall", 8.0, points=points)
    other.load(state)
    assert other.seconds() == {"wall": 4.5, "cpu": 4.0}
    assert (other.step, other.share, other.reached()) == (9, 4.5 / 8, [])
    other.begin()
    clocks.pass_by(3.5, 1)
    other.made(10)
    assert other.done
    assert other.seconds()["wall"] == 8.0
    for wrong in (clocks.pace("wall", 9.0), clocks.pace("cpu", 8.0)):
        with pytest.raises(UserError, match="begun with 8 seconds of wall time"):
            wrong.load(state)
    with pytest.raises(UserError, match="begun with no budget"):
        pace.load(None)


def test_a_run_that_goes_back_keeps_its_points_anew_and_gets_no_time_back(tmp_path):
    clocks = Clocks()
    points = {0.25: tmp_path / "a", 0.5: tmp_path / "b", 1.0: tmp_path / "c"}
    pace = clocks.pace("wall", 8.0, points=points)
    pace.begin()
    for step, point in ((1, 0.25), (2, 0.5), (3, 1.0)):
        clocks.pass_by(8 * point - clocks.wall, 0)
        pace.made(step)
        assert pace.reached() == [point]
        pace.kept(point)
    pace.went_back(1)
    assert not pace.done  # one more step is made
    pace.made(2)
    assert pace.done
    assert pace.seconds()["wall"] == 8.0
    assert pace.reached() == [0.5, 1.0]
    steps = Pace("steps", 4, points)
    steps.made(3)
    assert steps.kept(0.25)["step"] == 3
    steps.went_back(2)
    assert (steps.share, steps.reached()) == (0.5, [0.25, 0.5])


def test_the_rate_follows_the_share_of_the_seconds_and_ends_with_them():
    clocks = Clocks()
    pace = clocks.pace("cpu", 10.0)
    optimizer = OptimizerConfig(lr=2e-3, final_lr=1e-5, schedule="cosine", decay_steps=None, warmup_steps=4)
    rate = pace.learning_rate(optimizer, 10**9)
    pace.begin()
    assert rate(0) == pytest.approx(2e-3 / 4)
    for cpu, step in ((2.5, 100), (2.5, 7), (5.0, 8)):
        clocks.pass_by(cpu * 3, cpu)
        pace.made(step)
        expected = 1e-5 + (2e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi * clocks.cpu / 10))
        assert rate(step) == pytest.approx(expected)
    assert rate(8) == pytest.approx(1e-5)
    clocks.pass_by(30, 30)
    pace.made(9)
    assert rate(9) == pytest.approx(1e-5)


def test_the_rate_of_a_budget_of_steps_is_the_usual_one():
    pace, optimizer = Pace("steps", 40), OptimizerConfig(schedule="cosine", decay_steps=None, warmup_steps=3)
    ours, usual = pace.learning_rate(optimizer, 40), optimizer.rate(40)
    assert [ours(step) for step in range(41)] == [usual(step) for step in range(41)]


def test_quantiles_of_students_t():
    for probability in (0.6, 0.9, 0.975, 0.9995):
        # One degree of freedom is Cauchy's distribution, and two have a closed form too.
        assert t_quantile(probability, 1) == pytest.approx(math.tan(math.pi * (probability - 0.5)), rel=1e-9)
        a = 2 * probability - 1
        assert t_quantile(probability, 2) == pytest.approx(a * math.sqrt(2 / (1 - a * a)), rel=1e-9)
        for freedom in (3, 7, 30.5, 1000):
            assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-8)
            assert t_quantile(1 - probability, freedom) == -t_quantile(probability, freedom)
    for value in (-3.0, -0.2, 0.0, 0.7, 12.0):
        assert t_probability(value, 5) == pytest.approx(stats.t.cdf(value, 5), abs=1e-12)


def test_an_interval_by_hand():
    # Mean 2, standard deviation 1, t of 2 degrees of freedom 4.30265: 2 +- 4.30265 / sqrt(3).
    low, high = t_interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(2 - 4.302652729911275 / math.sqrt(3))
    assert high == pytest.approx(2 + 4.302652729911275 / math.sqrt(3))
    assert t_interval([5.0, 5.0]) == (5.0, 5.0)
    with pytest.raises(ValueError, match="at least 2"):
        t_interval([1.0])
