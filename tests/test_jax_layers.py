"""Agreement: the layers written for speed do what XLA's own operators and plain numpy do, gradients included."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from hwnas.jax_layers import Form, batch_norm, channel_sum, convolution, depthwise, fixed_norm, he_normal, pool

SIDES = (3, 5, 7)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def close(found, expected, tolerance: float = 1e-5) -> None:
    """Equal up to a share of the largest value there is."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * max(1e-3, np.abs(expected).max()))


def xla_convolution(x, kernel, stride: int, padding: int, groups: int) -> jax.Array:
    margins = [(padding, padding)] * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), margins, dimension_numbers=layout, feature_group_count=groups
    )


# ---- depthwise ---------------------------------------------------------------------------------------------------


FORMS = {"with control flow": Form(), "without": Form(control_flow=False)}


@cache
def depthwise_and_gradients(stride: int, form: Form):
    """Compiled once for each stride and shape: the kernel's side is an argument."""

    @jax.jit
    def run(x, kernel, choice, g):
        y, back = jax.vjp(lambda x, kernel: depthwise(x, kernel, choice, SIDES, stride, form), x, kernel)
        return y, *back(g)

    return run


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("stride", "height", "width"), [(1, 5, 6), (2, 6, 8), (2, 2, 4), (1, 12, 16), (2, 24, 32)])
def test_a_depthwise_convolution_and_both_gradients_equal_xlas(
    form: Form, side: int, stride: int, height: int, width: int
):
    x, kernel = normal(1, 2, height, width, 6), normal(2, 7, 7, 6)
    g = normal(3, 2, height // stride, width // stride, 6)
    margin = (7 - side) // 2
    centre = slice(margin, 7 - margin)

    def plain(x, kernel):
        return xla_convolution(x, kernel[centre, centre, None], stride, side // 2, 6)

    y, back = jax.vjp(plain, x, kernel)
    for found, expected in zip(
        depthwise_and_gradients(stride, form)(x, kernel, SIDES.index(side), g), (y, *back(g)), strict=True
    ):
        close(found, expected)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_the_rim_of_a_kernel_that_a_smaller_side_does_not_use_gets_exactly_zero_gradient(form: Form):
    x, kernel, g = normal(1, 2, 6, 8, 6), normal(2, 7, 7, 6), normal(3, 2, 3, 4, 6)
    gradient = np.array(depthwise_and_gradients(2, form)(x, kernel, 0, g)[2])
    assert (gradient[2:5, 2:5] != 0).all()
    gradient[2:5, 2:5] = 0
    assert (gradient == 0).all()


# ---- convolutions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "side", "stride", "padding", "groups"),
    [
        (8, 1, 1, 0, 1),  # pointwise
        (8, 1, 1, 0, 2),  # grouped pointwise
        (16, 1, 1, 0, 4),
        (16, 1, 2, 0, 2),  # ... that skips every other place
        (8, 1, 2, 1, 1),  # padded, so that the border sees zeros
        (8, 3, 2, 1, 1),  # dense
        (4, 3, 1, 1, 2),  # grouped
        (8, 3, 1, 1, 8),  # depthwise
        (8, 3, 1, 0, 8),  # depthwise without the padding that keeps the size
        (16, 3, 1, 1, 8),  # two outputs for each channel
        (8, 4, 2, 1, 8),  # an even side
    ],
)
def test_a_convolution_of_any_kind_equals_xlas(channels: int, side: int, stride: int, padding: int, groups: int):
    x, kernel = normal(1, 2, 6, 8, 8), normal(2, side, side, 8 // groups, channels)
    found = convolution(x, kernel, stride=stride, padding=padding, groups=groups)
    close(found, xla_convolution(x, kernel, stride, padding, groups))


def test_a_depthwise_convolution_of_stride_2_on_an_odd_size_equals_xlas():
    x, kernel = normal(1, 2, 5, 7, 4), normal(2, 3, 3, 1, 4)
    close(convolution(x, kernel, stride=2, padding=1, groups=4), xla_convolution(x, kernel, 2, 1, 4))


def test_the_gradients_of_a_grouped_pointwise_convolution_equal_xlas():
    x, kernel, g = normal(1, 2, 4, 4, 8), normal(2, 1, 1, 2, 12), normal(3, 2, 4, 4, 12)
    ours = jax.vjp(lambda x, kernel: convolution(x, kernel, groups=4), x, kernel)[1](g)
    plain = jax.vjp(lambda x, kernel: xla_convolution(x, kernel, 1, 0, 4), x, kernel)[1](g)
    for found, expected in zip(ours, plain, strict=True):
        close(found, expected)


# ---- batch norm --------------------------------------------------------------------------------------------------


def plain_batch_norm(x, scale, offset, epsilon: float):
    mean, variance = x.mean((0, 1, 2)), x.var((0, 1, 2))
    return (x - mean) / jnp.sqrt(variance + epsilon) * scale + offset, mean, variance


@pytest.mark.parametrize("epsilon", [1e-5, 0.1])
def test_batch_norm_and_its_three_gradients_equal_those_that_jax_derives(epsilon: float):
    x, scale, offset = normal(1, 3, 4, 5, 6) * 3 + 2, normal(2, 6), normal(3, 6)
    g = normal(4, 3, 4, 5, 6)
    y, back = jax.vjp(lambda *values: batch_norm(*values, epsilon)[0], x, scale, offset)
    expected, plain_back = jax.vjp(lambda *values: plain_batch_norm(*values, epsilon)[0], x, scale, offset)
    close(y, expected)
    for found, plain in zip(back(g), plain_back(g), strict=True):
        close(found, plain)


def test_batch_norm_returns_the_mean_and_the_biased_variance_of_the_batch():
    x = normal(1, 3, 4, 5, 6) * 3 + 20
    _, mean, variance = batch_norm(x, normal(2, 6), normal(3, 6))
    close(mean, x.mean((0, 1, 2)))
    close(variance, x.astype(np.float64).var((0, 1, 2)))


def test_no_gradient_flows_through_the_statistics_that_batch_norm_returns():
    gradient = jax.grad(lambda x: sum(map(jnp.sum, batch_norm(x, jnp.ones(3), jnp.zeros(3))[1:])))(
        normal(1, 4, 2, 2, 3)
    )
    assert (np.asarray(gradient) == 0).all()


def test_a_channel_of_zeros_stays_zero_with_finite_gradients():
    x = normal(1, 2, 3, 3, 2) * np.array([1, 0], np.float32)
    y, back = jax.vjp(lambda *values: batch_norm(*values)[0], x, jnp.array([1.0, 0.0]), jnp.zeros(2))
    assert (np.asarray(y)[..., 1] == 0).all()
    assert all(np.isfinite(leaf).all() for leaf in back(jnp.ones_like(y)))


def test_batch_norm_by_given_statistics_is_the_formula_of_the_paper():
    x, scale, offset, mean, variance = normal(1, 2, 3, 3, 4), *normal(2, 3, 4), np.abs(normal(3, 4))
    for epsilon in (1e-5, 0.1):
        expected = (x - mean) / np.sqrt(variance + epsilon) * scale + offset
        close(fixed_norm(x, scale, offset, mean, variance, epsilon), expected)


def test_a_channel_sum_adds_up_all_axes_but_the_last():
    x = normal(1, 2, 3, 4, 5)
    close(channel_sum(x), x.sum((0, 1, 2)))


# ---- pools -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["max", "average"])
@pytest.mark.parametrize(("side", "stride", "padding"), [(3, 2, 1), (2, 2, 0), (3, 1, 1), (5, 2, 0)])
def test_pools_equal_windows_cut_out_by_numpy(reduction: str, side: int, stride: int, padding: int):
    x = normal(1, 2, 7, 8, 3) - 5  # all below zero, so that a maximum over padding by zeros would show
    margins = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    padded = np.pad(x, margins, constant_values=-np.inf if reduction == "max" else 0)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), (1, 2))[:, ::stride, ::stride]
    expected = windows.max((-1, -2)) if reduction == "max" else windows.mean((-1, -2))
    close(pool(x, reduction, side, stride, padding), expected)


# ---- initial values ----------------------------------------------------------------------------------------------


def test_he_normal_values_have_the_variance_that_the_paper_gives_and_follow_from_the_key():
    one, again, other = (np.asarray(he_normal(jax.random.key(seed), (300, 70), fan_in=50)) for seed in (1, 1, 2))
    assert one.dtype == np.float32
    assert one.mean() == pytest.approx(0, abs=0.01)
    assert one.var() == pytest.approx(2 / 50, rel=0.05)
    np.testing.assert_array_equal(one, again)
    assert (one != other).mean() > 0.99
