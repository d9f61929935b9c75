"""What a step's arithmetic is, and how fast this device does it: the model's own matrix products, alone.

The products of both towers are listed by shape: forward, and backward for the input and for the weight. Their rate is
what an ideal step, which does nothing else, would reach. Attention's own small products are not among them.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from model.presets import ImageConfig, ModelConfig, TextConfig

SQUARE = 2048
"""Side of the big product."""

_BF16_DENSE = {"H200": 989.4, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989.4, "A100": 312}
_TF32_DENSE = {"H200": 494.7, "H100 PCIe": 378, "H100 NVL": 417, "H100": 494.7, "A100": 156}
"""TFLOP/s of tensor cores without sparsity, from NVIDIA's data sheets; the first name that is part of the device's."""


@dataclass(frozen=True)
class Gemm:
    """A linear layer's products in a step, so many times: [rows, inputs] by [inputs, outputs]."""

    rows: int
    inputs: int
    outputs: int
    count: int
    for_input: bool = True
    """Whether the gradient of the input is computed too; of pixels it is not."""

    @property
    def flops(self) -> float:
        """Of one of its products; forward, input and weight gradient cost the same."""
        return 2.0 * self.rows * self.inputs * self.outputs

    @property
    def step_flops(self) -> float:
        return self.count * self.flops * (3 if self.for_input else 2)


def gemms(config: ModelConfig, batch_size: int, tokens: int, text_tokens: int) -> list[Gemm]:
    """Returns the products of a step as the model does them: where one token is pooled, the last block does fewer."""
    image, text = config.image, config.text
    return [
        Gemm(batch_size * tokens, image.patch_values, image.width, 1, for_input=False),
        *_tower(image, batch_size, tokens + 1, one_pooled=image.pooling == "class"),
        Gemm(batch_size, image.width, config.embed_dim, 1),
        *_tower(text, batch_size, text_tokens, one_pooled=True),
        Gemm(batch_size, text.width, config.embed_dim, 1),
    ]


def _tower(tower: ImageConfig | TextConfig, batch_size: int, num_tokens: int, *, one_pooled: bool) -> list[Gemm]:
    rows, d, wide = batch_size * num_tokens, tower.width, tower.mlp_width
    full = tower.layers - one_pooled
    found = [Gemm(rows, d, 3 * d, full), Gemm(rows, d, d, full), Gemm(rows, d, wide, full), Gemm(rows, wide, d, full)]
    if one_pooled:
        found += [
            Gemm(rows, d, 2 * d, 1),
            Gemm(batch_size, d, d, 2),
            Gemm(batch_size, d, wide, 1),
            Gemm(batch_size, wide, d, 1),
        ]
    return [gemm for gemm in found if gemm.count]


@dataclass(frozen=True)
class GemmRates:
    """GFLOP/s of products alone, by the clock and by CPU time; by CPU time it is per core."""

    model: float
    """Of the model's own shapes, as often as a step has each: what a step of nothing else would reach."""
    square: float
    """Of a big square one."""
    model_per_cpu_s: float | None
    """None on a GPU."""


class GemmMeter:
    """Measures products alone. The tensors stay, so that a measurement is nothing but products."""

    def __init__(self, products: Sequence[Gemm], device: torch.device, dtype: torch.dtype) -> None:
        self._products, self._device = products, device

        def make(rows: int, columns: int) -> torch.Tensor:
            return torch.randn(rows, columns, device=device).to(dtype)

        self._operands = [
            (make(g.rows, g.inputs), make(g.outputs, g.inputs), make(g.rows, g.outputs), make(1, g.outputs)[0])
            for g in products
        ]
        self._square = make(SQUARE, SQUARE)

    def measure(self) -> GemmRates:
        """Returns the rates of one turn: each shape once forward and once for each gradient, and the square."""
        flops = wall_s = cpu_s = 0.0
        for product, (x, weight, grad, bias) in zip(self._products, self._operands, strict=True):
            # As nn.Linear does them, forward and backward; the first time warms the caches up.
            calls: list[Callable[[], torch.Tensor]] = [
                partial(torch.addmm, bias, x, weight.t()),
                partial(torch.mm, grad.t(), x),
                *([partial(torch.mm, grad, weight)] if product.for_input else []),
            ]
            calls[0]()
            for call in calls:
                wall, cpu = self._timed(call)
                flops += product.count * product.flops
                wall_s += product.count * wall
                cpu_s += product.count * cpu
        square_s, _ = self._timed(partial(torch.mm, self._square, self._square))
        on_cpu = self._device.type == "cpu"
        return GemmRates(
            flops / wall_s / 1e9, 2.0 * SQUARE**3 / square_s / 1e9, flops / cpu_s / 1e9 if on_cpu else None
        )

    def _timed(self, call: Callable[[], torch.Tensor]) -> tuple[float, float]:
        """Seconds by the clock and of CPU time; the latter of no meaning on a GPU."""
        if self._device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / 1e3, 0.0
        cpu, wall = time.process_time(), time.perf_counter()
        call()
        return time.perf_counter() - wall, time.process_time() - cpu


def data_sheet_gflop_per_s(device: torch.device, dtype: torch.dtype) -> float | None:
    """Returns a known GPU's peak in GFLOP/s of that precision (float32: TF32); None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    table = _TF32_DENSE if dtype == torch.float32 else _BF16_DENSE
    return next((1e3 * peak for known, peak in table.items() if known in name), None)
