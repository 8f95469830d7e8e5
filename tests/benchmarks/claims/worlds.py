"""The tasks: bandits, texts of a few tokens, walks and graphs, each drawn anew for every seed.

Axes as in tables.py; L tokens of an answer, E edges of a graph.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import product

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
    """6 prompts with a binary reward, 6 with a heavy-tailed one, gain * exp(2 z)."""
    gain = uniform(seeds, "gain", 12, 8)

    def reward(drawn_gain: Tensor, drawn: Drawn) -> Tensor:
        tailed = drawn_gain * (2 * torch.special.ndtri(drawn.noise[..., 1].clamp(1e-6, 1 - 1e-6))).exp()
        return torch.cat([coin(drawn_gain, drawn)[:, :6], tailed[:, 6:]], 1)

    return bandit(gain, torch.zeros_like(gain), reward)


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


# ---- several decisions


def line(prompts: int, length: int, actions: int) -> tuple[Tensor, Tensor]:
    """First states and moves of texts of one length: every place of every prompt is a state."""
    moves = (torch.arange(prompts * length) + 1).view(prompts, length)
    moves[:, -1] = END
    return torch.arange(prompts) * length, moves.flatten().unsqueeze(1).expand(-1, actions).contiguous()


def text(
    right: Tensor,
    start: Tensor,
    reward: Callable[[Tensor, Drawn], Scores],
    chance: Callable[[Tensor], Tensor],
    features: Tensor | None = None,
    weights: Mapping[str, float] | None = None,
    sampler: Tensor | None = None,
) -> World:
    """Right actions (R, P, L, K) of texts of L tokens; the reward sees which were right, (R, P, G, L) of 0 and 1.

    `chance` makes that of the text, (R, P), from those of its tokens to be right, (R, P, L).
    """
    runs, prompts, length, actions = right.shape
    first, moves = line(prompts, length, actions)

    def scores(drawn: Drawn) -> Scores:
        spread = right.unsqueeze(2).expand(-1, -1, drawn.action.shape[2], -1, -1)
        return reward(spread.gather(4, drawn.action.unsqueeze(-1)).squeeze(-1), drawn)

    def reached(policy: Tables) -> Tensor:
        return chance((policy.log_probs().exp().view(right.shape) * right).sum(-1))

    return World(
        torch.eye(prompts * length).expand(runs, -1, -1) if features is None else features,
        start,
        first,
        moves,
        length,
        scores,
        reached,
        weights or {"reward": 1.0},
        torch.ones(length, dtype=torch.bool),
        sampler=sampler,
    )


def drawn_text(seeds: Seeds, prompts: int, length: int, actions: int) -> tuple[Tensor, Tensor]:
    """One right action at every place (R, P, L, K), and uneven starts (R, P * L, K)."""
    right = one_hot(one_of(seeds, "right", prompts * length, actions), actions)
    start = 0.5 * gaussian(seeds, "start", prompts * length, actions)
    return right.view(len(seeds), prompts, length, actions), start


def share(right: Tensor, drawn: Drawn) -> Scores:
    """1 with the share of right tokens as chance."""
    return {"reward": coin(right.mean(-1), drawn)}


def mean_chance(chance: Tensor) -> Tensor:
    return chance.mean(-1)


def words(seeds: Seeds) -> World:
    """6 prompts, 8 tokens of 6, a binary reward."""
    return text(*drawn_text(seeds, 6, 8, 6), share, mean_chance)


def long(seeds: Seeds) -> World:
    """3 prompts, 48 tokens of 4; the reward is the share of right tokens."""
    right, start = drawn_text(seeds, 3, 48, 4)
    return text(right, start, lambda found, drawn: {"reward": found.mean(-1)}, mean_chance)


def forks(seeds: Seeds) -> World:
    """6 prompts, 10 tokens of 6: the first and the sixth decide, the others are nearly certain at the start."""
    right = drawn_text(seeds, 6, 10, 6)[0]
    decides = (torch.arange(10) % 5 == 0).float()
    start = 5.0 * right * (1 - decides).view(10, 1)

    def mean(found: Tensor) -> Tensor:
        return (found * decides).sum(-1) / 2

    return text(right, start.flatten(1, 2), lambda found, drawn: {"reward": coin(mean(found), drawn)}, mean)


def mismatched(seeds: Seeds) -> World:
    """`words` whose sampler adds noise of a standard deviation of 1 to the logits."""
    sampler = gaussian(seeds, "sampler", 48, 6)
    return text(*drawn_text(seeds, 6, 8, 6), share, mean_chance, sampler=sampler)


def two_rewards(seeds: Seeds, *, scale: float = 1.0) -> World:
    """12 prompts, two tokens of 8, each with a reward of its own: 4 firsts are right, 1 second; a tenth of the verdicts is wrong."""
    hard = one_hot(one_of(seeds, "hard", 12, 8), 8)
    easy = (gaussian(seeds, "easy", 12, 8).argsort(-1).argsort(-1) < 4).float()
    right = torch.stack([easy, hard], 2)

    def reward(found: Tensor, drawn: Drawn) -> Scores:
        told = (drawn.noise < doubted(found)).float()
        return {"easy": told[..., 0] * scale, "hard": told[..., 1]}

    start = torch.zeros(len(seeds), 24, 8)
    return text(right, start, reward, lambda each: each.prod(-1), weights={"easy": 1.0, "hard": 1.0})


def chains(seeds: Seeds) -> World:
    """8 prompts of 4 tokens of 6, shared features; right if the first and the third token are."""
    right = drawn_text(seeds, 8, 4, 6)[0]

    def reward(found: Tensor, drawn: Drawn) -> Scores:
        return {"reward": found[..., 0] * found[..., 2]}

    features = gaussian(seeds, "features", 32, 16) / 4
    return text(right, torch.zeros(len(seeds), 16, 6), reward, lambda each: each[..., 0] * each[..., 2], features)


def graph(seeds: Seeds) -> World:
    """2 graphs of 10 edges; a binary success whose log-odds are 0.3 for each edge that is as it should be, -0.3 for others."""
    wanted = (gaussian(seeds, "wanted", 2 * 10) > 0).long()
    right = one_hot(wanted, 2).view(len(seeds), 2, 10, 2)
    outcomes = torch.tensor(list(product((0.0, 1.0), repeat=10)))  # (1024, E) which edges are as they should be

    def chance(found: Tensor) -> Tensor:
        return (0.3 * (2 * found - 1).sum(-1)).sigmoid()

    def whole(each: Tensor) -> Tensor:
        each = each.unsqueeze(2)
        weight = torch.where(outcomes > 0, each, 1 - each).prod(-1)  # (R, P, 1024)
        return (weight * chance(outcomes)).sum(-1)

    def reward(found: Tensor, drawn: Drawn) -> Scores:
        return {"reward": coin(chance(found), drawn)}

    return text(right, torch.zeros(len(seeds), 20, 2), reward, whole)


def walk(seeds: Seeds) -> World:
    """4 goals on a grid of 5 x 5, 6 steps from the corner or more, 16 steps; the reward is that the goal was reached."""
    side, goals, steps = 5, 4, 16
    far = [cell for cell in range(side**2) if sum(divmod(cell, side)) >= 6][:goals]
    moves = torch.full((goals, side**2, 4), END)
    for number, goal in enumerate(far):
        for cell, (action, (down, right)) in product(range(side**2), enumerate([(1, 0), (-1, 0), (0, 1), (0, -1)])):
            row, column = cell // side + down, cell % side + right
            inside = 0 <= row < side and 0 <= column < side
            after = row * side + column if inside else cell
            moves[number, cell, action] = END if after == goal else number * side**2 + after
    moves = moves.flatten(0, 1)

    def reward(drawn: Drawn) -> Scores:
        last = drawn.taken.sum(-1, keepdim=True) - 1
        end = moves[drawn.state.gather(3, last), drawn.action.gather(3, last)].squeeze(-1)
        return {"reward": (end == END).float()}

    def arrived(policy: Tables) -> Tensor:
        """The mass of each goal's walk that has ended, moved on step by step."""
        chance = policy.log_probs().exp()  # (R, N, K)
        runs, states, _ = chance.shape
        mass, ended = torch.zeros(runs, states), torch.zeros(runs, goals)
        mass[:, torch.arange(goals) * side**2] = 1.0
        inside = moves.flatten() != END
        for _ in range(steps):
            flow = (mass.unsqueeze(-1) * chance).flatten(1)
            ended = ended + torch.where(inside, 0, flow).view(runs, goals, -1).sum(-1)
            mass = torch.zeros(runs, states).index_add(1, moves.flatten()[inside], flow[:, inside])
        return ended

    start = 0.3 * gaussian(seeds, "start", goals * side**2, 4)
    eye = torch.eye(goals * side**2).expand(len(seeds), -1, -1)
    first, all_of_them = torch.arange(goals) * side**2, torch.ones(steps, dtype=torch.bool)
    return World(eye, start, first, moves, steps, reward, arrived, {"reward": 1.0}, all_of_them)


