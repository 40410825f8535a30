"""Exported encoders: the files say what PyTorch says, the contract says what they are, and whatever
is not so is refused by name."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import textwrap
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_factory import draw, make_dataset
from PIL import Image
from train_factory import make_features, settings

import courier_fast
from courier_fast.cli import main
from courier_fast.data.embeddings import read_vectors
from courier_fast.data.images.decode import make_decoder
from courier_fast.data.images.transforms import eval_windows
from courier_fast.files import sha256
from courier_fast.serve.contract import Contract, contract_of_run
from courier_fast.serve.export import export
from courier_fast.serve.golden import decoded_in_full, distance, verify, without_antialiasing
from courier_fast.serve.load import square
from courier_fast.serve.measure import Parity, overlap, run_of, speed, why_refused
from courier_fast.serve.module import Serving
from courier_fast.train.encoder import build_encoder, load_encoder, save_encoder
from courier_fast.train.trainer import Trainer

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

SIZE = 32


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of two steps."""
    data = make_dataset(folder / "shop", users=12, items=40, pages=80)
    trainer = Trainer(settings(data, folder / "run", optim__steps=2, model__dim=16))
    trainer.fit()
    trainer.close()
    return folder / "run"


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.parent / "export"
    with pytest.MonkeyPatch.context() as patch:  # it takes as long as it is told to
        patch.setattr("courier_fast.serve.export.speed", partial(speed, rounds=3, seconds=0.02))
        export(
            run,
            out,
            licence="apache-2.0",
            precisions=["float32", "float16", "int8"],
            dataset=run.parent / "shop",
            photos=24,
        )
    return out


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """One to be spoiled."""
    return shutil.copytree(exported, tmp_path / "copy")


def take_graph(patch: pytest.MonkeyPatch, of: Path) -> None:
    """Exports of the same encoder take this graph: to trace it once more takes seconds."""

    def write_onnx(folder: Path, *_: object) -> str:
        return shutil.copy(of, folder / "encoder.onnx").name

    patch.setattr("courier_fast.serve.export.program_of", lambda _: None)
    patch.setattr("courier_fast.serve.export.write_onnx", write_onnx)


