import contextlib
import gzip
import hashlib
import io
import itertools
import math
import os
import struct
import tracemalloc
import unicodedata
import unittest
from pathlib import Path
from unittest import mock

from helpers import arrays, close, folder, images, inside, modules, raises, write_npz

import numpy as np
import torch

import data
import download

IDX_FORMATS = {0x08: 'B', 0x09: 'b', 0x0B: 'h', 0x0C: 'i', 0x0D: 'f', 0x0E: 'd'}
EXTREMES = {'B': [255, 0], 'b': [-128, 127], 'h': [-2**15, 2**15 - 1], 'i': [-2**31, 2**31 - 1],
            'f': [-1.5, 2.0**100], 'd': [-0.1, 1e300]}
CPU = torch.device('cpu')


@contextlib.contextmanager
def notes():
    """What the block says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        yield said


def idx(code, shape, values):
    """An IDX file by hand: magic, big-endian sizes, big-endian values."""
    return (struct.pack('>BBBB', 0, 0, code, len(shape)) + struct.pack(f'>{len(shape)}I', *shape)
            + struct.pack(f'>{len(values)}{IDX_FORMATS[code]}', *values))


# -------------------------------------------------------------------------------------------- array files

def test_idx_of_every_type_and_shape_is_read_and_written_byte_for_byte():
    shapes = (), (5,), (0,), (2, 3), (0, 4), (3, 1, 2), (2, 2, 1, 3)
    with folder() as f:
        path = f / 'named.gz'                                 # the content decides, not the name
        for (code, kind), shape in itertools.product(IDX_FORMATS.items(), shapes):
            n = math.prod(shape)
            values = [*EXTREMES[kind], *range(n)][:n]
            blob = idx(code, shape, values)
            for content in blob, gzip.compress(blob):
                path.write_bytes(content)
                array = data.read_idx(path)
                assert array.shape == shape and array.ravel().tolist() == values
                assert array.dtype.char == kind and array.dtype.isnative and array.flags.writeable
            for name, opened in ('plain', open), ('packed.gz', gzip.open):
                data.write_idx(f / name, array)
                with opened(f / name, 'rb') as written:
                    assert written.read() == blob
        for wrong in np.zeros(2, int), np.zeros(2, bool), np.zeros(2, complex):
            with raises(ValueError, wrong.dtype):
                data.write_idx(f / 'wrong', wrong)
        data.write_idx(f / 'swapped', np.array([1, 258], '>i2'))
        assert (f / 'swapped').read_bytes() == idx(0x0B, (2,), [1, 258])


def test_read_idx_names_the_file_and_what_is_wrong_with_it():
    good = idx(8, (2, 3), range(6))
    huge = struct.pack('>BBBBII', 0, 0, 8, 2, 2**32 - 1, 2**32 - 1)
    with folder() as f:
        for content, said in (
                (b'', 'starts with'), (good[:3], 'starts with'), (b'\x89PNG', 'starts with 0x89504e47'),
                (b'\0\0\x0a\1', 'starts with'), (good[:7], ''), (good[:-1], 'the 6 bytes of shape [2, 3]'),
                (good + b'x', 'the 6 bytes'), (huge, 'memory'), (gzip.compress(good)[:-9], ''),
                (gzip.compress(good) + b'x', ''), (gzip.compress(good + b'x'), 'the 6 bytes'),
                (b'\0\0\x08\xff' + b'\0\0\0\1' * 255 + b'x', '255'), (idx(8, (0, *[2**32 - 1] * 3), []), '')):
            (f / 'x').write_bytes(content)
            with raises(ValueError, f'{f / "x"}: ', said):
                data.read_idx(f / 'x')
        with raises(ValueError, f'{f / "none"}: No such file'):
            data.read_idx(f / 'none')


def test_files_that_ask_for_more_memory_than_is_free_are_refused_before_they_get_it():
    with folder() as f, mock.patch.object(data, 'free_memory', lambda device: 20_000_000):
        (f / 'bomb.gz').write_bytes(gzip.compress(idx(8, (100,), range(100)) + bytes(1 << 28), 1))
        (f / 'tera.gz').write_bytes(gzip.compress(b'\0\0\x0e\2' + b'\xff' * 8))
        (f / 'free.gz').write_bytes(gzip.compress(idx(8, (30_000_000,), []) + bytes(30_000_000)))
        np.savez_compressed(f / 'packed.npz', x_train=np.zeros((30_000_000, 1, 1), np.uint8))
        tracemalloc.start()
        try:
            for path in sorted(f.iterdir()):
                with raises(ValueError, f'{path}: '):
                    data.load(path) if path.suffix == '.npz' else data.read_idx(path)
            assert tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()


class Evil:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_inside_npz_is_refused_and_does_not_run():
    with folder() as f:
        for key in 'x_train', 'y_train', 'y_test':
            evil = np.array([Evil(f / 'ran'), None], object)
            write_npz(f / 'a.npz', **{**arrays(20, 4), key: evil})
            with raises(ValueError, 'a.npz'):
                data.load(f / 'a.npz')
            assert not (f / 'ran').exists()
        np.load(f / 'a.npz', allow_pickle=True)['y_test']
        assert (f / 'ran').exists()                           # it would have run


def test_what_is_not_understood_in_an_npz_is_named():
    good = arrays(20, 4)
    with folder() as f:
        path = f / 'a.npz'
        for change, said in (
                ({'x_train': None}, 'wanted x_train'), ({'x_train': good['x_train'][:19]}, 'holds 19 images'),
                ({'x_train': good['x_train'][:0]}, 'holds 0 images'), ({'x_train': np.uint8(5)}, 'holds 1'),
                ({'x_test': good['x_test'][:, :9]}, 'same shape'), ({'x_test': good['x_test'][:0]}, 'x_test'),
                ({'x_train': np.zeros(20, [('a', 'u1')])}, 'x_train'), ({'y_train': np.int64(5)}, '(20,)'),
                ({'y_train': good['y_train'][:5]}, '(5,)'), ({'y_train': good['y_train'] - 2}, 'holds -2'),
                ({'y_test': good['y_test'] - 1}, 'keep = y >= 0')):
            write_npz(path, **{key: v for key, v in {**good, **change}.items() if v is not None})
            with raises(ValueError, f'{path}: ', said):
                data.load(path)
        write_npz(path, **good)
        whole = path.read_bytes()
        wrong_shape = whole.replace(b'20,', b'-2,')
        for content in b'', b'text', whole[:-30], whole.replace(b'NUMPY', b'NUMBY'), wrong_shape:
            path.write_bytes(content)
            with raises(ValueError, path):
                data.load(path)
        with raises(ValueError, f / 'none', 'wanted fashion-mnist, stl10, cifar10, an .npz file'):
            data.load(f / 'none')


def test_the_line_of_python_in_a_refusal_mends_the_array():
    def refusal(check, *args):
        try:
            check(*args)
        except ValueError as e:
            return str(e).rsplit(' = ', 1)[1]
        raise AssertionError('not refused')

    x, y = images(30, H=10, W=12, C=3)
    sizes = dict(N=30, H=10, W=12, C=3)
    rgba = np.concatenate([x, x[..., :1]], 3)
    for wrong, exact in ((x.astype(int), True), (x / 1.0, True), (x * 2.0, False), (x / 127.5 - 1, False),
                         (x.reshape(30, -1), True), (rgba, True), (x[..., :2], False), (x[:, :4], False)):
        mended = eval(refusal(data.to_images, 'x_train', wrong), {'x': wrong, **sizes})
        tensor = data.to_images('x_train', mended)
        assert not exact or np.array_equal(tensor.permute(0, 2, 3, 1), x)
    for wrong in y / 1.0, np.eye(3)[y], np.array(['ant', 'bee', 'cat'])[y]:
        mended = eval(refusal(data.to_labels, 'y_train', wrong, 30), {'y': wrong, 'numpy': np})
        assert data.to_labels('y_train', mended, 30).tolist() == y.tolist()


# -------------------------------------------------------------------------------------------- data sets

def same(a, b):
    """Do two data sets have the same images and labels?"""
    return a.digest == b.digest and torch.equal(a.y_train, b.y_train) and torch.equal(a.y_test, b.y_test)


def test_idx_folders_and_npz_are_the_same_images_channels_first():
    for C in 1, 3:
        kept = arrays(22, 4, C=C)
        with folder() as f, notes() as said:
            write_npz(f / 'a.npz', **kept)
            for key, array in kept.items():
                name = data.IDX_NAMES[key] + '.gz' * key.endswith('test')
                data.write_idx(f / name, array.astype(np.uint8))
            a, b = data.load(f / 'a.npz'), data.load(f)
            write_npz(f / 'a.npz', x_train=kept['x_train'])
            bare, first = data.load(f / 'a.npz'), data.load(f, limit=21)
        assert same(a, b) and first.digest != a.digest and not said.getvalue()
        assert a.name == 'a' and a.shape == (C, 10, 12)
        assert a.classes == ['0', '1', '2'] and a.ids == [0, 1, 2]
        sha = hashlib.sha256()
        for key in 'x_train', 'x_test':
            x = kept[key].reshape(-1, 10, 12, C)
            for place in np.ndindex(x.shape):
                n, h, w, c = place
                assert getattr(a, key)[n, c, h, w] == x[place]
            sha.update(str((len(x), C, 10, 12)).encode() + x.transpose(0, 3, 1, 2).tobytes())
        assert a.digest == sha.hexdigest()
        assert a.y_test.tolist() == kept['y_test'].tolist() and a.y_train.dtype == torch.int64
        assert bare.y_train is bare.x_test is bare.y_test is None and bare.classes == bare.ids == []
        assert torch.equal(first.x_train, a.x_train[:21]) and len(first.y_train) == 21


def test_arrays_as_they_are_published_are_read_with_a_line_that_says_how():
    for C, kind in (1, np.float16), (3, np.float64):
        good = arrays(22, 6, C=C)
        medmnist = {}
        nchw, columns, floats = dict(good), dict(good), dict(good)
        for part in 'train', 'test':
            x, y = f'x_{part}', f'y_{part}'
            medmnist.update({f'{part}_images': good[x], f'{part}_labels': good[y]})
            nchw[x] = np.moveaxis(good[x].reshape(-1, 10, 12, C), 3, 1)
            columns[y] = good[y][:, None]
            floats[x] = (good[x] / 255 - 0.001).clip(0).astype(kind)
        with folder() as f:
            write_npz(f / 'good.npz', **good)
            plain = data.load(f / 'good.npz')
            for contents, said in ((nchw, 'x_train: read as (N, C, H, W)'), (columns, 'y_test: read as (N,)'),
                                   (floats, 'x_test: read as floats from 0 to 1'),
                                   (medmnist, 'read train_images, train_labels, test_images, test_labels'),
                                   ({**good, 'val_images': np.zeros(3)}, 'y_test, val_images')):
                write_npz(f / 'other.npz', **contents)
                with notes() as line:
                    assert same(data.load(f / 'other.npz'), plain), said
                assert said in line.getvalue()
            y = good['y_train'].copy()
            y[::2] = -1
            write_npz(f / 'partly.npz', **{**good, 'y_train': y})
            ds = data.load(f / 'partly.npz')
            assert ds.y_train.tolist() == y.tolist() and ds.ids == [0, 1, 2]
            assert ds.labelled().tolist() == list(range(1, 22, 2))
            assert ds.labelled(torch.tensor([9, 4, 1])).tolist() == [9, 1]
            write_npz(f / 'partly.npz', **{**good, 'y_train': y * 0 - 1})
            assert data.load(f / 'partly.npz').y_train is None


def test_labels_are_dense_whatever_ids_the_file_has_and_the_ids_are_kept():
    good = arrays(24, 6)
    with folder() as f:
        for ids in (0, 1, 2), (1, 2, 3), (0, 100, 200), (7, 9999, 2 ** 40):
            changed = {key: np.array(ids)[good[key]] for key in ('y_train', 'y_test')}
            changed['y_train'][5] = -1
            write_npz(f / 'a.npz', **{**good, **changed})
            ds = data.load(f / 'a.npz')
            wanted = good['y_train'].tolist()
            wanted[5] = -1
            assert ds.y_train.tolist() == wanted and ds.y_test.tolist() == good['y_test'].tolist()
            assert ds.ids == list(ids) and ds.classes == [str(i) for i in ids]
            assert data.load(f / 'a.npz', classes=['ant', 'bee', 'cat']).classes == ['ant', 'bee', 'cat']
            assert data.load(f / 'a.npz', limit=20).ids == list(ids)
        with raises(ValueError, '2 classes are named, and the labels have 3'):
            data.load(f / 'a.npz', classes=['ant', 'bee'])
        write_npz(f / 'a.npz', **{**good, 'y_train': good['y_train'] * 2, 'y_test': good['y_test'] * 2})
        ds = data.load(f / 'a.npz', classes=list('abcde'))                  # b and d have no image
        assert ds.ids == [0, 1, 2, 3, 4] and ds.y_test.tolist() == (good['y_test'] * 2).tolist()
        write_npz(f / 'a.npz', x_train=good['x_train'])
        assert data.load(f / 'a.npz', classes=['a', 'b']).ids == [0, 1]


def test_a_class_name_is_a_line_compared_in_nfc_of_printable_or_joining_characters():
    persian, family = 'می\u200cخواهم', '\U0001F468\u200d\U0001F469\u200d\U0001F467'
    for name in 'golf ball', 'T-shirt', 'café', '中文', persian, family, 'क्\u200dष':
        assert data.class_name(f' {name}\n') == unicodedata.normalize('NFC', name)
    assert data.class_name('cafe\u0301') == data.class_name('caf\u00e9')
    for wrong in '', '  ', '\u200c\u200d', 'a\nb', 'a\0', 'a\u202eb', '\ufeffa', '\ud800':
        with raises(ValueError, 'class name'):
            data.class_name(wrong)
    with folder() as f:
        write_npz(f / 'a.npz', x_train=images(20)[0])
        with raises(ValueError, 'names a class twice'):
            data.load(f / 'a.npz', classes=['cafe\u0301', 'caf\u00e9'])


# ---------------------------------------------------------------------------------------- STL-10, CIFAR-10

def plane(side, of):
    """side x side bytes, row after row, of a function of (row, column)."""
    return bytes(of(row, col) for row in range(side) for col in range(side))


def write_stl10(f, train=20, test=4, unlabelled=6):
    """STL-10's files by hand: red is the row, green the column, blue the image's number, counted through."""
    number = itertools.count()
    red, green = plane(96, lambda a, b: b), plane(96, lambda a, b: a)       # the file goes down each column
    for part, n in ('train', train), ('unlabeled', unlabelled), ('test', test):
        content = [red + green + bytes([next(number)]) * 9216 for _ in range(n)]
        (f / f'{part}_X.bin').write_bytes(b''.join(content))
        if part != 'unlabeled':
            (f / f'{part}_y.bin').write_bytes(bytes(1 + i % 10 for i in range(n)))
    (f / 'class_names.txt').write_text('\n'.join(f'golf ball {k}' for k in range(10)) + '\n')


def write_cifar10(f, sizes=(12, 8, 5), test=4):
    """CIFAR-10's files by hand, told as above; data_batch_9, _10, _11 when three sizes are given."""
    red, green, number = plane(32, lambda row, col: row), plane(32, lambda row, col: col), itertools.count()
    for name, n in *((f'data_batch_{9 + i}', n) for i, n in enumerate(sizes)), ('test_batch', test):
        ids = [next(number) for _ in range(n)]
        content = [bytes([i % 10]) + red + green + bytes([i]) * 1024 for i in ids]
        (f / f'{name}.bin').write_bytes(b''.join(content))
    (f / 'batches.meta.txt').write_text('\n'.join(f'class{k}' for k in range(10)) + '\n\n')


