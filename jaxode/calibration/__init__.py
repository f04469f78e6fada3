"""Checks of a conditional density, such as a posterior, on simulations that did not train it.

`theta`, `[simulations, *event]`, are parameters from the prior, and `x` holds what the simulator
made of each: a context with one row for each simulation. `jaxode.plot` draws the results.
"""

from jaxode.calibration.classifier import c2st
from jaxode.calibration.ranks import SBC, sbc
from jaxode.calibration.regions import Coverage, coverage, tarp

__all__ = ["SBC", "Coverage", "c2st", "coverage", "sbc", "tarp"]
