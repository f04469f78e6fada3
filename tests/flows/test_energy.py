"""The reverse Kullback-Leibler loss and its path gradient, against their definitions."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from helpers import (
    KINDS,
    METHODS,
    assert_close,
    gradient,
    of_feature,
    temporary_bytes,
    trained,
    typed,
)
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import jaxode
from jaxode import divergence
from jaxode.nn import field

TIGHT = {"rtol": 1e-9, "atol": 1e-9}
KEY = jax.random.key(7)
A = jnp.array([[0.3, 1.0], [-0.5, -0.2]])


def linear(t, z, A):
    return A @ z


def double_well(x):
    return -((x[0] ** 2 - 2) ** 2) / 4 - 2 * (x[1] - x[0] / 2) ** 2


def flow_of(**options):
    return jaxode.cnf(field, jaxode.standard_normal(2), **{**TIGHT, **options})


FLOWS = {
    "joint": ({}, 0),
    "per_sample, context": ({"batch": "per_sample", "divergence": divergence.exact()}, 1),
    "backwards, hutchinson": ({"t0": 1.0, "t1": -0.5, "divergence": divergence.hutchinson(2)}, 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FLOWS)
def test_path_gradient_is_the_scores_carried_back_along_the_samples(name):
    """`(dx/dparams)^T (grad log q(x) - grad log p(x)) / n`, with `grad log q` by autodiff.

    The target with a context takes its rows.
    """
    options, context_size = FLOWS[name]
    flow, m, n = flow_of(**options), trained(context_size), 5
    context = jax.random.normal(jax.random.key(1), (n, 1)) if context_size else None
    target = double_well if context is None else lambda x, row: row[0] * double_well(x)
    log_p = lambda x: jax.vmap(target)(*([x] if context is None else [x, context]))
    if "t0" in options:
        # The probe of a sample is drawn by `log_prob` with the same key.
        probe_key = jax.random.split(KEY)[1]
        log_q = lambda x: flow.log_prob(m, x, key=probe_key, context=context)
    else:
        log_q = lambda x: flow.log_prob(m, x, context=context)
    sample = lambda m: flow.sample_and_log_prob(m, KEY, n, context=context)[0]
    loss = lambda m: flow.reverse_kl_loss(m, target, n, key=KEY, context=context)

    @jax.jit
    def both(m):
        x, pull = jax.vjp(sample, m)
        of_samples = lambda x: jnp.mean(log_q(x) - log_p(x))
        expected, score = jax.value_and_grad(of_samples)(x)
        return jax.value_and_grad(loss)(m), (expected, pull(score)[0])

    (value, actual), (expected, gradient) = both(m)
    # Two solves in opposite directions, at tolerances of 1e-9.
    assert_close(actual, gradient, rtol=1e-6)
    np.testing.assert_allclose(value, expected, rtol=1e-7)


@pytest.mark.slow
def test_plain_loss_is_that_of_sample_and_log_prob():
    flow, m = flow_of(), trained()

    def expected(m):
        x, log_q = flow.sample_and_log_prob(m, KEY, 5)
        return jnp.mean(log_q - jax.vmap(double_well)(x))

    loss = lambda m: flow.reverse_kl_loss(m, double_well, 5, key=KEY, path=False)
    found, wanted = (jax.jit(jax.value_and_grad(f))(m) for f in (loss, expected))
    assert_close(found, wanted, rtol=1e-13)


@pytest.mark.parametrize("path", [True, False])
def test_a_second_derivative_raises(path):
    """It would lack that of the target's slope, and of the score."""

    def gradient(a, adjoint):
        flow = jaxode.cnf(lambda t, z, a: a * z, jaxode.standard_normal(2), adjoint=adjoint)
        loss = lambda a: flow.reverse_kl_loss(a, double_well, 3, key=KEY, path=path)
        return jax.grad(loss)(a)

    for twice, name in ((jax.jacfwd, "discrete"), (jax.grad, "backsolve")):
        with pytest.raises(RuntimeError, match="reverse_kl_loss: has first derivatives only"):
            twice(gradient)(0.3, METHODS[name].adjoint)


