"""Promise 37: who acts belongs to the call. What runs beside other calls gets what it gets alone, and leaves no trace."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading

import pytest
import torch

from peft import get_peft_model, registry
from peft.helpers import rescale_adapter_scale
from tests.helpers.cells import randomise
from tests.promises.models import TOKENS, adapted, llama, logits, state
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
    model = get_peft_model(llama(attention_bias=True), config(name), adapter_name="a")
    model.add_adapter("b", config(name))
    model.add_adapter("c", config(name))
    for i, n in enumerate("abc"):
        randomise(model, n, i)
    for i, folder in enumerate("xy"):
        randomise(model, "c", 7 + i)
        model.save_pretrained(tmp_path / folder, selected_adapters=["c"])
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


def test_37_interleaved_contexts_of_one_thread_leave_the_model_as_it_was():
    model = adapted(names=("a", "b"))
    own, out = model.roster.mix, logits(model)
    with model.disable_adapter():
        base = logits(model)
    first, second, third = model.disable_adapter(), model.disable_adapter(), model.use_adapter("b")
    first.__enter__()
    second.__enter__()
    assert torch.equal(logits(model), base)
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), base), "the second is open"
    third.__enter__()
    second.__exit__(None, None, None)
    third.__exit__(None, None, None)
    assert torch.equal(logits(model), out) and model.roster.mix is own and model.roster.enabled


def test_37_coroutines_have_each_their_own():
    model = adapted(names=("a", "b"))
    expected = [logits(model), within(model.disable_adapter(), lambda: logits(model))]
    expected.append(within(model.use_adapter("b"), lambda: logits(model)))

    async def run(context, first: float, second: float) -> list[torch.Tensor]:
        await asyncio.sleep(first)
        with context:
            found = [logits(model)]
            await asyncio.sleep(second)
            return [*found, logits(model), await asyncio.to_thread(logits, model)]

    async def all_three() -> list[list[torch.Tensor]]:
        plain = contextlib.nullcontext()
        disabled, other = model.disable_adapter(), model.use_adapter("b")
        return await asyncio.gather(run(plain, 0.02, 0.03), run(disabled, 0, 0.04), run(other, 0.01, 0.06))

    for found, wanted in zip(asyncio.run(all_three()), expected):
        assert all(torch.equal(f, wanted) for f in found)
    assert torch.equal(logits(model), expected[0])


def halfway(model, change):
    """The logits of a forward that stands still in its second layer while another thread does `change`; and whether
    that was done by then."""
    standing, on, done = threading.Event(), threading.Event(), threading.Event()

    def stand(*_: object) -> None:
        standing.set()
        on.wait(20)

    def changed() -> None:
        standing.wait(20)
        change()
        done.set()

    layer = model.get_base_model().model.layers[1]
    hook = layer.register_forward_pre_hook(stand)
    threads = [threading.Thread(target=changed, daemon=True)]
    out: list[torch.Tensor] = []
    threads.append(threading.Thread(target=lambda: out.append(logits(model)), daemon=True))
    for t in threads:
        t.start()
    standing.wait(20)
    early = done.wait(0.2)
    on.set()
    for t in threads:
        t.join(30)
        assert not t.is_alive()
    hook.remove()
    return out[0], early


def test_37_a_forward_that_has_begun_ends_with_the_adapters_it_began_with(tmp_path):
    model = adapted(names=("a", "b", "c"), base=llama(3))
    model.save_pretrained(tmp_path, selected_adapters=["b"])
    old = logits(model)
    new = within(model.use_adapter("b"), lambda: logits(model))
    changes = {
        "switched": (lambda: model.set_adapter("b"), new, True),
        "disabled": (model.base_model.disable_adapter_layers, None, True),
        "loaded": (lambda: model.load_adapter(tmp_path / "b", "new"), old, True),
        "replaced": (lambda: model.load_adapter(tmp_path / "b", "a"), new, False),
        "merged": (lambda: model.merge_adapter(["c"]), None, False),
        "unmerged": (model.unmerge_adapter, new, False),
        "deleted": (lambda: model.delete_adapter("a"), None, False),
    }
    for name, (change, after, at_once) in changes.items():
        before = logits(model)
        found, early = halfway(model, change)
        assert torch.equal(found, before), name
        assert early is at_once, name
        if after is not None:
            assert torch.allclose(logits(model), after, atol=1e-6), name
        if name in ("switched", "disabled"):
            model.base_model.enable_adapter_layers()
            model.set_adapter("a")
    assert "a" not in model.peft_config


def test_37_a_merged_model_that_one_call_runs_bare_is_merged_for_the_others():
    model = adapted(names=("a", "b"))
    bare = within(model.disable_adapter(), lambda: logits(model))
    model.set_adapter("b")
    model.merge_adapter(["a"])  # what is merged counts, not what is active
    merged, weights = logits(model), state(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), bare)
        (found,) = together(lambda: logits(model))
        assert torch.allclose(found, merged, atol=1e-5)
        (within_both,) = together(lambda: within(model.disable_adapter(), lambda: logits(model)))
        assert torch.equal(within_both, bare) and torch.equal(logits(model), bare)
        with pytest.raises(ValueError, match="disable_adapter"):
            model.merge_adapter()
    assert torch.equal(logits(model), merged) and same_state(state(model), weights)


def test_37_a_context_whose_adapter_was_deleted_is_told_so():
    model = adapted(names=("a", "b"))
    with model.use_adapter("b"):
        model.delete_adapter("b")
        with pytest.raises(ValueError, match="'b' is not loaded"):
            logits(model)
    assert logits(model).isfinite().all()


def test_37_an_interrupted_call_leaves_nothing_open():
    model = adapted(names=("a", "b"))
    out = logits(model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.get_base_model().model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        logits(model, adapter_names=["b", "__base__"])
    hook.remove()
    assert torch.equal(logits(model), out)
    together(lambda: model.delete_adapter("b"))  # another thread's change waits for no call
    assert list(model.peft_config) == ["a"]


def test_37_gradients_of_checkpointed_calls_beside_each_other_are_those_of_each_alone():
    model = adapted(names=("a", "b"))
    model.train()
    model.gradient_checkpointing_enable()
    model.base_model.set_requires_grad(["a", "b"])

    def gradients(name: str) -> list[torch.Tensor]:
        with model.use_adapter(name):
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
        return list(torch.autograd.grad(loss, list(model.adapter_parameters(name))))

    alone = [gradients("a"), gradients("b")]
    for _ in range(3):
        for found, wanted in zip(together(lambda: gradients("a"), lambda: gradients("b")), alone):
            assert isinstance(found, list), found
            assert all(torch.allclose(f, w, atol=1e-6) for f, w in zip(found, wanted))


def test_37_rescaling_may_end_in_any_order():
    model = adapted(names=("a",))
    out = logits(model)
    first, second = rescale_adapter_scale(model, 0.0), rescale_adapter_scale(model, 3.0)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert not torch.equal(logits(model), out)
    second.__exit__(None, None, None)
    assert torch.equal(logits(model), out)
