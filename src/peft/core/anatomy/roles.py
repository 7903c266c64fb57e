"""Default targets by model type, for configs that name none. Data, by the role a module plays."""

from __future__ import annotations

from ...config import TunerConfig
from ...errors import NoMatchingPeftModuleError, near

_LLAMAS = ("llama", "mistral", "mixtral", "gemma", "gemma2", "gemma3_text", "llama4", "qwen2", "qwen3", "phi")


_FUSED = ("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon")


_BERTS = ("bert", "roberta", "xlm-roberta", "electra", "layoutlm")


_CLIPS = ("clip", "clip_text_model", "clip_vision_model")


_FFN_BLOCKS = (
    *(t for t in _LLAMAS if t != "llama4"),
    *("stablelm", "gpt2", "gpt_neox", "gpt_bigcode", "gptj", "gpt_neo", "falcon"),
)


# role -> [(module names, model types)]
ROLES: dict[str, list[tuple[list[str], tuple[str, ...]]]] = {
    "attention": [
        (["q", "v"], ("t5", "mt5")),
        ([r".*\.(q|v|q_proj|v_proj)"], ("blip-2",)),  # its language model is an OPT or a T5
        (["c_attn"], ("gpt2", "gpt_bigcode")),
        (["c_proj", "c_attn"], ("btlm",)),
        (["query_key_value"], _FUSED),
        (["query", "value"], _BERTS),
        (
            [r".*\.(query|value|q_proj|v_proj)"],
            ("vit", "dinov2", "segformer"),
        ),  # the first two until transformers renamed them
        (["query_proj", "value_proj"], ("deberta-v2",)),
        (["in_proj"], ("deberta",)),
        (["Wqkv"], ("mpt",)),
        (["qkv_proj"], ("codegen",)),
        (["q_proj", "v_proj", "fc1", "fc2"], ("phi",)),
        ([r".*language_model\..*\.(q_proj|v_proj)"], ("gemma4",)),
        (["q_proj", "k_proj", "v_proj", "o_proj"], ("nemotron_h",)),
        (["key", "value", "receptance", "output"], ("rwkv",)),
        (["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"], ("rwkv7",)),
        (["q_proj", "v_proj"], (*_LLAMAS, "bart", "opt", "gptj", "gpt_neo", "stablelm", "whisper", *_CLIPS)),
    ],
    "every_linear": [
        (["q", "k", "v", "o", "wi", "wo"], ("t5",)),
        (["q", "k", "v", "o", "wi_0", "wi_1", "wo"], ("mt5",)),
        (["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"], ("bart", "opt")),
        (["query", "key", "value", "dense"], ("roberta",)),
        (["query_proj", "key_proj", "value_proj", "dense"], ("deberta-v2",)),
    ],
    "keys_values_ffn": [
        (["k", "v", "wo"], ("t5",)),
        (["k", "v", "wi_1"], ("mt5",)),
        (["c_attn", "mlp.c_proj"], ("gpt2", "gpt_bigcode")),
        (["query_key_value", "mlp.dense_4h_to_h"], ("bloom",)),
        (["key", "value", "output.dense"], ("bert", "roberta")),
        (["key_proj", "value_proj", "output.dense"], ("deberta-v2",)),
        (["in_proj", "output.dense"], ("deberta",)),
        (["q_proj", "k_proj", "fc2"], ("opt",)),
        (["q_proj", "v_proj", "fc_out"], ("gptj",)),
        (["q_proj", "v_proj", "c_proj"], ("gpt_neo",)),
        (["q_proj", "v_proj", "fc2"], ("bart", "phi")),
        (["query_key_value", "dense_4h_to_h"], ("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon")),
        (["k_proj", "v_proj"], ("mixtral",)),  # its experts are stacked parameters
        (["k_proj", "v_proj", "down_proj"], ("llama", "mistral")),
        (["q_proj", "v_proj", "down_proj"], ("llama4", "gemma", "gemma2", "gemma3_text", "qwen2", "qwen3")),
    ],
    "ffn": [
        (["wo"], ("t5",)),
        ([], ("mt5",)),
        (["mlp.c_proj"], ("gpt2", "gpt_bigcode")),
        (["mlp.dense_4h_to_h"], ("bloom",)),
        (["output.dense"], ("bert", "roberta", "deberta-v2", "deberta")),
        (["fc2"], ("opt", "bart", "phi")),
        (["fc_out"], ("gptj",)),
        (["c_proj"], ("gpt_neo",)),
        (["dense_4h_to_h"], ("gpt_neox", "RefinedWebModel", "RefinedWeb", "falcon")),
        ([], ("mixtral",)),
        (["down_proj"], tuple(t for t in _LLAMAS if t != "mixtral")),
    ],
    "norms": [
        (["input_layernorm", "post_attention_layernorm", "norm"], ("llama", "mistral", "gemma")),
        (["input_layernorm", "post_attention_layernorm", "ln_f"], ("bloom",)),
        ([r"(.*\.)?(input_layernorm|post_attention_layernorm|ln_attn|ln_mlp|ln_f)"], ("falcon",)),
        (["layer_norm", "final_layer_norm"], ("t5", "mt5")),
        (["self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"], ("bart",)),
        (["ln_1", "ln_2", "ln_f"], ("gpt2",)),
        (["ln_1", "ln_f"], ("gptj",)),
        (["layernorm", "LayerNorm", "final_layer_norm", "self_attn_layer_norm"], ("blip-2",)),
        (["input_layernorm", "final_layernorm"], ("phi",)),
        (["post_attention_layernorm"], ("qwen2", "qwen3")),
        (["LayerNorm"], ("bert", "roberta", "electra", "xlm-roberta")),
        (
            [
                "input_layernorm",
                "post_attention_layernorm",
                "pre_feedforward_layernorm",
                "post_feedforward_layernorm",
                "norm",
            ],
            ("gemma2", "gemma3_text"),
        ),
    ],
    # modules whose output is the FFN's, before the residual: where bottleneck adapters sit
    "mlps": [
        (["mlp"], (*_FFN_BLOCKS, "vit")),
        (["feed_forward"], ("llama4",)),
        (["dense_4h_to_h"], ("bloom",)),
        (["DenseReluDense"], ("t5", "mt5")),
        ([r"(.*\.)?layer\.\d+\.output\.dense"], (*_BERTS, "deberta", "deberta-v2")),
        (["fc2"], ("opt", "bart")),
    ],
    # the same, where one module holds the whole FFN, from the input of its first layer to the output of its last
    "mlp_blocks": [
        (["mlp"], (*_FFN_BLOCKS, "vit")),
        (["feed_forward"], ("llama4",)),
        (["DenseReluDense"], ("t5", "mt5")),
    ],
    # the FFN's output, and the projection that ends each attention
    "attention_and_mlps": [
        (["o_proj", "mlp"], (*(t for t in _LLAMAS if t not in ("phi", "llama4")), "stablelm", "vit")),
        (["o_proj", "feed_forward"], ("llama4",)),
        (["self_attn.dense", "mlp"], ("phi",)),
        (["attn.c_proj", "mlp"], ("gpt2", "gpt_bigcode")),
        (["attention.dense", "mlp"], ("gpt_neox",)),
        (["attn.out_proj", "mlp"], ("gptj",)),
        (["attention.out_proj", "mlp"], ("gpt_neo",)),
        (["self_attention.dense", "mlp"], ("falcon",)),
        (["self_attention.dense", "dense_4h_to_h"], ("bloom",)),
        ([r".*\.(SelfAttention|EncDecAttention|DenseReluDense)"], ("t5", "mt5")),
        ([r"(.*\.)?layer\.\d+\.(attention\.)?output\.dense"], (*_BERTS, "deberta", "deberta-v2")),
        ([r".*(attn\.out_proj|\.fc2)"], ("opt", "bart")),
    ],
    # whole blocks, whose output is the residual stream
    "blocks": [
        ([r"(.*\.)?layers\.\d+"], (*_LLAMAS, "opt", "bart", "gpt_neox", "stablelm", "vit")),
        ([r"(.*\.)?h\.\d+"], ("gpt2", "gpt_bigcode", "gptj", "gpt_neo", "bloom", "falcon", "codegen")),
        ([r"(.*\.)?layer\.\d+"], (*_BERTS, "deberta", "deberta-v2")),
        ([r"(.*\.)?block\.\d+"], ("t5", "mt5")),
    ],
}


def default_targets(
    role: str, model_type: str | None, method: str, asked: str = "`target_modules` in `peft_config`"
) -> list[str] | str:
    """The modules that play `role` in a model type; a single entry with regex characters is returned as a regex.

    asked: for the message where nothing is known of the type, the field that then has to be stated.
    """
    for chain in (role, "attention") if role == "every_linear" else (role,):
        for names, types in ROLES[chain]:
            if model_type in types:
                return names[0] if len(names) == 1 and "\\" in names[0] else list(names)
    known = sorted({t for _, types in ROLES[role] for t in types})
    raise NoMatchingPeftModuleError(
        f"Please specify {asked}: {method} has no default for model type {model_type!r}."
        f"{near(str(model_type), known)} Known model types: {', '.join(known)}."
    )


def fill_targets(config: TunerConfig, role: str, model_type: str | None, method: str) -> None:
    """What a role targets in a model of this type, into a config that names nothing."""
    if config.names_no_target:
        config.target_modules = default_targets(role, model_type, method)
