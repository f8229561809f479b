"""Read the documentation out of a module's source, and turn docstrings into MyST that cannot break the book.

Nothing is imported: signatures and docstrings come from the syntax tree, so a page needs none of the packages that the
module needs. Docstrings are plain text with a little Markdown or reST in it. What is understood (lists, code, formulas,
the sections of Google's style) is laid out; everything else is escaped, so that any text at all gives a valid page.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LINE = 88


@dataclass(frozen=True)
class Entry:
    """A public class, function or method."""

    name: str
    kind: str  # "class", "function", "method" or "property"
    signature: str
    doc: str
    first: int
    last: int
    members: tuple[Entry, ...] = ()


@dataclass(frozen=True)
class Module:
    """What a module's source says about itself."""

    doc: str
    entries: tuple[Entry, ...]
    lines: int
    example: str = ""  # what stands under "Example:" in the docstring, as a script; `doc` is without it


def read(path: Path) -> Module:
    """Docstring and public API of a module; ``__all__`` decides what is public where there is one."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source, filename=str(path))
    listed = _all(tree)
    public = [
        node
        for node in tree.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.name in listed if listed is not None else not node.name.startswith("_"))
    ]
    entries = tuple(_class(node) if isinstance(node, ast.ClassDef) else _function(node, "function") for node in public)
    doc, example = split_example(ast.get_docstring(tree) or "")
    return Module(doc, entries, len(source.splitlines()), example)


def _all(tree: ast.Module) -> set[str] | None:
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            try:
                return set(ast.literal_eval(node.value))
            except ValueError:
                return None
    return None


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, kind: str) -> Entry:
    decorators = {ast.unparse(d) for d in node.decorator_list}
    if kind == "method" and decorators & {"property", "functools.cached_property", "cached_property"}:
        kind, head = "property", node.name + (f" -> {ast.unparse(node.returns)}" if node.returns else "")
    else:
        drop = kind == "method" and "staticmethod" not in decorators
        head = f"{node.name}{_arguments(node.args, drop, node.returns, len(node.name))}"
    return Entry(node.name, kind, head, ast.get_docstring(node) or "", node.lineno, node.end_lineno or node.lineno)


def _class(node: ast.ClassDef) -> Entry:
    methods = [n for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    init = next((m for m in methods if m.name == "__init__"), None)
    bases = ", ".join(ast.unparse(b) for b in node.bases)
    if init is not None:
        arguments = _arguments(init.args, True, None, len(node.name) + 6)
    elif fields := _fields(node):
        arguments = _wrap(fields, "", len(node.name) + 6)
    else:
        arguments = ""
    doc = ast.get_docstring(node) or ""
    if init is not None and (more := ast.get_docstring(init)):
        doc = f"{doc}\n\n{more}".strip()
    members = tuple(_function(m, "method") for m in methods if not m.name.startswith("_") and ast.get_docstring(m))
    signature = f"class {node.name}{arguments}" + (f"  # {bases}" if bases else "")
    return Entry(node.name, "class", signature, doc, node.lineno, node.end_lineno or node.lineno, members)


def _fields(node: ast.ClassDef) -> list[str]:
    """The constructor's arguments of a dataclass or a named tuple."""
    made = {ast.unparse(d).split("(")[0].split(".")[-1] for d in node.decorator_list} & {"dataclass"}
    if not made and not any(ast.unparse(b).split(".")[-1] == "NamedTuple" for b in node.bases):
        return []
    return [
        f"{n.target.id}: {ast.unparse(n.annotation)}" + (f" = {ast.unparse(n.value)}" if n.value else "")
        for n in node.body
        if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name) and not n.target.id.startswith("_")
    ]


