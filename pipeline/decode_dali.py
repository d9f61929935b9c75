"""DALI's graph: decode only the window, resize it small, cut it into patches; on its CPU backend or a GPU (`mixed`).

No operator in the graph draws at random: windows are fed from the plan. The GPU path has not been run on a GPU yet.
About 300 us for a 128 px JPEG at 16 tokens on the CPU backend, of which its resampler is the larger half.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from .decode import UNDECODABLE, Decoded
from .tokens import Geometry, Windows

_PLACEHOLDER_SIDE = 32


class DaliDecoder:
    """One DALI pipeline, run a batch at a time. A batch that kills it is halved until the culprits are known."""

    def __init__(self, geometry: Geometry, batch_size: int, device_id: int | None = None) -> None:
        """batch_size: the largest batch. device_id: the GPU that decodes (`mixed`), or None for the CPU backend.

        Raises ValueError where DALI is not installed.
        """
        self.geometry, self.batch_size, self.device_id = geometry, batch_size, device_id
        grey = np.full((_PLACEHOLDER_SIDE, _PLACEHOLDER_SIDE, 3), 128, np.uint8)
        self._placeholder = np.frombuffer(simplejpeg.encode_jpeg(grey), np.uint8)
        self._graph = _define(geometry)
        self._pipeline = self._build()

    def decode(
        self,
        jpegs: Sequence[bytes | None],
        windows: Windows,
        widths: npt.NDArray[np.int32],
        heights: npt.NDArray[np.int32],
    ) -> Decoded:
        """See decode.Decoder. On a GPU the patches stay there."""
        sides = np.stack([heights, widths], axis=1).astype(np.float64)
        start, extent = windows[:, [1, 0]], windows[:, [3, 2]]
        missing = np.array([jpeg is None for jpeg in jpegs])
        if missing.any():
            sides = np.where(missing[:, None], _PLACEHOLDER_SIDE, sides)
            start = np.where(missing[:, None], 0, start)
            extent = np.where(missing[:, None], _PLACEHOLDER_SIDE, extent)
        encoded = [self._placeholder if jpeg is None else np.frombuffer(jpeg, np.uint8) for jpeg in jpegs]
        try:
            return Decoded(self._run(encoded, sides, start, extent), {})
        except RuntimeError:
            # By DALI's design the pipeline is dead now, and the message does not say which image it was.
            self._pipeline = self._build()
        if len(jpegs) == 1:
            assert jpegs[0] is not None
            return Decoded(self.decode([None], windows, widths, heights).patches, {0: UNDECODABLE})
        half = len(jpegs) // 2
        parts = [
            self.decode(jpegs[part], windows[part], widths[part], heights[part])
            for part in (slice(0, half), slice(half, None))
        ]
        faults = parts[0].faults | {slot + half: reason for slot, reason in parts[1].faults.items()}
        return Decoded(torch.cat([part.patches for part in parts]), faults)

    def _run(
        self,
        encoded: Sequence[npt.NDArray[np.uint8]],
        sides: npt.NDArray[np.float64],
        start: npt.NDArray[np.float64],
        extent: npt.NDArray[np.float64],
    ) -> torch.Tensor:
        # The filter reaches one output pixel beyond the window; decoding that much more makes its edge exact.
        margin = np.ceil(extent / self.geometry.image_size)
        first = np.floor(np.maximum(start - margin, 0))
        last = np.ceil(np.minimum(start + extent + margin, sides))
        feeds = {
            "slice_start": first.astype(np.int32),
            "slice_shape": (last - first).astype(np.int32),
            "roi_start": (start - first).astype(np.float32),
            "roi_end": (start + extent - first).astype(np.float32),
        }
        self._pipeline.feed_input("jpeg", list(encoded))
        for name, values in feeds.items():
            # DALI refuses strided arrays.
            self._pipeline.feed_input(name, np.ascontiguousarray(values))
        (patches,) = self._pipeline.run()
        tensor: Any = patches.as_tensor()
        # DALI gives the same buffer to the next run.
        return torch.from_dlpack(tensor).clone() if self.device_id is not None else torch.from_numpy(np.array(tensor))

    def _build(self) -> Any:
        pipeline = self._graph(
            batch_size=self.batch_size,
            num_threads=1,
            device_id=self.device_id,
            prefetch_queue_depth=1,
            exec_pipelined=False,
            exec_async=False,
        )
        pipeline.build()
        return pipeline


def _define(geometry: Geometry) -> Any:
    """The graph, for either device: only the decoder is told where to run, the rest follows the data."""
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
    side, patch = geometry.image_size // geometry.patch, geometry.patch

    @pipeline_def
    def graph(device: str) -> Any:
        window = {
            name: fn.external_source(name=name) for name in ("slice_start", "slice_shape", "roi_start", "roi_end")
        }
        pixels = fn.decoders.image_slice(
            fn.external_source(name="jpeg", no_copy=True),
            window["slice_start"],
            window["slice_shape"],
            axes=(0, 1),
            normalized_anchor=False,
            normalized_shape=False,
            output_type=types.RGB,
            adjust_orientation=False,  # as libjpeg-turbo: ingestion makes images upright
            device=device,
        )
        pixels = fn.resize(
            pixels,
            size=(geometry.image_size, geometry.image_size),
            roi_start=window["roi_start"],
            roi_end=window["roi_end"],
            interp_type=types.INTERP_TRIANGULAR,
        )
        cut = fn.transpose(fn.reshape(pixels, shape=[side, patch, side, patch, 3]), perm=[0, 2, 1, 3, 4])
        return fn.reshape(cut, shape=[geometry.tokens, geometry.patch_values])

    def make(*, device_id: int | None, **settings: Any) -> Any:
        return graph(device="cpu" if device_id is None else "mixed", device_id=device_id, **settings)

    return make
