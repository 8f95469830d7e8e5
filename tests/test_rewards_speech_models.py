"""Rewards of speech by models: worked numbers, and tiny models of random or chosen weights that are made here."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jiwer
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import (
    BertConfig,
    GenerationConfig,
    Wav2Vec2Config,
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    Wav2Vec2Processor,
    WavLMConfig,
    WavLMForXVector,
    WavLMModel,
    WhisperConfig,
    WhisperFeatureExtractor,
    WhisperForConditionalGeneration,
    WhisperProcessor,
    WhisperTokenizer,
)

from mmgrpo.components import build
from mmgrpo.types import Batch, Prompt, Samples
from rewards.speech_models import (
    bert_score,
    by_length,
    error_rate,
    recognition,
    speaker_similarity,
    speech_bert_score,
    spoken_form,
)

NAN, RATE = float("nan"), 16_000
SMALL = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16,
    "conv_dim": (8, 8), "conv_stride": (20, 16), "conv_kernel": (25, 16), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An x-vector model; its first group norm makes it hear padding."""
    folder = tmp_path_factory.mktemp("speaker")
    torch.manual_seed(0)
    heads = {"tdnn_dim": (8, 8), "tdnn_kernel": (3, 1), "tdnn_dilation": (1, 1), "xvector_output_dim": 8}
    WavLMForXVector(WavLMConfig(**SMALL, **heads)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def speller(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CTC model of random weights."""
    folder = tmp_path_factory.mktemp("speller")
    words = {"<pad>": 0, "|": 1, "<unk>": 2} | {letter: 3 + place for place, letter in enumerate(LETTERS)}
    (folder / "words.json").write_text(json.dumps(words))
    torch.manual_seed(0)
    model = Wav2Vec2ForCTC(Wav2Vec2Config(**SMALL, vocab_size=len(words), pad_token_id=0))
    model.save_pretrained(folder)
    tokenizer = Wav2Vec2CTCTokenizer(str(folder / "words.json"), pad_token="<pad>", unk_token="<unk>")
    Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), tokenizer).save_pretrained(folder)
    return str(folder)


def always(speller: str, folder: Path, token: int) -> str:
    """The speller, made to say one token whatever it hears."""
    model = Wav2Vec2ForCTC.from_pretrained(speller)
    torch.nn.init.zeros_(model.lm_head.weight)
    torch.nn.init.zeros_(model.lm_head.bias)
    model.lm_head.bias.data[token] = 1
    model.save_pretrained(folder)
    Wav2Vec2Processor.from_pretrained(speller).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("whisper")
    special = ["<|endoftext|>", "<|startoftranscript|>", "<|notimestamps|>"]
    words = {token: place for place, token in enumerate([*LETTERS, "Ġ", *special])}
    end, begin, plain = (words[token] for token in special)
    tokenizer = WhisperTokenizer(vocab=words, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:]})
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, "max_target_positions": 16}
    marks = {"pad_token_id": end, "bos_token_id": end, "eos_token_id": end, "decoder_start_token_id": begin}
    torch.manual_seed(0)
    model = WhisperForConditionalGeneration(WhisperConfig(vocab_size=len(words), **layers, **sizes, **marks))
    model.generation_config = GenerationConfig(
        max_length=8, is_multilingual=False, no_timestamps_token_id=plain, **marks
    )
    model.save_pretrained(folder)
    WhisperProcessor(WhisperFeatureExtractor(feature_size=8), tokenizer).save_pretrained(folder)
    return str(folder)


def noise(*sizes: float, seed: int = 0) -> Tensor:
    return 0.1 * torch.randn(sizes, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]


def heard(audio: Tensor, reference: Tensor | None = None, *texts: str, target: object = None) -> Samples:
    ids = torch.arange(len(audio))
    prompts = tuple(Prompt(row, texts[row] if texts else "", target=target) for row in range(len(audio)))
    clean = None if reference is None else reference[:, None]
    return Samples(
        Batch(prompts, ids, ids, seed=0, iteration=0), audio=audio[:, None], rate=RATE, reference_audio=clean
    )


def same(values: object, expected: Sequence[float], within: float = 1e-6) -> None:
    assert isinstance(values, Tensor) and values.dtype == torch.float32
    wanted = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(values, wanted, rtol=0, atol=within, equal_nan=True)


# ---- what a model hears


def test_the_bert_score_has_the_worked_values():
    score = bert_score(torch.tensor([[1, 0], [0.8, 0.6]]), torch.tensor([[1, 0], [0, 1], [0.6, 0.8]]))
    same(score.precision, 0.98)  # type: ignore[arg-type]
    same(score.recall, 0.853333)  # type: ignore[arg-type]
    same(score.f1, 2 * 0.98 * 0.853333 / (0.98 + 0.853333))  # type: ignore[arg-type]


def test_the_bert_score_does_not_know_order_or_length_of_features():
    one, other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    plain = bert_score(one, other)
    torch.testing.assert_close(bert_score(3 * one.flip(0), other), plain)
    swapped = bert_score(other, one)
    torch.testing.assert_close((swapped.recall, swapped.precision), (plain.precision, plain.recall))


def test_speech_bert_score_is_that_of_the_layer_asked_for(speaker: str):
    audio, reference = noise(2, 6_000), noise(2, 6_000, seed=1)
    network, extract = WavLMModel.from_pretrained(speaker).eval(), Wav2Vec2FeatureExtractor.from_pretrained(speaker)
    with torch.no_grad():
        one, other = (
            network(**extract(list(x.numpy()), sampling_rate=RATE, return_tensors="pt"), output_hidden_states=True)
            for x in (audio, reference)
        )
    for layer in (0, 1, 2):
        expected = [
            bert_score(*pair) for pair in zip(one.hidden_states[layer], other.hidden_states[layer], strict=True)
        ]
        for part in ("precision", "recall", "f1"):
            reward = speech_bert_score(model=speaker, layer=layer, part=part)  # type: ignore[arg-type]
            same(reward(heard(audio, reference)), [float(score._asdict()[part]) for score in expected], 1e-5)
    same(speech_bert_score(model=speaker, layer=2)(heard(audio, audio)), [1.0, 1.0], 1e-5)


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_the_model_has_not_is_refused(speaker: str, layer: int):
    with pytest.raises(ValueError, match=f"layer is {layer}; expected 0 to 2, those of "):
        speech_bert_score(model=speaker, layer=layer)


# ---- the speaker


def test_speaker_similarity_is_the_cosine_of_the_embeddings_or_its_image_in_0_to_1(speaker: str):
    audio, reference = noise(3, 8_000), noise(3, 8_000, seed=1)
    reference[2] = audio[2]
    network, extract = (
        WavLMForXVector.from_pretrained(speaker).eval(),
        Wav2Vec2FeatureExtractor.from_pretrained(speaker),
    )
    with torch.no_grad():
        one, other = (
            network(**extract(list(x.numpy()), sampling_rate=RATE, return_tensors="pt")).embeddings
            for x in (audio, reference)
        )
    expected = cosine_similarity(one, other)
    same(speaker_similarity(model=speaker)(heard(audio, reference)), expected.tolist(), 1e-5)
    same(speaker_similarity(model=speaker, mapped=True)(heard(audio, reference)), ((1 + expected) / 2).tolist(), 1e-5)
    assert expected[2] == pytest.approx(1, abs=1e-5)


def test_similarity_without_a_reference_is_refused(speaker: str):
    with pytest.raises(ValueError, match="the samples carry no reference_audio"):
        speaker_similarity(model=speaker)(heard(noise(1, 8_000)))


# ---- the words


@pytest.mark.parametrize(
    ("heard_as", "wanted", "unit", "rate"),
    [
        ("the cat sat on mat", "the cat sat on the mat", "word", 1 / 6),
        ("The cat, sat on the MAT!", "the cat sat on the mat", "word", 0),
        ("one two three four five six seven", "the cat sat on the mat", "word", 7 / 6),
        ("", "the cat", "word", 1),
        (" ... ", "the cat", "word", 1),
        ("", "the cat", "character", 1),
        ("cats", "cat", "character", 1 / 3),
        ("don’t", "don't", "word", 0),
        ("'cat'", "cat", "word", 0),
        ("well-known", "well known", "word", 0),
        ("ÉTÉ", "été", "word", 0),
        ("हिन्दी", "हिन्दी।", "word", 0),  # marks belong to their letters
    ],
)
def test_error_rates_are_those_counted_by_hand(heard_as: str, wanted: str, unit: str, rate: float):
    assert error_rate(heard_as, wanted, unit) == pytest.approx(rate, abs=1e-9)  # type: ignore[arg-type]


def test_nothing_wanted_is_no_opinion():
    assert math.isnan(error_rate("a cat", "?!", "word")) and math.isnan(error_rate("", "", "character"))


def test_the_spoken_form_has_words_and_single_blanks_alone():
    assert spoken_form("  Hello,\n“World” — it's 3 o’clock… ") == "hello world it's 3 o'clock"


def test_a_recogniser_is_scored_by_the_words_it_hears(speller: str, tmp_path: Path):
    letter = always(speller, tmp_path / "letter", 3)  # "a", however often
    audio = noise(5, 4_000)
    batch = heard(audio, None, "A.", "a b", "b", "", "one two")
    same(recognition(model=letter)(batch), [1, 0.5, 0, NAN, 0])
    same(recognition(model=letter, unit="character")(batch), [1, 1 / 3, 0, NAN, 0])
    same(recognition(model=letter, form="exponential")(batch), [1, math.exp(-0.5), math.exp(-1), NAN, math.exp(-1)])
    same(recognition(model=letter)(heard(audio[:2], None, "x", "y", target="a")), [1, 1])  # a target goes first
    same(recognition(model=letter)(heard(audio[:2], None, "a", "y", target=7)), [1, 0])  # of another reward


def test_a_recogniser_that_hears_nothing_makes_every_word_an_error(speller: str, tmp_path: Path):
    deaf = always(speller, tmp_path / "deaf", 0)
    same(recognition(model=deaf)(heard(noise(1, 4_000), None, "a b")), [0.0])


def test_a_model_that_searches_its_words_is_asked_to_search(whisper: str):
    audio = noise(2, 8_000)
    processor, network = (
        WhisperProcessor.from_pretrained(whisper),
        WhisperForConditionalGeneration.from_pretrained(whisper),
    )
    features = processor(list(audio.numpy()), sampling_rate=RATE, return_tensors="pt").input_features
    texts = processor.batch_decode(network.eval().generate(features), skip_special_tokens=True)
    assert all(texts)
    reward = recognition(model=whisper, unit="character")
    same(reward(heard(audio, None, *texts)), [1, 1])
    expected = [1 - min(jiwer.cer("q" + text, text), 1) for text in texts]
    same(reward(heard(audio, None, *("q" + text for text in texts))), expected, 1e-3)
    short = recognition(model=whisper, unit="character", generate={"max_new_tokens": 1})
    same(short(heard(audio, None, *(text[0] for text in texts))), [1, 1])


def test_a_model_that_recognises_nothing_and_options_of_a_search_it_does_not_make_are_refused(
    speller: str, tmp_path: Path
):
    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a bert; expected a model of speech recognition"):
        recognition(model=str(tmp_path))
    with pytest.raises(ValueError, match=r"generate is \{'num_beams': 2\}; expected nothing, for .* is a CTC model"):
        recognition(model=speller, generate={"num_beams": 2})


# ---- the walk over a batch


def test_rows_of_equal_length_come_together_each_once():
    parts = list(by_length({0: 5, 1: 3, 2: 5, 4: 5, 7: 3}, 2))
    assert sorted(map(sorted, parts)) == [[0, 2], [1, 7], [4]]


def rewards_of(speaker: str, batch: int):
    return {
        "speaker": speaker_similarity(model=speaker, batch=batch),
        "bert": speech_bert_score(model=speaker, layer=2, batch=batch),
    }


def test_a_score_depends_neither_on_neighbours_nor_on_what_lies_behind_the_length(speaker: str):
    sizes = [8_000, 7_000, 8_000, 9_999]
    audio, reference = noise(4, 9_999), noise(4, 9_999, seed=1)
    batch = replace(heard(audio, reference), audio_length=torch.tensor(sizes))
    for name, reward in rewards_of(speaker, 16).items():
        alone = [
            float(reward(heard(audio[row : row + 1, :size], reference[row : row + 1, :size])))
            for row, size in enumerate(sizes)
        ]
        same(reward(batch), alone, 1e-5)
        same(rewards_of(speaker, 1)[name](batch), alone, 1e-5)
        order = torch.tensor([3, 1, 0, 2])
        same(reward(batch.take(order)), [alone[row] for row in order], 1e-5)


def test_another_rate_is_resampled(speaker: str):
    t = torch.arange(24_000) / 48_000
    audio = torch.stack([torch.sin(2 * math.pi * f * t) + 0.1 * torch.sin(2 * math.pi * 3 * f * t) for f in (200, 440)])
    high = replace(heard(audio, audio.flip(0)), rate=48_000)
    low = heard(
        audio[:, ::3].contiguous(), audio.flip(0)[:, ::3].contiguous()
    )  # nothing above 1.4 kHz: no filter needed
    for reward in rewards_of(speaker, 16).values():
        same(reward(high), reward(low).tolist(), 0.02)


def test_silence_and_what_is_broken_too_short_or_too_long_are_nan(speaker: str, speller: str):
    audio, reference = noise(6, 16_000), noise(6, 16_000, seed=1)
    audio[0], reference[1], audio[2, 3] = 0, 0, float("inf")
    batch = replace(heard(audio, reference, *["a"] * 6), audio_length=torch.tensor([16_000] * 4 + [0, 1]))
    for reward in rewards_of(speaker, 16).values():
        assert reward(batch).isnan().tolist() == [True, True, True, False, True, True]
    assert recognition(model=speller)(batch).isnan().tolist() == [True, False, True, False, True, True]
    brief = speaker_similarity(model=speaker, shortest=0.4, longest=0.9)
    assert brief(heard(audio[3:4, :6_399], reference[3:4, :6_399])).isnan().all()
    assert brief(heard(audio[3:4, :6_400], reference[3:4, :6_400])).isfinite().all()
    assert brief(heard(audio[3:4], reference[3:4])).isnan().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch is 0; expected at least 1"),
        ({"shortest": 2.0, "longest": 1.0}, "shortest is 2.0 and longest 1.0 s; expected 0 <= shortest < longest"),
        ({"dtype": "int8"}, "dtype is 'int8'; expected one of float32, bfloat16, float16"),
    ],
)
def test_options_that_make_no_sense_are_refused(speaker: str, options: dict[str, object], message: str):
    with pytest.raises(ValueError, match=message):
        speaker_similarity(model=speaker, **options)  # type: ignore[arg-type]


def test_a_recipes_table_builds_a_recogniser_at_half_precision(speller: str):
    table = {"build": "rewards.speech_models:recognition", "model": speller, "dtype": "bfloat16", "unit": "character"}
    value = build(table, "rewards.words")(heard(noise(1, 4_000), None, "a cat"))
    assert 0 <= float(value) <= 1
