"""Letters to be written in any order, and the tiny Qwen3 that fills in the blocks; it knows nothing of reinforcement learning.

"kfbaomd=" asks for these seven letters, each once, in whatever order. Half of the texts that the model learns from keep the order,
in the others each pair of neighbours may be swapped: which letter is likely at one place depends on its neighbour, so letters that
are drawn together may repeat or be missing. A prompt is two blocks of 4 tokens, an answer with its end two more.
"""

import json
import random
from collections.abc import Iterator
from itertools import count as integers
from itertools import islice
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config

from mmgrpo.seeds import derive

BLOCK, LETTERS = 4, 7  # tokens of a block, letters of a prompt
ALPHABET = "abcdefghijklmnopqrst"
KEPT = 0.5  # share of the texts that keep the order
SPLITS = ("train", "validation", "held_out")  # sets of letters, whatever their order, are in one of them alone
PAD, END, MASK, UNKNOWN = "<|pad|>", "<|end|>", "<|mask|>", "<|unknown|>"
NUMBERS = {word: number for number, word in enumerate((PAD, END, MASK, UNKNOWN, *ALPHABET, "="))}


def split_of(letters: str) -> str:
    """The split of a prompt, decided by its set of letters alone: a tenth each is for validation and held out."""
    tenth = derive("tiny_block_lm", "".join(sorted(letters))) % 10
    return {0: "held_out", 1: "validation"}.get(tenth, "train")


def prompts(split: str, seed: int) -> Iterator[str]:
    """Endless letters of a split in random order; raises ValueError for another name."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    for number in integers():
        letters = "".join(random.Random(derive("tiny_block_lm", split, seed, number)).sample(ALPHABET, LETTERS))
        if split_of(letters) == split:
            yield letters


def answer(letters: str, chance: random.Random) -> str:
    """A text to learn from: the letters as they are, or each pair of neighbours (first and second, ...) swapped by a toss-up."""
    if chance.random() < KEPT:
        return letters
    pairs = [letters[start : start + 2] for start in range(0, len(letters), 2)]
    return "".join(pair[::-1] if chance.random() < 0.5 else pair for pair in pairs)


def write_prompts(path: Path, split: str, count: int, seed: int = 0) -> Path:
    """A JSONL file with the columns `prompt`, `letters` (the target of the reward) and `text`, one to learn from; -> the file."""
    chance = random.Random(derive("tiny_block_lm", "answers", split, seed))
    rows = [
        {"prompt": f"{letters}=", "letters": letters, "text": answer(letters, chance)}
        for letters in islice(prompts(split, seed), count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    letters = Tokenizer(WordLevel(NUMBERS, unk_token=UNKNOWN))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=letters, pad_token=PAD, eos_token=END, mask_token=MASK, unk_token=UNKNOWN, padding_side="left",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def config() -> Qwen3Config:
    """About 0.34 M parameters in 3 layers."""
    return Qwen3Config(
        vocab_size=len(NUMBERS), hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, head_dim=24, max_position_embeddings=64, bos_token_id=None, eos_token_id=NUMBERS[END],
        pad_token_id=NUMBERS[PAD], tie_word_embeddings=False,
    )  # fmt: skip
