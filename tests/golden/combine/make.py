"""Makes the fixtures of tests/core/load/test_combine.py with huggingface/peft 0.21.2, which must be the imported `peft`.

Adapters a, b and c of a small model, and for each combination type what upstream's combined adapter gives.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

HERE = Path(__file__).parent
TYPES = {
    "cat": {},
    "svd": {},
    "svd_rank": {"combination_type": "svd", "svd_rank": 3},
    "svd_clamp": {"combination_type": "svd", "svd_clamp": 0.9},
    "linear": {},
    "ties": {"density": 0.5},
    "ties_frequency": {"combination_type": "ties", "density": 0.6, "majority_sign_method": "frequency"},
    "ties_svd": {"density": 0.5},
    "magnitude_prune": {"density": 0.4},
    "magnitude_prune_svd": {"density": 0.4},
    "dare_linear": {"density": 1.0},
    "dare_linear_svd": {"density": 1.0},
    "dare_ties": {"density": 1.0},
    "dare_ties_svd": {"density": 1.0},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 6)

    def forward(self, x):
        return self.second(torch.tanh(self.first(self.embed(x))))


def base():
    torch.manual_seed(0)
    return Net().eval()


def main():
    lora = {
        "a": LoraConfig(r=2, lora_alpha=8, target_modules=["first", "second"], init_lora_weights=False),
        "b": LoraConfig(r=2, lora_alpha=3, target_modules=["first", "embed"], init_lora_weights=False),
        "c": LoraConfig(r=3, lora_alpha=3, target_modules=["second"], use_rslora=True, init_lora_weights=False),
    }
    x = torch.arange(11).reshape(1, 11)
    model = None
    for i, (name, config) in enumerate(lora.items()):
        torch.manual_seed(10 + i)
        if model is None:
            model = get_peft_model(base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(HERE)
    out = {"base." + k: v.contiguous() for k, v in base().state_dict().items()}
    for name, options in TYPES.items():
        for tag, adapters, weights in (("ab", ["a", "b"], [0.7, -0.4]), ("ac", ["a", "c"], [1.5, 0.5])):
            kind = options.get("combination_type", name)
            if tag == "ac" and kind != "cat" and not kind.endswith("svd"):
                continue
            options = {**options, "combination_type": kind}
            model.add_weighted_adapter(adapters, weights, f"{name}_{tag}", **options)
            model.set_adapter(f"{name}_{tag}")
            out[f"{name}.{tag}"] = model(x).detach()
    for i, name in enumerate(("p", "q")):
        config = IA3Config(target_modules=["first", "second"], feedforward_modules=["second"], init_ia3_weights=False)
        torch.manual_seed(20 + i)
        if i == 0:
            model = get_peft_model(base(), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    model.save_pretrained(HERE)
    model.base_model.add_weighted_adapter(["p", "q"], [0.3, 0.9], "both")
    model.set_adapter("both")
    out["ia3.pq"] = model(x).detach()
    # the pruning of DARE is random: its functions, on given tensors after a given seed
    from peft.utils.merge_utils import dare_linear, dare_ties

    torch.manual_seed(4)
    tensors = [torch.randn(7, 5) for _ in range(3)]
    out["dare.tensors"] = torch.stack(tensors)
    for function in (dare_linear, dare_ties):
        torch.manual_seed(3)
        out[f"dare.{function.__name__}"] = function(tensors, torch.tensor([0.5, -1.0, 2.0]), 0.6)
    save_file(out, HERE / "expected.safetensors")
    for card in HERE.rglob("README.md"):
        card.unlink()


if __name__ == "__main__":
    assert PeftModel.__module__ == "peft.peft_model", sys.path
    main()
