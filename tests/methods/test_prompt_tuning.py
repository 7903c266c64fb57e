"""Prompt tuning: starts from rows of the embedding."""

from __future__ import annotations

import torch
import transformers as tf

from peft import get_peft_model
from peft.methods.prompt_tuning import PromptTuningConfig
from tests.golden.prompt import make


def test_vocabulary_and_text_starts_are_rows_of_the_embedding(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(make.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    base = make.build("llama_gqa")
    table = base.get_input_embeddings().weight.detach()

    def start(**more) -> torch.Tensor:
        settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **more)
        return get_peft_model(make.build("llama_gqa"), settings).get_prompt_embedding_to_save("default")

    text = {"prompt_tuning_init_text": "w3 w9", "tokenizer_name_or_path": str(tmp_path)}
    assert torch.equal(start(prompt_tuning_init="TEXT", **text), table[[3, 9, 3, 9, 3]])
    rows = start(prompt_tuning_init="SAMPLE_VOCAB")
    assert all((row == table).all(1).any() for row in rows)
