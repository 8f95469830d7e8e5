"""Rewards for text answers against values worked out by hand, and against texts that were made to break them."""

import json
import re
import signal
import time
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from mmgrpo.components import complete
from mmgrpo.types import Batch, Prompt, Samples
from rewards.answers import answer
from rewards.mathematics import Comparer, equal_mathematics
from rewards.text import choice, edit_similarity, exact, json_schema, letter, number, numeric, rouge_l, tag_format

NAN = float("nan")
SCHEMA = {
    "type": "object",
    "properties": {"label": {"enum": ["cat", "dog"]}, "box": {"type": "array", "items": {"type": "number"}}},
    "required": ["label"],
    "additionalProperties": False,
}


def said(*texts: str, target: object = None, targets: tuple[object, ...] = (), **columns: object) -> Samples:
    """One sample per text, all with one target or each with its own."""
    wanted = targets or (target,) * len(texts)
    prompts = tuple(Prompt(row, "what?", target=item, columns=columns) for row, item in enumerate(wanted))
    ids = torch.arange(len(texts))
    return Samples(Batch(prompts, ids, ids, seed=0, iteration=0), text=texts)


def same(values: object, expected: list[float]) -> None:
    assert isinstance(values, Tensor) and values.dtype == torch.float32
    torch.testing.assert_close(values, torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-6, equal_nan=True)


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("schema") / "label.json"
    path.write_text(json.dumps(SCHEMA))
    return path


# ---- the answer in a text


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>2</think><answer> 4 </answer>", "4"),
        ("<answer>1</answer> no: <answer>2</answer>", "2"),  # several: the last
        ("<answer>a<answer>b</answer></answer>", "b"),  # nested: the pair that no tag parts
        ("<answer><answer>a</answer>b</answer>", "a"),
        ("<answer>1</answer><answer>2", "1"),  # unclosed: opens nothing
        ("<answer>1", None),
        ("1</answer>", None),
        ("</answer>1<answer>", None),
        ("<Answer>1</Answer>", None),
        ("<answer></answer>", ""),
        ("4", None),
        ("", None),
    ],
)
def test_the_answer_is_what_the_last_closed_pair_of_tags_holds(text: str, found: str | None):
    assert answer(text, "answer") == found


def test_without_a_tag_the_answer_is_the_whole_text():
    assert answer(" <answer>4</answer>\n", None) == "<answer>4</answer>"


def test_a_tag_is_a_plain_word():
    assert answer("<final-answer>4</final-answer>", "final-answer") == "4"
    with pytest.raises(ValueError, match=r"the tag '<answer>' arrived; expected a word such as 'answer'"):
        answer("4", "<answer>")


# ---- right or wrong


def test_an_exact_match_ignores_case_white_space_quotes_and_stops_but_no_sign():
    same(exact(said("Yes", ' "yes." ', "**YES**", "yes  no", "no", "", target="yes")), [1, 1, 1, 0, 0, 0])
    same(exact(said("-5", "5", ".5", "5.", target=5)), [0, 1, 0, 1])
    same(exact(said("Yes", "yes", target="yes"), case=True), [0, 1])


def test_one_of_several_targets_is_enough():
    same(exact(said("sofa", "couch", "bed", target=["couch", "sofa"])), [1, 1, 0])
    same(rouge_l(said("the sofa", target=["couch", "the sofa"])), [1])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(B)", "B"),
        (" **B.** ", "B"),
        ("b) a cat", "B"),
        ("B. a cat", "B"),
        ("[C] a cat", "C"),
        ("The answer is B", "B"),
        ("The answer is (B) because A is wrong", "B"),
        ("I first thought of option C, but the correct answer: D.", "D"),
        ("so \\boxed{B}. The answer is C", "B"),
        ("\\boxed{\\text{B}}", "B"),
        ("Answer: A cat", None),  # an article
        ("The answer is A", "A"),
        ("The answer is a cat", None),
        ("A cat", None),
        ("Between A and B", None),
        ("A or B", None),
        ("42", None),
        ("", None),
    ],
)
def test_a_letter_is_read_by_the_stated_rules(text: str, found: str | None):
    assert letter(text) == found


def test_a_choice_is_named_by_its_letter_or_by_its_text():
    animals = ["a cat", "A dog", "a bird"]
    same(choice(said("B", "a dog.", "C", "a cat", "a cow", "", target="B", choices=animals)), [1, 1, 0, 0, 0, 0])
    same(choice(said("B", "A", target="a dog", choices=animals)), [1, 0])
    same(choice(said("<answer>(b)</answer>", "B", target="(B)"), tag="answer"), [1, 0])


