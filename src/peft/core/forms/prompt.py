"""What methods share whose site is the whole model.

A method states one of two: `prompt(tasks)`, virtual tokens before the input, or `keys_values(layer)`, keys and values
before every attention. How they get into a model's call: `core/prompts`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from ...config import PromptLearningConfig
from ...contract.method import Method
from ...contract.site import Site
from ...contract.tensors import Stored, TensorTable
from ...errors import Refusal
from ..anatomy.embeddings import token_embeddings
from ..anatomy.language import is_encoder_decoder, number, text_config


class Table(nn.Module):
    """Rows of trainable vectors: `weight[rows, width]`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


def linear(site: Site, inputs: int, outputs: int) -> nn.Linear:
    """A layer of a network at this site; its values come later."""
    made: nn.Linear = skip_init(nn.Linear, inputs, outputs, device=site.device, dtype=site.dtype)
    return made


def columns(network: nn.Sequential, x: Tensor, part: slice | None) -> Tensor:
    """`network(x)[..., part]`; where the last layer is linear, the other columns are not computed."""
    layers = list(network)
    for layer in layers[:-1]:
        x = layer(x)
    last = layers[-1]
    if part is not None and isinstance(last, nn.Linear):
        return F.linear(x, last.weight[part], last.bias[part])
    x = last(x)
    return x if part is None else x[..., part]


class PromptMethod(Method):
    """What the methods of the whole model share: the sizes they take from it, and what the file holds."""

    form = "prompt"
    prefix = "prompt_encoder"
    identity = False
    tensors: ClassVar[Mapping[str, Stored]] = {"embedding.weight": Stored("prompt_embeddings")}
    embedding: Table

    # -- the maths: one of the two ----------------------------------------------------------------------------------------
    def prompt(self, tasks: Tensor | None) -> Tensor:
        """P[n, d], or [rows, n, d] when it depends on the row's task; n·2 rows for an encoder and its decoder."""
        raise AttributeError(f"{type(self).__name__} puts no tokens before the input")

    def keys_values(self, layer: int) -> tuple[Tensor, Tensor]:
        """K and V[heads, n, width] that layer `layer` attends to before its own."""
        raise AttributeError(f"{type(self).__name__} puts no keys and values before the attention")

    required: ClassVar[tuple[str, ...]] = ("token_dim",)  # of the sizes, those that the config may not state otherwise
    sized: ClassVar[str] = "the embeddings of this model have {} entries"
    prompts_decoder: ClassVar[bool] = False  # the second half of `prompt` goes before the decoder's tokens

    @property
    def inputs(self) -> int:
        """Virtual tokens before the input."""
        return self.config.num_virtual_tokens if type(self).prompt is not PromptMethod.prompt else 0

    @property
    def keyed(self) -> int:
        """Virtual keys and values before each attention."""
        return self.config.num_virtual_tokens if type(self).keys_values is not PromptMethod.keys_values else 0

    @property
    def prompt_embeddings(self) -> Tensor:
        """What upstream's file holds under this name."""
        return self.embedding.weight

    @property
    def rows(self) -> int:
        """Vectors in the prompt: those of an encoder and its decoder stand one below the other."""
        return int(self.config.num_virtual_tokens * (self.config.num_transformer_submodules or 1))

    # -- sizes --------------------------------------------------------------------------------------------------------------
    @classmethod
    def prepare(cls, config: PromptLearningConfig, model: nn.Module) -> None:
        """Read num_layers, token_dim, num_attention_heads and num_transformer_submodules from the base model."""
        if config.num_virtual_tokens is None:
            raise ValueError("`num_virtual_tokens` should be at least 1 but the value passed is None")
        text = text_config(model)
        if text is None or token_embeddings(model) is None:
            raise Refusal(
                cls.peft_type,
                type(model).__name__,
                "virtual tokens stand before token embeddings, and this model has none (no get_input_embeddings())",
            )
        task = getattr(config.task_type, "value", config.task_type)
        if config.num_transformer_submodules is None:
            pair = task == "SEQ_2_SEQ_LM" or (task is None and is_encoder_decoder(model))
            config.num_transformer_submodules = 2 if pair else 1
        sizes = cls.sizes(text, model)
        for name, value in {**sizes, "encoder_hidden_size": sizes["token_dim"]}.items():
            if getattr(config, name, value) is None:
                setattr(config, name, value)
        cls.fits(config, model)

    @classmethod
    def sizes(cls, text: object, model: nn.Module) -> dict[str, int]:
        width = getattr(token_embeddings(model), "embedding_dim", None) or number(text, "hidden_size")
        return {
            "num_layers": number(text, "num_hidden_layers"),
            "token_dim": width,
            "num_attention_heads": number(text, "num_attention_heads", "encoder_attention_heads"),
        }

    @classmethod
    def fits(cls, config: PromptLearningConfig, model: nn.Module) -> None:
        """Raise when the sizes that the config states are not this model's."""
        sizes = cls.sizes(text_config(model), model)
        for name in cls.required:
            if getattr(config, name) != sizes[name]:
                raise ValueError(
                    f"{cls.peft_type}: {name}={getattr(config, name)}, but {cls.sized.format(sizes[name])}. "
                    f"Is this the right base model? Leave {name} at None to read it from the model."
                )

    def rank(self) -> int | None:
        return None


