"""Files to tensors: image files, .npz, IDX, STL-10 and CIFAR-10 in, uint8 images (N, C, H, W) out; batches.

A data set lives whole on the device as bytes if it fits there; else it is read batch by batch, to the same
bits. A batch is a slice of a permutation that is a function of (seed, epoch): a run stopped anywhere and
resumed sees exactly what it would have seen. Whatever reading a user's file raises becomes one sentence in
`naming`.
"""
import contextlib
import glob
import gzip
import hashlib
import math
import os
import statistics
import sys
import unicodedata
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

import distributed
import download
from device import free_memory, generator, progress

KNOWN = 'fashion-mnist', 'stl10', 'cifar10'             # data sets that are downloaded
SHARED = Path('/usr/share/datasets')                    # where Debian's dataset-fashion-mnist installs
IDX_MAGIC = b'\0\0\x08'                                # of an IDX file of uint8
IDX_NAMES = {'x_train': 'train-images-idx3-ubyte', 'y_train': 'train-labels-idx1-ubyte',
             'x_test': 't10k-images-idx3-ubyte', 'y_test': 't10k-labels-idx1-ubyte'}
NPZ_NAMES = {'train_images': 'x_train', 'train_labels': 'y_train',      # as in MedMNIST
             'test_images': 'x_test', 'test_labels': 'y_test'}
FASHION_CLASSES = 'T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot'.split(',')
SUFFIXES = tuple('.jpg .jpeg .png .bmp .gif .webp .tif .tiff .ppm .pgm .heic .avif'.split())
CACHE = Path('runs/.cache')                             # decoded image files; may be removed at any time
MAX_RESIDENT_BYTES = None                               # of images on the device; None: half of what is free


@contextlib.contextmanager
def naming(path):
    """Turn whatever the block raises into a ValueError of one sentence that names the file or folder."""
    try:
        yield
    except Exception as e:
        text = str(e) if isinstance(e, (OSError, ValueError)) else repr(e)
        if isinstance(e, OSError) and e.strerror:
            text = f'{e.filename or path}: {e.strerror}'        # without its number
        text = ' '.join(text.split())
        raise ValueError(text if str(path) in text else f'{path}: {text}') from e


def note(text):
    """Say how something was read; on stderr, as stdout may be a table, and by one process."""
    if distributed.rank() == 0:
        print(text, file=sys.stderr, flush=True)


def check_memory(size):
    """ValueError if so many bytes are not free."""
    free = free_memory(torch.device('cpu'))
    if size > free:
        raise ValueError(f'asks for {size:,} bytes, and memory has {free:,} free')


# ------------------------------------------------------------------------------------------ data sets

@dataclass
class Dataset:
    """Images (N, C, H, W) uint8 and labels (N,) int64 on the CPU; what a data set lacks is None.

    A label is 0..K-1, whatever ids the file has, and -1 where an image has none; ids[label] is the file's.
    x may be a MappedImages: x[ids] and x[a:b] are tensors.
    """
    name: str
    x_train: object
    y_train: torch.Tensor | None
    x_test: object
    y_test: torch.Tensor | None
    classes: list                       # K names
    ids: list                           # K ids, the user's own
    names_train: list | None = None     # file names of the images
    names_test: list | None = None

    @property
    def shape(self):
        return tuple(self.x_train.shape[1:])

    @cached_property
    def digest(self):
        """SHA-256 of all images; labels don't count."""
        sha = hashlib.sha256()
        for x in self.x_train, self.x_test:
            if x is None:
                sha.update(b'none')
                continue
            sha.update(str(tuple(x.shape)).encode())
            for start in range(0, len(x), 1000):            # never all of a memory map at once
                sha.update(x[start:start + 1000].numpy())
        return sha.hexdigest()

    def row_names(self):
        """('file', their names) or ('id', 0, 1, ...) of the training images, for tables that name them."""
        return ('file', self.names_train) if self.names_train else ('id', range(len(self.x_train)))

    def labelled(self, ids=None):
        """Those of the ids, by default all, of training images that have a label."""
        ids = torch.arange(len(self.x_train)) if ids is None else ids
        return ids[:0] if self.y_train is None else ids[self.y_train[ids] >= 0]


