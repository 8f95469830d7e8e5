"""What must be known of an objective before it is computed: what it needs, and what it must see together.

A module of objectives declares them in a constant FACTS, function -> Facts; an own file that a recipe names may do the same.
A function that is bound as an option (a ratio's level, a weight, a score) adds its own.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

Component = Callable[..., Any]
Reach = Literal["decision", "sample", "batch"]
REACHES: tuple[Reach, ...] = ("decision", "sample", "batch")


class Facts(NamedTuple):
    """Of an objective, or of one of its parts."""

    needs: tuple[str, ...] = ()  # fields of `Evaluation` beyond log_ratio
    couples: Reach = "decision"  # what it must see together
    every: bool = False  # samples of advantage 0 matter: they are pulled on, or counted for others

    @property
    def refers(self) -> bool:
        """Whether a reference is asked for."""
        return not {"to_reference", "reference_error"}.isdisjoint(self.needs)


@runtime_checkable
class Compound(Protocol):
    """A component made of others."""

    def inside(self) -> Sequence[Component]:
        """Those others."""
        ...


def facts(component: Component) -> Facts:
    """Of a component as a recipe builds it: its own, and those of all that it is made of."""
    found = [declared(component), *(facts(part) for part in parts(component))]
    needs = dict.fromkeys(name for one in found for name in one.needs)
    couples = max((one.couples for one in found), key=REACHES.index)
    return Facts(tuple(needs), couples, any(one.every for one in found))


def declared(component: Component) -> Facts:
    """What the module of a function, or of an object's class, says of it."""
    function = unbound(component)
    named: Any = function if inspect.isroutine(function) else type(function)
    module = inspect.getmodule(named)
    told: Mapping[Component, Facts] = {} if module is None else vars(module).get("FACTS", {})
    return told.get(named, Facts())


def parts(component: Component) -> Sequence[Component]:
    """The functions that a component is made of: bound as options, or joined in a compound."""
    if isinstance(component, Compound):
        return component.inside()
    options = inspect.signature(component).parameters.values()
    return [item.default for item in options if item.default is not item.empty and callable(item.default)]


def unbound(component: Component) -> Component:
    """The function under the options bound with functools.partial."""
    return unbound(component.func) if isinstance(component, partial) else component
