"""From the equations to the code: one small test for each, which could fail.

Of those that take seconds, `tests/flows/test_flow_features.py` tests the result fast.
"""

import functools
import itertools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.linalg

import jaxode
from jaxode.divergence import exact, hutchinson

# A failure is NaN, which is `close` to nothing: programs that can raise take longer to compile.
TIGHT = {"rtol": 1e-10, "atol": 1e-10, "throw": False}
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
        atol = rtol * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, equal_nan=False)


def solved(x, s=0.0, t=1.0, theta=THETA, g=f, **options):
    """The solution of `dz/ds = g` from `z(s) = x`."""
    return jaxode.solve(g, x, s, t, theta, **{**TIGHT, **options})


@functools.cache
def gradient(adjoint=jaxode.DiscreteAdjoint(), **options):
    """`(x, theta, y) -> (dL/dx, dL/dtheta)` of `L = l(z(1), y)`, by a gradient method."""
    loss = lambda x, theta, y: l(solved(x, theta=theta, adjoint=adjoint, **options).y1, y)
    return jax.jit(jax.grad(loss, (0, 1)))


def zeros():
    return jax.tree.map(jnp.zeros_like, THETA)


def test_01_residual_network_and_its_backpropagation():
    """`z_{l+1} = z_l + f(z_l, theta, l)`; `g += a_l df/dtheta`, `a_{l-1} = a_l dz_l/dz_{l-1}`."""
    depth = 6
    layers = {"t": depth, "solver": diffrax.Euler(), "steps": depth}
    step = lambda z, theta, layer: z + f(layer, z, theta)
    pull = jax.jit(lambda layer, z, a: jax.vjp(lambda *x: step(*x, layer), z, THETA)[1](a))
    z = [X[0]]
    for layer in range(depth):
        z.append(step(z[-1], THETA, float(layer)))
    close(solved(X[0], **layers).y1, z[-1])
    a, g = jax.grad(l)(z[-1], Y[0]), zeros()
    for layer in reversed(range(depth)):
        a, g_layer = pull(float(layer), z[layer], a)
        g = jax.tree.map(jnp.add, g, g_layer)
    close(gradient(**layers)(X[0], THETA, Y[0]), (a, g))


def test_02_neural_ode_and_the_loss_over_samples():
    """`L = (1/N) sum_i l(h(X_i), Y_i)`: its gradient is the mean of the samples' gradients."""

    def loss(theta):
        z1 = jaxode.flow(f, X, 0.0, 1.0, theta, **TIGHT)
        return jnp.mean(jax.vmap(l)(z1, Y))

    each = [gradient()(x, THETA, y)[1] for x, y in zip(X, Y, strict=True)]
    close(jax.jit(jax.grad(loss))(THETA), jax.tree.map(lambda *g: sum(g) / len(X), *each), 1e-8)


def test_03_euler_with_a_step_size():
    """`z_{k+1} = z_k + ds f(z_k, theta, k ds)`."""
    steps = 8
    z, ds = X[0], 1 / steps
    for k in range(steps):
        z = z + ds * f(k * ds, z, THETA)
    close(solved(X[0], solver=diffrax.Euler(), steps=steps).y1, z)


def test_04_an_adaptive_solver_is_more_accurate_for_its_evaluations():
    """Euler with as many evaluations as the adaptive solver took is a thousand times worse."""
    adaptive = solved(X[0], rtol=1e-6, atol=1e-6)
    euler = solved(X[0], solver=diffrax.Euler(), steps=int(adaptive.stats.num_evals))
    error = lambda solution: jnp.abs(solution.y1 - solved(X[0]).y1).max()
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
    path = solved(X, batch="joint", ts=ts).ys
    slopes = jax.vmap(jax.vmap(f, (None, 0, None)), (0, 0, None))(ts, path, THETA)
    close(X + jnp.tensordot(weights / 2, slopes, 1), z1, 1e-7)


def test_06_adjoint_of_the_input():
    """`da/ds = -a df/dz`, `a(1) = dL/dz(1)`: `dL/dX = a(0)`."""

    def adjoint(s, a, theta):
        z = solved(X[0], 0.0, s).y1
        return -jax.vjp(lambda z: f(s, z, theta), z)[1](a)[0]

    a1 = jax.grad(l)(solved(X[0]).y1, Y[0])
    a0 = solved(a1, 1.0, 0.0, g=adjoint, steps=20).y1
    close(gradient()(X[0], THETA, Y[0])[0], a0, 1e-7)


