"""What adapters are on disk: cells of method × example × base, and a description of the files that each cell writes.

A cell builds a base and an adapter, gives the adapter's tensors values that are the same on every machine, saves it,
reads it back on a fresh base and saves that again. `describe` gives what `files.json` holds of it. Everything goes through
the public interface, so that a cell survives any change behind it.

This says that files stay what they are, not that they are right: what is right, the other goldens say, which come from
formulas and from huggingface/peft.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import io
import json
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft import PeftModel, Refusal, get_peft_model, get_peft_model_state_dict, registry, set_peft_model_state_dict

HERE = Path(__file__).parent
TABLE = HERE / "files.json"
FOLDERS = HERE / "adapters"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
IDS = torch.tensor([[1, 5, 2, 7, 11, 3], [4, 9, 6, 0, 13, 8]])
NEAR = 2e-3  # relative: numbers that went through matrix products differ a little between machines


# -- values -------------------------------------------------------------------------------------------------------------
def values(key: str, shape: Any, scale: float) -> Tensor:
    """Numbers in ±scale/2 that depend on key and place alone and that float32 holds exactly: integers, mixed, ÷ 2²⁰.

    scale: a power of two. No value is 0.
    """
    n = torch.Size(shape).numel()
    x = (torch.arange(n, dtype=torch.int64) * 0x9E3779B1 + zlib.crc32(key.encode())) & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    x = (x ^ (x >> 16)) >> 13  # 19 bits
    return ((2 * x + 1 - 2**19).double() / 2**20 * scale).float().reshape(tuple(shape))


def summary(t: Tensor) -> list[float]:
    """The mean of |t| and a mean weighted by place, which a transposed or permuted tensor changes. Signs are left out:
    a decomposition is free in them."""
    flat = t.detach().double().abs().flatten()
    if not len(flat):
        return [0.0, 0.0]
    weight = (torch.arange(len(flat)) * 37 % 101).double() / 101
    return [float(f"{float(v):.4g}") for v in (flat.mean(), (flat * weight).mean())]


# -- bases --------------------------------------------------------------------------------------------------------------
class Net(nn.Module):
    """One layer of each kind, beside one another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 16)
        self.gpt2 = Conv1D(16, 8)
        self.conv1d = nn.Conv1d(8, 16, 3, padding=1)
        self.conv2d = nn.Conv2d(8, 16, 2, padding=1)
        self.grouped = nn.Conv2d(8, 16, 3, padding=1, groups=2)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        x = self.norm(x + self.attention(x, x, x)[0])
        image = x.mT.reshape(len(x), 8, 2, -1)
        found = [self.linear(x), self.gpt2(x), self.conv1d(x.mT), self.conv2d(image), self.grouped(image)]
        return torch.cat([*(y.flatten(1) for y in found), self.head(found[0]).flatten(1)], 1)


Net.__module__ = "net"  # what files name as its library
KINDS = ("linear", "gpt2", "conv1d", "conv2d", "grouped", "embedding", "norm", "attention")

SIZES = {"vocab_size": 32, "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 16}
SIZES |= {"num_key_value_heads": 1, "max_position_embeddings": 32, "pad_token_id": 0}
T5_SIZES = {"vocab_size": 32, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 1, "num_heads": 2}
T5_SIZES |= {"decoder_start_token_id": 0}
EXPERTS = {"num_hidden_layers": 1, "num_local_experts": 3, "num_experts_per_tok": 2}


def _make(name: str) -> nn.Module:
    t = transformers
    if name == "net":
        return Net()
    if name in ("llama", "bf16"):
        return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=True))
    if name == "untied":
        return t.LlamaForCausalLM(t.LlamaConfig(**SIZES, tie_word_embeddings=False))
    if name == "classifier":
        return t.LlamaForSequenceClassification(t.LlamaConfig(**SIZES, num_labels=3))
    if name == "t5":
        return t.T5ForConditionalGeneration(t.T5Config(**T5_SIZES))
    if name == "moe":
        return t.MixtralForCausalLM(t.MixtralConfig(**{**SIZES, **EXPERTS}))
    raise KeyError(name)


