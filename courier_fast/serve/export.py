"""A run's encoder as files for servers, each judged before it is written: see docs/serving.md."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import __version__
from ..data.dataset import Dataset
from ..data.images.pictures import read_pillow
from ..files import sha256
from ..output import EXPORT, check_output, write_folder
from ..train.config import Config
from ..train.encoder import first_dimensions, load_encoder
from ..train.journal import last_step
from .artifacts import check_installed, program_of, write_onnx, write_precision, write_torch
from .card import write_card
from .contract import Contract, contract_of_run
from .golden import FOLDER, scene, write_golden
from .load import PRECISIONS, onnx_run
from .measure import (
    Parity,
    Run,
    machine,
    ranking,
    run_of,
    some_photos,
    speed,
    tables_of,
    why_refused,
)
from .module import Serving

log = logging.getLogger(__name__)

FORMATS = ("onnx", "torch")
DRAWN = 56  # inputs for parity beside the golden ones, where there is no dataset


def export(
    run: Path,
    out: Path,
    *,
    licence: str,
    formats: Sequence[str] = FORMATS,
    precisions: Sequence[str] = ("float32",),
    dim: int | None = None,
    dataset: Path | None = None,
    split: str = "test",
    photos: int = 256,
    threads: int = 1,
) -> Contract:
    """Writes the folder `out`: encoder files, golden pictures, contract.json and MODEL_CARD.md.
    Complete or not there.

    Args:
        licence: of the weights; they inherit the terms of the backbone's weights and of the photos.
        formats: "onnx", "torch" or both.
        precisions: of the ONNX files; float32 is always among them. One that breaks its budget is
            left out, with a warning.
        dim: the first dimensions alone, as `embed --dim`; None: all.
        dataset: whose photos parity is measured on, and whose held-out clicks are ranked by every
            precision; None: neither.
        photos: of the dataset, for parity.
        threads: of the speed measured.

    Raises:
        FileNotFoundError: no encoder in `run`.
        ValueError: an argument that is not as above, `out` holds something else, or an encoder too
            large for ONNX.
        RuntimeError: the exported float32 file breaks its budget.
    """
    _check_arguments(licence, formats, precisions)
    check_output(out, EXPORT, inputs=(run, dataset), overwrite=True)
    if "onnx" in formats:
        check_installed()
    encoder = load_encoder(run)
    if dim is not None:
        encoder = first_dimensions(encoder, dim)
    contract, serving = contract_of_run(run, dim), Serving(encoder)
    if dataset is not None and not contract.takes_images:
        raise ValueError(
            "dataset: expected none with an encoder of features, which is measured by "
            "`courier-fast evaluate`"
        )
    data = None if dataset is None else Dataset(dataset)
    if data is not None:
        data.split(split)  # there is one
    contract = replace(contract, licence=licence, trained=_origin(run), versions=_versions())

    def write(folder: Path) -> None:
        golden = write_golden(folder, contract, run_of(serving))
        inputs = np.concatenate([_golden_inputs(folder, golden), _more(contract, data, photos)])
        parity = Parity(serving, inputs)
        runs = {"PyTorch": run_of(serving)}
        numbers: dict[str, dict[str, Any]] = {"PyTorch": parity.of(runs["PyTorch"])}
        program, names = program_of(serving), dict[str, str | None]()
        if "torch" in formats:
            names |= write_torch(run, folder, program)
            if not parity.same(program.module()):
                raise RuntimeError("encoder.pt2 differs from PyTorch: expected equal bits")
        for precision in dict.fromkeys(("float32", *precisions)) if "onnx" in formats else ():
            if precision == "float32":
                name = write_onnx(folder, serving, program)
            else:
                name = write_precision(folder, precision)
            names[name], path = precision, folder / name
            runs[precision] = onnx_run(contract, path, threads)
            numbers[precision] = parity.of(runs[precision]) | {"bytes": path.stat().st_size}
            if precision == "float32":  # before hours of measuring
                _keeps(path, precision, numbers)
        measured = {"inputs": len(inputs), "dataset": None, "rows": numbers}
        if data is not None:
            measured |= _measure(data, split, runs, numbers, inputs, threads)
        for name in [n for n in names if n.endswith(".onnx")]:
            if not _keeps(folder / name, str(names[name]), numbers):
                del names[name]
        names |= {f"{FOLDER}/{p.name}": None for p in sorted((folder / FOLDER).iterdir())}
        entries = [
            {"name": name, "sha256": sha256(folder / name), "precision": precision}
            for name, precision in names.items()
        ]
        whole = replace(contract, golden=golden, measured=measured, files=entries)
        whole.write(folder)
        write_card(folder, whole)

    write_folder(out, EXPORT, write, inputs=(run, dataset))
    return Contract.read(out)


def _check_arguments(licence: str, formats: Sequence[str], precisions: Sequence[str]) -> None:
    if not licence.strip():
        raise ValueError("licence: expected that of the weights, got none")
    for name, given, known in (("format", formats, FORMATS), ("precision", precisions, PRECISIONS)):
        unknown = sorted(set(given) - set(known))
        if unknown or not given:
            raise ValueError(
                f"{name}: expected some of {', '.join(known)}, got {unknown or 'none'}"
            )
    if set(precisions) - {"float32"} and "onnx" not in formats:
        raise ValueError(
            f"precision: {', '.join(precisions)} are of ONNX files, expected format onnx, got "
            f"{', '.join(formats)}"
        )


def _golden_inputs(folder: Path, golden: dict[str, Any]) -> np.ndarray:
    from PIL import Image

    if "features" in golden:
        return np.load(folder / golden["features"], allow_pickle=False)
    return np.stack([np.array(Image.open(folder / p["input"])) for p in golden["pictures"]])


def _more(contract: Contract, data: Dataset | None, count: int) -> np.ndarray:
    """Inputs beside the golden ones: photos, else drawn."""
    if data is not None:
        return some_photos(data, count, contract.input["size"])
    if contract.takes_images:
        size = contract.input["size"]
        return np.stack([scene(size, size, seed) for seed in range(100, 100 + DRAWN)])
    width = contract.input["shape"][1]
    return np.random.default_rng(1).normal(size=(DRAWN, width)).astype(np.float32)


def _keeps(path: Path, precision: str, numbers: dict[str, dict[str, Any]]) -> bool:
    """Whether a file keeps its budget; if not it is removed, with the reason. RuntimeError for
    float32, without which there is no export."""
    why = why_refused(precision, numbers[precision])
    if not why:
        return True
    if precision == "float32":
        raise RuntimeError(f"{path.name} differs from PyTorch: {why}")
    log.warning("%s is not written: %s", path.name, why)
    numbers[precision]["refused"] = why
    path.unlink()
    return False


# ---- what is said of it --------------------------------------------------------------------------


def _measure(
    data: Dataset,
    split: str,
    runs: dict[str, Run],
    numbers: dict[str, dict[str, Any]],
    inputs: np.ndarray,
    threads: int,
) -> dict[str, Any]:
    """Ranks by every precision and times all of them; fills `numbers`. float32 is that of ONNX
    where there is one."""
    base = "float32" if "float32" in runs else "PyTorch"
    ranked = {base: runs[base]} | {k: r for k, r in runs.items() if k not in (base, "PyTorch")}
    tables = tables_of(data, ranked, inputs.shape[1])
    tables["float32, stored as float16"] = tables[base].astype(np.float16).astype(np.float32)
    other = "float32, decoded by Pillow"  # the best that a client without libjpeg-turbo can do
    tables |= tables_of(data, {other: runs[base]}, inputs.shape[1], read_pillow)
    cosines = (tables[other] * tables[base]).sum(1)
    least, mean = float(np.nanmin(cosines)), float(np.nanmean(cosines))
    numbers[other] = {"cosine_min": least, "cosine_mean": mean}
    for name, found in ranking(data, tables, split).items():
        numbers.setdefault(name, {}).update(found)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        batch = inputs[np.arange(32) % len(inputs)]
        for name, rate in speed(runs, batch).items():
            numbers[name]["images_per_s"] = rate
    finally:
        torch.set_num_threads(before)
    return {"dataset": data.fingerprint, "split": split, "machine": machine(threads), "batch": 32}


def _origin(run: Path) -> dict[str, Any]:
    """What a run says of itself, and of its dataset if that is still where it was."""
    found: dict[str, Any] = {
        "run": run.resolve().name,
        "steps": None,
        "settings": None,
        "settings_sha256": None,
        "dataset": None,
    }
    journal, settings = run / "metrics.jsonl", run / "config.toml"
    if journal.is_file():
        found["steps"] = last_step(journal)
    if not settings.is_file():
        return found
    config = Config.load(settings)
    found["settings"] = config.model_dump(mode="json", exclude={"run"}, exclude_none=True)
    found["settings_sha256"] = sha256(settings)
    features = config.data.features
    if features is not None and features.is_file():
        found["features_sha256"] = sha256(features)
    try:
        data = Dataset(config.data.dataset)
    except (OSError, ValueError) as error:
        log.warning("the dataset of the run is not there, so the contract lacks it: %s", error)
        return found
    rows = data.split("train")
    times = data.page_time[rows.start : rows.stop]

    def date(seconds: float) -> str:
        if not data.timed:
            return f"page {seconds:.0f}"
        return datetime.fromtimestamp(float(seconds), timezone.utc).isoformat()

    found["dataset"] = {
        "name": data.name,
        "sha256": data.fingerprint,
        "pages": len(rows),
        "items": data.num_items,
        "from": date(math.floor(times.min())),
        "until": date(math.ceil(times.max())),
    }
    return found


def _versions() -> dict[str, str]:
    found = {"courier_fast": __version__, "torch": str(torch.__version__)}
    for name in ("timm", "onnx", "onnxruntime", "pillow", "simplejpeg"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
