"""A flow as a distribution: units, support, contexts, batches, and where it goes."""

import copy
import dataclasses
import functools
import os
import pathlib
import pickle
import subprocess
import sys
from typing import NamedTuple

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Frame, optional, trained
from scipy import stats

import jaxode
from jaxode.density.maps import contains
from jaxode.density.support import Box

KEY = jax.random.key(0)
OPTIONS = {"rtol": 1e-9, "atol": 1e-9}


PARAMS, FLOW = trained(), jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), **OPTIONS)
DATA = np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))
# What `standardize=` may be.
MAPS = {
    "data": DATA,
    "normal": jaxode.standardize.normal(DATA),
    "whiten": jaxode.standardize.whiten(DATA),
}
# The map of data is the first of both others.
with_chains = pytest.mark.parametrize("given", ["normal", "whiten"])


def test_units_move_the_density_by_their_logarithm_alone():
    """`x -> 1000 x`: minus `d log 1000`, and samples in the new unit."""
    one, other = (jaxode.bind(FLOW, PARAMS, standardize=s * DATA) for s in (1.0, 1000.0))
    np.testing.assert_allclose(
        other.log_prob(1000 * DATA), one.log_prob(DATA) - 2 * np.log(1000), rtol=1e-9
    )
    np.testing.assert_allclose(other.sample(KEY, (4,)), 1000 * one.sample(KEY, (4,)), rtol=1e-9)


def test_standardized_data_have_mean_zero_and_scale_one():
    z = jaxode.bind(FLOW, PARAMS, standardize=DATA).to_flow(DATA)
    np.testing.assert_allclose([z.mean(0), z.std(0)], [[0, 0], [1, 1]], atol=1e-12)


SUPPORTS = {
    "box": ((np.array([0.0, -1.0]), np.array([2.0, 1.0])), [[0, 2], [-1, 1]]),
    "half lines": ((np.array([0.0, -np.inf]), np.array([np.inf, 1.0])), [[0, 60], [-60, 1]]),
    "one number": ((-2.0, 3.0), [[-2, 3], [-2, 3]]),
}


