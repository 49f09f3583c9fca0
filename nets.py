"""Networks: three encoders, two decoders, and the models that methods train.

Every encoder maps pictures (B, C, H, W) in 0..1 to features h (B, encoder.dim). Kept as a spatial map,
pooled by an average (contrastive learning) or flattened into a linear layer (autoencoders, which need to
know where things are).
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def layout(device):
    """Memory format in which convolutions are fast on a device; on MPS, where torch's gradients of BatchNorm in
    channels_last were wrong or failed (pytorch issue 175189), the plain one."""
    return torch.contiguous_format if device.type == 'mps' else torch.channels_last


def channels(base, width):
    """`base` channels scaled by `width`, in multiples of 8 as matrix units like them."""
    return max(8, round(base * width / 8) * 8)


class Conv(nn.Conv2d):
    """A convolution without bias whose weights learn faster in bfloat16 on a CPU where maps are narrow.

    There oneDNN's gradient of the weights is slow, and fast again once pictures are laid side by side: measured on maps
    of 4 x 4, 4.6 times as fast with the copies that this takes; of 14 x 14, slower.
    """

    def forward(self, x):
        narrow = math.ceil(x.shape[3] / self.stride[0]) < 12
        if narrow and x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            return NarrowConv.apply(x.bfloat16(), self.weight.bfloat16(), self.stride[0], self.padding[0])
        return super().forward(x)


class NarrowConv(torch.autograd.Function):
    """F.conv2d(x, weight, None, stride, padding) with the weights' gradient of side_by_side pictures."""

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.flags = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        (x, weight), (stride, padding) = ctx.saved_tensors, ctx.flags
        of_x = nn.grad.conv2d_input(x.shape, weight, grad, stride, padding) if ctx.needs_input_grad[0] else None
        width = math.ceil((x.shape[3] + padding) / stride)                 # of a gradient with its gap: zeros
        x, grad = side_by_side(x, width * stride), side_by_side(grad, width)
        return of_x, nn.grad.conv2d_weight(x, weight.shape, grad, stride, padding), None, None


