"""Banks that adapters have in common: one storage while they are equal, and never written through another's name."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, VeraConfig, get_peft_model, set_peft_model_state_dict
from peft.core.files.keys import state_dict_of
from peft.core.injection.shared import apart, together
from tests.helpers.cells import randomise


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 4))


def config(**more) -> VeraConfig:
    return VeraConfig(**{"r": 3, "target_modules": ["0", "1"], **more})


def banks(model, name: str) -> set[int]:
    return {
        p.data_ptr()
        for n, p in model.named_parameters(remove_duplicate=False)
        if f".{name}.vera_" in n and n.endswith(("A_weight", "B_weight"))
    }


def out(model, name: str) -> torch.Tensor:
    x = torch.linspace(-1, 1, 12).view(2, 6)
    with torch.no_grad(), model.use_adapter(name):
        return model(x)


def two(**more) -> PeftModel:
    model = get_peft_model(net(), config(), adapter_name="a")
    model.add_adapter("b", config(**more))
    for i, name in enumerate("ab"):
        randomise(model, name, i)
    return model.eval()


def test_equal_size_and_seed_share_one_storage():
    model = two()
    assert banks(model, "a") == banks(model, "b") and len(banks(model, "a")) == 2
    assert not any(
        p.requires_grad for n, p in model.named_parameters() if n.endswith(("vera_A_weight", "vera_B_weight"))
    )


@pytest.mark.parametrize("more", [{"projection_prng_key": 5}, {"r": 2}])
def test_others_have_their_own(more):
    model = two(**more)
    assert not banks(model, "a") & banks(model, "b")


def test_a_loaded_adapter_shares_what_is_equal(tmp_path):
    model = two()
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    expected = out(model, "b")
    model.load_adapter(tmp_path / "b", "c")
    assert banks(model, "c") == banks(model, "a") and torch.equal(out(model, "c"), expected)


def test_writing_one_leaves_the_other(tmp_path):
    """Other banks for b: those of a are no longer its own."""
    model, other = two(), two(projection_prng_key=5)
    other.save_pretrained(tmp_path, selected_adapters=["b"])
    before, expected = out(model, "a"), out(other, "b")
    model.load_adapter(tmp_path / "b", "b")
    assert torch.equal(out(model, "a"), before) and torch.equal(out(model, "b"), expected)
    assert not banks(model, "a") & banks(model, "b")
    set_peft_model_state_dict(model, state_dict_of(model.roster, "a"), "b")
    assert banks(model, "a") == banks(model, "b")
    assert torch.equal(out(model, "a"), before)


def test_apart_and_together_again():
    model = two()
    roster = model.roster
    apart(roster, roster.adapters["b"])
    assert not banks(model, "a") & banks(model, "b")
    together(roster, roster.adapters["b"])
    assert banks(model, "a") == banks(model, "b")


def test_the_last_holder_keeps_them():
    model = two()
    expected = out(model, "b")
    model.delete_adapter("a")
    assert torch.equal(out(model, "b"), expected)


def test_methods_without_banks_hold_nothing_in_common():
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=["0"]), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0"]))
    assert (
        len(
            {p.data_ptr() for p in model.adapter_parameters("a")}
            & {p.data_ptr() for p in model.adapter_parameters("b")}
        )
        == 0
    )
