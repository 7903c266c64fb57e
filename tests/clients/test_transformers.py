"""transformers as a client: its adapter methods, its loader, Trainer, pipelines, generation and every task head.

Expected values are the plain base model with explicitly changed weights, upstream's logits (tests/golden), or the live
adapter that wrote a file.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import (
    AdaLoraConfig,
    BitFitConfig,
    IA3Config,
    LoHaConfig,
    LoraConfig,
    MultitaskPromptTuningConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    registry,
    set_peft_model_state_dict,
)
from peft.core.acting.adapted_layer import AdaptedLayer

transformers = pytest.importorskip("transformers")
try:
    importlib.metadata.version("peft")
except importlib.metadata.PackageNotFoundError:  # transformers asks for the installed distribution's version
    pytest.skip("needs the installed distribution: pip install -e .", allow_module_level=True)

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    pipeline,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "experts"
IDS = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def make(family: str, head: str = "ForCausalLM", seed: int = 0, **more) -> nn.Module:
    """A tiny random model; every parameter with more than one axis has entries that matter."""
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **more})
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}{head}")(config)
    rng = torch.Generator().manual_seed(seed)
    for _, p in sorted(model.named_parameters()):
        if p.dim() > 1:
            p.data = torch.randn(p.shape, generator=rng) * 0.3
    return model.eval()


def llama(**more) -> nn.Module:
    return make("Llama", attention_bias=True, **more)


def mixtral(**more) -> nn.Module:
    return make("Mixtral", num_local_experts=3, num_experts_per_tok=2, **more)


def qwen(**more) -> nn.Module:
    return make("Qwen3Moe", moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2, **more)


def t5(head: str = "ForConditionalGeneration", **more) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return make("T5", head, **sizes, num_key_value_heads=2, head_dim=8, **more)


def lora(**more) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], **more})


def noise(model: nn.Module, size: float = 0.3, seed: int = 3) -> nn.Module:
    """Move what trains, so that it matters."""
    rng = torch.Generator().manual_seed(seed)
    for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
        p.data += torch.randn(p.shape, generator=rng).to(p.dtype) * size
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module, **inputs) -> torch.Tensor:
    return model(**(inputs or {"input_ids": IDS})).logits


def file_of(folder) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


# -- model.load_adapter reads whatever PeftModel.from_pretrained reads ----------------------------------------------------------
METHODS = [
    (key, i)
    for key, cls in sorted(registry.methods().items())
    if cls.peft_type
    for i in range(max(1, len(cls.examples)))
]


@pytest.mark.parametrize(("key", "which"), METHODS, ids=[f"{k}-{i}" for k, i in METHODS])
def test_every_methods_file_loads_through_transformers(key, which, tmp_path):
    cls = registry.method(key)
    fields = dict(cls.examples[which]) if cls.examples else {}
    if cls.form != "prompt":
        fields.setdefault("target_modules", ["q_proj", "o_proj"])
    else:
        fields["task_type"] = "CAUSAL_LM"
    model = noise(get_peft_model(llama(), cls.config_class(**fields)))
    model.save_pretrained(tmp_path)
    out, base = logits(model), logits(llama())
    assert out.shape != base.shape or gap(out, base) > 1e-3
    other = llama()
    report = other.load_adapter(str(tmp_path), "v1.0 (b)")
    assert not report.missing_keys and not report.unexpected_keys and not report.mismatched_keys
    assert torch.equal(logits(other), out) and other.active_adapters() == ["v1.0 (b)"]
    assert not any(p.requires_grad for p in other.parameters())
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), out)
    keys = other.get_adapter_state_dict()
    assert {k.removeprefix("base_model.model.") for k in file_of(tmp_path)} == set(keys)
    other.delete_adapter("v1.0 (b)")
    assert torch.equal(logits(other), base)


def test_shared_banks_stay_shared_and_train(tmp_path):
    noise(get_peft_model(llama(), VeraConfig(r=4, target_modules=["q_proj", "o_proj"]))).save_pretrained(tmp_path)
    model = llama()
    model.load_adapter(str(tmp_path), is_trainable=True)
    banks = [p for n, p in model.named_parameters(remove_duplicate=False) if "vera_A" in n]
    assert len(banks) == 4 and len({id(p) for p in banks}) == 1 and not banks[0].requires_grad
    assert {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.requires_grad} == {
        "vera_lambda_b_weight",
        "vera_lambda_d_weight",
    }


@pytest.mark.parametrize("config", [LoraConfig, LoHaConfig], ids=["lora", "loha"])
def test_convolution_factors_load(config, tmp_path):
    def resnet():
        torch.manual_seed(0)
        sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
        return transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes, num_labels=3)).eval()

    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    model = noise(get_peft_model(resnet(), config(r=2, target_modules=["convolution"], modules_to_save=["1"])))
    model.save_pretrained(tmp_path)
    other = resnet()
    other.load_adapter(str(tmp_path))
    assert torch.equal(logits(other, **pixels), logits(model, **pixels))
    assert gap(logits(other, **pixels), logits(resnet(), **pixels)) > 1e-2


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss", "llama4"])
def test_upstreams_files_for_stacked_experts_give_upstreams_logits(name):
    from tests.helpers.experts import IDS as ids
    from tests.helpers.experts import base

    expected = load_file(GOLDEN / name / "logits.safetensors")["logits"]
    model = base(name)
    report = model.load_adapter(str(GOLDEN / name))
    assert not report.missing_keys and not report.unexpected_keys
    assert gap(logits(model, input_ids=ids), expected) < 1e-5


def test_keys_of_integers_lead_to_integers():
    """The loader casts a value to the dtype of the tensor that its key leads to: indices would lose bits in floats."""
    config = registry.method("FISHMASK").config_class(target_modules=["q_proj", "v_proj"], keep_ratio=0.1)
    model = peft.inject_adapter_in_model(config, llama(), "a")
    state, patterns = model.state_dict(), {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLayer):
            found = module.adapter_state_dict_load_map("a")
            patterns.update({f"{name}.{k}": f"{name}.{v}" for k, v in found.items()})
    from transformers.core_model_loading import WeightRenaming

    renamings = [WeightRenaming(k, v) for k, v in patterns.items()]
    kinds = set()
    for key, tensor in peft.get_peft_model_state_dict(model, adapter_name="a").items():
        for r in renamings:
            key = r.rename_source_key(key)[0]
        assert state[key].is_floating_point() == tensor.is_floating_point()
        assert torch.equal(tensor.to(state[key].dtype).to(tensor.dtype), tensor)
        kinds.add(tensor.is_floating_point())
    assert kinds == {True, False}


def test_a_file_for_another_model_raises_and_leaves_no_adapter(tmp_path):
    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    state = {k.replace("self_attn", "attention"): v for k, v in file_of(tmp_path).items()}
    save_file(state, tmp_path / "adapter_model.safetensors")
    model = llama()
    with pytest.raises(peft.CheckpointError, match="does not fit this model"):
        model.load_adapter(str(tmp_path))
    assert torch.equal(logits(model), logits(llama()))


def test_what_does_not_fit_is_reported(tmp_path):
    get_peft_model(llama(), lora()).save_pretrained(tmp_path)
    state = file_of(tmp_path)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    state["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = state.pop(key)
    model = llama()
    config = PeftConfig.from_pretrained(tmp_path)
    report = model.load_adapter(peft_config=config, adapter_state_dict=state, adapter_name="a")
    assert [k.startswith("model.layers.0.self_attn.q_proj.lora_A.weight") for k in report.missing_keys] == [True]
    assert report.unexpected_keys == {key.replace(".0.", ".9.")}
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        wide = make("Llama", attention_bias=True, hidden_size=32)
        wide.load_adapter(str(tmp_path))


def test_weights_given_as_a_state_dict(tmp_path):
    model = llama()
    model.add_adapter(lora(init_lora_weights=False))
    other = llama()
    other.load_adapter(peft_config=lora(), adapter_state_dict=model.get_adapter_state_dict())
    assert torch.equal(logits(other), logits(model))


# -- several adapters -------------------------------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path):
    """Two LoRA files of different rank and alpha, and their deltas by layer and projection."""
    deltas = []
    for i, (name, fields) in enumerate([("a", {}), ("b", {"r": 2, "lora_alpha": 16})]):
        config = lora(**fields)
        noise(get_peft_model(llama(), config), seed=i).save_pretrained(tmp_path / name)
        state, s = file_of(tmp_path / name), config.lora_alpha / config.r
        stems = {k.rsplit(".lora_", 1)[0] for k in state}
        deltas.append(
            {
                stem.removeprefix("base_model.model."): s
                * state[f"{stem}.lora_B.weight"]
                @ state[f"{stem}.lora_A.weight"]
                for stem in stems
            }
        )
    return tmp_path / "a", tmp_path / "b", *deltas


def merged(*deltas: dict[str, torch.Tensor]) -> nn.Module:
    """The plain base with these deltas in its weights."""
    model = llama()
    with torch.no_grad():
        for delta in deltas:
            for path, value in delta.items():
                model.get_submodule(path).weight += value
    return model


def test_loading_switching_combining_disabling(folders):
    a, b, delta_a, delta_b = folders
    model = llama()
    model.load_adapter(str(a), "a")
    model.load_adapter(str(b), "b", is_trainable=True)
    assert model.active_adapters() == ["b"]  # the one loaded last, as upstream has it
    assert all(".b." in n for n, p in model.named_parameters() if p.requires_grad)
    assert gap(logits(model), logits(merged(delta_b))) < 1e-5
    model.set_adapter("a")
    assert gap(logits(model), logits(merged(delta_a))) < 1e-5
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"]
    assert gap(logits(model), logits(merged(delta_a, delta_b))) < 1e-5
    model.disable_adapters()
    assert torch.equal(logits(model), logits(llama()))
    model.enable_adapters()
    assert gap(logits(model), logits(merged(delta_a, delta_b))) < 1e-5
    model.delete_adapter("a")
    assert gap(logits(model), logits(merged(delta_b))) < 1e-5
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("a")
    with pytest.raises(ValueError, match="already exists"):
        model.load_adapter(str(b), "b")


def test_adapters_of_different_methods_in_one_model(folders, tmp_path):
    a, _, delta_a, _ = folders
    model = llama()
    model.add_adapter(IA3Config(target_modules=["k_proj"], feedforward_modules=[], init_ia3_weights=False), "i")
    scaled = logits(model)
    model.load_adapter(str(a), "a")
    assert gap(logits(model), logits(merged(delta_a))) < 1e-5
    model.add_adapter(BitFitConfig(target_modules=["q_proj"]), "bias")
    model.set_adapter("i")
    assert torch.equal(logits(model), scaled)
    model.set_adapter("a")
    assert gap(logits(model), logits(merged(delta_a))) < 1e-5


def test_after_the_last_adapter_the_model_saves_as_the_base(folders, tmp_path):
    model = llama()
    model.load_adapter(str(folders[0]), "a")
    model.add_adapter(lora(), "c")
    model.delete_adapter(["a", "c"])
    assert not hasattr(model, "peft_config")
    model.save_pretrained(tmp_path / "base")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(logits(again), logits(llama()))
    model.load_adapter(str(folders[0]), "a")
    assert gap(logits(model), logits(merged(folders[2]))) < 1e-5


@pytest.mark.parametrize("how", ["explicit", "enabled"])
def test_a_hot_swap_equals_a_fresh_load(folders, how):
    a, b, delta_a, delta_b = folders
    model = llama()
    if how == "enabled":
        model.enable_peft_hotswap(target_rank=8)
    model.load_adapter(str(a), "x")
    options = {"hotswap": True} if how == "explicit" else {}
    model.load_adapter(str(b), "x", **options)  # another rank and another alpha
    assert gap(logits(model), logits(merged(delta_b))) < 1e-5
    assert model.peft_config["x"].lora_alpha == 16
    model.load_adapter(str(a), "x", **options)
    assert gap(logits(model), logits(merged(delta_a))) < 1e-5
    with pytest.raises(ValueError, match="already be an existing adapter"):
        model.load_adapter(str(a), "y", hotswap=True)


def test_a_hot_swap_onto_the_same_rank_keeps_the_parameters(folders, tmp_path):
    a, _, delta_a, _ = folders
    model = llama()
    model.load_adapter(str(a), "x")
    before = [id(p) for p in model.parameters()]
    noise(get_peft_model(llama(), lora(lora_alpha=1)), seed=9).save_pretrained(tmp_path / "c")
    model.load_adapter(str(tmp_path / "c"), "x", hotswap=True)
    expected = logits(PeftModel.from_pretrained(llama(), tmp_path / "c").eval())
    assert gap(logits(model), expected) < 1e-6 and gap(expected, logits(merged(delta_a))) > 1e-3
    model.load_adapter(str(a), "x", hotswap=True)
    assert len(before) == len(list(model.parameters()))


@pytest.mark.parametrize("field", ["modules_to_save", "trainable_token_indices", "bias", "use_dora"])
def test_what_trains_along_is_saved_and_loaded(field, tmp_path):
    value = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3, 5], "bias": "all", "use_dora": True}[field]
    model = llama()
    model.add_adapter(lora(**{field: value}), "a")
    noise(model)
    model.save_pretrained(tmp_path)
    other = llama()
    report = other.load_adapter(str(tmp_path), "b")
    assert not report.missing_keys and not report.unexpected_keys
    assert torch.equal(logits(other), logits(model))
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))
    other.set_adapter("b")
    assert {n for n, p in other.named_parameters() if p.requires_grad} == {
        n.replace(".a.", ".b.") for n, p in model.named_parameters() if p.requires_grad
    }


# -- folders with adapters as models --------------------------------------------------------------------------------------------
def test_a_folder_with_only_an_adapter_is_a_model(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = noise(get_peft_model(base, lora(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "x" / "inner")
    assert json.loads((tmp_path / "x/inner/adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    found, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "x" / "inner", adapter_name="mine", output_loading_info=True
    )
    assert torch.equal(logits(found.eval()), logits(model)) and found.active_adapters() == ["mine"]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    # an adapter in a subfolder of the base model's folder
    model.save_pretrained(tmp_path / "base" / "tuned")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base", adapter_kwargs={"subfolder": "tuned"})
    assert torch.equal(logits(found.eval()), logits(model))
    # a complete model with an adapter beside it
    model.save_pretrained(tmp_path / "base")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert torch.equal(logits(found.eval()), logits(model))


def test_saving_a_model_with_adapters_writes_the_active_one(tmp_path):
    model = llama()
    model.add_adapter(lora(init_lora_weights=False), "a")
    a = logits(model)
    model.add_adapter(lora(r=2, init_lora_weights=False), "b")
    for name in ("a", "b"):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name)
        assert PeftConfig.from_pretrained(tmp_path / name).r == {"a": 4, "b": 2}[name]
        files = set(os.listdir(tmp_path / name))
        assert {"adapter_config.json", "adapter_model.safetensors"} <= files and "model.safetensors" not in files
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "a").eval()), a)
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match="Multiple active adapters"):
        model.save_pretrained(tmp_path / "both")


# -- adapters made on the layout that transformers 5 left ---------------------------------------------------------------------------
OLDER = {
    "Mixtral": ("block_sparse_moe", ("w1", "w3", "w2")),
    "Qwen3Moe": ("mlp", ("gate_proj", "up_proj", "down_proj")),
}


def made_on_the_older_layout(model: nn.Module, folder: Path, **fields) -> nn.Module:
    """Write a LoRA file with one pair of factors for each expert's layers; returns `model` with its deltas merged."""
    config = {"r": 2, "lora_alpha": 6, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}, **fields}
    block, layers = OLDER[type(model).__name__.removesuffix("ForCausalLM")]
    rng, state = torch.Generator().manual_seed(5), {}

    def add(key: str, name: str, weight: torch.Tensor) -> None:
        r = config["rank_pattern"].get(name, config["r"])
        scale = config["alpha_pattern"].get(name, config["lora_alpha"]) / (r**0.5 if config["use_rslora"] else r)
        A = torch.randn(r, weight.shape[1], generator=rng) * 0.3
        B = torch.randn(weight.shape[0], r, generator=rng) * 0.3
        state.update({f"base_model.model.{key}.lora_A.weight": A, f"base_model.model.{key}.lora_B.weight": B})
        weight += scale * B @ A
        if config.get("use_dora"):
            length = torch.rand(weight.shape[0], generator=rng) + 0.5
            state[f"base_model.model.{key}.lora_magnitude_vector"] = length
            weight *= (length / weight.norm(dim=1))[:, None]

    with torch.no_grad():
        for i, layer in enumerate(model.model.layers):
            up, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
            half = up.shape[1] // 2
            for e in range(up.shape[0]):
                stem = f"model.layers.{i}.{block}.experts.{e}"
                for name, weight in zip(layers, (up[e, :half], up[e, half:], down[e]), strict=True):
                    add(f"{stem}.{name}", name, weight)
            add(f"model.layers.{i}.{block}.gate", "gate", layer.mlp.gate.weight)
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                add(f"model.layers.{i}.self_attn.{name}", name, layer.self_attn.get_submodule(name).weight)
    folder.mkdir()
    save_file(state, folder / "adapter_model.safetensors")
    targets = config.pop("target_modules", [*layers, "gate", "q_proj", "k_proj", "v_proj", "o_proj"])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "target_modules": targets, **config}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return model


