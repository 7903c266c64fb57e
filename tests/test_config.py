"""Configs: dataclasses that check themselves when they are made and come back from JSON as they went."""

from __future__ import annotations

import enum
import json

import pytest

from peft import IA3Config, LoraConfig, PromptTuningConfig
from peft.config import CONFIG_NAME, PeftConfig, TunerConfig
from peft.config_fields import jsonable


def test_a_config_comes_back_from_its_folder(tmp_path):
    config = LoraConfig(r=3, target_modules={"v", "q"}, rank_pattern={"q": 5}, task_type="CAUSAL_LM", seed=7)
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert type(again) is LoraConfig and again == config and again.target_modules == {"q", "v"}
    assert PeftConfig.from_pretrained(tmp_path, r=9).r == 9
    assert [p.name for p in tmp_path.iterdir()] == [CONFIG_NAME]


def test_fields_of_our_own_are_written_only_when_they_are_used():
    assert "seed" not in LoraConfig().to_dict() and LoraConfig(seed=3).to_dict()["seed"] == 3
    assert "runtime_config" not in LoraConfig().to_dict()


def test_values_are_plain_in_json():
    class Colour(str, enum.Enum):
        RED = "red"

    plain = jsonable({"a": Colour.RED, "b": {3, 1}, "c": (LoraConfig().runtime_config,)})
    assert plain == {"a": "red", "b": [1, 3], "c": [{"ephemeral_gpu_offload": False}]}
    assert json.loads(json.dumps(plain)) == plain and type(plain["a"]) is str


def test_further_fields_go_by_name():
    assert LoraConfig("CAUSAL_LM").task_type == "CAUSAL_LM"
    with pytest.raises(TypeError, match="pass the fields after `inference_mode` by name"):
        LoraConfig("CAUSAL_LM", None, None, None, None, None, False, 8)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LoraConfig(peft_type="IA3"), "LoraConfig is for method LORA, not IA3"),
        (lambda: LoraConfig(task_type="CAUSAL_LN"), r"Invalid task type: 'CAUSAL_LN'.*CAUSAL_LM"),
        (
            lambda: TunerConfig(target_modules="a.*", layers_to_transform=[1]),
            "cannot be used when `target_modules` is a str",
        ),
        (lambda: TunerConfig(layers_pattern="h"), "`layers_to_transform` must also be specified"),
        (lambda: TunerConfig(bias="some"), "bias='some': expected 'none', 'all' or"),
        (lambda: LoraConfig(rank_pattern={"q": 0}), r"rank_pattern\['q'\] should be at least 1"),
        (lambda: LoraConfig(use_qalora=True), "LoraConfig.use_qalora=True asks for a feature that is not available"),
    ],
)
def test_what_makes_no_sense_is_told_by_its_field(make, said):
    with pytest.raises(ValueError, match=said):
        make()


def test_numbers_must_lie_in_their_range():
    config = LoraConfig(r=4)
    for name, value, said in (("r", 0, "at least 1 but the value passed is 0"), ("lora_dropout", 1, "less than 1 but")):
        with pytest.raises(ValueError, match=said):
            setattr(config, name, value)
    with pytest.raises(ValueError, match="passed is True"):
        config.r = True
    assert config == LoraConfig(r=4)


def test_unknown_fields_are_dropped_with_a_warning_or_refused():
    values = {"peft_type": "IA3", "target_module": ["q"]}
    with pytest.warns(UserWarning, match=r"IA3Config does not know the field\(s\) 'target_module'.*target_modules"):
        assert type(PeftConfig.from_dict(values)) is IA3Config
    with pytest.raises(ValueError, match="strict=False to drop"):
        PeftConfig.from_dict(values, strict=True)


def test_which_methods_are_prompts_is_asked_of_the_method():
    assert PromptTuningConfig(num_virtual_tokens=2).is_prompt_learning and not LoraConfig().is_prompt_learning
    assert not PeftConfig().is_prompt_learning


def test_damaged_files_are_named(tmp_path):
    (tmp_path / CONFIG_NAME).write_text("[1]")
    with pytest.raises(ValueError, match="should hold a JSON object, found list"):
        PeftConfig.from_json_file(tmp_path / CONFIG_NAME)
    (tmp_path / CONFIG_NAME).write_text("{}")
    with pytest.raises(ValueError, match="names no method: the field 'peft_type' is missing"):
        PeftConfig.from_pretrained(tmp_path)
