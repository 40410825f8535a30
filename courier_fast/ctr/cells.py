"""The cells of the table: which there are, each one's predictions in a file, and the run that fills
what is missing."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..data.dataset import Dataset
from ..files import write_atomically
from .fit import Settings, fit
from .harm import GATE, POLICY, Policy
from .impressions import SCRATCH, Protocol
from .inputs import Inputs, Material
from .warm import go_on

log = logging.getLogger(__name__)

Array = npt.NDArray

NONE = "none"  # the form without an embedding, and the name of that
RANDOM = "random"  # the control
VERSION = 1  # of what a cell is made by; another one makes all cells anew
_WRITING = (
    threading.Lock()
)  # a folder is flushed with all that is in it: nothing may come or go meanwhile


@dataclass(frozen=True)
class Cell:
    """One trained model: what it is, and the name of its file."""

    model: str
    form: str
    embedding: str
    protocol: str
    seed: int

    @property
    def file(self) -> str:
        return f"{self.model}-{self.form}-{self.embedding}-{self.protocol}-{self.seed}.parquet"


@dataclass(frozen=True)
class Plan:
    """Everything that decides the table's numbers.

    Args:
        embeddings: {name: tables [items, D]}, one for all seeds or one for each; the random control
            among them if there is to be one.
        protocols: what `make_protocol` gave.
        ranges: validation, or validation and test, are predicted.
    """

    dataset: Dataset
    embeddings: Mapping[str, Sequence[Array]]
    models: Sequence[str]
    forms: Sequence[str]
    protocols: Sequence[Protocol]
    seeds: int = 3
    settings: Settings = field(default_factory=Settings)
    history: int = 20
    least: int = 2
    ranges: tuple[str, ...] = ("validation", "test")
    policy: Policy | None = None  # of the forms that end in "+policy"

    def off(self, form: str, embedding: str) -> Array | None:
        """[items] bool: where the policy fills in zeros; None where none is asked for."""
        if self.policy is None or not form.endswith(POLICY):
            return None
        return self.policy.off(form, embedding, self.dataset)

    def groups(self) -> list[tuple[Protocol, str, str]]:
        """Protocol, form, embedding; first without one, which the others are compared with."""
        made = [
            (protocol, form, name)
            for protocol in self.protocols
            for form in self.forms
            for name in ([NONE] if form == NONE else self.embeddings)
            if name != RANDOM or not form.endswith((GATE, POLICY))
        ]
        return sorted(made, key=lambda g: (self.protocols.index(g[0]), g[1] != NONE))

    def cells(self, group: tuple[Protocol, str, str]) -> list[Cell]:
        protocol, form, name = group
        pairs = itertools.product(self.models, range(self.seeds))
        return [Cell(model, form, name, protocol.name, seed) for model, seed in pairs]

    def place(self, cell: Cell) -> int:
        """Which of its embedding's tables a cell is given: its seed's, or the only one."""
        return cell.seed if len(self.embeddings.get(cell.embedding, ())) > 1 else 0

    def fingerprints(self) -> Callable[[Cell], str]:
        """What a cell's file must have been made from; changes with anything that its predictions
        come from."""
        d = self.dataset
        arrays = [
            d.page_user,
            d.page_moment,
            d.history_start,
            d.history_end,
            d.pv_start,
            d.pv_end,
            d.pv_item,
            d.pv_clicked,
            d.event_item,
            *([] if d.histories_given else [d.event_moment]),
        ]
        if d.pv_weight is not None:
            arrays.append(d.pv_weight)
        data = _digest(*arrays, about=[d.info["splits"], d.categories.to_pylist()])
        tables = {name: [_digest(x) for x in of] for name, of in self.embeddings.items()} | {
            NONE: [""]
        }
        bounds = {
            p.name: [p.bound, p.train.start, *(x.start for of in p.periods.values() for x in of)]
            for p in self.protocols
        }

        def of(cell: Cell) -> str:
            about = {
                "version": VERSION,
                "cell": asdict(cell),
                "data": data,
                "embedding": tables[cell.embedding][self.place(cell)],
                "bounds": bounds[cell.protocol],
                "settings": asdict(self.settings),
                "history": self.history,
                "least": self.least,
                "ranges": self.ranges,
            }
            off = self.off(cell.form, cell.embedding)
            if off is not None:
                about["off"] = _digest(off)
            return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()

        return of


def _digest(*arrays: Array, about: Any = None) -> str:
    digest = hashlib.sha256(json.dumps(about).encode())
    for array in arrays:
        digest.update(f"{array.dtype}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()


def write_cell(
    path: Path, cell: Cell, fingerprint: str, columns: dict[str, Any], losses: list[float]
) -> None:
    about = {"cell": asdict(cell), "fingerprint": fingerprint, "validation_logloss": losses}
    table = pa.table(columns).replace_schema_metadata({"courier_fast": json.dumps(about)})
    with _WRITING:
        write_atomically(path, lambda partial: pq.write_table(table, partial))


def is_done(path: Path, fingerprint: str) -> bool:
    """Whether the cell's file is there, made from the same; one of something else is named."""
    if not path.is_file():
        return False
    about = json.loads((pq.read_schema(path).metadata or {}).get(b"courier_fast", b"{}"))
    if about.get("fingerprint") == fingerprint:
        return True
    log.warning("%s was made with other data or settings: it is trained anew", path)
    return False


