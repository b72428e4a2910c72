"""A run's config as text: YAML, `--set a.b=value`, and errors of one line that name the field. No torch.

The resolved config is written into the run folder as YAML and can be given in place of a recipe's name.
"""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import yaml
from pydantic import TypeAdapter, ValidationError

from trainer.config import RunConfig, Section
from trainer.errors import UserError, one_line


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, width=120)


def from_yaml(text: str, *, source: str) -> RunConfig:
    """Inverse of `to_yaml`; `source` names the file in errors."""
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as e:
        raise UserError(f"{source}: not YAML ({one_line(e)})") from None
    if not isinstance(tree, Mapping):
        raise UserError(f"{source}: not a run's config: expected fields such as name, task, data and phases")
    return parse(tree, source=source)


# -------------------------------------------------------------------------------------------- overrides


def with_overrides(config: RunConfig, overrides: Iterable[str]) -> RunConfig:
    """Apply `a.b=value` settings, values in YAML. Items of a list go by index, phases also by name. In their order: another
    kind of section begins with its defaults, and with what it inherits in common with the kind before; what follows is set
    in that.

    Raises:
        UserError: no such field, wrong type or value; the message names the field.
    """
    tree = config.model_dump(mode="json")
    begun: dict[tuple[str, ...], type[Section]] = {}
    for override in overrides:
        path, eq, text = override.partition("=")
        if not eq or not path:
            raise UserError(f"--set {override}: write it as FIELD=VALUE, for example phases.0.batch_size=64")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as e:
            raise UserError(f"--set {path}: the value is not YAML ({one_line(e)})") from None
        begun |= _assign(tree, path, value)
    for keys, section in begun.items():
        _check_needs(tree, keys, section)
    return parse(tree, source="--set")


def _assign(tree: Any, path: str, value: Any) -> dict[tuple[str, ...], type[Section]]:
    """Returns the section that is of another kind from now on, if one is, by its place."""
    *parents, last = path.split(".")
    node, keys = tree, []
    for i, part in enumerate(parents):
        key = _key_in(node, part, path)
        keys.append(str(key))
        node = node[key]
        if node is None:
            section, rest = ".".join(parents[: i + 1]), path.split(".", i + 1)[-1]
            raise UserError(
                f"--set {path}: {section} is absent; set it whole, for example --set '{section}={{{rest}: ...}}'"
            )
    if isinstance(node, dict) and last == "kind" and isinstance(value, str):
        kinds = _kinds_at(keys, tree)
        before, after = kinds.get(node.get("kind", "")), kinds.get(value)
        if before and after and before is not after:
            common = next(base for base in after.__mro__ if issubclass(before, base) and issubclass(base, Section))
            kept = {name: node[name] for name in common.model_fields if name in node}
            node.clear()
            node |= {**_defaults(after), **kept, "kind": value}
            return {tuple(keys): after}
    if isinstance(node, dict) and last not in node:
        node[last] = value  # validation says whether the field exists and what was meant
    else:
        node[_key_in(node, last, path)] = value
    return {}


def _kinds_at(keys: list[str], tree: Any) -> dict[str, type[Section]]:
    """The sections that can stand at a place, by their kind."""
    parent = _section_at(keys[:-1], tree) if keys else None
    field = parent.model_fields.get(keys[-1]) if parent else None
    sections = [s for s in _sections_in(field.annotation) if "kind" in s.model_fields] if field else []
    return {kind: s for s in sections for kind in get_args(s.model_fields["kind"].annotation)}


def _defaults(section: type[Section]) -> dict[str, Any]:
    """Of the fields that have one, as a config's plain tree holds them."""
    fields = {name: field.get_default(call_default_factory=True) for name, field in section.model_fields.items()
              if not field.is_required()}  # fmt: skip
    plain: dict[str, Any] = TypeAdapter(dict[str, Any]).dump_python(fields, mode="json")
    return plain


