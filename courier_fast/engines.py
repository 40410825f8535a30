"""Ray: one machine's processes or a cluster's, for `--engine ray`. The package has to be installed
on every machine."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

ENGINES = ("local", "ray")


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Where the work is done: shared by `prepare` and `embed`."""
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="local: this process; ray: processes of this machine or of a cluster; the same bytes",
    )
    parser.add_argument(
        "--ray-address",
        metavar="ADDRESS",
        help="of a running cluster, or auto; without it --engine ray starts one on this machine",
    )


@contextmanager
def connected(address: str | None = None) -> Iterator[Any]:
    """The module `ray`, connected: to what is connected already, to the cluster at `address`, or to
    one that is started here and ended again.

    Raises ModuleNotFoundError without Ray, ConnectionError where nothing answers.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'engine: "ray" needs {error.name}: pip install "courier_fast[ray]"', name=error.name
        ) from None
    mine = not ray.is_initialized()
    if mine:
        how: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
        if address is None:
            how |= {"num_cpus": len(os.sched_getaffinity(0)), "include_dashboard": False}
        before = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address, **how)
        except (OSError, ValueError):
            raise
        except Exception as error:  # plain ones where its processes do not start in time
            said = " ".join(str(error).split())[:600]
            raise ConnectionError(f"engine: Ray could not be started: {said}") from error
        finally:
            if threading.current_thread() is threading.main_thread() and before is not None:
                signal.signal(signal.SIGTERM, before)  # Ray puts its own in its place
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield ray
    finally:
        if mine:
            ray.shutdown()