@functools.cache
def bounded(name):
    return jaxode.bind(FLOW, PARAMS, support=SUPPORTS[name][0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["box", "one number"])
def test_the_density_on_a_box_integrates_to_one(name):
    n = 201
    sides = [np.linspace(a, b, n + 1) for a, b in SUPPORTS[name][1]]
    middles = [(side[1:] + side[:-1]) / 2 for side in sides]
    grid = jnp.asarray(np.stack(np.meshgrid(*middles, indexing="ij"), -1))
    area = np.prod([side[1] - side[0] for side in sides])
    density = bounded(name).with_flow(jaxode.cnf(FLOW.f, FLOW.base, rtol=1e-6, atol=1e-6))
    total = jnp.exp(jax.jit(lambda x: density.log_prob(x))(grid)).sum() * area
    np.testing.assert_allclose(total, 1, atol=1e-3)


@pytest.mark.parametrize("name", SUPPORTS)
def test_samples_are_in_the_support_with_their_density(name):
    x, log_prob = bounded(name).sample_and_log_prob(KEY, (50,))
    low, high = (jnp.broadcast_to(bound, 2) for bound in SUPPORTS[name][0])
    assert ((low[None] < x) & (x < high[None])).all()
    np.testing.assert_allclose(bounded(name).log_prob(x), log_prob, rtol=1e-6)
    np.testing.assert_allclose(bounded(name).sample(KEY, (50,)), x, rtol=1e-6)


@pytest.mark.slow
def test_outside_of_the_support():
    """Minus infinity, on the bounds, too, with a gradient of zero; what is NaN stays so."""
    x = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    density = bounded("box")
    log_prob = density.log_prob(x)
    assert np.isfinite(log_prob[0])
    np.testing.assert_array_equal(log_prob[1:], -np.inf)
    inside = lambda x: jnp.sum(jnp.where(jnp.isfinite(v := density.log_prob(x)), v, 0))
    slopes = jax.jit(jax.grad(inside))(x)
    assert (slopes[0] != 0).all()
    np.testing.assert_array_equal(slopes[1:], 0)
    nan = jax.jit(lambda x: density.log_prob(x))(x.at[1].set(jnp.nan))
    assert list(np.isnan(nan)) == [False, True, False, False]
    with pytest.raises(
        jaxode.SolveError, match=r"log_prob\(x=...\): .* 1 of 4 rows, first in row 1"
    ):
        density.log_prob(x.at[1].set(jnp.nan))


def scaled(t, z, a):
    return a * z


def normal(**maps):
    """The density of a standard normal within the maps: a field of zero."""
    return jaxode.bind(jaxode.cnf(scaled, FLOW.base), jnp.zeros(()), **maps)


LOGNORMAL = np.random.default_rng(2).lognormal([7.0, -2.0], [0.5, 1.0], (50, 2))


@pytest.mark.parametrize("given", ["data", "mean and scale"])
def test_units_on_a_support(given):
    """`exp(mean + scale z)`: the lognormal density of scipy, and its samples."""
    mean, scale = np.log(LOGNORMAL).mean(0), np.log(LOGNORMAL).std(0)
    density = normal(
        standardize=LOGNORMAL if given == "data" else (mean, scale), support=(0, np.inf)
    )
    exact = stats.lognorm(scale, scale=np.exp(mean))
    expected = exact.logpdf(LOGNORMAL).sum(1)
    np.testing.assert_allclose(density.log_prob(LOGNORMAL), expected, rtol=1e-9)
    x, log_prob = density.sample_and_log_prob(KEY, (400,))
    np.testing.assert_allclose(log_prob, exact.logpdf(x).sum(1), rtol=1e-9)
    assert stats.kstest(exact.cdf(x).ravel(), "uniform").pvalue > 1e-3
    np.testing.assert_allclose(density.to_flow(x).mean(0), 0, atol=0.2)


KINDS = {"interval": (0.0, 1.0), "above": (0.0, np.inf), "below": (-np.inf, 0.0),
         "free": (-np.inf, np.inf)}  # fmt: skip


@jax.jit
def forward_and_slopes(low, high, u):
    forward = lambda u: Box(low, high).forward(u)
    return forward(u), jax.jacobian(forward)(u)


@pytest.mark.parametrize("u", [-1000.0, -100.0, 0.5, 100.0, 1000.0])
def test_bijections_and_their_derivatives_are_finite(u, default_settings):
    low, high = (np.array(bounds, np.float32) for bounds in zip(*KINDS.values(), strict=True))
    box = Box(jnp.asarray(low), jnp.asarray(high))
    u = jnp.full(4, u)
    (x, log_det), slopes = forward_and_slopes(box.low, box.high, u)
    assert contains(box, x)
    assert np.isfinite(x).all()
    assert np.isfinite(log_det)
    assert all(np.isfinite(slope).all() for slope in slopes)
    assert slopes[0][3, 3] == 1  # where there is no bound, it is the identity


def test_the_determinants_of_a_bijection_agree():
    low, high = (jnp.array(bounds) for bounds in zip(*KINDS.values(), strict=True))
    box, u = Box(low, high), jnp.array([0.3, -1.2, 2.0, 5.0])
    x, log_det = box.forward(u)
    back, of_inverse = box.inverse(x)
    np.testing.assert_allclose(back, u, rtol=1e-12)
    jacobian = jax.jacobian(lambda u: box.forward(u)[0])(u)
    np.testing.assert_allclose(log_det, -np.linalg.slogdet(jacobian)[1], rtol=1e-12)
    np.testing.assert_allclose(of_inverse, log_det, rtol=1e-12)


@pytest.mark.parametrize("maps", [{"standardize": (0.0, 3.0)}, {"support": (-9.0, np.inf)}])
def test_data_keep_their_dtype(maps):
    """Also with JAX's float64 switched on, as it is here."""
    density = jaxode.bind(FLOW, PARAMS, **maps)
    assert density.to_flow(DATA.astype(np.float32)).dtype == jnp.float32
    with jax.numpy_dtype_promotion("strict"):
        assert density.log_det(DATA.astype(np.float32)).dtype == jnp.float32


def test_gradients_through_samples_in_large_units(default_settings):
    params = jaxode.nn.ConcatSquash(2, (4,), key=KEY)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2))
    support = (np.array([0.0, -np.inf]), np.array([np.inf, np.inf]))
    density = jaxode.bind(flow, params, standardize=(np.array([0.0, 1000.0]), 1.0), support=support)
    gradient = jax.grad(lambda params: density.with_params(params).sample(KEY, (3,)).sum())(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient.weight).max() > 0


@pytest.mark.parametrize("given", MAPS)
def test_another_flow_keeps_parameters_and_maps(given):
    standardize = MAPS[given]
    loose = jaxode.cnf(FLOW.f, FLOW.base, rtol=1e-2, atol=1e-2)
    density = jaxode.bind(loose, PARAMS, standardize=standardize)
    wanted = jaxode.bind(FLOW, PARAMS, standardize=standardize).log_prob(DATA)
    np.testing.assert_allclose(density.with_flow(FLOW).log_prob(DATA), wanted, rtol=1e-12)
    assert np.abs(density.log_prob(DATA) - wanted).max() > 1e-8
    with pytest.raises(
        ValueError, match=r"with_flow\(flow=...\): must be made by jaxode.cnf, with"
    ):
        density.with_flow(jaxode.cnf(FLOW.f, jaxode.standard_normal(3)))


