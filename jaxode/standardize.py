"""Maps from the units of the data to numbers that a network likes, for `standardize=` and
`standardize_context=` of `bind`.

Data alone stand for their affine map. These functions ask for another one:

```python
density = jaxode.bind(flow, params, standardize=jaxode.standardize.normal(data))
```
"""

from jax.tree_util import Partial
from jaxtyping import Float

from jaxode.density import maps
from jaxode.density.maps.base import Numbers

__all__ = ["affine", "normal", "whiten"]


def affine(data: Float[Numbers, "rows *event"]) -> Partial:
    """Subtract the mean of each column and divide by its standard deviation.

    `bind(standardize=data)` is short for it.
    """
    return Partial(maps.affine.fit, data)


def normal(data: Float[Numbers, "rows *event"]) -> Partial:
    """Map each column to a normal by a smooth monotone spline through its quantiles.

    A rational quadratic spline, whose inverse is exact, with logarithmic tails beyond the extremes.
    It spares the network skewed, heavy-tailed and narrow columns. Tied values share a quantile.

    References: Gregory and Delbourgo (1982); Durkan et al. (2019), arXiv:1906.04032.
    """
    return Partial(maps.normal.fit, data)


def whiten(data: Float[Numbers, "rows *event"]) -> Partial:
    """Standardize each column, then multiply by the inverse root of the correlation matrix.

    An untrained flow is then the normal distribution with the mean and the covariance of the data:
    a good start for few rows.

    Raises:
        ValueError: by `bind`, if the covariance is singular.
    """
    return Partial(maps.whiten.fit, data)
