"""The additive re-parametrisations against their formulas and against adapters that huggingface/peft 0.21.2 wrote.

`golden/additive_methods/<case>` are adapters of `Net` below (seed 0); `expected.safetensors` holds the outputs that
the library which wrote them computes with them.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import PeftModel, Refusal, get_peft_model
from peft.core.adapted.layer import adapted_layers
from peft.core.kron import apply_kron, factorization, kron

GOLDEN = Path(__file__).parent / "golden" / "additive_methods"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
CASES = sorted({k.rsplit(".", 1)[0] for k in EXPECTED if not k.startswith("schedule")})


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 16)
        self.conv1 = nn.Conv1d(16, 12, 3, padding=1)
        self.conv2 = nn.Conv2d(3, 8, 3, padding=1)
        self.lin1 = nn.Linear(12, 24)
        self.lin2 = nn.Linear(24, 16)

    def forward(self, ids, img):
        h = self.conv1(self.emb(ids).transpose(1, 2)).transpose(1, 2)
        return self.lin2(torch.tanh(self.lin1(h))), self.conv2(img)


class Two(nn.Module):
    """Two linear layers and, with labels, a loss."""

    def __init__(self):
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(12, 24), nn.Linear(24, 16)

    def forward(self, x, labels=None):
        from transformers.modeling_outputs import SequenceClassifierOutput

        y = self.lin2(torch.tanh(self.lin1(x)))
        return SequenceClassifierOutput(loss=None if labels is None else (y - labels).square().mean(), logits=y)


def base(cls=Net):
    torch.manual_seed(0)
    return cls().eval()


def inputs():
    rng = torch.Generator().manual_seed(3)
    return torch.randint(0, 20, (4, 7), generator=rng), torch.randn(2, 3, 6, 6, generator=rng)


def noised(model, seed=5):
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn(p.shape, generator=rng) * 0.2)
    return model.eval()


def method(model, path="lin1"):
    """The config's own method at a path."""
    layer = next(layer for layer in adapted_layers(model) if layer.path == path)
    return layer.methods["default"][0].nested()[-1]


def make(config, cls=Net):
    return noised(get_peft_model(base(cls), config))


# -- files of upstream's ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", CASES)
def test_adapters_of_upstream_give_upstreams_outputs(case, tmp_path):
    model = PeftModel.from_pretrained(base(), GOLDEN / case).eval()
    with torch.no_grad():
        out = model(*inputs())
    for i, y in enumerate(out):
        if f"{case}.{i}" in EXPECTED:
            assert float((y - EXPECTED[f"{case}.{i}"]).abs().max()) < 1e-5
    model.save_pretrained(tmp_path)
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, GOLDEN / case))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(v, theirs[k]) for k, v in ours.items())
    ours, theirs = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, GOLDEN / case))
    assert {k for k in theirs if theirs[k] != ours.get(k)} <= {"peft_version", "target_modules", "auto_mapping"}


# -- AdaLoRA ------------------------------------------------------------------------------------------------------------
def test_adalora_follows_upstreams_schedule_step_by_step(tmp_path):
    """Fourteen steps: warm-up, allocation every second step, final phase; losses, pruned ranks and logits."""
    model = PeftModel.from_pretrained(base(Two), GOLDEN / "adalora_start", is_trainable=True).train()
    opt = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    rng = torch.Generator().manual_seed(1)
    x, labels = torch.randn(64, 12, generator=rng), torch.randn(64, 16, generator=rng)
    for step, expected in enumerate(EXPECTED["schedule.losses"].tolist()):
        loss = model(x, labels=labels).loss
        loss.backward()
        opt.step()
        model.base_model.update_and_allocate(step)
        opt.zero_grad()
        assert loss.item() == pytest.approx(expected, abs=1e-5), f"step {step}"
    model.eval()
    with torch.no_grad():
        out = model(x).logits
    assert torch.allclose(out[:8], EXPECTED["schedule.logits"], atol=1e-5)
    pruned = json.loads((GOLDEN / "adalora_pruned" / "adapter_config.json").read_text())
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"] == pruned["rank_pattern"]
    assert load_file(tmp_path / "adapter_model.safetensors")["base_model.model.lin1.lora_A"].shape == (2, 12)
    for folder in (tmp_path, GOLDEN / "adalora_pruned"):
        again = PeftModel.from_pretrained(base(Two), folder).eval()
        with torch.no_grad():
            assert torch.allclose(again(x).logits, out, atol=1e-5)
        again.save_pretrained(tmp_path / "again")
        saved = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
        assert saved["rank_pattern"] == pruned["rank_pattern"]


