"""Networks: shapes, size at the start, and the closed form of their divergence."""

from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import with_slow

import jaxode
from jaxode import divergence, nn


def residual(event, widths, **options):
    """With as many blocks as others have hidden layers."""
    return nn.Residual(event, widths[0], len(widths), **options)


def particles(event, widths, **options):
    """Three in the plane, which have six coordinates."""
    n = np.prod(event, dtype=int) // 2
    return nn.Particles(n, 2, 5, 3.0, *widths, **options)


def pairs_of_particles(event, widths, **options):
    return particles(event, widths, many_body=False, **options)


def odd_lattice(event, widths, **options):
    return nn.Lattice((2, 3), 3, modes=4, width=widths[0], **options)


def any_lattice(event, widths, **options):
    return odd_lattice(event, widths, odd=False, isotropic=False, **options)


SYMMETRIC = (particles, pairs_of_particles, odd_lattice, any_lattice)
T, Y = jnp.array(0.3), jnp.linspace(-1.0, 1.5, 6)
CONTEXT = jnp.array([0.4, -1.1])

# Networks with a closed form of their divergence. A new one is one row.
CLOSED_FORM = {
    f"{make.__name__}, {len(widths)} hidden": (make, widths)
    for make in (nn.MLP, nn.Concat, nn.ConcatSquash)
    for widths in ((), (7,), (7, 9))
} | {
    "PotentialGradient, 1 hidden": (nn.PotentialGradient, (7,)),
    "Particles": (particles, (7,)),
    "Particles, pairs": (pairs_of_particles, (7,)),
    "Lattice, odd": (odd_lattice, (7,)),
    "Lattice": (any_lattice, (7,)),
}
# With a rule of its own, and without.
ACTIVATIONS = {"nn.softplus": nn.softplus, "gelu": jax.nn.gelu}


def network(make, widths, activation=jnp.tanh, event=6, **options):
    """With larger output weights than at the start, and times that matter in every layer."""
    m = make(event, widths, key=jax.random.key(0), activation=activation, **options)
    m = jax.tree.map(lambda x: 2 * x + 0.1, m)
    if make in SYMMETRIC:
        return m
    last = lambda m: (m.last if make is residual else m).weight
    return eqx.tree_at(last, m, 5 * last(m))


def close(actual, expected, rtol):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=0))


def check_closed_form(m, *context):
    def exact(m, t, y):
        return divergence.exact().apply(lambda y: m(t, y, *context), y, None)

    def closed(m, t, y):
        return m.value_and_divergence(t, y, *context)

    def with_gradient(f):
        def scalar(*inputs):
            dz, div = f(*inputs)
            return div + jnp.sum(jnp.sin(dz)), (dz, div)

        return jax.value_and_grad(scalar, (0, 1, 2), has_aux=True)

    both = jax.jit(lambda *inputs: [with_gradient(f)(*inputs) for f in (closed, exact)])
    close(*both(m, T, Y), 1e-12)


# Of both networks there is a deeper one, and of MLP one without hidden layers.
SHALLOW = ["MLP, 1 hidden", "Concat, 0 hidden", "Concat, 1 hidden"]


@pytest.mark.parametrize("name", [name for name in CLOSED_FORM if name not in SHALLOW])
def test_closed_form_equals_the_exact_divergence(name):
    check_closed_form(network(*CLOSED_FORM[name], context_size=2), CONTEXT)


def test_closed_form_without_a_context():
    """With the time in the output, too. `ConcatSquash` is tested so with any activation."""
    check_closed_form(network(*CLOSED_FORM["Concat, 2 hidden"]))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_closed_form_with_any_activation(activation):
    check_closed_form(network(nn.ConcatSquash, (7, 9), ACTIVATIONS[activation]))


def test_the_parameters_product_is_formed_once_for_a_batch():
    """Under `vmap` nothing but one more product of `[batch, hidden]` with a matrix is added."""
    m = network(nn.ConcatSquash, (7, 9))
    y = jnp.ones((5, 6))

    def products(f):
        jaxpr = jax.make_jaxpr(jax.vmap(f, (None, 0)))(T, y)
        return [e.outvars[0].aval.shape for e in jaxpr.eqns if e.primitive.name == "dot_general"]

    plain, closed = products(m), products(m.value_and_divergence)
    assert plain == [(7, 5), (9, 5), (6, 5)]
    extra = list(closed)
    for shape in plain:
        extra.remove(shape)
    # W1 W3, then M s1, then the inner product with s2.
    assert extra == [(7, 9), (9, 5), (5,)]


