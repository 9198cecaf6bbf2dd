"""Registers attnkit with transformers as soon as transformers' models are imported, before or after attnkit.

transformers has no entry points for attention. ``import attnkit`` therefore leaves a finder on ``sys.meta_path`` that does
nothing but compare one string an import, until ``transformers.modeling_utils`` is loaded.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

TRIGGER = "transformers.modeling_utils"


class _Finder:
    """Finds TRIGGER as everyone would, and registers once it has run."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TRIGGER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def then_register(module: ModuleType) -> None:
            execute(module)
            uninstall()
            _register()

        spec.loader.exec_module = then_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if transformers' models are imported, else once they are."""
    if TRIGGER in sys.modules:
        _register()
    elif _Finder not in sys.meta_path:
        sys.meta_path.insert(0, _Finder)


def uninstall() -> None:
    if _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)


def _register() -> None:
    """A transformers that attnkit does not know must still import: say so, and go on."""
    try:
        module = importlib.import_module("attnkit.integrations.transformers")
        if hasattr(module, "register"):  # not where that very module is what imported transformers: it ends by registering
            module.register()
    except Exception as error:
        warnings.warn(f"attnkit: could not register with transformers ({type(error).__name__}: {error})", stacklevel=2)
