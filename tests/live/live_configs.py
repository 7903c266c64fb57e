"""The fields of the configs that both libraries have, each with a value off its default.

`START` gives what a config needs to be made at all, `OFF` a value for each field (and what must stand beside it for the
field to matter), `SILENT` the fields that change nothing, with the reason. Imported by both libraries' processes.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass, field
from typing import Any

Fields = dict[str, Any]


@dataclass
class Off:
    """A value off the default. beside: other fields, in both configs that are compared; along: in the changed one alone.
    base: the model of `live_cases`."""

    value: Any
    beside: Fields = field(default_factory=dict)
    base: str = ""
    along: Fields = field(default_factory=dict)


QV = {"target_modules": ["q_proj", "v_proj"]}
LORA = {"r": 3, "lora_alpha": 6, **QV}
PROMPT = {"num_virtual_tokens": 3, "task_type": "CAUSAL_LM"}
SOURCE = {"prompt_tuning_init": "EXACT_SOURCE_TASK", "prompt_tuning_init_state_dict_path": "<source>"}
TEXT = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a b c", "tokenizer_name_or_path": "<tokenizer>"}

START: dict[str, Fields] = {
    "LoraConfig": LORA,
    "AdaLoraConfig": {"init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 1, "lora_alpha": 6, **QV},
    "LoHaConfig": {"r": 3, **QV},
    "LoKrConfig": {"r": 1, **QV},
    "VeraConfig": {"r": 4, **QV},
    "OFTConfig": {"oft_block_size": 4, **QV},
    "BOFTConfig": {"boft_block_size": 4, **QV},
    "HRAConfig": {"r": 4, **QV},
    "IA3Config": {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LNTuningConfig": {"target_modules": ["input_layernorm"]},
    "TrainableTokensConfig": {"token_indices": [1, 4], "target_modules": ["embed_tokens"]},
    "PromptTuningConfig": PROMPT,
    "PromptEncoderConfig": {**PROMPT, "encoder_hidden_size": 8},
    "PrefixTuningConfig": PROMPT,
    "MultitaskPromptTuningConfig": PROMPT,
}

EVERY: Fields = {"task_type": "FEATURE_EXTRACTION", "inference_mode": True}
TUNER: Fields = {
    "target_modules": ["k_proj"],
    "exclude_modules": ["layers.0.self_attn.q_proj"],
    "modules_to_save": ["lm_head"],
    "layers_to_transform": [1],
    # in T5's `block.0.layer.1` the first number counts without a pattern, the second with this one
    "layers_pattern": Off("layer", {"layers_to_transform": [0], "target_modules": ["q", "wi"]}, "t5"),
    "bias": "all",
}
PATTERNS: Fields = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 3}}
LYCORIS: Fields = {
    **{k: v for k, v in TUNER.items() if k != "bias"},
    **PATTERNS,
    "r": 2,
    "alpha": 5,
    "rank_dropout": 0.4,
    "module_dropout": 0.9,
    "use_effective_conv2d": Off(True, {"target_modules": ["site"]}, "conv2d"),
    "init_weights": False,
}
PROMPTS: Fields = {
    "num_virtual_tokens": 4,
    "token_dim": 12,
    "num_transformer_submodules": 2,
    "modules_to_save": ["lm_head"],
}
LSTM = {"encoder_reparameterization_type": "LSTM"}

OFF: dict[str, Fields] = {
    "LoraConfig": {
        **TUNER,
        **PATTERNS,
        "r": 2,
        "lora_alpha": 5,
        "lora_dropout": 0.4,
        "use_rslora": True,
        "use_dora": True,
        "lora_bias": True,
        "init_lora_weights": "gaussian",
        "target_parameters": ["up_proj.weight"],
        "trainable_token_indices": [1, 4],
        "ensure_weight_tying": Off(True, {"modules_to_save": ["embed_tokens"]}, "llama_tied"),
    },
    "AdaLoraConfig": {
        **TUNER,
        "lora_alpha": 5,
        "lora_dropout": 0.4,
        "init_lora_weights": False,
        "target_parameters": ["up_proj.weight"],
        "trainable_token_indices": [1, 4],
        "ensure_weight_tying": Off(True, {"modules_to_save": ["embed_tokens"]}, "llama_tied"),
        "target_r": 1,
        "init_r": 5,
        "tinit": 2,
        "tfinal": 3,
        "deltaT": 2,
        "beta1": 0.1,
        "beta2": 0.1,
        "orth_reg_weight": 0.1,
        "total_step": 9,
    },
    "LoHaConfig": LYCORIS,
    "LoKrConfig": {
        **LYCORIS,
        "decompose_both": True,
        "decompose_factor": 2,
        "rank_dropout_scale": Off(True, {"rank_dropout": 0.4}),
        "use_effective_conv2d": Off(True, {"target_modules": ["site"]}, "conv2d"),
    },
    "VeraConfig": {
        **{k: v for k, v in TUNER.items() if k != "exclude_modules"},
        "r": 5,
        "projection_prng_key": 3,
        "save_projection": False,
        "vera_dropout": 0.4,
        "d_initial": 0.4,
        "init_weights": False,
    },
    "OFTConfig": {
        **TUNER,
        "r": Off(2, along={"oft_block_size": 0}),
        "oft_block_size": 8,
        "module_dropout": 0.5,
        "init_weights": False,
        "coft": True,
        "eps": Off(0.01, {"coft": True}),
        "block_share": True,
        "use_cayley_neumann": False,
        "num_cayley_neumann_terms": 3,
    },
    "BOFTConfig": {
        **TUNER,
        "boft_block_size": 8,
        "boft_block_num": Off(2, along={"boft_block_size": 0}),
        "boft_n_butterfly_factor": 2,
        "boft_dropout": 0.5,
        "init_weights": False,
    },
    "HRAConfig": {**TUNER, "r": 2, "apply_GS": True, "init_weights": False},
    "IA3Config": {
        "target_modules": Off(["k_proj"], {"feedforward_modules": []}),
        "exclude_modules": ["layers.0.mlp.down_proj"],
        "modules_to_save": ["lm_head"],
        "feedforward_modules": [],
        "init_ia3_weights": False,
    },
    "LNTuningConfig": {
        "target_modules": ["norm"],
        "exclude_modules": ["layers.0.input_layernorm"],
        "modules_to_save": ["lm_head"],
    },
    "TrainableTokensConfig": {"target_modules": ["lm_head"], "token_indices": [2, 3], "init_weights": False},
    "PromptTuningConfig": {
        **PROMPTS,
        "prompt_tuning_init": "SAMPLE_VOCAB",
        "prompt_tuning_init_text": Off("c b a", TEXT),
        "tokenizer_name_or_path": Off("<tokenizer>/second", TEXT),
        "tokenizer_kwargs": Off({"subfolder": "second"}, TEXT),
    },
    "PromptEncoderConfig": {
        **PROMPTS,
        "encoder_reparameterization_type": "LSTM",
        "encoder_hidden_size": 6,
        "encoder_num_layers": Off(1, LSTM),
        "encoder_dropout": Off(0.4, LSTM),
    },
    "PrefixTuningConfig": {
        **PROMPTS,
        "num_attention_heads": 3,
        "num_layers": 1,
        "init_weights": "zero",
        "encoder_hidden_size": Off(6, {"prefix_projection": True, "encoder_hidden_size": 8}),
        "prefix_projection": Off(True, {"encoder_hidden_size": 8}),
    },
    "MultitaskPromptTuningConfig": {
        **PROMPTS,
        "prompt_tuning_init": Off("ONLY_SOURCE_SHARED", SOURCE),
        "prompt_tuning_init_text": Off("c b a", TEXT),
        "tokenizer_name_or_path": Off("<tokenizer>/second", TEXT),
        "tokenizer_kwargs": Off({"subfolder": "second"}, TEXT),
        "prompt_tuning_init_state_dict_path": Off("<source two>", SOURCE),
        "prompt_tuning_init_task": Off(1, SOURCE),
        "num_ranks": 2,
        "num_tasks": 2,
    },
}
for found in OFF.values():
    for name, value in EVERY.items():
        found.setdefault(name, value)

RECORD = "a record of where the adapter came from; nothing reads it to build a model"
ADALORA = "upstream's AdaLoRA has no use for it either: the rank is init_r, with one alpha for all"
LAYOUT = "says how the base layer stores its weight, which is read from the layer itself"
SIZES = "the size of a prefix's keys; prompts before the input have none"
SILENT: dict[str, str] = {
    "peft_type": "follows from the class",
    "auto_mapping": RECORD,
    "peft_version": RECORD,
    "base_model_name_or_path": RECORD,
    "revision": RECORD,
    "fan_in_fan_out": LAYOUT,
    "megatron_core": "where megatron is imported from; megatron_config, which asks for it, is refused",
    "qalora_group_size": "of use_qalora, which is refused",
    "runtime_config": "never saved; offloaded base weights are brought to the device on reading anyway",
    **{f"AdaLoraConfig.{n}": ADALORA for n in ("r", "use_rslora", "lora_bias", "alpha_pattern", "use_dora")},
    "AdaLoraConfig.rank_pattern": "filled in by the pruning, and read with the weights that it left",
    **{f"{c}Config.num_layers": SIZES for c in ("PromptTuning", "PromptEncoder", "MultitaskPromptTuning")},
    **{f"{c}Config.num_attention_heads": SIZES for c in ("PromptTuning", "PromptEncoder", "MultitaskPromptTuning")},
}
SILENT["AdaLoraConfig.use_dora"] = "takes effect here; upstream's AdaLoRA refuses it"


def off(cls: str, name: str) -> Off:
    value = OFF[cls][name]
    return value if isinstance(value, Off) else Off(value)


def variants() -> dict[str, tuple[str, Fields]]:
    """Name -> (class, fields) of every config that is exchanged: the start, and each field off its default."""
    found: dict[str, tuple[str, Fields]] = {}
    for cls, start in START.items():
        found[cls] = (cls, start)
        for name in OFF[cls]:
            o = off(cls, name)
            found[f"{cls}.{name}"] = (cls, {**start, **o.beside, **o.along, name: o.value})
    return found


def plain(value: Any) -> Any:
    """As JSON has it, names in one order: upstream keeps some lists as sets."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [plain(v) for v in value]
        return sorted(items) if all(isinstance(v, str) for v in items) else items
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if dataclasses.is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    json.dumps(value)
    return value


def values(config: Any) -> Fields:
    return {f.name: plain(getattr(config, f.name)) for f in dataclasses.fields(config)}


def defaults(cls: type) -> Fields:
    """Of every field, or `required` where it has none."""
    out = {}
    for f in dataclasses.fields(cls):
        made = f.default_factory is not dataclasses.MISSING
        given = f.default_factory() if made else f.default
        out[f.name] = "required" if given is dataclasses.MISSING else plain(given)
    return out
