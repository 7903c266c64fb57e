"""A part of the survey over transformers' model types, another one for each version of the two libraries, and always the
types that once failed. `make survey` runs all of it; docs/survey.md has its numbers.
"""

from __future__ import annotations

import zlib

import pytest
import torch
import transformers

import peft
from tests.survey.survey import survey, types_of
from tests.survey.tiny import NotBuilt, build, configs, divisors, tensors

PARTS = 30
ONCE = ("mamba", "falcon_mamba", "phimoe", "deepseek_v4", "mobilebert", "falcon")  # read raw, routed, grouped, spelled


def number(text: str) -> int:
    return zlib.crc32(text.encode())


def chosen(task: str) -> list[str]:
    part = number(f"{peft.__version__} {transformers.__version__}") % PARTS
    return [t for t in types_of(task) if t in ONCE or number(t) % PARTS == part]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "model_type"), [(task, t) for task in ("causal", "base") for t in chosen(task)])
def test_all_linear_lora_gives_what_it_gives_merged_and_every_factor_trains(task, model_type):
    found = survey(model_type, task, limit=20)
    if found.verdict == "left out":
        pytest.skip(found.reason)
    assert found.verdict == "ok", found.reason


def test_over_the_parts_every_type_is_surveyed():
    names = types_of("base")
    parts = {number(t) % PARTS for t in names}
    assert len(names) > 100 and parts <= set(range(PARTS)) and len(parts) > PARTS // 2
    assert all(any(t in types_of(task) for task in ("base", "causal")) for t in ONCE)


def test_what_once_failed_is_built():
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    for name in ("mamba", "falcon"):
        model, inputs = build(name, MODEL_MAPPING)
        assert sum(p.numel() for p in model.parameters()) < 1e7
        with torch.no_grad():
            assert tensors(model(**inputs))


def test_a_fault_is_told(monkeypatch):
    from peft.core.adapted.upstream_layer import UpstreamLayer

    monkeypatch.setattr(UpstreamLayer, "_composed", lambda self, name, by: getattr(self.base_layer, name))
    found = survey("mamba", "base")
    assert found.verdict == "fault" and "no gradient" in found.reason


def test_widths_are_divided_by_one_number():
    config = transformers.LlamaConfig()
    assert divisors(config)[0] == 16 and list(configs(config)) == [config]
    with pytest.raises(NotBuilt):
        build("llama", {}, seed=0)
