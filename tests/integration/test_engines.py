"""Engines agree at any ZeRO stage and number of ranks, and load each other's checkpoints bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel

import udddm
from udddm import ConfigError, RunConfig, networks
from udddm.backends import engines
from udddm.backends.distributed.ranks import Ranks
from udddm.backends.engines import EngineContext, ddp, deepspeed_config
from udddm.backends.engines.ddp import TorchEngine
from udddm.config import resolve
from udddm.runs.weights import Saved, share_out
from udddm.testing.ranks import Copy, on_ranks

pytestmark = pytest.mark.usefixtures("forked_workers")
SHAPE = (1, 8, 8)
NETWORK = {
    "base_channels": 8,
    "channel_mult": [1, 2],
    "blocks_per_level": 1,
    "attention_resolutions": [4],
    "dropout": 0.0,
}
ENGINES: dict[str, dict[str, Any]] = {
    "torch": {},
    **{f"zero{stage}": {"name": "deepspeed", "zero": stage} for stage in range(4)},
    "zero2-offload": {"name": "deepspeed", "zero": 2, "offload": True},
}


def config(name: str = "torch", **train: Any) -> RunConfig:
    return resolve(
        {
            "network": NETWORK,
            "engine": ENGINES[name],
            "train": {"steps": 8, "batch_size": 64, "learning_rate": 1e-3, "ema": [0.9], "grad_clip": 1.0, **train},
            "checkpoint": {"every_steps": 4},
            "sample": {"every_steps": 0, "final": 5},
            "log_every_steps": 4,
        }
    )


def difference(one: Path, other: Path) -> float:
    found = 0.0
    for kind in ("model", "ema-0.9", "optimizer"):
        a, b = (Saved(run / "checkpoints" / "step-00000008", kind) for run in (one, other))
        assert set(a) == set(b)
        found = max(found, *(float((a[name] - b[name]).abs().max()) for name in a))
    return found


def train(run: Path, name: str, workers: int, **settings: Any) -> Path:
    udddm.train(config(name, **settings), run_dir=run, device="cpu", workers=workers)
    return run


@pytest.fixture(scope="module")
def reference(forked_workers: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The torch engine on two ranks."""
    return train(tmp_path_factory.mktemp("engines") / "torch", "torch", 2)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("zero0", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.slow),
        "zero3",
        pytest.param("zero2-offload", marks=pytest.mark.slow),
    ],
)
def test_every_stage_gives_the_weights_ema_and_moments_of_torch(name: str, reference: Path, tmp_path: Path) -> None:
    assert difference(train(tmp_path / name, name, 2), reference) < 1e-6


@pytest.mark.parametrize("name", [pytest.param("torch", marks=pytest.mark.slow), "zero2"])
def test_accumulation_gives_the_same_weights(name: str, reference: Path, tmp_path: Path) -> None:
    assert difference(train(tmp_path / name, name, 2, grad_accumulation=4), reference) < 1e-6