@pytest.mark.parametrize("base", [mixtral, qwen], ids=["mixtral", "qwen3-moe"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_rslora": True},
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.(q_proj|k_proj|v_proj|o_proj|gate|w[123]|(gate|up|down)_proj)"},
        {"rank_pattern": {"w1": 3, "gate_proj": 3}, "alpha_pattern": {"w1": 9, "gate_proj": 9}},
        {"rank_pattern": {"w2": 4}},
        {"use_dora": True},
    ],
    ids=["list", "rslora", "all-linear", "regex", "one layer's rank", "rank of the lower", "dora"],
)
def test_an_adapter_for_separate_experts_becomes_one_for_stacked_ones(base, fields, tmp_path):
    expected = logits(made_on_the_older_layout(base(), tmp_path / "old", **fields))
    assert gap(expected, logits(base())) > 1e-2
    model = PeftModel.from_pretrained(base(), tmp_path / "old").eval()
    assert gap(logits(model), expected) < 2e-5
    assert gap(logits(model.merge_and_unload()), expected) < 2e-5
    through = base()
    report = through.load_adapter(str(tmp_path / "old"))
    assert not report.missing_keys and not report.unexpected_keys
    assert gap(logits(through), expected) < 2e-5
    model = get_peft_model(base(), PeftConfig.from_pretrained(tmp_path / "old"))
    result = set_peft_model_state_dict(model, file_of(tmp_path / "old"))
    assert not result.missing_keys and not result.unexpected_keys
    assert gap(logits(model.eval()), expected) < 2e-5
    model.save_pretrained(tmp_path / "new")  # in the present layout, which needs no translation
    assert "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight" in file_of(tmp_path / "new")
    assert torch.equal(logits(PeftModel.from_pretrained(base(), tmp_path / "new").eval()), logits(model))


