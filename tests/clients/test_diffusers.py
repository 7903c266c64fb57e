"""diffusers' pipelines and models with adapters: UNet, DiT and text encoders, from training to hot swaps.

The expected values come from plain models into whose weights W + s·B A was written here, tensor by tensor. One file
goes to upstream in a process of its own, and one of upstream's comes back.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

import peft
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import prepare_model_for_compiled_hotswap

diffusers = pytest.importorskip("diffusers")
hooks = pytest.importorskip("diffusers.hooks")
training = pytest.importorskip("diffusers.training_utils")
convert = pytest.importorskip("diffusers.utils.state_dict_utils")

FILE = "pytorch_lora_weights.safetensors"
UNET = [  # linear layers of attention and feed-forward, a convolution in a block and the first one
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "mid_block.resnets.0.conv1",
    "conv_in",
]
TEXT = ["encoder.layers.0.self_attn.q_proj", "encoder.layers.1.mlp.fc1"]
DIT = [  # the first is also the end of another module's name
    "proj_out",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.ff_context.net.2",
    "single_transformer_blocks.0.attn.to_v",
]
IDS = torch.tensor([[1, 3, 4, 5, 2, 0, 0, 0], [1, 3, 6, 7, 2, 0, 0, 0]])


# -- tiny models ----------------------------------------------------------------------------------------------------------------
def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "a", "red", "cat", "blue", "dog"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=8
    )


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(1)
    config = CLIPTextConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = CLIPTextModel(config).eval()
    with torch.no_grad():  # the default initialisation is so small that adapters would vanish in the residual stream
        for p in model.parameters():
            p.mul_(8 if p.dim() > 1 else 1)
    return model


def unet(**sizes: Any) -> Any:
    torch.manual_seed(2)
    config = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (8, 16),
    }
    fixed = {"sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4}
    return diffusers.UNet2DConditionModel(
        in_channels=4, out_channels=4, attention_head_dim=4, **fixed, **{**config, **sizes}
    ).eval()


def small_unet() -> Any:
    """One that compiles fast."""
    return unet(down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), block_out_channels=(8,))


def transformer() -> Any:
    torch.manual_seed(3)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def second_text_encoder() -> T5EncoderModel:
    torch.manual_seed(5)
    return T5EncoderModel(T5Config(vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).eval()


def vae() -> Any:
    torch.manual_seed(4)
    return diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=2, sample_size=8).eval()


def stable_diffusion(denoiser: Any = None, text: Any = None) -> Any:
    pipe = diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder() if text is None else text,
        tokenizer=tokenizer(),
        unet=unet() if denoiser is None else denoiser,
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(denoiser: Any = None, text: Any = None) -> Any:
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae(),
        text_encoder=text_encoder() if text is None else text,
        tokenizer=tokenizer(),
        text_encoder_2=second_text_encoder(),
        tokenizer_2=tokenizer(),
        transformer=transformer() if denoiser is None else denoiser,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


# -- what they compute ------------------------------------------------------------------------------------------------------------
def noisy() -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(6)
    return torch.randn(2, 4, 8, 8, generator=rng), torch.tensor([3, 500]), torch.randn(2, 8, 16, generator=rng)


@torch.no_grad()
def eps(model: Any, **kwargs: Any) -> Tensor:
    """The noise that a UNet predicts."""
    return model(*noisy(), **kwargs).sample


@torch.no_grad()
def hidden(model: Any) -> Tensor:
    """A text encoder's hidden states."""
    return model(IDS)[0]


@torch.no_grad()
def velocity(model: Any, **kwargs: Any) -> Tensor:
    """What a DiT predicts."""
    rng = torch.Generator().manual_seed(7)
    return model(
        hidden_states=torch.randn(1, 4, 16, generator=rng),
        encoder_hidden_states=torch.randn(1, 8, 16, generator=rng),
        pooled_projections=torch.randn(1, 16, generator=rng),
        timestep=torch.tensor([0.5]),
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(8, 3),
        **kwargs,
    ).sample


def picture(pipe: Any, **kwargs: Any) -> Tensor:
    size, rng = {"height": 8, "width": 8}, torch.Generator().manual_seed(8)
    out = pipe("a red cat", num_inference_steps=2, generator=rng, output_type="np", **size, **kwargs)
    return torch.tensor(out.images)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> bool:
    gap = float((a - b).detach().abs().max())
    assert gap <= tolerance * max(1.0, float(b.detach().abs().max())), gap
    return True


def differs(a: Tensor, b: Tensor) -> bool:
    return float((a - b).abs().max()) > 1e-3


# -- adapters as tensors ------------------------------------------------------------------------------------------------------------
def factors(model: nn.Module, names: list[str], r: int = 4, seed: int = 10, size: float = 0.3) -> dict[str, Tensor]:
    """A[r, inputs (, kernel)] and B[out, r (, 1, 1)] for each of the named layers, as files hold them."""
    rng = torch.Generator().manual_seed(seed)
    out = {}
    for name in names:
        W = model.get_submodule(name).weight
        out[f"{name}.lora_A.weight"] = torch.randn(r, *W.shape[1:], generator=rng) * size
        out[f"{name}.lora_B.weight"] = torch.randn(W.shape[0], r, *(1 for _ in W.shape[2:]), generator=rng) * size
    return out


def below(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}.{k}": v for k, v in tensors.items()}


def unet_file(seed: int = 10, r: int = 4, names: list[str] = UNET) -> dict[str, Tensor]:
    return below("unet", factors(unet(), names, r, seed))


def text_file(seed: int = 11, r: int = 4, names: list[str] = TEXT) -> dict[str, Tensor]:
    return below("text_encoder", factors(text_encoder(), names, r, seed))


def dit_file(seed: int = 12, r: int = 4, names: list[str] = DIT) -> dict[str, Tensor]:
    return below("transformer", factors(transformer(), names, r, seed))


def names_of(tensors: dict[str, Tensor]) -> list[str]:
    return [k.removesuffix(".lora_A.weight") for k in tensors if k.endswith(".lora_A.weight")]