@pytest.mark.parametrize("workers", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_ranks_gives_the_same_weights(workers: int, reference: Path, tmp_path: Path) -> None:
    assert difference(train(tmp_path / "run", "torch", workers), reference) < 1e-6


@pytest.mark.parametrize(
    ("first", "then"),
    [(("zero3", 2), ("torch", 1)), pytest.param(("torch", 1), ("zero3", 2), marks=pytest.mark.slow)],
)
def test_a_run_may_change_its_engine_and_ranks_when_it_resumes(
    first: tuple[str, int], then: tuple[str, int], reference: Path, tmp_path: Path
) -> None:
    """One engine up to step 4, the other from there on."""
    run = tmp_path / "run"
    train(run, *first)
    newest = run / "checkpoints" / "step-00000008"
    (newest / "manifest.json").unlink()  # as if it had been killed before the checkpoint was complete
    (run / "result.json").unlink()
    train(run, *then)
    assert difference(run, reference) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torch", *(f"zero{stage}" for stage in range(4))])
def test_four_ranks_resume_bit_for_bit(name: str, tmp_path: Path) -> None:
    """With more than two ranks, the order of sums affects the bits: it must be the same from the first step on."""
    run = train(tmp_path / "run", name, 4)
    undisturbed = json.loads((run / "result.json").read_text())
    (run / "checkpoints" / "step-00000008" / "manifest.json").unlink()
    (run / "result.json").unlink()
    train(run, name, 4)
    resumed = json.loads((run / "result.json").read_text())
    for kind in ("weights", "ema", "state"):
        assert resumed[f"{kind}_sha256"] == undisturbed[f"{kind}_sha256"]


@pytest.mark.slow
def test_checkpoints_pass_through_every_engine_bit_for_bit(reference: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for kind in ("model", "ema-0.9", "optimizer"):
        saved = Saved(reference / "checkpoints" / "step-00000008", kind)
        tensors = {name: saved[name].clone() for name in saved}
        for name, tensor in tensors.items():
            if name.endswith("bias"):  # a floating-point sum with the zeros of other ranks would lose the sign
                tensor.view(-1)[::2] = -0.0
        save_file(tensors, source / f"{kind}.safetensors")
    here = source
    chain = [
        ("zero3", 2, "fp32"),
        ("torch", 1, "fp32"),
        ("zero1", 4, "fp32"),
        ("zero2", 2, "bf16"),
        ("zero3", 2, "bf16"),
    ]
    for number, (name, world, precision) in enumerate(chain):
        place = tmp_path / str(number)
        place.mkdir()
        on_ranks(world, place, Copy(config(name, precision=precision), SHAPE, here, place / "copy"))
        here = place / "copy"
        assert len(list(here.glob("model*.safetensors"))) == world
        for kind in ("model", "ema-0.9", "optimizer"):
            a, b = Saved(source, kind), Saved(here, kind)
            assert set(a) == set(b)
            for tensor in a:
                assert a[tensor].numpy().tobytes() == b[tensor].numpy().tobytes(), (name, world, tensor)


class HalfSteps:
    """Some steps in fp16 on a CPU. DeepSpeed checks for support, which is overridden because PyTorch has the kernels.
    The first rank writes the moments and the loss scale."""

    def __init__(self, config: RunConfig, target: Path, good: int = 0):
        self.config, self.target, self.good = config, target, good

    def __call__(self, ranks: Ranks) -> None:
        from deepspeed.accelerator import get_accelerator

        kind = type(get_accelerator())
        kind.is_fp16_supported = lambda self: True
        built = engines.build(networks.for_run(self.config, SHAPE), self.config, ranks, 8)
        if self.good:
            built.load_loss_scale(2.0**10, self.good)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(32, *SHAPE, generator=generator)
            with built.micro_batch(last=True):
                with built.autocast():
                    loss = (built.module(x, torch.ones(32), x, None) - x).square().mean() * 0.1
                built.backward(loss / ranks.world_size)
            built.step(step)
        saved = {f"{key}/{name}": m for key, pieces in built.moments().items() for name, m in pieces.items()}
        whole = {n: built.whole({n.partition("/")[2]: m}, n.partition("/")[2], to=0) for n, m in saved.items()}
        if ranks.is_rank_zero:
            save_file({n: m for n, m in whole.items() if m is not None} | built.scalars(), self.target)


def half_steps(place: Path, name: str, world: int = 1, good: int = 0, **settings: Any) -> dict[str, torch.Tensor]:
    (place / name).mkdir()
    target = place / name / "saved.safetensors"
    on_ranks(world, place / name, HalfSteps(config(name, precision="fp16", **settings), target, good))
    return load_file(target)


@pytest.mark.parametrize(
    ("name", "clip"),
    [
        ("zero0", None),
        ("zero0", 1e-3),
        pytest.param("zero1", 1e-3, marks=pytest.mark.slow),
        pytest.param("zero2", 1e-3, marks=pytest.mark.slow),
        pytest.param("zero3", 1e-3, marks=pytest.mark.slow),
    ],
)
def test_fp16_gradients_are_scaled_and_unscaled_at_every_stage(name: str, clip: float | None, tmp_path: Path) -> None:
    """A constant factor has no effect on the updates of Adam, but it has on the moments."""
    expected, found = half_steps(tmp_path, "torch", grad_clip=clip), half_steps(tmp_path, name, grad_clip=clip)
    assert set(expected) == set(found)
    assert torch.equal(expected["scaler"], found["scaler"])
    for moment in ("exp_avg/", "exp_avg_sq/"):
        a, b = (
            torch.cat([m.flatten() for n, m in sorted(saved.items()) if n.startswith(moment)])
            for saved in (expected, found)
        )
        assert float((a - b).norm() / a.norm()) < 0.02, moment


@pytest.mark.parametrize("name", ["zero0", pytest.param("zero2", marks=pytest.mark.slow)])
def test_the_loss_scale_grows_in_torch_after_many_good_steps_in_deepspeed(name: str, tmp_path: Path) -> None:
    """DeepSpeed does not reset its count of good steps; PyTorch raises the scale when its count equals 2000."""
    scale, good = half_steps(tmp_path, name, good=4500)["scaler"].tolist()
    assert (scale, good) == (1024, 503)


class OnAGPU(DistributedDataParallel):
    """DDP as on a GPU, where it has device IDs and moves inputs to the device; run on a CPU here."""

    def __init__(self, module: torch.nn.Module, device_ids: list[int] | None = None, **settings: Any):
        super().__init__(module, **settings)
        self.device_ids = device_ids


class Stays(torch.nn.Linear):
    """A network that ignores `to`."""

    def to(self, *arguments: Any, **settings: Any) -> Stays:
        return self


class StartsOnAGPU:
    def __call__(self, ranks: Ranks) -> None:
        ddp.DistributedDataParallel = OnAGPU
        there = Ranks(ranks.rank, ranks.world_size, torch.device("cuda", 0))
        built = TorchEngine(EngineContext(Stays(3, 2), config(), there, 8))
        built.backward_and_step(built.module(torch.ones(4, 3)).square().mean(), 0)
        assert all(bool(moment.any()) for moment in built.moments()["exp_avg"].values())


def test_several_ranks_start_where_ddp_knows_their_gpu(tmp_path: Path) -> None:
    on_ranks(2, tmp_path, StartsOnAGPU())


def test_bf16_keeps_unrounded_master_weights(tmp_path: Path) -> None:
    """EMA and master weights start at the float32 initial weights, not at DeepSpeed's copies of bf16 weights."""
    run = train(tmp_path / "run", "zero1", 2, precision="bf16", learning_rate=1e-12)
    chosen = config()
    initial = dict(networks.for_run(chosen, SHAPE).named_parameters())
    for kind in ("model", "ema-0.9"):
        saved = Saved(run / "checkpoints" / "step-00000008", kind)
        assert max(float((saved[n] - p.detach()).abs().max()) for n, p in initial.items()) < 1e-9


@pytest.mark.slow
def test_a_sharded_run_starts_from_an_ema_of_another_engine(reference: Path, tmp_path: Path) -> None:
    run = train(tmp_path / "run", "zero1", 2, precision="bf16", learning_rate=1e-12, init_from=str(reference))
    begun = Saved(reference / "checkpoints" / "step-00000008", "ema-0.9")
    for kind in ("model", "ema-0.9"):
        saved = Saved(run / "checkpoints" / "step-00000008", kind)
        assert max(float((saved[n] - begun[n]).abs().max()) for n in begun) < 1e-9


def test_parameters_are_assigned_to_ranks_evenly_and_completely() -> None:
    shapes = {str(i): torch.Size([i % 7 + 1, 10]) for i in range(100)}
    owners = share_out(shapes, 8)
    assert set(owners) == set(shapes)
    loads = [sum(shapes[n].numel() for n, o in owners.items() if o == rank) for rank in range(8)]
    assert max(loads) - min(loads) <= 70


AUTO = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "Adam", "params": {"lr": "auto", "betas": "auto"}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
}


def with_file(file: dict[str, Any], **engine_settings: Any) -> RunConfig:
    tree = config("zero2").model_dump(mode="json")
    tree["engine"] = {"name": "deepspeed", "zero": None, "deepspeed": file, **engine_settings}
    return resolve(tree)


def test_auto_values_are_filled_in_and_other_settings_kept() -> None:
    settings = deepspeed_config.resolve(with_file(AUTO), 2)
    assert settings["train_batch_size"] == 64 and settings["train_micro_batch_size_per_gpu"] == 32
    assert settings["gradient_clipping"] == 1.0 and settings["bf16"] == {"enabled": False}
    assert settings["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert "auto" not in json.dumps(settings)


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ({"train_batch_size": 32}, ["train_batch_size", "32", "64", "train.batch_size"]),
        ({"bf16": {"enabled": True}}, ["bf16.enabled", "train.precision"]),
        ({"optimizer": {"type": "Lamb"}}, ["optimizer.type", "Lamb"]),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1.0}}}, ["optimizer.params.lr", "train.learning_rate"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler", "train.warmup_steps"]),
        ({"gradient_clipping": 3.0, "elasticity": {"enabled": True}}, ["gradient_clipping", "elasticity"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage", "4"]),
        ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, ["nvme"]),
    ],
)
def test_the_error_names_the_keys_of_a_contradicting_file(
    file: dict[str, Any], expected: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        udddm.train(with_file(file), run_dir=tmp_path / "run", device="cpu", workers=2)
    assert all(word in str(caught.value) for word in expected), caught.value
    assert not (tmp_path / "run").exists()


def test_the_stage_of_the_file_and_of_the_command_must_agree() -> None:
    with pytest.raises(ConfigError, match=r"zero_optimization.stage is 2 .* and 3"):
        deepspeed_config.resolve(with_file(AUTO, zero=3), 2)


def test_settings_of_deepspeed_need_deepspeed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"engine\.name=deepspeed"):
        udddm.train({"engine": {"zero": 2}}, run_dir=tmp_path / "run", device="cpu")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="offload needs ZeRO"):
        resolve({"engine": {"name": "deepspeed", "zero": 0, "offload": True}})


def test_accumulation_must_divide_the_samples_of_a_rank(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.grad_accumulation"):
        udddm.train(config(grad_accumulation=3), run_dir=tmp_path / "run", device="cpu")
