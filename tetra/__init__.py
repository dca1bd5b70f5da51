"""TeTRA: ternary vision transformers that recognise places.

``tetra.load("nano")`` gives a packed model; ``model.describe(images)`` gives binary descriptors. A ``PlaceMap`` keeps
those of known places, and a ``Localizer`` says for each frame of a camera which place it shows.
"""

from __future__ import annotations

from importlib import import_module as _import_module
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetra.engine import Engine
    from tetra.files import load, save
    from tetra.localizer import Localizer
    from tetra.model import TetraModel, create_model
    from tetra.place_map import PlaceMap

_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    # A checkout keeps kernels/, autotune/ and profiling/ beside tetra/; an installed wheel has them inside.
    __path__.append(str(_ROOT))

__version__ = "0.1.0"
__all__ = ["Engine", "Localizer", "PlaceMap", "TetraModel", "create_model", "load", "save"]


_HOMES = {
    "Engine": "engine",
    "Localizer": "localizer",
    "PlaceMap": "place_map",
    "TetraModel": "model",
    "create_model": "model",
    "load": "files",
    "save": "files",
}


def __getattr__(name: str) -> Any:
    # Looked up at first use: importing torch takes seconds, which `tetra --help` should not.
    if name in _HOMES:
        return getattr(_import_module(f"tetra.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'tetra' has no attribute '{name}'")
