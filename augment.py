"""Random views of images: crop, flip, rotation, colour jitter, grey, blur, cutout, noise.

Batched, on the device of the images, for any number of channels, height and width. Every random number comes
from the generator g, so a view is a function of its images and the generator's key.
"""
import functools
import math
import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from device import in_float32


@dataclass
class Views:
    """How strongly `augment` changes an image; 0 (or crop 1, flip False) switches a part off."""
    crop: float = 0.3           # smallest share of the area that a random resized crop keeps
    flip: bool = True           # mirror left-right, half of the time
    rotate: float = 10.0        # degrees, either way
    jitter: float = 0.4         # brightness and contrast (and saturation, hue / 4 on colour), relative
    grey: float = 0.0           # share of images whose colours are taken out; draws nothing on one channel
    blur: float = 0.0           # share of images blurred
    cutout: float = 0.0         # side of the erased square, as a share of the image's
    noise: float = 0.0          # standard deviation of additive Gaussian noise, on the 0..1 scale


@in_float32                     # autocast would round where crops lie, and mix types in colours
def augment(x, views, g):
    """One random view of each image: x (B, C, H, W) float 0..1 -> the same shape, in 0..1."""
    x = warp(x, views.crop, views.flip, views.rotate, g)
    if views.jitter:
        x = color_jitter(x, views.jitter, g)
    if views.grey and x.shape[1] == 3:
        chosen = uniform(g, x, 0, 1).view(-1, 1, 1, 1) < views.grey
        x = torch.where(chosen, grey(x), x)
    if views.blur:
        x = blur(x, views.blur, g)
    if views.cutout:
        x = cutout(x, views.cutout, g)
    if views.noise:
        x = add_noise(x, views.noise, g)
    return x


def uniform(g, x, low, high):
    """(B, 1) uniform draws in [low, high) on the device of x."""
    return torch.rand(len(x), 1, device=x.device, generator=g) * (high - low) + low


def warp(x, crop, flip, rotate, g):
    """Random resized crop (area share crop..1, aspect 3/4..4/3), flip and rotation in one resampling."""
    if crop >= 1 and not flip and not rotate:
        return x
    H, W = x.shape[2:]
    area = uniform(g, x, crop, 1)
    ratio = uniform(g, x, math.log(3 / 4), math.log(4 / 3)).exp()
    if crop >= 1:
        ratio = torch.ones_like(ratio)
    sx = (area * ratio).sqrt().clamp(max=1)                    # half-extents of the window
    sy = (area / ratio).sqrt().clamp(max=1)
    tx = uniform(g, x, -1, 1) * (1 - sx)                       # its centre, such that it lies inside
    ty = uniform(g, x, -1, 1) * (1 - sy)
    if flip:
        sx = sx * (uniform(g, x, 0, 1) < 0.5).float().mul(2).sub(1)
    angle = uniform(g, x, -1, 1) * math.radians(rotate)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.cat([sx * cos, -sy * sin * H / W, tx, sx * sin * W / H, sy * cos, ty], 1)
    return resample(x, theta.view(-1, 2, 3))


def resample(x, theta):
    """x at the places to which the affine maps theta (B, 2, 3) take its grid; bilinear, 0 outside."""
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def fixed_views(x, crop, flip):
    """The views (B, C, H, W) over which a prediction is averaged (after Krizhevsky et al. 2012).

    Each image; if `flip`, its mirror image; if `crop`, its four corner crops of 96 % a side, with `flip` two
    of them mirrored.
    """
    yield x
    if flip:
        yield x.flip(3)
    if not crop:
        return
    for dx in -0.04, 0.04:
        for dy in -0.04, 0.04:
            mirror = -1 if flip and dx != dy else 1
            theta = x.new_tensor([[mirror * 0.96, 0, dx], [0, 0.96, dy]])
            yield resample(x, theta.expand(len(x), 2, 3))


def color_jitter(x, strength, g):
    """Brightness and contrast, on colour also saturation and hue, in an order drawn anew for each batch.

    Factors are 1 +- strength; hue turns the chroma plane of YIQ by up to strength / 4 of a circle, a linear
    stand-in for HSV's hue. On one channel saturation and hue mean nothing and are left out.
    """
    parts = [brightness, contrast]
    if x.shape[1] == 3:
        parts += [saturation, hue]
    random.Random(g.initial_seed()).shuffle(parts)             # on the CPU: no wait for the device
    for part in parts:
        x = part(x, strength, g).clamp_(0, 1)
    return x


def grey(x):
    """Luma (ITU-R 601) of (B, 3, H, W), or x itself on one channel -> (B, 1, H, W)."""
    if x.shape[1] == 1:
        return x
    luma = yiq_matrices(x.device)[0][0].view(3, 1, 1)
    return (x * luma).sum(1, keepdim=True)


@functools.cache
def yiq_matrices(device):
    """(from RGB to YIQ, back), made once: a copy to a GPU would wait for all that was asked of it."""
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    return yiq.to(device), torch.linalg.inv(yiq).to(device)


def factor(x, strength, g):
    """(B, 1, 1, 1) factors 1 +- strength, none below 0."""
    return uniform(g, x, max(0, 1 - strength), 1 + strength).view(-1, 1, 1, 1)


def brightness(x, strength, g):
    return x * factor(x, strength, g)


def contrast(x, strength, g):
    return torch.lerp(grey(x).mean((2, 3), keepdim=True), x, factor(x, strength, g))


def saturation(x, strength, g):
    return torch.lerp(grey(x), x, factor(x, strength, g))


def hue(x, strength, g):
    to_yiq, to_rgb = yiq_matrices(x.device)
    angle = uniform(g, x, -1, 1) * (strength / 4 * 2 * math.pi)
    cos, sin = angle.cos(), angle.sin()
    one, zero = torch.ones_like(angle), torch.zeros_like(angle)
    turn = torch.cat([one, zero, zero, zero, cos, -sin, zero, sin, cos], 1).view(-1, 3, 3)
    return (to_rgb @ turn @ to_yiq @ x.flatten(2)).view_as(x)


def blur(x, share, g):
    """Gaussian blur of a share of the images; taps scale with the image: 9 at 96 px, 3 at 28."""
    radius = max(1, min(x.shape[2:]) // 24)
    sigma = uniform(g, x, 0.1, 0.5 * radius + 0.1)
    chosen = uniform(g, x, 0, 1) < share
    sigma = torch.where(chosen, sigma, 1e-2)                   # 1e-2: identity
    taps = torch.arange(-radius, radius + 1, device=x.device)
    w = torch.softmax(-taps.square() / (2 * sigma.square()), dim=1)
    w = w.view(len(x), -1, 1, 1, 1)                            # (B, taps, 1, 1, 1)
    for dim, pad in (2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0)):
        padded = F.pad(x, pad, mode='reflect')
        x = sum(w[:, k] * padded.narrow(dim, k, x.shape[dim]) for k in range(len(taps)))
    return x


def cutout(x, size, g):
    """Erase a square whose side is `size` of the image's, at a random place (arXiv 1708.04552)."""
    B, _, H, W = x.shape

    def outside(n):
        centre = uniform(g, x, 0, n)
        return (torch.arange(n, device=x.device) + 0.5 - centre).abs() > size * n / 2       # (B, n)

    rows = outside(H).view(B, 1, H, 1)
    columns = outside(W).view(B, 1, 1, W)
    return x * (rows | columns)


def add_noise(x, std, g):
    """Additive Gaussian noise, clipped to 0..1."""
    noise = torch.randn(x.shape, device=x.device, generator=g)
    return (x + std * noise).clamp_(0, 1)
