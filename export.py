"""Writes a run's weights for open_clip: `python export.py runs/demo --out clip/model.safetensors`.

Beside the weights lie open_clip_config.json and, for WordPiece captions, the tokenizer's files, so that
`open_clip.create_model_and_transforms("local-dir:clip")` and `open_clip.get_tokenizer` load without a download.
With `--format huggingface`, what transformers' CLIPModel and AutoTokenizer load instead, where that is the same model.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from safetensors.torch import save

from model.huggingface import END_ID, START_ID, huggingface_config, to_huggingface
from model.openclip import openclip_config, to_openclip
from model.weights import OPENCLIP_CONFIG, Weights
from pipeline.bpe import ClipBPE
from pipeline.command import exit_code
from pipeline.files import replacing, write_text
from pipeline.wordpiece import CLS_ID, WordPiece
from training.initial import read_run

# isort: split
from tokenizers import Regex, Tokenizer
from tokenizers.normalizers import NFC, Lowercase, Replace
from tokenizers.normalizers import Sequence as InSequence
from tokenizers.processors import TemplateProcessing

_WEIGHTS = (".safetensors", ".bin", ".pth")


@dataclass(frozen=True)
class Export:
    """Write a run's weights for open_clip, or for Hugging Face's CLIPModel."""

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, such as runs/demo."""
    out: Path
    """The file to write, FOLDER/NAME.safetensors; the folder then holds one model."""
    ema: bool = False
    """The moving average of the weights, which a run with --ema keeps, instead of the weights."""
    vocabulary: Path | None = None
    """The vocabulary file of the tokenizer, whose files go with the weights; by default an installed package's."""
    format: Literal["open_clip", "huggingface"] = "open_clip"
    """What is to load it. CLIPModel is the BPE dialect with the class token pooled; what does not fit is refused."""


@exit_code
def main(arguments: list[str] | None = None) -> None:
    """Runs the command."""
    export(tyro.cli(Export, args=arguments, description=__doc__))


def export(config: Export) -> None:
    """Writes the files. Raises ValueError, in one line, for what the format cannot compute or could not load."""
    folder = config.out.parent
    if config.out.suffix != ".safetensors":
        raise ValueError(f"--out {config.out}: the weights are written as safetensors; give a name.safetensors")
    others = [path.name for path in folder.glob("*") if path.suffix in _WEIGHTS and path.name != config.out.name]
    if others:
        raise ValueError(
            f"--out {config.out}: {folder} holds {sorted(others)[0]} too, and open_clip would not know which to load; "
            "give a folder of its own"
        )
    weights = read_run(config.run, ema=config.ema)
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
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in texts.items():
        write_text(folder / name, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    with replacing(config.out) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
    print(f"wrote {config.out} and {', '.join(texts)}: {describe(weights)}")
    print(f'load it with {loader}{folder}")')


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
