"""Training in one call: what it gives, with which fields, optimizers and contexts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fitting import (
    BENT,
    CONTEXT,
    INTEGERS,
    OTHERS,
    RNG,
    ROWS,
    STEPS,
    bound,
    cheap,
    cheap_of_contexts,
    equal,
    fit,
    fitted,
    minimized,
    number,
    score,
)

import jaxode
from jaxode.training import fit as fit_module
from jaxode.training import loop, steps, validations
from jaxode.training.budget import Budget
from jaxode.training.fit import MATCHING_RATE, adam

pytestmark = pytest.mark.usefixtures("default_settings")


def test_it_improves_on_the_start():
    density, history = fitted()
    assert [(at.phase, at.step) for at in history] == [("matching", 0), ("matching", STEPS)]
    assert 0 < history[0].seconds < history[1].seconds
    assert history[1].nats < history[0].nats - 0.1
    assert score(density) < score(bound()) - 0.1
    assert equal(density.standardize, bound().standardize)


def test_it_goes_on_from_a_fitted_density():
    density, history = fitted()
    longer, points = fit(density, validation=OTHERS)
    assert points[0].nats == history[-1].nats
    assert points[-1].nats < history[-1].nats
    assert score(longer) < score(density)


def test_likelihood_follows_matching_and_the_key_decides_everything():
    run = functools.partial(
        fit, cheap(params=number(1.0)), steps=50, likelihood=50, validation=OTHERS
    )
    density, history = run()
    assert [(point.phase, point.step) for point in history] == [
        ("matching", 0), ("matching", 50), ("likelihood", 0), ("likelihood", 50)
    ]  # fmt: skip
    assert history[2].nats == min(history[0].nats, history[1].nats)
    assert history[3].nats < history[2].nats
    again, points = run()
    assert equal(again, density)
    assert [point.nats for point in points] == [point.nats for point in history]
    assert not equal(run(key=jax.random.key(2))[0], density)


def test_numbers_of_python_are_trained_as_arrays():
    params = {"scale": 0.5, "name": "a", "count": 3}
    scale = fit_module._trainable(cheap(params=params)).params["scale"]
    # A weak type would become another one in the first step, which then compiles twice.
    assert isinstance(scale, jax.Array)
    assert not scale.weak_type


# A point that a loss is least at, and the start.
TARGET = {"matrix": np.eye(2, dtype=np.float32), "vector": np.array([1.0, -2.0], np.float32)}
START = jax.tree.map(np.zeros_like, TARGET)


def away(params, x, context, key):
    """The squared distance to the target, with some noise of the rows."""
    parts = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), params, TARGET)
    return sum(jax.tree.leaves(parts)) * (1 + 0.1 * jnp.mean(x))


def test_a_vector_of_all_parameters_is_trained_alike(monkeypatch):
    ravel, ravelled = loop.ravel_pytree, []
    for module in (loop, steps):
        monkeypatch.setattr(module, "ravel_pytree", lambda tree: ravelled.append(1) or ravel(tree))
    as_vector, alike = (
        minimized(away, START, adam(MATCHING_RATE), as_vector=vector).best.params
        for vector in (True, False)
    )
    assert len(ravelled) == 2  # of the parameters and of the gradient, for one of both
    assert not equal(alike, START)
    for a, b in zip(*map(jax.tree.leaves, (as_vector, alike)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)  # other roundings, 150 steps


def matching(rows, optimizer=None):
    """The first phase of a training on so many rows of two columns."""
    plan = loop.Plan(Budget(STEPS), optimizer=optimizer)
    (phase,) = fit_module._matching_phases(cheap().flow, rows, plan, jax.random.key(0))
    return phase


def test_each_step_draws_rows_and_noise_of_its_own():
    """A sum of 50 normal numbers is about 7, and 50 times one of them about 50."""

    def noise(params, x, context, key):
        return params["rows"] @ x[0] + params["noise"] @ jax.random.normal(key, (8,))

    start = {"rows": jnp.zeros(8), "noise": jnp.zeros(8)}
    rows = np.random.default_rng(0).normal(size=(400, 8))
    run = minimized(noise, start, optax.sgd(1.0), x=rows, steps=50)
    for total in run.state.arrays.values():
        assert 1 < np.sqrt(np.mean(total**2)) < 15
    loss = jax.jit(lambda key: matching(200).loss(jnp.asarray(0.1), jnp.ones((4, 2)), None, key))
    assert loss(jax.random.key(0)) != loss(jax.random.key(1))


def drifting(params, x, context, key):
    """The gradients of `matrix` and `vector` are so small that Adam leaves them alone."""
    constant = jax.lax.stop_gradient(params["constant"])
    idle = [constant, params["matrix"], params["vector"]]
    return jnp.sum((params["drift"] - x) ** 2) + 1e-12 * sum(leaf.sum() for leaf in idle)


@pytest.mark.parametrize(
    ("rows", "few", "decayed"), [(200, 2000, {"matrix"}), (201, 2000, set()), (200, 199, set())]
)
def test_weights_decay_at_few_rows(rows, few, decayed, monkeypatch):
    """Matrices that are trained: up to 100 rows for each of two columns, and up to `few`.

    Where nothing decays, the optimizer gets all parameters as one vector.
    """
    monkeypatch.setattr(fit_module, "MOST_ROWS_WITH_DECAY", few)
    phase, shapes = matching(rows), {"constant": (2, 2), "matrix": (2, 2), "vector": (2,)}
    assert phase.as_vector == (not decayed)
    start = {name: jnp.ones(shape) for name, shape in (shapes | {"drift": (2,)}).items()}
    run = minimized(drifting, start, phase.optimizer, as_vector=phase.as_vector)
    params = run.best.params
    changed = {name for name in start if not np.allclose(params[name], 1, atol=1e-3)}
    assert changed == {"drift"} | decayed
    assert matching(rows, optax.sgd(1.0)).as_vector is False


# An optimizer and steps. L-BFGS and others whose line search is of noisy losses may gain nothing
# where the loss is least.
OPTIMIZERS = {
    "of the parameters and the loss": (
        optax.chain(optax.lion(1e-2), optax.contrib.reduce_on_plateau(patience=500)), STEPS,
    ),
    "a line search": (
        optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(max_backtracking_steps=15)
        ),
        25,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimizer(name):
    optimizer, steps = OPTIMIZERS[name]
    run = minimized(away, START, optimizer, steps=steps)
    assert run.points[-1].nats < run.points[0].nats - 1


def test_complex_parameters_are_trained():
    """By 0.01 a step, less and less, and averaged."""
    run = minimized(
        lambda params, x, context, key: jnp.sum((x - jnp.imag(params)) ** 2), jnp.asarray(0j),
        x=BENT + 5,
    )  # fmt: skip
    assert run.best.params.imag > 0.3


@pytest.mark.slow  # an end-to-end training of complex parameters, beside that by the loop
def test_a_flow_of_complex_parameters_is_trained():
    field = lambda t, z, p: jnp.imag(p) + 0 * z
    density, _ = fit(bound(params=jnp.asarray(0j), f=field, standardize=(0.0, 1.0)), BENT + 5)
    assert density.params.imag > 0.3  # by 0.01 a step, less and less, and averaged


@pytest.mark.slow  # a training of its own dtype
def test_double_precision_and_strict_promotion():
    """Which Adam does not have."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    options = {"dequantize": True, "optimizer": optax.sgd(0.01), "steps": 50}
    density, history = fit(cheap(standardize=None), INTEGERS, **options)
    assert np.isfinite([point.nats for point in history]).all()
    assert density.log_prob(BENT).dtype == np.float64


