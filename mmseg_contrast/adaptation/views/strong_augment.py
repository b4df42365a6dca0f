"""Colour jitter and blur on the images of a view."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from mmseg.registry import MODELS
from torch import Tensor, nn

from ...ops import (
    color_jitter,
    gaussian_blur,
    reference_blur_radius,
    send,
)
from ..view import View

if TYPE_CHECKING:
    from ..step import Step


@MODELS.register_module()
class StrongAugment(nn.Module):
    """Colour jitter and Gaussian blur, as DACS and DAFormer apply them.

    Whether either happens is drawn once for the batch, by how much for each
    sample. Both change the images alone.

    Args:
        normalize (tuple[Tensor, Tensor]): Mean and standard deviation of the
            data preprocessor, ``(3, 1, 1)``; jitter works on RGB in [0, 1].
        view (str): The view to augment.
        jitter_probability (float): Chance of the colour jitter; the published
            code's p = 0.2 is the chance of none.
        jitter_strength (float): s: brightness, contrast and saturation
            factors in [1 - s, 1 + s], hue in [-s, s] turns.
        blur_probability (float): Chance of the blur.
        blur_sigma (tuple[float, float]): Range of sigma in pixels.
        share_order (bool): Whether the order of the jitter's operations and
            sigma are drawn once for the batch: the published masked images,
            which are augmented as a batch (MIC).

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self,
                 normalize: tuple[Tensor, Tensor],
                 view: str = 'mixed',
                 jitter_probability: float = 0.8,
                 jitter_strength: float = 0.2,
                 blur_probability: float = 0.5,
                 blur_sigma: tuple[float, float] = (0.15, 1.15),
                 share_order: bool = False) -> None:
        super().__init__()
        for key, value in (('jitter_probability', jitter_probability),
                           ('blur_probability', blur_probability),
                           ('jitter_strength', jitter_strength)):
            if not 0 <= value <= 1:
                raise ValueError(
                    f'model.views.*.{key} must lie in [0, 1], got {value}.')
        if not 0 < blur_sigma[0] <= blur_sigma[1]:
            raise ValueError('model.views.*.blur_sigma must be a range of '
                             f'positive numbers, got {blur_sigma}.')
        self.view = view
        self.needs = (view, )
        self.jitter_probability = jitter_probability
        self.jitter_strength = jitter_strength
        self.blur_probability = blur_probability
        self.blur_sigma = tuple(blur_sigma)
        self.share_order = share_order
        # Truncating at 4.35 sigma leaves 1e-5 of the kernel's mass outside.
        self.max_radius = math.ceil(4.3 * blur_sigma[1])
        mean, std = normalize
        self.register_buffer('mean', mean.clone(), persistent=False)
        self.register_buffer('std', std.clone(), persistent=False)

    def draw(self, samples: int, generator: torch.Generator
             ) -> dict[str, Tensor | bool]:
        """All random numbers of one batch, on the CPU.

        Args:
            samples (int): Batch size N.
            generator (torch.Generator): CPU generator.

        Returns:
            dict: ``jitter`` and ``blur`` (bool), ``factors`` ``(N, 4)``,
            ``order`` ``(N, 4)``, ``sigma`` ``(N,)``.
        """
        on = torch.rand(2, generator=generator).tolist()
        spread = self.jitter_strength * (
            2 * torch.rand(samples, 4, generator=generator) - 1)
        low, high = self.blur_sigma
        order = torch.rand(samples, 4, generator=generator).argsort(1)
        sigma = low + (high - low) * torch.rand(samples, generator=generator)
        if self.share_order:
            order, sigma = (one[:1].expand_as(one) for one in (order, sigma))
        return dict(
            jitter=on[0] < self.jitter_probability,
            blur=on[1] < self.blur_probability,
            factors=spread + torch.tensor([1., 1., 1., 0.]),
            order=order,
            sigma=sigma)

    @torch.no_grad()
    def augment(self, images: Tensor, draws: dict[str, Tensor | bool]
                ) -> Tensor:
        """Apply drawn numbers.

        Args:
            images (Tensor): Normalised, ``(N, 3, H, W)``.
            draws (dict): See :meth:`draw`.

        Returns:
            Tensor: Normalised, ``(N, 3, H, W)``.
        """
        # A blur in half precision would be no longer the drawn one.
        dtype = torch.promote_types(images.dtype, torch.float32)
        with torch.autocast(images.device.type, enabled=False):
            return self._augment(images.to(dtype), draws)

    def _augment(self, images: Tensor, draws: dict[str, Tensor | bool]
                 ) -> Tensor:
        def there(value: Tensor) -> Tensor:
            return send(value, images.device)

        if draws['jitter']:
            colours = (images * self.std + self.mean) / 255
            colours = color_jitter(
                colours, there(draws['factors']).to(images.dtype),
                draws['order'])
            images = (colours * 255 - self.mean) / self.std
        if draws['blur']:
            radius = tuple(
                min(self.max_radius, reference_blur_radius(side), side - 1)
                for side in images.shape[-2:])
            images = gaussian_blur(images, there(draws['sigma']), radius)
        return images

    def forward(self, step: Step, name: str) -> View:
        """The augmented view.

        Args:
            step (Step): The iteration.
            name (str): Name of this view.
        """
        view = step.view(self.view)
        draws = self.draw(len(view.images), step.generator(name))
        return view.replace(
            name=name, images=self.augment(view.images, draws))
