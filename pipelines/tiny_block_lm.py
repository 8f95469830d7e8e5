"""Numbers to be written as sums, and the tiny Qwen3 that fills in the blocks; it knows nothing of reinforcement learning.

"sum 579=" asks for two numbers of three digits that add up to it, such as "123+456". There are hundreds of right answers: which
digit is right at one place depends on the digits at the others, so digits that are drawn together must agree without having seen
each other. A prompt is one block of 8 tokens, an answer with its end another.
"""

import json
import random
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config

BLOCK = 8  # tokens
LOW, HIGH = 100, 999  # of the numbers that are added, and of their sum
SPLITS = {"train": 500, "validation": 100, "held_out": 199}  # sums of each; a sum is in one of them alone
PAD, END, MASK, UNKNOWN = "<|pad|>", "<|end|>", "<|mask|>", "<|unknown|>"
CHARACTERS = "0123456789+= sum"
NUMBERS = {word: number for number, word in enumerate((PAD, END, MASK, UNKNOWN, *dict.fromkeys(CHARACTERS)))}


def sums(split: str) -> list[int]:
    """The sums of a split, in the same random order each time; raises ValueError for another name."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    every = list(range(2 * LOW, HIGH + 1))
    random.Random(0).shuffle(every)
    start = sum(count for name, count in SPLITS.items() if list(SPLITS).index(name) < list(SPLITS).index(split))
    return every[start : start + SPLITS[split]]


def asked(total: int) -> str:
    """The prompt."""
    return f"sum {total}="


def answer(total: int, chance: random.Random) -> str:
    """One of the right answers, all of them equally likely."""
    first = chance.randint(LOW, total - LOW)
    return f"{first}+{total - first}"


def write_prompts(path: Path, split: str) -> Path:
    """A JSONL file of a split's prompts with the column `total`; -> the file."""
    rows = [{"prompt": asked(total), "total": total} for total in sums(split)]
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
