"""What holds for every state, time, direction, tolerance, tableau and pytree.

The examples of a test share their compiled programs: what varies is data, or comes from a short
list. They are the same in each run; the weekly run of CI draws other ones, as does
`JAXODE_TEST_EXAMPLES=random`.
"""

import functools
import os
import re
from pathlib import Path

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxode

settings.register_profile("few", max_examples=12, deadline=None, derandomize=True)
# Under CI the defaults of hypothesis are not random. `print_blob` says how to repeat a failure.
settings.register_profile(
    "random", max_examples=50, deadline=None, derandomize=False, print_blob=True
)
settings.load_profile(os.environ.get("JAXODE_TEST_EXAMPLES") or "few")

SIZE = 3
seeds = st.integers(0, 2**31 - 1)
times = st.floats(-2.0, 2.0, width=32)
exponents = st.integers(3, 9)
# Without an error estimate, without a shared stage, with one, and of high order.
explicit = st.sampled_from([diffrax.Euler(), diffrax.Heun(), diffrax.Tsit5(), diffrax.Dopri8()])
embedded = st.sampled_from([diffrax.Bosh3(), diffrax.Tsit5(), diffrax.Dopri8()])
# In single precision one of them.
precise = st.sampled_from([
    (diffrax.Bosh3(), jnp.float64), (diffrax.Dopri8(), jnp.float64),
    (diffrax.Tsit5(), jnp.float64), (diffrax.Tsit5(), jnp.float32),
])  # fmt: skip


def numbers(seed, *shape, dtype=jnp.float64):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape), dtype)


def nonlinear(t, y, A):
    """With a Lipschitz constant of at most 3 in the maximum norm."""
    return jnp.sin(A @ y + t)


def linear(t, y, A):
    return jnp.cos(t) * (A @ y)


@functools.partial(jax.jit, static_argnames=("f", "solver", "steps", "control"))
def run(f, y0, t0, t1, A, tolerance=1e-6, solver=diffrax.Tsit5(), steps=None, control=None):
    options = {"solver": solver, "steps": steps, "rtol": tolerance, "atol": tolerance}
    max_steps = 20_000 if control is None else 4096
    return jaxode.solve(
        f, y0, t0, t1, A, batch=control, max_steps=max_steps, throw=False, **options
    )


def test_weekly_run_of_ci_draws_other_examples():
    ci = (Path(__file__).parents[2] / ".github/workflows/ci.yml").read_text()
    weekly, other = re.findall(r"JAXODE_TEST_EXAMPLES: .*'schedule' && '(.*)' \|\| '(.*)'", ci)[0]
    assert not settings.get_profile(weekly).derandomize
    assert settings.get_profile(other).derandomize


@pytest.mark.slow
@given(seeds, times, times, exponents, precise)
def test_forward_then_backward_returns(seed, t0, t1, exponent, choice):
    solver, dtype = choice
    tolerance = 10.0 ** -(exponent if dtype == jnp.float64 else min(exponent, 5))
    y0, A = numbers(seed, SIZE, dtype=dtype), numbers(seed + 1, SIZE, SIZE, dtype=dtype) / SIZE
    there = run(nonlinear, y0, t0, t1, A, tolerance, solver)
    back = run(nonlinear, there.y1, t1, t0, A, tolerance, solver)
    assert there.ok
    assert back.ok
    assert back.y1.dtype == dtype
    assert there.t_reached == jnp.asarray(t1, dtype)
    # An error grows by e^4 at most over a span of 4 at Lipschitz constant 1, and twice so on the
    # way back; each of the n steps makes one of at most the tolerance times 1 + |y| <= 6.
    steps = int(there.stats.num_accepted + back.stats.num_accepted)
    bound = 6 * steps * tolerance * np.exp(abs(t1 - t0))
    np.testing.assert_allclose(back.y1, y0, atol=min(bound, 1.0))


@pytest.mark.slow
@given(seeds, times, times, explicit)
def test_equal_steps_of_a_linear_field_are_a_linear_map(seed, t0, t1, solver):
    y, z, A = numbers(seed, SIZE), numbers(seed + 1, SIZE), numbers(seed + 2, SIZE, SIZE)
    go = lambda y: run(linear, y, t0, t1, A, solver=solver, steps=5).y1
    np.testing.assert_allclose(go(2 * y - 3 * z), 2 * go(y) - 3 * go(z), rtol=1e-10, atol=1e-11)


@pytest.mark.slow
@given(seeds, times, times, exponents)
def test_reversed_time_is_the_negated_field(seed, t0, t1, exponent):
    y0, A = numbers(seed, SIZE), numbers(seed + 1, SIZE, SIZE)
    forward = run(nonlinear, y0, t0, t1, A, 10.0**-exponent)
    mirrored = run(_mirrored, y0, -t0, -t1, A, 10.0**-exponent)
    assert forward.stats.num_steps == mirrored.stats.num_steps
    np.testing.assert_allclose(mirrored.y1, forward.y1, rtol=1e-12)


def _mirrored(t, y, A):
    return -nonlinear(-t, y, A)


