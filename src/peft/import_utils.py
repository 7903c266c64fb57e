"""Which optional packages are installed."""

from __future__ import annotations

import functools
import importlib.util
from importlib.metadata import PackageNotFoundError, version

from packaging.version import parse


@functools.cache
def installed(package: str, least: str | None = None) -> bool:
    """Whether a package can be imported, at a version of `least` or later."""
    try:
        if importlib.util.find_spec(package) is None:
            return False
        return least is None or parse(version(package)) >= parse(least)
    except (PackageNotFoundError, ValueError):
        return False


is_bnb_available = functools.partial(installed, "bitsandbytes")
is_gptqmodel_available = functools.partial(installed, "gptqmodel")
is_auto_gptq_available = functools.partial(installed, "auto_gptq")
is_auto_awq_available = functools.partial(installed, "awq")
is_aqlm_available = functools.partial(installed, "aqlm")
is_eetq_available = functools.partial(installed, "eetq")
is_hqq_available = functools.partial(installed, "hqq")
is_inc_available = functools.partial(installed, "neural_compressor")
is_torchao_available = functools.partial(installed, "torchao")
is_te_available = functools.partial(installed, "transformer_engine")
is_te_pytorch_available = functools.partial(installed, "transformer_engine")
is_optimum_available = functools.partial(installed, "optimum")
is_torchao_ge_v0_18_0 = functools.partial(installed, "torchao", "0.18.0")
is_torch_tpu_available = functools.partial(installed, "torch_xla")
is_diffusers_available = functools.partial(installed, "diffusers")


# whether transformers is this version or later; values, not functions, under upstream's names
is_transformers_ge_v5 = installed("transformers", "5.0.0.dev0")
is_transformers_ge_v5_1_0 = installed("transformers", "5.1.0")
is_transformers_ge_v5_4_0 = installed("transformers", "5.4.0")
is_transformers_ge_v5_6_0 = installed("transformers", "5.6.0")
is_transformers_ge_v5_13_0 = installed("transformers", "5.13.0")
is_transformers_ge_v5_17_0 = installed("transformers", "5.17.0")
is_transformers_le_4_53 = installed("transformers") and not installed("transformers", "4.54.0.dev0")


def is_bnb_4bit_available() -> bool:
    """bitsandbytes with its 4-bit layer."""
    if not is_bnb_available():
        return False
    import bitsandbytes

    return hasattr(bitsandbytes.nn, "Linear4bit")


def is_xpu_available(check_device: bool = False) -> bool:
    """An Intel GPU that torch can use."""
    import torch

    return bool(hasattr(torch, "xpu") and torch.xpu.is_available())