def _arguments(arguments: ast.arguments, drop_first: bool, returns: ast.expr | None, used: int) -> str:
    """``(a, b=1, *, c)`` with defaults and annotations, one a line where it would be long."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    parts = []
    for i, (arg, default) in enumerate(zip(positional, defaults, strict=True)):
        if i == 0 and drop_first:
            continue
        parts.append(_argument(arg, default))
        if arguments.posonlyargs and i == len(arguments.posonlyargs) - 1:
            parts.append("/")
    if arguments.vararg:
        parts.append("*" + _argument(arguments.vararg, None))
    elif arguments.kwonlyargs:
        parts.append("*")
    parts += [_argument(a, d) for a, d in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    if arguments.kwarg:
        parts.append("**" + _argument(arguments.kwarg, None))
    return _wrap(parts, f" -> {ast.unparse(returns)}" if returns else "", used)


def _argument(arg: ast.arg, default: ast.expr | None) -> str:
    note = f": {ast.unparse(arg.annotation)}" if arg.annotation else ""
    if default is None:
        return arg.arg + note
    return f"{arg.arg}{note} = {ast.unparse(default)}" if note else f"{arg.arg}={ast.unparse(default)}"


def _wrap(parts: list[str], tail: str, used: int) -> str:
    line = f"({', '.join(parts)}){tail}"
    if used + len(line) <= LINE or not parts:
        return line
    return "(\n" + "".join(f"    {part},\n" for part in parts) + f"){tail}"


# --- docstrings to MyST -----------------------------------------------------------------------------------------------

_ITEM = re.compile(r"^(?:([-*•])|(?:\(?(\d{1,2})[.)]))\s+(?=\S)")
_SECTION = re.compile(
    r"^(Args|Arguments|Parameters|Keyword Args|Returns|Yields|Raises|Attributes|Shapes?|Examples?|Notes?|References?|See Also):$"
)
_HEADING = re.compile(
    r"^(deviations?|later work|what later work found|what later work says|later findings|equations?|maths|the maths|idea|the idea|references?|notes?|algorithm|"
    r"shapes?|conventions?|limits|limitations|in this library|interface)\b([^.:]{0,60})[.:](?:\s+|$)",
    re.IGNORECASE,
)
_TOKEN = re.compile(
    r"(?P<code>``(?P<code2>[^`]+)``|(?::[a-z:]+:)?`(?P<code1>[^`\n]+)`)"
    r"|(?P<math>(?<![\\$\w])\$(?=[^\s$])(?P<tex>(?:[^$\\]|\\.)*?[^\s\\$]|[^\s\\$])\$(?![\d$\w]))"
    r"|(?P<paren>\\\((?P<tex2>.+?)\\\))"
    r"|(?P<link>\[(?P<label>[^\]\n]+)\]\((?P<to>https?://[^)\s]+)\))"
    r"|(?P<bold>(?<![\w*])\*\*(?=\S)(?P<strong>[^*\n]+?)(?<=\S)\*\*(?![\w*]))"
    r"|(?P<em>(?<![\w*])\*(?=[^\s*])(?P<emph>[^*\n]+?)(?<=[^\s*])\*(?![\w*]))"
    r"|(?P<url>https?://[^\s<>()\[\]\"']+[^\s<>()\[\]\"'.,;:])"
    r"|(?P<arxiv>arXiv[: ](?P<id>\d{4}\.\d{4,5})(?:v\d+)?)",
    re.DOTALL,
)
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|$&~^!])")


def escape(text: str) -> str:
    """Text as Markdown that shows exactly these characters."""
    return _SPECIAL.sub(r"\\\1", text)


def inline(text: str) -> str:
    """One paragraph's text as MyST: code, formulas, links and emphasis are kept, the rest is escaped."""
    text = " ".join(text.split())
    out, at = [], 0
    for match in _TOKEN.finditer(text):
        out.append(escape(text[at : match.start()]))
        at = match.end()
        group = match.groupdict()
        if group["code"]:
            content = (group["code2"] or group["code1"]).strip()
            out.append(_code(content.removeprefix("~").rpartition(".")[2] if match[0].startswith(":") else content))
        elif group["math"] or group["paren"]:
            tex = group["tex"] or group["tex2"]
            out.append(f"${tex.strip()}$" if _balanced(tex) and "`" not in tex else escape(match[0]))
        elif group["link"]:
            out.append(f"[{escape(group['label'])}](<{group['to']}>)")
        elif group["bold"]:
            out.append(f"**{escape(group['strong'])}**")
        elif group["em"]:
            out.append(f"*{escape(group['emph'])}*")
        elif group["url"]:
            out.append(f"<{group['url']}>")
        else:
            out.append(f"[{match[0]}](https://arxiv.org/abs/{group['id']})")
    out.append(escape(text[at:]))
    # At the start of a line these begin a list, a definition, a directive or a comment.
    return re.sub(r"^([-+:%=]|\d+(?=[.)]))", lambda m: m[1] + "&#8203;" if m[1].isdigit() else "\\" + m[1], "".join(out))


