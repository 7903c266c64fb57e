"""What the tests of methods on activations share: small models of seven architectures, and layers on their own."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from peft import BottleneckConfig, CompacterConfig, LoReftConfig, PhmConfig, get_peft_model
from peft.core.adapted.layer import adapted_layers
from tests.helpers.cells import randomise

V, D = 40, 32

IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17, 18], [19, 20, 21, 22, 23, 24, 25]])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def bert():
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
        )
    )


def t5():
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=V,
            d_model=D,
            d_ff=48,
            d_kv=16,
            num_layers=2,
            num_heads=4,
            dropout_rate=0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=None,
        )
    )


def gpt2():
    off = {k: 0 for k in ("resid_pdrop", "embd_pdrop", "attn_pdrop")}
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=V, n_embd=D, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=None, pad_token_id=0, **off
        )
    )


def opt():
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=V,
            hidden_size=D,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=D,
            dropout=0,
            bos_token_id=1,
            eos_token_id=None,
            pad_token_id=0,
        )
    )


def vit():
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=D, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=8
        )
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=V,
            hidden_size=D,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=2,
        )
    )


MODELS = {"llama": llama, "bert": bert, "t5": t5, "gpt2": gpt2, "opt": opt, "vit": vit}


def base(name):
    torch.manual_seed(0)
    return MODELS[name]().eval() if name in MODELS else globals()[name]().eval()


def inputs(name, rows=3):
    if name == "vit":
        torch.manual_seed(1)
        return {"pixel_values": torch.randn(rows, 3, 16, 16)}
    given = {"input_ids": IDS[:rows]}
    if name == "t5":
        given["decoder_input_ids"] = IDS[:rows, :4]
    return given


def adapted(name, config, names=("default",), noise=True):
    model = get_peft_model(base(name), config, adapter_name=names[0])
    for other in names[1:]:
        model.add_adapter(other, copy.deepcopy(config))
    for i, one in enumerate(names if noise else ()):
        randomise(model, one, 3 + i)
    return model.eval()


CONFIGS = {
    "pfeiffer": lambda **k: BottleneckConfig(bottleneck_size=4, **k),
    "houlsby": lambda **k: BottleneckConfig(variant="houlsby", bottleneck_size=4, non_linearity="gelu", **k),
    "parallel": lambda **k: BottleneckConfig(variant="parallel", bottleneck_size=4, scaling=4.0, **k),
    "phm": lambda **k: PhmConfig(bottleneck_size=4, **k),
    "compacter": lambda **k: CompacterConfig(bottleneck_size=4, **k),
    "loreft": lambda **k: LoReftConfig(r=2, **k),
}


def only(model):
    """The method at the single site of a small model."""
    (layer,) = adapted_layers(model)
    return layer.methods["default"][0]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.site = layer

    def forward(self, x):
        return self.site(x)


def on_layer(layer, config):
    torch.manual_seed(0)
    model = get_peft_model(Net(layer).eval(), config).eval()
    randomise(model, "default", 1)
    return model, only(model)
