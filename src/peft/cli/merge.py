"""`peft merge`: the base with the adapter inside its weights, written as a model of its own, and checked."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .. import recipes
from ..errors import UserError
from ..recipes.outputs import Output
from .console import command, console, facts, quiet_libraries, size
from .predict import Adapter, Base, Dtype

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..recipes.saved import Loaded

# How far logits may differ, as a share of the largest: rounding of the dtype over a deep model, no more.
TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 6e-2}

COMMAND = "peft merge"


@command
def merge(
    adapter: Adapter,
    output: Annotated[Path, typer.Argument(help="The folder to write; it must not exist.", show_default=False)],
    model: Base = None,
    dtype: Dtype = "auto",
    text: Annotated[
        str, typer.Option(help="What the check reads.")
    ] = "The parcel came two days late, and the box was wet.",
) -> None:
    """Write the merged model, load it again, and compare its logits with the live adapter's before saying done."""
    import torch

    quiet_libraries()
    if os.path.lexists(output):
        raise UserError(f"{output} exists already. Name a folder that does not; nothing is overwritten.")
    saved = recipes.saved.open_adapter(adapter)
    with console.status("loading base and adapter"):
        loaded = recipes.saved.load(saved, model=model, dtype=dtype)
    batch = probe(loaded, text)
    live = logits(loaded.model, batch)
    with loaded.model.disable_adapter():
        moved = (live - logits(loaded.model, batch)).abs().max().item()
    with console.status("merging"):
        merged = loaded.model.merge_and_unload()
    precision = str(next(p for p in merged.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    with new_folder(output) as made, made.written("") as part:
        with console.status("writing"):
            merged.save_pretrained(str(part))
            loaded.task.tokenizer.save_pretrained(str(part))
        del merged
        with console.status("loading what was written"):
            again = recipes.bases.load_base(recipes.bases.Source(str(part)), type(loaded.task).auto, precision).eval()
        found = logits(again, batch)
        allowed = TOLERANCE.get(precision, 1e-3) * max(1.0, live.abs().max().item())
        difference = (found - live).abs().max().item()
        if found.shape != live.shape or not torch.isfinite(found).all() or not difference <= allowed:
            raise UserError(
                f"The merged model does not compute what base and adapter do: logits differ by {difference:.3g}, "
                f"{allowed:.3g} would be rounding in {precision}. Nothing was written. A higher --dtype may help."
            )
    facts(
        [
            ("merged model", f"{output} ({size(recipes.record.folder_size(output))}, {precision})"),
            ("logits, merged against live adapter", f"differ by {difference:.2e} at most; allowed {allowed:.2e}"),
            ("the adapter moves the logits by", f"{moved:.3g}"),
        ],
        "Written, loaded again and compared",
    )
    if moved == 0:
        console.print("[yellow]The adapter changes nothing on this text: is it trained?[/]")


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Output]:
    """A folder beside `output` with our marker in it, which is called `output` at the end, or is removed on an error.

    What merges that were killed have left beside `output` is removed, too, as far as their markers say it is theirs.
    """
    target, made = output.absolute(), [p for p in output.absolute().parents if not p.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    for left in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with contextlib.suppress(UserError, OSError), Output(left, COMMAND) as folder:
            if folder.marked:
                folder.discard()
    folder = Output(target.with_name(f".{target.name}.{secrets.token_hex(4)}.part"), COMMAND)
    done = False
    try:
        with folder:
            folder.begin()
            yield folder
            os.rename(folder.folder, target)
            done = True
    finally:
        if not done:
            with contextlib.suppress(OSError):
                folder.discard()
            for above in made:
                with contextlib.suppress(OSError):
                    above.rmdir()


def probe(loaded: Loaded, text: str) -> dict[str, Tensor]:
    """A small batch in the form of the task."""
    import torch

    ids = torch.tensor([loaded.task.tokenizer(text).input_ids], device=loaded.model.device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(loaded.model.config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids[:, :8]
    return batch


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    import torch

    with torch.no_grad():
        return model(**batch).logits.float().cpu()
