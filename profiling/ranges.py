"""Named ranges around what TeTRA does: in Nsight through NVTX, in ``torch.profiler`` through its own annotations.

    from tetra.profiling import ranges
    ranges.enable()          # or TETRA_NVTX=1 for any ``tetra`` command

Nothing of TeTRA knows about it. :data:`HOOKS` lists functions and methods by name; :func:`enable` puts a wrapper in
front of each, and :func:`disable` puts the very same objects back, so that code which is not profiled is the code that
was there before. What is not imported yet gets its wrapper when it is: profiling a search does not load Lightning.

A range has a name ("blocks.3"), a category with a colour, and as payload the shape of the first tensor that goes in
and the bytes of all of them. In code that ``torch.compile`` traces, and in CUDA graphs that are replayed, there is no
Python left to open ranges: see docs/profiling.md.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import importlib.machinery
import os
import re
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Protocol

DOMAIN = "tetra"
VARIABLE = "TETRA_NVTX"
CAPTURE_VARIABLE = "TETRA_NVTX_CAPTURE"
"""``RANGE:SKIP:COUNT``: collect that many ranges of this name, after so many that only warm up."""

COLOURS = {  # ARGB
    "model": 0xFF1F6F8B,
    "search": 0xFFD1495B,
    "map": 0xFFB388EB,
    "data": 0xFF66A182,
    "file": 0xFF8D96A3,
    "training": 0xFFEDAE49,
    "user": 0xFF2E4057,
}

Payload = tuple[tuple[int, ...] | None, int]  # shape of the first tensor, bytes of all
Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Place = tuple[str, str]  # import name of a module, attribute in it
Wrap = Callable[[Any], Any]


# --- what is wrapped


def _sizes(arguments: Arguments) -> Payload:
    """Shape of the first tensor or array among the arguments, and the bytes of all of them."""
    shape, n_bytes = None, 0
    for value in (*arguments[0], *arguments[1].values()):
        size = getattr(value, "nbytes", None)
        if isinstance(size, int) and hasattr(value, "shape"):
            shape = tuple(value.shape) if shape is None else shape
            n_bytes += size
    return shape, n_bytes


def _file_size(arguments: Arguments) -> Payload:
    """Bytes of the file that the first argument names."""
    try:
        return None, os.stat(arguments[0][0]).st_size
    except (OSError, IndexError, TypeError, ValueError):  # the call itself will say what is wrong with it
        return None, 0


def _tokens(arguments: Arguments) -> Payload:
    """Of a head, that is given the backbone's features."""
    return _sizes((tuple(getattr(value, "tokens", None) for value in arguments[0]), {}))


def _block_name(arguments: Arguments) -> str:
    return _names.get(arguments[0][0], "block")


def _layer_name(arguments: Arguments) -> str:
    """Of norm_linear(x, norm, linear): "mlp.up" in every block, so that equal layers add up."""
    args, kwargs = arguments
    linear = args[2] if len(args) > 2 else kwargs.get("linear")
    return re.sub(r"^.*\bblocks\.\d+\.", "", getattr(linear, "layer_name", "")) or "linear"


def _learn_blocks(arguments: Arguments) -> str:
    """Blocks don't know their number; the transformer that is about to run them does."""
    transformer = arguments[0][0]
    for i, block in enumerate(transformer.blocks):
        if _names.get(block) is None:
            _names[block] = f"blocks.{i}"
    return "blocks"


@dataclass(frozen=True)
class Hook:
    """One function or method that gets a range.

    Attributes:
        module: its import name.
        attribute: "function" or "Class.method".
        category: a key of :data:`COLOURS`.
        name: of the range, or how to find it from the arguments.
        payload: what goes in, from the arguments.
        inside_model: a plain function that other code calls too: a range only within one of the model.
        steps: it gives an iterator: a range for each step, since the work is done there.
    """

    module: str
    attribute: str
    category: str
    name: str | Callable[[Arguments], str]
    payload: Callable[[Arguments], Payload] = _sizes
    inside_model: bool = False
    steps: bool = False


def _hooks(
    module: str, category: str, names: Mapping[str, str | Callable[[Arguments], str]], **more: Any
) -> list[Hook]:
    return [Hook(module, attribute, category, name, **more) for attribute, name in names.items()]


