"""Placeholder: noise levels."""

from typing import NamedTuple

from torch import Tensor


class Level(NamedTuple):
    """x = alpha * data + sigma * noise, in the units of the sample that the scheduler steps."""

    alpha: Tensor
    sigma: Tensor
