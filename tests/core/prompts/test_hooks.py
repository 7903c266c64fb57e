"""Methods whose site is the whole model, by the registry: every prompt-form method's examples on every sort of model.

Golden outputs come from huggingface/peft (tests/golden/prompt/make.py). Every law first gives the adapter random values
and shows that it has an effect.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import io
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import LoraConfig, PeftModel, Refusal, get_peft_model, inject_adapter_in_model, registry

GOLDEN = Path(__file__).parent / "golden" / "prompt"
sys.path.insert(0, str(GOLDEN))
import make  # noqa: E402

sys.path.remove(str(GOLDEN))

METHODS = {name: m for name, m in registry.methods().items() if m.form == "prompt"}
EXAMPLES = [(name, i) for name, m in METHODS.items() for i in range(len(m.examples))]
CAUSAL = [m for m, (_, task) in make.MODELS.items() if task == "CAUSAL_LM"]
MODELS = ["llama_gqa", "gpt2", "opt", "t5", "bert_cls", "bert_tok", "bert_qa", "bert_feat"]
every_method = pytest.mark.parametrize(("method", "example"), EXAMPLES, ids=[f"{n}-{i}" for n, i in EXAMPLES])
on = pytest.mark.parametrize


def config(method: str, example: int, model: str, **more):
    cls = METHODS[method]
    return cls.config_class(**{"task_type": make.MODELS[model][1], "seed": 6, **cls.examples[example], **more})


def randomise(model: nn.Module, name: str, seed: int = 3) -> None:
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, m in model.roster.adapters[name].methods:
            for p in m.parameters():
                p.add_(torch.randn(p.shape, generator=rng).to(p) * 0.3)


def prompted(method: str, example: int, model: str = "llama_gqa", name: str = "default", **more) -> PeftModel:
    made = get_peft_model(make.build(model), config(method, example, model, **more), adapter_name=name).eval()
    randomise(made, name)
    return made


def arguments(model: str, loss: bool = True) -> dict:
    return {**make.inputs(model), **(make.labels(model) if loss or model == "t5" else {})}


@torch.no_grad()
def run(model: nn.Module, name: str, **more) -> torch.Tensor:
    return make.main_output(model(**arguments(name, loss=False), **more))


def loss_of(model: nn.Module, name: str) -> torch.Tensor:
    out = model(**arguments(name))
    found = getattr(out, "loss", None)
    return found if found is not None else make.main_output(out).square().mean()


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=tolerance, rtol=tolerance)


# -- the reference -----------------------------------------------------------------------------------------------------------
@on(("model", "case"), make.cases())
def test_upstream_adapters_give_upstream_results(model, case, tmp_path):
    with safe_open(GOLDEN / f"{model}.safetensors", "pt") as f:
        saved = f.metadata()[case]
        golden = {k.removeprefix(f"{case}/"): f.get_tensor(k) for k in f.keys() if k.startswith(f"{case}/")}  # noqa: SIM118
    (tmp_path / "adapter_config.json").write_text(saved)
    adapter = {k.removeprefix("adapter/"): golden.pop(k) for k in list(golden) if k.startswith("adapter/")}
    save_file(adapter, tmp_path / "adapter_model.safetensors")
    loaded = PeftModel.from_pretrained(make.build(model), tmp_path).eval()
    found = make.outputs(loaded, model, make.METHODS[case][2])
    assert set(golden) <= set(found)
    for name, expected in golden.items():
        assert close(found[name].float(), expected.float()), name
    state = peft.get_peft_model_state_dict(loaded)
    heads = {k for k in state if k.startswith("base_model.")}
    assert set(state) == set(adapter)
    assert all(torch.equal(state[k], adapter[k]) for k in set(state) - heads)
    known = {f.name for f in dataclasses.fields(loaded.peft_config["default"]) if not f.metadata.get("own")}
    assert known == set(json.loads(saved))


# -- laws ----------------------------------------------------------------------------------------------------------------------
@every_method
@on("model", MODELS)
def test_it_acts_and_only_its_parameters_train(method, example, model):
    base = run(make.build(model), model)
    made = prompted(method, example, model).train()
    for m in made.modules():
        if isinstance(m, nn.Dropout):
            m.p = 0.0
    out = run(made, model)
    assert not torch.equal(out[:, -base.shape[1] :] if out.dim() == 3 else out, base)
    own = {n for n, p in made.named_parameters() if p.requires_grad}
    assert any("prompt_encoder.default." in n for n in own)
    assert all("prompt_encoder.default." in n or ".classifier." in n or ".qa_outputs." in n for n in own)
    loss_of(made, model).backward()
    assert set(gradients(made)) == own


@every_method
@on("model", ["llama_gqa", "t5", "bert_cls"])
def test_save_load_and_train_on(method, example, model, tmp_path):
    made = prompted(method, example, model)
    out = run(made, model)
    made.save_pretrained(tmp_path)
    assert torch.equal(run(PeftModel.from_pretrained(make.build(model), tmp_path).eval(), model), out)
    again = PeftModel.from_pretrained(make.build(model), tmp_path, is_trainable=True).eval()
    assert torch.equal(run(again, model), out)
    for m in (made, again):
        loss_of(m, model).backward()
    first, second = gradients(made), gradients(again)
    assert first and first.keys() == second.keys()
    assert all(torch.equal(first[n], second[n]) for n in first)


@on(("method", "case"), [("P_TUNING", "p_mlp"), ("P_TUNING", "p_lstm"), ("PREFIX_TUNING", "prefix_proj")])
def test_a_file_without_the_network_trains_as_a_table(method, case, tmp_path):
    _, fields, _ = make.METHODS[case]
    made = get_peft_model(
        make.build("llama_gqa"),
        METHODS[method].config_class(task_type="CAUSAL_LM", num_virtual_tokens=3, save_encoder=False, **fields),
    ).eval()
    made.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}
    again = PeftModel.from_pretrained(make.build("llama_gqa"), tmp_path, is_trainable=True).eval()
    assert close(run(again, "llama_gqa"), run(made, "llama_gqa"))
    loss = loss_of(again, "llama_gqa")
    loss.backward()
    trained = [p for p in again.parameters() if p.requires_grad]
    assert len(trained) == 1 and trained[0].grad.abs().sum() > 0
    with torch.no_grad():
        trained[0] -= 0.1 * trained[0].grad
    assert loss_of(again, "llama_gqa") < loss


@every_method
@on("model", MODELS)
def test_disable_delete_and_unload_give_back_the_base(method, example, model):
    fresh = make.build(model)
    base, names = run(fresh, model), [n for n, _ in fresh.named_parameters()]
    made = prompted(method, example, model)
    out = run(made, model)
    grads = [p.requires_grad for p in made.parameters()]
    with made.disable_adapter():
        assert torch.equal(run(made, model), base)
    assert [p.requires_grad for p in made.parameters()] == grads
    assert torch.equal(run(made, model), out)
    made.add_adapter("other", config(method, example, model))
    made.delete_adapter("default")
    assert not torch.equal(run(made, model), out)
    made.delete_adapter("other")
    assert torch.equal(run(made, model), base)
    back = prompted(method, example, model).unload()
    assert torch.equal(run(back, model), base)
    assert [n for n, _ in back.named_parameters()] == names
    hooks = [h for m in back.modules() for h in (*m._forward_pre_hooks.values(), *m._forward_hooks.values())]
    assert not any("peft" in type(getattr(h, "__self__", h)).__module__ for h in hooks)


@every_method
def test_merging_is_refused_with_a_reason(method, example):
    made = prompted(method, example)
    with pytest.raises(Refusal):
        made.merge_and_unload()
    assert made.roster.adapters


@every_method
@on("model", ["llama_gqa", "gemma2", "gpt2", "t5", "bert_tok"])
@on(("reentrant", "later"), [(False, False), (True, True), (False, True)])
def test_checkpointing_gives_the_same_gradients(method, example, model, reentrant, later):
    def trained(checkpoint: bool) -> dict[str, torch.Tensor]:
        base = make.build(model)
        for m in base.modules():
            if isinstance(m, nn.Dropout):
                m.p = 0.0
            for name in ("attention_dropout", "dropout"):
                if isinstance(getattr(m, name, None), float):
                    setattr(m, name, 0.0)
        how = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        if checkpoint and not later:
            base.gradient_checkpointing_enable(**how)
        made = get_peft_model(base, config(method, example, model)).train()
        randomise(made, "default")
        if checkpoint and later:
            made.gradient_checkpointing_enable(**how)
        loss_of(made, model).backward()
        return gradients(made)

    plain, again = trained(False), trained(True)
    assert plain and plain.keys() == again.keys()
    assert any(g.abs().sum() > 0 for g in plain.values())
    for n in plain:
        assert torch.allclose(plain[n], again[n], atol=1e-6, rtol=1e-5), n


# -- several adapters ----------------------------------------------------------------------------------------------------------
def crowd(model: str) -> PeftModel:
    """Adapters of every prompt method with different numbers of tokens, and a LoRA."""
    made = None
    for i, (method, example) in enumerate(EXAMPLES):
        settings = config(method, example, model, num_virtual_tokens=1 + i % 4)
        if made is None:
            made = get_peft_model(make.build(model), settings, adapter_name="0")
        else:
            made.add_adapter(str(i), settings)
        randomise(made, str(i), 10 + i)
    made.add_adapter("lora", LoraConfig(task_type=settings.task_type, r=2, seed=6, target_modules="all-linear"))
    randomise(made, "lora", 5)
    return made.eval()


def batches(made: PeftModel, model: str) -> list[list[str]]:
    """Names that may share a batch: all of them, but for two refusals that have their own tests below."""
    names = list(made.roster.adapters)
    acting = {n: made.roster.adapters[n].methods[0][1] for n in names if made.peft_config[n].is_prompt_learning}
    if model == "gemma2":
        prefixes = [n for n, m in acting.items() if m.keyed]
        return [[*prefixes, "lora", "__base__"], [n for n in [*names, "__base__"] if n not in prefixes]]
    if model == "t5":
        names = [n for n in names if n not in acting or not acting[n].prompts_decoder]
    return [[*names, "__base__"]]


@on("model", [*CAUSAL, "t5", "bert_cls", "bert_tok"])
@on("masked", [True, False])
def test_rows_of_a_batch_are_independent(model, masked):
    made = crowd(model)
    given = make.inputs(model)
    more = {"labels": given["input_ids"][:1, :4].clip(1)} if model == "t5" else {}

    def pick(index: list[int]) -> dict:
        kept = {k: v[index] for k, v in given.items() if masked or k != "attention_mask"}
        return {**kept, **{k: v.repeat(len(index), 1) for k, v in more.items()}}

    for names in batches(made, model):
        rows = [i % 2 for i in range(len(names))]
        with torch.no_grad():
            mixed = make.main_output(made(**pick(rows), adapter_names=names))
            for i, name in enumerate(names):
                if name != "__base__":
                    made.set_adapter(name)
                with made.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                    alone = make.main_output(made(**pick([rows[i]])))[0]
                first = slice(None, len(alone)) if model.startswith("bert") else slice(-len(alone), None)
                own = mixed[i][first] if alone.dim() > 1 else mixed[i]
                if masked and alone.dim() > 1 and model != "t5":  # what padding gives depends on the padding's width
                    real = nn.functional.pad(given["attention_mask"][rows[i]], (len(alone) - 6, 0), value=1).bool()
                    own, alone = own[real], alone[real]
                assert close(own, alone, 2e-5), name


@on("model", [*CAUSAL, "t5"])
@on("beams", [1, 2])
def test_rows_generate_independently(model, beams):
    made = crowd(model)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    for names in batches(made, model):
        if model == "t5":  # a LoRA in the encoder sees the rows before the beams are made
            names = [n for n in names if n != "lora"]
        given = {k: v[[i % 2 for i in range(len(names))]] for k, v in make.inputs(model).items()}
        mixed = made.generate(**given, **how, adapter_names=names)
        for i, name in enumerate(names):
            if name != "__base__":
                made.set_adapter(name)
            with made.disable_adapter() if name == "__base__" else contextlib.nullcontext():
                alone = made.generate(**{k: v[i : i + 1] for k, v in given.items()}, **how)
            assert torch.equal(mixed[i], alone[0]), name


def test_rows_train_their_own_adapters():
    """The gradients of a mixed batch are those of each row alone."""
    made = crowd("llama_gqa")
    names = ["0", "6", "lora", "4"]
    made.set_requires_grad(names, True)
    given = {k: v.repeat(2, 1) for k, v in make.inputs("llama_gqa").items()}

    def score(logits: torch.Tensor) -> torch.Tensor:
        return logits[:, -1].square().sum()

    score(made(**given, adapter_names=names).logits).backward()
    together = gradients(made)
    made.zero_grad()
    for i, name in enumerate(names):
        score(made(**{k: v[i : i + 1] for k, v in given.items()}, adapter_names=[name]).logits).backward()
    apart = gradients(made)
    assert together.keys() == apart.keys()
    for n in apart:
        assert torch.allclose(together[n], apart[n], atol=1e-4, rtol=1e-4), n


def test_a_window_refuses_prefixes_beside_prompts():
    made = crowd("gemma2")
    prefix = next(n for n in made.roster.adapters if n != "lora" and made.roster.adapters[n].methods[0][1].keyed)
    with pytest.raises(Refusal, match="window"):
        made(**arguments("gemma2"), adapter_names=["0", prefix])


def test_decoder_rows_of_different_length_are_refused():
    made = crowd("t5")
    multitask = next(n for n, a in made.roster.adapters.items() if getattr(a.methods[0][1], "prompts_decoder", False))
    with pytest.raises(Refusal, match="before the decoder"):
        made(**arguments("t5"), adapter_names=[multitask, "0"])


@every_method
def test_it_acts_together_with_lora(method, example):
    name = "llama_gqa"
    made = prompted(method, example, name)
    alone = run(made, name)
    made.add_adapter("lora", LoraConfig(task_type="CAUSAL_LM", r=2, seed=6, target_modules="all-linear"))
    randomise(made, "lora", 5)
    made.set_adapter(["default", "lora"])
    both = run(made, name)
    lora = get_peft_model(
        make.build(name), LoraConfig(task_type="CAUSAL_LM", r=2, seed=6, target_modules="all-linear"), "lora"
    )
    randomise(lora, "lora", 5)
    merged = get_peft_model(lora.merge_and_unload(), config(method, example, name)).eval()
    randomise(merged, "default")
    assert not torch.equal(both, alone)
    assert close(both, run(merged, name), 2e-5)
    loss_of(made, name).backward()
    assert {n for n, p in made.named_parameters() if p.requires_grad} == set(gradients(made))


@every_method
def test_two_active_prompts_stand_side_by_side(method, example):
    """Two of n tokens act like one of 2n that holds both."""
    made = (
        prompted(method, example, save_encoder=False)
        if example and "save_encoder" in dir(METHODS[method].config_class)
        else prompted(method, example)
    )
    made.add_adapter("b", config(method, example, "llama_gqa"))
    randomise(made, "b", 8)
    made.set_adapter(["default", "b"])
    both = run(made, "llama_gqa")
    one = prompted(method, example, num_virtual_tokens=2 * made.peft_config["b"].num_virtual_tokens)
    parts = [made.roster.adapters[n].methods[0][1] for n in ("default", "b")]
    joint = one.roster.adapters["default"].methods[0][1]
    with torch.no_grad():
        if joint.inputs:
            rows = torch.cat([p.prompt(None).reshape(-1, make.D) for p in parts])
            joint.prompt = lambda tasks: rows
        else:
            pairs = {i: [torch.cat([p.keys_values(i)[k] for p in parts], 1) for k in (0, 1)] for i in (0, 1)}
            joint.keys_values = lambda layer: pairs[layer]
    assert close(run(one, "llama_gqa"), both)


@every_method
def test_switching_is_isolated(method, example):
    made = prompted(method, example)
    first = run(made, "llama_gqa")
    made.add_adapter("b", config(method, example, "llama_gqa", num_virtual_tokens=4))
    randomise(made, "b", 8)
    made.set_adapter("b")
    assert not torch.equal(run(made, "llama_gqa")[:, -6:], first[:, -6:])
    made.set_adapter("default")
    assert torch.equal(run(made, "llama_gqa"), first)


# -- generation ------------------------------------------------------------------------------------------------------------------
@every_method
@on("model", ["llama_gqa", "gemma2", "opt"])
def test_cached_decoding_equals_a_forward_over_everything(method, example, model):
    made = prompted(method, example, model)
    ids = torch.randint(1, make.VOCAB, (2, 5), generator=torch.Generator().manual_seed(1))
    made_ids = made.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    for _ in range(4):
        with torch.no_grad():
            ids = torch.cat([ids, made(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)[:, None]], 1)
    assert torch.equal(made_ids, ids)


@every_method
@on("model", ["llama_gqa", "gpt2"])
def test_a_cache_of_fixed_size_generates_the_same(method, example, model):
    made = prompted(method, example, model)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "disable_compile": True}
    expected = made.generate(**make.inputs(model), **how)
    assert torch.equal(made.generate(**make.inputs(model), **how, cache_implementation="static"), expected)


def test_beams_of_a_task_keep_their_task():
    made = prompted("MULTITASK_PROMPT_TUNING", 0, num_tasks=3, num_ranks=2)
    how = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    given = make.inputs("llama_gqa")
    both = made.generate(**given, **how, task_ids=torch.tensor([2, 0]))
    for i, task in enumerate((2, 0)):
        alone = made.generate(**{k: v[i : i + 1] for k, v in given.items()}, **how, task_ids=torch.tensor([task]))
        assert torch.equal(both[i], alone[0])
    with pytest.raises(ValueError, match="task_ids cannot be None"):
        made(**given)


# -- heads -------------------------------------------------------------------------------------------------------------------------
@every_method
def test_token_labels_count_on_real_tokens_only(method, example):
    made = prompted(method, example, "bert_tok")
    with torch.no_grad():
        out = made(**arguments("bert_tok"))
    labels = make.labels("bert_tok")["labels"]
    expected = nn.functional.cross_entropy(out.logits[:, -6:].reshape(-1, 3), labels.reshape(-1))
    assert close(out.loss, expected)


@every_method
def test_a_classifier_reads_the_last_real_token(method, example):
    """Padding on the right: upstream's prompts read the padding's output there."""
    base = tf.LlamaForSequenceClassification(
        tf.LlamaConfig(**{**make.LLAMA, **make.NONE}, num_key_value_heads=2, num_labels=3)
    ).eval()
    made = get_peft_model(base, config(method, example, "bert_cls")).eval()
    randomise(made, "default")
    ids = torch.tensor([[5, 6, 7, 0, 0]])
    with torch.no_grad():
        padded = made(input_ids=ids, attention_mask=(ids != 0).long()).logits
        assert close(padded, made(input_ids=ids[:, :3]).logits)


@every_method
def test_the_token_stack_alone_is_prompted(method, example):
    made = prompted(method, example)
    inner = made.get_base_model().model
    given = make.inputs("llama_gqa")
    with torch.no_grad():
        hidden = inner(**given).last_hidden_state
        assert close(made.get_base_model().lm_head(hidden), made(**given).logits)
        embeds = inner.embed_tokens(given["input_ids"])
        assert close(made(inputs_embeds=embeds, attention_mask=given["attention_mask"]).logits, made(**given).logits)


# -- life ----------------------------------------------------------------------------------------------------------------------------
@every_method
@on("model", ["llama_gqa", "t5", "bert_cls"])
def test_deepcopy_and_pickle(method, example, model):
    made = prompted(method, example, model)
    out = run(made, model)
    twin = copy.deepcopy(made)
    assert torch.equal(run(twin, model), out)
    randomise(twin, "default", 9)
    assert not torch.equal(run(twin, model), out)
    assert torch.equal(run(made, model), out)
    file = io.BytesIO()
    torch.save(made, file)
    file.seek(0)
    assert torch.equal(run(torch.load(file, weights_only=False), model), out)


@on(("method", "example"), [e for e in EXAMPLES if e[1] == 1])
@on("model", ["llama_gqa", "bert_cls"])
def test_compiles_in_one_graph(method, example, model):
    made = prompted(method, example, model)
    whole = not any(isinstance(m, nn.LSTM) for m in made.modules())  # torch's compiler takes no LSTM
    torch._dynamo.reset()
    compiled = torch.compile(made, fullgraph=whole, backend="eager")
    given = make.inputs(model)
    with torch.no_grad():
        assert close(compiled(**given).logits, made(**given).logits)


@every_method
def test_half_precision_bases_get_fp32_masters(method, example):
    base = make.build("llama_gqa").to(torch.bfloat16)
    made = get_peft_model(base, config(method, example, "llama_gqa")).eval()
    assert {p.dtype for p in made.adapter_parameters("default")} == {torch.float32}
    assert run(made, "llama_gqa").dtype == torch.bfloat16


@every_method
def test_it_is_injectable(method, example):
    settings = config(method, example, "llama_gqa")
    model = inject_adapter_in_model(settings, make.build("llama_gqa"))
    wrapped = get_peft_model(make.build("llama_gqa"), settings).eval()
    state = peft.get_peft_model_state_dict(wrapped)
    peft.set_peft_model_state_dict(model, state)
    assert torch.equal(run(model, "llama_gqa"), run(wrapped, "llama_gqa"))
    assert any("prompt_encoder.default." in n for n, p in model.named_parameters() if p.requires_grad)


@every_method
def test_names_are_free_and_upstream_functions_answer(method, example):
    made = prompted(method, example, name="train.v1")
    assert made.prompt_encoder is made.get_base_model().prompt_encoder
    saved = made.get_prompt_embedding_to_save("train.v1")
    assert torch.equal(saved, peft.get_peft_model_state_dict(made, adapter_name="train.v1")["prompt_embeddings"])
    got = made.get_prompt(2)
    n = made.peft_config["train.v1"].num_virtual_tokens
    assert got.shape == (2, n, make.D) if torch.is_tensor(got) else got.get_seq_length() == n
    assert "task_ids" in made.special_peft_forward_args
    assert made.word_embeddings is made.get_base_model().get_input_embeddings()


@every_method
def test_transformers_own_adapter_functions(method, example, monkeypatch):
    from transformers.integrations import peft as integration

    monkeypatch.setattr(integration, "check_peft_version", lambda **_: None)  # it asks for an installed package
    model = make.build("llama_gqa")
    base = run(model, "llama_gqa")
    model.add_adapter(config(method, example, "llama_gqa"), adapter_name="a")
    assert model.active_adapters() == ["a"]
    out = run(model.eval(), "llama_gqa")
    assert not torch.equal(out[:, -6:], base)
    model.disable_adapters()
    assert torch.equal(run(model, "llama_gqa"), base)
    model.enable_adapters()
    assert torch.equal(run(model, "llama_gqa"), out)


def test_a_seed_decides_the_start_and_nothing_else_does():
    def start(draws: int) -> torch.Tensor:
        torch.rand(draws)
        settings = config("P_TUNING", 1, "llama_gqa", seed=4)
        return get_peft_model(make.build("llama_gqa"), settings).get_prompt_embedding_to_save("default")

    assert torch.equal(start(1), start(5))


# -- where prompts start ---------------------------------------------------------------------------------------------------------------
def test_vocabulary_and_text_starts_are_rows_of_the_embedding(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(make.VOCAB)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(tmp_path)
    base = make.build("llama_gqa")
    table = base.get_input_embeddings().weight.detach()

    def start(**more) -> torch.Tensor:
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5, **more)
        return get_peft_model(make.build("llama_gqa"), settings).get_prompt_embedding_to_save("default")

    text = {"prompt_tuning_init_text": "w3 w9", "tokenizer_name_or_path": str(tmp_path)}
    assert torch.equal(start(prompt_tuning_init="TEXT", **text), table[[3, 9, 3, 9, 3]])
    rows = start(prompt_tuning_init="SAMPLE_VOCAB")
    assert all((row == table).all(1).any() for row in rows)


def test_source_tasks_start_a_target_task(tmp_path):
    shape = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "num_ranks": 2}
    source = get_peft_model(make.build("llama_gqa"), peft.MultitaskPromptTuningConfig(num_tasks=3, **shape))
    source.save_pretrained(tmp_path)
    held = load_file(tmp_path / "adapter_model.safetensors")
    path = str(tmp_path / "adapter_model.safetensors")

    def start(how: str, **more) -> dict[str, torch.Tensor]:
        more = {"prompt_tuning_init_state_dict_path": path, **more}
        settings = peft.MultitaskPromptTuningConfig(num_tasks=1, prompt_tuning_init=how, **shape, **more)
        return peft.get_peft_model_state_dict(get_peft_model(make.build("llama_gqa"), settings))

    for how, expected in (
        ("AVERAGE_SOURCE_TASKS", held["prefix_task_cols"].mean(0, keepdim=True)),
        ("EXACT_SOURCE_TASK", held["prefix_task_cols"][1:2]),
    ):
        found = start(how, prompt_tuning_init_task=1)
        assert torch.equal(found["prefix_task_cols"], expected)
        assert torch.equal(found["prompt_embeddings"], held["prompt_embeddings"])
    shared = start("ONLY_SOURCE_SHARED")
    assert torch.equal(shared["prompt_embeddings"], held["prompt_embeddings"])
    assert not torch.equal(shared["prefix_task_cols"][0], held["prefix_task_cols"][0])
    with pytest.raises(ValueError, match="needs to be specified"):
        start("EXACT_SOURCE_TASK", prompt_tuning_init_state_dict_path=None)


@on("projection", [False, True])
def test_zero_prefixes_are_keys_and_values_of_zero(projection):
    made = get_peft_model(
        make.build("llama_gqa"),
        peft.PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, init_weights="zero", prefix_projection=projection
        ),
    )
    assert not made.get_prompt_embedding_to_save("default").any()


# -- bad input -----------------------------------------------------------------------------------------------------------------------
@every_method
def test_models_without_token_embeddings_are_refused(method, example):
    base = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(Refusal, match="token embeddings"):
        get_peft_model(base, METHODS[method].config_class(num_virtual_tokens=2))
    assert not hasattr(base, "prompt_encoder")


def test_attention_that_takes_no_cache_refuses_prefixes():
    base = tf.DistilBertModel(tf.DistilBertConfig(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24))
    with pytest.raises(Refusal, match="no way in"):
        get_peft_model(base, peft.PrefixTuningConfig(num_virtual_tokens=2))


@every_method
def test_the_wrong_base_is_named(method, example, tmp_path):
    prompted(method, example).save_pretrained(tmp_path)
    other = tf.LlamaForCausalLM(tf.LlamaConfig(**{**make.LLAMA, "hidden_size": 32}, num_key_value_heads=1))
    with pytest.raises((ValueError, RuntimeError), match=r"token_dim|num_attention_heads|size mismatch"):
        PeftModel.from_pretrained(other, tmp_path)
    assert not hasattr(other, "prompt_encoder")


@every_method
def test_packed_texts_and_shaped_masks_are_refused(method, example):
    made = prompted(method, example)
    ids = make.inputs("llama_gqa")["input_ids"]
    with pytest.raises(ValueError, match="packed"):
        made(input_ids=ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]] * 2))
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match="mask"):
        made(input_ids=ids, attention_mask=mask)


@on(
    ("name", "fields", "message"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 0}, "num_virtual_tokens"),
        ("PromptTuningConfig", {"prompt_tuning_init": "GUESS"}, "RANDOM"),
        ("PromptTuningConfig", {"prompt_tuning_init": "TEXT"}, "tokenizer_name_or_path"),
        ("PromptTuningConfig", {"tokenizer_kwargs": {"a": 1}}, "tokenizer_kwargs"),
        ("PrefixTuningConfig", {"init_weights": "one"}, "init_weights"),
        ("PromptEncoderConfig", {"encoder_reparameterization_type": "GRU"}, "MLP, LSTM"),
        ("PromptEncoderConfig", {"encoder_dropout": 1.0}, "encoder_dropout"),
        ("MultitaskPromptTuningConfig", {"num_ranks": 0}, "num_ranks"),
    ],
)
def test_bad_configs_say_what_is_wrong(name, fields, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(make.build("llama_gqa"), getattr(peft, name)(**{"num_virtual_tokens": 2, **fields}))
