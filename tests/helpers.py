"""What the tests share: small images, runs of ssl.py in this process or its own, and comparisons."""
import contextlib
import functools
import gc
import gzip
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
import unittest
import warnings
from pathlib import Path
from unittest import mock

HERE = Path(__file__).resolve().parent.parent                 # the project's folder
sys.path[:0] = [path for path in (str(HERE), str(HERE / 'tests')) if path not in sys.path]

import numpy as np                                            # noqa: E402
import torch                                                  # noqa: E402

torch.set_num_threads(1)                                      # tensors here are tiny
warnings.filterwarnings('ignore', 'Detected pickle protocol')             # torch's, about damaged checkpoints
IN_MEMORY = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None        # some disks are slow to open files

UNLABELLED = ('ae', 'conv', 'vae', 'simclr')
TRAINED = (*UNLABELLED, 'classify', 'query', 'cluster')       # step by step
METHODS = (*TRAINED, 'scan', 'random', 'pixels', 'pca')


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


def write_idx(path, array):
    """Write an array of uint8 as an IDX file, gzipped if the name ends in .gz."""
    header = b'\0\0\x08' + bytes([array.ndim]) + np.array(array.shape, '>u4').tobytes()
    blob = header + array.astype(np.uint8, casting='safe').tobytes()
    Path(path).write_bytes(gzip.compress(blob) if str(path).endswith('.gz') else blob)


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def as_float64(value):
    if isinstance(value, torch.Tensor):
        return value.detach().double().cpu().numpy()
    return np.asarray(value, float)


def close(a, b, tol=1e-5):
    """Are a and b, arrays of any kind, the same to tol, absolutely and relatively?"""
    a, b = as_float64(a), as_float64(b)
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
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        yield Path(name)


@contextlib.contextmanager
def place(**contents):
    """A new folder with these arrays, or `arrays()`, as tiny.npz."""
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **contents)
        yield cwd


@functools.cache
def home():
    """A place that lives as long as this process."""
    home.keep = place()
    return home.keep.__enter__()


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


def run(*words, cwd=None):
    """(exit code, stdout, stderr) of ssl.py with these words, run in this process in the folder cwd."""
    import cluster
    import features
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.ExitStack() as stack:
        stack.enter_context(inside(cwd or home()))
        stack.enter_context(mock.patch.object(cluster, 'HEADS', 6))
        for module, name, steps in (features, 'tsne', 8), (cluster, 'scan_heads', 200):
            quick = functools.partial(getattr(module, name), steps=steps)      # they have tests of their own
            stack.enter_context(mock.patch.object(module, name, quick))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli().main([str(word) for word in words])
            except SystemExit as e:
                code = e.code
        if (code != 0 or 'web' in words) and os.path.exists('runs'):
            gc.collect()                                      # an exception or a server may hold a lock
    return code, out.getvalue(), err.getvalue()


def ok(*words, cwd=None):
    """What ssl.py with these words prints; it has to end well and say nothing on stderr."""
    code, out, err = run(*words, cwd=cwd)
    assert code == 0 and not err, (words, code, err)
    return out


def refused(*words, cwd=None, said=()):
    """ssl.py with these words ends with exit code 2 and one line on stderr that holds each word of `said`."""
    code, _, err = run(*words, cwd=cwd)
    assert code == 2 and err.endswith('\n') and err.count('\n') == 1, (words, code, err)
    assert all(str(w) in err for w in said), (said, err)


def tiny(method, *more):
    """Flags of a run of a few steps on tiny.npz, named after its method; `more` overrides."""
    flags = ['--method', method, '--data', 'tiny.npz', '--name', method]
    if method not in ('pixels', 'pca'):
        flags += ['--no-amp']
    if method not in ('pixels', 'pca', 'scan'):
        flags += ['--width', 0.1]
    if method in ('ae', 'conv', 'vae', 'pca'):
        flags += ['--latent', 4]
    if method in UNLABELLED:
        flags += ['--epochs', 2, '--batch-size', 40]
    if method == 'classify':                                  # an epoch is 6,000 images
        flags += ['--epochs', 2, '--batch-size', 2000, '--labels', 15]
    if method == 'query':                                     # two rounds of an epoch each
        flags += ['--batch-size', 40, '--budget', 15, '--rounds', 2, '--round-epochs', 1, '--decay-epochs', 0]
    if method in ('cluster', 'scan'):
        flags += ['--clusters', 3, '--neighbours', 5]
    if method == 'scan':
        flags += ['--encoder', finished('simclr')]
    if method == 'cluster':                                   # two iterations of an epoch each
        flags += ['--batch-size', 40, '--iterations', 2, '--epochs', 1, '--decay-epochs', 0]
    return [*flags, *more]


@functools.cache
def finished(method):
    """Folder of a finished tiny run."""
    ok(*tiny(method), '--overwrite')
    return home() / 'runs' / method


@contextlib.contextmanager
def modules(**stand_ins):
    """Modules by name, '_' for '.', stand in for those of Python, None for none."""
    stand_ins = {name.replace('_', '.'): module for name, module in stand_ins.items()}
    before = {name: sys.modules[name] for name in stand_ins if name in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name in stand_ins:
            del sys.modules[name]
        sys.modules.update(before)


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
    import runs
    times = ('seconds', 'images_per_s')
    return [{k: v for k, v in row.items() if k not in times} for row in runs.read_log(run_folder)]


def measured(run_folder):
    """A run's metrics without times."""
    import runs
    metrics = runs.read_json(run_folder / 'metrics.json')
    return {k: v for k, v in metrics.items() if 'seconds' not in k}


def weights(run_folder):
    """{path: value} of all that a run's checkpoint holds, without the seconds it took."""
    state = torch.load(run_folder / 'checkpoint.pt', map_location='cpu', weights_only=True)
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


def assert_same_run(a, b):
    """Weights, optimizer, losses, measures and images of two runs are equal to the bit."""
    assert weights(a) == weights(b)
    assert logged(a) == logged(b) and logged(a)
    assert measured(a) == measured(b) and drawn(a) == drawn(b)


class Killed(BaseException):
    """Ends a run on the spot, as kill -9 does: nothing is caught, saved or tidied."""


@contextlib.contextmanager
def stopping(how):
    """A run takes one step and then gets the signal `how`, or is Killed before its next step."""
    import train
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
