"""Prompts as the inputs of a language model: chat messages, pictures and videos through the model's own processor.

Each prompt is processed once, alone; batches are put together from these parts. Axes: P prompts, L tokens.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmgrpo.types import Prompt
from pipelines import frames

Processor = Any  # a ProcessorMixin, or the tokenizer of a model that reads text alone
MEDIA = ("image", "video")
REMEMBERED = 4 * 2**30  # bytes of pictures and tokens kept in main memory


@dataclass(frozen=True)
class Reading:
    """How prompts are put to the model."""

    chat: bool = True  # through the model's chat template; if not, the text as it is
    system: str | None = None  # a message before each prompt's own
    template: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the chat template
    video_frames: int | None = None  # of each video, evenly spaced
    video_rate: float | None = None  # frames a second of each video; one of the two where there are videos


@dataclass(frozen=True)
class Encoded:
    """One prompt as the model reads it."""

    inputs: Mapping[str, Tensor]  # with a batch axis of 1, or leading with its pictures or patches

    @property
    def length(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def kind(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Equal for prompts that can share a batch: the same inputs, of sizes that can be joined."""
        return tuple(
            (name, () if self.per_token(name) else tuple(value.shape[1:])) for name, value in self.inputs.items()
        )

    def per_token(self, name: str) -> bool:
        """Whether an input has one entry a token, which batches pad."""
        return self.inputs[name].shape[:2] == self.inputs["input_ids"].shape


