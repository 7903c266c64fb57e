"""Rows for added tokens: an adapter that trained them needs a base whose word embeddings have as many."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ...contract.capabilities import NeedsTokens
from ...registry import companions, method
from ..anatomy.embeddings import vocab_size
from ..files.header import Loaded


def growth(model: nn.Module, loaded: Loaded) -> int | None:
    """How many rows the embeddings lack of the vocabulary that the adapter was trained with, where its tokens reach past
    this model's; None where nothing has to grow."""
    here, saved = vocab_size(model), (loaded.base or {}).get("vocab_size")
    along = [c for field, c in companions().items() if getattr(loaded.config, field, None)]
    asking = [c for c in (method(loaded.config.peft_type), *along) if issubclass(c, NeedsTokens)]
    needed = max((c.tokens_needed(loaded.config) for c in asking), default=0)
    grows = callable(getattr(model, "resize_token_embeddings", None))
    return saved - here if here and saved and here < needed <= saved and grows else None


@contextmanager
def room_for_tokens(model: nn.Module, loaded: Loaded) -> Iterator[None]:
    """Grow the embeddings to the vocabulary the adapter was trained with, where its tokens reach past this model's.

    Only the saved size is trusted: a token index beyond it is an error of its own. If loading fails, they shrink back.
    """
    rows, resize = growth(model, loaded), getattr(model, "resize_token_embeddings", None)
    if rows is None or resize is None:
        yield
        return
    here = vocab_size(model) or 0
    resize(here + rows)
    try:
        yield
    except BaseException:
        resize(here)
        raise
