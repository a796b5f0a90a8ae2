"""
Fast simulation: tracks of given species and kinematics from trained CMHCA-DIRC generators.

    accelerate launch training/generate.py --model moe_generator --n_tracks 100000 --method MixPiK --output generated

The tracks are made in dumps of `--n_dump`. A dump depends on `--seed` and its number alone, so that the result is the
same for any number of processes, and a restarted run makes only the dumps that are missing.
"""

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.training.generation_common import check_at_least, load_config, make_missing_files, parse_range

EXAMPLES = """\
examples:
  hepzoo generate --model moe_generator --n_tracks 1000 --method MixPiK --momentum 6 --theta 30 --output generated
  hepzoo generate --pion_model pion --kaon_model kaon --n_tracks 100000 --momentum 1-10 --theta 25-160 --output fastsim
  hepzoo generate --model pion --method Pion --n_tracks 5000 --sampling TopK --topK 300 --dark_noise --output noisy
  accelerate launch --num_processes 4 training/generate.py --model moe_generator --n_tracks 1000000 --output big
"""

MOMENTUM_LIMITS = (1.0, 10.0)
THETA_LIMITS = (25.0, 160.0)
MAX_REDRAWS = 50


@dataclass
class Generator:
    """A model with its tokenizer, and how to sample from it."""

    model: Any
    tokenizer: Any
    generate_kwargs: dict[str, Any]


def species_of(method: str, indices: np.ndarray) -> np.ndarray:
    """PDG codes of the tracks with these numbers; MixPiK alternates, so that both species are equally many."""
    if method == "MixPiK":
        return np.where(indices % 2 == 0, 211, 321)
    return np.full(len(indices), {"Pion": 211, "Kaon": 321}[method])


def sampling_kwargs(arguments: argparse.Namespace, model) -> dict[str, Any]:
    """Options of the command line to arguments of `generate()`."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TemperatureLogitsWarper

    from hepzoo.modeling.generation_multistream import (
        ExponentialTemperatureLogitsProcessor,
        ForbiddenTokensLogitsProcessor,
        MonotonicLogitsProcessor,
        StreamLogitsProcessor,
    )

    config = model.config
    kwargs: dict[str, Any] = {
        "do_sample": arguments.sampling != "Greedy",
        "top_k": 0,
        "top_p": 1.0,
        "temperature": 1.0,
    }
    processors = LogitsProcessorList()
    if not arguments.allow_special_tokens:
        for stream in range(config.num_streams):
            specials = [config.stream_bos_token_ids[stream], config.stream_pad_token_ids[stream]]
            processors.append(StreamLogitsProcessor(stream, ForbiddenTokensLogitsProcessor(specials)))
    if arguments.dead_channels:
        # channel c is space token c + 1
        channels = config.vocab_size - 3
        outside = [channel for channel in arguments.dead_channels if not 0 <= channel < channels]
        if outside:
            raise ValueError(f"--dead_channels {outside[0]}: expected channels from 0 to {channels - 1}")
        tokens = [channel + 1 for channel in arguments.dead_channels]
        processors.append(StreamLogitsProcessor(0, ForbiddenTokensLogitsProcessor(tokens)))
    if arguments.time_ordered:
        if config.num_streams < 2:
            raise ValueError("--time_ordered needs a model with time tokens, not a regressed time")
        last = config.stream_eos_token_ids[1] - 1
        processors.append(StreamLogitsProcessor(1, MonotonicLogitsProcessor(1, last)))
    if arguments.dynamic_temperature:
        schedule = ExponentialTemperatureLogitsProcessor(
            prompt_length=config.num_conditioning_tokens + 1, num_steps=config.max_position_embeddings
        )
        processors.append(schedule)
    elif arguments.sampling != "Greedy":
        # in the list rather than in the configuration: the cuts below come after the temperature
        processors.append(TemperatureLogitsWarper(float(arguments.temperature)))
    if arguments.sampling == "TopK":
        kwargs["top_k"] = arguments.topK
    elif arguments.sampling == "Nucleus":
        kwargs["top_p"] = arguments.nucleus_p
    elif arguments.sampling == "MinP":
        processors.append(MinPLogitsWarper(0.05, min_tokens_to_keep=50))
    return {**kwargs, "logits_processor": processors}


def check_tokenizer(path: str, tokenizer, config):
    """Ids and kinematics mean the same to both, or a ValueError: a default tokenizer would decode another detector."""
    for name, ours in (
        ("vocab_size", tokenizer.vocab_size),
        ("time_vocab_size", tokenizer.time_vocab_size),
        ("conditioning_names", tokenizer.conditioning_names),
        ("conditioning_ranges", tokenizer.conditioning_ranges),
        ("stream_delays", tokenizer.stream_delays),
        ("time_prediction", tokenizer.time_encoding),
    ):
        model = getattr(config, name)
        model = np.asarray(model).tolist() if isinstance(model, (list, tuple)) else model
        if ours != model:
            raise ValueError(f"{path}: {name} of the tokenizer is {ours}, of the model {model}")
    if list(tokenizer.conditioning_names) != ["P", "Theta"]:
        names = ", ".join(tokenizer.conditioning_names)
        raise ValueError(
            f"{path}: the model is conditioned on {names}; this script draws P and Theta, use model.generate()"
        )


def load_generators(arguments: argparse.Namespace, device) -> dict[int, Generator]:
    """PDG code to generator. A model with experts serves both species, a dense one the species it was trained on."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    wanted = {"Pion": [211], "Kaon": [321], "MixPiK": [211, 321]}[arguments.method]
    paths = {211: arguments.pion_model or arguments.model, 321: arguments.kaon_model or arguments.model}
    loaded: dict[str, Generator] = {}
    for pdg in wanted:
        path = paths[pdg]
        name = {211: "pion", 321: "kaon"}[pdg]
        if path is None:
            raise ValueError(f"no model for {name} tracks: pass --model or --{name}_model")
        if path in loaded:
            continue
        config = load_config(path, "cmhca_dirc")
        if "CMHCADircForCausalLM" not in (config.architectures or ["CMHCADircForCausalLM"]):
            raise ValueError(f"{path}: holds a {config.architectures[0]}, expected a generator (CMHCADircForCausalLM)")
        dtype = getattr(torch, arguments.dtype)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(path)
        check_tokenizer(path, tokenizer, config)
        loaded[path] = Generator(model, tokenizer, sampling_kwargs(arguments, model))
    if len(wanted) == 2 and paths[211] == paths[321] and loaded[paths[211]].model.config.num_experts == 0:
        raise ValueError(
            f"{paths[211]}: a model without experts does not know the species; pass --pion_model and --kaon_model, "
            "or --method Pion or Kaon"
        )
    return {pdg: loaded[paths[pdg]] for pdg in wanted}


