"""The audit finds what is wrong with a flow, and condemns no flow that is right."""

import dataclasses
from types import SimpleNamespace
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
from jaxode.auditing import checks
from jaxode.auditing.audited_flow import AuditedFlow
from jaxode.auditing.divergence_audit import divergence as divergence_check

KEY = jax.random.key(0)
FIELDS = {
    "wave": lambda t, z, p: p * jnp.sin(2 * jnp.roll(z, 1) + 3 * t),
    "tanh": lambda t, z, p: jnp.tanh(p * (z + 0.5 * jnp.roll(z, 1))),
    "swirl": lambda t, z, p: 0.1 * p * (jnp.roll(z, 1) + jnp.roll(z, -1)),
    "jump": lambda t, z, p: p * (1.5 + jnp.sign(jnp.sin(3 * z))),
    "spin": lambda t, z, p: 12 * p * jnp.where(jnp.arange(z.size) % 2, 1, -1) * z[::-1],
    "cubic": lambda t, z, p: -p * z**3,  # its inverse explodes unless |x| < 1 / sqrt(2 p)
    "undefined": lambda t, z, p: jnp.where(t < 0.5, jnp.nan, p) * z,
    "root": lambda t, z, p: jnp.sqrt(jnp.abs(p - 0.3)) * z,  # by p, it has no derivative
}
# Compiled with all others of these, so that most audits run one set of programs.
COMMON = ["wave", "jump", "spin", "cubic", "undefined", "root"]


@dataclasses.dataclass(frozen=True)
class Offered:
    """Any of some fields, with a closed form that is off. Which, and by what, are data."""

    names: tuple[str, ...]

    def __call__(self, t, z, args):
        return jax.lax.switch(args[0], [FIELDS[name] for name in self.names], t, z, args[1])

    def value_and_divergence(self, t, z, args):
        of_derivative, of_divergence, more = jax.lax.stop_gradient(args[2])
        dz, trace = divergence.exact().apply(lambda z: self(t, z, args), z, None)
        return of_derivative * dz, of_divergence * trace + more


NORMAL = lambda z: jaxode.standard_normal(z.shape[-1]).log_prob(z), jax.random.normal


def semicircle(z):
    """Each column with the density `2 / pi sqrt(1 - z^2)`, whose gradient outside is NaN."""
    inside = (jnp.abs(z) < 1).all(-1)
    return jnp.where(inside, jnp.sum(jnp.log(2 / jnp.pi * jnp.sqrt(1 - z * z)), -1), -jnp.inf)


def from_a_disc(key, shape):
    """Samples of a semicircle: a coordinate of points that are uniform in the disc above."""
    radius, turn = jax.random.uniform(key, (2, *shape))
    return jnp.sqrt(radius) * jnp.cos(2 * jnp.pi * turn)


BOUNDED = semicircle, from_a_disc


class Base(eqx.Module):
    """A density times a factor, and samples at another scale. All but its columns is data."""

    event_shape: tuple[int, ...] = eqx.field(static=True, converter=lambda n: (n,))
    bounded: jax.Array = eqx.field(converter=jnp.asarray, default=False)
    scale: jax.Array = eqx.field(converter=jnp.asarray, default=1.0)
    log_factor: jax.Array = eqx.field(converter=jnp.asarray, default=0.0)

    def log_prob(self, z):
        return jax.lax.cond(self.bounded, BOUNDED[0], NORMAL[0], z) + self.log_factor

    def sample(self, key, shape=()):
        draw = BOUNDED[1] if self.bounded else NORMAL[1]
        return self.scale * draw(key, (*shape, *self.event_shape))


def subject(f="wave", base=2, p=0.3, off=(1.0, 1.0, 0.0), x=None, **options):
    """A flow, its parameters and samples."""
    base = Base(base) if isinstance(base, int) else base
    x = 0.5 * jax.random.normal(jax.random.key(1), (16, *base.event_shape)) if x is None else x
    tolerances = {name: jnp.asarray(options.pop(name, 1e-5)) for name in ("rtol", "atol")}
    if isinstance(f, str):
        names = tuple(COMMON if f in COMMON else [f])
        which, f = jnp.asarray(names.index(f)), Offered(names)
        p = (which, jnp.asarray(p), tuple(jnp.asarray(each, float) for each in off))
    return jaxode.cnf(f, base, **tolerances, **options), p, x


