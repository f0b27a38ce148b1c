"""A failed comparison as a picture: where the error is, tokens x columns and experts x tiles, on a logarithmic scale of z.

Written by the child, where the output still exists. Every pixel is the worst of the elements it stands for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor

from harness.oracle import Expected
from harness.verdict import Comparison, Verdict

FOLDER = "pictures"
MAX_PICTURES = 50  # a run: a backend that is wrong everywhere is wrong in the same way
MAX_PX, MIN_PX = 1024, 256  # of a panel's side, before and after pixels are enlarged
MAX_ENLARGED = 16
TILE = 64  # columns of an output tile in the lower panel, the smallest N of CUTLASS and Triton grouped kernels
BELOW, BEYOND = ((10, 14, 40), (110, 160, 210)), ((255, 225, 80), (150, 0, 20))  # from .. to, on either side of the limit
NOTHING, BROKEN = (40, 40, 40), (255, 0, 255)  # not judged or no token; NaN or inf
FADES = 100.0  # z this much below the limit is as dark as it gets
MARGIN, LINE, BAR = 10, 14, 12  # pixels
UNJUDGED = -1.0

Artist = Callable[[Expected, Tensor, Verdict], Verdict]


def artist(run_folder: Path) -> Artist:
    """Draws failed comparisons into `run_folder`/pictures, at most MAX_PICTURES a run, and notes the path in the verdict."""

    def draw(expected: Expected, got: Tensor, verdict: Verdict) -> Verdict:
        if not verdict.status.failed or verdict.comparison is None or verdict.comparison.agrees or not got.numel():
            return verdict
        folder = run_folder / FOLDER
        with suppress(OSError):  # a full disk costs the picture, not the verdict
            folder.mkdir(exist_ok=True)
            if len(list(folder.glob("*.png"))) < MAX_PICTURES:
                name = re.sub(r"[^\w.-]", "_", f"{verdict.subject}__{verdict.case_id}") + ".png"
                picture(expected, got, verdict.comparison, f"{verdict.subject}  {verdict.case_id}").save(folder / name)
                return replace(verdict, picture=f"{FOLDER}/{name}")
        return verdict

    return draw


def picture(expected: Expected, got: Tensor, comparison: Comparison, title: str) -> Image.Image:
    """RGB image of got [tokens, hidden] against `expected`."""
    z = z_of(expected, got)
    finite = z[z.isfinite() & (z > 0)]
    limit = comparison.limit or float(finite.min() if finite.numel() else 1.0)
    top = max(float(finite.max()) if finite.numel() else limit, 2 * limit)
    tokens, columns = z.shape
    panels = [(f"tokens 0..{tokens - 1} (down) x columns 0..{columns - 1}{_per_pixel(z)}", z)]
    if expected.layer is not None:  # an op beside the whole layer has no experts
        by_expert = expert_tiles(expected, z, expected.layer.case.shape.experts)
        panels.append((f"experts 0..{len(by_expert) - 1} (down) x tiles of {TILE} columns{_per_pixel(by_expert)}", by_expert))
    drawn = [(caption, _image(enlarged(colours(pooled(part), limit, top)))) for caption, part in panels]
    kind = "any difference" if comparison.limit == 0 else f"limit {comparison.limit:.3g}"
    bar = (
        f"z: {limit / FADES:.2g} to {top:.3g}; yellow to red: beyond ({kind}); magenta: NaN or inf; grey: nothing",
        _bar(limit, top),
    )
    return _stacked(title, [*drawn, bar])


def z_of(expected: Expected, got: Tensor) -> Tensor:
    """|got - expected| / sigma as float32 [tokens, hidden]; inf where not finite, UNJUDGED in ambiguous rows."""
    actual = expected.read(got).double()
    error = (actual - expected.value).abs()
    z = torch.where(error == 0, 0.0, error / expected.sigma).clamp(max=torch.finfo(torch.float32).max)
    z = torch.where(actual.isfinite(), z, torch.inf)
    return torch.where(expected.ambiguous[:, None], UNJUDGED, z).float()


def expert_tiles(expected: Expected, z: Tensor, experts: int) -> Tensor:
    """[experts, tiles]: the worst z of every expert's tokens in every tile of columns, UNJUDGED without tokens."""
    tiles = _max_pool(z, (1, TILE))
    ids = expected.routing.ids
    found = torch.full((experts, tiles.shape[1]), UNJUDGED)
    index = ids.flatten()[:, None].expand(-1, tiles.shape[1])
    return found.scatter_reduce_(0, index, tiles.repeat_interleave(ids.shape[1], 0), "amax")


