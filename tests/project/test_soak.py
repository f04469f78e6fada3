"""Training for long: no leak, and nothing compiled again."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxode
from jaxode import divergence
from jaxode.nn import MLP, field


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


@pytest.mark.slow
def test_training_keeps_no_arrays_and_compiles_nothing_again(compiled):
    step, m, key = jax.jit(descend), MLP(2, (8,), key=jax.random.key(0)), jax.random.key(1)
    m, first = train(step, m, 100, key)
    assert compiled
    compiled.clear()
    arrays = len(jax.live_arrays())
    m, losses = train(step, m, 300, key)
    assert not compiled
    assert len(jax.live_arrays()) == arrays
    assert np.mean(losses[-20:]) < np.mean(first[:20])


STATM = Path("/proc/self/statm")


def memory() -> int:
    """What the process holds now, in kilobytes, on Linux; its peak would be that of compiling."""
    pages = int(STATM.read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 1024


def print_growth() -> None:
    """The kilobytes by which 2000 steps grow the process, and 500 that keep 12 kilobytes each."""
    kept = []

    def leaking(m, x, key):
        kept.append(np.ones(12_000, np.int8))
        return step(m, x, key)

    step, key = jax.jit(descend), jax.random.key(1)
    m, _ = train(step, MLP(2, (8,), key=jax.random.key(0)), 500, key)
    before = memory()
    m, _ = train(step, m, 2000, key)
    between = memory()
    train(leaking, m, 500, key)
    print(between - before, memory() - between)


# Two kilobytes a step; the allocator itself moves by less than that.
LIMIT = 4096


@pytest.mark.slow
@pytest.mark.skipif(not STATM.exists(), reason="the memory of a process is read as on Linux")
def test_training_does_not_leak_and_a_leak_would_be_seen():
    """In a separate process: what earlier tests gave back would hide a leak."""
    command = [sys.executable, __file__]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    without, leaked = map(int, output.split())
    assert without < LIMIT < leaked


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    print_growth()
