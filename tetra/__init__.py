"""TeTRA: ternary vision transformers that recognise places.

``tetra.load("nano")`` gives a packed model; ``model.describe(images)`` gives binary descriptors.
"""

from __future__ import annotations

from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tetra.engine import Engine
    from tetra.files import load, save
    from tetra.model import TetraModel, create_model

_ROOT = _Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    # A checkout keeps kernels/, autotune/ and profiling/ beside tetra/; an installed wheel has them inside.
    __path__.append(str(_ROOT))

__version__ = "0.1.0"
__all__ = ["Engine", "TetraModel", "create_model", "load", "save"]


def __getattr__(name: str) -> Any:
    # Looked up at first use: importing torch takes seconds, which `tetra --help` should not.
    if name in ("load", "save"):
        from tetra import files

        return getattr(files, name)
    if name in ("TetraModel", "create_model"):
        from tetra import model

        return getattr(model, name)
    if name == "Engine":
        from tetra import engine

        return engine.Engine
    raise AttributeError(f"module 'tetra' has no attribute '{name}'")