def test_the_translated_config_is_upstreams():
    """What upstream 0.21.2 makes of these targets on transformers 5."""
    config = lora(target_modules=["q_proj", "w1", "w2", "w3", "gate"], lora_alpha=8)
    model = get_peft_model(mixtral(), config)
    assert config.target_modules == {"q_proj"}
    assert set(config.target_parameters) == {"gate_up_proj", "down_proj", "gate.weight"}
    assert config.rank_pattern == {r".*\.gate_up_proj": 8} and config.alpha_pattern == {r".*\.gate_up_proj": 16}
    shapes = {k: tuple(t.shape) for k, t in peft.get_peft_model_state_dict(model).items() if "layers.0.mlp" in k}
    stem = "base_model.model.model.layers.0.mlp"
    assert shapes == {
        f"{stem}.gate.lora_A.weight": (4, 16),
        f"{stem}.gate.lora_B.weight": (3, 4),
        f"{stem}.experts.base_layer.lora_A.weight": (24, 16),
        f"{stem}.experts.base_layer.lora_B.weight": (48, 24),
        f"{stem}.experts.lora_A.weight": (12, 24),
        f"{stem}.experts.lora_B.weight": (16, 12),
    }


def test_one_of_two_joined_layers_is_refused_and_expert_names_stay_what_they_are_elsewhere():
    with pytest.raises(ValueError, match="gate_up_proj holds these layers together with w3"):
        get_peft_model(mixtral(), lora(target_modules=["w1"]))
    model = get_peft_model(llama(), lora(target_modules=["gate_proj", "down_proj"]))
    assert not model.peft_config["default"].target_parameters
    dense_first = get_peft_model(qwen(mlp_only_layers=[0]), lora(target_modules=["gate_proj", "up_proj"]))
    paths = {
        k.split(".lora_")[0].removeprefix("base_model.model.model.")
        for k in peft.get_peft_model_state_dict(dense_first)
    }
    assert paths == {"layers.0.mlp.gate_proj", "layers.0.mlp.up_proj", "layers.1.mlp.experts"}