def generate_tracks(
    generator: Generator,
    kinematics: np.ndarray,
    pdg: np.ndarray,
    rng: np.random.Generator | None,
    min_hits: int = 5,
    max_hits: int = 250,
    legacy_times: bool | None = None,
) -> tuple[dict[str, list], int]:
    """
    One track per row of `kinematics`.

    Tracks with fewer than `min_hits` or more than `max_hits` photons are drawn again with the same kinematics.

    Args:
        kinematics: (tracks, quantities) in physical units. pdg: (tracks,) PDG codes.
        rng: draws arrival times uniformly inside their bin; `None` gives the bin centre.

    Returns:
        the columns of the record, in the order of `kinematics`, and the number of tracks drawn again.

    Raises:
        ValueError: if a track is still invalid after 50 draws.
    """
    import torch

    from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES

    model, tokenizer = generator.model, generator.tokenizer
    rows: list[dict | None] = [None] * len(kinematics)
    missing = np.arange(len(kinematics))
    redrawn = 0
    for _ in range(MAX_REDRAWS):
        class_ids = [tokenizer.class_pdg.index(abs(int(code))) for code in pdg[missing]]
        with torch.inference_mode():
            output = model.generate(
                kinematics=torch.tensor(kinematics[missing], dtype=torch.float32, device=model.device),
                class_ids=torch.tensor(class_ids, device=model.device),
                return_dict_in_generate=True,
                **generator.generate_kwargs,
            )
        times = None if output.continuous is None else output.continuous["times"]
        columns = tokenizer.batch_decode(
            output.sequences,
            kinematics=kinematics[missing],
            pdg=pdg[missing],
            rng=rng,
            min_hits=min_hits,
            max_hits=max_hits,
            times=times,
            legacy=legacy_times,
        )
        for position, index in enumerate(columns["row_index"]):
            rows[missing[index]] = {name: columns[name][position] for name in DIRC_FEATURES}
        missing = np.array([index for index in missing if rows[index] is None], dtype=int)
        if len(missing) == 0:
            return {name: [row[name] for row in rows] for name in DIRC_FEATURES}, redrawn
        redrawn += len(missing)
    values = dict(zip(tokenizer.conditioning_names, kinematics[missing[0]]))
    raise ValueError(
        f"the model made no track of {min_hits} to {max_hits} photons in {MAX_REDRAWS} draws at "
        + ", ".join(f"{name} = {value:g}" for name, value in values.items())
    )


