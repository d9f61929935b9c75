"""DALI's graph decodes only the window and resizes it small; its patches come out. On DALI's CPU backend or a GPU.

No operator in the graph draws at random: windows are fed from the plan. The GPU path has not been run on a GPU yet.
About 300 us for a 128 px JPEG at 16 tokens on the CPU backend, of which its resampler is the larger half.
"""

import functools
import importlib
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from .decode import OTHER_SIZE, UNDECODABLE, Decoded
from .jpeg import frame_size
from .plan import Windows
from .tokens import Geometry, Positions, gather_patches

_PLACEHOLDER_SIDE = 32
_CHROMA_MARGIN = 8
"""Pixels decoded beyond a block, so that its colours are upsampled from the same neighbours as in the whole image."""
_PROBE_SECONDS = 120
_RUN_SIZE = 128
_RUN_PIXELS = 16_000_000
"""Images in one run of the pipeline, and pixels that it decodes for them, which DALI holds all at once. Of small images
128 are as fast as any more; of raw photographs, so 35 a run, 16 are."""
_GPU_RUN_PIXELS = 128_000_000


@dataclass(frozen=True)
class _Images:
    """A batch, or a part of it."""

    jpegs: Sequence[bytes | None]
    windows: Windows
    positions: Positions
    sides: npt.NDArray[np.float64]
    """[batch, 2]: height and width."""

    def part(self, start: int, stop: int) -> "_Images":
        rows = slice(start, stop)
        return _Images(self.jpegs[rows], self.windows[rows], self.positions[rows], self.sides[rows])