def gradients(flow, target, path, count, n):
    """Of independent losses, one by one."""
    loss = lambda A, key: flow.reverse_kl_loss(A, target, n, key=key, path=path)
    each = jax.jit(lambda keys: jax.lax.map(lambda key: jax.grad(loss)(A, key), keys))
    return each(jax.random.split(jax.random.key(0), count))


@pytest.mark.slow
@pytest.mark.parametrize("batch", ["joint", "per_sample"])
def test_path_gradient_has_no_noise_where_the_flow_is_the_target(batch):
    """`dz/dt = A z` carries `N(0, I)` to `N(0, E E^T)` with `E = expm(A)`."""
    flow = jaxode.cnf(linear, jaxode.standard_normal(2), batch=batch, **TIGHT)
    E = scipy.linalg.expm(np.asarray(A))
    precision = jnp.asarray(np.linalg.inv(E @ E.T))
    target = lambda x: -0.5 * x @ precision @ x
    path, plain = (gradients(flow, target, path, 16, 4).std(axis=0) for path in (True, False))
    assert (plain > 0.1).all()
    assert (path < 1e-3 * plain).all()


@pytest.mark.parametrize(
    ("path", "estimator"), [(True, divergence.hutchinson()), (False, divergence.exact())]
)
def test_gradient_is_that_of_the_divergence_on_average(path, estimator):
    """With the closed form between two normals. Hutchinson's noise does not bias it."""
    flow = jaxode.cnf(linear, jaxode.standard_normal(2), divergence=estimator, steps=8)
    mean, precision = jnp.array([1.0, -0.5]), jnp.array([[2.0, 0.3], [0.3, 0.5]])
    target = lambda x: -0.5 * (x - mean) @ precision @ (x - mean)
    # Of -tr A + tr(precision E E^T) / 2: the adjoint of the derivative of an exponential at a
    # matrix is that derivative at its transpose.
    weighted = np.asarray(precision) @ scipy.linalg.expm(np.asarray(A))
    by_exponential = scipy.linalg.expm_frechet(np.asarray(A).T, weighted, compute_expm=False)
    exact = by_exponential - np.eye(2)
    found = gradients(flow, target, path, 64, 64)
    error = found.std(axis=0) / 8
    # Eight steps of fifth order are exact to 1e-6.
    assert (jnp.abs(found.mean(axis=0) - exact) < 4 * error + 1e-5).all()
    assert (error < 0.1).all()


def path_loss(**options):
    flow = jaxode.cnf(linear, jaxode.standard_normal(2), **{**TIGHT, **options})
    return lambda A: flow.reverse_kl_loss(A, double_well, 4, key=KEY)


@functools.cache
def path_gradient():
    return jax.jit(jax.grad(path_loss()))(A)


# Of the discrete adjoint there are other tests.
@pytest.mark.parametrize("name", of_feature(KINDS, slow=["discrete", "forward"]))
def test_every_gradient_method_has_the_path_gradient(name):
    options = METHODS[name].options(steps=40) if METHODS[name].exact else METHODS[name].options()
    found = jax.jit(gradient(name)(path_loss(**options)))(A)
    np.testing.assert_allclose(found, path_gradient(), rtol=1e-5)


class Cube:
    """A uniform density, which jumps at its edge."""

    event_shape = (2,)

    def log_prob(self, z):
        inside = (jnp.abs(z) <= 1).all(-1)
        return jnp.where(inside, -2 * jnp.log(2.0), -jnp.inf)

    def sample(self, key, shape):
        return jax.random.uniform(key, (*shape, 2), minval=-1.0, maxval=1.0)


