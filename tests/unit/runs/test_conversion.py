"""Weights of other projects' files give the outputs of the networks that wrote them, or are refused by name.

The files are written by diffusers itself, and by `edm_snapshot.py` in a separate process.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import udddm
from udddm import networks
from udddm.config import RunConfig, resolve
from udddm.diffusion import schedule
from udddm.diffusion.denoise import denoise
from udddm.diffusion.schedule import Coefficients
from udddm.errors import CheckpointError, ConfigError
from udddm.runs.conversion import convert
from udddm.runs.model import load_model

SHAPE = (3, 8, 8)
WRITER = Path(__file__).with_name("edm_snapshot.py")
CLASSES = 4
EDM = {
    "network": {
        "name": "ddpmpp",
        "base_channels": 32,
        "channel_mult": [1, 2],
        "blocks_per_level": 1,
        "attention_resolutions": [4],
        "max_frequency": 1.0,
        "classes": CLASSES,
        "condition": "none",
    },
    "schedule": {"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5},
}
VP = {"kind": "vp", "beta_min": 1e-4, "beta_max": 0.02, "preconditioning": "epsilon"}


def changed(tree: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return resolve({name: {**tree.get(name, {}), **sections.get(name, {})} for name in {*tree, *sections}})


def estimate(network: torch.nn.Module, config: RunConfig, times: Any, x: torch.Tensor, labels: Any) -> torch.Tensor:
    """f of the images x [B, C, H, W] at `times` [B]."""
    at = Coefficients(*torch.from_numpy(schedule.build(config.schedule).coefficients(np.asarray(times, np.float64))))
    with torch.no_grad():
        return denoise(network, x, at, None, labels)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance of an image from the expected one, relative to the norm of that."""
    return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


def loaded(where: Path, config: RunConfig, shape: tuple[int, int, int] = SHAPE) -> torch.nn.Module:
    network = networks.for_run(config, shape).eval()
    weights = convert(where, config, shape)
    assert weights is not None
    weights.check_network({name: p.shape for name, p in network.named_parameters()})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name])
    return network


# EDM's snapshots.


VARIANTS = {
    "adaptive": [["model.enc.4x4_block0", "adaptive_scale", True]],
    "heads": [["model.enc.4x4_block0", "adaptive_scale", False], ["model.enc.4x4_block0", "num_heads", 2]],
}


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("edm")
    options = {"classes": CLASSES, "channels": [32, [1, 2]], "blocks": 1, "variants": VARIANTS}
    subprocess.run([sys.executable, str(WRITER), str(folder), json.dumps(options)], check=True)
    return folder / "snapshot.pkl"


def test_the_estimate_of_an_edm_snapshot_is_its_denoiser(snapshot: Path) -> None:
    """f = D(x; sigma) to rounding, from sigma 0.002 to 80, for every label and for none."""
    config = changed(EDM)
    network = loaded(snapshot, config)
    found = {name: torch.from_numpy(values) for name, values in np.load(snapshot.with_name("outputs.npz")).items()}
    times = schedule.build(config.schedule).time(found["sigma"].double().numpy())
    f = estimate(network, config, times, found["x"], found["labels"])
    torch.testing.assert_close(f, found["denoised"], rtol=0, atol=1e-5)
    other = estimate(network, config, times, found["x"], (found["labels"] + 1) % (CLASSES + 1))
    assert ((other - f).abs().amax((1, 2, 3)) > 2e-5).all()


