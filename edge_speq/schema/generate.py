"""JSON schemas of dataclasses: types give the constraints, comments of fields the descriptions."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from typing import Any, Union

from edge_speq.schema import FOLDER
from edge_speq.schema.outputs import MANY, OUTPUTS

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SCALARS: dict[type, dict[str, Any]] = {
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer", "minimum": 0},
    float: {"type": "number", "minimum": 0},
}
FIELD = re.compile(r"    (\w+): [^#]*?(?:  # (?P<text>.*?))?(?:  # type: .*)?$")


def schemas() -> dict[str, dict[str, Any]]:
    """Return the schema of each output, by its name."""
    return {name: _output(name, cls) for name, cls in OUTPUTS.items()}


def write() -> None:
    """Write the schemas beside this module."""
    for name, schema in schemas().items():
        (FOLDER / f"{name}.schema.json").write_text(dumps(schema), encoding="utf-8")


def dumps(schema: dict[str, Any]) -> str:
    """Return the text of a schema's file."""
    return json.dumps(schema, indent=1) + "\n"


def _output(name: str, cls: Any) -> dict[str, Any]:
    schema = _object(cls)
    if name in MANY:
        description = schema.pop("description")
        schema = {"description": f"An array of rows. {description}", "type": "array", "items": schema}
    return {"$schema": DIALECT, "title": cls.TITLE} | schema


def _object(cls: Any) -> dict[str, Any]:
    hints, texts = typing.get_type_hints(cls, include_extras=True), descriptions(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    found = {
        "type": "object",
        "description": " ".join((inspect.getdoc(cls) or "").split()),
        "additionalProperties": False,
        "required": [] if getattr(cls, "OPTIONAL", False) else names,
        "properties": {name: _described(hints[name], texts.get(name, "")) for name in names},
    }
    return found


def _described(hint: Any, text: str) -> dict[str, Any]:
    found = _schema(hint)
    if text or found.get("description"):
        found["description"] = text or found["description"]
    return found


def _schema(hint: Any) -> dict[str, Any]:
    """Return the schema of a type. Pairs in Annotated are keywords of it; None removes one."""
    if typing.get_origin(hint) is typing.Annotated:
        pairs = {key: list(value) if isinstance(value, tuple) else value for key, value in hint.__metadata__}
        return {key: value for key, value in (_schema(hint.__origin__) | pairs).items() if value is not None}
    if hint is Any:
        return {}
    if hint in SCALARS:
        return dict(SCALARS[hint])
    return _object(hint) if dataclasses.is_dataclass(hint) else _composed(hint)


def _composed(hint: Any) -> dict[str, Any]:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin in (Union, types.UnionType):
        return _union([one for one in arguments if one is not type(None)], type(None) in arguments)
    if origin in (tuple, list):
        return {"type": "array", "items": _schema(arguments[0])}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1])}
    raise TypeError(f"no schema for {hint!r}")


def _union(members: list[Any], has_null: bool) -> dict[str, Any]:
    """Return one schema with several types: minimum, pattern and properties apply to values of their own type only."""
    merged: dict[str, Any] = {}
    names: list[str] = []
    for member in map(_schema, members):
        names.append(member.pop("type"))
        merged |= member
    names += ["null"] if has_null else []
    return {"type": names} | merged


def descriptions(cls: type) -> dict[str, str]:
    """Return the comment of each field: behind the field, otherwise in the lines above it."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__[:-1]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            match = FIELD.match(line)
            if match and (text := match["text"] or " ".join(above)):
                found[match[1]] = text
            above = [*above, line.strip(" #")] if line.startswith("    # ") else []
    return found


if __name__ == "__main__":
    write()
