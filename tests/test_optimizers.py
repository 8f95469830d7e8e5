"""AdamW alone, Muon alone, or Muon on chosen matrices and AdamW on the rest: each moves as torch's own does."""

import json
from collections.abc import Mapping
from copy import deepcopy
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW, Muon

from mmgrpo.optimizers import Joined, matrices, optimizer
from mmgrpo.packing import optimizer_state, restore_optimizer
from mmgrpo.recipe import Optimizer, load
from mmgrpo.run import start
from pipelines import assets

SETTINGS = {"learning_rate": 0.02, "betas": (0.8, 0.9), "weight_decay": 0.3, "eps": 1e-6}
SHAPES = {
    "blocks.0.query.weight": (6, 4),
    "blocks.0.query.bias": (6,),
    "blocks.0.kernel.weight": (4, 3, 2, 2),
    "blocks.1.value.weight": (2, 8),
    "head.weight": (5, 4),
}
MATRICES = ["blocks.0.query.weight", "blocks.1.value.weight"]


def network() -> dict[str, Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {name: Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def slope(trained: Mapping[str, Parameter], number: int) -> None:
    generator = torch.Generator().manual_seed(number)
    for parameter in trained.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def moved(trained: Mapping[str, Parameter], *optimizers: torch.optim.Optimizer, steps: int = 3) -> dict[str, Tensor]:
    """The parameters after steps of all the optimizers, the learning rate halved after each step."""
    for number in range(steps):
        slope(trained, number)
        for one in optimizers:
            one.step()
            for group in one.param_groups:
                group["lr"] /= 2
            one.zero_grad()
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def muon(parameters: list[Parameter]) -> Muon:
    return Muon(parameters, lr=0.02, weight_decay=0.3, adjust_lr_fn="match_rms_adamw")


def adamw(parameters: list[Parameter]) -> AdamW:
    return AdamW(parameters, lr=0.02, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.3, fused=True)


def test_chosen_matrices_move_by_muon_and_the_rest_by_adamw():
    ours, theirs = network(), network()
    joined = optimizer(ours, Optimizer(muon=("blocks.*",), **SETTINGS))
    rest = [parameter for name, parameter in theirs.items() if name not in MATRICES]
    assert isinstance(joined, Joined)
    assert same(moved(ours, joined), moved(theirs, muon([theirs[name] for name in MATRICES]), adamw(rest)))
    assert all(parameter.grad is None for parameter in ours.values())


def test_without_patterns_everything_moves_by_adamw():
    ours, theirs = network(), network()
    assert same(moved(ours, optimizer(ours, Optimizer(**SETTINGS))), moved(theirs, adamw([*theirs.values()])))


def test_where_all_is_matrices_everything_moves_by_muon():
    ours, theirs = ({name: network()[name] for name in MATRICES} for _ in range(2))
    assert same(
        moved(ours, optimizer(ours, Optimizer(muon=("*",), **SETTINGS))), moved(theirs, muon([*theirs.values()]))
    )


def test_a_matrix_moves_about_as_far_as_adamw_would_move_it():
    trained = {"weight": Parameter(torch.zeros(64, 32))}
    slope(trained, 0)
    optimizer(trained, Optimizer(learning_rate=1.0, weight_decay=0.0, muon=("*",))).step()
    assert float(trained["weight"].detach().square().mean().sqrt()) == pytest.approx(
        0.2, rel=0.2
    )  # arXiv 2502.16982, sec. 2.2


def test_a_restored_optimizer_goes_on_as_the_first_one_did():
    first, options = network(), Optimizer(muon=("blocks.*",), **SETTINGS)
    old = optimizer(first, options)
    moved(first, old)
    second = {name: Parameter(parameter.detach().clone()) for name, parameter in first.items()}
    new = optimizer(second, options)
    restore_optimizer(new, deepcopy(optimizer_state(old)))
    assert same(moved(second, new), moved(first, old))
    assert same(optimizer_state(new).tensors, optimizer_state(old).tensors)
    assert optimizer_state(new).facts == optimizer_state(old).facts


def test_a_state_of_other_matrices_is_refused():
    old, new = (
        optimizer(network(), Optimizer(muon=patterns, **SETTINGS)) for patterns in (("blocks.*",), ("head.weight",))
    )
    with pytest.raises(ValueError, match="group"):
        restore_optimizer(new, optimizer_state(old))


@pytest.mark.parametrize("pattern", ["block.0.query.weight", "blocks.*.bias", "*kernel*"])
def test_a_pattern_without_a_matrix_is_refused_with_the_nearest_name(pattern):
    with pytest.raises(
        ValueError, match="^optimizer.muon has .*; none of the 3 trained matrices matches it; the nearest is '"
    ):
        optimizer(network(), Optimizer(muon=("head*", pattern), **SETTINGS))
    with pytest.raises(ValueError, match="nearest is 'blocks.0.query.weight'$"):
        matrices(network(), ["block.0.query.weight"])


def test_a_recipe_names_the_matrices_of_its_policy():
    shipped = assets.folder("image_demo")
    places = [
        f"policy.model={json.dumps(str(shipped))}",
        f"prompts.source={json.dumps(str(shipped / 'prompts' / 'train.jsonl'))}",
        "evaluation.source=''",
        "train.evaluate_every=0",
        "policy.rollout_rows=2",
        "optimizer.muon=['*transformer_blocks*']",
    ]
    run = start(load(Path(str(files("pipelines") / "recipes" / "demo_image.toml")), places))
    by_muon, by_adamw = (len(group["params"]) for group in run.optimizer.param_groups)
    assert by_muon == sum("transformer_blocks" in name and p.dim() == 2 for name, p in run.policy.trainable().items())
    assert by_muon + by_adamw == len(run.policy.trainable())
