"""The ray caster against solid geometry worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from hgprompt.data.raycast import Camera, Solid, _first_hit, render, upright

WHITE = np.ones(3)
DOWN = np.array([0.0, 0.0, 1.0])


def _solid(kind, size, centre, turn=0.0, colour=WHITE):
    return Solid(kind, *upright(size, centre, turn), colour)


@pytest.mark.parametrize(
    ("solid", "expected_t", "expected_normal"),
    [
        (_solid("sphere", (2, 2, 2), (10, 0, 0)), 8, (-1, 0, 0)),
        (_solid("sphere", (3, 1, 1), (10, 0, 0)), 7, (-1, 0, 0)),
        (_solid("box", (1, 2, 3), (10, 0, 0)), 9, (-1, 0, 0)),
        (_solid("box", (1, 1, 1), (10, 0, 0), np.pi / 4), 10 - np.sqrt(2), None),  # its edge
        (_solid("cylinder", (1.5, 1.5, 1), (10, 0, 0)), 8.5, (-1, 0, 0)),
        (_solid("sphere", (1, 1, 1), (10, 1.01, 0)), 1e9, None),  # missed
        (_solid("sphere", (1, 1, 1), (-10, 0, 0)), 1e9, None),  # behind
        (_solid("cylinder", (1, 1, 1), (10, 0, 1.01)), 1e9, None),  # over its lid
    ],
)
def test_first_hit(solid, expected_t, expected_normal):
    # A hair off the axis: through an edge exactly, either face may count as hit.
    ray = np.array([[1.0, 1e-9, 1e-9]])
    t, normal, _ = _first_hit([solid], np.zeros((1, 3)), ray)
    assert t[0] == pytest.approx(expected_t, abs=1e-6)
    if expected_normal is not None:
        np.testing.assert_allclose(normal[0], expected_normal, atol=1e-6)


def test_a_cylinder_has_a_lid():
    t, normal, _ = _first_hit([_solid("cylinder", (1, 1, 2), (0, 0, 2))], np.array([[0.3, 0, 9.0]]), -DOWN[None])
    assert t[0] == pytest.approx(5)
    np.testing.assert_allclose(normal[0], DOWN, atol=1e-12)


def test_the_nearest_solid_hides_the_others():
    near, far = (_solid("sphere", (1, 1, 1), (x, 0, 0), colour=np.full(3, c)) for x, c in ((5, 0.2), (9, 0.9)))
    for solids in ([near, far], [far, near]):
        t, _, colour = _first_hit(solids, np.zeros((1, 3)), np.array([[1.0, 0, 0]]))
        assert t[0] == pytest.approx(4)
        assert colour[0, 0] == 0.2


def test_floor_shadow_and_light():
    camera = Camera(np.array([0.0, -1e-6, 10.0]), np.zeros(3), 60.0)  # from right above
    empty = render([], camera, DOWN, np.full(3, 0.5), 32)
    assert np.unique(empty).tolist() == [128]  # 0.5 · 255, fully lit everywhere
    # A ball in mid-air, lit slantwise from +x: its shadow falls on the side of -x and has the ambient light alone.
    ball = _solid("sphere", (0.5, 0.5, 0.5), (0, 0, 2))
    picture = render([ball], camera, np.array([1.0, 0, 1.0]), np.full(3, 0.5), 64, ambient=0.35)[..., 0]
    dark = np.argwhere(picture == round(255 * 0.5 * 0.35))
    assert len(dark) > 20
    assert dark[:, 1].mean() < 31.5 - 5
    lit = 0.5 * (0.35 + 0.65 / np.sqrt(2))
    assert picture[2, 2] == round(255 * lit)
