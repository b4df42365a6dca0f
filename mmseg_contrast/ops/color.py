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

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


def rgb_to_hsv(images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RGB in [0, 1] to hue (in turns), saturation and value in [0, 1].

    Args:
        images (Tensor): ``(N, 3, H, W)``.
    """
    red, green, blue = images.unbind(1)
    value, channel = images.max(1)
    chroma = value - images.min(1).values
    safe = chroma.clamp_min(1e-12)
    sector = torch.where(
        channel == 0, (green - blue) / safe,
        torch.where(channel == 1, 2 + (blue - red) / safe,
                    4 + (red - green) / safe))
    hue = torch.where(chroma > 0, (sector / 6) % 1, torch.zeros_like(sector))
    # The published runs had this eps; it takes 1e-6 off the saturation.
    saturation = chroma / (value + 1e-6)
    return hue, saturation, value


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """Inverse of :func:`rgb_to_hsv`; hue may be any number of turns.

    Returns:
        Tensor: ``(N, 3, H, W)``.
    """
    # Each channel is the value minus a chroma-scaled trapezoid of the hue.
    offset = torch.tensor([5., 3., 1.], device=hue.device, dtype=hue.dtype)
    k = (offset.view(1, 3, 1, 1) + hue.unsqueeze(1) * 6) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value.unsqueeze(1) - (value * saturation).unsqueeze(1) * ramp


def _linear(images: Tensor, factors: Tensor, op: Tensor) -> Tensor:
    """Brightness or contrast, whichever is due for each sample."""
    bright = torch.where(op == BRIGHTNESS, factors[:, BRIGHTNESS] - 1, 0.)
    contrast = torch.where(op == CONTRAST, factors[:, CONTRAST], 1.)
    return (images * contrast.view(-1, 1, 1, 1)
            + bright.view(-1, 1, 1, 1)).clamp(0, 1)


def _shift_hsv(images: Tensor, factors: Tensor, op: Tensor) -> Tensor:
    """Saturation or hue, whichever is due for each sample."""
    factor = torch.where(op == SATURATION, factors[:, SATURATION], 1.)
    turns = torch.where(op == HUE, factors[:, HUE], 0.)
    hue, saturation, value = rgb_to_hsv(images)
    saturation = (saturation * factor.view(-1, 1, 1)).clamp(0, 1)
    return hsv_to_rgb(hue + turns.view(-1, 1, 1), saturation, value)


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
    for turn in range(4):
        ops = order[:, turn]
        # Which samples are due is known on the host: each passes through
        # HSV twice, not four times, and nothing waits for the device.
        for group, apply in ((ops <= CONTRAST, _linear),
                             (ops > CONTRAST, _shift_hsv)):
            rows = group.nonzero().flatten()
            if len(rows) == 0:
                continue
            there = rows.to(images.device, non_blocking=True)
            due = ops[rows].to(images.device, non_blocking=True)
            images = images.index_copy(0, there, apply(
                images.index_select(0, there),
                factors.index_select(0, there), due))
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
