"""Stiff problems by diffrax's implicit solvers, behind the same call."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import jaxode


def van_der_pol(t, y, mu):
    return jnp.stack([y[1], mu * (1 - y[0] ** 2) * y[1] - y[0]])


def robertson(t, y, k):
    a, b, c = k[0] * y[0], k[1] * y[1] ** 2, k[2] * y[1] * y[2]
    return jnp.stack([-a + c, a - b - c, b])


def radau(f, y0, span, args, ts, **options):
    return scipy.integrate.solve_ivp(
        lambda t, y: np.asarray(f(t, y, args)), span, y0, method="Radau", t_eval=ts, **options
    ).y.T


def test_van_der_pol():
    ts = np.array([500.0, 1000.0, 2000.0])
    solution = jaxode.solve(
        van_der_pol, jnp.array([2.0, 0.0]), 0.0, 2000.0, 1000.0, ts=ts, solver=diffrax.Kvaerno5(),
        rtol=1e-7, atol=1e-9, max_steps=20_000,
    )  # fmt: skip
    y0, span = [2.0, 0.0], (0.0, 2000.0)
    reference = radau(jax.jit(van_der_pol), y0, span, 1000.0, ts, rtol=1e-9, atol=1e-11)
    # 1e-6: the tolerance; the relaxation oscillation keeps errors of the phase small.
    np.testing.assert_allclose(solution.ys, reference, rtol=1e-6)
    assert solution.stats.num_evals == -1
    assert solution.stats.num_steps > 1000


K = jnp.array([0.04, 3e7, 1e4])
ROBERTSON = {"solver": diffrax.Kvaerno5(), "rtol": 1e-8, "atol": 1e-10}


def test_robertson_and_its_gradient():
    run = lambda k, **options: jaxode.solve(
        robertson, jnp.array([1.0, 0.0, 0.0]), 0.0, 100.0, k, **ROBERTSON, **options
    ).y1[0]
    f = jax.jit(robertson)
    reference = lambda k: radau(f, [1.0, 0.0, 0.0], (0.0, 100.0), k, None, rtol=1e-11, atol=1e-13)[
        -1, 0
    ]
    value, gradient = jax.value_and_grad(run)(K)
    np.testing.assert_allclose(value, reference(K), rtol=1e-7)
    step = 1e-4  # relative, in each rate
    differences = [
        (reference(K * (1 + step * e)) - reference(K * (1 - step * e))) / (2 * step * K[i])
        for i, e in enumerate(np.eye(3))
    ]
    np.testing.assert_allclose(gradient, differences, rtol=1e-4)
    forward = jax.jacfwd(lambda k: run(k, adjoint=jaxode.ForwardMode()))(K)
    np.testing.assert_allclose(forward, gradient, rtol=1e-8)


@pytest.mark.parametrize("adjoint", [jaxode.DiscreteAdjoint(), jaxode.BacksolveAdjoint()])
def test_gradients_of_a_mildly_stiff_system(adjoint):
    """`y' = -a (y - 1)` has `y(1) = 1 + e^-a` for `y(0) = 2`."""
    f = lambda t, y, a: -a * (y - 1)
    run = lambda a: jaxode.solve(
        f, jnp.array([2.0]), 0.0, 1.0, a, solver=diffrax.Kvaerno5(), adjoint=adjoint, rtol=1e-8,
        atol=1e-8, ts=jnp.array([0.5, 1.0]),
    )  # fmt: skip
    gradient = jax.grad(lambda a: run(a).y1[0] + run(a).ys[0, 0])(3.0)
    np.testing.assert_allclose(gradient, -np.exp(-3.0) - 0.5 * np.exp(-1.5), rtol=1e-5)


def test_failed_implicit_solve():
    run = lambda y0, **options: jaxode.solve(
        lambda t, y, _: y**2, y0, 0.0, 3.0, solver=diffrax.Kvaerno3(), max_steps=50, **options
    )
    with pytest.raises(jaxode.SolveError, match=r"^solve: "):
        run(jnp.ones(1))
    assert jnp.isnan(run(jnp.ones(1), throw=False).y1).all()
    assert jnp.isnan(jax.grad(lambda y0: run(y0, throw=False).y1.sum())(jnp.ones(1))).all()


def test_batch_with_joint_steps():
    z = jnp.array([[1.0], [2.0]])
    y1 = jaxode.flow(lambda t, y, a: -a * y, z, 0.0, 1.0, 2.0, solver=diffrax.Kvaerno3())
    np.testing.assert_allclose(y1, z * np.exp(-2.0), rtol=1e-3)
