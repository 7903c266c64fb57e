"""The interface that other libraries and people's code use: transformers' integration, upstream's import paths, views."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import peft
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model, helpers, registry
from peft.core.adapted.layer import Adapted, adapted_layers

TOKENS = torch.randint(0, 64, (2, 6), generator=torch.Generator().manual_seed(0))


def installed() -> bool:
    try:
        return bool(importlib.metadata.version("peft"))
    except importlib.metadata.PackageNotFoundError:
        return False


needs_distribution = pytest.mark.skipif(
    not installed(), reason="transformers asks for the installed distribution's version: pip install -e ."
)


def llama(seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": 2, **more})
    return LlamaForCausalLM(config).eval()


def lora(**more) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **more})


@torch.no_grad()
def logits(model: nn.Module, **more) -> torch.Tensor:
    return model(input_ids=TOKENS, **more).logits


# -- transformers' own adapter methods ------------------------------------------------------------------------------------------
CONFIGS = {
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "with a head": lambda: lora(modules_to_save=["lm_head"]),
    "ia3": lambda: IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], init_ia3_weights=False
    ),
}


@needs_distribution
@pytest.mark.parametrize("which", CONFIGS)
def test_transformers_adds_saves_and_loads_adapters(which, tmp_path):
    model = llama()
    base = logits(model)
    model.add_adapter(CONFIGS[which](), "v1.0")
    out = logits(model)
    assert not torch.equal(out, base) and model.active_adapters() == ["v1.0"]
    model.save_pretrained(tmp_path)
    assert all(k.startswith("base_model.model.") for k in load_file(tmp_path / "adapter_model.safetensors"))
    for name in ("default", "b.c"):
        other = llama()
        report = other.load_adapter(tmp_path, name)
        assert not report.missing_keys and not report.unexpected_keys and not report.mismatched_keys
        assert torch.equal(logits(other), out)
        assert not any(p.requires_grad for n, p in other.named_parameters() if ".adapters." in n)
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), out)


@needs_distribution
def test_transformers_switches_disables_and_deletes(tmp_path):
    model = llama()
    base = logits(model)
    model.add_adapter(lora(), "a")
    a = logits(model)
    model.add_adapter(lora(r=2), "b")
    b = logits(model)
    model.set_adapter("a")
    assert torch.equal(logits(model), a) and not torch.equal(a, b)
    assert {n.split(".adapters.")[1].split(".")[0] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    model.set_adapter(["a", "b"])
    assert model.active_adapters() == ["a", "b"] and not torch.equal(logits(model), a)
    model.disable_adapters()
    assert torch.equal(logits(model), base)
    model.enable_adapters()
    model.set_adapter("b")
    assert torch.equal(logits(model), b)
    state = model.get_adapter_state_dict("a")
    assert set(state) == {
        f"model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"
    }
    model.delete_adapter("b")
    assert torch.equal(logits(model), a)
    model.delete_adapter("a")
    assert torch.equal(logits(model), base)
    model.add_adapter(lora(), "a")
    assert not torch.equal(logits(model), base)


@needs_distribution
def test_an_adapter_folder_is_a_model_for_transformers(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(), lora(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(logits(found), logits(model.eval()))


# -- Auto classes ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folders(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), lora(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path, model


@pytest.mark.parametrize("name", ["AutoPeftModel", "AutoPeftModelForCausalLM"])
def test_auto_classes_load_base_and_adapter(name, folders):
    folder, model = folders
    found = getattr(peft, name).from_pretrained(folder / "adapter", adapter_name="x", is_trainable=True)
    assert type(found) is peft.PeftModelForCausalLM and found.active_adapters == ["x"]
    assert torch.equal(logits(found.eval()), logits(model))
    assert all(p.requires_grad for p in found.adapter_parameters("x"))
    half = getattr(peft, name).from_pretrained(folder / "adapter", dtype=torch.bfloat16)
    assert half.get_base_model().dtype == torch.bfloat16


def test_auto_classes_refuse_what_they_are_not_for(folders):
    folder, _ = folders
    with pytest.raises(ValueError, match="SEQ_CLS.*CAUSAL_LM"):
        peft.AutoPeftModelForSequenceClassification.from_pretrained(folder / "adapter")
    with pytest.raises(OSError, match="from_pretrained"):
        peft.AutoPeftModelForCausalLM()


def test_auto_classes_resize_to_the_tokenizer_beside_the_adapter(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(70)
    model = get_peft_model(base, lora(task_type="CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    vocabulary = {f"t{i}": i for i in range(70)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "t0")))
    tokenizer.save_pretrained(tmp_path / "adapter")
    found = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert found.get_base_model().get_input_embeddings().num_embeddings == 70
    assert torch.equal(logits(found), logits(model))


def test_auto_model_without_a_task_takes_the_class_from_an_allowed_package(tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, lora()).eval()
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(peft.AutoPeftModel.from_pretrained(tmp_path / "adapter").eval()), logits(model))
    with pytest.raises(ValueError, match="import_allowlist"):
        peft.AutoPeftModel.from_pretrained(tmp_path / "adapter", import_allowlist=["diffusers"])


# -- import paths ---------------------------------------------------------------------------------------------------------------
IMPORTED = """
peft.functional:delete_adapter peft.helpers:disable_input_dtype_casting peft.tuners.loha.layer:LoHaLayer
peft.tuners.lokr.layer:LoKrLayer peft.tuners.lokr.layer:factorization peft.tuners.lora.layer:LoraLayer
peft.tuners.lora:LoraLayer peft.tuners.tuners_utils:BaseTunerLayer peft.utils.hotswap:check_hotswap_configs_compatible
peft.utils.hotswap:hotswap_adapter_from_state_dict peft.utils.hotswap:prepare_model_for_compiled_hotswap
peft.utils.other:AuxiliaryTrainingWrapper peft.utils.other:fsdp_auto_wrap_policy peft.utils:ModulesToSaveWrapper
peft.utils.transformers_weight_conversion:build_peft_weight_mapping peft.utils:_get_submodules
peft.utils:get_peft_model_state_dict peft:LoKrConfig peft:LoraConfig peft:PeftConfig peft:PeftMixedModel peft:PeftModel
peft:PeftType peft:PrefixTuningConfig peft:PromptLearningConfig peft:get_peft_model peft:get_peft_model_state_dict
peft:inject_adapter_in_model peft:prepare_model_for_kbit_training peft:set_peft_model_state_dict
peft:AutoPeftModelForCausalLM
""".split()


@pytest.mark.parametrize("symbol", IMPORTED)
def test_what_other_libraries_import_is_there(symbol):
    module, name = symbol.split(":")
    assert getattr(importlib.import_module(module), name)


def test_every_method_has_upstreams_package_without_an_edit():
    for name, method in registry.methods().items():
        file = method.__module__.rsplit(".", 1)[-1]
        config = method.config_class.__name__
        for module in (f"peft.tuners.{file}", f"peft.tuners.{file}.config", "peft.tuners", "peft"):
            assert getattr(importlib.import_module(module), config) is method.config_class
        layer = getattr(importlib.import_module(f"peft.tuners.{file}.layer"), config.replace("Config", "Layer"))
        assert isinstance(layer, type)
        assert peft.PEFT_TYPE_TO_CONFIG_MAPPING[name] is peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
        assert peft.PEFT_TYPE_TO_PREFIX_MAPPING[name] == method.prefix


def test_layer_classes_are_views_of_what_a_layer_holds():
    from peft.tuners.loha import LoHaLayer
    from peft.tuners.lora import Embedding, Linear, LoraLayer

    from peft import LoHaConfig, LoraModel
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper

    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"], target_modules=["q_proj", "embed_tokens"]))
    model.add_adapter("h", LoHaConfig(target_modules=["v_proj"]))
    base = model.get_base_model()
    attention = base.model.layers[0].self_attn
    q, v, head, embed = attention.q_proj, attention.v_proj, base.lm_head, base.model.embed_tokens
    assert isinstance(q, LoraLayer) and isinstance(q, Linear) and not isinstance(q, (LoHaLayer, Embedding))
    assert isinstance(v, LoHaLayer) and not isinstance(v, LoraLayer)
    assert isinstance(embed, Embedding) and not isinstance(embed, Linear)
    assert isinstance(head, ModulesToSaveWrapper) and not isinstance(q, ModulesToSaveWrapper)
    assert all(isinstance(m, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for m in (q, v, head, embed))
    assert not isinstance(attention, BaseTunerLayer) and not isinstance(attention, LoraLayer)
    assert isinstance(model.base_model, LoraModel) and not isinstance(base, LoraModel)


def test_tuner_classes_make_tuners():
    from peft import LoraModel
    from peft.tuners.tuners_utils import BaseTuner

    tuner = LoraModel(llama(), lora(), "default")
    assert isinstance(tuner, LoraModel) and isinstance(tuner, BaseTuner)
    assert not torch.equal(logits(tuner), logits(llama())) and tuner.prefix == "lora_"


def test_attributes_that_libraries_read_on_layers():
    model = get_peft_model(llama(), lora(lora_alpha=8))
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 16) and layer.r["default"] == 4
    assert layer.scaling["default"] == 2 and layer.lora_alpha["default"] == 8
    assert layer.in_features == layer.out_features == 16 and layer.get_base_layer().weight is layer.base_layer.weight
    assert set(layer.lora_B) == {"default"} and layer.active_adapters == ["default"] and not layer.merged
    out = logits(model)
    layer.scale_layer(3.0)
    assert layer.scaling["default"] == 6 and not torch.equal(logits(model), out)
    layer.unscale_layer(3.0)
    assert torch.equal(logits(model), out)


# -- helpers --------------------------------------------------------------------------------------------------------------------
def test_rescaling_is_undone_also_after_an_error():
    model = get_peft_model(llama(), lora())
    base, out = logits(llama()), logits(model)
    with pytest.raises(ZeroDivisionError), helpers.rescale_adapter_scale(model, 0.0):
        assert torch.equal(logits(model), base)
        raise ZeroDivisionError
    assert torch.equal(logits(model), out)
    with pytest.raises(TypeError), helpers.rescale_adapter_scale(model, "much"):
        pass
    with pytest.raises(ValueError), helpers.rescale_adapter_scale(llama(), 2.0):
        pass


def test_signatures_show_the_base_models_arguments():
    import inspect

    model = get_peft_model(llama(), lora())
    out = logits(model)
    helpers.update_signature(model)
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" in inspect.signature(model.generate).parameters
    assert torch.equal(logits(model), out)
    model.add_adapter("b", lora())
    assert not torch.equal(logits(model, adapter_names=["b", "default"]), out)


def test_telling_an_adapter_folder(tmp_path):
    get_peft_model(llama(), lora()).save_pretrained(tmp_path / "a")
    assert helpers.check_if_peft_model(tmp_path / "a") and not helpers.check_if_peft_model(tmp_path)
    assert not helpers.check_if_peft_model("nobody/nothing-here")


def test_base_weights_are_read_and_set_under_their_own_names():
    model = get_peft_model(llama(), lora(modules_to_save=["lm_head"], target_modules=["q_proj", "mlp.up_proj"]))
    state = peft.get_base_model_state_dict(model)
    assert list(state) == list(llama().state_dict())
    assert all(torch.equal(v, state[k]) for k, v in llama().state_dict().items())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    other = llama(seed=3).state_dict()
    with pytest.raises(peft.CheckpointError, match="norm"):
        peft.set_base_model_state_dict(model, {k: v for k, v in other.items() if k != "model.norm.weight"})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    peft.set_base_model_state_dict(model, other)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama(seed=3)))


def test_mixed_precision_casts_the_frozen_part_only():
    model = get_peft_model(llama(), lora())
    peft.cast_mixed_precision_params(model, torch.bfloat16)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


def test_fsdp_wraps_blocks_and_methods():
    from peft.contract.method import Method
    from peft.utils.other import fsdp_auto_wrap_policy

    model = get_peft_model(llama(), lora())
    policy = fsdp_auto_wrap_policy(model)
    units = [m for m in model.modules() if policy(module=m, recurse=False, nonwrapped_numel=10**9)]
    assert {type(m).__name__ for m in units if not isinstance(m, Method)} == {"LlamaDecoderLayer"}
    assert sum(isinstance(m, Method) for m in units) == 4


def test_shifting_labels_right():
    labels = torch.tensor([[5, 6, -100], [1, -100, 3]])
    assert peft.shift_tokens_right(labels, 0, 9).tolist() == [[9, 5, 6], [9, 1, 0]]


def test_functions_on_models_without_a_wrapper():
    from peft import functional

    model = peft.inject_adapter_in_model(lora(), llama(), "a")
    peft.inject_adapter_in_model(lora(), model, "b")
    assert set(peft.get_peft_model_state_dict(model, adapter_name="b")) == {
        f"model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight" for i in (0, 1) for p in "qv" for x in "AB"
    }
    twin = peft.inject_adapter_in_model(lora(), llama(), "b")
    peft.set_peft_model_state_dict(twin, peft.get_peft_model_state_dict(model, adapter_name="b"), "b")
    functional.set_adapter(model, "b")
    assert torch.equal(logits(model), logits(twin))
    functional.set_requires_grad(model, "a")
    functional.set_requires_grad(model, "b", False)
    assert {n.split(".adapters.")[1][0] for n, p in model.named_parameters() if p.requires_grad} == {"a"}
    assert functional.delete_adapter(model, "b", prefix="lora_") == ["a"]
    assert functional.delete_adapter(model, "a") is None


# -- status, counts, card ---------------------------------------------------------------------------------------------------------
def test_status_of_layers_and_of_the_model():
    model = get_peft_model(llama(), lora())
    model.add_adapter("b", lora(target_modules=["q_proj"]))
    layers = model.get_layer_status()
    assert [x.name for x in layers][:2] == ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    assert layers[0].module_type == "lora.Linear" and layers[0].available_adapters == ["b", "default"]
    assert layers[0].requires_grad == {"default": True, "b": False} and layers[1].available_adapters == ["default"]
    status = model.get_model_status()
    assert (status.trainable_params, status.total_params) == model.get_nb_trainable_parameters()
    assert status.peft_types == {"default": "LORA", "b": "LORA"} and status.num_adapter_layers == 4
    assert status.enabled is True and status.active_adapters == ["default"] and status.merged_adapters == []
    assert status.requires_grad == {"b": False, "default": True} and status.devices == {
        "b": ["cpu"],
        "default": ["cpu"],
    }
    model.base_model.disable_adapter_layers()
    assert model.get_model_status().enabled is False
    model.base_model.enable_adapter_layers()
    list(adapted_layers(model))[0].merge()
    assert model.get_model_status().merged_adapters == "irregular"
    next(model.adapter_parameters("default")).requires_grad_(False)
    assert model.get_layer_status()[0].requires_grad["default"] == "irregular"
    assert model.get_model_status().requires_grad["default"] == "irregular"
    assert peft.get_model_status(peft.inject_adapter_in_model(lora(), llama())).base_model_type == "LlamaForCausalLM"
    with pytest.raises(ValueError, match="adapter"):
        peft.get_model_status(llama())


def test_the_three_counts():
    model = get_peft_model(llama(), lora(rank_pattern={"v_proj": 2}, modules_to_save=["lm_head"]))
    found = peft.counts(model)
    head, each = 64 * 16, 16 * 16
    assert found.trainable == 2 * (4 + 2) * 32 + head == model.get_nb_trainable_parameters()[0]
    assert found.updated == 4 * each + head, "all of each adapted weight, and the head"
    assert found.total == model.get_nb_trainable_parameters()[1]
    path = "model.layers.{}.self_attn.{}_proj".format
    assert {p: r for p, r in found.ranks.items() if "self_attn" in p} == {
        **{path(i, "q"): 4 for i in (0, 1)},
        **{path(i, "v"): 2 for i in (0, 1)},
    }
    bias = get_peft_model(llama(attention_bias=True), lora(target_modules=["q_proj"], bias="all"))
    found = peft.counts(bias)
    assert found.updated == 2 * each + 2 * 4 * 16 and found.trainable == 2 * 4 * 32 + 2 * 4 * 16
    several = get_peft_model(llama(), lora())
    several.add_adapter("b", lora(r=3))
    several.base_model.set_adapter(["default", "b"])
    assert set(peft.counts(several).ranks.values()) == {7} and peft.counts(several, "b").rank == 3


def test_prompts_update_no_weight():
    model = get_peft_model(llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    found = peft.counts(model)
    assert (found.trainable, found.updated, found.rank, found.ranks) == (3 * 16, 0, None, {})


def test_the_card_names_base_method_and_version_and_keeps_what_was_written(tmp_path):
    base = llama()
    base.config._name_or_path = base.name_or_path = "someone/some-model"
    model = get_peft_model(base, lora())
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "README.md").exists()
    model.save_pretrained(tmp_path, model_card=True)
    card = (tmp_path / "README.md").read_text()
    head, body = re.match(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    data = yaml.safe_load(head)
    assert data["base_model"] == "someone/some-model" and data["library_name"] == "peft"
    assert {"lora", "peft", "base_model:adapter:someone/some-model"} <= set(data["tags"])
    assert peft.__version__ in body and "someone/some-model" in body
    written = card.replace("---\n", "---\nlicense: mit\n", 1).replace(body, body + "\nTrained with care.\n")
    (tmp_path / "README.md").write_text(written)
    model.save_pretrained(tmp_path, model_card=True)
    again = (tmp_path / "README.md").read_text()
    assert "license: mit" in again and "Trained with care." in again and again.count(peft.__version__) == 1
    assert yaml.safe_load(again.split("---\n")[1])["tags"] == data["tags"]


def test_pushing_uploads_the_adapter_with_its_card(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo, **kwargs):
            seen["repo"] = repo

        def upload_folder(self, repo_id, folder_path, **kwargs):
            seen["files"] = sorted(p.name for p in folder_path.iterdir())
            seen["config"] = json.loads((folder_path / "adapter_config.json").read_text())

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    get_peft_model(llama(), lora()).push_to_hub("me/mine")
    assert seen["repo"] == "me/mine" and seen["config"]["peft_type"] == "LORA"
    assert seen["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"]


def test_names_are_not_invented():
    with pytest.raises(AttributeError, match="no attribute"):
        peft.LoraConfg  # noqa: B018
    assert not any(isinstance(m, Adapted) for m in llama().modules())


@pytest.mark.parametrize("what", ["weight", "bias"])
def test_a_base_parameter_that_someone_lets_train_gets_its_gradient(what):
    """Also where the adapted layer would run as one fused node, which knows of the adapter's gradients alone."""
    net = nn.Sequential(nn.Linear(6, 4))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    base = model.get_base_model()[0].base_layer
    x, y = torch.randn(3, 6), torch.randn(3, 4)
    getattr(base, what).requires_grad_(True)
    ((model(x) - y).square().sum()).backward()
    found = getattr(base, what).grad
    error = 2 * (model(x) - y)
    expected = error.sum(0) if what == "bias" else error.T @ x
    assert found is not None and torch.allclose(found, expected, atol=1e-5)
