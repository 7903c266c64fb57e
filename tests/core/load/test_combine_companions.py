"""`add_weighted_adapter` of adapters that bring token rows, heads or biases along: exact sums, and nothing lost silently.

Upstream 0.21.2 gives the new adapter untrained rows, and drops what the first adapter does not have; the expected values
are W[i] + Σ w (δ_i − W[i]) computed here, and on one-hot input the sum of outputs.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from peft import LoraConfig, Refusal, TrainableTokensConfig, get_peft_model
from peft.companions.token_rows import TokensAlong
from tests.helpers.selective import bits, llama, shake


def lora(**more) -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], **more)


def two(first, second, tied=False):
    model = get_peft_model(llama(tied=tied), first, "a").eval()
    model.add_adapter("b", second)
    shake(model, "a", seed=1)
    return shake(model, "b", seed=2)


def rows_of(model, name, path="embed_tokens"):
    """Token -> trained row."""
    found = {
        id(m): m
        for disk_path, m in model.roster.adapters[name].methods
        if disk_path.endswith(path) and hasattr(m, "trainable_tokens_delta_weight")
    }
    assert len(found) == 1
    m = next(iter(found.values()))
    return dict(zip(m.indices, m.trainable_tokens_delta_weight.detach().clone()))


def expected(W, sources):
    out = {}
    for rows, w in sources:
        for i, row in rows.items():
            out[i] = out.get(i, W[i].clone()) + w * (row - W[i])
    return out


def check(model, path="embed_tokens", weights=(0.7, -0.4), **options):
    W = model.get_base_model().get_submodule("model.embed_tokens" if path == "embed_tokens" else path)
    W = W.get_base_layer().weight.detach()
    rows = {n: rows_of(model, n, path) for n in "ab" if _has(model, n, path)}
    base = bits(model.get_base_model())
    model.add_weighted_adapter(list("ab"), list(weights), "c", **options)
    now = bits(model.get_base_model())
    assert all(torch.equal(v, now[k]) for k, v in base.items())
    want = expected(W, [(rows[n], w) for n, w in zip("ab", weights) if n in rows])
    got = rows_of(model, "c", path)
    assert got.keys() == want.keys()
    for i, row in want.items():
        assert torch.allclose(got[i], row, atol=1e-6), i


def _has(model, name, path):
    return any(
        p.endswith(path) and hasattr(m, "trainable_tokens_delta_weight") for p, m in model.roster.adapters[name].methods
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "first, second",
    [
        ([1, 2, 3], [9, 2]),
        ([3, 1], None),
        (None, [3, 1]),
        ({"embed_tokens": [1, 4]}, [4, 2]),
        ([4, 2], {"model.embed_tokens": [1, 4]}),
    ],
)
def test_token_rows_of_a_lora_sum_over_the_union(first, second, tied):
    check(two(lora(trainable_token_indices=first), lora(trainable_token_indices=second), tied))


@pytest.mark.parametrize("kind", ["cat", "svd", "linear", "ties"])
def test_rows_sum_exactly_whatever_is_done_with_the_factors(kind):
    model = two(lora(trainable_token_indices=[1, 2]), lora(trainable_token_indices=[2, 5]))
    check(model, combination_type=kind, **({"density": 0.5} if kind == "ties" else {}))


def test_one_adapters_rows_are_scaled_by_its_weight():
    model = two(lora(trainable_token_indices=[1, 2]), lora())
    W = model.get_base_model().model.embed_tokens.get_base_layer().weight.detach()
    rows = rows_of(model, "a")
    model.add_weighted_adapter(["a"], [0.25], "c")
    for i, row in rows_of(model, "c").items():
        assert torch.allclose(row, W[i] + 0.25 * (rows[i] - W[i]), atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_the_method_that_trains_tokens_sums_too(tied):
    check(two(TrainableTokensConfig(token_indices=[1, 2]), TrainableTokensConfig(token_indices=[7, 2]), tied))


def test_tokens_of_different_tables_stay_with_their_table(tmp_path):
    first = TrainableTokensConfig(token_indices=[1, 2], target_modules=["embed_tokens"])
    second = TrainableTokensConfig(token_indices=[2, 5], target_modules=["lm_head"])
    model = two(first, second)
    ids = torch.tensor([[1, 2, 5, 8]])
    with torch.no_grad():
        model.set_adapter("a")
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
        model.base_model.set_adapter(["a", "b"])
        both = model(ids).logits
        model.set_adapter("c")
        assert torch.allclose(model(ids).logits, both, atol=1e-5)
        model.save_pretrained(tmp_path, selected_adapters=["c"])
        model.load_adapter(tmp_path / "c", "again")
        model.set_adapter("again")
        assert torch.allclose(model(ids).logits, both, atol=1e-5)


def test_tied_ends_whose_sums_differ_are_refused_before_anything_changes():
    ends = {"embed_tokens": [1], "lm_head": [1, 2]}
    model = two(lora(trainable_token_indices=[1, 2]), lora(trainable_token_indices=ends), tied=True)
    before = set(model.roster.adapters)
    with pytest.raises(Refusal, match="ends of a tied weight differ"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert set(model.roster.adapters) == before and "c" not in model.peft_config


@pytest.mark.parametrize("order", ["ab", "ba"])
@pytest.mark.parametrize("field", [{"modules_to_save": ["lm_head"]}, {"bias": "all"}])
def test_what_one_adapter_brings_is_carried_along_wherever_it_stands(field, order):
    model = two(lora(), lora(**field))
    ids = torch.tensor([[1, 2, 5, 8]])
    model.add_weighted_adapter(list(order), [0.0, 1.0] if order == "ab" else [1.0, 0.0], "c")
    with torch.no_grad():
        model.set_adapter("b")
        out = model(ids).logits
        model.set_adapter("c")
        assert torch.allclose(model(ids).logits, out, atol=1e-5)


def test_fields_that_disagree_are_refused_by_name():
    model = two(lora(bias="all"), lora(bias="lora_only"))
    with pytest.raises(Refusal, match="bias.*'all', 'lora_only'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c")
    assert "c" not in model.peft_config


def test_the_union_of_lists_is_a_list_and_of_names_goes_by_path():
    config, model = lora(), llama()
    TokensAlong.bring_all(config, [lora(trainable_token_indices=[3, 1]), lora(trainable_token_indices=[1, 4])], model)
    assert config.trainable_token_indices == [3, 1, 4]
    named = [lora(trainable_token_indices={"lm_head": [2]}), lora(trainable_token_indices=[1])]
    TokensAlong.bring_all(config, named, model)
    assert config.trainable_token_indices == {"lm_head": [2], "model.embed_tokens": [1]}
    assert isinstance(model.get_submodule("lm_head"), nn.Linear)


def test_adapters_that_are_summed_know_no_other_type():
    model = two(TrainableTokensConfig(token_indices=[1]), TrainableTokensConfig(token_indices=[2]))
    with pytest.raises(Refusal, match="combination_type='ties'.*'linear'"):
        model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "c", combination_type="ties", density=0.5)
