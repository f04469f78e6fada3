"""What is compiled again, and what not: static parts by equality, arrays as inputs."""

import dataclasses
import functools
import gc

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow
from jax.extend.backend import get_backend

import jaxode
from jaxode import divergence
from jaxode.nn import MLP, field
from jaxode.regularizers import jacobian_frobenius, kinetic_energy

Y0 = jnp.array([1.0, 2.0])
X = jnp.array([[0.3, -0.2], [1.0, 0.5], [-1.0, 0.1]])


def decay(t, y, args):
    return -args["rate"] * y ** args["power"]


def linear(matrix, t, y, args):
    return -matrix @ y


class Module(eqx.Module):
    matrix: jax.Array
    activation: object = jnp.tanh

    def __call__(self, t, y, args):
        return -self.activation(self.matrix @ y)


@dataclasses.dataclass
class Unhashable:
    """It has an `__eq__`, and so no `__hash__`."""

    rate: float

    def __call__(self, t, y, args):
        return -self.rate * y

    def method(self, t, y, args):
        return self(t, y, args)


@dataclasses.dataclass(frozen=True)
class Frozen:
    rate: float
    array: object = dataclasses.field(default=1.0, compare=False)

    def __call__(self, t, y, args):
        return -self.rate * self.array * y


@dataclasses.dataclass(frozen=True)
class Gaussian(divergence.Divergence):
    """A user's own."""

    probes: int

    def init(self, key, z):
        return jax.random.normal(key, (self.probes, *z.shape), z.dtype)

    def apply(self, g, z, probe):
        return divergence.hutchinson().apply(g, z, probe)


def no_noise(key, z):
    return None


def trace_times(matrix, g, z, probe):
    dz, trace = divergence.exact().apply(g, z, probe)
    return dz, matrix[0, 0] * trace


HELD = Unhashable(2.0)
# Equal steps make smaller programs; sixteen are exact to 1e-6.
solve = lambda f, args=None: jaxode.solve(f, Y0, 0.0, 1.0, args, steps=16).y1
# Options of no other test, which may have compiled the same program.
OWN = {"rtol": 1e-3, "atol": 1e-3, "max_steps": 1234}
flow = lambda **more: jaxode.cnf(field, jaxode.standard_normal(2), **OWN, **more)
NETWORK = MLP(2, (4,), key=jax.random.key(0))
scaled = lambda i: (1.0 + i) * jnp.eye(2)

# Calls that make everything anew and compile once. A new one is one row.
ONCE = {
    "bound method": lambda i: solve(HELD.method),
    "partial": lambda i: solve(functools.partial(linear, scaled(i))),
    "NumPy array": lambda i: solve(of_args, (1.0 + i) * np.eye(2)),
    "method of a module": lambda i: solve(Module(scaled(i)).__call__),
    "numbers among args": lambda i: solve(decay, {"rate": 1.0 + i, "power": 2}),
    "unhashable among args": lambda i: solve(decay_first, (1.0 + i, {"a", "set"}, HELD)),
    "log_prob": lambda i: flow().log_prob(NETWORK, X + i),
    "arrays in the functions of a divergence": lambda i: flow(
        divergence=divergence.Divergence(no_noise, functools.partial(trace_times, scaled(i)))
    ).log_prob(NETWORK, X),
    "nll": lambda i: flow().nll(NETWORK, X + i, weights=jnp.ones(3)),
    "sample": lambda i: flow().sample(NETWORK, jax.random.key(i), 3),
    "learned base": lambda i: jaxode.cnf(field, jaxode.diagonal_normal(2), **OWN).log_prob(
        NETWORK, X + i
    ),
}  # fmt: skip


def decay_first(t, y, args):
    return -args[0] * y


def of_args(t, y, matrix):
    return linear(matrix, t, y, None)


OF_FLOWS = ["log_prob", "sample", "learned base"]


