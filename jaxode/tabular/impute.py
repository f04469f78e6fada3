"""Draw missing values given the rest of a row, by importance resampling.

Missing modes are proposed column after column; missing numbers by a normal distribution given the
known ones, in the coordinates of the flow. The weight of a proposal is its probability in the model
over that of proposing it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from jaxode.tabular import categorical
from jaxode.tabular.encoding import Cells, Encoded, into_domain, out_of_domain, with_noise

MIN_PROPOSALS = 32  # proposals for a row
PROPOSAL_WIDTH = 1.3  # times the standard deviation: wide proposals cover the tails of the model
ROWS_OF_IMPUTATION = 256  # rows that are imputed together


def impute(
    table: Any, key: PRNGKeyArray, rows: Encoded, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw what is missing in `n` copies of each row by a `Table`.

    Returns:
        Modes and numbers of the copies, and the mask of those whose density is zero whatever is
        drawn.
    """
    modes, x = np.zeros((0, len(table.encoder.columns)), int), np.zeros((0, rows.low.shape[1]))
    copies = [(modes, x, np.zeros(0, bool))]
    for start in range(0, len(rows.modes), ROWS_OF_IMPUTATION):
        chunk = jax.tree.map(lambda leaf, i=start: leaf[i : i + ROWS_OF_IMPUTATION], rows)
        copies.append(_impute(table, jax.random.fold_in(key, start), chunk, n))
    modes, x, impossible = (np.concatenate(leaves) for leaves in zip(*copies, strict=True))
    return modes, x, impossible


def _impute(
    table: Any, key: PRNGKeyArray, rows: Encoded, n: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`impute` of a chunk of rows."""
    encoder, count, proposals = table.encoder, len(rows.modes), max(MIN_PROPOSALS, 4 * n)
    keys = jax.random.split(key, 4)
    rows = jax.tree.map(lambda leaf: np.repeat(leaf, proposals, axis=0), rows)
    missing = encoder.missing(rows.modes)
    modes, weights = np.where(missing, 0, rows.modes), np.zeros(len(rows.modes))
    if table.categories is not None:
        columns = [encoder.columns[i] for i in encoder.discrete]
        allowed = np.concatenate([np.arange(c.modes) < c.present for c in columns])
        known_modes = np.where(missing, -1, rows.modes)[:, encoder.discrete]
        row_keys = jax.random.split(keys[0], len(known_modes))
        drawn, log_known = categorical.sampled_modes(
            table.categories, row_keys, rows.features, known_modes, allowed
        )
        modes[:, encoder.discrete], weights = drawn, np.asarray(log_known, float)
    x = np.zeros((len(modes), 0))
    if table.density is not None:
        x, log_ratio = _drawn_numbers(table, keys[1:3], rows, modes, missing[:, encoder.numbers])
        weights = weights + log_ratio
    # The proposal with the largest log-weight plus Gumbel noise is a draw by the weights.
    noise = np.asarray(jax.random.gumbel(keys[3], (count, n, proposals)), float)
    weights = weights.reshape(count, 1, proposals)
    finite = np.isfinite(weights)
    impossible = ~finite.any(axis=2, keepdims=True)
    weights = np.where(impossible, 0.0, np.where(finite, weights, -np.inf))
    best = np.argmax(weights + noise, axis=2) + proposals * np.arange(count)[:, None]
    return modes[best.reshape(-1)], x[best.reshape(-1)], impossible.reshape(-1)


def _drawn_numbers(table: Any, keys, rows: Encoded, modes: np.ndarray, missing: np.ndarray):
    """Numbers, with proposals for missing ones, and the log-density over that of proposing them."""
    encoder, density = table.encoder, table.density
    in_mode = [encoder.columns[i].is_number(modes[:, i]) for i in encoder.numbers]
    fill = ~np.stack(in_mode, 1)
    x, log_noise = with_noise(encoder.domain, Cells(rows.low, rows.width, fill, None), keys[0])
    if (missing & ~fill).any():
        v = np.asarray(out_of_domain(encoder.domain, x), float)
        v, log_proposal = _propose(keys[1], v, missing & ~fill, *table.moments)
        proposed, slope = into_domain(encoder.domain, jnp.asarray(v))
        x = jnp.where(missing & ~fill, proposed, x)
        log_noise += log_proposal + jnp.sum(jnp.where(missing & ~fill, slope, 0.0), axis=1)
    log_prob = density.log_prob(x, context=encoder.context(modes, rows.features))
    return np.asarray(x), np.asarray(log_prob - log_noise, float)


def _propose(key, v: np.ndarray, missing: np.ndarray, mean: np.ndarray, cov: np.ndarray):
    """Draw the missing numbers given the others by a normal distribution, with the log-density of
    the draws of each row."""
    draws, log_density = np.array(v), np.zeros(len(v))
    noise = np.asarray(jax.random.normal(key, v.shape), float)
    for pattern in np.unique(missing, axis=0):
        rows, m, k = (missing == pattern).all(axis=1), pattern, ~pattern  # missing, known
        if not m.any():
            continue
        gain = cov[np.ix_(m, k)] @ np.linalg.pinv(cov[np.ix_(k, k)], hermitian=True)
        spread = PROPOSAL_WIDTH**2 * (cov[np.ix_(m, m)] - gain @ cov[np.ix_(k, m)])
        root = np.linalg.cholesky(spread + 1e-6 * np.eye(m.sum()))
        center = mean[m] + (v[rows][:, k] - mean[k]) @ gain.T
        e = noise[rows][:, m]
        draws[np.ix_(rows, m)] = center + e @ root.T
        log_density[rows] = (-0.5 * e**2 - 0.5 * np.log(2 * np.pi)).sum(1)
        log_density[rows] -= np.log(np.diag(root)).sum()
    return draws, log_density
