"""What a language policy must show before it is trained, on random answers to a few of the run's prompts.

Axes: b answers of one batch, T tokens of the longest.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmgrpo.data import requests
from mmgrpo.types import Batch, Finding, Prompt, Trajectory
from pipelines import replays
from pipelines.answers import Answers
from pipelines.vocabularies import CODE, FORCED, TEXT, TEXT_ALONE, Grammar

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
    generator = torch.Generator().manual_seed(0)
    if answers.grammar is not None:
        return random_compositions(answers.grammar, batch, generator)
    steps = min(TOKENS, answers.sampling.max_new_tokens)
    usual = torch.arange(min(answers.head.weight.shape[0], len(answers.reader.tokenizer)))
    usual = usual[~torch.isin(usual, answers.never.cpu())]
    token = usual[torch.randint(len(usual), (len(batch), steps), generator=generator)]
    length = torch.where(torch.arange(len(batch)) % 2 == 0, steps, max(1, steps // 2))
    mask = torch.arange(steps) < length.unsqueeze(1)
    record = {"token": token, "log_prob": torch.zeros(token.shape), "length": length}
    return Trajectory(batch, mask, torch.ones_like(token), record)


def random_compositions(known: Grammar, batch: Batch, generator: torch.Generator) -> Trajectory:
    """A text, an image and a text for every other row, a text alone for the rest; words and codes are random."""

    def drawn(kind: int, count: int) -> Tensor:
        part = known.vocabularies[kind]
        span = torch.arange(part.stop - part.first)
        allowed = span[~torch.isin(span, part.never.cpu())] + part.first
        return allowed[torch.randint(len(allowed), (len(batch), count), generator=generator)]

    image = known.layout.filled(drawn(CODE, known.layout.rows * known.layout.columns))
    token = torch.cat([drawn(TEXT_ALONE, TOKENS), image, drawn(TEXT_ALONE, TOKENS // 2)], dim=1)
    marks = torch.where(known.pattern < 0, CODE, FORCED)
    marks[0] = TEXT
    kinds = torch.full(token.shape, TEXT_ALONE)
    kinds[:, TOKENS : TOKENS + len(marks)] = marks
    length = torch.where(torch.arange(len(batch)) % 2 == 0, token.shape[1], TOKENS)
    mask = (torch.arange(token.shape[1]) < length.unsqueeze(1)) & (kinds != FORCED)
    record = {
        "token": token,
        "log_prob": torch.zeros(token.shape),
        "length": length,
        "vocabulary": kinds.to(torch.uint8),
    }
    return Trajectory(batch, mask, torch.ones_like(token), record)


def findings(policy: "LanguagePolicy", prompts: Sequence[Prompt]) -> list[Finding]:
    """Replays agree to the last bit, follow the weights, and have the gradient of the plain way."""
    answers = policy.answers
    part = random_answers(answers, prompts)
    anchored = policy.anchor(part, [torch.arange(len(part))])
    first = replays.gradient(policy, part)
    found = [replays.exact(policy, anchored), replays.reached(first)]
    if answers.shared:
        found.append(shared_gradient(policy, part, first))
    return [*found, replays.follows_the_weights(policy, anchored, first)]


def shared_gradient(policy: "LanguagePolicy", part: Trajectory, shared: Mapping[str, Tensor]) -> Finding:
    """Prompts that are read once give the gradient of the plain way."""
    answers = policy.answers
    answers.shared = False
    plain = replays.gradient(policy, part)
    answers.shared = True
    error = replays.norm({name: shared[name] - plain[name] for name in shared}) / replays.norm(shared)
    limit = 10 * NEAR[answers.model.dtype if answers.options.autocast is None else answers.options.autocast]
    said = f"gradient differs from the plain way's by {float(error):.1e}"
    return Finding(bool(error < limit), "shared prompt", said)
