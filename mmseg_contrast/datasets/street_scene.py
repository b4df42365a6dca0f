"""Procedural street scenes: layout, label map, and image in two lights.

A scene is a list of coloured polygons seen through a pinhole camera, drawn
from far to near. The layout knows nothing of the domain: source and target
share its statistics and differ in how it is lit and seen.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

CLASSES = ('road', 'sidewalk', 'building', 'pole', 'traffic sign',
           'vegetation', 'sky', 'person', 'car', 'bicycle')
PALETTE = [[128, 64, 128], [244, 35, 232], [70, 70, 70], [153, 153, 153],
           [220, 220, 0], [107, 142, 35], [70, 130, 180], [220, 20, 60],
           [0, 0, 142], [119, 11, 32]]
(ROAD, SIDEWALK, BUILDING, POLE, SIGN, VEGETATION, SKY, PERSON, CAR,
 BICYCLE) = range(10)
DETAIL = -1

# The camera, for an image of 256 x 128 pixels: metres to pixels at 1 m, and
# its height above the road.
_FOCAL = 150.0
_EYE = 1.5
_SUPERSAMPLING = 2

# Rounded, so that no platform's cosine can move a label pixel.
_ANGLES = np.linspace(0, 2 * np.pi, 16, endpoint=False)
_CIRCLE = np.round(np.stack([np.cos(_ANGLES), np.sin(_ANGLES)], 1), 6)

# Colours are RGB reflectances, 0 to 255.
_FACADES = ((196, 150, 118), (214, 196, 160), (170, 112, 92), (182, 178, 172),
            (222, 206, 190), (150, 132, 122), (204, 172, 128))
_COATS = ((196, 44, 40), (40, 74, 150), (70, 74, 80), (232, 232, 230),
          (28, 30, 34), (52, 116, 84), (222, 176, 50))
_CLOTHES = ((186, 50, 60), (46, 62, 112), (60, 60, 66), (208, 190, 120),
            (84, 120, 90), (150, 80, 140), (230, 226, 220))
_SIGNS = ((206, 32, 40), (26, 84, 170), (240, 196, 32))


@dataclass
class Shape:
    """One polygon.

    Args:
        label (int): Class id; ``DETAIL`` leaves the label below it.
        points (np.ndarray): Corners ``(n, 2)`` as x, y in a 256 x 128 image.
        colour (tuple): RGB reflectance.
        depth (float): Distance in metres.
        lit (tuple, optional): RGB of its own light at dusk.
    """

    label: int
    points: np.ndarray
    colour: tuple[float, ...]
    depth: float
    lit: tuple[int, int, int] | None = None


@dataclass
class Scene:
    """What there is to draw, far to near.

    Args:
        horizon (float): Row of the horizon in a 256 x 128 image.
        centre (float): Column of the vanishing point.
        shapes (list[Shape]): Polygons.
    """

    horizon: float
    centre: float
    shapes: list[Shape] = field(default_factory=list)

    def add(self, label: int, points: list | np.ndarray,
            colour: tuple[float, ...], depth: float,
            lit: tuple[int, int, int] | None = None) -> None:
        """Append a polygon given in image coordinates."""
        self.shapes.append(
            Shape(label, np.asarray(points, dtype=np.float64), colour, depth,
                  lit))

    def point(self, x: float, y: float, z: float) -> tuple[float, float]:
        """Project metres (right, up from the road, ahead) to the image."""
        scale = _FOCAL / z
        return (self.centre + x * scale, self.horizon + (_EYE - y) * scale)

    def wall(self, label: int, x: float, low: float, high: float, near: float,
             far: float, colour: tuple[float, ...],
             lit: tuple[int, int, int] | None = None) -> None:
        """A vertical rectangle along the road."""
        self.add(label, [
            self.point(x, low, near),
            self.point(x, low, far),
            self.point(x, high, far),
            self.point(x, high, near)
        ], colour, near, lit)

    def front(self, label: int, left: float, right: float, low: float,
              high: float, z: float, colour: tuple[float, ...],
              lit: tuple[int, int, int] | None = None) -> None:
        """A vertical rectangle that faces the camera."""
        x0, y0 = self.point(left, high, z)
        x1, y1 = self.point(right, low, z)
        self.add(label, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)], colour, z,
                 lit)

    def ground(self, label: int, left: float, right: float, near: float,
               far: float, colour: tuple[float, ...]) -> None:
        """A stripe of the ground along the road."""
        self.add(label, [
            self.point(left, 0, near),
            self.point(right, 0, near),
            self.point(right, 0, far),
            self.point(left, 0, far)
        ], colour, near)

    def disc(self, label: int, x: float, y: float, z: float, radius: float,
             colour: tuple[float, ...], stretch: float = 1.0,
             lit: tuple[int, int, int] | None = None) -> None:
        """An upright ellipse that faces the camera."""
        centre = np.array(self.point(x, y, z))
        radii = np.array([radius, radius * stretch]) * (_FOCAL / z)
        self.add(label, centre + _CIRCLE * radii, colour, z, lit)


def _shade(colour: tuple[float, ...], factor: float) -> tuple[float, ...]:
    return tuple(min(255.0, c * factor) for c in colour)


def build_scene(random: np.random.RandomState) -> Scene:
    """Lay out a street.

    Args:
        random (np.random.RandomState): Where all choices come from.

    Returns:
        Scene: Polygons in a 256 x 128 image, far to near.
    """
    scene = Scene(horizon=random.uniform(50, 64),
                  centre=random.uniform(100, 156))
    lane = random.uniform(-1.2, 1.2)
    left, right = lane - random.uniform(3.6, 5), lane + random.uniform(3.6, 5)
    walk = random.uniform(2.6, 4.4)
    _ground(scene, random, left, right, walk)
    things: list[tuple[float, str, float]] = []
    for side, kerb in ((-1, left), (1, right)):
        things += _street_side(random, side, kerb, walk)
    things += _traffic(random, left, right)
    painters = dict(block=_block, hedge=_hedge, garden=_tree, tree=_tree,
                    pole=_pole, person=_person, bicycle=_bicycle, car=_car)
    # Far to near, walls first: what stands on the pavement is never behind
    # them. The sort is stable, so equal depths keep their order.
    walls = ('block', 'hedge', 'garden')
    things.sort(key=lambda t: (t[1] not in walls, -t[0]))
    for depth, kind, x in things:
        painters[kind](scene, random, x, depth)
    return scene


def _ground(scene: Scene, random: np.random.RandomState, left: float,
            right: float, walk: float) -> None:
    scene.add(SKY, [(0, 0), (256, 0), (256, 128), (0, 128)], (150, 190, 235),
              1e4)
    for _ in range(random.randint(2, 6)):
        x, y = random.uniform(0, 256), random.uniform(2, 38)
        w, h = random.uniform(14, 40), random.uniform(2, 6)
        scene.add(DETAIL, np.array([x, y]) + _CIRCLE * [w, h],
                  (232, 238, 246), 1e4)
    # what closes the street far away
    x = -30.0
    while x < 30:
        width = random.uniform(4, 12)
        label = VEGETATION if random.random_sample() < 0.45 else BUILDING
        colour = ((70, 116, 58) if label == VEGETATION else
                  _FACADES[random.randint(len(_FACADES))])
        scene.front(label, x, x + width, 0, random.uniform(3, 11), 75,
                    colour)
        x += width
    verge = VEGETATION if random.random_sample() < 0.4 else SIDEWALK
    outer = (96, 140, 66) if verge == VEGETATION else (176, 168, 160)
    scene.ground(verge, -90, 90, 1.2, 80, outer)
    scene.ground(SIDEWALK, left - walk, right + walk, 1.2, 80,
                 (186, 176, 168))
    scene.ground(ROAD, left, right, 1.2, 80, (112, 112, 118))
    for x in (left, right):
        scene.ground(DETAIL, x - 0.12, x + 0.12, 1.2, 60, (214, 208, 200))
    middle = (left + right) / 2
    z = random.uniform(2, 5)
    while z < 45:
        scene.ground(DETAIL, middle - 0.09, middle + 0.09, z, z + 2.2,
                     (232, 232, 228))
        z += 5.0
    if random.random_sample() < 0.3:
        z = random.uniform(7, 16)
        for x in np.arange(left + 0.4, right - 0.5, 1.1):
            scene.ground(DETAIL, x, x + 0.55, z, z + 2.6, (226, 226, 222))


def _street_side(random: np.random.RandomState, side: int, kerb: float,
                 walk: float) -> list[tuple[float, str, float]]:
    things: list[tuple[float, str, float]] = []
    wall = kerb + side * walk
    z = random.uniform(3, 7)
    while z < 62:
        # the kind is drawn here, the rest where it is painted
        kind = random.choice(4, p=(0.62, 0.14, 0.14, 0.1))
        if kind == 0:
            things.append((z, 'block', wall + side * random.uniform(0, 0.8)))
            z += 11
        elif kind == 1:
            things.append((z, 'hedge', wall))
            z += 8
        else:
            things.append((z, 'garden', wall + side * 2.0))
            z += random.uniform(4, 9)
    for _ in range(random.randint(1, 4)):
        things.append((random.uniform(6, 36), 'tree',
                       kerb + side * random.uniform(0.9, walk)))
    for _ in range(random.randint(1, 4)):
        things.append((random.uniform(4.5, 22), 'pole', kerb + side * 0.4))
    for _ in range(random.poisson(1.8)):
        things.append((random.uniform(4.5, 16), 'person',
                       kerb + side * random.uniform(0.5, walk - 0.3)))
    if random.random_sample() < 0.34:
        things.append((random.uniform(4.2, 12), 'bicycle',
                       kerb - side * random.uniform(-1.2, 0.8)))
    for _ in range(random.poisson(0.8)):
        things.append((random.uniform(5.5, 30), 'car', kerb - side * 1.1))
    return things


def _traffic(random: np.random.RandomState, left: float, right: float
             ) -> list[tuple[float, str, float]]:
    things: list[tuple[float, str, float]] = []
    for _ in range(random.poisson(1.0)):
        share = 0.28 if random.random_sample() < 0.5 else 0.72
        things.append((random.uniform(7, 30), 'car',
                       left + share * (right - left)))
    if random.random_sample() < 0.15:
        things.append((random.uniform(8, 20), 'person',
                       random.uniform(left, right)))
    return things


def _block(scene: Scene, random: np.random.RandomState, x: float, z: float
           ) -> None:
    side = 1 if x > 0 else -1
    height = random.uniform(5, 15)
    length = random.uniform(9, 11)
    colour = _FACADES[random.randint(len(_FACADES))]
    scene.front(BUILDING, min(x, x + side * 14), max(x, x + side * 14), 0,
                height, z, _shade(colour, 0.82))
    scene.wall(BUILDING, x, 0, height, z, z + length, colour)
    scene.wall(DETAIL, x, height - 0.5, height, z, z + length,
               _shade(colour, 0.6))
    pane = (92, 108, 128)
    storeys, bays = int(height // 3), random.randint(3, 5)
    step = length / bays
    for storey in range(storeys):
        for bay in range(bays):
            near = z + step * (bay + 0.28)
            lit = ((255, 196, 110) if random.random_sample() < 0.3 else None)
            if near < 24:
                low = 1.0 + 3 * storey
                scene.wall(DETAIL, x, low, low + 1.4, near,
                           near + step * 0.46, pane, lit)
    if z > 4 and abs(x) < 18:
        for storey in range(storeys):
            for bay in range(3):
                at = x + side * (1.5 + 3.6 * bay)
                scene.front(DETAIL, min(at, at + side * 1.6),
                            max(at, at + side * 1.6), 1.0 + 3 * storey,
                            2.4 + 3 * storey, z, _shade(pane, 0.9),
                            (250, 190, 110) if (bay + storey) % 3 == 0 else
                            None)


def _hedge(scene: Scene, random: np.random.RandomState, x: float, z: float
           ) -> None:
    side = 1 if x > 0 else -1
    height = random.uniform(1.0, 2.4)
    green = (74 + random.uniform(-10, 16), 122, 56)
    scene.front(VEGETATION, min(x, x + side * 12), max(x, x + side * 12), 0,
                height, z, _shade(green, 0.8))
    scene.wall(VEGETATION, x, 0, height, z, z + 8, green)


def _tree(scene: Scene, random: np.random.RandomState, x: float, z: float
          ) -> None:
    top = random.uniform(3.4, 5.6)
    size = random.uniform(0.9, 1.7)
    scene.front(VEGETATION, x - 0.13, x + 0.13, 0, top, z, (96, 74, 54))
    green = np.array([66, 122, 52]) * random.uniform(0.85, 1.2)
    for _ in range(6):
        dx, dy = random.uniform(-0.7, 0.7, 2) * size
        scene.disc(VEGETATION, x + dx, top + dy, z,
                   size * random.uniform(0.5, 0.8),
                   tuple(green * random.uniform(0.82, 1.18)))


def _pole(scene: Scene, random: np.random.RandomState, x: float, z: float
          ) -> None:
    kind = random.choice(3, p=(0.45, 0.4, 0.15))
    side = 1 if x > 0 else -1
    if kind == 1:  # a street lamp
        scene.front(POLE, x - 0.08, x + 0.08, 0, 5.2, z, (124, 126, 130))
        arm = sorted((x, x - side * 1.1))
        scene.front(POLE, arm[0], arm[1], 5.1, 5.25, z, (124, 126, 130))
        scene.disc(POLE, x - side * 1.0, 5.05, z, 0.2, (236, 232, 210), 0.6,
                   (255, 214, 150))
        return
    height = random.uniform(2.3, 3.0)
    scene.front(POLE, x - 0.07, x + 0.07, 0, height, z, (132, 134, 138))
    colour = _SIGNS[random.randint(len(_SIGNS))]
    form = random.randint(3)
    if kind == 2 or form == 0:  # a rectangle
        scene.front(SIGN, x - 0.42, x + 0.42, height - 0.2, height + 0.7, z,
                    colour)
        scene.front(DETAIL, x - 0.26, x + 0.26, height, height + 0.5, z,
                    (240, 240, 236))
    elif form == 1:  # a disc
        scene.disc(SIGN, x, height + 0.2, z, 0.46, colour)
        scene.disc(DETAIL, x, height + 0.2, z, 0.28, (240, 240, 236))
    else:  # a triangle
        for label, grow, tint in ((SIGN, 1.0, (206, 32, 40)),
                                  (DETAIL, 0.55, (240, 236, 220))):
            scene.add(label, [
                scene.point(x - 0.55 * grow, height + 0.2 - 0.4 * grow, z),
                scene.point(x + 0.55 * grow, height + 0.2 - 0.4 * grow, z),
                scene.point(x, height + 0.2 + 0.55 * grow, z)
            ], tint, z)


def _person(scene: Scene, random: np.random.RandomState, x: float, z: float,
            lift: float = 0.0, legs: bool = True) -> None:
    tall = random.uniform(0.9, 1.08)
    coat = _CLOTHES[random.randint(len(_CLOTHES))]
    trousers = _shade(_CLOTHES[random.randint(len(_CLOTHES))], 0.6)
    step = random.uniform(0.05, 0.22)
    if legs:
        for sign in (-1, 1):
            scene.add(PERSON, [
                scene.point(x - 0.14, lift + 0.9 * tall, z),
                scene.point(x + 0.14, lift + 0.9 * tall, z),
                scene.point(x + sign * step + 0.09, lift, z),
                scene.point(x + sign * step - 0.09, lift, z)
            ], trousers, z)
    scene.add(PERSON, [
        scene.point(x - 0.25, lift + 1.45 * tall, z),
        scene.point(x + 0.25, lift + 1.45 * tall, z),
        scene.point(x + 0.27, lift + 0.85 * tall, z),
        scene.point(x - 0.27, lift + 0.85 * tall, z)
    ], coat, z)
    scene.disc(PERSON, x, lift + 1.6 * tall, z, 0.14, (214, 170, 140), 1.2)


def _bicycle(scene: Scene, random: np.random.RandomState, x: float, z: float
             ) -> None:
    colour = _COATS[random.randint(len(_COATS))]
    dark = (40, 40, 44)
    for wheel in (x - 0.52, x + 0.52):
        scene.disc(BICYCLE, wheel, 0.34, z, 0.36, dark)
        scene.disc(DETAIL, wheel, 0.34, z, 0.25, (120, 118, 118))
    frame = ((-0.52, 0.34, -0.18, 0.86), (-0.18, 0.86, 0.32, 0.9),
             (0.32, 0.9, 0.0, 0.36), (0.0, 0.36, -0.18, 0.86),
             (0.32, 0.9, 0.52, 0.34), (0.28, 1.04, 0.5, 1.06))
    for x0, y0, x1, y1 in frame:
        ends = np.array([
            scene.point(x + x0, y0, z),
            scene.point(x + x1, y1, z)
        ])
        along = ends[1] - ends[0]
        across = np.array([-along[1], along[0]]) / max(
            float(np.abs(along).max()), 1e-6)
        across *= 0.05 * _FOCAL / z
        scene.add(BICYCLE, [
            ends[0] - across, ends[1] - across, ends[1] + across,
            ends[0] + across
        ], colour, z)
    if random.random_sample() < 0.5:
        _person(scene, random, x - 0.1, z, lift=0.15, legs=True)


def _car(scene: Scene, random: np.random.RandomState, x: float, z: float
         ) -> None:
    coat = _COATS[random.randint(len(_COATS))]
    glass = (72, 84, 100)
    far = z + 4.0
    inner = x - 0.88 if x > 0 else x + 0.88
    # the side that can be seen, then the back
    scene.wall(CAR, inner, 0.25, 0.85, z, far, _shade(coat, 0.72))
    scene.wall(CAR, inner * 0.97, 0.8, 1.35, z + 0.7, far - 1.0,
               _shade(glass, 0.9))
    for wheel in (z + 0.6, far - 0.7):
        scene.wall(CAR, inner, 0.0, 0.55, wheel - 0.3, wheel + 0.3,
                   (30, 30, 32))
    for wheel in (x - 0.68, x + 0.68):
        scene.front(CAR, wheel - 0.14, wheel + 0.14, 0, 0.45, z,
                    (28, 28, 30))
    scene.front(CAR, x - 0.88, x + 0.88, 0.25, 0.9, z, coat)
    scene.add(CAR, [
        scene.point(x - 0.86, 0.9, z),
        scene.point(x + 0.86, 0.9, z),
        scene.point(x + 0.66, 1.46, z),
        scene.point(x - 0.66, 1.46, z)
    ], _shade(coat, 0.9), z)
    scene.add(DETAIL, [
        scene.point(x - 0.72, 0.94, z),
        scene.point(x + 0.72, 0.94, z),
        scene.point(x + 0.58, 1.38, z),
        scene.point(x - 0.58, 1.38, z)
    ], glass, z)
    scene.front(DETAIL, x - 0.24, x + 0.24, 0.42, 0.54, z, (236, 236, 220))
    towards = x < 0  # traffic comes on the left
    lamp, light = (((240, 236, 220), (255, 236, 190)) if towards else
                   ((170, 30, 34), (255, 40, 40)))
    for at in (x - 0.7, x + 0.7):
        scene.front(DETAIL, at - 0.14, at + 0.14, 0.62, 0.8, z, lamp, light)


def paint_labels(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """Draw the label map.

    Args:
        scene (Scene): The scene.
        size (tuple[int, int]): Width and height.

    Returns:
        np.ndarray: Class ids, uint8 ``(h, w)``.
    """
    labels = np.full((size[1], size[0]), SKY, dtype=np.uint8)
    scale = np.array([size[0] / 256, size[1] / 128])
    for shape in scene.shapes:
        if shape.label != DETAIL:
            points = np.floor(_clipped(shape.points) * scale + 0.5)
            cv2.fillPoly(labels, [points.astype(np.int32)], shape.label)
    return labels


def _clipped(points: np.ndarray) -> np.ndarray:
    """Keep coordinates within what the drawing routines can hold."""
    return np.clip(points, -4000, 4000)


def paint_image(scene: Scene, size: tuple[int, int], domain: str,
                random: np.random.RandomState) -> np.ndarray:
    """Draw the image.

    Args:
        scene (Scene): The scene.
        size (tuple[int, int]): Width and height.
        domain (str): ``source`` (a clear day) or ``target`` (hazy dusk).
        random (np.random.RandomState): For illumination and noise.

    Returns:
        np.ndarray: BGR, uint8 ``(h, w, 3)``.
    """
    dusk = domain == 'target'
    strength = random.uniform(0.9, 1.1)
    # metres after which haze has hidden about two thirds
    reach = random.uniform(55, 90) if dusk else random.uniform(250, 500)
    haze = np.array([160, 136, 146] if dusk else [190, 206, 224], float)
    # what the light makes of white, RGB
    light = (np.array([0.80, 0.68, 0.76]) if dusk else np.array(
        [1.05, 1.0, 0.94])) * strength
    width, height = (s * _SUPERSAMPLING for s in size)
    scale = np.array([width / 256, height / 128]) * 16
    image: np.ndarray = np.empty((height, width, 3), dtype=np.uint8)
    glow = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    small = np.array([size[0] / 256, size[1] / 128]) * 16
    for shape in scene.shapes:
        points = _clipped(shape.points)
        seen = np.array(shape.colour) * light
        far = 1 - np.exp(-shape.depth / reach)
        if shape.depth < 1e3:
            seen = seen * (1 - far) + haze * far
        if dusk and shape.lit is not None:
            seen = np.array(shape.lit) * (1 - 0.5 * far)
            cv2.fillPoly(glow, [(points * small).astype(np.int32)],
                         tuple(float(c) * 0.8 for c in seen[::-1]),
                         shift=4)
        elif shape.label != DETAIL and shape.lit is None and shape.depth < 1e3:
            # things in front take the glow of lights behind them away
            if dusk:
                cv2.fillPoly(glow, [(points * small).astype(np.int32)],
                             (0, 0, 0), shift=4)
        colour = np.clip(seen[::-1], 0, 255)
        cv2.fillPoly(image, [(points * scale).astype(np.int32)],
                     tuple(float(c) for c in colour), shift=4)
        if shape.depth >= 1e4 and shape.label == SKY:
            image[:] = _sky(scene, width, height, dusk, strength)
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return _expose(image, glow, dusk, random)


def _sky(scene: Scene, width: int, height: int, dusk: bool, strength: float
         ) -> np.ndarray:
    top, low = (((96, 96, 150), (226, 166, 138)) if dusk else
                ((92, 150, 224), (206, 224, 240)))
    rows = np.clip(np.arange(height) / (scene.horizon / 128 * height), 0, 1)
    ramp = rows[:, None]**1.5
    colours = np.array(top) * (1 - ramp) + np.array(low) * ramp
    column = np.clip(colours[:, None, ::-1] * strength, 0, 255)
    return np.broadcast_to(column, (height, width, 3)).astype(np.uint8)


def _expose(image: np.ndarray, glow: np.ndarray, dusk: bool,
            random: np.random.RandomState) -> np.ndarray:
    """Texture, lights, blur and sensor noise."""
    height, width = image.shape[:2]
    coarse: np.ndarray = random.randint(
        0, 256, (height // 8, width // 8)).astype(np.uint8)
    coarse = cv2.resize(
        coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    fine = random.randint(0, 256, (2, height, width, 3)).astype(np.float32)
    fine = (fine.sum(axis=0) - 255) / 104  # about unit variance
    mottled = (coarse.astype(np.float32) - 128) / 128
    seen: Any = image.astype(np.float32)
    if not dusk:
        seen *= 1 + 0.035 * mottled[..., None]
        return np.clip(seen + 2.5 * fine, 0, 255).astype(np.uint8)
    seen *= 1 + 0.08 * mottled[..., None]
    seen = cv2.GaussianBlur(seen, (0, 0), random.uniform(0.5, 0.8))
    lights = glow.astype(np.float32)
    sigma = width / 256
    seen += 0.5 * cv2.GaussianBlur(lights, (0, 0), 1.2 * sigma)
    seen += 1.2 * cv2.GaussianBlur(lights, (0, 0), 6.0 * sigma)
    rows = np.linspace(-1, 1, height, dtype=np.float32)[:, None] ** 2
    columns = np.linspace(-1, 1, width, dtype=np.float32)[None] ** 2
    seen *= (1 - 0.16 * (rows + columns))[..., None]
    return np.clip(seen + 5 * fine, 0, 255).astype(np.uint8)
