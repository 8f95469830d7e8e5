"""Questions about drawn pictures, and the tiny Qwen2.5-VL that answers them; it knows nothing of reinforcement learning.

A picture is 16x16 px, black, with 1 to 4 coloured shapes, each in its own quarter. Every picture, question and answer is a
function of a seed. The answer is one word, and one token.
"""

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count as integers
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
)

from mmgrpo.seeds import derive

SIDE, CELL = 16, 8  # px
PATCH, MERGE = 4, 2  # px of a side of a patch, patches of a side of an image token
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "yellow": (255, 255, 0)}
SHAPES = ("circle", "square", "triangle")
SIZES = (5, 6, 7)  # px; a cell is larger than the largest and its last row and column stay black, so shapes never touch
SPLITS = ("train", "held_out")
HELD_OUT = 0.2  # share of the collections of objects that are held out

# ---- pictures


@dataclass(frozen=True, order=True)
class Thing:
    """One shape of a picture."""

    colour: str  # a key of COLOURS
    shape: str  # one of SHAPES


@dataclass(frozen=True)
class Placed:
    """Where and how large a thing is drawn."""

    thing: Thing
    size: int  # px, one of SIZES
    left: int  # px
    top: int  # px


Scene = tuple[Placed, ...]


def scene(seed: int) -> Scene:
    """1 to 4 things in different quarters, some repeated on purpose, with random sizes and offsets."""
    chance = random.Random(seed)
    kinds = [Thing(colour, shape) for colour in COLOURS for shape in SHAPES]
    few = chance.sample(kinds, chance.choice((2, 3, 12)))
    number = chance.choice((1, 2, 3, 3, 4, 4))
    quarters = chance.sample([(0, 0), (0, CELL), (CELL, 0), (CELL, CELL)], number)
    return tuple(place(chance.choice(few), quarter, chance) for quarter in quarters)


def place(thing: Thing, quarter: tuple[int, int], chance: random.Random) -> Placed:
    """A thing at a random size and offset in the quarter with this left and top, px."""
    size = chance.choice(SIZES)
    left, top = (corner + chance.randrange(CELL - size) for corner in quarter)
    return Placed(thing, size, left, top)


def mask(shape: str, size: int) -> NDArray[np.bool_]:
    """Which pixels of a shape's bounding square it fills; -> (size, size)."""
    offset = 2 * np.arange(size) - (size - 1)  # half px from the middle
    across, down = np.meshgrid(offset, offset)
    inside = {
        "circle": across**2 + down**2 <= size**2,
        "square": np.ones((size, size), bool),
        "triangle": 2 * np.abs(across) <= np.maximum(down + size - 1, 2),
    }
    return inside[shape]


def draw(things: Scene) -> NDArray[np.uint8]:
    """The picture; -> (SIDE, SIDE, 3), 0..255."""
    canvas = np.zeros((SIDE, SIDE, 3), np.uint8)
    for placed in things:
        window = canvas[placed.top : placed.top + placed.size, placed.left : placed.left + placed.size]
        window[mask(placed.thing.shape, placed.size)] = COLOURS[placed.thing.colour]
    return canvas


def split_of(things: Scene) -> str:
    """The split of a picture, decided by its collection of things alone: a held-out collection is nowhere in training."""
    words = [f"{thing.colour} {thing.shape}" for thing in sorted(placed.thing for placed in things)]
    return "held_out" if derive(*words) % 1000 < HELD_OUT * 1000 else "train"


# ---- questions


@dataclass(frozen=True)
class Question:
    """What is asked about a picture."""

    text: str
    answer: str  # one word
    kind: str  # a key of KINDS


def ask_count(things: list[Thing], chance: random.Random) -> Question:
    """As "how many red circles?", "how many red shapes?", "how many circles?" or "how many shapes?"."""
    present = chance.random() < 0.8
    meant = chance.choice(things if present else [Thing(chance.choice(list(COLOURS)), chance.choice(SHAPES))])
    colour, shape = chance.choice((None, meant.colour, meant.colour)), chance.choice((None, meant.shape))
    found = [thing for thing in things if colour in (None, thing.colour) and shape in (None, thing.shape)]
    words = [word for word in (colour, f"{shape or 'shape'}s") if word]
    return Question(f"how many {' '.join(words)}?", str(len(found)), "count")


def ask_colour(things: list[Thing], chance: random.Random) -> Question | None:
    """As "what colour is the circle?", if some shape comes once."""
    shapes = [thing.shape for thing in things]
    single = [thing for thing in things if shapes.count(thing.shape) == 1]
    if not single:
        return None
    thing = chance.choice(single)
    return Question(f"what colour is the {thing.shape}?", thing.colour, "colour")


def ask_shape(things: list[Thing], chance: random.Random) -> Question | None:
    """As "what shape is red?", if some colour comes once."""
    colours = [thing.colour for thing in things]
    single = [thing for thing in things if colours.count(thing.colour) == 1]
    if not single:
        return None
    thing = chance.choice(single)
    return Question(f"what shape is {thing.colour}?", thing.shape, "shape")


