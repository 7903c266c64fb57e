"""The models of each task: arguments by position as upstream takes them, and heads that train along."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import peft
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.core.model.peft_model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.core.model.task_models import (
    OUTPUTS,
    PeftMixedModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)
from tests.golden.prompt import make

# class, a model of the task, what its forward takes by position after ids and mask, and the head that trains along
TASKS = {
    "CAUSAL_LM": (PeftModelForCausalLM, "llama_gqa", "inputs_embeds labels", None),
    "SEQ_2_SEQ_LM": (
        *(PeftModelForSeq2SeqLM, "t5"),
        "inputs_embeds decoder_input_ids decoder_attention_mask decoder_inputs_embeds labels",
        None,
    ),
    "SEQ_CLS": (PeftModelForSequenceClassification, "bert_cls", "inputs_embeds labels", "classifier"),
    "TOKEN_CLS": (PeftModelForTokenClassification, "bert_tok", "inputs_embeds labels", "classifier"),
    "QUESTION_ANS": (
        *(PeftModelForQuestionAnswering, "bert_qa"),
        "token_type_ids position_ids inputs_embeds start_positions end_positions",
        "qa_outputs",
    ),
    "FEATURE_EXTRACTION": (PeftModelForFeatureExtraction, "bert_feat", "inputs_embeds", None),
}
every_task = pytest.mark.parametrize("task", TASKS)
TARGETS = {"llama_gqa": ["q_proj"], "t5": ["q"]}


def adapted(task: str, **more: object) -> PeftModel:
    name = TASKS[task][1]
    targets = TARGETS.get(name, ["query"])
    config = LoraConfig(r=2, task_type=task, target_modules=targets, init_lora_weights=False, **more)
    return get_peft_model(make.build(name), config).eval()


def test_every_task_has_a_model_of_its_own():
    assert {t.value for t in TaskType} == TASKS.keys() == MODEL_TYPE_TO_PEFT_MODEL_MAPPING.keys()
    for task, (cls, *_) in TASKS.items():
        assert MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task] is cls and getattr(peft, cls.__name__) is cls


@every_task
def test_forward_takes_its_arguments_by_position_as_by_name(task):
    cls, name, order, _ = TASKS[task]
    model = adapted(task)
    given = {**make.inputs(name), **make.labels(name)}
    by_position = [given.get(n) for n in ("input_ids", "attention_mask", *order.split())]
    assert type(model) is cls and given.keys() <= {"input_ids", "attention_mask", *order.split()}
    with torch.no_grad():
        expected, found = model(**given), model(*by_position)
        hidden = model(*by_position, None, True)  # output_attentions, output_hidden_states
        as_tuple = model(*by_position, None, None, False)  # return_dict
    if make.labels(name):
        assert torch.equal(found.loss, expected.loss) and expected.loss.isfinite()
    assert torch.equal(make.main_output(found), make.main_output(expected))
    assert (getattr(hidden, "hidden_states", None) or hidden.encoder_hidden_states) and isinstance(as_tuple, tuple)
    assert cls.arguments == (*order.split(), *OUTPUTS)


@every_task
def test_a_head_trains_along_and_is_saved_where_the_task_has_one(task, tmp_path):
    head = TASKS[task][3]
    model = adapted(task)
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert bool(trained) == bool(head) and all(f".{head}." in n for n in trained)
    assert model.peft_config["default"].modules_to_save == ([head] if head else None)
    if head:
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n in trained:
                    p += 1.0
        model.save_pretrained(tmp_path)
        again = PeftModel.from_pretrained(make.build(TASKS[task][1]), tmp_path).eval()
        with torch.no_grad():
            given = make.inputs(TASKS[task][1])
            assert torch.equal(make.main_output(again(**given)), make.main_output(model(**given)))


def test_modules_that_a_config_names_stay_beside_the_head():
    config = adapted("SEQ_CLS", modules_to_save=["pooler"]).peft_config["default"]
    assert config.modules_to_save == ["pooler", "classifier"]
    assert adapted("SEQ_CLS", modules_to_save=["classifier"]).peft_config["default"].modules_to_save == ["classifier"]


def test_the_mixed_model_is_any_model():
    base = nn.Sequential(nn.Linear(4, 4))
    mixed = get_peft_model(base, LoraConfig(r=1, target_modules=["0"]), mixed=True)
    mixed.add_adapter("other", peft.LoHaConfig(r=1, target_modules=["0"]))
    mixed.set_adapter(["default", "other"])
    assert isinstance(mixed, PeftMixedModel) and isinstance(mixed, PeftModel)
    assert mixed.active_adapters == ["default", "other"]
