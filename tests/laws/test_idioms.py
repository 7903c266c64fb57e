"""What code written for upstream asks of each module of a model, over every method and every kind of layer.

Names that upstream's layers have stand for dictionaries by adapter; a loop over `modules()` meets them at layers only.
"""

from __future__ import annotations

import pytest
from torch import nn

from peft import LoraConfig, get_peft_model, registry
from peft.contract.method import Method
from peft.contract.tree import Composite
from peft.core.adapted.layer import adapted_layers
from tests.helpers.cells import Cell, cells, refusal

UPSTREAMS = "LORA ADALORA LOHA LOKR VERA OFT BOFT HRA IA3 LN_TUNING TRAINABLE_TOKENS".split()
CELLS = [c for c in cells() if c.first and c.config == dict(registry.methods()[c.method].examples[0])]
METHODS = [c for c in CELLS if c.method in UPSTREAMS and c.kind in ("linear", "embedding") and refusal(c) is None]
KINDS = [c for c in CELLS if c.method == "LORA" and refusal(c) is None]
SIZES = ("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation")
SIZES += ("groups", "num_embeddings", "embedding_dim", "padding_idx", "num_heads", "embed_dim", "nf", "nx")


def over(chosen: list[Cell]):
    return pytest.mark.parametrize("cell", chosen, ids=[c.id for c in chosen])


@over(METHODS)
def test_upstreams_names_are_met_at_layers_only_and_hold_an_entry_by_adapter(cell):
    model, _ = cell.model()
    layers = list(adapted_layers(model))
    names = {n for layer in layers for n in (*layer.adapter_layer_names, *layer.other_param_names)}
    for module in model.modules():
        if isinstance(module, Method):
            assert not [n for n in names if hasattr(module, n)]
    for layer in layers:
        for name in layer.adapter_layer_names:
            assert set(getattr(layer, name)) <= {"default"}
        assert any("default" in getattr(layer, n) for n in layer.adapter_layer_names)


@over(KINDS)
def test_sizes_of_the_base_layer_are_read_on_the_wrapped_one(cell):
    base, _ = cell.base()
    known = {n: {a: getattr(m, a) for a in SIZES if hasattr(m, a)} for n, m in base.named_modules()}
    model = get_peft_model(base, cell.peft_config())
    layers = list(adapted_layers(model))
    assert layers
    for layer in layers:
        assert layer.in_features > 0 and layer.out_features == layer.geometry.out
    for name, sizes in known.items():
        at = base.get_submodule(name) if name else base
        assert {a: getattr(at, a) for a in sizes} == sizes
        if isinstance(at, Composite) and isinstance(at.base_layer, nn.MultiheadAttention):
            assert (at.in_features, at.out_features) == (at.embed_dim, 3 * at.embed_dim)  # as upstream 0.21.2


def test_lora_layers_are_no_wrappers_of_heads():
    from peft.tuners.lora import LoraLayer

    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.emb, self.lin, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.emb

    config = LoraConfig(target_modules=["lin"], modules_to_save=["head"], trainable_token_indices=[1, 2])
    model = get_peft_model(Model(), config)

    def found(cls: type) -> list[str]:
        return [n.removeprefix("base_model.model.") for n, m in model.named_modules() if isinstance(m, cls)]

    assert found(LoraLayer) == ["lin"] and found(ModulesToSaveWrapper) == ["head"]
    assert found(TrainableTokensWrapper) == ["emb"] and found(AuxiliaryTrainingWrapper) == ["emb", "head"]
    assert found(BaseTunerLayer) == ["emb", "lin"]  # upstream's is at emb.token_adapter
    base = model.get_base_model()
    assert [hasattr(m, "original_module") for m in (base.emb, base.lin, base.head)] == [True, False, True]
    assert base.emb.token_adapter.token_indices == {"default": [1, 2]}
    assert base.emb.token_adapter.trainable_tokens_original["default"].shape == (2, 4)
