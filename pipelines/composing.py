"""Answers of texts and images, token by token. Axes: B answers, n of them still written, S tokens at most, V vocabulary."""

import torch
from torch import Tensor

from pipelines import token_probabilities
from pipelines.decoding import Writer, choice
from pipelines.vocabularies import CODE, FORCED, TEXT, TEXT_ALONE, Grammar


class Composer:
    """Chooses the next token of every row among those that its place allows, and notes what it chose.

    An image is begun only where it and an end still fit, so none is ever cut off.
    """

    def __init__(self, known: Grammar, uniform: Tensor, writer: Writer, explore: bool) -> None:
        self.grammar, self.uniform, self.writer, self.explore = known, uniform, writer, explore
        self.written, self.end, self.sampling = writer.written, writer.end, writer.sampling
        rows, steps, device = len(uniform), writer.sampling.max_new_tokens, uniform.device
        self.pattern = known.pattern.to(device)
        # tokens so far of the image that a row is writing, 0: none
        self.place = torch.zeros(rows, dtype=torch.int64, device=device)
        self.images = torch.zeros_like(self.place)  # begun so far
        self.written.vocabulary = torch.zeros(rows, steps, dtype=torch.uint8, device=device)
        truncated = [part.stop - part.first for part in known.vocabularies.values() if part.sampling.truncates]
        if truncated:
            width = -(-max(truncated) // 8)
            self.written.support = torch.zeros(rows, steps, width, dtype=torch.uint8, device=device)

    @property
    def alive(self) -> Tensor:
        return self.writer.alive

    @property
    def left(self) -> int:
        return self.writer.left

    @property
    def done(self) -> bool:
        return self.writer.done

    def drop_finished(self) -> Tensor:
        return self.writer.drop_finished()

    def kinds(self) -> Tensor:
        """Which vocabulary the next token of each row that is alive comes from; (n,) int64."""
        place, images = self.place[self.alive], self.images[self.alive]
        fits = self.left > len(self.pattern)
        text = torch.where((images < self.grammar.most) & fits, TEXT, TEXT_ALONE)
        inside = torch.where(self.pattern[place] < 0, CODE, FORCED)
        return torch.where(place > 0, inside, text)

    def choose(self, logits: Tensor) -> Tensor:
        """The next token of each row that is alive, from its logits; (n, V) -> (n,) int64."""
        rows, kinds = self.alive, self.kinds()
        token, log_prob = self.pattern[self.place[rows]], torch.zeros(len(rows), device=rows.device)
        for kind, known in self.grammar.vocabularies.items():
            part = (kinds == kind).nonzero().flatten()
            if len(part) == 0:
                continue
            drawn = self.explore or kind == CODE  # the likeliest codes make no picture
            uniform = self.uniform[rows[part], self.writer.step] if drawn else None
            found = choice(known.of(logits[part]), known.sampling, uniform)
            token[part], log_prob[part] = found.token + known.first, found.log_prob.float()
            self._note(rows[part], found.kept)
        assert self.written.vocabulary is not None
        self.written.vocabulary[rows, self.writer.step] = kinds.to(torch.uint8)
        self._advance(rows, token)
        self.writer.put(token, log_prob)
        return token

    def _note(self, rows: Tensor, kept: Tensor | None) -> None:
        if kept is not None:
            assert self.written.support is not None
            bits = token_probabilities.packed(kept, 0)
            self.written.support[rows, self.writer.step, : bits.shape[1]] = bits

    def _advance(self, rows: Tensor, token: Tensor) -> None:
        place = self.place[rows]
        begun = (place == 0) & (token == self.grammar.layout.begin)
        self.place[rows] = torch.where(begun, 1, torch.where(place > 0, (place + 1) % len(self.pattern), 0))
        self.images[rows] += begun
