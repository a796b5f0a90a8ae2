"""
Jets from a trained OmniJet generator, of ids or of continuous constituents (`OmniJetForPreTraining`): constituents and
the jets that they add up to, about given axes.

    accelerate launch training/generate_jets.py --model runs/jets --n_jets 100000 --output generated

The model knows the constituents relative to the axis of their jet. The axes are stated, or drawn from another sample.
A file depends on `--seed` and its number alone, so that the result is the same for any number of processes, and a
restarted run makes only the files that are missing. With several processes there should be more files than processes.
"""

import argparse
import hashlib
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.training.generation_common import check_at_least, load_config, make_missing_files
from hepzoo.training.tokenize_jets import load_jet_tokenizer, read_batches

EXAMPLES = """\
examples:
  hepzoo generate jets --model runs/jets --n_jets 1000 --output generated
  hepzoo generate jets --model runs/jets --n_jets 10000 --axes_from data/jets/test.parquet --output generated
  hepzoo generate jets --model runs/jets --top_p 0.98 --temperature 0.95 --eta 0.5 --phi 1 --output cooler
  hepzoo generate jets --model converted/ntp_hybrid --tokenizer converted/ntp_vqvae --n_jets 1000 --output hybrid
  accelerate launch --num_processes 4 training/generate_jets.py --model runs/jets --n_jets 1000000 --output big
"""

ETA_LIMIT = 10.0
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p")


def read_axes(pattern: str) -> np.ndarray:
    """
    Pseudorapidity and azimuth, (jets, 2), of the sums of the constituents of the jets in Parquet files.

    Raises:
        ValueError: there is no file, no four-momentum, or a jet without a direction; names file and row.
    """
    from hepzoo.evaluation.tracks_dirc import expand_paths
    from hepzoo.tokenization.jet_features import FOUR_MOMENTUM, sum_jets

    axes, rows = [], Counter()
    for path in expand_paths(pattern):
        for place, columns in read_batches([path], set(FOUR_MOMENTUM), 10_000, None):
            missing = [name for name in FOUR_MOMENTUM if name not in columns]
            if missing:
                raise ValueError(f"{path}: has no column {missing[0]}, expected {', '.join(FOUR_MOMENTUM)}")
            momenta = []
            for name in FOUR_MOMENTUM:
                if any(values is None for values in columns[name]):
                    raise ValueError(f"{place}: {name} has missing values")
                momenta.append(np.concatenate([np.asarray(values, dtype=np.float64) for values in columns[name]]))
                if len(momenta[-1]) != len(momenta[0]):
                    raise ValueError(f"{place}: {name} and {FOUR_MOMENTUM[0]} differ in length")
            lengths = np.array([len(values) for values in columns[FOUR_MOMENTUM[0]]])
            px, py, pz, _ = sum_jets(np.stack(momenta, axis=-1), lengths).T
            with np.errstate(divide="ignore", invalid="ignore"):
                found = np.stack([np.arcsinh(pz / np.hypot(px, py)), np.arctan2(py, px)], axis=-1)
            wrong = ~np.isfinite(found).all(axis=1)
            if wrong.any():
                raise ValueError(f"{path}: row {rows[path] + int(np.argmax(wrong))}: the jet has no finite direction")
            rows[path] += len(found)
            axes.append(found)
    if not axes:
        raise ValueError(f"{pattern}: no jets")
    return np.concatenate(axes)


def apply_sampling_options(arguments: argparse.Namespace, model: Any):
    """Options of the command line to the `generation_config` of the model; those not given leave it as it is."""
    settings = model.generation_config
    for name in SAMPLING_OPTIONS:
        if getattr(arguments, name) is not None:
            setattr(settings, name, getattr(arguments, name))
    if arguments.stop_token_threshold is not None:
        settings.stop_token_threshold = arguments.stop_token_threshold
    if arguments.greedy:
        settings.update(do_sample=False, temperature=1.0, top_k=0, top_p=1.0)


