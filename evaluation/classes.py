"""The classes of a shard set, by the file names that clip_benchmark uses, and the prompts that stand for them."""

from collections.abc import Sequence
from pathlib import Path

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
DEFAULT_TEMPLATE = "{c}"


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


def _lines(file: Path) -> list[str]:
    """Returns the stripped lines up to the last that is not blank. Only a line feed (or CR LF) ends a line."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    text = text.rstrip()
    return [line.strip() for line in text.split("\n")] if text else []