@pytest.mark.parametrize("make", [nn.MLP, nn.Concat, nn.ConcatSquash, nn.PotentialGradient])
def test_deeper_networks_offer_no_closed_form(make):
    m = make(6, (4, 4, 4), key=jax.random.key(0))
    assert m.value_and_divergence(T, Y) is NotImplemented
    assert nn.field.value_and_divergence(T, Y, m) is NotImplemented
    assert nn.field.value_and_divergence(T, Y, lambda t, y: y) is NotImplemented
    with pytest.raises(ValueError, match="offers no value_and_divergence"):
        jaxode.cnf(
            nn.field, jaxode.standard_normal(6), divergence=divergence.closed_form()
        ).log_prob(m, Y[None])


# A scalar, and many numbers, are harder than what is between them. `Concat` starts as `MLP` does.
ENDS = [(make, event) for make in (nn.ConcatSquash, residual) for event in ((), 64)]
ENDS += [(nn.MLP, 64), (nn.PotentialGradient, 64)]


@pytest.mark.parametrize(
    ("make", "event"), with_slow(ENDS, [(nn.ConcatSquash, 64), (residual, ()), (nn.MLP, 64)]),
    ids=lambda value: getattr(value, "__name__", str(value)),
)  # fmt: skip
def test_a_fresh_flow_is_close_to_the_identity(make, event):
    m = make(event, (64, 64), key=jax.random.key(0))
    flow = jaxode.cnf(nn.field, jaxode.standard_normal(event), rtol=1e-8, atol=1e-8)
    x = flow.base.sample(jax.random.key(1), (20,))
    z = flow.to_base(m, x)
    assert z.shape == x.shape
    moved = jnp.sqrt(jnp.mean((z - x) ** 2))
    assert 1e-4 < moved < 0.15


LAYERED = (nn.MLP, nn.Concat, nn.ConcatSquash)


@pytest.mark.parametrize(
    ("make", "widths"),
    [(make, (8,)) for make in (*LAYERED, nn.PotentialGradient, residual, *SYMMETRIC)]
    + [(make, ()) for make in LAYERED],
)
def test_fields_depend_on_the_time_and_the_context(make, widths):
    m = network(make, widths, context_size=2)
    run = jax.jit(lambda t, context: m(t, Y, context))
    base = np.asarray(run(T, CONTEXT))
    assert np.abs(run(T + 1, CONTEXT) - base).max() > 1e-2
    assert np.abs(run(T, CONTEXT + 1) - base).max() > 1e-2
    with pytest.raises(ValueError, match=r"context_size=2.*got shape None"):
        m(T, Y)
    with pytest.raises(ValueError, match=r"context_size=2.*got shape \(3,\)"):
        m(T, Y, jnp.ones(3))


@pytest.mark.parametrize("context", [None, CONTEXT], ids=["no context", "context"])
def test_the_residual_network_is_that_of_its_docstring(context):
    size = 0 if context is None else 2
    m = network(residual, (8, 8), event=(2, 3), context_size=size)
    dense = lambda layer, x: np.asarray(layer.weight) @ x + np.asarray(layer.bias)
    angles = np.pi * float(T) * np.array([1, 2, 3, 4])
    e = np.concatenate([np.sin(angles), np.cos(angles)])
    if size:
        inner, outer = m.encoder
        e = np.concatenate([e, dense(outer, np.tanh(dense(inner, np.asarray(context))))])
    h = dense(m.first, np.asarray(Y))
    for block, modulation in zip(m.blocks, m.modulation, strict=True):
        a, b = np.split(dense(modulation, e), 2)
        h = h + dense(block, np.tanh((1 + a) * h + b))
    last = dense(m.last, 20 * np.tanh(np.tanh(h) / 20))
    expected = last + dense(m.scale, e) * np.asarray(Y)
    np.testing.assert_allclose(m(T, Y.reshape(2, 3), context), expected.reshape(2, 3), rtol=1e-12)


@pytest.mark.slow
def test_a_residual_network_of_large_weights_has_finite_densities_far_from_the_data():
    """As after long training. Without a bound, all of these samples overflow on their way."""
    m = network(residual, (16, 16, 16), jax.nn.silu, event=2)
    m = jax.tree.map(lambda leaf: 8 * leaf, m)
    x = 30 * jax.random.normal(jax.random.key(1), (20, 2))
    log_prob = jaxode.bind(jaxode.cnf(nn.field, jaxode.standard_normal(2)), m).log_prob(x)
    assert np.isfinite(log_prob).all()


