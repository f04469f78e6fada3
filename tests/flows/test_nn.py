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
from jaxode.divergence import FieldAt
from jaxode.ode.field import Field


def residual(event, widths, **options):
    """With as many blocks as others have hidden layers."""
    return nn.Residual(event, widths[0], len(widths), **options)


def mixer(event, widths, **options):
    """Of images that are twice as wide as high, or of as many rows as columns."""
    patch, shape = {(2, 3): (1, (2, 3)), 6: (1, (2, 3)), 64: (2, (8, 8))}[event]
    return nn.Mixer(shape, patch, widths[0], len(widths), features=3, **options)


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


def ensemble(event, widths, **options):
    """Of networks with a closed form."""
    key = options.pop("key")
    return nn.Ensemble(lambda key: nn.ConcatSquash(event, widths, key=key, **options), 3, key=key)


SYMMETRIC = (particles, pairs_of_particles, odd_lattice, any_lattice)
T, Y = jnp.array(0.3), jnp.asarray(np.linspace(-1.0, 1.5, 6))
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
    "Ensemble": (ensemble, (7,)),
}


def moved(m):
    """A network of other weights. By NumPy, where each of their shapes would be a program."""
    return jax.tree.map(lambda x: jnp.asarray(2 * np.asarray(x) + 0.1), m)


def value(m, *inputs):
    """Of a network, in one program."""
    return np.asarray(jax.jit(lambda m, *inputs: m(*inputs))(m, *inputs))


def network(make, widths, activation=jnp.tanh, event=6, **options):
    """With larger output weights than at the start, and times that matter in every layer."""
    m = make(event, widths, key=jax.random.key(0), activation=activation, **options)
    m = moved(m)
    if make in SYMMETRIC:
        return m
    last = lambda m: (m.last if make in (residual, mixer) else m).weight
    if make is ensemble:
        last = lambda m: [member.weight for member in m.members]
    return eqx.tree_at(last, m, replace_fn=lambda w: jnp.asarray(5 * np.asarray(w)))


def close(actual, expected, rtol):
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max(initial=0))


# Of both networks there is a deeper one, and of MLP one without hidden layers. Activations with a
# rule of their own, and without; and without a context, with the time in the output, too.
OF_CLOSED_FORM = [
    (name, jnp.tanh, 2) for name in CLOSED_FORM
    if name not in ("MLP, 1 hidden", "Concat, 0 hidden", "Concat, 1 hidden")
] + [
    ("Concat, 2 hidden", jnp.tanh, 0), ("ConcatSquash, 2 hidden", nn.softplus, 0),
    ("ConcatSquash, 2 hidden", jax.nn.gelu, 0),
]  # fmt: skip


ALIKE = [(name, jnp.tanh, 2) for name in ("Concat, 2 hidden", "ConcatSquash, 1 hidden")]
ALIKE += [(name, jnp.tanh, 2) for name in ("Lattice, odd", "Particles, pairs")]


@pytest.mark.parametrize(
    ("name", "activation", "size"),
    with_slow(OF_CLOSED_FORM, ALIKE),  # parts of others
)
def test_closed_form_equals_the_exact_divergence(name, activation, size):
    """Value and gradients."""
    m = network(*CLOSED_FORM[name], activation, context_size=size)
    context = (CONTEXT,) if size else ()

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


MIXED = {
    "MLP, 1 hidden": jax.nn.softmax,
    "MLP, 2 hidden": lambda x: x / jnp.linalg.norm(x),
    "PotentialGradient, 1 hidden": jnp.cumsum,
}


@pytest.mark.parametrize("name", MIXED)
def test_an_activation_that_is_not_elementwise_has_no_closed_form(name):
    """The slopes of the closed form are not its Jacobian, which for softmax gave zero."""
    m = network(*CLOSED_FORM[name], MIXED[name])
    assert m.value_and_divergence(T, Y) is NotImplemented

    @jax.jit
    def both(y):
        _, div = divergence.auto().apply(FieldAt(nn.field, T, m), y, None)
        return div, jnp.trace(jax.jacfwd(lambda y: m(T, y))(y))

    np.testing.assert_allclose(*both(Y), rtol=1e-12)


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


