"""Flows of angles: one period has all the probability, and no cut shows."""

import functools
import math
import pickle
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from helpers import with_slow

import jaxode
from jaxode._checks import rules
from jaxode.auditing import base as auditing_base
from jaxode.flows.periods import off_period_of

KEY = jax.random.key(0)
OPTIONS = {"rtol": 1e-7, "atol": 1e-7}
# The lines of a grid beside angles. Sums over them are integrals, of functions without bounds.
LINE = np.linspace(-25.0, 25.0, 126)
TURN = np.arange(12.0) / 12


def doubled(network):
    """A field that is not small."""
    return jax.tree.map(lambda leaf: 2 * np.asarray(leaf), network)


def bound(period, size=2, **options):
    base = jaxode.torus(size, period)
    network = doubled(jaxode.nn.Residual(size, 8, 1, key=KEY, period=period))
    return jaxode.bind(jaxode.cnf(jaxode.nn.field, base, **OPTIONS, **options), network)


def grid(*axes):
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))


# An angle alone is one of two.
@pytest.mark.parametrize("period", [[1.0, 24.0], pytest.param([0.5], marks=pytest.mark.slow)])
def test_a_torus_has_a_probability_of_one(period):
    period = np.array(period)
    x = grid(*(p * np.arange(24.0) / 24 for p in period))
    density = bound(period, len(period))
    log_prob = np.asarray(density.log_prob(x))
    assert log_prob.std() > 0.05
    np.testing.assert_allclose(np.exp(log_prob).mean() * np.prod(period), 1, atol=1e-4)
    np.testing.assert_allclose(density.log_prob(x + 3 * period), log_prob, atol=1e-4)


@pytest.mark.slow  # of numbers with a map, there is a test below
def test_an_angle_beside_a_number():
    period = np.array([2 * math.pi, np.inf])
    density = bound(period)
    x = grid(2 * math.pi * TURN, LINE)
    total = np.exp(density.log_prob(x)).mean() * 2 * math.pi * 126 * 0.4
    np.testing.assert_allclose(total, 1, atol=1e-3)
    # As many as there are rows above, for one program.
    samples, log_prob = map(np.asarray, density.sample_and_log_prob(KEY, (len(x),)))
    assert ((samples[:, 0] >= 0) & (samples[:, 0] < 2 * math.pi)).all()
    np.testing.assert_allclose(density.log_prob(samples), log_prob, atol=1e-4)
    assert np.abs(samples[:, 1]).max() > 1


def test_matching_takes_the_shorter_way_and_sees_no_cut():
    density, x = bound(1.0), np.random.default_rng(0).uniform(size=(64, 2))
    loss = jax.jit(lambda params, x: density.flow.matching_loss(params, x, key=KEY))
    shifted = loss(density.params, x + np.array([3.0, -2.0]))
    np.testing.assert_allclose(loss(density.params, x), shifted, rtol=1e-9)
    still = loss(jax.tree.map(np.zeros_like, density.params), x)
    # In radians. Of uniform arcs of at most half a turn, a twelfth of a turn squared in the mean.
    assert still < (2 * math.pi) ** 2 / 8


def test_the_unit_of_angles_does_not_matter():
    """Neither to the loss, in which angles beside a number count in radians, nor to the network."""
    degrees = np.array([360 / (2 * math.pi), 1.0])
    x = np.random.default_rng(0).uniform(0, 2 * math.pi, (64, 2))

    def loss(unit):
        period = np.array([2 * math.pi, np.inf]) * unit
        network = jaxode.nn.Residual(2, 8, 1, key=KEY, period=period)
        flow = jaxode.cnf(jaxode.nn.field, jaxode.torus(2, period))
        return flow.matching_loss(network, x * unit, key=KEY)

    np.testing.assert_allclose(*jax.jit(lambda: (loss(degrees), loss(np.ones(2))))(), rtol=1e-9)


