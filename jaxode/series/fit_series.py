"""`series.fit`: train by the likelihood of series, and keep what is best on series set aside."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from jaxode._checks.arguments import check_bool, check_not_traced, integer
from jaxode._checks.caller import arg, public
from jaxode._checks.samples import check_key
from jaxode._jax.sharding import axes_of, mean_over, row_numbers
from jaxode.series.series_model import Series, log_probs
from jaxode.series.series_network import Observed, Seen, SeriesNetwork
from jaxode.series.units import Units, check_context, check_series, recalled
from jaxode.training.dataset import split_rows
from jaxode.training.devices import Devices
from jaxode.training.display import finish
from jaxode.training.fit import adam
from jaxode.training.loop import STEPS_PER_BLOCK, Clock, Limits, Phase, Plan, Point, Training
from jaxode.training.sources import InMemory, Rows

SERIES_RATE = 8e-3  # of Adam
SERIES_DECAY = 2.0  # of weights, times the rate
SERIES_BATCH = 64  # series of a step
SERIES_WARM_UP = 50  # steps until the full rate
SERIES_DROPOUT = 0.35  # share of hidden units that a step leaves out
# Most series of a step are read with values hidden; the loss counts all values.
THINNED_SHARE = 0.95  # of the series of a step
CUT_SHARE = 0.5  # of those: all values after a drawn time are hidden


@public("series.fit")
def fit(
    ts: Float[np.ndarray, "rows times"],
    ys: Float[np.ndarray, "rows times channels"],
    *,
    key: PRNGKeyArray,
    seconds: float | None = None,
    steps: int | None = None,
    context: Float[np.ndarray, "rows columns"] | None = None,
    validation: float = 0.1,
    size: int = 32,
    field: Callable[[Array], Array] | None = None,
    jump: Callable[[Array, Observed, PRNGKeyArray | None], Array] | None = None,
    mesh: Mesh | None = None,
    progress: bool = True,
) -> tuple[Series, list[Point]]:
    """Train a model of irregular series with gaps, and keep what is best on series set aside.

    A hidden state follows a Neural ODE between observations and jumps at each one, by a gated unit
    that sees the values, which of them are there, and how surprising they were. Just before each
    jump, the state gives a mixture of normals of all channels, whose gaps are integrated out in
    closed form: the likelihood of a series is exact, and training maximizes it, in the loop of
    `jaxode.fit`. Most series in a step are read without some of their values, or up to some time,
    and scored at all. The law of a series may depend on the time since its first observation, not
    on the clock.

    Args:
        ts: times in any unit, `[rows, times]`, increasing within a row. A shorter row repeats its
            last time, with NaN in `ys`.
        ys: values in any units, `[rows, times, channels]`. NaN where nothing was observed.
        key: draws everything: the series set aside, the first network, batches.
        seconds: end after this time of training, which does not count compilation. A minute by
            default.
        steps: end after this many steps. Without `seconds`, the result is a function of `key`.
        context: what is known of each series, such as age and sex, `[rows, columns]` without gaps.
        validation: the part of the series to set aside, above 0 and below 1. At most 1000 are used.
        size: numbers in the hidden state `h`, in pairs.
        field: a network of your own, `field(h)`: what it adds to `dh/dt` beside a learned linear
            part, per median span of a series. A module such as `eqx.nn.MLP`, whose arrays are
            trained.
        jump: likewise, `jump(h, seen, key)`: the state after an observation. `seen` has `surprise`,
            `sd`, `there`, `y` `[channels]`, in standardized units, and `gap` `[1]`, see
            `jaxode.series.series_network.Observed`. `key` is for dropout, and None outside of
            training.
        mesh: devices of one process to train on, as for `jaxode.fit`.
        progress: show steps, the loss on the series set aside and the time left on stderr.

    Returns:
        The model, and its validations in training, in nats of a value.

    Raises:
        TypeError, ValueError: for times out of order or repeated, a row without an observation, a
            channel that is never seen, and wrong shapes.
        FloatingPointError: if no validation is finite.
    """
    clock = Clock(time.perf_counter())
    check_not_traced("looks at data and at the clock", ts, ys, context, key)
    ts, ys = check_series(ts, ys)
    context, limits = check_context(context, len(ts)), Limits.from_arguments(steps, seconds)
    check_bool("progress", progress)
    size = 2 * integer("size", integer("size", size, 2) // 2)  # pairs
    split_key, network_key, key = jax.random.split(check_key(key), 3)
    part, aside = _split(len(ts), validation, split_key)
    data = _Data(Units.of(ts, ys, context), ts, ys, context)
    seen, given = data.scaled(part)
    columns = 0 if context is None else context.shape[1]
    gap, recall = data.units.gap, recalled(seen)
    network = SeriesNetwork.make(network_key, columns, size, gap, recall, SERIES_DROPOUT)
    model = Series(_with_own(network, field, jump), data.units)
    batch_size = min(SERIES_BATCH, len(part))
    source = InMemory(Rows(seen.y, (seen.dt, seen.there, given)))
    plan = Plan(limits, batch_size, progress=progress, devices=Devices.from_mesh(mesh, batch_size))
    if plan.devices.several_processes:
        raise ValueError(f"{arg('mesh')} must have devices of one process; got several.")

    def take(key):
        return source.take(key, STEPS_PER_BLOCK * batch_size)

    run = Training(model, source, take, data.loss_on(aside), plan, clock)
    phase = Phase("series", Partial(_loss), adam(SERIES_RATE, SERIES_DECAY), key, SERIES_WARM_UP)
    _train(run, phase, plan)
    return run.best.with_params(plan.devices.from_all(run.best.params)), run.points


def _train(run: Training, phase: Phase, plan: Plan) -> None:
    """Train until a limit or an interrupt, and raise if no validation was finite."""
    try:
        run.train(phase, plan.limits)
    except KeyboardInterrupt:
        if not run.points:
            raise
    run.validate_again()
    if plan.progress:
        finish()
    if run.best_nll == np.inf:
        raise FloatingPointError(
            "series.fit: the log-density of the series set aside is never finite. Check the data "
            "for outliers."
        )


class _Data(NamedTuple):
    """The series in the units of the user, and the units that scale them for the network."""

    units: Units
    ts: Float[np.ndarray, "rows times"]
    ys: Float[np.ndarray, "rows times channels"]
    context: Float[np.ndarray, "rows columns"] | None

    def scaled(self, rows: np.ndarray) -> tuple[Seen, Any]:
        """The chosen series and their contexts, as the network reads them."""
        context = None if self.context is None else self.context[rows]
        return self.units.seen(self.ts[rows], self.ys[rows]), self.units.known(context, len(rows))

    def loss_on(self, rows: np.ndarray) -> Callable[[SeriesNetwork], float]:
        """The negative log-likelihood per value of the chosen series, in units of the user."""
        held_out, is_observed = (
            jax.tree.map(jnp.asarray, self.scaled(rows)),
            ~np.isnan(self.ys[rows]),
        )
        shift = np.sum(is_observed * np.log(self.units.sd))

        def loss(network):
            nats = np.asarray(log_probs(network, *held_out), float).sum() - shift
            return float(-nats / is_observed.sum())

        return loss


def _with_own(network: SeriesNetwork, field: Any, jump: Any) -> SeriesNetwork:
    """The network with the user's in place of its own."""
    h, values = network.start, jnp.zeros_like(network.recall)
    seen = Observed(values, values, values, values, jnp.zeros(1))
    own = {"push": ("field", field, (h,)), "jump": ("jump", jump, (h, seen, None))}
    for place, (name, f, args) in own.items():
        if f is None:
            continue
        out = eqx.filter_eval_shape(f, *args)
        if getattr(out, "shape", None) != h.shape or out.dtype != h.dtype:
            raise ValueError(
                f"{arg(name)} must return an array {h.dtype}{list(h.shape)}, as the state h; got "
                f"{out}. Pass size= for another state."
            )
        network = dataclasses.replace(network, **{place: f})
    return network