@functools.cache
def _base(name: str) -> nn.Module:
    model = _make(name)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(values(key, p.shape, 1.0) + ("norm" in key and p.dim() == 1))
    return model.to(torch.bfloat16 if name == "bf16" else torch.float32).eval()


def base(name: str) -> nn.Module:
    """A fresh copy of a base model, its weights the same on every machine."""
    return copy.deepcopy(_base(name))


@torch.no_grad()
def effect(model: PeftModel, name: str) -> list[float]:
    """What the adapter changes in the base's output."""
    if name == "net":
        run = lambda: model(IDS)
    elif name == "t5":
        run = lambda: model(input_ids=IDS, decoder_input_ids=IDS[:, :4]).logits
    else:
        run = lambda: model(input_ids=IDS).logits
    model.eval()
    with_it = run().float()
    with model.disable_adapter():
        without = run().float()
    return summary(with_it[:, -without.shape[1] :] - without)


# -- cells --------------------------------------------------------------------------------------------------------------
@dataclass
class Cell:
    """One combination: adapters of one method, all of the same config, in a base.

    how: arguments of `get_peft_model`. save: arguments of `save_pretrained`. stored: its files lie in `adapters/`, too.
    """

    method: str
    id: str
    base: str
    config: dict[str, Any]
    names: tuple[str, ...] = ("default",)
    how: dict[str, Any] = field(default_factory=dict)
    save: dict[str, Any] = field(default_factory=dict)
    stored: bool = False

    def peft_config(self) -> Any:
        return registry.methods()[self.method].config_class(**copy.deepcopy(self.config))

    def build(self) -> PeftModel:
        made = base(self.base)
        torch.manual_seed(0)
        model = get_peft_model(made, self.peft_config(), adapter_name=self.names[0], **self.how)
        for name in self.names[1:]:
            model.add_adapter(name, self.peft_config())
        return model

    def load(self, folder: Path) -> PeftModel:
        first, *others = self.names
        more = {k: v for k, v in self.how.items() if k == "autocast_adapter_dtype"}
        model = PeftModel.from_pretrained(base(self.base), _folder(folder, first), adapter_name=first, **more)
        for name in others:
            model.load_adapter(_folder(folder, name), name)
        return model


def _folder(folder: Path, name: str) -> Path:
    return folder if name == "default" else folder / name


def _settings(config: dict[str, Any]) -> str:
    return ",".join(f"{k}={v}" for k, v in config.items()) or "-"


def _takes(method: str, example: dict[str, Any], kind: str) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Cell(method, "", "net", {**example, "target_modules": [kind]}).build()
        except (ValueError, Refusal):
            return False
    return True


