"""Procedural tasks in the spirit of VTAB's structured group: position, orientation, number, distance and view.

Rendered from a seed at any size, so that they need no download and no licence. Labels are balanced, and image i of a
seed is the same whatever the number of images: more images are a longer list, not another one. The label definitions
stand in docs/procedural.md.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from hgprompt.data.folders import MAX_CACHE_BYTES, as_pair
from hgprompt.data.images import LabelledImages
from hgprompt.data.raycast import Camera, Solid, render, upright
from hgprompt.errors import OptionError

Picture = NDArray[np.uint8]
Rng = np.random.Generator
DISTANCE_EDGES = (4.0, 5.0, 6.0, 7.2, 8.6, 10.2, 12.0)
"""Edges of the six classes of "nearest-distance", in scene units, from the camera to an object's middle."""
_SPRITE_SCALE = 4  # sprites are drawn larger and averaged down
_MAX_SIZE = 1024


@dataclass(frozen=True)
class ProceduralTask:
    """One task: draw(rng, label, image_size) → uint8 [image_size, image_size, 3]."""

    name: str
    class_names: tuple[str, ...]
    draw: Callable[[Rng, int, int], Picture]


def render_task(
    name: str,
    count: int,
    *,
    image_size: int | tuple[int, int] = 64,
    seed: int = 0,
    split: str = "train",
    report: Callable[[int, int], None] | None = None,
) -> LabelledImages:
    """Render `count` labelled images of a procedural task.

    Args:
        name: one of PROCEDURAL_TASKS.
        count: images; each class comes once in every run of C of them.
        image_size: height and width in pixels, 16 … 1024; a pair of equal numbers will do.
        seed, split: images of another seed, or of another word for split, are others, drawn independently.
        report: report(done, count) while images are drawn.

    Returns:
        The images [count, 3, image_size, image_size], uint8, and their labels.

    Raises:
        OptionError: an unknown name, or a number out of range.
    """
    if name not in PROCEDURAL_TASKS:
        raise OptionError(f"no procedural task is named {name!r}; there are {', '.join(PROCEDURAL_TASKS)}")
    if count < 1:
        raise OptionError(f"count must be at least 1, got {count}")
    height, image_size = as_pair(image_size)
    if not 16 <= image_size <= _MAX_SIZE or height != image_size:
        raise OptionError(f"image_size must be 16 to {_MAX_SIZE}, and a square; got {image_size}")
    if 3 * count * image_size**2 > MAX_CACHE_BYTES:
        limit = MAX_CACHE_BYTES >> 30
        raise OptionError(f"{count} images of {image_size} pixels take more than {limit} GiB: ask for fewer")
    if seed < 0:
        raise OptionError(f"seed must not be negative, got {seed}")
    task = PROCEDURAL_TASKS[name]
    num_classes = len(task.class_names)
    stream = [seed, zlib.crc32(f"{name}/{split}".encode())]
    images = np.empty((count, 3, image_size, image_size), np.uint8)
    labels = np.empty(count, np.int64)
    for i in range(count):
        if i % num_classes == 0:
            order = np.random.default_rng([*stream, 0, i // num_classes]).permutation(num_classes)
        labels[i] = order[i % num_classes]
        picture = task.draw(np.random.default_rng([*stream, 1, i]), int(labels[i]), image_size)
        images[i] = picture.transpose(2, 0, 1)
        if report is not None:
            report(i + 1, count)
    return LabelledImages(name, torch.from_numpy(images), torch.from_numpy(labels), task.class_names)


# Sprites ----------------------------------------------------------------------------------------------------------


def _heart() -> Picture:
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    x = np.sin(a) ** 3
    y = (13 * np.cos(a) - 5 * np.cos(2 * a) - 2 * np.cos(3 * a) - np.cos(4 * a)) / 16
    return np.stack([x, -y], 1)


def _ellipse() -> Picture:
    a = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    return np.stack([np.cos(a), 0.6 * np.sin(a)], 1)


_OUTLINES = {
    "square": np.array([[-0.8, -0.8], [0.8, -0.8], [0.8, 0.8], [-0.8, 0.8]]),
    "ellipse": _ellipse(),
    "heart": _heart(),
    "arrow": np.array([[0, -1], [0.8, 0], [0.3, 0], [0.3, 1], [-0.3, 1], [-0.3, 0], [-0.8, 0]]),
    "flag": np.array([[-0.6, -1], [0.8, -0.55], [-0.3, -0.1], [-0.3, 1], [-0.6, 1]]),
}
_WITH_A_TOP = ("heart", "arrow", "flag")  # a turned square looks like another square: its orientation has no label


def _sprite(outline: str, place: tuple[float, float], turn: float, rng: Rng, size: int) -> Picture:
    """One flat sprite on a plain darker or lighter ground. place: its middle in 0 … 1; turn: radians, clockwise."""
    ground, ink = _two_greys(rng)
    tint = 1 + 0.25 * rng.uniform(-1, 1, (2, 3))
    colours = [tuple(int(v) for v in np.clip(level * t, 0, 255)) for level, t in zip((ground, ink), tint, strict=True)]
    n = size * _SPRITE_SCALE
    image = Image.new("RGB", (n, n), colours[0])
    radius = n * rng.choice(np.linspace(0.09, 0.18, 6))
    cos, sin = np.cos(turn), np.sin(turn)
    points = _OUTLINES[outline] @ np.array([[cos, sin], [-sin, cos]]) * radius + np.array(place) * n
    ImageDraw.Draw(image).polygon([(float(x), float(y)) for x, y in points], fill=colours[1])
    return np.asarray(image.resize((size, size), Image.Resampling.BOX))


def _two_greys(rng: Rng) -> tuple[float, float]:
    """A dark ground and a bright ink, or the other way round, at least 100 levels apart."""
    dark = rng.uniform(0, 100)
    bright = rng.uniform(dark + 100, 255)
    return (dark, bright) if rng.random() < 0.7 else (bright, dark)


def _grid_place(index: int | np.integer) -> float:
    """Place `index` of 32, far enough from the edge that the largest sprite stays whole."""
    return 0.2 + 0.6 * float(index) / 31


def _draw_x_location(rng: Rng, label: int, size: int) -> Picture:
    x, y = 2 * label + rng.integers(2), rng.integers(32)
    outline = ("square", "ellipse", "heart")[rng.integers(3)]
    return _sprite(outline, (_grid_place(x), _grid_place(y)), 2 * np.pi * rng.integers(40) / 40, rng, size)


def _draw_orientation(rng: Rng, label: int, size: int) -> Picture:
    index = rng.choice([i for i in range(40) if int(i / 2.5) == label])
    place = (_grid_place(rng.integers(32)), _grid_place(rng.integers(32)))
    return _sprite(_WITH_A_TOP[rng.integers(3)], place, 2 * np.pi * index / 40, rng, size)


# Scenes on a floor ------------------------------------------------------------------------------------------------

_COLOURS = np.array(
    [[0.68, 0.14, 0.14], [0.16, 0.29, 0.84], [0.11, 0.41, 0.08], [0.51, 0.15, 0.75],
     [0.16, 0.82, 0.82], [1.0, 0.93, 0.2], [0.34, 0.34, 0.34], [0.51, 0.29, 0.10]]
)  # fmt: skip


def _object(rng: Rng, x: float, y: float, half: float) -> Solid:
    kind = ("sphere", "box", "cylinder")[rng.integers(3)]
    width = 0.82 * half if kind == "box" else half
    return Solid(kind, *upright((width, width, half), (x, y, half), rng.uniform(0, np.pi)), _COLOURS[rng.integers(8)])  # type: ignore[arg-type]


def _floor(rng: Rng) -> NDArray[np.float64]:
    return rng.uniform(0.5, 0.8) * (1 + 0.08 * rng.uniform(-1, 1, 3))


def _sun(rng: Rng) -> NDArray[np.float64]:
    turn = rng.uniform(0, 2 * np.pi)
    return np.array([0.6 * np.cos(turn), 0.6 * np.sin(turn), 1.0])


def _draw_count(rng: Rng, label: int, size: int) -> Picture:
    wanted = label + 3
    solids: list[Solid] = []
    taken: list[tuple[float, float, float]] = []
    while len(solids) < wanted:
        half = float(rng.choice([0.32, 0.5]))
        x, y = rng.uniform(-2.7, 2.7, 2)
        if all(np.hypot(x - a, y - b) > half + other + 0.15 for a, b, other in taken):
            taken.append((x, y, half))
            solids.append(_object(rng, x, y, half))
    place = np.array([0.0, -7.5, 5.5]) + rng.uniform(-0.4, 0.4, 3)
    camera = Camera(place, np.array([0.0, 0.0, 0.2]), 48.0)
    return render(solids, camera, _sun(rng), _floor(rng), size)


def _draw_distance(rng: Rng, label: int, size: int) -> Picture:
    height = rng.uniform(2.6, 3.2)
    nearest = rng.uniform(DISTANCE_EDGES[label], DISTANCE_EDGES[label + 1])
    solids: list[Solid] = []
    taken: list[tuple[float, float, float]] = []
    wanted = int(rng.integers(3, 8))
    while len(solids) < wanted:
        half = float(rng.choice([0.35, 0.6]))
        distance = nearest if not solids else rng.uniform(nearest + 0.1, max(14.0, nearest + 2))
        ground = np.sqrt(distance**2 - (height - half) ** 2)
        turn = rng.uniform(-0.33, 0.33)
        x, y = ground * np.sin(turn), ground * np.cos(turn)
        if all(np.hypot(x - a, y - b) > half + other + 0.1 for a, b, other in taken):
            taken.append((x, y, half))
            solids.append(_object(rng, x, y, half))
    camera = Camera(np.array([0.0, 0.0, height]), np.array([0.0, 7.0, 0.4]), 52.0)
    return render(solids, camera, _sun(rng), _floor(rng), size)


# A toy on a turntable ---------------------------------------------------------------------------------------------


def _toy(rng: Rng) -> list[tuple[str, tuple[float, float, float], tuple[float, float, float]]]:
    """(kind, half extents, middle) of the parts of an animal, person, aeroplane, lorry or car; its front is +x."""
    long, wide, tall = 1 + 0.2 * rng.uniform(-1, 1, 3)
    match rng.integers(5):
        case 0:
            legs = [
                ("cylinder", (0.1, 0.1, 0.3 * tall), (0.5 * long * sx, 0.2 * wide * sy, 0.3 * tall))
                for sx in (-1, 1)
                for sy in (-1, 1)
            ]
            return [
                *legs,
                ("box", (0.65 * long, 0.27 * wide, 0.25), (0, 0, 0.8 * tall)),
                ("box", (0.25, 0.17, 0.2), (0.85 * long, 0, 0.8 * tall + 0.35)),
                ("box", (0.15, 0.05, 0.05), (-0.75 * long, 0, 0.8 * tall + 0.15)),
            ]
        case 1:
            return [
                ("box", (0.12, 0.11, 0.4 * tall), (0.15, 0.17 * wide, 0.4 * tall)),
                ("box", (0.12, 0.11, 0.4 * tall), (-0.12, -0.17 * wide, 0.4 * tall)),
                ("box", (0.18, 0.32 * wide, 0.38), (0, 0, 0.8 * tall + 0.36)),
                ("sphere", (0.22, 0.22, 0.24), (0.04, 0, 0.8 * tall + 0.95)),
                ("box", (0.4 * long, 0.08, 0.08), (0.4 * long, 0.4 * wide, 0.8 * tall + 0.5)),
            ]
        case 2:
            return [
                ("sphere", (1.0 * long, 0.2, 0.2), (0, 0, 0.6 * tall)),
                ("box", (0.24, 0.95 * wide, 0.05), (0.2, 0, 0.6 * tall)),
                ("box", (0.14, 0.36 * wide, 0.04), (-0.85 * long, 0, 0.62 * tall)),
                ("box", (0.14, 0.04, 0.24), (-0.85 * long, 0, 0.62 * tall + 0.26)),
                ("cylinder", (0.06, 0.06, 0.3 * tall), (0, 0, 0.3 * tall)),
            ]
        case 3:
            return [
                ("box", (0.7 * long, 0.34 * wide, 0.42 * tall), (-0.25, 0, 0.28 + 0.42 * tall)),
                ("box", (0.24, 0.32 * wide, 0.3), (0.75 * long, 0, 0.5)),
                *_wheels(0.55 * long, 0.36 * wide),
            ]
        case _:
            return [
                ("box", (0.9 * long, 0.36 * wide, 0.18), (0, 0, 0.38)),
                ("box", (0.42 * long, 0.31 * wide, 0.17 * tall), (-0.22 * long, 0, 0.56 + 0.17 * tall)),
                *_wheels(0.55 * long, 0.36 * wide),
            ]


def _wheels(x: float, y: float) -> list[tuple[str, tuple[float, float, float], tuple[float, float, float]]]:
    return [("sphere", (0.2, 0.07, 0.2), (x * sx, y * sy, 0.2)) for sx in (-1, 1) for sy in (-1, 1)]


def _draw_view(rng: Rng, azimuth: float, elevation: float, size: int) -> Picture:
    """A grey toy that stands on a turntable at `azimuth`, seen from `elevation` above the floor; degrees."""
    grey = rng.uniform(0.45, 0.9)
    solids = []
    turn = np.radians(azimuth)
    for kind, half, middle in _toy(rng):
        axes, _ = upright(half, middle, turn)
        place = upright((1, 1, 1), (0, 0, 0), turn)[0] @ np.array(middle)
        solids.append(Solid(kind, axes, place, np.full(3, grey * rng.uniform(0.85, 1.1))))  # type: ignore[arg-type]
    up = np.radians(elevation)
    distance = 5.6 + rng.uniform(-0.4, 0.4)
    target = np.array([0.0, 0.0, 0.55])
    camera = Camera(target + distance * np.array([0.0, -np.cos(up), np.sin(up)]), target, 32.0)
    lamp = 2 * np.pi * rng.integers(6) / 6  # six lamps that stand still while the table turns
    light = np.array([0.8 * np.cos(lamp), 0.8 * np.sin(lamp), 1.0])
    return render(solids, camera, light, np.full(3, rng.uniform(0.35, 0.95)), size)


def _draw_azimuth(rng: Rng, label: int, size: int) -> Picture:
    return _draw_view(rng, 20.0 * label, 30.0 + 5.0 * rng.integers(9), size)


def _draw_elevation(rng: Rng, label: int, size: int) -> Picture:
    return _draw_view(rng, 20.0 * rng.integers(18), 30.0 + 5.0 * label, size)


def _tasks() -> dict[str, ProceduralTask]:
    edges = DISTANCE_EDGES
    tasks = (
        ProceduralTask("sprite-x-location", tuple(f"column {i}" for i in range(16)), _draw_x_location),
        ProceduralTask("sprite-orientation", tuple(f"{22.5 * i:g}°" for i in range(16)), _draw_orientation),
        ProceduralTask("object-count", tuple(f"{i} objects" for i in range(3, 11)), _draw_count),
        ProceduralTask(
            "nearest-distance", tuple(f"{edges[i]:g} to {edges[i + 1]:g}" for i in range(6)), _draw_distance
        ),
        ProceduralTask("azimuth", tuple(f"{20 * i}°" for i in range(18)), _draw_azimuth),
        ProceduralTask("elevation", tuple(f"{30 + 5 * i}°" for i in range(9)), _draw_elevation),
    )
    return {task.name: task for task in tasks}


PROCEDURAL_TASKS = _tasks()
"""By name, in the order of VTAB's structured group."""
