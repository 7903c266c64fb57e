"""Adapter folders that are damaged or hostile: an error of this library that names the file, or a correct load.

After an error the base is bit-identical and unwrapped. Nothing is written, nothing is fetched, memory is bounded.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import peft
from peft import CheckpointError, PeftModel
from peft.core.files import tensors as reading
from tests.helpers.tiny_llama import llama, logits
from tests.hostile import examples, seed

CONFIG, SAFE, BIN = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BASE = llama()
STATE = {k: v.clone() for k, v in BASE.state_dict().items()}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Valid folders: by this library, by upstream (no header), and `.bin`."""
    home = tmp_path_factory.mktemp("good")
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=2,
        target_modules=["q_proj"],
        bias="lora_only",
        modules_to_save=["norm"],
        rank_pattern={"layers.1.self_attn.q_proj": 3},
        init_lora_weights=False,
    )
    model = peft.get_peft_model(llama(), config)
    model.save_pretrained(home / "own")
    model.save_pretrained(home / "bin", safe_serialization=False)
    model.save_pretrained(home / "upstream")
    save_file(load_file(home / "upstream" / SAFE), home / "upstream" / SAFE, metadata={"format": "pt"})
    return home


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def blocked(*args, **kwargs):
        raise AssertionError("the network was touched")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, blocked)
    monkeypatch.setattr(socket, "getaddrinfo", blocked)


def clean() -> bool:
    now = BASE.state_dict()
    return now.keys() == STATE.keys() and all(torch.equal(v, now[k]) for k, v in STATE.items())


def printable(text: str) -> bool:
    return all(c.isprintable() or c in "\n\t" for c in text)


def load(folder: Path, **how) -> str:
    """ "" where the folder loads and can be taken out again; else the error's text, which names a file or a field."""
    there = sorted(p.name for p in folder.iterdir())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = PeftModel.from_pretrained(BASE, folder, **how)
        except (ValueError, CheckpointError, OSError) as e:
            assert type(e) not in (UnicodeDecodeError, json.JSONDecodeError), repr(e)
            text = str(e)
            assert len(text) < 25_000 and printable(text), text[:500]
            assert text and clean(), text
            assert sorted(p.name for p in folder.iterdir()) == there
            return text
    assert all(printable(str(w.message)) for w in said)
    model.unload()
    assert clean()
    return ""


def folder_of(good: Path, kind: str, tmp_path: Path) -> Path:
    folder = tmp_path / kind
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good / kind, folder)
    return folder


@pytest.mark.parametrize("kind", ["own", "upstream", "bin"])
def test_bytes_flipped_cut_off_or_put_in(kind, good, tmp_path):
    rng = random.Random(seed(1))
    loaded = 0
    for _ in range(examples(60)):
        folder = folder_of(good, kind, tmp_path)
        path = folder / rng.choice([SAFE if kind != "bin" else BIN] * 3 + [CONFIG])
        data = bytearray(path.read_bytes())
        head = min(len(data), 3000)  # what says something is at the start, in an archive at the end, too
        at = rng.choice([rng.randrange(head), len(data) - 1 - rng.randrange(head)])
        match rng.randrange(4):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(1, 9))
            case _:
                del data[at : at + rng.randrange(1, 9)]
        path.write_bytes(data)
        loaded += load(folder, strict=rng.random() < 0.8) == ""
    assert loaded < examples(60)


JUNK = [None, True, False, 0, -1, 3, 10**400, 2**31, 1.5, float("nan"), float("inf"), "", "x", "\x1b[31mred", "a" * 5000, "../x", [], [1], ["q_proj"], [[]], {}, {"a": 1}, {"q_proj": 10**9}, {"": {}}]  # fmt: skip


@pytest.mark.parametrize("kind", ["own", "upstream"])
def test_every_field_of_the_config_with_every_kind_of_value(kind, good, tmp_path):
    rng = random.Random(seed(2))
    fields = sorted(json.loads((good / "own" / CONFIG).read_text()))
    folder = folder_of(good, kind, tmp_path)
    for field in [f for f in fields for _ in range(examples(2))]:
        values = json.loads((good / kind / CONFIG).read_text())
        values[field] = rng.choice(JUNK)
        (folder / CONFIG).write_text(json.dumps(values))
        if kind == "own":  # the header says the same
            rewrite(
                good / kind / SAFE,
                folder / SAFE,
                lambda h, v=values: h["__metadata__"].update(peft_config=json.dumps(v)),
            )
        load(folder)


def rewrite(source: Path, target: Path, change, body=lambda data: data) -> None:
    data = source.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = change(header)
    said = text if isinstance(text, bytes) else json.dumps(header).encode()
    target.write_bytes(len(said).to_bytes(8, "little") + said + body(data[8 + length :]))