def load(source='fashion-mnist', limit=None, classes=None, size=None):
    """Dataset of a name in KNOWN, an .npz, or a folder of image, IDX, STL-10 or CIFAR-10 files.

    limit: only so many training images, of image files some of each class, else the first. classes: their
    names, in the order of their ids; in a folder of images the folders have these names. size: side of the
    images that are made of image files. ValueError, one sentence, for what can't be read; OSError where a
    download fails.
    """
    known = source in KNOWN
    path = find(source) if known else Path(source)
    with naming(path):
        if not (path.is_dir() or zipfile.is_zipfile(path)):
            raise ValueError(f'{path} is missing or no .npz; wanted {", ".join(KNOWN)}, an .npz file, or a '
                             'folder of image, IDX, STL-10 or CIFAR-10 files')
        arrays = read_folder(path, limit, size, classes) if path.is_dir() else read_npz(path)
        if size and 'names_train' not in arrays:
            raise ValueError(f'{path} holds no image files, so --size can not be chosen')
        if source == 'fashion-mnist':
            arrays['classes'] = FASHION_CLASSES
        return make_dataset(source if known else path.absolute().stem, arrays, limit, classes)


def find(name):
    """Folder that holds the files of a data set in KNOWN: data/<name>, if need be after a download."""
    archive = download.ARCHIVES.get(name)
    files = archive.files if archive else IDX_NAMES.values()
    folder = Path('data') / name
    for there in folder, SHARED / name:
        if all(existing_file(there, file) for file in files):
            return there
    if archive:
        download.unpacked(archive, folder)
    else:
        download.fashion_mnist(folder)
    return folder


def read_folder(folder, limit, size, classes):
    """{field of Dataset: array or list} of a folder, by what lies in it."""
    if any(folder.glob('*_X.bin')):
        return read_stl10(folder)
    if any(folder.glob('*_batch*.bin')):
        return read_cifar10(folder)
    files = {key: existing_file(folder, name) for key, name in IDX_NAMES.items()}
    if files['x_train']:
        return {key: read_idx(path) for key, path in files.items() if path}
    return read_image_folder(folder, limit, size, classes)


def make_dataset(name, arrays, limit=None, classes=None):
    """Dataset of {field: array or list}, checked."""
    if 'x_train' not in arrays:
        raise ValueError('wanted x_train and, optionally, y_train, x_test, y_test')
    x_train = to_images('x_train', arrays['x_train'], 20)
    y_train = to_labels('y_train', arrays.get('y_train'), len(x_train))
    x_test = y_test = None
    if 'x_test' in arrays:
        x_test = to_images('x_test', arrays['x_test'])
        y_test = to_labels('y_test', arrays.get('y_test'), len(x_test), least=0)
        if x_test.shape[1:] != x_train.shape[1:]:
            raise ValueError('x_test holds images of another shape than x_train')
    ids, classes = name_classes([y_train, y_test], classes or arrays.get('classes'))
    if limit:
        x_train = x_train[:limit]

    def dense(y, n):
        if y is None or y[:n].max() < 0:
            return None
        return torch.from_numpy(np.where(y < 0, -1, np.searchsorted(ids, y)))[:n]

    return Dataset(name, x_train, dense(y_train, limit), x_test, dense(y_test, None), classes, ids,
                   arrays.get('names_train'), arrays.get('names_test'))


def normal(name):
    """A name in NFC without spaces around it: names that look the same are the same."""
    return unicodedata.normalize('NFC', name.strip())


def clean(names):
    """Names of classes as they are compared; ValueError if one is empty or there twice."""
    names = [normal(name) for name in names]
    if '' in names or len(set(names)) < len(names):
        raise ValueError(f'{",".join(names)} names a class twice or leaves a name empty')
    return names