# ``__call__`` rather than ``forward``: a block that was compiled by itself shows from outside.
MODEL_HOOKS = [
    *_hooks(
        "tetra.model",
        "model",
        {"TetraModel.__call__": "describe", "TetraModel.describe": "describe", "TetraModel.features": "backbone"},
    ),
    *_hooks("tetra.engine", "model", {"Engine.__call__": "describe", "Engine.describe": "describe"}),
    *_hooks(
        "tetra.vit",
        "model",
        {
            "PatchEmbedding.__call__": "stem",
            "PatchEmbedding.infer": "stem",
            "ConvStem.__call__": "stem",
            "VisionTransformer.encode": _learn_blocks,
            "Block.__call__": _block_name,
            "Attention.__call__": "attention",
            "Attention.branch": "attention",
            "Mlp.__call__": "mlp",
            "Mlp.second_half": "mlp.down",
        },
    ),
    *_hooks("tetra.layers", "model", {"norm_linear": _layer_name}, inside_model=True),
    *_hooks("tetra.layers", "model", {"train_linear_after": "mlp.up"}, inside_model=True),
    *_hooks("tetra.kernels.attention", "model", {"attention_qkv": "attention"}, inside_model=True),
    *_hooks("tetra.kernels.bits", "model", {"pack_bits_checked": "pack bits"}, inside_model=True),
    *_hooks(
        "tetra.heads",
        "model",
        {f"{head}.values": "head" for head in ("BoQ", "SALAD", "MixVPR", "GeM")} | {"Head.__call__": "head"},
        payload=_tokens,
    ),
]
HOOKS = [
    *MODEL_HOOKS,
    *_hooks(
        "tetra.kernels.hamming_search",
        "search",
        {"hamming_search": "search", "hamming_range_search": "range search", "hamming_distances": "distances"},
    ),
    *_hooks(
        "tetra.kernels.hamming_database",
        "search",
        {"HammingDatabase.search": "search", "HammingDatabase.range_search": "range search"},
    ),
    *_hooks("tetra.evaluation", "search", {"CosineSearch.add": "cosine search"}),
    *_hooks("tetra.evaluation", "data", {"describe_batches": "next descriptors"}, steps=True),
    *_hooks("tetra.map_reader", "map", {"MapReader.search": "map search", "MapReader.rerank": "map rerank"}),
    *_hooks(
        "tetra.place_map",
        "map",
        {
            f"PlaceMap.{method}": f"map {method.replace('_', ' ')}"
            for method in ("add", "add_many", "remove", "sync", "save", "compact", "merge", "refresh")
        },
    ),
    *_hooks("tetra.localizer", "map", {"Localizer.push": "localize"}),
    *_hooks("tetra.images", "data", {"load_image": "read image"}, payload=_file_size),
    *_hooks("tetra.images", "data", {"iterate_batches": "next batch"}, steps=True),
    *_hooks("tetra.frames", "data", {"open_frames": "next frame"}, steps=True),
    *_hooks("tetra.files", "file", {"load": "load model", "save": "save model"}),
    *_hooks(
        "tetra.training.data",
        "data",
        {f"{dataset}.__getitem__": "load item" for dataset in ("ViewDataset", "CachedViews", "PlaceBatches")},
    ),
    *_hooks("tetra.training.augment", "training", {"augment": "augment"}),
    *_hooks("tetra.training.teachers", "training", {"Teacher.__call__": "teacher"}),
    *_hooks("tetra.training.losses", "training", {"token_loss": "token loss", "attention_loss": "attention loss"}),
    *_hooks("tetra.training.losses", "training", {"BinaryMultiSimilarityLoss.__call__": "metric loss"}),
    *_hooks("tetra.training.loop", "training", {"StageModule.validate": "validation"}),
]

_TRAINER = ("lightning.pytorch.trainer.trainer", "Trainer.__init__")
_TRAINER_RANGES = {
    "run_training_batch": "step",
    "training_step": "forward",
    "backward": "backward",
    "optimizer_step": "optimizer",
    "train_dataloader_next": "wait for data",
    "save_checkpoint": "checkpoint",
}
"""Ranges by the last word of what Lightning calls them."""


# --- where ranges go


class Sink(Protocol):
    """Something that shows ranges."""

    def push(self, name: str, category: str, shape: tuple[int, ...] | None, n_bytes: int) -> Any: ...
    def pop(self, token: Any) -> None: ...


