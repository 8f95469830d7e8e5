"""Convolutions that see each patch of a picture alone, as the matrix products that they are: several times faster."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)


def as_products(model: nn.Module) -> None:
    """In place: where a convolution's kernel covers its whole input, the input is multiplied with it; weights stay as they are.

    Encoders of Qwen's family cut pictures into patches before their first layer, and call it with a batch of patches.
    """
    for module in model.modules():
        if isinstance(module, CONVOLUTIONS) and module.groups == 1 and module.padding == (0,) * len(module.kernel_size):
            module.forward = functools.partial(product, module, module.forward)  # type: ignore[method-assign]


def product(module: nn.Conv2d | nn.Conv3d, convolution: Callable[[Tensor], Tensor], patches: Tensor) -> Tensor:
    """(n, C, *kernel) -> (n, D, 1, ...); any other size goes through the convolution."""
    if patches.shape[2:] != torch.Size(module.kernel_size):
        return convolution(patches)
    made = functional.linear(patches.flatten(1), module.weight.flatten(1), module.bias)
    return made.view(*made.shape, *(1 for _ in module.kernel_size))