def test_no_path_gradient_with_a_base_that_jumps():
    """The loss is `-2 p + exp(2 p) / 3`, up to a constant; the path would leave out the first."""
    flow = jaxode.cnf(lambda t, z, p: p * z, Cube())
    loss = lambda p, **options: flow.reverse_kl_loss(
        p, lambda x: -0.5 * jnp.sum(x**2), 4096, key=KEY, **options
    )
    with pytest.raises(ValueError, match=r"reverse_kl_loss\(path=...\): needs a base that is now"):
        loss(0.0)
    with pytest.raises(ValueError, match="needs a base that is nowhere zero"):
        jax.jit(jax.grad(loss))(0.0)
    slope = jax.jit(jax.grad(lambda p: loss(p, path=False)))(0.0)
    np.testing.assert_allclose(slope, -4 / 3, atol=0.05)


@pytest.mark.slow
def test_samples_in_half_precision_have_a_path_gradient():
    """Of the mean of `log q + x^2` for `q` of scale `exp(p)`: `2 exp(2 p) - 1` a dimension."""

    class Half(Cube):
        log_prob = lambda self, z: jaxode.standard_normal(2).log_prob(z)
        sample = lambda self, key, shape: jax.random.normal(key, (*shape, 2), jnp.float16)

    flow = jaxode.cnf(lambda t, z, p: p.astype(z.dtype) * z, Half())
    loss = lambda p: flow.reverse_kl_loss(p, lambda x: -jnp.sum(x**2), 4096, key=KEY)
    slope = jax.jit(jax.grad(loss))(jnp.float32(0.1))
    np.testing.assert_allclose(slope, 2 * (-1 + 2 * np.exp(0.2)), rtol=0.05)


def test_base_and_target_have_gradients():
    """A learned base by its samples, and what the target closes over."""
    still = lambda t, z, args: 0 * z
    base = jaxode.diagonal_normal(2)

    def loss(base, width):
        target = lambda x: -0.5 * jnp.sum((x / width) ** 2)
        return jaxode.cnf(still, base).reverse_kl_loss(None, target, 4, key=KEY)

    z = base.sample(jax.random.split(KEY)[0], (4,))
    of_base, of_width = jax.jit(jax.grad(loss, (0, 1)))(base, 2.0)
    along = -z + z / 4  # grad log q - grad log p
    np.testing.assert_allclose(of_base.mean, along.mean(0), rtol=1e-12)
    np.testing.assert_allclose(of_base.log_scale, (along * z).mean(0), rtol=1e-12)
    np.testing.assert_allclose(of_width, -(z**2).sum(1).mean() / 8, rtol=1e-12)


def nan_above(x):
    return jnp.where(x[0] > 0, jnp.nan, -jnp.sum(x**2))


def steep_below(x):
    """Minus infinity times zero in the derivative, not in the value."""
    return -jnp.sqrt(jnp.maximum(x[0], 0.0))


NAN = "must be finite at the samples of the flow; got NaN or inf in {} of 6 "
STEEP = "must have a finite gradient at .*; got NaN or inf in {} of 6 "


@pytest.mark.parametrize(
    ("batch", "target", "message"),
    [
        pytest.param("joint", nan_above, NAN, marks=pytest.mark.slow),
        ("per_sample", steep_below, STEEP),
    ],
)
def test_a_target_that_is_not_finite_is_named(batch, target, message):
    flow = flow_of(batch=batch, steps=2)
    m = jax.tree.map(jnp.zeros_like, trained())
    z = flow.sample(m, KEY, 6)
    count = int((z[:, 0] > 0).sum()) if target is nan_above else int((z[:, 0] < 0).sum())
    assert 0 < count < 6
    loss = lambda flow, m: flow.reverse_kl_loss(m, target, 6, key=KEY)
    where = r"reverse_kl_loss\(log_density=...\): "
    with pytest.raises(jaxode.SolveError, match=where + message.format(count)):
        loss(flow, m)
    for leaf in jax.tree.leaves(jax.jit(jax.value_and_grad(lambda m: loss(flow, m)))(m)):
        assert jnp.isnan(leaf).all()
    raising = flow_of(batch=batch, steps=2, throw=True)
    with pytest.raises(jax.errors.JaxRuntimeError, match=message.format(count)):
        jax.block_until_ready(jax.jit(lambda m: loss(raising, m))(m))