class _Nvtx:
    """The ``nvtx`` package: a domain of our own, categories, colours, and a payload with names for its fields.

    Args:
        with_shapes: give shape and bytes; else bytes alone, for tools that know no payloads of several fields.
    """

    def __init__(self, domain: Any, with_shapes: bool = True) -> None:
        import numpy as np

        self._np, self._domain, self._with_shapes = np, domain, with_shapes
        self._attributes: dict[tuple[str, str], tuple[Any, threading.Lock]] = {}

    def push(self, name: str, category: str, shape: tuple[int, ...] | None, n_bytes: int) -> None:
        payload: Any = None
        if shape and self._with_shapes:
            fields = [("bytes", "i8"), ("shape", "i8", (len(shape),))]
            payload = self._np.array((n_bytes, shape), dtype=fields)
        elif n_bytes:
            payload = n_bytes
        self._domain.push_range(self._domain.get_event_attributes(name, COLOURS[category], category, payload=payload))

    def pop(self, token: Any) -> None:
        self._domain.pop_range()


class _TorchNvtx:
    """What CUDA builds of PyTorch bring along: names alone, in NVTX's default domain."""

    def __init__(self, nvtx: Any) -> None:
        self._nvtx = nvtx

    def push(self, name: str, category: str, shape: tuple[int, ...] | None, n_bytes: int) -> None:
        self._nvtx.range_push(name)

    def pop(self, token: Any) -> None:
        self._nvtx.range_pop()


class _TorchProfiler:
    """``torch.profiler``, where one is running."""

    def __init__(self) -> None:
        import torch

        self._is_running: Callable[[], bool] = torch.autograd._profiler_enabled
        self._slow = torch.profiler.record_function
        # As record_function, but with arguments that show in the trace; not public, so it may be missing one day.
        self._fast = getattr(importlib.import_module("torch._C._profiler"), "_RecordFunctionFast", None)

    def push(self, name: str, category: str, shape: tuple[int, ...] | None, n_bytes: int) -> Any:
        if not self._is_running():  # and what is not recorded from its beginning may not be ended
            return None
        if self._fast is None:
            token = self._slow(name)
        else:
            facts: dict[str, Any] = {"scope": "user_scope", "category": category}
            if shape is not None:
                facts["shape"] = str(list(shape))
            if n_bytes:
                facts["bytes"] = n_bytes
            token = self._fast(name, (), facts)
        token.__enter__()
        return token

    def pop(self, token: Any) -> None:
        if token is not None:
            token.__exit__(None, None, None)


def _nvtx_sink() -> tuple[Sink | None, str]:
    """The best way to NVTX from here, and what is missing for a better one. None where no tool listens."""
    try:
        import nvtx
    except ImportError:
        missing = 'the package nvtx is not installed (pip install "tetra-vpr[profile]")'
        try:
            import torch.cuda.nvtx as of_torch

            of_torch.range_push(DOMAIN)
            of_torch.range_pop()
        except (ImportError, RuntimeError):  # a build without CUDA
            return None, f"{missing}: ranges show in torch.profiler alone"
        return _TorchNvtx(of_torch), f"{missing}: ranges have no domain, colours or payload"
    domain = nvtx.get_domain(DOMAIN)
    if hasattr(domain, "handle"):
        return _Nvtx(domain), ""
    if "NVTX_INJECTION64_PATH" not in os.environ:  # the domain is a dummy, since no tool listens
        return None, ""
    domain = _domain_of_old_tools()
    if domain is None:
        return None, 'this tool and the package nvtx don\'t understand each other: pip install "nvtx<0.2.12"'
    return _Nvtx(domain, with_shapes=False), ""


def _domain_of_old_tools() -> Any:
    """A domain of the package ``nvtx`` for tools that listen without saying so; None where that can't be had.

    Whether a tool listens is asked through an extension of NVTX. Where the tool has another version of that (Nsight
    Systems 2023.4, which Debian ships, and nvtx from 0.2.12 on) the answer is no, and the package gives dummies.
    """
    try:
        lib = importlib.import_module("nvtx._lib.lib")  # private, but the same in all those versions
        domain = object.__new__(lib.Domain)
        domain.handle = lib.DomainHandle(DOMAIN)
        domain.__init__(DOMAIN)
        domain.get_event_attributes(DOMAIN, COLOURS["user"], "user", payload=1)
    except (ImportError, AttributeError, TypeError):
        return None
    return domain


