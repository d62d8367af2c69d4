"""Procedural tasks: what a picture shows is what its label says, measured in the picture or in its scene."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hgprompt.data import PROCEDURAL_TASKS, procedural, render_task
from hgprompt.errors import OptionError

CLASSES = {
    "sprite-x-location": 16,
    "sprite-orientation": 16,
    "object-count": 8,
    "nearest-distance": 6,
    "azimuth": 18,
    "elevation": 9,
}


def test_names_and_numbers_of_classes():
    assert {name: len(task.class_names) for name, task in PROCEDURAL_TASKS.items()} == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_balanced_seeded_and_extensible(name):
    classes = CLASSES[name]
    images = render_task(name, 2 * classes, image_size=24, seed=3)
    assert images.images.shape == (2 * classes, 3, 24, 24)
    assert images.labels.bincount(minlength=classes).tolist() == [2] * classes
    fewer = render_task(name, 5, image_size=24, seed=3)
    assert torch.equal(fewer.images, images.images[:5])
    for other in (
        render_task(name, 5, image_size=24, seed=4),
        render_task(name, 5, image_size=24, seed=3, split="test"),
    ):
        assert not torch.equal(other.images, fewer.images)


def _ink(picture: torch.Tensor) -> np.ndarray:
    """Weights of the sprite's pixels: distance from the ground's colour, which the corner shows."""
    values = picture.double().numpy()
    difference = np.abs(values - values[:, :1, :1]).sum(0)
    return difference / difference.sum()


def test_x_location_is_where_the_sprite_is():
    images = render_task("sprite-x-location", 160, image_size=96)
    for picture, label in zip(images.images, images.labels.tolist(), strict=True):
        x = float((_ink(picture).sum(0) * (np.arange(96) + 0.5)).sum() / 96)
        # The classes are 1.2/31 wide. A heart's middle is not its centroid: up to 0.15 of its radius of 0.18 away.
        first, last = (0.2 + 0.6 * (2 * label + step) / 31 for step in (0, 1))
        assert first - 0.035 < x < last + 0.035


def test_orientation_turns_the_sprite(monkeypatch):
    turns = []
    draw = procedural._sprite

    def recorded(outline, place, turn, rng, size):
        turns.append((outline, turn))
        return draw(outline, place, turn, rng, size)

    monkeypatch.setattr(procedural, "_sprite", recorded)
    labels = render_task("sprite-orientation", 160, image_size=16).labels.tolist()
    for (outline, turn), label in zip(turns, labels, strict=True):
        assert outline not in ("square", "ellipse")  # which look the same after half a turn
        assert int(round(turn / (2 * np.pi) * 40) / 2.5) == label


def test_a_sprite_turns_clockwise_from_upright():
    pictures = [
        procedural._sprite("arrow", (0.5, 0.5), np.radians(degrees), np.random.default_rng(0), 64)
        for degrees in (0, 90, 180, 270)
    ]
    widths = (_ink(torch.from_numpy(pictures[0].transpose(2, 0, 1).copy())) > 1e-4).sum(1)
    assert widths.argmax() < 32  # the arrow's head is above its middle: it points up
    for quarter, picture in enumerate(pictures):
        turned = np.rot90(pictures[0], -quarter).astype(float)  # clockwise
        # Edges are drawn on whole sub-pixels: a few border pixels may differ.
        assert np.mean(np.abs(turned - picture) > 40) < 0.01


@pytest.fixture
def scenes(monkeypatch):
    """What was handed to the ray caster, instead of a picture."""
    seen = []

    def record(solids, camera, light, floor, image_size, **_):
        seen.append((solids, camera))
        return np.zeros((image_size, image_size, 3), np.uint8)

    monkeypatch.setattr(procedural, "render", record)
    return seen


def test_count_is_the_number_of_objects(scenes):
    labels = render_task("object-count", 80, image_size=16).labels.tolist()
    assert [len(solids) - 3 for solids, _ in scenes] == labels


def test_nearest_distance_is_in_its_class(scenes):
    labels = render_task("nearest-distance", 120, image_size=16).labels.tolist()
    for (solids, camera), label in zip(scenes, labels, strict=True):
        nearest = min(np.linalg.norm(solid.centre - camera.place) for solid in solids)
        low, high = procedural.DISTANCE_EDGES[label : label + 2]
        assert low <= nearest < high


def test_objects_do_not_overlap(scenes):
    render_task("object-count", 24, image_size=16)
    render_task("nearest-distance", 24, image_size=16)
    for solids, _ in scenes:
        for i, a in enumerate(solids):
            for b in solids[:i]:
                reach = a.centre[2] + b.centre[2]  # an object stands on the floor: its half height is its z
                assert np.hypot(*(a.centre - b.centre)[:2]) > reach


@pytest.mark.parametrize("name", ["azimuth", "elevation"])
def test_view_angles(scenes, name):
    labels = render_task(name, 36, image_size=16).labels.tolist()
    azimuths, elevations = [], []
    for solids, camera in scenes:
        away = camera.place - camera.target
        elevations.append(np.degrees(np.arctan2(away[2], np.hypot(*away[:2]))))
        axes = solids[0].axes[:, 0]
        azimuths.append(np.degrees(np.arctan2(axes[1], axes[0])) % 360)
    measured = np.array(azimuths) / 20 if name == "azimuth" else (np.array(elevations) - 30) / 5
    np.testing.assert_allclose(measured.round(9) % CLASSES[name], labels, atol=1e-8)


def test_refuses_what_it_cannot_draw():
    for arguments, message in (
        ({"name": "dance", "count": 1}, "there are sprite-x-location"),
        ({"name": "azimuth", "count": 0}, "count"),
        ({"name": "azimuth", "count": 1, "image_size": 4}, "image_size"),
        ({"name": "azimuth", "count": 1, "seed": -1}, "seed"),
    ):
        with pytest.raises(OptionError, match=message):
            render_task(**arguments)
