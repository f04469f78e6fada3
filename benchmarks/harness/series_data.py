"""Irregular series for the benchmark: a linear system, predators and prey, MuJoCo's hopper, and
PhysioNet 2012.

The files of PhysioNet 2012 (Silva et al. 2012) are read from the folder that the environment
variable `PHYSIONET_2012` names: `set-a` and `set-b` with a text file for each patient, and
`Outcomes-a.txt` and `Outcomes-b.txt`.
"""

import functools
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.integrate import solve_ivp
from scipy.linalg import expm, solve_continuous_lyapunov

Array = Any  # of NumPy
FOLDER = "PHYSIONET_2012"
STATIC = ("Age", "Gender", "Height", "ICUType")
CHANNELS = (
    "Weight", "Albumin", "ALP", "ALT", "AST", "Bilirubin", "BUN", "Cholesterol", "Creatinine",
    "DiasABP", "FiO2", "GCS", "Glucose", "HCO3", "HCT", "HR", "K", "Lactate", "Mg", "MAP",
    "MechVent", "Na", "NIDiasABP", "NIMAP", "NISysABP", "PaCO2", "PaO2", "pH", "Platelets",
    "RespRate", "SaO2", "SysABP", "Temp", "TroponinI", "TroponinT", "Urine", "WBC",
)  # fmt: skip
NUMBER = {name: i for i, name in enumerate(CHANNELS)}
HOURS = 48.0


class Series(NamedTuple):
    """Rows of `fit`, with what is known of each."""

    ts: Array
    ys: Array
    context: Array | None = None
    died: Array | None = None
    """`[rows]`: in hospital."""
    exact: Array | None = None
    """Values without noise."""

    def rows(self, chosen: Array) -> "Series":
        return Series(*(None if leaf is None else leaf[chosen] for leaf in self))


# A linear system: two states, two channels, white noise.
DRIFT = np.array([[-0.25, 2.0], [-2.0, -0.25]])
READOUT = np.array([[1.0, 0.0], [0.5, 1.0]])
NOISE = np.diag([0.02, 0.045])  # variances
STATIONARY = solve_continuous_lyapunov(DRIFT, -0.15 * np.eye(2))


def _transition(dt: float) -> tuple[Array, Array]:
    move = expm(DRIFT * dt)
    return move, STATIONARY - move @ STATIONARY @ move.T


def linear(rows: int, seed: int) -> Series:
    """15 to 30 random times, 45% of the values missing."""
    rng, most = np.random.default_rng(seed), 30
    ts, ys = np.zeros((rows, most)), np.full((rows, most, 2), np.nan)
    for i in range(rows):
        count = rng.integers(15, most + 1)
        times = np.sort(rng.uniform(0, 6.0, count))
        ts[i], ts[i, :count] = times[-1], times
        x = np.linalg.cholesky(STATIONARY) @ rng.standard_normal(2)
        for j in range(count):
            if j:
                move, spread = _transition(times[j] - times[j - 1])
                root = np.linalg.cholesky(spread + 1e-12 * np.eye(2))
                x = move @ x + root @ rng.standard_normal(2)
            ys[i, j] = READOUT @ x + np.sqrt(np.diag(NOISE)) * rng.standard_normal(2)
        drop = rng.random((count, 2)) < 0.45
        both = drop.all(1)
        drop[both, rng.integers(0, 2, both.sum())] = False
        ys[i, :count][drop] = np.nan
    return Series(ts, ys)


