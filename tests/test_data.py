import contextlib
import gzip
import hashlib
import io
import itertools
import math
import sys
import tracemalloc
from pathlib import Path
from unittest import mock

from helpers import Hostile, arrays, folder, idx, images, inside, pillow, raises, write_idx, write_npz

import numpy as np
import torch

import data
import download

CPU = torch.device('cpu')


@contextlib.contextmanager
def notes():
    """What the block says on stderr."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        yield said


# -------------------------------------------------------------------------------------------- array files

def test_idx_of_every_shape_is_read():
    with folder() as f:
        for shape in (), (5,), (0, 4), (2, 2, 1, 3):
            values = range(250, 250 - math.prod(shape), -1)
            for name, opened in ('plain', open), ('packed.gz', gzip.open):
                with opened(f / name, 'wb') as file:
                    file.write(idx(shape, values))
                array = data.read_idx(f / name)
                assert array.dtype == np.uint8 and array.shape == shape and array.flags.writeable
                assert array.ravel().tolist() == list(values)


def test_read_idx_names_the_file_and_what_is_wrong_with_it():
    good = idx((2, 3), range(6))
    for name, content, said in (('x', b'\x89PNG', 'starts with 0x89504e47'), ('x', good[:-1], 'size 5'),
                                ('x', good + b'x', 'size 7'), ('x.gz', gzip.compress(good)[:-9], '')):
        with folder() as f:
            (f / name).write_bytes(content)
            with raises(ValueError, f / name, said):
                data.read_idx(f / name)


def test_files_that_ask_for_more_memory_than_is_free_are_refused_before_they_get_it():
    with folder() as f, mock.patch.object(data, 'free_memory', lambda device: 2_000_000):
        (f / 'bomb.gz').write_bytes(gzip.compress(idx((100,), range(100)) + bytes(1 << 24), 1))
        (f / 'free.gz').write_bytes(gzip.compress(idx((3_000_000,), []) + bytes(3_000_000)))
        np.savez_compressed(f / 'packed.npz', x_train=np.zeros((3_000_000, 1, 1), np.uint8))
        tracemalloc.start()
        try:
            for path in sorted(f.iterdir()):
                with raises(ValueError, path):
                    data.load(path) if path.suffix == '.npz' else data.read_idx(path)
            assert tracemalloc.get_traced_memory()[1] < 1e6
        finally:
            tracemalloc.stop()


def test_a_pickle_inside_npz_is_refused_and_does_not_run():
    with folder() as f:
        write_npz(f / 'a.npz', x_train=np.array([Hostile(f / 'ran'), None], object))
        with raises(ValueError, 'a.npz'):
            data.load(f / 'a.npz')
        assert not (f / 'ran').exists()
        np.load(f / 'a.npz', allow_pickle=True)['x_train']
        assert (f / 'ran').exists()                           # it would have run


def test_what_is_not_understood_in_an_npz_is_named():
    good = arrays(20, 4)
    x, y = good['x_train'], good['y_train']
    with folder() as f:
        for change, said in (
                ({'x_train': None}, 'wanted x_train'), ({'x_train': x[:19]}, 'holds 19 images'),
                ({'x_test': x[:4, :9]}, 'another shape'), ({'x_test': x[:0]}, 'x_test holds 0'),
                ({'x_train': np.uint8(5)}, ''), ({'x_train': x[:, :7]}, 'H and W at least 8'),
                ({'y_train': y[:5]}, '(5,)'), ({'y_train': y - 2}, 'holds -2'),
                ({'y_test': good['y_test'] - 1}, 'keep = y >= 0')):
            write_npz(f / 'a.npz', **{key: v for key, v in {**good, **change}.items() if v is not None})
            with raises(ValueError, f / 'a.npz', said):
                data.load(f / 'a.npz')
        with raises(ValueError, f / 'none', 'wanted fashion-mnist, stl10, cifar10, an .npz file'):
            data.load(f / 'none')


def test_the_lines_of_python_in_a_refusal_mend_the_array():
    x, y = images(30, H=10, W=12, C=3)
    rescale = '((x - black) / (white - black) * 255).round().astype("uint8")'
    reshape = 'x.reshape(N, H, W, C)[..., :3]'
    for wrong, line, black in (x.astype(int), rescale, 0), (x * 2.0 - 255, rescale, -255), (
            x.reshape(30, -1), reshape, 0), (np.concatenate([x, x], 3), reshape, 0):
        with raises(ValueError, f'x = {line}'):
            data.to_images('x_train', wrong)
        mended = eval(line, dict(x=wrong, black=black, white=255, N=30, H=10, W=12, C=wrong.size // 3600))
        assert np.array_equal(data.to_images('x_train', mended).permute(0, 2, 3, 1), x)
    names = np.array(['ant', 'bee', 'cat'])[y]
    for wrong, line in ((y / 1.0, 'y.astype(int)'), (np.eye(3)[y], 'y.argmax(axis=1)'),
                        (names, 'numpy.unique(y, return_inverse=True)[1]')):
        with raises(ValueError, line):
            data.to_labels('y_train', wrong, 30)
        assert data.to_labels('y_train', eval(line, {'y': wrong, 'numpy': np}), 30).tolist() == y.tolist()


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
                write_idx(f / (data.IDX_NAMES[key] + '.gz' * key.endswith('test')), array)
            a = data.load(f / 'a.npz')
            assert same(a, data.load(f)) and not said.getvalue()
            write_npz(f / 'a.npz', x_train=kept['x_train'])
            bare = data.load(f / 'a.npz')
        assert bare.y_train is bare.x_test is bare.y_test is None and bare.classes == bare.ids == []
        assert a.name == 'a' and a.shape == (C, 10, 12) and a.y_test.tolist() == kept['y_test'].tolist()
        sha = hashlib.sha256()
        for key in 'x_train', 'x_test':
            x = kept[key].reshape(-1, 10, 12, C).transpose(0, 3, 1, 2)
            assert np.array_equal(getattr(a, key), x)
            sha.update(str(x.shape).encode() + x.tobytes())
        assert a.digest == sha.hexdigest()


def test_arrays_as_they_are_published_are_read_with_a_line_that_says_what_of_them():
    for C, kind in (1, np.float16), (3, np.float64):
        good = arrays(22, 6, C=C)
        medmnist, nchw, columns, floats = {}, dict(good), dict(good), dict(good)
        for part in 'train', 'test':
            x, y = f'x_{part}', f'y_{part}'
            medmnist.update({f'{part}_images': good[x], f'{part}_labels': good[y]})
            nchw[x] = np.moveaxis(good[x].reshape(-1, 10, 12, C), 3, 1)
            columns[y] = good[y][:, None]
            floats[x] = (good[x] / 255 - 0.001).clip(0).astype(kind)
        with folder() as f:
            write_npz(f / 'good.npz', **good)
            for contents in nchw, columns, floats, medmnist:
                write_npz(f / 'other.npz', **contents, val_images=np.zeros(3))
                with notes() as line:
                    assert same(data.load(f / 'other.npz'), data.load(f / 'good.npz')), contents.keys()
                assert "'val_images']" in line.getvalue()


def test_minus_one_is_no_label():
    good = arrays(22, 6)
    good['y_train'][::2] = -1
    ds = data.make_dataset('partly', good)
    assert ds.y_train.tolist() == good['y_train'].tolist() and ds.ids == [0, 1, 2]
    assert ds.labelled().tolist() == list(range(1, 22, 2))
    assert ds.labelled(torch.tensor([9, 4, 1])).tolist() == [9, 1]
    assert data.make_dataset('partly', {**good, 'y_train': np.r_[[-1] * 20, 0, 1]}, 20).y_train is None
    good['y_train'][:] = -1
    assert data.make_dataset('bare', good).y_train is None


def test_labels_are_dense_whatever_ids_the_file_has_and_the_ids_are_kept():
    good, names, ids = arrays(24, 6), ['ant', 'bee', 'cat'], [7, 9999, 2 ** 40]
    y = {key: np.array(ids)[good[key]] for key in ('y_train', 'y_test')}
    y['y_train'][5] = good['y_train'][5] = -1
    ds = data.make_dataset('a', {**good, **y}, limit=20)
    assert np.array_equal(ds.y_train, good['y_train'][:20]) and np.array_equal(ds.y_test, good['y_test'])
    assert ds.ids == ids and ds.classes == ['7', '9999', str(2 ** 40)]
    assert data.make_dataset('a', {**good, **y}, classes=names).classes == names
    with raises(ValueError, '2 classes are named, and the labels have 3'):
        data.make_dataset('a', good, classes=names[:2])
    ds = data.make_dataset('a', {**good, 'y_test': 2 * good['y_test']}, classes=list('abcde'))     # d: none
    assert ds.ids == [0, 1, 2, 3, 4] and np.array_equal(ds.y_test, 2 * good['y_test'])
    assert data.make_dataset('a', {'x_train': good['x_train']}, classes=['a', 'b']).ids == [0, 1]


def test_class_names_are_compared_in_nfc_and_given_once():
    ids, names = data.name_classes([None], [' golf ball\n', 'cafe\u0301'])
    assert ids == [0, 1] and names == ['golf ball', 'caf\u00e9']
    for wrong in ['cafe\u0301', 'caf\u00e9'], ['a', ' ']:
        with raises(ValueError, 'names a class twice or leaves a name empty'):
            data.name_classes([None], wrong)


# ---------------------------------------------------------------------------------------- STL-10, CIFAR-10

def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def write_stl10(f):
    """STL-10's files, whose images go down each column; returns the images (30, 3, 96, 96)."""
    x = noise(30, 3, 96, 96)
    for part, rows in ('train', x[:20]), ('unlabeled', x[20:26]), ('test', x[26:]):
        (f / f'{part}_X.bin').write_bytes(rows.swapaxes(2, 3).tobytes())
        if part != 'unlabeled':
            (f / f'{part}_y.bin').write_bytes(bytes(1 + i % 10 for i in range(len(rows))))
    (f / 'class_names.txt').write_text('\n'.join(f'golf ball {k}' for k in range(10)))
    return torch.from_numpy(x)


