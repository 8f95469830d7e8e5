"""Rewards for edited videos: VIVA's sum of three terms, and questions to a judge about edits and about videos.

Axes: B samples.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mmgrpo.types import Prompt, Reward, Samples, same_shape
from rewards.pictures import Frames
from rewards.video import framewise

# ---- VIVA


class Terms(NamedTuple):
    """What VIVA adds up; (B,) each."""

    instruction: Tensor  # R_IF
    source: Tensor  # R_SP
    preference: Tensor  # R_PS


def instruction_following(to_edited: Tensor, to_source: Tensor) -> Tensor:
    """R_IF = C(V_edit, t_edit) - C(V_edit, t_src); (B,) each.

    Within a group it differs by a constant from the gains of both captions together,
    (C(V_edit, t_edit) - C(V_src, t_edit)) + (C(V_src, t_src) - C(V_edit, t_src)).
    """
    same_shape(to_edited=to_edited, to_source=to_source)
    return to_edited - to_source


def viva(
    *,
    alignment: Reward,
    likeness: Reward,
    preference: Reward,
    edited: str = "edited_caption",
    source: str = "source_caption",
    frames: Frames = 8,
    weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
) -> Reward:
    """w_IF R_IF + w_SP R_SP + w_PS R_PS, reported as three components times their weights; (B,) each.

    R_IF is `instruction_following`, C the image reward `alignment` (a CLIP cosine), R_SP the video reward `likeness` to
    the source, R_PS the image reward `preference` (PickScore); image rewards are means over `frames`, the same for a
    whole group. `edited` and `source` name the columns with a caption of the video after and before the edit; a prompt
    may lack the second, not the first: R_IF is then C(V_edit, t_edit). Without R_IF a copy of the source is best: it
    has R_SP = 1. With the recipe's weight 1 the run's total is the sum. NaN in all three where one of them has no
    opinion, so that no part of the sum stands for it.
    Source: VIVA, arXiv 2512.16906, equations 1 to 7; its weights are not published.
    """
    if any(not 0 <= weight < float("inf") for weight in weights) or not any(weights):
        raise ValueError(f"weights are {list(weights)}; expected three from 0 on, one above")
    aligned, preferred = (framewise(reward=reward, frames=frames) for reward in (alignment, preference))

    def score(samples: Samples) -> Mapping[str, Tensor]:
        after = captioned(samples, [caption(prompt, edited) for prompt in samples.prompts])
        terms = Terms(
            instruction_following(single(aligned, after), source_alignment(aligned, samples, source)),
            single(likeness, samples),
            single(preferred, after),
        )
        missing = torch.stack(terms).isnan().any(0)
        return {
            name: torch.where(missing, torch.nan, term * weight)
            for (name, term), weight in zip(terms._asdict().items(), weights, strict=True)
        }

    return score


def source_alignment(aligned: Reward, samples: Samples, source: str) -> Tensor:
    """C(V_edit, t_src), 0 for a prompt without the caption, so that R_IF is C(V_edit, t_edit); (B,)."""
    known = [row for row, prompt in enumerate(samples.prompts) if prompt.columns.get(source)]
    scores = torch.zeros(len(samples))
    if known:
        part = samples.take(torch.tensor(known))
        scores[known] = single(aligned, captioned(part, [caption(prompt, source) for prompt in part.prompts]))
    return scores


def single(reward: Reward, samples: Samples) -> Tensor:
    """The scores of a reward of one component; (B,) float32 on the CPU; raises ValueError for one of several."""
    values = reward(samples)
    if not isinstance(values, Tensor):
        raise ValueError(f"a reward of VIVA has the components {sorted(values)}; expected one number a sample")
    return values.float().cpu()


def caption(prompt: Prompt, column: str) -> str:
    """A text from the data; raises ValueError if the column is missing, empty or no text."""
    found = prompt.columns.get(column)
    if not isinstance(found, str) or not found:
        raise ValueError(
            f"prompt {prompt.id} has the {column} {found!r}; expected a text (VIVA's captions are columns)"
        )
    return found


def captioned(samples: Samples, texts: list[str]) -> Samples:
    """The samples as if these had been their prompts' texts."""
    prompts = tuple(replace(prompt, text=text) for prompt, text in zip(samples.prompts, texts, strict=True))
    return replace(samples, batch=replace(samples.batch, prompts=prompts))


# ---- questions to a judge: `template` of `rewards.judge:judge`, whose scale is left at 0 to 10

CLOSING = "Reason briefly, then end with 'Score: x', x a number from 0 (worst) to 10 (best)."
EDIT = "Frames of a source video and of its edit are attached. The instruction was: {prompt}\n"
VIDEO = "Frames of a generated video are attached, in their order. The prompt was: {prompt}\n"


def edit_questions() -> Mapping[str, str]:
    """Three questions about an edit, with attach = "edit": instruction, preservation, aesthetics."""
    return {
        "instruction": EDIT + "Has the edit done what the instruction asks, all of it, in every frame? " + CLOSING,
        "preservation": EDIT
        + "Is everything that the instruction does not concern as it was in the source: subjects, background, motion, "
        "framing? Judge this alone, not whether the instruction was followed. " + CLOSING,
        "aesthetics": EDIT
        + "Judge the edited video's look alone: sharpness, light, artefacts, seams, flicker. "
        + CLOSING,
    }


def video_questions() -> Mapping[str, str]:
    """Three questions about a video, with attach = "sample": VideoAlign's dimensions (arXiv 2501.13918)."""
    return {
        "visual_quality": VIDEO + "Judge the frames' visual quality alone: sharpness, light, artefacts. " + CLOSING,
        "motion_quality": VIDEO
        + "Judge the motion alone: is it plausible, stable and as lively as the prompt asks; a still video has none. "
        + CLOSING,
        "text_alignment": VIDEO
        + "Does the video show what the prompt asks for: subjects, actions, places, camera? "
        + CLOSING,
    }