@pytest.mark.slow
def test_the_residual_network_is_smooth():
    """In the state, the time and the context, twice."""
    m = network(residual, (8, 8), jax.nn.silu, context_size=2)
    at = (T, Y, CONTEXT)
    along = tuple(0.7 - 0.1 * x for x in at)
    slope = lambda *at: jax.jvp(m, at, along)[1]
    moved = lambda s: tuple(x + s * d for x, d in zip(at, along, strict=True))
    for f, derivative in ((m, slope), (slope, lambda *at: jax.jvp(slope, at, along)[1])):
        # The error of the difference is about 1e-10, of its rounding about 1e-11.
        close(derivative(*at), (f(*moved(1e-5)) - f(*moved(-1e-5))) / 2e-5, 1e-7)


@pytest.mark.slow
def test_the_divergence_of_the_residual_network_is_exact_without_a_key():
    """Also for events that are large enough to be estimated in training."""
    size = divergence.EXACT_UP_TO + 2
    m = network(residual, (8,), event=size)
    assert m.value_and_divergence(T, jnp.ones(size)) is NotImplemented
    assert nn.field.value_and_divergence(T, jnp.ones(size), m) is NotImplemented
    x = 0.1 * jax.random.normal(jax.random.key(1), (3, size))
    base = jaxode.standard_normal(size)
    flow, exact = (
        jaxode.cnf(nn.field, base, rtol=1e-6, atol=1e-6, batch="per_sample", divergence=how)
        for how in (divergence.auto(), divergence.exact())
    )
    close(jaxode.bind(flow, m).log_prob(x), exact.log_prob(m, x), 1e-9)


def test_time_enters_the_first_layer_of_mlp_and_all_of_concat():
    for make, timed in ((nn.MLP, [True, False]), (nn.Concat, [True, True])):
        m = make(3, (4, 4), key=jax.random.key(0))
        assert [layer.shift is not None for layer in m.hidden] == timed
        assert (m.shift is not None) == (make is nn.Concat)


def test_potential_gradient_has_a_symmetric_jacobian():
    m = network(nn.PotentialGradient, (8, 8))
    jacobian = jax.jit(jax.jacfwd(lambda y: m(T, y)))(Y)
    np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-14)
    assert jnp.abs(jacobian - jnp.diag(jnp.diag(jacobian))).max() > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_softplus_is_that_of_jax(dtype):
    x = jnp.array([-800.0, -30.0, -1.0, 0.0, 1.0, 30.0, 800.0], dtype)
    # Both round `exp` and `log1p` a few times, and the sigmoid near one in its derivative.
    rounding = 16 * float(jnp.finfo(dtype).eps)
    derivatives = [lambda f: f, jax.grad, lambda f: jax.grad(jax.grad(f))]
    of = lambda f, x: [jax.vmap(derivative(f))(x) for derivative in derivatives]
    both = jax.jit(lambda x: (of(nn.softplus, x), of(jax.nn.softplus, x)))(x)
    for actual, expected in zip(*both, strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, expected, rtol=rounding, atol=rounding)
    assert jnp.isnan(nn.softplus(jnp.array(jnp.nan, dtype)))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_softplus_is_accurate_relative_to_its_value(dtype):
    """Also where it is tiny, and over the whole range of its series."""
    # From -80 on, the exponential is a normal number in float32.
    x = np.linspace(-80, 80, 4001).astype(dtype)
    expected = np.logaddexp(x.astype(np.longdouble), 0)
    error = (np.asarray(nn.softplus(jnp.asarray(x))) - expected) / expected
    # The exponential, the series and the product round once or twice each.
    assert np.abs(error).max() < 6 * jnp.finfo(dtype).eps
    assert np.abs(error.mean()) < 0.2 * jnp.finfo(dtype).eps


