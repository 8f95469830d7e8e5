"""A pipeline learns what its guide does, so that it samples as well without: v_theta -> v_teach - kappa grad R.

The distillation of Euphonium (arXiv 2602.04928), known from a public note alone: which network gives v_teach is RECONSTRUCTED.
It runs in the stage "pretrain": a guided rollout, then the squared difference of today's outputs from those that need no guide.
Axes: B samples, S steps.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from diffusers import SchedulerMixin
from torch import Tensor
from torch.nn import Parameter

from mmgrpo import shadow
from mmgrpo.transitions import Gaussian
from mmgrpo.types import Batch, Chunk, Consumer, Finding, Lesson, Prompt, Reference, Samples, Trajectory
from pipelines.decisions import Transition, levels_of, prediction, transition
from pipelines.diffusion import DiffusionPolicy
from pipelines.guides import slope

Teacher = Literal["start", "today"]


class Student:
    """A guided pipeline that learns from its guide; in all else the pipeline itself."""

    whole_samples = False

    def __init__(self, generator: DiffusionPolicy, teacher: Teacher) -> None:
        guide = generator.engine.options.guide
        if guide is None:
            raise ValueError("policy.generator.guide is not set; expected the guide that is to be learned")
        generator.engine.options = replace(generator.engine.options, guide=replace(guide, absorbs=True))
        self.generator = generator
        self.teacher = teacher
        self.start: shadow.Reference | None = None  # the weights at the start

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        self.generator.prepare(prompts)
        if self.teacher == "start":
            self.start = shadow.Reference("frozen", self.generator.trainable())

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """Mean squared difference of outputs at the guided steps of each row, a step at a time; the states are the teacher's."""
        with nullcontext() if self.start is None else self.start.applied():
            trajectory, _ = self.generator.rollout(batch)
        lesson = targets(trajectory)
        steps = int(lesson.mask[0].sum())

        def hand_over(chunk: Chunk) -> None:
            assert chunk.evaluation.drift is not None
            consume(chunk.rows, 2 * chunk.evaluation.drift.sum(1) / steps)

        with self._plain_steps():
            self.generator.replay(lesson, hand_over)

    @contextmanager
    def _plain_steps(self) -> Iterator[None]:
        """Within the context the KL of two steps is half the mean squared difference of their model outputs."""
        engine = self.generator.engine
        asked = engine.options
        engine.options = replace(asked, kernel=plain, reduction="mean")
        try:
            yield
        finally:
            engine.options = asked

    # -- the pipeline itself --------------------------------------------------------------------------------------

    def rollout(self, batch: Batch) -> tuple[Trajectory, Samples]:
        return self.generator.rollout(batch)

    def generate(self, batch: Batch) -> Samples:
        """One sample per row with the noise off, and with it the guide."""
        return self.generator.generate(batch)

    def anchor(self, trajectory: Trajectory, parts: Sequence[Tensor]) -> Trajectory:
        return self.generator.anchor(trajectory, parts)

    def replay(self, trajectory: Trajectory, consume: Consumer, reference: Reference | None = None) -> None:
        self.generator.replay(trajectory, consume, reference)

    def trainable(self) -> dict[str, Parameter]:
        return self.generator.trainable()

    def adapters_off(self) -> AbstractContextManager[None]:
        return self.generator.adapters_off()

    def self_test(self, prompts: Sequence[Prompt]) -> list[Finding]:
        return self.generator.self_test(prompts)

    def save(self, folder: Path) -> None:
        self.generator.save(folder)


def targets(trajectory: Trajectory) -> Trajectory:
    """The guided steps of a rollout, and in the place of its model outputs those that need no guide."""
    record = dict(trajectory.record)
    guided = trajectory.mask & ~record["process_scores"].isnan()
    for name in [name for name in record if name.startswith("absorbed.")]:
        record[name.replace("absorbed.", "output.")] = record.pop(name)
    return Trajectory(trajectory.batch, guided, trajectory.kind, record)


def plain(scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> Callable[[Tensor], Transition]:
    """The deterministic step, as wide as a model output of 1 moves it: its KL is half a squared difference of outputs."""
    levels, predicted = levels_of(scheduler, arguments), prediction(arguments)
    width = slope(levels).abs()

    def step(value: Tensor) -> Transition:
        taken = transition(levels, arguments["sample"], predicted._replace(value=value), None)
        return taken._replace(gaussian=Gaussian(taken.gaussian.mean, width.to(taken.gaussian.mean)))

    return step


def student(*, generator: DiffusionPolicy, teacher: Teacher = "start") -> Student:
    """A pipeline that learns what its guide does, with train.stage = "pretrain".

    generator: a table that builds it, pipelines.diffusion:load with a guide. teacher: whose guided rollouts and outputs are
    learned from: those of the weights at the start, or today's, with which the shift of every lesson adds to the last.
    """
    return Student(generator, teacher)