@pytest.mark.parametrize("target", [1, True, "a cow", ["B"]])
def test_a_choice_refuses_a_target_that_names_no_option(target: object):
    with pytest.raises(ValueError, match=r"prompt 0 has the target .* of type \w+; expected the letter of an option"):
        choice(said("B", target=target, choices=["a cat", "a dog"]))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("about 1,234.5 m", 1234.5),
        ("from 3 to 4", 4),
        ("3-4", 4),
        ("-7", -7),
        ("x = −2", -2),
        (".5", 0.5),
        ("1e-3", 1e-3),
        ("50%", 50),
        ("$3.50", 3.5),
        ("3/4", 0.75),
        ("答案是42", 42),
        ("1/0", None),
        ("x2", None),
        ("1e999", None),
        ("9" * 500, None),
        ("none", None),
    ],
)
def test_the_number_of_a_text_is_its_last(text: str, value: float | None):
    assert number(text) == value


def test_numbers_are_right_within_the_tolerance_and_at_its_edge():
    same(numeric(said("100", "105", "105.1", "95", "94.9", "no", target=100), relative=0.05), [1, 1, 0, 1, 0, 0])
    same(numeric(said("0", "0.01", target=0), relative=0.05), [1, 0])  # ChartQA: 0 is met exactly
    same(numeric(said("0.01", "0.02", target="0"), absolute=0.01), [1, 0])
    same(numeric(said("4", "4.0", "4.001", target="4 cats")), [1, 1, 0])


@pytest.mark.parametrize(
    ("target", "text", "score"),
    [
        ("1/2", "0.5", 1),
        ("1/2", r"\frac{1}{2}", 1),
        (r"$\frac{\sqrt{3}}{2}$", r"so \boxed{\sqrt{3}/2}", 1),
        ("x^2 + 2x + 1", "(x+1)^2", 1),
        ("2x", "2", 0),
        ("5", "x = 5 \\sqrt{2}", 0),
        ("{1, 2}", r"\{2, 1\}", 1),
        ("(1, 2)", "(2, 1)", 0),
        (5, "5 apples", 1),
        ("5", "", 0),
        ("5", "no idea", 0),
        (["5", "7"], "7", 1),
    ],
)
def test_mathematics_is_compared_by_its_meaning(target: object, text: str, score: float):
    same(MATHEMATICS(said(text, target=target)), [score])


MATHEMATICS = equal_mathematics()


def test_an_answer_that_would_compute_for_ever_is_0_logged_and_the_next_one_is_compared(
    caplog: pytest.LogCaptureFixture,
):
    hostile = ("$9^{9^{9^9}}$", "(" * 1900)
    begin = time.monotonic()
    same(equal_mathematics(timeout=1.0)(said("1", *hostile, "2/2", target="1")), [1, 0, 0, 1])
    assert time.monotonic() - begin < 60
    assert "2 comparisons of 4 answers took more than 1 s" in caplog.text


def test_an_answer_that_is_python_is_not_run(tmp_path: Path):
    code = f"__import__('pathlib').Path({str(tmp_path / 'run')!r}).touch()"
    same(MATHEMATICS(said(code, f"${code}$", f"1+{code}", f"\\boxed{{{code}}}", target="7")), [0, 0, 0, 0])
    assert not list(tmp_path.iterdir())


def test_the_comparing_process_ends_with_its_reward():
    comparer = Comparer(timeout=5.0, digits=6)
    assert comparer("1", "1.0") == (True, True)
    process = comparer.pool.workers[0].process
    assert process is not None and process.poll() is None
    del comparer
    assert process.poll() is not None


def test_the_answer_to_an_interrupted_comparison_is_not_taken_for_that_to_the_next():
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    comparer = Comparer(timeout=60.0, digits=6)
    assert comparer("1", "2") == (False, True)
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            comparer("1", "$" + "x+" * 900 + "1$")  # takes seconds, and is wrong
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert comparer("1", "2/2") == (True, True)


def test_a_target_that_is_no_mathematics_is_refused():
    with pytest.raises(ValueError, match=r"prompt 0 has the target '' of type str; expected a mathematical expression"):
        MATHEMATICS(said("5", target=""))


# ---- how near


def test_the_edit_similarity_has_the_values_worked_out_by_hand():
    same(edit_similarity(said("kitten", "sitting", "", "xyz", target="sitting")), [1 - 3 / 7, 1, 0, 0])
    same(edit_similarity(said("", target="")), [1])


