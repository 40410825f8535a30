"""The encoder's files: ONNX in three precisions, and torch's."""

from __future__ import annotations

import importlib.util
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from .load import WEIGHTS
from .module import Serving

OPSET = 20
LARGEST = 2**31 - 2**20  # bytes: an ONNX file is one protobuf message
# Numbers: smaller tensors stay float32. In an EfficientNet the first convolution, those by channel
# and the biases are 4 % of the weights; as float16 they cost 0.0015 of cosine, all others 0.000003.
SMALL = 1 << 14


def check_installed() -> None:
    """ModuleNotFoundError where a package of the extra "export" is missing."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(
                f'format onnx needs {name}: pip install "courier_fast[export]"', name=name
            )


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell of every step."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def program_of(serving: Serving) -> torch.export.ExportedProgram:
    """The graph, for batches of any size."""
    batch = torch.export.Dim("batch", min=1)
    return torch.export.export(serving, (serving.example(),), dynamic_shapes=({0: batch},))


def write_torch(
    run: Path, folder: Path, program: torch.export.ExportedProgram
) -> dict[str, str | None]:
    """The run's own files, which `courier_fast.load` reads, and the program, for servers that have
    torch alone; names and precisions."""
    for name in (WEIGHTS, "encoder.json"):
        shutil.copyfile(run / name, folder / name)
    with _quiet():
        torch.export.save(program, folder / "encoder.pt2")
    return {WEIGHTS: "float32", "encoder.json": None, "encoder.pt2": "float32"}


def write_onnx(folder: Path, serving: Serving, program: torch.export.ExportedProgram) -> str:
    """Writes encoder.onnx and returns its name; the batch size is called "batch". ValueError for an
    encoder too large."""
    size = sum(x.numel() * x.element_size() for x in serving.state_dict().values())
    if size > LARGEST:
        raise ValueError(f"format: an ONNX file holds 2 GiB, the encoder {size / 2**30:.1f} GiB")
    given = "pixels" if serving.takes_images else "features"
    with _quiet():
        torch.onnx.export(
            program,
            (serving.example(),),
            folder / "encoder.onnx",
            dynamo=True,
            external_data=False,
            opset_version=OPSET,
            input_names=[given],
            output_names=["embedding"],
            dynamic_shapes={"x": {0: "batch"}},
            verbose=False,
        )
    return "encoder.onnx"


def write_precision(folder: Path, precision: str) -> str:
    """From encoder.onnx writes encoder.float16.onnx or encoder.int8.onnx; returns the name."""
    path, out = folder / "encoder.onnx", folder / f"encoder.{precision}.onnx"
    with _quiet():
        if precision == "float16":
            _halve(path, out)
        else:
            from onnxruntime.quantization import QuantType, quantize_dynamic

            # By channel: by tensor, a transformer loses 30 times as much.
            quantize_dynamic(
                path,
                out,
                per_channel=True,
                weight_type=QuantType.QInt8,
                op_types_to_quantize=["MatMul", "Gemm"],
            )
    return out.name


def _halve(path: Path, out: Path) -> None:
    """Weights stored as float16, cast to float32 in the graph (onnxruntime does that once, when it
    loads): half the size, no other arithmetic.

    A graph of float16 arithmetic is slower on CPUs, where every operator casts its operands.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    model = onnx.load(path)
    casts = []
    for weight in model.graph.initializer:
        values = numpy_helper.to_array(weight)
        if (
            values.dtype != np.float32
            or values.size < SMALL
            or np.abs(values).max() > np.finfo(np.float16).max
        ):
            continue
        name = weight.name
        weight.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.float16"))
        casts.append(helper.make_node("Cast", [weight.name], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    known = {c.output[0] for c in casts}
    for info in [v for v in model.graph.value_info if v.name in known]:
        model.graph.value_info.remove(info)
    onnx.checker.check_model(model)
    onnx.save(model, out)
