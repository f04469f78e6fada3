"""Training in one call: what it keeps, when it ends, what it tells, and what it refuses."""

import functools
import io
import itertools
import sys
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Frame, with_slow

import jaxode
from jaxode.density import training as module
from jaxode.density.fit import A_COLUMN, RATE, _adam
from jaxode.density.maps import Affine, Monotone
from jaxode.density.table import Table, set_aside, warn_of_columns

pytestmark = pytest.mark.usefixtures("default_settings")

ROWS, STEPS = 300, 150
FAST = optax.adam(1e-2)  # one object, so that all tests share its program
RNG = np.random.default_rng(0)
BENT = RNG.normal(size=(ROWS, 2)) * [1.0, 0.3]
BENT[:, 1] += BENT[:, 0] ** 2
OTHERS, BENT = BENT[200:], BENT[:200]
LOGNORMAL = np.exp(1.5 * RNG.normal(size=(ROWS, 2)))
INTEGERS = np.stack([RNG.integers(0, 8, ROWS), RNG.normal(size=ROWS)], 1)


@functools.cache
def parameters(event=2, context_size=0):
    return jaxode.nn.Residual(event, 8, 1, key=jax.random.key(0), context_size=context_size)


def bound(event=2, params=None, standardize=BENT, f=jaxode.nn.field, **options):
    flow = jaxode.cnf(f, jaxode.standard_normal(event))
    params = parameters(event) if params is None else params
    return jaxode.bind(flow, params, standardize=standardize, **options)


def fit(density=None, x=BENT, **options):
    """Quickly, with a small network."""
    given = {"key": jax.random.key(1), "steps": STEPS, "batch_size": 64, "optimizer": FAST}
    given |= {"time_power": 2.0, "progress": False}
    return jaxode.fit(bound() if density is None else density, x, **given | options)


@functools.cache
def fitted():
    return fit(validation=OTHERS)


@jax.jit
def log_prob_of(density, x, context):
    return density.log_prob(x, context=context)


def score(density, x=OTHERS, context=None):
    return -float(log_prob_of(density, x, context).mean())


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


@pytest.fixture
def accurate(monkeypatch):
    """Looks to a tolerance at which their error is below 1e-3, instead of some hundredths."""
    monkeypatch.setattr(module, "LOOSE", 1e-6)


def test_it_improves_on_the_start():
    density, history = fitted()
    assert [(at.phase, at.step) for at in history] == [("matching", 0), ("matching", STEPS)]
    assert 0 < history[0].seconds < history[1].seconds
    assert history[1].nats < history[0].nats - 0.1
    assert score(density) < score(bound()) - 0.1
    assert equal(density.standardize, bound().standardize)


