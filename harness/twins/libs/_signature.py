"""Twins with a library's signature: up to forty parameters, written as the library writes them, handed over as one object."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from types import SimpleNamespace
from typing import Any

Function = Callable[..., Any]


def signed(text: str, names: Mapping[str, object]) -> Callable[[Callable[[SimpleNamespace], Any]], Function]:
    """Makes `twin(arguments)` a function with the parameters `text`, whose defaults may use `names`; arguments that do not
    fit are a TypeError, as Python raises it."""
    signature = inspect.signature(eval(f"(lambda {text}: None)", dict(names)))

    def sign(twin: Callable[[SimpleNamespace], Any]) -> Function:
        @wraps(twin)
        def function(*given: Any, **named: Any) -> Any:
            try:
                bound = signature.bind(*given, **named)
            except TypeError as error:
                raise TypeError(f"{twin.__name__}() {error}") from error
            bound.apply_defaults()
            return twin(SimpleNamespace(**bound.arguments))

        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return sign
