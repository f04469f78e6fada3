"""From the equations to the code: one small test for each, which could fail."""

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from problems import linear_gradients

import jaxode

TIGHT = {"rtol": 1e-10, "atol": 1e-10}
KEYS = jax.random.split(jax.random.key(0), 3)
THETA = (0.5 * jax.random.normal(KEYS[0], (4, 3)), 0.5 * jax.random.normal(KEYS[1], (3, 4)))
X = jax.random.normal(KEYS[2], (5, 3))
Y = jnp.cos(X)


def f(t, z, theta):
    """A small network that depends on the time; `theta` is shared by all layers."""
    inner, outer = theta
    return outer @ jnp.tanh(inner @ z + t)


def l(h, y):  # noqa: E743
    return jnp.sum((h - y) ** 2)


def close(actual, expected, rtol=1e-12):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max())


def test_01_residual_network_and_its_backpropagation():
    """`z_{l+1} = z_l + f(z_l, theta, l)`; `g += a_l df/dtheta`, `a_{l-1} = a_l dz_l/dz_{l-1}`."""
    depth = 6

    def h(x, theta):
        solution = jaxode.solve(f, x, 0.0, depth, theta, solver=diffrax.Euler(), steps=depth)
        return solution.y1

    z = [X[0]]
    for layer in range(depth):
        z.append(z[-1] + f(float(layer), z[-1], THETA))
    close(h(X[0], THETA), z[-1])

    a = jax.grad(l)(z[-1], Y[0])
    g = jax.tree.map(jnp.zeros_like, THETA)
    for layer in reversed(range(depth)):
        step = lambda z, theta, layer=layer: z + f(float(layer), z, theta)
        a, g_layer = jax.vjp(step, z[layer], THETA)[1](a)
        g = jax.tree.map(jnp.add, g, g_layer)
    close(jax.grad(lambda x, theta: l(h(x, theta), Y[0]), (0, 1))(X[0], THETA), (a, g))


def test_02_neural_ode_and_the_loss_over_samples():
    """`L = (1/N) sum_i l(h(X_i), Y_i)`: its gradient is the mean of the samples' gradients."""

    def loss(theta):
        z1 = jaxode.flow(f, X, 0.0, 1.0, theta, **TIGHT)
        return jnp.mean(jax.vmap(l)(z1, Y))

    one = lambda theta, x, y: l(jaxode.solve(f, x, 0.0, 1.0, theta, **TIGHT).y1, y)
    each = [jax.grad(one)(THETA, x, y) for x, y in zip(X, Y, strict=True)]
    close(jax.grad(loss)(THETA), jax.tree.map(lambda *g: sum(g) / len(X), *each), 1e-8)


def test_03_euler_with_a_step_size():
    """`z_{k+1} = z_k + ds f(z_k, theta, k ds)`."""
    steps = 8
    z, ds = X[0], 1 / steps
    for k in range(steps):
        z = z + ds * f(k * ds, z, THETA)
    close(jaxode.solve(f, X[0], 0.0, 1.0, THETA, solver=diffrax.Euler(), steps=steps).y1, z)


def test_04_an_adaptive_solver_is_more_accurate_for_its_evaluations():
    """Euler with as many evaluations as the adaptive solver took is a thousand times worse."""
    exact = jaxode.solve(f, X[0], 0.0, 1.0, THETA, **TIGHT).y1
    adaptive = jaxode.solve(f, X[0], 0.0, 1.0, THETA, rtol=1e-6, atol=1e-6)
    euler = jaxode.solve(
        f, X[0], 0.0, 1.0, THETA, solver=diffrax.Euler(), steps=int(adaptive.stats.num_evals)
    )
    error = lambda solution: jnp.abs(solution.y1 - exact).max()
    assert error(adaptive) < 1e-5
    assert error(adaptive) < error(euler) / 1000


def test_05_flow_operator():
    """`F^{0,1} = F^{s,1} F^{0,s}`, `F^{1,0}` inverts it, and `z(t) = z(s) + integral of dz`."""
    F = lambda z, s, t: jaxode.flow(f, z, s, t, THETA, **TIGHT)
    z1 = F(X, 0.0, 1.0)
    close(F(F(X, 0.0, 0.3), 0.3, 1.0), z1, 1e-8)
    close(F(z1, 1.0, 0.0), X, 1e-8)
    nodes, weights = np.polynomial.legendre.leggauss(12)
    ts = jnp.asarray((nodes + 1) / 2)
    path = jaxode.flow(f, X, 0.0, 1.0, THETA, ts=ts, return_solution=True, **TIGHT).ys
    slopes = jax.vmap(jax.vmap(f, (None, 0, None)), (0, 0, None))(ts, path, THETA)
    close(X + jnp.tensordot(weights / 2, slopes, 1), z1, 1e-7)


