"""The ODE of a diffusion model, for a Gaussian, whose score is known at all times."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import AT_RUN_TIME

import jaxode
from jaxode.distributions import DiagonalNormal

X = jax.random.normal(jax.random.key(0), (16, 2), jnp.float64) + 1
MEAN, SCALE = jnp.array([0.5, -1.0]), jnp.array([0.8, 1.7])
PATHS = [jaxode.VariancePreserving(), jaxode.VarianceExploding(0.05, 10.0)]
MODELS = [(PATHS[0], "score"), (PATHS[0], "noise"), (PATHS[1], "score")]


@pytest.mark.parametrize(
    ("path", "predicts"), MODELS, ids=lambda x: x if isinstance(x, str) else type(x).__name__
)
def test_the_probability_flow_of_a_gaussian_has_its_density(path, predicts):
    one = jnp.ones(())
    marginal = lambda t: (
        path.mean_scale(t) * MEAN, path.mean_scale(t) ** 2 * SCALE**2 + path.std(t) ** 2
    )  # fmt: skip

    def model(t, z, params):
        mean, variance = marginal(t)
        score = -(z - mean) / variance
        return score if predicts == "score" else -path.std(t) * score

    mean, variance = marginal(one)
    base = DiagonalNormal(mean, 0.5 * jnp.log(variance))
    end = 1e-3
    flow = jaxode.cnf(
        jaxode.probability_flow(model, path, predicts=predicts), base, t0=1.0, t1=end,
        rtol=1e-10, atol=1e-10,
    )  # fmt: skip
    mean, variance = marginal(end * one)
    log_prob = scipy.stats.norm(mean, jnp.sqrt(variance)).logpdf(X).sum(1)
    np.testing.assert_allclose(flow.log_prob(None, X), log_prob, atol=1e-6)
    if predicts == "score":
        z = jax.random.normal(jax.random.key(1), (5, 2))
        samples = flow.from_base(None, base.mean[None] + jnp.exp(base.log_scale)[None] * z)
        expected = np.asarray(mean) + np.sqrt(variance) * np.asarray(z)
        np.testing.assert_allclose(samples, expected, atol=1e-6)


class Score(eqx.Module):
    rate: jax.Array

    def __call__(self, t, z, args):
        return -self.rate * z


@pytest.mark.slow
def test_a_model_of_arrays_is_a_part_of_the_flow():
    """Compiled, bound, and with a gradient."""
    path, base = PATHS[0], jaxode.standard_normal(2)

    def flow(model):
        return jaxode.cnf(jaxode.probability_flow(model, path), base, t0=1.0, t1=1e-3)

    model, of_function = Score(jnp.ones(2)), lambda t, z, args: -z
    expected = flow(of_function).log_prob(None, X)
    density = jaxode.bind(flow(model), None)
    of_density = jax.jit(lambda density, x: density.log_prob(x))
    for found in (jax.jit(flow(model).log_prob)(None, X), of_density(density, X)):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    gradient = eqx.filter_grad(lambda model: flow(model).nll(None, X))(model)
    assert (jnp.abs(gradient.rate) > 1e-3).all()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_path_solves_its_own_equations(path):
    """The mean grows by the drift, and the variance by twice that and the noise."""

    @jax.jit
    def sides(t):
        growth = jax.grad(path.mean_scale)(t) / path.mean_scale(t)
        variance = jax.grad(lambda t: path.std(t) ** 2)(t)
        expected = 2 * path.drift(t) * path.std(t) ** 2 + path.diffusion(t) ** 2
        return growth, path.drift(t), variance, expected

    for t in (0.1, 0.9):
        growth, drift, variance, expected = sides(jnp.asarray(t))
        np.testing.assert_allclose(growth, drift, atol=1e-12)
        np.testing.assert_allclose(variance, expected, rtol=1e-10)


def test_a_path_starts_at_the_data():
    """What the equations leave open."""
    start = jnp.zeros(())
    assert [float(path.mean_scale(start)) for path in PATHS] == [1.0, 1.0]
    assert float(PATHS[0].std(start)) == 0.0
    np.testing.assert_allclose(PATHS[1].std(start), 0.05, rtol=1e-12)


@pytest.mark.parametrize("predicts", ["score", "noise"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_closed_form_of_the_model_is_one_of_the_flow(path, predicts):
    m = jaxode.nn.MLP(2, (8,), key=jax.random.key(2))
    f = jaxode.probability_flow(jaxode.nn.field, path, predicts=predicts)
    t = jnp.asarray(0.3)
    field = lambda z: f(t, z, m)
    trace = lambda z: jnp.trace(jax.jacobian(field)(z))
    all_of = jax.jit(lambda z: (f.value_and_divergence(t, z, m), field(z), trace(z)))
    (dz, div), expected, exact = all_of(X[0])
    np.testing.assert_allclose(dz, expected, rtol=1e-12)
    np.testing.assert_allclose(div, exact, rtol=1e-10)
    assert jaxode.divergence.auto().describe(f, X[0], m) == "closed form"
    own = jaxode.probability_flow(lambda t, z, args: -z, path, predicts=predicts)
    assert own.value_and_divergence(t, X[0], None) is NotImplemented


def test_a_variance_exploding_path_ends_in_its_base():
    base = PATHS[1].base((2, 3))
    assert base.event_shape == (2, 3)
    np.testing.assert_allclose(jnp.exp(base.log_scale), 10.0)


def flow_of(model=lambda t, z, p: -z, **times):
    times = times or {"t0": 1.0, "t1": 1e-3}
    return jaxode.cnf(
        jaxode.probability_flow(model, PATHS[0]), jaxode.standard_normal(2), **times
    )  # fmt: skip


def test_times_that_are_not_known_are_checked_by_the_run():
    run = jax.jit(lambda t0, t1: flow_of(t0=t0, t1=t1).log_prob(None, X))
    np.testing.assert_allclose(run(1.0, 1e-3), flow_of().log_prob(None, X), rtol=1e-10)
    loss = jax.jit(lambda t0, t1: flow_of(t0=t0, t1=t1).nll(None, X))
    assert np.isfinite(loss(1.0, 1e-3))
    for times in ((1e-3, 1.0), (1000.0, 0.0)):
        with pytest.raises(
            AT_RUN_TIME, match=r"a probability flow runs from its noise, the base, at 1"
        ):
            jax.block_until_ready(run(*times))
        assert np.isnan(loss(*times))
