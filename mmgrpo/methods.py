"""The catalogue: a method is a name for a part of a recipe; `method = "dapo"` lays that part under the user's own.

The entries are in methods.toml. What a method needs of a policy is asked of its components, not written down.
"""

import inspect
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from pydantic import TypeAdapter, with_config

from mmgrpo.comparing import needed
from mmgrpo.components import build, locate, options_of
from mmgrpo.facts import facts, unbound
from mmgrpo.toml import RecipeError, Table, nearest, write


@with_config(extra="forbid")
@dataclass(frozen=True)
class Method:
    """An entry of methods.toml."""

    paper: str
    changes: str  # of GRPO
    status: Literal["exact", "partial", "reconstructed"]
    recipe: Mapping[str, Mapping[str, Any]]
    degenerate: str = ""  # which groups without spread teach it
    also: str = ""  # what the source has beside it, and what the data must hold


@cache
def catalogue() -> Mapping[str, Method]:
    """Every method by name."""
    text = (files("mmgrpo") / "methods.toml").read_text(encoding="utf-8")
    adapter = TypeAdapter(Method)
    return {name: adapter.validate_python(table) for name, table in tomllib.loads(text).items()}


def find(name: object, where: str) -> Method:
    """The method of a name; raises RecipeError with the nearest one."""
    known = catalogue()
    if not isinstance(name, str) or name not in known:
        raise RecipeError(f"{where}: no method {name!r}{nearest(str(name), known)}")
    return known[name]


def underlaid(table: Table, where: str) -> dict[str, object]:
    """A recipe's table with its method's part under it; a component that the user names himself replaces the method's.

    A part of the policy names no component, and lies under any that has its options; raises RecipeError for another.
    """
    if "method" not in table:
        return dict(table)
    found: dict[str, object] = dict(table)
    for section, options in find(table["method"], where + "method").recipe.items():
        given = table.get(section, {})
        replaced = isinstance(given, Mapping) and given.get("build", options.get("build")) != options.get("build")
        if isinstance(given, Mapping) and not (replaced and "build" in options):
            found[section] = {**options, **given}
        if section == "policy" and isinstance(given, Mapping) and isinstance(given.get("build"), str):
            require_options(str(given["build"]), options, where, str(table["method"]))
    return found


def require_options(component: str, options: Table, where: str, method: str) -> None:
    """Refuse a policy that lacks what a method says of it; raises RecipeError."""
    known = options_of(locate(component, where + "policy.build"))
    for name in options:
        if name not in known:
            raise RecipeError(
                f"{where}method: {method!r} needs a policy with the option {name!r}, which {component} lacks"
            )


def needs(method: Method) -> tuple[str, ...]:
    """What the policy must know or evaluate of its decisions beyond their log-ratio."""
    found: list[str] = []
    if "advantage" in method.recipe:
        found += needed(build(method.recipe["advantage"], "advantage"))
    if "objective" in method.recipe:
        found += facts(build(method.recipe["objective"], "objective")).needs
    if "entropy" in method.recipe:
        found.append("entropy")
    return tuple(dict.fromkeys(name for name in found if name not in ("kind", "group", "reward")))


def definition(name: str) -> str:
    """What a person wants to know of a method: source, docstrings of its parts with their defaults, its part of a recipe."""
    method = find(name, "mmgrpo methods")
    lines = [f"{name} ({method.status}): {method.changes}", method.paper]
    lines += [f"needs of every decision: {', '.join(needs(method))}"] if needs(method) else []
    lines += [f"also learns from: {method.degenerate}"] if method.degenerate else []
    lines += [f"with it: {method.also}"] if method.also else []
    for section in ("advantage", "objective"):
        if section in method.recipe:
            lines += ["", *described(str(method.recipe[section]["build"]))]
    return "\n".join([*lines, "", f'method = "{name}"   # or, written out:', "", write(method.recipe).rstrip()])


def described(component: str) -> list[str]:
    """A component's signature and the docstring of its function."""
    function = locate(component, "mmgrpo methods")
    options = [
        f"{item.name} = {shown(item.default)}"
        for item in inspect.signature(function).parameters.values()
        if item.kind is inspect.Parameter.KEYWORD_ONLY
    ]
    return [
        component,
        f"  options: {', '.join(options) or 'none'}",
        f"  {inspect.getdoc(unbound(function)) or ''}".replace("\n", "\n  "),
    ]


def shown(default: object) -> str:
    """A default as a reader types it."""
    if callable(default):
        function: Any = unbound(default)
        return str(function.__name__ if inspect.isroutine(function) else type(function).__name__)
    return "(required)" if default is inspect.Parameter.empty else repr(default)
