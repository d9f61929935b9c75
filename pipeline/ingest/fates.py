"""What became of a row, in a few words that can be counted: from what select, the downloader, the proxy and the decoder
said. Every row of a work list has exactly one fate.
"""

import re

SUCCESS = "success"

RETRIED = frozenset(
    ("too many requests", "server error", "too slow", "cut off", "no connection", "name not found", "lost")
)
"""What may go well another time."""

_PATTERNS: tuple[tuple[str, str], ...] = (
    # The proxy's, in a status line of its own; urllib says `HTTP Error 403: private address`, or for a tunnel
    # `Tunnel connection failed: 403 private address`.
    (r"403:? private address|403:? port not allowed", "private address"),
    (r"403:? scheme not allowed|unknown url type|is not allowed", "scheme"),
    (r"413:? too large|502:? header too large", "too large"),
    (r"504:? too slow|timed out|timeout", "too slow"),
    (r"502:? name not found|Name or service not known|Temporary failure in name resolution", "name not found"),
    (r"502:? cannot connect|Connection refused|unreachable", "no connection"),
    (r"502:? (no answer|no HTTP|bad length|bad header|unknown coding)", "cut off"),
    (r"400:? bad (request|host)|URL can't contain|codec can't encode", "bad url"),
    (r"no host given|nonnumeric port|NoneType|label", "bad url"),
    (r"X-Robots-Tag", "opt-out"),
    (r"infinite loop|redirect error", "redirect"),
    (r"HTTP Error 429", "too many requests"),
    (r"HTTP Error (408|5\d\d)|Tunnel connection failed: 5\d\d", "server error"),
    (r"HTTP Error 404|HTTP Error 410", "not found"),
    (r"HTTP Error 3\d\d", "redirect"),
    (r"HTTP Error \d+|Tunnel connection failed", "refused by the server"),
    (r"CERTIFICATE|certificate", "certificate"),
    (r"IncompleteRead|reset|closed|EOF|BadStatusLine|broken|SSL", "cut off"),
)  # fmt: skip
_RULES = tuple((re.compile(pattern), fate) for pattern, fate in _PATTERNS)

_DECODED = {
    "empty image": "empty",
    "not an image": "not an image",
    "damaged JPEG header": "damaged",
    "damaged JPEG data": "damaged",
    "damaged image data": "damaged",
    "pixels of 32 bits": "pixels of 32 bits",
}


def of_download(error: str | None, cut: str | None = None) -> str:
    """Returns the fate of a URL that gave nothing; cut: why the proxy broke its answer off, if it did."""
    text = error or ""
    fate = next((fate for rule, fate in _RULES if rule.search(text)), "other")
    return cut if cut and fate == "cut off" else fate


def of_picture(reason: str) -> str:
    """Returns the fate of bytes that are no usable picture, from the decoder's reason."""
    if "megapixels" in reason or "pixels long" in reason:
        return "too many pixels"
    return _DECODED.get(reason, "too large" if "MiB" in reason else "damaged")
