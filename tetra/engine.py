"""A model fixed to one batch, image size and dtype, and made ready to run that over and over.

On a GPU an engine records the whole model, from pixels to codes, as CUDA graphs: a call is one copy and one
launch instead of over a hundred. On a CPU it measures, once, which dtype and which kernels are the fastest there.

    engine = Engine(tetra.load("nano"), batch=1).warm_up()
    codes = engine.describe(images)
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from tetra.errors import ImageError
from tetra.kernels.backend import VARIABLE, backend_for, requested, why_not_compiled
from tetra.kernels.measure import measure_cpu
from tetra.layers import KERNEL_DTYPES, Conv2d, Linear
from tetra.model import TetraModel, refuse_non_finite

Outputs = tuple[Tensor, ...]

_CPU_DTYPES = (torch.float32, torch.bfloat16)  # candidates where the caller names none
_GPU_DTYPE = torch.float16
_ROUNDS = 5  # timed passes of each candidate


class Engine:
    """Runs ``model`` on batches of one shape.

    The weights are shared with ``model`` as far as they rest in the dtype and on the device that are asked for;
    the others are cast once and not at every call. Moving or casting the model later leaves the engine alone;
    where shared weights are changed in place (other than through ``.data``, which nobody can see), the engine refuses
    to run. Results are those of the model itself, bit for bit.

    Args:
        model: any model with a head; one that is not packed is packed (and left as it is).
        batch: images a call, at least 1.
        image_size: (height, width); the model's own by default.
        device: where to run; where the model is by default.
        dtype: compute dtype, float32, float16 or bfloat16. By default float16 on a GPU, and on a CPU the
            faster of float32 and bfloat16, measured by :meth:`warm_up`.
        image_dtype: of the images that calls will bring: uint8, or float32 in [0, 1].

    Attributes:
        plan: how calls run, a dict that JSON can hold: ``device``, ``batch``, ``image_size``, ``image_dtype``,
            ``dtype``, ``backend`` of the kernels, ``cuda_graph``; on a CPU also ``threads``, ``measured_ms`` (median
            by dtype, where there was a choice) and ``kernels`` (what was measured of each, and chosen; see
            :func:`tetra.kernels.measure.measure_cpu`). None before :meth:`warm_up`.

    Raises:
        ImageError: ``image_size`` does not fit the model's patches.
        ConfigError: the model has no head.
        ValueError: another argument can not be.
        RuntimeError: the device is a GPU for which there are no compiled kernels; says why.
    """

    def __init__(
        self,
        model: TetraModel,
        batch: int = 1,
        image_size: tuple[int, int] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        image_dtype: torch.dtype = torch.uint8,
    ) -> None:
        if not isinstance(batch, int) or batch < 1:
            raise ValueError(f"batch: is {batch!r}, wanted 1 or more")
        if dtype is not None and dtype not in KERNEL_DTYPES:
            raise ValueError(f"dtype: is {dtype}, wanted one of {', '.join(map(str, KERNEL_DTYPES))}")
        if image_dtype not in (torch.uint8, torch.float32):
            raise ValueError(f"image_dtype: is {image_dtype}, wanted torch.uint8 or torch.float32")
        size = model.image_size if image_size is None else _pixels(image_size)
        model.backbone.grid_of(*size)
        self.n_bits = model.n_bits
        self.device = _with_index(model.image_mean.device if device is None else torch.device(device))
        self.shape = (batch, 3, *size)
        self.image_dtype = image_dtype
        self.plan: dict[str, Any] | None = None
        self._wanted_dtype = dtype
        self._source = model
        self._model: TetraModel | None = None
        self._versions: list[tuple[Tensor, int]] = []
        self._lock = threading.Lock()
        if self.device.type == "cuda":
            _require_compiled_kernels(self.device)

    def warm_up(self) -> Engine:
        """Everything that takes time once: casts, compilation, measured choices, capture. Returns the engine.

        Takes seconds, and minutes where kernels were never compiled for this GPU before. A second call does
        nothing. The choice among a CPU's kernels holds for the whole process, other models included.
        """
        with self._lock:
            if self.plan is None:
                plan = self._prepare_gpu() if self.device.type == "cuda" else self._prepare_cpu()
                assert self._model is not None
                self._versions = _versions(self._model)
                self.plan = plan
                del self._source
        return self

    def __call__(self, images: Tensor) -> Tensor:
        """Descriptors, L2-normalised, float [batch, n_bits] in the compute dtype.

        Args:
            images: [batch, 3, height, width] RGB of the engine's shape, ``image_dtype`` and device.

        Raises:
            ImageError: the images are of another shape, dtype or device.
            RuntimeError: :meth:`warm_up` was not called, or the model's weights were changed in place since.
        """
        return self._run("descriptors", images)[0]

    def describe(self, images: Tensor) -> Tensor:
        """Codes, uint8 [batch, n_bits / 8]: bit = (value > 0), most significant first.

        Args, Raises:
            as for calling the engine; also ValueError for a descriptor with NaN or infinite values.
        """
        codes, finite = self._run("codes", images)
        refuse_non_finite(finite)
        return codes

    def _check(self, images: Tensor) -> None:
        if self.plan is None:
            raise RuntimeError("the engine is not ready: call its warm_up() once, before the first images")
        # Some weights are shared and some cast: of others, a part alone would be seen.
        if any(tensor._version != version for tensor, version in self._versions):
            raise RuntimeError("the model's weights were changed in place after warm_up(); make another engine")
        if tuple(images.shape) != self.shape:
            raise ImageError(
                f"images have shape {tuple(images.shape)}, but this engine is fixed to {self.shape}; "
                "make another one for another shape"
            )
        if images.dtype != self.image_dtype:
            raise ImageError(f"images have dtype {images.dtype}, but this engine is fixed to {self.image_dtype}")
        if images.device != self.device:
            raise ImageError(f"images are on {images.device}, but this engine is on {self.device}; move them")

    def _prepare(self, dtype: torch.dtype) -> TetraModel:
        return _specialised(self._source, self.device, dtype, (self.shape[2], self.shape[3]))

    def _plan(self, dtype: torch.dtype, **more: Any) -> dict[str, Any]:
        return {
            "device": str(self.device),
            "batch": self.shape[0],
            "image_size": [self.shape[2], self.shape[3]],
            "image_dtype": _name(self.image_dtype),
            "dtype": _name(dtype),
            "backend": backend_for(torch.empty(0, device=self.device)),
            **more,
        }

    def _functions(self, model: TetraModel) -> dict[str, Callable[[Tensor], Outputs]]:
        return {"descriptors": lambda images: (model(images),), "codes": model.codes}

    @torch.inference_mode()
    def _run(self, output: str, images: Tensor) -> Outputs:
        self._check(images)
        if self.device.type == "cuda":
            return self._replay(output, images)
        assert self._model is not None
        return self._functions(self._model)[output](images)

    # --- CPU ---

    def _prepare_cpu(self) -> dict[str, Any]:
        images = torch.randint(0, 256, self.shape, dtype=torch.uint8, device=self.device)
        images = images if self.image_dtype == torch.uint8 else images / 255.0
        dtypes = _CPU_DTYPES if self._wanted_dtype is None else (self._wanted_dtype,)
        models = [self._prepare(dtype) for dtype in dtypes]
        backbone = models[0].config.backbone
        tokens = 1 + backbone.grid[0] * backbone.grid[1]
        kernels = [_measure_cpu(dtype, tokens, backbone.inner_dim, backbone.n_heads) for dtype in dtypes]
        with torch.inference_mode():
            seconds = _median_seconds([partial(model.codes, images) for model in models], _ROUNDS if models[1:] else 0)
        best = seconds.index(min(seconds))
        self._model = models[best]
        measured = {_name(dtype): 1e3 * s for dtype, s in zip(dtypes, seconds, strict=True)} if models[1:] else {}
        plan = self._plan(dtypes[best], cuda_graph=False, threads=torch.get_num_threads())
        return {**plan, "measured_ms": measured, "kernels": kernels[best]}

    # --- CUDA graphs ---

    @torch.inference_mode()
    def _prepare_gpu(self) -> dict[str, Any]:
        model = self._prepare(self._wanted_dtype or _GPU_DTYPE)
        functions = self._functions(model)
        self._images = torch.zeros(self.shape, dtype=self.image_dtype, device=self.device)
        self._graphs: dict[str, tuple[torch.cuda.CUDAGraph, Outputs]] = {}
        with torch.cuda.device(self.device):
            self._last_use = torch.cuda.Event()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):  # compiles kernels and fills the libraries' workspaces
                for function in functions.values():
                    for _ in range(3):
                        function(self._images)
            torch.cuda.current_stream().wait_stream(side)
            torch.cuda.synchronize()
            pool = None
            for name, function in functions.items():
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                    outputs = function(self._images)
                # One pool for both: results are copied out before another replay can overwrite them.
                pool = graph.pool()
                self._graphs[name] = (graph, outputs)
            self._last_use.record()
        self._model = model  # whose weights the graphs read
        return self._plan(model.compute_dtype, cuda_graph=True)

    def _replay(self, output: str, images: Tensor) -> Outputs:
        graph, outputs = self._graphs[output]
        # Graphs and their buffers are used by one thread and one stream at a time, in the order of the calls.
        with self._lock, torch.cuda.device(self.device):
            torch.cuda.current_stream().wait_event(self._last_use)
            self._images.copy_(images)
            graph.replay()
            copies = tuple(t.clone() for t in outputs)
            self._last_use.record()
        return copies


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _pixels(image_size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = map(operator.index, image_size)
    except (TypeError, ValueError):
        raise ValueError(f"image_size: is {image_size!r}, wanted (height, width) in whole pixels") from None
    return height, width


def _versions(model: TetraModel) -> list[tuple[Tensor, int]]:
    """The weights, and numbers that go up when they, or tensors that share their memory, are written to."""
    tensors = [*model.parameters(), *model.buffers()]
    return [(t, t._version) for t in tensors if not t.is_inference()]  # which have no such number


def _with_index(device: torch.device) -> torch.device:
    """The device with its number, as tensors have it: "cuda" is the current GPU."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: is {device}, wanted cpu or cuda")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: is {device}, but PyTorch finds no GPU here; wanted cpu")
        return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    return torch.device("cpu")


