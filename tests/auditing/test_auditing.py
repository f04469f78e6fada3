"""The audit finds what is wrong with a flow, and condemns no flow that is right."""

from typing import NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow
from scipy import stats

import jaxode
from jaxode import divergence
from jaxode.auditing import base as of_base

KEY = jax.random.key(0)
FIELDS = {
    "wave": lambda t, z, p: p * jnp.sin(2 * jnp.roll(z, 1) + 3 * t),
    "tanh": lambda t, z, p: jnp.tanh(p * (z + 0.5 * jnp.roll(z, 1))),
    "swirl": lambda t, z, p: 0.1 * p * (jnp.roll(z, 1) + jnp.roll(z, -1)),
    "jump": lambda t, z, p: p * (1.5 + jnp.sign(jnp.sin(3 * z))),
    "spin": lambda t, z, p: 12 * p * jnp.where(jnp.arange(z.size) % 2, 1, -1) * z[::-1],
    "cubic": lambda t, z, p: -p * z**3,  # its inverse explodes unless |x| < 1 / sqrt(2 p)
    "undefined": lambda t, z, p: jnp.where(t < 0.5, jnp.nan, p) * z,
    "still": lambda t, z, p: 0 * z,
    "root": lambda t, z, p: jnp.sqrt(jnp.abs(p - 0.3)) * z,  # by p, it has no derivative
}


class Offered:
    """Any of the fields, with a closed form that is off. Which, and by what, are data."""

    def __call__(self, t, z, args):
        return jax.lax.switch(args[0], list(FIELDS.values()), t, z, args[1])

    def value_and_divergence(self, t, z, args):
        of_derivative, of_divergence, more = jax.lax.stop_gradient(args[2])
        dz, trace = divergence.exact().apply(lambda z: self(t, z, args), z, None)
        return of_derivative * dz, of_divergence * trace + more


NORMAL = lambda z: jaxode.standard_normal(z.shape[-1]).log_prob(z), jax.random.normal


def semicircle(z):
    """Each column with the density `2 / pi sqrt(1 - z^2)`, whose gradient outside is NaN."""
    inside = (jnp.abs(z) < 1).all(-1)
    return jnp.where(inside, jnp.sum(jnp.log(2 / jnp.pi * jnp.sqrt(1 - z * z)), -1), -jnp.inf)


BOUNDED = semicircle, lambda key, shape: 2 * jax.random.beta(key, 1.5, 1.5, shape) - 1


class Base(eqx.Module):
    """A density times a factor, and samples at another scale."""

    event_shape: tuple[int, ...] = eqx.field(static=True, converter=lambda n: (n,))
    of: tuple = eqx.field(static=True, default=NORMAL)
    scale: jax.Array = eqx.field(converter=jnp.asarray, default=1.0)
    log_factor: jax.Array = eqx.field(converter=jnp.asarray, default=0.0)

    def log_prob(self, z):
        return self.of[0](z) + self.log_factor

    def sample(self, key, shape=()):
        return self.scale * self.of[1](key, (*shape, *self.event_shape))


def audit(f="wave", base=2, p=0.3, off=(1.0, 1.0, 0.0), x=None, context=None, **options):
    base = jaxode.standard_normal(base) if isinstance(base, int) else base
    x = 0.5 * jax.random.normal(jax.random.key(1), (16, *base.event_shape)) if x is None else x
    tolerances = {name: jnp.asarray(options.pop(name, 1e-5)) for name in ("rtol", "atol")}
    if isinstance(f, str):
        which = jnp.asarray(list(FIELDS).index(f))
        f, p = OFFERED, (which, jnp.asarray(p), tuple(jnp.asarray(each, float) for each in off))
    return jaxode.audit(jaxode.cnf(f, base, **tolerances, **options), p, x, KEY, context=context)


def off(of):
    """A divergence that is off by a factor, which is among the arguments of the field."""

    def apply(g, z, probe):
        dz, trace = of.apply(g, z, probe)
        return dz, jax.lax.stop_gradient(g.args[-1][1]) * trace

    return {"divergence": divergence.Divergence(of.init, apply, "my own")}


