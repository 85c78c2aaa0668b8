"""docs/manifest.md: every record and field of manifest.json, from the records of ivc_export.contract."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ivc_export.contract import manifest, preprocessing
from ivc_export.contract.manifest import Manifest
from ivc_export.contract.records import INT32_MOST, Frozen

Schema = Mapping[str, Any]
HEX64 = "^[0-9a-f]{64}$"


def manifest_doc() -> str:
    """The whole file."""
    lines = [
        "# The manifest",
        "",
        "This page is generated from the records in `ivc_export/contract/`: change those, then run `make generate`.",
        "",
        "`manifest.json` is one JSON object, the record [Manifest](#manifest). A field with a default may be absent in "
        "bundles of older versions. [Write a runtime](runtime.md#the-manifest) "
        "says what a runtime does with the fields.",
    ]
    for record in records():
        lines += ["", f"## {record.__name__}", "", *about(record), "", *table(record)]
    return "\n".join(lines) + "\n"


def records() -> list[type[Frozen]]:
    """Manifest, and every record within it, in the order in which fields name them."""
    definitions = Manifest.model_json_schema()["$defs"]
    names, waiting = list[str](), [Manifest.__name__]
    while waiting:
        name = waiting.pop(0)
        names.append(name)
        schema = Manifest.model_json_schema() if name == Manifest.__name__ else definitions[name]
        waiting += [one for one in dict.fromkeys(references(schema["properties"])) if one not in {*names, *waiting}]
    return [getattr(manifest, name, None) or getattr(preprocessing, name) for name in names]


def references(schema: Any) -> Iterator[str]:
    """Names of the records that a schema names, in order."""
    if isinstance(schema, Mapping):
        if "$ref" in schema:
            yield schema["$ref"].rpartition("/")[2]
        for key, value in schema.items():
            if key != "discriminator":
                yield from references(value)
    elif isinstance(schema, list):
        for value in schema:
            yield from references(value)


def about(record: type[Frozen]) -> list[str]:
    """What the record is, as its docstring says."""
    return inspect.cleandoc(record.__doc__ or "").split("\n")


def table(record: type[Frozen]) -> Iterator[str]:
    """One line for each field."""
    schema, meanings = record.model_json_schema(), field_docs(record)
    yield from ("| field | type | default | meaning |", "| --- | --- | --- | --- |")
    for name, facts in schema["properties"].items():
        default = "required" if name in schema.get("required", ()) else f"`{json.dumps(facts.get('default', {}))}`"
        yield f"| `{name}` | {kind(facts)} | {default} | {meanings[name].replace('None', '`null`')} |"


def field_docs(record: type[Frozen]) -> dict[str, str]:
    """The strings behind a record's fields, and those of the records that it extends, on one line each."""
    found: dict[str, str] = {}
    for owner in reversed(record.__mro__):
        if issubclass(owner, Frozen) and owner is not Frozen:
            body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0]
            assert isinstance(body, ast.ClassDef)
            for field, behind in zip(body.body, body.body[1:], strict=False):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    text = behind.value if isinstance(behind, ast.Expr) else None
                    if isinstance(text, ast.Constant) and isinstance(text.value, str):
                        found[field.target.id] = " ".join(text.value.split())
    return found


def undocumented() -> list[str]:
    """Fields without a string behind them."""
    return [
        f"{record.__name__}.{name}"
        for record in records()
        for name in record.model_fields
        if not field_docs(record).get(name)
    ]


def kind(schema: Schema) -> str:
    """What a field may hold, in words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    choices = schema.get("anyOf") or schema.get("oneOf")
    if choices:
        return " or ".join(map(kind, choices))
    if "const" in schema or "enum" in schema:
        return " or ".join(f'`"{value}"`' if isinstance(value, str) else f"`{value}`" for value in values(schema))
    by_type: dict[str, Callable[[], str]] = {
        "null": lambda: "null",
        "boolean": lambda: "true or false",
        "string": lambda: "64 hexadecimal digits" if schema.get("pattern") == HEX64 else "text",
        "integer": lambda: f"integer{bounds(schema)}",
        "number": lambda: f"number{bounds(schema)}",
        "array": lambda: items(schema),
        "object": lambda: entries(schema),
    }
    return by_type[schema["type"]]()


def values(schema: Schema) -> list[Any]:
    """The few values that a field may have."""
    return [schema["const"]] if "const" in schema else schema["enum"]


def bounds(schema: Schema) -> str:
    """Least and largest value, and what a number is a multiple of."""
    parts = []
    for key, words in (("minimum", "at least"), ("exclusiveMinimum", "above")):
        parts += [f"{words} {grouped(schema[key])}"] if key in schema else []
    if "maximum" in schema:
        most = schema["maximum"]
        parts.append("below 2^31" if most == INT32_MOST else f"at most {grouped(most)}")
    parts += [f"a multiple of {schema['multipleOf']}"] if "multipleOf" in schema else []
    return f" ({', '.join(parts)})" if parts else ""


def grouped(number: float) -> str:
    """A number in short: whole ones with their thousands apart."""
    return f"{int(number):,}" if number == int(number) else f"{number:g}"


def items(schema: Schema) -> str:
    """What a list holds."""
    if "prefixItems" in schema:
        each = list(dict.fromkeys(map(kind, schema["prefixItems"])))
        return f"list of {len(schema['prefixItems'])}: {each[0]}" if len(each) == 1 else f"[{', '.join(each)}]"
    least, most = schema.get("minItems"), schema.get("maxItems")
    length = f" of {least} to {most:,}" if least is not None and most is not None else ""
    return f"list{length}: {kind(schema['items'])}"


def entries(schema: Schema) -> str:
    """What an object holds by names that are no fields."""
    names = schema.get("propertyNames", {}).get("enum")
    keys = f" with the keys {', '.join(f'`{name}`' for name in names)}" if names else ""
    return f"object{keys}: {kind(schema['additionalProperties'])}"
