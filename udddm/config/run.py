"""The other sections, and the run configuration of all of them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator, model_validator

from udddm.config.base import CHANGEABLE, Positive, Section, UnderOne
from udddm.config.objective import ObjectiveConfig
from udddm.config.plugins import ENGINES, METRICS, NETWORKS, SAMPLERS, SCHEDULES, STORES
from udddm.errors import ConfigError


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
    path: str | None = Field(
        None, description="a path or fsspec URL: the archive, folder or array to read", json_schema_extra=CHANGEABLE
    )
    size: Positive | None = Field(None, description="side in pixels that a folder's images are resized to")
    missing_chunks: Literal["stop", "fill"] = Field(
        "stop",
        description="what a missing chunk of a Zarr data set means: damage (stop), or its fill value, as Zarr leaves "
        "out chunks that hold nothing else unless told otherwise",
        json_schema_extra=CHANGEABLE,
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for package.module:function")
    expect: ExpectConfig | None = Field(
        None,
        description="what the data must hold: checked when they are loaded; what --dry-run assumes without them",
        json_schema_extra=CHANGEABLE,
    )


class ScheduleConfig(Section):
    """The forward process (PAPER: "Forward process"). `timesteps` is the paper's T."""

    kind: Annotated[str, AfterValidator(SCHEDULES.check)] = Field("ve", description="ve, vp, or package.module:factory")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a schedule of your own")
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
    def _consistent(self) -> ScheduleConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min {self.beta_min} must not exceed beta_max {self.beta_max}")
        if self.kind == "vp" and self.preconditioning in ("linear", "quadratic"):
            raise ValueError(
                f"preconditioning '{self.preconditioning}' is a kappa of the VE schedule; VP takes paper or edm"
            )
        return self


class NetworkConfig(Section):
    """The network; without `name`, the ADM U-Net (Dhariwal & Nichol 2021) with cross-attention to an image."""

    name: Annotated[str, AfterValidator(NETWORKS.check)] = Field("unet", description="unet, or package.module:factory")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a network of your own")
    patch: Positive = Field(1, description="side of the pixel blocks that become channels (pixel unshuffle); 1: none")
    base_channels: Positive = 128
    channel_mult: tuple[Positive, ...] = Field((1, 2, 2, 2), min_length=1)
    blocks_per_level: Positive = Field(3, description="residual blocks a stage")
    attention_resolutions: tuple[Positive, ...] = Field((16, 8), description="image sides at which attention runs")
    head_dim: Positive = Field(64, description="channels of one attention head")
    dropout: UnderOne = 0.3
    condition: Literal["cross-attention", "none"] = "cross-attention"
    classes: Annotated[int, Field(ge=0)] = Field(0, description="number of class labels; 0 is unconditional")
    label_dropout: UnderOne = Field(
        0.0, description="share of the visits that see no label: what guidance needs (docs/method.md)"
    )

    @property
    def conditioned(self) -> bool:
        """Whether the network is given a conditioning image."""
        return self.condition != "none"

    @model_validator(mode="after")
    def _labels_to_drop(self) -> NetworkConfig:
        if self.label_dropout and not self.classes:
            raise ValueError(
                f"label_dropout {self.label_dropout} has no labels to drop: set network.classes, or label_dropout to 0"
            )
        return self


class OrderConfig(Section):
    """Who visits which sample when (docs/architecture.md): part of the result, so the same for every store."""

    lanes: Positive = Field(8, description="fixed partitions of the data set; the number of ranks must divide it")
    chunk: Positive | None = Field(None, description="samples a chunk; unset: 4 MiB of float16 state")
    window: Positive | None = Field(None, description="chunks shuffled together; unset: 8")


