"""The names that can be said on a command line of how a model is computed and begun; here, to be had without torch."""

from typing import Literal

AttentionName = Literal["auto", "sdpa", "flash", "xformers", "math"]
LossKind = Literal["infonce", "sigmoid"]
Positions = Literal["fixed", "learned"]
OnResize = Literal["auto", "recompute", "interpolate"]
