"""The command `courier-fast`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import select
import signal
import sys

from . import __version__, interrupt
from .messages import is_bug, line_of
from .option_rules import check_options

# Each is a module with add_arguments(parser) and run(args); imported when asked for, so --help and
# the others need none of its packages.
COMMANDS = {
    "quickstart": (
        "courier_fast.quickstart.command",
        "draw a catalogue, train on it, evaluate, and write a report: no data, no GPU",
    ),
    "prepare": ("courier_fast.data.prepare.command", "interactions and images -> a dataset folder"),
    "verify": ("courier_fast.data.verify", "checks a dataset folder against its checksums"),
    "train": ("courier_fast.train.command", "a dataset folder -> an encoder"),
    "embed": ("courier_fast.embed.command", "an encoder and images -> embeddings"),
    "export": (
        "courier_fast.serve.command",
        "an encoder -> ONNX and torch files for servers, with a contract and a model card",
    ),
    "evaluate": (
        "courier_fast.evaluate.command",
        "embeddings against the held-out clicks, beside baselines",
    ),
    "ctr": (
        "courier_fast.ctr.command",
        "what embeddings are worth to a click-through-rate model",
    ),
    "sweep": (
        "courier_fast.sweep",
        "a grid of training settings: train, embed and evaluate each; one table, plots",
    ),
    "index": (
        "courier_fast.index.command",
        "nearest neighbours of items and images; clusters, semantic ids",
    ),
    "report": (
        "courier_fast.report.command",
        "one HTML page about a run: pictures, curves, numbers",
    ),
    "doctor": (
        "courier_fast.doctor.command",
        "what is installed, which implementation runs and why, and whether its numbers are right",
    ),
}
EXTRAS = {"ctr": "ctr", "export": "export", "index": "index"}  # of pip, where it is not "train"


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; wrong input is one line on stderr and exit code 2, a bug of the package 1,
    a signal 128 and its number."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="courier-fast", description="Item embeddings from clicks (COURIER, arXiv 2306.05001)."
    )
    parser.add_argument("--version", action="version", version=f"courier_fast {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    asked = next((a for a in argv if not a.startswith("-")), None)
    for name, (module, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == asked:
            try:
                importlib.import_module(module).add_arguments(command)
            except ModuleNotFoundError as error:
                if error.name is None or error.name.startswith("courier_fast"):
                    raise
                install = f'pip install "courier_fast[{EXTRAS.get(name, "train")}]"'
                print(f"courier-fast {name} needs {error.name}: {install}", file=sys.stderr)
                return 2
            except ImportError as error:
                print(f"courier-fast {name}: {line_of(error, name)}", file=sys.stderr)
                return 2
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # Where it has no cache yet, it says so: "generated new fontManager".
    logging.getLogger("matplotlib.font_manager").setLevel(logging.WARNING)
    with interrupt.stopping():
        return _run_command(parser, args, argv)


def _run_command(parser: argparse.ArgumentParser, args: argparse.Namespace, argv: list[str]) -> int:
    """The command's status; what it raises becomes a line on stderr, and a signal 128 and its
    number, as the shell has it."""
    try:
        check_options(parser, args, argv)
        status: int = importlib.import_module(COMMANDS[args.command][0]).run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt as stop:
        return 128 + (getattr(stop, "number", 0) or interrupt.received() or signal.SIGINT)
    except Exception as error:
        if interrupt.received():  # libraries make errors of their own of it
            return 128 + interrupt.received()
        if isinstance(error, BrokenPipeError) and _reader_gone():
            return 128 + signal.SIGPIPE
        if args.debug:
            raise
        print(f"courier-fast {args.command}: {line_of(error, args.command)}", file=sys.stderr)
        return 1 if is_bug(error) else 2


def _reader_gone() -> bool:
    """Whether nobody reads what is printed (| head): it goes nowhere, also at Python's end."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


if __name__ == "__main__":
    sys.exit(main())
