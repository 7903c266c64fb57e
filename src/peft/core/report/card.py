"""The model card: README.md beside an adapter, written on `push_to_hub` or when asked for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import yaml

from ...config import PeftConfig
from ...registry import method


def write_card(config: PeftConfig, folder: str | os.PathLike[str], further: str | Iterable[str] = ()) -> None:
    """Write README.md into `folder`, naming base model, method and version; the text of an existing one stays.

    further: tags beside those that name the method and the base.
    """
    path = os.path.join(folder, "README.md")
    data, text = split(path)
    cls = method(config.peft_type)
    base = config.base_model_name_or_path
    tags = data.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    own = [f"base_model:adapter:{base}"] if base else []
    own += [getattr(config.peft_type, "value", str(config.peft_type)).lower(), "peft"]
    data.update(
        library_name="peft",
        tags=list(dict.fromkeys([*tags, *own, *([further] if isinstance(further, str) else further)])),
    )
    if base and not os.path.isdir(base):  # the hub refuses folders of this machine
        data["base_model"] = base
    version = f"- PEFT {config.peft_version}"
    if not text.strip():
        text = (
            f"\n# {cls.peft_type} adapter{f' for {base}' if base else ''}\n\n{cls.summary}\n\n"
            + (f"Update: `{cls.formula}`" if cls.formula else "")
            + (f" ({cls.paper})" if cls.paper else "")
            + "\n"
        )
    if version not in text:
        heading = "### Framework versions"
        text = text.rstrip("\n") + (f"\n{version}\n" if heading in text else f"\n\n{heading}\n\n{version}\n")
    aside = f"{path}.tmp"
    with open(aside, "w", encoding="utf-8") as f:
        f.write(f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n{text.lstrip(chr(10))}")
    os.replace(aside, path)


def split(path: str) -> tuple[dict[str, Any], str]:
    """(metadata, text) of a card; a header that is no YAML mapping is left in the text."""
    if not os.path.isfile(path):
        return {}, ""
    with open(path, encoding="utf-8") as f:
        content = f.read()
    if content.startswith("---\n") and (end := content.find("\n---", 3)) >= 0:
        try:
            data = yaml.safe_load(content[4:end])
        except yaml.YAMLError:
            data = None
        if isinstance(data, dict):
            return data, content[end + 4 :]
    return {}, content
