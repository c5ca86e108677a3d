"""The app: its commands, options that take several words, and what an error prints and exits with."""

import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Annotated, NoReturn

import typer

from upcycle.errors import UpcycleError
from upcycle.version import __version__

from . import (
    demo,
    evaluate,
    extract,
    generate,
    inspect,
    merge,
    output,
    plan,
    push,
    recipes,
    report,
    routers,
    train,
    verify,
)

# Options that take every word up to the next one that begins with `-`.
LIST_OPTIONS = ("--seeds", "--set", "--data", "--eval-data", "--mix", "--tasks", "--router-data", "--weights")

app = typer.Typer(
    name="upcycle",
    help="Turn dense language models that share one ancestor into one mixture of experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
for function in (
    merge.merge,
    plan.plan,
    routers.routers,
    train.train,
    evaluate.evaluate,
    report.report,
    inspect.inspect,
    verify.verify,
    extract.extract,
    generate.generate,
    push.push,
    demo.demo,
):
    app.command("eval" if function is evaluate.evaluate else None)(function)
app.add_typer(recipes.app, name="recipes")


def _version(wanted: bool) -> None:
    if wanted:
        output.data_line(f"upcycle {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def expand_lists(arguments: Sequence[str]) -> list[str]:
    """Rewrite `--seeds a b c` as `--seeds a --seeds b --seeds c`; a `--` ends a list and is taken away."""
    expanded: list[str] = []
    current = ""
    for word in arguments:
        name, _, _ = word.partition("=")
        if name in LIST_OPTIONS:
            current = name
            expanded.append(word)
            continue
        if current and not word.startswith("-"):
            # The first word stands beside the option already written, each further one gets an option of its own.
            expanded += [word] if expanded[-1] == current else [current, word]
            continue
        if not (current and word == "--"):
            expanded.append(word)
        current = ""
    return expanded


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 0 done, 1 input that cannot be served, 2 usage, 130 interrupted."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
    interrupts = _interrupt_on(signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    try:
        app(expand_lists(sys.argv[1:] if arguments is None else arguments))
    except UpcycleError as error:
        output.error(str(error))
        sys.exit(1)
    except output.Stopped:
        raise
    except (SystemExit, KeyboardInterrupt) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:
            raise
        _interrupted()
    except OSError as error:
        if error.filename is not None or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EBADF):
            _unexpected(error, interrupts)
        output.error(f"what was to be printed cannot be written: {error.strerror}")
        sys.exit(1)
    except Exception as error:  # a bug of ours, or input that no check foresaw: one message all the same
        _unexpected(error, interrupts)


def _unexpected(error: Exception, interrupts: list[int]) -> NoReturn:
    if interrupts:  # an import that a signal cut short raises something of its own
        _interrupted()
    if os.environ.get("UPCYCLE_DEBUG"):
        raise error
    output.error(f"unexpected {type(error).__name__}: {error}\nSet UPCYCLE_DEBUG=1 to see where, and report it.")
    sys.exit(1)


def _interrupt_on(*signals: signal.Signals) -> list[int]:
    """Let these signals end the work as Ctrl-C does, cleaning up; the list returned fills with those that came."""
    came: list[int] = []

    def interrupt(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is threading.main_thread():
        for number in signals:
            if signal.getsignal(number) != signal.SIG_IGN:  # nohup and background shells ask to be left alone
                signal.signal(number, interrupt)
    return came


def _interrupted() -> NoReturn:
    output.error("interrupted; nothing that looks finished was left behind")
    sys.exit(130)


if __name__ == "__main__":
    main()
