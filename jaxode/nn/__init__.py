"""Networks for vector fields: Equinox modules `m`, called as `m(t, y)` on one sample.

A fresh network has small outputs, so its flow is close to the identity.
`m.value_and_divergence(t, y)` is `(m(t, y), div m)` in closed form, or `NotImplemented` where there
is none. `DeepSet` is no vector field: it maps the context of one, for `jaxode.bind(embed=...)`.
"""

from jaxode.nn.deep_set import DeepSet
from jaxode.nn.ensemble import Ensemble
from jaxode.nn.lattice import Lattice
from jaxode.nn.mixer import Mixer
from jaxode.nn.networks import MLP, Concat, ConcatSquash, PotentialGradient, field, softplus
from jaxode.nn.particles import Particles
from jaxode.nn.residual import Residual

__all__ = [
    "MLP", "Concat", "ConcatSquash", "DeepSet", "Ensemble", "Lattice", "Mixer", "Particles",
    "PotentialGradient", "Residual", "field", "softplus",
]  # fmt: skip
