"""A flow as a distribution: units, dtypes, steps, divergences, failures, and wrong arguments."""

import dataclasses
import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import trained

import jaxode

KEY = jax.random.key(0)
OPTIONS = {"rtol": 1e-9, "atol": 1e-9}
PARAMS, FLOW = trained(), jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), **OPTIONS)
# For what does not depend on the steps. They compile in half the time of adaptive ones.
STEPS = {"steps": 4}
# Densities are those of all rows: other numbers of rows are other programs.
DATA = np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))


def scaled(t, z, a):
    return a * z


def test_units_move_the_density_by_their_logarithm_alone():
    """`x -> 1000 x`: minus `d log 1000`, and samples in the new unit."""
    one, other = (jaxode.bind(FLOW, PARAMS, standardize=s * DATA) for s in (1.0, 1000.0))
    z = one.to_flow(DATA)
    np.testing.assert_allclose([z.mean(0), z.std(0)], [[0, 0], [1, 1]], atol=1e-12)
    np.testing.assert_allclose(
        other.log_prob(1000 * DATA), one.log_prob(DATA) - 2 * np.log(1000), rtol=1e-9
    )
    np.testing.assert_allclose(other.from_flow(z), 1000 * one.from_flow(z), rtol=1e-9)


def test_another_flow_keeps_parameters_and_maps():
    density = jaxode.bind(
        jaxode.cnf(FLOW.f, FLOW.base, rtol=1e-2, atol=1e-2), PARAMS, standardize=DATA
    )
    wanted = jaxode.bind(FLOW, PARAMS, standardize=DATA).log_prob(DATA)
    np.testing.assert_allclose(density.with_flow(FLOW).log_prob(DATA), wanted, rtol=1e-12)
    assert np.abs(density.log_prob(DATA) - wanted).max() > 1e-8
    with pytest.raises(
        ValueError, match=r"with_flow\(flow=...\): must be made by jaxode.cnf, with"
    ):
        density.with_flow(jaxode.cnf(FLOW.f, jaxode.standard_normal(3)))


def test_a_sample_has_the_same_density_alone_and_in_any_batch():
    """To rounding, at a tolerance at which joint steps move densities by 1e-5 nats and more."""
    flow = jaxode.cnf(jaxode.nn.field, FLOW.base, rtol=1e-3, atol=1e-3)
    params = jax.tree.map(lambda leaf: 2 * leaf, PARAMS)
    density, x = jaxode.bind(flow, params), np.random.default_rng(0).normal(0, 2, (5, 8, 2))
    many = density.log_prob(x)
    alone = np.array([density.log_prob(row) for row in x.reshape(40, 2)]).reshape(5, 8)
    np.testing.assert_allclose(many, alone, rtol=0, atol=1e-12)
    assert np.abs(flow.log_prob(params, x.reshape(40, 2)) - alone.ravel()).max() > 1e-5
    assert density.to_flow(x[0, :0]).shape == (0, 2)
    draw = lambda shape: jax.eval_shape(lambda: density.sample(KEY, shape)).shape
    assert [draw(()), draw((3, 4))] == [(2,), (3, 4, 2)]


@pytest.mark.parametrize("maps", [{"standardize": (0.0, 3.0)}, {"support": (-9.0, np.inf)}])
def test_data_keep_their_dtype(maps):
    """Also with JAX's float64 switched on, as it is here."""
    density, x = jaxode.bind(FLOW, PARAMS, **maps), DATA.astype(np.float32)
    assert density.to_flow(x).dtype == density.log_det(x).dtype == jnp.float32


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, np.float64])
def test_data_of_any_precision_are_mapped_in_single(dtype, default_settings):
    x = DATA.astype(dtype)
    density = jaxode.bind(jaxode.cnf(scaled, FLOW.base, **STEPS), 0.1, standardize=x)
    found, wanted = density.log_prob(x), density.log_prob(x.astype(np.float32))
    assert found.dtype == density.to_flow(x).dtype == np.float32
    np.testing.assert_array_equal(found, wanted)


