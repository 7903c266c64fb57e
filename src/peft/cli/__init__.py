"""The command line: `peft train | generate | predict | merge | inspect | methods`."""

try:
    from .main import app
except ModuleNotFoundError as missing:
    if (missing.name or "").split(".")[0] not in {"typer", "rich", "click", "yaml"}:
        raise
    _name = missing.name

    def app() -> None:  # type: ignore[misc]
        raise SystemExit(f"The command line needs the package {_name!r}: pip install {_name}")