def test_prefixes_of_composed_models_are_found_under_their_old_names(tmp_path):
    """LLaVA's text model was language_model.model, and its vision tower stood at the top."""
    config = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
    model = noise(get_peft_model(llava(), LoraConfig(**config)))
    model.save_pretrained(tmp_path)
    root, old = "base_model.model.", {}
    for key, value in file_of(tmp_path).items():
        key = key.replace(f"{root}model.language_model.", f"{root}language_model.model.")
        old[key.replace(f"{root}model.vision_tower.", f"{root}vision_tower.")] = value
    assert not old.keys() & file_of(tmp_path).keys()
    save_file(old, tmp_path / "adapter_model.safetensors")
    for other in (PeftModel.from_pretrained(llava(), tmp_path), llava()):
        if not isinstance(other, PeftModel):
            other.load_adapter(str(tmp_path))
        assert torch.equal(logits(other.eval(), **LOOK), logits(model, **LOOK))


def test_renamed_modules_are_found_under_their_old_names(tmp_path):
    """GPT-NeoX called its output head embed_out before transformers 5."""

    def neox():
        return make("GPTNeoX")

    model = noise(get_peft_model(neox(), LoraConfig(r=2, target_modules=["query_key_value", "lm_head"])))
    model.save_pretrained(tmp_path)
    state = {k.replace(".lm_head.", ".embed_out."): v for k, v in file_of(tmp_path).items()}
    other = get_peft_model(neox(), LoraConfig(r=2, target_modules=["query_key_value", "lm_head"]))
    result = set_peft_model_state_dict(other, state)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(other.eval()), logits(model))


