"""Bad input: a clear error that names the thing, and the model as it was: weights, modules, adapters, gradients."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from peft import (
    CheckpointError,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    registry,
)
from peft.core.acting.on_model import roster_of

TOKENS = torch.randint(0, 64, (3, 5), generator=torch.Generator().manual_seed(0))


def llama(seed: int = 0, **more) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(**{**sizes, "num_key_value_heads": 2, "num_hidden_layers": 1, **more})
    return LlamaForCausalLM(config).eval()


def lora(**more) -> LoraConfig:
    return LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **more})


@contextmanager
def unchanged(model: nn.Module):
    """Within, something is refused; afterwards the model is as it was."""

    def look():
        roster = roster_of(model)
        return (
            {k: v.clone() for k, v in model.state_dict().items()},
            [(n, type(m), len(m._forward_hooks)) for n, m in model.named_modules()],
            [(n, p.requires_grad, id(p)) for n, p in model.named_parameters()],
            None
            if roster is None
            else (
                roster.chosen,
                roster.enabled,
                list(roster.adapters),
                {n: c.to_dict() for n, c in roster.configs.items()},
            ),
            roster is not None or "_peft_roster" in model.__dict__ or "peft_config" in model.__dict__,
        )

    before = look()
    yield
    after = look()
    assert before[0].keys() == after[0].keys()
    assert all(torch.equal(v, after[0][k]) for k, v in before[0].items())
    assert before[1:] == after[1:]


@pytest.fixture
def folder(tmp_path):
    get_peft_model(llama(), lora(task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    return tmp_path


# -- targets ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"target_modules": ["q_prj"]}, "'q_prj'"),
        ({"target_modules": r".*\.q_prj"}, "q_prj"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["no_head"]}, "'no_head'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["nothing"]}, "'nothing'"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "exclude_modules"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [9]}, "layers_to_transform"),
        ({"target_modules": None, "target_parameters": ["no.weight"]}, "'no.weight'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("how", ["get_peft_model", "add_adapter", "inject"])
def test_unknown_targets(config, says, how):
    model = get_peft_model(llama(), lora()) if how == "add_adapter" else llama()
    with unchanged(model), pytest.raises(NoMatchingPeftModuleError) as e:
        if how == "add_adapter":
            model.add_adapter("b", lora(**config))
        elif how == "inject":
            inject_adapter_in_model(lora(**config), model, "b")
        else:
            get_peft_model(model, lora(**config))
    assert says in str(e.value)


def test_a_model_type_without_defaults_is_named():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

    model = Net()
    with unchanged(model), pytest.raises(ValueError, match="target_modules"):
        get_peft_model(model, LoraConfig())


# -- configs ------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"r": 0}, "`r`"),
        ({"r": -1}, "`r`"),
        ({"r": None}, "`r`"),
        ({"r": "8"}, "`r`"),
        ({"lora_dropout": 1.0}, "`lora_dropout`"),
        ({"lora_dropout": -0.1}, "`lora_dropout`"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj']"),
        ({"init_lora_weights": "gausian"}, "'gaussian'"),
        ({"bias": "some"}, "bias='some'"),
        ({"task_type": "CAUSAL"}, "'CAUSAL'"),
        ({"target_modules": ".*", "layers_to_transform": [1]}, "layers_to_transform"),
        ({"layers_pattern": ["layers"]}, "layers_to_transform"),
    ],
    ids=str,
)
def test_config_values(fields, says):
    with pytest.raises(ValueError) as e:
        LoraConfig(**fields)
    assert says in str(e.value)


RANKED = [
    (name, f, dict(m.examples[0]) if m.examples else {})
    for name, m in registry.methods().items()
    for f in ("r", "init_r", "target_r", "num_virtual_tokens", "bottleneck_dim", "num_ranks")
    if f in m.config_class.__dataclass_fields__
    if not (f == "r" and "init_r" in m.config_class.__dataclass_fields__)  # inherited, and decided by init_r
]


@pytest.mark.parametrize(("method", "name", "needed"), RANKED, ids=[f"{m}.{f}" for m, f, _ in RANKED])
def test_sizes_of_zero_in_every_method(method, name, needed):
    """A size of 0 raises by name, unless 0 means that another field decides (OFT's r and oft_block_size)."""
    cls = registry.method(method).config_class
    field = cls.__dataclass_fields__[name]
    model = llama()
    with unchanged(model), pytest.raises(ValueError) as e:
        if field.default == 0 or field.default is None and name != "num_virtual_tokens":
            cls(**{**needed, name: -1})
        else:
            get_peft_model(model, cls(**{**needed, name: 0, "task_type": "CAUSAL_LM"}))
    assert name in str(e.value)


def test_an_unknown_method_names_the_known(folder):
    path, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORRA"}))
    model = llama()
    with pytest.warns(UserWarning, match="peft_type"):  # the header of our own files wins, and says so
        PeftModel.from_pretrained(llama(), folder)
    save_file(load_file(weights), weights)  # upstream's files have no such header
    with pytest.raises(ValueError, match="'LORRA'.*'LORA'"):
        PeftConfig.from_pretrained(folder)
    with unchanged(model), pytest.raises(ValueError, match="'LORRA'"):
        PeftModel.from_pretrained(model, folder)


def test_a_config_without_a_method(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="peft_type"):
        PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["{", "", "[1, 2]", "null", '{"peft_type": "LORA", '])
