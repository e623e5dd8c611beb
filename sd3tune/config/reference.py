"""The config reference, generated from the schema: `python -m sd3tune.config.reference > docs/config.md`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

import annotated_types as limits
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from sd3tune.config.schema import Config
from sd3tune.config.sections.section import Section
from sd3tune.config.shape import alternatives, default_section, entry_field, item_of, kind_of, sections_of

_INTRODUCTION = """\
# Configuration

<!-- Written by `make docs` from sd3tune/config/; edit that. -->

One YAML file describes a run. Only `data.sources` has no default.

```
sd3tune config list                                   list the shipped presets
sd3tune config new rex --from PRESET --data ./rex     write rex.yaml from a preset; also --caption, --out
sd3tune train rex.yaml                                run it
sd3tune train rex.yaml train.steps=500 ema.decay=0.99  with overrides
sd3tune config check rex.yaml                         list all problems, with their lines
sd3tune config show rex.yaml                          print every key with its value
sd3tune config schema > sd3tune.schema.json           write the schema for editors
```

Editors that use the YAML language server complete and check a file that has a line
`# yaml-language-server: $schema=` and the path of the schema. `config new` writes one.

## Extending another file

```yaml
extends: preset:sd35_medium_12gb      # a shipped preset; or a file, such as ../base.yaml; or a list of these
name: rex
data:
  sources: [{path: ./rex, caption: a photo of sks dog}]
```

- Sections are merged key by key; the extending file wins. Any other value, lists included, replaces the whole
  inherited value; so does `null`, where a key can be null.
- With several files, the later file wins, including the files that it extends.
- A `kind` that differs from the inherited one drops inherited keys that the new variant lacks, or has another
  default for, and prints a note: `lr` is 1 for Prodigy, whatever it was for AdamW.
- Each path is relative to the file that contains it, and each problem names that file and its line. So set
  your own `data.sources` with a preset, whose example folder is relative to the preset.
- The resolved configuration in the run folder extends nothing. `extends` is for files, not for overrides.

## Rules

- An unknown key, a key written twice and a value of the wrong type are errors. All are reported at once.
- `1e-4` is a number, and only `true` and `false` are booleans: `no` and `on` are text.
- An override is `key=value`; the value is YAML, so quote text with a `: ` or ` #` in it:
  `data.sources.0.caption='"a dog: sitting"'`. Numbers pick list entries. `ema.decay=0.9` creates `ema`;
  `ema=null` and `ema='{decay: 0.9}'` replace it as a whole. The last override of a key wins.
- `kind` selects the variant of a section; without `kind` it is the default variant. An override that changes
  `kind` drops the file's keys for the former variant, and prints a note.
- Paths in a file are relative to that file; paths in an override are relative to the working directory.
  `~` is the home directory. `model.base` and `model.tokenizers` are paths if they begin with `/`, `./`,
  `../` or `~/`, end like a weights file (`.safetensors`), or if such a folder or file exists. Names of offline
  bases are never paths: write `./tiny` for a folder called tiny.
- The run folder holds the resolved configuration as `config.yaml`: every key, every path absolute,
  `output_dir` included. It describes the same run from any working directory, also after the folder was moved or
  copied: next to a `run.json`, `output_dir` is the folder of the file. Set another `output_dir` to run it again.
- A rehearsal is a run whose overrides replace the base by `tiny` or another base with random weights. It uses
  `runs/{name}-tiny`, so that `runs/{name}` stays free for the real run, unless `name=` or `output_dir` is given.
- Tabs may separate values and comments; spaces indent.
"""


_SIGNS = ((">=", limits.Ge, "ge"), (">", limits.Gt, "gt"), ("<=", limits.Le, "le"), ("<", limits.Lt, "lt"))


def reference() -> str:
    """Return the whole page, in Markdown."""
    return "\n".join([_INTRODUCTION, *_top_level(), *_sections(Config, "")]).rstrip() + "\n"


def _top_level() -> Iterator[str]:
    plain = {name: field for name, field in Config.model_fields.items() if not _inner(field)}
    yield "## Top level\n"
    yield _table(plain)


def _sections(section: type[Section], prefix: str) -> Iterator[str]:
    """Yield a heading and a table for each section inside `section`, depth first."""
    for name, field in section.model_fields.items():
        inner = _inner(field)
        if not inner:
            continue
        item = item_of(field.annotation)
        is_list = item is not None
        path = prefix + name + ("[]" if is_list else "")
        yield f"## {path}\n"
        yield " ".join(filter(None, [field.description, _presence(field)])) + "\n"
        for one in inner:
            if len(inner) > 1:
                default = " (the default)" if one is default_section(entry_field(item) if is_list else field) else ""
                yield f"### {path}, kind `{kind_of(one)}`{default}\n"
                yield inspect.cleandoc(one.__doc__ or "") + "\n"
            rows = {key: value for key, value in one.model_fields.items() if not _inner(value) or _also_plain(value)}
            yield from [_table(rows)] * bool(rows)
        shared: dict[str, None] = {}  # variants have sections in common
        for one in inner:
            shared |= dict.fromkeys(["\n".join(_sections(one, path + "."))])
        yield from filter(None, shared)


def _inner(field: FieldInfo) -> list[type[Section]]:
    item = item_of(field.annotation)
    return sections_of(field.annotation if item is None else item)


def _also_plain(field: FieldInfo) -> bool:
    """Return whether the entries of a list may also be plain values, which the section's own table describes."""
    item = item_of(field.annotation)
    return item is not None and len(alternatives(item)) > len(sections_of(item))


def _presence(field: FieldInfo) -> str:
    if field.is_required():
        return "Required."
    return "Off (null) by default." if field.default is None else ""


def _table(fields: dict[str, FieldInfo]) -> str:
    rows = ["| key | value | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        value = _value(field.annotation, field.metadata)
        cells = (f"`{name}`", value, _default(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default is None:
        return "null"
    if isinstance(field.default, bool):
        return f"`{str(field.default).lower()}`"
    return f"`{field.default}`" if field.default != "" else '`""`'


def _value(annotation: Any, metadata: list[Any]) -> str:
    """Return a key's type in words: integer >= 1, `a` or `b`, list of number."""
    if get_origin(annotation) is Annotated:
        inner, *extra = get_args(annotation)
        constraints = [item for info in extra for item in (info.metadata if isinstance(info, FieldInfo) else [info])]
        return _value(inner, [*metadata, *constraints])
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{str(choice).lower()}`" for choice in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_value(get_args(annotation)[0], [])}"
    if get_origin(annotation) is dict:
        return f"mapping of names to {_value(get_args(annotation)[1], [])}"
    if get_origin(annotation) is not None:  # a union
        return " or ".join(_value(member, metadata) for member in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "a section of keys"
    names = {int: "integer", float: "number", str: "text", bool: "`true` or `false`", type(None): "null"}
    bounds = _bounds(metadata) if annotation in (int, float) else ""
    return names[annotation] + bounds


def _bounds(metadata: list[Any]) -> str:
    words = []
    for limit in metadata:
        for sign, kind, name in _SIGNS:
            if isinstance(limit, kind):
                bound = getattr(limit, name)
                words.append(f"{sign} {'2^63' if bound == 2**63 else bound}")
    if len(words) == 2 and words[0].split()[1] == words[1].split()[1]:
        return f", only {words[0].split()[1]} so far"
    return " " + ", ".join(words) if words else ""


if __name__ == "__main__":
    sys.stdout.write(reference())
