"""Training for long: no leak, and nothing compiled again."""

import resource

import jax
import numpy as np
import pytest

import jaxode
from jaxode import divergence
from jaxode.nn import MLP, field


@pytest.fixture
def compiled():
    """The names of what is compiled."""
    names = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, duration, **_: names.append(name) if "backend_compile" in name else None
    )
    yield names
    jax.monitoring.clear_event_listeners()


def loss(m, x, key):
    flow = jaxode.cnf(
        field, jaxode.standard_normal(2), divergence=divergence.hutchinson(), rtol=1e-3, atol=1e-3
    )
    return flow.nll(m, x, key=key)


def train(step, m, steps, key):
    losses = []
    for i in range(steps):
        x_key, probe_key = jax.random.split(jax.random.fold_in(key, i))
        x = 0.5 * jax.random.normal(x_key, (8, 2))
        value, m = step(m, x, probe_key)
        losses.append(float(value))
    return m, losses


def descend(m, x, key):
    value, gradient = jax.value_and_grad(loss)(m, x, key)
    return value, jax.tree.map(lambda leaf, bar: leaf - 0.02 * bar, m, gradient)


def peak_memory() -> int:
    """In kilobytes, on Linux; a growing peak is a growing process."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.slow
def test_training_neither_leaks_nor_compiles_again(compiled):
    step, m, key = jax.jit(descend), MLP(2, (8,), key=jax.random.key(0)), jax.random.key(1)
    m, first = train(step, m, 200, key)
    assert compiled
    compiled.clear()
    arrays, memory = len(jax.live_arrays()), peak_memory()
    m, losses = train(step, m, 2000, key)
    assert not compiled
    assert len(jax.live_arrays()) == arrays
    # Two kilobytes a step; the allocator itself moves by less than that.
    assert peak_memory() - memory < 4096
    assert np.mean(losses[-20:]) < np.mean(first[:20])