def product(tensors: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    A, B = tensors[f"{name}.lora_A.weight"].float(), tensors[f"{name}.lora_B.weight"].float()
    return (B.flatten(1) @ A.flatten(1)).reshape(shape)


@torch.no_grad()
def merged(
    model: Any, *adapters: tuple[dict[str, Tensor], float | Callable[[str], float]], prefix: str | None = None
) -> Any:
    """The plain model with W + Σ s·B A written into it."""
    if prefix is None:
        prefix = {"CLIPTextModel": "text_encoder", "UNet2DConditionModel": "unet"}.get(
            type(model).__name__, "transformer"
        )
    for tensors, s in adapters:
        own = {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
        for name in names_of(own):
            W = model.get_submodule(name).weight
            W += (s(name) if callable(s) else s) * product(own, name, W.shape)
    return model


def saved(folder: Path, tensors: dict[str, Tensor]) -> str:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / FILE)
    return str(folder)


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return set(now) == set(before) and all(torch.equal(now[k], v) for k, v in before.items())


def move(model: nn.Module, adapter: str = "default", size: float = 0.3) -> dict[str, Tensor]:
    """Give an adapter values that do something; returns them."""
    rng = torch.Generator().manual_seed(13)
    state = get_peft_model_state_dict(model, adapter_name=adapter)
    state = {k: torch.randn(state[k].shape, generator=rng) * size for k in sorted(state)}
    set_peft_model_state_dict(model, state, adapter)
    return state


@contextmanager
def diffusers_log(caplog: Any) -> Any:
    """diffusers' logger does not propagate by itself."""
    logger = logging.getLogger("diffusers")
    logger.propagate, was = True, logger.propagate
    try:
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            yield caplog
    finally:
        logger.propagate = was


A, B = unet_file() | text_file(), unet_file(20, 2) | text_file(21, 2)
BOTH = ["unet", "text_encoder"]


def two(first: dict[str, Tensor] = A, second: dict[str, Tensor] = B) -> Any:
    pipe = stable_diffusion()
    pipe.load_lora_weights(first, adapter_name="a")
    pipe.load_lora_weights(second, adapter_name="b")
    return pipe


def acts(pipe: Any, *adapters: tuple[dict[str, Tensor], float], tolerance: float = 1e-5) -> bool:
    """Whether UNet and text encoder compute with exactly these adapters."""
    same(eps(pipe.unet), eps(merged(unet(), *adapters)), tolerance)
    return same(hidden(pipe.text_encoder), hidden(merged(text_encoder(), *adapters)), tolerance)


def test_the_files_of_these_tests_move_every_output():
    assert differs(eps(merged(unet(), (A, 1.0))), eps(unet()))
    assert differs(eps(merged(unet(), (B, 1.0))), eps(merged(unet(), (A, 1.0))))
    assert differs(hidden(merged(text_encoder(), (A, 1.0))), hidden(text_encoder()))
    assert differs(velocity(merged(transformer(), (dit_file(), 1.0))), velocity(transformer()))


# -- training, saving, loading ------------------------------------------------------------------------------------------------------
def trained() -> tuple[Any, dict[str, nn.Parameter]]:
    """A UNet and a text encoder after three steps, with alpha/r = 2."""
    pipe = stable_diffusion()
    pipe.unet.requires_grad_(False)
    pipe.text_encoder.requires_grad_(False)
    torch.manual_seed(0)
    targets = ["to_q", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, init_lora_weights="gaussian", target_modules=targets))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "fc1"]))
    parameters = [p for m in (pipe.unet, pipe.text_encoder) for p in m.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=0.05)
    sample, t, _ = noisy()
    for _ in range(3):
        optimiser.zero_grad()
        nn.functional.mse_loss(pipe.unet(sample, t, pipe.text_encoder(IDS)[0]).sample, sample).backward()
        optimiser.step()
    return pipe, {n: p for n, p in pipe.unet.named_parameters() if p.requires_grad}


def test_training_as_the_example_scripts_do(tmp_path):
    pipe, _ = trained()
    plain = dict(unet().named_parameters())
    for name, p in pipe.unet.named_parameters():
        if "lora_" not in name:
            assert not p.requires_grad and torch.equal(p, plain[name.replace(".base_layer", "")])
    layers = convert.convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    text_layers = convert.convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.text_encoder))
    targets = [n for n, _ in unet().named_modules() if n.endswith(("to_q", "to_v", "to_out.0"))]
    own, text_own = get_peft_model_state_dict(pipe.unet), get_peft_model_state_dict(pipe.text_encoder)
    assert set(own) == {f"{n}.lora_{x}.weight" for n in targets for x in "AB"}
    assert all(v.abs().sum() for v in (*own.values(), *text_own.values()))  # B has left its zeros
    metadata = training._collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    type(pipe).save_lora_weights(tmp_path, layers, text_layers, **metadata)
    with safe_open(tmp_path / FILE, "pt") as f:
        stated = json.loads(f.metadata()["lora_adapter_metadata"])
    assert stated["unet.lora_alpha"] == 8 and stated["text_encoder.r"] == 2 and stated["unet.peft_type"] == "LORA"
    file = below("unet", own) | below("text_encoder", text_own)

    again = stable_diffusion()
    again.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="mine")
    assert again.unet.peft_config["mine"].lora_alpha == 8 and acts(again, (file, 2.0))
    same(eps(again.unet), eps(pipe.unet.eval()))

    type(pipe).save_lora_weights(tmp_path / "bare", layers, text_layers)  # without metadata alpha is taken to be r
    again = stable_diffusion()
    again.load_lora_weights(str(tmp_path / "bare"), weight_name=FILE)
    assert again.get_active_adapters() == ["default_0"] and acts(again, (file, 1.0))


