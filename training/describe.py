"""What a run prints before its first step: every value that follows from others."""

import torch

from model.clip import CLIP, gflops_per_pair
from pipeline.index import Index
from pipeline.mixture import Mixture, by_source
from pipeline.order import Order

from .config import attention_backends
from .fields import Config


def describe(config: Config, model: CLIP, index: Index, order: Order | Mixture, layout: str) -> None:
    """Prints it. layout: the ranks, and how the model lies on them."""
    geometry, count = config.geometry, model.num_parameters()
    image, text = gflops_per_pair(model.config, config.tokens, config.text_tokens)
    rows, columns = geometry.grid
    print(f"run       {config.run_folder}")
    print(
        f"image     {config.tokens} of {rows * columns} tokens by {config.image_reduction}: {geometry.image_size} px, "
        f"grid {rows} x {columns}, patch {geometry.patch}"
    )
    print(f"text      {config.text_tokens} tokens by {config.text_reduction}")
    print(
        f"model     {config.model}: {count['total'] / 1e6:.2f} M parameters "
        f"(image {count['image'] / 1e6:.2f}, text {count['text'] / 1e6:.2f})"
    )
    print(f"compute   {3 * (image + text):.3f} GFLOPs a pair and step (forward: image {image:.3f}, text {text:.3f})")
    print(f"loss      {config.loss}{', tiled' if config.tiled else ''}{memory_phrase(config)}")
    left_out = "".join(f", {count:,} {reason}" for reason, count in index.rejected.items())
    print(f"data      {index.num_usable:,} pairs in {len(index.shards)} shards{left_out}")
    for line in length_lines(config, index, order):
        print(line)
    for shard in index.shards:
        if shard.problem:
            print(f"          {shard.path}: {shard.problem}; {shard.usable:,} samples before that are used")
    print(f"batches   {batches_phrase(config)}")
    on_gpu = config.decoder == "dali" and config.device == "cuda"
    by_tower = ", ".join(f"{backend} ({tower})" for tower, backend in attention_backends(config).items())
    print(
        f"device    {config.device}, {config.precision}; decoder {config.decoder} on the {'GPU' if on_gpu else 'CPU'}; "
        f"attention {by_tower}; {torch.get_num_threads()} threads"
    )
    print(f"ranks     {layout}", flush=True)


def batches_phrase(config: Config) -> str:
    """Returns who makes a rank's batches."""
    if not config.workers:
        return f"by {config.threads} thread{'s' * (config.threads > 1)}"
    unused = f"; --threads {config.threads} has no effect beside --workers" if config.threads > 1 else ""
    return f"by {config.workers} worker process{'es' * (config.workers > 1)}{unused}"


def memory_phrase(config: Config) -> str:
    """Returns how the step's memory is kept down, or nothing."""
    micro = f"; {config.accumulate} micro-batches" if config.accumulate > 1 else ""
    return micro + ("; activations computed again for the gradient" if config.grad_checkpointing else "")


def length_lines(config: Config, index: Index, order: Order | Mixture) -> list[str]:
    """Returns how long the run is, and how often it goes through each source."""
    total = config.total_steps * config.batch_size
    pairs = [int(sizes.sum()) for sizes in by_source(index.shard_sizes, index.source_shards)]
    if isinstance(order, Mixture):
        by, length = "weight", "shares by weight"
        seen: list[float] = [*order.samples_by_source(config.total_steps)]
        left_out = [f", {source.left_out} pairs of each left out by the lanes" for source in order.sources]
        end = ""
    else:
        by, length = "size", f"{total / order.num_samples:.1f} epochs"
        seen, left_out = [total * own / index.num_usable for own in pairs], [""] * len(pairs)
        end = f", {order.left_out} pairs of each left out by them"
    lines = [
        f"source    {source}: {own:,} pairs in {shards:,} shards; {samples / total:.3%} of the run by {by}, "
        f"{samples / own:.1f} epochs{rest}"
        for source, own, shards, samples, rest in zip(
            config.sources[0], pairs, index.source_shards, seen, left_out, strict=True
        )
    ]
    return [
        *(lines if len(lines) > 1 else []),
        f"length    {config.total_steps:,} steps of {config.batch_size:,} pairs: {length}"
        f"{', resampled' if config.resampled else ''} in {order.lanes} lanes{end}",
    ]