def test_06_adjoint_of_the_input():
    """`da/ds = -a df/dz`, `a(1) = dL/dz(1)`: `dL/dX = a(0)`."""
    path = lambda s: jaxode.solve(f, X[0], 0.0, s, THETA, **TIGHT).y1

    def adjoint(s, a, theta):
        return -jax.vjp(lambda z: f(s, z, theta), path(s))[1](a)[0]

    a1 = jax.grad(l)(path(1.0), Y[0])
    a0 = jaxode.solve(adjoint, a1, 1.0, 0.0, THETA, steps=20).y1
    loss = lambda x: l(jaxode.solve(f, x, 0.0, 1.0, THETA, **TIGHT).y1, Y[0])
    close(jax.grad(loss)(X[0]), a0, 1e-7)


def test_07_adjoint_theorem():
    """`(z, a, b)` backwards from `(z(1), dL/dz(1), 0)`: `dL/dtheta = b(0)`."""

    def augmented(s, state, theta):
        z, a, _ = state
        dz, vjp = jax.vjp(lambda z, theta: f(s, z, theta), z, theta)
        da, db = vjp(-a)
        return dz, da, db

    z1 = jaxode.solve(f, X[0], 0.0, 1.0, THETA, **TIGHT).y1
    end = (z1, jax.grad(l)(z1, Y[0]), jax.tree.map(jnp.zeros_like, THETA))
    z0, a0, b0 = jaxode.solve(augmented, end, 1.0, 0.0, THETA, **TIGHT).y1
    close(z0, X[0], 1e-8)
    loss = lambda x, theta: l(jaxode.solve(f, x, 0.0, 1.0, theta, **TIGHT).y1, Y[0])
    close(jax.grad(loss, (0, 1))(X[0], THETA), (a0, b0), 1e-8)


def by(adjoint, **options):
    options = {**TIGHT, **options}
    loss = lambda theta: l(
        jaxode.solve(f, X[0], 0.0, 1.0, theta, adjoint=adjoint, **options).y1, Y[0]
    )
    return jax.grad(loss)(THETA)


def linear_by(adjoint):
    """The gradients of `w . z(1)`, where `dz/ds = A z`, with respect to `z(0)` and `A`."""
    A, v, w = THETA[0][:3], X[0], Y[0]
    loss = lambda v, A: w @ jaxode.solve(
        lambda s, z, A: A @ z, v, 0.0, 1.0, A, adjoint=adjoint, **TIGHT
    ).y1  # fmt: skip
    return jax.grad(loss, (0, 1))(v, A), linear_gradients(A, v, w)


def test_08_backpropagation_on_the_stored_trajectory():
    """v.1: step 2 uses the stored `z(s)`. It agrees with the gradient of the discrete solution.

    For `dz/ds = A z` both parts are exponentials of matrices.
    """
    close(*linear_by(jaxode.InterpolatingAdjoint()), 1e-8)
    close(by(jaxode.InterpolatingAdjoint()), by(jaxode.DiscreteAdjoint()), 1e-8)


def test_09_backpropagation_on_the_recomputed_trajectory():
    """v.2: `z(s)` is recomputed backwards from `z(1)`."""
    close(*linear_by(jaxode.BacksolveAdjoint()), 1e-8)
    close(by(jaxode.BacksolveAdjoint()), by(jaxode.DiscreteAdjoint()), 1e-8)


def test_10_vector_jacobian_products_without_a_jacobian():
    """The backward pass of a linear field multiplies vectors and forms no `D x D` product."""
    D = 257
    A = jax.random.normal(KEYS[0], (D, D)) / D
    close(
        jax.grad(lambda x: jaxode.solve(lambda t, z, A: A @ z, x, 0.0, 1.0, A, **TIGHT).y1.sum())(
            jnp.ones(D)
        ),
        scipy.linalg.expm(np.asarray(A)).T @ np.ones(D),
        1e-8,
    )
    for adjoint in (
        jaxode.DiscreteAdjoint(), jaxode.BacksolveAdjoint(), jaxode.InterpolatingAdjoint()
    ):  # fmt: skip
        loss = lambda x, adjoint=adjoint: jaxode.solve(
            lambda t, z, A: A @ z, x, 0.0, 1.0, A, adjoint=adjoint, throw=False
        ).y1.sum()
        program = str(jax.make_jaxpr(jax.grad(loss))(jnp.ones(D)))
        # A itself is the only matrix of this size: no product of matrices has it as a result.
        assert f"f64[{D},{D}] = dot_general" not in program
        assert f"f64[{D}] = dot_general" in program
