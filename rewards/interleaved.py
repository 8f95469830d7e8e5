"""Rewards of answers of texts and images, after UnifiedGRPO (arXiv 2603.09538): r = format + relevance of texts + alignment of images.

Each judges whole answers, (B,), or with `per_part` the parts, (B, J), where NaN stands for a part that it says nothing about;
the trainer adds those of an answer up, and `mmgrpo.advantages:process` gives each decision the parts still to come. The
paper's formulas are known from readings of it; scales and penalties are options. B samples, J parts of an answer at most, n
texts or images of all answers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mmgrpo.types import Reward, Samples
from rewards.compose import components
from rewards.embeddings import ImageFeatures

Part = str | Tensor
Context = Literal["before", "around", "prompt"]


class Place(NamedTuple):
    """Where a part stands."""

    row: int
    part: int


def answers(samples: Samples) -> tuple[tuple[Part, ...], ...]:
    """The parts of the samples, B; raises ValueError if they have none."""
    if samples.interleaved is None:
        raise ValueError("the samples carry no answers of texts and images; expected interleaved, one for each")
    return samples.interleaved


def places(samples: Samples, texts: bool) -> list[Place]:
    """Where the texts are, or else the images; n."""
    return [
        Place(row, part)
        for row, parts in enumerate(answers(samples))
        for part, item in enumerate(parts)
        if isinstance(item, str) is texts and (not isinstance(item, str) or item.strip())
    ]


def spread(samples: Samples, where: Sequence[Place], values: Tensor) -> Tensor:
    """The values of n parts at their places, NaN elsewhere; (n,) -> (B, J)."""
    most = max((len(parts) for parts in answers(samples)), default=0)
    wide = torch.full((len(samples), most if samples.part_end is None else samples.part_end.shape[1]), torch.nan)
    for place, value in zip(where, values.tolist(), strict=True):
        wide[place.row, place.part] = value
    return wide


def at_last(samples: Samples, values: Tensor) -> Tensor:
    """A verdict on whole answers as one on their last parts; (B,) -> (B, J)."""
    last = [Place(row, len(parts) - 1) for row, parts in enumerate(answers(samples)) if parts]
    return spread(samples, last, values[[place.row for place in last]])


def summed_up(samples: Samples, where: Sequence[Place], values: Tensor, missing: float, per_part: bool) -> Tensor:
    """Scores of n parts as those of the parts, (B, J), or as means over an answer's parts that have one, (B,).

    An answer without such a part has the score `missing`, as one of its last part where parts are asked for.
    """
    absent = torch.full((len(samples),), True)
    absent[[place.row for place in where]] = False
    wide = spread(samples, where, values)
    if per_part:
        return torch.where(absent.unsqueeze(1), at_last(samples, torch.full((len(samples),), missing)), wide)
    return torch.where(absent, missing, wide.nanmean(1))


def single(name: str, reward: Reward, samples: Samples) -> Tensor:
    """The scores of a reward with one component, (B,) float32; raises ValueError otherwise."""
    found = components(name, reward(samples), len(samples))
    if len(found) != 1:
        raise ValueError(f"{name} has the components {sorted(found)}; expected a reward with one")
    return next(iter(found.values())).float().cpu()


# ---- format


def structure(
    samples: Samples,
    *,
    images: int | None = None,
    column: str | None = None,
    order: tuple[Literal["text", "image"], ...] | None = None,
    marks: tuple[str, ...] = (),
    penalty: float = 0.0,
    per_part: bool = False,
) -> Tensor:
    """1 if an answer is well formed, else `penalty`, 0 or -1; (B,), or at the last part, (B, J).

    Well formed: it ended by itself, no text is empty or holds one of the `marks`, every image has finite pixels, there are
    `images` of them (or as many as the prompt's `column` says), and the parts follow the `order`. What the format asks for inside texts,
    such as tags, is `rewards.text:tag_format`'s. Source: r_f of UnifiedGRPO; 0 against -1 is RECONSTRUCTED.
    """
    finished = [True] * len(samples) if samples.finished is None else samples.finished.tolist()
    verdicts = []
    for row, (parts, ended) in enumerate(zip(answers(samples), finished, strict=True)):
        kinds = tuple("text" if isinstance(part, str) else "image" for part in parts)
        wanted = images if column is None else expected(samples, row, column)
        right = ended and all(whole(part, marks) for part in parts)
        right = right and wanted in (None, kinds.count("image")) and order in (None, kinds)
        verdicts.append(1.0 if right else penalty)
    values = torch.tensor(verdicts)
    return at_last(samples, values) if per_part else values


def expected(samples: Samples, row: int, column: str) -> int:
    """The number of images in a prompt's column; raises ValueError naming the prompt if there is none."""
    prompt = samples.prompts[row]
    found = prompt.columns.get(column)
    if not isinstance(found, int) or isinstance(found, bool):
        raise ValueError(f"prompt {prompt.id} has {found!r} in the column {column!r}; expected a number of images")
    return found


def whole(part: Part, marks: Sequence[str]) -> bool:
    """Whether a text says something and is free of marks that should have begun an image, or an image can be looked at."""
    if isinstance(part, str):
        return bool(part.strip()) and not any(mark in part for mark in marks)
    return part.dim() == 3 and part.numel() > 0 and bool(part.isfinite().all())


# ---- texts and images


def of_texts(*, reward: Reward, missing: float = 0.0, per_part: bool = False) -> Reward:
    """Any reward of texts: of all texts of an answer as one, (B,), or of each, (B, J); range and NaN: the reward's.

    Such as `rewards.judge:judge` (the critic of r_t in UnifiedGRPO) or `rewards.embeddings:text_similarity`. An answer
    without a text has the score `missing`.
    """

    def score(samples: Samples) -> Tensor:
        where = places(samples, texts=True)
        if per_part:
            texts = tuple(str(answers(samples)[place.row][place.part]) for place in where)
            values = judged(samples, [place.row for place in where], texts)
            return summed_up(samples, where, values, missing, per_part)
        joined = {row: [str(answers(samples)[row][part]) for there, part in where if there == row] for row, _ in where}
        values = torch.full((len(samples),), missing)
        values[list(joined)] = judged(samples, list(joined), tuple(" ".join(texts) for texts in joined.values()))
        return values

    def judged(samples: Samples, rows: list[int], texts: tuple[str, ...]) -> Tensor:
        if not rows:
            return torch.zeros(0)
        batch = samples.batch.take(torch.tensor(rows))
        return single("of_texts.reward", reward, Samples(batch, text=texts))

    return score


def of_images(
    *,
    reward: Reward,
    context: Context = "before",
    squash: bool = False,
    missing: float = 0.0,
    per_part: bool = False,
) -> Reward:
    """Any reward of an image and its prompt, with text of the answer as prompt: the mean, (B,), or of each, (B, J).

    `context`: the text "before" the image (else the next one behind it, else the prompt's), the texts "around" it, or the
    "prompt" alone. `squash`: the sigmoid of the reward, for those without bounds such as ImageReward. An answer without an
    image has the score `missing`; an image without a score is left out of the mean. Source: r_v of UnifiedGRPO, there
    ImageReward; the sigmoid is RECONSTRUCTED.
    """

    def score(samples: Samples) -> Tensor:
        where = places(samples, texts=False)
        values = torch.full((len(where),), torch.nan)
        for size in dict.fromkeys(shape(samples, place) for place in where):
            part = [number for number, place in enumerate(where) if shape(samples, place) == size]
            if len(size) == 3 and 0 not in size:
                values[part] = judged(samples, [where[number] for number in part])
        return summed_up(samples, where, values, missing, per_part)

    def judged(samples: Samples, where: list[Place]) -> Tensor:
        batch = samples.batch.take(torch.tensor([place.row for place in where]))
        told = [
            replace(prompt, text=surroundings(answers(samples)[place.row], place.part, context, prompt.text))
            for prompt, place in zip(batch.prompts, where, strict=True)
        ]
        image = torch.stack([image_at(samples, place) for place in where])
        found = single("of_images.reward", reward, Samples(replace(batch, prompts=tuple(told)), image=image))
        return found.sigmoid() if squash else found

    return score


def image_at(samples: Samples, place: Place) -> Tensor:
    image = answers(samples)[place.row][place.part]
    assert isinstance(image, Tensor)
    return image


def shape(samples: Samples, place: Place) -> tuple[int, ...]:
    return tuple(image_at(samples, place).shape)


def surroundings(parts: Sequence[Part], number: int, context: Context, prompt: str) -> str:
    """The text that an image is compared with."""
    before = next((part.strip() for part in reversed(parts[:number]) if isinstance(part, str)), "")
    behind = next((part.strip() for part in parts[number + 1 :] if isinstance(part, str)), "")
    found = {"before": before or behind, "around": f"{before}\n{behind}".strip(), "prompt": ""}[context]
    return found or prompt


def consistency(*, features: ImageFeatures, per_part: bool = False) -> Reward:
    """How alike the images of an answer are, in [-1, 1]: the mean cosine of their features over all pairs, (B,).

    For parts, (B, J), the mean over the pairs of an image with those before it. NaN: an answer with fewer than two images that
    can be looked at, and of parts all but these, an answer's first image included.
    """

    def score(samples: Samples) -> Tensor:
        where = [place for place in places(samples, texts=False) if whole(image_at(samples, place), ())]
        found = features([image_at(samples, place) for place in where]) if where else torch.zeros(0, 1)
        unit = normalize(found.float(), dim=1)  # (n, D)
        row = torch.tensor([place.row for place in where], dtype=torch.int64)
        earlier = (row.unsqueeze(1) == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril(-1)  # (n, n)
        pairs = torch.where(earlier, unit @ unit.T, torch.nan)
        if per_part:
            return spread(samples, where, pairs.nanmean(1))
        return torch.stack([pairs[row == number].nanmean() for number in range(len(samples))])

    return score


# ---- sums


def hybrid(*, rewards: Mapping[str, Reward], weights: Mapping[str, float], gate: str | None = None) -> Reward:
    """sum_k w_k r_k over the rewards with an opinion; (B,), or (B, J) if one of them judges parts. UnifiedGRPO's weights are 1.

    `gate` names a reward, such as the structure, without whose full score (1) it alone counts. Rewards of whole answers
    count at the last part.
    """
    if rewards.keys() != weights.keys() or (gate is not None and gate not in rewards):
        raise ValueError(f"weights name {sorted(weights)} and gate is {gate!r}; expected the rewards {sorted(rewards)}")

    def score(samples: Samples) -> Tensor:
        found = {name: checked(name, reward(samples), samples) for name, reward in rewards.items()}
        parted = any(value.dim() == 2 for value in found.values())
        if parted:
            found = {name: value if value.dim() == 2 else at_last(samples, value) for name, value in found.items()}
        total = added([weights[name] * value for name, value in found.items()])
        if gate is None:
            return total
        verdict = found[gate].nansum(1, keepdim=True) if parted else found[gate]
        return torch.where(verdict < 1, weights[gate] * found[gate], total)

    return score


def checked(name: str, value: Tensor | Mapping[str, Tensor], samples: Samples) -> Tensor:
    if isinstance(value, Mapping) or value.dim() not in (1, 2) or len(value) != len(samples):
        arrived = sorted(value) if isinstance(value, Mapping) else tuple(value.shape)
        raise ValueError(
            f"hybrid.rewards.{name} answered {arrived}; expected one score for each of {len(samples)} or its parts"
        )
    return value.float().cpu()


def added(terms: Sequence[Tensor]) -> Tensor:
    """The sum over the terms that are not NaN, NaN where all are; their shape."""
    stacked = torch.stack(list(terms))
    return torch.where(stacked.isnan().all(0), torch.nan, stacked.nansum(0))
