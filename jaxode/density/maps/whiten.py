"""A linear map of the columns, after which they are not correlated."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxode.density.maps import affine
from jaxode.density.maps.base import Map, Numbers, constants_like
from jaxode.density.maps.chain import Chain

# Columns depend on each other linearly if their correlation matrix has an eigenvalue below this,
# times the number of columns.
SINGULAR = 1e-9
MOST_WHITENED_COLUMNS = 500  # with more columns, `jaxode.fit` does not look at correlations


class SingularError(ValueError):
    """Columns that depend on each other linearly."""


class Linear(Map):
    """`z = matrix x` on flattened events, with the inverse of the matrix beside it."""

    matrix: Float[Numbers, "size size"]
    back: Float[Numbers, "size size"]
    log_det: Float[Numbers, ""]

    def inverse(self, x):
        return _times(self.matrix, x), constants_like(self.log_det, x)

    def forward(self, z):
        return _times(self.back, z), constants_like(self.log_det, z)


def _times(matrix: Numbers, x: Array) -> Array:
    """The product, in full precision on accelerators too: a density has no rounding to spare."""
    highest = jax.lax.Precision.HIGHEST
    return jnp.matmul(constants_like(matrix, x), x.reshape(-1), precision=highest).reshape(x.shape)


def fit(data: Float[np.ndarray, "rows *event"]) -> Chain:
    """Standardize the columns, then multiply by the inverse root of their correlation matrix."""
    variances, directions = principal_axes(data.reshape(len(data), -1))
    involved = dependent_columns(variances, directions)
    if involved:
        raise SingularError(
            "bind(standardize=...): whitening needs columns that do not depend on each other "
            f"linearly, and more rows than columns; got {len(data)} rows, and a singular "
            f"covariance of columns {column_list(involved)}. Leave one of them out."
        )
    root = np.sqrt(variances)
    matrix, back = (directions * scale @ directions.T for scale in (1 / root, root))
    log_det = -np.sum(np.log(root))
    return Chain((affine.fit(data), Linear(matrix, back, log_det)))


def principal_axes(columns: Float[np.ndarray, "rows n"]) -> tuple[np.ndarray, np.ndarray]:
    """The eigenvalues and eigenvectors of the correlation matrix."""
    scaled = (columns - columns.mean(axis=0)) / columns.std(axis=0)
    return np.linalg.eigh(scaled.T @ scaled / len(scaled))


def dependent_columns(variances: np.ndarray, directions: np.ndarray) -> list[int]:
    """The columns of a linear dependence, from the eigenvalues of their correlation matrix."""
    if not (variances <= SINGULAR * len(variances)).any():
        return []
    return np.flatnonzero(np.abs(directions[:, 0]) > 0.01).tolist()


def column_list(columns: Sequence[int] | np.ndarray) -> str:
    """Up to ten column numbers, and how many more there are."""
    suffix = f" and {len(columns) - 10} more" if len(columns) > 10 else ""
    return ", ".join(map(str, columns[:10])) + f"{suffix} (counting from 0)"
