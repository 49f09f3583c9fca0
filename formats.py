"""The binary files of STL-10 and CIFAR-10; their pictures stay in them, memory-mapped.

ValueError, one sentence, for a file that is missing, empty, cut off or holds what it must not.
"""
import warnings
from pathlib import Path

import numpy as np
import torch

STL10_CLASSES = ['airplane', 'bird', 'car', 'cat', 'deer', 'dog', 'horse', 'monkey', 'ship', 'truck']
CIFAR10_CLASSES = ['airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck']


class Mapped:
    """Pictures in memory-mapped files, one after the other, that may be more than memory holds.

    parts: uint8 tensors (n, C, H, W) of any strides. x[ids], x[a:b] and x[i] copy those rows, contiguous.
    """
    ndim = 4

    def __init__(self, parts):
        self.parts, self.shape = parts, (sum(map(len, parts)), *parts[0].shape[1:])

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, ids):
        if isinstance(ids, int):
            return self[[ids]][0]
        ids = torch.arange(len(self))[ids] if isinstance(ids, slice) else torch.as_tensor(ids, dtype=torch.int64)
        assert ((0 <= ids) & (ids < len(self))).all()
        out, start = torch.empty(len(ids), *self.shape[1:], dtype=torch.uint8), 0
        for part in self.parts:
            mine = ((start <= ids) & (ids < start + len(part))).nonzero().flatten()
            out[mine] = part.index_select(0, ids[mine] - start)
            start += len(part)
        return out

    def first(self, n):
        """The first n pictures, still in their files; all for None."""
        parts, n = [], len(self) if n is None else n
        for part in self.parts:
            parts.append(part[:n])
            n -= len(parts[-1])
        return Mapped(parts)


def read(folder):
    """Arrays of a data set by the names of data.Dataset's fields, or None if the folder holds neither's files."""
    folder = Path(folder)
    if any((folder / f'{part}_X.bin').is_file() for part in ('train', 'test', 'unlabeled')):
        return stl10(folder)
    if any(folder.glob('data_batch_*.bin')) or (folder / 'test_batch.bin').is_file():
        return cifar10(folder)
    return None


def stl10(folder):
    """STL-10: 96 x 96 in colour, channel after channel, each column by column; labels from 1. The pictures of
    unlabeled_X.bin, if it is there, follow those of train_X.bin, and their label is -1."""
    x, y = {}, {}
    for part in 'train', 'test':
        x[part] = _stl10_pictures(folder / f'{part}_X.bin')
        y[part] = torch.from_numpy(_rows(folder / f'{part}_y.bin', 1).astype(np.int64)).flatten() - 1
        if len(y[part]) != len(x[part]):
            raise ValueError(f'{folder / f"{part}_y.bin"} holds {len(y[part]):,} labels; wanted one for each of the '
                             f'{len(x[part]):,} pictures in {part}_X.bin')
        if y[part].min() < 0 or y[part].max() > 9:
            raise ValueError(f'{folder / f"{part}_y.bin"} holds labels from {y[part].min() + 1} to '
                             f'{y[part].max() + 1}; wanted 1 to 10')
    parts, labels = [x['train']], y['train']
    if (folder / 'unlabeled_X.bin').exists():
        parts.append(_stl10_pictures(folder / 'unlabeled_X.bin'))
        labels = torch.cat([labels, labels.new_full((len(parts[1]),), -1)])
    return {'x_train': Mapped(parts), 'y_train': labels, 'x_test': Mapped([x['test']]), 'y_test': y['test'],
            'classes': _classes(folder / 'class_names.txt', STL10_CLASSES),
            'folds': _folds(folder / 'fold_indices.txt', len(x['train']))}


def cifar10(folder):
    """CIFAR-10: of each picture the label, from 0, then 32 x 32 in colour, channel after channel, row by row."""
    train = sorted(folder.glob('data_batch_*.bin'), key=lambda p: (len(p.name), p.name))
    if not train:
        raise ValueError(f'{folder} has no data_batch_1.bin beside its test_batch.bin')
    x, y = {}, {}
    for key, paths in ('train', train), ('test', [folder / 'test_batch.bin']):
        maps = [_rows(path, 1 + 3 * 32 * 32) for path in paths]
        for path, rows in zip(paths, maps):
            if rows[:, 0].max() > 9:
                raise ValueError(f'{path} holds a label {rows[:, 0].max()}; wanted 0 to 9, before each picture')
        x[key] = Mapped([_tensor(rows)[:, 1:].unflatten(1, (3, 32, 32)) for rows in maps])
        y[key] = torch.from_numpy(np.concatenate([rows[:, 0] for rows in maps]).astype(np.int64))
    return {'x_train': x['train'], 'y_train': y['train'], 'x_test': x['test'], 'y_test': y['test'],
            'classes': _classes(folder / 'batches.meta.txt', CIFAR10_CLASSES)}


def _rows(path, size):
    """The file as a read-only memory map (n, size) of uint8."""
    if not path.is_file():
        raise ValueError(f'{path.parent} has no {path.name}')
    found = path.stat().st_size
    if not found:
        raise ValueError(f'{path} is empty')
    if found % size:
        raise ValueError(f'{path} holds {found:,} bytes; wanted a multiple of {size:,}: is it cut off?')
    return np.memmap(path, np.uint8, 'r', shape=(found // size, size))


def _tensor(rows):
    """The memory map as a tensor, which nobody may write to: torch's warning about that is known."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return torch.from_numpy(rows)


def _stl10_pictures(path):
    return _tensor(_rows(path, 3 * 96 * 96)).unflatten(1, (3, 96, 96)).transpose(2, 3)


def _classes(path, usual):
    """Names in a text file, one a line; the usual ones without it."""
    names = path.read_text(errors='replace').split() if path.is_file() else usual
    if len(names) != len(usual):
        raise ValueError(f'{path} holds {len(names)} names; wanted {len(usual)}, one a line')
    return names


def _folds(path, n):
    """The ten predefined folds, a line of picture numbers below n each, as id tensors; none without the file."""
    lines = path.read_text(errors='replace').splitlines() if path.is_file() else []
    words = [line.split() for line in lines if line.split()]
    if any(not (w.isascii() and w.isdigit() and len(w) < 10 and int(w) < n) for line in words for w in line):
        raise ValueError(f'{path} holds a word that is no number of a training picture, 0 to {n - 1:,}')
    if len(words) != 10 and path.is_file():
        raise ValueError(f'{path} holds {len(words)} lines of picture numbers; wanted 10')
    return [torch.tensor([int(w) for w in line]) for line in words]
