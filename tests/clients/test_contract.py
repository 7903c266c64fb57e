"""What other libraries and people's code import: every name is there and takes the calls that upstream takes.

The installed client libraries' sources are scanned for what they import from `peft`; upstream, where it is installed
aside, is asked for its public names and signatures in a process of its own.
"""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import peft
from peft import LoraConfig, get_peft_model, registry

ROOT = Path(__file__).parents[2]
CLIENTS = ("transformers", "diffusers", "accelerate", "trl", "sentence_transformers")


# -- what the clients import ------------------------------------------------------------------------------------------------------
def imported(client: str) -> dict[str, str]:
    """`module:name` (or `module:` for a plain import) -> a place, over all sources: in functions and for type checkers, too."""
    spec = importlib.util.find_spec(client)
    found = {}
    for path in Path(spec.origin).parent.rglob("*.py") if spec else ():
        text = path.read_text(encoding="utf-8")
        if "peft" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            names = []
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "peft":
                names = [f"{node.module}:{a.name}" for a in node.names]
            elif isinstance(node, ast.Import):
                names = [f"{a.name}:" for a in node.names if a.name.split(".")[0] == "peft"]
            found.update({n: f"{path.name}:{node.lineno}" for n in names})
    return found


@pytest.mark.parametrize("client", CLIENTS)
def test_every_import_of_a_client_resolves(client):
    pytest.importorskip(client)
    wanted = imported(client)
    assert wanted, f"{client} imports nothing from peft: is the scan right?"
    missing = []
    for symbol, where in wanted.items():
        module, name = symbol.split(":")
        if name and not hasattr(importlib.import_module(module), name):
            missing.append(f"{symbol} ({where})")
    assert not missing


def test_the_scan_sees_the_known_imports():
    """Guards the scan itself: imports at the top, in functions, and of deep modules."""
    found = imported("transformers") | imported("accelerate")
    assert {"peft:PeftModel", "peft:inject_adapter_in_model", "peft:get_peft_model_state_dict"} <= set(found)
    assert {"peft.utils.other:fsdp_auto_wrap_policy", "peft.tuners.tuners_utils:BaseTunerLayer"} <= set(found)


QUIET = """
import json, os, random, sys, warnings, numpy, torch
threads, dtype, rng, draws = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state(), random.getstate()
env, filters, hooks = dict(os.environ), list(warnings.filters), sys.excepthook
linear = torch.nn.Linear.forward
import peft, peft.utils, peft.tuners, peft.optimizers, peft.helpers
print(json.dumps({
    "same": [torch.get_num_threads() == threads, torch.get_default_dtype() == dtype, torch.equal(torch.get_rng_state(), rng),
             random.getstate() == draws, dict(os.environ) == env, list(warnings.filters) == filters,
             sys.excepthook is hooks, torch.nn.Linear.forward is linear],
    "loaded": [m for m in ("transformers", "accelerate", "diffusers", "bitsandbytes", "torchao") if m in sys.modules],
}))
"""


def test_importing_changes_nothing_and_loads_no_client():
    done = subprocess.run([sys.executable, "-c", QUIET], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert all(result["same"]) and result["loaded"] == [] and done.stderr == ""


# -- versions -------------------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(
    not any(d.metadata["Name"] == "peft" for d in importlib.metadata.distributions()),
    reason="needs the installed distribution: pip install -e .",
)
def test_the_clients_version_checks_pass():
    import transformers.integrations.peft as integration
    from transformers.utils import is_peft_available
    from transformers.utils.import_utils import is_peft_greater_or_equal
    from transformers.utils.peft_utils import check_peft_version

    assert importlib.metadata.version("peft") == peft.__version__
    assert is_peft_available() and is_peft_greater_or_equal("0.21.0")
    check_peft_version(integration.MIN_PEFT_VERSION)
    from accelerate.utils import is_peft_available as accelerate_has
    from accelerate.utils import is_peft_model

    assert accelerate_has() and is_peft_model(tiny())
    version = Version(peft.__version__)
    assert not version <= Version("0.17.1") and not Version("0.17.0") <= version < Version("0.20.0")  # trl's branches


