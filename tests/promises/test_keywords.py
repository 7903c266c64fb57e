"""Every function with further keyword arguments passes each of them on or refuses it by name."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch

import peft
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    load_peft_weights,
)
from peft.utils.hotswap import hotswap_adapter
from tests.helpers.tiny_llama import llama

CONFIG = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture
def folder(tmp_path):
    get_peft_model(llama(), LoraConfig(**CONFIG)).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def model():
    return get_peft_model(llama(), LoraConfig(**CONFIG))


TAKE_A_NAME = {
    "PeftModel.from_pretrained": lambda at, **k: PeftModel.from_pretrained(llama(), at, **k),
    "PeftModel.load_adapter": lambda at, **k: model().load_adapter(at, "second", **k),
    "PeftModel.save_pretrained": lambda at, **k: model().save_pretrained(at, **k),
    "PeftModel.push_to_hub": lambda at, **k: model().push_to_hub("me/mine", **k),
    "PeftModel.add_weighted_adapter": lambda at, **k: model().add_weighted_adapter(["default"], [1.0], "x", **k),
    "PeftConfig.from_pretrained": lambda at, **k: PeftConfig.from_pretrained(at, **k),
    "LoraConfig.from_pretrained": lambda at, **k: LoraConfig.from_pretrained(at, **k),
    "PeftConfig.save_pretrained": lambda at, **k: LoraConfig().save_pretrained(at, **k),
    "PeftConfig.push_to_hub": lambda at, **k: LoraConfig().push_to_hub("me/mine", **k),
    "PeftConfig.from_json_file": lambda at, **k: PeftConfig.from_json_file(f"{at}/adapter_config.json", **k),
    "PeftConfig.from_peft_type": lambda at, **k: PeftConfig.from_peft_type(peft_type="LORA", **k),
    "PeftConfig._get_peft_type": lambda at, **k: PeftConfig._get_peft_type(at, **k),
    "LoraConfig": lambda at, **k: LoraConfig(**k),
    "LoraModel": lambda at, **k: peft.LoraModel(llama(), LoraConfig(**CONFIG), "default", **k),
    "Tuner.inject_adapter": lambda at, **k: model().base_model.inject_adapter(llama(), "x", LoraConfig(**CONFIG), **k),
    "get_peft_model": lambda at, **k: get_peft_model(llama(), LoraConfig(**CONFIG), **k),
    "PeftModelForCausalLM": lambda at, **k: peft.PeftModelForCausalLM(llama(), LoraConfig(**CONFIG), **k),
    "load_peft_weights": lambda at, **k: load_peft_weights(at, **k),
    "hotswap_adapter": lambda at, **k: hotswap_adapter(model(), at, "default", **k),
    "create_loraplus_optimizer": lambda at, **k: peft.optimizers.create_loraplus_optimizer(
        model(), torch.optim.SGD, lr=0.1, loraplus_lr_ratio=2.0, **k
    ),
    "create_lorafa_optimizer": lambda at, **k: peft.optimizers.create_lorafa_optimizer(model(), 2, 4, 0.1, **k),
}


class Hub:
    """What was asked of the hub's client."""

    def __init__(self, seen, token=None):
        self.seen = seen
        seen["token"] = token

    def create_repo(self, repo_id, **kwargs):
        self.seen["create_repo"] = kwargs
        return SimpleNamespace(repo_id=f"user/{repo_id.split('/')[-1]}")

    def create_branch(self, repo_id, **kwargs):
        self.seen["create_branch"] = (repo_id, kwargs)

    def upload_folder(self, repo_id, folder_path, **kwargs):
        self.seen["upload"] = (repo_id, kwargs)
        self.seen["files"] = sorted(p.name for p in folder_path.iterdir())
        card = folder_path / "README.md"
        self.seen["card"] = card.read_text() if card.exists() else ""


@pytest.fixture
def hub(monkeypatch):
    seen: dict[str, object] = {}
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token=None: Hub(seen, token))
    return seen


@pytest.mark.parametrize("name", TAKE_A_NAME)
def test_a_keyword_that_nothing_takes_is_refused(name, folder, hub):
    with pytest.raises(TypeError, match="nothing_of_the_sort"):
        TAKE_A_NAME[name](folder, nothing_of_the_sort=1)
    assert not hub


