"""uniref_fast: fast multi-reference image editing.

report = uniref_fast.patch(pipe)                    # the same diffusers pipeline, faster
images = uniref_fast.edit(pipe, [request, ...])     # many different requests in one packed loop
print(uniref_fast.estimate(pipe, [request, ...]))   # tokens, flops, memory before running

Importing the package imports nothing else, PyTorch included: each name is imported when it is first used.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uniref_fast.budget import fit_to_budget
    from uniref_fast.edit import edit
    from uniref_fast.edit_report import EditReport
    from uniref_fast.engine import Engine
    from uniref_fast.estimate import estimate
    from uniref_fast.layout import Sample, SelfLayout
    from uniref_fast.models import PackedQwenImage
    from uniref_fast.patch import PatchReport, patch, unpatch
    from uniref_fast.request import EditRequest

__version__ = "0.1.0.dev0"

__all__ = [
    "EditReport",
    "EditRequest",
    "Engine",
    "PackedQwenImage",
    "PatchReport",
    "Sample",
    "SelfLayout",
    "__version__",
    "edit",
    "estimate",
    "fit_to_budget",
    "patch",
    "unpatch",
]

_MODULE_OF = {  # public name -> module that defines it
    "EditReport": "edit_report",
    "EditRequest": "request",
    "Engine": "engine",
    "PackedQwenImage": "models",
    "PatchReport": "patch",
    "Sample": "layout",
    "SelfLayout": "layout",
    "edit": "edit",
    "estimate": "estimate",
    "fit_to_budget": "budget",
    "patch": "patch",
    "unpatch": "patch",
}
_MODULES = (
    "budget",
    "builtin",
    "encode",
    "layout",
    "loading",
    "models",
    "native",
    "ops",
    "request",
    "tuning",
    "visibility",
)


class _Package(types.ModuleType):
    """Package whose attributes `patch`, `edit` and `estimate` are always the functions, never the modules."""

    def __getattr__(self, name: str) -> Any:
        if name in _MODULE_OF:
            value = getattr(importlib.import_module(f"uniref_fast.{_MODULE_OF[name]}"), name)
        elif name in _MODULES:
            value = importlib.import_module(f"uniref_fast.{name}")
        else:
            raise AttributeError(f"module 'uniref_fast' has no attribute {name!r}")
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MODULE_OF and isinstance(value, types.ModuleType):  # the import system binds a module it loaded
            value = getattr(value, name)
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *__all__, *_MODULES})


sys.modules[__name__].__class__ = _Package