def test_a_vector_of_all_parameters_is_trained_alike(monkeypatch):
    """The default optimizer gets one where nothing decays, as with many rows."""
    monkeypatch.setattr("jaxode.density.fit.FEW", 0)
    vectors, advance = [], module.advance

    def seen(*given):
        state = advance(*given)
        vectors.append(isinstance(state.arrays, jax.Array))
        return state

    monkeypatch.setattr(module, "advance", seen)
    as_vector, _ = fit(validation=OTHERS, optimizer=None)
    assert all(vectors)
    monkeypatch.setattr(module, "ravel_pytree", None)
    alike, _ = fit(validation=OTHERS, optimizer=_adam(RATE))
    for a, b in zip(*map(jax.tree.leaves, (as_vector.params, alike.params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # other roundings, 150 steps


def test_the_key_decides_everything():
    density, history = fitted()
    again, points = fit(validation=OTHERS)
    assert equal(again, density)
    assert [point.nats for point in points] == [point.nats for point in history]
    other, _ = fit(validation=OTHERS, key=jax.random.key(2))
    assert not equal(other, density)


def test_it_goes_on_from_a_fitted_density():
    density, history = fitted()
    longer, points = fit(density, validation=OTHERS)
    assert points[0].nats == history[-1].nats
    assert points[-1].nats < history[-1].nats
    assert score(longer) < score(density)


@pytest.mark.parametrize("standardize", [BENT, None], ids=["a map", "no map"])
def test_no_time_gives_the_start(standardize):
    start = bound(standardize=standardize)
    with pytest.warns(UserWarning, match=r"^fit\(seconds=...\): the density is hardly trained: 0 "):
        density, history = fit(start, seconds=0, steps=None, validation=OTHERS)
    assert [point.step for point in history] == [0]
    assert np.isfinite(history[0].nats)
    assert equal(density.params, parameters())
    assert np.isfinite(density.log_prob(BENT[0]))


class Machine:
    """Stands for the programs of a training, and the seconds that they take."""

    def __init__(self, monkeypatch, step, look=0.1, compilation=0.0, data=0.0):
        self.now, self.blocks, self.looks = 0.0, [], 0
        self.step, self.of_look, self.compilation, self.of_data = step, look, compilation, data
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(module, "advance", self.advance)
        monkeypatch.setattr(module, "_nll", self.look)
        in_flow = Table.in_flow
        monkeypatch.setattr(Table, "in_flow", lambda *given: self.slow(*in_flow(*given)))

    def advance(self, *given):
        *_, state, _, _, _, (first, last) = given
        count = int(last - first)
        self.now += self.step * count if count else self.compilation
        self.blocks.append(count)
        return state

    def look(self, *_):
        self.now += self.of_look if self.looks else self.compilation
        self.looks += 1
        return float(-self.looks)

    def slow(self, rows_of, *rest):
        def timed(key):
            self.now += self.of_data
            return rows_of(key)

        return timed, *rest

    def taken(self):
        return sum(self.blocks)


def test_seconds_are_of_training(monkeypatch):
    """Not of compilation, however slow that is."""
    machine = Machine(monkeypatch, step=0.01, compilation=60.0)
    fit(seconds=20, steps=None)
    looks = 0.1 * (machine.looks - 1)
    assert machine.taken() == pytest.approx((20 - looks) / 0.01, abs=50)
    assert machine.now == pytest.approx(120 + 20, abs=0.2)


@pytest.mark.parametrize("seconds", [5, 20, 90])
def test_slow_steps_end_in_time(monkeypatch, seconds):
    """One at a time, and the last look is all that comes later."""
    machine = Machine(monkeypatch, step=3.0, look=8.0)
    with pytest.warns(UserWarning, match="hardly trained"):
        fit(seconds=seconds, steps=None)
    assert set(machine.blocks) == {0, 1}
    assert seconds <= machine.now <= seconds + 3 + 8
    # Looks take a fifth of the time, at most.
    assert machine.taken() * 3 >= 0.6 * (machine.now - 8)


def test_looks_and_data_leave_time_for_steps(monkeypatch):
    """Looks take a fifth of the time, and rows with new noise serve 50 steps."""
    slow_looks = Machine(monkeypatch, step=0.03, look=15.0)
    fit(seconds=90, steps=None)
    assert slow_looks.taken() * 0.03 >= 0.6 * 90
    slow_data = Machine(monkeypatch, step=0.003, data=0.6)
    fit(seconds=60, steps=None)
    assert slow_data.taken() >= 0.8 * 50 * 60 / (0.6 + 50 * 0.003)


def test_slow_steps_are_taken_one_by_one(monkeypatch):
    """And end with the same parameters: a part of a block continues its keys."""
    machine = Machine(monkeypatch, step=0.4)
    fit(steps=53)
    assert machine.blocks == [0, 1, *[2] * 24, 1, 2, 1]
    monkeypatch.undo()
    once, _ = fit(validation=OTHERS)
    monkeypatch.setattr(module, "BLOCK_SECONDS", 0.0)
    again, _ = fit(validation=OTHERS)
    assert equal(again, once)


def test_slow_looks_leave_no_trial(monkeypatch):
    machine = Machine(monkeypatch, step=0.01, look=8.0)
    density, history = fit(bound(standardize=None), seconds=40, steps=None)
    assert not isinstance(density.standardize, Affine)
    assert machine.taken() == history[-1].step >= 1000


def test_an_interrupt_while_likelihood_begins_keeps_matching(monkeypatch):
    def interrupted(arrays):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "ravel_pytree", interrupted)
    density, history = fit(steps=50, likelihood=5, validation=OTHERS)
    assert [(point.phase, point.step) for point in history] == [("matching", 0), ("matching", 50)]
    assert not equal(density, bound())


@pytest.mark.parametrize(
    ("limits", "losers"),
    [
        ({"steps": 999}, 0),
        ({"steps": 1000}, 200),
        ({"seconds": 14}, 0),
        ({"seconds": 30}, 500),
        ({"seconds": 30, "steps": 999}, 0),
    ],
    ids=str,
)
def test_maps_are_tried_where_a_thousand_steps_are_left(monkeypatch, limits, losers):
    """Of 0.01 s each. Each map looks better than those before it, which take steps for nothing."""
    machine = Machine(monkeypatch, step=0.01)
    density, history = fit(bound(standardize=None), **{"steps": None} | limits)
    assert isinstance(density.standardize, Affine) == bool(losers)
    assert machine.taken() == losers + history[-1].step
    assert history[-1].step >= min(999, limits.get("steps", 1000))


@pytest.mark.parametrize("part", [0.1, 0.25, 0.999, np.float32(0.5)])
def test_rows_are_set_aside(part):
    """Each row is on one side, with its context."""
    x, context = np.arange(40.0).reshape(20, 2), {"row": np.arange(20)}
    rows, aside = set_aside(bound(context_shape=()), x, context, part, False, jax.random.key(0))
    assert len(aside[0]) == min(np.ceil(20 * part), 18)
    both = np.concatenate([rows[0], aside[0]])
    labels = np.concatenate([rows[1]["row"], aside[1]["row"]])
    np.testing.assert_array_equal(both, x[labels])
    assert (labels != np.arange(20)).any()
    np.testing.assert_array_equal(np.sort(labels), np.arange(20))


def test_rows_keep_their_precision_beside_validation_rows_of_another():
    density = bound()
    jax.config.update("jax_enable_x64", True)
    table = Table.of(density, BENT.astype(np.float32), None, OTHERS, False, jax.random.key(0))
    data, aside, _ = table.in_flow(density, table.validation, jax.random.key(1), ROWS)
    assert table.validation.x.dtype == np.float64
    assert data(jax.random.key(2)).x.dtype == aside.x.dtype == np.float32


@pytest.mark.slow
def test_validation_rows_may_be_few():
    """As few as a tenth of the rows would be."""
    _, history = fit(validation=OTHERS[:2], steps=50)
    expected = -log_prob_of(bound(), OTHERS, None)[:2].mean()
    np.testing.assert_allclose(history[0].nats, expected, atol=0.02)


def test_it_stops_when_it_gets_worse():
    """After five looks, not counting those of the first 1000 steps."""
    others = OTHERS * [1.0, -1.0]  # bent to the other side
    density, history = fit(validation=others, steps=100_000, batch_size=16)
    *steps, back = [point.step for point in history]
    assert steps[:2] == [0, 500]
    # In blocks of 50.
    assert all(1.3 <= b / a < 1.45 for a, b in itertools.pairwise(steps[1:]))
    assert sum(step > 1000 for step in steps) == 5
    assert back == 0  # where it was best
    assert equal(density, bound())


def test_the_first_look_is_sooner_at_few_rows():
    """Which are overfitted sooner: after 64 passes over them, between 100 and 500 steps."""
    _, history = fit(x=BENT[:20], validation=OTHERS)  # others see 200 and 500
    assert [point.step for point in history[:2]] == [0, 100]


@pytest.mark.slow
def test_it_goes_back_to_the_best_and_ends_early():
    """On few rows, which a constant rate overfits."""
    _, history = fit(x=BENT[:20], validation=OTHERS, steps=100_000)
    steps = [point.step for point in history]
    (turn,) = (i for i, (a, b) in enumerate(itertools.pairwise(steps)) if b < a)
    best = min(history[: turn + 1], key=lambda point: point.nats)
    # As many steps again, in blocks of 50.
    assert 2 * best.step <= steps[-1] < 2 * best.step + 50
    assert steps[turn] > 1000
    assert history[-1].nats < history[turn].nats - 0.1


def linear(t, z, params):
    return params["a"] @ z + params["b"]


@pytest.mark.slow
def test_after_an_explosion_it_goes_on_at_a_lower_rate():
    """From the best parameters, until it does not explode, to the end."""
    params = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(2)}
    start = bound(params=params, f=linear, standardize=(-3.0, 1.0))
    with pytest.warns(UserWarning, match="exploded .*at step 200 of matching, to ") as caught:
        _, history = fit(start, optimizer=optax.sgd(2.0), steps=2000, validation=OTHERS)
    looks = {point.step: point.nats for point in history}
    assert not looks[200] < looks[0] + 100
    assert list(looks)[-1] == 2000
    assert looks[2000] < looks[0] - 1
    assert caught[0].filename == __file__


def drifting(t, y, p):
    """The gradients of `matrix` and `vector` are so small that Adam leaves them alone."""
    constant, *idle = jax.lax.stop_gradient(p["constant"]), p["matrix"], p["vector"]
    return p["drift"] - y + 1e-12 * sum(leaf.sum() for leaf in [constant, *idle])


@pytest.mark.parametrize(
    ("less", "few", "decayed"), [(0, 2000, {"matrix"}), (1, 2000, set()), (0, 199, set())]
)
def test_weights_decay_at_few_rows(less, few, decayed, monkeypatch):
    """Matrices that are trained: up to 100 rows for each of two columns, and up to `few`."""
    monkeypatch.setattr("jaxode.density.fit.FEW", few)
    # Not one row more but a limit below: one program serves all.
    monkeypatch.setattr("jaxode.density.fit.A_COLUMN", A_COLUMN - less)
    shapes = {"constant": (2, 2), "matrix": (2, 2), "vector": (2,), "drift": (2,)}
    start = {name: jnp.ones(shape) for name, shape in shapes.items()}
    density, _ = fit(bound(f=drifting, params=start), validation=OTHERS, optimizer=None)
    changed = {name for name in shapes if not np.allclose(density.params[name], 1, atol=1e-3)}
    assert changed == {"drift"} | decayed


@pytest.mark.slow
def test_a_row_far_away_does_not_spoil_the_default_optimizer():
    """Its gradient, in a few batches of many, is clipped: without, 3.3 nats."""
    x = np.concatenate([BENT, [[0.0, 1e4]]])
    options = {"optimizer": None, "steps": 600, "batch_size": 16, "validation": OTHERS}
    _, history = fit(bound(standardize=(0.0, 1.0)), x, **options)
    assert history[-1].nats < 2.6


def test_what_explodes_is_not_returned():
    told = "exploded 5 times, first at step 200 of matching, to nan nats"
    with pytest.warns(UserWarning, match=told):
        density, history = fit(optimizer=optax.sgd(1e6), steps=600, validation=OTHERS)
    assert len(history) > 2
    assert not any(point.nats < history[0].nats for point in history[1:])
    assert equal(density, bound())


class Interrupting(io.StringIO):
    """Raises as Ctrl-C does, once, when this text is written."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, text):
        super().write(text)
        if self.text and self.text in text:
            self.text = None
            raise KeyboardInterrupt


# Without a map, three are tried.
@pytest.mark.parametrize(
    ("standardize", "step"),
    [
        (BENT, 0), (BENT, 300), (None, 0), (None, 100),
        pytest.param(None, 300, marks=pytest.mark.slow),
    ],
    ids=["start", "later", "start of three", "end of a round", "later of three"],
)  # fmt: skip
def test_an_interrupt_returns_the_best_so_far(standardize, step, monkeypatch, accurate):
    monkeypatch.setattr(sys, "stderr", Interrupting(f"step {step} "))
    start = bound(standardize=standardize)
    density, history = fit(start, progress=True, validation=OTHERS, steps=1000)
    assert history[-1].step == step
    np.testing.assert_allclose(min(p.nats for p in history), score(density), atol=1e-3)


@pytest.mark.slow
def test_numbers_of_python_are_trained():
    density, _ = fit(bound(params={"a": 0.5}, f=lambda t, z, p: p["a"] * z), validation=OTHERS)
    assert density.params["a"] != 0.5


def test_an_interrupt_between_two_looks_keeps_what_came_after_the_first(monkeypatch):
    advance, calls = module.advance, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return advance(*args)

    monkeypatch.setattr(module, "advance", interrupted)
    density, history = fit(validation=OTHERS, steps=1000)
    assert [point.step for point in history] == [0, 200, 300, 350]
    assert not equal(density, bound())


def test_an_interrupt_before_the_first_look_is_raised():
    def interrupted(t, z, params):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(bound(f=interrupted))


def test_progress_is_shown_on_stderr(capsys):
    fit(steps=50, progress=True, validation=OTHERS)
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("\rmatching: compiling ")
    assert "\rmatching: step 50 of 50, " in err
    assert "best " in err
    assert err.endswith("\n")
    assert err.rstrip().endswith(", 0 s left")
    fit(steps=50, validation=OTHERS)
    assert capsys.readouterr() == ("", "")


def own_field(t, z, params):
    """Its parameters are a dictionary."""
    return params["out"] @ jnp.tanh(params["in"] @ z + t) + params["shift"]


OPTIMIZERS = {
    "a chain": optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(2e-2, 0, 500))
    ),
    "lion": optax.lion(3e-3),
}


@pytest.mark.parametrize("name", with_slow(OPTIMIZERS, ["a chain"]))
def test_any_optimizer_and_any_field(name):
    weights = jax.random.normal(jax.random.key(3), (8, 2))
    params = {"in": weights, "out": jnp.zeros((2, 8)), "shift": jnp.zeros(2)}
    start = bound(params=params, f=own_field)
    density, history = fit(start, optimizer=OPTIMIZERS[name], validation=OTHERS, steps=500)
    assert history[-1].nats < history[0].nats - 0.05
    assert score(density) < score(start) - 0.05


CONTEXT = RNG.normal(size=(ROWS, 1))
MOVED = 3 * CONTEXT + 0.5 * RNG.normal(size=(ROWS, 2))  # a normal whose mean is the context
COUPLINGS = {
    "independent": {},
    "transport": {"coupling": jaxode.coupling.optimal_transport(16, condition_weight=1.0)},
}


@pytest.mark.parametrize("name", with_slow(COUPLINGS, ["independent"]))
def test_a_context(name, accurate):
    start = bound(params=parameters(context_size=1), standardize=MOVED, standardize_context=CONTEXT)
    x, context = MOVED[200:], CONTEXT[200:]
    density, history = fit(
        start, MOVED[:200], context=CONTEXT[:200], validation=(x, context), **COUPLINGS[name]
    )
    looks = [point.nats for point in history]
    np.testing.assert_allclose(
        looks, [score(each, x, context) for each in (start, density)], atol=1e-3
    )
    assert looks[1] < looks[0] - 1
    assert density.sample(jax.random.key(0), context=context[:5]).shape == (5, 2)


AROUND = {
    "a support": {"support": (0.0, np.inf), "standardize": None},
    "a map": {"standardize": jaxode.standardize.normal(LOGNORMAL)},
    "no map": {"standardize": None},
    "units": {"standardize": (0.0, 3.0)},
}


@pytest.mark.parametrize("name", with_slow(AROUND, ["a support", "a map", "no map"]))
def test_looks_are_in_the_units_of_the_data(name, accurate):
    density, history = fit(bound(**AROUND[name]), LOGNORMAL[:200], validation=LOGNORMAL[200:])
    best = min(point.nats for point in history)
    np.testing.assert_allclose(best, score(density, LOGNORMAL[200:]), atol=1e-3)


@pytest.mark.slow
def test_a_skewed_table_is_mapped_to_normals():
    x, others = LOGNORMAL[:200], LOGNORMAL[200:]
    density, history = fit(bound(standardize=None), x, validation=others, steps=1000)
    assert isinstance(density.standardize.maps[1], Monotone)
    # The others are far behind after a round.
    assert [point.step for point in history][:3] == [0, 100, 200]
    given, _ = fit(bound(standardize=x), x, validation=others)
    assert isinstance(given.standardize, Affine)
    assert score(density, others) < score(given, others) - 0.3


@pytest.mark.parametrize(("lead", "power"), [(-np.inf, 1.0), (np.inf, 2.0)])
def test_powers_of_the_time_are_tried(monkeypatch, lead, power):
    """And uniform times chosen if they are better by so much."""
    for name, value in {"CLEARLY": lead, "MANY": 1, "LEFT": STEPS, "TRIAL": 1 / 12}.items():
        monkeypatch.setattr(f"jaxode.density.fit.{name}", value)
    density, history = fit(time_power=None, validation=OTHERS)
    assert [point.step for point in history] == [0, 100, STEPS]
    given, _ = fit(time_power=power, validation=OTHERS)
    assert equal(density, given)


def test_likelihood_follows_matching():
    density, history = fit(steps=50, likelihood=50, validation=OTHERS)
    assert [(point.phase, point.step) for point in history] == [
        ("matching", 0), ("matching", 50), ("likelihood", 0), ("likelihood", 50)
    ]  # fmt: skip
    assert history[2].nats == history[1].nats
    assert history[3].nats < history[1].nats
    again, _ = fit(steps=50, likelihood=50, validation=OTHERS)
    assert equal(again, density)


@pytest.mark.slow
def test_integers_get_noise():
    """Their density has a bound: the entropy of eight values, and of a normal."""
    start = bound(standardize=INTEGERS + np.array([0.5, 0.0]))
    x, others = INTEGERS[:200], INTEGERS[200:]
    density, history = fit(start, x, validation=others, dequantize=True, steps=600)
    entropy = np.log(8) + 0.5 * np.log(2 * np.pi * np.e)
    assert entropy - 0.1 < history[-1].nats < history[0].nats
    samples = density.sample(jax.random.key(4), (500,))
    np.testing.assert_allclose(samples.mean(0), [4, 0], atol=0.4)


LARGE = (module.EXACT_UP_TO + 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize("event", [(), LARGE], ids=str)
def test_events_of_any_shape(event):
    """Looks at the largest one estimate the divergence."""
    x = np.random.default_rng(1).normal(size=(40, *event))
    density, history = fit(bound(event, standardize=None), x, steps=50)
    assert density.event_shape == event
    assert np.isfinite([point.nats for point in history]).all()
    assert np.isfinite(log_prob_of(density, x, None)).all()


@pytest.mark.slow
def test_double_precision_and_strict_promotion():
    """Which Adam does not have."""
    single = parameters()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    params = jax.tree.map(lambda leaf: leaf.astype(float), single)
    options = {"dequantize": True, "optimizer": optax.sgd(0.01), "steps": 50}
    density, history = fit(bound(params=params, standardize=None), INTEGERS, **options)
    assert np.isfinite([point.nats for point in history]).all()
    assert density.log_prob(BENT).dtype == np.float64


def nan(t, z, a):
    return a * z * jnp.nan


@pytest.mark.parametrize("steps", [STEPS, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_flow_that_is_never_finite(steps):
    nowhere = bound(params=jnp.ones(()), f=nan)
    with pytest.raises(
        FloatingPointError, match=r"^fit: the log-density of the validation rows is never finite\."
    ):
        fit(nowhere, steps=steps)


EVEN = np.linspace(-2.0, 2.0, ROWS)
WAVE = np.sin(40 * EVEN)
LONG = np.linspace(-1.0, 1.0, 100 * ROWS)
ATOMS, PLANE = "repeat values, as integers", "depend on each other linearly"
# The columns of a table, and which of them are told of as what.
WARNED = {
    "ordinary": ([EVEN, WAVE, np.exp(EVEN), np.tan(0.7 * EVEN)], []),
    "integers": ([np.round(EVEN), WAVE], [("0", ATOMS)]),
    "many values, each rarely": ([np.arange(ROWS) // 2, WAVE], []),
    "zero, or any number": ([EVEN, np.maximum(WAVE, 0)], [("1", ATOMS)]),
    "the sum of others": ([EVEN, np.exp(EVEN), WAVE, 1 - EVEN + WAVE], [("0, 2, 3", PLANE)]),
    "nearly a sum": ([EVEN, WAVE, EVEN + WAVE + 1e-2 * np.exp(EVEN)], []),
    "in other units": ([1e-20 * EVEN, WAVE, 1e6 + 1e20 * EVEN], [("0, 2", PLANE)]),
    "a constant": ([EVEN, np.ones(ROWS), WAVE], [("1", ATOMS)]),
    "both": ([np.round(EVEN), WAVE, 2 * WAVE], [("0", ATOMS), ("1, 2", PLANE)]),
    "many": (
        [np.round(np.sin((i + 1) * EVEN)) for i in range(12)],
        [("0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more", ATOMS)],
    ),
    "a part of many rows": (
        [
            np.repeat(np.round(EVEN), 100),
            np.repeat(WAVE, 100) + LONG,
            np.repeat(WAVE, 100) + 2 * LONG,
            LONG,
        ],
        [("0", ATOMS), ("1, 2, 3", PLANE)],
    ),
    "as many rows as columns": ([*np.random.default_rng(0).normal(size=(12, 12))], []),
}


@pytest.mark.parametrize("name", WARNED)
def test_warnings_of_columns(name, recwarn):
    columns, expected = WARNED[name]
    table = np.stack(columns, 1).astype(np.float32)
    warn_of_columns(table, np.arange(0))
    warn_of_columns(table, np.arange(len(columns)))
    messages = [str(warning.message) for warning in recwarn]
    for message, (which, what) in zip(messages, expected, strict=True):
        assert message.startswith(f"fit(x=...): columns {which} (counting from 0) {what}")


def test_columns_are_named_as_in_the_table():
    """Also where integers before them get noise. The warning points to the call of `fit`."""
    table = np.stack([INTEGERS[:, 0], np.round(INTEGERS[:, 1]) / 2], 1)
    with pytest.warns(UserWarning, match=r"^fit\(x=...\): columns 1 \(counting") as caught:
        fit(x=table[:200], validation=table[200:], dequantize=True, steps=50)
    assert caught[0].filename == __file__


def on(low, high):
    return bound(standardize=None, support=tuple(map(np.asarray, (low, high))))


def test_integers_from_the_lower_bound_on():
    """With noise, they lie strictly inside."""
    x, others = INTEGERS[:200], INTEGERS[200:]
    density, _ = fit(on((0.0, -9.0), (8.0, 9.0)), x, validation=others, dequantize=True, steps=50)
    assert np.isfinite(density.log_prob(INTEGERS + 0.5)).all()


def test_validation_rows_that_have_noise_get_no_more():
    """Integers do. A column with a single other number, in either part, is none of integers."""
    key, has_noise = jax.random.key(0), INTEGERS[200:] + np.array([0.25, 0.0])
    for others in INTEGERS[200:], has_noise:
        given = on((0.0, -9.0), (8.0, 9.0)), INTEGERS[:200], None, others, True, key
        table = Table.of(*given)
        seen = np.asarray(table.noisy(table.validation, key).x)
        assert (seen == table.validation.x).all() == (others is has_noise)
    for part in set_aside(bound(), INTEGERS, None, 0.1, True, key):
        almost = INTEGERS.copy()
        almost[INTEGERS[:, 1].astype(part.x.dtype) == part.x[0, 1], 0] += 0.5
        with pytest.warns(UserWarning, match="repeat values"):
            table = Table.of(bound(), almost, None, 0.1, True, key)
        assert not table.integers.any()


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-24])
def test_noise_never_reaches_a_bound(noise, monkeypatch):
    """Which would end a training, by chance."""
    table = Table.of(on((0.0, -9.0), (8.0, 9.0)), INTEGERS, None, 0.1, True, jax.random.key(0))
    extreme = lambda key, shape, dtype: jnp.full(shape, noise, dtype)
    monkeypatch.setattr(jax.random, "uniform", extreme)
    whole, noisy = table.rows.x, np.asarray(table.noisy(table.rows, jax.random.key(1)).x)
    assert (noisy[:, 0] > whole[:, 0]).all()
    assert (noisy[:, 0] < whole[:, 0] + 1).all()
    np.testing.assert_array_equal(noisy[:, 1], whole[:, 1])


def test_integers_beside_which_noise_is_lost():
    x = np.stack([INTEGERS[:, 0], 1e6 + np.arange(ROWS), 1e7 + np.arange(ROWS)], 1)
    with pytest.warns(UserWarning, match=r"^fit\(dequantize=True\): columns 2 .* in float32, so"):
        table = Table.of(bound(3, standardize=x), x, None, 0.1, True, jax.random.key(0))
    assert table.integers.tolist() == [True, True, False]
    noisy = np.asarray(table.noisy(table.rows, jax.random.key(1)).x)
    assert (noisy[:, :2] != np.round(noisy[:, :2])).all()
    np.testing.assert_array_equal(noisy[:, 2], table.rows.x[:, 2])


def test_tables_are_data_and_contexts():
    of = lambda kind: fit(
        bound(params=parameters(2, 1), context_shape=(1,)), kind(BENT), steps=50,
        context=kind(CONTEXT[:200]), validation=(kind(OTHERS), kind(CONTEXT[200:])),
    )[1][-1].nats  # fmt: skip
    assert of(Frame) == of(np.asarray)


@pytest.mark.slow
@pytest.mark.parametrize(
    "optimizer", [optax.lbfgs(), optax.chain(FAST, optax.contrib.reduce_on_plateau())]
)
def test_optimizers_that_look_at_the_loss(optimizer):
    """They get it. A line search on noisy losses need not improve a density."""
    _, history = fit(steps=50, batch_size=200, optimizer=optimizer, validation=OTHERS)
    assert np.isfinite(history[-1].nats)
    assert history[-1].nats != history[0].nats


def test_a_constant_column():
    with (
        pytest.warns(UserWarning, match="columns 1 "),
        pytest.raises(
            ValueError,
            match=r"^fit\(x=...\): must vary; got column 1 \(counting from 0\)",
        ),
    ):
        fit(bound(standardize=None), BENT * [1.0, 0.0])


def along(t, z, p):
    return jnp.imag(p) + 0 * z


@pytest.mark.slow
def test_complex_parameters_are_trained():
    density, _ = fit(bound(params=jnp.asarray(0j), f=along, standardize=(0.0, 1.0)), BENT + 5)
    assert density.params.imag > 0.3  # by 0.01 a step, less and less, and averaged


def test_a_limit_of_steps_holds_after_an_early_end():
    """Looks may be closer than 30% of the steps, if there is a limit of time, too."""
    at = SimpleNamespace(early=(1300, 0.35), step=2000, began=0.0)
    for steps, ended in ((2000, True), (4000, False)):
        at.limits = module.Limits(steps)
        assert (module.Training.part_left(at) == 0) == ended


@pytest.mark.slow
def test_the_average_of_half_precision_is_kept_in_single(monkeypatch):
    averages, advance = [], module.advance

    def seen(*given):
        state = advance(*given)
        averages.append(state.average)
        return state

    monkeypatch.setattr(module, "advance", seen)
    half = jax.tree.map(
        lambda leaf: leaf.astype(jnp.bfloat16) if eqx.is_inexact_array(leaf) else leaf, parameters()
    )
    density, _ = fit(bound(params=half), steps=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(averages[-1])} == {np.dtype("float32")}
    arrays = jax.tree.leaves(eqx.filter(density.params, eqx.is_inexact_array))
    assert {leaf.dtype for leaf in arrays} == {jnp.dtype(jnp.bfloat16)}


def test_noise_is_drawn_for_as_many_rows_as_are_needed():
    density = bound(standardize=INTEGERS + 0.5)
    table = Table.of(density, INTEGERS, None, 0.1, True, jax.random.key(0))
    rows_of, *_ = table.in_flow(density, table.validation, jax.random.key(1), 10)
    some = rows_of(jax.random.key(2)).x
    assert some.shape == (10, 2)
    assert not np.array_equal(some, rows_of(jax.random.key(3)).x)


def test_looks_in_many_dimensions_take_no_closed_form_that_was_not_asked_for():
    class Wrong(eqx.Module):
        def __call__(self, t, z, args):
            return args * z

        def value_and_divergence(self, t, z, args):
            return args * z, jnp.asarray(1e6, z.dtype)

    n, x = 17, np.random.default_rng(0).normal(size=(40, 17))
    flow = jaxode.cnf(Wrong(), jaxode.standard_normal(n), divergence=jaxode.divergence.exact())
    density = jaxode.bind(flow, 0.1, standardize=(0.0, 1.0))
    _, history = jaxode.fit(density, x, key=jax.random.key(0), steps=1, progress=False)
    assert abs(history[0].nats) < 100


def test_centred_particles_do_not_depend_on_each_other(recwarn):
    x = np.random.default_rng(0).normal(size=(50, 3, 2))
    flow = jaxode.cnf(lambda t, z, a: a * z, jaxode.centered_normal(3, 2))
    density = jaxode.bind(flow, jnp.asarray(0.1))
    centred = x - x.mean(1, keepdims=True)
    jaxode.fit(density, centred, key=jax.random.key(0), steps=1, progress=False)
    assert not list(recwarn)