def _code(content: str) -> str:
    content = content.replace("`", "'")
    return f"`{content}`" if content else ""


def _balanced(tex: str) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", tex):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def first_paragraph(doc: str) -> str:
    """The idea: the docstring's first paragraph; a title line that ends with the paper's key or name does not count."""
    return split_idea(doc)[0]


def split_idea(doc: str) -> tuple[str, str]:
    """(idea, rest) of a module docstring, both plain text.

    The first paragraph is the idea. Where it is a short title ("AMSGrad (reddi2018amsgrad)."), the next one is, unless that
    is a list, a formula or a section.
    """
    paragraphs = re.split(r"\n[ \t]*\n", inspect.cleandoc(doc).strip("\n"))
    if not paragraphs or not paragraphs[0].strip():
        return "", ""
    take = 1
    if len(paragraphs) > 1 and len(" ".join(paragraphs[0].split())) < 140:
        following = paragraphs[1]
        plain = not following.startswith((" ", "$$", "..", ">>>", "```")) and not _ITEM.match(following) and not _HEADING.match(following)
        if plain and "\n" in following.strip("\n") and not _underlined(following.splitlines(), 0):
            take = 2
    return "\n\n".join(paragraphs[:take]), "\n\n".join(paragraphs[take:])


def split_example(doc: str) -> tuple[str, str]:
    """(the docstring without its example, the example as a script); the example is the indented block under ``Example:``."""
    lines = inspect.cleandoc(doc).splitlines()
    if "Example:" not in lines:
        return doc, ""
    at = lines.index("Example:")
    end = _indented_until(lines, at + 1)
    script = "\n".join(_dedent(lines[at + 1 : end])).strip("\n")
    return "\n".join([*lines[:at], *lines[end:]]).strip("\n"), script


def to_myst(doc: str, *, level: int = 3) -> str:
    """A docstring as MyST. Section titles become headings of this level; level 0 makes them bold text instead."""
    return "\n\n".join(_blocks(inspect.cleandoc(doc).splitlines(), level)) + "\n" if doc.strip() else ""


def _blocks(lines: list[str], level: int) -> Iterator[str]:
    lines = [line.expandtabs().rstrip() for line in lines]
    i = 0
    while i < len(lines):
        line = lines[i]
        if not line.strip():
            i += 1
        elif line.lstrip().startswith("```"):
            end = next((k for k in range(i + 1, len(lines)) if lines[k].strip().startswith("```")), len(lines))
            language = line.strip().strip("`").strip()
            yield _fence(_dedent(lines[i + 1 : end]), language if language in {"python", "text", "bash", "console"} else "text")
            i = end + 1
        elif line.lstrip().startswith("$$"):
            end, formula = _display(lines, i)
            yield _formula(formula) if formula is not None else inline("\n".join(lines[i:end]))
            i = end
        elif line.lstrip().startswith(">>>"):
            end = next((k for k in range(i, len(lines)) if not lines[k].strip()), len(lines))
            yield _fence(_dedent(lines[i:end]), "python")
            i = end
        elif match := re.match(r"^\.\. ([a-z:-]+)::\s*(.*)$", line):
            end = _indented_until(lines, i + 1)
            body = _dedent(lines[i + 1 : end])
            yield from _directive(match[1], match[2], body)
            i = end
        elif line.startswith(" "):
            end = _indented_until(lines, i)
            yield from _indented(_dedent(lines[i:end]), level)
            i = end
        elif _underlined(lines, i):
            yield _title(line.strip(), level)
            i += 2
        elif match := _SECTION.match(line):
            end = _indented_until(lines, i + 1)
            yield from _section(match[1], _dedent(lines[i + 1 : end]), level)
            i = end
        elif _ITEM.match(line):
            end = i
            items = []
            while end < len(lines) and (match := _ITEM.match(lines[end])):
                stop = _item_end(lines, end + 1)
                items.append((match[2], [lines[end][match.end() :], *_dedent(lines[end + 1 : stop])]))
                end = stop
                while end < len(lines) and not lines[end].strip():
                    end += 1
            yield _list(items)
            i = end
        else:
            end = i + 1
            while end < len(lines) and lines[end].strip() and not lines[end].startswith("  ") and not _starts_block(lines, end):
                end += 1
            yield from _paragraph(lines[i:end], level)
            i = end


