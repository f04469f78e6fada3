"""Bijections around a flow: from the units and the support of the data to what the flow sees."""

import math

from jaxode.density.maps import affine, box, normal, of_distrax, of_numpyro, whiten

# Functions that fit a map of columns, and the most columns for which `jaxode.fit` tries it. The
# first, a Gaussian at the start, is often best. The last says what is wrong with data that no map
# fits.
FITS = (whiten.fit, whiten.MOST_WHITENED_COLUMNS), (normal.fit, math.inf), (affine.fit, math.inf)
# Functions that make a map of a support, or return None for a support of another kind.
SUPPORTS = box.support_of, of_distrax.support_of, of_numpyro.support_of
