"""Properties of every feature of a flow, over the table of `flow_cases.py`."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flow_cases import BASE_KEY, CASES, KEY, PAIRS, ROWS, Case
from helpers import assert_close, with_slow

import jaxode
from jaxode import divergence
from jaxode.ode.adjoints import sweep

LOST = 2  # the row that fails
ALL = jnp.arange(1.0, 1 + ROWS)  # the weights of the rows in a loss
ALL_CASES = CASES | PAIRS
NAMES = with_slow(ALL_CASES, PAIRS)  # pairs of features, each of which another row has
PER_SAMPLE = [name for name, case in ALL_CASES.items() if case.options.get("batch")]
OF_ROWS = with_slow(PER_SAMPLE, PAIRS)  # they take the programs of those pairs


def loss_of(found, weights):
    """A loss that weighs each number differently. Rows of weight zero are masked."""
    total = 0.0
    for name, leaf in found.items():
        if leaf.ndim == 0:
            total += len(name) * leaf
            continue
        each = jnp.where(weights[:, None] > 0, leaf.reshape(ROWS, -1), 0.0)
        each = jnp.sin((2 + len(name)) * each / 5) @ jnp.arange(1.0, 1 + each.shape[1])
        total += weights @ each
    return total


def differentiated(of):
    """`(inputs, weights) -> (the gradient of a loss by all inputs, what is seen)`."""

    def loss(x, weights):
        found = of(x)
        return loss_of(found, weights), found

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def program(name):
    return differentiated(ALL_CASES[name].seen)


@functools.cache
def expected(name):
    return differentiated(ALL_CASES[name].exact)(ALL_CASES[name].inputs, ALL)


@pytest.mark.parametrize("name", NAMES)
def test_values_and_gradients_are_those_of_the_closed_form(name):
    """By every input. The tolerance is 1e-10, which integrals and derivatives amplify."""
    (gradient, found), (slopes, values) = program(name)(ALL_CASES[name].inputs, ALL), expected(name)
    assert_close(found, values, 1e-8)
    assert_close(gradient, slopes, 1e-6)


@pytest.mark.parametrize("name", OF_ROWS)
def test_a_row_that_fails_leaves_the_others_alone(name):
    """Their values to the last bit, and losses and gradients in which it does not count."""
    x = ALL_CASES[name].inputs
    clean = x | {"weights": x["weights"].at[LOST].set(0.0)}
    bad = clean | {"x": x["x"].at[LOST].set(jnp.nan)}
    masked = ALL.at[LOST].set(0.0)
    (gradient, found), (slopes, whole) = (program(name)(data, masked) for data in (bad, clean))
    failed = {key for key, leaf in found.items() if jnp.isnan(leaf).any()}
    assert failed == found.keys() - {"nll", "matching", "sample", "log_q", "plain", "path"}
    others = lambda leaf: np.delete(leaf, LOST, 0) if leaf.ndim and len(leaf) == ROWS else leaf
    if "log_prob" in failed:  # the base density has no derivative at a state of NaN
        gradient = {}
    for key in (*found, *gradient):
        actual, wanted = (found, whole) if key in found else (gradient, slopes)
        np.testing.assert_array_equal(others(actual[key]), others(wanted[key]))


def test_a_row_that_fails_and_counts_has_no_loss():
    """Nor have its gradients."""
    name = "regularized, backwards"
    x = CASES[name].inputs
    gradient, found = program(name)(x | {"x": x["x"].at[LOST].set(jnp.nan)}, ALL)
    assert np.isnan(found["nll"])
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(gradient))


OF_SAMPLES = ["joint steps, closed form", "a context, own base, more axes", "in batches"]


@pytest.mark.parametrize("name", OF_SAMPLES)
def test_samples_without_densities_and_the_way_there_and_back(name):
    case = CASES[name]
    x, ((params, context), flow) = case.inputs, (case.args(case.inputs), case.flow(case.inputs))
    samples = flow.sample(params, KEY, ROWS, context=context)
    z = flow.to_base(params, samples, context=context)
    exact = jax.jit(lambda x: case.exact(x, ["sample"])["sample"])(x)
    assert_close(samples, exact, 1e-8)
    assert_close(z, flow.base.sample(BASE_KEY, (ROWS,)), 1e-8)
    assert_close(flow.from_base(params, z, context=context), samples, 1e-8)


@pytest.mark.parametrize("name", with_slow(OF_SAMPLES[1:], OF_SAMPLES[2:]))  # as one batch
def test_single_precision_without_jit(name):
    case = CASES[name]
    x = {key: leaf.astype(jnp.float32) for key, leaf in case.inputs.items()}
    # Other draws than signs and uniform numbers depend on the dtype.
    reads = [read for read in case.reads if read in ("log_prob", "nll")]
    found = case.seen(x, reads, rtol=1e-5, atol=1e-6)
    assert {leaf.dtype for leaf in found.values()} == {np.dtype("float32")}
    values = expected(name)[1]
    assert_close(found, {key: values[key] for key in found}, 1e-4)


# (case, what is read off it)
ENSEMBLES = [(OF_SAMPLES[0], ("nll",)), (OF_SAMPLES[0], ("sample",))]
ENSEMBLES += [("samples in batches", ("log_prob", "sample"))]


@pytest.mark.slow  # `tests/ode/test_vmap.py` has the rows of one solve
@pytest.mark.parametrize(("name", "reads"), ENSEMBLES)
def test_an_ensemble_has_the_numbers_of_its_members(name, reads):
    """Under `jax.vmap` over the parameters, with their gradients."""
    case, x = ALL_CASES[name], ALL_CASES[name].inputs
    rates = jnp.stack([x["rate"], 0.5 * x["rate"]])
    one = differentiated(lambda rate: case.seen(x | {"rate": rate}, reads))
    alone = differentiated(lambda rate: case.exact(x | {"rate": rate}, reads))
    members = jax.jit(jax.vmap(one, (0, None)))(rates, ALL)
    assert_close(members, jax.vmap(alone, (0, None))(rates, ALL), 1e-6)


OF_LOSSES = Case(("nll",), divergence.hutchinson(2), context=True, regularized=True)
# What differs in the program of the gradient: a solver, or a constant of the library.
PROGRAMS = {
    "a solver without a shared stage, few checkpoints": {
        "solver": diffrax.Heun(), "adjoint": jaxode.DiscreteAdjoint(2), "steps": 5,
    },
    "the parameters' gathered by step": {"steps": 2, "max_steps": 4095},
    "nodes as one batch on an accelerator": {"steps": 2, "max_steps": 4094},
}  # fmt: skip


GATHERED = ["the parameters' gathered by step"]


@pytest.mark.parametrize("name", with_slow(PROGRAMS, GATHERED))  # `test_discrete.py` has it
def test_the_gradient_of_the_loss_is_exact_for_the_computed_loss(name, monkeypatch):
    """Also where the steps are few: against central differences along a direction of all inputs."""
    if "gathered" in name:
        monkeypatch.setattr(sweep, "PARAMETERS_PER_WORK", 0)
    if "accelerator" in name:
        monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    loss = lambda x: OF_LOSSES.seen(x, **PROGRAMS[name])["nll"]
    x, run = OF_LOSSES.inputs, jax.jit(jax.value_and_grad(loss))
    # Another one for each input: the loss depends on the difference of its times.
    along = {
        key: jnp.cos(i + jnp.arange(float(leaf.size))).reshape(leaf.shape)
        for i, (key, leaf) in enumerate(x.items())
    }
    value, gradient = run(x)
    slope = sum(jnp.sum(gradient[key] * along[key]) for key in x)
    moved = lambda e: run({key: x[key] + e * along[key] for key in x})[0]
    # The difference is exact to 1e-9, and so small a gradient beside a wrong one cannot be.
    np.testing.assert_allclose((moved(1e-5) - moved(-1e-5)) / 2e-5, slope, rtol=1e-7)
    if "solver" in PROGRAMS[name]:  # the others have the same loss
        np.testing.assert_allclose(jax.jit(loss)(x), value, rtol=1e-13)


ORDERS = [(None, 5, 4), (diffrax.Heun(), 2, 16)]


@pytest.mark.parametrize(
    ("solver", "order", "steps"),
    with_slow(ORDERS, ORDERS[1:]),  # its gradient is tested above
)
def test_the_loss_has_the_order_of_the_solver(solver, order, steps):
    x, options = OF_LOSSES.inputs, {} if solver is None else {"solver": solver}
    exact = jax.jit(OF_LOSSES.exact)(x)["nll"]
    errors = [
        abs(OF_LOSSES.seen(x, steps=count, **options)["nll"] - exact)
        for count in (steps, 2 * steps)
    ]
    assert np.log2(errors[0] / errors[1]) > order - 0.5


MODES = [(first, then) for then in (jax.jacrev, jax.jacfwd) for first in (jax.grad, jax.jacfwd)]


@pytest.mark.parametrize(("first", "then"), with_slow(MODES, MODES[1:]))  # a program each
def test_second_derivatives_of_the_loss(first, then):
    case = Case(("nll",), options={"steps": 16})
    x = case.inputs
    of = lambda method: lambda k: method(x | {"shear": k})["nll"]
    found = jax.jit(then(first(of(case.seen))))(x["shear"])
    exact = jax.jit(jax.grad(jax.grad(of(case.exact))))(x["shear"])
    np.testing.assert_allclose(found, exact, rtol=1e-5)
