"""Short training runs with TRL that either library can make: `python trl_runs.py FOLDER`, or `run` in this process.

A folder holds the base models, the tokenizer and, for each run, the adapter to start from. A run leaves the losses of
its steps and the trained adapter. Nothing here names one of the two libraries.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from transformers import AutoTokenizer, LlamaForCausalLM, LlamaForSequenceClassification

from peft import PeftConfig, get_peft_model, load_peft_weights, set_peft_model_state_dict

TEXTS = {
    "text": ["the cat sat on the mat", "a dog ran under the tree", "the bird sings very well", "what did it do"],
}
PAIRS = {
    "prompt": ["what did the cat do ", "what did it say ", "the dog ", "the bird "],
    "chosen": ["it sat on the mat", "yes and then no", "ran very well", "sings"],
    "rejected": ["no", "it ran", "sat on a tree and sings", "ran under the mat"],
}
# name -> (trainer, adapter's settings: type and fields)
RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sft-lora": ("SFT", "LoraConfig", {"use_rslora": True}),
    "sft-dora": ("SFT", "LoraConfig", {"use_dora": True}),
    "sft-head": ("SFT", "LoraConfig", {"modules_to_save": ["lm_head"]}),
    "sft-tokens": ("SFT", "LoraConfig", {"trainable_token_indices": [5, 9]}),
    "sft-ia3": ("SFT", "IA3Config", {"feedforward_modules": []}),
    "sft-prompt": ("SFT", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "sft-prefix": ("SFT", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "dpo-lora": ("DPO", "LoraConfig", {}),
    "dpo-head": ("DPO", "LoraConfig", {"modules_to_save": ["lm_head"]}),
    "reward-lora": ("Reward", "LoraConfig", {}),
}


def run(name: str, root: Path, out: Path) -> None:
    kind, _, _ = RUNS[name]
    reward = kind == "Reward"
    cls = LlamaForSequenceClassification if reward else LlamaForCausalLM
    torch.manual_seed(0)
    base = cls.from_pretrained(root / ("reward" if reward else "base"))
    config = PeftConfig.from_pretrained(str(root / name))
    config.inference_mode = False
    model = get_peft_model(base, config)
    set_peft_model_state_dict(model, load_peft_weights(str(root / name)))
    args = getattr(trl, f"{kind}Config")(
        output_dir=str(out),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_steps=4,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        optim="sgd",  # linear in the gradients: small differences stay small
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        disable_tqdm=True,
        gradient_checkpointing=not name.endswith("prefix"),
    )
    data = TEXTS if kind == "SFT" else PAIRS
    if reward:
        data = {k: [p + c for p, c in zip(PAIRS["prompt"], PAIRS[k], strict=True)] for k in ("chosen", "rejected")}
    trainer = getattr(trl, f"{kind}Trainer")(
        model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=AutoTokenizer.from_pretrained(root / "tokenizer"),
    )
    trainer.train()
    trainer.save_model(str(out))
    steps = [{k: e[k] for k in ("loss", "grad_norm")} for e in trainer.state.log_history if "loss" in e]
    (out / "steps.json").write_text(json.dumps([{k: float(v) for k, v in s.items()} for s in steps]))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for each in RUNS:
        run(each, folder, folder / f"{each}-there")