def test_couplings_measure_the_shorter_way():
    period = np.array([np.inf, 1.0])
    base = jaxode.torus(2, period)
    flow = jaxode.cnf(lambda t, z, a: a * jnp.sin(z), base)
    start = jnp.array([[0.0, 0.01], [0.0, 0.5], [5.0, 0.5]])
    x = jnp.array([[5.0, 0.5], [0.0, 0.45], [0.0, 0.99]])
    chosen = jaxode.coupling.optimal_transport()
    loss = jax.jit(lambda a: flow.matching_loss(a, x, key=KEY, x0=start, coupling=chosen))(0.0)
    # In radians.
    np.testing.assert_allclose(loss, (2 * np.pi) ** 2 * (0.02**2 + 0.05**2) / 6)
    near = np.asarray(jax.jit(base.chords)(jnp.array([[0.0, 0.01], [0.0, 0.99], [0.0, 0.5]])))
    distances = np.linalg.norm(near[:1] - near[1:], axis=1)
    np.testing.assert_allclose(distances, np.sin(np.pi * np.array([0.02, 0.49])) / np.pi)


def test_representatives_of_an_angle():
    base = jaxode.torus(2, np.array([1.0, np.inf]))
    z = np.array([[0.9, 5.0], [-1e-9, -7.0]])

    @jax.jit
    def of(z):
        return base.arc(z), base.wrapped(z), base.wrapped(z.astype(jnp.float32)), base.log_prob(z)

    arc, wrapped, in_single, log_prob = map(np.asarray, of(z))
    np.testing.assert_allclose(arc, [[-0.1, 5.0], [-1e-9, -7.0]], atol=1e-12)
    assert ((wrapped >= 0) | (z == -7.0)).all()
    assert (in_single[:, 0] < 1).all()
    np.testing.assert_allclose(log_prob, scipy.stats.norm.logpdf(z[:, 1]))


NUMBERS = np.random.default_rng(0).normal(50.0, 5.0, (200, 2, 2)) * [1.0, 0.1]
HOURS = np.where(np.eye(2, dtype=bool), 24.0, np.inf)  # of an event of two angles and two numbers


def mapped(**options):
    base = jaxode.torus((2, 2), HOURS)
    flow = jaxode.cnf(jaxode.nn.field, base, **OPTIONS)
    return jaxode.bind(flow, network_of_hours(), **options)


@functools.cache
def network_of_hours():
    return doubled(jaxode.nn.Residual((2, 2), 8, 1, key=KEY, period=HOURS))


@pytest.mark.parametrize(
    "given",
    [
        NUMBERS,
        jaxode.standardize.normal(NUMBERS),
        jaxode.standardize.whiten(NUMBERS),
        (NUMBERS.mean(axis=0), NUMBERS.std(axis=0)),
        (30.0, 2.0),
    ],
    ids=["data", "normal", "whiten", "mean and scale", "numbers"],
)
def test_maps_leave_angles_alone(given, tmp_path):
    density, x = mapped(standardize=given), NUMBERS[:3]
    z, angle = np.asarray(density.to_flow(x)), np.isfinite(HOURS)
    np.testing.assert_array_equal(z[:, angle], x[:, angle])
    assert (z[:, ~angle] != x[:, ~angle]).all()
    np.testing.assert_allclose(density.from_flow(z), x, rtol=1e-9)
    one = lambda x: density.to_flow(x.reshape(1, 2, 2)).reshape(-1)
    _, log_det = np.linalg.slogdet(jax.jit(jax.vmap(jax.jacfwd(one)))(x.reshape(3, 4)))
    np.testing.assert_allclose(density.log_det(x), log_det, rtol=1e-9)
    assert eqx.tree_equal(pickle.loads(pickle.dumps(density)), density)
    eqx.tree_serialise_leaves(tmp_path / "density.eqx", density)
    zeros = jax.tree.map(lambda leaf: np.zeros_like(leaf) if eqx.is_array(leaf) else leaf, density)
    assert eqx.tree_equal(eqx.tree_deserialise_leaves(tmp_path / "density.eqx", zeros), density)


@pytest.mark.parametrize("bounded", with_slow([True, False], [False]))  # less than with bounds
def test_an_angle_beside_a_standardized_number_has_a_probability_of_one(bounded):
    data = np.stack([np.linspace(0, 1, 64), np.geomspace(200.0, 2000.0, 64)], axis=1)
    period = np.array([2 * math.pi, np.inf])
    network = bound(period).params
    flow = jaxode.cnf(jaxode.nn.field, jaxode.torus(2, period), **OPTIONS)
    support = (np.array([-np.inf, 0.0]), np.inf) if bounded else None
    density = jaxode.bind(flow, network, standardize=data, support=support)
    of_u = lambda u: density.from_flow(jnp.stack([0 * u, u], axis=1))[:, 1]
    line, slope = jax.jit(lambda u: jax.jvp(of_u, (u,), (jnp.ones_like(u),)))(LINE)
    x = grid(2 * math.pi * TURN, line)
    log_prob = np.asarray(density.log_prob(x))
    by_line = np.exp(log_prob).reshape(len(TURN), -1).mean(axis=0) * slope
    total = by_line.sum() * 0.4 * 2 * math.pi
    np.testing.assert_allclose(total, 1, atol=1e-3)
    there = slice(935, 955)  # where there is probability
    shifted = np.where(np.arange(len(x))[:, None] < 955, x - np.array([4 * math.pi, 0.0]), x)
    np.testing.assert_allclose(density.log_prob(shifted)[there], log_prob[there], atol=1e-4)
    samples = np.asarray(density.sample(KEY, (50,)))
    assert ((samples[:, 0] >= 0) & (samples[:, 0] < period[0])).all()
    assert samples[:, 1].max() > 200


