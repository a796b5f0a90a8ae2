"""Chunks in worker processes: in order, no further ahead than asked, and a dead worker is noticed."""

import math
import os

import pytest

from hepzoo.data_scripts.worker_processes import JOBS_AHEAD, run_jobs


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_the_order_of_the_jobs(workers):
    assert list(run_jobs(abs, iter(range(-20, 0)), workers)) == list(range(20, 0, -1))
    assert list(run_jobs(abs, [], workers)) == []


def test_jobs_are_taken_only_as_they_are_needed():
    """Memory must not grow with the length of a simulation; who stops early does not wait for the rest."""
    taken = []

    def jobs():
        for job in range(1000):
            taken.append(job)
            yield job

    results = run_jobs(abs, jobs(), 2)
    for _ in range(3):
        next(results)
    assert len(taken) == 2 * JOBS_AHEAD + 3
    results.close()
    assert len(taken) == 2 * JOBS_AHEAD + 3


def test_hostile_worker_that_dies():
    with pytest.raises(ValueError, match="a worker process died"):
        list(run_jobs(os._exit, [1] * 50, 2))


def test_hostile_job():
    """An error in a worker is the caller's, with its own words."""
    with pytest.raises(ValueError, match="math domain error|expected a nonnegative input"):
        list(run_jobs(math.sqrt, [4.0, -1.0], 2))
