"""What the settings of a job and of commands may be: types, ranges, finiteness; templates; and what usual synonyms are
called here."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping

from ..errors import UserError

LARGEST = (1 << 31) - 1
LONGEST_TEMPLATE = 100_000  # characters
INF = math.inf

# What other programs call a setting, and what it is here: in a job file, and on the command line.
SYNONYMS = {
    ("lr", "learning_rate"): ("trainer.learning_rate", "--trainer learning_rate=..."),
    ("epochs", "num_epochs", "n_epochs", "num_train_epochs"): (
        "trainer.num_train_epochs",
        "--trainer num_train_epochs=...",
    ),
    ("batch_size", "batch", "bs", "train_batch_size", "micro_batch_size", "per_device_train_batch_size"): (
        "trainer.per_device_train_batch_size",
        "--trainer per_device_train_batch_size=...",
    ),
    ("steps", "max_steps", "num_steps", "iters", "iterations"): ("trainer.max_steps", "--trainer max_steps=..."),
    ("gradient_accumulation", "grad_accum", "gradient_accumulation_steps"): (
        "trainer.gradient_accumulation_steps",
        "--trainer gradient_accumulation_steps=...",
    ),
    ("warmup", "warmup_ratio", "warmup_steps"): ("trainer.warmup_steps", "--trainer warmup_steps=..."),
    ("weight_decay", "wd"): ("trainer.weight_decay", "--trainer weight_decay=..."),
    ("scheduler", "lr_scheduler", "lr_scheduler_type"): (
        "trainer.lr_scheduler_type",
        "--trainer lr_scheduler_type=...",
    ),
    ("r", "rank", "lora_r", "lora_rank"): ("config.r", "--set r=..."),
    ("alpha", "lora_alpha"): ("config.lora_alpha", "--set lora_alpha=..."),
    ("dropout", "lora_dropout"): ("config.lora_dropout", "--set lora_dropout=..."),
    ("targets", "target_modules", "modules"): ("config.target_modules", "--set target_modules=..."),
    ("data", "dataset", "train_file", "train_data", "train_dataset", "training_data", "data_path"): (
        "data.train",
        "--train",
    ),
    ("eval_file", "eval_data", "eval_dataset", "validation", "valid", "val", "test", "dev"): ("data.eval", "--eval"),
    ("column", "text_column", "input", "text_field"): ("data.text", "--text"),
    ("label", "label_column", "labels", "target_column", "response"): ("data.target", "--target"),
    ("prompt", "prompt_template"): ("data.template", "--template"),
    ("max_len", "max_seq_length", "max_seq_len", "seq_len", "cutoff_len", "block_size", "max_length"): (
        "data.max_length",
        "--max-length",
    ),
    ("classes", "label_names", "choice", "choices"): ("data.choices", "--choice"),
    ("output_dir", "out", "save_dir", "out_dir"): ("output", "--output"),
    ("base", "base_model", "model_name", "model_id", "model_name_or_path", "checkpoint"): ("model", "--model"),
    ("peft", "peft_type", "adapter"): ("method", "--method"),
    ("precision", "torch_dtype"): ("dtype", "--dtype"),
    ("random_seed", "random_state"): ("seed", "--seed"),
}


def synonym(name: str, *, flag: bool = False, known: str = "") -> str:
    """`Here it is called ...` for a name that other programs use; `""` for others, and where that is `known`."""
    wanted = name.strip().lstrip("-").lower().replace("-", "_").rpartition(".")[2]
    for names, (key, option) in SYNONYMS.items():
        if wanted in names and key != known:
            return f"Here it is {option if flag else f'`{key}`'}."
    return ""


def number(
    name: str, value: object, least: float = -INF, most: float = LARGEST, *, whole: bool = True, above: bool = False
) -> None:
    """A finite number in a range, `least` left out where `above`."""
    what = "a whole number" if whole else "a number"
    fits = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if fits:
        assert isinstance(value, (int, float))
        fits = (least < value if above else least <= value) and value <= most and value == value
    if not fits:
        bound = f" {'above' if above else 'of at least'} {least}" if least > -INF else ""
        bound += f"{' and' if bound else ' of'} at most {most}" if most < LARGEST else ""
        shown = repr(value) if len(repr(value)[:101]) <= 100 else f"{repr(value)[:100]}..."
        raise UserError(f"{name} is {shown}: expected {what}{bound}.")


def text(name: str, value: object, *, empty: bool = False) -> None:
    if not isinstance(value, str) or not (empty or value.strip()):
        raise UserError(f"{name} is {_said(value)}: expected text{'' if isinstance(value, str) else ' (in quotes)'}.")
    if "\0" in value or any("\ud800" <= c <= "\udfff" for c in value):
        raise UserError(f"{name} holds characters that no text has (NUL, or half of a surrogate pair).")


def flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise UserError(f"{name} is {_said(value)}: expected true or false.")


def _said(value: object) -> str:
    return f"{repr(value)[:100]} ({type(value).__name__})"


# -- templates ----------------------------------------------------------------------------------------------------------
def pieces(template: str) -> list[tuple[str, str | None]]:
    """A template as (text, the column after it): columns in braces, `{{` and `}}` for braces, and nothing else.

    Attributes, items, conversions and widths are refused: what a row says is put in as it is.
    """
    if len(template) > LONGEST_TEMPLATE:
        raise UserError(f"data.template has {len(template)} characters, at most {LONGEST_TEMPLATE} are read.")
    found: list[tuple[str, str | None]] = []
    try:
        for before, column, form, conversion in string.Formatter().parse(template):
            if column is not None and (not column.strip() or form or conversion):
                whole = f"{{{column}{f'!{conversion}' if conversion else ''}{f':{form}' if form else ''}}}"[:100]
                raise UserError(f"data.template: {whole} is not the name of a column in braces, such as {{text}}.")
            found.append((before, column))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(
            f"data.template: {error}. Columns stand in braces, such as {{text}}; braces themselves are doubled: {{{{ }}}}."
        ) from None
    return found


# -- fields ---------------------------------------------------------------------------------------------------------------
def check_choices(choices: object) -> None:
    if choices is None:
        return
    name = "data.choices (--choice)"
    if not isinstance(choices, list):
        raise UserError(f"{name} is {_said(choices)}: expected a list of texts, such as [yes, no] in quotes.")
    for value in choices:
        if not isinstance(value, str):
            raise UserError(f"data.choices: {value!r} is a {type(value).__name__} in YAML; put it in quotes.")
        text(name, value)
        if choices.count(value) > 1:
            raise UserError(f"{name} names {value!r} twice.")
    if len(choices) < 2:
        raise UserError(f"{name} has {len(choices)} answer: expected two or more to choose from.")


# least, most, whole, and whether the least itself is left out
COUNT, AMOUNT, SHARE = (1, LARGEST, True, False), (0, LARGEST, False, False), (0, 1, False, False)
TRAINER: dict[str, tuple[float, float, bool, bool]] = {
    "learning_rate": (0, LARGEST, False, True),
    "num_train_epochs": (0, LARGEST, False, True),
    "max_steps": COUNT,
    "per_device_train_batch_size": COUNT,
    "per_device_eval_batch_size": COUNT,
    "gradient_accumulation_steps": COUNT,
    "eval_accumulation_steps": COUNT,
    "save_total_limit": COUNT,
    "logging_steps": (0, LARGEST, False, True),
    "save_steps": (0, LARGEST, False, True),
    "eval_steps": (0, LARGEST, False, True),
    "eval_delay": AMOUNT,
    "warmup_steps": AMOUNT,
    "warmup_ratio": SHARE,
    "weight_decay": AMOUNT,
    "max_grad_norm": AMOUNT,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": (0, 1, False, True),
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": AMOUNT,
    "dataloader_num_workers": (0, 1024, True, False),
    "dataloader_prefetch_factor": COUNT,
    "data_seed": (0, LARGEST, True, False),
}


def check_trainer(trainer: Mapping[str, object]) -> None:
    """Numbers among the training arguments are finite and in their ranges. `max_steps: -1` is to have no such limit."""
    for name, value in trainer.items():
        if name == "max_steps" and value == -1 and not isinstance(value, bool):
            continue
        if name in TRAINER and value is not None:
            least, most, whole, above = TRAINER[name]
            number(f"trainer.{name}", value, least, most, whole=whole, above=above)
        elif isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"trainer.{name} is {value}: expected a finite number.")
