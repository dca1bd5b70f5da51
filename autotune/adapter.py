"""Our cache for Triton kernels of your own: ``tetra_autotune`` in the place of ``triton.autotune``.

    @tetra_autotune(configs=[triton.Config({"BLOCK": 256}), triton.Config({"BLOCK": 1024}, num_warps=8)], key=["n"])
    @triton.jit
    def double(x, out, n, BLOCK: tl.constexpr): ...

    double[grid](x, out, n)              # the kept configuration, or the first: no launch ever tunes
    double.tune(x, out, n, grid=grid)    # measures, and keeps the best for this device and bucket of shapes

Results are kept as those of this package are: by device, driver, Triton, and the kernel's source; in files that several
processes share; and written at once. ``tetra tune export`` and ``import`` take them to other machines of the same kind.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from tetra.autotune import table
from tetra.autotune.candidates import BudgetSpent, CandidateFailed, first_line
from tetra.autotune.measured_tuner import BudgetError, Result, Times, halve
from tetra.autotune.store import USER_PREFIX, Store, device_identity, notice
from tetra.autotune.timers import Timer, timer_for
from tetra.kernels.backend import arch_of
from tetra.kernels.tunable import Trial, bucket

LAUNCH_FIELDS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
BUDGET_S = 60.0
RTOL, ATOL = 1e-2, 1e-2  # of floats: other tiles add in another order

Row = tuple[Any, ...]


def tetra_autotune(
    configs: Sequence[Any],
    key: Sequence[str],
    *,
    name: str | None = None,
    prune_configs_by: Mapping[str, Any] | None = None,
    reset_to_zero: Sequence[str] | None = None,
    restore_value: Sequence[str] | None = None,
    pre_hook: Callable[..., object] | None = None,
    post_hook: Callable[..., object] | None = None,
    round_up: Callable[[int], int] = bucket,
) -> Callable[[Any], CachedKernel]:
    """A decorator above ``@triton.jit`` (or ``@triton.heuristics``).

    Args:
        configs: ``triton.Config`` objects. The first runs where nothing is kept, so it should run everywhere.
        key: arguments that tell problems apart; the dtypes of all tensors do too.
        name: of the kernel among the results; by default its module and name.
        prune_configs_by: ``early_config_prune``, ``perf_model`` and ``top_k``, as for ``triton.autotune``.
        reset_to_zero: tensors that are zeroed before each run while tuning.
        restore_value: tensors that get their values back after each run while tuning.
        pre_hook, post_hook: called with the arguments by name around each run while tuning, in the place of the two
            above; ``post_hook`` with ``exception`` too.
        round_up: gives the bucket of a whole number in ``key``, the next power of two; ``lambda n: n`` keeps all apart.

    Raises:
        ValueError: there are no configurations, or ``key`` names what is no argument.
    """

    def decorate(fn: Any) -> CachedKernel:
        return CachedKernel(
            fn,
            list(configs),
            list(key),
            name,
            dict(prune_configs_by or {}),
            list(reset_to_zero or ()),
            list(restore_value or ()),
            pre_hook,
            post_hook,
            round_up,
        )

    return decorate


class CachedKernel:
    """A kernel that looks its configuration up at each launch; made by :func:`tetra_autotune`."""

    def __init__(
        self,
        fn: Any,
        configs: list[Any],
        key: list[str],
        name: str | None,
        prune_configs_by: dict[str, Any],
        reset_to_zero: list[str],
        restore_value: list[str],
        pre_hook: Callable[..., object] | None,
        post_hook: Callable[..., object] | None,
        round_up: Callable[[int], int],
    ) -> None:
        self.fn = fn
        self.arg_names: list[str] = list(fn.arg_names)
        base = fn
        while not inspect.isfunction(base):
            base = base.fn
        self.base_fn = base
        self.name = f"{USER_PREFIX}{name or f'{base.__module__}.{base.__qualname__}'}"
        if not configs:
            raise ValueError(f"configs of {self.name}: is empty, wanted one triton.Config or more")
        for what, names in (("key", key), ("reset_to_zero", reset_to_zero), ("restore_value", restore_value)):
            for argument in names:
                if argument not in self.arg_names:
                    raise ValueError(
                        f"{what} of {self.name}: '{argument}' is none of its arguments {', '.join(self.arg_names)}"
                    )
        self.configs, self.keys = configs, key
        self._prune_by, self._reset, self._restore = prune_configs_by, reset_to_zero, restore_value
        self._pre_hook, self._post_hook, self._round_up = pre_hook, post_hook, round_up
        self.fields = (*dict.fromkeys(field for config in configs for field in config.kwargs), *LAUNCH_FIELDS)
        self._by_row = {self._row(config): config for config in reversed(configs)}
        self._rows = tuple(dict.fromkeys(map(self._row, configs)))
        self._chosen: dict[tuple[Any, ...], Any] = {}
        self.__doc__, self.__name__ = base.__doc__, base.__name__

    # --- launching ---

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.run(*args, grid=grid, warmup=False, **kwargs)

    def run(self, *args: Any, grid: Any, warmup: bool = False, **kwargs: Any) -> Any:
        """Launch with the configuration that is kept for these arguments, or the first. Never tunes."""
        config = self.config_for(*args, **kwargs)
        if config.pre_hook is not None:
            config.pre_hook({**dict(zip(self.arg_names, args, strict=False)), **kwargs, **config.all_kwargs()})
        return self.fn.run(*args, grid=grid, warmup=warmup, **kwargs, **config.all_kwargs())

    def warmup(self, *args: Any, grid: Any, **kwargs: Any) -> Any:
        """Compile, without a launch, what ``run`` would launch."""
        return self.run(*args, grid=grid, warmup=True, **kwargs)

    def config_for(self, *args: Any, **kwargs: Any) -> Any:
        """The ``triton.Config`` that a launch with these arguments uses."""
        named = self._named(args, kwargs)
        tensors = [value for value in named.values() if isinstance(value, Tensor)]
        device = tensors[0].device if tensors else None
        keys = [named.get(name) for name in self.keys]
        problem = (  # of a tensor only the dtype counts, and its memory must not be kept; True is not 1
            *(device, *(key.dtype if isinstance(key, Tensor) else (type(key), key) for key in keys)),
            *(tensor.dtype for tensor in tensors),
        )
        try:
            return self._chosen[problem]
        except (KeyError, TypeError):  # TypeError: a key that can't be hashed
            pass
        config = self._find(named, kwargs, device)
        with suppress(TypeError):
            self._chosen[problem] = config
        return config

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name, in the kernel's order however they were given."""
        given = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        return {name: given[name] for name in (*self.arg_names, *given) if name in given}

    def forget(self) -> None:
        """Read the files again at the next launch."""
        self._chosen.clear()

    def _find(self, named: dict[str, Any], kwargs: dict[str, Any], device: torch.device | None) -> Any:
        allowed = self._allowed(named, kwargs)
        if device is not None:
            rows = tuple(self._row(config) for config in allowed)
            try:
                arch, where = _place(device)
                choice = table.explain(self.name, arch, self._key(named), rows, where, self.source_hash)
                return self._by_row[choice.config]
            except Exception as error:  # a launch must not fail for a file beside it
                notice(f"tuning results of {self.name} are ignored: {type(error).__name__}: {error}")
        return allowed[0]

    def _row(self, config: Any) -> Row:
        values = {**config.kwargs, **{field: getattr(config, field, None) for field in LAUNCH_FIELDS}}
        row = tuple(values.get(field) for field in self.fields)
        for field, value in zip(self.fields, row, strict=True):
            if not isinstance(value, (int, float, str, type(None))):
                raise ValueError(f"configs of {self.name}: {field} is {value!r}; wanted a number, text or None")
        return row

    def _key(self, named: Mapping[str, Any]) -> str:
        parts = []
        for name in self.keys:
            value = named.get(name)
            if not isinstance(value, bool) and isinstance(value, Integral):  # numpy's too
                value = self._round_up(int(value))
            parts.append(f"{name}={value.dtype if isinstance(value, Tensor) else value}")
        parts += [str(value.dtype).removeprefix("torch.") for value in named.values() if isinstance(value, Tensor)]
        return " ".join(parts)

    @cached_property
    def source_hash(self) -> str:
        """Of the kernel, and of the functions that it calls where Triton compiles it."""
        fn = self.fn
        while not hasattr(fn, "cache_key") and hasattr(fn, "fn"):
            fn = fn.fn
        text = fn.cache_key if hasattr(fn, "cache_key") else inspect.getsource(self.base_fn)
        return hashlib.sha256(str(text).encode()).hexdigest()[:16]

    def _allowed(self, named: dict[str, Any], kwargs: dict[str, Any]) -> list[Any]:
        prune = self._prune_by.get("early_config_prune")
        if prune is None:
            return self.configs
        positional = {name: value for name, value in named.items() if name not in kwargs}
        allowed = list(prune(self.configs, positional, **kwargs))
        if not allowed:
            raise ValueError(f"early_config_prune of {self.name}: left no configuration, wanted one or more")
        for config in allowed:  # it may have made new ones
            self._by_row.setdefault(self._row(config), config)
        return allowed

    # --- tuning ---

    def tune(
        self,
        *args: Any,
        grid: Any,
        budget_s: float = BUDGET_S,
        again: bool = False,
        check: bool = True,
        rtol: float = RTOL,
        atol: float = ATOL,
        timer: Timer | None = None,
        store: Store | None = None,
        **kwargs: Any,
    ) -> Any:
        """Measure the configurations on these arguments, and keep the best for this device and bucket.

        Tensors have their values of before when it returns, those of ``reset_to_zero`` zeros. It runs in this process:
        a configuration that crashes it ends it, but leaves what is kept intact.

        Args:
            grid: as for a launch.
            budget_s: seconds for all of it.
            again: measure although there is a result.
            check: leave out configurations whose results differ from those of the first that works; floats may by
                ``rtol`` and ``atol``. Takes memory for two copies of all tensors.
            timer: source of times; None: the device's.
            store: that keeps the result; None: the user's.

        Returns:
            The best ``triton.Config``.

        Raises:
            ValueError: no argument is a tensor, a configuration sets what ``kwargs`` sets, or ``budget_s`` is not
                above 0.
            RuntimeError: no configuration works, or the budget did not suffice. Nothing is kept then.
            StoreError: the result can't be kept.
        """
        if not budget_s > 0:
            raise BudgetError(f"budget_s: is {budget_s:g} seconds, wanted more than 0")
        deadline = time.monotonic() + budget_s
        named = self._named(args, kwargs)
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if not tensors:
            raise ValueError(f"{self.name}: no argument is a tensor, which would say on which device to tune")
        twice = kwargs.keys() & {field for config in self.configs for field in config.kwargs}
        if twice:
            raise ValueError(f"{self.name}: {', '.join(sorted(twice))} is set by configurations and by the call")
        device = next(iter(tensors.values())).device
        store = store if store is not None else Store()
        store.check_writable()
        if not again:
            arch, where = _place(device)
            rows = tuple(self._row(config) for config in self._allowed(named, kwargs))
            choice = table.explain(self.name, arch, self._key(named), rows, where, self.source_hash)
            if choice.origin == "user":
                return self._by_row[choice.config]
        try:
            result = self._measure(args, kwargs, named, tensors, grid, device, deadline, check, (rtol, atol), timer)
        except BudgetSpent:
            raise RuntimeError(
                f"{self.name}: the budget of {budget_s:g} s did not suffice; give it more, or fewer configurations"
            ) from None
        except CandidateFailed as failure:
            raise RuntimeError(f"{self.name}: {failure}") from None
        entry = {**result.entry(), "fields": list(self.fields)}
        store.add(device_identity(device), {self.name: self.source_hash}, self.name, result.key, entry)
        table.reset()
        self.forget()
        return self._by_row[result.config]

    def _measure(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        named: dict[str, Any],
        tensors: dict[str, Tensor],
        grid: Any,
        device: torch.device,
        deadline: float,
        check: bool,
        tolerances: tuple[float, float],
        timer: Timer | None,
    ) -> Result:
        candidates = [self._row(config) for config in self._predicted_best(named, kwargs)]
        saved = {name: _stored(value).clone() for name, value in tensors.items() if check or name in self._restore}
        rejected: dict[Row, str] = {}
        expected: tuple[Tensor, ...] | None = None

        def put_back() -> None:
            for name, value in saved.items():
                _put(tensors[name], value)
            for name in self._reset:
                if name in tensors:
                    _put(tensors[name])

        def run(row: Row, put_back: bool = True) -> None:
            self._run_once(named, args, kwargs, grid, self._by_row[row], put_back)

        try:
            for row in candidates:
                if time.monotonic() >= deadline:
                    raise BudgetSpent
                put_back()
                try:
                    run(row, put_back=False)
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    found = tuple(tensors.values())
                    if check and expected is not None:
                        wrong = _difference(found, expected, *tolerances)
                        if wrong is not None:
                            rejected[row] = f"wrong values: {wrong}"
                    elif check:
                        expected = tuple(value.clone() for value in found)
                except Exception as error:
                    rejected[row] = f"raised {type(error).__name__}: {first_line(error)}"
            working = [row for row in candidates if row not in rejected]
            if not working:
                raise CandidateFailed(f"no configuration works: the first {rejected[candidates[0]]}")
            put_back()
            expected = None
            chosen_timer = timer if timer is not None else timer_for(device)
            chosen_timer.prepare(device)

            calls = {row: self._call_of(run, row) for row in working}

            def bench(method: str, kernel: str, sizes: object, row: Row, *, deadline: float) -> tuple[str, list[float]]:
                if time.monotonic() >= deadline:
                    raise BudgetSpent
                try:
                    seconds = chosen_timer(calls[row])
                except Exception as error:
                    raise CandidateFailed(f"raised {type(error).__name__}: {first_line(error)}") from None
                return chosen_timer.method, seconds

            times = Times(bench, self.name, {}, deadline)
            best = halve(times, working, candidates[0])
        finally:
            put_back()
        default_s = times.median(candidates[0])
        return Result(
            self.name,
            self._key(named),
            best,
            times.median(best),
            default_s if math.isfinite(default_s) else None,
            len(candidates),
            times.method,
            tuple((rejected | times.failures).items()),
        )

    @staticmethod
    def _call_of(run: Callable[[Row], None], row: Row) -> Callable[[], None]:
        return lambda: run(row)

    def _run_once(
        self,
        named: dict[str, Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        grid: Any,
        config: Any,
        put_back: bool,
    ) -> None:
        """One run with its hooks, as ``triton.autotune`` does it; with ``put_back`` values are restored after it."""
        everything = {**named, **config.all_kwargs()}
        if config.pre_hook is not None:
            config.pre_hook(everything)
        if self._pre_hook is not None:
            self._pre_hook(everything)
        else:
            for name in self._reset:
                if isinstance(named.get(name), Tensor):
                    _put(named[name])
        restored = [name for name in self._restore if put_back and isinstance(named.get(name), Tensor)]
        kept = {name: _stored(named[name]).clone() for name in restored}
        failure: Exception | None = None
        try:
            self.fn.run(*args, grid=grid, warmup=False, **kwargs, **config.all_kwargs())
        except Exception as error:
            failure = error
            raise
        finally:
            if self._post_hook is not None and put_back:
                self._post_hook(everything, exception=failure)
            for name, value in kept.items():
                _put(named[name], value)

    def _predicted_best(self, named: dict[str, Any], kwargs: dict[str, Any]) -> list[Any]:
        """The configurations to measure: those allowed, or the ``top_k`` that ``perf_model`` expects to be fastest."""
        allowed = self._allowed(named, kwargs)
        model = self._prune_by.get("perf_model")
        if model is None:
            return allowed
        top_k = self._prune_by.get("top_k", 1.0)
        if isinstance(top_k, float) and top_k <= 1.0:
            top_k = int(len(self.configs) * top_k)
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(
                f"top_k of {self.name}: is {top_k!r}, wanted a share up to 1.0 or a number of configurations"
            )
        if len(allowed) <= top_k:
            return allowed
        return sorted(allowed, key=lambda config: model(**{**named, **config.all_kwargs()}))[:top_k]


def _place(device: torch.device) -> tuple[int, torch.device | None]:
    """What ``table`` wants to know: (arch, device)."""
    return arch_of(device), device if device.type == "cuda" else None


def _stored(tensor: Tensor) -> Tensor:
    """The values that an expanded tensor has in memory: once, and not as often as they are repeated."""
    once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
    return tensor.detach()[once]


def _put(tensor: Tensor, values: Tensor | float = 0) -> None:
    """Write values of :func:`_stored`. Into parameters too, and what was made in inference mode."""
    with torch.inference_mode():
        stored = _stored(tensor)
        stored.copy_(values) if isinstance(values, Tensor) else stored.fill_(values)


def _difference(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], rtol: float, atol: float) -> str | None:
    floats = tuple((rtol, atol) if tensor.is_floating_point() else (0.0, 0.0) for tensor in expected)
    trial = Trial(lambda config: found, lambda: expected, tuple(r for r, _ in floats), tuple(a for _, a in floats))
    return trial.difference(found, expected)