def kalman(data: Series) -> Array:
    """Nats of each row of `linear` by its law."""
    nats = np.zeros(len(data.ts))
    for i, (ts, ys) in enumerate(zip(data.ts, data.ys, strict=True)):
        mean, spread, last = np.zeros(2), STATIONARY, ts[0]
        for t, y in zip(ts, ys, strict=True):
            there = ~np.isnan(y)
            if not there.any():
                continue
            move, noise = _transition(t - last)
            mean, spread, last = move @ mean, move @ spread @ move.T + noise, t
            readout = READOUT[there]
            of_y = readout @ spread @ readout.T + NOISE[np.ix_(there, there)]
            error = y[there] - readout @ mean
            nats[i] -= 0.5 * np.linalg.slogdet(2 * np.pi * of_y)[1]
            nats[i] -= 0.5 * error @ np.linalg.solve(of_y, error)
            gain = spread @ readout.T @ np.linalg.inv(of_y)
            mean, spread = mean + gain @ error, spread - gain @ readout @ spread
    return nats


def predators(rows: int, seed: int) -> Series:
    """Predators and prey (Lotka-Volterra) at 20 to 60 random times, with noise of 0.1."""
    rng, most = np.random.default_rng(seed), 60
    ts, exact = np.zeros((rows, most)), np.full((rows, most, 2), np.nan)
    ys = exact.copy()
    for i in range(rows):
        count = rng.integers(20, most + 1)
        times = np.sort(rng.uniform(0, 16, count))
        slope = lambda t, y: [y[0] * (1 - y[1]), y[1] * (y[0] - 1)]
        start = rng.uniform(0.25, 2.75, 2)
        found = solve_ivp(slope, (0, 16), start, t_eval=times, rtol=1e-8, atol=1e-8)
        exact[i, :count] = found.y.T
        ts[i], ts[i, :count] = times[-1], times
        ys[i, :count] = exact[i, :count] + 0.1 * rng.standard_normal((count, 2))
    return Series(ts, ys, exact=exact)