# --- the state of this process


class Capture:
    """Collects some ranges of one name, for tools that start and stop at a call.

    Args:
        name: of the range.
        skip: ranges that pass first.
        count: ranges to collect.
        start, stop: the calls.
    """

    def __init__(
        self, name: str, skip: int, count: int, start: Callable[[], object], stop: Callable[[], object]
    ) -> None:
        self.name, self._start, self._stop = name, start, stop
        self._first, self._last, self._seen = skip, skip + count, 0
        self._owner: int | None = None
        self._lock = threading.Lock()

    @property
    def is_running(self) -> bool:
        return self._owner is not None

    def enter(self) -> None:
        with self._lock:
            if self._seen == self._first and self._owner is None:
                self._owner = threading.get_ident()
                self._start()
            self._seen += 1

    def leave(self) -> None:
        with self._lock:
            # Profilers are stopped by the thread that started them.
            if self._owner == threading.get_ident() and self._seen >= self._last:
                self._owner, self._first = None, -1
                self._stop()


def parse_capture(text: str) -> tuple[str, int, int]:
    """Name, skip and count of ``RANGE:SKIP:COUNT``; the numbers may be left out (0 and 1).

    Raises:
        ValueError: not of this form.
    """
    match = re.fullmatch(r"([^:]+)(?::(\d+))?(?::(\d+))?", text)
    if match is None or match[3] == "0":
        raise ValueError(f"{CAPTURE_VARIABLE}: is '{text}', expected RANGE:SKIP:COUNT, such as describe:10:5")
    return match[1], int(match[2] or 0), int(match[3] or 1)


_lock = threading.RLock()
_local = threading.local()  # .stack: (name, category) of the ranges that are open in this thread
_names: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()  # of modules
_annotations: list[Annotation] = []
_sinks: tuple[Sink, ...] = ()
_extra_sinks: list[Sink] = []
_capture: Capture | None = None
_everything = False
_patches: dict[Place, _Patch] = {}
_importer: _Importer | None = None


@contextmanager
def _opened(name: str, category: str, payload: Payload) -> Iterator[None]:
    stack = _local.__dict__.setdefault("stack", [])
    capture = _capture if _capture is not None and _capture.name == name else None
    if capture is not None:
        capture.enter()
    sinks = _sinks  # those that are told of the end, whatever is switched meanwhile
    tokens = [sink.push(name, category, *payload) for sink in sinks]
    stack.append((name, category))
    try:
        yield
    finally:
        stack.pop()
        for sink, token in zip(reversed(sinks), reversed(tokens), strict=True):
            sink.pop(token)
        if capture is not None:
            capture.leave()


@contextmanager
def span(name: str, *tensors: Any, category: str = "user") -> Iterator[None]:
    """A range of your own; nothing where ranges are off.

    Args:
        tensors: what goes in: the payload.
        category: a key of :data:`COLOURS`.

    Raises:
        ValueError: no such category.
    """
    if category not in COLOURS:
        raise ValueError(f"category: is '{category}', expected one of {', '.join(COLOURS)}")
    if not is_enabled():
        yield
        return
    with _opened(name, category, _sizes((tensors, {}))):
        yield


def is_enabled() -> bool:
    """Whether any range is opened in this process."""
    return _everything or bool(_annotations)


def enable() -> None:
    """Open ranges everywhere in this process, until :func:`disable`. A second call changes nothing.

    Processes that are forked later, such as those that load data on Linux, have them too.

    Warns:
        UserWarning: ranges show with less than NVTX could show; says what is missing.

    Raises:
        ValueError: ``TETRA_NVTX_CAPTURE`` is not of the form RANGE:SKIP:COUNT.
    """
    global _everything
    with _lock:
        if _everything:
            return
        text = os.environ.get(CAPTURE_VARIABLE, "")
        if text and _capture is None:
            cuda = _cuda_profiler()
            if cuda is not None:
                set_capture(Capture(*parse_capture(text), *cuda))
            else:
                parse_capture(text)
        _everything = True
        _install(HOOKS)