def write_cifar10(f):
    """CIFAR-10's files; returns the images (29, 3, 32, 32)."""
    x = noise(29, 3, 32, 32)
    for name, start, end in ('data_batch_1', 0, 12), ('data_batch_2', 12, 25), ('test_batch', 25, 29):
        rows = [bytes([i % 10]) + x[i].tobytes() for i in range(start, end)]
        (f / f'{name}.bin').write_bytes(b''.join(rows))
    (f / 'batches.meta.txt').write_text('\n'.join(f'class{k}' for k in range(10)) + '\n\n')
    return torch.from_numpy(x)


def test_stl10_is_read_column_by_column_its_unlabelled_images_last_and_without_a_label():
    with folder() as f:
        x = write_stl10(f)
        ds, few = data.load(f), data.load(f, limit=23)
        assert ds.classes == [f'golf ball {k}' for k in range(10)] and ds.ids == list(range(10))
        assert torch.equal(ds.x_train[:], x[:26]) and torch.equal(ds.x_test[:], x[26:])
        assert ds.y_train.tolist() == [*range(10)] * 2 + [-1] * 6 and ds.y_test.tolist() == [0, 1, 2, 3]
        assert torch.equal(few.x_train, x[:23]) and len(few.labelled()) == 20
        assert ds.digest != few.digest
        with open(f / 'train_X.bin', 'r+b') as file:          # nothing was copied: the file is the data
            file.write(bytes([255 - x[0, 0, 0, 0]]))
        assert ds.x_train[0][0, 0, 0] == 255 - x[0, 0, 0, 0]
        (f / 'unlabeled_X.bin').unlink()
        (f / 'class_names.txt').unlink()
        bare = data.load(f)
        assert len(bare.x_train) == len(bare.labelled()) == 20 and bare.classes[2] == '2'