def photos(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [draw(rng, *rng.integers(40, 160, 2).tolist()) for _ in range(count)]


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.stack([square(image, SIZE) for image in photos(count, seed)])


# ---- parity --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_onnx_keeps_the_budget_at_any_batch_size(run: Path, exported: Path, batch: int) -> None:
    session = onnxruntime.InferenceSession(exported / "encoder.onnx")
    parity = Parity(Serving(load_encoder(run)), pixels(20), batch)
    numbers = parity.of(lambda x: session.run(["embedding"], {"pixels": x})[0])
    assert numbers["budget_share"] <= 1
    assert 0 < numbers["error"] < 1e-5  # it is another implementation, and it is one of the same


def test_a_file_that_is_slightly_wrong_breaks_the_budget(run: Path) -> None:
    serving = Serving(load_encoder(run))
    parity = Parity(serving, pixels(20))
    with torch.no_grad():
        serving.mean += 1e-5
    numbers = parity.of(run_of(serving))
    assert numbers["budget_share"] > 1
    assert "times the budget" in why_refused("float32", numbers)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_program_gives_equal_bits(run: Path, exported: Path, batch: int) -> None:
    program = torch.export.load(exported / "encoder.pt2").module()
    x = torch.from_numpy(pixels(batch))
    with torch.inference_mode():
        assert torch.equal(program(x), Serving(load_encoder(run))(x))


def test_graph_has_named_dimensions_and_unit_rows(exported: Path) -> None:
    for name in ("encoder.onnx", "encoder.float16.onnx", "encoder.int8.onnx"):
        graph = onnx.load(exported / name).graph
        (given,), (result,) = graph.input, graph.output
        shapes = [
            [d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim]
            for x in (given, result)
        ]
        assert [given.name, result.name] == ["pixels", "embedding"]
        assert shapes == [["batch", SIZE, SIZE, 3], ["batch", 16]]
        assert given.type.tensor_type.elem_type == onnx.TensorProto.UINT8
        session = onnxruntime.InferenceSession(exported / name)
        found = session.run(None, {"pixels": pixels(3)})[0]
        assert found.dtype == np.float32
        np.testing.assert_allclose((found**2).sum(1), 1, atol=1e-5)


@pytest.mark.long("whole commands")
def test_a_backbone_of_timm_keeps_the_budget(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    torch.manual_seed(0)
    encoder = build_encoder("test_resnet.r160_in1k", 8, SIZE, batch_norm=True)
    save_encoder(encoder, tmp_path)
    contract = export(tmp_path, tmp_path / "export", licence="mit", formats=["onnx"])
    assert contract.measured is not None
    assert contract.measured["rows"]["float32"]["budget_share"] <= 1
    assert contract.input["size"] == SIZE
    assert [e["name"] for e in contract.files if e["precision"]] == ["encoder.onnx"]


# ---- contract ------------------------------------------------------------------------------------


def test_contract_says_where_it_came_from_and_comes_back(
    run: Path, exported: Path, tmp_path: Path
) -> None:
    contract = Contract.read(exported)
    contract.write(tmp_path)
    assert Contract.read(tmp_path) == contract
    assert contract.space == contract_of_run(run).space
    assert contract.licence == "apache-2.0"
    assert contract.trained["steps"] == 2
    assert contract.trained["settings"]["model"]["dim"] == 16
    assert contract.trained["dataset"]["pages"] == 64
    assert contract.trained["dataset"]["from"] < contract.trained["dataset"]["until"]
    assert {"courier_fast", "torch", "onnx", "onnxruntime"} <= contract.versions.keys()
    assert len(contract.preprocessing) == 6
    on_disk = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()}
    assert {e["name"] for e in contract.files} == on_disk - {"contract.json", "MODEL_CARD.md"}


def test_space_changes_with_weights_size_and_dimension(run: Path, tmp_path: Path) -> None:
    encoder = load_encoder(run)
    spaces = {contract_of_run(run).space}
    with torch.no_grad():
        encoder.head[1].bias[0] += 1
    save_encoder(encoder, tmp_path)
    spaces.add(contract_of_run(tmp_path).space)
    about = json.loads((tmp_path / "encoder.json").read_text())
    (tmp_path / "encoder.json").write_text(json.dumps(about | {"size": 40}))
    spaces.add(contract_of_run(tmp_path).space)
    assert len(spaces) == 3


@pytest.mark.parametrize(
    "name", ["encoder.onnx", "encoder.safetensors", "encoder.json", "golden/vectors.npy"]
)
def test_an_altered_byte_is_named(copy: Path, name: str) -> None:
    data = bytearray((copy / name).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} was altered"):
        verify(copy)
    if not name.startswith("golden"):
        with pytest.raises(ValueError, match=f"{name} was altered"):
            courier_fast.load(copy, runtime="onnxruntime" if name.endswith("onnx") else "torch")


def test_an_altered_contract_is_refused(copy: Path) -> None:
    values = json.loads((copy / "contract.json").read_text())

    def load_with(**changes: object) -> None:
        (copy / "contract.json").write_text(json.dumps(values | changes))
        courier_fast.load(copy)

    about = values["encoder"]["about"] | {"size": 64}
    with pytest.raises(ValueError, match="it was changed"):
        load_with(encoder=values["encoder"] | {"about": about})
    with pytest.raises(ValueError, match="expected schema 1, got 7"):
        load_with(schema=7)
    with pytest.raises(ValueError, match="got others: weather"):
        load_with(weather="fine")


def test_card_has_the_hubs_head_and_the_numbers(exported: Path) -> None:
    text = (exported / "MODEL_CARD.md").read_text()
    _, head, body = text.split("---\n", 2)
    fields = dict(line.split(": ") for line in head.splitlines() if ": " in line)
    assert fields["license"] == "apache-2.0"
    assert fields["library_name"] == "courier_fast"
    assert fields["pipeline_tag"] == "image-feature-extraction"
    contract = Contract.read(exported)
    assert contract.space in body
    assert contract.encoder["weights"] in body
    assert contract.measured is not None
    for name, numbers in contract.measured["rows"].items():
        assert f"| {name} " in body
        if "hr10" in numbers:
            assert f"{numbers['hr10']['mean']:.3f} (" in body
    assert "built-in method" not in body


# ---- the way back --------------------------------------------------------------------------------


def test_run_export_and_file_give_the_embeddings_of_training(run: Path, exported: Path) -> None:
    """Decoded by the trainer's decoder, encoded by the trainer's encoder, divided by the length."""
    files = photos(7)
    encoder = load_encoder(run)
    decoder = make_decoder("software", SIZE, mean=encoder.mean, std=encoder.std, threads=1)
    shapes = np.array([Image.open(io.BytesIO(f)).size[::-1] for f in files])
    arrays = [np.frombuffer(f, np.uint8) for f in files]
    x, _ = decoder.decode(arrays, eval_windows(shapes), np.zeros(7, bool))
    decoder.close()
    with torch.inference_mode():
        expected = torch.nn.functional.normalize(encoder(x)).numpy()
    for path in (run, exported, exported / "encoder.onnx"):
        found = courier_fast.load(path, threads=1)
        vectors = found.encode(files, batch=3)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)
        assert (found.dim, found.space) == (16, contract_of_run(run).space)
        assert vectors.dtype == np.float32


