"""`AutoPeftModelFor*`: an adapter folder is enough; the base model comes from the adapter's config."""

from __future__ import annotations

import importlib
import os
from typing import Any, ClassVar

from .config import PeftConfig
from .core.anatomy.embeddings import vocab_size
from .core.model.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel
from .core.model.task_models import (
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from .remote import HUB_KWARGS, find_file

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
    "AutoPeftModel",
    "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering",
    "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification",
    "AutoPeftModelForTokenClassification",
]

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"
OF_ADAPTERS = ("autocast_adapter_dtype", "ephemeral_gpu_offload", "strict")
LIBRARIES = ("diffusers", "lerobot", "megatron-core", "transformers")  # where a config may say the base class is from


def get_default_import_allowlist() -> list[str]:
    """The packages from which a base class named by an adapter's config is imported."""
    return list(LIBRARIES)


def check_import_allowlist(allowlist: list[str], parent_name: str) -> bool:
    """Whether a module is one of the allowed packages or lies inside one."""
    return any(parent_name == name or parent_name.startswith(f"{name}.") for name in allowlist)


class AutoPeftModel:
    """Base and adapter from an adapter folder or repository, whatever its task type."""

    _target_class: ClassVar[str | None] = None  # transformers' Auto class, by name: imported when used
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel
    _task: ClassVar[str | None] = None

    def __init__(self, *args: object, **kwargs: object) -> None:
        raise OSError(f"{type(self).__name__} has no instances: call {type(self).__name__}.from_pretrained(folder).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: list[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """The adapter on its base. `revision` is the adapter's; the base's is in the adapter's config.

        Further arguments go to the base model's `from_pretrained`, but those in `OF_ADAPTERS` to the adapter's. If the folder holds a tokenizer with another
        number of tokens than the base has, the embeddings are resized to it. import_allowlist: packages that the
        base class of an adapter without a task type may come from.
        """
        source = os.fspath(pretrained_model_name_or_path)
        remote = {k: v for k, v in kwargs.items() if k in HUB_KWARGS}
        if revision is not None:
            remote["revision"] = revision
        sub = {"subfolder": kwargs.pop("subfolder")} if "subfolder" in kwargs else {}
        own = {k: kwargs.pop(k) for k in OF_ADAPTERS if k in kwargs}
        found = config if config is not None else PeftConfig.from_pretrained(source, **sub, **remote)
        target = cls._base_class(found, list(import_allowlist) if import_allowlist is not None else list(LIBRARIES))
        if found.base_model_name_or_path is None:
            raise ValueError(f"{source} does not name its base model; load the base and use PeftModel.from_pretrained.")
        base = target.from_pretrained(found.base_model_name_or_path, revision=found.revision, **kwargs)
        _fit_vocabulary(base, source, sub.get("subfolder"), remote, bool(kwargs.get("trust_remote_code", False)))
        return cls._target_peft_class.from_pretrained(
            base, source, adapter_name=adapter_name, is_trainable=is_trainable, config=config, **own, **sub, **remote
        )

    @classmethod
    def _base_class(cls, config: PeftConfig, allowed: list[str]) -> Any:
        task = getattr(config.task_type, "value", config.task_type)
        if cls._target_class is not None:
            if task is not None and task != cls._task:
                raise ValueError(
                    f"{cls.__name__} loads adapters for {cls._task}, this one is for {task}: use "
                    f"AutoPeftModel, or the class of that task."
                )
            return getattr(importlib.import_module("transformers"), cls._target_class)
        names = {c._task: c._target_class for c in cls.__subclasses__()}
        if task in names:
            return getattr(importlib.import_module("transformers"), str(names[task]))
        mapping = config.auto_mapping or {}
        parent, name = mapping.get("parent_library"), mapping.get("base_model_class")
        if not (isinstance(parent, str) and isinstance(name, str) and parent and name):
            raise ValueError(
                "The adapter's config has neither a task type nor an auto_mapping, so it does not say which class its "
                "base is: use the AutoPeftModelFor class of your task, or load the base yourself."
            )
        if not check_import_allowlist(allowed, parent):
            raise ValueError(
                f"The adapter's config asks to import {parent}, which is not among {', '.join(allowed)}. If you trust "
                "it, add it to `import_allowlist`."
            )
        return getattr(importlib.import_module(parent), name)


def _fit_vocabulary(base: Any, source: str, subfolder: str | None, remote: dict[str, Any], trust: bool) -> None:
    """Resize the embeddings to the tokenizer that lies beside the adapter."""
    if (
        not hasattr(base, "resize_token_embeddings")
        or find_file(source, TOKENIZER_CONFIG_NAME, subfolder, remote) is None
    ):
        return
    from transformers import AutoTokenizer

    known = {k: v for k, v in remote.items() if k not in ("use_auth_token", "repo_type")}
    where = {"subfolder": subfolder} if subfolder else {}
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust, **where, **known)
    if (held := vocab_size(base)) is not None and len(tokenizer) != held:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    """For models that generate text."""

    _target_class, _target_peft_class, _task = "AutoModelForCausalLM", PeftModelForCausalLM, "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """For encoder-decoder models."""

    _target_class, _target_peft_class, _task = "AutoModelForSeq2SeqLM", PeftModelForSeq2SeqLM, "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """For sequence classifiers."""

    _target_class = "AutoModelForSequenceClassification"
    _target_peft_class, _task = PeftModelForSequenceClassification, "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """For token classifiers."""

    _target_class = "AutoModelForTokenClassification"
    _target_peft_class, _task = PeftModelForTokenClassification, "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """For extractive question answering."""

    _target_class = "AutoModelForQuestionAnswering"
    _target_peft_class, _task = PeftModelForQuestionAnswering, "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """For models that give embeddings."""

    _target_class, _target_peft_class, _task = "AutoModel", PeftModelForFeatureExtraction, "FEATURE_EXTRACTION"
