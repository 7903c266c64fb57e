"""Prefix tuning: keys and values."""

from __future__ import annotations

from peft import get_peft_model
from peft.methods.prefix_tuning import PrefixTuningConfig
from tests.golden.prompt import make
from tests.helpers.prompts import on


@on("projection", [False, True])
def test_zero_prefixes_are_keys_and_values_of_zero(projection):
    made = get_peft_model(
        make.build("llama_gqa"),
        PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero", prefix_projection=projection
        ),
    )
    assert not made.get_prompt_embedding_to_save("default").any()