def test_serving_decodes_to_the_bytes_of_training(run: Path) -> None:
    """Scale 1/255 and no shift: what the trainer's decoder gives are then the pixels."""
    files = photos(6)
    decoder = make_decoder("software", SIZE, mean=(0, 0, 0), std=(1, 1, 1), threads=1)
    shapes = np.array([Image.open(io.BytesIO(f)).size[::-1] for f in files])
    arrays = [np.frombuffer(f, np.uint8) for f in files]
    x, _ = decoder.decode(arrays, eval_windows(shapes), np.zeros(6, bool))
    decoder.close()
    trained = (x.permute(0, 2, 3, 1) * 255).round().to(torch.uint8).numpy()
    assert np.array_equal(trained, np.stack([square(f, SIZE) for f in files]))


def test_paths_bytes_and_pictures_are_alike(exported: Path, tmp_path: Path) -> None:
    (file,) = photos(1)
    (tmp_path / "a.jpg").write_bytes(file)
    encoder = courier_fast.load(exported)
    picture = Image.open(io.BytesIO(file))
    path = tmp_path / "a.jpg"
    found = encoder.encode([path, str(path), file, bytearray(file), picture, path.as_uri()])
    assert np.array_equal(found[5], found[0])
    assert np.array_equal(found[1:4], found[[0, 0, 0]])
    assert found[4] @ found[0] > 0.999  # decoded in full, by Pillow
    assert encoder.encode([]).shape == (0, 16)