def assert_told(x, first=0):
    """Every pixel of x (N, 3, H, W) says its row, its column and its image's number."""
    n, _, H, W = x.shape
    for i, r, c in itertools.product(range(n), range(0, H, 5), range(0, W, 7)):
        assert x[i, :, r, c].tolist() == [r, c, first + i]
    assert x.is_contiguous() and x.dtype == torch.uint8


def test_stl10_is_read_column_by_column_its_unlabelled_images_last_and_without_a_label():
    with folder() as f:
        write_stl10(f)
        ds, few, more = data.load(f), data.load(f, limit=20), data.load(f, limit=23)
        assert ds.shape == (3, 96, 96) and len(ds.x_train) == 26
        assert ds.classes == [f'golf ball {k}' for k in range(10)] and ds.ids == list(range(10))
        assert_told(ds.x_train[:])
        assert_told(ds.x_test[:], 26)
        assert ds.y_train.tolist() == [*range(10)] * 2 + [-1] * 6 and ds.y_test.tolist() == [0, 1, 2, 3]
        assert len(few.x_train) == len(few.labelled()) == 20 and len(more.x_train) == len(more.y_train) == 23
        x = {key: getattr(ds, key)[:].permute(0, 2, 3, 1).numpy() for key in ('x_train', 'x_test')}
        copy = data.make_dataset('copy', x)
        assert copy.digest == ds.digest != few.digest        # the digest is of images, not of files
        with open(f / 'train_X.bin', 'r+b') as file:          # nothing was copied: the file is the data
            file.seek(2 * 27_648 + 96 * 7 + 5)
            file.write(b'\xff')
        assert ds.x_train[2:3][0, 0, 5, 7] == 255
        (f / 'unlabeled_X.bin').unlink()
        (f / 'class_names.txt').unlink()
        bare = data.load(f)
        assert len(bare.x_train) == len(bare.labelled()) == 20 and bare.classes[2] == '2'


