"""What a layer reads, against `unfold`, against its own output, and moments against numpy."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateurs.moments import Moments, PairedMoments, Positions, output_positions, patches, rows_of_output, unit_columns

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

CONV2D = {
    "plain": {},
    "padding": {"padding": 1},
    "stride": {"stride": 2, "padding": 1},
    "dilation": {"dilation": 2, "padding": 2},
    "uneven": {"stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
}


def everything(layer, value):
    with torch.no_grad():
        output = layer(value)
    positions = torch.arange(output_positions(layer, output))
    return patches(layer, value, positions), rows_of_output(layer, output, positions)


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("options", CONV2D.values(), ids=CONV2D)
@pytest.mark.parametrize("kernel", [1, 3, (3, 2)], ids=str)
def test_conv2d_patches_are_those_of_unfold(options, kernel):
    layer, value = nn.Conv2d(3, 4, kernel, **options), noise(2, 3, 9, 8)
    expected = F.unfold(
        value, layer.kernel_size, dilation=layer.dilation, padding=layer.padding, stride=layer.stride
    ).transpose(1, 2)
    found, _ = everything(layer, value)
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options", [{}, {"padding": 2}, {"stride": 3}, {"dilation": 2, "padding": 1, "stride": 2}], ids=str
)
def test_conv1d_patches_are_those_of_unfold(options):
    layer, value = nn.Conv1d(3, 4, 3, **options), noise(2, 3, 11)
    expected = F.unfold(
        value[:, :, None],
        (1, 3),
        dilation=(1, layer.dilation[0]),
        padding=(0, layer.padding[0]),
        stride=(1, layer.stride[0]),
    ).transpose(1, 2)
    found, _ = everything(layer, value)
    torch.testing.assert_close(found, expected.flatten(0, 1), rtol=0, atol=0)


LAYERS = {
    "linear": (nn.Linear(5, 4), (6, 5)),
    "linear on sequences": (nn.Linear(5, 4), (2, 3, 5)),
    "linear on maps": (nn.Linear(5, 4), (2, 3, 2, 5)),
    "conv1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 7)),
    "same padding": (nn.Conv2d(3, 4, (3, 2), padding="same"), (2, 3, 6, 6)),
    "valid padding": (nn.Conv2d(3, 4, 3, padding="valid"), (2, 3, 6, 6)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=(1, 2), padding_mode="reflect"), (2, 3, 6, 6)),
    "circular": (nn.Conv1d(3, 4, 3, padding=1, padding_mode="circular"), (2, 3, 6)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), stride=(1, 2, 1)), (2, 2, 3, 4, 5)),
}


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_the_weight_applied_to_the_patches_gives_the_output(layer, shape):
    x, y = everything(layer, noise(*shape))
    torch.testing.assert_close(x @ layer.weight.detach().flatten(1).T + layer.bias.detach(), y)


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
def test_some_positions_are_the_same_rows_of_all_of_them(layer, shape):
    value = noise(*shape)
    with torch.no_grad():
        output = layer(value)
    count = output_positions(layer, output)
    some = torch.arange(0, count, 2)
    x, y = everything(layer, value)
    rows = (torch.arange(len(value))[:, None] * count + some).flatten()
    torch.testing.assert_close(patches(layer, value, some), x[rows], rtol=0, atol=0)
    torch.testing.assert_close(rows_of_output(layer, output, some), y[rows], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layer", "shape"), [LAYERS["linear"], LAYERS["conv1d"], LAYERS["same padding"]], ids=["linear", "conv1d", "conv2d"]
)
def test_unit_columns_hold_all_that_is_read_of_a_channel(layer, shape):
    weight = layer.weight.detach().flatten(1)
    for channels in ([[0], [2]], [[2, 1]]):
        columns = unit_columns(layer, torch.tensor(channels))
        for row, unit in zip(columns, channels, strict=True):
            per_channel = weight.unflatten(1, (layer.weight.shape[1], -1))
            expected = torch.cat([per_channel[:, channel] for channel in unit], 1)
            torch.testing.assert_close(weight[:, row], expected, rtol=0, atol=0)


def test_moments_over_batches_are_numpys():
    generator = np.random.default_rng(0)
    x = (generator.normal(size=(300, 6)) @ generator.normal(size=(6, 6)) + 2).astype(np.float32)
    y = generator.normal(size=(300, 4)).astype(np.float32) + x[:, :4]
    moments = PairedMoments.zeros(6, 4)
    for start in (0, 100, 120):
        stop = {0: 100, 100: 120, 120: 300}[start]
        moments.update(torch.from_numpy(x[start:stop]), torch.from_numpy(y[start:stop]))
    x64, y64 = x.astype(np.float64), y.astype(np.float64)
    assert moments.x.count == 300
    np.testing.assert_allclose(moments.x.mean, x64.mean(0), rtol=1e-6)
    np.testing.assert_allclose(moments.x.covariance, np.cov(x64.T, bias=True), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.x.second, x64.T @ x64 / 300, rtol=1e-5)
    np.testing.assert_allclose(moments.mean_y, y64.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.cross, y64.T @ x64 / 300, rtol=1e-4, atol=1e-5)


def test_float64_rows_lose_nothing():
    x = noise(50, 3).double() + 1e4
    moments = Moments.zeros(3)
    moments.update(x)
    np.testing.assert_allclose(moments.covariance, np.cov(x.numpy().T, bias=True), atol=1e-6)


def test_half_precision_rows_are_summed_in_float32():
    x = noise(50, 3).half()
    moments = Moments.zeros(3)
    moments.update(x)
    np.testing.assert_allclose(moments.second, x.double().T @ x.double() / 50, rtol=1e-5)


@pytest.mark.parametrize(("examples", "positions", "expected"), [(4, 10, 10), (10, 10, 6), (100, 10, 1), (64, 1, 1)])
def test_positions_respect_the_limit_of_rows(examples, positions, expected):
    drawn = Positions(60, seed=0).draw(examples, positions)
    assert len(drawn) == expected
    assert drawn.tolist() == sorted(set(drawn.tolist()))
    assert 0 <= int(drawn.min()) <= int(drawn.max()) < positions


def test_positions_are_seeded_and_differ_between_batches():
    first, second = Positions(20, seed=1), Positions(20, seed=1)
    one, two = [first.draw(2, 50).tolist() for _ in range(2)]
    assert [one, two] == [second.draw(2, 50).tolist() for _ in range(2)]
    assert one != two


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_means_that_dwarf_the_spread_do_not_cost_the_spread_its_digits(offset):
    """Sums of squares in float32 would lose a spread of 1 beside a mean of 1000, and leave a covariance that is not positive."""
    x = (noise(4000, 5) + offset).float()
    y = x[:, :3] + noise(4000, 3, seed=1)
    moments = PairedMoments.zeros(5, 3)
    for part in (slice(0, 64), slice(64, 64), slice(64, 4000)):
        moments.update(x[part], y[part])
    exact = np.cov(x.double().numpy().T, bias=True)
    np.testing.assert_allclose(moments.x.covariance, exact, atol=1e-4)
    cross = moments.cross - torch.outer(moments.mean_y, moments.x.mean)
    expected = y.double() - y.double().mean(0)
    np.testing.assert_allclose(cross, expected.T @ (x.double() - x.double().mean(0)) / 4000, atol=1e-4)
    assert moments.x.count == 4000


def test_moments_of_parts_add_and_subtract():
    x = noise(90, 4)
    parts = [Moments.zeros(4) for _ in range(3)]
    for number, part in enumerate(parts):
        part.update(x[number::3])
    whole = parts[0] + parts[1] + parts[2]
    np.testing.assert_allclose(whole.covariance, np.cov(x.double().numpy().T, bias=True), atol=1e-6)
    rest = whole - parts[1]
    assert rest.count == 60
    np.testing.assert_allclose(rest.mean, torch.cat((x[0::3], x[2::3])).double().mean(0), atol=1e-6)