def name_classes(labels, names=None):
    """(ids in the arrays of labels, their names); with more names than ids they are those of 0, 1, 2, ..."""
    ids = sorted({i for y in labels if y is not None for i in np.unique(y).tolist() if i >= 0})
    if not names:
        return ids, [str(i) for i in ids]
    names = clean(names)
    if len(names) > len(ids) and max(ids, default=0) < len(names):
        ids = list(range(len(names)))
    if len(names) != len(ids):
        raise ValueError(f'{len(names)} classes are named, and the labels have {len(ids)}')
    return ids, names


def to_images(what, x, least=1):
    """Array of images -> (N, C, H, W) uint8 tensor; a ValueError tells the line of Python that mends it.

    x: uint8 or float 0..1, (N, H, W), (N, H, W, C) or (N, C, H, W), N at least `least`. A MappedImages stays.
    """
    if len(x) < least:
        raise ValueError(f'{what} holds {len(x)} images; wanted at least {least}')
    if isinstance(x, MappedImages):
        return x
    if x.ndim == 3:
        x = x[:, None]
    elif x.ndim == 4 and x.shape[3] in (1, 3):
        x = x.transpose(0, 3, 1, 2)
    elif x.ndim == 4:
        note(f'{what}: read as (N, C, H, W)')
    if x.dtype.kind == 'f' and x.min() >= 0 and x.max() <= 1:
        note(f'{what}: read as floats from 0 to 1')
        x = np.rint(x * 255).astype(np.uint8)
    if x.dtype != np.uint8 or x.ndim != 4 or x.shape[1] not in (1, 3) or min(x.shape[2:]) < 8:
        raise ValueError(f'{what} is {x.dtype} of shape {x.shape}; wanted uint8 of shape (N, H, W) or '
                         '(N, H, W, 3), H and W at least 8, such as x = x.reshape(N, H, W, C)[..., :3] and '
                         'x = ((x - black) / (white - black) * 255).round().astype("uint8")')
    return torch.from_numpy(np.ascontiguousarray(x))


def to_labels(what, y, n, least=-1):
    """Array of n class ids, -1 for none -> (n,) int64 array, None if all are -1; else as to_images."""
    if y is None:
        return None
    if y.shape == (n, 1):
        note(f'{what}: read as (N,)')
        y = y[:, 0]
    if y.shape != (n,) or y.dtype.kind not in 'iub':
        raise ValueError(f'{what} is {y.dtype} of shape {y.shape}; wanted integers of shape ({n},), such as '
                         'y = y.astype(int), of names numpy.unique(y, return_inverse=True)[1], of one-hot '
                         'rows y.argmax(axis=1)')
    if y.max() == -1:
        return None
    if y.min() < least:
        raise ValueError(f'{what} holds {y.min()}; wanted ids of at least {least}: keep = y >= {least}, '
                         'x = x[keep], y = y[keep]')
    return y.astype(np.int64)


def read_images(path, size=None, channels=None):
    """New images: (x (N, C, H, W) uint8, their file names or None). ValueError, one sentence.

    path: an .npz with x, x_train or x_test (the first of them that there is), an IDX file, an image file or a
    folder of them, of which square images of side `size` with so many channels are made.
    """
    path = Path(path)
    with naming(path):
        if path.is_dir() or path.suffix.lower() in SUFFIXES:
            folder, names = (path, list_images(path)) if path.is_dir() else (path.parent, [path.name])
            x, names = read_files(folder, names, size, channels)
            return to_images('x', x), names
        arrays = read_npz(path) if zipfile.is_zipfile(path) else {'x': read_idx(path)}
        for key in 'x', 'x_train', 'x_test':
            if key in arrays:
                return to_images(key, arrays[key]), None
        raise ValueError('wanted x, x_train or x_test')


# ---------------------------------------------------------------------------------------- array files