# -- Trainer ------------------------------------------------------------------------------------------------------------------
TEXTS = [
    {"input_ids": row, "labels": row}
    for row in torch.randint(3, 64, (16, 8), generator=torch.Generator().manual_seed(1))
]
TRAINED = {
    "lora": lambda: lora(task_type="CAUSAL_LM"),
    "dora": lambda: lora(task_type="CAUSAL_LM", use_dora=True),
    "head": lambda: lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(
        task_type="CAUSAL_LM", target_modules=["k_proj", "up_proj"], feedforward_modules=["up_proj"]
    ),
    "vera": lambda: VeraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "o_proj"]),
    "adalora": lambda: AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_r=4, total_step=8),
    "prefix": lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "p-tuning": lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    "bitfit": lambda: BitFitConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]),
}


def trainer(model: nn.Module, folder: Path, steps: int = 4, **more) -> Trainer:
    given = {k: more.pop(k) for k in ("eval_dataset", "compute_metrics") if k in more}
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **{"save_strategy": "steps", **more},
    )
    return Trainer(model=model, args=args, train_dataset=TEXTS, **given)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("which", TRAINED)
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(which, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(llama(), TRAINED[which]())
    start = trained(model)
    trainer(model, tmp_path).train()
    end = trained(model)
    assert any(not torch.equal(start[n], p) for n, p in end.items())
    checkpoint = tmp_path / "checkpoint-2"
    files = set(os.listdir(checkpoint))
    assert {"adapter_model.safetensors", "adapter_config.json", "optimizer.pt"} <= files
    assert not any(f.startswith(("model", "pytorch_model")) for f in files)
    held = sum(t.numel() for t in file_of(checkpoint).values())
    assert held <= 2 * sum(
        p.numel() for p in peft.core.acting.on_model.roster_of(model).adapters["default"].parameters()
    )
    torch.manual_seed(99)  # other starting values, which the checkpoint replaces
    again = get_peft_model(llama(), TRAINED[which]())
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    other = trained(again)
    assert other.keys() == end.keys() and all(torch.equal(other[n], p) for n, p in end.items())
    assert torch.equal(logits(again.eval()), logits(model.eval()))


def test_the_best_model_is_loaded_at_the_end(tmp_path):
    scores = iter([1.0, 3.0, 2.0])
    model = get_peft_model(llama(), lora(task_type="CAUSAL_LM", modules_to_save=["lm_head"]))
    run = trainer(
        model,
        tmp_path,
        steps=6,
        eval_dataset=TEXTS[:4],
        compute_metrics=lambda _: {"score": next(scores)},
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-4")
    state = peft.get_peft_model_state_dict(model)
    best, last = file_of(tmp_path / "checkpoint-4"), file_of(tmp_path / "checkpoint-6")
    assert state.keys() == best.keys() and all(torch.equal(state[k], v) for k, v in best.items())
    assert any(not torch.equal(state[k], v) for k, v in last.items())


def test_gradient_checkpointing_trains_the_same(tmp_path):
    ends = []
    for on in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
        trainer(model, tmp_path / str(on), gradient_checkpointing=on, save_strategy="no").train()
        ends.append(trained(model))
    assert all(torch.allclose(ends[0][n], p, atol=1e-6, rtol=0) for n, p in ends[1].items())
    assert any(p.abs().sum() > 0 for n, p in ends[1].items() if "lora_B" in n)


def test_several_adapters_are_saved_apart_and_the_active_one_resumes(tmp_path):
    def two():
        torch.manual_seed(0)
        model = get_peft_model(llama(), lora(task_type="CAUSAL_LM"))
        model.add_adapter("other", lora(r=2, task_type="CAUSAL_LM"))
        noise(model)
        model.set_adapter("other")
        return model

    model = two()
    start = peft.get_peft_model_state_dict(model)
    start = {k: v.clone() for k, v in start.items()}
    trainer(model, tmp_path).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert all(torch.equal(start[k], v) for k, v in file_of(checkpoint).items())  # not trained
    assert (checkpoint / "other" / "adapter_model.safetensors").exists()
    again = two()
    trainer(again, tmp_path / "again").train(resume_from_checkpoint=str(checkpoint))
    assert again.active_adapters == ["other"]
    for name in ("default", "other"):
        one, two_ = (peft.get_peft_model_state_dict(m, adapter_name=name) for m in (model, again))
        assert all(torch.equal(two_[k], v) for k, v in one.items())


def test_a_model_with_an_added_adapter_trains_and_saves_only_that(tmp_path):
    model = llama()
    model.add_adapter(lora(), "default")
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, tmp_path, gradient_checkpointing=True)
    run.train()
    files = set(os.listdir(tmp_path / "checkpoint-4"))
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], p) for n, p in before.items())
    other = llama()
    other.load_adapter(str(tmp_path / "checkpoint-4"))
    assert torch.equal(logits(other), logits(model.eval())) and gap(logits(other), logits(llama())) > 1e-4
    # Trainer resumes PeftModels only: it says so instead of starting anew
    with pytest.raises(ValueError, match="checkpoint index"):
        trainer(model, tmp_path / "more").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.parametrize(
    ("head", "task", "labels"),
    [
        ("ForSequenceClassification", "SEQ_CLS", ["labels"]),
        ("ForQuestionAnswering", "QUESTION_ANS", ["start_positions", "end_positions"]),
        ("ForCausalLM", "CAUSAL_LM", ["labels"]),
    ],
)
def test_the_trainer_finds_the_labels_of_the_base_model(head, task, labels, tmp_path):
    model = get_peft_model(make("Llama", head), lora(task_type=task))
    assert sorted(trainer(model, tmp_path).label_names) == sorted(labels)


