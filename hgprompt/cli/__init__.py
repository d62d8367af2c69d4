"""The command line: hgprompt demo, train-source, select, ensemble, tune, inspect, reproduce."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer

from hgprompt.cli.demo import demo
from hgprompt.cli.ensemble import ensemble
from hgprompt.cli.inspect import inspect
from hgprompt.cli.reproduce import reproduce
from hgprompt.cli.select import select
from hgprompt.cli.tune import train_source, tune

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs are wrapped to the terminal, not where the docstring's lines end
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hgprompt {version('hgprompt')}")
        raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Reuse visual prompts: tune them on some tasks, mix them for a new one, tune from the mixture.

    Begin with 'hgprompt demo'. Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 an error
    (in one line), 2 wrong usage, 130 interrupted.
    """


app.command()(demo)
app.command("train-source")(train_source)
app.command()(select)
app.command()(ensemble)
app.command()(tune)
app.command()(inspect)
app.command()(reproduce)


def _printable(text: str) -> str:
    """Names of files and what stands in them come from strangers: nothing that steers a terminal."""
    from hgprompt.cli.show import plain

    return "\n".join(map(plain, text.split("\n")))


def _show_warning(message: Any, *_: Any) -> None:
    typer.secho(f"warning: {_printable(str(message))}", fg="yellow", err=True)


def main() -> None:
    """Entry point: errors of hgprompt in one line, without a traceback."""
    from hgprompt.errors import HGPromptError

    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning  # type: ignore[assignment]
            code = app(standalone_mode=False)
    except HGPromptError as error:
        typer.secho(f"error: {_printable(str(error))}", fg="red", err=True)
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        show = getattr(error, "show", None)  # the usage errors of the command line library
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    if code == 130:  # Typer's own answer to Ctrl-C
        typer.secho(
            "interrupted; nothing half-written was left. Run again, tuning goes on from its last epoch, and a pass "
            "with --checkpoint-dir from its last checkpoint",
            fg="red",
            err=True,
        )
    sys.exit(code if isinstance(code, int) else 0)