def read_predictions(path: Path, ranges: Sequence[str]) -> dict[str, Array]:
    """{range: [n] float64} of a cell's file."""
    read = pq.read_table(path, columns=["range", "p"])
    where, p = read["range"].combine_chunks().to_numpy(zero_copy_only=False), read["p"].to_numpy()
    return {name: p[where == name].astype(np.float64) for name in ranges}


def mean_predictions(
    plan: Plan, out: Path, split: str, model: str, form: str, embedding: str, protocol: str
) -> Array:
    """[n] probabilities of a range, means over the seeds."""
    cells = [Cell(model, form, embedding, protocol, seed) for seed in range(plan.seeds)]
    read = [read_predictions(out / "cells" / cell.file, (split,))[split] for cell in cells]
    return np.mean(read, 0)


def _predicted_columns(inputs: Inputs, predictions: dict[str, Array]) -> dict[str, Any]:
    parts = []
    for name, p in predictions.items():
        x = inputs.splits[name].shown
        parts.append(
            {
                "range": np.full(len(x), name),
                "page": x.page,
                "item": x.item,
                "user": x.user,
                "clicked": x.clicked,
                "p": p,
            }
        )
    return {c: pa.array(np.concatenate([part[c] for part in parts])) for c in parts[0]}


class _StoppedError(Exception):
    pass


@contextmanager
def _one_thread() -> Iterator[None]:
    """A cell is one thread's work: small batches gain nothing from more, and the bits do not depend
    on the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_plan(
    plan: Plan,
    out: Path,
    *,
    threads: int,
    began: Callable[[Cell], Callable[[float], None]] = lambda _: lambda _: None,
    ended: Callable[[Cell], None] = lambda _: None,
) -> int:
    """Trains the cells that `out`/cells lacks, `threads` at a time; gives how many were there
    already.

    Args:
        began: called as a cell begins; gives what is called with its progress, 0 to 1.
        ended: called as a cell ends or is found to be there.
    """
    folder, fingerprint, found = out / "cells", plan.fingerprints(), 0
    folder.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()

    def one(cell: Cell, inputs: Inputs, protocol: Protocol, before: Inputs | None) -> None:
        torch.set_num_threads(1)
        report = began(cell)

        def progress(share: float) -> None:
            if stop.is_set():
                raise _StoppedError
            report(share)

        if protocol.periods:
            of = cell.model, inputs, protocol, plan.settings, cell.seed
            fitted = go_on(*of, before=before, progress=progress)
        else:
            fitted = fit(cell.model, inputs, plan.settings, cell.seed, progress)
        columns = _predicted_columns(inputs, fitted.predictions)
        write_cell(folder / cell.file, cell, fingerprint(cell), columns, fitted.losses)
        ended(cell)

    waiting: deque[list[Future[None]]] = deque()
    material: dict[str, Material] = {}
    with _one_thread(), ThreadPoolExecutor(threads) as pool:
        try:
            for group in plan.groups():
                cells = plan.cells(group)
                missing = [c for c in cells if not is_done(folder / c.file, fingerprint(c))]
                for cell in cells:
                    if cell not in missing:
                        found += 1
                        ended(cell)
                for place in sorted({plan.place(cell) for cell in missing}):
                    inputs, before = _inputs(plan, group, place, material), None
                    if group[0].periods and group[0].name != SCRATCH and group[1] != NONE:
                        before = _inputs(plan, (group[0], NONE, NONE), 0, material)
                    mine = [cell for cell in missing if plan.place(cell) == place]
                    waiting.append(
                        [pool.submit(one, cell, inputs, group[0], before) for cell in mine]
                    )
                    del inputs, before
                    # The next inputs are made while these cells are trained; no more, for the
                    # memory.
                    _wait(waiting.popleft() if len(waiting) > 1 else ())
            for futures in waiting:
                _wait(futures)
        except BaseException:
            stop.set()
            pool.shutdown(cancel_futures=True)
            raise
    return found


def _inputs(
    plan: Plan, group: tuple[Protocol, str, str], place: int, material: dict[str, Material]
) -> Inputs:
    protocol, form, name = group
    if protocol.name not in material:
        material.clear()
        material[protocol.name] = Material(
            plan.dataset,
            protocol,
            history=plan.history,
            # A table that only grows has a row for every id; which ones will come again, nobody
            # knows.
            least=0 if protocol.periods else plan.least,
            ranges=("train", *plan.ranges),
        )
    table = plan.embeddings[name][place] if name in plan.embeddings else None
    return material[protocol.name].inputs(form, table, plan.off(form, name))


def _wait(futures: Iterable[Future[None]]) -> None:
    for future in futures:
        future.result()
