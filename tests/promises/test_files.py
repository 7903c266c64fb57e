"""Promises about files, by number.

1 and 25: what does not fit is refused. 20: rows of embeddings. 21 and 22: no network, no code, no way out of the folder.
23: crashes while saving. 24: fields. 30: names.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import sys
import warnings

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaForCausalLM

import peft
from peft import CheckpointError, NoMatchingPeftModuleError, PeftConfig, PeftModel, registry
from peft.core.adapted.layer import Adapted
from tests.helpers.cells import randomise
from tests.promises.models import adapted, llama, logits, lora, rename_keys, same, state


def test_promise_1_a_file_whose_keys_do_not_land_is_refused_with_both_sides(tmp_path):
    adapted().save_pretrained(tmp_path)
    rename_keys(tmp_path, "layers.1.self_attn.q_proj", "layers.1.self_attn.wq_proj")
    base = llama()
    before, expected = state(base), logits(base)
    with pytest.raises(CheckpointError) as e:
        PeftModel.from_pretrained(base, tmp_path)
    text = str(e.value)
    assert "layers.1.self_attn.q_proj.lora_A.weight" in text and "layers.1.self_attn.wq_proj.lora_A.weight" in text
    assert "Did you mean" in text
    assert same(state(base), before) and torch.equal(logits(base), expected)
    assert not any(isinstance(m, Adapted) for m in base.modules())


def test_promise_1_every_tensor_of_the_adapter_must_be_filled(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="not in the file"):
        PeftModel.from_pretrained(llama(), tmp_path)


def test_promise_1_a_loaded_adapter_gives_what_the_saved_one_gave(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    base = llama()
    plain = logits(base)
    loaded = PeftModel.from_pretrained(base, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(model)) and not torch.equal(logits(loaded), plain)


def test_promise_21_local_files_need_no_network(tmp_path, monkeypatch):
    def blocked(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)
    with pytest.raises(AssertionError):
        socket.create_connection(("localhost", 9))
    base = llama()
    base.config._name_or_path = base.name_or_path = "nobody/no-such-model"
    model = adapted(base=base, names=("default", "b"))
    model.save_pretrained(tmp_path, model_card=True)
    PeftConfig.from_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    loaded.load_adapter(tmp_path / "b", "b")
    peft.load_peft_weights(tmp_path)
    assert torch.equal(logits(loaded), logits(model))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_promise_22_pickled_weights_run_no_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = adapted()
    model.save_pretrained(tmp_path / "good", safe_serialization=False)
    assert (tmp_path / "good" / "adapter_model.bin").is_file()
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path / "good").eval()), logits(model))
    torch.save({"base_model.model.x": Evil()}, tmp_path / "good" / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="plain tensors"):
        PeftModel.from_pretrained(llama(), tmp_path / "good")
    assert not (tmp_path / "owned").exists()


def test_promise_22_no_config_names_a_class_or_a_path_to_import(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "evil_package", None)
    model = adapted(task_type=None)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    config.update(
        base_model_name_or_path="x", auto_mapping={"parent_library": "evil_package", "base_model_class": "Model"}
    )
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="evil_package"):
        peft.AutoPeftModel.from_pretrained(tmp_path)
    config.update(peft_type="os.system")
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="Unknown method"):
        PeftConfig.from_pretrained(tmp_path)


def test_promise_22_no_path_escapes_the_folder(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "secret")
    (tmp_path / "open").mkdir()
    for call in (
        lambda: PeftModel.from_pretrained(llama(), tmp_path / "open", subfolder="../secret"),
        lambda: PeftConfig.from_pretrained(tmp_path / "open", subfolder="../secret"),
    ):
        with pytest.raises(ValueError, match="out of"):
            call()
    os.symlink(tmp_path / "secret", tmp_path / "open" / "link")
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(llama(), tmp_path / "open", subfolder="link")
    for name in ("../x", "a/b", "..", "", "a\\b", "x\0"):
        with pytest.raises(ValueError, match="folder"):
            model.add_adapter(name, lora())


@pytest.mark.parametrize("crash_at", [1, 2])
def test_promise_23_a_crash_while_saving_leaves_the_old_adapter_or_the_new(crash_at, tmp_path, monkeypatch):
    old, new = adapted(seed=1), adapted(seed=2, lora_alpha=64, r=2)
    old.save_pretrained(tmp_path)
    renames = []
    replace = os.replace

    def crash(a, b):
        renames.append(b)
        if len(renames) == crash_at:
            raise KeyboardInterrupt
        replace(a, b)

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        new.save_pretrained(tmp_path)
    monkeypatch.undo()
    assert len(renames) == crash_at
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(llama(), tmp_path).eval()
    expected = old if crash_at == 1 else new
    assert torch.equal(logits(loaded), logits(expected)) and not torch.equal(logits(old), logits(new))
    assert crash_at == 1 or any("disagrees" in str(w.message) and "lora_alpha" in str(w.message) for w in seen)


def test_promise_24_a_field_that_is_not_built_is_refused_by_name_unless_it_is_at_its_default(tmp_path):
    found = 0
    for method in registry.methods().values():
        cls, needed = method.config_class, method.examples[0] if method.examples else {}
        for name, f in cls.__dataclass_fields__.items():
            if "unavailable" in f.metadata:
                found += 1
                with pytest.raises(ValueError, match=name):
                    cls(**{**needed, name: "something"})
                default = f.metadata["unavailable"]
                assert getattr(cls(**{**needed, name: copy.deepcopy(default)}), name) == default
    assert found


def test_promise_24_an_unknown_field_warns_by_name_and_strict_refuses(tmp_path):
    adapted().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpa": 99, "from_the_future": 1}))
    with pytest.warns(UserWarning, match=r"lora_alpa.*from_the_future.*lora_alpha"):
        assert PeftConfig.from_pretrained(tmp_path).lora_alpha == 8
    with pytest.raises(ValueError, match="from_the_future"):
        PeftConfig.from_pretrained(tmp_path, strict=True)


def test_promise_25_the_wrong_base_is_told_by_what_differs(tmp_path):
    adapted().save_pretrained(tmp_path)

    class OtherForCausalLM(LlamaForCausalLM):
        pass

    wider = llama(hidden_size=32)
    larger = llama(vocab_size=80)
    other = OtherForCausalLM(llama().config)
    for base, names in (
        (other, ("OtherForCausalLM", "LlamaForCausalLM")),
        (larger, ("64", "80")),
        (wider, ("q_proj", "16", "32")),
    ):
        before = state(base)
        with pytest.raises(CheckpointError) as e:
            PeftModel.from_pretrained(base, tmp_path)
        assert all(n in str(e.value) for n in names), str(e.value)
        assert same(state(base), before)
    with pytest.raises(NoMatchingPeftModuleError):
        PeftModel.from_pretrained(nn.Sequential(nn.Linear(16, 16)), tmp_path)
    PeftModel.from_pretrained(larger, tmp_path, strict=False)


NAMES = [
    "0",
    "q_proj",
    "train",
    "v1.0",
    "lora_A",
    "base_layer",
    "default",
    "adapters",
    "forward",
    "a b",
    "ä%",
    "weight",
    "eval",
]


def test_promise_30_any_name_that_a_folder_may_have_works(tmp_path):
    model = adapted(names=tuple(NAMES))
    for name in NAMES:
        randomise(model, name, hash(name) % 1000)
    out = {}
    for name in NAMES:
        model.set_adapter(name)
        out[name] = logits(model)
    assert len({tuple(v.flatten().tolist()) for v in out.values()}) == len(NAMES)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(llama(), tmp_path / "0", adapter_name="0")
    for name in NAMES[1:]:
        loaded.load_adapter(tmp_path if name == "default" else tmp_path / name, name)
    for name in NAMES:
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded.eval()), out[name]), name
        file = load_file((tmp_path if name == "default" else tmp_path / name) / "adapter_model.safetensors")
        assert set(file) == {
            f"base_model.model.model.layers.{i}.self_attn.{p}_proj.lora_{x}.weight"
            for i in (0, 1)
            for p in "qv"
            for x in "AB"
        }
    for name in NAMES[:-1]:
        loaded.delete_adapter(name)
    assert torch.equal(logits(loaded), out[NAMES[-1]])


def test_promise_20_only_the_trained_rows_of_an_embedding_are_saved(tmp_path):
    rows = [3, 60]
    model = adapted(trainable_token_indices=rows)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    embeddings = {k: v for k, v in tensors.items() if "embed_tokens" in k}
    assert embeddings and all(v.shape[0] == len(rows) for v in embeddings.values())
    assert torch.equal(logits(PeftModel.from_pretrained(llama(), tmp_path).eval()), logits(model))
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as f:
        assert json.loads(f.metadata()["peft_base"])["vocab_size"] == 64


def test_promise_20_whole_embeddings_are_saved_when_asked_for_and_their_size_is_told(tmp_path, capsys):
    model = adapted()
    model.save_pretrained(tmp_path / "no")
    assert not any("embed" in k for k in load_file(tmp_path / "no" / "adapter_model.safetensors"))
    model.save_pretrained(tmp_path / "yes", save_embedding_layers=True)
    assert any("embed" in k for k in load_file(tmp_path / "yes" / "adapter_model.safetensors"))
    assert "MiB" in capsys.readouterr().out