def _require_compiled_kernels(device: torch.device) -> None:
    if requested() == "torch":
        reason = f"{VARIABLE} is torch"
    else:
        reason = why_not_compiled(device) or ""
    if reason:
        raise RuntimeError(
            f"device: {device} runs without compiled kernels, so there is nothing to record: {reason}; "
            "call the model itself instead"
        )


def _specialised(
    model: TetraModel, device: torch.device, dtype: torch.dtype, image_size: tuple[int, int]
) -> TetraModel:
    """A packed model for one device, dtype and image size, which shares with ``model`` what is already right."""
    if not model.is_packed:
        model = model.pack()
    layers = [m for m in model.modules() if isinstance(m, (Linear, Conv2d))]
    cast = {id(p) for layer in layers for p in layer.parameters() if p.dtype != dtype}
    tensors = [*model.parameters(), *model.buffers()]
    # Other tensors on the same memory: moving or casting the model then leaves the engine's alone.
    shared: dict[int, Any] = {
        id(t): nn.Parameter(t.detach(), requires_grad=False) if isinstance(t, nn.Parameter) else t.detach()
        for t in tensors
        if t.device == device and id(t) not in cast
    }
    own = copy.deepcopy(model, shared).to(device)
    own.compute_dtype = dtype
    for module in own.modules():
        if isinstance(module, (Linear, Conv2d)):
            module.to(dtype)
    backbone = own.backbone
    backbone.resize(image_size)
    own.config = dataclasses.replace(own.config, backbone=backbone.config)
    for name in ("cls_token", "position_embedding"):
        setattr(backbone, name, nn.Parameter(getattr(backbone, name).to(dtype), requires_grad=False))
    return own


_measure_cpu = cache(measure_cpu)  # engines of one shape share a choice


def _median_seconds(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Of each function, taking turns, after a first round that does not count; zeros for no rounds."""
    taken: list[list[float]] = [[] for _ in functions]
    for round_number in range(-1, rounds):
        for function, seconds in zip(functions, taken, strict=True):
            start = time.perf_counter()
            function()
            if round_number >= 0:
                seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds or [0.0]) for seconds in taken]
