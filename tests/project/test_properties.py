"""What holds for every state, time, direction, tolerance and pytree.

The examples of a test share their compiled programs: what varies is data, or comes from a short
list. They are the same in each run; the weekly run of CI draws other ones, as does
`JAXODE_TEST_EXAMPLES=random`.
"""

import functools
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
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
tolerances = st.integers(3, 9).map(lambda exponent: 10.0**-exponent)


def numbers(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape))


def state_and_matrix(seed):
    return numbers(seed, SIZE), numbers(seed + 1, SIZE, SIZE)


def nonlinear(t, y, A):
    """With a Lipschitz constant of at most 3 in the maximum norm."""
    return jnp.sin(A @ y + t)


def mirrored(t, y, A):
    return -nonlinear(-t, y, A)


@functools.partial(jax.jit, static_argnames=("f", "batch"))
def run(f, y0, t0, t1, A, tolerance, batch=None):
    return jaxode.solve(f, y0, t0, t1, A, batch=batch, rtol=tolerance, atol=tolerance, throw=False)


def test_weekly_run_of_ci_draws_other_examples():
    ci = (Path(__file__).parents[2] / ".github/workflows/ci.yml").read_text()
    weekly, other = re.findall(r"JAXODE_TEST_EXAMPLES: .*'schedule' && '(.*)' \|\| '(.*)'", ci)[0]
    assert not settings.get_profile(weekly).derandomize
    assert settings.get_profile(other).derandomize


@given(seeds, times, times, tolerances)
def test_forward_then_backward_returns(seed, t0, t1, tolerance):
    y0, A = state_and_matrix(seed)
    there = run(nonlinear, y0, t0, t1, A / SIZE, tolerance)
    back = run(nonlinear, there.y1, t1, t0, A / SIZE, tolerance)
    assert there.ok
    assert back.ok
    assert there.t_reached == t1
    # An error grows by e^4 at most over a span of 4 at Lipschitz constant 1, and twice so on the
    # way back; each of the n steps makes one of at most the tolerance times 1 + |y| <= 6.
    steps = int(there.stats.num_accepted + back.stats.num_accepted)
    bound = 6 * steps * tolerance * np.exp(abs(t1 - t0))
    np.testing.assert_allclose(back.y1, y0, atol=min(bound, 1.0))


@given(seeds, times, times, tolerances)
def test_reversed_time_is_the_negated_field(seed, t0, t1, tolerance):
    y0, A = state_and_matrix(seed)
    forward = run(nonlinear, y0, t0, t1, A, tolerance)
    back = run(mirrored, y0, -t0, -t1, A, tolerance)
    assert forward.stats.num_steps == back.stats.num_steps
    np.testing.assert_allclose(back.y1, forward.y1, rtol=1e-12)


TREES = [
    lambda y: {"b": y[1:], "a": y[0]},
    lambda y: [y[:2].reshape(1, 2), (y[2:], None)],
    lambda y: (y[0], y[1], y[2]),
]


@functools.cache
def on_trees(tree):
    """`nonlinear` on a state of this structure."""
    flat = lambda y: jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(y)])
    order = np.argsort(flat(tree(np.arange(SIZE))))
    return lambda t, y, A: tree(nonlinear(t, flat(y)[order], A))


@given(seeds, times, times, tolerances, st.sampled_from(TREES))
def test_structure_of_the_state_does_not_matter(seed, t0, t1, tolerance, tree):
    y0, A = state_and_matrix(seed)
    expected = tree(run(nonlinear, y0, t0, t1, A, tolerance).y1)
    found = run(on_trees(tree), tree(y0), t0, t1, A, tolerance).y1
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for leaf, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=1e-10)


@given(seeds, times, times, tolerances)
def test_samples_with_steps_of_their_own_may_be_permuted(seed, t0, t1, tolerance):
    z, A = 3 * numbers(seed, 5, SIZE), numbers(seed + 1, SIZE, SIZE)
    order = np.random.default_rng(seed).permutation(5)
    go = lambda z: run(nonlinear, z, t0, t1, A, tolerance, batch="per_sample")
    direct, permuted = go(z), go(z[order])
    np.testing.assert_array_equal(permuted.stats.num_steps, direct.stats.num_steps[order])
    np.testing.assert_allclose(permuted.y1, direct.y1[order], rtol=1e-12)


@jax.jit
def pushed_and_pulled(inputs, tangents, cotangents, tolerance):
    """`w . J v` by forward mode, and by reverse mode."""

    def outputs(y0, t0, t1, theta, A, adjoint=jaxode.DiscreteAdjoint()):
        ts = jnp.stack([t0 + theta * (t1 - t0), t1])
        solution = jaxode.solve(
            nonlinear, y0, t0, t1, A, ts=ts, rtol=tolerance, atol=tolerance, adjoint=adjoint,
            throw=False,
        )  # fmt: skip
        return solution.y1, solution.ys

    product = lambda a, b: sum(map(jnp.vdot, jax.tree.leaves(a), jax.tree.leaves(b)))
    forward = functools.partial(outputs, adjoint=jaxode.ForwardMode())
    _, pushed = jax.jvp(forward, inputs, tangents)
    _, pull = jax.vjp(outputs, *inputs)
    return product(cotangents, pushed), product(pull(cotangents), tangents)


@given(seeds, times, times, st.floats(0.1, 0.9), tolerances)
def test_forward_and_reverse_mode_are_transposes(seed, t0, t1, theta, tolerance):
    """In the state, both times, an output time and the parameters, exactly on the same mesh."""
    y0, A = state_and_matrix(seed)
    inputs = jax.tree.map(jnp.asarray, (y0, t0, t1, theta, A))
    tangents = jax.tree.map(lambda x: numbers(seed + 2, *x.shape), inputs)
    cotangents = (numbers(seed + 3, SIZE), numbers(seed + 4, 2, SIZE))
    pushed, pulled = pushed_and_pulled(inputs, tangents, cotangents, tolerance)
    # Terms of size one that may cancel.
    np.testing.assert_allclose(pulled, pushed, rtol=1e-8, atol=1e-10)
