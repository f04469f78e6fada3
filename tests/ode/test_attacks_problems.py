"""Textbook problems and everyday programs, against references that share no code with jaxode.

The problems are those of DETEST: Hull, Enright, Fellen and Sedgwick (1972) for explicit solvers,
and Enright, Hull and Lindberg (1975) for stiff ones. References are closed forms, or SciPy's.
"""

import functools
import math

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.stats

import jaxode

# The tolerance of solves, and the error allowed: it grows along an orbit, by less than this.
TIGHT = {"rtol": 1e-10, "atol": 1e-10}
ALLOWED = 1e-7


# Fields are functions of NumPy, which also takes complex states, or of JAX.
def numpy_of(y):
    return np if isinstance(y, np.ndarray) else jnp


def masses(t, y):
    """Class C5: five outer planets around the sun, moved out of the plane's symmetry."""
    gravity, sun = 2.95912208286, 1.00000597682
    mass = np.array(
        [0.000954786104043, 0.000285583733151, 4.37273164546e-5, 5.17759138449e-5, 2.7777778e-6]
    )
    q = y[:15].reshape(5, 3)
    apart = q[None, :, :] - q[:, None, :]
    # A planet is not apart from itself.
    cubed = ((apart**2).sum(axis=2) + np.eye(5)) ** 1.5
    own = q / ((q**2).sum(axis=1) ** 1.5)[:, None]
    others = mass[None, :] * (1 - np.eye(5))
    pull = (others[:, :, None] * (apart / cubed[:, :, None] - own[None, :, :])).sum(axis=1)
    pull = gravity * (pull - (sun + mass)[:, None] * own)
    return numpy_of(y).concatenate([y[15:], pull.reshape(15)])


PLANETS = [
    3.42947415189, 3.35386959711, 1.35494901715, 6.64145542550, 5.97156957878, 2.18231499728,
    11.2630437207, 14.6952576794, 6.27960525067, -30.1552268759, 1.65699966404, 1.43785752721,
    -21.1238353380, 28.4465098142, 15.3882659679, -0.557160570446, 0.505696783289, 0.230578543901,
    -0.415570776342, 0.365682722812, 0.169143213293, -0.325325669158, 0.189706021964,
    0.0877265322780, -0.0240476254170, -0.287659532608, -0.117219543175, -0.176860753121,
    -0.216393453025, -0.0148647893090,
]  # fmt: skip


def chain(n, rate_in, rate_out, back=0.0):
    """Class C: each of `n` numbers feeds the next."""
    i = np.arange(float(n))
    rates = np.diag(rate_in(i[1:]), -1) - np.diag(rate_out(i)) + np.diag(np.full(n - 1, back), 1)
    return lambda t, y: rates @ y, [1.0] + [0.0] * (n - 1)


def orbit(e):
    f = lambda t, y: [y[2], y[3], *(-y[i] / (y[0] ** 2 + y[1] ** 2) ** 1.5 for i in (0, 1))]
    return f, [1 - e, 0.0, 0.0, ((1 + e) / (1 - e)) ** 0.5]


def radius(y):
    return (y[0] ** 2 + y[1] ** 2) ** 0.5


