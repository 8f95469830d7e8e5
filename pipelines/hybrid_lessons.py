"""What a hybrid policy learns from answers in the data: to predict their tokens, and the velocities in noisy versions of their images.

This is the warm-up of UnifiedGRPO (arXiv 2603.09538) in Transfusion's form (arXiv 2408.11039, eq. 5). Times are logit-normal, as for
Stable Diffusion 3 (arXiv 2403.03206, section 3.1). Data: `pipelines/answer_parts.py`.
Axes: b rows, J images at most, J + 1 texts of T tokens, M noisy versions, C channels, H, W of latents.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from mmgrpo import seeds
from mmgrpo.types import Batch, Prompt
from pipelines import answer_parts
from pipelines.hybrid_evaluation import scores
from pipelines.hybrid_layout import Shape
from pipelines.hybrid_reading import Answers, Noisy, read, trimmed

if TYPE_CHECKING:
    from pipelines.interleaved_hybrid import HybridPolicy


def check(policy: "HybridPolicy", prompts: Sequence[Prompt]) -> int:
    """How many prompts have an answer to learn; raises ValueError naming a file or a prompt whose answer does not fit."""
    answer_parts.check(prompts, policy.options.media)
    taught = [prompt for prompt in prompts if answer_parts.is_answer(prompt.target)]
    for prompt in taught:
        tokens(policy, prompt)
    return len(taught)


def tokens(policy: "HybridPolicy", prompt: Prompt) -> tuple[list[list[int]], list[Path]]:
    """The texts of a prompt's answer as tokens, each with the mark that ends it, and its images; raises ValueError."""
    room, marks = policy.room, policy.marks
    texts: list[list[int]] = [[]]
    images: list[Path] = []
    for part in answer_parts.parts_of(prompt, policy.options.media):
        if isinstance(part, Path):
            texts[-1].append(marks.start)
            texts.append([])
            images.append(part)
        else:
            texts[-1] += policy.tokenizer(part, add_special_tokens=False).input_ids
    texts[-1].append(marks.stop[0])
    if len(images) > room.images:
        raise ValueError(
            f"prompt {prompt.id}: an answer of {len(images)} images; expected policy.images = {room.images}"
        )
    longest = max(map(len, texts))
    if longest > room.text:
        raise ValueError(f"prompt {prompt.id}: a text of {longest} tokens; expected policy.text = {room.text} at most")
    return texts, images


def answers_of(policy: "HybridPolicy", prompts: Sequence[Prompt]) -> Answers:
    """The answers that the data give, on the policy's device; raises ValueError if an image's size does not fit."""
    room, count, latent = policy.room, len(prompts), policy.model.latent
    token = torch.zeros(count, room.images + 1, room.text, dtype=torch.int64)
    length = torch.zeros(count, room.images + 1, dtype=torch.int64)
    drawn, pictures = torch.zeros(count, room.images, dtype=torch.bool), []
    for row, prompt in enumerate(prompts):
        texts, images = tokens(policy, prompt)
        drawn[row, : len(images)] = True
        pictures += [picture(path) for path in images]
        for number, text in enumerate(texts):
            token[row, number, : len(text)] = torch.tensor(text)
            length[row, number] = len(text)
    clean = torch.zeros(count, room.images, *latent)
    if pictures:
        with torch.no_grad():
            found = policy.model.encode(torch.stack(pictures).to(policy.device)).float().cpu()
        if found.shape[1:] != latent:
            raise ValueError(
                f"images become latents of {tuple(found.shape[1:])}; expected {latent}, those of the model"
            )
        clean[drawn] = found
    return Answers(token, Shape(length, drawn), clean).to(policy.device)


def picture(path: Path) -> Tensor:
    """(3, h, w) in [0, 1]."""
    with Image.open(path) as image:
        return to_tensor(image.convert("RGB"))


def noised(policy: "HybridPolicy", batch: Batch, answers: Answers) -> tuple[Noisy, Tensor]:
    """Noisy versions of every image, and the velocities that lead there, noise - image; (b, M, C, H, W)."""
    images, again = answers.clean.shape[1], policy.options.noises
    which = torch.arange(images).repeat_interleave(again)
    ids, count, shape = batch.sample.tolist(), len(which), answers.clean.shape[2:]
    noise = seeds.normal([seeds.derive(batch.seed, one, "teach", "noise") for one in ids], (count, *shape))
    t = torch.sigmoid(seeds.normal([seeds.derive(batch.seed, one, "teach", "time") for one in ids], (count,)))
    noise, t, clean = noise.to(answers.clean), t.to(answers.clean), answers.clean[:, which]
    along = t[:, :, None, None, None]
    return Noisy(which, (1 - along) * clean + along * noise, t), noise - clean


def loss(policy: "HybridPolicy", batch: Batch) -> Tensor:
    """text_weight * mean negative log-prob of the tokens + image_weight * mean squared error of the velocities; (b,)."""
    room, answers = trimmed(policy.room, answers_of(policy, batch.prompts))
    noisy, target = noised(policy, batch, answers)
    with policy.precision():
        found = read(policy.model, room, policy.prompts(batch), answers, noisy, policy.marks.end)
        log_prob, _ = scores(policy.model, found.text, answers, policy.marks, policy.room, 1.0)
    text = -log_prob.sum((1, 2)) / answers.shape.length.sum(1)
    there = answers.shape.drawn[:, noisy.image].to(target)
    error = (found.velocity - target).square().flatten(2).mean(2)
    image = (error * there).sum(1) / there.sum(1).clamp(min=1)
    return policy.options.text_weight * text + policy.options.image_weight * image