def test_gradients_are_those_of_the_formula():
    model = unet()
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=UNET))
    state = move(model)
    weight = torch.linspace(-1, 1, 4 * 8 * 8).reshape(4, 8, 8)
    (model(*noisy()).sample * weight).sum().backward()

    plain, leaves = unet(), {k: v.requires_grad_() for k, v in state.items()}
    written = {
        f"{n}.weight": W + 2.0 * product(leaves, n, W.shape) for n in UNET for W in [plain.get_submodule(n).weight]
    }
    (torch.func.functional_call(plain, written, noisy()).sample * weight).sum().backward()
    for name, p in model.named_parameters():
        assert p.requires_grad == ("lora_" in name), name
        if p.requires_grad:
            site, leaf = name.split(".adapters.default.")
            want = leaves[f"{site}.{leaf.removesuffix('_weight')}.weight"].grad
            same(p.grad.reshape(want.shape), want, 2e-5)


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for checkpointing in (False, True):
        model = unet()
        model.add_adapter(LoraConfig(r=2, target_modules=UNET))
        move(model)
        if checkpointing:
            model.enable_gradient_checkpointing()
            assert model.is_gradient_checkpointing
        model.train()(*noisy()).sample.pow(2).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert same(grads[1], grads[0]) and grads[0].abs().max() > 0


def test_a_second_adapter_trains_alone_and_both_together():
    model = unet()
    model.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    model.add_adapter(LoraConfig(r=4, target_modules=["to_v"]), "b")
    assert model.active_adapters() == ["b"]
    q, v = (sum(n.endswith(f".{t}") for n, _ in unet().named_modules()) for t in ("to_q", "to_v"))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert len(trains) == 2 * v and all(".to_v." in n for n in trains)
    model.set_adapter(["default", "b"])
    assert sum(p.requires_grad for p in model.parameters()) == 2 * (q + v)
    with pytest.raises(ValueError, match="already exists"):
        model.add_adapter(LoraConfig(target_modules=["to_v"]), "b")
    model.delete_adapters(["default"])
    assert model.active_adapters() == ["b"] and list(model.peft_config) == ["b"]


def test_helpers_of_the_training_scripts():
    tensors = factors(text_encoder(), TEXT, 4)
    model = text_encoder()
    model.add_adapter(LoraConfig(r=4, target_modules=TEXT))
    training._set_state_dict_into_text_encoder(below("text_encoder", tensors), "text_encoder.", model)
    file = below("text_encoder", tensors)
    same(hidden(model), hidden(merged(text_encoder(), (file, 2.0))))  # lora_alpha is 8 by default

    half = unet().to(torch.bfloat16)
    half.add_adapter(LoraConfig(r=4, target_modules=["to_q"]))
    training.cast_training_params(half, torch.float32)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}

    parameters = [p for p in model.parameters() if p.requires_grad]
    ema = training.EMAModel(parameters, decay=0.5, use_ema_warmup=False)
    with torch.no_grad():
        for p in parameters:
            p.mul_(2)
    ema.step(parameters)
    doubled = hidden(model)
    ema.store(parameters)
    ema.copy_to(parameters)
    decay = ema.get_decay(1)
    share = (decay + 2 * (1 - decay)) ** 2  # both factors are averages of their value and its double
    same(hidden(model), hidden(merged(text_encoder(), (file, 2.0 * share))), 5e-5)
    ema.restore(parameters)
    assert torch.equal(hidden(model), doubled)


def test_what_a_partial_state_dict_lacks_is_told_under_the_names_that_callers_filter_by():
    model = unet()
    model.add_adapter(LoraConfig(r=4, target_modules=["mid_block.resnets.0.conv1"]))
    given = {
        "mid_block.resnets.0.conv1.lora_A.weight": torch.zeros(4, 16, 3, 3),
        "nowhere.lora_A.weight": torch.ones(1),
    }
    with pytest.warns(UserWarning, match="lora_B"):
        missing, unexpected = set_peft_model_state_dict(model, given)
    assert missing == ["mid_block.resnets.0.conv1.lora_B.default.weight"]
    assert unexpected == ["nowhere.lora_A.weight"]


# -- files ----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_loading_a_file(tmp_path, low_cpu_mem_usage):
    pipe = stable_diffusion()
    before = bits(pipe.unet)
    pipe.load_lora_weights(saved(tmp_path, A), weight_name=FILE, adapter_name="a", low_cpu_mem_usage=low_cpu_mem_usage)
    assert {p.device.type for p in pipe.unet.parameters()} == {"cpu"}
    assert pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]} and acts(pipe, (A, 1.0))
    plain = stable_diffusion(merged(unet(), (A, 1.0)), merged(text_encoder(), (A, 1.0)))
    same(picture(pipe), picture(plain))
    assert differs(picture(pipe), picture(stable_diffusion()))
    pipe.unload_lora_weights()
    assert unchanged(pipe.unet, before) and torch.equal(picture(pipe), picture(stable_diffusion()))


def test_an_adapter_that_is_loaded_last_acts_alone():
    pipe = two()
    assert pipe.get_active_adapters() == ["b"] and acts(pipe, (B, 1.0))


def test_ranks_may_differ_from_layer_to_layer():
    mixed = unet_file(30, 2, UNET[:2]) | unet_file(31, 5, UNET[2:])
    pipe = stable_diffusion()
    pipe.load_lora_weights(mixed, adapter_name="a")
    same(eps(pipe.unet), eps(merged(unet(), (mixed, 1.0))))


def test_kohya_files():
    names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1"]
    text = text_file(names=[f"encoder.layers.{i}.{n}" for i in (0, 1) for n in names])
    linear = unet_file(names=UNET[:3])
    file = {}
    for head, prefix, own in (("lora_unet_", "unet.", linear), ("lora_te_text_model_", "text_encoder.", text)):
        for key, value in own.items():
            name, which, _ = key.removeprefix(prefix).rsplit(".", 2)
            stem = head + name.replace(".", "_")
            file[f"{stem}.{'lora_down' if which == 'lora_A' else 'lora_up'}.weight"] = value
            file[f"{stem}.alpha"] = torch.tensor(2.0)
    pipe = stable_diffusion()
    pipe.load_lora_weights(file, adapter_name="a")
    assert acts(pipe, (linear | text, 2.0 / 4))


def test_network_alphas():
    alphas = dict(zip(UNET, (1.0, 2.0, 3.0, 4.0, 5.0), strict=True))
    model = unet()
    model.load_lora_adapter(
        unet_file(), prefix="unet", adapter_name="a", network_alphas={f"unet.{n}.alpha": a for n, a in alphas.items()}
    )
    same(eps(model), eps(merged(unet(), (unet_file(), lambda n: alphas[n] / 4))))


