"""The audit finds what is wrong with a flow, and nothing where nothing is."""

import functools
from types import SimpleNamespace

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import memory_maps

import jaxode
from jaxode import divergence
from jaxode.auditing import checks

pytestmark = pytest.mark.slow
KEY = jax.random.key(0)


def wave(t, z, p):
    """A smooth field, of as many dimensions as `z`."""
    return p * jnp.sin(2 * jnp.roll(z, 1) + 3 * t)


def swirl(t, z, p):
    """Its Jacobian has a large part off the diagonal, which makes probes noisy."""
    return p * (jnp.roll(z, 1) + jnp.roll(z, -1))


def jump(t, z, p):
    """Samples pass jumps on their way."""
    return p * (1.5 + jnp.sign(jnp.sin(3 * z)))


def root(t, z, p):
    """Not Lipschitz at zero: samples end there in finite time, and cannot be carried back."""
    return -p * jnp.sign(z) * jnp.sqrt(jnp.abs(z))


def stiff(t, z, p):
    return -p * (z - jnp.sin(5 * t))


def stretch(t, z, p):
    """The density becomes a ridge along a diagonal, e^(2 p) times as long as it is wide."""
    return p * z[::-1]


def undefined(t, z, p):
    return jnp.where(t < 0.5, jnp.nan, p) * z


def cubic(t, z, p):
    """Its inverse explodes in finite time unless |x| < 1 / sqrt(2 p)."""
    return -p * z**3


FIELDS = wave, swirl, jump, root, stiff, stretch, undefined, cubic


def any_of(t, z, params):
    """Which field is a parameter, so that one program serves all of them."""
    which, p = params
    return jax.lax.switch(which, FIELDS, t, z, p)


def audit(f, event=1, p=1.0, x=None, rtol=1e-5, atol=1e-5, **options):
    """Tolerances are data, too."""
    rtol, atol = jnp.asarray(rtol), jnp.asarray(atol)
    flow = jaxode.cnf(any_of, jaxode.standard_normal(event), rtol=rtol, atol=atol, **options)
    x = jax.random.normal(jax.random.key(1), (16, event)) if x is None else x
    return jaxode.audit(flow, (jnp.asarray(FIELDS.index(f)), jnp.asarray(p)), x, KEY)


def audit_wave(i, event=1, **options):
    x = jax.random.normal(jax.random.key(1 + i), (16, event))
    return audit(wave, event, 1.0 - 0.1 * i, x, **options)


def shifted(t, z, args):
    p, (shift, label) = args
    return jnp.tanh(p * z) + shift + 0 * label.astype(z.dtype)


def audit_of_context(i):
    """Of a learned base and in forward mode, too."""
    base = jax.tree.map(lambda leaf: leaf + 0.1 * i, jaxode.diagonal_normal(1))
    x = 0.5 * jax.random.normal(jax.random.key(i), (16, 1))
    flow = jaxode.cnf(shifted, base, adjoint=jaxode.ForwardMode())
    context = 0.1 * x, np.arange(16).astype(">i4")  # labels, as of a FITS table
    return jaxode.audit(flow, 0.3 * (1.0 + i), x, KEY, context=context)


def pushed(t, z, p):
    """A short pulse on particles, by complex parameters. Without a largest step it is missed."""
    force = lambda d: jnp.real(p * jax.lax.complex(jnp.cos(d), jnp.sin(d)))
    pulse = jnp.exp(-(((t - 0.51) / 0.006) ** 2)) / (0.006 * np.pi**0.5)
    return pulse * (force(z - jnp.roll(z, 1, axis=0)) - force(jnp.roll(z, -1, axis=0) - z))


def audit_of_pushed(i):
    base = jaxode.centered_normal(3, 1)
    x = base.sample(jax.random.key(1 + i), (16,))
    flow = jaxode.cnf(pushed, base, max_step=0.01)
    return jaxode.audit(flow, jnp.asarray(0.2j + 0.1 * i), x, KEY)


