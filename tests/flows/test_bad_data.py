"""Bad data, weights and parameters of a flow are named, or give no number, in every mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode

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


def flow(f=field, **options):
    return jaxode.cnf(f, jaxode.standard_normal(2), rtol=1e-3, atol=1e-3, **options)


def nll(options, rate, x, x0, context, weights):
    del x0
    return flow(**options).nll(rate, x, context=context, weights=weights)


def matching_loss(options, rate, x, x0, context, weights):
    return flow(**options).matching_loss(rate, x, key=KEY, x0=x0, context=context, weights=weights)


LOSSES = {loss.__name__: loss for loss in (nll, matching_loss)}


def changed(name, row, value):
    return {name: GOOD[name].at[row].set(value)}


def test_weights_that_are_wrong_have_a_code():
    run = jax.jit(lambda weights: flow().nll_and_stats(
        RATE, GOOD["x"], context=GOOD["context"], weights=weights
    )[1].result)  # fmt: skip
    codes = [int(run(jnp.array(weights))) for weights in ([1.0, 0, 0], [0, 0, 0], [3.0, 1, -1])]
    assert codes == [jaxode.Result.SUCCESS, *2 * [jaxode.Result.INVALID_ARGUMENT]]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1e308, 1e-307])
def test_weights_count_by_their_ratios(loss, scale):
    """Their sum overflows, or is near the least number."""
    of = jax.jit(lambda weights: LOSSES[loss]({}, RATE, **GOOD | {"weights": weights}))
    weights = jnp.array([1.0, 0.5, 0.9])
    np.testing.assert_allclose(of(scale * weights), of(weights), rtol=1e-12)


def test_a_row_of_weight_zero_is_left_out_of_the_likelihood_if_its_steps_are_its_own():
    """That its gradients are, is tested in `test_flow_features.py`."""
    weights = {"weights": jnp.array([1.0, 0.0, 2.0])}
    of = lambda data, **options: nll({"throw": True} | options, RATE, **GOOD | data | weights)
    alone = functools.partial(of, batch="per_sample")
    np.testing.assert_allclose(alone(changed("context", 1, NAN)), alone({}), rtol=1e-12)
    with pytest.raises(jaxode.SolveError, match=r"context=...\).* 1 of 3 rows, first in row 2\."):
        alone(changed("context", slice(1, 3), NAN))
    with pytest.raises(jaxode.SolveError, match=r"x=...\).*with joint steps also .* in row 1\."):
        of(changed("x", 1, NAN))


@pytest.mark.parametrize("adjoint", [jaxode.DiscreteAdjoint(), jaxode.BacksolveAdjoint()])
def test_a_row_of_weight_zero_may_end_where_the_base_density_is_zero(adjoint):
    """Such as the number that stands for missing values in some files."""
    weights = {"weights": jnp.array([1.0, 0.0, 2.0])}
    loss = lambda x: nll({"adjoint": adjoint, "throw": True}, RATE, **{**GOOD, "x": x} | weights)
    far = GOOD["x"].at[1].set(9.97e200)
    np.testing.assert_allclose(loss(far), loss(GOOD["x"]), rtol=1e-5)


def test_data_and_parameters_in_half_precision_have_a_gradient():
    """`z(t0) = x e^p` for the field `-p z`: the loss at x = 1 is e^2p - 2p + log 2 pi."""
    density = jaxode.cnf(lambda t, z, p: -p * z, jaxode.standard_normal(2))
    loss = lambda p: density.nll(p, jnp.ones((3, 2), jnp.float16))
    value, gradient = jax.value_and_grad(loss)(jnp.float16(1))
    assert (value.dtype, gradient.dtype) == (jnp.float32, jnp.float16)
    # In single precision, so are the weights of the mean: in half, a third is off by 2e-4.
    np.testing.assert_allclose(value, np.exp(2) - 2 + np.log(2 * np.pi), rtol=1e-4)
    np.testing.assert_allclose(gradient, 2 * np.exp(2) - 2, rtol=2e-3)  # twice the dtype's epsilon


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
        flow(f, **options).nll(None, 50 * GOOD["x"], **unused)


@pytest.mark.parametrize("loss", with_slow(LOSSES, ["nll"]))  # two programs with a solve
def test_a_device_whose_rows_weigh_nothing_is_part_of_the_mean(loss):
    """Only the total of the weights counts."""
    data = {name: jnp.concatenate([rows, rows[:1]]) for name, rows in GOOD.items()}
    of = lambda weights: (RATE, *(data | {"weights": jnp.array(weights)}).values())

    def mean(rate, *rows):
        return jax.lax.pmean(LOSSES[loss]({"axis_name": "rows"}, rate, *rows), "rows")

    mesh, specs = Mesh(np.array(jax.devices()[:2]), ("rows",)), (P(), *4 * (P("rows"),))
    step = jax.shard_map(jax.value_and_grad(mean), mesh=mesh, in_specs=specs, out_specs=P())
    several = jax.jit(step)
    alone = jax.jit(jax.value_and_grad(functools.partial(LOSSES[loss], {})))
    for weights in ([1.0, 2, 0, 0], [0, 0, 0, 3.0]):
        np.testing.assert_allclose(several(*of(weights)), alone(*of(weights)), rtol=1e-12)
    if loss == "matching_loss":  # its rows of weight zero may hold anything
        whole = several(*of([1.0, 2, 0, 0]))
        for name in ("x", "x0", "context"):
            data[name] = (rows := data[name]).at[2:].set(jnp.nan)
            np.testing.assert_array_equal(several(*of([1.0, 2, 0, 0])), whole)
            data[name] = rows
    for weights in ([0.0, 0, 0, 0], [1.0, 2, 3, -1]):
        assert np.isnan(several(*of(weights))).all()


class OwnError(ValueError):
    """Not what Python or JAX raise for arguments that do not fit."""


def raising(t, z, args):
    raise OwnError("mine")


def branching(t, z, args):
    return z if z[0] > 0 else -z


def test_an_error_of_another_type_passes():
    with pytest.raises(OwnError):
        flow(raising).nll(jnp.array(0.7), GOOD["x"])


def test_what_a_field_does_that_jax_cannot_trace_is_told_with_its_line():
    told = (
        r"^nll: f branches on an array .*, in line \d+ of .*test_bad_data.py: `return z if z\[0\]"
    )
    with pytest.raises(TypeError, match=told):
        flow(branching).nll(jnp.array(0.7), GOOD["x"])


def test_sizes_in_a_message_are_bounded():
    with pytest.raises(TypeError) as info:
        jaxode.solve(jaxode.nn.field, jnp.ones(2), 0.0, 1.0, [GOOD["x"]] * 1000)
    assert len(str(info.value)) < 1000


TAKEN = {
    "x": lambda value: flow(of_none).nll(None, value),
    "z": lambda value: flow(of_none).from_base(None, value),
    "x0": lambda value: flow(of_none).matching_loss(None, GOOD["x"], key=KEY, x0=value),
    "context": lambda value: flow(of_none).nll(None, GOOD["x"], context=value),
    "params": lambda value: flow(of_none).matching_loss(value, GOOD["x"], key=KEY),
    "args": lambda value: jaxode.solve(of_none, GOOD["x"], 0.0, 1.0, {"a": value}),
    "y0": lambda value: jaxode.solve(of_none, value, 0.0, 1.0),
}


def of_none(t, z, args):
    return -z


@pytest.mark.parametrize("name", with_slow(TAKEN, ["z", "context", "args"]))  # as the others
def test_an_array_in_another_byte_order_is_taken(name):
    x = np.asarray(GOOD["x"])
    big, own = (TAKEN[name](x.astype(order + "f8")) for order in "><")
    jax.tree.map(np.testing.assert_array_equal, big, own)
