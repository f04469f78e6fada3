"""Jumps: their work, changes that fail or are not defined, and devices that share their steps.

Rows, outputs, gradients and failures are those of every feature: `test_features.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import KINDS, METHODS, assert_close, of_feature
from jax.sharding import PartitionSpec as P

import jaxode

END = 4.0
Y0 = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
ARGS = jnp.array([[0.2, 1.1], [-0.9, -0.1]])


def field(t, y, a):
    return jnp.tanh(a @ y) + 0.3 * jnp.sin(t) * y


def decay(t, y, _):
    return -y


def kept(t, y, args, i):
    return y


def test_as_much_work_as_solves_from_jump_to_jump():
    """Padding costs none."""
    times = np.array([[0.5, 1.0, np.inf, np.nan], [0.5, 1.0, np.nan, np.inf], [0.5, *[np.nan] * 3]])
    s = jaxode.solve(
        decay, jnp.ones((3, 1)), 0.0, END, jumps=jaxode.Jumps(times, kept), batch="per_sample"
    )
    pieces = [(0.0, 0.5), (0.5, 1.0), (1.0, END), (0.5, END)]
    one, two, three, rest = (
        jaxode.solve(decay, jnp.full(1, np.exp(-t0)), t0, t1).stats.num_evals for t0, t1 in pieces
    )
    np.testing.assert_array_equal(s.stats.num_evals, [one + two + three] * 2 + [one + rest])


@pytest.mark.parametrize("name", of_feature(KINDS))
def test_jumps_at_one_time_happen_in_their_order(name):
    """At both ends and between them, with gradients by each time."""
    times, a = jnp.array([0.0, 0.0, 1.5, 1.5, END, END]), jnp.asarray(0.3)

    def add_or_double(t, y, a, i):
        return jnp.where(i % 2 == 0, y + a, 2 * y)

    def end(times, a):
        jumps = jaxode.Jumps(times, add_or_double)
        options = METHODS[name].options(rtol=1e-10, atol=1e-10, max_steps=400)
        ts = jnp.array([0.0, 1.5, 2.0, END])
        s = jaxode.solve(decay, jnp.ones(1), 0.0, END, a, jumps=jumps, ts=ts, **options)
        return s.y1[0], s.ys[:, 0]

    def exact(times, a):
        y, t = 1.0, 0.0
        for i, time in enumerate(times):
            y, t = add_or_double(time, y * jnp.exp(t - time), a, i), time
        return y * jnp.exp(t - END)

    slopes, ys = jax.jit(METHODS[name].gradient(end, (0, 1), has_aux=True))(times, a)
    assert_close(slopes, jax.grad(exact, (0, 1))(times, a), 1e-7)
    at = 2 * (1 + a) * np.exp(-1.5)
    after = [2 * (at + a) * np.exp(1.5 - t) for t in (2.0, END)]
    assert_close(ys, jnp.stack([jnp.ones(()), at, *after]), 1e-8)


def test_a_change_is_differentiated_only_where_it_happens():
    """At the end of the solve, its square root is that of a negative number."""

    def end(a):
        jumps = jaxode.Jumps([0.1], lambda t, y, a, i: jnp.sqrt(y - a))
        return jaxode.solve(decay, jnp.ones(1), 0.0, 2.0, a, jumps=jumps, throw=False).y1[0]

    slope = -0.5 * np.exp(-1.9) / np.sqrt(np.exp(-0.1) - 0.5)
    np.testing.assert_allclose(jax.jit(jax.grad(end))(0.5), slope, rtol=1e-4)


@pytest.mark.slow  # rows that fail between doses: `test_features.py`
def test_a_failure_between_two_jumps_is_the_first():
    """The field explodes after the second jump: NaN by each time, also by later ones."""
    blow = lambda t, y, _: jnp.where(y > 10, y**2, 0.0)

    def total(t1, times):
        jumps = jaxode.Jumps(times, lambda t, y, a, i: jnp.where(i == 1, 20.0, y))
        ts = jnp.array([0.5, 3.5])
        s = jaxode.solve(blow, jnp.ones(1), 0.0, t1, ts=ts, jumps=jumps, throw=False)
        return jnp.sum(s.ys), s

    bars, s = jax.jit(jax.grad(total, (0, 1), has_aux=True))(4.0, jnp.array([1.0, 2.0, 3.0]))
    assert s.result == jaxode.Result.STEP_SIZE_UNDERFLOW
    assert 2 < s.t_reached < 2.1
    assert np.isnan(s.ys).all()
    assert np.isnan([bars[0], *bars[1][1:]]).all()


def test_a_change_that_is_not_finite_is_named():
    """In the middle, and at the end, where nothing follows."""
    told = "the state after a change is not finite at t="
    times = (1.0, END)
    jumps = jaxode.Jumps(times, lambda t, y, infinite, i: jnp.where(i == infinite, y / 0.0, y))
    for infinite, time in enumerate(times):
        with pytest.raises(jaxode.SolveError, match=f"^solve: {told}{time:g}. Check the change"):
            jaxode.solve(decay, jnp.ones(1), 0.0, END, jnp.asarray(infinite), jumps=jumps)


def on_devices(f):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))


def joint(y0, scale, axis_name=None):
    grow = lambda t, y, a, i: y * jnp.where(y > 2, a[1], 1.0)
    return jaxode.solve(
        lambda t, y, a: field(t, y, a[0]), y0, 0.0, END, (ARGS, scale[0]), batch="joint",
        jumps=jaxode.Jumps([0.5, 1.0, 2.5], grow), axis_name=axis_name, throw=False,
    ).y1  # fmt: skip


JOINT_ALONE = jax.jit(joint)


@functools.cache
def joint_on_devices():
    return on_devices(functools.partial(joint, axis_name="d"))


@pytest.mark.parametrize("scale", [1.0, np.inf])
def test_devices_that_share_their_steps(scale):
    """Where one of them alone fails, at the second jump, the others stop with it."""
    y0, scale = Y0.at[0].set(5.0), np.full(2, scale)  # one number for each device
    found = joint_on_devices()(y0, scale)
    assert_close(found, JOINT_ALONE(y0, scale), 1e-12)
    assert np.isnan(found).all() == (scale > 1).all()


TOLD = r"solve\(jumps=...\): "


def test_times_that_float32_cannot_tell_apart(default_settings):
    jumps = jaxode.Jumps(np.array([1e4, 1e4 + 1e-4]), lambda t, y, args, i: y + 1)
    with pytest.raises(ValueError, match=TOLD + "times are lost in the precision of float32"):
        jaxode.solve(lambda t, y, _: -y, jnp.ones(1), 1e4 - 1, 1e4 + 1, jumps=jumps)
    # Beside a long span the gap is nothing: two changes at one time.
    jumps = jaxode.Jumps(np.array([9e5, 9e5 + 0.02]), lambda t, y, args, i: y + 1)
    run = lambda t1: jaxode.solve(lambda t, y, _: 0 * y, jnp.ones(1), 0.0, t1, jumps=jumps)
    assert run(1e6).y1 == jax.jit(run)(1e6).y1 == 3
