"""A second set of weights beside the trained ones, and the reference policy as a schedule of such sets."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import Parameter

from mmgrpo.types import same_shape

Kind = Literal["none", "frozen", "adapters_off", "ema", "previous"]


class Shadow:
    """A second set of values for named parameters, begun as a copy: an average, a frozen copy, an earlier iterate.

    Values are stored in each parameter's dtype, or in `at_least` where that is finer. An average of bfloat16 parameters
    needs float32: with a decay of 0.99 or more its steps are below bfloat16's rounding, and it would stand still.
    """

    def __init__(self, parameters: Mapping[str, Parameter], at_least: torch.dtype | None = None) -> None:
        if not parameters:
            raise ValueError("a shadow of no parameters arrived; expected at least one trainable parameter")
        for name, parameter in parameters.items():
            if type(parameter.detach()) is not Tensor:  # a sharded one computes with storage that `data` does not reach
                kind = type(parameter.detach()).__name__
                raise ValueError(
                    f"parameter {name!r} is a {kind}; a shadow needs plain tensors, not sharded or packed ones"
                )
        self._live = dict(parameters)
        self._held = {
            name: live.detach().to(torch.promote_types(live.dtype, at_least or live.dtype), copy=True)
            for name, live in parameters.items()
        }
        self._applied = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the context the parameters have the shadow's values, rounded to their own dtype and on their device.

        The parameters stay the same objects (the optimizer's state stays theirs) and are pointed at other storage; the
        live values are not copied, so nothing can go wrong when they are put back, which happens on an error too. A
        graph built before must not run backward inside. Raises RuntimeError if the shadow is applied already.
        """
        self._require_idle("apply it again")
        shadows = [self._held[name].to(live.device, live.dtype) for name, live in self._live.items()]
        originals = [live.data for live in self._live.values()]
        self._applied = True
        try:
            for live, shadow in zip(self._live.values(), shadows, strict=True):
                live.data = shadow
            yield
        finally:
            for live, original in zip(self._live.values(), originals, strict=True):
                live.data = original
            self._applied = False

    @torch.no_grad()
    def follow(self, decay: float) -> None:
        """shadow <- decay * shadow + (1 - decay) * live, once per optimizer step; ValueError outside [0, 1]."""
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; expected a number in [0, 1]")
        self._require_idle("move it")
        for name, held in self._held.items():
            held.lerp_(self._live[name].detach().to(held), 1 - decay)

    def copy(self) -> None:
        """shadow <- live."""
        self._require_idle("move it")
        for name, held in self._held.items():
            held.copy_(self._live[name].detach())

    def tensors(self) -> dict[str, Tensor]:
        """The stored values by name, not copied; for checkpoints."""
        return dict(self._held)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `tensors` gave; raises ValueError where names, shapes or dtypes differ."""
        self._require_idle("load it")
        if tensors.keys() != self._held.keys():
            odd = sorted(tensors.keys() ^ self._held.keys())
            raise ValueError(
                f"shadow weights do not fit: {len(odd)} names are on one side only, the first is {odd[0]!r}"
            )
        for name, held in self._held.items():
            same_shape(**{name: held, f"stored {name}": tensors[name]})
            if tensors[name].dtype != held.dtype:
                raise ValueError(f"stored {name} has dtype {tensors[name].dtype}; expected {held.dtype}")
        for name, held in self._held.items():
            held.copy_(tensors[name])

    def _require_idle(self, action: str) -> None:
        if self._applied:
            raise RuntimeError(f"the shadow's weights are applied; leave that context before you {action}")


class Reference:
    """The policy that training is held close to.

    none          no reference: `active` is False
    frozen        the weights at construction
    adapters_off  the policy without its adapters; costs no memory
    ema           the average of the live weights with `decay` per optimizer step
    previous      the weights at the end of the previous iteration, those that the current rollout was sampled with
    """

    def __init__(
        self,
        kind: Kind,
        parameters: Mapping[str, Parameter],
        *,
        decay: float = 0.995,
        adapters_off: Callable[[], AbstractContextManager[object]] | None = None,
    ) -> None:
        """`adapters_off` makes the policy's own context without adapters; ValueError for an option that cannot be."""
        if kind not in get_args(Kind):
            raise ValueError(f"reference is {kind!r}; expected one of {', '.join(get_args(Kind))}")
        if kind == "adapters_off" and adapters_off is None:
            raise ValueError("reference is 'adapters_off', but this policy has no adapters; expected 'frozen' or 'ema'")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; expected a number in [0, 1]")
        self.kind: Kind = kind
        self._decay = decay
        self._adapters_off = adapters_off
        at_least = torch.float32 if kind == "ema" else None
        self._shadow = Shadow(parameters, at_least) if kind in ("frozen", "ema", "previous") else None

    @property
    def active(self) -> bool:
        """Whether there is a reference to compute with."""
        return self.kind != "none"

    def applied(self) -> AbstractContextManager[object]:
        """Within the context the policy computes with the reference's weights. Raises ValueError if there are none."""
        if self._shadow is not None:
            return self._shadow.applied()
        if self.kind == "adapters_off" and self._adapters_off is not None:
            return self._adapters_off()
        raise ValueError("reference is 'none'; expected another kind where a distance to the reference is asked for")

    def after_update(self) -> None:
        """Call once after every optimizer step."""
        if self._shadow is not None and self.kind == "ema":
            self._shadow.follow(self._decay)

    def after_iteration(self) -> None:
        """Call once after the last update of every iteration."""
        if self._shadow is not None and self.kind == "previous":
            self._shadow.copy()

    def tensors(self) -> dict[str, Tensor]:
        """The reference's own weights for a checkpoint; none where it has none."""
        return {} if self._shadow is None else self._shadow.tensors()

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from a checkpoint; raises ValueError where it does not fit."""
        if self._shadow is not None:
            self._shadow.load(tensors)
        elif tensors:
            raise ValueError(
                f"reference is {self.kind!r}, but {len(tensors)} reference weights are stored; expected none"
            )
