"""open_clip's own training loader, measured inside `.venv-peers`: a plain script that imports nothing of this project.

In: shards by name, and on standard input a line with a number of batches for each round. Out, on standard output: one
JSON line that says what is measured, then one for each round: images, cpu_s (this process and its workers), wall_s.
"""

# pyright: basic, reportMissingImports=false, reportMissingModuleSource=false

import argparse
import json
import multiprocessing.process
import os
import resource
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

# CLIPA's crops, given as open_clip's --aug-cfg; its default, 90 to 100 % of the area, costs more.
CROP_AREA = (0.4, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--image-size", type=int, required=True)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--workers", type=int, default=0, help="0: batches are made in this process, without hand-over")
    arguments = parser.parse_args()
    # What libraries print must not get between the lines.
    out, sys.stdout = sys.stdout, sys.stderr
    warnings.simplefilter("ignore")
    loader, transform = training_loader(arguments)
    packages = ("open_clip_torch", "torch", "torchvision", "webdataset", "pillow")
    say(out, {"peer": "open_clip", "transform": transform, **{name: metadata.version(name) for name in packages}})
    batches = iter(loader)
    for line in sys.stdin:
        images, cpu, wall = 0, cpu_seconds(), time.perf_counter()
        for _ in range(int(line)):
            images += len(next(batches)[0])
        say(out, {"images": images, "cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - wall})


def training_loader(arguments: argparse.Namespace):
    """Returns open_clip's loader over the shards, endless, and its transform as text."""
    import open_clip
    import torch
    from open_clip_train import data

    # As torch does in a DataLoader's worker.
    torch.set_num_threads(1)
    # The steady state at once: the shuffle's buffer starts with so many samples and then, in a run's first minutes,
    # grows by one for each that it gives out, each of which is read twice as fast as it is used.
    data._SAMPLE_SHUFFLE_SIZE = data._SAMPLE_SHUFFLE_INITIAL
    transform = open_clip.image_transform(
        arguments.image_size,
        is_train=True,
        mean=open_clip.OPENAI_DATASET_MEAN,
        std=open_clip.OPENAI_DATASET_STD,
        aug_cfg={"scale": CROP_AREA},
    )
    settings = argparse.Namespace(
        # A long run over a large set, which a short set is not: its end would drain the buffer.
        train_data=arguments.shards * 1000,
        train_num_samples=10**9,
        train_data_upsampling_factors=None,
        dataset_resampled=False,
        seed=0,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        world_size=1,
    )
    info = data.get_wds_dataset(settings, transform, is_train=True, tokenizer=open_clip.get_tokenizer("ViT-B-16"))
    return info.dataloader, " ".join(str(transform).split())


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of its children, those that live and those that ended."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    living = sum(map(child_seconds, multiprocessing.active_children()))
    return time.process_time() + ended.ru_utime + ended.ru_stime + living


def child_seconds(child: multiprocessing.process.BaseProcess) -> float:
    # After the name, which may hold spaces: fields 14 and 15 of proc(5) are the user and system time.
    fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def say(out, message: dict) -> None:
    print(json.dumps(message), file=out, flush=True)


if __name__ == "__main__":
    main()