def test_rouge_l_has_the_values_worked_out_by_hand():
    batch = said("the cat sat on mat", "The CAT, sat!", "mat the", "", target="the cat sat on the mat")
    same(rouge_l(batch), [2 * 5 / 11, 2 * 3 / 9, 2 * 1 / 8, 0])
    same(rouge_l(batch, measure="precision"), [1, 1, 1 / 2, 0])
    same(rouge_l(batch, measure="recall"), [5 / 6, 3 / 6, 1 / 6, 0])
    same(rouge_l(said("кот на ковре", target="кот ковре")), [2 * 2 / 5])  # rouge-score sees no words here


@settings(deadline=None, derandomize=True)
@given(*[st.text("abc ABC.,1_-", max_size=40)] * 2)
def test_rouge_l_equals_the_rouge_score_package_on_ascii(found: str, right: str):
    reference = RougeScorer(["rougeL"]).score(right, found)["rougeL"]
    for measure, value in (("f", reference.fmeasure), ("precision", reference.precision), ("recall", reference.recall)):
        same(rouge_l(said(found, target=right), measure=measure), [value])  # type: ignore[arg-type]


# ---- form


@pytest.mark.parametrize(
    ("text", "strict", "graded"),
    [
        ("<think>a</think><answer>b</answer>", 1, 1),
        (" <think>a</think>\n\n<answer>b</answer>\n", 1, 1),
        ("<think>a</think><answer>b", 0, 0.75),
        ("<think>a</think> so <answer>b</answer>", 0, 1),
        ("<answer>b</answer><think>a</think>", 0, 1),
        ("<think></think><answer>b</answer>", 0, 1),
        ("<think><think>a</think></think><answer>b</answer>", 0, 0.5),
        ("<think>a<answer>b</answer></think>", 0, 1),
        ("b", 0, 0),
        ("", 0, 0),
    ],
)
def test_the_format_is_one_block_of_each_tag_in_order_and_nothing_else(text: str, strict: float, graded: float):
    same(tag_format(said(text)), [strict])
    same(tag_format(said(text), graded=True), [graded])


def test_the_tags_of_the_format_are_configurable_and_may_begin_in_the_prompt():
    same(tag_format(said("<plan>a</plan><code>b</code>"), names=("plan", "code")), [1])
    same(tag_format(said("a</think><answer>b</answer>"), prefix="<think>"), [1])
    with pytest.raises(ValueError, match="names are \\['a', 'a'\\]; expected at least one tag, each once"):
        tag_format(said("a"), names=("a", "a"))


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"label": "cat"}', 1),
        ('```json\n{"label": "cat", "box": [1, 2.5]}\n```', 1),
        ('{"label": "cow"}', 0),
        ('{"label": "cat", "more": 1}', 0),
        ('{"label": "cat", "box": [NaN]}', 0),
        ('{"label": "cat"', 0),
        ('{"label": "cat"} and more', 0),
        ("[" * 10_000 + "]" * 10_000, 0),
        ('{"label": "cat", "box": [' + "9" * 9000 + "]}", 0),  # more digits than Python reads
        ("", 0),
    ],
)
def test_json_is_right_if_the_schema_accepts_it(schema: Path, text: str, score: float):
    same(json_schema(schema=schema)(said(text)), [score])


def test_a_json_answer_is_found_in_its_tag_and_refused_above_the_limit(schema: Path):
    batch = said('<answer>{"label": "cat"}</answer>', '{"label": "cat"}')
    same(json_schema(schema=schema, tag="answer")(batch), [1, 0])
    same(json_schema(schema=schema, limit=10)(said('{"label": "cat"}')), [0])


def test_items_are_unique_by_their_json_value_and_compared_in_linear_time(tmp_path: Path):
    (tmp_path / "unique.json").write_text('{"type": "array", "uniqueItems": true}')
    reward = json_schema(schema=tmp_path / "unique.json", limit=2**20)
    same(reward(said("[1, 2]", "[1, 1.0]", "[1, true]", '[{"a": 1, "b": 2}, {"b": 2, "a": 1}]')), [1, 0, 1, 0])
    begin = time.process_time()
    same(reward(said(json.dumps([{"a": n} for n in range(50_000)]))), [1])
    assert time.process_time() - begin < 2


def test_no_reference_of_a_schema_is_fetched(tmp_path: Path):
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "remote.json").write_text(json.dumps({"$ref": (tmp_path / "other.json").as_uri()}))
    with pytest.raises(ValueError, match="remote.json' refers to 'file:.*other.json'; nothing is fetched"):
        json_schema(schema=tmp_path / "remote.json")(said("1"))


