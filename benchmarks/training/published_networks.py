"""`dit` and `ddpmpp` beside independent implementations: parameters, and the distance of outputs at equal weights.

    git clone https://github.com/NVlabs/edm
    python benchmarks/training/published_networks.py --edm edm --json benchmarks/results/published-networks.json

diffusers' models are saved with random weights and read by `train.init_from`'s reader. Its DDPM++ is assembled from its
residual blocks and attention, because `UNet2DModel` cannot be configured as one. With --edm, a checkout of EDM's code
writes a network snapshot in a separate process, which is read here without executing anything in it. The distance of an
image is the norm of the difference over the norm of the expected output; the largest of several images is reported.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from udddm import load_config, networks
from udddm.config import NetworkConfig, RunConfig, resolve
from udddm.diffusion import schedule
from udddm.diffusion.denoise import denoise
from udddm.diffusion.schedule import Coefficients
from udddm.networks import NetworkContext, assemble, outline
from udddm.runs.conversion import convert

sys.path.insert(0, str(Path(__file__).parents[1]))
from report import about, heading, write_report

Shape = tuple[int, int, int]
LATENTS: Shape = (4, 32, 32)
CIFAR: Shape = (3, 32, 32)
VP = {"kind": "vp", "beta_min": 1e-4, "beta_max": 0.02, "preconditioning": "epsilon"}
DDPM = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "attention_head_dim": None,
    "center_input_sample": False,
}
"""The configuration of google/ddpm-cifar10-32."""
STEPS = (0, 10, 250, 500, 999)
SIGMAS = (0.002, 0.1, 1.0, 10.0, 80.0)
WRITER = """
import pickle, sys, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
import numpy as np, torch
from training.augment import AugmentPipe
from training.loss import EDMLoss
from training.networks import EDMPrecond
torch.manual_seed(0)
ema = EDMPrecond(
    img_resolution=32, img_channels=3, label_dim=10, model_type="SongUNet", embedding_type="positional",
    encoder_type="standard", decoder_type="standard", channel_mult_noise=1, resample_filter=[1, 1], model_channels=128,
    channel_mult=[2, 2, 2], augment_dim=9, dropout=0.13,
).eval().requires_grad_(False)
for p in ema.parameters():
    p.copy_(torch.randn_like(p) * (p[0].numel() ** -0.5 if p.dim() > 1 else 0.5))
given = np.load(sys.argv[2])
one_hot = torch.eye(11)[torch.from_numpy(given["labels"])][:, :10]
out = ema(torch.from_numpy(given["x"]), torch.from_numpy(given["sigma"]), one_hot)
np.savez(sys.argv[3], out=out.numpy(), parameters=sum(p.numel() for p in ema.parameters()))
pipe = AugmentPipe(p=0.12, xflip=1e8, yflip=1, scale=1, rotate_frac=1, aniso=1, translate_frac=1)
with open(sys.argv[4], "wb") as file:
    pickle.dump(dict(ema=ema, loss_fn=EDMLoss(), augment_pipe=pipe, dataset_kwargs=dict(path="data.zip")), file)