def _starts_block(lines: list[str], i: int) -> bool:
    line = lines[i]
    bullet = _ITEM.match(line)
    return bool(
        line.startswith(("```", "$$", ">>>", ".. "))
        or _SECTION.match(line)
        or (bullet and (lines[i - 1].endswith(":") or bullet[2] == "1" or bullet[1] == "-"))
    )


def _paragraph(lines: list[str], level: int) -> Iterator[str]:
    text = " ".join(line.strip() for line in lines)
    if text.endswith("::"):
        text = text[:-1]
    if match := _HEADING.match(text):
        rest = text[match.end() :].strip()
        # "Deviations from the paper:" is a title; "Notes on x.y" in the middle of a sentence is not.
        if not rest or rest[0].isupper() or rest[0] in "($`\\" or text[match.end() - 1 : match.end()].isspace():
            yield _title(f"{match[1]}{match[2]}".strip(), level)
            if rest:
                yield inline(rest)
            return
    yield inline(text)


def _title(text: str, level: int) -> str:
    text = inline(text.rstrip(":."))
    return f"{'#' * level} {text}" if level else f"**{text}**"


def _underlined(lines: list[str], i: int) -> bool:
    return (
        i + 1 < len(lines)
        and bool(lines[i].strip())
        and bool(re.fullmatch(r"([-=~^\"'#*])\1{2,}", lines[i + 1].strip()))
        and not lines[i].startswith(" ")
    )


def _indented_until(lines: list[str], i: int) -> int:
    while i < len(lines) and (not lines[i].strip() or lines[i].startswith(" ")):
        i += 1
    while i > 0 and not lines[i - 1].strip():
        i -= 1
    return i


def _item_end(lines: list[str], i: int) -> int:
    """Where a list item ends: at the next item, or at text that is not indented after a blank line."""
    while i < len(lines):
        if not lines[i].strip():
            if not (i + 1 < len(lines) and lines[i + 1].startswith("  ")):
                return i
        elif not lines[i].startswith(" ") and (
            _ITEM.match(lines[i]) or _SECTION.match(lines[i]) or _HEADING.match(lines[i]) or _underlined(lines, i)
        ):
            return i
        i += 1
    return i


def _indented(lines: list[str], level: int) -> Iterator[str]:
    """An indented block is a list, prose, or something whose layout matters, such as a formula in plain text."""
    text = "\n".join(lines)
    if (lines and (_ITEM.match(lines[0]) or lines[0].startswith((">>>", "$$", "```")) or _SECTION.match(lines[0]))) or (
        not re.search(r"[=<>^\\{}|]|->|[ \t]{2,}\S|[∑∏∫√≤≥←→·]", text) and re.search(r"[.;:]$", text) and len(text.split()) > 7
    ):
        yield from _blocks(lines, level)
    else:
        yield _fence(lines, "text")


def _directive(name: str, argument: str, body: list[str]) -> Iterator[str]:
    content = [line for line in body if not re.match(r"^:[a-z-]+:", line)]
    if name == "math":
        yield _formula("\n".join([argument, *content]))
    elif name in {"code-block", "code", "testcode", "sourcecode"}:
        yield _fence(content, "python")
    elif name in {"note", "warning", "admonition", "seealso", "tip"}:
        yield from _blocks([*([argument] if argument else []), *content], 0)
    else:
        yield _fence([f".. {name}:: {argument}".rstrip(), *("   " + line for line in body)], "text")