class _AsItIsSaved:
    """The table of a prompt with a network: that of its class, or of a method what a file would hold now."""

    def __get__(self, method: Encoded | None, cls: type[Encoded]) -> TensorTable:
        plain = PromptMethod.table
        if method is None or method.lacks_network:
            return plain
        keys = {"prompt_embeddings": "prompt_embeddings"}
        if method.config.save_encoder:
            keys |= {n: f"base_model.prompt_encoder.{n}" for n, _ in method.named_parameters()}
        return TensorTable(keys=keys, own=plain.own)


class Encoded(PromptMethod):
    """A prompt that is trained through a small network and saved as the network's result, `prompt_embeddings`.

    The file also holds the network (`save_encoder`), so that training goes on after a reload where it stopped. A file
    without it gives a plain table that holds the result, which acts the same and trains directly.
    """

    networks: ClassVar[tuple[str, ...]] = ()  # attributes with the network's modules
    table = _AsItIsSaved()  # type: ignore[assignment]

    def encode(self, table: Tensor, part: slice | None = None) -> Tensor:
        """The network on the table; `part` asks for some columns of the result only."""
        raise AttributeError(f"{type(self).__name__} has no network")

    @property
    def lacks_network(self) -> bool:
        return all(getattr(self, n) is None for n in self.networks)

    def result(self, part: slice | None = None) -> Tensor:
        table = self.embedding.weight
        if not self.lacks_network:
            return self.encode(table, part)
        return table if part is None else table[:, part]

    @property
    def prompt_embeddings(self) -> Tensor:
        return self.result()

    def resize(self, state: dict[str, Tensor]) -> None:
        held = [n for n, _ in self.named_parameters()]
        if self.lacks_network or "prompt_embeddings" not in state or all(n in state for n in held):
            return
        old = self.embedding.weight
        weight = state["prompt_embeddings"].to(old.dtype)
        weight = weight if old.device.type == "meta" else weight.to(old.device)
        self.embedding = Table(nn.Parameter(weight.clone(), requires_grad=old.requires_grad))
        for name in self.networks:
            setattr(self, name, None)

    @torch.no_grad()
    def reset(self, rng: torch.Generator, site: Site) -> None:
        self.embedding.weight.normal_(generator=rng)
        for name in self.networks:
            network = getattr(self, name)
            for module in () if network is None else network.modules():
                if isinstance(module, (nn.Linear, nn.LSTM)):
                    fan_in = module.in_features if isinstance(module, nn.Linear) else module.hidden_size
                    for p in module.parameters():
                        p.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=rng)
