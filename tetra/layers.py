"""Layers of the model: ternary linear layers, trainable and packed, and layers that keep their rest dtype.

**Modes never destroy weights.** :class:`TernaryLinear` owns full-precision master weights, and nothing but an
optimiser writes to them: ``train()``, ``eval()``, any lambda, and ``pack()`` in any order leave them as they
are. ``pack()`` returns a new :class:`PackedTernaryLinear`, which can only infer.

**Rest dtype.** Parameters may lie in memory as float16 or bfloat16 while the model computes in float32:
:class:`Linear`, :class:`LayerNorm` and :class:`Conv2d` cast their parameters to the input's dtype at use.

**Two ways to compute.** A module of the backbone is written twice: *composed* of the layers above, which is what
trains, and for *inference*, in fused kernels from :mod:`tetra.kernels`. :func:`run` takes the second wherever a
module is in evaluation mode, so a trained model and its packed copy run the same kernels.

**Training is fused too.** :func:`train_linear` computes a linear layer with the norm, GELU and dropout before it, in
kernels that keep nothing for the backward pass but the layer's input; :func:`add_dropped` and
:func:`train_linear_after` end a residual branch and keep no mask, the second not even the sum. With
``TETRA_BACKEND=torch``, in float64 and while compiling all is composed of plain modules instead: the reference, with
the same gradients where nothing is dropped (the two draw different masks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetra.kernels import (
    blended_linear,
    check_packed,
    layer_norm,
    norm_quantize,
    pack_ternary,
    residual_dropout,
    ternary_linear,
    ternary_linear_int8,
)
from tetra.kernels.backend import backend_for
from tetra.kernels.row_quantize import check_finite_scale
from tetra.quantization import blend_activation, blend_weight, ternarize_weight

Forward = Callable[[Tensor], Tensor]

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""What the kernels for inference compute in; float64, for reference, is always composed."""


def _as(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    return None if parameter is None else parameter.to(x.dtype)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _kernels_take(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    # Autocast chooses dtypes operation by operation, which is the business of training.
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)
    return (dtype or x.dtype) in KERNEL_DTYPES and not autocast


class KeepsFloat32(nn.Module):
    """Module whose buffers in ``float32_buffers`` stay float32 under ``.half()``, ``.to(dtype)`` and the like."""

    float32_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[..., Tensor], recurse: bool = True) -> KeepsFloat32:
        before = {name: self._buffers[name] for name in self.float32_buffers}
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            after = self._buffers[name]
            if buffer is not None and after is not None and after.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(after.device)
        return self


class Linear(nn.Linear):
    """``nn.Linear`` whose parameters are cast to the input's dtype at use."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x.dtype."""
        return F.linear(x, self.weight.to(x.dtype), _as(self.bias, x))


