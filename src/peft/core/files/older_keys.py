"""Files made on an older layout of a model, under the keys of the present one."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from ..acting.roster import Adapter
from ..anatomy.older_layouts import renamings_and_conversions, stacked_experts
from ..anatomy.walk import walk
from .keys import root_of


def translate(model: nn.Module, adapter: Adapter, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names of the present layout; what is not known to be older stays as it is."""
    root = root_of(adapter.config)
    places = list(walk(model))
    found = stacked_experts(model, places)
    renamings, _ = renamings_and_conversions(model)
    methods = dict(adapter.methods)
    paths = {p.path for p in places if p.owner is None}
    known = {disk_path if disk_path in paths else disk_path.rpartition(".")[0] for disk_path in methods}

    def fits(body: str) -> bool:
        steps = body.split(".")
        return any(".".join(steps[:i]) in known for i in range(1, len(steps)))

    out: dict[str, Tensor] = {}
    parts: dict[tuple[str, str], dict[str, Tensor]] = {}  # (path of the part, key below) -> old layer -> tensor
    for key, tensor in tensors.items():
        body = key.removeprefix(root)
        if not fits(body):
            new = body
            for r in renamings:
                new = r.rename_source_key(new)[0]
            body = new if fits(new) else body
        for stack in found:
            layers = "|".join(map(re.escape, stack.former))
            old = re.fullmatch(rf"{re.escape(stack.path)}\.(\d+)\.({layers})\.(.+)", body)
            if old is not None:
                parts.setdefault((f"{stack.full}[{int(old[1])}]", old[3]), {})[old[2]] = tensor
                break
        else:
            out[root + body if body != key.removeprefix(root) else key] = tensor
    for (path, key), pieces in parts.items():
        former = next(s.former for s in found if s.full == path.partition("[")[0])
        method = methods.get(path)
        how = method.table.joins.get(key) if method is not None else None
        if how is None or set(pieces) != set(former):
            out.update({f"{root}{path}.{f}.{key}": t for f, t in pieces.items()})  # named by the error that follows
            continue
        ordered = [pieces[f] for f in former]
        out[f"{root}{path}.{key}"] = torch.cat(ordered) if how == "rows" else torch.block_diag(*ordered)
    return out