def test_every_entry_of_the_header_with_every_kind_of_value(good, tmp_path):
    rng = random.Random(seed(3))
    folder = folder_of(good, "own", tmp_path)

    def change(header):
        key = rng.choice(sorted(header))
        part = rng.choice(sorted(header[key]))
        value = rng.choice([*JUNK, [0, 8], [0.0, 8.0], [-2, -4], [2**40, 2**40], "F4", "BOOL", "I64", "C64", "F8_E5M2"])
        match rng.randrange(5):
            case 0:
                header[key] = value
            case 1:
                del header[key][part]
            case 2:
                header[key + rng.choice(["", "x", "\x1b[2J", "ä" * 300])] = header.pop(key)
            case _:
                header[key][part] = value

    for _ in range(examples(80)):
        rewrite(good / "own" / SAFE, folder / SAFE, change)
        load(folder, strict=rng.random() < 0.7)


def entry(header, **change):
    next(v for k, v in header.items() if k != "__metadata__").update(change)


def doubled(header):
    return json.dumps(header).encode().replace(b'"dtype"', b'"dtype": "F16", "dtype"', 1)


HEADERS = {
    "float offsets": lambda h: entry(h, data_offsets=[float(n) for n in h[min(k for k in h if k != "__metadata__")]["data_offsets"]]),
    "a field twice": doubled,
    "a further field": lambda h: entry(h, more=1),
    "an unknown dtype": lambda h: entry(h, dtype="F7"),
    "a huge shape": lambda h: entry(h, shape=[2**40, 2**40]),
    "negative sizes": lambda h: entry(h, shape=[-2, -16]),
    "deep nesting": lambda h: b'{"a":' * 100_000,
    "huge numbers": lambda h: entry(h, shape=[10**5000]) or json.dumps(h).encode(),
    "a header that is no config": lambda h: h["__metadata__"].update(peft_config="[]"),
    "a config nested deeply": lambda h: h["__metadata__"].update(peft_config="[" * 100_000),
    "a fingerprint of other types": lambda h: h["__metadata__"].update(peft_base='{"shapes": {"x": 3}}'),
    "a vocabulary that is a text": lambda h: h["__metadata__"].update(peft_base='{"vocab_size": "\\u001b[31m"}'),
    "no method": lambda h: h["__metadata__"].update(peft_config="{}"),
}  # fmt: skip


@pytest.mark.parametrize("how", HEADERS)
def test_a_header_that_is_not_as_it_should_be_is_refused(how, good, tmp_path, monkeypatch):
    folder = folder_of(good, "own", tmp_path)
    if how == "huge numbers":
        monkeypatch.setattr(reading.json, "dumps", json.dumps)
    try:
        rewrite(good / "own" / SAFE, folder / SAFE, HEADERS[how])
    except ValueError:  # Python writes no such number either
        data = (good / "own" / SAFE).read_bytes()
        length = int.from_bytes(data[:8], "little")
        said = data[8 : 8 + length].replace(b'"shape":[', b'"shape":[' + b"9" * 5000 + b",", 1)
        (folder / SAFE).write_bytes(len(said).to_bytes(8, "little") + said + data[8 + length :])
    text = load(folder)
    assert SAFE in text or "peft_type" in text
    assert load(folder, strict=False)


def with_tensor(good: Path, tmp_path: Path, make) -> tuple[Path, str]:
    """The folder with one tensor replaced."""
    folder = folder_of(good, "upstream", tmp_path)
    tensors = load_file(good / "upstream" / SAFE)
    key = next(k for k in sorted(tensors) if k.endswith("lora_A.weight"))
    save_file({**tensors, key: make(tensors[key])}, folder / SAFE)
    return folder, key