def test_cifar10_is_read_row_by_row_from_any_number_of_batches():
    with folder() as f:
        x = write_cifar10(f)
        ds = data.load(f)
        assert torch.equal(ds.x_train, x[:25]) and torch.equal(ds.x_test, x[25:])
        assert ds.y_train.tolist() == [i % 10 for i in range(25)] and ds.y_test.tolist() == [5, 6, 7, 8]
        assert ds.classes == [f'class{k}' for k in range(10)]


def test_broken_binary_data_sets_are_one_sentence():
    for name, change, said in (
            ('train_X.bin', lambda b: b[:-1], 'train_X.bin: cannot reshape'),
            ('train_X.bin', lambda b: b[27_648:], 'wanted integers of shape (25,)'),
            ('test_y.bin', None, 'test_y.bin'),
            ('test_y.bin', lambda b: b[:-1] + b'\x0b', 'the labels have 11'),
            ('class_names.txt', lambda b: b[:-13], '9 classes are named')):
        with folder() as f:
            write_stl10(f)
            blob = (f / name).read_bytes()
            (f / name).unlink() if change is None else (f / name).write_bytes(change(blob))
            with raises(ValueError, f, said):
                data.load(f)


def test_a_named_data_set_is_looked_for_in_data_and_where_systems_share_them():
    asked = []
    fetch = {'fashion_mnist': asked.append, 'unpacked': lambda archive, there: asked.append(there)}
    with folder() as f, inside(f), mock.patch.object(data, 'SHARED', f / 'shared'), \
            mock.patch.multiple(download, **fetch):
        assert data.find('stl10') == Path('data/stl10') and data.find('fashion-mnist') == asked[1]
        for there in f / 'shared/fashion-mnist', Path('data/fashion-mnist'):
            there.mkdir(parents=True)
            for key, array in arrays(60, 20, K=10, H=28, W=28).items():
                write_idx(there / f'{data.IDX_NAMES[key]}.gz', array)
            assert data.find('fashion-mnist') == there
        ds = data.load()
        assert ds.name == 'fashion-mnist' and ds.classes[9] == 'ankle boot' and len(ds.classes) == 10
        assert len(asked) == 2


