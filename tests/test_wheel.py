"""The wheel, built from a copy of the sources and installed elsewhere, holds all that the packages need."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
PARTS = ("mmgrpo", "pipelines", "rewards", "assets", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing ignored by git and no earlier build can find its way in."""
    folder = tmp_path_factory.mktemp("sources")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, folder)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder / "dist", cwd=folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it; the dependencies come from the environment of the tests."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder, cwd=folder)
    python = folder / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    ours = [path for path in sys.path if Path(path).name == "site-packages"]  # not the sources, were they installed
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")  # after the wheel's own on sys.path
    return python


def test_the_wheel_imports_from_an_empty_folder(python: Path, tmp_path: Path) -> None:
    code = (
        "import json, mmgrpo, pipelines, rewards; print(json.dumps([m.__file__ for m in (mmgrpo, pipelines, rewards)]))"
    )
    files = json.loads(run(python, "-I", "-c", code, cwd=tmp_path))
    assert all(Path(file).is_relative_to(python.parent.parent) for file in files)


def test_every_module_of_the_wheel_imports(wheel: Path, python: Path, tmp_path: Path) -> None:
    modules = [
        name[:-3].replace("/", ".").removesuffix(".__init__")
        for name in ZipFile(wheel).namelist()
        if name.endswith(".py")
    ]
    assert {module.split(".")[0] for module in modules} == {"mmgrpo", "pipelines", "rewards"}
    run(python, "-I", "-c", f"import importlib\nfor name in {modules!r}: importlib.import_module(name)", cwd=tmp_path)


def test_the_wheel_holds_the_recipes_and_the_demos_files(wheel: Path) -> None:
    packed = set(ZipFile(wheel).namelist())
    recipes = {f"pipelines/recipes/{path.name}" for path in (ROOT / "pipelines" / "recipes").glob("*.toml")}
    assets = ROOT / "assets"
    files = [path for demo in assets.glob("*_demo") for path in demo.rglob("*") if path.is_file()]
    shipped = {f"pipelines/shipped/{path.relative_to(assets)}" for path in files}
    assert recipes | shipped <= packed
    assert recipes


def test_the_installed_command_knows_the_shipped_recipes_and_demos(python: Path, tmp_path: Path) -> None:
    command = python.parent / "mmgrpo"
    for words, expected in ((["train", "sd35_medium_orc"], "sd35_medium_ocr"), (["demo", "imge"], "image")):
        done = subprocess.run([str(command), *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 2
        assert f"did you mean {expected!r}?" in done.stderr
