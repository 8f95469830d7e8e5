"""Seeds from (run seed, global sample id, step), so that results never depend on ranks, batch sizes or call order."""

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from any integers and names; equal parts give equal seeds, other parts unrelated ones."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def normal(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """One standard-normal tensor of `shape` per seed, drawn on the CPU in float32; -> (len(seeds), *shape)."""
    draws = [
        torch.randn(tuple(shape), dtype=torch.float32, generator=torch.Generator().manual_seed(seed)) for seed in seeds
    ]
    return torch.stack(draws)


def seed_process(seed: int) -> None:
    """Seed every global random generator: Python's, numpy's, torch's on all devices (adapters are initialised by them)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
