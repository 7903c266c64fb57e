"""OFT, BOFT, HRA and (IA)³ against their papers' formulas and against adapters that huggingface/peft 0.21.2 wrote."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import BOFTConfig, HRAConfig, IA3Config, OFTConfig, PeftModel, Refusal, get_peft_model

GOLDEN = Path(__file__).parent / "golden" / "multiplicative"
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir())
UPSTREAM_FORWARD_IS_NOT_ITS_MERGE = ("oft_conv",)  # kernels larger than 1: its merge has the stated maths


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 16)
        self.lin1 = nn.Linear(16, 24)
        self.lin2 = nn.Linear(24, 16)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, ids, image):
        return self.lin2(torch.relu(self.lin1(self.embed(ids)))), self.conv(image)


def golden_base():
    state = load_file(GOLDEN / "base.safetensors")
    inputs = state.pop("input.ids"), state.pop("input.image")
    net = Net().eval()
    net.load_state_dict(state)
    return net, inputs


@pytest.mark.parametrize("case", CASES)
def test_adapters_of_upstream_give_upstreams_outputs(case, tmp_path):
    net, inputs = golden_base()
    expected = load_file(GOLDEN / case / "expected.safetensors")
    which = "merged" if case in UPSTREAM_FORWARD_IS_NOT_ITS_MERGE else "forward"
    model = PeftModel.from_pretrained(net, GOLDEN / case).eval()
    with torch.no_grad():
        for out, name in zip(model(*inputs), ("hidden", "image"), strict=True):
            torch.testing.assert_close(out, expected[f"{which}.{name}"], rtol=0, atol=1e-5)
        model.save_pretrained(tmp_path)
        ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, GOLDEN / case))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        for out, name in zip(model.merge_and_unload()(*inputs), ("hidden", "image"), strict=True):
            torch.testing.assert_close(out, expected[f"merged.{name}"], rtol=0, atol=1e-5)


def adapted(config, layer=None, seed=0, noise=0.3):
    """(model, its one method object) of a randomised adapter on a layer called `site`."""
    torch.manual_seed(seed)
    base = nn.Sequential()
    base.site = layer if layer is not None else nn.Linear(16, 24)
    model = get_peft_model(base, config).eval()
    for p in model.adapter_parameters("default"):
        p.data += noise * torch.randn_like(p)
    (_, method), *_ = model.roster.adapters["default"].methods
    return model, method


def test_oft_cayley_blocks_are_orthogonal_and_sit_on_the_diagonal():
    model, m = adapted(OFTConfig(r=4, oft_block_size=0, use_cayley_neumann=False, target_modules=["site"]))
    W = model.base_model.model.site.base_layer.weight.detach().clone()
    R = torch.zeros(16, 16)
    for i, q in enumerate(m.oft_R.detach()):
        Q, k = torch.zeros(4, 4), 0
        for row in range(4):
            for col in range(row + 1, 4):
                Q[row, col], Q[col, row] = q[k], -q[k]
                k += 1
        R[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = (torch.eye(4) - Q) @ torch.linalg.inv(torch.eye(4) + Q)
    torch.testing.assert_close(R @ R.T, torch.eye(16), atol=1e-5, rtol=0)
    merged = model.base_model.merge_and_unload().site.weight
    torch.testing.assert_close(merged.detach(), W @ R.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(merged.norm(dim=1), W.norm(dim=1), atol=1e-5, rtol=0)


def test_the_neumann_series_approaches_the_inverse_and_turns_the_other_way():
    exact = OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=["site"])
    errors = []
    for terms in (3, 5, 9):
        series = OFTConfig(oft_block_size=4, num_cayley_neumann_terms=terms, target_modules=["site"])
        (_, a), (_, b) = adapted(exact, noise=0.05), adapted(series, noise=0.05)
        errors.append(float((a.rotations().mT - b.rotations()).abs().max().detach()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-5


def test_oft_takes_one_of_the_two_sizes_and_adjusts_what_does_not_divide():
    for wrong in ({"r": 4, "oft_block_size": 4}, {"r": 0, "oft_block_size": 0}):
        with pytest.raises(ValueError, match="either r .* or oft_block_size"):
            OFTConfig(**wrong)
    with pytest.warns(UserWarning, match="oft_block_size=7 does not divide 16; 8 is used"):
        _, m = adapted(OFTConfig(oft_block_size=7, target_modules=["site"]))
    assert (m.r, m.oft_block_size, tuple(m.oft_R.shape)) == (2, 8, (2, 28))


def test_oft_refuses_blocks_that_cannot_rotate():
    with pytest.raises(Refusal, match="blocks of size 1 cannot rotate"):
        adapted(OFTConfig(oft_block_size=3, target_modules=["site"]), nn.Linear(7, 5))


def test_coft_pulls_every_block_back_into_its_ball():
    model, m = adapted(OFTConfig(oft_block_size=4, coft=True, eps=0.2, target_modules=["site"]))
    x, radius = torch.randn(3, 16), 0.2 / math.sqrt(4)
    free = m.oft_R.detach().clone()
    model(x)
    assert torch.equal(m.oft_R, free)  # evaluation reads, it does not write
    skew = m.constrained().detach()
    assert (math.sqrt(2) * skew.norm(dim=1) <= radius * 1.001).all()
    torch.testing.assert_close(skew, free * (radius / (math.sqrt(2) * free.norm(dim=1, keepdim=True))))
    model.train()
    model(x).sum().backward()
    assert (math.sqrt(2) * m.oft_R.detach().norm(dim=1) <= radius * 1.001).all()
    assert m.oft_R.grad is not None


@pytest.mark.parametrize(
    "config",
    [
        OFTConfig(oft_block_size=4, module_dropout=0.5, target_modules=["site"]),
        BOFTConfig(boft_block_size=4, boft_dropout=0.5, target_modules=["site"]),
    ],
    ids=["oft", "boft"],
)
def test_multiplicative_dropout_leaves_out_whole_blocks_and_only_in_training(config):
    model, m = adapted(config, nn.Linear(16, 16, bias=False))
    with torch.no_grad():
        layer = model.base_model.model.site
        if hasattr(m, "boft_s"):
            m.boft_s.fill_(1)
        layer.base_layer.weight.copy_(torch.eye(16))
        eye = torch.eye(16)
        full = model(eye)
        assert torch.equal(model(eye), full)
        model.train()
        for _ in range(3):
            changed = [
                not torch.allclose(model_block, torch.eye(4), atol=1e-5)
                for out in [model(eye)]
                for model_block in (out[i : i + 4, i : i + 4] for i in range(0, 16, 4))
            ]
            assert sum(changed) == 2


def test_boft_is_the_product_of_its_permuted_block_diagonal_factors():
    model, m = adapted(BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=3, target_modules=["site"]))
    W = model.base_model.model.site.base_layer.weight.detach().clone()
    B = torch.eye(16)
    for i, blocks in enumerate(m.boft_R.detach()):
        # factor i joins the half-blocks (2 channels) of 2^i neighbouring blocks: even halves first, then odd ones
        halves = [list(range(2 * h, 2 * h + 2)) for h in range(8)]
        order = []
        for start in range(0, 8, 2 ** (i + 1)):
            group = halves[start : start + 2 ** (i + 1)]
            order += [c for h in (*group[0::2], *group[1::2]) for c in h] if i else [c for h in group for c in h]
        P = torch.zeros(16, 16)
        P[torch.arange(16), torch.tensor(order)] = 1
        A = [(R - R.T) / 2 for R in blocks]
        D = torch.block_diag(*((torch.eye(4) - a) @ torch.linalg.inv(torch.eye(4) + a) for a in A))
        B = P @ D @ P.T @ B
    torch.testing.assert_close(B @ B.T, torch.eye(16), atol=1e-5, rtol=0)
    merged = model.base_model.merge_and_unload().site.weight.detach()
    torch.testing.assert_close(merged, m.boft_s.detach()[:, None] * (W @ B.T), atol=1e-5, rtol=0)
    reach = (B.abs() > 1e-6).sum()
    one, single = adapted(BOFTConfig(boft_block_size=4, target_modules=["site"]))
    assert reach > 16 * 4 and (single.rotate(torch.eye(16)).abs() > 1e-6).sum() <= 16 * 4


def test_boft_refuses_sizes_that_do_not_fit_before_anything_changes():
    base = nn.Sequential()
    base.site = nn.Linear(18, 8)
    for config, why in (
        (BOFTConfig(boft_block_size=4, target_modules=["site"]), r"18 must be divisible by boft_block_size \(4\)"),
        (BOFTConfig(boft_block_size=6, boft_n_butterfly_factor=2, target_modules=["site"]), "butterfly factors need"),
    ):
        with pytest.raises(Refusal, match=why):
            get_peft_model(base, config)
        assert type(base.site) is nn.Linear and base.site.weight.requires_grad


def test_boft_reads_the_single_factor_that_upstream_saves_without_a_cuda_compiler(tmp_path):
    one, _ = adapted(BOFTConfig(boft_block_size=4, target_modules=["site"]))
    one.peft_config["default"].boft_n_butterfly_factor = 2
    one.save_pretrained(tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential()
    base.site = nn.Linear(16, 24)
    x = torch.randn(3, 16)
    with torch.no_grad():
        assert torch.equal(PeftModel.from_pretrained(base, tmp_path).eval()(x), one(x))


@pytest.mark.parametrize("gram_schmidt", [False, True])
def test_hra_is_a_chain_of_reflections(gram_schmidt):
    model, m = adapted(HRAConfig(r=4, apply_GS=gram_schmidt, target_modules=["site"]))
    W = model.base_model.model.site.base_layer.weight.detach().double()
    columns = m.hra_u.detach().double().T
    if gram_schmidt:
        done: list[torch.Tensor] = []
        for u in columns:
            for v in done:
                u = u - (v @ u) * v
            done.append(u / u.norm())
        columns = torch.stack(done)
    chain = torch.eye(16, dtype=torch.float64)
    for u in columns:
        chain = chain @ (torch.eye(16) - 2 * torch.outer(u, u) / (u @ u))
    torch.testing.assert_close(chain @ chain.T, torch.eye(16, dtype=torch.float64))
    merged = model.base_model.merge_and_unload().site.weight.detach().double()
    torch.testing.assert_close(merged, W @ chain, atol=1e-6, rtol=0)


def test_hra_starts_as_the_identity_when_reflections_can_cancel():
    for r, same in ((4, True), (3, False)):
        torch.manual_seed(0)
        base = nn.Sequential()
        base.site = nn.Linear(16, 8)
        x = torch.randn(5, 16)
        before = base(x)
        if same:
            model = get_peft_model(base, HRAConfig(r=r, target_modules=["site"]))
        else:
            with pytest.warns(UserWarning, match="r=3 is odd"):
                model = get_peft_model(base, HRAConfig(r=r, target_modules=["site"]))
        assert torch.allclose(model(x), before, atol=1e-5) is same


def test_hra_refuses_more_orthogonal_directions_than_dimensions():
    with pytest.raises(Refusal, match="cannot be orthogonal in 16 dimensions"):
        adapted(HRAConfig(r=20, apply_GS=True, target_modules=["site"]))


def test_ia3_scales_outputs_with_their_bias_and_feedforward_inputs():
    for feedforward in ([], ["site"]):
        model, m = adapted(IA3Config(target_modules=["site"], feedforward_modules=feedforward))
        base = model.base_model.model.site.base_layer
        x, s = torch.randn(5, 16), m.ia3_l.detach().flatten()
        W, b = base.weight.detach().clone(), base.bias.detach().clone()
        expected = (x * s) @ W.T + b if feedforward else s * (x @ W.T + b)
        assert m.ia3_l.shape == ((1, 16) if feedforward else (24, 1))
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected)
            plain = model.base_model.merge_and_unload().site
        torch.testing.assert_close(plain.bias, b if feedforward else s * b)
        torch.testing.assert_close(plain.weight, W * s if feedforward else W * s[:, None])


def test_ia3_finds_keys_values_and_feedforward_of_known_models():
    from transformers import LlamaConfig, LlamaForCausalLM

    small = dict(vocab_size=16, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**small)), IA3Config())
    forms = {stem.rsplit(".", 1)[1]: m.form for stem, m in model.roster.adapters["default"].methods}
    assert forms == {"k_proj": "after", "v_proj": "after", "down_proj": "before"}
    with pytest.raises(ValueError, match="specify `feedforward_modules`"):
        adapted(IA3Config(target_modules=["site"]))
    with pytest.raises(ValueError, match="subset of `target_modules`"):
        IA3Config(target_modules=["k"], feedforward_modules=["wo"])


def test_input_and_output_transforms_on_one_convolution_act_once_each():
    """The rotation makes the layer go through its dense weight; the scaling must not be applied there and again."""
    torch.manual_seed(0)
    base = nn.Sequential()
    base.site = nn.Conv2d(4, 8, 3)
    model = get_peft_model(base, OFTConfig(oft_block_size=4, target_modules=["site"]), adapter_name="turn").eval()
    model.add_adapter("scale", IA3Config(target_modules=["site"], feedforward_modules=[]))
    for name in ("turn", "scale"):
        for p in model.adapter_parameters(name):
            p.data += 0.3 * torch.randn_like(p)
    model.set_adapter(["turn"])
    x = torch.randn(2, 4, 6, 6)
    with torch.no_grad():
        turned = model(x)
        scale = next(model.adapter_parameters("scale"))
        model.set_adapter(["turn", "scale"])
        torch.testing.assert_close(model(x), turned * scale)
