"""Default targets by model type: each role's modules are there, and an unknown type is told what is known."""

from __future__ import annotations

import pytest

from peft import NoMatchingPeftModuleError
from peft.core.anatomy.roles import default_targets


@pytest.mark.parametrize(
    ("role", "model_type", "expected"),
    [
        ("attention", "llama", ["q_proj", "v_proj"]),
        ("attention", "gpt2", ["c_attn"]),
        ("attention", "phi", ["q_proj", "v_proj", "fc1", "fc2"]),
        ("keys_values_ffn", "llama", ["k_proj", "v_proj", "down_proj"]),
        ("ffn", "mt5", []),
        ("norms", "gpt2", ["ln_1", "ln_2", "ln_f"]),
        ("every_linear", "t5", ["q", "k", "v", "o", "wi", "wo"]),
    ],
)
def test_a_role_has_its_modules(role, model_type, expected):
    assert default_targets(role, model_type, "METHOD") == expected


def test_where_every_linear_is_not_listed_the_attention_is_taken():
    assert default_targets("every_linear", "llama", "METHOD") == ["q_proj", "v_proj"]


def test_a_pattern_is_given_as_one_regex():
    assert default_targets("blocks", "gpt2", "METHOD") == r"(.*\.)?h\.\d+"


def test_an_unknown_type_is_an_error_with_the_near_ones():
    with pytest.raises(NoMatchingPeftModuleError, match=r"METHOD has no default for model type 'lama'.*llama"):
        default_targets("attention", "lama", "METHOD")
