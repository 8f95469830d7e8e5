"""Questions to a model behind an OpenAI-compatible endpoint: many at once, each with a bound on time and attempts."""

import asyncio
import json
import os
import re
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

PASSING = (408, 409, 425, 429)  # statuses below 500 that may be gone at the next attempt
Read = Callable[[str], float | None]  # what the text of a reply says; None: it cannot be read
Body = Callable[[], bytes]  # a request in JSON, written when it is sent, so that few with pictures are in memory


class Reply(NamedTuple):
    """What one attempt gave."""

    score: float | None
    problem: str = ""  # if there is no score
    final: bool = False  # asking again would not help


@dataclass(frozen=True)
class Endpoint:
    """Where a model is and how it is asked."""

    url: str  # of chat completions
    headers: Mapping[str, str] = field(repr=False)  # may hold the key
    timeout: float  # s, of one attempt
    attempts: int
    concurrency: int  # requests on their way at one time
    pause: float  # s before the second attempt; doubled before each further one

    def __post_init__(self) -> None:
        if not (self.timeout > 0 and self.attempts > 0 and self.concurrency > 0 and 0 <= self.pause < float("inf")):
            raise ValueError(
                f"timeout is {self.timeout} s, retries {self.attempts - 1}, concurrency {self.concurrency}, pause "
                f"{self.pause} s; expected a timeout above 0, no negative number, at least one request at a time"
            )


def endpoint_url(url: str) -> str:
    """Where chat completions are asked for under a base such as http://localhost:8000/v1; raises ValueError."""
    try:
        parts = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ValueError(f"url is {url!r}; expected the base of an OpenAI-compatible endpoint: {error}") from None
    if parts.scheme not in ("http", "https") or not parts.host or parts.userinfo or parts.query:
        raise ValueError(f"url points to {parts.host!r}; expected http(s)://host/v1 without user, password and query")
    return url.rstrip("/") + "/chat/completions"


def read_key(variable: str, file: Path | None) -> str:
    """The key in an environment variable or a file, "" if neither is named; raises ValueError if it is not there."""
    if variable and file is not None:
        raise ValueError(f"key_variable is {variable!r} and key_file {str(file)!r}; expected one of them")
    if file is not None and not file.is_file():
        raise ValueError(f"key_file is {str(file)!r}; expected a file that holds the key")
    if variable and not os.environ.get(variable):
        raise ValueError(f"key_variable is {variable!r}; expected an environment variable that is set")
    key = (os.environ[variable] if variable else file.read_text(encoding="utf-8") if file is not None else "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ValueError(f"the key in {variable or file} has characters that a header cannot hold; expected one word")
    return key


def connect(url: str, key: str, timeout: float, retries: int, concurrency: int, pause: float) -> Endpoint:
    """The endpoint under a base; with a key if there is one."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    return Endpoint(endpoint_url(url), headers, timeout, retries + 1, concurrency, pause)


def asking(
    model: str, system: str, temperature: float, request: Mapping[str, object] | None
) -> Callable[[object], bytes]:
    """How the content of a user's message becomes a request in JSON; raises ValueError if `request` sets what an option sets."""
    if request and (taken := request.keys() & {"model", "messages", "temperature", "stream"}):
        raise ValueError(f"request sets {sorted(taken)}; expected fields that are no options of their own")
    before = [{"role": "system", "content": system}] if system else []

    def written(content: object) -> bytes:
        messages = [*before, {"role": "user", "content": content}]
        fields = {"model": model, "temperature": temperature, "messages": messages}
        return json.dumps({**(request or {}), **fields}).encode()

    return written


def read_reply(response: httpx2.Response, read: Read) -> Reply:
    if response.status_code != 200:
        code = response.status_code
        return Reply(None, f"status {code}", final=code < 500 and code not in PASSING)
    try:
        text = response.json()["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return Reply(None, "no chat completion")
    score = read(text) if isinstance(text, str) else None
    return Reply(score, "" if score is not None else "no score in the reply")


async def attempt(client: httpx2.AsyncClient, endpoint: Endpoint, body: bytes, read: Read) -> Reply:
    """Ask once; the limit of time covers the whole exchange, so that a reply that trickles in ends too."""
    try:
        async with asyncio.timeout(endpoint.timeout):
            return read_reply(await client.post(endpoint.url, content=body, headers=endpoint.headers), read)
    except TimeoutError:
        return Reply(None, f"no reply within {endpoint.timeout:g} s")
    except httpx2.HTTPError as error:
        return Reply(None, type(error).__name__)


async def ask(
    client: httpx2.AsyncClient, seats: asyncio.Semaphore, endpoint: Endpoint, body: Body, read: Read
) -> Reply:
    """Ask until there is a score or the attempts are used up."""
    reply = Reply(None)
    for turn in range(endpoint.attempts):
        if turn:
            await asyncio.sleep(endpoint.pause * 2 ** (turn - 1))
        async with seats:
            reply = await attempt(client, endpoint, await asyncio.to_thread(body), read)
        if reply.score is not None or reply.final:
            break
    return reply


async def converse(endpoint: Endpoint, bodies: Sequence[Body], read: Read) -> list[Reply]:
    seats = asyncio.Semaphore(endpoint.concurrency)
    limits = httpx2.Limits(max_connections=endpoint.concurrency)
    async with httpx2.AsyncClient(timeout=None, limits=limits) as client:
        return await asyncio.gather(*(ask(client, seats, endpoint, body, read) for body in bodies))


def ask_all(endpoint: Endpoint, bodies: Sequence[Body], read: Read) -> list[Reply]:
    """The replies to requests, in their order; in a thread of its own, as the caller's may have an event loop."""
    work: Coroutine[Any, Any, list[Reply]] = converse(endpoint, bodies, read)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
