"""Adapters that come after sharding or wrapping are trained by each process alone: that is said."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from peft import LoraConfig, get_peft_model
from peft.core.injection import sharded


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A group of this process alone, which injection takes for one of two."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    known = {"is_available": lambda: True, "is_initialized": lambda: True, "get_world_size": lambda: 2}
    monkeypatch.setattr(sharded, "dist", SimpleNamespace(**known))
    yield
    dist.destroy_process_group()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def config(**more: bool) -> LoraConfig:
    return LoraConfig(target_modules=["0"], r=2, **more)


def late(model: nn.Module) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        get_peft_model(model, config())
    return [str(w.message) for w in told if "drift apart" in str(w.message)]


def test_a_model_sharded_before_its_adapters(two: None) -> None:
    model = net()
    fully_shard(model[1])
    (said,) = late(model)
    assert "fully_shard" in said and "'default'" in said and "Add adapters first" in said


def test_a_replicated_model_and_one_more_adapter(two: None) -> None:
    model = net()
    wrapper = DistributedDataParallel(model)
    assert "DistributedDataParallel" in late(model)[0]
    del wrapper
    model = get_peft_model(net(), config())
    wrapper = DistributedDataParallel(model)
    with pytest.warns(UserWarning, match="'more' is added to a model that DistributedDataParallel already"):
        model.add_adapter("more", config())
    assert wrapper.module is model


def test_what_is_in_order_is_not_warned_of(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*drift apart")
        model = get_peft_model(net(), config())
        DistributedDataParallel(model)
        shut = net()
        fully_shard(shut)
        get_peft_model(shut, config(inference_mode=True))  # nobody trains it
        monkeypatch.undo()
        alone = net()
        fully_shard(alone)
        get_peft_model(alone, config())
