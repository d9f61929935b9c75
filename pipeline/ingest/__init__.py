"""Recipes in, shards out: everything that makes image-text pairs on disk before any training.

`recipe` reads a TOML file, one module a source turns it into samples, `shards` writes them.
"""
