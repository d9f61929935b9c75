"""What classes are called, and the prompts that stand for them: from clip_benchmark's file names, or from JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATE = "{c}"


@dataclass(frozen=True)
class ClassList:
    """Class names and prompt templates, and where they are from."""

    source: str
    """For a person: a file, or an installed package and its version."""
    names: Sequence[str] = ()
    """Name n is that of class n; empty where the source has none, or has them by folder."""
    by_folder: Mapping[str, str] = field(default_factory=dict[str, str])
    """Name of a class's folder -> name of the class."""
    templates: Sequence[str] = ()
    """{c} stands for the name; empty where the source has none."""


def read_classes(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the class names (line n, from 0, is class n) and the prompt templates ({c} is the name).

    Without a templates file the bare name is the prompt. Raises ValueError, in one line, when a file is missing,
    empty or malformed.
    """
    names_file, templates_file = folder / CLASS_NAMES_FILE, folder / TEMPLATES_FILE
    if not names_file.is_file():
        raise ValueError(f"{names_file} is missing; write one class name a line, line n (from 0) for class n")
    names = _lines(names_file)
    if not names:
        raise ValueError(f"{names_file} is empty; write one class name a line, line n (from 0) for class n")
    if "" in names:
        number = names.index("") + 1
        raise ValueError(f"{names_file} is blank at line {number}; line n (from 0) names class n, so give it a name")
    templates = read_templates(templates_file) if templates_file.is_file() else [DEFAULT_TEMPLATE]
    return names, templates


def read_templates(file: Path) -> list[str]:
    """Returns the prompt templates of `file`, one a line; blank lines do not count. Raises ValueError as above."""
    lines = _lines(file)
    for number, template in enumerate(lines, 1):
        if template and "{c}" not in template:
            raise ValueError(f"{file} has no {{c}} at line {number}: {template!r}; put {{c}} where the class name goes")
    templates = [template for template in lines if template]
    if not templates:
        raise ValueError(f"{file} is empty; write a template a line, such as {{c}}, or delete it for the bare name")
    return templates


def prompts(names: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Returns every name in every template: name by name, as `zero_shot.class_weights` expects them."""
    return [template.replace("{c}", name) for name in names for template in templates]


def read_class_file(file: Path) -> ClassList:
    """Returns the class names and templates of a JSON file: {"names": [...], "templates": [...]}, either may be absent.

    "names" may also be an object from folder to class name. Raises ValueError, in one line, for anything else.
    """
    values = read_json(file, "--classes")
    if not isinstance(values, dict):
        raise ValueError(f'--classes {file} is no JSON object; write {{"names": [...], "templates": [...]}}')
    found = cast("dict[str, Any]", values)
    if strange := sorted(set(found) - {"names", "templates"}):
        raise ValueError(f'--classes {file}: unknown key "{strange[0]}"; it takes "names" and "templates"')
    if not found:
        raise ValueError(f'--classes {file} is empty; write {{"names": [...], "templates": [...]}}')
    names, templates = found.get("names", []), _texts(file, "templates", found.get("templates", []))
    if lacking := [template for template in templates if "{c}" not in template]:
        raise ValueError(f"--classes {file}: no {{c}} in template {lacking[0]!r}; put {{c}} where the class name goes")
    if isinstance(names, dict):
        by_folder = cast("dict[str, Any]", names)
        texts = _texts(file, "names", list(by_folder.values()))
        return ClassList(str(file), (), dict(zip(by_folder, texts, strict=True)), templates)
    return ClassList(str(file), _texts(file, "names", names), {}, templates)


def read_json(file: Path, flag: str) -> Any:
    """Returns what a JSON file holds. Raises ValueError, in one line, where it is missing or damaged."""
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise ValueError(f"{flag} {file}: {(error.strerror or str(error)).lower()}; give a JSON file") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{flag} {file} cannot be read as JSON ({error})") from None


def _texts(file: Path, key: str, values: Any) -> list[str]:
    if not isinstance(values, list):
        raise ValueError(f'--classes {file}: "{key}" is no list of texts')
    texts = cast("list[Any]", values)
    for text in texts:
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f'--classes {file}: {json.dumps(text)} in "{key}" is no text')
    return texts


def _lines(file: Path) -> list[str]:
    """Returns the stripped lines up to the last that is not blank. Only a line feed (or CR LF) ends a line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    text = text.rstrip()
    return [line.strip() for line in text.split("\n")] if text else []
