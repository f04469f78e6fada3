"""What a benchmark ran on, and which code it measured."""

import contextlib
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

ROOT = Path(__file__).parents[2]
PACKAGES = (
    "jaxode", "jax", "jaxlib", "diffrax", "optax", "optimistix", "scipy", "torch",
    "torchdiffeq", "torchode", "zuko", "torchcfm", "flowjax", "scikit-learn", "jflows", "bijx",
    "ngboost", "quantile-forest", "treeffuser", "ctgan", "arfpy",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Hardware, threads and versions. `BENCH_MACHINE` in the environment overrides the name."""
    device, cores = jax.devices()[0], core_count()
    kind = f"{cpu()} {cores} cores" if device.platform == "cpu" else device.device_kind
    return {
        "name": os.environ.get("BENCH_MACHINE") or slug(kind),
        "kind": device.platform,
        "device": kind,
        "cores": cores,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
        "threads": {"jax": cores, "torch": _torch_threads()},
    }


def core_count() -> int:
    """Of this process; macOS binds none to cores."""
    bound = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if bound else os.cpu_count() or 1


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def slug(text: str) -> str:
    text = re.sub(r"\((r|tm|c)\)|cpu|@.*ghz", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def cpu() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _torch_threads() -> int | None:
    try:
        import torch
    except ImportError:
        return None
    return torch.get_num_threads()


def code() -> str:
    """The commit that is measured, so that a file with results of several says so."""
    git = ["git", "-C", str(ROOT)]
    head, changed = ["rev-parse", "--short", "HEAD"], ["diff", "HEAD", "--", "jaxode", "*.py"]
    try:
        commit, diff = (
            subprocess.run([*git, *command], capture_output=True, text=True).stdout.strip()
            for command in (head, changed)
        )
    except FileNotFoundError:
        return ""
    return f"{commit} and changes" if diff else commit
