"""The optimizer of a run: AdamW, and Muon on the matrices that a recipe names."""

from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import AdamW, Muon, Optimizer

from mmgrpo.recipe import Optimizer as Options


class Joined(Optimizer):
    """Optimizers of different parameters as one: one list of groups, one state, one `state_dict`; each has one group."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each part on the groups and the state that are held here, which `load_state_dict` replaces."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part, group in zip(self.parts, self.param_groups, strict=True):
            part.param_groups, part.state = [group], self.state
            part.step()
        return loss


def optimizer(trained: Mapping[str, Parameter], options: Options) -> Optimizer:
    """AdamW, or Muon on the 2-D weights that `options.muon` names and AdamW on the rest, if there is any.

    Muon (arXiv 2502.16982) moves a matrix as far as AdamW would, so that both share the learning rate and the weight decay.
    """
    chosen = matrices(trained, options.muon)
    rest = [parameter for name, parameter in trained.items() if name not in chosen]
    rate, decay = options.learning_rate, options.weight_decay
    parts: list[Optimizer] = []
    if chosen:
        parts.append(Muon(chosen.values(), rate, decay, adjust_lr_fn="match_rms_adamw"))
    if rest:
        parts.append(AdamW(rest, rate, options.betas, options.eps, decay, fused=True))
    return parts[0] if len(parts) == 1 else Joined(parts)


def matrices(trained: Mapping[str, Parameter], patterns: Sequence[str]) -> dict[str, Parameter]:
    """The 2-D parameters whose names match one of the patterns; raises ValueError for a pattern that matches none."""
    flat = [name for name, parameter in trained.items() if parameter.dim() == 2]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in flat):
            near = "".join(f"; the nearest is {name!r}" for name in get_close_matches(pattern, flat, n=1, cutoff=0))
            raise ValueError(
                f"optimizer.muon has {pattern!r}; none of the {len(flat)} trained matrices matches it{near}"
            )
    return {name: trained[name] for name in flat if any(fnmatchcase(name, pattern) for pattern in patterns)}
