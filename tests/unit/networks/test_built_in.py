"""What every network of the package must do: `dit`, `ddpmpp`, and `ddpmpp` with the settings of DDPM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

import udddm
from udddm.config import NetworkConfig
from udddm.errors import ConfigError
from udddm.networks import build, outline
from udddm.networks.activations import bytes_per_image
from udddm.networks.cost import cost

Shape = tuple[int, int, int]
UNET = {"base_channels": 16, "channel_mult": (1, 2), "blocks_per_level": 1, "attention_resolutions": (4,)}
DDPM = {"resampling": "convolution", "rescale": False, "decoder_attention": "all"}
NETWORKS: dict[str, dict[str, Any]] = {
    "dit": {"name": "dit", "settings": {"width": 32, "depth": 2, "heads": 4}},
    "ddpmpp": {"name": "ddpmpp", **UNET},
    "ddpm": {"name": "ddpmpp", "settings": DDPM, **UNET},
}
EVERY = pytest.mark.parametrize("kind", list(NETWORKS))


def config(kind: str, **changes: Any) -> NetworkConfig:
    return NetworkConfig(**({"condition": "channels", "dropout": 0.0} | NETWORKS[kind] | changes))


def randomized(chosen: NetworkConfig, shape: Shape = (1, 8, 8), seed: int = 0) -> nn.Module:
    """A network all of whose weights matter to its output."""
    network = build(chosen, shape, max_frequency=16.0, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in network.parameters():
        scale = 1.0 if parameter.dim() < 2 else parameter[0].numel() ** -0.5
        nn.init.normal_(parameter, std=scale, generator=generator)
    return network


def inputs(shape: Shape = (1, 8, 8), batch: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *shape, generator=generator)
    level = torch.rand(batch, generator=generator) * 4 - 1
    return x, level, torch.randn(batch, *shape, generator=generator)


@EVERY
@pytest.mark.parametrize("condition", ["none", "channels"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 7, 10), (4, 1, 3)])
def test_output_has_the_shape_of_the_input_and_depends_on_every_pixel(kind: str, shape: Shape, condition: str) -> None:
    network = randomized(config(kind, condition=condition, attention_resolutions=UNET_DEFAULT), shape)
    x, level, image = inputs(shape)
    x.requires_grad_()
    image.requires_grad_()
    out = network(x, level, image)
    out.square().sum().backward()
    assert out.shape == x.shape and out.dtype == torch.float32 and out.isfinite().all()
    assert x.grad is not None and x.grad.abs().min() > 0
    if condition == "channels":
        assert image.grad is not None and image.grad.abs().min() > 0
    else:
        assert torch.equal(network(x, level), out)


UNET_DEFAULT = NetworkConfig.model_fields["attention_resolutions"].default


@EVERY
def test_every_parameter_gets_a_gradient(kind: str) -> None:
    network = randomized(config(kind, classes=3))
    x, level, image = inputs(batch=4)
    network(x, level, image, torch.tensor([0, 1, 2, 3])).square().sum().backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7] == []


@EVERY
def test_a_new_network_is_nearly_zero_and_trains(kind: str) -> None:
    network = build(config(kind), (1, 8, 8), max_frequency=16.0, seed=0)
    x, level, image = inputs(batch=4)
    assert network(x, level, image).abs().max() < 1e-4
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (network(x, level, image) - image).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@EVERY
def test_labels_matter_and_none_is_the_last_class(kind: str) -> None:
    network = randomized(config(kind, classes=3))
    x, level, image = (part[:1].expand(4, *part.shape[1:]) for part in inputs())
    out = network(x, level, image, torch.arange(4))
    assert min((out[i] - out[j]).abs().max() for i in range(4) for j in range(i)) > 1e-4
    torch.testing.assert_close(network(x, level, image)[0], out[3])
    plain = randomized(config(kind))
    assert torch.equal(plain(x, level, image), plain(x, level, image, torch.arange(4)))


@EVERY
def test_noise_levels_matter_one_by_one(kind: str) -> None:
    network = randomized(config(kind, classes=2))
    x, level, image = inputs(batch=3)
    labels = torch.tensor([0, 1, 2])
    together = network(x, level, image, labels)
    assert (network(x, level + 0.1, image, labels) - together).abs().max() > 1e-4
    alone = network(x[1:2], level[1:2], image[1:2], labels[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


@EVERY
def test_wrong_inputs_are_named(kind: str) -> None:
    network = randomized(config(kind))
    x, level, image = inputs()
    with pytest.raises(ValueError, match=r"takes a conditioning image .*, but none was given"):
        network(x, level)
    with pytest.raises(ValueError, match=r"x is \[2, 1, 8, 7\]"):
        network(x[..., :7], level, image)


@EVERY
def test_settings_of_another_network_are_refused(kind: str) -> None:
    with pytest.raises(
        ConfigError, match=r"network\.patch: network\.name=\w+ does not use it; .* write network\.patch=1"
    ):
        outline(config(kind, patch=2), (1, 8, 8))
    with pytest.raises(ConfigError, match=r"network\.condition=cross-attention: \w+ has no .* network\.condition=none"):
        outline(config(kind, condition="cross-attention"), (1, 8, 8))
    with pytest.raises(ConfigError, match=r"network\.settings\.hidden: unknown key"):
        outline(config(kind, settings={"hidden": 3}), (1, 8, 8))


def test_dit_names_every_key_that_it_does_not_use() -> None:
    with pytest.raises(ConfigError, match=r"base_channels, network\.channel_mult: .* network\.channel_mult=1,2,2,2"):
        outline(config("dit", base_channels=64, channel_mult=(1, 2)), (1, 8, 8))
    with pytest.raises(ConfigError, match=r"network\.settings\.?: .*heads \(5\) must divide width \(32\)"):
        outline(config("dit", settings={"width": 32, "heads": 5}), (1, 8, 8))


def test_dit_refuses_more_tokens_than_fit_before_it_allocates_their_positions() -> None:
    with pytest.raises(ConfigError, match=r"network\.settings\.patch=2 makes 1048576 tokens .* use larger patches"):
        build(config("dit"), (3, 2048, 2048), max_frequency=1.0, seed=0)


def test_ddpmpp_names_a_resolution_that_no_stage_has() -> None:
    with pytest.raises(ConfigError, match="no stage has side 3; images of 8x8 pixels give 2 stages with sides 8, 4"):
        outline(config("ddpmpp", attention_resolutions=(3,)), (1, 8, 8))


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_and_returns_float32(kind: str, dtype: torch.dtype) -> None:
    network = randomized(config(kind, classes=2))
    given = (*inputs(), torch.tensor([0, 2]))
    exact = network(*given)
    with torch.autocast("cpu", dtype):
        rounded = network(*given)
    rounded.sum().backward()
    cast = network.to(dtype)(*given)
    for found in (rounded, cast):
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.05 * exact.norm()


@EVERY
def test_channels_last_gives_the_same_output(kind: str) -> None:
    network = randomized(config(kind), (3, 8, 8))
    x, level, image = inputs((3, 8, 8))
    expected = network(x, level, image)
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    out = network(x.to(memory_format=torch.channels_last), level, image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@EVERY
def test_forward_is_one_graph(kind: str) -> None:
    network = randomized(config(kind, classes=2), (1, 7, 9))
    given = (*inputs((1, 7, 9)), torch.tensor([0, 2]))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*given), network(*given))


@EVERY
def test_dropout_is_a_function_of_the_generator(kind: str) -> None:
    """As consistency training needs: teacher and student drop the same units if the state of the generator is equal."""
    network = randomized(config(kind, dropout=0.5))
    given = inputs()
    assert torch.equal(network(*given), network(*given))
    network.train()

    def drawn(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        found: torch.Tensor = network(*given)
        return found

    assert torch.equal(drawn(1), drawn(1)) and not torch.equal(drawn(1), drawn(2))


@EVERY
def test_build_is_a_function_of_the_seed(kind: str) -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        network = build(config(kind, classes=2), (1, 8, 8), max_frequency=1.0, seed=seed)
        return [parameter.detach() for parameter in network.parameters()]

    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = weights(5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert all(torch.equal(a, b) for a, b in zip(first, weights(5), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(6), strict=True))


@EVERY
def test_counts_without_memory_are_those_of_the_network(kind: str) -> None:
    """Parameters, and the bytes that a backward pass needs: what `--dry-run` prints."""
    chosen, shape = config(kind, classes=2), (1, 8, 8)
    network = build(chosen, shape, max_frequency=16.0, seed=0)
    assert cost(chosen, shape).parameters == sum(p.numel() for p in network.parameters())
    assert {n: p.shape for n, p in outline(chosen, shape).named_parameters()} == {
        n: p.shape for n, p in network.named_parameters()
    }

    def kept(images: int) -> int:
        storages: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage
            return tensor

        x, level, image = inputs(batch=images)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            network(x, level, image, torch.zeros(images, dtype=torch.int64))
        return sum(storage.nbytes() for storage in storages.values())

    assert bytes_per_image(chosen, shape, "fp32") == pytest.approx((kept(8) - kept(4)) / 4, rel=0.01)


@EVERY
def test_a_run_trains_resumes_and_samples(kind: str, tmp_path: Path) -> None:
    """Through the commands' path: ECT, whose teacher shares the dropout, then a sample from the checkpoint."""
    section = {**NETWORKS[kind], "condition": "none", "classes": 10, "dropout": 0.1}
    settings: dict[str, Any] = {
        "network": section,
        "objective": {"name": "ect", "pretrain": 0.0},
        "train": {"steps": 4, "batch_size": 32, "ema": [0.9]},
        "checkpoint": {"every_steps": 2},
        "sample": {"every_steps": 0},
    }
    undisturbed = udddm.train(settings, run_dir=tmp_path / "a", device="cpu")
    again = tmp_path / "b"
    udddm.train(settings, run_dir=again, device="cpu")
    for name in ("result.json", "checkpoints/step-00000004/manifest.json"):
        (again / name).unlink()
    assert udddm.train(settings, run_dir=again, device="cpu")["weights_sha256"] == undisturbed["weights_sha256"]
    assert udddm.sample(again, seeds=range(3)).shape == (3, 1, 8, 8)
