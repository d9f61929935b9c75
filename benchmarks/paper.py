"""What CLIPA's paper found of image tokens: its sweep as data; nothing here was measured by us.

Source: arXiv 2305.07017 (v2), table 11 (ImageNet-1k zero-shot top-1 after the fine-tune at 196 tokens, single runs, 32
text tokens) and figure 8, whose compute is read off the figure. Tokens are kept patches, without the class token.
"""

FULL_TOKENS = 196

_TABLE_11 = (
    ("random", 98, 55.5, 62.6, 68.5),
    ("grid", 98, 54.6, 62.8, 68.5),
    ("block", 98, 55.6, 63.5, 69.5),
    ("resize", 100, 56.0, 63.6, 69.0),
    ("random", 49, 52.7, 60.9, 67.6),
    ("grid", 49, 53.1, 60.7, 67.3),
    ("block", 49, 53.4, 61.4, 68.5),
    ("resize", 49, 54.7, 62.9, 68.9),
    ("random", 36, 51.6, 58.9, 66.3),
    ("block", 36, 51.7, 60.7, 67.6),
    ("resize", 36, 53.9, 62.1, 68.1),
    ("random", 16, 47.5, 55.3, 62.4),
    ("block", 16, 46.8, 55.3, 62.9),
    ("resize", 16, 50.5, 59.9, 66.2),
)
MODELS = ("S/16", "B/16", "L/16")
FULL = {"S/16": 56.7, "B/16": 64.2, "L/16": 69.2}
"""Top-1, percent, without reduction."""

ACCURACY: dict[str, dict[tuple[str, int], float]] = {
    model: {(reduction, tokens): values[i] for reduction, tokens, *values in _TABLE_11}
    for i, model in enumerate(MODELS)
}
"""Model -> (reduction, tokens) -> top-1 in percent."""

COMPUTE: dict[str, tuple[tuple[float, float], ...]] = {
    "S/16": ((0.032, 50.5), (0.043, 53.9), (0.050, 54.7), (0.079, 56.0), (0.129, 56.7)),
    "B/16": ((0.089, 59.9), (0.133, 62.1), (0.162, 62.9), (0.275, 63.6), (0.468, 64.2)),
    "L/16": ((0.280, 66.2), (0.432, 68.1), (0.532, 68.9), (0.925, 69.0), (1.602, 69.2)),
    "H/14": ((0.559, 70.2), (0.701, 71.8), (0.875, 72.8)),
}
"""Model -> (training compute in 1e11 GFLOPs x samples, read off figure 8 to 0.005; top-1 in percent)."""


def drops(model: str, reduction: str = "resize") -> dict[int, float]:
    """Returns tokens -> points of top-1 below the full length, of one of MODELS."""
    return {
        tokens: round(FULL[model] - top1, 1) for (name, tokens), top1 in ACCURACY[model].items() if name == reduction
    }
