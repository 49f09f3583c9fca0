"""What the tests share: small images, runs of ssl.py in this process or its own, and comparisons."""
import contextlib
import csv
import functools
import gc
import gzip
import importlib.util
import io
import os
import struct
import subprocess
import sys
import tempfile
import unittest
import warnings
import zlib
from multiprocessing.util import Finalize
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent.parent                 # the project's folder
sys.path[:0] = [path for path in (str(HERE), str(HERE / 'tests')) if path not in sys.path]

import numpy as np                                            # noqa: E402
import torch                                                  # noqa: E402

import cluster                                                # noqa: E402
import features                                               # noqa: E402
import runs                                                   # noqa: E402
import train                                                  # noqa: E402

torch.set_num_threads(1)                                      # tensors here are tiny
warnings.filterwarnings('ignore', 'Detected pickle protocol')             # torch's, about damaged checkpoints
IN_MEMORY = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None        # some disks are slow to open files

UNLABELLED = ('ae', 'conv', 'vae', 'simclr')
TRAINED = (*UNLABELLED, 'classify', 'query', 'cluster')       # step by step
STEPS = '--no-amp --width 0.1 --batch-size 40'
TINY = {                                                      # flags of runs of a few steps
    'ae': f'{STEPS} --epochs 2 --latent 4',
    'conv': f'{STEPS} --epochs 2 --latent 4',
    'vae': f'{STEPS} --epochs 2 --latent 4',
    'simclr': f'{STEPS} --epochs 2',
    'classify': '--no-amp --width 0.1 --epochs 2 --batch-size 2000 --labels 15',        # an epoch is 6,000
    'query': f'{STEPS} --labels 15 --rounds 2 --epochs 1 --decay-epochs 0',
    'cluster': f'{STEPS} --clusters 3 --neighbours 5 --iterations 2 --epochs 1 --decay-epochs 0',
    'scan': '--no-amp --clusters 3 --neighbours 5',
    'random': '--no-amp --width 0.1',
    'pixels': '',
    'pca': '--latent 4'}


@functools.cache
def cli():
    """The module ssl.py; under its own name it would be the standard library's."""
    spec = importlib.util.spec_from_file_location('cli', HERE / 'ssl.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def raises(kind, *words):
    """The block has to raise `kind` with one line that holds each of the words."""
    try:
        yield
    except kind as e:
        assert '\n' not in str(e) and all(str(w) in str(e) for w in words), f'{e!r} lacks one of {words}'
    else:
        raise AssertionError(f'no {kind.__name__}')


def idx(shape, values):
    """An IDX file by hand: magic, big-endian sizes, bytes."""
    return struct.pack(f'>BBBB{len(shape)}I', 0, 0, 8, len(shape), *shape) + bytes(values)


def write_idx(path, array):
    """Write an array of bytes as an IDX file, gzipped if the name ends in .gz."""
    blob = idx(array.shape, array.astype(np.uint8).tobytes())
    path.write_bytes(gzip.compress(blob) if path.suffix == '.gz' else blob)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-5):
    """Are a and b, arrays of any kind, the same to tol, absolutely and relatively?"""
    a, b = (v.detach().cpu() if isinstance(v, torch.Tensor) else v for v in (a, b))
    a, b = np.asarray(a, float), np.asarray(b, float)
    return a.shape == b.shape and np.allclose(a, b, rtol=tol, atol=tol)


