"""The command line: `comatch VERB ...`, one small file per verb in this folder.

A verb file holds one function `command(...)`; its docstring is the help text, the file's name is the verb.
Files whose names start with _ hold what several verbs share. Whatever is slow to import is imported inside
functions, so that `comatch --help` answers at once. Data goes to stdout, everything else to stderr. A verb
that ends neither well nor by a ComatchError raises `typer.Exit(code)` with one of the codes below.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from typing import Annotated, NoReturn

import typer

from comatch.errors import ComatchError, ConfigError

FAILED, USAGE, QUARANTINED, PREEMPTED, INTERRUPTED = 1, 2, 3, 75, 130
"""Exit codes beside 0: failed; wrong usage or config; done, items set aside; stopped, resumable; Ctrl-C."""


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run one command (`args`, by default the process's own) and exit with its code."""
    try:
        build()(args)
    except ComatchError as error:
        _say(error)
        sys.exit(USAGE if isinstance(error, ConfigError) else FAILED)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        _hush()
    except SystemExit:
        _flush()
        raise
    sys.exit(0)


def build() -> typer.Typer:
    """The app, with every verb file that stands in this folder."""
    about = "Compress, then match: multimodal embeddings."
    app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help=about)
    app.callback()(_options)
    for name in sorted(module.name for module in iter_modules(__path__) if module.name[0] != "_"):
        app.command(name)(import_module(f"{__name__}.{name}").command)
    return app


def _version(wanted: bool) -> None:
    if wanted:
        from comatch import __version__

        typer.echo(__version__)
        raise typer.Exit()


def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options before the verb."""


def _say(error: ComatchError) -> None:
    from rich.console import Console
    from rich.text import Text

    text = Text.assemble((f"{type(error).__name__}: ", "bold red"), str(error))
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)


def _flush() -> None:
    """Write what is left here, where a closed pipe is met quietly; the interpreter's own flush complains."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        _hush()


def _hush() -> NoReturn:
    """The reader of our output has gone (`comatch ... | head`): end without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(FAILED)