def test_adalora_penalty_is_the_mean_distance_from_orthogonality():
    model = make(peft.AdaLoraConfig(init_r=4, total_step=9, target_modules=["lin1", "lin2"], orth_reg_weight=0.7), Two)
    x, labels = torch.randn(3, 12), torch.randn(3, 16)
    plain = model(x, labels=labels).loss  # in eval: the loss alone
    distances = []
    for path in ("lin1", "lin2"):
        m = method(model, path)
        for gram in (m.lora_A @ m.lora_A.T, m.lora_B.T @ m.lora_B):
            distances.append((gram - torch.eye(4)).square().sum().sqrt())
    expected = plain + 0.7 * sum(distances) / 4
    assert model.train()(x, labels=labels).loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_adalora_can_prune_a_layer_away_and_load_it_again(tmp_path):
    model = make(peft.AdaLoraConfig(init_r=2, target_r=1, total_step=4, target_modules=["lin1", "lin2"]), Two)
    for path, kept in (("lin1", [True, True]), ("lin2", [False, False])):
        m = method(model, path)
        m.kept = torch.tensor(kept)
        m.mask()
    model.peft_config["default"].rank_pattern = {"lin1.lora_E": [True, True], "lin2.lora_E": [False, False]}
    x = torch.randn(3, 12)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(Two), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(x).logits, model(x).logits)
    assert method(again, "lin2").r == 0


def test_adalora_pruning_twice_speaks_of_the_first_ranks(tmp_path):
    """A reloaded adapter holds two of six triplets; the pattern written next still has six entries."""
    model = PeftModel.from_pretrained(base(Two), GOLDEN / "adalora_pruned", is_trainable=True)
    m = method(model)
    m.kept = torch.tensor([False, True])
    assert m.full_pattern() == [False, False, False, False, False, True]


def test_adalora_says_what_is_wrong():
    with pytest.raises(ValueError, match="total_step"):
        peft.AdaLoraConfig(target_modules=["lin1"])
    with pytest.raises(ValueError, match="tfinal"):
        peft.AdaLoraConfig(target_modules=["lin1"], total_step=10, tinit=5, tfinal=5)
    with pytest.warns(UserWarning, match="use_rslora"):
        peft.AdaLoraConfig(target_modules=["lin1"], total_step=10, use_rslora=True)
    model = make(peft.AdaLoraConfig(init_r=2, total_step=4, target_modules=["lin1"]), Two)
    with pytest.raises(RuntimeError, match="after backward"):
        model.base_model.update_and_allocate(0)


# -- formulas -----------------------------------------------------------------------------------------------------------
def test_kronecker_products_without_forming_them():
    A, B, x = torch.randn(3, 4), torch.randn(5, 2), torch.randn(6, 8)
    assert torch.allclose(kron(A, B), torch.kron(A, B))
    assert torch.allclose(apply_kron(x, A, B), x @ torch.kron(A, B).T, atol=1e-5)


