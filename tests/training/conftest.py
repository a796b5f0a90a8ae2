from pathlib import Path

import pytest

from tests.training_runs import make_tracks, write_tracks


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """A folder with train.parquet (128 tracks), validation.parquet (32) and uneven shards in shards/."""
    folder = tmp_path_factory.mktemp("tracks")
    write_tracks(folder / "train.parquet", make_tracks(128, seed=1))
    write_tracks(folder / "validation.parquet", make_tracks(32, seed=2))
    for shard, number in enumerate((50, 9, 37)):
        write_tracks(folder / "shards" / f"train-{shard:05d}-of-00003.parquet", make_tracks(number, seed=10 + shard))
    return folder


@pytest.fixture(autouse=True)
def quick_streams(monkeypatch):
    """`datasets` waits 5 s whenever a Parquet stream is left before its end, to be safe when the interpreter ends."""
    import datasets.config

    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0.1, raising=False)
