"""What a run goes on from: which checkpoints count, when they are written, and the sums behind logged losses."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

import peft
from peft.errors import UserError
from peft.recipes.outputs import Output
from peft.recipes.stopping import Stopper
from peft.recipes.trainers import checkpoints


@pytest.fixture
def output(tmp_path: Path) -> Output:
    with Output(tmp_path / "run", "peft train") as found:
        found.begin()
        for step in (2, 10, 9):
            with found.written(f"checkpoints/checkpoint-{step}") as part:
                part.mkdir()
                (part / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
                (part / "optimizer.pt").write_bytes(b"o")
        return found


def test_the_newest_whole_checkpoint_of_its_own_is_taken(output: Output, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / "checkpoint-11").mkdir()  # somebody else's
    (folder / "checkpoint-11" / "trainer_state.json").write_text('{"global_step": 11}')
    assert checkpoints.last(output) == folder / "checkpoint-10"
    (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"x")
    assert checkpoints.last(output) == folder / "checkpoint-9"
    (folder / "checkpoint-9" / "optimizer.pt").unlink()
    assert checkpoints.last(output) == folder / "checkpoint-2"
    output.adopted = True  # a version that kept no list wrote the state last
    assert checkpoints.last(output) == folder / "checkpoint-11"
    (folder / "checkpoint-11" / "trainer_state.json").write_text("")
    assert checkpoints.last(output) == folder / "checkpoint-2"


def test_the_newest_and_the_best_are_kept(output: Output) -> None:
    def left(limit: int | None, wanted: str | None = None) -> list[int]:
        gone = checkpoints.outdated(output, limit, wanted)
        return [s for s in (2, 9, 10) if f"checkpoints/checkpoint-{s}" not in gone]

    assert left(None) == left(3) == left(9) == [2, 9, 10] and left(2) == [9, 10] and left(1) == [10]
    assert left(2, "old/place/checkpoint-2") == [2, 10] and left(1, "checkpoint-9") == [9, 10]


def test_logged_losses_are_those_of_the_trainer_and_survive_an_interruption() -> None:
    losses = [torch.tensor(v) for v in (3.0, 1.0, float("nan"), 2.0, 5.0)]
    whole = checkpoints.Heard()
    for step, loss in enumerate(losses[:4]):
        whole.add(loss, step, filtered=True)
    # an infinite one counts as the mean so far, of which transformers takes the number of steps begun: (3+1)·(1+1/3)
    assert whole.mean(4) == pytest.approx(((3 + 1) * (1 + 1 / 3) + 2) / 4)
    whole.add(losses[4], 4, filtered=True)
    again = checkpoints.Heard()
    again.sum, again.total, again.logged_at = whole.sum, whole.total, whole.logged_at
    assert again.overall(5) == whole.overall(5) and again.mean(5) == whole.mean(5) == 5


def keeper(output: Output, seconds: float = 1e9, stopped: bool = False) -> checkpoints.Keeper:
    stopper = Stopper()
    stopper.stopped = stopped
    return checkpoints.Keeper(seconds, stopper, output)


def ask(asked: checkpoints.Keeper, step: int, epoch: float, **control: bool) -> tuple[bool, bool]:
    """Whether it saves after the step, and at the end of the epoch if that is where the loop goes now."""
    state: Any = SimpleNamespace(global_step=step, max_steps=9, epoch=epoch)
    said: Any = SimpleNamespace(**({"should_save": False, "should_evaluate": False, "should_log": False} | control))
    args: Any = SimpleNamespace(world_size=1)
    asked.on_step_end(args, state, said)
    first, said.should_save = said.should_save, False
    asked.on_epoch_end(args, state, said)
    return first, said.should_save


def test_it_saves_every_few_minutes_at_the_end_and_never_before_an_epochs_own_work(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(keeper(output), 3, 0.5) == (False, False)
    assert ask(keeper(output), 3, 0.5, should_save=True) == (True, False)
    assert ask(keeper(output), 3, 1.0, should_save=True) == (False, True)
    assert ask(keeper(output), 9, 1.5) == (False, True), "the last step is always saved"
    late = keeper(output, seconds=120)
    assert ask(late, 3, 0.5) == (False, False)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now + 121)
    assert ask(late, 4, 0.6) == (True, False)
    late.on_save(*[SimpleNamespace()] * 3)
    assert ask(late, 5, 0.7) == (False, False)


def test_a_stop_within_an_epoch_does_not_do_the_epochs_work(output: Output) -> None:
    said: Any = SimpleNamespace(should_save=True, should_evaluate=True, should_log=True)
    state: Any = SimpleNamespace(global_step=3, max_steps=9, epoch=0.5)
    keeper(output, stopped=True).on_epoch_end(SimpleNamespace(world_size=1), state, said)
    assert not said.should_save and not said.should_evaluate and not said.should_log


def test_the_best_checkpoint_is_found_after_a_move(output: Output, tmp_path: Path) -> None:
    state: Any = SimpleNamespace(best_global_step=9, best_model_checkpoint=None, global_step=10)
    keeper(output).on_train_begin(SimpleNamespace(), state, SimpleNamespace())
    assert state.best_model_checkpoint == str(tmp_path / "run/checkpoints/checkpoint-9")
    state.best_global_step = 4
    assert checkpoints.best(output, state) is None


def model(home: Path, **config: Any) -> peft.PeftModel:
    base = transformers.AutoModelForCausalLM.from_pretrained(home / "llama")
    return peft.get_peft_model(base, peft.AdaLoraConfig(init_r=4, target_r=2, total_step=9, **config))


def test_pruned_ranks_and_what_is_known_of_them_come_back(home: Path, tmp_path: Path) -> None:
    first, second = model(home), model(home)
    ids = torch.randint(3, 40, (2, 6))
    for step in range(1, 5):
        first(input_ids=ids, labels=ids).loss.backward()
        first.update_and_allocate(step)
        with torch.no_grad():
            for p in first.parameters():
                if p.grad is not None:
                    p -= 0.1 * p.grad
                    p.grad = None
    torch.save(checkpoints.snapshot(first), tmp_path / "x.pt")
    checkpoints.restore(second, torch.load(tmp_path / "x.pt", weights_only=True), tmp_path)
    for made in (first, second):
        made(input_ids=ids, labels=ids).loss.backward()
        made.update_and_allocate(5)
    own, other = dict(first.named_parameters()), dict(second.named_parameters())
    assert all(torch.equal(own[n], other[n]) for n in own)
    patterns = [m.peft_config["default"].rank_pattern for m in (first, second)]
    assert patterns[0] == patterns[1] and not all(all(p) for p in patterns[0].values())
    with pytest.raises(UserError, match="does not fit"):
        checkpoints.restore(model(home, target_modules=["k_proj"]), checkpoints.snapshot(first), tmp_path)
