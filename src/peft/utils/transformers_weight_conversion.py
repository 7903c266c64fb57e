"""What transformers imports from here."""

from ..core.load.transformers_loader import build_peft_weight_mapping

__all__ = ["build_peft_weight_mapping"]