def disable() -> None:
    """Close the door: everything is again what it was before :func:`enable`. Open ranges are closed where they end."""
    global _everything
    with _lock:
        _everything = False
        _remove()
        set_capture(None)


class Annotation:
    """What :func:`annotate` gives; :meth:`remove` takes the ranges away. Also a context manager."""

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = weakref.WeakSet(modules)

    def __contains__(self, module: object) -> bool:
        return module in self._modules

    def remove(self) -> None:
        """Doing it twice changes nothing."""
        with _lock:
            if self in _annotations:
                _annotations.remove(self)
                _remove()

    def __enter__(self) -> Annotation:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def annotate(model: Any) -> Annotation:
    """Ranges for one model alone: stem, every block with its products and its attention, head.

    Args:
        model: a ``TetraModel``, or a part of one. Copies of it, such as an engine makes, are other models.

    Raises:
        TypeError: not a module.
    """
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: is a {type(model).__name__}, expected a torch.nn.Module")
    annotation = Annotation(list(model.modules()))
    with _lock:
        _annotations.append(annotation)
        _install(MODEL_HOOKS)
    return annotation


def set_capture(capture: Capture | None) -> None:
    """Collect what ``capture`` says; see :class:`Capture`."""
    global _capture
    _capture = capture


def is_capturing() -> bool:
    """Whether a capture has begun and not ended."""
    return _capture is not None and _capture.is_running


def add_sink(sink: Sink) -> Callable[[], None]:
    """Show ranges in ``sink`` too, from now on; call what this returns to end that."""
    global _sinks
    with _lock:
        _extra_sinks.append(sink)
        if is_enabled():
            _sinks = (*_sinks, sink)

    def remove() -> None:
        global _sinks
        with _lock:
            _extra_sinks[:] = [s for s in _extra_sinks if s is not sink]
            _sinks = tuple(s for s in _sinks if s is not sink)

    return remove


def _cuda_profiler() -> tuple[Callable[[], object], Callable[[], object]] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    return torch.cuda.profiler.start, torch.cuda.profiler.stop


# --- wrapping


def _install(hooks: Sequence[Hook]) -> None:
    """Wrap what ``hooks`` name, now or when it is imported."""
    global _sinks, _importer
    if not _sinks:
        nvtx, missing = _nvtx_sink()
        if missing:
            warnings.warn(missing, stacklevel=3)
        _sinks = (*([] if nvtx is None else [nvtx]), _TorchProfiler(), *_extra_sinks)
    wraps: dict[Place, Wrap] = {(h.module, h.attribute): partial(_wrapped, h) for h in hooks}
    if hooks is HOOKS:
        wraps[_TRAINER] = _with_profiler
    wraps = {place: wrap for place, wrap in wraps.items() if place not in _patches}
    _patch({place: wrap for place, wrap in wraps.items() if place[0] in sys.modules})
    later = {place: wrap for place, wrap in wraps.items() if place[0] not in sys.modules}
    if later:
        if _importer is None:
            _importer = _Importer()
            sys.meta_path.insert(0, _importer)
        _importer.waiting.update(later)


def _remove() -> None:
    """Undo what nobody asks for any more."""
    global _sinks, _importer
    if _everything:
        return
    keep = {(h.module, h.attribute) for h in MODEL_HOOKS} if _annotations else set()
    undone = [_patches.pop(place) for place in [*_patches] if place not in keep]
    for patch in undone:
        if patch.undo is not None:
            patch.undo()
    _exchange([(patch.new, patch.old) for patch in undone if patch.undo is None])
    if _importer is not None:
        _importer.waiting = {place: wrap for place, wrap in _importer.waiting.items() if place in keep}
        if not _importer.waiting:
            sys.meta_path.remove(_importer)
            _importer = None
    if not is_enabled():
        _sinks = ()


class _Importer(importlib.abc.MetaPathFinder):
    """Wraps what waits for it in a module right after that was imported."""

    def __init__(self) -> None:
        self.waiting: dict[Place, Wrap] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not any(module == fullname for module, _ in self.waiting):
            return None
        found = (
            f.find_spec(fullname, path, target) for f in sys.meta_path if f is not self and hasattr(f, "find_spec")
        )
        spec = next((spec for spec in found if spec is not None), None)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            with _lock:
                here = [place for place in self.waiting if place[0] == fullname]
                _patch({place: self.waiting.pop(place) for place in here})

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


