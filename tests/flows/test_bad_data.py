"""Bad data, weights and parameters of a flow are named, or give no number, in every mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import typed
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode

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


def flow(f=field, **options):
    return jaxode.cnf(f, jaxode.standard_normal(2), rtol=1e-3, atol=1e-3, **options)


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
# All of them compiled, and some in each other mode.
CASES = [
    (loss, mode, name)
    for loss in LOSSES
    for mode in ("eager", "jit", "jit(grad)", "vmap")
    for name in (BAD_DATA if mode == "jit" else ("NaN in x", "NaN in context", "NaN in weights"))
    if not (loss == "nll" and name == "NaN in x0")
]


@pytest.mark.parametrize(("loss", "mode", "name"), CASES)
def test_bad_data_is_named_or_no_number(loss, mode, name):
    changes, first, count = BAD_DATA[name]
    (argument,) = changes
    # Rows under `vmap` are numbered as those of a solve.
    rows, before = (6, 3) if mode == "vmap" else (3, 0)
    known = mode == "eager" and argument == "weights"
    exception = jaxode.SolveError if mode == "eager" else jax.errors.JaxRuntimeError
    said = rf"{loss}\({argument}=\.\.\.\).* {count} of {rows} rows, first in row {first + before}\."
    for throw in (True, False)[: 1 + known]:
        with pytest.raises(ValueError if known else exception, match=said):
            transformed(loss, mode, throw)(**changes)
    quiet, loud = (transformed(loss, mode, throw)() for throw in (False, True))
    assert np.isfinite(quiet).all()
    np.testing.assert_array_equal(quiet, loud)  # good data is not in the way
    if not known:
        found = transformed(loss, mode, False)(**changes)
        np.testing.assert_array_equal(jnp.isnan(found), [False, True] if mode == "vmap" else True)


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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [1e308, 1e-307])
def test_weights_count_by_their_ratios(loss, scale):
    """Their sum overflows, or is near the least number."""
    of, weights = transformed(loss, "jit", False), jnp.array([1.0, 0.5, 0.9])
    np.testing.assert_allclose(of(weights=scale * weights), of(weights=weights), rtol=1e-12)


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


@pytest.mark.parametrize("method", ["nll", "log_prob"])
def test_a_traced_option_that_is_wrong_is_named(method):
    density = lambda rtol: jaxode.cnf(field, jaxode.standard_normal(2), rtol=rtol, throw=True)
    run = lambda rtol: getattr(density(rtol), method)(RATE, GOOD["x"], context=GOOD["context"])
    said = rf"{method}\(rtol=\.\.\.\): must be a finite"
    with pytest.raises(jax.errors.JaxRuntimeError, match=said):
        jax.block_until_ready(jax.jit(run)(NAN))


def test_data_and_parameters_in_half_precision_have_a_gradient():
    """`z(t0) = x e^p` for the field `-p z`: the loss at x = 1 is e^2p - 2p + a constant."""
    density = jaxode.cnf(lambda t, z, p: -p * z, jaxode.standard_normal(2))
    loss = lambda p: density.nll(p, jnp.ones((4, 2), jnp.float16))
    gradient = jax.grad(loss)(jnp.float16(1))
    assert gradient.dtype == jnp.float16
    np.testing.assert_allclose(gradient, 2 * np.exp(2) - 2, rtol=2e-3)  # twice the dtype's epsilon


SOLVES = {
    "log_prob": ("x", lambda f, x, c: f.log_prob(RATE, x, context=c)),
    "log_prob_and_error": ("x", lambda f, x, c: f.log_prob_and_error(RATE, x, context=c)),
    "to_base": ("x", lambda f, x, c: f.to_base(RATE, x, context=c)),
    "from_base": ("z", lambda f, x, c: f.from_base(RATE, x, context=c)),
    "sample": ("context", lambda f, x, c: f.sample(RATE, KEY, 3, context=c)),
    "sample_and_log_prob": (
        "context", lambda f, x, c: f.sample_and_log_prob(RATE, KEY, 3, context=c),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVES)
def test_bad_data_is_named_by_every_method(name):
    """Samples and their densities when compiled, all others without `jit`."""
    argument, method = SOLVES[name]
    compile = jax.jit if "sample" in name else lambda f: f
    bad = changed("context" if argument == "context" else "x", 1, NAN)
    inputs = [(GOOD | bad)[name] for name in ("x", "context")]
    said = rf"{name}\({argument}=\.\.\.\).* 1 of 3 rows, first in row 1\."
    with pytest.raises((jaxode.SolveError, jax.errors.JaxRuntimeError), match=said):
        jax.block_until_ready(compile(functools.partial(method, flow()))(*inputs))
    quiet = jax.tree.leaves(compile(functools.partial(method, flow(throw=False)))(*inputs))
    assert all(np.isnan(leaf).any() for leaf in quiet)


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


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap, jax.grad])
def test_a_mean_over_no_rows_is_an_error(loss, transform):
    empty = [GOOD[name][:0] for name in GOOD]
    of = lambda rate: LOSSES[loss]({}, rate, *empty)
    rate = jnp.ones(2) if transform is jax.vmap else RATE
    with pytest.raises(ValueError, match=rf"^{loss}\(x=\.\.\.\).*\(0, 2\)"):
        transform(of)(rate)


@typed
@pytest.mark.parametrize("loss", LOSSES)
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
