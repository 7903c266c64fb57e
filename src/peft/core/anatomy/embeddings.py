"""A model's embeddings of tokens, and the head that turns vectors into tokens again: which modules they are, how they
are called, how many tokens there are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...contract.managed import present, uncalled
from .patterns import means
from .walk import walk


def token_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds token ids; None where the model names none."""
    return _stated(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """The module that gives a score for each token of the vocabulary; None where the model names none."""
    return _stated(model, "get_output_embeddings")


def _stated(model: nn.Module, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    try:
        found: nn.Module | None = get() if callable(get) else None
    except (NotImplementedError, AttributeError):
        return None
    return found


def vocab_size(model: nn.Module) -> int | None:
    """How many token ids the model embeds."""
    return getattr(token_embeddings(model), "num_embeddings", None)


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """The base model's own embeddings of token ids, as floats: what prompts can start from."""
    table = token_embeddings(model)
    assert table is not None
    with torch.no_grad(), present(table), uncalled([table]):
        device = next((p.device for p in table.parameters()), torch.device("cpu"))
        return table(ids.to(device)).detach().float().cpu()


def embedding_name(model: nn.Module) -> str:
    """What a config calls the token embeddings: their last name where no other module has it, else their path."""
    embedding = token_embeddings(model)
    paths = {p.path: p for p in walk(model)}
    path = next((n for n, p in paths.items() if embedding is not None and embedding in (p.held, p.module)), None)
    if path is None:
        return "embed_tokens"
    leaf = path.rpartition(".")[2]
    return leaf if sum(means(leaf, p) for p in paths) == 1 else path


def ask_gradients_of_embeddings(model: nn.Module) -> bool:
    """Let the embeddings' output require gradients: reentrant checkpointing drops blocks whose input needs none.

    False, and nothing done, where the model names no embeddings.
    """
    ask = getattr(model, "enable_input_require_grads", None)
    if callable(ask):
        ask()
        return True
    table = token_embeddings(model)
    if table is None:
        return False
    table.register_forward_hook(_require_grad)
    return True


def _require_grad(module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
    output.requires_grad_(True)