@dataclass(frozen=True)
class _Patch:
    """``undo`` puts a method back; a function is exchanged wherever modules hold it."""

    old: Any
    new: Any
    undo: Callable[[], None] | None


def _patch(wraps: Mapping[Place, Wrap]) -> None:
    """Wrap what stands in modules that are there."""
    new = {place: _patched(place, wrap) for place, wrap in wraps.items()}
    _patches.update(new)
    _exchange([(patch.old, patch.new) for patch in new.values() if patch.undo is None])


def _patched(place: Place, wrap: Wrap) -> _Patch:
    module = sys.modules[place[0]]
    owner_name, _, name = place[1].rpartition(".")
    owner = getattr(module, owner_name) if owner_name else module
    old = getattr(owner, name)  # a method may be inherited
    new = wrap(old)
    if owner is module:
        return _Patch(old, new, None)
    own = owner.__dict__.get(name)
    setattr(owner, name, new)
    return _Patch(old, new, partial(delattr, owner, name) if own is None else partial(setattr, owner, name, own))


def _exchange(pairs: Sequence[tuple[Any, Any]]) -> None:
    """Put the second of each pair wherever modules hold the first: its own, and those that imported it by name."""
    table = {id(old): new for old, new in pairs}
    if not table:
        return
    for module in list(sys.modules.values()):
        names = module.__dict__ if isinstance(module, ModuleType) else {}
        for name, value in list(names.items()):
            if id(value) in table:
                names[name] = table[id(value)]


def _wrapped(hook: Hook, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with a range around each call, or around each step of what it gives."""
    from torch.compiler import is_compiling

    def name_of(arguments: Arguments) -> str | None:
        """None if this call gets no range."""
        stack = getattr(_local, "stack", ())
        inner = stack[-1] if stack else ("", "")
        if hook.inside_model:
            wanted = inner[1] == "model"
        else:
            wanted = _everything or any(arguments[0][0] in annotation for annotation in _annotations)
        if not wanted:
            return None
        name = hook.name if isinstance(hook.name, str) else hook.name(arguments)
        return None if inner == (name, hook.category) else name  # a method that calls its like is one range

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        name = None if is_compiling() else name_of((args, kwargs))
        if name is None:
            return function(*args, **kwargs)
        with _opened(name, hook.category, hook.payload((args, kwargs))):
            return function(*args, **kwargs)

    def steps(iterator: Iterator[Any]) -> Iterator[Any]:
        try:
            while True:
                with _opened(str(hook.name), hook.category, (None, 0)):
                    try:
                        item = next(iterator)
                    except StopIteration:
                        return
                yield item
        finally:
            getattr(iterator, "close", lambda: None)()

    @functools.wraps(function)
    def iterate(*args: Any, **kwargs: Any) -> Iterator[Any]:
        return steps(iter(function(*args, **kwargs)))

    return iterate if hook.steps else call


def _with_profiler(init: Callable[..., None]) -> Callable[..., None]:
    """Lightning's trainer tells a profiler what it does. One that was given a profiler keeps it."""

    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("profiler") is None:
            kwargs["profiler"] = _trainer_profiler()
        init(self, *args, **kwargs)

    return wrapper


def _trainer_profiler() -> Any:
    from lightning.pytorch.profilers import Profiler

    class RangeProfiler(Profiler):
        """Ranges for the steps of a training. Lightning leaves some actions open: the end of the data, an error."""

        def __init__(self) -> None:
            super().__init__()
            self._open: list[tuple[str, AbstractContextManager[None]]] = []

        def start(self, action_name: str) -> None:
            name = _TRAINER_RANGES.get(action_name.rpartition(".")[2])
            if name is not None and is_enabled():
                self.stop(action_name)
                opened = _opened(name, "training", (None, 0))
                opened.__enter__()
                self._open.append((action_name, opened))

        def stop(self, action_name: str) -> None:
            if any(action_name == action for action, _ in self._open):
                action = ""
                while action != action_name:
                    action, opened = self._open.pop()
                    opened.__exit__(None, None, None)

        def teardown(self, stage: str | None) -> None:
            if self._open:
                self.stop(self._open[0][0])
            super().teardown(stage)

    return RangeProfiler()