def test_cifar10_is_read_row_by_row_from_any_number_of_batches_in_the_order_of_their_numbers():
    with folder() as f:
        write_cifar10(f)
        ds = data.load(f)
        assert ds.shape == (3, 32, 32) and ds.classes == [f'class{k}' for k in range(10)]
        assert_told(ds.x_train[:])
        assert_told(ds.x_test[:], 25)
        assert ds.y_train.tolist() == [i % 10 for i in range(25)] and ds.y_test.tolist() == [5, 6, 7, 8]
        assert_told(data.load(f, limit=22).x_train[torch.arange(13, 22)], 13)


def test_broken_binary_data_sets_are_one_sentence():
    with folder() as f:
        for write, name, change, said in (
                (write_stl10, 'train_X.bin', lambda b: b[:-1], 'wanted a multiple of 27,648'),
                (write_stl10, 'train_X.bin', lambda b: b[27_648:], 'wanted integers of shape (25,)'),
                (write_stl10, 'test_y.bin', lambda b: b'', 'test_y.bin holds 0 bytes'),
                (write_stl10, 'train_X.bin', None, 'train_X.bin: No such file'),
                (write_stl10, 'test_y.bin', lambda b: b[:-1] + b'\x0b', 'the labels have 11, up to 10'),
                (write_stl10, 'class_names.txt', lambda b: b[:-13], '9 classes are named'),
                (write_stl10, 'class_names.txt', lambda b: b'\xff' + b, 'class_names.txt: '),
                (write_cifar10, 'data_batch_10.bin', lambda b: b[:-3], 'wanted a multiple of 3,073'),
                (write_cifar10, 'test_batch.bin', None, 'test_batch.bin: No such file'),
                (write_cifar10, 'data_batch_9.bin', lambda b: b[3073 * 7:], 'holds 18 images; wanted at')):
            for old in f.iterdir():
                old.unlink()
            write(f)
            blob = (f / name).read_bytes()
            (f / name).unlink() if change is None else (f / name).write_bytes(change(blob))
            with raises(ValueError, f, said):
                data.load(f)
        for batch in f.glob('data_batch_*'):
            batch.unlink()
        with raises(ValueError, 'data_batch_1.bin: No such file'):
            data.load(f)