@pytest.mark.slow
@with_chains
def test_units_are_not_trained(given):
    density = jaxode.bind(FLOW, PARAMS, standardize=MAPS[given], support=(-100.0, 100.0))

    def loss(density):
        x, log_prob = density.sample_and_log_prob(KEY, (2,))
        return x.sum() + log_prob.sum() + density.log_prob(DATA[:2]).sum()

    gradient = eqx.filter_jit(eqx.filter_grad(loss))(density)
    maps = jax.tree.leaves((gradient.support, gradient.standardize))
    assert len(maps) == 2 + 5  # the bounds, and a chain
    assert not any(np.any(leaf) for leaf in maps)
    assert np.any(gradient.params.weight)


@pytest.mark.slow
def test_integers_are_numbers():
    counts = np.random.default_rng(1).integers(0, 9, (40, 2))
    whole, same = (jaxode.bind(FLOW, PARAMS, standardize=c) for c in (counts, counts.astype(float)))
    np.testing.assert_allclose(whole.log_prob(counts), same.log_prob(1.0 * counts), rtol=1e-12)
    np.testing.assert_allclose(whole.log_prob([3, 4]), same.log_prob(np.array([3.0, 4.0])))
    flow = jaxode.bind(FLOW, trained(2), standardize=DATA, standardize_context=(2.5, 1.5))
    found = flow.log_prob(DATA[0], context=np.array([3, 4]))
    np.testing.assert_allclose(found, flow.log_prob(DATA[0], context=np.array([3.0, 4.0])))


def test_integers_do_not_wrap(default_settings):
    """Those that int32 does not hold, such as time stamps."""
    x = np.random.default_rng(1).integers(2_000_000_000, 4_000_000_000, (40, 2))
    density = jaxode.bind(
        jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2)), trained(2),
        standardize=x, standardize_context=1.0 * x,
    )  # fmt: skip
    found = density.log_prob(x, context=x)
    np.testing.assert_array_equal(found, density.log_prob(1.0 * x, context=1.0 * x))
    said = r"context=...\): integers must fit int32; got 2\d{9} to 3\d{9}\. Convert them with"
    unmapped = jaxode.bind(density.flow, density.params, context_shape=(2,))
    for call in (unmapped.log_prob, functools.partial(density.flow.log_prob, density.params)):
        with pytest.raises(ValueError, match=said):
            call(1.0 * DATA, context=x)
    with pytest.raises(ValueError, match=r"solve\(args=...\): integers must fit int32; got"):
        jaxode.solve(lambda t, y, a: a * y, DATA, 0.0, 1.0, x[0, 0])


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_data_in_half_precision_are_mapped_in_single(dtype, default_settings):
    x = DATA.astype(dtype)
    density = jaxode.bind(jaxode.cnf(scaled, FLOW.base), 0.1, standardize=x)
    found, wanted = density.log_prob(x), density.log_prob(x.astype(np.float32))
    assert found.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.slow
def test_far_outside_of_the_support_the_flow_is_not_asked():
    """It has never seen such data: its field may be NaN there."""
    field = lambda t, z, a: jnp.where(jnp.abs(z) > 8.0, jnp.nan, a * z)
    flow = jaxode.cnf(field, FLOW.base)
    density = jaxode.bind(flow, jnp.array(0.1), standardize=LOGNORMAL, support=(0.0, np.inf))
    x = jnp.asarray([*LOGNORMAL[:2], -LOGNORMAL[0]])
    log_prob = density.log_prob(x)
    assert np.isfinite(log_prob[:2]).all()
    assert log_prob[2] == -np.inf
    inside = lambda a: density.with_params(a).log_prob(x)[:2].sum()
    assert np.isfinite(jax.jit(jax.grad(inside))(jnp.array(0.1)))


def test_where_the_bijection_is_infinite_the_density_is_zero():
    density = jaxode.bind(FLOW, PARAMS, support=(0.0, np.inf))
    x = jnp.array([[1.0, 1.0], [1.0, np.inf], [5e-324, 1.0]])
    assert list(jnp.isfinite(jax.jit(lambda x: density.log_prob(x))(x))) == [True, False, False]
    np.testing.assert_array_equal(density.log_prob(x)[1:], -np.inf)


OVERFLOWS = {
    "a small scale": {"standardize": (0.0, 1e-6)},
    "a map": {"standardize": jaxode.standardize.whiten(1e-6 * DATA)},
    "a spline": {"standardize": jaxode.standardize.normal(1e-6 * DATA)},
}


