"""Strong augmentation on batches of tensors: colour jitter and blur.

The four jitter operations follow the semantics that the published DACS and
DAFormer runs had (kornia 0.5.8), which differ from torchvision's: brightness
is added, contrast multiplies. All random numbers are arguments.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .transfer import send

#: The published runs had this eps: it takes 1e-6 off the saturation.
EPS = 1e-6


def _brighten(images: Tensor, factors: Tensor) -> Tensor:
    """Add ``factor - 1``."""
    return (images + (factors - 1)).clamp_(0, 1)


def _contrast(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply."""
    return (images * factors).clamp_(0, 1)


def _value_and_chroma(images: Tensor) -> tuple[Tensor, Tensor]:
    """Largest channel, and its distance from the smallest, ``(N, 1, H, W)``.

    HSV's saturation is ``chroma / value``.
    """
    value = images.amax(1, keepdim=True)
    return value, value - images.amin(1, keepdim=True)


def _safe(chroma: Tensor) -> Tensor:
    """To divide by, where grey gives 0 / 0."""
    return chroma.clamp_min(torch.finfo(chroma.dtype).tiny)


def _saturate(images: Tensor, factors: Tensor) -> Tensor:
    """Multiply S of HSV; the hue is not asked for.

    With H and V as they are, each channel keeps its share of the chroma that
    it is below the value.
    """
    value, chroma = _value_and_chroma(images)
    saturation = (chroma / (value + EPS) * factors).clamp(0, 1)
    return value - (value - images) * (
        value * saturation / _safe(chroma))


def _turn_hue(images: Tensor, factors: Tensor) -> Tensor:
    """Add so many turns to H of HSV."""
    value, chroma = _value_and_chroma(images)
    red, green, blue = images.split(1, 1)
    # Of two channels that are the largest, the first counts. With weights of
    # 0 and 1 lerp is exact, and several times faster than torch.where.
    first = (red == value).to(images.dtype)
    second = (green == value).to(images.dtype)
    safe = _safe(chroma)
    sextant = torch.lerp(
        torch.lerp(4 + (red - green) / safe,
                   2 + (blue - red) / safe, second),
        (green - blue) / safe, first)
    hue = (sextant / 6) % 1 + factors
    # Each channel is the value minus a chroma-scaled trapezoid of the hue.
    # Not a tensor of a list, whose copy waits for the device.
    offset = 5 - 2 * torch.arange(
        3, device=images.device, dtype=images.dtype).view(3, 1, 1)
    k = (offset + hue * 6) % 6
    ramp = torch.minimum(k, 4 - k).clamp_(0, 1)
    return value - value * (chroma / (value + EPS)) * ramp


#: By the number that ``order`` has for them.
_OPERATIONS = (_brighten, _contrast, _saturate, _turn_hue)


def color_jitter(images: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue, in a drawn order.

    Args:
        images (Tensor): RGB in [0, 1], ``(N, 3, H, W)``.
        factors (Tensor): ``(N, 4)``: brightness b adds ``b - 1``, contrast
            multiplies, saturation multiplies S of HSV, hue adds that many
            turns.
        order (Tensor): int64, ``(N, 4)``, on the CPU: which operation comes
            first, second, ...; 0 brightness, 1 contrast, 2 saturation, 3 hue.

    Returns:
        Tensor: ``(N, 3, H, W)``.
    """
    factors = factors.view(-1, 4, 1, 1, 1)
    for due in order.unbind(1):
        # Which samples are due is known on the host: each goes through each
        # operation once, and nothing waits for the device.
        for number, operation in enumerate(_OPERATIONS):
            rows = (due == number).nonzero().flatten()
            if len(rows) == len(due):
                images = operation(images, factors[:, number])
            elif len(rows):
                there = send(rows, images.device)
                images = images.index_copy(0, there, operation(
                    images.index_select(0, there),
                    factors[:, number].index_select(0, there)))
    return images


def reference_blur_radius(length: int) -> int:
    """Radius of the published blur kernel for an image side.

    The kernel spans about a tenth of the side: 51 taps at 512 pixels.
    """
    tenth = math.ceil(0.1 * length)
    return int(math.floor(tenth - 0.5 + tenth % 2)) // 2


def gaussian_blur(images: Tensor, sigma: Tensor,
                  radius: tuple[int, int] = (5, 5)) -> Tensor:
    """Separable Gaussian blur with one sigma for each sample.

    Args:
        images (Tensor): ``(N, C, H, W)``; both sides larger than the radius.
        sigma (Tensor): Pixels, > 0, ``(N,)``.
        radius (tuple): Taps on each side, (vertical, horizontal). 5 is within
            1.1e-6 of the published kernel for sigma up to 1.15.

    Returns:
        Tensor: ``(N, C, H, W)``; the border is reflected.
    """
    samples, channels = images.shape[:2]
    for axis, reach in ((2, radius[0]), (3, radius[1])):
        if reach == 0:
            continue
        taps = torch.arange(
            -reach, reach + 1, device=images.device, dtype=images.dtype)
        kernel = torch.exp(-0.5 * (taps / sigma.to(images).unsqueeze(1))**2)
        kernel = kernel / kernel.sum(1, keepdim=True)
        kernel = kernel.repeat_interleave(
            channels, 0, output_size=samples * channels)
        shape = (-1, 1, 2 * reach + 1, 1) if axis == 2 else (
            -1, 1, 1, 2 * reach + 1)
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        flat = images.reshape(1, samples * channels, *images.shape[2:])
        flat = F.conv2d(
            F.pad(flat, pad, mode='reflect'), kernel.view(shape),
            groups=samples * channels)
        images = flat.view(samples, channels, *images.shape[2:])
    return images
