"""The sections `train` and `engine`: optimization, and what takes the steps."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from udddm.config.base import CHANGEABLE, Positive, Section, UnderOne, unit
from udddm.config.plugins import ENGINES


class EngineConfig(Section):
    """The training engine, which takes the optimizer steps. Every setting may change between two starts of a run."""

    name: Annotated[str, AfterValidator(ENGINES.check)] = Field(
        "torch", description="torch, deepspeed, or package.module:factory"
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="settings of a custom engine")
    zero: Annotated[int, Field(ge=0, le=3)] | None = Field(
        None, description="ZeRO stage; unset: that of `deepspeed`, or 0"
    )
    offload: bool = Field(
        False, description="keep master weights and optimizer moments in host memory (ZeRO stages 1 to 3)"
    )
    deepspeed: dict[str, Any] = Field(default_factory=dict, description="DeepSpeed configuration (--deepspeed FILE)")

    @model_validator(mode="after")
    def _consistent(self) -> EngineConfig:
        if self.offload and self.zero == 0:
            raise ValueError("offload needs ZeRO stage 1, 2 or 3 (engine.zero, --zero)")
        return self


class TrainConfig(Section):
    """Optimization: length, batch size, optimizer, averages of the weights, and numerics."""

    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None, description="length of the run in epochs; without a section train, 100", json_schema_extra=unit("epochs")
    )
    steps: Positive | None = Field(
        None,
        description="length of the run in optimizer steps; set either steps or epochs",
        json_schema_extra=unit("steps"),
    )
    init_from: str | None = Field(
        None,
        description="initialize the weights with the first average of this run, checkpoint or release (a path or URL), "
        "or with EDM's network snapshot (.pkl) or a DiT or DDPM in diffusers' format (docs/networks.md); unset: random "
        "weights",
    )
    batch_size: Positive = Field(128, description="samples per step, over all ranks", json_schema_extra=unit("samples"))
    grad_accumulation: Positive = Field(
        1,
        description="micro-batches per step on each rank; more need less memory and give the same result",
        json_schema_extra=CHANGEABLE | unit("micro-batches"),
    )
    optimizer: Literal["adam", "adamw", "radam"] = Field("adam", description="Adam, AdamW or RAdam")
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="decoupled weight decay of adamw and radam, times the learning rate"
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(2e-4, description="learning rate")
    betas: tuple[UnderOne, UnderOne] = Field((0.9, 0.999), description="decay rates of the optimizer's moments")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(
        0, description="steps over which the learning rate rises linearly from 0", json_schema_extra=unit("steps")
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = Field(
        "constant", description="learning rate after the warm-up: constant, or decaying to 0 at the end"
    )
    lr_restart: UnderOne = Field(
        0.0,
        description="fraction of the run at which the learning rate starts again, with its warm-up and decay, such as "
        "objective.pretrain",
        json_schema_extra=unit("fraction of the run"),
    )
    grad_clip: Annotated[float, Field(gt=0)] | None = Field(
        None, description="maximum norm of the gradient; unset: no clipping"
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        None,
        description="go back to the newest checkpoint, with half the learning rate for a while, if the loss between "
        "two reports is not finite or exceeds the usual one by this factor; unset: stop if it is not finite",
        json_schema_extra=CHANGEABLE,
    )
    ema: tuple[UnderOne, ...] = Field((0.9999,), description="decay of each exponential moving average")
    ema_warmup: bool = Field(False, description="limit the decay to (1 + step) / (10 + step)")
    power_ema: tuple[Annotated[float, Field(gt=0, lt=0.288)], ...] = Field(
        (),
        description="relative length of each power-function average of the weights (docs/method.md)",
        json_schema_extra=unit("fraction of the run"),
    )
    power_ema_every_steps: Positive = Field(
        1000,
        description="steps between snapshots of power_ema, from which any length can be built after training",
        json_schema_extra=CHANGEABLE | unit("steps"),
    )
    precision: Literal["fp32", "bf16", "fp16"] = Field(
        "fp32", description="autocast type of the network; weights and optimizer state stay fp32"
    )
    torch_threads: Positive | None = Field(
        None,
        description="CPU threads per tensor operation; unset: chosen by torch",
        json_schema_extra=CHANGEABLE | unit("threads"),
    )
    compile: bool = Field(
        False,
        description="compile the network with torch.compile, which needs a C++ compiler",
        json_schema_extra=CHANGEABLE,
    )
    recompute: bool = Field(
        False,
        description="compute normalizations and activations again in the backward pass instead of keeping them: less "
        "memory, the same bits, a little slower; for networks unet and ddpmpp that are not compiled",
        json_schema_extra=CHANGEABLE,
    )
    cuda_graphs: bool | None = Field(
        None,
        description="launch the network's kernels on a GPU all at once, as CUDA graphs; unset: with network.name=unet "
        "on one GPU, without compile, deterministic and grad_accumulation",
        json_schema_extra=CHANGEABLE,
    )
    tf32: bool = Field(
        True,
        description="use TF32 for float32 matrix products and convolutions on GPUs: faster, with 10 bits of mantissa",
        json_schema_extra=CHANGEABLE,
    )
    deterministic: bool = Field(
        False,
        description="use only deterministic kernels: a run repeats bit for bit on the same GPUs; slower on GPUs",
        json_schema_extra=CHANGEABLE,
    )
    channels_last: bool | None = Field(
        None,
        description="memory format of the network: channels last instead of channels first; unset: channels last, but "
        "on a GPU only with compile",
        json_schema_extra=CHANGEABLE,
    )

    @model_validator(mode="after")
    def _one_length(self) -> TrainConfig:
        if self.epochs is None and self.steps is None:
            raise ValueError("the length of the run is missing: set train.steps or train.epochs")
        if self.epochs is not None and self.steps is not None:
            raise ValueError("set either train.epochs or train.steps, not both")
        return self

    @model_validator(mode="after")
    def _decoupled(self) -> TrainConfig:
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError(
                f"weight_decay {self.weight_decay:g} needs optimizer adamw or radam: in Adam's moments it would depend "
                "on the gradients"
            )
        return self

    @field_validator("power_ema")
    @classmethod
    def _different(cls, lengths: tuple[float, ...]) -> tuple[float, ...]:
        if len({f"{length:g}" for length in lengths}) < len(lengths):
            raise ValueError("the lengths must be different")
        return lengths

    @property
    def averages(self) -> list[str]:
        """The names of the averages of the weights in checkpoints. Samples use the first one by default."""
        return [*(f"{decay:g}" for decay in self.ema), *(f"power-{length:g}" for length in self.power_ema)]