# -------------------------------------------------------------------------------------- image files

def write_images(f, names, size=(16, 12), mode='RGB'):
    """Image files whose colour is 10 times their place in the list."""
    for i, name in enumerate(names):
        (f / name).parent.mkdir(parents=True, exist_ok=True)
        pillow().new(mode, size, 10 * i if mode == 'L' else (10 * i, 0, 255)).save(f / name)


def test_folders_of_images_are_read_with_or_without_classes_and_a_test_set():
    in_classes = [f'{c}/{i:02}.png' for c in ('ant', 'bee', 'sea lion') for i in range(8)]
    flat = [f'{i:02}.png' for i in range(24)]
    for top, names, test in (('', in_classes, None), ('', flat, 'test'), ('train', in_classes, 'val'),
                             ('train', flat, None)):
        with folder() as f, inside(f), notes() as said:
            names_train = [f'{top}/{name}'.strip('/') for name in names]
            names_test = [f'{test}/bee/a.png', f'{test}/cow/b.png'] if test else []
            write_images(f, names_train + names_test)
            (f / 'notes.txt').write_text('no image')
            (f / '._00.png').write_text('hidden')
            ds = data.load(f)
        assert (ds.names_train, ds.names_test or []) == (names_train, names_test) and ds.shape == (3, 12, 12)
        assert ds.x_train[:, 0, 5, 5].tolist() == list(range(0, 240, 10)) and (ds.x_train[:, 2] == 255).all()
        if names is flat:
            assert ds.y_train is None
        else:
            assert [ds.classes[k] for k in ds.y_train] == [name.split('/')[0] for name in names]
        assert not test or [ds.classes[k] for k in ds.y_test] == ['bee', 'cow']
        assert f'24 images to train on, {len(names_test)} to test, {len(ds.classes)} ' in said.getvalue()
    with folder() as f, notes():                              # folders keep the names that they have
        write_images(f, in_classes)
        ds = data.load(f, classes=['sea lion', 'cow ', 'bee', 'ant'])
        assert ds.y_train.tolist() == [3] * 8 + [2] * 8 + [0] * 8 and ds.classes[1] == 'cow'
        with raises(ValueError, 'does not name sea lion'):
            data.load(f, classes=['ant', 'bee', 'cow'])
    with folder() as f, notes() as said:
        write_images(f, [f'Training/{name}' for name in in_classes])
        write_images(f, ['testing/bee/a.png', 'testing/b.png', 'c/d.png'])
        ds = data.load(f)
        assert ds.names_test == ['testing/bee/a.png'] and ds.classes == ['ant', 'bee', 'sea lion']
        assert len(ds.x_train) == 24 and '2 images are not used' in said.getvalue()