def test_a_named_data_set_is_looked_for_in_data_and_where_systems_share_them():
    with folder() as f, inside(f), mock.patch.object(data, 'SHARED', f / 'shared'):
        asked = []
        fetch = mock.patch.multiple(download, fashion_mnist=asked.append,
                                    unpacked=lambda archive, there: asked.append(there))
        with fetch:
            assert data.find('stl10') == Path('data/stl10') and data.find('fashion-mnist') == asked[1]
        for there in f / 'shared/fashion-mnist', Path('data/fashion-mnist'):
            there.mkdir(parents=True)
            for key, array in arrays(60, 20, K=10, H=28, W=28).items():
                data.write_idx(there / f'{data.IDX_NAMES[key]}.gz', array.astype(np.uint8))
            with fetch:
                assert data.find('fashion-mnist') == there
        ds = data.load()
        assert ds.name == 'fashion-mnist' and ds.classes[9] == 'ankle boot' and len(ds.classes) == 10
        assert len(asked) == 2


# -------------------------------------------------------------------------------------- image files

def pillow():
    try:
        import PIL.Image
    except ImportError:
        raise unittest.SkipTest('image files need Pillow') from None
    return PIL.Image


def write_images(f, names, size=(16, 12), mode='RGB'):
    """Image files whose colour is 10 times their place in the list."""
    for i, name in enumerate(names):
        (f / name).parent.mkdir(parents=True, exist_ok=True)
        pillow().new(mode, size, 10 * i if mode == 'L' else (10 * i, 0, 255)).save(f / name)


