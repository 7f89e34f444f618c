"""Pages that mkdocs writes while it builds: the HTTP API from the application's own OpenAPI document, and the settings.

Nothing in them is typed by hand, so nothing in them can be out of date. docker/README.md, which lies outside of docs/,
becomes a page too. Knows no models: none is loaded.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from service.__main__ import SECRETS
from service.app import create_app
from service.settings import PREFIX, Settings

Schema = Mapping[str, Any]
CONTAINERS = "containers.md"
REFERENCE = "#/components/schemas/"
API_INTRO = """# HTTP API

Written from the service's own OpenAPI document when these pages were built: [openapi.json](openapi.json). A running
service shows its own at `/openapi.json`, and a page to try it on at `/`. All under `/admin` needs the admin key.
"""
SETTINGS_INTRO = """# Settings

Each is an environment variable and a flag of `python -m service` and `scaledown serve`; a flag wins. Secrets are
variables only, because a list of processes shows flags. A variable that is misspelt is refused at the start.

| variable | flag | default | |
|---|---|---|---|
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages to those in the folder."""
    document = create_app(Settings()).openapi()
    containers = Path(config.docs_dir).parent / "docker" / "README.md"
    contents = {
        "api.md": api_page(document),
        "openapi.json": json.dumps(document, indent=1),
        "settings.md": settings_page(),
        CONTAINERS: containers.read_text(encoding="utf-8").replace("(../docs/", "("),
    }
    for name, content in contents.items():
        files.append(File.generated(config, name, content=content))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to docker/README.md, as they are where a page lies, lead to its page."""
    return markdown.replace("(../docker/README.md", f"({CONTAINERS}")


def settings_page() -> str:
    """All settings as one table."""
    return SETTINGS_INTRO + "".join(_settings_rows())


def _settings_rows() -> Iterator[str]:
    for name, field in Settings.model_fields.items():
        flag = "none" if name in SECRETS else f"`--{name.replace('_', '-')}`"
        default = "unset" if field.default in (None, "", ()) else f"`{field.default}`"
        yield f"| `{PREFIX}{name.upper()}` | {flag} | {default} | {cell(field.description)} |\n"


def api_page(document: Schema) -> str:
    """Every path with its bodies, and every schema with its fields."""
    parts = [API_INTRO, "## Paths\n"]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    parts.append("## Schemas\n")
    parts += [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    return "\n".join(parts)


def _operation(path: str, method: str, operation: Schema) -> str:
    lines = [f"### {method.upper()} `{path}`\n", operation.get("description") or operation.get("summary", ""), ""]
    if body := operation.get("requestBody"):
        lines.append(f"Takes {_content(body)}.\n")
    lines += ["| status | body | |", "|---|---|---|"]
    for status, response in operation["responses"].items():
        lines.append(f"| {status} | {_content(response)} | {cell(response.get('description'))} |")
    return "\n".join([*lines, ""])


def _content(holder: Schema) -> str:
    """What a body is, for each of its media types; many statuses have none."""
    return " or ".join(
        type_of(value["schema"]) if kind == "application/json" else f"`{kind}`"
        for kind, value in holder.get("content", {}).items()
        if value.get("schema") or kind != "application/json"
    )


def _schema(name: str, schema: Schema) -> str:
    lines = [f"### {name} {{ #{anchor(name)} }}\n", schema.get("description", ""), ""]
    if fields := schema.get("properties"):
        required = schema.get("required", ())
        lines += ["| field | type | default | |", "|---|---|---|---|"]
        for field, value in fields.items():
            default = "required" if field in required else f"`{json.dumps(value.get('default'), ensure_ascii=False)}`"
            lines.append(f"| `{field}` | {type_of(value)} | {default} | {cell(description_of(value))} |")
    else:
        lines.append(type_of(schema))
    return "\n".join([*lines, ""])


def description_of(schema: Schema) -> str | None:
    """What a field is for. Of one that may be null it is said where its other type is."""
    found: str | None = schema.get("description")
    return found or next(filter(None, map(description_of, schema.get("anyOf", ()))), None)


def type_of(schema: Schema) -> str:
    """A schema in words: a link where it has a name of its own."""
    if reference := schema.get("$ref"):
        name = reference.removeprefix(REFERENCE)
        return f"[{name}](#{anchor(name)})"
    if choices := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(dict.fromkeys(map(type_of, choices)))
    if "const" in schema or "enum" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        return " or ".join(f"`{json.dumps(value)}`" for value in values)
    if schema.get("type") == "array":
        return f"list of {type_of(schema['items'])}" if schema.get("items") else "list"
    values = schema.get("additionalProperties")
    if schema.get("type") == "object" and isinstance(values, Mapping):
        return f"object of {type_of(values)}"
    return str(schema.get("type", "any")) + _bounds(schema)


def _bounds(schema: Schema) -> str:
    signs = {"minimum": "≥ ", "exclusiveMinimum": "> ", "maximum": "≤ ", "exclusiveMaximum": "< "}
    number = int if schema.get("type") == "integer" else "{:g}".format  # in the document all are floats
    bounds = [f"{sign}{number(schema[key])}" for key, sign in signs.items() if key in schema]
    return f" ({', '.join(bounds)})" if bounds else ""


def anchor(name: str) -> str:
    """Where a schema stands on the page."""
    return f"schema-{name.lower()}"


def cell(text: str | None) -> str:
    """A text that may stand in a table."""
    return " ".join((text or "").split()).replace("|", "\\|")
