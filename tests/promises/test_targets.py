"""Promise 9: what is adapted is what was named, and a dry run says so."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

import peft
from peft import LoraConfig, NoMatchingPeftModuleError, get_peft_model
from peft.core.adapted.layer import Adapted
from tests.promises.models import llama, lora, same, state


def test_promise_9_every_pattern_must_match_and_errors_name_what_is_near():
    base = llama()
    for config, near in (
        (lora(target_modules=["q_proj", "v_porj"]), "'v_proj'"),
        (lora(exclude_modules=["v_prj"]), "'v_proj'"),
        (lora(modules_to_save=["lm_haed"]), "'lm_head'"),
        (lora(target_modules=None, target_parameters=["q_proj.wieght"]), "q_proj.weight"),
    ):
        with pytest.raises(NoMatchingPeftModuleError) as e:
            get_peft_model(base, config)
        assert "Did you mean" in str(e.value) and near in str(e.value)
    with pytest.raises(NoMatchingPeftModuleError, match="leave none"):
        get_peft_model(base, lora(layers_to_transform=[7]))
    assert not any(isinstance(m, Adapted) for m in base.modules())


def test_promise_9_all_linear_leaves_the_heads_alone():
    rows = peft.dry_run(llama(), lora(target_modules="all-linear"))
    assert {r.path.rsplit(".", 1)[-1] for r in rows} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    bert = AutoModelForSequenceClassification.from_config(
        BertConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    )
    rows = peft.dry_run(bert, LoraConfig(target_modules="all-linear"))
    assert rows and not any("classifier" in r.path for r in rows)


def test_promise_9_a_dry_run_shows_what_would_be_adapted_and_changes_nothing():
    base = llama()
    before, draws = state(base), torch.get_rng_state()
    rows = peft.dry_run(base, lora())
    assert [(r.path, r.kind.name, r.shape, r.parameters) for r in rows][:2] == [
        ("model.layers.0.self_attn.q_proj", "linear", (16, 16), 4 * 32),
        ("model.layers.0.self_attn.v_proj", "linear", (16, 16), 4 * 32),
    ]
    assert same(state(base), before) and torch.equal(torch.get_rng_state(), draws)
    model = get_peft_model(base, lora())
    assert sum(r.parameters for r in rows) == model.get_nb_trainable_parameters()[0]