@pytest.mark.slow  # trains; the maps are tested above
def test_fit_maps_the_numbers_beside_angles(default_settings):
    rng = np.random.default_rng(0)
    x = np.stack([rng.vonmises(0.0, 2.0, 300), rng.normal(1e4, 10.0, 300)], axis=1)
    period = (2 * np.pi, np.inf)
    turning = lambda t, z, a: a + 0 * z
    density = jaxode.bind(jaxode.cnf(turning, jaxode.torus(2, period)), np.zeros(2, np.float32))
    density, _ = jaxode.fit(density, x, key=KEY, steps=2, progress=False)
    np.testing.assert_allclose(density.to_flow(x)[:, 0], x[:, 0], rtol=1e-6)
    # The map is that of 270 of the rows: four standard errors of what 30 others change.
    assert abs(float(density.to_flow(x)[:, 1].std()) - 1) < 0.06
    # The entropy of independent uniform and normal numbers is 5.56 nats.
    assert -density.log_prob(x).mean() < 5.6


def test_maps_stay_if_the_flow_changes():
    density = mapped(standardize=NUMBERS)
    again = density.with_flow(jaxode.cnf(jaxode.nn.field, density.flow.base, rtol=1e-4))
    assert again.standardize is density.standardize
    with pytest.raises(ValueError, match="since there are maps around it; got Torus"):
        density.with_flow(jaxode.cnf(jaxode.nn.field, jaxode.torus((2, 2), 24.0)))


PERIODS = {
    "two angles": np.array([2 * math.pi, 1.0]),
    "an angle and a number": np.array([24.0, np.inf]),
}


@pytest.mark.parametrize("name", with_slow(PERIODS, ["two angles"]))  # which the other has, too
def test_the_base_passes_its_audit(name):
    base = jaxode.torus(2, PERIODS[name])
    drawn = base.sample(KEY, (4000,))
    audited = SimpleNamespace(
        flow=SimpleNamespace(base=base), key=KEY, base_samples=drawn, x=drawn[:64]
    )
    row = auditing_base.probability(audited)
    assert not row.advice
    assert abs(row.value - 1) < 0.02


@pytest.mark.slow  # an audit compiles a dozen programs
@pytest.mark.parametrize("name", PERIODS)
def test_an_audit_finds_nothing_wrong(name):
    density = bound(PERIODS[name])
    report = jaxode.audit(density.flow, density.params, density.sample(KEY, (64,)), KEY)
    assert report.ok, str(report)
    rows = {row.name: row for row in report.rows}
    assert abs(rows["base probability"].value - 1) < 0.02


def turning(t, z, a):
    return a + jnp.sin(2 * math.pi * z) / 3


def target_within(ends):
    """An energy of angles of period one, constant beyond the ends."""
    return lambda x: jnp.cos(2 * math.pi * jnp.clip(x, *ends)).sum()


def test_a_target_sees_angles_of_one_period():
    flow, rate = jaxode.cnf(turning, jaxode.torus(2, 1.0), **OPTIONS), jnp.asarray(0.4)
    loss = jax.jit(lambda *ends: flow.reverse_kl_loss(rate, target_within(ends), 64, key=KEY))
    x = flow.sample(rate, KEY, 64)
    assert ((x < 0) | (x > 1)).any()
    np.testing.assert_allclose(loss(0.0, 1.0), loss(-9.0, 9.0), rtol=1e-9)


