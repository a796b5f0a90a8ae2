"""The `hepzoo` command: each subcommand hands its arguments to the script of another room."""

import importlib
import sys

import hepzoo

# subcommand -> (what it does, {kind of data: module with main(argv)}); no kind: the module takes all arguments.
# `generate` takes the first kind if none is given.
COMMANDS: dict[str, tuple[str, dict[str, str] | str]] = {
    "simulate": (
        "simulate detector data with the embedded simulators",
        {
            "dirc": "hepzoo.data_scripts.simulate_dirc",
            "showers": "hepzoo.data_scripts.simulate_showers",
            "jets": "hepzoo.data_scripts.simulate_jets",
            "tpc": "hepzoo.data_scripts.simulate_tpc",
        },
    ),
    "generate": (
        "generate physics data with a trained model",
        {
            "dirc": "hepzoo.training.generate",
            "showers": "hepzoo.training.generate_showers",
            "jets": "hepzoo.training.generate_jets",
            "flow-jets": "hepzoo.training.generate_flow_jets",
        },
    ),
    "convert": ("convert a published checkpoint, or published data", "hepzoo.conversion"),
    "evaluate": (
        "compare generated with real data, measure separation power",
        {
            "dirc": "hepzoo.evaluation.evaluate_dirc",
            "showers": "hepzoo.evaluation.evaluate_showers",
            "jets": "hepzoo.evaluation.evaluate_jets",
            "tracking": "hepzoo.evaluation.evaluate_tracking",
            "tokens": "hepzoo.evaluation.token_quality",
            "sets": "hepzoo.evaluation.evaluate_sets",
            "sampling-steps": "hepzoo.evaluation.sampling_steps",
        },
    ),
    "plot": (
        "draw hit patterns, profiles, spectra, yields and ratios",
        {
            "dirc": "hepzoo.evaluation.plot_dirc",
            "showers": "hepzoo.evaluation.plot_showers",
            "jets": "hepzoo.evaluation.plot_jets",
            "tracking": "hepzoo.evaluation.plot_tracking",
        },
    ),
    "convert-data": (
        "published data sets to sharded Parquet",
        {
            "fm4dirc": "hepzoo.data_scripts.convert_fm4dirc",
            "showers": "hepzoo.data_scripts.convert_showers",
            "jetclass": "hepzoo.data_scripts.convert_jetclass",
            "aspenopenjets": "hepzoo.data_scripts.convert_aspenopenjets",
            "toptagging": "hepzoo.data_scripts.convert_toptagging",
            "omnilearned": "hepzoo.data_scripts.convert_omnilearned",
            "tpcpp10m": "hepzoo.data_scripts.convert_tpcpp10m",
            "tpc-bin-edges": "hepzoo.data_scripts.tpc_bin_edges",
        },
    ),
}

EXAMPLES = """\
examples:
  hepzoo simulate dirc --output data/dirc --n_tracks 10000 --method MixPiK --momentum 1-10 --theta 25-160
  hepzoo simulate showers --output data/showers --n_showers 10000 --energy 10-100
  hepzoo simulate jets --output data/jets --classes QCD,Tbqq --n_jets 1000
  hepzoo simulate tpc --output data/tpc --n_events 1000
  hepzoo generate --model pion_generator --n_tracks 1000 --method Pion --momentum 6 --theta 30 --output generated
  hepzoo generate showers --model spade --n_showers 1000 --energy 10-100 --output generated
  hepzoo generate jets --model jets --n_jets 1000 --axes_from data/jets --output generated
  hepzoo generate flow-jets --model epic --n_jets 1000 --classes label_QCD label_Tbqq --output generated
  hepzoo convert cmhca_dirc --checkpoint Pion_model.pth --config CA_config.json --output pion_generator
  hepzoo convert spade --checkpoint model.ckpt --config config.yaml --output spade
  hepzoo convert omnijet --checkpoint model_ckpt.ckpt --config config.yaml --output jet_tokenizer
  hepzoo convert fm4npp --checkpoint pp_nerf_m1_k30.ckpt --config mamba_m1.yaml --output fm4npp_m3
  hepzoo convert omnilearned --checkpoint best_model_pretrain_s.pt --config omnilearned.json --output omnilearned_small
  hepzoo convert epic_fm --checkpoint epicfm_baseline.ckpt --config jetclass_cond.yaml --output epic_fm
  hepzoo convert-data fm4dirc Pions.pkl Kaons.pkl --output data/fm4dirc
  hepzoo convert-data showers gamma-fullG4.hdf5 --output data/showers
  hepzoo convert-data jetclass TTBar_000.root ZJetsToNuNu_000.root --output data/jets
  hepzoo convert-data omnilearned top/train/*.h5 --classes QCD Tbqq --output data/top
  hepzoo convert-data tpcpp10m TPCpp-10M --output data/tpc
  hepzoo convert-data tpc-bin-edges data/tpc/unlabeled/*.parquet --output models/extractor
  hepzoo evaluate dirc --real data/dirc --generated generated
  hepzoo evaluate showers --real data/validation.parquet --generated generated
  hepzoo plot dirc --real data/dirc --generated generated --output plots
  hepzoo evaluate jets --real data/jets --generated generated
  hepzoo evaluate tokens --original data/jets --reconstructed reconstructed
  hepzoo evaluate sets --real data/jets --generated generated --plots plots
  hepzoo evaluate sampling-steps --model epic --real data/jets --output steps.md steps.png
  hepzoo plot showers --real data/validation.parquet --generated generated --output plots
  hepzoo evaluate tracking --input predictions.parquet
  hepzoo plot jets --real data/jets --generated generated --output plots
  hepzoo plot tracking --input predictions.parquet --output plots

`hepzoo COMMAND --help` shows the options and examples of a command."""


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: hepzoo COMMAND ...", "", hepzoo.__doc__.strip().splitlines()[0], "", "commands:"]
    for name, (purpose, kinds) in COMMANDS.items():
        choices = f" ({', '.join(kinds)})" if isinstance(kinds, dict) else ""
        lines.append(f"  {name:<{width}}  {purpose}{choices}")
    return "\n".join([*lines, "", EXAMPLES])


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand. Returns the exit code; bad input is one line on standard error and exit code 2."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] == "--version":
        print(f"hepzoo {hepzoo.__version__}")
        return 0
    command, *rest = argv
    if command not in COMMANDS:
        return fail(f"unknown command {command!r}, expected one of {', '.join(COMMANDS)}")
    target = COMMANDS[command][1]
    if isinstance(target, dict):
        kinds = ", ".join(target)
        if not rest or rest[0] in ("-h", "--help"):
            print(f"usage: hepzoo {command} {{{kinds}}} ...\n\n{COMMANDS[command][0]}\n")
            print("\n".join(line for line in EXAMPLES.splitlines() if f"hepzoo {command} " in line))
            print(f"\n`hepzoo {command} {next(iter(target))} --help` shows the options.")
            return 0 if rest else 2
        if command == "generate" and rest[0].startswith("-"):
            rest = [next(iter(target)), *rest]
        kind, *rest = rest
        if kind not in target:
            return fail(f"{command}: unknown kind {kind!r}, expected one of {kinds}")
        target = target[kind]
    try:
        return importlib.import_module(target).main(rest) or 0
    except (ValueError, OSError) as error:
        return fail(str(error))
    except ImportError as error:
        if "hepzoo[" not in str(error):
            raise
        return fail(str(error))


def fail(message: str) -> int:
    print(f"hepzoo: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
