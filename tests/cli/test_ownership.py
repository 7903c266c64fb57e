"""The command line deletes and overwrites nothing that it did not write, and leaves nothing half written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.small_models import causal

ONE = ["--trainer", "max_steps=1"]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def fill(folder: Path, *names: str) -> dict[str, bytes]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"mine: {name}")
    return content(folder)


@pytest.fixture(scope="module")
def trained(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, to be copied."""
    from peft.recipes.job import Data, Job
    from peft.recipes.run import Run

    output = tmp_path_factory.mktemp("trained") / "run"
    data = Data(train=str(home / "train.jsonl"), choices=["complaint", "no complaint"])
    Run(Job(model=str(home / "llama"), data=data, trainer={"max_steps": 1}, output=str(output))).train()
    return output


@pytest.mark.parametrize("restart", [[], ["--restart"]])
@pytest.mark.parametrize(
    "name", ["checkpoints/precious.bin", "checkpoints/checkpoint-9/trainer_state.json", "job.yaml", "loss.png", "a.txt"]
)
def test_a_folder_of_somebody_else_is_left_alone(peft: Any, home: Path, name: str, restart: list[str]) -> None:
    mine = fill(Path("run"), name)
    said = peft(*causal(home, output="run"), *ONE, *restart, code=2)
    assert "is not empty" in said and "another output" in said
    assert content(Path("run")) == mine


def test_a_job_file_of_the_users_own_in_the_output_is_left_alone(peft: Any, home: Path) -> None:
    text = f"model: {home / 'llama'}\ndata: {{train: {home / 'train.jsonl'}, target: null}}\noutput: run\n"
    Path("run").mkdir()
    Path("run/job.yaml").write_text(text)
    for more in ([], ["--restart"]):
        assert "is not empty" in peft("train", "run/job.yaml", *ONE, *more, code=2)
    assert content(Path("run")) == {"job.yaml": text.encode()}


def test_what_the_user_adds_to_a_run_outlives_its_end_and_a_restart(peft: Any, home: Path) -> None:
    peft(*causal(home, output="run"), "--stop-after", 2)
    mine = fill(Path("notes"), "my.txt", "checkpoints/my.txt", "checkpoints/checkpoint-2/my.txt", "adapter/README.md")
    for name, text in mine.items():
        Path("run", name).parent.mkdir(exist_ok=True)
        Path("run", name).write_bytes(text)
    peft(*causal(home, output="run"))
    left = content(Path("run"))
    assert mine.items() <= left.items()
    assert {n for n in left if n.startswith("checkpoints/")} == {n for n in mine if n.startswith("checkpoints/")}
    peft(*causal(home, output="run"), "--restart", *ONE)
    assert mine.items() <= content(Path("run")).items()
    Path("run/loss.png").write_text("mine")
    assert "loss.png stands where" in peft(*causal(home, output="run"), "--restart", *ONE, code=2)
    assert Path("run/loss.png").read_text() == "mine" and Path("run/metrics.json").is_file()


def test_nothing_is_written_through_links(peft: Any, home: Path) -> None:
    Path("elsewhere").mkdir()
    Path("run").symlink_to("elsewhere")
    assert "is a link" in peft(*causal(home, output="run"), *ONE, code=2)
    assert not list(Path("elsewhere").iterdir())
    peft(*causal(home, output="there"), "--stop-after", 1)
    Path("elsewhere/metrics.json").write_text("mine")
    Path("there/adapter").symlink_to(Path("elsewhere").absolute())
    assert "adapter stands where" in peft(*causal(home, output="there"), code=2)
    assert content(Path("elsewhere")) == {"metrics.json": b"mine"}


def test_merge_leaves_what_is_beside_its_output(peft: Any, trained: Path) -> None:
    mine = fill(Path("all"), "out.part/mine.txt", ".out.abcd.part/mine.txt")
    killed = Path("all/.out.0123.part")
    from peft.recipes.outputs import Output

    with Output(killed, "peft merge") as left:
        left.begin()
    (left.staging).mkdir()
    (left.staging / "model.safetensors").write_text("half")
    said = peft("merge", trained, "all/out")
    assert "compared" in said and not killed.exists()
    found = content(Path("all"))
    assert mine.items() <= found.items() and "out/config.json" in found and "out/.peft-output.json" in found
    Path("all/link").symlink_to("nowhere")
    for name in ("out", "link"):
        assert "exists already" in peft("merge", trained, f"all/{name}", code=2)


def test_predict_overwrites_only_when_asked(peft: Any, trained: Path, home: Path) -> None:
    arguments = ["predict", trained, "--text", "the box was wet", "--output"]
    mine = fill(Path("d"), "rows.jsonl", "rows.jsonl.part")
    Path("d/link").symlink_to("rows.jsonl")
    for name, said in (("d/rows.jsonl", "--overwrite"), ("d/link", "is a link"), ("d", "is a folder")):
        assert said in peft(*arguments, name, code=2)
    assert "is a link" in peft(*arguments, "d/link", "--overwrite", code=2)
    assert content(Path("d")) == mine | {"link": mine["rows.jsonl"]}
    peft(*arguments, "d/rows.jsonl", "--overwrite")
    assert json.loads(Path("d/rows.jsonl").read_text())["prediction"]
    assert sorted(os.listdir("d")) == ["link", "rows.jsonl", "rows.jsonl.part"]
    peft(*arguments, "new/deep/rows.jsonl")
    assert Path("new/deep/rows.jsonl").is_file()


