"""Modules of ours as one Python file that stands alone: what an exported pipeline computes with, without this package.

A module is taken with the definitions of ours that it needs, and those that they need, wherever they lie; the text is that of
the sources, comments included, so there is no second copy to keep. Of what annotations alone name, libraries are imported and
ours is not taken: the file postpones them. What a definition needs is found by its names, so a module may not reach into
another by way of strings.
"""

import ast
import builtins
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from trainer.config import CODE_ROOT

OURS = ("trainer", "data", "launch", "ops")
LIBRARIES = {"torch", "diffusers", "transformers", "numpy", "PIL"}
"""What the file may import beside Python's own modules."""


@dataclass(frozen=True)
class Symbol:
    """A name at the top of one of our modules."""

    module: str
    name: str


SUBSTITUTES = {("einops", "rearrange"): Symbol("trainer.export.portable.relayout", "rearrange")}
"""Of packages that plain diffusers does not bring."""


@dataclass(frozen=True)
class Edit:
    begin: int
    end: int
    text: str


@dataclass
class Module:
    name: str
    source: str
    tree: ast.Module = field(init=False)

    def __post_init__(self) -> None:
        self.tree = ast.parse(self.source)

    @cached_property
    def definitions(self) -> dict[str, list[ast.stmt]]:
        """Statements that define each name, with the text that documents it."""
        found: dict[str, list[ast.stmt]] = {}
        body = self.tree.body
        for i, node in enumerate(body):
            names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [
                target.id for target in _targets(node) if isinstance(target, ast.Name)
            ]  # fmt: skip
            documented = (
                i + 1 < len(body) and _is_text(body[i + 1]) and not isinstance(node, ast.FunctionDef | ast.ClassDef)
            )
            for name in names:
                found.setdefault(name, []).extend([node, body[i + 1]] if documented else [node])
        return found

    @cached_property
    def imports(self) -> dict[str, tuple[str, str | None]]:
        """What each imported name is: (module, name in it), or (module, None)."""
        return dict(_imported(node for node in self.tree.body if isinstance(node, ast.Import | ast.ImportFrom)))

    @cached_property
    def starts(self) -> list[int]:
        """Byte offset of each line."""
        starts = [0]
        for line in self.source.encode().splitlines(keepends=True):
            starts.append(starts[-1] + len(line))
        return starts

    def span(self, node: Any) -> tuple[int, int]:
        """Its bytes in the source, decorators included."""
        decorators = getattr(node, "decorator_list", [])
        first, at = (decorators[0], -1) if decorators else (node, 0)
        begin = self.starts[first.lineno - 1] + first.col_offset + at
        return begin, self.starts[node.end_lineno - 1] + node.end_col_offset


