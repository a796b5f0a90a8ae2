"""Chunks of a simulation in worker processes."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any

JOBS_AHEAD = 4


def run_jobs(function: Callable, jobs: Iterable, workers: int, in_process: bool | None = None) -> Iterator[Any]:
    """
    `function(job)` of every job in their order. Jobs are taken and results are kept only `JOBS_AHEAD` per worker ahead,
    so that memory does not grow when who reads them is slower than the workers.

    Args:
        in_process: no worker processes; by default with one worker.

    Raises:
        ValueError: a worker has died.
    """
    if workers == 1 if in_process is None else in_process:
        yield from map(function, jobs)
        return
    jobs = iter(jobs)
    # spawn: forking a process that holds threads of torch or arrow can hang.
    # An executor, because it notices a worker that dies: Geant4 aborts where it misses a file.
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        ahead = deque(pool.submit(function, job) for job in islice(jobs, JOBS_AHEAD * workers))
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(pool.submit(function, job) for job in islice(jobs, 1))
            yield result
    except BrokenProcessPool:
        raise ValueError("a worker process died; its last message is above") from None
    finally:
        pool.shutdown(cancel_futures=True)