cosine = lambda t: (np if isinstance(t, float) else jnp).cos(t)
NON_STIFF = {
    "A1": (lambda t, y: [-y[0]], [1.0]),
    "A2": (lambda t, y: [-(y[0] ** 3) / 2], [1.0]),
    "A3": (lambda t, y: [y[0] * cosine(t)], [1.0]),
    "A4": (lambda t, y: [y[0] / 4 * (1 - y[0] / 20)], [1.0]),
    "A5": (lambda t, y: [(y[0] - t) / (y[0] + t)], [4.0]),
    "B1": (lambda t, y: [2 * (y[0] - y[0] * y[1]), -(y[1] - y[0] * y[1])], [1.0, 3.0]),
    "B2": (lambda t, y: [-y[0] + y[1], y[0] - 2 * y[1] + y[2], y[1] - y[2]], [2.0, 0.0, 1.0]),
    "B3": (lambda t, y: [-y[0], y[0] - y[1] ** 2, y[1] ** 2], [1.0, 0.0, 0.0]),
    "B4": (
        lambda t, y: [
            -y[1] - y[0] * y[2] / radius(y), y[0] - y[1] * y[2] / radius(y), y[0] / radius(y)
        ],
        [3.0, 0.0, 0.0],
    ),
    "B5": (lambda t, y: [y[1] * y[2], -y[0] * y[2], -0.51 * y[0] * y[1]], [0.0, 1.0, 1.0]),
    "C1": chain(10, np.ones_like, lambda i: 1.0 * (i < 9)),
    "C2": chain(10, lambda i: i, lambda i: (i + 1) * (i < 9)),
    "C3": chain(10, np.ones_like, lambda i: 2 + 0 * i, back=1.0),
    "C4": chain(51, np.ones_like, lambda i: 2 + 0 * i, back=1.0),
    "C5": (masses, PLANETS),
    **{f"D{i + 1}": orbit(e) for i, e in enumerate((0.1, 0.3, 0.5, 0.7, 0.9))},
    "E1": (
        lambda t, y: [y[1], -(y[1] / (t + 1) + (1 - 0.25 / (t + 1) ** 2) * y[0])],
        [0.671396707141803, 0.0954005144474746],
    ),
    "E2": (lambda t, y: [y[1], (1 - y[0] ** 2) * y[1] - y[0]], [2.0, 0.0]),
    "E3": (
        lambda t, y: [y[1], y[0] ** 3 / 6 - y[0] + 2 * cosine(2.78535 * t - np.pi / 2)],
        [0.0, 0.0],
    ),
    "E4": (lambda t, y: [y[1], 0.032 - 0.4 * y[1] ** 2], [30.0, 0.0]),
    "E5": (lambda t, y: [y[1], (1 + y[1] ** 2) ** 0.5 / (25 - t)], [0.0, 0.0]),
}  # fmt: skip
# (field, initial state, end time)
STIFF = {
    "A1": (lambda t, y: [-0.5 * y[0], -y[1], -100 * y[2], -90 * y[3]], [1.0] * 4, 20.0),
    "B1": (
        lambda t, y: [
            -y[0] + y[1], -100 * y[0] - y[1], -100 * y[2] + y[3], -1e4 * y[2] - 100 * y[3]
        ],
        [1.0, 0.0, 1.0, 0.0], 2.0,
    ),
    "C1": (
        lambda t, y: [
            -y[0] + y[1] ** 2 + y[2] ** 2 + y[3] ** 2, -10 * y[1] + 10 * (y[2] ** 2 + y[3] ** 2),
            -40 * y[2] + 40 * y[3] ** 2, -100 * y[3] + 2,
        ],
        [1.0] * 4, 20.0,
    ),
    "D1": (
        lambda t, y: [
            0.2 * (y[1] - y[0]), 10 * y[0] - (60 - 0.125 * y[2]) * y[1] + 0.125 * y[2], 1 + 0 * t
        ],
        [0.0] * 3, 400.0,
    ),
    "D2": (
        lambda t, y: [
            -0.04 * y[0] + 0.01 * y[1] * y[2],
            400 * y[0] - 100 * y[1] * y[2] - 3000 * y[1] ** 2, 30 * y[1] ** 2,
        ],
        [1.0, 0.0, 0.0], 40.0,
    ),
    "D4": (
        lambda t, y: [
            -0.013 * y[0] - 1000 * y[0] * y[2], -2500 * y[1] * y[2],
            -0.013 * y[0] - 1000 * y[0] * y[2] - 2500 * y[1] * y[2],
        ],
        [1.0, 1.0, 0.0], 50.0,
    ),
    "E2": (lambda t, y: [y[1], 5 * (1 - y[0] ** 2) * y[1] - y[0]], [2.0, 0.0], 1.0),
}  # fmt: skip
GROUPS = {
    "small": {name: problem for name, problem in NON_STIFF.items() if name[0] != "C"},
    "large": {name: problem for name, problem in NON_STIFF.items() if name[0] == "C"},
    "stiff": STIFF,
}


def padded(y, size):
    y = y if isinstance(y, jax.Array) else jnp.stack(y)
    return jnp.concatenate([y, jnp.zeros(size - len(y))])


def directions(n):
    """Of the initial state in, and of the end state out: fixed, without zeros."""
    return np.sin(1.0 + np.arange(n)), np.cos(1.0 + np.arange(n))


@functools.cache
def of_group(group, solver, max_steps=4096):
    """One program for all fields of a group: the end, and the gradient of a sum of it."""
    problems = list(GROUPS[group].values())
    size = max(len(y0) for _, y0, *_ in problems)
    branches = [lambda t, y, f=f, n=len(y0): padded(f(t, y[:n]), size) for f, y0, *_ in problems]
    field = lambda t, y, number: jax.lax.switch(number, branches, t, y)
    options = {"solver": solver, "max_steps": max_steps, **TIGHT}

    @jax.jit
    def run(y0, t1, number, weights):
        end = lambda y0: jaxode.solve(field, y0, 0.0, t1, number, **options).y1
        y1, pull = jax.vjp(end, y0)
        return y1, pull(weights)[0]

    def solve(name, t1):
        y0, number = GROUPS[group][name][1], list(GROUPS[group]).index(name)
        n = len(y0)
        start, weights = (padded(jnp.asarray(x), size) for x in (y0, directions(n)[1]))
        y1, bar = run(start, t1, number, weights)
        np.testing.assert_array_equal(y1[n:], 0.0)
        return y1[:n], bar[:n] @ directions(n)[0]

    return solve


