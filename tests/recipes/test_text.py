"""Tasks whose model writes text."""

from __future__ import annotations

from pathlib import Path

from peft.recipes import bases as models
from peft.recipes import job
from peft.recipes.tasks import text
from tests.helpers.small_models import TEMPLATE


def test_prompts_split_where_the_answer_begins(home: Path) -> None:
    tokenizer = models.load_tokenizer(models.resolve(str(home / "llama")))
    task = text.CausalLM(job.Data(template=TEMPLATE, max_length=10), tokenizer, None)
    row = task.encode({"text": "the box was wet", "label": "no complaint"})
    answer = tokenizer("no complaint").input_ids
    assert [i for i in row["labels"] if i != -100] == answer and row["input_ids"][-3:] == answer
    assert len(task.encode({"text": "the box was wet " * 9, "label": "no complaint"})["input_ids"]) <= 10
