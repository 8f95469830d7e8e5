"""Gradient checkpointing that works together with a cache of keys and values, which the library's own does not."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Within the context each layer keeps its inputs and outputs alone; the rest is computed again in backward."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(f"policy.gradient_checkpointing: {type(model).__name__} does not support it")
    for layer in layers:
        layer.forward = functools.partial(recomputed, layer.forward)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def recomputed(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """A layer's forward, run again in backward; keys and values that it adds to a cache are added once."""
    cache = options.get("past_key_values")
    if not isinstance(cache, Cache):
        return checkpoint(functools.partial(forward, **options), *args, use_reentrant=False)
    before = snapshot(cache)

    def run(*inputs: Any) -> tuple[Any, list[tuple[int, Tensor, Tensor]]]:
        own = snapshot(before)
        result = forward(*inputs, **options | {"past_key_values": own})
        return result, written(before, own)

    result, states = checkpoint(run, *args, use_reentrant=False)
    for index, keys, values in states:
        while len(cache.layers) <= index:
            cache.layers.append(cache.layer_class_to_replicate())
        layer = cache.layers[index]
        if not layer.is_initialized:
            layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values
    return result


def snapshot(cache: Cache) -> Cache:
    """A cache with the same tensors, whose growth the first one does not see."""
    own = copy.copy(cache)
    own.layers = [copy.copy(layer) for layer in cache.layers]
    return own


def written(before: Cache, after: Cache) -> list[tuple[int, Tensor, Tensor]]:
    """Index, keys and values of the layers that a forward wrote."""
    old = [layer.keys if layer.is_initialized else None for layer in before.layers]
    old += [None] * (len(after.layers) - len(old))
    return [
        (index, layer.keys, layer.values)
        for index, layer in enumerate(after.layers)
        if layer.is_initialized and layer.keys is not old[index]
    ]
