"""Absolute tolerances of each number of a state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AT_RUN_TIME, METHODS, REVERSE, assert_close, with_slow
from problems import STIFF

import jaxode

# Powers of two, so that rounding is the same in all units.
UNITS = {"a": np.array([2.0**-20, 2.0**10]), "b": np.array(2.0**-3)}
ATOL = 1e-5
SCALED = jax.tree.map(lambda unit: ATOL * unit, UNITS)
RNG = np.random.default_rng(0)
Y0 = {"a": RNG.normal(size=(3, 2)), "b": RNG.normal(size=3)}
TS, RATE = jnp.array([0.3, 1.5]), jnp.array(3.0)


def field(t, y, rate):
    a, b = y["a"], y["b"]
    return {"a": jnp.stack([jnp.sin(a[1] * b), -rate * a[0]]), "b": -b * a[0] + jnp.cos(t)}


def in_units(t, z, rate):
    """The same for `z = UNITS y`."""
    y = jax.tree.map(lambda z, unit: z / unit, z, UNITS)
    return jax.tree.map(lambda dy, unit: unit * dy, field(t, y, rate), UNITS)


def of_units(ys, inverse=False):
    """In the new units, or back in the old ones."""
    if isinstance(ys, tuple):
        return tuple(of_units(y, inverse) for y in ys)

    def scale(y, unit):
        unit = np.reshape(unit, (1,) * (y.ndim - unit.ndim) + unit.shape)
        return y / unit if inverse else y * unit

    return None if ys is None else jax.tree.map(scale, ys, UNITS)


CASES = {
    "per-sample steps": {"batch": "per_sample"},
    "joint steps": {"batch": "joint"},
    "Rodas5P": {"batch": "per_sample", "solver": jaxode.Rodas5P()},
}


@pytest.mark.parametrize("case", with_slow(CASES, ["joint steps"]))  # which `test_vmap` has
def test_scaled_units_take_the_same_steps(case):
    options = {"t0": 0.0, "t1": 2.0, "args": 3.0, "ts": TS} | CASES[case]
    plain = jaxode.solve(field, Y0, atol=ATOL, **options)
    scaled = jaxode.solve(in_units, of_units(Y0), atol=SCALED, **options)
    jax.tree.map(np.testing.assert_array_equal, scaled.stats, plain.stats)
    assert np.all(plain.stats.num_steps > 3)
    assert_close(scaled.y1, of_units(plain.y1), 1e-12)
    assert_close(scaled.ys, of_units(plain.ys), 1e-12)


def end(y0, rate, in_new_units, **options):
    """Solved in one of the units, and returned in the old ones."""
    f, atol = (in_units, SCALED) if in_new_units else (field, ATOL)
    given = {"ts": TS, "batch": "per_sample", "rtol": 1e-6, "max_steps": 128, "atol": atol}
    y0 = of_units(y0) if in_new_units else y0
    s = jaxode.solve(f, y0, 0.0, 2.0, rate, throw=False, **given | options)
    return of_units((s.y1, s.ys), inverse=True) if in_new_units else (s.y1, s.ys)


@pytest.mark.slow  # of the same steps, or of a tolerance that is tested above
@pytest.mark.parametrize("name", REVERSE)
def test_gradients(name):
    """A solve of its own back keeps to the smallest tolerance."""

    def total(y0, rate, in_new_units):
        ys = end(y0, rate, in_new_units, adjoint=METHODS[name].adjoint)
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(ys))

    derive = jax.jit(jax.grad(total, (0, 1)), static_argnums=2)
    found, expected = (derive(Y0, RATE, in_new_units) for in_new_units in (True, False))
    # Of the same steps, or of the same solution to the tolerance.
    assert_close(found, expected, 1e-10 if METHODS[name].exact else 1e-4)


@pytest.mark.slow  # rows have the same
def test_vmap():
    """Over tolerances of each number, and over batches."""
    run = lambda atol, y0: end(y0, RATE, True, atol=atol, batch="joint", ts=None)[0]
    both = lambda tree: jax.tree.map(lambda x: jnp.stack([x, x / 10]), tree)
    found = jax.jit(jax.vmap(run))(both(SCALED), both(Y0))
    alone = jax.tree.map(lambda x: x / 10, (SCALED, Y0))
    assert_close(jax.tree.map(lambda x: x[1], found), jax.jit(run)(*alone), 1e-12)


def test_an_empty_state():
    found = jaxode.solve(lambda t, y, a: -y, jnp.zeros(0), 0.0, 1.0, atol=np.array([1e-3]))
    assert found.y1.shape == (0,)


@pytest.mark.slow  # a number of steps of a stiff problem
def test_a_species_that_is_never_large():
    """Robertson's second, of 1e-5: the tolerance of the others would leave it alone."""
    problem = STIFF[0]

    def error_and_steps(atol):
        s = jaxode.solve(
            problem.f, problem.y0, 0.0, problem.t1, problem.args, solver=jaxode.Rodas5P(),
            rtol=1e-6, atol=atol,
        )  # fmt: skip
        return abs(s.y1[1] / problem.end[1] - 1), s.stats.num_steps

    error, steps = error_and_steps([1e-6, 1e-10, 1e-6])
    assert error < 0.4 * error_and_steps(1e-6)[0]
    assert steps < error_and_steps(1e-10)[1]


def test_a_traced_one_that_breaks_its_rule():
    @jax.jit
    def run(atol, rtol):
        f = lambda t, y, args: -y
        return jaxode.solve(f, jnp.ones(2), 0.0, 1.0, atol=atol, rtol=rtol).y1

    assert jnp.isfinite(run(jnp.array([0.0, 1e-5]), 1e-5)).all()
    denormal = jnp.array([0.0, 1e-310])
    with pytest.raises(AT_RUN_TIME, match=r"solve\(rtol=..., atol=...\): "):
        jax.block_until_ready(run(denormal, 0.0))
    for rtol, argument in ((1e-5, "atol=..."), (0.0, "rtol=..., atol=...")):
        with pytest.raises(AT_RUN_TIME, match=rf"solve\({argument}\): "):
            jax.block_until_ready(run(jnp.array([-1e-5 if rtol else 0.0, 1e-5]), rtol))
