"""What the loader benchmark asks for: how many tokens, by which reduction, at which size. Cases are data."""

from dataclasses import dataclass

from pipeline.tokens import Geometry, ImageReduction, token_geometry


@dataclass(frozen=True)
class Case:
    """One row of a table: `64/16` is 64 px cut into 16 tokens, `224->49 random` 49 kept of the 196 of 224 px."""

    tokens: int
    image_reduction: ImageReduction = "resize"
    image_size: int | None = None

    @property
    def geometry(self) -> Geometry:
        """Raises ValueError for what cannot be."""
        return token_geometry(self.tokens, image_reduction=self.image_reduction, image_size=self.image_size)

    @property
    def name(self) -> str:
        size = self.geometry.image_size
        if self.image_reduction == "resize":
            return f"{size}/{self.tokens}"
        return f"{size}->{self.tokens} {self.image_reduction}"


STANDARD_CASES = (
    Case(16),
    Case(49),
    Case(196),
    Case(49, "random", 224),
    Case(49, "grid", 224),
    Case(49, "block", 224),
)
