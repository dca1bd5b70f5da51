"""What to do when numbers are no longer finite: say which layer it was, and keep what is needed to see it again.

A dump is a file like a checkpoint (:mod:`tetra.training.checkpoint`), with
    report: {"step", "where", "seed", "rank", "losses"}
    batch: the tensors that the loader gave
    state_dict: all parameters and buffers
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tetra.errors import TetraError, TrainingError
from tetra.layers import TernaryLinear
from tetra.timing import forced_backend
from tetra.training.checkpoint import save_checkpoint

DUMP = "not-finite.safetensors"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif hasattr(value, "__dataclass_fields__"):
        yield from _tensors(list(vars(value).values()))


def is_finite(value: Any) -> bool:
    """Whether every floating tensor in ``value`` (tensors in dicts, lists, dataclasses) has finite values alone."""
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


def is_refusal(error: ValueError) -> bool:
    """Whether a layer refuses its weight or its input for numbers that are not finite; the message names the layer."""
    return not isinstance(error, TetraError) and "NaN or infini" in str(error)


class _Found(Exception):
    """Ends a forward pass where something has been found."""


@contextmanager
def _watched(module: nn.Module) -> Iterator[None]:
    """Within this context a forward pass ends, with :class:`_Found`, at the first layer whose result is not finite."""

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            if not is_finite(output):
                raise _Found(f"{name} ({type(layer).__name__})")

        return hook

    hooks = [m.register_forward_hook(watch(name)) for name, m in module.named_modules() if name]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def first_bad_layer(module: nn.Module, forward: Callable[[], object]) -> str | None:
    """The first layer below ``module`` from which something that is not finite comes when ``forward`` runs again.

    Layers run one by one, in plain PyTorch, to be told apart; if it doesn't happen then, in the kernels that trained,
    which know blocks and not their layers. None if all results are finite.
    """
    for backend in ("torch", None):
        with _watched(module), forced_backend(backend), torch.no_grad(), torch.compiler.set_stance("force_eager"):
            try:
                forward()
            except _Found as found:
                return f"layer '{found}'"
            except ValueError as error:
                if not is_refusal(error):
                    raise
                return str(error)
            except TrainingError:  # the part of a batch that one process has may teach nothing by itself
                continue
    return None


def bad_names(named: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors that are not finite."""
    return [name for name, tensor in named if tensor is not None and not is_finite(tensor)]


def locate(module: nn.Module, batch: dict[str, Tensor], forward: Callable[[], object]) -> str | None:
    """Where numbers that are not finite come from: the batch, a weight or a layer; None if ``forward`` shows none."""
    bad = bad_names(batch.items())
    if bad:
        return f"the batch: '{bad[0]}' has NaN or infinite values"
    bad = bad_names(module.named_parameters())
    if bad:
        return f"the weight '{bad[0]}', which has NaN or infinite values"
    return first_bad_layer(module, forward)


def bad_term(losses: dict[str, Tensor]) -> str | None:
    """The first term of a loss "loss" that is not finite, or their sum; None if that is finite."""
    if is_finite(losses["loss"]):
        return None
    bad = bad_names((name, value) for name, value in losses.items() if name != "loss")
    return f"the loss '{bad[0]}'" if bad else "the sum of the losses"


def dump(folder: Path, name: str, report: dict[str, Any], batch: dict[str, Tensor], module: nn.Module) -> Path:
    """Write a dump, atomically, and give its path."""
    path = folder / name
    # JSON has no NaN.
    report = {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in report.items()}
    save_checkpoint({"report": report, "batch": dict(batch), "state_dict": module.state_dict()}, path)
    return path


def zero_share(model: nn.Module) -> float:
    """Share of the ternary weights that are 0 when quantised: |W| < mean |W| / 2, per layer."""
    n_zero, n = torch.zeros(()), 0
    for layer in model.modules():
        if isinstance(layer, TernaryLinear):
            weight = layer.weight.detach().abs()
            n_zero = n_zero.to(weight.device) + (weight <= 0.5 * weight.mean().clamp(min=1e-5)).sum()
            n += weight.numel()
    return float(n_zero) / n if n else 0.0


def bit_figures(bits: Tensor) -> dict[str, Tensor]:
    """How well the bits of a batch are used.

    Args:
        bits: bool or uint8 [B, n_bits], B images.

    Returns:
        ``code_entropy``: mean over the bits of their entropy, 1 for bits that are set in half of the images.
        ``stuck_bits``: share of the bits that are the same in 98% of the images or more.
    """
    share = bits.float().mean(0)
    entropy = -(torch.xlogy(share, share) + torch.xlogy(1 - share, 1 - share)) / math.log(2)
    return {"code_entropy": entropy.mean(), "stuck_bits": ((share < 0.02) | (share > 0.98)).float().mean()}