OFFERED, NOISY, EXACT = Offered(), off(divergence.hutchinson()), off(divergence.exact())
WRONG, LOOSE = {"off": (1, 1.01, 0)}, {"rtol": 0.3, "atol": 0.3, "p": 4.0}
TRACE, DRAWS, TOTAL = "divergence error", "base samples", "base probability"
FAIL, USED, ROUGH = "solves that fail", "part of max_steps used", "part of steps rejected"
FAR, OUTSIDE = "distance from the base", "samples of density zero"
BACKSOLVE, EULER, AWAY = jaxode.BacksolveAdjoint(), diffrax.Euler(), jnp.full((16, 2), 900.0)
SOLVER = "round-trip error, log-density error, gradient error"

# (a wrong flow, the checks that find it, words of the advice). A new plant is one row.
PLANTS = {
    "closed form": (lambda: audit("tanh", 12, **WRONG), TRACE, "is not the trace"),
    "of zero": (lambda: audit("still", off=(1, 1, 1)), TRACE, "is not the trace"),
    "derivative": (lambda: audit(off=(1.01, 1, 0)), TRACE, "returns a different derivative"),
    "my own": (lambda: audit("tanh", **EXACT, **WRONG), TRACE, "(my own) is not the trace"),
    "noisy": (lambda: audit("tanh", 12, 0.01, (1, 2, 0), **NOISY), TRACE, "(my own) is not the"),
    "wide": (lambda: audit(base=Base(2, scale=1.5)), DRAWS, "do not have its log_prob"),
    "one point": (lambda: audit(base=Base(2, scale=0.0)), f"{DRAWS}, {FAR}", "its log_prob"),
    "NaN": (lambda: audit(base=Base(2, scale=jnp.nan)), DRAWS, "make both finite"),
    "factor": (lambda: audit(base=Base(2, log_factor=0.1)), TOTAL, "Normalize the base"),
    "tolerance": (lambda: audit(**LOOSE), SOLVER, "Tighten rtol and atol"),
    "adjoint": (lambda: audit(**LOOSE, adjoint=BACKSOLVE), SOLVER, "DiscreteAdjoint() instead of"),
    "steps": (lambda: audit(p=2.0, solver=EULER, steps=4), SOLVER, "Raise steps from 4"),
    "jump": (lambda: audit("jump", 1), f"{ROUGH}, round-trip error", "Look for a kink"),
    "max_steps": (lambda: audit(p=40.0, max_steps=23), f"{FAIL}, {USED}", "steps ran out at t="),
    "root": (lambda: audit("root"), "gradient error", "such as sqrt at 0"),
    "nearly": (lambda: audit(p=4.0, max_steps=23), USED, "Raise max_steps from 23"),
    "undefined": (lambda: audit("undefined"), FAIL, "not finite at t=0.5"),
    "far": (lambda: audit("swirl", x=AWAY), FAR, "standardize=data"),
    "outside": (lambda: audit(base=Base(2, BOUNDED), x=AWAY), OUTSIDE, "nothing to measure"),
}  # fmt: skip


@pytest.mark.parametrize(("run", "found", "words"), PLANTS.values(), ids=PLANTS)
def test_plant_is_found(run, found, words):
    report = run()
    assert (set(report.advice), report.ok) == (set(found.split(", ")), False)
    assert any(words in sentence for sentence in report.advice.values())
    lines, first = str(report).splitlines(), next(iter(report.advice))
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(report.rows)]] == list(report.values)
    assert lines[-len(report.advice)].startswith(f"! {first}: ")


def pushed(t, z, p):
    """A short pulse on particles, by complex parameters. Without a largest step it is missed."""
    force = lambda d: jnp.real(p * jax.lax.complex(jnp.cos(d), jnp.sin(d)))
    pulse = jnp.exp(-(((t - 0.51) / 0.006) ** 2)) / (0.006 * np.pi**0.5)
    return pulse * (force(z - jnp.roll(z, 1, axis=0)) - force(jnp.roll(z, -1, axis=0) - z))


def shifted(t, z, args):
    p, (shift, label) = args
    return jnp.tanh(p * z) + shift + 0 * label.astype(z.dtype)