def _factors(x: Tensor) -> tuple[int, int]:
    return -(-x.shape[0] // MAX_PX), -(-x.shape[1] // MAX_PX)


def _per_pixel(x: Tensor) -> str:
    down, across = _factors(x)
    return f", a pixel the worst of {down} x {across}" if down * across > 1 else ""


def _max_pool(x: Tensor, by: tuple[int, int]) -> Tensor:
    return torch.nn.functional.max_pool2d(x[None, None], by, ceil_mode=True)[0, 0]


def pooled(z: Tensor) -> Tensor:
    """At most MAX_PX x MAX_PX of z [rows, columns], each the largest of its block."""
    return _max_pool(z, _factors(z))


def colours(z: Tensor, limit: float, top: float) -> Tensor:
    """uint8 [rows, columns, 3]: log z from limit / FADES to `limit` and from there to `top` on two ramps that do not meet."""
    height = z.clamp(min=limit / FADES).log()
    bottom, middle, peak = (torch.tensor(v, dtype=torch.float32).log() for v in (limit / FADES, limit, top))
    below = _ramp(BELOW, (height - bottom) / (middle - bottom))
    beyond = _ramp(BEYOND, (height - middle) / (peak - middle))
    rgb = torch.where((z > limit * (1 - 1e-6))[..., None], beyond, below)
    rgb = torch.where((z == UNJUDGED)[..., None], torch.tensor(NOTHING, dtype=torch.float32), rgb)
    return torch.where(z.isinf()[..., None], torch.tensor(BROKEN, dtype=torch.float32), rgb).round().to(torch.uint8)


def _ramp(ends: tuple[tuple[int, int, int], tuple[int, int, int]], share: Tensor) -> Tensor:
    start, end = (torch.tensor(c, dtype=torch.float32) for c in ends)
    return start + (end - start) * share.nan_to_num(0.0).clamp(0, 1)[..., None]


def enlarged(pixels: Tensor) -> Tensor:
    """Small panels with pixels repeated until MIN_PX is reached, at most MAX_ENLARGED times."""
    for axis in (0, 1):
        pixels = pixels.repeat_interleave(min(MAX_ENLARGED, max(1, MIN_PX // pixels.shape[axis])), dim=axis)
    return pixels


def _image(pixels: Tensor) -> Image.Image:
    height, width, _ = pixels.shape
    return Image.frombytes("RGB", (width, height), pixels.contiguous().numpy().tobytes())


def _bar(limit: float, top: float) -> Image.Image:
    span = torch.linspace(math.log(limit / FADES), math.log(top), MIN_PX).exp()
    return _image(colours(span[None].expand(BAR, -1), limit, top))


def _stacked(title: str, panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """Panels under each other, each with its caption above."""
    text = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    width = max(*(image.width for _, image in panels), *(int(text.textlength(t)) for t in (title, *(c for c, _ in panels))))
    height = LINE + sum(image.height + LINE + MARGIN for _, image in panels)
    sheet = Image.new("RGB", (width + 2 * MARGIN, height + 2 * MARGIN), "white")
    pen, y = ImageDraw.Draw(sheet), MARGIN
    pen.text((MARGIN, y), title, fill="black")
    y += LINE
    for caption, image in panels:
        pen.text((MARGIN, y), caption, fill="black")
        sheet.paste(image, (MARGIN, y + LINE))
        y += image.height + LINE + MARGIN
    return sheet
