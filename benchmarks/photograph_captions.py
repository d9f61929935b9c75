"""Captions such as the web's alternative texts: what a picture shows, between names, tags and file names.

Their lengths are what matters to a tokenizer: one word to fifty, ten on average.
"""

import numpy as np

_SHORT = (
    "{Subject}",
    "{subject}",
    "{Subject}.",
    "{Subject} - Stock Photo",
    "{Subject} | Free HD Wallpaper 1920x1080",
    "IMG_{number}: {subject}",
    "DSC0{number}.JPG",
    "Photo of {subject}",
    '"{Subject}" by {name}',
    "{Subject}, {place} (c) {name} {year}",
    "{name}'s photo album: {subject}",
    "{Subject} | {place} Travel Guide {year}",
    "Canvas Print - {Subject} - Size {number}",
    "{Subject} royalty-free image #{number}",
)
_LONG = (
    "taken in {place} on a {weather} morning in {year}",
    "click here to see the rest of the gallery by {name}",
    "we stopped on our way to {place} because the light was too good to miss",
    "printed on acid-free paper and shipped within two working days",
    "posted by {name} in Photography, Nature, Outdoors & {place}",
    "the {weather} weather made for a picture that {name} still likes to show to friends",
)
_NAMES = ("Anna", "B. Müller", "Chloé", "Jürgen K.", "Mehmet", "Priya", "S. O'Brien", "Tomás", "Yuki")
_PLACES = ("Bavaria", "Cornwall", "Kyoto", "Lake Tahoe", "northern Spain", "Tasmania", "the Scottish Highlands")
_WEATHERS = ("foggy", "rainy", "sunny", "windy")


def caption(rng: np.random.Generator, subject: str) -> str:
    """Returns a caption for a picture of `subject`; one in six carries one to three clauses more."""
    words = {
        "subject": subject,
        "Subject": subject[:1].upper() + subject[1:],
        "number": int(rng.integers(1000, 10_000)),
        "year": int(rng.integers(2005, 2024)),
        "name": _NAMES[int(rng.integers(len(_NAMES)))],
        "place": _PLACES[int(rng.integers(len(_PLACES)))],
        "weather": _WEATHERS[int(rng.integers(len(_WEATHERS)))],
    }
    parts = [_SHORT[int(rng.integers(len(_SHORT)))]]
    if rng.random() < 1 / 6:
        parts += [_LONG[int(i)] for i in rng.choice(len(_LONG), int(rng.integers(1, 4)), replace=False)]
    return ", ".join(parts).format(**words)
