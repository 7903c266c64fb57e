"""Saving an adapter of 560 targets. The other library must read back the same tensors under the same keys."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from torch import Tensor

from ..case import Case, Figure, faster
from ..measure import once
from .load import base_model, write

TITLE = "Save an adapter of 560 targets"


class Save(Case):
    name = "save_pretrained"
    tolerance = 0.0

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.figures = {"save": Figure("ms", (faster(10),)), "KB": Figure("KB", what="on disk")}

    def fixture(self, folder: Path) -> None:
        write(folder, self.quick)

    def build(self, folder: Path) -> None:
        from peft import PeftModel

        self.model = PeftModel.from_pretrained(base_model(self.quick), str(folder))

    def outputs(self) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        with tempfile.TemporaryDirectory() as folder:
            self.model.save_pretrained(folder)
            return load_file(f"{folder}/adapter_model.safetensors")

    def sample(self) -> dict[str, float]:
        folder = tempfile.mkdtemp()
        try:
            took = once(lambda: self.model.save_pretrained(folder))
            size = sum(f.stat().st_size for f in Path(folder).rglob("*.safetensors"))
        finally:
            shutil.rmtree(folder)
        return {"save": 1e3 * took, "KB": size / 1024}


def cases(quick: bool) -> list[Case]:
    return [Save(quick)]