def test_folders_of_images_are_read_with_or_without_classes_and_a_test_set():
    in_classes = [f'{c}/{i:02}.png' for c in ('ant', 'bee', 'sea lion') for i in range(8)]
    flat = [f'{i:02}.png' for i in range(24)]
    for top, names, test in itertools.product(('', 'train'), (in_classes, flat), (None, 'test', 'val')):
        with folder() as f, inside(f), notes() as said:
            names_train = [f'{top}/{name}'.strip('/') for name in names]
            names_test = [f'{test}/bee/a.png', f'{test}/cow/b.png'] if test else None
            write_images(f, names_train + (names_test or []))
            write_images(f, ['val/cow/c.png'] if top and test == 'test' else [])
            (f / 'notes.txt').write_text('no image')
            (f / '._00.png').write_text('hidden')
            ds = data.load(f)
        assert (ds.names_train, ds.names_test) == (names_train, names_test) and ds.shape == (3, 12, 12)
        assert ds.x_train[:, 0, 5, 5].tolist() == list(range(0, 240, 10)) and (ds.x_train[:, 2] == 255).all()
        if names is in_classes:
            assert [ds.classes[k] for k in ds.y_train] == [name.split('/')[0] for name in names]
        else:
            assert ds.y_train is None
        assert not test or [ds.classes[k] for k in ds.y_test] == ['bee', 'cow']
        assert f'24 images to train on, {2 if test else 0} to test, {len(ds.classes)} ' in said.getvalue()
        assert 'left out' not in said.getvalue()


