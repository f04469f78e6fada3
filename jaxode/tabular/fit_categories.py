"""Train the networks of the categories of a table, by likelihood."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, PRNGKeyArray

from jaxode._jax.sharding import row_numbers
from jaxode.tabular.categorical import Autoregressive, Average, Categories, log_probs
from jaxode.training.budget import Budget
from jaxode.training.loop import Plan, Training
from jaxode.training.sources import InMemory, Rows
from jaxode.training.steps import STEPS_PER_BLOCK, Phase
from jaxode.training.turns import keeping_the_best, points_of_all, take_turns, with_finite_best
from jaxode.training.validations import Point

CATEGORY_RATE = 1e-3  # of Adam
CATEGORY_DECAY = 0.05  # of weights, times the rate
CATEGORY_BATCH = 256  # rows of a step
CATEGORY_WARM_UP = 50  # steps until the full rate
MAX_CATEGORY_STEPS = 6000


class ModesSplit(NamedTuple):
    """The modes and features of the rows to train a network on, and of its validation rows."""

    rows: Rows
    aside: Rows
    weights: np.ndarray | None
    aside_weights: np.ndarray | None


class _Model(NamedTuple):
    """A network in training."""

    params: Categories

    @property
    def event_shape(self) -> tuple[int, ...]:
        return (len(self.params.sizes),)

    def with_params(self, params: Categories) -> "_Model":
        return _Model(params)


def trained_categories(
    key: PRNGKeyArray, sizes: tuple[int, ...], splits: Sequence[ModesSplit], budget: Budget
) -> tuple[Autoregressive, list[Point]]:
    """Train a network on each split, and keep the best of each on its validation rows.

    Args:
        key: draws the first networks and the batches.
        sizes: the number of modes of each column.
        splits: the rows of each network.
        budget: ends the training. Networks share its seconds.

    Returns:
        The network, or the mean of several, and the validations.
    """
    network_key, train_key = jax.random.split(key)
    keys = jax.random.split(network_key, len(splits))
    budget = dataclasses.replace(budget, steps=min(budget.steps, MAX_CATEGORY_STEPS))
    plan = Plan(budget, CATEGORY_BATCH)

    def training(number: int) -> Training:
        split = splits[number]
        source = InMemory(split.rows, weights=split.weights)
        every = source.sample(source.count)
        network = Categories.make(keys[number], every.x, sizes, every.context.shape[1])

        def take(key):
            return jax.tree.map(jnp.asarray, source.take(key, STEPS_PER_BLOCK * CATEGORY_BATCH))

        label = f" {number + 1} of {len(splits)}" if len(splits) > 1 else ""
        return Training(_Model(network), source, take, _loss_on(split), plan, label)

    runs = list(map(training, range(len(splits))))
    with keeping_the_best(runs, budget):
        phase = Phase("categories", Partial(_loss), _optimizer(), train_key, CATEGORY_WARM_UP)
        take_turns(runs, phase, budget)
    runs = with_finite_best(
        runs, "tabular.fit: the log-probability of the validation rows is never finite."
    )
    networks = tuple(run.best.params for run in runs)
    network = networks[0] if len(networks) == 1 else Average(sizes, networks)
    return network, points_of_all(runs)


def _loss_on(split: ModesSplit) -> Callable[[Categories], float]:
    """The mean loss of the validation rows, in nats."""
    modes, features = map(jnp.asarray, split.aside)

    def loss(network):
        log_prob = np.asarray(log_probs(network, modes, features), float)
        return -float(np.average(log_prob, weights=split.aside_weights))

    return loss


def _loss(network: Categories, modes, features, key: PRNGKeyArray) -> Float[Array, ""]:
    """The mean loss of a batch, in nats, with dropout."""
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_numbers(modes, key, None))
    return -jnp.mean(jax.vmap(network.log_prob)(modes, features, keys))


@functools.cache
def _optimizer() -> Any:
    import optax

    def matrices(tree):
        return jax.tree.map(lambda leaf: leaf.ndim > 1, tree)

    return optax.adamw(CATEGORY_RATE, weight_decay=CATEGORY_DECAY, mask=matrices)
