"""The losses. Each is computed in float32, whatever precision the network ran in."""
import torch
import torch.nn.functional as F

from device import in_float32

CHUNK = 1 << 20                                     # similarities at once: 4 MiB stay in a cache


@in_float32
def mse(recon, x):
    """Mean squared error over pixels and batch; recon, x (B, C, H, W) in 0..1."""
    return F.mse_loss(recon, x)


def kl_normal(mu, logvar):
    """KL(N(mu, exp(logvar)) || N(0, 1)) in nats per latent unit: (B, D). arXiv 1312.6114, appendix B."""
    return 0.5 * (mu.square() + logvar.exp() - 1 - logvar)


@in_float32
def elbo(logits, x, mu, logvar, beta=1.0, likelihood='bernoulli'):
    """Evidence lower bound in nats, negated: (loss, reconstruction, KL), each a mean over the batch.

    Both terms are summed, over pixels and over latent units, so they stand on one scale (arXiv 1312.6114,
    eq. 10; beta: beta-VAE). bernoulli: cross-entropy of grey levels x in 0..1 taken as probabilities,
    logits (B, C, H, W). gaussian: the mean is sigmoid(logits) and the variance 1 / (2 pi), which makes
    the density's constant vanish: -log p = pi * squared error.
    """
    if likelihood == 'bernoulli':
        nll = F.binary_cross_entropy_with_logits(logits, x, reduction='none')
    elif likelihood == 'gaussian':
        nll = torch.pi * (torch.sigmoid(logits) - x).square()
    else:
        raise ValueError(f'likelihood {likelihood} is not known; wanted bernoulli or gaussian')
    recon = nll.flatten(1).sum(1).mean()
    kl = kl_normal(mu, logvar).sum(1).mean()
    return recon + beta * kl, recon, kl


@in_float32
def cross_entropy(logits, y, weight=None):
    """Mean over the batch of -log softmax(logits)[y], in nats, times weight (B,) if given.

    logits (B, K), y (B,) int64.
    """
    if weight is None:
        return F.cross_entropy(logits, y)
    return (F.cross_entropy(logits, y, reduction='none') * weight).mean()


class _NTXent(torch.autograd.Function):
    """NT-Xent of unit vectors z (2B, D): the mean over the rows `anchors` of -log softmax over k != i of
    z_i z_k / tau, at k = i +- B.

    The gradient is taken with the loss, some rows of similarities at a time, so that no (2B, 2B) is kept.
    """

    @staticmethod
    def forward(ctx, z, tau, anchors):
        N = len(z)
        total, grad = z.new_zeros(()), torch.zeros_like(z)
        scaled = z.T / tau
        chunk = CHUNK if z.device.type == 'cpu' else 16 * CHUNK
        for rows in anchors.split(max(1, chunk // N)):
            row = torch.arange(len(rows), device=z.device)
            positive = (rows + N // 2) % N
            logits = z[rows] @ scaled
            logits[row, rows] = float('-inf')
            log_p = logits.log_softmax(1)
            total -= log_p[row, positive].sum()
            if ctx.needs_input_grad[0]:                    # of the sum by the logits: p - [k is the positive]
                p = log_p.exp_()
                p[row, positive] -= 1
                grad[rows] += p @ z
                grad += p.T @ z[rows]                      # a row is also a column of the others
        ctx.save_for_backward(grad / (len(anchors) * tau))
        return total / len(anchors)

    @staticmethod
    def backward(ctx, above):
        return above * ctx.saved_tensors[0], None, None


@in_float32
def nt_xent(z1, z2, tau, own=None):
    """Normalised temperature-scaled cross-entropy (arXiv 2002.05709, eq. 1): a mean over the 2B anchors.

    z1, z2 (B, D): projections of two views of the same B images, normalised here. Only an anchor's similarity
    with itself is masked; the positive stays in the denominator. log(2B - 1) when all rows are equal,
    whatever tau. Losses at different tau can't be compared. own: ids (b,) of the images that are anchors,
    None for all; each process takes its own, and the mean over the processes is that over all.
    """
    if own is None:
        own = torch.arange(len(z1), device=z1.device)
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    return _NTXent.apply(z, tau, torch.cat([own, own + len(z1)]))


@in_float32
def scan(p, q, entropy):
    """SCAN's clustering loss (arXiv 2005.12320, eq. 2) in nats: -mean log <p, q> - entropy * H(mean p).

    p, q (..., B, K): cluster probabilities of images and of a neighbour of each -> (...). Least,
    -entropy * log K, when all are sure, neighbours agree and clusters are equally large.
    """
    agreement = (p * q).sum(-1).clamp(min=1e-8).log().mean(-1)
    mean = p.mean(-2)
    return -agreement + entropy * torch.special.xlogy(mean, mean).sum(-1)