LONGEST = 24  # tokens after the first


def lengths(seeds: Seeds) -> World:
    """The first token says at a half whether the answer is right and is not trained; then it goes on, or ends (action 1)."""
    prompts, states = 4, 1 + 2 * LONGEST
    moves = torch.full((prompts, states, 2), END)
    for prompt in range(prompts):
        base = prompt * states
        moves[prompt, 0] = torch.tensor([base + 1, base + 1 + LONGEST])  # wrong, right
        for path in (1, 1 + LONGEST):
            moves[prompt, path : path + LONGEST - 1, 0] = base + torch.arange(path + 1, path + LONGEST)

    def reward(drawn: Drawn) -> Scores:
        return {"reward": drawn.action[..., 0].float()}

    start = torch.zeros(len(seeds), prompts * states, 2)
    start[:, :, 1] = -2.0
    start[:, torch.arange(prompts) * states] = 0.0
    learnt = torch.arange(1 + LONGEST) > 0
    eye = torch.eye(prompts * states).expand(len(seeds), -1, -1)
    first = torch.arange(prompts) * states
    fixed = torch.full((len(seeds), prompts), 0.5)
    return World(eye, start, first, moves.flatten(0, 1), 1 + LONGEST, reward, lambda _: fixed, {"reward": 1.0}, learnt)


def length_of_wrong(policy: Tables) -> Tensor:
    """The mean number of tokens of a wrong answer; (R,)."""
    chance = policy.log_probs().exp()[..., 0]  # (R, N) of going on
    on = chance.view(len(chance), -1, 1 + 2 * LONGEST)[:, :, 1:LONGEST]
    return 1 + on.cumprod(-1).sum(-1).mean(1)