@pytest.mark.parametrize(
    "make", [nn.MLP, nn.Concat, nn.ConcatSquash, nn.PotentialGradient, residual, mixer]
)
def test_deeper_networks_offer_no_closed_form(make):
    m = make(6, (4, 4, 4), key=jax.random.key(0))
    assert m.value_and_divergence(T, Y) is NotImplemented
    assert nn.field.value_and_divergence(T, Y, m) is NotImplemented
    assert nn.field.value_and_divergence(T, Y, lambda t, y: y) is NotImplemented
    own = divergence.closed_form()
    with pytest.raises(ValueError, match="offers no value_and_divergence"):
        jaxode.cnf(nn.field, jaxode.standard_normal(6), divergence=own).log_prob(m, Y[None])


# A scalar, and many numbers, are harder than what is between them. `Concat` starts as `MLP` does.
ENDS = [(nn.ConcatSquash, ()), (nn.MLP, 64), (nn.PotentialGradient, 64), (residual, 64)]
ENDS += [(mixer, 64)]
ENDS += [(particles, 6), (odd_lattice, 6)]


@jax.jit
def drift(m, x):
    """How far samples go in a time of one, if they see the field at their start."""
    times = jnp.linspace(0.1, 0.9, 5)
    return jax.vmap(lambda y: jax.vmap(lambda t: m(t, y))(times).mean(0))(x)


@pytest.mark.parametrize(("make", "event"), ENDS)
def test_a_fresh_network_hardly_moves_samples(make, event):
    """In the mean of four networks: one of particles that are close may move them by more."""
    widths, squares = (64,) * (1 if make in SYMMETRIC else 2), []
    for seed in range(4):
        m = make(event, widths, key=jax.random.key(seed))
        shape = np.atleast_1d(getattr(m, "event_shape", np.array(event, int)))
        moved = drift(m, np.random.default_rng(seed).normal(size=(20, *shape)))
        assert moved.shape == (20, *shape)
        squares.append(np.mean(np.asarray(moved) ** 2))
    assert 1e-4 < np.sqrt(np.mean(squares)) < 0.15


WITHOUT_HIDDEN = [(make, ()) for make in (nn.MLP, nn.Concat, nn.ConcatSquash)]
WITH_HIDDEN = [(make, (8,)) for make in (nn.MLP, nn.Concat, nn.ConcatSquash, nn.PotentialGradient)]
WITH_HIDDEN += [(make, (8,)) for make in (residual, mixer, *SYMMETRIC)]


