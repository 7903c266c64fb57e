"""A training that is killed at any point and started again gives what one gives that was left alone."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft.recipes.job import Data, Job
from peft.recipes.run import Run
from tests.helpers import small_models
from tests.hostile import examples, seed

home = small_models.home
KILLED, DONE = 137, 0
# Python tells an audit hook of every call that touches files; steps and the like are told as events of the run.
FILE_CALLS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "shutil.rmtree")
TIMES = ("_runtime", "_per_second")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a child process is killed")

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.2}
ADALORA = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "target_modules": ["q_proj", "up_proj"]}
STEPS = {"max_steps": 7, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "weight_decay": 0.01}
JOBS: dict[str, dict[str, Any]] = {
    "steps": dict(config=LORA, trainer=STEPS | {"save_strategy": "steps", "save_steps": 2, "logging_steps": 3}),
    "epochs, scored and the best taken": dict(
        config=LORA,
        trainer=STEPS
        | {"max_steps": -1, "num_train_epochs": 3, "per_device_train_batch_size": 16}
        | {"eval_strategy": "epoch", "load_best_model_at_end": True, "logging_steps": 2},
    ),
    "a checkpoint at every step": dict(
        config=LORA,
        checkpoint_minutes=1e-9,
        trainer=STEPS
        | {"save_strategy": "no", "train_sampling_strategy": "random", "logging_strategy": "epoch"}
        | {"max_steps": 5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2},
    ),
    "ranks that are pruned": dict(
        method="adalora", config=ADALORA, trainer=STEPS | {"save_strategy": "steps", "save_steps": 1}
    ),
    "a prompt behind a network": dict(
        method="p-tuning",
        config={"num_virtual_tokens": 3, "encoder_hidden_size": 8},
        trainer=STEPS | {"save_strategy": "steps", "save_steps": 2},
    ),
}


def job(home: Path, output: Path, name: str) -> Job:
    data = Data(
        train=str(home / "train.jsonl"),
        eval=str(home / "heldout.jsonl"),
        template=small_models.TEMPLATE,
        choices=["complaint", "no complaint"],
    )
    return Job(model=str(home / "llama"), data=data, output=str(output), show=0, **JOBS[name])


def in_child(work: Callable[[], None]) -> int:
    """Runs `work` in a copy of this process; how that one ended."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(DONE)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(home: Path, output: Path, name: str, kill_at: int | None = None, counted: Path | None = None) -> int:
    """The run, killed at its `kill_at`-th file call below the output folder or event; `counted` gets their number."""
    points = 0

    def point(*_: Any) -> None:
        nonlocal points
        points += 1
        if points == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def heard(event: str, arguments: tuple[Any, ...]) -> None:
        if event in FILE_CALLS and str(arguments[0]).startswith(str(output)):
            point()

    def work() -> None:
        sys.addaudithook(heard)
        Run(job(home, output, name), point).train()
        if counted is not None:
            counted.write_text(str(points))

    found = in_child(work)
    return KILLED if found == -signal.SIGKILL else found


def outcome(output: Path) -> dict[str, Any]:
    """What a run leaves, without what the clock and the machine put into it."""
    found: dict[str, Any] = {
        p.relative_to(output).as_posix(): p.read_bytes()
        for p in sorted(output.rglob("*"))
        if p.is_file() and p.name not in ("metrics.json", ".peft-output.json", "job.yaml")
    }
    metrics = json.loads((output / "metrics.json").read_text())
    del metrics["seconds"], metrics["memory_bytes"], metrics["job"]["output"]
    metrics["history"] = [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in metrics["history"]]
    return found | {"metrics": metrics, "folders": sorted(p.name for p in output.iterdir())}


@pytest.fixture(scope="module")
def whole(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], int]]:
    """What each job gives when nobody kills it, and in how many points it can be killed."""
    known: dict[str, tuple[dict[str, Any], int]] = {}

    def run(name: str) -> tuple[dict[str, Any], int]:
        if name not in known:
            folder = tmp_path_factory.mktemp("whole")
            assert train(home, folder / "run", name, counted=folder / "points") == DONE
            known[name] = outcome(folder / "run"), int((folder / "points").read_text())
        return known[name]

    return run


@pytest.mark.parametrize("name", JOBS)
def test_killed_and_started_again_is_as_never_killed(
    home: Path, tmp_path: Path, whole: Callable[[str], tuple[dict[str, Any], int]], name: str
) -> None:
    expected, points = whole(name)
    draw = random.Random(f"{seed()} {name}")
    for n in range(examples(1)):
        output = tmp_path / str(n) / "run"
        # in the later half mostly, where there is something to go on from; then again in what is left
        kills = [draw.randint(points // 3 if n % 2 == 0 else 1, points), draw.randint(1, points)]
        for kill in [*kills, None]:
            finished = _finished(output)  # then the command says so, and tidies up
            assert train(home, output, name, kill) in (KILLED, DONE) or finished, kills
        assert _finished(output)
        found = outcome(output)
        assert found.keys() == expected.keys(), kills
        for key, value in expected.items():
            assert found[key] == value, (key, kills)


def _finished(output: Path) -> bool:
    return (output / "metrics.json").is_file() and not (output / "checkpoints").exists()