def side_by_side(x, width, n=16):
    """Maps (B, C, H, W), `width` from the left edge of one to that of the next, zeros between them: n in a row,
    (ceil(B / n), C, H, n * width)."""
    B, C, H, W = x.shape
    x, full = x.permute(0, 2, 3, 1), B // n
    out = x.new_empty(-(-B // n), H, n, width, C)
    out[full:], out[:, :, :, W:] = 0, 0
    out[:full, :, :, :W] = x[:full * n].unflatten(0, (full, n)).transpose(1, 2)
    out[full:, :, :B - full * n, :W] = x[full * n:].transpose(0, 1)
    return out.flatten(2, 3).permute(0, 3, 1, 2)


def conv_bn(c_in, c_out, stride=1, kernel=3):
    return nn.Sequential(Conv(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """Basic residual block (arXiv 1512.03385): (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ...)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = conv_bn(c_in, c_out, stride)
        self.conv2 = conv_bn(c_out, c_out)
        same = stride == 1 and c_in == c_out
        self.skip = nn.Identity() if same else conv_bn(c_in, c_out, stride, kernel=1)

    def forward(self, x):
        return F.relu(self.conv2(F.relu(self.conv1(x))) + self.skip(x))


def resnet(C, H, W, width):
    """(net, out channels, out height, out width): residual stages for small pictures.

    3x3 stem of stride 2 and no max-pool; stages of 64, 128, 256 channels at 1/2, 1/4, 1/8 of the side,
    rounded up (28 -> 14, 7, 4); pictures of 64 px and more get one more stage of 512.
    """
    widths = [channels(c, width) for c in (64, 128, 256, 512)][:4 if min(H, W) >= 64 else 3]
    layers = [conv_bn(C, widths[0], 2), nn.ReLU()]
    for i, c in enumerate(widths):
        layers.append(Block(widths[max(i - 1, 0)], c, 1 if i == 0 else 2))
    return nn.Sequential(*layers), widths[-1], *(math.ceil(n / 2 ** len(widths)) for n in (H, W))


def convnet(C, H, W, width):
    """(net, out channels, height, width): four blocks of two 3x3 convolutions, 64-128-256-512, max-pooled."""
    layers = []
    for c in [channels(c, width) for c in (64, 128, 256, 512)]:
        layers += [conv_bn(C, c), nn.ReLU(), conv_bn(c, c), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        C, H, W = c, math.ceil(H / 2), math.ceil(W / 2)
    return nn.Sequential(*layers), C, H, W


class Encoder(nn.Module):
    """Pictures (B, C, H, W) in 0..1 -> features (B, dim).

    net: fc (C*H*W - 256 - dim), conv or resnet. dim None: the average-pooled map (fc: 64 units).
    """

    def __init__(self, net, shape, width=1.0, dim=None):
        super().__init__()
        C, H, W = shape
        if net == 'fc':
            hidden, self.dim = channels(256, width), dim or channels(64, width)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(C * H * W, hidden), nn.ReLU(),
                                        nn.Linear(hidden, self.dim))
            return
        body, c, h, w = {'conv': convnet, 'resnet': resnet}[net](C, H, W, width)
        self.dim = dim or c
        head = [nn.Flatten(), nn.Linear(c * h * w, dim)] if dim else [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.layers = nn.Sequential(body, *head)

    def forward(self, x):
        return self.layers(x.contiguous(memory_format=layout(x.device)))


class FCDecoder(nn.Module):
    """Latents (B, D) -> logits (B, C, H, W) through one hidden layer of 256."""

    def __init__(self, dim, shape, width=1.0):
        super().__init__()
        hidden = channels(256, width)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(),
                                    nn.Linear(hidden, math.prod(shape)), nn.Unflatten(1, shape))

    def forward(self, z):
        return self.layers(z)


class ConvDecoder(nn.Module):
    """Latents (B, D) -> logits (B, C, H, W), exactly H x W for any size.

    A linear layer makes a map at 1/4 of the side, residual blocks grow it to 1/2, and the last
    convolution writes each 2 x 2 of pixels at once (pixel shuffle), so no layer works at full size.
    """

    def __init__(self, dim, shape, width=1.0):
        super().__init__()
        C, self.H, self.W = shape
        h, w, c = math.ceil(self.H / 4), math.ceil(self.W / 4), channels(128, width)
        self.grow = nn.Sequential(
            nn.Linear(dim, c * h * w), nn.Unflatten(1, (c, h, w)), nn.BatchNorm2d(c), nn.ReLU(), Block(c, c),
            nn.Upsample(scale_factor=2), Block(c, c // 2), Block(c // 2, c // 2),
            nn.Conv2d(c // 2, 4 * C, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, z):
        return self.grow(z)[:, :, :self.H, :self.W]


# ---------------------------------------------------------------------------------------- models

class Autoencoder(nn.Module):
    """encode: x -> z (B, latent); decode: z -> recon in 0..1; forward: both."""

    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return torch.sigmoid(self.decoder(z).float())

    def forward(self, x):
        return self.decode(self.encode(x))


class VAE(Autoencoder):
    """Variational autoencoder (arXiv 1312.6114), encoder.dim 2 x latent: mu, logvar. encode gives mu, the feature used
    to judge it."""

    def posterior(self, x):
        """(mu, logvar), each (B, latent) float32."""
        mu, logvar = self.encoder(x).float().chunk(2, dim=1)
        return mu, logvar.clamp(-10, 10)                   # keeps exp(logvar) finite early on

    def encode(self, x):
        return self.posterior(x)[0]

    def forward(self, x, g=None):
        """(logits, mu, logvar) with z drawn from the posterior by generator g."""
        mu, logvar = self.posterior(x)
        return self.decoder(reparameterize(mu, logvar, g)), mu, logvar


def reparameterize(mu, logvar, g=None):
    """mu + sigma * eps, eps ~ N(0, 1): a sample through which gradients flow."""
    return mu + (0.5 * logvar).exp() * torch.randn(mu.shape, device=mu.device, generator=g)


class SimCLR(nn.Module):
    """Encoder and two-layer projection head (arXiv 2002.05709). encode gives h, before the head."""

    def __init__(self, encoder, dim=128):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(nn.Linear(encoder.dim, encoder.dim, bias=False), nn.BatchNorm1d(encoder.dim),
                                  nn.ReLU(), nn.Linear(encoder.dim, dim))

    def encode(self, x):
        return self.encoder(x)

    def forward(self, x):
        """Projection z (B, dim)."""
        return self.head(self.encoder(x))


class Mean(nn.Module):
    """The mean half of a variational encoder's output, as an encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder, self.dim = encoder, encoder.dim // 2

    def forward(self, x):
        return self.encoder(x)[:, :self.dim]


class Classifier(nn.Module):
    """Encoder and a linear or two-layer head: pictures -> logits (B, K).

    Frozen, the encoder gets no gradient and stays in eval mode, so that its BatchNorm buffers keep every bit.
    """

    def __init__(self, encoder, K, head='linear', frozen=False):
        super().__init__()
        self.encoder, self.frozen, D = encoder.requires_grad_(not frozen), frozen, encoder.dim
        hidden = [nn.Linear(D, D, bias=False), nn.BatchNorm1d(D), nn.ReLU()] if head == 'mlp' else []
        self.head = nn.Sequential(*hidden, nn.Linear(D, K))

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def encode(self, x):
        return self.encoder(x)

    def forward(self, x):
        return self.head(self.encoder(x))


class MeanTeacher(nn.Module):
    """A classifier and its teacher: the same network with the moving average of its weights (arXiv 1703.01780).

    The student learns; the teacher gets no gradient, never leaves eval mode, and answers for both.
    """

    def __init__(self, student):
        super().__init__()
        self.student, self.teacher = student, copy.deepcopy(student).requires_grad_(False)
        self.register_buffer('steps', torch.zeros(()))

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def follow(self, decay):
        """Move the teacher's weights and BatchNorm statistics towards the student's; the first steps go further,
        so that it doesn't dwell on the start: the decay rises as (1 + t) / (10 + t)."""
        rate = 1 - torch.clamp((1 + self.steps) / (10 + self.steps), max=decay)
        self.steps += 1
        mine, theirs = self.teacher.state_dict(), self.student.state_dict()
        for old, new in ((mine[k], theirs[k]) for k in mine):
            old.lerp_(new, rate) if old.is_floating_point() else old.copy_(new)

    def encode(self, x):
        return self.teacher.encode(x)

    def forward(self, x):
        return self.teacher(x)


def encoder_of(model):
    """What a classifier takes over from a pretrained model: the encoder up to the features it is judged by."""
    if isinstance(model, VAE):
        return Mean(model.encoder)
    return (model.teacher if isinstance(model, MeanTeacher) else model).encoder.requires_grad_(True)


def build(method, net, shape, width=1.0, latent=64):
    """The model that `method` trains, on pictures of `shape` (C, H, W)."""
    if method == 'ae':
        return Autoencoder(Encoder(net, shape, width, latent), FCDecoder(latent, shape, width))
    if method == 'conv':
        return Autoencoder(Encoder(net, shape, width, latent), ConvDecoder(latent, shape, width))
    if method == 'vae':
        return VAE(Encoder(net, shape, width, 2 * latent), ConvDecoder(latent, shape, width))
    return SimCLR(Encoder(net, shape, width))


def size(model):
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def samples(vae, latent, n, g):
    """n pictures decoded from the prior N(0, 1): (n, C, H, W) in 0..1."""
    return vae.decode(torch.randn(n, latent, device=g.device, generator=g))


def interpolation(vae, x1, x2, n):
    """n pictures decoded along the line between the codes of x1 and x2, each (1, C, H, W)."""
    t = torch.linspace(0, 1, n, device=x1.device).unsqueeze(1)
    return vae.decode(torch.lerp(vae.encode(x1), vae.encode(x2), t))
