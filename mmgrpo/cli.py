"""The command line: each command imports what it needs when it runs, so that `--help` is quick."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import cache
from importlib.metadata import entry_points
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from mmgrpo.toml import RecipeError, nearest

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

if TYPE_CHECKING:
    from mmgrpo.recipe import Recipe

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A TOML file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Such as train.iterations=5.")]
Output = Annotated[Path | None, typer.Option(help="Folder of the run; by default a new one in runs/.")]


@app.callback(epilog="--traceback, anywhere on the line, shows where in the code an error came from.")
def main() -> None:
    """Align multimodal generators with online group-relative reinforcement learning."""


@app.command()
def train(recipe: RecipeName, overrides: Overrides = None, output: Output = None) -> None:
    """Train as a recipe says; Ctrl-C finishes the step and saves."""
    loaded = load_recipe(recipe, overrides)
    folder = run_folder(output, Path(recipe).stem)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; expected a new folder, or go on with: mmgrpo resume {folder}")
    from mmgrpo.trainer import train as start

    with interruptible(folder):
        start(loaded, folder)


@app.command()
def resume(
    run: Annotated[Path, typer.Argument(help="Folder of the run, or of one of its checkpoints.")],
    overrides: Overrides = None,
) -> None:
    """Go on with a run from its newest complete checkpoint, or from the one named, in the folder where it was started."""
    if not run.is_dir():
        raise FileNotFoundError(f"no run in {str(run)!r}: there is no such folder")
    from mmgrpo.trainer import resume as go_on

    with interruptible(run):
        go_on(run, overrides or ())


@app.command()
def demo(
    name: Annotated[str, typer.Argument(help="Such as image.")],
    overrides: Overrides = None,
    seed: Annotated[int, typer.Option(help="Of everything random in the run.")] = 0,
    output: Output = None,
    method: Annotated[str | None, typer.Option(help="In the place of the demo's own, such as flow_grpo.")] = None,
) -> None:
    """Align a tiny model on a CPU, and write what it drew before and after."""
    demos = {point.name: point for point in entry_points(group="mmgrpo.demos")}
    if name not in demos:
        raise RecipeError(f"no demo {name!r}{nearest(name, demos)}")
    folder = run_folder(output, f"demo_{name}")
    demos[name].load()(folder, seed, [*(overrides or ()), *([] if method is None else [f"method={method}"])])
    Console().print(f"Wrote {folder}", soft_wrap=True)


@app.command()
def check(recipe: RecipeName, overrides: Overrides = None) -> None:
    """Test that a recipe would train what it says: exact replay, gradients, rewards; exit code 1 if it would not."""
    loaded = load_recipe(recipe, overrides)
    from mmgrpo.check import check as examine

    report = examine(loaded)
    for line in report.lines:
        Console().print(line, soft_wrap=True, markup=False)
    raise typer.Exit(0 if report.ok else 1)


@app.command("eval")
def evaluate(
    recipe: RecipeName,
    overrides: Overrides = None,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder of a checkpoint; without it, the start.")] = None,
    output: Output = None,
) -> None:
    """Score the evaluation prompts with the weights of a checkpoint."""
    loaded = load_recipe(recipe, overrides)
    from mmgrpo.evaluation import evaluate as score

    scores = score(loaded, checkpoint, run_folder(output, f"eval_{Path(recipe).stem}"))
    for name, value in scores.items():
        Console().print(f"{name} {value:.6g}", markup=False)


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="Such as dapo; without it, all of them.")] = None) -> None:
    """The catalogue of methods: what each changes, what it needs, its part of a recipe."""
    from rich.table import Table

    from mmgrpo.methods import catalogue, definition, needs

    if name is not None:
        Console().print(definition(name), markup=False, highlight=False, soft_wrap=True)
        return
    table = Table("method", "changes", "needs", "status", "paper", title='recipe line: method = "NAME"')
    for one, method in catalogue().items():
        table.add_row(one, method.changes, ", ".join(needs(method)), method.status, method.paper)
    Console().print(table)


def load_recipe(name: str, overrides: Sequence[str] | None) -> "Recipe":
    """Read and check a recipe by path or shipped name; raises RecipeError."""
    from mmgrpo.recipe import load

    return load(recipe_path(name), overrides or ())


def recipe_path(name: str) -> Path:
    """The file a user means: a path, or the name of a shipped recipe; raises RecipeError with the nearest name."""
    if name.endswith(".toml") or len(Path(name).parts) > 1:
        if not Path(name).is_file():
            raise RecipeError(f"no recipe file {name!r}")
        return Path(name)
    folder = Path(str(files("pipelines") / "recipes"))  # by name: the core imports no policy
    shipped = {path.stem: path for path in folder.glob("*.toml")}
    if name not in shipped:
        raise RecipeError(f"no shipped recipe {name!r}{nearest(name, shipped)}")
    return shipped[name]


def run_folder(output: Path | None, name: str) -> Path:
    """The folder asked for, or runs/NAME-DATE-TIME; made here."""
    folder = output or Path("runs") / f"{name}-{datetime.now():%Y%m%d-%H%M%S}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def interruptible(folder: Path) -> Iterator[None]:
    """A stop on request, saved by the loop, and a second Ctrl-C both say how to go on and exit as a shell expects."""
    from mmgrpo.interrupt import Interrupted

    try:
        yield
    except Interrupted as stop:
        _complain(str(stop))
        raise typer.Exit(128 + stop.number) from None
    except KeyboardInterrupt:
        _complain(f"interrupted; go on with: mmgrpo resume {folder}")
        raise typer.Exit(130) from None


@cache
def with_offered_commands() -> typer.Typer:
    """The commands above and those that packages offer: an entry point of `mmgrpo.commands` is a function for typer.

    Its module is imported here, for `--help` too, so it must import what is heavy when the function runs.
    """
    for point in entry_points(group="mmgrpo.commands"):
        try:
            app.command(point.name)(point.load())
        except (ImportError, AttributeError) as error:  # another package's fault stops none of our commands
            _complain(f"the command {point.name!r} cannot be loaded from {point.value}: {error}")
    return app


def _complain(line: str) -> None:
    Console(stderr=True).print(f"mmgrpo: {line}", soft_wrap=True, markup=False, highlight=False)


def run(arguments: Sequence[str] | None = None) -> None:
    """The command `mmgrpo`: a user's mistake becomes one line on stderr and exit code 2."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with_offered_commands()([word for word in given if word != "--traceback"])
    except (ValueError, OSError, FloatingPointError) as error:  # RecipeError is a ValueError
        if "--traceback" in given:
            raise
        _complain(" ".join(str(error).split()))
        sys.exit(2)


if __name__ == "__main__":
    run()
