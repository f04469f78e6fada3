"""Flows that are made to fool the audit: wrong ones that look right, right ones that look wrong."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jaxode
from jaxode import divergence
from jaxode.auditing import density as density_checks
from jaxode.auditing.balance import imbalance
from jaxode.auditing.subject import Subject

KEY = jax.random.key(0)


def matrix(size):
    return 0.3 * jax.random.normal(jax.random.key(2), (size, size)) / size**0.5


def tanh(t, z, p):
    return jnp.tanh(p @ z)


class Offered:
    """A field with a closed form, which is right if both factors are one.

    In two dimensions, it is a rotation at any positive speed.
    """

    # Speed and factors are among the parameters, so that one program serves all of them.
    def __call__(self, t, z, args):
        p, speed, _ = args
        dz = tanh(t, z, p)
        return dz if z.size > 2 else jnp.where(speed > 0, speed * jnp.stack([-z[1], z[0]]), dz)

    def value_and_divergence(self, t, z, args):
        p, speed, factors = args
        of_derivative, of_divergence = jax.lax.stop_gradient(factors)
        dz = self(t, z, args)
        trace = jnp.where(speed > 0, 0.0, jnp.sum((1 - dz * dz) * jnp.diagonal(p)))
        return of_derivative * dz, of_divergence * trace


OFFERED = Offered()


def audit_offered(base, x=None, speed=0.0, derivative=1.0, divergence=1.0):
    base = jaxode.standard_normal(base) if isinstance(base, int) else base
    p = matrix(base.event_shape[0]), jnp.asarray(speed), (derivative, divergence)
    return audit(OFFERED, base, p, x)


def draw_normal(key, z):
    return jax.random.normal(key, z.shape, z.dtype)


class Still:
    """Nothing moves, and the divergence is said to be one."""

    def __call__(self, t, z, p):
        return jnp.zeros_like(z)

    def value_and_divergence(self, t, z, p):
        return jnp.zeros_like(z), 1.0


class Growing:
    """A field with a trace of `2 p`, and a closed form that is 1% off."""

    def __call__(self, t, z, p):
        return p * z

    def value_and_divergence(self, t, z, p):
        return p * z, 2.02 * p


def multiple_of_trace(g, z, v):
    """The factor is the last of the arguments, so that one program serves all of them."""
    dz, jv = jax.jvp(g, (z,), (v,))
    return dz, jax.lax.stop_gradient(g.args[-1]) * jnp.sum(v * jv)


ESTIMATE = divergence.Divergence(draw_normal, multiple_of_trace, "a multiple of the trace")


def tanh_or_square(t, z, args):
    """The trace of the square changes sign with the sample: errors of it have the mean zero."""
    p, is_square, _ = args
    return jnp.where(is_square, 0.005 * z * z, tanh(t, z, p))


def audit_estimate(factor, is_square):
    x = 0.5 * jax.random.normal(jax.random.key(1), (8, 12))
    x = jnp.stack([x, -x], axis=1).reshape(16, 12)
    p = 0.01 * matrix(12), jnp.asarray(is_square), jnp.asarray(factor)
    return audit(tanh_or_square, 12, p, x, divergence=ESTIMATE)


class Base(eqx.Module):
    """One of several densities: which, its factor and its scale are data, of one program."""

    which: jax.Array = eqx.field(converter=jnp.asarray)
    event_shape: tuple[int, ...] = eqx.field(static=True)
    log_factor: jax.Array = eqx.field(converter=jnp.asarray)
    scale: jax.Array = eqx.field(converter=jnp.asarray)

    def log_prob(self, z):
        densities = normal_density, cube_density, apart_density, narrow_density
        return jax.lax.switch(self.which, densities, z) + self.log_factor

    def sample(self, key, shape=()):
        draws = jax.random.normal, draw_cube, draw_apart, draw_narrow
        drawn = [lambda key, draw=draw: draw(key, (*shape, *self.event_shape)) for draw in draws]
        return self.scale * jax.lax.switch(self.which, drawn, key)


def normal(size, log_factor=0.0, scale=1.0):
    """A normal density times a constant, or one that draws samples of another scale."""
    return Base(0, (size,), log_factor, scale)


def normal_density(z):
    return jaxode.standard_normal(z.shape[-1]).log_prob(z)


def cube(size):
    """The uniform density between -1 and 1."""
    return Base(1, (size,), 0.0, 1.0)


def cube_density(z):
    inside = (jnp.abs(z) < 1).all(axis=-1)
    return jnp.where(inside, -z.shape[-1] * jnp.log(2.0), -jnp.inf)


def draw_cube(key, shape):
    return jax.random.uniform(key, shape, minval=-1.0, maxval=1.0)


def apart(size):
    """A mixture of two narrow normal densities, which no normal density resembles."""
    return Base(2, (size,), 0.0, 1.0)


def apart_density(z):
    one = lambda mean: -jnp.sum(jnp.square((z - mean) / 0.1), axis=-1) / 2
    return (
        jnp.logaddexp(one(-1.0), one(1.0))
        - z.shape[-1] * jnp.log(0.1 * (2 * jnp.pi) ** 0.5)
        - jnp.log(2.0)
    )


def draw_apart(key, shape):
    one, two = jax.random.split(key)
    sign = jax.random.rademacher(one, (*shape[:-1], 1), float)
    return sign + 0.1 * jax.random.normal(two, shape)


def narrow(size):
    """A normal density, of which a half lies in a part that no grid and few proposals meet."""
    return Base(3, (size,), 0.0, 1.0)


def narrow_density(z):
    wide, size = normal_density(z), z.shape[-1]
    return jnp.logaddexp(wide, normal_density(1e3 * z) + size * jnp.log(1e3)) - jnp.log(2.0)


def draw_narrow(key, shape):
    one, two = jax.random.split(key)
    scale = jnp.where(jax.random.bernoulli(one, shape=(*shape[:-1], 1)), 1.0, 1e-3)
    return scale * jax.random.normal(two, shape)


def audit(f, base, p=None, x=None, **options):
    base = jaxode.standard_normal(base) if isinstance(base, int) else base
    size = base.event_shape[0]
    p = matrix(size) if p is None else p
    x = 0.5 * jax.random.normal(jax.random.key(1), (16, size)) if x is None else x
    return jaxode.audit(jaxode.cnf(f, base, **options), p, x, KEY)


# (a wrong flow, the checks that find it, what the advice names). A new attack is one row.
WRONG = {
    "wrong sign of the divergence": (
        lambda: audit_offered(12, divergence=-1.0), {"divergence error"}, "is not the trace",
    ),
    "divergence 1% off": (
        lambda: audit_offered(12, divergence=1.01), {"divergence error"}, "is not the trace",
    ),
    "divergence 1% off in two dimensions": (
        lambda: audit_offered(normal(2), divergence=1.01), {"divergence error"},
        "is not the trace",
    ),
    "wrong sign of the divergence in two dimensions": (
        lambda: audit_offered(normal(2), divergence=-1.0), {"divergence error"},
        "is not the trace",
    ),
    "a divergence 1% off of large volume": (
        lambda: audit(Growing(), normal(2), jnp.asarray(3.0)), {"divergence error"},
        "is not the trace",
    ),
    "another derivative than the field": (
        lambda: audit_offered(12, derivative=1.01), {"divergence error"}, "different derivative",
    ),
    "a divergence of a field that is zero": (
        lambda: audit(Still(), 12), {"divergence error"}, "is not the trace",
    ),
    "an estimate of twice the trace": (
        lambda: audit_estimate(2.0, False), {"divergence error"}, "is not the trace",
    ),
    "an estimate of twice the trace where that has the mean zero": (
        lambda: audit_estimate(2.0, True), {"divergence error"}, "is not the trace",
    ),
    "base density in 256 dimensions": (
        lambda: audit(tanh, normal(256, 0.1), 0.01 * matrix(256)), {"base probability"},
        "Normalize",
    ),
    "base density in 3 dimensions": (
        lambda: audit(tanh, normal(3, 0.1)), {"base probability", "total probability"},
        "Normalize",
    ),
    "a base that draws too widely": (
        lambda: audit_offered(normal(2, scale=1.5)), {"base samples"}, "do not have its log_prob",
    ),
    "a base that draws NaN": (
        lambda: audit_offered(normal(2, scale=jnp.nan)), {"base samples"},
        "Fix the base: it draws samples with NaN or inf, in 16384 of 16384 rows",
    ),
    "a base that draws one point": (
        lambda: audit_offered(normal(2, scale=0.0)),
        {"distance from the base", "base samples", "total probability"}, "do not have its log_prob",
    ),
    "too few probes": (
        lambda: audit(tanh, 12, 0.3 * matrix(12), divergence=divergence.hutchinson()),
        {"probe standard error"}, "times as many probes, or",
    ),
    "more probes than products that are exact": (
        lambda: audit(tanh, 12, 3 * matrix(12), divergence=divergence.hutchinson()),
        {"probe standard error"}, "report use divergence=jaxode.divergence.exact()",
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("run", "found", "word"), WRONG.values(), ids=WRONG)
def test_wrong_flow_is_found(run, found, word):
    report = run()
    assert set(report.advice) == found
    assert any(word in sentence for sentence in report.advice.values())


# Densities with few moments, without mean, with bounds, and infinite at the bounds.
SAMPLED = {
    "normal": stats.norm(), "Student's t": stats.t(3), "Cauchy": stats.cauchy(),
    "without mean": stats.t(0.5), "uniform": stats.uniform(), "exponential": stats.expon(),
    "arcsine": stats.beta(0.5, 0.5),
}  # fmt: skip
# Of six standard errors, three and a half leave room for the largest of seven means.
QUIET = 4.0


@functools.cache
def sampled(name):
    return SAMPLED[name].rvs((2**14, 3), random_state=0)


def imbalance_of(name, x):
    with np.errstate(divide="ignore"):  # the logarithm of the density at a bound
        return imbalance(KEY, x, lambda x: SAMPLED[name].logpdf(x).sum(axis=1))


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_of_a_density_are_in_balance(name):
    assert imbalance_of(name, sampled(name)) < QUIET


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize(("scale", "shift"), [(1.5, 0.0), (0.5, 0.0), (1.0, 1.0)])
def test_samples_of_another_density_are_not(name, scale, shift):
    center = np.median(sampled(name), axis=0)
    x = center + scale * (sampled(name) - center) + shift
    assert imbalance_of(name, x) > density_checks.IMBALANCE


def test_samples_that_are_all_alike_have_no_density():
    for value in (0.0, 1.0):
        assert imbalance_of("normal", np.full((2**14, 3), value)) > density_checks.IMBALANCE


def half(t, z, p):
    """It computes in half precision whatever it gets."""
    return jnp.tanh(p.astype(jnp.float16) @ z.astype(jnp.float16))


def outside(size):
    x = jax.random.uniform(jax.random.key(1), (16, size), minval=-0.7, maxval=0.7)
    return x.at[3].set(5.0)


# (a right flow, some of what is measured, within which tolerance).
RIGHT = {
    "closed form in 12 dimensions": (
        lambda: audit_offered(12), {"divergence error": 0, "base probability": 1}, 0.02,
    ),
    "an estimate of the trace": (
        lambda: audit_estimate(1.0, False), {"divergence error": 0}, 1e-12,
    ),
    "an estimate of a trace with the mean zero": (
        lambda: audit_estimate(1.0, True), {"divergence error": 0}, 1e-12,
    ),
    "256 dimensions": (
        lambda: audit(tanh, normal(256), 0.01 * matrix(256)), {"base probability": 1}, 0.05,
    ),
    "compact support and a sample outside": (
        lambda: audit_offered(cube(2), outside(2)),
        {"samples of density zero": 1, "total probability": 1}, 0.02,
    ),
    "compact support in 3 dimensions": (
        lambda: audit(tanh, cube(3), x=outside(3)),
        {"samples of density zero": 1, "total probability": 1}, 0.04,
    ),
    "a mixture in 3 dimensions": (
        lambda: audit(tanh, apart(3)), {"base probability": 1, "total probability": 1}, 0.04,
    ),
    "rotation with a gradient of zero": (
        lambda: audit_offered(normal(2), speed=12.0), {"gradient error": 0}, 1e-3,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("run", "values", "atol"), RIGHT.values(), ids=RIGHT)
def test_right_flow_is_not_blamed(run, values, atol):
    report = run()
    assert report.advice == {}
    found = {name: report.values[name] for name in values}
    assert found == pytest.approx(values, abs=atol)


@pytest.mark.slow
def test_integral_without_the_power_to_tell_says_so():
    row = {row.name: row for row in audit(tanh, apart(256), 0.01 * matrix(256)).rows}[
        "base probability"
    ]
    assert np.isnan(row.value)
    assert row.limit.startswith("not resolved: effective sample size")
    assert row.advice == ""


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_an_integral_that_misses_a_narrow_part_says_so(size):
    report = audit(tanh, narrow(size))
    limits = {row.name: row.limit for row in report.rows}
    for name in ("base probability", "total probability"):
        assert limits[name].startswith("not resolved")
        assert name not in report.advice


@pytest.mark.slow
def test_no_sample_inside_is_named():
    report = audit_offered(cube(2), 5.0 + jnp.zeros((16, 2)))
    assert set(report.advice) == {"samples of density zero"}


@pytest.mark.slow
def test_half_precision_of_a_field_is_named():
    """Also if the field hides it by casting back."""
    advice = "compute the vector field in float32, not float16"
    with jax.numpy_dtype_promotion("standard"):
        report = audit(lambda t, z, p: half(t, z, p).astype(z.dtype), 2)
        open_about_it = jaxode.cnf(half, jaxode.standard_normal(2))
        assert Subject(open_about_it, open_about_it, P, X, KEY, None).rounded == advice
    assert advice in report.advice["tight solves that fail"]
    assert "rtol" not in " ".join(report.advice.values())


@pytest.mark.slow
def test_samples_in_half_precision_are_audited():
    p, x = matrix(2).astype(jnp.float16), jnp.ones((4, 2), jnp.float16)
    assert audit(lambda t, z, p: jnp.tanh(p.astype(z.dtype) @ z), 2, p, x).advice == {}


FLOW = jaxode.cnf(tanh, jaxode.standard_normal(2))
X = jnp.ones((3, 2))
P = matrix(2)
BAD_INPUT = [
    (
        lambda: jaxode.audit(tanh, P, X, KEY), TypeError,
        "audit(flow=...): must be a flow made by jaxode.cnf; got function. "
        "Pass jaxode.cnf(f, base).",
    ),
    (
        lambda: jaxode.audit(jaxode.bind(FLOW, P), P, X, KEY), TypeError,
        "audit(flow=...): must be a flow made by jaxode.cnf; got Density. "
        "Pass density.flow, density.params and density.to_flow(x).",
    ),
    (
        lambda: jaxode.audit(FLOW, P, X, 0), TypeError,
        "audit(key=...): must be a key of jax.random; got int. Pass jax.random.key(0).",
    ),
    (
        lambda: jaxode.audit(FLOW, P, [[1.0, 2.0]], KEY), TypeError,
        "audit(x=...): must be an array of numbers; got list. Convert it with np.asarray(..., "
        "np.float32), and fill what is masked.",
    ),
    (
        lambda: jaxode.audit(FLOW, P, X[:0], KEY), ValueError,
        "audit(x=...): must have at least one row; got shape (0, 2).",
    ),
    (
        lambda: jaxode.audit(FLOW, P, X, KEY, context=X[:2]), ValueError,
        "audit(context=...): leaves must have a leading axis of 3, one row per sample; got shape "
        "(2, 2). To give all samples the same row, pass jnp.broadcast_to(row, (3, *row.shape)).",
    ),
    (
        lambda: jax.jit(lambda p: jaxode.audit(FLOW, p, X, KEY).values)(P), ValueError,
        "audit: measures numbers, so it runs outside jax.jit, jax.grad and jax.vmap; got "
        "arguments that are traced. Call it between training steps.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "exception", "message"), BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT]
)
def test_wrong_argument_gets_one_sentence(call, exception, message):
    with pytest.raises(exception) as info:
        call()
    assert str(info.value) == message