def hopper(rows: int, seed: int) -> Series:
    """MuJoCo's hopper thrown and left alone, as Rubanova et al. (2019) simulate it: 200 steps of 7
    positions and 7 velocities; of the first half, half of the times are seen. Channels are scaled
    to [0, 1]. It needs `pip install dm-control 'mujoco<4'`."""
    try:
        from dm_control import suite
    except ImportError:
        sys.exit("Simulate the hopper with `pip install dm-control 'mujoco<4'`.")
    physics, rng, steps = suite.load("hopper", "stand").physics, np.random.default_rng(seed), 200
    ys = np.zeros((rows, steps, 14))
    for i in range(rows):
        with physics.reset_context():
            physics.data.qpos[:2] = rng.uniform(0, 0.5, 2)
            physics.data.qpos[2:] = rng.uniform(-2, 2, 5)
            physics.data.qvel[:] = rng.uniform(-5, 5, 7)
        for j in range(steps):
            ys[i, j] = np.concatenate([physics.data.qpos, physics.data.qvel])
            physics.step()
    low, high = ys.min((0, 1)), ys.max((0, 1))
    ys = (ys - low) / (high - low)
    half = steps // 2
    order = np.argsort(rng.random((rows, half)), axis=1)[:, : half // 2]
    first = np.sort(order, axis=1)
    seen = np.concatenate([first, np.broadcast_to(np.arange(half, steps), (rows, half))], axis=1)
    return Series(seen / steps, np.take_along_axis(ys, seen[..., None], axis=1))


@functools.cache
def _lines() -> tuple[Array, Array, Array]:
    """Of all patients: their static values and deaths; the patient, minute, channel and value of
    each line. -1 is missing."""
    if FOLDER not in os.environ:
        sys.exit(f"Set {FOLDER} to a folder with set-a, set-b, Outcomes-a.txt and Outcomes-b.txt.")
    folder = Path(os.environ[FOLDER])
    outcomes = {}
    for name in ("a", "b"):
        for line in (folder / f"Outcomes-{name}.txt").read_text().split()[1:]:
            numbers = line.split(",")
            outcomes[numbers[0]] = float(numbers[-1])
    static, died, lines = [], [], []
    paths = sorted(path for name in ("set-a", "set-b") for path in (folder / name).glob("*.txt"))
    for patient, path in enumerate(paths):
        known = dict.fromkeys(STATIC, -1.0)
        for line in path.read_text().split()[1:]:
            at, name, value = line.split(",")
            if name in known:
                known[name] = float(value)
            elif name in NUMBER and float(value) >= 0:
                minute = 60 * int(at[:-3]) + int(at[-2:])
                lines.append((patient, minute, NUMBER[name], float(value)))
        static.append(list(known.values()))
        died.append(outcomes[path.stem])
    return np.array(static), np.array(died), np.array(lines)


def patients(minutes: int) -> Series:
    """PhysioNet 2012 in hours, rounded to so many minutes; values of one time are averaged."""
    static, died, lines = _lines()
    patient, channel = lines[:, 0].astype(int), lines[:, 2].astype(int)
    tick = np.round(lines[:, 1] / minutes).astype(int)
    values = lines[:, 3]
    most = int(HOURS * 60 / minutes) + 2
    own, place = np.unique(patient * most + tick, return_inverse=True)
    owner = own // most
    counts = np.bincount(owner, minlength=len(static))
    ends = np.cumsum(counts)
    column = np.arange(len(own)) - np.repeat(ends - counts, counts)
    shape = len(static), counts.max(), len(CHANNELS)
    total, count = np.zeros(shape), np.zeros(shape)
    where = owner[place], column[place], channel
    np.add.at(total, where, values)
    np.add.at(count, where, 1)
    ts = np.zeros(shape[:2])
    ts[owner, column] = (own % most) * (minutes / 60)
    ts = np.maximum.accumulate(ts, axis=1)  # repeats the last time
    ys = np.where(count > 0, total / np.maximum(count, 1), np.nan)
    kept = counts > 0
    return Series(ts, ys, _context(static), died).rows(kept)


def _context(static: Array) -> Array:
    """Age, sex, height, the type of the unit, and what is missing."""
    known, unit = static[:, :3], static[:, 3]
    missing = known < 0
    center = (known * ~missing).sum(axis=0) / np.maximum((~missing).sum(axis=0), 1)
    of_unit = unit[:, None] == np.arange(1, 5)
    return np.concatenate([np.where(missing, center, known), missing[:, 1:], of_unit], axis=1)


class Cut(NamedTuple):
    """Series cut at a time."""

    ts: Array
    past: Array
    """`[rows, times, channels]`: NaN after the cut."""
    at: Array
    """`[rows, later times]`, padded by the last one."""
    later: Array
    """`[rows, later times, channels]`, NaN where nothing was seen."""
    context: Array | None
    exact: Array | None


def cut_at(data: Series, cut: float) -> Cut:
    """Of the rows that have values on both sides."""
    seen = ~np.isnan(data.ys).all(axis=2)
    data = data.rows((seen & (data.ts <= cut)).any(axis=1) & (seen & (data.ts > cut)).any(axis=1))
    after = ~np.isnan(data.ys).all(axis=2) & (data.ts > cut)
    order = np.argsort(~after, axis=1, kind="stable")[:, : after.sum(axis=1).max()]
    at = np.take_along_axis(np.where(after, data.ts, -np.inf), order, axis=1)
    later = lambda y: np.take_along_axis(
        np.where(after[..., None], y, np.nan), order[..., None], axis=1
    )
    past = np.where((data.ts > cut)[..., None], np.nan, data.ys)
    exact = None if data.exact is None else later(data.exact)
    at = np.maximum.accumulate(at, axis=1)
    return Cut(data.ts, past, at, later(data.ys), data.context, exact)


def last_values(past: Array) -> Array:
    """`[rows, channels]`: NaN for a channel that was never seen."""
    last = past.shape[1] - 1 - np.argmax(~np.isnan(past)[:, ::-1], axis=1)
    return np.take_along_axis(past, last[:, None], axis=1)[:, 0]
