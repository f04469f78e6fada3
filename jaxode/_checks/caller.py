"""The name of the public function that is running, with which its messages start."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_caller: ContextVar[str] = ContextVar("caller", default="jaxode")


def caller() -> str:
    """The innermost public function."""
    return _caller.get()


def arg(name: str, value: object = ...) -> str:
    """The start of a message about an argument: `solve(ts=...):`, or with its value."""
    return f"{_caller.get()}({name}={'...' if value is ... else repr(value)}):"


def public(
    name: str, within: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> Callable[[F], F]:
    """The decorator of a public function, which messages call `name`.

    `""` stands for the class of the first argument, in a method that makes an object. The function
    runs `within()`, such as at another precision; a second decorator would shift the `stacklevel`
    of its warnings.
    """

    def decorate(f: F) -> F:
        @functools.wraps(f)
        def run(*args, **kwargs):
            token = _caller.set(name or type(args[0]).__name__)
            try:
                with within():
                    return f(*args, **kwargs)
            finally:
                _caller.reset(token)

        return cast(F, run)

    return decorate
