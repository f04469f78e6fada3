"""Problems of PEtab: the likelihood of a small one, its gradient, its estimate, and bad input."""

from pathlib import Path

import jax
import jax.numpy as jnp
import libsbml
import numpy as np
import pytest
from scipy.integrate import solve_ivp
from scipy.stats import laplace, norm

import jaxode
from jaxode.petab.formulas import Names, evaluate, parsed

# Two species in a compartment of size 2, of which A is fed until t = 3. B is an amount.
REACTIONS = {
    "turn": ("A", "B", "volume * rate(A, k)"),
    "decay": ("B", None, "part * slow * B"),
    "feed": (None, "A", "volume * dose * piecewise(1, time < until, 0)"),
}
FILES = {
    "parameters": """\
        parameterId parameterScale lowerBound upperBound nominalValue estimate
        k           log10          0.01       100        0.8          1
        slow        lin            0          10         0.3          1
        scale       log            0.1        10         1.5          1
        noise       log10          0.001      10         0.2          1
        high        lin            0          5          2.0          0""",
    "conditions": """\
        conditionId dose A   until
        before      0.5  -   1e9
        low         1.0  -   3
        high        high 3.0 3""",
    "observables": """\
        observableId observableFormula           observableTransformation noiseFormula noiseDistribution
        amount       observableParameter1_amount*B log10                  noise        normal
        total        A*volume+B                  lin                      noiseParameter1_total+0.1*A laplace""",
    "measurements": """\
        observableId preequilibrationConditionId simulationConditionId measurement time observableParameters noiseParameters
        amount       before                      low                   2.0         0    scale                -
        amount       before                      low                   4.0         2    scale                -
        amount       before                      low                   4.5         2    2.0                  -
        total        before                      low                   5.0         2    -                    noise
        total        before                      low                   2.0         6    -                    0.3
        amount       before                      high                  7.0         4    scale                -
        total        -                           high                  7.5         4    -                    noise
        total        -                           high                  6.1         inf  -                    noise""",
}


def model() -> str:
    """The model in SBML."""
    document = libsbml.SBMLDocument(3, 1)
    made = document.createModel()
    formula = lambda text: libsbml.parseL3Formula(text)
    definition = made.createFunctionDefinition()
    definition.setId("rate")
    definition.setMath(formula("lambda(x, by, x * by)"))
    compartment = made.createCompartment()
    compartment.setId("volume")
    compartment.setConstant(True)
    compartment.setSize(2.0)
    for name, by_amount in (("A", False), ("B", True)):
        species = made.createSpecies()
        species.setId(name)
        species.setCompartment("volume")
        species.setHasOnlySubstanceUnits(by_amount)
        species.setBoundaryCondition(False)
        species.setConstant(False)
        species.setInitialAmount(1.0)
    assignment = made.createInitialAssignment()
    assignment.setSymbol("B")
    assignment.setMath(formula("2 * A"))
    for name, value in {"k": 1.0, "slow": 1.0, "dose": 0.0, "until": 3.0}.items():
        parameter = made.createParameter()
        parameter.setId(name)
        parameter.setConstant(True)
        parameter.setValue(value)
    for name, (reactant, product, law) in REACTIONS.items():
        reaction = made.createReaction()
        reaction.setId(name)
        reaction.setReversible(False)
        reaction.setFast(False)
        for side, of in ((reaction.createReactant, reactant), (reaction.createProduct, product)):
            if of:
                reference = side()
                reference.setSpecies(of)
                reference.setStoichiometry(1.0)
                reference.setConstant(True)
        kinetic = reaction.createKineticLaw()
        kinetic.setMath(formula(law))
        local = kinetic.createLocalParameter()
        local.setId("part")
        local.setValue(2.0)
    return libsbml.writeSBMLToString(document)