def test_07_adjoint_theorem():
    """`(z, a, b)` backwards from `(z(1), dL/dz(1), 0)`: `dL/dtheta = b(0)`."""

    def augmented(s, state, theta):
        z, a, _ = state
        dz, vjp = jax.vjp(lambda z, theta: f(s, z, theta), z, theta)
        da, db = vjp(-a)
        return dz, da, db

    z1 = solved(X[0]).y1
    end = (z1, jax.grad(l)(z1, Y[0]), zeros())
    z0, a0, b0 = solved(end, 1.0, 0.0, g=augmented).y1
    close(z0, X[0], 1e-8)
    close(gradient()(X[0], THETA, Y[0]), (a0, b0), 1e-8)


@pytest.mark.slow  # `test_07` has the same equations, of a recomputed trajectory
def test_08_backpropagation_on_the_stored_trajectory():
    """v.1: step 2 uses the stored `z(s)`. It agrees with the gradient of the discrete solution."""
    stored = solved(X[0], dense=True)

    def adjoint(s, state, theta):
        vjp = jax.vjp(lambda z, theta: f(s, z, theta), stored.evaluate(s), theta)[1]
        return vjp(-state[0])

    end = jax.grad(l)(stored.y1, Y[0]), zeros()
    close(solved(end, 1.0, 0.0, g=adjoint).y1, gradient()(X[0], THETA, Y[0]), 1e-8)


@pytest.mark.slow  # `test_adjoints.py` has this method
def test_09_backpropagation_on_the_recomputed_trajectory():
    """v.2: `z(s)` is recomputed backwards from `z(1)`."""
    recomputed = gradient(jaxode.BacksolveAdjoint())(X[0], THETA, Y[0])
    close(recomputed, gradient()(X[0], THETA, Y[0]), 1e-8)


LARGE = 257


def total_of_a_linear_field(x, A, **options):
    return solved(x, theta=A, g=lambda t, z, A: A @ z, **options).y1.sum()


def test_10_vector_jacobian_products_without_a_jacobian():
    """The backward pass of a linear field multiplies vectors and forms no `D x D` product."""
    x, A = jax.ShapeDtypeStruct((LARGE,), float), jax.ShapeDtypeStruct((LARGE, LARGE), float)
    for adjoint in (jaxode.DiscreteAdjoint(), jaxode.BacksolveAdjoint()):
        backward = jax.grad(functools.partial(total_of_a_linear_field, adjoint=adjoint))
        program = str(jax.make_jaxpr(backward)(x, A))
        # A itself is the only matrix of this size: no product of matrices has it as a result.
        assert f"f64[{LARGE},{LARGE}] = dot_general" not in program
        assert f"f64[{LARGE}] = dot_general" in program


@pytest.mark.slow  # the numbers of that program; others have as many
def test_the_gradient_of_a_large_linear_field():
    A = jax.random.normal(KEYS[0], (LARGE, LARGE)) / LARGE
    expected = scipy.linalg.expm(np.asarray(A)).T @ np.ones(LARGE)
    close(jax.jit(jax.grad(total_of_a_linear_field))(jnp.ones(LARGE), A), expected, 1e-8)


# Rows 11 to 20: a flow model, `x = z(1)` with `z(0)` from the density `p_Z`.

P_Z = jaxode.standard_normal(3)
KEY = jax.random.key(7)


def flow_model(divergence, **options):
    return jaxode.cnf(f, P_Z, divergence=divergence, **{**TIGHT, **options})


def jacobian(s, z, theta=THETA):
    return jax.jacfwd(lambda z: f(s, z, theta))(z)


def divergence_of_f(s, z):
    return jnp.trace(jacobian(s, z))


def probes_of(divergence, x=X):
    """The probes that a flow draws: one a sample, from the key and its index."""
    keys = jax.vmap(lambda i: jax.random.fold_in(KEY, i))(jnp.arange(len(x)))
    return jax.vmap(divergence.init)(keys, x)


