"""The tasks of several decisions: texts of one length, graphs, walks, answers that end by themselves.

Axes as in tables.py; L tokens of an answer, E edges of a graph.
"""

from collections.abc import Callable, Mapping
from itertools import product

import torch
from torch import Tensor

from .tables import END, Drawn, Scores, Tables, World
from .worlds import Seeds, coin, doubted, gaussian, one_hot, one_of, uniform


def places(prompts: int, length: int, actions: int) -> tuple[Tensor, Tensor]:
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
    first, moves = places(prompts, length, actions)

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
    """`words` whose sampler adds noise to the logits: a tenth of a nat, and for one logit in twenty three nats."""
    outliers = uniform(seeds, "where", 48, 6) < 0.05
    sampler = (0.1 + 3 * outliers) * gaussian(seeds, "sampler", 48, 6)
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
