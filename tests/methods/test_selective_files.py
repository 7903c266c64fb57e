"""Adapters of selective methods that upstream made, with the logits that it gave (golden/selective)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from peft import PeftModel
from tests.helpers.selective import IDS, llama

GOLDEN = Path(__file__).parents[1] / "golden" / "selective"


@pytest.mark.parametrize("case", sorted(p.name for p in GOLDEN.iterdir() if p.is_dir()))
def test_adapters_of_upstream_give_upstreams_logits(case, tmp_path):
    state = load_file(GOLDEN / "base.safetensors")
    model = llama(tied=case.endswith("_tied"), state=state)
    peft_model = PeftModel.from_pretrained(model, GOLDEN / case).eval()
    expected = load_file(GOLDEN / case / "expected.safetensors")["logits"]
    with torch.no_grad():
        torch.testing.assert_close(peft_model(IDS).logits, expected, rtol=0, atol=1e-5)
        peft_model.save_pretrained(tmp_path)
        ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path, GOLDEN / case))
        both_ends = {k for k in theirs if k.endswith("lm_head.trainable_tokens_delta")}  # the same rows a second time
        assert ours.keys() == theirs.keys() - both_ends
        assert all(torch.equal(ours[k], theirs[k]) for k in ours)
        torch.testing.assert_close(peft_model.merge_and_unload()(IDS).logits, expected, rtol=0, atol=1e-5)