def test_images_are_resized_by_their_shorter_side_and_the_centre_is_cut_out():
    with folder() as f, inside(f), notes():
        ramp = np.zeros((40, 120, 3), np.uint8)
        ramp[:, :, 0] = np.arange(40)[:, None] * 6
        ramp[:, 40:80, 1] = 255                               # the centre, which is all that stays
        image = pillow().fromarray(ramp)
        exif = image.getexif()
        for name, rotation, orientation in ('a.jpg', 0, 1), ('b.jpg', 90, 6):      # "turn me by 90 degrees"
            exif[0x0112] = orientation
            image.rotate(rotation, expand=True).save(f / name, quality=100, subsampling=0, exif=exif)
        x = data.read_images(f, size=20)[0]
        wanted = (torch.arange(20) * 2 + 0.5) * 6
        assert x.shape == (2, 3, 20, 20) and x[:, 1].min() > 200
        assert abs(x[:, 0, 2:-2].double() - wanted[2:-2, None]).max() < 6
        assert data.read_images(f)[0].shape == (2, 3, 40, 40)
    with folder() as f, inside(f), notes():
        write_images(f, ['00.png', '01.png'], mode='L')
        x, names = data.read_images(f)
        assert x.shape == (2, 1, 12, 12) and names == ['00.png', '01.png']          # grey: one channel
        x, names = data.read_images(f / '01.png', 8, 3)
        assert names == ['01.png'] and x.shape == (1, 3, 8, 8) and (x == 10).all()


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
        with mock.patch.object(pillow(), 'MAX_IMAGE_PIXELS', 70):            # Pillow opens twice as many
            with raises(ValueError, f, 'holds no image that can be read', 'exceeds limit'):
                data.read_images(f, 9)
        with mock.patch.dict(sys.modules, PIL=None), raises(ValueError, 'pip install pillow'):
            data.load(f, size=9)
    with folder() as f:
        with raises(ValueError, f, 'holds no image files'):
            data.load(f)
        write_npz(f / 'a.npz', x_train=images(20)[0])
        with raises(ValueError, '--size'):
            data.load(f / 'a.npz', size=32)


