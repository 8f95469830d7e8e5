"""Imports point one way, pipelines -> mmgrpo <- rewards, and the mathematics imports torch and records alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"mmgrpo", "pipelines", "rewards"}
ALLOWED = {"mmgrpo": {"mmgrpo"}, "pipelines": {"pipelines", "mmgrpo"}, "rewards": {"rewards", "mmgrpo"}}
INNER = (
    "transitions", "groups", "comparing", "advantages", "baselines", "credit", "risk", "shaping", "entropy_clip", "schedules",
    "aggregations", "facts", "ratios", "objectives", "weighting", "off_policy", "contrasts", "entropy",
    "denoising", "routes", "multistep", "steering", "separate",
)  # fmt: skip
INNER_MAY = {"torch", "mmgrpo.seeds", "mmgrpo.types", *(f"mmgrpo.{name}" for name in INNER)}
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
NAMED = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))


def imported(source: str, package: str) -> set[str]:
    """Every module that a file of `package` imports, at any depth of the code, by absolute name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            inside = module in PACKAGES  # `from mmgrpo import seeds` imports the module mmgrpo.seeds
            found |= {f"{module}.{alias.name}" for alias in node.names} if inside else {module}
    return found


def crossings(source: str, package: str) -> set[str]:
    """The imports of a file that point to one of our packages it must not know."""
    ours = {name for name in imported(source, package) if name.split(".")[0] in PACKAGES}
    return {name for name in ours if name.split(".")[0] not in ALLOWED[package.split(".")[0]]}


def inner_crossings(source: str) -> set[str]:
    """The imports of a file of mathematics that are neither torch, the standard library nor a record."""
    names = imported(source, "mmgrpo")
    return {
        name
        for name in names
        if name.split(".")[0] not in sys.stdlib_module_names | {"torch"} and name not in INNER_MAY
    }


def package_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).parent.parts)


@NAMED
def test_imports_point_one_way(path: Path) -> None:
    assert crossings(path.read_text(), package_of(path)) == set()


@pytest.mark.parametrize("name", INNER)
def test_the_mathematics_imports_torch_and_records_alone(name: str) -> None:
    assert inner_crossings((ROOT / "mmgrpo" / f"{name}.py").read_text()) == set()


@NAMED
def test_package_init_files_stay_light(path: Path) -> None:
    if path.name == "__init__.py":
        assert imported(path.read_text(), package_of(path)) == set()


@pytest.mark.parametrize(
    ("source", "package", "found"),
    [
        ("import pipelines.diffusion", "mmgrpo", {"pipelines.diffusion"}),
        ("def f():\n    from rewards.image import pickscore", "pipelines", {"rewards.image"}),
        ("from pipelines import tape", "rewards", {"pipelines.tape"}),
        ("if True:\n    import pipelines as p", "rewards", {"pipelines"}),
        ("from mmgrpo.types import Samples\nimport torch", "rewards", set()),
        ("from . import tape\nfrom .levels import x", "pipelines", set()),
        ("# import rewards\ntext = 'import rewards'", "pipelines", set()),
    ],
)
def test_a_planted_import_is_found(source: str, package: str, found: set[str]) -> None:
    assert crossings(source, package) == found


def test_a_planted_import_in_the_mathematics_is_found() -> None:
    allowed = "import math\nimport torch.nn.functional\nfrom mmgrpo.types import Feedback\n"
    assert inner_crossings(allowed) == set()
    assert inner_crossings(allowed + "from mmgrpo import trainer\nimport numpy") == {"mmgrpo.trainer", "numpy"}


def test_the_readme_has_one_line_for_every_file() -> None:
    """Under the folder that holds it; folders stand at the margin, files below them."""
    tree = [line for line in (ROOT / "README.md").read_text().split("```")[3].splitlines() if line.strip()]
    folders = [line.split()[0] if line[0] != " " else "" for line in tree]
    inside = [next(name for name in reversed(folders[: place + 1]) if name) for place in range(len(tree))]
    listed = [folder + line.split()[0] for folder, line in zip(inside, tree, strict=True) if line[0] == " "]
    assert len(listed) == len(set(listed))
    files = {path.relative_to(ROOT).as_posix() for path in FILES if path.name != "__init__.py"}
    assert {line for line in listed if line.endswith(".py")} == files
