"""What a language policy must show before it is trained, on random answers to a few of the run's prompts.

Axes: b answers of one batch, T tokens of the longest.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.data import requests
from mmgrpo.types import Finding, Prompt, Trajectory
from pipelines.answers import Answers

if TYPE_CHECKING:
    from pipelines.vlm import LanguagePolicy

REFUSALS = (  # how models turn down a cache that they cannot work with
    ValueError, TypeError, RuntimeError, LookupError, AttributeError, AssertionError, NotImplementedError
)  # fmt: skip
NEAR = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}  # nats between two ways
TOKENS = 6  # of the random answers


def share(answers: Answers, prompts: Sequence[Prompt]) -> str:
    """Read prompts once for all their answers, if that gives the log-probs of the plain way; -> a note on what was found."""
    part = random_answers(answers, prompts)
    answers.shared = False
    with torch.no_grad():
        plain = answers.read(part).log_prob
    answers.shared = True
    limit = NEAR[answers.model.dtype] if answers.options.autocast is None else NEAR[answers.options.autocast]
    try:
        with torch.no_grad():
            difference = float((answers.read(part).log_prob - plain).abs().max())
        reason = f"log-probs differ from those of whole sequences by {difference:.1e} nats"
        answers.shared = difference <= limit
    except REFUSALS as error:
        answers.shared, reason = False, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if answers.shared:
        return f"prompts are read once for all their answers; {reason}"
    return f"every answer is read with its whole prompt, as this model's memory cannot be shared: {reason}"


def random_answers(answers: Answers, prompts: Sequence[Prompt]) -> Trajectory:
    """Two random answers of different length to the first prompt, and to a second one of its kind if there is any."""
    kind = answers.reader.read(prompts[0]).kind
    alike = [prompt for prompt in prompts[:8] if answers.reader.read(prompt).kind == kind][:2]
    batch = requests(alike, range(len(alike)), group_size=2, seed=0, iteration=0)
    steps = min(TOKENS, answers.sampling.max_new_tokens)
    generator = torch.Generator().manual_seed(0)
    usual = torch.arange(min(answers.head.weight.shape[0], len(answers.reader.tokenizer)))
    usual = usual[~torch.isin(usual, answers.never.cpu())]
    token = usual[torch.randint(len(usual), (len(batch), steps), generator=generator)]
    length = torch.where(torch.arange(len(batch)) % 2 == 0, steps, max(1, steps // 2))
    mask = torch.arange(steps) < length.unsqueeze(1)
    record = {"token": token, "log_prob": torch.zeros(token.shape), "length": length}
    return Trajectory(batch, mask, torch.ones_like(token), record)


def findings(policy: "LanguagePolicy", prompts: Sequence[Prompt]) -> list[Finding]:
    """Replays agree to the last bit, follow the weights, and have the gradient of the plain way."""
    answers = policy.answers
    part = random_answers(answers, prompts)
    anchored = policy.anchor(part, [torch.arange(len(part))])
    exact = evaluated(policy, anchored)
    found = [Finding(exact == 0, "replay", f"largest |log-ratio| between two replays {exact:.1e}; expected exactly 0")]
    first = gradient(policy, part)
    norm = torch.stack([value.norm() for value in first.values()]).norm()
    found.append(Finding(bool(norm > 0 and norm.isfinite()), "gradient", f"norm {float(norm):.3e} of the log-probs"))
    if answers.shared:
        answers.shared = False
        plain = gradient(policy, part)
        answers.shared = True
        error = torch.stack([(first[name] - plain[name]).norm() for name in first]).norm() / norm
        limit = (
            10 * NEAR[answers.model.dtype] if answers.options.autocast is None else 10 * NEAR[answers.options.autocast]
        )
        found.append(
            Finding(
                bool(error < limit), "shared prompt", f"gradient differs from the plain way's by {float(error):.1e}"
            )
        )
    found.append(follows_the_weights(policy, anchored, first, norm))
    return found


def evaluated(policy: "LanguagePolicy", trajectory: Trajectory) -> float:
    """The largest |log-ratio| of a replay."""
    worst: list[Tensor] = []
    with torch.no_grad():
        policy.replay(trajectory, lambda chunk: worst.append(chunk.evaluation.log_ratio.abs().max()))
    return float(torch.stack(worst).max())


def gradient(policy: "LanguagePolicy", part: Trajectory) -> dict[str, Tensor]:
    """Of the sum of all log-probs, by parameter; float32."""
    policy.replay(part, lambda chunk: chunk.evaluation.log_ratio.sum().backward())
    found = {name: value.grad.float() for name, value in policy.trainable().items() if value.grad is not None}
    for value in policy.trainable().values():
        value.grad = None
    return found


@torch.no_grad()
def follows_the_weights(
    policy: "LanguagePolicy", anchored: Trajectory, slope: dict[str, Tensor], norm: Tensor
) -> Finding:
    """A step along the gradient changes the log-ratio: it is not identically 0."""
    trained, before = policy.trainable(), {}
    size = 1e-2 * torch.stack([trained[name].float().norm() for name in slope]).norm() / norm
    for name, value in slope.items():
        before[name] = trained[name].clone()
        trained[name].add_((size * value).to(trained[name]))
    moved = evaluated(policy, anchored)
    for name, value in before.items():
        trained[name].copy_(value)
    return Finding(
        moved > 0, "ratio", f"largest |log-ratio| {moved:.1e} after a step along the gradient; expected above 0"
    )