@pytest.mark.parametrize("name", OVERFLOWS)
def test_where_the_maps_overflow_the_density_is_zero(name):
    density = jaxode.bind(FLOW, PARAMS, **OVERFLOWS[name])
    x = jnp.array([[3e-6, 1e-8], [1.7e308, -1e-8], [jnp.nan, 0.0]])
    near = density.log_prob(x[0])
    assert jnp.isfinite(near)
    np.testing.assert_array_equal(density.log_prob(x[1]), -jnp.inf)
    with pytest.raises(jaxode.SolveError, match="NaN or inf in 1 of 3 rows, first in row 2"):
        density.log_prob(x)
    loss = lambda params, x: (density.with_params(params).log_prob(x), 0)
    np.testing.assert_allclose(jax.jit(loss)(PARAMS, x)[0], [near, -jnp.inf, jnp.nan], rtol=1e-9)
    of_first = jax.jit(jax.grad(lambda params, x: loss(params, x)[0][0]))
    gradient = of_first(PARAMS, x[:2])
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    # Training does not hide it.
    assert jnp.isnan(jax.jit(density.to_flow)(x[:2])[1]).any()
    with pytest.raises(ValueError, match=r"so far .* overflows; got 1 of 2 rows, first in row 1\."):
        density.to_flow(x[:2])


@pytest.mark.parametrize("value", [1e-30, 1.0 - 1e-7, 0.5])
def test_bounds_in_float32(value):
    """A sample next to a bound has the density that it has in float64."""
    for dtype in (np.float32, np.float64):
        box = Box(*(jnp.asarray([x], dtype) for x in (0.0, 1.0)))
        u, log_det = box.inverse(jnp.asarray([value], dtype))
        exact = np.longdouble(np.asarray(value, dtype))
        np.testing.assert_allclose(u[0], np.log(exact / (1 - exact)), rtol=1e-5)
        np.testing.assert_allclose(log_det, -np.log(exact * (1 - exact)), rtol=1e-5)
        assert 0 < box.forward(jnp.asarray([200.0], dtype))[0] < 1
        assert 0 < box.forward(jnp.asarray([-200.0], dtype))[0] < 1


def test_a_sample_has_the_same_density_alone_and_in_any_batch():
    density = jaxode.bind(
        dataclasses.replace(FLOW, solve_options=jaxode.cnf(
            jaxode.nn.field, FLOW.base, rtol=1e-3, atol=1e-3).solve_options), PARAMS,
        standardize=DATA,
    )  # fmt: skip
    many = density.log_prob(DATA)
    np.testing.assert_allclose(density.log_prob(DATA[3]), many[3], rtol=1e-13)
    np.testing.assert_allclose(density.log_prob(DATA[None, 5:7])[0], many[5:7], rtol=1e-13)
    assert density.sample(KEY).shape == (2,)
    assert density.sample(KEY, (3, 4)).shape == (3, 4, 2)
    assert density.event_shape == (2,)


@pytest.mark.slow
def test_each_of_200_rows_has_the_density_that_it_has_alone():
    """To rounding, at a tolerance at which joint steps move densities by 1e-5 nats and more."""
    options: dict = {"rtol": 1e-3, "atol": 1e-3}
    flow = jaxode.cnf(jaxode.nn.field, FLOW.base, **options)
    params = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    density, x = jaxode.bind(flow, params), np.random.default_rng(0).normal(0, 2, (200, 2))
    alone = np.concatenate([density.log_prob(x[i : i + 1]) for i in range(len(x))])
    np.testing.assert_allclose(density.log_prob(x), alone, rtol=0, atol=1e-12)
    assert np.abs(flow.log_prob(params, x) - alone).max() > 1e-5


@pytest.mark.slow
def test_one_context_for_all_samples_or_a_row_for_each():
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), **OPTIONS)
    contexts = np.random.default_rng(1).normal(10.0, 4.0, (40, 3))
    density = jaxode.bind(flow, trained(3), standardize=DATA, standardize_context=contexts)
    rows = density.log_prob(DATA[:4], context=contexts[:4])
    for i in range(4):
        one = density.log_prob(DATA[i], context=contexts[i])
        np.testing.assert_allclose(one, rows[i], rtol=1e-12)
    same = density.log_prob(DATA[:4], context=contexts[0])
    np.testing.assert_allclose(same[0], rows[0], rtol=1e-12)
    assert density.sample(KEY, (4,), context=contexts[:4]).shape == (4, 2)
    z, context = density.to_flow(DATA, contexts)
    np.testing.assert_allclose(context.mean(0), 0, atol=1e-12)
    loss = flow.nll(density.params, z, context=context)
    expected = -density.log_prob(DATA, context=contexts).mean() - np.log(DATA.std(0)).sum()
    np.testing.assert_allclose(loss, expected, rtol=1e-7)


