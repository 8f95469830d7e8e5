"""One tiny vision-language model: how to build it, and how a prompt becomes its inputs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.video_utils import VideoMetadata

FRAMES_PER_SECOND = 4


class Prompt(NamedTuple):
    """One user turn: pictures, then videos, then words."""

    text: str
    pictures: Sequence[Image.Image] = ()
    videos: Sequence[np.ndarray] = ()  # (F, H, W, 3) uint8

    def messages(self) -> list[dict[str, object]]:
        """The turn as a chat template takes it."""
        media = [{"type": "image"} for _ in self.pictures] + [{"type": "video"} for _ in self.videos]
        return [{"role": "user", "content": [*media, {"type": "text", "text": self.text}]}]


class Built(NamedTuple):
    """A model and what turns prompts into its inputs."""

    model: PreTrainedModel
    processor: ProcessorMixin | PreTrainedTokenizerFast

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        return self.processor.tokenizer if isinstance(self.processor, ProcessorMixin) else self.processor

    def write(self, messages: Sequence[dict[str, object]]) -> str:
        """The turns as the chat template writes them, up to the opening of a reply."""
        # SmolVLM puts another template in the place of its own as soon as there is a video, unless it is named
        template = {"chat_template": self.processor.chat_template, "add_generation_prompt": True, "tokenize": False}
        return self.processor.apply_chat_template(list(messages), **template)

    def encode(self, *prompts: Prompt) -> BatchFeature:
        """The model's inputs for a batch, padded on the left."""
        texts = [self.write(prompt.messages()) for prompt in prompts]
        written = {"padding": True, "add_special_tokens": False, "return_tensors": "pt"}
        if not isinstance(self.processor, ProcessorMixin):
            return self.processor(texts, **written)
        inputs = self.processor(text=texts, **media_of(prompts), **written)
        inputs.pop("labels", None)  # PaliGemma writes some unasked, and its model would compute a loss
        return inputs


def media_of(prompts: Sequence[Prompt]) -> dict[str, object]:
    """The pictures and videos of a batch as arguments of a processor."""
    media: dict[str, object] = {}
    if any(prompt.pictures for prompt in prompts):
        media["images"] = [list(prompt.pictures) for prompt in prompts]
    videos = [frames for prompt in prompts for frames in prompt.videos]
    if videos:
        media |= {
            "videos": videos,
            "video_metadata": [metadata(frames) for frames in videos],
            "do_sample_frames": False,
        }
    return media


def metadata(frames: np.ndarray) -> VideoMetadata:
    """When each frame was taken: all were kept."""
    count, height, width, _ = frames.shape
    times = {"fps": FRAMES_PER_SECOND, "duration": count / FRAMES_PER_SECOND, "frames_indices": list(range(count))}
    return VideoMetadata(total_num_frames=count, height=height, width=width, **times)


@dataclass(frozen=True, eq=False)
class TinyVLM:
    """One row of the table."""

    name: str  # of the model's class
    build: Callable[[], Built]  # deterministic, float32, eval mode
    pictures: bool = True  # any number of them in a prompt; False: the processor is a tokenizer
    videos: bool = False  # the processor takes videos
    bare: bool = True  # a prompt without pictures is taken
    repeats: bool = True  # the cache holds keys and values alone, so that it can be repeated
    reply_type: int = 0  # what the token types say of a token of the reply
    required: bool = False  # named in the table that every policy must pass

    def load(self, folder: Path) -> Built:
        """What `saved` wrote, read back the way a user does."""
        if not self.pictures:
            return Built(AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder))
        return Built(AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder))