def written(folder: Path, change: dict[str, tuple[str, str]] = {}) -> Path:
    """A problem in `folder`, with one text for another in some of its files."""
    yaml = "format_version: 1\nparameter_file: parameters.tsv\nproblems:\n- sbml_files: [model.xml]\n"
    yaml += "".join(f"  {name[:-1]}_files: [{name}.tsv]\n" for name in list(FILES)[1:])
    files = {"problem.yaml": yaml, "model.xml": model()}
    for name, text in FILES.items():
        lines = [line.split() for line in text.splitlines()]
        files[f"{name}.tsv"] = "\n".join("\t".join(line).replace("-", "") for line in lines)
    for name, text in files.items():
        for old, new in [change[name]] if name in change else []:
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)
    return folder / "problem.yaml"


@pytest.fixture(scope="module")
def problem(tmp_path_factory):
    return jaxode.petab.load(written(tmp_path_factory.mktemp("petab")))


def states(p: dict[str, float], start: list[float], dose: float, until: float, t: float):
    """Concentration of A and amount of B at time t, by SciPy."""
    y, reached = np.array(start), 0.0
    for end, feed in ((min(t, until), dose), (t, 0.0)):
        slope = lambda _, y: [feed - p["k"] * y[0], 2 * p["k"] * y[0] - 2 * p["slow"] * y[1]]
        if end > reached:
            y = solve_ivp(slope, (reached, end), y, "LSODA", rtol=1e-10, atol=1e-12).y[:, -1]
            reached = end
    return y


def by_hand(p: dict[str, float]) -> float:
    """Minus the log-likelihood."""
    settled = [0.5 / p["k"], 0.5 / p["slow"]]
    rows = {"low": (settled, 1.0), "high": ([3.0, settled[1]], 2.0), "alone": ([3.0, 6.0], 2.0)}
    amounts = [
        ("low", 2.0, 0, p["scale"]), ("low", 4.0, 2, p["scale"]), ("low", 4.5, 2, 2.0),
        ("high", 7.0, 4, p["scale"]),
    ]  # fmt: skip
    totals = [
        ("low", 5.0, 2, p["noise"]), ("low", 2.0, 6, 0.3), ("alone", 7.5, 4, p["noise"]),
        ("alone", 6.1, 1e3, p["noise"]),
    ]  # fmt: skip
    total = 0.0
    for row, measured, t, factor in amounts:
        _, b = states(p, *rows[row], 3.0, t)
        total -= norm.logpdf(np.log10(measured), np.log10(factor * b), p["noise"])
        total += np.log(measured * np.log(10))
    for row, measured, t, noise in totals:
        a, b = states(p, *rows[row], 3.0, t)
        total -= laplace.logpdf(measured, 2 * a + b, noise + 0.1 * a)
    return total


NOMINAL = {"k": 0.8, "slow": 0.3, "scale": 1.5, "noise": 0.2}


def test_the_likelihood_is_that_of_scipy(problem):
    assert problem.names == list(NOMINAL)
    # Of eight measurements, with solves at a relative tolerance of 1e-8.
    np.testing.assert_allclose(problem.nll(problem.nominal), by_hand(NOMINAL), rtol=1e-6)
    moved = problem.nominal | {"k": jnp.asarray(0.1), "scale": jnp.asarray(-0.2)}
    linear = NOMINAL | {"k": 10**0.1, "scale": np.exp(-0.2)}
    np.testing.assert_allclose(problem.nll(moved), by_hand(linear), rtol=1e-6)


def test_its_gradient_is_that_of_finite_differences(problem):
    gradient = jax.grad(problem.nll)(problem.nominal)
    for name in problem.names:
        up, down = (
            problem.nll(problem.nominal | {name: problem.nominal[name] + step})
            for step in (1e-4, -1e-4)
        )
        # The solves of both differ by some 1e-7, which 2e-4 divides.
        np.testing.assert_allclose(gradient[name], (up - down) / 2e-4, rtol=1e-3, atol=1e-3)