def test_one_sample_for_each_row_of_a_context():
    """Without a sample_shape, where the shape of a row is known."""
    flow = jaxode.cnf(lambda t, z, args: args[0] * z * args[1]["a"].sum(), FLOW.base, **OPTIONS)
    shapes = {"a": (2,), "label": ()}
    density = jaxode.bind(flow, 0.1, standardize=DATA, context_shape=shapes)
    context = {"a": DATA[:3], "label": 1}
    x, log_prob = density.sample_and_log_prob(KEY, context=context)
    np.testing.assert_allclose(density.sample(KEY, context=context), x, rtol=1e-7)
    np.testing.assert_allclose(density.sample(KEY, (3,), context=context), x, rtol=1e-7)
    np.testing.assert_allclose(density.log_prob(x, context=context), log_prob, rtol=1e-7)
    assert density.sample(KEY, context=context | {"a": DATA[0]}).shape == (2,)
    grid = context | {"label": np.ones((4, 1))}
    assert jax.jit(lambda c: density.sample(KEY, context=c))(grid).shape == (4, 3, 2)
    with pytest.raises(
        ValueError, match=r"sample\(context=...\): .* samples \(3,\); got shape \(2,\)"
    ):
        density.sample(KEY, context=context | {"label": np.ones(2)})


def test_as_many_samples_as_a_context_has_entries():
    """A vector of two numbers is one context for two samples, where its shape is known."""
    seen = np.random.default_rng(1).normal(10.0, 4.0, (40, 2))
    density = jaxode.bind(FLOW, trained(2), standardize=DATA, standardize_context=seen)
    x = density.sample(KEY, (2,), context=seen[0])
    one = [density.log_prob(row, context=seen[0]) for row in x]
    np.testing.assert_allclose(density.log_prob(x, context=seen[0]), one, rtol=1e-9)
    # Leading axes broadcast: 3 samples for each of 2 contexts.
    x = density.sample(KEY, (3, 2), context=seen[:2])
    one = [density.log_prob(x[1, i], context=seen[i]) for i in range(2)]
    np.testing.assert_allclose(density.log_prob(x, context=seen[:2])[1], one, rtol=1e-9)
    raw = jaxode.bind(FLOW, trained(2))
    with pytest.raises(ValueError, match=r"sample\(context=...\): .* Pass context_shape= to bind"):
        raw.sample(KEY, (2,), context=seen[0])
    known = jaxode.bind(FLOW, trained(2), context_shape=(2,))
    assert known.sample(KEY, (2,), context=seen[0]).shape == (2, 2)
    scale = lambda t, z, args: args[0] * args[1] * z
    scalars = jaxode.bind(jaxode.cnf(scale, FLOW.base), 0.1, context_shape=())
    each = scalars.log_prob(DATA[:2], context=np.array([1.0, 2.0]))
    np.testing.assert_allclose(each[1], scalars.log_prob(DATA[1], context=2.0), rtol=1e-9)


def test_tables_are_data_and_contexts():
    flow = jaxode.cnf(lambda t, z, args: args[0] * z * args[1].sum(), FLOW.base, **OPTIONS)
    contexts = np.random.default_rng(1).normal(10.0, 4.0, (40, 3))
    x, context = Frame(DATA), Frame(contexts)
    density = jaxode.bind(flow, 0.1, standardize=x, standardize_context=context)
    expected = jaxode.bind(flow, 0.1, standardize=DATA, standardize_context=contexts).log_prob(
        DATA, context=contexts
    )
    np.testing.assert_array_equal(density.log_prob(x, context=context), expected)


class Weather(NamedTuple):
    p: np.ndarray
    q: np.ndarray


def test_a_named_tuple_is_a_context():
    """Also of vectors, which are the mean and the scale in a plain tuple."""
    flow = jaxode.cnf(lambda t, z, args: args[0] * z * args[1][0], FLOW.base, **OPTIONS)
    context = Weather(np.linspace(0.0, 1.0, 40), np.linspace(5.0, 9.0, 40))
    named = jaxode.bind(flow, 0.1, standardize_context=context)
    listed = jaxode.bind(flow, 0.1, standardize_context=list(context))
    assert isinstance(named.context_maps, Weather)
    assert named.context_shapes == ((), ())
    np.testing.assert_array_equal(
        named.log_prob(DATA, context=context), listed.log_prob(DATA, context=list(context))
    )


def test_labels_in_a_context_stay_as_they_are():
    field = lambda t, z, args: z * args[0][args[1]["label"]] + args[1]["size"]
    flow = jaxode.cnf(field, jaxode.standard_normal(2), **OPTIONS)
    context = {"label": np.arange(40) % 3, "size": np.linspace(5.0, 9.0, 40)}
    density = jaxode.bind(
        flow, jnp.array([0.1, -0.2, 0.3]), standardize=DATA, standardize_context=context
    )
    _, carried = density.to_flow(DATA, context)
    np.testing.assert_array_equal(carried["label"], context["label"])
    np.testing.assert_allclose(carried["size"].std(), 1, rtol=1e-12)
    assert np.isfinite(density.log_prob(DATA, context=context)).all()