def test_a_run_starts_from_an_edm_snapshot(snapshot: Path, tmp_path: Path) -> None:
    """Weights and average are the snapshot's. Nothing in the file is executed: its source code would abort."""
    tree: dict[str, Any] = EDM | {
        "objective": {"name": "ect"},
        "train": {"steps": 1, "batch_size": 8, "learning_rate": 1e-12, "ema": [0.9], "init_from": str(snapshot)},
        "order": {"lanes": 1},
    }
    images = [(np.zeros(SHAPE, np.float32), label % CLASSES) for label in range(8)]
    udddm.train(resolve(tree), images, run_dir=tmp_path, device="cpu")
    expected = dict(loaded(snapshot, changed(EDM)).named_parameters())
    for ema in (None, "none"):
        for name, parameter in load_model(tmp_path, ema=ema).network.named_parameters():
            torch.testing.assert_close(parameter, expected[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("network", {"max_frequency": None}, r"needs network\.max_frequency=1\.0; network\.max_frequency is None"),
        ("network", {"classes": 10}, r"needs network\.classes=4; network\.classes is 10"),
        ("network", {"base_channels": 64}, r"needs network\.base_channels=32"),
        ("network", {"channel_mult": [2, 2]}, r"needs network\.channel_mult=1,2; network\.channel_mult is 2,2"),
        ("network", {"blocks_per_level": 2}, r"needs network\.blocks_per_level=1"),
        ("network", {"attention_resolutions": [8]}, r"needs network\.attention_resolutions=4;"),
        ("network", {"settings": {"rescale": False}}, r"needs network\.settings\.rescale=True"),
        ("network", {"condition": "channels"}, r"needs network\.condition=none"),
        ("schedule", {"sigma_data": 0.7}, r"needs schedule\.sigma_data=0\.5"),
        ("schedule", {"preconditioning": "paper"}, r"needs schedule\.preconditioning=edm"),
    ],
)
def test_settings_on_which_the_estimate_depends_must_agree(
    section: str, change: dict[str, Any], message: str, snapshot: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        convert(snapshot, changed(EDM, **{section: change}), SHAPE)


def test_images_of_another_size_and_other_networks_are_named(snapshot: Path) -> None:
    with pytest.raises(ConfigError, match="needs the shape of an image=3,8,8; the shape of an image is 1,8,8"):
        convert(snapshot, changed(EDM), (1, 8, 8))
    with pytest.raises(ConfigError, match=r"needs network\.name=ddpmpp.*network\.name is unet"):
        convert(snapshot, resolve({"network": {"condition": "none"}}), SHAPE)


def test_other_networks_of_edm_are_refused(snapshot: Path, tmp_path: Path) -> None:
    refused = {
        b"EDMPrecond": (b"VPPrecond_", "holds VPPrecond_, whose preconditioning is not EDM's"),
        b"SongUNet": (b"OtherNet", "its model is OtherNet, not SongUNet"),
        b"PositionalEmbedding": (b"FourierEmbedding___", "is NCSN"),
    }
    for name, (other, message) in refused.items():
        data = snapshot.read_bytes()
        assert data.count(name) == 1
        (tmp_path / "other.pkl").write_bytes(data.replace(name, other))
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "other.pkl", changed(EDM), SHAPE)
    with pytest.raises(CheckpointError, match="another network than DDPM"):
        convert(snapshot.with_name("adaptive.pkl"), changed(EDM), SHAPE)
    with pytest.raises(CheckpointError, match="its part 4x4_block0 has several heads"):
        convert(snapshot.with_name("heads.pkl"), changed(EDM), SHAPE)


def test_a_snapshot_with_weights_that_are_not_finite_is_refused(snapshot: Path, tmp_path: Path) -> None:
    data = bytearray(snapshot.read_bytes())
    network = loaded(snapshot, changed(EDM))
    needle = network.conv_out.weight.detach().numpy().tobytes()[:16]
    at = data.index(needle)
    data[at : at + 4] = np.float32(np.nan).tobytes()
    path = tmp_path / "nan.pkl"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"the weights of conv_out\.weight are not all finite"):
        loaded(path, changed(EDM))


def test_a_url_of_a_snapshot_says_to_download_it() -> None:
    with pytest.raises(CheckpointError, match="download the file first"):
        convert("https://example.org/edm-cifar10-32x32-cond-vp.pkl", changed(EDM), SHAPE)