def test_a_run_is_taken_up_from_any_folder_and_after_a_move(
    peft: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama", "train.jsonl", "heldout.jsonl"):
        Path(name).symlink_to(home / name)
    peft(*causal(Path(), output="run"), "--stop-after", 2)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert "Going on from step 2 " in peft("train", "../run/job.yaml", "--stop-after", 1)
    Path("../run").rename("../moved")
    assert "Going on from step 3 " in peft("train", "../moved/job.yaml")
    assert Path("../moved/metrics.json").is_file() and not Path("../run").exists() and not os.listdir(".")
    recorded = yaml.safe_load(Path("../moved/job.yaml").read_text())
    paths = [recorded["model"], recorded["data"]["train"], recorded["data"]["eval"], recorded["output"]]
    assert all(Path(p).is_absolute() for p in paths)


def test_changed_rows_models_and_records_are_noticed(peft: Any, home: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(home, "own")
    own = tmp_path / "own"
    peft(*causal(own, output="run"), "--stop-after", 2)
    for name in ("train.jsonl", "heldout.jsonl", "llama/tokenizer.json"):
        file = own / name
        text, stat = file.read_text(), file.stat()
        file.write_text(text.replace("parcel", "carpet", 1) if "llama" not in name else text + "\n")
        os.utime(file, (stat.st_atime, stat.st_mtime))
        said = peft(*causal(own, output="run"), code=2)
        assert f"{file} has changed since" in said and "--restart" in said
        file.write_text(text)
    record = Path("run/job.yaml")
    text = record.read_text()
    record.write_text(text.replace("learning_rate: 0.01", "learning_rate: 0.5"))
    assert "trainer.learning_rate" in peft("train", "run/job.yaml", code=2)
    record.write_text("# why\n" + text)
    assert "Going on from step 2 " in peft("train", "run/job.yaml", "--stop-after", 1)
    assert record.read_text() == "# why\n" + text
    record.write_text("")
    assert "is empty, as a crash" in peft("train", "run/job.yaml", code=2)
    assert "Going on from step 3 " in peft(*causal(own, output="run"), "--stop-after", 1)


def test_a_broken_checkpoint_gives_way_to_the_one_before(peft: Any, home: Path) -> None:
    for _ in range(2):
        peft(*causal(home, output="run"), "--stop-after", 2)
    file = Path("run/checkpoints/checkpoint-4/optimizer.pt")
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    file.write_bytes(damaged)
    assert "Going on from step 2 " in peft(*causal(home, output="run"), "--stop-after", 1)


def test_a_run_of_an_earlier_version_goes_on_and_keeps_its_files(peft: Any, home: Path) -> None:
    peft(*causal(home, output="run"), "--stop-after", 2)
    Path("run/.peft-output.json").unlink()  # as they were written
    Path("run/checkpoints/checkpoint-2/exact.pt").unlink()
    old = content(Path("run"))
    said = peft(*causal(home, output="run"), "--stop-after", 1)
    assert "earlier version" in said and "Going on from step 2 " in said
    assert old.items() <= content(Path("run")).items()
    assert "Empty the folder yourself" in peft(*causal(home, output="run"), "--restart", code=2)
    said = peft(*causal(home, output="run"))
    assert "Going on from step 3 " in said
    left = content(Path("run"))
    assert old.items() <= left.items() and "metrics.json" in left and "adapter/adapter_config.json" in left
    assert not [n for n in left if "checkpoint-3" in n]
    # a crash while the record was written, of which nothing else can be known
    Path("cut/checkpoints/checkpoint-2").mkdir(parents=True)
    Path("cut/checkpoints/checkpoint-2/trainer_state.json").write_text("{}")
    Path("cut/job.yaml").touch()
    assert "job.yaml is empty or cut short" in peft(*causal(home, output="cut"), code=2)


@pytest.fixture
def small_files() -> Iterator[None]:
    """A system that refuses files of more than 30 kB, as one with a full disk would refuse to go on with them."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    signal.signal(signal.SIGXFSZ, former)


def test_a_disk_that_takes_no_more_ends_in_one_message(peft: Any, home: Path, trained: Path, small_files: None) -> None:
    for arguments in (["merge", trained, "out/merged"], causal(home, output="run") + ["--set", "r=64"]):
        said = peft(*arguments, code=2)
        assert said.count("Error:") == 1 and ("larger than this system allows" in said or "disk is full" in said), said
    assert sorted(os.listdir(".")) == ["run"]
    assert sorted(os.listdir("run")) == [".peft-output.json", "checkpoints", "job.yaml"]
    assert os.listdir("run/checkpoints") == ["before.json"]


def test_a_missing_model_folder_is_said_before_the_hub(peft: Any, home: Path, trained: Path) -> None:
    Path("models").mkdir()
    for name in ("models/foo", "foo"):
        said = peft(*causal(home, output="run"), "--model", name, code=2)
        assert said.startswith(f"Error: There is no folder '{name}'") and said.index("hub") > said.index("folder")
    for name in ("./models/foo", "models/foo/", "a/b/c", "~/nowhere", "models\\foo"):
        said = peft(*causal(home, output="run"), "--model", name, code=2)
        assert said.startswith(f"Error: There is no folder or GGUF file {name!r}") and "hub" not in said
    assert not Path("run").exists()