# -- pipelines ------------------------------------------------------------------------------------------------------------------
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    made = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
    )


def bert(head: str, **more) -> nn.Module:
    return make("Bert", head, **more)


def numbers(value) -> list:
    """The numbers and words of a pipeline's answer, in order."""
    if isinstance(value, dict):
        return [x for k in sorted(value) for x in numbers(value[k])]
    if isinstance(value, (list, tuple)):
        return [x for v in value for x in numbers(v)]
    return [value if isinstance(value, (str, int, type(None))) else pytest.approx(float(value), abs=1e-5)]


PIPELINES = {
    "text-generation": (lambda: llama(), "CAUSAL_LM", ["q_proj", "v_proj"], {"max_new_tokens": 4, "do_sample": False}),
    "text-classification": (lambda: bert("ForSequenceClassification"), "SEQ_CLS", ["query"], {"top_k": None}),
    "token-classification": (lambda: bert("ForTokenClassification"), "TOKEN_CLS", ["query"], {}),
    "feature-extraction": (lambda: bert("Model"), "FEATURE_EXTRACTION", ["query"], {}),
}


@pytest.mark.parametrize("task", PIPELINES)
def test_pipelines_answer_with_an_adapter_as_with_merged_weights(task):
    build, kind, targets, options = PIPELINES[task]
    model = noise(get_peft_model(build(), LoraConfig(task_type=kind, r=4, target_modules=targets)))
    from transformers.pipelines.base import SUPPORTED_PEFT_TASKS

    assert type(model).__name__ in SUPPORTED_PEFT_TASKS[task]
    text = ["w1 w2 w3", "w4 w9"]
    if task == "text-generation":
        options = {**options, "batch_size": 2}

    def ask(m: nn.Module):
        return pipeline(task, model=m, tokenizer=tokenizer())(text, **options)

    with_adapter = ask(model)
    plain = ask(build())
    merged_model = model.merge_and_unload()
    assert numbers(with_adapter) == numbers(ask(merged_model))
    assert numbers(with_adapter) != numbers(plain)


def test_a_pipeline_takes_a_folder_with_only_an_adapter(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "tuned")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = noise(get_peft_model(base, lora(task_type="CAUSAL_LM")))
    model.save_pretrained(tmp_path / "tuned")
    run = pipeline("text-generation", model=str(tmp_path / "tuned"), tokenizer=tokenizer())
    out = run("w1 w2", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
    ids = tokenizer()("w1 w2", return_tensors="pt").input_ids
    assert out == model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0].tolist()


# -- generation -----------------------------------------------------------------------------------------------------------------
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


def padded() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of different length, padded on the left."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :2], mask[1, :2] = 0, 0
    return ids, mask


