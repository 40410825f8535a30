"""The settings of a training run: one TOML file, checked by pydantic, every value overridable on
the command line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import tomli_w
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from ..files import write_atomically
from ..locations import local_path, location
from ..loss.options import Attends, Direction, Exchange, Negatives
from ..option_rules import without_effect
from .recipes import RECIPES, Recipe, by_recipe

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _path_by(read: Callable[[str | os.PathLike[str]], Any]) -> BeforeValidator:
    def check(value: Any) -> Any:
        if not isinstance(value, (str, os.PathLike)):
            raise ValueError(f"expected a path, got {value!r}")
        return read(value)

    return BeforeValidator(check)


LocalPath = Annotated[Path, _path_by(local_path)]


class Section(BaseModel):
    """A table of the TOML file: unknown names are errors."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


def described(default: Any, description: str, **limits: Any) -> Any:
    return Field(default, description=description, **limits)


def _pair(
    above: float, most: float, what: str
) -> Callable[[tuple[float, float]], tuple[float, float]]:
    """A check of a least and a largest value."""

    def check(pair: tuple[float, float]) -> tuple[float, float]:
        least, largest = pair
        if not above < least <= largest <= most:
            raise ValueError(
                f"expected {what} above {above} and at most {most}, the least one first, got "
                f"{least:g} {largest:g}"
            )
        return pair

    return check


def _positive(numbers: tuple[int, ...]) -> tuple[int, ...]:
    if numbers and not 1 <= min(numbers) <= max(numbers) < 1 << 31:
        raise ValueError(
            f"expected numbers of at least 1 and below 2^31, got {' '.join(map(str, numbers))}"
        )
    return numbers


def _decays(betas: tuple[float, float]) -> tuple[float, float]:
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"expected two of at least 0 and below 1, got {betas[0]:g} {betas[1]:g}")
    return betas


class DataConfig(Section):
    dataset: Annotated[Path | str, _path_by(location)] = Field(
        description="folder written by `courier-fast prepare`, local or s3:// and so on"
    )
    features: LocalPath | None = described(
        None,
        "train a projection on these embeddings (.npy rows as items, or .parquet) and no images; "
        "default: the dataset's own, where it has some",
    )
    pages: int = described(64, "pages per step and process; 0 with data.images", ge=0)
    images: int = described(0, "unique images per step and process, in place of data.pages", ge=0)
    share: float = described(
        1.0,
        "of all pages, the first ones that are trained on; 1: the whole train split. 0.5 leaves "
        "what `courier-fast ctr` trains on unseen",
        gt=0,
        le=1,
    )
    history: int = described(20, "most recent history items used", ge=1)
    size: int = described(0, "side of the images in pixels; 0: 224 on a GPU, 96 on a CPU", ge=0)
    scale: Annotated[tuple[float, float], AfterValidator(_pair(0, 1, "shares of the area"))] = (
        described((0.5, 1.0), "random crop: least and largest share of the area")
    )
    ratio: Annotated[tuple[float, float], AfterValidator(_pair(0, 100, "width over height"))] = (
        described((0.75, 4 / 3), "random crop: aspect ratio, width over height")
    )
    flip: bool = described(True, "random horizontal flips")
    decoder: Literal["auto", "dali", "dali-cpu", "software", "pillow"] = "auto"
    threads: int = described(0, "decoding threads; 0: as many as cores", ge=0)
    ahead: int = described(2, "batches decoded in advance", ge=1)
    buckets: Annotated[tuple[int, ...], AfterValidator(_positive)] = described(
        (),
        "numbers of images that batches are padded to; empty: chosen, "
        "on a GPU or with model.compile",
    )
    max_damaged: float = described(
        0.01, "share of images that may be undecodable before the run stops", ge=0, le=1
    )


