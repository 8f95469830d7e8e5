"""A judge: a model behind an OpenAI-compatible endpoint gives each sample a number. B samples.

A sample whose request fails is asked about again, up to a bound, and is then NaN and counted in the log: no score is
made up. The judge's model is not ours to guard: an answer may try to talk it into a high score.
"""

import base64
import io
import json
import logging
import mimetypes
import re
from collections import Counter
from collections.abc import Mapping, Set
from functools import lru_cache, partial
from pathlib import Path
from string import Formatter
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.types import Prompt, Reward, Samples
from rewards.answers import answer, texts
from rewards.chat import Reply, ask_all, asking, connect, read_key
from rewards.pictures import Frames, choose, edits, images, pictures, videos, whole

log = logging.getLogger(__name__)
FIELDS = {"prompt", "answer", "target"}
VALUE = r"(?<![\w.])-?(?:\d++(?:\.\d++)?|\.\d++)(?!\w)"
SCORE = re.compile(rf"(?i:score)(?i:\s{{1,4}}(?:is|of))?[\s\"'*_`:=]{{1,8}}({VALUE})")
Attach = Literal["none", "prompt", "sample", "edit"]
Part = dict[str, object]  # of a message: a text or an image


def judge(
    *,
    url: str,
    model: str,
    template: str | Mapping[str, str],
    scale: tuple[float, float] = (0.0, 10.0),
    standard: Mapping[str, tuple[float, float]] | None = None,
    system: str = "",
    tag: str | None = None,
    attach: Attach = "none",
    frames: Frames = 8,
    key_variable: str = "",
    key_file: Path | None = None,
    timeout: float = 60.0,
    retries: int = 2,
    pause: float = 1.0,
    concurrency: int = 8,
    temperature: float = 0.0,
    limit: int = 50_000,
    request: Mapping[str, object] | None = None,
) -> Reward:
    """The judge's number, from `scale` = (worst, best) to [0, 1]; (B,), NaN where it gave none.

    `url` is the base, such as http://localhost:8000/v1. `template` names {prompt}, {answer}, the target as {target}; if
    it does, a prompt without one is NaN. A table of templates gives components of its names, a question each. `tag`
    picks the answer out of the text; no answer, or one longer than `limit` characters, is the worst and not asked about.
    `attach` sends the image of the prompt, the image of the sample or else `frames` of its video, or with "edit" those
    of the source video and of the sample's. `standard` gives each of several templates a mean and a standard deviation
    in numbers of the scale: its component is then (number - mean) / deviation. `request` holds further fields, such as
    max_tokens. The number is `read_score`'s. An attempt ends after `timeout` seconds; it is repeated `retries` times,
    after `pause` seconds, doubled each time, unless the status says that it is no use.
    Source: pointwise scores of UnifiedReward (arXiv 2503.05236), there x / 5, and 0 for a failure; the standard
    scores are VideoAlign's (arXiv 2501.13918).
    """
    several = not isinstance(template, str)
    templates = {"": template} if isinstance(template, str) else dict(template)
    if not templates:
        raise ValueError("template is empty; expected a text, or a table of at least one")
    named = {part: check_template(text, attach) for part, text in templates.items()}
    low, high = check_scale(scale)
    places = check_standard(standard, templates) if standard else dict.fromkeys(templates, (low, high - low))
    written = asking(model, system, temperature, request)
    endpoint = connect(url, read_key(key_variable, key_file), timeout, retries, concurrency, pause)

    def reward(samples: Samples) -> Tensor | Mapping[str, Tensor]:
        fine = sound(samples, attach)
        values = {part: settled(samples, fields, tag, limit, fine, low) for part, fields in named.items()}
        asked = [(row, part) for row in range(len(samples)) for part in templates if values[part][row] is None]

        @lru_cache(concurrency)  # the questions about a sample follow each other
        def media(row: int) -> list[Part]:
            return attached(samples, row, attach, frames)

        def body(row: int, part: str) -> bytes:
            return written(content(question(samples, row, templates[part], tag), media(row)))

        bodies = [partial(body, row, part) for row, part in asked]
        replies = ask_all(endpoint, bodies, lambda text: read_score(text, low, high))
        for (row, part), reply in zip(asked, replies, strict=True):
            values[part][row] = torch.nan if reply.score is None else reply.score
        report(model, replies, len(templates) * len(samples), "questions" if several else "samples")
        scores = {part: placed(values[part], *places[part]) for part in templates}
        return scores if several else scores[""]

    return reward


def placed(values: list[float | None], zero: float, unit: float) -> Tensor:
    """(number - zero) / unit; (B,) float32."""
    return ((torch.tensor(values, dtype=torch.float64) - zero) / unit).float()


def report(model: str, replies: list[Reply], total: int, what: str) -> None:
    """One line of the log that counts the causes of missing scores, if any is missing."""
    if problems := Counter(reply.problem for reply in replies if reply.score is None):
        why = ", ".join(f"{problem} ({count})" for problem, count in sorted(problems.items()))
        log.warning("judge %s: %d of %d %s have no score: %s", model, problems.total(), total, what, why)


# ---- what is asked