def test_a_name_that_ends_others_means_one_module():
    model = transformer()
    model.load_lora_adapter(dit_file(), prefix="transformer", adapter_name="a", low_cpu_mem_usage=True)
    wrapped = [n for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)]
    assert sorted(wrapped) == sorted(DIT) and not any(p.is_meta for p in model.parameters())
    same(velocity(model), velocity(merged(transformer(), (dit_file(), 1.0))))


def test_keys_without_a_place_are_reported(caplog):
    pipe = stable_diffusion()
    extra = {"unet.nowhere.to_q.lora_A.weight": torch.ones(4, 4), "unet.nowhere.to_q.lora_B.weight": torch.ones(4, 4)}
    with diffusers_log(caplog):
        pipe.load_lora_weights(unet_file() | extra, adapter_name="a")
    assert "unexpected keys" in caplog.text and "nowhere.to_q.lora_A" in caplog.text
    same(eps(pipe.unet), eps(merged(unet(), (unet_file(), 1.0))))


@pytest.mark.parametrize("with_other", [False, True])
def test_a_file_that_does_not_fit_leaves_the_pipeline_usable(with_other):
    pipe = stable_diffusion()
    before = bits(pipe.unet)
    others = [(unet_file(), 1.0)] if with_other else []
    if with_other:
        pipe.load_lora_weights(unet_file(), adapter_name="a")
    wrong = unet_file(20, 2)
    wrong["unet.conv_in.lora_A.weight"] = wrong["unet.conv_in.lora_A.weight"][:, :3]
    nowhere = {f"unet.nowhere.to_q.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}
    for file, error in ((wrong, RuntimeError), (nowhere, ValueError)):
        with pytest.raises(error, match="conv_in|nowhere"):
            pipe.load_lora_weights(file, adapter_name="b")
        assert pipe.get_list_adapters().get("unet", []) == (["a"] if with_other else [])
        if with_other:
            pipe.set_adapters("a")
        same(eps(pipe.unet), eps(merged(unet(), *others)))
    pipe.load_lora_weights(unet_file(20, 2), adapter_name="b")  # the name is free
    same(eps(pipe.unet), eps(merged(unet(), (unet_file(20, 2), 1.0))))
    pipe.unload_lora_weights()
    assert unchanged(pipe.unet, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loaded_adapter_takes_the_dtype_of_its_model(dtype):
    pipe = stable_diffusion().to(dtype)
    pipe.load_lora_weights(A, adapter_name="a")
    assert {p.dtype for m in (pipe.unet, pipe.text_encoder) for p in m.parameters()} == {dtype}
    want = merged(unet(), (A, 1.0))
    half = [t.to(dtype) if t.is_floating_point() else t for t in noisy()]
    with torch.no_grad():
        same(pipe.unet(*half).sample.float(), want(*noisy()).sample, 0.1)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_models_save_and_load_their_adapters(tmp_path, kind):
    model = transformer()
    config = {
        "lora": LoraConfig(r=4, lora_alpha=2, rank_pattern={"net.2": 2}, target_modules=["to_q", "net.2"]),
        "lokr": LoKrConfig(r=2, alpha=6, decompose_factor=4, target_modules=["to_q", "net.2"]),
    }[kind]
    model.add_adapter(config, "mine")
    move(model, "mine")
    model.save_lora_adapter(tmp_path, adapter_name="mine")
    assert differs(velocity(model), velocity(transformer()))
    again = transformer()
    again.load_lora_adapter(tmp_path, prefix=None, adapter_name="z", use_safetensors=True)
    assert torch.equal(velocity(again), velocity(model))
    assert again.peft_config["z"].to_dict() == model.peft_config["mine"].to_dict()


# -- other methods --------------------------------------------------------------------------------------------------------------------
def test_dora_files():
    rng = torch.Generator().manual_seed(14)
    file, want = unet_file(), unet()
    with torch.no_grad():
        for name in UNET:
            W = want.get_submodule(name).weight
            m = torch.rand(W.shape[0], generator=rng) + 0.5
            file[f"unet.{name}.lora_magnitude_vector"] = m.reshape(1, -1, 1, 1) if W.dim() == 4 else m
            V = (W + product(factors(unet(), UNET), name, W.shape)).flatten(1)
            W.copy_((m[:, None] * V / V.norm(dim=1, keepdim=True)).reshape(W.shape))
    pipe = stable_diffusion()
    before = bits(pipe.unet)
    pipe.load_lora_weights(file, adapter_name="a")
    same(eps(pipe.unet), eps(want), 2e-5)
    pipe.set_lora_device(["a"], "cpu")  # reassigns the magnitudes
    same(eps(pipe.unet), eps(want), 2e-5)
    pipe.fuse_lora(components=["unet"])
    same(eps(pipe.unet), eps(want), 2e-5)
    pipe.unfuse_lora(components=["unet"])
    written = get_peft_model_state_dict(pipe.unet, adapter_name="a")
    assert {k: v.shape for k, v in written.items()} == {k.removeprefix("unet."): v.shape for k, v in file.items()}
    pipe.unload_lora_weights()
    assert unchanged(pipe.unet, before)


def kronecker(state: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    w1, w2 = (
        state[f"{name}.lokr_{w}"]
        if f"{name}.lokr_{w}" in state
        else state[f"{name}.lokr_{w}_a"] @ state[f"{name}.lokr_{w}_b"]
        for w in ("w1", "w2")
    )
    if len(shape) == 4:
        w2 = w2.reshape(w2.shape[0], -1, *shape[2:])
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2.contiguous()).reshape(shape)


def hadamard(state: dict[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    first, second = (state[f"{name}.hada_{w}_a"] @ state[f"{name}.hada_{w}_b"] for w in ("w1", "w2"))
    return (first * second).reshape(shape)


@pytest.mark.parametrize(
    ("config", "delta"),
    [
        (lambda t: LoKrConfig(r=2, alpha=4, target_modules=t), kronecker),
        (lambda t: LoKrConfig(r=1, alpha=2, decompose_both=True, decompose_factor=4, target_modules=t), kronecker),
        (lambda t: LoHaConfig(r=2, alpha=4, target_modules=t), hadamard),
    ],
    ids=["lokr", "lokr decomposed", "loha"],
)
def test_lycoris_adapters(config, delta):
    model, before = unet(), bits(unet())
    model.add_adapter(config(UNET))
    state = move(model, size=0.5)

    def want(scale: float) -> Tensor:
        plain = unet()
        with torch.no_grad():
            for name in UNET:
                W = plain.get_submodule(name).weight
                W += scale * 2.0 * delta(state, name, W.shape)
        return eps(plain)

    assert differs(want(1.0), want(0.0))
    same(eps(model), want(1.0), 2e-5)
    model.set_adapters("default", 0.5)
    same(eps(model), want(0.5), 2e-5)
    same(eps(model, cross_attention_kwargs={"scale": 0.5}), want(0.25), 2e-5)
    same(eps(model), want(0.5), 2e-5)
    model.disable_adapters()
    assert torch.equal(eps(model), eps(unet()))
    model.enable_adapters()
    model.fuse_lora()
    same(eps(model), want(0.5), 2e-5)
    model.unfuse_lora()
    model.unload_lora()
    assert unchanged(model, before)


def test_lokr_files_without_a_config():
    """diffusers works out decompose_factor and ranks from the shapes, with `factorization`."""
    made = transformer()
    made.add_adapter(LoKrConfig(r=2, alpha=2, decompose_factor=4, target_modules=["to_q", "ff.net.2"]))
    state = move(made, size=0.5)
    pipe = flux()
    pipe.transformer.load_lora_adapter(state, prefix=None, adapter_name="k")
    plain = transformer()
    targets = [n for n, _ in plain.named_modules() if n.endswith(("to_q", "ff.net.2"))]
    with torch.no_grad():
        for name in targets:
            W = plain.get_submodule(name).weight
            W += 0.5 * kronecker(state, name, W.shape)
    pipe.set_adapters("k", 0.5)
    same(velocity(pipe.transformer), velocity(plain))
    assert differs(velocity(plain), velocity(transformer()))
    pipe.delete_adapters("k")
    assert torch.equal(velocity(pipe.transformer), velocity(transformer()))


# -- which adapters act, and how strongly ---------------------------------------------------------------------------------------------
def test_weighted_adapters():
    pipe = two()
    pipe.set_adapters(["a", "b"], adapter_weights=[0.7, -0.3])
    assert pipe.get_active_adapters() == ["a", "b"] and acts(pipe, (A, 0.7), (B, -0.3))
    pipe.set_adapters("a")
    assert pipe.get_active_adapters() == ["a"] and acts(pipe, (A, 1.0))
    pipe.set_adapters("a", 0.0)
    assert acts(pipe)
    pipe.set_adapters(["b", "a"], [0.5, 0.25])
    assert acts(pipe, (A, 0.25), (B, 0.5))


def test_disable_and_enable():
    pipe = two()
    pipe.set_adapters(["a", "b"], [0.7, -0.3])
    pipe.disable_lora()
    assert torch.equal(eps(pipe.unet), eps(unet())) and torch.equal(hidden(pipe.text_encoder), hidden(text_encoder()))
    pipe.enable_lora()
    assert acts(pipe, (A, 0.7), (B, -0.3))


def test_weights_by_component_and_block():
    names = [n for n, _ in unet().named_modules() if n.endswith(("attn1.to_q", "attn2.to_v"))]
    file = unet_file(names=names) | text_file()
    pipe = stable_diffusion()
    pipe.load_lora_weights(file, adapter_name="a")
    weights = {"unet": {"down": 0.5, "mid": 0.25, "up": {"block_0": [2.0, 3.0]}}, "text_encoder": 0.1}
    pipe.set_adapters("a", weights)

    def strength(name: str) -> float:
        if name.startswith("down_blocks"):
            return 0.5
        if name.startswith("mid_block"):
            return 0.25
        return 2.0 if ".attentions.0." in name else 3.0

    same(eps(pipe.unet), eps(merged(unet(), (file, strength))))
    same(hidden(pipe.text_encoder), hidden(merged(text_encoder(), (file, 0.1))))


def test_adapters_that_not_every_model_of_the_pipeline_has():
    pipe = two(unet_file(), B)
    assert pipe.get_list_adapters() == {"unet": ["a", "b"], "text_encoder": ["b"]}
    pipe.set_adapters(["a", "b"], [0.5, 0.25])
    assert pipe.get_active_adapters() == ["a", "b"] and acts(pipe, (unet_file(), 0.5), (B, 0.25))
    pipe.set_adapters("a")
    assert torch.equal(hidden(pipe.text_encoder), hidden(text_encoder())) and acts(pipe, (unet_file(), 1.0))
    pipe.delete_adapters("b")
    assert pipe.get_list_adapters() == {"unet": ["a"]} and acts(pipe, (unet_file(), 1.0))


def test_deleting_adapters():
    pipe = two()
    pipe.set_adapters(["a", "b"])
    pipe.delete_adapters("b")
    assert pipe.get_active_adapters() == ["a"] and pipe.get_list_adapters() == {"unet": ["a"], "text_encoder": ["a"]}
    assert acts(pipe, (A, 1.0)) and not any(".b." in n for n, _ in pipe.unet.named_parameters())
    pipe.load_lora_weights(B, adapter_name="b")
    pipe.set_adapters("b")
    pipe.delete_adapters("b")  # the one that acts: the one that is left takes its place
    assert pipe.get_active_adapters() == ["a"] and acts(pipe, (A, 1.0))
    pipe.delete_adapters("a")
    assert pipe.get_active_adapters() == [] and pipe.get_list_adapters() == {} and acts(pipe)
    pipe.load_lora_weights(B)  # the name is made from how many there are
    assert pipe.get_active_adapters() == ["default_0"] and acts(pipe, (B, 1.0))
    pipe.load_lora_weights(A)
    assert pipe.get_active_adapters() == ["default_1"] and acts(pipe, (A, 1.0))


def test_unloading_forgets_everything():
    pipe = stable_diffusion()
    before = bits(pipe.unet), bits(pipe.text_encoder)
    for file in (A, B):  # under the same name, in the very same models
        pipe.load_lora_weights(file, adapter_name="a")
        assert acts(pipe, (file, 1.0))
        pipe.unload_lora_weights()
        assert unchanged(pipe.unet, before[0]) and unchanged(pipe.text_encoder, before[1])
        assert pipe.get_list_adapters() == {} and pipe.get_active_adapters() == []
        with pytest.raises(ValueError, match="no adapters"):
            get_peft_model_state_dict(pipe.unet)


def test_copies_of_a_model_are_independent():
    pipe = two()
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    other = copy.deepcopy(pipe.unet)
    pipe.delete_adapters("a")
    pipe.unload_lora_weights()
    same(eps(other), eps(merged(unet(), (A, 0.5), (B, 0.5))))
    other.set_adapters("a")
    same(eps(other), eps(merged(unet(), (A, 1.0))))
    assert torch.equal(eps(pipe.unet), eps(unet()))


def test_moving_adapters_between_devices():
    pipe = two()
    pipe.set_adapters("a")
    pipe.set_lora_device(["b"], "meta")
    away = [n for n, p in pipe.unet.named_parameters() if p.is_meta]
    assert len(away) == 2 * len(UNET) and all(".b." in n for n in away)
    assert acts(pipe, (A, 1.0))


@pytest.mark.parametrize("scale", [0.5, 0.0, 1.0, -2.0])
def test_scale_of_one_call(scale):
    pipe = two()
    pipe.set_adapters(["a", "b"], [0.5, 1.0])
    if scale == 0.0:  # diffusers then resets the weights to 1
        pipe.set_adapters(["a", "b"])
    weights = ((A, 1.0), (B, 1.0)) if scale == 0.0 else ((A, 0.5), (B, 1.0))
    scaled = [(f, scale * s) for f, s in weights]
    same(eps(pipe.unet, cross_attention_kwargs={"scale": scale}), eps(merged(unet(), *scaled)), 2e-5)
    assert acts(pipe, *weights)  # as it was
    plain = stable_diffusion(merged(unet(), *scaled), merged(text_encoder(), *scaled))
    same(picture(pipe, cross_attention_kwargs={"scale": scale}), picture(plain), 2e-5)
    assert acts(pipe, *weights)


# -- fusing ---------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("safe_fusing", [False, True])
def test_fusing_and_unfusing(safe_fusing):
    pipe = two()
    pipe.set_adapters(["a", "b"], [0.7, 0.4])
    before = bits(pipe.unet), bits(pipe.text_encoder)
    pipe.fuse_lora(components=BOTH, lora_scale=0.5, safe_fusing=safe_fusing)
    assert pipe.num_fused_loras == 2 and pipe.fused_loras == {"a", "b"} and acts(pipe, (A, 0.35), (B, 0.2))
    W, plain = pipe.unet.conv_in.base_layer.weight, unet().conv_in.weight
    d = [product(f, "unet.conv_in", plain.shape) for f in (A, B)]
    same(W, plain + 0.35 * d[0] + 0.2 * d[1], 1e-6)
    pipe.unfuse_lora(components=BOTH)
    assert pipe.num_fused_loras == 0 and unchanged(pipe.unet, before[0]) and unchanged(pipe.text_encoder, before[1])
    pipe.disable_lora()
    assert torch.equal(eps(pipe.unet), eps(unet()))


def test_fusing_one_after_the_other():
    pipe = two()
    pipe.set_adapters(["a", "b"])
    pipe.fuse_lora(components=BOTH, adapter_names=["a"])
    assert pipe.num_fused_loras == 1 and acts(pipe, (A, 1.0))
    # the scale is for what is fused now; what was fused before stays as strong as it was
    pipe.fuse_lora(components=BOTH, adapter_names=["b"], lora_scale=0.5)
    assert pipe.num_fused_loras == 2 and acts(pipe, (A, 1.0), (B, 0.5))
    pipe.set_adapters("a", 0.1)
    assert acts(pipe, (A, 1.0), (B, 0.5))
    pipe.unfuse_lora(components=["unet"])
    assert pipe.num_fused_loras == 2  # the text encoder still has them
    same(eps(pipe.unet), eps(merged(unet(), (A, 0.1))))
    pipe.unfuse_lora(components=["text_encoder"])
    assert pipe.num_fused_loras == 0


def test_what_is_fused_stays_when_adapters_are_unloaded_or_deleted(tmp_path):
    pipe = two()
    pipe.set_adapters("a")
    pipe.fuse_lora(components=BOTH, lora_scale=0.5)
    pipe.delete_adapters("a")
    assert acts(pipe, (A, 0.5))
    pipe.set_adapters("b")
    pipe.fuse_lora(components=BOTH)
    assert acts(pipe, (A, 0.5), (B, 1.0))
    pipe.unload_lora_weights()
    assert acts(pipe, (A, 0.5), (B, 1.0))
    pipe.save_pretrained(tmp_path)
    read = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, safety_checker=None)
    assert torch.equal(eps(read.unet), eps(pipe.unet)) and acts(read, (A, 0.5), (B, 1.0))


def test_fusing_values_that_are_not_finite():
    pipe = stable_diffusion()
    file = unet_file()
    file["unet.conv_in.lora_B.weight"][0, 0] = float("nan")
    pipe.load_lora_weights(file, adapter_name="a")
    with pytest.raises(ValueError, match="NaN"):
        pipe.fuse_lora(components=["unet"], safe_fusing=True)
    pipe.unfuse_lora(components=["unet"])
    pipe.disable_lora()
    assert torch.equal(eps(pipe.unet), eps(unet()))


# -- hot swap -------------------------------------------------------------------------------------------------------------------------
def test_hot_swap(tmp_path):
    pipe = stable_diffusion()
    pipe.load_lora_weights(unet_file(), adapter_name="a")
    pipe.set_adapters("a", 0.5)
    tensors = {n: p for n, p in pipe.unet.named_parameters() if "lora_" in n}
    pipe.load_lora_weights(saved(tmp_path, unet_file(20)), weight_name=FILE, adapter_name="a", hotswap=True)
    assert all(p is tensors[n] for n, p in pipe.unet.named_parameters() if "lora_" in n)  # in place
    same(eps(pipe.unet), eps(merged(unet(), (unet_file(20), 1.0))))  # as a fresh load, at full strength
    for file in (unet_file(21, 2), unet_file(22, 3, UNET[:4]), unet_file(23, 4, [*UNET, "conv_out"])):
        pipe.load_lora_weights(file, adapter_name="a", hotswap=True)
        same(eps(pipe.unet), eps(merged(unet(), (file, 1.0))))
    with pytest.raises(ValueError, match="no existing adapter"):
        pipe.load_lora_weights(unet_file(), adapter_name="b", hotswap=True)
    with pytest.raises(ValueError, match="text encoder"):
        pipe.load_lora_weights(A, adapter_name="a", hotswap=True)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hot_swap_of_a_compiled_model_recompiles_nothing(backend):
    from torch._dynamo.utils import counters

    names = ["conv_in", "mid_block.resnets.0.conv1", "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]

    def file(seed: int, r: int, named: list[str] = names) -> dict[str, Tensor]:
        return below("unet", factors(small_unet(), named, r, seed))

    def alphas(*values: float) -> dict[str, float]:
        return {f"unet.{n}.alpha": a for n, a in zip(names, values, strict=True)}

    torch._dynamo.reset()
    pipe = stable_diffusion(small_unet())
    pipe.enable_lora_hotswap(target_rank=8)
    pipe.unet.load_lora_adapter(file(10, 4), prefix="unet", adapter_name="a", network_alphas=alphas(1, 2, 3))
    pipe.unet.compile(backend=backend)
    same(eps(pipe.unet), eps(merged(small_unet(), (file(10, 4), lambda n: (1 + names.index(n)) / 4))), 2e-5)
    counters.clear()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tensors in (file(20, 8), file(21, 2), file(22, 3, names[:2])):  # the last has one layer fewer
            pipe.load_lora_weights(tensors, adapter_name="a", hotswap=True)
            same(eps(pipe.unet), eps(merged(small_unet(), (tensors, 1.0))), 2e-5)
        given = file(23, 5), (8, 2, 16)
        pipe.unet.load_lora_adapter(
            given[0], prefix="unet", adapter_name="a", hotswap=True, network_alphas=alphas(*given[1])
        )
        same(eps(pipe.unet), eps(merged(small_unet(), (given[0], lambda n: given[1][names.index(n)] / 5))), 2e-5)
    assert not counters["stats"].get("unique_graphs"), counters["stats"]
    with pytest.raises(ValueError, match="rank 16"):
        pipe.load_lora_weights(file(24, 16), adapter_name="a", hotswap=True)
    torch._dynamo.reset()


def test_prepared_slots_keep_the_weights_that_were_set():
    model = transformer()
    model.load_lora_adapter(dit_file(), prefix="transformer", adapter_name="a")
    model.set_adapters("a", 0.5)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    same(velocity(model), velocity(merged(transformer(), (dit_file(), 0.5))))
    model.set_adapters("a", 1.0)
    same(velocity(model), velocity(merged(transformer(), (dit_file(), 1.0))))
    model.set_adapters("a", 0.0)
    model.load_lora_adapter(dit_file(30, 2), prefix="transformer", adapter_name="a", hotswap=True)
    same(velocity(model), velocity(merged(transformer(), (dit_file(30, 2), 1.0))))


def test_hot_swap_is_to_be_enabled_before_the_first_adapter(caplog):
    pipe = stable_diffusion()
    pipe.load_lora_weights(unet_file(), adapter_name="a")
    with pytest.raises(RuntimeError, match="before loading the first adapter"):
        pipe.enable_lora_hotswap(target_rank=8)
    with diffusers_log(caplog):
        pipe.enable_lora_hotswap(target_rank=8, check_compiled="warn")
    assert "before loading the first adapter" in caplog.text


# -- DiT ------------------------------------------------------------------------------------------------------------------------------
def test_flux_with_text_encoder():
    files = [dit_file(s, r) | text_file(s + 1, r) for s, r in ((40, 4), (50, 2))]
    pipe = flux()
    before = bits(pipe.transformer), bits(pipe.text_encoder)

    def want(*weights: float) -> Any:
        both = list(zip(files, weights, strict=True))
        return flux(merged(transformer(), *both), merged(text_encoder(), *both))

    def painted(p: Any, **kwargs: Any) -> Tensor:
        rng = torch.Generator().manual_seed(8)
        return p(
            "a red cat", num_inference_steps=2, height=4, width=4, generator=rng, output_type="latent", **kwargs
        ).images

    for name, file in zip("ab", files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    same(painted(pipe), painted(want(0.0, 1.0)))
    pipe.set_adapters(["a", "b"], [0.7, -0.3])
    same(painted(pipe), painted(want(0.7, -0.3)))
    same(painted(pipe, joint_attention_kwargs={"scale": 0.5}), painted(want(0.35, -0.15)))
    same(painted(pipe), painted(want(0.7, -0.3)))
    assert differs(painted(want(0.7, -0.3)), painted(flux()))
    components = ["transformer", "text_encoder"]
    pipe.fuse_lora(components=components, lora_scale=0.5)
    same(painted(pipe), painted(want(0.35, -0.15)))
    pipe.unfuse_lora(components=components)
    pipe.set_adapters(["a", "b"], [{"transformer": 0.2, "text_encoder": 0.9}, {"transformer": 0.3}])
    same(velocity(pipe.transformer), velocity(want(0.2, 0.3).transformer))
    same(hidden(pipe.text_encoder), hidden(want(0.9, 1.0).text_encoder))
    pipe.unload_lora_weights()
    assert unchanged(pipe.transformer, before[0]) and unchanged(pipe.text_encoder, before[1])


def test_a_dit_trains_and_is_saved(tmp_path):
    model = transformer()
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_add_out", "proj_mlp"]))
    state = move(model)
    diffusers.FluxPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(model),
        **training._collate_lora_metadata({"transformer": model}),
    )
    file = load_file(tmp_path / FILE)
    assert set(file) == {f"transformer.{k}" for k in state}
    pipe = flux()
    pipe.load_lora_weights(tmp_path, weight_name=FILE)
    same(velocity(pipe.transformer), velocity(merged(transformer(), (file, 2.0))))


# -- storage, offloading --------------------------------------------------------------------------------------------------------------
def cast(storage: torch.dtype) -> Any:
    """A plain UNet whose weights have lost what a UNet stored in `storage` loses."""
    lossy, plain = unet(), unet()
    lossy.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    plain.load_state_dict(lossy.state_dict())
    return plain


@pytest.mark.parametrize("adapter_first", [True, False])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_layerwise_casting(storage, adapter_first):
    pipe = stable_diffusion()
    options = {"storage_dtype": storage, "compute_dtype": torch.float32}
    if adapter_first:
        pipe.load_lora_weights(unet_file(), adapter_name="a")
        pipe.unet.enable_layerwise_casting(**options)
    else:
        pipe.unet.enable_layerwise_casting(**options)
        pipe.load_lora_weights(unet_file(), adapter_name="a")
    held = {p.dtype for n, p in pipe.unet.named_parameters() if "lora_" in n}
    assert held == {torch.float32 if adapter_first or storage.itemsize == 1 else storage}
    file = unet_file() if held == {torch.float32} else {k: v.to(storage).float() for k, v in unet_file().items()}
    attention = pipe.unet.get_submodule(UNET[0])
    assert attention.base_layer.weight.dtype == storage
    # the last convolutions are stored as they are, by diffusers' own list
    same(eps(pipe.unet), eps(merged(cast(storage), (file, 1.0))), 2e-5)
    pipe.set_adapters("a", 0.5)
    same(eps(pipe.unet), eps(merged(cast(storage), (file, 0.5))), 2e-5)
    assert attention.base_layer.weight.dtype == storage
    if storage.itemsize == 1:  # its numbers are too coarse to hold what an adapter adds
        from peft import Refusal  # upstream, which runs parts of this file, has none

        with pytest.raises(Refusal, match="rounds small changes away"):
            pipe.fuse_lora(components=["unet"])
    else:
        pipe.fuse_lora(components=["unet"])
        assert attention.base_layer.weight.dtype == storage
        pipe.unfuse_lora(components=["unet"])
    pipe.unload_lora_weights()
    same(eps(pipe.unet), eps(cast(storage)))


@pytest.mark.parametrize(
    "kind", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}]
)
def test_group_offloading(kind):
    pipe = stable_diffusion()
    pipe.load_lora_weights(A, adapter_name="a")
    for model in (pipe.unet, pipe.text_encoder):
        hooks.apply_group_offloading(model, onload_device=torch.device("cpu"), **kind)
    assert acts(pipe, (A, 1.0))
    pipe.load_lora_weights(B, adapter_name="b")  # diffusers takes its hooks off and puts them on again
    pipe.set_adapters(["a", "b"], [0.5, 0.5])
    assert acts(pipe, (A, 0.5), (B, 0.5))
    pipe.delete_adapters("a")
    assert acts(pipe, (B, 0.5))
    pipe.unload_lora_weights()
    assert acts(pipe)


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    pipe = two()
    pipe.set_adapters(["a", "b"], [0.7, -0.3])
    for model in (pipe.unet, pipe.text_encoder):
        accelerate.cpu_offload(model, torch.device("cpu"))
        assert all(p.is_meta for p in model.parameters())
    assert acts(pipe, (A, 0.7), (B, -0.3))
    pipe.set_adapters("a")
    assert acts(pipe, (A, 1.0))
    for model in (pipe.unet, pipe.text_encoder):
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        assert not any(hasattr(m, "_hf_hook") for m in model.modules())


# -- upstream -------------------------------------------------------------------------------------------------------------------------
def elsewhere(folder: str) -> None:
    """In a process with upstream: run the file from here, and leave one."""
    pipe = stable_diffusion()
    out = {"version": torch.tensor([int(n) for n in peft.__version__.split(".")])}
    pipe.load_lora_weights(folder, weight_name=FILE, adapter_name="here")
    pipe.load_lora_weights(B, adapter_name="b")
    pipe.set_adapters("here")
    out |= {"eps": eps(pipe.unet), "hidden": hidden(pipe.text_encoder), "picture": picture(pipe)}
    pipe.set_adapters(["here", "b"], [0.7, -0.3])
    out["both"] = eps(pipe.unet)
    pipe.unload_lora_weights()
    config = {"r": 4, "lora_alpha": 8, "rank_pattern": {"to_v": 2}}
    pipe.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_v", "conv1"], **config))
    pipe.text_encoder.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "fc1"]))
    layers, text_layers = move(pipe.unet), move(pipe.text_encoder)
    metadata = training._collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder})
    type(pipe).save_lora_weights(os.path.join(folder, "there"), layers, text_layers, **metadata)
    out |= {"there eps": eps(pipe.unet), "there hidden": hidden(pipe.text_encoder)}
    save_file({k: v.contiguous() for k, v in out.items()}, os.path.join(folder, "elsewhere.safetensors"))


