"""A kernel from its Tucker factors, entry by entry."""

from __future__ import annotations

import pytest
import torch

from peft.maths.tucker import low_rank, tucker


@pytest.mark.parametrize("kernel", [(3,), (2, 3), (2, 1, 3)])
def test_a_kernel_is_the_sum_over_both_ranks(kernel):
    rng = torch.Generator().manual_seed(0)
    core, a, b = (torch.randn(s, generator=rng, dtype=torch.float64) for s in ((2, 2, *kernel), (2, 4), (2, 5)))
    weight = torch.zeros(4, 5, *kernel, dtype=torch.float64)
    for o in range(4):
        for c in range(5):
            for i in range(2):
                for j in range(2):
                    weight[o, c] += a[i, o] * core[i, j] * b[j, c]
    torch.testing.assert_close(tucker(core, a, b), weight.reshape(4, -1))
    torch.testing.assert_close(low_rank(a, b, core), weight.reshape(4, -1))
    torch.testing.assert_close(low_rank(a.T, b), a.T @ b)