class Reader:
    """Turns prompts into inputs and remembers them, in main memory."""

    def __init__(self, processor: Processor, model: PreTrainedModel, reading: Reading) -> None:
        self.processor = processor
        self.tokenizer: PreTrainedTokenizerBase = (
            processor if isinstance(processor, PreTrainedTokenizerBase) else processor.tokenizer
        )
        self.reading = reading
        unasked = {"labels"}  # that some processors write
        self.accepted = set(inspect.signature(model.forward).parameters) - unasked
        self.known: dict[object, Encoded] = {}
        self.held = 0  # bytes
        if reading.chat and processor.chat_template is None:
            raise ValueError("policy.chat is true, but the model has no chat template; expected policy.chat = false")

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Look at every medium before training; raises ValueError naming what cannot be used."""
        for prompt in prompts:
            odd = sorted(prompt.media.keys() - set(MEDIA))
            if odd:
                raise ValueError(f"prompt {prompt.id} has the medium {odd[0]!r}; expected {' or '.join(MEDIA)}")
            if prompt.media and isinstance(self.processor, PreTrainedTokenizerBase):
                raise ValueError(f"prompt {prompt.id} has media {sorted(prompt.media)}, but the model reads text alone")
        videos = {path for prompt in prompts for path in prompt.media.get("video", ())}
        how = (self.reading.video_frames, self.reading.video_rate)
        if videos and sum(item is not None for item in how) != 1:
            raise ValueError(
                "there are videos, but policy.video_frames and policy.video_rate are both set, or neither; expected one"
            )
        if videos:
            frames.require_readable(videos, *how)

    def read(self, prompt: Prompt) -> Encoded:
        """The inputs of one prompt; raises ValueError naming it if the processor refuses it."""
        key = (prompt.text, repr(prompt.messages), tuple(sorted(prompt.media.items())))
        if key not in self.known:
            found = self._read(prompt)
            self.held += sum(value.nbytes for value in found.inputs.values())
            if self.held > REMEMBERED:
                self.known.clear()
                self.held = sum(value.nbytes for value in found.inputs.values())
            self.known[key] = found
        return self.known[key]

    def _read(self, prompt: Prompt) -> Encoded:
        images = [opened(path) for path in prompt.media.get("image", ())]
        clips = [
            frames.read(path, self.reading.video_frames, self.reading.video_rate)
            for path in prompt.media.get("video", ())
        ]
        media: dict[str, Any] = {}
        if images:
            media["images"] = [images]
        if clips:
            media |= {"videos": [[clip.frames for clip in clips]], "do_sample_frames": False}
            media["video_metadata"] = [[clip.metadata for clip in clips]]
        text = self.written(prompt)
        begun = self.tokenizer.bos_token is not None and text.startswith(self.tokenizer.bos_token)
        try:
            found = self.processor(
                text=[text], add_special_tokens=not (self.reading.chat and begun), return_tensors="pt", **media
            )
        except (ValueError, TypeError, IndexError) as error:
            raise ValueError(f"the processor refuses prompt {prompt.id}: {error}") from error
        if found["input_ids"].shape[1] == 0:
            raise ValueError(f"prompt {prompt.id} has no tokens")
        known = {name: value for name, value in found.items() if name in self.accepted and isinstance(value, Tensor)}
        return Encoded(known)

    def written(self, prompt: Prompt) -> str:
        """The prompt as text with the marks of its media."""
        if not self.reading.chat:
            return prompt.text
        rich = not isinstance(self.processor, PreTrainedTokenizerBase)
        asked = messages(prompt, self.reading.system) if rich else plain_messages(prompt, self.reading.system)
        text = self.processor.apply_chat_template(
            asked, tokenize=False, add_generation_prompt=True, **self.reading.template
        )
        assert isinstance(text, str)
        return text


def opened(path: Path) -> Image.Image:
    """A picture as RGB."""
    with Image.open(path) as picture:
        return picture.convert("RGB")


def messages(prompt: Prompt, system: str | None) -> list[dict[str, Any]]:
    """The chat with a block for each picture and video; if it names none, they come before the first user's text.

    Raises ValueError if it names others than the prompt has.
    """
    chat = [{"role": one["role"], "content": blocks_of(one["content"])} for one in prompt.messages]
    chat = chat or [{"role": "user", "content": blocks_of(prompt.text)}]
    media = [{"type": name} for name in MEDIA for _ in prompt.media.get(name, ())]
    named = [{"type": block["type"]} for one in chat for block in one["content"] if block["type"] != "text"]
    if not named and media:
        first = next((one for one in chat if one["role"] == "user"), chat[0])
        first["content"] = [*media, *first["content"]]
    elif sorted(block["type"] for block in named) != sorted(block["type"] for block in media):
        told, given = ([block["type"] for block in part] for part in (named, media))
        raise ValueError(f"prompt {prompt.id} has the blocks {told} in its messages; expected its media, {given}")
    return [*preamble(blocks_of(system) if system is not None else None), *chat]


def plain_messages(prompt: Prompt, system: str | None) -> list[dict[str, Any]]:
    """The chat with contents as text, as templates of text models expect them."""
    chat = [{"role": one["role"], "content": text_of(one["content"])} for one in prompt.messages]
    return [*preamble(system), *(chat or [{"role": "user", "content": prompt.text}])]


def preamble(content: Any) -> list[dict[str, Any]]:
    """The system's message, if there is one."""
    return [] if content is None else [{"role": "system", "content": content}]


def blocks_of(content: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else [dict(block) for block in content]


def text_of(content: str | Sequence[Mapping[str, Any]]) -> str:
    return (
        content if isinstance(content, str) else " ".join(block["text"] for block in content if block["type"] == "text")
    )


def collated(parts: Sequence[Encoded], pad: int, device: torch.device) -> dict[str, Tensor]:
    """Prompts of one kind as a batch, padded on the left to the longest; tensors of pictures one after the other."""
    longest = max(part.length for part in parts)
    joined = {}
    for name in parts[0].inputs:
        values = [part.inputs[name] for part in parts]
        if parts[0].per_token(name):
            filler = pad if name == "input_ids" else 0
            values = [functional.pad(value, (longest - value.shape[1], 0), value=filler) for value in values]
        joined[name] = torch.cat(values).to(device)
    return joined
