"""Exact packing of state (optimizers, random generators, trackers) into named tensors and JSON, and back."""

import math
import random
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer


class Packed(NamedTuple):
    """A state taken apart: what safetensors holds, and what JSON holds."""

    tensors: dict[str, Tensor]
    facts: object


def pack(state: object) -> Packed:
    """Take apart nested dicts, lists, tuples, tensors, numbers, text and None; `unpack` gives back the same.

    Keys may be numbers; subclasses of these types become plain; tensors are not copied. In `facts` a tensor is
    {"tensor": name}, a tuple {"tuple": [...]}, a dict {"dict": [[key, value], ...]}, and a float unknown to JSON
    {"float": "nan"}. Raises ValueError for any other type, with the place where it stands.
    """
    tensors: dict[str, Tensor] = {}
    return Packed(tensors, _pack(state, "state", tensors))


def unpack(packed: Packed) -> object:
    """The state that `pack` took apart."""
    return _unpack(packed.facts, packed.tensors)


def optimizer_state(optimizer: Optimizer) -> Packed:
    """Everything in an optimizer's `state_dict`: moments, step counts, and the settings of each group."""
    return pack(optimizer.state_dict())


def restore_optimizer(optimizer: Optimizer, packed: Packed) -> None:
    """Continue with a packed state; raises ValueError where the optimizer's parameter groups are other ones."""
    state = unpack(packed)
    assert isinstance(state, dict)
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():  # torch rounds to the parameter's dtype what may be kept finer
        for name, value in values.items():
            if isinstance(value, Tensor):
                held = optimizer.state[parameters[number]][name]
                optimizer.state[parameters[number]][name] = held if held.dtype == value.dtype else value.to(held.device)


def random_states() -> Packed:
    """State of every global random generator: Python's, numpy's, torch's on the CPU and on each CUDA device."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    return pack(
        {
            "python": random.getstate(),
            "numpy": (name, [int(key) for key in keys], position, has_gauss, gauss),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
    )


def restore_random_states(packed: Packed) -> None:
    """Continue all generators; a warning says so if the number of CUDA devices is another one."""
    state = unpack(packed)
    assert isinstance(state, dict)
    name, keys, position, has_gauss, gauss = state["numpy"]
    random.setstate(state["python"])
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if devices != len(state["cuda"]):
        warnings.warn(f"random states of {len(state['cuda'])} CUDA devices meet {devices} devices", stacklevel=2)
    for device, value in enumerate(state["cuda"][:devices]):
        torch.cuda.set_rng_state(value, device)


def _pack(value: object, place: str, tensors: dict[str, Tensor]) -> object:
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return float(value) if math.isfinite(value) else {"float": repr(float(value))}
        case Tensor():
            while place in tensors:  # keys such as 1 and "1" make the same place
                place += "'"
            tensors[place] = value
            return {"tensor": place}
        case list():
            return [_pack(item, f"{place}.{number}", tensors) for number, item in enumerate(value)]
        case tuple():
            return {"tuple": [_pack(item, f"{place}.{number}", tensors) for number, item in enumerate(value)]}
        case dict():
            pairs = [(_pack(key, f"{place} key", tensors), f"{place}.{key}", item) for key, item in value.items()]
            return {"dict": [[key, _pack(item, below, tensors)] for key, below, item in pairs]}
    raise ValueError(f"{place} is a {type(value).__name__}; expected dict, list, tuple, Tensor, number, text or None")


def _unpack(fact: object, tensors: Mapping[str, Tensor]) -> object:
    match fact:
        case list():
            return [_unpack(item, tensors) for item in fact]
        case {"tensor": str(name)}:
            return tensors[name]
        case {"tuple": list(items)}:
            return tuple(_unpack(item, tensors) for item in items)
        case {"dict": list(items)}:
            return {_unpack(key, tensors): _unpack(item, tensors) for key, item in items}
        case {"float": str(text)}:
            return float(text)
    return fact
