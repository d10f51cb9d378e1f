"""Random resized crops and flips, from an explicit generator: boxes drawn like torchvision's, cut on the CPU or a device.

On the CPU each image goes through torchvision's uint8 kernels. On a device a batch of padded images X is cut by two products,

    Y = Wy X Wxᵀ,    Wy (size, H), Wx (size, W)

whose rows hold Pillow's antialiased bicubic weights over the box, zero outside it; a flip reverses the rows of Wx. Shapes do
not depend on the boxes. Pillow rounds to 8 bits between the two passes, and so do we.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Boxes", "Normalise", "crop_on_cpu", "crop_on_device", "draw_boxes", "extent", "pad", "resize_weights"]

RATIO = (3 / 4, 4 / 3)
ATTEMPTS = 10


@dataclasses.dataclass(frozen=True)
class Boxes:
    """Crops of n images: top, left, height, width, int64 (n, 4), and whether each is mirrored, bool (n,)."""

    box: Tensor
    flip: Tensor

    def __getitem__(self, part: slice) -> Boxes:
        return Boxes(self.box[part], self.flip[part])


def draw_boxes(sizes: Tensor, scale: tuple[float, float], flip: bool, generator: torch.Generator) -> Boxes:
    """Boxes as torchvision's RandomResizedCrop draws them, all images at once.

    An area of scale × the image's and an aspect ratio of 3/4 to 4/3 (log-uniform) are tried ten times; the first that fits
    is placed uniformly. If none fits, the largest central box whose ratio is in bounds is taken.

    Args:
        sizes: height and width of each image, int64 (n, 2), on the CPU.
        scale: smallest and largest share of the area.
        flip: whether half of the images are mirrored.
        generator: a CPU generator; a call always takes the same number of draws.
    """
    n = len(sizes)
    area_u, ratio_u = torch.rand(2, n, ATTEMPTS, generator=generator, dtype=torch.float64)
    top_u, left_u, flip_u = torch.rand(3, n, generator=generator, dtype=torch.float64)
    height, width = sizes.to(torch.float64).unsqueeze(-1).unbind(1)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * area_u)
    ratio = torch.exp(math.log(RATIO[0]) + (math.log(RATIO[1]) - math.log(RATIO[0])) * ratio_u)
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.to(torch.uint8).argmax(1, keepdim=True)
    height, width = height[:, 0], width[:, 0]
    whole = width / height
    fallback_w = torch.where(whole > RATIO[1], (height * RATIO[1]).round(), width)
    fallback_h = torch.where(whole < RATIO[0], (width / RATIO[0]).round(), height)
    found = fits.any(1)
    h = torch.where(found, h.gather(1, first)[:, 0], fallback_h)
    w = torch.where(found, w.gather(1, first)[:, 0], fallback_w)
    top = torch.where(found, (top_u * (height - h + 1)).floor(), ((height - h) / 2).floor())
    left = torch.where(found, (left_u * (width - w + 1)).floor(), ((width - w) / 2).floor())
    mirrored = (flip_u < 0.5) & flip
    return Boxes(torch.stack([top, left, h, w], 1).to(torch.int64), mirrored)


def resize_weights(start: Tensor, length: Tensor, size: int, extent: int) -> Tensor:
    """Pillow's antialiased bicubic weights (a = -0.5) from the box [start, start + length) to `size` pixels.

    Args:
        start, length: integer tensors (n,), within [0, extent).
        size: pixels that come out.
        extent: pixels of the padded image.

    Returns:
        float32 (n, size, extent); each row sums to 1 and is zero outside its box.
    """
    start, length = (t.to(torch.float32)[:, None, None] for t in (start, length))
    step = length / size
    support = step.clamp(min=1)
    out = torch.arange(size, device=start.device, dtype=torch.float32)[None, :, None]
    centre = start + (out + 0.5) * step
    pixel = torch.arange(extent, device=start.device, dtype=torch.float32)[None, None, :]
    x = ((pixel + 0.5 - centre) / support).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = weight * ((pixel >= start) & (pixel < start + length))
    return weight / weight.sum(-1, keepdim=True)


def crop_on_device(images: Tensor, boxes: Boxes, size: int) -> Tensor:
    """Cut boxes out of padded images by two matrix products.

    Args:
        images: uint8 (n, 3, H, W), padded at the bottom and right.
        boxes: crops inside the unpadded part, on the device of `images`.
        size: side of the result.

    Returns:
        float32 (n, 3, size, size) of whole numbers from 0 to 255.
    """
    top, left, h, w = boxes.box.unbind(1)
    wy = resize_weights(top, h, size, images.shape[2])
    wx = resize_weights(left, w, size, images.shape[3])
    wx = torch.where(boxes.flip[:, None, None], wx.flip(1), wx)
    across = (images.to(torch.float32) @ wx.transpose(1, 2)[:, None]).round_().clamp_(0, 255)
    return (wy[:, None] @ across).round_().clamp_(0, 255)


def crop_on_cpu(images: Sequence[Tensor], boxes: Boxes, size: int) -> Tensor:
    """uint8 images (3, h, w) of any sizes -> uint8 crops (n, 3, size, size), by torchvision's kernels."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional as tv

    crops = []
    for image, (top, left, h, w), flip in zip(images, boxes.box.tolist(), boxes.flip.tolist(), strict=True):
        part = image[:, top : top + h, left : left + w]
        crop = tv.resize(part, [size, size], interpolation=InterpolationMode.BICUBIC, antialias=True)
        crops.append(crop.flip(-1) if flip else crop)
    return torch.stack(crops)


def extent(sizes: Tensor) -> tuple[int, int]:
    """Height and width that hold every image of `sizes` (N, 2)."""
    height, width = sizes.amax(0).tolist()
    return height, width


def pad(
    images: Sequence[Tensor],
    room: tuple[int, int] | None = None,
    device: torch.device | str = "cpu",
    pinned: bool = False,
) -> Tensor:
    """One uint8 tensor (n, 3, H, W), zero below and beside the smaller images; `room` is (H, W), by default the least."""
    height, width = room or (max(image.shape[d] for image in images) for d in (1, 2))
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8, device=device, pin_memory=pinned)
    for row, image in zip(padded, images, strict=True):
        row[:, : image.shape[1], : image.shape[2]] = image
    return padded


class Normalise:
    """(x / 255 - mean) / std of pixels from 0 to 255, any dtype (n, 3, h, w), as float32 on the device."""

    def __init__(self, mean: Sequence[float], std: Sequence[float], device: torch.device) -> None:
        mean_, std_ = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (mean, std))
        self.factor = (1 / (255 * std_)).to(device, torch.float32)
        self.shift = (-mean_ / std_).to(device, torch.float32)

    def __call__(self, pixels: Tensor) -> Tensor:
        return torch.addcmul(self.shift, pixels.to(self.factor.device, torch.float32), self.factor)
