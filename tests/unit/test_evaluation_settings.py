import itertools

import numpy as np
import pytest

from edt_diffusion.evaluation.sweep import slug
from edt_diffusion.sampling.labels import choose_labels
from edt_diffusion.sampling.settings import SamplingSetting, parse_setting, parse_sweep
from edt_diffusion.util.errors import UserError

# ------------------------------------------------------------------------------------------- settings


def test_a_sweep_is_the_product_of_its_axes_the_last_one_fastest():
    settings, axes = parse_sweep(["guidance=1,1.5, 2", "amm=off,7+10"], {"steps": 20})
    assert axes == ["guidance", "amm"]
    expected = list(itertools.product([1.0, 1.5, 2.0], ["off", "7+10"]))
    assert [(setting.guidance, setting.amm) for setting in settings] == expected
    assert {setting.steps for setting in settings} == {20}
    assert {(setting.scheduler, setting.precision, setting.channels) for setting in settings} == {(None, "fp32", "all")}


def test_without_axes_there_is_one_setting():
    assert parse_sweep([], {"guidance": 2}) == ([SamplingSetting(guidance=2.0)], [])


def test_values_that_mean_the_same_are_swept_once():
    settings, _ = parse_sweep(["guidance=1,1.0,1,2.50,2.5", "steps=10,010"], {})
    assert [(setting.guidance, setting.steps) for setting in settings] == [(1.0, 10), (2.5, 10)]


def test_the_schedulers_own_number_of_steps_is_a_value_too():
    settings, _ = parse_sweep(["steps=default,5", "scheduler=none,ddim"], {})
    assert [(s.steps, s.scheduler) for s in settings] == [(None, None), (None, "ddim"), (5, None), (5, "ddim")]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["guidence=1"], ("unknown axis 'guidence'", "did you mean 'guidance'?", "scheduler")),
        (["guidance=1", "guidance=2"], ("'guidance'", "given twice", "commas")),
        (["guidance="], ("'guidance='", "guidance=1,1.5,2")),
        (["guidance=,"], ("'guidance=,'", "guidance=1,1.5,2")),
        (["guidance"], ("'guidance'", "guidance=1,1.5,2")),
        (["guidance=1,-1"], ("guidance=-1", "0 or more")),
        (["guidance=nan"], ("guidance=nan", "finite")),
        (["guidance=inf"], ("guidance=inf", "finite")),
        (["guidance=much"], ("guidance=much", "finite number")),
        (["steps=0"], ("steps=0", "integer of 1 or more")),
        (["steps=2.5"], ("steps=2.5", "integer of 1 or more")),
        (["scheduler=dimm"], ("'dimm'", "ddpm, ddim, dpm++", "did you mean 'ddim'?")),
        (["cache=foo"], ("unknown cache 'foo'", "expected", "taylor")),
        (["precision=fp9"], ("unknown precision 'fp9'", "fp32, bf16", "did you mean 'fp8'")),
        (["channels=two"], ("channels=two", "all or authors")),
    ],
)
def test_mistakes_in_a_sweep_are_one_line(words, said):
    with pytest.raises(UserError) as error:
        parse_sweep(words, {})
    assert "\n" not in str(error.value)
    for part in said:
        assert part in str(error.value)


def test_an_unknown_field_is_a_mistake():
    with pytest.raises(UserError, match="guidence"):
        parse_setting({"guidence": 1})


def test_labels_and_file_names_of_different_settings_differ():
    assert SamplingSetting(guidance=1.5).label() == "guidance=1.5 amm=saved"
    assert SamplingSetting(steps=20, amm="7+10", scheduler="dpm++").label() == (
        "guidance=1 amm=7+10 scheduler=dpm++ steps=20"
    )
    settings, _ = parse_sweep(["guidance=1.2345678,1.2345679,1,10", "steps=1,10", "amm=off,on"], {})
    assert len(settings) == len({slug(setting) for setting in settings}) == 16
    assert all("/" not in slug(setting) and " " not in slug(setting) for setting in settings)


