"""The models of each task: what their forward takes by position, and which have a head that trains along."""

from __future__ import annotations

from torch import nn

from ...config import PeftConfig
from ..anatomy.heads import prepare_head
from .peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

OUTPUTS = ("output_attentions", "output_hidden_states", "return_dict")


class PeftModelForCausalLM(PeftModel):
    """For models that generate text."""

    arguments = ("inputs_embeds", "labels", *OUTPUTS)


class PeftModelForSeq2SeqLM(PeftModel):
    """For encoder-decoder models."""

    arguments = (
        *("inputs_embeds", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds", "labels"),
        *OUTPUTS,
    )


class _WithHead(PeftModel):
    def __init__(
        self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **options: bool
    ) -> None:
        prepare_head(model, peft_config)
        super().__init__(model, peft_config, adapter_name, **options)


class PeftModelForSequenceClassification(_WithHead):
    """For sequence classifiers; the classification head trains along and is saved."""

    arguments = ("inputs_embeds", "labels", *OUTPUTS)


class PeftModelForTokenClassification(_WithHead):
    """For token classifiers; the classification head trains along and is saved."""

    arguments = ("inputs_embeds", "labels", *OUTPUTS)


class PeftModelForQuestionAnswering(_WithHead):
    """For extractive question answering; the span head trains along and is saved."""

    arguments = ("token_type_ids", "position_ids", "inputs_embeds", "start_positions", "end_positions", *OUTPUTS)


class PeftModelForFeatureExtraction(PeftModel):
    """For models that give embeddings."""

    arguments = ("inputs_embeds", *OUTPUTS)


MODEL_TYPE_TO_PEFT_MODEL_MAPPING.update(
    SEQ_CLS=PeftModelForSequenceClassification,
    SEQ_2_SEQ_LM=PeftModelForSeq2SeqLM,
    CAUSAL_LM=PeftModelForCausalLM,
    TOKEN_CLS=PeftModelForTokenClassification,
    QUESTION_ANS=PeftModelForQuestionAnswering,
    FEATURE_EXTRACTION=PeftModelForFeatureExtraction,
)


class PeftMixedModel(PeftModel):
    """Adapters of different methods in one model: what every PeftModel can do here; kept for callers by name."""
