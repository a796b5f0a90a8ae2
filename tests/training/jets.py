"""Jets with two classes that are easy to tell apart, for the tests of the training scripts."""

from pathlib import Path

import numpy as np


def make_jets(number: int, seed: int = 0) -> dict[str, list]:
    """
    Columns of jets of 500 to 600 GeV about random axes, constituents by falling pT: QCD with 3 to 8 constituents in one
    prong, tops with 12 to 20 in three.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for row in range(number):
        is_top = bool(row % 2)
        count = int(rng.integers(12, 21) if is_top else rng.integers(3, 9))
        share = np.sort(rng.dirichlet(np.full(count, 2.0)))[::-1]
        pt = rng.uniform(500, 600) * share
        prong = np.array([-0.4, 0.0, 0.4])[rng.integers(0, 3, count)] if is_top else np.zeros(count)
        eta = rng.uniform(-1, 1) + prong + rng.normal(0, 0.03, count)
        phi = rng.uniform(-3, 3) + rng.normal(0, 0.03, count)
        momentum = {
            "part_px": pt * np.cos(phi),
            "part_py": pt * np.sin(phi),
            "part_pz": pt * np.sinh(eta),
            "part_energy": pt * np.cosh(eta),
        }
        rows.append(
            {
                **{name: values.tolist() for name, values in momentum.items()},
                "label_QCD": float(not is_top),
                "label_Tbqq": int(is_top),
                "jet_pt": float(pt.sum()),
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_jets(path: Path, columns: dict[str, list]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return str(path)