def draw_jets(
    model: Any,
    tokenizer: Any,
    num_jets: int,
    max_constituents: int,
    batch_size: int,
    bar: Any = None,
    jet_features: Sequence[float] | None = None,
) -> list[np.ndarray]:
    """
    Ids of generated jets, from `<bos>` on, one array per jet.

    Args:
        model: generator of ids, or hybrid, which reads what the VQ-VAE of the tokenizer decodes.
        max_constituents: jets are cut off here.
        bar: a progress bar, updated by the jets of every batch.
        jet_features: of every jet, for a hybrid that reads them.
    """
    import torch

    inputs = {"vqvae": tokenizer.vqvae} if model.config.architecture == "hybrid" else {}
    sequences: list[np.ndarray] = []
    while len(sequences) < num_jets:
        size = min(batch_size, num_jets - len(sequences))
        start = torch.full((size, 1), model.config.bos_token_id, device=model.device)
        if jet_features is not None:
            inputs["jet_features"] = torch.tensor([jet_features] * size, dtype=model.dtype, device=model.device)
        with torch.inference_mode():
            ids = model.generate(input_ids=start, max_new_tokens=max_constituents + 1, **inputs)
        sequences += list(ids.cpu().numpy())
        if bar is not None:
            bar.update(size)
    return sequences


def make_jets(
    model: Any,
    tokenizer: Any,
    axes: np.ndarray,
    max_constituents: int,
    batch_size: int,
    bar: Any = None,
    jet_features: Sequence[float] | None = None,
) -> tuple[dict[str, Any], Counter]:
    """
    Columns of one jet per axis, as `OmniJetTokenizer.batch_decode` gives them, and counts of what is unusual.

    Args:
        axes: pseudorapidity and azimuth, (jets, 2).

    Returns:
        (columns, counts): `cut_off` (no stop up to `max_constituents`) and `empty` (the stop came at once).
    """
    sequences = draw_jets(model, tokenizer, len(axes), max_constituents, batch_size, bar, jet_features)
    counts: Counter = Counter()
    counts["cut_off"] = sum(tokenizer.eos_token_id not in ids for ids in sequences)
    # a jet that has no stop may have one code more than it may hold
    columns = tokenizer.batch_decode([ids[: max_constituents + 1] for ids in sequences], axes[:, 0], axes[:, 1])
    del columns["row_index"]
    counts["empty"] = int((columns["num_constituents"] == 0).sum())
    return columns, counts