@pytest.mark.slow
def test_flow_uses_the_closed_form_without_a_key():
    """For events that are large enough to be estimated without one."""
    size = divergence.EXACT_UP_TO + 4
    m = network(nn.ConcatSquash, (8, 8), event=size, context_size=2)
    x = jax.random.normal(jax.random.key(1), (5, size))
    context = jax.random.normal(jax.random.key(2), (5, 2))
    options = {"rtol": 1e-9, "atol": 1e-9, "batch": "per_sample"}
    make = lambda **kw: jaxode.cnf(nn.field, jaxode.standard_normal(size), **options, **kw)
    flow, exact = make(), make(divergence=divergence.exact())
    value = flow.log_prob(m, x, context=context)
    close(value, exact.log_prob(m, x, context=context), 1e-9)
    close(flow.log_prob(m, x, context=context, key=jax.random.key(0)), value, 1e-12)
    gradients = [jax.jit(jax.grad(f.nll))(m, x, context=context) for f in (flow, exact)]
    close(*gradients, 1e-7)
    samples, log_prob = flow.sample_and_log_prob(m, jax.random.key(3), 5, context=context)
    close(flow.log_prob(m, samples, context=context), log_prob, 1e-6)


def test_own_field_offers_a_closed_form():
    """The protocol is one method; it may decline for some arguments."""

    class Linear:
        def __call__(self, t, z, A):
            return A @ z

        def value_and_divergence(self, t, z, A):
            return (A @ z, jnp.trace(A)) if A.shape[0] > 3 else NotImplemented

    A = jax.random.normal(jax.random.key(0), (12, 12)) / 4
    flow = jaxode.cnf(Linear(), jaxode.standard_normal(12), rtol=1e-8, atol=1e-8)
    _, aux = flow.nll_and_stats(A, jnp.ones((2, 12)))
    np.testing.assert_allclose(aux.log_det, -jnp.trace(A), rtol=1e-7)
    auto = divergence.auto()
    assert auto.describe(Linear(), jnp.ones(12), A) == "closed form"
    assert auto.describe(Linear(), jnp.ones(3), A[:3, :3]).startswith("exact()")
    large = divergence.EXACT_UP_TO + 1
    assert auto.describe(lambda t, z, args: z, jnp.ones(large)).startswith("hutchinson(probes=1")
    assert divergence.exact(chunk=3).describe(Linear(), jnp.ones(12), A) == "exact(chunk=3)"


class Scaled(NamedTuple):
    """A network that is a named tuple."""

    inner: nn.MLP
    scale: jax.Array

    def __call__(self, t, y, context=None):
        return self.scale * self.inner(t, y, context)


@pytest.mark.parametrize("context", [(), (CONTEXT,)], ids=["alone", "with a context"])
def test_a_named_tuple_is_a_network(context):
    m = nn.MLP(6, (4,), key=jax.random.key(0), context_size=2 * len(context))
    args = Scaled(m, jnp.array(3.0))
    args = (args, *context) if context else args
    np.testing.assert_array_equal(nn.field(T, Y, args), 3 * m(T, Y, *context))
    assert nn.field.value_and_divergence(T, Y, args) is NotImplemented
    assert not nn.field.is_centered(args)


@pytest.mark.slow
@pytest.mark.parametrize("number", [-3, -3.0])
def test_a_closed_form_may_be_a_number_of_python(number):
    class Shrink:
        def __call__(self, t, z, args):
            return -z

        def value_and_divergence(self, t, z, args):
            return [-z, number]

    flow, x = jaxode.cnf(Shrink(), jaxode.standard_normal(3)), jnp.ones((2, 3), jnp.float32)
    # z(0) = e x, in three dimensions.
    expected = flow.base.log_prob(x * np.float32(np.e)) + 3
    np.testing.assert_allclose(flow.log_prob(None, x), expected, rtol=1e-4)
    np.testing.assert_allclose(flow.nll(None, x), -expected.mean(), rtol=1e-4)


@pytest.mark.slow
def test_a_lattice_in_half_precision():
    half = lambda tree: jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
    m, x = nn.Lattice(4, key=jax.random.key(0)), jnp.linspace(-1.0, 1.0, 4)
    time = jnp.asarray(0.5, jnp.bfloat16)
    np.testing.assert_allclose(
        half(m)(time, half(x)).astype(float), m(jnp.asarray(0.5), x), atol=0.02
    )


def rotated(x):
    """Turned and mirrored about the origin."""
    return x @ jnp.array([[0.6, 0.8], [0.8, -0.6]])


def particle_net(**options):
    m = nn.Particles(4, 2, 6, 3.0, 8, key=jax.random.key(0), **options)
    return jax.tree.map(lambda x: 2 * x + 0.1, m)