class ModelConfig(Section):
    backbone: str = described(
        "auto", "any timm model, or small_conv; auto: Swin-T on a GPU, small_conv on a CPU"
    )
    pretrained: bool = described(False, "timm's pre-trained weights (downloads them)")
    weights: LocalPath | None = described(
        None, "safetensors file with weights of the backbone to start from"
    )
    dim: int = described(256, "dimensions of the embedding", ge=1)
    batch_norm: bool | None = described(
        None,
        "batch norm before the projection, against early collapse; default: for a backbone without "
        "pre-trained weights",
    )
    checkpointing: bool = described(
        False, "gradient checkpointing: less memory, a second forward pass"
    )
    compile: bool = described(False, "torch.compile the encoder")
    slice: int = described(
        0, "two-pass gradient cache: images in one slice of the encoder; 0: one pass", ge=0
    )
    shard: bool = described(
        False,
        "each process keeps a part of the encoder (FSDP2), for one that a GPU cannot hold; nothing "
        "to do for one process",
    )
    ema: float = described(
        0.0,
        "decay of an average of the weights that is then the exported encoder; 0: none",
        ge=0,
        lt=1,
    )


class LossConfig(Section):
    recipe: Recipe = described(
        "candidate",
        "what holds for settings that are not given: the defaults listed here, or courier: those "
        "of COURIER's authors, of loss, data.history and optim (docs/courier.md)",
    )
    attention: Attends | Literal["multihead"] | None = described(
        None,
        "whose query reconstructs an item from a history: each candidate's (the default; in other "
        "directions anchor), the clicked item's, or nobody's (mean); multihead: the clicked "
        "item's, by a multi-head attention with learned projections",
    )
    attention_scale: float | None = described(
        None, "factor of the attention's dot products, in place of attention_temperature"
    )
    attention_temperature: float | None = described(
        None, "attention by cosines at this temperature; default 1 without a scale", gt=0
    )
    heads: int = Field(1, ge=1, description="of the attention; a divisor of model.dim")
    projections: Literal["none", "query_key", "all"] = Field(
        "none",
        description="learned matrices of the loss (not of the exported embedding), the identity at "
        "first: of query and key, or of query, key "
        "and value",
    )
    unit: bool = described(
        True, "embeddings of length 1 into the losses: a history item counts by its direction alone"
    )
    temperature: float = Field(0.2, gt=0)
    learnable_temperature: bool = False
    min_temperature: float = Field(0.01, gt=0)
    weight_power: float = Field(
        0.0,
        description="an anchor's weight in L_rec: the training clicks of its item to this power; "
        "-0.5: rarer items count for more",
    )
    negatives: Negatives = "batch"
    direction: Direction = "reconstruct"
    history_negatives: bool = described(
        True, "items of the batch's histories are candidates, too: as popular as clicks are"
    )
    candidates: Literal["auto", "all", "process"] = described(
        "auto",
        "whose items are candidates: those of all processes (auto, too) or of each process alone",
    )
    exchange: Exchange = described(
        "auto",
        "how candidates of other processes arrive: gather: all at once; ring: one process's after "
        "another's, in less memory; "
        "auto: by their size",
    )
    memory: int = described(
        0,
        "newest candidates of earlier steps, of all processes, that are candidates, too; 0: none",
        ge=0,
    )
    memory_after: int | None = described(
        None, "steps before the memory is used; default: those of optim.warmup", ge=0
    )
    log_q: bool = described(
        False, "sampling-bias correction by how often items are candidates in training"
    )
    reconstruction_weight: float = Field(
        1.0, ge=0, description="weight of the reconstruction loss; 0: without"
    )
    prediction_weight: float = Field(
        0.0, ge=0, description="weight of the click-prediction loss of a click head; 0: without"
    )
    sequence_weight: float = Field(
        1.0, ge=0, description="weight of the click-sequence loss; 0: without"
    )
    prefixes: tuple[int, ...] = described(
        (),
        "numbers of first dimensions whose losses are minimised too, each like the whole: "
        "embeddings that can be cut there",
    )
    sequence: Literal["pairs", "newest"] = described(
        "pairs",
        "which click-sequence loss: of all pairs of a history's clicks, or of its newest click, "
        "reconstructed from the older ones",
    )
    sequence_temperature: float = Field(0.2, gt=0)
    sequence_learnable_temperature: bool = False
    impl: Literal["auto", "reference", "triton", "cpu", "xformers"] = "auto"

    @model_validator(mode="after")
    def one_attention(self) -> LossConfig:
        chosen = self.reconstruction
        if chosen["attention"] == "multihead":
            return self._multihead()
        if chosen["attention"] == "candidate" and self.direction != "reconstruct":
            raise ValueError(
                f"expected direction reconstruct with attention candidate, got {self.direction}"
            )
        given = [
            n for n in ("attention_scale", "attention_temperature") if getattr(self, n) is not None
        ]
        most = 0 if chosen["attention"] == "mean" else 1
        if len(given) > most:
            raise ValueError(
                f"expected {'none' if most == 0 else 'one'} of attention_scale and "
                "attention_temperature with attention "
                f"{chosen['attention']}, got {' and '.join(given)}"
            )
        if chosen["attention"] == "mean":
            for name, unused in {
                "heads": self.heads > 1,
                "projections": self.projections == "query_key",
            }.items():
                if unused:
                    raise ValueError(
                        f"expected no {name} with attention mean, which asks nothing, got "
                        f"{getattr(self, name)}"
                    )
        return self

    def _multihead(self) -> LossConfig:
        """Its losses are those of `CourierLoss`, which has fewer options."""
        expected: dict[str, Any] = {
            "attention_scale": None,
            "attention_temperature": None,
            "projections": "none",
            "direction": "reconstruct",
            "negatives": "batch",
            "memory": 0,
            "log_q": False,
            "weight_power": 0,
            "learnable_temperature": False,
            "prefixes": (),
        }
        if self.sequence == "newest":
            expected["sequence_learnable_temperature"] = False
        for name, only in expected.items():
            if getattr(self, name) != only:
                raise ValueError(
                    f"{name}: expected {str(only).lower()} with attention multihead, got "
                    f"{str(getattr(self, name)).lower()}"
                )
        if not self.reconstructs:
            raise ValueError(
                "attention multihead: expected reconstruction_weight, prediction_weight, or with "
                "sequence newest sequence_weight above 0, got none of them"
            )
        return self

    @model_validator(mode="after")
    def one_batch_of_all_processes(self) -> LossConfig:
        if self.candidates == "process" and (self.prediction_weight or self.is_multihead):
            why = "prediction_weight above 0" if self.prediction_weight else "attention multihead"
            raise ValueError(f"candidates: expected all or auto with {why}, got process")
        return self

    @model_validator(mode="after")
    def memory_within_reach(self) -> LossConfig:
        if self.memory and self.negatives == "page":
            raise ValueError("expected negatives batch or other_pages with a memory, got page")
        return self

    @model_validator(mode="after")
    def prefixes_of_what_has_them(self) -> LossConfig:
        for name, unused in (
            ("projections", self.projections != "none"),
            ("prediction_weight", self.prediction_weight > 0),
        ):
            if self.prefixes and unused:
                raise ValueError(
                    f"prefixes: expected none with {name}, whose weights are of all dimensions, "
                    f"got {list(self.prefixes)}"
                )
        return self

    @model_validator(mode="after")
    def one_loss(self) -> LossConfig:
        if not self.reconstruction_weight:
            if not self.prediction_weight and not self.sequence_weight:
                raise ValueError(
                    "expected reconstruction_weight, prediction_weight or sequence_weight above "
                    "0, got none of them"
                )
            if self.memory:
                raise ValueError(
                    "memory: expected a reconstruction_weight above 0 with it, got 0 and "
                    f"{self.memory} rows"
                )
        return self

    @property
    def is_multihead(self) -> bool:
        return self.attention == "multihead"

    @property
    def reconstructs(self) -> bool:
        """Whether any of the losses is of reconstructions."""
        newest = self.sequence == "newest" and self.sequence_weight
        return bool(self.reconstruction_weight or self.prediction_weight or newest)

    @property
    def reconstruction(self) -> dict[str, Any]:
        """The attention's arguments of `reconstruction_loss`."""
        attention, temperature = self.attention, self.attention_temperature
        if attention is None:
            attention = "candidate" if self.direction == "reconstruct" else "anchor"
        if attention != "mean" and self.attention_scale is None and temperature is None:
            temperature = 1.0
        return {
            "attention": attention,
            "attention_scale": self.attention_scale,
            "attention_temperature": temperature,
            "num_heads": self.heads,
        }

    @property
    def options(self) -> dict[str, Any]:
        """Those of `reconstruction_loss`, but the reduction's."""
        chosen = {name: getattr(self, name) for name in ("negatives", "direction", "impl")}
        return self.reconstruction | chosen


