"""A small ray caster for the procedural tasks: spheres, boxes and cylinders on a floor, one directional light.

Every solid is an affine image of a unit solid, so a ray is taken into the solid's own frame, met there with
|v| = 1, max|v_i| = 1 or x² + y² = 1, |z| = 1, and its parameter t is the same in the world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Kind = Literal["sphere", "box", "cylinder"]
_FAR = 1e9
_NEAR = 1e-4


@dataclass(frozen=True)
class Solid:
    """A unit solid under v → axes · v + centre. axes [3, 3], centre [3], colour [3] in 0 … 1; z is up."""

    kind: Kind
    axes: Array
    centre: Array
    colour: Array


@dataclass(frozen=True)
class Camera:
    """A pinhole at `place` [3] that looks at `target` [3]; field of view in degrees, of a square picture."""

    place: Array
    target: Array
    field_of_view: float


def upright(size: Sequence[float], centre: Sequence[float], turn: float = 0.0) -> tuple[Array, Array]:
    """Axes and centre of a solid with half extents `size`, turned by `turn` radians about the vertical."""
    cos, sin = np.cos(turn), np.sin(turn)
    rotation = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
    return rotation * np.asarray(size, dtype=np.float64), np.asarray(centre, dtype=np.float64)


def render(
    solids: Sequence[Solid],
    camera: Camera,
    light: Array,
    floor: Array,
    image_size: int,
    *,
    samples: int = 2,
    ambient: float = 0.35,
) -> NDArray[np.uint8]:
    """A picture [image_size, image_size, 3] of solids that stand on the plane z = 0.

    Args:
        light: direction towards the light [3]. floor: its colour [3] in 0 … 1, which is the sky's too.
        samples: rays per pixel, along each side. ambient: brightness of what the light does not reach, 0 … 1.
    """
    light = light / np.linalg.norm(light)
    n = image_size * samples
    rays = _rays(camera, n)
    t, normals, colours = _first_hit(solids, np.broadcast_to(camera.place, rays.shape), rays)
    down = rays[:, 2] < -1e-9
    t_floor = np.where(down, -camera.place[2] / np.where(down, rays[:, 2], -1.0), _FAR)
    on_floor = t_floor < t
    shade = np.clip(normals @ light, 0.0, 1.0)
    shade[on_floor] = light[2]
    reached = np.flatnonzero(on_floor & (t_floor < _FAR))
    points = camera.place + t_floor[reached, None] * rays[reached]
    blocked = _first_hit(solids, points + _NEAR * light, np.broadcast_to(light, points.shape))[0] < _FAR
    shade[reached[blocked]] = 0.0
    colours[on_floor] = floor
    lit = colours * (ambient + (1 - ambient) * shade)[:, None]
    lit[np.minimum(t, t_floor) >= _FAR] = floor
    picture = lit.reshape(image_size, samples, image_size, samples, 3).mean((1, 3))
    return (255 * np.clip(picture, 0.0, 1.0)).round().astype(np.uint8)


def _rays(camera: Camera, n: int) -> Array:
    """Directions [n·n, 3] through the middles of n × n squares, rows from the top."""
    forward = camera.target - camera.place
    forward = forward / np.linalg.norm(forward)
    right = np.cross(forward, [0.0, 0.0, 1.0])
    right = right / np.linalg.norm(right)
    up = np.cross(right, forward)
    steps = np.tan(np.radians(camera.field_of_view) / 2) * ((np.arange(n) + 0.5) / n * 2 - 1)
    x, y = np.meshgrid(steps, -steps)
    return forward + x.reshape(-1, 1) * right + y.reshape(-1, 1) * up


def _first_hit(solids: Sequence[Solid], places: Array, rays: Array) -> tuple[Array, Array, Array]:
    """Parameter t [R] of the first solid on each ray (or _FAR), unit normals [R, 3] and colours [R, 3] there."""
    nearest = np.full(len(rays), _FAR)
    normals, colours = np.zeros(rays.shape), np.zeros(rays.shape)
    squared_ray, squared_place, along_place = (
        (a * b).sum(1) for a, b in ((rays, rays), (places, places), (rays, places))
    )
    for solid in solids:
        inverse = np.linalg.inv(solid.axes)
        # Rays that miss the ball about the solid are most of them; the rest is met exactly.
        centre = solid.centre
        along = rays @ centre - along_place
        squared_distance = centre @ centre - 2 * (places @ centre) + squared_place - along**2 / squared_ray
        near = np.flatnonzero(squared_distance < (solid.axes**2).sum())
        if not len(near):
            continue
        o, d = (places[near] - solid.centre) @ inverse.T, rays[near] @ inverse.T
        t, local = _MEET[solid.kind](o, d)
        closer = (t > _NEAR) & (t < nearest[near])
        hit = near[closer]
        nearest[hit] = t[closer]
        outward = local[closer] @ inverse
        normals[hit] = outward / np.linalg.norm(outward, axis=1, keepdims=True)
        colours[hit] = solid.colour
    return nearest, normals, colours


def _meet_sphere(o: Array, d: Array) -> tuple[Array, Array]:
    t, _ = _quadratic((d * d).sum(1), (o * d).sum(1), (o * o).sum(1) - 1)
    return t, o + t[:, None] * d


def _meet_box(o: Array, d: Array) -> tuple[Array, Array]:
    entry, leave = _slabs(o, d)
    axis = entry.argmax(1)
    first = entry.max(1)
    hit = (first < leave.min(1)) & (first > 0)
    rows = np.arange(len(o))
    normal = np.zeros_like(o)
    normal[rows, axis] = -np.sign(d[rows, axis])
    return np.where(hit, first, _FAR), normal


def _meet_cylinder(o: Array, d: Array) -> tuple[Array, Array]:
    side_in, side_out = _quadratic((d[:, :2] ** 2).sum(1), (o[:, :2] * d[:, :2]).sum(1), (o[:, :2] ** 2).sum(1) - 1)
    cap_in, cap_out = (v[:, 0] for v in _slabs(o[:, 2:], d[:, 2:]))
    first = np.maximum(side_in, cap_in)
    hit = (side_in < _FAR) & (first < np.minimum(side_out, cap_out)) & (first > 0)
    normal = np.where(
        (side_in > cap_in)[:, None],
        np.concatenate([o[:, :2] + side_in[:, None] * d[:, :2], np.zeros((len(o), 1))], axis=1),
        np.array([0.0, 0.0, 1.0]) * -np.sign(d[:, 2:]),
    )
    return np.where(hit, first, _FAR), normal


def _slabs(o: Array, d: Array) -> tuple[Array, Array]:
    """Where rays enter and leave |v_i| ≤ 1, for each axis."""
    safe = np.where(np.abs(d) < 1e-12, 1e-12, d)
    a, b = (-1 - o) / safe, (1 - o) / safe
    return np.minimum(a, b), np.maximum(a, b)


def _quadratic(a: Array, half_b: Array, c: Array) -> tuple[Array, Array]:
    """Both roots of a·t² + 2·half_b·t + c, or _FAR where there is none."""
    a = np.maximum(a, 1e-12)
    inside = half_b**2 - a * c
    root = np.sqrt(np.maximum(inside, 0))
    return np.where(inside > 0, (-half_b - root) / a, _FAR), np.where(inside > 0, (-half_b + root) / a, _FAR)


_MEET = {"sphere": _meet_sphere, "box": _meet_box, "cylinder": _meet_cylinder}
