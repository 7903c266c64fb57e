"""Promise 37: who acts belongs to the call. What runs beside other calls gets what it gets alone, and leaves no trace."""

from __future__ import annotations

import sys
import threading

import pytest
import torch

from peft import get_peft_model, registry
from tests.helpers.cells import randomise
from tests.promises.models import TOKENS, llama, state
from tests.promises.models import same as same_state

METHODS = registry.methods()


@pytest.fixture(autouse=True)
def _often():
    """Let threads take turns far more often than they would: in the middle of each forward."""
    was = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(was)


def one_of_each_form() -> list[str]:
    """A method of each form that acts in layers, and every method whose site is the whole model."""
    found = {m.form: name for name, m in reversed(METHODS.items()) if m.form != "prompt"}
    return sorted({*found.values(), "LORA", *(n for n, m in METHODS.items() if m.form == "prompt")})


def together(*jobs) -> list[object]:
    """What each job gives or raises, when all of them start at once in threads of their own."""
    out: list[object] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def run(i: int) -> None:
        start.wait(20)
        try:
            out[i] = jobs[i]()
        except BaseException as e:
            out[i] = e

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(jobs))]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
        assert not t.is_alive(), "a thread hangs"
    return out


def config(name: str):
    cls = METHODS[name]
    fields = {k: v for k, v in cls.examples[0].items() if k != "num_tasks"}
    return cls.config_class(**{"task_type": "CAUSAL_LM", "seed": 3, **fields})


def model_of(name: str, tmp_path):
    """A model with the adapters a, b and c, and the folders `x` and `y` of two that may stand in the place of c."""
    cls = METHODS[name]
    if getattr(cls, "needs_tasks", False):
        pytest.skip("tasks")
    model = get_peft_model(llama(attention_bias=True), config(name), adapter_name="a")
    model.add_adapter("b", config(name))
    model.add_adapter("c", config(name))
    for i, n in enumerate("abc"):
        randomise(model, n, i)
    for i, folder in enumerate("xy"):
        randomise(model, "c", 7 + i)
        model.save_pretrained(tmp_path / folder, selected_adapters=["c"])
        (tmp_path / folder).mkdir(exist_ok=True)
    return model.eval()


def answer(model, **more) -> torch.Tensor:
    tasks = {"task_ids": torch.zeros(2, dtype=torch.long)} if hasattr(model.peft_config["a"], "num_tasks") else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **tasks, **more).logits


def within(context, run) -> torch.Tensor:
    with context:
        return run()


@pytest.mark.parametrize("name", one_of_each_form())
def test_37_threads_get_what_they_get_alone(name, tmp_path):
    model = model_of(name, tmp_path)
    rounds = 3

    def generated(names) -> torch.Tensor:
        with torch.no_grad():
            return model.generate(input_ids=TOKENS, adapter_names=names, max_new_tokens=3, do_sample=False)

    jobs = {
        "plain": lambda: answer(model),
        "rows": lambda: answer(model, adapter_names=["b", "__base__"]),
        "disabled": lambda: within(model.disable_adapter(), lambda: answer(model)),
        "another": lambda: within(model.use_adapter("b"), lambda: answer(model)),
        "several": lambda: within(model.use_adapter(["b", "a"]), lambda: answer(model)),
    }
    if not hasattr(model.peft_config["a"], "num_tasks"):
        jobs["generate"] = lambda: generated(["b", "a"])
    expected = {}
    for job, run in list(jobs.items()):
        try:
            expected[job] = run()
        except ValueError:  # methods that do not go together
            del jobs[job]
    folders = {}
    for folder in "xy":
        model.load_adapter(tmp_path / folder / "c", "c")
        folders[folder] = within(model.use_adapter("c"), lambda: answer(model))
    before, configs, own = state(model), dict(model.peft_config), model.roster.mix

    def replaced(i: int):
        def run():
            model.load_adapter(tmp_path / "xy"[i % 2] / "c", "c")
            return within(model.use_adapter("c"), lambda: answer(model))

        return run

    def come_and_gone(i: int):
        def run():
            model.load_adapter(tmp_path / "x" / "c", f"new {i}")
            found = within(model.use_adapter(f"new {i}"), lambda: answer(model))
            model.delete_adapter(f"new {i}")
            return found

        return run

    for i in range(rounds):
        found = together(*jobs.values(), replaced(i), replaced(i + 1), come_and_gone(i), come_and_gone(i + rounds))
        for job, got in zip(jobs, found, strict=False):
            assert isinstance(got, torch.Tensor), (job, got)
            assert torch.allclose(got, expected[job], atol=1e-5), job
        for got in found[len(jobs) : len(jobs) + 2]:
            assert isinstance(got, torch.Tensor), got
            assert any(torch.allclose(got, f, atol=1e-5) for f in folders.values()), "a mixture of two adapters"
        for got in found[-2:]:
            assert isinstance(got, torch.Tensor), got
            assert torch.allclose(got, folders["x"], atol=1e-5)
    model.load_adapter(tmp_path / "y" / "c", "c")
    assert same_state(state(model), before) and model.peft_config.keys() == configs.keys()
    assert model.roster.mix == own and torch.allclose(answer(model), expected["plain"], atol=1e-6)
