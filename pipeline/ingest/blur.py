"""Faces made unrecognisable, as the data set's own downloader does it: boxes in, a picture blurred there out.

The boxes are fractions of the picture as it is stored, [left, top, right, bottom]. Each grows by a tenth of its longer
side; a Gaussian of a tenth of the longest box blurs the picture, and its own mask so that no edge shows.
"""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFilter

MARGIN = 0.1
SIGMA = 0.1


def blur_boxes(picture: Image.Image, boxes: Sequence[Sequence[float]]) -> Image.Image:
    """Returns an RGB picture with the boxes blurred. Boxes of other than four numbers are an error of the metadata."""
    mask = Image.new("L", picture.size, 0)
    draw = ImageDraw.Draw(mask)
    longest = 0.0
    for left, top, right, bottom in boxes:
        box = (left * picture.width, top * picture.height, right * picture.width, bottom * picture.height)
        side = max(box[2] - box[0], box[3] - box[1])
        if side <= 0:
            continue
        margin = MARGIN * side
        draw.rectangle((box[0] - margin, box[1] - margin, box[2] + margin, box[3] + margin), fill=255)
        longest = max(longest, side)
    if not longest:
        return picture
    gaussian = ImageFilter.GaussianBlur(max(SIGMA * longest, 1.0))
    return Image.composite(picture.filter(gaussian), picture, mask.filter(gaussian))
