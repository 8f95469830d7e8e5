"""The judge against a real server on this machine that answers rightly, late, wrongly, or not at all."""

import asyncio
import base64
import io
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mmgrpo.components import build
from mmgrpo.types import Batch, Prompt, Reward, Samples
from rewards.chat import Endpoint, endpoint_url
from rewards.judge import judge, read_score

NAN = float("nan")
TEMPLATE = "Q: {prompt} A: {answer}"
Behaviour = Callable[[str, int], tuple[int, bytes]]  # question, how often it was asked before -> status, body


def reply(text: object) -> tuple[int, bytes]:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()


def echo(question: str, before: int) -> tuple[int, bytes]:
    """The answer itself is the judge's text."""
    return reply(question.split("A: ")[1])


@dataclass
class Server:
    """What arrived, and what is answered."""

    behave: Behaviour = echo
    url: str = ""
    asked: Counter[str] = field(default_factory=Counter)
    bodies: list[dict[str, object]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)
    busy: int = 0
    most: int = 0  # requests at one time
    lock: threading.Lock = field(default_factory=threading.Lock)

    def handle(self, path: str, headers: dict[str, str], raw: bytes) -> tuple[int, bytes]:
        body = json.loads(raw)
        text = body["messages"][-1]["content"]
        question = text if isinstance(text, str) else text[0]["text"]
        with self.lock:
            before = self.asked[question]
            self.asked[question] += 1
            self.bodies.append(body)
            self.headers.append(headers)
            self.paths.add(path)
            self.busy += 1
            self.most = max(self.most, self.busy)
        try:
            return self.behave(question, before)
        finally:
            with self.lock:
                self.busy -= 1


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"  # connections are kept

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            status, body = state.handle(self.path, dict(self.headers), raw)
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except (BrokenPipeError, ConnectionResetError):  # the client has given up
                self.close_connection = True

        def log_message(self, *arguments: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def ask(server: Server, template: str = TEMPLATE, **options: object) -> Reward:
    chosen: dict[str, object] = {"pause": 0.0, "timeout": 20.0, **options}
    return judge(url=server.url, model="referee", template=template, **chosen)  # type: ignore[arg-type]


def said(*texts: str, target: object = None, image: Tensor | None = None, media: Path | None = None) -> Samples:
    files = {} if media is None else {"image": (media,)}
    prompts = tuple(Prompt(row, f"number {row}?", target=target, media=files) for row in range(len(texts)))
    ids = torch.arange(len(texts))
    return Samples(Batch(prompts, ids, ids, seed=0, iteration=0), text=texts, image=image)


def same(values: object, expected: list[float]) -> None:
    assert isinstance(values, Tensor) and values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6, equal_nan=True)


# ---- the number in a reply


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("7", 7),
        ("Score: 7", 7),
        ("**Score:** 7.5", 7.5),
        ("Final Score: 4.2", 4.2),
        ('{"score": 8}', 8),
        ("I saw 3 cats. The score is 6.", 6),
        ("Score: 2 ... no. Score: 9", 9),  # the last
        ("Score: 8/10", 8),
        ("I would say 6 points", 6),
        ("8 of 10", None),  # two numbers and no word
        ("Score: 11", None),  # out of the scale, not cut off
        ("Score: -1", None),
        ("Score: nan", None),
        ("Score: " + "9" * 1000, None),
        ("x7", None),
        ("no idea", None),
        ("", None),
    ],
)
def test_the_number_of_a_reply_is_read_by_the_stated_rule(text: str, score: float | None):
    assert read_score(text, 0, 10) == score


@pytest.mark.parametrize(
    "text", ["score " * 2**17, "score" + " " * 2**20, "7" * 2**20, "7 " * 2**19, "score: " * 2**17]
)
def test_a_reply_of_a_megabyte_is_read_within_a_second(text: str):
    begin = time.process_time()
    assert read_score(text, 0, 10) is None
    assert time.process_time() - begin < 1


# ---- a judge that answers