@pytest.mark.parametrize("which", ["lora", "dora", "ia3", "vera", "bitfit"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens_are_those_of_the_merged_model(which, beams):
    model = noise(get_peft_model(llama(), TRAINED[which]()))
    ids, mask = padded()
    options = {"input_ids": ids, "attention_mask": mask, **GREEDY, "num_beams": beams}
    cached = model.generate(**options)
    assert torch.equal(cached, model.generate(**options, use_cache=False))
    plain = llama().generate(**options)
    assert torch.equal(cached, model.merge_and_unload().generate(**options))
    assert cached.shape == plain.shape


def test_generation_with_one_adapter_per_row(folders):
    a, b, delta_a, delta_b = folders
    model = PeftModel.from_pretrained(llama(), a, adapter_name="a")
    model.load_adapter(b, "b")
    model.eval()
    ids = IDS[:1].repeat(3, 1)
    expected = torch.cat([m.generate(input_ids=ids[:1], **GREEDY) for m in (merged(delta_b), llama(), merged(delta_a))])
    assert len({tuple(r) for r in expected.tolist()}) > 1
    assert torch.equal(model.generate(input_ids=ids, adapter_names=["b", "__base__", "a"], **GREEDY), expected)
    beams = torch.cat(
        [m.generate(input_ids=ids[:1], num_beams=2, **GREEDY) for m in (merged(delta_b), llama(), merged(delta_a))]
    )
    assert torch.equal(
        model.generate(input_ids=ids, adapter_names=["b", "__base__", "a"], num_beams=2, **GREEDY), beams
    )


PROMPTS = {
    "prompt": lambda task: PromptTuningConfig(task_type=task, num_virtual_tokens=3),
    "p-tuning": lambda task: PromptEncoderConfig(task_type=task, num_virtual_tokens=3, encoder_hidden_size=8),
    "prefix": lambda task: PrefixTuningConfig(task_type=task, num_virtual_tokens=3),
    "multitask": lambda task: MultitaskPromptTuningConfig(
        task_type=task, num_virtual_tokens=3, num_tasks=2, num_ranks=1
    ),
}


@torch.no_grad()
def by_hand(model: nn.Module, row: torch.Tensor, mask: torch.Tensor, vectors=None, cache=None) -> list[int]:
    """Five greedy tokens of one row on the plain base: virtual tokens before its embeddings, or before its keys."""
    for _ in range(5):
        embeds, seen = model.get_input_embeddings()(row[None]), torch.cat([torch.ones(3).long(), mask])[None]
        if vectors is not None:
            out = model(inputs_embeds=torch.cat([vectors[None], embeds], 1), attention_mask=seen)
        else:
            out = model(inputs_embeds=embeds, past_key_values=cache(), attention_mask=seen)
        row, mask = torch.cat([row, out.logits[0, -1].argmax()[None]]), torch.cat([mask, mask.new_ones(1)])
    return row[-5:].tolist()


def virtual_tokens(model: nn.Module, which: str) -> list[torch.Tensor]:
    """The vectors of each row's prompt, from the trained tensors."""
    method = peft.core.acting.on_model.roster_of(model).adapters["default"].methods[0][1]
    if which != "multitask":
        return [method.prompt_embeddings.detach()] * 2
    A, B = method.prefix_task_cols.detach(), method.prefix_task_rows.detach()
    return [method.embedding.weight.detach() * (A[i] @ B[i]) for i in range(2)]


@pytest.mark.parametrize("which", PROMPTS)
def test_prompt_methods_generate_what_the_plain_model_continues_by_hand(which):
    model = noise(get_peft_model(llama(), PROMPTS[which]("CAUSAL_LM")), 1.0)
    ids, mask = padded()
    more = {"task_ids": torch.tensor([0, 1])} if which == "multitask" else {}
    options = {"input_ids": ids, "attention_mask": mask, **GREEDY, **more}
    out = model.generate(**options)
    assert torch.equal(out, model.generate(**options, use_cache=False))
    assert torch.equal(model.generate(**options, num_beams=3), model.generate(**options, num_beams=3, use_cache=False))
    for i, table in enumerate(virtual_tokens(model, which)):
        real = mask[i].bool()  # padding on the left changes nothing
        if which != "prefix":
            assert out[i, -5:].tolist() == by_hand(llama(), ids[i][real], mask[i][real], vectors=table)
            continue
        pairs = table.view(1, 3, 2 * 2, 1, 8).permute(2, 0, 3, 1, 4).split(2)  # (K, V) of each layer, [1, heads, 3, 8]

        def cache(pairs=pairs):
            made = DynamicCache()
            for layer, (k, v) in enumerate(pairs):
                made.update(k.clone(), v.clone(), layer)
            return made

        assert out[i, -5:].tolist() == by_hand(llama(), ids[i][real], mask[i][real], cache=cache)


@pytest.mark.parametrize("which", ["lora", *PROMPTS])
def test_encoder_decoders_generate(which):
    task = "SEQ_2_SEQ_LM"
    config = LoraConfig(task_type=task, r=4, target_modules=["q", "v"]) if which == "lora" else PROMPTS[which](task)
    model = noise(get_peft_model(t5(), config), 1.0)
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    more = {"task_ids": torch.tensor([0, 1])} if which == "multitask" else {}
    given = {"attention_mask": mask, **GREEDY, **more}
    out = model.generate(input_ids=IDS, **given)
    assert torch.equal(out, model.generate(input_ids=IDS, use_cache=False, **given))
    assert torch.equal(
        model.generate(input_ids=IDS, num_beams=3, **given),
        model.generate(input_ids=IDS, num_beams=3, use_cache=False, **given),
    )
    if which in ("lora", "prefix"):  # step by step, each time the whole forward without a cache
        tokens = torch.zeros(2, 1, dtype=torch.long)
        for _ in range(5):
            scores = logits(model, input_ids=IDS, attention_mask=mask, decoder_input_ids=tokens)[:, -1]
            scores[:, 2] = -torch.inf  # min_new_tokens holds the end back
            tokens = torch.cat([tokens, scores.argmax(-1)[:, None]], 1)
        assert torch.equal(out, tokens)
    else:  # the plain model with the virtual tokens before its encoder's embeddings
        embeds = t5().get_input_embeddings()(IDS).detach()
        embeds = torch.cat([torch.stack([t[:3] for t in virtual_tokens(model, which)]), embeds], 1)
        seen = torch.cat([mask.new_ones(2, 3), mask], 1)
        assert torch.equal(out, t5().generate(inputs_embeds=embeds, attention_mask=seen, **GREEDY))
    if which == "lora":
        assert torch.equal(out, model.merge_and_unload().generate(input_ids=IDS, **given))


# -- every task head --------------------------------------------------------------------------------------------------------------
VISION = {"image_size": 16, "patch_size": 8, "num_channels": 3}
PIXELS = {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2))}
TEXT = {"input_ids": IDS}


