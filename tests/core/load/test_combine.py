"""`add_weighted_adapter`: upstream's results for every combination type, and the exact sum as the default.

The expected outputs in `golden/combine` were made by upstream (see make.py there).
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import LoHaConfig, LoraConfig, PeftModel, Refusal, get_peft_model
from peft.core.load.combine import elected, largest, linear
from tests.golden.combine import make

GOLDEN = Path(__file__).parents[2] / "golden" / "combine"
EXPECTED = load_file(GOLDEN / "expected.safetensors")
X = torch.arange(11).reshape(1, 11)


def base() -> nn.Module:
    net = make.Net().eval()
    net.load_state_dict({k.removeprefix("base."): v for k, v in EXPECTED.items() if k.startswith("base.")})
    return net


def loaded(*names: str) -> PeftModel:
    model = PeftModel.from_pretrained(base(), GOLDEN / names[0], adapter_name=names[0])
    for name in names[1:]:
        model.load_adapter(GOLDEN / name, name)
    return model.eval()


def weights_of(model: PeftModel, name: str) -> dict[str, torch.Tensor]:
    """ΔW of an adapter by path."""
    return {stem: m.dense() for stem, m in model.roster.adapters[name].methods}


CASES = [k for k in EXPECTED if k.endswith((".ab", ".ac"))]


@pytest.mark.parametrize("case", CASES)
def test_results_are_upstreams(case):
    name, tag = case.split(".")
    adapters, weights = {"ab": (["a", "b"], [0.7, -0.4]), "ac": (["a", "c"], [1.5, 0.5])}[tag]
    options = {"combination_type": name, **make.TYPES[name]}
    model = loaded(*adapters)
    model.add_weighted_adapter(adapters, weights, "new", **options)
    model.set_adapter("new")
    with torch.no_grad():
        out = model(X)
        model.set_adapter(adapters[0])
        assert not torch.allclose(out, model(X), atol=1e-2)
    assert float((out - EXPECTED[case]).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_random_pruning_is_upstreams(name):
    from peft.utils import merge_utils

    torch.manual_seed(3)
    out = getattr(merge_utils, name)(list(EXPECTED["dare.tensors"]), torch.tensor([0.5, -1.0, 2.0]), 0.6)
    assert torch.allclose(out, EXPECTED[f"dare.{name}"], atol=1e-6)


def test_dare_keeps_the_sum_on_average():
    model = loaded("a", "b")
    torch.manual_seed(0)
    exact = 0.7 * weights_of(model, "a")["first"] - 0.4 * weights_of(model, "b")["first"]
    seen = []
    for i in range(200):
        model.add_weighted_adapter(["a", "b"], [0.7, -0.4], f"d{i}", "dare_linear_svd", density=0.5, svd_rank=8)
        seen.append(weights_of(model, f"d{i}")["first"].detach())
        model.delete_adapter(f"d{i}")
    assert float((torch.stack(seen).mean(0) - exact).abs().max()) < 0.3
    assert float((seen[0] - exact).abs().max()) > 0.3


def test_ia3_is_upstreams():
    model = loaded("p", "q")
    model.add_weighted_adapter(["p", "q"], [0.3, 0.9], "both")
    model.set_adapter("both")
    with torch.no_grad():
        assert float((model(X) - EXPECTED["ia3.pq"]).abs().max()) < 1e-5


def test_the_result_is_frozen_and_saves_and_loads(tmp_path):
    model = loaded("a", "b", "c")
    model.add_weighted_adapter(["a", "b", "c"], [1.0, 2.0, 0.5], "sum")
    assert not any(p.requires_grad for p in model.adapter_parameters("sum"))
    assert model.active_adapters == ["a"]
    ranks = {stem: m.rank() for stem, m in model.roster.adapters["sum"].methods}
    assert ranks == {"first": 4, "second": 5, "embed": 2}, "each place holds the ranks of its own sources"
    model.set_adapter("sum")
    with torch.no_grad():
        out = model(X)
        model.save_pretrained(tmp_path, selected_adapters=["sum"])
        assert torch.equal(PeftModel.from_pretrained(base(), tmp_path / "sum").eval()(X), out)


def test_adapters_of_any_start_and_of_kernels_combine():
    class Conv(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.conv = nn.Conv2d(4, 6, 3, padding=1)

        def forward(self, x):
            return self.conv(x)

    model = get_peft_model(Conv(), LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False), "a")
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=5, target_modules=["conv"], init_lora_weights="pissa"))
    with torch.no_grad():
        for p in model.adapter_parameters("b"):
            p.add_(torch.randn_like(p) * 0.3)
        for kind, tolerance in (("cat", 1e-6), ("svd", 1e-5)):
            options = {"svd_rank": 6} if kind == "svd" else {}
            model.add_weighted_adapter(["a", "b"], [0.5, -2.0], kind, kind, **options)
            delta = {n: weights_of(model, n)["conv"] for n in ("a", "b", kind)}
            if kind == "cat":
                assert torch.allclose(delta[kind], 0.5 * delta["a"] - 2 * delta["b"], atol=tolerance)
            else:
                U, S, Vh = torch.linalg.svd(0.5 * delta["a"] - 2 * delta["b"], full_matrices=False)
                assert torch.allclose(delta[kind], U[:, :6] * S[:6] @ Vh[:6], atol=tolerance)


@pytest.mark.parametrize(
    ("adapters", "weights", "options", "error", "names"),
    [
        (["a", "x"], [1, 1], {}, ValueError, "'x' is not loaded"),
        (["a", "b"], [1], {}, ValueError, "one weight per adapter"),
        (["a", "b"], [1, 1], {"combination_type": "tie"}, ValueError, "'ties'"),
        (["a", "b"], [1, 1], {"combination_type": "ties"}, ValueError, "density"),
        (["a", "c"], [1, 1], {"combination_type": "linear"}, Refusal, "ranks"),
        (["a", "dora"], [1, 1], {}, Refusal, "second"),
        (["a", "loha"], [1, 1], {}, Refusal, "different methods"),
        (["loha", "loha"], [1, 1], {}, Refusal, "LOHA"),
        (["heads", "heads2"], [1, 1], {}, Refusal, "2 of the adapters bring it"),
    ],
)
def test_what_has_no_sum_is_refused_before_anything_changes(adapters, weights, options, error, names):
    model = loaded("a", "b", "c")
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["second"], use_dora=True))
    model.add_adapter("loha", LoHaConfig(r=2, target_modules=["second"]))
    for n in ("heads", "heads2"):
        model.add_adapter(n, LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    before = {n: v.clone() for n, v in model.state_dict().items()}
    with pytest.raises(error) as e:
        model.add_weighted_adapter(adapters, weights, "new", **options)
    assert names in str(e.value)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[n]) for n, v in before.items())
    assert "new" not in model.peft_config and "new" not in model.roster.adapters


def test_a_head_that_one_adapter_brings_is_carried_along():
    model = loaded("a")
    model.add_adapter("h", LoraConfig(r=2, target_modules=["first"], modules_to_save=["second"]))
    with torch.no_grad():
        for p in model.adapter_parameters("h"):
            p.add_(torch.randn_like(p) * 0.3)
    model.add_weighted_adapter(["h"], [1.0], "copy")
    with torch.no_grad():
        model.set_adapter("h")
        out = model(X)
        model.set_adapter("copy")
        assert torch.allclose(model(X), out, atol=1e-6)


def test_the_mergers_are_their_formulas():
    """Weighted sums, the share of largest magnitude, and TIES' mean over those that agree with the elected sign."""
    a, b = torch.tensor([3.0, -1.0, 2.0, -4.0]), torch.tensor([1.0, 2.0, 2.0, 5.0])
    assert linear([a, b], [2.0, -1.0]).tolist() == [5, -4, 2, -13]
    assert largest(a, 0.5).tolist() == [3, 0, 0, -4] and largest(a.view(2, 2), 0.25).tolist() == [[0, 0], [0, -4]]
    assert elected([a, b], [1.0, 1.0], "total").tolist() == [2, 2, 2, 5]
    assert elected([a, b], [2.0, 1.0], "total").tolist() == [3.5, 2, 3, 5]
    votes = [torch.tensor([-9.0]), torch.tensor([1.0]), torch.tensor([2.0])]
    assert elected(votes, [1.0] * 3, "total").tolist() == [-9] and elected(votes, [1.0] * 3, "frequency").tolist() == [
        1.5
    ]
