"""What a rollout predicted of its samples behind each step, decoded by the pipeline's own code as if the loop had ended there.

A preview is a call of the pipeline that skips every step, its denoisers answered by zeros, and whose loop ends in the prediction.
The prediction behind a step is that of the next step's model outputs, guidance included: x0hat(x_t', t').
Axes: B samples, S steps, b rows of one pipeline call.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from mmgrpo.types import Batch, Preview, Prompt, Trajectory
from pipelines import arguments
from pipelines.decisions import prediction
from pipelines.engine import Engine, probe_batch
from pipelines.listeners import Recorder, set_up_call
from pipelines.schedulers import advance, state_dtype
from pipelines.stubs import Stub
from pipelines.tape import Call, Counter, StepResult

CLOSE = 1 / 255  # to which a preview of a run's last states is the run's own output: pixels of 8 bits
States = Mapping[int, Tensor]  # part of a step -> (b, ...)


class Predicting:
    """A recorder that also keeps the clean samples predicted in every step but the first: "clean.STEP.PART", (b, ...)."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    @property
    def record(self) -> dict[str, Tensor]:
        return self.recorder.record

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.recorder.call(name, forward, args, kwargs)

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        recorder = self.recorder
        taken = recorder.step(scheduler, arguments)
        step = recorder.counter.group
        if step >= max(1, recorder.way.begin):
            dtype = state_dtype(scheduler, arguments["sample"], prediction(arguments).value)
            recorder.keep(f"clean.{step}.{recorder.parts[step]}", taken.pred_original_sample.to(dtype))
        return taken


class Ending:
    """Skips every step of a pipeline's loop and ends it in given states: the pipeline's own decoding is left."""

    def __init__(self, engine: Engine, stub: Stub, states: States) -> None:
        self.engine = engine
        self.stub = stub
        self.states = states
        self.counter = Counter()
        self.parts = 0  # of the last step, so far
        self.record: dict[str, Tensor] = {}

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name not in self.engine.layout.denoisers:
            return set_up_call(self.engine.memo, self.counter, name, forward, args, kwargs)
        self.counter.called()
        return self.stub(name, forward, args, kwargs, {}, "")

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult:
        step, sample = self.counter.step(), arguments["sample"]
        dtype = state_dtype(scheduler, sample, prediction(arguments).value)
        advance(scheduler, arguments["timestep"])
        state = sample.detach()
        if step == self.engine.layout.steps - 1:
            state = self.states[self.parts].reshape(sample.shape).to(sample.device, copy=True)
            self.parts += 1
        state = state.to(dtype)
        return StepResult(lambda: state, state)


def previews(engine: Engine, trajectory: Trajectory) -> Iterator[Preview]:
    """The predictions behind all steps but the last, decoded in calls of at most `rollout_rows`, one step at a time."""
    stub = blank(engine)
    for step in range(engine.layout.steps - 1):
        states = states_of(trajectory.record, "clean", step + 1)
        if not states:
            continue
        rows = (~states[0].flatten(1).isnan().any(1)).nonzero().flatten().cpu()  # others took no such step
        if len(rows) == 0:
            continue
        batch = trajectory.batch.take(rows)
        chosen = {part: state[rows.to(state.device)] for part, state in states.items()}

        def listen(call: Batch, batch: Batch = batch, chosen: States = chosen) -> Ending:
            mine = torch.isin(batch.sample, call.sample).nonzero().flatten()
            return Ending(engine, stub, {part: state[mine.to(state.device)] for part, state in chosen.items()})

        with torch.no_grad():
            samples = engine.made(batch, listen)[1]
        yield Preview(step, rows, samples)


@torch.no_grad()
def measure(engine: Engine, prompts: Sequence[Prompt]) -> str:
    """A note that the last states of a run are decoded to its own output; raises ValueError with what differed if not."""
    count = 1 if engine.layout.form == "single" else min(2, engine.options.rollout_rows)
    asked = [prompts[row % len(prompts) if engine.layout.mixed else 0] for row in range(count)]
    batch = probe_batch(asked, range(count))
    recorder = engine.recorder(batch, torch.zeros(engine.layout.steps, dtype=torch.bool))
    recorder.everything = True
    made = arguments.to_media(engine.run(Predicting(recorder), batch), count)
    ends = require_alike(engine, recorder.record)
    shown = arguments.to_media(engine.run(Ending(engine, blank(engine), ends), batch), count)
    worst = max(float((shown[medium] - value).abs().max()) for medium, value in made.items())
    if not worst <= CLOSE:
        raise ValueError(
            f"{type(engine.pipeline).__name__} cannot show its predictions: the last states of a run, decoded alone, "
            f"differ from its output by {worst:.1e}; expected at most {CLOSE:.1e}"
        )
    return f"previews: the last states of a run, decoded alone, differ from its output by {worst:.1e}"


def require_alike(engine: Engine, record: Mapping[str, Tensor]) -> States:
    """The states behind the last step; raises ValueError unless every step but the first predicts such ones."""
    last = engine.layout.steps - 1
    ends = states_of(record, "next", last)
    expected = {part: tuple(state.shape) for part, state in ends.items()}
    for step in range(1, last + 1):
        found = {part: tuple(state.shape) for part, state in states_of(record, "clean", step).items()}
        if found != expected:
            raise ValueError(
                f"{type(engine.pipeline).__name__} cannot show its predictions: step {step} predicts "
                f"{[*found.values()]}; expected {[*expected.values()]}, the shapes of its last states"
            )
    return ends


def blank(engine: Engine) -> Stub:
    """What answers with zeros for the engine's denoisers, of whose outputs it knows what the engine's replays know."""
    stub = Stub()
    stub.known = engine.stub.known
    return stub


def states_of(record: Mapping[str, Tensor], kind: str, step: int) -> dict[int, Tensor]:
    """The states "KIND.STEP.PART" of a record, by part."""
    begin = f"{kind}.{step}."
    return {int(name.removeprefix(begin)): value for name, value in record.items() if name.startswith(begin)}


def kept(engine: Engine, recorder: Recorder) -> Recorder | Predicting:
    """The recorder of a rollout, with its predictions if the engine is to keep them."""
    return Predicting(recorder) if engine.predictions else recorder