@pytest.mark.parametrize(
    ("make", "widths"),
    with_slow(WITH_HIDDEN + WITHOUT_HIDDEN, WITHOUT_HIDDEN[1:]),  # as MLP without
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


def test_a_network_of_configurations_refuses_another_shape_of_as_many_numbers():
    m = nn.Particles(3, 2, 5, key=jax.random.key(0))
    y = np.arange(6.0)
    np.testing.assert_array_equal(value(m, T, y), value(m, T, y.reshape(3, 2)).reshape(-1))
    with pytest.raises(TypeError, match=r"of shape \(3, 2\); got a sample of shape \(2, 3\)"):
        m(T, y.reshape(2, 3))


@pytest.mark.parametrize("make", [residual, mixer])
def test_networks_of_matching_grow_no_faster_than_samples(make):
    m = network(make, (8, 8))
    y = np.asarray(Y)
    expected = np.asarray(m.scale.weight) @ waves() + np.asarray(m.scale.bias)
    np.testing.assert_allclose(value(m, T, 1e8 * y) / 1e8, expected * y, atol=1e-5)


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
    actual = value(m, T, Y.reshape(2, 3), context)
    np.testing.assert_allclose(actual, expected.reshape(2, 3), rtol=1e-12)


@pytest.mark.parametrize("patch", [2, 3])
def test_the_mixer_is_that_of_its_docstring(patch):
    """Of images of 6 x 4 and 6 x 3 pixels with two channels. Patches have margins."""
    down, across = 6 // patch, 4 // patch
    shape = (6, across * patch, 2)
    options = {"features": 3, "context_size": 2, "activation": jax.nn.silu}
    m = nn.Mixer(shape, patch, 5, 2, key=jax.random.key(0), **options)
    m = jax.tree.map(lambda x: 2 * np.asarray(x) + 0.1, m)
    y = np.random.default_rng(0).normal(size=shape)
    silu = lambda x: x / (1 + np.exp(-x))
    tanh = lambda x: 20 * np.tanh(x / 20)
    dense = lambda layer, x: np.asarray(x) @ layer.weight.T + layer.bias
    e = np.concatenate([waves(), dense(m.encoder[1], silu(dense(m.encoder[0], CONTEXT)))])
    slope, shift = np.split(dense(m.feature, e), 2)
    phi = np.moveaxis(silu(slope * y[..., None] + shift), -1, 0)
    before = patch // 2
    wide = np.pad(y, [(before, patch - before)] * 2 + [(0, 0)])
    at = [(patch * i, patch * j) for i in range(down) for j in range(across)]
    cut = lambda x, i, j, size: x[i : i + size, j : j + size]
    seen = [
        np.concatenate(
            [cut(wide, *ij, 2 * patch).ravel(), *(cut(p, *ij, patch).ravel() for p in phi)]
        )
        for ij in at
    ]
    h = dense(m.first, np.array(seen)) + m.place
    for block in m.blocks:
        a, b, c, d = np.split(dense(block.modulation, e), 4)
        inner, outer = block.tokens
        h = h + dense(outer, silu(dense(inner, ((1 + a) * h + b).T))).T
        inner, outer = block.channels
        h = h + dense(outer, silu(dense(inner, (1 + c) * h + d)))
    k = dense(m.last, tanh(silu(h)))
    expected = np.zeros_like(y)
    for row, ij in zip(k, at, strict=True):
        first, *others = row.reshape(4, patch, patch, 2)
        out = sum((w * tanh(cut(p, *ij, patch)) for w, p in zip(others, phi, strict=True)), first)
        cut(expected, *ij, patch)[:] = out
    expected += dense(m.scale, e).reshape(shape) * y
    np.testing.assert_allclose(value(m, T, y, CONTEXT), expected, rtol=1e-9)


def test_potential_gradient_has_a_symmetric_jacobian():
    m = network(nn.PotentialGradient, (8, 8))
    jacobian = np.asarray(jax.jit(jax.jacfwd(lambda y: m(T, y)))(Y))
    np.testing.assert_allclose(jacobian, jacobian.T, atol=1e-14)
    assert np.abs(jacobian - np.diag(np.diag(jacobian))).max() > 1e-2


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64], ids=["float32", "float64"])
def test_softplus_is_accurate_relative_to_its_value(dtype):
    """Also where it is tiny, and over the whole range of its series."""
    # From -80 on, the exponential is a normal number in float32.
    x, eps = np.linspace(-80, 80, 4001).astype(dtype), float(jnp.finfo(dtype).eps)
    expected = np.logaddexp(x.astype(np.longdouble), 0)
    error = (np.asarray(jax.jit(nn.softplus)(x)) - expected) / expected
    # The exponential, the series and the product round once or twice each.
    assert np.abs(error).max() < 6 * eps
    assert np.abs(error.mean()) < 0.2 * eps
    # Both derivatives are those of JAX, which rounds the sigmoid near one.
    ends = np.concatenate([x[::40], np.array([-800.0, 800.0], dtype)])

    @jax.jit
    def derivatives(x):
        each = (jax.grad(f) for f in (nn.softplus, jax.nn.softplus))
        return [[jax.vmap(g)(x), jax.vmap(jax.grad(g))(x)] for g in each]

    for actual, wanted in zip(*derivatives(ends), strict=True):
        assert actual.dtype == dtype
        np.testing.assert_allclose(actual, wanted, rtol=16 * eps, atol=16 * eps)
    at_ends = nn.softplus(jnp.array([800.0, jnp.nan], dtype))
    np.testing.assert_array_equal(at_ends, np.array([800.0, np.nan], dtype))


def test_own_field_offers_a_closed_form():
    """The protocol is one method; it may decline for some arguments, and give Python's numbers."""

    class Shrinking:
        def __call__(self, t, z, args):
            return -z

        def value_and_divergence(self, t, z, args):
            return [-z, -z.size] if z.size > 3 else NotImplemented

    flow = jaxode.cnf(Shrinking(), jaxode.standard_normal(12), rtol=1e-8, atol=1e-8)
    _, aux = flow.nll_and_stats(None, jnp.ones((2, 12)))
    np.testing.assert_allclose(aux.log_det, 12.0, rtol=1e-7)
    auto, large = divergence.auto(), divergence.EXACT_UP_TO + 1
    assert auto.describe(Shrinking(), jnp.ones(12)) == "closed form"
    assert auto.describe(Shrinking(), jnp.ones(3)).startswith("exact()")
    assert auto.describe(lambda t, z, args: z, jnp.ones(large)).startswith("hutchinson(probes=1")
    assert divergence.exact(chunk=3).describe(Shrinking(), jnp.ones(12)) == "exact(chunk=3)"


