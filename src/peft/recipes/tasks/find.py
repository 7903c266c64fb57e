"""Which task a job is: by its name, or as the model's config shows it."""

from __future__ import annotations

from ...errors import UserError, nearest
from .base import Task
from .classification import SequenceClassification, TokenClassification
from .text import CausalLM, Seq2SeqLM

TASKS: dict[str, type[Task]] = {t.type: t for t in (CausalLM, Seq2SeqLM, SequenceClassification, TokenClassification)}
SHORT = {"CAUSAL_LM": "causal_lm", "SEQ_2_SEQ_LM": "seq2seq_lm", "SEQ_CLS": "seq_cls", "TOKEN_CLS": "token_cls"}


def find(name: str | None, config: object, gguf: bool) -> type[Task]:
    """The task by its name, or by what the model's config says about it."""
    if name is not None:
        wanted = name.lower().replace("-", "_")
        for kind, short in SHORT.items():
            if wanted in (short, kind.lower()):
                return TASKS[kind]
        raise UserError(f"Unknown task {name!r}. {nearest(wanted, SHORT.values())}")
    if getattr(config, "is_encoder_decoder", False):
        return Seq2SeqLM
    built = (getattr(config, "architectures", None) or [""])[0]
    if gguf or built.endswith(("ForCausalLM", "LMHeadModel")):
        return CausalLM
    if built.endswith("ForSequenceClassification"):
        return SequenceClassification
    if built.endswith("ForTokenClassification"):
        return TokenClassification
    raise UserError(
        f"The task cannot be read off this model ({built or 'no architecture given'}). Give --task: {', '.join(SHORT.values())}."
    )