def audit(*args, context=None, **options):
    return jaxode.audit(*subject(*args, **options), KEY, context=context)


def off(of):
    """A divergence that is off by a factor, which is among the arguments of the field."""

    def apply(g, z, probe):
        dz, trace = of.apply(g, z, probe)
        return dz, jax.lax.stop_gradient(g.args[-1][1]) * trace

    return {"divergence": divergence.Divergence(of.init, apply, "my own")}


NOISY, EXACT = off(divergence.hutchinson()), off(divergence.exact())
WRONG, LOOSE = {"off": (1, 1.01, 0)}, {"rtol": 0.3, "atol": 0.3, "p": 4.0}
TRACE, DRAWS, TOTAL = "divergence error", "base samples", "base probability"
FAIL, USED, ROUGH = "solves that fail", "part of max_steps used", "part of steps rejected"
FAR, OUTSIDE = "distance from the base", "samples of density zero"
BACKSOLVE, EULER, AWAY = jaxode.BacksolveAdjoint(), diffrax.Euler(), jnp.full((16, 2), 900.0)
SOLVER = "round-trip error, log-density error, gradient error"

# (a wrong flow, the checks that find it, words of the advice). A new plant is one row.
PLANTS = {
    "closed form": (lambda: audit("cubic", x=close(2), **WRONG), TRACE, "is not the trace"),
    "of zero": (lambda: audit(p=0.0, off=(1, 1, 1)), TRACE, "is not the trace"),
    "derivative": (lambda: audit(off=(1.01, 1, 0)), TRACE, "returns a different derivative"),
    "12 columns": (lambda: audit("tanh", 12, **WRONG), TRACE, "is not the trace"),
    "my own": (lambda: audit("tanh", **EXACT, **WRONG), TRACE, "(my own) is not the trace"),
    "noisy": (lambda: audit("tanh", 12, 0.01, (1, 2, 0), **NOISY), TRACE, "(my own) is not the"),
    "wide": (lambda: audit(base=Base(2, scale=1.5)), DRAWS, "do not have its log_prob"),
    "one point": (lambda: audit(base=Base(2, scale=0.0)), f"{DRAWS}, {FAR}", "its log_prob"),
    "NaN": (lambda: audit(base=Base(2, scale=jnp.nan)), DRAWS, "make both finite"),
    "factor": (lambda: audit(base=Base(2, log_factor=0.1)), TOTAL, "Normalize the base"),
    "tolerance": (lambda: audit(**LOOSE), SOLVER, "Tighten rtol and atol"),
    "adjoint": (lambda: audit(**LOOSE, adjoint=BACKSOLVE), SOLVER, "DiscreteAdjoint() instead of"),
    "steps": (lambda: audit(p=2.0, solver=EULER, steps=4), SOLVER, "Raise steps from 4"),
    "jump": (lambda: audit("jump"), f"{ROUGH}, round-trip error", "Look for a kink"),
    "max_steps": (lambda: audit(p=40.0, max_steps=23), f"{FAIL}, {USED}", "steps ran out at t="),
    "root": (lambda: audit("root"), "gradient error", "such as sqrt at 0"),
    "nearly": (lambda: audit(p=4.0, max_steps=23), USED, "Raise max_steps from 23"),
    "undefined": (lambda: audit("undefined"), FAIL, "not finite at t=0.5"),
    "far": (lambda: audit(p=0.0, x=AWAY), FAR, "standardize=data"),
    "outside": (lambda: audit(base=Base(2, True), x=AWAY), OUTSIDE, "nothing to measure"),
}  # fmt: skip


# Options of a flow and numbers of columns that no other audit has: each compiles a dozen programs.
OTHERS = ["12 columns", "my own", "noisy", "adjoint", "steps", "max_steps", "nearly"]


@pytest.mark.parametrize("name", with_slow(PLANTS, OTHERS))  # programs of their own, 5 s each
def test_plant_is_found(name):
    run, found, words = PLANTS[name]
    report = run()
    assert (set(report.advice), report.ok) == (set(found.split(", ")), False)
    assert any(words in sentence for sentence in report.advice.values())
    lines, first = str(report).splitlines(), next(iter(report.advice))
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(report.rows)]] == list(report.values)
    assert lines[-len(report.advice)].startswith(f"! {first}: ")