@pytest.mark.parametrize("bases", [(), (Field,), (eqx.Module, Field)], ids=str)
def test_a_field_may_inherit_what_it_does_not_offer(bases):
    offered = type("Offered", bases, {"__call__": lambda self, t, z, args: -z})()
    assert divergence.auto().describe(offered, jnp.ones(3)).startswith("exact()")
    moved = jaxode.cnf(offered, jaxode.centered_normal(3, 2)).f(T, jnp.ones((3, 2)), None)
    np.testing.assert_array_equal(moved, 0.0)


class Scaled(NamedTuple):
    """A network that is a named tuple."""

    inner: nn.MLP
    scale: jax.Array

    def __call__(self, t, y, context=None):
        return self.scale * self.inner(t, y, context)


@pytest.mark.parametrize("context", [(), (CONTEXT,)], ids=["alone", "with a context"])
def test_a_named_tuple_is_a_network(context):
    m = nn.MLP(6, (4,), key=jax.random.key(0), context_size=2 * len(context))
    args = (Scaled(m, jnp.array(3.0)), *context) if context else Scaled(m, jnp.array(3.0))
    actual = jax.jit(lambda args: nn.field(T, Y, args))(args)
    np.testing.assert_allclose(actual, 3 * value(m, T, Y, *context), rtol=1e-15)
    assert nn.field.value_and_divergence(T, Y, args) is NotImplemented
    assert not nn.field.is_centered(args)


def test_a_subclass_with_a_field_of_its_own_has_no_closed_form():
    """Nor is it known to keep the mean."""

    def damped(kind):
        class Damped(kind):
            def __call__(self, t, y, context=None):
                return super().__call__(t, y, context) - y

        return Damped

    m = damped(nn.MLP)(2, (4,), key=jax.random.key(0))
    assert m.value_and_divergence(T, jnp.ones(2)) is NotImplemented
    particles = [kind(3, 2, key=jax.random.key(0)) for kind in (nn.Particles, damped(nn.Particles))]
    assert [nn.field.is_centered(m) for m in particles] == [True, False]
    assert particles[1].value_and_divergence(T, jnp.ones((3, 2))) is NotImplemented


def test_a_lattice_in_half_precision():
    half = lambda tree: jax.tree.map(lambda x: np.asarray(x, jnp.bfloat16), tree)
    m, inputs = nn.Lattice(4, key=jax.random.key(0)), (np.asarray(0.5), np.linspace(-1.0, 1.0, 4))
    actual, expected = value(half(m), *half(inputs)), value(m, *inputs)
    np.testing.assert_allclose(actual.astype(float), expected, atol=0.02)


def rotated(x):
    """Turned and mirrored about the origin."""
    return x @ np.array([[0.6, 0.8], [0.8, -0.6]])


def particle_net(**options):
    m = nn.Particles(4, 2, 6, 3.0, 8, key=jax.random.key(0), **options)
    return moved(m)


def test_particles_move_as_their_configuration():
    m, x = particle_net(), np.random.default_rng(1).normal(size=(4, 2))
    run = jax.jit(lambda x: m.value_and_divergence(T, x))
    dz, div = map(np.asarray, run(x))
    assert np.abs(dz).max() > 0.1
    for change in (rotated, lambda x: x[np.array([2, 0, 3, 1])], lambda x: -x):
        changed, same = run(change(x))
        np.testing.assert_allclose(changed, change(dz), rtol=1e-12, atol=1e-13)  # some are small
        np.testing.assert_allclose(same, div, rtol=1e-12)
    # A shift changes nothing, and the mean stays.
    np.testing.assert_allclose(value(m, T, x + 3.0), dz, rtol=1e-9)
    np.testing.assert_allclose(dz.mean(0), 0, atol=1e-12)


def waves():
    angles = np.pi * float(T) * np.array([1, 2, 3, 4])
    return np.concatenate([np.sin(angles), np.cos(angles)])


@pytest.mark.parametrize("many_body", [True, False])
def test_particles_are_those_of_the_docstring(many_body):
    m = jax.tree.map(np.asarray, particle_net(many_body=many_body, blocks=1))
    activation = lambda x: x / (1 + np.exp(-x))
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
        h = h + affine(m.blocks[0], activation((1 + scale) * h + shift))
        constant, *c = affine(m.last, activation(h))
        return constant + np.sum(c * bumps(i, j))

    pull = lambda i, j: (x[i] - x[j]) * strength(i, j)
    expected = np.array([sum(pull(i, j) for j in others(i)) for i in range(4)]) / 4
    np.testing.assert_allclose(value(m, T, x), expected, rtol=1e-7)