def test_particles_move_as_their_configuration():
    m, x = particle_net(), jax.random.normal(jax.random.key(1), (4, 2))
    run = jax.jit(lambda x: m.value_and_divergence(T, x))
    value, div = run(x)
    assert jnp.abs(value).max() > 0.1
    for change in (rotated, lambda x: x[jnp.array([2, 0, 3, 1])], lambda x: -x):
        changed, same = run(change(x))
        np.testing.assert_allclose(changed, change(value), rtol=1e-12)
        np.testing.assert_allclose(same, div, rtol=1e-12)
    # A shift changes nothing, and the mean stays.
    np.testing.assert_allclose(jax.jit(lambda x: m(T, x))(x + 3.0), value, rtol=1e-9)
    np.testing.assert_allclose(value.mean(0), 0, atol=1e-12)


def waves():
    angles = np.pi * float(T) * np.array([1, 2, 3, 4])
    return np.concatenate([np.sin(angles), np.cos(angles)])


@pytest.mark.parametrize("many_body", [pytest.param(True, marks=pytest.mark.slow), False])
def test_particles_are_those_of_the_docstring(many_body):
    m = particle_net(many_body=many_body, blocks=1)
    x = np.random.default_rng(0).standard_normal((4, 2))
    width = np.exp(m.log_width)
    bumps = lambda i, j: np.exp(-0.5 * ((np.linalg.norm(x[i] - x[j]) - m.center) / width) ** 2)
    affine = lambda layer, x: layer.weight @ x + layer.bias
    others = lambda *those: [k for k in range(4) if k not in those]

    def around(i, j):
        everything = sum(bumps(a, b) for a in range(4) for b in range(a))
        ends = sum(bumps(end, k) for end in (i, j) for k in others(end))
        side = lambda a, b: m.around.of_sides @ bumps(a, b)
        triangles = sum(side(i, k) * side(j, k) for k in others(i, j))
        return (
            m.around.of_all @ everything + m.around.of_ends @ ends
            + m.around.of_triangles @ triangles
        )  # fmt: skip

    def strength(i, j):
        h = affine(m.hidden, waves()) + (around(i, j) if many_body else 0)
        scale, shift = np.split(affine(m.modulation[0], waves()), 2)
        h = h + affine(m.blocks[0], m.activation((1 + scale) * h + shift))
        constant, *c = affine(m.last, m.activation(h))
        return constant + np.sum(c * bumps(i, j))

    pull = lambda i, j: (x[i] - x[j]) * strength(i, j)
    expected = np.array([sum(pull(i, j) for j in others(i)) for i in range(4)]) / 4
    np.testing.assert_allclose(m(T, jnp.asarray(x)), expected, rtol=1e-7)


def test_a_subclass_with_a_field_of_its_own_has_no_closed_form():
    class Damped(nn.MLP):
        def __call__(self, t, y, context=None):
            return super().__call__(t, y, context) - y

    m = Damped(2, (4,), key=jax.random.key(0))
    assert m.value_and_divergence(T, jnp.ones(2)) is NotImplemented
    flow = jaxode.cnf(nn.field, jaxode.standard_normal(2))
    x, _ = flow.sample_and_log_prob(m, jax.random.key(1), 3)
    z = flow.base.sample(jax.random.split(jax.random.key(1))[0], (3,))
    np.testing.assert_allclose(x, flow.from_base(m, z), rtol=1e-3, atol=1e-4)


class Trapped(nn.Particles):
    def __call__(self, t, y, context=None):
        return super().__call__(t, y, context) - 0.3 * y


@pytest.mark.slow
def test_particles_with_another_field_or_as_the_field_itself():
    """The trap shrinks the six dimensions of four centred particles in the plane."""
    base, options = jaxode.centered_normal(4, 2), {"rtol": 1e-8, "atol": 1e-8}
    m, trapped = (kind(4, 2, 4, width=4, key=jax.random.key(0)) for kind in (nn.Particles, Trapped))
    still = jax.tree.map(jnp.zeros_like, trapped)  # the trap alone
    x = base.sample(jax.random.key(1), (3,))
    flow = jaxode.cnf(nn.field, base, divergence=divergence.exact(), **options)
    expected = base.log_prob(x * np.exp(0.3)) + 6 * 0.3
    np.testing.assert_allclose(flow.log_prob(still, x), expected, rtol=1e-6)
    itself = jaxode.cnf(m, base, **options)
    alone = jaxode.cnf(lambda t, z, _: m(t, z), base, divergence=divergence.exact(), **options)
    np.testing.assert_allclose(itself.log_prob(None, x), alone.log_prob(None, x), rtol=1e-6)


