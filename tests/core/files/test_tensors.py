"""Files of tensors, against the safetensors library: what either writes the other reads, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.core.files import tensors as weights
from peft.errors import CheckpointError

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
    held = {"whole": base, "again": base, "turned": base.T, "row": base[1], "trained": torch.nn.Parameter(base)}
    path = str(tmp_path / "x.safetensors")
    weights.write_weights(held, path, {})
    wanted = {k: v.detach().contiguous() for k, v in held.items()}
    assert same(load_file(path), wanted)
    flag = {"flag": torch.tensor([True])}  # a dtype that goes to the library's writer
    weights.write_weights(held | flag, path, {})
    assert same(load_file(path), wanted | flag)


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


def lopsided(header, body):
    """Offsets whose sum is right."""
    header["a"]["data_offsets"], header["b"]["data_offsets"] = [0, 4], [4, 32]
    return body


def said(value):
    return lambda header, body: header.update(__metadata__=value) or body


DAMAGE = {
    "lopsided": lopsided,
    "a number in the header": said({"peft_base": 3}),
    "a list for a header": said(["a"]),
    "a string for a header": said("a"),
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


def whole_memory(tensors) -> bool:
    return all(t.untyped_storage().nbytes() == t.nbytes for t in tensors)


def test_a_regular_file_is_read_at_once_and_nothing_keeps_its_memory(tmp_path):
    def base():
        torch.manual_seed(0)
        return LlamaForCausalLM(
            LlamaConfig(
                hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32,
                tie_word_embeddings=False,
            )
        )  # fmt: skip

    saved = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    saved.save_pretrained(tmp_path, save_embedding_layers=True)
    assert len(weights.read_weights(str(tmp_path / "adapter_model.safetensors")).whole) == 1
    loaded = PeftModel.from_pretrained(base(), str(tmp_path))
    loaded.load_adapter(str(tmp_path), "more")
    assert whole_memory(loaded.parameters())
    alone = load_peft_weights(str(tmp_path))
    assert len(alone) == 7 and whole_memory(alone.values())
    fresh = get_peft_model(base(), LoraConfig(r=2, target_modules=["q_proj"]), low_cpu_mem_usage=True)
    pieces = torch.arange(64.0).split(32)  # parts of one memory, into parameters that have none yet
    q = "base_model.model.model.layers.0.self_attn.q_proj"
    state = {f"{q}.lora_A.weight": pieces[0].view(2, 16), f"{q}.lora_B.weight": pieces[1].view(16, 2)}
    set_peft_model_state_dict(fresh, state, low_cpu_mem_usage=True)
    held = [p for n, p in fresh.named_parameters() if ".adapters." in n]
    assert [p.flatten()[0].item() for p in held] == [0.0, 32.0] and whole_memory(held)


def test_values_come_into_parameters_made_in_inference_mode_and_between_forward_and_backward():
    def make():
        torch.manual_seed(0)
        return get_peft_model(torch.nn.Sequential(torch.nn.Linear(8, 8)), LoraConfig(r=2, target_modules=["0"]))

    state = get_peft_model_state_dict(make())
    with torch.inference_mode():
        model = make()
    set_peft_model_state_dict(model, state)
    model = make()
    loss = model(torch.ones(1, 8)).sum()
    set_peft_model_state_dict(model, state)  # the very values that forward had
    loss.backward()