class LayerNorm(nn.LayerNorm):
    """``nn.LayerNorm`` (eps 1e-5) whose parameters are cast to the input's dtype at use."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width], in x.dtype."""
        if _kernels_take(x) and not _wants_gradient(x, self.weight, self.bias):
            return layer_norm(x, self.weight, self.bias, self.eps)
        return F.layer_norm(x, self.normalized_shape, _as(self.weight, x), _as(self.bias, x), self.eps)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d`` whose parameters are cast to the input's dtype at use."""

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] -> [B, out_channels, H', W'], in x.dtype; float32 is float32 on GPUs too."""
        cudnn = torch.backends.cudnn
        if not (x.is_cuda and x.dtype == torch.float32 and cudnn.allow_tf32) or torch.compiler.is_compiling():
            return self._conv_forward(x, self.weight.to(x.dtype), _as(self.bias, x))
        # TF32, cuDNN's default, has 10 bits, which would move codes away from those of every other device.
        cudnn.allow_tf32 = False
        try:
            return self._conv_forward(x, self.weight.to(x.dtype), _as(self.bias, x))
        finally:
            cudnn.allow_tf32 = True


class TernaryLinear(nn.Linear):
    """Linear layer that trains towards ternary weights and int8 activations.

    While training, or while ``lam`` < 1, both operands are blended with their quantised values, with a
    straight-through gradient (see :mod:`tetra.quantization`). In ``eval()`` at ``lam`` = 1 the layer computes
    with the integer product, and so agrees with its packed twin bit for bit.

    Attributes:
        lam: blend factor lambda in [0, 1]; set for a whole model by :func:`set_lambda`.
        layer_name: dotted path inside the model, for error messages.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)
        self.lam = 1.0
        self.layer_name = ""
        self._packed_twin: tuple[Tensor, PackedTernaryLinear] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features].

        Raises:
            ValueError: the weight has NaN or infinite values (while training only on a CPU), or in ``eval()`` at
                lambda 1 the input has; the message names the layer.
        """
        if not self.training and self.lam == 1.0:
            twin = self.twin()
            operands = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
            if torch.is_grad_enabled() and any(t.requires_grad for t in operands):
                exact: Tensor = _ExactStraightThrough.apply(x, self.weight, self.bias, twin)
                return exact
            return twin(x)
        if trains_fused(x, self):
            return train_linear(x, self)
        self.check_weight()
        return F.linear(blend_activation(x, self.lam), blend_weight(self.weight, self.lam), self.bias)

    def check_weight(self) -> None:
        """On a CPU and outside compiled graphs ValueError, which names the layer, if the weight is not finite."""
        if torch.compiler.is_compiling() or self.weight.is_cuda:
            return  # asking for values would cut the graph in two, or wait for the GPU; the trainer sees what comes
        # A sum is finite only if every weight is, and is quicker than a tensor of answers; it may overflow, though.
        weight = self.weight.detach()
        if not torch.isfinite(weight.sum()) and not torch.isfinite(weight).all():
            raise ValueError(f"layer '{self.layer_name or 'TernaryLinear'}': the weight has NaN or infinite values")

    def twin(self) -> PackedTernaryLinear:
        """The packed layer that computes this one in evaluation mode at lambda 1; kept until the weight changes.

        Raises:
            ValueError: as :meth:`pack`.
        """
        # Packing costs many times a comparison; keep the result with the weight that it was made from. Tensors'
        # version counters would not do: fused optimisers and edits of `.data` leave them as they are.
        weight = self.weight.detach()
        seen, twin = self._packed_twin or (None, None)
        same = seen is not None and seen.device == weight.device and seen.dtype == weight.dtype
        if twin is None or seen is None or not same or not torch.equal(seen, weight):
            twin = self.pack()
            self._packed_twin = (weight.clone(), twin)
        twin.bias = None if self.bias is None else nn.Parameter(self.bias.detach(), requires_grad=False)
        return twin

    def pack(self) -> PackedTernaryLinear:
        """The inference twin of this layer; this layer is left as it is.

        Raises:
            ValueError: the weight has NaN or infinite values; the message names the layer.
        """
        name = self.layer_name or "TernaryLinear"
        try:
            codes, scale = ternarize_weight(self.weight)
        except ValueError as error:
            raise ValueError(f"layer '{name}': {error}; it can't be quantised") from None
        if self.bias is not None and not torch.isfinite(self.bias).all():
            raise ValueError(f"layer '{name}': the bias has NaN or infinite values; it can't be packed")
        twin = PackedTernaryLinear(self.in_features, self.out_features, bias=self.bias is not None)
        twin.layer_name = self.layer_name
        twin.packed = pack_ternary(codes)
        twin.weight_scale = scale
        if self.bias is not None:
            twin.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return twin

    def __getstate__(self) -> dict[str, object]:
        state: dict[str, object] = self.__dict__.copy()
        state["_packed_twin"] = None  # derived; copies and checkpoints make their own
        return state

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, lam={self.lam}"


class PackedTernaryLinear(KeepsFloat32):
    """Inference from 2-bit weights: y = (x_q . W_t^T, int32) * scales + bias.

    Buffers: ``packed`` uint8 [out_features, 32 * ceil(in_features / 128)], ``weight_scale`` float32 scalar
    (weight = code * weight_scale). Parameter: ``bias`` [out_features] or None.
    """

    float32_buffers = ("weight_scale",)

    packed: Tensor
    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.layer_name = ""
        n_bytes = 32 * -(-in_features // 128)
        self.register_buffer("packed", torch.zeros(out_features, n_bytes, dtype=torch.uint8))
        self.register_buffer("weight_scale", torch.ones((), dtype=torch.float32))
        self.bias = nn.Parameter(torch.zeros(out_features), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] -> [..., out_features], in x.dtype; activations are quantised per token.

        Raises:
            ValueError: the input has NaN or infinite values; the message names the layer.
        """
        try:
            return ternary_linear(x, self.packed, self.weight_scale, self.bias)
        except ValueError as error:
            raise ValueError(f"layer '{self.layer_name or 'PackedTernaryLinear'}': {error}") from None

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Loads what :meth:`load_state_dict` is given, after a look at the codes: the products take them on trust."""
        packed = state_dict.get(f"{prefix}packed")
        if packed is not None and not packed.is_meta:
            try:
                check_packed(packed, self.in_features)
            except (TypeError, ValueError) as error:
                raise type(error)(f"layer '{prefix.rstrip('.') or 'PackedTernaryLinear'}': {error}") from None
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def norm_linear(
    x: Tensor,
    norm: nn.Module,
    linear: nn.Module,
    *,
    gelu: bool = False,
    residual: Tensor | None = None,
    scaled_columns: int = 0,
    column_scale: float = 1.0,
) -> Tensor:
    """residual + gelu(linear(norm(x))) for inference, in two kernels: x [..., K] -> [..., N] in x.dtype.

    ``norm`` is a LayerNorm, ``linear`` a ternary layer, packed or in evaluation mode at lambda 1.
    The first ``scaled_columns`` outputs are multiplied by ``column_scale``, before the residual is added.

    Raises:
        ValueError: the normalised input has NaN or infinite values; the message names the layer. Only on the CPU:
            elsewhere, and in compiled graphs, such a row of the result is not finite.
    """
    packed = linear.twin() if isinstance(linear, TernaryLinear) else linear
    assert isinstance(packed, PackedTernaryLinear)
    assert isinstance(norm, nn.LayerNorm)
    try:
        x_q, scale = norm_quantize(x, norm.weight, norm.bias, norm.eps)
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            check_finite_scale(scale)
        return ternary_linear_int8(
            x_q,
            scale,
            packed.packed,
            packed.weight_scale,
            packed.bias,
            gelu=gelu,
            residual=residual,
            scaled_columns=scaled_columns,
            column_scale=column_scale,
            out_dtype=x.dtype,
        )
    except ValueError as error:
        raise ValueError(f"layer '{packed.layer_name or 'PackedTernaryLinear'}': {error}") from None


def trains_fused(x: Tensor, module: nn.Module) -> bool:
    """Whether ``module`` trains in this project's kernels on ``x``; else it is composed of plain modules."""
    # In evaluation mode layers are composed, or fused by what infers. The compiler fuses by itself.
    if not module.training or x.dtype not in KERNEL_DTYPES or x.device.type == "meta":
        return False
    return not torch.compiler.is_compiling() and backend_for(x) != "torch"


