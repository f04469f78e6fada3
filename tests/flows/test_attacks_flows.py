"""Wrong arguments of a flow are named."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxode
from jaxode import divergence

KEY, RATE = jax.random.key(0), jnp.array(0.7)
X = jnp.array([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]])


def opposite(t, z, p):
    return -z


def flow(f, **options):
    return jaxode.cnf(f, jaxode.standard_normal(2), rtol=1e-3, atol=1e-3, **options)


def raise_misfit(error):
    def f(t, z, args):
        raise error

    return f


NETWORK = jaxode.nn.MLP(2, (4,), key=KEY)
MISFITS = {
    "a dict for a network": (jaxode.nn.field, {"w": X}, TypeError, r"\{'w': f64\[3,2\]\}"),
    "nothing": (jaxode.nn.field, None, TypeError, "args=None"),
    "a network of Equinox": (
        jaxode.nn.field, eqx.nn.MLP(2, 2, 4, 1, key=KEY), TypeError, r"f64\[4,2\]",
    ),
    "two arguments": (lambda t, z: z, RATE, TypeError, r"f64\[\]"),
    "a key that is missing": (lambda t, z, p: p["v"] * z, {"w": RATE}, KeyError, "'v'"),
    "no attribute": (lambda t, z, p: p.rate * z, (RATE,), AttributeError, "rate"),
    "other shapes": (lambda t, z, p: p * z, X, (TypeError, ValueError), r"f64\[3,2\]"),
    "an error of the field's own": (raise_misfit(ValueError("mine")), RATE, ValueError, "mine"),
}  # fmt: skip
CALLS = {
    "solve": lambda f, params: jaxode.solve(f, X[0], 0.0, 1.0, params),
    "flow": lambda f, params: jaxode.flow(f, X, 0.0, 1.0, params),
    "nll": lambda f, params: flow(f=f).nll(params, X),
    "log_prob": lambda f, params: flow(f=f, divergence=divergence.exact()).log_prob(params, X),
    "matching_loss": lambda f, params: flow(f=f).matching_loss(params, X, key=KEY),
}


# `call_field` tells, whoever calls it: one of the solves and one of the losses meet all misfits,
# also compiled; the others meet two.
ALSO_COMPILED = ("solve", "nll")
OF_CALLS = [
    (name, call) for call in CALLS for name in MISFITS
    if call in ALSO_COMPILED or name in ("a dict for a network", "an error of the field's own")
]  # fmt: skip


@pytest.mark.parametrize(("name", "call"), OF_CALLS)
def test_an_error_in_a_field_says_what_it_was_called_with(name, call):
    f, params, cause, said = MISFITS[name]
    for run in (CALLS[call], eqx.filter_jit(CALLS[call]))[: 1 + (call in ALSO_COMPILED)]:
        with pytest.raises(TypeError, match=said) as info:
            run(f, params)
        message = str(info.value)
        assert message.startswith("f(t, y, args): ")
        assert "y=f64[2]" in message
        assert isinstance(info.value.__cause__, cause)
        assert type(info.value.__cause__).__name__ in message


class OwnError(ValueError):
    """Not what Python or JAX raise for arguments that do not fit."""


def branch(t, z, args):
    return z if z[0] > 0 else -z


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    ("f", "exception"),
    [(raise_misfit(OwnError("mine")), OwnError), (branch, jax.errors.TracerBoolConversionError)],
    ids=["own", "branch"],
)
def test_an_error_of_another_type_passes(f, exception, call):
    with pytest.raises(exception) as info:
        CALLS[call](f, RATE)
    assert type(info.value) is exception


def test_sizes_in_a_message_are_bounded():
    with pytest.raises(TypeError) as info:
        jaxode.solve(jaxode.nn.field, X[0], 0.0, 1.0, [X] * 1000)
    assert len(str(info.value)) < 1000


class Table:
    """As a DataFrame of pandas: with a shape and a way to become an array."""

    shape, dtype, ndim = (3, 2), np.dtype(float), 2

    def __array__(self, dtype=None, copy=None):
        return np.ones(self.shape)


def of(name, value, method="nll", **options):
    data = {"x": X, "key": KEY, name: value}
    return lambda: getattr(flow(f=opposite, **options), method)(None, **data)


# (call, exception, start of the message): the argument that is wrong, and what was got.
BAD_ARGUMENTS = {
    "a table as x": (of("x", Table()), TypeError, r"nll\(x=...\).*got Table\. Convert"),
    "text as x": (of("x", "abc"), TypeError, r"nll\(x=...\).*got str\. Convert"),
    "strings as x": (of("x", np.array([["a", "b"]])), TypeError, r"nll\(x=.*an array of <U1\."),
    "objects as x": (of("x", np.ones((3, 2), object)), TypeError, r"nll\(x=.*an array of object\."),
    "complex x": (of("x", X.astype(complex)), TypeError, r"nll\(x=...\).*got complex128\."),
    "objects as x0": (
        of("x0", np.ones((3, 2), object), "matching_loss"), TypeError,
        r"matching_loss\(x0=...\).*got an array of object\.",
    ),
    "one row of context": (
        of("context", jnp.ones((1, 4))), ValueError,
        r"nll\(context=...\).*got shape \(1, 4\)\. .*jnp.broadcast_to\(row, \(3, ",
    ),
    "a table as context": (of("context", Table()), TypeError, r"nll\(context=...\).*got Table\."),
    "a number as context": (of("context", 1.0), TypeError, r"nll\(context=...\).*got float\."),
    "objects as context": (
        of("context", np.ones((3, 2), object)), TypeError, r"nll\(context=...\).*array of object\.",
    ),
    "text as weights": (of("weights", "abc"), TypeError, r"nll\(weights=...\).*got str\."),
    "strings as weights": (
        of("weights", ["1.0"] * 3), TypeError, r"nll\(weights=...\).*got list\.",
    ),
    "complex weights": (
        of("weights", jnp.ones(3, complex)), TypeError, r"nll\(weights=.*an array of complex128\.",
    ),
    "a column of weights": (
        of("weights", jnp.ones((3, 1))), ValueError, r"nll\(weights=...\).*got \(3, 1\)\.",
    ),
    "weights of another batch": (
        of("weights", jnp.ones(2), "matching_loss"), ValueError,
        r"matching_loss\(weights=...\).*got \(2,\)\.",
    ),
    "keys": (of("key", jax.random.split(KEY, 3)), ValueError, r"nll\(key=...\).*shape \(3,\)\."),
    "old keys": (
        of("key", jnp.zeros((3, 2), jnp.uint32)), ValueError, r"nll\(key=...\).*shape \(3,\)\.",
    ),
    "a long key": (of("key", jnp.zeros(3, jnp.uint32)), TypeError, r"nll\(key=...\)"),
    "a seed": (of("key", jnp.uint32(3)), TypeError, r"nll\(key=...\)"),
    "a number as axis": (of("key", KEY, axis_name=3), TypeError, r"cnf\(axis_name=...\).*got 3\."),
    "a number among axes": (of("key", KEY, axis_name=("x", 3)), TypeError, r"cnf\(axis_name=...\)"),
    "a class as the field of a flow": (
        lambda: flow(f=jaxode.nn.MLP), TypeError, r"cnf\(f=...\).*got the class MLP\.",
    ),
    "a class as the field of a solve": (
        lambda: jaxode.solve(eqx.nn.MLP, X, 0.0, 1.0), TypeError,
        r"solve\(f=...\).*got the class MLP\.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments(name):
    call, exception, said = BAD_ARGUMENTS[name]
    for run in (call, jax.jit(call)):
        with pytest.raises(exception) as info:
            run()
        assert re.match(said, str(info.value))


FOREIGN = {
    "longdouble": np.ones((3, 2), np.longdouble),
    "dates": np.zeros((3, 2), "datetime64[s]"),
    "records": np.zeros((3, 2), [("a", float)]),
    "masked": np.ma.masked_array(np.ones((3, 2)), np.eye(3, 2)),
}
TAKEN = {
    "x": lambda value: flow(f=opposite).nll(None, value),
    "z": lambda value: flow(f=opposite).from_base(None, value),
    "x0": lambda value: flow(f=opposite).matching_loss(None, X, key=KEY, x0=value),
    "context": lambda value: flow(f=opposite).nll(None, X, context=value),
    "params": lambda value: flow(f=opposite).matching_loss(value, X, key=KEY),
    "args": lambda value: jaxode.solve(opposite, X, 0.0, 1.0, {"a": value}),
    "y0": lambda value: jaxode.solve(opposite, value, 0.0, 1.0),
}


@pytest.mark.parametrize("name", TAKEN)
@pytest.mark.parametrize("value", FOREIGN)
def test_an_array_that_jax_has_no_dtype_for_is_named(name, value):
    with pytest.raises(TypeError, match=rf"^\w+\({name}=\.\.\.\): .*; got .*\. \w"):
        TAKEN[name](FOREIGN[value])


@pytest.mark.parametrize("name", TAKEN)
def test_an_array_in_another_byte_order_is_taken(name):
    big, own = (TAKEN[name](np.asarray(X).astype(order + "f8")) for order in "><")
    for a, b in zip(jax.tree.leaves(big), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(a, b)


def test_keys_are_no_context():
    keys = jax.random.split(KEY, 3)
    with pytest.raises(
        TypeError, match=r"^nll\(context=...\).*; got an array of key<fry>\. Convert"
    ):
        TAKEN["context"](keys)