def test_diffusers_uses_its_peft_backend():
    pytest.importorskip("diffusers")
    from diffusers.utils import USE_PEFT_BACKEND
    from diffusers.utils.import_utils import is_peft_version
    from diffusers.utils.peft_utils import check_peft_version

    assert USE_PEFT_BACKEND and is_peft_version(">=", "0.17.0")
    check_peft_version("0.17.0")


# -- attributes that the clients use ----------------------------------------------------------------------------------------------
def tiny(config=None):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=1)).eval()
    config = config or LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    return get_peft_model(base, config)


MODEL = """active_adapter active_adapters active_peft_config add_adapter base_model delete_adapter disable_adapter
get_base_model get_nb_trainable_parameters load_adapter merge_adapter peft_config peft_type prepare_model_for_gradient_checkpointing
print_trainable_parameters save_pretrained set_adapter unmerge_adapter merge_and_unload unload generate forward config dtype device
get_prompt create_or_update_model_card push_to_hub supports_lora_conversion modules_to_save special_peft_forward_args
has_active_enabled_adapter base_model_torch_dtype set_requires_grad get_layer_status get_model_status""".split()
LAYER = """active_adapter active_adapters adapter_layer_names other_param_names base_layer bias delete_adapter disable_adapters
enable_adapters get_base_layer get_delta_weight in_features out_features lora_A lora_B lora_alpha lora_dropout lora_embedding_A
lora_embedding_B lora_magnitude_vector merge merged merged_adapters r scale_layer scaling set_adapter set_requires_grad set_scale
unmerge unscale_layer use_dora use_rslora weight supports_lora_conversion get_base_weight set_base_weight""".split()
TUNER = """active_adapter active_adapters add_weighted_adapter delete_adapter disable_adapter_layers enable_adapter_layers
get_model_config inject_adapter merge_adapter merge_and_unload model peft_config prefix set_adapter set_requires_grad
supports_lora_conversion targeted_module_names unload unmerge_adapter""".split()
CONFIG = """alpha_pattern base_model_name_or_path bias exclude_modules inference_mode is_prompt_learning lora_alpha lora_dropout
modules_to_save peft_type r rank_pattern revision save_pretrained target_modules target_parameters task_type to_dict
trainable_token_indices use_dora use_rslora""".split()


def test_objects_have_what_the_clients_use():
    model = tiny()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    parts = {"model": (model, MODEL), "layer": (layer, LAYER), "tuner": (model.base_model, TUNER)}
    parts["config"] = (model.peft_config["default"], CONFIG)
    missing = [f"{where}.{n}" for where, (obj, names) in parts.items() for n in names if not hasattr(obj, n)]
    assert not missing
    assert model.peft_type.value == "LORA" and model.base_model.prefix == "lora_" and not model.modules_to_save
    assert model.base_model_torch_dtype == torch.float32 and model.has_active_enabled_adapter
    assert model.get_base_model()._hf_peft_config_loaded is False, "that flag is transformers' own to set"


def test_the_conventions_on_names():
    """vLLM's weight sync, trl's reference adapters and optimizers read parameters by name."""
    model = tiny()
    model.add_adapter("ref", LoraConfig(r=4, target_modules=["q_proj"]))
    names = dict(model.named_parameters())
    own = [n for n in names if ".default." in n]
    assert len(own) == 2 and all(n.replace(".default.", ".ref.") in names for n in own)
    frozen = [n for n in names if "lora_" not in n]
    bare = {n.removeprefix("base_model.model.").replace(".base_layer", "") for n in frozen}
    assert bare == set(dict(tiny().unload().named_parameters()))


