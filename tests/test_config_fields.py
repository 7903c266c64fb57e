"""Fields of configs: what their declarations allow, refuse and write."""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, fields

import pytest

from peft import PeftConfig
from peft.config_fields import (
    among,
    among_these,
    checks_of,
    default_of,
    in_range,
    jsonable,
    own_field,
    ranged,
    unavailable,
)


@dataclass
class Example:
    rank: int = ranged(8)
    rate: float = ranged(0.1, 0.0, 1.0)
    steps: int | None = ranged(None, 0)
    layout: str = among("rows", ("rows", "blocks"))
    later: str | None = unavailable()
    lists: list[str] = unavailable([])
    mine: dict[str, int] = own_field({})


def checked(**values: object) -> Example:
    made = Example(**values)
    for f in fields(made):
        setattr(made, f.name, checks_of(Example)[f.name](getattr(made, f.name)))
    return made


def test_defaults_pass_and_no_two_configs_share_one():
    first, second = checked(), checked()
    assert first == second and (first.rank, first.later, first.lists, first.mine) == (8, None, [], {})
    first.mine["a"] = 1
    first.lists.append("x")
    assert second.mine == {} and second.lists == [] and Example().mine == {}
    assert {f.name: default_of(f) for f in fields(Example)} == dataclasses.asdict(Example())


@pytest.mark.parametrize(
    "values", [{"rank": 1}, {"rate": 0}, {"rate": 0.999}, {"steps": 0}, {"steps": 7}, {"layout": "blocks"}]
)
def test_values_within_their_range_pass(values):
    checked(**values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"rank": 0}, "`rank` should be at least 1 but the value passed is 0"),
        ({"rank": None}, "`rank` should be an integer but the value passed is None"),  # its default is a number
        ({"rank": "8"}, "`rank` should be an integer but the value passed is '8'"),
        ({"rank": True}, "`rank` should be an integer"),  # no number, although Python counts it as one
        ({"rate": -0.1}, "`rate` should be at least 0.0"),
        ({"rate": 1.0}, "`rate` should be less than 1.0 but the value passed is 1.0"),
        ({"steps": -1}, "`steps` should be at least 0"),
        ({"layout": "columns"}, "`layout` should be one of 'rows', 'blocks' but the value passed is 'columns'"),
        ({"layout": None}, "`layout` should be a string"),
        ({"later": "x"}, "Example.later='x' asks for a feature that is not available here; only the default None"),
        ({"lists": ["x"]}, r"Example.lists=\['x'\] asks for a feature that is not available here"),
    ],
)
def test_other_values_are_refused_by_name(values, said):
    with pytest.raises(ValueError, match=said):
        checked(**values)


@pytest.mark.parametrize("nothing", [None, "", [], {}, False])
def test_an_unavailable_feature_may_be_turned_off_in_any_way(nothing):
    """Files write what is off as null, as an empty list or as false."""
    assert checked(later=nothing, lists=nothing).later == nothing


def test_checks_by_name_take_any_value():
    in_range("rank", 4, 4)
    among_these("layout", "rows", {"rows"})
    with pytest.raises(ValueError, match="`rank` should be at least 5"):
        in_range("rank", 4, 5)
    with pytest.raises(ValueError, match="`rank` should be less than 4"):
        in_range("rank", 4, 1, 4)
    with pytest.raises(ValueError, match="`layout` should be one of 'x'"):
        among_these("layout", "rows", ["x"])


@dataclass
class Own(PeftConfig):
    plain: int = 3
    mine: int = own_field(3)
    near: int = ranged(3, 1, own=True)
    far: int = ranged(3, 1)
    sort: str = among("a", "ab", own=True)


def test_own_fields_are_written_only_where_they_say_something():
    """Upstream does not know them, so that a file which does not need them stays readable for it."""
    asked = {"plain", "mine", "near", "far", "sort"}
    assert set(Own().to_json_dict()) & asked == {"plain", "far"}
    assert set(Own(mine=4, near=5).to_json_dict()) & asked == {"plain", "far", "mine", "near"}
    assert Own(sort="b").to_json_dict()["sort"] == "b" and "mine" not in Own(mine=3).to_json_dict()


class Colour(str, enum.Enum):
    RED = "red"


def test_values_as_json_can_hold_them():
    value = {"sets": {"b", "a"}, "frozen": frozenset({2, 1}), "enum": [Colour.RED], "pair": (1, None), "own": Example()}
    found = jsonable(value)
    assert found == {
        "sets": ["a", "b"],
        "frozen": [1, 2],
        "enum": ["red"],
        "pair": [1, None],
        "own": dataclasses.asdict(Example()),
    }
    assert json.loads(json.dumps(found)) == found and type(found["enum"][0]) is str
    assert jsonable(Example) is Example  # a class is no value