def _check_needs(tree: Any, keys: tuple[str, ...], section: type[Section]) -> None:
    """Refuse a section of a kind that was set alone and, where it still stands, lacks fields that have no default."""
    node = tree
    for key in keys:
        at = int(key) if isinstance(node, list) and key.isdigit() else key
        node = node[at] if _has(node, at) else None
    if not isinstance(node, dict) or node.get("kind") not in get_args(section.model_fields["kind"].annotation):
        return
    needs = [name for name, field in section.model_fields.items() if field.is_required() and name not in node]
    if needs:
        where, kind = ".".join(keys), node["kind"]
        whole = ", ".join(f"{name}: ..." for name in needs)
        raise UserError(
            f"--set {where}.kind={kind}: {kind} has fields of its own, and needs {', '.join(needs)}; set it whole, for "
            f"example --set '{where}={{kind: {kind}, {whole}}}'"
        )


def _key_in(node: Any, part: str, path: str) -> str | int:
    if isinstance(node, dict):
        if part in node:
            return part
        raise UserError(f"--set {path}: no field {part!r}{suggest(part, node)}")
    if isinstance(node, list):
        by_name = {item["name"]: i for i, item in enumerate(node) if isinstance(item, dict) and "name" in item}
        if part in by_name:
            return by_name[part]
        if part.isdigit() and int(part) < len(node):
            return int(part)
        choices = f"0 to {len(node) - 1}" + (f", or {', '.join(by_name)}" if by_name else "")
        raise UserError(f"--set {path}: no item {part!r}; have {choices}")
    raise UserError(f"--set {path}: {part!r} is below a plain value; set a whole section with YAML, FIELD={{a: 1}}")


def suggest(word: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    return f"; did you mean {close[0]!r}?" if close else f"; have {', '.join(choices)}"


def parse(tree: Mapping[str, Any], *, source: str) -> RunConfig:
    """Validate a plain tree; `source` says in an error where it came from."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as e:
        raise UserError(f"{source}: {_first_error(e, tree)}") from None


def _first_error(error: ValidationError, tree: Any) -> str:
    """One line for the first of the errors: the field, what is wrong, what would be right."""
    errors = error.errors(include_url=False)
    first = errors[0]
    # pydantic puts the tag of a discriminated union into the path; a path that a user can type does not have it
    path, node = [], tree
    for part in first["loc"]:
        if isinstance(node, Mapping) and part not in node and node.get("kind") == part:
            continue
        path.append(str(part))
        node = node[part] if _has(node, part) else None
    field = ".".join(path)
    if first["type"] == "extra_forbidden":
        parent = _section_at(path[:-1], tree)
        message = "no such field" + (suggest(path[-1], parent.model_fields) if parent else "")
    elif first["type"] == "union_tag_not_found":
        example = ", ".join(f"{k}: ..." for k in first["input"]) if isinstance(first["input"], Mapping) else ""
        message = (
            f"a section set whole says its kind first, for example {{kind: NAME{', ' if example else ''}{example}}}"
        )
    elif first["type"] == "union_tag_invalid":
        kinds = [kind.strip(" '") for kind in first["ctx"]["expected_tags"].split(",")]
        message = f"no kind {first['ctx']['tag']!r}{suggest(first['ctx']['tag'], kinds)}"
    elif first["type"] == "value_error":
        message = str(first["ctx"]["error"]) if "ctx" in first else first["msg"]
    else:
        message = first["msg"] if first["type"] == "missing" else f"{first['msg']}, got {first['input']!r:.80}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return (f"{field}: {message}" if field else message) + more


def _has(node: Any, part: Any) -> bool:
    return (isinstance(node, Mapping) and part in node) or (
        isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node)
    )


def _section_at(path: list[str], tree: Any) -> type[Section] | None:
    """The class of the section at a path, found by walking annotations beside the tree."""
    candidates: list[type[Section]] = [RunConfig]
    for part in path:
        found: list[type[Section]] = []
        node = tree[int(part) if isinstance(tree, (list, tuple)) else part] if tree is not None else None
        for section in candidates:
            if part in section.model_fields:
                found += _sections_in(section.model_fields[part].annotation)
        if part.isdigit() or not found:
            found = found or candidates
        kind = node.get("kind") if isinstance(node, Mapping) else None
        tagged = [
            s for s in found if "kind" in s.model_fields and f"{kind!r}" in str(s.model_fields["kind"].annotation)
        ]
        candidates, tree = (tagged if kind and tagged else found), node
    return candidates[0] if candidates else None


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [s for arg in getattr(annotation, "__args__", ()) for s in _sections_in(arg)]