def test_scores_are_those_of_the_judge_in_the_order_of_the_samples_though_it_answers_in_another(server: Server):
    finished: list[str] = []

    def later_first(question: str, before: int) -> tuple[int, bytes]:
        time.sleep(0.05 * (4 - int(question.split("A: ")[1])))
        finished.append(question)
        return echo(question, before)

    server.behave = later_first
    same(ask(server, scale=(0.0, 5.0))(said("0", "1", "2", "3", "4")), [0, 0.2, 0.4, 0.6, 0.8])
    assert finished[0] == "Q: number 4? A: 4"
    assert server.asked.total() == 5 and server.paths == {"/v1/chat/completions"}


def test_the_score_of_unified_reward_is_a_fifth_of_its_number(server: Server):
    server.behave = lambda question, before: reply("Alignment is good.\nFinal Score: 4.2")
    same(ask(server, scale=(0.0, 5.0))(said("a")), [0.84])


def test_the_request_holds_what_the_options_say_and_braces_of_an_answer_are_only_text(server: Server):
    server.behave = lambda question, before: reply("5")
    reward = ask(
        server, "{prompt}|{answer}|{target}|{{}}", system="Be strict.", temperature=0.5, request={"max_tokens": 9}
    )
    same(reward(said("{prompt} {0.__class__}", target={"a": 1})), [0.5])
    assert server.bodies == [
        {
            "model": "referee",
            "temperature": 0.5,
            "max_tokens": 9,
            "messages": [
                {"role": "system", "content": "Be strict."},
                {"role": "user", "content": 'number 0?|{prompt} {0.__class__}|{"a": 1}|{}'},
            ],
        }
    ]


def test_no_more_requests_than_asked_for_are_on_their_way_and_as_many_as_that(server: Server):
    def slow(question: str, before: int) -> tuple[int, bytes]:
        time.sleep(0.2)
        return echo(question, before)

    server.behave = slow
    same(ask(server, concurrency=3)(said(*"123456789")), [n / 10 for n in range(1, 10)])
    assert server.most == 3


def test_a_judge_may_be_asked_where_an_event_loop_runs_already(server: Server):
    async def notebook() -> object:
        return ask(server)(said("5"))

    same(asyncio.run(notebook()), [0.5])


def test_the_reward_follows_a_permutation(server: Server):
    batch = said("1", "2", "x")
    order = torch.tensor([2, 0, 1])
    same(ask(server)(batch.take(order)), [NAN, 0.1, 0.2])


def test_a_recipes_table_builds_the_judge(server: Server):
    table = {
        "build": "rewards.judge:judge",
        "url": server.url,
        "model": "referee",
        "template": TEMPLATE,
        "scale": [1, 5],
    }
    same(build(table, "rewards.judge")(said("3")), [0.5])


# ---- a judge that fails


def test_a_status_of_500_is_asked_again_up_to_the_bound(server: Server):
    server.behave = lambda question, before: (500, b"") if before < 2 else echo(question, before)
    same(ask(server, retries=2)(said("5", "6")), [0.5, 0.6])
    assert set(server.asked.values()) == {3}


def test_after_the_bound_the_score_is_nan_and_counted_once_for_the_batch(
    server: Server, caplog: pytest.LogCaptureFixture
):
    server.behave = lambda question, before: (503, b"") if "A: 6" in question else echo(question, before)
    same(ask(server, retries=3)(said("5", "6", "6", "no idea")), [0.5, NAN, NAN, NAN])
    assert server.asked["Q: number 1? A: 6"] == 4 and server.asked["Q: number 3? A: no idea"] == 4
    assert server.asked["Q: number 0? A: 5"] == 1
    assert [record.message for record in caplog.records if record.name == "rewards.judge"] == [
        "judge referee: 3 of 4 samples have no score: no score in the reply (1), status 503 (2)"
    ]