@functools.cache
def reference(group, name, t1):
    """By SciPy, with the derivative along a direction by the variational equation.

    The product with the Jacobian is by a complex step, which has no error.
    """
    f, y0, *_ = GROUPS[group][name]
    n, tiny = len(y0), 1e-40

    def both(t, state):
        value = np.array(f(float(t), state[:n] + 1j * tiny * state[n:]), complex)
        return np.concatenate([value.real, value.imag / tiny])

    start = np.concatenate([y0, directions(n)[0]])
    # Far below what is allowed; Radau is of order five.
    options = {"rtol": 1e-12, "atol": 1e-13, "method": "DOP853"}
    if group == "stiff":
        options = {"rtol": 1e-10, "atol": 1e-12, "method": "Radau"}
    out = scipy.integrate.solve_ivp(both, (0.0, t1), start, **options).y[:, -1]
    return out[:n], out[n:] @ directions(n)[1]


def matches(group, name, t1, solver, **options):
    y1, slope = of_group(group, solver, **options)(name, t1)
    expected, expected_slope = reference(group, name, t1)
    np.testing.assert_allclose(y1, expected, rtol=ALLOWED, atol=ALLOWED)
    # Derivatives lose a digit more: they are sensitive to the state, and that to itself.
    np.testing.assert_allclose(slope, expected_slope, rtol=10 * ALLOWED, atol=10 * ALLOWED)


@pytest.mark.slow
@pytest.mark.parametrize("name", NON_STIFF)
def test_detest(name):
    matches("large" if name in GROUPS["large"] else "small", name, 20.0, diffrax.Dopri8())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["A1", "A4", "B1", "B4", "B5", "D1", "D5", "E2", "E3", "E5"])
def test_detest_backwards(name):
    """Not to where solutions explode or cross a singularity."""
    matches("small", name, -0.2 if name == "E2" else -1.0, diffrax.Dopri8())


@pytest.mark.slow
@pytest.mark.parametrize("name", STIFF)
def test_stiff_detest(name):
    matches("stiff", name, STIFF[name][2], jaxode.Rodas5P(), max_steps=40_000)


# y' = -a y, whose end is y0 exp(-a t).
Y0, A = jnp.array([1.0, 2.0]), jnp.array([0.5, 1.5])
FINE = {"rtol": 1e-9, "atol": 1e-9}


def decay(t, y, a):
    return -a * y


def exact(a, t1=1.0):
    return Y0 * jnp.exp(-a * t1)


def leafwise(t, y, args):
    return jax.tree.map(jnp.negative, y)


STATES = [
    1.0, np.float64(1.0), np.ones(1), (1.0, np.ones((1, 2))),
    {"a": [np.ones(2), (np.ones(()), None)]}, (np.ones((0, 3), np.float32), np.ones((2, 1, 2))),
    (np.ones(2, np.float32), np.ones(1)), np.ones(2, np.float16), jnp.ones(2, jnp.bfloat16),
    np.asfortranarray(np.ones((2, 3))),
]  # fmt: skip


@pytest.mark.parametrize("y0", STATES, ids=str)
def test_states(y0):
    y1 = jaxode.solve(leafwise, y0, 0, 1).y1
    assert jax.tree.structure(y1) == jax.tree.structure(y0)
    for before, after in zip(jax.tree.leaves(y0), jax.tree.leaves(y1), strict=True):
        assert after.dtype == jnp.result_type(before)
        assert after.shape == np.shape(before)
        # The tolerance is 1e-5; half a rounding of a leaf that is less precise.
        precision = max(2e-5, float(jnp.finfo(after.dtype).eps))
        np.testing.assert_allclose(np.asarray(after, float), np.exp(-1.0), rtol=precision)


# (start, end, output times), which are six or none: two programs serve all.
TIMES = [
    (0, 1, None), (np.int64(0), np.uint8(1), None), (np.uint8(1), np.uint8(0), None),
    (jnp.array(0), np.float16(1), None), (0.0, 1.0, [0, 0, 0.5, 0.5, 1, 1]), (0, 5, range(6)),
    (1.0, 0.0, (1.0, 0.5, 0.5, 0.0, 0.0, 0.0)), (0.0, 1.0, np.arange(6) * 0.2),
    (1.0, 1.0, [1.0] * 6), (0.0, 1.0, np.float32([0.1, 0.7] + 4 * [0.9])),
    (0.0, 1e-12, [5e-13] * 6), (-3, -1, [-2] * 6),
]  # fmt: skip


