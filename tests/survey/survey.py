"""All-linear LoRA on one type of transformers' models: forward equals merged, every factor has a gradient."""

from __future__ import annotations

import contextlib
import functools
import signal
import time
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from .tiny import NotBuilt, TooLong, build, short, tensors

TOLERANCE = 2e-3  # of the largest output: fp32 and, in many models, sums of hundreds of terms in another order


@dataclass
class Result:
    model_type: str
    task: str
    verdict: str = ""  # ok, fault, left out
    reason: str = ""
    adapted: int = 0
    passed_over: list[str] = field(default_factory=list)
    seconds: float = 0.0
    error: float = 0.0

    def row(self) -> dict[str, object]:
        return asdict(self)


def mapping_of(task: str) -> object:
    from transformers.models.auto import modeling_auto

    return {"causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, "base": modeling_auto.MODEL_MAPPING}[task]


def types_of(task: str) -> list[str]:
    from transformers.models.auto import modeling_auto

    names = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "base": modeling_auto.MODEL_MAPPING_NAMES,
    }[task]
    return sorted(names)


def _run(model: nn.Module, inputs: dict[str, Tensor], seed: int = 7) -> list[Tensor]:
    torch.manual_seed(seed)
    return tensors(model(**{n: t.clone() for n, t in inputs.items()}))


def _again(model: nn.Module, state: dict[str, Tensor], inputs: dict[str, Tensor]) -> list[Tensor]:
    """A run that starts from these buffers."""
    for name, buffer in model.named_buffers():
        if name in state and buffer.shape == state[name].shape:
            buffer.copy_(state[name])
    return _run(model, inputs)


def _loss(outs: list[Tensor]) -> Tensor:
    torch.manual_seed(11)
    total = torch.zeros(())
    for o in outs:
        if o.requires_grad:
            total = total + (o * torch.randn(o.shape).to(o)).sum() / max(
                float(o.detach().float().std(unbiased=False)), 1e-6
            )
    return total


def _worst(a: list[Tensor], b: list[Tensor]) -> float:
    if len(a) != len(b) or any(x.shape != y.shape for x, y in zip(a, b, strict=True)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        both = torch.isfinite(x) & torch.isfinite(y)
        if not bool((torch.isfinite(x) == torch.isfinite(y)).all()):
            return float("inf")
        x, y = torch.where(both, x, 0), torch.where(both, y, 0)
        scale = float(x.abs().max().clamp_min(1e-6))
        worst = max(worst, float((x - y).abs().max()) / scale)
    return worst


def _reached(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, bool]:
    """For each weight of the plain model, whether the loss depends on it."""
    model.requires_grad_(True)
    outs = _run(model, inputs)
    loss = _loss(outs)
    if loss.requires_grad:
        loss.backward()
    found = {
        n: p.grad is not None and bool(p.grad.abs().max() > 0)
        for n, p in model.named_parameters(remove_duplicate=False)
        if p.is_floating_point() and p.numel()
    }
    model.zero_grad(set_to_none=True)
    model.requires_grad_(False)
    return found


def check(model: nn.Module, inputs: dict[str, Tensor], result: Result) -> str:
    """What is wrong with all-linear LoRA on this model; "" if nothing."""
    from peft import LoraConfig, dry_run, get_peft_model
    from peft.core.adapted.layer import adapted_layers

    again = _worst(_run(model, inputs), _run(model, inputs))
    if again > 1e-5:
        raise NotBuilt(f"its forward is not a function of its inputs ({again:.1e})")
    try:
        reached = _reached(model, inputs)
    except Exception as e:
        raise NotBuilt(f"the plain model gives no gradients: {short(e)}") from e
    modes = ["eval"]
    with contextlib.suppress(Exception):  # a model that wants labels to train, say
        _run(model.train(), inputs)
        modes.append("train")
    model.eval()
    plain = [o.detach() for o in _run(model, inputs)]
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    result.passed_over = [f"{path}: {why}" for path, why in dry_run(model, config).passed_over.items()]
    peft = get_peft_model(model, config)
    layers = list(adapted_layers(peft))
    result.adapted = len(layers)
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in layers:
            for n, p in layer.named_parameters():
                if "lora_" in n:
                    p.copy_(torch.randn_like(p) * (0.1 if "lora_A" in n else 0.02))
    faults, worst = [], 0.0
    for mode in modes:
        peft.train(mode == "train")
        fresh = functools.partial(_again, model, {n: b.clone() for n, b in model.named_buffers()}, inputs)
        if mode == "train" and _worst(fresh(), fresh()) > 1e-5:
            continue  # random in training by its own: nothing to compare
        full = fresh()
        if (
            mode == "eval"
            and _worst([f.detach() for f in full], plain) == 0.0
            and any(reached.get(f"{x.path}.weight", False) for x in layers)
        ):
            faults.append("no effect")
        loss = _loss(full)
        if loss.requires_grad:
            loss.backward()
        missing = [
            x.path
            for x in layers
            if reached.get(f"{x.path}.weight", False)
            and any(p.grad is None or not bool(p.grad.abs().max() > 0) for p in x.parameters() if p.requires_grad)
        ]
        if missing:
            faults.append(f"{mode}: no gradient at {len(missing)} of {len(layers)}, {missing[0]}")
        peft.zero_grad(set_to_none=True)
        peft.merge_adapter()
        error = _worst([f.detach() for f in full], [o.detach() for o in fresh()])
        worst = max(worst, error)
        peft.unmerge_adapter()
        if error > TOLERANCE:
            faults.append(f"{mode}: forward and merged differ by {error:.1e}")
    result.error = worst
    return "; ".join(faults)


def survey(model_type: str, task: str, limit: int = 60) -> Result:
    """The verdict on one type; never raises."""
    result = Result(model_type, task)
    start = time.perf_counter()

    def late(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(limit)
    try:
        model, inputs = build(model_type, mapping_of(task))
        fault = check(model, inputs, result)
        if "differ" in fault:  # a choice among near ties (the best queries of a detector): without rounding?
            model, inputs = build(model_type, mapping_of(task))
            inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
            fault = check(model.double(), inputs, result)
        result.verdict, result.reason = ("fault", fault) if fault else ("ok", "")
    except NotBuilt as e:
        result.verdict, result.reason = "left out", str(e)
    except TooLong:
        result.verdict, result.reason = "left out", "too slow"
    except Exception as e:
        if result.verdict == "" and ("no linear layer" in str(e)):
            result.verdict, result.reason = "left out", "it has no linear layer"
        else:
            result.verdict, result.reason = "fault", f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    result.seconds = round(time.perf_counter() - start, 2)
    return result