# -- upstream's public interface ----------------------------------------------------------------------------------------------------
MODULES = """peft peft.auto peft.config peft.functional peft.helpers peft.import_utils peft.mapping peft.mapping_func
peft.mixed_model peft.optimizers peft.peft_model peft.tuners peft.tuners.lora peft.tuners.mixed peft.tuners.tuners_utils peft.utils
peft.utils.constants peft.utils.error peft.utils.hotswap peft.utils.integrations peft.utils.merge_utils peft.utils.other
peft.utils.peft_types peft.utils.quantization_utils peft.utils.save_and_load peft.utils.transformers_weight_conversion
peft.utils.warning""".split()

# Deliberately absent: (name, or "module:*" for what a module has besides the names it shares with others) -> why.
FEATURE = "a feature that is not built; the config field that asks for it is refused by name"
INTERNAL = "a step of upstream's own implementation"
ABSENT = {
    **dict.fromkeys(
        "ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraGAConfig MontecloraConfig VeloraConfig "
        "convert_to_lora save_as_lora create_arrow_model find_kappa_target_modules KappaTuneSelector MontecloraTrainerMixin "
        "get_eva_state_dict initialize_lora_eva_weights preprocess_loraga replace_lora_weights_loftq".split(),
        FEATURE,
    ),
    "GPTQLoraLinear": "a quantiser that is not built",
    "ParamWrapper": "adapters on bare parameters hang at each matrix: isinstance(m, LoraLayer)",
    "register_peft_method": "a method registers itself: docs/add-a-method.md",
    "PeftConfigMixin": "PeftConfig holds what it had",
    "BasePromptEncoder": "prompt methods derive from the same contract as all methods",
    **dict.fromkeys(
        "UPCAST_DTYPES ALLOWED_COMPUTE_DTYPES "
        "clone_module find_parameter_name_by_module get_device_map replicate_layers TpInfo "
        "dtensor_from_local_like get_bnb_param_type get_layer_device_map map_cache_to_layer_device_map skip_init_on_device "
        "get_embedding_layer_name has_valid_embedding_base_layer torch_load FlattenDims PeftConcatenate PermuteDims "
        "convert_peft_adapter_state_dict_for_transformers convert_peft_config_for_transformers Bnb4bitBackend Bnb8bitBackend "
        "ForwardOnlyQuantizationBackend HqqBackend QuantizationBackend TorchaoBackend get_quantization_kwargs "
        "quantization_extra_repr resolve_quantization_backend get_gptqmodel_quant_linear get_quantization_config "
        "_get_input_embeddings_name _is_valid_match _prepare_prompt_learning_config _set_trainable "
        "set_additional_trainable_modules".split(),
        INTERNAL,
    ),
}
ABSENT_MEMBERS = {
    **dict.fromkeys(
        "corda_init loftq_init lora_ga_init mica_init olora_init orthogonal_init pissa_init reset_lora_parameters "
        "resolve_lora_variant lora_variants subtract_mutated_init resize_modules_by_rank_pattern "
        "resize_state_dict_by_rank_pattern set_modules_to_save".split(),
        "a step of upstream's set-up of an adapter, which configs ask for here",
    ),
    **dict.fromkeys(
        "adapter_state_dict check_module check_set_adapter init_modules unload_and_optionally_merge_module update".split(),
        INTERNAL,
    ),
}
# Signatures that differ on purpose: the key and why.
OTHER_CALLS = {
    "BaseTuner": "a tuner is made by get_peft_model or LoraModel(model, config, name)",
    "MixedModel": "as BaseTuner",
    "COMPATIBLE_TUNER_TYPES": "all of them",
    "PeftModelForTokenClassification": "upstream gives peft_config a default that it cannot work with",
    "AuxiliaryTrainingWrapper": "made by the core",
    "ModulesToSaveWrapper": "a view for isinstance",
    "TrainableTokensWrapper": "a view for isinstance",
    **dict.fromkeys(
        ("PromptEmbedding", "PromptEncoder", "PrefixEncoder", "MultitaskPromptEmbedding"),
        "made by the core, for isinstance",
    ),
}
DUMP = """
import importlib, inspect, json, sys, types, warnings
warnings.simplefilter("ignore")
def shown(v):
    return None if v is inspect.Parameter.empty else repr(v)
def sig(f):
    try:
        return [[p.name, p.kind.name, shown(p.default)] for p in inspect.signature(f).parameters.values()]
    except (TypeError, ValueError):
        return None
out = {}
for name in sys.argv[2].split():
    module = importlib.import_module(name)
    names = getattr(module, "__all__", None)
    listed = names is not None
    here = {}
    for n in names if listed else vars(module):
        v = getattr(module, n, None)
        home = getattr(v, "__module__", None) if isinstance(v, (type, types.FunctionType)) else None
        if not listed and (n.startswith("_") or isinstance(v, types.ModuleType) or n in ("annotations", "TYPE_CHECKING")):
            continue
        if not listed and home != name:
            continue
        members = {}
        if isinstance(v, type):
            for k in dir(v):
                a = inspect.getattr_static(v, k)
                if not k.startswith("_") and (isinstance(a, property) or "peft" in str(getattr(getattr(v, k), "__module__", ""))):
                    members[k] = sig(getattr(v, k)) if callable(getattr(v, k)) else None
        kind = "class" if isinstance(v, type) else "function" if callable(v) else "value"
        here[n] = [kind, home, sig(v) if kind != "value" else None, members]
    out[name] = here
import peft
json.dump({"version": peft.__version__, "modules": out}, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def upstream(upstream_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("dump")
    env = {**os.environ, "PYTHONPATH": str(upstream_folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", DUMP, str(folder / "api.json"), " ".join(MODULES)]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((folder / "api.json").read_text())
    assert found["version"] == "0.21.2"
    return found["modules"]


def files() -> set[str]:
    return {m.__name__.rsplit(".", 1)[-1] for m in registry.modules()}


def unavailable(name: str, home: str | None) -> bool:
    """Whether a name belongs to a method that has no file here: its home is `peft.tuners.<file>`."""
    steps = (home or "").split(".")
    shared = ("tuners_utils", "mixed", "_buffer_dict")
    if len(steps) > 2 and steps[:2] == ["peft", "tuners"] and steps[2] not in (*files(), *shared):
        return True
    if name.startswith("TRANSFORMERS_MODELS_TO_"):  # default targets, by method
        asked = name.removeprefix("TRANSFORMERS_MODELS_TO_").split("_")[0]
        return asked not in {n.replace("_", "") for n in registry.methods()} and asked != "PREFIX"
    return False


def test_every_public_name_is_there_or_absent_for_a_stated_reason(upstream):
    missing, present = [], 0
    for module, names in upstream.items():
        ours = importlib.import_module(module)
        for name, (_, home, _, _) in names.items():
            if hasattr(ours, name):
                present += 1
            elif name not in ABSENT and not unavailable(name, home) and not name.startswith("is_transformers_"):
                missing.append(f"{module}:{name}")
    assert not missing and present > 250


def test_the_list_of_absent_names_is_no_longer_than_needed(upstream):
    """Who builds one of these takes it off the list."""
    known = {n for names in upstream.values() for n in names}
    there = {n for module, names in upstream.items() for n in names if hasattr(importlib.import_module(module), n)}
    assert set(ABSENT) <= known - there, set(ABSENT) & there | (set(ABSENT) - known)


def accepts(theirs: list, ours: list) -> list[str]:
    """What of upstream's calls does not work: a name, a position, a default, a further argument that must be given."""
    names = {p[0]: i for i, p in enumerate(ours)}
    open_names, open_positions = (any(p[1] == k for p in ours) for k in ("VAR_KEYWORD", "VAR_POSITIONAL"))
    positional = [p[0] for p in ours if p[1].startswith("POSITIONAL")]
    bad = []
    for i, (name, kind, default) in enumerate(p for p in theirs if not p[1].startswith("VAR")):
        if name not in names and not open_names:
            bad.append(f"no {name}")
        if kind.startswith("POSITIONAL") and not open_positions and positional[i : i + 1] != [name]:
            bad.append(f"{name} is not argument {i}")
        if name in names and default is not None and ours[names[name]][2] is None:
            bad.append(f"{name} has no default")
    own = {p[0] for p in theirs}
    bad += [f"needs {p[0]}" for p in ours if p[0] not in own and p[2] is None and not p[1].startswith("VAR")]
    return bad