def test_a_status_that_no_repetition_heals_is_not_asked_again(server: Server):
    server.behave = lambda question, before: (401 if "A: 1" in question else 429, b"")
    same(ask(server, retries=2)(said("1", "2")), [NAN, NAN])
    assert server.asked == {"Q: number 0? A: 1": 1, "Q: number 1? A: 2": 3}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"null",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b'{"choices": [{"message": {"content": 5}}]}',
        b"\xff\xfe\xfd",
        b"[" * 100_000,
    ],
)
def test_rubbish_is_asked_again_and_then_nan(server: Server, body: bytes):
    server.behave = lambda question, before: (200, body) if before < 1 or "A: 6" in question else echo(question, before)
    same(ask(server, retries=1)(said("5", "6")), [0.5, NAN])
    assert set(server.asked.values()) == {2}


def test_a_judge_that_is_late_is_given_up_within_the_bound_and_asked_again(
    server: Server, caplog: pytest.LogCaptureFixture
):
    released = threading.Event()

    def late(question: str, before: int) -> tuple[int, bytes]:
        if "A: 6" in question or before == 0:
            released.wait(30)
        return echo(question, before)

    server.behave = late
    begin = time.monotonic()
    same(ask(server, timeout=0.5, retries=1)(said("5", "6")), [0.5, NAN])
    assert time.monotonic() - begin < 10
    released.set()
    assert set(server.asked.values()) == {2}
    assert "1 of 2 samples have no score: no reply within 0.5 s (1)" in caplog.text


def test_a_reply_that_trickles_in_is_given_up_too():
    """Every byte comes in time, the reply does not."""
    seen = []

    class Drip(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append(self.path)
            try:
                for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n" + b" " * 99:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.1)
            except (BrokenPipeError, ConnectionResetError):
                pass

        def log_message(self, *arguments: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Drip) as http:
        http.daemon_threads = True
        http.block_on_close = False
        threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}).start()
        url = f"http://127.0.0.1:{http.server_port}/v1"
        begin = time.monotonic()
        same(judge(url=url, model="referee", template=TEMPLATE, timeout=0.5, retries=0)(said("5")), [NAN])
        assert time.monotonic() - begin < 5 and len(seen) == 1
        http.shutdown()


def test_the_pause_doubles_between_attempts(server: Server):
    times: list[float] = []

    def note(question: str, before: int) -> tuple[int, bytes]:
        times.append(time.monotonic())
        return 500, b""

    server.behave = note
    ask(server, retries=2, pause=0.2)(said("5"))
    assert times[1] - times[0] >= 0.2 and times[2] - times[1] >= 0.4


def test_a_judge_that_is_not_there_is_nan(caplog: pytest.LogCaptureFixture):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as closed:
        port = closed.server_port
    reward = judge(url=f"http://127.0.0.1:{port}/v1", model="referee", template=TEMPLATE, retries=1, pause=0.0)
    same(reward(said("5")), [NAN])
    assert "1 of 1 samples have no score: ConnectError (1)" in caplog.text


# ---- what is not asked about


def test_a_missing_target_is_nan_and_a_missing_answer_0_without_a_question(server: Server):
    batch = said("<answer>5</answer>", "5", "<answer>" + "5" * 100 + "</answer>", target="cat")
    same(ask(server, tag="answer", limit=99)(batch), [0.5, 0, 0])
    same(ask(server, "{target} A: {answer}", tag="answer")(said("<answer>5</answer>")), [NAN])
    assert server.asked.total() == 1


def test_hostile_texts_reach_the_judge_as_they_are(server: Server):
    hostile = ["\x00\ud800 5", '"}], "model": "other"', "a" * 2**20]
    server.behave = lambda question, before: reply("5")
    same(ask(server, limit=2**20)(said(*hostile)), [0.5] * 3)
    assert sorted(server.asked) == sorted(f"Q: number {row}? A: {text}" for row, text in enumerate(hostile))
    assert {str(body["model"]) for body in server.bodies} == {"referee"}


# ---- images


def sent_image(server: Server) -> tuple[str, bytes]:
    (body,) = server.bodies
    parts = body["messages"][-1]["content"]  # type: ignore[index]
    assert [part["type"] for part in parts] == ["text", "image_url"]
    kind, _, data = parts[1]["image_url"]["url"].partition(";base64,")
    return kind, base64.b64decode(data)


