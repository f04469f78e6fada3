"""What a density depends on beside its samples: shapes, maps and structures of a context."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Frame
from scipy import stats

import jaxode
from jaxode.density.maps import normal

KEY = jax.random.key(0)
SEEN = np.random.default_rng(1).normal(10.0, 4.0, (40, 3))
WHITE = (SEEN - SEEN.mean(0)) / SEEN.std(0)
WIDE = np.exp(SEEN)  # over ten orders of magnitude
NORMAL = jax.vmap(lambda row: normal.fit(WIDE).inverse(row)[0])(WIDE)


def growing(t, z, args):
    """At the sum of all numbers of a context, where those of each array weigh more."""
    rate, context = args
    sums = [jnp.sum(jnp.asarray(leaf, z.dtype)) for leaf in jax.tree.leaves(context)]
    return rate * z * sum((i + 1) * part for i, part in enumerate(sums))


RATE = 0.01
# As many steps as the closed form needs. They compile in half the time of adaptive ones.
FLOW = jaxode.cnf(growing, jaxode.standard_normal(2), steps=8)


def exact(x, sums):
    """The log-density in the units of `(1, 2)`."""
    growth = RATE * np.broadcast_to(sums, x.shape[:-1])
    z = (x - 1) / 2 * np.exp(-growth)[..., None]
    return stats.norm.logpdf(z).sum(-1) - 2 * (growth + np.log(2))


class Weather(NamedTuple):
    """A named tuple of vectors, which in a plain tuple are the mean and the scale."""

    p: np.ndarray
    q: np.ndarray


LABELS = np.arange(40) % 3
ROWS = {"a": SEEN[:3, :2], "label": 1}
# Options of `bind`, a context, the shape of the samples, and the sum that the flow sees. Four
# samples, where the context does not need another number: then one program serves many rows.
CONTEXTS = {
    "one for all": ({}, SEEN[0], (4,), SEEN[0].sum()),
    "one for each": ({}, SEEN[:4], (4,), SEEN[:4].sum(1)),
    "one for as many as it has numbers": ({"context_shape": (3,)}, SEEN[0], (3,), SEEN[0].sum()),
    "a number for each": ({"context_shape": ()}, np.arange(1.0, 5.0), (4,), [1, 2, 3, 4]),
    "a number of Python for all": ({"context_shape": ()}, 2.0, (4,), 2),
    "leading axes": ({"context_shape": (3,)}, SEEN[:2], (2, 2), SEEN[:2].sum(1)),
    "in units": ({"standardize_context": SEEN}, SEEN[:4], (4,), WHITE[:4].sum(1)),
    "mapped to normals": (
        {"standardize_context": jaxode.standardize.normal(WIDE)},
        WIDE[:4], (4,), NORMAL[:4].sum(1),
    ),
    "in given units": ({"standardize_context": (2.5, 1.5)}, np.array([3, 4]), (4,), 4 / 3),
    "labels stay as they are": (
        {"standardize_context": {"label": LABELS, "size": SEEN}},
        {"label": LABELS[:4], "size": SEEN[:4]}, (4,), LABELS[:4] + 2 * WHITE[:4].sum(1),
    ),
    "a named tuple": (
        {"standardize_context": Weather(*SEEN[:, :2].T)},
        Weather(*SEEN[:4, :2].T), (4,), WHITE[:4, 0] + 2 * WHITE[:4, 1],
    ),
    "a table": ({"standardize_context": Frame(SEEN)}, Frame(SEEN[:4]), (4,), WHITE[:4].sum(1)),
    "arrays of any shape": (
        {"context_shape": {"a": (2,), "label": ()}}, ROWS, (3,), ROWS["a"].sum(1) + 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTEXTS)
def test_each_sample_has_its_context(name):
    given, context, shape, sums = CONTEXTS[name]
    density = jaxode.bind(FLOW, RATE, standardize=(1.0, 2.0), **given)
    x = np.random.default_rng(3).normal(size=(*shape, 2))
    log_prob = density.log_prob(x, context=context)
    np.testing.assert_allclose(log_prob, exact(x, sums), rtol=1e-7)


def test_samples_of_many_contexts():
    """For each row of a context there is one, without a shape, where that of a row is known."""
    shapes = {"a": (2,), "label": ()}
    density = jaxode.bind(FLOW, RATE, standardize=(1.0, 2.0), context_shape=shapes)
    x, log_prob = density.sample_and_log_prob(KEY, context=ROWS)
    assert x.shape == (3, 2)
    np.testing.assert_allclose(log_prob, exact(x, ROWS["a"].sum(1) + 2), rtol=1e-7)
    for shape in ((), (3,)):
        np.testing.assert_allclose(density.sample(KEY, shape, context=ROWS), x, rtol=1e-7)
    drawn = lambda context: jax.eval_shape(lambda: density.sample(KEY, context=context)).shape
    assert drawn(ROWS | {"a": SEEN[0, :2]}) == (2,)
    assert drawn(ROWS | {"label": np.ones((4, 1))}) == (4, 3, 2)
    with pytest.raises(
        ValueError, match=r"sample\(context=...\): .* samples \(3,\); got shape \(2,\)"
    ):
        density.sample(KEY, context=ROWS | {"label": np.ones(2)})
    unknown = jaxode.bind(FLOW, RATE)
    with pytest.raises(ValueError, match=r"sample\(context=...\): .* Pass context_shape= to bind"):
        unknown.sample(KEY, (2,), context=SEEN[0, :2])


def test_losses_of_the_flow_are_in_its_units():
    """That of `to_flow` lacks the logarithm of the scale alone."""
    density = jaxode.bind(FLOW, RATE, standardize=(1.0, 2.0), standardize_context=SEEN)
    x = np.random.default_rng(3).normal(size=(40, 2))
    z, context = density.to_flow(x, SEEN)
    loss = FLOW.nll(density.params, z, context=context)
    np.testing.assert_allclose(loss, -exact(x, WHITE.sum(1)).mean() - 2 * np.log(2), rtol=1e-7)
    lost = SEEN.copy()
    lost[:2, 0] = np.inf
    with pytest.raises(ValueError, match=r"to_flow\(context=...\): must be finite; .* 2 of 40"):
        density.to_flow(x, lost)


def test_an_energy_is_of_samples_and_contexts_as_they_are_given():
    """On the support, in the units of the user, and with labels."""
    of_rows = {"u": np.array([[300.0], [500.0], [400.0]]), "label": np.array([0, 1, 1])}
    density = jaxode.bind(
        FLOW, RATE, standardize=(1.0, 2.0), standardize_context=of_rows, support=(0.0, np.inf)
    )
    target = lambda x, row: -jnp.sum(x**2) * row["u"][0] / 300 - 3.0 * row["label"].astype(float)
    x, log_q = density.sample_and_log_prob(KEY, 3, context=of_rows)
    energies = jax.vmap(target)(x, jax.tree.map(jnp.asarray, of_rows))
    loss = density.reverse_kl_loss(target, 3, key=KEY, context=of_rows)
    np.testing.assert_allclose(loss, (log_q - energies).mean(), rtol=1e-7)


@pytest.mark.slow  # the same loss, of a function that gets no context
def test_an_energy_may_do_without_the_context():
    density = jaxode.bind(FLOW, RATE, standardize=(1.0, 2.0), standardize_context=SEEN)
    _, log_q = density.sample_and_log_prob(KEY, 3, context=SEEN[:3])
    loss = density.reverse_kl_loss(lambda x: 0 * x[0], 3, key=KEY, context=SEEN[:3])
    np.testing.assert_allclose(loss, log_q.mean(), rtol=1e-7)
