"""The U-Net as a function: its shapes, the inputs that its output depends on, and its initial weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from udddm.config import NetworkConfig
from udddm.networks import build
from udddm.networks.blocks import NoiseEmbedding, divisor, group_norm
from udddm.networks.unet import UNet

Shape = tuple[int, int, int]

PAPER = NetworkConfig(
    base_channels=128,
    channel_mult=(1, 2, 2, 2),
    blocks_per_level=3,
    attention_resolutions=(16, 8),
    dropout=0.3,
    condition="cross-attention",
)


def small(**changes: Any) -> NetworkConfig:
    settings: dict[str, Any] = {
        "base_channels": 8,
        "channel_mult": (1, 2),
        "blocks_per_level": 1,
        "attention_resolutions": (4,),
        "dropout": 0.0,
    }
    return NetworkConfig(**(settings | changes))


def randomized(config: NetworkConfig, shape: Shape = (1, 8, 8), seed: int = 0) -> UNet:
    """A network whose zero-initialized layers are randomized, so that every part affects the output."""
    network = build(config, shape, max_frequency=16.0, seed=seed).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in network.parameters():
        if not parameter.detach().any():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    return network


def inputs(shape: Shape, batch: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, generator=generator)
    level = torch.rand(batch, generator=generator) * 4 - 1
    return x, level, torch.randn(batch, *shape, generator=generator)


@pytest.mark.parametrize("condition", ["none", "channels", "cross-attention"])
@pytest.mark.parametrize(
    ("shape", "channel_mult", "attention"),
    [
        ((1, 8, 8), (1, 2), (4,)),
        ((1, 28, 28), (1, 2, 2), (14, 7)),
        ((1, 28, 28), (1, 1, 2, 2), (8,)),
        ((3, 32, 32), (1, 2, 2), (16, 8)),
        ((4, 17, 23), (1, 2, 1), (10, 5)),
        ((2, 1, 1), (1, 1, 1), ()),
        ((1, 5, 3), (2,), (5,)),
    ],
)
def test_output_has_the_shape_of_the_input(
    shape: Shape, channel_mult: tuple[int, ...], attention: tuple[int, ...], condition: str
) -> None:
    network = randomized(small(channel_mult=channel_mult, attention_resolutions=attention, condition=condition), shape)
    x, level, image = inputs(shape)
    out = network(x, level, image)
    assert out.shape == x.shape
    assert out.dtype == torch.float32
    assert out.isfinite().all()
    assert out.abs().min() > 0


def test_every_parameter_gets_a_gradient() -> None:
    shape = (3, 10, 13)
    network = randomized(
        small(attention_resolutions=(10, 5), classes=3, blocks_per_level=2, channel_mult=(1, 2)), shape
    )
    x, level, image = inputs(shape, batch=4)
    network(x, level, image, torch.tensor([0, 1, 2, 3])).square().sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-7]
    assert without == []


def test_training_succeeds_from_zero_initialized_layers() -> None:
    """Zero-initialized layers block the gradients of other layers only in the first few steps."""
    network = build(small(), (1, 8, 8), max_frequency=16.0, seed=0)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    x, level, image = inputs((1, 8, 8), batch=4)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (network(x, level, image) - image).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("condition", ["none", "channels", "cross-attention"])
def test_initial_output_is_zero(condition: str) -> None:
    network = build(small(condition=condition), (1, 8, 8), max_frequency=16.0, seed=0)
    assert not network(*inputs((1, 8, 8))).any()


def test_blocks_start_as_the_identity() -> None:
    network = build(small(), (1, 8, 8), max_frequency=16.0, seed=0)
    x, embedding = torch.randn(2, 16, 4, 4), torch.randn(2, 32)
    assert torch.equal(network.middle_in(x, embedding, [None, torch.randn(2, 16, 16)]), x)


def test_padding_is_cropped_where_it_was_added() -> None:
    shape = (2, 5, 10)
    network = build(small(channel_mult=(1, 1, 1), attention_resolutions=()), shape, max_frequency=16.0, seed=0)
    padded: list[torch.Tensor] = []
    network.stem.register_forward_hook(lambda _module, given, _output: padded.append(given[0]))
    network.conv_out.register_forward_hook(lambda _module, _given, _output: padded[-1])
    x, level, image = inputs(shape)
    assert torch.equal(network(x, level, image), x)
    assert padded[0].shape == (2, 2, 8, 12)


@pytest.mark.parametrize(("shape", "attention"), [((1, 8, 8), (4,)), ((2, 9, 7), (5,)), ((1, 8, 8), ())])
def test_every_pixel_of_the_condition_matters(shape: Shape, attention: tuple[int, ...]) -> None:
    network = randomized(small(attention_resolutions=attention), shape)
    x, level, image = inputs(shape)
    image.requires_grad_()
    network(x, level, image).square().sum().backward()
    assert image.grad is not None
    assert image.grad.abs().min() > 0


def test_position_of_the_condition_matters() -> None:
    """Attention alone does not depend on the order of the patches; the position embeddings do."""
    network = randomized(small())
    x, level, image = inputs((1, 8, 8))
    moved = image.roll(2, dims=3)  # by a multiple of the patch size
    assert (network(x, level, image) - network(x, level, moved)).abs().max() > 1e-5


def test_condition_none_ignores_an_image() -> None:
    network = randomized(small(condition="none"))
    x, level, image = inputs((1, 8, 8))
    assert torch.equal(network(x, level), network(x, level, image))


def test_a_missing_condition_is_an_error() -> None:
    x, level, _ = inputs((1, 8, 8))
    with pytest.raises(ValueError, match=r"takes a conditioning image .*, but none was given"):
        randomized(small())(x, level)


def test_errors_name_wrong_shapes() -> None:
    network = randomized(small())
    x, level, image = inputs((1, 8, 8))
    with pytest.raises(ValueError, match=r"x is \[2, 1, 8, 7\].*\[B, \*\[1, 8, 8\]\]"):
        network(x[..., :7], level, image)
    with pytest.raises(ValueError, match=r"condition is \[2, 1, 7, 8\]"):
        network(x, level, image[:, :, :7])
    with pytest.raises(ValueError, match="2 images, but 1 conditioning images"):
        network(x, level, image[:1])
    with pytest.raises(ValueError, match="all at least 1"):
        UNet(small(), (1, 0, 8))


def test_labels_matter_and_none_is_the_last_class() -> None:
    network = randomized(small(classes=3))
    x, level, image = (part[:1].expand(4, *part.shape[1:]) for part in inputs((1, 8, 8)))
    out = network(x, level, image, torch.arange(4))
    differences = [(out[i] - out[j]).abs().max() for i in range(4) for j in range(i)]
    assert min(differences) > 1e-4
    torch.testing.assert_close(network(x, level, image)[0], out[3])


def test_without_classes_labels_are_ignored() -> None:
    network = randomized(small())
    x, level, image = inputs((1, 8, 8))
    assert torch.equal(network(x, level, image), network(x, level, image, torch.tensor([0, 1])))


@pytest.mark.parametrize("max_frequency", [1.0, 16.0])
def test_noise_level_matters(max_frequency: float) -> None:
    network = build(small(), (1, 8, 8), max_frequency=max_frequency, seed=0)
    awakened = randomized(small())
    awakened.noise_embedding = network.noise_embedding
    x, level, image = inputs((1, 8, 8))
    assert (awakened(x, level, image) - awakened(x, level + 0.1, image)).abs().max() > 1e-5


def test_embedding_frequencies_span_four_decades() -> None:
    embedding = NoiseEmbedding(64, 64, max_frequency=2.0)
    torch.nn.init.eye_(embedding.linear_in.weight)
    torch.nn.init.zeros_(embedding.linear_in.bias)
    seen: list[torch.Tensor] = []
    embedding.linear_in.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    embedding(torch.tensor([0.5]))
    cosines, sines = seen[0][0].chunk(2)
    frequencies = torch.atan2(sines, cosines) / 0.5
    expected = 2.0 * torch.logspace(0, -4, 32)
    torch.testing.assert_close(frequencies, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("condition", ["none", "channels", "cross-attention"])
def test_samples_of_a_batch_are_independent(condition: str) -> None:
    network = randomized(small(condition=condition, classes=2))
    x, level, image = inputs((1, 8, 8), batch=3)
    labels = torch.tensor([0, 1, 2])
    together = network(x, level, image, labels)
    alone = network(x[1:2], level[1:2], image[1:2], labels[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)
    x[0], level[0], image[0], labels[0] = 9.0, 2.0, -9.0, 1
    torch.testing.assert_close(network(x, level, image, labels)[1:], together[1:], rtol=1e-4, atol=1e-5)


def test_bfloat16_autocast_stays_close_and_returns_float32() -> None:
    network = randomized(small(classes=2))
    x, level, image = inputs((1, 8, 8))
    exact = network(x, level, image)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(x, level, image)
    rounded.sum().backward()
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.05 * exact.norm()


def test_network_cast_to_bfloat16_runs() -> None:
    network = randomized(small())
    x, level, image = inputs((1, 8, 8))
    exact = network(x, level, image)
    rounded = network.bfloat16()(x, level, image)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).norm() < 0.1 * exact.norm()


def test_embedding_cast_to_bfloat16_keeps_its_frequencies() -> None:
    embedding = build(small(base_channels=64), (1, 8, 8), max_frequency=1.0, seed=0).noise_embedding
    level = torch.tensor([811.25, 811.5])  # equal in bfloat16
    exact = embedding(level)
    assert (embedding.bfloat16()(level) - exact).norm() < 0.02 * exact.norm()


def test_channels_last_gives_the_same_output() -> None:
    network = randomized(small(channel_mult=(1, 2, 2), attention_resolutions=(8, 4)), (3, 16, 16))
    x, level, image = inputs((3, 16, 16))
    expected = network(x, level, image)
    network = network.to(memory_format=torch.channels_last)
    out = network(x.to(memory_format=torch.channels_last), level, image.to(memory_format=torch.channels_last))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_forward_is_one_graph() -> None:
    """torch.compile needs no graph break, because the forward pass has no data-dependent control flow."""
    network = randomized(small(classes=2, attention_resolutions=(5,)), (1, 9, 9))
    x, level, image = inputs((1, 9, 9))
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, level, image), network(x, level, image))


def test_dropout_is_active_only_in_training() -> None:
    network = randomized(small(dropout=0.5))
    given = inputs((1, 8, 8))
    assert torch.equal(network(*given), network(*given))
    network.train()
    assert not torch.equal(network(*given), network(*given))


def test_build_is_a_function_of_the_seed() -> None:
    def weights(seed: int) -> list[torch.Tensor]:
        network = build(small(classes=2), (1, 8, 8), max_frequency=1.0, seed=seed)
        return [parameter.detach() for parameter in network.parameters()]

    torch.manual_seed(1)
    first = weights(5)
    torch.manual_seed(2)
    again, other = weights(5), weights(2**63 - 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_build_does_not_change_the_global_generator() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    build(small(), (1, 8, 8), max_frequency=1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="no stage has side"):
        build(small(attention_resolutions=(3,)), (1, 8, 8), max_frequency=1.0, seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_default_attention_resolutions_apply_where_there_are_such_stages() -> None:
    with torch.device("meta"):
        assert UNet(NetworkConfig(), (3, 32, 32))._attended_stages() == {1, 2}
        assert UNet(NetworkConfig(), (1, 8, 8))._attended_stages() == {0}


def test_the_error_for_an_attention_resolution_without_stage_names_the_sides() -> None:
    with pytest.raises(ValueError, match=r"no stage has side 16; images of 8x8 pixels give 2 stages with sides 8, 4"):
        UNet(small(attention_resolutions=(16, 4)), (1, 8, 8))
    with pytest.raises(ValueError, match=r"side 7; images of 28x30 pixels, padded to 32x32 give 4 .* 32, 16, 8, 4"):
        UNet(small(channel_mult=(1, 1, 1, 1), attention_resolutions=(7,)), (1, 28, 30))


@pytest.mark.parametrize("side", [25, 28, 32])
def test_one_preset_serves_nearby_sizes(side: int) -> None:
    with torch.device("meta"):
        UNet(PAPER, (1, side, side))


@pytest.mark.parametrize("channels", [1, 2, 7, 8, 24, 32, 96, 128, 200, 512])
def test_groups_divide_the_channels(channels: int) -> None:
    groups = group_norm(channels).num_groups
    assert channels % groups == 0
    assert groups <= 32
    assert groups == 1 or channels // groups >= 4
    if channels >= 128:  # as many groups as in ADM
        assert groups == max(d for d in range(1, 33) if channels % d == 0)


def test_divisor() -> None:
    assert [divisor(200, 3), divisor(7, 6), divisor(12, 100), divisor(5, 0)] == [2, 1, 12, 1]


@pytest.mark.parametrize(
    ("blocks", "condition", "count"),
    [
        (3, "cross-attention", 61_752_195),
        (3, "none", 57_079_683),
        (6, "cross-attention", 104_141_571),
        (6, "none", 95_822_595),
    ],
)
def test_parameter_counts_of_the_paper_configuration(blocks: int, condition: str, count: int) -> None:
    config = PAPER.model_copy(update={"blocks_per_level": blocks, "condition": condition})
    with torch.device("meta"):
        network = UNet(config, (3, 32, 32))
    assert sum(math.prod(parameter.shape) for parameter in network.parameters()) == count


def test_paper_configuration_trains() -> None:
    network = build(PAPER, (3, 32, 32), max_frequency=1.0, seed=0)
    x, _, image = inputs((3, 32, 32), batch=1)
    out = network(x, torch.tensor([500.0]), image)
    (out - x).square().sum().backward()
    assert out.shape == x.shape
    assert network.conv_out.weight.grad is not None
    assert network.conv_out.weight.grad.isfinite().all()
    assert network.conv_out.weight.grad.any()


@pytest.mark.parametrize("side", [8, 7])
def test_patches_are_unshuffled_and_shuffled_back(side: int) -> None:
    """Pixel unshuffle: stages are `patch` times smaller; the output has the input's size and depends on every pixel."""
    config = NetworkConfig(
        patch=2,
        base_channels=8,
        channel_mult=(1, 2),
        blocks_per_level=1,
        attention_resolutions=(4,),
        dropout=0.0,
        condition="cross-attention",
    )
    network = build(config, (1, side, side), max_frequency=16.0, seed=0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    x = torch.randn(2, 1, side, side, generator=torch.Generator().manual_seed(2))
    level = torch.zeros(2)
    out = network(x, level, x)
    assert out.shape == x.shape
    moved = x.clone()
    moved[0, 0, -1, -1] += 1
    other = network(moved, level, x)
    assert (other[0] != out[0]).float().mean() > 0.9
    torch.testing.assert_close(other[1], out[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_group_norm_keeps_half_precision_and_sums_in_float32(dtype: torch.dtype) -> None:
    norm = group_norm(64)
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    x = (torch.randn(2, 64, 16, 16) + 300).to(dtype)  # the sum of squares overflows in float16
    given: list[Any] = []

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if op is torch.ops.aten.native_group_norm.default:
                given.append([tensor.dtype for tensor in args[:3]])
            return op(*args, **(kwargs or {}))

    with torch.autocast("cpu", dtype), Recorded():
        found = norm(x)
        assert norm(x.float()).dtype == torch.float32
    assert given == [[dtype] * 3, [torch.float32] * 3]
    assert found.dtype == dtype
    exact = torch.nn.functional.group_norm(x.double(), norm.num_groups, norm.weight.double(), norm.bias.double())
    exact = exact.detach()
    assert float((found.detach() - exact).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps
    found.sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.float32


def test_group_norm_without_autocast_equals_that_of_torch() -> None:
    norm, x = group_norm(64), torch.randn(2, 64, 8, 8)
    plain = torch.nn.GroupNorm(norm.num_groups, 64)
    assert torch.equal(norm(x), plain(x)) and list(norm.state_dict()) == list(plain.state_dict())