def test_particles_at_the_same_place_have_derivatives():
    m = particle_net()
    total = lambda x: jnp.sum(m(T, x)) + m.value_and_divergence(T, x)[1]
    assert jnp.isfinite(jax.jit(jax.grad(total))(jnp.ones((4, 2)))).all()


@pytest.mark.slow
def test_a_flow_of_particles_has_a_density_on_centred_configurations():
    """Its change of volume is that of the flow in coordinates of the subspace."""
    m, base = particle_net(), jaxode.centered_normal(4, 2)
    flow = jaxode.cnf(nn.field, base, rtol=1e-9, atol=1e-9)
    x, log_q = flow.sample_and_log_prob(m, jax.random.key(2), 3)
    np.testing.assert_allclose(x.mean(1), 0, atol=1e-12)
    # Orthonormal coordinates of the space of centred configurations.
    axes = jnp.asarray(np.linalg.svd(np.eye(4) - 1 / 4)[0][:, :3])
    inside = jaxode.cnf(
        lambda t, u, m: axes.T @ m(t, axes @ u), jaxode.standard_normal((3, 2)),
        divergence=divergence.exact(), rtol=1e-9, atol=1e-9,
    )  # fmt: skip
    u = jnp.einsum("ni,bnd->bid", axes, x)
    np.testing.assert_allclose(inside.log_prob(m, u), log_q, rtol=1e-7)
    np.testing.assert_allclose(flow.log_prob(m, x[:, jnp.array([1, 0, 3, 2])]), log_q, rtol=1e-7)


LATTICES = [(shape, odd) for shape in (5, (4, 4), (2, 3, 3)) for odd in (True, False)]


@pytest.mark.parametrize(
    ("shape", "odd"), with_slow(LATTICES, [(5, False), ((2, 3, 3), True)]), ids=str
)
def test_a_lattice_moves_as_its_configuration(shape, odd):
    m = nn.Lattice(shape, 3, key=jax.random.key(0), odd=odd, modes=3, width=4)
    m = jax.tree.map(lambda x: 2 * x + 0.1, m)
    y = jax.random.normal(jax.random.key(1), m.event_shape)
    run = jax.jit(lambda y: m.value_and_divergence(T, y))
    value, div = run(y)
    axes = tuple(range(y.ndim))
    shift = lambda y: jnp.roll(y, (1, 2, 1)[: y.ndim], axes)
    changes = [shift, lambda y: jnp.flip(y, 0)]
    if y.ndim > 1:
        changes.append(lambda y: jnp.swapaxes(y, -1, -2))  # of the same length
    if odd:
        changes.append(lambda y: -y)
    for change in changes:
        changed, same = run(change(y))
        np.testing.assert_allclose(changed, change(value), atol=1e-12)
        np.testing.assert_allclose(same, div, rtol=1e-12)
    even = np.abs(jax.jit(lambda y: m(T, y))(-y) + value).max()
    assert even < 1e-12 or not odd
    assert (even > 1e-2) == (not odd)


def test_a_lattice_is_that_of_the_docstring():
    m = any_lattice(6, (7,), key=jax.random.key(0))
    y = np.asarray(Y).reshape(2, 3)
    c = m.last.weight @ m.activation(m.hidden.weight @ waves() + m.hidden.bias) + m.last.bias
    kernels = np.einsum("m,mfo->fo", c, m.kernel).reshape(-1, 2, 3)
    angles = np.asarray(m.frequency)[:, None, None] * y
    features = np.concatenate([y[None], np.sin(angles), np.cos(angles)])
    sites = list(np.ndindex(2, 3))
    expected = np.zeros((2, 3))
    for x in sites:
        for z in sites:
            d = (x[0] - z[0]) % 2, (x[1] - z[1]) % 3
            expected[x] += kernels[:, *d] @ features[:, *z]
    np.testing.assert_allclose(m(T, jnp.asarray(y)), expected, rtol=1e-10)


@pytest.mark.parametrize("make", [particles, odd_lattice])
def test_a_fresh_symmetric_flow_is_close_to_the_identity(make):
    m = make(6, (64,), key=jax.random.key(0))
    base = jaxode.standard_normal(m.event_shape)
    x = base.sample(jax.random.key(1), (20,))
    moved = jaxode.cnf(nn.field, base).to_base(m, x) - x
    assert 1e-4 < jnp.sqrt(jnp.mean(moved**2)) < 0.15
