"""Several denoising steps of several samples in one forward of the denoiser.

In a replay the states are known, so the arguments of every denoiser call are too: they are captured from a run of the
pipeline that makes none of the calls, joined along the batch, evaluated at once, and dealt out to a second run. Which
arguments carry the batch is found by comparing a capture with one of twice as many rows.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmgrpo.types import Evaluation, Trajectory
from pipelines.stubs import Stub
from pipelines.tape import Call


class Unbatchable(ValueError):  # noqa: N818 - names what the pipeline is
    """The steps of this pipeline cannot share a forward, for the reason given."""


class DenoiserCall(NamedTuple):
    """A call that a pipeline wanted to make."""

    name: str
    forward: Call
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Capture:
    """A stub that notes the calls of the given steps and answers like the stub beside it."""

    def __init__(self, stub: Stub, steps: Sequence[int]) -> None:
        self.stub = stub
        self.steps = steps
        self.calls: dict[str, DenoiserCall] = {}

    def learn(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        return self.stub.learn(name, args, kwargs, output)

    def __call__(
        self,
        name: str,
        forward: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        record: Mapping[str, Tensor],
        key: str,
    ) -> Any:
        if int(key.split(".")[1]) in self.steps:
            self.calls[key] = DenoiserCall(name, forward, args, kwargs)
        return self.stub(name, forward, args, kwargs, record, key)


def together(calls: Mapping[str, DenoiserCall], twice: Callable[[], Mapping[str, DenoiserCall]]) -> dict[str, Any]:
    """The outputs of captured calls, those of one module at one place in their step made in one forward; by call.

    `twice` captures the calls with every row doubled. Raises Unbatchable if steps differ in more than batched arguments.
    """
    wider = twice()
    outputs: dict[str, Any] = {}
    for keys in by_place(calls):
        chosen = [calls[key] for key in keys]
        inputs = [(call.args, call.kwargs) for call in chosen]
        double = wider[keys[0]]
        lead = batch_size(inputs[0], (double.args, double.kwargs))
        args, kwargs = join(inputs, (double.args, double.kwargs), lead)
        outputs |= dict(zip(keys, deal(chosen[0].forward(*args, **kwargs), len(keys)), strict=True))
    return outputs


def by_place(calls: Mapping[str, DenoiserCall]) -> list[list[str]]:
    """Call keys "denoised.step.place" that share a place and a module (experts take turns), steps in order."""
    places: dict[tuple[str, str], list[str]] = {}
    for key, call in calls.items():
        places.setdefault((call.name, key.split(".")[2]), []).append(key)
    return list(places.values())


def batch_size(value: Any, double: Any) -> int:
    """The leading size of the arguments that carry the batch; raises Unbatchable if none does."""
    sizes = batch_sizes(value, double)
    if not sizes:
        raise Unbatchable("no argument of the denoiser carries the batch")
    return max(sizes)


def batch_sizes(value: Any, double: Any) -> list[int]:
    """The leading sizes of everything that doubles with the batch: tensors by rows, lists by items."""
    if isinstance(value, Tensor):
        return [len(value)] if value.dim() and len(double) == 2 * len(value) else []
    if isinstance(value, dict):
        return [size for name in value for size in batch_sizes(value[name], double[name])]
    if isinstance(value, list) and len(double) == 2 * len(value):
        return [len(value)]
    if isinstance(value, (list, tuple)):
        return [size for one, two in zip(value, double, strict=True) for size in batch_sizes(one, two)]
    return []


def join(values: list[Any], double: Any, lead: int) -> Any:
    """One set of arguments from those of several steps."""
    first = values[0]
    if isinstance(first, Tensor):
        return join_tensors(values, double, lead)
    if isinstance(first, dict):
        return {name: join([value[name] for value in values], double[name], lead) for name in first}
    if isinstance(first, list) and len(double) == 2 * len(first):
        return [item for value in values for item in value]
    if isinstance(first, (list, tuple)):
        return type(first)(join(list(parts), two, lead) for *parts, two in zip(*values, double, strict=True))
    if any(value is not first and value != first for value in values[1:]):
        raise Unbatchable(f"steps differ in an argument that carries no batch: {first!r}")
    return first


def join_tensors(values: list[Tensor], double: Tensor, lead: int) -> Tensor:
    first = values[0]
    if first.dim() and len(double) == 2 * len(first):
        return torch.cat(values)
    if all(torch.equal(value, first) for value in values[1:]):
        return first
    if first.numel() == 1:  # a timestep for all rows becomes one for each
        return torch.cat([value.reshape(1).expand(lead) for value in values])
    raise Unbatchable(f"steps differ in an argument of shape {tuple(first.shape)} that carries no batch")


def deal(output: Any, count: int) -> list[Any]:
    """The output of a joined forward as one output per step."""
    if isinstance(output, Tensor):
        return list(output.chunk(count))
    if isinstance(output, list):
        size = len(output) // count
        return [output[place * size : (place + 1) * size] for place in range(count)]
    if isinstance(output, tuple):
        return [tuple(parts) for parts in zip(*(deal(item, count) for item in output), strict=True)]
    if isinstance(output, dict):
        parts = {name: deal(item, count) for name, item in output.items()}
        return [type(output)(**{name: items[place] for name, items in parts.items()}) for place in range(count)]
    raise Unbatchable(f"the denoiser returned a {type(output).__name__}; expected tensors")


def doubled(part: Trajectory) -> Trajectory:
    """Every row twice."""
    return part.take(torch.arange(len(part)).repeat(2))


def joined(evaluations: Sequence[Evaluation]) -> Evaluation:
    """Evaluations of single steps, (b, 1) each, as one, (b, s)."""
    names = evaluations[0].tensors()
    return Evaluation(**{name: torch.cat([value.tensors()[name] for value in evaluations], 1) for name in names})
