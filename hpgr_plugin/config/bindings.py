"""Checks of all bindings before any work starts: their types, and whether anything reads them."""

from __future__ import annotations

import contextlib
import inspect
import tokenize
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import gin
from gin.config import _CONFIG, ConfigurableReference, ParserDelegate, iterate_references
from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from hpgr_plugin.config.registry import ConfigError, registered_targets, roots
from hpgr_plugin.errors import HpgrError

_MACRO = "gin.macro"
_PLACES = ("output_dir", "cache_dir", "path", "overwrite", "allow_unused", "workers")
_LARGEST = 2**32 - 1  # what every generator takes as a seed
_LARGEST_FLOAT = 3e38
_macros_referred_to: set[str] = set()
_PLAIN = {int: "an integer", float: "a number", str: "a string", bool: "True or False"}


def parse(config_files: list[str], bindings: list[str]) -> None:
    """Parse gin files, in order, then bindings, and check the types of all of them.

    Args:
        config_files: paths, also those of shipped files such as "configs/runs/quickstart.gin".
        bindings: lines of gin.

    Raises:
        ConfigError: a syntax error, an unknown configurable or parameter, or a value of a type
            that its parameter does not take.
        OSError: no such file.
    """
    if not _CONFIG:
        _macros_referred_to.clear()
    with _recorded_macros():
        for file in config_files:
            with _parse_errors(file):
                gin.parse_config_file(file)
        with _parse_errors("--gin_bindings"):
            gin.parse_config(bindings)
            gin.finalize()
    check_types()


def as_text() -> str:
    """All bindings, for `restore` in another process."""
    text: str = gin.config_str()
    return text


def restore(text: str) -> None:
    """Bind what `as_text` gave; it was checked where it was parsed."""
    gin.parse_config(text)


def check_types() -> None:
    """Every `hpgr` binding has the type that its parameter takes.

    Raises:
        ConfigError: naming the binding, its value and what it takes.
    """
    for binding, hint, value in _typed_bindings():
        origin = f", the value of {value}" if _is_macro(value) else ""
        value = _resolve_macro(value)
        if value is gin.REQUIRED:
            raise ConfigError(f"{binding} must be bound: it takes {describe(hint)}")
        if not _fits(value, hint):
            raise ConfigError(f"{binding} takes {describe(hint)}, got {_show(value)}{origin}")
        if (limit := _broken_limit(value)) is not None:
            raise ConfigError(f"{binding} takes {limit}, got {_show(value)}{origin}")


def check_unused(allow: Sequence[str] = ()) -> None:
    """Every `hpgr` binding and every macro is read by something that a run can build.

    What code does not build by itself has to be referred to, as in `slot = @hpgr.Name()`.

    Args:
        allow: names, without `hpgr.`, whose bindings may stay unread.

    Raises:
        ConfigError: naming the bindings that nothing reads.
    """
    reached = _reached({f"hpgr.{name}" for name in roots()})
    reached |= {f"hpgr.{name}" for name in allow}
    unused = sorted({key[1] for key in _CONFIG if _is_ours(key) and key[1] not in reached})
    # A binding that overrides one with a macro leaves the macro unread: what counts is whether a
    # parsed line refers to it.
    unused += sorted(s for s, name in _CONFIG if name == _MACRO and s not in _macros_referred_to)
    if unused:
        raise ConfigError(
            f"nothing reads the bindings of {', '.join(unused)}: no slot or other binding refers "
            "to them. Remove them, or name them in hpgr.run.allow_unused where several runs "
            "share a file"
        )


def bound_values() -> dict[str, str]:
    """Every `hpgr` binding that can change a result, macros resolved, as text.

    Left out are those that only say where something is, or how a run is started.
    """
    return {
        binding: str(_resolve_macro(value))
        for binding, _, value in _typed_bindings()
        if binding.rpartition(".")[2] not in _PLACES
    }


def describe(hint: Any) -> str:
    """A type in words, components by the names that gin knows them by."""
    members = _members(hint)
    words = [word for member in members if member is not type(None) for word in _words(member)]
    if type(None) in members:
        words.append("None")
    return " or ".join(dict.fromkeys(words))


@contextlib.contextmanager
def _parse_errors(source: str) -> Iterator[None]:
    """Turn what gin raises on a text that it cannot read into one error that names it."""
    try:
        yield
    except SyntaxError as error:
        where = f"{error.filename or source}, line {error.lineno}"
        raise ConfigError(f"{where}: {error.msg} {(error.text or '').strip()}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} or a file that it includes is not UTF-8: {error}") from error
    except tokenize.TokenError as error:
        problem, (line, _) = error.args
        raise ConfigError(f"{source}, line {line}: {problem}") from error
    except RecursionError as error:
        raise ConfigError(f"{source} is nested too deeply, or includes itself") from error
    except HpgrError:
        raise
    except (ImportError, OSError, TypeError, ValueError) as error:
        text = str(error)
        raise ConfigError(text if source in text else f"{source}: {text}") from error


@contextlib.contextmanager
def _recorded_macros() -> Iterator[None]:
    """Remember which macros the parsed lines refer to; gin keeps only the final bindings."""
    original = ParserDelegate.macro

    def macro(self: ParserDelegate, name: str) -> Any:
        _macros_referred_to.add(name)
        return original(self, name)

    ParserDelegate.macro = macro
    try:
        yield
    finally:
        ParserDelegate.macro = original


def _typed_bindings() -> Iterator[tuple[str, Any, Any]]:
    """Name, type hint and value of every `hpgr` binding."""
    for (scope, selector), parameters in list(_CONFIG.items()):
        if not _is_ours((scope, selector)):
            continue
        target = registered_targets()[selector.removeprefix("hpgr.")]
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
        for name, value in parameters.items():
            prefix = f"{scope}/" if scope else ""
            yield f"{prefix}{selector}.{name}", hints.get(name, Any), value


