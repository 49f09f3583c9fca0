"""Files to tensors: IDX, .npz, STL-10, CIFAR-10 in, uint8 pictures (N, C, H, W) out; batches; augmentation.

A data set lives whole on the device as bytes if it fits there; else it is read batch by batch, to the same
bits. A batch is a slice of a permutation that is a function of (seed, epoch), and every random draw is keyed
by (seed, epoch, step): a run stopped anywhere and resumed sees exactly what it would have seen.
"""
import gzip
import hashlib
import itertools
import math
import os
import random
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import fetch
import formats
from losses import in_float32

IDX_TYPES = {0x08: '>u1', 0x09: '>i1', 0x0B: '>i2', 0x0C: '>i4', 0x0D: '>f4', 0x0E: '>f8'}
DEBIAN = Path('/usr/share/datasets/fashion-mnist')      # where Debian's dataset-fashion-mnist installs
IDX_NAMES = {'x_train': 'train-images-idx3-ubyte', 'y_train': 'train-labels-idx1-ubyte',
             'x_test': 't10k-images-idx3-ubyte', 'y_test': 't10k-labels-idx1-ubyte'}
FASHION_CLASSES = ['T-shirt', 'trouser', 'pullover', 'dress', 'coat',
                   'sandal', 'shirt', 'sneaker', 'bag', 'ankle boot']
MAX_BYTES = 64 << 30                                    # a header that asks for more is a broken header
HELD = None                                             # bytes of pictures the device may hold; None: half of its free


# ---------------------------------------------------------------------------------------------- IDX

def read_idx(path):
    """Array stored in an IDX file, gzipped or not (told by its content, not its name).

    Returns a writable array in native byte order. ValueError, one sentence, when the file is empty,
    truncated, too long, not IDX, or broken gzip; never reads more than its header announces.
    """
    path = Path(path)
    with open(path, 'rb') as raw:
        f = gzip.open(raw) if raw.peek(2)[:2] == b'\x1f\x8b' else raw
        try:
            head = f.read(4)
            if not head:
                raise ValueError(f'{path} is empty; wanted an IDX file')
            if len(head) < 4 or head[:2] != b'\0\0' or head[2] not in IDX_TYPES:
                raise ValueError(f'{path} starts with 0x{head.hex()}; wanted an IDX file, '
                                 '0x0000 then a type from 0x08 to 0x0e')
            sizes = f.read(4 * head[3])
            if len(sizes) < 4 * head[3]:
                raise ValueError(f'{path} ends inside its header of {head[3]} dimensions')
            shape = tuple(np.frombuffer(sizes, '>u4').tolist())
            if len(shape) > 32:
                raise ValueError(f'{path} announces {len(shape)} dimensions; wanted 32 at most')
            dtype = np.dtype(IDX_TYPES[head[2]])
            wanted = math.prod(shape) * dtype.itemsize
            if wanted > most_bytes():
                raise ValueError(f'{path} announces {wanted:,} bytes for shape {shape}, more than memory has; is it '
                                 'damaged?')
            if f is raw:
                body = bytearray(min(wanted + 1, os.fstat(raw.fileno()).st_size))
                del body[f.readinto(body):]
            else:
                body = _read_at_most(f, wanted + 1)
        except (EOFError, zlib.error, gzip.BadGzipFile) as e:
            raise ValueError(f'{path} is broken gzip ({e}); fetch it again') from None
    if len(body) != wanted:
        found = 'more' if len(body) > wanted else f'only {len(body):,}'
        raise ValueError(f'{path} holds {found} bytes of data; wanted {wanted:,} for shape {shape}')
    try:
        return np.frombuffer(body, dtype).reshape(shape).astype(dtype.newbyteorder('='), copy=False)
    except ValueError:                                  # no values, but sizes too large for any array
        raise ValueError(f'{path} announces shape {shape}, which no array can have') from None


def _read_at_most(f, size, chunk=1 << 24):
    """Up to `size` bytes, grown as they arrive: a false header can't ask for memory the file lacks."""
    body = bytearray()
    while len(body) < size and (part := f.read(min(chunk, size - len(body)))):
        body += part
    return body


