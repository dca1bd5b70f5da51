"""Training checkpoints without pickle: one safetensors file with the tensors and, as metadata, a JSON tree.

A sha256 over both is in the metadata too, so that a damaged checkpoint is refused instead of trained on.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tetra.errors import FileFormatError, TrainingError
from tetra.files import content_hash

FORMAT_VERSION = 1
_KIND = "tetra-training-checkpoint"
_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"


def _encode(value: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    if isinstance(value, torch.Tensor):
        while path in tensors:  # keys 1 and "1", or one with a slash
            path += "'"
        # A copy of its own: safetensors refuses tensors that share storage.
        tensors[path] = value.detach().cpu().clone().contiguous()
        return {_TENSOR: path}
    if isinstance(value, dict):
        return {_PAIRS: [[k, _encode(v, tensors, f"{path}/{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, f"{path}/{i}") for i, v in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TrainingError(f"checkpoint: '{path}' is a {type(value).__name__}, which JSON can't hold")


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if isinstance(value, dict):
        if _TENSOR in value:
            return tensors[value[_TENSOR]]
        if _TUPLE in value:
            return tuple(_decode(v, tensors) for v in value[_TUPLE])
        return {k: _decode(v, tensors) for k, v in value[_PAIRS]}
    return value


def save_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write atomically: a crash or a full disk leaves the previous checkpoint as it was.

    Raises:
        TrainingError: the disk is full or the folder can't be written.
    """
    tensors: dict[str, torch.Tensor] = {}
    tree = json.dumps(_encode(checkpoint, tensors, ""))
    metadata = {
        "kind": _KIND,
        "format_version": str(FORMAT_VERSION),
        "content_hash": content_hash({"tree": tree}, tensors),
        "tree": tree,
    }
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary, metadata=metadata)
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{path}: checkpoint can't be written ({error}); free some space or choose another folder, then resume"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what :func:`save_checkpoint` wrote.

    Raises:
        FileFormatError: the file is missing, truncated, altered, of another kind or from a newer release.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as error:
        raise FileFormatError(
            f"{path}: not a readable checkpoint ({error}); remove it to begin the stage anew"
        ) from None
    if metadata.get("kind") != _KIND:
        raise FileFormatError(f"{path}: not a training checkpoint; expected one that training wrote")
    version, tree = metadata.get("format_version", "0"), metadata.get("tree", "")
    if not version.isdecimal() or int(version) > FORMAT_VERSION:
        raise FileFormatError(
            f"{path}: checkpoint format {version}, this release reads up to {FORMAT_VERSION}; upgrade, or start anew"
        )
    claimed = metadata.get("content_hash")
    if claimed is not None and claimed != content_hash({"tree": tree}, tensors):
        raise FileFormatError(
            f"{path}: altered since it was written, its hash does not match; remove it to begin the stage anew"
        )
    try:
        checkpoint: dict[str, Any] = _decode(json.loads(tree), tensors)
    except (KeyError, TypeError, ValueError) as error:
        raise FileFormatError(f"{path}: damaged checkpoint ({error}); remove it to begin the stage anew") from None
    return checkpoint


class SafetensorsCheckpointIO(CheckpointIO):
    """Lets Lightning read and write checkpoints as safetensors."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        save_checkpoint(checkpoint, Path(path))

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        Path(path).unlink(missing_ok=True)
