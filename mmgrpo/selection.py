"""Which samples of a rollout an update trains on, and in which order. Axes: P prompts, G samples per prompt, B = P * G."""

import torch
from torch import Tensor

from mmgrpo.types import Advantage, same_shape


def minibatches(group: Tensor, updates: int) -> list[Tensor]:
    """Rows of each of `updates` optimizer updates, whole groups together; raises ValueError if they cannot be shared out.

    (B,) int64 group ids -> `updates` tensors of row numbers. Groups are shared out in the order of their first rows.
    """
    ids = torch.tensor(list(dict.fromkeys(group.tolist())))
    if len(ids) % updates:
        raise ValueError(f"{len(ids)} groups cannot be shared among {updates} updates; expected a multiple")
    return [torch.isin(group, part).nonzero().flatten() for part in ids.tensor_split(updates)]


def extremes(advantages: Tensor, group: Tensor, keep: Tensor, share: float) -> Tensor:
    """Keep the given share of each group: half from its top and half from its bottom, at least one each; all (B,).

    Only rows of `keep` are ranked. A share of 1 keeps them all. Best-of-n selection as in DanceGRPO (arXiv 2505.07818),
    inside groups.
    """
    same_shape(advantages=advantages, group=group, keep=keep)
    if share == 1:
        return keep
    chosen = torch.zeros_like(keep)
    for number in group[keep].unique():
        rows = (keep & (group == number)).nonzero().flatten()
        order = rows[advantages[rows].argsort(stable=True)]
        half = max(1, round(share * len(rows) / 2))
        chosen[torch.cat([order[:half], order[-half:]])] = True
    return chosen


def imitated(advantage: Advantage, weight: float) -> Tensor | None:
    """Which samples a loss with an anchor of this weight makes likelier as such, (B,) bool; None if it has none."""
    if not weight:
        return None
    if advantage.imitate is None:
        raise ValueError(f"loss.anchor_weight is {weight}, but the advantage names no samples to imitate; expected 0")
    same_shape(keep=advantage.keep, imitate=advantage.imitate)
    return advantage.imitate