def dump_path(folder: Path, index: int, arguments: argparse.Namespace, num_dumps: int) -> Path:
    if arguments.format == "pickle":
        name = (
            f"{arguments.sampling}_p_{arguments.momentum}_theta_{arguments.theta}_PID_{arguments.method}"
            f"_ntracks_{arguments.n_tracks}_{index}.pkl"
        )
        return folder / name
    return folder / f"generated-{index:05d}-of-{num_dumps:05d}.parquet"


def make_dump(index: int, arguments: argparse.Namespace, generators: dict[int, Generator], bar) -> dict[str, list]:
    """The tracks number `index * n_dump` and following, shuffled as in the published simulation."""
    import torch

    from hepzoo.tokenization.noise_dirc import add_dark_noise

    tracks = np.arange(index * arguments.n_dump, min((index + 1) * arguments.n_dump, arguments.n_tracks))
    rng = np.random.default_rng([arguments.seed, index])
    torch.manual_seed(int(rng.integers(2**63)))
    pdg = species_of(arguments.method, tracks)
    kinematics = np.stack(
        [
            rng.uniform(*parse_range(arguments.momentum, "momentum", MOMENTUM_LIMITS), size=len(tracks)),
            rng.uniform(*parse_range(arguments.theta, "theta", THETA_LIMITS), size=len(tracks)),
        ],
        axis=-1,
    )
    parts = []
    for species, generator in generators.items():
        own = np.flatnonzero(pdg == species)
        for start in range(0, len(own), arguments.batch_size):
            batch = own[start : start + arguments.batch_size]
            columns, redrawn = generate_tracks(
                generator,
                kinematics[batch],
                pdg[batch],
                None if arguments.bin_centres else rng,
                arguments.min_hits,
                arguments.max_hits,
                True if arguments.legacy_times else None,
            )
            parts.append(columns)
            bar.redrawn = getattr(bar, "redrawn", 0) + redrawn
            bar.set_postfix(redrawn=bar.redrawn)
            bar.update(len(batch))
    columns = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    order = rng.permutation(len(tracks))
    columns = {name: [values[i] for i in order] for name, values in columns.items()}
    if arguments.dark_noise:
        detector = next(iter(generators.values())).tokenizer.detector
        columns = add_dark_noise(columns, geometry=detector, rng=rng)
    return columns


