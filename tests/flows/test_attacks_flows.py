"""Bad data, weights, parameters and arguments of a flow are named, in every transformation."""

import functools
import pickle

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
NAN = jnp.nan
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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("mode", with_slow(["eager", "jit", "jit(grad)", "vmap"], ["vmap"]))
def test_good_data_is_not_in_the_way(loss, mode):
    quiet, loud = (transformed(loss, mode, throw)() for throw in (False, True))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(quiet))
    np.testing.assert_array_equal(jax.tree.leaves(quiet), jax.tree.leaves(loud))


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


def test_data_and_parameters_in_half_precision_have_a_gradient():
    """`z(t0) = x e^p` for the field `-p z`: the loss at x = 1 is e^2p - 2p + a constant."""
    density = jaxode.cnf(lambda t, z, p: -p * z, jaxode.standard_normal(2))
    loss = lambda p: density.nll(p, jnp.ones((4, 2), jnp.float16))
    gradient = jax.grad(loss)(jnp.float16(1))
    assert gradient.dtype == jnp.float16
    np.testing.assert_allclose(gradient, 2 * np.exp(2) - 2, rtol=2e-3)  # twice the dtype's epsilon


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


X = GOOD["x"]
CALLS = {
    "solve": lambda f, params: jaxode.solve(f, X[0], 0.0, 1.0, params),
    "flow": lambda f, params: jaxode.flow(f, X, 0.0, 1.0, params),
    "nll": lambda f, params: flow(f=f).nll(params, X),
    "log_prob": lambda f, params: flow(f=f, divergence=divergence.exact()).log_prob(params, X),
    "matching_loss": lambda f, params: flow(f=f).matching_loss(params, X, key=KEY),
}


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
def test_an_array_in_another_byte_order_is_taken(name):
    big, own = (TAKEN[name](np.asarray(X).astype(order + "f8")) for order in "><")
    for a, b in zip(jax.tree.leaves(big), jax.tree.leaves(own), strict=True):
        np.testing.assert_array_equal(a, b)


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
