"""Sums answered in words and pictures, and the tiny model that answers them; it knows nothing of reinforcement learning.

"two plus one red circles" is answered by "two red circles", a picture of them, "three red circles", and a picture of these.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mmgrpo.seeds import derive

NUMBERS = ("one", "two", "three", "four")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
SIGNS = {"plus": 1, "minus": -1}
SPLITS = ("train", "validation", "held_out")
PAD, UNKNOWN, STOP, START, END = "<|pad|>", "<|unknown|>", "<|stop|>", "<|image|>", "<|/image|>"
MARKS = {"start": START, "end": END, "stop": STOP}
WORDS = (PAD, UNKNOWN, STOP, START, END, *NUMBERS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *SIGNS)
IMAGES, LONGEST = 2, 4  # of an answer; tokens of a text, its mark included


@dataclass(frozen=True)
class Sum:
    """A sum of things of one kind, both its parts and its result from 1 to 4."""

    first: int
    sign: str  # a key of SIGNS
    second: int
    colour: str
    shape: str

    @property
    def result(self) -> int:
        return self.first + SIGNS[self.sign] * self.second

    @property
    def prompt(self) -> str:
        return f"{NUMBERS[self.first - 1]} {self.sign} {NUMBERS[self.second - 1]} {self.colour} {self.shape}s"

    @property
    def texts(self) -> tuple[str, str]:
        """What the answer says, in front of each picture."""
        return said(self.first, self.colour, self.shape), said(self.result, self.colour, self.shape)


def said(count: int, colour: str, shape: str) -> str:
    """As "one red circle", "three blue squares"."""
    return f"{NUMBERS[count - 1]} {colour} {shape}{'s' * (count > 1)}"


SUMS = tuple(
    found
    for first in range(1, 5)
    for sign in SIGNS
    for second in range(1, 5)
    for colour in COLOURS
    for shape in SHAPES
    if 1 <= (found := Sum(first, sign, second, colour, shape)).result <= 4
)  # all 144


TERMS = tuple(
    dict.fromkeys((one.first, one.sign, one.second) for one in SUMS)
)  # all 12, those that begin with one first


def split_of(asked: Sum) -> str:
    """A sixth held out, a sixth for validation; each sum, colour and shape is in every split, each thing alone in training."""
    kind = COLOURS.index(asked.colour) + SHAPES.index(asked.shape) * 4
    number = TERMS.index((asked.first, asked.sign, asked.second))
    return {0: "held_out", 3: "validation"}.get((kind + number) % 6, "train")


def write_prompts(folder: Path) -> dict[str, Path]:
    """A JSONL file for each split with the columns prompt and answer, a list of texts that pictures follow."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for split in SPLITS:
        rows = [{"prompt": one.prompt, "texts": one.texts} for one in SUMS if split_of(one) == split]
        paths[split] = folder / f"{split}.jsonl"
        paths[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths


def careless(asked: Sum, share: float, seed: int) -> tuple[str, str]:
    """The texts of an answer, the result of a share of them replaced by any number."""
    chance = random.Random(derive("careless", seed))
    if chance.random() >= share:
        return asked.texts
    return asked.texts[0], said(chance.randint(1, 4), asked.colour, asked.shape)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of WORDS; spaces only separate."""
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, unk_token=UNKNOWN, eos_token=STOP, extra_special_tokens=[START, END],
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def config(width: int = 128, layers: int = 4, heads: int = 4, inside: int = 320) -> dict[str, object]:
    """What the config.json of a new model holds: about 0.8 M parameters."""
    trunk = {
        "model_type": "qwen3", "vocab_size": len(WORDS), "hidden_size": width, "intermediate_size": inside,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads,
        "head_dim": width // heads, "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.08,
        "bos_token_id": None, "eos_token_id": WORDS.index(STOP), "pad_token_id": WORDS.index(PAD),
    }  # fmt: skip
    return {"trunk": trunk, "image": {"size": 16, "channels": 3, "patch": 4}, "marks": MARKS}


def answers(texts: Sequence[str], pictures: Sequence[str]) -> list[dict[str, str]]:
    """Texts and the files of pictures in turn, as `pipelines/answer_parts.py` reads them."""
    return [part for text, file in zip(texts, pictures, strict=True) for part in ({"text": text}, {"image": file})]
