"""Contract: what the README and the help show exists, and the tables that ship are whole."""

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import hwnas
from hwnas.calibration import calibrate
from hwnas.cli import app
from hwnas.latency import load_table
from hwnas.profiling import covers
from hwnas.space_toml import load_space, shipped_spaces

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def all_commands(group: Any, before: str = "") -> dict[str, Any]:
    """Every command by its words: `search`, `devices` and `devices add`."""
    found = {}
    for name, command in group.commands.items():
        found[before + name] = command
        if hasattr(command, "commands"):
            found |= all_commands(command, f"{before}{name} ")
    return found


COMMANDS = all_commands(typer.main.get_command(app))
TABLES = sorted((ROOT / "latency_tables").rglob("*.json"))


def documented_commands() -> list[str]:
    """Every `hwnas VERB ...` of the README, of docs/ and of the examples in the help."""
    examples = [command.epilog.removeprefix("Example: ") for command in COMMANDS.values()]
    pages = (README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md")))
    blocks = "\n".join(block for page in pages for block in re.findall(r"^```\n(.*?)^```", page, re.S | re.M))
    lines = re.findall(r"(?:^|\.venv/bin/)(hwnas .*)", blocks, re.M)
    return [line.split("  #")[0].strip() for line in lines] + examples


def verb_of(line: str) -> tuple[str, list[str]]:
    """The verb of a command, of two words in a group, and what follows."""
    first, *rest = line.removeprefix("hwnas ").split()
    two = " ".join([first, *rest[:1]])
    return (two, rest[1:]) if two in COMMANDS and rest else (first, rest)


@pytest.mark.parametrize("line", documented_commands())
def test_every_documented_command_has_its_verb_and_options(line: str):
    verb, words = verb_of(line)
    if verb.startswith("--"):
        return
    assert verb in COMMANDS
    options = {name for parameter in COMMANDS[verb].params for name in parameter.opts}
    for word in words:
        assert not word.startswith("--") or word in options


def test_the_readme_documents_every_verb():
    assert set(COMMANDS) == {verb_of(line)[0] for line in documented_commands() if not line.startswith("hwnas --")}


def test_the_names_that_the_readme_uses_from_python_exist():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.S)
    used = {
        node.attr
        for node in ast.walk(ast.parse(snippet))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "hwnas"
    }
    assert used <= set(hwnas.__all__)
    for name in used:
        getattr(hwnas, name)


def test_latency_tables_ship():
    assert TABLES


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_a_table_that_ships_is_measured_and_covers_its_space(path: Path):
    table = load_table(path)
    assert table.conditions.origin == "measured"
    assert table.space in shipped_spaces()
    assert covers(table, load_space(table.space))
    assert (table.memory is None) == (table.conditions.device == "gpu")  # whose runtime does not show it


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.name)
def test_the_line_of_a_table_that_ships_is_the_one_that_its_timings_give_today(path: Path):
    shipped = load_table(path).calibration
    today = calibrate(shipped.networks)
    assert today.upper_ratio == pytest.approx(shipped.upper_ratio, rel=0.01)
    for network in shipped.networks:
        ms = (calibration.line.latency_ms(network.sum_ms, network.parameters) for calibration in (shipped, today))
        assert next(ms) == pytest.approx(next(ms), rel=1e-3)