def test_images_are_resized_by_their_shorter_side_and_the_centre_is_cut_out():
    with folder() as f, inside(f), notes():
        ramp = np.zeros((40, 120, 3), np.uint8)
        ramp[:, :, 0] = np.arange(40)[:, None] * 6
        ramp[:, 40:80, 1] = 255                               # the centre, which is all that stays
        for i in range(20):
            turned = pillow().fromarray(ramp).rotate(90, expand=True) if i else pillow().fromarray(ramp)
            exif = turned.getexif()
            exif[0x0112] = 6 if i else 1                      # "turn me by 90 degrees"
            turned.save(f / f'{i:02}.jpg', quality=100, subsampling=0, exif=exif)
        x = data.load(f, size=20).x_train
        wanted = (np.arange(20) * 2 + 0.5) * 6
        assert x.shape == (20, 3, 20, 20) and x[:, 1].min() > 200
        assert abs(x[:, 0, 2:-2].double() - torch.from_numpy(wanted)[2:-2, None]).max() < 6
        assert data.load(f).shape == (3, 40, 40)
        with mock.patch.object(data.statistics, 'median', lambda sides: 500):
            assert data.decode_files(f, ['00.jpg'])[0].shape == (1, 96, 96, 3)
    with folder() as f, inside(f), notes():
        write_images(f, [f'{i:02}.png' for i in range(20)], mode='L')
        x, names = data.read_images(f)
        assert x[:, 0, 5, 5].tolist() == list(range(0, 200, 10))             # grey: one channel
        assert x.shape == (20, 1, 12, 12) and names == [f'{i:02}.png' for i in range(20)]
        x, names = data.read_images(f / '07.png', 8, 3)
        assert names == ['07.png'] and x.shape == (1, 3, 8, 8) and (x == 70).all()


