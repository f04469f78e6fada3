"""Jumps: against closed forms, and against solves from one jump to the next by hand."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    assert_close,
    typed,
)
from jax.sharding import PartitionSpec as P

import jaxode

END = 4.0
TS = np.array([0.0, 0.7, 1.0, 2.2, 4.0])
# A row with a jump at its start, one with a jump at its end, and one without any.
TIMES = np.array([[0.5, 1.0, 2.5], [0.0, 1.1, np.inf], [1.0, 2.0, END], [np.inf] * 3])
COUNTS = [3, 2, 3, 0]
Y0 = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)))
ARGS = jnp.array([[0.2, 1.1], [-0.9, -0.1]])
AMOUNTS = jnp.asarray(np.random.default_rng(1).uniform(1, 2, size=(3, 2)))
OPTIONS = {"rtol": 1e-6, "atol": 1e-8, "max_steps": 64}


def field(t, y, a):
    return jnp.tanh(a @ y) + 0.3 * jnp.sin(t) * y


def change(t, y, a, i):
    return 0.8 * y + AMOUNTS[i] + 0.1 * t * a[0]


def in_one_call(y0, times, **options):
    """NaN for a solve that fails."""
    given = OPTIONS | {"throw": False} | options
    return jaxode.solve(field, y0, 0.0, END, ARGS, jumps=jaxode.Jumps(times, change), **given)


def by_hand(y, times, **options):
    """The end and the outputs of one system, which raises, and the evaluations of all pieces."""
    edges, ys, evals = [0.0, *times, END], [], 0
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        inside = TS[(end >= TS) & ((start < TS) | (i == 0))]
        # As many in each piece, for one program: the end fills up.
        ts = np.append(inside, np.full(len(TS) - len(inside), end))
        s = jaxode.solve(field, y, start, end, ARGS, ts=ts, **OPTIONS | options)
        ys, evals = [*ys, np.asarray(s.ys)[: len(inside)]], evals + s.stats.num_evals
        y = s.y1 if i == len(times) else change(end, s.y1, ARGS, i)
    return y, np.concatenate(ys), evals


@functools.cache
def all_by_hand():
    rows = [by_hand(Y0[i], TIMES[i, : COUNTS[i]]) for i in range(4)]
    return [jnp.stack(x) for x in zip(*rows, strict=True)]


@pytest.mark.parametrize("ragged", [pytest.param(False, marks=pytest.mark.slow), True])
def test_equal_to_solves_from_jump_to_jump(ragged):
    """To 1e-12, with no more evaluations; padding costs none."""
    ts = np.broadcast_to(TS, (4, 5)) if ragged else TS
    s = in_one_call(Y0, TIMES, ts=ts, batch="per_sample")
    y1, ys, evals = all_by_hand()
    assert_close((s.y1, s.ys), (y1, ys if ragged else ys.swapaxes(0, 1)), 1e-12)
    np.testing.assert_array_equal(s.stats.num_evals, evals)
    np.testing.assert_array_equal(s.t_reached, END)


@pytest.mark.slow
def test_one_system_and_joint_steps():
    y1, ys, evals = (x[0] for x in all_by_hand())
    s = in_one_call(Y0[0], TIMES[0], ts=TS)
    assert_close((s.y1, s.ys), (y1, ys), 1e-12)
    assert s.stats.num_evals == evals
    y1, ys, evals = by_hand(Y0[0], TIMES[0], steps=8)
    s = in_one_call(Y0, TIMES[0], ts=TS, steps=8, batch="joint")
    assert_close((s.y1[0], s.ys[:, 0]), (y1, ys), 1e-12)
    assert s.stats.num_evals == evals


@pytest.mark.slow
def test_padding_repeats_or_is_infinite():
    """And has no derivative."""
    repeated = np.where(np.isinf(TIMES), 1.1, TIMES)[:3]
    run = jax.jit(
        jax.value_and_grad(lambda times: jnp.sum(in_one_call(Y0[:3], times, batch="per_sample").y1))
    )
    found, expected = run(jnp.asarray(repeated)), run(jnp.asarray(TIMES[:3]))
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[1] != 0, np.isfinite(TIMES[:3]))


def test_backwards_and_in_both_directions():
    """The change is applied in order of travel."""
    start, end = np.array([0.0, 2.0]), np.array([2.0, 0.0])
    times = np.array([[0.5, 1.5], [1.5, 0.5]])
    jumps = jaxode.Jumps(times, lambda t, y, a, i: y + (i + 1).astype(y.dtype))
    ts = np.array([[0.5, 1.0], [1.5, 0.0]])
    s = jaxode.solve(
        lambda t, y, _: 0 * y, jnp.zeros((2, 1)), start, end, jumps=jumps, ts=ts,
        batch="per_sample",
    )  # fmt: skip
    np.testing.assert_array_equal(s.ys[..., 0], [[0.0, 1.0], [0.0, 3.0]])
    np.testing.assert_array_equal(s.y1, [[3.0], [3.0]])


# 256 subjects with 12 doses each, which are absorbed at first order, with their own parameters.
SUBJECTS, DOSES = 256, 12


def subjects():
    rng = np.random.default_rng(0)
    draw = lambda low, high, *shape: jnp.asarray(rng.uniform(low, high, (SUBJECTS, *shape)))
    rates = draw(0.8, 1.2), draw(0.05, 0.2)
    return jnp.sort(draw(0.0, 40.0, DOSES)), draw(1.0, 2.0, DOSES), rates, jnp.sort(draw(0, 48, 3))


def central(times, amounts, rates, ts):
    """The amount in the central compartment, of one subject, by superposition of its doses."""
    absorbed, cleared = rates
    since = ts[:, None] - times[None]
    past = jnp.maximum(since, 0.0)
    factor = absorbed / (absorbed - cleared)
    curve = factor * (jnp.exp(-cleared * past) - jnp.exp(-absorbed * past))
    return jnp.sum(jnp.where(since > 0, amounts[None] * curve, 0.0), axis=1)


def absorbed_doses(times, amounts, rates, ts):
    def model(t, y, args):
        absorbed, cleared = args[1]["rates"]
        return jnp.stack([-absorbed * y[0], absorbed * y[0] - cleared * y[1]])

    jumps = jaxode.Jumps(times, lambda t, y, args, i: y.at[0].add(args[1]["amounts"][i]))
    rows = {"amounts": amounts, "rates": rates}
    return jaxode.solve(
        model, jnp.zeros((SUBJECTS, 2)), 0.0, 48.0, row_args=rows, ts=ts, jumps=jumps,
        batch="per_sample", rtol=1e-8, atol=1e-8, max_steps=256,
    )  # fmt: skip


@pytest.mark.slow
def test_subjects_with_doses():
    """To 1e-6, and the gradients by amounts and times to 1e-5."""
    data = subjects()

    def loss(of):
        def total(*data):
            ys = of(*data)
            return jnp.sum(ys**2), ys

        return jax.jit(jax.value_and_grad(total, (0, 1, 2), has_aux=True))

    (_, ys), bars = loss(lambda *data: absorbed_doses(*data).ys[..., 1])(*data)
    (_, exact), exact_bars = loss(jax.vmap(central))(*data)
    np.testing.assert_allclose(ys, exact, atol=1e-6)
    assert_close(bars, exact_bars, 1e-5)


@pytest.mark.slow
def test_a_row_that_fails_fails_alone():
    """Masked, it adds nothing to any gradient; otherwise all shared gradients are NaN."""

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(args, y0, times, keep):
        jumps = jaxode.Jumps(times, lambda t, y, a, i: y * a[0, i % 2] + 1.0)
        s = jaxode.solve(
            field, y0, 0.0, END, args, ts=TS, jumps=jumps, batch="per_sample", throw=False,
            **OPTIONS,
        )  # fmt: skip
        ys = jnp.where(keep[None, :, None], s.ys, 0.0)
        return jnp.sum(ys) + jnp.sum(jnp.where(keep[:, None], s.y1, 0.0)), s

    y0, times = Y0[:3], jnp.asarray(TIMES[:3])
    others, every = jnp.array([True, False, True]), jnp.ones(3, bool)
    expected, right = run(ARGS, y0, times, others)
    assert right.ok.all()
    for given, code in (
        ((y0, times.at[1].set(jnp.array([1.0, 0.5, np.inf]))), jaxode.Result.INVALID_ARGUMENT),
        ((y0.at[1].set(jnp.nan), times), jaxode.Result.NON_FINITE),
    ):
        bar, s = run(ARGS, *given, others)
        assert list(s.result) == [0, code, 0]
        assert np.isnan(s.ys[:, 1]).all()
        assert np.isnan(s.y1[1]).all()
        assert_close((bar, s.ys[:, ::2]), (expected, right.ys[:, ::2]), 1e-12)
        assert np.isnan(run(ARGS, *given, every)[0]).all()


def decay(t, y, _):
    return -y


@pytest.mark.slow
def test_a_change_is_differentiated_only_where_it_happens():
    """At the end of the solve, its square root is that of a negative number."""

    def end(a):
        jumps = jaxode.Jumps([0.1], lambda t, y, a, i: jnp.sqrt(y - a))
        return jaxode.solve(decay, jnp.ones(1), 0.0, 2.0, a, jumps=jumps).y1[0]

    slope = -0.5 * np.exp(-1.9) / np.sqrt(np.exp(-0.1) - 0.5)
    slope_and_itself = lambda a: (s := jax.grad(end)(a), s)
    second, first = jax.jit(jax.jacfwd(slope_and_itself, has_aux=True))(0.5)
    np.testing.assert_allclose(first, slope, rtol=1e-4)
    np.testing.assert_allclose(second, slope / 2 / (np.exp(-0.1) - 0.5), rtol=1e-3)


def test_a_change_that_is_not_finite_adds_nothing_where_it_is_masked():
    """One subject of two has no record of its dose."""

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def run(factor, masked, doses):
        take = lambda t, y, args, i: y + args[0] * args[1]
        s = jaxode.solve(
            decay, jnp.zeros(2), 0.0, 2.0, factor, row_args=doses, batch="per_sample", throw=False,
            jumps=jaxode.Jumps([1.0], take),
        )  # fmt: skip
        return jnp.sum(jnp.where(s.ok | ~masked, s.y1, 0.0)), s.result

    gradient, result = run(1.0, True, jnp.array([100.0, jnp.nan]))
    assert list(result) == [0, jaxode.Result.NON_FINITE_CHANGE]
    np.testing.assert_allclose(gradient, 100 * np.exp(-1), rtol=1e-4)
    assert np.isnan(run(1.0, False, jnp.array([100.0, jnp.nan]))[0])


@pytest.mark.slow
def test_a_failure_between_two_jumps_is_the_first():
    """The field explodes after the second jump; the outputs before are NaN, too."""
    blow = lambda t, y, _: jnp.where(y > 10, y**2, 0.0)
    jumps = jaxode.Jumps(np.array([1.0, 2.0, 3.0]), lambda t, y, a, i: jnp.where(i == 1, 20.0, y))
    run = lambda **options: jaxode.solve(
        blow, jnp.ones(1), 0.0, 4.0, ts=np.array([0.5, 3.5]), jumps=jumps, **options
    )
    s = run(throw=False)
    assert s.result != jaxode.Result.SUCCESS
    assert 2 < s.t_reached < 2.1
    assert np.isnan(s.ys).all()
    with pytest.raises(jaxode.SolveError, match=r"at t=2.0\d+"):
        run()

    def end(t1, times):
        jumps = jaxode.Jumps(times, lambda t, y, a, i: jnp.where(i == 1, 20.0, y))
        return jaxode.solve(blow, jnp.ones(1), 0.0, t1, jumps=jumps, throw=False).y1[0]

    # Also by times after the failure.
    slope, slopes = jax.jit(jax.grad(end, (0, 1)))(4.0, jnp.array([1.0, 2.0, 3.0]))
    assert np.isnan([slope, *slopes[1:]]).all()


def test_a_change_that_is_not_finite_is_named():
    """In the middle, and at the end, where nothing follows."""
    told = "the state after a change is not finite at t="
    times = (1.0, END)
    jumps = jaxode.Jumps(times, lambda t, y, infinite, i: jnp.where(i == infinite, y / 0.0, y))
    for infinite, time in enumerate(times):
        with pytest.raises(jaxode.SolveError, match=f"^solve: {told}{time:g}. Check the change"):
            jaxode.solve(decay, jnp.ones(1), 0.0, END, jnp.asarray(infinite), jumps=jumps)


@pytest.mark.slow
@typed
def test_rows_over_devices():
    found = on_devices(
        lambda y0, times: in_one_call(y0, times, ts=TS, batch="per_sample", throw=True).y1
    )(Y0, jnp.asarray(TIMES))  # fmt: skip
    assert_close(found, all_by_hand()[0], 1e-12)


def on_devices(f):
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("d"), out_specs=P("d")))


def joint(y0, scale, axis_name=None):
    grow = lambda t, y, a, i: y * jnp.where(y > 2, a[1], 1.0)
    return jaxode.solve(
        lambda t, y, a: field(t, y, a[0]), y0, 0.0, END, (ARGS, scale[0]), batch="joint",
        jumps=jaxode.Jumps(TIMES[0], grow), axis_name=axis_name, throw=False,
    ).y1  # fmt: skip


JOINT_ALONE = jax.jit(joint)


@functools.cache
def joint_on_devices():
    return on_devices(functools.partial(joint, axis_name="d"))


@typed
@pytest.mark.parametrize("scale", [1.0, np.inf])
def test_devices_that_share_their_steps(scale):
    """Where one of them alone fails, at the second jump, the others stop with it."""
    y0, scale = Y0.at[0].set(5.0), np.full(2, scale)  # one number for each device
    found = joint_on_devices()(y0, scale)
    assert_close(found, JOINT_ALONE(y0, scale), 1e-12)
    assert np.isnan(found).all() == (scale > 1).all()


TOLD = r"solve\(jumps=...\): "


@pytest.mark.slow
def test_known_times_of_outputs_in_a_program():
    """Also as NumPy arrays, whose order is checked at once."""
    run = lambda ts: jax.jit(lambda y0: in_one_call(y0, TIMES[0], ts=ts).ys)(Y0[0])
    found = run(TS)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, run(jnp.asarray(TS)))
    with pytest.raises(ValueError, match=r"solve\(ts=...\): times must increase"):
        run(TS[::-1])


def test_times_that_float32_cannot_tell_apart(default_settings):
    jumps = jaxode.Jumps(np.array([1e4, 1e4 + 1e-4]), lambda t, y, args, i: y + 1)
    with pytest.raises(ValueError, match=TOLD + "times are lost in the precision of float32"):
        jaxode.solve(lambda t, y, _: -y, jnp.ones(1), 1e4 - 1, 1e4 + 1, jumps=jumps)
    # Beside a long span the gap is nothing, but a change is not.
    jumps = jaxode.Jumps(np.array([9e5, 9e5 + 0.02]), lambda t, y, args, i: y + 1)
    run = lambda t1: jaxode.solve(
        lambda t, y, _: -y, jnp.ones(1), 0.0, t1, jumps=jumps, throw=False
    )
    with pytest.raises(ValueError, match=TOLD + "times are lost in the precision of float32"):
        run(1e6)
    assert jax.jit(run)(1e6).result == jaxode.Result.INVALID_ARGUMENT
