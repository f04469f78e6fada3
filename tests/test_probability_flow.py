"""The ODE of a diffusion model, for a Gaussian, whose score is known at all times."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

import jaxode
from jaxode.distributions import DiagonalNormal

X = jax.random.normal(jax.random.key(0), (16, 2), jnp.float64) + 1
MEAN, SCALE = jnp.array([0.5, -1.0]), jnp.array([0.8, 1.7])
PATHS = [jaxode.VariancePreserving(), jaxode.VarianceExploding(0.05, 10.0)]


@pytest.mark.parametrize("predicts", ["score", "noise"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
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


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_a_path_solves_its_own_equations(path):
    """The mean grows by the drift, and the variance by twice that and the noise."""
    for t in (0.1, 0.9):
        t = jnp.asarray(t)
        growth = jax.grad(path.mean_scale)(t) / path.mean_scale(t)
        np.testing.assert_allclose(growth, path.drift(t), atol=1e-12)
        variance = jax.grad(lambda t: path.std(t) ** 2)(t)
        expected = 2 * path.drift(t) * path.std(t) ** 2 + path.diffusion(t) ** 2
        np.testing.assert_allclose(variance, expected, rtol=1e-10)


def test_a_variance_exploding_path_ends_in_its_base():
    base = PATHS[1].base((2, 3))
    assert base.event_shape == (2, 3)
    np.testing.assert_allclose(jnp.exp(base.log_scale), 10.0)


BAD_MODELS = [
    (
        lambda: jaxode.probability_flow(None, PATHS[0]), TypeError,
        "probability_flow(model=...): must be a function model(t, z, args); got None.",
    ),
    (
        lambda: jaxode.probability_flow(lambda t, z, p: z, 3), TypeError,
        "probability_flow(path=...): must have functions of time drift, diffusion, mean_scale and "
        "std; got 3 without drift, diffusion, mean_scale, std. Use jaxode.VariancePreserving().",
    ),
    (
        lambda: jaxode.probability_flow(lambda t, z, p: z, PATHS[0], predicts="x"), ValueError,
        "probability_flow(predicts=...): must be 'score' or 'noise'; got 'x'.",
    ),
    (
        lambda: jaxode.VariancePreserving(2.0, 1.0), ValueError,
        "VariancePreserving(beta_min=..., beta_max=...): must be at least 0, finite and in rising "
        "order; got 2.0 and 1.0.",
    ),
    (
        lambda: jaxode.VarianceExploding(0.0), ValueError,
        "VarianceExploding(sigma_min=..., sigma_max=...): must be positive, finite and in rising "
        "order; got 0.0 and 50.0.",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_MODELS)
def test_bad_models(call, kind, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message
