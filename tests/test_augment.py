import dataclasses
import itertools
import math

from helpers import close, rand

import numpy as np
import scipy.ndimage
import torch

import augment
from augment import Views
from device import generator

ALL_ON = Views(grey=0.3, blur=0.5, cutout=0.3, noise=0.1)
ALL_OFF = Views(crop=1, flip=False, rotate=0, jitter=0)
LUMA = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)


def seeded(seed=0):
    return generator('cpu', seed)


def test_views_keep_shape_and_range_and_repeat_by_generator():
    for C, H, W in (1, 28, 28), (3, 9, 13), (3, 33, 19):
        x = rand(6, C, H, W)
        kept = x.clone()
        for strength in ALL_ON, Views():
            views = augment.augment(x, strength, seeded(1))
            assert views.shape == x.shape and 0 <= views.min() and views.max() <= 1 and torch.equal(x, kept)
            assert torch.equal(views, augment.augment(x, strength, seeded(1)))
            assert not torch.equal(views, augment.augment(x, strength, seeded(2)))
        assert torch.equal(augment.augment(x, ALL_OFF, seeded(1)), x)


def window(image, h, w, angle, centre):
    """Of an image (H, W) a window by scipy, bilinear: its extents as shares, its turn and its centre (2,)."""
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    matrix, middle = turn @ np.diag([h, w]), (np.array(image.shape) - 1) / 2
    return scipy.ndimage.affine_transform(image.numpy(), matrix, middle + centre - matrix @ middle, order=1,
                                          mode='grid-constant')


def test_warp_samples_the_window_it_drew():
    H, W = 9, 13
    x = rand(20, 1, H, W)
    for crop, flip, rotate in (0.3, False, 0), (0.3, True, 30), (1, True, 0), (1, False, 30):
        views, g = augment.warp(x, crop, flip, rotate, seeded(3)), seeded(3)

        def draw(low, high, g=g):
            return (torch.rand(20, generator=g) * (high - low) + low).double().numpy()

        area = draw(crop, 1)
        ratio = np.exp(draw(math.log(3 / 4), math.log(4 / 3))) ** (crop < 1)
        w, h = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
        cx, cy = draw(-1, 1) * (1 - w) * W / 2, draw(-1, 1) * (1 - h) * H / 2
        mirror = np.where(draw(0, 1) < 0.5, 1, -1) if flip else np.ones(20)
        angle = draw(-1, 1) * math.radians(rotate)
        for i in range(20):
            wanted = window(x[i, 0], h[i], w[i] * mirror[i], angle[i], (cy[i], cx[i]))
            assert close(views[i, 0], wanted, 1e-4)


def test_fixed_views_are_the_image_its_mirror_and_four_corner_crops():
    x = rand(3, 1, 50, 75)
    assert len(list(augment.fixed_views(x, False, True))) == 2
    same, mirrored, *corners = augment.fixed_views(x, True, True)
    assert torch.equal(same, x) and torch.equal(mirrored, x.flip(3))
    plain = list(augment.fixed_views(x, True, False))[1:]
    for i, (dx, dy) in enumerate(itertools.product((-1, 1), repeat=2)):
        wanted = window(x[0, 0], 0.96, 0.96, 0, (dy * 0.04 * 25, dx * 0.04 * 37.5))
        assert close(plain[i][0, 0], wanted, 1e-4)
        assert close(corners[i], plain[i].flip(3) if dx != dy else plain[i], 1e-4)


def test_jitter_on_grey_is_brightness_and_contrast_and_nothing_else():
    x = rand(50, 1, 9, 8) * 0.2 + 0.4                                     # in the middle: nothing is clipped
    for a, b in zip(x, augment.color_jitter(x, 0.1, seeded())):
        bright = b.mean() / a.mean()
        contrast = b.std() / a.std() / bright
        assert close(b, ((a - a.mean()) * contrast + a.mean()) * bright)
        assert 0.899 < bright < 1.101 and 0.899 < contrast < 1.101


