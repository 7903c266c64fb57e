"""What other code imports from here: which quantisers are installed, and a weight decoded."""

from ..import_utils import (
    is_aqlm_available,
    is_bnb_4bit_available,
    is_bnb_available,
    is_eetq_available,
    is_gptqmodel_available,
    is_hqq_available,
    is_inc_available,
    is_te_pytorch_available,
    is_torchao_available,
    is_torchao_ge_v0_18_0,
)
from .integrations import dequantize_bnb_weight

__all__ = [
    "dequantize_bnb_weight",
    "is_aqlm_available",
    "is_bnb_4bit_available",
    "is_bnb_available",
    "is_eetq_available",
    "is_gptqmodel_available",
    "is_hqq_available",
    "is_inc_available",
    "is_te_pytorch_available",
    "is_torchao_available",
    "is_torchao_ge_v0_18_0",
]