VALUES = {
    "integers": lambda t: t.to(torch.int64),
    "bytes": lambda t: torch.ones_like(t).to(torch.uint8),
    "bools": lambda t: t > 0,
    "complex": lambda t: t.to(torch.complex64),
    "turned": lambda t: t.T.contiguous(),
    "flat": lambda t: t.flatten(),
    "NaN": lambda t: t * float("nan"),
    "inf": lambda t: t / 0,
    "empty": lambda t: torch.empty(0),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("how", VALUES)
def test_values_that_are_no_weights_are_refused_by_name(how, strict, good, tmp_path):
    folder, key = with_tensor(good, tmp_path, VALUES[how])
    assert key in load(folder, strict=strict)


def test_values_that_overflow_are_refused_and_those_that_fit_are_cast(good, tmp_path):
    folder, key = with_tensor(good, tmp_path, lambda t: t * 1e30)
    base = llama().half()
    with pytest.raises(CheckpointError, match=rf"{key} holds 2?.*e\+(29|30), which torch.float16 cannot"):
        PeftModel.from_pretrained(base, folder, autocast_adapter_dtype=False)
    folder, key = with_tensor(good, tmp_path, lambda t: t.double())
    assert load(folder) == ""
    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"], r=2))
    state = peft.get_peft_model_state_dict(model)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight holds torch\.int64"):
        peft.set_peft_model_state_dict(model, {k: v.long() for k, v in state.items()})


def test_other_sizes_start_fresh_where_that_is_asked_for(good, tmp_path):
    folder, key = with_tensor(good, tmp_path, lambda t: torch.ones(t.shape[0], 5))
    assert key in load(folder) and key in load(folder, strict=False)
    with pytest.warns(UserWarning, match=key):
        model = PeftModel.from_pretrained(llama(), folder, ignore_mismatched_sizes=True)
    fresh = dict(model.named_parameters())[
        "base_model.model.model.layers.0.self_attn.q_proj.adapters.default.lora_A_weight"
    ]
    assert fresh.shape == (2, 16) and 0 < fresh.abs().max() <= 0.25
    assert torch.isfinite(logits(model)).all()
    with pytest.warns(UserWarning, match=key):
        found = model.load_adapter(folder, "more", ignore_mismatched_sizes=True)
    assert found.mismatched_keys == [key]
    state = {**load_file(good / "upstream" / SAFE), key: torch.ones(2, 5)}
    with pytest.raises(CheckpointError, match=key):
        peft.set_peft_model_state_dict(model, state)
    with pytest.warns(UserWarning, match=key):
        assert peft.set_peft_model_state_dict(model, state, ignore_mismatched_sizes=True).mismatched_keys == [key]


# -- sizes --------------------------------------------------------------------------------------------------------------
def peak(monkeypatch) -> list[int]:
    """How many bytes single allocations have, of those that reading makes."""
    sizes, empty = [0], torch.empty

    def counted(*args, **more):
        made = empty(*args, **more)
        sizes.append(0 if made.is_meta else made.nbytes)
        return made

    monkeypatch.setattr(torch, "empty", counted)
    return sizes


def sparse(path: Path, entries: dict[str, tuple[str, list[int], int]], config: bytes = b"") -> None:
    """A file of as many bytes as its header says, that takes no place on the disk."""
    at, header = 0, {}
    for key, (dtype, shape, size) in entries.items():
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    said = json.dumps(header).encode()
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(said)) + said)
        f.truncate(8 + len(said) + at)


def test_a_sparse_file_of_gigabytes_is_compared_before_it_is_read(good, tmp_path, monkeypatch):
    folder = folder_of(good, "upstream", tmp_path)
    keys = sorted(load_file(good / "upstream" / SAFE))
    sparse(folder / SAFE, {k: ("F32", [2, 2**28], 2**31) for k in keys[:4]})
    sizes = peak(monkeypatch)
    for strict in (True, False):
        assert "size mismatch" in load(folder, strict=strict) or keys[4] in load(folder, strict=strict)
    sparse(folder / SAFE, {"base_model.model.model.embed_tokens.weight": ("F32", [2**20, 2**11], 2**33)})
    assert "resize the embeddings" in load(folder)
    assert max(sizes) < 2**24


def test_a_large_file_that_fits_is_read_in_two_steps(good, tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "SMALL", 100)
    for kind in ("own", "upstream", "bin"):
        assert load(good / kind) == ""
        model = PeftModel.from_pretrained(llama(), good / kind).eval()
        monkeypatch.undo()
        assert torch.equal(logits(model), logits(PeftModel.from_pretrained(llama(), good / kind).eval()))
        monkeypatch.setattr(reading, "SMALL", 100)
        model.load_adapter(good / kind, "default")
        assert peft.load_peft_weights(good / kind).keys() == peft.get_peft_model_state_dict(model).keys()
    folder, key = with_tensor(good, tmp_path, lambda t: t * float("nan"))
    assert f"{key} holds NaN or inf" in load(folder)


def test_headers_and_configs_beyond_their_bounds_are_not_parsed(good, tmp_path):
    folder = folder_of(good, "own", tmp_path)
    with (folder / SAFE).open("wb") as f:
        f.write(struct.pack("<Q", 2**26) + b"{")
        f.truncate(2**26 + 8)
    assert "header has 67108864 bytes" in load(folder)
    with (folder / CONFIG).open("wb") as f:
        f.truncate(2**30)
    shutil.copy(good / "upstream" / SAFE, folder / SAFE)
    assert "has 1073741824 bytes" in load(folder)


def test_ranks_beyond_the_file_are_compared_before_there_is_memory_for_them(good, tmp_path, monkeypatch):
    folder = folder_of(good, "upstream", tmp_path)
    for field, value in (("r", 10**9), ("rank_pattern", {"q_proj": 10**9})):
        values = json.loads((good / "upstream" / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**values, field: value}))
        sizes = peak(monkeypatch)
        assert "size mismatch" in load(folder)
        assert max(sizes) < 2**24
        monkeypatch.undo()