def test_a_damaged_config_names_its_file(text, folder):
    (folder / "adapter_config.json").write_text(text)
    model = llama()
    with pytest.raises(ValueError, match="adapter_config.json"):
        PeftConfig.from_pretrained(folder)
    with unchanged(model), pytest.raises(ValueError, match="adapter_config.json"):
        PeftModel.from_pretrained(model, folder)


def test_values_of_the_wrong_sort_in_a_file(folder):
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    for field, value in (("r", 0), ("lora_dropout", "much"), ("task_type", "POETRY")):
        path.write_text(json.dumps({**config, field: value}))
        with pytest.raises(ValueError) as e:
            PeftConfig.from_pretrained(folder)
        assert field in str(e.value) or value in ("POETRY",) and value in str(e.value)


# -- files --------------------------------------------------------------------------------------------------------------------
def damage(path, how: str) -> None:
    data = path.read_bytes()
    if how == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif how == "truncated header":
        path.write_bytes(data[:20])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "no safetensors":
        path.write_bytes(b"PK\x03\x04" + data[4:])
    elif how == "header too long":
        path.write_bytes((1 << 60).to_bytes(8, "little") + data[8:])
    else:
        raise AssertionError(how)


@pytest.mark.parametrize("how", ["truncated", "truncated header", "empty", "no safetensors", "header too long"])
@pytest.mark.parametrize("call", ["from_pretrained", "load_adapter", "load_adapter over an old one"])
def test_damaged_weights(how, call, folder, tmp_path_factory):
    bad = tmp_path_factory.mktemp("bad")
    shutil.copytree(folder, bad, dirs_exist_ok=True)
    damage(bad / "adapter_model.safetensors", how)
    model = llama() if call == "from_pretrained" else PeftModel.from_pretrained(llama(), folder)
    with unchanged(model), pytest.raises(CheckpointError) as e:
        if call == "from_pretrained":
            PeftModel.from_pretrained(model, bad)
        else:
            model.load_adapter(bad, "default" if call.endswith("one") else "b")
    assert "adapter_model.safetensors" in str(e.value) and "damaged or cut short" in str(e.value)


def test_missing_files(tmp_path, folder):
    model = llama()
    for where, says in ((tmp_path / "nowhere", "nowhere"), (folder / "sub", "sub")):
        with unchanged(model), pytest.raises(ValueError, match=says):
            PeftModel.from_pretrained(model, where)
    (folder / "adapter_model.safetensors").unlink()
    with unchanged(model), pytest.raises(ValueError, match="adapter_model.safetensors"):
        PeftModel.from_pretrained(model, folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(value, folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[1]
    tensors[key][0, 0] = value
    save_file(tensors, path)
    model = llama()
    with unchanged(model), pytest.raises(CheckpointError) as e:
        PeftModel.from_pretrained(model, folder)
    assert key in str(e.value) and "NaN or inf" in str(e.value)


def test_a_tensor_of_another_shape_or_without_elements(folder):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    key = sorted(tensors)[0]
    for made in (torch.zeros(4, 17), torch.zeros(0)):
        save_file({**tensors, key: made}, path)
        model = llama()
        with unchanged(model), pytest.raises(CheckpointError) as e:
            PeftModel.from_pretrained(model, folder)
        assert key in str(e.value)


# -- bases --------------------------------------------------------------------------------------------------------------------
def test_the_wrong_base(folder):
    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16))
    with unchanged(gpt2), pytest.raises(NoMatchingPeftModuleError, match="q_proj"):
        PeftModel.from_pretrained(gpt2, folder)
    wide = llama(hidden_size=32)
    with unchanged(wide), pytest.raises(CheckpointError, match="q_proj"):
        PeftModel.from_pretrained(wide, folder)
    deep = llama(num_hidden_layers=2)
    with unchanged(deep), pytest.raises(CheckpointError, match="layers.1"):
        PeftModel.from_pretrained(deep, folder)


