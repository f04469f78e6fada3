"""The coefficients of Rosenbrock methods: order conditions, one for each rooted tree."""

import itertools
import math

import numpy as np
import pytest
from problems import ROSENBROCK, solver_name

from jaxode.ode.solvers.explicit import method_of


def trees(order):
    """The rooted trees with so many nodes, each as the sorted tuple of its children."""
    if order == 1:
        return {()}
    return {
        tuple(sorted((*tree, child)))
        for size in range(1, order)
        for tree, child in itertools.product(trees(order - size), trees(size))
    }


def size(tree):
    return 1 + sum(map(size, tree))


def density(tree):
    return size(tree) * math.prod(map(density, tree))


def weight(tree, alpha, beta):
    """Of each stage. The Jacobian enters where a node has one child."""
    matrix = beta if len(tree) == 1 else alpha
    product = np.ones(len(alpha))
    for child in tree:
        product = product * (matrix @ weight(child, alpha, beta))
    return product


@pytest.mark.parametrize(("solver", "order", "adaptive"), ROSENBROCK, ids=solver_name)
def test_order_conditions(solver, order, adaptive):
    """Of the step, of the method that estimates its error, and of the dense output.

    Hairer and Wanner (1996), theorem IV.7.4, in their coefficients before the transformation.
    """
    assert adaptive
    tableau, orders = method_of(solver), range(1, order + 1)
    A, C = tableau.A[1:, 1:], tableau.C[1:, 1:]
    gamma = np.linalg.inv(np.eye(len(C)) / tableau.gamma - C)
    alpha = A @ gamma
    close = lambda actual, exact: np.testing.assert_allclose(actual, exact, rtol=0, atol=1e-11)
    close(alpha.sum(1), tableau.c[1:])
    close(gamma.sum(1), tableau.d[1:])
    for tree in itertools.chain(*map(trees, orders)):
        of = lambda b, tree=tree: b[..., 1:] @ gamma @ weight(tree, alpha, alpha + gamma)
        close(of(tableau.b), 1 / density(tree))
        if size(tree) < tableau.error_order:
            close(of(tableau.b_error), 0)
        if size(tree) <= max(order - 1, 2):
            # `theta^size / density`, and nothing of any other power.
            powers = np.arange(1, len(tableau.dense) + 1)
            close(of(tableau.dense), (powers == size(tree)) / density(tree))
