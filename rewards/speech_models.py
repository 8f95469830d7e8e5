"""Rewards of speech by models of transformers: is it the speaker, does it say the words, does it sound alike to a model.

Each builder loads its models once, from a local folder or a hub name, from safetensors only. Recordings are cut to their
`audio_length`, averaged over channels and resampled to the model's rate; only recordings of equal length are judged together, since
padding shifts what most of these models hear. NaN: a recording that is silent, not finite, below `shortest` or above
`longest` seconds; an answer that is not finite. Scores come back on the CPU. B samples, b of equal length, N audio
samples, T frames, D features.
"""

import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jiwer
import numpy
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize
from transformers import (
    MODEL_FOR_CTC_MAPPING,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioXVector,
    AutoModelForCTC,
    AutoModelForSpeechSeq2Seq,
    AutoProcessor,
)

from mmgrpo.types import Prompt, Samples, require_shape
from rewards.speech import Signal, SpeechReward, audio_rate, recordings, references
from rewards.speech_worker import resampled, silent

Precision = Literal["float32", "bfloat16", "float16"]
DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# ---- the walk over a batch


class Clips(NamedTuple):
    """Recordings of equal length at the model's rate, and what belongs to them."""

    audio: list[Signal]  # b of (n,)
    reference: list[Signal]  # b of (n,), or none if they are not asked for
    prompts: list[Prompt]  # b


Judge = Callable[[Clips], Tensor]  # -> (b,), higher is better


def by_length(sizes: Mapping[int, int], batch: int) -> Iterator[list[int]]:
    """Rows of equal size, at most `batch` together; `sizes` by row."""
    for size in sorted(set(sizes.values())):
        rows = [row for row, own in sizes.items() if own == size]
        yield from (rows[start : start + batch] for start in range(0, len(rows), batch))


@torch.no_grad()
def score_clips(
    samples: Samples, judge: Judge, *, rate: int, paired: bool, batch: int, shortest: float, longest: float
) -> Tensor:
    """The judge's scores at `rate`, with the references if `paired`; (B,) float32 on the CPU, NaN as in the first lines."""
    signals, own = recordings(samples), audio_rate(samples)
    cleans = references(samples) if paired else signals
    pairs = {row: pair for row, pair in enumerate(zip(signals, cleans, strict=True)) if not any(map(silent, pair))}
    sizes = {row: len(pair[0]) for row, pair in pairs.items() if shortest <= len(pair[0]) / own <= longest}
    scores = torch.full((len(samples),), torch.nan)
    for rows in by_length(sizes, batch):
        audio, clean = ([at_rate(pairs[row][side], own, rate) for row in rows] for side in (0, 1))
        values = judge(Clips(audio, clean if paired else [], [samples.prompts[row] for row in rows])).float().cpu()
        require_shape("scores", values, len(rows))
        scores[rows] = values
    return torch.where(scores.isfinite(), scores, torch.nan)


def at_rate(x: Signal, rate: int, to: int) -> Signal:
    return resampled(x.astype(numpy.float64), rate, to).astype(numpy.float32)


def reward_of(judge: Judge, rate: int, *, paired: bool, batch: int, shortest: float, longest: float) -> SpeechReward:
    """The judge as a reward; raises ValueError for limits that nothing fits."""
    if batch < 1:
        raise ValueError(f"batch is {batch}; expected at least 1")
    if not 0 <= shortest < longest:
        raise ValueError(f"shortest is {shortest} and longest {longest} s; expected 0 <= shortest < longest")
    options: dict[str, Any] = {"rate": rate, "paired": paired, "batch": batch, "shortest": shortest, "longest": longest}
    return lambda samples: score_clips(samples, judge, **options)


def load(kind: Any, model: str, revision: str, dtype: Precision, device: str) -> Any:
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    loaded = kind.from_pretrained(model, revision=revision, dtype=DTYPES[dtype], use_safetensors=True)
    return loaded.eval().to(device)


def inputs(extract: Any, clips: Sequence[Signal], rate: int, model: Any) -> dict[str, Tensor]:
    """What the model is called with, on its device; features in its dtype."""
    found: Mapping[str, Tensor] = extract(list(clips), sampling_rate=rate, return_tensors="pt")
    moved = {name: value.to(model.device) for name, value in found.items()}
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in moved.items()}


# ---- the speaker


def speaker_similarity(
    *,
    model: str,
    revision: str = "main",
    mapped: bool = False,
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 16,
    shortest: float = 0.4,
    longest: float = 60.0,
) -> SpeechReward:
    """Cosine of the speaker embeddings of the recording and its reference, in [-1, 1]; (1 + c) / 2 if `mapped`; (B,).

    `model` is an x-vector model such as microsoft/wavlm-base-plus-sv. Source: Snyder et al. 2018 (X-vectors); the heads of
    transformers.
    """
    network = load(AutoModelForAudioXVector, model, revision, dtype, device)
    extract = AutoFeatureExtractor.from_pretrained(model, revision=revision)
    rate = extract.sampling_rate

    def judge(clips: Clips) -> Tensor:
        one, other = (
            network(**inputs(extract, side, rate, network)).embeddings.float()
            for side in (clips.audio, clips.reference)
        )
        cosine = cosine_similarity(one, other)
        return (1 + cosine) / 2 if mapped else cosine

    return reward_of(judge, rate, paired=True, batch=batch, shortest=shortest, longest=longest)


# ---- the words


