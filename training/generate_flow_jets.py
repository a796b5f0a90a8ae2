"""
Jets from a trained flow-matching generator, OmniLearned or EPiC, in the columns of the jet data sets.

    accelerate launch training/generate_flow_jets.py --model runs/epic --n_jets 100000 --output generated

Class, multiplicity and conditions of the jets are drawn from the density saved with the model, or are those of real
jets (`--conditions_from`), which a model that is given particle types or impact parameters needs.
A file depends on `--seed` and its number alone, so that the result is the same for any number of processes, and a
restarted run makes only the files that are missing. With several processes there should be more files than processes.
"""

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from hepzoo.training.generation_common import check_at_least, make_missing_files

EXAMPLES = """\
examples:
  hepzoo generate flow-jets --model runs/epic --n_jets 1000 --output generated
  hepzoo generate flow-jets --model runs/epic --ema --classes label_QCD label_Tbqq --n_jets 10000 --output generated
  hepzoo generate flow-jets --model runs/epic --solver rk4 --num_inference_steps 10 --n_jets 1000 --output quick
  hepzoo generate flow-jets --model runs/generator --conditions_from data/jets/test.parquet --n_jets 1000 --output same
  accelerate launch --num_processes 4 training/generate_flow_jets.py --model runs/epic --n_jets 1000000 --output big
"""


def load_generator(arguments: argparse.Namespace, device: Any) -> tuple[Any, Any]:
    """
    Model, in evaluation mode on the device, and feature extractor.

    Raises:
        ValueError: the folder has no model of these families, or the two do not belong together.
    """
    import torch
    from transformers import AutoConfig, AutoFeatureExtractor

    import hepzoo  # noqa: F401  registers the families
    from hepzoo.modeling.modeling_epic_fm import EpicFMForGeneration
    from hepzoo.modeling.modeling_omnilearned import OmniLearnedForGeneration
    from hepzoo.training.callbacks import EMA_FOLDER
    from hepzoo.training.jet_sets import model_settings

    classes = {"omnilearned": OmniLearnedForGeneration, "epic_fm": EpicFMForGeneration}
    folder = {"subfolder": EMA_FOLDER} if arguments.ema else {}
    try:
        config = AutoConfig.from_pretrained(arguments.model, **folder)
        if config.model_type not in classes:
            expected = " or ".join(classes)
            raise ValueError(f"model type {config.model_type!r} cannot be generated here, expected {expected}")
        model_class = classes[config.model_type]
        if config.architectures not in (None, [model_class.__name__]):
            raise ValueError(f"{config.architectures[0]} is no generator, expected {model_class.__name__}")
        extractor = AutoFeatureExtractor.from_pretrained(arguments.feature_extractor or arguments.model)
        dtype = getattr(torch, arguments.dtype)
        model = model_class.from_pretrained(arguments.model, dtype=dtype, **folder)
    except (ValueError, OSError) as error:
        raise ValueError(f"{arguments.model}: {' '.join(str(error).split())}") from None
    for name, value in model_settings(extractor).items():
        if name not in ("id2label", "label2id", "max_num_particles") and getattr(config, name) != value:
            found = f"{name} is {value}, the model has {getattr(config, name)}"
            raise ValueError(f"{arguments.model}: the feature extractor does not fit the model: {found}")
    return model.to(device).eval(), extractor


def choose_classes(arguments: argparse.Namespace, extractor: Any) -> list[int]:
    """Numbers of the classes to generate: `--classes`, else all that the density has jets of."""
    if arguments.classes is None:
        if extractor.density is None:
            raise ValueError(f"{arguments.model}: no density of conditions is saved with it, set --conditions_from")
        return np.flatnonzero(extractor.density.counts).tolist()
    for name in arguments.classes:
        if name not in extractor.label_names:
            expected = ", ".join(extractor.label_names) or "none, this model has no classes"
            raise ValueError(f"--classes: unknown class {name!r}, expected some of {expected}")
    return [extractor.label_names.index(name) for name in arguments.classes]


def read_requests(arguments: argparse.Namespace, extractor: Any) -> dict[str, list]:
    """Columns of the real jets of `--conditions_from`, of `--classes` only if given."""
    from hepzoo.training.jet_sets import read_jet_files

    columns = read_jet_files(arguments.conditions_from, "conditions_from", extractor)
    if arguments.classes is not None:
        choose_classes(arguments, extractor)
        known = [columns[name] for name in arguments.classes if name in columns]
        chosen = [row for row, flags in enumerate(zip(*known)) if any(flags)]
        if not chosen:
            raise ValueError(f"--conditions_from: no jet of {', '.join(arguments.classes)}")
        columns = {name: [values[row] for row in chosen] for name, values in columns.items()}
    return columns


def make_request(extractor: Any, classes: list[int], real: dict[str, list] | None, count: int, rng: Any) -> dict:
    """Inputs of `generate` for `count` jets."""
    if real is None:
        numbers = rng.permutation(np.resize(classes, count))
        return dict(extractor.sample_conditions(numbers, rng, return_tensors="pt"))
    chosen = rng.integers(len(next(iter(real.values()))), size=count)
    rows = {name: [values[row] for row in chosen] for name, values in real.items()}
    encoded = dict(extractor(rows, return_tensors="pt"))
    del encoded["particles"]
    if "class_ids" in encoded:
        encoded["labels"] = encoded.pop("class_ids")
    return encoded