def test_the_base_grows_only_for_what_fits(tmp_path, monkeypatch):
    base = llama(vocab_size=80)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[70, 75])
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "good")
    path = tmp_path / "good" / SAFE
    grown = []
    monkeypatch.setattr(type(BASE), "resize_token_embeddings", lambda self, n: grown.append(n))

    def base_says(size):
        return lambda h: h["__metadata__"].update(
            peft_base=json.dumps({**json.loads(h["__metadata__"]["peft_base"]), "vocab_size": size})
        )

    for size in (10**6, 10**12):
        rewrite(path, path, base_says(size))
        assert "more rows of the base's embeddings" in load(tmp_path / "good")
    rewrite(path, path, base_says(80))
    tensors = load_file(path)
    gone = next(k for k in tensors if "lora_A" in k)
    data = {k: v for k, v in tensors.items() if k != gone}
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        meta = json.loads(f.read(length))["__metadata__"]
    save_file(data, path, metadata=meta)
    assert gone in load(tmp_path / "good")
    assert grown == []


# -- what lies in a folder ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["folder", "dangling", "empty", "damaged"])
def test_an_older_bin_is_not_read_for_a_broken_safetensors(how, good, tmp_path):
    folder = folder_of(good, "own", tmp_path)
    shutil.copy(good / "bin" / BIN, folder / BIN)
    (folder / SAFE).unlink()
    if how == "folder":
        (folder / SAFE).mkdir()
    elif how == "dangling":
        os.symlink(tmp_path / "nowhere", folder / SAFE)
    else:
        (folder / SAFE).write_bytes(b"" if how == "empty" else b"\x05" + b"\0" * 99)
    assert SAFE in load(folder)


@pytest.mark.parametrize("text", ["[]", "null", "3", '"x"', "{}", "", "{", '{"peft_type": null}', '{"peft_type": 3}', '{"peft_type": "\\u001b[31mX"}', '{"peft_type": ["LORA"]}', '{"base_model_name_or_path": "x"}'])  # fmt: skip
def test_a_config_that_is_none(text, good, tmp_path):
    folder = folder_of(good, "upstream", tmp_path)
    (folder / CONFIG).write_text(text)
    assert load(folder)
    with pytest.raises(ValueError) as e:
        peft.PeftConfig.from_pretrained(folder)
    assert printable(str(e.value)) and type(e.value) is not UnicodeDecodeError


def test_a_config_that_is_a_folder_or_leads_nowhere(good, tmp_path):
    folder = folder_of(good, "upstream", tmp_path)
    (folder / CONFIG).unlink()
    assert CONFIG in load(folder)
    os.symlink(tmp_path / "nowhere", folder / CONFIG)
    assert CONFIG in load(folder)
    (folder / CONFIG).unlink()
    (folder / CONFIG).mkdir()
    assert CONFIG in load(folder)


def test_with_a_header_nothing_but_the_free_fields_comes_from_the_json(good, tmp_path):
    folder = folder_of(good, "own", tmp_path)
    old = peft.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True, seed=5, lora_alpha=99, revision="old")
    old.save_pretrained(folder)
    with pytest.warns(UserWarning, match="disagrees with the header"):
        found = PeftModel.from_pretrained(llama(), folder).peft_config["default"]
    assert (found.use_dora, found.seed, found.lora_alpha, found.target_modules) == (False, None, 8, {"q_proj"})
    assert found.revision == "old"


class Net(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(4, 4))

    def forward(self, x):
        return next(self.children())(x)


def test_control_characters_of_names_are_shown_escaped(good, tmp_path):
    name = "\x1b[31mred\x07\u202e"
    folder = tmp_path / name
    peft.get_peft_model(Net(name), peft.LoraConfig(target_modules=[name], r=2)).save_pretrained(folder)
    for other in (Net("plain"), Net(name + "x")):
        with pytest.raises(ValueError) as e:
            PeftModel.from_pretrained(other, folder)
        assert printable(str(e.value)) and "\\x1b[31mred" in str(e.value)
    tensors = load_file(folder / SAFE)
    save_file({k + name: v for k, v in tensors.items()}, folder / SAFE)
    with pytest.raises(CheckpointError) as error:
        PeftModel.from_pretrained(Net(name), folder)
    assert printable(str(error.value))
    with pytest.warns(UserWarning) as said:
        PeftModel.from_pretrained(Net(name), folder, strict=False)
    assert all(printable(str(w.message)) for w in said)
    for wrong in (name, "a\0b", "a\nb"):
        with pytest.raises(ValueError) as e:
            peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]), adapter_name=wrong)
        assert printable(str(e.value))
    with pytest.raises(ValueError) as e:
        PeftModel.from_pretrained(llama(), tmp_path, subfolder=f"../{name}")
    assert printable(str(e.value))
