"""DAFormer's iteration against a plain transcription, in float64.

The transcription below is written from the published description alone, with
loops over samples, classes and pixels and separate backward passes. The
random draws are injected into both.
"""

import copy
import math

import torch
import torch.nn.functional as F
from mmengine.structures import PixelData

from helpers import CLASSES, build, sample, tiny_student

SIZE, BATCH = 32, 2
THRESHOLD, THINGS, RATIO, FD_WEIGHT = 0.25, (1, 3), 0.75, 0.005
TOP, BOTTOM = 3, 5
MEAN = torch.tensor([123.675, 116.28, 103.53]).double().view(3, 1, 1)
STD = torch.tensor([58.395, 57.12, 57.375]).double().view(3, 1, 1)
RATE = 0.05


def draws_of(generator, i):
    """All random numbers of one iteration; both switches are on and off."""
    def uniform(*shape):
        return torch.rand(*shape, generator=generator).double()

    return dict(
        jitter=i != 2,
        blur=i != 1,
        picks=[torch.randperm(CLASSES + 1, generator=generator)
               for _ in range(BATCH)],
        factors=torch.cat([0.8 + 0.4 * uniform(BATCH, 3),
                           -0.2 + 0.4 * uniform(BATCH, 1)], 1),
        order=torch.stack([torch.randperm(4, generator=generator)
                           for _ in range(BATCH)]),
        sigma=0.15 + uniform(BATCH))


def batch_of(generator):
    """Normalised images and source labels with ignored pixels."""
    images = [((255 * torch.rand(BATCH, 3, SIZE, SIZE, generator=generator)
                ).round().double() - MEAN) / STD for _ in range(2)]
    blocks = torch.randint(0, CLASSES, (BATCH, 4, 4), generator=generator)
    labels = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)
    labels[:, :2] = 255
    labels[:, 10:12, 5:9] = 0
    return images[0], images[1], labels


class Transcription:
    """The published iteration, step by step."""

    def __init__(self, student, encoder):
        self.student = student
        self.teacher = copy.deepcopy(student)
        self.encoder = encoder
        self.count = 0

    def logits(self, net, images):
        features = net.backbone(images)
        maps = net.decode_head.forward(features)
        return features[-1], F.interpolate(
            maps, (SIZE, SIZE), mode='bilinear', align_corners=False)

    def cross_entropy(self, logits, labels, weights):
        """Mean over all pixels, ignored ones in the denominator."""
        total = logits.new_zeros(())
        log_probs = logits.log_softmax(1)
        for n in range(BATCH):
            for label in range(CLASSES):
                here = (labels[n] == label).double() * weights[n]
                total = total - (log_probs[n, label] * here).sum()
        # mmseg adds float32's eps to the number of pixels: 6e-11 here.
        return total / (labels.numel() + torch.finfo(torch.float32).eps)

    def thing_mask(self, labels):
        cells = SIZE // 4
        mask = torch.zeros(BATCH, cells, cells, dtype=torch.bool)
        for n in range(BATCH):
            for i in range(cells):
                for j in range(cells):
                    cell = labels[n, 4 * i:4 * i + 4, 4 * j:4 * j + 4]
                    for label in THINGS:
                        share = (cell == label).double().mean()
                        mask[n, i, j] |= bool(share >= RATIO)
        return mask

    def jitter(self, image, factors, order):
        image = (image * STD + MEAN) / 255
        brightness, contrast, saturation, hue = factors.tolist()
        for operation in order.tolist():
            if operation == 0:
                image = (image + brightness - 1).clamp(0, 1)
            elif operation == 1:
                image = (image * contrast).clamp(0, 1)
            else:
                pixels = [self.shift(pixel, operation, saturation, hue)
                          for pixel in image.flatten(1).T.tolist()]
                image = torch.tensor(pixels, dtype=torch.float64).T.view(
                    3, SIZE, SIZE)
        return (image * 255 - MEAN) / STD

    def shift(self, pixel, operation, saturation, hue):
        red, green, blue = pixel
        high, low = max(pixel), min(pixel)
        chroma = high - low
        angle = 0.0
        if chroma > 0:
            if high == red:
                angle = ((green - blue) / chroma) % 6
            elif high == green:
                angle = 2 + (blue - red) / chroma
            else:
                angle = 4 + (red - green) / chroma
        strength = chroma / (high + 1e-6)
        if operation == 2:
            strength = min(max(strength * saturation, 0.0), 1.0)
        else:
            angle = (angle + 6 * hue) % 6
        sector, rest = int(angle) % 6, angle - int(angle)
        p = high * (1 - strength)
        q = high * (1 - rest * strength)
        t = high * (1 - (1 - rest) * strength)
        return [(high, t, p), (q, high, p), (p, high, t), (p, q, high),
                (t, p, high), (high, p, q)][sector]

    def blur(self, image, sigma):
        # 0.1 * 32 pixels, made odd by the published rule: 3 taps.
        offsets = torch.arange(-1, 2).double()
        line = torch.exp(-offsets**2 / (2 * sigma**2))
        kernel = torch.outer(line, line)
        kernel = (kernel / kernel.sum()).expand(3, 1, 3, 3)
        padded = F.pad(image[None], (1, 1, 1, 1), mode='reflect')
        return F.conv2d(padded, kernel, groups=3)[0]

    def step(self, source, target, labels, draws):
        # Teacher: a copy first, later the annealed moving average.
        alpha = min(1 - 1 / (self.count + 1), 0.999)
        with torch.no_grad():
            for mine, its in zip(self.teacher.parameters(),
                                 self.student.parameters(), strict=True):
                mine.copy_(its if self.count == 0
                           else alpha * mine + (1 - alpha) * its)
        self.student.zero_grad()

        # Source, then the feature distance through the same graph.
        ones = torch.ones(BATCH, SIZE, SIZE).double()
        features, logits = self.logits(self.student, source)
        source_loss = self.cross_entropy(logits, labels, ones)
        source_loss.backward(retain_graph=True)
        with torch.no_grad():
            reference = self.encoder(source)[-1]
        mask = self.thing_mask(labels)
        distances = [(features[n, :, i, j] - reference[n, :, i, j]).norm()
                     for n, i, j in mask.nonzero().tolist()]
        distance = FD_WEIGHT * sum(distances) / len(distances)
        distance.backward()

        # Pseudo-labels of the plain target; margins weigh nothing.
        with torch.no_grad():
            _, logits = self.logits(self.teacher, target)
            confidence, pseudo = logits.softmax(1).max(1)
        q = float((confidence >= THRESHOLD).sum()) / confidence.numel()
        # The published code casts the pixels' weights to float32.
        weights = torch.full((BATCH, SIZE, SIZE), q).float().double()
        weights[:, :TOP], weights[:, -BOTTOM:] = 0, 0

        # Half of the classes of the whole batch, 255 among them.
        present = labels.unique()
        images, mixed_labels, mixed_weights = [], [], []
        for n in range(BATCH):
            picks = [c for c in draws['picks'][n].tolist()
                     if (255 if c == CLASSES else c) in present.tolist()]
            picks = picks[:math.ceil(len(present) / 2)]
            over = torch.zeros(SIZE, SIZE, dtype=torch.bool)
            for c in picks:
                over |= labels[n] == (255 if c == CLASSES else c)
            image = torch.where(over, source[n], target[n])
            if draws['jitter']:
                image = self.jitter(image, draws['factors'][n],
                                    draws['order'][n])
            if draws['blur']:
                image = self.blur(image, float(draws['sigma'][n]))
            images.append(image)
            mixed_labels.append(torch.where(over, labels[n], pseudo[n]))
            mixed_weights.append(torch.where(
                over, torch.ones(()).double(), weights[n]))
        _, logits = self.logits(self.student, torch.stack(images))
        mixed_loss = self.cross_entropy(
            logits, torch.stack(mixed_labels), torch.stack(mixed_weights))
        mixed_loss.backward()
        self.count += 1
        return [float(one.detach()) for one in (
            source_loss, distance, mixed_loss)], q


