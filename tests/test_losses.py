"""Tests of losses.py."""
from helpers import close, rand, randn
import itertools
import math
from unittest import mock

import numpy as np
import torch

import losses


def nt_xent_by_loops(z1, z2, tau):
    """Equation 1 of arXiv 2002.05709, one term after another, in float64."""
    z = [v / v.norm() for v in torch.cat([z1, z2]).double()]
    n, total = len(z), 0
    for i in range(n):
        j = (i + n // 2) % n
        others = sum((z[i] @ z[k] / tau).exp() for k in range(n) if k != i)
        total = total - ((z[i] @ z[j] / tau).exp() / others).log()
    return total / n


def test_nt_xent_is_equation_1_written_out():
    for B, tau, chunk in itertools.product((1, 2, 5), (0.1, 2.0), (1 << 20, 30, 1)):
        z1, z2 = randn(B, 7, seed=B).requires_grad_(), randn(B, 7, seed=9).requires_grad_()
        with mock.patch.object(losses, 'CHUNK', chunk):
            loss, wanted = losses.nt_xent(z1, z2, tau), nt_xent_by_loops(z1, z2, tau)
        assert close(loss, wanted)
        for a, b in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(wanted, (z1, z2))):
            assert close(a, b, 1e-4)
        shares = [losses.nt_xent(z1, z2, tau, torch.tensor([i])) for i in range(B)]     # one anchor each
        assert close(sum(shares) / B, wanted)


def test_nt_xent_of_equal_rows_is_chance_and_small_tau_does_not_overflow():
    z = torch.ones(100, 3) * 7
    assert close(losses.nt_xent(z, z, 0.01), math.log(199), 1e-4)
    z1, z2 = (torch.eye(4) * 1e3).requires_grad_(), -torch.eye(4) * 1e3
    loss = losses.nt_xent(z1, z2, 0.01)                       # positives opposed: 1 / tau + log 6, nearly
    loss.backward()
    assert close(loss, 100 + math.log(6), 1e-4) and z1.grad.isfinite().all()


def test_losses_are_float32_inside_bfloat16_autocast():
    x, logits, mu, logvar = rand(3, 1, 4, 5), randn(3, 1, 4, 5), randn(3, 6, seed=1), randn(3, 6, seed=2)
    for loss, *args in (
            (losses.mse, logits, x),
            (lambda *v: losses.nt_xent(*v, 0.1), mu, logvar),
            (lambda v: losses.cross_entropy(v, torch.tensor([0, 5, 2])), mu),
            (lambda *v: losses.scan(*v, 2.0), mu.softmax(1), logvar.softmax(1)),
            (lambda *v: losses.elbo(*v)[0], logits, x, mu, logvar)):
        half = [v.bfloat16() for v in args]
        with torch.autocast('cpu', dtype=torch.bfloat16):
            mixed, rounded = loss(*args), loss(*half)
        assert mixed.dtype == rounded.dtype == torch.float32 and torch.equal(mixed, loss(*args))
        assert torch.equal(rounded, loss(*(v.float() for v in half)))


def test_mse_and_cross_entropy_are_means_of_every_term():
    a, b = rand(2, 3, 4, 5), rand(2, 3, 4, 5, seed=1)
    assert close(losses.mse(a, b), np.square(a.numpy() - b.numpy()).mean())
    logits, y, weight = randn(6, 4), torch.arange(6) % 4, rand(6)
    terms = [-(row[k].exp() / row.exp().sum()).log() for row, k in zip(logits.double(), y)]
    assert close(losses.cross_entropy(logits, y), sum(terms) / 6)
    assert close(losses.cross_entropy(logits, y, weight), sum(w * t for w, t in zip(weight, terms)) / 6)


def test_elbo_agrees_with_torch_distributions():
    from torch.distributions import Bernoulli, Normal, kl_divergence
    x, logits, mu, logvar = rand(3, 2, 4, 5), randn(3, 2, 4, 5), randn(3, 6, seed=1), randn(3, 6, seed=2)
    leaves = [v.requires_grad_() for v in (logits, mu, logvar)]
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1))
    likelihoods = {'bernoulli': Bernoulli(logits=logits, validate_args=False),
                   'gaussian': Normal(logits.sigmoid(), (1 / (2 * torch.pi)) ** 0.5)}
    for (name, p), beta in itertools.product(likelihoods.items(), (0.0, 1.0, 4.0)):
        parts = -p.log_prob(x).sum() / 3, kl.sum() / 3        # sums, but a mean over the batch
        wanted = parts[0] + beta * parts[1]
        loss, *found = losses.elbo(logits, x, mu, logvar, beta, likelihood=name)
        assert close(loss, wanted) and all(map(close, found, parts))
        slopes = [torch.autograd.grad(v, leaves, retain_graph=True) for v in (loss, wanted)]
        assert all(close(a, b, 1e-4) for a, b in zip(*slopes))


def test_the_scan_loss_is_equation_2():
    p, q = randn(2, 12, 3).softmax(2), randn(2, 12, 3, seed=1).softmax(2)
    for head in range(2):
        agreement = sum(math.log(p[head, i] @ q[head, i]) for i in range(12)) / 12
        sizes = [sum(p[head, i, k] for i in range(12)) / 12 for k in range(3)]
        entropy = -sum(m * math.log(m) for m in sizes)
        assert close(losses.scan(p, q, 5.0)[head], -agreement - 5 * entropy, 1e-4)