@pytest.mark.slow  # a training of its own shape
def test_an_event_may_be_a_number():
    x = np.random.default_rng(1).normal(size=40)
    density, history = fit(cheap(event=(), standardize=None), x, steps=50)
    assert density.event_shape == ()
    assert np.isfinite([point.nats for point in history]).all()
    assert np.isfinite(density.log_prob(x)).all()


MOVED = 3 * CONTEXT + 0.5 * RNG.normal(size=(ROWS, 2))  # a normal whose mean is the context


def test_a_context(monkeypatch):
    """With base samples that go to rows of like contexts."""
    # Otherwise, the error of looks is some hundredths.
    monkeypatch.setattr(validations, "VALIDATION_TOLERANCE", 1e-6)
    coupling = jaxode.coupling.optimal_transport(16, condition_weight=1.0)
    start = cheap_of_contexts(standardize=MOVED, standardize_context=CONTEXT)
    rows, aside = (MOVED[:200], CONTEXT[:200]), (MOVED[200:], CONTEXT[200:])
    density, history = fit(
        start, rows[0], context=rows[1], validation=aside, coupling=coupling,
        optimizer=optax.adam(3e-2),
    )  # fmt: skip
    looks = [point.nats for point in history]
    np.testing.assert_allclose(looks, [score(each, *aside) for each in (start, density)], atol=1e-3)
    assert looks[1] < looks[0] - 1
    # The shape of a context is known to what is fitted.
    drawn = jax.eval_shape(lambda key: density.sample(key, context=CONTEXT[:5]), jax.random.key(0))
    assert drawn.shape == (5, 2)