def test_a_vocabulary_that_does_not_fit(folder, tmp_path_factory):
    larger = llama(vocab_size=70)
    with unchanged(larger), pytest.raises(CheckpointError, match="vocabulary size 64.*70"):
        PeftModel.from_pretrained(larger, folder)
    whole = tmp_path_factory.mktemp("whole")
    get_peft_model(llama(), lora()).save_pretrained(whole, save_embedding_layers=True)
    for strict in (True, False):
        with unchanged(larger), pytest.raises(CheckpointError, match="(?s)64.*70"):
            PeftModel.from_pretrained(larger, whole, strict=strict)


# -- names --------------------------------------------------------------------------------------------------------------------
def test_a_name_already_taken(folder):
    model = get_peft_model(llama(), lora())
    with unchanged(model), pytest.raises(ValueError, match="default already exists"):
        model.add_adapter("default", lora())
    less = lora(target_modules=["q_proj"])  # the old one would go on acting in v_proj
    with (
        unchanged(model),
        pytest.warns(UserWarning, match="second time"),
        pytest.raises(ValueError, match="default already exists"),
    ):
        get_peft_model(model, less)
    with unchanged(model), pytest.raises(ValueError, match="already exists"):
        model.add_weighted_adapter(["default"], [1.0], "default")
    bare = inject_adapter_in_model(lora(), llama(), "x")
    with unchanged(bare), pytest.raises(ValueError, match="x already exists"):
        inject_adapter_in_model(lora(), bare, "x")


def test_a_name_never_loaded():
    model = get_peft_model(llama(), lora())
    for call in (
        lambda: model.set_adapter("defualt"),
        lambda: model.base_model.set_adapter(["default", "defualt"]),
        lambda: model.set_requires_grad("defualt"),
        lambda: model(input_ids=TOKENS, adapter_names=["default", "defualt", "default"]),
        lambda: model.generate(input_ids=TOKENS, adapter_names=["defualt"] * 3, max_new_tokens=1),
        lambda: model.base_model.merge_adapter(["defualt"]),
        lambda: model.merge_and_unload(adapter_names=["defualt"]),
        lambda: model.save_pretrained("never", selected_adapters=["defualt"]),
        lambda: model.adapter_parameters("defualt"),
        lambda: model.delete_adapter("defualt"),
        lambda: model.add_weighted_adapter(["defualt"], [1.0], "new"),
    ):
        with unchanged(model), pytest.raises(ValueError) as e:
            call()
        assert "defualt" in str(e.value) and "default" in str(e.value).replace("defualt", "")


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_per_row_names_whose_number_differs_from_the_batch(count):
    model = get_peft_model(llama(), lora())
    model.add_adapter("b", lora())
    names = (["default", "b"] * 3)[:count]
    for call in (
        lambda: model(input_ids=TOKENS, adapter_names=names),
        lambda: model(TOKENS, adapter_names=names),
        lambda: model.generate(input_ids=TOKENS, adapter_names=names, max_new_tokens=1),
    ):
        with unchanged(model), pytest.raises(ValueError) as e:
            call()
        assert str(count) in str(e.value) and "3" in str(e.value)
    assert model.roster.mix.rows is None
    with torch.no_grad():
        model(input_ids=TOKENS, adapter_names=["default", "b", "__base__"])


def test_merged_adapters_refuse_what_would_corrupt_them():
    model = get_peft_model(llama(), lora())
    model.base_model.merge_adapter()
    for call in (
        lambda: model.add_adapter("b", lora()),
        lambda: model.delete_adapter("default"),
        lambda: model(input_ids=TOKENS, adapter_names=["default"] * 3),
    ):
        with unchanged(model), pytest.raises(ValueError, match="merged"):
            call()