# Without a shared stage, and with one.
@pytest.mark.slow
@given(seeds, times, times, st.sampled_from([diffrax.Euler(), diffrax.Tsit5()]))
def test_equal_steps_compose(seed, t0, t1, solver):
    """Twice as many steps over twice the span."""
    y0, A = numbers(seed, SIZE), numbers(seed + 1, SIZE, SIZE)
    middle = (t0 + t1) / 2
    whole = run(nonlinear, y0, t0, t1, A, solver=solver, steps=6).y1
    half = run(nonlinear, y0, t0, middle, A, solver=solver, steps=3).y1
    rest = run(nonlinear, half, middle, t1, A, solver=solver, steps=3).y1
    np.testing.assert_allclose(rest, whole, rtol=1e-11, atol=1e-12)


TREES = [
    lambda y: {"b": y[1:], "a": y[0]},
    lambda y: [y[:2].reshape(1, 2), (y[2:], None)],
    lambda y: (y[0], y[1], y[2]),
]


@pytest.mark.slow
@given(seeds, times, times, exponents, st.sampled_from(TREES))
def test_structure_of_the_state_does_not_matter(seed, t0, t1, exponent, tree):
    y0, A = numbers(seed, SIZE), numbers(seed + 1, SIZE, SIZE)
    plain = run(nonlinear, y0, t0, t1, A, 10.0**-exponent)
    split = run(_on_trees(tree), tree(y0), t0, t1, A, 10.0**-exponent)
    assert jax.tree.structure(split.y1) == jax.tree.structure(tree(y0))
    expected = tree(plain.y1)
    for leaf, other in zip(jax.tree.leaves(split.y1), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-10)


@functools.cache
def _on_trees(tree):
    """`nonlinear` on a state of this structure."""
    numbered = tree(np.arange(SIZE))
    order = np.argsort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(numbered)]))

    def field(t, y, A):
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(y)])[order]
        return tree(nonlinear(t, flat, A))

    return field


@given(seeds, times, times, exponents)
def test_samples_with_steps_of_their_own_may_be_permuted(seed, t0, t1, exponent):
    z, A = 3 * numbers(seed, 5, SIZE), numbers(seed + 1, SIZE, SIZE)
    order = np.random.default_rng(seed).permutation(5)
    go = lambda z: run(nonlinear, z, t0, t1, A, 10.0**-exponent, control="per_sample")
    direct, permuted = go(z), go(z[order])
    np.testing.assert_array_equal(permuted.stats.num_steps, direct.stats.num_steps[order])
    np.testing.assert_allclose(permuted.y1, direct.y1[order], rtol=1e-12)


@functools.partial(jax.jit, static_argnames=("adjoint", "solver"))
def _pushed_and_pulled(inputs, tangents, cotangents, tolerance, adjoint, solver):
    """`w . J v` by forward mode, and by reverse mode."""

    def outputs(y0, t0, t1, theta, A, adjoint):
        ts = jnp.stack([t0 + theta * (t1 - t0), t1])
        solution = jaxode.solve(
            nonlinear, y0, t0, t1, A, ts=ts, solver=solver, rtol=tolerance, atol=tolerance,
            adjoint=adjoint, throw=False,
        )  # fmt: skip
        return solution.y1, solution.ys

    product = lambda a, b: sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))
    forward = functools.partial(outputs, adjoint=jaxode.ForwardMode())
    _, pushed = jax.jvp(forward, inputs, tangents)
    _, pull = jax.vjp(functools.partial(outputs, adjoint=adjoint), *inputs)
    return product(cotangents, pushed), product(pull(cotangents), tangents)


@pytest.mark.slow
@given(seeds, times, times, st.floats(0.1, 0.9), exponents, embedded)
def test_forward_and_reverse_mode_are_transposes(seed, t0, t1, theta, exponent, solver):
    """In the state, both times, an output time and the parameters, exactly on the same mesh."""
    inputs = (numbers(seed, SIZE), t0, t1, theta, numbers(seed + 1, SIZE, SIZE))
    inputs = jax.tree.map(jnp.asarray, inputs)
    tangents = jax.tree.map(lambda x: numbers(seed + 2, *x.shape), inputs)
    cotangents = (numbers(seed + 3, SIZE), numbers(seed + 4, 2, SIZE))
    pushed, pulled = _pushed_and_pulled(
        inputs, tangents, cotangents, 10.0**-exponent, jaxode.DiscreteAdjoint(), solver
    )
    # Terms of size one that may cancel.
    np.testing.assert_allclose(pulled, pushed, rtol=1e-8, atol=1e-10)


@pytest.mark.slow
@given(seeds, exponents, st.floats(0.1, 3.0))
def test_training_loss_does_not_see_the_order_of_samples_or_the_scale_of_weights(
    seed, exponent, scale
):
    x, A = 2 * numbers(seed, 4, SIZE), numbers(seed + 1, SIZE, SIZE)
    weights, order = 1 + numbers(seed + 2, 4) / 2, np.random.default_rng(seed).permutation(4)
    loss, gradient = _nll(A, x, weights, 10.0**-exponent)
    other, other_gradient = _nll(A, x[order], scale * weights[order], 10.0**-exponent)
    np.testing.assert_allclose(other, loss, rtol=1e-9)
    np.testing.assert_allclose(other_gradient, gradient, rtol=1e-6, atol=1e-9)


@jax.jit
def _nll(A, x, weights, tolerance):
    flow = jaxode.cnf(nonlinear, jaxode.standard_normal(SIZE), rtol=tolerance, atol=tolerance)
    return jax.value_and_grad(flow.nll)(A, x, weights=weights)
