"""Writes a run's weights for open_clip: `python export.py runs/demo --out clip/model.safetensors`.

Beside the weights lie open_clip_config.json and, for WordPiece captions, the tokenizer's files, so that
`open_clip.create_model_and_transforms("local-dir:clip")` and `open_clip.get_tokenizer` load without a download.
With `--format huggingface`, what transformers' CLIPModel and AutoTokenizer load instead, where that is the same model.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pipeline.command import exit_code, missing_packages_in_one_line

if __name__ == "__main__":
    missing_packages_in_one_line()

import tyro
from safetensors.torch import save

from model.huggingface import END_ID, HUGGINGFACE_CONFIG, START_ID, huggingface_config, to_huggingface
from model.openclip import to_openclip
from model.openclip_config import OPENCLIP_CONFIG, openclip_config
from model.weights import Weights
from pipeline.bpe import ClipBPE
from pipeline.files import replacing
from pipeline.wordpiece import CLS_ID, WordPiece
from training.initial import read_run
from training.stages import weights_folder

# isort: split
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as InSequence
from tokenizers.processors import TemplateProcessing

Format = Literal["open_clip", "huggingface"]

_WEIGHTS = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class Export:
    """Write a run's weights for open_clip, or for Hugging Face's CLIPModel."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, such as runs/demo; of one with stages, the last finished stage counts."""
    out: Path
    """The file to write, FOLDER/NAME.safetensors; the folder then holds one model."""
    ema: bool = False
    """The moving average of the weights, which a run with --ema keeps, instead of the weights."""
    vocabulary: Path | None = None
    """The vocabulary file of the tokenizer, whose files go with the weights; by default an installed package's."""
    format: Format = "open_clip"
    """What is to load it. CLIPModel is the BPE dialect with the class token pooled; what does not fit is refused."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    export(tyro.cli(Export, args=arguments, description=__doc__))


def export(config: Export) -> None:
    """Writes the files. Raises ValueError, in one line, for what the format cannot compute or could not load; OSError,
    with what was there untouched, where they cannot be written."""
    check_place(config.out, config.format)
    folder = config.out.parent
    run, chosen = weights_folder(config.run)
    if chosen is not None:
        print(chosen)
    weights = read_run(run, ema=config.ema)
    model, grid, text_tokens = weights.config, weights.grid, weights.text_tokens
    bias = weights.logit_bias
    if config.format == "huggingface":
        texts = huggingface_config(model, grid, text_tokens, logit_bias=bias) | bpe_files(
            text_tokens, config.vocabulary
        )
        tensors, loader = to_huggingface(model, weights.tensors, weights.image_positions), 'CLIPModel.from_pretrained("'
    else:
        texts = {OPENCLIP_CONFIG: openclip_config(model, grid, text_tokens, logit_bias=bias)}
        if model.text.tokenizer == "wordpiece":
            texts |= wordpiece_files(text_tokens, config.vocabulary)
        tensors = to_openclip(model, weights.tensors, weights.image_positions)
        loader = 'open_clip.create_model_and_transforms("local-dir:'
    contents = {name: json.dumps(values, indent=1, ensure_ascii=False) + "\n" for name, values in texts.items()}
    contents = {name: text.encode() for name, text in contents.items()}
    contents[config.out.name] = save(tensors, metadata={"format": "pt"})
    try:
        write_all(folder, contents)
    except OSError as error:
        raise OSError(
            f"--out {config.out} cannot be written ({error.strerror}); nothing was changed: "
            "mend that and run the same command again"
        ) from None
    print(f"wrote {config.out} and {', '.join(texts)}: {describe(weights)}")
    print(f'load it with {loader}{folder}")')


def check_place(out: Path, format: Format) -> None:
    """Raises ValueError, in one line, where a file may not lie: a folder holds one model, for one program."""
    folder = out.parent
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: the weights are written as safetensors; give a name.safetensors")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; give the name of a file, such as {out / 'model.safetensors'}")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {out}: {folder} is a file, and a folder is needed; give another")
    others = sorted(path.name for path in folder.glob("*") if path.suffix in _WEIGHTS and path.name != out.name)
    if others:
        raise ValueError(
            f"--out {out}: {folder} holds {others[0]} too, and open_clip would not know which to load; "
            "give a folder of its own"
        )
    # A run folder has a config.json too, which an export for CLIPModel would replace.
    of_clip_model = _is_clip_model(folder / HUGGINGFACE_CONFIG)
    if format == "open_clip":
        foreign = {HUGGINGFACE_CONFIG: of_clip_model}
    else:
        foreign = {name: (folder / name).exists() for name in (OPENCLIP_CONFIG, HUGGINGFACE_CONFIG)}
        foreign[HUGGINGFACE_CONFIG] &= not of_clip_model
    for name in (name for name, there in foreign.items() if there):
        raise ValueError(
            f"--out {out}: {folder} holds a {name} that is of no export for {format}; give a folder of its own"
        )


def _is_clip_model(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8"))["model_type"] == "clip"
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_all(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Writes whole files into a folder, made if need be: all of them take their names, or none does."""
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as files:
        for name, content in contents.items():
            file = files.enter_context(replacing(folder / name))
            file.write(content)
            file.flush()  # there must be room for all before any takes its name


def wordpiece_files(text_tokens: int, vocabulary: Path | None = None) -> dict[str, Any]:
    """Returns by name what transformers' AutoTokenizer loads: our WordPiece, with [CLS] before the pieces.

    There is no [SEP] to take out again, so a long caption keeps as many pieces as in training: text_tokens - 1.
    """
    tokenizer = Tokenizer.from_str(WordPiece(vocabulary).tokenizer.to_str())
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A", special_tokens=[("[CLS]", CLS_ID)])
    # [SEP] is never added, but open_clip asks for its id.
    marks = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]"}
    return _tokenizer_files(tokenizer, text_tokens, {**marks, "unk_token": "[UNK]"})


def bpe_files(text_tokens: int, vocabulary: Path | None = None) -> dict[str, Any]:
    """Returns by name what AutoTokenizer loads: CLIP's BPE between its marks. Text is lower-cased but not repaired."""
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokenizer = Tokenizer.from_str(ClipBPE(vocabulary).tokenizer.to_str())
    tokenizer.normalizer = InSequence([NFC(), Replace(Regex(r"\s+"), " "), Lowercase()])
    tokenizer.add_special_tokens([start, end])
    marks = [(start, START_ID), (end, END_ID)]
    assert all(tokenizer.token_to_id(mark) == number for mark, number in marks)
    tokenizer.post_processor = TemplateProcessing(single=f"{start} $A {end}", special_tokens=marks)
    names = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    return _tokenizer_files(tokenizer, text_tokens, names)


def _tokenizer_files(tokenizer: Tokenizer, text_tokens: int, marks: dict[str, str]) -> dict[str, Any]:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": text_tokens,
        "clean_up_tokenization_spaces": False,
        **marks,
    }
    return {"tokenizer.json": json.loads(tokenizer.to_str()), "tokenizer_config.json": config}


def describe(weights: Weights) -> str:
    """Returns what a person would check: size, lengths, numerics."""
    config, (rows, columns) = weights.config, weights.grid
    patch = config.image.patch
    return (
        f"{config.name}, {rows * patch}x{columns * patch} px, {weights.text_tokens} text tokens, "
        f"{config.activation}, norm epsilon {config.norm_eps:g}"
    )


if __name__ == "__main__":
    sys.exit(main())
