"""Bad data, weights, parameters and arguments of a flow are named, in every transformation."""

import functools
import pickle
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import AT_RUN_TIME, typed, with_slow
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode
from jaxode import divergence, regularizers

KEY, RATE = jax.random.key(0), jnp.array(0.7)
NAN, INF = jnp.nan, jnp.inf
GOOD = {
    "x": jnp.array([[0.1, 0.2], [0.3, -0.4], [-0.5, 0.6]]),
    "x0": jnp.array([[1.0, 0.2], [0.3, -1.4], [-0.5, 1.6]]),
    "context": jnp.array([[0.1], [0.2], [0.3]]),
    "weights": jnp.array([1.0, 2.0, 3.0]),
}


def field(t, z, args):
    rate, context = args
    return context - rate * z


def opposite(t, z, p):
    return -z


def flow(base=None, f=field, **options):
    base = jaxode.standard_normal(2) if base is None else base
    return jaxode.cnf(f, base, rtol=1e-3, atol=1e-3, **options)


def nll(options, rate, x, x0, context, weights):
    del x0
    return flow(**options).nll(rate, x, context=context, weights=weights)


def matching_loss(options, rate, x, x0, context, weights):
    return flow(**options).matching_loss(rate, x, key=KEY, x0=x0, context=context, weights=weights)


LOSSES = {loss.__name__: loss for loss in (nll, matching_loss)}


@functools.cache
def transformed(loss, mode, throw):
    """The loss of `GOOD` with changes, or two of them: without any, and with them."""
    of = functools.partial(LOSSES[loss], {"throw": throw})
    each = {
        "eager": of,
        "jit": jax.jit(of),
        "jit(grad)": jax.jit(jax.grad(of)),
        "vmap": jax.jit(jax.vmap(of, (None, 0, 0, 0, 0))),
    }[mode]

    def call(**changes):
        data = GOOD | changes
        if mode == "vmap":
            data = {name: jnp.stack([GOOD[name], data[name]]) for name in GOOD}
        return jax.block_until_ready(each(RATE, *data.values()))

    return call


def changed(name, row, value):
    return {name: GOOD[name].at[row].set(value)}


# (changes, the first bad row, how many there are)
BAD_DATA = {
    "NaN in x": (changed("x", (1, 0), NAN), 1, 1),
    "inf in x": (changed("x", (0, 1), -INF), 0, 1),
    "rows of NaN in x": (changed("x", slice(1, 3), NAN), 1, 2),
    "NaN in context": (changed("context", 2, NAN), 2, 1),
    "NaN in x0": (changed("x0", (2, 1), NAN), 2, 1),
    "NaN in weights": (changed("weights", 1, NAN), 1, 1),
    "inf in weights": (changed("weights", 2, INF), 2, 1),
    "a negative weight": (changed("weights", 1, -1.0), 1, 1),
    "no weights": ({"weights": jnp.zeros(3)}, 0, 3),
}
MODES = ["eager", "jit", "jit(grad)", "vmap"]
# Every kind of bad data at once and compiled, and in each other mode one of each argument.
IN_EVERY_MODE = [name for name in BAD_DATA if name.startswith("NaN")]
CASES = [
    (loss, mode, name)
    for loss in LOSSES
    for mode in MODES
    for name in (BAD_DATA if mode in ("eager", "jit") else IN_EVERY_MODE)
    if not (loss == "nll" and "x0" in BAD_DATA[name][0])
]


# Rows under `vmap` are numbered as those of a solve.
SLOW = [case for case in CASES if case[1] == "vmap"]


@pytest.mark.parametrize(("loss", "mode", "name"), with_slow(CASES, SLOW))
def test_bad_data_is_named_where_the_loss_raises(loss, mode, name):
    changes, first, count = BAD_DATA[name]
    (argument,) = changes
    rows, before = (6, 3) if mode == "vmap" else (3, 0)
    exception = jax.errors.JaxRuntimeError
    if mode == "eager":
        exception = ValueError if argument == "weights" else jaxode.SolveError
    said = rf"{loss}\({argument}=\.\.\.\).* {count} of {rows} rows, first in row {first + before}\."
    with pytest.raises(exception, match=said):
        transformed(loss, mode, True)(**changes)


