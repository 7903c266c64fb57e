"""TRL's trainers with adapters: what trains, what stays, what the reference is, what is saved and read again.

The expected values come from copies of the plain base model: its own log-probabilities for the reference, its weights
with a factor product added for what is exported. The reward of the online trainers is a plain function.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)

import peft
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
use_adapter = pytest.importorskip("trl.trainer.utils").use_adapter
trl_runs = pytest.importorskip("tests.clients.trl_runs")  # it imports TRL

WORDS = "the a cat dog sat ran on under mat tree bird sings very well user assistant what did it do say yes no and then"
TEMPLATE = (
    "{% for m in messages %}{{ '<s> ' + m['role'] + ' ' + m['content'] + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s> assistant ' }}{% endif %}"
)
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "pad_token_id": 1,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(["<unk>", "<pad>", "<s>", "</s>", *WORDS.split()])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=made, chat_template=TEMPLATE, padding_side="left", **names)


@pytest.fixture(scope="module")
def bases(tokenizer: Any, tmp_path_factory: Any) -> dict[str, str]:
    """Folders of base models, as users have them: what is trained names its base by one."""
    torch.manual_seed(0)
    size = {**SIZES, "vocab_size": len(tokenizer)}
    made = {
        "llama": LlamaForCausalLM(LlamaConfig(**size, tie_word_embeddings=False)),
        "qwen": Qwen2ForCausalLM(Qwen2Config(**size, tie_word_embeddings=True)),
    }
    folder = tmp_path_factory.mktemp("bases")
    for name, model in made.items():
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(4 if p.dim() > 1 else 1)  # far from a uniform distribution, so that differences show
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


def load(bases: dict[str, str], which: str = "llama", cls: Any = None, **kwargs: Any) -> Any:
    cls = cls or {"llama": LlamaForCausalLM, "qwen": Qwen2ForCausalLM}[which]
    return cls.from_pretrained(bases[which], **kwargs)


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(
        **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **kwargs}
    )


def settings(cls: Any, folder: Any, **kwargs: Any) -> Any:
    given = {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.02,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_num_workers": 0,
    }
    return cls(**{**given, **kwargs})


TEXTS = datasets.Dataset.from_dict(trl_runs.TEXTS)
PAIRS = datasets.Dataset.from_dict(trl_runs.PAIRS)
PROMPTS = datasets.Dataset.from_dict({"prompt": ["what did the cat do", "the dog ran", "the bird", "say yes"] * 2})


def words(completions: list[str], **_: Any) -> list[float]:
    """A reward: different words in the completion."""
    return [float(len(set(c.split()))) for c in completions]


# -- what trained and what did not ---------------------------------------------------------------------------------------
def base_name(name: str) -> str | None:
    """A parameter's name in the bare base model; None for an adapter's."""
    if ".adapters." in name or "prompt_encoder." in name:
        return None
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def frozen_part(model: nn.Module) -> dict[str, Tensor]:
    return {b: p.detach().clone() for n, p in model.named_parameters() if (b := base_name(n))}


def adapter_part(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if base_name(n) is None}


def train(trainer: Any, base: nn.Module) -> dict[str, Tensor]:
    """Train; the adapter's parameters all move, the base's stay the plain base's, bit for bit."""
    before = adapter_part(trainer.model)
    assert before
    trainer.train()
    after = adapter_part(trainer.model)
    still = [n for n, p in trainer.model.named_parameters() if p.requires_grad and torch.equal(before[n], after[n])]
    assert not still
    held = frozen_part(trainer.model)
    plain = {n: p for n, p in base.named_parameters()}
    assert set(held) == set(plain)
    assert [n for n in plain if not torch.equal(held[n], plain[n])] == []
    return after


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    was = model.training
    model.eval()
    with torch.no_grad():
        out = model(input_ids=ids).logits
    model.train(was)
    return out