EXACT = jaxode.divergence.exact()
OWN = jaxode.divergence.Divergence(lambda key, z: None, EXACT.apply)


@pytest.mark.parametrize(
    "chosen", [EXACT, pytest.param(OWN, marks=pytest.mark.slow)], ids=["exact", "own"]
)
def test_without_a_key_an_exact_divergence_is_the_one_that_was_chosen(chosen):
    """That of a wrong closed form is right by `exact()`, as the audit advises."""

    class Wrong(eqx.Module):
        def __call__(self, t, z, a):
            return a * z

        def value_and_divergence(self, t, z, a):
            return a * z, a

    x = DATA[:2]
    flow = jaxode.cnf(Wrong(), FLOW.base, divergence=chosen)
    np.testing.assert_allclose(
        jaxode.bind(flow, jnp.array(0.5)).log_prob(x), flow.log_prob(jnp.array(0.5), x), rtol=1e-4
    )


def test_without_a_key_the_divergence_is_exact():
    """Also where the flow's divergence is an estimate."""
    flow = dataclasses.replace(FLOW, divergence=jaxode.divergence.hutchinson())
    exact, noisy = jaxode.bind(FLOW, PARAMS), jaxode.bind(flow, PARAMS)
    np.testing.assert_allclose(noisy.log_prob(DATA[:4]), exact.log_prob(DATA[:4]), rtol=1e-9)
    assert np.abs(noisy.log_prob(DATA[:4], key=KEY) - exact.log_prob(DATA[:4])).max() > 1e-3


@pytest.mark.slow
def test_an_energy_in_the_units_and_on_the_support_of_the_data():
    """A flow that stands still is the lognormal of the maps: no sample has any loss."""
    still = jaxode.cnf(lambda t, z, a: a * z, jaxode.standard_normal(2), **OPTIONS)
    units = jnp.array([0.5, -1.0]), jnp.array([0.3, 0.7])
    density = jaxode.bind(still, jnp.zeros(()), standardize=units, support=(0.0, jnp.inf))
    normal = lambda u: jnp.sum(-0.5 * ((u - units[0]) / units[1]) ** 2 - jnp.log(units[1]))
    target = lambda x: normal(jnp.log(x)) - jnp.sum(jnp.log(x)) - jnp.log(2 * jnp.pi)

    def loss(a, path):
        return density.with_params(a).reverse_kl_loss(target, 3, key=KEY, path=path)

    value, slope = jax.value_and_grad(loss)(0.0, True)
    np.testing.assert_allclose([value, slope], 0, atol=1e-12)
    assert abs(jax.grad(loss)(0.0, False)) > 0.1


def test_an_energy_of_contexts_as_they_are_given():
    """Numbers in the units of the user, and labels."""
    params = trained(2)
    field = lambda t, z, args: args[0](
        t, z, jnp.append(args[1]["u"], args[1]["label"].astype(float))
    )
    flow = jaxode.cnf(field, jaxode.standard_normal(2), **OPTIONS)
    context = {"u": jnp.array([[300.0], [500.0], [400.0]]), "label": jnp.array([0, 1, 1])}
    density = jaxode.bind(flow, params, standardize=DATA, standardize_context=context)
    target = lambda x, row: -jnp.sum(x**2) * row["u"][0] / 300 - 3.0 * row["label"].astype(float)
    x, log_q = density.sample_and_log_prob(KEY, 3, context=context)
    expected = jnp.mean(log_q - jax.vmap(target)(x, context))
    loss = density.reverse_kl_loss(target, 3, key=KEY, context=context)
    np.testing.assert_allclose(loss, expected, rtol=1e-7)
    blind = density.reverse_kl_loss(lambda x: 0 * x[0], 3, key=KEY, context=context)
    np.testing.assert_allclose(blind, jnp.mean(log_q), rtol=1e-7)


@pytest.mark.slow
@with_chains
def test_it_is_a_pytree(given, tmp_path):
    density = jaxode.bind(FLOW, PARAMS, standardize=MAPS[given], support=(-100.0, 100.0))
    assert jax.eval_shape(jax.jit(density.log_prob), DATA[:4]).shape == (4,)
    values = jax.jit(lambda density, x: density.log_prob(x))(density, DATA[:4])
    np.testing.assert_allclose(values, density.log_prob(DATA[:4]), rtol=1e-12)
    # An ensemble.
    half = jax.tree.map(lambda a: 0.5 * a, PARAMS)
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), PARAMS, half)
    member = lambda params: density.with_params(params).log_prob(DATA[:4])
    each = jax.jit(jax.vmap(member))(both)
    np.testing.assert_allclose(each, [values, member(half)], rtol=1e-9)
    eqx.tree_serialise_leaves(tmp_path / "density.eqx", density)
    zeros = jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, density)
    loaded = eqx.tree_deserialise_leaves(tmp_path / "density.eqx", zeros)
    assert eqx.tree_equal(loaded, density)
    np.testing.assert_array_equal(loaded.log_prob(DATA[:4]), density.log_prob(DATA[:4]))


