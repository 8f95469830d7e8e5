"""Stand between a diffusers pipeline's own loop and its schedulers and modules.

A tape replaces `step` and `set_timesteps` on the pipeline's scheduler instances and `forward` (and `encode`) on its modules by versions that
ask a listener first. Without a listener the pipeline is the stock one. Listeners record a rollout, replay one, or learn
which modules the loop calls; the pipeline's own `__call__` stays the only place that knows how its model is used.
"""

import functools
import inspect
import operator
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from pipelines.schedulers import is_scheduler
from pipelines.thinning import Change

Call = Callable[..., Any]


class Stop(Exception):  # noqa: N818 - it ends a replay on purpose, nothing went wrong
    """Leaves the pipeline's loop after the last wanted step."""


class StepResult:
    """What a replaced `step` returns: tuple and attribute holder in one; the next sample is drawn when it is read."""

    def __init__(self, draw: Callable[[], Tensor], clean: Tensor) -> None:
        self._draw = functools.cache(draw)
        self.pred_original_sample = clean

    @property
    def prev_sample(self) -> Tensor:
        return self._draw()

    def __getitem__(self, place: int) -> Tensor:
        return (self.prev_sample, self.pred_original_sample)[place] if place else self.prev_sample

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.prev_sample, self.pred_original_sample))

    def __len__(self) -> int:
        return 2


class Listener(Protocol):
    """Decides what happens at each module call and each scheduler step of one run of the pipeline."""

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any: ...

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> StepResult: ...


class Counter:
    """Numbers decision groups: module calls of the loop, then all steps up to the next such call."""

    def __init__(self) -> None:
        self.group = 0
        self.stepped = False

    def called(self) -> int:
        if self.stepped:
            self.group, self.stepped = self.group + 1, False
        return self.group

    def step(self) -> int:
        self.stepped = True
        return self.group


