"""Walk the nested inputs and outputs of modules: tensors inside tuples, lists, mappings and library output records."""

from collections.abc import Callable, Iterator
from typing import Any

from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


def leaves(value: Any) -> Iterator[Any]:
    """Every leaf of a nested value in a fixed order; anything that is not a container is a leaf."""
    if isinstance(value, DiagonalGaussianDistribution):
        yield value.parameters
    elif isinstance(value, dict):
        for item in value.values():
            yield from leaves(item)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def tensors(value: Any) -> list[Tensor]:
    """Every tensor inside a nested value."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def rebuild(value: Any, change: Callable[[Any], Any]) -> Any:
    """The same nesting with every leaf replaced by `change(leaf)`."""
    if isinstance(value, DiagonalGaussianDistribution):
        return DiagonalGaussianDistribution(change(value.parameters), value.deterministic)
    if isinstance(value, dict):
        items = {name: rebuild(item, change) for name, item in value.items()}
        return items if type(value) is dict else type(value)(**items)
    if isinstance(value, tuple):
        parts = [rebuild(item, change) for item in value]
        return tuple(parts) if type(value) is tuple else type(value)(*parts)
    if isinstance(value, list):
        return [rebuild(item, change) for item in value]
    return change(value)


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """The same nesting with every tensor replaced by `change(tensor)`; other leaves stay."""
    return rebuild(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)


def merge(values: list[Any], join: Callable[[list[Any]], Any]) -> Any:
    """One nested value from several of the same nesting; `join` receives the leaves that share a place."""
    columns = iter(list(zip(*(leaves(value) for value in values), strict=True)))
    return rebuild(values[0], lambda _: join(list(next(columns))))
