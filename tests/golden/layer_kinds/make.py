"""Makes the fixtures of tests/layers/test_upstream_files.py with huggingface/peft 0.21.2, which must be the imported `peft`.

For each layer kind: an adapter as upstream saves it, and the layer's weights, inputs and output with that adapter.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from peft import LoraConfig, get_peft_model

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[2]))
from tests.helpers.layer_kind_cases import CASES, Holder  # noqa: E402


def make(name, layer, inputs, **config):
    torch.manual_seed(0)
    net = Holder(layer()).eval()
    x = inputs()
    base = {k: v.clone() for k, v in net.state_dict().items()}
    model = get_peft_model(net, LoraConfig(r=2, lora_alpha=4, target_modules=["site"], **config)).eval()
    for n, p in model.named_parameters():
        if "lora_" in n:
            p.data.add_(torch.randn_like(p) * 0.3)
    with torch.no_grad():
        y = model(x)
    folder = HERE / name
    model.save_pretrained(folder)
    (folder / "README.md").unlink()
    save_file({"x": x, "y": y.contiguous(), **base}, folder / "case.safetensors")


for name, (layer, inputs) in CASES.items():
    make(name, layer, inputs)
for name in ("conv2d", "embedding"):
    make(f"{name}_dora", *CASES[name], use_dora=True)