class Signs(eqx.Module):
    """Sixteen probes, from an array that it holds."""

    part: jax.Array

    def __call__(self, key, z):
        positive = jax.random.bernoulli(key, self.part, (16, *z.shape))
        return jnp.where(positive, 1, -1).astype(z.dtype)


def audit_of_signs(i):
    estimate = divergence.hutchinson(16)._replace(init=Signs(jnp.asarray(0.5)))
    return audit(swirl, 4, 0.03 - 0.01 * i, divergence=estimate)


# Audits of other parameters and samples of the same shapes. A new kind of flow is one row.
HEALTHY = {
    "joint": audit_wave,
    "two dimensions, per sample": lambda i: audit_wave(i, 2, batch="per_sample"),
    "probes": lambda i: audit(swirl, 4, 0.03 - 0.01 * i, divergence=divergence.hutchinson(16)),
    "a divergence that holds an array": audit_of_signs,
    # It solves a batch as one system; the grid of the total probability, row by row.
    "implicit": lambda i: audit_wave(i, solver=jaxode.Rodas5P()),
    "learned base and context, forward mode": audit_of_context,
    "particles, complex parameters and a largest step": audit_of_pushed,
}


@pytest.mark.parametrize("run", HEALTHY.values(), ids=HEALTHY)
def test_healthy_flow_gets_no_advice_and_a_second_audit_compiles_nothing(run, compiled):
    report = run(0)
    compiled.clear()
    before = memory_maps()
    again = run(1)
    assert not compiled
    jax.jit(lambda x: x + 1.0)(0.0)
    assert compiled  # it would have been seen
    # Not one for each program: the allocator makes some itself.
    assert before is None or memory_maps() < before + 20
    assert again.values != report.values
    assert again.advice == {}
    assert report.advice == {}
    assert report.ok
    assert np.isfinite(list(report.values.values())).all()
    assert report.reference.endswith(" in float64 at tolerance 1e-10")
    # An implicit solver is not bound by stability, and rejects steps on smooth fields, too.
    explicit = report.reference.startswith("Dopri8")
    assert ("stiffness" in report.values) == explicit
    assert ("part of steps rejected" in report.values) == explicit


@functools.cache
def out_of_steps():
    return audit(wave, p=40.0, max_steps=23)


# (flow broken on purpose, what must be found, a word of the advice)
BROKEN = {
    "too loose a tolerance": (
        lambda: audit(wave, p=4.0, rtol=0.3, atol=0.3),
        {"round-trip error", "log-density error", "loss error", "gradient error"},
        "Tighten rtol and atol",
    ),
    "a field that jumps": (
        lambda: audit(jump, p=0.3),
        {"part of steps rejected", "round-trip error"},
        "Look for a kink, a jump or a singularity",
    ),
    "a field that is not Lipschitz": (
        lambda: audit(root, p=2.0),
        {"total probability"},
        "the field is not smooth",
    ),
    "too small max_steps": (
        lambda: out_of_steps(),
        {"solves that fail"},
        "the steps ran out at t=",
    ),
    "nearly too small max_steps": (
        lambda: audit(wave, p=4.0, max_steps=23),
        {"part of max_steps used"},
        "Raise max_steps from 23",
    ),
    "a stiff field": (
        lambda: audit(stiff, p=130.0),
        {"stiffness"},
        "Rodas5P",
    ),
    "a field that is not finite": (
        lambda: audit(undefined),
        {"solves that fail", "tight solves that fail"},
        "the vector field or the state is not finite at t=0.5",
    ),
}


@pytest.mark.parametrize(("run", "found", "word"), BROKEN.values(), ids=BROKEN)
def test_broken_flow_is_found(run, found, word):
    report = run()
    assert found <= set(report.advice)
    assert not report.ok
    assert any(word in sentence for sentence in report.advice.values())
    if "solves that fail" in report.advice:
        # Where the cause is known, no kink is looked for.
        assert "kink" not in " ".join(report.advice.values())
        tight = report.advice.get("tight solves that fail")
        assert tight is None or "fix the failing solves first" in tight


