"""`python -m peft.cli`, the command `peft` for launchers that start modules: `torchrun ... -m peft.cli train job.yaml`."""

from __future__ import annotations

from . import app

if __name__ == "__main__":
    app(prog_name="peft")