def test_damaged_images_are_nan_and_named(exported: Path, tmp_path: Path) -> None:
    good, other = photos(2)
    (tmp_path / "cut.jpg").write_bytes(good[: len(good) // 2])
    encoder = courier_fast.load(exported)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = [good, tmp_path / "cut.jpg", tmp_path / "gone.jpg", b"", other]
        found = encoder.encode(given, batch=2)
    text = [str(w.message) for w in caught]
    assert np.isnan(found).all(1).tolist() == [False, True, True, True, False]
    assert [("cut.jpg" in t, "gone.jpg" in t, "image 3" in t) for t in text] == [
        (True, False, False),
        (False, True, False),
        (False, False, True),
    ]
    assert np.array_equal(found[[0, 4]], encoder.encode([good, other]))


@pytest.mark.parametrize(
    "missing", [["torch"], ["torch", "numba", "simplejpeg", "pyarrow", "timm"]]
)
def test_serves_without_torch(exported: Path, tmp_path: Path, missing: list[str]) -> None:
    files = photos(3)
    for i, file in enumerate(files):
        (tmp_path / f"{i}.jpg").write_bytes(file)
    code = f"""
        import sys
        for name in {missing!r}: sys.modules[name] = None  # import fails
        from pathlib import Path
        import courier_fast, numpy as np
        encoder = courier_fast.load({str(exported)!r})
        files = sorted(Path({str(tmp_path)!r}).glob("*.jpg"))
        np.save({str(tmp_path / "found.npy")!r}, encoder.encode(files))
        try:
            courier_fast.load({str(exported)!r}, runtime="torch")
        except ModuleNotFoundError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert 'pip install "courier_fast[train]"' in done.stdout
    expected = courier_fast.load(exported, runtime="torch").encode(files)
    found = np.load(tmp_path / "found.npy")
    assert (found * expected).sum(1).min() > 0.999
    if missing == ["torch"]:
        assert distance(found, expected) < 1e-5


def test_import_loads_neither_runtime_nor_pictures() -> None:
    heavy = {"torch", "PIL", "onnxruntime", "numpy"}
    code = f"import sys, courier_fast; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


# ---- golden pictures -----------------------------------------------------------------------------


def test_every_file_passes_its_own_golden_pictures(exported: Path) -> None:
    verdicts = verify(exported)
    assert [v.what for v in verdicts] == [
        "preprocessing",
        "encoder.safetensors",
        "encoder.onnx",
        "encoder.float16.onnx",
        "encoder.int8.onnx",
    ]
    assert all(v.passes for v in verdicts), [str(v) for v in verdicts]


@pytest.mark.parametrize(
    ("how", "passes"), [(decoded_in_full, True), (without_antialiasing, False)]
)
def test_a_client_without_antialiasing_is_caught(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: object, passes: bool
) -> None:
    golden = Contract.read(exported).golden
    assert golden is not None
    encoder = courier_fast.load(exported)
    files = [(exported / p["file"]).read_bytes() for p in golden["pictures"]]
    vectors = encoder._run(np.stack([how(f, SIZE) for f in files]))  # type: ignore[operator]
    np.save(tmp_path / "client.npy", vectors)
    code = main(
        ["export", "--out", str(exported), "--verify", "--vectors", str(tmp_path / "client.npy")]
    )
    said = capsys.readouterr().out
    assert said.startswith("ok: client.npy" if passes else "FAILED: client.npy")
    assert code == (0 if passes else 1)


def test_a_served_path_without_antialiasing_is_caught(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("courier_fast.serve.load.square", without_antialiasing)
    monkeypatch.setattr("courier_fast.serve.golden.square", without_antialiasing)
    assert not any(v.passes for v in verify(exported) if "int8" not in v.what)


# ---- precision -----------------------------------------------------------------------------------


def test_precisions_are_smaller_close_and_measured(exported: Path) -> None:
    rows = (Contract.read(exported).measured or {})["rows"]
    assert list(rows) == [
        "PyTorch",
        "float32",
        "float16",
        "int8",
        "float32, decoded by Pillow",
        "float32, stored as float16",
    ]
    assert rows["float16"]["bytes"] < 0.6 * rows["float32"]["bytes"]
    assert rows["int8"]["bytes"] < rows["float32"]["bytes"]
    assert 1 > rows["float16"]["cosine_min"] >= 0.999
    assert 1 > rows["int8"]["cosine_min"] >= 0.995
    assert rows["int8"]["overlap10"] >= 0.95
    assert 0.9 < rows["float32, decoded by Pillow"]["cosine_min"] < 1 - 1e-6
    for name in ("float16", "int8", "float32, stored as float16"):
        minus = rows[name]["hr10_minus_float32"]
        assert minus["low"] <= minus["mean"] <= minus["high"]
        expected = rows[name]["hr10"]["mean"] - rows["float32"]["hr10"]["mean"]
        assert minus["mean"] == pytest.approx(expected, abs=1e-9)
    assert all(rows[name]["images_per_s"] > 0 for name in ("PyTorch", "float32", "int8"))


def test_int8_keeps_one_huge_channel_and_by_tensor_is_refused(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A weight so large that one scale for all leaves no levels for the others; its feature is
    always 0, so that it shows nowhere else."""
    encoder = load_encoder(run)
    with torch.no_grad():
        encoder.backbone.stages[-1][1].weight[0] = 0
        encoder.backbone.stages[-1][1].bias[0] = 0
        encoder.head[0].running_mean[0] = 0
        encoder.head[1].weight[0] = 0
        encoder.head[1].weight[0, 0] = 1000
    (tmp_path / "run").mkdir()
    save_encoder(encoder, tmp_path / "run")
    out = tmp_path / "export"
    given = {"licence": "mit", "formats": ["onnx"], "precisions": ["int8"]}
    contract = export(tmp_path / "run", out, **given)  # type: ignore[arg-type]
    assert [e["name"] for e in contract.files if e["precision"]] == [
        "encoder.onnx",
        "encoder.int8.onnx",
    ]
    quantize = onnxruntime.quantization.quantize_dynamic

    def by_tensor(*args: object, **options: object) -> None:
        quantize(*args, **{**options, "per_channel": False})

    monkeypatch.setattr(onnxruntime.quantization, "quantize_dynamic", by_tensor)
    take_graph(monkeypatch, Path(shutil.copy(out / "encoder.onnx", tmp_path)))
    contract = export(tmp_path / "run", out, **given)  # type: ignore[arg-type]
    assert not (out / "encoder.int8.onnx").exists()
    assert "encoder.int8.onnx is not written: cosine" in caplog.text
    assert [e["name"] for e in contract.files if e["precision"]] == ["encoder.onnx"]
    assert "cosine" in (contract.measured or {})["rows"]["int8"]["refused"]
    assert "refused" in (out / "MODEL_CARD.md").read_text()
    with pytest.raises(ValueError, match=r"precision 'int8', but the export has encoder.onnx"):
        courier_fast.load(out, precision="int8")


def test_overlap_and_refusals() -> None:
    rng = np.random.default_rng(0)
    a = rng.normal(size=(50, 8)).astype(np.float32)
    assert overlap(a, a) == 1
    assert overlap(a, rng.normal(size=(50, 8)).astype(np.float32)) < 0.5
    good = {"cosine_min": 0.996, "cosine_mean": 0.9995, "overlap10": 0.96}
    assert why_refused("int8", good) == ""
    for name, value in {"cosine_min": 0.99, "cosine_mean": 0.99, "overlap10": 0.9}.items():
        assert why_refused("int8", good | {name: value}).startswith(f"{name} {value:.5f}")
    assert why_refused("int8", good | {"cosine_min": float("nan")})


def test_speed_is_a_rate() -> None:
    rates = speed({"slow": lambda x: time.sleep(0.02) or x}, np.zeros((4, 1)), 3, 0.05)  # type: ignore[func-returns-value]
    assert 100 < rates["slow"] <= 200


# ---- the first dimensions ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def short(run: Path) -> Path:
    """The first 6 of 16."""
    out = run.parent / "short"
    export(run, out, licence="mit", precisions=["float16", "int8"], dim=6)
    return out


def test_the_first_dimensions_are_those_of_training(run: Path, short: Path) -> None:
    files, encoder = photos(5), load_encoder(run)
    with torch.inference_mode():
        pixels = torch.from_numpy(np.stack([square(f, SIZE) for f in files]))
        whole = Serving(encoder)(pixels)
    expected = torch.nn.functional.normalize(whole[:, :6]).numpy()
    for how in ({"runtime": "torch"}, {"runtime": "onnxruntime"}):
        found = courier_fast.load(short, **how)  # type: ignore[arg-type]
        assert found.dim == 6
        np.testing.assert_allclose(found.encode(files), expected, atol=1e-5)
    program = torch.export.load(short / "encoder.pt2").module()
    np.testing.assert_allclose(program(pixels).detach().numpy(), expected, atol=1e-5)


def test_the_contract_of_the_first_dimensions(run: Path, short: Path, tmp_path: Path) -> None:
    contract = Contract.read(short)
    assert (contract.encoder["dim"], contract.encoder["trained_dim"]) == (6, 16)
    assert contract.output["shape"] == ["batch", 6]
    assert contract.space == contract_of_run(run, 6).space != contract_of_run(run).space
    assert contract_of_run(run, 16) == contract_of_run(run)
    for name in ("encoder.safetensors", "encoder.json"):  # they stay the run's
        assert (short / name).read_bytes() == (run / name).read_bytes()
    assert contract.golden is not None
    assert np.load(short / contract.golden["vectors"]).shape == (8, 6)
    assert "The first 6 of the 16 dimensions" in (short / "MODEL_CARD.md").read_text()
    verdicts = verify(short)
    assert [v.what for v in verdicts[1:]] == ["encoder.safetensors"] + [
        f"encoder{p}.onnx" for p in ("", ".float16", ".int8")
    ]
    assert all(v.passes for v in verdicts), [str(v) for v in verdicts]
    whole = courier_fast.load(run).encode([short / p["file"] for p in contract.golden["pictures"]])
    np.save(tmp_path / "whole.npy", whole)
    with pytest.raises(ValueError, match=r"vectors: expected \[8, 6\].*got \[8, 16\]"):
        verify(short, tmp_path / "whole.npy")


def test_an_index_of_the_first_dimensions_takes_their_export(
    run: Path, exported: Path, short: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`embed --dim`, `index build`, and then pictures by `export --dim`; the whole is refused."""
    data, table, index = (str(run.parent / "shop"), str(tmp_path / "e"), str(tmp_path / "i"))
    embed = ["embed", f"--run={run}", f"--dataset={data}", f"--out={table}", "--dim=6"]
    assert main([*embed, "--device=cpu"]) == 0
    assert main(["index", "build", f"--embeddings={table}", f"--out={index}"]) == 0
    (picture,) = photos(1)
    (tmp_path / "a.jpg").write_bytes(picture)
    search = ["index", "search", f"--index={index}", f"--image={tmp_path / 'a.jpg'}", "--k=1"]
    out = tmp_path / "found.json"
    assert main([*search, f"--encoder={short}", f"--json={out}"]) == 0
    ids, rows, _ = read_vectors(tmp_path / "e")
    cosines = (
        courier_fast.load(short).encode([picture])[0]
        @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T
    )
    assert ids[int(np.nanargmax(cosines))].as_py() in out.read_text()
    for whole in (run, exported):
        assert main([*search, f"--encoder={whole}"]) == 2
        assert "encoder: expected one of the space" in capsys.readouterr().err


# ---- features ------------------------------------------------------------------------------------


def test_a_projection_of_features_takes_features(run: Path, tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "shop", users=6, items=20, pages=40, images=False)
    features = make_features(data, tmp_path / "features.npy")
    trainer = Trainer(settings(data, tmp_path / "run", data__features=features, optim__steps=2))
    trainer.fit()
    trainer.close()
    with pytest.raises(ValueError, match="dataset: expected none with an encoder of features"):
        export(tmp_path / "run", tmp_path / "out", licence="mit", dataset=data.path)
    contract = export(tmp_path / "run", tmp_path / "out", licence="mit", precisions=["int8"])
    assert contract.trained["features_sha256"] == sha256(features)
    assert contract.input == {"name": "features", "dtype": "float32", "shape": ["batch", 12]}
    assert all(v.passes for v in verify(tmp_path / "out"))
    table = np.load(features)
    table[3, 2] = np.nan
    for path in (tmp_path / "run", tmp_path / "out"):
        with pytest.warns(UserWarning, match="1 rows of features are not finite"):
            found = courier_fast.load(path).encode(table, batch=7)
        assert np.isnan(found).all(1).nonzero()[0].tolist() == [3]
        with torch.inference_mode():
            expected = Serving(load_encoder(tmp_path / "run"))(torch.from_numpy(table[4:]))
        np.testing.assert_allclose(found[4:], expected.numpy(), atol=1e-5)
    with pytest.raises(ValueError, match=r"expected \[n, 12\], got \[2, 5\]"):
        courier_fast.load(tmp_path / "out").encode(np.zeros((2, 5)))


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run", "nowhere", "--licence", "mit"], "run: expected a folder with encoder.json"),
        (["--run", "RUN"], "licence: expected that of the weights"),
        (
            ["--run", "RUN", "--licence", "mit", "--format", "torch", "--precision", "int8"],
            "expected format onnx, got torch",
        ),
        (
            ["--run", "RUN", "--licence", "mit", "--out", "RUN"],
            "out: expected a folder that is not read",
        ),
        (
            ["--run", "RUN", "--licence", "mit", "--dataset", "nowhere"],
            "dataset: expected a folder",
        ),
        (
            ["--run", "RUN", "--licence", "mit", "--dim", "17"],
            "dim: expected 1 to 16, the encoder's",
        ),
        (
            ["--run", "RUN", "--licence", "mit", "--dim", "0"],
            "dim: expected 1 to 16, the encoder's",
        ),
        (["--verify", "--dim", "4"], "--dim: has no effect without --run"),
        ([], "run: expected the folder of a training run, or --verify"),
        (["--verify"], "path: expected a folder that `courier-fast export` wrote"),
        (["--vectors", "a.npy", "--run", "RUN"], "--vectors: has no effect without --verify"),
    ],
)
def test_wrong_arguments_are_named(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    given = [str(run) if x == "RUN" else x for x in options]
    if "--out" not in given:
        given += ["--out", str(tmp_path / "out")]
    assert main(["export", *given]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert (run / "encoder.json").is_file()


def test_a_float32_file_that_breaks_its_budget_is_an_error(
    run: Path, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_graph(monkeypatch, exported / "encoder.onnx")
    monkeypatch.setattr("courier_fast.serve.export.why_refused", lambda *a: "planted")
    with pytest.raises(RuntimeError, match="encoder.onnx differs from PyTorch: planted"):
        export(run, tmp_path / "out", licence="mit", formats=["onnx"])
    assert not (tmp_path / "out").exists()


def test_load_names_what_is_wrong(run: Path, exported: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a folder that `courier-fast export`"):
        courier_fast.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="which is not there"):
        courier_fast.load(tmp_path / "encoder.onnx")
    with pytest.raises(ValueError, match="runtime: expected one of auto, onnxruntime, torch"):
        courier_fast.load(run, runtime="tensorrt")
    with pytest.raises(ValueError, match="is a training run, which torch runs in float32"):
        courier_fast.load(run, precision="int8")
    with pytest.raises(
        ValueError, match="expected a folder with runtime 'auto' and precision 'int8'"
    ):
        courier_fast.load(exported / "encoder.onnx", precision="int8")
    encoder = courier_fast.load(exported)
    with pytest.raises(TypeError, match="expected a list of images, got one: str"):
        encoder.encode("a.jpg")
    with pytest.raises(TypeError, match="expected paths, bytes or images of Pillow's, got int"):
        encoder.encode([3])
    with pytest.raises(ValueError, match="batch: expected at least 1, got 0"):
        encoder.encode([], batch=0)


def test_a_second_export_replaces_the_first(run: Path, copy: Path) -> None:
    export(run, copy, licence="mit", formats=["torch"])
    names = {p.name for p in copy.iterdir()}
    assert "encoder.onnx" not in names
    assert {"encoder.pt2", "encoder.safetensors", "encoder.json"} <= names
    assert courier_fast.load(copy).encode(photos(1)).shape == (1, 16)
    with pytest.raises(ValueError, match="expected runtime 'onnxruntime'"):
        courier_fast.load(copy, runtime="onnxruntime")
