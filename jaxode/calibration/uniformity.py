"""Neyman's smooth test of uniformity."""

import numpy as np
from jaxtyping import Float

# The test has the Legendre polynomials up to this degree.
DEGREES = 4
# A p-value below this is a fault.
SIGNIFICANT = 0.01


def components(u: Float[np.ndarray, "n columns"]) -> Float[np.ndarray, "degrees columns"]:
    """Sums of the first Legendre polynomials of levels: independent standard normals, if uniform.

    The first is the shift of the levels, the second their spread.
    """
    z = 2 * u - 1
    polynomials = [np.polynomial.Legendre.basis(degree)(z) for degree in range(1, DEGREES + 1)]
    scales = np.sqrt(2 * np.arange(1, DEGREES + 1) + 1)[:, None]
    return scales * np.sum(polynomials, axis=1) / np.sqrt(len(u))


def p_values(u: Float[np.ndarray, "n columns"]) -> Float[np.ndarray, " columns"]:
    """P-values of uniformity: the sum of squares of the components is chi-square."""
    from scipy.special import gammaincc

    return gammaincc(DEGREES / 2, np.sum(components(u) ** 2, axis=0) / 2)
