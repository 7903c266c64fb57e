"""What older versions of other libraries cannot do by themselves, whatever adapters a model has."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(n) for n in torch.__version__.split(".")[:2])

compiles_models = pytest.mark.skipif(
    TORCH < (2, 7), reason="torch 2.6 does not compile the wrapper of transformers' models as one graph"
)
