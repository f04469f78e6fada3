"""What the pictures show is what they were given."""

import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

import jaxode
from jaxode.training.loop import Point

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@pytest.fixture
def ax():
    figure, ax = plt.subplots()
    yield ax
    plt.close(figure)


def test_density_is_that_of_the_function_at_the_centers_of_cells(ax):
    base = jaxode.standard_normal(2)
    shift = jnp.array([[1.0, -2.0]])
    jaxode.plot.density(lambda x: base.log_prob(x - shift), (-5, 7, -7, 5), ax=ax, points=60)
    (image,) = ax.images
    values = np.asarray(image.get_array())
    row, column = np.unravel_index(values.argmax(), values.shape)
    # Cells are 0.2 wide; the peak lies on the corner of four of them.
    np.testing.assert_allclose(
        [-5 + 0.2 * (column + 0.5), -7 + 0.2 * (row + 0.5)], [1, -2], atol=0.11
    )
    assert list(image.get_extent()) == [-5, 7, -7, 5]
    # The midpoint rule on a Gaussian that ends within the picture is exact to its tails.
    np.testing.assert_allclose(values.sum() * 0.2**2, 1.0, atol=1e-6)


def test_low_density_is_visible_and_the_scale_is_yours(ax):
    base = jaxode.standard_normal(2)
    draw = lambda **style: jaxode.plot.density(
        base.log_prob, (-4, 4, -4, 4), ax=ax, points=4, **style
    ).images[-1]
    image = draw()
    assert image.norm(0.25 * image.norm.vmax) == pytest.approx(0.5)
    assert ax.figure.axes[1].get_ylabel() == "density (square-root scale)"
    linear = draw(norm="linear", vmin=0.0, vmax=7.0, colorbar=False)
    assert (linear.norm.vmax, linear.norm(1.75)) == (7.0, pytest.approx(0.25))
    assert len(ax.figure.axes) == 2


def test_samples_and_trajectories_show_the_points(ax):
    x = np.random.default_rng(0).normal(size=(7, 2))
    assert jaxode.plot.samples(x, ax=ax, lw=2.0, c="red") is ax  # names of matplotlib
    assert ax.collections[0].get_linewidth().tolist() == [2.0]
    np.testing.assert_array_equal(np.asarray(ax.collections[0].get_offsets()), x)
    ys = np.random.default_rng(1).normal(size=(5, 3, 2))
    jaxode.plot.trajectories(ys, ax=ax, start="noise", end="data")
    for i, line in enumerate(ax.lines):
        np.testing.assert_array_equal(line.get_xydata(), ys[:, i])
    first, last = ax.collections[1:]
    np.testing.assert_array_equal(np.asarray(first.get_offsets()), ys[0])
    np.testing.assert_array_equal(np.asarray(last.get_offsets()), ys[-1])
    assert [first.get_label(), last.get_label()] == ["noise", "data"]


def test_curves_show_each_step_and_the_mean_of_the_last(ax):
    losses = jnp.arange(10.0) ** 2
    jaxode.plot.history(losses, ax=ax, window=4)
    mean, each = ax.lines
    np.testing.assert_array_equal(each.get_xydata(), np.stack([np.arange(1, 11), losses], 1))
    assert mean.get_xydata()[0].tolist() == [4, 3.5]  # of 0, 1, 4 and 9
    assert mean.get_xydata()[-1].tolist() == [10, (36 + 49 + 64 + 81) / 4]
    jaxode.plot.evaluations([14, 20, 26], ax=ax, window=1)
    assert ax.lines[-1].get_ydata().tolist() == [14, 20, 26]
    assert ax.get_ylabel() == "vector field evaluations"


@pytest.mark.parametrize("size", [0, 1, 2, 20, 60])
def test_a_curve_shorter_than_the_window_is_a_line(ax, size):
    """On the current axes."""
    assert jaxode.plot.history(np.arange(size)) is ax
    if size > 1:
        assert len(ax.lines[0].get_xdata()) > size / 2
        assert ax.lines[0].get_linewidth() > 0.5


def test_the_looks_of_fit_are_drawn_over_seconds(ax):
    looks = [Point("matching", 0, 2.0, 5.0), Point("likelihood", 3, 4.0, 1.0)]
    jaxode.plot.history(looks, ax=ax)
    assert ax.lines[0].get_xydata().tolist() == [[2.0, 5.0], [4.0, 1.0]]


def test_a_waterfall_is_in_order_and_leaves_out_what_failed(ax):
    jaxode.plot.waterfall(np.array([30.0, np.inf, 12.0, 12.0]), ax=ax)
    assert ax.lines[0].get_xydata().tolist() == [[1, 1], [2, 1], [3, 19]]
    assert ax.get_yscale() == "log"
    with pytest.raises(ValueError, match=r"waterfall\(costs=.* must have shape \(starts,\)"):
        jaxode.plot.waterfall(1.0, ax=ax)


def test_without_matplotlib_a_picture_says_what_to_install(monkeypatch):
    """That the library is imported without it is tested in `test_package.py`."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match="pip install matplotlib"):
        jaxode.plot.history([1.0])


def test_ranks_are_counted_in_cells_and_coverage_is_over_levels(ax):
    ranks = np.stack([np.arange(21), np.zeros(21, int)], 1)
    jaxode.plot.ranks(ranks, 20, ax=ax, bins=7)
    even, low = ax.patches
    assert even.get_data().values.tolist() == [3] * 7
    assert low.get_data().values.tolist() == [21] + [0] * 6
    with pytest.raises(ValueError, match=r"plot.ranks\(ranks=...\): must have shape"):
        jaxode.plot.ranks(ranks[0], 20)
    levels = np.array([0.5, 0.9])
    jaxode.plot.coverage(levels, levels + 0.05, 0.1 * levels, ax=ax)
    np.testing.assert_array_equal(ax.lines[-1].get_xydata(), np.stack([levels, levels + 0.05], 1))
