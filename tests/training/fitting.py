"""Small tables, trainings and a clock, which the tests of `fit` share."""

import functools
import itertools
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxode
from jaxode.training import budget, loop
from jaxode.training.budget import Budget
from jaxode.training.dataset import Dataset
from jaxode.training.devices import Devices
from jaxode.training.sources import InMemory, Rows
from jaxode.training.steps import Phase

# Trainings on 200 rows or 3200 that are drawn, which look at 100, have the programs of each other.
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


def bound(event=2, params=None, standardize=BENT, f=jaxode.nn.field, steps=None, **options):
    flow = jaxode.cnf(f, jaxode.standard_normal(event), steps=steps)
    params = parameters(event) if params is None else params
    return jaxode.bind(flow, params, standardize=standardize, **options)


def number(value):
    """With a dtype of its own. Without one, a training is compiled once more for its results."""
    return jnp.asarray(value, float)


def scaled(t, z, a):
    return a * z


def cheap(**options):
    """A density with one parameter and equal steps, whose programs compile fast."""
    return bound(**{"params": number(0.1), "f": scaled, "steps": 4} | options)


def moved(t, z, args):
    """By its context, scaled."""
    params, context = args
    return params["scale"] * z + params["slope"] * context


def cheap_of_contexts(**options):
    """The same, with contexts of one number."""
    params = {"scale": number(0.0), "slope": number(0.0)}
    return bound(**{"params": params, "f": moved, "steps": 4} | options)


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


def score(density, x=OTHERS, context=None):
    return -float(density.log_prob(x, context=context).mean())


class Model(NamedTuple):
    """As much of a density as the loop asks for."""

    params: Any
    event_shape: tuple[int, ...] = (2,)

    def with_params(self, params):
        return self._replace(params=params)


def minimized(loss, params, optimizer=FAST, *, steps=STEPS, x=BENT, as_vector=False, mesh=None):
    """A training of parameters by the loop on any `loss(params, x, context, key)` of 64 rows."""
    rows = Rows(jnp.asarray(x, jnp.float32), None)
    value = jax.jit(lambda params: loss(params, rows.x, None, jax.random.key(0)))
    devices = Devices.from_mesh(mesh, 64)
    plan = loop.Plan(Budget(steps), 64, devices=devices)
    run = loop.Training(
        Model(params), InMemory(rows), lambda key: rows, lambda params: float(value(params)),
        plan,
    )  # fmt: skip
    phase = Phase("matching", loss, optimizer, jax.random.key(1), as_vector=as_vector)
    run.train(phase, plan.budget)
    return run


def equal(a, b):
    return all(map(np.array_equal, jax.tree.leaves(a), jax.tree.leaves(b)))


def with_row(x, row, value):
    return np.where(np.arange(len(x))[:, None] == row, value, x)


class Machine:
    """Stands for the programs of a training: the seconds that they take, and what looks see."""

    def __init__(self, monkeypatch, step=0.01, look=0.1, compilation=0.0, data=0.0, nats=None):
        self.now, self.blocks, self.rates, self.looks, self.steps = 0.0, [], [], 0, None
        self.seconds = 0.0  # of compilation
        self.step, self.of_look, self.compilation, self.of_data = step, look, compilation, data
        self.nats = itertools.count(0, -1) if nats is None else iter(nats)
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr(budget, "time", clock)
        monkeypatch.setattr(budget, "compile_time", lambda: self)
        monkeypatch.setattr(loop, "time", clock)
        monkeypatch.setattr(loop, "advance", self.advance)
        monkeypatch.setattr("jaxode.training.fit.evaluation", lambda *_: self.look)
        in_flow = Dataset.in_flow
        monkeypatch.setattr(Dataset, "in_flow", lambda *given: self.slow(*in_flow(*given)))

    def compile(self):
        self.now += self.compilation
        self.seconds += self.compilation

    def advance(self, *given):
        *_, state, (rate, _), _, _, (first, last) = given
        count = int(last - first)
        self.now += self.step * count
        if not count:
            self.compile()
        self.blocks.append(count)
        self.rates += [float(rate)] * count
        self.steps = int(state.count) + count
        return state._replace(count=state.count + count)

    def look(self, params):
        self.now += self.of_look
        if not self.looks:
            self.compile()
        self.looks += 1
        return float(next(self.nats))

    def slow(self, take, *rest):
        def timed(key):
            self.now += self.of_data
            return take(key)

        return timed, *rest

    def taken(self):
        return sum(self.blocks)
