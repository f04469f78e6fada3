"""Training for long: no leak, and nothing compiled again."""

import gc
import sys

import jax
import pytest

import jaxode
from jaxode.nn import MLP, field


@jax.value_and_grad
def gradient(m, x, key):
    """Of a flow that is made anew each time, as by a user who has no place to keep it."""
    flow = jaxode.cnf(
        field, jaxode.standard_normal(2), rtol=1e-3, atol=1e-3,
        divergence=jaxode.divergence.hutchinson(),
    )  # fmt: skip
    return flow.nll(m, x, key=key)


def held():
    """The arrays, and the blocks of memory that Python has given."""
    gc.collect()
    return len(jax.live_arrays()), sys.getallocatedblocks()


@pytest.mark.slow  # trains for 600 steps
@pytest.mark.parametrize("step", [jax.jit(gradient), gradient], ids=["compiled", "one by one"])
def test_training_keeps_nothing_and_compiles_nothing_again(step, compiled):
    key, steps, kept = jax.random.key(1), 100, []

    def train(m, keep=lambda x: None):
        for i in range(steps):
            x_key, probe_key = jax.random.split(jax.random.fold_in(key, i))
            _, slopes = step(m, 0.5 * jax.random.normal(x_key, (8, 2)), probe_key)
            keep(slopes)
            m = jax.tree.map(lambda leaf, slope: leaf - 0.02 * slope, m, slopes)
        return m

    m = train(MLP(2, (8,), key=jax.random.key(0)))
    assert compiled
    compiled.clear()
    arrays, blocks = held()
    m = train(m)
    assert not compiled
    assert held()[0] == arrays
    # Less than two blocks a step, of which an array has more. Python itself moves by one hundred.
    assert held()[1] - blocks < 2 * steps
    train(m, kept.append)
    assert held()[1] - blocks > 2 * steps