def signature(f) -> list:
    empty = inspect.Parameter.empty
    found = inspect.signature(f).parameters.values()
    return [[p.name, p.kind.name, None if p.default is empty else repr(p.default)] for p in found]


def test_calls_take_upstreams_arguments_in_their_places(upstream):
    bad = {}
    for module, names in upstream.items():
        ours = importlib.import_module(module)
        for name, (kind, _, theirs, _) in names.items():
            if kind == "value" or theirs is None or not hasattr(ours, name) or name in OTHER_CALLS:
                continue
            own = getattr(ours, name)
            if name.endswith("Config") or not callable(own) or type(own).__name__ in ("LayerView", "TunerLayerView"):
                continue  # configs: see below; views are for isinstance
            if type(own).__name__ == "ModelView":  # `config` by name is taken, too
                theirs = [["peft_config" if p[0] == "config" else p[0], *p[1:]] for p in theirs]
            if found := accepts(theirs, signature(own)):
                bad[f"{module}:{name}"] = found
    assert not bad


def test_methods_of_models_take_upstreams_arguments(upstream):
    """Checked on the classes that people call methods of."""
    bad = {}
    for name, (kind, _, _, members) in upstream["peft"].items():
        own = getattr(peft, name, None)
        if kind != "class" or not isinstance(own, type) or not issubclass(own, (peft.PeftModel, peft.PeftConfig)):
            continue
        for member, theirs in members.items():
            if not hasattr(own, member) and member not in ABSENT_MEMBERS:
                if not hasattr(tiny().base_model, member) and not hasattr(tiny().get_base_model(), member):
                    bad[f"{name}.{member}"] = ["is missing"]
            elif theirs is not None and hasattr(own, member) and member != "forward":
                if found := accepts(theirs, signature(getattr(own, member))):
                    bad[f"{name}.{member}"] = found
    assert not bad