def test_fit_checks_the_period_of_a_field_with_a_context():
    network = jaxode.nn.Residual(2, 8, 1, key=KEY, context_size=1)
    density = jaxode.bind(jaxode.cnf(jaxode.nn.field, jaxode.torus(2)), network)
    x = np.random.default_rng(0).uniform(0, 6, (100, 2))
    with pytest.raises(ValueError, match=r"^fit\(density=...\): the field must have the periods"):
        jaxode.fit(density, x, context=x[:, :1], key=KEY, steps=1, progress=False)


X = jax.random.uniform(KEY, (3, 2), maxval=6.0)
ALONE = jaxode.nn.Residual(2, 4, 1, key=KEY)
PERIODIC = jaxode.nn.Residual(2, 4, 1, key=KEY, period=2 * np.pi)
# Fields on the torus whose density over a period is not one, with their parameters.
NOT_PERIODIC = {
    "the line": (lambda t, z, p: p * z, 0.5),
    "of the difference alone": (lambda t, z, p: p * (z - z[::-1]), 0.5),
    "late": (lambda t, z, p: p * (t - 0.5) * jnp.where(t > 0.5, 1.0, 0.0) * z, 0.5),
    "no period": (jaxode.nn.field, ALONE),
    "another period": (jaxode.nn.field, jaxode.nn.Residual(2, 4, 1, key=KEY, period=24.0)),
    "a jump at a period": (lambda t, z, p: p * jnp.mod(z, 2 * np.pi), 0.5),
    "a jump at half of it": (lambda t, z, p: p * jnp.arctan2(jnp.sin(z), jnp.cos(z)), 0.5),
    "a context": (lambda t, z, args: args[0] * args[1] * z, 0.5),
}
METHODS = {
    "log_prob": lambda flow, p, c: flow.log_prob(p, X, context=c),
    "nll": lambda flow, p, c: flow.nll(p, X, context=c),
    "matching_loss": lambda flow, p, c: flow.matching_loss(p, X, key=KEY, context=c),
    "reverse_kl_loss": lambda flow, p, c: flow.reverse_kl_loss(p, TARGET, 3, key=KEY, context=c),
    "sample": lambda flow, p, c: flow.sample(p, KEY, 3, context=c),
    "sample_and_log_prob": lambda flow, p, c: flow.sample_and_log_prob(p, KEY, 3, context=c),
    "to_base": lambda flow, p, c: flow.to_base(p, X, context=c),
}
TARGET = lambda x, *_: jnp.cos(x).sum()
LOSSES = ("nll", "matching_loss", "reverse_kl_loss")


def on_a_torus(field, **options):
    f, params = NOT_PERIODIC[field]
    context = jnp.ones(3) if field == "a context" else None
    flow = jaxode.cnf(f, jaxode.torus(2), steps=1, **options)
    return flow, params, context


def sum_of_angles(t, z, p):
    return p * (z[0] + z[1] - z[2]) + 0 * z


def test_fields_without_the_periods_are_told_apart():
    """Of angles one after the other, and of more than four, which turn together."""
    right = {
        "a sine": (lambda t, z, p: p * jnp.sin(z), 0.5, 2),
        "a network": (jaxode.nn.field, PERIODIC, 2),
    }
    wrong = {name: (*field, 2) for name, field in NOT_PERIODIC.items() if name != "a context"}
    wrong |= {f"a sum of {n} angles": (sum_of_angles, 0.5, n) for n in (3, 6)}

    @jax.jit
    def off():
        return {
            name: off_period_of(f, jaxode.torus(n), (0.0, 1.0), params, None, jnp.zeros(()))
            for name, (f, params, n) in (right | wrong).items()
        }

    refused = {name for name, value in off().items() if not rules.PERIODIC.holds(value)}
    assert refused == wrong.keys()


OF_METHODS = [*((name, "the line") for name in METHODS), ("log_prob", "a context")]


@pytest.mark.parametrize(("method", "field"), OF_METHODS)
def test_a_field_without_the_periods_has_no_density(method, field):
    flow, params, context = on_a_torus(field)
    message = rf"^{method}\(params=...\): the field must have the periods of its base, a torus"
    with pytest.raises(jaxode.SolveError, match=message):
        METHODS[method](flow, params, context)


TRACED = [(method, field) for field in ("the line", "a context") for method in LOSSES]
ALIKE = [("nll", "a context"), ("reverse_kl_loss", "a context"), ("reverse_kl_loss", "the line")]


