"""How transformers' own loader finds the tensors of an adapter file in a model."""

from __future__ import annotations

from typing import Any


def build_peft_weight_mapping(
    weight_conversions: list[Any] | None, adapter_name: str, peft_config: Any = None
) -> list[Any]:
    """The renamings that transformers applies to the keys of an adapter file before those of each adapted layer.

    The wrapper's prefix goes; the base model's own renamings follow, for files made on an older layout. Where a tensor
    lands below its layer is the layer's to say: `adapter_state_dict_load_map`.
    """
    from transformers.core_model_loading import WeightRenaming

    renamings = [c for c in weight_conversions or () if isinstance(c, WeightRenaming)]
    return [WeightRenaming(r"^base_model\.model\.", ""), *renamings]