def _section(name: str, lines: list[str], level: int) -> Iterator[str]:
    """A section of Google's style."""
    if name.startswith("Example"):
        yield f"**{name}**"
        yield _fence(lines, "python") if lines and lines[0].startswith(">>>") else "\n\n".join(_blocks(lines, 0))
        return
    yield f"**{'Arguments' if name == 'Args' else name}**"
    if name in {"Notes", "Note", "References", "Reference", "Shape", "Shapes", "See Also"} and not _fields_of(lines):
        yield from _blocks(lines, 0)
        return
    entries = _fields_of(lines) if name not in {"Returns", "Yields"} else None
    if not entries:
        yield from _blocks(lines, 0)
        return
    yield "\n".join(f"- {_code(label)}: {inline(text)}" if text else f"- {_code(label)}" for label, text in entries)


def _fields_of(lines: list[str]) -> list[tuple[str, str]] | None:
    """``name (type): text`` entries with continuation lines; None where the lines are something else."""
    entries: list[tuple[str, str]] = []
    for line in lines:
        if not line.strip():
            continue
        if not line.startswith(" ") and (match := re.match(r"^(\*{0,2}[\w., *`\[\]|]+?(?:\s*\([^)]*\))?):\s*(.*)$", line)):
            entries.append((match[1].replace("`", "").strip(), match[2]))
        elif entries:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
        else:
            return None
    return entries or None


def _list(items: list[tuple[str | None, list[str]]]) -> str:
    out = []
    ordered = items[0][0] is not None
    for n, (number, body) in enumerate(items, int(items[0][0] or 1)):
        marker = f"{n}." if ordered else "-"
        content = "\n\n".join(_blocks([body[0].strip(), *body[1:]], 0)) or "\u200b"
        del number
        pad = " " * (len(marker) + 1)
        out.append(f"{marker} " + "\n".join(pad + line if line and k else line for k, line in enumerate(content.splitlines())))
    return "\n".join(out)


def _display(lines: list[str], i: int) -> tuple[int, str | None]:
    """(end, formula) of the ``$$`` block that begins at line `i`; no formula where it does not close."""
    text = ""
    for k in range(i, len(lines)):
        if k > i and not lines[k].strip():
            break
        text += lines[k].strip() + "\n"
        stripped = text.strip()
        if len(stripped) > 3 and stripped.endswith("$$"):
            inner = stripped[2:-2].strip()
            return (k + 1, inner) if inner and "$" not in inner.replace(r"\$", "") and _balanced(inner) else (k + 1, None)
    end = next((k for k in range(i, len(lines)) if not lines[k].strip()), len(lines))
    return end, None


def _formula(tex: str) -> str:
    tex = "\n".join(line.strip() for line in tex.splitlines() if line.strip())
    return f"```{{math}}\n{tex}\n```" if tex and _balanced(tex) and "```" not in tex else _fence(tex.splitlines(), "text")


def _fence(lines: list[str], language: str) -> str:
    while lines and not lines[0].strip():
        lines = lines[1:]
    while lines and not lines[-1].strip():
        lines = lines[:-1]
    if language == "python" and not _is_python(lines):
        language = "text"
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", "\n".join(lines))), default=0))
    return f"{ticks}{language}\n" + "\n".join(lines) + f"\n{ticks}"


def _is_python(lines: list[str]) -> bool:
    """Whether the highlighter will accept it: it warns, and a warning fails the build."""
    text = (
        "\n".join(line[4:] for line in lines if line.startswith((">>> ", "... ")))
        if any(line.startswith(">>>") for line in lines)
        else "\n".join(lines)
    )
    try:
        ast.parse(inspect.cleandoc(text))
    except (SyntaxError, ValueError):
        return False
    return True


def _dedent(lines: list[str]) -> list[str]:
    margin = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    return [line[margin:] for line in lines]