def cells(method: str) -> Iterator[Cell]:
    """The cells of a method: its examples on every base, then its first example with what may come along."""
    cls = registry.methods()[method]
    known = {f.name for f in fields(cls.config_class)}
    examples = [dict(e) for e in cls.examples]
    put = functools.partial(Cell, method)
    for n, example in enumerate(examples):
        text = _settings(example)
        if "target_modules" not in known:  # its site is the whole model
            kept = n == 0 and "save_encoder" not in known
            yield put(f"llama [{text}]", "llama", {**example, "task_type": "CAUSAL_LM"}, stored=kept)
            yield put(f"t5 [{text}]", "t5", {**example, "task_type": "SEQ_2_SEQ_LM"})
            yield put(f"classifier [{text}]", "classifier", {**example, "task_type": "SEQ_CLS"})
            yield put(f"moe [{text}]", "moe", {**example, "task_type": "CAUSAL_LM"})
            continue
        for kind in KINDS:
            yield put(f"net.{kind} [{text}]", "net", {**example, "target_modules": [kind]})
        yield put(f"llama, its own targets [{text}]", "llama", {**example, "task_type": "CAUSAL_LM"})
        yield put(
            f"moe, bare parameters [{text}]",
            "moe",
            {**example, "target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
        )
        if n == 0 or method == "LORA":
            yield put(f"moe, w1 w2 w3 [{text}]", "moe", {**example, "target_modules": ["w1", "w2", "w3"]})
            for tied in (False, True):
                ends = {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": tied}
                yield put(f"llama, embeddings, tied={tied} [{text}]", "llama", {**example, **ends})

    example = examples[0]
    many = ("default", "a", "lora_A", "weight", "0", "base_model", "modules_to_save", "ä b")
    if "target_modules" not in known:
        prompt = {**example, "task_type": "CAUSAL_LM"}
        yield put("several adapters", "llama", prompt, names=many)
        yield put("untied", "untied", prompt)
        yield put("modules_to_save", "llama", {**prompt, "modules_to_save": ["norm"]})
        yield put("all embeddings in the file", "llama", prompt, save={"save_embedding_layers": True})
        if "save_encoder" in known:
            yield put("without its network", "llama", {**prompt, "save_encoder": False}, stored=True)
        yield put("bf16", "bf16", prompt)
        yield put("bf16 as it is", "bf16", prompt, how={"autocast_adapter_dtype": False})
        return
    linear = {**example, "target_modules": ["linear"]}
    kinds = [k for k in KINDS if _takes(method, example, k)]
    yield put("net, all it takes", "net", {**example, "target_modules": kinds}, stored=True)
    yield put("t5, its own targets", "t5", {**example, "task_type": "SEQ_2_SEQ_LM"})
    yield put("all-linear", "llama", {**example, "target_modules": "all-linear"})
    yield put("moe, all-linear", "moe", {**example, "target_modules": "all-linear"})
    yield put("untied", "untied", {**example, "target_modules": ["embed_tokens", "lm_head"]})
    yield put("a regex", "net", {**example, "target_modules": r"linear|head", "exclude_modules": ["head"]})
    yield put(
        "some layers", "llama", {**example, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
    )
    yield put("classifier", "classifier", {**example, "task_type": "SEQ_CLS"})
    yield put("modules_to_save", "net", {**linear, "modules_to_save": ["head", "norm"]})
    yield put("bias of all", "net", {**linear, "bias": "all"})
    yield put("bias of its own", "net", {**linear, "bias": f"{method.lower()}_only"})
    tokens = {**example, "target_modules": ["q_proj"], "trainable_token_indices": [1, 3, 4]}
    yield put("tokens", "llama", tokens)
    yield put("tokens of both ends", "llama", {**tokens, "ensure_weight_tying": True})
    yield put("tokens, untied", "untied", {**tokens, "trainable_token_indices": {"embed_tokens": [2], "lm_head": [3]}})
    yield put(
        "saved embeddings, tied",
        "llama",
        {**example, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    )
    yield put(
        "all that comes along",
        "llama",
        {**tokens, "bias": "all", "modules_to_save": ["norm"], "task_type": "CAUSAL_LM", "seed": 3},
    )
    whole = {"save_embedding_layers": True}
    yield put("all embeddings in the file", "llama", {**example, "target_modules": ["q_proj"]}, save=whole)
    yield put("several adapters", "net", linear, names=many)
    yield put("bf16", "bf16", {**example, "target_modules": ["q_proj"]})
    yield put("bf16 as it is", "bf16", {**example, "target_modules": ["q_proj"]}, how={"autocast_adapter_dtype": False})
    if "use_dora" in known:
        for kind in KINDS:
            yield put(f"DoRA, net.{kind}", "net", {**example, "target_modules": [kind], "use_dora": True})
        yield put("DoRA, all-linear", "llama", {**example, "target_modules": "all-linear", "use_dora": True})
        stack = {"target_modules": [], "target_parameters": ["experts.down_proj"], "use_dora": True}
        yield put("DoRA, bare parameters", "moe", {**example, **stack})
    if "rank_pattern" in known:
        ranks = {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}}
        yield put("patterns", "llama", {**example, **ranks})
    for setting, starts in {
        "init_lora_weights": [False, True, "gaussian", "pissa", "pissa_niter_4", "olora", "orthogonal"],
        "init_weights": [False, True],
        "init_ia3_weights": [False],
    }.items():
        for start in starts if setting in known else []:
            yield put(f"{setting}={start}", "net", {**linear, setting: start})
            if start in ("pissa", "olora"):
                plain = {"path_initial_model_for_weight_conversion": "-"}
                yield put(f"{setting}={start}, written as plain pairs", "net", {**linear, setting: start}, save=plain)


# -- descriptions -------------------------------------------------------------------------------------------------------
def read(path: Path) -> tuple[dict[str, Any], bytes, bytes]:
    """(header, header's bytes, tensors' bytes) of a safetensors file."""
    data = path.read_bytes()
    at = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:at]), data[:at], data[at:]


def sha(data: bytes) -> str:
    """The first 24 digits of SHA-256."""
    return hashlib.sha256(data).hexdigest()[:24]


def fill(model: PeftModel, name: str) -> tuple[dict[str, list[float]], dict[str, Tensor]]:
    """Give an adapter its values: (summaries of those it was created with, the new ones), by key in the file."""
    old = get_peft_model_state_dict(model, adapter_name=name)
    new = {k: values(k, t.shape, 0.25).to(t.dtype) if t.is_floating_point() else t.clone() for k, t in old.items()}
    start = {k: summary(t) for k, t in old.items()}  # now: the tensors are the adapter's own
    set_peft_model_state_dict(model, dict(new), adapter_name=name)
    return start, new


def write(cell: Cell, folder: Path) -> dict[str, tuple[dict[str, list[float]], dict[str, Tensor]]]:
    """Save the cell's adapters; gives by name what `fill` gave."""
    model = cell.build()
    known = {name: fill(model, name) for name in cell.names}
    model.save_pretrained(folder, **cell.save)
    return known


def describe(cell: Cell) -> dict[str, Any]:
    """What `files.json` holds of a cell: by adapter its two files, and what it changes in the base's output; for a
    refused cell, the refusal."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        one, two = (Path(stack.enter_context(tempfile.TemporaryDirectory())) for _ in range(2))
        try:
            known = write(cell, one)
        except (ValueError, Refusal) as e:
            return {"refused": f"{type(e).__name__}: {e}"}
        again = cell.load(one)
        again.save_pretrained(two, **{k: v for k, v in cell.save.items() if k == "save_embedding_layers"})
        out: dict[str, Any] = {"adapters": {}}
        for name in cell.names:
            folder = _folder(one, name)
            found = describe_folder(folder, *known[name])
            if name != cell.names[0]:  # the keys are those of the first
                found = {k: v for k, v in found.items() if k.endswith("sha256")}
            out["adapters"][name] = found
            same_files(folder, _folder(two, name))
        expected = {str(_folder(Path(), name) / file) for name in cell.names for file in (CONFIG, WEIGHTS)}
        files = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
        if files != expected:
            out["files"] = sorted(files)
        if again.active_adapter != cell.names[0]:
            again.set_adapter(cell.names[0])
        with contextlib.suppress(NotImplementedError):  # decompositions that torch lacks in half precision
            out["effect"] = effect(again, cell.base)
        return out


def describe_folder(folder: Path, start: dict[str, list[float]], put: dict[str, Tensor]) -> dict[str, Any]:
    """The two files of an adapter. keys: [dtype and shape, summary of the values it was created with].

    The whole weights file goes into the hash where all tensors hold just what was put in. What a network or a
    decomposition gave is not the same to the bit on every machine: then the hash is that of the header.
    """
    text = (folder / CONFIG).read_bytes()
    header, head, body = read(folder / WEIGHTS)
    said = header.pop("__metadata__")
    known = {_bytes(t) for t in put.values()}  # two keys of one tensor hold the value of one of them
    exact = all(body[slice(*e["data_offsets"])] in known for e in header.values())
    keys = {k: [f"{e['dtype']} {'×'.join(map(str, e['shape']))}", *start.get(k, ())] for k, e in header.items()}
    origin = said.pop("peft_base")
    said.pop("peft_config")  # the hash holds it, and its fields are those of `config`
    return {
        "config": json.loads(text),
        "config sha256": sha(text),
        "base": json.loads(origin) if len(origin) < 200 else sha(origin.encode()),
        "header": said,
        "keys": keys,
        ("weights sha256" if exact else "header sha256"): sha(head + body if exact else head),
    }


def _bytes(t: Tensor) -> bytes:
    return bytes(t.contiguous().flatten().view(torch.uint8).tolist())


def same_files(one: Path, two: Path) -> None:
    """Raise an AssertionError that says where two folders of an adapter differ."""
    difference = first_difference(_quick(one), _quick(two))
    assert difference is None, f"read and written again, {difference}"
    for name in (CONFIG, WEIGHTS):
        assert (one / name).read_bytes() == (two / name).read_bytes(), f"read and written again, {name} differs"


def _quick(folder: Path) -> dict[str, Any]:
    header, _, body = read(folder / WEIGHTS)
    said = header.pop("__metadata__")
    keys = {k: [e["dtype"], e["shape"], zlib.crc32(body[slice(*e["data_offsets"])])] for k, e in header.items()}
    return {"config": json.loads((folder / CONFIG).read_bytes()), "header": said, "keys": keys}


# -- the table ----------------------------------------------------------------------------------------------------------
def own_methods() -> list[str]:
    """The methods of the library itself: a test may have added others to the registry."""
    return sorted(name for name, cls in registry.methods().items() if cls.__module__.startswith("peft."))


def write_table(found: dict[str, dict[str, Any]]) -> None:
    """method -> cell -> description, a cell a line. Of a config, only what differs from the method's first."""
    lines = []
    for method, cells_of in found.items():
        common = next(a["config"] for d in cells_of.values() for a in d.get("adapters", {}).values())
        rows = [f' "": {json.dumps(common, ensure_ascii=False)}']
        for name, description in cells_of.items():
            out = copy.deepcopy(description)
            for a in out.get("adapters", {}).values():
                if "config" in a:
                    gone = [k for k in common if k not in a["config"]]
                    a["config"] = {k: v for k, v in a["config"].items() if k not in common or common[k] != v}
                    a |= {"config lacks": gone} if gone else {}
            text = json.dumps(out, ensure_ascii=False, separators=(",", ":"))
            rows.append(f" {json.dumps(name, ensure_ascii=False)}: {text}")
        lines.append(json.dumps(method) + ": {\n" + ",\n".join(rows) + "\n}")
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


@functools.cache
def table() -> dict[str, dict[str, Any]]:
    """What `write_table` was given."""
    found = json.loads(TABLE.read_text(encoding="utf-8"))
    for cells_of in found.values():
        common = cells_of.pop("")
        for description in cells_of.values():
            for a in description.get("adapters", {}).values():
                if "config" in a:
                    gone = a.pop("config lacks", [])
                    fields_of = {**{k: v for k, v in common.items() if k not in gone}, **a["config"]}
                    a["config"] = dict(sorted(fields_of.items()))
    return found


def first_difference(old: Any, new: Any, where: str = "") -> str | None:
    """Where two descriptions differ first, in the order of `old`: dictionaries by key and order, floats up to NEAR."""
    here = where or "it"
    if isinstance(old, dict) and isinstance(new, dict):
        for k in old:
            at = f"{where}[{k!r}]"
            if k not in new:
                more = [n for n in new if n not in old]
                return f"{at} is gone" + (f"; new: {', '.join(map(repr, more[:3]))}" if more else "")
            if (found := first_difference(old[k], new[k], at)) is not None:
                return found
        for k in new:
            if k not in old:
                return f"{where}[{k!r}] is new: {new[k]!r}"
        if list(old) != list(new):
            moved = next((a, b) for a, b in zip(old, new) if a != b)
            return f"the order of {here} changed: {moved[1]!r} stands where {moved[0]!r} stood"
        return None
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        found = (first_difference(a, b, f"{where}[{i}]") for i, (a, b) in enumerate(zip(old, new)))
        return next((f for f in found if f is not None), None)
    if isinstance(old, float) and isinstance(new, float):
        return None if abs(old - new) <= NEAR * abs(old) + 1e-6 else f"{here} was {old!r}, is {new!r}"
    return None if old == new and type(old) is type(new) else f"{here} was {old!r}, is {new!r}"