@pytest.mark.parametrize(("method", "field"), with_slow(TRACED, ALIKE))  # the same code in each
def test_a_loss_of_traced_parameters_without_the_periods_is_nan(method, field):
    flow, params, context = on_a_torus(field)
    loss = jax.jit(jax.value_and_grad(lambda p: METHODS[method](flow, p, context)))
    assert np.isnan(loss(params)).all()
    assert np.isfinite(loss(0.0)).all()  # which has any period


def test_a_loss_inside_of_jit_says_why_it_is_nan():
    flow, params, _ = on_a_torus("the line", throw=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match="must have the periods of its base"):
        jax.block_until_ready(jax.jit(flow.matching_loss)(params, X, key=KEY))


@pytest.mark.slow  # trains
def test_an_energy_of_angles(default_settings):
    """The XY model on a ring of three, whose log Z is known."""
    log_density = lambda x: jnp.cos(x - jnp.roll(x, 1)).sum()
    flow = jaxode.cnf(jaxode.nn.field, jaxode.torus(3), rtol=1e-4, atol=1e-4)
    network = jaxode.nn.Residual(3, 16, 1, key=KEY, period=2 * np.pi)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 300))

    def step(carry, key):
        loss = lambda network: flow.reverse_kl_loss(network, log_density, 128, key=key)
        updates, state = optimizer.update(jax.grad(loss)(carry[0]), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    start = network, optimizer.init(network)
    (network, _), _ = jax.lax.scan(step, start, jax.random.split(KEY, 300))
    x, log_q = flow.sample_and_log_prob(network, KEY, 2000)
    found = jaxode.importance(jax.vmap(log_density)(x) - log_q)
    k = np.arange(-30, 31)
    exact = np.log(np.sum((2 * np.pi * scipy.special.iv(k, 1.0)) ** 3))
    assert found.ess > 0.9
    assert abs(found.log_z - exact) < 5 * found.log_z_error


@pytest.mark.slow  # trains
def test_a_mixture_of_von_mises_over_the_cut(default_settings):
    rng = np.random.default_rng(0)
    centres, kappa = np.array([[0.0, 1.0], [3.0, 6.2]]), 4.0
    draw = lambda n: rng.vonmises(centres[rng.integers(0, 2, n)], kappa) % (2 * np.pi)
    x, held_out = draw(8000), draw(2000)
    parts = kappa * np.cos(held_out[:, None] - centres) - np.log(2 * np.pi * np.i0(kappa))
    exact = np.logaddexp.reduce(parts.sum(axis=-1), axis=1) - np.log(2)
    network = jaxode.nn.Residual(2, 64, key=KEY, period=2 * np.pi)
    density = jaxode.bind(jaxode.cnf(jaxode.nn.field, jaxode.torus(2)), network)
    density, _ = jaxode.fit(density, jnp.asarray(x), key=KEY, steps=1500, progress=False)
    found = density.log_prob(jnp.asarray(held_out))
    assert (exact - np.asarray(found)).mean() < 0.03


WRONG = {
    "a period of zero": (lambda: jaxode.torus(2, 0.0), "must be positive"),
    "a period of NaN": (lambda: jaxode.torus(2, np.nan), "must be positive"),
    "three periods of two": (lambda: jaxode.torus(2, (1.0, 2.0, 3.0)), "broadcast to"),
    "a field on the line": (
        lambda: jaxode.bind(
            jaxode.cnf(jaxode.nn.field, jaxode.torus(2)), jaxode.nn.Residual(2, 8, key=KEY)
        ),
        "must have the periods of its base",
    ),
    "a map around it": (
        lambda: jaxode.bind(
            jaxode.cnf(jaxode.nn.field, jaxode.torus(2)),
            jaxode.nn.Residual(2, 8, key=KEY, period=2 * np.pi), standardize=(0.0, 2.0),
        ),
        "Leave it out: angles keep their units",
    ),
    "bounds of an angle": (
        lambda: mapped(support=(0.0, np.inf)), "infinite for angles, or leave it out",
    ),
    "a constant number beside it": (
        lambda: mapped(standardize=NUMBERS * [[1.0, 0.0], [1.0, 1.0]]),
        r"got column \(0, 1\) \(counting from 0\), which is constant",
    ),
    "dependent numbers beside it": (
        lambda: mapped(
            standardize=jaxode.standardize.whiten(np.broadcast_to(NUMBERS[:, :1, :1], (200, 2, 2)))
        ),
        "Columns are counted without angles",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_it_refuses(case):
    make, words = WRONG[case]
    with pytest.raises(ValueError, match=words):
        make()
