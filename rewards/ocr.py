"""Does the image show the text that was asked for? Read by an OCR library that runs offline on a CPU. B samples."""

import logging
from functools import partial

import cv2
import torch
from PIL import Image
from rapidfuzz.distance import Levenshtein
from rapidocr import RapidOCR
from rapidocr.inference_engine.onnxruntime.main import ONNXRuntimeError
from rapidocr.utils.output import RapidOCROutput
from rapidocr.utils.process_img import ResizeImgError
from torch import Tensor

from mmgrpo.types import Prompt
from rewards.pictures import PictureReward, score_pictures

log = logging.getLogger(__name__)


def text_accuracy(recognised: str, target: str) -> float:
    """1 - min(edit distance, |target|) / |target|, 1 if the target is contained; in [0, 1], higher is better.

    White space and case do not count; an empty target is always met (the published code divides by zero). Extra text
    around a misread target is an edit too, but costs no more than showing nothing. Source: the OCR reward of Flow-GRPO
    (arXiv 2505.05470) as in its published code.
    """
    read, wanted = ("".join(text.split()).lower() for text in (recognised, target))
    if wanted in read:  # also when nothing is wanted
        return 1.0
    return 1 - min(Levenshtein.distance(read, wanted), len(wanted)) / len(wanted)


def target_text(prompt: Prompt) -> str | None:
    """`prompt.target` if it is a string, else what stands between the first two double quotes of the text, else None."""
    if isinstance(prompt.target, str):
        return prompt.target
    parts = prompt.text.split('"', maxsplit=2)
    return parts[1] if len(parts) == 3 else None


def read_text(picture: Image.Image, *, engine: RapidOCR, confidence: float) -> str | None:
    """All lines read with more than the given confidence, joined without spaces; None if the engine failed."""
    try:
        found = engine(picture)
    except (ONNXRuntimeError, ResizeImgError, cv2.error) as error:
        log.warning("OCR failed on a picture of %d x %d pixels: %s", *picture.size, error)
        return None
    assert isinstance(found, RapidOCROutput)  # other types answer calls without detection or recognition
    if found.txts is None or found.scores is None:
        return ""
    return "".join(line for line, sure in zip(found.txts, found.scores, strict=True) if sure > confidence)


def accuracies(pictures: list[Image.Image], prompts: list[Prompt], *, engine: RapidOCR, confidence: float) -> Tensor:
    """`text_accuracy` of each picture; (b,), NaN where nothing was asked for or the engine failed."""
    scores = torch.full((len(pictures),), torch.nan)
    for row, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        wanted = target_text(prompt)
        read = None if wanted is None else read_text(picture, engine=engine, confidence=confidence)
        if wanted is not None and read is not None:
            scores[row] = text_accuracy(read, wanted)
    return scores


def ocr_accuracy(*, confidence: float = 0.0, threads: int = 1, angles: bool = True) -> PictureReward:
    """`text_accuracy` of the image's text, read by rapidocr (PP-OCRv6 small, in its wheel), against `target_text`.

    Range [0, 1]. Lines count above `confidence` in [0, 1]; `threads` of one CPU process; `angles` also reads lines that
    stand upside down. NaN: no target (no opinion), or a failure of the engine (logged; the published code gives 0).
    """
    engine = RapidOCR(
        params={
            "Global.log_level": "critical",
            "Global.text_score": 0.0,  # the engine's own limit of 0.5 would hide unsure lines from `confidence`
            "Global.use_cls": angles,
            "EngineConfig.onnxruntime.intra_op_num_threads": threads,
        }
    )
    return partial(score_pictures, score=partial(accuracies, engine=engine, confidence=confidence), batch=64)
