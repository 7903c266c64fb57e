"""What is exchanged with huggingface/peft: tiny base models, and one `Case` per adapter that is saved on one side and
loaded on the other. Imported by both libraries' processes, so it knows neither.

The models have no files: their weights follow from the names of their parameters, so that both sides have the same ones
(the workers' digests of them are compared).
"""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

HERE, UPSTREAM = "here", "upstream"
VOCAB, D = 40, 16

# -- base models --------------------------------------------------------------------------------------------------------------
SMALL = {"vocab_size": VOCAB, "hidden_size": D, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 64}
NONE = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
MOE = {**LLAMA, **NONE, "num_key_value_heads": 2, "head_dim": 4}


def llama(**more: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, **NONE, num_key_value_heads=2, attention_bias=True, **more))


def gpt2() -> nn.Module:
    sizes = {"vocab_size": VOCAB, "n_embd": D, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **NONE))


def opt() -> nn.Module:
    more = {"ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": D}
    return tf.OPTForCausalLM(tf.OPTConfig(**SMALL, **more, **NONE))


def gemma() -> nn.Module:
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA, **more, **NONE, attn_implementation="eager"))


def t5() -> nn.Module:
    sizes = {"d_model": D, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": VOCAB}
    ids = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **ids, dropout_rate=0.0))


def bert(head: str, **more: Any) -> nn.Module:
    config = tf.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=64, **more)
    return getattr(tf, head)(config)


def moe(family: str, **more: Any) -> nn.Module:
    config = getattr(tf, f"{family}{'Text' if family == 'Llama4' else ''}Config")(**{**MOE, **more})
    config._attn_implementation = config._experts_implementation = "eager"
    return getattr(tf, f"{family}ForCausalLM")(config)


class Holder(nn.Module):
    """One layer called `site`, a nonlinearity, and a head."""

    def __init__(self, site: nn.Module, width: int) -> None:
        super().__init__()
        self.site = site
        self.head = nn.Linear(width, 5)
        self.attends = isinstance(site, nn.MultiheadAttention)
        self.kernel = isinstance(site, (nn.Conv1d, nn.Conv2d, nn.Conv3d))

    def forward(self, x: Tensor) -> Tensor:
        y = self.site(x, x, x)[0] if self.attends else self.site(x)
        return self.head(torch.tanh(y.flatten(2).transpose(1, 2) if self.kernel else y))


BASES: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "gpt2": gpt2,
    "opt": opt,
    "gemma2": gemma,
    "t5": t5,
    "bert_cls": lambda: bert("BertForSequenceClassification", num_labels=3),
    "bert_tok": lambda: bert("BertForTokenClassification", num_labels=3),
    "bert_qa": lambda: bert("BertForQuestionAnswering"),
    "bert": lambda: bert("BertModel"),
    "mixtral": lambda: moe("Mixtral", num_local_experts=3, num_experts_per_tok=2),
    "qwen3_moe": lambda: moe("Qwen3Moe", moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: moe("GptOss", num_local_experts=3, num_experts_per_tok=2),
    "llama4": lambda: moe(
        "Llama4", intermediate_size_mlp=24, num_local_experts=3, num_experts_per_tok=1, interleave_moe_layer_step=1
    ),
    "linear": lambda: Holder(nn.Linear(16, 12), 12),
    "conv1d": lambda: Holder(nn.Conv1d(8, 12, 3, padding=1), 12),
    "conv2d": lambda: Holder(nn.Conv2d(8, 12, 3, padding=1, stride=2), 12),
    "conv2d_point": lambda: Holder(nn.Conv2d(8, 12, 1), 12),
    "conv2d_grouped": lambda: Holder(nn.Conv2d(8, 12, 3, groups=2), 12),
    "conv3d": lambda: Holder(nn.Conv3d(4, 12, 2), 12),
    "embedding": lambda: Holder(nn.Embedding(VOCAB, 16), 16),
    "mha": lambda: Holder(nn.MultiheadAttention(16, 4, batch_first=True), 16),
}
TASKS = {
    "llama": "CAUSAL_LM",
    "llama_tied": "CAUSAL_LM",
    "gpt2": "CAUSAL_LM",
    "opt": "CAUSAL_LM",
    "gemma2": "CAUSAL_LM",
    "mixtral": "CAUSAL_LM",
    "qwen3_moe": "CAUSAL_LM",
    "gpt_oss": "CAUSAL_LM",
    "llama4": "CAUSAL_LM",
    "t5": "SEQ_2_SEQ_LM",
    "bert_cls": "SEQ_CLS",
    "bert_tok": "TOKEN_CLS",
    "bert_qa": "QUESTION_ANS",
    "bert": "FEATURE_EXTRACTION",
}
SHAPES = {
    "conv1d": (2, 8, 6),
    "conv2d_point": (2, 8, 5, 5),
    "conv3d": (2, 4, 3, 3, 3),
    "mha": (2, 5, 16),
    "linear": (7, 16),
}


