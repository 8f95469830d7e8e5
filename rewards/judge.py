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
from collections.abc import Mapping
from pathlib import Path
from string import Formatter
from typing import Literal

import torch
from PIL import Image
from torch import Tensor

from mmgrpo.types import Prompt, Reward, Samples
from rewards.answers import answer, texts
from rewards.chat import Endpoint, ask_all, endpoint_url, read_key
from rewards.pictures import images, pictures

log = logging.getLogger(__name__)
FIELDS = {"prompt", "answer", "target"}
VALUE = r"(?<![\w.])-?(?:\d++(?:\.\d++)?|\.\d++)(?!\w)"
SCORE = re.compile(rf"(?i:score)(?i:\s{{1,4}}(?:is|of))?[\s\"'*_`:=]{{1,8}}({VALUE})")
Attach = Literal["none", "prompt", "sample"]


def judge(
    *,
    url: str,
    model: str,
    template: str,
    scale: tuple[float, float] = (0.0, 10.0),
    system: str = "",
    tag: str | None = None,
    attach: Attach = "none",
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
    it does, a prompt without one is NaN. `tag` picks the answer out of the text; no answer, or one longer than `limit`
    characters, is 0 and not asked about. `attach` sends the image of the prompt or of the sample. `request` holds
    further fields, such as max_tokens. The number is `read_score`'s. An attempt ends after `timeout` seconds; it is
    repeated `retries` times, after `pause` seconds, doubled each time, unless the status says that it is no use.
    Source: pointwise scores of UnifiedReward (arXiv 2503.05236), there x / 5, and 0 for a failure.
    """
    named, (low, high) = check_template(template, attach), check_scale(scale)
    if request and (taken := request.keys() & {"model", "messages", "temperature", "stream"}):
        raise ValueError(f"request sets {sorted(taken)}; expected fields that are no options of their own")
    key = read_key(key_variable, key_file)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    endpoint = Endpoint(endpoint_url(url), headers, timeout, retries + 1, concurrency, pause)
    before = [{"role": "system", "content": system}] if system else []

    def body(question: str, urls: list[str]) -> bytes:
        messages = [*before, {"role": "user", "content": content(question, urls)}]
        fields = {"model": model, "temperature": temperature, "messages": messages}
        return json.dumps({**(request or {}), **fields}).encode()

    def reward(samples: Samples) -> Tensor:
        values = settled(samples, named, tag, limit, attach)
        rows = [row for row, value in enumerate(values) if value is None]
        bodies = [body(question(samples, row, template, tag), attached(samples, row, attach)) for row in rows]
        replies = ask_all(endpoint, bodies, lambda text: read_score(text, low, high))
        for row, reply in zip(rows, replies, strict=True):
            values[row] = torch.nan if reply.score is None else (reply.score - low) / (high - low)
        if problems := Counter(reply.problem for reply in replies if reply.score is None):
            why = ", ".join(f"{problem} ({count})" for problem, count in sorted(problems.items()))
            log.warning("judge %s: %d of %d samples have no score: %s", model, problems.total(), len(values), why)
        return torch.tensor(values, dtype=torch.float32)

    return reward


# ---- what is asked


def check_template(template: str, attach: Attach) -> set[str]:
    """The fields that a template names; raises ValueError for others, or if the judge would not see the sample."""
    try:
        parts = [part for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"template cannot be filled in: {error}; literal braces are doubled") from None
    named = {str(name) for _, name, _, _ in parts}
    if not named <= FIELDS or any(form or conversion for _, _, form, conversion in parts):
        raise ValueError(
            f"template names {sorted(named)}; expected the plain fields {sorted(FIELDS)}, {{{{ for a brace"
        )
    if "answer" not in named and attach != "sample":
        raise ValueError("template names no {answer} and attach is not 'sample': the judge would not see the samples")
    return named


def check_scale(scale: tuple[float, float]) -> tuple[float, float]:
    if not -float("inf") < scale[0] < scale[1] < float("inf"):
        raise ValueError(f"scale is {list(scale)}; expected the worst and the best number, finite, in this order")
    return scale


def settled(samples: Samples, named: set[str], tag: str | None, limit: int, attach: Attach) -> list[float | None]:
    """What needs no judge: NaN without a target or with a broken image, 0 without a fit answer; None: ask. B values."""
    values: list[float | None] = [None] * len(samples)
    if "answer" in named:
        answers = [answer(text, tag) for text in texts(samples)]
        values = [0.0 if found is None or len(found) > limit else None for found in answers]
    if attach == "sample":
        whole = images(samples).flatten(1).isfinite().all(1).tolist()
        values = [value if fine else torch.nan for value, fine in zip(values, whole, strict=True)]
    if "target" in named:
        absent = [prompt.target is None for prompt in samples.prompts]
        values = [torch.nan if none else value for value, none in zip(values, absent, strict=True)]
    return values


def question(samples: Samples, row: int, template: str, tag: str | None) -> str:
    """The template filled in for one sample; a target that is no text is written as JSON."""
    prompt = samples.prompts[row]
    target = prompt.target if isinstance(prompt.target, str) else json.dumps(prompt.target, default=str)
    found = "" if samples.text is None else answer(samples.text[row], tag)
    return template.format(prompt=prompt.text, answer=found, target=target)


def attached(samples: Samples, row: int, attach: Attach) -> list[str]:
    """Data URLs of the images that go with a sample's question."""
    if attach == "prompt":
        return prompt_images(samples.prompts[row])
    if attach == "sample":
        assert samples.image is not None  # checked by `settled`
        return [png(picture) for picture in pictures(samples.image[row : row + 1])]
    return []


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def prompt_images(prompt: Prompt) -> list[str]:
    """The image files of a prompt as they are; raises ValueError if there is none."""
    paths = prompt.media.get("image", ())
    kinds = [mimetypes.guess_type(path)[0] or "" for path in paths]
    bad = [path for path, kind in zip(paths, kinds, strict=True) if not kind.startswith("image/") or not path.is_file()]
    if bad or not paths:
        found = f"the image {bad[0]}" if bad else "no image"
        raise ValueError(f"prompt {prompt.id} has {found}; attach = 'prompt' expects image files")
    return [data_url(kind, path.read_bytes()) for kind, path in zip(kinds, paths, strict=True)]


def png(picture: Image.Image) -> str:
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    return data_url("image/png", stream.getvalue())


def content(text: str, urls: list[str]) -> str | list[dict[str, object]]:
    """A user's message: the text alone, or the text and then the images."""
    parts: list[dict[str, object]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"type": "text", "text": text}, *parts] if urls else text


# ---- what comes back


def read_score(reply: str, low: float, high: float) -> float | None:
    """The number after the last "score" (":", "=", "is" or "of" between), else the only number there is.

    None: neither, or a number outside [low, high]. Of "Score: 4/5" it is 4; "4 of 5" has two numbers and thus none.
    """
    named, every = SCORE.findall(reply), re.findall(VALUE, reply)
    found = named[-1] if named else every[0] if len(every) == 1 else None
    value = None if found is None else float(found)
    return value if value is not None and low <= value <= high else None
