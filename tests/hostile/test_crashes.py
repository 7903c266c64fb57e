"""Saving, killed at every file call, and beside other writers and readers: the old adapter or the new one."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import peft
from peft.core.files.adapter_files import read
from peft.core.files.header import FREE
from peft.local_files import _aside, replace_files
from tests.hostile import examples

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be killed")


@pytest.fixture
def tmp_path():
    """In memory where that is possible: hundreds of saves that each wait for a disk take a minute."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        yield Path(folder)


EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.scandir", "os.listdir", "os.chmod", "os.truncate"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.linear(x)))


def adapter(seed: int, config: peft.PeftConfig):
    torch.manual_seed(seed)
    model = peft.get_peft_model(Net(), config)
    for p in model.adapter_parameters("default"):
        p.data.normal_()
    return model


def lora(**more):
    return peft.LoraConfig(**{"r": 2, "target_modules": ["linear"], **more})


ADAPTERS = {
    "plain": lambda: lora(),
    "other fields": lambda: lora(
        lora_alpha=32, use_rslora=True, seed=3, init_lora_weights=False, rank_pattern={"x": 3}
    ),
    "DoRA": lambda: lora(use_dora=True),
    "companions": lambda: lora(modules_to_save=["head"], bias="all"),
    "IA3": lambda: peft.IA3Config(target_modules=["linear"], feedforward_modules=[]),
    "OFT": lambda: peft.OFTConfig(target_modules=["linear"], oft_block_size=4, r=0),
}


def state(folder: Path) -> tuple[object, ...]:
    """Which adapter a reader finds."""
    found = read(folder)
    config = {k: str(v) for k, v in found.config.to_dict().items() if k not in FREE}
    return tuple(sorted(config.items())), tuple(
        (k, tuple(t.flatten().tolist())) for k, t in sorted(found.tensors.items())
    )


def forked(work) -> int:
    """Run in a process of its own; its status as `os.waitpid` gives it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def status(child: int) -> int:
    return os.waitpid(child, 0)[1]


def killed_at(call: int, work) -> bool:
    """Run `work` in a process that is killed at its n-th file call; False where it came to its end before."""

    def run() -> None:
        seen = [0]

        def count(*args: object) -> None:
            seen[0] += 1
            if seen[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)

        fsync, close, write = os.fsync, os.close, os.write
        os.fsync = lambda fd: (count(), fsync(fd))[1]
        os.close = lambda fd: (count(), close(fd))[1]
        os.write = lambda fd, data: (count(), write(fd, data))[1]
        sys.addaudithook(lambda event, args: count() if event in EVENTS else None)
        work()

    code = status(forked(run))
    assert code in (0, signal.SIGKILL), code
    return code == signal.SIGKILL


PAIRS = [
    ("plain", True, "other fields", True),
    ("other fields", True, "plain", True),
    ("other fields", False, "plain", False),
    ("plain", True, "other fields", False),
    ("other fields", False, "plain", True),
    ("companions", True, "plain", True),
    ("plain", False, "companions", True),
    ("DoRA", True, "IA3", False),
    ("IA3", True, "OFT", True),
]


@pytest.mark.parametrize(("old", "old_safe", "new", "new_safe"), PAIRS)
def test_killed_at_any_file_call_a_reader_finds_the_old_adapter_or_the_new(old, old_safe, new, new_safe, tmp_path):
    first, second = adapter(1, ADAPTERS[old]()), adapter(2, ADAPTERS[new]())
    folders = [tmp_path / "old", tmp_path / "new"]
    first.save_pretrained(folders[0], safe_serialization=old_safe)
    second.save_pretrained(folders[1], safe_serialization=new_safe)
    known = [state(f) for f in folders]
    seen, folder = [], tmp_path / "both"
    for call in range(1, 200):
        first.save_pretrained(folder, safe_serialization=old_safe)
        assert len(list(folder.iterdir())) == 2, "left-overs of the one that was killed are swept"
        more = killed_at(call, lambda: second.save_pretrained(folder, safe_serialization=new_safe))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            seen.append(known.index(state(folder)))
            if seen[-2:] == [0, 1] or not more:
                peft.PeftModel.from_pretrained(Net(), folder)
        if not more:
            break
    assert len(seen) > 8 and seen[0] == 0 and seen[-1] == 1 and seen == sorted(seen)


def test_a_reader_beside_a_writer_finds_one_of_its_adapters(tmp_path):
    made = [(adapter(n, c()), n % 2 == 0) for n, c in enumerate(ADAPTERS.values())]
    known = []
    for n, (model, safe) in enumerate(made):
        model.save_pretrained(tmp_path / str(n), safe_serialization=safe)
        known.append(state(tmp_path / str(n)))
    folder = tmp_path / "shared"
    made[0][0].save_pretrained(folder)

    def write() -> None:
        for _ in range(examples(15)):
            for model, safe in made:
                model.save_pretrained(folder, safe_serialization=safe)

    child, seen = forked(write), set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while os.waitpid(child, os.WNOHANG) == (0, 0):
            seen.add(known.index(state(folder)))
    assert len(seen) > 1


def test_two_writers_leave_one_of_both_adapters_and_nothing_else(tmp_path):
    one, two = adapter(1, ADAPTERS["plain"]()), adapter(2, ADAPTERS["other fields"]())
    one.save_pretrained(tmp_path / "one")
    two.save_pretrained(tmp_path / "two", safe_serialization=False)
    known = [state(tmp_path / "one"), state(tmp_path / "two")]

    def repeat(model, safe):
        for _ in range(examples(20)):
            model.save_pretrained(tmp_path / "shared", safe_serialization=safe)

    children = [forked(lambda m=m, s=s: repeat(m, s)) for m, s in ((one, True), (two, False), (one, True))]
    assert [status(c) for c in children] == [0, 0, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert state(tmp_path / "shared") in known
    assert len(list((tmp_path / "shared").iterdir())) == 2


def test_what_a_living_writer_or_a_user_keeps_aside_is_not_swept(tmp_path):
    fd, path = _aside(str(tmp_path))
    (tmp_path / ".adapter_mine.tmp").write_text("a user's")
    replace_files(str(tmp_path), {"x": lambda p: Path(p).write_text("new")})
    assert os.path.exists(path) and (tmp_path / ".adapter_mine.tmp").exists()
    os.close(fd)  # as its process ends
    replace_files(str(tmp_path), {"x": lambda p: Path(p).write_text("new")})
    assert not os.path.exists(path) and {p.name for p in tmp_path.iterdir()} == {"x", ".adapter_mine.tmp"}