@pytest.mark.parametrize("n", [1, 12, 16, 127, 128, 360])
def test_factorization_takes_the_nearest_divisors(n):
    divisors = [d for d in range(1, n + 1) if n % d == 0]
    assert factorization(n) == next((d, n // d) for d in reversed(divisors) if d * d <= n)
    for limit in (2, 5, 40):
        m, k = factorization(n, limit)
        small = limit if n % limit == 0 else max(d for d in divisors if d <= limit and d * d <= n)
        assert (m, k) == (small, n // small)


def test_loha_is_a_hadamard_product():
    m = method(make(peft.LoHaConfig(r=3, alpha=6, target_modules=["lin1"])))
    expected = 2 * (m.hada_w1_a @ m.hada_w1_b) * (m.hada_w2_a @ m.hada_w2_b)
    assert torch.allclose(m.dense(), expected)
    assert torch.linalg.matrix_rank(m.dense()) == m.rank() == 9


def test_lokr_factors_are_low_rank_only_where_that_saves():
    m = method(make(peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=["lin1"])))
    w1, w2 = m.lokr_w1_a @ m.lokr_w1_b, m.lokr_w2_a @ m.lokr_w2_b
    assert w1.shape == (4, 3) and w2.shape == (6, 4)
    assert torch.allclose(m.dense(), 3 * torch.kron(w1, w2))
    assert method(make(peft.LoKrConfig(r=3, target_modules=["lin1"]))).lokr_w2.shape == (6, 4)


@pytest.mark.parametrize("start", [True, "lycoris", False])
def test_lokr_starts(start):
    model = get_peft_model(base(), peft.LoKrConfig(r=1, init_weights=start, target_modules=["lin1"]))
    m = method(model)
    assert bool(m.dense().any()) is (start is False)
    assert bool((m.lokr_w1 == 0).all()) is (start is True)


def test_krona_is_a_scaled_kronecker_product():
    m = method(make(peft.KronAConfig(a_shape=(4, 6), scale=1.5, target_modules=["lin1"])))
    assert m.krona_A.shape == (4, 6) and m.krona_B.shape == (6, 2)
    assert torch.allclose(m.dense(), 1.5 * torch.kron(m.krona_A, m.krona_B))
    with pytest.raises(ValueError, match="does not divide the layer lin1, which is 24 x 12"):
        get_peft_model(base(), peft.KronAConfig(a_shape=(5, 2), target_modules=["lin1"]))


def test_krona_res_runs_beside_a_block():
    block = nn.Sequential(nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12))
    net = nn.Sequential()
    net.add_module("ffn", block)
    x = torch.randn(5, 12)
    plain = block(x)
    model = noised(get_peft_model(net, peft.KronAResConfig(target_modules=["ffn"], scale=2.0, residual=1.0)))
    m = method(model, "ffn")
    expected = plain + 2 * x @ torch.kron(m.krona_A, m.krona_B).T + m.krona_residual * x
    assert torch.allclose(model(x), expected, atol=1e-5)
    assert abs(m.krona_residual.item() - 1) < 0.9  # it started where the config says
    with pytest.raises(Refusal, match="12 and 24 channels"):
        get_peft_model(base(), peft.KronAResConfig(target_modules=["lin1"]))


def test_vera_sites_share_their_banks(tmp_path):
    model = make(peft.VeraConfig(r=8, target_modules=["lin1", "lin2"]))
    first, second = method(model), method(model, "lin2")
    assert first.vera_A is second.vera_A and first.vera_A.shape == (8, 24) and first.vera_B.shape == (24, 8)
    expected = first.vera_lambda_b.diag() @ first.vera_B @ first.vera_lambda_d.diag() @ first.vera_A[:, :12]
    assert torch.allclose(first.dense(), expected, atol=1e-5)
    assert not first.vera_A.requires_grad and float(first.vera_A.abs().max()) <= math.sqrt(6 / 24)
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == 6  # two vectors a site, two banks
    bare = make(peft.VeraConfig(r=8, save_projection=False, projection_prng_key=3, target_modules=["lin1"]))
    bare.save_pretrained(tmp_path / "bare")
    assert len(load_file(tmp_path / "bare" / "adapter_model.safetensors")) == 2
    again = PeftModel.from_pretrained(base(), tmp_path / "bare").eval()
    with torch.no_grad():
        assert torch.equal(again(*inputs())[0], bare(*inputs())[0])


# -- dropout of ΔW ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("config", [peft.LoHaConfig, peft.LoKrConfig])
def test_rank_dropout_drops_rows_and_module_dropout_all(config):
    rows = make(config(r=2, rank_dropout=0.5, target_modules=["lin1"]))
    layer, x = rows.base_model.model.lin1, torch.randn(3, 12)
    whole, plain = layer(x), layer.base_layer(x)
    ratio = (layer.train()(x) - plain) / (whole - plain)
    dropped = (ratio.abs() < 1e-3).all(0)
    assert dropped.any() and not dropped.all()
    kept = ratio[:, ~dropped]
    grown = 24 / int((~dropped).sum()) if config is peft.LoHaConfig else 1.0
    assert torch.allclose(kept, torch.full_like(kept, grown), rtol=1e-2)
    layer = make(config(r=2, module_dropout=0.5, target_modules=["lin1"])).base_model.model.lin1
    off = [torch.equal(layer.train()(x), layer.base_layer(x)) for _ in range(40)]
    assert 5 < sum(off) < 35


# -- DoRA over any delta ------------------------------------------------------------------------------------------------
DELTAS = [
    peft.LoraConfig(r=4, lora_bias=True, use_dora=True, target_modules=["lin1"]),
    peft.LoHaConfig(r=2, use_dora=True, target_modules=["lin1"]),
    peft.LoKrConfig(r=2, use_dora=True, target_modules=["lin1"]),
    peft.KronAConfig(use_dora=True, target_modules=["lin1"]),
    peft.VeraConfig(r=8, use_dora=True, target_modules=["lin1"]),
    peft.AdaLoraConfig(init_r=4, total_step=9, use_dora=True, target_modules=["lin1"]),
]


@pytest.mark.parametrize("config", DELTAS, ids=lambda c: c.peft_type.value)
def test_dora_over_any_delta(config):
    model = make(config)
    layer = model.base_model.model.lin1
    outer, inner = layer.methods["default"][0].nested()
    W, x = layer.base_layer.weight, torch.randn(5, 12)
    bias = layer.base_layer.bias + (0 if inner.bias_change() is None else inner.bias_change())

    def formula(scale):
        V = W + scale * delta
        return x @ (getattr(outer, outer.magnitude)[:, None] * V / V.norm(dim=1, keepdim=True)).T + bias

    with torch.no_grad():
        delta = inner.dense().clone()
        assert float(delta.abs().max()) > 1e-3
        assert torch.allclose(layer(x), formula(1.0), atol=1e-5)
        layer.set_scale("default", 0.5)  # reaches the delta inside
        bias = layer.base_layer.bias + (0 if inner.bias_change() is None else inner.bias_change())
        assert torch.allclose(layer(x), formula(0.5), atol=1e-5)
        layer.scale_layer(2.0)
        layer.unscale_layer(4.0)
        assert inner.multiplier == 0.25
    assert getattr(layer, f"{inner.prefix}magnitude_vector")["default"].weight.shape == (24,)
    assert "use_dora" in {**config.to_json_dict()}


def test_dora_scale_is_a_constant_in_backward():
    model = make(peft.LoraConfig(r=2, use_dora=True, target_modules=["lin1"]))
    layer, x = model.base_model.model.lin1, torch.randn(5, 12)
    outer, inner = layer.methods["default"][0].nested()
    layer(x).sum().backward()
    norm = (layer.base_layer.weight + inner.dense()).norm(dim=1).detach()
    scale = (outer.lora_magnitude_vector / norm).detach()
    # d/dB of sum(scale ⊙ s·B A x) with the norm held still
    expected = inner.scaling * scale[:, None] * (inner.lora_A @ x.sum(0))[None]
    assert torch.allclose(inner.lora_B.grad, expected, atol=1e-4)


def test_views_reach_the_delta_inside_dora():
    layer = make(peft.LoraConfig(r=2, use_dora=True, target_modules=["lin1"])).base_model.model.lin1
    inner = layer.methods["default"][0].nested()[-1]
    assert layer.lora_A["default"].weight is inner.lora_A
    assert layer.r["default"] == 2 and layer.use_dora["default"]
    layer.scaling["default"] = 3.0
    assert inner.scaling == pytest.approx(3.0)


def test_an_adapter_whose_file_lost_its_dora_vector_is_refused(tmp_path):
    model = make(peft.LoHaConfig(r=2, use_dora=True, target_modules=["lin1"]))
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    del tensors["base_model.model.lin1.hada_magnitude_vector"]
    save_file(tensors, path)
    with pytest.raises(peft.CheckpointError, match="hada_magnitude_vector"):
        PeftModel.from_pretrained(base(), tmp_path)


# -- starts from W ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("start", ["pissa", "pissa_niter_8", "olora"])
def test_starts_from_the_weight_leave_it_untouched(start):
    net = base()
    W = net.lin1.weight.detach().clone()
    config = peft.LoraConfig(r=3, lora_alpha=6, init_lora_weights=start, target_modules=["lin1"])
    m = method(get_peft_model(net, config))
    assert torch.equal(net.lin1.base_layer.weight, W)
    product = 2 * m.lora_B @ m.lora_A
    if start == "olora":
        Q, R = torch.linalg.qr(W)
        assert torch.allclose(m.lora_B, Q[:, :3]) and torch.allclose(m.lora_A, R[:3])
    else:
        U, S, V = torch.linalg.svd(W)
        best = (U[:, :3] * S[:3]) @ V[:3]
        assert torch.allclose(product, best, atol=1e-3 if "niter" in start else 1e-5)
    assert float(m.dense().detach().abs().max()) < 1e-6


def test_unknown_starts_name_the_known_ones():
    with pytest.raises(ValueError, match="pissa"):
        peft.LoraConfig(init_lora_weights="pisa", target_modules=["lin1"])
    with pytest.raises(ValueError, match="pissa_niter_"):
        peft.LoraConfig(init_lora_weights="pissa_niter_many", target_modules=["lin1"])