# diffusers.


@pytest.fixture(scope="module")
def diffusers() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        yield pytest.importorskip("diffusers")


def randomize(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        scale = 0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, std=scale, generator=generator)


def original_samples(diffusers: Any, outputs: torch.Tensor, steps: list[int], x: torch.Tensor) -> torch.Tensor:
    """The estimates of x_0 of diffusers' DDPM scheduler."""
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, clip_sample=False)
    rows = zip(outputs, steps, x, strict=True)
    return torch.stack([scheduler.step(out, step, xt).pred_original_sample for out, step, xt in rows])


DIT = {
    "network": {
        "name": "dit",
        "settings": {"width": 48, "depth": 3, "heads": 4, "patch": 2},
        "classes": CLASSES,
        "condition": "none",
    },
    "schedule": VP,
}


@pytest.fixture(scope="module")
def dit(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=12, in_channels=3, out_channels=6, num_layers=3, sample_size=8,
        patch_size=2, num_embeds_ada_norm=CLASSES,
    ).eval()  # fmt: skip
    randomize(model)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    folder = tmp_path_factory.mktemp("dit") / "transformer"
    model.save_pretrained(folder)
    return model, folder


STEPS = [0, 1, 250, 999, 500]


def test_a_dit_of_diffusers_has_the_same_output_and_estimate(diffusers: Any, dit: tuple[Any, Path]) -> None:
    model, folder = dit
    config = changed(DIT)
    network = loaded(folder, config)
    x, labels = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 4])
    with torch.no_grad():
        expected = model(x, torch.tensor(STEPS), labels).sample[:, :3]
        found = network(x, torch.tensor(STEPS, dtype=torch.float32), None, labels)
    assert expected.std() > 0.2
    # At step 999, float32 rounds the arguments of the sinusoids to about 1e-4.
    assert apart(found, expected) < 1e-5
    f = estimate(network, config, np.array(STEPS) + 1, x, labels)
    assert apart(f, original_samples(diffusers, expected, STEPS, x)) < 1e-4


UNET = {
    "network": {
        "name": "ddpmpp",
        "settings": {"resampling": "convolution", "rescale": False, "decoder_attention": "all"},
        "base_channels": 128,
        "channel_mult": [1, 2, 1],
        "blocks_per_level": 1,
        "attention_resolutions": [4],
        "condition": "none",
    },
    "schedule": VP,
}
DDPM: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (128, 256, 128),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "center_input_sample": False,
}
"""The settings of google/ddpm-cifar10-32, smaller."""


