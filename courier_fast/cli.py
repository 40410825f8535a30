"""The command `courier-fast`."""

from __future__ import annotations

import argparse
import importlib
import logging
import sys

from . import __version__
from .option_rules import check

# Each is a module with add_arguments(parser) and run(args); imported when asked for, so --help and the others need none of its packages.
COMMANDS = {
    "quickstart": (
        "courier_fast.quickstart.command",
        "draw a catalogue, train on it, evaluate, and write a report: no data, no GPU",
    ),
    "prepare": ("courier_fast.data.command", "interactions and images -> a dataset folder"),
    "verify": ("courier_fast.data.verify", "checks a dataset folder against its checksums"),
    "train": ("courier_fast.train.command", "a dataset folder -> an encoder"),
    "embed": ("courier_fast.evaluate.embed", "an encoder and images -> embeddings"),
    "export": (
        "courier_fast.serve.command",
        "an encoder -> ONNX and torch files for servers, with a contract and a model card",
    ),
    "evaluate": (
        "courier_fast.evaluate.command",
        "embeddings against the held-out clicks, beside baselines",
    ),
    "ctr": (
        "courier_fast.evaluate.ctr.command",
        "what embeddings are worth to a click-through-rate model",
    ),
    "sweep": (
        "courier_fast.evaluate.sweep",
        "a grid of training settings: train, embed and evaluate each; one table, plots",
    ),
    "index": (
        "courier_fast.serve.index_command",
        "nearest neighbours of items and images; clusters",
    ),
    "report": (
        "courier_fast.report.command",
        "one HTML page about a run: pictures, curves, numbers",
    ),
}
EXTRAS = {"ctr": "ctr", "export": "export", "index": "index"}  # of pip, where it is not "train"


def main(argv: list[str] | None = None) -> int:
    """Runs a subcommand; wrong input is one line on stderr and exit code 2."""
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
                print(
                    f'courier-fast {name} needs {error.name}: pip install "courier_fast[{EXTRAS.get(name, "train")}]"',
                    file=sys.stderr,
                )
                return 2
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        check(parser, args, argv)
        return importlib.import_module(COMMANDS[args.command][0]).run(args)
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if args.debug:
            raise
        print(f"courier-fast {args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
