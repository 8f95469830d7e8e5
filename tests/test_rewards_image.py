"""Image rewards on tiny random models, against their formulas written out here."""

import json
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy
import open_clip  # type: ignore[import-untyped]
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import gelu, layer_norm
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from mmgrpo.types import Batch, Prompt, Samples
from rewards.image import (
    FORMS,
    aesthetic,
    clip_score,
    jpeg_compressibility,
    jpeg_incompressibility,
    pick_score,
)
from rewards.image_reward import image_reward
from rewards.pictures import PictureReward, to_uint8

MEAN, STD = numpy.array([0.48145466, 0.4578275, 0.40821073]), numpy.array([0.26862954, 0.26130258, 0.27577711])
TEXTS = ("a red cat", "two blue dogs", "cat " * 100, "a house")  # the third is longer than 77 tokens
SIZE = 32  # pixels a side that the tiny models look at
MODELS = ["pick_score", "aesthetic", "clip_score", "image_reward"]
Build = Callable[..., PictureReward]


def samples(image: Tensor | None, texts: tuple[str, ...] = TEXTS) -> Samples:
    prompts = tuple(Prompt(index, text) for index, text in enumerate(texts))
    ids = torch.arange(len(texts))
    return Samples(Batch(prompts, ids, ids, seed=0, iteration=0), image=image)


def random_images(height: int = 40, width: int = 56) -> Tensor:
    """Four images that differ in brightness and detail; (4, 3, H, W) in [0, 1]."""
    noise = torch.rand(4, 3, height, width, generator=torch.Generator().manual_seed(0))
    return noise * torch.tensor([1.0, 0.6, 0.3, 0.1])[:, None, None, None]


