"""Export for open_clip, and training from an export: what one process can see. What open_clip sees: test_interop.py."""

import dataclasses
import json
import resource
from pathlib import Path

import pytest
import torch
from random_run import make_run
from safetensors.torch import load_file
from tokenizers import Tokenizer

import export
import train
import validate
from model.clip import CLIP
from model.huggingface import huggingface_config
from model.openclip import names
from model.presets import ModelConfig, from_json, model_config
from model.weights import hand_over, read
from pipeline.captions import caption_encoder
from training import checkpoint
from training.initial import read_run

TINY = model_config("ViT-Ti-16")


def exported(tmp_path: Path, config: ModelConfig = TINY, grid: int = 4, text_tokens: int = 8) -> tuple[CLIP, Path]:
    """Returns a random model and its exported weights, in a folder of their own."""
    model = make_run(tmp_path / "run", config, grid, text_tokens)
    out = tmp_path / "clip" / "model.safetensors"
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    return model, out


@pytest.mark.parametrize("config", [TINY, model_config("ViT-Ti-16-bpe")], ids=["wordpiece", "bpe"])
def test_the_folder_holds_what_open_clip_needs_and_loads_here_as_the_same_model(
    tmp_path: Path, config: ModelConfig
) -> None:
    model, out = exported(tmp_path, config)
    files = {path.name for path in out.parent.iterdir()}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"} if config.text.tokenizer == "wordpiece" else set[str]()
    assert files == {"model.safetensors", "open_clip_config.json"} | tokenizer
    tensors = load_file(out)
    assert set(tensors) == set(names(config).values())
    found, state, _ = hand_over(read(out, config), config, grid=(4, 4), text_tokens=8)
    assert found == config
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_tokenizers_files_give_our_ids(tmp_path: Path) -> None:
    _, out = exported(tmp_path)
    tokenizer = Tokenizer.from_file(str(out.parent / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    texts = ["a cat", "", "Ünïcode & antidisestablishmentarianism, twice: antidisestablishmentarianism", "x " * 40]
    ours = caption_encoder("wordpiece", 8).encode([text.encode() for text in texts])
    assert [encoding.ids for encoding in tokenizer.encode_batch(texts)] == ours.tolist()
    assert json.loads((out.parent / "tokenizer_config.json").read_text())["model_max_length"] == 8


def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pooled = dataclasses.replace(TINY, name="averaged", image=dataclasses.replace(TINY.image, pooling="token_mean"))
    make_run(tmp_path / "averaged", pooled, 2, 4)
    make_run(tmp_path / "run", TINY, 2, 4)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "other.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text(json.dumps({"encoders": {}, "image_size": 32}))
    out = tmp_path / "clip" / "model.safetensors"
    for arguments, message in (
        ((tmp_path / "averaged", out), "open_clip cannot compute averaged: its image pooling token_mean"),
        ((tmp_path / "nowhere", out), "nowhere is not a run folder"),
        ((tmp_path / "bare", out), "bare has no weights: it has no checkpoint yet"),
        (
            (tmp_path / "run", tmp_path / "folder.safetensors"),
            "folder.safetensors is a folder; give the name of a file",
        ),
        (
            (tmp_path / "run", tmp_path / "bare" / "config.json" / "x.safetensors"),
            "config.json is a file, and a folder",
        ),
        ((tmp_path / "run", tmp_path / "clip" / "model.pt"), "the weights are written as safetensors"),
        ((tmp_path / "run", tmp_path / "full" / "model.safetensors"), "holds other.safetensors too"),
    ):
        assert export.main([str(arguments[0]), "--out", str(arguments[1])]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ViT-B-16", "its image tower has no norm before the blocks"),
        ("ViT-L-16-bpe", "its image pooling is token_mean, not the class token"),
        ("ViT-L-14-bpe", "its image pooling is patch_mean, not the class token"),
    ],
)
def test_what_clip_model_cannot_compute_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^Hugging Face's CLIPModel cannot compute {name}: {reason}; export it for"):
        huggingface_config(model_config(name), (4, 4), 8)


def test_the_bpe_tokenizers_files_give_our_ids(clip_vocabulary: Path) -> None:
    tokenizer = Tokenizer.from_str(json.dumps(export.bpe_files(8, clip_vocabulary)["tokenizer.json"]))
    tokenizer.enable_truncation(8)
    texts = ["A  Cat", "", "Ünïcode antidisestablishmentarianism", "x " * 40]
    ours = caption_encoder("bpe", 8, vocabulary=clip_vocabulary).encode([text.encode() for text in texts])
    for text, ids in zip(texts, ours, strict=True):
        assert tokenizer.encode(text).ids == ids[: ids.argmax() + 1].tolist()


def test_a_run_of_the_sigmoid_loss_is_exported_with_its_bias_and_not_for_clip_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = model_config("ViT-Ti-16-bpe")
    model = make_run(tmp_path / "run", config, 4, 8, logit_bias=-7.25)
    out = tmp_path / "clip" / "model.safetensors"
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    assert load_file(out)["logit_bias"].item() == -7.25
    assert json.loads((out.parent / "open_clip_config.json").read_text())["model_cfg"]["init_logit_bias"] == -7.25
    found, state, _ = hand_over(read(out, config), config, grid=(4, 4), text_tokens=8, logit_bias=0.0)
    assert found == config
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    capsys.readouterr()
    out = tmp_path / "other" / "model.safetensors"
    assert export.main([str(tmp_path / "run"), "--out", str(out), "--format", "huggingface"]) == 2
    assert capsys.readouterr().err == (
        "error: Hugging Face's CLIPModel cannot compute ViT-Ti-16-bpe: it has a logit bias, of the sigmoid loss; "
        "export it for open_clip\n"
    )
    assert not out.parent.exists()


def test_exporting_again_replaces_the_file(tmp_path: Path) -> None:
    _, out = exported(tmp_path)
    before = out.read_bytes()
    out.write_bytes(b"cut")
    assert export.main([str(tmp_path / "run"), "--out", str(out)]) == 0
    assert out.read_bytes() == before


def test_a_full_disk_is_one_line_and_leaves_what_was_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on a file's size, which the weights are over and the texts are not, stands for the disk."""
    _, out = exported(tmp_path)
    values = json.loads((out.parent / "open_clip_config.json").read_text())
    before = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    make_run(tmp_path / "other", dataclasses.replace(TINY, activation="gelu"), 7, 12)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["model.safetensors"]) // 2, hard))
    capsys.readouterr()
    try:
        assert export.main([str(tmp_path / "other"), "--out", str(out)]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert error == (
        f"error: --out {out} cannot be written (File too large); nothing was changed: "
        "mend that and run the same command again\n"
    )
    assert {path.name: path.read_bytes() for path in out.parent.iterdir()} == before
    assert export.main([str(tmp_path / "other"), "--out", str(out)]) == 0
    assert json.loads((out.parent / "open_clip_config.json").read_text()) != values


def test_an_export_replaces_neither_a_run_nor_one_for_another_program(
    tmp_path: Path, clip_vocabulary: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, run = model_config("ViT-Ti-16-bpe"), tmp_path / "run"
    make_run(run, config, 4, 8)
    recorded = (run / "config.json").read_bytes()

    def code(folder: Path, format: str) -> int:
        more = ["--format", format, "--vocabulary", str(clip_vocabulary)]
        return export.main([str(run), "--out", str(folder / "model.safetensors"), *more])

    assert code(run, "huggingface") == 2
    assert (
        "holds a config.json that is of no export for huggingface; give a folder of its own" in capsys.readouterr().err
    )
    assert (run / "config.json").read_bytes() == recorded
    for first, second, name in (
        ("open_clip", "huggingface", "open_clip_config.json"),
        ("huggingface", "open_clip", "config.json"),
    ):
        assert code(tmp_path / first, first) == 0
        assert code(tmp_path / first, second) == 2
        error = capsys.readouterr().err
        assert f"holds a {name} that is of no export for {second}; give a folder of its own" in error
        assert error.count("\n") == 1
    assert code(tmp_path / "huggingface", "huggingface") == 0  # its own it may replace


def command(shards: Path, run: Path, *more: str) -> list[str]:
    return [
        "--data", str(shards), "--out", str(run), "--tokens", "4", "--text-tokens", "6", "--steps", "2",
        "--batch-size", "16", "--lr", "1e-3", "--warmup-samples", "0", "--device", "cpu", *more,
    ]  # fmt: skip


def test_a_run_goes_on_from_an_export_at_other_lengths_and_resumes(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = exported(tmp_path, TINY, grid=2, text_tokens=6)
    initial = command(shards, tmp_path / "more", "--model", "ViT-Ti-16", "--init", str(out))
    initial += ["--tokens", "16", "--text-tokens", "12", "--image-positions", "learned"]
    assert train.main([*initial, "--lr", "1e-30"]) == 0
    printed = capsys.readouterr().out
    assert "image positions 2x2 to 4x4, interpolated, learned from here on" in printed
    assert "text positions 6 to 12, interpolated" in printed
    assert "attention sdpa (image), sdpa (text)" in printed
    assert printed.count("attention ") == 1
    weights = read_run(tmp_path / "more")
    assert weights.grid == (4, 4)
    assert weights.table_GD is not None
    # With a rate of nothing, the weights after two steps are those it started from.
    block = model.state_dict()["image.blocks.1.mlp_in.weight"]
    assert torch.equal(weights.tensors["image.blocks.1.mlp_in.weight"], block)
    out.unlink()  # what a run started from is in its checkpoints
    capsys.readouterr()
    longer = [*initial, "--lr", "1e-30", "--steps", "3"]
    assert train.main(longer) == 0
    assert "resuming at step 2" in capsys.readouterr().out
    assert validate.main([str(tmp_path / "more"), "--data", str(shards)]) == 0


def test_a_run_goes_on_from_another_run(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert train.main(command(shards, first, "--model", "ViT-Ti-16")) == 0
    more = command(shards, second, "--model", "ViT-Ti-16", "--init", str(first), "--tokens", "16")
    assert train.main([*more, "--lr", "1e-30"]) == 0
    assert "image positions 2x2 to 4x4, computed anew, fixed from here on" in capsys.readouterr().out
    ours, theirs = (checkpoint.newest(run)[0] for run in (first, second))
    assert ours is not None
    assert theirs is not None
    before, after = ours.model_tensors(), theirs.model_tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    recorded = json.loads((second / "config.json").read_text())
    assert from_json(recorded["encoders"]) == TINY
    assert recorded["init"] == str(first)


def test_bad_initial_weights_are_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "run", TINY, 2, 6)
    (tmp_path / "empty").mkdir()
    for more, message in (
        (("--init", str(tmp_path / "none.safetensors")), "none.safetensors: no such file"),
        (("--init", str(tmp_path / "empty")), "is not a run folder"),
        (("--init", str(tmp_path / "run"), "--model", "ViT-S-16"), "is of another model: its embed_dim is 128"),
        (("--on-resize", "interpolate"), "--on-resize interpolate is for weights of another grid"),
        (("--attention", "flash"), "--attention flash cannot serve: it runs on CUDA alone, and this is cpu"),
    ):
        assert train.main(command(shards, tmp_path / "new", "--model", "ViT-Ti-16", *more)) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "new" / "config.json").exists()


def test_the_moving_average_is_exported_where_it_is_asked_for(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "clip" / "model.safetensors"
    small = ("--model", "ViT-Ti-16", "--tokens", "4", "--text-tokens", "6", "--batch-size", "32", "--device", "cpu")
    assert train.main(["--data", str(shards), "--out", str(run), "--steps", "3", *small, "--ema", "0.5"]) == 0
    newest = checkpoint.newest(run)[0]
    assert newest is not None
    for more, group in (((), "model"), (("--ema",), "ema")):
        assert export.main([str(run), "--out", str(out), *more]) == 0
        wanted = newest.tensors(group)["image.blocks.0.mlp_in.weight"]
        assert torch.equal(load_file(out)["visual.transformer.resblocks.0.mlp.c_fc.weight"], wanted)
    make_run(tmp_path / "other", TINY, 4, 8)
    assert export.main([str(tmp_path / "other"), "--out", str(out), "--ema"]) == 2
    assert "keeps no moving average of its weights" in capsys.readouterr().err
