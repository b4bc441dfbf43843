"""What the README says there is."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from data_pipelines.text import SYSTEM_PROMPTS
from svg_jax import latent_stats, reconstruct, sample
from svg_jax.evaluate import __main__ as evaluate
from svg_jax.flow.paths import DIFFUSION_FORMS
from svg_jax.flow.solvers import SOLVERS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_solver_stands_in_the_table() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert named >= set(SOLVERS)
    assert len(DIFFUSION_FORMS) == 6  # as the table says
    assert len(SYSTEM_PROMPTS) == 7


@pytest.mark.parametrize(
    ("door", "parser", "times"),
    [
        ("sample", sample.parser(), 2),
        ("reconstruct", reconstruct.parser(), 1),
        ("latent_stats", latent_stats.parser(), 1),
        ("evaluate reconstruction", evaluate.parser(), 1),
        ("evaluate generate", evaluate.parser(), 3),
        ("evaluate geneval", evaluate.parser(), 1),
        ("evaluate dpg questions", evaluate.parser(), 1),
        ("evaluate dpg score", evaluate.parser(), 1),
        ("evaluate fid", evaluate.parser(), 2),
    ],
)
def test_flags_of_the_commands_exist(door: str, parser: argparse.ArgumentParser, times: int) -> None:
    for command in door.split(" ")[1:]:
        choices = next(action.choices for action in parser._actions if isinstance(action.choices, dict))
        parser = choices[command]
    known = {flag for action in parser._actions for flag in action.option_strings}
    commands = re.findall(rf"python -m svg_jax\.{door} (.*)", README.replace("\\\n", " "))
    assert len(commands) == times
    assert {flag for command in commands for flag in re.findall(r" (--[a-z-]+)", command)} <= known


def test_every_config_is_named() -> None:
    named = re.findall(r"`configs/([\w{},*]+)\.py`", README)
    patterns = [
        re.sub(r"{([^}]*)}", lambda m: f"({m[1].replace(',', '|')})", name).replace("*", ".*") for name in named
    ]
    configs = {path.stem for path in (Path(__file__).parents[1] / "configs").glob("*.py")} - {"__init__"}
    bases = {name for name in configs if name.endswith("base")}
    assert {name for name in configs - bases if not any(re.fullmatch(pattern, name) for pattern in patterns)} == set()


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "launch/README.md"])
def test_pages_are_finished_and_show_pictures_that_are_there(page: str) -> None:
    path = Path(__file__).parents[1] / page
    text = path.read_text()
    assert not re.search(r"^[A-Z_]{4,}$|TODO|TBD", text, re.MULTILINE)
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text):
        assert (path.parent / picture).is_file(), picture


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md", "launch/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = Path(__file__).parents[1] / page
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        file = path.parent / name if name else path
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", file.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}, target


def test_the_table_of_meshes_has_every_stage_on_every_slice() -> None:
    for stage in (1, 2, 3, 4):
        for topology in ("v5e:16x16", "v5p:4x4x4", "v6e:16x16"):
            assert re.search(rf"^\| (3 and )?{stage}( and 4)?, [^|]*\| {topology} \|", README, re.MULTILINE), (
                stage,
                topology,
            )
