"""Prompt tuning: n trainable vectors before the input embeddings, f([P; E(ids)]) with P[n, d] (arXiv 2104.08691)."""

from __future__ import annotations

import enum
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import PromptLearningConfig
from ..config_fields import member
from ..contract.site import Site
from ..core.forms.prompt import PromptMethod, Table
from ..inits.prompts import text_ids

__all__ = ["PromptTuningConfig", "PromptTuningInit"]


class PromptTuningInit(str, enum.Enum):
    """Where the vectors start: TEXT, embeddings of a text; SAMPLE_VOCAB, of random tokens; RANDOM, N(0, 1)."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@dataclass
class PromptTuningConfig(PromptLearningConfig):
    """Prompt tuning (arXiv 2104.08691).

    num_virtual_tokens: n. prompt_tuning_init: see `PromptTuningInit`. prompt_tuning_init_text, tokenizer_name_or_path,
    tokenizer_kwargs: the text that TEXT starts from (repeated or cut to n tokens), and the tokenizer that splits it.
    """

    own_type = "PROMPT_TUNING"
    prompt_tuning_init: PromptTuningInit | str = member(PromptTuningInit.RANDOM)
    prompt_tuning_init_text: str | None = None
    tokenizer_name_or_path: str | None = None
    tokenizer_kwargs: dict[str, object] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        text = self.prompt_tuning_init == "TEXT"
        for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
            if text and not getattr(self, name):
                raise ValueError(f"When prompt_tuning_init='TEXT', {name} can't be {getattr(self, name)!r}: state it.")
        if self.tokenizer_kwargs and not text:
            raise ValueError("tokenizer_kwargs only valid when using prompt_tuning_init='TEXT': leave it out.")


class PromptTuning(PromptMethod):
    peft_type = "PROMPT_TUNING"
    config_class = PromptTuningConfig
    summary = "Puts trainable vectors before the embedded input; the model itself is untouched."
    formula = "f([P; E(x)])"
    paper = "arXiv 2104.08691"
    examples = (
        {"num_virtual_tokens": 3},
        {"num_virtual_tokens": 2, "prompt_tuning_init": "SAMPLE_VOCAB"},
    )

    def __init__(self, config: PromptTuningConfig, site: Site) -> None:
        super().__init__(config, site)
        self.embedding = Table(site.empty(self.rows, config.token_dim))
        self.create(site)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        P = self.embedding.weight
        start = self.config.prompt_tuning_init
        assert site.embed is not None
        if start == "SAMPLE_VOCAB":
            P.copy_(site.embed(torch.randint(site.vocabulary, (len(P),), generator=rng)))
        elif start == "TEXT":
            c = self.config
            ids = text_ids(c.prompt_tuning_init_text, len(P), c.tokenizer_name_or_path, c.tokenizer_kwargs or {})
            P.copy_(site.embed(torch.tensor(ids)))
        else:
            P.normal_(generator=rng)

    def prompt(self, tasks: Tensor | None) -> Tensor:
        return self.embedding.weight
