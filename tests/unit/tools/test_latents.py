"""`udddm data encode` and `decode`: latents are scaled by measured moments, train as a data set, and resume."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from udddm.cli.data import main as data_command
from udddm.cli.main import main
from udddm.config import DataConfig
from udddm.data import ImageDataset, load_dataset
from udddm.errors import ConfigError, DataError
from udddm.testing import image_sets
from udddm.testing.image_sets import LABELS
from udddm.testing.models import random_model, saved
from udddm.tools.dataset import latents, output

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 3, 8, 8), dtype=np.uint8)
IMAGES = torch.from_numpy(PIXELS).float() / 127.5 - 1


class Halves(nn.Module):
    """Latents of half the size in four channels of different scales; `decode` inverts them on smooth images."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 4], [1, -1, 0]])[:, :, None, None])
        self.register_buffer("offset", torch.tensor([1.5, -0.7, 0.5, 0.7]))

    @torch.jit.export
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        if bool(images.min() < -1) or bool(images.max() > 1):
            raise RuntimeError("images are passed in [-1, 1]")
        return nn.functional.conv2d(nn.functional.avg_pool2d(images, 2), self.weight, self.offset)

    @torch.jit.export
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        colors = (latents[:, :3] - self.offset[:3, None, None]) / torch.tensor([1.0, 2.0, 4.0])[:, None, None]
        return nn.functional.interpolate(colors, scale_factor=2.0)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decode(self.encode(images))


@pytest.fixture
def script(tmp_path: Path) -> Path:
    torch.jit.script(Halves()).save(str(tmp_path / "autoencoder.pt"))
    return tmp_path / "autoencoder.pt"


def command(*arguments: object) -> int:
    return data_command([*map(str, arguments), "--batch", "7", "--device", "cpu"])


pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")


