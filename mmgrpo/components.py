"""Components: a table with `build = "module:function"` and options, checked against that function's signature.

A function that has positional parameters is the component itself, and the options bind its keyword-only parameters; a
function with keyword-only parameters alone, or a class, is a builder and is called with them. An option that is a table
with `build` is built first.
"""

import importlib
import importlib.util
import inspect
import json
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from mmgrpo.toml import RecipeError, Table, join, nearest

Function = Callable[..., object]
KEYWORD_ONLY, VAR_POSITIONAL = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_POSITIONAL
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
EMPTY = inspect.Parameter.empty
PACKAGES = ("mmgrpo", "pipelines", "rewards")  # where components are looked for when a name is misspelt


def build(component: Table, where: str) -> Any:
    """Make the object that a component's table describes; raises RecipeError with the dotted key under `where`."""
    function, table = _checked(component, where)
    parameters = options_of(function)
    options = {
        key: _built(value, parameters[key].annotation, join(where, key))
        for key, value in table.items()
        if key != "build"
    }
    if is_builder(function):
        return function(**options)
    return partial(function, **options) if options else function


def complete(component: object, where: str) -> dict[str, object]:
    """The component's table with the signature's defaults filled in and every option checked; nothing is built."""
    function, table = _checked(component, where)
    defaults = {name: _plain(parameter.default) for name, parameter in options_of(function).items()}
    present = {name: value for name, value in defaults.items() if value is not None}
    return (
        {"build": table["build"]} | present | {key: _completed(value, join(where, key)) for key, value in table.items()}
    )


def options_of(function: Function) -> dict[str, inspect.Parameter]:
    """The parameters a recipe may set, by name: the keyword-only ones, and all of a class."""
    every = inspect.signature(function, eval_str=True).parameters
    kinds = (*POSITIONAL, KEYWORD_ONLY) if inspect.isclass(function) else (KEYWORD_ONLY,)
    return {name: parameter for name, parameter in every.items() if parameter.kind in kinds}


def is_builder(function: Function) -> bool:
    """Whether the component is what a call returns, rather than the function itself."""
    parameters = inspect.signature(function).parameters.values()
    return inspect.isclass(function) or not any(item.kind in (*POSITIONAL, VAR_POSITIONAL) for item in parameters)


def typed(value: object, annotation: Any, where: str) -> Any:
    """The value as the annotation's type, strictly (no text to number, no 1.0 to 1); raises RecipeError.

    Validated as JSON, which has TOML's types: an array may become a tuple and a string a path.
    """
    try:
        adapter = TypeAdapter(object if annotation is EMPTY else annotation)
    except PydanticUserError:  # a protocol or a class of ours: no plain value can be one
        raise RecipeError(f"{where}: {value!r} arrived; expected a table with 'build'") from None
    try:
        return adapter.validate_json(json.dumps(value, default=str), strict=True)
    except ValidationError as error:
        raise RecipeError(_line(error.errors(include_url=False), where, _names(annotation))) from error


def _names(annotation: Any) -> tuple[str, ...]:
    return tuple(field.name for field in fields(annotation)) if is_dataclass(annotation) else ()


def _line(errors: list[ErrorDetails], where: str, known: tuple[str, ...]) -> str:
    """The first error in one line; an unknown key goes first, because it often is the missing one misspelt."""
    errors = sorted(errors, key=lambda error: error["type"] != "unexpected_keyword_argument")
    first = errors[0]
    key = where
    for part in first["loc"]:
        key = join(key, str(part)) if str(part) in known or isinstance(part, int) else key
    if first["type"] == "unexpected_keyword_argument":
        return f"{join(where, str(first['loc'][-1]))}: unknown key{nearest(str(first['loc'][-1]), known)}"
    if first["type"] == "missing":
        return f"{join(where, str(first['loc'][-1]))}: missing, and it has no default"
    if first["type"] == "callable_type":
        return f"{key}: {first['input']!r} arrived; expected a table with 'build'"
    wanted = " or ".join(
        dict.fromkeys(_expected(error["msg"]) for error in errors if error["loc"][:1] == first["loc"][:1])
    )
    return f"{key}: {first['input']!r} arrived; expected {wanted}"


