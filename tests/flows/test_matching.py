"""The loss of flow matching: its minimum, its noise, and what it must not depend on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from flow_cases import times_of
from helpers import assert_close
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode
from benchmarks.harness.hlo import collectives
from jaxode.coupling import independent, optimal_transport
from jaxode.flows.bases import DiagonalNormal

KEY = jax.random.key(0)
BATCH = 16


def normal(seed, *shape, dtype=jnp.float64):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


X, START, CONTEXT = normal(1, BATCH, 2) + 1, normal(2, BATCH, 2), normal(3, BATCH, 2)
PARAMS = (normal(4, 8, 2), normal(5, 2, 8), normal(6, 8))


def field(t, z, args):
    (w1, w2, b), context = args
    return w2 @ jnp.tanh(w1 @ (z + context) + b * t)


def flow_of(f=field, event=2, **options):
    return jaxode.cnf(f, jaxode.standard_normal(event), **options)


def test_gradients_of_data_and_context_are_those_of_the_pairs():
    coupling = optimal_transport(8, 0.3)
    paired = START[coupling.pair(KEY, START, X, CONTEXT)]

    def loss(rows, coupling, x0):
        x, context = rows
        return flow_of().matching_loss(
            PARAMS, x, key=KEY, x0=x0, context=context, coupling=coupling
        )  # fmt: skip

    gradient = jax.jit(jax.grad(loss), static_argnums=1)((X, CONTEXT), coupling, START)
    expected = jax.jit(jax.grad(loss), static_argnums=1)((X, CONTEXT), independent(), paired)
    for a, b in zip(gradient, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14)


@jax.jit
def of_powers(keys, power):
    return jax.vmap(lambda key: times_of(key, BATCH, time_power=power))(keys)


def test_times_are_one_in_each_part():
    u = of_powers(jax.random.split(KEY, 500), 1.0)
    strata = jnp.floor(u * BATCH)
    assert (np.sort(strata, axis=1) == np.arange(BATCH)).all()
    # Each row's time is uniform: five standard errors of the mean of 500.
    np.testing.assert_allclose(u.mean(0), 0.5, atol=5 / np.sqrt(12 * 500))
    np.testing.assert_allclose(u.var(0), 1 / 12, atol=0.02)
    # Neighbors are far apart.
    apart = np.abs(np.diff(strata, axis=1))
    assert np.minimum(apart, BATCH - apart).min() >= BATCH // 4


@pytest.mark.parametrize("power", [0.5, 3])
def test_times_of_a_power(power):
    """`1 - (1 - v)^power` has the distribution function `1 - (1 - u)^(1 / power)`."""
    keys = jax.random.split(KEY, 500)
    powers = of_powers(keys, float(power))
    np.testing.assert_allclose(powers, 1 - (1 - of_powers(keys, 1.0)) ** power, rtol=1e-12)
    cdf = lambda u: 1 - (1 - u) ** (1 / power)
    assert scipy.stats.kstest(powers.ravel(), cdf).statistic < 0.02
    one = times_of(keys[0], BATCH, time_power=power)
    np.testing.assert_allclose(powers[0], one, rtol=1e-12)


def test_times_of_power_one_are_those_without():
    """With all their digits: `1 - (1 - v)` would be a multiple of 2^-24 in float32."""
    u = times_of(KEY, BATCH, np.float32, time_power=1.0)
    np.testing.assert_array_equal(u, times_of(KEY, BATCH, np.float32))
    assert (u * 2**24 % 1 != 0).any()
    np.testing.assert_allclose(u, times_of(KEY, BATCH), rtol=1e-7)


def test_no_solve_and_no_divergence():
    def no_divergence(*args):
        raise AssertionError

    flow = flow_of(divergence=jaxode.divergence.Divergence(no_divergence, no_divergence))
    loss = lambda params: flow.matching_loss(params, X, key=KEY, context=CONTEXT)
    assert "while" not in str(jax.make_jaxpr(jax.value_and_grad(loss))(PARAMS))


@pytest.mark.slow  # compiles for several devices
def test_a_batch_over_devices_has_the_noise_of_one():
    """With a coupling of neighbouring rows. With weights it is tested in `test_bad_data.py`."""

    def loss(params, x, context, **axis):
        coupling = optimal_transport(2, 0.0)
        flow = flow_of(**axis)
        return flow.matching_loss(params, x, key=KEY, context=context, coupling=coupling)

    def mean(*inputs):
        return jax.lax.pmean(loss(*inputs, axis_name="batch"), "batch")

    mesh, specs = Mesh(np.array(jax.devices()[:8]), ("batch",)), (P(), P("batch"), P("batch"))
    step = jax.shard_map(jax.value_and_grad(mean), mesh=mesh, in_specs=specs, out_specs=P())
    program = jax.jit(step).lower(PARAMS, X, CONTEXT).compile()
    found, expected = program(PARAMS, X, CONTEXT), jax.value_and_grad(loss)(PARAMS, X, CONTEXT)
    assert_close(found, expected, 1e-12)
    # All of the gradient crosses at once; beside it the loss.
    crossing = collectives(program.as_text())
    assert sum(c["bytes"] for c in crossing) <= sum(leaf.nbytes for leaf in PARAMS) + 24


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_low_precision(dtype):
    def f(t, z, w):
        return w @ z.astype(w.dtype) + t.astype(w.dtype)

    x, w = X.astype(jnp.float32), jnp.array([[0.5, 1.0], [-1.0, 2.0]])
    loss = lambda w, x=x: flow_of(f).matching_loss(w, x, key=KEY)
    value, gradient = jax.value_and_grad(loss)(w.astype(dtype))
    assert (value.dtype, gradient.dtype) == (jnp.float32, dtype)
    exact, slope = jax.value_and_grad(loss)(w, X)
    eps = float(jnp.finfo(dtype).eps)  # a few roundings of each row
    np.testing.assert_allclose(value, exact, rtol=4 * eps)
    assert_close(gradient.astype(slope.dtype), slope, 4 * eps)


def loss(x=X, flow=None, **options):
    flow = flow_of(lambda t, z, p: -z) if flow is None else flow
    return flow.matching_loss(None, x, **{"key": KEY, **options})


class PerBatch:
    """A base whose samples are always a batch."""

    event_shape = (2,)
    log_prob = jaxode.standard_normal(2).log_prob

    def sample(self, key, sample_shape):
        return jax.random.normal(key, (3, 2))


def no_context(t, z, args):
    params, context = args
    return params * z + jnp.nan_to_num(context)


DRAWS_NAN = jaxode.cnf(lambda t, z, p: -z, DiagonalNormal(START[0] / 0, START[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: loss(flow=DRAWS_NAN),
            "cnf(base=...): must draw finite samples; got NaN or inf in 16 of 16 rows, first in "
            "row 0. Fix its parameters or its method `sample`.",
        ),
        (
            lambda: DRAWS_NAN.sample(PARAMS, KEY, 3),
            "cnf(base=...): must draw finite samples; got NaN or inf in 3 of 3 rows, first in "
            "row 0. Fix its parameters or its method `sample`.",
        ),
        (
            lambda: loss(X.at[3].set(1e200)),
            "matching_loss(x=...): squared differences to the vector field must be finite; got an "
            "overflow in 1 of 16 rows, first in row 3, where the field is finite.",
        ),
        (
            lambda: flow_of(no_context).matching_loss(
                jnp.nan, X, key=KEY, context=CONTEXT.at[2].set(jnp.nan)
            ),
            "matching_loss: the vector field or the state is not finite.",
        ),
    ],
)  # fmt: skip
def test_what_is_not_finite_is_named(call, message):
    with pytest.raises(jaxode.SolveError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_a_training_step_does_not_search_for_wrong_rows():
    """A sort tells whether the coupling is a permutation. Which rows are wrong is asked later."""
    step = jax.grad(lambda z: loss(z, coupling=optimal_transport(8)))
    program = str(jax.make_jaxpr(step)(X))
    assert "sort" in program
    assert "searchsorted" not in program
