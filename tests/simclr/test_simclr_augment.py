import dataclasses
import math

import pytest
import torch

from fastntxent.simclr.augment import PRESETS, Preset, augment, two_views


def images(channels=3, count=64, size=(20, 24)):
    return torch.randint(0, 256, (count, channels, *size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("preset", PRESETS)
def test_two_views_depend_only_on_the_generator(preset, channels):
    x = images(channels)
    first, second = two_views(x, PRESETS[preset], seeded())
    again, _ = two_views(x, PRESETS[preset], seeded())
    other, _ = two_views(x, PRESETS[preset], seeded(1))
    assert torch.equal(first, again)
    assert first.shape == second.shape == x.shape
    assert first.dtype == torch.float32
    assert min(first.min(), second.min()) >= 0
    assert max(first.max(), second.max()) <= 1
    if preset != "none":
        assert ((first - second).flatten(1).abs().amax(1) > 0.01).all(), "two views of an image should differ"
        assert ((first - other).flatten(1).abs().amax(1) > 0.01).all(), "a different seed should give a different view"


@pytest.mark.parametrize("preset", PRESETS)
def test_two_views_of_part_of_a_batch_match_the_whole_batch(preset):
    x = images(count=7)
    whole = two_views(x, PRESETS[preset], seeded())
    for rows in (torch.tensor([5, 2, 6]), torch.tensor([], dtype=torch.int64)):
        part = two_views(x[rows], PRESETS[preset], seeded(), rows=rows, batch=7)
        for view, of_whole in zip(part, whole, strict=True):
            torch.testing.assert_close(view, of_whole[rows], atol=1e-5, rtol=0)


def test_augment_with_a_neutral_preset_changes_nothing():
    x = images()
    torch.testing.assert_close(augment(x, Preset(), seeded()), x / 255, atol=1e-5, rtol=0)


def test_augment_leaves_its_input_and_the_global_generator_unchanged():
    x = images()
    before, state = x.clone(), torch.get_rng_state()
    augment(x, PRESETS["photos"], seeded())
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)


def test_flip_mirrors_an_image():
    x = images()
    torch.testing.assert_close(augment(x, Preset(flip=1.0), seeded()), x.flip(3) / 255, atol=1e-5, rtol=0)


def test_flip_happens_with_the_given_probability():
    x = images(1, count=2000, size=(8, 8))
    flipped = (augment(x, Preset(flip=0.3), seeded()) - x / 255).abs().amax((1, 2, 3)) > 0.01
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_area_is_the_share_of_the_image_in_a_view():
    # On a horizontal ramp, the range of values in a view gives the width of its crop.
    ramp = (torch.arange(64) * 4).to(torch.uint8).expand(200, 1, 64, 64)
    view = augment(ramp, Preset(area=(0.25, 0.25), padding="border"), seeded())
    width = (view.amax((1, 2, 3)) - view.amin((1, 2, 3))) * 255 / 4
    assert width.min() == pytest.approx(31.5, abs=1)
    assert width.max() == pytest.approx(31.5, abs=1)
    assert view.amin() < 0.05
    assert view.amax() > 0.9


def test_rotate_turns_by_at_most_the_angle():
    # A bright dot right of the centre is located again after the rotation.
    x = torch.zeros(500, 1, 65, 65, dtype=torch.uint8)
    x[:, :, 30:35, 54:59] = 255
    view = augment(x, Preset(rotate=30), seeded())[:, 0]
    at = torch.arange(65) - 32.0
    mass = view.sum((1, 2))
    angle = torch.atan2((view.sum(2) @ at) / mass, (view.sum(1) @ at) / mass) * 180 / math.pi
    assert angle.abs().max() <= 30.5
    assert angle.max() > 25
    assert angle.min() < -25


def test_colours_stay_with_jitter_0_and_change_with_jitter_1():
    x = images()
    strong = Preset(brightness=0.5, contrast=0.5, saturation=0.5, hue=0.3, jitter=0.0)
    torch.testing.assert_close(augment(x, strong, seeded()), x / 255, atol=1e-5, rtol=0)
    changed = augment(x, dataclasses.replace(strong, jitter=1.0), seeded())
    assert ((changed - x / 255).abs().amax((1, 2, 3)) > 0.05).all()


def test_gray_makes_the_channels_equal_to_luma():
    x = images()
    luma = torch.einsum("nchw,c->nhw", x / 255, torch.tensor([0.299, 0.587, 0.114]))
    view = augment(x, Preset(gray=1.0), seeded())
    torch.testing.assert_close(view, luma[:, None].expand_as(view), atol=1e-5, rtol=0)


def test_hue_keeps_grey_and_the_sum_of_channels():
    x = (images() // 4) + 96  # far from 0 and 255, so nothing is clipped
    view = augment(x, Preset(hue=0.5, jitter=1.0), seeded())
    torch.testing.assert_close(view.sum(1), (x / 255).sum(1), atol=1e-4, rtol=0)
    assert ((view - x / 255).abs().amax((1, 2, 3)) > 0.02).float().mean() > 0.9
    grey = x[:, :1].expand(-1, 3, -1, -1)
    torch.testing.assert_close(augment(grey, Preset(hue=0.5, jitter=1.0), seeded()), grey / 255, atol=1e-5, rtol=0)


def test_erase_fills_part_of_an_image_with_its_mean():
    x = images(1)
    view = augment(x, Preset(erase=1.0), seeded())
    changed = (view - x / 255).abs() > 1e-4
    share = changed.float().mean((1, 2, 3))
    assert share.min() > 0.02
    assert share.max() < 0.3
    means = (x / 255).mean((1, 2, 3), keepdim=True).expand_as(view)
    torch.testing.assert_close(view[changed], means[changed])


def test_blur_lowers_the_contrast_between_neighbouring_pixels():
    x = images(1)
    view = augment(x, Preset(blur=1.0), seeded())
    assert (view.diff(dim=3).abs().mean() < 0.8 * (x / 255).diff(dim=3).abs().mean()).item()
    assert view.mean().item() == pytest.approx((x / 255).mean().item(), abs=0.01)
