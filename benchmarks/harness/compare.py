"""The regression guard: are the ratios to peers still those of the committed results?"""

from collections.abc import Callable, Sequence
from typing import Any

LOSS = 1.25  # a ratio that is larger by more than this has regressed


def with_ratios(committed: dict[str, Any], names: Sequence[str]) -> list[str]:
    """The benchmarks that have ratios to compare: the others need no second run."""
    cases = lambda name: committed["benchmarks"].get(name, {}).values()
    return [m for m in names if any(case.get("ratios") for case in cases(m))]


def regressions(
    committed: dict[str, Any], measured: dict[str, Any], names: Sequence[str]
) -> list[tuple[str, float, float | None]]:
    """What got slower: its name, the committed ratio and the new one, None if it is missing."""
    found = []
    for name in names:
        for case, before in committed["benchmarks"].get(name, {}).items():
            after = measured["benchmarks"].get(name, {}).get(case, {}).get("ratios", {})
            for peer, old in before.get("ratios", {}).items():
                new = after.get(peer)
                if new is None or not new <= LOSS * old:
                    found.append((f"{name}, {case}: {peer}", old, new))
    return found


def check(
    committed: dict[str, Any], measured: dict[str, Any], names: Sequence[str],
    say: Callable[[str], Any],
) -> int:  # fmt: skip
    """The exit status: 1 after a regression, or if there is nothing to compare with."""
    if not any(committed["benchmarks"].get(name) for name in names):
        say("There are no committed ratios of this machine for these benchmarks; see make bench.")
        return 1
    found = regressions(committed, measured, names)
    for name, old, new in found:
        after = "has no ratio now" if new is None else f"is {new:.2f} now"
        say(f"{name}: the ratio was {old:.2f} and {after}")
    if not found:
        say("No ratio to a peer has grown by more than 25%.")
    return int(bool(found))
