"""Patterns of a config on hostile names: within a bound of time, an answer or an error that names the field."""

from __future__ import annotations

import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from torch import nn

import peft
from peft.core.anatomy import patterns
from peft.core.anatomy.patterns import Expression, for_path, matcher, means
from peft.errors import ConfigError, near
from tests.hostile import examples

HOSTILE = {
    "nested": r"(a+)+$",
    "nested twice": r"((a+)+)+$",
    "alternatives": r"(a|aa)+$",
    "alternatives of one": r"(a|a)*$",
    "many stars": "a*" * 30 + "$",
    "with a back reference": r"(a+)+\1$",
    "with a look ahead": r"(?=(a+)+$)b",
    "nested over anything": r"(.*)*(.*)*(.*)*(.*)*x$",
}
NAME = "a" * 60 + "b"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.add_module(NAME, nn.Linear(4, 4))

    def forward(self, x):
        return self.linear(x)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr(patterns, "SECONDS", 0.05)
    for cached in (patterns.expression, patterns._table):
        cached.cache_clear()


FIELDS = {
    "target_modules": lambda p: peft.LoraConfig(target_modules=p),
    "exclude_modules": lambda p: peft.LoraConfig(target_modules=["linear"], exclude_modules=p),
    "rank_pattern": lambda p: peft.LoraConfig(target_modules=[NAME], rank_pattern={p: 2}),
    "alpha_pattern": lambda p: peft.LoHaConfig(target_modules=[NAME], alpha_pattern={p: 2}),
    "feedforward_modules": lambda p: peft.IA3Config(target_modules=f"linear|{NAME}", feedforward_modules=p),
    "layers_pattern": lambda p: peft.LoraConfig(target_modules=["linear"], layers_to_transform=[0], layers_pattern=[p]),
}


@pytest.mark.parametrize("how", HOSTILE)
@pytest.mark.parametrize("field", FIELDS)
def test_an_expression_that_would_take_for_ever_is_an_error_that_names_the_field(field, how):
    base = Net()
    if field == "layers_pattern":
        base = nn.ModuleDict({NAME: nn.ModuleDict({"linear": nn.Linear(4, 4)})})
    names = [n for n, _ in base.named_modules()]
    try:
        peft.get_peft_model(base, FIELDS[field](HOSTILE[how]))
    except ValueError as e:  # also NoMatchingPeftModuleError: the engine may see at once that nothing fits
        assert field in str(e) or "target_modules" in str(e)
        assert [n for n, _ in base.named_modules()] == names


def test_the_bound_is_one_for_all_names_together():
    fits = matcher(r"(a|aa)+$", "target_modules")
    with pytest.raises(ConfigError, match=r"target_modules: matching .* takes longer than 0\.05 s"):
        for n in range(10_000):
            fits("a" * (20 + n % 60) + "b")


@pytest.mark.parametrize(
    "pattern", ["(", "[", "(?P<a>x)(?P<a>y)", "*", "(" * 5000, "a*" * 100_000, r"\L<x>", "(?R)", "x{e<=1}("]
)
@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_expression_is_told_with_its_field(field, pattern):
    base = nn.ModuleDict({"0": Net()}) if field == "layers_pattern" else Net()
    with pytest.raises(ValueError, match=field) as e:
        peft.get_peft_model(base, FIELDS[field](pattern))
    assert len(str(e.value)) < 2000


names = st.text("ab0_.", min_size=1, max_size=8).filter(lambda n: ".." not in n and n.strip(".") == n)
pieces = st.text("ab.*+?|()0^$", max_size=8)


@settings(max_examples=examples(300))
@given(pieces, names)
def test_both_engines_agree(pattern, path):
    try:
        known = re.compile(pattern)
    except re.error:
        with pytest.raises(ConfigError, match="some_field"):
            Expression(pattern, "some_field")
        return
    for how in ("match", "fullmatch"):
        ours, theirs = Expression(pattern, "some_field").run(how, path), getattr(known, how)(path)
        assert (ours is None) is (theirs is None) and (ours is None or ours.span() == theirs.span())


def one_by_one(table, path, default):
    for p, value in table.items():
        if means(p, path) or re.fullmatch(rf"(.*\.)?(?:{p})", path):
            return value
    return default


word = st.text("abc", min_size=1, max_size=2)
paths = st.lists(word, min_size=1, max_size=4).map(".".join)


@settings(max_examples=examples(300))
@given(
    st.lists(st.one_of(paths, st.sampled_from([r".*a", "a|b", r"[ab]\.c", "^a$", "b+"])), unique=True, max_size=6),
    paths,
)
def test_looking_names_up_finds_what_trying_them_in_turn_finds(patterns_, path):
    table = {p: i for i, p in enumerate(patterns_)}
    assert for_path(table, path, -1) == one_by_one(table, path, -1)
    listed = matcher(patterns_)(path)
    assert listed is any(means(p, path) for p in patterns_)


def test_many_patterns_are_looked_up_and_too_many_refused():
    ranks = {f"m.{i}.q_proj": i for i in range(100_000)}
    assert all(for_path(ranks, f"base.m.{i}.q_proj", -1) == i for i in range(0, 100_000, 10_000))
    with pytest.raises(ConfigError, match="rank_pattern has 200000 entries"):
        for_path({str(i): 1 for i in range(200_000)}, "x", 0, "rank_pattern")
    targets = [f"missing_{i}" for i in range(200_000)]
    with pytest.raises(peft.NoMatchingPeftModuleError, match="missing_0") as e:
        peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["linear", *targets]))
    assert len(str(e.value)) < 3000


def test_near_names_are_looked_for_within_bounds():
    assert near("q_prj", ["q_proj", "norm"]) == " Did you mean 'q_proj'?"
    assert near("q" * 1_000_000, ["q_proj", "q" * 999_999]) == ""
    assert near("q_prj", [f"name_{i}" for i in range(10**5)]) == ""
