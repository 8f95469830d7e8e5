"""How well a world model obeys its actions: a frozen inverse-dynamics model reads the clip and recovers them (RLIR, arXiv 2509.23958).

A clip begins with the first frame and has one more after each of its n actions: F = n + 1. An action has K components (keys,
a binned camera, ...), each of them one of its own classes. Axes: B samples, b of them at a time, C classes of a component.
What a model cannot recover of real clips it cannot reward either: `ceiling` measures that.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import with_config
from torch import Tensor

from mmgrpo.types import Batch, Prompt, Samples, require_shape

Recover = Callable[[Tensor], Tensor | Sequence[Tensor]]  # (b, F, 3, H, W) in [0, 1] -> logits (b, n, C), or K of them
Value = str | int | float


@with_config(extra="forbid")
@dataclass(frozen=True)
class Component:
    """One part of an action, with the classes that the model was trained on, in its order; `values` or `edges` name them."""

    name: str
    values: tuple[Value, ...] = ()  # class k is the k-th value
    edges: tuple[float, ...] = ()  # ascending borders of a number's classes: k - 1 up to below k is class k
    rest: Value | None = None  # the value that does nothing

    def __post_init__(self) -> None:
        if bool(self.values) == bool(self.edges):
            raise ValueError(f"component {self.name!r} has values {self.values} and edges {self.edges}; expected one")
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"component {self.name!r} has edges {self.edges}; expected ascending ones")

    def index(self, value: object) -> int:
        """The class of a value; raises ValueError for one that is none."""
        if self.edges and isinstance(value, int | float):
            return bisect_right(self.edges, value)
        if value in self.values:
            return self.values.index(value)
        known = f"one of {list(self.values)}" if self.values else "a number"
        raise ValueError(f"component {self.name!r} of an action is {value!r}; expected {known}")


def inverse_dynamics(
    *,
    model: Recover,
    components: tuple[Component, ...],
    column: str = "actions",
    form: Literal["tuple", "mean"] = "tuple",
    steps: Literal["all", "moving"] = "all",
    batch: int = 64,
) -> Callable[[Samples], Tensor]:
    """Share of the actions in `column` that the model recovers, in [0, 1]; RLIR's reward.

    form: of compound actions, an action counts if all its components are right ("tuple"), or by the share that is ("mean").
    steps: "moving" leaves out those at rest, as clips that stand still do well where most actions do nothing. NaN: a pixel
    that is not finite, or no step that counts. Raises ValueError where clips and actions do not fit.
    """
    _require_usable(components, batch, rest=steps == "moving")

    def score(samples: Samples) -> Tensor:
        wanted = actions(samples, column, components)
        right = matches(samples, model, wanted, batch)
        counted = moving(wanted, components) if steps == "moving" else torch.ones(wanted.shape[:2], dtype=torch.bool)
        return agreement(right, counted, form)

    return score


def measures(
    *, model: Recover, components: tuple[Component, ...], column: str = "actions", batch: int = 64
) -> Callable[[Samples], Mapping[str, Tensor]]:
    """What is worth watching: "accuracy", "moving" where every component has a value of rest, and that of each component.

    Range, NaN and errors as in `inverse_dynamics`; the reward's components of a recipe share one weight.
    """
    _require_usable(components, batch, rest=False)

    def score(samples: Samples) -> dict[str, Tensor]:
        wanted = actions(samples, column, components)
        right, every = matches(samples, model, wanted, batch), torch.ones(wanted.shape[:2], dtype=torch.bool)
        found = {"accuracy": agreement(right, every, "tuple")}
        if all(component.rest is not None for component in components):
            found["moving"] = agreement(right, moving(wanted, components), "tuple")
        if len(components) > 1:
            found |= {one.name: agreement(right[:, :, [k]], every, "tuple") for k, one in enumerate(components)}
        return found

    return score


def ceiling(
    measure: Callable[[Samples], Mapping[str, Tensor]],
    video: Tensor,
    taken: Sequence[Sequence[object]],
    column: str = "actions",
) -> dict[str, float]:
    """The means that real clips reach, (B, F, 3, H, W) in [0, 1] and the actions taken in each: no generator gets further."""
    ids = torch.arange(len(taken))
    prompts = tuple(Prompt(row, "", columns={column: own}) for row, own in enumerate(taken))
    found = measure(Samples(Batch(prompts, ids, ids, 0, 0), video=video))
    return {name: float(values.nanmean()) for name, values in found.items()}


def actions(samples: Samples, column: str, components: Sequence[Component]) -> Tensor:
    """The classes of every wanted action; -> (B, n, K) int64.

    A prompt's column is a list of n actions: each a value if K is 1, else a table by component or a list in their order.
    """
    if samples.video is None:
        raise ValueError("the samples carry no video; expected video of shape (B, F, 3, H, W)")
    require_shape("video", samples.video, len(samples), None, 3, None, None)
    frames, rows = samples.video.shape[1], []
    for prompt in samples.prompts:
        wanted = prompt.columns.get(column)
        if not isinstance(wanted, list | tuple):
            raise ValueError(f"prompt {prompt.id} has {column} {wanted!r}; expected a list of actions")
        if len(wanted) != frames - 1:
            raise ValueError(
                f"prompt {prompt.id} has {len(wanted)} actions for a clip of {frames} frames; expected {frames - 1}, "
                "one from each frame to the next"
            )
        rows.append([_classes(action, components) for action in wanted])
    return torch.tensor(rows, dtype=torch.int64).view(len(samples), frames - 1, len(components))


def _classes(action: object, components: Sequence[Component]) -> list[int]:
    """The class of each component of one action."""
    names = [component.name for component in components]
    if isinstance(action, Mapping) and action.keys() == set(names):
        values = [action[name] for name in names]
    elif isinstance(action, list | tuple):
        values = list(action)
    else:
        values = [action]
    if len(values) != len(names):
        raise ValueError(f"an action is {action!r}; expected the components {', '.join(names)}")
    return [component.index(value) for component, value in zip(components, values, strict=True)]


def moving(wanted: Tensor, components: Sequence[Component]) -> Tensor:
    """Which actions do something, by any of their components; (B, n, K) -> (B, n) bool."""
    rest = torch.tensor([component.index(component.rest) for component in components])
    return (wanted != rest).any(2)


@torch.no_grad()
def matches(samples: Samples, model: Recover, wanted: Tensor, batch: int) -> Tensor:
    """1 where the model recovers the component that was wanted, 0 elsewhere, NaN in clips with a pixel that is not finite.

    The model reads whole clips, `batch` at a time. (B, n, K) int64 -> (B, n, K) float32.
    """
    assert samples.video is not None
    right = torch.full(wanted.shape, torch.nan)
    rows = samples.video.flatten(1).isfinite().all(1).nonzero()[:, 0]
    for part in rows.split(batch) if len(rows) else ():
        logits = model(samples.video[part])
        each = [logits] if isinstance(logits, Tensor) else list(logits)
        if len(each) != wanted.shape[2]:
            raise ValueError(f"the model recovers {len(each)} components of an action; expected {wanted.shape[2]}")
        for values in each:
            require_shape("the model's logits", values, len(part), wanted.shape[1], None)
        found = torch.stack([values.argmax(2).cpu() for values in each], 2)
        right[part.cpu()] = (found == wanted[part.cpu()]).float()
    return right


def agreement(right: Tensor, counted: Tensor, form: Literal["tuple", "mean"]) -> Tensor:
    """Mean over the counted steps, of an action's all or mean components; (B, n, K), (B, n) bool -> (B,), NaN without any."""
    require_shape("counted", counted, *right.shape[:2])
    step = right.amin(2) if form == "tuple" else right.mean(2)  # NaN stays NaN in both
    return torch.where(counted, step, 0).sum(1) / counted.sum(1)


def _require_usable(components: Sequence[Component], batch: int, rest: bool) -> None:
    if not components or batch < 1:
        raise ValueError(f"{len(components)} components, batch {batch}; expected at least 1 of each")
    if rest and (lacking := [component.name for component in components if component.rest is None]):
        raise ValueError(f'component {lacking[0]!r} has no value of rest; steps = "moving" needs one')