def check_template(
    template: str, attach: Attach, known: Set[str] = FIELDS, shown: Set[str] = frozenset({"answer"})
) -> set[str]:
    """The fields that a template names; raises ValueError for others, or if the judge would not see what is `shown`."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"template cannot be filled in: {error}; literal braces are doubled") from None
    named = {str(name) for _, name, _, _ in parts}
    if not named <= known or any(form or conversion for _, _, form, conversion in parts):
        raise ValueError(f"template names {sorted(named)}; expected the plain fields {sorted(known)}, {{{{ for a brace")
    if not shown <= named and attach not in ("sample", "edit"):
        raise ValueError(
            f"template names no {{{min(shown - named)}}} and attach is not 'sample' or 'edit': the judge would not see the samples"
        )
    return named


def check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if not -float("inf") < scale[0] < scale[1] < float("inf"):
        raise ValueError(f"scale is {list(scale)}; expected the worst and the best number, finite, in this order")
    return scale


def check_standard(
    standard: Mapping[str, tuple[float, float]], templates: Mapping[str, str]
) -> Mapping[str, tuple[float, float]]:
    if standard.keys() != templates.keys() or not all(
        abs(mean) < float("inf") and 0 < deviation < float("inf") for mean, deviation in standard.values()
    ):
        wanted = f"a mean and a deviation above 0 for each template {sorted(templates)}"
        raise ValueError(f"standard is { {name: list(pair) for name, pair in standard.items()} }; expected {wanted}")
    return standard


def settled(
    samples: Samples, named: set[str], tag: str | None, limit: int, fine: list[bool], worst: float
) -> list[float | None]:
    """What needs no judge: NaN without target or sound media, the worst without a fit answer; None: ask. B values."""
    values: list[float | None] = [None] * len(samples)
    if "answer" in named:
        answers = [answer(text, tag) for text in texts(samples)]
        values = [worst if found is None or len(found) > limit else None for found in answers]
    values = [value if good else torch.nan for value, good in zip(values, fine, strict=True)]
    if "target" in named:
        absent = [prompt.target is None for prompt in samples.prompts]
        values = [torch.nan if none else value for value, none in zip(values, absent, strict=True)]
    return values


def sound(samples: Samples, attach: Attach) -> list[bool]:
    """Whether what is to be attached has finite pixels throughout; raises ValueError if it is not there."""
    if attach == "prompt":
        return [bool(image_files(prompt)) for prompt in samples.prompts]
    if attach == "edit":
        video, source = edits(samples)
        return (whole(video) & whole(source)).tolist()
    if attach == "sample":
        clips = samples.image is None and samples.video is not None
        return whole(videos(samples) if clips else images(samples)).tolist()
    return [True] * len(samples)


def question(samples: Samples, row: int, template: str, tag: str | None) -> str:
    """The template filled in for one sample; a target that is no text is written as JSON."""
    found = "" if samples.text is None else answer(samples.text[row], tag)
    return filled(template, samples.prompts[row], answer=found or "")


def filled(template: str, prompt: Prompt, **answers: str) -> str:
    """A template with a prompt's text and target, and the answers by name."""
    target = prompt.target if isinstance(prompt.target, str) else json.dumps(prompt.target, default=str)
    return template.format(prompt=prompt.text, target=target, **answers)


def attached(samples: Samples, row: int, attach: Attach, frames: Frames) -> list[Part]:
    """What goes with a sample's question: images, and before each of two videos a line that says which it is."""
    if attach == "prompt":
        return [image_part(kind, path.read_bytes()) for kind, path in image_files(samples.prompts[row])]
    if attach == "edit":
        clips = {"source": samples.source_video, "edited": samples.video}
        shown = {name: clip_parts(clip, row, frames) for name, clip in clips.items()}
        lines = {name: f"The {name} video, {len(parts)} frames in their order:" for name, parts in shown.items()}
        return [part for name, parts in shown.items() for part in (text_part(lines[name]), *parts)]
    if attach == "sample":
        image = samples.image
        return clip_parts(samples.video if image is None else image[:, None], row, frames)
    return []


def clip_parts(video: Tensor | None, row: int, frames: Frames) -> list[Part]:
    """Frames of one clip of (B, F, 3, H, W) as PNG."""
    assert video is not None  # checked by `sound`
    return [png(picture) for picture in pictures(video[row, choose(video.shape[1], frames)])]


def image_files(prompt: Prompt) -> list[tuple[str, Path]]:
    """The image files of a prompt and their kinds; raises ValueError if there is none."""
    paths = prompt.media.get("image", ())
    kinds = [mimetypes.guess_type(path)[0] or "" for path in paths]
    bad = [path for path, kind in zip(paths, kinds, strict=True) if not kind.startswith("image/") or not path.is_file()]
    if bad or not paths:
        found = f"the image {bad[0]}" if bad else "no image"
        raise ValueError(f"prompt {prompt.id} has {found}; attach = 'prompt' expects image files")
    return list(zip(kinds, paths, strict=True))


def text_part(text: str) -> Part:
    return {"type": "text", "text": text}


def image_part(kind: str, data: bytes) -> Part:
    """As a data URL."""
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(data).decode()}"}}


def png(picture: Image.Image) -> Part:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return image_part("image/png", stream.getvalue())


def content(text: str, parts: list[Part]) -> str | list[Part]:
    """A user's message: the text alone, or the text and then the images."""
    return [text_part(text), *parts] if parts else text


# ---- what comes back


def read_score(reply: str, low: float, high: float) -> float | None:
    """The number after the last "score" (":", "=", "is" or "of" between), else the only number there is.

    None: neither, or a number outside [low, high]. Of "Score: 4/5" it is 4; "4 of 5" has two numbers and thus none.
    """
    named, every = SCORE.findall(reply), re.findall(VALUE, reply)
    found = named[-1] if named else every[0] if len(every) == 1 else None
    value = None if found is None else float(found)
    return value if value is not None and low <= value <= high else None
