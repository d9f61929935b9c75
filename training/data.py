"""A run's data as its config says: the index of its shards, and the loader of this rank's part of each batch."""

import os
from pathlib import Path

import torch

from model.presets import ModelConfig
from pipeline.index import Index, open_index
from pipeline.loader import Loader, Settings
from pipeline.mixture import Mixture, make_order
from pipeline.order import Order

from .distributed import World
from .fields import STARTER, Config

_RECIPE = Path(__file__).parents[1] / "datasets" / "emoji.toml"


def open_data(config: Config, world: World) -> tuple[Index, Order | Mixture]:
    """Returns the index and the order of a resolved config's data. Makes the starter, or the rest of it, if asked for.

    Raises AgreedError where there is no usable data, or batch, lanes and data do not fit.
    """
    with world.agreed(), world.first_goes_ahead():
        sources, shares = config.sources
        if world.is_first and STARTER in sources:
            _make_starter()
        index = open_index(sources)
        assert config.lanes is not None
        order = make_order(
            index.shard_sizes, index.source_shards, shares, batch_size=config.batch_size, seed=config.seed,
            lanes=config.lanes, resampled=config.resampled,
        )  # fmt: skip
    return index, order


def batch_settings(config: Config, encoders: ModelConfig) -> Settings:
    """Returns what the batches of a resolved config look like."""
    assert config.decoder != "auto"
    return Settings(
        config.geometry,
        config.text_tokens,
        config.decoder,
        crop=config.crop,
        colour=config.colour,
        captions=config.captions,
        text_reduction=config.text_reduction,
        tokenizer=encoders.text.tokenizer,
        vocabulary=config.vocabulary,
        seed=config.seed,
        device_id=(torch.cuda.current_device() if config.device == "cuda" else None),
    )


def open_loader(
    index: Index, order: Order | Mixture, settings: Settings, world: World, *, traced: bool = False
) -> Loader:
    """Returns the loader of this rank's part. Raises AgreedError where a decoder or vocabulary is missing.

    traced: its batches show in a profiler's trace.
    """
    kind = Loader
    if traced:
        from .trace import TracedLoader as kind
    with world.agreed():
        return kind(index, order, settings, rank=world.rank, world_size=world.size)


def _make_starter() -> None:
    # Its renderer takes a quarter of a second to import.
    from pipeline.ingest.emoji import finished, make
    from pipeline.ingest.recipe import WebRecipe, load

    folder = Path(STARTER).parent
    if finished(folder) is None:
        print(f"--data {STARTER} is not there yet: making the starter (once, about a minute)", flush=True)
        recipe = load(_RECIPE)
        assert not isinstance(recipe, WebRecipe)
        make(recipe, folder, os.cpu_count() or 1)
