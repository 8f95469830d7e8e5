"""Text to audio by way of a language model."""

from diffusers import (
    AudioLDM2Pipeline,
    AudioLDM2ProjectionModel,
    AudioLDM2UNet2DConditionModel,
    AutoencoderKL,
    DDIMScheduler,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    ClapConfig,
    ClapFeatureExtractor,
    ClapModel,
    GPT2Config,
    GPT2LMHeadModel,
    RobertaTokenizer,
    SpeechT5HifiGan,
    SpeechT5HifiGanConfig,
)

from .parts import WIDTH, fresh, t5, t5_tokenizer
from .unet import VP


def clap() -> ClapModel:
    text = {
        "vocab_size": 300,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 80,
        "projection_dim": WIDTH,
        "pad_token_id": 1,
    }
    sound = {
        "spec_size": 64,
        "window_size": 4,
        "num_mel_bins": 64,
        "depths": [2, 2],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "projection_dim": WIDTH,
        "patch_embeds_hidden_size": 16,
    }
    return fresh(ClapModel, ClapConfig(text_config=text, audio_config=sound, projection_dim=WIDTH))


def letters() -> RobertaTokenizer:
    pieces = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet())]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    return RobertaTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def audio_ldm2() -> AudioLDM2Pipeline:
    """A language model continues the text's embeddings before the loop, with its cache; 16 kHz from a mel spectrogram."""
    unet = fresh(
        AudioLDM2UNet2DConditionModel,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=((None, 16, WIDTH),) * 2,
        attention_head_dim=4,
    )
    vae = fresh(
        AutoencoderKL,
        block_out_channels=(8, 8),
        in_channels=1,
        out_channels=1,
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        scaling_factor=0.5,
    )
    tokenizer = t5_tokenizer()
    tokenizer.model_max_length = 48
    language = GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=64, n_positions=200, bos_token_id=0, eos_token_id=0
    )
    language.max_new_tokens = 4
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        sampling_rate=16000,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3, 5], [1, 3, 5]],
        normalize_before=False,
    )
    return AudioLDM2Pipeline(
        unet=unet,
        scheduler=DDIMScheduler(**VP, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        vae=vae,
        text_encoder=clap(),
        tokenizer=letters(),
        text_encoder_2=t5(),
        tokenizer_2=tokenizer,
        feature_extractor=ClapFeatureExtractor(feature_size=8, hop_length=480),
        projection_model=fresh(
            AudioLDM2ProjectionModel, text_encoder_dim=WIDTH, text_encoder_1_dim=WIDTH, langauge_model_dim=16
        ),
        language_model=fresh(GPT2LMHeadModel, language),
        vocoder=fresh(SpeechT5HifiGan, vocoder),
    )
