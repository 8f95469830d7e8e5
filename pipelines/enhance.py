"""The command `mmgrpo enhance`: recordings in, the same recordings with less noise out. It imports what is heavy when it runs."""

import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from mmgrpo.toml import nearest

if TYPE_CHECKING:
    from pipelines.enhance_files import Enhancer

# Containers of audio by suffix: what is looked for in a folder, and what may be written
CONTAINERS = {
    ".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".oga": "OGG", ".opus": "OGG", ".mp3": "MP3", ".aif": "AIFF",
    ".aiff": "AIFF", ".au": "AU", ".caf": "CAF", ".w64": "W64", ".rf64": "RF64",
}  # fmt: skip


class Job(NamedTuple):
    """One recording."""

    source: Path
    target: Path


@dataclass
class Report:
    """What became of the recordings."""

    done: list[Path] = field(default_factory=list)
    seconds: float = 0.0  # of audio that was enhanced
    problems: list[str] = field(default_factory=list)  # a line each, which begins with the file
    scaled: list[str] = field(default_factory=list)  # files that were made quieter, and by how much
    higher: int = 0  # files with a rate above the model's


def command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="A recording, or a folder of them at any depth.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="Where it goes: a file or a folder.")],
    checkpoint: Annotated[Path, typer.Option(help="Folder of a model, of a run or of a checkpoint.")],
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 10,
    power: Annotated[float, typer.Option(help="Above 1 the last steps are shorter; as in policy.power.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the noise that it starts from: the same seed, the same files.")] = 0,
    device: Annotated[str, typer.Option(help="Such as cpu or cuda:0; auto is cuda if there is one.")] = "auto",
    window: Annotated[float, typer.Option(min=1, help="Seconds that are in memory at once.")] = 10.0,
    network: Annotated[str | None, typer.Option(help="Your own network, as mine.py:Net.")] = None,
    vocoder: Annotated[str | None, typer.Option(help="For mel models: mine.py:build, or griffin_lim.")] = None,
    mono: Annotated[bool, typer.Option("--mono", help="Mix channels down instead of keeping each.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Leave out recordings whose file exists.")] = False,
) -> None:
    """Take the noise out of a recording, or of all in a folder; exit code 1 if some could not be done."""
    every = jobs(source, target)
    left = unfinished(every, overwrite=overwrite, resume=resume)
    from pipelines.enhance_files import loaded

    enhancer = loaded(
        checkpoint, steps, device, power=power, window=window, seed=seed, network=network, vocoder=vocoder
    )
    report, begun = Report(), time.perf_counter()
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    try:
        with terminable():
            enhance_all(left, enhancer, report, mono=mono)
    except KeyboardInterrupt:
        console.print(f"mmgrpo: interrupted after {len(report.done)} of {len(left)} files; --resume does the others")
        raise typer.Exit(130) from None
    there = f"; {len(every) - len(left)} were there" if len(left) < len(every) else ""
    took = time.perf_counter() - begun
    print(f"Enhanced {len(report.done)} of {len(left)} files, {report.seconds:.1f} s of audio in {took:.1f} s{there}")
    for line in notes(report, len(left), enhancer.rate):
        console.print(line if line in report.problems else f"mmgrpo: {line}")
    raise typer.Exit(1 if report.problems else 0)


def jobs(source: Path, target: Path) -> list[Job]:
    """What to write for each recording, in the order of their names; raises ValueError or FileNotFoundError."""
    if source.is_file():
        into = target.is_dir() or not target.suffix
        final = target / source.name if into else target
        if final.suffix.lower() not in CONTAINERS:
            raise ValueError(f"cannot write {final}: unknown kind of audio{nearest(final.suffix.lower(), CONTAINERS)}")
        if final.resolve() == source.resolve():
            raise ValueError(f"{source} would be replaced by its own result; expected another OUT")
        return [Job(source, final)]
    if not source.is_dir():
        raise FileNotFoundError(f"no recording and no folder {str(source)!r}")
    if target.is_file():
        raise ValueError(f"{target} is a file; expected a folder for the recordings of {source}")
    if target.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"{target} is inside {source}; expected a folder outside, or its results would be enhanced too"
        )
    names = sorted(path.relative_to(source) for path in source.rglob("*") if path.suffix.lower() in CONTAINERS)
    found = [name for name in names if not name.name.startswith(".") and (source / name).is_file()]
    if not found:
        raise FileNotFoundError(f"no recordings in {source}; looked for {' '.join(CONTAINERS)}")
    return [Job(source / name, target / name) for name in found]


def unfinished(every: Sequence[Job], *, overwrite: bool, resume: bool) -> list[Job]:
    """The recordings that are still to be done; raises FileExistsError if the user must say what happens to others."""
    if overwrite and resume:
        raise ValueError(
            "--overwrite and --resume arrived together; expected one: files that exist are replaced, or left"
        )
    there = [job.target for job in every if job.target.exists()]
    if there and not overwrite and not resume:
        more = f" and {len(there) - 1} more exist" if len(there) > 1 else " exists"
        raise FileExistsError(
            f"{there[0]}{more}; --overwrite replaces what exists, --resume leaves it and does the rest"
        )
    return [job for job in every if overwrite or not job.target.exists()]


def enhance_all(work: Sequence[Job], enhancer: "Enhancer", report: Report, *, mono: bool = False) -> None:
    """Enhance each recording, and write down in the report what became of it; a bad file stops no other."""
    from pipelines.enhance_files import enhance_file, look

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"))
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=quiet) as progress:
        files, seconds = progress.add_task("files", total=len(work)), progress.add_task("seconds", total=0)
        for job in work:
            try:
                facts = look(job.source)
                length = facts.samples / facts.rate
                progress.reset(seconds, total=length, description=f"seconds of {escape(job.source.name)}")
                advance = partial(progress.advance, seconds)
                scale = enhance_file(job.source, job.target, facts, enhancer, mono=mono, advance=advance)
            except (ValueError, OSError) as error:
                report.problems.append(f"{job.source}: {' '.join(str(error).split())}")
            else:
                report.done.append(job.target)
                report.seconds += length
                report.higher += facts.rate > enhancer.rate
                if scale != 1:
                    report.scaled.append(f"{job.target} by {-20 * log10(scale):.1f} dB")
            progress.advance(files)


def notes(report: Report, total: int, rate: int) -> list[str]:
    """What a user should know at the end, a line each; `rate` is the enhancer's, Hz."""
    lines = []
    if report.higher:
        lines.append(
            f"the model works at {rate} Hz: {report.higher} files of higher rates hold nothing above {rate // 2} Hz"
        )
    if report.scaled:
        lines.append(f"made quieter, because their peaks would have been clipped: {', '.join(report.scaled)}")
    if report.problems:
        lines += [f"{len(report.problems)} of {total} files could not be enhanced:", *report.problems]
    return lines


@contextmanager
def terminable() -> Iterator[None]:
    """A request to terminate is treated as Ctrl-C, so that an unfinished file is removed."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
