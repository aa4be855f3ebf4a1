"""The run configuration and its sections, except `objective`, `train` and `engine`."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, model_validator

from udddm.config.base import CHANGEABLE, Positive, Section, UnderOne, unit
from udddm.config.condition import ConditionConfig
from udddm.config.evaluate import EvaluateConfig
from udddm.config.objective import ObjectiveConfig
from udddm.config.plugins import LOGGERS, NETWORKS, OBJECTIVES, SAMPLERS, SCHEDULES, STORES
from udddm.config.train import EngineConfig, TrainConfig
from udddm.errors import ConfigError


class ExpectConfig(Section):
    """The expected contents of a data set."""

    samples: Positive = Field(description="number of samples", json_schema_extra=unit("samples"))
    shape: tuple[Positive, Positive, Positive] = Field(description="channels, height and width of every image")
    classes: Positive | None = Field(None, description="number of class labels; unset: labels do not matter")


class DataConfig(Section):
    """The data set."""

    name: str = Field(
        "digits",
        description="digits, fashion-mnist, cifar10, folder, zip, webdataset, huggingface, array, or "
        "package.module:function (docs/data.md)",
    )
    path: str | None = Field(
        None, description="path or fsspec URL of the archive, folder, shards or array", json_schema_extra=CHANGEABLE
    )
    size: Positive | None = Field(
        None,
        description="side in pixels to which image files are cropped and resized (not an array)",
        json_schema_extra=unit("pixels"),
    )
    image: str | None = Field(
        None, description="webdataset: extension of the images within a sample; huggingface: their column"
    )
    label: str | None = Field(
        None,
        description="webdataset: extension of the labels within a sample, or json.KEY; huggingface: their column",
    )
    split: str | None = Field(None, description="huggingface: split of a saved DatasetDict (default: train)")
    workers: Annotated[int, Field(ge=0)] = Field(
        0,
        description="processes per rank that read and decode images; 0: a thread of the rank. The batches are the same",
        json_schema_extra=CHANGEABLE | unit("processes"),
    )
    flip: bool = Field(
        False, description="mirror half of the images horizontally; the choice depends on the noise of a visit"
    )
    condition: ConditionConfig = Field(ConditionConfig(), description="conditioning image of each visit")
    missing_chunks: Literal["stop", "fill"] = Field(
        "stop",
        description="meaning of a missing chunk of a Zarr data set: corruption (stop), or a chunk that contains only "
        "the fill value (fill), which Zarr omits by default",
        json_schema_extra=CHANGEABLE,
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of package.module:function")
    expect: ExpectConfig | None = Field(
        None,
        description="expected contents: checked when the data are loaded, and used by --dry-run without data",
        json_schema_extra=CHANGEABLE,
    )


class ScheduleConfig(Section):
    """The noise schedule of the forward process (arXiv 2405.21059, "Forward process")."""

    kind: Annotated[str, AfterValidator(SCHEDULES.check)] = Field("ve", description="ve, vp, or package.module:factory")
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a custom noise schedule")
    timesteps: Annotated[int, Field(ge=2)] = Field(
        1000, description="number of time steps, T in the paper", json_schema_extra=unit("time steps")
    )
    beta_min: Annotated[float, Field(gt=0, lt=1)] = Field(1.5e-3, description="lowest beta of vp")
    beta_max: Annotated[float, Field(gt=0, lt=1)] = Field(2.0e-2, description="highest beta of vp")
    sigma_min: Annotated[float, Field(ge=1e-9)] = Field(
        0.01, description="lowest noise level of ve", json_schema_extra=unit("noise level")
    )
    sigma_max: Annotated[float, Field(gt=0, le=1e9)] = Field(
        50.0, description="highest noise level of ve", json_schema_extra=unit("noise level")
    )
    rho: Annotated[float, Field(ge=0.1, le=1e6)] = Field(
        7.0, description="exponent of the spacing of noise levels (Karras et al. 2022, Eq. 5)"
    )
    sigma_data: Annotated[float, Field(ge=1e-9, le=1e9)] = Field(
        0.5, description="standard deviation of the data", json_schema_extra=unit("noise level")
    )
    preconditioning: Literal["paper", "linear", "quadratic", "edm", "epsilon"] = Field(
        "edm",
        description="c_skip and c_out: those of the paper (VP: x_t - F; VE: kappa = sigma_min/sigma), its other kappas "
        "(linear and quadratic, VE), those of EDM, or those of a network that predicts the noise (epsilon, VP)",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ScheduleConfig:
        if self.sigma_min >= self.sigma_max:
            raise ValueError(f"sigma_min {self.sigma_min} must be below sigma_max {self.sigma_max}")
        if self.beta_min > self.beta_max:
            raise ValueError(f"beta_min {self.beta_min} must not exceed beta_max {self.beta_max}")
        if self.kind == "vp" and self.preconditioning in ("linear", "quadratic"):
            raise ValueError(
                f"preconditioning '{self.preconditioning}' is a kappa of the VE schedule; use paper or edm for VP"
            )
        if self.kind == "ve" and self.preconditioning == "epsilon":
            raise ValueError("preconditioning 'epsilon' is DDPM's, of the VP schedule; use paper or edm for VE")
        return self


class NetworkConfig(Section):
    """The network. The default is the ADM U-Net (Dhariwal & Nichol 2021) with cross-attention to an image."""

    name: Annotated[str, AfterValidator(NETWORKS.check)] = Field(
        "unet", description="unet, dit, ddpmpp (docs/networks.md), or package.module:factory"
    )
    settings: dict[str, Any] = Field(
        default_factory=dict, description="settings of dit, of ddpmpp, or of a custom network"
    )
    patch: Annotated[int, Field(ge=1, le=1024)] = Field(
        1,
        description="side of the pixel blocks that become channels (pixel unshuffle); 1 disables it",
        json_schema_extra=unit("pixels"),
    )
    base_channels: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        128, description="channels of the first level", json_schema_extra=unit("channels")
    )
    channel_mult: tuple[Annotated[int, Field(ge=1, le=256)], ...] = Field(
        (1, 2, 2, 2), min_length=1, max_length=16, description="channels of each level, as multiples of base_channels"
    )
    blocks_per_level: Annotated[int, Field(ge=1, le=256)] = Field(
        3, description="residual blocks per level", json_schema_extra=unit("blocks")
    )
    attention_resolutions: tuple[Positive, ...] = Field(
        (16, 8),
        description="image sides in pixels at which attention is applied; the default applies to the sides that exist",
        json_schema_extra=unit("pixels"),
    )
    head_dim: Annotated[int, Field(ge=1, le=1 << 16)] = Field(
        64, description="channels per attention head", json_schema_extra=unit("channels")
    )
    dropout: UnderOne = Field(0.3, description="dropout probability")
    max_frequency: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="highest frequency of the noise-level embedding, in radians per unit of c_noise; unset: 16 with "
        "preconditioning edm (EDM's own value is 1), otherwise 1",
        json_schema_extra=unit("radians per unit of c_noise"),
    )
    condition: Literal["cross-attention", "channels", "none"] = Field(
        "cross-attention",
        description="how the network uses a conditioning image: by attention to it, as additional input channels, or "
        "not at all",
    )
    classes: Annotated[int, Field(ge=0, le=1 << 24)] = Field(
        0, description="number of classes; 0 trains an unconditional network"
    )
    label_dropout: UnderOne = Field(
        0.0,
        description="fraction of the visits without a label, which guidance needs (docs/method.md)",
        json_schema_extra=unit("fraction of the visits"),
    )

    @property
    def conditioned(self) -> bool:
        """Whether the network receives a conditioning image."""
        return self.condition != "none"

    @model_validator(mode="after")
    def _labels_to_drop(self) -> NetworkConfig:
        if self.label_dropout and not self.classes:
            raise ValueError(
                f"label_dropout {self.label_dropout} has no labels to drop: set network.classes, or label_dropout to 0"
            )
        return self


class OrderConfig(Section):
    """The order in which samples are visited (docs/architecture.md). It affects the result, and is the same for every
    store."""

    lanes: Positive | None = Field(
        None,
        description="number of fixed partitions of the data set; the number of ranks must divide it; unset: 64 for a "
        "large data set, 8 for a small one (docs/store.md), and what divides train.batch_size",
    )
    chunk: Positive | None = Field(
        None,
        description="samples per chunk; unset: 4 MiB of float16 state, at most 2 MiB where lanes is unset too and "
        "the data set is large",
        json_schema_extra=unit("samples"),
    )
    window: Positive | None = Field(
        None,
        description="chunks of a lane that are shuffled together; unset: 8, or 1 of each of 64 lanes where lanes is "
        "unset too",
        json_schema_extra=unit("chunks"),
    )


class StoreConfig(Section):
    """The x0-state store. Every setting may change between two starts of a run."""

    kind: Annotated[str, AfterValidator(STORES.check)] = Field(
        "gpu",
        description="gpu, pinned, zarr, or package.module:factory; an objective that does not read the state has none",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a custom store")
    url: str | None = Field(None, description="location of the zarr store; unset: <run>/state")
    dtype: Literal["fp32", "fp16", "bf16", "uint8"] = Field("fp16", description="type of the stored state")
    threads: Positive | None = Field(
        None,
        description="concurrent reads, and concurrent writes; unset: as many as the step rate needs, 2 to 32",
        json_schema_extra=unit("requests"),
    )
    prefetch: Positive | None = Field(
        None,
        description="steps for which state and images are prefetched; unset: automatic for the state, 4 for images",
        json_schema_extra=unit("steps"),
    )
    compression: Literal["none", "lz4", "zstd"] = Field(
        "none", description="compression of the zarr store's chunks, from the next generation on (docs/store.md)"
    )
    on_corruption: Literal["stop", "reinitialize"] = Field(
        "stop",
        description="action on a corrupt chunk: stop the run, or reinitialize its samples as in generation 0",
    )
    memory_mb: Positive | None = Field(
        None,
        description="limit of the host memory of a rank's windows and batches, in MB; unset: 1074, or the required "
        "minimum if that is more",
        json_schema_extra=unit("MB"),
    )


class CheckpointConfig(Section):
    """Checkpoints of a run."""

    every_steps: Positive = Field(1000, description="steps between checkpoints", json_schema_extra=unit("steps"))
    keep: Positive = Field(2, description="number of checkpoints to keep", json_schema_extra=unit("checkpoints"))
    best: Literal["fid", "fd", "kid", "recall", "precision", "inception_score"] | None = Field(
        None,
        description="score of evaluations during training by which <run>/best keeps the best weights of the first EMA",
    )


class SampleConfig(Section):
    """Samples that a run generates, with the first EMA."""

    every_steps: Annotated[int, Field(ge=0)] = Field(
        1000, description="steps between sample grids during training; 0 disables them", json_schema_extra=unit("steps")
    )
    final: Annotated[int, Field(ge=0)] = Field(
        0,
        description="number of samples in samples.npy and samples.png at the end of the run",
        json_schema_extra=unit("samples"),
    )
    steps: Positive = Field(1, description="network evaluations per sample", json_schema_extra=unit("evaluations"))
    sampler: Annotated[str, AfterValidator(SAMPLERS.check)] = Field(
        "renoise", description="renoise, algorithm-2, heun (for denoisers), or package.module:function"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a custom sampler")
    guidance: float = Field(1.0, description="guidance weight w of f_none + w (f_label - f_none); 1 disables guidance")


class RunConfig(Section):
    """The configuration of a run."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(0, description="seed of all random numbers of the run")
    data: DataConfig = Field(DataConfig(), description="data set")
    schedule: ScheduleConfig = Field(ScheduleConfig(), description="noise schedule")
    network: NetworkConfig = Field(NetworkConfig(), description="network")
    objective: ObjectiveConfig = Field(ObjectiveConfig(), description="training objective")
    order: OrderConfig = Field(OrderConfig(), description="order in which samples are visited")
    store: StoreConfig = Field(StoreConfig(), description="x0-state store", json_schema_extra=CHANGEABLE)
    train: TrainConfig = Field(TrainConfig(epochs=100), description="optimization")
    engine: EngineConfig = Field(EngineConfig(), description="training engine", json_schema_extra=CHANGEABLE)
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="checkpoints", json_schema_extra=CHANGEABLE)
    sample: SampleConfig = Field(SampleConfig(), description="samples of the run", json_schema_extra=CHANGEABLE)
    evaluate: EvaluateConfig = Field(
        EvaluateConfig(), description="scores during training", json_schema_extra=CHANGEABLE
    )
    published: dict[Positive, dict[str, float]] = Field(
        default_factory=dict,
        description="published scores (fid, inception_score) by number of network evaluations, for comparison",
        json_schema_extra=CHANGEABLE,
    )
    log_every_steps: Positive = Field(
        50, description="steps between two log lines of metrics", json_schema_extra=CHANGEABLE | unit("steps")
    )
    loggers: tuple[Annotated[str, AfterValidator(LOGGERS.check)], ...] | None = Field(
        None,
        description="where metrics, pictures and scores go besides the run's own files: tensorboard, wandb, mlflow, or "
        "package.module:function; unset: tensorboard, if it is installed",
        json_schema_extra=CHANGEABLE,
    )
    profile_steps: Annotated[int, Field(ge=0)] = Field(
        0,
        description="steps to trace after the first 10 of a start, into <run>/profile (--profile)",
        json_schema_extra=CHANGEABLE | unit("steps"),
    )

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.order.lanes is not None and self.train.batch_size % self.order.lanes:
            raise ValueError(
                f"order.lanes ({self.order.lanes}) must divide train.batch_size ({self.train.batch_size}): "
                "each lane contributes the same number of samples to a step"
            )
        self._check_weight(self.objective.guidance, "objective.guidance")
        self.check_guidance(self.sample.guidance, "sample.guidance")
        if self.data.condition.used and not self.network.conditioned:
            raise ValueError(
                f"data.condition.kind={self.data.condition.kind} needs a network that takes a conditioning image: set "
                "network.condition=channels or cross-attention"
            )
        if self.checkpoint.best is not None and not self.evaluate.every_steps:
            raise ValueError(
                f"checkpoint.best={self.checkpoint.best} needs scores during training: set evaluate.every_steps"
            )
        return self

    def check_guidance(self, weight: float, key: str) -> None:
        """Raise ConfigError, which names `key`, unless a network with this configuration supports guidance `weight`."""
        self._check_weight(weight, key)
        trained = self.objective.guidance
        if weight != 1 and trained != 1 and not getattr(OBJECTIVES.load(self.objective.name), "is_denoiser", False):
            raise ConfigError(
                f"{key} {weight:g}: the network is trained to be guided at one call (objective.guidance {trained:g}); "
                "its estimate without a label is a mean and not an image, so leave it at 1"
            )

    def _check_weight(self, weight: float, key: str) -> None:
        if weight == 1:
            return
        if not math.isfinite(weight):
            raise ConfigError(f"{key} {weight}: give a finite number; 1 disables guidance")
        if not self.network.classes:
            raise ConfigError(f"{key} {weight:g}: the network takes no labels (network.classes is 0); leave it at 1")
        if not self.network.label_dropout:
            raise ConfigError(
                f"{key} {weight:g}: the network was not trained without labels; train one with "
                "network.label_dropout (such as 0.1), or leave it at 1"
            )

    @classmethod
    def changeable(cls) -> frozenset[str]:
        """The keys that may change between two starts of a run, because they do not affect the trained weights."""
        return frozenset(_changeable(cls))

    def fingerprint(self) -> str:
        """A hash of all settings that affect the trained weights. A run resumes only with the same fingerprint."""
        settings = self.model_dump(mode="json")
        for key in self.changeable():
            *sections, leaf = key.split(".")
            inner = settings
            for section in sections:
                inner = inner[section]
            inner.pop(leaf)
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def _changeable(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The keys of fields that are marked with CHANGEABLE: entire sections or single settings."""
    for name, field in model.model_fields.items():
        if isinstance(field.json_schema_extra, dict) and field.json_schema_extra.get("changeable"):
            yield prefix + name
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _changeable(field.annotation, f"{prefix}{name}.")
