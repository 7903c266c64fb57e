"""Blocks that are recomputed in backward run with the adapters of their forward, or say that they do not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from peft.core.acting.mix import Mix
from peft.core.acting.recompute import Recompute
from peft.core.acting.rows import Rows

A, B = Mix(("a",)), Mix(("b",))
FACTOR = {"a": 3.0, "b": 5.0}


class Block(nn.Module):
    """y = f·x² with the factor of the acting adapter, as an adapted layer asks: the mix, after the check."""

    def __init__(self, recompute: Recompute) -> None:
        super().__init__()
        self.__dict__["recompute"] = recompute
        self.ran: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.recompute.check_recompute()
        (name,) = self.recompute.mix.active
        self.ran.append(name)
        return FACTOR[name] * x * x


def again(function, *args: object) -> torch.Tensor:
    return checkpoint(function, *args, use_reentrant=False)


def started(mix: Mix) -> tuple[Recompute, Block, torch.Tensor]:
    recompute = Recompute()
    recompute.mix = mix
    return recompute, Block(recompute), torch.tensor([2.0], requires_grad=True)


def test_a_block_recomputed_under_another_mix_is_refused():
    recompute, block, x = started(A)
    y = again(block, x)
    recompute.mix = B
    with pytest.raises(RuntimeError, match=r"adapters \['b'\], but its forward ran with \['a'\]"):
        y.backward()
    assert x.grad is None and block.ran == ["a"]


def test_a_block_recomputed_under_its_own_mix_gives_its_gradient():
    recompute, block, x = started(A)
    y = again(block, x)
    recompute.mix = Mix(("a",))  # equal, not the same: what counts is who acts
    y.backward()
    assert block.ran == ["a", "a"] and x.grad.item() == 2 * 3.0 * 2.0


def test_a_bound_block_is_recomputed_under_the_mix_of_its_forward():
    recompute, block, x = started(A)
    y = recompute.bound(again)(block, x)
    recompute.mix = B
    y.backward()
    assert block.ran == ["a", "a"] and x.grad.item() == 2 * 3.0 * 2.0
    assert recompute.mix is B  # that of the caller is back


def test_two_bound_forwards_each_have_their_own_mix():
    recompute, block, x = started(A)
    bound = recompute.bound(again)
    y = bound(block, x)
    with recompute.using(B):
        z = bound(block, x)
    (y + z).sum().backward()
    assert sorted(block.ran[2:]) == ["a", "b"] and x.grad.item() == 2 * (3.0 + 5.0) * 2.0


def test_a_block_outside_a_backward_may_run_under_any_mix():
    recompute, block, x = started(A)
    block(x)
    recompute.mix = B
    block(x).backward()
    assert block.ran == ["a", "b"] and x.grad.item() == 2 * 5.0 * 2.0


def test_the_mix_is_put_back_after_an_error_and_its_rows_memory_is_given_back():
    recompute = Recompute()
    rows, factors = Rows(["a", "b"]), [torch.ones(2, 3), torch.ones(2, 3)]
    before = recompute.mix
    with pytest.raises(KeyError), recompute.using(Mix((), rows)):
        assert recompute.mix.rows is rows
        rows.scratch.stack(factors, factors[0])
        assert rows.scratch.held is not None
        raise KeyError
    assert recompute.mix is before and rows.scratch.held is None


def test_a_block_that_fails_leaves_no_recompute_bound():
    recompute, _, x = started(A)

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        recompute.bound(lambda f, *a: f(*a))(fails, x)
    y = again(Block(recompute), x)
    recompute.mix = B
    with pytest.raises(RuntimeError, match="recomputed in backward"):
        y.backward()


def test_binding_wraps_what_was_left_on_modules_once():
    recompute = Recompute()
    with_one, without = nn.Linear(1, 1), nn.Linear(1, 1)
    with_one._gradient_checkpointing_func = again
    recompute.bind_checkpointing([with_one, without])
    wrapped = with_one._gradient_checkpointing_func
    assert wrapped is not again and not hasattr(without, "_gradient_checkpointing_func")
    recompute.bind_checkpointing([with_one])
    assert with_one._gradient_checkpointing_func is wrapped and recompute.bound(wrapped) is wrapped
    assert Recompute().bound(wrapped) is not wrapped  # another model's
    held = SimpleNamespace(ran=[])
    assert wrapped(lambda x: held.ran.append(x) or x * 2, torch.ones(1)).item() == 2 and held.ran
