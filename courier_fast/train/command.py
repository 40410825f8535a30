"""`courier-fast train`."""

from __future__ import annotations

import argparse

from ..data.dataset import Dataset
from ..option_rules import refuse
from . import config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="?", help="TOML file; without one, --data.dataset is enough"
    )
    config.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    overrides = config.overrides_of(args)
    settings = config.Config.load(args.config, overrides)
    refuse(settings.unused(overrides))
    if Dataset(settings.data.dataset).has_embeddings:
        refuse(settings.unused(overrides, ready=True))
    from .trainer import Trainer

    trainer = Trainer(settings)
    try:
        last = trainer.fit()
    finally:
        trainer.close()
    if trainer.processes.rank == 0:
        where = (
            f"step {trainer.progress.step}, loss {last['loss']:.4f}"
            if "loss" in last
            else "nothing left to do"
        )
        print(f"{where}; encoder and checkpoints in {trainer.out}")
    # As the shell reports it, so that a scheduler knows the run is not complete.
    return trainer.status if last["stopped"] else 0
