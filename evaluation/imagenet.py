"""ImageNet's class names, prompt templates and wnids, from packages that hold them: read as text, never imported.

open_clip and clip_benchmark hold the names and OpenAI's 80 templates, timm and clip_benchmark the 1000 wnids in the
order of the classes. They are looked for in this environment and in .venv-peers.
"""

import ast
import json
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from .classes import ClassList

NUM_CLASSES = 1000
_PEERS = Path(__file__).parents[1] / ".venv-peers" / "lib"
_REMEDY = "`make peers` or `pip install --no-deps open_clip_torch timm` brings them"


def search_path() -> list[str]:
    """Returns the folders in which packages are looked for."""
    return [*sys.path, *map(str, sorted(_PEERS.glob("python*/site-packages")))]


def imagenet_classes(path: Sequence[str]) -> ClassList:
    """Returns the 1000 class names and OpenAI's templates of the first package in `path` that has them.

    Raises ValueError, in one line, where there is none.
    """
    if (found := _file(path, "open_clip_torch", "open_clip/zero_shot_metadata.py")) is not None:
        return read_metadata_module(*found)
    if (found := _file(path, "clip_benchmark", "clip_benchmark/datasets/en_classnames.json")) is not None:
        file, source = found
        templates = json.loads(file.with_name("en_zeroshot_classification_templates.json").read_bytes())
        return ClassList(source, json.loads(file.read_bytes())["imagenet1k"], {}, templates["imagenet1k"])
    raise ValueError(
        'no installed package holds ImageNet\'s class names: give --classes FILE.json ({"names": [...], "templates": '
        f"[...]}}), or {_REMEDY}"
    )


def imagenet_wnids(path: Sequence[str]) -> list[str]:
    """Returns the 1000 wnids in the order of the classes. Raises ValueError, in one line, where no package has them."""
    if (found := _file(path, "timm", "timm/data/_info/imagenet_synsets.txt")) is not None:
        return found[0].read_text(encoding="utf-8").split()
    if (found := _file(path, "clip_benchmark", "clip_benchmark/datasets/builder.py")) is not None:
        return [*map(str, ast.literal_eval(_assigned(found[0], "all_imagenet_wordnet_ids")))]
    raise ValueError(
        "which of ImageNet's 1000 classes these folders are is not known: give --wnids FILE, one wnid (n01440764) a "
        f"line in the order of the classes, or {_REMEDY}"
    )


def read_metadata_module(file: Path, source: str) -> ClassList:
    """Returns what open_clip's zero_shot_metadata.py holds. Raises ValueError where it holds something else."""
    names = ast.literal_eval(_assigned(file, "IMAGENET_CLASSNAMES"))
    templates = _assigned(file, "OPENAI_IMAGENET_TEMPLATES")
    if not isinstance(templates, ast.Tuple | ast.List):
        raise ValueError(f"{file}: OPENAI_IMAGENET_TEMPLATES is no sequence there; give --classes FILE.json")
    return ClassList(source, [*map(str, names)], {}, [_template(file, each) for each in templates.elts])


def _template(file: Path, node: ast.expr) -> str:
    """The text of `lambda c: f"a photo of a {c}."`, with {c} where the argument goes."""
    if isinstance(node, ast.Lambda) and len(node.args.args) == 1 and isinstance(node.body, ast.JoinedStr):
        argument, text = node.args.args[0].arg, ""
        for part in node.body.values:
            if isinstance(part, ast.Constant):
                text += str(part.value)
            elif isinstance(part, ast.FormattedValue) and ast.unparse(part) == ast.unparse(_plain(argument)):
                text += "{c}"
            else:
                break
        else:
            return text
    raise ValueError(
        f"{file}: line {node.lineno} is no template of the form lambda c: f'...'; give --classes FILE.json"
    )


def _plain(argument: str) -> ast.FormattedValue:
    return ast.FormattedValue(ast.Name(argument), -1, None)


def _assigned(file: Path, name: str) -> ast.expr:
    """The expression that a module gives a name, at its top level."""
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        raise ValueError(f"{file} cannot be read as Python; give --classes FILE.json") from None
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(to, ast.Name) and to.id == name for to in node.targets):
            return node.value
    raise ValueError(f"{file} has no {name}; give --classes FILE.json")


def _file(path: Sequence[str], distribution: str, name: str) -> tuple[Path, str] | None:
    """A file of an installed package, and the package with its version; None where it is not there."""
    context = metadata.DistributionFinder.Context(name=distribution, path=list(path))
    for found in metadata.Distribution.discover(context=context):
        file = Path(str(found.locate_file(name)))
        if file.is_file():
            return file, f"{distribution} {found.version}"
    return None