@pytest.mark.parametrize(("loss", "mode", "name"), with_slow(CASES, SLOW))
def test_bad_data_is_no_number_where_it_does_not_raise(loss, mode, name):
    changes, *_ = BAD_DATA[name]
    call = transformed(loss, mode, False)
    if mode == "eager" and "weights" in changes:
        with pytest.raises(ValueError, match="weights"):
            call(**changes)
        return
    out = call(**changes)
    if mode == "vmap":
        assert np.isfinite(out[0])
        out = out[1]
    assert np.isnan(out)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", with_slow(MODES, ["vmap"]))
def test_good_data_is_not_in_the_way(loss, mode):
    quiet, loud = (transformed(loss, mode, throw)() for throw in (False, True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(quiet))
    np.testing.assert_array_equal(jax.tree.leaves(quiet), jax.tree.leaves(loud))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("weights", [[1, 2, -1], np.zeros(3), jnp.array([NAN, 1, 1])], ids=str)
def test_known_weights_are_checked_at_trace_time(loss, weights):
    data = GOOD | {"weights": weights}
    compiled = jax.jit(lambda rate: LOSSES[loss]({}, rate, *data.values()))
    with pytest.raises(ValueError, match=rf"^{loss}\(weights=\.\.\.\)"):
        compiled(RATE)


def test_weights_that_are_wrong_have_a_code():
    run = jax.jit(lambda weights: flow().nll_and_stats(
        RATE, GOOD["x"], context=GOOD["context"], weights=weights
    )[1].result)  # fmt: skip
    codes = [int(run(jnp.array(weights))) for weights in ([1.0, 0, 0], [0, 0, 0], [3.0, 1, -1])]
    assert codes == [jaxode.Result.SUCCESS, *2 * [jaxode.Result.INVALID_ARGUMENT]]


@pytest.mark.parametrize("mode", ["eager", "jit"])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1e308, 1e-307])
def test_weights_count_by_their_ratios(loss, scale, mode):
    """Their sum overflows, or is near the least number."""
    of, weights = transformed(loss, mode, False), jnp.array([1.0, 0.5, 0.9])
    np.testing.assert_allclose(of(weights=scale * weights), of(weights=weights), rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "compile"),
    [pytest.param("x", jax.jit, marks=pytest.mark.slow), ("context", lambda f: f)],
    ids=["x when compiled", "context"],
)
def test_a_row_of_weight_zero_is_left_out_of_the_likelihood(name, compile):
    weights = {"weights": jnp.array([1.0, 0.0, 2.0])}
    of = lambda **options: compile(
        lambda data: nll({"throw": True} | options, RATE, **data | weights)
    )
    alone, joint, failed = of(batch="per_sample"), of(), (jaxode.SolveError, *AT_RUN_TIME)
    np.testing.assert_allclose(alone(GOOD | changed(name, 1, NAN)), alone(GOOD), rtol=1e-12)
    with pytest.raises(failed, match=rf"{name}=...\).* 1 of 3 rows, first in row 2\."):
        jax.block_until_ready(alone(GOOD | changed(name, slice(1, 3), NAN)))
    with pytest.raises(failed, match=rf"{name}=...\).*with joint steps also .* in row 1\."):
        jax.block_until_ready(joint(GOOD | changed(name, 1, NAN)))


@pytest.mark.parametrize("adjoint", [jaxode.DiscreteAdjoint(), jaxode.BacksolveAdjoint()])
def test_a_row_of_weight_zero_may_end_where_the_base_density_is_zero(adjoint):
    """Such as the number that stands for missing values in some files."""
    weights = {"weights": jnp.array([1.0, 0.0, 2.0])}
    loss = lambda x: nll({"adjoint": adjoint, "throw": True}, RATE, **{**GOOD, "x": x} | weights)
    far = GOOD["x"].at[1].set(9.97e200)
    np.testing.assert_allclose(loss(far), loss(GOOD["x"]), rtol=1e-5)


@pytest.mark.parametrize("method", ["nll", "log_prob"])
def test_a_traced_option_that_is_wrong_is_named(method):
    def run(rtol):
        density = jaxode.cnf(
            lambda t, z, rate: -rate * z, jaxode.standard_normal(2), rtol=rtol, throw=True
        )
        return getattr(density, method)(RATE, GOOD["x"])

    with pytest.raises(
        jax.errors.JaxRuntimeError, match=rf"{method}\(rtol=\.\.\.\): must be a finite"
    ):
        jax.block_until_ready(jax.jit(run)(NAN))


