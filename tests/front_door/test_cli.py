"""The `hepzoo` command: help with examples, one line for every error, exit codes."""

import importlib
import json
import re

import pytest

import hepzoo
from hepzoo.cli import COMMANDS, main
from tests.subprocesses import checked, run_python

# every script behind the command, with the words that lead to it
TARGETS = [
    ([command, *kind], module)
    for command, (_, target) in COMMANDS.items()
    for kind, module in (
        [((), target)] if isinstance(target, str) else [((name,), module) for name, module in target.items()]
    )
]


# the kind that a command takes if the first word is an option
DEFAULT_KINDS = {"generate": "dirc"}


def split_example(words: list[str]) -> tuple[str, list[str]]:
    """Module and arguments of `hepzoo COMMAND ...`."""
    command, *rest = words[1:]
    target = COMMANDS[command][1]
    if isinstance(target, str):
        return target, rest
    if rest[0].startswith("-"):
        rest = [DEFAULT_KINDS[command], *rest]
    return target[rest[0]], rest[1:]


def script_of(module: str) -> str:
    return module.removeprefix("hepzoo.").replace(".", "/") + ".py"


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    try:
        code = main(list(arguments))
    except SystemExit as stop:  # argparse
        code = stop.code or 0
    return code, *capsys.readouterr()


def assert_one_line_error(code: int, out: str, err: str, *expected: str):
    assert code == 2
    assert out == ""
    assert err.startswith("hepzoo: error: ") and err.count("\n") == 1 and err.endswith("\n"), err
    for text in expected:
        assert text in err


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_every_command_with_an_example(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    for command, (purpose, _) in COMMANDS.items():
        assert re.search(rf"^  {command} +{re.escape(purpose)}", out, re.MULTILINE)
        assert f"  hepzoo {command} " in out.split("examples:")[1]


@pytest.mark.parametrize("command", ["simulate", "generate", "convert", "evaluate", "plot"])
def test_the_promised_commands_exist(command):
    assert command in COMMANDS


@pytest.mark.parametrize(("words", "module"), TARGETS, ids=[" ".join(words) for words, _ in TARGETS])
def test_help_of_every_command_shows_options_and_examples(capsys, words, module):
    code, out, err = run(capsys, *words, "--help")
    assert (code, err) == (0, "")
    assert "usage: hepzoo " + words[0] in out
    assert "--output" in out
    assert "examples:" in out
    examples = out.split("examples:")[1]
    of_this = [split_example(line.split())[0] for line in examples.splitlines() if line.split()[:1] == ["hepzoo"]]
    assert module in of_this or f"python {script_of(module)} " in examples
    parser = importlib.import_module(module).build_parser()
    undocumented = [action.option_strings for action in parser._actions if not (action.help or action.choices)]
    assert not undocumented


@pytest.mark.parametrize("command", [name for name, (_, target) in COMMANDS.items() if isinstance(target, dict)])
def test_commands_with_kinds_say_which(capsys, command):
    kinds = COMMANDS[command][1]
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    for kind in kinds:
        assert kind in out
    assert f"hepzoo {command} " in out
    assert run(capsys, command)[0] == 2
    assert_one_line_error(*run(capsys, command, "calorimeter"), "'calorimeter'", *kinds)


def test_examples_of_the_help_are_understood_by_the_parsers():
    """Every example line of every help parses, apart from the files it names."""
    texts = [importlib.import_module("hepzoo.cli").EXAMPLES]
    texts += [importlib.import_module(module).build_parser().epilog for _, module in TARGETS]
    seen = set()
    for line in "\n".join(texts).replace("\\\n", " ").splitlines():
        words = line.split()
        if words[:1] == ["hepzoo"]:
            module, rest = split_example(words)
        elif words[:1] == ["python"]:
            (module,) = (module for _, module in TARGETS if script_of(module) == words[1])
            rest = words[2:]
        else:
            continue
        importlib.import_module(module).build_parser().parse_args([word.strip("\"'") for word in rest])
        seen.add(module)
    assert seen == {module for _, module in TARGETS}


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"hepzoo {hepzoo.__version__}\n", "")


