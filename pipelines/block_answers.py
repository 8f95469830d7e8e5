"""Writes the answers of a block-diffusion language model and reads them again: the part of its policy that runs the model.

The prompt is clean context, in blocks as the answer is: whole blocks of it are encoded once for a group. What the model is
computed with is that of `pipelines/answers.py`. Axes: B answers, b those of one batch, S tokens at most, T those of the longest
answer of a batch, C masked copies of blocks, w tokens of a block, N tokens that are scored.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mmgrpo import seeds
from mmgrpo.types import Batch, Lesson, Prompt, Trajectory
from pipelines import blocks, token_probabilities
from pipelines.answers import Answers, in_order, shared_prompts
from pipelines.block_decoding import Decoding, Filled, Filler, Unmasking, fill
from pipelines.blocks import Canvas, Known, Slots, beside
from pipelines.token_batches import batches, families
from pipelines.token_probabilities import Scores

Likelihood = Literal["block", "order"]
LEAST = 1e-3  # share of a block that a lesson masks, at least


class Copies(NamedTuple):
    """Masked copies of blocks of each answer, of which some tokens are predicted."""

    number: Tensor  # (b, C) int64 block of the canvas, -1: no copy
    shown: Tensor  # (b, C, w) bool: not masked
    asked: Tensor  # (b, C, w) bool: predicted


class BlockAnswers:
    """A model that fills in blocks, its way of reading prompts, and how its answers are likely."""

    def __init__(
        self, answers: Answers, mask: int, unmasking: Unmasking, likelihood: Likelihood, likelihood_size: int
    ) -> None:
        if likelihood_size < 1:
            raise ValueError(f"policy.likelihood_size is {likelihood_size}; expected at least 1 token")
        if likelihood == "order" and likelihood_size != unmasking.size:
            raise ValueError(
                f"policy.likelihood_size is {likelihood_size} with policy.likelihood 'order'; expected policy.block_size, "
                f"{unmasking.size}, whose blocks were filled in that order"
            )
        self.answers, self.mask, self.unmasking = answers, mask, unmasking
        self.likelihood, self.likelihood_size = likelihood, likelihood_size
        answers.never = torch.cat([answers.never, answers.never.new_tensor([mask])]).unique()

    @property
    def model(self) -> PreTrainedModel:
        return self.answers.model

    @property
    def most(self) -> int:
        """S, tokens of an answer at most."""
        return self.answers.sampling.max_new_tokens

    @property
    def dtype(self) -> torch.dtype:
        """Of the computation."""
        wanted = self.answers.options.autocast
        return self.model.dtype if wanted is None else wanted

    def tokens(self, prompt: Prompt) -> Tensor:
        """(L,) int64, on the model's device."""
        return self.answers.reader.read(prompt).inputs["input_ids"][0].to(self.model.device)

    # -- rollout --------------------------------------------------------------------------------------------------

    def write(self, batch: Batch, explore: bool = True) -> Filled:
        """An answer for each row; without exploration the likeliest tokens each time. Everything on the CPU."""
        reach = [len(self.tokens(prompt)) + self.most + self.unmasking.size for prompt in batch.prompts]
        together = families(batch.group, [None] * len(batch), [0] * len(batch), reach)
        parts = batches(together, self.answers.options.rollout_tokens)
        return in_order([self._write_rows(batch.take(rows), explore) for rows in parts], torch.cat(parts))

    def _write_rows(self, batch: Batch, explore: bool) -> Filled:
        prompts = [self.tokens(prompt) for prompt in batch.prompts]
        canvas = blocks.canvas(prompts, self.unmasking.size, self.most, self.mask)
        answers, samples = self.answers, batch.sample.tolist()
        filler = Filler(
            canvas, self.unmasking, answers.end.tokens, answers.sampling.temperature, batch.seed, samples, explore
        )
        with torch.no_grad(), answers.precision():
            known = self._known(batch, prompts, self.unmasking.size)
            rows = torch.arange(len(batch), device=self.model.device)
            fill(Decoding(self.model, answers.logits, self.dtype, known, rows), filler)
        return filler.filled(self.most)

    def _known(self, batch: Batch, prompts: Sequence[Tensor], size: int) -> Known:
        """The whole blocks of the prompts, read once for each group."""
        firsts, rows = shared_prompts(batch.group)
        heads = blocks.heads([prompts[row] for row in firsts], size)
        return blocks.repeated(blocks.encode(self.model, heads, self.dtype), rows.to(self.model.device))

    # -- replay ---------------------------------------------------------------------------------------------------

    def batches(self, trajectory: Trajectory) -> list[Tensor]:
        """Rows that are read together, within the budget of tokens; the answers of a group side by side."""
        lengths = [len(self.tokens(prompt)) for prompt in trajectory.batch.prompts]
        size, record = self.likelihood_size, trajectory.record
        copies = record["length"] // size + 2 if self.likelihood == "block" else record["step"].amax(1)
        slots = (record["length"] + copies * size).tolist()
        together = families(trajectory.group, [None] * len(trajectory), lengths, slots)
        return batches(together, self.answers.options.replay_tokens)

    def read(self, part: Trajectory) -> Scores:
        """Log-prob and entropy of every token of the answers under today's weights; (b, T) each, 0 behind their ends."""
        return self.scored(part, self.likelihood, self.likelihood_size)

    def scored(self, part: Trajectory, likelihood: Likelihood, size: int) -> Scores:
        """`read` with a likelihood and a size of blocks.

        "block": each token given its block fully masked and the blocks before it, whatever the order it was filled in
        (LightningRL, arXiv 2603.13319: one forward on a noisy and a clean copy). "order": each token given what was there
        when it was decided, the recorded order taken as given; one masked copy for each forward of the rollout.
        """
        device = self.model.device
        canvas = self._canvas(part.batch, part.record["token"], size)
        length, step = part.record["length"].to(device), part.record["step"].to(device)
        copies = whole_blocks(canvas, length) if likelihood == "block" else in_order_filled(canvas, length, step)
        with self.answers.precision(), self.answers.saving_memory():
            hidden = self.answers.fine(self._hidden(part.batch, canvas, copies))  # (N, D)
        row, slot = places(canvas, copies)  # (N,) each
        token = canvas.token[row, slot]
        head, temperature = self.answers.head_for(hidden), self.answers.sampling.temperature
        found = token_probabilities.scores(head, hidden, token, temperature)
        empty = torch.zeros(len(part), int(length.max()), dtype=found.log_prob.dtype, device=device)
        return Scores(*(empty.index_put((row, slot - canvas.start[row]), values) for values in found))

    def _canvas(self, batch: Batch, token: Tensor, size: int) -> Canvas:
        """Answers (b, S) in blocks of `size`."""
        canvas = blocks.canvas([self.tokens(prompt) for prompt in batch.prompts], size, self.most, self.mask)
        canvas.token.scatter_(1, canvas.answer_slots(self.most), token.to(canvas.token.device))
        return canvas

    def _hidden(self, batch: Batch, canvas: Canvas, copies: Copies) -> Tensor:
        """The states that predict what is asked; (N, D), in the order of rows, copies and slots."""
        prompts = [self.tokens(prompt) for prompt in batch.prompts]
        known = self._known(batch, prompts, canvas.size)
        clean = canvas.clean(copies.number.amax(1).clamp(min=0))  # the last block is nobody's context
        hidden = blocks.read(self.model, beside([clean, self._masked(canvas, copies)]), known, self.dtype)
        return hidden[:, clean.token.shape[1] :][copies.asked.flatten(1)]

    def _masked(self, canvas: Canvas, copies: Copies) -> Slots:
        """The masked copies, (b, C * w)."""
        rows = torch.arange(len(canvas.token), device=canvas.token.device)[:, None, None]
        slots = canvas.slots(copies.number.clamp(min=0))  # (b, C, w)
        token = torch.where(copies.shown, canvas.token[rows, slots], self.mask)
        there = canvas.there[rows, slots] & (copies.number >= 0).unsqueeze(2)
        names = torch.arange(copies.number.shape[1], device=token.device).view(1, -1, 1) + blocks.CLEAN + 1
        position = canvas.position[rows, slots]
        parts = (part.flatten(1) for part in (token, position, there, names.expand(token.shape)))
        token, position, there, copy = parts
        return blocks.slots_of(token, position, canvas.size, there, copy)

    # -- lessons --------------------------------------------------------------------------------------------------

    def teach(self, batch: Batch, consume: Lesson) -> None:
        """The block-diffusion loss of each row's target, in nats a token, within the budget of tokens.

        BD3-LM (arXiv 2503.09573, eq. 8 with the linear schedule): in every block a share t, uniform in (0, 1), of the tokens
        is masked, and the masked ones' -log p, given their block's other tokens and the blocks before it, count 1 / t. Here
        divided by the number of tokens; the text ends with the end token, which also fills up its last block.
        """
        token, length = self._targets(batch.prompts)
        size = self.unmasking.size
        slots = (2 * length + 2 * size).tolist()
        prompts = [len(self.tokens(prompt)) for prompt in batch.prompts]
        together = families(batch.group, [None] * len(batch), prompts, slots)
        for rows in batches(together, self.answers.options.replay_tokens):
            consume(rows, self._lesson(batch.take(rows), token[rows], length[rows]))

    def _targets(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Tokens of the targets (B, S), ends behind them, and their lengths (B,) with one end; raises ValueError."""
        end = int(self.answers.end.tokens[0])
        token = torch.full((len(prompts), self.most), end)
        length = torch.zeros(len(prompts), dtype=torch.int64)
        for row, prompt in enumerate(prompts):
            if not isinstance(prompt.target, str):
                raise ValueError(f"prompt {prompt.id} has the target {prompt.target!r}; expected the text of an answer")
            ids = self.answers.reader.tokenizer(prompt.target, add_special_tokens=False)["input_ids"]
            if len(ids) >= self.most:
                raise ValueError(
                    f"the target of prompt {prompt.id} has {len(ids)} tokens; expected fewer than policy.max_new_tokens, {self.most}"
                )
            token[row, : len(ids)] = torch.tensor(ids)
            length[row] = len(ids) + 1
        return token, length

    def _lesson(self, batch: Batch, token: Tensor, length: Tensor) -> Tensor:
        """The losses of the targets (b, S), of (b,) tokens each; (b,)."""
        device = self.model.device
        canvas = self._canvas(batch, token, self.unmasking.size)
        whole = whole_blocks(canvas, length.to(device), filled_up=True)
        share, noise = noises(batch, whole.number.shape[1], canvas.size)
        share, noise = share.to(device), noise.to(device)
        masked = whole.asked & (noise < share.unsqueeze(2))
        copies = whole._replace(shown=~masked, asked=masked)
        with self.answers.precision(), self.answers.saving_memory():
            hidden = self.answers.fine(self._hidden(batch, canvas, copies))
        row, slot = places(canvas, copies)
        found = token_probabilities.scores(self.answers.head_for(hidden), hidden, canvas.token[row, slot]).log_prob
        weight = (1 / share).unsqueeze(2).expand(masked.shape)[masked]
        total = torch.zeros(len(batch), dtype=found.dtype, device=device).index_add(0, row, -found * weight)
        return total / whole.asked.flatten(1).sum(1)


def whole_blocks(canvas: Canvas, length: Tensor, filled_up: bool = False) -> Copies:
    """Every block that holds tokens of the answer, fully masked; `filled_up`: their last one is asked to its end."""
    stop = canvas.start + length  # (b,)
    count = -(-stop // canvas.size)
    index = torch.arange(int(count.max()), device=length.device)
    number = torch.where(index < count.unsqueeze(1), index, -1)  # (b, C)
    slots = canvas.slots(number)  # of a copy that is not there: below 0
    answer = (slots >= canvas.start[:, None, None]) & (number >= 0).unsqueeze(2)
    reach = canvas.there.sum(1) if filled_up else stop
    asked = answer & (slots < reach[:, None, None])
    return Copies(number, ~answer, asked)


def in_order_filled(canvas: Canvas, length: Tensor, step: Tensor) -> Copies:
    """For every forward of the rollout the block as it stood, and what was decided; step (b, S) int64."""
    when = torch.zeros_like(canvas.token).scatter(1, canvas.answer_slots(step.shape[1]), step)  # (b, N)
    forward = torch.arange(int(step.max()), device=step.device) + 1  # (C,)
    blocked = when.view(len(when), 1, -1, canvas.size)  # (b, 1, blocks, w)
    decided = blocked == forward.view(1, -1, 1, 1)
    number = torch.where(decided.flatten(2).any(2), decided.any(3).int().argmax(2), -1)  # (b, C)
    rows, slots = torch.arange(len(when), device=step.device)[:, None, None], canvas.slots(number.clamp(min=0))
    now, at = when[rows, slots], forward.view(1, -1, 1)
    shown = (slots < canvas.start[:, None, None]) | ((now > 0) & (now < at))
    asked = (now == at) & (slots < (canvas.start + length)[:, None, None]) & (number >= 0).unsqueeze(2)
    return Copies(number, shown, asked)


def places(canvas: Canvas, copies: Copies) -> tuple[Tensor, Tensor]:
    """Row and canvas slot of everything that is asked; (N,) int64 each."""
    row, copy, column = copies.asked.nonzero(as_tuple=True)
    return row, copies.number[row, copy] * canvas.size + column


def noises(batch: Batch, count: int, size: int) -> tuple[Tensor, Tensor]:
    """Of each example the share of each block that is masked, (b, C) in [LEAST, 1], and what decides, (b, C, w) in [0, 1)."""
    drawn = []
    for sample in batch.sample.tolist():
        seed = seeds.derive(batch.seed, "lesson", batch.iteration, sample)
        drawn.append(torch.rand(count, size + 1, generator=torch.Generator().manual_seed(seed)))
    both = torch.stack(drawn)
    return (1 - both[:, :, 0]).clamp(min=LEAST), both[:, :, 1:]
