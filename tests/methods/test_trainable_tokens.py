"""Chosen rows of an embedding, at both ends where it is tied."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft import LoraConfig, PeftModel, get_peft_model
from peft.methods.trainable_tokens import TrainableTokensConfig
from tests.helpers.selective import IDS, bits, llama, same, shake, train

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
        ends = [x.trainable_tokens_delta_weight for _, x in m.roster.adapters["default"].methods]
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
        n: dict(model.roster.adapters[n].methods)["model.embed_tokens"].trainable_tokens_delta_weight
        for n in ("default", "b")
    }
    model.set_adapter(["default", "b"])
    with torch.no_grad():
        rows = model.model.model.embed_tokens(torch.tensor([[9, 5, 3, 1]]))[0]
        original = base.model.embed_tokens.base_layer.weight
        torch.testing.assert_close(
            rows, torch.stack([table["default"][1], table["b"][0], table["default"][0], original[1]])
        )