class OptimConfig(Section):
    epochs: int = described(0, "passes over the training pages", ge=0)
    steps: int = described(0, "updates, in place of epochs", ge=0)
    lr: float = described(5e-4, "peak learning rate of AdamW", gt=0)
    min_lr: float = described(0.01, "last learning rate as a share of the peak", ge=0, le=1)
    warmup: float = described(
        0.05, "share of the run over which the learning rate rises", ge=0, lt=1
    )
    weight_decay: float = described(0.05, "for matrices; never for biases and norms", ge=0)
    betas: Annotated[tuple[float, float], AfterValidator(_decays)] = (0.9, 0.98)
    clip: float = described(1.0, "largest norm of the gradient; 0: none", ge=0)

    @model_validator(mode="after")
    def one_length(self) -> OptimConfig:
        if self.epochs and self.steps:
            raise ValueError(
                f"expected one of epochs and steps, got epochs={self.epochs}, steps={self.steps}"
            )
        if not self.epochs and not self.steps:
            self.epochs = 10
        return self


class RunConfig(Section):
    out: LocalPath = described(
        Path("run"), "folder of the run; one that has checkpoints is resumed"
    )
    seed: int = Field(0, ge=0)
    device: str = described("auto", "cuda, cpu; auto: the GPU where there is one")
    precision: Literal["auto", "float32", "bfloat16"] = described(
        "auto", "of the encoder; auto: bfloat16 on a GPU"
    )
    save_steps: int = described(
        0, "a checkpoint every so many steps; 0: by minutes and at the end of an epoch", ge=0
    )
    save_minutes: float = described(
        10.0, "a checkpoint every so many minutes; 0: by steps alone", ge=0
    )
    keep: int = described(2, "newest checkpoints kept", ge=1)
    log_steps: int = described(20, "steps between two lines of metrics.jsonl", ge=1)
    tensorboard: bool = True
    progress: bool = True