class Bundler:
    """
    Args:
        stubs: functions that are not taken, because nothing calls them in the file.
    """

    def __init__(self, stubs: Sequence[Symbol] = ()) -> None:
        self._stubs = set(stubs)
        self._modules: dict[str, Module] = {}
        self._needed: dict[Symbol, list[Edit]] = {}
        """With what is to change in their text."""
        self._libraries: dict[str, tuple[str, str | None]] = {}
        self._aliases: dict[str, str] = {}
        self._order: list[str] = []

    def need(self, symbol: Symbol) -> str:
        """Take a definition, and what it needs; the name that it has in the file."""
        module = self._module(symbol.module)
        if symbol.name not in module.definitions:
            assert symbol.name in module.imports, f"{symbol.module} has no {symbol.name}"
            return self._of_import(*module.imports[symbol.name], symbol.name) or symbol.name
        if symbol not in self._needed:
            taken = next((other for other in self._needed if other.name == symbol.name), None)
            assert taken is None, f"{symbol.name} is in {symbol.module} and in {taken}; give one another name"
            self._needed[symbol] = []
            if symbol not in self._stubs:
                for node in module.definitions[symbol.name]:
                    self._needed[symbol] += self._follow(module, node)
        return symbol.name

    def need_module(self, name: str) -> None:
        """All that a module defines."""
        for defined in self._module(name).definitions:
            self.need(Symbol(name, defined))

    def text(self, title: str, tail: Sequence[str] = ()) -> str:
        """The file. `tail`: statements behind the definitions."""
        head = ["from __future__ import annotations", "", *self._import_lines()]
        parts = [f'"""{title}"""', "\n".join(head)]
        for name in self._order:
            module = self._modules[name]
            written: set[int] = set()
            for defined, nodes in module.definitions.items():
                symbol = Symbol(name, defined)
                if symbol not in self._needed or id(nodes[0]) in written:
                    continue
                written.add(id(nodes[0]))
                if symbol in self._stubs:
                    parts.append(f"def {defined}(*_: object, **__: object) -> None:\n    raise NotImplementedError")
                else:
                    edits = self._needed[symbol]
                    parts.append("\n".join(self._segment(module, node, edits) for node in nodes))
        parts += [f"{alias} = {name}" for alias, name in self._aliases.items()]
        return "\n\n\n".join([*parts, *(["\n".join(tail)] if tail else [])]) + "\n"

    # ------------------------------------------------------------------------------------------------- what is needed

    def _module(self, name: str) -> Module:
        if name not in self._modules:
            path = CODE_ROOT.joinpath(*name.split("."))
            file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            module = self._modules[name] = Module(name, Path(file).read_text(encoding="utf-8"))
            for origin, symbol in module.imports.values():
                whole = f"{origin}.{symbol}"
                if _is_ours(origin) and _exists(whole if _exists(whole) else origin):
                    self._module(whole if _exists(whole) else origin)
            self._order.append(name)  # behind those whose names it may use while it is being run
        return self._modules[name]

    def _follow(self, module: Module, node: ast.stmt) -> list[Edit]:
        """Take what a statement needs; what is to change in its text."""
        for name in _annotated(node) & module.imports.keys():
            if not _is_ours(module.imports[name][0]):
                self._of_import(*module.imports[name], name)
        inner = [part for part in ast.walk(node) if isinstance(part, ast.Import | ast.ImportFrom)]
        inside = dict(_imported(inner))
        edits = []
        for part in inner:
            origins = {origin for origin, _ in dict(_imported([part])).values()}
            if any(map(_is_ours, origins)):
                edits.append(Edit(*module.span(part), "pass"))
        for name, origin in inside.items():
            if _is_ours(origin[0]):
                self._of_import(*origin, name)
        for used in _used(node):
            if isinstance(used, ast.Attribute):
                assert isinstance(used.value, ast.Name)
                whole = self._module_named(module, inside, used.value.id)
                if whole:
                    edits.append(Edit(*module.span(used), self.need(Symbol(whole, used.attr))))
            elif used.id in module.definitions:
                self.need(Symbol(module.name, used.id))
            elif used.id in module.imports and used.id not in inside and not self._module_named(module, {}, used.id):
                self._of_import(*module.imports[used.id], used.id)
        return edits

    def _module_named(self, module: Module, inside: dict[str, tuple[str, str | None]], name: str) -> str | None:
        """The module of ours that a name stands for, as `draws` of `from data import draws`."""
        origin = inside.get(name) or module.imports.get(name)
        if origin is None or not _is_ours(origin[0]) or origin[1] is None:
            return None
        whole = f"{origin[0]}.{origin[1]}"
        return whole if _exists(whole) else None

    def _of_import(self, origin: str, name: str | None, alias: str) -> str | None:
        substitute = SUBSTITUTES.get((origin, name or ""))
        if substitute:
            origin, name = substitute.module, substitute.name
        if _is_ours(origin):
            assert name is not None, f"import {origin}: write from ... import"
            found = self.need(Symbol(origin, name))
            if alias != found:
                self._aliases[alias] = found
            return alias
        assert origin.split(".")[0] in LIBRARIES | sys.stdlib_module_names, f"{origin}: not to be imported in an export"
        assert self._libraries.setdefault(alias, (origin, name)) == (origin, name), f"{alias}: two things by one name"
        return alias

    # --------------------------------------------------------------------------------------------------------- its text

    def _import_lines(self) -> list[str]:
        whole = {f"import {origin}" + (f" as {alias}" if "." in origin or alias != origin else "")
                 for alias, (origin, name) in self._libraries.items() if name is None}  # fmt: skip
        named: dict[str, list[str]] = {}
        for alias, (origin, name) in self._libraries.items():
            if name is not None:
                named.setdefault(origin, []).append(name if alias == name else f"{name} as {alias}")
        return sorted(whole) + [
            f"from {origin} import {', '.join(sorted(names))}" for origin, names in sorted(named.items())
        ]

    def _segment(self, module: Module, node: ast.stmt, edits: Sequence[Edit]) -> str:
        begin, end = module.span(node)
        data = module.source.encode()
        inner = sorted((e for e in edits if begin <= e.begin and e.end <= end), key=lambda e: e.begin)
        out, at = [], begin
        for edit in inner:
            out += [data[at : edit.begin].decode(), edit.text]
            at = edit.end
        return "".join([*out, data[at:end].decode()])


def _is_ours(origin: str) -> bool:
    return origin.split(".", maxsplit=1)[0] in OURS


def _exists(name: str) -> bool:
    path = CODE_ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _targets(node: ast.stmt) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return node.targets
    return [node.target] if isinstance(node, ast.AnnAssign) else []


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _imported(nodes: Iterator[ast.stmt] | Sequence[ast.stmt]) -> Iterator[tuple[str, tuple[str, str | None]]]:
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                name = alias.asname or alias.name.split(".")[0]
                yield name, (alias.name if alias.asname else name, None)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports are not bundled"
            for alias in node.names:
                yield alias.asname or alias.name, (node.module or "", alias.name)


def _used(node: ast.AST) -> Iterator[ast.Name | ast.Attribute]:
    """Names that are read when it runs, annotations left out; attributes of plain names as they are."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Name) and not hasattr(builtins, child.id):
                yield child
            elif isinstance(child, ast.AST):
                if isinstance(child, ast.Attribute) and isinstance(child.value, ast.Name):
                    yield child
                yield from _used(child)


def _annotated(node: ast.stmt) -> set[str]:
    """Names in annotations."""
    found = [getattr(part, name, None) for part in ast.walk(node) for name in ("annotation", "returns")]
    return {
        part.id for annotation in found if annotation for part in ast.walk(annotation) if isinstance(part, ast.Name)
    }


def bundle(
    entry: str, *, parts: Sequence[Symbol] = (), stubs: Sequence[Symbol] = (), title: str, tail: Sequence[str] = ()
) -> str:
    """The source of a file with all of module `entry`, the definitions `parts`, and what they need.

    Args:
        stubs: functions that nothing calls there.
        tail: statements at its end.
    """
    bundler = Bundler(stubs)
    for part in parts:
        bundler.need(part)
    bundler.need_module(entry)
    return bundler.text(title, tail)
