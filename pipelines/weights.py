"""Which weights of a model or a pipeline are trained, and how they are saved: low-rank adapters or the modules themselves."""

import fnmatch
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline, ModelMixin
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from mmgrpo.toml import nearest

Precision = Literal["float32", "bfloat16", "float16"]  # of weights
Half = Literal["bfloat16", "float16"]  # of autocast, which knows no other on CPUs
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
LORA_OPTIONS = {"rank", "alpha", "targets", "dropout"}


def make_trainable(modules: Mapping[str, Any], lora: Mapping[str, Any] | None, checkpointing: bool) -> list[str]:
    """Add adapters or unfreeze the modules in place; -> notes on what was done."""
    notes = []
    for name, module in modules.items():
        if lora is None:
            module.requires_grad_(True)
        else:
            add_adapter(name, module, lora)
        if checkpointing:
            if not isinstance(module, ModelMixin) or not module._supports_gradient_checkpointing:
                raise ValueError(f"policy.gradient_checkpointing: {type(module).__name__} ({name}) does not support it")
            module.enable_gradient_checkpointing()
        module.eval()
        count = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
        notes.append(f"{name}: {count:,} trained parameters in {type(module).__name__}")
    return notes


def add_adapter(
    name: str, module: Any, lora: Mapping[str, Any], targets: Sequence[str] = ATTENTION, spared: str | None = None
) -> None:
    """A low-rank adapter on the module's linear layers, in float32; raises ValueError on bad options.

    `targets` are the layers without an option; `spared` is a pattern of names that get no adapter.
    """
    unknown = sorted(lora.keys() - LORA_OPTIONS)
    if unknown:
        raise ValueError(f"policy.lora.{unknown[0]}: unknown key; expected one of {sorted(LORA_OPTIONS)}")
    if lora.get("dropout", 0) != 0:
        raise ValueError(
            f"policy.lora.dropout is {lora['dropout']}; expected 0, dropout would turn the ratio into noise"
        )
    rank = int(lora.get("rank", 32))
    config = LoraConfig(
        r=rank,
        lora_alpha=lora.get("alpha", 2 * rank),
        target_modules=list(lora.get("targets", targets)),
        exclude_modules=spared,
        init_lora_weights="gaussian",
    )
    if not isinstance(module, ModelMixin | PreTrainedModel):
        wanted = "a model of diffusers or transformers"
        raise ValueError(f"policy.lora: {name} is a {type(module).__name__}; adapters need {wanted}")
    module.add_adapter(config)
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


@contextmanager
def adapters_off(modules: Iterable[Any]) -> Iterator[None]:
    """Within the context the modules compute without their adapters."""
    modules = list(modules)
    for module in modules:
        module.disable_adapters()
    try:
        yield
    finally:
        for module in modules:
            module.enable_adapters()


def save(pipeline: DiffusionPipeline, modules: Mapping[str, Any], lora: bool, folder: Path) -> None:
    """Write adapters so that `load_lora_weights` reads them, or whole modules so that `from_pretrained` does."""
    folder.mkdir(parents=True, exist_ok=True)
    if not lora:
        for name, module in modules.items():
            module.save_pretrained(folder / name)
        return
    layers = {f"{name}_lora_layers": get_peft_model_state_dict(module) for name, module in modules.items()}
    scales = {
        f"{name}_lora_adapter_metadata": module.peft_config["default"].to_dict() for name, module in modules.items()
    }
    writer = inspect.getattr_static(type(pipeline), "save_lora_weights", None)
    known = (
        inspect.signature(writer.__func__).parameters.keys() if isinstance(writer, (classmethod, staticmethod)) else ()
    )
    if layers.keys() | scales.keys() <= set(known):
        pipeline.save_lora_weights(folder, **layers, **scales)  # without the scales a reader takes alpha for the rank
        return
    for name, module in modules.items():
        module.save_lora_adapter(folder / name)


def choose_trained(network: nn.Module, patterns: Sequence[str]) -> str:
    """Freeze all but the parameters whose names match a pattern (all of them without any); -> a note.

    Raises ValueError if a pattern matches nothing.
    """
    names = [name for name, _ in network.named_parameters()]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"policy.train: no parameter matches {pattern!r}{nearest(pattern, names)}")
    count = 0
    for name, value in network.named_parameters():
        value.requires_grad_(not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns))
        count += value.numel() if value.requires_grad else 0
    network.eval()  # dropout would turn the ratio into noise
    return f"{count:,} trained parameters in {type(network).__name__}"