class Config(Section):
    """Everything about a run. `Config.load` reads TOML and overrides; `save` writes the result."""

    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="before")
    @classmethod
    def filled_by_recipe(cls, values: Any) -> Any:
        return by_recipe(values)

    @model_validator(mode="after")
    def one_batch_size(self) -> Config:
        if self.data.images and self.data.pages and "pages" not in self.data.model_fields_set:
            self.data.pages = 0
        if bool(self.data.images) == bool(self.data.pages):
            raise ValueError(
                f"data: expected one of pages and images above 0, got pages={self.data.pages}, "
                f"images={self.data.images}"
            )
        return self

    @model_validator(mode="after")
    def shardable(self) -> Config:
        if self.model.shard and self.data.features is not None:
            raise ValueError(
                "model.shard: expected images with it, got data.features: their projection is no "
                "encoder to be sharded"
            )
        if self.model.shard and self.model.compile:
            raise ValueError("model.shard: expected model.compile false with it, got true")
        return self

    @model_validator(mode="after")
    def whole_heads(self) -> Config:
        if self.model.dim % self.loss.heads:
            raise ValueError(
                f"loss.heads: expected a divisor of model.dim {self.model.dim}, "
                f"got {self.loss.heads}"
            )
        return self

    @model_validator(mode="after")
    def shorter_prefixes(self) -> Config:
        for size in self.loss.prefixes:
            if not 0 < size < self.model.dim or size % self.loss.heads:
                raise ValueError(
                    f"loss.prefixes: expected multiples of loss.heads {self.loss.heads}, from 1 to "
                    f"below model.dim {self.model.dim}, got {size}"
                )
        return self

    @classmethod
    def load(
        cls, path: str | os.PathLike[str] | None = None, overrides: dict[str, Any] | None = None
    ) -> Config:
        """Settings from a TOML file, then `overrides` such as {"optim.lr": "1e-3"}.

        Raises ValueError with a line for every wrong name or value.
        """
        values: dict[str, Any] = {}
        if path is not None:
            try:
                values = tomllib.loads(local_path(path).read_text("utf-8-sig"))
            except tomllib.TOMLDecodeError as error:
                raise ValueError(f"{path}: expected TOML: {error}") from None
            except UnicodeDecodeError:
                raise ValueError(f"{path}: expected TOML in UTF-8, got other bytes") from None
        wrong = [n for n, v in values.items() if not isinstance(v, dict)]
        if wrong:
            raise ValueError(
                f"config {path}: expected tables such as [data], "
                f"got the value {wrong[0]} outside of one"
            )
        for name, value in (overrides or {}).items():
            section, _, key = name.partition(".")
            table = values.setdefault(section, {})
            # The other way to give the same thing in the file gives way to the command line.
            for other in {
                "data.pages": ["images"],
                "data.images": ["pages"],
                "optim.steps": ["epochs"],
                "optim.epochs": ["steps"],
            }.get(name, []):
                if f"{section}.{other}" not in (overrides or {}):
                    table.pop(other, None)
            table[key] = value
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            lines = [
                f"  {_setting(e['loc']) or 'config'}: {e['msg']}"
                + (f", got {e['input']!r}" if e["type"] not in ("missing", "value_error") else "")
                for e in error.errors()
            ]
            raise ValueError("\n".join([f"config{f' {path}' if path else ''}:", *lines])) from None

    def unused(self, typed: Collection[str] = (), ready: bool = False) -> dict[str, str]:
        """Settings that have no effect beside the others, and why; `typed`: those that the command
        line gave, of which a default counts, too; `ready`: the dataset has embeddings."""
        values, defaults = {}, {}
        recipe = RECIPES[self.loss.recipe]
        for section, model in self:
            for name, setting in type(model).model_fields.items():
                full = f"{section}.{name}"
                values[full] = getattr(model, name)
                defaults[full] = recipe.get(full, setting.default)
        return without_effect(values | {"ready": ready}, defaults | {"ready": ready}, typed)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes every value, defaults too, as TOML."""
        text = tomli_w.dumps(self.model_dump(mode="json", exclude_none=True))
        write_atomically(Path(path), lambda partial: partial.write_text(text, "utf-8"))


def _setting(parts: tuple[int | str, ...]) -> str:
    """Section, name and index of a value: pydantic also says which of several types it tried."""
    names = [str(part) for k, part in enumerate(parts) if k < 2 or isinstance(part, int)]
    return ".".join(names)


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """One option per setting, `--section.name`, with its description and default; with `several` it
    takes any number of values."""
    for section, field in Config.model_fields.items():
        group = parser.add_argument_group(section)
        model = field.annotation
        assert isinstance(model, type) and issubclass(model, Section)
        for name, setting in model.model_fields.items():
            choices = [c for c in get_args(setting.annotation) if isinstance(c, str)]
            values = "|".join(choices)
            is_tuple = str(setting.annotation).startswith("tuple")
            default = (
                ""
                if setting.is_required() or setting.default is None
                else f" (default {setting.default})"
            )
            text = f"{setting.description or values}{default}"
            group.add_argument(
                f"--{section}.{name}",
                dest=f"{section}.{name}",
                default=argparse.SUPPRESS,
                help=text.replace("%", "%%"),
                metavar=name.upper(),
                nargs="*" if is_tuple else "+" if several else None,
            )


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that the command line gave."""
    return {name: value for name, value in vars(args).items() if "." in name}