class Tape:
    """The replaced methods of one pipeline and the listener that they ask."""

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline = pipeline
        self.listener: Listener | None = None
        self.reschedule: Change | None = None  # of the run that is going on
        self.pipelines = nested_pipelines(pipeline)
        self.modules: dict[str, nn.Module] = {}
        for member in self.pipelines:
            for name, component in vars(member).items():
                if isinstance(component, nn.Module) and component not in self.modules.values():
                    self.modules[name if name not in self.modules else f"{type(member).__name__}.{name}"] = component
                elif is_scheduler(component):
                    self._replace_step(component)
        for name, module in self.modules.items():
            self._replace_method(name, module, "forward")
            if isinstance(inspect.getattr_static(module, "encode", None), types.FunctionType):
                self._replace_method(f"{name}.encode", module, "encode")

    def _scheduler_places(self) -> list[tuple[DiffusionPipeline, str, SchedulerMixin]]:
        """Every scheduler with the pipeline that holds it and its name there."""
        return [
            (member, name, component)
            for member in self.pipelines
            for name, component in vars(member).items()
            if is_scheduler(component)
        ]

    def schedulers(self) -> list[SchedulerMixin]:
        """Every scheduler of the pipeline and of those inside it."""
        return [component for _, _, component in self._scheduler_places()]

    @contextmanager
    def schedulers_replaced(self, change: Callable[[SchedulerMixin], SchedulerMixin]) -> Iterator[None]:
        """Within the context the pipelines hold changed schedulers, which this tape listens to as well."""
        kept = self._scheduler_places()
        try:
            for member, name, component in kept:
                changed = change(component)
                self._replace_step(changed)
                setattr(member, name, changed)
            yield
        finally:
            for member, name, component in kept:
                setattr(member, name, component)

    def _replace_step(self, scheduler: SchedulerMixin) -> None:
        stock = type(scheduler).step
        signature = inspect.signature(stock)

        @functools.wraps(stock)
        def step(bound: SchedulerMixin, *args: Any, **kwargs: Any) -> Any:
            if self.listener is None:
                return stock(bound, *args, **kwargs)
            arguments = signature.bind(bound, *args, **kwargs)
            arguments.apply_defaults()
            return self.listener.step(bound, arguments.arguments)

        scheduler.step = types.MethodType(step, scheduler)  # a bound method is rebound by copy.deepcopy
        set_stock = type(scheduler).set_timesteps

        @functools.wraps(set_stock)
        def set_timesteps(bound: SchedulerMixin, *args: Any, **kwargs: Any) -> None:
            set_stock(bound, *args, **kwargs)
            if self.reschedule is not None:
                self.reschedule(bound)

        scheduler.set_timesteps = types.MethodType(set_timesteps, scheduler)

    def _replace_method(self, name: str, module: nn.Module, method: str) -> None:
        original: Call = operator.attrgetter(method)(module)

        @functools.wraps(original)
        def replaced(*args: Any, **kwargs: Any) -> Any:
            if self.listener is None:
                return original(*args, **kwargs)
            return self.listener.call(name, original, args, kwargs)

        setattr(module, method, replaced)

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Within the context the listener is asked; pipelines inside the pipeline keep gradients too."""
        if self.listener is not None:
            raise RuntimeError("this pipeline is already being recorded or replayed")
        inner = {type(member) for member in self.pipelines[1:]}
        decorated = {kind: kind.__call__ for kind in inner}
        for kind in inner:
            kind.__call__ = inspect.unwrap(kind.__call__)
        self.listener = listener
        try:
            yield
        finally:
            self.listener = None
            for kind, call in decorated.items():
                kind.__call__ = call

    def run(self, listener: Listener, arguments: Mapping[str, Any], seed: int, reschedule: Change | None = None) -> Any:
        """The pipeline's own call under a listener; None if the listener stopped it. Global randomness is seeded.

        `reschedule` changes the schedulers' tables whenever the pipeline has set its timesteps.
        """
        call = inspect.unwrap(type(self.pipeline).__call__)  # without its no_grad decorator
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with self.listening(listener), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            self.reschedule = reschedule
            try:
                return call(self.pipeline, **arguments)
            except Stop:
                return None
            finally:
                self.reschedule = None


def nested_pipelines(pipeline: DiffusionPipeline) -> list[DiffusionPipeline]:
    """The pipeline and every pipeline that it holds as an attribute."""
    found = [pipeline]
    for member in found:
        found += [item for item in vars(member).values() if isinstance(item, DiffusionPipeline) and item not in found]
    return found


class Discovery:
    """Learns which modules the loop calls and how many groups it has; takes stock steps."""

    def __init__(self) -> None:
        self.events: list[str | None] = []  # a module's name, or None for a step

    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.events.append(name)
        return forward(*args, **kwargs)

    def step(self, scheduler: SchedulerMixin, arguments: Mapping[str, Any]) -> Any:
        self.events.append(None)
        stock = dict(arguments)
        return type(scheduler).step(stock.pop("self"), **stock)

    def denoisers(self) -> tuple[str, ...]:
        """Modules called between two steps, or right before the first; raises ValueError if the loop has one step."""
        steps = [place for place, name in enumerate(self.events) if name is None]
        if len(steps) < 2 or steps[0] == 0:
            raise ValueError(f"the pipeline took {len(steps)} scheduler steps after a module call; expected at least 2")
        inside = self.events[steps[0] - 1 : steps[-1]]
        return tuple(dict.fromkeys(name for name in inside if name is not None))

    def predictors(self, modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
        """The denoisers called right before a step: what is trained unless the user names others.

        Denoisers of the same class beside them in a step count too: models of their own for the two halves of guidance.
        """
        found: dict[str, None] = {}
        calls: list[str] = []  # since the last step
        for name in self.events:
            if name is not None and name in modules:
                calls.append(name)
            elif name is None and calls:
                kind = type(modules[calls[-1]])
                found |= dict.fromkeys(beside for beside in calls if type(modules[beside]) is kind)
                calls = []
        return tuple(found)
