"""What `fit` tries, when it looks, goes back and ends, and what an interrupt leaves."""

import io
import itertools
import sys

import fitting
import numpy as np
import optax
import pytest
from fitting import (
    BENT,
    OTHERS,
    STEPS,
    Machine,
    bound,
    equal,
    fit,
    fitted,
    minimized,
    parameters,
    score,
)  # fmt: skip

from jaxode.density.maps.affine import Affine
from jaxode.density.maps.normal import Monotone
from jaxode.training import fit as fit_module
from jaxode.training import loop, validations

pytestmark = pytest.mark.usefixtures("default_settings")


# Seconds of programs, a limit, and the least part of it that is left to steps.
TIMES = {
    "a compilation is not counted": ({"compilation": 60.0}, 20, 0.95),
    "slow steps": ({"step": 3.0, "look": 8.0}, 90, 0.6),
    "slow steps in a short time": ({"step": 3.0, "look": 8.0}, 5, 0.6),
    "slow looks": ({"step": 0.03, "look": 15.0}, 90, 0.6),
    "slow noise": ({"step": 0.003, "data": 0.6}, 60, 0.15),  # which serves 50 steps
}


@pytest.mark.filterwarnings("ignore:.*hardly trained")
@pytest.mark.parametrize("name", TIMES)
def test_seconds_are_of_training_and_go_to_steps(name, monkeypatch):
    """The last step and look are all that comes later."""
    given, seconds, part = TIMES[name]
    machine = Machine(monkeypatch, **given)
    fit(seconds=seconds, steps=None)
    last = 50 * machine.step if machine.step < 0.02 else machine.step
    now = machine.now - 2 * machine.compilation - machine.of_look  # the first look
    now -= machine.of_data * (machine.step < 0.01)
    assert seconds <= now + 0.5
    assert now <= seconds + last + machine.of_look + 1
    assert machine.taken() * machine.step >= part * seconds


def test_slow_steps_are_taken_one_by_one(monkeypatch):
    """And end with the same parameters: a part of a block continues its keys."""
    monkeypatch.setattr(loop, "SECONDS_PER_PROGRAM", 0.0)
    again, _ = fit(validation=OTHERS)
    assert equal(again, fitted()[0])


def test_no_time_gives_the_start():
    with pytest.warns(UserWarning, match=r"^fit\(seconds=...\): the density is hardly trained: 0 "):
        density, history = fit(bound(standardize=None), seconds=0, steps=None, validation=OTHERS)
    assert [point.step for point in history] == [0]
    assert np.isfinite(history[0].nats)
    assert equal(density.params, parameters())


@pytest.mark.parametrize(
    ("limits", "losers", "look"),
    [
        ({"steps": 999}, 0, 0.1),
        ({"steps": 1000}, 200, 0.1),
        ({"seconds": 14}, 0, 0.1),
        ({"seconds": 30}, 500, 0.1),
        ({"seconds": 30, "steps": 999}, 0, 0.1),
        ({"seconds": 40}, 0, 8.0),
    ],
    ids=str,
)
def test_maps_are_tried_where_a_thousand_steps_are_left(monkeypatch, limits, losers, look):
    """Of 0.01 s each. Each map looks better than those before it, which take steps for nothing."""
    machine = Machine(monkeypatch, look=look)
    density, history = fit(bound(standardize=None), **{"steps": None} | limits)
    assert isinstance(density.standardize, Affine) == bool(losers)
    assert machine.taken() == losers + history[-1].step
    assert history[-1].step >= min(999, limits.get("steps", 1000))


def test_a_map_that_is_far_behind_is_out_after_a_round(monkeypatch):
    """The best of the others, here the one of normal columns, stays after another round."""
    looks = [0, -1, 0, -2, 0, -1.9, -2.3, -2.2]
    machine = Machine(monkeypatch, nats=itertools.chain(looks, itertools.count(-3, -1)))
    density, history = fit(bound(standardize=None), steps=1000)
    assert [point.nats for point in history[:4]] == [0, -2, -2.3, -3]
    assert isinstance(density.standardize.maps[1], Monotone)
    assert machine.taken() == 100 + 200 + 1000


