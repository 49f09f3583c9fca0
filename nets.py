"""Networks: three encoders, two decoders, and the models that the methods train.

Every encoder maps images (B, C, H, W) in 0..1 to features h (B, encoder.dim). The last map of a convolutional
one is averaged (contrastive learning) or flattened into a linear layer (autoencoders, which need to know
where things are).
"""
import copy
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def layout(device):
    """Memory format in which convolutions are fast on a device."""
    if device.type == 'mps':                      # BatchNorm had wrong gradients there (pytorch issue 175189)
        return torch.contiguous_format
    return torch.channels_last


def channels(base, width):
    """`base` channels times `width`, in multiples of 8 as matrix units like them."""
    return max(8, round(base * width / 8) * 8)


# ------------------------------------------------------------------------------------- convolutions

class Conv(nn.Conv2d):
    """A convolution without bias. In bfloat16 on a CPU, maps narrower than 12 go through NarrowConv."""

    def forward(self, x):
        narrow = math.ceil(x.shape[3] / self.stride[0]) < 12
        if narrow and x.device.type == 'cpu' and torch.is_autocast_enabled('cpu'):
            return NarrowConv.apply(x.bfloat16(), self.weight.bfloat16(), self.stride[0], self.padding[0])
        return super().forward(x)


class NarrowConv(torch.autograd.Function):
    """F.conv2d(x, weight, None, stride, padding) with a faster gradient of the weights.

    oneDNN is slow there on narrow maps, so it gets 16 images side by side: with AMX, a step of simclr is
    about 1.2 times as fast.
    """

    @staticmethod
    def forward(ctx, x, weight, stride, padding):
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        stride, padding = ctx.stride, ctx.padding
        grad_x = nn.grad.conv2d_input(x.shape, weight, grad, stride, padding)
        width = math.ceil((x.shape[3] + padding) / stride)     # leaves a gap of zeros for the padding
        x = side_by_side(x, width * stride)
        grad = side_by_side(grad, width)
        return grad_x, nn.grad.conv2d_weight(x, weight.shape, grad, stride, padding), None, None


def side_by_side(x, width, n=16):
    """Maps (B, C, H, W), each padded with zeros to `width`, n in a row: (ceil(B / n), C, H, n * width)."""
    B, C, H, W = x.shape
    x = torch.cat([x, x.new_zeros(-B % n, C, H, W)]) if B % n else x
    rows = x.permute(0, 2, 3, 1).unflatten(0, (-1, n)).transpose(1, 2)
    out = x.new_empty(len(rows), H, n, width, C)
    out[:, :, :, :W] = rows
    out[:, :, :, W:] = 0
    return out.flatten(2, 3).permute(0, 3, 1, 2)               # channels last


def conv_bn(c_in, c_out, stride=1, kernel=3):
    conv = Conv(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out))


class Block(nn.Module):
    """Basic residual block (arXiv 1512.03385): (B, c_in, H, W) -> (B, c_out, ceil(H / stride), ...)."""

    def __init__(self, c_in, c_out, stride=1):
        super().__init__()
        self.conv1 = conv_bn(c_in, c_out, stride)
        self.conv2 = conv_bn(c_out, c_out)
        same = stride == 1 and c_in == c_out
        self.skip = nn.Identity() if same else conv_bn(c_in, c_out, stride, kernel=1)

    def forward(self, x):
        h = F.relu(self.conv1(x))
        return F.relu(self.conv2(h) + self.skip(x))


# ----------------------------------------------------------------------------- encoders and decoders

def resnet(C, H, W, width):
    """(net, channels, height, width of its map): residual stages for small images.

    3x3 stem of stride 2 and no max-pool; stages of 64, 128, 256 channels at 1/2, 1/4, 1/8 of the side,
    rounded up (28 -> 14, 7, 4). Images of 64 px and more get one more stage of 512.
    """
    stages = 4 if min(H, W) >= 64 else 3
    c = channels(64, width)
    layers = [conv_bn(C, c, 2), nn.ReLU(), Block(c, c)]
    for i in range(1, stages):
        wider = channels(64 * 2 ** i, width)
        layers.append(Block(c, wider, 2))
        c = wider
    return nn.Sequential(*layers), c, math.ceil(H / 2 ** stages), math.ceil(W / 2 ** stages)


