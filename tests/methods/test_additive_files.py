"""Adapters of additive methods that upstream made, with the outputs that it gave (golden/additive_methods)."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from peft import PeftModel
from tests.helpers.additive import EXPECTED, GOLDEN, base, inputs

CASES = sorted({k.rsplit(".", 1)[0] for k in EXPECTED if not k.startswith("schedule")})


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