@pytest.mark.slow
def test_files_go_to_upstream_and_come_back(upstream_folder, tmp_path):
    pipe, _ = trained()
    type(pipe).save_lora_weights(
        tmp_path,
        get_peft_model_state_dict(pipe.unet),
        get_peft_model_state_dict(pipe.text_encoder),
        **training._collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}),
    )
    run = [sys.executable, "-c", "import sys, test_diffusers; test_diffusers.elsewhere(sys.argv[1])", str(tmp_path)]
    paths = os.pathsep.join([str(upstream_folder), str(Path(__file__).parent)])
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(run, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    there = load_file(tmp_path / "elsewhere.safetensors")
    assert there["version"].tolist() == [0, 21, 2]

    here = stable_diffusion()
    here.load_lora_weights(tmp_path, weight_name=FILE, adapter_name="here")
    here.load_lora_weights(B, adapter_name="b")
    here.set_adapters("here")
    same(eps(here.unet), there["eps"])
    same(hidden(here.text_encoder), there["hidden"])
    same(picture(here), there["picture"])
    here.set_adapters(["here", "b"], [0.7, -0.3])
    same(eps(here.unet), there["both"])

    here = stable_diffusion()
    here.load_lora_weights(tmp_path / "there", weight_name=FILE, adapter_name="there")
    same(eps(here.unet), there["there eps"])
    same(hidden(here.text_encoder), there["there hidden"])
    assert differs(there["eps"], eps(unet())) and differs(there["there eps"], eps(unet()))
