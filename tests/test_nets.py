"""Tests of nets.py."""
from helpers import UNLABELLED, close, rand, randn
import itertools
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F

import losses
import nets
from device import autocast, generator

SIZES = [(8, 8), (9, 13), (33, 19)]
NETS = ('fc', 'conv', 'resnet')


def test_every_model_gives_back_exactly_its_height_and_width():
    for (H, W), method, net in itertools.product(SIZES, UNLABELLED, NETS):
        model, x = nets.build(method, net, (3, H, W), 0.1, 5, recon=True), rand(2, 3, H, W)
        recon = model.decode(model.encode(x))
        assert nets.can_decode(model) and model.encode(x).shape == (2, 5) and recon.shape == x.shape
        assert 0 <= recon.min() and recon.max() <= 1


def test_simclr_averages_its_map_and_decodes_nothing_unless_asked():
    for latent in (None, 0):
        model = nets.build('simclr', 'resnet', (1, 8, 8), 0.1, latent).eval()
        body, x = model.encoder.layers[0], rand(2, 1, 8, 8)
        assert close(model.encode(x), body(x).mean((2, 3))) and not nets.can_decode(model)
        assert torch.equal(model(x), model.head(model.encode(x)))


def test_encoders_have_the_dimension_they_state_and_the_maps_they_compute():
    for (H, W), net, dim in itertools.product([*SIZES, (64, 65)], NETS, (None, 7)):
        encoder = nets.Encoder(net, (1, H, W), 0.1, dim)      # dim: a linear layer on the map stated
        assert encoder(rand(2, 1, H, W)).shape == (2, encoder.dim) and encoder.dim == (dim or encoder.dim)
        h = nets.Encoder(net, (1, H, W), 0.1, 7, standardise=True)(rand(9, 1, H, W))
        assert close(h.mean(0), np.zeros(7), 1e-4) and (h.std(0) > 0.5).all()
    assert nets.resnet(1, 28, 28, 1.0)[1:] == (256, 4, 4) and nets.resnet(3, 96, 96, 0.1)[1:] == (48, 6, 6)


def test_networks_have_the_size_that_is_told_of_them_and_width_scales_each():
    model = nets.build('ae', 'fc', (1, 28, 28), latent=64)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(256, 784), (64, 256), (256, 64), (784, 256)]
    assert 4.6e6 < nets.size(nets.Encoder('conv', (3, 96, 96))) < 4.8e6
    for net in NETS:
        small, large = (nets.size(nets.build('conv', net, (1, 8, 8), width, 8)) for width in (0.25, 1.0))
        assert large > 3 * small