def convnet(C, H, W, width):
    """(net, channels, height, width of its map): four max-pooled pairs of 3x3 convolutions, 64 to 512."""
    layers = []
    for base in (64, 128, 256, 512):
        c = channels(base, width)
        layers += [conv_bn(C, c), nn.ReLU(), conv_bn(c, c), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
        C, H, W = c, math.ceil(H / 2), math.ceil(W / 2)
    return nn.Sequential(*layers), C, H, W


class Encoder(nn.Module):
    """Images (B, C, H, W) in 0..1 -> features (B, dim).

    net: fc (C*H*W - 256 - dim), conv or resnet. dim None: the average-pooled map (fc: 64 units). standardise:
    each feature gets mean 0 and variance 1 over the images, so that none outweighs the others in a cosine.
    """

    def __init__(self, net, shape, width=1.0, dim=None, standardise=False):
        super().__init__()
        if net == 'fc':
            hidden = channels(256, width)
            self.dim = dim or channels(64, width)
            self.layers = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), hidden), nn.ReLU(),
                                        nn.Linear(hidden, self.dim))
        else:
            body, c, h, w = {'conv': convnet, 'resnet': resnet}[net](*shape, width)
            self.dim = dim or c
            if dim:
                self.layers = nn.Sequential(body, nn.Flatten(), nn.Linear(c * h * w, dim))
            else:
                self.layers = nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if standardise:
            self.layers.append(nn.BatchNorm1d(self.dim, affine=False))

    def forward(self, x):
        return self.layers(x.contiguous(memory_format=layout(x.device)))


