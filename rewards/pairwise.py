"""Win rates as rewards: a judge compares the samples of a prompt two by two.

The reward of DNO (arXiv 2404.03715, section 3): the share of the others of its group that a sample beats. It needs no scale and
may be intransitive. Left out: a gold answer as a further member of the pool. B samples, G of them in a group.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmgrpo.types import Reward, Samples, require_shape
from rewards.answers import answer, texts
from rewards.chat import Reply, ask_all, asking, connect, read_key
from rewards.judge import Part, attached, check_template, content, filled, report, sound, text_part
from rewards.pictures import Frames

FIELDS = {"prompt", "first", "second", "target"}
GAP = r"[\s\"'*_`:=]{1,8}"
WINNER = re.compile(rf"(?i:winner)(?i:\s{{1,4}}is)?{GAP}(?i:the\s{{1,4}}|a\s{{1,4}})?(?i:(first|second|tie)\b)")
VERDICTS = {"first": 1.0, "second": 0.0, "tie": 0.5}  # what the first gets
Pair = tuple[int, int]  # rows: shown first, shown second


def win_rates(beats: Tensor, group: Tensor) -> Tensor:
    """The mean over the others of its group of [a sample beats them], ties 0.5; (B, B) in [0, 1], (B,) int64 -> (B,) float32.

    A NaN, a pair that was not judged, leaves the mean; a sample without any judged pair is NaN.
    """
    require_shape("beats", beats, len(group), len(group))
    others = (group.unsqueeze(1) == group) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    return torch.where(others, beats.double(), torch.nan).nanmean(1).float()


def win_rate(
    *,
    url: str,
    model: str,
    template: str,
    both: bool = True,
    system: str = "",
    tag: str | None = None,
    attach: Literal["none", "prompt", "sample"] = "none",
    frames: Frames = 8,
    key_variable: str = "",
    key_file: Path | None = None,
    timeout: float = 60.0,
    retries: int = 2,
    pause: float = 1.0,
    concurrency: int = 8,
    temperature: float = 0.0,
    limit: int = 50_000,
    request: Mapping[str, object] | None = None,
) -> Reward:
    """The share of the others of its group that a sample beats, in [0, 1]; (B,), NaN where no pair of it was judged.

    `template` names {first} and {second}, and may name {prompt} and {target}; it asks for a last line "Winner: first",
    "Winner: second" or "Winner: tie". By default each pair is asked about in both orders and gets the mean, so that a
    preference for a position cancels: G (G - 1) requests for a group, half of them without `both`, the lower sample id then
    being first. A pair of which an order has no verdict counts for neither of its samples. A sample without an answer in
    `tag`, or with one longer than `limit` characters, loses to those that have one and ties with those that do not, unasked.
    `attach` = "sample" sends both images, or `frames` of both videos. The other options are those of `rewards.judge:judge`.
    """
    named = check_template(template, attach, FIELDS, {"first", "second"})
    endpoint = connect(url, read_key(key_variable, key_file), timeout, retries, concurrency, pause)
    written = asking(model, system, temperature, request)

    def reward(samples: Samples) -> Tensor:
        pairs = ordered_pairs(samples, both)
        answers = answers_of(samples, named, tag, limit)
        judged = judgeable(samples, named, attach)
        found = {pair: unasked(answers, judged, pair) for pair in pairs}
        asked = [pair for pair in pairs if found[pair] is None]

        @lru_cache(2 * concurrency)  # the questions about a sample follow each other
        def media(row: int) -> list[Part]:
            return attached(samples, row, attach, frames)

        def body(first: int, second: int) -> bytes:
            fields = {"first": answers[first] or "", "second": answers[second] or ""}
            text = filled(template, samples.prompts[first], **fields)
            if attach != "sample":
                return written(content(text, media(first)))
            shown = [text_part("First:"), *media(first), text_part("Second:"), *media(second)]
            return written(content(text, shown))

        replies = ask_all(endpoint, [partial(body, *pair) for pair in asked], read_verdict)
        report(model, replies, len(pairs), "comparisons")
        found |= verdicts(asked, replies)
        return win_rates(beaten(found, len(samples)), samples.batch.group)

    return reward


def ordered_pairs(samples: Samples, both: bool) -> list[Pair]:
    """The pairs of each group's rows, the lower sample id first, and if asked for the other way round too."""
    group, ids = samples.batch.group.tolist(), samples.batch.sample.tolist()
    rows = sorted(range(len(samples)), key=lambda row: ids[row])
    pairs = [(one, two) for one, two in combinations(rows, 2) if group[one] == group[two]]
    return [pair for one, two in pairs for pair in ([(one, two), (two, one)] if both else [(one, two)])]


def answers_of(samples: Samples, named: set[str], tag: str | None, limit: int) -> list[str | None]:
    """The answers that are compared, None for one that is absent or too long; "" where only media are."""
    if not named & {"first", "second"}:
        return [""] * len(samples)
    found = [answer(text, tag) for text in texts(samples)]
    return [None if text is None or len(text) > limit else text for text in found]


def judgeable(samples: Samples, named: set[str], attach: Literal["none", "prompt", "sample"]) -> list[bool]:
    """Whether a sample has finite pixels, and its prompt the target that the template names."""
    targets = [prompt.target is not None or "target" not in named for prompt in samples.prompts]
    return [fine and there for fine, there in zip(sound(samples, attach), targets, strict=True)]


def unasked(answers: Sequence[str | None], judged: Sequence[bool], pair: Pair) -> float | None:
    """What needs no judge: NaN for a pair that cannot be compared, the verdict where an answer is absent; None: ask."""
    if not all(judged[row] for row in pair):
        return torch.nan
    first, second = (answers[row] is not None for row in pair)
    return None if first and second else 0.5 + 0.5 * (first - second)


def verdicts(asked: Sequence[Pair], replies: Sequence[Reply]) -> dict[Pair, float | None]:
    """What the first of each pair gets, NaN where there is no verdict."""
    scores = [torch.nan if reply.score is None else reply.score for reply in replies]
    return dict(zip(asked, scores, strict=True))


def beaten(found: Mapping[Pair, float | None], size: int) -> Tensor:
    """Row beats column, (B, B) float64 in [0, 1], NaN where a pair was not judged; the mean over the orders of a pair."""
    beats = torch.full((size, size), torch.nan, dtype=torch.float64)
    for (first, second), score in found.items():
        assert score is not None  # everything was asked
        turned = found.get((second, first))
        beats[first, second] = score if turned is None else (score + 1 - turned) / 2
        beats[second, first] = 1 - beats[first, second]
    return beats


def read_verdict(reply: str) -> float | None:
    """What the first gets by the word after the last "winner" (":", "=" or "is" between), or by a reply of that one word."""
    found = WINNER.findall(reply)
    word = found[-1] if found else reply.strip(" \n\t.*\"'`")
    return VERDICTS.get(word.lower())
