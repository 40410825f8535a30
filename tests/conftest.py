"""Which implementations the tests run on, and memory that shows when it is read before written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores, and so do the processes that tests start: threads that wait for
    # each other spin.
    threads = str(max(1, CORES // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, threads)

import torch  # noqa: E402

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from factories import DEVICES  # noqa: E402

from courier_fast.testing.interpreter import make_fast  # noqa: E402
from courier_fast.testing.poison import poisoned  # noqa: E402

if os.environ.get("TRITON_INTERPRET") == "1":
    make_fast()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    with poisoned():
        yield


@pytest.fixture(autouse=True)
def own_threads() -> Iterator[None]:
    """What a test sets ends with it: two workers of two threads on two cores wait for each other
    ten times as long."""
    before = torch.get_num_threads()
    yield
    if torch.get_num_threads() != before:
        torch.set_num_threads(before)


# Files with tests of many seconds, which begin first: a worker takes from another what is at its
# end, so that all workers come to theirs together.
FIRST = (
    "test_remote.py",
    "test_train_shard.py",
    "test_dry_run.py",
    "test_compile_targets.py",
    "test_train_processes.py",
    "test_train.py",
    "test_compile.py",
    "test_bounds.py",  # it also imports Dynamo
    "test_serve.py",
    "test_quickstart.py",
    "test_property.py",
    "test_processes.py",
)


def place(item: pytest.Item) -> tuple[bool, int]:
    """Tests with Ray before all others, one after the other, as they share its start."""
    name = item.path.name
    with_ray = "ray" in getattr(item, "fixturenames", ())
    return not with_ray, FIRST.index(name) if name in FIRST else len(FIRST)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With --long a file without long tests is not imported."""
    if not config.getoption("--long") or not collection_path.match("test_*.py"):
        return None
    return None if "mark.long(" in collection_path.read_text("utf-8") else True


LEFT_OUT = pytest.StashKey[dict[str, int]]()  # how many tests of which kind


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a GPU what runs on Triton runs on NumPy; tests that say so in no parameter carry the
    mark themselves. And long tests are left out, unless an option or the command line names
    them."""
    asked: set[tuple[str, Any]] = set()  # values of `short`, and those that a case has
    met: set[tuple[str, Any]] = set()
    for item in items:
        callspec = getattr(item, "callspec", None)
        params = {} if callspec is None else callspec.params
        if params.get("impl") == "triton":
            item.add_marker("numpy_products")
        for mark in list(item.iter_markers("long")):
            values = [x for x in params.values() if isinstance(x, int | str)]
            test, short = item.nodeid.partition("[")[0], mark.kwargs.get("short", ())
            found = [x for x in short if x in values]
            asked |= {(test, x) for x in short}
            met |= {(test, x) for x in found}
            if found:
                item.own_markers.remove(mark)
    if asked - met and not any("::" in argument for argument in config.args):
        test, value = min(asked - met, key=str)
        raise pytest.UsageError(f"{test}: short: expected values of its parameters, got {value!r}")
    items.sort(key=place)
    if config.option.markexpr:
        return
    only, here = config.getoption("--long"), config.invocation_params.dir
    named = {(here / argument.partition("::")[0]).resolve() for argument in config.args}
    left_out: dict[str, int] = {}
    chosen, others = [], []
    for item in items:
        mark = item.get_closest_marker("long")
        if (mark is not None) if only else (mark is None or item.path.resolve() in named):
            chosen.append(item)
            continue
        others.append(item)
        if mark is not None:
            if not mark.args:
                raise pytest.UsageError(f"{item.nodeid}: long: expected a reason, got none")
            left_out[mark.args[0]] = left_out.get(mark.args[0], 0) + 1
    items[:] = chosen
    if others:
        config.hook.pytest_deselected(items=others)
    config.stash[LEFT_OUT] = left_out
    if hasattr(config, "workeroutput"):
        config.workeroutput["left_out"] = left_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Each of xdist's workers has collected everything: what one of them says is true of all."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if left_out := config.stash.get(LEFT_OUT, {}):
        kinds = ", ".join(f"{kind} ({left_out[kind]})" for kind in sorted(left_out))
        terminalreporter.write_line(
            f"{sum(left_out.values())} long tests were left out: {kinds}. `pytest --long` runs them"
            ' (`pip install -e ".[test-all]"`).'
        )


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """--long; and where pytest-xdist is not installed, what pyproject.toml asks of it is taken and
    ignored."""
    parser.addoption("--long", action="store_true", help="run the tests marked long, and no others")
    if not pluginmanager.hasplugin("xdist"):
        group = parser.getgroup("xdist")
        group._addoption("-n", dest="numprocesses")
        group._addoption("--dist", dest="dist", default="no")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """-n auto: a worker holds 1 GB and more, so not as many as a large machine has cores."""
    return min(CORES, 8)


def pytest_report_header() -> list[str]:
    return [f"courier_fast: torch {torch.__version__}, implementations on {DEVICES}"]


RAY = ExitStack()


@pytest.fixture
def ray(request: pytest.FixtureRequest) -> Any:
    """Ray on this machine, started by the first of the tests that have it. Its workers cannot
    import the module of a test."""
    from courier_fast.engines import connected

    module = RAY.enter_context(connected())
    module.cloudpickle.register_pickle_by_value(request.module)
    return module


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ray ends where no test with it follows."""
    if "ray" not in getattr(nextitem, "fixturenames", ()):
        RAY.close()
