"""bpdiag: see where your gradient dies, and why.

The public names are loaded on first use, so that ``import bpdiag`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

# name: the module that owns it
_PUBLIC = {
    "Chain": "chain",
    "Config": "config",
    "Finding": "diagnosis",
    "RULES": "rules",
    "Result": "training",
    "Trace": "trace",
    "assert_healthy": "trial",
    "cure": "remedy",
    "diagnose": "diagnosis",
    "handwritten": "swapping",
    "load": "training",
    "notes": "diagnosis",
    "predict": "prediction",
    "train": "training",
    "watch": "session",
}
__all__ = [
    "RULES",
    "Chain",
    "Config",
    "Finding",
    "Result",
    "Trace",
    "assert_healthy",
    "cure",
    "diagnose",
    "handwritten",
    "load",
    "notes",
    "predict",
    "train",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name == "remedy":  # bpdiag.remedy.rescale(...) stands in lines to paste
        return import_module("bpdiag.remedy")
    if name in _PUBLIC:
        return getattr(import_module(f"bpdiag.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'bpdiag' has no attribute {name!r}; public: {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