def train_linear(
    x: Tensor,
    linear: nn.Module,
    norm: nn.Module | None = None,
    *,
    gelu: bool = False,
    dropout: nn.Dropout | None = None,
) -> Tensor:
    """linear(norm(dropout(gelu(x)))) to train with: x [..., K] -> [..., N], in autocast's dtype where that is on.

    Args:
        x: float [..., K].
        linear: a linear layer: ternary, which blends at its lambda, or of full precision.
        norm: a LayerNorm; None, or an identity, for none.
        gelu: apply the exact GELU first.
        dropout: acts after it, in training mode.

    Raises:
        ValueError: the weight of a ternary layer has NaN or infinite values; the message names the layer.
    """
    if not trains_fused(x, linear):
        for step in (F.gelu if gelu else None, dropout, norm, linear):
            x = x if step is None else step(x)
        return x
    assert isinstance(linear, nn.Linear)
    p, seed = _drawn(dropout)
    affine, lam = _affine_of(norm), _lambda_of(linear)
    return blended_linear(x, linear.weight, linear.bias, lam, norm=affine, gelu=gelu, dropout=p, seed=seed)


def train_linear_after(
    x: Tensor, branch: Tensor, dropout: nn.Dropout, linear: nn.Module, norm: nn.Module
) -> tuple[Tensor, Tensor]:
    """linear(norm(total)) and total = x + dropout(branch), the stream after a residual branch, to train with.

    Of the fused kernels, which keep ``branch`` and ``x`` for the backward pass instead of the sum: only where
    :func:`trains_fused`. x, branch [..., K] -> [..., N], [..., K].

    Raises:
        ValueError: as :func:`train_linear`.
    """
    assert isinstance(linear, nn.Linear)
    affine, lam = _affine_of(norm), _lambda_of(linear)
    return blended_linear(x, linear.weight, linear.bias, lam, norm=affine, branch=(branch, *_drawn(dropout)))


def add_dropped(residual: Tensor | None, y: Tensor, dropout: nn.Dropout) -> Tensor:
    """residual + dropout(y), [..., K], in the wider dtype of the two; without a mask where :func:`trains_fused`."""
    if trains_fused(y, dropout):
        return residual_dropout(residual, y, *_drawn(dropout))
    dropped: Tensor = dropout(y)
    return dropped if residual is None else residual + dropped


