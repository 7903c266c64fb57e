"""`key_mapping`: an adapter of a text model on a model that holds it as a part, and back."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from peft import CheckpointError, LoraConfig, PeftModel, get_peft_model
from peft.core.load.load import read_adapter
from tests.helpers.tiny_llama import llama

IN, OUT = {r"^model\.": "model.language_model."}, {r"^model\.language_model\.": "model."}
TARGETS = ["q_proj", "v_proj"]  # which the vision tower has, too


def both() -> tuple[LlamaForCausalLM, LlavaForConditionalGeneration]:
    text = llama().eval()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8, projection_dim=16)
    whole = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text.config)).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    return text, whole


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(6)[None]).logits


def config(**more) -> LoraConfig:
    return LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False, **more)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"task_type": "CAUSAL_LM", "layers_to_transform": [1]},
        {"rank_pattern": {"model.layers.0.self_attn.q_proj": 3}, "alpha_pattern": {"v_proj": 5}},
        {"use_dora": True},
    ],
)
def test_a_text_adapter_goes_to_the_text_part_alone(tmp_path, more):
    text, whole = both()
    made = get_peft_model(text, config(**more)).eval()
    made.save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError):
        PeftModel.from_pretrained(whole, tmp_path / "text")
    loaded = PeftModel.from_pretrained(whole, tmp_path / "text", key_mapping=IN)
    assert torch.equal(logits(loaded), logits(made)) and not torch.equal(
        logits(made), logits(made.get_base_model()) * 0
    )
    assert all("language_model" in name for name in loaded.targeted_module_names)
    loaded.load_adapter(tmp_path / "text", "second", key_mapping=IN)
    loaded.set_adapter("second")
    assert torch.equal(logits(loaded), logits(made))

    loaded.set_adapter("default")
    loaded.save_pretrained(tmp_path / "whole", selected_adapters=["default"])
    assert torch.equal(logits(PeftModel.from_pretrained(both()[1], tmp_path / "whole")), logits(made))
    back = PeftModel.from_pretrained(both()[0], tmp_path / "whole", key_mapping=OUT)
    assert torch.equal(logits(back), logits(made))


def test_sizes_are_compared_all_the_same(tmp_path):
    text, whole = both()
    get_peft_model(text, config()).save_pretrained(tmp_path)
    wrong = {r"^model\.": "model.vision_tower."}
    with pytest.raises((CheckpointError, ValueError)):
        PeftModel.from_pretrained(whole, tmp_path, key_mapping={r"^model\.layers": "model.no_such_part.layers"})
    with pytest.raises((CheckpointError, ValueError)):
        PeftModel.from_pretrained(whole, tmp_path, key_mapping={**wrong, "x": "y"})
    assert not any("lora" in n for n, _ in whole.named_parameters())


def test_a_mapping_that_changes_nothing_leaves_the_file_as_it_is(tmp_path):
    text, _ = both()
    mine = config()
    get_peft_model(text, config()).save_pretrained(tmp_path)
    found = read_adapter(tmp_path, mine, {"nothing": "x"}, True, {})
    assert found.config.target_modules == mine.target_modules and found.base["class"] == "LlamaForCausalLM"
    read_adapter(tmp_path, mine, IN, True, {})
    assert set(mine.target_modules) == set(TARGETS)  # the caller's config is the caller's