def inject(model, draws):
    def choose(present, generator):
        chosen = torch.zeros_like(present)
        for n, picks in enumerate(draws['picks']):
            here = [c for c in picks.tolist() if present[n, c]]
            chosen[n, here[:math.ceil(len(here) / 2)]] = True
        return chosen

    model.views['mixed'].choose = choose
    model.views['mixed_strong'].draw = lambda samples, generator: draws


def samples_of(labels):
    region = torch.ones(1, SIZE, SIZE, dtype=torch.uint8)
    region[:, :TOP], region[:, -BOTTOM:] = 0, 0
    source = [sample(one, (SIZE, SIZE)) for one in labels]
    target = [sample(None, (SIZE, SIZE)) for _ in labels]
    for one in target:
        one.valid_region = PixelData(data=region)
    return dict(source=source, target=target)


def test_reference_three_iterations():
    torch.set_num_threads(1)
    model = build(
        segmentor=tiny_student(size=(SIZE, SIZE)),
        teachers=dict(ema=dict(type='EMATeacher')),
        pseudo_labels=dict(target=dict(
            type='ConfidentFraction', threshold=THRESHOLD)),
        views=dict(mixed=dict(type='ClassMix'),
                   mixed_strong=dict(type='StrongAugment', view='mixed')),
        objectives=dict(
            source=dict(type='Segmentation', view='source'),
            feature_distance=dict(type='FeatureDistance', classes=THINGS),
            mixed=dict(type='Segmentation', view='mixed_strong')))
    model.double()
    encoder = copy.deepcopy(model.segmentor.backbone).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.mul_(1.3)
    plain = Transcription(copy.deepcopy(model.segmentor), encoder)
    model.objectives['feature_distance'].freeze(copy.deepcopy(encoder))

    generator = torch.Generator().manual_seed(4)
    for i in range(3):
        source, target, labels = batch_of(generator)
        draws = draws_of(generator, i)
        inject(model, draws)
        wanted, q = plain.step(source, target, labels, draws)
        assert 0.05 < q < 0.95

        model.zero_grad()
        losses = model.loss(dict(source=source, target=target),
                            samples_of(labels))
        sum(v for k, v in losses.items() if 'loss' in k).backward()
        found = [float(losses[key].detach()) for key in (
            'source.decode.loss_ce',
            'feature_distance.loss_feature_distance',
            'mixed.decode.loss_ce')]
        assert max(abs(a - b) for a, b in zip(
            found, wanted, strict=True)) < 1e-9
        for (name, mine), its in zip(model.segmentor.named_parameters(),
                                     plain.student.parameters(),
                                     strict=True):
            torch.testing.assert_close(mine.grad, its.grad, rtol=0,
                                       atol=1e-9, msg=name)
            with torch.no_grad():
                mine -= RATE * mine.grad
                its -= RATE * its.grad
        for mine, its in zip(model.teachers['ema'].model.parameters(),
                             plain.teacher.parameters(), strict=True):
            torch.testing.assert_close(mine, its, rtol=0, atol=1e-9)