def test_particles_at_the_same_place_have_derivatives():
    m = particle_net()
    total = lambda x: jnp.sum(m(T, x)) + m.value_and_divergence(T, x)[1]
    assert np.isfinite(jax.jit(jax.grad(total))(np.ones((4, 2)))).all()


@pytest.mark.parametrize(
    ("shape", "odd"), [(5, True), ((4, 4), True), ((4, 4), False), ((2, 3, 3), False)], ids=str
)
def test_a_lattice_moves_as_its_configuration(shape, odd):
    m = moved(nn.Lattice(shape, 3, key=jax.random.key(0), odd=odd, modes=3, width=4))
    y = np.random.default_rng(1).normal(size=m.event_shape)
    run = jax.jit(lambda y: m.value_and_divergence(T, y))
    dz, div = map(np.asarray, run(y))
    axes = tuple(range(y.ndim))
    shift = lambda y: np.roll(y, (1, 2, 1)[: y.ndim], axes)
    changes = [shift, lambda y: np.flip(y, 0)]
    if y.ndim > 1:
        changes.append(lambda y: np.swapaxes(y, -1, -2))  # of the same length
    if odd:
        changes.append(lambda y: -y)
    for change in changes:
        changed, same = run(change(y))
        np.testing.assert_allclose(changed, change(dz), atol=1e-12)
        np.testing.assert_allclose(same, div, rtol=1e-12)
    even = np.abs(value(m, T, -y) + dz).max()
    assert even < 1e-12 or not odd
    assert (even > 1e-2) == (not odd)


def test_a_lattice_is_that_of_the_docstring():
    m = jax.tree.map(np.asarray, any_lattice(6, (7,), key=jax.random.key(0)))
    y = np.asarray(Y).reshape(2, 3)
    activation = lambda x: x / (1 + np.exp(-x))
    c = m.last.weight @ activation(m.hidden.weight @ waves() + m.hidden.bias) + m.last.bias
    kernels = np.einsum("m,mfo->fo", c, m.kernel).reshape(-1, 2, 3)
    angles = np.asarray(m.frequency)[:, None, None] * y
    features = np.concatenate([y[None], np.sin(angles), np.cos(angles)])
    sites = list(np.ndindex(2, 3))
    expected = np.zeros((2, 3))
    for x in sites:
        for z in sites:
            d = (x[0] - z[0]) % 2, (x[1] - z[1]) % 3
            expected[x] += kernels[:, *d] @ features[:, *z]
    np.testing.assert_allclose(value(m, T, y), expected, rtol=1e-10)


def test_an_ensemble_is_the_mean_of_its_members():
    """Those that its key draws; without a closed form, if they have none."""
    make = lambda key: nn.Residual(6, 5, 1, key=key, context_size=2)
    m = nn.Ensemble(make, 3, key=jax.random.key(0))
    keys = jax.random.split(jax.random.key(0), 3)
    each = [make(key) for key in keys]
    of = lambda tree: jax.tree.map(np.asarray, tree)
    assert eqx.tree_equal(of(list(m.members)), of(each))
    assert eqx.tree_equal(of(nn.Ensemble.of(each)), of(m))
    expected = sum(value(network, T, Y, CONTEXT) for network in each) / 3
    np.testing.assert_allclose(value(m, T, Y, CONTEXT), expected, rtol=1e-12)
    assert m.value_and_divergence(T, Y, CONTEXT) is NotImplemented


def test_members_of_an_ensemble_may_differ():
    """In their sizes; and there is a closed form only if all have one."""
    key = jax.random.key(0)
    small, large = (nn.MLP(6, widths, key=key) for widths in ((4,), (5, 7)))
    m = nn.Ensemble.of([small, large])
    expected = (value(small, T, Y) + value(large, T, Y)) / 2
    np.testing.assert_allclose(value(m, T, Y), expected, rtol=1e-12)
    offered = []
    jax.eval_shape(lambda: offered.append(m.value_and_divergence(T, Y)))
    assert offered[0] is not NotImplemented
    without = nn.Ensemble.of([small, nn.Residual(6, 5, 1, key=key)])
    assert without.value_and_divergence(T, Y) is NotImplemented


def test_particles_in_an_ensemble_stay_centred():
    key = jax.random.key(0)
    each = particles(6, (7,), key=key)
    assert nn.Ensemble.of([each, each]).is_centered()
    assert not nn.Ensemble.of([each, nn.MLP(6, (4,), key=key)]).is_centered()
