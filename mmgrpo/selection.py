"""Which samples of a rollout an update trains on, and in which order. Axes: P prompts, G samples per prompt, B = P * G."""

import torch
from torch import Tensor

from mmgrpo.types import Advantage, require_shape, same_shape


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

    Of an odd count the top has one more. Only rows of `keep` are ranked. A share of 1 keeps them all. Best-of-n selection of
    DanceGRPO (arXiv 2505.07818), whose groups are here what a rank generated.
    """
    same_shape(advantages=advantages, group=group, keep=keep)
    if share == 1:
        return keep
    chosen = torch.zeros_like(keep)
    for number in group[keep].unique():
        rows = (keep & (group == number)).nonzero().flatten()
        order = rows[advantages[rows].argsort(stable=True)]
        count = max(2, round(share * len(rows)))
        chosen[torch.cat([order[: count // 2], order[-(count - count // 2) :]])] = True
    return chosen


def of_decisions(values: Tensor, mask: Tensor) -> Tensor:
    """A value of each sample, or of each of its decisions, at every decision; (B,) or (B, S), (B, S) -> (B, S)."""
    whole = values.unsqueeze(1).expand(mask.shape) if values.dim() == 1 else values
    same_shape(mask=mask, advantages=whole)
    return whole


def separated(advantage: Advantage, mask: Tensor) -> Tensor | None:
    """The advantages of which the objective is taken one by one, (B, S, K); None if it is taken of their sum."""
    if advantage.separate is None:
        return None
    require_shape("separate", advantage.separate, None, *advantage.values.shape)
    return torch.stack([of_decisions(values, mask) for values in advantage.separate], -1)


def imitated(advantage: Advantage, weight: float) -> Tensor | None:
    """Which samples a loss with an anchor of this weight makes likelier as such, (B,) bool; None if it has none."""
    if not weight:
        return None
    if advantage.imitate is None:
        raise ValueError(f"loss.anchor_weight is {weight}, but the advantage names no samples to imitate; expected 0")
    same_shape(keep=advantage.keep, imitate=advantage.imitate)
    return advantage.imitate