def with_probe(v):
    """A divergence that has these probes `[probes, *event]`."""
    return jaxode.divergence.Divergence(lambda key, z: v, hutchinson().apply)


SIGNS = jnp.array(list(itertools.product([-1.0, 1.0], repeat=3)))


@functools.partial(jax.jit, static_argnums=0)
def along_the_trajectory(integrand, x, *args):
    """Integral over `[0, 1]` of `integrand(s, z(s), *args)`, by Gauss-Legendre nodes, for rows `x`
    of samples `z(1)` and of arguments."""
    nodes, weights = np.polynomial.legendre.leggauss(14)
    ts = jnp.asarray((nodes + 1) / 2)
    z = solved(x, 1.0, 0.0, batch="joint", ts=ts[::-1]).ys[::-1]
    in_rows = jax.vmap(integrand, (None, 0, *[0] * len(args)))
    along = jax.vmap(in_rows, (0, 0, *[None] * len(args)))
    return jnp.tensordot(weights / 2, along(ts, z, *args), 1)


def test_11_flow_model_samples():
    """`Z ~ p_Z`, then `X = F^{0,1}(Z)`."""
    samples = flow_model(exact()).sample(THETA, KEY, 4)
    z = P_Z.sample(jax.random.split(KEY)[0], (4,))
    close(samples, jnp.stack([solved(each).y1 for each in z]), 1e-8)


@pytest.mark.slow  # `test_flow_features.py` has densities in closed form
def test_12_jacobis_formula_and_the_instantaneous_change_of_variables():
    """`d|I + e A|/de = tr A`, `p_X(x) = p_Z(z) / |dh/dz|`, `d/ds log p_s(z(s)) = -div f`."""
    A = jacobian(0.2, X[0])
    determinant = lambda e: jnp.linalg.det(jnp.eye(3) + e * A)
    close(jax.jit(jax.grad(determinant))(0.0), np.trace(A))

    flow = flow_model(exact())
    h = lambda z: flow.from_base(THETA, z[None])[0]
    z = flow.to_base(THETA, X)
    log_det = jax.jit(lambda z: jnp.linalg.slogdet(jax.vmap(jax.jacrev(h))(z))[1])(z)
    close(flow.log_prob(THETA, X), P_Z.log_prob(z) - log_det, 1e-8)

    fixed = {"steps": 12}  # of order five, from a start that is smooth: an error below 1e-7

    @jax.jit
    @jax.grad
    def slope(s, z0):
        """Of `log p_s(z(s))` in `s`, through both solves."""
        z = jaxode.flow(f, z0[None], 0.0, s, THETA, **fixed)
        return jaxode.cnf(f, P_Z, t1=s, **fixed).log_prob(THETA, z)[0]

    s = 0.6
    close(slope(s, z[0]), -divergence_of_f(s, solved(z[0], 0.0, s).y1), 1e-6)


@pytest.mark.slow  # `test_flow_features.py` has densities in closed form
def test_13_log_likelihood_in_forward_and_backward_form():
    """`l' = -div f` from `l(0) = log p_Z(z(0))` forwards, or from `l(1) = 0` backwards."""
    x, flow = X[0], flow_model(exact())

    def augmented(s, state, theta):
        return f(s, state[0], theta), -divergence_of_f(s, state[0])

    z0, l0 = solved((x, jnp.array(0.0)), 1.0, 0.0, g=augmented).y1
    backward = P_Z.log_prob(z0) - l0
    z1, forward = solved((z0, P_Z.log_prob(z0)), g=augmented).y1
    close(z1, x, 1e-8)
    close(backward, flow.log_prob(THETA, X)[0], 1e-8)
    close(forward, backward, 1e-8)
    samples, log_prob = flow.sample_and_log_prob(THETA, KEY, len(X))
    close(flow.log_prob(THETA, samples), log_prob, 1e-8)


def test_14_exact_log_likelihood_on_the_stored_trajectory_and_in_one_solve():
    """v.1 integrates `div f` on a stored `z(s)`; v.2, `log_prob`, solves for both together."""
    z0 = jaxode.flow(f, X, 1.0, 0.0, THETA, **TIGHT)
    v1 = P_Z.log_prob(z0) - along_the_trajectory(divergence_of_f, X)
    close(flow_model(exact()).log_prob(THETA, X), v1, 1e-7)
    close(flow_model(exact(chunk=2)).log_prob(THETA, X), v1, 1e-7)


