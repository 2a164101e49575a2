"""All builds of the package, found by importing its modules."""

from __future__ import annotations

import importlib
import pkgutil

import pageflight.kernels
from pageflight.kernels.builds import KernelBuild

TOOLS = {"builds", "catalog", "compile"}
"""Modules that hold no kernels; running `compile` as a program would import it twice."""


def all_builds() -> tuple[KernelBuild, ...]:
    """The `BUILDS` of every module, in the order of module names."""
    names = sorted(module.name for module in pkgutil.iter_modules(pageflight.kernels.__path__))
    modules = [importlib.import_module(f"pageflight.kernels.{name}") for name in names if name not in TOOLS]
    return tuple(build for module in modules for build in getattr(module, "BUILDS", ()))
