"""Makes or reads the adapters of `live_cases.py` with whatever `peft` is imported: `python -m tests.live.live_worker`.

Its arguments are ROOT SIDE JOB. JOB `make`: every case's adapter, saved under ROOT/SIDE. JOB `read`: the folders the
other side (or this one) made. Both leave a file ROOT/SIDE-JOB.pt: for each case (and maker) its outputs, the warnings and
the error, if there was one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import warnings
import zlib
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import peft
from tests.live.live_cases import CASES, HERE, TASKS, UPSTREAM, Case, build, digest, folder_of, inputs, output
from tests.live.live_configs import defaults, values, variants

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


# -- making -----------------------------------------------------------------------------------------------------------------------
def config_of(case: Case, fields: dict[str, Any]) -> Any:
    return getattr(peft, case.config)(**{"task_type": TASKS.get(case.base), **fields})


def draw(model: nn.Module, seed: str) -> None:
    """Move everything that trains."""
    rng = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
    with torch.no_grad():
        for _, p in sorted((n, p) for n, p in model.named_parameters() if p.requires_grad):
            p.add_(0.25 * torch.randn(p.shape, generator=rng))


def run(model: nn.Module, case: Case) -> Tensor:
    more = {"task_ids": torch.tensor([2, 1])} if case.tasks else {}
    with torch.no_grad():
        return output(model(**inputs(case.base), **more)).clone()


def without_output_projection(model: nn.Module, case: Case, folder: str) -> None:
    for name, p in model.named_parameters():
        if "out_proj" in name and "lora_B" in name:
            p.data.zero_()


def combined(model: nn.Module, case: Case, folder: str) -> None:
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, -0.4], "new", **case.options)


def pruned(model: nn.Module, case: Case, folder: str) -> None:
    """Some training steps, in which AdaLoRA gives ranks away."""
    model.train()
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.01)
    for step in range(1, 6):
        output(model(**inputs(case.base))).square().mean().backward()
        optimiser.step()
        model.base_model.update_and_allocate(step)
        optimiser.zero_grad()
    model.eval()


def make(case: Case, folder: str) -> dict[str, Tensor]:
    base = build(case.base)
    before = digest(base)
    torch.manual_seed(zlib.crc32(case.name.encode()))
    model = peft.get_peft_model(base, config_of(case, dict(case.fields)))
    if case.also is not None:
        model.add_adapter("other", config_of(case, dict(case.also)))
    save = dict(case.save)
    if case.steps == "converted":
        start = os.path.join(folder, "start")
        model.peft_config["default"].init_lora_weights, kind = True, model.peft_config["default"].init_lora_weights
        model.save_pretrained(start)
        model.peft_config["default"].init_lora_weights = kind
        save["path_initial_model_for_weight_conversion"] = start
    for name in case.adapters:
        model.set_adapter(name)
        if not case.weak:
            draw(model, f"{case.name}/{name}")
    model.eval()
    if case.steps and case.steps != "converted":
        globals()[case.steps](model, case, folder)
    if case.selected:
        model.set_adapter(case.selected)
        save["selected_adapters"] = [case.selected]
    model.save_pretrained(folder, **save)
    found = {}
    for name in [case.selected] if case.selected else case.adapters:
        model.set_adapter(name)
        found[name] = run(model, case)
    if case.merged:
        found = {"default": run(model.merge_and_unload(), case)}
    return {**found, "base": run_base(case), "digest": torch.tensor(before)}


def run_base(case: Case) -> Tensor:
    with torch.no_grad():
        return output(build(case.base)(**inputs(case.base)))


# -- reading ----------------------------------------------------------------------------------------------------------------------
def altered(folder: str, case: Case, maker: str) -> str:
    """The files as `case.alter` makes them, in a folder beside."""
    aside = f"{folder} for {SIDE}"
    shutil.rmtree(aside, ignore_errors=True)
    with open(os.path.join(folder, CONFIG)) as f:
        config = json.load(f)
    with safe_open(os.path.join(folder, WEIGHTS), "pt") as f:
        header, tensors = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    assert case.alter is not None
    config, tensors = case.alter(config, tensors, maker)
    os.makedirs(aside)
    if case.as_bin:
        torch.save(tensors, os.path.join(aside, "adapter_model.bin"))
    else:
        save_file(tensors, os.path.join(aside, WEIGHTS), metadata=header)
    with open(os.path.join(aside, CONFIG), "w") as f:
        json.dump(config, f)
    return aside


def read(case: Case, folder: str, maker: str) -> dict[str, Tensor]:
    if case.alter is not None:
        folder = altered(folder, case, maker)
    name = case.selected or "default"
    where = os.path.join(folder, case.selected) if case.selected else folder
    model = peft.PeftModel.from_pretrained(build(case.base), where, adapter_name=name).eval()
    others = () if case.selected else case.adapters[1:]
    for other in others:
        model.load_adapter(os.path.join(folder, other), other)
    found = {}
    for each in (name, *others):
        model.set_adapter(each)
        found[each] = run(model.eval(), case)
    if case.merged:
        found = {"default": run(model.merge_and_unload(), case)}
    return found


# -- configs ----------------------------------------------------------------------------------------------------------------------
def methods() -> dict[str, dict[str, Any]]:
    """This library's methods: the config class, its fields and their defaults."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known

    named = {getattr(name, "value", name): cls for name, cls in known.items()}
    return {name: {"class": cls.__name__, "fields": defaults(cls)} for name, cls in named.items()}


def write_config(folder: str, cls: str, fields: dict[str, Any]) -> dict[str, Any]:
    config = getattr(peft, cls)(**fields)
    config.save_pretrained(folder)
    return {"values": values(config)}


def read_config(folder: str) -> dict[str, Any]:
    config = peft.PeftConfig.from_pretrained(folder)
    return {"class": type(config).__name__, "values": values(config)}


# -- both -------------------------------------------------------------------------------------------------------------------------
def attempt(function: Any, *args: Any) -> dict[str, Any]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found: dict[str, Any] = {"outputs": function(*args), "error": None}
        except Exception as e:
            found = {"outputs": None, "error": f"{type(e).__name__}: {e}"}
    own = [w for w in caught if not issubclass(w.category, (DeprecationWarning, FutureWarning))]
    return {**found, "warnings": sorted({str(w.message) for w in own})}


SIDE = HERE if hasattr(peft, "registry") else UPSTREAM


def main(root: str, side: str, job: str, pattern: str = "") -> None:
    torch.set_num_threads(1)
    results = {}
    for case in CASES.values():
        if not re.search(pattern, case.name):
            continue
        if job == "make" and any(side == maker for maker, _ in case.ways):
            folder = folder_of(root, side, case)
            shutil.rmtree(folder, ignore_errors=True)
            results[case.name] = attempt(make, case, folder)
        for maker, reader in case.ways:
            if job == "read" and side == reader:
                results[case.name, maker] = attempt(read, case, folder_of(root, maker, case), maker)
    if not pattern:
        other = {HERE: UPSTREAM, UPSTREAM: HERE}[side]
        if job == "make":
            results["methods"] = methods()
        for name, (cls, fields) in variants().items():
            folders = {s: os.path.join(root, s, "configs", name) for s in (side, other)}
            results["config", name] = (
                attempt(write_config, folders[side], cls, fields)
                if job == "make"
                else attempt(read_config, folders[other])
            )
    torch.save(results, os.path.join(root, f"{side}-{job}.pt"))


if __name__ == "__main__":
    assert sys.argv[2] == SIDE, f"another peft than {sys.argv[2]}'s: {peft.__file__}"
    main(*sys.argv[1:])
