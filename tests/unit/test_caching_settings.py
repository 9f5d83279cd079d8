"""Caches as words."""

import pickle

import pytest

from edt_diffusion.caching import CACHES, CacheSetting, parse_cache
from edt_diffusion.util.errors import UserError


def test_no_cache():
    assert parse_cache(None) is None
    assert parse_cache("none") is None


@pytest.mark.parametrize("text", [
    "fora", "taylor:interval=4,order=2", "delta:range=stages,outline=0.25", "first-block:threshold=0.08",
    "mag:magnitudes=11.0/10.0/9.0/8.0/7.0/6.0/5.0/4.0/3.0/2.0/1.0",
])  # fmt: skip
def test_a_setting_gives_back_its_word(text):
    setting = parse_cache(text)
    assert str(setting) == text
    assert parse_cache(setting) == setting
    assert parse_cache(str(setting)) == setting
    assert pickle.loads(pickle.dumps(setting)) == setting


def test_settings_are_values():
    one = parse_cache(" taylor: interval = 4, order=2 ")
    two = CacheSetting("taylor", {"order": 2, "interval": 4})
    assert one == two
    assert hash(one) == hash(two)
    assert one != parse_cache("taylor:interval=4")
    assert one is not None
    assert dict(one.options) == {"interval": 4, "order": 2}
    assert isinstance(one.options["interval"], int)


def test_options_that_were_not_given_have_their_defaults():
    setting = parse_cache("taylor:order=3")
    assert setting is not None
    values = CACHES["taylor"].with_defaults(setting)
    assert values["order"] == 3
    assert {name: value for name, value in values.items() if name != "order"} == {
        name: option.default for name, option in CACHES["taylor"].options.items() if name != "order"
    }


@pytest.mark.parametrize(("text", "message"), [
    ("tayler", r"unknown cache 'tayler'.*did you mean 'taylor'"),
    ("taylor:intervall=3", r"unknown option of cache 'taylor' 'intervall'.*did you mean 'interval'"),
    ("taylor:interval", r"'interval': expected option=value"),
    ("taylor:interval=2,interval=3", "given twice"),
    ("taylor:interval=2.5", r"option 'interval': got '2.5', expected a whole number"),
    ("taylor:interval=0", r"option 'interval': got 0, expected 1 or more"),
    ("taylor:order=9", r"got 9, expected 0 to 8"),
    ("first-block:threshold=much", r"got 'much', expected a number"),
    ("first-block:threshold=nan", r"got 'nan', expected a number"),
    ("first-block:threshold=-1", r"got -1, expected 0 or more"),
    ("delta:range=v", r"got 'v', expected u or stages"),
    ("mag:magnitudes=1/2/3", r"got 3 numbers, expected 11"),
    ("mag:magnitudes=1/2/3/4/5/6/7/8/9/10/0", r"got 0, expected 1e-06 or more"),
])  # fmt: skip
def test_mistakes_are_told(text, message):
    with pytest.raises(UserError, match=message):
        parse_cache(text)


def test_a_setting_made_in_python_is_checked_as_well():
    with pytest.raises(UserError, match="expected 1 or more"):
        parse_cache(CacheSetting("fora", {"interval": 0}))
    with pytest.raises(UserError, match="unknown cache 'forra'"):
        parse_cache(CacheSetting("forra"))
    with pytest.raises(TypeError):
        CacheSetting("fora", {"interval": 2}).options["interval"] = 3  # pyright: ignore[reportIndexIssue]
