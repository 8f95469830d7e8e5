"""What a language policy knows of its tokens beyond an objective's needs: entropies, other temperatures, hidden states, prefixes.

Axes: B answers, S tokens at most, b and T those of a batch, N its tokens, V vocabulary, D features, U tokens that occur.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from mmgrpo.entropy_clip import expected_discriminator
from mmgrpo.types import Trajectory
from pipelines.answers import Answers, States
from pipelines.token_probabilities import BLOCK_TOKENS, Head, logits, scores

TEMPERATURE = "log_prob at "  # then the temperature, in units of the policy's own
PREFIXES = ("state", "edge")
Measure = Callable[[Head, States], Tensor]  # -> (N,) or (N, ...)


def told(answers: Answers, trajectory: Trajectory, names: Sequence[str]) -> Mapping[str, Tensor]:
    """The facts by name, (B, S) or (B, S, ...) on the CPU, 0 behind an answer's end; raises ValueError for an unknown name.

    "entropy"; "log_prob at T", T times the policy's temperature; "expected_discriminator" of `mmgrpo.entropy_clip`; "hidden" (B, S, D),
    what a token was predicted from; "residual" (B, S, U), onehot - probabilities over the tokens that occur in the rollout;
    "state", equal for equal beginnings, and "edge", equal for equal beginnings and tokens.
    """
    known = trajectory.record["token"].unique()
    measures = {name: measure(answers, name, known) for name in names if name not in PREFIXES}
    found = dict(zip(PREFIXES, prefixes(trajectory), strict=True)) if set(names) & set(PREFIXES) else {}
    found = {name: value for name, value in found.items() if name in names}
    return found | (read(answers, trajectory, measures) if measures else {})


def measure(answers: Answers, name: str, known: Tensor) -> Measure:
    """How a fact is computed from the states of a batch; `known` (U,) are the tokens that occur."""
    own = answers.sampling.temperature
    if answers.grammar is not None:
        raise ValueError(
            f"the advantage needs {name!r}, which answers with images do not tell; expected another advantage"
        )
    if name.startswith(TEMPERATURE):
        factor = float(name.removeprefix(TEMPERATURE))
        return lambda head, states: scores(head, states.hidden, states.token, own * factor, states.support).log_prob
    plain: Mapping[str, Measure] = {
        "entropy": lambda head, states: scores(head, states.hidden, states.token, own, states.support).entropy,
        "hidden": lambda head, states: states.hidden.float(),
        "expected_discriminator": lambda head, states: in_blocks(head, states, own, expected_discriminator),
        "residual": lambda head, states: residual(head, states, own, known),
    }
    if name not in plain:
        choices = [*plain, *PREFIXES, "log_prob", f"{TEMPERATURE}1.2"]
        raise ValueError(
            f"the advantage needs {name!r} of every decision; a language policy knows {', '.join(choices)}"
        )
    return plain[name]


def in_blocks(head: Head, states: States, temperature: float, change: Callable[[Tensor], Tensor]) -> Tensor:
    """A function of the probabilities (n, V) of a few tokens at a time; -> (N, ...)."""
    parts = states.hidden.split(BLOCK_TOKENS)
    return torch.cat([change((logits(head, part) / temperature).softmax(1)) for part in parts])


def residual(head: Head, states: States, temperature: float, known: Tensor) -> Tensor:
    """onehot(token) - probabilities of the known tokens, not renormalised; -> (N, U)."""
    columns = known.to(states.token.device)
    probabilities = in_blocks(head, states, temperature, lambda share: share[:, columns])
    return (states.token.unsqueeze(1) == columns).to(probabilities) - probabilities


@torch.no_grad()
def read(answers: Answers, trajectory: Trajectory, measures: Mapping[str, Measure]) -> dict[str, Tensor]:
    """Every measure over the answers, within the budget of tokens at a time."""
    found: dict[str, Tensor] = {}
    for rows in answers.batches(trajectory):
        states = answers.states(trajectory.take(rows))
        with torch.autocast(answers.model.device.type, enabled=False):
            head = answers.head_for(states.hidden)
            values = {name: one(head, states).float().cpu() for name, one in measures.items()}
        row, step = states.there.cpu().nonzero(as_tuple=True)
        for name, value in values.items():
            shape = (*trajectory.mask.shape, *value.shape[1:])
            found.setdefault(name, torch.zeros(shape))[rows[row], step] = value
    return found


def prefixes(trajectory: Trajectory) -> tuple[Tensor, Tensor]:
    """Numbers of what stood before each token, and of it with the token; (B, S) int64 each, equal for equal texts of a group."""
    before, found, steps = trajectory.group.clone(), [], trajectory.mask.shape[1]
    for step, token in enumerate(trajectory.record["token"].unbind(1)):
        after = torch.unique(torch.stack([before, token], 1), dim=0, return_inverse=True)[1]
        found.append((before * steps + step, after * steps + step))  # equal at one place alone
        before = after
    states, edges = (torch.stack(part, 1) for part in zip(*found, strict=True))
    return states, edges