@pytest.mark.parametrize(("t0", "t1", "ts"), TIMES, ids=str)
def test_times(t0, t1, ts):
    solution = jaxode.solve(decay, Y0, t0, t1, A, ts=ts, **FINE)
    assert solution.t_reached == float(t1)
    np.testing.assert_allclose(solution.y1, exact(A, float(t1) - float(t0)), rtol=1e-7)
    if ts is not None:
        expected = [exact(A, float(t) - float(t0)) for t in ts]
        np.testing.assert_allclose(solution.ys, expected, rtol=1e-6)


def slowed(t, y, args):
    return -args[0] * y / args[1]


@pytest.mark.parametrize("unit", [1e-14, 1e-7, 1e7, 1e14])
def test_units_of_time(unit):
    run = lambda unit: jaxode.solve(slowed, Y0, 0.0, unit, (A, unit), **FINE)
    solution, usual = run(unit), run(1.0)
    np.testing.assert_allclose(solution.y1, exact(A), rtol=1e-7)
    # Only the first step has an opinion on units, and steps grow tenfold.
    more = abs(int(solution.stats.num_steps) - int(usual.stats.num_steps))
    assert more <= abs(math.log10(unit)) + 1


def test_as_many_steps_as_needed_are_enough():
    needed = int(jaxode.solve(decay, Y0, 0.0, 1.0, A, **FINE).stats.num_steps)
    run = lambda n: jaxode.solve(decay, Y0, 0.0, 1.0, A, max_steps=n, throw=False, **FINE).result
    assert run(needed) == jaxode.Result.SUCCESS
    assert run(needed - 1) == jaxode.Result.MAX_STEPS_REACHED


# Flows of z' = M z + c, which carry normals to normals.
M = np.array([[0.3, 4.0, 0.0], [0.0, -0.5, 2.0], [0.1, 0.0, 0.5]])
C = np.array([0.5, -1.0, 2.0])
X = jax.random.normal(jax.random.key(1), (4, 3))
W = np.array([1.0, 0.0, 3.0, 0.5])


def affine(t, z, params):
    return params[0] @ z + params[1]


def normal(t1, t0=0.0, m=M):
    """The density that SciPy has for the standard normal carried from `t0` to `t1`."""
    block = np.zeros((4, 4))
    block[:3] = np.column_stack([m, C]) * (t1 - t0)
    exp = scipy.linalg.expm(block)
    return scipy.stats.multivariate_normal(exp[:3, 3], exp[:3, :3] @ exp[:3, :3].T)


def affine_flow(t1=1.0, t0=0.0, **options):
    return jaxode.cnf(affine, jaxode.standard_normal(3), t0=t0, t1=t1, **FINE, **options)


PARAMS = (jnp.asarray(M), jnp.asarray(C))