def test_members_of_layers_and_tuners_exist_on_the_objects(upstream):
    model = tiny(LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1]))
    base = model.get_base_model()
    objects = {
        "peft.tuners.tuners_utils:BaseTunerLayer": base.model.layers[0].self_attn.q_proj,
        "peft.tuners.lora:LoraLayer": base.model.layers[0].self_attn.q_proj,
        "peft.tuners.lora:Linear": base.model.layers[0].self_attn.q_proj,
        "peft.utils:ModulesToSaveWrapper": base.lm_head,
        "peft.utils:TrainableTokensWrapper": base.model.embed_tokens,
        "peft.tuners.tuners_utils:BaseTuner": model.base_model,
        "peft.tuners:LoraModel": model.base_model,
        "peft.tuners:AdaLoraModel": tiny(peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9)).base_model,
    }
    missing = []
    for symbol, obj in objects.items():
        module, name = symbol.split(":")
        assert isinstance(obj, getattr(importlib.import_module(module), name)), symbol
        members = upstream[module][name][3]
        missing += [f"{symbol}.{m}" for m in members if not hasattr(obj, m) and m not in ABSENT_MEMBERS]
    assert not missing


def test_config_fields_are_upstreams_and_defaults_too(upstream):
    """Fields by name with the same defaults. By position: the ones of PeftConfig; the others raise rather than shift."""
    bad = {}
    for name, (kind, _, theirs, _) in upstream["peft"].items():
        own = getattr(peft, name, None)
        if kind != "class" or not isinstance(own, type) or not issubclass(own, peft.PeftConfig):
            continue
        fields = {p[0]: p for p in signature(own)}
        found = [f"no {p[0]}" for p in theirs if p[0] not in fields]
        found += [
            f"{p[0]}: {p[2]} there, {fields[p[0]][2]} here"
            for p in theirs
            if p[0] in fields and p[2] != fields[p[0]][2]
        ]
        found = [f for f in found if "factory" not in f]
        first = [p[0] for p in signature(peft.PeftConfig)]
        if [p[0] for p in theirs[: len(first)]] != first:
            found.append("the first fields differ")
        if found:
            bad[name] = found
    assert not bad