PARTICLES = jaxode.centered_normal(3, 1)
ROWS = 0.1 * jnp.ones((16, 1)), np.arange(16).astype(">i4")  # labels, as of a FITS table
half = lambda t, z, p: jnp.tanh(p.astype(z.dtype) * z)
near = lambda size: jax.random.uniform(jax.random.key(1), (16, size), minval=-0.1, maxval=0.1)
# Right flows by their parameter. A new one is one row.
RIGHT = {
    "two columns": lambda p: audit(p=p),
    "12 columns": lambda p: audit("tanh", 12, p),
    "gradient of zero": lambda p: audit("spin", p=10 * p),
    "implicit, per sample": lambda p: audit(
        base=1, p=p, solver=jaxode.Rodas5P(), batch="per_sample"
    ),
    "probes": lambda p: audit("swirl", 4, p, divergence=divergence.hutchinson(16)),
    "noisy": lambda p: audit("tanh", 12, 0.1 * p, **NOISY),
    "learned base, context, forward": lambda p: audit(
        shifted, jaxode.diagonal_normal(1), p, context=ROWS, adjoint=jaxode.ForwardMode()
    ),
    "particles": lambda p: audit(
        pushed, PARTICLES, jnp.asarray(p + 0.2j), x=PARTICLES.sample(KEY, (16,)), max_step=0.01
    ),
    "bounds": lambda p: audit("tanh", Base(2, BOUNDED), p, x=near(2).at[3].set(5.0)),
    "no way back for most": lambda p: audit("cubic", 1, p, x=near(1)),
    "half precision": lambda p: audit(half, x=near(2).astype(jnp.float16), p=jnp.float32(p)),
}  # fmt: skip


# Each compiles a dozen programs of its own, for 10 s.
SLOW = ["implicit, per sample", "probes", "particles", "half precision"]


@pytest.mark.parametrize("name", with_slow(RIGHT, SLOW))
def test_right_flow_is_not_condemned_and_a_second_audit_compiles_nothing(name, compiled):
    run = RIGHT[name]
    report = run(0.3)
    compiled.clear()
    again = run(0.29)
    assert not compiled
    assert again.values != report.values
    assert (report.advice, again.advice, report.ok) == ({}, {}, True)


class Mixture(NamedTuple):
    """Of two normals."""

    means: tuple[float, float]
    scales: tuple[float, float]

    def rvs(self, shape, random_state):
        rng = np.random.default_rng(random_state)
        which = rng.integers(2, size=shape)
        return np.array(self.means)[which] + np.array(self.scales)[which] * rng.normal(size=shape)

    def logpdf(self, x):
        parts = map(stats.norm.logpdf, (x, x), self.means, self.scales)
        return np.logaddexp(*parts) - np.log(2.0)


# Densities with few moments, without mean, with bounds, and infinite at the bounds.
SAMPLED = {
    "normal": stats.norm(),
    "t": stats.t(3),
    "Cauchy": stats.cauchy(),
    "wide": stats.t(0.5),
    "box": stats.uniform(),
    "exp": stats.expon(),
    "arcsine": stats.beta(0.5, 0.5),
    "modes apart": Mixture((-1.0, 1.0), (0.1, 0.1)),
    "a narrow mode": Mixture((0.0, 0.0), (1.0, 1e-3)),  # no grid would meet half of it
}


@pytest.mark.parametrize("name", SAMPLED)
def test_samples_of_a_density(name):
    """Three and a half of six standard errors leave room for the largest of seven means."""
    rng, x = np.random.default_rng, SAMPLED[name].rvs((2**14, 2), random_state=0)
    with np.errstate(divide="ignore"):  # the logarithm of the density at a bound
        log_density = lambda x: SAMPLED[name].logpdf(x).sum(axis=1)
        assert of_base.imbalance(rng(0), x, log_density) < 3.5
        value, error = of_base.integral(rng(0), x, lambda x: log_density(x) + 1)
        assert abs(value / np.e - 1) < 4 * error / np.e < 0.2
        for scale, shift in ((1.5, 0.0), (0.5, 0.0), (1.0, 1.0), (0.0, 0.0)):
            moved = scale * (x - np.median(x, axis=0)) + np.median(x, axis=0) + shift
            assert of_base.imbalance(rng(0), moved, log_density) > of_base.IMBALANCE
