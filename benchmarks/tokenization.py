"""Encoding speed of the tokenizers: whole batches in numpy against one track at a time in Python.

Both sides are measured in this run, on the same tracks, and must give the same ids.
"""

import argparse
import json
import os
import time

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")

import numpy as np  # noqa: E402

from hepzoo.tokenization.tokenization_cmhca_dirc import CMHCADircTokenizer  # noqa: E402


def make_tracks(count: int, seed: int) -> list[dict]:
    """Random tracks with the multiplicity of the hpDIRC (about 70 photons); hits are uniform, which costs the same."""
    rng = np.random.default_rng(seed)
    tracks = []
    for hits in np.clip(rng.poisson(rng.uniform(40, 100, count)), 6, 248):
        tracks.append(
            {
                "P": float(rng.uniform(1, 10)),
                "Theta": float(rng.uniform(25, 160)),
                "PDG": int(rng.choice([211, -211, 321, -321])),
                "NHits": int(hits),
                "pmtID": rng.integers(0, 24, hits),
                "pixelID": rng.integers(0, 256, hits),
                "leadTime": rng.uniform(9, 157, hits),
            }
        )
    return tracks


def encode_one_by_one(tracks: list[dict], tokenizer: CMHCADircTokenizer) -> np.ndarray:
    """The straightforward way: for every track sort, look up each hit, pad, stack."""
    edges = tokenizer.time_edges
    eos = [tokenizer.eos_token_id, tokenizer.time_eos_token_id]
    pad = [tokenizer.pad_token_id, tokenizer.time_pad_token_id]
    width = max(len(track["leadTime"]) for track in tracks) + 4
    pixels = tokenizer.detector.pixels_per_pmt
    batch = []
    for track in tracks:
        if len(track["pmtID"]) != track["NHits"]:
            raise ValueError("NHits")
        ids = [[0, 0]] * 3
        for hit in np.argsort(track["leadTime"], kind="stable"):
            time_ns = track["leadTime"][hit]
            if not (0 <= track["pmtID"][hit] < 24 and 0 <= track["pixelID"][hit] < pixels and 9 <= time_ns < 157):
                raise ValueError("hit out of range")
            space = int(track["pmtID"][hit]) * pixels + int(track["pixelID"][hit]) + 1
            ids.append([space, int(np.searchsorted(edges, time_ns, side="right"))])
        ids.append(eos)
        ids += [pad] * (width - len(ids))
        batch.append(np.array(ids))
    return np.stack(batch)


def best_of(function, repeats: int) -> tuple[float, object]:
    seconds, result = float("inf"), None
    for _ in range(repeats):
        start = time.perf_counter()
        result = function()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example:\n  python benchmarks/tokenization.py --n_tracks 10000",
    )
    parser.add_argument("--family", default="cmhca_dirc", choices=["cmhca_dirc"])
    parser.add_argument("--n_tracks", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--n_baseline", type=int, default=1000, help="tracks of the slow way (default: 1000)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts (default: 3)")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    for name in ("n_tracks", "n_baseline", "repeats"):
        if getattr(args, name) < 1:
            raise SystemExit(f"--{name} must be at least 1, got {getattr(args, name)}")
    tokenizer = CMHCADircTokenizer()
    tracks = make_tracks(args.n_tracks, args.seed)
    lists = {
        name: [track[name].tolist() if isinstance(track[name], np.ndarray) else track[name] for track in tracks]
        for name in tracks[0]
    }
    few = tracks[: args.n_baseline]

    slow, expected = best_of(lambda: encode_one_by_one(few, tokenizer), args.repeats)
    if not np.array_equal(tokenizer(few, padding=True)["input_ids"], expected):
        raise SystemExit("the two ways give different ids")
    fast, encoding = best_of(lambda: tokenizer(tracks, padding=True), args.repeats)
    from_lists, _ = best_of(lambda: tokenizer(lists, padding=True), args.repeats)
    ragged, pieces = best_of(lambda: tokenizer(tracks), args.repeats)
    features = [{name: pieces[name][i] for name in pieces} for i in range(len(tracks))]
    padding, _ = best_of(lambda: [tokenizer.pad(features[i : i + 256]) for i in range(0, len(features), 256)], 1)
    decoding, _ = best_of(lambda: tokenizer.batch_decode(encoding["input_ids"]), args.repeats)

    count = len(tracks)
    print(f"{count} tracks, {np.mean([track['NHits'] for track in tracks]):.1f} hits each, one thread")
    print(f"{'':44}{'tracks/s':>10}{'s per 10 000':>14}")
    for name, rate in (
        (f"one track at a time ({len(few)} tracks)", len(few) / slow),
        ("tokenizer(rows, padding=True), numpy records", count / fast),
        ("tokenizer(columns, padding=True), lists", count / from_lists),
        ("tokenizer(rows), ragged", count / ragged),
        ("pad, batches of 256", count / padding),
        ("batch_decode", count / decoding),
    ):
        print(f"{name:44}{rate:10.0f}{1e4 / rate:14.2f}")
    print(
        json.dumps(
            {
                "family": args.family,
                "speedup": round((count / fast) / (len(few) / slow), 2),
                "baseline_per_s": round(len(few) / slow, 1),
                "ours_per_s": round(count / fast, 1),
                "ours_from_lists_per_s": round(count / from_lists, 1),
                "n_tracks": count,
                "hits_per_track": round(float(np.mean([track["NHits"] for track in tracks])), 1),
            }
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
