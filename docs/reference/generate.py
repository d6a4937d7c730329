"""The reference pages, from the code: `make docs` (or `python docs/reference/generate.py`); a test compares.

cli.md from the commands and their help, params.md from the models of `params.py` and the comments of params.yaml,
api.md from the docstrings of what `import unsink` offers.
"""

import inspect
import json
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.markup import render

import unsink
from unsink import registry
from unsink.cli import Call, app
from unsink.errors import UnsinkError
from unsink.params import BENCHMARKS, Params

ROOT = Path(__file__).parents[2]
HEAD = "<!-- Written by `make docs`; edit the code instead. -->"


def pages() -> dict[Path, str]:
    """Every page of the reference with its content."""
    return {Path(__file__).with_name(f"{name}.md"): page() for name, page in PAGES.items()}


# ---- commands


def cli() -> str:
    """All commands, in the order of the help."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    shared = {field.name for field in fields(Call)}
    common = {one.name: one for command in commands.values() for one in command.params if one.name in shared}
    lines = ["# Commands", "", HEAD, "", "## Options that commands share", "", *_options(common.values())]
    lines += ["", "`unsink --install-completion` has the shell complete commands, runs and params keys."]
    for name, command in commands.items():
        text, _, example = render(command.help or "", emoji=False).plain.partition("Example: ")
        own = [one for one in command.params if one.name not in shared]
        less = sorted(f"`{_names(common[field])}`" for field in shared - {one.name for one in command.params})
        lines += ["", f"## unsink {name}", "", " ".join(text.split())]
        lines += ["", "<!-- example -->", "```sh", example.strip(), "```"]
        lines += ["", *_options(own)] if own else []
        lines += ["", f"Has no {', '.join(less)}."] if less else []
    return "\n".join(lines) + "\n"


def _options(options: Any) -> list[str]:
    rows = [
        f"| `{_names(one).replace('|', chr(92) + '|')}` | {' '.join([one.help or '', *_default(one)])} |"
        for one in options
    ]
    return ["| option | what it does |", "|---|---|", *rows]


def _default(option: Any) -> Iterator[str]:
    """What holds without the option, as `--help` says it; a flag is off."""
    if option.required:
        yield "Required."
    elif option.default not in (None, ()) and not getattr(option, "is_flag", False):
        yield f"Default: `{option.default}`."


def _names(option: Any) -> str:
    if option.param_type_name == "argument":
        return str(option.name).upper()
    value = "" if option.is_flag else f" {option.metavar or option.name.upper()}"
    return ", ".join(option.opts) + value


# ---- params


def params() -> str:
    """All keys, with the value and the comment that params.yaml has for them and the values that are allowed."""
    text = (ROOT / "params.yaml").read_text()
    values = yaml.safe_load(text)
    schema = Params.model_json_schema(by_alias=True)
    comments, heads = _comments(text, {name for one in schema["$defs"].values() for name in one.get("properties", ())})
    lines = ["# Parameters", "", HEAD, ""]
    lines += [
        "Keys of `params.yaml`, by section. *Here* is the value in the file that comes with the project, *else* the"
    ]
    lines += ["value of a key that is left out. `-S section.key=value` changes one for one call."]
    for name, section in schema["properties"].items():
        lines += ["", f"## {name}", ""]
        lines += [heads[name], ""] if name in heads else []
        lines += ["| key | here | else | allowed | meaning |", "|---|---|---|---|---|"]
        lines += [*_rows(name, section, schema["$defs"], values.get(name, _MISSING), comments)]
        if name == "unlearn":
            lines += [
                "",
                "Options of a method stand under its name, such as `unlearn.npo.beta`: [methods](../methods.md).",
            ]
        if name == "fetch":
            lines += ["", "Options of a benchmark stand under its name:", "", *_benchmark_rows()]
    return "\n".join(lines) + "\n"


_MISSING = object()
RUN = "runs.<run>"


def _rows(
    key: str, field: Mapping[str, Any], defs: Mapping[str, Any], value: Any, comments: Mapping[str, str]
) -> Iterator[str]:
    inner = defs["RunEntry"] if key == RUN else _section(field, defs)
    if key == "runs":
        yield from _rows(RUN, field, defs, _MISSING, comments)
        return
    if inner is None:
        shown = "" if value is _MISSING else _shown(value)
        default = _shown(field["default"]) if "default" in field else ""
        yield _row(f"`{key}`", shown, default, _allowed(field, defs), comments.get(key, field.get("description", "")))
        return
    if key in comments and "." in key:
        yield _row(f"`{key}`", "", "", "a section", comments[key])
    for name, one in inner["properties"].items():
        below = value.get(name, _MISSING) if isinstance(value, dict) else _MISSING
        yield from _rows(f"{key}.{name}", one, defs, below, comments)


def _row(*cells: str) -> str:
    return f"| {' | '.join(' '.join(cell.replace('|', '·').split()) for cell in cells)} |"


def _benchmark_rows() -> Iterator[str]:
    yield from ("| key | else | allowed | meaning |", "|---|---|---|---|")
    for name in registry.names(BENCHMARKS):
        options = getattr(registry.load("benchmark", BENCHMARKS, name), "Options", None)
        if options is None:
            continue
        schema = options.model_json_schema()
        for key, field in schema["properties"].items():
            allowed = _allowed(field, schema.get("$defs", {}))
            yield _row(f"`fetch.{name}.{key}`", _shown(field.get("default")), allowed, field.get("description", ""))


def _section(field: Mapping[str, Any], defs: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section that a field is, None for a plain value."""
    for one in (field, *field.get("anyOf", ())):
        if "$ref" in one:
            found: Mapping[str, Any] = defs[one["$ref"].rpartition("/")[2]]
            return found if "properties" in found else None
    return None