def ask_more(things: list[Thing], chance: random.Random) -> Question | None:
    """As "more red or blue?", with the answers "red", "blue" and "same", if there are two colours."""
    numbers = Counter(thing.colour for thing in things)
    if len(numbers) < 2:
        return None
    one, other = chance.sample(list(numbers), 2)
    larger = one if numbers[one] > numbers[other] else other
    return Question(f"more {one} or {other}?", "same" if numbers[one] == numbers[other] else larger, "more")


KINDS: dict[str, Callable[[list[Thing], random.Random], Question | None]] = {
    "count": ask_count,
    "colour": ask_colour,
    "shape": ask_shape,
    "more": ask_more,
}
ANSWERS = {"count": tuple("01234"), "colour": tuple(COLOURS), "shape": SHAPES, "more": (*COLOURS, "same")}


@dataclass(frozen=True)
class Example:
    """A picture, and a question about it with its answer."""

    scene: Scene
    question: Question


def examples(split: str, seed: int, kinds: Sequence[str] = tuple(KINDS)) -> Iterator[Example]:
    """Endless examples of a split, the kinds of question in turn; the n-th depends on the split, the seed and n alone."""
    for number in integers():
        yield next(attempts(split, kinds[number % len(kinds)], derive("tiny_vlm", split, seed, number)))


def attempts(split: str, kind: str, seed: int) -> Iterator[Example]:
    """Random pictures of the split about which such a question can be asked."""
    for attempt in integers():
        things = scene(derive(seed, attempt))
        if split_of(things) == split:
            asked = KINDS[kind]([placed.thing for placed in things], random.Random(derive(seed, attempt, "question")))
            if asked is not None:
                yield Example(things, asked)


def write_prompts(folder: Path, split: str, count: int, seed: int = 0) -> Path:
    """Pictures as PNG files and `folder/SPLIT.jsonl` with the columns prompt, image (file name), answer, kind; -> the JSONL."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; expected one of {', '.join(SPLITS)}")
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index, drawn in enumerate(islice(examples(split, seed), count)):
        image, asked = f"{split}_{index:05d}.png", drawn.question
        Image.fromarray(draw(drawn.scene)).save(folder / image)
        rows.append({"prompt": asked.text, "image": image, "answer": asked.answer, "kind": asked.kind})
    path = folder / f"{split}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


# ---- the model's parts

PAD, UNKNOWN = "<|endoftext|>", "<|unknown|>"
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = (PAD, UNKNOWN, "<|im_start|>", "<|im_end|>", *VISION)
PLURALS = tuple(f"{shape}s" for shape in (*SHAPES, "shape"))
ASKED = "how many what colour shape is the more or ?".split()
WORDS = ("system", "user", "assistant", *ANSWERS["count"], *COLOURS, *SHAPES, "same", *PLURALS, *ASKED)
NUMBERS = {word: number for number, word in enumerate((*SPECIAL, *WORDS))}  # the vocabulary
TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == "image" %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of WORDS and per special token; spaces and line ends only separate."""
    words = Tokenizer(WordLevel(NUMBERS, unk_token=UNKNOWN))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.decoder = decoders.WordPiece(prefix="##", cleanup=True)  # joins by spaces, none before a question mark
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=PAD, unk_token=UNKNOWN, eos_token="<|im_end|>", padding_side="left",
        extra_special_tokens=["<|im_start|>", *VISION], clean_up_tokenization_spaces=False,
    )  # fmt: skip


def processor() -> Qwen2_5_VLProcessor:
    """Pictures of 16x16 px become 4x4 patches and 2x2 image tokens, values in [-1, 1]."""
    pixels = {"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE}
    geometry = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 1, "size": pixels}
    values = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(**geometry, **values),
        tokenizer=tokenizer(),
        video_processor=Qwen2VLVideoProcessor(**geometry, **values),
        chat_template=TEMPLATE,
    )


def config() -> Qwen2_5_VLConfig:
    """About 1.3 M parameters: 3 layers that see, 4 that read and answer."""
    text = {
        "vocab_size": len(NUMBERS), "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256, "bos_token_id": None,
        "eos_token_id": NUMBERS["<|im_end|>"], "pad_token_id": NUMBERS[PAD],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]},
    }  # fmt: skip
    vision = {
        "depth": 3, "hidden_size": 96, "intermediate_size": 256, "num_heads": 3, "patch_size": PATCH,
        "spatial_merge_size": MERGE, "temporal_patch_size": 1, "window_size": SIDE, "fullatt_block_indexes": [0, 1, 2],
        "out_hidden_size": 128,
    }  # fmt: skip
    ids = {f"{name}_token_id": NUMBERS[f"<|{name}|>"] for name in ("vision_start", "vision_end")}
    ids |= {f"{name}_token_id": NUMBERS[f"<|{name}_pad|>"] for name in ("image", "video")}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)