def whisper() -> nn.Module:
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 8}
    tokens = {"decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    return make("Whisper", "ForConditionalGeneration", **sizes, **heads, max_target_positions=16, **tokens)


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (8,), "conv_stride": (4,), "conv_kernel": (8,), "num_feat_extract_layers": 1}
    more = {
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "classifier_proj_size": 8,
        "num_labels": 3,
    }
    return make("Wav2Vec2", "ForSequenceClassification", **convolutions, **more)


def llava() -> nn.Module:
    text = transformers.LlamaConfig(**SIZES)
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=8, **VISION
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=63)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    return model.eval()


SPEECH = {
    "input_features": torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(2)),
    "decoder_input_ids": IDS,
}
SOUND = {"input_values": torch.randn(2, 64, generator=torch.Generator().manual_seed(2))}
LOOK = {"input_ids": torch.cat([torch.full((2, 4), 63), IDS.clamp(max=62)], 1), **PIXELS}
HEADS = {
    # name: (model, task type, targets, further fields, inputs, new heads that must train and be saved)
    "SEQ_CLS llama": (lambda: make("Llama", "ForSequenceClassification"), "SEQ_CLS", ["q_proj"], {}, TEXT, ["score"]),
    "SEQ_CLS bert": (lambda: bert("ForSequenceClassification"), "SEQ_CLS", ["query"], {}, TEXT, ["classifier"]),
    "SEQ_CLS roberta": (
        lambda: make("Roberta", "ForSequenceClassification"),
        "SEQ_CLS",
        ["query"],
        {},
        TEXT,
        ["classifier"],
    ),
    "TOKEN_CLS bert": (lambda: bert("ForTokenClassification"), "TOKEN_CLS", ["query"], {}, TEXT, ["classifier"]),
    "TOKEN_CLS llama": (lambda: make("Llama", "ForTokenClassification"), "TOKEN_CLS", ["q_proj"], {}, TEXT, ["score"]),
    "QUESTION_ANS": (lambda: bert("ForQuestionAnswering"), "QUESTION_ANS", ["query"], {}, TEXT, ["qa_outputs"]),
    "CAUSAL_LM": (llama, "CAUSAL_LM", ["q_proj"], {}, TEXT, []),
    "SEQ_2_SEQ_LM": (t5, "SEQ_2_SEQ_LM", ["q", "v"], {}, {**TEXT, "decoder_input_ids": IDS}, []),
    "FEATURE_EXTRACTION": (lambda: bert("Model"), "FEATURE_EXTRACTION", ["query"], {}, TEXT, []),
    "masked LM": (lambda: bert("ForMaskedLM"), None, ["query"], {}, TEXT, []),
    "image classes": (
        lambda: make("ViT", "ForImageClassification", **VISION, num_labels=3),
        None,
        ["q_proj", "query"],
        {"modules_to_save": ["classifier"]},
        PIXELS,
        ["classifier"],
    ),
    "audio classes": (
        wav2vec2,
        "SEQ_CLS",
        ["q_proj"],
        {"modules_to_save": ["projector"]},
        SOUND,
        ["classifier", "projector"],
    ),
    "speech": (whisper, "SEQ_2_SEQ_LM", ["q_proj", "v_proj"], {}, SPEECH, []),
    "images and text": (llava, "CAUSAL_LM", ["q_proj", "v_proj"], {}, LOOK, []),
}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_trains_is_saved_and_comes_back(name, tmp_path):
    build, task, targets, fields, inputs, heads = HEADS[name]
    leaves = {n.rsplit(".", 1)[-1] for n, _ in build().named_modules()}
    targets = [t for t in targets if t in leaves]
    model = get_peft_model(build(), LoraConfig(task_type=task, r=4, target_modules=targets, **fields))
    moving = {n for n, p in model.named_parameters() if p.requires_grad}
    for head in heads:
        assert any(f".{head}." in n and "lora" not in n for n in moving), head
    assert all("lora_" in n or any(f".{h}." in n for h in heads) for n in moving)

    @torch.no_grad()
    def out(m: nn.Module) -> torch.Tensor:
        found = m(**inputs)
        return next(
            t
            for t in (getattr(found, k, None) for k in ("logits", "start_logits", "last_hidden_state"))
            if t is not None
        )

    noise(model)
    expected = out(model)
    assert gap(expected, out(build())) > 1e-4
    model.save_pretrained(tmp_path)
    fresh = build()
    for n, p in fresh.named_parameters():  # a new base has its head drawn anew
        if any(f".{h}." in f".{n}" for h in heads):
            p.data += 1
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert type(loaded) is type(model) and torch.equal(out(loaded), expected)
    through = build()
    if not hasattr(through.config, "adapter_attn_dim"):  # Wav2Vec2's load_adapter is about adapters of its own
        report = through.load_adapter(str(tmp_path))
        assert not report.missing_keys and not report.unexpected_keys
        assert torch.equal(out(through), expected)
    assert gap(out(model.merge_and_unload()), expected) < 1e-5 * max(1, float(expected.abs().max()))
