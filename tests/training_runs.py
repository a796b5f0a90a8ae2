import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
TINY = "hidden_size=32,num_hidden_layers=2,num_attention_heads=4,intermediate_size=64"


def make_tracks(number: int, seed: int = 0, pdg: int | None = None, signal: int = 6) -> dict[str, list]:
    """
    Records with a pattern to learn: the i-th photon of a pion is in pixel 100 + 7 i at 20 + 3 i ns, that of a kaon in
    pixel 3000 + 7 i, 1 ns later; a tenth of the photons is moved.
    """
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(number):
        code = pdg if pdg is not None else int(rng.choice([211, 321]))
        is_kaon = abs(code) == 321
        count = signal + int(rng.integers(0, 3))
        channel = (3000 if is_kaon else 100) + 7 * np.arange(count)
        time = 20.0 + 3.0 * np.arange(count) + (1.0 if is_kaon else 0.0) + rng.uniform(0, 0.02, count)
        moved = rng.random(count) < 0.1
        channel = np.where(moved, rng.integers(0, 6144, count), channel)
        order = rng.permutation(count)
        rows.append(
            {
                "P": float(rng.uniform(1, 10)),
                "Theta": float(rng.uniform(26, 159)),
                "Phi": 0.0,
                "PDG": code,
                "NHits": count,
                "pmtID": (channel // 256)[order].tolist(),
                "pixelID": (channel % 256)[order].tolist(),
                "leadTime": time[order].tolist(),
            }
        )
    return {name: [row[name] for row in rows] for name in rows[0]}


def write_tracks(path: Path, columns: dict[str, list]) -> str:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    types = {"pmtID": pa.int16(), "pixelID": pa.int16(), "leadTime": pa.float32(), "is_noise": pa.int8()}
    pq.write_table(
        pa.table({name: pa.array(v, pa.list_(types[name]) if name in types else None) for name, v in columns.items()}),
        path,
    )
    return str(path)


def common_flags(folder: Path, output: Path) -> list[str]:
    flags = "--use_cpu --disable_tqdm true --dataloader_pin_memory false --seed 3 --logging_steps 1 --save_strategy no"
    return [*flags.split(), "--cache_dir", str(folder / "cache"), "--output_dir", str(output)]


def history(output: Path, key: str = "loss") -> dict[int, float]:
    """Training step -> logged value."""
    state = json.loads((output / "trainer_state.json").read_text())
    return {entry["step"]: entry[key] for entry in state["log_history"] if key in entry}


def launch(script: str, arguments: list[str], processes: int = 1) -> subprocess.CompletedProcess:
    """Runs a training script through `accelerate launch`; on the CPU several processes need --multi_gpu."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes)]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    # port 0: any free one, so that several runs on one machine do not meet
    command += ["--multi_gpu", "--main_process_port", "0"] if processes > 1 else ["--cpu"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    return subprocess.run(
        [*command, str(ROOT / "training" / script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
