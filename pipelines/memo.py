"""Remember what text and image encoders returned, row by row, so that a prompt is encoded once in a run.

The key covers the content of every argument, the module's name and the model's revision. Rows are encoded one at a time:
a row's encoding then never depends on the rows beside it, in rollout and in replay alike.
"""

import copy
import functools
import hashlib
import importlib
import json
import operator
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from transformers.utils import ModelOutput

from pipelines import structure

Call = Callable[..., Any]
PLAIN = (str, bytes, bool, int, float, type(None), torch.dtype, torch.device)  # whose repr is their content


def fingerprint(value: Any) -> bytes:
    """A content hash of a nested value; tensors count by dtype, shape and bytes."""
    digest = hashlib.blake2b(digest_size=20)
    for leaf in structure.leaves(value):
        if isinstance(leaf, Tensor):
            flat = leaf.detach().cpu().contiguous()
            digest.update(f"{flat.dtype}{tuple(flat.shape)}".encode())
            digest.update(flat.view(-1).view(torch.uint8).numpy().tobytes())
        else:
            digest.update(repr(leaf).encode())
        digest.update(b"\x1f")
    return digest.digest()


def rows_of(value: Any) -> int | None:
    """The leading size that all tensors of a nested value share; None if they share none."""
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in structure.tensors(value)}
    return sizes.pop() if len(sizes) == 1 and sizes != {0} else None


def one_row(row: int, tensor: Tensor) -> Tensor:
    return tensor[row : row + 1]


def copied(leaf: Any, device: torch.device | str) -> Any:
    """What the next user may change freely, such as the keys and values of a language model."""
    return leaf.to(device, copy=True) if isinstance(leaf, Tensor) else copy.deepcopy(leaf)


def size_of(answer: Any) -> int:
    """Bytes of its tensors."""
    return sum(tensor.nbytes for tensor in structure.tensors(answer))


def stacked(parts: list[Any]) -> Any:
    """One leaf from those of several rows; objects that hold the state of one row each have no joint form."""
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return parts[0] if len(parts) == 1 or isinstance(parts[0], PLAIN) else None


class Memo:
    """Row-wise memory of module calls, on the CPU and, if a folder is given, on disk."""

    def __init__(self, revision: str, folder: Path | None = None, limit: int = 4 * 2**30) -> None:
        self.revision = revision
        self.folder = folder
        self.limit = limit  # bytes kept in memory; what was not used for longest goes first
        self.held = 0  # bytes
        self.rows: OrderedDict[str, Any] = OrderedDict()
        self.joint: set[str] = set()  # modules whose rows depend on each other
        self.hits = 0
        self.misses = 0

    @torch.no_grad()
    def call(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`forward(*args, **kwargs)`, from memory where the same content was seen before.

        Arguments that are neither tensors nor plain values, such as a language model's cache, may change: such calls run.
        """
        if not all(isinstance(leaf, (Tensor, *PLAIN)) for leaf in structure.leaves((args, kwargs))):
            return forward(*args, **kwargs)
        count = rows_of((args, kwargs))
        if count is None or name in self.joint:
            return self._one(name, forward, args, kwargs, batch=True)
        answers = []
        for row in range(count):
            part_args, part_kwargs = structure.map_tensors((args, kwargs), functools.partial(one_row, row))
            answers.append(self._one(name, forward, part_args, part_kwargs))
            if rows_of(answers[-1]) != 1:  # the module returns something that is not one row per row
                self.joint.add(name)
                return self._one(name, forward, args, kwargs, batch=True)
        return structure.merge(answers, stacked)

    def _one(self, name: str, forward: Call, args: tuple[Any, ...], kwargs: dict[str, Any], batch: bool = False) -> Any:
        key = hashlib.blake2b(f"{name}|{self.revision}|{batch}".encode() + fingerprint((args, kwargs))).hexdigest()[:40]
        given = structure.tensors((args, kwargs))
        device = given[0].device if given else torch.device("cpu")
        if key in self.rows:
            self.hits += 1
            self.rows.move_to_end(key)
            return structure.rebuild(self.rows[key], functools.partial(copied, device=device))
        self.misses += 1
        answer = self._from_disk(key, device, lambda: forward(*args, **kwargs))
        self._keep(key, structure.rebuild(answer, functools.partial(copied, device="cpu")))
        return answer

    def _keep(self, key: str, answer: Any) -> None:
        self.rows[key] = answer
        self.held += size_of(answer)
        while self.held > self.limit:
            self.held -= size_of(self.rows.popitem(last=False)[1])

    def _from_disk(self, key: str, device: torch.device, compute: Callable[[], Any]) -> Any:
        """Through the folder, if there is one: tensors as safetensors, their nesting as JSON in the header."""
        if self.folder is None:
            return compute()
        path = self.folder / f"{key}.safetensors"
        if path.exists():
            with safe_open(path, framework="pt") as stored:
                parts = [stored.get_tensor(str(place)).to(device) for place in range(len(stored.keys()))]
                return unpack(json.loads(stored.metadata()["nesting"]), parts)
        answer = compute()
        nesting = pack(answer)
        if nesting is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            named = {str(place): part.contiguous() for place, part in enumerate(structure.tensors(answer))}
            with tempfile.NamedTemporaryFile(dir=self.folder, suffix=".part", delete=False) as partial:
                partial.write(save(named, {"nesting": json.dumps(nesting)}))
            Path(partial.name).rename(path)
        return answer


def pack(value: Any) -> Any:
    """The nesting of a value as JSON, tensors replaced by their place; None if it holds anything else."""
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, DiagonalGaussianDistribution):
        return {"gaussian": value.deterministic}
    if isinstance(value, (BaseOutput, ModelOutput)):
        items = {name: pack(item) for name, item in value.items()}
        kind = f"{type(value).__module__}:{type(value).__qualname__}"
        return None if None in items.values() else {"record": kind, "items": items}
    if type(value) in (tuple, list):
        parts = [pack(item) for item in value]
        return None if None in parts else {"sequence": type(value).__name__, "items": parts}
    return None


def unpack(nesting: Any, parts: list[Tensor]) -> Any:
    """The value that `pack` described; takes its tensors from the front of `parts`."""
    if nesting == "tensor":
        return parts.pop(0)
    if "gaussian" in nesting:
        return DiagonalGaussianDistribution(parts.pop(0), nesting["gaussian"])
    if "sequence" in nesting:
        return {"tuple": tuple, "list": list}[nesting["sequence"]](unpack(item, parts) for item in nesting["items"])
    module, _, name = nesting["record"].partition(":")
    record = operator.attrgetter(name)(importlib.import_module(module))
    if not issubclass(record, (BaseOutput, ModelOutput)):
        raise ValueError(f"cached encoding names {nesting['record']}, which is no output record")
    return record(**{name: unpack(item, parts) for name, item in nesting["items"].items()})