# ------------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(("count", "classes"), [(12, 4), (10, 4), (3, 7)])
def test_balanced_labels(count, classes):
    labels, policy = choose_labels("balanced", count, None, classes, 0)
    counts = np.bincount(labels, minlength=classes)
    assert policy == "balanced"
    assert counts.sum() == count
    assert counts.max() - counts.min() <= 1
    longer, _ = choose_labels("balanced", count + 5, None, classes, 9)
    np.testing.assert_array_equal(longer[:count], labels)


def test_random_labels_are_a_stream_of_the_sample():
    seed, classes = 3, 10
    labels, policy = choose_labels("random", 200, None, classes, seed)
    assert policy == "random"
    expected = [  # one Philox stream per sample: key (seed, 17), counter (0, sample, 0, 0)
        int(np.random.Generator(np.random.Philox(counter=[0, number, 0, 0], key=[seed, 17])).random() * classes)
        for number in range(200)
    ]
    assert labels.tolist() == expected
    assert set(expected) == set(range(classes))
    assert choose_labels("random", 50, None, classes, seed)[0].tolist() == expected[:50]
    assert choose_labels("random", 50, None, classes, seed + 1)[0].tolist() != expected[:50]


def test_labels_of_the_reference_go_by_name():
    names = ["ant", "bee", "cat", "dog"]  # the reference has them in another order, and no dogs
    given, theirs = np.array([0] * 10 + [1] * 30 + [2] * 60), ["cat", "ant", "bee"]
    for policy in ("reference", "auto"):
        labels, meant = choose_labels(policy, 50, names, 4, 0, given, theirs)
        assert meant == "reference"
        assert np.bincount(labels, minlength=4).tolist() == [15, 30, 5, 0]
        assert labels.tolist() != sorted(labels.tolist())  # the first part of a longer row is no class of its own
    again, _ = choose_labels("reference", 50, names, 4, 0, given, theirs)
    other, _ = choose_labels("reference", 50, names, 4, 1, given, theirs)
    assert again.tolist() == labels.tolist() != other.tolist()


@pytest.mark.parametrize("count", [1, 7, 99, 250])
def test_labels_of_the_reference_at_any_number(count):
    given = np.array([0] * 10 + [1] * 30 + [2] * 60)[np.random.default_rng(0).permutation(100)]
    labels, _ = choose_labels("reference", count, None, 3, 0, given, None)
    assert np.abs(np.bincount(labels, minlength=3) - count * np.array([0.1, 0.3, 0.6])).max() <= 1
    assert len(labels) == count


def test_auto_labels_are_balanced_without_the_references():
    for given, theirs in ((None, None), (np.array([0, 1]), ["ant", "wasp"]), (np.array([0, 9]), None)):
        labels, policy = choose_labels("auto", 6, ["ant", "bee"], 2, 0, given, theirs)
        assert (policy, labels.tolist()) == ("balanced", [0, 1, 0, 1, 0, 1])


def test_an_unconditional_model_has_no_labels():
    assert choose_labels("random", 6, None, None, 0) == (None, "none")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("refrence", 4, None, 2, 0), ("'refrence'", "balanced, random, reference")),
        (("reference", 4, ["a", "b"], 2, 0), ("the reference has no labels", "balanced or random")),
        (("reference", 4, ["a", "b"], 2, 0, np.array([0, 1]), ["a", "c"]), ("does not know", "'c'")),
        (("reference", 4, None, 2, 0, np.array([0, 1]), ["a", "b"]), ("no names",)),
        (("reference", 4, None, 2, 0, np.array([0, 2]), None), ("no names",)),
    ],
)
def test_mistakes_about_labels(arguments, said):
    with pytest.raises(UserError) as error:
        choose_labels(*arguments)
    for part in said:
        assert part in str(error.value)
