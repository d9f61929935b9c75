"""DALI's graph: decode only the window, resize it small, cut it into patches; on its CPU backend or a GPU (`mixed`).

No operator in the graph draws at random: windows are fed from the plan. The GPU path has not been run on a GPU yet.
About 300 us for a 128 px JPEG at 16 tokens on the CPU backend, of which its resampler is the larger half.
"""

import functools
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from .decode import OTHER_SIZE, UNDECODABLE, Decoded
from .plan import Windows
from .tokens import Geometry, Positions, gather_patches

_PLACEHOLDER_SIDE = 32
_CHROMA_MARGIN = 8
"""Pixels decoded beyond a block, so that its colours are upsampled from the same neighbours as in the whole image."""
_PROBE_SECONDS = 120
_RUN_SIZE = 128
"""Images in one run of the pipeline: DALI holds all their decoded windows at once, 1 to 2 MB each of raw web size."""


class DaliDecoder:
    """One DALI pipeline, run 128 images at a time. Those that kill it are found, named and left out."""

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
        self.decode_window = window_decode_works(device_id) if decode_window is None else decode_window
        self._placeholder = np.frombuffer(_grey_jpeg(), np.uint8)
        self._graph = _define(geometry, self.decode_window)
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
            if jpeg is not None and (fault := _header_fault(jpeg, height, width))
        }
        usable = [None if slot in faults else jpeg for slot, jpeg in enumerate(jpegs)]
        parts: list[torch.Tensor] = []
        for start in range(0, len(jpegs), self.run_size):
            part = slice(start, start + self.run_size)
            decoded = self._decode_checked(usable[part], windows[part], positions[part], widths[part], heights[part])
            parts.append(decoded.patches)
            faults |= {start + slot: fault for slot, fault in decoded.faults.items()}
        return Decoded(_joined(parts), faults)

    def _decode_checked(
        self,
        jpegs: Sequence[bytes | None],
        windows: Windows,
        positions: Positions,
        widths: npt.NDArray[np.int32],
        heights: npt.NDArray[np.int32],
    ) -> Decoded:
        sides = np.stack([heights, widths], axis=1).astype(np.float64)
        start, extent = windows[:, [1, 0]], windows[:, [3, 2]]
        missing = np.array([jpeg is None for jpeg in jpegs])
        if missing.any():
            sides = np.where(missing[:, None], _PLACEHOLDER_SIDE, sides)
            start = np.where(missing[:, None], 0, start)
            extent = np.where(missing[:, None], _PLACEHOLDER_SIDE, extent)
        encoded = [self._placeholder if jpeg is None else np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        try:
            return Decoded(self._run(encoded, sides, start, extent, positions), {})
        except RuntimeError as error:
            # By DALI's design the pipeline is dead now, and the message does not say which image it was.
            self._pipeline = self._build()
            if missing.all():
                raise ValueError(f"DALI fails without any image to blame: {_last_line(error)}") from error
        # libjpeg tells at a tenth of the cost of a second run; what it can read and DALI cannot is found by halving.
        culprits = dict.fromkeys(
            (slot for slot, jpeg in enumerate(jpegs) if jpeg is not None and not _decodes(jpeg)), UNDECODABLE
        )
        if culprits:
            rest = [None if slot in culprits else jpeg for slot, jpeg in enumerate(jpegs)]
            decoded = self._decode_checked(rest, windows, positions, widths, heights)
            return Decoded(decoded.patches, culprits | decoded.faults)
        if len(jpegs) == 1:
            # What fails with the placeholder too, or not a second time, was no fault of the image.
            alone = self._decode_checked([None], windows, positions, widths, heights)
            try:
                return Decoded(self._run(encoded, sides, start, extent, positions), {})
            except RuntimeError:
                self._pipeline = self._build()
            return Decoded(alone.patches, {0: UNDECODABLE})
        half = len(jpegs) // 2
        parts = [
            self._decode_checked(jpegs[part], windows[part], positions[part], widths[part], heights[part])
            for part in (slice(0, half), slice(half, None))
        ]
        faults = parts[0].faults | {slot + half: reason for slot, reason in parts[1].faults.items()}
        return Decoded(_joined([part.patches for part in parts]), faults)

    def _run(
        self,
        encoded: Sequence[npt.NDArray[np.uint8]],
        sides: npt.NDArray[np.float64],
        start: npt.NDArray[np.float64],
        extent: npt.NDArray[np.float64],
        positions: Positions,
    ) -> torch.Tensor:
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
        self._pipeline.feed_input("jpeg", list(encoded))
        (output,) = self._pipeline.run()
        dali_tensor: Any = output.as_tensor()
        if self.device_id is None:
            pixels: Any = np.array(dali_tensor, copy=self.geometry.keeps_all_decoded)
            if self.geometry.keeps_all_decoded:
                return torch.from_numpy(pixels)
            # Outside the graph: multi_paste in it takes 60 us an image more (49 of 196), and ends at 64 patches.
            return torch.from_numpy(gather_patches(pixels, positions, self.geometry.patch))
        # Copied, since DALI gives the same buffer to the next run.
        pixels = torch.from_dlpack(dali_tensor)
        if self.geometry.keeps_all_decoded:
            return pixels.clone()
        at = torch.from_numpy(positions.astype(np.int64)).to(pixels.device)
        return gather_patches(pixels, at, self.geometry.patch)

    def _feed(self, name: str, values: npt.NDArray[Any]) -> None:
        # DALI refuses strided arrays.
        self._pipeline.feed_input(name, np.ascontiguousarray(values))

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

    It ends in patches where all are kept, else in the resampled image, from which they are gathered.
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
    patch, (rows, columns) = geometry.patch, geometry.decoded_grid

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
        pixels = fn.resize(
            pixels,
            size=geometry.decoded_size,
            roi_start=fn.external_source(name="roi_start"),
            roi_end=fn.external_source(name="roi_end"),
            interp_type=types.INTERP_TRIANGULAR,
        )
        if not geometry.keeps_all_decoded:
            return pixels
        cut = fn.transpose(fn.reshape(pixels, shape=[rows, patch, columns, patch, 3]), perm=[0, 2, 1, 3, 4])
        return fn.reshape(cut, shape=[geometry.tokens, geometry.patch_values])

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


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    if len(parts) == 1:
        return parts[0]
    if parts[0].device.type != "cpu":
        return torch.cat(list(parts))
    # Not torch.cat: it would call up the step's OpenMP threads for a copy.
    return torch.from_numpy(np.concatenate([part.numpy() for part in parts]))


def _header_fault(jpeg: bytes, height: int, width: int) -> str | None:
    """Returns why an image must not reach DALI; 3 us.

    An error in the scan costs its pipeline. An error in the header, with nvImageCodec 0.9.0.20, also writes where it
    should not, and the process dies of it a moment later; what libjpeg's own look at the header accepts never did.
    """
    try:
        found: tuple[Any, ...] = simplejpeg.decode_jpeg_header(jpeg, strict=False)
    except Exception:  # simplejpeg raises ValueError, and KeyError for what libjpeg does not know
        return UNDECODABLE
    return None if found[:2] == (height, width) else OTHER_SIZE


def _decodes(jpeg: bytes) -> bool:
    """Whether libjpeg gets through the image, at 1/8 of its size."""
    try:
        simplejpeg.decode_jpeg(jpeg, "RGB", True, True, 1, 1, 1, None, False)
    except Exception:  # as above
        return False
    return True


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
