"""What performance is made of and a machine cannot blur: bytes kept, operations, Python calls, recompiles."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import models, rows
from benchmarks.measure import live_bytes, python_calls, saved_bytes
from peft import BottleneckConfig, IA3Config, LoHaConfig, LoraConfig, VeraConfig, get_peft_model

TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapted(base: nn.Module, **settings) -> nn.Module:
    made = get_peft_model(copy.deepcopy(base), models.lora(**{"task_type": "CAUSAL_LM", **settings}))
    return models.randomise(made.train())


# -- bytes between forward and backward ---------------------------------------------------------------------------------
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_third_more_than_the_frozen_model_is_kept_for_backward(dtype, dropout):
    base, ids = models.llama(dtype=dtype), models.tokens(4, 256)
    kept = {}
    for name, model in (("floor", models.floor(base)), ("ours", adapted(base, lora_dropout=dropout))):
        run = lambda model=model: model(input_ids=ids, labels=ids).loss
        run().backward()
        kept[name] = live_bytes(run), saved_bytes(run)
    (least, least_saved), (live, saved) = kept["floor"], kept["ours"]
    assert live <= 1.33 * least
    assert live - least <= saved - least_saved + 2**16  # nothing is kept but by save_for_backward


@pytest.mark.parametrize("dora", [False, True])
def test_checkpointed_blocks_keep_nothing_of_the_adapters(dora):
    base, ids = models.llama(layers=2), models.tokens(2, 128)
    kept = []
    for model in (models.floor(base), adapted(base, use_dora=dora, lora_dropout=0.05)):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        run = lambda model=model: model(input_ids=ids, labels=ids).loss
        run().backward()
        kept.append(live_bytes(run))
    assert kept[1] <= 1.01 * kept[0]


# -- operations -------------------------------------------------------------------------------------------------------------
class Counted(TorchDispatchMode):
    """The operations that compute something, by name; views and allocations do not count."""

    FREE = ("view", "_unsafe_view", "t", "transpose", "detach", "alias", "slice", "select", "unbind", "empty", "expand",
            "empty_like", "permute", "reshape", "new_empty", "as_strided", "unsqueeze", "squeeze")  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name not in self.FREE:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_linear_layer_takes_two_products_more_forward_and_four_more_backward():
    net = models.Stack([24, 32])
    model = models.randomise(get_peft_model(net, LoraConfig(r=4, target_modules=r".*layers\.\d+")))
    x = torch.randn(2, 5, 24, requires_grad=True)
    with Counted() as forward:
        y = model(x)
    with Counted() as backward:
        y.backward(torch.ones_like(y))
    assert forward.found == ["addmm", "mm", "addmm_"]
    products = [n for n in backward.found if n in ("mm", "addmm_")]
    assert len(products) == 5  # dy W, dy B, dhᵀ x, dyᵀ h, dx += dh A
    assert set(backward.found) - {"mm", "addmm_", "ones_like"} <= {"mul_"} and backward.found.count("mul_") == 2


def test_a_mixed_batch_takes_as_many_operations_for_many_adapters_as_for_few():
    def operations(n: int) -> tuple[int, int]:
        names = [f"a{k}" for k in range(n)]
        config = lambda: LoraConfig(r=4, target_modules=r".*layers\.\d+")
        model = get_peft_model(models.Stack([24, 32, 24]), config(), adapter_name="a0")
        for name in names[1:]:
            model.add_adapter(name, config())
        model.set_requires_grad(names, True)
        x = torch.randn(n, 3, 24)
        model(x, adapter_names=names)
        with Counted() as forward:
            y = model(x, adapter_names=names)
        with Counted() as backward:
            y.backward(torch.ones_like(y))
        setup = {"arange", "eq", "nonzero", "_local_scalar_dense", "cat", "argsort", "sort", "lift_fresh", "index",
                 "repeat_interleave", "_to_copy"}  # fmt: skip
        return len([f for f in forward.found if f not in setup]), len(backward.found)

    assert operations(4) == operations(12)


# -- Python ---------------------------------------------------------------------------------------------------------------
def crowd(layers: int, n: int) -> nn.Module:
    model = get_peft_model(models.llama(hidden=32, layers=layers, inner=64, heads=2, vocabulary=64), models.lora(2))
    for k in range(1, n):
        model.add_adapter(f"a{k}", models.lora(2))
    return model


def test_switching_walks_neither_modules_nor_adapters():
    crowds = [crowd(layers, n) for layers, n in ((1, 2), (6, 2), (1, 9))]
    calls = [python_calls(lambda m=m: m.set_adapter("a1")) for m in crowds]
    assert calls[0] == calls[1] == calls[2] <= 60  # the gate and the calls' contexts are among them


def test_no_work_is_put_off_to_the_forward_after_a_switch():
    model, ids = crowd(2, 3), models.tokens(1, 4, 64)
    run = lambda: model(input_ids=ids)
    with torch.no_grad():
        for name in ("a1", "a2", "a1"):
            model.set_adapter(name)
            run()
        plain = python_calls(run)
        model.set_adapter("a2")
        after = python_calls(run)
    assert after - plain <= 3 * 14  # each of the 14 layers looks up its methods once


def test_adding_an_adapter_costs_the_same_however_many_there_are():
    model = crowd(2, 2)
    first = python_calls(lambda: model.add_adapter("b", models.lora(2)))
    for k in range(30):
        model.add_adapter(f"more{k}", models.lora(2))
    assert python_calls(lambda: model.add_adapter("c", models.lora(2))) <= 1.02 * first


def test_a_resident_adapter_holds_few_bytes_besides_its_weights():
    case = rows.cases("resident", quick=True)[0]
    case.build(Path())
    assert case.sample()["bytes"] <= 4096


# -- compiling ------------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("case", rows.cases("hotswap", quick=True), ids=lambda c: c.name)
def test_twenty_swaps_recompile_nothing(case, tmp_path):
    case.compiler = "eager"
    case.fixture(tmp_path)
    case.build(tmp_path)
    case.forward()
    before = case.compiled
    for k in range(20):
        case.swap(k % 3)
        case.forward()
    assert case.compiled == before > 0


CONFIGS = {
    "LoRA": lambda: LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "LoRA with dropout": lambda: LoraConfig(r=4, lora_dropout=0.1, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "DoRA": lambda: LoraConfig(r=4, use_dora=True, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "LoHa": lambda: LoHaConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "VeRA": lambda: VeraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "IA3": lambda: IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "bottleneck": lambda: BottleneckConfig(bottleneck_size=4, task_type="CAUSAL_LM"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_train_step_compiles_in_one_graph(name):
    torch._dynamo.reset()
    model = models.randomise(get_peft_model(models.llama(32, 1, 64, 2, 64), CONFIGS[name]()).train())
    ids, made = models.tokens(2, 8, 64), []

    def backend(graph, inputs):
        from torch._dynamo.backends.registry import lookup_backend

        made.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    def loss():
        return model(input_ids=ids, labels=ids).loss

    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for _ in range(3):
        compiled().backward()
        found = models.gradients(model)
    assert len(made) == 1 and all(g.isfinite().all() for g in found.values())
    if "dropout" not in name:
        loss().backward()
        for key, g in models.gradients(model).items():
            assert torch.allclose(found[key], g, atol=1e-5, rtol=1e-4), key
