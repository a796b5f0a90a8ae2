"""Chunks of a simulation in worker processes."""

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any


def run_jobs(function: Callable, jobs: Iterable, workers: int, in_process: bool | None = None) -> Iterator[Any]:
    """
    `function(job)` of every job in their order.

    Args:
        in_process: no worker processes; by default with one worker.

    Raises:
        ValueError: a worker has died.
    """
    if workers == 1 if in_process is None else in_process:
        yield from map(function, jobs)
        return
    # spawn: forking a process that holds threads of torch or arrow can hang.
    # An executor, because it notices a worker that dies: Geant4 aborts where it misses a file.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(function, jobs)
        except BrokenProcessPool:
            raise ValueError("a worker process died; its last message is above") from None
