"""Where a model's bytes go: in its file, and in memory while it runs.

Items: ``ternary`` (2-bit codes and their scales), ``full_precision`` (the rest of the backbone: stem, norms,
biases, embeddings, unquantised blocks), ``head``; in a file also ``overhead`` (the header). They add up to
``total``.
"""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tetra.files import load, read_header
from tetra.model import TetraModel


def item_of(name: str) -> str:
    """The item that the tensor ``name`` of a packed model's state belongs to."""
    if name.startswith("head."):
        return "head"
    return "ternary" if name.endswith((".packed", ".weight_scale")) else "full_precision"


def _sum_by_item(sizes: dict[str, int]) -> dict[str, int]:
    items = {"ternary": 0, "full_precision": 0, "head": 0}
    for name, n_bytes in sizes.items():
        items[item_of(name)] += n_bytes
    return items


def file_bytes(name_or_path: str | Path) -> dict[str, int]:
    """Bytes of a packed model's file by item; ``total`` is the size of the file.

    Raises:
        FileFormatError, ConfigError: as :func:`tetra.files.read_header`.
    """
    header = read_header(name_or_path)
    items = _sum_by_item(header.tensor_bytes)
    return {**items, "overhead": header.file_bytes - sum(items.values()), "total": header.file_bytes}


def _storage_bytes(tensor: Tensor) -> int:
    # The whole storage: a slice of a large tensor keeps all of it in memory.
    return tensor.untyped_storage().nbytes()


def memory_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes that the parameters and buffers of a live packed model hold, by item; shared storage once."""
    sizes: dict[str, int] = {}
    seen: set[int] = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        address = tensor.untyped_storage().data_ptr()
        if address not in seen:
            seen.add(address)
            sizes[name] = _storage_bytes(tensor)
    items = _sum_by_item(sizes)
    return {**items, "total": sum(items.values())}


def resident_bytes() -> int | None:
    """Memory that this process occupies now, or None where the system does not say (only Linux does)."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else None


def inspect_model(name_or_path: str | Path) -> dict[str, Any]:
    """Load a model and say what it is and what it takes.

    Returns:
        A dict that JSON can hold: ``path``, ``arch``, ``head``, ``n_parameters``, ``n_ternary``,
        ``image_size`` [height, width], ``n_bits``, ``bytes_per_image``, ``content_hash``, ``tetra_version``,
        ``config``, ``info``, ``file_bytes``, ``memory_bytes``, and ``process_bytes``: how this process grew
        when it loaded the model (``load``) and then saw one image (``first_image``), None if unknown.

    Raises:
        FileFormatError, ConfigError: as :func:`tetra.files.load`.
    """
    header = read_header(name_or_path)
    gc.collect()
    at_start = resident_bytes()
    model = load(header.path)
    gc.collect()
    loaded = resident_bytes()
    _run_once(model)
    gc.collect()
    used = resident_bytes()
    has_head = model.head is not None
    config = model.config
    return {
        "path": str(header.path),
        "arch": config.arch,
        "head": config.head.kind if config.head else None,
        "n_parameters": _n_parameters(model),
        "n_ternary": model.n_ternary(),
        "image_size": list(model.image_size),
        "n_bits": model.n_bits if has_head else None,
        "bytes_per_image": model.n_bits // 8 if has_head else None,
        "content_hash": model.content_hash,
        "tetra_version": header.tetra_version,
        "config": config.to_dict(),
        "info": model.info,
        "file_bytes": file_bytes(header.path),
        "memory_bytes": memory_bytes(model),
        "process_bytes": {
            "load": None if at_start is None or loaded is None else loaded - at_start,
            "first_image": None if loaded is None or used is None else used - loaded,
        },
    }


@torch.inference_mode()
def _run_once(model: TetraModel) -> None:
    model.features(torch.zeros(1, 3, *model.image_size, dtype=torch.uint8))


def _n_parameters(model: TetraModel) -> int:
    """Learned numbers: ternary weights one by one, their scales, and all other parameters."""
    n_scales = sum(name.endswith(".weight_scale") for name, _ in model.named_buffers())
    return model.n_ternary() + n_scales + sum(p.numel() for p in model.parameters())