@pytest.mark.parametrize(("lead", "power"), [(-np.inf, 1.0), (np.inf, 2.0)])
def test_powers_of_the_time_are_tried(monkeypatch, lead, power):
    """And uniform times chosen if they are better by so much."""
    for name, value in {
        "CLEARLY_BETTER_NATS": lead,
        "MAX_DIMENSIONS_OF_ONE_POWER": 1,
        "MIN_REMAINING_STEPS": STEPS,
        "ROUND_PART": 1 / 12,
    }.items():
        monkeypatch.setattr(f"jaxode.training.trials.{name}", value)
    density, history = fit(time_power=None, validation=OTHERS)
    assert [point.step for point in history] == [0, 100, STEPS]
    monkeypatch.undo()
    given, _ = fit(time_power=power, validation=OTHERS)
    assert equal(density, given)


def test_it_stops_when_it_gets_worse(monkeypatch):
    """After five looks, not counting those of the first 1000 steps."""
    Machine(monkeypatch, nats=itertools.count())
    _, history = fit(validation=OTHERS, steps=100_000, batch_size=16)
    *steps, back = [point.step for point in history]
    assert steps[:2] == [0, 500]
    # In blocks of 50.
    assert all(1.3 <= b / a < 1.45 for a, b in itertools.pairwise(steps[1:]))
    assert sum(step > 1000 for step in steps) == 5
    assert back == 0  # where it was best


@pytest.mark.parametrize(
    ("limits", "best", "end"),
    [
        ({"steps": 100_000}, 9, 2600),
        # Looks are closer than 30% of the steps if there is a limit of time, too.
        ({"steps": 2000, "seconds": 1e6, "step": 0.5}, 66, 2000),
        ({"steps": 4000, "seconds": 1e6, "step": 0.5}, 66, None),
    ],
)
def test_it_goes_back_to_the_best_and_ends_early(monkeypatch, limits, best, end):
    """After as many steps again, at a rate that shrinks to zero."""
    nats = itertools.chain(range(0, -best - 1, -1), itertools.repeat(1))
    machine = Machine(monkeypatch, step=limits.pop("step", 0.01), nats=nats)
    _, history = fit(x=BENT[:20], validation=OTHERS, **limits)
    steps = [point.step for point in history]
    # Few rows are overfitted soon: 64 passes over them, but at least 100 steps.
    assert steps[1] == 100 or "seconds" in limits
    best = steps[best]
    assert 1000 < best < 2000
    (turn,) = (i for i, (a, b) in enumerate(itertools.pairwise(steps)) if b < a)
    assert turn == steps.index(best) + 5
    assert machine.steps == steps[-1] == (end or 2 * best)
    assert machine.taken() == steps[turn] - best + steps[-1]
    rates = machine.rates[best - steps[-1] :]
    assert np.diff(rates).max() <= 0
    assert rates[0] > 0.1
    assert rates[-1] < 0.01


def test_after_an_explosion_it_goes_on_at_a_quarter_of_the_rate(monkeypatch):
    """From the best parameters. The warning points to the call of `fit`."""
    machine = Machine(monkeypatch, nats=itertools.chain([0, 1e3], itertools.count(-1, -1)))
    told = "exploded once, at step 200 of matching, to 1e\\+03 nats"
    with pytest.warns(UserWarning, match=told) as caught:
        fit(steps=600, validation=OTHERS)
    assert caught[0].filename == fitting.__file__
    assert machine.steps == 600 - 200
    left = 1 - np.arange(0, 600, 50) / 600
    rates = np.sin(np.pi / 2 * left) ** 2 * np.where(left > 1 - 200 / 600, 1, 0.25)
    np.testing.assert_allclose(machine.rates[::50], rates, rtol=1e-5)