def read_npz(path):
    """{name: array} of what an .npz has of a data set; pickles in it don't run."""
    with np.load(path, allow_pickle=False) as z:
        check_memory(sum(member.file_size for member in z.zip.infolist()))
        found = [key for key in z.files if key in NPZ_NAMES or key in ('x', *IDX_NAMES)]
        if found != z.files:
            note(f'{path}: read {found} of {z.files}')
        return {NPZ_NAMES.get(key, key): z[key] for key in found}


def read_idx(path):
    """Array of uint8 stored in an IDX file, gzipped if its name ends in .gz.

    ValueError, one sentence, for whatever is wrong; reads no more than its header announces, nor than memory
    has.
    """
    with naming(path), opener(path)(path, 'rb') as f:
        head = f.read(4)
        if head[:3] != IDX_MAGIC:
            raise ValueError(f'starts with 0x{head.hex()}; wanted an IDX file of bytes: 0x000008')
        shape = np.frombuffer(f.read(4 * head[3]), '>u4').tolist()
        size = math.prod(shape)
        check_memory(size)
        return np.frombuffer(f.read(size + 1), np.uint8).reshape(shape).copy()


def opener(path):
    """The function that opens a file, gzipped or not."""
    return gzip.open if str(path).endswith('.gz') else open


def existing_file(folder, name):
    """Path of `name` or `name`.gz in the folder, or None."""
    paths = [folder / name, folder / f'{name}.gz']
    return next((path for path in paths if path.is_file()), None)


def read_stl10(folder):
    """STL-10: 96 x 96 in colour, channel after channel, each column by column; labels from 1.

    The images stay on disk. Those of unlabeled_X.bin, if it is there, follow those of train_X.bin, and their
    label is -1.
    """
    def images(part):
        path = folder / f'{part}_X.bin'
        with naming(path), warnings.catch_warnings():
            warnings.simplefilter('ignore')                 # torch's, that nobody may write to the file
            x = np.memmap(path, np.uint8, 'r').reshape(-1, 3, 96, 96)
            return torch.from_numpy(x).transpose(2, 3)

    def labels(part):
        return np.fromfile(folder / f'{part}_y.bin', np.uint8).astype(int) - 1

    x_train, y_train = [images('train')], labels('train')
    if (folder / 'unlabeled_X.bin').exists():
        x_train.append(images('unlabeled'))
        y_train = np.append(y_train, np.full(len(x_train[1]), -1))
    return {'x_train': MappedImages(x_train), 'y_train': y_train,
            'x_test': MappedImages([images('test')]), 'y_test': labels('test'),
            'classes': read_lines(folder / 'class_names.txt')}


def read_cifar10(folder):
    """CIFAR-10: of each image the label, from 0, then 32 x 32 in colour, channel by channel, row by row."""
    arrays = {'classes': read_lines(folder / 'batches.meta.txt')}
    for part, pattern in ('train', 'data_batch_*.bin'), ('test', 'test_batch.bin'):
        batches = [np.fromfile(path, np.uint8) for path in sorted(folder.glob(pattern))]
        rows = np.concatenate(batches).reshape(-1, 1 + 3 * 32 * 32)
        arrays[f'x_{part}'] = rows[:, 1:].reshape(-1, 3, 32, 32)
        arrays[f'y_{part}'] = rows[:, 0]
    return arrays


def read_lines(path):
    """Lines of a text file; None if it isn't there."""
    return path.read_text('utf-8').strip().splitlines() if path.exists() else None


# ---------------------------------------------------------------------------------------- image files

PARTS = {'train': 'train', 'training': 'train', 'test': 'test', 'testing': 'test',
         'val': 'val', 'valid': 'val', 'validation': 'val'}     # folders that divide a data set