def write_dump(columns: dict[str, list], path: Path, dark_noise: bool):
    """Write under a temporary name and rename: a dump is there as a whole or not at all."""
    import pyarrow.parquet as pq
    from datasets import Dataset

    from hepzoo.data_scripts.convert_fm4dirc import write_fm4dirc_pickle
    from hepzoo.data_scripts.dirc_schema import DIRC_FEATURES, DIRC_NOISE_FEATURES, columns_to_records

    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.suffix == ".pkl":
            write_fm4dirc_pickle(columns_to_records(columns), temporary)
        else:
            features = DIRC_NOISE_FEATURES if dark_noise else DIRC_FEATURES
            dataset = Dataset.from_dict({name: columns[name] for name in features}, features=features)
            pq.write_table(dataset.with_format("arrow")[:], temporary, row_group_size=1000, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo generate",
        description="Generate pion and kaon tracks with trained CMHCA-DIRC models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", help="folder or Hub repository of a generator")
    parser.add_argument("--pion_model", help="generator of pions, if separate")
    parser.add_argument("--kaon_model", help="generator of kaons, if separate")
    parser.add_argument("--output", required=True, help="folder for the dumps")
    parser.add_argument("--n_tracks", type=int, default=100_000, help="tracks in total (default 100000)")
    parser.add_argument("--n_dump", type=int, default=5000, help="tracks per file (default 5000)")
    parser.add_argument("--method", choices=["MixPiK", "Pion", "Kaon"], default="MixPiK", help="species")
    parser.add_argument("--momentum", default="1-10", help='GeV/c, "6" or "1-10" (default 1-10)')
    parser.add_argument("--theta", default="25-160", help='polar angle in degrees, "30" or "25-160" (default 25-160)')
    parser.add_argument("--dark_noise", action="store_true", help="add dark counts, 28 kHz per PMT in 100 ns")
    parser.add_argument("--temperature", type=float, default=1.05, help="default 1.05")
    parser.add_argument(
        "--dynamic_temperature", action="store_true", help="1.05 falling to 0.951, replaces temperature"
    )
    parser.add_argument(
        "--sampling",
        choices=["Default", "TopK", "Nucleus", "MinP", "Greedy"],
        default="Nucleus",
        help="default Nucleus",
    )
    parser.add_argument("--topK", type=int, default=300, help="tokens kept by TopK (default 300)")
    parser.add_argument("--nucleus_p", type=float, default=0.995, help="probability kept by Nucleus (default 0.995)")
    parser.add_argument("--seed", type=int, default=752022, help="default 752022")
    parser.add_argument("--batch_size", type=int, default=64, help="tracks per call of generate() (default 64)")
    parser.add_argument("--format", choices=["parquet", "pickle"], default="parquet", help="pickle: FM4DIRC's lists")
    parser.add_argument("--min_hits", type=int, default=5, help="tracks with fewer photons are drawn again (default 5)")
    parser.add_argument("--max_hits", type=int, default=250, help="likewise with more (default 250)")
    parser.add_argument("--time_ordered", action="store_true", help="forbid photons earlier than the one before")
    parser.add_argument(
        "--dead_channels", type=int, nargs="+", default=[], help="channels (pmtID * 256 + pixelID) to mask"
    )
    parser.add_argument("--allow_special_tokens", action="store_true", help="let SOS and pad be drawn, as published")
    parser.add_argument("--bin_centres", action="store_true", help="times at bin centres instead of uniform in the bin")
    parser.add_argument("--legacy_times", action="store_true", help="decode times one bin late, as published")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")
    return parser


def check_arguments(arguments: argparse.Namespace):
    check_at_least(arguments, 1, "n_tracks", "n_dump", "batch_size", "topK", "min_hits", "max_hits")
    check_at_least(arguments, 0, "seed")
    if not 0 < arguments.nucleus_p <= 1:
        raise ValueError(f"--nucleus_p is {arguments.nucleus_p}, expected 0 < p <= 1")
    if not 0 < arguments.temperature < float("inf"):
        raise ValueError(f"--temperature is {arguments.temperature}, expected a finite number > 0")
    if arguments.min_hits > arguments.max_hits:
        raise ValueError(f"--min_hits {arguments.min_hits} is above --max_hits {arguments.max_hits}")
    parse_range(arguments.momentum, "momentum", MOMENTUM_LIMITS)
    parse_range(arguments.theta, "theta", THETA_LIMITS)


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    check_arguments(arguments)
    from accelerate import PartialState

    state = PartialState(cpu=arguments.cpu)
    generators = load_generators(arguments, state.device)
    folder = Path(arguments.output)
    num_dumps = -(-arguments.n_tracks // arguments.n_dump)
    paths = [dump_path(folder, index, arguments, num_dumps) for index in range(num_dumps)]
    sizes = [min(arguments.n_dump, arguments.n_tracks - index * arguments.n_dump) for index in range(num_dumps)]
    # without what changes neither the tracks nor the files
    options = {name: value for name, value in vars(arguments).items() if name not in ("output", "cpu")}

    def make_file(index: int, bar):
        write_dump(make_dump(index, arguments, generators, bar), paths[index], arguments.dark_noise)

    make_missing_files(state, options, paths, sizes, make_file, files="dumps", unit="track")
    if state.is_main_process:
        print(f"{folder}: {arguments.n_tracks} tracks in {num_dumps} files")
    if state.num_processes > 1:
        state.destroy_process_group()
    return 0


if __name__ == "__main__":
    try:
        status = main()
    except (ValueError, OSError) as error:
        print(f"generate.py: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    sys.exit(status)