def write_idx(path, array):
    """Write an array of any IDX type as an IDX file, gzipped if the name ends in .gz."""
    array = np.asarray(array)
    code = {np.dtype(t).newbyteorder('='): c for c, t in IDX_TYPES.items()}.get(array.dtype.newbyteorder('='))
    if code is None:
        raise ValueError(f'IDX has no type for {array.dtype}; use uint8, int8, int16, int32, float32 or float64')
    blob = (bytes([0, 0, code, array.ndim]) + np.array(array.shape, '>u4').tobytes()
            + array.astype(IDX_TYPES[code]).tobytes())
    Path(path).write_bytes(gzip.compress(blob) if str(path).endswith('.gz') else blob)


# --------------------------------------------------------------------------------------- data sets

@dataclass
class Dataset:
    """Pictures (N, C, H, W) uint8 and labels (N,) int64 on the CPU; what a data set lacks is None.

    The pictures may be memory-mapped: x[ids] and x[a:b] are tensors, x itself may be a formats.Mapped.
    """
    name: str
    x_train: torch.Tensor | formats.Mapped
    y_train: torch.Tensor | None                       # -1 where a picture has no label
    x_test: torch.Tensor | formats.Mapped | None
    y_test: torch.Tensor | None
    classes: list
    folds: list = field(default_factory=list)          # predefined subsets of the training pictures, as ids

    @property
    def shape(self):
        return tuple(self.x_train.shape[1:])

    @cached_property
    def digest(self):
        """SHA-256 of all pictures; labels don't count."""
        sha = hashlib.sha256()
        for t in (self.x_train, self.x_test):
            sha.update(b'none' if t is None else str(tuple(t.shape)).encode())
            for start in range(0, 0 if t is None else len(t), 1000):           # never all of a memory map at once
                sha.update(t[start:start + 1000].numpy())
        return sha.hexdigest()

    @property
    def key(self):
        """What a labels.LabelDatabase of it has to fit: its digest, how many pictures, how many classes."""
        return self.digest, len(self.x_train), len(self.classes)

    def labelled(self, ids=None):
        """Those of the ids, by default all, of training pictures that have a label."""
        ids = torch.arange(len(self.x_train)) if ids is None else ids
        return ids[self.y_train[ids] >= 0] if self.y_train is not None else ids[:0]


def load(source=None, limit=None, dataset=None):
    """Data set in `source`: an .npz or a folder of IDX files or of STL-10's or CIFAR-10's. None: the one named
    `dataset`, by default Fashion-MNIST, wherever it is.

    limit keeps only the first so many training pictures; those with labels come first.
    """
    dataset = dataset or 'fashion-mnist'
    name = dataset if source is None else Path(source).stem
    classes = FASHION_CLASSES if source is None and dataset == 'fashion-mnist' else None
    source = Path(find(dataset) if source is None else source)
    if source.is_dir():
        arrays = _read_folder(source)
    elif source.is_file():
        arrays = _read_npz(source)
    else:
        raise ValueError(f'--data {source} does not exist; wanted a folder of IDX or binary files or an .npz file')
    for key in ('x_train', 'y_train'):
        if key in arrays and arrays[key].ndim:
            mapped = isinstance(arrays[key], formats.Mapped)
            arrays[key] = arrays[key].first(limit) if mapped else arrays[key][:limit]
    return _dataset(name, arrays, classes)


def find(dataset):
    """Folder that holds the files of fashion-mnist, stl10 or cifar10: one in data/, else they are downloaded."""
    if dataset == 'fashion-mnist':
        return find_fashion_mnist()
    archive = fetch.ARCHIVES[dataset]
    for folder in (Path('data') / dataset, Path('data') / archive.folder):
        if all((folder / name).is_file() for name in archive.files):
            return folder
    fetch.unpacked(archive, f'data/{dataset}')
    return Path('data') / dataset