def quadratic(s, z, v):
    return v @ jacobian(s, z) @ v


def test_15_hutchinson_is_unbiased():
    """`E[v^T A v] = tr A`: the mean of all signs, and Gaussian within 4 standard errors."""
    g = lambda z: f(0.3, z, THETA)
    estimates = jax.jit(jax.vmap(lambda v: hutchinson().apply(g, X[0], v[None])[1]))
    close(estimates(SIGNS).mean(), divergence_of_f(0.3, X[0]))
    values = estimates(jax.random.normal(KEY, (40_000, 3)))
    error = jnp.abs(values.mean() - divergence_of_f(0.3, X[0]))
    assert error < 4 * values.std() / np.sqrt(len(values))


@pytest.mark.slow  # `test_flow_features.py` has the loss of given probes in closed form
@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_15_one_probe_at_all_times_of_a_solve(distribution):
    flow = flow_model(hutchinson(distribution=distribution))
    _, aux = flow.nll_and_stats(THETA, X, key=KEY)
    probes = probes_of(flow.divergence)[:, 0]
    close(aux.log_det, -along_the_trajectory(quadratic, X, probes), 1e-7)


def test_16_directional_derivative_by_one_product():
    """`v^T (df/dz) v` as a vjp with `v`, as the gradient of `v . f`, and as a jvp."""
    g = lambda z: f(0.3, z, THETA)

    @jax.jit
    def ways(z, v):
        return (
            v @ jacobian(0.3, z) @ v,
            jax.vjp(g, z)[1](v)[0] @ v,
            jax.grad(lambda z: v @ g(z))(z) @ v,
            v @ jax.jvp(g, (z,), (v,))[1],
            hutchinson().apply(g, z, v[None])[1],
        )

    expected, *others = ways(X[0], X[1])
    for other in others:
        close(other, expected)


def test_17_stochastic_log_likelihood_is_unbiased():
    """Its mean over all sign vectors is the log-likelihood, on any fixed sequence of steps."""
    fixed = {"steps": 5}
    estimate = lambda v: flow_model(with_probe(v[None]), **fixed).log_prob(THETA, X)
    estimates = jax.jit(jax.vmap(estimate))(SIGNS)
    close(estimates.mean(0), flow_model(exact(), **fixed).log_prob(THETA, X))
    assert (estimates.std(0) > 1e-2).all()


@pytest.mark.slow  # `test_flow_features.py` has the gradient of given probes in closed form
def test_18_stochastic_gradient_of_the_log_likelihood():
    """`a' = -a df/dz - d(v^T df/dz v)/dz`, `b'` with `d/dtheta`: the gradient is `b(1)`.

    v.1 takes `z(s)` from the solve from the data, v.2 recomputes it from `z(0)`. Both agree with
    autodiff of the discretized likelihood, and with the adjoint methods that are named so.
    """
    x, v = X[0], probes_of(hutchinson())[0, 0]

    def h(s, z, theta):
        return jax.jvp(lambda z: f(s, z, theta), (z,), (v,))

    def derivatives(s, z, a, theta):
        """`f`, and minus the vector-Jacobian products with `(a, 1)`."""
        scalars = lambda z, theta: (h(s, z, theta)[0], v @ h(s, z, theta)[1])
        (dz, _), vjp = jax.vjp(scalars, z, theta)
        return dz, *vjp((-a, jnp.array(-1.0)))

    trajectory = solved(x, 1.0, 0.0, dense=True)
    z0 = trajectory.y1
    a0, b0 = jax.grad(P_Z.log_prob)(z0), zeros()

    def stored(s, state, theta):
        return derivatives(s, trajectory.evaluate(s), state[0], theta)[1:]

    def recomputed(s, state, theta):
        return derivatives(s, state[0], state[1], theta)

    _, v1 = solved((a0, b0), g=stored).y1
    _, _, v2 = solved((z0, a0, b0), g=recomputed).y1

    def of_flow(**options):
        log_prob = flow_model(hutchinson(), **options).log_prob
        return jax.jit(jax.grad(lambda theta: log_prob(theta, x[None], key=KEY)[0]))(THETA)

    discrete = of_flow()
    close(v1, discrete, 1e-7)
    close(v2, discrete, 1e-7)
    close(of_flow(adjoint=jaxode.BacksolveAdjoint()), discrete, 1e-7)

    # Of a likelihood discretized by hand, here in Euler's steps: plain autodiff.
    steps = 5

    def discretized(theta):
        z, log_det = x, 0.0
        for s in 1 - jnp.arange(steps) / steps:
            dz, jvp = h(s, z, theta)
            z, log_det = z - dz / steps, log_det - v @ jvp / steps
        return P_Z.log_prob(z) + log_det

    close(of_flow(solver=diffrax.Euler(), steps=steps), jax.jit(jax.grad(discretized))(THETA))