def test_an_unknown_command_is_one_line(capsys):
    assert_one_line_error(*run(capsys, "simulat"), "unknown command 'simulat'", *COMMANDS)
    assert_one_line_error(*run(capsys, "--verbose"), "'--verbose'")


@pytest.mark.parametrize(("words", "module"), TARGETS, ids=[" ".join(words) for words, _ in TARGETS])
def test_an_unknown_option_ends_with_one_line_that_names_it(capsys, words, module):
    code, out, err = run(capsys, *words, "--outputt", "x")
    assert (code, out) == (2, "")
    assert "Traceback" not in err
    assert "error:" in err.splitlines()[-1]


def write_config(folder) -> str:
    (folder / "config.json").write_text("{}")
    return str(folder / "config.json")


def error_cases(folder) -> dict[str, tuple[list[str], str]]:
    """Name -> (arguments, what the line must contain)."""
    config, output, missing = write_config(folder), str(folder / "out"), str(folder / "missing")
    not_a_folder = str(folder / "config.json" / "below" / "deeper")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (folder / "unknown").mkdir()
    (folder / "unknown" / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    convert = ["convert", "cmhca_dirc", "--config", config]
    generate = ["generate", "--output", output, "--cpu", "--n_tracks", "2"]
    showers = ["generate", "showers", "--output", output, "--cpu", "--n_showers", "2"]
    return {
        "convert missing": ([*convert, "--checkpoint", missing, "--output", output], "missing"),
        "convert into a file": ([*convert, "--checkpoint", config, "--output", config], "config.json"),
        "generate without model": ([*generate], "--model"),
        "generate missing model": ([*generate, "--model", missing], missing),
        "generate another family": ([*generate, "--model", str(folder / "model")], "gpt2"),
        "generate unknown family": ([*generate, "--model", str(folder / "unknown")], str(folder / "unknown")),
        "generate momentum": ([*generate, "--model", missing, "--momentum", "1-20"], "--momentum"),
        "simulate below a file": (["simulate", "dirc", "--output", not_a_folder, "--n_tracks", "2"], "config.json"),
        "simulate nothing": (["simulate", "dirc", "--output", output, "--n_tracks", "-1"], "n_tracks"),
        "convert-data missing": (["convert-data", "fm4dirc", missing, "--output", output], "missing"),
        "evaluate missing": (["evaluate", "dirc", "--real", missing, "--generated", missing], "missing"),
        "plot missing": (["plot", "dirc", "--real", missing, "--generated", missing, "--output", output], "missing"),
        "showers: convert missing": (
            ["convert", "spade", *convert[2:], "--checkpoint", missing, "--output", output],
            missing,
        ),
        "showers: generate without model": (showers, "--model"),
        "showers: generate missing model": ([*showers, "--model", missing], missing),
        "showers: generate another family": ([*showers, "--model", str(folder / "model")], "gpt2"),
        "showers: simulate nothing": (
            ["simulate", "showers", "--output", output, "--n_showers", "-1"],
            "num_showers",
        ),
        "showers: convert-data missing": (["convert-data", "showers", missing, "--output", output], "missing"),
        "showers: evaluate missing": (["evaluate", "showers", "--real", missing, "--generated", missing], "missing"),
        "showers: plot missing": (
            ["plot", "showers", "--real", missing, "--generated", missing, "--output", output],
            "missing",
        ),
    }


ERROR_CASES = (
    "convert missing",
    "convert into a file",
    "generate without model",
    "generate missing model",
    "generate another family",
    "generate unknown family",
    "generate momentum",
    "simulate below a file",
    "simulate nothing",
    "convert-data missing",
    "evaluate missing",
    "plot missing",
    "showers: convert missing",
    "showers: generate without model",
    "showers: generate missing model",
    "showers: generate another family",
    "showers: simulate nothing",
    "showers: convert-data missing",
    "showers: evaluate missing",
    "showers: plot missing",
)


@pytest.mark.parametrize("case", ERROR_CASES)
def test_hostile_arguments_are_one_line_without_traceback(capsys, tmp_path, monkeypatch, case):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, expected = error_cases(tmp_path)[case]
    before = set(tmp_path.rglob("*"))
    code, out, err = run(capsys, *arguments)
    assert code != 0 and out == ""
    assert "Traceback" not in err
    lines = [line for line in err.splitlines() if not line.startswith(("usage:", " "))]
    assert len(lines) == 1 and expected in lines[0], err
    assert {path for path in tmp_path.rglob("*") if path.is_file()} <= before


def test_hostile_output_below_a_file_is_one_line(capsys, tmp_path):
    from tests.golden_sets import DEFAULT_FOLDER

    (tmp_path / "file").write_text("")
    golden = DEFAULT_FOLDER / "dirc_filter"
    arguments = ["--checkpoint", str(golden / "state_dict.safetensors"), "--config", str(golden / "config.json")]
    for output in ("file/a", "file/a/b"):
        result = run(capsys, "convert", "cmhca_dirc", *arguments, "--output", str(tmp_path / output))
        assert_one_line_error(*result, "file")


def test_a_missing_extra_is_one_line_that_names_it(capsys, monkeypatch):
    def without_matplotlib(argv):
        raise ImportError('plots need matplotlib: pip install "hepzoo[plots]"')

    monkeypatch.setattr(importlib.import_module(COMMANDS["plot"][1]["dirc"]), "main", without_matplotlib)
    assert_one_line_error(*run(capsys, "plot", "dirc"), 'pip install "hepzoo[plots]"')


def test_defects_of_our_own_keep_their_traceback(monkeypatch):
    """What is no bad input is a defect, and hiding where it is would not help anyone."""

    def broken(argv):
        raise ZeroDivisionError

    monkeypatch.setattr(importlib.import_module(COMMANDS["generate"][1]["dirc"]), "main", broken)
    with pytest.raises(ZeroDivisionError):
        main(["generate", "dirc"])


@pytest.mark.parametrize("command", DEFAULT_KINDS)
def test_a_kind_that_is_left_out_is_the_first(command, monkeypatch):
    seen = []
    for kind, module in COMMANDS[command][1].items():
        monkeypatch.setattr(
            importlib.import_module(module), "main", lambda argv, kind=kind: seen.append((kind, argv)) or 0
        )
    assert next(iter(COMMANDS[command][1])) == DEFAULT_KINDS[command]
    for words in (["--model", "m"], ["dirc", "--model", "m"], ["showers", "--model", "m"]):
        assert main([command, *words]) == 0
    assert seen == [("dirc", ["--model", "m"]), ("dirc", ["--model", "m"]), ("showers", ["--model", "m"])]


def test_module_runs_as_a_command(tmp_path):
    code = """
import json, runpy, sys
sys.argv = json.loads(sys.argv[1])
runpy.run_module("hepzoo.cli", run_name="__main__", alter_sys=True)
"""
    result = run_python(code, tmp_path, json.dumps(["hepzoo", "nonsense"]))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.startswith("hepzoo: error: unknown command 'nonsense'") and result.stderr.count("\n") == 1
    code = "import sys; from hepzoo.cli import main; assert main(['--help']) == 0; assert 'torch' not in sys.modules"
    assert "examples:" in checked(run_python(code, tmp_path))


def test_help_of_every_command_in_a_fresh_process(tmp_path):
    """
    Nothing heavy is imported to print help, and no command needs what another one has imported: every command has an
    interpreter of its own, forked before anything of ours is imported.
    """
    code = """
import io, json, os, sys, traceback
import numpy, pandas, pyarrow.parquet
from contextlib import redirect_stdout
heavy = {"torch", "matplotlib", "accelerate", "sklearn"}
assert not {"hepzoo", *heavy} & set(sys.modules)
for words in json.loads(sys.argv[1]):
    if os.fork() == 0:
        code, text = 1, io.StringIO()
        try:
            from hepzoo.cli import main
            with redirect_stdout(text):
                main([*words, "--help"])
        except SystemExit as stop:
            code = stop.code or 0
        except BaseException:
            traceback.print_exc()
        imported = heavy & set(sys.modules)
        if imported or "examples:" not in text.getvalue():
            print(words, imported, text.getvalue()[:500], file=sys.stderr)
            code = 1
        sys.stderr.flush()
        os._exit(code)
    assert os.waitstatus_to_exitcode(os.wait()[1]) == 0, words
"""
    checked(run_python(code, tmp_path, json.dumps([words for words, _ in TARGETS])))
