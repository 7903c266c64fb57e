"""Commands that say what a flag of other programs is called here."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

from .. import recipes


class Command(TyperCommand):
    """A command that explains flags which it does not have, where they are usual elsewhere."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        own = [name for p in self.params for name in p.opts if name.startswith("--")]
        for arg in args:
            name = arg.partition("=")[0]
            if arg == "--":
                break
            if self.name == "train" and name.startswith("--") and not any(o.startswith(name) for o in (*own, "--help")):
                hint = recipes.checks.synonym(name, flag=True)
                if hint:
                    raise typer.BadParameter(f"There is no {name[:60]}. {hint}", ctx=ctx)
        return super().parse_args(ctx, args)
