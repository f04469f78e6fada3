"""The classifier two-sample test."""

from typing import Any

import numpy as np
from jaxtyping import Float

from jaxode._checks.arguments import integer
from jaxode._checks.caller import arg, public

# The folds of the cross-validation, as in `sbibm`.
FOLDS = 5


@public("calibration.c2st")
def c2st(
    a: Float[Any, "n *event"], b: Float[Any, "n *event"], *, seed: int = 1, jobs: int = 1
) -> float:
    """Train a network to tell two samples apart, and return its accuracy on those left out.

    0.5 means that it cannot, 1.0 that it always can. Between equal distributions, the standard
    error is about `sqrt(1 / (8 n))`. It is the score of `sbibm`: numbers in units of the standard
    deviation of `a`, two layers ten times as wide as an event, and five folds. It needs
    scikit-learn: `pip install 'jaxode[sklearn]'`.

    Args:
        a: samples, such as those of a reference posterior.
        b: as many others, such as `density.sample(key, (n,), context=observation)`.
        seed: of the folds and the networks.
        jobs: how many folds to train at a time.

    Raises:
        ImportError: without scikit-learn.
        ValueError: unless both have the same shape, with at least ten rows, and are finite.

    References: Lopez-Paz and Oquab (2017), arXiv:1610.06545; Lueckmann et al. (2021),
    arXiv:2101.04653.
    """
    try:
        from sklearn.model_selection import KFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
    except ImportError:
        raise ImportError(
            "calibration.c2st: needs scikit-learn. Install it: pip install 'jaxode[sklearn]'."
        ) from None
    a, b = np.asarray(a), np.asarray(b)
    if a.shape != b.shape or a.ndim == 0 or len(a) < 2 * FOLDS:
        raise ValueError(
            f"{arg('b')} must have the shape of a, with at least {2 * FOLDS} rows; got {b.shape}, "
            f"and {a.shape} of a. Draw as many of each."
        )
    for name, samples in (("a", a), ("b", b)):
        if not np.isfinite(samples).all():
            raise ValueError(
                f"{arg(name)} must be finite; got NaN or infinity. Leave such rows out."
            )
    count = len(a)
    a, b = a.reshape(count, -1), b.reshape(count, -1)
    scale = a.std(0, ddof=1)
    x = (np.concatenate([a, b]) - a.mean(0)) / np.where(scale > 0, scale, 1)
    label, seed = np.repeat([0, 1], count), integer("seed", seed, 0)
    width = 10 * a.shape[1]
    network = MLPClassifier((width, width), max_iter=10_000, random_state=seed)
    folds = KFold(FOLDS, shuffle=True, random_state=seed)
    return float(cross_val_score(network, x, label, cv=folds, n_jobs=jobs).mean())