def test_the_prompts_image_is_sent_as_it_lies_on_the_disk(server: Server, tmp_path: Path):
    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.jpg")
    same(ask(server, attach="prompt")(said("5", media=tmp_path / "red.jpg")), [0.5])
    assert sent_image(server) == ("data:image/jpeg", (tmp_path / "red.jpg").read_bytes())


def test_the_samples_image_is_sent_as_png_and_a_broken_one_is_nan(server: Server):
    server.behave = lambda question, before: reply("5")
    image = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    image[1, 0, 0, 0] = torch.nan
    same(ask(server, "Is it {prompt}", attach="sample")(said("", "", image=image)), [0.5, NAN])
    kind, data = sent_image(server)
    pixels = torch.frombuffer(bytearray(Image.open(io.BytesIO(data)).tobytes()), dtype=torch.uint8).view(4, 5, 3)
    assert kind == "data:image/png" and torch.equal(pixels, (image[0] * 255).round().permute(1, 2, 0).to(torch.uint8))


def test_a_prompt_without_the_image_that_is_to_be_sent_is_refused(server: Server, tmp_path: Path):
    for path in (None, tmp_path / "absent.png", tmp_path):
        with pytest.raises(ValueError, match="prompt 0 has (no|the) image.*; attach = 'prompt' expects image files"):
            ask(server, attach="prompt")(said("5", media=path))


# ---- the key


def test_the_key_comes_from_a_file_or_a_variable_and_is_never_logged_or_shown(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("JUDGE_KEY", "secret-one")
    (tmp_path / "key").write_text("secret-two\n")
    server.behave = lambda question, before: (500, b"") if "A: 6" in question else echo(question, before)
    for options in ({"key_variable": "JUDGE_KEY"}, {"key_file": tmp_path / "key"}, {}):
        reward = ask(server, retries=1, **options)
        same(reward(said("5", "6")), [0.5, NAN])
        assert "secret" not in repr(reward)
    sent = [headers.get("Authorization") for headers in server.headers]
    assert sent == ["Bearer secret-one"] * 3 + ["Bearer secret-two"] * 3 + [None] * 3
    assert "secret" not in caplog.text
    assert "secret" not in repr(Endpoint("http://a", {"Authorization": "Bearer secret"}, 1.0, 1, 1, 0.0))


def test_a_key_that_is_not_there_is_refused_with_the_name_that_was_typed(server: Server, tmp_path: Path):
    with pytest.raises(ValueError, match="key_variable is 'NO_SUCH_KEY'; expected an environment variable that is set"):
        ask(server, key_variable="NO_SUCH_KEY")
    with pytest.raises(ValueError, match="key_file is '.*absent'; expected a file that holds the key"):
        ask(server, key_file=tmp_path / "absent")
    (tmp_path / "key").write_text("two words\n")
    with pytest.raises(ValueError, match="the key in .*key has characters that a header cannot hold") as error:
        ask(server, key_file=tmp_path / "key")
    assert "two words" not in str(error.value)


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{prompt} {answr}"}, r"template names \['answr', 'prompt'\]; expected the plain fields"),
        ({"template": "{answer!r}"}, "expected the plain fields"),
        ({"template": "{answer} {"}, "template cannot be filled in: .*; literal braces are doubled"),
        ({"template": "{prompt}"}, "the judge would not see the samples"),
        ({"scale": (5.0, 5.0)}, r"scale is \[5.0, 5.0\]; expected the worst and the best number"),
        ({"scale": (0.0, float("inf"))}, "scale is"),
        ({"timeout": 0.0}, "timeout is 0.0 s"),
        ({"retries": -1}, "retries -1"),
        ({"concurrency": 0}, "concurrency 0"),
        ({"request": {"model": "other"}}, r"request sets \['model'\]"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_name(server: Server, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        ask(server, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://me:word@host/v1", "http://host/v1?key=a", ""]
)
def test_a_url_that_is_no_base_is_refused_without_its_password(url: str):
    with pytest.raises(ValueError, match="^url (points to|is)") as error:
        endpoint_url(url)
    assert "word" not in str(error.value).replace("password", "")
