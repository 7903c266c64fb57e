"""`peft generate`: what a language model writes, with an adapter."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import recipes
from ..errors import UserError
from .console import command, console, escape, quiet_libraries
from .predict import Adapter, Base, Dtype, Template


@command
def generate(
    adapter: Adapter,
    texts: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="A text for the run's template; repeat for more.")
    ] = None,
    prompts: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="A whole prompt, no template; repeat for more.")
    ] = None,
    model: Base = None,
    dtype: Dtype = "auto",
    template: Template = None,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer, in tokens.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token each time.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    base: Annotated[bool, typer.Option("--base", help="Show what the base alone writes, too.")] = False,
) -> None:
    """Write on after a prompt."""
    import transformers

    quiet_libraries()
    if not texts and not prompts:
        raise UserError("Nothing to write on: give --text (put into the run's template) or --prompt.")
    recipes.checks.number("--temperature", temperature, 0, 1000, whole=False)
    recipes.checks.number("--max-new-tokens", max_new_tokens, 1)
    recipes.checks.number("--seed", seed, 0)
    for given in [*(texts or []), *(prompts or [])]:
        recipes.checks.text("--text" if given in (texts or []) else "--prompt", given)
    saved = recipes.saved.open_adapter(adapter)
    loaded = recipes.saved.load(saved, model=model, dtype=dtype, data={"template": template})
    task = loaded.task
    if not task.generates:
        raise UserError(f"This adapter is for {task.type}: its model labels, it does not write. Use `peft predict`.")
    asked = [task.prompt({task.data.text: text, "text": text}) for text in texts or []] + list(prompts or [])
    settings: dict[str, object] = {"max_new_tokens": max_new_tokens}
    if temperature > 0:
        settings |= {"do_sample": True, "temperature": temperature}
    for prompt in asked:
        transformers.set_seed(seed)
        console.print(
            f"{escape(prompt.rstrip())} [green]{escape(task.generate(loaded.model, [prompt], **settings)[0])}[/]",
            soft_wrap=True,
        )
        if base:
            transformers.set_seed(seed)
            with loaded.model.disable_adapter():
                answer = task.generate(loaded.model, [prompt], **settings)[0]
            console.print(f"[dim]base alone:[/] {escape(answer)}", soft_wrap=True)
