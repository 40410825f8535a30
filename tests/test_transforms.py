"""Crop windows: areas, ratios, places, limits."""

from __future__ import annotations

import numpy as np
import pytest

from courier_fast.data.images.transforms import eval_windows, random_flips, random_windows


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


@pytest.mark.parametrize("shape", [(100, 100), (540, 360), (300, 1200), (1, 1), (3, 900)])
def test_windows_lie_in_the_image_and_keep_ratio_and_area(shape: tuple[int, int]) -> None:
    shapes = np.tile([shape], (4000, 1))
    windows = random_windows(rng(), shapes, (0.3, 1.0), (0.75, 4 / 3))
    top, left, height, width = windows.T.astype(np.float64)
    assert windows.dtype == np.float32
    assert (windows >= 0).all()
    assert (top + height).max() <= 1 + 1e-6
    assert (left + width).max() <= 1 + 1e-6
    ratio = width * shape[1] / (height * shape[0])
    assert ratio.min() >= 0.75 - 1e-4
    assert ratio.max() <= 4 / 3 + 1e-4
    area = height * width
    if max(shape) < 2 * min(shape):
        assert 0.3 - 1e-4 <= area.min() < 0.32
        largest = min(1, min(shape) * min(shape) * 4 / 3 / (shape[0] * shape[1]))
        assert 0.95 * largest < area.max() <= largest + 1e-4
        # Uniform but for draws that did not fit, which are the large ones.
        assert 0.5 < area.mean() < 0.66
        # Anywhere: the middle of what is left on average.
        assert (top / (1 - height + 1e-9)).mean() == pytest.approx(0.5, abs=0.03)
        assert (left / (1 - width + 1e-9)).mean() == pytest.approx(0.5, abs=0.03)


def test_what_cannot_fit_is_the_central_window_of_an_allowed_ratio() -> None:
    window = random_windows(rng(), np.array([[100, 1000]]), (0.9, 1.0))[0]
    assert window.tolist() == pytest.approx([0, 0.5 - 0.2 / 3, 1, 0.4 / 3])


def test_windows_follow_from_the_generator_alone() -> None:
    shapes = np.random.default_rng(0).integers(1, 500, (50, 2))
    assert np.array_equal(random_windows(rng(3), shapes), random_windows(rng(3), shapes))
    assert not np.array_equal(random_windows(rng(3), shapes), random_windows(rng(4), shapes))


def test_a_missing_image_is_whole() -> None:
    shapes = np.array([[0, 0], [50, 50]])
    assert random_windows(rng(), shapes)[0].tolist() == [0, 0, 1, 1]
    assert eval_windows(shapes)[0].tolist() == [0, 0, 1, 1]
    assert random_windows(rng(), shapes[:0]).shape == (0, 4)


def test_eval_windows_are_central_squares() -> None:
    assert eval_windows(np.array([[100, 200]]), 0.8)[0].tolist() == pytest.approx(
        [0.1, 0.3, 0.8, 0.4]
    )
    with pytest.raises(ValueError, match="crop: expected a share"):
        eval_windows(np.array([[1, 1]]), 1.5)


def test_flips_are_even() -> None:
    assert random_flips(rng(), 10_000).mean() == pytest.approx(0.5, abs=0.02)