def test_config_fields_beyond_the_common_ones_need_their_names():
    assert LoraConfig("CAUSAL_LM").task_type == "CAUSAL_LM"
    with pytest.raises(TypeError, match="by name"):
        LoraConfig("CAUSAL_LM", None, None, None, None, None, False, 8)


def test_arguments_of_heads_by_position_are_upstreams():
    """The third argument of upstream's forward is inputs_embeds, whatever the base model's is."""
    model = tiny(LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]))
    ids = torch.arange(6)[None]
    mask, embeds = torch.ones_like(ids), model.get_base_model().model.embed_tokens(ids)
    with torch.no_grad():
        out = model(ids, mask).logits
        assert torch.equal(model(None, mask, embeds).logits, out)
        assert torch.equal(model(None, mask, embeds, ids).loss, model(ids, labels=ids).loss)


# -- the optimizers -------------------------------------------------------------------------------------------------------------------
STEPS = """
import sys, torch
from peft import *
from peft.optimizers import *
from transformers import LlamaConfig, LlamaForCausalLM
def run(make):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, num_hidden_layers=1))
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    at = model.base_model.model.model.layers[0].self_attn
    held = [v["default"].weight for l in (at.q_proj, at.v_proj) for v in (l.lora_A, l.lora_B)]
    rng = torch.Generator().manual_seed(1)
    for t in held:
        t.data.copy_(torch.randn(t.shape, generator=rng) * 0.1)
    optimizer = make(model)
    ids = torch.arange(12).reshape(2, 6)
    for _ in range(4):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    groups = [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    return [t.detach().clone() for t in held], groups
adam, sgd = torch.optim.AdamW, torch.optim.SGD
found = {
    "loraplus": run(lambda m: create_loraplus_optimizer(m, adam, lr=1e-2, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.1)),
    "lorafa": run(lambda m: create_lorafa_optimizer(m, 4, 8, 1e-2, weight_decay=0.1)),
    "riemannian": run(lambda m: create_riemannian_optimizer(m, sgd, lr=1e-2, reg=0.1)),
}
"""


@pytest.fixture(scope="module")
def stepped(upstream_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("steps")
    env = {**os.environ, "PYTHONPATH": str(upstream_folder), "HF_HUB_OFFLINE": "1"}
    code = STEPS + "\nassert __import__('peft').__version__ == '0.21.2'\ntorch.save(found, sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder / "a.pt")], env=env, cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    ours: dict = {}
    exec(STEPS, ours)
    return torch.load(folder / "a.pt"), ours["found"]


# upstream projects LoRA-FA's gradients in bf16 (8 bits); a step is 0.01 here, four of them are taken
@pytest.mark.slow
@pytest.mark.parametrize(("name", "tolerance"), [("loraplus", 1e-6), ("lorafa", 1e-3), ("riemannian", 1e-6)])
def test_optimizers_step_as_upstreams(name, tolerance, stepped):
    (theirs, groups), (ours, own_groups) = (s[name] for s in stepped)
    assert groups == own_groups
    assert max(float((a - b).abs().max()) for a, b in zip(theirs, ours, strict=True)) <= tolerance


@pytest.mark.parametrize(
    ("config", "second"),
    [
        (LoraConfig(r=4, target_modules=["q_proj"]), {"lora_B_weight"}),
        (LoraConfig(r=4, target_modules=["embed_tokens"]), {"lora_B_weight"}),
        (LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"), {"lora_B_weight"}),
        (peft.AdaLoraConfig(target_modules=["q_proj"], total_step=9), {"lora_B_weight"}),
        (
            peft.VeraConfig(target_modules=["q_proj"], r=4),
            {"vera_lambda_b_weight", "vera_lambda_d_weight"},
        ),  # vectors, both
        (peft.LoHaConfig(target_modules=["q_proj"], r=4), set()),
    ],
)
def test_loraplus_finds_the_last_factor_of_any_delta(config, second):
    from peft.optimizers import create_loraplus_optimizer

    model = tiny(config)
    groups = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.1, loraplus_lr_ratio=16.0).param_groups
    name = {id(p): n.rpartition(".")[2] for n, p in model.named_parameters()}
    assert {name[id(p)] for g in groups[2:] for p in g["params"]} == second
    assert [g["lr"] for g in groups] == pytest.approx([0.1, 1e-6, 1.6, 1.6])
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters() if p.requires_grad}