def _fits(value: Any, hint: Any) -> bool:
    members = _members(hint)
    if isinstance(value, ConfigurableReference):
        return any(_reference_fits(value, member) for member in members)
    if isinstance(value, bool) and not {bool, Any} & set(members):
        return any(get_origin(m) is Literal and value in get_args(m) for m in members)
    if isinstance(value, str):  # a string is a sequence of strings, but never meant as one
        members = [m for m in members if m in (str, Any) or get_origin(m) is Literal]
    if _holds_references(value):
        return isinstance(value, dict) or any(_items_fit(value, member) for member in members)
    return any(_is_of(value, member) for member in members)


def _items_fit(values: Sequence[Any], hint: Any) -> bool:
    """Whether a list with references in it has items that the hint takes."""
    if hint is Any:
        return True
    origin = get_origin(hint)
    if not (inspect.isclass(origin) and issubclass(origin, Sequence)):
        return False
    return all(_fits(_resolve_macro(value), get_args(hint)[0]) for value in values)


def _broken_limit(value: Any) -> str | None:
    """What every value has to keep to, whatever it is for, where this one does not."""
    if isinstance(value, list | tuple):
        return next(filter(None, map(_broken_limit, value)), None)
    if isinstance(value, int) and abs(value) > _LARGEST:
        return f"integers of at most {_LARGEST}"
    if isinstance(value, float) and not abs(value) < _LARGEST_FLOAT:
        return "a finite number that fits into 32 bits"
    if isinstance(value, str) and not _is_text(value):
        return "text without NUL and lone surrogates"
    return None


def _is_text(value: str) -> bool:
    return "\0" not in value and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_of(value: Any, hint: Any) -> bool:
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def _reference_fits(reference: ConfigurableReference, hint: Any) -> bool:
    """Whether `@name()` makes, or `@name` is, what the hint takes."""
    if hint is Any:
        return True
    target = reference.configurable.wrapped
    if not reference.evaluate:
        kind = get_args(hint)[0] if get_origin(hint) is type else None
        return inspect.isclass(target) and kind is not None and issubclass(target, kind)
    made = target if inspect.isclass(target) else get_type_hints(target).get("return", Any)
    return made is Any or (inspect.isclass(hint) and _is_a(made, hint))


def _members(hint: Any) -> list[Any]:
    """The members of a union, or the hint itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return list(get_args(hint))
    return [hint]


def _words(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if origin is Literal:
        return [repr(choice) for choice in get_args(hint)]
    if origin is type:
        kind, brackets = get_args(hint)[0], ""
    else:
        kind, brackets = hint, "()"
    if inspect.isclass(kind):
        names = [n for n, t in registered_targets().items() if _makes(t, kind)]
        if names:
            return [f"@hpgr.{name}{brackets}" for name in names]
        return [_PLAIN.get(kind, kind.__name__)]
    if inspect.isclass(origin) and issubclass(origin, Sequence) and get_args(hint):
        return [f"a list of items, each {describe(get_args(hint)[0])}"]
    if inspect.isclass(origin) and issubclass(origin, Mapping) and get_args(hint):
        return [f"a dict, each value {describe(get_args(hint)[1])}"]
    return [str(hint).replace("typing.", "").replace("collections.abc.", "")]


def _makes(target: Any, kind: type) -> bool:
    if kind.__module__ == "builtins":
        return False
    return _is_a(target if inspect.isclass(target) else get_type_hints(target).get("return"), kind)


def _is_a(made: Any, kind: type) -> bool:
    """Whether a class is a subclass of another, or has the methods of a protocol."""
    if getattr(kind, "_is_protocol", False):
        methods = [name for name, value in vars(kind).items() if inspect.isfunction(value)]
        return all(hasattr(made, name) for name in methods if not name.startswith("_"))
    return inspect.isclass(made) and issubclass(made, kind)


def _show(value: Any) -> str:
    if isinstance(value, ConfigurableReference):
        return str(value)
    return f"{value!r} ({type(value).__name__})"


def _resolve_macro(value: Any) -> Any:
    """The value behind `%NAME`; other values as they are."""
    while _is_macro(value):
        bound = _CONFIG.get(("/".join(value.scopes), _MACRO))
        if bound is None:
            raise ConfigError(f"the macro %{'/'.join(value.scopes)} has no value")
        value = bound["value"]
    return value


def _is_macro(value: Any) -> bool:
    is_reference = isinstance(value, ConfigurableReference)
    return is_reference and bool(value.configurable.selector == _MACRO)


def _is_ours(key: tuple[str, str]) -> bool:
    return key[1].startswith("hpgr.")


def _holds_references(value: Any) -> bool:
    return (
        any(True for _ in _references(value)) if isinstance(value, list | tuple | dict) else False
    )


def _references(value: Any) -> Iterator[ConfigurableReference]:
    found: Iterator[ConfigurableReference] = iterate_references(value)
    return found


def _reached(roots: set[str]) -> set[str]:
    """Selectors that the roots need, through the references in their bindings."""
    reached: set[str] = set()
    waiting = list(roots)
    while waiting:
        selector = waiting.pop()
        if selector in reached:
            continue
        reached.add(selector)
        values: list[Mapping[str, Any]] = [
            bound for (_, name), bound in _CONFIG.items() if name == selector
        ]
        for reference in _references(values):
            made = _resolve_macro(reference)
            for inner in _references([made]):
                waiting.append(inner.configurable.selector)
    return reached