@pytest.mark.parametrize("name", with_slow(ONCE, OF_FLOWS))  # compiled as nll
def test_compiles_once(name, compiled):
    first = ONCE[name](0)
    assert compiled
    compiled.clear()
    assert all(np.isfinite(value).all() for value in (first, ONCE[name](1), ONCE[name](2)))
    assert not compiled


def test_arrays_of_what_is_recognized_are_inputs():
    """Not constants of the program that was compiled for others."""
    for i in (0, 1):
        exact = Y0 * np.exp(-1.0 - i)
        np.testing.assert_allclose(ONCE["partial"](i), exact, rtol=1e-4)
        np.testing.assert_allclose(ONCE["NumPy array"](i), exact, rtol=1e-4)


# Pairs of fields that `==` does not tell apart, or that are one object which has changed.
def held(t, y, args):
    return -args.rate * y


def by_number(t, y, args, k):
    return y * 0.0 + jnp.arctan2(jnp.asarray(k, float), -1.0)


def by_type(t, y, args):
    return y * 0.0 + (2.0 if args is True else 1.0)


class Changing:
    rate: object = 1.0

    def __call__(self, t, y, args):
        return -self.rate * y


def changed(rate, thing=Changing()):
    thing.rate = rate
    return thing


@dataclasses.dataclass(slots=True)
class Slotted:
    rate: object = 1.0

    def __call__(self, t, y, args):
        return -self.rate * y


def closure():
    rate = None

    def field(t, y, args):
        return -rate * y

    def use(value):
        nonlocal rate
        rate = value
        return field

    return use