def ids(tokenizer: Any, rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(4, len(tokenizer), (rows, length), generator=torch.Generator().manual_seed(3))


# -- SFT -------------------------------------------------------------------------------------------------------------------
def sft(
    bases: dict[str, str], tokenizer: Any, folder: Any, config: Any = None, model: Any = None, **kwargs: Any
) -> Any:
    model = load(bases) if model is None else model
    return trl.SFTTrainer(
        model,
        settings(trl.SFTConfig, folder, **kwargs),
        train_dataset=TEXTS,
        processing_class=tokenizer,
        peft_config=config,
    )


METHODS = ["lora", "dora", "head", "tokens", "bottleneck", "bitfit", "ia3", "vera", "krona", "ln"]


def method_config(which: str) -> Any:
    task = {"task_type": "CAUSAL_LM"}
    both = {**task, "target_modules": ["q_proj", "down_proj"]}
    return {
        "lora": lambda: lora(),
        "dora": lambda: lora(use_dora=True),
        "head": lambda: lora(modules_to_save=["lm_head"]),
        "tokens": lambda: lora(trainable_token_indices=[5, 9]),
        "bottleneck": lambda: peft.BottleneckConfig(**task),
        "bitfit": lambda: peft.BitFitConfig(**task),
        "ia3": lambda: peft.IA3Config(**both, feedforward_modules=["down_proj"]),
        "vera": lambda: peft.VeraConfig(**task, target_modules=["q_proj", "o_proj"], r=4),
        "krona": lambda: peft.KronAConfig(**both),
        "diffpruning": lambda: peft.DiffPruningConfig(**both),
        "ln": lambda: peft.LNTuningConfig(**task),
    }[which]()


@pytest.mark.parametrize("which", METHODS)
def test_sft(which: str, bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """Every method trains under SFTTrainer, is saved as an adapter alone, and is read again as it was."""
    name = "qwen" if which in ("tokens", "bitfit") else "llama"
    trainer = sft(bases, tokenizer, tmp_path, method_config(which), load(bases, name), learning_rate=0.05)
    train(trainer, load(bases, name))
    x = ids(tokenizer)
    out = logits(trainer.model, x)
    assert (out - logits(load(bases, name), x)).abs().max() > 1e-4
    trainer.save_model(str(tmp_path / "saved"))
    files = {p.name for p in (tmp_path / "saved").iterdir()}
    assert "adapter_model.safetensors" in files and not any(f.startswith("model") for f in files)
    for again in (
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved"),
        PeftModel.from_pretrained(load(bases, name), tmp_path / "saved"),
    ):
        assert torch.equal(logits(again, x), out)
    assert (
        json.loads((tmp_path / "saved" / "adapter_config.json").read_text())["base_model_name_or_path"] == bases[name]
    )
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model, x), logits(load(bases, name), x))


def test_sft_trains_the_head_that_it_reads_raw(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """TRL multiplies by `lm_head.weight` itself: a trained head, and trained tokens of a tied one, get its gradients."""
    for name, config in (("llama", lora(modules_to_save=["lm_head"])), ("qwen", lora(trainable_token_indices=[5, 9]))):
        trainer = sft(bases, tokenizer, tmp_path, config, load(bases, name))
        with torch.no_grad():
            for n, p in trainer.model.named_parameters():
                if p.requires_grad:
                    p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(n))))
        model = trainer.model.eval()
        batch = {"input_ids": ids(tokenizer), "labels": ids(tokenizer)}
        whole = model(**batch).loss
        fused = model(**batch, fused_lm_head=True).loss
        wanted = [p for p in model.parameters() if p.requires_grad]
        expected = torch.autograd.grad(whole, wanted)
        torch.testing.assert_close(fused, whole, atol=1e-5, rtol=0)
        for a, b in zip(torch.autograd.grad(fused, wanted), expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
def test_sft_of_prompt_methods(kind: str, checkpointing: bool, bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """TRL's own loss scores the real tokens' logits, with and without checkpointing; loading gives the same model."""
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)
    trainer = sft(bases, tokenizer, tmp_path, config, gradient_checkpointing=checkpointing)
    train(trainer, load(bases))
    x = ids(tokenizer)
    out = logits(trainer.model, x)
    batch = {"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x}
    fused = trainer.model.eval()(**batch, fused_lm_head=True).log_probs[:, -(x.shape[1] - 1) :]
    expected = out[:, -x.shape[1] : -1].log_softmax(-1).gather(-1, x[:, 1:, None])[..., 0]
    torch.testing.assert_close(fused, expected, atol=1e-5, rtol=0)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "saved"), x), out)
    with trainer.model.disable_adapter():
        assert torch.equal(logits(trainer.model, x), logits(load(bases), x))