def test_data_and_parameters_in_half_precision_have_a_gradient():
    """`z(t0) = x e^p` for the field `-p z`: the loss at x = 1 is e^2p - 2p + a constant."""
    density = jaxode.cnf(lambda t, z, p: -p * z, jaxode.standard_normal(2))
    loss = lambda p: density.nll(p, jnp.ones((4, 2), jnp.float16))
    gradient = jax.grad(loss)(jnp.float16(1))
    assert gradient.dtype == jnp.float16
    np.testing.assert_allclose(gradient, 2 * np.exp(2) - 2, rtol=2e-3)  # twice the dtype's epsilon


SOLVES = {
    "log_prob": (lambda f, x, c: f.log_prob(RATE, x, context=c), "log_prob", "x"),
    "log_prob_and_error": (
        lambda f, x, c: f.log_prob_and_error(RATE, x, context=c), "log_prob_and_error", "x",
    ),
    "to_base": (lambda f, x, c: f.to_base(RATE, x, context=c), "to_base", "x"),
    "from_base": (lambda f, x, c: f.from_base(RATE, x, context=c), "from_base", "z"),
    "sample": (lambda f, x, c: f.sample(RATE, KEY, 3, context=c), "sample", "context"),
    "sample_and_log_prob": (
        lambda f, x, c: f.sample_and_log_prob(RATE, KEY, 3, context=c), "sample_and_log_prob",
        "context",
    ),
}  # fmt: skip


# Samples and their densities when compiled, all others eagerly: `_end_state` reports for all.
BY_EVERY_METHOD = [(name, jax.jit if "sample" in name else lambda f: f) for name in SOLVES]


@pytest.mark.parametrize(("name", "compile"), BY_EVERY_METHOD)
def test_bad_data_is_named_by_every_method(name, compile):
    method, where, argument = SOLVES[name]
    bad = changed("context" if argument == "context" else "x", 1, NAN)
    inputs = [(GOOD | bad)[name] for name in ("x", "context")]
    said = rf"{where}\({argument}=\.\.\.\).* 1 of 3 rows, first in row 1\."
    with pytest.raises((jaxode.SolveError, jax.errors.JaxRuntimeError), match=said):
        jax.block_until_ready(compile(functools.partial(method, flow()))(*inputs))
    quiet = jax.tree.leaves(compile(functools.partial(method, flow(throw=False)))(*inputs))
    assert all(np.isnan(leaf).any() for leaf in quiet if jnp.ndim(leaf))


OPTIONS = [{"batch": "per_sample"}, {"solver": jaxode.Rodas5P()}, {"steps": 2}]


@pytest.mark.parametrize("options", with_slow(OPTIONS, OPTIONS[1:2]), ids=str)
def test_bad_data_is_named_whatever_the_solver(options):
    with pytest.raises(jaxode.SolveError, match=r"^log_prob\(x=\.\.\.\).* 1 of 3 rows"):
        flow(**options).log_prob(RATE, **changed("x", 1, NAN), context=GOOD["context"])


def test_a_base_that_is_not_finite_is_named():
    base = jaxode.diagonal_normal(2)
    base = eqx.tree_at(lambda base: base.mean, base, base.mean.at[1].set(NAN))
    with pytest.raises(jaxode.SolveError, match=r"^cnf\(base=\.\.\.\).* 3 of 3 rows"):
        flow(base).sample(RATE, KEY, 3, context=GOOD["context"])


@pytest.mark.parametrize(
    ("f", "options", "said"),
    [
        (lambda t, z, args: -30 * z, {"max_steps": 2}, "the steps ran out"),
        (lambda t, z, args: NAN * z, {}, r"the vector field or the state is not finite at t=1\."),
    ],
    ids=["steps", "field"],
)
def test_another_failure_is_not_put_down_to_the_data(f, options, said):
    unused = changed("context", 1, NAN) if options else {"context": GOOD["context"]}
    with pytest.raises(jaxode.SolveError, match=f"^nll: {said}"):
        flow(f=f, **options).nll(None, 50 * GOOD["x"], **unused)


def test_a_matching_loss_that_is_not_finite_raises_where_nll_does():
    diverged = flow(f=lambda t, z, rate: rate * z)
    with pytest.raises(jaxode.SolveError, match=r"^matching_loss: the vector field"):
        diverged.matching_loss(NAN, GOOD["x"], key=KEY)
    assert np.isnan(jax.jit(diverged.matching_loss)(NAN, GOOD["x"], key=KEY))


