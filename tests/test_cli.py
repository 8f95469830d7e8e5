"""The command line: quick to start, and a user's mistake is one line on stderr with exit code 2."""

import os
import resource
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer

from mmgrpo import cli

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OFFERED: dict[str, str] = PROJECT["entry-points"]["mmgrpo.commands"]


def outcome(words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[object, str, str]:
    """Exit code, stdout and stderr of a command run in this process."""
    with pytest.raises(SystemExit) as ended:
        cli.run(words)
    printed = capsys.readouterr()
    return ended.value.code, printed.out, printed.err


def test_help_takes_less_than_a_second_of_processor_time() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "mmgrpo.cli", "--help"], cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("train", "resume", "demo", "check", "eval"))
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1


@pytest.mark.parametrize("module", ["mmgrpo.cli", *OFFERED.values()])
def test_starting_the_command_line_imports_no_heavy_library(module: str) -> None:
    code = f"import sys, {module.partition(':')[0]}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not {"torch", "numpy", "pydantic", "diffusers", "transformers", "soundfile"} & set(loaded.split())


def test_the_commands_that_this_project_offers_are_there() -> None:
    group = "mmgrpo.commands"
    assert "enhance" in OFFERED
    assert all(callable(EntryPoint(name, place, group).load()) for name, place in OFFERED.items())


def offering(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command line beside an installed package that offers two commands, one of which cannot be loaded."""
    (folder / "greetings.py").write_text(
        "def hello(name: str, times: int = 1) -> None:\n"
        '    """Greet someone."""\n'
        "    if times < 1:\n"
        "        raise ValueError(f'times is {times}; expected at least 1')\n"
        "    print(*['hello', name] * times)\n"
    )
    facts = folder / "greetings-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: greetings\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text("[mmgrpo.commands]\nhello = greetings:hello\nbye = greetings:bye\n")
    command = [sys.executable, "-m", "mmgrpo.cli", *words]
    place = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    return subprocess.run(command, cwd=folder, env=place, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("words", "code", "out", "err"),
    [
        (["hello", "you", "--times", "2"], 0, "hello you hello you", ""),
        (["hello", "you", "--times", "0"], 2, "", "mmgrpo: times is 0; expected at least 1"),
        (["--help"], 0, "Greet someone.", ""),
        (["train", "absent.toml"], 2, "", "mmgrpo: no recipe file 'absent.toml'"),
    ],
)
def test_a_package_offers_commands_and_a_broken_one_stops_no_other(
    words: list[str], code: int, out: str, err: str, tmp_path: Path
) -> None:
    done = offering(tmp_path, *words)
    assert done.returncode == code
    assert out in done.stdout
    broken, *others = done.stderr.splitlines()
    assert broken.startswith("mmgrpo: the command 'bye' cannot be loaded from greetings:bye: ")
    assert err in "\n".join(others)
    assert others or not err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "absent.toml"], "mmgrpo: no recipe file 'absent.toml'"),
        (["train", "folder/absent"], "mmgrpo: no recipe file 'folder/absent'"),
        (["check", "sd35_medium_orc"], "mmgrpo: no shipped recipe 'sd35_medium_orc'; did you mean 'sd35_medium_ocr'?"),
        (["eval", "broken.toml"], "mmgrpo: broken.toml: not valid TOML: "),
        (["train", "short.toml"], "mmgrpo: short.toml: policy: missing, and it has no default"),
        (["train", "short.toml", "sede=1"], "mmgrpo: short.toml: sede: unknown key; did you mean 'seed'?"),
        (["train", "short.toml", "seed"], "mmgrpo: override 'seed': expected key=value"),
        (["resume", "absent"], "mmgrpo: no run in 'absent': there is no such folder"),
        (["demo", "no_such_demo"], "mmgrpo: no demo 'no_such_demo'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.toml").write_text("seed = \n")
    Path("short.toml").write_text("seed = 1\n")
    code, out, err = outcome(words, capsys)
    assert (code, out) == (2, "")
    assert err.startswith(message)
    assert len(err.splitlines()) == 1
    assert list(tmp_path.glob("runs")) == []


def test_a_mistake_has_a_traceback_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="no recipe file"):
        cli.run(["train", "absent.toml", "--traceback"])


def test_an_unknown_command_or_a_missing_argument_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["trian"], capsys)[0] == 2
    code, _, err = outcome(["train"], capsys)
    assert code == 2
    assert "RECIPE" in err


def test_a_recipe_is_found_by_path_and_by_name(tmp_path: Path) -> None:
    mine = tmp_path / "mine.toml"
    mine.write_text("")
    assert cli.recipe_path(str(mine)) == mine
    assert cli.recipe_path("sd35_medium_ocr") == ROOT / "pipelines" / "recipes" / "sd35_medium_ocr.toml"


def test_an_interrupted_run_says_how_to_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, cli.interruptible(Path("runs/a")):
        raise KeyboardInterrupt
    assert ended.value.exit_code == 130
    assert capsys.readouterr().err == "mmgrpo: interrupted; go on with: mmgrpo resume runs/a\n"


def test_a_run_gets_the_folder_asked_for_or_a_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = tmp_path / "deep" / "down"
    assert cli.run_folder(asked, "x") == asked
    assert asked.is_dir()
    assert cli.run_folder(None, "demo_image").parent == Path("runs")
    assert [path.name[:11] for path in Path("runs").iterdir()] == ["demo_image-"]
    assert os.listdir(asked) == []
