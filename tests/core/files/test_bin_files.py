"""`.bin`: what torch and upstream read, with a header; and nothing that is more than plain tensors."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from peft import CheckpointError
from peft.core.files.bin_files import write_bin
from peft.core.files.tensors import read_weights

TENSORS = {
    "a": torch.arange(6.0).view(2, 3),
    "turned": torch.arange(6.0).view(2, 3).T,
    "row": torch.arange(12).view(3, 4)[1],
    "half": torch.ones(2).bfloat16(),
    "eight": torch.ones(2).to(torch.float8_e4m3fn),
    "none": torch.empty(0, 4),
    "one": torch.tensor(3.0),
    "flag": torch.tensor([True]),
}


def test_torch_reads_what_is_written_and_the_header_comes_back(tmp_path):
    path = str(tmp_path / "adapter_model.bin")
    write_bin(TENSORS, path, {"peft_config": "{}"})
    found = read_weights(path)
    assert found.header == {"peft_config": "{}"}
    for read in (found.tensors, torch.load(path, weights_only=True), torch.load(path, mmap=True, weights_only=True)):
        assert read.keys() == TENSORS.keys()
        assert all(t.dtype == read[k].dtype and torch.equal(t.double(), read[k].double()) for k, t in TENSORS.items())


@pytest.mark.parametrize(
    "state",
    [TENSORS, OrderedDict(TENSORS), nn.BatchNorm1d(3).state_dict(), {"p": nn.Parameter(torch.ones(2))}, {}],
    ids=["dict", "ordered", "state_dict", "parameter", "empty"],
)
def test_what_torch_has_written_is_read(state, tmp_path):
    path = str(tmp_path / "x.bin")
    torch.save(state, path)
    found = read_weights(path)
    assert found.header == {} and found.tensors.keys() == state.keys()
    assert all(type(t) is torch.Tensor and torch.equal(t.double(), state[k].double()) for k, t in found.tensors.items())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def huge():
    return torch.zeros(1).expand(2**20, 2**20)


BAD = {
    "zero strides": {"x": huge()},
    "overlapping": {"x": torch.zeros(4).as_strided((3, 2), (1, 1))},
    "no tensor": {"x": 3},
    "a nested table": {"x": {"y": torch.ones(1)}},
    "a list": [torch.ones(1)],
    "another key": {3: torch.ones(1)},
    "sparse": {"x": torch.eye(3).to_sparse()},
    "on the meta device": {"x": torch.empty(3, device="meta")},
    "code": {"x": Evil()},
    "a module": {"x": nn.Linear(1, 1)},
}


@pytest.mark.parametrize("how", BAD)
def test_more_than_plain_tensors_is_refused_before_a_value_is_read(how, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(BAD[how], "x.bin")
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match=r"x\.bin cannot be read as plain tensors"):
        read_weights("x.bin")
    assert os.listdir() == ["x.bin"]


def repacked(source, target, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(source) as a, zipfile.ZipFile(target, "w", compression) as b:
        for name in a.namelist():
            b.writestr(name, change(name, a.read(name)))


def test_an_archive_that_lies_about_sizes_is_refused(tmp_path):
    good, bad = str(tmp_path / "good.bin"), str(tmp_path / "bad.bin")
    torch.save({"x": torch.zeros(2**20)}, good)
    ways = {
        "compressed": lambda: repacked(good, bad, compression=zipfile.ZIP_DEFLATED),
        "another size": lambda: repacked(good, bad, lambda n, d: d[:-4] if "/data/" in n else d),
        "missing": lambda: repacked(good, bad, lambda n, d: pickle.dumps(3) if n.endswith("data.pkl") else d),
        "the other byte order": lambda: repacked(good, bad, lambda n, d: b"big" if n.endswith("byteorder") else d),
        "cut short": lambda: Path(bad).write_bytes(Path(good).read_bytes()[:-1000]),
        "empty": lambda: Path(bad).write_bytes(b""),
    }
    repacked(good, bad)
    assert torch.equal(read_weights(bad).tensors["x"], torch.zeros(2**20))
    for how, make in ways.items():
        make()
        with pytest.raises(CheckpointError, match=r"bad\.bin"):
            print(how, read_weights(bad))
