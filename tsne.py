"""Features in two dimensions by exact t-SNE (van der Maaten & Hinton, JMLR 2008), for a few thousand points.

x (N, D) float -> y (N, 2), one step at a time in matrices of N x N. Nothing is drawn at random.
"""
import math

import torch

import evaluate
from runs import progress


def conditional(x, perplexity):
    """(N, N), row i: equation 1's p(j given i), a Gaussian around x_i whose width, found by bisection, gives the
    row the perplexity (e to its entropy in nats). The diagonal is 0."""
    square = x.square().sum(1)
    d = torch.addmm(square, x, x.T, alpha=-2).add_(square.unsqueeze(1)).clamp_(min=0)
    d /= d.mean().clamp(min=1e-30)
    d.fill_diagonal_(torch.inf)
    d = (d - d.amin(1, keepdim=True)).fill_diagonal_(1e30)                  # the nearest has exp(0), itself none
    low, high = x.new_full((len(x), 1), -20.0), x.new_full((len(x), 1), 50.0)         # log of 1 / (2 sigma^2)
    for _ in range(30):
        middle = (low + high) / 2
        p = (-middle.exp() * d).exp_()
        total = p.sum(1, keepdim=True)
        entropy = total.log() + middle.exp() * (p * d).sum(1, keepdim=True) / total
        low = torch.where(entropy > math.log(perplexity), middle, low)
        high = torch.where(entropy > math.log(perplexity), high, middle)
    return p / total


def joint(x, perplexity):
    """P (N, N), symmetric, with sum 1: the mean of both conditionals, over N (section 3.1)."""
    p = conditional(x, perplexity)
    return (p + p.T) / (2 * len(x))


def near(y):
    """(N, N): Student's t, 1 / (1 + |y_i - y_j|^2), 0 on the diagonal; over its sum it is Q of equation 4."""
    square, one = y.square().sum(1, keepdim=True), torch.ones_like(y[:, :1])
    d = torch.cat([-2 * y, square + 1, one], 1) @ torch.cat([y, one, square], 1).T
    return d.clamp_(min=1).reciprocal_().fill_diagonal_(0)


def kl(P, y):
    """KL(P || Q) in nats, equation 2."""
    q = near(y)
    return torch.xlogy(P, P / (q / q.sum()).clamp(min=1e-30)).sum().item()


def gradient(P, y):
    """Of the KL by y, (N, 2): 4 sum_j (p_ij - q_ij)(y_i - y_j) / (1 + |y_i - y_j|^2), equation 5."""
    q = near(y)
    pull = torch.sub(P, q, alpha=1 / q.sum().item()).mul_(q)
    return 4 * (pull.sum(1, keepdim=True) * y - pull @ y)


def tsne(x, perplexity=30.0, steps=500):
    """(y (N, 2), KL) by gradient descent from the first two principal components, with gains (Jacobs 1988); in the
    first quarter P is exaggerated 12 times and momentum 0.5, then 0.8. The perplexity is (N - 1) / 3 at most."""
    P = joint(x.float(), min(perplexity, (len(x) - 1) / 3))
    y = evaluate.principal(x.float())
    y = 1e-4 * y / y[:, 0].std().clamp(min=1e-30)
    speed, gains, lr = torch.zeros_like(y), torch.ones_like(y), max(50.0, len(x) / 48)
    at = progress('t-SNE', steps)
    for step in range(steps):
        early = step < steps // 4
        slope = gradient(12 * P if early else P, y)
        gains = torch.where(slope * speed < 0, gains + 0.2, gains * 0.8).clamp_(min=0.01)
        speed = (0.5 if early else 0.8) * speed - lr * gains * slope
        y = y + speed
        y = y - y.mean(0)
        at(step + 1)
    return y, kl(P, y)