def pixels_by_hand(image: Tensor) -> Tensor:
    """Round to 8 bits, resize the shorter side, crop the centre, standardise; (3, H, W) -> (1, 3, SIZE, SIZE)."""
    picture = Image.fromarray(numpy.rint(image.permute(1, 2, 0).numpy() * 255).astype("uint8"))
    short = min(picture.size)
    picture = picture.resize([int(side * SIZE / short) for side in picture.size], Image.Resampling.BICUBIC)
    left, top = ((side - SIZE) // 2 for side in picture.size)
    cropped = numpy.array(picture.crop((left, top, left + SIZE, top + SIZE)))
    return torch.from_numpy((cropped / 255 - MEAN) / STD).permute(2, 0, 1)[None].float()


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny random CLIP model with its tokenizer and image processor, as transformers saves them."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = size | {"vocab_size": 54, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    vision = size | {"image_size": SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)  # far enough from the initial values to tell images apart
    model.save_pretrained(folder)
    pieces = [letter + end for letter in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    vocabulary = {piece: index for index, piece in enumerate(["<|startoftext|>", "<|endoftext|>", *pieces])}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random aesthetic head for 8 features, with the published names."""
    widths = {0: (8, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    generator, weights = torch.Generator().manual_seed(1), {}
    for index, (wide_in, wide_out) in widths.items():
        weights[f"layers.{index}.weight"] = torch.randn(wide_out, wide_in, generator=generator) / wide_in**0.5
        weights[f"layers.{index}.bias"] = torch.randn(wide_out, generator=generator)
    file = str(tmp_path_factory.mktemp("head") / "head.safetensors")
    save_file(weights, file)
    return file


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random open_clip model as a folder, and its configuration registered under the name tiny-clip."""
    folder = tmp_path_factory.mktemp("open_clip")
    torch.manual_seed(2)
    vision = {"image_size": SIZE, "layers": 2, "width": 16, "head_width": 8, "patch_size": 8}
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
    config = {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    (folder.parent / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder.parent / "tiny-clip.json")
    model = open_clip.create_model("tiny-clip")
    weights = {name: value + 0.2 * torch.randn_like(value) for name, value in model.state_dict().items()}
    save_file(weights, str(folder / "open_clip_model.safetensors"))
    return folder


@pytest.fixture(scope="module")
def blip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of a tiny ImageReward under the published names, and a tokenizer of letters."""
    folder, generator = tmp_path_factory.mktemp("blip"), torch.Generator().manual_seed(3)
    seen, read, inner, words = 128, 64, 96, 31  # widths: image features, text features, hidden layers; vocabulary
    shapes: dict[str, tuple[int, ...]] = {"cls_token": (1, 1, seen), "pos_embed": (1, 17, seen)}
    shapes |= {"patch_embed.proj.weight": (seen, 3, 8, 8), "patch_embed.proj.bias": (seen,)}
    shapes |= norm("norm", seen)
    for block in ("blocks.0.", "blocks.1."):
        shapes |= norm(block + "norm1", seen) | norm(block + "norm2", seen)
        shapes |= linear(block + "attn.qkv", seen, 3 * seen) | linear(block + "attn.proj", seen, seen)
        shapes |= linear(block + "mlp.fc1", seen, inner) | linear(block + "mlp.fc2", inner, seen)
    shapes = {f"blip.visual_encoder.{name}": shape for name, shape in shapes.items()}
    text: dict[str, tuple[int, ...]] = {
        "word_embeddings.weight": (words, read),
        "position_embeddings.weight": (40, read),
    }
    text = {f"embeddings.{name}": shape for name, shape in (text | norm("LayerNorm", read)).items()}
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        for attention, width in (("attention", read), ("crossattention", seen)):
            for part, wide in (("query", read), ("key", width), ("value", width)):
                text |= linear(f"{layer}{attention}.self.{part}", wide, read)
            text |= linear(f"{layer}{attention}.output.dense", read, read)
            text |= norm(f"{layer}{attention}.output.LayerNorm", read)
        text |= linear(layer + "intermediate.dense", read, inner) | linear(layer + "output.dense", inner, read)
        text |= norm(layer + "output.LayerNorm", read)
    shapes |= {f"blip.text_encoder.{name}": shape for name, shape in text.items()}
    for index, wide_in, wide_out in ((0, read, 32), (2, 32, 16), (4, 16, 8), (6, 8, 4), (7, 4, 1)):
        shapes |= linear(f"mlp.layers.{index}", wide_in, wide_out)
    shapes |= linear("blip.text_proj", read, 8)  # in the published file, unused
    weights = {name: torch.randn(shape, generator=generator) / shape[-1] ** 0.5 for name, shape in shapes.items()}
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(40)[None]
    save_file(weights, str(folder / "weights.safetensors"))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    BertTokenizer(vocab={piece: index for index, piece in enumerate(pieces)}).save_pretrained(folder)
    return folder


def linear(name: str, wide_in: int, wide_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (wide_out, wide_in), f"{name}.bias": (wide_out,)}


def norm(name: str, width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


@pytest.fixture(params=[*MODELS, "jpeg_incompressibility", "jpeg_compressibility"])
def reward(request: pytest.FixtureRequest, builders: dict[str, Build]) -> PictureReward:
    jpeg = {"jpeg_incompressibility": jpeg_incompressibility, "jpeg_compressibility": jpeg_compressibility}
    return jpeg[request.param] if request.param in jpeg else builders[request.param]()


@pytest.fixture(scope="module")
def builders(clip_folder: str, head_file: str, open_clip_folder: Path, blip_folder: Path) -> dict[str, Build]:
    return {
        "pick_score": partial(pick_score, model=clip_folder, processor=clip_folder),
        "aesthetic": partial(aesthetic, clip=clip_folder, head=head_file),
        "clip_score": partial(clip_score, model=f"local-dir:{open_clip_folder}", pretrained=None),
        "image_reward": partial(
            image_reward, checkpoint=str(blip_folder / "weights.safetensors"), tokenizer=str(blip_folder)
        ),
    }


# --- every reward -----------------------------------------------------------------------------------------------------


def test_permuting_the_samples_permutes_the_scores(reward: PictureReward):
    batch, order = samples(random_images()), torch.tensor([3, 1, 0, 2])
    scores = reward(batch)
    assert scores.dtype == torch.float32
    assert scores.unique().numel() == 4  # a constant would pass the next line
    torch.testing.assert_close(reward(batch.take(order)), scores[order], rtol=1e-5, atol=1e-6)


def test_a_broken_image_is_nan_and_leaves_the_other_scores_alone(reward: PictureReward):
    image = random_images()
    whole = reward(samples(image))
    broken = image.clone()
    broken[1, 0, 0, 0] = torch.nan
    broken[3, 2, 5, 5] = torch.inf
    scores = reward(samples(broken))
    assert scores.isnan().tolist() == [False, True, False, True]
    torch.testing.assert_close(scores[[0, 2]], whole[[0, 2]], rtol=1e-5, atol=1e-6)


def test_all_broken_images_are_all_nan(reward: PictureReward):
    assert reward(samples(torch.full((4, 3, 8, 8), torch.nan))).isnan().all()


def test_images_in_another_range_or_missing_are_refused(reward: PictureReward):
    with pytest.raises(ValueError, match=r"values from -1 to .*; expected \[0, 1\]"):
        reward(samples(2 * (random_images() - random_images().amin()) - 1))
    with pytest.raises(ValueError, match="carry no image"):
        reward(samples(None))
    with pytest.raises(ValueError, match=r"image has shape \(4, 1, 8, 8\)"):
        reward(samples(torch.zeros(4, 1, 8, 8)))


@pytest.mark.parametrize("name", MODELS)
def test_splitting_the_batch_changes_no_score(name: str, builders: dict[str, Build]):
    batch = samples(random_images())
    torch.testing.assert_close(builders[name](batch=3)(batch), builders[name]()(batch), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_gives_float32_scores_near_those_of_float32(name: str, builders: dict[str, Build]):
    batch = samples(random_images())
    exact, rounded = builders[name]()(batch), builders[name](dtype="bfloat16")(batch)
    assert rounded.dtype == torch.float32
    assert not torch.equal(rounded, exact)  # the model really computes in bfloat16
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_builders_take_options_by_name_only_and_refuse_an_unknown_dtype(name: str, builders: dict[str, Build]):
    with pytest.raises(TypeError, match="positional"):
        builders[name]("ViT-L-14")
    with pytest.raises(ValueError, match="dtype is 'float8'; expected one of float32, bfloat16, float16"):
        builders[name](dtype="float8")


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_no_pictures_is_refused(name: str, builders: dict[str, Build]):
    with pytest.raises(ValueError, match="batch is 0; expected at least 1"):
        builders[name](batch=0)(samples(random_images()))


# --- each formula -----------------------------------------------------------------------------------------------------


def clip_image(clip: CLIPModel, image: Tensor) -> Tensor:
    return clip.vision_model(pixel_values=pixels_by_hand(image)).pooler_output @ clip.visual_projection.weight.T


def clip_text(clip: CLIPModel, text: str) -> Tensor:
    """The state above the end token, unpadded: start, letters (the last of a word closes it), end; at most 77 tokens."""
    letters = [(word[at], at == len(word) - 1) for word in text.split() for at in range(len(word))]
    tokens = [2 + 2 * (ord(letter) - ord("a")) + last for letter, last in letters]
    states = clip.text_model(input_ids=torch.tensor([[0, *tokens[:75], 1]])).last_hidden_state
    return states[:, -1] @ clip.text_projection.weight.T


@torch.no_grad()
def test_pick_score_is_the_scaled_cosine_over_26(builders: dict[str, Build], clip_folder: str):
    clip, image = CLIPModel.from_pretrained(clip_folder).eval(), random_images()
    cosines = [cosine(clip_image(clip, row), clip_text(clip, text)) for row, text in zip(image, TEXTS, strict=True)]
    expected = clip.logit_scale.exp() * torch.tensor(cosines) / 26
    torch.testing.assert_close(builders["pick_score"]()(samples(image)), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_aesthetic_score_is_five_linear_maps_of_the_normalised_embedding(
    builders: dict[str, Build], clip_folder: str, head_file: str
):
    clip, image, head = CLIPModel.from_pretrained(clip_folder).eval(), random_images(), load_file(head_file)
    expected = []
    for row in image:
        state = clip_image(clip, row)[0].double()
        state = state / state.norm()
        for index in (0, 2, 4, 6, 7):
            state = head[f"layers.{index}.weight"].double() @ state + head[f"layers.{index}.bias"].double()
        expected.append(state.item())
    torch.testing.assert_close(builders["aesthetic"]()(samples(image)), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention in heads of 64 features; (n, D), (m, D), (m, D) -> (n, D)."""
    heads = [part.split(64, dim=1) for part in (query, key, value)]
    return torch.cat([(q @ k.T / 8).softmax(1) @ v for q, k, v in zip(*heads, strict=True)], dim=1)


def image_reward_by_hand(weights: dict[str, Tensor], image: Tensor, text: str) -> float:
    """ImageReward of one image and one text, unpadded, from the published code's equations in float64."""
    named = {name: value.double() if value.is_floating_point() else value for name, value in weights.items()}

    def layer(name: str, x: Tensor) -> Tensor:
        return x @ named[f"{name}.weight"].T + named[f"{name}.bias"]

    def normed(name: str, x: Tensor, eps: float) -> Tensor:
        return layer_norm(x, x.shape[-1:], named[f"{name}.weight"], named[f"{name}.bias"], eps)

    eye = "blip.visual_encoder."
    patches = pixels_by_hand(image).double().unfold(2, 8, 8).unfold(3, 8, 8)  # (1, 3, 4, 4, 8, 8)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(16, -1)
    x = patches @ named[eye + "patch_embed.proj.weight"].flatten(1).T + named[eye + "patch_embed.proj.bias"]
    x = torch.cat([named[eye + "cls_token"][0], x]) + named[eye + "pos_embed"][0]
    for block in (eye + "blocks.0.", eye + "blocks.1."):
        qkv = layer(block + "attn.qkv", normed(block + "norm1", x, 1e-6))
        x = x + layer(block + "attn.proj", attend(*qkv.chunk(3, dim=1)))
        x = x + layer(block + "mlp.fc2", gelu(layer(block + "mlp.fc1", normed(block + "norm2", x, 1e-6))))
    x = normed(eye + "norm", x, 1e-6)

    voice = "blip.text_encoder."
    known = [5 + ord(word) - ord("a") if len(word) == 1 else 1 for word in text.split()]  # longer words are unknown
    tokens = [2, *known[:33], 3]
    y = named[voice + "embeddings.word_embeddings.weight"][tokens]
    y = y + named[voice + "embeddings.position_embeddings.weight"][: len(tokens)]
    y = normed(voice + "embeddings.LayerNorm", y, 1e-12)
    for block in (voice + "encoder.layer.0.", voice + "encoder.layer.1."):
        for attention in ("attention", "crossattention"):
            source, name = (y if attention == "attention" else x), block + attention
            states = attend(
                layer(name + ".self.query", y), *(layer(f"{name}.self.{p}", source) for p in ("key", "value"))
            )
            y = normed(name + ".output.LayerNorm", layer(name + ".output.dense", states) + y, 1e-12)
        hidden = gelu(layer(block + "intermediate.dense", y))
        y = normed(block + "output.LayerNorm", layer(block + "output.dense", hidden) + y, 1e-12)
    score = y[0]
    for index in (0, 2, 4, 6, 7):
        score = layer(f"mlp.layers.{index}", score)
    return (score.item() - 0.16717362830052426) / 1.0333394966054072


def test_image_reward_is_the_published_network_written_out(builders: dict[str, Build], blip_folder: Path):
    weights, image = load_file(blip_folder / "weights.safetensors"), random_images()
    texts = ("a b", "c word d", "e f " * 40, "g")  # the third is longer than 35 tokens
    expected = [image_reward_by_hand(weights, row, text) for row, text in zip(image, texts, strict=True)]
    scores = builders["image_reward"]()(samples(image, texts))
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_an_aesthetic_head_with_other_names_is_refused(clip_folder: str, tmp_path: Path):
    save_file({"layers.0.weight": torch.zeros(1, 8)}, tmp_path / "head.safetensors")
    with pytest.raises(ValueError, match=r"holds \['layers.0.weight'\]; expected"):
        aesthetic(clip=clip_folder, head=str(tmp_path / "head.safetensors"))


FORMULAS = {
    "cosine": lambda c: c,
    "original": lambda c: 2.5 * max(c, 0),
    "torchmetrics": lambda c: max(100 * c, 0),
    "grpo": lambda c: 100 * c / 30,
}


@torch.no_grad()
@pytest.mark.parametrize("form", FORMULAS)
def test_clip_score_is_the_named_function_of_the_cosine(form: str, builders: dict[str, Build], open_clip_folder: Path):
    clip, image = open_clip.create_model(f"local-dir:{open_clip_folder}").eval(), random_images()
    tokens = open_clip.tokenize(list(TEXTS))
    pairs = [clip(image=pixels_by_hand(row), text=token[None])[:2] for row, token in zip(image, tokens, strict=True)]
    cosines = [cosine(*pair) for pair in pairs]
    assert min(cosines) < 0 < max(cosines)  # so that flooring at 0 is seen
    expected = torch.tensor([FORMULAS[form](value) for value in cosines])
    torch.testing.assert_close(builders["clip_score"](form=form)(samples(image)), expected, rtol=1e-4, atol=1e-4)


def test_the_worked_example_of_clip_score_has_its_three_values():
    values = {name: form(torch.tensor(0.31)).item() for name, form in FORMS.items()}
    assert values == pytest.approx(
        {"cosine": 0.31, "original": 0.775, "torchmetrics": 31.0, "grpo": 1.033333}, rel=1e-5
    )


def test_a_folder_and_a_weights_file_of_open_clip_give_the_same_scores(
    builders: dict[str, Build], open_clip_folder: Path
):
    from_file = clip_score(model="tiny-clip", pretrained=str(open_clip_folder / "open_clip_model.safetensors"))
    batch = samples(random_images())
    torch.testing.assert_close(from_file(batch), builders["clip_score"]()(batch), rtol=0, atol=0)


@pytest.mark.parametrize("pretrained", ["weights.pt", "weights.bin", None, "no_such_tag"])
def test_pickled_missing_and_unknown_weights_are_refused(pretrained: str | None):
    with pytest.raises(ValueError, match="expected .*safetensors file"):
        clip_score(model="ViT-L-14", pretrained=pretrained)


def test_an_open_clip_folder_that_also_holds_pickled_weights_is_refused(open_clip_folder: Path, tmp_path: Path):
    for file in open_clip_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"expected \.safetensors files"):
        clip_score(model=f"local-dir:{tmp_path}", pretrained=None)


def test_an_unknown_form_is_refused():
    with pytest.raises(ValueError, match="form is 'raw'; expected one of cosine, original, torchmetrics, grpo"):
        clip_score(form="raw")  # type: ignore[arg-type]


def test_jpeg_rewards_are_the_file_size_in_kilobytes_and_minus_a_500th_of_it():
    image, sizes = random_images(), []
    for row in image:
        file = BytesIO()
        Image.fromarray(numpy.rint(row.permute(1, 2, 0).numpy() * 255).astype("uint8")).save(file, "JPEG", quality=95)
        sizes.append(len(file.getvalue()) / 1000)
    torch.testing.assert_close(jpeg_incompressibility(samples(image)), torch.tensor(sizes))
    torch.testing.assert_close(jpeg_compressibility(samples(image)), -torch.tensor(sizes) / 500)
    assert (jpeg_incompressibility(samples(image), quality=50) < jpeg_incompressibility(samples(image))).all()


def test_pixels_are_rounded_with_halves_to_even_and_rounding_beyond_the_range_is_cut():
    values = torch.tensor([0.5, 1.5, 2.5, 254.4, 254.6]) / 255
    image = torch.cat([values, torch.tensor([-0.0005, 1.0005])]).expand(1, 3, 1, 7)
    expected = [round(float(value * 255)) for value in values] + [0, 255]
    assert to_uint8(image)[0, 0, :, 1].tolist() == expected == [0, 2, 2, 254, 255, 0, 255]