def read_image_folder(folder, limit=None, size=None, classes=None):
    """Arrays of image files: [train/]<class>/x.jpg and, if they are there, test/<class>/y.jpg (or val/).

    A file that lies in the folder of no class has no label. classes: names of all, in the order of their ids.
    """
    names = list_images(folder)

    parts = {part: [name for name in names if part_of(name) == part] for part in ('train', 'val', 'test')}
    test = parts['test'] or parts['val']
    train = parts['train'] or sorted(set(names) - set(test))
    test = [name for name in test if class_folder(name)] or test
    others = len(names) - len(train) - len(test)
    if others:
        note(f'{folder}: {others} images are not used: they lie beside train and test, or in test without a '
             'class')
    if limit and limit < len(train):
        train = [train[i * len(train) // limit] for i in range(limit)]      # some of each class
    x, kept = read_files(folder, train + test, size)
    found = [class_folder(name) for name in kept]
    folders = {name for name in found if name}
    classes = clean(classes) if classes else sorted(folders)
    unknown = sorted(folders - {*classes})
    if unknown:
        raise ValueError(f'--classes does not name {unknown[0]}, which a folder of images is called')
    y = np.array([classes.index(name) if name else -1 for name in found])
    n = len(set(train) & set(kept))
    arrays = {'x_train': x[:n], 'y_train': y[:n], 'names_train': kept[:n], 'classes': classes}
    if n < len(kept):
        arrays.update(x_test=x[n:], y_test=y[n:], names_test=kept[n:])
    note(f'{folder}: {n} images to train on, {len(kept) - n} to test, {len(classes)} classes, {x.shape[1:]}')
    return arrays


def list_images(folder):
    """Names of the image files below a folder, relative to it, sorted; hidden files are passed over."""
    found = glob.glob('**', root_dir=folder, recursive=True)
    return sorted(Path(name).as_posix() for name in found
                  if name.lower().endswith(SUFFIXES))


def part_of(name):
    """'train', 'val' or 'test' for a file below a folder of such a name; else None."""
    return PARTS.get(name.split('/')[0].lower()) if '/' in name else None


def class_folder(name):
    """'cat' for cat/x.jpg, train/cat/x.jpg, test/cat/more/x.jpg; None for x.jpg, train/x.jpg."""
    if part_of(name):
        _, name = name.split('/', 1)
    return normal(name.split('/')[0]) if '/' in name else None


def read_files(folder, names, size=None, channels=None):
    """As decode_files, but CACHE keeps the result, by the files' names, sizes and times."""
    stats = [os.stat(folder / name) for name in names]
    versions = [(s.st_size, s.st_mtime_ns) for s in stats]
    key = repr((folder.absolute(), names, versions, size, channels))
    cache = CACHE / f'{hashlib.sha256(key.encode()).hexdigest()}.npz'
    try:
        with np.load(cache) as z:
            x, kept, failed = z['x'], z['kept'].tolist(), z['failed'].tolist()
    except Exception:                                       # not there, or damaged
        x, kept, failed = decode_files(folder, names, size, channels)
        CACHE.mkdir(parents=True, exist_ok=True)
        np.savez(cache, x=x, kept=kept, failed=failed)
    if failed:
        note(f'{len(failed)} of {len(names)} image files are left out: {", ".join(failed[:10])}')
    return x, kept


def decode_files(folder, names, size=None, channels=None):
    """Image files -> (x (N, S, S, C) uint8, names of those that can be read, 'name (error)' of the others).

    The shorter side is resized to S, and the centre is cut out. S is `size`, by default the median of the
    shorter sides, 96 at most; C is `channels`, by default 1 if all images are grey, else 3.
    """
    if not names:
        raise ValueError(f'holds no image files; wanted {", ".join(SUFFIXES)}')
    try:
        from PIL import Image, ImageOps
    except ImportError:
        raise ValueError('image files are read with Pillow, which is missing: pip install pillow') from None

    def header(name):
        with Image.open(folder / name) as image:
            return min(image.size), image.mode in ('1', 'L', 'LA')

    def decode(name):
        with Image.open(folder / name) as image:
            if image.mode[0] in 'IF':                       # Pillow would cut them off at 255
                raise ValueError('more than 8 bits a value')
            image.draft(None, (2 * side, 2 * side))         # decode no more pixels of a JPEG than are used
            image = ImageOps.exif_transpose(image).convert('L' if C == 1 else 'RGB')
            return np.asarray(ImageOps.fit(image, (side, side))).reshape(side, side, C)

    headers, failed = in_threads(header, names)
    if not headers:
        raise ValueError(f'holds no image that can be read: {failed[0]}')
    sides, are_grey = zip(*headers.values())
    side = size or min(96, int(statistics.median(sides)))
    C = channels or (1 if all(are_grey) else 3)
    check_memory(2 * len(names) * side * side * C)
    found, failed = in_threads(decode, names)
    return np.stack(list(found.values())), list(found), failed


def in_threads(function, names):
    """({name: function(name)}, ['name (error)'] of those that raised one); shows how far it is."""
    update = progress('reading images', len(names))
    found, failed = {}, []
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(function, name) for name in names]
        for name, future in zip(names, futures):
            try:
                found[name] = future.result()
            except Exception as e:
                failed.append(f'{name} ({e})')
            update(len(found) + len(failed))
    return found, failed


# -------------------------------------------------------------------------------------------- batches

def split(n, n_val, seed):
    """(train ids, validation ids): `n_val` of `n`, a tenth at most, picked by the seed; sorted."""
    n_val = max(1, min(n_val, n // 10))
    order = torch.randperm(n, generator=generator('cpu', seed, 'split'))
    return order[n_val:].sort().values, order[:n_val].sort().values


def batches(n, batch_size, seed, epoch, start=0, device='cpu'):
    """Yield (step, ids) of one shuffled pass over n images, from step `start` on; ids on the device."""
    order = torch.randperm(n, generator=generator(device, seed, epoch, 'order'), device=device)
    steps = steps_per_epoch(n, batch_size)
    for step in range(start, steps):
        yield step, order[n * step // steps:n * (step + 1) // steps]


def steps_per_epoch(n, batch_size):
    """Batches of one pass; their sizes differ by at most one, and none is 1, which BatchNorm can't take."""
    return max(1, min(math.ceil(n / batch_size), n // 2))


def to_float(x):
    """uint8 0..255 -> float32 0..1."""
    return x.float().div_(255)


class MappedImages:
    """Images in memory-mapped files, one after the other, that may be more than memory holds.

    parts: uint8 tensors (n, C, H, W) of any strides. x[ids], x[a:b] and x[i] copy those rows, contiguous.
    """

    def __init__(self, parts):
        self.parts = parts
        self.shape = (sum(map(len, parts)), *parts[0].shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, ids):
        rows = torch.arange(len(self))[ids]
        out = torch.empty(*rows.shape, *self.shape[1:], dtype=torch.uint8)
        start = 0
        for part in self.parts:
            mine = (start <= rows) & (rows < start + len(part))
            out[mine] = part[rows[mine] - start]
            start += len(part)
        return out


class Images:
    """Rows `ids` (None: all) of images x on the CPU, for training on the device.

    They lie there whole if they fit, else they are read from x batch by batch; the batches are the same.
    """

    def __init__(self, x, device, ids=None):
        self.x = x
        self.ids = torch.arange(len(x)) if ids is None else ids
        self.device = device
        self.shape = (len(self.ids), *x.shape[1:])
        self.resident = None
        limit = free_memory(device) // 2 if MAX_RESIDENT_BYTES is None else MAX_RESIDENT_BYTES
        if math.prod(self.shape) <= limit:
            self.resident = x[self.ids].to(device)

    def __len__(self):
        return self.shape[0]

    def read(self, order):
        """For each (step, ids on the device) of an iterable: (step, ids, those images on the device)."""
        for step, ids in order:
            yield step, ids, self.at(ids)

    def at(self, ids):
        """Images `ids` (on the device, counted as in `read`) on the device."""
        if self.resident is not None:
            return self.resident[ids]
        return self.x[self.ids[ids.cpu()]].to(self.device)
