"""Small tables, trainings and a clock, which the tests of `fit` share."""

import functools
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from jaxode.training import loop
from jaxode.training.dataset import Dataset

ROWS, STEPS = 300, 150
FAST = optax.adam(1e-2)  # one object, so that all tests share its program
RNG = np.random.default_rng(0)
BENT = RNG.normal(size=(ROWS, 2)) * [1.0, 0.3]
BENT[:, 1] += BENT[:, 0] ** 2
OTHERS, BENT = BENT[200:], BENT[:200]
LOGNORMAL = np.exp(1.5 * RNG.normal(size=(ROWS, 2)))
INTEGERS = np.stack([RNG.integers(0, 8, ROWS), RNG.normal(size=ROWS)], 1)
CONTEXT = RNG.normal(size=(ROWS, 1))


@functools.cache
def parameters(event=2, context_size=0):
    return jaxode.nn.Residual(event, 8, 1, key=jax.random.key(0), context_size=context_size)


def bound(event=2, params=None, standardize=BENT, f=jaxode.nn.field, **options):
    flow = jaxode.cnf(f, jaxode.standard_normal(event))
    params = parameters(event) if params is None else params
    return jaxode.bind(flow, params, standardize=standardize, **options)


def scaled(t, z, a):
    return a * z


def cheap(**options):
    """A density with one parameter, whose programs compile fast."""
    return bound(**{"params": jnp.asarray(0.1), "f": scaled} | options)


def on(low, high):
    return bound(standardize=None, support=tuple(map(np.asarray, (low, high))))


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


def with_row(x, row, value):
    return np.where(np.arange(len(x))[:, None] == row, value, x)


class Machine:
    """Stands for the programs of a training: the seconds that they take, and what looks see."""

    def __init__(self, monkeypatch, step=0.01, look=0.1, compilation=0.0, data=0.0, nats=None):
        self.now, self.blocks, self.rates, self.looks, self.steps = 0.0, [], [], 0, None
        self.step, self.of_look, self.compilation, self.of_data = step, look, compilation, data
        self.nats = itertools.count(0, -1) if nats is None else iter(nats)
        monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: self.now))
        monkeypatch.setattr(loop, "advance", self.advance)
        monkeypatch.setattr("jaxode.training.fit.evaluation", lambda *_: self.look)
        in_flow = Dataset.in_flow
        monkeypatch.setattr(Dataset, "in_flow", lambda *given: self.slow(*in_flow(*given)))

    def advance(self, *given):
        *_, state, (rate, _), _, _, (first, last) = given
        count = int(last - first)
        self.now += self.step * count if count else self.compilation
        self.blocks.append(count)
        self.rates += [float(rate)] * count
        self.steps = int(state.count) + count
        return state._replace(count=state.count + count)

    def look(self, params):
        self.now += self.of_look if self.looks else self.compilation
        self.looks += 1
        return float(next(self.nats))

    def slow(self, take, *rest):
        def timed(key):
            self.now += self.of_data
            return take(key)

        return timed, *rest

    def taken(self):
        return sum(self.blocks)
