"""The outside of every door: overrides on the command line, and one sentence for whatever is wrong with them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from svg_jax import config as doors

FILE = """
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

def get_config(size="small"):
    optim = dict(lr=1e-4, warmup_steps=0, schedule="constant")
    return ConfigDict(dict(num_train_steps=5, size=size, path=placeholder(str), grid=(2, 3), optim=optim))
"""
Parse = Callable[..., ConfigDict]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "config.py"
    path.write_text(FILE)
    return path


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch, file: Path) -> Parse:
    """Parses arguments as a door does, with flags of its own: the config of `file` unless another one is named."""

    def run(*arguments: str) -> ConfigDict:
        monkeypatch.delitem(sys.modules, "config_config", raising=False)  # what the file is loaded as
        values = flags.FlagValues()
        monkeypatch.setattr(flags, "FLAGS", values)
        config = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
        flags.DEFINE_string("workdir", None, "", flag_values=values)
        flags.mark_flags_as_required(["config", "workdir"], flag_values=values)
        named = any(argument.startswith("--config=") or argument == "--config" for argument in arguments)
        argv = ["door", *([] if named else [f"--config={file}"]), "--workdir=w", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        assert doors.parse(argv) == ["door"]
        return config.value

    return run


def test_values_are_overridden_by_their_path(parse: Parse) -> None:
    config = parse("--config.optim.lr=3e-4", "--config.path=a.jsonl", "--config.grid=(4,5)", "--config.optim.lr=2e-4")
    assert config.optim.lr == 2e-4
    assert config.path == "a.jsonl"
    assert config.grid == (4, 5)
    assert config.num_train_steps == 5
    assert config.is_locked


def test_a_file_takes_an_argument(parse: Parse, file: Path) -> None:
    assert parse(f"--config={file}:large").size == "large"
    assert parse("--config", f"{file}:large").size == "large"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        # Misspelt keys.
        ("--config.optim.lrr=1", "unknown config key 'lrr' in --config.optim.lrr=1: did you mean 'lr'?"),
        ("--config.optm.lr=1", "unknown config key 'optm' in --config.optm.lr=1: did you mean 'optim'?"),
        ("--config.steps=1", "unknown config key 'steps' in --config.steps=1: it has grid, num_train_steps, optim, "),
        ("--config.optim.warmup=9", "unknown config key 'warmup' in --config.optim.warmup=9: did you mean 'warmup_st"),
        ("--config.optim.lr.x=1", "--config.optim.lr.x=1: there are no keys below a value"),
        ("--config.path.x=1", "--config.path.x=1: there are no keys below a value"),
        # Values of the wrong type.
        ("--config.num_train_steps=many", "flag --config.num_train_steps=many: invalid literal for int() "),
        ("--config.num_train_steps=2.5", "flag --config.num_train_steps=2.5: invalid literal for int() "),
        ("--config.optim.lr=fast", "flag --config.optim.lr=fast: could not convert string to float"),
        ("--config.optim=1", "--config.optim=1: a section cannot be replaced by a flag: override the keys in it, or "),
        ("--config.optim=None", "--config.optim=None: a section cannot be replaced by a flag: override the keys in it"),
        ("--config.optim.lr", "Missing value for flag --config.optim.lr"),
        # Other arguments.
        ("--workdr=x", "Unknown command line flag 'workdr'. Did you mean: workdir ?"),
        ("extra", "unknown argument 'extra': values are overridden as --config.KEY=VALUE"),
        # Files.
        ("--config=configs/stage9.py", "--config: there is no file 'configs/stage9.py'"),
        ("--config=configs", "--config: there is no file 'configs'"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(parse: Parse, argument: str, message: str) -> None:
    with pytest.raises(SystemExit) as error:
        parse(argument)
    assert str(error.value).startswith(f"error: {message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1", "--config: '{file}' has no get_config()"),
        ("def get_config():\n    return 5", "--config: get_config() of '{file}' must return a ConfigDict"),
    ],
)
def test_a_file_that_is_no_config_is_named(parse: Parse, file: Path, content: str, message: str) -> None:
    file.write_text(content)
    with pytest.raises(SystemExit) as error:
        parse()
    assert str(error.value) == "error: " + message.format(file=file)


CHECKED = """
from ml_collections import ConfigDict