def write_jets(columns: dict[str, Any], path: Path):
    """A file is there as a whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        table = pa.table(
            {
                name: pa.array(values) if isinstance(values, np.ndarray) else pa.array(values, pa.list_(pa.float32()))
                for name, values in columns.items()
            }
        )
        pq.write_table(table, temporary, row_group_size=1000, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo generate jets",
        description="Generate jets with a trained OmniJet model.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository of a generator of ids or a hybrid")
    parser.add_argument("--tokenizer", help="folder or Hub repository of its tokenizer (default: that of the model)")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("--n_jets", type=int, default=1000, help="jets in total (default 1000)")
    parser.add_argument("--eta", type=float, default=0.0, help="pseudorapidity of the jets (default 0)")
    parser.add_argument("--phi", type=float, default=0.0, help="azimuth of the jets, rad (default 0)")
    parser.add_argument(
        "--axes_from", metavar="FILES", help="draw the axes from the jets of Parquet files, with replacement"
    )
    parser.add_argument(
        "--jet_features",
        type=float,
        nargs="+",
        metavar="NUMBER",
        help="of every jet, transformed as the network reads them, for a hybrid that has features of the whole jet",
    )
    parser.add_argument("--rows_per_shard", type=int, default=10_000, help="jets per file (default 10000)")
    parser.add_argument("--batch_size", type=int, default=128, help="jets per call of generate() (default 128)")
    parser.add_argument("--seed", type=int, default=44, help="default 44")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")

    sampling = parser.add_argument_group("sampling", "default: the generation_config of the model")
    sampling.add_argument("--greedy", action="store_true", help="the most probable code each time, no drawing")
    sampling.add_argument("--temperature", type=float, help="divides the logits (default: that of the model)")
    sampling.add_argument("--top_k", type=int, help="codes kept, 0 for all")
    sampling.add_argument("--top_p", type=float, help="probability kept")
    sampling.add_argument(
        "--max_constituents", type=int, help="jets are cut off here (default: where those of the training were)"
    )
    sampling.add_argument(
        "--stop_token_threshold", type=float, help="the stop is never drawn below this probability (arXiv:2501.05534)"
    )
    return parser


def check_arguments(arguments: argparse.Namespace):
    check_at_least(arguments, 1, "n_jets", "rows_per_shard", "batch_size", "max_constituents")
    check_at_least(arguments, 0, "seed", "top_k")
    if arguments.temperature is not None and not 0 < arguments.temperature < float("inf"):
        raise ValueError(f"--temperature is {arguments.temperature}, expected a finite number > 0")
    if arguments.top_p is not None and not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top_p is {arguments.top_p}, expected 0 < top_p <= 1")
    if arguments.stop_token_threshold is not None and not 0 <= arguments.stop_token_threshold < 1:
        raise ValueError(f"--stop_token_threshold is {arguments.stop_token_threshold}, expected 0 <= threshold < 1")
    for name, limit in (("eta", ETA_LIMIT), ("phi", 2 * np.pi)):
        if not abs(getattr(arguments, name)) <= limit:
            raise ValueError(f"--{name} is {getattr(arguments, name)}, expected {-limit:.4g} to {limit:.4g}")
    for value in arguments.jet_features or ():
        if not np.isfinite(value):
            raise ValueError(f"--jet_features has {value}, expected finite numbers")
    if arguments.axes_from is not None and (arguments.eta or arguments.phi):
        raise ValueError("--axes_from draws the axes: pass neither --eta nor --phi")
    if arguments.greedy:
        for name in SAMPLING_OPTIONS:
            if getattr(arguments, name) is not None:
                raise ValueError(f"--{name} has no effect with --greedy, which draws nothing")


def load_generator(arguments: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    """Model, in evaluation mode on the device, and tokenizer, whose VQ-VAE is there too."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForPreTraining

    config = load_config(arguments.model, "omnijet")
    auto_class = {"gpt": AutoModelForCausalLM, "hybrid": AutoModelForPreTraining}.get(config.architecture)
    if auto_class is None:
        raise ValueError(
            f"{arguments.model}: architecture {config.architecture!r} cannot generate, expected 'gpt' or 'hybrid'"
        )
    given = len(arguments.jet_features or ())
    expected = config.num_jet_features if config.architecture == "hybrid" else 0
    if given != expected:
        raise ValueError(f"--jet_features has {given} numbers, expected the {expected} that {arguments.model} reads")
    tokenizer = load_jet_tokenizer(arguments.tokenizer or arguments.model)
    if tokenizer.vocab_size != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}: they do not belong together"
        )
    tokenizer.vqvae.to(device)
    dtype = getattr(torch, arguments.dtype)
    model = auto_class.from_pretrained(arguments.model, dtype=dtype).to(device).eval()
    apply_sampling_options(arguments, model)
    return model, tokenizer


def run(arguments: argparse.Namespace):
    check_arguments(arguments)
    sample = None if arguments.axes_from is None else read_axes(arguments.axes_from)
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=arguments.cpu)
    model, tokenizer = load_generator(arguments, state.device)
    longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    max_constituents = arguments.max_constituents or longest
    folder, size = Path(arguments.output), arguments.rows_per_shard
    num_files = -(-arguments.n_jets // size)
    paths = [folder / f"generated-{index:05d}-of-{num_files:05d}.parquet" for index in range(num_files)]
    sizes = [min(size, arguments.n_jets - index * size) for index in range(num_files)]
    # without what changes neither the jets nor the files
    options = {name: value for name, value in vars(arguments).items() if name not in ("output", "cpu")}
    if sample is not None:
        options["axes_sha256"] = hashlib.sha256(sample.tobytes()).hexdigest()
    counts: Counter = Counter()

    def make_file(index: int, bar: Any):
        rng = np.random.default_rng([arguments.seed, index])
        torch.manual_seed(int(rng.integers(2**63)))
        if sample is None:
            axes = np.tile([arguments.eta, arguments.phi], (sizes[index], 1))
        else:
            axes = sample[rng.integers(len(sample), size=sizes[index])]
        columns, own = make_jets(
            model, tokenizer, axes, max_constituents, arguments.batch_size, bar, arguments.jet_features
        )
        write_jets(columns, paths[index])
        counts.update(own)

    make_missing_files(state, options, paths, sizes, make_file, files="files", unit="jet")
    total = sum(gather_object([counts]), Counter())
    if state.is_main_process:
        print(
            f"{folder}: {arguments.n_jets} jets in {num_files} files; this run: {total['cut_off']} cut off at "
            f"{max_constituents} constituents, {total['empty']} without a constituent"
        )
    if state.num_processes > 1:
        state.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"hepzoo generate jets: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