def _expected(message: str) -> str:
    """Pydantic's message as the end of ours, in TOML's words."""
    message = message.removeprefix("Input should be ").replace("a valid ", "")
    known = {"an object": "a table", "integer": "a whole number", "number": "a number", "array": "an array"}
    compared = message.startswith(("greater", "less"))
    return f"a value {message}" if compared else known.get(message, message)


def _checked(component: object, where: str) -> tuple[Function, Table]:
    """The function a table names and the table, once every key is known, present and of its type."""
    if not isinstance(component, Mapping):
        raise RecipeError(f"{where}: {component!r} arrived; expected a table with 'build'")
    if not isinstance(component.get("build"), str):
        raise RecipeError(f"{join(where, 'build')}: missing; expected 'module:function'")
    function = locate(component["build"], join(where, "build"))
    parameters = options_of(function)
    for key, value in component.items():
        if key != "build" and key not in parameters:
            raise RecipeError(f"{join(where, key)}: unknown key of {component['build']}{nearest(key, parameters)}")
        if key != "build" and not _holds_component(value):
            typed(value, parameters[key].annotation, join(where, key))
    for name, parameter in parameters.items():
        if parameter.default is EMPTY and name not in component:
            raise RecipeError(f"{join(where, name)}: missing, and {component['build']} has no default for it")
    return function, component


def _holds_component(value: object) -> bool:
    if isinstance(value, Mapping):
        return "build" in value or any(_holds_component(item) for item in value.values())
    return isinstance(value, list) and any(_holds_component(item) for item in value)


def _built(value: object, annotation: Any, where: str) -> object:
    """A checked option ready to be passed: components made, plain values converted to their type."""
    return _walk(value, where, build) if _holds_component(value) else typed(value, annotation, where)


def _completed(value: object, where: str) -> object:
    return _walk(value, where, complete) if _holds_component(value) else value


def _walk(value: object, where: str, visit: Callable[[Table, str], object]) -> object:
    """A copy of nested tables and lists in which `visit` has replaced every component."""
    if isinstance(value, Mapping):
        if "build" in value:
            return visit(value, where)
        return {key: _walk(item, join(where, key), visit) for key, item in value.items()}
    if isinstance(value, list):
        return [_walk(item, join(where, str(index)), visit) for index, item in enumerate(value)]
    return value


def _plain(default: object) -> object:
    """A signature's default as TOML has it; None where TOML has no word for it."""
    if isinstance(default, Path):
        return str(default)
    if isinstance(default, tuple | list):
        return [_plain(item) for item in default]
    if isinstance(default, Mapping):
        return {key: _plain(item) for key, item in default.items()}
    return default if isinstance(default, str | int | float) else None


def locate(name: str, where: str) -> Function:
    """The function that "module:function" or "path/to/file.py:function" names; raises RecipeError."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise RecipeError(f"{where}: {name!r} arrived; expected 'module:function' or 'path/to/file.py:function'")
    module = _user_file(Path(module_name), where) if module_name.endswith(".py") else _module(module_name, where)
    found = vars(module).get(attribute)
    if not callable(found):
        raise RecipeError(
            f"{where}: no function {attribute!r} in {module_name}{nearest(attribute, _functions(module))}"
        )
    return found


def _functions(module: ModuleType) -> list[str]:
    """The module's own public functions, for a suggestion."""
    own = {name: item for name, item in vars(module).items() if not name.startswith("_")}
    return [
        name
        for name, item in own.items()
        if isinstance(item, partial) or (inspect.isroutine(item) and item.__module__ == module.__name__)
    ]


def _module(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if missing != name and not name.startswith(missing + "."):
            raise RecipeError(f"{where}: {name} needs the package {missing!r}, which is not installed") from error
        parent = missing.rpartition(".")[0]
        paths = vars(sys.modules[parent]).get("__path__", ()) if parent else None
        siblings = [found.name for found in pkgutil.iter_modules(paths, f"{parent}." if parent else "")]
        raise RecipeError(
            f"{where}: no module {missing!r}{nearest(missing, siblings if parent else PACKAGES)}"
        ) from None


def _user_file(path: Path, where: str) -> ModuleType:
    """The user's own file as a module, loaded once per path; it is looked for from the current folder."""
    name = f"recipe file {path.resolve()}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise RecipeError(f"{where}: no file {str(path)!r}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ModuleNotFoundError as error:
        raise RecipeError(f"{where}: {path} needs the package {error.name!r}, which is not installed") from error
    return module