def test_a_schema_that_is_none_is_refused_with_its_file(tmp_path: Path):
    (tmp_path / "bad.json").write_text('{"type": "cat"}')
    for name in ("bad.json", "absent.json"):
        with pytest.raises(ValueError, match=rf"schema is '.*{name}'; expected a file with a JSON schema"):
            json_schema(schema=tmp_path / name)


# ---- what holds for all of them

Score = Callable[[Samples], object]
WITH_TARGET: dict[str, tuple[Score, object]] = {
    "exact": (exact, "B"),
    "choice": (choice, "B"),
    "numeric": (numeric, "42"),
    "edit_similarity": (edit_similarity, "a small cat"),
    "rouge_l": (rouge_l, "a small cat"),
    "mathematics": (MATHEMATICS, "42"),
}
TAGGED = {"tag": "answer"}
MEGABYTE = {
    "letters": "a" * 2**20,
    "words": "a b " * 2**18,
    "digits": "1" * 2**20,
    "groups": "1,111" * 2**17 + "x",
    "slashes": "1 / " * 2**18,
    "signs": "-" * 2**20,
    "blanks": "answer" + " " * 2**20 + "B",
    "opened": "<answer>" * 2**17,
    "nested": "<answer>" * 2**16 + "</answer>" * 2**16,
    "announced": "answer is " * 2**17,
    "brackets": "(" * 2**20,
    "boxes": "\\boxed{" * 2**17,
    "fence": "```json\n" * 2**17,
    "quotes": "\"'" * 2**19,
}


@pytest.mark.parametrize("name", WITH_TARGET)
def test_a_missing_target_is_nan_an_empty_answer_0_and_a_permutation_is_followed(name: str):
    reward, target = WITH_TARGET[name]
    batch = said("a small cow", str(target), "", "42", targets=(target, target, target, None))
    scores = reward(batch)
    assert isinstance(scores, Tensor) and scores[1:3].tolist() == [1, 0] and scores[3].isnan()
    order = torch.tensor([3, 1, 0, 2])
    same(reward(batch.take(order)), scores[order].tolist())


@pytest.mark.parametrize("name", WITH_TARGET)
def test_a_target_of_an_unusable_type_is_refused_with_the_prompts_number(name: str):
    reward, target = WITH_TARGET[name]
    with pytest.raises(ValueError, match=r"prompt 1 has the target \{'a': 1\} of type dict; expected"):
        reward(said("42", "42", targets=(target, {"a": 1})))


@pytest.mark.parametrize("name", [*WITH_TARGET, "tag_format", "graded", "json_schema"])
@pytest.mark.parametrize("text", MEGABYTE)
def test_a_megabyte_of_anything_is_scored_within_a_second(name: str, text: str, schema: Path):
    forms = {
        "tag_format": tag_format,
        "graded": partial(tag_format, graded=True),
        "json_schema": json_schema(schema=schema),
    }
    reward, target = (forms[name], None) if name in forms else WITH_TARGET[name]
    batch = said(MEGABYTE[text], target=target)
    begin = time.process_time()
    scores = reward(batch)
    assert time.process_time() - begin < 1
    assert isinstance(scores, Tensor) and 0 <= float(scores) < 1


@pytest.mark.parametrize("text", MEGABYTE)
def test_the_tags_of_a_megabyte_are_found_within_a_second(text: str):
    begin = time.process_time()
    exact(said(MEGABYTE[text], target="B"), **TAGGED)  # type: ignore[arg-type]
    assert time.process_time() - begin < 1


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_any_text_has_a_score_in_the_range(text: str):
    for reward, target in [WITH_TARGET[name] for name in WITH_TARGET if name != "mathematics"]:
        scores = reward(said(text, target=target))
        assert isinstance(scores, Tensor) and 0 <= float(scores) <= 1


def test_samples_without_text_are_refused():
    with pytest.raises(ValueError, match="the samples carry no text"):
        exact(Samples(said("a").batch))


def test_the_recipe_of_the_readme_for_text_is_accepted():
    readme = (Path(__file__).parent.parent / "rewards" / "README.md").read_text()
    (recipe, *_) = re.findall(r"```toml\n(.*?)```", readme.split("### Text")[1], re.DOTALL)
    tables = tomllib.loads(recipe)["rewards"]
    assert [table["build"] for table in tables] == [
        "rewards.text:numeric",
        "rewards.text:tag_format",
        "rewards.length:overlong",
        "rewards.judge:judge",
    ]
    for table in tables:
        options = {key: value for key, value in table.items() if key not in ("name", "weight")}
        assert complete(options, table["name"]).items() >= options.items()