def write_jets(columns: dict[str, Any], path: Path):
    """Jets in the types of the jet data sets; a file is there as a whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from hepzoo.data_scripts.jets_schema import JETS_FEATURES

    types = {entry.name: entry.type for entry in JETS_FEATURES.arrow_schema}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        arrays = {name: pa.array(values) for name, values in columns.items()}
        table = pa.table({name: array.cast(types.get(name, array.type)) for name, array in arrays.items()})
        pq.write_table(table, temporary, row_group_size=1000, compression="zstd")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hepzoo generate flow-jets",
        description="Generate jets with a trained flow-matching model (OmniLearned or EPiC).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="folder or Hub repository of a generator")
    parser.add_argument("--ema", action="store_true", help="use its averaged weights (sub-folder ema)")
    parser.add_argument("--feature_extractor", help="folder or Hub repository (default: that of the model)")
    parser.add_argument("--output", required=True, help="folder for the files")
    parser.add_argument("--n_jets", type=int, default=1000, help="jets in total (default 1000)")
    parser.add_argument("--classes", nargs="+", help="label columns, in equal parts (default: all that are known)")
    parser.add_argument(
        "--conditions_from",
        nargs="+",
        metavar="FILES",
        help="draw class, multiplicity, conditions and particle types from real jets, with replacement",
    )
    parser.add_argument("--rows_per_shard", type=int, default=10_000, help="jets per file (default 10000)")
    parser.add_argument("--seed", type=int, default=44, help="default 44")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--cpu", action="store_true", help="do not use a GPU")

    sampling = parser.add_argument_group("sampling", "default: the configuration of the model")
    sampling.add_argument("--solver", choices=["euler", "midpoint", "rk4", "dopri5"], help="of the flow")
    sampling.add_argument("--num_inference_steps", type=int, help="steps of a fixed-step solver")
    sampling.add_argument("--tolerance", type=float, help="relative and absolute, of dopri5 (its default 1e-4)")
    sampling.add_argument("--guidance_scale", type=float, help="classifier-free guidance; needs label_dropout")
    sampling.add_argument("--batch_size", type=int, help="most jets at a time (default: as many as are fast)")
    sampling.add_argument(
        "--min_num_particles", type=int, default=1, help="leave out smaller jets, counted (default 1, published 3)"
    )
    sampling.add_argument(
        "--no_postprocess", action="store_true", help="EPiC: no clipping, flags and charges as they came"
    )
    return parser


def run(arguments: argparse.Namespace):
    check_at_least(arguments, 1, "n_jets", "rows_per_shard", "batch_size", "num_inference_steps", "min_num_particles")
    check_at_least(arguments, 0, "seed")
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=arguments.cpu)
    model, extractor = load_generator(arguments, state.device)
    real, classes = None, []
    if arguments.conditions_from is not None:
        real = read_requests(arguments, extractor)
    else:
        if getattr(extractor, "use_particle_ids", False) or getattr(extractor, "use_additional_features", False):
            raise ValueError(f"{arguments.model}: is given particle types or impact parameters, set --conditions_from")
        classes = choose_classes(arguments, extractor)
    folder, size = Path(arguments.output), arguments.rows_per_shard
    num_files = -(-arguments.n_jets // size)
    paths = [folder / f"generated-{index:05d}-of-{num_files:05d}.parquet" for index in range(num_files)]
    sizes = [min(size, arguments.n_jets - index * size) for index in range(num_files)]
    # without what changes neither the jets nor the files
    options = {name: value for name, value in vars(arguments).items() if name not in ("output", "cpu", "batch_size")}
    if real is not None:
        options["jets_sha256"] = hashlib.sha256(json.dumps(real).encode()).hexdigest()
    wanted = ("solver", "num_inference_steps", "guidance_scale", "batch_size")
    sampling = {name: getattr(arguments, name) for name in wanted if getattr(arguments, name) is not None}
    if arguments.tolerance is not None:
        sampling |= {"rtol": arguments.tolerance, "atol": arguments.tolerance}
    more = {"postprocess": False} if arguments.no_postprocess else {}
    if more and not hasattr(extractor, "postprocess"):
        raise ValueError("--no_postprocess: only for the EPiC flow")
    counts: Counter = Counter()

    def make_file(index: int, bar: Any):
        rng = np.random.default_rng([arguments.seed, index])
        request = make_request(extractor, classes, real, sizes[index], rng)
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        sample = model.generate(**request, **sampling, generator=generator)
        about = ("labels", "conditions", "particle_ids", "additional_features")
        columns = extractor.batch_decode(
            sample,
            **{name: request[name] for name in about if name in request},
            min_num_particles=arguments.min_num_particles,
            jet_phi=rng.uniform(-np.pi, np.pi, sizes[index]),
            **more,
        )
        counts["small"] += sizes[index] - len(columns.pop("row_index"))
        write_jets(columns, paths[index])
        bar.update(sizes[index])

    make_missing_files(state, options, paths, sizes, make_file, files="files", unit="jet")
    total = sum(gather_object([counts]), Counter())
    if state.is_main_process:
        left_out = f"; this run: {total['small']} left out as too small" if total["small"] else ""
        print(f"{folder}: {arguments.n_jets} jets in {num_files} files{left_out}")
    if state.num_processes > 1:
        state.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit status."""
    arguments = build_parser().parse_args(argv)
    from hepzoo.modeling.flow_sampling import SolverError

    try:
        run(arguments)
    except (ValueError, OSError, SolverError) as error:
        print(f"hepzoo generate flow-jets: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