def test_a_noisy_divergence_has_the_trace_as_its_mean():
    """The check alone: without a solve, of samples that stay where they are."""

    def row(factor):
        flow, p, x = subject("tanh", 2, 0.3, (1.0, factor, 0.0), **NOISY)
        alone = AuditedFlow(flow, p, x, KEY, None)
        alone.z = x
        return divergence_check(alone)

    right, wrong = row(1.0), row(2.0)
    assert (right.value, right.advice) == (0.0, "")
    assert wrong.value > 0.5
    assert "(my own) is not the trace" in wrong.advice


def measured(taken=(10, 20), rejected=(1, 0), gradient=1.0, failed="", **options):
    """What the checks of the loss read of a flow whose tight solve has the gradient one."""
    stats = SimpleNamespace(num_steps=np.array(taken), num_rejected=np.array(rejected))
    own = {"steps": None, "max_steps": 50, "implicit": False, "adjoint": jaxode.DiscreteAdjoint()}
    return SimpleNamespace(
        flow=SimpleNamespace(solve_options=SimpleNamespace(**(own | options))),
        losses=(({"p": jnp.asarray(gradient)}, stats), ({"p": jnp.asarray(1.0)}, None)),
        params={"p": jnp.asarray(0.3)}, failed=failed, tight=SimpleNamespace(failed=""),
        outside=np.zeros(2, bool),
    )  # fmt: skip


# (a check, what it reads, its value, words of the advice or none). A new one is one row.
MEASURED = {
    "few steps": (checks._steps, {}, 0.4, ""),
    "many steps of one row": (checks._steps, {"taken": (10, 30)}, 0.6, "Raise max_steps from 50"),
    "rejected": (checks._rejected, {"rejected": (9, 6)}, 0.5, "no step size suits the field"),
    "few rejected": (checks._rejected, {"rejected": (3, 3)}, 0.2, ""),
    "rejected after a failure": (checks._rejected, {"rejected": (9, 9), "failed": "x"}, np.nan, ""),
    "gradient": (checks._gradient, {"gradient": 1.02}, 0.02, "Tighten rtol and atol for training."),
    "right gradient": (checks._gradient, {"gradient": 1.001}, 0.001, ""),
    "adjoint": (
        checks._gradient, {"gradient": 0.9, "adjoint": BACKSOLVE}, 0.1,
        "Tighten rtol and atol for training, or use adjoint=jaxode.DiscreteAdjoint() instead of Ba",
    ),
    "steps": (checks._gradient, {"gradient": 0.9, "steps": 4}, 0.1, "Raise steps from 4 for train"),
    "root": (checks._gradient, {"gradient": np.nan}, np.nan, "such as sqrt at 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_what_a_check_says_of_a_measurement(name):
    check, reads, value, words = MEASURED[name]
    row = check(measured(**reads))
    np.testing.assert_allclose(row.value, value, rtol=1e-6)
    assert row.advice.startswith(words) or (words in row.advice and words)
    assert bool(row.advice) == bool(words)


@pytest.mark.parametrize("check", [checks._steps, checks._rejected])
def test_a_check_of_adaptive_steps_leaves_out_other_flows(check):
    option = {"steps": 4} if check is checks._steps else {"implicit": True}
    assert check(measured(**option)) is None


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
close = lambda size: jax.random.uniform(jax.random.key(1), (16, size), minval=-0.1, maxval=0.1)
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
    "bounds": lambda p: audit("wave", Base(2, True), 0.1 * p, x=close(2).at[3].set(5.0)),
    "no way back for most": lambda p: audit("cubic", 2, p, x=close(2)),
    "half precision": lambda p: audit(half, x=close(2).astype(jnp.float16), p=jnp.float32(p)),
}  # fmt: skip


SLOW = [
    "12 columns", "implicit, per sample", "probes", "noisy", "learned base, context, forward",
    "particles", "half precision",
]  # fmt: skip


@pytest.mark.parametrize("name", with_slow(RIGHT, SLOW))  # a dozen programs of their own, 10 s each
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
