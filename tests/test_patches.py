"""A convolution over one patch is a product, in value, gradient and what is saved."""

import copy

import pytest
import torch
from torch import nn

from pipelines.patches import as_products


@pytest.mark.parametrize(
    ("made", "shape"),
    [
        (nn.Conv3d(3, 8, (2, 4, 4), (2, 4, 4), bias=False), (5, 3, 2, 4, 4)),
        (nn.Conv2d(3, 8, 4, 4), (5, 3, 4, 4)),
        (nn.Conv2d(3, 8, 4, 4), (5, 3, 8, 12)),  # several patches: as before
        (nn.Conv2d(4, 8, 4, 4, groups=2), (5, 4, 4, 4)),
        (nn.Conv2d(3, 8, 4, 4, padding=1), (5, 3, 4, 4)),
    ],
    ids=["3d", "2d", "larger", "groups", "padding"],
)
def test_products_give_what_the_convolution_gives(made: nn.Module, shape: tuple[int, ...]) -> None:
    plain, fast = nn.Sequential(made), nn.Sequential(copy.deepcopy(made))
    as_products(fast)
    patches = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(fast(patches), plain(patches), rtol=1e-5, atol=1e-5)
    for model in (plain, fast):
        model(patches).square().sum().backward()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(dict(fast.named_parameters())[name].grad, value.grad, rtol=1e-4, atol=1e-4)
    assert fast.state_dict().keys() == plain.state_dict().keys()
