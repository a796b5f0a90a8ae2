"""Small seeded samples shared by the tests of this room."""

import numpy as np
import pytest

from hepzoo.tokenization.geometry_dirc import DircGeometry


def make_columns(n: int, seed: int, pdg: int | None = None, momentum=None, theta=None, shift: float = 0.0) -> dict:
    """Toy tracks: an arc over the plane that moves by `shift` mm, times that follow x, Poisson yields near 40."""
    rng = np.random.default_rng(seed)
    geometry = DircGeometry()
    columns: dict = {name: [] for name in ("pmtID", "pixelID", "channel", "leadTime", "x", "y")}
    counts = np.maximum(rng.poisson(40, n), 6)
    for count in counts:
        pmt = np.full(count, -1)
        x, y = np.zeros(count), np.zeros(count)
        while (pmt < 0).any():
            redo = pmt < 0
            x[redo] = rng.uniform(2, 348, redo.sum())
            y[redo] = 60 + 100 * np.sin(x[redo] / 110) ** 2 + shift + rng.normal(0, 4, redo.sum())
            pmt, pixel = geometry.find_pixel(x, y)
        columns["pmtID"].append(pmt.astype(np.int16))
        columns["pixelID"].append(pixel.astype(np.int16))
        columns["channel"].append(geometry.channel(pmt, pixel).astype(np.int32))
        cx, cy = geometry.pixel_center(pmt, pixel)
        columns["x"].append(cx.astype(np.float32))
        columns["y"].append(cy.astype(np.float32))
        columns["leadTime"].append((15 + 0.1 * x + rng.normal(0, 0.3, count)).astype(np.float32))
    columns["P"] = np.full(n, momentum) if momentum else rng.uniform(1, 10, n)
    columns["Theta"] = np.full(n, theta) if theta else rng.uniform(25, 155, n)
    columns["Phi"] = np.zeros(n)
    columns["PDG"] = np.full(n, pdg) if pdg else np.where(np.arange(n) % 2, 211, 321)
    columns["NHits"] = counts
    return columns


def write_parquet(path, columns: dict, rename: dict | None = None) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({(rename or {}).get(name, name): pa.array(list(v)) for name, v in columns.items()})
    pq.write_table(table, path)


@pytest.fixture(scope="session")
def columns():
    return make_columns


@pytest.fixture(scope="session")
def fixed_point_files(tmp_path_factory):
    """Kaons and pions at 6 GeV/c, 30 deg that differ by a shift of the arc; PID as the key of one file."""
    folder = tmp_path_factory.mktemp("fixed")
    write_parquet(folder / "kaons.parquet", make_columns(220, 1, 321, 6.0, 30.0))
    write_parquet(folder / "pions.parquet", make_columns(220, 2, 211, 6.0, 30.0, shift=1.5), {"PDG": "PID"})
    return folder
