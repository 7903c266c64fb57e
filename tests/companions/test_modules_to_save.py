"""Methods that train some of the model's own parameters: copies, biases, masks, differences, token rows."""

from __future__ import annotations

import copy
import io
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from peft import (
    BitFitConfig,
    DiffPruningConfig,
    FishMaskConfig,
    LNTuningConfig,
    LoraConfig,
    NoMatchingPeftModuleError,
    PeftModel,
    Refusal,
    TrainableTokensConfig,
    compute_fish_mask,
    get_peft_model,
    prune_diff,
)

GOLDEN = Path(__file__).parent / "golden" / "selective"
IDS = torch.tensor([[1, 3, 17, 9, 2, 5, 30, 1], [9, 9, 3, 4, 6, 5, 2, 0]])


def llama(tied=False, vocab=40, state=None, bias=True):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        attention_bias=bias,
        tie_word_embeddings=tied,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config).eval()
    if state is not None:
        model.load_state_dict({k: v for k, v in state.items() if not (tied and k == "lm_head.weight")}, strict=not tied)
    return model


def shake(model, name="default", by=0.3, seed=1):
    torch.manual_seed(seed)
    for p in model.adapter_parameters(name):
        p.data += by * torch.randn_like(p)
    return model


def bits(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


def same(module, before):
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


def train(model, loss, steps=3, rate=0.1):
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    for _ in range(steps):
        optimiser.zero_grad()
        loss(model).backward()
        optimiser.step()


# -- against upstream's files -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", sorted(p.name for p in GOLDEN.iterdir() if p.is_dir()))
def test_adapters_of_upstream_give_upstreams_logits(case, tmp_path):
    state = load_file(GOLDEN / "base.safetensors")
    model = llama(tied=case.endswith("_tied"), state=state)
    peft_model = PeftModel.from_pretrained(model, GOLDEN / case).eval()
    expected = load_file(GOLDEN / case / "expected.safetensors")["logits"]
    with torch.no_grad():
        torch.testing.assert_close(peft_model(IDS).logits, expected, rtol=0, atol=1e-5)
        peft_model.save_pretrained(tmp_path)
        ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, GOLDEN / case))
        both_ends = {k for k in theirs if k.endswith("lm_head.trainable_tokens_delta")}  # the same rows a second time
        assert ours.keys() == theirs.keys() - both_ends
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        torch.testing.assert_close(peft_model.merge_and_unload()(IDS).logits, expected, rtol=0, atol=1e-5)