def test_latents_are_centered_and_scaled_by_channel(
    tmp_path: Path, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = image_sets.zip_archive(str(tmp_path), PIXELS, LABELS), tmp_path / "latents.zarr"
    assert command("encode", source, target, "--autoencoder", script) == 0
    expected = Halves().encode(IMAGES)
    group = zarr.open_group(target, mode="r")
    mean, std = (np.array(group.attrs[name])[:, None, None] for name in ("mean", "std"))
    np.testing.assert_allclose(mean[:, 0, 0], expected.mean((0, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(std[:, 0, 0], expected.std((0, 2, 3)), rtol=1e-3)
    printed = capsys.readouterr().out
    assert f"mean of each channel: {mean[:, 0, 0].round(4).tolist()}" in printed and "sigma_data=0.125" in printed
    dataset = ImageDataset(load_dataset(DataConfig(name="array", path=str(target))))
    found, labels = dataset.batch(np.arange(40))
    np.testing.assert_allclose(found.std((0, 2, 3)), 0.125, rtol=1e-2)
    np.testing.assert_allclose(found.numpy() * group.attrs["deviations"] * std + mean, expected.numpy(), atol=1e-2)
    assert labels is not None and (labels == LABELS).all()


@pytest.mark.parametrize("target", ["images.zip", "images.zarr"])
def test_decoding_gives_the_images_back(tmp_path: Path, script: Path, target: str) -> None:
    smooth = PIXELS[:, :, ::2, ::2].repeat(2, axis=2).repeat(2, axis=3)
    source = image_sets.npz(str(tmp_path), smooth, LABELS)
    assert command("encode", source, tmp_path / "z.zarr", "--autoencoder", script) == 0
    assert command("decode", tmp_path / "z.zarr", tmp_path / target, "--autoencoder", script) == 0
    dataset = ImageDataset(
        load_dataset(DataConfig(name=target.split(".")[1].replace("zarr", "array"), path=str(tmp_path / target)))
    )
    images, labels = dataset.batch(np.arange(40))
    assert np.abs((images.numpy() + 1) * 127.5 - smooth).max() <= 2  # float16
    assert labels is not None and (labels == LABELS).all()


def test_samples_are_decoded_with_the_moments_of_the_data(tmp_path: Path, script: Path) -> None:
    source, group = image_sets.zip_archive(str(tmp_path), PIXELS, LABELS), tmp_path / "z.zarr"
    assert command("encode", source, group, "--autoencoder", script) == 0
    np.save(tmp_path / "samples.npy", zarr.open_group(group, mode="r")["images"][...])
    assert command("decode", group, tmp_path / "a", "--autoencoder", script) == 0
    assert command("decode", tmp_path / "samples.npy", tmp_path / "b", "--autoencoder", script, "--moments", group) == 0
    for file in (tmp_path / "b").rglob("*.png"):
        assert file.read_bytes() == (tmp_path / "a" / file.relative_to(tmp_path / "b")).read_bytes()
    with pytest.raises(DataError, match="lacks the attributes mean, std and deviations"):
        latents.decode(str(tmp_path / "samples.npy"), tmp_path / "c", latents.Decoding(script))


def test_a_model_of_latents_draws_images(tmp_path: Path, script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, group = image_sets.zip_archive(str(tmp_path), PIXELS, LABELS), tmp_path / "z.zarr"
    assert command("encode", source, group, "--autoencoder", script) == 0
    channels, *side = zarr.open_group(group, mode="r")["images"].shape[1:]
    network = "network={base_channels: 4, channel_mult: [1], blocks_per_level: 1, attention_resolutions: []}"
    model = saved(random_model(network, shape=(channels, *side)), tmp_path / "model")
    arguments = ["sample", str(model), "--count", "20", "--device", "cpu", "--batch", "20"]
    assert main([*arguments, "--out", str(tmp_path / "latents")]) == 0
    decoding = ["--autoencoder", str(script), "--moments", str(group)]
    assert main([*arguments, *decoding, "--save", "npy,png", "--out", str(tmp_path / "images")]) == 0
    drawn = np.load(tmp_path / "images" / "samples.npy")
    whole = latents.Decoder(str(group), script, "cpu")(torch.from_numpy(np.load(tmp_path / "latents" / "samples.npy")))
    np.testing.assert_allclose(drawn, whole.numpy(), atol=1e-5)
    assert len(list((tmp_path / "images").glob("*.png"))) == 20
    other = saved(random_model(network, shape=(channels + 1, *side)), tmp_path / "other")
    assert main(["sample", str(other), "--count", "1", "--device", "cpu", *decoding, "--out", str(tmp_path / "x")]) == 1
    assert f"this model has {channels + 1} channels" in capsys.readouterr().err


def test_a_command_that_fails_halfway_resumes_with_the_same_bytes(
    tmp_path: Path, script: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output, "PART", 16)
    source = image_sets.zip_archive(str(tmp_path), PIXELS, LABELS)
    assert command("encode", source, tmp_path / "a.zarr", "--autoencoder", script) == 0
    blocked = tmp_path / "b.zarr.partial" / "parts" / "00001.json"
    blocked.mkdir(parents=True)  # the second part cannot be recorded
    with pytest.raises(OSError):
        latents.encode(DataConfig(name="zip", path=source), tmp_path / "b.zarr", script, "cpu", 7, 10_000)
    blocked.rmdir()
    assert not (tmp_path / "b.zarr").exists()
    assert command("encode", source, tmp_path / "b.zarr", "--autoencoder", script) == 0
    names = [
        sorted(str(file.relative_to(root)) for file in root.rglob("*"))
        for root in (tmp_path / "a.zarr", tmp_path / "b.zarr")
    ]
    assert names[0] == names[1]
    for name in names[0]:
        if (tmp_path / "a.zarr" / name).is_file():
            assert (tmp_path / "a.zarr" / name).read_bytes() == (tmp_path / "b.zarr" / name).read_bytes(), name


@pytest.fixture(scope="module")
def kl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of an AutoencoderKL with random weights."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("kl")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    model = diffusers.AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)
    model.save_pretrained(place)
    return place


def test_an_autoencoder_of_diffusers_encodes_and_decodes(tmp_path: Path, kl: Path) -> None:
    """Every latent is a sample of the distribution of its image, the same for any batch size."""
    from diffusers import AutoencoderKL

    source = image_sets.zip_archive(str(tmp_path), PIXELS, LABELS)
    for batch in (5, 64):
        arguments = ["encode", source, str(tmp_path / f"{batch}.zarr"), "--autoencoder", str(kl), "--batch", str(batch)]
        assert data_command(arguments) == 0
    found = [zarr.open_group(tmp_path / f"{batch}.zarr", mode="r")["images"][...] for batch in (5, 64)]
    np.testing.assert_allclose(found[0], found[1], atol=2e-3)
    group = zarr.open_group(tmp_path / "64.zarr", mode="r")
    mean, std = (np.array(group.attrs[name])[:, None, None] for name in ("mean", "std"))
    z = found[1] * 8 * std + mean
    model = AutoencoderKL.from_pretrained(str(kl), use_safetensors=True, low_cpu_mem_usage=False)
    with torch.no_grad():
        distribution = model.encode(IMAGES).latent_dist
    standard = (z - distribution.mean.numpy()) / distribution.std.numpy()
    assert abs(standard.mean()) < 0.1 and abs(standard.std() - 1) < 0.1
    assert command("decode", tmp_path / "64.zarr", tmp_path / "decoded.zip", "--autoencoder", kl) == 0
    images, _ = ImageDataset(load_dataset(DataConfig(name="zip", path=str(tmp_path / "decoded.zip")))).batch(
        np.arange(40)
    )
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(z).float()).sample.clamp(-1, 1)
    assert (images - expected).abs().max() < 0.02


def test_pickled_weights_of_diffusers_are_refused(tmp_path: Path, kl: Path) -> None:
    """`diffusion_pytorch_model.bin` is a pickle, which could execute code."""
    (tmp_path / "kl").mkdir()
    (tmp_path / "kl" / "config.json").write_text((kl / "config.json").read_text())
    torch.save({}, tmp_path / "kl" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="is not a folder of diffusers' AutoencoderKL"):
        latents.open_autoencoder(tmp_path / "kl", "cpu")


def test_what_is_not_an_autoencoder_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist: give a TorchScript file"):
        latents.open_autoencoder(tmp_path / "x.pt", "cpu")
    (tmp_path / "x.pt").write_text("text")
    with pytest.raises(ConfigError, match=r"x\.pt is not a TorchScript file"):
        latents.open_autoencoder(tmp_path / "x.pt", "cpu")
    torch.jit.script(nn.Identity()).save(str(tmp_path / "y.pt"))
    with pytest.raises(ConfigError, match=r"y\.pt has no method encode and no method decode"):
        latents.open_autoencoder(tmp_path / "y.pt", "cpu")
    zarr.create_group(tmp_path / "z.zarr").create_array("images", data=np.zeros((3, 4, 2, 2), np.float32))
    with pytest.raises(DataError, match="lacks the attributes mean, std and deviations"):
        latents.decode(str(tmp_path / "z.zarr"), tmp_path / "o.zip", latents.Decoding(tmp_path / "y.pt"))
    (tmp_path / "kl").mkdir()
    (tmp_path / "kl" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    with pytest.raises(ConfigError, match="is not a folder of diffusers"):
        latents.open_autoencoder(tmp_path / "kl", "cpu")