def named(ds, names):
    """The data set with its classes named a,b,c; ValueError if its labels need another number of them."""
    names, K = names.split(','), len(ds.classes)
    if len(names) < K or (ds.y_train is not None and len(names) != K):
        raise ValueError(f'--classes names {len(names)} classes, and the labels of the data have {K}')
    return replace(ds, classes=names)


def find_fashion_mnist():
    """Folder that holds the four files: data/fashion-mnist, data, or Debian's; else downloaded."""
    for folder in (Path('data/fashion-mnist'), Path('data'), DEBIAN):
        if all(_idx_file(folder, name) for name in IDX_NAMES.values()):
            return folder
    fetch.fashion_mnist('data/fashion-mnist')
    return Path('data/fashion-mnist')


def _idx_file(folder, name):
    """Path of `name` or `name`.gz in `folder`, or None."""
    return next((p for p in (folder / name, folder / f'{name}.gz') if p.is_file()), None)


def _read_folder(folder):
    if (arrays := formats.read(folder)) is not None:
        return arrays
    files = {key: _idx_file(folder, name) for key, name in IDX_NAMES.items()}
    if files['x_train'] is None:
        raise ValueError(f'{folder} has no {IDX_NAMES["x_train"]} or {IDX_NAMES["x_train"]}.gz, and no binary files '
                         'of STL-10 or CIFAR-10')
    return {key: read_idx(path) for key, path in files.items() if path}


def read_pictures(path):
    """Pictures (N, C, H, W) uint8 of one file: an .npz with x, x_train or x_test, the first of them that there is, or
    an IDX file. ValueError, one sentence, if it holds anything else."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f'{path} is no file; wanted an .npz with x, x_train or x_test, or an IDX file')
    with open(path, 'rb') as f:
        zipped = f.read(2) == b'PK'
    return _pictures(str(path), next(iter(_read_npz(path, ('x', 'x_train', 'x_test')).values())) if zipped
                     else read_idx(path), 1)


def _read_npz(path, keys=tuple(IDX_NAMES)):
    """Arrays of an .npz, of the keys that it has; pickles inside are refused, and so is more than memory holds."""
    try:
        with zipfile.ZipFile(path) as z:
            if (size := sum(i.file_size for i in z.infolist())) > most_bytes():
                raise ValueError(f'it unpacks to {size:,} bytes, more than memory has')
        with np.load(path, allow_pickle=False) as z:
            arrays = {key: z[key] for key in keys if key in z.files}
            found = ', '.join(z.files) or 'nothing'
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, MemoryError, KeyError, ValueError,
            NotImplementedError, RuntimeError, SyntaxError, OverflowError) as e:
        raise ValueError(f'{path} is not a readable .npz of plain arrays ({" ".join(str(e).split())})') from None
    if not all(isinstance(a, np.ndarray) for a in arrays.values()):
        raise ValueError(f'{path} is not a readable .npz: a member is no array')
    if not arrays or ('x' not in keys and 'x_train' not in arrays):
        raise ValueError(f'{path} holds {found}; wanted ' + ('x, x_train or x_test' if 'x' in keys else
                                                             'x_train and, optionally, y_train, x_test, y_test'))
    return arrays


def _dataset(name, arrays, classes=None):
    x_train = _pictures(f'{name}: x_train', arrays['x_train'], 20)
    y_train = _labels(f'{name}: y_train', arrays.get('y_train'), len(x_train))
    x_test = y_test = None
    if 'x_test' in arrays:
        x_test = _pictures(f'{name}: x_test', arrays['x_test'], 1)
        y_test = _labels(f'{name}: y_test', arrays.get('y_test'), len(x_test))
        if x_test.shape[1:] != x_train.shape[1:]:
            raise ValueError(f'{name}: test pictures are {tuple(x_test.shape[1:])}, '
                             f'training pictures {tuple(x_train.shape[1:])}; wanted the same shape')
    classes = classes or arrays.get('classes')
    if classes is None:
        top = max([int(y.max()) + 1 for y in (y_train, y_test) if y is not None], default=0)
        classes = [str(k) for k in range(top)]
    folds = [ids[ids < len(x_train)] for ids in arrays.get('folds', ())]
    return Dataset(name, x_train, y_train, x_test, y_test, classes, folds)


def _pictures(what, x, least):
    """(N, H, W) or (N, H, W, C) uint8 -> (N, C, H, W) uint8 tensor, or a ValueError that says why not."""
    wanted = 'wanted uint8 of shape (N, H, W) or (N, H, W, C), C 1 or 3, H and W at least 8'
    mapped = isinstance(x, formats.Mapped)               # formats has looked at its own
    if not mapped and x.dtype != np.uint8:
        raise ValueError(f'{what} is {x.dtype}; {wanted}')
    if x.ndim == 3:
        x = x[..., None]
    if not mapped and (x.ndim != 4 or x.shape[3] not in (1, 3) or min(x.shape[1:3]) < 8):
        raise ValueError(f'{what} has shape {x.shape}; {wanted}')
    if len(x) < least:
        raise ValueError(f'{what} holds {len(x)} pictures; wanted at least {least}')
    return x if mapped else torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _labels(what, y, n):
    if y is None or isinstance(y, torch.Tensor):         # formats has looked at its own
        return y
    if y.shape != (n,) or y.dtype.kind not in 'iu':
        raise ValueError(f'{what} is {y.dtype} of shape {y.shape}; wanted integers of shape ({n},)')
    if y.min() < 0 or y.max() > 9999:
        raise ValueError(f'{what} runs from {y.min()} to {y.max()}; wanted classes from 0 to 9999')
    return torch.from_numpy(y.astype(np.int64))


def split(n, n_val, seed):
    """(train ids, validation ids): `n_val` of `n`, a tenth at most, picked by the seed; sorted int64 on the CPU."""
    n_val = max(1, min(n_val, n // 10))
    order = torch.randperm(n, generator=generator('cpu', seed, 'split'))
    return order[n_val:].sort().values, order[:n_val].sort().values


# ---------------------------------------------------------------------------------------- batches

def generator(device, *key):
    """Generator on `device` whose state is a function of the key alone, for instance (seed, epoch, step)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], 'little') >> 1)