@pytest.fixture(scope="module")
def unet(diffusers: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = diffusers.UNet2DModel(**DDPM).eval()
    randomize(model)
    folder = tmp_path_factory.mktemp("unet") / "unet"
    model.save_pretrained(folder)
    return model, folder


@pytest.mark.parametrize("old_names", [False, True])
def test_a_ddpm_of_diffusers_has_the_same_output_and_estimate(
    diffusers: Any, unet: tuple[Any, Path], old_names: bool, tmp_path: Path
) -> None:
    model, folder = unet
    if old_names:  # as in google/ddpm-cifar10-32
        kept = folder / "diffusion_pytorch_model.safetensors"
        (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        tensors = load_file(kept)
        for new, old in names.items():
            tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
        save_file(tensors, tmp_path / kept.name)
        folder = tmp_path
    config = changed(UNET)
    network = loaded(folder, config)
    x = torch.randn(5, *SHAPE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(x, torch.tensor(STEPS)).sample
        found = network(x, torch.tensor(STEPS, dtype=torch.float32), None, None)
    assert expected.std() > 0.2
    assert apart(found, expected) < 1e-5
    f = estimate(network, config, np.array(STEPS) + 1, x, None)
    assert apart(f, original_samples(diffusers, expected, STEPS, x)) < 1e-4


def edited(folder: Path, target: Path, **changes: Any) -> Path:
    """A copy of a model folder with another config.json."""
    target.mkdir()
    described = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(described))
    name = "diffusion_pytorch_model.safetensors"
    (target / name).hardlink_to(folder / name)
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet2DConditionModel"}, "holds diffusers' UNet2DConditionModel, which no network"),
        ({"_class_name": ["x"]}, "which no network"),
        ({"downsample_padding": 1}, "its downsample_padding is 1, not 0"),
        ({"attention_head_dim": 8}, "its attention_head_dim is 8; DDPM has one head"),
        ({"norm_num_groups": 16}, "its norm_num_groups is 16, not 32"),
        ({"block_out_channels": [128, 256, 100]}, r"its widths are \(128, 256, 100\)"),
        ({"down_block_types": ["DownBlock2D", "SkipDownBlock2D", "DownBlock2D"]}, "its blocks are .*SkipDownBlock2D"),
        ({"sample_size": -1}, "its sample_size is not a whole number above 0"),
        ({"block_out_channels": "wide"}, "its block_out_channels is not a list"),
    ],
)
def test_an_architecture_that_cannot_be_expressed_is_named(
    unet: tuple[Any, Path], change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert(edited(unet[1], tmp_path / "model", **change), changed(UNET), SHAPE)


def test_settings_of_diffusers_models_must_agree(dit: tuple[Any, Path], unet: tuple[Any, Path]) -> None:
    with pytest.raises(ConfigError, match=r"needs .*network\.settings\.heads=4.*network\.settings\.heads is 6"):
        convert(dit[1], changed(DIT, network={"settings": {"width": 48, "depth": 3, "heads": 6}}), SHAPE)
    with pytest.raises(ConfigError, match=r"needs schedule\.kind=vp schedule\.preconditioning=epsilon"):
        convert(dit[1], changed(DIT | {"schedule": {}}), SHAPE)
    with pytest.raises(
        ConfigError, match=r"needs network\.settings\.rescale=False; network\.settings\.rescale is True"
    ):
        convert(unet[1], changed(UNET, network={"settings": UNET["network"]["settings"] | {"rescale": True}}), SHAPE)


def test_blocks_of_a_dit_with_different_embeddings_are_refused(dit: tuple[Any, Path], tmp_path: Path) -> None:
    name = "diffusion_pytorch_model.safetensors"
    tensors = load_file(dit[1] / name)
    tensors["transformer_blocks.2.norm1.emb.timestep_embedder.linear_2.bias"] += 1
    (tmp_path / "config.json").write_bytes((dit[1] / "config.json").read_bytes())
    save_file(tensors, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"block 2 has another timestep_embedder\.linear_2 than block 0"):
        convert(tmp_path, changed(DIT), SHAPE)
    del tensors["proj_out_2.weight"]
    save_file(tensors, tmp_path / name)
    with pytest.raises(CheckpointError):
        convert(tmp_path, changed(DIT), SHAPE)


def test_folders_without_weights_say_what_to_do(dit: tuple[Any, Path], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    with pytest.raises(
        CheckpointError, match=r"is a pipeline of diffusers; name the folder of its network, .*/transformer"
    ):
        convert(tmp_path, changed(DIT), SHAPE)
    (tmp_path / "transformer" / "config.json").write_bytes((dit[1] / "config.json").read_bytes())
    (tmp_path / "transformer" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"holds a pickle, .*which is not read; save the model with safe_"):
        convert(tmp_path / "transformer", changed(DIT), SHAPE)


def test_a_run_is_not_taken_for_another_project_s_file(tmp_path: Path) -> None:
    assert convert(tmp_path, changed(DIT), SHAPE) is None
    assert convert(tmp_path / "nowhere", changed(DIT), SHAPE) is None
    assert convert("s3://bucket/run", changed(DIT), SHAPE) is None
