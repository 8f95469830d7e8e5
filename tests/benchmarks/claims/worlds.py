"""The tasks of one decision, drawn anew for every seed. Axes as in tables.py."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmgrpo.seeds import derive, normal

from .tables import END, Drawn, Scores, Tables, World

Seeds = tuple[int, ...]
OUTLIERS = 0.1  # share of rewards that are off by 3
DISTANCE = 3.0


def gaussian(seeds: Seeds, name: str, *shape: int) -> Tensor:
    """A standard-normal tensor for every seed; (R, *shape)."""
    return normal([derive(seed, name) for seed in seeds], shape)


def uniform(seeds: Seeds, name: str, *shape: int) -> Tensor:
    return torch.special.ndtr(gaussian(seeds, name, *shape))


def one_of(seeds: Seeds, name: str, prompts: int, actions: int) -> Tensor:
    """One action for each prompt; (R, P) int64."""
    return gaussian(seeds, name, prompts, actions).argmax(-1)


def one_hot(actions: Tensor, count: int) -> Tensor:
    return torch.nn.functional.one_hot(actions, count).float()


# ---- one decision


def bandit(
    gain: Tensor,
    start: Tensor,
    reward: Callable[[Tensor, Drawn], Tensor],
    features: Tensor | None = None,
    columns: Sequence[Mapping[str, object]] = (),
) -> World:
    """Actions of known gain, (R, P, K), and what a reward makes of the gain (R, P, G) that was drawn; start (R, D, K)."""
    runs, prompts, actions = gain.shape

    def scores(drawn: Drawn) -> Scores:
        return {"reward": reward(gain.gather(2, drawn.action[..., 0]), drawn)}

    def chance(policy: Tables) -> Tensor:
        return (policy.log_probs().exp() * gain).sum(-1)

    return World(
        torch.eye(prompts).expand(runs, -1, -1) if features is None else features,
        start,
        torch.arange(prompts),
        torch.full((prompts, actions), END),
        1,
        scores,
        chance,
        {"reward": 1.0},
        torch.ones(1, dtype=torch.bool),
        columns=columns,
        gain=gain,
    )


def as_is(gain: Tensor, drawn: Drawn) -> Tensor:
    return gain


def doubted(right: Tensor) -> Tensor:
    """The chance to be called right where a tenth of the verdicts is wrong."""
    return 0.1 + 0.8 * right


def coin(gain: Tensor, drawn: Drawn) -> Tensor:
    """1 with the gain as probability."""
    return (drawn.noise[..., 0] < gain).float()


def off_at_times(gain: Tensor, drawn: Drawn) -> Tensor:
    """A little noise, and now and then a reward that is far off in either direction."""
    jitter, far = drawn.noise.unbind(-1)
    jump = torch.where(far < OUTLIERS / 2, -DISTANCE, torch.where(far > 1 - OUTLIERS / 2, DISTANCE, 0.0))
    return gain + 0.1 * torch.special.ndtri(jitter.clamp(1e-6, 1 - 1e-6)) + jump


def outliers(seeds: Seeds) -> World:
    """12 prompts, 8 actions; a tenth of the rewards is off by 3."""
    gain = uniform(seeds, "gain", 12, 8)
    return bandit(gain, torch.zeros_like(gain), off_at_times)


def coins(seeds: Seeds) -> World:
    """12 prompts, 16 actions, a binary reward whose chance is the action's gain."""
    gain = uniform(seeds, "gain", 12, 16).square()
    return bandit(gain, torch.zeros_like(gain), coin)


def shapes(seeds: Seeds) -> World:
    """12 prompts of 6 shared features: a binary reward for 6, for 6 a heavy-tailed one, gain * exp(2 z)."""
    features = gaussian(seeds, "features", 12, 6) / 6**0.5
    gain = uniform(seeds, "gain", 12, 8)

    def reward(drawn_gain: Tensor, drawn: Drawn) -> Tensor:
        tailed = drawn_gain * (2 * torch.special.ndtri(drawn.noise[..., 1].clamp(1e-6, 1 - 1e-6))).exp()
        return torch.cat([coin(drawn_gain, drawn)[:, :6], tailed[:, 6:]], 1)

    return bandit(gain, torch.zeros(len(seeds), 6, 8), reward, features)


def hard(seeds: Seeds, *, away: float = 1.0) -> World:
    """12 prompts, 32 actions, one right, which the start makes unlikely: most groups are all wrong."""
    right = one_hot(one_of(seeds, "right", 12, 32), 32)
    return bandit(right, 1.5 * gaussian(seeds, "start", 12, 32) - away * right, as_is)


def uneven(seeds: Seeds) -> World:
    """4 prompts solved at 2 in a hundred, 4 at a half, 4 at 95 in a hundred; 16 actions, one right."""
    right = one_hot(one_of(seeds, "right", 12, 16), 16)
    chance = torch.tensor([0.02, 0.5, 0.95]).repeat_interleave(4).view(1, 12, 1)
    columns = [{"hardness": 1 - float(value), "category": "all"} for value in chance.flatten()]
    return bandit(right, right * (chance.logit() + torch.tensor(15.0).log()), as_is, columns=columns)


def many(seeds: Seeds) -> World:
    """12 prompts, 16 actions, 4 of which are right; a tenth of the verdicts is wrong."""
    ranks = gaussian(seeds, "right", 12, 16).argsort(-1).argsort(-1)
    return bandit(doubted((ranks < 4).float()), 0.5 * gaussian(seeds, "start", 12, 16), coin)


def rare(seeds: Seeds) -> World:
    """24 prompts of 12 shared features; a common action is right for some, a rare one (4 to 15) is right for each."""
    features = torch.cat([gaussian(seeds, "features", 24, 12) / 12**0.5, torch.ones(len(seeds), 24, 1)], -1)
    common = one_hot(one_of(seeds, "common", 24, 4), 16) * (uniform(seeds, "has", 24, 1) < 0.6)
    right = (common + one_hot(4 + one_of(seeds, "rare", 24, 12), 16)).clamp(max=1)
    start = torch.zeros(len(seeds), 13, 16)
    start[:, -1, :4] = 2.0
    return bandit(right, start, as_is, features)


def trifles(seeds: Seeds) -> World:
    """16 prompts of 6 shared features: a binary reward tells the actions of 8 apart, 8 have noise of a thousandth."""
    features = gaussian(seeds, "features", 16, 6) / 6**0.5
    gain = uniform(seeds, "gain", 16, 8)
    gain[:, 8:] = 0.5

    def reward(drawn_gain: Tensor, drawn: Drawn) -> Tensor:
        return torch.cat([coin(drawn_gain, drawn)[:, :8], drawn_gain[:, 8:] + 1e-3 * drawn.noise[:, 8:, :, 0]], 1)

    return bandit(gain, torch.zeros(len(seeds), 6, 8), reward, features)
