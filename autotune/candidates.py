"""Candidates run in processes of their own, which may crash, hang, or spoil a GPU for the rest of their life."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any

import torch

from tetra.autotune.timers import Timer
from tetra.kernels.tunable import Config, Sizes, Trial, Tunable

CANDIDATE_TIMEOUT_S = 120.0  # to compile, run and check one
START_TIMEOUT_S = 300.0  # of a process: imports, and a GPU's context

Tunables = Callable[[], Mapping[str, Tunable]]


OUT_OF_MEMORY = f"raised {torch.OutOfMemoryError.__name__}"
"""How the reason begins of what found no memory, which other processes may have had."""


class CandidateFailed(Exception):
    """A candidate did not do; the message is the reason."""


class BudgetSpent(Exception):
    """The time for everything is over."""


class Bench:
    """Checks and times candidates in this process, one problem at a time."""

    def __init__(self, device: torch.device, timer: Timer, tunables: Tunables, n_threads: int) -> None:
        torch.set_num_threads(n_threads)
        self.device, self.timer, self.tunables = device, timer, tunables()
        self._problem: object = None
        self._trial: Trial | None = None
        self._expected: tuple[torch.Tensor, ...] = ()
        self._runs: dict[Config, Callable[[], object]] = {}  # a timer may keep what it found out about one

    def check(self, kernel: str, sizes: Sizes, config: Config) -> str | None:
        """What is wrong with a candidate: None if nothing is."""
        trial = self._trial_of(kernel, sizes)
        if not self._expected:
            self._expected = trial.expected()
        # A candidate that writes nothing must not find the results of the one before in the memory that it gets.
        for tensor in [torch.full_like(tensor, 77) for tensor in self._expected]:
            del tensor
        try:
            found = trial.run(config)
            wrong = trial.difference(found, self._expected)
            self._synchronize()
        except Exception as error:
            return f"raised {type(error).__name__}: {first_line(error)}"
        return None if wrong is None else f"wrong values: {wrong}"

    def time(self, kernel: str, sizes: Sizes, config: Config) -> tuple[str, list[float]]:
        """How it was timed, and seconds."""
        trial = self._trial_of(kernel, sizes)
        self._expected = ()  # its memory is needed no more
        if not self._runs:
            self.timer.prepare(self.device)
        seconds = self.timer(self._runs.setdefault(config, lambda: trial.run(config)))
        return self.timer.method, seconds

    def release(self) -> None:
        """Give back the memory of the problem at hand."""
        self._trial, self._problem, self._expected, self._runs = None, None, (), {}
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def healthy(self) -> bool:
        """Whether the device still works: an illegal access spoils a GPU for the rest of the process."""
        try:
            self._synchronize()
        except RuntimeError:
            return False
        return True

    def _trial_of(self, kernel: str, sizes: Sizes) -> Trial:
        if self._trial is None or self._problem != (kernel, sizes):
            self.release()
            self._trial = self.tunables[kernel].trial(sizes, self.device)
            self._problem = (kernel, sizes)
        return self._trial

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def first_line(error: BaseException) -> str:
    """What an error says, in short."""
    return (str(error).strip().splitlines() or ["no message"])[0][:200]


def _serve(pipe: Connection, *arguments: Any) -> None:
    """What a worker's process does: answer ``(method, arguments)`` with ``(ok, result, is this the last answer)``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    bench = Bench(*arguments)
    pipe.send((True, "ready", False))
    while True:
        try:
            method, given = pipe.recv()
        except EOFError:
            return
        try:
            ok, answer = True, getattr(bench, method)(*given)
        except Exception as error:
            ok, answer = False, f"raised {type(error).__name__}: {first_line(error)}"
        suspicious = not ok or (method == "check" and answer is not None)
        spoilt = suspicious and not bench.healthy()
        pipe.send((ok, answer, spoilt))
        if spoilt:
            return


class Worker:
    """A :class:`Bench` in a process of its own, which may crash or hang and is started again."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._process: Any = None
        self._pipe: Connection | None = None

    def __call__(self, method: str, *given: Any, deadline: float, timeout_s: float = CANDIDATE_TIMEOUT_S) -> Any:
        """Result of a method of the bench.

        Raises:
            CandidateFailed: it raised, or its process ended or was ended after ``timeout_s``.
            BudgetSpent: ``deadline`` (of ``time.monotonic``) came first.
            RuntimeError: no process can be started.
        """
        pipe = self._running(deadline)
        try:
            pipe.send((method, given))
            if not pipe.poll(max(min(timeout_s, deadline - time.monotonic()), 0.0)):
                self.stop()
                if time.monotonic() >= deadline:
                    raise BudgetSpent
                raise CandidateFailed(f"did not come back within {timeout_s:.0f} s")
            ok, answer, last = pipe.recv()
        except (EOFError, OSError):
            process = self._process
            process.join(10)
            code = process.exitcode
            self.stop()
            how = f"signal {-code}" if code is not None and code < 0 else f"exit status {code}"
            raise CandidateFailed(f"ended its process ({how})") from None
        if last:
            self.stop()
        if not ok:
            raise CandidateFailed(answer)
        return answer

    def _running(self, deadline: float) -> Connection:
        if self._pipe is None:
            context = multiprocessing.get_context("spawn")  # a fork has no use of a GPU
            self._pipe, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, *self._arguments), daemon=True)
            self._process.start()
            theirs.close()
            wait_s = min(START_TIMEOUT_S, deadline - time.monotonic())
            try:
                if not self._pipe.poll(max(wait_s, 0.0)):
                    self.stop()
                    if time.monotonic() >= deadline:
                        raise BudgetSpent
                    raise RuntimeError(f"a process to measure in did not start within {START_TIMEOUT_S:.0f} s")
                self._pipe.recv()
            except (EOFError, OSError):
                self.stop()
                raise RuntimeError("a process to measure in ended as it started; see its output above") from None
        return self._pipe

    def release(self, deadline: float) -> None:
        """Give back the memory of the problem at hand, if there is a process."""
        if self._pipe is not None:
            with contextlib.suppress(CandidateFailed):  # it is gone, and so is its memory
                self("release", deadline=deadline)

    def kill(self) -> None:
        """End the process, whatever it does; a call that waits for it fails."""
        if self._process is not None:
            self._process.kill()

    def stop(self) -> None:
        """End the process, and forget it."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None
