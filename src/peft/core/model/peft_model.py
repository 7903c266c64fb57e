"""PeftModel: a base model with named adapters, run, switched, saved and loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ...config import PeftConfig
from ...contract.tree import tree
from ...registry import PeftType
from ..acting.roster import Roster
from ..anatomy.embeddings import ask_gradients_of_embeddings, token_embeddings
from ..anatomy.heads import prepare_head
from ..files import sharded
from ..injection.commit import inject
from ..load.load import LoadResult, loading, read_adapter
from ..prompts.attach import embedding_to_save, get_prompt
from ..report.card import write_card
from ..report.counts import trainable_and_total
from ..report.status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .running import by_name, call, disabled, for_copies
from .saving import gathered_among, prompts_below, push_adapters, save_adapters
from .tuner import Tuner
from .wrapping import activate, holder_of_adapters, load_under, wrap

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}  # task -> its model; filled by `task_models`


class PeftModel(nn.Module):
    """A base model with named adapters."""

    arguments: ClassVar[tuple[str, ...]] = ()  # what a head's forward takes by position after the first two

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        *,
        _init: bool = True,
    ) -> None:
        super().__init__()
        how = {"init": _init, "meta": low_cpu_mem_usage, "autocast_adapter_dtype": autocast_adapter_dtype}
        wrap(model, peft_config, adapter_name, **how)
        self._wrap(model)

    def _wrap(self, model: nn.Module) -> None:
        self.base_model = Tuner(model)
        model.__dict__["peft_config"] = self.base_model.roster.configs
        self.training = model.training
        if hasattr(model, "config"):
            self.config = model.config
        self.special_peft_forward_args = {"adapter_names", "task_ids"}
        if any(m.__dict__.get("gradient_checkpointing") for m in tree(model)):
            self.prepare_model_for_gradient_checkpointing(model)

    # -- state ----------------------------------------------------------------------------------------------------------
    @property
    def roster(self) -> Roster:
        return self.base_model.roster

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.roster.configs

    @property
    def peft_type(self) -> str | PeftType | None:
        return self.active_peft_config.peft_type

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def active_adapter(self) -> str:
        return self.roster.chosen[0]

    @active_adapter.setter
    def active_adapter(self, name: str) -> None:
        self.roster.activate([name])

    @property
    def active_adapters(self) -> list[str]:
        return list(self.roster.chosen)

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.roster.enabled and bool(self.roster.chosen)

    @property
    def _is_prompt_learning(self) -> bool:
        return self.active_peft_config.is_prompt_learning

    @property
    def modules_to_save(self) -> set[str] | None:
        names = {n for c in self.peft_config.values() for n in getattr(c, "modules_to_save", None) or ()}
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        return getattr(self.get_base_model(), "dtype", None)

    def get_base_model(self) -> nn.Module:
        return self.base_model.model

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(trainable, all) parameter counts; quantised weights are counted by their logical size."""
        return trainable_and_total(self)

    def print_trainable_parameters(self) -> None:
        """One line: trainable, all, and their ratio."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)

    # -- running --------------------------------------------------------------------------------------------------------
    def forward(self, *args: object, **kwargs: Any) -> Any:
        """The base model's forward. adapter_names: one adapter name per row of the batch (`"__base__"` for none).

        task_ids: one task per row, for methods that have tasks. By position, heads take the arguments in their own order.
        """
        # no parameters of their own: ONNX's legacy export would hand on their defaults by position
        adapter_names, task_ids = kwargs.pop("adapter_names", None), kwargs.pop("task_ids", None)
        if len(args) > 2 and self.arguments:
            args, kwargs = by_name(self.arguments, args, kwargs)
        tuner = self.base_model
        if adapter_names is None and task_ids is None and torch.compiler.is_compiling():
            return tuner(*args, **kwargs)
        with call(tuner, adapter_names, task_ids, args, kwargs):
            return tuner(*args, **kwargs)

    def generate(
        self,
        *args: object,
        adapter_names: Sequence[str] | None = None,
        task_ids: Tensor | None = None,
        **kwargs: object,
    ) -> Any:
        if adapter_names is not None:
            adapter_names = for_copies(adapter_names, args, kwargs)
        tuner = self.base_model
        with call(tuner, adapter_names, task_ids):
            return tuner.generate(*args, **kwargs)

    def get_prompt(self, batch_size: int, task_ids: Tensor | None = None, max_cache_len: int | None = None) -> Any:
        """The active prompt for a batch: vectors [batch, n, d], or a cache that holds the prefixes."""
        return get_prompt(self.get_base_model(), batch_size, task_ids)

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """The tensor that the file calls `prompt_embeddings`."""
        return embedding_to_save(self.roster, adapter_name)

    @property
    def word_embeddings(self) -> nn.Module | None:
        """The base model's token embeddings."""
        return token_embeddings(self.get_base_model())

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Within, the model is the base model, bit for bit; requires_grad is left alone."""
        with disabled(self.base_model):
            yield

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> nn.Module:
        """Let gradients reach checkpointed blocks whose inputs are frozen."""
        if not any(getattr(model, a, False) for a in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
            ask_gradients_of_embeddings(model)
        return model

    # -- adapters -------------------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Add a further adapter, of any method. It does not act until `set_adapter`."""
        base = self.get_base_model()
        prepare_head(base, peft_config)
        if peft_config.base_model_name_or_path is None:
            peft_config.base_model_name_or_path = getattr(base, "name_or_path", None)
        inject(base, peft_config, adapter_name, meta=low_cpu_mem_usage, autocast_adapter_dtype=autocast_adapter_dtype)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Activate an adapter (or several, whose effects combine), and train exactly those."""
        self.base_model.set_adapter(adapter_name, inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say which adapters train, whatever is active."""
        self.base_model.set_requires_grad(adapter_names, requires_grad)

    def delete_adapter(self, adapter_name: str | Sequence[str]) -> None:
        self.base_model.delete_adapter(adapter_name)

    def adapter_parameters(self, adapter_name: str) -> Iterator[nn.Parameter]:
        """The parameters of one adapter."""
        self.roster.known([adapter_name])
        return self.roster.adapters[adapter_name].parameters()

    # -- saving and loading -----------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: str | bool = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        model_card: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write each adapter as two files: `default` at the top, the others in folders of their names.

        save_embedding_layers: True stores the whole embeddings too (their size is printed). model_card: also write a
        README.md. path_initial_model_for_weight_conversion: anything but None writes plain low-rank pairs for adapters that
        start from the base's weights (PiSSA, OLoRA), s(B A − B₀ A₀) as one pair of twice the rank; the folder that upstream
        reads B₀ and A₀ from is not needed. state_dict: values gathered for the whole model. Without it, tensors
        that are split over processes are put together, one by one: all processes call this, and the first of those that
        say they are the main one writes. Nothing touches the network.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file")
        names = list(self.roster.adapters) if selected_adapters is None else list(selected_adapters)
        self.roster.known(names)
        state_dict = gathered_among(kwargs)
        folders = save_adapters(
            self.base_model,
            names,
            os.fspath(save_directory),
            safe=safe_serialization,
            embeddings=save_embedding_layers is True,
            plain_pairs=path_initial_model_for_weight_conversion is not None,
            gathered=sharded.gathered(self, state_dict),
            main=is_main_process,
        )
        for folder in folders:
            if model_card:
                self.create_or_update_model_card(folder)

    def create_or_update_model_card(self, output_dir: str) -> None:
        """Write a README.md that names the base model, the method and this library's version."""
        write_card(self.active_peft_config, output_dir)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> CommitInfo:
        """Upload the adapters with a model card; arguments as of `save_pretrained` and `remote.push_folder`, and `tags`."""
        return push_adapters(self.save_pretrained, self.active_peft_config, repo_id, kwargs)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        **kwargs: object,
    ) -> PeftModel:
        """A base model with a saved adapter, in evaluation mode unless it is to be trained. Raises, with the model as it
        was, unless every key of the file lands."""
        loaded = read_adapter(model_id, config, key_mapping, strict, kwargs)
        loaded.config.inference_mode = not is_trainable
        target = class_for(loaded.config) if cls is PeftModel else cls
        model = model.get_base_model() if isinstance(model, PeftModel) else model
        held = holder_of_adapters(model)
        load_under(model, loaded, adapter_name, strict, **loading(autocast_adapter_dtype, kwargs))
        if held is not None:
            activate(held, adapter_name, loaded.config)
        self = target.__new__(target)
        nn.Module.__init__(self)
        self._wrap(model)
        return self if is_trainable or not model.training else self.eval()

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        strict: bool = True,
        **kwargs: object,
    ) -> LoadResult:
        """Read a saved adapter under a new name; an adapter of that name has its weights replaced, as upstream does.
        The model is in evaluation mode afterwards, unless the adapter is to be trained."""
        loaded = read_adapter(model_id, None, key_mapping, strict, kwargs)
        loaded.config.inference_mode = not is_trainable
        base = self.get_base_model()
        found = load_under(base, loaded, adapter_name, strict, **loading(autocast_adapter_dtype, kwargs))
        if not is_trainable and (self.training or base.training):
            self.eval()
        return found

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any, **kwargs: Any) -> None:
        prompts_below(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def add_weighted_adapter(self, *args: Any, **kwargs: Any) -> None:
        """See `Tuner.add_weighted_adapter`."""
        self.base_model.add_weighted_adapter(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            return getattr(self.base_model, name)


def class_for(config: PeftConfig) -> type[PeftModel]:
    """The model of a config's task; PeftModel where it names none that has its own."""
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(getattr(config.task_type, "value", config.task_type)), PeftModel)