def _split(rows: int, validation: Any, key: PRNGKeyArray) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on, and those set aside."""
    if rows < 3:
        raise ValueError(
            f"{arg('ts')} must have at least three series, since some are set aside; got {rows}. "
            "Cut a long series into several."
        )
    (parts,) = split_rows(validation, np.asarray(jax.random.permutation(key, rows)), 1)
    train, aside = map(np.sort, parts)
    return train, aside


def _loss(network: SeriesNetwork, x: Any, context: Any, key: PRNGKeyArray) -> Float[Array, ""]:
    """Negative log-likelihood per value of a batch, whose network reads the values of `fed`."""
    dt, there, context_rows = context

    def log_prob(series, context, key):
        feed_key, drop_key = jax.random.split(key)
        return network.log_prob(series, context, fed(feed_key, series.there), drop_key)

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, row_numbers(x, key, None))
    nats = jax.vmap(log_prob)(Seen(dt, x, there), context_rows, keys)
    # Each device divides by the mean count of all devices.
    count = mean_over(jnp.sum(there, dtype=x.dtype), tuple(axes_of(there)))
    return -jnp.sum(nats) / count


def fed(key: PRNGKeyArray, there: Bool[Array, "times channels"]) -> Bool[Array, "times channels"]:
    """Draw which values of a series the network reads in a step."""
    keys = jax.random.split(key, 4)
    kind = jax.random.uniform(keys[0])
    thinned = jax.random.uniform(keys[1], there.shape) < jax.random.uniform(keys[2])
    before_cut = jnp.arange(len(there)) < jax.random.randint(keys[3], (), 0, len(there))
    visible = there & jnp.where(kind < THINNED_SHARE * CUT_SHARE, before_cut[:, None], thinned)
    return jnp.where(kind < THINNED_SHARE, visible, there)
