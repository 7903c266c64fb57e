"""Values of configs: by their annotation, finite, in range, and such as JSON can hold; or refused by name."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pytest
import torch

from peft import (
    AdaLoraConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    LoraRuntimeConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from peft.config_fields import Names
from peft.config_values import Least, annotations_of, check_of, plain, said_of, shown
from peft.errors import ConfigError


class Listing(Sequence):
    """A list of another library, as a reader of YAML gives it."""

    def __init__(self, *values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]

    def __len__(self):
        return len(self.values)


class Table(Mapping):
    """A dictionary of another library."""

    def __init__(self, **values):
        self.values = values

    def __getitem__(self, key):
        return self.values[key]

    def __iter__(self):
        return iter(self.values)

    def __len__(self):
        return len(self.values)


WRONG = [
    (LoraConfig, "r", "16", "LoraConfig: `r` should be an integer but the value passed is '16'"),
    (LoraConfig, "r", None, "`r` should be an integer but the value passed is None"),
    (LoraConfig, "r", True, "`r` should be an integer"),
    (LoraConfig, "r", 2.5, "`r` should be an integer"),
    (LoraConfig, "r", 2**70, "`r` should be an integer of 64 bits"),
    (LoraConfig, "r", [8], "`r` should be an integer"),
    (LoraConfig, "lora_alpha", math.nan, "`lora_alpha` should be a finite number but the value passed is nan"),
    (LoraConfig, "lora_alpha", math.inf, "`lora_alpha` should be a finite number"),
    (LoraConfig, "lora_alpha", "32", "`lora_alpha` should be a number"),
    (LoraConfig, "lora_alpha", True, "`lora_alpha` should be a number"),
    (LoraConfig, "lora_alpha", None, "`lora_alpha` should be a number"),
    (LoraConfig, "lora_alpha", np.float32("nan"), "`lora_alpha` should be a finite number"),
    (LoraConfig, "lora_alpha", 10**400, "`lora_alpha` should be a finite number"),
    (LoraConfig, "lora_alpha", 1j, "`lora_alpha` should be a number"),
    (LoraConfig, "lora_dropout", "0.1", "`lora_dropout` should be a number"),
    (LoraConfig, "lora_dropout", math.nan, "`lora_dropout` should be a finite number"),
    (LoraConfig, "use_rslora", "false", "`use_rslora` should be True or False but the value passed is 'false'"),
    (LoraConfig, "use_dora", "no", "`use_dora` should be True or False"),
    (LoraConfig, "use_dora", 2, "`use_dora` should be True or False"),
    (LoraConfig, "inference_mode", None, "`inference_mode` should be True or False"),
    (LoraConfig, "fan_in_fan_out", [], "`fan_in_fan_out` should be True or False"),
    (LoraConfig, "bias", True, "`bias` should be a string"),
    (LoraConfig, "bias", "lora", "bias='lora': expected"),
    (LoraConfig, "rank_pattern", {"q": "4"}, r"rank_pattern\['q'\] should be an integer"),
    (LoraConfig, "rank_pattern", {"q": 0}, r"rank_pattern\['q'\] should be at least 1"),
    (LoraConfig, "rank_pattern", {3: 4}, "rank_pattern key 3 should be a string"),
    (LoraConfig, "rank_pattern", ["q"], "`rank_pattern` should be a dictionary"),
    (LoraConfig, "alpha_pattern", {"q": math.nan}, r"alpha_pattern\['q'\] should be a finite number"),
    (LoraConfig, "alpha_pattern", {"q": None}, r"alpha_pattern\['q'\] should be a number"),
    (LoraConfig, "target_modules", ["q", None], r"target_modules\[1\] should be a string"),
    (LoraConfig, "target_modules", {"q": 1}, "`target_modules` should be"),
    (LoraConfig, "target_modules", 7, "`target_modules` should be"),
    (LoraConfig, "target_modules", b"q", "`target_modules` should be"),
    (LoraConfig, "modules_to_save", "score", "`modules_to_save` should be a list"),
    (LoraConfig, "modules_to_save", [1], r"modules_to_save\[0\] should be a string"),
    (LoraConfig, "layers_to_transform", ["1"], r"layers_to_transform\[0\] should be an integer"),
    (LoraConfig, "layers_to_transform", [True], r"layers_to_transform\[0\] should be an integer"),
    (LoraConfig, "layers_to_transform", -1, "`layers_to_transform` should be"),
    (LoraConfig, "trainable_token_indices", {"embed": "12"}, r"trainable_token_indices\['embed'\] should be a list"),
    (LoraConfig, "trainable_token_indices", ["1"], r"trainable_token_indices\[0\] should be an integer"),
    (LoraConfig, "init_lora_weights", 3, "`init_lora_weights` should be"),
    (LoraConfig, "init_lora_weights", None, "`init_lora_weights` should be"),
    (LoraConfig, "seed", "1", "`seed` should be an integer or None"),
    (LoraConfig, "revision", 7, "`revision` should be a string or None"),
    (LoraConfig, "base_model_name_or_path", torch.nn.Linear(1, 1), "`base_model_name_or_path` should be a string"),
    (LoraConfig, "auto_mapping", {"a": object()}, r"auto_mapping\['a'\] should be a value that can be stored as JSON"),
    (LoraConfig, "auto_mapping", {"a": [math.inf]}, r"auto_mapping\['a'\]\[0\] should be a finite number"),
    (LoraConfig, "auto_mapping", {"a": {1: 2}}, r"auto_mapping\['a'\] key 1 should be a string"),
    (LoraConfig, "task_type", 5, "`task_type` should be a string"),
    (LoraConfig, "task_type", "CAUSAL_LN", "Invalid task type: 'CAUSAL_LN'.*CAUSAL_LM"),
    (LoraConfig, "peft_type", "IA3", "LoraConfig is for method LORA, not IA3"),
    (LoraConfig, "runtime_config", {"offload": True}, "`runtime_config` should be a LoraRuntimeConfig"),
    (LoraConfig, "r", torch.empty(1, device="meta"), "`r` should be a plain value"),
    (LoraConfig, "r", torch.tensor([1, 2]), "`r` should be an integer"),
    (AdaLoraConfig, "total_step", "100", "`total_step` should be an integer"),
    (AdaLoraConfig, "beta1", math.nan, "`beta1` should be a finite number"),
    (AdaLoraConfig, "rank_pattern", {"q": [2]}, r"rank_pattern\['q'\]\[0\] should be True or False"),
    (IA3Config, "feedforward_modules", [0], r"feedforward_modules\[0\] should be a string"),
    (LoHaConfig, "alpha", "1", "`alpha` should be a number"),
    (VeraConfig, "projection_prng_key", 0.5, "`projection_prng_key` should be an integer"),
    (VeraConfig, "d_initial", math.inf, "`d_initial` should be a finite number"),
    (TrainableTokensConfig, "token_indices", None, "`token_indices` should be a list of"),
    (PromptTuningConfig, "num_virtual_tokens", 0, "`num_virtual_tokens` should be at least 1"),
    (PromptTuningConfig, "prompt_tuning_init", "WORDS", "`prompt_tuning_init` should be one of"),
    (PrefixTuningConfig, "num_layers", -2, "`num_layers` should be at least 1"),
]
NEEDED: dict[type, dict[str, object]] = {
    AdaLoraConfig: {"total_step": 10},
    PromptTuningConfig: {"num_virtual_tokens": 2},
}


@pytest.mark.parametrize(("cls", "name", "value", "said"), WRONG)
def test_a_wrong_value_is_refused_when_made_when_set_and_when_read(cls, name, value, said):
    needed = NEEDED.get(cls, {})
    with pytest.raises(ConfigError, match=said):
        cls(**{**needed, name: value})
    made = cls(**needed)
    before = made.to_dict()
    with pytest.raises(ConfigError, match=said):
        setattr(made, name, value)
    assert made.to_dict() == before
    if name != "peft_type":
        with pytest.raises(ConfigError, match=said) as raised:
            PeftConfig.from_dict({"peft_type": cls.own_type, **needed, name: value}, source="there.json")
        assert "there.json" in str(raised.value) and isinstance(raised.value, (ValueError, TypeError))


@pytest.mark.parametrize("text", ["NaN", "Infinity", '"16"', "null", "[]", "1e999", "{}", "true", "9" * 5000])
def test_a_wrong_value_in_a_file_is_refused_with_its_name(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {text}}}')
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{}", '{"r": 8}', '{"peft_type": null}', '{"peft_type": ["LORA"]}', "[" * 100_000])
@pytest.mark.parametrize("cls", [PeftConfig, LoraConfig])
def test_a_file_without_a_method_is_no_adapter(tmp_path, content, cls):
    (tmp_path / "adapter_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"adapter_config\.json.*(peft_type|damaged)"):
        cls.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_config\.json.*(peft_type|damaged)"):
        cls._get_peft_type(str(tmp_path))


CONVERTED = [
    ("r", np.int64(16), 16),
    ("r", np.array(16), 16),
    ("r", torch.tensor(16), 16),
    ("r", 16.0, 16),
    ("lora_alpha", np.float32(0.5), 0.5),
    ("lora_alpha", np.float64(0.1), 0.1),
    ("lora_alpha", torch.tensor(2.0), 2.0),
    ("lora_alpha", 32, 32),
    ("lora_alpha", 0.5, 0.5),
    ("lora_dropout", 0, 0),
    ("lora_dropout", np.float16(0.5), 0.5),
    ("use_rslora", np.True_, True),
    ("use_rslora", torch.tensor(True), True),
    ("use_rslora", 1, True),
    ("init_lora_weights", np.False_, False),
    ("init_lora_weights", np.str_("gaussian"), "gaussian"),
    ("target_modules", ("q", "v"), Names(("q", "v"))),
    ("target_modules", {"v", "q"}, Names(("q", "v"))),
    ("target_modules", frozenset({"v", "q"}), Names(("q", "v"))),
    ("target_modules", Listing("v", "q"), Names(("q", "v"))),
    ("target_modules", {"q": 1, "v": 2}.keys(), Names(("q", "v"))),
    ("target_modules", np.array(["q", "v"]), Names(("q", "v"))),
    ("target_modules", np.str_("all-linear"), "all-linear"),
    ("modules_to_save", ("score",), ["score"]),
    ("modules_to_save", collections.deque(["score"]), ["score"]),
    ("exclude_modules", Listing("k"), Names(("k",))),
    ("layers_to_transform", range(3), [0, 1, 2]),
    ("layers_to_transform", np.arange(2), [0, 1]),
    ("layers_to_transform", torch.tensor([1, 2]), [1, 2]),
    ("layers_to_transform", np.int32(1), 1),
    ("layers_to_transform", 0, 0),
    ("rank_pattern", Table(q=np.int64(4)), {"q": 4}),
    ("rank_pattern", collections.OrderedDict(q=4), {"q": 4}),
    ("alpha_pattern", {"q": np.float32(0.5)}, {"q": 0.5}),
    ("trainable_token_indices", torch.tensor([3, 1]), [3, 1]),
    ("trainable_token_indices", Table(embed=range(2)), {"embed": [0, 1]}),
    ("base_model_name_or_path", Path("some") / "model", str(Path("some") / "model")),
    ("task_type", TaskType.CAUSAL_LM, "CAUSAL_LM"),
    ("task_type", "CAUSAL_LM", TaskType.CAUSAL_LM),
    ("auto_mapping", {"a": (np.int8(1), {2}), "b": Path("x"), "c": TaskType.SEQ_CLS}, {"a": [1, [2]], "b": "x", "c": "SEQ_CLS"}),
    ("seed", np.uint64(2**63), 2**63),
    ("runtime_config", {"ephemeral_gpu_offload": True}, LoraRuntimeConfig(ephemeral_gpu_offload=True)),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "held"), CONVERTED)
def test_values_of_other_libraries_are_held_as_pythons_own(name, value, held, tmp_path):
    config = LoraConfig(**{name: value})
    found = getattr(config, name)
    assert type(found) is type(held) or name == "task_type"
    assert found == held
    json.dumps(config.to_json_dict())
    config.save_pretrained(tmp_path)
    again = PeftConfig.from_pretrained(tmp_path)
    assert name == "runtime_config" or again == config  # what is of one run is not written
    assert (
        again == again and PromptTuningConfig(prompt_tuning_init="RANDOM").prompt_tuning_init is PromptTuningInit.RANDOM
    )


def test_a_list_that_goes_round_is_refused():
    endless: list[object] = []
    endless.append(endless)
    for name in ("target_modules", "auto_mapping"):
        with pytest.raises(ConfigError, match=f"`{name}` should be"):
            LoraConfig(**{name: endless})


def test_a_config_does_not_share_its_containers_with_the_caller():
    names, ranks = ["q"], {"q": 2}
    config = LoraConfig(target_modules=names, rank_pattern=ranks)
    names.append("v")
    ranks["v"] = 0
    assert config.target_modules == {"q"} and config.rank_pattern == {"q": 2}


def test_what_was_changed_in_place_is_checked_when_it_goes_into_a_model():
    config = LoraConfig(target_modules=["0"], rank_pattern={"0": 2})
    config.rank_pattern["0"] = "4"
    base = torch.nn.Sequential(torch.nn.Linear(3, 3))
    with pytest.raises(ConfigError, match=r"rank_pattern\['0'\] should be an integer"):
        get_peft_model(base, config)
    assert type(base[0]) is torch.nn.Linear


def test_messages_are_short_and_show_no_control_characters():
    for value in ("\x1b[31m" + "x" * 10**6, list(range(10**5)), torch.zeros(1000, 1000)):
        with pytest.raises(ConfigError) as raised:
            LoraConfig(r=value)
        assert len(str(raised.value)) < 400 and "\x1b" not in str(raised.value)


# -- annotations --------------------------------------------------------------------------------------------------------------
def accepts(annotation, value):
    try:
        return check_of(annotation)(plain(value))
    except Exception:
        return "refused"


@pytest.mark.parametrize(
    ("annotation", "value", "held"),
    [
        (tuple[int, int], [1, 2], (1, 2)),
        (tuple[int, int], [1], "refused"),
        (tuple[int, ...], [1, 2, 3], (1, 2, 3)),
        (list[tuple[int, int]], [[0, 2], (1, 3)], [(0, 2), (1, 3)]),
        (list[tuple[int, int]], [[0]], "refused"),
        (set[str], ["b", "a"], {"a", "b"}),
        (set[str] | list[str], {"b", "a"}, {"a", "b"}),
        (set[str] | list[str], ["b", "a"], ["b", "a"]),
        (list[str], {"b", "a"}, ["a", "b"]),
        (list[int], {10, 9}, [9, 10]),
        (list, ("a", 1), ["a", 1]),
        (dict, {"a": (1, 2)}, {"a": [1, 2]}),
        (dict[str, list[int]], {"a": {2, 1}}, {"a": [1, 2]}),
        (bool | str, "x", "x"),
        (bool | str, 1, True),
        (int | bool, 1, 1),
        (float | str, 3, 3),
        (int | str | None, None, None),
        (int | str, 1.5, "refused"),
        (Literal["a", 1, True], 1, 1),
        (Literal["a", 1], True, "refused"),
        (Literal["a", None], None, None),
        (TaskType, "CAUSAL_LM", TaskType.CAUSAL_LM),
        (TaskType, "x", "refused"),
        (Annotated[float, Least(0)], -0.5, "refused"),
        (Annotated[int, "a note"], 3, 3),
        (object, {"a": [1, {"b": None}]}, {"a": [1, {"b": None}]}),
        (object, lambda: 0, "refused"),
        ("what nobody knows", [1], [1]),
        (torch.dtype, torch.float16, torch.float16),
        (torch.dtype, "float16", "refused"),
    ],
)  # fmt: skip
def test_annotations(annotation, value, held):
    found = accepts(annotation, value)
    assert found == held and type(found) is type(held)


def test_annotations_in_words():
    assert said_of(list[str] | str | None) == "a list of (a string) or a string or None"
    assert said_of(dict[str, Annotated[int, Least(1)]]) == "a dictionary from (a string) to (an integer)"
    assert said_of(tuple[int, int]) == "a pair of (an integer)" and said_of(Literal["a", "b"]) == "'a' or 'b'"
    assert len(shown("x" * 10**6)) < 100


def test_an_annotation_that_cannot_be_evaluated_asks_for_a_storable_value_only():
    @dataclasses.dataclass
    class Mine(PeftConfig):
        known: int = 1
        unknown: OnlyForTypeCheckers = None  # noqa: F821

    assert annotations_of(Mine)["known"] is int and annotations_of(Mine)["unknown"] is object
    assert Mine(unknown=(1, 2)).unknown == [1, 2]
    with pytest.raises(ConfigError, match="Mine: `unknown` should be a value that can be stored"):
        Mine(unknown=object())


def test_checking_again_changes_nothing_and_warns_of_nothing():
    config = LoraConfig(r=4, target_modules={"q"}, task_type="CAUSAL_LM", rank_pattern={"q": 2})
    before = config.to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config.check()
    assert config.to_dict() == before
