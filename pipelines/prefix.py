"""A prompt is encoded once for all the texts that continue it: its keys and values are repeated, and the texts run on top.

The bookkeeping of inputs (positions on several axes, token types, masks) is the model's own, from its generation code.
Axes: P prompts padded on the left to L, B texts of T tokens padded on the right, D features of the last hidden state.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import ModelOutput

Inputs = Mapping[str, Tensor]
PER_TOKEN = ("attention_mask", "position_ids", "token_type_ids", "mm_token_type_ids")


@dataclass(frozen=True)
class Prefix:
    """What the model remembers of rows of tokens, and what it needs to read on."""

    cache: Cache  # changed in place by whoever reads on
    inputs: Inputs  # masks, positions and types of every token so far, last axis L
    last: Tensor  # (P, D) the hidden state that predicts the next token


@contextmanager
def before_the_head(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Within the context the last layer is left out; what came to it is appended to the list."""
    head, seen = model.get_output_embeddings(), []

    def keep(hidden: Tensor) -> Tensor:
        seen.append(hidden)
        return hidden

    head.forward = keep
    try:
        yield seen
    finally:
        del head.forward  # the class's own again


def hidden_states(model: PreTrainedModel, inputs: Mapping[str, object]) -> Tensor:
    """The states from which the model's last layer makes logits; (P, L, D)."""
    with before_the_head(model) as seen:
        model(**inputs)
    return seen[0]


def opened(model: PreTrainedModel, inputs: Inputs) -> dict[str, Tensor]:
    """The prompts' inputs with the positions that the model itself would generate from."""
    ids, others = inputs["input_ids"], {name: value for name, value in inputs.items() if name != "input_ids"}
    if "position_ids" in inspect.signature(model.forward).parameters:
        others["position_ids"] = model._prepare_position_ids_for_generation(ids, dict(others))
    return others


def encode(model: PreTrainedModel, inputs: Inputs) -> Prefix:
    """Read P prompts, padded on the left."""
    others, cache = opened(model, inputs), DynamicCache()
    prepared = model.prepare_inputs_for_generation(
        inputs["input_ids"], past_key_values=cache, use_cache=True, is_first_iteration=True, **others
    )
    hidden = hidden_states(model, prepared)
    return Prefix(cache, {name: others[name] for name in PER_TOKEN if name in others}, hidden[:, -1])


def repeat(prefix: Prefix, rows: Tensor) -> Prefix:
    """The remembered rows named by `rows` (B,) int64, any of them any number of times; the cache is changed in place."""
    prefix.cache.batch_select_indices(rows)
    inputs = {name: selected(name, value, rows) for name, value in prefix.inputs.items()}
    return Prefix(prefix.cache, inputs, prefix.last[rows])


class Room(DynamicLayer):
    """Keys and values of one layer in a buffer that has room for the answers, so that nothing is copied as they grow."""

    def __init__(self, keys: Tensor, values: Tensor, rows: Tensor, room: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.count = keys.shape[2]
        self.buffers = [
            states.new_empty(len(rows), states.shape[1], self.count + room, states.shape[3])
            for states in (keys, values)
        ]
        for buffer, states in zip(self.buffers, (keys, values), strict=True):
            torch.index_select(states, 0, rows, out=buffer[:, :, : self.count])
        self.keys, self.values = (buffer[:, :, : self.count] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **options: object
    ) -> tuple[Tensor, Tensor]:
        """Append; (B, heads, T, head dimension) each -> all so far."""
        start, self.count = self.count, self.count + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start : self.count] = states
        self.keys, self.values = (buffer[:, :, : self.count] for buffer in self.buffers)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget as many of the last tokens; the library gives their number negative."""
        self.count += tokens_to_remove
        self.keys, self.values = (buffer[:, :, : self.count] for buffer in self.buffers)


def cache_with_room(cache: Cache, rows: Tensor, room: int) -> Cache:
    """Another cache, of the rows named by `rows` (B,) int64, with room for further tokens, without gradient."""
    larger = DynamicCache()
    larger.layers = [Room(old.keys, old.values, rows, room) if old.is_initialized else old for old in cache.layers]
    return larger


def with_room(prefix: Prefix, rows: Tensor, room: int) -> Prefix:
    """`repeat` for writing `room` further tokens without gradient; the cache is another one."""
    cache = cache_with_room(prefix.cache, rows, room)
    inputs = {name: selected(name, value, rows) for name, value in prefix.inputs.items()}
    return Prefix(cache, inputs, prefix.last[rows])


def selected(name: str, value: Tensor, rows: Tensor) -> Tensor:
    """Rows of an input; positions on several axes lead with those."""
    return value[:, rows] if name == "position_ids" and value.dim() == 3 else value[rows]


def read_on(model: PreTrainedModel, prefix: Prefix, tokens: Tensor) -> tuple[Tensor, Prefix]:
    """Read T more tokens on top; (B, T) int64 -> hidden states (B, T, D), and what is remembered after them."""
    inputs = continued(model, prefix.inputs, tokens.shape[1])
    prepared = model.prepare_inputs_for_generation(
        tokens,
        next_sequence_length=tokens.shape[1],
        past_key_values=prefix.cache,
        use_cache=True,
        is_first_iteration=False,
        **inputs,
    )
    hidden = hidden_states(model, prepared)
    return hidden, Prefix(prefix.cache, inputs, hidden[:, -1])


def continued(model: PreTrainedModel, inputs: Inputs, count: int) -> dict[str, Tensor]:
    """Masks, positions and types for `count` further tokens of text, by the model's own rule for one."""
    one = model._update_model_kwargs_for_generation(ModelOutput(), dict(inputs), num_new_tokens=1)
    longer = {}
    for name, value in inputs.items():
        further = one[name][..., -1:].repeat_interleave(count, dim=-1)
        if name == "position_ids":
            further = further + torch.arange(count, device=further.device)
        longer[name] = torch.cat([value, further], dim=-1)
    return longer


def read_whole(model: PreTrainedModel, inputs: Inputs, tokens: Tensor) -> Tensor:
    """The plain way: prompts and their texts as whole sequences; (B, T) -> the states that predict the texts (B, T, D)."""
    others = opened(model, inputs)
    length, count = inputs["input_ids"].shape[1], tokens.shape[1]
    per_token = {name: others[name] for name in PER_TOKEN if name in others}
    whole = others | continued(model, per_token, count)
    ids = torch.cat([inputs["input_ids"], tokens], dim=1)
    prepared = model.prepare_inputs_for_generation(ids, use_cache=False, is_first_iteration=True, **whole)
    return hidden_states(model, prepared)[:, length - 1 : length + count - 1]