def spoken_form(text: str) -> str:
    """Lower case, letters, digits and inner apostrophes alone, single blanks; numbers stay as they are written."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("’", "'")
    kept = "".join(one if one == "'" or unicodedata.category(one)[0] in "LNM" else " " for one in text)
    return " ".join(filter(None, (word.strip("'") for word in kept.split())))


def error_rate(heard: str, wanted: str, unit: Literal["word", "character"]) -> float:
    """(substitutions + deletions + insertions) / units wanted, after `spoken_form`; 1 if nothing is heard.

    NaN if nothing is wanted. Can exceed 1.
    """
    said, right = spoken_form(heard), spoken_form(wanted)
    if not right:
        return float("nan")
    return jiwer.process_words(right, said).wer if unit == "word" else jiwer.process_characters(right, said).cer


def recognition(
    *,
    model: str,
    revision: str = "main",
    unit: Literal["word", "character"] = "word",
    form: Literal["linear", "exponential"] = "linear",
    generate: Mapping[str, object] | None = None,
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 16,
    shortest: float = 0.1,
    longest: float = 30.0,
) -> SpeechReward:
    """1 - min(E, 1), or exp(-E) if `form` is exponential, of the transcript's word or character error rate E; (B,), [0, 1].

    The words wanted are the prompt's target if that is a string, else its text; none is NaN. `model` is any recogniser of
    transformers, CTC or sequence to sequence; `generate` are options of the latter's search, which is greedy (such as
    language = "en"). `longest` is what the model hears at once: 30 s of Whisper. Counted by jiwer.
    """
    transcribe, rate = recogniser(model, revision, dict(generate or {}), dtype, device)

    def judge(clips: Clips) -> Tensor:
        wanted = [prompt.target if isinstance(prompt.target, str) else prompt.text for prompt in clips.prompts]
        pairs = zip(transcribe(clips.audio), wanted, strict=True)
        errors = torch.tensor([error_rate(heard, right, unit) for heard, right in pairs])
        return (-errors).exp() if form == "exponential" else 1 - errors.clamp(max=1)

    return reward_of(judge, rate, paired=False, batch=batch, shortest=shortest, longest=longest)


Transcriber = Callable[[Sequence[Signal]], list[str]]


def recogniser(
    model: str, revision: str, generate: Mapping[str, Any], dtype: Precision, device: str
) -> tuple[Transcriber, int]:
    """From recordings of equal length to texts, and the rate it hears; raises ValueError for a model that is none."""
    config = AutoConfig.from_pretrained(model, revision=revision)
    searched = type(config) in MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    if not searched and type(config) not in MODEL_FOR_CTC_MAPPING:
        raise ValueError(f"model {model!r} is a {config.model_type}; expected a model of speech recognition")
    if generate and not searched:
        raise ValueError(f"generate is {dict(generate)}; expected nothing, for {model!r} is a CTC model")
    network = load(AutoModelForSpeechSeq2Seq if searched else AutoModelForCTC, model, revision, dtype, device)
    processor = AutoProcessor.from_pretrained(model, revision=revision)
    extract = processor.feature_extractor

    def transcribe(clips: Sequence[Signal]) -> list[str]:
        given = inputs(extract, clips, extract.sampling_rate, network)
        if searched:
            tokens = network.generate(**given, **{"do_sample": False, "num_beams": 1, **generate})  # (b, length)
        else:
            tokens = network(**given).logits.argmax(-1)  # (b, T)
        texts: list[str] = processor.batch_decode(tokens, skip_special_tokens=True)
        return texts

    return transcribe, extract.sampling_rate


# ---- what a model hears


class BertScore(NamedTuple):
    """How near two sequences of features are, frame by frame, in any order; each in [-1, 1]."""

    precision: Tensor
    recall: Tensor
    f1: Tensor


def bert_score(generated: Tensor, reference: Tensor) -> BertScore:
    """Mean over frames of the largest cosine in the other sequence; (n, D), (m, D) -> three ().

    Source: Saeki et al. 2024 (SpeechBERTScore, arXiv 2401.16812), eq. 1; recall and F1 as in BERTScore (arXiv 1904.09675).
    """
    cosine = normalize(generated.float(), dim=-1) @ normalize(reference.float(), dim=-1).T  # (n, m)
    precision, recall = cosine.amax(1).mean(), cosine.amax(0).mean()
    return BertScore(precision, recall, 2 * precision * recall / (precision + recall))


def speech_bert_score(
    *,
    model: str,
    layer: int,
    part: Literal["precision", "recall", "f1"] = "precision",
    revision: str = "main",
    dtype: Precision = "float32",
    device: str = "cpu",
    batch: int = 16,
    shortest: float = 0.1,
    longest: float = 60.0,
) -> SpeechReward:
    """`bert_score` of the features of one layer of a speech encoder, such as WavLM or HuBERT; (B,), about 0.5 to 1.

    `layer` counts from 1, 0 is the input of the first. The paper's scores use precision.
    """
    network = load(AutoModel, model, revision, dtype, device)
    layers = network.config.num_hidden_layers
    if not 0 <= layer <= layers:
        raise ValueError(f"layer is {layer}; expected 0 to {layers}, those of {model!r}")
    extract = AutoFeatureExtractor.from_pretrained(model, revision=revision)
    rate = extract.sampling_rate

    def judge(clips: Clips) -> Tensor:
        one, other = (
            network(**inputs(extract, side, rate, network), output_hidden_states=True).hidden_states[layer]  # (b, T, D)
            for side in (clips.audio, clips.reference)
        )
        scores = [bert_score(*pair) for pair in zip(one, other, strict=True)]
        return torch.stack([score._asdict()[part] for score in scores])

    return reward_of(judge, rate, paired=True, batch=batch, shortest=shortest, longest=longest)
