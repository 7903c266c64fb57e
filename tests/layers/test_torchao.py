"""Models that transformers quantises with torchao."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from peft import LoraConfig, PeftModel, get_peft_model
from peft.layers.torchao import TorchAO
from tests.helpers.cells import same_bits

pytest.importorskip("torchao")


def test_torchao_models_of_transformers_save_after_the_adapter_is_taken_out(tiny_llama, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import AutoModelForCausalLM, TorchAoConfig

    def base():
        return AutoModelForCausalLM.from_pretrained(
            tiny_llama, quantization_config=TorchAoConfig(Int8WeightOnlyConfig()), device_map="cpu"
        )

    ids = torch.arange(20).reshape(2, 10)
    model = get_peft_model(base(), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()
    with torch.no_grad():
        out = model(input_ids=ids).logits
        model.save_pretrained(tmp_path / "adapter")
        again = PeftModel.from_pretrained(base(), tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, out)
        assert torch.equal(copy.deepcopy(again)(input_ids=ids).logits, out)
        file = io.BytesIO()
        torch.save(again.state_dict(), file)
        back = again.unload()
        back.save_pretrained(tmp_path / "base")
        reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base", device_map="cpu")
        original = base().state_dict()
        for name, value in reloaded.state_dict().items():
            assert same_bits(value, original[name]), name


@pytest.mark.parametrize(("bits", "levels"), [("int8", 256), ("int4", 16)])
def test_a_weight_is_coded_again_in_the_format_that_it_had(bits, levels):
    kind = TorchAO()
    layer, _ = kind.examples()[bits]()
    assert kind.claims(layer) and not kind.claims(nn.Linear(2, 2))
    merged = nn.Linear(32, 24)
    coded = kind.encode(layer, merged)
    assert type(coded.weight.data) is type(layer.weight.data) and coded.bias is merged.bias
    found, W = kind.decode(coded), merged.weight
    assert all(len(row.unique()) <= levels for row in found)
    step = (W.amax(1) - W.amin(1)) / (levels - 1) * 2  # symmetric codes take up to twice the range
    assert ((found - W).abs() <= step[:, None]).all() and not torch.equal(found, W)
