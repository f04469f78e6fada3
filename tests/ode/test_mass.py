"""Mass matrices: algebraic equations, full matrices, exact gradients, and what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode

TIGHT = {"solver": jaxode.Rodas5P(), "rtol": 1e-9, "atol": 1e-12, "max_steps": 1024}
RATES = jnp.array([0.04, 1e4, 3e7])
START, SINGULAR = jnp.array([1.0, 0.0, 0.0]), np.diag([1.0, 1.0, 0.0])


def robertson(t, y, k):
    first, second = -k[0] * y[0] + k[1] * y[1] * y[2], k[2] * y[1] ** 2
    return jnp.stack([first, -first - second, second])


def conserved(t, y, k):
    return robertson(t, y, k).at[2].set(y.sum() - 1.0)


def as_ode(k, t1=40.0, **options):
    return jaxode.solve(robertson, START, 0.0, t1, k, **TIGHT, **options)


def as_dae(k, t1=40.0, **options):
    return jaxode.solve(conserved, START, 0.0, t1, k, mass=SINGULAR, **TIGHT, **options)


@functools.cache
def derivatives(solve):
    """`(k, t1, ts, weights) -> (its gradient, solution)` of a sum of an end and of outputs."""

    def total(k, t1, ts, weights):
        solution = solve(k, t1, ts=ts, throw=False)
        return weights @ jnp.stack([solution.y1[0], solution.ys[:, 2].sum()]), solution

    return jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))


TIMES, OF_END, OF_OUTPUTS = jnp.array([0.4, 4.0]), jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0])


def test_robertson_as_a_dae_is_that_of_the_ode():
    ode, dae = (derivatives(f)(RATES, 40.0, TIMES, OF_END)[1] for f in (as_ode, as_dae))
    np.testing.assert_allclose(dae.ys, ode.ys, rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(dae.y1, ode.y1, rtol=1e-8, atol=1e-12)
    assert int(dae.stats.num_steps) <= 1.05 * int(ode.stats.num_steps)


def test_derivatives_are_those_of_the_ode():
    of = lambda solve, weights: derivatives(solve)(RATES, 40.0, TIMES, weights)[0]
    (by_k, by_t1, _), expected = of(as_dae, OF_END), of(as_ode, OF_END)
    np.testing.assert_allclose(by_k, expected[0], rtol=1e-8)
    np.testing.assert_allclose(by_t1, expected[1], rtol=1e-8)
    by_times, expected = of(as_dae, OF_OUTPUTS)[2], of(as_ode, OF_OUTPUTS)[2]
    np.testing.assert_allclose(by_times, expected, rtol=1e-6)


def test_a_full_matrix_multiplies_the_derivative_in_rows_too():
    mass = np.array([[2.0, 1.0, 0.0], [0.0, 1.0, 0.5], [0.3, 0.0, 1.0]])
    field = lambda t, y, args: jnp.asarray(mass) @ robertson(t, y, args[1] * RATES)
    factors = jnp.array([0.5, 1.0])

    def total(factors):
        rows = {"row_args": factors, "batch": "per_sample"}
        y0 = jnp.tile(START, (2, 1))
        ends = jaxode.solve(field, y0, 0.0, 40.0, mass=mass, throw=False, **rows, **TIGHT).y1[:, 0]
        return ends.sum(), ends

    slopes, ends = jax.jit(jax.grad(total, has_aux=True))(factors)
    for end, slope, factor in zip(ends, slopes, factors, strict=True):
        (by_k, *_), alone = derivatives(as_ode)(factor * RATES, 40.0, TIMES, OF_END)
        np.testing.assert_allclose(end, alone.y1[0], rtol=1e-8)
        np.testing.assert_allclose(slope, by_k @ RATES, rtol=1e-6)


@pytest.mark.slow  # a second problem with a reference
def test_akzo_nobel_ends_at_its_reference():
    """Six species, one of them in equilibrium. Reference: the IVP test set, chemical Akzo Nobel."""
    ks = 115.83

    def field(t, y, _):
        r1 = 18.7 * y[0] ** 4 * jnp.sqrt(y[1])
        r2, r3, r4 = 0.58 * y[2] * y[3], 0.58 / 34.4 * y[0] * y[4], 0.09 * y[0] * y[3] ** 2
        r5, inflow = 0.42 * y[5] ** 2 * jnp.sqrt(y[1]), 3.3 * (0.9 / 737 - y[1])
        return jnp.stack(
            [
                -2 * r1 + r2 - r3 - r4,
                -0.5 * r1 - r4 - 0.5 * r5 + inflow,
                r1 - r2 + r3,
                -r2 + r3 - 2 * r4,
                r2 - r3 + r5,
                ks * y[0] * y[3] - y[5],
            ]
        )

    y0 = jnp.array([0.444, 0.00123, 0.0, 0.007, 0.0, ks * 0.444 * 0.007])
    end = jaxode.solve(field, y0, 0.0, 180.0, mass=np.diag([1.0] * 5 + [0.0]), **TIGHT).y1
    reference = [0.1150794920661702, 0.1203831471567715e-2, 0.1611562887407974]
    reference += [0.3656156421249283e-3, 0.1708010885264404e-1, 0.4873531310307455e-2]
    np.testing.assert_allclose(end, reference, rtol=1e-7)


def test_a_program_does_not_check_the_start():
    options = TIGHT | {"mass": SINGULAR, "throw": False}
    end = jax.jit(lambda start: jaxode.solve(conserved, start, 0.0, 1.0, RATES, **options).y1)
    for start in (START, START + 0.5):
        assert end(start).shape == start.shape


@pytest.mark.slow  # two programs for a check
@pytest.mark.parametrize(
    ("field", "y0", "mass"),
    [
        # Rounding in single precision.
        (lambda t, y, k: jnp.stack([-y[0], 1e6 * (y[1] - y[0]) - 3e5 * y[0]]), [0.7, 0.91], 0.0),
        (lambda t, y, k: jnp.stack([-y[0], 1e-12 * (y[0] - y[1])]), [1.0, 50.0], 1e-12),
    ],
    ids=["large rates", "no algebraic equation"],
)
def test_the_start_is_judged_in_units_of_the_state(field, y0, mass):
    y0, options = jnp.array(y0, jnp.float32), {"mass": np.diag([1.0, mass]), "rtol": 1e-6}
    options |= {"solver": jaxode.Rodas5P(), "atol": 1e-9}
    end = jaxode.solve(field, y0, 0.0, 1.0, **options).y1
    np.testing.assert_allclose(end[0], y0[0] * jnp.exp(-1.0), rtol=1e-5)


@pytest.mark.slow  # a third gradient; `test_failed_row` of Jacobians closes over, too
def test_what_the_field_closes_over_has_derivatives():
    over = lambda k: lambda t, y, _: conserved(t, y, k)
    options = {"mass": SINGULAR, "throw": False, **TIGHT}
    closed = lambda k: jaxode.solve(over(k), START, 0.0, 40.0, **options).y1[0]
    expected, *_ = derivatives(as_dae)(RATES, 40.0, TIMES, OF_END)[0]
    np.testing.assert_allclose(jax.jit(jax.grad(closed))(RATES), expected, rtol=1e-8)


def pendulum(t, y, _):
    x, z, u, v, tension = y
    return jnp.stack([u, v, -tension * x, -tension * z - 9.81, x * x + z * z - 1.0])


@pytest.mark.parametrize(
    ("field", "y0", "options", "words"),
    [
        (pendulum, [1.0, 0, 0, 0, 0], {"mass": np.diag([1.0] * 4 + [0.0])}, r"\(index 1\); they"),
        (conserved, [1.0, 0, 0.5], {}, r"y0=\.\.\.\): must fulfil .* off by 0\.5"),
        (
            lambda t, y, k: jnp.stack([-y[0], 1e-9 * (y[1] - y[0] / 2)]),
            [1.0, 50.0],
            {"mass": np.diag([1.0, 0.0])},
            r"number 1 is off by 49\.5 in 1 of 1 rows",
        ),
        (
            lambda t, y, k: jnp.stack([-y[0], y[0] + y[1] - 1e6]),
            [1e6 - 1.0, 300.0],
            {"mass": np.diag([1.0, 0.0]), "rtol": 1e-3},
            r"number 1 is off by 299 in 1 of 1 rows",
        ),
        (conserved, [1.0, 0, 0], {"mass": np.eye(2)}, r"must be a finite matrix \[3, 3\]"),
        (conserved, [1.0, 0, 0], {"breakpoints": [0.5]}, "does not go with breakpoints"),
        (conserved, [1.0, 0, 0], {"solver": jaxode.Rosenbrock23()}, "needs solver=jaxode.Rodas5P"),
    ],
    ids=[
        "index 3",
        "not consistent",
        "small rates",
        "of large terms",
        "shape",
        "breakpoints",
        "solver",
    ],
)
def test_what_does_not_go_is_refused(field, y0, options, words):
    with pytest.raises(ValueError, match=words):
        jaxode.solve(
            field, jnp.array(y0), 0.0, 1.0, RATES, **({"mass": SINGULAR} | TIGHT | options)
        )