def _drawn(dropout: nn.Dropout | None) -> tuple[float, int]:
    """What share is dropped, and a seed for it.

    From the CPU's generator on every device: no waiting, and a step that is seeded repeats its masks.
    """
    p = dropout.p if dropout is not None and dropout.training else 0.0
    return p, int(torch.randint(2**63 - 1, ())) if p else 0


def _affine_of(norm: nn.Module | None) -> tuple[Tensor, Tensor, float] | None:
    assert norm is None or isinstance(norm, (nn.LayerNorm, nn.Identity))
    return (norm.weight, norm.bias, norm.eps) if isinstance(norm, nn.LayerNorm) else None


def _lambda_of(linear: nn.Linear) -> float:
    """0 for a layer of full precision. ValueError, which names the layer, for a ternary weight that is not finite."""
    if not isinstance(linear, TernaryLinear):
        return 0.0
    linear.check_weight()
    return linear.lam


class _ExactStraightThrough(torch.autograd.Function):
    """The integer product forward; backward as if both operands were their quantised values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, twin: PackedTernaryLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        return twin(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, needs = grads[0], ctx.needs_input_grad
        rows = grad.flatten(0, -2)
        grad_x = grad @ blend_weight(weight, 1.0).to(grad.dtype) if needs[0] else None
        grad_w = rows.T @ blend_activation(x, 1.0).flatten(0, -2).to(grad.dtype) if needs[1] else None
        return grad_x, grad_w, rows.sum(0) if needs[2] else None, None


class _InferenceForward(torch.autograd.Function):
    """Forward by the kernels for inference, backward through the composed layers, which are computed again."""

    @staticmethod
    def forward(ctx: Any, infer: Forward, compose: Forward, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.compose = compose
        ctx.save_for_backward(x, *parameters)
        return infer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        x = x.detach().requires_grad_(ctx.needs_input_grad[2])
        with torch.enable_grad():
            y = ctx.compose(x)
        wanted = [t for t in (x, *parameters) if t.requires_grad]
        found = iter(torch.autograd.grad(y, wanted, grads[0], allow_unused=True))
        return None, None, *(next(found) if t.requires_grad else None for t in (x, *parameters))


def run(module: nn.Module, x: Tensor, infer: Forward, compose: Forward, dtype: torch.dtype | None = None) -> Tensor:
    """``infer(x)`` or ``compose(x)``, two ways to compute ``module``, whichever is right here.

    The layers are composed while the module trains, in float64 and under autocast; else the kernels for inference
    run. Where someone wants a gradient in evaluation mode, it comes from the composed layers.

    Args:
        dtype: what the module computes in; that of ``x`` by default.
    """
    if module.training or not _kernels_take(x, dtype):
        return compose(x)
    parameters = [p for p in module.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
    if parameters or _wants_gradient(x):
        y: Tensor = _InferenceForward.apply(infer, compose, x, *parameters)
        return y
    return infer(x)


def resized(maps: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """``resize(maps)``, some linear way to resample [B, C, rows, columns], with a gradient that repeats to the bit.

    On GPUs PyTorch adds up the gradients of interpolation and pooling in any order.
    """
    return resized_by_product(maps, resize) if maps.is_cuda and _wants_gradient(maps) else resize(maps)


def resized_by_product(maps: Tensor, resize: Callable[[Tensor], Tensor]) -> Tensor:
    """The same as a product with the matrix that single positions show."""
    rows, columns = maps.shape[-2:]
    single = torch.eye(rows * columns, dtype=torch.float32, device=maps.device).view(-1, 1, rows, columns)
    with torch.autocast(maps.device.type, enabled=False):
        found = resize(single)
        out = maps.flatten(2) @ found.flatten(1).to(maps.dtype)
    return out.unflatten(2, found.shape[-2:])


def name_layers(model: nn.Module) -> None:
    """Tell every ternary layer its dotted path, so that errors can name it."""
    for name, module in model.named_modules():
        if isinstance(module, (TernaryLinear, PackedTernaryLinear)):
            module.layer_name = name


def set_lambda(model: nn.Module, lam: float) -> None:
    """Set the blend factor of every :class:`TernaryLinear` in ``model``.

    Raises:
        ValueError: ``lam`` is outside [0, 1].
    """
    if not 0.0 <= lam <= 1.0:
        raise ValueError(f"lambda is {lam}, expected 0 <= lambda <= 1")
    for module in model.modules():
        if isinstance(module, TernaryLinear):
            module.lam = lam
