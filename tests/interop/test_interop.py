"""Densities as distributions of other libraries, with the libraries themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import optional, trained, with_slow

import jaxode

KEY = jax.random.key(0)
PARAMS = trained()
FLOW = jaxode.cnf(jaxode.nn.field, jaxode.standard_normal(2), rtol=1e-9, atol=1e-9)
DATA = np.random.default_rng(0).normal([5.0, -1.0], [3.0, 0.1], (40, 2))
BOX = (np.array([-200.0, -90.0]), np.array([200.0, 90.0]))
LOG_PROB = jax.jit(lambda density, x: density.log_prob(x))


@pytest.fixture
def numpyro():
    return optional("numpyro")


@pytest.mark.parametrize(
    ("given", "support"),
    [
        pytest.param(DATA, None, marks=pytest.mark.slow),
        (DATA, BOX), (DATA, (-jnp.inf, 60.0)), (DATA, (-90.0, jnp.inf)),
        pytest.param(jaxode.standardize.normal(DATA), BOX, marks=pytest.mark.slow),
        (jaxode.standardize.whiten(DATA), None),
    ],
    ids=["no support", "box", "below", "above", "normal", "whiten"],
)  # fmt: skip
def test_numpyro_has_the_same_density(numpyro, given, support):
    density = jaxode.bind(FLOW, PARAMS, standardize=given, support=support)
    theirs = jaxode.interop.numpyro(density)
    assert theirs.event_shape == (2,)
    np.testing.assert_array_equal(theirs.log_prob(DATA[:3]), density.log_prob(DATA[:3]))
    np.testing.assert_array_equal(theirs.sample(KEY, (3,)), density.sample(KEY, (3,)))
    assert theirs.expand([3]).sample(KEY).shape == (3, 2)
    assert theirs.support(DATA).all()
    # It is a pytree, as numpyro's own.
    values = LOG_PROB(theirs, DATA[:3])
    np.testing.assert_allclose(values, density.log_prob(DATA[:3]), rtol=1e-12)
    to_support = numpyro.distributions.biject_to(theirs.support)
    assert theirs.support(to_support(jnp.ones(2)))


@pytest.mark.slow
def test_numpyro_takes_it_as_a_prior_and_in_a_plate(numpyro, default_settings):
    """A field of zero has the base density: a normal, of which the posterior is known."""
    dist = numpyro.distributions
    flow = jaxode.cnf(lambda t, z, a: a * z, jaxode.standard_normal(2))
    prior = jaxode.interop.numpyro(jaxode.bind(flow, 0.0, standardize=(1.0, 2.0)))
    seen = jnp.array([[3.0, -1.0], [5.0, 1.0]])

    def model():
        x = numpyro.sample("x", prior)
        with numpyro.plate("rows", 2):
            z = numpyro.sample("z", prior)
            numpyro.sample("seen", dist.Normal(x + 0 * z, 1.0).to_event(1), obs=seen)

    kernel = numpyro.infer.NUTS(model)
    mcmc = numpyro.infer.MCMC(kernel, num_warmup=200, num_samples=500, progress_bar=False)
    mcmc.run(jax.random.key(0))
    samples = mcmc.get_samples()
    # Precisions: 1/4 of the prior, and 1 of each of two rows; five standard errors of 500 samples.
    mean, deviation = (0.25 * 1 + seen.sum(0)) / 2.25, 1 / 1.5
    np.testing.assert_allclose(samples["x"].mean(0), mean, atol=5 * deviation / 500**0.5)
    np.testing.assert_allclose(samples["x"].std(0), deviation, rtol=0.2)
    np.testing.assert_allclose(samples["z"].mean((0, 1)), 1.0, atol=0.5)


MIXED = (np.array([0.0, -np.inf]), np.array([1.0, 1.0]))


@pytest.mark.slow
def test_numpyro_gets_the_support_whatever_its_kind(numpyro):
    """Its transform of the real numbers, in a jitted function that takes the density."""
    density = jaxode.bind(FLOW, PARAMS, support=MIXED)

    @jax.jit
    def look(density, u):
        theirs = jaxode.interop.numpyro(density)
        transform = numpyro.distributions.biject_to(theirs.support)
        x = transform(u)
        det = transform.log_abs_det_jacobian(u, x)
        return theirs.log_prob(x), theirs.support(x), theirs.support(-x), det, transform.inv(x)

    u = jnp.array([[0.3, -2.0], [1.0, 4.0]])
    log_prob, inside, outside, det, back = look(density, u)
    assert inside.all()
    assert not outside.any()
    np.testing.assert_allclose(back, u, rtol=1e-9)
    x, jacobian = density.support.forward(u[0])[0], jax.jacobian(density.support.forward)(u[0])[0]
    np.testing.assert_allclose(det[0], np.linalg.slogdet(jacobian)[1], rtol=1e-9)
    np.testing.assert_allclose(log_prob[0], density.log_prob(x), rtol=1e-9)
    theirs = jaxode.interop.numpyro(density)
    x, intermediates = theirs.sample_with_intermediates(KEY, (3,))
    np.testing.assert_allclose(theirs.log_prob(x, intermediates), density.log_prob(x), rtol=1e-6)


def test_a_bound_that_numpyro_includes_has_density_zero(numpyro):
    constraints = numpyro.distributions.constraints
    for constraint in (constraints.interval(0.0, 1.0), constraints.unit_interval):
        density = jaxode.bind(FLOW, PARAMS, support=constraint)
        log_prob = density.log_prob(jnp.array([[0.5, 0.5], [0.0, 0.5], [0.5, 1.0]]))
        assert np.isfinite(log_prob[0])
        np.testing.assert_array_equal(log_prob[1:], -np.inf)
    with pytest.raises(ValueError, match=r"support=...\): the data must lie strictly inside"):
        jaxode.bind(FLOW, PARAMS, standardize=np.eye(2), support=constraints.nonnegative)
    for constraint in (constraints.simplex, constraints.nonnegative_integer):
        with pytest.raises(
            ValueError, match=r"support=...\): must be a constraint with a bijection"
        ):
            jaxode.bind(FLOW, PARAMS, support=constraint)


@pytest.mark.slow
def test_constraints_of_numpyro_are_supports(numpyro):
    constraints = numpyro.distributions.constraints
    for constraint, bounds in (
        (constraints.positive, (0.0, np.inf)),
        (constraints.interval(-200.0, 200.0), (-200.0, 200.0)),
        (constraints.real, (-np.inf, np.inf)),
    ):
        ours, theirs = (jaxode.bind(FLOW, PARAMS, support=s) for s in (bounds, constraint))
        x = ours.sample(KEY, (5,))
        np.testing.assert_allclose(theirs.sample(KEY, (5,)), x, rtol=1e-9)
        np.testing.assert_allclose(theirs.log_prob(x), ours.log_prob(x), rtol=1e-7)
    x = jnp.ones((5, 2)).at[1].set(-1.0)
    log_prob = jaxode.bind(FLOW, PARAMS, support=constraints.positive).log_prob(x)
    assert np.isfinite(log_prob[0])
    assert log_prob[1] == -np.inf


def test_a_bijector_of_distrax_is_a_support():
    distrax = optional("distrax")
    ours = jaxode.bind(FLOW, PARAMS, support=(0.0, np.inf))
    exp = distrax.Lambda(
        forward=jnp.exp,
        inverse=jnp.log,
        forward_log_det_jacobian=lambda u: u,
        inverse_log_det_jacobian=lambda x: -jnp.log(x),
        event_ndims_in=0,
    )
    theirs = jaxode.bind(FLOW, PARAMS, support=exp)
    logit = [jaxode.bind(FLOW, PARAMS, support=s) for s in ((0.0, 1.0), distrax.Sigmoid())]
    inside = np.array([0.3, 0.9])
    np.testing.assert_allclose(*(density.log_prob(inside) for density in logit), rtol=1e-9)
    x = ours.sample(KEY, (5,))
    np.testing.assert_allclose(theirs.sample(KEY, (5,)), x, rtol=1e-9)
    np.testing.assert_allclose(theirs.log_prob(x), ours.log_prob(x), rtol=1e-9)
    assert theirs.log_prob(-x[0]) == -np.inf


@pytest.mark.parametrize(
    "given",
    [pytest.param(DATA, marks=pytest.mark.slow), jaxode.standardize.normal(DATA)],
    ids=["data", "normal"],
)
def test_flowjax_has_the_same_density(given):
    optional("flowjax")
    density = jaxode.bind(FLOW, PARAMS, standardize=given)
    theirs = jaxode.interop.flowjax(density)
    assert theirs.shape == (2,)
    assert theirs.cond_shape is None
    np.testing.assert_allclose(theirs.log_prob(DATA[:3]), density.log_prob(DATA[:3]), rtol=1e-9)
    x, log_prob = theirs.sample_and_log_prob(KEY, (4,))
    np.testing.assert_allclose(density.log_prob(x), log_prob, rtol=1e-6)
    np.testing.assert_allclose(theirs.sample(KEY, (4,)), x, rtol=1e-6)


def test_flowjax_passes_a_condition():
    optional("flowjax")
    contexts = np.random.default_rng(1).normal(10.0, 4.0, (40, 3))
    density = jaxode.bind(FLOW, trained(3), standardize=DATA, standardize_context=contexts)
    theirs = jaxode.interop.flowjax(density)
    assert theirs.cond_shape == (3,)
    np.testing.assert_allclose(
        theirs.log_prob(DATA[:3], contexts[:3]), density.log_prob(DATA[:3], context=contexts[:3]),
        rtol=1e-9,
    )  # fmt: skip


@pytest.mark.slow
def test_a_bijector_of_distrax_is_not_trained():
    distrax = optional("distrax")
    density = jaxode.bind(FLOW, PARAMS, support=distrax.ScalarAffine(0.0, 10.0))
    loss = lambda density: density.log_prob(jnp.array([[3.0, 4.0]])).sum()
    gradient = jax.jit(jax.grad(loss))(density)
    assert jax.tree.leaves(gradient.support)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient.support))


@pytest.mark.parametrize("library", ["numpyro", "flowjax"])
def test_other_libraries_get_no_density_of_centred_particles(library):
    flow = jaxode.cnf(lambda t, z, a: a * z, jaxode.centered_normal(4, 2))
    message = rf"interop.{library}\(density=...\): .* a shift does not change"
    with pytest.raises(ValueError, match=message):
        getattr(jaxode.interop, library)(jaxode.bind(flow, 0.0))


def test_numpyro_has_one_context_for_any_number_of_samples(numpyro):
    """Also for as many samples as the context has rows."""
    f = lambda t, z, args: 0 * z + jnp.mean(args[1])
    density = jaxode.bind(jaxode.cnf(f, jaxode.standard_normal(2)), None)
    given = jaxode.interop.numpyro(density, jnp.arange(12.0).reshape(4, 3))
    for count in (4, 5):
        log_prob = given.log_prob(jnp.full((count, 2), 5.5))
        np.testing.assert_allclose(log_prob, -np.log(2 * np.pi), rtol=1e-5)


BOUNDED = {
    "uniform": (lambda dist: dist.Uniform(-1.0, jnp.ones(2)).to_event(1), [0.5, -0.5], [3.0, 0.5]),
    "exponential": (lambda dist: dist.Exponential(jnp.ones(2)).to_event(1), [0.5, 2.0], [0.5, -1]),
    "gamma": (lambda dist: dist.Gamma(2 * jnp.ones(2)).to_event(1), [0.5, 2.0], [-0.5, 1.0]),
    "normal": (lambda dist: dist.Normal(0.0, jnp.ones(2)).to_event(1), [0.5, 2.0], None),
}


@pytest.mark.parametrize("name", with_slow(BOUNDED, ["uniform", "gamma", "normal"]))
def test_a_base_of_numpyro_is_zero_outside_of_its_support(name, numpyro, default_settings):
    """Also in a program, where numpyro checks nothing; with its gradient."""
    make, inside, outside = BOUNDED[name]
    base = make(numpyro.distributions)
    flow = jaxode.cnf(lambda t, z, a: a * z, base, batch="per_sample", throw=False)
    density = jaxode.bind(flow, 0.0)
    z = jnp.array([inside, outside or inside, [jnp.nan, 1.0]])
    for log_prob in (density.log_prob(z), density.flow.log_prob(0.0, z)):
        np.testing.assert_allclose(log_prob[0], base.log_prob(z[0]), rtol=1e-5)
        assert outside is None or log_prob[1] == -jnp.inf
        assert jnp.isnan(log_prob[2])
    slope = jax.grad(lambda z: flow.base.log_prob(z).sum())
    assert jnp.isfinite(slope(z[:2])).all()
    np.testing.assert_allclose(slope(z[:1])[0], jax.grad(base.log_prob)(z[0]), rtol=1e-5)
    loss = lambda: density.reverse_kl_loss(lambda x: -jnp.sum(x**2), 4, key=jax.random.key(0))
    assert (flow.base is base) == (outside is None)
    if outside is None:
        assert jnp.isfinite(loss())
    else:
        with pytest.raises(ValueError, match="nowhere zero"):
            loss()


@pytest.mark.slow
def test_a_base_of_numpyro_whose_support_is_wider_than_it_says_is_left_alone(
    numpyro, default_settings
):
    """On a circle, and where numpyro takes the range of a transform."""
    dist = numpyro.distributions
    turn = lambda base: jaxode.cnf(lambda t, z, p: p + 0 * z, base).log_prob(
        1.0, jnp.full((1, 1), -3.0)
    )
    circle = dist.VonMises(0.0, jnp.full(1, 2.0)).to_event(1)
    np.testing.assert_allclose(turn(circle), circle.log_prob(jnp.full(1, 2 * np.pi - 4)), rtol=1e-5)
    flip = dist.transforms.AffineTransform(0.0, -jnp.ones(1), domain=dist.constraints.positive)
    mirrored = dist.TransformedDistribution(dist.Exponential(jnp.ones(1)).to_event(1), flip)
    np.testing.assert_allclose(turn(mirrored), -4.0, rtol=1e-5)


def test_flowjax_needs_the_shape_of_a_context():
    optional("flowjax")
    mean = lambda t, y, args: -y * args[1].mean()
    density = jaxode.bind(jaxode.cnf(mean, jaxode.standard_normal(2)), 0.0)
    theirs = jaxode.interop.flowjax(density)
    with pytest.raises(ValueError, match="Pass context_shape= to bind"):
        theirs.log_prob(jnp.ones((3, 2)), jnp.ones((3, 1)))