# -- whole modules ----------------------------------------------------------------------------------------------------------
class Classifier(nn.Module):
    """A trunk and a head that has parts, running statistics, and a weight that is read without a call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
        self.last = nn.Linear(3, 3, bias=False)

    def forward(self, x):
        return nn.functional.linear(self.head(torch.relu(self.trunk(x))), self.last.weight)


def with_head(**more):
    return LoraConfig(r=2, target_modules=["trunk"], modules_to_save=["head", "last"], **more)


def test_saved_modules_train_as_copies_and_the_base_never_changes(tmp_path):
    base = Classifier()
    x, before = torch.randn(12, 8), bits(base)
    expected = copy.deepcopy(base).eval()(x)
    model = get_peft_model(base, with_head())
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model.train(), lambda m: (m(x) - 1).square().mean())
    assert all(not torch.equal(p, start[n]) for n, p in model.named_parameters() if n in start and "lora_A" not in n)
    with model.disable_adapter():
        torch.testing.assert_close(model.eval()(x), expected, rtol=0, atol=0)
    assert same(copy.deepcopy(model).base_model.unload(), before)
    statistics = model.base_model.model.head.modules_to_save["default"]._modules["1"].running_mean
    assert not torch.equal(statistics, before["head.1.running_mean"])
    model.save_pretrained(tmp_path)
    keys = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert {k.removeprefix("base_model.model.") for k in keys if "lora" not in k} == {
        k for k in before if k.startswith(("head.", "last."))
    }
    with torch.no_grad():
        again = PeftModel.from_pretrained(Classifier(), tmp_path).eval()
        assert torch.equal(again(x), model(x))
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(x), again(x))
        assert type(merged.head) is nn.Sequential and torch.equal(merged.head[1].running_mean, statistics)


def test_two_adapters_have_their_own_heads():
    model = shake(get_peft_model(Classifier().eval(), with_head()))
    model.add_adapter("other", with_head())
    x = torch.randn(4, 8)
    one = model(x)
    model.set_adapter("other")
    assert torch.equal(model(x), Classifier().eval()(x))
    train(model, lambda m: m(x).square().mean())
    other = model(x)
    model.set_adapter("default")
    assert torch.equal(model(x), one) and not torch.equal(other, one)


def test_saved_modules_look_like_upstreams_wrapper():
    model = shake(get_peft_model(Classifier().eval(), with_head()))
    last = model.base_model.model.last
    assert list(last.modules_to_save) == ["default"] and "default" in last.modules_to_save
    assert torch.equal(last.modules_to_save["default"].weight, last.weight)
    assert not torch.equal(last.original_module.weight, last.weight)
    with model.disable_adapter():
        assert torch.equal(last.original_module.weight, last.weight)


@pytest.mark.parametrize("first", ["inside", "whole"])
def test_a_saved_module_and_another_adapters_layer_inside_it(first, tmp_path):
    inside = LoraConfig(r=2, target_modules=["head.0"], seed=3)
    configs = {"inside": inside, "whole": with_head(seed=3)}
    second = next(n for n in configs if n != first)
    x = torch.randn(4, 8)
    alone = {}
    for name, config in configs.items():
        model = shake(get_peft_model(Classifier().eval(), copy.deepcopy(config), adapter_name=name), name)
        alone[name] = model(x).detach()
    model = shake(get_peft_model(Classifier().eval(), configs[first], adapter_name=first), first)
    model.add_adapter(second, configs[second])
    shake(model, second)
    with torch.no_grad():
        for name in configs:
            model.set_adapter(name)
            assert torch.equal(model(x), alone[name])
        model.save_pretrained(tmp_path)
        for name in configs:
            loaded = PeftModel.from_pretrained(Classifier().eval(), tmp_path / name).eval()
            assert torch.equal(loaded(x), alone[name])
        model.set_adapter(["inside", "whole"])
        both = model(x)
        assert not torch.equal(both, alone["whole"])
        assert torch.equal(model.base_model.unload()(x), Classifier().eval()(x))


def test_an_attention_module_can_be_saved_whole_and_adapted_by_another():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.attn = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = nn.Linear(8, 8)

        def forward(self, x):
            return self.out(self.attn(x, x, x, need_weights=False)[0])

    x = torch.randn(2, 3, 8)
    whole = LoraConfig(r=2, target_modules=["out"], modules_to_save=["attn"], seed=3)
    parts = LoraConfig(r=2, target_modules=["attn"], seed=3)
    for names in (("whole", "parts"), ("parts", "whole")):
        configs = {"whole": copy.deepcopy(whole), "parts": copy.deepcopy(parts)}
        model = shake(get_peft_model(Net().eval(), configs[names[0]], adapter_name=names[0]), names[0])
        model.add_adapter(names[1], configs[names[1]])
        shake(model, names[1])
        with torch.no_grad():
            for name in names:
                single = shake(get_peft_model(Net().eval(), copy.deepcopy(configs[name]), adapter_name=name), name)
                model.set_adapter(name)
                torch.testing.assert_close(model(x), single(x))
                assert not torch.allclose(model(x), Net().eval()(x))
            assert torch.equal(model.base_model.unload()(x), Net().eval()(x))


def test_layernorm_tuning_trains_the_norms_alone():
    model = get_peft_model(llama(), LNTuningConfig())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 5 * 16  # two norms in each of two layers and the last one
    before = bits(model.get_base_model())
    train(model, lambda m: m(IDS, labels=IDS).loss)
    after = model.get_base_model().state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items() if "ln_tuning" not in k)
    assert all(not torch.equal(after[k], v) for k, v in before.items() if "ln_tuning" in k)


# -- biases -----------------------------------------------------------------------------------------------------------------
def test_bitfit_trains_every_bias_and_only_biases():
    base = llama()
    expected = sum(p.numel() for n, p in base.named_parameters() if n.endswith("bias"))
    model = get_peft_model(base, BitFitConfig())
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected
    assert set(model.peft_config["default"].target_modules) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    with pytest.raises(NoMatchingPeftModuleError, match="no module of this model has one"):
        get_peft_model(llama(bias=False), BitFitConfig())
    with pytest.raises(Refusal, match="no bias that could be trained"):
        get_peft_model(llama(), BitFitConfig(target_modules=["down_proj"]))


@pytest.mark.parametrize(("bias", "trained"), [("none", 0), ("all", 2 * (16 + 8 + 8 + 16)), ("lora_only", 2 * 16)])
def test_the_bias_field_trains_copies_of_biases(bias, trained):
    base = llama()
    before, expected = bits(base), base(IDS).logits
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], bias=bias))
    extra = [p for n, p in model.named_parameters() if p.requires_grad and "bitfit" in n]
    assert sum(p.numel() for p in extra) == trained
    train(model, lambda m: m(IDS, labels=IDS).loss)
    with model.disable_adapter(), torch.no_grad():
        assert torch.equal(model(IDS).logits, expected)
    assert same(model.base_model.unload(), before)


# -- masks ------------------------------------------------------------------------------------------------------------------
def tiny():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3)).eval()


def test_the_fish_mask_takes_the_top_of_the_empirical_fisher(tmp_path):
    base, x, y = tiny(), torch.randn(7, 6), torch.randint(3, (7,))

    def loss(model, example):
        return nn.functional.cross_entropy(model(example[0]), example[1])

    fisher = {n: torch.zeros_like(p) for n, p in base.named_parameters()}
    for i in range(7):
        grads = torch.autograd.grad(loss(base, (x[i : i + 1], y[i : i + 1])), list(base.parameters()))
        for n, g in zip(fisher, grads, strict=True):
            fisher[n] += g**2
    total = sum(f.numel() for f in fisher.values())
    cut = torch.cat([f.flatten() for f in fisher.values()]).sort(descending=True).values[round(0.3 * total) - 1]
    wanted = {n: set((f.flatten() >= cut).nonzero().flatten().tolist()) for n, f in fisher.items()}
    count = sum(len(w) or 1 for w in wanted.values())
    wanted = {n: w or {int(fisher[n].argmax())} for n, w in wanted.items()}  # each tensor keeps its best entry
    assert round(0.3 * total) <= count <= round(0.3 * total) + 1
    before = bits(base)
    model = get_peft_model(base, FishMaskConfig(keep_ratio=0.3, target_modules=["0", "2"]))
    compute_fish_mask(model, [(x[:4], y[:4]), (x[4:], y[4:])], loss)
    found = {}
    for stem, m in model.roster.adapters["default"].methods:
        for n in m.replaced_names:
            values, indices = m.entries(n)
            found[f"{stem}.{n}"] = set(indices.tolist())
            assert torch.equal(values, before[f"{stem}.{n}"].flatten()[indices])
    assert found == wanted
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    train(model, lambda m: loss(m, (x, y)))
    out = model(x)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(t.numel() for k, t in tensors.items() if k.endswith(".values")) == count
    assert all(t.dtype == torch.int32 for k, t in tensors.items() if k.endswith(".indices"))
    assert torch.equal(PeftModel.from_pretrained(tiny(), tmp_path)(x), out)
    merged = model.merge_and_unload().state_dict()
    for n, old in before.items():
        changed = set((merged[n].flatten() != old.flatten()).nonzero().flatten().tolist())
        assert changed and changed <= wanted[n]


def test_a_fish_mask_before_data_is_a_seeded_random_choice_and_keep_ratio_is_checked():
    def chosen(seed):
        model = get_peft_model(tiny(), FishMaskConfig(keep_ratio=0.2, seed=seed, target_modules=["0", "2"]))
        return [m.entries("weight")[1].tolist() for _, m in model.roster.adapters["default"].methods]

    assert chosen(1) == chosen(1) != chosen(2)
    assert [len(c) for c in chosen(1)] == [6, 3]
    for ratio in (0, 1.5):
        with pytest.raises(ValueError, match="keep_ratio"):
            FishMaskConfig(keep_ratio=ratio)
    with pytest.raises(ValueError, match="no mask to compute"):
        compute_fish_mask(get_peft_model(llama(), LNTuningConfig()), [])


def test_diff_pruning_masks_are_hard_concrete_and_the_penalty_counts_them():
    config = DiffPruningConfig(target_modules=["0"], sparsity_penalty=0.01, alpha_init=0.3)
    model = get_peft_model(tiny(), config)
    (_, m), *_ = model.roster.adapters["default"].methods
    W = model.base_model.model[0].base_layer.weight
    m.diff_delta.weight.data.normal_()
    sigmoid = lambda t: 1 / (1 + math.exp(-t))  # noqa: E731
    z = min(1, max(0, sigmoid(0.3) * 3 - 1.5))
    model.eval()
    torch.testing.assert_close(m.replace("weight", W), W + z * z * m.diff_delta.weight)
    assert torch.equal(m.replace("weight", W), m.replace("weight", W))
    model.train()
    draws = torch.stack([m.mask(torch.full((2000,), 0.3)) for _ in range(5)])
    assert draws.min() == 0 and draws.max() == 1
    # s̄ > 0 exactly when ln u − ln(1 − u) > −α − ln(−r/l) = −0.3
    assert abs(float((draws > 0).float().mean()) - sigmoid(0.3)) < 0.02
    assert float(m.penalty().detach()) == pytest.approx(0.01 * 35 * sigmoid(0.3) ** 2)


def test_diff_pruning_keeps_the_largest_share_and_gets_small(tmp_path):
    x = torch.randn(7, 6)
    model = get_peft_model(tiny(), DiffPruningConfig(target_modules=["0", "2"], density=0.2, alpha_init=8.0))
    shake(model)
    methods = dict(model.roster.adapters["default"].methods)
    model.eval()
    with torch.no_grad():
        deltas = {(s, n): m.difference(n) for s, m in methods.items() for n in m.shapes}
        flat = torch.cat([d.abs().flatten() for d in deltas.values()])
        cut = flat.sort(descending=True).values[round(0.2 * len(flat)) - 1]
        base, kept = tiny(), []
        for (s, n), d in deltas.items():
            mask = d.abs() >= min(cut, d.abs().max())  # each tensor keeps its largest entry
            kept.append(int(mask.sum()))
            getattr(base[int(s)], n).data += d * mask
        assert round(0.2 * len(flat)) <= sum(kept) <= round(0.2 * len(flat)) + 1
        counts = prune_diff(model)
        assert sum(counts.values()) == sum(kept)
        torch.testing.assert_close(model(x), base(x))
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == sum(kept)
    train(model, lambda m: m(x).square().mean())
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 8
    assert torch.equal(PeftModel.from_pretrained(tiny(), tmp_path)(x), model(x))
    with pytest.raises(ValueError, match="pruned already"):
        prune_diff(model)


def test_the_l0_penalty_reaches_the_loss():
    class WithLoss(nn.Module):
        def __init__(self):
            super().__init__()
            self.site = nn.Linear(4, 4)

        def forward(self, x):
            from transformers.modeling_outputs import MaskedLMOutput

            return MaskedLMOutput(loss=self.site(x).sum() * 0)

    model = get_peft_model(
        WithLoss(), DiffPruningConfig(target_modules=["site"], sparsity_penalty=0.5, structured=False)
    )
    model.train()
    loss = model(torch.ones(1, 4)).loss
    assert float(loss.detach()) == pytest.approx(0.5 * 20 / (1 + math.exp(-5)), rel=1e-5)
    loss.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "diff_alpha" in n)


# -- token rows ---------------------------------------------------------------------------------------------------------------
ROWS = [3, 17, 5]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("along", [False, True])
def test_only_the_chosen_rows_change_and_only_they_are_saved(tied, along, tmp_path):
    config = (
        LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=ROWS)
        if along
        else TrainableTokensConfig(token_indices=ROWS)
    )
    base = llama(tied)
    before = bits(base)
    model = get_peft_model(base, config)
    train(model, lambda m: m(IDS, labels=IDS).loss)
    model.eval()
    model.save_pretrained(tmp_path)
    tensors = {k: t for k, t in load_file(tmp_path / "adapter_model.safetensors").items() if "lora" not in k}
    assert [t.shape for t in tensors.values()] == [(3, 16)]
    assert same(copy.deepcopy(model).base_model.unload(), before)
    with torch.no_grad():
        logits = model(IDS).logits
        assert torch.equal(PeftModel.from_pretrained(llama(tied), tmp_path).eval()(IDS).logits, logits)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(IDS).logits, logits)
    changed = (merged.model.embed_tokens.weight != before["model.embed_tokens.weight"]).any(1).nonzero().flatten()
    assert sorted(changed.tolist()) == sorted(ROWS)
    head = (merged.lm_head.weight != before["lm_head.weight"]).any(1).nonzero().flatten()
    assert sorted(head.tolist()) == (sorted(ROWS) if tied else [])


def test_both_ends_of_a_tied_embedding_use_one_parameter():
    model = shake(get_peft_model(llama(True), TrainableTokensConfig(token_indices=ROWS)))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for m in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        ends = [x.trainable_tokens_delta for _, x in m.roster.adapters["default"].methods]
        assert len(ends) == 2 and ends[0] is ends[1]
        assert sum(p.numel() for p in m.parameters() if p.requires_grad) == 48


def test_rows_of_a_tied_table_get_the_gradient_of_dense_training():
    dense, model = llama(True), get_peft_model(llama(True), TrainableTokensConfig(token_indices=ROWS))
    dense(IDS, labels=IDS).loss.backward()
    model(IDS, labels=IDS).loss.backward()
    (rows,) = model.adapter_parameters("default")
    torch.testing.assert_close(rows.grad, dense.model.embed_tokens.weight.grad[ROWS])


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        own = torch.is_tensor(out) and not (out._is_view() or any(out is a for a in args))
        if own and out.untyped_storage().data_ptr() not in {
            a.untyped_storage().data_ptr() for a in args if torch.is_tensor(a)
        }:
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("layer", [nn.Embedding(5000, 8), nn.Linear(8, 5000, bias=False)], ids=["embedding", "head"])
def test_a_forward_makes_no_copy_of_the_table(layer):
    base = nn.Sequential()
    base.site = layer
    model = shake(get_peft_model(base, TrainableTokensConfig(token_indices=[7, 4999, 0], target_modules=["site"])))
    x = torch.tensor([[7, 1, 4999]]) if isinstance(layer, nn.Embedding) else torch.randn(2, 8)
    with Largest() as seen:
        model(x).sum().backward()
    assert seen.numel <= 2 * 5000 < layer.weight.numel()


def test_wrong_tokens_are_clear_errors_and_leave_the_model_alone():
    base = llama()
    for config, why in (
        (
            TrainableTokensConfig(token_indices=[1, 40]),
            "Token index 40 is out of range: model.embed_tokens has 40 rows",
        ),
        (TrainableTokensConfig(token_indices=[1, 1]), "different token indices"),
        (TrainableTokensConfig(token_indices=[-1]), "from 0 on"),
        (TrainableTokensConfig(token_indices=[]), "different token indices"),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices=[99]), "Token index 99 is out of range"),
        (
            LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1], modules_to_save=["embed_tokens"]),
            "choose one",
        ),
        (LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_token": [1]}), "embed_tokens"),
    ):
        with pytest.raises(ValueError, match=why):
            get_peft_model(base, config)
        assert type(base.model.embed_tokens) is nn.Embedding and all(p.requires_grad for p in base.parameters())


def test_rows_of_added_tokens_load_into_a_base_without_them(tmp_path):
    base = llama()
    base.resize_token_embeddings(43)
    model = shake(get_peft_model(base, TrainableTokensConfig(token_indices=[40, 41, 42])))
    ids = torch.tensor([[1, 40, 42, 41]])
    model.save_pretrained(tmp_path)
    fresh = llama()
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    assert fresh.config.vocab_size == 43
    with torch.no_grad():
        torch.testing.assert_close(loaded.model.model.embed_tokens(ids), model.model.model.embed_tokens(ids))
        torch.testing.assert_close(loaded(ids).logits[..., :40], model(ids).logits[..., :40])
    other, weights = llama(), load_file(tmp_path / "adapter_model.safetensors")
    assert len(weights) == 1
    before = bits(other)
    (tmp_path / "adapter_model.safetensors").write_bytes(
        (tmp_path / "adapter_model.safetensors")
        .read_bytes()
        .replace(b"embed_tokens.trainable", b"embed_tokenz.trainable")
    )
    with pytest.raises(RuntimeError, match="does not fit"):
        PeftModel.from_pretrained(other, tmp_path)
    assert other.config.vocab_size == 40 and same(other, before)


def test_two_adapters_with_different_tokens_act_together_and_on_their_own_rows():
    base = llama()
    model = shake(get_peft_model(base, TrainableTokensConfig(token_indices=[3, 9])))
    model.add_adapter("b", TrainableTokensConfig(token_indices=[5]))
    shake(model, "b", seed=2)
    table = {
        n: dict(model.roster.adapters[n].methods)["model.embed_tokens"].trainable_tokens_delta for n in ("default", "b")
    }
    model.set_adapter(["default", "b"])
    with torch.no_grad():
        rows = model.model.model.embed_tokens(torch.tensor([[9, 5, 3, 1]]))[0]
        original = base.model.embed_tokens.base_layer.weight
        torch.testing.assert_close(
            rows, torch.stack([table["default"][1], table["b"][0], table["default"][0], original[1]])
        )