def test_a_coupling_that_is_no_permutation_is_named_when_compiled():
    twice = jaxode.coupling.Coupling(lambda key, z, x, context: jnp.array([0, 1, 1]))
    loud = lambda x: flow(throw=True).matching_loss(
        RATE, x, key=KEY, context=GOOD["context"], coupling=twice
    )
    with pytest.raises(
        jax.errors.JaxRuntimeError, match=r"coupling=\.\.\.\).* 2 of 3 rows, first in row 1\."
    ):
        jax.block_until_ready(jax.jit(loud)(GOOD["x"]))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap, jax.grad])
def test_a_mean_over_no_rows_is_an_error(loss, transform):
    empty = [GOOD[name][:0] for name in GOOD]
    of = lambda rate: LOSSES[loss]({}, rate, *empty)
    rate = jnp.ones(2) if transform is jax.vmap else RATE
    with pytest.raises(ValueError, match=rf"^{loss}\(x=\.\.\.\).*\(0, 2\)"):
        transform(of)(rate)


def sharded(loss, throw=None):
    mesh = Mesh(np.array(jax.devices()[:2]), ("rows",))

    def mean(rate, *rows):
        options = {"axis_name": "rows", "throw": throw}
        return jax.lax.pmean(LOSSES[loss](options, rate, *rows), "rows")

    specs = (P(), *4 * (P("rows"),))
    step = jax.shard_map(jax.value_and_grad(mean), mesh=mesh, in_specs=specs, out_specs=P())
    return jax.jit(step)


@typed
@pytest.mark.parametrize("loss", with_slow(LOSSES, ["nll"]))
def test_a_device_whose_rows_weigh_nothing_is_part_of_the_mean(loss):
    """Only the total of the weights counts."""
    data = {name: jnp.concatenate([rows, rows[:1]]) for name, rows in GOOD.items()}
    of = lambda weights: (RATE, *(data | {"weights": jnp.array(weights)}).values())
    several, alone = sharded(loss), jax.jit(jax.value_and_grad(functools.partial(LOSSES[loss], {})))
    for weights in ([1.0, 2, 0, 0], [0, 0, 0, 3.0]):
        np.testing.assert_allclose(several(*of(weights)), alone(*of(weights)), rtol=1e-12)
    if loss == "matching_loss":  # its rows of weight zero may hold anything
        for name in ("x", "x0", "context"):
            rows = data[name]
            data[name] = rows.at[2:].set(jnp.nan)
            found = several(*of([1.0, 2, 0, 0]))
            data[name] = rows
            np.testing.assert_array_equal(found, several(*of([1.0, 2, 0, 0])))
    for weights in ([0.0, 0, 0, 0], [1.0, 2, 3, -1]):
        assert np.isnan(several(*of(weights))).all()


def raise_misfit(error):
    def f(t, z, args):
        raise error

    return f


NETWORK = jaxode.nn.MLP(2, (4,), key=KEY)
X = GOOD["x"]
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


@pytest.mark.parametrize("key", [KEY, jax.random.PRNGKey(0), np.zeros(2, np.uint32)], ids=str)
def test_good_keys(key):
    keys = jax.random.split(KEY, 3) if key is KEY else jnp.stack([key] * 3)
    draw = lambda key: flow(f=opposite).sample(None, key, 2)
    # The keys are known, and nothing is compiled.
    assert jax.eval_shape(lambda: jax.vmap(draw)(keys)).shape == (3, 2, 2)
    assert jax.eval_shape(lambda: draw(key)).shape == (2, 2)


@pytest.mark.parametrize(
    "value",
    [
        divergence.auto(), divergence.exact(), divergence.exact(chunk=2), divergence.closed_form(),
        divergence.hutchinson(), divergence.hutchinson(2, "orthogonal"),
    ],
    ids=lambda value: value.name,
)  # fmt: skip
def test_a_flow_can_be_pickled(value):
    costs = (regularizers.kinetic_energy(0.1), regularizers.jacobian_frobenius(0.2))
    made = flow(f=jaxode.nn.field, divergence=value, regularizers=costs)
    again = pickle.loads(pickle.dumps(made))
    assert again == made
    assert hash(again) == hash(made)
    assert again != flow(f=jaxode.nn.field, divergence=value)