def test_colour_jitter_parts_by_their_formulas():
    x = rand(4, 3, 5, 6)
    luma = (x * LUMA).sum(1, keepdim=True)
    f = (torch.rand(4, 1, generator=seeded()) * 0.8 + 0.6).view(4, 1, 1, 1)
    mean = luma.mean((2, 3), keepdim=True)
    assert close(augment.brightness(x, 0.4, seeded()), x * f)
    assert close(augment.contrast(x, 0.4, seeded()), mean + (x - mean) * f)
    assert close(augment.saturation(x, 0.4, seeded()), luma + (x - luma) * f)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert close(augment.hue(grey, 0.4, seeded()), grey, 2e-3)            # YIQ rows sum to 0 to 3 digits


def test_hue_turns_the_colours_in_yiq():
    def yiq(x):
        rows = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
        return torch.einsum('kc,nchw->knhw', rows, x)
    x = rand(4, 3, 5, 6)
    angle = (torch.rand(4, 1, 1, generator=seeded()) * 2 - 1) * 0.1 * 2 * math.pi      # a tenth of a circle
    cos, sin, (y, i, q) = angle.cos(), angle.sin(), yiq(x)
    wanted = torch.stack([y, i * cos - q * sin, i * sin + q * cos])
    assert close(yiq(augment.hue(x, 0.4, seeded())), wanted)


def test_grey_takes_the_colours_out_of_a_share_of_the_images():
    x, views = rand(400, 3, 5, 6), dataclasses.replace(ALL_OFF, grey=0.25)
    out = augment.augment(x, views, seeded())
    grey = (out - (x * LUMA).sum(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-6
    assert 70 < grey.sum() < 130 and torch.equal(out[~grey], x[~grey])
    one, coloured = rand(9, 1, 5, 6), dataclasses.replace(ALL_ON, grey=0)
    assert torch.equal(augment.augment(one, ALL_ON, seeded(1)), augment.augment(one, coloured, seeded(1)))


def test_half_precision_around_them_changes_no_view():
    for C, seed in itertools.product((1, 3), range(6)):       # six orders of the parts of colour jitter
        x = rand(8, C, 28, 28)
        plain = augment.augment(x, ALL_ON, seeded(seed))
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(augment.augment(x, ALL_ON, seeded(seed)), plain)


def test_blur_is_scipys_gaussian_of_the_width_it_drew_and_scales_with_the_image():
    for side, radius in (9, 1), (28, 1), (96, 4):
        x, g = rand(30, 1, side, side + 4), seeded(2)
        out = augment.blur(x, 0.7, seeded(2))
        sigma = torch.rand(30, generator=g) * 0.5 * radius + 0.1
        blurred = torch.rand(30, generator=g) < 0.7
        assert 10 < blurred.sum() < 30
        for i in range(30):
            wanted = scipy.ndimage.gaussian_filter(x[i, 0].double().numpy(), sigma[i].item(),
                                                    mode='mirror', radius=radius)
            assert close(out[i, 0], wanted if blurred[i] else x[i, 0], 1e-4)


def test_cutout_erases_one_square_of_the_size_asked_for():
    x, g = torch.ones(50, 3, 9, 14), seeded(5)
    out = augment.cutout(x, 0.4, seeded(5))
    cy, cx = (torch.rand(50, generator=g) * n for n in (9, 14))
    for i, h, w in itertools.product(range(50), range(9), range(14)):
        inside = abs(h + 0.5 - cy[i]) <= 0.4 * 9 / 2 and abs(w + 0.5 - cx[i]) <= 0.4 * 14 / 2
        assert (out[i, :, h, w] == (0.0 if inside else 1.0)).all()


def test_noise_has_the_standard_deviation_asked_for():
    x = torch.full((50, 1, 40, 40), 0.5)
    noise = augment.add_noise(x, 0.05, seeded()) - x
    assert abs(noise.std() - 0.05) < 5e-4 and abs(noise.mean()) < 5e-4
    assert abs((noise / 0.05).pow(4).mean() - 3) < 0.1                    # a Gaussian's fourth moment
    loud = augment.add_noise(x, 5.0, seeded())
    assert loud.min() == 0 and loud.max() == 1
