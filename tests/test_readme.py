"""What the README says there is."""

from __future__ import annotations

import re
from pathlib import Path

from data_pipelines.text import SYSTEM_PROMPTS
from svg_jax import sample
from svg_jax.flow.paths import DIFFUSION_FORMS
from svg_jax.flow.solvers import SOLVERS

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_every_solver_stands_in_the_table() -> None:
    rows = [line for line in README.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}
    assert named >= set(SOLVERS)
    assert len(DIFFUSION_FORMS) == 6  # as the table says
    assert len(SYSTEM_PROMPTS) == 7


def test_flags_of_the_sampling_commands_exist() -> None:
    known = {flag for action in sample.parser()._actions for flag in action.option_strings}
    commands = re.findall(r"python -m svg_jax\.sample (.*)", README)
    assert len(commands) == 2
    assert {flag for command in commands for flag in re.findall(r"--[a-z-]+", command)} <= known