def test_near_names_are_told(folder):
    for call, wrong, meant in (
        (TAKE_A_NAME["PeftModel.from_pretrained"], "subfoldr", "subfolder"),
        (TAKE_A_NAME["PeftModel.push_to_hub"], "creat_pr", "create_pr"),
        (TAKE_A_NAME["PeftModel.push_to_hub"], "safe_serialisation", "safe_serialization"),
        (TAKE_A_NAME["PeftModel.save_pretrained"], "state_dic", "state_dict"),
        (TAKE_A_NAME["LoraConfig.from_pretrained"], "lora_alph", "lora_alpha"),
    ):
        with pytest.raises(TypeError, match=f"'{wrong}'.*Did you mean.*'{meant}'"):
            call(folder, **{wrong: None})


@pytest.mark.parametrize("what", [lambda: LoraConfig(**CONFIG), model], ids=["config", "model"])
def test_what_a_push_is_asked_for_reaches_the_hub(what, hub):
    asked = {"commit_message": "Mine", "commit_description": "Why", "create_pr": True}
    what().push_to_hub("mine", private=True, token="t", **asked)
    assert hub["token"] == "t" and hub["create_repo"] == {"private": True, "exist_ok": True}
    assert hub["upload"] == ("user/mine", asked) and "create_branch" not in hub
    what().push_to_hub("mine", revision="next", use_auth_token="older")
    assert hub["token"] == "older" and hub["create_branch"] == ("user/mine", {"branch": "next", "exist_ok": True})
    assert hub["upload"] == ("user/mine", {"commit_message": "Upload adapter", "revision": "next"})


def test_what_saving_takes_a_push_takes_too(hub):
    two = model()
    two.add_adapter("second", LoraConfig(**CONFIG))
    two.push_to_hub("mine", selected_adapters=["second"], safe_serialization=True, tags=["law"], max_shard_size="1GB")
    assert hub["files"] == ["README.md", "second"]
    two.push_to_hub("mine", tags="law", model_card=False, selected_adapters=["default"])
    assert hub["files"] == ["README.md", "adapter_config.json", "adapter_model.safetensors"] and "law" in hub["card"]


def test_arguments_of_other_libraries_idioms_are_taken(folder, tmp_path):
    """accelerate's way to save, and what places a base anew elsewhere."""
    made = model()
    made.save_pretrained(tmp_path, is_main_process=True, save_function=torch.save, max_shard_size="5GB")
    PeftModel.from_pretrained(llama(), folder, device_map={"": "cpu"}, max_memory=None, trust_remote_code=True)
    with pytest.warns(UserWarning, match="autocast_adapter_dtype"):
        PeftModel.from_pretrained(llama(), folder, torch_dtype=torch.float16)


def test_what_a_download_is_asked_for_reaches_the_hub(folder, monkeypatch):
    asked = []

    def download(repo_id, name, **kwargs):
        asked.append(kwargs)
        return f"{folder}/{name}"

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    wanted = {"revision": "r", "cache_dir": "c", "force_download": True, "local_files_only": False, "etag_timeout": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        PeftModel.from_pretrained(llama(), "me/mine", subfolder="s", use_auth_token="t", **wanted)
        PeftConfig.from_pretrained("me/mine", subfolder="s", token="t", proxies=None, **wanted)
    with pytest.raises(TypeError, match="HTTPS_PROXY"):
        PeftConfig.from_pretrained("me/mine", proxies={"https": "x"})
    assert len(asked) >= 3 and all(a == {"subfolder": "s", "token": "t", **wanted} for a in asked)


def test_what_is_the_adapters_goes_to_the_adapter(folder, tmp_path):
    base = llama().half()
    base.save_pretrained(tmp_path / "base")
    values = json.loads(Path(folder, "adapter_config.json").read_text(encoding="utf-8"))
    values["base_model_name_or_path"] = str(tmp_path / "base")
    config = PeftConfig.from_dict(values)
    for wanted, dtype in ((True, torch.float32), (False, torch.float16)):
        made = AutoPeftModelForCausalLM.from_pretrained(
            folder, config=config, autocast_adapter_dtype=wanted, dtype="auto"
        )
        assert {p.dtype for p in made.adapter_parameters("default")} == {dtype}
