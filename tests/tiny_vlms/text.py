"""Language models without pictures: attention, a state-space model, convolutions with attention."""

from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from .parts import CHATML, DECODER, WIDTH, chat, fresh, qwen_tokenizer, vocabulary
from .record import Built, TinyVLM


def tokenizer() -> PreTrainedTokenizerFast:
    made = qwen_tokenizer()
    made.chat_template = chat(*CHATML)
    return made


def qwen3() -> Built:
    config = Qwen3Config(**DECODER, **vocabulary(tokenizer()), head_dim=16)
    return Built(fresh(Qwen3ForCausalLM, config), tokenizer())


def mamba() -> Built:
    config = MambaConfig(
        **vocabulary(tokenizer()), hidden_size=WIDTH, num_hidden_layers=2, state_size=8, time_step_rank=4
    )
    return Built(fresh(MambaForCausalLM, config), tokenizer())


def lfm2() -> Built:
    config = Lfm2Config(**DECODER, **vocabulary(tokenizer()), layer_types=["conv", "full_attention"])
    return Built(fresh(Lfm2ForCausalLM, config), tokenizer())


REQUIRED = (TinyVLM("Qwen3ForCausalLM", qwen3, pictures=False, required=True),)

ADDITIONAL = (
    TinyVLM("MambaForCausalLM", mamba, pictures=False, repeats=False),
    TinyVLM("Lfm2ForCausalLM", lfm2, pictures=False, repeats=False),
)