def _allowed(field: Mapping[str, Any], defs: Mapping[str, Any]) -> str:
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_allowed(one, defs) for one in field["anyOf"]))
    if "$ref" in field:
        return "a section"
    if "enum" in field:
        return ", ".join(f"`{one}`" for one in field["enum"])
    if "const" in field:
        return f"`{field['const']}`"
    kind = field.get("type")
    if kind == "array":
        return f"list of {_allowed(field['items'], defs)}" if "items" in field else "list"
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {field[name]:g}" for name, sign in signs.items() if name in field]
    words = {"integer": "integer", "number": "number", "string": "text", "boolean": "true, false", "null": "null"}
    return " ".join([words.get(str(kind), "section" if kind == "object" else ""), *bounds]).strip()


def _shown(value: Any) -> str:
    if isinstance(value, dict) and value:
        return f"{len(value)} entries"
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def _comments(text: str, names: Container[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Dotted key -> the comment beside it; section -> the comment above it.

    A comment that goes on below its key, and there begins with one of `names` and a colon, is that of this key, which
    the file leaves out.
    """
    lines = text.splitlines()
    keys = {line: key for key, line in _key_lines(yaml.compose(text), "")}
    beside: dict[str, str] = {}
    above: dict[str, str] = {}
    waiting: list[str] = []
    last = ""
    for number, line in enumerate(lines):
        comment = line.partition("# ")[2] if line.lstrip().startswith("#") else line.partition("  # ")[2]
        if number in keys:
            last = keys[number]
            if waiting:
                above[last] = " ".join(waiting)
            waiting = []
            if comment:
                beside[last] = comment
        elif line.startswith("#"):
            waiting.append(comment)
        elif comment and len(line) - len(line.lstrip()) > 20:
            name, colon, rest = comment.partition(": ")
            if colon and name in names:
                last = f"{last.rpartition('.')[0]}.{name}"
                beside[last] = rest
            else:
                beside[last] += f" {comment}"  # goes on below the comment of its key
        elif comment:
            waiting.append(comment)
        elif not line.strip():
            waiting = []
    return {**above, **beside}, {key: text for key, text in above.items() if "." not in key}


def _key_lines(node: Any, prefix: str) -> Iterator[tuple[str, int]]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            yield name, key.start_mark.line
            yield from _key_lines(value, f"{name}.")


# ---- Python


def api() -> str:
    """What `import unsink` offers, from its docstrings."""
    lines = ["# Python", "", HEAD, "", *_docstring(unsink), "", "## Project", ""]
    project = unsink.Project
    lines += [
        "```python",
        f"Project{_signature(project).removesuffix(' -> None')}",
        "```",
        "",
        *_docstring(inspect.getmodule(project)),
    ]
    lines += ["", *_docstring(project)]
    for name, member in vars(project).items():
        if name.startswith("_") or not (inspect.isfunction(member) or isinstance(member, property)):
            continue
        function = member.fget if isinstance(member, property) else member
        signature = "" if isinstance(member, property) else _signature(function)
        lines += ["", f"### {name}", "", "```python", f"Project.{name}{signature}", "```", "", *_docstring(member)]
    lines += [
        "",
        "## console_reporter",
        "",
        "```python",
        f"console_reporter{_signature(unsink.console_reporter)}",
        "```",
    ]
    lines += ["", *_docstring(unsink.console_reporter), "", "## UnsinkError", "", *_docstring(UnsinkError), ""]
    tree = inspect.getdoc(inspect.getmodule(UnsinkError)) or ""
    return "\n".join([*lines, "```text", tree.split("\n\n")[1], "```"]) + "\n"


def _signature(function: Any) -> str:
    found = str(inspect.signature(function)).replace("(self, ", "(").replace("(self)", "()")
    found = re.sub(r"<unsink\.progress\._Silent object at \w+>", "SILENT", found)
    return re.sub(r"\b(unsink\.\w+|collections\.abc|pathlib|typing)\.", "", found)


def _docstring(subject: Any) -> list[str]:
    """A Google docstring as Markdown: `Args:` and its like become lists, other indented lines code."""
    lines: list[str] = []
    section = False
    for line in (inspect.getdoc(subject) or "").splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes):", line):
            section = True
            lines += [f"*{line[:-1]}*", ""]
        elif section and (entry := re.match(r"    (\*{0,2}\w+): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            section = section and (not line or line.startswith("    "))
            lines.append(line.strip() if section else line)
    code = r"(?:^ {4}.*\n(?:\n(?= {4}))?)+"
    text = "\n".join([*lines, ""])
    return re.sub(code, lambda found: f"```python\n{inspect.cleandoc(found[0])}\n```\n", text, flags=re.M).split("\n")[
        :-1
    ]


PAGES = {"cli": cli, "params": params, "api": api}

if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
