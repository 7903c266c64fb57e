"""Any value for any field of any method's config: refused by the field's name, or held so that it comes back from JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import random
import warnings

import numpy as np
import pytest
import torch

from peft import LoraConfig, PeftConfig, registry
from peft.config_fields import jsonable
from peft.errors import ConfigError

from . import examples, seed

CONFIGS = {name: cls.config_class for name, cls in sorted(registry.methods().items())}
SCALARS = [
    *(None, True, False, 0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**63) - 1, 10**400),
    *(0.0, 0.5, -0.0, 1.0, 1e300, -1e-300, math.nan, math.inf, -math.inf, 1j),
    *("", "16", "false", "none", "all", "q_proj", "q" * 5000, "\x1b[2J", "NaN", b"q", bytearray(b"q")),
    *(np.int8(3), np.uint64(2**63), np.float32(0.5), np.float64("nan"), np.bool_(True), np.str_("q"), np.datetime64("now")),
    *(torch.tensor(4), torch.tensor(0.5), torch.tensor(True), torch.empty(2, device="meta"), torch.float16),
    *(pathlib.Path("a") / "b", object(), len, int, torch.nn.Identity(), iter([1]), dataclasses),
]  # fmt: skip


def drawn(rng: random.Random, depth: int = 0) -> object:
    kind = rng.randrange(9 if depth < 3 else 3)
    if kind < 3:
        return rng.choice(SCALARS)
    values = [drawn(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 3:
        return {v for v in values if type(v) in (str, int, float, bool)}
    if kind == 4:
        return tuple(values)
    if kind == 5:
        return np.array([v for v in values if type(v) in (int, float) and abs(v) < 100])
    if kind == 6:
        return {rng.choice(["q", "a.*", 3, None, "\x00"]): v for v in values}
    if kind == 7:
        return [rng.choice(["q", "v", 1, 2, True, 0.5]) for _ in values]
    return values


def made(cls: type[PeftConfig], **values: object) -> PeftConfig:
    needed = {"total_step": 10} if "total_step" in {f.name for f in dataclasses.fields(cls)} else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return cls(**{**needed, **values})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_value_is_refused_by_name_or_comes_back_from_json(name):
    cls = CONFIGS[name]
    rng = random.Random(seed(len(name)))
    fields = [f.name for f in dataclasses.fields(cls) if f.name != "runtime_config"]
    for _ in range(examples(400)):
        field, value = rng.choice(fields), drawn(rng)
        config = made(cls)
        before = config.to_dict()
        try:
            setattr(config, field, value)
        except ValueError as e:
            said = str(e)
            assert isinstance(e, ConfigError) or "method" in said, (field, value, said)
            assert len(said) < 2000 and "\x1b" not in said
            assert config.to_dict() == before
            continue
        held = getattr(config, field)
        text = json.dumps(jsonable(held), allow_nan=False)
        again = made(cls)
        setattr(again, field, json.loads(text))
        assert getattr(again, field) == held, (field, value)


def test_a_file_of_any_values_gives_a_config_or_one_message(tmp_path):
    """Whatever JSON holds, under the names of real fields."""
    rng = random.Random(seed())
    path = tmp_path / "adapter_config.json"
    plain = LoraConfig(r=4, target_modules=["q"]).to_dict()
    values = [v for v in SCALARS if v is None or type(v) in (bool, int, float, str)]
    for _ in range(examples(300)):
        wrong = rng.sample(sorted(plain), rng.randrange(1, 3))
        path.write_text(json.dumps({**plain, **{k: rng.choice([*values, [rng.choice(values)], {}]) for k in wrong}}))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = PeftConfig.from_pretrained(tmp_path)
        except ValueError as e:
            assert len(str(e)) < 2000 and "\x1b" not in str(e)
            continue
        config.save_pretrained(tmp_path)
        assert PeftConfig.from_pretrained(tmp_path) == config