def test_what_explodes_is_not_returned():
    """Of a loss whose least value is at one."""
    start, loss = np.zeros(2, np.float32), lambda params, x, context, key: ((params - 1) ** 2).sum()
    run = minimized(loss, start, optax.sgd(1e6), steps=600)
    told = "exploded 5 times, first at step 200 of matching, to nan nats"
    with pytest.warns(UserWarning, match=told):
        model, history = fit_module._result([run], run.plan, False)
    assert len(history) > 2
    assert not any(point.nats < history[0].nats for point in history[1:])
    assert equal(model.params, start)


def test_a_flow_that_is_never_finite(monkeypatch):
    Machine(monkeypatch, nats=itertools.repeat(np.nan))
    with pytest.raises(
        FloatingPointError, match=r"^fit: the log-density of the validation rows is never finite\."
    ):
        fit(validation=OTHERS)


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
@pytest.mark.filterwarnings("ignore:.*hardly trained")
@pytest.mark.parametrize(
    ("standardize", "step"),
    [(BENT, 300), (None, 0), (None, 100)],
    ids=["later", "start of three", "end of a round"],
)
def test_an_interrupt_returns_the_best_so_far(standardize, step, monkeypatch):
    # Otherwise, the error of looks is some hundredths.
    monkeypatch.setattr(validations, "VALIDATION_TOLERANCE", 1e-6)
    monkeypatch.setattr(sys, "stderr", Interrupting(f"step {step} "))
    start = bound(standardize=standardize)
    density, history = fit(start, progress=True, validation=OTHERS, steps=1000)
    assert history[-1].step == step
    np.testing.assert_allclose(min(p.nats for p in history), score(density), atol=1e-3)


# What is interrupted, in which of its calls, options, and the steps of the looks then.
INTERRUPTED = {
    "between two looks": ("advance", 10, {"steps": 1000}, [0, 200, 300, 350]),
    "as likelihood begins": ("ravel_pytree", 1, {"steps": 200, "likelihood": 5}, [0, 200]),
}


@pytest.mark.parametrize("name", INTERRUPTED)
def test_an_interrupt_keeps_what_came_after_the_last_look(name, monkeypatch):
    what, number, options, looks = INTERRUPTED[name]
    program, calls = getattr(loop, what), iter(range(1, number))

    def interrupted(*given):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return program(*given)

    monkeypatch.setattr(loop, what, interrupted)
    monkeypatch.setattr(loop, "SECONDS_PER_PROGRAM", 1e9)  # on a busy computer, too
    density, history = fit(validation=OTHERS, **options)
    assert [(point.phase, point.step) for point in history] == [("matching", n) for n in looks]
    assert not equal(density, bound())


def test_an_interrupt_before_the_first_look_is_raised():
    def interrupted(t, z, params):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(bound(f=interrupted))


def test_progress_is_one_line_of_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    fit(steps=50, progress=True, validation=OTHERS)
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("\rmatching: compiling ")
    assert "\rmatching: step 50 of 50, validation loss " in err
    assert ", best " in err
    assert err.rstrip().endswith(", 0 s left")
    assert err.count("\n") == 1
    assert err.endswith("\n")


def test_progress_in_a_file_is_a_line_for_each_look(capsys, monkeypatch):
    Machine(monkeypatch, step=1.0)  # slow enough to say something between looks
    _, history = fit(progress=True, validation=OTHERS)
    out, err = capsys.readouterr()
    assert not out
    assert "\r" not in err
    first, *looks = err.splitlines()
    assert first == "matching: compiling"
    words = [f": step {p.step} of {STEPS}, validation loss {p.nats:.3f} nats, " for p in history]
    assert [word in line for word, line in zip(words, looks, strict=True)] == [True] * len(words)
    fit(steps=50, validation=OTHERS)
    assert capsys.readouterr() == ("", "")
