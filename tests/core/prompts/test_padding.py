"""Padding on the left changes nothing: not for any prompt method, nor on models whose layers differ."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from tests.golden.prompt import make
from tests.helpers import prompts as helpers

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
KINDS = ["sliding_attention", "full_attention"] * 2
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}


def config(kind: str, **more: object) -> tf.PreTrainedConfig:
    cls = getattr(tf, kind, None)
    if cls is None:
        pytest.skip(f"this transformers has no {kind}")
    return cls(**SMALL, **IDS, num_hidden_layers=4, head_dim=8, **more)


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(config("LlamaConfig"))


def wider_layers() -> nn.Module:
    """Layers of other widths and head counts, of which the last two share the keys of earlier ones."""
    ple = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    more = {"layer_types": KINDS, "sliding_window": 32, "global_head_dim": 16, "num_kv_shared_layers": 2}
    return tf.Gemma4ForCausalLM(config("Gemma4TextConfig", **ple, **more))


def shared_layers() -> nn.Module:
    ple = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
    more = {
        "layer_types": KINDS,
        "sliding_window": 32,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.0] * 4,
    }
    return tf.Gemma3nForCausalLM(config("Gemma3nTextConfig", **ple, **more))


def recurrent() -> nn.Module:
    return tf.Qwen3NextForCausalLM(config("Qwen3NextConfig", **DELTA, **EXPERTS))


def one_key_head() -> nn.Module:
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}
    return tf.FalconForCausalLM(tf.FalconConfig(**sizes, multi_query=True, new_decoder_architecture=False))


MODELS = [llama, wider_layers, shared_layers, recurrent, one_key_head]
CONFIGS = [PromptTuningConfig, PrefixTuningConfig]


def prompted(model: nn.Module, cls: type, **fields: object) -> nn.Module:
    made = get_peft_model(model, cls(task_type="CAUSAL_LM", num_virtual_tokens=3, **fields)).eval()
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in made.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=rng))
    return made


def texts(pads: int, length: int = 6) -> dict[str, Tensor]:
    ids = torch.randint(5, 40, (1, length), generator=torch.Generator().manual_seed(2))
    room = torch.zeros(1, pads).long()
    return {"input_ids": torch.cat([room, ids], 1), "attention_mask": torch.cat([room, torch.ones_like(ids)], 1)}


def unchanged(made: nn.Module, **more: Tensor) -> None:
    with torch.no_grad():
        alone = made(**texts(0), **more).logits[:, -6:]
        for pads in (1, 4):
            torch.testing.assert_close(made(**texts(pads), **more).logits[:, -6:], alone, atol=2e-6, rtol=1e-5)
        how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **more}
        assert torch.equal(made.generate(**texts(3), **how)[:, -4:], made.generate(**texts(0), **how)[:, -4:])


@pytest.mark.parametrize(("method", "example"), helpers.EXAMPLES)
@pytest.mark.parametrize("base", ["llama_gqa", "gpt2", "opt"])
def test_every_prompt_method_is_blind_to_padding(method, example, base):
    """gpt2 has a table of positions, opt counts by the mask."""
    tasks = {"task_ids": torch.tensor([0])} if method.startswith("MULTITASK") else {}
    unchanged(helpers.prompted(method, example, base).eval(), **tasks)


@pytest.mark.parametrize("cls", CONFIGS)
@pytest.mark.parametrize("build", MODELS)
def test_models_whose_layers_differ(build, cls):
    torch.manual_seed(0)
    base = build()
    made = prompted(base.eval(), cls)
    unchanged(made)
    ids = texts(0)["input_ids"]
    with torch.no_grad():
        with made.disable_adapter():
            plain = made(input_ids=ids).logits
        assert not torch.allclose(made(input_ids=ids).logits[:, -6:], plain)
        start = made(input_ids=ids[:, :-1], use_cache=True)
        last = made(input_ids=ids[:, -1:], past_key_values=start.past_key_values).logits[:, -1]
        torch.testing.assert_close(last, made(input_ids=ids).logits[:, -1], atol=2e-6, rtol=1e-5)
    made.train()
    made(input_ids=ids, labels=ids).loss.backward()
    (trained,) = (p for p in made.parameters() if p.requires_grad)
    assert trained.grad is not None and trained.grad.any()


@pytest.mark.parametrize("build", [wider_layers, shared_layers])
def test_tokens_keep_their_embeddings_per_layer_behind_a_prompt(build):
    """Virtual tokens have no entry in the tables of the layers; the text keeps its own."""
    torch.manual_seed(0)
    base = build().eval()
    ids = texts(0)["input_ids"]
    with torch.no_grad():
        vectors, looked = base.get_input_embeddings()(ids), base.model.get_per_layer_inputs(ids)
        made = prompted(base, PromptTuningConfig)
        prompt = made.get_prompt(1)
        nothing = looked.new_zeros(1, 3, *looked.shape[2:])
        ours = made(input_ids=ids).logits
        with made.disable_adapter():
            by_hand = made(
                inputs_embeds=torch.cat([prompt, vectors], 1), per_layer_inputs=torch.cat([nothing, looked], 1)
            )
    torch.testing.assert_close(ours, by_hand.logits)


def test_a_window_that_padding_shifts_is_told():
    made = prompted(make.build("gemma2"), PrefixTuningConfig)
    with pytest.warns(UserWarning, match="window of 4 and the batch is padded on the left"):
        made(**texts(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(**texts(0))


def test_positions_that_are_given_count_the_text_alone():
    for cls in (PromptTuningConfig, PrefixTuningConfig, PromptEncoderConfig):
        made = prompted(make.build("gpt2"), cls)
        with torch.no_grad():
            for pads in (0, 2):
                given = texts(pads)
                positions = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
                found, own = made(**given, position_ids=positions).logits, made(**given).logits
                torch.testing.assert_close(found[:, -6:], own[:, -6:])
