"""What answers for a denoiser at the steps that a replay does not evaluate."""

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pipelines import structure
from pipelines.tape import Call


class StandIn(Protocol):
    """Answers the denoiser calls that a replay does not make, and may note those it makes."""

    def learn(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any: ...

    def __call__(
        self,
        name: str,
        forward: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        record: Mapping[str, Tensor],
        key: str,
    ) -> Any: ...


class Stub:
    """Stands in for a denoiser at unwanted steps: zeros, the recorded outputs, or the real forward without gradient."""

    LADDER = ("zeros", "recorded", "real")

    def __init__(self, kind: str = "zeros") -> None:
        self.kind = kind
        self.known: dict[tuple[Any, ...], Any] = {}  # call geometry -> an output of meta tensors

    def learn(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Note the structure of an output that was computed anyway."""
        self.known.setdefault(geometry(name, args, kwargs), structure.map_tensors(output, shape_only))
        return output

    def __call__(
        self,
        name: str,
        forward: Call,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        record: Mapping[str, Tensor],
        key: str,
    ) -> Any:
        shape = self.known.get(geometry(name, args, kwargs))
        if self.kind == "real" or shape is None:
            with torch.no_grad():
                return self.learn(name, args, kwargs, forward(*args, **kwargs))
        device = structure.tensors((args, kwargs))[0].device
        places = iter(range(len(structure.tensors(shape))))

        def fill(tensor: Tensor) -> Tensor:
            place = next(places)
            if self.kind == "recorded":
                return record[f"{key}.{place}"].reshape(tensor.shape).to(device, copy=True)
            return torch.zeros_like(tensor, device=device)

        return structure.map_tensors(shape, fill)


def shape_only(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def geometry(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What decides the shape of a module's output: its name, its options and its tensors' shapes and dtypes."""
    described = tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf)
        for leaf in structure.leaves((args, kwargs))
    )
    return (name, *described)