"""
"""Writes what EDM's `training/training_loop.py` writes, with EDM's code."""


class DiffusersDDPMpp(nn.Module):
    """DDPM++ of diffusers' residual blocks and attention, in the order that Karras et al. 2022 describe.

    Takes images [B, channels, H, W], noise levels [B] and labels [B], of which `classes` means none. Attention is in
    the second stage and the middle.
    """

    def __init__(self, channels: int, width: int, multipliers: tuple[int, ...], blocks: int, classes: int):
        super().__init__()
        self.classes, self.pairs = classes, width // 2
        self.mlp = nn.ModuleList([nn.Linear(width, 4 * width), nn.Linear(4 * width, 4 * width)])
        self.label = nn.Linear(classes, width) if classes else None
        self.stem = nn.Conv2d(channels, width, 3, padding=1)
        self.down, self.up, self.middle = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        skips, now, last = [width], width, len(multipliers) - 1
        for stage, multiplier in enumerate(multipliers):
            for index in range(blocks + bool(stage)):
                down = bool(stage) and not index
                out = now if down else width * multiplier
                self.down.append(self._block(now, out, attends=stage == 1 and not down, down=down))
                now = out
                skips.append(now)
        self.middle.extend([self._block(now, now, attends=True), self._block(now, now)])
        for stage in range(last, -1, -1):
            if stage < last:
                self.up.append(self._block(now, now, up=True))
            for index in range(blocks + 1):
                out = width * multipliers[stage]
                self.up.append(self._block(now + skips.pop(), out, attends=stage == 1 and index == blocks))
                now = out
        self.norm, self.out = nn.GroupNorm(32, now, eps=1e-6), nn.Conv2d(now, channels, 3, padding=1)

    def _block(
        self, into: int, out: int, *, attends: bool = False, down: bool = False, up: bool = False
    ) -> nn.ModuleList:
        from diffusers.models.attention_processor import Attention, AttnProcessor
        from diffusers.models.resnet import ResnetBlock2D

        residual = ResnetBlock2D(
            in_channels=into, out_channels=out, temb_channels=4 * self.stem.out_channels, groups=32, eps=1e-6,
            skip_time_act=True, output_scale_factor=math.sqrt(2), use_in_shortcut=into != out or down or up,
            down=down, up=up,
        )  # fmt: skip
        if not attends:
            return nn.ModuleList([residual])
        attention = Attention(
            out, heads=1, dim_head=out, rescale_output_factor=math.sqrt(2), eps=1e-6, norm_num_groups=32,
            residual_connection=True, bias=True, processor=AttnProcessor(),
        )  # fmt: skip
        return nn.ModuleList([residual, attention])

    def forward(self, x: torch.Tensor, level: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        from diffusers.models.embeddings import get_timestep_embedding

        embedding = get_timestep_embedding(level, 2 * self.pairs, downscale_freq_shift=1)
        if self.label is not None:
            one_hot = F.one_hot(labels, self.classes + 1)[:, : self.classes].float()
            embedding = embedding + self.label(one_hot * math.sqrt(self.classes))
        for linear in self.mlp:
            embedding = F.silu(linear(embedding))
        x = self.stem(x)
        skips = [x]

        def run(parts: Any, x: torch.Tensor) -> torch.Tensor:
            for number, part in enumerate(parts):
                x = part(x) if number else part(x, embedding)
            return x

        for parts in self.down:
            x = run(parts, x)
            skips.append(x)
        for parts in self.middle:
            x = run(parts, x)
        for parts in self.up:
            x = run(parts, x if parts[0].up else torch.cat([x, skips.pop()], 1))  # type: ignore[index]
        found: torch.Tensor = self.out(F.silu(self.norm(x)))
        return found

    def weights(self) -> Iterator[torch.Tensor]:
        """Weights and biases in the order of `DDPMpp.parameters()`, with those of query, key and value as one."""
        parts: Any = (*self.down, *self.middle, *self.up)
        layers: list[Any] = [*([] if self.label is None else [self.label]), *self.mlp, self.stem]
        for residual, *attention in parts:
            layers += [residual.norm1, residual.conv1, residual.time_emb_proj, residual.norm2, residual.conv2]
            layers += [] if residual.conv_shortcut is None else [residual.conv_shortcut]
            for each in attention:
                layers += [each.group_norm, (each.to_q, each.to_k, each.to_v), each.to_out[0]]
        for layer in (*layers, self.norm, self.out):
            for kind in ("weight", "bias"):
                joint = layer if isinstance(layer, tuple) else (layer,)
                yield torch.cat([getattr(each, kind).detach() for each in joint])


def randomize(network: nn.Module) -> None:
    """Weights with which every part matters, and the output has about unit variance."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        scale = 0.5 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=scale, generator=generator)


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest distance of an image [B, ...] from the expected one, relative to the norm of that."""
    return float(((found - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)).max())


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def images(shape: Shape, count: int = len(STEPS)) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def ddpmpp_distance(config: NetworkConfig, shape: Shape) -> float:
    """The distance of `ddpmpp`, with attention in its second stage, from `DiffusersDDPMpp` at the same weights."""
    theirs = DiffusersDDPMpp(
        shape[0], config.base_channels, config.channel_mult, config.blocks_per_level, config.classes
    ).eval()
    randomize(theirs)
    ours = assemble(NetworkContext(config, shape, max_frequency=1.0)).eval()
    for parameter, weights in zip(ours.parameters(), theirs.weights(), strict=True):
        parameter.copy_(weights)
    x, level = images(shape), torch.tensor(SIGMAS).log() / 4
    labels = torch.arange(len(x)) % (config.classes + 1)
    return apart(ours(x, level, None, labels if config.classes else None), theirs(x, level, labels))


def loaded(where: Path, config: RunConfig, shape: Shape) -> nn.Module:
    """The network of `config` with the weights of another project's file."""
    network = networks.for_run(config, shape).eval()
    weights = convert(where, config, shape)
    assert weights is not None
    weights.check_network({name: parameter.shape for name, parameter in network.named_parameters()})
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.copy_(weights[name])
    return network


@torch.no_grad()
def diffusers_distance(model: Any, config: RunConfig, shape: Shape, directory: Path) -> float:
    """The distance of the network of `config` from a model of diffusers that it was read from."""
    model.save_pretrained(directory)
    ours = loaded(directory, config, shape)
    x, steps, labels = images(shape), torch.tensor(STEPS), torch.arange(len(STEPS)) % (config.network.classes + 1)
    given = (x, steps, labels) if config.network.classes else (x, steps)
    return apart(ours(x, steps.float(), None, labels), model(*given).sample[:, : shape[0]])