@pytest.mark.parametrize(("t0", "t1"), [(0.0, 1.0), (1.0, 0.0), (-0.5, -2.0)])
def test_nonnormal_flow_in_both_directions_of_time(t0, t1):
    flow, expected = affine_flow(t1, t0), normal(t1, t0).logpdf(X)
    np.testing.assert_allclose(flow.log_prob(PARAMS, X), expected, rtol=1e-7)
    loss = flow.nll(PARAMS, X, weights=jnp.asarray(W))
    np.testing.assert_allclose(loss, -(W @ expected) / W.sum(), rtol=1e-7)
    back = flow.from_base(PARAMS, flow.to_base(PARAMS, X))
    np.testing.assert_allclose(back, X, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_gradients_by_the_end_time_and_a_vmap_over_parameters():
    h = 1e-5  # Its square is the error of the differences, with the noise of 1e-11.
    slope = np.mean(normal(1 + h).logpdf(X) - normal(1 - h).logpdf(X)) / (2 * h)
    by_time = lambda loss: jax.grad(lambda t1: loss(affine_flow(t1)))(1.0)
    of_density, of_loss, several = jax.jit(lambda m: (
        by_time(lambda f: f.log_prob(PARAMS, X).mean()), by_time(lambda f: -f.nll(PARAMS, X)),
        jax.vmap(lambda m: affine_flow().log_prob((m, C), X))(m),
    ))(np.stack([M, 2 * M]))  # fmt: skip
    np.testing.assert_allclose((of_density, of_loss), slope, rtol=1e-6)
    np.testing.assert_allclose(several[1], normal(1.0, m=2 * M).logpdf(X), rtol=1e-6)


@pytest.mark.slow
def test_curvature_of_the_likelihood():
    """By the shift `c`, of which the log-density is a quadratic form."""
    exp = scipy.linalg.expm(np.block([[M, np.eye(3)], [np.zeros((3, 6))]]))
    spread, shift = exp[:3, :3], exp[:3, 3:]
    expected = shift.T @ np.linalg.inv(spread @ spread.T) @ shift
    curvature = jax.jit(jax.hessian(lambda c: affine_flow().nll((PARAMS[0], c), X)))(PARAMS[1])
    np.testing.assert_allclose(curvature, expected, rtol=1e-6)


@pytest.mark.slow
def test_stochastic_divergence_is_unbiased():
    keys = jax.random.split(jax.random.key(0), 512)
    flow = affine_flow(divergence=jaxode.divergence.hutchinson())
    drawn = jax.vmap(lambda key: flow.log_prob(PARAMS, X, key=key))(keys)
    # Four standard errors of the mean, in four samples: one in 4,000 keys fails, and this does not.
    error = 4 * drawn.std(axis=0) / len(keys) ** 0.5
    assert (np.abs(drawn.mean(axis=0) - normal(1.0).logpdf(X)) < error).all()
    assert (error > 0.01).all()


def test_nonlinear_flow_of_each_number_by_itself():
    """`z' = p sin z` carries `tan(z / 2)` to `exp(p) tan(z / 2)`."""
    flow = jaxode.cnf(lambda t, z, p: p * jnp.sin(z), jaxode.standard_normal(()), **FINE)
    x, p = np.array(jax.random.uniform(jax.random.key(2), (3,), minval=-3, maxval=3)), 0.7
    tangent = np.exp(-p) * np.tan(x / 2)
    stretch = np.exp(-p) / np.cos(x / 2) ** 2 / (1 + tangent**2)
    expected = scipy.stats.norm.logpdf(2 * np.arctan(tangent)) + np.log(stretch)
    np.testing.assert_allclose(flow.log_prob(p, x), expected, rtol=1e-7)
    np.testing.assert_allclose(flow.nll(p, x), -expected.mean(), rtol=1e-6)
    samples, density = flow.sample_and_log_prob(p, jax.random.key(0), 3)
    assert samples.shape == (3,)
    np.testing.assert_allclose(density, flow.log_prob(p, samples), rtol=1e-7)


class Laplace:
    event_shape = (3,)

    def log_prob(self, z):
        return -jnp.abs(z).sum(axis=-1) - 3 * np.log(2)

    def sample(self, key, sample_shape=()):
        return jax.random.laplace(key, (*sample_shape, 3))


def test_base_of_a_users_own():
    flow = jaxode.cnf(lambda t, z, p: p * z, Laplace(), **FINE)
    expected = scipy.stats.laplace(scale=np.exp(0.7))
    np.testing.assert_allclose(flow.log_prob(0.7, X), expected.logpdf(X).sum(axis=1), rtol=1e-7)
    samples = np.ravel(flow.sample(0.7, jax.random.key(5), 2000))
    assert scipy.stats.kstest(samples, expected.cdf).pvalue > 1e-3


@pytest.mark.slow
def test_gradients_by_the_condition_of_each_row():
    """`z' = p k z` with a rate `k` of each row has the density of a scaled normal."""
    rates, log_2pi = jnp.array([0.1, 0.5, -0.3, 1.0]), np.log(2 * np.pi)
    flow = jaxode.cnf(lambda t, z, a: a[0] * a[1] * z, jaxode.standard_normal(3), **FINE)

    def exact(p, k):
        square = (X * jnp.exp(-p * k)[:, None]) ** 2
        return -(0.5 * square.sum(axis=1) - 3 * (-p * k) + 1.5 * log_2pi).mean()

    expected = jax.value_and_grad(exact, argnums=(0, 1))(0.8, rates)
    for loss in (
        lambda p, k: flow.log_prob(p, X, context=k).mean(),
        lambda p, k: -flow.nll(p, X, context=k),
    ):
        actual = jax.value_and_grad(loss, argnums=(0, 1))(0.8, rates)
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_single_precision():
    single = lambda tree: jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), tree)
    flow = jaxode.cnf(affine, jaxode.standard_normal(3))
    values = flow.log_prob(single(PARAMS), single(X))
    assert values.dtype == jnp.float32
    # Ten times the tolerance of 1e-5, of numbers of about ten.
    np.testing.assert_allclose(values, normal(1.0).logpdf(X), atol=1e-3)
