"""Dropout whose mask is neither kept as numbers nor applied to a stored copy.

Drawn from 15 random bits an entry, so p is rounded to 1/32768 and the kept entries are scaled by 1/(1 − p) of that
rounded p. On a CPU backward has the mask as one bit an entry, which costs less than drawing it again; elsewhere it is
drawn again from its seed.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEVELS = 32768


def rounded(p: float) -> float:
    """The probability that is really used."""
    return round(p * LEVELS) / LEVELS


def draw(shape: torch.Size, p: float, seed: int, device: torch.device) -> Tensor:
    """bool[shape], True where an entry is kept: Bernoulli(1 − p), a function of the seed."""
    n = shape.numel()
    if not n:
        return torch.empty(shape, dtype=torch.bool, device=device)
    if device.type == "cpu":  # twice as fast as torch's own generator
        words = torch.from_numpy(np.random.SFC64(seed).random_raw((n + 3) // 4))
    else:
        rng = torch.Generator(device=device).manual_seed(seed)
        words = torch.empty((n + 3) // 4, dtype=torch.int64, device=device).random_(generator=rng)
        words <<= (
            1  # random_() leaves the sign bit of each word at 0: drop it, and the 15 upper bits of each part count
        )
    keep = words.view(torch.int16)[:n] >= round(p * LEVELS) * 2 - LEVELS
    return keep.view(shape)


def pack(keep: Tensor) -> Tensor:
    """bool[...] -> uint8[⌈n/8⌉], on a CPU."""
    return torch.from_numpy(np.packbits(keep.view(torch.uint8).numpy()))


def unpack(bits: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of `pack`."""
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=shape.numel())).view(torch.bool).view(shape)


def dropped(x: Tensor, keep: Tensor) -> Tensor:
    """x where kept, else 0; without the factor 1/(1 − p), which costs less on what is thinner."""
    return torch.where(keep, x, 0)


def drop(x: Tensor, p: float) -> tuple[Tensor, Tensor | None, int, float]:
    """(x where it is kept, the packed mask, its seed, the factor of what is kept)."""
    if not p:
        return x, None, 0, 1.0
    seed = int(torch.randint(2**62, (1,)).item())
    keep = draw(x.shape, p, seed, x.device)
    bits = pack(keep) if x.device.type == "cpu" else None
    return dropped(x, keep), bits, seed, 1 / (1 - rounded(p))


def kept(x: Tensor, p: float, bits: Tensor | None, seed: int) -> tuple[Tensor | None, float]:
    """The mask that `drop` drew for x, and its factor."""
    if not p:
        return None, 1.0
    keep = draw(x.shape, p, seed, x.device) if bits is None else unpack(bits, x.shape)
    return keep, 1 / (1 - rounded(p))
