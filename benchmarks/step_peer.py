"""open_clip's own training step, measured inside `.venv-peers`: a plain script that imports nothing of this project.

In, on standard input: a JSON line with model_cfg (what open_clip_config.json holds), batch_size, tokens, threads; then
a line with a number of steps for each turn. Out, on standard output: a JSON line that says what is measured; then one
for each turn: images, cpu_s, wall_s, and gemm_gflop_per_s of a big square product, taken after it.

It is the step of open_clip's train.py: zero_grad, forward, ClipLoss, backward, torch.optim.AdamW as it makes it, clamp
of the temperature. Images come normalised, as its loader gives them, so that it has less to do than our step.
"""

# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false, reportAttributeAccessIssue=false

import json
import math
import sys
import time
import warnings
from importlib import metadata

SQUARE = 2048


def main() -> None:
    # What libraries print must not get between the lines.
    out, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    settings = json.loads(sys.stdin.readline())
    import torch

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    step = training_step(settings)
    batch_size = settings["batch_size"]
    packages = ("open_clip_torch", "torch")
    say(out, {"peer": "open_clip", **{name: metadata.version(name) for name in packages}})
    for line in sys.stdin:
        cpu, wall = time.process_time(), time.perf_counter()
        for _ in range(int(line)):
            step()
        cpu_s, wall_s = time.process_time() - cpu, time.perf_counter() - wall
        images = int(line) * batch_size
        say(out, {"images": images, "cpu_s": cpu_s, "wall_s": wall_s, "gemm_gflop_per_s": square_rate()})


def training_step(settings: dict):
    """Returns a function that takes one step on a batch of made images and captions."""
    import open_clip
    import torch

    config = settings["model_cfg"]
    vision, text = config["vision_cfg"], config["text_cfg"]
    size, patch = vision["image_size"], vision["patch_size"]
    on_grid = (size // patch) ** 2
    if settings["tokens"] < on_grid:
        vision["patch_dropout"] = 1 - settings["tokens"] / on_grid
    model = open_clip.CLIP(**config, output_dict=True).train()
    loss = open_clip.ClipLoss()

    # As open_clip_train/main.py makes it, with its parameters for a ViT.
    def plain(name, parameter):
        return parameter.ndim < 2 or "bn" in name or "ln" in name or "bias" in name or "logit_scale" in name

    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in named if plain(name, p)], "weight_decay": 0.0},
        {"params": [p for name, p in named if not plain(name, p)], "weight_decay": 0.2},
    ]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)
    batch_size = settings["batch_size"]
    images = torch.randn(batch_size, 3, size, size)
    texts = torch.randint(1, text["vocab_size"], (batch_size, text["context_length"]))

    def step():
        optimizer.zero_grad()
        losses = loss(**model(images, texts), output_dict=True)
        sum(losses.values()).backward()
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))

    return step


def square_rate() -> float:
    """Returns GFLOP/s of a float32 product of two square matrices, best of three."""
    import torch

    a, b, out = (torch.ones(SQUARE, SQUARE) for _ in range(3))
    best = math.inf
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * SQUARE**3 / best / 1e9


def say(out, message: dict) -> None:
    print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    main()