def test_19_mixed_partial_derivatives():
    """`d(v^T df/dz v)/dz` and `/dtheta` by reverse over forward, without second derivatives."""
    z, v = X[0], X[1]

    def by_estimator(z, theta):
        return hutchinson().apply(lambda z: f(0.3, z, theta), z, v[None])[1]

    second = jax.jit(jax.jacfwd(jax.jacfwd(lambda z: f(0.3, z, THETA))))(z)
    mixed = jax.jit(jax.jacfwd(lambda theta: jacobian(0.3, z, theta)))(THETA)
    expected = (
        jnp.einsum("i,ijk,j->k", v, second, v),
        jax.tree.map(lambda m: jnp.einsum("i,ij...,j->...", v, m, v), mixed),
    )
    close(jax.jit(jax.grad(by_estimator, (0, 1)))(z, THETA), expected)


@pytest.mark.slow  # `test_flow_features.py` has the gradient of two probes in closed form
def test_20_training_sums_over_probes_and_samples():
    """`g += b(1)` for each of `K` probes: one solve with `K` probes has the mean gradient."""
    K, fixed = 3, {"steps": 6}
    several = flow_model(hutchinson(K, "gaussian"), **fixed)
    loss = lambda theta, x, v: flow_model(with_probe(v[None]), **fixed).nll(theta, x[None])
    each = jax.vmap(jax.vmap(jax.grad(loss), (None, None, 0)), (None, 0, 0))
    mean = jax.jit(lambda *x: jax.tree.map(lambda g: g.mean((0, 1)), each(*x)))
    probes = probes_of(several.divergence)
    close(jax.jit(jax.grad(several.nll))(THETA, X, key=KEY), mean(THETA, X, probes))


@pytest.mark.slow  # trains for 300 steps
def test_20_ffjord_learns_a_mixture_of_three_normals(default_settings):
    """Maximum likelihood reaches the true density to 0.02 nats of Kullback-Leibler divergence."""
    means, scale = jnp.array([-2.8, -0.9, 2.0]), 0.4
    grid = jnp.linspace(-6.0, 6.0, 1201)
    true = jax.scipy.stats.norm.pdf(grid[:, None], means, scale).mean(1)
    # Data without sampling error: the quantiles of the mixture.
    mass = jnp.cumsum(true) / true.sum()
    data = jnp.interp((jnp.arange(512) + 0.5) / 512, mass, grid)[:, None]

    flow = jaxode.cnf(
        jaxode.nn.field, jaxode.standard_normal(1), divergence=hutchinson(2), rtol=1e-4, atol=1e-4
    )
    params = jaxode.nn.ConcatSquash(1, (16, 16), key=jax.random.key(2))
    steps = 300
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    @jax.jit
    def train(params, key):
        def step(carry, key):
            params, state = carry
            index_key, probe_key = jax.random.split(key)
            x = jax.random.choice(index_key, data, (128,), replace=False)
            gradient = jax.grad(flow.nll)(params, x, key=probe_key)
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), None

        start = (params, optimizer.init(params))
        return jax.lax.scan(step, start, jax.random.split(key, steps))[0][0]

    def divergence(params):
        log_prob = jaxode.cnf(jaxode.nn.field, flow.base).log_prob(params, grid[:, None])
        return jnp.trapezoid(true * (jnp.log(true) - log_prob), grid)

    assert divergence(params) > 0.3
    params = train(params, jax.random.key(1))
    assert 0 < divergence(params) < 0.02