class DaliDecoder:
    """One DALI pipeline, run some images at a time. Those that kill it are found, named and left out."""

    def __init__(
        self, geometry: Geometry, batch_size: int, device_id: int | None = None, decode_window: bool | None = None
    ) -> None:
        """batch_size: the largest batch. device_id: the GPU that decodes (`mixed`), or None for the CPU backend.

        decode_window: decode only the window; if False, the whole image, and the window is cut by the resize. None:
        True, unless the GPU's decoder cannot do it (nvImageCodec 0.9.0 fails or crashes with it on some cards).
        Raises ValueError where DALI is not installed.
        """
        self.geometry, self.device_id = geometry, device_id
        self.run_size = min(batch_size, _RUN_SIZE)
        self.run_pixels = _RUN_PIXELS if device_id is None else _GPU_RUN_PIXELS
        self.decode_window = window_decode_works(device_id) if decode_window is None else decode_window
        self._placeholder = _grey_jpeg()
        self._graph = _define(geometry, self.decode_window)
        self._tensors: Any = importlib.import_module("nvidia.dali.tensors")
        self._pipeline = self._build()

    def decode(
        self,
        jpegs: Sequence[bytes | None],
        windows: Windows,
        positions: Positions,
        widths: npt.NDArray[np.int32],
        heights: npt.NDArray[np.int32],
    ) -> Decoded:
        """See decode.Decoder. On a GPU the patches stay there."""
        faults = {
            slot: fault
            for slot, (jpeg, height, width) in enumerate(zip(jpegs, heights.tolist(), widths.tolist(), strict=True))
            if jpeg is not None and (fault := _fault(jpeg, height, width))
        }
        usable = [None if slot in faults else jpeg for slot, jpeg in enumerate(jpegs)] if faults else jpegs
        images = _Images(usable, windows, positions, np.stack([heights, widths], axis=1).astype(np.float64))
        device = "cpu" if self.device_id is None else f"cuda:{self.device_id}"
        shape = len(jpegs), self.geometry.tokens, self.geometry.patch_values
        patches = torch.empty(shape, dtype=torch.uint8, device=device)
        areas = windows[:, 2] * windows[:, 3] if self.decode_window else images.sides.prod(axis=1)
        for start, stop in _runs(areas, self.run_size, self.run_pixels):
            found = self._decode_checked(images.part(start, stop), patches[start:stop])
            faults |= {start + slot: fault for slot, fault in found.items()}
        return Decoded(patches, faults)

    def _decode_checked(self, images: _Images, patches: torch.Tensor) -> dict[int, str]:
        """Fills `patches`, and returns slot -> reason of those images that cannot be decoded."""
        try:
            self._run(images, patches)
            return {}
        except RuntimeError as error:
            # By DALI's design the pipeline is dead now, and the message does not say which image it was.
            self._pipeline = self._build()
            jpegs = images.jpegs
            if all(jpeg is None for jpeg in jpegs):
                raise ValueError(f"DALI fails without any image to blame: {_last_line(error)}") from error
        if len(jpegs) == 1:
            # What fails with the placeholder too, or not a second time, was no fault of the image.
            self._decode_checked(replace(images, jpegs=[None]), patches)
            try:
                self._run(images, patches)
                return {}
            except RuntimeError:
                self._pipeline = self._build()
            return {0: UNDECODABLE}
        half = len(jpegs) // 2
        faults = self._decode_checked(images.part(0, half), patches[:half])
        others = self._decode_checked(images.part(half, len(jpegs)), patches[half:])
        return faults | {slot + half: reason for slot, reason in others.items()}

    def _run(self, images: _Images, patches: torch.Tensor) -> None:
        sides = images.sides
        start, extent = images.windows[:, [1, 0]], images.windows[:, [3, 2]]
        if None in images.jpegs:
            missing = np.array([jpeg is None for jpeg in images.jpegs])[:, None]
            sides = np.where(missing, _PLACEHOLDER_SIDE, sides)
            start, extent = np.where(missing, 0, start), np.where(missing, _PLACEHOLDER_SIDE, extent)
        feeds = {"roi_start": start, "roi_end": start + extent}
        if self.decode_window:
            # The filter reaches one output pixel beyond the window; decoding that much more makes its edge exact.
            margin = np.ceil(extent / np.array(self.geometry.decoded_size))
            if self.geometry.decoded_grid != self.geometry.grid:
                margin += _CHROMA_MARGIN
            first = np.floor(np.maximum(start - margin, 0))
            last = np.ceil(np.minimum(start + extent + margin, sides))
            feeds = {name: place - first for name, place in feeds.items()}
            self._feed("slice_start", first.astype(np.int32))
            self._feed("slice_shape", (last - first).astype(np.int32))
        for name, places in feeds.items():
            self._feed(name, places.astype(np.float32))
        # As DALI's own types, not copied: feed_input would look at each array three times in Python.
        encoded = [self._tensors.TensorCPU(self._placeholder if jpeg is None else jpeg) for jpeg in images.jpegs]
        self._pipeline.feed_input("jpeg", self._tensors.TensorListCPU(encoded, None, False))
        (output,) = self._pipeline.run()
        # Copied, since DALI gives the same buffer to the next run. Outside the graph: for 49 patches, a transpose in it
        # takes 20 us an image more, and multi_paste, to gather them from 196, 60 us; that also ends at 64 patches.
        dali_tensor: Any = output.as_tensor()
        on_cpu, patch = self.device_id is None, self.geometry.patch
        pixels: Any = np.array(dali_tensor, copy=False) if on_cpu else torch.from_dlpack(dali_tensor)
        kept: Any = patches.numpy() if on_cpu else patches
        if self.geometry.keeps_all_decoded:
            rows, columns = self.geometry.decoded_grid
            cut = pixels.reshape(-1, rows, patch, columns, patch, 3).swapaxes(2, 3)
            kept.reshape(cut.shape)[...] = cut
        else:
            at = images.positions if on_cpu else torch.from_numpy(images.positions.astype(np.int64)).to(pixels.device)
            kept[...] = gather_patches(pixels, at, patch)

    def _feed(self, name: str, values: npt.NDArray[Any]) -> None:
        # DALI refuses strided arrays.
        self._pipeline.feed_input(name, self._tensors.TensorListCPU(np.ascontiguousarray(values)))

    def _build(self) -> Any:
        pipeline = self._graph(
            batch_size=self.run_size,
            num_threads=1,
            device_id=self.device_id,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
        )
        pipeline.build()
        return pipeline