def test_a_failed_solve_is_named_and_not_the_target():
    flow = flow_of(max_steps=2)
    with pytest.raises(jaxode.SolveError, match="the steps ran out"):
        flow.reverse_kl_loss(trained(), double_well, 4, key=KEY)


@typed
@pytest.mark.slow
def test_devices_share_a_batch():
    """With a key for each device, the gradient is the mean of theirs."""
    flow, m = flow_of(steps=4), trained()
    joint = flow_of(axis_name="i")
    keys = jax.random.split(KEY, 2)
    mesh = Mesh(np.array(jax.devices()[:2]), ("i",))

    def sharded(flow):
        def mean(m, keys):
            loss = flow.reverse_kl_loss(m, double_well, 3, key=keys[0])
            return jax.lax.pmean(loss, "i")

        loss = jax.shard_map(mean, mesh=mesh, in_specs=(P(), P("i")), out_specs=P())
        return jax.jit(jax.value_and_grad(loss))(m, keys)

    each = [
        jax.value_and_grad(lambda m, key=key: flow.reverse_kl_loss(m, double_well, 3, key=key))(m)
        for key in keys
    ]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *each)
    assert_close(sharded(flow), mean, rtol=1e-12)
    # Four steps of fifth order against error control.
    assert_close(sharded(joint)[0], mean[0], rtol=1e-3)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_steps():
    adjoint = jaxode.DiscreteAdjoint(checkpoints=4)
    m = trained()

    def bytes_of(steps):
        flow = flow_of(steps=steps, adjoint=adjoint)
        return temporary_bytes(lambda m: flow.reverse_kl_loss(m, double_well, 64, key=KEY), m)

    # Two numbers for each step beside 4 states of 64 rows.
    assert bytes_of(512) < 1.3 * bytes_of(16)


def test_the_path_gradient_by_an_end_time_is_zero_where_the_flow_is_the_target():
    a = 0.5
    target = lambda x: -0.5 * jnp.sum(x**2) * jnp.exp(-2 * a)  # what the flow has at one

    @jax.jit
    @jax.grad
    def slope(t1):
        base, tight = jaxode.standard_normal(2), {"rtol": 1e-8, "atol": 1e-8}
        flow = jaxode.cnf(lambda t, z, a: a * z, base, t1=t1, **tight)
        return flow.reverse_kl_loss(a, target, 4, key=KEY)

    np.testing.assert_allclose(slope(1.0), 0, atol=1e-6)


def test_a_stiff_solver_sees_the_whole_jacobian():
    """With a part of it, log-densities have order two and not five."""
    flow = flow_of(solver=jaxode.Rodas5P(), steps=8)
    loss = lambda path: flow.reverse_kl_loss(trained(), double_well, 4, key=KEY, path=path)
    np.testing.assert_allclose(loss(True), loss(False), rtol=1e-12)


def test_a_base_that_is_no_number_somewhere_has_no_path_gradient():
    class Exponential:
        event_shape = (1,)

        def log_prob(self, z):
            return jnp.sum(-z + 0 * jnp.log(z), axis=-1)

        def sample(self, key, sample_shape):
            return jax.random.exponential(key, (*sample_shape, 1))

    flow = jaxode.cnf(lambda t, z, a: a + 0 * z, Exponential())
    with pytest.raises(ValueError, match="nowhere zero"):
        flow.reverse_kl_loss(0.0, lambda x: -jnp.sum(x**2), 4, key=KEY)