def test_sft_of_a_ready_model(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """A PeftModel goes in as it is; one with a further config is refused, and so is an adapter on the head."""
    ready = get_peft_model(load(bases), lora())
    trainer = sft(bases, tokenizer, tmp_path, model=ready)
    assert trainer.model is ready and isinstance(ready, PeftModel)
    train(trainer, load(bases))
    with pytest.raises(ValueError, match="together with a `peft_config`"):
        sft(bases, tokenizer, tmp_path, lora(), model=ready)
    with pytest.raises(ValueError, match="adapter to `lm_head` is not supported"):
        sft(bases, tokenizer, tmp_path, lora(target_modules=["q_proj", "lm_head"]))
    with pytest.raises(TypeError, match="must be a `peft.PeftConfig`"):
        sft(bases, tokenizer, tmp_path, {"r": 4})


class Gradients(TrainerCallback):
    """The gradients of the first step, and how often each projection ran for them."""

    def __init__(self, model: nn.Module) -> None:
        self.of: dict[str, Tensor] = {}
        self.runs = 0
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        layer.register_forward_hook(lambda *_: setattr(self, "runs", self.runs + (not self.of)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        if not self.of:
            self.of = {n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_sft_under_checkpointing(reentrant: bool, prepared: bool, bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """The same gradients with checkpointing of both sorts, also after preparing a base for k-bit training."""
    seen = []
    for on in (False, True):
        model = load(bases)
        how = {"use_reentrant": reentrant}
        if prepared:
            model = peft.prepare_model_for_kbit_training(
                model, use_gradient_checkpointing=on, gradient_checkpointing_kwargs=how
            )
        model = get_peft_model(model, lora(seed=5))
        with torch.no_grad():
            for n, p in model.named_parameters():
                if n.endswith("lora_B_weight"):
                    p.add_(0.1)
        kwargs = {"gradient_checkpointing": on, "gradient_checkpointing_kwargs": how if on else None}
        trainer = sft(bases, tokenizer, tmp_path, model=model, max_steps=1, seed=3, **kwargs)
        seen.append(Gradients(model))
        trainer.add_callback(seen[-1])
        trainer.train()
    plain, checkpointed = seen
    assert (plain.runs, checkpointed.runs) == (1, 2)
    assert plain.of.keys() == checkpointed.of.keys() and len(plain.of) == 8
    for n, g in plain.of.items():
        assert g.abs().max() > 0
        torch.testing.assert_close(checkpointed.of[n], g, atol=1e-7, rtol=1e-5)


def test_sft_of_chats_with_a_template_that_adds_tokens(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """TRL clones a template, grows the vocabulary and asks for trained rows and a trained head; a file holds both."""
    source = copy.deepcopy(tokenizer)
    source.add_special_tokens({"additional_special_tokens": ["<turn>"]})
    source.chat_template = TEMPLATE.replace("<s>", "<turn>")
    source.save_pretrained(tmp_path / "template")
    chats = datasets.Dataset.from_dict(
        {
            "messages": [
                [{"role": "user", "content": "what did it do"}, {"role": "assistant", "content": a}]
                for a in ("it sat on the mat", "it ran under the tree")
            ]
        }
    )
    args = settings(trl.SFTConfig, tmp_path, chat_template_path=str(tmp_path / "template"))
    trainer = trl.SFTTrainer(
        load(bases), args, train_dataset=chats, processing_class=copy.deepcopy(tokenizer), peft_config=lora()
    )
    new = len(tokenizer)
    config = trainer.model.peft_config["default"]
    assert new in config.trainable_token_indices["embed_tokens"] and config.modules_to_save == ["lm_head"]
    before = adapter_part(trainer.model)
    trainer.train()
    assert all(not torch.equal(before[n], p) for n, p in trainer.model.named_parameters() if p.requires_grad)
    trainer.save_model(str(tmp_path / "saved"))
    x = torch.tensor([[2, new, 7, 8]])
    again = PeftModel.from_pretrained(load(bases), tmp_path / "saved")
    torch.testing.assert_close(logits(again, x), logits(trainer.model, x), atol=1e-6, rtol=0)


def test_checkpoints_and_resuming(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """A checkpoint holds the adapter and the trainer's state, no base; resumed equals uninterrupted, bit for bit."""
    whole = sft(bases, tokenizer, tmp_path / "a", lora(seed=5), max_steps=4, seed=3)
    whole.train()
    first = sft(
        bases, tokenizer, tmp_path / "b", lora(seed=5), max_steps=4, seed=3, save_strategy="steps", save_steps=2
    )
    first.train()
    at = tmp_path / "b" / "checkpoint-2"
    assert {"adapter_config.json", "adapter_model.safetensors", "optimizer.pt"} <= {p.name for p in at.iterdir()}
    assert not list(at.glob("model*")) and not list(at.glob("pytorch_model*"))
    resumed = sft(bases, tokenizer, tmp_path / "c", lora(seed=99), max_steps=4, seed=3)
    resumed.train(resume_from_checkpoint=str(at))
    assert resumed.state.global_step == 4
    expected = adapter_part(whole.model)
    assert all(torch.equal(p, expected[n]) for n, p in adapter_part(resumed.model).items())


def test_best_model_at_the_end(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """The checkpoint that was best by the metric is what remains in memory."""
    options = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True}  # so that it is not the last one
    args = settings(trl.SFTConfig, tmp_path, max_steps=3, load_best_model_at_end=True, **options)
    trainer = trl.SFTTrainer(
        load(bases), args, train_dataset=TEXTS, eval_dataset=TEXTS, processing_class=tokenizer, peft_config=lora()
    )
    trainer.train()
    losses = [e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e]
    best = tmp_path / f"checkpoint-{1 + losses.index(max(losses))}"
    assert losses.index(max(losses)) < 2
    x = ids(tokenizer)
    assert torch.equal(logits(PeftModel.from_pretrained(load(bases), best), x), logits(trainer.model, x))


def test_merging_what_was_trained(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    trainer = sft(bases, tokenizer, tmp_path, lora(use_dora=True), learning_rate=0.1)
    trainer.train()
    x = ids(tokenizer)
    out = logits(trainer.model, x)
    merged = trainer.model.merge_and_unload()
    assert type(merged) is LlamaForCausalLM
    torch.testing.assert_close(logits(merged, x), out, atol=1e-5, rtol=0)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path / "merged"), x), out, atol=1e-5, rtol=0)


def test_a_config_from_the_command_line(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """trl.get_peft_config turns TRL's model arguments into a LoraConfig that injects."""
    args = trl.ModelConfig(
        use_peft=True,
        lora_r=3,
        lora_alpha=6,
        lora_dropout=0.1,
        lora_target_modules=["q_proj", "v_proj"],
        lora_modules_to_save=["lm_head"],
        use_rslora=True,
        use_dora=True,
    )
    config = trl.get_peft_config(args)
    assert isinstance(config, LoraConfig) and trl.get_peft_config(trl.ModelConfig()) is None
    assert (config.r, config.lora_alpha, config.lora_dropout, config.use_rslora, config.use_dora) == (
        3,
        6,
        0.1,
        True,
        True,
    )
    model = get_peft_model(load(bases), config)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == 6 / 3**0.5
    every = trl.get_peft_config(trl.ModelConfig(use_peft=True, lora_target_modules="all-linear"))
    assert len(list(get_peft_model(load(bases), every).roster.adapters["default"].own())) == 2 * 7
    single = trl.get_peft_config(trl.ModelConfig(use_peft=True, lora_target_modules=["q_proj"]))
    assert single.target_modules == "q_proj"  # TRL takes a list of one apart, and a string is a pattern for whole paths
    with pytest.raises(ValueError, match=r"write target_modules=\['q_proj'\]"):
        get_peft_model(load(bases), single)
    wide = trl.get_peft_config(trl.ModelConfig(use_peft=True, lora_target_parameters=["down_proj.weight"]))
    assert wide.target_parameters == ["down_proj.weight"]


def test_hooks_on_saved_tensors(bases: Any, tokenizer: Any) -> None:
    """Activation offloading (TRL's needs an accelerator) replaces what is saved for backward: the same gradients."""
    x = ids(tokenizer)
    model = get_peft_model(load(bases), lora(seed=5, lora_dropout=0.5, target_modules="all-linear"))
    grads, saved = [], []
    for context in (
        nullcontext(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t.clone(), lambda t: t),
    ):
        torch.manual_seed(2)
        with context:
            loss = model(input_ids=x, labels=x).loss
        model.zero_grad()
        loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert saved
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


# -- what a weight sync to an inference engine reads ------------------------------------------------------------------------
def synced(model: Any) -> dict[str, Tensor]:
    """The names and values that TRL pushes to vLLM: merged, wrapper names taken off, adapters left out."""
    model.merge_adapter()
    out = {}
    for name, p in model.named_parameters():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        if model.prefix in name or "original_module" in name:
            continue
        for extra in ("_checkpoint_wrapped_module.", "modules_to_save.default."):
            name = name.replace(extra, "")
        out[name] = p.data.clone()
    model.unmerge_adapter()
    return out


def disturb(model: nn.Module) -> None:
    with torch.no_grad():
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


SYNCED = ["lora", "dora", "head", "tokens", "bottleneck", "bitfit", "ia3", "vera", "krona", "ln", "diffpruning"]


@pytest.mark.parametrize("which", SYNCED)
def test_weight_sync_sends_the_merged_weights_under_the_base_names(which: str, bases: Any, tokenizer: Any) -> None:
    """A plain model that loads exactly what was sent computes what the adapted one does, for every method."""
    name = "qwen" if which in ("tokens", "bitfit") else "llama"
    config = method_config(which)
    model = get_peft_model(load(bases, name), config).eval()
    disturb(model)
    x = ids(tokenizer)
    out = logits(model, x)
    before = frozen_part(model)
    try:
        sent = synced(model)
    except peft.Refusal:  # a bottleneck is no change of the weights: it says so instead of sending the base
        assert which == "bottleneck"
        return
    engine = load(bases, name)
    assert set(sent) == {n for n, _ in engine.named_parameters()} | ({"lm_head.weight"} if which == "tokens" else set())
    if which == "tokens":
        engine.lm_head.weight = nn.Parameter(
            engine.lm_head.weight.clone()
        )  # the merge unties: the rows are the input's
    with torch.no_grad():
        for n, p in engine.named_parameters():
            p.copy_(sent[n])
    torch.testing.assert_close(logits(engine, x), out, atol=1e-5, rtol=0)
    assert (out - logits(load(bases, name), x)).abs().max() > 1e-3
    assert all(torch.equal(p, before[n]) for n, p in frozen_part(model).items())
    assert torch.equal(logits(model, x), out)


def test_weight_sync_is_the_formula(bases: Any) -> None:
    """What is sent for a LoRA target is W + (α/r)·B·A, and everything else is the base, bit for bit."""
    model = get_peft_model(load(bases), lora())
    disturb(model)
    sent = synced(model)
    base = dict(load(bases).named_parameters())
    for n, W in base.items():
        if n.endswith(("q_proj.weight", "v_proj.weight")):
            layer = model.base_model.model.get_submodule(n.removesuffix(".weight"))
            A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            torch.testing.assert_close(sent[n], W + 2 * B @ A, atol=1e-6, rtol=0)
            assert not torch.equal(sent[n], W)
        else:
            assert torch.equal(sent[n], W)


# -- the reference model ------------------------------------------------------------------------------------------------------
def log_probs(model: nn.Module, tokens: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """log p(token | before) of all tokens but the first, [batch, length - 1]."""
    with torch.no_grad():
        out = model.eval()(input_ids=tokens, attention_mask=mask).logits[:, :-1] / temperature
    return out.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def preferences(
    cls: Any, config_cls: Any, model: Any, tokenizer: Any, folder: Any, config: Any = None, **kwargs: Any
) -> Any:
    return cls(
        model,
        args=settings(config_cls, folder, **kwargs),
        train_dataset=PAIRS,
        processing_class=tokenizer,
        peft_config=config,
    )


def reference_is(trainer: Any, reference: nn.Module) -> None:
    """The trainer's reference log-probabilities of a batch are those of this plain model."""
    batch = next(iter(trainer.get_train_dataloader()))
    found = torch.cat(trainer.compute_ref_log_probs(trainer.model, dict(batch)))
    own = log_probs(reference, batch["input_ids"], batch["attention_mask"]) * batch["completion_mask"][:, 1:]
    torch.testing.assert_close(found, own.sum(1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("which", ["lora", "dora", "head", "bottleneck", "bitfit", "prompt", "prefix"])
def test_dpo(which: str, bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """The reference is the base model, before and after training, and the margin starts at zero for zero effect."""
    virtual = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 2}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**virtual),
        "prefix": lambda: peft.PrefixTuningConfig(**virtual),
    }.get(which, lambda: method_config(which))()
    name = "qwen" if which == "bitfit" else "llama"
    trainer = preferences(trl.DPOTrainer, trl.DPOConfig, load(bases, name), tokenizer, tmp_path, config, max_steps=3)
    assert trainer.ref_model is None
    reference_is(trainer, load(bases, name))
    train(trainer, load(bases, name))
    reference_is(trainer, load(bases, name))
    steps = [e for e in trainer.state.log_history if "rewards/margins" in e]
    if not config.is_prompt_learning:
        assert abs(steps[0]["rewards/margins"]) < 1e-5 and steps[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert abs(steps[-1]["rewards/margins"]) > 1e-4


def test_dpo_from_a_trained_adapter(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """TRL copies `default` into a second adapter `ref` by name: heads, biases and token rows, too, are copied."""
    start = get_peft_model(
        load(bases), lora(modules_to_save=["lm_head"], trainable_token_indices=[5, 9], use_dora=True)
    )
    disturb(start)
    plain = copy.deepcopy(start).merge_and_unload()
    trainer = preferences(trl.DPOTrainer, trl.DPOConfig, start, tokenizer, tmp_path, max_steps=2)
    model = trainer.model
    assert set(model.peft_config) == {"default", "ref"} and model.active_adapter == "default"
    own, ref = (dict(_named(model, a)) for a in ("default", "ref"))
    assert own.keys() == ref.keys() and len(own) > 10 and all(torch.equal(own[k], ref[k]) for k in own)
    reference_is(trainer, plain)
    before = {n: p.clone() for n, p in ref.items()}
    trainer.train()
    assert all(torch.equal(p, before[n]) for n, p in _named(model, "ref"))
    assert all(not torch.equal(p, before[n]) for n, p in _named(model, "default"))
    reference_is(trainer, plain)
    with use_adapter(model, "ref"):
        assert model.active_adapter == "ref"
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if ".default." in n
    }
    trainer.save_model(str(tmp_path / "saved"))
    x = ids(tokenizer)
    again = PeftModel.from_pretrained(load(bases), tmp_path / "saved")
    assert torch.equal(logits(again, x), logits(model, x))
    assert torch.equal(
        logits(PeftModel.from_pretrained(load(bases), tmp_path / "saved" / "ref"), x),
        _under(model, "ref", x),
    )


def _named(model: nn.Module, adapter: str) -> list[tuple[str, Tensor]]:
    return [(n.replace(f".{adapter}.", ".*."), p) for n, p in model.named_parameters() if f".{adapter}." in n]


def _under(model: Any, adapter: str, x: Tensor) -> Tensor:
    with use_adapter(model, adapter):
        return logits(model, x)


def test_dpo_with_precomputed_reference(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """The columns that TRL stores hold the base model's log-probabilities."""
    trainer = preferences(
        trl.DPOTrainer,
        trl.DPOConfig,
        load(bases),
        tokenizer,
        tmp_path,
        lora(),
        precompute_ref_log_probs=True,
        max_steps=1,
    )
    with torch.no_grad():
        for n, p in trainer.model.named_parameters():
            if n.endswith("lora_B_weight"):
                p.add_(0.1)  # an effect that the reference must not show
    trainer.train()
    batch = next(iter(trainer.get_train_dataloader()))
    own = log_probs(load(bases), batch["input_ids"], batch["attention_mask"]) * batch["completion_mask"][:, 1:]
    found = torch.cat([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])
    torch.testing.assert_close(found, own.sum(1), atol=1e-4, rtol=0)


def test_kto(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    labelled = datasets.Dataset.from_dict(
        {
            "prompt": PAIRS["prompt"],
            "completion": [PAIRS["chosen"][0], PAIRS["rejected"][1], PAIRS["chosen"][2], PAIRS["rejected"][3]],
            "label": [True, False, True, False],
        }
    )
    args = settings(trl.KTOConfig, tmp_path, max_steps=2, per_device_train_batch_size=4)
    trainer = trl.KTOTrainer(
        load(bases), args=args, train_dataset=labelled, processing_class=tokenizer, peft_config=lora()
    )
    assert trainer.ref_model is None
    train(trainer, load(bases))
    first = trainer.state.log_history[0]
    assert first["kl"] == pytest.approx(0, abs=1e-5) and first["loss"] == pytest.approx(0.5, abs=1e-3)


# -- reward models ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("which", ["lora", "dora", "krona", "prompt"])
def test_reward(which: str, bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """The new head trains along and is saved, and a plain model with another head gets it back."""
    config = {
        "lora": lambda: lora(task_type="SEQ_CLS"),
        "dora": lambda: lora(task_type="SEQ_CLS", use_dora=True),
        "krona": lambda: peft.KronAConfig(task_type="SEQ_CLS", target_modules=["q_proj"]),
        "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3),
    }[which]()
    torch.manual_seed(4)
    base = load(bases, cls=LlamaForSequenceClassification, num_labels=1)
    pairs = datasets.Dataset.from_dict(
        {k: [p + c for p, c in zip(PAIRS["prompt"], PAIRS[k], strict=True)] for k in ("chosen", "rejected")}
    )
    trainer = trl.RewardTrainer(
        copy.deepcopy(base),
        args=settings(trl.RewardConfig, tmp_path, max_steps=3),
        train_dataset=pairs,
        processing_class=tokenizer,
        peft_config=config,
    )
    assert any("score" in n for n, p in trainer.model.named_parameters() if p.requires_grad)
    train(trainer, base)
    trainer.save_model(str(tmp_path / "saved"))
    x = ids(tokenizer)
    torch.manual_seed(77)
    other = load(bases, cls=LlamaForSequenceClassification, num_labels=1)
    assert not torch.equal(other.score.weight, base.score.weight)
    other.config.pad_token_id = base.config.pad_token_id = tokenizer.pad_token_id
    again = PeftModel.from_pretrained(other, tmp_path / "saved")
    assert torch.equal(logits(again, x), logits(trainer.model, x))
    assert (logits(trainer.model, x) - logits(base, x)).abs().max() > 1e-3


# -- online trainers ------------------------------------------------------------------------------------------------------------
def watched(cls: Any) -> Any:
    """The trainer class, keeping each batch that it generated and scored."""

    class Watched(cls):  # type: ignore[misc]
        def _generate_and_score_completions(self, inputs: Any) -> Any:
            out = super()._generate_and_score_completions(inputs)
            self.seen = [*getattr(self, "seen", ()), {k: v for k, v in out.items() if torch.is_tensor(v)}]
            return out

        def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            out = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
            tokens, mask, keep = args[:3]
            active = self.model.active_adapter if self.model.roster.mix.active else None
            entry = (active, tokens, mask, keep, out[0].detach())
            self.scored = [*getattr(self, "scored", ()), entry]
            return out

    Watched.__name__ = cls.__name__
    return Watched


def online(which: str, model: Any, tokenizer: Any, folder: Any, config: Any = None, **kwargs: Any) -> Any:
    cls, config_cls = {"grpo": (trl.GRPOTrainer, trl.GRPOConfig), "rloo": (trl.RLOOTrainer, trl.RLOOConfig)}[which]
    own = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1, "max_steps": 3, "temperature": 0.7, **kwargs}
    return watched(cls)(
        model,
        reward_funcs=words,
        args=settings(config_cls, folder, **own),
        train_dataset=PROMPTS,
        processing_class=copy.deepcopy(tokenizer),
        peft_config=config,
    )


def references(trainer: Any, active: str | None, reference: nn.Module, temperature: float = 0.7) -> list[float]:
    """The largest difference of each scored reference to the log-probabilities of a plain model."""
    found = []
    for name, tokens, mask, keep, got in trainer.scored:
        if name == active:
            own = log_probs(reference, tokens, mask, temperature)[:, -keep:]
            valid = mask[:, -keep:].bool()
            found.append(float((own - got)[valid].abs().max()))
    return found


ONLINE = [("grpo", h) for h in ("lora", "head", "bottleneck")] + [("rloo", h) for h in ("lora", "dora", "head")]


@pytest.mark.parametrize("which, how", ONLINE)
def test_online(which: str, how: str, bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """Generation, scoring and the update run on the adapter; the reference is the base, whatever was learnt."""
    torch.manual_seed(1)
    trainer = online(which, load(bases), tokenizer, tmp_path, method_config(how))
    assert trainer.ref_model is None
    train(trainer, load(bases))
    kl = [e["kl"] for e in trainer.state.log_history if "kl" in e]
    assert len(kl) == 3 and abs(kl[0]) < 1e-6 and abs(kl[-1]) > 1e-6
    differences = references(trainer, None, load(bases))
    assert len(differences) >= 3 and max(differences) < 1e-4
    last = [s for s in trainer.scored if s[0] == "default"][-1]
    own = log_probs(load(bases), last[1], last[2], 0.7)[:, -last[3] :]
    assert (own - last[4]).abs().max() > 1e-4  # the policy is another model by then
    trainer.save_model(str(tmp_path / "saved"))
    x = ids(tokenizer)
    again = PeftModel.from_pretrained(load(bases), tmp_path / "saved")
    assert torch.equal(logits(again, x), logits(trainer.model, x))


@pytest.mark.parametrize("which", ["grpo", "rloo"])
def test_online_from_a_trained_adapter(which: str, bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """The reference is the adapter as it came in, kept as `ref`."""
    start = get_peft_model(load(bases), lora())
    disturb(start)
    plain = copy.deepcopy(start).merge_and_unload()
    trainer = online(which, start, tokenizer, tmp_path)
    trainer.train()
    differences = references(trainer, "ref", plain)
    assert len(differences) >= 3 and max(differences) < 1e-4
    x = ids(tokenizer)
    torch.testing.assert_close(_under(trainer.model, "ref", x), logits(plain, x), atol=1e-5, rtol=0)
    assert (logits(trainer.model, x) - logits(plain, x)).abs().max() > 1e-4


# -- policy, reward and reference on one base --------------------------------------------------------------------------------------
class Value(nn.Module):
    """A language model's trunk with a score for each sequence beside its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.model
        self.lm_head = model.lm_head
        self.v_head = nn.Linear(model.config.hidden_size, 1, bias=False)
        self.config = model.config

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.model(input_ids=input_ids).last_hidden_state
        return self.lm_head(hidden), self.v_head(hidden[:, -1])[:, 0]


def test_policy_reward_and_reference_share_one_base(bases: Any, tokenizer: Any, tmp_path: Any) -> None:
    """One frozen base, two adapters, a head of the reward's own: each acts alone, trains alone and is saved alone."""
    torch.manual_seed(6)
    base = Value(load(bases)).eval()
    plain = copy.deepcopy(base)
    target = {"r": 4, "target_modules": ["q_proj", "v_proj"]}
    model = get_peft_model(base, LoraConfig(**target, seed=1), "policy")
    model.add_adapter("reward", LoraConfig(**target, modules_to_save=["v_head"], seed=2))
    x = ids(tokenizer, rows=4)
    good, bad = x[:2], x[2:]

    def step(adapter: str, loss: Any, rate: float) -> None:
        model.set_adapter(adapter)
        mine = list(model.adapter_parameters(adapter))
        assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in mine}
        optimizer = torch.optim.SGD(mine, lr=rate)
        for _ in range(3):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()

    step("reward", lambda: -nn.functional.logsigmoid(model(good)[1] - model(bad)[1]).mean(), 0.5)
    with torch.no_grad():
        reward = model(x)[1]
    head = [p for n, p in model.named_parameters() if "v_head" in n and ".reward." in n]
    assert len(head) == 1 and not torch.equal(head[0], plain.v_head.weight)

    def policy_loss() -> Tensor:
        """REINFORCE with a penalty for leaving the reference; reward and reference are the same modules, switched."""
        model.set_adapter("reward")
        with torch.no_grad():
            score = model(x)[1]
            with model.disable_adapter():
                reference = model(x)[0].log_softmax(-1)
        assert torch.equal(score, reward) and torch.equal(reference, plain(x)[0].log_softmax(-1))
        model.set_adapter("policy")
        own = model(x)[0].log_softmax(-1)
        chosen = own[:, :-1].gather(-1, x[:, 1:, None])[..., 0].sum(-1)
        kl = (own.exp() * (own - reference)).sum(-1).mean()
        return -(chosen * (score - score.mean())).mean() + 0.1 * kl

    step("policy", policy_loss, 0.5)
    with torch.no_grad():
        model.set_adapter("reward")
        assert torch.equal(model(x)[1], reward)  # the policy's training did not touch the reward model
        model.set_adapter("policy")
        policy = model(x)
        assert (policy[0] - plain(x)[0]).abs().max() > 1e-4
        with model.disable_adapter():
            assert all(torch.equal(a, b) for a, b in zip(model(x), plain(x), strict=True))
        rows = model(x, adapter_names=["policy", "reward", "__base__", "policy"])
        expected = (policy[0][0], None, plain(x)[0][2], policy[0][3])
        for row, value in zip(rows[0], expected, strict=True):
            assert value is None or torch.allclose(row, value, atol=1e-6)
        assert torch.allclose(rows[1][1], reward[1], atol=1e-6)
    model.save_pretrained(tmp_path)
    stored = {n: load_file(tmp_path / n / "adapter_model.safetensors") for n in ("policy", "reward")}
    assert [k for k in stored["reward"] if "v_head" in k] == ["base_model.model.v_head.weight"]
    assert not any("v_head" in k for k in stored["policy"]) and len(stored["policy"]) == 8
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "reward").eval()(x)[1], reward)
        assert torch.equal(PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path / "policy").eval()(x)[0], policy[0])


# -- against upstream, step by step ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def there(upstream_folder: Path, bases: Any, tokenizer: Any, tmp_path_factory: Any) -> Path:
    """The runs of `trl_runs`, made with huggingface/peft in a process of its own."""
    root = tmp_path_factory.mktemp("runs")
    tokenizer.save_pretrained(root / "tokenizer")
    load(bases).save_pretrained(root / "base")
    torch.manual_seed(4)
    load(bases, cls=LlamaForSequenceClassification, num_labels=1).save_pretrained(root / "reward")
    for name, (kind, cls, fields) in trl_runs.RUNS.items():
        reward = kind == "Reward"
        base = (LlamaForSequenceClassification if reward else LlamaForCausalLM).from_pretrained(
            root / ("reward" if reward else "base")
        )
        target = {} if "num_virtual_tokens" in fields else {"target_modules": ["q_proj", "v_proj"]}
        config = getattr(peft, cls)(task_type="SEQ_CLS" if reward else "CAUSAL_LM", **target, **fields)
        model = get_peft_model(base, config)
        disturb(model)
        model.save_pretrained(root / name)
    runs = Path(trl_runs.__file__)
    env = {**os.environ, "PYTHONPATH": str(upstream_folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, str(runs), str(root)], cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.slow
def test_the_same_steps_as_upstream(there: Path, tmp_path: Path) -> None:
    """From one saved adapter both libraries train alike: losses, gradient norms and the adapters that they save."""
    for name in trl_runs.RUNS:
        out, theirs = tmp_path / name, there / f"{name}-there"
        trl_runs.run(name, there, out)
        steps = [json.loads((p / "steps.json").read_text()) for p in (out, theirs)]
        for ours, other in zip(*steps, strict=True):
            assert ours["loss"] == pytest.approx(other["loss"], abs=1e-5), name
            assert ours["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4), name
        start, own, other = (load_file(p / "adapter_model.safetensors") for p in (there / name, out, theirs))
        assert own.keys() == other.keys() == start.keys(), name
        assert max(float((own[k] - other[k]).abs().max()) for k in own) < 1e-5, name
        assert any((own[k] - start[k]).abs().max() > 1e-3 for k in own), name