@pytest.mark.slow
def test_orbax_saves_it_bit_for_bit(tmp_path):
    orbax = optional("orbax.checkpoint")
    density = jaxode.bind(FLOW, PARAMS, standardize=DATA, support=(-100.0, 100.0))
    with orbax.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "density", density)
        zeros = jax.tree.map(lambda x: x * 0 if eqx.is_array(x) else x, density)
        loaded = checkpointer.restore(tmp_path / "density", zeros)
    assert eqx.tree_equal(loaded, density)
    np.testing.assert_array_equal(loaded.log_prob(DATA[:4]), density.log_prob(DATA[:4]))


# What `jax.jit` and `jax.custom_jvp` return, which `pickle` does not find by name, and a function.
ACTIVATIONS = (jnp.tanh, jaxode.nn.softplus, jax.nn.gelu)


@functools.cache
def of_all_activations():
    networks = [
        make(activation=f, key=KEY)
        for make in (
            functools.partial(jaxode.nn.ConcatSquash, 2, (4,)),
            functools.partial(jaxode.nn.Residual, 2, 4, 1),
        )
        for f in ACTIVATIONS
    ]
    return [
        jaxode.bind(FLOW, network, standardize=given, support=(-100.0, 100.0))
        for network, given in zip(networks, 2 * list(MAPS.values()), strict=True)
    ]


def test_a_density_is_pickled_and_copied():
    """With all that it consists of."""
    for density, f in zip(of_all_activations(), 2 * ACTIVATIONS, strict=True):
        for again in (pickle.loads(pickle.dumps(density)), copy.copy(density)):
            assert eqx.tree_equal(again, density)
            assert again.params.activation is f


def test_what_does_not_pickle_is_named():
    activation = lambda u: jnp.sin(u)
    with pytest.raises((pickle.PicklingError, AttributeError), match="<lambda>"):
        pickle.dumps(jaxode.nn.MLP(2, (4,), key=KEY, activation=activation))


@pytest.mark.slow
def test_another_process_runs_an_export_without_jaxode_and_opens_a_pickle(tmp_path):
    """The export, for three platforms and any batch, has no callback with default settings.

    The pickle needs nothing to load into.
    """
    density = jaxode.bind(FLOW, PARAMS, standardize=MAPS["normal"], support=(-100.0, 100.0))
    batch = jax.export.symbolic_shape("batch, 2")
    platforms = ("cpu", "cuda", "tpu")
    log_prob = jax.export.export(jax.jit(lambda x: density.log_prob(x)), platforms=platforms)
    sample = jax.export.export(
        jax.jit(lambda key, rows: density.sample(jax.random.wrap_key_data(key), rows.shape)),
        platforms=platforms,
    )
    count = jax.export.symbolic_shape("count")
    files = {
        "log_prob": log_prob(jax.ShapeDtypeStruct(batch, float)),
        "sample": sample(
            jax.ShapeDtypeStruct((2,), np.uint32), jax.ShapeDtypeStruct(count, np.float32)
        ),
    }
    for name, exported in files.items():
        assert "callback" not in exported.mlir_module()
        (tmp_path / name).write_bytes(exported.serialize())
    np.save(tmp_path / "x.npy", DATA[:4])
    densities = of_all_activations()
    (tmp_path / "densities").write_bytes(pickle.dumps(densities))
    code = (
        "import pickle, sys, jax.export, numpy as np; jax.config.update('jax_enable_x64', True)\n"
        "load = lambda name: jax.export.deserialize(open(name, 'rb').read()).call\n"
        "np.savez('out.npz', log_prob=load('log_prob')(np.load('x.npy')),\n"
        "    sample=load('sample')(np.zeros(2, np.uint32), np.zeros(4, np.float32)))\n"
        "assert 'jaxode' not in sys.modules\n"
        "for density in pickle.load(open('densities', 'rb')):\n"
        "    z = density.to_flow([1.0, 2.0])\n"
        "    print(*density.flow.f(0.5, z, density.params).tolist())\n"
    )
    root = pathlib.Path(jaxode.__file__).parents[1]
    there = subprocess.run(
        [sys.executable, "-c", code], check=True, cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )  # fmt: skip
    with np.load(tmp_path / "out.npz") as out:
        np.testing.assert_allclose(out["log_prob"], density.log_prob(DATA[:4]), rtol=1e-9)
        np.testing.assert_allclose(out["sample"], density.sample(KEY, (4,)), rtol=1e-9)
    field = lambda density: density.flow.f(0.5, density.to_flow([1.0, 2.0]), density.params)
    here = [field(density) for density in densities]
    np.testing.assert_allclose(np.array(there.stdout.split(), float), np.ravel(here), rtol=1e-12)