def test_files_that_can_not_be_read_are_named_left_out_and_counted():
    with folder() as f, inside(f), notes() as said:
        write_images(f, [f'{c}/{i}.png' for c in 'ab' for i in range(12)])
        (f / 'a/3.png').write_bytes(b'no image')
        (f / 'b/5.png').write_bytes((f / 'b/5.png').read_bytes()[:50])
        pillow().fromarray(np.full((12, 12), 40_000, np.uint16)).save(f / 'b/0.png')         # 16 bits
        for _ in range(2):                                    # also when it comes out of the cache
            ds = data.load(f)
            assert ds.y_train.tolist() == [0] * 11 + [1] * 10 and len(ds.names_train) == 21
            assert not {'a/3.png', 'b/5.png', 'b/0.png'} & set(ds.names_train)
        lines = said.getvalue().splitlines()
        assert lines[0].startswith('3 of 24 image files are left out: a/3.png (') and lines[0] == lines[2]
        with mock.patch.object(pillow(), 'MAX_IMAGE_PIXELS', 100):           # a bomb has 90 million pixels
            with raises(ValueError, f, 'holds no image that can be read', 'exceeds limit'):
                data.read_images(f, 9)
    with folder() as f:
        with raises(ValueError, f, 'holds no image that can be read'):
            data.load(f)
        write_npz(f / 'a.npz', x_train=images(20)[0])
        with raises(ValueError, '--size'):
            data.load(f / 'a.npz', size=32)
        with modules(PIL=None), raises(ValueError, 'pip install pillow'):
            data.load(f)


def test_images_are_decoded_once_and_again_when_a_file_changes():
    with folder() as f, inside(f), notes():
        write_images(f, [f'{i:02}.png' for i in range(25)])
        with mock.patch.object(data, 'decode_files', wraps=data.decode_files) as decode:
            first = data.load(f).digest
            assert data.load(f).digest == first and decode.call_count == 1
            write_images(f, ['00.png', '03.png'])             # 03.png gets another colour
            changed = data.load(f)
            assert changed.x_train[3, 0, 5, 5] == 10 and decode.call_count == 2
            for path in Path('runs/.cache').iterdir():
                path.write_bytes(path.read_bytes()[:500])     # a torn file is no obstacle
            assert data.load(f).digest == changed.digest and decode.call_count == 3
            assert data.load(f, size=10).shape == (3, 10, 10)
            few = data.load(f, limit=20).names_train          # spread over all
            assert few == [f'{i:02}.png' for i in range(25) if i % 5 != 4]
            there = set(Path('runs/.cache').iterdir())
            with mock.patch.object(np, 'savez', side_effect=OSError(28, 'No space left')):
                assert data.load(f, size=11).shape == (3, 11, 11)
            assert set(Path('runs/.cache').iterdir()) == there
            with mock.patch.object(data, 'CACHE', f / '00.png' / 'cache'):
                assert data.load(f).digest == changed.digest


