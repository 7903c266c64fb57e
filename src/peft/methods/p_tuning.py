"""P-tuning: the vectors before the input are the output of a small network, P = g(E) with E[n, d] (arXiv 2103.10385).

g is an MLP of three layers, d → h → h → d with ReLU, or a bidirectional LSTM followed by an MLP, 2h → 2h → d. The file
holds the result P; how training goes on after a reload, see `core/forms/prompt.py`, `Encoded`.
"""

from __future__ import annotations

import enum
import warnings
from dataclasses import dataclass

from torch import Tensor, nn

from ..config import PromptLearningConfig
from ..config_fields import member, own_field, ranged
from ..contract.site import Site
from ..core.forms.prompt import Encoded, Table, linear

__all__ = ["PromptEncoderConfig", "PromptEncoderReparameterizationType"]


class PromptEncoderReparameterizationType(str, enum.Enum):
    """The network: MLP or LSTM."""

    MLP = "MLP"
    LSTM = "LSTM"


@dataclass
class PromptEncoderConfig(PromptLearningConfig):
    """P-tuning (arXiv 2103.10385).

    encoder_reparameterization_type: "MLP" or "LSTM". encoder_hidden_size: h, by default the model's width.
    encoder_num_layers, encoder_dropout: of the LSTM (the MLP always has its three layers). save_encoder: the file holds
    the network, too, so that training goes on exactly.
    """

    own_type = "P_TUNING"
    encoder_reparameterization_type: str | PromptEncoderReparameterizationType = member(
        PromptEncoderReparameterizationType.MLP
    )
    encoder_hidden_size: int | None = ranged(None)
    encoder_num_layers: int = ranged(2)
    encoder_dropout: float = ranged(0.0, 0, 1)
    save_encoder: bool = own_field(True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            warnings.warn("encoder_num_layers is for the LSTM; the MLP always has its three layers.", stacklevel=3)


class PTuning(Encoded):
    peft_type = "P_TUNING"
    config_class = PromptEncoderConfig
    summary = "Prompt tuning whose vectors come out of a small network, which makes them easier to train."
    formula = "f([g(E); E(x)])"
    paper = "arXiv 2103.10385"
    networks = ("lstm_head", "mlp_head")
    examples = (
        {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
        {"num_virtual_tokens": 3, "encoder_hidden_size": 8, "encoder_reparameterization_type": "LSTM"},
    )

    def __init__(self, config: PromptEncoderConfig, site: Site) -> None:
        super().__init__(config, site)
        d, h = config.token_dim, config.encoder_hidden_size or config.token_dim
        self.embedding = Table(site.empty(self.rows, d))
        self.lstm_head: nn.LSTM | None = None
        widths = [d, h, h, d]
        if config.encoder_reparameterization_type == "LSTM":
            options = {"dropout": config.encoder_dropout, "bidirectional": True, "batch_first": True}
            self.lstm_head = nn.LSTM(d, h, config.encoder_num_layers, device="meta", dtype=site.dtype, **options)
            self.lstm_head.to_empty(device=site.device)
            widths = [2 * h, 2 * h, d]
        layers: list[nn.Module] = []
        for i, o in zip(widths, widths[1:], strict=False):
            layers += [linear(site, i, o), nn.ReLU()]
        self.mlp_head: nn.Sequential | None = nn.Sequential(*layers[:-1])

    def encode(self, table: Tensor, part: slice | None = None) -> Tensor:
        if self.lstm_head is not None:
            table = self.lstm_head(table[None])[0][0]
        assert self.mlp_head is not None
        return self.mlp_head(table)

    def prompt(self, tasks: Tensor | None) -> Tensor:
        return self.result()