def build(name: str) -> nn.Module:
    """A base model whose weights follow from the names of its parameters."""
    model = BASES[name]().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            drawn = torch.randn(p.shape, generator=torch.Generator().manual_seed(zlib.crc32(path.encode())))
            p.copy_(drawn * 0.25 if p.dim() > 1 else 0.1 * drawn + (0 if path.endswith("bias") else 0.7))
    return model


def digest(model: nn.Module) -> int:
    """A number of all weights, to the bit."""
    total = 0
    for name, p in model.named_parameters():
        total = zlib.crc32(p.detach().numpy().tobytes(), zlib.crc32(name.encode(), total))
    return total


def inputs(name: str) -> dict[str, Tensor]:
    """ids[2, 7] and a mask (padded on the left for causal models, else on the right); an array for the single layers."""
    rng = torch.Generator().manual_seed(7)
    if name not in TASKS:
        if name == "embedding":
            return {"x": torch.arange(VOCAB).view(2, -1)}
        return {"x": torch.randn(SHAPES.get(name, (2, 8, 5, 5)), generator=rng)}
    ids = torch.randint(1, VOCAB, (2, 7), generator=rng)
    ids[1, :] = torch.arange(7) + 1  # the tokens that cases train are among them
    mask = torch.ones_like(ids)
    pad = slice(0, 2) if TASKS[name] == "CAUSAL_LM" else slice(-2, None)
    ids[0, pad], mask[0, pad] = 0, 0
    more = {"labels": torch.randint(1, VOCAB, (2, 4), generator=rng)} if name == "t5" else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def output(found: Any) -> Tensor:
    """What is compared: logits, span starts, or hidden states."""
    if torch.is_tensor(found):
        return found
    return next(
        getattr(found, k)
        for k in ("logits", "start_logits", "last_hidden_state")
        if getattr(found, k, None) is not None
    )


# -- cases ----------------------------------------------------------------------------------------------------------------------
Config = dict[str, Any]
Tensors = dict[str, Tensor]


ROWS = {
    "IA3Config": "IA3",
    "AdaLoraConfig": "AdaLoRA, pruned ranks too",
    "LoHaConfig": "LoHa",
    "LoKrConfig": "LoKr",
    "VeraConfig": "VeRA",
    "OFTConfig": "OFT",
    "BOFTConfig": "BOFT",
    "HRAConfig": "HRA",
    "LNTuningConfig": "LN tuning",
    "TrainableTokensConfig": "trainable tokens",
    "PromptTuningConfig": "prompt tuning",
    "PromptEncoderConfig": "P-tuning",
    "PrefixTuningConfig": "prefix tuning",
    "MultitaskPromptTuningConfig": "multitask prompt tuning",
}


@dataclass(frozen=True)
class Case:
    """One adapter, made and saved on one side, loaded on the other."""

    name: str
    base: str
    config: str  # a config class
    fields: Config = field(default_factory=dict)
    also: Config | None = None  # fields of a second adapter, "other", in the same folder
    steps: str = ""  # what happens before saving: a function of the worker
    options: Config = field(default_factory=dict)  # for `steps`
    save: Config = field(default_factory=dict)  # for save_pretrained
    selected: str = ""  # the adapter that is saved, where it is not `default`
    ways: tuple[tuple[str, str], ...] = ((UPSTREAM, HERE), (HERE, UPSTREAM))  # (maker, reader)
    alter: Callable[[Config, Tensors, str], tuple[Config, Tensors]] | None = None  # the files on their way, by maker
    as_bin: bool = False  # … and written by torch.save
    merged: bool = False  # compare what merging gives
    tasks: bool = False  # pass task_ids
    warns: dict[str, str] = field(default_factory=dict)  # reader -> regex of what it says
    apart: bool = False  # the two sides must differ: a test of its own says how
    strange: bool = False  # the altered files are another adapter than the maker's: compare what the two sides read
    refused: dict[str, str] = field(default_factory=dict)  # reader -> regex of its error
    weak: bool = False  # nothing is drawn: what the maker's own start gives
    why: str = ""  # of an exception: what each side computes, and which of them is right

    @property
    def row(self) -> str:
        """Where it stands in the guide's table."""
        special = {"old": "files of earlier versions", "weighted": "weighted adapters, saved"}
        first = self.name.split()[0]
        if first in special:
            return special[first]
        if self.config == "LoraConfig":
            kinds = {"DoRA": "dora", "converted PiSSA, OLoRA": "converted", "experts": "expert", "convolutions": "conv"}
            return "LoRA" + next((f", {k}" for k, word in kinds.items() if word in self.name), "")
        return ROWS[self.config]

    @property
    def adapters(self) -> tuple[str, ...]:
        return ("default",) if self.also is None else ("default", "other")


