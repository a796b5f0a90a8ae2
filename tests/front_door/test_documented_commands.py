"""Every command in the documentation has options that exist, with values of the right kind; nothing is run."""

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from hepzoo.cli import COMMANDS
from hepzoo.training.common import parse_arguments

ROOT = Path(__file__).resolve().parents[2]
# hand what they do not know on to a training script
STUDIES = ("training/transfer_study.py", "training/scaling_study.py")
PAGES = ("README.md", "CONTRIBUTING.md", "docs/*.md", "training/*.md", "evaluation/*.md", "model_cards/*/README.md")


def documented_commands() -> list[tuple[str, list[str]]]:
    """(page, words) of the commands in the shell blocks of the pages; those with shell variables are left out."""
    found = []
    for path in sorted(path for pattern in PAGES for path in ROOT.glob(pattern)):
        for block in re.findall(r"```(?:bash|sh|console)\n(.*?)```", path.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "$" in line or not words:
                    continue
                if words[0] == "accelerate":
                    words = words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]
                elif words[0] == "python":
                    words = words[1:]
                is_script = re.fullmatch(r"(training|evaluation|data_scripts)/\w+\.py", words[0])
                if words[0] == "hepzoo" or is_script:
                    found.append((str(path.relative_to(ROOT)), words))
    return found


def parser_of(words: list[str]) -> tuple[argparse.ArgumentParser, list[str]]:
    if words[0] != "hepzoo":
        module = words[0].removesuffix(".py").replace("/", ".")
        return importlib.import_module(f"hepzoo.{module}").build_parser(), words[1:]
    target, rest = COMMANDS[words[1]][1], words[2:]
    if isinstance(target, dict):
        kind, rest = (next(iter(target)), rest) if rest[0].startswith("-") else (rest[0], rest[1:])
        target = target[kind]
    return importlib.import_module(target).build_parser(), rest


@pytest.mark.parametrize(("page", "words"), documented_commands(), ids=lambda value: None)
def test_documented_commands_have_known_options(page, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    parser, rest = parser_of(words)
    try:
        if hasattr(parser, "dataclass_types"):
            parse_arguments(parser, rest)
        elif words[0] in STUDIES:
            parser.parse_known_args(rest)
        else:
            parser.parse_args(rest)
    except SystemExit as stop:
        pytest.fail(f"{page}: {shlex.join(words)}: exit {stop.code}")


def test_every_page_with_shell_blocks_is_read():
    pages = {page for page, _ in documented_commands()}
    assert {"README.md", "evaluation/README.md", "evaluation/results_sets.md"} <= pages
