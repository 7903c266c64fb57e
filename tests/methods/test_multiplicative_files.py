"""Adapters of multiplicative methods that upstream made, with the outputs that it gave (golden/multiplicative)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from peft import PeftModel

GOLDEN = Path(__file__).parents[1] / "golden" / "multiplicative"

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
