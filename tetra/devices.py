"""Devices that a caller names, which may not be there."""

from __future__ import annotations

import torch


def why_unusable(device: torch.device | str) -> str | None:
    """In one line, why ``device`` can't hold values and give them back; None if it can."""
    try:
        torch.zeros(1, device=device).item()  # a device without memory, such as meta, has no values either
    except (RuntimeError, AssertionError, TypeError) as error:  # torch without CUDA fails an assertion
        return (str(error).strip().splitlines() or [type(error).__name__])[0]
    return None
