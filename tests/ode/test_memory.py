"""The memory of gradients is bounded."""

import diffrax
import jax
import jax.numpy as jnp
import pytest
from helpers import METHODS, OPTIMIZED, temporary_bytes

import jaxode
from jaxode.ode.loop.checkpoints import STAGE_BYTES

SIZE = 50_000


def memory(adjoint, size=SIZE, times=None, compiler_options=None, **options):
    """Temporary bytes of a gradient, in states."""
    ts = None if times is None else jnp.linspace(0.0, 1.0, times)

    def run(y0):
        solution = jaxode.solve(
            lambda t, y, _: -jnp.sin(y), y0, 0.0, 1.0, ts=ts, throw=False, adjoint=adjoint,
            **options,
        )  # fmt: skip
        return jnp.sum(solution.y1 if ts is None else solution.ys**2)

    return temporary_bytes(run, jnp.ones(size), options=compiler_options) / (8 * size)


@pytest.mark.slow  # optimizes two programs for their memory alone
def test_checkpoints_not_steps():
    """By default 64, some with stages, what is not kept, and a few states at work."""
    options = {"solver": diffrax.Euler(), "max_steps": 4096, "compiler_options": OPTIMIZED}
    few, many = (memory(jaxode.DiscreteAdjoint(), steps=n, **options) for n in (2_000, 20_000))
    assert 64 < many < 72 + STAGE_BYTES / (8 * SIZE)
    # Ten times the steps cost their times alone, 8 bytes each, in at most four buffers.
    assert many - few < 4 * 18_000 / SIZE


def test_each_checkpoint_is_a_state():
    """And some have stages, too."""
    of = lambda checkpoints: memory(jaxode.DiscreteAdjoint(checkpoints), max_steps=100)
    assert 16 * 0.9 < of(32) - of(16) < 3 * 16


@pytest.mark.slow  # six programs for their memory alone
def test_the_adjoint_ode_keeps_its_outputs_alone():
    of = lambda *times, **options: memory(jaxode.BacksolveAdjoint(), 10_000, *times, **options)
    assert of(max_steps=100) == of(max_steps=10**6)
    assert of(steps=10) == of(steps=10**6)
    # Each output costs itself, its cotangent and one copy.
    assert of(100) - of(10) < 3.1 * 90


@pytest.mark.slow  # two programs for their memory alone
def test_steps_of_each_row_cost_their_times():
    """In numbers a row."""

    def of(max_steps, rows=256):
        loss = lambda z: jnp.sum(
            jaxode.flow(
                lambda t, y, args: -y, z, 0.0, 1.0, batch="per_sample", throw=False,
                max_steps=max_steps,
            )
        )  # fmt: skip
        return temporary_bytes(loss, jnp.ones((rows, 2))) / (8 * rows)

    assert of(4096) - of(256) == pytest.approx(4096 - 256, rel=0.01)


@pytest.mark.slow  # two programs for their memory alone
@pytest.mark.parametrize("name", ["discrete", "backsolve"])
def test_parameter_gradient_is_one_copy_whatever_the_batch(name):
    """1.5 million parameters, batch 1000, per-sample steps."""
    m = jaxode.nn.ConcatSquash(4, (1220, 1220), key=jax.random.key(0))
    m = jax.tree.map(lambda x: x.astype(jnp.float32), m)
    size = sum(leaf.size for leaf in jax.tree.leaves(m)) * 4
    assert size > 1.49e6 * 4

    def run(m, z):
        return jnp.sum(
            jaxode.flow(jaxode.nn.field, z, 0.0, 1.0, m, batch="per_sample", throw=False,
                        adjoint=METHODS[name].adjoint, max_steps=64)
        )  # fmt: skip

    small, large = (
        temporary_bytes(run, m, jnp.ones((batch, 4), jnp.float32)) for batch in (10, 1000)
    )
    # The batch adds activations of a few layers, not 990 gradients of 6 MB each.
    assert large - small < 11 * 1000 * 1220 * 4
    # No room for a second copy beside the gradient, nor in the loop.
    assert small < 1.5 * size