def _define(geometry: Geometry, decode_window: bool) -> Any:
    """The graph, for either device: only the decoder is told where to run, the rest follows the data.

    It ends in the resampled image; its patches are cut or gathered from that.
    """
    try:
        from nvidia import dali
    except ImportError:
        raise ValueError(
            "--decoder dali needs nvidia-dali-cuda120, which exists for Linux on x86-64; use --decoder turbo"
        ) from None

    # DALI makes its operators' functions and constants at import, out of a checker's sight.
    fn: Any = dali.fn
    types: Any = dali.types
    pipeline_def: Any = dali.pipeline_def

    @pipeline_def
    def graph(device: str) -> Any:
        jpeg = fn.external_source(name="jpeg", no_copy=True)
        # adjust_orientation as libjpeg-turbo: ingestion makes images upright.
        settings = {"device": device, "output_type": types.RGB, "adjust_orientation": False}
        if decode_window:
            pixels = fn.decoders.image_slice(
                jpeg,
                fn.external_source(name="slice_start"),
                fn.external_source(name="slice_shape"),
                axes=(0, 1),
                normalized_anchor=False,
                normalized_shape=False,
                **settings,
            )
        else:
            pixels = fn.decoders.image(jpeg, **settings)
        return fn.resize(
            pixels,
            size=geometry.decoded_size,
            roi_start=fn.external_source(name="roi_start"),
            roi_end=fn.external_source(name="roi_end"),
            interp_type=types.INTERP_TRIANGULAR,
        )

    def make(*, device_id: int | None, **settings: Any) -> Any:
        return graph(device="cpu" if device_id is None else "mixed", device_id=device_id, **settings)

    return make


@functools.cache
def window_decode_works(device_id: int | None) -> bool:
    """Returns whether this device's decoder can decode a window only; a GPU is asked once, in a process of its own.

    nvImageCodec 0.9.0 answers with an error on some cards and a segmentation fault on others (nvImageCodec issue 55).
    """
    if device_id is None:
        return True
    probe = [sys.executable, "-m", __name__, str(device_id)]
    try:
        works = subprocess.run(probe, timeout=_PROBE_SECONDS, capture_output=True, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        works = False
    if not works:
        warnings.warn(
            f"the JPEG decoder of GPU {device_id} cannot decode a window only: whole images are decoded, slower",
            stacklevel=2,
        )
    return works


def _runs(areas: npt.NDArray[np.float64], size: int, pixels: int) -> Iterator[tuple[int, int]]:
    """Yields (start, stop) of consecutive images: at most `size`, and at most so many pixels where more than one."""
    start, total = 0, 0.0
    for slot, area in enumerate(areas.tolist()):
        if slot - start == size or (total + area > pixels and slot > start):
            yield start, slot
            start, total = slot, 0.0
        total += area
    if len(areas):
        yield start, len(areas)


def _fault(jpeg: bytes, height: int, width: int) -> str | None:
    """Returns why an image must not reach DALI.

    An error in the scan costs its pipeline, and with it 60 ms. An error in the header, with nvImageCodec 0.9.0.20, also
    writes where it should not, and the process dies of it a moment later; what libjpeg accepts of it never did.
    """
    if (size := frame_size(jpeg)) is None:
        return UNDECODABLE
    return None if size == (height, width) else OTHER_SIZE


def _last_line(error: Exception) -> str:
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _grey_jpeg() -> bytes:
    return simplejpeg.encode_jpeg(np.full((_PLACEHOLDER_SIDE, _PLACEHOLDER_SIDE, 3), 128, np.uint8))


def _probe(device_id: int) -> None:
    """Decodes a window on a GPU; fails, or kills the process, where that does not work."""
    from .tokens import token_geometry

    decoder = DaliDecoder(token_geometry(1), 1, device_id, decode_window=True)
    side = np.array([_PLACEHOLDER_SIDE], np.int32)
    decoded = decoder.decode([_grey_jpeg()], np.array([[8.0, 8.0, 16.0, 16.0]]), np.zeros((1, 1), np.int16), side, side)
    if decoded.faults or abs(int(decoded.patches.float().mean()) - 128) > 2:
        raise SystemExit(1)


if __name__ == "__main__":
    _probe(int(sys.argv[1]))