def dit(directory: Path) -> tuple[float, int]:
    """The distance of DiT-S/2 from diffusers' and the parameters that diffusers' has once."""
    import diffusers

    model = diffusers.DiTTransformer2DModel(6, 64, 4, 8, 12, sample_size=32).eval()
    randomize(model)
    first, *others = (block.norm1.emb for block in model.transformer_blocks)
    for other in others:  # DiT has one embedding of noise level and label, of which diffusers has a copy per block
        other.load_state_dict(first.state_dict())
    network = {"name": "dit", "settings": {"size": "S"}, "classes": 1000, "condition": "none"}
    config = resolve({"network": network, "schedule": VP})
    once = parameters(model) - len(others) * parameters(first)
    return diffusers_distance(model, config, LATENTS, directory), once


def ddpm(directory: Path) -> tuple[float, int]:
    """The distance of `ddpmpp` as a DDPM from diffusers', and its number of parameters."""
    import diffusers

    model = diffusers.UNet2DModel(**DDPM).eval()
    randomize(model)
    network = {
        "name": "ddpmpp",
        "settings": {"resampling": "convolution", "rescale": False, "decoder_attention": "all"},
        "channel_mult": [1, 2, 2, 2],
        "blocks_per_level": 2,
        "attention_resolutions": [16],
        "condition": "none",
    }
    return diffusers_distance(model, resolve({"network": network, "schedule": VP}), CIFAR, directory), parameters(model)


def edm(checkout: Path, directory: Path) -> tuple[float, int]:
    """The distance of f from EDM's denoiser D(x; sigma), whose snapshot EDM's code writes, and its parameters."""
    config = load_config("cifar10-ddpmpp", ["network.classes=10"])
    x, sigma, labels = 3 * images(CIFAR), np.array(SIGMAS, np.float32), np.array([0, 3, 9, 10, 5])
    np.savez(directory / "given.npz", x=x.numpy(), sigma=sigma, labels=labels)
    places = [directory / name for name in ("given.npz", "out.npz", "snapshot.pkl")]
    subprocess.run([sys.executable, "-c", WRITER, str(checkout.resolve()), *map(str, places)], check=True)
    network, plan = loaded(places[2], config, CIFAR), schedule.build(config.schedule)
    at = Coefficients(*torch.from_numpy(plan.coefficients(plan.time(sigma.astype(np.float64)))))
    with torch.no_grad():
        f = denoise(network, x, at, None, torch.from_numpy(labels))
    expected = np.load(places[1])
    return apart(f, torch.from_numpy(expected["out"])), int(expected["parameters"])


def counted() -> dict[str, int]:
    """Parameters of the published configurations."""
    found = {}
    for size in ("S", "B", "L", "XL"):
        config = NetworkConfig(name="dit", settings={"size": size}, classes=1000, condition="none")
        found[f"DiT-{size}/2"] = parameters(outline(config, LATENTS))
    for classes in (0, 10):
        config = load_config("cifar10-ddpmpp").network.model_copy(update={"classes": classes})
        found[f"DDPM++, CIFAR-10, {classes} classes"] = parameters(outline(config, CIFAR))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--edm", type=Path, help="a checkout of github.com/NVlabs/edm")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")  # of diffusers' imports
    torch.set_num_threads(1)
    counts = counted()
    distances: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        config = load_config("cifar10-ddpmpp", ["network.classes=10"]).network
        distances["DDPM++, CIFAR-10, of diffusers' blocks"] = {"distance": ddpmpp_distance(config, CIFAR)}
        found = {
            "DiT-S/2, diffusers' DiTTransformer2DModel": dit(directory / "dit"),
            "DDPM, CIFAR-10, diffusers' UNet2DModel": ddpm(directory / "ddpm"),
        }
        if arguments.edm:
            found["DDPM++, CIFAR-10, EDM's snapshot: f and D(x; sigma)"] = edm(arguments.edm, directory)
        distances |= {key: {"distance": value, "their_parameters": count} for key, (value, count) in found.items()}
    head = about("diffusers")
    lines = [heading(head), "parameters"]
    lines += [f"{key:52} {count:12,}" for key, count in counts.items()]
    lines += [
        "",
        f"{'relative distance of outputs at equal weights':52} {'distance':>12} {'theirs has':>12} parameters",
    ]
    for key, row in distances.items():
        count = f"{int(row['their_parameters']):12,}" if "their_parameters" in row else ""
        lines.append(f"{key:52} {row['distance']:12.1e} {count}".rstrip())
    print("\n".join(lines))
    write_report(arguments.json, head, {"parameters": counts, "compared": distances}, lines)


if __name__ == "__main__":
    main()