QV = {"target_modules": ["q_proj", "v_proj"]}
SITE = {"target_modules": ["site"]}
LORA = {"r": 3, "lora_alpha": 5}
EXPERTS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def lora() -> list[Case]:
    def case(name: str, base: str = "llama", fields: Config | None = None, **more: Any) -> Case:
        given = {**LORA, **(QV if base.startswith("llama") and base != "llama4" else SITE if base not in TASKS else {})}
        return Case(f"lora {name}", base, "LoraConfig", {**given, **(fields or {})}, **more)

    yes: dict[str, Any] = {"use_dora": True}
    # the ends of a tied weight share a pair, which is written once here; upstream looks for it twice, and shares it as well
    once = {UPSTREAM: "missing adapter keys while loading the checkpoint: ..base_model.model.lm_head.lora_A"}
    gpt = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    found = [
        case("plain"),
        case("default targets", fields={"target_modules": None}),
        case("rank and alpha patterns", fields={
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"q_proj": 2, r"^model\.layers\.1\.mlp\.down_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.v_proj": 7, ".*down_proj": 2},
        }),
        case("rslora", fields={"use_rslora": True}),
        case("rslora patterns", fields={"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}}),
        case("dora", fields=yes),
        case("dora gpt2", "gpt2", {**gpt, **yes}),
        case("dora conv1d", "conv1d", yes),
        case("dora conv2d", "conv2d", yes),
        case("dora conv3d", "conv3d", yes),
        case("dora embedding", "embedding", yes),
        case("dora patterns", fields={**yes, "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
        case("bias all", fields={"bias": "all"}),
        case("bias lora_only", fields={"bias": "lora_only"}),
        case("bias all, head", "bert_cls", {"target_modules": ["query", "value"], "bias": "all"}),
        case("lora_bias", fields={"lora_bias": True}),
        case("lora_bias conv2d", "conv2d", {"lora_bias": True}),
        case("gpt2", "gpt2", gpt),
        case("gpt2 bias all", "gpt2", {**gpt, "bias": "all"}),
        case("opt", "opt", {"target_modules": ["q_proj", "fc1"]}),
        case("seq2seq", "t5", {"target_modules": ["q", "v", "wo"]}),
        case("classifier", "bert_cls"),
        case("token classifier", "bert_tok"),
        case("question answering", "bert_qa"),
        case("features", "bert", {"target_modules": ["query", "dense"]}),
        case("modules_to_save head", fields={"modules_to_save": ["lm_head"]}),
        case("modules_to_save norm", fields={"modules_to_save": ["input_layernorm", "model.norm"]}),
        case("modules_to_save embedding, tied", "llama_tied", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
        case("modules_to_save embedding", fields={"modules_to_save": ["embed_tokens"]}),
        case("trainable tokens list", fields={"trainable_token_indices": [1, 4, 2]}),
        case("trainable tokens dict", fields={"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [5]}}),
        case("trainable tokens tied", "llama_tied", {"trainable_token_indices": [1, 4]}),
        case("trainable tokens tied, both named", "llama_tied", {
            "trainable_token_indices": {"embed_tokens": [1, 4], "lm_head": [1, 4]}, "ensure_weight_tying": True,
        }),
        case("trainable tokens gpt2", "gpt2", {**gpt, "trainable_token_indices": [2, 6]}),
        case("embedding", "embedding"),
        case("embedding of a model", fields={"target_modules": ["q_proj", "embed_tokens"]}),
        case("embedding and head", fields={"target_modules": ["q_proj", "embed_tokens", "lm_head"]}),
        case("embedding, tied", "llama_tied", {"target_modules": ["q_proj", "embed_tokens"]}),
        case("embedding, shared pair", "llama_tied", {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
             warns=once),
        case("embedding, shared pair, patterns", "llama_tied", {
            "target_modules": ["q_proj", "embed_tokens", "lm_head"], "ensure_weight_tying": True,
            "rank_pattern": {"embed_tokens": 2, "lm_head": 2}, "alpha_pattern": {"embed_tokens": 3, "lm_head": 3},
        }, warns=once),
        case("head, tied", "llama_tied", {"target_modules": ["q_proj", "lm_head"]}),
        case("whole embeddings", save={"save_embedding_layers": True}),
        case("conv1d", "conv1d"),
        case("conv2d", "conv2d"),
        case("conv2d 1x1", "conv2d_point"),
        case("conv3d", "conv3d"),
        case("conv2d grouped", "conv2d_grouped", {"r": 4}, refused={HERE: "size mismatch", UPSTREAM: "size mismatch"},
             why="Here A[r, fan_in] spans one group's inputs, so that B A is a weight of the grouped convolution; upstream's "
             "A reads all inputs and B is grouped: two convolutions whose composition no grouped weight gives, and which "
             "upstream itself cannot merge."),
        case("attention, input projection", "mha", steps="without_output_projection"),
        case("attention", "mha", alter=move_attention,
             why="The output projection computes W + ΔW here, the formula of LoRA. Upstream puts W + ΔW into a layer whose own "
             "wrapper has added ΔW already: forward and merge are those of W + 2ΔW, as the test with explicit weights shows. "
             "Doubling (from upstream) or halving (to upstream) that lora_B moves a checkpoint."),
        case("attention, not moved", "mha", apart=True, why="As the case before, with the files as they are: upstream gives the outputs of W + 2ΔW, this library those of W + ΔW."),
        case("layers_to_transform", fields={"layers_to_transform": [1]}),
        case("layers_pattern", fields={"layers_to_transform": 0, "layers_pattern": "layers"}),
        case("layers_pattern, inner", "t5", {"layers_to_transform": [0], "layers_pattern": "layer", "target_modules": ["q", "wi"]}),
        case("layers_to_transform, blocks", "t5", {"layers_to_transform": [1], "target_modules": ["q", "wi"]}),
        case("exclude_modules", fields={"exclude_modules": ["layers.0.self_attn.q_proj"]}),
        case("exclude_modules regex", fields={"exclude_modules": r".*layers\.1.*v_proj"}),
        case("regex", fields={"target_modules": r".*\.layers\.\d+\.mlp\.(up|down)_proj"}),
        case("all-linear", fields={"target_modules": "all-linear"}),
        case("all-linear gpt2", "gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
        case("all-linear classifier", "bert_cls", {"target_modules": "all-linear"}),
        case("all-linear mixtral", "mixtral", {"target_modules": "all-linear"}),
        case("gaussian", fields={"init_lora_weights": "gaussian"}),
        case("orthogonal", fields={"init_lora_weights": "orthogonal", "r": 4}),
        case("random", fields={"init_lora_weights": False}, weak=True),
        case("pissa", fields={"init_lora_weights": "pissa"}),
        case("olora", fields={"init_lora_weights": "olora"}),
        case("pissa rslora", fields={"init_lora_weights": "pissa", "use_rslora": True}),
        case("pissa converted", fields={"init_lora_weights": "pissa"}, steps="converted"),
        case("olora converted", fields={"init_lora_weights": "olora"}, steps="converted"),
        case("pissa converted, patterns", fields={
            "init_lora_weights": "pissa", "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9},
        }, steps="converted"),
        case("pissa converted, rslora", fields={"init_lora_weights": "pissa", "use_rslora": True}, steps="converted"),
        case("two adapters", also={**LORA, "target_modules": ["k_proj"], "use_rslora": True, "r": 2}),
        case("two adapters, one with a head", also={**LORA, **QV, "modules_to_save": ["lm_head"]}),
        case(".bin", save={"safe_serialization": False}),
        case("parameter of a layer", fields={"target_modules": [], "target_parameters": ["q_proj.weight", "mlp.up_proj.weight"]}),
    ]  # fmt: skip
    for family in ("mixtral", "qwen3_moe", "gpt_oss", "llama4"):
        found.append(case(f"experts {family}", family, EXPERTS))
    for parameter in EXPERTS["target_parameters"]:
        found.append(case(f"experts, {parameter[8:]} alone", "mixtral", {**EXPERTS, "target_parameters": [parameter]}))
    found.append(
        case(
            "experts and attention",
            "mixtral",
            {**EXPERTS, "target_modules": ["q_proj"], "rank_pattern": {"experts.down_proj": 2}},
        )
    )
    return found


COMBINED: dict[str, Config] = {
    "cat": {},
    "svd": {},
    "svd, rank 3": {"combination_type": "svd", "svd_rank": 3},
    "svd, clamp": {"combination_type": "svd", "svd_clamp": 0.9},
    "linear": {},
    "ties": {"density": 0.5},
    "ties, frequency": {"combination_type": "ties", "density": 0.6, "majority_sign_method": "frequency"},
    "ties_svd": {"density": 0.5},
    "magnitude_prune": {"density": 0.4},
    "magnitude_prune_svd": {"density": 0.4},
    "dare_linear": {"density": 1.0},
    "dare_linear_svd": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "dare_ties_svd": {"density": 1.0},
}


def weighted() -> list[Case]:
    """`add_weighted_adapter`: the result is saved alone."""
    found = []
    for name, options in COMBINED.items():
        given = {"combination_type": name, **options}
        also = {**LORA, **QV, "lora_alpha": 2}
        more = {"also": also, "steps": "combined", "options": given, "selected": "new"}
        found.append(Case(f"weighted {name}", "llama", "LoraConfig", {**LORA, **QV}, **more))
    more = {"also": {**QV, "r": 2, "use_rslora": True}, "steps": "combined", "selected": "new"}
    given = {**LORA, **QV, "rank_pattern": {"q_proj": 4}}
    for name in ("cat", "svd"):
        found.append(
            Case(f"weighted {name}, patterns", "llama", "LoraConfig", given, options={"combination_type": name}, **more)
        )
    more["also"] = IA3
    found.append(Case("weighted IA3", "llama", "IA3Config", IA3, **more))
    return found


IA3 = {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}


def additive() -> list[Case]:
    def adalora(name: str, base: str = "llama", fields: Config | None = None, **more: Any) -> Case:
        given = {"init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 2, "lora_alpha": 6}
        given |= QV if base == "llama" else {}
        return Case(f"adalora {name}", base, "AdaLoraConfig", {**given, **(fields or {})}, **more)

    def of(config: str, name: str, base: str = "llama", **fields: Any) -> Case:
        targets = (
            {"target_modules": ["q_proj", "v_proj", "down_proj"]}
            if base == "llama"
            else SITE
            if base not in TASKS
            else {}
        )
        return Case(f"{config.removesuffix('Config').lower()} {name}", base, config, {**targets, **fields})

    found = [
        adalora("before pruning"),
        adalora("pruned", steps="pruned"),
        adalora(
            "pruned gpt2", "gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}, steps="pruned"
        ),
        adalora("pruned conv2d", "conv2d", SITE, steps="pruned"),
        adalora("pruned, head", "bert_cls", {"target_modules": ["query", "value"]}, steps="pruned"),
        adalora("bias all", fields={"bias": "all"}),
        of("LoHaConfig", "plain", r=3, alpha=5),
        of("LoHaConfig", "patterns", r=3, alpha=5, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7}),
        of("LoKrConfig", "full", r=8, alpha=5),
        of("LoKrConfig", "low rank", r=1, alpha=3),
        of("LoKrConfig", "both low", r=1, alpha=3, decompose_both=True),
        of("LoKrConfig", "factor", r=1, alpha=3, decompose_factor=2),
        of("LoKrConfig", "factor, both low", r=1, decompose_factor=4, decompose_both=True),
        of("LoKrConfig", "lycoris start", r=1, alpha=3, init_weights="lycoris"),
        of("LoKrConfig", "patterns", r=1, alpha=5, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7}),
    ]
    for config in ("LoHaConfig", "LoKrConfig"):
        for base in ("conv1d", "conv2d", "conv2d_point", "conv2d_grouped"):
            for effective in (False, True):
                if effective and base == "conv1d" and config == "LoKrConfig":
                    continue  # upstream's forward crashes
                name = f"{base}{', effective' if effective else ''}"
                found.append(
                    of(
                        config,
                        name,
                        base,
                        r=2 if config == "LoHaConfig" else 1,
                        alpha=3,
                        use_effective_conv2d=effective,
                    )
                )
    found += [
        of("LoKrConfig", "conv2d full", "conv2d", r=8, use_effective_conv2d=True),
        of("VeraConfig", "plain", r=6),
        of("VeraConfig", "without banks", r=6, save_projection=False, projection_prng_key=5),
        of("VeraConfig", "gpt2", "gpt2", r=6, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True),
        of("VeraConfig", "bias all", r=6, bias="all", d_initial=0.3),
        of("VeraConfig", "bias vera_only", r=6, bias="vera_only"),
        of("VeraConfig", "head", "bert_cls", r=6, target_modules=["query", "value"]),
        dataclasses.replace(
            of("VeraConfig", "two adapters", r=6), also={"r": 6, "target_modules": ["q_proj", "v_proj", "down_proj"]}
        ),
        dataclasses.replace(
            of("VeraConfig", "two adapters, the second narrower", r=6),
            also={"r": 6, "target_modules": ["q_proj"]},
            refused={UPSTREAM: "vera_A.other: copying a param with shape torch.Size..6, 16"},
            why="Banks are as wide as the widest layer of their adapter. Upstream measures the second adapter's beside the "
            "first, whose layers it counts in, so the banks are wider than the adapter needs; read here as they are. It does "
            "not read the second's own banks beside the first, not even those that it writes for the second alone.",
        ),
    ]
    return found


def multiplicative() -> list[Case]:
    def of(config: str, name: str, base: str = "llama", how: Config | None = None, **fields: Any) -> Case:
        targets = {"target_modules": ["q_proj", "down_proj"]} if base == "llama" else SITE if base not in TASKS else {}
        return Case(
            f"{config.removesuffix('Config').lower()} {name}", base, config, {**targets, **fields}, **(how or {})
        )

    conv = {
        "merged": True,
        "why": "The formula is W' = W R on the kernel's columns: what this library runs and merges to, and what upstream "
        "merges to. Upstream's forward is not what it merges to on kernels larger than 1, so the merged models are compared.",
    }
    butterfly = {
        "refused": {UPSTREAM: "size mismatch|shape"},
        "why": "Without its CUDA extension upstream builds one factor, whatever boft_n_butterfly_factor says, and saves "
        "that; read here as the one factor it is. A file of ours with both factors does not fit upstream then.",
    }
    gs = {"target_modules": ["site"], "apply_GS": True}
    return [
        of("OFTConfig", "blocks of 4", oft_block_size=4),
        of("OFTConfig", "4 blocks", r=4, oft_block_size=0),
        of("OFTConfig", "exact Cayley", oft_block_size=4, use_cayley_neumann=False),
        of("OFTConfig", "two terms", oft_block_size=4, num_cayley_neumann_terms=2),
        of("OFTConfig", "three terms", oft_block_size=4, num_cayley_neumann_terms=3),
        of("OFTConfig", "seven terms", oft_block_size=4, num_cayley_neumann_terms=7),
        of("OFTConfig", "constrained", oft_block_size=4, coft=True, eps=0.5),
        of("OFTConfig", "shared block", oft_block_size=8, block_share=True),
        of("OFTConfig", "size adjusted", oft_block_size=5, how={"warns": {HERE: "does not divide"}}),
        of("OFTConfig", "bias all", oft_block_size=4, bias="all"),
        of("OFTConfig", "embedding", "embedding", oft_block_size=4),
        of("OFTConfig", "conv2d", "conv2d", conv, oft_block_size=4),
        of("OFTConfig", "conv2d 1x1", "conv2d_point", oft_block_size=4),
        of("BOFTConfig", "blocks of 4", boft_block_size=4),
        of("BOFTConfig", "2 blocks", boft_block_size=0, boft_block_num=2),
        of("BOFTConfig", "bias boft_only", boft_block_size=4, bias="boft_only"),
        of("BOFTConfig", "conv2d", "conv2d", boft_block_size=4),
        of("BOFTConfig", "butterfly", how=butterfly, boft_block_size=2, boft_n_butterfly_factor=2),
        of("HRAConfig", "4 reflections", r=4),
        of("HRAConfig", "3 reflections", r=3),
        of("HRAConfig", "orthonormal", "linear", r=4, **gs),
        of("HRAConfig", "conv2d", "conv2d", r=4),
        of("HRAConfig", "bias all", r=4, bias="all"),
        of("IA3Config", "default targets", target_modules=None),
        of("IA3Config", "feed-forward", **IA3),
        of("IA3Config", "gpt2", "gpt2", target_modules=["c_attn", "mlp.c_proj"], feedforward_modules=["mlp.c_proj"], fan_in_fan_out=True),
        of("IA3Config", "classifier", "bert_cls", target_modules=["key", "value", "output.dense"], feedforward_modules=["output.dense"]),
        of("IA3Config", "seq2seq", "t5", target_modules=None),
        of("IA3Config", "conv2d", "conv2d", feedforward_modules=[]),
        of("IA3Config", "conv2d feed-forward", "conv2d", feedforward_modules=["site"]),
        of("IA3Config", "conv3d", "conv3d", feedforward_modules=[]),
        of("IA3Config", "conv3d feed-forward", "conv3d", feedforward_modules=["site"]),
        of("IA3Config", "modules_to_save", modules_to_save=["lm_head"], **IA3),
        of("IA3Config", "two adapters", how={"also": {"target_modules": ["v_proj"], "feedforward_modules": []}}, **IA3),
    ]  # fmt: skip


def selective() -> list[Case]:
    # tied ends share their rows, which are written once here; upstream looks for the second copy, and shares them as well
    twice = {
        UPSTREAM: "missing adapter keys while loading the checkpoint: ..base_model.model.lm_head.trainable_tokens_delta"
    }
    return [
        Case("ln_tuning default targets", "llama", "LNTuningConfig"),
        Case("ln_tuning classifier", "bert_cls", "LNTuningConfig", {"target_modules": ["LayerNorm"]}),
        Case("ln_tuning linear", "llama", "LNTuningConfig", {"target_modules": ["q_proj", "norm"]}),
        Case(
            "ln_tuning modules_to_save",
            "llama",
            "LNTuningConfig",
            {"target_modules": ["input_layernorm"], "modules_to_save": ["lm_head"]},
        ),
        Case(
            "ln_tuning excluded",
            "llama",
            "LNTuningConfig",
            {"target_modules": r".*layernorm", "exclude_modules": ["layers.0.input_layernorm"]},
        ),
        Case("trainable_tokens", "llama", "TrainableTokensConfig", {"token_indices": [1, 5, 3]}),
        Case("trainable_tokens tied", "llama_tied", "TrainableTokensConfig", {"token_indices": [1, 5]}, warns=twice),
        Case(
            "trainable_tokens two embeddings",
            "gpt2",
            "TrainableTokensConfig",
            {"token_indices": [1, 5], "target_modules": ["wte", "wpe"]},
            warns=twice,
        ),
        Case(
            "trainable_tokens two adapters",
            "llama",
            "TrainableTokensConfig",
            {"token_indices": [1, 5]},
            also={"token_indices": [2, 3]},
        ),
    ]


# name -> (config class, fields, needs task_ids)
PROMPTS: dict[str, tuple[str, Config, bool]] = {
    "prompt": ("PromptTuningConfig", {}, False),
    "p_tuning mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 8}, False),
    "p_tuning lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}, False),
    "prefix": ("PrefixTuningConfig", {}, False),
    "prefix projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8}, False),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}, True),
}  # fmt: skip


def prompts() -> list[Case]:
    found = []
    for base in ("llama", "gpt2", "opt", "gemma2", "t5", "bert_cls", "bert_tok", "bert_qa", "bert"):
        for name, (config, fields, tasks) in PROMPTS.items():
            if tasks and base in ("bert_qa", "bert"):
                continue  # upstream cannot pass task_ids there
            given = {"num_virtual_tokens": 3, **fields}
            window = {HERE: "window of 4"} if base == "gemma2" and config == "PrefixTuningConfig" else {}
            found.append(Case(f"{name} {base}", base, config, given, tasks=tasks, warns=window))
    found.append(
        Case(
            "prompt two adapters",
            "llama",
            "PromptTuningConfig",
            {"num_virtual_tokens": 3},
            also={"num_virtual_tokens": 2},
        )
    )
    return found


# -- files of other times and places -----------------------------------------------------------------------------------------------
def move_attention(config: Config, tensors: Tensors, maker: str) -> tuple[Config, Tensors]:
    """The output projection's delta, doubled on its way from upstream, halved on its way there."""
    factor = 2.0 if maker == UPSTREAM else 0.5
    return config, {k: v * factor if k.endswith("out_proj.lora_B.weight") else v for k, v in tensors.items()}


def only(*names: str, **more: Any) -> Callable[[Config, Tensors, str], tuple[Config, Tensors]]:
    """A config file with these fields, as versions wrote it that knew no others, and `more`."""
    always = ("peft_type", "task_type", "base_model_name_or_path", "inference_mode")
    return lambda config, tensors, maker: (
        {**{k: config[k] for k in (*always, *names) if k in config}, **more},
        tensors,
    )


def bare(config: Config, tensors: Tensors, maker: str) -> tuple[Config, Tensors]:
    """Keys without the prefix, as models save them that were adapted without a wrapper."""
    return config, {k.removeprefix("base_model.model."): v for k, v in tensors.items()}


def separate(
    block: str, names: tuple[str, str, str], experts: int
) -> Callable[[Config, Tensors, str], tuple[Config, Tensors]]:
    """Experts as separate linear layers, as transformers 4 had them: gate and up of width 24, down."""

    def alter(config: Config, tensors: Tensors, maker: str) -> tuple[Config, Tensors]:
        rng, r, out = torch.Generator().manual_seed(3), config["r"], dict(tensors)
        for layer in range(2):
            for e in range(experts):
                for name in names:
                    wide, narrow = (D, 24) if name == names[2] else (24, D)
                    stem = f"base_model.model.model.layers.{layer}.{block}.experts.{e}.{name}"
                    out[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(r, narrow, generator=rng)
                    out[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(wide, r, generator=rng)
            stem = f"base_model.model.model.layers.{layer}.{block}.gate"
            out[f"{stem}.lora_A.weight"] = 0.3 * torch.randn(r, D, generator=rng)
            out[f"{stem}.lora_B.weight"] = 0.3 * torch.randn(experts, r, generator=rng)
        return {**config, "target_modules": [*config["target_modules"], *names, "gate"]}, out

    return alter


def old() -> list[Case]:
    """Files as earlier versions wrote them: upstream's of today, reduced to the fields of their time."""
    ways = ((UPSTREAM, HERE), (UPSTREAM, UPSTREAM))
    first = ("r", "target_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "modules_to_save")
    later = (*first, "init_lora_weights", "layers_to_transform", "layers_pattern", "revision")
    prompt = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")

    def case(name: str, config: str, fields: Config, alter: Any, base: str = "llama", **more: Any) -> Case:
        return Case(f"old {name}", base, config, fields, alter=alter, ways=ways, **more)

    def tokens(name: str, config: str, fields: Config, *names: str, **more: Any) -> Case:
        return case(name, config, {"num_virtual_tokens": 3, **fields}, only(*prompt, *names), as_bin=True, **more)

    mixtral = separate("block_sparse_moe", ("w1", "w3", "w2"), 3)
    qwen = separate("mlp", ("gate_proj", "up_proj", "down_proj"), 4)
    q = {**LORA, "target_modules": ["q_proj"]}
    unknown = only(*later, some_field_of_tomorrow=None)
    ia3 = ("target_modules", "feedforward_modules", "fan_in_fan_out", "modules_to_save", "init_ia3_weights")
    ada = (
        "target_r",
        "init_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
        "rank_pattern",
    )
    lycoris = ("r", "alpha", "rank_dropout", "module_dropout", "init_weights", "target_modules", "modules_to_save")
    plain = {**LORA, **QV}
    return [
        case("lora, first fields", "LoraConfig", plain, only(*first, enable_lora=None, merge_weights=False), as_bin=True,
             warns={HERE: "'enable_lora', 'merge_weights'", UPSTREAM: "'enable_lora', 'merge_weights'"}),
        case("lora, some fields", "LoraConfig", plain, only(*later), as_bin=True),
        case("lora, least fields", "LoraConfig", plain, only("r", "target_modules", "lora_alpha")),
        case("lora, unknown field", "LoraConfig", plain, unknown,
             warns={HERE: "some_field_of_tomorrow", UPSTREAM: "some_field_of_tomorrow"}),
        case("lora, head", "LoraConfig", LORA, only(*first), "bert_cls", as_bin=True),
        case("lora, old patterns", "LoraConfig", {**plain, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 9}},
             only(*later, "rank_pattern", "alpha_pattern", "loftq_config", "megatron_config", "megatron_core")),
        case("lora, dora", "LoraConfig", {**plain, "use_dora": True, "use_rslora": True},
             only(*later, "use_dora", "use_rslora", "loftq_config", "layer_replication"), as_bin=True),
        dataclasses.replace(case("lora, bare keys", "LoraConfig", plain, bare), ways=((UPSTREAM, HERE),)),
        case("lora, embedding", "LoraConfig", {**LORA, "target_modules": ["embed_tokens", "q_proj"]}, only(*later), as_bin=True),
        case("adalora", "AdaLoraConfig", {**QV, "init_r": 4, "target_r": 2, "total_step": 6, "tinit": 1, "tfinal": 2},
             only(*later, *ada), steps="pruned", as_bin=True),
        case("mixtral", "LoraConfig", q, mixtral, "mixtral", strange=True),
        case("mixtral, rslora", "LoraConfig", {**q, "use_rslora": True}, mixtral, "mixtral", strange=True, apart=True,
             why="The separate layers had ΔW = α/√r · B A. Stacked, their rank is 2r, so the same ΔW needs α√2 over √(2r), as "
             "here; upstream doubles α, which makes ΔW larger by √2. The test with explicit weights shows it."),
        case("qwen3_moe", "LoraConfig", q, qwen, "qwen3_moe", strange=True),
        case("ia3", "IA3Config", IA3, only(*ia3), as_bin=True),
        case("loha", "LoHaConfig", {**QV, "r": 3}, only(*lycoris, "use_effective_conv2d", "rank_pattern", "alpha_pattern")),
        case("lokr", "LoKrConfig", {**QV, "r": 1}, only(*lycoris, "decompose_both", "decompose_factor")),
        case("vera", "VeraConfig", {**QV, "r": 6}, only("r", "target_modules", "projection_prng_key", "save_projection"), as_bin=True),
        tokens("prompt", "PromptTuningConfig", {}, "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path"),
        tokens("p_tuning", "PromptEncoderConfig", {"encoder_hidden_size": 8}, "encoder_reparameterization_type",
               "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
        tokens("prefix", "PrefixTuningConfig", {}, "encoder_hidden_size", "prefix_projection"),
        tokens("prefix, seq2seq", "PrefixTuningConfig", {}, "encoder_hidden_size", "prefix_projection", base="t5"),
        tokens("prompt, head", "PromptTuningConfig", {}, "prompt_tuning_init", base="bert_cls"),
    ]  # fmt: skip


CASES: dict[str, Case] = {}
for made in (lora, weighted, additive, multiplicative, selective, prompts, old):
    for one in made():
        assert one.name not in CASES, one.name
        CASES[one.name] = one


def folder_of(root: str, side: str, case: Case) -> str:
    """Where a side saves a case's adapter."""
    return os.path.join(root, side, re.sub(r"\W+", "_", case.name))