def test_new_images_come_from_npz_idx_or_image_files():
    x = images(5, C=3)[0]
    with folder() as f, notes():
        for key in 'x', 'x_train', 'x_test', 'test_images':
            write_npz(f / 'a.npz', **{key: x, 'y_train': np.zeros(3)})
            found, names = data.read_images(f / 'a.npz')
            assert names is None and np.array_equal(found.permute(0, 2, 3, 1), x)
        data.write_idx(f / 'a.idx', x)
        assert torch.equal(data.read_images(f / 'a.idx')[0], found)
        write_npz(f / 'a.npz', y_train=np.zeros(3))
        for name, said in ('a.npz', 'wanted x, x_train or x_test'), ('none', 'No such file'):
            with raises(ValueError, f / name, said):
                data.read_images(f / name)


# -------------------------------------------------------------------------------------------- batches

def test_split_is_a_function_of_the_seed_disjoint_and_complete():
    for n, n_val, wanted in (100, 7, 7), (100, 5000, 10), (60_000, 5000, 5000), (20, 5000, 2), (3, 5, 1):
        a, b = data.split(n, n_val, 0)
        assert len(b) == wanted and sorted(a.tolist() + b.tolist()) == list(range(n))
        again = data.split(n, n_val, 0)
        assert torch.equal(again[0], a) and torch.equal(again[1], b)
    assert not torch.equal(data.split(100, 7, 0)[1], data.split(100, 7, 1)[1])


def test_batches_hold_every_image_once_in_an_order_that_seed_and_epoch_fix():
    for n, size in itertools.product((2, 3, 5, 19, 20, 97, 200), (2, 3, 7, 19, 20, 500)):
        def seen(*key, n=n, size=size):
            return [(step, ids.tolist()) for step, ids in data.batches(n, size, *key)]

        batches = seen(0, 1)
        sizes = [len(ids) for _, ids in batches]
        assert sorted(sum((ids for _, ids in batches), [])) == list(range(n))
        assert [step for step, _ in batches] == list(range(data.steps_per_epoch(n, size)))
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2 and max(sizes) <= max(size, 3), (n, size)
        assert seen(0, 1) == batches
        for start in range(len(batches) + 1):
            assert seen(0, 1, start) == batches[start:]
    assert len({str(seen(seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}) == 6


def test_to_float_is_division_by_255():
    x = torch.arange(256, dtype=torch.uint8)
    assert close(data.to_float(x), np.arange(256) / 255, 1e-7) and x[255] == 255


def test_images_are_resident_if_they_fit_and_the_same_batches_come_either_way():
    x = torch.from_numpy(images(120, C=3)[0]).permute(0, 3, 1, 2).contiguous()
    ids = torch.randperm(120)[:50]
    transposed = x[7:60].transpose(2, 3).contiguous().transpose(2, 3)
    mapped = data.MappedImages([x[:7], x[7:7], transposed, x[60:]])
    for wanted in slice(None), slice(5, 70), ids, [4, 99], [], 9:
        assert torch.equal(mapped[wanted], x[wanted]) and mapped[wanted].is_contiguous()
    for source, of in itertools.product((x, mapped), (None, ids)):
        wanted = x if of is None else x[of]
        for limit in wanted.numel(), wanted.numel() - 1:
            with mock.patch.object(data, 'MAX_RESIDENT_BYTES', limit):
                kept = data.Images(source, CPU, of)
            assert (kept.resident is None) == (limit < wanted.numel())
            assert kept.shape == wanted.shape == (len(kept), 3, 10, 12)
            order = [(7, torch.tensor([3, 1, 3])), *data.batches(len(kept), 7, 0, 1, start=2)]
            for (step, batch), (got_step, got, rows) in zip(order, kept.read(iter(order)), strict=True):
                assert got_step == step and torch.equal(got, batch) and torch.equal(rows, wanted[batch])
    with mock.patch.object(data, 'free_memory', lambda device: 2 * x.numel()):       # half of what is free
        assert data.Images(x, CPU).resident is not None
    with mock.patch.object(data, 'free_memory', lambda device: 2 * x.numel() - 2):
        assert data.Images(x, CPU).resident is None
