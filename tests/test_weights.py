"""Files of tensors: ours are read by the safetensors library, the library's by us, and damage is found by either."""

from __future__ import annotations

import gc
import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file

from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights
from peft.core import weights
from peft.core.errors import CheckpointError
from peft.core.light import uninterrupted

DTYPES = [*weights.DTYPES.values(), torch.bool, torch.float8_e4m3fn, torch.complex64]
tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda k: k != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3), st.integers(0, 99)),
    min_size=1,  # the library cannot read what it writes of none
    max_size=6,
)


def make(dtype: torch.dtype, shape: list[int], seed: int) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (8 * torch.rand(shape, generator=rng)).to(dtype)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype is b[k].dtype
        and a[k].shape == b[k].shape
        and a[k].flatten().view(torch.uint8).equal(b[k].flatten().view(torch.uint8))
        for k in a
    )


@hypothesis.settings(deadline=None, max_examples=60)
@hypothesis.given(tensors, st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.text('a"\\é\n')))
def test_both_writers_and_both_readers_agree(tmp_path_factory, made, header):
    held = {k: make(*how) for k, how in made.items()}
    ours, theirs = (str(tmp_path_factory.mktemp("w") / f"{n}.safetensors") for n in "ab")
    weights.write_weights(held, ours, header)
    save_file(held, theirs, metadata=header)
    for path in (ours, theirs):
        assert same(load_file(path), held)
        found = weights.read_weights(path)
        assert same(found.tensors, held) and found.header == header


def test_tensors_that_share_memory_or_are_views(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    held = {"whole": base, "again": base, "turned": base.T, "row": base[1]}
    path = str(tmp_path / "x.safetensors")
    weights.write_weights(held, path, {})
    assert same(load_file(path), {k: v.contiguous() for k, v in held.items()})


def changed(path: Path, change) -> None:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    body = change(header, data[8 + length :])
    said = json.dumps(header).encode()
    path.write_bytes(len(said).to_bytes(8, "little") + said + body)


def swapped(header, body):
    header["a"]["data_offsets"], header["b"]["data_offsets"] = [4, 20], [0, 16]
    return body


def shaped(header, body):
    header["a"]["shape"] = [3, 2]
    return body


def typed(header, body):
    header["a"]["dtype"] = "F64"
    return body


def beyond(header, body):
    header["b"]["data_offsets"] = [16, 64]
    return body


DAMAGE = {
    "overlapping": swapped,
    "another shape": shaped,
    "another dtype": typed,
    "beyond the end": beyond,
    "cut short": lambda header, body: body[:-4],
    "too long": lambda header, body: body + b"1234",
    "no offsets": lambda header, body: header["a"].pop("data_offsets") and body,
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_is_an_error_that_names_the_file(how, tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(2, 2), "b": torch.ones(2, 2)}, path)
    changed(path, DAMAGE[how])
    with pytest.raises(CheckpointError, match=r"x\.safetensors .*damaged or cut short"):
        weights.read_weights(str(path))


@pytest.mark.parametrize(
    "data", [b"", b"\0" * 4, b"\xff" * 16, (2).to_bytes(8, "little") + b"[]", b"\x05" + b"\0" * 20]
)
def test_no_such_file_at_all(data, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        weights.read_weights(str(path))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(bad, dtype, tmp_path):
    path = str(tmp_path / "x.safetensors")
    held = {"good": torch.full((40000,), 60000.0).to(dtype), "bad": torch.tensor([1.0, bad]).to(dtype)}
    weights.write_weights(held, path, {})
    assert weights.not_finite(weights.read_weights(path)) == ["bad"]
    weights.write_weights({"good": held["good"]}, path, {})  # its sum overflows in half precision
    assert weights.not_finite(weights.read_weights(path)) == []


def test_no_collection_while_objects_are_made_and_none_is_kept_from_later_ones():
    runs = []
    gc.callbacks.append(lambda phase, info: runs.append(phase))
    try:
        with uninterrupted():
            ring = [[] for _ in range(5000)]
            for inner in ring:
                inner.append(ring)
            assert not runs
        assert gc.isenabled() and gc.get_freeze_count() == 0
    finally:
        gc.callbacks.pop()
    del ring, inner
    assert gc.collect() >= 5000


def test_what_someone_froze_stays_frozen():
    gc.collect()
    gc.freeze()
    try:
        frozen = gc.get_freeze_count()
        with uninterrupted():
            pass
        assert frozen - 50 < gc.get_freeze_count() <= frozen
    finally:
        gc.unfreeze()


def test_a_regular_file_is_read_at_once_and_nothing_keeps_its_memory(tmp_path):
    def base():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))

    config = LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], init_lora_weights=False)
    saved = get_peft_model(base(), config)
    saved.save_pretrained(tmp_path)
    assert len(weights.read_weights(str(tmp_path / "adapter_model.safetensors")).whole) == 1
    for kwargs in ({}, {"low_cpu_mem_usage": True}):
        loaded = PeftModel.from_pretrained(base(), str(tmp_path), **kwargs)
        loaded.load_adapter(str(tmp_path), "more", **kwargs)
        held = {n: p for n, p in loaded.named_parameters() if ".adapters." in n}
        assert len(held) == 8 and all(p.untyped_storage().nbytes() == p.nbytes for p in held.values())
    alone = load_peft_weights(str(tmp_path))
    assert len(alone) == 4 and all(t.untyped_storage().nbytes() == t.nbytes for t in alone.values())