class Decoder(nn.Module):
    """Codes (B, dim) -> logits (B, C, H, W), exactly H x W for any size.

    fc: one hidden layer of 256. conv: a linear layer makes a map at 1/4 of the side, residual blocks grow it
    to 1/2, and the last convolution writes 2 x 2 pixels at once (pixel shuffle): no layer works at full size.
    """

    def __init__(self, net, dim, shape, width=1.0):
        super().__init__()
        C, self.H, self.W = shape
        if net == 'fc':
            hidden = channels(256, width)
            self.layers = nn.Sequential(
                nn.Linear(dim, hidden),
                nn.ReLU(),
                nn.Linear(hidden, math.prod(shape)),
                nn.Unflatten(1, shape))
            return
        h, w = math.ceil(self.H / 4), math.ceil(self.W / 4)
        c = channels(128, width)
        self.layers = nn.Sequential(
            nn.Linear(dim, c * h * w),
            nn.Unflatten(1, (c, h, w)),
            nn.BatchNorm2d(c),
            nn.ReLU(),
            Block(c, c),
            nn.Upsample(scale_factor=2),
            Block(c, c // 2),
            Block(c // 2, c // 2),
            nn.Conv2d(c // 2, 4 * C, 3, padding=1),
            nn.PixelShuffle(2))

    def forward(self, z):
        return self.layers(z)[:, :, :self.H, :self.W]


# ------------------------------------------------------------------------------------------- models

class Model(nn.Module):
    """encode: images x -> features (B, D); decode, with a decoder: features -> images in 0..1."""

    def __init__(self, encoder, decoder=None):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def encode(self, x):
        return self.encoder(x)

    def decode(self, z):
        return torch.sigmoid(self.decoder(z).float())


class Autoencoder(Model):
    """forward: images x -> their reconstructions in 0..1."""

    def forward(self, x):
        return self.decode(self.encode(x))


class VAE(Model):
    """Variational autoencoder (arXiv 1312.6114). The encoder gives mu and logvar side by side; encode, mu."""

    def posterior(self, x):
        """(mu, logvar), each (B, D) float32."""
        mu, logvar = self.encoder(x).float().chunk(2, dim=1)
        return mu, logvar.clamp(-10, 10)                       # keeps exp(logvar) finite early on

    def encode(self, x):
        return self.posterior(x)[0]

    def forward(self, x, g=None):
        """(logits, mu, logvar), the code z = mu + sigma eps drawn from the posterior by generator g."""
        mu, logvar = self.posterior(x)
        eps = torch.randn(mu.shape, device=mu.device, generator=g)
        return self.decoder(mu + (0.5 * logvar).exp() * eps), mu, logvar


class SimCLR(Model):
    """Encoder and two-layer projection head (arXiv 2002.05709). encode gives h, before the head."""

    def __init__(self, encoder, decoder=None, dim=128):
        super().__init__(encoder, decoder)
        D = encoder.dim
        self.head = nn.Sequential(nn.Linear(D, D, bias=False), nn.BatchNorm1d(D), nn.ReLU(),
                                  nn.Linear(D, dim))

    def forward(self, x):
        """Projection z (B, dim)."""
        return self.head(self.encoder(x))


class Classifier(Model):
    """Encoder and a linear head: images -> logits (B, K).

    A frozen encoder gets no gradient and stays in eval mode, so that its BatchNorm buffers keep every bit.
    """

    def __init__(self, encoder, K, frozen=False):
        super().__init__(encoder.requires_grad_(not frozen))
        self.frozen = frozen
        self.head = nn.Linear(encoder.dim, K)

    def train(self, mode=True):
        super().train(mode)
        self.encoder.train(mode and not self.frozen)
        return self

    def forward(self, x):
        return self.head(self.encoder(x))


class MeanTeacher(nn.Module):
    """A classifier and its teacher, which has the moving average of its weights (arXiv 1703.01780).

    The student learns. The teacher gets no gradient, never leaves eval mode, and predicts for both.
    """

    def __init__(self, student):
        super().__init__()
        self.student = student
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.register_buffer('steps', torch.zeros(()))

    def train(self, mode=True):
        super().train(mode)
        self.teacher.eval()
        return self

    @torch.no_grad()
    def follow(self, decay):
        """Move the teacher's weights and BatchNorm statistics towards the student's.

        The decay rises as (1 + t) / (10 + t), so that the teacher soon forgets the start.
        """
        rate = 1 - torch.clamp((1 + self.steps) / (10 + self.steps), max=decay)
        self.steps += 1
        student = self.student.state_dict()
        for name, old in self.teacher.state_dict().items():
            if old.is_floating_point():                        # all but BatchNorm's count of steps
                old.lerp_(student[name], rate)

    def encode(self, x):
        return self.teacher.encode(x)

    def forward(self, x):
        return self.teacher(x)


class NeighbourVote(Model):
    """Classifies by the known images that are nearest in an encoder's features; nothing is trained.

    features (N, D) of the known images, centred and normalised; probs (N, K): their class probabilities.
    forward: images -> log (B, K) of the mean probabilities of the k nearest by cosine.
    """

    def __init__(self, encoder, features, probs, k=10):
        super().__init__(encoder)
        self.k = k
        self.register_buffer('mean', torch.zeros_like(features[0]))
        self.register_buffer('features', features)
        self.register_buffer('probs', probs)

    def remember(self, h, probs):
        """Let other images vote, as many as before: h (N, D) as the encoder gives them, probs (N, K)."""
        self.mean.copy_(h.mean(0))
        self.features.copy_(F.normalize(h - self.mean, dim=1))
        self.probs.copy_(probs)

    def encode(self, x):
        return F.normalize(self.encoder(x).float() - self.mean, dim=1)

    def forward(self, x):
        h = self.encode(x)
        with torch.autocast(h.device.type, enabled=False):      # similarities need float32
            nearest = (h @ self.features.T).topk(self.k).indices
        return self.probs[nearest].mean(1).clamp(min=1e-12).log()


class Pixels(Model):
    """The pixels as features."""

    def __init__(self):
        super().__init__(nn.Flatten())


class PCA(nn.Module):
    """The first k principal components of images of `shape`: encode to (B, k), decode back into 0..1."""

    def __init__(self, shape, k):
        super().__init__()
        self.shape = shape
        pixels = math.prod(shape)
        self.register_buffer('mean', torch.zeros(pixels))
        self.register_buffer('components', torch.zeros(pixels, k))

    def fit(self, x):
        """Exact components of pixels x (N, C * H * W), the largest first."""
        pixels, k = self.components.shape
        self.mean.copy_(x.mean(0))
        x = (x - self.mean).cpu()                              # few devices have these decompositions
        if k <= len(x) < pixels:                               # fewer images than pixels: no square matrix
            vectors = torch.linalg.svd(x, full_matrices=False).Vh.T
        else:
            vectors = torch.linalg.eigh(x.T @ x / len(x)).eigenvectors.flip(1)
        self.components.copy_(vectors[:, :k])

    def encode(self, x):
        return (x.flatten(1) - self.mean) @ self.components

    def decode(self, z):
        return (z @ self.components.T + self.mean).clamp(0, 1).unflatten(1, self.shape)


class Mean(nn.Module):
    """The mean half of a variational encoder's output, as an encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder
        self.dim = encoder.dim // 2

    def forward(self, x):
        return self.encoder(x)[:, :self.dim]


def encoder_of(model):
    """What a classifier takes over from a trained model: the encoder up to the features it is judged by."""
    if isinstance(model, VAE):
        return Mean(model.encoder)
    if isinstance(model, MeanTeacher):
        model = model.teacher
    return model.encoder.requires_grad_(True)


def can_decode(model):
    return isinstance(model, PCA) or model.decoder is not None


def build(method, net, shape, width=1.0, latent=None, recon=False):
    """The network of a method that learns without labels, for images of `shape` (C, H, W).

    latent: size of the code; 0 or None, for simclr and random: the last map, averaged. recon: simclr gets a
    decoder.
    """
    if method == 'pixels':
        return Pixels()
    if method == 'pca':
        return PCA(shape, latent)
    if method == 'vae':
        return VAE(Encoder(net, shape, width, 2 * latent), Decoder('conv', latent, shape, width))
    if method == 'ae':
        return Autoencoder(Encoder(net, shape, width, latent), Decoder('fc', latent, shape, width))
    if method == 'conv':
        return Autoencoder(Encoder(net, shape, width, latent), Decoder('conv', latent, shape, width))
    encoder = Encoder(net, shape, width, latent, standardise=bool(latent))
    return SimCLR(encoder, Decoder('conv', encoder.dim, shape, width) if recon else None)


def size(model):
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def samples(vae, latent, n, g):
    """n images decoded from the prior N(0, 1): (n, C, H, W) in 0..1."""
    return vae.decode(torch.randn(n, latent, device=g.device, generator=g))


def interpolation(vae, x1, x2, n):
    """n images decoded along the line between the codes of x1 and x2, each (1, C, H, W)."""
    t = torch.linspace(0, 1, n, device=x1.device).unsqueeze(1)
    return vae.decode(torch.lerp(vae.encode(x1), vae.encode(x2), t))
