"""LoReFT against the formula written out again: rotations, edits, and the positions of tokens."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from peft import get_peft_model
from peft.methods.loreft import LoReftConfig
from tests.helpers.activation import CONFIGS, IDS, Net, adapted, on_layer, only

DECODERS = ("llama", "gpt2", "opt")


@pytest.mark.parametrize("variant", ["loreft", "noreft", "direft"])
def test_the_edit_is_the_paper_s_formula_and_only_at_its_positions(variant):
    layer = nn.Linear(12, 16)
    config = LoReftConfig(target_modules=["site"], r=3, variant=variant, prefix_positions=2, suffix_positions=1)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 6, 12)
    h = layer(x)
    R = m.rotation()[0]
    inner = h @ m.reft_W_weight[0].T + m.reft_b_weight[0] - (0 if variant == "direft" else h @ R.T)
    edited = h + inner @ R
    out = model(x)
    assert torch.allclose(out[:, [0, 1, 5]], edited[:, [0, 1, 5]], atol=1e-5)
    assert torch.equal(out[:, 2:5], h[:, 2:5])
    if variant == "loreft":
        assert torch.allclose(R @ R.T, torch.eye(3), atol=1e-6)


def test_untied_edits_differ_and_a_token_that_is_first_and_last_is_edited_once():
    layer = nn.Linear(12, 16)
    config = LoReftConfig(target_modules=["site"], r=2, tied_weights=False, prefix_positions=2, suffix_positions=2)
    model, m = on_layer(layer, config)
    x = torch.randn(2, 3, 12)
    h, R = layer(x), m.rotation()

    def edit(i):
        return h + (h @ m.reft_W_weight[i].T + m.reft_b_weight[i] - h @ R[i].T) @ R[i]

    out = model(x)
    assert torch.allclose(out[:, :2], edit(0)[:, :2], atol=1e-5)
    assert torch.allclose(out[:, 2], edit(1)[:, 2], atol=1e-5)
    assert not torch.allclose(edit(0)[:, 2], edit(1)[:, 2])


def test_rows_of_r_stay_orthonormal_in_training():
    config = LoReftConfig(target_modules=["site"], r=4, all_positions=True, init_weights="random")
    model = get_peft_model(Net(nn.Linear(12, 16)), config)
    m = only(model)
    start = m.rotation().detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x, target = torch.randn(8, 12), torch.randn(8, 16)
    losses = []
    for _ in range(40):
        loss = (model(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    R = m.rotation()[0]
    assert losses[-1] < 0.8 * losses[0]
    assert float((R @ R.T - torch.eye(4)).abs().max().detach()) < 1e-5
    assert float((R - start[0]).abs().max().detach()) > 0.05
    assert torch.equal(copy.deepcopy(m).rotation(), m.rotation())
    assert torch.equal(pickle.loads(pickle.dumps(m)).rotation(), m.rotation())


def test_the_random_start_is_the_paper_s_and_no_identity():
    layer, x = nn.Linear(12, 16), torch.randn(2, 4, 12)
    fresh = get_peft_model(Net(layer), LoReftConfig(target_modules=["site"], r=2, init_weights="random"))
    assert not torch.allclose(fresh(x), layer(x), atol=1e-3)


def test_an_edit_of_every_token_merges_into_an_embedding_and_a_layer_without_bias():
    for layer, x in ((nn.Linear(12, 16, bias=False), torch.randn(2, 12)), (nn.Embedding(9, 16), torch.arange(6))):
        model, _ = on_layer(layer, LoReftConfig(target_modules=["site"], r=2, all_positions=True))
        out = model(x)
        assert torch.allclose(model.merge_and_unload()(x), out, atol=1e-5)


@pytest.mark.parametrize("name", DECODERS)
def test_padding_on_either_side_does_not_move_the_positions(name):
    model = adapted(name, LoReftConfig(r=2, prefix_positions=2, suffix_positions=2))
    pads = torch.zeros(3, 4, dtype=torch.long)
    with torch.no_grad():
        alone = model(input_ids=IDS).logits
        ones = torch.ones_like(IDS)
        left = model(
            input_ids=torch.cat([pads, IDS], 1),
            attention_mask=torch.cat([pads, ones], 1),
            position_ids=torch.cat([pads, torch.arange(7).expand(3, -1)], 1),
        ).logits[:, 4:]
        right = model(input_ids=torch.cat([IDS, pads], 1), attention_mask=torch.cat([ones, pads], 1)).logits[:, :7]
    assert float((left - alone).abs().max()) < 1e-4
    assert float((right - alone).abs().max()) < 1e-4


def test_decoding_steps_are_not_edited_at_the_end():
    """With suffix positions a cached decode equals a forward whose edits are at the prompt's end, by hand."""
    model = adapted("llama", LoReftConfig(r=2, prefix_positions=1, suffix_positions=2))
    prompt, more = IDS[:, :5], IDS[:, 5:]
    with torch.no_grad():
        cache = model(input_ids=prompt, use_cache=True).past_key_values
        steps = []
        for t in range(2):
            out = model(input_ids=more[:, t : t + 1], past_key_values=cache, use_cache=True)
            steps.append(out.logits)
        # labels say where the prompt ends, so a forward over everything edits the same tokens
        causal = adapted("llama", LoReftConfig(r=2, prefix_positions=1, suffix_positions=2, task_type="CAUSAL_LM"))
        labels = IDS.clone()
        labels[:, :5] = -100
        whole = causal(input_ids=IDS, labels=labels).logits
        assert float((torch.cat(steps, 1) - whole[:, 5:]).abs().max()) < 1e-4
        assert float((causal(input_ids=IDS).logits - whole)[:, 3:].abs().max()) > 1e-3  # else the ends are elsewhere


def test_a_continued_prompt_with_suffix_positions_is_refused():
    model = adapted("llama", CONFIGS["loreft"]())
    cache = model(input_ids=IDS[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match="suffix_positions"):
        model(input_ids=IDS[:, 4:], past_key_values=cache)
    assert model.roster.mix.span is None  # nothing is left behind by the failed call
    prefix = adapted("llama", LoReftConfig(r=2, prefix_positions=6, suffix_positions=0))
    with torch.no_grad():
        whole = prefix(input_ids=IDS).logits
        cache = prefix(input_ids=IDS[:, :4], use_cache=True).past_key_values
        rest = prefix(input_ids=IDS[:, 4:], past_key_values=cache).logits
    assert float((rest - whole[:, 4:]).abs().max()) < 1e-4
