"""Levels: brightness, contrast, gamma, hue and saturation; p the way of 1.7 and the usual way."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

from tests.vision.pictures import KINDS, picture, without_opencv
from torch_frame.vision import (
    ColorJitter,
    RandomBrightness,
    RandomContrast,
    RandomGammaCorrection,
    RandomHueSaturation,
    adjust_brightness,
    adjust_contrast,
    adjust_gamma,
    adjust_hue_saturation,
)

OLD = [RandomBrightness, RandomContrast, RandomGammaCorrection, RandomHueSaturation]
some = settings(max_examples=40)


def noise(kind: str = "uint8 3", seed: int = 0, side: int = 40) -> np.ndarray:
    return picture(kind, side, side, np.random.default_rng(seed))


@pytest.mark.parametrize("augmentation", OLD)
def test_p_of_1_7_is_the_probability_of_doing_nothing(augmentation):
    image = noise(side=4)
    random.seed(0)
    untouched = {p: sum(augmentation(p=p)(image) is image for _ in range(1500)) for p in (0.0, 0.2, 0.5, 1.0)}
    assert untouched[0.0] == 0
    assert untouched[1.0] == 1500
    for p in (0.2, 0.5):
        assert untouched[p] == pytest.approx(1500 * p, abs=4 * (1500 * p * (1 - p)) ** 0.5)
    assert f"`{'p'}` NOTHING is done" in augmentation.__doc__.splitlines()[0]


def test_p_of_a_new_name_is_the_probability_of_a_change():
    image = np.full((2, 2), 100, np.uint8)
    rng = random.Random(0)
    for p in (0.0, 0.3, 1.0):
        changed = sum((ColorJitter((10, 20), p=p, rng=rng)(image) != image).any() for _ in range(1500))
        assert changed == pytest.approx(1500 * p, abs=4 * (1500 * p * (1 - p)) ** 0.5)


@some
@given(st.sampled_from(KINDS), st.integers(0, 99), st.floats(-255, 255), st.floats(0, 3), st.floats(0.2, 5))
def test_levels_are_added_multiplied_and_bent_and_cut_to_what_there_is(kind, seed, amount, factor, gamma):
    image = noise(kind, seed, side=6)
    before = image.copy()
    top = 255 if image.dtype == np.uint8 else 1
    levels = image.astype(np.float64) / top
    tolerance = {"uint8": 1.01 / 255, "float16": 4e-3}.get(str(image.dtype), 1e-5)
    for result, expected in (
        (adjust_brightness(image, amount), levels + amount / 255),
        (adjust_contrast(image, factor), levels * factor),
        (adjust_gamma(image, gamma), levels**gamma),
    ):
        assert result.dtype == image.dtype
        assert result.shape == image.shape
        assert not np.shares_memory(result, image)
        np.testing.assert_allclose(result.astype(np.float64) / top, expected.clip(0, 1), rtol=0, atol=tolerance)
    assert (image == before).all()


@pytest.mark.parametrize("hue", [-180, -12.5, 0, 7, 90, 180])
@pytest.mark.parametrize("saturation", [0, 0.6, 1, 1.5])
def test_hue_and_saturation_of_floats_are_matplotlibs(hue, saturation):
    image = noise("float64 3")
    hsv = rgb_to_hsv(image[..., ::-1])
    hsv[..., 0] = (hsv[..., 0] + hue / 180) % 1
    hsv[..., 1] = (hsv[..., 1] * saturation).clip(0, 1)
    np.testing.assert_allclose(adjust_hue_saturation(image, hue, saturation)[..., ::-1], hsv_to_rgb(hsv), atol=1e-9)
    result = adjust_hue_saturation((image * 255).round().astype(np.uint8), hue, saturation)
    assert np.abs(result[..., ::-1] / 255 - hsv_to_rgb(hsv)).max() < 0.06  # its hue goes in steps of 2 degrees


@pytest.mark.parametrize("opencv", [True, False])
def test_hue_and_saturation_of_bytes_are_opencvs_own_conversions(opencv, monkeypatch):
    cv2 = pytest.importorskip("cv2")
    if not opencv:
        without_opencv(monkeypatch)
    for seed in range(10):
        image = noise(seed=seed, side=60)
        hue, saturation = random.Random(seed).uniform(-12, 12), random.Random(seed).uniform(0.6, 1.5)
        hsv = cv2.cvtColor(image, cv2.COLOR_BGR2HSV).astype(np.float32)
        hsv[..., 0] = np.mod(hsv[..., 0] + np.float32(hue), 180)
        hsv[..., 1] = np.minimum(hsv[..., 1] * np.float32(saturation), 255)
        expected = cv2.cvtColor(hsv.astype(np.uint8), cv2.COLOR_HSV2BGR)
        result = adjust_hue_saturation(image, hue, saturation)
        assert np.abs(result.astype(int) - expected).max() <= (0 if opencv else 1)
        turned = adjust_hue_saturation(image[..., ::-1], hue, saturation, channel_order="rgb")
        assert (turned[..., ::-1] == result).all()


def test_saturation_is_cut_off_and_does_not_wrap_around():
    red = np.zeros((1, 1, 3), np.uint8)
    red[..., 2] = 255
    assert adjust_hue_saturation(red, 0, 1.5).tolist() == [[[0, 0, 255]]]  # 1.7: 129, 129, 255
    assert adjust_hue_saturation(red, 0, 0).tolist() == [[[255, 255, 255]]]
    assert adjust_hue_saturation(red, 60, 1).tolist() == [[[0, 255, 0]]]
    assert adjust_hue_saturation(red, -60, 1).tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("augmentation", [*OLD, ColorJitter])
def test_every_picture_comes_back_new_and_of_its_kind(augmentation, kind):
    image = noise(kind)[::-1, ::2]  # negative and wide strides
    image.flags.writeable = False
    if augmentation is ColorJitter:
        augment = ColorJitter((-20, 20), (0.8, 1.2), (0.7, 1.4), (-9, 9), (0.5, 1.5), p=1.0)
    else:
        augment = augmentation(p=0.0)
    if image.ndim == 3 and image.shape[2] == 4 and augmentation in (RandomHueSaturation, ColorJitter):
        with pytest.raises(ValueError, match="has 4 channels"):
            augment(image)
        return
    result = augment(image)
    assert result.dtype == image.dtype
    assert result.shape == image.shape
    assert not np.shares_memory(result, image)
    torch.from_numpy(result)
    if augmentation is RandomHueSaturation and (image.ndim == 2 or image.shape[2] == 1):
        assert (result == image).all()  # grey has no hue
    one = np.full((1, 1, 3), 7, np.uint8)
    assert augment(one).shape == (1, 1, 3)


def test_ranges_that_change_nothing_may_be_lists_too():
    image = noise()
    jitter = ColorJitter([0, 0], [1, 1], [1, 1], [0, 0], [1, 1], p=1.0)
    random.seed(0)
    assert (jitter(image) == image).all()  # nor through HSV and back, which rounds


def test_draws_are_in_1_7s_order_and_from_the_generator_that_is_passed():
    image = noise()
    for augmentation, draw_values in (
        (RandomBrightness, lambda rng: adjust_brightness(image, rng.randint(-10, 10))),
        (RandomContrast, lambda rng: adjust_contrast(image, rng.uniform(0.9, 1.1))),
        (RandomGammaCorrection, lambda rng: adjust_gamma(image, rng.uniform(0.666, 1.5))),
        (RandomHueSaturation, lambda rng: adjust_hue_saturation(image, rng.uniform(-12, 12), rng.uniform(0.6, 1.5))),
    ):
        for seed in range(5):
            rng = random.Random(seed)
            expected = image if rng.random() < 0.2 else draw_values(rng)
            random.seed(seed)
            assert (augmentation(p=0.2)(image) == expected).all()
            state = random.getstate()
            assert (augmentation(p=0.2, rng=random.Random(seed))(image) == expected).all()
            assert random.getstate() == state
            for make in (np.random.default_rng, lambda number: torch.Generator().manual_seed(number)):
                first, again = (augmentation(p=0.0, rng=make(seed))(image) for _ in range(2))
                assert (first == again).all()


def test_wrong_arguments_are_told():
    for low, high in ((-81, 10), (0, 81), (5, 4), (0, 1.5)):
        with pytest.raises(ValueError, match="at least -80, high at most 80"):
            RandomBrightness(low, high)
    for low, high in ((0.4, 1), (1, 2.1), (1.1, 1.1), (1.2, 1.1)):
        with pytest.raises(ValueError, match=r"within 0.5..2"):
            RandomContrast(low, high)
    for augmentation in (*OLD, ColorJitter):
        with pytest.raises(ValueError, match=r"p is 1.5; a probability is 0..1"):
            augmentation(p=1.5)
    for name, value in {"brightness": 20, "contrast": (1,), "hue": None, "saturation": (0.5, float("nan"))}.items():
        with pytest.raises(ValueError, match=f"{name} is .* a pair of numbers, the lowest and the highest"):
            ColorJitter(**{name: value})
    for make in (
        lambda: ColorJitter(gamma=(-0.1, 1)),
        lambda: ColorJitter(saturation=(0.5, -1)),
        lambda: RandomGammaCorrection(lower=-0.5),
        lambda: RandomHueSaturation(sat_lower=-0.5),
    ):
        with pytest.raises(ValueError, match="neither below 0"):
            make()
    image = noise("float32 3")
    with pytest.raises(ValueError, match=r"levels 0..1; this one's are nan"):
        adjust_contrast(np.where(image > 0.99, np.nan, image).astype(np.float32), 1.1)
    with pytest.raises(ValueError, match=r"levels 0..1; this one's are .*Divide it by 255"):
        adjust_contrast(image * 255, 1.1)
    with pytest.raises(ValueError, match="Divide it by 255"):
        adjust_hue_saturation(image - 0.5, 1, 1)
    with pytest.raises(ValueError, match="gamma is 0"):
        adjust_gamma(image, 0)
    with pytest.raises(ValueError, match="saturation is -1"):
        adjust_hue_saturation(image, 0, -1)
    with pytest.raises(ValueError, match="channel_order is 'hsv'"):
        adjust_hue_saturation(image, 0, 1, channel_order="hsv")
    with pytest.raises(TypeError, match="this one is of uint16"):
        adjust_brightness(image.astype(np.uint16), 3)
