"""Stacks of experts in transformers' mixture-of-experts blocks, whose matrices become parts of their own.

U[E, 2i, h] (or U[E, i, h] without a gate) and D[E, h, i] are single parameters, with inputs and outputs swapped where
the block says `is_transposed`, and with stacked biases in some models.
"""

from __future__ import annotations

import inspect
from importlib.util import find_spec

import torch
from torch import nn

from ..contract.kind import Example, Examples, LayerKind
from ..contract.own_forward import forward_of
from ..contract.tree import Composite
from .routed_experts import DOWN, Experts, SortedExperts
from .weight_slice import WeightSlice


class ExpertStack(LayerKind[nn.Module]):
    name = "experts"
    summary = "stacked expert parameters of transformers' mixture-of-experts blocks, by target_parameters"
    for_parameters = True

    def examples(self) -> Examples:
        if find_spec("transformers") is None:
            return {}
        target = {"target_parameters": ["site.gate_up_proj", "site.down_proj"]}

        def make(model: str, implementation: str = "eager") -> Example:
            import transformers
            from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
            from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
            from transformers.models.mixtral.modeling_mixtral import MixtralExperts

            block, config_class = {
                "mixtral": (MixtralExperts, transformers.MixtralConfig),
                "gpt_oss": (GptOssExperts, transformers.GptOssConfig),
                "llama4": (Llama4TextExperts, transformers.Llama4TextConfig),
            }[model]
            config = config_class(hidden_size=16, intermediate_size=24, num_local_experts=3)
            config._experts_implementation = implementation
            layer = block(config)
            for p in layer.parameters():
                nn.init.normal_(p, std=0.2)
            if model == "llama4":
                return layer, torch.randn(6, 16), target
            index = torch.tensor([[0, 1], [2, 0], [1, 2], [2, 1]])  # every expert has tokens
            return layer, (torch.randn(4, 16), index, torch.rand(4, 2)), target

        grouped: Examples = {"grouped": lambda: make("mixtral", "grouped_mm")} if hasattr(torch, "_grouped_mm") else {}
        return {
            "mixtral": lambda: make("mixtral"),
            **grouped,
            "gpt_oss": lambda: make("gpt_oss"),
            "llama4": lambda: make("llama4"),
        }

    def claims(self, module: nn.Module) -> bool:
        return _first(module) is not None

    def stand_in(self, module: nn.Module) -> Composite:
        first = _first(module)
        assert first is not None
        routed = _routed(module)
        transposed = bool(module.is_transposed) if routed else True
        bias = routed and module.has_bias
        slices = {
            name: [
                WeightSlice(module, name, f"{name}_bias" if bias else None, index=e, transposed=transposed)
                for e in range(getattr(module, name).shape[0])
            ]
            for name in (first, DOWN)
        }
        stand_in = Experts(module, slices) if routed else SortedExperts(module, slices)
        stand_in.flipped = not routed  # upstream reads a stack as [E, out, in] unless the module says otherwise
        return stand_in


def _routed(module: nn.Module) -> bool:
    """Whether transformers wrapped its class for its routed implementations; `has_gate` came after version 5.0."""
    return all(hasattr(module, name) for name in ("is_transposed", "has_bias", "_apply_gate"))


def _first(module: nn.Module) -> str | None:
    """The name of the parameter next to the input, where the module keeps the contract of transformers' experts."""

    def stack(name: str) -> bool:
        p = module._parameters.get(name)
        return p is not None and p.dim() == 3

    if not stack(DOWN):
        return None
    forward = forward_of(module)
    if _routed(module):
        if getattr(forward, "__globals__", {}).get("__name__") != "transformers.integrations.moe":
            return None  # a subclass that overrides what the library's decorator made: only its own forward is known
        name = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
        return name if stack(name) else None
    takes = list(inspect.signature(forward).parameters)
    mine = getattr(forward, "__module__", "").startswith("transformers.")
    return "gate_up_proj" if mine and stack("gate_up_proj") and takes == ["self", "hidden_states"] else None


kinds = [ExpertStack()]
