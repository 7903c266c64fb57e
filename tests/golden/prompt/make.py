"""Golden outputs of prompt methods, made by huggingface/peft 0.21.2: `PYTHONPATH=<its folder> python make.py`.

One file per tiny model holds, for every case, the saved adapter (tensors and config) and what the reference gives for
it: logits and losses with and without a mask, generated tokens. The models have no files: their weights follow from
the names of their parameters. The tests import this module for the models and the inputs.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zlib

import torch
import transformers as tf

HERE = os.path.dirname(os.path.abspath(__file__))
VOCAB, D, N = 40, 16, 3

SMALL = {"vocab_size": VOCAB, "hidden_size": D, "num_attention_heads": 4, "num_hidden_layers": 2}
LLAMA = {**SMALL, "intermediate_size": 24, "max_position_embeddings": 64}
NONE = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}


def gemma() -> tf.PreTrainedModel:
    more = {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}
    return tf.Gemma2ForCausalLM(tf.Gemma2Config(**LLAMA, **more, **NONE, attn_implementation="eager"))


def opt() -> tf.PreTrainedModel:
    more = {"ffn_dim": 24, "max_position_embeddings": 64, "word_embed_proj_dim": D}
    return tf.OPTForCausalLM(tf.OPTConfig(**SMALL, **more, **NONE))


def t5() -> tf.PreTrainedModel:
    sizes = {"d_model": D, "d_kv": 4, "d_ff": 24, "num_layers": 4, "num_heads": 4, "vocab_size": VOCAB}
    ids = {"pad_token_id": 0, "eos_token_id": None, "decoder_start_token_id": 0}
    return tf.T5ForConditionalGeneration(tf.T5Config(**sizes, **ids, dropout_rate=0.0))


def bert(head: type, **more: int) -> tf.PreTrainedModel:
    return head(tf.BertConfig(**SMALL, intermediate_size=24, max_position_embeddings=64, **more))


MODELS = {
    "llama_gqa": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, **NONE, num_key_value_heads=2)), "CAUSAL_LM"),
    "llama_mha": (lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**LLAMA, **NONE, num_key_value_heads=4)), "CAUSAL_LM"),
    "gpt2": (
        lambda: tf.GPT2LMHeadModel(
            tf.GPT2Config(vocab_size=VOCAB, n_embd=D, n_layer=2, n_head=4, n_positions=64, **NONE)
        ),
        "CAUSAL_LM",
    ),
    "gemma2": (gemma, "CAUSAL_LM"),
    "opt": (opt, "CAUSAL_LM"),
    "t5": (t5, "SEQ_2_SEQ_LM"),
    "bert_cls": (lambda: bert(tf.BertForSequenceClassification, num_labels=3), "SEQ_CLS"),
    "bert_tok": (lambda: bert(tf.BertForTokenClassification, num_labels=3), "TOKEN_CLS"),
    "bert_qa": (lambda: bert(tf.BertForQuestionAnswering), "QUESTION_ANS"),
    "bert_feat": (lambda: bert(tf.BertModel), "FEATURE_EXTRACTION"),
}

# name -> (config class, fields, needs task_ids)
METHODS = {
    "prompt": ("PromptTuningConfig", {}, False),
    "p_mlp": ("PromptEncoderConfig", {"encoder_hidden_size": 8}, False),
    "p_lstm": ("PromptEncoderConfig", {"encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"}, False),
    "prefix": ("PrefixTuningConfig", {}, False),
    "prefix_proj": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 8}, False),
    "multitask": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}, True),
}
SKIP = {("multitask", "bert_qa"), ("multitask", "bert_feat")}  # the reference cannot pass task_ids there
ALL = ("llama_gqa", "t5", "bert_cls")  # where every method has a case; elsewhere one of each form


def cases() -> list[tuple[str, str]]:
    few = ("prompt", "prefix", "multitask")
    return [(model, m) for model in MODELS for m in (METHODS if model in ALL else few) if (m, model) not in SKIP]


def build(name: str) -> tf.PreTrainedModel:
    """A tiny model whose weights follow from the names of its parameters."""
    model = MODELS[name][0]().eval()
    with torch.no_grad():
        for path, p in model.named_parameters():
            rng = torch.Generator().manual_seed(zlib.crc32(path.encode()))
            drawn = torch.randn(p.shape, generator=rng)
            p.copy_(drawn * 0.3 if p.dim() > 1 else 0.1 * drawn + (0 if path.endswith("bias") else 0.7))
    return model


def inputs(name: str) -> dict[str, torch.Tensor]:
    """ids[2, 6] and a mask: padded on the left for causal models, on the right for the others."""
    rng = torch.Generator().manual_seed(7)
    ids = torch.randint(1, VOCAB, (2, 6), generator=rng)
    mask = torch.ones_like(ids)
    if MODELS[name][1] == "CAUSAL_LM":
        ids[0, :2], mask[0, :2] = 0, 0
    else:
        ids[0, -2:], mask[0, -2:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def labels(name: str) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(8)
    task = MODELS[name][1]
    if task == "CAUSAL_LM":
        return {"labels": inputs(name)["input_ids"]}
    if task == "SEQ_2_SEQ_LM":
        return {"labels": torch.randint(1, VOCAB, (2, 4), generator=rng)}
    if task == "SEQ_CLS":
        return {"labels": torch.tensor([0, 2])}
    if task == "TOKEN_CLS":
        return {"labels": torch.randint(0, 3, (2, 6), generator=rng)}
    if task == "QUESTION_ANS":
        return {"start_positions": torch.tensor([1, 2]), "end_positions": torch.tensor([3, 4])}
    return {}


def main_output(out: object) -> torch.Tensor:
    for key in ("logits", "start_logits", "last_hidden_state"):
        if getattr(out, key, None) is not None:
            return getattr(out, key)
    raise KeyError(type(out))


@torch.no_grad()
def causal_outputs(model: torch.nn.Module, name: str, tasks: bool, alone: bool) -> dict[str, torch.Tensor]:
    """What is compared of a causal model, row by row: each row without its padding (`alone`), or in the padded batch.

    The reference's own results change with the padding on the left, which it puts between prompt and text.
    """
    batch, found = inputs(name), {}
    for row, real in enumerate(batch["attention_mask"].sum(1).tolist()):
        pick, cut = ([row], slice(-real, None)) if alone else ([0, 1], slice(None))
        given = {k: v[pick][:, cut] for k, v in batch.items()}
        more = {"task_ids": torch.tensor([2, 1])[pick]} if tasks else {}
        at = 0 if alone else row
        found[f"masked/{row}"] = model(**given, **more).logits[at, -real:]
        target = torch.full_like(given["input_ids"], -100)
        target[at, 1 - real :] = given["input_ids"][
            at, 1 - real :
        ]  # the first token is told by the padding, or by nothing
        found[f"loss/{row}"] = model(**given, labels=target, **more).loss
        how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found[f"greedy/{row}"] = model.generate(**given, **how, **more)[at, -6:]
        found[f"beam/{row}"] = model.generate(**given, **how, num_beams=3, **more)[at, -6:]
    more = {"task_ids": torch.tensor([2, 1])} if tasks else {}
    found["plain"] = model(input_ids=batch["input_ids"], **more).logits
    return {k: v.contiguous() for k, v in found.items()}


@torch.no_grad()
def outputs(
    model: torch.nn.Module, name: str, tasks: bool, with_loss: bool = True, alone: bool = False
) -> dict[str, torch.Tensor]:
    """Everything that is compared."""
    if MODELS[name][1] == "CAUSAL_LM":
        return causal_outputs(model, name, tasks, alone)
    more = {"task_ids": torch.tensor([2, 1])} if tasks else {}
    given, found = inputs(name), {}
    target = labels(name) if MODELS[name][1] in ("SEQ_2_SEQ_LM",) else {}
    found["masked"] = main_output(model(**given, **target, **more))
    found["plain"] = main_output(model(input_ids=given["input_ids"], **target, **more))
    if with_loss and labels(name):
        found["loss"] = model(**given, **labels(name), **more).loss
    if MODELS[name][1] in ("CAUSAL_LM", "SEQ_2_SEQ_LM"):
        how = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found["greedy"] = model.generate(**given, **how, **more)
        found["beam"] = model.generate(**given, **how, num_beams=3, **more)
    return {k: v.contiguous() for k, v in found.items()}


def config_for(peft: object, name: str, method: str) -> object:
    cls, fields, _ = METHODS[method]
    return getattr(peft, cls)(task_type=MODELS[name][1], num_virtual_tokens=N, **fields)


def main() -> None:
    from safetensors.torch import load_file, save_file

    import peft

    for name in sys.argv[1:] or MODELS:
        tensors, header = {}, {}
        for model_name, method in cases():
            if model_name != name:
                continue
            torch.manual_seed(3)
            model = peft.get_peft_model(build(name), config_for(peft, name, method)).eval()
            with torch.no_grad():
                for p in model.prompt_encoder.parameters():
                    p.mul_(0.7).add_(0.2 * torch.randn_like(p))
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder, save_embedding_layers=False)
                with open(os.path.join(folder, "adapter_config.json")) as f:
                    header[method] = json.dumps(json.load(f), sort_keys=True)
                for k, v in load_file(os.path.join(folder, "adapter_model.safetensors")).items():
                    tensors[f"{method}/adapter/{k}"] = v
                back = peft.PeftModel.from_pretrained(build(name), folder).eval()
            tasks = METHODS[method][2]
            with_loss = MODELS[name][1] != "TOKEN_CLS" or "prefix" in method  # the reference fails there
            for k, v in outputs(back, name, tasks, with_loss, alone=True).items():
                tensors[f"{method}/{k}"] = v
        save_file(tensors, os.path.join(HERE, f"{name}.safetensors"), metadata=header)
        print(name, len(tensors), os.path.getsize(os.path.join(HERE, f"{name}.safetensors")), file=sys.stderr)


if __name__ == "__main__":
    main()