def test_integers_are_numbers_and_do_not_wrap(default_settings):
    """Also those that int32 does not hold, such as time stamps."""
    x = np.random.default_rng(1).integers(2_200_000_000, 4_000_000_000, (40, 2))
    field = lambda t, z, args: args[0] * args[1].sum().astype(z.dtype) * z
    flow = jaxode.cnf(field, FLOW.base, **STEPS)
    density = jaxode.bind(flow, 0.1, standardize=x, standardize_context=1.0 * x)
    found = density.log_prob(x, context=x)
    np.testing.assert_array_equal(found, density.log_prob(1.0 * x, context=1.0 * x))
    small = jaxode.bind(density.flow, 0.1, context_shape=(2,))
    found = small.log_prob([3, 4], context=x[0] % 7)
    np.testing.assert_array_equal(found, small.log_prob([3.0, 4.0], context=1.0 * (x[0] % 7)))
    said = r"context=...\): integers must fit int32; got 2\d{9} to 3\d{9}\. Convert them with"
    for call in (small.log_prob, functools.partial(density.flow.log_prob, 0.1)):
        with pytest.raises(ValueError, match=said):
            call(1.0 * DATA, context=x)
    with pytest.raises(ValueError, match=r"solve\(args=...\): integers must fit int32; got"):
        jaxode.solve(lambda t, y, a: a * y, DATA, 0.0, 1.0, x[0, 0])


EXACT = jaxode.divergence.exact()
OWN = jaxode.divergence.Divergence(lambda key, z: None, EXACT.apply)


@pytest.mark.parametrize("chosen", [EXACT, OWN], ids=["exact", "own"])
def test_without_a_key_an_exact_divergence_is_the_one_that_was_chosen(chosen):
    """That of a wrong closed form is right by `exact()`, as the audit advises."""

    class Wrong(eqx.Module):
        def __call__(self, t, z, a):
            return a * z

        def value_and_divergence(self, t, z, a):
            return a * z, a

    x = DATA[:2]
    flow = jaxode.cnf(Wrong(), FLOW.base, divergence=chosen, **STEPS)
    exact = flow.base.log_prob(x * np.exp(-0.5)) - 1.0
    np.testing.assert_allclose(jaxode.bind(flow, jnp.array(0.5)).log_prob(x), exact, rtol=1e-4)


def test_without_a_key_the_divergence_is_exact():
    """Also where the flow's divergence is an estimate."""
    flow = dataclasses.replace(FLOW, divergence=jaxode.divergence.hutchinson())
    exact, noisy = jaxode.bind(FLOW, PARAMS), jaxode.bind(flow, PARAMS)
    np.testing.assert_allclose(noisy.log_prob(DATA), exact.log_prob(DATA), rtol=1e-9)
    assert np.abs(noisy.log_prob(DATA, key=KEY) - exact.log_prob(DATA)).max() > 1e-3


@pytest.mark.parametrize("of", ["field", "base"])
def test_a_failed_row_is_nan_inside_of_jit_and_raises_outside(of):
    """And so are its gradients, whatever is differentiated."""
    field = lambda t, z, a: jnp.where(z > 3.0, jnp.nan, a * z)
    made_of = {"field": jnp.array(0.1), "base": jaxode.diagonal_normal(2)}
    x = jnp.array([[1.0, 1.0], [4.0, 1.0]])

    def log_prob(part):
        parts = made_of | {of: part}
        density = jaxode.bind(jaxode.cnf(field, parts["base"], **STEPS), parts["field"])
        return density.log_prob(x)

    of_second = lambda part: ((values := log_prob(part))[1], values)
    gradient, values = jax.jit(jax.grad(of_second, has_aux=True))(made_of[of])
    assert np.isnan(values).tolist() == [False, True]
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradient))
    with pytest.raises(jaxode.SolveError, match="not finite"):
        log_prob(made_of[of])
