"""Which task a job is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from peft.errors import UserError
from peft.recipes.tasks.find import SHORT, TASKS, find


def test_tasks_are_found_by_name_or_by_the_models_config() -> None:
    for name, short in SHORT.items():
        assert find(name, None, False) is find(short.replace("_", "-"), None, False) is TASKS[name]
    built = {
        "LlamaForCausalLM": "CAUSAL_LM",
        "GPT2LMHeadModel": "CAUSAL_LM",
        "BertForSequenceClassification": "SEQ_CLS",
        "BertForTokenClassification": "TOKEN_CLS",
    }
    for architecture, name in built.items():
        assert find(None, SimpleNamespace(architectures=[architecture]), False) is TASKS[name]
    assert find(None, SimpleNamespace(is_encoder_decoder=True), False) is TASKS["SEQ_2_SEQ_LM"]
    assert find(None, SimpleNamespace(architectures=None), True) is TASKS["CAUSAL_LM"]
    for unknown in (SimpleNamespace(architectures=["BertModel"]), SimpleNamespace()):
        with pytest.raises(UserError, match="--task: causal_lm"):
            find(None, unknown, False)