class StoreConfig(Section):
    """The x0-state store. Any of it may change between two starts of a run."""

    kind: Annotated[str, AfterValidator(STORES.check)] = Field(
        "gpu", description="gpu, pinned, zarr, or package.module:factory"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a store of your own")
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
    on_corruption: Literal["stop", "reinitialize"] = Field(
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

    name: Annotated[str, AfterValidator(ENGINES.check)] = Field(
        "torch", description="torch, deepspeed, or package.module:factory"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of an engine of your own")
    zero: Annotated[int, Field(ge=0, le=3)] | None = Field(None, description="ZeRO stage; unset: the file's, or 0")
    offload: bool = Field(False, description="keep master weights and moments in host memory (ZeRO 1 to 3)")
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="a DeepSpeed configuration (--deepspeed FILE)")

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.offload and self.zero == 0:
            raise ValueError("offload needs ZeRO stage 1, 2 or 3 (engine.zero, --zero)")
        return self


class TrainConfig(Section):
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Positive | None = Field(None, description="optimizer steps; give either this or epochs")
    init_from: str | None = Field(
        None,
        description="begin with the first average of this run, checkpoint or release (a path or URL); unset: at random",
    )
    batch_size: Positive = Field(128, description="samples of one step, over all ranks")
    grad_accumulation: Positive = Field(
        1,
        description="micro-batches of a step on each rank: less memory, the same result",
        json_schema_extra=CHANGEABLE,
    )
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    betas: tuple[UnderOne, UnderOne] = (0.9, 0.999)
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rate after the warm-up"
    )
    grad_clip: Annotated[float, Field(gt=0)] | None = Field(None, description="gradient norm limit")
    ema: tuple[UnderOne, ...] = Field((0.9999,), description="decay of each exponential moving average")
    ema_warmup: bool = Field(False, description="limit the decay to (1 + step) / (10 + step)")
    power_ema: tuple[Annotated[float, Field(gt=0, lt=0.288)], ...] = Field(
        (), description="relative length of each average with a power-function profile (docs/method.md)"
    )
    power_ema_every_steps: Positive = Field(
        1000,
        description="steps between their snapshots, from which a length is chosen after training",
        json_schema_extra=CHANGEABLE,
    )
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    torch_threads: Positive | None = Field(
        None, description="CPU threads of a tensor operation; unset: torch's choice", json_schema_extra=CHANGEABLE
    )
    compile: bool = Field(False, description="torch.compile; needs a C++ compiler", json_schema_extra=CHANGEABLE)
    tf32: bool = Field(
        True,
        description="TF32 for float32 products and convolutions on GPUs: faster, with 10 bits of mantissa",
        json_schema_extra=CHANGEABLE,
    )
    deterministic: bool = Field(
        False,
        description="only deterministic kernels, so that a run on the same GPUs repeats bit for bit; slower on GPUs",
        json_schema_extra=CHANGEABLE,
    )
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
    sampler: Annotated[str, AfterValidator(SAMPLERS.check)] = Field(
        "renoise", description="renoise, algorithm-2, heun (for denoisers), or package.module:function"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a sampler of your own")
    guidance: float = Field(1.0, description="weight of the label, f_none + w (f_label - f_none); 1 is plain sampling")


class EvaluateConfig(Section):
    """Scores of the first EMA while training (udddm-evaluate scores a finished run)."""

    every_steps: Annotated[int, Field(ge=0)] = Field(0, description="0 is never")
    count: Annotated[int, Field(ge=2)] = Field(2000, description="samples made for it, between two steps")
    features: str = Field("inception", description="inception, a TorchScript file, or package.module:function")
    metrics: tuple[Annotated[str, AfterValidator(METRICS.check)], ...] = Field(
        tuple(METRICS.members), description="names, and functions of your own as package.module:function"
    )


class RunConfig(Section):
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    network: NetworkConfig = NetworkConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    order: OrderConfig = OrderConfig()
    store: StoreConfig = Field(StoreConfig(), json_schema_extra=CHANGEABLE)
    train: TrainConfig = TrainConfig(epochs=100)
    engine: EngineConfig = Field(EngineConfig(), json_schema_extra=CHANGEABLE)
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), json_schema_extra=CHANGEABLE)
    sample: SampleConfig = Field(SampleConfig(), json_schema_extra=CHANGEABLE)
    evaluate: EvaluateConfig = Field(EvaluateConfig(), json_schema_extra=CHANGEABLE)
    published: dict[Positive, dict[str, float]] = Field(
        default_factory=dict,
        description="by evaluations: figures that others report (fid, inception_score)",
        json_schema_extra=CHANGEABLE,
    )
    log_every_steps: Positive = Field(
        50, description="steps between two lines of metrics", json_schema_extra=CHANGEABLE
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.train.batch_size % self.order.lanes:
            raise ValueError(
                f"order.lanes ({self.order.lanes}) must divide train.batch_size ({self.train.batch_size}): "
                "each lane gives the same number of samples to a step"
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

    @classmethod
    def changeable(cls) -> frozenset[str]:
        """The keys that may differ between two starts of a run: they decide nothing about the trained weights."""
        return frozenset(_changeable(cls))

    def fingerprint(self) -> str:
        """A hash of all that decides the trained weights: what a run directory must agree on to be resumed."""
        settings = self.model_dump(mode="json")
        for key in self.changeable():
            section, _, leaf = key.partition(".")
            if leaf:
                settings[section].pop(leaf)
            else:
                settings.pop(section)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _changeable(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys whose fields are marked with CHANGEABLE: a section as a whole, or a leaf."""
    for name, field in model.model_fields.items():
        if field.json_schema_extra == CHANGEABLE:
            yield prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _changeable(field.annotation, f"{prefix}{name}.")
