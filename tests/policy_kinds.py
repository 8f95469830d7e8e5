"""One tiny policy of every kind, by name, and how to make it evaluate in smaller chunks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import tiny_block_lms
import tiny_hybrids
import tiny_interleaved
import tiny_vlms.policy as language
from sounds import RATE, recordings, tiny
from tiny_pipelines.policy import NAMED
from tiny_pipelines.policy import policy_of as pipeline_policy

from mmgrpo.draws import Draws
from mmgrpo.schedules import Plan, all_but_last
from mmgrpo.transitions import ddim, flow_sde
from mmgrpo.types import Prompt
from pipelines.answers import Options as AnswerOptions
from pipelines.decisions import from_levels
from pipelines.recordings import Mixing
from pipelines.speech import SpeechPolicy
from pipelines.speech_steps import Options as SpeechOptions

Made = tuple[Any, list[Prompt]]


@dataclass(frozen=True)
class PolicyKind:
    """A row of the table."""

    name: str
    make: Callable[[Path], Made]  # folder for media -> the prepared policy, its prompts
    finer: Callable[[Any], None]  # evaluates less at a time from now on


def pipeline(row: str, kernel: Any, folder: Path) -> Made:
    return pipeline_policy(NAMED[row], folder, kernel=kernel, replay_rows=6, rows=6)


def fewer_rows(policy: Any) -> None:
    policy.engine.options = replace(policy.engine.options, replay_rows=2)


def answers(row: str, folder: Path) -> Made:
    policy, prompts = language.policy_of(row), language.prompts_of(language.NAMED[row], folder)[:2]
    policy.prepare(prompts)
    return policy, prompts


def fewer_tokens(policy: Any) -> None:
    policy.answers.options = replace(policy.answers.options, replay_tokens=AnswerOptions().replay_tokens // 10_000)


def filled(likelihood: str, folder: Path) -> Made:
    return tiny_block_lms.policy_of(likelihood=likelihood), tiny_block_lms.PROMPTS[:2]


def fewer_copies(policy: Any) -> None:
    policy.blocks.answers.options = AnswerOptions(replay_tokens=1)


def interleaved(folder: Path) -> Made:
    policy, prompts = tiny_interleaved.tiny(folder)
    return policy, prompts[:2]


def hybrid(options: Mapping[str, Any], folder: Path) -> Made:
    """Answers of texts and images."""
    policy = tiny_hybrids.opened(tiny_hybrids.written(folder), rollout_rows=6, replay_rows=6, **options)
    prompts = [Prompt(0, "one plus one red circles"), Prompt(1, "two minus one")]
    policy.prepare(prompts)
    return policy, prompts


def fewer_stories(policy: Any) -> None:
    policy.options = replace(policy.options, replay_rows=1)


def speech(decided: Plan | Draws, folder: Path) -> Made:
    prompts = recordings(folder)[:2]
    mixing = Mixing(RATE, noise=folder / "noise", snr=(0, 5))
    policy = SpeechPolicy(tiny("band gains"), SpeechOptions(steps=4, sampler=flow_sde), decided, mixing)
    policy.prepare(prompts)
    return policy, prompts


def fewer_recordings(policy: Any) -> None:
    policy.steps = replace(policy.steps, options=replace(policy.options, replay_rows=1))


DRAWN = {"plan": None, "draws": Draws()}
KINDS = (
    PolicyKind("image flow", partial(pipeline, "StableDiffusion3", from_levels(flow_sde)), fewer_rows),
    PolicyKind("image diffusion", partial(pipeline, "StableDiffusion", from_levels(ddim)), fewer_rows),
    PolicyKind("video flow", partial(pipeline, "Wan", from_levels(flow_sde)), fewer_rows),
    PolicyKind("speech", partial(speech, all_but_last), fewer_recordings),
    PolicyKind("draws of speech", partial(speech, Draws()), fewer_recordings),
    PolicyKind("pictures and text", partial(answers, "Qwen2_5_VLForConditionalGeneration"), fewer_tokens),
    PolicyKind("text", partial(answers, "Qwen3ForCausalLM"), fewer_tokens),
    PolicyKind("text in blocks", partial(filled, "block"), fewer_copies),
    PolicyKind("text in blocks, by their order", partial(filled, "order"), fewer_copies),
    PolicyKind("texts and images in turn, as tokens", interleaved, fewer_tokens),
    PolicyKind("texts and images in turn, tokens and steps", partial(hybrid, {}), fewer_stories),
    PolicyKind("texts and images in turn, tokens and draws", partial(hybrid, DRAWN), fewer_stories),
)