def batches(n, batch_size, seed, epoch, start=0, device='cpu'):
    """Yield (step, ids) of one shuffled pass over n pictures, from step `start` on; ids on the device."""
    order = torch.randperm(n, generator=generator(device, seed, epoch, 'order'), device=device)
    steps = steps_per_epoch(n, batch_size)
    for step in range(start, steps):
        yield step, order[n * step // steps:n * (step + 1) // steps]


def steps_per_epoch(n, batch_size):
    """Batches of one pass; their sizes differ by at most one, and none is 1, which BatchNorm can't take."""
    return max(1, min(math.ceil(n / batch_size), n // 2))


class Pictures:
    """Rows `ids` (None: all) of pictures x on the CPU, for training on the device: whole there if they fit, else read
    from x batch by batch, the next one while the last one is in use. Either way the batches are the same."""

    def __init__(self, x, device, ids=None):
        self.x, self.ids, self.device, self.whole = x, torch.arange(len(x)) if ids is None else ids, device, None
        self.shape = (len(self.ids), *x.shape[1:])
        if math.prod(self.shape) <= (free_memory(device) // 2 if HELD is None else HELD):
            self.whole = torch.empty(self.shape, dtype=torch.uint8, device=device)
            for to, part in zip(self.whole.split(1000), self.ids.split(1000)):
                to.copy_(x[part])

    def __len__(self):
        return self.shape[0]

    def read(self, steps):
        """For each (step, ids on the device) of an iterable: (step, ids, those pictures on the device)."""
        if self.whole is not None:
            yield from ((step, ids, self.whole[ids]) for step, ids in steps)
            return
        steps = [(step, ids, self.ids[ids.cpu()]) for step, ids in steps]
        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(self._gather, where) for _, _, where in steps[:1]]
            for (step, ids, _), after in zip(steps, [*steps[1:], None]):
                rows = coming.pop().result()
                if after:
                    coming.append(reader.submit(self._gather, after[2]))
                yield step, ids, rows.to(self.device, non_blocking=self.device.type == 'cuda')

    def at(self, ids):
        """Pictures `ids` (on the device, counted as in `read`) on the device."""
        return self.whole[ids] if self.whole is not None else self._gather(self.ids[ids.cpu()]).to(self.device)

    def _gather(self, where):
        rows = self.x[where]
        return rows.pin_memory() if self.device.type == 'cuda' else rows


def most_bytes():
    """What a file may unpack to: MAX_BYTES, less where Linux tells that less is free."""
    known = Path('/proc/meminfo').exists()
    return min(MAX_BYTES, free_memory(torch.device('cpu'))) if known else MAX_BYTES


def free_memory(device, limit='/sys/fs/cgroup/memory.max'):
    """Free bytes of a CUDA card, else those of the RAM, where Linux tells them, and no more than a container's limit
    (cgroup v2); elsewhere a modest guess."""
    if device.type == 'cuda':
        return torch.cuda.mem_get_info(device.index)[0]          # of the current card without one
    try:
        with open('/proc/meminfo') as f:
            free = next(int(line.split()[1]) << 10 for line in f if line.startswith('MemAvailable:'))
    except (OSError, StopIteration):
        return 8 << 30
    try:
        return min(free, int(Path(limit).read_text()))
    except (OSError, ValueError):                                # no cgroup, or 'max': no limit
        return free


def to_float(x):
    """uint8 0..255 -> float32 0..1."""
    return x.float().div_(255)


# ----------------------------------------------------------------------------------- augmentation

@dataclass
class Views:
    """How strongly `augment` changes a picture; 0 (or crop 1, flip False) switches a part off."""
    crop: float = 0.3           # smallest share of the area that a random resized crop keeps
    flip: bool = True           # mirror left-right, half of the time
    rotate: float = 10.0        # degrees, either way
    jitter: float = 0.4         # brightness and contrast (and saturation, hue / 4 on colour), relative
    grey: float = 0.0           # share of pictures whose colours are taken out; draws nothing on one channel
    blur: float = 0.0           # share of pictures blurred
    cutout: float = 0.0         # side of the erased square, as a share of the picture's
    noise: float = 0.0          # standard deviation of additive Gaussian noise, on the 0..1 scale


@in_float32                                           # autocast would round where crops lie, and mix types in colours
def augment(x, views, g=None):
    """One random view of each picture: x (B, C, H, W) float 0..1 -> the same shape, in 0..1.

    Batched on the device of x for any C, H, W; all draws come from the generator g.
    """
    x = warp(x, views.crop, views.flip, views.rotate, g)
    if views.jitter:
        x = color_jitter(x, views.jitter, g)
    if views.grey and x.shape[1] == 3:
        x = torch.where(uniform(g, x, 0, 1).view(-1, 1, 1, 1) < views.grey, grey(x), x)
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


def warp(x, crop, flip, rotate, g=None):
    """Random resized crop (area share crop..1, aspect 3/4..4/3), flip and rotation in one resampling."""
    if crop >= 1 and not flip and not rotate:
        return x
    H, W = x.shape[2:]
    area, ratio = uniform(g, x, crop, 1), uniform(g, x, math.log(3 / 4), math.log(4 / 3)).exp()
    if crop >= 1:
        ratio = torch.ones_like(ratio)
    sx, sy = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)   # half-extents of the window
    tx, ty = uniform(g, x, -1, 1) * (1 - sx), uniform(g, x, -1, 1) * (1 - sy)         # its centre, inside
    if flip:
        sx = sx * (uniform(g, x, 0, 1) < 0.5).float().mul(2).sub(1)
    angle = uniform(g, x, -1, 1) * math.radians(rotate)
    cos, sin = angle.cos(), angle.sin()
    theta = torch.cat([sx * cos, -sy * sin * H / W, tx, sx * sin * W / H, sy * cos, ty], 1).view(-1, 2, 3)
    grid = F.affine_grid(theta, x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def fixed_views(x, crop, flip):
    """The views (B, C, H, W) over which a prediction is averaged: each picture; if `flip`, its mirror image; if `crop`,
    its four corner crops of 96 % a side, with `flip` two of them mirrored (after Krizhevsky et al. 2012)."""
    yield x
    if flip:
        yield x.flip(3)
    side = 0.96
    for dx, dy in itertools.product((side - 1, 1 - side), repeat=2) if crop else ():
        theta = x.new_tensor([[-side if flip and dx != dy else side, 0, dx], [0, side, dy]])
        grid = F.affine_grid(theta.expand(len(x), 2, 3), x.shape, align_corners=False)
        yield F.grid_sample(x, grid, align_corners=False)


def color_jitter(x, strength, g=None):
    """Brightness and contrast, on colour also saturation and hue, in an order drawn anew for each batch.

    Factors are 1 +- strength; hue turns the chroma plane of YIQ by up to strength / 4 of a circle,
    a linear stand-in for HSV's hue. On one channel saturation and hue mean nothing and are left out.
    """
    parts = [_brightness, _contrast] + ([_saturation, _hue] if x.shape[1] == 3 else [])
    random.Random(g.initial_seed() if g is not None else 0).shuffle(parts)   # no device sync
    for part in parts:
        x = part(x, strength, g).clamp_(0, 1)
    return x


def grey(x):
    """Luma (ITU-R 601) of (B, 3, H, W), or x itself on one channel -> (B, 1, H, W)."""
    return x if x.shape[1] == 1 else (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)


def _factor(x, strength, g):
    return uniform(g, x, max(0, 1 - strength), 1 + strength).view(-1, 1, 1, 1)


def _brightness(x, strength, g):
    return x * _factor(x, strength, g)


def _contrast(x, strength, g):
    return torch.lerp(grey(x).mean((2, 3), keepdim=True), x, _factor(x, strength, g))


def _saturation(x, strength, g):
    return torch.lerp(grey(x), x, _factor(x, strength, g))


def _hue(x, strength, g):
    yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    to_yiq, to_rgb = yiq.to(x.device), torch.linalg.inv(yiq).to(x.device)      # inverted on the CPU: no sync
    angle = uniform(g, x, -1, 1).view(-1) * (strength / 4 * 2 * math.pi)
    turn = torch.zeros(len(x), 3, 3, device=x.device)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 1, 2], turn[:, 2, 1] = -angle.sin(), angle.sin()
    return (to_rgb @ turn @ to_yiq @ x.flatten(2)).view_as(x)


def blur(x, share, g=None):
    """Gaussian blur of a share of the pictures; taps scale with the picture: 9 at 96 px, 3 at 28."""
    radius = max(1, min(x.shape[2:]) // 24)
    sigma = uniform(g, x, 0.1, 0.5 * radius + 0.1)
    sigma = torch.where(uniform(g, x, 0, 1) < share, sigma, torch.full_like(sigma, 1e-2))   # 1e-2: identity
    taps = torch.arange(-radius, radius + 1, device=x.device)
    w = torch.softmax(-taps.square() / (2 * sigma.square()), dim=1)                         # (B, taps)
    for dim in (2, 3):
        pad = F.pad(x, (0, 0, radius, radius) if dim == 2 else (radius, radius, 0, 0), mode='reflect')
        x = sum(w[:, k].view(-1, 1, 1, 1) * pad.narrow(dim, k, x.shape[dim]) for k in range(len(taps)))
    return x


def cutout(x, size, g=None):
    """Erase a square whose side is `size` of the picture's, at a random place (arXiv 1708.04552)."""
    B, _, H, W = x.shape
    def outside(n):
        centre = uniform(g, x, 0, n)
        return (torch.arange(n, device=x.device) + 0.5 - centre).abs() > size * n / 2       # (B, n)
    return x * (outside(H).view(B, 1, H, 1) | outside(W).view(B, 1, 1, W))


def add_noise(x, std, g=None):
    """Additive Gaussian noise, clipped to 0..1."""
    return (x + std * torch.randn(x.shape, device=x.device, generator=g)).clamp_(0, 1)