@contextlib.contextmanager
def inside(cwd):
    before = os.getcwd()
    os.chdir(cwd)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def folder():
    """A new empty folder, in memory where that is possible; gone afterwards."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY, ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def place(**contents):
    """The block is in a new folder with these arrays, or `arrays()`, as tiny.npz."""
    with folder() as cwd, inside(cwd):
        write_npz(cwd / 'tiny.npz', **contents)
        yield cwd


@functools.cache
def home():
    """Where tests are that make no place of their own; it lives as long as this process."""
    there = place()
    Finalize(there, there.__exit__, (None, None, None), exitpriority=1)       # where tests run in a pool too
    return there.__enter__()


def images(n, H=10, W=12, C=1, K=3, seed=0):
    """(x (n, H, W[, 3]) uint8, y (n,)): noise with a bright band, whose place is the class."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 60, (n, H, W, C)), rng.permutation(np.arange(n) % K)
    for i, k in enumerate(y):
        x[i, k * H // K:(k + 1) * H // K] += 150
    return x.astype(np.uint8).squeeze(3) if C == 1 else x.astype(np.uint8), y


def arrays(n=120, n_test=40, **options):
    """{name: array} of a data set of `images`."""
    x_train, y_train = images(n, **options)
    x_test, y_test = images(n_test, **{'seed': 1, **options})
    return {'x_train': x_train, 'y_train': y_train, 'x_test': x_test, 'y_test': y_test}


def write_npz(path, **contents):
    np.savez(path, **(contents or arrays()))


def run(*words):
    """(exit code, stdout, stderr) of ssl.py with these words, run in this process."""
    words = [word for part in words for word in str(part).split(' ')]         # some are given as typed
    out, err, code = io.StringIO(), io.StringIO(), None
    tsne = functools.partial(features.tsne, steps=8)          # they have tests of their own
    heads = functools.partial(cluster.scan_heads, steps=200)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
            mock.patch('features.tsne', tsne), mock.patch('cluster.scan_heads', heads), \
            mock.patch('cluster.HEADS', 6):
        try:
            code = cli().main(words)
        except SystemExit as e:
            code = e.code
        if (code != 0 or 'web' in words) and os.path.exists('runs'):
            gc.collect()                                      # an exception or a server may hold a lock
    return code, out.getvalue(), err.getvalue()


def ok(*words):
    """What ssl.py with these words prints; it has to end well and say nothing on stderr."""
    code, out, err = run(*words)
    assert code == 0 and not err, (words, code, err)
    return out


def refused(*words, said=()):
    """ssl.py with these words ends with exit code 2 and one line on stderr that holds each word of `said`."""
    code, _, err = run(*words)
    assert code == 2 and err.endswith('\n') and err.count('\n') == 1, (words, code, err)
    assert all(str(w) in err for w in said), (said, err)


def tiny(method, *more):
    """Flags of a run of a few steps on tiny.npz, named after its method; `more` overrides."""
    flags = f'--method {method} --data tiny.npz --name {method} {TINY[method]}'.split()
    return [*flags, *(['--encoder', finished('simclr')] if method == 'scan' else []), *more]


def without(word, flags):
    """The flags without one and its value."""
    at = flags.index(word)
    return flags[:at] + flags[at + 2:]


@functools.cache
def finished(method):
    """Folder of a finished tiny run."""
    with inside(home()):
        ok(*tiny(method), '--overwrite')
    return home() / 'runs' / method


def pillow():
    """Pillow's Image; skips the test where it is missing."""
    try:
        import PIL.Image
    except ImportError:
        raise unittest.SkipTest('image files need Pillow') from None
    return PIL.Image


def pixels(png):
    """Pixels of a PNG whose rows lie in one chunk, unfiltered."""
    W, H, _, color = struct.unpack('>IIBB', png[16:26])
    rows = np.frombuffer(zlib.decompress(png[41:-16]), np.uint8).reshape(H, -1)
    return rows[:, 1:].reshape((H, W, 3) if color == 2 else (H, W))


def posix():
    if os.name != 'posix':
        raise unittest.SkipTest('signals, locks and file-size limits are POSIX')


@contextlib.contextmanager
def full_disk(size):
    """Writing more than `size` bytes into a file fails, half-way."""
    import resource
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def python(*words, cwd=HERE, stdin=None, stdout=subprocess.PIPE, **env):
    """A started process: this Python with these words, in a folder."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONUNBUFFERED': '', **env}
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, text=True, stdin=stdin,
                            stdout=stdout, stderr=subprocess.PIPE, env=env, errors='replace')


def logged(run_folder):
    """Rows of a run's log without times."""
    times = ('seconds', 'images_per_s')
    return [{k: v for k, v in row.items() if k not in times} for row in runs.read_log(run_folder)]


def measured(run_folder):
    """A run's metrics without times."""
    metrics = runs.read_json(run_folder / 'metrics.json')
    return {k: v for k, v in metrics.items() if 'seconds' not in k}


def weights(run_folder, name='checkpoint.pt'):
    """{path: value} of all that a run's checkpoint holds, without the seconds it took."""
    state = torch.load(run_folder / name, map_location='cpu', weights_only=True)
    return {path: value for path, value in flat(state) if not path.startswith('/seconds')}


def flat(state, path=''):
    """(path, value) of every leaf of nested dicts, lists and tuples; a tensor as type, shape and bytes."""
    if isinstance(state, dict):
        state = list(state.items())
    elif isinstance(state, (list, tuple)):
        state = list(enumerate(state))
    elif isinstance(state, torch.Tensor):
        blob = state.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield path, (str(state.dtype), tuple(state.shape), blob)
        return
    else:
        yield path, state
        return
    for key, value in state:
        yield from flat(value, f'{path}/{key}')


def drawn(run_folder):
    """{name: bytes} of a run's images."""
    return {p.name: p.read_bytes() for p in run_folder.glob('*.png')}


def rows_of(path):
    """Rows of a CSV file by its header."""
    return list(csv.DictReader(path.open(encoding='utf-8')))


def results(run_folder):
    """{name: content without times} of all that a finished run leaves and that has to be the same."""
    found = {'log': logged(run_folder), 'metrics': measured(run_folder), **drawn(run_folder)}
    found.update({path.name: path.read_bytes() for path in run_folder.glob('*.csv')})
    for path in run_folder.glob('*.pt'):
        if path.name != 'checkpoint.previous.pt':
            found[path.name] = weights(run_folder, path.name)
    return found


def differences(a, b):
    """Names of what two dicts do not have in common."""
    return sorted(key for key in {*a, *b} if a.get(key) != b.get(key))


def assert_same_run(a, b):
    """Weights, optimizer, losses, measures, images and tables of two runs are equal to the bit."""
    assert not differences(results(a), results(b)) and logged(a)


class Killed(BaseException):
    """Ends a run on the spot, as kill -9 does: nothing is caught, saved or tidied."""


@contextlib.contextmanager
def stopping(how):
    """A run takes one step and then gets the signal `how`, or is Killed before its next step."""
    steps, update = [], train.Trainer._update

    def one(*given):
        if how is Killed and steps:
            raise Killed
        loss = update(*given)
        if how is not Killed and not steps:
            os.kill(os.getpid(), how)
        steps.append(1)
        return loss
    every = 1e-9 if how is Killed else train.SAVE_EVERY       # seconds between checkpoints
    with mock.patch.object(train.Trainer, '_update', one), mock.patch.object(train, 'SAVE_EVERY', every):
        yield


home()                                                        # go there