def test_images_are_decoded_once_and_again_when_a_file_changes():
    names = [f'{i:02}.png' for i in range(25)]
    with folder() as f, inside(f), notes():
        write_images(f, names, size=(100, 120))
        with mock.patch.object(data, 'decode_files', wraps=data.decode_files) as decode:
            first = data.load(f)
            assert first.shape == (3, 96, 96)                 # at most
            assert data.load(f).digest == first.digest and decode.call_count == 1
            write_images(f, ['00.png', '03.png'])             # 03.png gets another colour
            changed = data.load(f)
            assert changed.x_train[3, 0, 5, 5] == 10 and decode.call_count == 2
            for path in Path('runs/.cache').iterdir():
                path.write_bytes(path.read_bytes()[:500])     # a torn file is no obstacle
            assert data.load(f).digest == changed.digest and decode.call_count == 3
        assert data.load(f, limit=20).names_train == [name for name in names if int(name[:2]) % 5 != 4]


def test_new_images_have_any_name_in_an_npz():
    x = images(5)[0]
    with folder() as f, notes():
        for key in 'x_train', 'test_images':
            write_npz(f / 'a.npz', **{key: x, 'y_train': np.zeros(3)})
            found, names = data.read_images(f / 'a.npz')
            assert names is None and np.array_equal(found[:, 0], x)
        write_npz(f / 'a.npz', y_train=np.zeros(3))
        for name, said in ('a.npz', 'wanted x, x_train or x_test'), ('none', 'No such file'):
            with raises(ValueError, f / name, said):
                data.read_images(f / name)


# -------------------------------------------------------------------------------------------- batches

def test_split_is_a_function_of_the_seed_disjoint_and_complete():
    for n, n_val, wanted in (100, 7, 7), (100, 5000, 10), (60_000, 5000, 5000), (3, 5, 1):
        a, b = data.split(n, n_val, 0)
        assert len(b) == wanted and sorted(a.tolist() + b.tolist()) == list(range(n))
    assert torch.equal(data.split(100, 7, 0)[1], data.split(100, 7, 0)[1])
    assert not torch.equal(data.split(100, 7, 0)[1], data.split(100, 7, 1)[1])


def test_batches_hold_every_image_once_in_an_order_that_seed_and_epoch_fix():
    def order(n, size, seed, epoch, start=0):
        return [(step, ids.tolist()) for step, ids in data.batches(n, size, seed, epoch, start)]

    for n, size in itertools.product((2, 3, 19, 200), (2, 3, 7, 19, 500)):
        batches = order(n, size, 0, 1)
        sizes = [len(ids) for _, ids in batches]
        assert sorted(sum((ids for _, ids in batches), [])) == list(range(n))
        assert [step for step, _ in batches] == list(range(data.steps_per_epoch(n, size)))
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2 and max(sizes) <= max(size, 3), (n, size)
        assert order(n, size, 0, 1, start=1) == batches[1:]
    assert len({str(order(50, 9, seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}) == 6


def test_images_are_resident_if_they_fit_and_the_same_batches_come_either_way():
    x = torch.from_numpy(noise(120, 3, 10, 12))
    ids = torch.randperm(120)[:50]
    transposed = x[7:60].transpose(2, 3).contiguous().transpose(2, 3)
    mapped = data.MappedImages([x[:7], x[7:7], transposed, x[60:]])
    for wanted in slice(5, 70), ids, [], 9:
        assert torch.equal(mapped[wanted], x[wanted]) and mapped[wanted].is_contiguous()
    order = [(7, torch.tensor([3, 1, 3])), *data.batches(50, 7, 0, 1)]
    for source, fits in itertools.product((x, mapped), (True, False)):
        size = x[ids].numel()                                 # half of what is free is taken
        with mock.patch.object(data, 'free_memory', return_value=2 * size - 2 * (not fits)):
            kept = data.Images(source, CPU, ids)
        assert (kept.resident is not None) == fits and kept.shape == (len(kept), 3, 10, 12)
        for (step, batch), (got_step, got, rows) in zip(order, kept.read(iter(order)), strict=True):
            assert got_step == step and torch.equal(got, batch) and torch.equal(rows, x[ids][batch])
    assert torch.equal(data.Images(x, CPU).at(ids), x[ids])