RATES = (1.0, 2.0, 1.0)
SLOTTED = Slotted()
use = closure()
# Each gives `y' = -rate y` for a rate. A new one is one row.
CHANGED = {
    "field that is not compared": lambda rate: solve(Frozen(1.0, jnp.asarray(rate))),
    "attribute of a field": lambda rate: solve(changed(rate)),
    "attribute in a slot": lambda rate: solve(changed(rate, SLOTTED)),
    "attribute of an argument": lambda rate: solve(held, changed(rate)),
    "bound method": lambda rate: solve(changed(rate).__call__),
    "variable of a closure": lambda rate: solve(use(rate)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_change_is_not_taken_for_what_it_was(name):
    for rate in RATES:
        np.testing.assert_allclose(CHANGED[name](rate), Y0 * np.exp(-rate), rtol=1e-4)


DIFFERENTIATED = ["attribute of a field", "variable of a closure"]


@pytest.mark.parametrize("name", with_slow(DIFFERENTIATED, DIFFERENTIATED[:1]))  # as of a closure
def test_a_change_that_is_differentiated(name):
    for rate in RATES:
        gradient = jax.grad(lambda rate: CHANGED[name](rate).sum())(rate)
        np.testing.assert_allclose(gradient, -3 * np.exp(-rate), rtol=1e-4)


def test_numbers_that_are_equal_but_not_the_same():
    for k in (0.0, -0.0):
        end = solve(functools.partial(by_number, k=k))
        np.testing.assert_allclose(end, Y0 + np.arctan2(k, -1.0), rtol=1e-6)
    np.testing.assert_allclose(solve(by_type, 1), Y0 + 1.0, rtol=1e-6)
    np.testing.assert_allclose(solve(by_type, True), Y0 + 2.0, rtol=1e-6)


def test_arguments_are_given_back_as_they_came():
    def f(t, y, args):
        assert isinstance(args["net"], functools.partial)
        assert args["names"] == {"a", "b"}
        return args["net"](y, s=3.0)

    net = functools.partial(lambda y, s=1.0: -s * y, s=1.0)
    end = solve(f, {"net": net, "names": {"a", "b"}})
    np.testing.assert_allclose(end, Y0 * np.exp(-3.0), rtol=1e-4)


def test_nothing_is_kept_of_many_eager_calls(compiled):
    f, args = functools.partial(linear, scaled(0)), {"rate": 1.0, "power": 2}
    run = lambda: (solve(f), solve(decay, args))
    run()
    compiled.clear()
    arrays = len(jax.live_arrays())
    for _ in range(200):
        run()
    assert not compiled
    assert len(jax.live_arrays()) == arrays


# Options of flows. Each makes its parts anew. A new part of a flow is one row, except for gradient
# methods, which `tests/ode/test_adjoints.py` compares.
FLOWS = {
    "plain": lambda: {},
    "hutchinson": lambda: {"divergence": divergence.hutchinson(2, "orthogonal")},
    "own divergence": lambda: {"divergence": Gaussian(2)},
    "two functions": lambda: {"divergence": divergence.Divergence(no_noise, decay)},
    "backsolve": lambda: {"adjoint": jaxode.BacksolveAdjoint(rtol=1e-3), "rtol": 1e-4},
    "few checkpoints": lambda: {"adjoint": jaxode.DiscreteAdjoint(4), "max_steps": 100},
    "regularized": lambda: {
        "divergence": divergence.hutchinson(),
        "regularizers": [kinetic_energy(0.1), jacobian_frobenius(0.2)],
    },
}


@pytest.mark.parametrize("name", FLOWS)
def test_equal_flows_are_equal_and_hashable(name):
    make = lambda **other: jaxode.cnf(
        field, jaxode.standard_normal((2,)), **{**FLOWS[name](), **other}
    )
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != make(atol=1e-7)
    assert make() != make(batch="per_sample")


def base(scale):
    return jaxode.flows.bases.DiagonalNormal(jnp.zeros(2), jnp.full(2, scale))


EQUAL = {
    "arrays of a base": lambda scale: jaxode.cnf(field, base(scale)),
    "a NumPy scalar": lambda scale: jaxode.cnf(field, base(0.0), t1=np.float64(scale)),
    "unhashable": lambda scale: jaxode.cnf(Unhashable(scale), base(0.0)),
    "a density": lambda scale: jaxode.bind(jaxode.cnf(field, base(0.0)), jnp.full(2, scale)),
}


@pytest.mark.parametrize("name", EQUAL)
def test_what_is_equal_has_one_hash(name):
    make = EQUAL[name]
    assert make(1.0) == make(1.0)
    assert make(1.0) != make(2.0)
    assert hash(make(1.0)) == hash(make(1.0))


DERIVED = {"value": lambda f: f, "gradient": jax.grad}


@pytest.mark.parametrize("name", with_slow(DERIVED, ["gradient"]))  # ten programs
def test_only_so_many_programs_are_kept(name, monkeypatch):
    """Of fields that are new functions. A gradient has two programs, one of them of the value."""
    monkeypatch.setattr("jaxode._jax.closure.KEPT", 2)
    count = lambda: (gc.collect(), len(get_backend().live_executables()))[1]

    def call(rate):
        field = lambda t, y, args: -rate * y
        run = lambda y: jaxode.solve(field, y, 0.0, 1.0, solver=diffrax.Euler(), steps=1).y1
        return DERIVED[name](run)(1.0)

    call(0)
    before = count()
    for rate in range(1, 5):
        call(rate)
    assert count() - before <= 2 * 2


def test_a_flow_is_a_pytree():
    base = jaxode.diagonal_normal(2)
    one = jaxode.cnf(Module(scaled(0)), base, t1=jnp.array(1.0))
    doubled = jax.tree.map(lambda leaf: 2 * leaf if eqx.is_array(leaf) else leaf, one)
    np.testing.assert_array_equal(doubled.f.matrix, 2 * np.eye(2))
    assert doubled.t1 == 2.0
    run = eqx.filter_jit(lambda flow, x: (flow.log_prob(None, x), flow))
    log_prob, back = run(one, X)
    np.testing.assert_allclose(log_prob, one.log_prob(None, X), rtol=1e-12)
    assert back.divergence == one.divergence
    np.testing.assert_array_equal(back.base.mean, base.mean)
