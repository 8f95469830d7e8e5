"""Tiny random decoders as block-diffusion policies, and the plain way to read them: one sequence at a time, no cache."""

from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mmgrpo.data import requests
from mmgrpo.types import Batch, Prompt
from pipelines.answers import Answers, Options
from pipelines.block_answers import BlockAnswers
from pipelines.block_decoding import Unmasking
from pipelines.block_lm import BlockPolicy
from pipelines.conversation import Reader, Reading
from pipelines.sampling import Sampling

WORDS = ("<pad>", "<end>", "<mask>", "<unk>", *"0123456789+= abcdef")
ENDS, MASK = (1, 7, 16), 2  # as some models have several; so that some random answers end
SIZES = {
    "vocab_size": len(WORDS), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": list(ENDS), "pad_token_id": 0,
    "initializer_range": 0.3,
}  # fmt: skip
MODELS = {
    "Qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)),
    "Qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "Llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "Qwen3 eager": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8, attn_implementation="eager")),
}
PROMPTS = [Prompt(0, "12+34=", target="4 6"), Prompt(1, "1", target="a"), Prompt(2, "abc=def 123", target="abcdef"),
           Prompt(3, "abcd", target="dcba")]  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a character."""
    letters = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    special = {"pad_token": "<pad>", "eos_token": "<end>", "mask_token": "<mask>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=letters, clean_up_tokenization_spaces=False, **special)


def policy_of(
    name: str = "Qwen3",
    *,
    most: int = 11,
    size: int = 4,
    steps: int | None = None,
    threshold: float = 0.3,
    temperature: float = 1.0,
    likelihood: Any = "block",
    likelihood_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    options: Options | None = None,
    lora: dict[str, Any] | None = None,
) -> BlockPolicy:
    """A prepared policy; equal arguments give equal weights."""
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    answers = Answers(
        model, Reader(tokenizer(), model, Reading(chat=False)), Sampling(most, temperature), options or Options()
    )
    unmasking = Unmasking(size, size if steps is None else steps, threshold)
    policy = BlockPolicy(BlockAnswers(answers, MASK, unmasking, likelihood, likelihood_size or size), lora=lora)
    policy.prepare(PROMPTS)
    return policy


def batch_of(prompts: list[Prompt] = PROMPTS, group_size: int = 3, seed: int = 0) -> Batch:
    return requests(prompts, range(len(prompts)), group_size=group_size, seed=seed, iteration=0)


@torch.no_grad()
def plainly(policy: BlockPolicy, text: list[int], masked: list[int], size: int) -> Tensor:
    """Log-probs at every place of a block's text read as a whole sequence with a mask of blocks, built place by place; (L, V)."""
    ids = torch.tensor([[MASK if place in masked else token for place, token in enumerate(text)]])
    seen = torch.tensor([[other // size <= place // size for other in range(len(text))] for place in range(len(text))])
    lowest = torch.finfo(policy.model.dtype).min
    mask = torch.zeros(1, 1, len(text), len(text), dtype=policy.model.dtype).masked_fill(~seen, lowest)
    places = torch.arange(len(text))[None]
    logits = policy.model(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits[0].float()
    logits[:, MASK] = -1e30
    return (logits / policy.blocks.answers.sampling.temperature).log_softmax(1)
