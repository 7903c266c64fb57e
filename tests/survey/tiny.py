"""Tiny models of transformers' types, built from their default configs by rules that know names of fields, not of models.

Widths are all divided by one number, so that what must divide what still does; depths are cut to the shortest start
that has every sort of layer. Several divisors and several inputs are tried, until the model's forward runs.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

LARGEST = 30_000_000  # parameters
WIDTH = re.compile(r"hidden|embed|inner|intermediate|proj|ffn|mlp|bottleneck|channel|dim|width|d_model|d_ff|d_kv|rank|filters|feature_size|feat_size|d_inner|feature_dim|backbone_feature")  # fmt: skip
NO_WIDTH = re.compile(r"^num_|^n_(?!embd|inner)|^max_|_id$|_ids$|ratio|image|patch|kernel|stride|vocab|window|mel|token|index(?!_head_dim)|layer(?!_dim)|depth|group|axes|rope(?!_head_dim)|multipl|spatial|expand|position(?!_embedding_dim)|act|audio_channels|num_channels|type|loss|conv_dilation|padding|norm|time_step|codebook_size|section|state_size")  # fmt: skip
DEPTH = re.compile(r"^(num_hidden_layers|num_layers|n_layers?|depth|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers|num_blocks|num_hidden_groups|num_transformer_layers|vision_layers)$|_num_hidden_layers$|_num_layers$|_layers_count$")  # fmt: skip
LISTS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types", "attention_types", "attn_layer_indices", "indexer_types", "layer_rope_theta", "sliding_window_pattern_list", "no_rope_layers", "hybrid_override_pattern", "layers_num_experts")  # fmt: skip
OFF = re.compile(r"drop|mask_time_prob|mask_feature_prob|jitter|noise")
OFF_NOT = re.compile(r"denoising|downsample|dropout_type|drop_top|num_|_type")


def configs(config: object, seen: set[int] | None = None) -> Iterator[object]:
    """A config and all that it holds."""
    seen = set() if seen is None else seen
    if id(config) in seen:
        return
    seen.add(id(config))
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs(value, seen)


def shrink(config: object, divisor: int, image: int) -> None:
    for c in configs(config):
        for name, value in list(vars(c).items()):
            if name.startswith("_") or value is None or isinstance(value, bool):
                continue
            new = _smaller(c, name, value, divisor, image)
            if new is not value:
                try:
                    setattr(c, name, new)
                except (AttributeError, ValueError, NotImplementedError):
                    continue
    vocabulary = min([v for c in configs(config) if isinstance(v := vars(c).get("vocab_size"), int)] or [128])
    for c in configs(config):
        for name, value in list(vars(c).items()):
            token = name.endswith(("token_id", "token_index", "token_idx"))
            if token and isinstance(value, int) and value >= vocabulary:
                setattr(c, name, vocabulary - 1 - (hash_of(name) % 9))


def hash_of(text: str) -> int:
    return sum(i * ord(ch) for i, ch in enumerate(text, 1))


def _smaller(config: object, name: str, value: object, divisor: int, image: int) -> object:
    if isinstance(value, float) and OFF.search(name) and not OFF_NOT.search(name):
        return 0.0
    if name == "vocab_size" and isinstance(value, int):
        return min(value, 160)
    if DEPTH.search(name) and isinstance(value, int):
        return min(value, _depth(config))
    if name in LISTS and isinstance(value, (list, tuple)):
        return type(value)(value[: _depth(config)])
    if name in ("image_size", "input_size", "pretrain_image_size", "img_size") and image:
        if isinstance(value, int):
            return image if value > image else value
        if isinstance(value, (list, tuple)) and all(isinstance(v, int) for v in value):
            return type(value)(image for _ in value)
        if isinstance(value, dict) and "height" in value:
            return {**value, "height": image, "width": image}
    if re.search(r"(num|n|routed)_(local_|routed_)?experts$|moe_num_experts$", name) and isinstance(value, int):
        return min(value, 8)
    if name in ("n_group", "topk_group", "num_expert_group") and isinstance(value, int):
        return min(value, 1)
    if re.search(r"experts_per_tok|moe_topk|moe_k$|^top_k$|num_selected_experts", name) and isinstance(value, int):
        return min(value, 2)
    if name in ("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"):
        return min(value, 256) if isinstance(value, int) else value
    if WIDTH.search(name) and not NO_WIDTH.search(name):
        return _divided(value, divisor)
    return value


def _divided(value: object, divisor: int) -> object:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return max(value // divisor, 4) if value > 4 * 4 else value
    if isinstance(value, (list, tuple)):
        return type(value)(_divided(v, divisor) for v in value)
    return value


def _depth(config: object) -> int:
    """The shortest start of the layers that has each sort of them."""
    least = 2
    for name in ("layer_types", "layers_block_type", "mlp_layer_types"):
        types = vars(config).get(name)
        if isinstance(types, (list, tuple)):
            least = max(least, *(types.index(t) + 1 for t in set(types)), 0)
    for name in ("first_k_dense_replace", "attn_layer_offset", "moe_layer_start_index", "num_kv_shared_layers"):
        at = vars(config).get(name)
        least = max(least, at + 1 if isinstance(at, int) and at < 6 else 0)
    return least if least <= 8 else 2


def divisors(config: object) -> list[int]:
    """What to divide widths by, best first: heads of 8 or 16 channels, then less and less."""
    heads = []
    for held in (vars(c) for c in configs(config)):
        if isinstance(h := held.get("head_dim"), int) and h > 8:
            heads.append(h)
            continue
        h, d = held.get("num_attention_heads") or held.get("num_heads"), held.get("hidden_size") or held.get("d_model")
        if isinstance(h, int) and isinstance(d, int) and h and d % h == 0:
            heads.append(d // h)
    small = min(heads, default=64)
    return list(dict.fromkeys([max(small // 8, 1), max(small // 16, 1), 16, 8, 4, 2, 1]))


class TooLong(BaseException):
    """The time for one type is over; no fault of the code that ran then."""


class NotBuilt(Exception):
    """Why a type is left out."""


def build(model_type: str, mapping: object, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny model of a type and inputs that its forward takes; `NotBuilt` with the last reason."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    reasons: list[str] = []
    config_class = CONFIG_MAPPING[model_type]
    try:
        wanted = divisors(config_class())
    except Exception as e:
        raise NotBuilt(f"its config has no defaults: {short(e)}") from e
    for divisor in wanted:
        for image in (32, 64, 0):
            config = config_class()
            has_images = any("image_size" in vars(c) or "patch_size" in vars(c) for c in configs(config))
            if image != 32 and not has_images:
                break
            try:
                shrink(config, divisor, image)
                model = _made(mapping, config, seed)
            except NotBuilt as e:
                reasons.append(str(e))
                break
            except Exception as e:
                reasons.append(f"build: {short(e)}")
                continue
            for inputs in candidates(model, config, image or 64):
                try:
                    with torch.no_grad():
                        outs = tensors(model(**inputs))
                    if outs and all(bool(torch.isfinite(o).all()) for o in outs):
                        return model, inputs
                    reasons.append("forward: no finite tensor")
                except Exception as e:
                    reasons.append(f"forward: {short(e)}")
    told = [r for r in reasons if r.startswith("forward")] or [r for r in reasons if r.startswith("build")] or reasons
    raise NotBuilt(told[0] if told else "no reason")


def short(e: Exception) -> str:
    return f"{type(e).__name__}: {' '.join(str(e).split())[:110]}"


def _made(mapping: object, config: object, seed: int) -> nn.Module:
    with torch.device("meta"):
        size = sum(p.numel() for p in mapping[type(config)](config).parameters())  # type: ignore[index]
    if size > LARGEST:
        raise NotBuilt(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(seed)
    model = mapping[type(config)](config).eval()  # type: ignore[index]
    with torch.no_grad():
        for p in model.parameters():
            if p.is_floating_point():
                p.add_(torch.randn_like(p) * 0.02)  # no weight at zero: zeros hide what does not flow
    return model.float()


def candidates(model: nn.Module, config: object, image: int) -> Iterator[dict[str, Tensor]]:
    """Inputs to try, by what the forward takes and the model calls its main input."""
    takes = inspect.signature(model.forward).parameters
    main = getattr(model, "main_input_name", "input_ids")
    parts = list(configs(config))

    def stated(*names: str, default: int) -> int:
        return next((v for n in names for c in parts if isinstance(v := vars(c).get(n), int) and v > 0), default)

    special = {
        v
        for c in parts
        for n, v in vars(c).items()
        if n.endswith(("token_id", "token_index", "token_idx")) and isinstance(v, int)
    }
    vocabulary = min([v for c in parts if isinstance(v := vars(c).get("vocab_size"), int) and v > 8] or [64])
    allowed = [i for i in range(3, vocabulary) if i not in special] or [1]
    torch.manual_seed(1)

    def ids(length: int = 8) -> Tensor:
        return torch.tensor(allowed)[torch.randint(len(allowed), (2, length))]

    base: dict[str, Tensor] = {}
    if "decoder_input_ids" in takes:
        base["decoder_input_ids"] = ids(6)
    images = [
        torch.randn(2, stated("num_channels", "in_channels", "in_chans", default=3), s, s)
        for s in dict.fromkeys((image, 64, 128))
    ]
    text = {"input_ids": ids()} if "input_ids" in takes else {}
    if main == "input_ids" and text:
        yield {**text, **base}
        yield {"input_ids": ids(16)[:, :16], **base}
        yield text
    if "pixel_values" in takes:
        for x in images:
            yield {"pixel_values": x}
            if text:
                yield {**text, "pixel_values": x, **base}
    if "input_values" in takes:
        yield {"input_values": torch.randn(2, 4000), **base}
        yield {"input_values": torch.randn(2, 1, 4000), **base}
        yield {"input_values": torch.randn(2, 64, stated("num_mel_bins", default=16)), **base}
    if "input_features" in takes:
        mels = stated("num_mel_bins", "feature_size", "input_dim", "input_feat_per_channel", "input_size", default=80)
        long = 2 * stated("max_source_positions", default=32)
        for shape in ((2, mels, long), (2, 64, mels), (2, mels, 64), (2, 2 * mels, 64), (2, 64, 2 * mels)):
            yield {"input_features": torch.randn(*shape), **base}
    if "inputs_embeds" in takes:
        yield {"inputs_embeds": torch.randn(2, 8, stated("hidden_size", "d_model", default=64))}
    if text and main != "input_ids":
        yield {**text, **base}
    needed = [
        n for n, p in takes.items() if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if needed == ["hidden_states"] or needed == ["x"]:
        yield {needed[0]: torch.randn(2, 8, stated("hidden_size", "d_model", default=64))}


def tensors(output: object) -> list[Tensor]:
    """All floating tensors of an output, in order."""
    if torch.is_tensor(output):
        return [output] if output.is_floating_point() and output.numel() else []
    if isinstance(output, dict):
        return [t for v in output.values() for t in tensors(v)]
    if isinstance(output, (list, tuple)):
        return [t for v in output for t in tensors(v)]
    return []


warnings.filterwarnings("ignore", module="transformers")
