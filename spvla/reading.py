"""What is read back from disk, checked before anything acts on it: JSON, lines of JSON, and parts of either.

A file that is not what its writer leaves ends in one error: the file and the place in it, what is there, what was
expected, and what to do. A form is any type that pydantic knows, most often a TypedDict; entries that it does not name
may be there. Numbers and texts are not converted into each other.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import (
    Annotated,
    Any,
    NotRequired,  # typing's own serves pydantic from Python 3.12 on
    get_type_hints,
)

from annotated_types import Ge, Gt, Lt
from typing_extensions import TypedDict

from spvla.errors import UserError

SHOWN = 80  # characters of what was found
Count = Annotated[int, Ge(0), Lt(2**63)]
Number = Annotated[float, Gt(-math.inf), Lt(math.inf)]  # no NaN either


def read_json(path: Path, form: Any = dict[str, Any], *, remedy: str, error: type[UserError] = UserError) -> Any:
    """The value in a file, of `form`. Raises `error`."""
    try:
        data = path.read_bytes()
    except OSError as e:
        raise error(f"{path} cannot be read ({e.strerror})", expected="a JSON file", remedy=remedy) from e
    return require_form(parse(data, str(path), remedy=remedy, error=error), form, str(path), remedy=remedy, error=error)


def read_rows(path: Path, form: Any, *, remedy: str, error: type[UserError] = UserError) -> Iterator[Any]:
    """The value of each line, of `form`; nothing where there is no file.

    A writer that is killed leaves a line without its end, and begins another when it goes on: so a line that is cut
    short is no damage, and is left out. Raises `error` for any other.
    """
    try:
        lines = path.read_bytes().splitlines() if path.exists() else []
    except OSError as e:
        raise error(f"{path} cannot be read ({e.strerror})", expected="lines of JSON", remedy=remedy) from e
    for number, line in enumerate(lines, start=1):
        place = f"{path}, line {number}"
        if not line.strip() or _cut_short(line):
            continue
        value = parse(line, place, remedy=remedy, error=error)
        yield require_form(value, form, place, remedy=remedy, error=error)


def parse(data: bytes | str, place: str, *, remedy: str, error: type[UserError] = UserError) -> Any:
    """The value of a JSON text in UTF-8. Raises `error` naming `place`."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as e:
        why = "it is nested too deeply" if isinstance(e, RecursionError) else str(e)
        raise error(f"{place} cannot be read ({why})", expected="JSON in UTF-8", remedy=remedy) from e


def require_form(value: Any, form: Any, place: str, *, remedy: str, error: type[UserError] = UserError) -> Any:
    """`value`, if it is of `form`. Raises `error` naming the first entry that is not."""
    from pydantic import ValidationError

    try:
        _adapter(form).validate_python(value, strict=True)
    except ValidationError as e:
        first = e.errors(include_url=False, include_context=False)[0]
        where = ".".join(map(str, first["loc"]))
        got = f"{place} holds {_short(first['input'])}" + (f" at {where}" if where else "")
        if first["type"] == "missing":
            got = f"{place} has no {where}"
        raise error(got, expected=_expected(first["msg"]), remedy=remedy) from None
    return value


def form_of(kind: type) -> Any:
    """The form of an object that holds the fields of a dataclass."""
    hints = get_type_hints(kind, include_extras=True)
    optional = {f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING}
    form = TypedDict(kind.__name__, {k: NotRequired[v] if k in optional else v for k, v in hints.items()})
    form.__pydantic_config__ = {"extra": "forbid"}
    return form


def _cut_short(line: bytes) -> bool:
    """Whether it is the beginning of an object whose end never came."""
    return line.startswith(b"{") and not line.rstrip().endswith(b"}")


@cache
def _adapter(form: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(form)


def _expected(message: str) -> str:
    """pydantic's sentence, without its beginning."""
    for beginning in ("Input should be ", "Value error, "):
        message = message.removeprefix(beginning)
    return (message[:1].lower() + message[1:]).replace(" after validation", "")


def _short(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits to write
        text = f"a {type(value).__name__}"
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