def get_config(kind="p"):
    if kind not in ("p", "r"):
        raise ValueError(f"kind {kind}:\\nsay :p or :r")
    return ConfigDict(dict(kind=kind))
"""


@pytest.mark.parametrize("override", [(), ("--config.kind=r",), ("--config.kin=r",)])
def test_what_a_file_says_of_its_argument_is_one_sentence(parse: Parse, file: Path, override: tuple[str, ...]) -> None:
    file.write_text(CHECKED)
    assert parse(f"--config={file}:r").kind == "r"
    with pytest.raises(SystemExit) as error:
        parse(f"--config={file}:q", *override)
    assert str(error.value) == "error: --config: kind q: say :p or :r"


def test_a_file_that_takes_no_argument_says_so(parse: Parse, file: Path) -> None:
    file.write_text(CHECKED.replace('kind="p"', "") + "kind = 'p'")
    with pytest.raises(SystemExit) as error:
        parse(f"--config={file}:q")
    expected = f"error: --config: get_config() of '{file}' gets what stands after a colon: too many positional"
    assert str(error.value).startswith(expected)
    assert "\n" not in str(error.value)


def test_a_mistake_inside_a_file_keeps_its_traceback(parse: Parse, file: Path) -> None:
    file.write_text(FILE.replace("return ConfigDict", "return ConfigDict().optim.lr, ConfigDict"))
    with pytest.raises(AttributeError, match="optim"):
        parse()


def test_a_door_ends_with_status_one_and_no_traceback(file: Path) -> None:
    door = "from svg_jax import config; config.run(lambda config, workdir: print(config.optim.lr, workdir))"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", door, f"--config={file}", "--workdir=w", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)

    wrong, right = run("--config.optim.lrr=1"), run("--config.optim.lr=1")
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "error: unknown config key 'lrr' in --config.optim.lrr=1: did you mean 'lr'?"
    assert (right.returncode, right.stdout) == (0, "1.0 w\n")


@pytest.mark.parametrize("kind", [ValueError, FileNotFoundError, PermissionError, ImportError])
def test_what_the_user_gave_ends_in_the_message_alone(kind: type[Exception]) -> None:
    with pytest.raises(SystemExit, match=r"^error: no such thing$"), doors.one_sentence():
        raise kind("no such thing")


def test_an_error_without_words_is_named() -> None:
    with pytest.raises(SystemExit, match=r"^error: MemoryError$"), doors.one_sentence():
        raise MemoryError


def test_mistakes_of_the_program_keep_their_traceback() -> None:
    with pytest.raises(TypeError), doors.one_sentence():
        raise TypeError("not the user's")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Some sizes."""

    dim: int = 4
    num_layers: int = 2
    axes: tuple[int, ...] = (1, 2)


def test_a_section_becomes_a_dataclass() -> None:
    assert doors.from_config(Sizes, ConfigDict({"dim": 8, "axes": [3, 4]})) == Sizes(8, 2, (3, 4))
    assert doors.from_config(Sizes, {"num_layers": 1}) == Sizes(num_layers=1)
    assert doors.from_config(Sizes, ConfigDict(dataclasses.asdict(Sizes(dim=7)))) == Sizes(dim=7)


def test_a_key_that_is_no_field_shows_the_nearest() -> None:
    with pytest.raises(ValueError, match="Sizes has no 'num_layer': did you mean 'num_layers'"):
        doors.from_config(Sizes, {"num_layer": 3})
    with pytest.raises(ValueError, match="Sizes has no 'q': it has dim, num_layers, axes"):
        doors.from_config(Sizes, ConfigDict({"q": 3}))
