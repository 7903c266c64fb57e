"""The model card, and pushing it with the adapter."""

from __future__ import annotations

import json
import re

import yaml

import peft
from peft import LoraConfig, get_peft_model
from peft.core.report.card import split, write_card
from tests.helpers.tiny_llama import llama, lora


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


def test_further_tags_stand_beside_the_methods_once(tmp_path):
    config = LoraConfig(base_model_name_or_path="some/base")
    write_card(config, tmp_path, ["law", "peft"])
    write_card(config, tmp_path, "law")
    assert split(str(tmp_path / "README.md"))[0]["tags"] == ["base_model:adapter:some/base", "lora", "peft", "law"]