def test_evaluations_that_a_solver_does_not_count_have_no_row():
    """Those of diffrax: `num_evals` is -1, see test_implicit.py."""
    stats = SimpleNamespace(stats=SimpleNamespace(num_evals=jnp.array([-1])))
    assert checks._evaluations(SimpleNamespace(loss=((0.0, stats), None))) is None


def test_advice_is_for_the_options_that_the_flow_has():
    by_steps = " ".join(audit(wave, p=2.0, solver=diffrax.Euler(), steps=4).advice.values())
    assert "Raise steps from 4" in by_steps
    assert "rtol" not in by_steps
    assert "DiscreteAdjoint" not in by_steps
    loose = {"rtol": 0.3, "atol": 0.3, "adjoint": jaxode.BacksolveAdjoint()}
    gradient = audit(wave, p=4.0, **loose).advice["gradient error"]
    assert "jaxode.DiscreteAdjoint() instead of BacksolveAdjoint(" in gradient


def test_total_probability_that_the_grid_does_not_resolve_is_not_in_range():
    report = audit(stretch, 2, 5.0, batch="per_sample")
    row = next(row for row in report.rows if row.name == "total probability")
    assert np.isnan(row.value)
    assert row.limit == "not resolved by 511 points a side"
    assert row.advice == ""


def test_report_is_a_table():
    report = out_of_steps()
    lines = str(report).splitlines()
    assert lines[0].split() == ["check", "value", "in", "range"]
    assert [line.split("  ")[0] for line in lines[1 : 1 + len(report.rows)]] == list(report.values)
    assert "Errors are against Dopri8 in float64 at tolerance 1e-10." in lines
    advice = lines[-len(report.advice)]
    assert advice.startswith("! solves that fail: to_base: the steps ran out at t=")
    # What the failure keeps from being measured is NaN, and gives no advice.
    assert np.isnan(report.values["gradient error"])


def test_total_probability_is_that_of_a_support_that_no_solve_leaves():
    x = jax.random.uniform(jax.random.key(1), (16, 1), minval=-0.07, maxval=0.07)
    report = audit(cubic, x=x.at[3].set(0.5))
    assert report.advice == {}
    assert abs(report.values["total probability"] - 1) < 0.02


def test_data_far_from_the_base_are_named_before_their_rounding(default_settings):
    """A raw table in single precision, as the audit sees it if nobody has standardized it."""
    x = jnp.array([800.0, 100.0, 20.0]) + jnp.array([300.0, 10.0, 2.0]) * jax.random.normal(
        KEY, (64, 3)
    )
    report = audit(wave, 3, 0.1, x)
    assert report.reference == "Dopri8 in float32 at tolerance 1e-06"
    assert next(iter(report.advice)) == "distance from the base"
    assert report.values["distance from the base"] > 400
    assert "standardize=data" in report.advice["distance from the base"]
    assert report.advice["log-density error"].startswith("Fix the distance from the base first")
    # One sample in ten may be an outlier of a table that is.
    z = jnp.where(jnp.arange(64)[:, None] % 10 == 0, x, (x - x.mean(0)) / x.std(0))
    report = audit(wave, 3, 0.1, z)
    assert 0.5 < report.values["distance from the base"] < 2


def test_wrong_arguments_raise():
    flow = jaxode.cnf(wave, jaxode.standard_normal(2))
    with pytest.raises(ValueError, match=r"audit\(x=...\): must have shape"):
        jaxode.audit(flow, 1.0, jnp.ones((3, 1)), KEY)
    message = r"audit\(x=...\): must be finite; got NaN or inf in 2 of 3 rows, first in row"
    with pytest.raises(ValueError, match=message):
        jaxode.audit(flow, 1.0, jnp.ones((3, 2)).at[:2, 1].set(jnp.inf), KEY)