def test_narrow_maps_side_by_side_give_the_gradients_of_a_plain_convolution():
    torch.manual_seed(0)
    for B, h, w, kernel, stride in ((1, 4, 4, 3, 1), (16, 7, 7, 3, 2), (37, 6, 5, 3, 2), (20, 5, 9, 1, 2),
                                    (33, 3, 3, 5, 1)):
        x = torch.randn(B, 2, h, w, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(4, 2, kernel, kernel, dtype=torch.float64, requires_grad=True)
        plain = F.conv2d(x, weight, None, stride, kernel // 2)
        grad = torch.randn_like(plain)
        ours = nets.NarrowConv.apply(x, weight, stride, kernel // 2)
        assert torch.equal(ours, plain)
        torch.testing.assert_close(torch.autograd.grad(ours, (x, weight), grad),
                                   torch.autograd.grad(plain, (x, weight), grad))


def test_a_network_in_bfloat16_learns_what_plain_convolutions_would():
    x, grads = rand(24, 1, 28, 28), []
    for narrow in (True, False):
        model = nets.build('simclr', 'resnet', (1, 28, 28), 0.25)
        for part in model.modules():
            if isinstance(part, nets.Conv) and not narrow:
                part.__class__ = torch.nn.Conv2d
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, 0, 0.1) if p.ndim > 1 else torch.nn.init.ones_(p)
        laid = mock.Mock(wraps=nets.side_by_side)
        with autocast(x.device, True), mock.patch.object(nets, 'side_by_side', laid):
            losses.nt_xent(*model(x).chunk(2), 0.2).backward()
        assert laid.call_count == 12 * narrow                 # six of nine convolutions, twice each
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert F.cosine_similarity(*grads, dim=0) > 0.999


def test_vae_codes_are_means_and_images_come_from_the_prior():
    model, x = nets.build('vae', 'fc', (1, 8, 9), 0.1, 5).eval(), rand(4, 1, 8, 9)
    mu, logvar = model.encoder(x).chunk(2, dim=1)
    assert torch.equal(model.encode(x), mu) and torch.equal(nets.encoder_of(model)(x), mu)
    eps = torch.randn(4, 5, generator=generator('cpu', 0))
    decoded = model.decoder(mu + (logvar.clamp(-10, 10) / 2).exp() * eps)
    assert torch.equal(model(x, generator('cpu', 0))[0], decoded)
    line = nets.interpolation(model, x[:1], x[1:2], 5)
    wanted = [model.decode(mu[:1] * (1 - t) + mu[1:2] * t)[0] for t in (0, 0.25, 0.5, 0.75, 1)]
    assert close(line, torch.stack(wanted))
    drawn = nets.samples(model, 5, 6, generator('cpu', 0))
    assert torch.equal(drawn, model.decode(torch.randn(6, 5, generator=generator('cpu', 0))))


def test_the_teacher_is_the_moving_average_of_the_student():
    model = nets.MeanTeacher(nets.Classifier(nets.Encoder('resnet', (1, 8, 8), 0.1), 3)).train()
    assert model.student.training and not model.teacher.training
    wanted = model.teacher.head.weight.clone()
    for t in range(30):
        with torch.no_grad():
            model.student.head.weight.add_(randn(*wanted.shape, seed=t))
        model.follow(0.7)
        d = min(0.7, (1 + t) / (10 + t))
        wanted = d * wanted + (1 - d) * model.student.head.weight
    assert close(model.teacher.head.weight, wanted)
    assert not any(p.requires_grad for p in model.teacher.parameters())
    assert all(p.requires_grad for p in nets.encoder_of(model).parameters())


def test_a_new_image_gets_the_mean_of_its_neighbours_probabilities():
    encoder, x = nets.Encoder('fc', (1, 4, 4), 0.1, 6), rand(300, 1, 4, 4)
    h, probs = encoder(x[:20]).detach(), rand(20, 3, seed=1).softmax(1)
    empty = torch.zeros(20, 6), torch.zeros(20, 3)
    model, copied = (nets.NeighbourVote(encoder, *empty, k=4) for _ in range(2))
    model.remember(h, probs)
    copied.load_state_dict(model.state_dict())                # a checkpoint holds all of it
    a, b = encoder(x).detach() - h.mean(0), h - h.mean(0)
    nearest = F.cosine_similarity(a[:, None], b, dim=2).argsort(descending=True)[:, :4]
    assert close(copied(x).exp(), probs[nearest].mean(1), 1e-4)
    assert close(copied.encode(x).norm(dim=1), np.ones(300))


def test_pca_agrees_with_the_singular_value_decomposition():
    noise = randn(50, 306)
    few = noise[:, :6] @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5])) / 40 + 0.5
    many = torch.cat([few, noise[:, 6:] / 400 + 0.5], 1)      # pixels, more than images
    for x, k in (few, 3), (few, 6), (many[:20], 5), (many[:4], 5):
        X, mean = x.double().numpy(), x.double().numpy().mean(0)
        vt = np.linalg.svd(X - mean)[2][:k]
        pca, image = nets.PCA((1, 2, x.shape[1] // 2), k), x.view(len(x), 1, 2, -1)
        pca.fit(x)
        known = min(k, len(x) - 1)                            # further ones explain nothing
        assert close(pca.encode(image)[:, :known].abs(), abs((X - mean) @ vt[:known].T), 1e-3)
        wanted = ((X - mean) @ vt.T @ vt + mean).clip(0, 1)
        assert nets.can_decode(pca) and close(pca.decode(pca.encode(image)).flatten(1), wanted, 1e-4)