def test_lorafa_freezes_the_first_factors_and_projects_the_gradient():
    """One step from the formula: g = ∇B (A Aᵀ)⁻¹ / s², whose first Adam step is −lr·sign(g) up to eps."""
    from peft.optimizers import create_lorafa_optimizer

    model = tiny()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer = create_lorafa_optimizer(model, 4, 8, lr=0.01)
    assert not A.requires_grad and B.requires_grad
    before, ids = B.detach().clone(), torch.arange(6)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    g = B.grad @ torch.linalg.inv(A @ A.T) / layer.scaling["default"] ** 2
    optimizer.step()
    torch.testing.assert_close(B.detach() - before, -0.01 * g / (g.abs() + 1e-6 / 0.001**0.5), rtol=2e-3, atol=1e-6)


def test_a_closure_is_refused_where_gradients_are_preconditioned_before_the_step():
    from peft.optimizers import create_riemannian_optimizer

    with pytest.raises(ValueError, match="closure"):
        create_riemannian_optimizer(tiny(), torch.optim.SGD, lr=0.1).step(lambda: 0.0)
    with pytest.raises(ValueError, match="two trainable factors"):
        create_riemannian_optimizer(
            tiny(peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])), torch.optim.SGD, lr=0.1
        )


# -- small tools ----------------------------------------------------------------------------------------------------------------------
def test_merge_utils_compose_to_the_merges():
    from peft.utils import merge_utils as m

    tensors = list(torch.randn(3, 5, 4))
    weights = torch.tensor([0.5, 1.0, 2.0])
    pruned = [m.prune(t, 0.5, "magnitude") for t in tensors]
    assert all(int((p != 0).sum()) == 10 for p in pruned)
    stacked = torch.stack(pruned)
    mask = m.calculate_majority_sign_mask(stacked)
    by_hand = m.disjoint_merge(stacked * m.reshape_weight_task_tensors(stacked, weights), mask)
    torch.testing.assert_close(by_hand, m.ties(tensors, weights, 0.5))
    kept = m.prune(torch.ones(10_000), 0.25, "random", rescale=True)
    assert set(kept.tolist()) == {0.0, 4.0} and abs(float(kept.mean()) - 1) < 0.1


def test_dequantising_helpers_and_onloading():
    from peft.tuners.tuners_utils import onload_layer
    from peft.utils.integrations import dequantize_bnb_weight
    from peft.utils.quantization_utils import is_bnb_available

    weight = nn.Parameter(torch.randn(3, 3))
    assert torch.equal(dequantize_bnb_weight(weight), weight) and isinstance(is_bnb_available(), bool)
    codes = nn.Parameter(torch.tensor([[127, -64], [1, 2]], dtype=torch.int8), requires_grad=False)
    scales = types.SimpleNamespace(SCB=torch.tensor([1.0, 2.54]))
    torch.testing.assert_close(dequantize_bnb_weight(codes, scales), torch.tensor([[1.0, -64 / 127], [0.02, 0.04]]))
    with pytest.raises(ValueError, match="SCB"):
        dequantize_bnb_weight(codes)
    with onload_layer(tiny().base_model.model.model.layers[0].self_attn.q_proj):
        pass