def test_a_failed_row_is_nan_inside_of_jit_and_raises_outside():
    field = lambda t, z, a: jnp.where(z > 3.0, jnp.nan, a * z)
    density = jaxode.bind(jaxode.cnf(field, jaxode.standard_normal(2)), 0.1)
    x = jnp.array([[1.0, 1.0], [4.0, 1.0]])
    values = jax.jit(lambda x: density.log_prob(x))(x)
    assert list(np.isnan(values)) == [False, True]
    with pytest.raises(jaxode.SolveError, match="not finite"):
        density.log_prob(x)


@pytest.mark.parametrize("of", ["field", "base"])
def test_gradients_of_a_failed_row_are_nan(of):
    """Not an error, whatever is differentiated."""
    field = lambda t, z, a: jnp.where(z > 3.0, jnp.nan, a * z)
    made_of = {"field": jnp.array(0.1), "base": jaxode.diagonal_normal(2)}

    def total(part):
        parts = made_of | {of: part}
        density = jaxode.bind(jaxode.cnf(field, parts["base"]), parts["field"])
        return density.log_prob(jnp.array([[4.0, 1.0]]))[0]

    value, gradient = jax.value_and_grad(total)(made_of[of])
    assert np.isnan(value)
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient))


def test_no_rows_are_carried_to_no_rows():
    """As for `log_prob`. The loss then says that it needs rows."""
    for density in (jaxode.bind(FLOW, PARAMS, standardize=DATA), bounded("box")):
        assert density.to_flow(DATA[:0]).shape == (0, 2)


def test_training_data_outside_of_the_support():
    density = jaxode.bind(FLOW, PARAMS, support=(0.0, 10.0))
    x = jnp.array([[1.0, 2.0], [3.0, 11.0]])
    with pytest.raises(ValueError, match=r"to_flow\(support=...\): .* 1 of 2 rows, first in row 1"):
        density.to_flow(x)
    z = jax.jit(lambda x: density.to_flow(x))(x)
    assert list(np.isnan(z).any(1)) == [False, True]


def test_data_that_are_not_finite_are_named():
    density = jaxode.bind(FLOW, PARAMS, standardize=DATA, support=(-100.0, 100.0))
    seen = np.random.default_rng(1).normal(size=(40, 3))
    bad, lost = DATA.copy(), seen.copy()
    bad[3, 1], lost[:2, 0] = np.nan, np.inf
    with pytest.raises(
        ValueError, match=r"to_flow\(x=...\): must be finite; .* 1 of 40 .* row 3\."
    ):
        density.to_flow(bad)
    z = jax.jit(lambda x: density.to_flow(x))(bad)
    assert list(np.flatnonzero(np.isnan(z).any(1))) == [3]
    # Data that are known inside of `jit`.
    assert jax.jit(lambda: density.to_flow(DATA))().shape == (40, 2)
    conditional = jaxode.bind(FLOW, trained(3), standardize=DATA, standardize_context=seen)
    with pytest.raises(
        ValueError, match=r"to_flow\(context=...\): must be finite; .* 2 of 40 rows"
    ):
        conditional.to_flow(DATA, lost)


@pytest.mark.slow
def test_a_table_in_float64_warns_of_nothing(default_settings):
    params = jaxode.nn.ConcatSquash(2, (4,), key=KEY, context_size=2)
    flow = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2))
    density = jaxode.bind(flow, params, standardize=DATA, standardize_context=DATA)
    z, context = density.to_flow(DATA, DATA)
    assert z.dtype == context.dtype == jnp.float32
    assert np.isfinite(flow.matching_loss(params, z, key=KEY, context=context))


def test_known_samples_in_a_program_do_not_call_the_host():
    """Nor keep it from being exported: a failure is NaN there."""
    density = jaxode.bind(FLOW, PARAMS)
    program = jax.jit(lambda s: s * density.sample(KEY, (2,)))
    assert "callback" not in str(jax.make_jaxpr(program)(1.0))
    fit = lambda s: jaxode.fit(density, DATA, key=KEY, steps=1)
    with pytest.raises(ValueError, match=r"fit: looks at data.* runs outside jax\.jit"):
        jax.jit(fit)(1.0)
