"""Tests of nets.py."""
from helpers import UNLABELLED, close, rand, randn
import copy
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
    assert nets.resnet(1, 28, 28, 1.0)[1:] == (256, 4, 4) and nets.resnet(3, 96, 96, 0.1)[1:] == (48, 6, 6)
    assert 4.6e6 < nets.size(nets.Encoder('conv', (3, 96, 96))) < 4.8e6


def test_fc_autoencoder_is_784_256_64_256_784():
    model = nets.build('ae', 'fc', (1, 28, 28), latent=64)
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(256, 784), (64, 256), (256, 64), (784, 256)]


def test_width_scales_every_network():
    assert [nets.channels(64, w) for w in (0.01, 0.5, 1, 2)] == [8, 32, 64, 128]
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
    laid = nets.side_by_side(x[:19], 4)                       # each where it belongs, zeros between
    assert laid.shape == (2, 2, 3, 64) and torch.equal(laid[1, :, :, 8:11], x[18])
    assert not laid[:, :, :, 3::4].any() and not laid[1, :, :, 12:].any()


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
    mu, logvar = model.posterior(x)
    assert torch.equal(model.encode(x), mu) and torch.equal(mu, model.encoder(x)[:, :5])
    assert torch.equal(logvar, model.encoder(x)[:, 5:].clamp(-10, 10))
    assert torch.equal(nets.encoder_of(model)(x), mu) and nets.encoder_of(model).dim == 5
    logits, *_ = model(x, generator('cpu', 0))
    eps = torch.randn(4, 5, generator=generator('cpu', 0))
    assert torch.equal(logits, model.decoder(mu + (logvar / 2).exp() * eps))
    line = nets.interpolation(model, x[:1], x[1:2], 5)
    wanted = [model.decode(mu[:1] * (1 - t) + mu[1:2] * t)[0] for t in (0, 0.25, 0.5, 0.75, 1)]
    assert close(line, torch.stack(wanted))
    drawn = nets.samples(model, 5, 6, generator('cpu', 0))
    assert torch.equal(drawn, model.decode(torch.randn(6, 5, generator=generator('cpu', 0))))


def test_a_frozen_encoder_keeps_every_bit_and_gets_no_gradient():
    for frozen in (True, False):
        model = nets.Classifier(nets.Encoder('resnet', (1, 8, 8), 0.1), 3, frozen).train()
        before = copy.deepcopy(model.encoder.state_dict())
        model(rand(4, 1, 8, 8)).sum().backward()
        after = model.encoder.state_dict()
        assert all(torch.equal(before[k], after[k]) for k in before) == frozen
        assert all(p.grad is None for p in model.encoder.parameters()) == frozen


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
    model = nets.NeighbourVote(encoder, torch.zeros(20, 6), torch.zeros(20, 3), k=4)
    model.remember(h, probs)
    copied = nets.NeighbourVote(encoder, torch.zeros(20, 6), torch.zeros(20, 3), k=4)
    copied.load_state_dict(model.state_dict())                # a checkpoint holds all of it
    found = copied(x)
    centred = (encoder(x).detach() - h.mean(0)).numpy(), (h - h.mean(0)).numpy()
    for i in range(300):
        a, b = centred[0][i], centred[1]
        cosine = b @ a / np.linalg.norm(a) / np.linalg.norm(b, axis=1)
        assert close(found[i].exp(), probs[np.argsort(-cosine)[:4].copy()].mean(0), 1e-4)
    assert close(copied.encode(x).norm(dim=1), np.ones(300))


def test_pca_agrees_with_the_singular_value_decomposition():
    noise = randn(50, 306)
    few = noise[:, :6] @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5])) / 40 + 0.5
    many = torch.cat([few, noise[:, 6:] / 400 + 0.5], 1)      # pixels, more than images
    for x, k in (few, 3), (few, 6), (many[:20], 5), (many[:4], 5):
        X = x.double().numpy()
        vt = np.linalg.svd(X - X.mean(0))[2][:k]
        pca, image = nets.PCA((1, 2, x.shape[1] // 2), k), x.view(len(x), 1, 2, -1)
        pca.fit(x)
        known = min(k, len(x) - 1)                            # further ones explain nothing
        assert close(pca.encode(image)[:, :known].abs(), abs((X - X.mean(0)) @ vt[:known].T), 1e-3)
        wanted = ((X - X.mean(0)) @ vt.T @ vt + X.mean(0)).clip(0, 1)
        assert nets.can_decode(pca) and close(pca.decode(pca.encode(image)).flatten(1), wanted, 1e-4)
