"""The run configuration: a YAML preset plus dotted overrides, resolved into one typed, frozen object.

This module imports neither torch nor numpy: it is what `udddm-train --help` and a configuration error pay for.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
UnderOne = Annotated[float, Field(ge=0, lt=1)]


class ConfigError(ValueError):
    """A configuration the user has to correct; the message names the key and the cure."""


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ExpectConfig(Section):
    """What a data set is to hold."""

    samples: Positive
    shape: tuple[Positive, Positive, Positive] = Field(description="channels, height and width of every image")
    classes: Positive | None = Field(None, description="number of class labels; unset: labels do not matter")


class DataConfig(Section):
    name: str = Field(
        "digits",
        description="digits, fashion-mnist, cifar10, folder, array, or your own factory as package.module:function",
    )
    path: str | None = Field(None, description="a path or fsspec URL: the archive, folder or array to read")
    size: Positive | None = Field(None, description="side in pixels that a folder's images are resized to")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for package.module:function")
    expect: ExpectConfig | None = Field(
        None,
        description="what the data are to hold: checked when they are loaded; what --dry-run plans for without them",
    )


class ProcessConfig(Section):
    """The forward process (PAPER: "Forward process"). `timesteps` is the paper's T."""

    kind: Literal["vp", "ve"] = "ve"
    timesteps: Annotated[int, Field(ge=2)] = 1000
    beta_min: Annotated[float, Field(gt=0, lt=1)] = Field(1.5e-3, description="VP only")
    beta_max: Annotated[float, Field(gt=0, lt=1)] = Field(2.0e-2, description="VP only")
    sigma_min: Annotated[float, Field(gt=0)] = Field(0.01, description="VE only")
    sigma_max: Annotated[float, Field(gt=0)] = Field(50.0, description="VE only")
    rho: Annotated[float, Field(gt=0)] = 7.0
    sigma_data: Annotated[float, Field(gt=0)] = 0.5
    preconditioning: Literal["paper", "linear", "quadratic", "edm"] = Field(
        "edm",
        description="a(t), b(t): the paper's (VP: x_t - F; VE: kappa = s_min/sigma), its other kappas (VE), or EDM's",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ProcessConfig:
        if self.kind == "vp" and self.preconditioning in ("linear", "quadratic"):
            raise ValueError(
                f"preconditioning {self.preconditioning!r} is a kappa of the VE process; VP takes 'paper' or 'edm'"
            )
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min {self.beta_min} must not exceed beta_max {self.beta_max}")
        return self


class NetworkConfig(Section):
    """The ADM U-Net (Dhariwal & Nichol 2021) with cross-attention to the conditioning image."""

    patch: Positive = Field(1, description="side of the pixel blocks that become channels (pixel unshuffle); 1: none")
    width: Positive = 128
    multipliers: tuple[Positive, ...] = Field((1, 2, 2, 2), min_length=1)
    blocks: Positive = Field(3, description="residual blocks a stage")
    attention: tuple[Positive, ...] = Field((16, 8), description="image sides at which attention runs")
    head_width: Positive = Field(64, description="channels of one attention head")
    dropout: UnderOne = 0.3
    condition: Literal["cross-attention", "none"] = "cross-attention"
    classes: Annotated[int, Field(ge=0)] = Field(0, description="number of class labels; 0 is unconditional")
    label_dropout: UnderOne = Field(
        0.0, description="share of the visits that see no label: what guidance needs (docs/method.md)"
    )

    @model_validator(mode="after")
    def _labels_to_drop(self) -> NetworkConfig:
        if self.label_dropout and not self.classes:
            raise ValueError(
                f"label_dropout {self.label_dropout} has no labels to drop: set network.classes, or label_dropout to 0"
            )
        return self


class Stage(Section):
    """From `start` (a fraction of the run) on, new chains use `levels` noise levels above the lowest."""

    start: Fraction
    levels: Annotated[int, Field(ge=1)]


class ChainConfig(Section):
    """The chain objective (docs/method.md): consistency training whose teacher is the x0-state store."""

    length: Positive | Literal["trajectory"] = Field(
        2, description="visits a chain lasts: 1 is consistency training, 'trajectory' climbs all levels from the lowest"
    )
    stages: tuple[Stage, ...] = Field(
        (Stage(start=0, levels=8), Stage(start=0.2, levels=16), Stage(start=0.5, levels=32)),
        min_length=1,
        description="how the number of levels M grows; each a multiple of the one before",
    )
    distribution: Literal["uniform", "lognormal"] = Field("uniform", description="of the level a chain begins at")
    mean: float = Field(-1.1, description="of ln sigma, lognormal")
    deviation: Annotated[float, Field(gt=0)] = Field(2.0, description="of ln sigma, lognormal")
    guiding: Literal["lowest", "visits"] = Field(
        "lowest", description="weight of x0 in the target: only at the lowest level, or Eq. 3's 1/(n+1) with n = level"
    )
    weighting: Literal["none", "gap"] = Field(
        "none", description="loss weight of a level: 1, or 1/(sigma_k - sigma_(k-1))"
    )

    @field_validator("stages")
    @classmethod
    def _nested(cls, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        if stages[0].start != 0:
            raise ValueError("the first stage must start at 0")
        for before, after in itertools.pairwise(stages):
            if after.start <= before.start:
                raise ValueError("stages must be in order of their start")
            if after.levels % before.levels:
                raise ValueError(f"levels must nest: {after.levels} is no multiple of {before.levels}")
        return stages


class ConsistencyConfig(Section):
    """iCT (Song & Dhariwal 2023): consistency training without a store."""

    first: Positive = Field(10, description="levels at the beginning; they double")
    last: Positive = Field(1280, description="levels at the end")
    distribution: Literal["lognormal", "uniform"] = "lognormal"
    mean: float = Field(-1.1, description="of ln sigma")
    deviation: Annotated[float, Field(gt=0)] = Field(2.0, description="of ln sigma")
    weighting: Literal["none", "gap"] = Field("gap", description="1, or 1/(sigma_k - sigma_(k-1))")

    @model_validator(mode="after")
    def _ordered(self) -> ConsistencyConfig:
        if self.last < self.first:
            raise ValueError(f"last ({self.last}) must be at least first ({self.first})")
        return self


class TuningConfig(Section):
    """Easy Consistency Tuning (Geng et al. 2024): r = sigma (1 - n(sigma)/q^a), n = 1 + k sigmoid(-b sigma)."""

    q: Annotated[float, Field(gt=1)] = 2.0
    k: Annotated[float, Field(ge=0)] = 8.0
    b: Annotated[float, Field(ge=0)] = 1.0
    length: Positive = Field(
        1, description="visits a chain lasts: 1 is ECT, above it all targets but the first come from the store"
    )
    stages: Positive = Field(8, description="a = 1, 2, ..., stages over the run")
    mean: float = Field(-1.1, description="of ln sigma")
    deviation: Annotated[float, Field(gt=0)] = Field(2.0, description="of ln sigma")


class DenoiserConfig(Section):
    """The EDM denoiser (Karras et al. 2022), alone or as a warm-up."""

    mean: float = Field(-1.2, description="of ln sigma")
    deviation: Annotated[float, Field(gt=0)] = Field(1.2, description="of ln sigma")


class ObjectiveConfig(Section):
    name: Literal["chain", "algorithm-1", "consistency", "tuning", "denoiser"] = Field(
        "chain", description="docs/method.md: chain, the paper's Algorithm 1, iCT, ECT, an EDM denoiser"
    )
    warmup: UnderOne | None = Field(
        None, description="share of the run that trains a denoiser first; unset: 0.4 for tuning, else 0"
    )
    huber_c: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="c of Eq. 4; unset: 0.19 sqrt(C H W) for chain, 0.00054 sqrt(C H W) for consistency and tuning, "
        "the paper's 0.00014 or 0.00015 for Algorithm 1",
    )
    chain: ChainConfig = ChainConfig()
    consistency: ConsistencyConfig = ConsistencyConfig()
    tuning: TuningConfig = TuningConfig()
    denoiser: DenoiserConfig = DenoiserConfig()


class OrderConfig(Section):
    """Who visits which sample when (docs/architecture.md): part of the result, so the same for every store."""

    lanes: Positive = Field(8, description="fixed partitions of the data set; the number of ranks must divide it")
    chunk: Positive | None = Field(None, description="samples a chunk; unset: 4 MiB of float16 state")
    window: Positive | None = Field(None, description="chunks shuffled together; unset: 8")


class StoreConfig(Section):
    kind: Literal["gpu", "pinned", "zarr"] = "gpu"
    url: str | None = Field(None, description="where the zarr store lives; unset: <run>/state")
    dtype: Literal["fp32", "fp16", "bf16", "uint8"] = "fp16"
    threads: Positive | None = Field(
        None,
        description="requests at once, reading, and as many writing; unset: as many as keep up with the steps, 2 to 32",
    )
    prefetch: Positive | None = Field(
        None, description="steps whose state and images are made ready ahead; unset: chosen for the state, 4 for images"
    )
    compression: Literal["none", "lz4", "zstd"] = Field(
        "none", description="of the zarr store's chunks from the next generation on (docs/store.md has the trade)"
    )
    on_damage: Literal["stop", "reinitialize"] = Field(
        "stop",
        description="what a damaged chunk does: stop training, or let its samples begin again as in generation 0",
    )
    memory_mb: Positive | None = Field(
        None,
        description="most host memory of a rank's windows and batches, MB; unset: 1074, or the least that works "
        "where that is more",
    )


class EngineConfig(Section):
    """What takes the optimizer steps. Any of it may change between two starts of a run."""

    name: Literal["torch", "deepspeed"] = "torch"
    zero: Annotated[int, Field(ge=0, le=3)] | None = Field(None, description="ZeRO stage; unset: the file's, or 0")
    offload: bool = Field(False, description="keep master weights and moments in host memory (ZeRO 1 to 3)")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="a DeepSpeed configuration (--deepspeed FILE)")

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.name == "torch" and (self.zero is not None or self.offload or self.deepspeed):
            raise ValueError("zero, offload and deepspeed are settings of engine.name=deepspeed (--engine deepspeed)")
        if self.offload and self.zero == 0:
            raise ValueError("offload needs ZeRO stage 1, 2 or 3 (engine.zero, --zero)")
        return self


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = Field(None, description="optimizer steps; give either this or epochs")
    batch_size: Positive = Field(128, description="samples of one step, over all ranks")
    accumulation: Positive = Field(1, description="micro-batches of a step on each rank: less memory, the same result")
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[UnderOne, UnderOne] = (0.9, 0.999)
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    decay: Literal["constant", "cosine", "linear"] = Field("constant", description="learning rate after the warm-up")
    clip: Annotated[float, Field(gt=0)] | None = Field(None, description="gradient norm limit")
    ema: tuple[UnderOne, ...] = Field((0.9999,), description="decay of each exponential moving average")
    ema_warmup: bool = Field(False, description="limit the decay to (1 + step) / (10 + step)")
    power_ema: tuple[Annotated[float, Field(gt=0, lt=0.288)], ...] = Field(
        (), description="relative length of each average with a power-function profile (docs/method.md)"
    )
    power_ema_every_steps: Positive = Field(
        1000, description="steps between their snapshots, from which a length is chosen after training"
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    threads: Positive | None = Field(None, description="CPU threads of a tensor operation; unset: torch's choice")
    compile: bool = False
    channels_last: bool = True

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either train.epochs or train.steps, and not both")
        return self

    @field_validator("power_ema")
    @classmethod
    def _different(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{length:g}" for length in lengths}) < len(lengths):
            raise ValueError("two of the lengths are the same")
        return lengths

    @property
    def averages(self) -> list[str]:
        """What checkpoints call the averages of the weights; the first is what samples are made of."""
        return [*(f"{decay:g}" for decay in self.ema), *(f"power-{length:g}" for length in self.power_ema)]


class CheckpointConfig(Section):
    every_steps: Positive = 1000
    keep: Positive = 2


class SampleConfig(Section):
    every_steps: Annotated[int, Field(ge=0)] = Field(1000, description="a grid of samples while training; 0 is never")
    final: Annotated[int, Field(ge=0)] = Field(
        0, description="samples written as samples.npy and samples.png at the end"
    )
    steps: Positive = Field(1, description="network evaluations a sample")
    sampler: Literal["renoise", "algorithm-2", "heun"] = Field("renoise", description="heun is for denoisers")
    guidance: float = Field(1.0, description="weight of the label, f_none + w (f_label - f_none); 1 is plain sampling")


class EvaluateConfig(Section):
    """Scores of the first EMA while training (udddm-evaluate scores a finished run)."""

    every_steps: Annotated[int, Field(ge=0)] = Field(0, description="0 is never")
    count: Annotated[int, Field(ge=2)] = Field(2000, description="samples made for it, between two steps")
    features: str = Field("inception", description="inception, a TorchScript file, or package.module:function")


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    process: ProcessConfig = ProcessConfig()
    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    order: OrderConfig = OrderConfig()
    store: StoreConfig = StoreConfig()
    train: TrainConfig = TrainConfig(epochs=100)
    engine: EngineConfig = EngineConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    sample: SampleConfig = SampleConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    published: dict[Positive, dict[str, float]] = Field(
        default_factory=dict, description="by evaluations: figures that others report (fid, inception_score)"
    )
    log_every_steps: Positive = 50

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.train.batch_size % self.order.lanes:
            raise ValueError(
                f"order.lanes ({self.order.lanes}) must divide train.batch_size ({self.train.batch_size}): "
                "each lane gives the same number of samples to a step"
            )
        if self.objective.name == "algorithm-1" and self.network.condition == "none":
            raise ValueError(
                "Algorithm 1 conditions the network on the x0-state: set network.condition=cross-attention"
            )
        self.check_guidance(self.sample.guidance, "sample.guidance")
        return self

    def check_guidance(self, weight: float, key: str) -> None:
        """Raise ConfigError, naming `key`, unless a network trained with this configuration can be guided so."""
        if weight == 1:
            return
        if not math.isfinite(weight):
            raise ConfigError(f"{key} {weight}: give a finite number; 1 is plain sampling")
        if not self.network.classes:
            raise ConfigError(f"{key} {weight:g}: the network takes no labels (network.classes is 0); leave it at 1")
        if not self.network.label_dropout:
            raise ConfigError(
                f"{key} {weight:g}: the network never learned to go without a label; train one with "
                "network.label_dropout (such as 0.1), or leave it at 1"
            )

    @staticmethod
    def changeable() -> frozenset[str]:
        """The keys that may differ between two starts of a run: they decide nothing about the trained weights."""
        return _CHANGEABLE

    def fingerprint(self) -> str:
        """A hash of all that decides the trained weights: what a run directory must agree on to be resumed."""
        settings = self.model_dump(mode="json")
        for key in _CHANGEABLE:
            section, _, leaf = key.partition(".")
            if leaf:
                settings[section].pop(leaf)
            else:
                settings.pop(section)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


_CHANGEABLE = frozenset(
    {
        "checkpoint",
        "sample",
        "evaluate",
        "published",
        "log_every_steps",
        "store.kind",
        "store.url",
        "store.dtype",
        "store.threads",
        "store.prefetch",
        "store.memory_mb",
        "store.on_damage",
        "store.compression",
        "engine",
        "train.accumulation",
        "train.compile",
        "train.power_ema_every_steps",
        "train.threads",
        "data.path",
        "data.expect",
    }
)


def load(path: str | Path | None = None, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML preset (`None`: the defaults), apply overrides such as `train.epochs=3`, and validate.

    Raises ConfigError for a file that cannot be read or is no mapping, an unknown key (the nearest is suggested),
    a wrong type or a value out of range.
    """
    tree: dict[str, Any] = {}
    source = "the defaults"
    if path is not None:
        source = str(path)
        try:
            loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the configuration {path}: {error}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is not valid YAML: {error}") from error
        if loaded is not None and not isinstance(loaded, dict):
            raise ConfigError(f"{path} must hold a mapping of sections, not a {type(loaded).__name__}")
        tree = loaded or {}
    for override in overrides or []:
        apply(tree, override)
    return resolve(tree, source)


def resolve(tree: dict[str, Any], source: str = "the configuration") -> RunConfig:
    """Validate a tree of plain values. Raises ConfigError with every mistake, each naming its key."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines = [_explain(detail) for detail in error.errors()]
        raise ConfigError(f"{source}:\n  " + "\n  ".join(lines)) from None


def apply(tree: dict[str, Any], override: str) -> None:
    """Apply `key=value` to a tree of plain values. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: write key=value, such as train.epochs=3")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML: {error}") from error
    if isinstance(value, str):  # YAML 1.1 takes 1e-4 for a string
        with contextlib.suppress(ValueError):
            value = float(value)
    *parents, leaf = key.split(".")
    node = tree
    for depth, name in enumerate(parents):
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a section")
        node = child
    node[leaf] = value
    if (
        key == "train.steps" and value is not None
    ):  # the two lengths exclude each other; an override replaces the preset's
        node.pop("epochs", None)
    elif key == "train.epochs" and value is not None:
        node.pop("steps", None)


def _explain(detail: ErrorDetails) -> str:
    location = [str(part) for part in detail["loc"]]
    key = ".".join(location) or "configuration"
    if detail["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(location)}"
    message = detail["msg"].removeprefix("Value error, ")
    given = detail["input"]
    shown = "" if isinstance(given, dict | BaseModel) else f" (got {given!r})"
    return f"{key}: {message}{shown}"


def _nearest(location: list[str]) -> str:
    """The known key closest to a mistyped one, looked for in its own section first."""
    keys = list(_keys(RunConfig))
    key = ".".join(location)
    parent = key.rpartition(".")[0]
    siblings = [k for k in keys if k.rpartition(".")[0] == parent]
    by_leaf = {k.rpartition(".")[2]: k for k in keys}
    match = difflib.get_close_matches(key, siblings, 1, 0.6) or difflib.get_close_matches(key, keys, 1, 0.7)
    if not match and (leaf := difflib.get_close_matches(location[-1], by_leaf, 1, 0.6)):
        match = [by_leaf[leaf[0]]]
    return f"; did you mean {match[0]}?" if match else f"; {parent or 'the top level'} has: {', '.join(siblings)}"


def _keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for annotation in (field.annotation, *get_args(field.annotation)):  # a section, or a section that may be unset
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                keys += _keys(annotation, f"{prefix}{name}.")
    return keys
