"""Tests: `python test_all.py` runs them all, `python test_all.py WORD` those whose name holds the word.
`python test_all.py --fuzz N` reads N spoilt files, `--soak MINUTES` kills and resumes runs for so long.

On a CPU, with no data set and no download, in about a minute; pytest runs them too. Each maths test compares
with an independent form written out in it. The command line runs in this process, except where a process
has to be killed, or imports and pipes are what is tested.
"""
import ast
import base64
import contextlib
import csv
import dataclasses
import errno
import functools
import gc
import gzip
import hashlib
import http.client
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import statistics
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import tracemalloc
import unittest
import urllib.error
import urllib.parse
import urllib.request
import warnings
import xml.etree.ElementTree
import zipfile
import zlib
from pathlib import Path
from unittest import mock

import numpy as np
import scipy.ndimage
import scipy.optimize
import scipy.spatial
import torch

import bench
import cluster
import clustering
import data
import distributed
import evaluate
import fetch
import formats
import labels
import losses
import nets
import oracle
import page
import querying
import recipes
import report
import represent
import runs
import search
import stages
import train
import tsne

HERE = Path(__file__).resolve().parent
spec = importlib.util.spec_from_file_location('cli', HERE / 'ssl.py')     # under its own name it is the standard's
cli = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cli)
torch.set_num_threads(1)                                                  # tensors here are tiny
warnings.filterwarnings('ignore', 'Detected pickle protocol')            # torch's, about damaged checkpoints
IN_MEMORY = '/dev/shm' if os.access('/dev/shm', os.W_OK) else None        # some disks take 2 ms to open a file


# helpers -----------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def raises(kind, *words):
    """The block has to raise `kind` with one line that holds each of the words."""
    try:
        yield
    except kind as e:
        assert '\n' not in str(e) and all(str(w) in str(e) for w in words), f'{e!r} lacks one of {words}'
    else:
        raise AssertionError(f'no {kind.__name__}')


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def close(a, b, tol=1e-5):
    """Are a and b, arrays of any kind, the same to tol, absolutely and relatively?"""
    a, b = (v.detach().double().numpy() if isinstance(v, torch.Tensor) else np.asarray(v, float) for v in (a, b))
    return a.shape == b.shape and np.allclose(a, b, rtol=tol, atol=tol)


@functools.cache
def home():
    """A folder that lives as long as this process, with tiny.npz in it."""
    home.keep = tempfile.TemporaryDirectory(dir=IN_MEMORY)
    write_npz(Path(home.keep.name) / 'tiny.npz')
    return Path(home.keep.name)


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
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as name:
        yield Path(name)


def pictures(n, H=10, W=12, C=1, K=3, seed=0):
    """(x (n, H, W[, 3]) uint8, y (n,)): noise with a bright band, whose place is the class."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 60, (n, H, W, C)), rng.permutation(np.arange(n) % K)
    for i, k in enumerate(y):
        x[i, k * H // K:(k + 1) * H // K] += 150
    return x.astype(np.uint8).squeeze(3) if C == 1 else x.astype(np.uint8), y


def arrays(n=120, n_test=40, **kwargs):
    (x, y), (xt, yt) = pictures(n, **kwargs), pictures(n_test, **{'seed': 1, **kwargs})
    return {'x_train': x, 'y_train': y, 'x_test': xt, 'y_test': yt}


def write_npz(path, **kwargs):
    np.savez(path, **(kwargs or arrays()))


def run(*words, cwd=None):
    """(exit code, stdout, stderr) of ssl.py with these words, run in this process in the folder cwd."""
    out, err, code, before = io.StringIO(), io.StringIO(), None, os.getcwd()
    os.chdir(cwd or home())
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main([str(w) for w in words])
            except SystemExit as e:
                code = e.code
    finally:
        if (code != 0 or err.getvalue()) and os.path.exists('runs'):
            gc.collect()                                                  # an exception's frames may hold a lock
        os.chdir(before)
    return code, out.getvalue(), err.getvalue()


def refused(*words, cwd=None, said=()):
    """ssl.py with these words ends with exit code 2 and one line on stderr that holds each word of `said`."""
    code, out, err = run(*words, cwd=cwd)
    assert code == 2 and err.count('\n') == 1 and err.endswith('\n') and 'Traceback' not in err, (words, code, err)
    assert all(str(w) in err for w in said), (said, err)


def tiny(method, *more):
    """Flags of a run of six steps, two epochs, on tiny.npz."""
    flags = ['--method', method, '--data', 'tiny.npz', '--name', method]
    if method not in ('pixels', 'pca'):
        flags += ['--no-amp', '--width', 0.1]
    if method in ('ae', 'conv', 'vae', 'pca'):
        flags += ['--latent', 4]
    if method in UNLABELLED:
        flags += ['--epochs', 2, '--batch-size', 40]
    if method == 'classify':                                              # an epoch is 6,000 pictures
        flags += ['--epochs', 2, '--batch-size', 2000, '--labels', 15]
    if method == 'query':                                                 # two rounds of an epoch each
        flags += ['--batch-size', 40, '--budget', 15, '--rounds', 2, '--round-epochs', 1, '--closing', 0]
    if method in ('cluster', 'scan'):                                     # two iterations of an epoch each
        flags += ['--clusters', 3, '--batch-size', 40, '--epochs', 1, '--iterations', 2, '--closing', 0,
                  '--neighbours', 5, '--stable', 0, *['--heads', 3] * (method == 'scan')]
    return flags + list(more)


UNLABELLED = ('ae', 'conv', 'vae', 'simclr')
HEADED = ('classify', 'query', 'cluster', 'scan')
TRAINED = (*UNLABELLED, *HEADED)


def only_training():
    """What only trains: nothing is measured."""
    stack = contextlib.ExitStack()
    for module, name in (represent, 'finish'), (querying, 'score'), (clustering, 'score'):
        stack.enter_context(mock.patch.object(module, name, lambda *_: None))
    return stack


@functools.cache
def finished(method):
    """Folder of a finished tiny run."""
    code, out, err = run(*tiny(method))
    assert code == 0 and not err, err
    return home() / 'runs' / method


@contextlib.contextmanager
def modules(**stand_ins):
    """Modules by name, '_' for '.', stand in for those of Python, None for none; what else is imported stays."""
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
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=cwd, text=True, stdin=stdin, stdout=stdout,
                            stderr=subprocess.PIPE, env=env)


def weights(run_folder):
    """Checkpoint of a run without the seconds it took."""
    state = runs.load_checkpoint(run_folder / 'checkpoint.pt')
    return {k: v for k, v in state.items() if k != 'seconds'}


def logged(run_folder):
    """Rows of its log without times."""
    return [{k: v for k, v in row.items() if k not in ('seconds', 'images_per_s')}
            for row in runs.read_log(run_folder)]


def measured(run_folder):
    """Its metrics without times."""
    metrics = runs.read_json(run_folder / 'metrics.json')
    return {k: v for k, v in metrics.items() if 'seconds' not in k}


def drawn(run_folder):
    """{name: bytes} of its pictures."""
    return {p.name: p.read_bytes() for p in run_folder.glob('*.png')}


def assert_same_run(a, b):
    """Weights, optimizer, losses, measures and pictures of two runs are equal to the bit."""
    a_state, b_state = weights(a), weights(b)
    assert a_state.keys() == b_state.keys() and runs.state_digest(a_state) == runs.state_digest(b_state)
    assert logged(a) == logged(b) and logged(a)
    assert measured(a) == measured(b) and drawn(a) == drawn(b)


# ssl.py ------------------------------------------------------------------------------------------------------

STANDARD = os.path.join(os.path.dirname(os.__file__), 'ssl.py')
THREADS_AND_A_WORKER = f'''
import multiprocessing, threading
seen, together = [], threading.Barrier(16)
def load():
    together.wait()
    import ssl
    ssl.create_default_context()
    seen.append((id(ssl), ssl.__file__))
threads = [threading.Thread(target=load) for _ in range(16)]
for t in threads: t.start()
for t in threads: t.join()
assert len(seen) == 16 and len(set(seen)) == 1 and seen[0][1] == {STANDARD!r}, seen
ask = "__import__('ssl').create_default_context() and __import__('ssl').__file__"
if __name__ == '__main__':
    with multiprocessing.get_context('spawn').Pool(1) as pool:
        assert pool.apply(eval, (ask,)) == {STANDARD!r}
'''


def test_import_ssl_in_this_folder_is_the_standard_library():
    with folder() as temporary:
        worker = temporary / 'worker.py'
        worker.write_text(f'import ssl\nssl.create_default_context()\nassert ssl.__file__ == {STANDARD!r}, ssl')
        processes = {
            'torchrun': python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 1, worker,
                               PYTHONPATH=str(HERE)),
            'main': python('-c', 'import ssl; ssl.create_default_context(); print(ssl.__file__)'),
            'threads': python('-c', THREADS_AND_A_WORKER)}
        for module in ('pip', 'pytest'):
            if importlib.util.find_spec(module):
                processes[module] = python('-m', module, *(['help', 'install'] if module == 'pip' else ['--version']))
        for name, process in processes.items():
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and 'Traceback' not in err, (name, err)
            assert name != 'main' or out.strip() == STANDARD


def test_help_and_a_mistyped_flag_answer_before_torch_is_imported():
    for words, code, said in (['--help'], 0, '--method'), (['--metod', 'ae'], 2, 'did you mean --method?'):
        began = time.monotonic()
        process = python('-X', 'importtime', HERE / 'ssl.py', *words)
        out, err = process.communicate(timeout=60)
        imported = {line.split('|')[-1].strip() for line in err.splitlines() if line.startswith('import time:')}
        assert 'argparse' in imported and not imported & {'torch', 'numpy', 'scipy', 'data', 'train'}
        assert process.returncode == code and said in out + err and time.monotonic() - began < 10


def flags():
    """{dest: argparse action} of every flag but --help."""
    return {a.dest: a for a in cli.make_parser()._actions if a.dest != 'help'}


def test_help_shows_every_flag_with_its_default():
    text = ''.join(cli.make_parser().format_help().split())               # lines break anywhere
    plain, _, _ = cli.parse(['--method', 'pixels'])
    for dest, action in flags().items():
        assert all(option in text for option in action.option_strings)
        assert ''.join((action.help % {}).split()) in text, dest
        per = cli.PER_METHOD.get(dest, {})
        default = getattr(plain, dest, None)
        if dest in ('seed', 'perplexity'):
            assert f'(default: {default})' in action.help
        else:
            assert dest in cli.PER_METHOD or dest == 'method' or default in (None, False)
        for method, value in per.items():
            if value is not None:
                assert getattr(cli.parse(['--method', method])[0], dest) == value
                assert f'{method} {value}' in action.help or f'(default: {value}' in action.help, (dest, method)
    assert 'pythonssl.py--method' in text


def test_every_flag_is_read_somewhere():
    read, sources = set(), [ast.parse((HERE / name).read_text()) for name in (
        'ssl.py', 'recipes.py', 'stages.py', 'represent.py', 'querying.py', 'clustering.py', 'search.py')]
    for node in itertools.chain(*map(ast.walk, sources)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == 'args':
            read.add(node.attr)
        if isinstance(node, ast.Compare) and getattr(node.comparators[0], 'id', '') == 'typed':
            read.add(getattr(node.left, 'value', ''))
        if isinstance(node, ast.Call) and ast.unparse(node).startswith('getattr(args, '):
            read.add(node.args[1].value)
    assert not set(flags()) - read, set(flags()) - read


def takers(dest):
    """Methods that take the flag."""
    return list(cli.PER_METHOD.get(dest, cli.METHODS))


def test_a_wrong_value_of_any_number_flag_is_one_line_and_starts_nothing():
    numbers = {d: a for d, a in flags().items() if a.type and 'number' in a.type.__qualname__}
    assert len(numbers) > 20
    wrong = ['-1', '-1e9', 'nan', 'inf', '1e999', '9' * 400, '', 'abc', '1,5', '0x10', '--lr']
    zero = {'seed', 'epochs', 'weight_decay', 'warmup', 'patience', 'min_delta', 'noise', 'beta', 'rotate',
            'jitter', 'grey', 'blur', 'cutout', 'mixup', 'sam', 'closing', 'threshold', 'audit', 'stable', 'entropy',
            'ema', 'perplexity', 'iterations'}                   # where 0 is a value like others
    with folder() as cwd, mock.patch.object(recipes, 'main', side_effect=AssertionError('work was started')):
        for dest, action in numbers.items():
            for text in wrong + ['0'] * (dest not in zero) + ['1.5'] * (dest == 'epochs'):
                option = action.option_strings[0]
                refused('--method', takers(dest)[0], option, text, cwd=cwd, said=[option])
                refused('--method', takers(dest)[0], f'{option}={text}', cwd=cwd, said=[option])
        assert not list(cwd.iterdir())


def test_a_wrong_word_is_one_line_and_starts_nothing():
    with folder() as cwd:
        for words, said in (
                ([], 'say what to do'), (['--method'], '--method'), (['--method', ''], 'wanted one of'),
                (['--method', 'simclrr'], 'did you mean simclr?'), (['--method', 'VAE'], 'did you mean vae?'),
                (['--method', 'conv', '--net', 'resent'], 'resnet'),
                (['--method', 'ae', 'extra'], 'extra is not known'), (['--meth', 'ae'], '--method?'),
                (['--method', 'vae', '--likelihood', 'gauss'], 'gaussian'),
                (['--method', 'ae', '--schedule', 'linear'], 'wanted one of'),
                (['--method', 'ae', '--resume', '--overwrite'], 'exclude'),
                (['--method', 'ae', '--data', 'no/such'], 'does not exist'),
                (['--method', 'ae', '--data', cwd], 'train-images-idx3-ubyte'),
                (['--method', 'ae', '--data', HERE / 'ssl.py'], 'not a readable .npz'),
                (['--evaluate', 'runs/none'], 'runs/none'), (['--compare', 'runs/none'], 'runs/none'),
                (['--evaluate', ''], ''), (['--show-views', '', '--data', home() / 'tiny.npz'], ''),
                (['--show-views', 'no/such/x.png', '--data', home() / 'tiny.npz'], 'no/such'),
                *((['--method', 'ae', '--name', name], '--name') for name in ('', '.', '..', 'a/b', '/x/y', 'x/'))):
            with mock.patch.object(data, 'find_fashion_mnist', side_effect=ValueError('Fashion-MNIST was wanted')):
                refused(*words, cwd=cwd, said=[said])
        assert not list(cwd.iterdir())


def test_an_empty_data_flag_is_not_taken_for_fashion_mnist():
    with folder() as cwd, mock.patch.object(data, 'find_fashion_mnist', side_effect=AssertionError('looked for it')):
        refused('--method', 'ae', '--data', '', cwd=cwd, said=['--data'])
        assert not list(cwd.iterdir())


def test_a_device_that_can_not_be_used_is_one_line_and_starts_nothing():
    with folder() as cwd:
        for name in ['', 'gpu', 'cuda:99', 'cpu:x', 'meta', 'hpu', 'xla', 'mtia', 'privateuseone']:
            refused(*tiny('ae'), '--data', home() / 'tiny.npz', '--device', name, cwd=cwd, said=['--device'])
        assert not list(cwd.iterdir())


def test_a_flag_that_does_not_belong_to_the_method_is_refused():
    assert {d for d in cli.PER_METHOD} <= set(flags())
    with folder() as cwd:
        for dest, action in flags().items():
            if dest in cli.PER_METHOD:
                default = next(iter(cli.PER_METHOD[dest].values()))
                value = [] if action.nargs == 0 else ['1' if default is None else str(default)]
                for method in set(cli.METHODS) - set(takers(dest)):
                    refused('--method', method, action.option_strings[0], *value, cwd=cwd, said=['it is for'])
        assert not list(cwd.iterdir())


def test_a_flag_that_a_command_would_ignore_is_refused():
    with folder() as cwd:
        refused('--method', 'ae', '--show-views', 'v.png', '--data', home() / 'tiny.npz', cwd=cwd, said=['simclr'])
        for command in ['--compare'], ['--fetch'], ['--evaluate', finished('ae')]:
            with mock.patch.object(data, 'find_fashion_mnist', return_value='nowhere'):
                refused(*command, '--tau', 0.3, cwd=cwd, said=['--tau'])
        assert not list(cwd.iterdir())


def test_every_training_flag_changes_what_is_trained():
    other = {'net': 'conv', 'width': 0.3, 'latent': 3, 'epochs': 2, 'lr': 0.01, 'weight_decay': 0.5, 'warmup': 3,
             'batch_size': {**dict.fromkeys(TRAINED, 8), 'classify': 2500},
             'schedule': {**dict.fromkeys(TRAINED, 'constant'), 'ae': 'cosine'},
             'sam': 0.5, 'budget': 12, 'rounds': 1, 'round_epochs': 2, 'closing': 1, 'ema': 0.05, 'threshold': 0.1,
             'audit': 0.5, 'clusters': 2, 'iterations': {'cluster': 1, 'scan': 1}, 'neighbours': {'scan': 3},
             'entropy': {'scan': 0.1}, 'heads': {'scan': 1},
             'noise': 0.3, 'beta': 3, 'likelihood': 'gaussian', 'tau': 1, 'crop': 0.9, 'rotate': 90, 'jitter': 0,
             'blur': 1, 'cutout': 0.5, 'flip': '--no-flip', 'amp': '--amp', 'freeze': '--freeze', 'labels': 12,
             'pick': {'classify': 'coverage', 'query': 'random'}, 'head': 'mlp',
             'mixup': {'classify': 0, 'cluster': 1}, 'seed': 1, 'limit': 30,
             'val': dict.fromkeys(UNLABELLED, 1)}
    elsewhere = {'oracle', 'answers', 'classes', 'patience', 'min_delta', 'save_every', 'method', 'evaluate', 'compare',
                 'show_views', 'fetch', 'search', 'over', 'data', 'dataset', 'name', 'resume', 'overwrite', 'device',
                 'encoder', 'until', 'stable', 'perplexity', 'tensorboard', 'export', 'predict', 'list',
                 'deterministic', 'grey'}
    assert set(other) | elsewhere == set(flags()), 'a flag without a test'
    with folder() as cwd, only_training():
        x, y = pictures(45, 8, 8)
        write_npz(cwd / 'small.npz', x_train=x, y_train=y)
        def trained(method, *more):
            batch = 3000 if method == 'classify' else 14
            once = ['--epochs', 1] if method in takers('epochs') else []
            code, _, err = run(*tiny(method), '--data', 'small.npz', *once, '--warmup', 0,
                               '--batch-size', batch, '--overwrite', *more, cwd=cwd)
            assert code == 0, err
            return runs.state_digest(runs.load_checkpoint(cwd / 'runs' / method / 'checkpoint.pt')['model'])
        for method in TRAINED:
            plain = trained(method)
            assert trained(method) == plain
            for dest, value in other.items():
                if method in takers(dest):
                    value = value.get(method) if isinstance(value, dict) else value
                    if value is None:                                     # no pictures are kept for validation
                        continue
                    words = [value] if str(value).startswith('--') else ['--' + dest.replace('_', '-'), value]
                    assert trained(method, *words) != plain, (method, dest)


def test_training_stops_early_by_patience_and_min_delta():
    with folder() as cwd, only_training():
        write_npz(cwd / 'tiny.npz')
        for patience, min_delta, epochs in (5, 0.001, 6), (1, 1e5, 2), (2, 1e5, 3), (0, 1e5, 6), (1, 0, 6):
            code, _, err = run(*tiny('ae'), '--epochs', 6, '--overwrite', '--patience', patience,
                               '--min-delta', min_delta, cwd=cwd)
            assert code == 0 and len(logged(cwd / 'runs' / 'ae')) == epochs, (patience, min_delta, err)


# cluster.py -------------------------------------------------------------------------------------------------

def test_neighbours_are_the_nearest_by_cosine_without_the_picture_itself():
    for n, k in (500, 4), (500, 20), (64, 63), (9, 4):
        h = randn(n, 5, seed=1)
        cosine = 1 - scipy.spatial.distance.cdist(h.double().numpy(), h.double().numpy(), 'cosine')
        np.fill_diagonal(cosine, -2)
        with mock.patch.object(evaluate, 'CHUNK', 3000):
            assert cluster.neighbours(h, k).tolist() == np.argsort(-cosine, axis=1)[:, :k].tolist()
    equal = cluster.neighbours(torch.ones(100, 3), 7)                     # itself need not be among the first 8 then
    assert equal.shape == (100, 7) and all(i not in row for i, row in enumerate(equal.tolist()))


def test_the_scan_loss_is_equation_2_and_least_when_sure_agreed_and_balanced():
    p, q = randn(6, 3, seed=1).softmax(1), randn(6, 3, seed=2).softmax(1)
    agree = sum(math.log(sum(float(p[i, k] * q[i, k]) for k in range(3))) for i in range(6)) / 6
    mean = [sum(float(p[i, k]) for i in range(6)) / 6 for k in range(3)]
    assert close(losses.scan(p, q, 2.0), -agree + 2 * sum(m * math.log(m) for m in mean))
    sure = torch.eye(3).repeat(2, 1)
    assert close(losses.scan(sure, sure, 5.0), -5 * math.log(3)) and close(losses.scan(sure[:1], sure[:1], 5.0), 0)
    both = losses.scan(torch.stack([p, q]), torch.stack([q, q]), 2.0)
    assert close(both, torch.stack([losses.scan(p, q, 2.0), losses.scan(q, q, 2.0)]))


def test_scan_heads_find_blobs_and_agree_on_the_names():
    h, blob = blobs()
    near = cluster.neighbours(h, 5)
    probs = cluster.scan_heads(h, near, 3, heads=8, steps=600, batch=64)
    assert evaluate.hungarian_accuracy(probs.argmax(1), blob)[0] == 1 and close(probs.sum(1), torch.ones(60))
    assert probs.max(1).values.min() > 0.75                                # heads that name differently would blur it
    assert close(cluster.scan_heads(h, near, 3, heads=8, steps=600, batch=64), probs, 1e-5)
    with mock.patch.object(cluster, 'BYTES', 4 * 60 * 3 * 2 + 1):          # memory for two heads
        two = cluster.scan_heads(h, near, 3, heads=8, steps=600, batch=64)
    assert close(two, cluster.scan_heads(h, near, 3, heads=2, steps=600, batch=64), 1e-6)
    assert not close(two, probs, 1e-5)


def test_what_is_said_of_pictures_is_passed_on_to_their_nearest_neighbours():
    g = data.generator('cpu', 4)
    near, said = cluster.neighbours(torch.randn(60, 4, generator=g), 12), torch.rand(60, 3, generator=g)
    step = np.zeros((60, 60))                                              # of a walk along the graph of the 10 nearest
    step[np.arange(60)[:, None], near[:, :10]] = 1 / 10
    assert close(cluster.passed_on(said, near), np.linalg.matrix_power(step, 5) @ said.double().numpy(), 1e-6)
    h, blob = blobs()
    said = torch.eye(3)[blob]
    said[::7] = said[::7].roll(1, 1)                                       # nine of 60 in a wrong cluster
    assert torch.equal(cluster.passed_on(said, cluster.neighbours(h, 12)).argmax(1), blob)


def test_of_the_heads_that_half_decides_whose_clusters_neighbours_share_most():
    h = torch.randn(200, 4, generator=data.generator('cpu', 6))
    near, said, judged = cluster.neighbours(h, 12), [], []
    with mock.patch.object(cluster, 'passed_on', lambda probs, near: said.append(probs) or probs):
        probs = cluster.scan_heads(h, near, 3, heads=5, steps=3, batch=64)
    for one in said[:5]:                                                   # hardly trained: they differ
        pred = one.argmax(1)
        same = sum(int(pred[j] == pred[i]) for i in range(200) for j in near[i]) / near.numel()
        sizes = [c / 200 for c in pred.bincount().tolist() if c]
        judged.append(-math.log(same) + 5 * sum(s * math.log(s) for s in sizes))
    assert len(set(judged)) == 5
    kept = sorted(range(5), key=judged.__getitem__)[:3]
    first, total = said[kept[0]].argmax(1), 0
    for head in kept:                                                      # of all ways to name its clusters the best
        total += max((said[head][:, list(order)] for order in itertools.permutations(range(3))),
                     key=lambda named: (named.argmax(1) == first).sum())
    assert len(said) == 6 and close(probs, total / 3, 1e-6)


def test_the_criterion_sees_neighbours_and_sizes_and_one_cluster_for_all_is_worst():
    h, blob = blobs()
    near = cluster.neighbours(h, 5)
    right, one = cluster.criterion(blob, near, 3), cluster.criterion(torch.zeros_like(blob), near, 3)
    assert close(right, -5 * math.log(3)) and close(one, 0)
    for seed in range(20):
        other = torch.randint(3, (60,), generator=data.generator('cpu', seed))
        assert right < cluster.criterion(other, near, 3)
    swapped = blob.clone()
    swapped[:10] = 2
    same = sum(int(swapped[j] == swapped[i]) for i in range(60) for j in near[i]) / near.numel()
    sizes = [c / 60 for c in swapped.bincount().tolist()]
    assert close(cluster.criterion(swapped, near, 3, 2.0), -math.log(same) + 2 * sum(s * math.log(s) for s in sizes))


def test_reliable_pictures_are_those_of_each_cluster_whose_neighbours_are_surest_of_it():
    probs = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4], [0.4, 0.6], [0.1, 0.9]])
    near = torch.tensor([[1, 2], [2, 3], [3, 4], [0, 1], [5, 5], [4, 4]])   # in cluster 0: .75, .65, .5, .85
    assert cluster.reliable(probs, near).tolist() == [0, 3, 4]              # in cluster 1: .9, .6
    assert cluster.reliable(probs, near, 0.1).tolist() == [3, 4] and len(cluster.reliable(probs, near, 1.0)) == 6


def test_unseen_pictures_are_assigned_by_a_vote_of_their_neighbours():
    h, blob = blobs()
    out = stages.Neighbours(lambda x: x, h, torch.eye(4)[blob], 7).say(h[:9] + 0.01)
    cosine = 1 - scipy.spatial.distance.cdist(h[:9].numpy() + 0.01, h.numpy(), 'cosine')
    for row, near in zip(out, np.argsort(-cosine, axis=1)[:, :7]):
        assert close(row[:4], [sum(int(blob[i]) == c for i in near) / 7 for c in range(4)])
    assert close(out[:, 4:], h[:9] + 0.01)


def test_clusters_keep_their_names_whatever_the_order_they_are_found_in():
    before = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    for names in itertools.permutations(range(4), 3):
        found = torch.tensor(names)[before]
        found[3] = names[0]
        after = cluster.match(found, before, 4)
        assert after.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert sorted(cluster.match(torch.tensor([3, 2, 1, 0]), torch.tensor([0, 0, 1, 1]), 4).tolist()) == [0, 1, 2, 3]


def test_clusters_are_scored_with_the_names_that_training_labels_give_them_and_unmatched_ones_are_wrong():
    a = arrays(60, 30)
    ds = data._dataset('tiny', a)
    for K in 2, 3, 5:                                                      # fewer, as many and more than classes
        where = {p.tobytes(): i for i, p in enumerate(a['x_test'])}
        pred = [(int(k) + (i % 5 == 0)) % K for i, k in enumerate(a['y_test'])]
        def probs(x, pred=pred, where=where, K=K):
            ids = [where.get((p[0] * 255).round().byte().numpy().tobytes(), 0) for p in x]
            return torch.cat([torch.nn.functional.one_hot(torch.tensor([pred[i] for i in ids]), K), x[:, 0, 0, :4]], 1)
        train = torch.tensor([int(k) % K for k in a['y_train']])
        m, shown = evaluate.measure_clusters(ds, probs, K, train)
        assert shown['clusters'].tolist() == pred and shown['h'].shape == (30, 4)
        best = max(itertools.permutations([*range(3), *[-1] * max(0, K - 3)], K),
                   key=lambda p: sum(p[c] == k for c, k in zip(train.tolist(), a['y_train'])))
        named = [best[c] for c in pred]
        assert close(m['acc'], np.mean([n == k for n, k in zip(named, a['y_test'])])) and m['clusters'] == K
        for k in range(3):
            hit = sum(n == y == k for n, y in zip(named, a['y_test']))
            assert close(m['f1'][k], 2 * hit / max(1, named.count(k) + list(a['y_test']).count(k)))
        assert m['split'] == 'test' and m['mapping'] == 'training' and m['live_clusters'] == len(set(pred))
    del a['y_train'], a['y_test']
    m, _ = evaluate.measure_clusters(data._dataset('tiny', a), probs, K, train)
    assert 'acc' not in m and m['left_out'] and sum(m['sizes']) == 30


def test_an_assignment_that_collapses_is_said_loudly_and_not_learned_from():
    one = torch.zeros(120, dtype=torch.int64)
    real = evaluate.kmeans
    def collapsing(h, k, **more):                                          # from the second iteration on
        return (one, None, 0) if str(more['seed']).endswith('1') else real(h, k, **more)
    with folder() as cwd, mock.patch.object(evaluate, 'kmeans', collapsing), \
            mock.patch.object(stages, 'probabilities', lambda *_: torch.eye(3)[one]):
        write_npz(cwd / 'tiny.npz')
        for method in 'cluster', 'scan':
            code, out, err = run(*tiny(method), cwd=cwd)
            assert code == 0 and not err and 'WARNING: the new clusters are worse' in out
            rows = [row for row in logged(cwd / 'runs' / method) if 'iteration' in row]
            assert rows[1]['held'] and rows[0]['sizes'] == rows[1]['sizes'] and rows[1]['criterion'] == 0
    assert 'only 1 of 2 clusters are alive' in report.iteration({**rows[0], 'sizes': [5, 0], 'live_clusters': 1})


def test_without_iterations_no_network_is_trained_and_the_first_assignment_is_scored():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        h = data.to_float(data.load(cwd / 'tiny.npz').x_train).flatten(1)
        h = torch.nn.functional.normalize(h - h.mean(0), dim=1)
        for method, wanted in (('scan', cluster.scan_heads(h, cluster.neighbours(h, 5), 3, 3).argmax(1)),
                               ('cluster', evaluate.kmeans(h, 3, seed='0 0')[0])):
            code, _, err = run(*tiny(method), '--iterations', 0, '--closing', 5, cwd=cwd)
            there = cwd / 'runs' / method
            assert code == 0 and not err and not (there / 'final.pt').exists()
            assert torch.equal(runs.load_checkpoint(there / 'best.pt')['pred'], wanted)
            m, rows = measured(there), logged(there)
            assert m['voted'] and m['epochs'] is None and len(rows) == 1 and 'loss' not in rows[0]
            assert f'runs/{method}: finished\n' in run('--list', cwd=cwd)[1]


def test_any_number_of_clusters_and_no_labels_at_all_work():
    with folder() as cwd:
        for K in 2, 5, 20:
            write_npz(cwd / 'tiny.npz')
            for method in 'cluster', 'scan':
                code, out, err = run(*tiny(method), '--clusters', K, '--overwrite', cwd=cwd)
                assert code == 0 and not err and measured(cwd / 'runs' / method)['clusters'] == K
        write_npz(cwd / 'tiny.npz', x_train=pictures(60, 9, 13, C=3)[0])
        for method in 'cluster', 'scan':
            code, out, err = run(*tiny(method), '--overwrite', cwd=cwd)
            assert code == 0 and not err and 'there are no labels' in out
        refused(*tiny('scan'), '--clusters', 31, '--overwrite', cwd=cwd, said=['31', '60'])


# search.py --------------------------------------------------------------------------------------------------

def test_settings_cover_their_ranges_evenly_in_logarithms_where_they_span_more():
    found = search.settings([('lr', 1e-4, 1e-2), ('crop', 0.2, 1.0), ('epochs', 3, 6), ('tau', 0.1, 0.7)], 64, 0)
    for key, low, high, to in ('lr', 1e-4, 1e-2, math.log), ('crop', 0.2, 1, float), ('tau', .1, .7, float):
        v = sorted((to(s[key]) - to(low)) / (to(high) - to(low)) for s in found)
        assert all(i / 64 - 1e-3 <= u <= (i + 1) / 64 + 1e-3 for i, u in enumerate(v)), key      # one in each part
    assert {s['epochs'] for s in found} == {3, 4, 5, 6} and all(float(f'{s["lr"]:.4g}') == s['lr'] for s in found)
    assert search.settings([('lr', 1e-4, 1e-2)], 5, 0) == search.settings([('lr', 1e-4, 1e-2)], 8, 0)[:5]
    assert search.settings([('lr', 1e-4, 1e-2)], 5, 0) != search.settings([('lr', 1e-4, 1e-2)], 5, 1)


def test_a_trial_is_hopeless_once_it_never_was_as_good_as_the_median_of_the_averages():
    others = [[1, 2, 3], [2, 4, 6], [3, 6, 9], [9]]
    assert not search.hopeless([0, 0], others[:2]) and not search.hopeless([0, 0, 0, 0], others)
    assert search.hopeless([2.9, 0], others) and not search.hopeless([0, 3], others)     # averages 1.5, 3, 4.5


def test_a_search_keeps_what_patience_ended_and_refuses_what_it_can_not_judge():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        flags = ['--search', 3, '--over', 'lr=1e-5:1e-2', '--patience', 1]
        losses_seen = [{'val_loss': v, 'std': 1.0, 'rank': 2.0} for v in (3, 2, 1, 2, 4, 7, 6, 5)]
        with mock.patch.object(train, 'validate', side_effect=losses_seen):
            code, out, err = run(*tiny('ae', *flags), '--epochs', 3, cwd=cwd)
        assert code == 0 and not err, err
        table = [line.split() for line in out.splitlines()[-4:-1]]
        assert [row[0] for row in table] == ['ae-00', 'ae-01', 'ae-02'] and 'stopped' not in out, out
        assert [row[2:4] for row in table] == [['-1.0000', '3'], ['-4.0000', '2'], ['-5.0000', '3']]
        over = ['--search', 1, '--over', 'lr=1e-4:1e-2']
        refused(*tiny('query', *over), '--audit', 0, cwd=cwd, said=['--audit'])
        refused(*tiny('query', *over), '--rounds', 1, cwd=cwd, said=['--rounds'])
        refused(*tiny('query', '--search', 1, '--over', 'audit=0:1'), cwd=cwd, said=['--audit'])
        refused(*tiny('classify', *over), '--labels', 4, cwd=cwd, said=['--labels 4', '5 or more'])
        encoder = ['--encoder', finished('simclr')]
        refused('--method', 'classify', *encoder, '--search', 1, '--over', 'width=0.2:1', cwd=cwd, said=['--width'])
        assert not list((cwd / 'runs').glob('[b-z]*'))
        code, out, err = run(*tiny('classify'), '--search', 2, '--over', 'labels=9:30', '--name', 'n', cwd=cwd)
        flags = [w for i, w in enumerate(tiny('classify')) if '--labels' not in (w, tiny('classify')[i - 1])]
        code, out, err = run(*flags, '--search', 2, '--over', 'labels=9:30', '--name', 'n', cwd=cwd)
        assert code == 0, err
        spent = [runs.read_config(cwd / f'runs/n-0{i}')['args']['labels'] for i in (0, 1)]
        assert spent[0] != spent[1] and all(n == int(n) and 9 <= n <= 30 for n in spent)


def test_a_search_scores_on_validation_and_its_best_command_gives_the_best_run_again():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        flags = tiny('ae', '--search', 3, '--over', 'lr=1e-5:1e-2', 'batch-size=20:60')
        flags = [w for i, w in enumerate(flags) if '--batch-size' not in (w, flags[i - 1])]
        with mock.patch.object(evaluate, 'measure', side_effect=AssertionError('the test set was read')):
            code, out, err = run(*flags, cwd=cwd)
        assert code == 0 and not err
        last = {i: logged(cwd / 'runs' / f'ae-{i:02}')[-1]['val_loss'] for i in range(3)}
        best = min(last, key=last.get)
        assert measured(cwd / 'runs' / f'ae-{best:02}')['score'] == -last[best]
        command = shlex.split(out.splitlines()[-1])
        head, *table = [line.split() for line in out.splitlines()[-5:-1]]
        assert head == ['trial', 'lr', 'batch_size', 'score', 'epochs'] and len(table) == 3
        assert command[:3] == ['best:', 'python', 'ssl.py'] and table[0][0] == f'ae-{best:02}'
        assert table[0][3] == f'{-last[best]:.4f}'
        assert run(*command[3:], '--name', 'again', cwd=cwd)[0] == 0
        assert logged(cwd / 'runs' / 'again')[-1]['val_loss'] == last[best]
        code, again, err = run(*flags, '--resume', cwd=cwd)               # nothing is trained twice
        assert code == 0 and again.splitlines()[-6:] == out.splitlines()[-6:] and 'epoch 1/' not in again
        assert run('--compare', cwd=cwd)[0] == 0
        (cwd / 'runs' / 'ae-00' / 'log.jsonl').write_text('{"epoch": 1, "loss": 2}\n{"ep')
        refused(*flags, '--resume', cwd=cwd, said=['ae-00/log.jsonl'])
        for method in 'simclr', 'classify', 'query':
            code, out, err = run(*tiny(method, '--search', 2, '--over', 'lr=1e-5:1e-2'), cwd=cwd)
            assert code == 0 and not err and len(list((cwd / 'runs').glob(f'{method}-0?/metrics.json'))) == 2
        both = ['--encoder', finished('simclr'), finished('conv')]
        flags = [w for w in tiny('simclr', '--search', 2, '--over', 'neighbours=2:9') if w not in ('--width', 0.1)]
        code, out, err = run(*flags, *both, '--overwrite', cwd=cwd)
        assert code == 0 and not err, err
        assert run(*shlex.split(out.splitlines()[-1])[3:], '--name', 'on', cwd=cwd)[0] == 0
        assert runs.read_config(cwd / 'runs' / 'on')['args']['encoder'] == [str(f) for f in both[1:]]
        for over, said in ('lr=3:1', 'lower'), ('lr=0:1', 'lr'), ('lr', 'lr'), ('net=1:2', 'net'), ('x=1:2', 'x'):
            refused(*tiny('ae', '--search', 2, '--over', over), cwd=cwd, said=[said, '--over'])
        refused(*tiny('ae', '--search', 2, '--over', 'latant=1:2'), cwd=cwd, said=['did you mean latent?'])
        refused(*tiny('ae', '--search', 2, '--over', 'lr=1:2', '--perplexity', 5), cwd=cwd, said=['--perplexity'])
        refused(*tiny('ae', '--search', 2), cwd=cwd, said=['--over'])
        refused(*tiny('pca', '--search', 2, '--over', 'latent=2:4'), cwd=cwd, said=['--search'])
        write_npz(cwd / 'tiny.npz', x_train=pictures(60)[0])
        refused(*tiny('simclr', '--search', 2, '--over', 'lr=1e-5:1e-2', '--overwrite'), cwd=cwd, said=['no labels'])


def test_a_hopeless_trial_is_stopped_early():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        with mock.patch.object(search, 'hopeless', lambda curve, others: len(others) == 2 and len(curve) == 1):
            code, out, _ = run(*tiny('ae', '--search', 3, '--over', 'lr=1e-5:1e-2'), cwd=cwd)
        assert code == 0 and [len(logged(cwd / 'runs' / f'ae-{i:02}')) for i in range(3)] == [2, 2, 1]
        assert 'stopped after epoch 1' in out
        assert out.splitlines()[-2].split()[-2:] == ['1', 'stopped']


# fetch.py ----------------------------------------------------------------------------------------------------

FILE = bytes(range(256)) * 1000                                           # what the mirrors of these tests hold


class Response:
    """What `fetch.open_url` returns: `data`, at most 10,000 bytes a read, then `error` if there is one."""

    def __init__(self, data, status=200, headers=(), error=None):
        self.data, self.status, self.headers, self.error, self.sent = data, status, dict(headers), error, 0

    def read(self, n):
        chunk = self.data[self.sent:self.sent + min(n, 10_000)]
        self.sent += len(chunk)
        if not chunk and self.error:
            raise self.error
        return chunk

    def close(self):
        pass


def rest(start, data=FILE):
    return Response(data[start:], 206, {'Content-Range': f'bytes {start}-{len(data) - 1}/{len(data)}',
                                        'Content-Length': str(len(data) - start)})


def rest_or_whole(start):
    return rest(start) if start else Response(FILE)


def http_error(code):
    raise urllib.error.HTTPError('https://a/pictures.gz', code, 'no', {}, None)


def fetched(mirrors, part=None, wanted=FILE):
    """Downloads `wanted` from mirrors {host: function of start}: (file, part or None, requests, error)."""
    def open_url(url, start):
        host = url.split('/')[2]
        requests.append((host, start))
        return mirrors[host](start)

    requests, error = [], None
    with folder() as f, mock.patch.object(fetch, 'open_url', open_url), contextlib.redirect_stderr(io.StringIO()):
        if part is not None:
            (f / 'pictures.gz.part').write_bytes(part)
        try:
            fetch.download([f'https://{host}/pictures.gz' for host in mirrors], str(f / 'pictures.gz'),
                           hashlib.sha256(wanted).hexdigest(), len(wanted))
        except OSError as e:
            error = e
        left = {p.name: p.read_bytes() for p in f.iterdir()}
    return left.pop('pictures.gz', None), left.pop('pictures.gz.part', None), requests, error


def test_download_writes_the_whole_file_and_leaves_no_part():
    assert fetched({'a': lambda start: Response(FILE)}) == (FILE, None, [('a', 0)], None)


def test_download_resumes_a_broken_part():
    broken = Response(FILE[:70_000], error=ConnectionResetError('reset'))
    assert fetched({'a': lambda start: broken, 'b': rest}) == (FILE, None, [('a', 0), ('b', 70_000)], None)
    silent = Response(FILE[:70_000])                                      # a connection that just ends
    assert fetched({'a': lambda start: silent, 'b': rest}) == (FILE, None, [('a', 0), ('b', 70_000)], None)
    assert fetched({'a': rest}, part=FILE[:5]) == (FILE, None, [('a', 5)], None)
    assert fetched({'a': rest}, part=FILE) == (FILE, None, [], None)      # killed just before the rename


def test_download_keeps_the_part_for_the_next_try():
    broken = Response(FILE[:70_000], error=TimeoutError('timed out'))
    whole, part, _, error = fetched({'a': lambda start: broken})
    assert whole is None and part == FILE[:70_000] and isinstance(error, ConnectionError)


def test_download_starts_over_when_the_range_is_ignored_or_refused_or_the_part_too_long():
    assert fetched({'a': lambda start: Response(FILE)}, part=b'junk') == (FILE, None, [('a', 4)], None)
    refuses = lambda start: http_error(416) if start else Response(FILE)
    assert fetched({'a': refuses}, part=FILE[:9]) == (FILE, None, [('a', 9), ('a', 0)], None)
    assert fetched({'a': rest_or_whole}, part=FILE + b'x') == (FILE, None, [('a', 0)], None)


def test_download_verifies_a_resumed_part_whole():
    requests = [('a', 9), ('a', 0)]                                       # the part was wrong: once more, from zero
    assert fetched({'a': rest_or_whole}, part=b'not these') == (FILE, None, requests, None)
    assert fetched({'a': rest_or_whole}, part=bytes(len(FILE))) == (FILE, None, [('a', 0)], None)


def test_download_takes_the_next_mirror_after_a_wrong_digest():
    wrong = lambda start: Response(bytes(len(FILE)))
    assert fetched({'a': wrong, 'b': rest_or_whole}) == (FILE, None, [('a', 0), ('b', 0)], None)
    whole, part, _, error = fetched({'a': wrong})
    assert whole is None and part is None and 'a (wrong SHA-256)' in str(error)


def test_download_reads_one_byte_too_many_at_most():
    endless = Response(FILE * 2)
    whole, part, _, error = fetched({'a': lambda start: endless})
    assert whole is None and part is None and endless.sent == len(FILE) + 1
    assert 'sent more than 256000 bytes' in str(error)


def test_download_does_not_start_a_file_of_another_length():
    page = Response(b'<html>log in</html>', headers={'Content-Length': '19'})
    whole, part, _, error = fetched({'a': lambda start: page}, part=FILE[:9])
    assert whole is None and part == FILE[:9] and page.sent == 0 and 'HTTP 200 with 19 bytes' in str(error)


def test_download_refuses_http_even_after_a_redirect():
    for url in 'http://a/pictures.gz', 'file:///etc/passwd', 'ftp://a/pictures.gz':
        with raises(ValueError, 'not an https URL'):
            fetch.download([url], 'unused', '', 1)
    request = urllib.request.Request('https://a/x', headers={'Range': 'bytes=5-'})
    follow = fetch.HttpsOnly().redirect_request
    assert follow(request, None, 302, '', {}, 'https://b/x').get_header('Range') == 'bytes=5-'
    with raises(urllib.error.URLError, 'redirects away from https'):
        follow(request, None, 302, '', {}, 'http://b/x')


def test_download_says_in_one_sentence_why_every_mirror_failed():
    def unknown(start):
        raise urllib.error.URLError(OSError(-2, 'Name or service not known'))

    whole, part, _, error = fetched({'a.org': unknown, 'b.org': lambda start: http_error(503)})
    assert whole is None and part is None and isinstance(error, ConnectionError)
    assert str(error) == ('pictures.gz could not be downloaded: '
                          'a.org (Name or service not known), b.org (HTTP 503)')


def test_download_lets_a_full_disk_be_an_error_of_its_own():
    posix()
    with full_disk(100_000):
        _, part, requests, error = fetched({'a': lambda start: Response(FILE), 'b': rest_or_whole})
    assert error.errno == errno.EFBIG and not isinstance(error, ConnectionError) and requests == [('a', 0)]
    assert len(part) == 100_000 and FILE.startswith(part)                 # kept for the next try


def test_fashion_mnist_downloads_only_the_files_that_are_missing():
    names, asked = list(fetch.FASHION_MNIST), []
    download = lambda urls, path, checksum, size: asked.append((os.path.basename(path), len(urls), size))
    with folder() as f, mock.patch.object(fetch, 'download', download):
        (f / names[0]).touch()
        fetch.fashion_mnist(str(f))
    assert asked == [(name, 3, fetch.FASHION_MNIST[name][1]) for name in names[1:]]
    assert all(len(sha256) == 64 for sha256, _ in fetch.FASHION_MNIST.values())


def targz(*members):
    """A .tar.gz by hand: a member is (name, content) or a TarInfo with a type of its own."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode='w:gz') as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            if info is not member:
                info.size = len(member[1])
            tar.addfile(info, None if info is member else io.BytesIO(member[1]))
    return out.getvalue()


def special(name, kind, to=''):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, to
    return info


def unpack(f, blob, **files):
    """Unpacks the blob into the folder f/to; returns what is in f afterwards, links as 'link'."""
    (f / 'a.tar.gz').write_bytes(blob)
    (f / 'to').mkdir(exist_ok=True)
    fetch.unpack(str(f / 'a.tar.gz'), str(f / 'to'), files)
    return below(f)


def below(f):
    return {str(p.relative_to(f)): 'link' if p.is_symlink() else p.read_bytes()
            for p in f.rglob('*') if p.name != 'a.tar.gz' and not p.is_dir()}


def test_unpack_writes_the_plain_files_it_was_told_of_into_the_folder_and_nothing_else():
    blob = targz(special('set', tarfile.DIRTYPE), ('set/x.bin', b'pictures'), ('readme', b'no'), ('../y.bin', b'up'),
                 ('/etc/z.bin', b'root'), ('../../evil', b'no'), ('set/x.bin', b'again'))
    with folder() as f:
        assert unpack(f, blob, **{'x.bin': 8, 'y.bin': 9, 'z.bin': 9}) == {
            'to/x.bin': b'pictures', 'to/y.bin': b'up', 'to/z.bin': b'root'}
        assert not (f.parent / 'evil').exists()
    kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE,
             tarfile.GNUTYPE_SPARSE)
    for kind in kinds:
        with folder() as f:
            (f / 'outside').write_bytes(b'mine')
            with raises(ValueError, 'a.tar.gz'):
                unpack(f, targz(special('x.bin', kind, '../outside'), ('other', b'')), **{'x.bin': 9})
            assert below(f) == {'outside': b'mine'}, kind


def test_unpack_refuses_what_is_too_large_cut_off_or_not_there_and_leaves_no_half_file():
    junk, noise = bytes(1 << 27), np.random.default_rng(0).bytes(50_000)
    good = targz(('x.bin', noise), ('y.bin', b'labels'))
    with folder() as f:
        for blob, files, said in ((good, {'x.bin': 49_999, 'y.bin': 6}, '50,000 bytes, more than 49,999'),
                                  (targz(('junk', junk), ('x.bin', b'')), {'x.bin': 9}, 'more than it should'),
                                  (targz(('x.bin', junk)), {'x.bin': 9}, 'more than 9'),
                                  (targz(('y.bin', b'')), {'x.bin': 9, 'y.bin': 9}, 'has no x.bin in it'),
                                  (good[:30_000], {'x.bin': 50_000}, 'can not be unpacked'),
                                  (gzip.compress(gzip.decompress(good)[:30_000]), {'x.bin': 50_000}, 'unpacked'),
                                  (b'', {'x.bin': 9}, 'can not be unpacked'), (b'<html>', {'x.bin': 9}, 'ot a gzip'),
                                  (gzip.compress(b'no tar' * 999), {'x.bin': 9}, 'can not be unpacked')):
            tracemalloc.start()
            try:
                with raises(ValueError, 'a.tar.gz', said):
                    unpack(f, blob, **files)
                assert tracemalloc.get_traced_memory()[1] < 20e6
            finally:
                tracemalloc.stop()
            assert set(below(f)) <= {'to/y.bin'}, said
            (f / 'to' / 'y.bin').unlink(missing_ok=True)
        posix()
        (f / 'a.tar.gz').write_bytes(good)
        with full_disk(20_000), contextlib.suppress(OSError):
            fetch.unpack(str(f / 'a.tar.gz'), str(f / 'to'), {'x.bin': 50_000})
            raise AssertionError('the disk was full')
        assert not below(f)


def test_an_archive_is_downloaded_checked_by_its_md5_unpacked_and_removed_and_not_asked_for_again():
    blob = targz(('set/x.bin', FILE), ('set/y.txt', b'names'))
    archive = fetch.Archive('https://a.org/set.tar.gz', hashlib.md5(blob).hexdigest(), len(blob), 'set',
                            {'x.bin': len(FILE), 'y.txt': 5})
    asked = []
    def open_url(url, start):
        asked.append((url, start))
        return rest(start, blob) if start else Response(blob)
    with folder() as f, mock.patch.object(fetch, 'open_url', open_url), contextlib.redirect_stderr(io.StringIO()), \
            mock.patch.dict(fetch.ARCHIVES, stl10=archive), inside(f):
        (f / 'data' / 'stl10').mkdir(parents=True)
        (f / 'data' / 'stl10' / 'set.tar.gz.part').write_bytes(blob[:99])
        for _ in range(2):
            assert data.find('stl10') == Path('data/stl10') and asked == [(archive.url, 99)]
            assert below(f) == {'data/stl10/x.bin': FILE, 'data/stl10/y.txt': b'names'}
        (f / 'data' / 'stl10').rename(f / 'data' / 'set')                 # as the archive unpacks by hand
        assert data.find('stl10') == Path('data/set')
        (f / 'data' / 'set' / 'y.txt').unlink()
        (f / 'data' / 'stl10').mkdir()
        (f / 'data' / 'stl10' / 'set.tar.gz').write_bytes(blob)           # brought by hand
        assert data.find('stl10') == Path('data/stl10') and len(asked) == 1 and len(below(f)) == 3
        (f / 'data' / 'stl10' / 'x.bin').unlink()
        blob = bytes(len(blob))
        with raises(ConnectionError, 'a.org (wrong MD5)'):
            data.find('stl10')
    assert all(len(a.md5) == 32 and a.url.startswith('https://') for a in fetch.ARCHIVES.values())
    assert sum(fetch.ARCHIVES['stl10'].files[f'{k}_X.bin'] for k in ('train', 'test', 'unlabeled')) == 113_000 * 27_648


# data.py -----------------------------------------------------------------------------------------------------

IDX_FORMATS = {0x08: 'B', 0x09: 'b', 0x0B: 'h', 0x0C: 'i', 0x0D: 'f', 0x0E: 'd'}
SHAPES = [(), (5,), (0,), (2, 3), (0, 4), (3, 1, 2), (2, 2, 1, 3)]


def idx(code, shape, values):
    """An IDX file by hand: magic, big-endian sizes, big-endian values."""
    return (struct.pack('>BBBB', 0, 0, code, len(shape)) + struct.pack(f'>{len(shape)}I', *shape)
            + struct.pack(f'>{len(values)}{IDX_FORMATS[code]}', *values))


def idx_values(code, n):
    extreme = {0x08: [255, 0], 0x09: [-128, 127], 0x0B: [-2**15, 2**15 - 1], 0x0C: [-2**31, 2**31 - 1],
               0x0D: [-1.5, 2.0**100], 0x0E: [-0.1, 1e300]}[code]
    return (extreme + list(range(n)))[:n]


def test_idx_of_every_type_and_shape_is_read_and_written_byte_for_byte():
    with folder() as f:
        for code, shape in itertools.product(IDX_FORMATS, SHAPES):
            values = idx_values(code, math.prod(shape))
            blob, path = idx(code, shape, values), f / 'named.gz'                    # content decides, not the name
            for content in blob, gzip.compress(blob):
                path.write_bytes(content)
                array = data.read_idx(path)
                assert array.shape == shape and array.ravel().tolist() == values
                assert array.dtype.char == IDX_FORMATS[code] and array.dtype.isnative and array.flags.writeable
            for name in 'plain', 'packed.gz':
                data.write_idx(f / name, array)
                content = (f / name).read_bytes()
                assert (gzip.decompress(content) if name == 'packed.gz' else content) == blob
        for wrong in np.zeros(2), np.zeros(2, int), np.zeros(2, bool), np.zeros(2, complex):
            if wrong.dtype != float:
                with raises(ValueError, wrong.dtype):
                    data.write_idx(f / 'wrong', wrong)
        data.write_idx(f / 'swapped', np.array([1, 258], '>i2'))
        assert (f / 'swapped').read_bytes() == idx(0x0B, (2,), [1, 258])


def test_read_idx_names_what_is_wrong_with_a_file():
    good = idx(8, (2, 3), range(6))
    huge = struct.pack('>BBBBII', 0, 0, 8, 2, 2**32 - 1, 2**32 - 1)
    with folder() as f:
        for content, said in ((b'', 'is empty'), (good[:3], 'starts with'), (b'\x89PNG', 'starts with 0x89504e47'),
                              (b'\0\0\x0a\1', 'starts with'), (good[:7], 'ends inside its header'),
                              (good[:-1], 'only 5 bytes'), (good + b'x', 'more bytes'), (huge, 'announces'),
                              (gzip.compress(good)[:-9], 'broken gzip'), (gzip.compress(good) + b'x', 'broken gzip'),
                              (gzip.compress(good + b'x'), 'more'), (gzip.compress(b''), 'is empty'),
                              (b'\0\0\x08\xff' + b'\0\0\0\1' * 255 + b'x', '255 dimensions'),
                              (struct.pack('>BBBB4I', 0, 0, 8, 4, 0, *[2**32 - 1] * 3), '')):
            (f / 'x').write_bytes(content)
            with raises(ValueError, f / 'x', said):
                data.read_idx(f / 'x')


def test_a_gzip_bomb_is_refused_in_bounded_memory():
    bomb = gzip.compress(idx(8, (100,), range(100)) + bytes(1 << 28), 1)
    with folder() as f:
        (f / 'bomb').write_bytes(bomb)
        (f / 'tera').write_bytes(gzip.compress(b'\0\0\x0e\2' + b'\xff' * 8))
        tracemalloc.start()
        try:
            for name in 'bomb', 'tera':
                with raises(ValueError, name):
                    data.read_idx(f / name)
            assert tracemalloc.get_traced_memory()[1] < 50e6
        finally:
            tracemalloc.stop()


def npz(**kwargs):
    out = io.BytesIO()
    np.savez_compressed(out, **kwargs) if kwargs.pop('packed', False) else np.savez(out, **kwargs)
    return out.getvalue()


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_inside_npz_is_refused_and_does_not_run():
    with folder() as f:
        evil = np.array([Evil(f / 'ran'), None], object)
        for key in 'x_train', 'y_train', 'y_test':
            (f / 'x.npz').write_bytes(npz(**{**arrays(20, 4), key: evil}))
            with raises(ValueError, 'x.npz'):
                data.load(f / 'x.npz')
            assert not (f / 'ran').exists()
        np.load(f / 'x.npz', allow_pickle=True)['y_test']
        assert (f / 'ran').exists()                                       # it would have run


def test_npz_mistakes_are_named():
    good = arrays(20, 4)
    raw = io.BytesIO()
    with zipfile.ZipFile(raw, 'w') as z:
        z.writestr('x_train', b'these bytes are no array')
    mistakes = [({'x_train': None}, 'wanted x_train'), ({'x_train': good['x_train'] / 255}, 'float64'),
             ({'x_train': good['x_train'][0]}, '(10, 12)'), ({'x_train': good['x_train'][:, :7]}, '(20, 7, 12, 1)'),
             ({'x_train': np.zeros((6, 9, 9, 2), np.uint8)}, '(6, 9, 9, 2)'),
             ({'x_train': np.zeros((3, 9, 9, 9, 3), np.uint8)}, '(3, 9, 9, 9, 3)'),
             ({'x_train': good['x_train'][:19]}, '19 pictures'), ({'x_train': good['x_train'][:0]}, '0 pictures'),
             ({'x_train': np.zeros(20, [(f'field{i}', 'u1') for i in range(900)])}, 'not a readable'),
             ({'x_train': np.uint8(5)}, ''), ({'y_train': np.int64(5)}, ''),
             ({'y_train': good['y_train'][:5]}, '(5,)'), ({'y_train': good['y_train'] - 1}, 'from -1'),
             ({'y_train': good['y_train'] * 10_000}, '20000'), ({'y_train': good['y_train'] / 1}, 'float64'),
             ({'y_test': good['y_test'][:, None]}, '(4, 1)'), ({'x_test': good['x_test'][:, :9]}, 'same shape'),
             ({'x_test': good['x_test'][:0]}, 'x_test holds 0'), ({'y_train': np.array(list('ab' * 10))}, '<U1')]
    with folder() as f:
        for change, said in mistakes:
            (f / 'x.npz').write_bytes(npz(**{k: v for k, v in {**good, **change}.items() if v is not None}))
            with raises(ValueError, said):
                data.load(f / 'x.npz')
        for content in b'', b'text', npz(**good)[:-30], raw.getvalue():
            (f / 'x.npz').write_bytes(content)
            with raises(ValueError, 'x.npz'):
                data.load(f / 'x.npz')


def test_data_sets_from_idx_folders_and_npz_are_the_same_pictures_channels_first():
    for C in 1, 3:
        kept = arrays(22, 4, C=C)
        with folder() as f:
            (f / 'x.npz').write_bytes(npz(**kept))
            for key, array in kept.items():
                data.write_idx(f / (data.IDX_NAMES[key] + '.gz' * key.endswith('test')), array.astype(np.uint8))
            a, b = data.load(f / 'x.npz'), data.load(f)
            (f / 'x.npz').write_bytes(npz(x_train=kept['x_train']))
            bare, first = data.load(f / 'x.npz'), data.load(f, limit=21)
        assert a.digest == b.digest != first.digest and a.shape == (C, 10, 12) and a.classes == ['0', '1', '2']
        for key in 'x_train', 'x_test':
            x = kept[key].reshape(-1, 10, 12, C)
            found = getattr(a, key).tolist()
            for n, c, h, w in itertools.product(range(len(x)), range(C), range(10), range(12)):
                assert found[n][c][h][w] == x[n, h, w, c]
        assert a.y_test.tolist() == kept['y_test'].tolist() and a.y_train.dtype == torch.int64
        assert bare.y_train is bare.x_test is bare.y_test is None and bare.classes == []
        assert torch.equal(first.x_train, a.x_train[:21]) and len(first.y_train) == 21 and len(first.x_test) == 4


def plane(side, of):
    """side x side bytes, row after row, of a function of (row, column)."""
    return bytes(of(row, col) for row in range(side) for col in range(side))


def write_stl10(f, train=20, test=4, unlabelled=6):
    """STL-10's files by hand: red is the row, green the column, blue the picture's number, counted through."""
    number = itertools.count()
    red, green = plane(96, lambda a, b: b), plane(96, lambda a, b: a)     # the file goes down each column
    for part, n in ('train', train), ('unlabeled', unlabelled), ('test', test):
        (f / f'{part}_X.bin').write_bytes(b''.join(red + green + bytes([next(number)]) * 9216 for _ in range(n)))
        if part != 'unlabeled':
            (f / f'{part}_y.bin').write_bytes(bytes(1 + i % 10 for i in range(n)))
    (f / 'class_names.txt').write_text('\n'.join(f'class{k}' for k in range(10)) + '\n')
    (f / 'fold_indices.txt').write_text('\n'.join(f'{k} {k + 10} ' for k in range(10)) + '\n')


def write_cifar10(f, sizes=(12, 8, 5), test=4):
    """CIFAR-10's files by hand, told as above; data_batch_9, _10, _11 when three sizes are given."""
    red, green, number = plane(32, lambda row, col: row), plane(32, lambda row, col: col), itertools.count()
    for name, n in *((f'data_batch_{9 + i}', n) for i, n in enumerate(sizes)), ('test_batch', test):
        ids = [next(number) for _ in range(n)]
        (f / f'{name}.bin').write_bytes(b''.join(bytes([i % 10]) + red + green + bytes([i]) * 1024 for i in ids))
    (f / 'batches.meta.txt').write_text('\n'.join(f'class{k}' for k in range(10)) + '\n\n')


def assert_told(x, first=0):
    """Every pixel of x (N, 3, H, W) says its row, its column and its picture's number."""
    n, _, H, W = x.shape
    for i, r, c in itertools.product(range(n), range(0, H, 5), range(0, W, 7)):
        assert x[i, :, r, c].tolist() == [r, c, first + i]
    assert x.is_contiguous() and x.dtype == torch.uint8


def test_stl10_is_read_column_by_column_its_unlabelled_pictures_last_and_without_a_label():
    with folder() as f:
        write_stl10(f)
        ds, few, more = data.load(f), data.load(f, limit=20), data.load(f, limit=23)
        assert ds.shape == (3, 96, 96) and len(ds.x_train) == 26 and ds.classes == [f'class{k}' for k in range(10)]
        assert_told(ds.x_train[:])
        assert_told(ds.x_test[:], 26)
        assert ds.x_train[torch.tensor([25, 3, 20, 3])][:, 2, 0, 0].tolist() == [25, 3, 20, 3]
        assert ds.y_train.tolist() == [i % 10 for i in range(20)] + [-1] * 6 and ds.y_test.tolist() == [0, 1, 2, 3]
        assert ds.labelled().tolist() == list(range(20)) and ds.labelled(torch.tensor([24, 5])).tolist() == [5]
        assert [ids.tolist() for ids in ds.folds] == [[k, k + 10] for k in range(10)]
        assert len(few.x_train) == len(few.labelled()) == 20 and len(more.x_train) == len(more.y_train) == 23
        x = {key: getattr(ds, key)[:].permute(0, 2, 3, 1).numpy() for key in ('x_train', 'x_test')}
        assert data._dataset('copy', x).digest == ds.digest != few.digest  # the digest is of pictures, not of files
        with open(f / 'train_X.bin', 'r+b') as file:                      # nothing was copied: the file is the data
            file.seek(2 * 27_648 + 96 * 7 + 5)
            file.write(b'\xff')
        assert ds.x_train[2:3][0, 0, 5, 7] == 255
        for name in 'unlabeled_X.bin', 'class_names.txt', 'fold_indices.txt':
            (f / name).unlink()
        bare = data.load(f)
        assert len(bare.x_train) == len(bare.labelled()) == 20 and bare.folds == [] and bare.classes[2] == 'car'


def test_cifar10_is_read_row_by_row_from_any_number_of_batches_in_the_order_of_their_numbers():
    with folder() as f:
        write_cifar10(f)
        ds = data.load(f)
        assert ds.shape == (3, 32, 32) and ds.classes == [f'class{k}' for k in range(10)] and ds.folds == []
        assert_told(ds.x_train[:])
        assert_told(ds.x_test[:], 25)
        assert ds.y_train.tolist() == [i % 10 for i in range(25)] and ds.y_test.tolist() == [5, 6, 7, 8]
        assert_told(data.load(f, limit=22).x_train[torch.arange(13, 22)], 13)
        (f / 'batches.meta.txt').unlink()
        assert data.load(f).classes[6] == 'frog'


def test_broken_binary_data_sets_are_one_sentence():
    good = 27_648
    with folder() as f:
        for write, name, change, said in (
                (write_stl10, 'train_X.bin', lambda b: b[:-1], 'wanted a multiple of 27,648'),
                (write_stl10, 'train_X.bin', lambda b: b[good:], 'train_y.bin holds 20 labels; wanted one for each'),
                (write_stl10, 'unlabeled_X.bin', lambda b: b[:-good // 2], 'is it cut off?'),
                (write_stl10, 'unlabeled_X.bin', lambda b: b'', 'unlabeled_X.bin is empty'),
                (write_stl10, 'test_X.bin', lambda b: b'', 'test_X.bin is empty'),
                (write_stl10, 'test_y.bin', lambda b: b'', 'test_y.bin is empty'),
                (write_stl10, 'train_X.bin', None, 'has no train_X.bin'), (write_stl10, 'train_y.bin', None, 'train_y'),
                (write_stl10, 'test_X.bin', None, 'has no test_X.bin'), (write_stl10, 'test_y.bin', None, 'test_y.bin'),
                (write_stl10, 'train_y.bin', lambda b: b'\0' + b[1:], 'labels from 0 to 10; wanted 1 to 10'),
                (write_stl10, 'test_y.bin', lambda b: b[:-1] + b'\x0b', 'labels from 1 to 11'),
                (write_stl10, 'class_names.txt', lambda b: b[:-8], 'holds 9 names; wanted 10'),
                (write_stl10, 'fold_indices.txt', lambda b: b[:20], 'lines of picture numbers; wanted 10'),
                (write_stl10, 'fold_indices.txt', lambda b: b + b'20', '0 to 19'),
                (write_stl10, 'fold_indices.txt', lambda b: b'-1 ' + b, 'no number of a training picture'),
                (write_cifar10, 'data_batch_10.bin', lambda b: b[:-3], 'wanted a multiple of 3,073'),
                (write_cifar10, 'test_batch.bin', lambda b: b'', 'is empty'),
                (write_cifar10, 'test_batch.bin', None, 'has no test_batch.bin'),
                (write_cifar10, 'data_batch_9.bin', lambda b: b'\x0a' + b[1:], 'data_batch_9.bin holds a label 10'),
                (write_cifar10, 'data_batch_9.bin', lambda b: b[3073 * 7:], 'holds 18 pictures; wanted at least 20'),
                (write_cifar10, 'batches.meta.txt', lambda b: b + b'more', 'holds 11 names')):
            for old in f.iterdir():
                old.unlink()
            write(f)
            blob = (f / name).read_bytes()
            (f / name).unlink() if change is None else (f / name).write_bytes(change(blob))
            with raises(ValueError, said):
                data.load(f)
        for batch in f.glob('data_batch_*'):
            batch.unlink()
        with raises(ValueError, 'has no data_batch_1.bin'):
            data.load(f)


def test_a_named_data_set_is_looked_for_in_data_and_kept_in_the_run():
    with folder() as cwd:
        there = cwd / 'data' / 'cifar-10-batches-bin'
        there.mkdir(parents=True)
        write_cifar10(there, (25,))
        for i in 1, 2, 3, 4, 5:                                           # all that the archive holds has to be there
            shutil.copy(there / 'data_batch_9.bin', there / f'data_batch_{i}.bin')
        code, out, _ = run('--fetch', '--dataset', 'cifar10', cwd=cwd)
        assert code == 0 and out == f'cifar10 is in {there.relative_to(cwd)}\n'
        code, out, err = run('--method', 'pixels', '--dataset', 'cifar10', '--limit', 30, cwd=cwd)
        there = cwd / 'runs' / 'pixels-dataset=cifar10-limit=30'
        assert code == 0 and measured(there)['n'] == 4, err
        config = runs.read_config(there)
        assert config['args']['dataset'] == config['data']['name'] == 'cifar10'
        before = measured(there)
        assert run('--evaluate', there, cwd=cwd)[0] == 0 and measured(there) == before
        assert run('--method', 'pixels', '--name', there.name, '--resume', cwd=cwd)[0] == 0
        refused('--method', 'pixels', '--dataset', 'cifar', cwd=cwd, said=['did you mean cifar10?'])
        refused('--method', 'pixels', '--dataset', 'cifar10', '--data', 'data', cwd=cwd, said=['exclude'])


def test_split_is_a_function_of_the_seed_disjoint_and_complete():
    for n, n_val, wanted in (100, 7, 7), (100, 5000, 10), (60_000, 5000, 5000), (20, 5000, 2), (3, 5, 1):
        a, b = data.split(n, n_val, 0)
        assert len(b) == wanted and sorted(a.tolist() + b.tolist()) == list(range(n))
        again = data.split(n, n_val, 0)
        assert torch.equal(again[0], a) and torch.equal(again[1], b)
    assert not torch.equal(data.split(100, 7, 0)[1], data.split(100, 7, 1)[1])


def test_batches_hold_every_picture_once_in_an_order_that_seed_and_epoch_fix():
    for n, size in itertools.product((2, 3, 5, 19, 20, 97, 200), (2, 3, 7, 19, 20, 500)):
        seen = lambda *key, n=n, size=size: [(step, ids.tolist()) for step, ids in data.batches(n, size, *key)]
        batches = seen(0, 1)
        sizes = [len(ids) for _, ids in batches]
        assert sorted(sum((ids for _, ids in batches), [])) == list(range(n))
        assert [step for step, _ in batches] == list(range(data.steps_per_epoch(n, size)))
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2 and max(sizes) <= max(size, 3), (n, size, sizes)
        assert seen(0, 1) == batches
        for start in range(len(batches) + 1):
            assert seen(0, 1, start) == batches[start:]
    assert len({str(seen(seed, epoch)) for seed in (0, 1) for epoch in (1, 2, 3)}) == 6


def test_to_float_is_division_by_255():
    x = torch.arange(256, dtype=torch.uint8)
    assert close(data.to_float(x), np.arange(256) / 255, 1e-7) and x[255] == 255


def test_generator_is_a_function_of_its_whole_key():
    keys = [(0, 1, 2), (0, 12), (0, 1, 3), (1, 1, 2), (0, 1, 2, 'val'), (0, '1', 2)]
    draws = [data.generator('cpu', *key).initial_seed() for key in keys * 2]
    assert draws[:6] == draws[6:] and len(set(draws)) == 6


ALL_ON = data.Views(grey=0.3, blur=0.5, cutout=0.3, noise=0.1)
ALL_OFF = data.Views(crop=1, flip=False, rotate=0, jitter=0)


def test_views_keep_shape_and_range_and_repeat_by_generator():
    for C, H, W in (1, 28, 28), (3, 9, 13), (1, 8, 8), (3, 33, 19):
        x = rand(6, C, H, W)
        kept = x.clone()
        views = data.augment(x, ALL_ON, data.generator('cpu', 1))
        assert views.shape == x.shape and 0 <= views.min() and views.max() <= 1 and torch.equal(x, kept)
        assert torch.equal(views, data.augment(x, ALL_ON, data.generator('cpu', 1)))
        assert not torch.equal(views, data.augment(x, ALL_ON, data.generator('cpu', 2)))
        assert torch.equal(data.augment(x, ALL_OFF, data.generator('cpu', 1)), x)


def test_flip_alone_is_the_picture_or_its_mirror():
    for H, W in (8, 8), (9, 13):
        x = rand(200, 3, H, W)
        flipped = data.warp(x, 1, True, 0, data.generator('cpu', 0))
        same, mirrored = ((flipped - v).abs().amax((1, 2, 3)) < 1e-4 for v in (x, x.flip(3)))
        assert (same ^ mirrored).all() and 70 < same.sum() < 130


def test_warp_samples_the_window_it_drew():
    """Against scipy, in pixels: a window of the drawn extents and centre, mirrored, turned, sampled bilinearly."""
    for (H, W), flip, rotate in itertools.product([(9, 13), (28, 28)], (False, True), (0, 30)):
        x = rand(20, 2, H, W)
        views, g = data.warp(x, 0.3, flip, rotate, data.generator('cpu', 3)), data.generator('cpu', 3)
        draw = lambda low, high, g=g: (torch.rand(20, generator=g) * (high - low) + low).double().numpy()
        area, ratio = draw(0.3, 1), np.exp(draw(math.log(3 / 4), math.log(4 / 3)))
        w, h = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
        cx, cy = draw(-1, 1) * (1 - w) * W / 2, draw(-1, 1) * (1 - h) * H / 2
        mirror = np.where(draw(0, 1) < 0.5, 1, -1) if flip else np.ones(20)
        angle = draw(-1, 1) * math.radians(rotate)
        assert (abs(cx) + w * W / 2 <= W / 2 + 1e-6).all() and (abs(cy) + h * H / 2 <= H / 2 + 1e-6).all()
        dy, dx = np.mgrid[:H, :W] - np.array([(H - 1) / 2, (W - 1) / 2]).reshape(2, 1, 1)
        for i in range(20):
            u, v = dx * w[i] * mirror[i], dy * h[i]
            if mirror[i] < 0:
                u, v = -dx * w[i], dy * h[i]
            across = math.cos(angle[i]) * u - math.sin(angle[i]) * v + cx[i] + (W - 1) / 2
            down = math.sin(angle[i]) * u * 1 + math.cos(angle[i]) * v + cy[i] + (H - 1) / 2
            for c in range(2):
                wanted = scipy.ndimage.map_coordinates(x[i, c].numpy(), [down, across], order=1, mode='grid-constant')
                assert close(views[i, c], wanted, 1e-4)


def test_jitter_on_grey_is_brightness_and_contrast_and_nothing_else():
    x = rand(50, 1, 9, 8) * 0.2 + 0.4                                     # in the middle: nothing is clipped
    out = data.color_jitter(x, 0.1, data.generator('cpu', 0))
    for a, b in zip(x.flatten(1).double().numpy(), out.flatten(1).double().numpy()):
        slope, offset = np.polyfit(a, b, 1)                               # contrast, then what brightness adds
        assert close(b, slope * a + offset, 1e-5) and 0.8 < slope < 1.22
        bright = b.mean() / a.mean()
        assert 0.9 - 1e-6 <= bright <= 1.1 + 1e-6 and 0.9 - 1e-6 <= slope / bright <= 1.1 + 1e-6


def test_colour_jitter_parts_by_their_formulas():
    x, k = rand(4, 3, 5, 6), torch.tensor([0.299, 0.587, 0.114])
    luma = torch.einsum('nchw,c->nhw', x, k)
    f = (torch.rand(4, 1, generator=data.generator('cpu', 0)) * 0.8 + 0.6).view(4, 1, 1, 1)
    part = lambda name: getattr(data, name)(x, 0.4, data.generator('cpu', 0))
    assert close(part('_brightness'), x * f)
    mean = luma.mean((1, 2)).view(4, 1, 1, 1)
    assert close(part('_contrast'), mean + (x - mean) * f)
    assert close(part('_saturation'), luma[:, None] + (x - luma[:, None]) * f)
    turned = part('_hue')
    assert close(torch.einsum('nchw,c->nhw', turned, k), luma, 1e-5) and (turned - x).abs().max() > 0.05
    assert close(data._hue(x, 0, data.generator('cpu', 0)), x)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert close(data._hue(grey, 0.4, data.generator('cpu', 0)), grey, 2e-3)   # YIQ rows sum to 0 to 3 digits


def test_grey_takes_the_colours_out_of_a_share_of_the_pictures():
    x, views = rand(400, 3, 5, 6), data.Views(crop=1, flip=False, rotate=0, jitter=0, grey=0.25)
    out = data.augment(x, views, data.generator('cpu', 0))
    luma = torch.einsum('nchw,c->nhw', x, torch.tensor([0.299, 0.587, 0.114]))[:, None].expand_as(x)
    grey = (out - luma).abs().amax((1, 2, 3)) < 1e-6
    assert 70 < grey.sum() < 130 and torch.equal(out[~grey], x[~grey])
    one = rand(9, 1, 5, 6)
    assert torch.equal(data.augment(one, ALL_ON, data.generator('cpu', 1)),
                       data.augment(one, dataclasses.replace(ALL_ON, grey=0), data.generator('cpu', 1)))


def test_half_precision_around_them_changes_no_view():
    for C, seed in itertools.product((1, 3), range(6)):                   # six orders of the parts of colour jitter
        x = rand(8, C, 28, 28)
        plain = data.augment(x, ALL_ON, data.generator('cpu', seed))
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(data.augment(x, ALL_ON, data.generator('cpu', seed)), plain)


def test_every_method_learns_from_colour_pictures_in_half_precision():
    with folder() as cwd, only_training():
        x, y = pictures(60, 8, 8, C=3)
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=y)
        for method in TRAINED:
            for seed in range(3 if method == 'simclr' else 1):
                code, _, err = run(*tiny(method), '--amp', '--overwrite', '--seed', seed, cwd=cwd)
                assert code == 0, (method, err)
        weights = [runs.state_digest(runs.load_checkpoint(cwd / 'runs' / 'simclr' / 'checkpoint.pt')['model'])
                   for p in (0, 1) if run(*tiny('simclr'), '--grey', p, '--overwrite', cwd=cwd)[0] == 0]
        assert len(set(weights)) == 2


def test_blur_keeps_the_sum_is_symmetrical_and_scales_with_the_picture():
    for side, taps in (28, 3), (96, 9), (9, 3):
        x = torch.zeros(60, 1, side, side)
        x[:, :, side // 2, side // 2] = 1
        out = data.blur(x, 1.0, data.generator('cpu', 0))
        m, r = side // 2, taps // 2
        core = out[:, 0, m - r:m + r + 1, m - r:m + r + 1]
        assert close(out.sum((1, 2, 3)), np.ones(60)) and close(core.sum((1, 2)), np.ones(60))
        assert close(core, core.transpose(1, 2)) and close(core, core.flip(1)) and close(core, core.flip(2))
        peak = core[:, r, r]
        assert peak.min() < 0.5 < 0.95 < peak.max()                       # strong to none: not degenerate at 28
        ratio = core[:, r, 2:].div(core[:, r, 1:-1])[:, r - 1] if r else peak
        sigma = (-0.5 / ratio.clamp(1e-30).double().log()).sqrt()         # w(1) / w(0) = exp(-1 / 2 sigma^2)
        i, j = np.mgrid[-r:r + 1, -r:r + 1]
        gauss = np.exp(-(i ** 2 + j ** 2) / (2 * sigma[0].item() ** 2))
        assert close(core[0], gauss / gauss.sum(), 1e-4)
    x = rand(400, 3, 28, 28)
    changed = (data.blur(x, 0.25, data.generator('cpu', 0)) - x).abs().amax((1, 2, 3)) > 1e-3
    assert 50 < changed.sum() < 120
    assert close(data.blur(torch.full((2, 1, 9, 13), 0.7), 1.0), torch.full((2, 1, 9, 13), 0.7))


def test_cutout_erases_one_square_of_the_size_asked_for():
    x, g = torch.ones(50, 3, 9, 14), data.generator('cpu', 5)
    out = data.cutout(x, 0.4, data.generator('cpu', 5))
    cy, cx = (torch.rand(50, 1, generator=g).flatten() * n for n in (9, 14))
    for i, h, w in itertools.product(range(50), range(9), range(14)):
        inside = abs(h + 0.5 - cy[i]) <= 0.4 * 9 / 2 and abs(w + 0.5 - cx[i]) <= 0.4 * 14 / 2
        assert out[i, :, h, w].tolist() == [0.0 if inside else 1.0] * 3


def test_noise_has_the_standard_deviation_asked_for():
    x = torch.full((50, 1, 40, 40), 0.5)
    noise = data.add_noise(x, 0.05, data.generator('cpu', 0)) - x
    assert abs(noise.std() - 0.05) < 5e-4 and abs(noise.mean()) < 5e-4 and x.unique().tolist() == [0.5]
    assert abs((noise / 0.05).pow(4).mean() - 3) < 0.1                    # a Gaussian's fourth moment
    loud = data.add_noise(x, 5.0, data.generator('cpu', 0))
    assert loud.min() == 0 and loud.max() == 1


# nets.py -----------------------------------------------------------------------------------------------------

SIZES = [(8, 8), (9, 13), (28, 28), (33, 19)]


def test_every_model_gives_back_exactly_its_height_and_width():
    for (H, W), C, method, net in itertools.product(SIZES, (1, 3), ('ae', 'conv', 'vae'), ('fc', 'conv', 'resnet')):
        model, x = nets.build(method, net, (C, H, W), 0.1, 5), rand(2, C, H, W)
        assert model.encode(x).shape == (2, 5) and model.decode(model.encode(x)).shape == (2, C, H, W)
        out = model(x)[0] if method == 'vae' else model(x)
        assert out.shape == x.shape


def test_encoders_have_the_dimension_they_state_and_the_maps_they_compute():
    for (H, W), C, net in itertools.product(SIZES + [(64, 65)], (1, 3), ('fc', 'conv', 'resnet')):
        for dim in None, 7:
            encoder = nets.Encoder(net, (C, H, W), 0.1, dim)
            assert encoder(rand(2, C, H, W)).shape == (2, encoder.dim) and encoder.dim == (dim or encoder.dim)
        if net != 'fc':
            body, c, h, w = {'conv': nets.convnet, 'resnet': nets.resnet}[net](C, H, W, 0.1)
            assert body(rand(2, C, H, W)).shape == (2, c, h, w)
    assert nets.resnet(1, 28, 28, 1.0)[1:] == (256, 4, 4) and nets.resnet(3, 96, 96, 0.1)[1:] == (48, 6, 6)
    assert nets.Encoder('resnet', (1, 28, 28)).dim == 256 and nets.Encoder('fc', (1, 28, 28)).dim == 64


def test_conv_encoder_at_96_pixels_has_4_7_million_parameters():
    assert 4.6e6 < nets.size(nets.Encoder('conv', (3, 96, 96))) < 4.8e6


def test_fc_autoencoder_is_784_256_64_256_784():
    model = nets.build('ae', 'fc', (1, 28, 28))
    shapes = [tuple(p.shape) for p in model.parameters() if p.ndim == 2]
    assert shapes == [(256, 784), (64, 256), (256, 64), (784, 256)]
    assert nets.size(model) == sum(a * b + a for a, b in shapes)


def test_narrow_maps_side_by_side_give_the_gradients_of_a_plain_convolution():
    torch.manual_seed(0)
    for B, c_in, c_out, h, w, kernel, stride in ((1, 3, 5, 4, 4, 3, 1), (16, 3, 5, 7, 7, 3, 2), (37, 3, 5, 6, 5, 3, 2),
                                                 (20, 3, 5, 5, 9, 1, 2), (33, 2, 4, 3, 3, 5, 1)):
        x = torch.randn(B, c_in, h, w, dtype=torch.float64, requires_grad=True)
        weight = torch.randn(c_out, c_in, kernel, kernel, dtype=torch.float64, requires_grad=True)
        plain = torch.nn.functional.conv2d(x, weight, None, stride, kernel // 2)
        grad = torch.randn_like(plain)
        ours = nets.NarrowConv.apply(x, weight, stride, kernel // 2)
        assert torch.equal(ours, plain)
        for a, b in zip(torch.autograd.grad(ours, (x, weight), grad), torch.autograd.grad(plain, (x, weight), grad)):
            torch.testing.assert_close(a, b)
    laid = nets.side_by_side(x[:19], 4)                                    # each where it belongs, zeros between
    assert laid.shape == (2, 2, 3, 64) and torch.equal(laid[1, :, :, 8:11], x[18]) and not laid[:, :, :, 3::4].any()
    assert not laid[1, :, :, 12:].any()


def test_a_network_in_bfloat16_learns_what_plain_convolutions_would():
    """Also that the way for narrow maps is the one taken."""
    x, grads = torch.rand(24, 1, 28, 28, generator=data.generator('cpu', 0)), []
    for narrow in (True, False):
        model = nets.build('simclr', 'resnet', (1, 28, 28), 0.25)
        for part in model.modules():
            if isinstance(part, nets.Conv) and not narrow:
                part.__class__ = torch.nn.Conv2d
        torch.manual_seed(0)
        for p in model.parameters():
            torch.nn.init.normal_(p, 0, 0.1) if p.ndim > 1 else torch.nn.init.ones_(p)
        with mock.patch.object(nets, 'side_by_side', wraps=nets.side_by_side) as laid, \
                train.autocast(x.device, True):
            losses.nt_xent(*model(x).chunk(2), 0.2).backward()
        assert laid.call_count == 12 * narrow                              # six of nine convolutions, twice each
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.999


def test_width_scales_every_network():
    assert [nets.channels(64, w) for w in (0.01, 0.5, 1, 1.06, 2)] == [8, 32, 64, 64 + 8 * (64 * 1.06 / 8 > 8.5), 128]
    for method, net in itertools.product(UNLABELLED, ('fc', 'conv', 'resnet')):
        sizes = [nets.size(nets.build(method, net, (1, 10, 10), width, 8)) for width in (0.25, 0.5, 1.0)]
        assert sizes[0] < sizes[1] < sizes[2] and (method == 'ae' or sizes[2] > 2 * sizes[1])


def test_reparameterize_draws_from_the_posterior_and_lets_gradients_through():
    mu, logvar = (torch.full((100_000,), v, requires_grad=True) for v in (2.0, math.log(9)))
    z = nets.reparameterize(mu, logvar, data.generator('cpu', 0))
    assert abs(z.mean() - 2) < 0.05 and abs(z.std() - 3) < 0.05
    z.sum().backward()
    assert close(mu.grad, np.ones(100_000)) and close(logvar.grad, (z - mu).detach() / 2, 1e-4)   # sigma eps / 2


def test_vae_codes_are_means_and_pictures_come_from_the_prior():
    torch.manual_seed(0)
    model, x = nets.build('vae', 'fc', (1, 8, 9), 0.1, 5).eval(), rand(4, 1, 8, 9)
    mu, logvar = model.posterior(x)
    assert torch.equal(model.encode(x), mu) and torch.equal(mu, model.encoder(x)[:, :5])
    assert torch.equal(logvar, model.encoder(x)[:, 5:].clamp(-10, 10))
    logits, *_ = model(x, data.generator('cpu', 0))
    assert torch.equal(logits, model.decoder(nets.reparameterize(mu, logvar, data.generator('cpu', 0))))
    line = nets.interpolation(model, x[:1], x[1:2], 5)
    assert close(line[0], model.decode(mu[:1])[0]) and close(line[4], model.decode(mu[1:2])[0])
    assert close(line[1], model.decode(mu[:1] * 0.75 + mu[1:2] * 0.25)[0])
    drawn = nets.samples(model, 5, 6, data.generator('cpu', 0))
    assert torch.equal(drawn, model.decode(torch.randn(6, 5, generator=data.generator('cpu', 0))))


# losses.py ---------------------------------------------------------------------------------------------------

def nt_xent_by_loops(z1, z2, tau):
    """Equation 1 of arXiv 2002.05709, one term after another, in float64."""
    z = [v / v.norm() for v in torch.cat([z1, z2]).double()]
    n, total = len(z), 0
    for i in range(n):
        j = (i + n // 2) % n
        others = sum((z[i] @ z[k] / tau).exp() for k in range(n) if k != i)
        total = total - ((z[i] @ z[j] / tau).exp() / others).log()
    return total / n


def test_nt_xent_is_equation_1_written_out():
    for B, tau, chunk in itertools.product((1, 2, 5), (0.1, 0.5, 2.0), (1 << 20, 30, 1)):
        z1, z2 = randn(B, 7, seed=B).requires_grad_(), randn(B, 7, seed=9).requires_grad_()
        with mock.patch.object(losses, 'CHUNK', chunk):
            loss, wanted = losses.nt_xent(z1, z2, tau), nt_xent_by_loops(z1, z2, tau)
        assert close(loss, wanted)
        for a, b in zip(torch.autograd.grad(loss, (z1, z2)), torch.autograd.grad(wanted, (z1, z2))):
            assert close(a, b, 1e-4)


def test_neighbouring_is_nt_xent_of_each_picture_with_a_neighbour_of_its_own():
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    all_x = (rand(30, 1, 2, 2) * 255).byte()
    near = torch.randint(30, (6, 4), generator=torch.Generator().manual_seed(0))
    seen = []
    def pictures(ids):
        seen.append(ids)
        return all_x[ids]
    off = data.Views(crop=1, flip=False, rotate=0, jitter=0)
    for step in range(40):
        x, g = all_x[:6] / 255, data.generator('cpu', step)
        contrast = functools.partial(train.contrastive, tau=0.5, views=off)
        loss, _ = train.neighbouring(net, x, near, g, pictures, contrast)
        other = all_x[seen[-1]] / 255
        assert close(loss, nt_xent_by_loops(net(x), net(other), 0.5))
    for i, drawn in enumerate(torch.stack(seen, 1)):                      # each of its neighbours, and nobody else
        assert set(drawn.tolist()) == set(near[i].tolist())


def test_simclr_goes_on_with_neighbours_in_the_features_of_other_runs():
    flags = [w for w in tiny('simclr', '--seed', 1) if w not in ('--width', 0.1)]
    both = ['--encoder', finished('simclr'), finished('conv')]
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        there, seen = cwd / 'runs' / 'simclr', []
        def kept(model, x, near, g, pictures, contrast, neighbouring=train.neighbouring):
            seen.append((x, near, pictures))
            return neighbouring(model, x, near, g, pictures, contrast)
        with mock.patch.object(train, 'neighbouring', kept):
            code, _, err = run(*flags, *both, '--neighbours', 3, '--epochs', 1, '--batch-size', 108, cwd=cwd)
        assert code == 0 and not err, err
        ds = data.load(cwd / 'tiny.npz')
        ids, _ = data.split(120, 5000, 1)
        (x, near, pictures), = seen                                       # all training pictures, no validation one
        assert near.shape == (108, 3)
        h = torch.cat([torch.nn.functional.normalize(h - h.mean(0), dim=1) for h in (
            stages.load_model(f, runs.read_config(f), torch.device('cpu')).eval().encode(data.to_float(ds.x_train))
            for f in both[1:])], 1).detach()[ids]
        where = [next(i for i in range(108) if torch.equal(ds.x_train[ids[i]], p)) for p in (x * 255).round().byte()]
        for i, mine in zip(where, near):
            nearest = torch.cosine_similarity(h[i], h, dim=1).argsort(descending=True)
            assert sorted(mine.tolist()) == sorted(nearest[1:4].tolist())
            assert torch.equal(pictures(mine), ds.x_train[ids[mine]])
        held, counted, gathered = reading()
        with held, counted:
            p = data.Pictures(ds.x_train, torch.device('cpu'), ids)
            assert torch.equal(p.at(near[0]), ds.x_train[ids[near[0]]]) and gathered == [3]
        code, _, err = run(*flags, *both, '--epochs', 0, '--overwrite', cwd=cwd)  # begins with that run's own weights
        assert code == 0 and not err, err
        assert runs.state_digest(weights(there)['model']) == runs.state_digest(weights(finished('simclr'))['model'])
        for stop in stopping(signal.SIGTERM), stopping(Killed), contextlib.nullcontext():
            with stop, contextlib.suppress(Killed):
                run(*flags, *both, '--name', 'stopped', '--resume', '--save-every', 1e-9, cwd=cwd)
        assert run(*flags, *both, '--overwrite', cwd=cwd)[0] == 0
        assert_same_run(cwd / 'runs' / 'stopped', there)
        before = measured(there)
        assert run('--evaluate', there, cwd=cwd)[0] == 0 and measured(there) == before
        code, _, err = run(*[w for w in tiny('classify') if w not in ('--width', 0.1)], '--encoder', there, cwd=cwd)
        assert code == 0 and not err, err
        refused(*flags, *both[:1], finished('conv'), '--name', 'no', cwd=cwd, said=['--method simclr goes on', 'conv'])
        refused(*flags, '--neighbours', 3, '--name', 'no', cwd=cwd, said=['--neighbours', '--encoder'])
        refused(*flags, *both, '--width', 2, '--name', 'no', cwd=cwd, said=['--width'])
        assert not (cwd / 'runs' / 'no').exists()


def test_nt_xent_of_equal_rows_is_chance_and_small_tau_does_not_overflow():
    for B, tau in itertools.product((1, 4, 100), (0.01, 0.5)):
        z = torch.ones(B, 3) * 7
        assert close(losses.nt_xent(z, z, tau), math.log(2 * B - 1), 1e-4)
    z1, z2 = (torch.eye(4) * 1e3).requires_grad_(), -torch.eye(4) * 1e3
    loss = losses.nt_xent(z1, z2, 0.01)                                   # positives opposed: 1 / tau + log 6, nearly
    loss.backward()
    assert close(loss, 100 + math.log(6), 1e-4) and z1.grad.isfinite().all()
    assert losses.nt_xent(torch.eye(4), torch.eye(4), 0.01) < 1e-6


def test_losses_are_float32_inside_bfloat16_autocast():
    x, logits, mu, logvar = rand(3, 1, 4, 5), randn(3, 1, 4, 5), randn(3, 6, seed=1), randn(3, 6, seed=2)
    for loss, args in ((losses.mse, (logits, x)), (losses.nt_xent, (mu, logvar, 0.1)),
                       (lambda *v: losses.elbo(*v)[0], (logits, x, mu, logvar)),
                       (lambda *v: losses.elbo(*v, likelihood='gaussian')[0], (logits, x, mu, logvar))):
        plain = loss(*args)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            mixed = loss(*args)
        assert mixed.dtype == torch.float32 and torch.equal(mixed, plain)
        half = loss(*(a.bfloat16() if isinstance(a, torch.Tensor) else a for a in args))
        rounded = loss(*(a.bfloat16().float() if isinstance(a, torch.Tensor) else a for a in args))
        assert half.dtype == torch.float32 and torch.equal(half, rounded)


def test_mse_is_a_mean_over_pixels_and_batch():
    a, b = rand(2, 3, 4, 5), rand(2, 3, 4, 5, seed=1)
    assert close(losses.mse(a, b), sum((p - q) ** 2 for p, q in zip(a.flatten().tolist(), b.flatten().tolist())) / 120)


def test_cross_entropy_and_mixup_by_their_formulas():
    logits, y, x = randn(6, 4), torch.arange(6) % 4, rand(6, 1, 8, 8)
    log_p = (logits.double().exp() / logits.double().exp().sum(1, keepdim=True)).log()
    assert close(losses.cross_entropy(logits, y), -sum(log_p[i, y[i]] for i in range(6)) / 6)
    model = lambda x: x.flatten(1)[:, :4]
    assert close(train.classification(model, x, y, None, ALL_OFF)[0], losses.cross_entropy(model(x), y))
    loss, _ = train.classification(model, x, y, data.generator('cpu', 0), ALL_OFF, mixup=0.5)
    g = data.generator('cpu', 0)
    share, other = np.random.default_rng(g.initial_seed()).beta(0.5, 0.5), torch.randperm(6, generator=g)
    target = share * torch.eye(4)[y] + (1 - share) * torch.eye(4)[y[other]]          # arXiv 1710.09412, eq. 1
    mixed = model(share * x + (1 - share) * x[other]).double()
    assert close(loss, -(target * (mixed - mixed.logsumexp(1, keepdim=True))).sum() / 6) and 0 < share < 1


def test_elbo_agrees_with_torch_distributions():
    from torch.distributions import Bernoulli, Normal, kl_divergence
    x, logits, mu, logvar = rand(3, 2, 4, 5), randn(3, 2, 4, 5), randn(3, 6, seed=1), randn(3, 6, seed=2)
    leaves = [v.requires_grad_() for v in (logits, mu, logvar)]
    kl = kl_divergence(Normal(mu, (logvar / 2).exp()), Normal(0, 1))
    assert close(losses.kl_normal(mu, logvar), kl)
    likelihoods = {'bernoulli': Bernoulli(logits=logits, validate_args=False),
                   'gaussian': Normal(logits.sigmoid(), (1 / (2 * torch.pi)) ** 0.5)}
    for (name, p), beta in itertools.product(likelihoods.items(), (0.0, 1.0, 4.0)):
        recon_wanted, kl_wanted = -p.log_prob(x).sum() / 3, kl.sum() / 3    # sums, but a mean over the batch of 3
        loss, recon, kl_found = losses.elbo(logits, x, mu, logvar, beta, likelihood=name)
        assert close(recon, recon_wanted) and close(kl_found, kl_wanted)
        assert close(loss, recon_wanted + beta * kl_wanted)
        wanted = torch.autograd.grad(recon_wanted + beta * kl_wanted, leaves, retain_graph=True)
        for a, b in zip(torch.autograd.grad(loss, leaves, retain_graph=True), wanted):
            assert close(a, b, 1e-4)
    with raises(ValueError, 'poisson'):
        losses.elbo(logits, x, mu, logvar, likelihood='poisson')


# distributed.py ----------------------------------------------------------------------------------------------

TWO_STEPS = '''
import sys, torch
from unittest import mock
import data, distributed, nets, train
def two_steps():
    torch.manual_seed(0)
    model = distributed.sync_batchnorm(nets.build('simclr', 'resnet', (1, 8, 8), 0.1)).train()
    opt, seen = torch.optim.SGD(model.parameters(), 0.1), []
    x1, x2 = torch.rand(2, 12, 1, 8, 8, generator=data.generator('cpu', 0))
    for step in range(2):
        ids = distributed.share(torch.arange(6 * step, 6 * step + 6))
        with mock.patch.object(train.data, 'augment', lambda x, views, g, ids=ids: torch.cat([x1[ids], x2[ids]])):
            loss, _ = train.contrastive(model, x1[ids], None, 0.2)
        opt.zero_grad()
        loss.backward()
        seen.append(distributed.average_gradients(model, loss).item())
        opt.step()
    return seen, model.state_dict()
if __name__ == '__main__':
    torch.set_num_threads(1)
    distributed.start(torch.device('cpu'))
    result = two_steps()
    if distributed.rank() == 0:
        torch.save(result, sys.argv[1])
    torch.distributed.barrier()                                           # written, whatever happens at exit
    distributed.stop()
'''


def test_batchnorm_across_processes_keeps_its_digits_far_from_zero():
    for at, spread in (0, 1), (30, 0.01), (30, 0.001):
        ours, theirs = (torch.nn.BatchNorm2d(3) for _ in range(2))
        ours.__class__, x = distributed.SyncBatchNorm, at + spread * randn(6, 3, 4, 5)
        halves = [x[:3].clone().requires_grad_(), x[3:].clone().requires_grad_()]
        stats = [torch.stack([h.mean((0, 2, 3)), h.var((0, 2, 3), correction=0)]) for h in halves]
        with mock.patch.object(distributed, 'world', lambda: 2), mock.patch.object(        # what the other one sent
                distributed, 'gather', lambda z, stats=stats: torch.stack([z[0], stats[1]])):
            found = ours(halves[0])
        x.requires_grad_()
        wanted, g = theirs(x), randn(3, 3, 4, 5, seed=1)
        assert close(found, wanted[:3], 2e-3)
        assert close(ours.running_mean, theirs.running_mean) and close(ours.running_var, theirs.running_var, 2e-3)
        for a, b in zip(torch.autograd.grad(found, halves, g), torch.autograd.grad(wanted[:3], x, g)[0].split(3)):
            assert close(a * spread, b * spread, 5e-3)


def test_each_process_of_torchrun_takes_a_card_of_its_own():
    cpu, cuda = torch.device('cpu'), torch.device('cuda')
    assert distributed.own(cuda) == cuda and distributed.own(cpu) == cpu
    with mock.patch.dict(os.environ, WORLD_SIZE='4', LOCAL_RANK='3'):
        assert distributed.own(cuda) == torch.device('cuda:3') and distributed.own(cpu) == cpu
        with raises(ValueError, '--device cpu'):
            distributed.start(torch.device('mps'))


def test_a_batch_with_less_than_a_picture_for_each_process_is_refused():
    x = data.Pictures(torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.device('cpu'))
    with mock.patch.object(distributed, 'world', lambda: 3), raises(ValueError, '--batch-size 2', '3 processes'):
        stages.train_model(None, mock.Mock(batch_size=2), None, None, x)


def test_two_processes_with_half_a_batch_each_step_as_one_with_the_whole():
    if not torch.distributed.is_gloo_available():
        raise unittest.SkipTest('no gloo')
    with folder() as f:
        (f / 'two.py').write_text(TWO_STEPS)
        process = python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, f / 'two.py', f / 'out',
                         PYTHONPATH=str(HERE))
        _, err = process.communicate(timeout=120)
        assert (f / 'out').exists(), err
        seen, state = torch.load(f / 'out', weights_only=True)
    here = {'__name__': 'here'}
    exec(TWO_STEPS, here)
    wanted, alone = here['two_steps']()
    assert close(seen, wanted, 1e-4) and state.keys() == alone.keys()
    for name in alone:                                                    # BatchNorm buffers included
        assert close(state[name], alone[name], 1e-3), name


def test_a_killed_worker_ends_the_job_and_one_process_finishes_it():
    posix()
    if not torch.distributed.is_gloo_available():
        raise unittest.SkipTest('no gloo')
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        process = python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, HERE / 'ssl.py',
                         *tiny('simclr'), '--epochs', 5000, '--save-every', 0.01, cwd=cwd)
        until = time.monotonic() + 60
        while not (cwd / 'runs/simclr/checkpoint.previous.pt').exists() and time.monotonic() < until:
            time.sleep(0.05)
        workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        assert process.returncode and 'ssl.py: another process of the group has ended; --resume continues' in err, err
        done = len(logged(cwd / 'runs/simclr'))
        code, out, err = run(*tiny('simclr'), '--resume', '--epochs', done + 2, cwd=cwd)
        assert code == 0 and len(logged(cwd / 'runs/simclr')) == done + 2 and measured(cwd / 'runs/simclr'), (out, err)


# evaluate.py -------------------------------------------------------------------------------------------------

def ssim_by_loops(x, y, data_range, rows=11, cols=11):
    """Wang et al. 2004 for one channel, window by window, pixel by pixel."""
    w = [[math.exp(-((i - rows // 2) ** 2 + (j - cols // 2) ** 2) / (2 * 1.5 ** 2)) for j in range(cols)]
         for i in range(rows)]
    norm = sum(map(sum, w))
    c1, c2, values = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2, []
    for top, left in itertools.product(range(len(x) - rows + 1), range(len(x[0]) - cols + 1)):
        cells = [(w[i][j] / norm, x[top + i][left + j], y[top + i][left + j])
                 for i in range(rows) for j in range(cols)]
        mx, my = sum(k * a for k, a, _ in cells), sum(k * b for k, _, b in cells)
        vx, vy = sum(k * (a - mx) ** 2 for k, a, _ in cells), sum(k * (b - my) ** 2 for k, _, b in cells)
        vxy = sum(k * (a - mx) * (b - my) for k, a, b in cells)
        values.append((2 * mx * my + c1) * (2 * vxy + c2) / ((mx ** 2 + my ** 2 + c1) * (vx + vy + c2)))
    return sum(values) / len(values)


def test_ssim_is_wang_2004_by_scalar_loops():
    for C, H, W, *taps in (1, 14, 13, 11, 11), (3, 12, 15, 11, 11), (1, 8, 9, 7, 9), (1, 10, 14, 9, 11):
        for scale in 1.0, 255.0:
            x = rand(2, C, H, W)
            y = (x + 0.3 * randn(2, C, H, W, seed=1)).clamp(0, 1)
            found = evaluate.ssim(x * scale, y * scale, scale)
            for i in range(2):
                by_channel = [ssim_by_loops((x[i, c] * scale).tolist(), (y[i, c] * scale).tolist(), scale, *taps)
                              for c in range(C)]
                assert close(found[i], sum(by_channel) / C, 1e-4)
    assert close(evaluate.ssim(x, x), [1, 1]) and evaluate.ssim(x, 1 - x).max() < 0.5
    flat = [torch.full((1, 1, 12, 12), v) for v in (0.2, 0.6)]
    assert close(evaluate.ssim(*flat), [(2 * 0.12 + 1e-4) / (0.04 + 0.36 + 1e-4)], 1e-4)


def test_psnr_is_20_db_for_a_tenth_of_the_range():
    x = torch.full((2, 1, 8, 8), 0.5)
    assert close(evaluate.psnr(x, x + 0.1), [20, 20], 1e-4)
    assert close(evaluate.psnr(x * 255, x * 255 + 2.55, 255), [40, 40], 1e-4)
    y = rand(2, 1, 8, 8)
    assert close(evaluate.psnr(x, y), 10 * np.log10(1 / ((x - y) ** 2).double().mean((1, 2, 3)).numpy()))
    assert evaluate.psnr(x, x).tolist() == [math.inf] * 2


def blobs(n=60, K=3, D=2, spread=0.3, seed=0):
    """(points (n, D) around K far centres, the blob of each)."""
    y = torch.arange(n) % K
    return randn(n, D, seed=seed) * spread + torch.eye(K, D)[y] * 10 + 5 * (y == K - 1)[:, None], y


def test_kmeans_finds_blobs_and_repeats_by_seed():
    x, y = blobs()
    index, centres, inertia = evaluate.kmeans(x, 3, seed=4)
    assert evaluate.hungarian_accuracy(index, y)[0] == 1
    for i in range(3):
        assert close(centres[i], x[index == i].mean(0))
    assert close(inertia, sum(((x[index == i] - x[index == i].mean(0)) ** 2).sum() for i in range(3)), 1e-4)
    again = evaluate.kmeans(x, 3, seed=4)
    assert torch.equal(again[0], index) and torch.equal(again[1], centres) and again[2] == inertia


def test_kmeans_reaches_the_best_of_all_assignments_of_tiny_sets():
    for seed, k in itertools.product(range(4), (1, 2, 3)):
        x = randn(7, 2, seed=seed)
        points, best = x.double().numpy(), math.inf
        for assignment in itertools.product(range(k), repeat=7):
            parts = [points[np.array(assignment) == i] for i in range(k)]
            if all(len(p) for p in parts):
                best = min(best, sum(((p - p.mean(0)) ** 2).sum() for p in parts))
        assert close(evaluate.kmeans(x, k, restarts=20)[2], best, 1e-4)


def test_kmeans_restarts_an_empty_cluster_at_the_farthest_point():
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [9, 9], [9, 8]])
    start = torch.tensor([[0.0, 0], [500, 500]])                          # nobody is nearest to the second
    index, centres, _ = evaluate.kmeans(x, 2, iterations=1, centres=start)
    assert close(centres, [[3.8, 3.6], [9, 9]])                           # the mean of all, and the farthest point
    index, centres, _ = evaluate.kmeans(x, 2, centres=start)
    assert index.tolist() == [0, 0, 0, 1, 1] and close(centres, [[1 / 3, 1 / 3], [9, 8.5]])
    two_empty = torch.tensor([[0.0, 0], [500, 500], [600, 600]])
    _, centres, _ = evaluate.kmeans(x, 3, iterations=1, centres=two_empty)
    assert sorted(centres[1:].tolist()) == [[9, 8], [9, 9]]               # each a point of its own


def test_kmeans_is_finite_for_equal_points_and_refuses_more_clusters_than_points():
    for x in torch.ones(6, 3), torch.cat([torch.zeros(5, 2), torch.ones(1, 2)]), torch.zeros(1, 4):
        for k in range(1, len(x) + 1):
            index, centres, inertia = evaluate.kmeans(x, k)
            assert centres.isfinite().all() and centres.shape == (k, x.shape[1]) and index.max() < k
            assert inertia == 0 or k == 1
        for k in 0, len(x) + 1:
            with raises(ValueError, k, len(x)):
                evaluate.kmeans(x, k)


def test_nearest_agrees_with_scipy_also_in_chunks():
    x, c = randn(50, 4), randn(7, 4, seed=1)
    d = scipy.spatial.distance.cdist(x.numpy(), c.numpy(), 'sqeuclidean')
    with mock.patch.object(evaluate, 'CHUNK', 30):
        in_chunks = evaluate.nearest(x, c)
    for index, dist in evaluate.nearest(x, c), in_chunks:
        assert index.tolist() == d.argmin(1).tolist() and close(dist, d.min(1), 1e-4)


def cases():
    """Pairs of cluster ids and labels: fewer, as many and more clusters than classes, gaps, one cluster."""
    rng = np.random.default_rng(0)
    for clusters, classes in (2, 4), (3, 3), (5, 3), (4, 4), (1, 3), (3, 1):
        yield rng.integers(0, clusters, 25), rng.integers(0, classes, 25)
    yield np.array([0, 3, 3, 0, 5]), np.array([1, 1, 4, 4, 4])


def test_hungarian_accuracy_is_the_best_of_all_matchings():
    for pred, true in cases():
        clusters, classes = int(pred.max()) + 1, int(true.max()) + 1
        slots = list(range(classes)) + [-1] * clusters                    # -1: matched to no class, so all wrong
        best = max(sum(match[p] == y for p, y in zip(pred, true)) / len(pred)
                   for match in set(itertools.permutations(slots, clusters)))
        accuracy, mapping = evaluate.hungarian_accuracy(pred, true)
        assert close(accuracy, best) and len(set(mapping.values())) == len(mapping) == min(clusters, classes)
        assert close(sum(mapping.get(p, -1) == y for p, y in zip(pred, true)) / len(pred), best)
    assert evaluate.hungarian_accuracy([1, 1, 0, 2], [0, 0, 1, 1])[0] == 0.75    # cluster 2 counts as wrong


def test_nmi_is_mutual_information_over_the_mean_entropy():
    for pred, true in cases():
        n, mutual = len(pred), 0.0
        entropy = lambda v: -sum(k / len(v) * math.log(k / len(v)) for k in np.unique(v, return_counts=True)[1])
        for i, j in itertools.product(set(pred.tolist()), set(true.tolist())):
            both = sum((p == i) & (y == j) for p, y in zip(pred, true)) / n
            if both:
                mutual += both * math.log(both / ((pred == i).mean() * (true == j).mean()))
        mean = (entropy(pred) + entropy(true)) / 2
        assert close(evaluate.nmi(pred, true), mutual / mean if mean else 0, 1e-6)
    assert evaluate.nmi([0] * 4, [0, 1, 0, 1]) == evaluate.nmi([0] * 4, [0] * 4) == 0
    assert close(evaluate.nmi([2, 2, 0, 1], [0, 0, 1, 2]), 1)


def test_ari_counts_pairs():
    for pred, true in cases():
        a = b = c = d = 0                                                 # pairs together in both, one, other, none
        for i, j in itertools.combinations(range(len(pred)), 2):
            same, equal = pred[i] == pred[j], true[i] == true[j]
            a, b, c, d = a + (same & equal), b + (same & ~equal), c + (~same & equal), d + (~same & ~equal)
        wanted = 2 * (a * d - b * c) / ((a + b) * (b + d) + (a + c) * (c + d))
        assert close(evaluate.ari(pred, true), wanted, 1e-6)
    assert evaluate.ari([0] * 4, [0, 1, 0, 1]) == 0 and evaluate.ari([1, 1, 0], [0, 0, 1]) == 1
    assert evaluate.ari([0] * 4, [0] * 4) == 1 and evaluate.ari([0, 1, 2], [2, 0, 1]) == 1


def test_purity_is_the_share_of_each_clusters_majority():
    for pred, true in cases():
        right = sum(max((true[pred == i] == j).sum() for j in set(true.tolist())) for i in set(pred.tolist()))
        assert close(evaluate.purity(pred, true), right / len(pred), 1e-6)
    assert evaluate.purity([0, 0, 0, 1], [0, 1, 0, 1]) == 0.75


def test_scores_take_integer_arrays_of_any_kind():
    pred, true = [0, 1, 200, 200, 1], [3, 3, 100, 100, 100]             # 200 * 101 overflows uint8 and int8
    scores = lambda *v: [f(*v) for f in (evaluate.hungarian_accuracy, evaluate.nmi, evaluate.ari, evaluate.purity)]
    for make, kind in ((np.array, np.uint8), (np.array, np.int16), (np.array, np.uint64),
                       (torch.tensor, torch.uint8), (torch.tensor, torch.int32), (torch.tensor, torch.int64)):
        p, y = make(pred, dtype=kind), make(true, dtype=kind)
        assert scores(p, y) == scores(pred, true) and evaluate.confusion_matrix(p, y, 201)[100, 200] == 2
    for p, y in ([0, 1], [0]), ([], []), ([[0]], [[0]]), ([-1, 0], [0, 0]):
        with raises(ValueError):
            evaluate.contingency(np.array(p, int), np.array(y, int))


def test_confusion_matrix_and_f1_by_loops():
    rng = np.random.default_rng(0)
    pred, true = rng.integers(0, 3, 50), rng.integers(0, 4, 50)
    table = evaluate.confusion_matrix(pred, torch.tensor(true), 5)
    for i, j in itertools.product(range(5), range(5)):
        assert table[i, j] == sum(1 for p, y in zip(pred, true) if (y, p) == (i, j))
    for k, f in enumerate(evaluate.f1(table)):
        hits, said, there = ((pred == k) & (true == k)).sum(), (pred == k).sum(), (true == k).sum()
        assert close(f, 2 / (said / hits + there / hits) if hits else 0)


def test_knn_agrees_with_a_vote_written_out():
    x, y, t = randn(80, 5).double().numpy(), np.arange(80) % 4, randn(30, 5, seed=1).double().numpy()
    args = torch.tensor(x).float(), torch.tensor(y), torch.tensor(t * 3).float()   # cosine: the length is nothing
    for k in 1, 5, 20, 200:
        wanted = []
        for row in t:
            s = [row @ v / np.linalg.norm(row) / np.linalg.norm(v) for v in x]
            votes = [0.0] * 4
            for i in sorted(range(80), key=lambda i: -s[i])[:k]:
                votes[y[i]] += math.exp(s[i] / 0.07)
            wanted.append(votes.index(max(votes)))
        assert evaluate.knn(*args, k=k).tolist() == wanted
        with mock.patch.object(evaluate, 'CHUNK', 300):
            assert evaluate.knn(*args, k=k).tolist() == wanted


def logistic_by_scipy(x, y, K, l2):
    """log p (N, K) function of the minimiser of cross-entropy + l2 / 2 |W|^2 on standardised x, in float64."""
    mean, std, n = x.mean(0), x.std(0), len(x)
    xs, onehot = (x - mean) / std, np.eye(K)[y]
    def logp(v, theta):
        W = theta.reshape(-1, K)
        s = v @ W[:-1] + W[-1]
        return s - scipy.special.logsumexp(s, 1, keepdims=True)
    def objective(theta):
        p = logp(xs, theta)
        W = theta.reshape(-1, K)
        error = (np.exp(p) - onehot) / n
        return (-(p * onehot).sum() / n + l2 / 2 * (W[:-1] ** 2).sum(),
                np.vstack([xs.T @ error + l2 * W[:-1], error.sum(0)]).ravel())
    theta = scipy.optimize.minimize(objective, np.zeros((x.shape[1] + 1) * K), jac=True, method='L-BFGS-B',
                                    options=dict(maxiter=5000, ftol=1e-13, gtol=1e-7)).x
    return lambda v: logp((v - mean) / std, theta)


def test_linear_probe_is_the_optimum_that_scipy_finds():
    x, noise = randn(90, 4) * torch.tensor([1, 10, 0.1, 3]) + 5, randn(90, seed=3)
    y = ((x[:, 0] > 5).long() + (x[:, 2] + 0.05 * noise > 5).long())
    for l2 in 1e-3, 1e-1:
        predict = evaluate.logistic_regression(x, y, 3, l2)
        wanted = logistic_by_scipy(x.double().numpy(), y.numpy(), 3, l2)
        assert close(predict(x).log_softmax(1), wanted(x.double().numpy()), 5e-3)
    a, b, test = slice(0, 50), slice(50, 90), randn(40, 4, seed=7) * torch.tensor([1, 10, 0.1, 3]) + 5
    X, Y, l2s = x.double().numpy(), y.numpy(), (1e-3, 1e-1, 10.0)
    scores = {l2: (logistic_by_scipy(X[a], Y[a], 3, l2)(X[b]).argmax(1) == Y[b]).mean() for l2 in l2s}
    logits, l2 = evaluate.linear_probe(x[a], y[a], x[b], y[b], test, l2s)
    assert scores[l2] == max(scores.values()) > min(scores.values())      # chosen on validation, fitted on both
    assert logits.argmax(1).tolist() == logistic_by_scipy(X, Y, 3, l2)(test.double().numpy()).argmax(1).tolist()


def test_linear_probe_standardises_by_training_rows_only():
    x, y = blobs(60, 3, 4, spread=4)
    test, outliers = x[40:] + 1, randn(500, 4) * 1e4
    logits, l2 = evaluate.linear_probe(x[:30], y[:30], x[30:40], y[30:40], test)
    with_others, _ = evaluate.linear_probe(x[:30], y[:30], x[30:40], y[30:40], torch.cat([test, outliers]))
    assert torch.equal(with_others[:20], logits) and len(set(logits.argmax(1).tolist())) == 3
    affine = lambda v: v * torch.tensor([100, 0.01, 1, 5]) - 3
    moved, _ = evaluate.linear_probe(affine(x[:30]), y[:30], affine(x[30:40]), y[30:40], affine(test))
    assert torch.equal(moved.argmax(1), logits.argmax(1))
    alone, l2 = evaluate.linear_probe(x[:30], y[:30], x[:0], y[:0], test)       # nothing to choose with
    assert l2 == 1e-2 and len(alone) == 20


def test_pca_agrees_with_the_singular_value_decomposition():
    x = randn(50, 6) @ torch.diag(torch.tensor([5.0, 4, 3, 2, 1, 0.5])) + 7
    X = x.double().numpy()
    _, _, vt = np.linalg.svd(X - X.mean(0), full_matrices=False)
    for k in 1, 3, 6:
        pca = evaluate.PCA(x, k)
        assert close(pca.encode(x).abs(), abs((X - X.mean(0)) @ vt[:k].T), 1e-3)
        assert close(pca.decode(pca.encode(x)), (X - X.mean(0)) @ vt[:k].T @ vt[:k] + X.mean(0), 1e-4)
    x = torch.cat([x, randn(50, 300) * 0.1], 1)[:20]                      # more pixels than pictures
    X = x.double().numpy()
    _, _, vt = np.linalg.svd(X - X.mean(0), full_matrices=False)
    assert close(evaluate.PCA(x, 5).encode(x).abs(), abs((X - X.mean(0)) @ vt[:5].T), 1e-3)


def test_effective_rank_and_active_units_of_known_spectra():
    basis = np.linalg.qr(np.hstack([np.ones((40, 1)), randn(40, 5).numpy()]))[0][:, 1:]    # centred, orthonormal
    for s in ([1, 1, 1, 1, 1], [1, 0, 0, 0, 0], [4, 2, 1, 1, 0]):
        p = np.array(s) / sum(s)
        wanted = math.exp(-sum(v * math.log(v) for v in p if v))
        assert close(evaluate.effective_rank(torch.tensor(basis * s + 3)), wanted, 1e-3)
    assert close(evaluate.effective_rank(torch.ones(9, 4)), 1)
    assert evaluate.active_units(torch.tensor([[0.0, 1, 5], [0.1, 2, 5]])) == 1    # variances 0.005, 0.5, 0


def test_in_chunks_is_the_function_of_all_pictures_as_floats():
    x = torch.arange(250, dtype=torch.uint8).view(-1, 1, 1, 1)
    sizes = []
    out = evaluate.in_chunks(lambda v: (sizes.append(len(v)), v.flatten(1) * 2)[1], x, size=100)
    assert sizes == [100, 100, 50] and close(out.flatten(), np.arange(250) * 2 / 255)


def measure(**kwargs):
    ds = data._dataset('tiny', kwargs)
    return evaluate.measure(ds, *data.split(len(ds.x_train), 20, 0), lambda x: x.flatten(1), probe_share=0.5)[0]


def test_measure_scores_separable_classes_1_and_shuffled_labels_by_chance():
    good = arrays(200, 90)
    sure = measure(**good)
    assert sure['knn'] == sure['probe'] == sure['kmeans_acc'] == sure['kmeans_purity'] == 1
    assert close([sure['kmeans_nmi'], sure['kmeans_ari']], [1, 1]) and sure['f1'] == [1, 1, 1]
    assert (sure['split'], sure['n'], sure['knn_labels'], sure['probe_labels']) == ('test', 90, 200, 100)
    rng = np.random.default_rng(0)
    chance = measure(**{**good, 'y_test': rng.permutation(good['y_test'])})
    assert all(0.2 < chance[key] < 0.5 for key in ('knn', 'probe', 'kmeans_acc', 'kmeans_purity'))
    assert abs(chance['kmeans_ari']) < 0.1 and chance['probe_l2'] == sure['probe_l2']


def test_the_probe_chooses_on_labels_of_all_classes_also_where_pictures_are_sorted_by_class():
    a = arrays(1200, 30, K=6)
    order = a['y_train'].argsort(kind='stable')
    with mock.patch.object(evaluate, 'linear_probe', wraps=evaluate.linear_probe) as probe:
        measure(**{**a, 'x_train': a['x_train'][order], 'y_train': a['y_train'][order]})
    _, y, _, y_val, _ = probe.call_args.args
    assert len(y_val) == 20 and len(y) == 500                             # all that are kept here
    ds = data._dataset('sorted', {**a, 'x_train': a['x_train'][order], 'y_train': a['y_train'][order]})
    with mock.patch.object(evaluate, 'linear_probe', wraps=evaluate.linear_probe) as probe:
        evaluate.measure(ds, *data.split(1200, 400, 0), lambda x: x.flatten(1), probe_share=0.15)
    y_val = probe.call_args.args[3]
    assert len(y_val) == 30 and len(y_val.unique()) == 6


def test_measure_says_what_it_leaves_out():
    a = arrays(200, 90)
    bare = measure(x_train=a['x_train'])
    assert bare['left_out'] == ['knn', 'probe', 'kmeans'] and bare['split'] == 'validation' and bare['n'] == 20
    assert not {'knn', 'probe', 'kmeans_acc', 'f1'} & set(bare) and bare['features'] == 120
    assert measure(x_train=a['x_train'], x_test=a['x_test'])['split'] == 'test'
    for without_test in ({k: a[k] for k in ('x_train', 'y_train')}, {k: a[k] for k in a if k != 'y_test'}):
        m = measure(**without_test)
        assert m['split'] == 'validation' and m['n'] == 20 and m['knn'] == m['probe'] == 1 and not m['left_out']
        assert m['knn_labels'] == 180                                     # those it is scored on are not in the bank
    m = measure(**{k: a[k] for k in a if k != 'y_train'})
    assert m['left_out'] == ['knn', 'probe'] and m['kmeans_acc'] == 1 and m['kmeans_mapping'] == 'test'


def test_kmeans_accuracy_maps_clusters_to_classes_by_training_labels():
    a = arrays(40, 30)
    a['y_test'][:9] = 3                                                   # a class that training has not seen
    ds, ids, pred = data._dataset('tiny', a), data.split(40, 4, 0), torch.arange(30) % 4
    found = (ds.y_train[ids[0]] + 1) % 3, torch.zeros(4, 120), 0.0        # cluster k + 1 is class k; 3 is none
    with mock.patch.object(evaluate, 'kmeans', return_value=found), \
            mock.patch.object(evaluate, 'nearest', return_value=(pred, None)):
        m, _ = evaluate.measure(ds, *ids, lambda x: x.flatten(1))
    right = [p != 3 and (p - 1) % 3 == y for p, y in zip(pred.tolist(), a['y_test'])]
    assert close(m['kmeans_acc'], sum(right) / 30) and m['kmeans_mapping'] == 'train'
    assert close(m['kmeans_nmi'], evaluate.nmi(pred, a['y_test'])) and m['clusters'] == 4


def test_measure_classifier_counts_hits_on_the_test_set():
    a = arrays(40, 30)
    logits = lambda x: x[:, 0, 5, :3]                                     # nonsense, but repeatable
    m, shown = evaluate.measure_classifier(data._dataset('tiny', a), logits)
    wanted = [row[5, :3].argmax() == y for row, y in zip(a['x_test'], a['y_test'])]
    assert close(m['accuracy'], sum(wanted) / 30) and np.trace(m['confusion']) == sum(wanted) and m['n'] == 30
    assert 'accuracy' not in evaluate.measure_classifier(data._dataset('tiny', {'x_train': a['x_train']}), logits)[0]


# labels.py ---------------------------------------------------------------------------------------------------

def test_a_label_is_charged_once_within_the_budget_and_written_before_it_is_given():
    y, asked = [5, 6, 7, 8, 9], []
    def oracle(ids):
        asked.append(ids)
        return [y[i] for i in ids]
    with folder() as f:
        paid = labels.LabelDatabase(f / 'l.sqlite', oracle, 3, 'abc')
        assert paid.reveal([3, 1, 3]).tolist() == [8, 6, 8] and paid.spent == 2
        assert paid.reveal(torch.tensor([1, 4])).tolist() == [6, 9] and paid.spent == 3 and asked == [[3, 1], [4]]
        with raises(ValueError, 'budget'):
            paid.reveal([0, 1])
        assert asked == [[3, 1], [4]] and paid.reveal([4, 3]).tolist() == [9, 8]
        again = labels.LabelDatabase(f / 'l.sqlite', None, 0, 'abc')      # as after a crash: nothing is lost
        assert [v.tolist() for v in again.revealed()] == [[3, 1, 4], [8, 6, 9]]
        again = labels.LabelDatabase(f / 'l.sqlite', lambda ids: 1 / 0, 5, 'abc')
        with raises(ZeroDivisionError):
            again.reveal([0, 2])
        assert again.spent == 3                                           # nothing is charged for no answer
        with raises(ValueError, 'l.sqlite', 'another data set'):
            labels.LabelDatabase(f / 'l.sqlite', oracle, 3, 'other')
        for content in b'junk' * 300, (f / 'l.sqlite').read_bytes()[:5000]:
            (f / 'damaged.sqlite').write_bytes(content)
            with raises(ValueError, 'damaged.sqlite'):
                labels.LabelDatabase(f / 'damaged.sqlite', oracle, 3, 'abc')


def test_picks_are_random_balanced_or_nearest_to_the_centres_of_clusters():
    a, b, c = (labels.pick_random(5, 50, seed).tolist() for seed in (0, 0, 1))
    assert a == b != c
    assert sorted(labels.pick_random(50, 50, 1).tolist()) == list(range(50))
    y = torch.tensor([0] * 30 + [1] * 5 + [2] * 2)
    for n, counts in (3, [1, 1, 1]), (6, [2, 2, 2]), (8, [3, 3, 2]), (37, [30, 5, 2]):
        ids = labels.pick_balanced(n, y, 0)
        assert len(set(ids.tolist())) == n and sorted(y[ids].bincount(minlength=3).tolist()) == sorted(counts)
    h, blob = blobs()
    assert sorted(blob[labels.pick_coverage(3, h, 0)].tolist()) == [0, 1, 2]
    ids = labels.pick_coverage(10, torch.cat([h[:1].expand(30, 2), h[:9]]), 0)
    assert len(set(ids.tolist())) == 10                                   # more clusters than different points
    centres = randn(4, 2, seed=1) * 5
    d = scipy.spatial.distance.cdist(h.numpy(), centres.numpy())
    wanted = {min((i for i in range(60) if d[i].argmin() == k), key=lambda i, k=k: d[i, k]) for k in set(d.argmin(1))}
    assert set(evaluate.medoids(h, centres).tolist()) == wanted


def test_informative_queries_are_disagreements_and_small_margins_never_known_and_spread():
    h = torch.nn.functional.normalize(randn(400, 6, seed=2), dim=1)
    probs = (3 * randn(400, 4, seed=3)).softmax(1)
    known, y = torch.arange(40), torch.arange(40) % 4
    ids, agreed = labels.pick_informative(20, probs, h, known, known, y, 'a')
    assert len(set(ids.tolist())) == 20 and not set(ids.tolist()) & set(known.tolist())
    vote = []
    for row in h:                                                         # the vote, said plainly
        near = sorted(range(40), key=lambda j, row=row: -float(row @ h[j]))[:10]
        weight = {j: math.exp(float(row @ h[j]) / 0.1) for j in near}
        vote.append(max(range(4), key=lambda k, weight=weight: sum(w for j, w in weight.items() if y[j] == k)))
    assert agreed.tolist() == [v == p for v, p in zip(vote, probs.argmax(1).tolist())]
    assert not agreed[ids[:10]].any()
    top = probs.topk(2, 1).values
    margin = (top[:, 0] - top[:, 1]).tolist()
    open_ = sorted(set(range(400)) - set(known.tolist()) - set(ids[:10].tolist()), key=margin.__getitem__)
    assert set(ids[10:].tolist()) <= set(open_[:150])
    again = labels.pick_informative(20, probs, h, known, known, y, 'a')[0]
    assert again.tolist() == ids.tolist() != labels.pick_informative(20, probs, h, known, known, y, 'b')[0].tolist()
    few = labels.pick_informative(355, probs, h, known, known, y, 'a')[0]        # fewer disagreements than wanted
    assert len(set(few.tolist())) == 355 and not set(few.tolist()) & set(known.tolist())
    twins = torch.cat([known, 40 + torch.arange(0, 360) // 60 % 6])       # one open picture in six guises
    ids = labels.pick_informative(6, probs[twins], h[twins], known, known, y, 'a')[0]
    assert len(set(ids.tolist())) == 6


def test_the_estimated_accuracy_is_right_though_most_queries_are_hard_ones_and_the_model_is_wrong():
    rng = np.random.default_rng(0)
    n, estimates, errors, naive = 20000, [], [], []
    conf = rng.beta(6, 1, n).clip(0.3, 0.999)
    agreed = rng.random(n) < conf
    odds = 0.7 * np.log(conf / (1 - conf)) + 1.5 * agreed - 1 - 2 * (conf > 0.95)        # no logistic function at all
    right = rng.random(n) < 1 / (1 + np.exp(-odds))
    probs = torch.stack([torch.tensor(conf), torch.tensor(1 - conf), torch.zeros(n)], 1).float()
    hard = np.concatenate([np.flatnonzero(~agreed)[:150], conf.argsort()[:600:4]])
    for _ in range(40):
        audits = rng.choice(n, 60, replace=False)
        asked = np.concatenate([audits, hard])
        surprises = torch.tensor(np.stack([conf[asked], agreed[asked], np.arange(len(asked)) < 60, right[asked]], 1),
                                 dtype=torch.float32)
        estimate, error = labels.estimate_accuracy(probs, torch.tensor(agreed), surprises)
        estimates.append(estimate)
        errors.append(error)
        naive.append(right[audits].mean())
    assert abs(np.mean(estimates) - right.mean()) < 0.02 and np.std(estimates) < np.std(naive)
    assert right.mean() - right[hard].mean() > 0.1 and abs(conf.mean() - right.mean()) > 0.04
    assert 0.7 < np.mean(errors) / np.std(estimates) < 1.4
    surprises[2:, 2] = 0                                                 # two audits, both right, prove little
    surprises[:2, 3] = 1
    assert labels.estimate_accuracy(probs, torch.tensor(agreed), surprises)[1] > 0.25
    surprises[:, 2] = 0
    assert labels.estimate_accuracy(probs, torch.tensor(agreed), surprises) == (None, None)


def test_rounds_and_beliefs_are_kept_with_the_answers():
    with folder() as f:
        paid = labels.LabelDatabase(f / 'l.sqlite', lambda ids: [i % 3 for i in ids], 9, 'abc')
        paid.reveal([4, 5])
        paid.reveal([7, 8], 1, [(1, 0.9, 1, 0), (0, 0.6, 0, 1)])
        paid.reveal([], 2, None, 0.75)
        again = labels.LabelDatabase(f / 'l.sqlite', None, 0, 'abc')
        assert again.rounds() == {0: (2, None), 1: (2, None), 2: (0, 0.75)} and again.spent == 4
        assert close(again.surprises(0), torch.tensor([[0.9, 1, 0, 1], [0.6, 0, 1, 0]]))
        assert again.surprises(2).shape == (0, 4) and again.revealed(up_to=0)[0].tolist() == [4, 5]


def test_a_round_answered_one_by_one_goes_on_after_a_kill_with_the_same_open_questions():
    with folder() as f:
        def database(budget=5):
            return labels.LabelDatabase(f / 'l.sqlite', None, budget, 'abc')
        paid = database()
        assert paid.ask([7, 3, 9], 0, [(1, 0.9, 1, 0), (0, 0.6, 0, 1), (2, 0.5, 1, 0)], 0.5) == [None] * 3
        with raises(ValueError, 'budget of 5'):
            paid.ask([1, 2, 4], 1)                                        # an open question is as good as spent
        with contextlib.suppress(sqlite3.IntegrityError):
            paid.ask([1, 7], 1)                                           # in the middle of it something breaks
        assert paid.unanswered(1) == [] and list(paid.rounds()) == [0]
        assert paid.spent == 0 and paid.unanswered(0) == [7, 3, 9] and paid.last(0) is None
        assert paid.answer(3, 2, 0) and not paid.answer(3, 1, 0) and not paid.answer(5, 1, 0)
        assert not paid.answer(7, 1, 1)                                   # a question of another round
        paid = database()
        assert paid.unanswered(0) == [7, 9] and paid.spent == 1 and paid.last(0) == (3, 2)
        assert paid.answer(7, None, 0) and paid.last(0) == (7, None) and paid.spent == 1
        assert not paid.undo(3, 0) and paid.undo(7, 0) and not paid.undo(7, 0) and paid.undo(3, 0)
        paid = database()
        assert paid.unanswered(0) == [7, 3, 9] and paid.spent == 0 and not paid.undo(3, 0)
        assert [row[:2] for row in paid.db.execute('SELECT * FROM undone')] == [(7, None), (3, 2)]
        with mock.patch.object(labels, '_now', side_effect=['2026-03', '2026-01', '2026-02', '2026-02']):
            assert all(paid.answer(i, 1, 0) for i in (7, 3)) and paid.last(0) == (3, 1)      # the clock was set back
            assert paid.undo(3, 0) and paid.undo(7, 0)
        assert paid.answer(9, 1, 0) and paid.answer(7, 1, 0) and paid.answer(3, None, 0)
        assert not paid.undo(3, 0)                                        # the round is over
        assert [t.tolist() for t in paid.revealed()] == [[7, 9], [1, 1]] and paid.asked().tolist() == [7, 3, 9]
        assert paid.tally(0) == (3, 2, 1, 0.5) and paid.spent == 2
        assert close(paid.surprises(0), torch.tensor([[0.9, 1, 0, 1], [0.5, 1, 0, 0]]))
        paid.ask([1, 2, 4], 1)                                            # the skipped one was not charged
        with raises(ValueError, 'budget'):
            paid.ask([5], 1)


# oracle.py ---------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def labelling_page(n=6, budget=9, classes='cat,dog,other'):
    """(web, its database) of a page that asks about pictures 0..n-1 in round 0, another thread waiting for them."""
    with folder() as f:
        paid = labels.LabelDatabase(f / 'l.sqlite', None, budget, 'abc')
        paid.ask(range(n))
        web = oracle.Web(labels.LabelDatabase(f / 'l.sqlite', None, budget, 'abc'),
                         torch.from_numpy(pictures(max(n + 1, 20))[0])[:, None], classes.split(','), 2,
                         lambda: (75, True))
        stop = []
        with contextlib.redirect_stdout(io.StringIO()):
            waiting = threading.Thread(target=web.collect, args=(0, stop))
            waiting.start()
            try:
                while web.round is None and n:
                    time.sleep(0.001)
                yield web, paid
            finally:
                stop.append('stop')
                waiting.join()
                web.close()


def asked(web, path, body=None, token=None, kind='application/json', **headers):
    """(status, JSON or bytes) of a request to the page; with a body, a POST."""
    connection = http.client.HTTPConnection('127.0.0.1', web.server.server_port, timeout=20)
    blob = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.closing(connection):
        connection.request('GET' if body is None else 'POST', f'/{token or web.token}/{path}', blob, headers)
        reply = connection.getresponse()
        blob = reply.read()
        for key in 'Content-Security-Policy', 'Cache-Control', 'Referrer-Policy', 'X-Content-Type-Options':
            assert reply.headers[key] == oracle.HEADERS[key]
    return reply.status, json.loads(blob) if reply.headers['Content-Type'] == 'application/json' else blob


def test_the_page_answers_only_this_machine_its_own_name_and_who_knows_the_token():
    with labelling_page() as (web, paid):
        assert web.server.server_address[0] == '127.0.0.1'
        port, answer = web.server.server_port, {'id': 0, 'label': 1}
        for host in f'127.0.0.1:{port}', f'localhost:{port}':
            assert asked(web, 'state', Host=host)[0] == 200
        wrong = [('x' * 32, {}), (web.token[:-1], {}), (web.token + 'x', {}), ('\xe9', {})] + [
            (None, {'Host': host}) for host in ('evil.example', f'evil.example:{port}', '127.0.0.1', '',
                                                f'127.0.0.1:{port + 1}', f'127.0.0.1:{port}.evil.example')]
        for token, headers in wrong:
            token = token and urllib.parse.quote(token)
            for path, body in ('', None), ('state', None), ('0.png', None), ('answer', answer), ('undo', {'id': 0}):
                assert asked(web, path, body, token, **headers) == (403, {'error': 'not for you'}), (token, headers)
        assert paid.spent == 0
        text = asked(web, '')[1].decode()
        assert web.token not in text and 'http' not in text.replace('http-equiv', '')       # nothing from outside
        policy = oracle.HEADERS['Content-Security-Policy']
        for tag in 'style', 'script':
            inside = text.split(f'<{tag}>')[1].split(f'</{tag}>')[0].encode()
            assert f'{tag}-src \'sha256-{base64.b64encode(hashlib.sha256(inside).digest()).decode()}\'' in policy
        assert "default-src 'none'" in policy and 'unsafe' not in policy and '*' not in policy


def test_the_page_refuses_what_is_malformed_and_goes_on():
    with labelling_page() as (web, paid):
        for body in (b'', b'{', b'[]', b'null', b'1', b'[' * 900, b'\xff', {}, {'id': 0}, {'label': 0},
                     {'id': 0, 'label': 0, 'more': 1}, *({'id': i, 'label': 0} for i in
                                                         (-1, 20, 1e3, '0', None, True, [0], 10 ** 30)),
                     *({'id': 0, 'label': k} for k in (-1, 3, '1', 1.0, True, [], 10 ** 30))):
            code, news = asked(web, 'answer', body)
            assert code == 400 and set(news) == {'error'}, (body, code)
        for body in {'id': 'x'}, {'id': 0, 'label': 1}, b'':
            assert asked(web, 'undo', body)[0] == 400
        for path in 'x', '20.png', '-1.png', '0.png/', '../0.png', '9' * 13 + '.png', '\u0663.png', 'state?x', 'answer':
            assert asked(web, urllib.parse.quote(path, safe='/.?-'))[0] == 404, path
        assert asked(web, 'delete', {'id': 0})[0] == 404
        assert asked(web, 'answer', b' ' * (oracle.MAX_BODY + 1))[0] == 413
        def raw(blob):
            with socket.create_connection(('127.0.0.1', web.server.server_port), timeout=20) as s:
                s.sendall(blob)
                s.shutdown(socket.SHUT_WR)
                return b''.join(iter(lambda: s.recv(1 << 16), b''))
        start = f'POST /{web.token}/answer HTTP/1.1\r\nHost: {web.hosts[0]}\r\n'.encode()
        for rest, code in ((b'\r\n', 411), (b'Content-Length: -1\r\n\r\n', 411), (b'Content-Length: x\r\n\r\n', 411),
                           (b'Content-Length: 99999999999\r\n\r\n', 413), (b'Content-Length: 50\r\n\r\n{"id"', 400),
                           (b'Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n', 411), (b'A: b\r\n' * 200 + b'\r\n', 431)):
            assert raw(start + rest).split()[1] == str(code).encode(), rest
        assert raw(b'GET /' + b'x' * 70000 + b'\r\n\r\n').split()[1] == b'414'
        assert raw(b'\0\1\2\r\n\r\n') and b'501' in raw(b'DELETE / HTTP/1.1\r\n\r\n')
        assert paid.spent == 0 and asked(web, 'answer', {'id': 0, 'label': 2})[0] == 200 and paid.spent == 1
        x = pictures(20)[0]
        (f := home() / 'got.png').write_bytes(asked(web, '13.png')[1])
        assert np.array_equal(read_png(f), x[13])


def test_two_tabs_get_the_same_question_and_one_answer_counts():
    with labelling_page() as (web, paid):
        assert asked(web, 'state')[1]['question'] == asked(web, 'state')[1]['question'] == 0
        replies, together = [], threading.Barrier(8)
        def tab(k):
            together.wait()
            replies.append((asked(web, 'answer', {'id': 0, 'label': k % 3}), k % 3))
        tabs = [threading.Thread(target=tab, args=(k,)) for k in range(8)]
        for t in tabs: t.start()
        for t in tabs: t.join()
        won = [k for (code, _), k in replies if code == 200]
        assert len(won) == 1 and sorted(code for (code, _), _ in replies) == [200] + [409] * 7
        assert [t.tolist() for t in paid.revealed()] == [[0], won] and all(r[1]['question'] == 1 for r, _ in replies)
        assert asked(web, 'answer', {'id': 9, 'label': 0})[0] == 409      # was not asked


def test_on_the_page_an_answer_is_saved_at_once_and_can_be_skipped_and_taken_back():
    with labelling_page() as (web, paid):
        first = asked(web, 'state')[1]
        assert first == {'spent': 0, 'budget': 9, 'classes': ['cat', 'dog', 'other'], 'rounds': 2, 'question': 0,
                         'round': 1, 'done': 0, 'of': 6, 'estimate': None, 'last': None}
        assert asked(web, 'undo', {'id': 0}) == (409, first)
        for i, k in (0, 1), (1, None), (2, 2):
            code, news = asked(web, 'answer', {'id': i, 'label': k})
            assert code == 200 and news['last'] == [i, k] and news['question'] == i + 1 and news['done'] == i + 1
        assert [t.tolist() for t in paid.revealed()] == [[0, 2], [1, 2]] and news['spent'] == 2
        assert asked(web, 'undo', {'id': 1})[0] == 409                    # not the last
        for i in 2, 1, 0:
            code, news = asked(web, 'undo', {'id': i})
            assert code == 200 and news['question'] == i and news['done'] == i
        assert news == first
        for i in range(6):
            news = asked(web, 'answer', {'id': i, 'label': i % 3})[1]
        assert news == {'spent': 6, 'budget': 9, 'classes': first['classes'], 'rounds': 2, 'question': None,
                        'left': '1:15', 'more': True}
        assert asked(web, 'undo', {'id': 5})[0] == 409 and paid.spent == 6


class Browser:
    """A headless Chromium that is told what to do in the DevTools protocol over a pipe: JSON, each message ended by
    NUL. Whatever the page complains about is in `complaints`."""

    def __init__(self):
        names = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'
        program = next(filter(None, map(shutil.which, names)), None)
        if program is None or os.name != 'posix':
            raise unittest.SkipTest('there is no chromium in the PATH')
        self.home = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        (orders, self.out), (self.back, replies) = os.pipe(), os.pipe()
        wire = 'for a, b in (o, 98), (r, 99), (98, 3), (99, 4): os.dup2(a, b)'    # it reads from 3 and writes to 4
        self.process = subprocess.Popen(
            [sys.executable, '-c', f'import os, sys; o, r = {orders}, {replies}\n{wire}\nos.execv(sys.argv[1], '
             'sys.argv[1:])', program, '--headless=new', '--no-sandbox', '--disable-gpu',
             '--disable-dev-shm-usage', '--remote-debugging-pipe', f'--user-data-dir={self.home.name}'],
            pass_fds=(orders, replies), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(orders), os.close(replies)
        self.number, self.rest, self.complaints, self.session = 0, b'', [], {}
        target = self.tell('Target.createTarget', url='about:blank')['targetId']
        self.session = {'sessionId': self.tell('Target.attachToTarget', targetId=target, flatten=True)['sessionId']}
        for domain in 'Page', 'Runtime', 'Log':
            self.tell(f'{domain}.enable')

    def tell(self, method, **params):
        """The result of a command; a browser that says nothing for a minute is an error."""
        self.number += 1
        order = {'id': self.number, 'method': method, 'params': params, **self.session}
        os.write(self.out, json.dumps(order).encode() + b'\0')
        while True:
            while b'\0' not in self.rest:
                part = select.select([self.back], [], [], 60)[0] and os.read(self.back, 1 << 16)
                assert part, 'the browser has ended or hangs'
                self.rest += part
            message, _, self.rest = self.rest.partition(b'\0')
            message = json.loads(message)
            if message.get('method') in ('Log.entryAdded', 'Runtime.exceptionThrown'):
                self.complaints.append(message['params'])
            if message.get('id') == self.number:
                assert 'error' not in message, message
                return message['result']

    def value(self, expression):
        return self.tell('Runtime.evaluate', expression=expression, returnByValue=True)['result'].get('value')

    def until(self, expression):
        end = time.monotonic() + 30
        while not self.value(expression):
            assert time.monotonic() < end, (expression, self.value('document.body.innerText'), self.complaints)
            time.sleep(0.01)

    def press(self, key, **more):
        code = f'Digit{key}' if key.isdecimal() else f'Key{key.upper()}' if len(key) == 1 else key
        for kind in 'keyDown', 'keyUp':
            self.tell('Input.dispatchKeyEvent', type=kind, key=key, code=code, **more)

    def close(self):
        os.close(self.out), os.close(self.back)                           # without orders it ends by itself
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(10)
        self.process.kill()
        self.process.wait()
        self.home.cleanup()


def test_in_a_browser_thirty_pictures_are_labelled_by_keys_with_a_reload_on_the_way():
    with contextlib.closing(Browser()) as browser, labelling_page(32, 40) as (web, paid):
        def shows(k):
            browser.until(f"""document.getElementById('ask')?.getAttribute('aria-busy') === 'false' &&
                document.getElementById('place').textContent === 'Picture {k} of 32' &&
                document.getElementById('picture').naturalWidth === 12""")
        browser.tell('Page.navigate', url=web.address)
        for k in range(30):
            shows(k + 1)
            browser.press(str(k % 3 + 1))
            if k == 13:
                shows(k + 2)
                browser.tell('Page.reload')
            if k == 20:                                                   # a slip, taken back; and keys that do nothing
                shows(k + 2)
                for key, more in ('4', {}), ('0', {}), ('x', {}), ('1', {'modifiers': 2}), ('1', {'autoRepeat': True}):
                    browser.press(key, **more)
                browser.press('u')
                shows(k + 1)
                browser.press(str(k % 3 + 1))
        shows(31)
        assert [t.tolist() for t in paid.revealed()] == [list(range(30)), [k % 3 for k in range(30)]]
        assert paid.db.execute('SELECT id, label FROM undone').fetchall() == [(20, 2)]
        assert browser.value("document.getElementById('budget').textContent") == '10 of 40'
        browser.press('s')
        shows(32)
        assert paid.unanswered(0) == [31] and paid.spent == 30
        browser.value("[...document.querySelectorAll('button')].find(b => b.innerText.includes('dog')).click()")
        browser.until("document.body.innerText.includes('Training, about 1:15 left')")
        assert paid.revealed()[1].tolist()[-1] == 1 and paid.spent == 31
        paid.ask([32], 1)
        following = threading.Thread(target=web.collect, args=(1, []))
        following.start()                                                 # which the page notices by itself
        browser.until("document.getElementById('place').textContent === 'Picture 1 of 1' && !busy")
        browser.press('3')
        following.join(30)
        assert not following.is_alive() and paid.revealed()[1].tolist()[-1] == 2
        fetched = browser.value("performance.getEntriesByType('resource').map(e => e.name)")
        assert fetched and all(name.startswith(web.address) for name in fetched), fetched
        assert browser.value("document.querySelectorAll('img:not([alt]), button:empty').length") == 0
        assert not browser.complaints, browser.complaints
        web.close()
        browser.until("document.getElementById('wait').innerText.includes('The program has ended')")


@contextlib.contextmanager
def person(y, skips=(), patience=10 ** 9, how=Exception):
    """Someone on the page who answers with y, and `skips` with can't tell; after `patience` answers the program gets
    the signal `how`, or is Killed. Yields the list of what was asked."""
    collect, seen = oracle.Web.collect, []
    def answering(web, round, stop):
        def someone():
            while (i := asked(web, 'state')[1]['question']) is not None:
                if len(seen) == patience:
                    if how is Killed:
                        stop.append(how)
                    else:
                        os.kill(os.getpid(), how)
                    return
                seen.append(i)
                assert asked(web, 'answer', {'id': i, 'label': None if i in skips else int(y[i])})[0] == 200
        thread = threading.Thread(target=lambda: (wait_for(web), someone()))
        thread.start()
        why = collect(web, round, stop)
        thread.join()
        if Killed in stop:
            raise Killed
        return why
    def wait_for(web):
        while web.round is None:
            time.sleep(0.001)
    with mock.patch.object(oracle.Web, 'collect', answering):
        yield seen


def test_a_person_who_answers_as_y_train_does_gets_the_same_run_however_often_it_is_stopped():
    posix()
    y = arrays()['y_train']
    for how, patience in (None, 99), (Killed, 2), (signal.SIGTERM, 3):
        with folder() as cwd:
            write_npz(cwd / 'tiny.npz', **{**arrays(), 'y_train': (y + 1) % 3})    # which it never looks at
            everything, codes = [], []
            while 0 not in codes and len(codes) < 20:
                with person(y, patience=patience, how=how) as seen, contextlib.suppress(Killed):
                    code, out, err = run(*tiny('query'), '--oracle', 'web', '--resume', cwd=cwd)
                    codes.append(code)
                    assert code in (0, 130) and not err and (code == 0 or '--resume to continue' in out), err
                everything += seen
            assert len(everything) == len(set(everything)) == 15, codes   # nothing was asked twice
            assert how is not signal.SIGTERM or codes == [130] * 4 + [0]
            assert_same_run(cwd / 'runs' / 'query', finished('query'))
            a, b = ((there / 'predictions.csv').read_text() for there in (cwd / 'runs' / 'query', finished('query')))
            assert a == b
            code, out, err = run(*tiny('query'), '--oracle', 'web', '--resume', cwd=cwd)
            assert code == 0 and 'already finished' in out


def test_a_real_process_killed_while_a_person_answers_keeps_every_answer():
    posix()
    with folder() as cwd, contextlib.ExitStack() as ended:
        write_npz(cwd / 'tiny.npz', x_train=arrays()['x_train'])
        words = [HERE / 'ssl.py', *tiny('query'), '--oracle', 'web', '--classes', 'a,b,c', '--resume']
        def started():
            process = python(*words, cwd=cwd)
            ended.callback(process.kill)                                  # whatever fails below
            line = next(line for line in process.stdout if 'http' in line)
            return process, line.split()[2], urllib.parse.urlparse(line.split()[-1])
        def answered(url):
            connection = http.client.HTTPConnection(url.netloc, timeout=20)
            with contextlib.closing(connection):
                connection.request('GET', url.path + 'state')
                i = json.loads(connection.getresponse().read())['question']
            with contextlib.closing(connection):
                connection.request('POST', url.path + 'answer', json.dumps({'id': i, 'label': i % 3}))
                assert connection.getresponse().status == 200
            return i
        process, n, url = started()
        assert n == '7' and url.hostname == '127.0.0.1' and len(url.path) > 30
        ids = [answered(url) for _ in range(3)]
        process.kill()
        process.communicate(timeout=60)
        paid = labels.LabelDatabase(cwd / 'runs/query/labels.sqlite', None, 15, data.load(cwd / 'tiny.npz').digest)
        assert [t.tolist() for t in paid.revealed()] == [ids, [i % 3 for i in ids]]
        open_ = paid.unanswered(0)
        process, n, again = started()
        assert n == '4' and again.path != url.path and answered(again) == open_[0]
        process.terminate()
        out, err = process.communicate(timeout=60)
        assert process.returncode == 130 and '--resume to continue' in out and not err, err


def test_what_is_skipped_is_never_asked_again_and_costs_nothing():
    y, skips = arrays()['y_train'], set(range(0, 120, 2))
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', x_train=arrays()['x_train'])
        for pick in 'informative', 'random':
            with person(y, skips) as seen:
                flags = tiny('query', '--oracle', 'web', '--classes', 'a,b,c', '--pick', pick, '--overwrite')
                code, out, err = run(*flags, '--rounds', 5, cwd=cwd)
            assert code == 0 and not err, err
            assert len(seen) == len(set(seen)) and set(seen) & skips
            there = cwd / 'runs' / 'query'
            paid = labels.LabelDatabase(there / 'labels.sqlite', None, 15, data.load(cwd / 'tiny.npz').digest)
            assert set(paid.revealed()[0].tolist()) == set(seen) - skips and paid.spent <= 15 and 'skipped' in out
            asked = [asked for asked, _ in paid.rounds().values()]
            given = [paid.tally(r)[1] for r in range(len(asked))]
            assert asked[:5] == [3 * (r + 1) - sum(given[:r]) for r in range(5)] and asked[5] == 0   # made up for
            table = list(csv.DictReader((there / 'predictions.csv').open()))
            assert [int(row['id']) for row in table] == list(range(120))
            assert {int(row['id']) for row in table if row['given'] == '1'} == set(seen) - skips
            labelled = [int(row['label']) for row in table]
            assert all(row['class'] == 'abc'[int(row['label'])] for row in table)
            assert all(1 / 3 - 1e-4 < float(row['confidence']) <= 1 for row in table)
            assert all(labelled[i] == y[i] and table[i]['confidence'] == '1.0000' for i in set(seen) - skips)
            with np.load(there / 'predictions.npz') as z:
                assert z['label'].tolist() == labelled and z['classes'].tolist() == ['a', 'b', 'c']
                assert z['given'].tolist() == [row['given'] == '1' for row in table]
        with person(y, skips=range(120)) as seen:                         # who can't tell any
            code, _, err = run(*flags, '--rounds', 5, cwd=cwd)
        assert code == 2 and 'every picture was skipped' in err and sorted(seen) == list(range(120))


def test_answers_from_a_file_make_the_same_run_and_what_is_missing_is_written_down():
    y = arrays()['y_train']
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **{k: v for k, v in arrays().items() if k != 'y_train'})
        there, answers = cwd / 'runs' / 'query', cwd / 'a.csv'
        flags = tiny('query', '--oracle', 'file', '--answers', 'a.csv', '--classes', 'cat,dog,other', '--resume')
        for r, n in (0, 7), (1, 8):
            code, out, err = run(*flags, cwd=cwd)
            assert code == 130 and not err and f'labels missing: {n};' in out and '--resume' in out, err
            header, *lines = (there / 'wanted.csv').read_text().splitlines()
            ids = [int(line.removesuffix(',')) for line in lines]
            assert header == 'id,label' and len(ids) == n
            H, W = 10 * 7 + 14, 12 * 7
            assert read_png(there / 'wanted.png').shape == (H + 12, n * (W + 6) + 6)
            filled = [f'{i},{["cat", " dog", "2"][y[i]]}' for i in ids]
            with answers.open('a', encoding='utf-8' if r else 'utf-8-sig') as f:
                f.write('\n'.join(['ID,label'] * (r == 0) + filled[1:]) + f'\n{ids[0]},\n')
            code, out, _ = run(*flags, cwd=cwd)                           # an empty cell is no answer yet
            assert code == 130 and 'labels missing: 1;' in out
            assert (there / 'wanted.csv').read_text() == f'id,label\n{ids[0]},\n'
            with answers.open('a') as f:
                f.write(filled[0] + '\n\n')
        code, out, err = run(*flags, cwd=cwd)
        assert code == 0 and not err, err
        assert_same_run(there, finished('query'))
        assert not list(there.glob('wanted.*'))


def test_a_mistake_in_a_file_of_answers_is_one_sentence_that_names_the_line():
    with folder() as f:
        paid = labels.LabelDatabase(f / 'l.sqlite', None, 9, 'abc')
        paid.ask([1, 2])
        x = torch.from_numpy(pictures(20)[0])[:, None]
        def read(text, classes=('cat', 'dog')):
            (f / 'a.csv').write_bytes(text if isinstance(text, bytes) else text.encode())
            return oracle.File(paid, x, classes, f / 'a.csv', f).read()
        assert read('1,cat\r\n2,1\n\n,\n 3 , ?\n"4","dog"\n5,\n1,0') == {1: 0, 2: 1, 3: None, 4: 1}
        assert read('1,3\n2,5', ('3', '5')) == {1: 0, 2: 1} and read('') == {}
        assert read('1,?', ('?', 'x')) == {1: 0} and read('id,label\n1,cat\nid,label\n3,dog') == {1: 0, 3: 1}
        for text, said in (('1,cat\n2', 'line 2'), ('1,cat,0.9', '3 columns'), ('x,cat', "'x'"), ('20,cat', '0 to 19'),
                           ('-1,cat', "'-1'"), ('1.0,cat', "'1.0'"), ('9' * 5000 + ',cat', 'line 1'),
                           ('1,cow', "'cow'"),
                           ('1,2', "'2'"), ('1,Cat', 'cat, dog'), ('1,cat\n1,dog', 'line 2'), ('\u0661,cat', 'id from'),
                           (b'1,\xff', 'readable'), (b'1,"' + b'x' * 200000, 'readable'), (b'1,\0', 'a.csv'),
                           ('1;cat', 'a.csv')):
            with raises(ValueError, said):
                read(text)
        with raises(ValueError, "'0'"):
            read('1,0', ('3', '5'))                                       # not an index where names are numbers
        paid.answer(1, 0, 0)
        assert read('1,cat') == {1: 0}
        with raises(ValueError, 'picture 1', 'another class'):
            read('1,dog')


def test_who_answers_and_what_classes_are_called_is_checked_before_anything_starts():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        write_npz(cwd / 'bare.npz', x_train=arrays()['x_train'])
        web = ['--oracle', 'web']
        for more, said in (
                (['--oracle', 'file'], '--answers'), (['--answers', 'a.csv'], '--oracle file'),
                (['--oracle', 'wep'], 'web?'), ([*web, '--answers', 'a.csv'], '--oracle file'),
                (['--classes', 'a,b'], '--classes'),
                (['--classes', 'a,b,c,d'], '3'), ([*web, '--classes', 'a,b,c,d'], '3'), (['--classes', 'a,,c'], 'a,,c'),
                (['--classes', 'a,b,a'], 'different'), (['--classes', ''], 'different'),
                (['--data', 'bare.npz'], 'y_train'), ([*web, '--data', 'bare.npz'], '--classes cat,dog'),
                ([*web, '--data', 'bare.npz', '--classes', 'one'], 'two classes'),
                ([*web, '--data', 'bare.npz', '--classes', ','.join(f'c{k}' for k in range(300))], '300 classes'),
                ([*web, '--search', 2, '--over', 'lr=1e-4:1e-2'], '--oracle web'),
                ([*web, '--data', 'bare.npz', '--classes', ','.join(map(str, range(16)))], 'budget')):
            refused(*tiny('query'), *more, cwd=cwd, said=[said])
        with mock.patch.multiple(distributed, world=lambda: 2, from_first=lambda value: value):
            refused(*tiny('query'), *web, cwd=cwd, said=['one process'])
        assert not list((cwd / 'runs').glob('*'))
        code, out, _ = run(*tiny('query'), '--classes', 'cat, dog,other', cwd=cwd)
        config = runs.read_json(cwd / 'runs/query/config.json')
        assert code == 0 and config['data']['classes'] == ['cat', 'dog', 'other']
        assert {row.split(',')[2] for row in (cwd / 'runs/query/predictions.csv').read_text().splitlines()[1:]} <= {
            'cat', 'dog', 'other'}
        predicted = (cwd / 'runs/query/predictions.csv').read_bytes()
        (cwd / 'runs/query/predictions.csv').unlink()
        assert run('--evaluate', 'runs/query', cwd=cwd)[0] == 0
        assert (cwd / 'runs/query/predictions.csv').read_bytes() == predicted
        before = (cwd / 'runs/query/labels.sqlite').read_bytes()
        assert run(*tiny('query'), '--overwrite', cwd=cwd)[0] == 0        # paid answers are put aside, not deleted
        assert (cwd / 'runs/query/labels.previous.sqlite').read_bytes() == before


def test_the_teacher_is_the_moving_average_of_the_student():
    torch.manual_seed(0)
    model = nets.MeanTeacher(nets.Classifier(nets.Encoder('resnet', (1, 8, 8), 0.1), 3)).train()
    assert model.student.training and not model.teacher.training
    key = 'head.0.weight'
    wanted = model.teacher.state_dict()[key].clone()
    for t in range(30):
        with torch.no_grad():
            model.student.head[0].weight.add_(randn(*wanted.shape, seed=t))
        model.follow(0.7)
        d = min(0.7, (1 + t) / (10 + t))
        wanted = d * wanted + (1 - d) * model.student.head[0].weight
    assert close(model.teacher.state_dict()[key], wanted, 1e-5)
    assert not any(p.requires_grad for p in model.teacher.parameters())


def test_consistency_learns_from_pictures_the_teacher_is_sure_of_and_from_no_other():
    torch.manual_seed(0)
    model = nets.MeanTeacher(nets.Classifier(nets.Encoder('fc', (1, 8, 8)), 3)).train()
    model.teacher.head[0].weight.data *= 50
    x, views = rand(8, 1, 8, 8, seed=1), data.Views(1, False, 0, 0)
    x_l, y_l = (randn(5, 1, 8, 8, seed=2).sigmoid() * 255).byte(), torch.tensor([0, 1, 2, 0, 1])
    def value(threshold):
        g = data.generator('cpu', 0)
        loss, parts = train.consistency(model, x, g, lambda: (x_l, y_l), views, threshold)
        return loss.item(), parts['accepted'].item()
    ids = torch.randint(5, (2,), generator=data.generator('cpu', 0))
    supervised = torch.nn.functional.cross_entropy(model.student(x_l[ids].float() / 255), y_l[ids]).item()
    assert close(value(1.0)[0], supervised) and value(1.0)[1] == 0
    with mock.patch.object(data, 'augment', lambda x, views, g: x):
        loss, accepted = value(0.0)
    logits = model.student(x)
    unsupervised = torch.nn.functional.cross_entropy(logits, model.teacher(x).argmax(1)).item()
    assert close(loss, supervised + unsupervised) and accepted == 1


def test_pooled_experts_are_their_normalised_geometric_mean():
    p, q = rand(6, 4, seed=1).softmax(1), rand(6, 4, seed=2).softmax(1)
    q[0] = torch.tensor([0.0, 0, 0, 1])                                     # a class it never heard of is not ruled out
    for both, a, b in zip(evaluate.pool(p, q).tolist(), p.tolist(), q.tolist()):
        wanted = [math.exp((math.log(u) + math.log(v + 1e-3)) / 2) for u, v in zip(a, b)]
        assert close(both, np.array(wanted) / sum(wanted)) and min(both) > 0


def test_two_processes_search_as_one_group_from_the_first_trial_to_the_last():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        words = tiny('query', '--search', 2, '--over', 'lr=1e-4:1e-3', '--device', 'cpu')
        process = python('-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, HERE / 'ssl.py', *words,
                         cwd=cwd)
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
        assert out.count('query-00: lr') == out.count('query-01: lr') == out.count('best: ') == 1, out


def test_a_second_encoder_without_training_is_known_by_its_weights():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        assert run(*tiny('random'), cwd=cwd)[0] == 0
        before = stages.weights_digest(cwd / 'runs/random')
        assert run(*tiny('random'), '--overwrite', cwd=cwd)[0] == 0
        assert stages.weights_digest(cwd / 'runs/random') == before
        assert run(*tiny('random'), '--seed', 1, '--overwrite', cwd=cwd)[0] == 0
        assert stages.weights_digest(cwd / 'runs/random') != before
        with raises(ValueError, 'no config.json'):
            stages.weights_digest(cwd / 'runs/none')


def test_an_estimate_is_that_of_the_first_process_in_all():
    asking = querying.Asking.__new__(querying.Asking)                     # as in the others: without a database
    with mock.patch.multiple(distributed, rank=lambda: 1, from_first=lambda mine: 0.75):
        assert asking.estimate() == 0.75
    asking.paid = mock.Mock(rounds=lambda: {0: (5, None), 1: (5, 0.5)})
    assert asking.estimate() == 0.5
    asking.paid = mock.Mock(rounds=lambda: {0: (5, None)})
    assert asking.estimate() == 0.0


def test_what_is_given_up_by_overwrite_is_answers_only_once_and_nothing_after_a_mistake():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        there = cwd / 'runs/query'
        assert run(*tiny('query'), cwd=cwd)[0] == 0
        answers = (there / 'labels.sqlite').read_bytes()
        everything = {p.name: p.read_bytes() for p in there.iterdir() if p.is_file()}
        refused(*tiny('query'), '--budget', 1000, '--overwrite', cwd=cwd, said=['--budget'])
        refused(*tiny('classify'), '--labels', 1000, '--name', 'query', '--overwrite', cwd=cwd, said=['--labels'])
        refused(*tiny('scan'), '--clusters', 100, '--name', 'query', '--overwrite', cwd=cwd, said=['--clusters'])
        assert {p.name: p.read_bytes() for p in there.iterdir() if p.is_file()} == everything
        for _ in range(2):                                                # nothing is answered the first time
            code, out, _ = run(*tiny('query'), '--oracle', 'file', '--answers', 'none.csv', '--overwrite', cwd=cwd)
            assert code == 130 and 'labels missing' in out
            assert (there / 'labels.previous.sqlite').read_bytes() == answers
        (there / 'labels.sqlite').write_bytes(b'')                        # killed before its first table
        skips = labels.LabelDatabase(cwd / 'skips.sqlite', None, 9, 'abc')
        skips.ask([1])
        assert not runs._answered(cwd / 'skips.sqlite') and skips.answer(1, None, 0)
        assert runs._answered(cwd / 'skips.sqlite')                       # that it can't be told is an answer too
        (there / 'samples.png').write_bytes(b'of another run')
        assert run(*tiny('ae'), '--name', 'query', '--overwrite', cwd=cwd)[0] == 0
        assert (there / 'labels.previous.sqlite').read_bytes() == answers and not (there / 'labels.sqlite').exists()
        assert not (there / 'samples.png').exists() and (there / 'reconstructions.png').exists()
        (there / 'labels.sqlite').write_bytes(b'damaged' * 999)           # who knows what was in it
        assert run(*tiny('pixels'), '--name', 'query', '--overwrite', cwd=cwd)[0] == 0
        assert (there / 'labels.previous.sqlite').read_bytes() == b'damaged' * 999


def test_a_run_resumed_without_its_encoder_typed_again_is_the_same_network():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        flags = [w for w in tiny('classify') if w not in ('--width', 0.1)]
        encoder = tiny('simclr', '--net', 'conv', '--name', 'narrow')
        assert run(*encoder, cwd=cwd)[0] == 0
        assert run(*flags, '--encoder', 'runs/narrow', cwd=cwd)[0] == 0
        before = runs.read_config(cwd / 'runs/classify')['encoder']
        code, out, err = run('--method', 'classify', '--name', 'classify', '--resume', cwd=cwd)
        assert code == 0 and 'already finished' in out, err
        assert runs.read_config(cwd / 'runs/classify')['encoder'] == before
        assert run('--evaluate', 'runs/classify', cwd=cwd)[0] == 0
        assert run(*encoder, '--width', 0.2, '--overwrite', cwd=cwd)[0] == 0
        (cwd / 'runs/classify/metrics.json').unlink()
        refused(*flags, '--encoder', 'runs/narrow', '--resume', cwd=cwd, said=['runs/narrow was trained anew'])


def test_what_needs_a_finished_run_takes_no_other_and_none_overwrites_its_own_encoder():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        for method in 'simclr', 'classify':
            shutil.copytree(finished(method), cwd / 'runs' / method)
            before = drawn(cwd / 'runs' / method), weights(cwd / 'runs' / method)
            flags = [w for w in tiny(method) if w not in ('--width', 0.1)]
            refused(*flags, '--encoder', f'runs/{method}', '--overwrite', cwd=cwd, said=['an --encoder of this run'])
            assert before[0] == drawn(cwd / 'runs' / method)
            assert runs.state_digest(before[1]) == runs.state_digest(weights(cwd / 'runs' / method))
            (cwd / 'runs' / method / 'metrics.json').unlink()
        for words in (['--export', 'runs/simclr', 'out.npz'], ['--predict', 'runs/classify', 'tiny.npz'],
                      ['--method', 'scan', '--encoder', 'runs/simclr', '--data', 'tiny.npz']):
            refused(*words, cwd=cwd, said=['is not finished', '--resume'])
        refused(*tiny('pca'), '--latent', 121, cwd=cwd, said=['--latent 121', '120'])
        refused(*tiny('query'), '--oracle', 'file', '--answers', '.', cwd=cwd, said=['--answers . is a folder'])
        assert {p.name for p in (cwd / 'runs').iterdir()} == {'simclr', 'classify'} and not (cwd / 'out.npz').exists()


def test_no_file_is_replaced_but_an_earlier_one_of_the_same_kind():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        before = (cwd / 'tiny.npz').read_bytes()
        for words in ['--export', finished('ae')], ['--show-views']:
            for path, said in (('tiny.npz', 'it is kept'), ('none/x', 'no folder none'), ('.', 'a folder'),
                               (os.devnull, 'it is kept')):
                refused(*words, path, *['--data', 'tiny.npz'] * (words == ['--show-views']), cwd=cwd, said=[said])
        assert (cwd / 'tiny.npz').read_bytes() == before
        for _ in range(2):
            assert run('--export', finished('ae'), 'out', cwd=cwd)[0] == 0
            assert run('--show-views', 'v.png', '--data', 'tiny.npz', cwd=cwd)[0] == 0


def test_closing_epochs_may_be_more_than_those_of_an_iteration():
    for method in 'cluster', 'scan':
        name = f'long-{method}'
        code, out, err = run(*tiny(method), '--closing', 3, '--name', name)
        assert code == 0 and not err, err
        epochs = [row['epoch'] for row in logged(home() / 'runs' / name) if 'loss' in row]
        assert epochs == [1, 2, 3, 4, 5] and len(list((home() / 'runs' / name).glob('iteration-*.pt'))) == 3


def test_training_that_diverges_is_told_and_ranks_last_in_a_search():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        refused(*tiny('simclr'), '--lr', 1e9, cwd=cwd, said=['not finite', 'lower --lr'])
        h = torch.full((20, 4), float('inf'))
        with mock.patch.object(nets.SimCLR, 'encode', lambda _, x: h[:len(x)]):
            refused(*tiny('simclr'), '--name', 'h', cwd=cwd, said=['a feature', 'not finite at epoch 1', 'lower --lr'])
        refused(*tiny('ae'), '--lr', 1e9, cwd=cwd, said=['diverged', 'lower --lr'])
        code, out, err = run(*tiny('classify'), '--search', 2, '--over', 'lr=1e-3:1e9', cwd=cwd)
        assert code == 0 and not err and 'not finite' in out, (out, err)
        table = [line.split() for line in out.splitlines()[-3:-1]]
        assert [len(row) for row in table] == [4, 5] and table[1][2::2] == ['-inf', 'diverged'], table
        refused(*tiny('classify'), '--search', 2, '--over', 'lr=9e8:1e9', '--name', 'all', cwd=cwd, said=['every'])


def test_the_length_of_an_iteration_is_one_epoch_or_more_and_kept():
    for method in 'cluster', 'scan':
        refused(*tiny(method), '--epochs', 0, '--name', 'none', said=['--epochs', '--iterations 0'])
        refused(*tiny(method), '--epochs', 3, '--name', finished(method).name, '--resume', said=['--epochs 1'])


def test_a_query_with_a_second_encoder_learns_the_same_and_hears_neighbours_when_it_predicts():
    flags = [w for w in tiny('query', '--closing', 1) if w not in ('--width', 0.1)]
    both = ['--encoder', finished('simclr'), finished('conv'), '--neighbours', 4]
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        for name, more in ('alone', both[:2]), ('both', both):
            code, _, err = run(*flags, *more, '--name', name, cwd=cwd)
            assert code == 0 and not err, err
        alone, there = cwd / 'runs/alone', cwd / 'runs/both'
        assert runs.state_digest(weights(alone)) == runs.state_digest(weights(there))
        ds = data.load(cwd / 'tiny.npz')
        ids, y = labels.LabelDatabase(there / 'labels.sqlite', None, 0, ds.digest).revealed()
        _, args, net, cpu = stages.reopen(alone, 'cpu')
        def network(x):
            return stages.probabilities(args, net, x, cpu)
        said = network(ds.x_train)
        said[ids] = torch.eye(3)[y]
        encoder = stages.load_model(finished('conv'), runs.read_config(finished('conv')), cpu).eval()
        h_train, h_test = (encoder.encode(data.to_float(x)).detach() for x in (ds.x_train, ds.x_test))
        mean, wanted = h_train.mean(0), []
        for i, p in enumerate(network(ds.x_test)):                          # by a loop, in another's features
            cosine = [float(torch.cosine_similarity(h_test[i] - mean, h - mean, dim=0)) for h in h_train]
            near = sorted(range(120), key=lambda j: -cosine[j])[:4]
            q = sum(said[j] for j in near) / 4
            both_say = ((p.log() + (q + 1e-3).log()) / 2).exp()
            wanted.append(both_say / both_say.sum())
        wanted = torch.stack(wanted)
        np.savez(cwd / 'test.npz', x=ds.x_test[:, 0].numpy())
        code, out, err = run('--predict', there, 'test.npz', cwd=cwd)
        assert code == 0 and not err, err
        rows = list(csv.DictReader(io.StringIO(out)))
        assert [int(r['class']) for r in rows] == wanted.argmax(1).tolist()
        assert close([float(r['confidence']) for r in rows], wanted.max(1).values, 2e-4)
        right = (wanted.argmax(1) == ds.y_test).float().mean().item()
        assert close(measured(there)['accuracy'], right) and measured(alone)['accuracy'] != right
        mine, other = (np.load(f / 'predictions.npz') for f in (there, alone))
        assert (mine['label'][ids] == y.numpy()).all() and (mine['confidence'] != other['confidence']).any()
        before = measured(there)
        assert run('--evaluate', there, cwd=cwd)[0] == 0 and measured(there) == before
        heard = runs.load_checkpoint(there / 'neighbours.pt')
        runs.write_state(there / 'neighbours.pt', {**heard, 'encoders': ['of other weights']})
        refused('--predict', there, 'test.npz', cwd=cwd, said=[finished('conv'), 'trained anew', '--evaluate'])
        (there / 'neighbours.pt').unlink()
        refused('--predict', there, 'test.npz', cwd=cwd, said=['neighbours.pt', '--evaluate'])
        refused(*tiny('query'), '--neighbours', 4, cwd=cwd, said=['--neighbours', 'second --encoder'])
        refused(*[w for w in tiny('classify') if w not in ('--width', 0.1)], *both[:3], cwd=cwd, said=['one', '2'])
        refused(*flags, *both[:2], finished('pca'), '--name', 'pca', cwd=cwd, said=['no encoder'])


def test_sam_takes_the_gradient_where_the_loss_is_highest_nearby_and_goes_back():
    model = torch.nn.Linear(2, 1, bias=False).double()
    model.weight.data = torch.tensor([[3.0, 4.0]]).double()
    (model.weight.square().sum() / 2).backward()                            # its gradient is the weight itself
    with train.climbed(model, 0.5):
        assert close(model.weight, torch.tensor([[3.3, 4.4]]).double())
    assert model.weight.tolist() == [[3.0, 4.0]]


def test_labels_that_were_not_paid_for_change_nothing_of_a_classifier():
    with folder() as cwd:
        for method, pick in itertools.product(('classify', 'query'), ('random', 'coverage', 'informative')):
            if pick == {'classify': 'informative', 'query': 'coverage'}[method]:
                refused(*tiny(method), '--pick', pick, cwd=cwd, said=[pick, method])
                continue
            write_npz(cwd / 'tiny.npz')
            assert run(*tiny(method), '--pick', pick, '--name', 'honest', '--overwrite', cwd=cwd)[0] == 0
            y, digest = arrays(), data.load(cwd / 'tiny.npz').digest
            paid = labels.LabelDatabase(cwd / 'runs/honest/labels.sqlite', None, 0, digest)
            ids = paid.revealed()[0].numpy()
            others = np.setdiff1d(np.arange(120), ids)
            y['y_train'][others] = y['y_train'][others[::-1]]
            assert len(set(ids)) == paid.spent == 15 and (y['y_train'] != arrays()['y_train']).any()
            write_npz(cwd / 'tiny.npz', **y)
            assert run(*tiny(method), '--pick', pick, '--name', 'other', '--overwrite', cwd=cwd)[0] == 0
            assert_same_run(cwd / 'runs' / 'honest', cwd / 'runs' / 'other')


def test_queries_stop_when_the_estimated_accuracy_is_reached_and_without_a_test_set_too():
    with folder() as cwd:
        x, y = pictures(200)
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=y)
        flags = tiny('query', '--budget', 40, '--rounds', 8, '--closing', 1)
        code, out, err = run(*flags, '--until', 0.2, '--name', 'until', cwd=cwd)
        assert code == 0 and not err
        m = measured(cwd / 'runs' / 'until')
        paid = labels.LabelDatabase(cwd / 'runs/until/labels.sqlite', None, 0, data.load(cwd / 'tiny.npz').digest)
        *before, last = paid.rounds().values()
        assert 10 <= m['labels'] == paid.spent == 5 * len(before) < 40 and last == (0, m['estimate'])
        assert all(asked == 5 and (e is None or e < 0.2) for asked, e in before) and m['estimate'] >= 0.2
        assert len(logged(cwd / 'runs' / 'until')) == len(before) + 1
        assert 'accuracy' not in m and 'no labelled test set' in out and 'estimated accuracy' in out
        code, _, err = run(*flags, cwd=cwd)
        assert code == 0 and measured(cwd / 'runs' / 'query')['labels'] == 40
        write_npz(cwd / 'tiny.npz', x_train=x)
        refused(*flags, '--overwrite', cwd=cwd, said=['y_train'])


def test_a_classifier_starts_from_any_encoder_and_a_frozen_one_keeps_every_bit():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        flags = [w for w in tiny('classify', '--epochs', 1, '--overwrite') if w not in ('--width', 0.1)]
        for method in *UNLABELLED, 'random':
            for more in ['--freeze', '--head', 'mlp'], []:
                code, out, err = run(*flags, '--encoder', finished(method), *more, cwd=cwd)
                assert code == 0 and not err, (method, err)
                before = nets.encoder_of(stages.load_model(finished(method), runs.read_config(finished(method)),
                                                            torch.device('cpu'))).state_dict()
                after = weights(cwd / 'runs' / 'classify')['model']
                after = {k.removeprefix('encoder.'): v for k, v in after.items() if k.startswith('encoder.')}
                assert before.keys() == after.keys()
                assert (runs.state_digest(before) == runs.state_digest(after)) == ('--freeze' in more), method


def test_a_classifier_that_can_not_start_is_one_line_and_leaves_no_run():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        write_npz(cwd / 'other.npz', **arrays(H=8))
        flags = [w for w in tiny('classify') if w not in ('--width', 0.1)]
        for more, said in ((['--labels', 121], '121'), (['--labels', 2], 'classes'), (['--labels', 1e-4], 'labels'),
                           (['--labels', 30.7], '30.7'),
                           (['--encoder', 'runs/none'], 'runs/none'), (['--encoder', finished('pca')], 'no encoder'),
                           (['--encoder', finished('simclr'), '--data', 'other.npz'], '(1, 8, 12)'),
                           (['--encoder', finished('simclr'), '--net', 'fc'], '--net')):
            refused(*flags, *more, cwd=cwd, said=[said])
        for more, said in (['--budget', 121], '120'), (['--budget', 2], 'classes'), (['--rounds', 16], '15'), (
                ['--encoder', finished('simclr'), '--data', 'other.npz'], '(1, 8, 12)'):
            refused(*[w for w in tiny('query') if w not in ('--width', 0.1)], *more, cwd=cwd, said=[said])
        refused(*tiny('query'), '--until', 0.9, '--audit', 0, cwd=cwd, said=['--audit'])
        refused(*tiny('pca'), '--latent', 121, cwd=cwd, said=['121'])
        assert not list((cwd / 'runs').glob('*'))


# runs.py -----------------------------------------------------------------------------------------------------

CONFIG = {'args': {'method': 'ae', 'seed': 0}, 'data': {'digest': 'abc'}}


def state(seed=0):
    return {'model': {'w': randn(4, 5, seed=seed), 'n': torch.tensor(3), 'half': randn(2).bfloat16()},
            'optimizer': {'state': {0: {'step': torch.tensor(1.0)}}, 'param_groups': [{'lr': 0.1, 'betas': (0.9, 1)}]},
            'epoch': seed, 'best': math.inf}


def test_a_checkpoint_comes_back_as_it_was_and_the_one_before_it_stays():
    with folder() as f:
        run = runs.Run(f / 'r', CONFIG)
        assert run.load() is None
        for seed in range(3):
            run.save(state(seed))
            assert runs.state_digest(run.load()) == runs.state_digest(state(seed))
        before = runs.load_checkpoint(f / 'r' / 'checkpoint.previous.pt')
        assert before['epoch'] == 1 and torch.equal(before['model']['w'], state(1)['model']['w'])
        assert sorted(p.name for p in (f / 'r').iterdir()) == [
            '.lock', 'checkpoint.previous.pt', 'checkpoint.pt', 'config.json']
        del run


def test_state_digest_sees_every_change():
    digests = {runs.state_digest(state())}
    for change in (lambda s: s['model']['w'][0].add_(1e-6), lambda s: s['model'].pop('n'), lambda s: s.update(epoch=1),
                   lambda s: s['optimizer']['param_groups'][0].update(lr=0.2),
                   lambda s: s['model'].update(w=s['model']['w'].view(5, 4)),
                   lambda s: s['model'].update(n=torch.tensor(3, dtype=torch.int32))):
        s = state()
        change(s)
        digests.add(runs.state_digest(s))
    assert len(digests) == 7


def test_a_damaged_checkpoint_falls_back_to_the_one_before_it():
    with folder() as f:
        run = runs.Run(f, CONFIG)
        for seed in 1, 2:
            run.save(state(seed))
        blob = (f / 'checkpoint.pt').read_bytes()
        for damage in blob[:len(blob) // 2], b'', blob.replace(state(2)['model']['w'].numpy().tobytes(), bytes(80)):
            (f / 'checkpoint.pt').write_bytes(damage)
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                assert run.load()['epoch'] == 1
            assert err.getvalue().count('\n') == 1 and 'checkpoint.pt is' in err.getvalue()
        (f / 'checkpoint.pt').unlink()                                    # killed between two renames
        assert run.load()['epoch'] == 1
        (f / 'checkpoint.pt').write_bytes(b'junk')
        (f / 'checkpoint.previous.pt').write_bytes(b'junk')
        with raises(ValueError, 'checkpoint', '--overwrite'), contextlib.redirect_stderr(err):
            run.load()
        del run


def test_a_checkpoint_that_holds_a_hostile_pickle_runs_nothing():
    with folder() as f:
        evil = Evil(f / 'ran')
        torch.save({'model': evil, 'digest': ''}, f / 'zip.pt')
        torch.save({'model': evil, 'digest': ''}, f / 'old.pt', _use_new_zipfile_serialization=False)
        (f / 'plain.pt').write_bytes(pickle.dumps(evil))
        for name in 'zip.pt', 'old.pt', 'plain.pt':
            with raises(ValueError, name):
                runs.load_checkpoint(f / name)
            assert not (f / 'ran').exists()
        pickle.loads((f / 'plain.pt').read_bytes())
        assert (f / 'ran').exists()                                       # it would have run


def test_a_full_disk_leaves_the_old_checkpoint_and_is_not_swallowed():
    posix()
    full = OSError(errno.ENOSPC, 'No space left on device')
    with folder() as f:
        run = runs.Run(f, CONFIG)
        run.save(state(1))
        names = sorted(p.name for p in f.iterdir())
        for what in 'os.fsync', 'os.replace':
            with mock.patch(what, side_effect=full), raises(OSError, 'No space left'):
                run.save(state(2))
            assert run.load()['epoch'] == 1
        with raises(OSError), full_disk(500):
            run.save(state(2))
        assert run.load()['epoch'] == 1 and not list(f.glob('*.tmp'))
        assert set(names) >= {p.name for p in f.iterdir()} - {'checkpoint.new.pt'}
        del run


def test_json_is_strict_and_damage_is_one_sentence():
    with folder() as f:
        runs.write_json(f / 'x.json', {'a': [math.nan, 1.5, -math.inf], 'b': {'c': math.inf}, 'd': (1, 'x')})
        assert json.loads((f / 'x.json').read_text(), parse_constant=None) == {
            'a': [None, 1.5, None], 'b': {'c': None}, 'd': [1, 'x']}
        for content in b'', b'{"a": 1', b'[1]', b'\xff\xfe', b'[' * 100_000, b'{"a": ' + b'9' * 5000 + b'}':
            (f / 'x.json').write_bytes(content)
            with raises(ValueError, 'x.json'):
                runs.read_json(f / 'x.json')


def test_a_torn_or_foreign_log_is_read_up_to_its_first_bad_line():
    rows = [{'epoch': 1, 'loss': 0.5}, {'epoch': 2, 'loss': None}]
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    with folder() as f:
        assert runs.read_log(f) == []
        for tail in ('', '{"epoch": 3, "lo', '\0\0', '5\n', '{"loss": 1}\n', '{"epoch": "3"}\n',
                     '[' * 100_000, '9' * 5000):
            (f / 'log.jsonl').write_text(text + tail)
            assert runs.read_log(f) == rows, tail[:20]
        run = runs.Run(f, CONFIG)
        for row in rows:
            run.log(row)
        with open(f / 'log.jsonl', 'a') as log:
            log.write('{"epoch": 3, "lo')
        run.trim_log(1)
        run.log({'epoch': 2, 'loss': math.nan})
        assert (f / 'log.jsonl').read_text() == '{"epoch": 1, "loss": 0.5}\n{"epoch": 2, "loss": null}\n'
        del run


def test_names_clock_and_live_line():
    assert runs.default_name('simclr', {}) == 'simclr'
    assert runs.default_name('simclr', {'tau': 0.5, 'batch_size': 8}) == 'simclr-tau=0.5-batch-size=8'
    for hostile in '../../x', 'a b/c', 'x' * 999, '\n':
        name = runs.default_name('ae', {'data': hostile})
        assert Path(name).name == name and len(name) <= 150 and not set(name) & set('/ \n')
    assert [runs.clock(s) for s in (5, 75, 4000)] == ['0:05', '1:15', '1:06:40']


def test_a_default_name_holds_what_sets_runs_apart():
    def named(*words):
        with mock.patch.object(recipes, 'run_method') as started:
            assert run('--method', *words)[0] == 0
        return started.call_args[0][0].name
    encoder = 'classify', '--encoder', 'runs/simclr-tau=0.5'
    assert named(*encoder) == named(*encoder[:2], 'runs/simclr-tau=0.5/') != named(*encoder[:2], 'runs/simclr-tau=0.7')
    assert named('ae', '--data', 'a/my.v2.npz') == 'ae-data=my.v2' and named('ae', '--data', 'a/v.1/') == 'ae-data=v.1'
    assert named('simclr', '--epochs', 9) == 'simclr' and named('scan', '--epochs', 9) == 'scan-epochs=9'


def test_long_work_tells_a_terminal_how_far_it_is_and_leaves_nothing_behind():
    x, seconds = rand(60, 4), itertools.count(0, 0.7)
    work = {'pictures': lambda: evaluate.in_chunks(lambda v: v, torch.zeros(60, 1, 8, 8, dtype=torch.uint8), size=5),
            'k-means': lambda: evaluate.kmeans(x, 3), 't-SNE': lambda: tsne.tsne(x, 5, 20),
            'linear probe': lambda: evaluate.linear_probe(x, torch.arange(60) % 3, x, torch.arange(60) % 3, x),
            'nearest neighbours': lambda: evaluate.knn(x, torch.arange(60) % 3, x)}
    for name, f in work.items():
        for terminal in True, False:
            out = io.StringIO()
            out.isatty = lambda terminal=terminal: terminal
            with contextlib.redirect_stdout(out), mock.patch.object(runs.time, 'monotonic', lambda: next(seconds)), \
                    mock.patch.object(evaluate, 'CHUNK', 600):
                f()
            lines = out.getvalue().split('\r')
            assert terminal or not out.getvalue()
            assert not terminal or (len(lines) > 4 and not lines[-1] and not lines[-2].strip()), (name, lines)
            assert all(re.fullmatch(rf'{name}[^:]*: \d+%, [\d:]+ left *', line) for line in lines[1:-2]), lines
    out = io.StringIO()                                                   # what is quick shows nothing
    out.isatty = lambda: True
    with contextlib.redirect_stdout(out):
        work['nearest neighbours']()
    assert not out.getvalue()


def test_an_existing_run_is_not_overwritten_silently():
    done = finished('ae')
    kept = lambda: {p.name: p.read_bytes() for p in done.iterdir()}
    before = kept()
    refused(*tiny('ae'), said=['--resume', '--overwrite'])
    code, out, _ = run(*tiny('ae'), '--resume', '--epochs', 9)             # it has not trained for so many
    assert code == 0 and 'already finished' in out and kept() == before


def test_a_checkpoint_killed_before_its_last_rename_is_still_the_newest():
    with folder() as f:
        run = runs.Run(f / 'x', CONFIG)
        for epoch in 1, 2, 3:
            run.save({'epoch': epoch})
        assert [runs.load_checkpoint(f / 'x' / name)['epoch'] for name in runs.CHECKPOINTS[1:]] == [3, 2]
        (f / 'x' / 'checkpoint.previous.pt').unlink()
        (f / 'x' / 'checkpoint.pt').rename(f / 'x' / 'checkpoint.previous.pt')      # as between the two renames
        torch.save({'epoch': 4, 'digest': runs.state_digest({'epoch': 4})}, f / 'x' / 'checkpoint.new.pt')
        assert run.load() == {'epoch': 4}
        run.save({'epoch': 5})
        assert run.load() == {'epoch': 5} and not (f / 'x' / 'checkpoint.new.pt').exists()
        del run


def test_resume_takes_the_arguments_that_were_not_typed_from_the_run():
    posix()
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        with stopping(signal.SIGTERM):
            assert run(*tiny('vae'), cwd=cwd)[0] == 130
        with mock.patch.object(data, 'find_fashion_mnist', side_effect=AssertionError('looked for other data')):
            code, _, err = run('--method', 'vae', '--name', 'vae', '--resume', cwd=cwd)
        assert code == 0 and not err, err
        assert_same_run(cwd / 'runs' / 'vae', finished('vae'))


def test_what_may_not_change_on_resume_is_named():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        write_npz(cwd / 'other.npz', **arrays(seed=5))
        shutil.copytree(finished('vae'), cwd / 'runs' / 'vae')
        (cwd / 'runs' / 'vae' / 'metrics.json').unlink()
        before = weights(cwd / 'runs' / 'vae')
        flags = ['--method', 'vae', '--name', 'vae', '--data', 'tiny.npz', '--resume']
        for dest, old, new in (('lr', cli.PER_METHOD['lr']['vae'], 0.5), ('beta', 1.0, 3.0), ('method', 'vae', 'conv'),
                               ('seed', 0, 1), ('val', 5000, 9), ('net', 'resnet', 'fc'), ('batch-size', 40, 7)):
            refused(*flags, '--' + dest, new, cwd=cwd, said=[f'with --{dest} {old}, not --{dest} {new}', '--epochs, '
                    '--answers, --device, --save-every, --perplexity, --tensorboard may change'])
        refused(*flags, '--deterministic', cwd=cwd, said=['with --no-deterministic, not --deterministic'])
        shutil.copy(cwd / 'other.npz', cwd / 'tiny.npz')
        refused(*flags, cwd=cwd, said=['other data'])
        refused('--evaluate', 'runs/vae', cwd=cwd, said=['not finished'])
        (cwd / 'runs' / 'vae' / 'metrics.json').write_text('{}')
        refused('--evaluate', 'runs/vae', cwd=cwd, said=['other data'])
        (cwd / 'runs' / 'vae' / 'metrics.json').unlink()
        write_npz(cwd / 'tiny.npz')
        assert runs.state_digest(weights(cwd / 'runs' / 'vae')) == runs.state_digest(before)
        code, _, err = run(*flags, '--epochs', 3, '--save-every', 5, '--device', 'cpu', cwd=cwd)      # these may
        assert code == 0 and len(logged(cwd / 'runs' / 'vae')) == 3, err
        kept = runs.read_json(cwd / 'runs' / 'vae' / 'config.json')['args']
        assert (kept['latent'], kept['width'], kept['batch_size'], kept['epochs']) == (4, 0.1, 40, 3)


def test_a_run_folder_with_foreign_content_is_one_sentence():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        there = cwd / 'runs' / 'ae'
        shutil.copytree(finished('ae'), there)
        (there / 'metrics.json').write_text('[]')
        refused('--compare', there, cwd=cwd, said=['metrics.json'])
        (there / 'metrics.json').write_text('{"seconds": "x", "mse": [1]}')
        assert run('--compare', there, cwd=cwd)[0] in (0, 2)
        for content in b'{}', b'{"args": 5, "data": []}', b'{"arg':
            (there / 'config.json').write_bytes(content)
            for words in ['--compare', there], ['--evaluate', there], [*tiny('ae'), '--resume']:
                refused(*words, cwd=cwd, said=['config.json'])
        shutil.copyfile(finished('ae') / 'config.json', there / 'config.json')
        for other in {'x': 1}, weights(finished('conv')):                 # whole, but of something else
            torch.save({**other, 'digest': runs.state_digest(other)}, there / 'checkpoint.pt')
            (there / 'metrics.json').write_text('{}')
            refused('--evaluate', there, cwd=cwd, said=[there])
            (there / 'metrics.json').unlink()
            refused(*tiny('ae'), '--resume', cwd=cwd, said=['runs/ae'])


# train.py ----------------------------------------------------------------------------------------------------

def test_learning_rate_warms_up_to_its_peak_and_comes_down_to_zero_step_by_step():
    curve = [train.lr_scale(s, 100, 10, math.inf) for s in range(100)]
    wanted = [(s + 1) / 10 if s < 10 else (1 + math.cos(math.pi * (s - 10) / 90)) / 2 for s in range(100)]
    assert close(curve, wanted) and curve[9] == curve[10] == 1 and curve[99] < 1e-3
    assert all(a > b for a, b in zip(curve[10:], curve[11:]))
    assert [train.lr_scale(s, 100, 0, 0) for s in (0, 50, 99)] == [1, 1, 1]
    held = [train.lr_scale(s, 100, 10, 20) for s in range(100)]
    assert held[10:81] == [1] * 71 and close(held[80:], [(1 + math.cos(math.pi * s / 20)) / 2 for s in range(20)])
    for steps, warmup in itertools.product((1, 3, 7, 10), (0, 0.5, 1.5, 3, 3.5, 50)):
        for closing in 0, 2, math.inf:
            assert all(0 < train.lr_scale(s, steps, warmup, closing) <= 1 for s in range(steps)), (steps, warmup)


def test_the_schedule_is_asked_at_every_step_of_the_whole_run():
    asked, real = [], train.lr_scale
    def spy(*args):
        asked.append(args)
        return real(*args)
    with folder() as cwd, mock.patch.object(train, 'lr_scale', spy), only_training():
        write_npz(cwd / 'tiny.npz')
        code, _, err = run(*tiny('conv'), '--warmup', 1, '--lr', 0.01, cwd=cwd)
        assert code == 0, err
        wanted = [(step, 6, 3, math.inf) for step in range(6)]            # 108 pictures in batches of 36
        assert list(dict.fromkeys(asked)) == wanted
        last, groups = 0.01 * real(5, 6, 3, math.inf), weights(cwd / 'runs' / 'conv')['optimizer']['param_groups']
        assert close([row['lr'] for row in logged(cwd / 'runs' / 'conv')], [0.01, last])
        assert [group['lr'] for group in groups] == [last] * 2


def test_weight_decay_spares_norms_and_biases():
    model = nets.build('simclr', 'resnet', (1, 8, 8), 0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    opt = train.optimizer(model, 0.1, 0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    opt.step()                                                            # no gradient: only the decay acts
    norms = {f'{name}.weight' for name, module in model.named_modules() if 'BatchNorm' in type(module).__name__}
    for name, p in model.named_parameters():
        spared = name in norms or name.endswith('bias')
        assert close(p, before[name] * (1 if spared else 1 - 0.1 * 0.5), 1e-6), name
    assert norms < set(before) and sum(len(g['params']) for g in opt.param_groups) == len(before)


def test_adamw_steps_by_its_formula_and_the_same_after_a_reload():
    layer = torch.nn.Linear(3, 1, bias=False)
    w, grads = layer.weight.detach().double().flatten().numpy(), randn(4, 3).double().numpy()
    opt, m, v = train.optimizer(layer, 0.01, 0.1), 0, 0
    for t, g in enumerate(grads, 1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w * (1 - 0.01 * 0.1) - 0.01 * (m / (1 - 0.9 ** t)) / (np.sqrt(v / (1 - 0.999 ** t)) + 1e-8)
        layer.weight.grad = torch.tensor(g).float().view(1, 3)
        opt.step()
        assert close(layer.weight.flatten(), w, 1e-5)
        if t == 2:                                                        # through a file, into new objects
            blob, weight = io.BytesIO(), layer.weight.detach().clone()
            torch.save(opt.state_dict(), blob)
            blob.seek(0)
            layer = torch.nn.Linear(3, 1, bias=False)
            layer.weight.data.copy_(weight)
            opt = train.optimizer(layer, 0.5, 0.1)
            opt.load_state_dict(torch.load(blob, weights_only=True))


def test_the_first_signal_is_noted_and_the_second_acts_at_once():
    posix()
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with raises(KeyboardInterrupt), train.signals() as seen:
            os.kill(os.getpid(), signal.SIGINT)
            assert seen == [signal.SIGINT]
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getsignal(signal.SIGTERM) == before[1]
    finally:
        signal.signal(signal.SIGINT, before[0])


def test_validation_leaves_the_model_as_it_is_and_weighs_pictures_equally():
    model = nets.build('conv', 'resnet', (1, 10, 12), 0.1, 4).train()
    x, before = torch.from_numpy(pictures(23)[0])[:, None], runs.state_digest(model.state_dict())
    row = train.validate(model, train.autoencoding, x, 10, 0, False)
    assert runs.state_digest(model.state_dict()) == before
    v = x.float() / 255
    assert close(row['val_loss'], ((model(v) - v) ** 2).mean())
    assert close(row['std'], model.encode(v).std(0, unbiased=False).mean())
    assert 'WARNING' not in train.describe({'epoch': 1, 'loss': 0.1, 'images_per_s': 1, **row}, 2)
    model.encode = lambda x: torch.full((len(x), 4), 7.0) + 1e-3 * x[:, 0, 0, :4]
    row = train.validate(model, lambda *_: (torch.tensor(1.0), {}), x, 10, 0, False)
    assert 'collapsed' in train.describe({'epoch': 1, 'loss': 0.1, 'images_per_s': 1, **row}, 2)


def test_measuring_leaves_the_backbone_bit_identical():
    args, ds = cli.parse(['--method', 'simclr', '--no-amp', '--width', '0.1'])[0], data.load(home() / 'tiny.npz')
    model = stages.network_of(runs.read_config(finished('simclr')), torch.device('cpu')).train()
    before, ids = runs.state_digest(model.state_dict()), data.split(120, 12, 0)
    encode, reconstruct = stages.representation(args, model, ds.x_train, torch.device('cpu'))
    m, _ = evaluate.measure(ds, *ids, encode, reconstruct)
    assert runs.state_digest(model.state_dict()) == before                # BatchNorm buffers included
    assert reconstruct is None and m['features'] == model.encoder.dim != model.head[-1].out_features


def test_every_method_learns_on_tiny_pictures_and_leaves_all_its_files():
    shows = {**dict.fromkeys([*cli.METHODS], ''), **dict.fromkeys(['ae', 'conv', 'pca'], 'reconstructions'),
             'vae': 'reconstructions samples interpolation', 'simclr': 'views'}
    for method, pngs in shows.items():
        there = finished(method)
        files = {'config.json', 'metrics.json', 'report.html', 'confusion.svg', '.lock'} | {
            f'{png}.png' for png in pngs.split()}
        if method in TRAINED:
            files |= {'log.jsonl', 'checkpoint.pt'}
            rows = [row for row in logged(there) if 'loss' in row]
            assert [row['epoch'] for row in rows] == [1, 2] and rows[1]['loss'] < rows[0]['loss'], method
        if method in ('classify', 'query'):
            files |= {'labels.sqlite'}
        if method in ('cluster', 'scan'):
            files |= {'iterations.svg', 'best.pt', 'final.pt', 'iteration-00.pt', 'iteration-01.pt', 'iteration-02.pt'}
        if method == 'query':
            files |= {'predictions.csv', 'predictions.npz'}
        assert {p.name for p in there.iterdir()} - {'checkpoint.previous.pt'} == files, method
        m, config = measured(there), runs.read_json(there / 'config.json')
        assert m['split'] == 'test' and m['n'] == 40 and m['method'] == method and not m['left_out']
        assert ('mse' in m) == ('reconstructions' in pngs) and ('active_units' in m) == (method == 'vae')
        assert config['data']['digest'] == data.load(home() / 'tiny.npz').digest and config['args']['seed'] == 0
        assert config['versions']['torch'] == torch.__version__
    assert measured(finished('pixels'))['knn'] == 1 and measured(finished('pixels'))['features'] == 120
    ds = data.load(home() / 'tiny.npz')
    pca = evaluate.PCA(data.to_float(ds.x_train[data.split(120, 5000, 0)[0]]).flatten(1), 4)
    x = data.to_float(ds.x_test).flatten(1)
    assert close(measured(finished('pca'))['mse'], (pca.decode(pca.encode(x)).clamp(0, 1) - x).square().mean())


def test_the_same_seed_twice_is_bit_identical():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        for method in TRAINED:
            code, _, err = run(*tiny(method), cwd=cwd)
            assert code == 0, err
            assert_same_run(cwd / 'runs' / method, finished(method))


class Killed(BaseException):
    """Ends a run on the spot, as kill -9 does: nothing is caught, saved or tidied."""


def stopping(how):
    """stages.objective_of, but a run takes one step and then gets a signal or is killed before its next."""
    original = stages.objective_of
    def objective_of(args):
        objective, steps = original(args), []
        def one(model, *given, **more):
            if model.training:
                steps.append(1)
                if how is Killed and len(steps) == 2:
                    raise Killed
                if how is not Killed and len(steps) == 1:
                    os.kill(os.getpid(), how)
            return objective(model, *given, **more)
        return one
    return mock.patch.object(stages, 'objective_of', objective_of)


def test_a_run_stopped_at_every_single_step_ends_as_if_left_alone():
    posix()
    for how, starts in (signal.SIGTERM, 7), (signal.SIGINT, 7), (Killed, 6):
        with folder() as cwd:
            write_npz(cwd / 'tiny.npz')
            for method in TRAINED if how is not signal.SIGINT else ['ae']:
                for start in range(1, starts + 1):
                    code, out, seconds = None, '', 1e-9 if how is Killed else 60
                    with stopping(how), contextlib.suppress(Killed):
                        code, out, _ = run(*tiny(method), '--resume', '--save-every', seconds, cwd=cwd)
                    assert code == (0 if start == starts else None if how is Killed else 130), (method, how, start)
                    assert code != 130 or '--resume' in out
                assert_same_run(cwd / 'runs' / method, finished(method))


def test_early_stopping_counts_on_after_every_stop():
    posix()
    with folder() as cwd, only_training():
        write_npz(cwd / 'tiny.npz')
        flags = tiny('ae', '--resume', '--epochs', 9, '--patience', 2, '--min-delta', 1e5)
        with stopping(signal.SIGTERM):
            codes = [run(*flags, cwd=cwd)[0] for _ in range(10)]
        assert codes == [130] * 9 + [0] and len(logged(cwd / 'runs' / 'ae')) == 3


def test_a_run_resumes_after_a_damaged_checkpoint_a_torn_log_and_a_full_disk():
    posix()
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        there = cwd / 'runs' / 'conv'
        for _ in range(4):
            with stopping(signal.SIGTERM):
                assert run(*tiny('conv'), '--resume', cwd=cwd)[0] == 130
        blob = (there / 'checkpoint.pt').read_bytes()
        (there / 'checkpoint.pt').write_bytes(blob[:-2000])
        with open(there / 'log.jsonl', 'a') as log:
            log.write('{"epoch": 2, "lo')
        kept = (there / 'checkpoint.previous.pt').read_bytes()
        with full_disk(len(blob) // 2):
            code, _, err = run(*tiny('conv'), '--resume', '--save-every', 1e-9, cwd=cwd)
        assert code == 2 and 'Traceback' not in err and err.count('\n') == 2, err     # the fallback, then the disk
        assert (there / 'checkpoint.previous.pt').read_bytes() == kept
        code, _, err = run(*tiny('conv'), '--resume', cwd=cwd)
        assert code == 0 and 'checkpoint.pt is not a readable checkpoint' in err and err.count('\n') == 1
        assert_same_run(there, finished('conv'))
        for name in 'checkpoint.pt', 'checkpoint.previous.pt':
            (there / name).write_bytes(b'junk')
        refused('--evaluate', there, cwd=cwd, said=['--overwrite'])


SLOWLY = f'''
import importlib.util, sys, time
sys.path.insert(0, {str(HERE)!r})
spec = importlib.util.spec_from_file_location('cli', {str(HERE / 'ssl.py')!r})
cli = importlib.util.module_from_spec(spec); spec.loader.exec_module(cli)
import stages, torch
torch.set_num_threads(1)
fast = stages.objective_of
def objective_of(args):
    def slow(*given):
        time.sleep(0.5)
        return fast(args)(*given)
    return slow
stages.objective_of = objective_of
sys.exit(cli.main(sys.argv[1:]))
'''


def test_real_processes_killed_or_stopped_are_resumed_and_guarded_while_alive():
    posix()
    ends = {'simclr': (signal.SIGKILL, -signal.SIGKILL), 'vae': (signal.SIGTERM, 130)}
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        processes = {m: python('-c', SLOWLY, *tiny(m), '--save-every', 0.01, cwd=cwd) for m in ends}
        for method, process in processes.items():
            while not (cwd / 'runs' / method / 'checkpoint.pt').exists() and process.poll() is None:
                time.sleep(0.01)
            if method == 'simclr':
                refused(*tiny(method), '--resume', cwd=cwd, said=['in use by another process'])
            process.send_signal(ends[method][0])
            out, err = process.communicate(timeout=60)
            assert process.returncode == ends[method][1] and 'Traceback' not in err, (method, process.returncode, err)
        assert '--resume to continue' in out                              # of the last, which was asked to stop
        for method in ends:
            assert 0 < len(weights(cwd / 'runs' / method)) and not (cwd / 'runs' / method / 'metrics.json').exists()
            code, _, err = run(*tiny(method), '--resume', cwd=cwd)
            assert code == 0, err
            assert_same_run(cwd / 'runs' / method, finished(method))


def test_every_method_can_do_with_deterministic_algorithms_alone_and_resumes_with_them():
    posix()
    seen, fit, _ = [], train.fit, [finished(method) for method in TRAINED]
    def spy(*given, **more):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return fit(*given, **more)
    with folder() as cwd, mock.patch.object(train, 'fit', spy):
        write_npz(cwd / 'tiny.npz')
        for method in TRAINED:
            with stopping(signal.SIGTERM):
                assert run(*tiny(method), '--deterministic', cwd=cwd)[0] == 130
            assert run(*tiny(method, '--resume'), cwd=cwd)[0] == 0          # it is kept
            assert_same_run(cwd / 'runs' / method, finished(method))
        assert seen == [True] * 2 * len(TRAINED), seen
        assert os.environ['CUBLAS_WORKSPACE_CONFIG'] in (':4096:8', ':16:8'), os.environ['CUBLAS_WORKSPACE_CONFIG']
        assert run(*tiny('ae'), '--overwrite', cwd=cwd)[0] == 0 and seen[-1] is False
        words = 'f_cuda does not have a deterministic implementation, but you set. You can'
        with mock.patch.object(stages, 'objective_of', side_effect=RuntimeError(words)):
            refused(*tiny('ae'), '--overwrite', '--deterministic', cwd=cwd, said=['--deterministic', 'f_cuda'])


def test_too_little_memory_is_one_sentence_of_advice():
    allocator = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000"
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        with mock.patch.object(data, 'free_memory', lambda _: 5e4), mock.patch.object(data, 'HELD', 1e9):
            for method in TRAINED:
                refused(*tiny(method), cwd=cwd, said=['out of memory', 'parameters', '--width'])
        for e in (torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2 GiB'), RuntimeError(allocator),
                  RuntimeError('std::bad_alloc'), MemoryError()):
            with mock.patch.object(stages, 'objective_of', lambda args, e=e: mock.Mock(side_effect=e)):
                said = ['out of memory; try a smaller --batch-size']
                refused(*tiny('simclr'), '--name', len(str(e)), cwd=cwd, said=said)      # e holds its run and the lock
        fault = RuntimeError('CUDA error: an illegal memory access was encountered')
        with mock.patch.object(stages, 'objective_of', side_effect=fault), raises(RuntimeError, 'illegal'):
            run(*tiny('ae'), cwd=cwd)                                      # what is no lack of memory is not called one


def test_lost_labels_are_one_sentence():
    for method in 'classify', 'query':
        with folder() as cwd:
            write_npz(cwd / 'tiny.npz')
            assert run(*tiny(method), cwd=cwd)[0] == 0
            there, lost = cwd / 'runs' / method, f'runs/{method}/labels.sqlite is missing'
            (there / 'labels.sqlite').unlink()
            for command in ['--evaluate', f'runs/{method}'], ['--export', f'runs/{method}', 'e.npz']:
                refused(*command, cwd=cwd, said=[lost])
            assert not (there / 'labels.sqlite').exists()
            if method == 'query':
                (there / 'metrics.json').unlink()
                refused(*tiny(method), '--resume', cwd=cwd, said=['lost its labels', '--overwrite'])


def test_a_folder_without_locks_can_be_used():
    posix()
    with folder() as cwd, mock.patch.object(runs.fcntl, 'flock', side_effect=OSError(errno.ENOSYS, 'no locks here')):
        write_npz(cwd / 'tiny.npz')
        assert run(*tiny('pixels'), cwd=cwd)[0] == 0
        assert not runs.locked(cwd / 'runs/pixels') and (cwd / 'runs/pixels/.lock').exists()


def test_a_folder_that_can_not_be_written_a_full_disk_and_no_network_are_one_sentence():
    posix()
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        for f in cwd, cwd / 'tiny.npz', cwd.parent:
            os.chmod(f, f.stat().st_mode | 0o055)
        os.chmod(cwd, 0o555)
        was = os.geteuid()
        try:
            if was == 0:
                os.seteuid(65534)                                         # root may write anywhere
            for method in 'ae', 'query', 'scan':
                refused(*tiny(method), cwd=cwd, said=['Permission denied', 'runs'])
        finally:
            os.seteuid(was)
            os.chmod(cwd, 0o755)
        for method, size in itertools.product(TRAINED, (0, 300, 3000)):   # config.json, the labels, the checkpoint
            with full_disk(size):
                code, _, err = run(*tiny(method, '--name', f'{method}{size}'), cwd=cwd)
            assert code == 2 and err.count('\n') == 1 and 'Traceback' not in err, (method, size, err)
            assert not list((cwd / 'runs').glob('*/*.tmp'))
        for method in 'query', 'scan':
            assert run(*tiny(method, '--name', f'{method}3000', '--resume'), cwd=cwd)[0] == 0
            assert_same_run(cwd / 'runs' / f'{method}3000', finished(method))
        with mock.patch.object(fetch, 'open_url', side_effect=urllib.error.URLError('no network')), \
                mock.patch.object(data, 'DEBIAN', cwd):
            for name in 'fashion-mnist', 'stl10':
                refused('--fetch', '--dataset', name, cwd=cwd, said=['could not be downloaded', 'no network'])
            refused('--method', 'ae', cwd=cwd, said=['could not be downloaded'])


def test_a_torn_metrics_file_is_measured_again():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        for method in 'vae', 'query', 'scan':
            shutil.copytree(finished(method), there := cwd / 'runs' / method)
            blob = (there / 'metrics.json').read_bytes()
            (there / 'metrics.json').write_bytes(blob[:len(blob) // 2])
            code, out, err = run(*tiny(method), '--resume', cwd=cwd)
            assert code == 0 and not err and 'already' not in out, err
            assert_same_run(there, finished(method))


def test_a_closed_pipe_is_no_traceback():
    reader, writer = os.pipe()
    os.close(reader)
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        processes = [python(HERE / 'ssl.py', *words, cwd=cwd, stdout=writer)
                     for words in (tiny('ae'), ['--compare'], ['--help'])]
        for process in processes:
            _, err = process.communicate(timeout=100)
            assert not err, err
    os.close(writer)


def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_the_last_good_checkpoint_stays():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        for method in TRAINED:
            original = stages.objective_of
            def objective_of(args, original=original):
                objective, steps = original(args), []
                def explodes_at_step_4(model, *given, **more):
                    steps.append(model.training)
                    loss, parts = objective(model, *given, **more)
                    return loss * (math.nan if sum(steps) == 4 and model.training else 1), parts
                return explodes_at_step_4
            with mock.patch.object(stages, 'objective_of', objective_of):
                said = 'the loss is not finite at epoch 2, step 1'
                refused(*tiny(method), '--save-every', 1e-9, cwd=cwd, said=[said])
            saved = weights(cwd / 'runs' / method)
            assert all(v.isfinite().all() for v in saved['model'].values())
            assert (saved['epoch'], saved['step']) in ((1, 3), (2, 0))
            assert run(*tiny(method), '--resume', cwd=cwd)[0] == 0
            assert_same_run(cwd / 'runs' / method, finished(method))


def test_a_huge_learning_rate_never_saves_weights_that_are_not_finite():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        stopped = 0
        for method in TRAINED:
            code, _, err = run(*tiny(method), '--lr', 1e9, '--warmup', 0, '--save-every', 1e-9, cwd=cwd)
            saved = weights(cwd / 'runs' / method)['model']
            assert all(v.isfinite().all() for v in saved.values()), method
            assert code in (0, 2) and err.count('\n') == (code == 2), err
            stopped += code == 2
        assert stopped


def test_permuting_labels_changes_no_weight_no_loss_and_no_picture():
    rng = np.random.default_rng(0)
    permuted = {k: rng.permutation(v) if k[0] == 'y' else v for k, v in arrays().items()}
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **permuted)
        for method in UNLABELLED:
            code, _, err = run(*tiny(method), cwd=cwd)
            assert code == 0, err
            a, b = cwd / 'runs' / method, finished(method)
            assert runs.state_digest(weights(a)) == runs.state_digest(weights(b))
            assert logged(a) == logged(b) and drawn(a) == drawn(b) and measured(a) != measured(b)


def test_permuting_training_labels_changes_no_cluster():
    rng = np.random.default_rng(0)
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **{k: rng.permutation(v) if k[0] == 'y' else v for k, v in arrays().items()})
        for method in 'cluster', 'scan':
            assert run(*tiny(method), cwd=cwd)[0] == 0
            a, b = cwd / 'runs' / method, finished(method)
            names = sorted(p.name for p in b.glob('*.pt'))
            assert sorted(p.name for p in a.glob('*.pt')) == names and len(names) >= 6
            for name in names:
                states = [runs.load_checkpoint(there / name) for there in (a, b)]
                for s in states:                                          # scores stand in the row, to be looked at
                    s['seconds'], row = 0, s.get('row', {})
                    assert not row or [row.pop(key) for key in ('acc', 'nmi', 'ari', 'purity')]
                assert runs.state_digest(states[0]) == runs.state_digest(states[1]), name
            assert measured(a)['sizes'] == measured(b)['sizes'] and measured(a)['acc'] != measured(b)['acc']


def test_permuting_test_labels_changes_nothing_but_the_final_scores():
    scores = {'knn', 'probe', 'f1', 'confusion', 'kmeans_acc', 'kmeans_nmi', 'kmeans_ari', 'kmeans_purity', 'accuracy',
              'acc', 'nmi', 'ari', 'purity'}
    original, changed = arrays(), 0
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', **{**original, 'y_test': np.random.default_rng(0).permutation(original['y_test'])})
        for method in cli.METHODS:
            assert run(*tiny(method), cwd=cwd)[0] == 0
            there = cwd / 'runs' / method, finished(method)
            files, metrics = [results(f) for f in there], [measured(f) for f in there]
            differ = {name for name in {*files[0], *files[1]} if files[0].get(name) != files[1].get(name)}
            assert differ <= {'metrics.json', 'confusion.svg'}, (method, differ)
            assert metrics[0].keys() == metrics[1].keys(), method
            assert {k for k in metrics[0] if metrics[0][k] != metrics[1][k]} <= scores, method
            changed += bool(differ)
            configs = [runs.read_config(f) for f in there]
            for config in configs:                                        # another test may have resumed the one
                config['args'] = {k: v for k, v in config['args'].items() if k not in runs.HERE}
            assert configs[0] == {**configs[1], 'command': configs[0]['command']}
    assert changed >= 7                                                   # a network that names one class can't tell


def test_evaluate_gives_the_measures_and_pictures_of_the_finished_run_again():
    for method in 'vae', 'simclr', 'classify', 'pca':
        there = finished(method)
        before, pngs, saved = measured(there), drawn(there), {p.name: p.read_bytes() for p in there.glob('*.pt')}
        for png in there.glob('*.png'):
            png.unlink()
        (there / 'metrics.json').write_text('{}')
        code, out, err = run('--evaluate', there)
        assert code == 0 and not err and ('kNN' in out or method == 'classify')
        assert measured(there) == before and drawn(there) == pngs
        assert {p.name: p.read_bytes() for p in there.glob('*.pt')} == saved
    refused(*['--evaluate', there], cwd=HERE.parent, said=['tiny.npz'])   # its data is not there


def reading(limit=0):
    """Pictures are held on the device up to this many bytes, beyond it read batch by batch; yields the batches read."""
    gathered, original = [], data.Pictures._gather
    def gather(self, where):
        gathered.append(len(where))
        return original(self, where)
    return mock.patch.multiple(data, HELD=limit), mock.patch.object(data.Pictures, '_gather', gather), gathered


def test_pictures_are_held_if_they_fit_and_the_same_batches_come_either_way():
    x, ids = torch.from_numpy(arrays(C=3)['x_train']).permute(0, 3, 1, 2).contiguous(), torch.randperm(120)[:50]
    split = formats.Mapped([x[:7], x[7:7], x[7:60].transpose(2, 3).contiguous().transpose(2, 3), x[60:]])
    assert torch.equal(split[:], x) and torch.equal(split[ids], x[ids]) and torch.equal(split.first(65)[:], x[:65])
    for source, of in itertools.product((x, split), (None, ids)):
        wanted = x if of is None else x[of]
        for limit in wanted.numel(), wanted.numel() - 1:
            held, counted, gathered = reading(limit)
            with held, counted:
                p = data.Pictures(source, torch.device('cpu'), of)
                assert (p.whole is None) == (limit < wanted.numel())
                assert p.shape == wanted.shape == (len(p), 3, 10, 12)
                for steps in [], [(7, torch.tensor([3, 1, 3]))], list(data.batches(len(p), 7, 0, 1, start=2)):
                    got = list(p.read(iter(steps)))
                    assert [(step, order.tolist()) for step, order, _ in got] == [(s, o.tolist()) for s, o in steps]
                    assert all(torch.equal(rows, wanted[order]) and rows.is_contiguous() for _, order, rows in got)
                assert bool(gathered) == (p.whole is None)
    total = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') if hasattr(os, 'sysconf') else 1 << 50
    assert 0 < data.free_memory(torch.device('cpu')) <= total
    with mock.patch.object(torch.cuda, 'mem_get_info', lambda index: (100 + index, 999)):
        assert data.free_memory(torch.device('cuda:3')) == 103


def test_the_next_batch_is_read_while_one_is_in_use_and_no_further():
    held, counted, gathered = reading()
    with held, counted:
        p = data.Pictures(torch.zeros(30, 1, 8, 8, dtype=torch.uint8), torch.device('cpu'))
        steps = p.read(data.batches(30, 10, 0, 1))
        for n in 2, 3, 3:
            next(steps)
            until = time.monotonic() + 5
            while len(gathered) < n and time.monotonic() < until:
                time.sleep(0.001)
            assert len(gathered) == n
        assert next(steps, None) is None


def test_a_run_that_reads_batch_by_batch_equals_one_that_holds_its_pictures_also_when_stopped():
    posix()
    for method in 'ae', 'simclr', 'classify', 'query':
        with folder() as cwd:
            write_npz(cwd / 'tiny.npz')
            held, counted, gathered = reading()
            with held, counted:
                for stop in stopping(signal.SIGTERM), stopping(Killed), contextlib.nullcontext():
                    code, err = None, ''
                    with stop, contextlib.suppress(Killed):
                        code, _, err = run(*tiny(method), '--resume', '--save-every', 1e-9, cwd=cwd)
            assert code == 0 and len(gathered) >= 6, (method, err)
            assert_same_run(cwd / 'runs' / method, finished(method))
    gc.collect()
    assert not [t for t in threading.enumerate() if 'ThreadPool' in t.name]      # readers end with their runs


def test_a_run_from_a_memory_map_equals_one_from_memory_held_or_not():
    with folder() as cwd:
        (cwd / 'cifar').mkdir()
        write_cifar10(cwd / 'cifar')
        ds = data.load(cwd / 'cifar')
        x = {key: getattr(ds, key)[:].permute(0, 2, 3, 1).numpy() for key in ('x_train', 'x_test')}
        write_npz(cwd / 'tiny.npz', **x, y_train=ds.y_train.numpy(), y_test=ds.y_test.numpy())
        for source, limit in ('tiny.npz', None), ('cifar', None), ('cifar', 0):
            held, counted, gathered = reading(limit)
            with held, counted:
                code, _, err = run(*tiny('simclr'), '--data', source, '--batch-size', 8, '--name', f'{source}{limit}',
                                   cwd=cwd)
                assert code == 0 and not err and bool(gathered) == (limit == 0), err
        for other in 'cifarNone', 'cifar0':
            assert_same_run(cwd / 'runs' / 'tiny.npzNone', cwd / 'runs' / other)


def test_a_person_is_shown_pictures_that_stay_in_their_files():
    with folder() as cwd:
        write_cifar10(cwd)
        ds = data.load(cwd)
        assert torch.equal(ds.x_train[3], ds.x_train[3:4][0]) and torch.equal(ds.x_train[[4, 2]][1], ds.x_train[2:3][0])
        assert ds.x_train[[]].shape == (0, 3, 32, 32)
        flags = tiny('query', '--oracle', 'file', '--answers', 'a.csv', '--budget', 12, '--data', '.', '--name', 'file')
        code, out, err = run(*flags, cwd=cwd)
        assert code == 130 and 'labels missing' in out and not err, err
        shown = read_png(cwd / 'runs/file/wanted.png')
        ids = [int(line.strip(',')) for line in (cwd / 'runs/file/wanted.csv').read_text().split()[1:]]
        assert all((shown[..., 2] == i).sum() >= 1024 for i in ids)       # blue is the picture's number
        paid = labels.LabelDatabase(cwd / 'l.sqlite', None, 9, 'abc')
        web = oracle.Web(paid, ds.x_train, ds.classes, 1, None)
        try:
            with urllib.request.urlopen(web.address + '7.png') as sent:
                (cwd / '7.png').write_bytes(sent.read())
            assert np.array_equal(read_png(cwd / '7.png'), ds.x_train[7].permute(1, 2, 0).numpy())
        finally:
            web.close()


def partly_labelled(labelled, **kwargs):
    """A data set in which only these of the training pictures have a label."""
    a = arrays(**kwargs)
    y = torch.full((len(a['y_train']),), -1)
    y[labelled] = torch.from_numpy(a['y_train'][labelled])
    return data._dataset('partly', {**a, 'y_train': y})


def test_pictures_without_a_label_are_measured_without_and_give_the_scores_of_the_labelled_alone():
    g = np.random.default_rng(0)
    for with_test in True, False:
        ds = partly_labelled(np.sort(g.permutation(200)[:70]), n=200, n_test=90)
        if not with_test:
            ds.x_test = ds.y_test = None
        ids = data.split(200, 20, 0)
        encode = lambda x: x.flatten(1)
        m, _ = evaluate.measure(ds, *ids, encode, probe_share=0.5)
        train, val = ([i for i in of.tolist() if ds.y_train[i] >= 0] for of in ids)
        bank = train + val if with_test else train
        x, y = (ds.x_test, ds.y_test) if with_test else (ds.x_train[val], ds.y_train[val])
        pred = evaluate.knn(data.to_float(ds.x_train[bank]).flatten(1), ds.y_train[bank], data.to_float(x).flatten(1))
        assert m['knn_labels'] == len(bank) and m['n'] == len(y) and close(m['knn'], (pred == y).double().mean())
        used = round(0.5 * (len(train) + len(val)))
        assert m['probe_labels'] <= used and m['probe'] > 0.9 and m['kmeans_acc'] > 0.9 and len(m['f1']) == 3


def test_no_label_is_bought_searched_or_learned_where_there_is_none():
    labelled = np.sort(np.random.default_rng(1).permutation(120)[:40])
    ds = partly_labelled(labelled)
    with folder() as cwd, mock.patch.object(data, 'load', lambda *_: ds):
        for method, pick in (*itertools.product(('classify',), ('random', 'coverage', 'balanced')),
                             ('query', 'random'), ('query', 'informative')):
            encoder = ['--encoder', finished('simclr')] if pick == 'informative' else ['--width', 0.1]
            flags = [w for w in tiny(method) if w not in ('--width', 0.1)] + encoder
            code, _, err = run(*flags, '--pick', pick, '--overwrite', cwd=cwd)
            assert code == 0, err
            paid = labels.LabelDatabase(cwd / 'runs' / method / 'labels.sqlite', None, 0, ds.digest)
            ids, y = paid.revealed()
            assert len(ids) == 15 and set(ids.tolist()) <= set(labelled.tolist())
            assert y.tolist() == ds.y_train[ids].tolist()
        refused(*tiny('classify'), '--labels', 41, '--name', 'x', cwd=cwd, said=['40'])
        refused(*tiny('query'), '--budget', 41, '--name', 'x', cwd=cwd, said=['40'])
        code, _, err = run(*tiny('classify'), '--labels', 0.5, '--name', 'half', cwd=cwd)
        assert code == 0 and measured(cwd / 'runs' / 'half')['labels'] == 20
        scores, knn = [], evaluate.knn
        def spy(x, y, h, *more, **kwargs):
            scores.append(int(y.min()))
            return knn(x, y, h, *more, **kwargs)
        with mock.patch.object(evaluate, 'knn', spy):
            code, _, err = run(*tiny('simclr'), '--name', 's', '--search', 1, '--over', 'tau=0.1:1', cwd=cwd)
        assert code == 0 and scores == [0, 0], err
        paid = labels.LabelDatabase(cwd / 'one.sqlite', ds.y_train.__getitem__, 9, ds.digest)
        missing = np.setdiff1d(np.arange(120), labelled)[0]
        with raises(ValueError, f'picture {missing} has no label'):
            paid.reveal([labelled[0], missing])
        assert paid.spent == 0


def test_pictures_without_labels_or_test_set_in_colour_and_odd_sizes_can_be_learned():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', x_train=pictures(60, 9, 13, C=3)[0])
        refused(*tiny('classify'), cwd=cwd, said=['needs labels'])
        for method in [*UNLABELLED, 'random', 'pixels', 'pca']:
            code, out, err = run(*tiny(method), cwd=cwd)
            assert code == 0 and not err, (method, err)
            m = measured(cwd / 'runs' / method)
            assert m['split'] == 'validation' and 'left out for want of labels: knn, probe, kmeans' in out
            assert m['left_out'] == ['knn', 'probe', 'kmeans'] and 'knn' not in m


def test_one_class_or_one_that_is_missing_is_learned_and_one_picture_is_refused():
    for y in 0, 5, None:
        with folder() as cwd:
            a = arrays(40, 20)
            for key in 'y_train', 'y_test':
                a[key] = a[key] * 2 if y is None else np.full_like(a[key], y)    # or 0, 2, 4: no 1, no 3
            write_npz(cwd / 'tiny.npz', **a)
            for method in cli.METHODS:
                if y == 0 and method == 'query':
                    refused(*tiny(method), cwd=cwd, said=['two classes'])
                    continue
                code, out, err = run(*tiny(method), cwd=cwd)
                assert code == 0 and not err and 'nan' not in out, (y, method, err)
            write_npz(cwd / 'tiny.npz', x_train=a['x_train'][:1])
            for method in cli.METHODS:
                refused(*tiny(method), '--name', 'x', cwd=cwd, said=['1 pictures', 'at least 20'])


def test_fewer_pictures_than_a_batch_and_a_last_batch_of_one_are_learned():
    with folder() as cwd:
        for n, batch, H in (20, 512, 8), (27, 8, 8), (27, 2, 8):
            x, y = pictures(n, H, H)
            write_npz(cwd / 'tiny.npz', x_train=x, y_train=y, x_test=x, y_test=y)
            for method in UNLABELLED:
                code, out, err = run(*tiny(method), '--batch-size', batch, '--overwrite', cwd=cwd)
                assert code == 0 and not err, (n, batch, method, err)
                assert len(logged(cwd / 'runs' / method)) == 2 and 'nan' not in out, (n, batch, method, out)
            for method in HEADED if batch > 8 else HEADED[1:]:            # classify takes 6,000 pictures an epoch
                flags = tiny(method, '--batch-size', batch, '--overwrite', '--name', 'few')
                code, out, err = run(*flags, *['--neighbours', 10 ** 9] * (method in ('cluster', 'scan')), cwd=cwd)
                assert code == 0 and not err and 'nan' not in out, (n, batch, method, err)
        for method in 'cluster', 'scan':
            refused(*tiny(method), '--clusters', 14, '--name', 'x', cwd=cwd, said=['14', '27'])
        write_npz(cwd / 'tiny.npz', x_train=x, x_test=x[:1])
        for more in [], ['--val', 1], ['--latent', 1]:                    # of rank 1 at most, but not collapsed
            code, out, err = run(*tiny('conv'), '--overwrite', *more, cwd=cwd)
            assert code == 0 and not err and 'nan' not in out and 'WARNING' not in out, (more, err, out)


def test_threads_heed_a_containers_quota_of_processor_time():
    threads = torch.get_num_threads()
    try:
        with folder() as f:
            for quota, wanted in ('max 100000', 3), ('250000 100000', 2), ('50000 100000', 1), ('800000 100000', 1), (
                    'nonsense', 1):
                torch.set_num_threads(3 if quota.startswith(('max', '25', '50')) else 1)
                (f / 'cpu.max').write_text(quota)
                train.heed_quota(f / 'cpu.max')
                assert torch.get_num_threads() == wanted, quota
            train.heed_quota(f / 'none')
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(threads)


def test_bfloat16_is_the_default_only_where_it_is_faster():
    cpu = torch.device('cpu')
    with folder() as f:
        for flags, wanted in (('avx512_bf16 amx_bf16 avx512_fp16', True), ('avx512f avx512_bf16', False), ('', False)):
            (f / 'cpuinfo').write_text(f'processor\t: 0\nflags\t\t: fpu {flags}\n')
            assert train.amp_by_default(cpu, f / 'cpuinfo') is wanted, flags
            assert not train.amp_by_default(torch.device('mps'), f / 'cpuinfo')
        assert not train.amp_by_default(cpu, f / 'none')                   # not Linux
    for card, wanted in ((9, 0), True), ((8, 0), True), ((7, 5), False):   # a T4 emulates it
        with mock.patch.object(torch.cuda, 'get_device_capability', lambda device, card=card: card):
            assert train.amp_by_default(torch.device('cuda')) is wanted


def test_a_macs_gpu_is_asked_for_by_name_and_gets_no_channels_last():
    assert nets.layout(torch.device('mps')) == torch.contiguous_format     # torch's gradients there were wrong
    assert nets.layout(torch.device('cuda:1')) == nets.layout(torch.device('cpu')) == torch.channels_last
    with mock.patch.object(torch.backends.mps, 'is_available', lambda: True), \
            mock.patch.object(torch.cuda, 'is_available', lambda: False):
        assert stages.pick_device(None).type == 'cpu'


def test_free_memory_heeds_a_containers_limit():
    if not Path('/proc/meminfo').exists():
        raise unittest.SkipTest('Linux tells its memory there')
    with folder() as f:
        def found(text):
            (f / 'memory.max').write_text(text)
            return data.free_memory(torch.device('cpu'), f / 'memory.max')
        assert found('4096') == 4096 and 1 << 20 < found('max') < 1 << 50 and found(str(1 << 60)) < 1 << 50


def test_memory_of_a_step_is_kept_for_the_next():
    if platform.libc_ver()[0] != 'glibc':
        raise unittest.SkipTest('mallopt is of glibc')
    script = ('import resource, sys, torch, train\n'
              'if sys.argv[1] == "keep": train.keep_memory()\n'
              'def step(): return [torch.ones(5 << 20) for _ in range(4)]\n'
              'step(), step(); before = resource.getrusage(0).ru_minflt\n'
              'for _ in range(10): step()\n'
              'print(resource.getrusage(0).ru_minflt - before)')
    faults = {word: int(python('-c', script, word).communicate()[0]) for word in ('keep', 'leave')}
    assert faults['keep'] < faults['leave'] / 4, faults


def test_a_step_of_each_method_leaves_no_tensor_behind_on_the_cpu():
    """On the meta device, which computes nothing but refuses to mix devices: what a GPU would stumble over."""
    x, x_l, y_l = (torch.empty(*shape, device='meta', dtype=dtype) for shape, dtype in (
        ((8, 1, 28, 28), torch.float32), ((20, 1, 28, 28), torch.uint8), ((20,), torch.int64)))
    def step(method, *flags):
        args = cli.parse(['--method', method, *flags])[0]
        args.encoder = None
        model = stages.network_of({'args': vars(args), 'data': {'shape': x.shape[1:], 'classes': range(10)}}, 'cpu')
        model, objective, batch = model.to('meta').train(), stages.objective_of(args), (x,)
        if method in ('query', 'scan'):
            objective = functools.partial(objective, labelled=lambda: (x_l, y_l))
        if method in ('classify', 'cluster'):
            batch = x, y_l[:8]
        loss, parts = objective(model, *batch, None)                      # without a generator: meta has none
        loss.backward()
        moved = [p for p in model.parameters() if p.requires_grad]
        assert loss.device.type == 'meta' and all(v.device.type == 'meta' for v in parts.values())
        assert moved and all(p.grad.device.type == 'meta' for p in moved), method
    for method, flags in itertools.product(('ae', 'conv', 'simclr', 'classify', 'query', 'cluster', 'scan', 'vae'), (
            (), ('--blur', '1', '--cutout', '0.3', '--noise', '0.1', '--jitter', '0.2', '--grey', '0.1'))):
        taken = [f for f in zip(flags[::2], flags[1::2]) if method in cli.PER_METHOD[f[0][2:]]]
        step(method, *itertools.chain(*taken), *(('--mixup', '0') if method in ('classify', 'cluster') else ()))
    for f in (lambda: evaluate.ssim(x, x), lambda: evaluate.most_similar(x.flatten(1), x_l.flatten(1), 3)[0],
              lambda: evaluate.knn(x_l.flatten(1), y_l, x.flatten(1), classes=10), lambda: losses.nt_xent(
                  x.flatten(1), x.flatten(1), 0.2), lambda: evaluate.nearest(x.flatten(1), x.flatten(1))[1]):
        assert f().device.type == 'meta'
    with mock.patch.object(data, 'cutout', lambda x, size, g: x * torch.rand(28, 28)), raises(RuntimeError, 'device'):
        step('simclr', '--cutout', '0.3')                                 # a tensor forgotten there is found


# report.py ---------------------------------------------------------------------------------------------------

def read_png(path):
    """Pixels (H, W) or (H, W, 3) of an 8-bit PNG whose rows are unfiltered; every CRC is checked."""
    blob, chunks, at = Path(path).read_bytes(), [], 8
    assert blob[:8] == bytes([137, 80, 78, 71, 13, 10, 26, 10])
    while at < len(blob):
        n, = struct.unpack('>I', blob[at:at + 4])
        kind, body, crc = blob[at + 4:at + 8], blob[at + 8:at + 8 + n], blob[at + 8 + n:at + 12 + n]
        assert struct.unpack('>I', crc)[0] == zlib.crc32(kind + body)
        chunks.append((kind, body))
        at += 12 + n
    assert [kind for kind, _ in chunks] == [b'IHDR', b'IDAT', b'IEND'] and not chunks[2][1]
    W, H, depth, colour, *rest = struct.unpack('>IIBBBBB', chunks[0][1])
    assert depth == 8 and colour in (0, 2) and rest == [0, 0, 0]
    stride = W * (3 if colour else 1)
    raw = zlib.decompress(chunks[1][1])
    assert len(raw) == H * (stride + 1) and not any(raw[::stride + 1])    # filter type 0 in front of every row
    pixels = np.array([list(raw[r * (stride + 1) + 1:(r + 1) * (stride + 1)]) for r in range(H)], np.uint8)
    return pixels.reshape(H, W, 3) if colour else pixels


def test_png_holds_the_pixels_it_was_given():
    rng = np.random.default_rng(0)
    with folder() as f:
        for shape in (1, 1), (5, 7), (5, 7, 3), (1, 300, 3):
            picture = rng.integers(0, 256, shape, np.uint8)
            for given in picture, np.asfortranarray(picture):
                report.write_png(f / 'x.png', given)
                assert np.array_equal(read_png(f / 'x.png'), picture)


def test_sheet_lays_rows_of_pictures_out_with_gaps():
    for C in 1, 3:
        a, b = rand(3, C, 4, 5), rand(2, C, 4, 5, seed=1) * 3 - 1         # b leaves 0..1 and is clipped
        out = report.sheet(a, b, gap=2, zoom=3)
        assert out.shape[:2] == (3 * (2 * 6 + 2), 3 * (3 * 7 + 2)) and out.dtype == np.uint8
        small = out[::3, ::3]
        assert np.array_equal(small.repeat(3, 0).repeat(3, 1), out)
        wanted = np.full(small.shape, 128)
        for r, row in enumerate((a, b)):
            for i, c, h, w in itertools.product(range(len(row)), range(C), range(4), range(5)):
                at = (2 + 6 * r + h, 2 + 7 * i + w)
                wanted[at if C == 1 else (*at, c)] = round(min(max(row[i, c, h, w].item(), 0), 1) * 255)
        assert np.array_equal(small, wanted)


def test_captions_are_the_numbers_under_enlarged_pictures():
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 9, 40), dtype=np.uint8))
    out = report.captioned(x, torch.tensor([17, 4]))
    assert out.shape == (2, 3, 3 * 9 + 14, 120) and torch.equal(out[:, :, 1:27:3, 2::3], x) and out.dtype == torch.uint8
    drawn = [''.join('.#'[int(v > 0)] for v in row) for row in out[0, 1, 27:, :20]][2:12:2]
    assert [row[2::2] for row in drawn] == ['.#..###..', '##....#..', '.#....#..', '.#....#..', '###...#..']


def test_show_views_writes_originals_above_two_views():
    with folder() as cwd:
        code, out, err = run('--show-views', cwd / 'v.png', '--data', home() / 'tiny.npz', '--jitter', 0)
        assert code == 0 and 'v.png' in out, err
        sheet, x = read_png(cwd / 'v.png')[::2, ::2], arrays()['x_train']
        assert sheet.shape == (3 * 12 + 2, 16 * 14 + 2)
        for i in range(16):
            cell = [sheet[2 + 12 * r:12 + 12 * r, 2 + 14 * i:14 + 14 * i] for r in range(3)]
            assert np.array_equal(cell[0], x[i]) and not np.array_equal(cell[1], cell[2])


def test_compare_groups_seeds_by_mean_and_sample_deviation():
    knn = [0.5, 0.7, 0.9]
    with folder() as f:
        for name, seed, tau, score in [(f'b-seed={s}', s, 0.5, k) for s, k in enumerate(knn)] + [('a', 0, 0.2, 0.25)]:
            (f / name).mkdir()
            runs.write_json(f / name / 'config.json', {'data': {'digest': 'abc'}, 'args': {
                'method': 'simclr', 'tau': tau, 'seed': seed, 'name': name}})
            runs.write_json(f / name / 'metrics.json', {'knn': score, 'epochs': 7, 'seconds': 10 * seed, 'mse': None})
        lines = report.table(report.compare([f / n for n in ('b-seed=0', 'a', 'b-seed=2', 'b-seed=1')])).splitlines()
        header, rows = lines[0], {line.split()[0]: line.split() for line in lines[1:]}
        mean, std = sum(knn) / 3, math.sqrt(sum((k - sum(knn) / 3) ** 2 for k in knn) / 2)
        assert close(std, statistics.stdev(knn))
        assert 'kNN' in header
        assert rows['b'] == ['b', '3', '7', '10', f'{mean:.1%}±{std * 100:.1f}']
        assert rows['a'][:2] == ['a', '1'] and '25.0%' in rows['a'] and len(rows) == 2
        with raises(ValueError, 'nothing'):
            report.compare([f / 'nothing'])
        with raises(ValueError, f'did you mean {f / "b-seed=1"}?'):
            report.compare([f / 'b-sed=1'])
        assert run('--compare', cwd=f)[1] == 'runs/ holds no finished run yet\n'
    code, out, _ = run('--compare', *map(finished, ('pixels', 'ae')))
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ['method', 'pixels', 'ae', '->']


# page.py, tsne.py --------------------------------------------------------------------------------------------

def read_page(path):
    """A page as a tree: it is well-formed, and nothing in it points out of it."""
    blob = Path(path).read_text()
    tree = xml.etree.ElementTree.fromstring(blob)
    for node in tree.iter():
        for key, value in node.attrib.items():
            if key in ('href', 'src'):
                assert value.startswith(('#', 'data:image/png;base64,')), (node.tag, value)
            assert not key.startswith('on'), (node.tag, key)
    assert not re.search(r'https?:|@import|url\((?!\$\{D\.sheet\})', blob)
    return tree


def words(tree):
    return ' '.join(' '.join(tree.itertext()).split())


def sections(tree):
    return [h.text for h in tree.iter('h2')]


def map_of(tree):
    """What the maps know: D of the page's script."""
    text, = (s.text for s in tree.iter('script') if s.text.startswith('window.D'))
    return json.loads(text.removeprefix('window.D = ').removesuffix(';'))


def embedded(source):
    """Pixels of a PNG inside a page."""
    with folder() as f:
        (f / 'x.png').write_bytes(base64.b64decode(source.removeprefix('data:image/png;base64,'), validate=True))
        return read_png(f / 'x.png')


def test_pages_are_well_formed_stand_alone_and_hold_what_each_method_has_to_show():
    drawn = {'reconstructions': 'Reconstructions', 'views': 'Views', 'samples': 'Samples',
             'interpolation': 'Interpolation'}
    for method in cli.METHODS:
        there, tree = finished(method), read_page(finished(method) / 'report.html')
        own = [title for stem, title in drawn.items() if (there / f'{stem}.png').exists()]
        assert sections(tree) == ['What was run'] + ['Training'] * (method in TRAINED) + own + [
            'Features in two dimensions', 'Confusion and F1 by class'] + [
            'Most confidently wrong'] * (method not in ('cluster', 'scan') and not perfect(there)) + (
            ['Labels paid for'] if method in ('classify', 'query') else ['Clusters']), (method, sections(tree))
        said = words(tree)
        assert runs.read_config(there)['command'] in said and torch.__version__ in said
        assert 'Measured on 40 test pictures' in said
        shown = [embedded(i.get('src')) for i in tree.iter('img')][:len(own)]
        assert all(np.array_equal(a, read_png(there / f'{stem}.png')) for a, stem in zip(
            shown, [stem for stem in drawn if (there / f'{stem}.png').exists()]))
        for drawing in tree, xml.etree.ElementTree.parse(there / 'confusion.svg').getroot():
            cells = [int(t.text) for t in drawing.iter() if t.get('class') == 'mid count']
            assert cells == list(itertools.chain(*measured(there)['confusion'])), method
        assert (there / 'iterations.svg').exists() == (method in ('cluster', 'scan'))
        tables = [[[c.text for c in tr] for tr in t.iter('tr')] for t in tree.iter('table')]
        if method in TRAINED:
            loss = [float(f'{row["loss"]:.5g}') for row in logged(there) if 'loss' in row]
            assert [float(row[1]) for row in tables[0][1:]] == loss and tables[0][0][:2] == ['epochs', 'training']
        assert len(list((there / 'report.html').read_text())) < 5e6


def perfect(there):
    confusion = np.array(measured(there)['confusion'])
    return np.trace(confusion) == confusion.sum()


def test_a_map_shows_the_picture_and_the_class_of_every_point():
    ds = data.load(home() / 'tiny.npz')
    known = map_of(read_page(finished('pixels') / 'report.html'))
    cells = embedded(known['sheet'])
    assert (known['w'], known['h'], len(known['words'])) == (12, 10, 40)
    order = ds.y_test.argsort(stable=True)                                # as the points stand, by class
    assert known['words'] == [f'{k}\npredicted {k}' for k in ds.y_test[order].tolist()]
    for i, picture in enumerate(ds.x_test[order, 0].numpy()):
        row, column = divmod(i, known['columns'])
        assert np.array_equal(cells[10 * row:10 * row + 10, 12 * column:12 * column + 12], picture)
    tree = read_page(finished('pixels') / 'report.html')
    maps = [card for card in tree.iter('svg') if card.find('circle') is not None]
    for h, card in zip((ds.x_test[order].flatten(1).float() / 255, None), maps):
        groups = [[(float(u.get('x')), float(u.get('y'))) for u in g] for g in card.iter('g')]
        assert [len(g) for g in groups] == torch.bincount(ds.y_test).tolist()
        if h is not None:                                                 # places are the components, in SVG's units
            y, at = evaluate.PCA(h, 2).encode(h).numpy(), np.array(sum(groups, []))
            assert all(abs(np.corrcoef(y[:, i], at[:, i])[0, 1]) > 1 - 1e-4 for i in (0, 1))
    big = torch.randint(0, 256, (3, 3, 96, 48), dtype=torch.uint8)
    assert page.shrink(big).shape == (3, 3, 24, 12) and page.shrink(big[:, :1]).shape == (3, 1, 32, 16)
    assert close(page.shrink(big)[0, 0, 0, 0], big[0, 0, :4, :4].float().mean() / 255)


def test_hostile_names_are_text_and_nothing_else():
    evil = '<script>alert(1)</script>&"\'</title>\x00\ud800]]>'
    there = finished('pixels')
    config, metrics = runs.read_config(there), runs.read_json(there / 'metrics.json')
    config['command'] = config['data']['name'] = config['args'][evil] = config['versions'][evil] = evil
    config['data']['classes'] = [evil] * 3
    x, y = torch.randint(0, 256, (30, 1, 10, 12), dtype=torch.uint8), torch.arange(30) % 3
    probs = torch.eye(3)[(y + 1) % 3]
    shown = {'x': x, 'y': y, 'h': randn(30, 4), 'probs': probs, 'clusters': y, 'centres': randn(3, 4),
             'mapping': {0: 0, 1: 1, 2: 2}, 'asked': (x[:2], [(0, 1, 0, None), (1, 2, 0, 1)], {0: (2, None)})}
    with folder() as f:
        evil_run = f / evil.replace('/', '').replace('\x00', '').replace('\ud800', '')
        evil_run.mkdir()
        runs.write_json(evil_run / 'config.json', config)
        runs.write_json(evil_run / 'metrics.json', metrics)
        (evil_run / 'log.jsonl').write_text('{"epoch": 1, "loss": 1.0, "val_loss": 2.0}\n')
        page.write(evil_run, config, metrics, shown, [evil] * 3)
        page.write_comparison(f / 'report.html', [evil_run])
        for path in evil_run / 'report.html', f / 'report.html':
            tree = read_page(path)
            assert 'alert(1)' in words(tree) and len(list(tree.iter('title'))) >= 1
            assert not any('alert' in (s.text or '') and not s.text.startswith('window.D') for s in tree.iter('script'))
            blob = path.read_text()
            assert '<script>alert' not in blob and blob.count('<script>') == blob.count('</script>') <= 2
        known = map_of(read_page(evil_run / 'report.html'))
        assert known['words'][0] == f'{evil}\npredicted {evil}'
        assert 'Most confidently wrong' in (evil_run / 'report.html').read_text()


def test_the_most_wrong_are_the_surest_of_the_wrong_and_members_belong_to_their_cluster():
    x = torch.arange(6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 1, 8, 8) * 40
    y = torch.tensor([0, 0, 1, 1, 0, 1])
    sure = torch.tensor([0.9, 0.6, 0.8, 0.7, 0.95, 0.55])
    guess = torch.tensor([1, 1, 0, 1, 0, 0])                              # wrong: 0, 1, 2 and 5
    probs = torch.where(torch.eye(2)[guess] > 0, sure[:, None], 1 - sure[:, None])
    html = page.most_wrong({'x': x, 'y': y, 'probs': probs}, {0: 'a', 1: 'b'}, n=3)
    tree = xml.etree.ElementTree.fromstring(html)
    assert [c.text for c in tree.iter('figcaption')] == [
        'a, taken for b, 90.0%', 'b, taken for a, 80.0%', 'a, taken for b, 60.0%']
    assert [embedded(i.get('src'))[0, 0] for i in tree.iter('img')] == [0, 80, 40]
    h = torch.tensor([[1, 0.0], [1, 0.1], [1, -0.3], [0, 1], [0.2, 1], [0.05, 1]])
    shown = {'x': x, 'y': y, 'h': h, 'clusters': torch.tensor([0, 0, 0, 1, 1, 1]), 'mapping': {0: 1},
             'centres': torch.tensor([[1.0, 0], [0.05, 1]])}
    tree = xml.etree.ElementTree.fromstring(page.clusters(shown, {0: 'a', 1: 'b'}, seed=0, n=3))
    assert [h3.text for h3 in tree.iter('h3')] == ['Cluster 0: b, 3 pictures', 'Cluster 1: no class, 3 pictures']
    seen = [int(embedded(i.get('src'))[0, 0]) // 40 for i in tree.iter('img')]
    assert seen[0] == 0 and seen[3] == 5 and set(seen[:3]) <= {0, 1, 2} and set(seen[3:]) <= {3, 4, 5}


def test_the_labels_paid_for_are_shown_in_their_order_with_the_estimates():
    there, ds = finished('query'), data.load(home() / 'tiny.npz')
    paid = labels.LabelDatabase(there / 'labels.sqlite', None, 0, ds.digest)
    tree = read_page(there / 'report.html')
    part = next(s for s in tree.iter('section') if s.find('h2').text == 'Labels paid for')
    seen = [embedded(i.get('src')) for i in part.iter('img')]
    ids, y = paid.revealed()
    assert all(np.array_equal(a, b) for a, b in zip(seen, ds.x_train[ids, 0].numpy())) and len(seen) == len(ids) == 15
    assert [c.text.split(',')[0] for c in part.iter('figcaption')] == [str(k) for k in y.tolist()]
    assert [b.text for b in part.iter('b')] == [str(n) for n in torch.bincount(y).tolist()]


def test_estimates_stand_at_the_labels_they_came_from():
    with folder() as f:
        paid = labels.LabelDatabase(f / 'labels.sqlite', lambda ids: [0] * len(ids), 100, 'digest')
        asked = [(range(10), None), (range(10, 40), 0.25), (range(40, 45), 0.5), ([], 0.75)]
        for r, (ids, estimate) in enumerate(asked):
            paid.reveal(ids, r, None, estimate)
        wanted = [(0, None), (10, 25), (40, 50), (45, 75)]
        assert page.estimates(paid.rounds(), paid.history()) == wanted
        runs.write_json(f / 'config.json', {'data': {'digest': 'digest'}, 'args': {'method': 'query', 'seed': 0}})
        page.write_comparison(f / 'report.html', [f])
        table = list(read_page(f / 'report.html').iter('table'))[1]
        assert [[float(c.text) for c in tr] for tr in table.find('tbody')] == [list(p) for p in wanted[1:]]


def test_estimates_count_no_skipped_question():
    with folder() as f:
        paid = labels.LabelDatabase(f / 'labels.sqlite', None, 100, 'digest')
        for r in range(3):
            paid.ask(range(4 * r, 4 * r + 4), r, estimate=r / 4 or None)
            for i in range(4):
                paid.answer(4 * r + i, 0 if i < 3 - r else None, r)       # 3, 2 and 1 of four
        assert page.estimates(paid.rounds(), paid.history()) == [(0, None), (3, 25), (5, 50)]


def test_comparison_writes_a_page_with_the_same_table_and_all_curves():
    with folder() as cwd:
        there = [finished(m) for m in ('ae', 'conv', 'simclr', 'classify', 'query')]
        code, out, err = run('--compare', *there, cwd=cwd)
        assert code == 0 and not err and out.endswith('-> runs/report.html\n')
        tree = read_page(cwd / 'runs' / 'report.html')
        rows = [[c.text for c in tr] for tr in next(tree.iter('table')).iter('tr')]
        assert rows == report.compare(there) and [r[0] for r in rows] == ['method', 'ae', 'conv', 'simclr', 'classify',
                                                                         'query']
        titles = [h.text for h in tree.iter('h3')]
        assert titles == ['Accuracy on the test set', 'Accuracy estimated from the answers'] + [
            f'Validation loss, {m}' for m in ('ae', 'conv', 'simclr')]
        write_npz(cwd / 'tiny.npz')
        assert run(*tiny('pixels'), cwd=cwd)[0] == 0                      # runs/* names the page too
        code, out, err = run('--compare', *sorted((cwd / 'runs').iterdir()), cwd=cwd)
        assert code == 0 and not err and out.splitlines()[1].startswith('pixels')


def test_comparison_draws_one_curve_over_labels_for_runs_that_differ_in_nothing_else():
    with folder() as f:
        for seed in 0, 1:
            for n in 100, 1000, 60000:
                for encoder in None, f'runs/simclr-seed={seed}':
                    there = f / f'{n}-{"b" if encoder else "a"}-seed={seed}'
                    there.mkdir()
                    runs.write_json(there / 'config.json', {'data': {'digest': 'abc'}, 'args': {
                        'method': 'classify', 'labels': n, 'seed': seed, 'name': there.name, 'encoder': encoder}})
                    runs.write_json(there / 'metrics.json', {'labels': n, 'accuracy': math.log10(n) / 10 + seed / 100
                                                             + 0.1 * bool(encoder)})
        page.write_comparison(f / 'report.html', sorted(f.iterdir()))
        table = list(read_page(f / 'report.html').iter('table'))[1]
        assert [c.text for c in table.find('thead').iter('th')] == ['labels paid for', 'classify from scratch',
                                                                   'classify from simclr']
        rows = [[float(c.text) for c in row] for row in table.find('tbody')]
        assert close(rows, [[n, 100 * (math.log10(n) / 10 + 0.005), 100 * (math.log10(n) / 10 + 0.105)]
                            for n in (100, 1000, 60000)], 1e-4)
        drawn = xml.etree.ElementTree.fromstring((f / 'accuracy.svg').read_bytes())
        places = [(float(u.get('x')), float(u.get('y'))) for u in drawn.iter() if u.tag.endswith('use')][:3]
        (x0, y0), (x1, y1), (x2, y2) = places                             # linear in log n is a straight line
        assert close((y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1), 0.01)
        marks = [t.text for t in drawn.iter() if t.tag.endswith('text') and t.get('class') == 'mid']
        assert marks == ['100', '300', '1000', '3000', '10000', '30000']


def test_a_run_without_labels_or_test_set_has_a_page_too():
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz', x_train=pictures(60, 9, 13, C=3)[0])
        for method, perplexity in ('ae', 30), ('pixels', 0):
            assert run(*tiny(method), '--perplexity', perplexity, cwd=cwd)[0] == 0
            tree = read_page(cwd / 'runs' / method / 'report.html')
            assert sections(tree)[-1] == 'Features in two dimensions' and 'Left out for want of labels' in words(tree)
            assert ('t-SNE' in words(tree)) == bool(perplexity)
        x, y = pictures(60)
        write_npz(cwd / 'tiny.npz', x_train=x, y_train=y)
        assert run(*tiny('query'), cwd=cwd)[0] == 0
        tree = read_page(cwd / 'runs' / 'query' / 'report.html')
        assert 'coloured by predicted class' in words(tree) and 'Labels paid for' in sections(tree)
        assert all(w.startswith('predicted') for w in map_of(tree)['words']) and len(map_of(tree)['words']) == 60


def test_axes_have_about_four_round_numbers_within_their_ends():
    for low, high in (0, 1), (-3.2, 17), (1e-5, 3e-4), (250.1, 251), (0.0009, 0.0011), (-1e6, 1e6):
        found = page.ticks(low, high)
        steps = np.diff(found)
        assert 3 <= len(found) <= 8 and low - 1e-9 <= found[0] and found[-1] <= high + 1e-9 * abs(high), found
        mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
        assert close(steps, np.full(len(steps), steps[0])) and min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-6
    assert page.chart('none', {'a': [(1, None), (2, math.nan)]}, 'x', 'y') == ''
    assert 'M' in page.chart('one', {'a': [(1, 5.0)]}, 'x', 'y')


def test_tsne_joint_probabilities_are_those_written_out_and_have_the_perplexity_asked_for():
    x, N = randn(12, 3), 12
    for perplexity in 2, 3.5:
        p = tsne.conditional(x, perplexity)
        for i in range(N):
            entropy = -sum(v * math.log2(v) for v in p[i].double().tolist() if v > 0)
            assert close(2 ** entropy, perplexity, 1e-3) and p[i, i] == 0 and close(p[i].sum(), 1)
            d = [(x[i] - x[j]).double().square().sum().item() for j in range(N)]
            near, far = sorted((j for j in range(N) if j != i), key=d.__getitem__)[:2]
            beta = math.log(p[i, near] / p[i, far]) / (d[far] - d[near])  # the width it found
            total = sum(math.exp(-beta * d[j]) for j in range(N) if j != i)
            assert close(p[i], [math.exp(-beta * d[j]) / total * (j != i) for j in range(N)], 1e-4)
        P = tsne.joint(x, perplexity)
        assert close(P, [[(p[i, j] + p[j, i]) / (2 * N) for j in range(N)] for i in range(N)]) and close(P.sum(), 1)


def test_tsne_gradient_is_that_of_the_divergence_written_out():
    P, y = tsne.joint(randn(9, 3), 2.0), randn(9, 2, seed=1).requires_grad_()
    q = [[1 / (1 + (y[i] - y[j]).square().sum()) if i != j else torch.zeros(()) for j in range(9)] for i in range(9)]
    total = sum(map(sum, q))
    loss = sum(P[i, j] * (P[i, j] / (q[i][j] / total)).log() for i in range(9) for j in range(9) if i != j)
    loss.backward()
    assert close(tsne.kl(P, y.detach()), loss.item(), 1e-4) and close(tsne.gradient(P, y.detach()), y.grad, 1e-4)


def test_tsne_lowers_the_divergence_and_separates_blobs_and_bears_equal_points():
    x, truth = blobs(90, 3, 10, spread=0.5)
    y, after = tsne.tsne(x, 10, steps=200)
    P = tsne.joint(x, 10)
    first = evaluate.principal(x)
    assert close(after, tsne.kl(P, y)) and after < 0.7 * tsne.kl(P, 1e-4 * first / first.std())
    d = torch.cdist(y, y).fill_diagonal_(torch.inf)
    assert (truth[d.argmin(1)] == truth).float().mean() > 0.95            # a stray point may stay behind; chance: 1/3
    assert torch.equal(y, tsne.tsne(x, 10, steps=200)[0])                 # nothing is drawn at random
    for N in 4, 30:
        y, after = tsne.tsne(torch.ones(N, 5), 30, steps=50)
        assert y.isfinite().all() and math.isfinite(after)


def test_principal_components_are_those_of_the_singular_value_decomposition_on_either_side():
    for N, D in (20, 6), (6, 20), (7, 7), (5, 1):
        h = randn(N, D) * torch.arange(1, D + 1)
        U, S, _ = np.linalg.svd((h - h.mean(0)).double().numpy(), full_matrices=False)
        wanted, found = (U * S)[:, :2], evaluate.principal(h)
        assert found.shape == (N, 2) and (D > 1 or not found[:, 1].any())
        assert close(found[:, :wanted.shape[1]].abs(), np.abs(wanted), 1e-3)


# board.py ----------------------------------------------------------------------------------------------------

class Board:
    """Stands in for torch's SummaryWriter and keeps what it was given."""

    def __init__(self, there):
        self.there, self.scalars, self.pictures, self.features = there, {}, {}, None
        Board.last = self
        there.mkdir()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def add_scalar(self, name, value, epoch):
        self.scalars[name, epoch] = value

    def add_image(self, name, picture, dataformats):
        assert len(dataformats) == picture.ndim and picture.dtype == np.uint8
        self.pictures[name] = picture

    def add_embedding(self, h, kind, x):
        self.features = h, kind, x


def test_tensorboard_gets_the_numbers_pictures_and_features_of_a_run_or_says_how_to_get_it():
    with folder() as cwd:
        done = finished('simclr')
        write_npz(cwd / 'tiny.npz', **arrays(H=12, C=3))
        y = [str(k) for k in arrays(H=12, C=3)['y_test']]
        with modules(torch_utils_tensorboard=None), mock.patch.object(data, 'load', side_effect=AssertionError('work')):
            refused(*tiny('ae', '--tensorboard'), cwd=cwd, said=['pip install tensorboard'])
            refused('--evaluate', done, '--tensorboard', cwd=cwd, said=['pip install tensorboard'])
        assert [p.name for p in cwd.iterdir()] == ['tiny.npz']
        for method, pngs in ('simclr', 'views'), ('vae', 'reconstructions samples interpolation'), ('scan', ''):
            there, more = cwd / 'runs' / method, ['--perplexity', 0]
            stand_ins = {'torch_utils_tensorboard': mock.Mock(SummaryWriter=Board), 'PIL': mock.Mock()}
            with modules(**stand_ins, PIL_Image=mock.Mock()):
                code, _, err = run(*tiny(method, '--tensorboard', *more), cwd=cwd)
                assert code == 0 and not err and (there / 'tensorboard').is_dir()
                first = Board.last
                assert run('--evaluate', there, '--tensorboard', *more, cwd=cwd)[0] == 0      # the same once more
            assert first.scalars.keys() == Board.last.scalars.keys() and first is not Board.last
            board, rows, m = Board.last, runs.read_log(there), runs.read_json(there / 'metrics.json')
            for row in rows:
                assert all(board.scalars[f'training/{k}', row['epoch']] == v for k, v in row.items()
                           if isinstance(v, float)), (row, board.scalars)
            wanted = {'simclr': 'knn', 'vae': 'ssim', 'scan': 'nmi'}[method]
            assert board.scalars[f'measured/{wanted}', m['epochs']] == m[wanted]
            assert {k.lower() for k in board.pictures} == set(pngs.split())
            for name, picture in board.pictures.items():
                assert np.array_equal(picture, read_png(there / f'{name.lower()}.png'))
            h, kind, x = board.features
            assert len(h) == len(kind) == len(x) == 40 and kind == y
        assert run(*tiny('simclr', '--overwrite', *more), cwd=cwd)[0] == 0
        assert not (cwd / 'runs' / 'simclr' / 'tensorboard').exists()


# bench.py ----------------------------------------------------------------------------------------------------

def test_the_benchmark_counts_what_ran_and_compares_with_an_older_one():
    with folder() as f:
        done = subprocess.run([sys.executable, HERE / 'bench.py', '--quick', '--json', f / 'a.json', 'NT-Xent, B = 512',
                               'NT-Xent, B = 1,024', 'NT-Xent, B = 2,048'], capture_output=True, text=True)
        kept, out = json.loads((f / 'a.json').read_text()), done.stdout
        rows = {row['part']: row for row in kept['rows']}
        assert done.returncode == 0 and not done.stderr and len(rows) == 5 and all(part in out for part in rows)
        product = rows['matrix product, float32']
        assert product['flops'] == 2 * 4096 ** 3 and close(product['amount'], 2 * 4.096 ** 3, 1e-6)
        assert rows['NT-Xent, B = 512']['flops'] == 3 * 2 * 1024 ** 2 * 128    # similarities, and twice their gradient
        rate, each = product['flops'] / product['seconds'][0], rows['NT-Xent, B = 2,048']['seconds'][0]
        share = f"{100 * 3 * 2 * 4096 ** 2 * 128 / each / rate:.0f} %"
        line = next(line for line in out.splitlines() if line.startswith('NT-Xent, B = 2,048'))
        assert share in line
        logs = [(math.log(n), math.log(rows[f'NT-Xent, B = {n:,}']['seconds'][0])) for n in (512, 1024, 2048)]
        power = (logs[2][1] - logs[0][1]) / (logs[2][0] - logs[0][0])         # least squares, for equal distances
        assert f'NT-Xent: from 512 to 2,048 time grows as size^{power:.2f}' in out
        then = [{**row, 'seconds': [s * (2 if 'product' in row['part'] else 6) for s in row['seconds']]}
                for row in kept['rows']]
        line = next(line for line in bench.compared(kept['rows'], then).splitlines() if line.startswith('NT-Xent'))
        assert line.split()[-2:] == ['0.17', '0.33']                      # on a machine twice as fast
        (f / 'a.json').write_text('{}')
        with contextlib.redirect_stderr(io.StringIO()) as err, raises(SystemExit, 2):
            bench.main(['--compare', str(f / 'a.json')])
        assert 'a.json was not written by --json' in err.getvalue()


# --list, --export, --predict ---------------------------------------------------------------------------------

def test_list_says_what_state_each_run_is_in():
    posix()
    with folder() as cwd:
        assert run('--list', cwd=cwd)[1] == 'runs/ holds no run yet\n' and not list(cwd.iterdir())
        shutil.copytree(finished('simclr'), cwd / 'runs' / 'done')
        shutil.copytree(finished('simclr'), cwd / 'runs' / 'half')
        shutil.copytree(finished('pca'), cwd / 'runs' / 'pca')
        (cwd / 'runs' / 'half' / 'metrics.json').unlink()
        half = (cwd / 'runs' / 'half' / 'log.jsonl')
        half.write_text(half.read_text().splitlines()[0] + '\n')
        (cwd / 'runs' / 'bad').mkdir()
        (cwd / 'runs' / 'bad' / 'config.json').write_text('[')
        before = {p: p.stat().st_mtime_ns for p in cwd.rglob('*')}
        code, out, err = run('--list', cwd=cwd)
        lines = dict(line.split(': ', 1) for line in out.splitlines())
        assert code == 0 and not err and list(lines) == ['runs/bad', 'runs/done', 'runs/half', 'runs/pca']
        assert lines['runs/half'] == 'stopped at epoch 1 of 2' and lines['runs/pca'] == 'finished'
        assert lines['runs/done'].startswith('finished after epoch 2 of 2, 0:0') and 'JSON' in lines['runs/bad']
        held = python('-c', f'import fcntl, sys; f = open({str(cwd / "runs/half/.lock")!r}); fcntl.flock(f, '
                      'fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()', stdin=subprocess.PIPE)
        try:
            held.stdout.readline()
            assert 'runs/half: running at epoch 1 of 2' in run('--list', cwd=cwd)[1]
        finally:
            held.communicate('')
        assert 'runs/half: stopped at epoch 1 of 2' in run('--list', cwd=cwd)[1]
        assert before == {p: p.stat().st_mtime_ns for p in cwd.rglob('*')}


def test_export_holds_the_features_of_all_pictures_with_what_labels_are_known():
    ds = data.load(home() / 'tiny.npz')
    every = torch.cat([ds.x_train, ds.x_test])
    for method in 'simclr', 'vae', 'pixels', 'pca', 'query', 'scan':
        code, out, err = run('--export', finished(method), 'e.npz')
        assert code == 0 and not err and 'e.npz' in out
        with np.load(home() / 'e.npz', allow_pickle=False) as z:
            e = dict(z)
        assert e['ids'].tolist() == [*range(120), *range(40)] and e['features'].dtype == np.float32
        train_ids, val_ids = data.split(120, 5000, 0)
        if method == 'pixels':
            assert close(e['features'], every.flatten(1).double() / 255)
        elif method == 'pca':
            x = data.to_float(every).flatten(1)
            assert close(e['features'], evaluate.PCA(x[:120][train_ids], 4).encode(x), 1e-4)
        elif method != 'query':
            model = stages.load_model(finished(method), runs.read_config(finished(method)), torch.device('cpu')).eval()
            assert close(e['features'], model.encode(data.to_float(every)))
        if method == 'query':
            ids, y = labels.LabelDatabase(finished(method) / 'labels.sqlite', None, 0, ds.digest).revealed()
            assert (e['labels'][:120] >= 0).sum() == 15 and e['labels'][ids.numpy()].tolist() == y.tolist()
        else:
            assert e['labels'][:120].tolist() == ds.y_train.tolist()
        validation = [] if method in ('query', 'scan') else val_ids.tolist()   # these learn from all
        assert np.flatnonzero(e['split'] == 'validation').tolist() == validation
        assert e['labels'][120:].tolist() == ds.y_test.tolist() and set(e['split'][120:]) == {'test'}
    refused('--export', 'runs/none', 'e.npz', said=['runs/none'])
    refused('--export', finished('simclr'), 'no/such/e.npz', said=['no/such'])


def test_predictions_are_those_of_the_model_for_npz_and_idx_files():
    x = pictures(30, seed=9)[0]
    with folder() as f:
        data.write_idx(f / 'x.idx', x)
        data.write_idx(f / 'x.gz', x)
        np.savez(f / 'x.npz', x=x, x_train=x[:0])
        np.savez(f / 'test.npz', x_test=x)
        np.savez(f / 'train.npz', x_train=x, x_test=x[:3])
        for method in 'classify', 'query':
            config, args, model, device = stages.reopen(finished(method), 'cpu')
            net, v = getattr(model, 'teacher', model).eval(), data.to_float(torch.from_numpy(x)[:, None])
            with torch.no_grad():                                     # the views by scipy, in pixels
                seen = [v, v.flip(3)]
                for dx, dy in itertools.product((-1, 1), repeat=2):
                    rows, cols = (0.96 * (np.arange(n) - (n - 1) / 2) + (n - 1) / 2 + d * 0.04 * n / 2
                                  for n, d in zip(v.shape[2:], (dy, dx)))
                    where = np.meshgrid(rows, cols[::-1] if dx != dy else cols, indexing='ij')
                    seen.append(torch.from_numpy(np.stack([scipy.ndimage.map_coordinates(
                        one[0].numpy(), where, order=1, mode='grid-constant') for one in v])[:, None]))
                probs = sum(net(one).softmax(1) for one in seen) / 6
            seen = set()
            for name in 'x.idx', 'x.gz', 'x.npz', 'test.npz', 'train.npz':
                code, out, err = run('--predict', finished(method), f / name)
                assert code == 0 and not err
                seen.add(out)
            rows = list(csv.reader(io.StringIO(out)))
            assert rows[0] == ['index', 'class', 'name', 'confidence'] and len(seen) == 1
            wanted = [[str(i), str(k), str(k)] for i, k in enumerate(probs.argmax(1).tolist())]
            assert [r[:3] for r in rows[1:]] == wanted
            assert close([float(r[3]) for r in rows[1:]], probs.max(1).values, 1e-4)
        np.savez(f / 'wide.npz', x=pictures(5, 12, 12)[0])
        np.savez(f / 'other.npz', y=x)
        (f / 'text').write_text('hello')
        for path, said in (f / 'wide.npz', '(1, 12, 12)'), (f / 'other.npz', 'x_test'), (f / 'text', '0x68656c6c'), (
                f / 'none', 'no file'), (f, 'no file'):
            refused('--predict', finished('classify'), path, said=[said])
        refused('--predict', finished('simclr'), f / 'x.npz', said=['no classifier'])
        refused('--predict', 'runs/none', f / 'x.npz', said=['runs/none'])


# README.md ---------------------------------------------------------------------------------------------------

def apply(diff, there):
    """Apply a unified diff to the files of a folder: the counts of its hunks are right, and what they change, with its
    context, is in one place of the file, whatever its line numbers."""
    for part in re.split(r'^--- a/', diff, flags=re.M)[1:]:
        path = there / part.split('\n')[0]
        hunks = re.split(r'^@@ -\d+,(\d+) \+\d+,(\d+) @@.*\n', part, flags=re.M)[1:]
        for *sizes, body in zip(*[iter(hunks)] * 3):
            lines = [line if line.strip() else ' \n' for line in body.splitlines(keepends=True)]
            old, new = ([line[1:] for line in lines if line[0] in ' ' + kind] for kind in '-+')
            assert [len(old), len(new)] == [int(n) for n in sizes], body
            assert path.read_text().count(''.join(old)) == 1, f'{path.name} has not once:\n{"".join(old)}'
            path.write_text(path.read_text().replace(''.join(old), ''.join(new)))


def test_each_change_that_the_readme_shows_is_small_applies_and_works():
    tour = re.findall(r'```diff\n(.*?)```\n+    python ssl.py (.*?)\n', (HERE / 'README.md').read_text(), re.S)
    small = '--epochs 1 --batch-size 60 --no-amp --perplexity 0'.split()
    more = {'vae': [*small, '--width', 0.1, '--latent', 4], 'simclr': small, 'pixels': ['--perplexity', 0],
            'barlow': [*small, '--width', 0.1]}
    with folder() as cwd, contextlib.ExitStack() as stack:
        write_npz(cwd / 'tiny.npz')
        (cwd / 'data' / 'kmnist').mkdir(parents=True)
        for key, name in data.IDX_NAMES.items():
            data.write_idx(cwd / 'data' / 'kmnist' / name, arrays(K=10)[key].astype(np.uint8))
        started = []
        for i, (diff, words) in enumerate(tour):
            changed = re.findall(r'^(?:[+](?![+][+])|-(?!--))', diff, re.M)
            assert 0 < len(changed) < 20, diff
            there = cwd / f'copy{i}'
            there.mkdir()
            for path in [*HERE.glob('*.py'), HERE / 'page.html']:
                shutil.copy(path, there)
            apply(diff, there)
            method = words.split()[1]
            source = [] if '--dataset' in words else ['--data', 'tiny.npz']
            started.append(python(there / 'ssl.py', *words.split(), *more[method], *source, '--name', method, cwd=cwd))
            stack.callback(started[-1].kill)
        for process in started:
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0 and not err, (process.args, err)
        def run_of(method):                                               # what is checked, with what is known here
            there = cwd / 'runs' / method
            return runs.read_config(there), measured(there), runs.read_log(there)
        x_val = data.to_float(data.load(cwd / 'tiny.npz').x_train[data.split(120, 5000, 0)[1]])
        g = data.generator('cpu', 0, 'val', 0)
        config, _, rows = run_of('vae')
        vae = stages.load_model(cwd / 'runs/vae', config, torch.device('cpu')).eval()
        with torch.no_grad():
            mean = torch.sigmoid(vae(x_val, g)[0])
        laplace = torch.distributions.Laplace(mean, 0.5).log_prob(x_val)
        assert close(rows[-1]['recon'], -laplace.flatten(1).sum(1).mean(), 1e-4)
        assert run_of('simclr')[1]['features'] == 256 and run_of('simclr')[0]['args']['net'] == 'convmixer'
        config, m, _ = run_of('pixels')
        assert config['data']['classes'] == 'o ki su tsu na ha ma ya re wo'.split() and m['features'] == 120
        config, m, rows = run_of('barlow')
        assert config['args']['crop'] == 0.3 and 'tau' not in config['args'] and m['epochs'] == 1
        net = nets.build('simclr', 'resnet', (1, 10, 12), 0.1).eval()
        net.load_state_dict(runs.load_checkpoint(cwd / 'runs/barlow/checkpoint.pt')['model'])
        views = data.augment(torch.cat([x_val, x_val]), data.Views(), data.generator('cpu', 0, 'val', 0))
        with torch.no_grad():
            z = net(views).double().numpy()
        c = np.corrcoef(z[:len(x_val)].T, z[len(x_val):].T)[:z.shape[1], z.shape[1]:]
        off = c - np.diag(np.diag(c))
        assert close(rows[-1]['val_loss'], ((1 - np.diag(c)) ** 2).sum() + 0.005 * (off ** 2).sum(), 1e-3)
        assert (cwd / 'runs/barlow/views.png').exists()


def test_the_code_of_the_notebook_runs_as_plain_python_and_its_pictures_are_inside():
    book, seen = json.loads((HERE / 'tour.ipynb').read_text()), []
    code = [''.join(cell['source']) for cell in book['cells'] if cell['cell_type'] == 'code']
    assert len(code) > 5 and all('outputs' in cell for cell in book['cells'] if cell['cell_type'] == 'code')
    stored = [out['data']['image/png'] for cell in book['cells'] for out in cell.get('outputs', ()) if 'data' in out]
    with folder() as cwd:
        for i, picture in enumerate(stored):
            (cwd / f'{i}.png').write_bytes(base64.b64decode(picture))
            assert read_png(cwd / f'{i}.png').std() > 10
        for key, name in data.IDX_NAMES.items():
            data.write_idx(cwd / name, arrays(200, H=14, W=14, K=10)[key].astype(np.uint8))
        space, out = {'__name__': '__main__'}, io.StringIO()
        with mock.patch.object(data, 'find_fashion_mnist', return_value=cwd), contextlib.redirect_stdout(out), \
                modules(IPython_display=None), \
                mock.patch.object(report, 'png', lambda picture, real=report.png: seen.append(real(picture))):
            for cell in code:
                exec(compile(cell, 'tour.ipynb', 'exec'), space)
    said = out.getvalue()
    by_hand, ours = map(float, re.search(r'by hand ([\d.]+), losses.nt_xent ([\d.]+)', said).groups())
    losses_said = [float(v) for v in re.findall(r'epoch \d: loss ([\d.]+)', said)]
    assert abs(by_hand - ours) < 1e-5 and losses_said[3] < losses_said[0] and losses_said[7] < losses_said[4]
    assert len(seen) == len(stored) == 4 and all(blob.startswith(b'\x89PNG') for blob in seen)
    assert re.search(r'SimCLR: 64 features, ACC [\d.]+, NMI', said) and re.search(r'autoencoder: MSE [\d.]+, SS', said)


def test_the_snippet_that_made_the_picture_of_the_readme_runs():
    code, = re.findall(r'```python\n(.*?)```', (HERE / 'README.md').read_text(), re.S)
    with folder() as cwd, inside(cwd), mock.patch.object(data, 'find_fashion_mnist', return_value=cwd):
        for method in 'conv', 'scan':
            shutil.copytree(finished(method), cwd / 'runs' / f'full-{method}-seed=0')
        for key, name in data.IDX_NAMES.items():
            data.write_idx(cwd / name, arrays()[key].astype(np.uint8))
        exec(compile(code, 'README.md', 'exec'), {})
        assert read_png(cwd / 'pictures.png').shape == (2 + 14 * 12, 2 + 20 * 14)
    assert read_png(HERE / 'pictures.png').shape == (2 + 14 * 30, 2 + 20 * 30)


# faults ------------------------------------------------------------------------------------------------------

def spoil(blob, rng):
    """The bytes with one fault: cut, lengthened, bits flipped, a stretch overwritten, cut out, moved or doubled."""
    blob, i, j = bytearray(blob), *sorted(rng.integers(0, len(blob) + 1, 2))
    fault = rng.integers(8)
    if fault == 0:
        return bytes(blob[:i])
    if fault == 1:
        return bytes(blob + rng.bytes(j - i))
    if fault == 2:
        return bytes(blob[:i] + blob[j:])
    if fault == 3:
        return bytes(blob[j:] + blob[:j])
    if fault == 4:
        blob[i:i + 4] = b'\xff' * len(blob[i:i + 4])
    elif fault == 5:
        blob[i:j] = rng.bytes(j - i)
    elif fault == 6:
        blob[i:j] = blob[i:j] * 2
    else:
        for k in rng.integers(0, len(blob), rng.integers(1, 4)):
            blob[k] ^= 1 << rng.integers(8)
    return bytes(blob)


STRANGE = [None, True, -1, 0.5, 1e299, 10 ** 40, '', 'x', '\0', '../x', [], {}, [[]], [None], {'x': 1}]


def strange_json(value, rng):
    """JSON of a dict in which one value, at any depth, is another, lacks or is new."""
    value = json.loads(json.dumps(value))
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        key = keys[rng.integers(len(keys))]
        if not (isinstance(at[key], (dict, list)) and at[key]) or rng.integers(3) == 0:
            break
        at = at[key]
    if rng.integers(4) == 0:
        del at[key]
    else:
        at[key] = STRANGE[rng.integers(len(STRANGE))]
    return json.dumps(value).encode()


def strange_databases(blob, path):
    """Label databases that are whole files, but hold what they must not."""
    values = "'x'", "x'ff'", '-1', '1e300', '9223372036854775807', '70000', "CAST(x'ff' AS TEXT)", '0.5'
    columns = {'queries': ('id', 'label', 'round', 'time', 'guess', 'confidence', 'agreed', 'audit'),
               'rounds': ('asked', 'estimate', 'round'), 'dataset': ('digest',), 'undone': ('id', 'label')}
    for statement in [f'UPDATE {table} SET {column} = {value} WHERE rowid = 1' for table in columns
                      for column in columns[table] for value in values] + [
            *(f'DROP TABLE {table}' for table in columns), 'ALTER TABLE queries RENAME COLUMN label TO other',
            'DROP TABLE rounds; CREATE VIEW rounds AS WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) '
            'SELECT i, i, i FROM n', 'CREATE TRIGGER t AFTER INSERT ON queries BEGIN DELETE FROM queries; END',
            'DELETE FROM dataset', 'PRAGMA user_version = 7', 'PRAGMA journal_mode = WAL']:
        path.write_bytes(blob)
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            with contextlib.suppress(sqlite3.IntegrityError):
                db.executescript(statement)
        yield path.read_bytes()
    path.unlink()


def formats_of_files(f, rng):
    """{format: (file, its contents as they should be, function that reads the file)} of all that comes from outside."""
    small = arrays(20, 4, H=8, W=8)
    idx_blobs = [idx(code, shape, idx_values(code, math.prod(shape))) for code, shape in
                 ((8, (3, 4, 5)), (0x0E, (2, 3)), (0x0B, (7,)), (8, ()))]
    yield 'IDX', f / 'fuzz', idx_blobs, data.read_idx
    yield 'IDX, gzipped', f / 'fuzz.gz', [gzip.compress(b) for b in idx_blobs], data.read_idx
    yield 'npz', f / 'fuzz.npz', [npz(**small), npz(packed=True, **small)], data.load
    plain = gzip.decompress(targz(('set/x.bin', np.random.default_rng(0).bytes(3000)),
                                  special('set', tarfile.DIRTYPE), ('../../y.bin', b'labels')))
    def unpacked(path):
        try:
            if not path.read_bytes().startswith(b'\x1f\x8b'):             # faults in the tar, too, not just around it
                path.write_bytes(gzip.compress(path.read_bytes(), 1))
            fetch.unpack(str(path), str(f / 'to'), {'x.bin': 4000, 'y.bin': 4000})
        finally:
            left = {p.name: p.stat().st_size for p in (f / 'to').iterdir()}
            assert set(left) <= {'x.bin', 'y.bin'} and max(left.values(), default=0) <= 4000
            for name in left:
                (f / 'to' / name).unlink()
    (f / 'to').mkdir()
    yield 'tar.gz', f / 'fuzz.tar.gz', [gzip.compress(plain), plain], unpacked
    for write, names in ((write_stl10, ('train_X.bin', 'train_y.bin', 'test_y.bin', 'class_names.txt',
                                        'fold_indices.txt')),
                         (write_cifar10, ('data_batch_10.bin', 'test_batch.bin', 'batches.meta.txt'))):
        there = f / write.__name__
        there.mkdir()
        write(there)
        for name in names:
            good = (there / name).read_bytes()
            yield f'{there.name[6:]} {name}', there / name, [good], lambda _, there=there: data.load(there)
            (there / name).write_bytes(good)
    runs.write_state(f / 'fuzz.pt', state())
    def checkpoint(path):
        assert runs.state_digest(runs.load_checkpoint(path)) == runs.state_digest(state())
    yield 'checkpoint', f / 'fuzz.pt', [(f / 'fuzz.pt').read_bytes()], checkpoint
    def database(path):
        paid = labels.LabelDatabase(path, lambda ids: [0] * len(ids), 99, 'abc', 1000, 3)
        ids, y = paid.revealed()
        assert ((0 <= ids) & (ids < 1000)).all() and ((0 <= y) & (y < 3)).all()
        paid.asked(), paid.history(), paid.tally(0), paid.last(1), paid.surprises(0)
        page.estimates(paid.rounds(), paid.history())
        with contextlib.suppress(sqlite3.Error):                          # of which recipes.main makes one sentence
            paid.reveal([5, 7], 3)
            paid.answer((paid.unanswered(1) or [8])[0], 1, 1)
            assert len(paid.revealed()[0]) >= 2
        paid.db.close()
    paid = labels.LabelDatabase(f / 'fuzz.sqlite', lambda ids: [i % 3 for i in ids], 99, 'abc')
    paid.reveal(range(30, 60), 0, [(1, 0.5, 1, 0)] * 30, 0.4)
    paid.ask([3, 4], 1)
    paid.answer(3, 1, 1), paid.undo(3, 1), paid.db.close()
    good = (f / 'fuzz.sqlite').read_bytes()
    yield 'label database', f / 'fuzz.sqlite', [good] * 99 + [*strange_databases(good, f / 'strange')], database
    for method in 'simclr', 'query':
        shutil.copytree(finished(method), there := f / method)
        config = json.loads((there / 'config.json').read_text())
        plain = {k: v for k, v in config.items() if k != 'sha256'}
        def again(path, there=there, plain=plain):
            runs.state(there)
            config, *_ = stages.reopen(there, 'cpu')
            with inside(home()), mock.patch.object(data, 'find', side_effect=ValueError('--data is missing')):
                stages.data_of(there, config)
            report.compare([there])
            assert config == plain or json.loads(path.read_text()).get('sha256') is None     # as an older run's
        yield f'config.json of {method}', there / 'config.json', [json.dumps(config).encode()] + [
            strange_json(of, rng) for of in (config, plain) for _ in range(20)], again
        runs.write_json(there / 'config.json', config)
        def compared(path, there=there):
            report.compare([there])
            page.write_comparison(f / 'page.html', [there])
            (f / 'page.html').unlink()
            (f / 'accuracy.svg').unlink(missing_ok=True)
            runs.state(there)
        good = json.loads((there / 'metrics.json').read_text())
        yield f'metrics.json of {method}', there / 'metrics.json', [json.dumps(good).encode()] + [
            strange_json(good, rng) for _ in range(20)], compared
        runs.write_json(there / 'metrics.json', good)
        rows = [json.loads(line) for line in (there / 'log.jsonl').read_text().splitlines()]
        yield f'log.jsonl of {method}', there / 'log.jsonl', [b'\n'.join(
            strange_json(row, rng) if rng.integers(2) else json.dumps(row).encode() for row in rows)
            for _ in range(20)], compared
    x = torch.from_numpy(pictures(20)[0])[:, None]
    paid = labels.LabelDatabase(f / 'answers', None, 9, 'abc')
    yield 'answers', f / 'fuzz.csv', [b'id,label\n1,cat\n2,dog\n\n19,1\n3,\n', b'"1","cat"\r\n2,0\r\n7,?\r\n'], (
        lambda path: oracle.File(paid, x, ('cat', 'dog'), path, f).read())


def fuzz(cases, seed=0):
    """{format: [files read, files refused]} of `cases` spoilt files of all formats, a few of them only strange. Asserts
    that nothing but a ValueError of one line comes, soon, in bounded memory, and that no file is left."""
    rng, counts = np.random.default_rng(seed), {}
    with folder() as f, contextlib.redirect_stderr(io.StringIO()):
        shares = {'IDX': 6, 'IDX, gzipped': 6, 'npz': 3, 'tar.gz': 4, 'checkpoint': 3, 'label database': 8,
                  'answers': 8}
        for kind, path, blobs, read in formats_of_files(f, rng):
            counts[kind], before, peak = [0, 0], None, memory()
            for case in range(max(1, cases * shares.get(kind, 1) // 52)):
                blob = blobs[case % len(blobs)]
                path.write_bytes(blob if rng.integers(4) == 0 else spoil(blob, rng))
                before, began = before or {p for p in f.rglob('*')}, time.monotonic()
                what = f'{kind}, seed {seed}, case {case}'
                try:
                    read(path)
                    counts[kind][0] += 1
                except ValueError as e:
                    named = any(name in str(e) for name in (path.stem, path.parent.name, '--data'))
                    assert '\n' not in str(e) and named, f'{what}: {e!r}'
                    counts[kind][1] += 1
                except Exception as e:
                    raise AssertionError(f'{what}: {e!r} instead of a ValueError') from e
                assert time.monotonic() - began < 20, f'{what} took too long'
                assert {p for p in f.rglob('*')} <= before, f'{what} left a file'
            assert memory() - peak < 500e6, f'{kind}: {memory() - peak:.0f} bytes of memory'
    return counts


def fuzz_long(cases):
    """Fuzz by a seed of the clock, 10,400 files at a time; prints what was tried, or the seed that finds a fault."""
    total, began = {}, time.monotonic()
    for seed in itertools.count(time.time_ns() % 10 ** 9):
        for kind, counts in fuzz(10_400, seed).items():
            total[kind] = [a + b for a, b in zip(counts, total.get(kind, (0, 0)))]
        if (done := sum(map(sum, total.values()))) >= cases:
            break
    print('\n'.join(f'{kind:<28} {read:>8,} read {refused:>8,} refused' for kind, (read, refused) in total.items()))
    print(f'{done:,} spoilt files, no fault, {time.monotonic() - began:.0f} s')
    return 0


def memory():
    """Most bytes that this process has had at once."""
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)


def test_small_files_that_ask_for_much_memory_are_refused_before_they_get_it():
    small = arrays(20, 4, H=8, W=8)
    laughs = [1.5]
    for _ in range(60):
        laughs = [laughs, laughs]                                         # 2 ** 60 numbers in a few bytes
    with folder() as f, mock.patch.object(data, 'free_memory', lambda _: 2e7):
        (f / 'a.npz').write_bytes(npz(packed=True, **{**small, 'x_train': np.zeros((30_000_000, 1, 1), np.uint8)}))
        (f / 'b.gz').write_bytes(gzip.compress(idx(8, (30_000_000,), []) + bytes(30_000_000)))
        for name, header in ('c', 10 ** 13), ('d', -1):
            with zipfile.ZipFile(f / f'{name}.npz', 'w') as z:
                text = repr({'descr': '|u1', 'fortran_order': False, 'shape': (header, 9, 9)}).ljust(117) + '\n'
                z.writestr('x_train.npy', b'\x93NUMPY\x01\0' + struct.pack('<H', 118) + text.encode())
        for name, value in ('e', torch.zeros(1).expand(10 ** 13)), ('f', laughs), ('g', torch.zeros(30_000_000)):
            torch.save({'x': value, 'digest': ''}, f / f'{name}.pt')
        with zipfile.ZipFile(f / 'g.pt') as z:
            parts = {i.filename: z.read(i) for i in z.infolist()}
        with zipfile.ZipFile(f / 'g.pt', 'w', zipfile.ZIP_DEFLATED) as z:
            for name, part in parts.items():
                z.writestr(name, part)
        (f / 'h.pt').write_bytes(b'\x80\x02cbuiltins\nbytearray\n\x8a\x05\0\0\0\0\x20\x85R.')        # of 128 GB
        parts = value = None
        for name in 'abcdefgh':
            path = next(f.glob(f'{name}.*'))
            before, began = memory(), time.monotonic()
            with raises(ValueError, path.name):
                {'.npz': data.load, '.gz': data.read_idx, '.pt': runs.load_checkpoint}[path.suffix](path)
            assert time.monotonic() - began < 5 and memory() - before < 30e6, (name, memory() - before)


def test_runs_broken_at_random_and_resumed_equal_their_unbroken_twins():
    posix()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = soak(0.15)
    assert code == 0 and 'runs differ or failed: 0 bytes lost' in out.getvalue(), out.getvalue()


def test_spoilt_files_of_every_format_are_read_or_refused_in_one_sentence():
    posix()
    counts = fuzz(10_400)
    assert sum(map(sum, counts.values())) >= 10_000
    assert all(read and (refused or 'log' in kind) for kind, (read, refused) in counts.items()), counts


# `--soak`: runs of every method are broken at random and resumed ---------------------------------------------------

FAULTS = ('SIGKILL', 'SIGTERM', 'SIGINT', 'SIGINT twice', 'disk full', 'damaged checkpoint', 'torn log', 'clock jumps')


def launch(words, cwd, fault=None, after=0.0, rng=None):
    """(exit code or minus the signal, what it said, seconds) of ssl.py in a forked process that suffers the fault."""
    sys.stdout.flush()
    began, pid = time.monotonic(), os.fork()
    if not pid:
        code = 1
        try:
            os.chdir(cwd)
            os.dup2(os.open('said', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(1, 2)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            data.HELD = rng and rng.choice([None, 0])                     # held in memory, or read batch by batch
            if fault == 'disk full':
                import resource
                resource.setrlimit(resource.RLIMIT_FSIZE, (int(10 ** rng.uniform(2, 5.3)),) * 2)
            if fault == 'clock jumps':
                real = time.time
                time.time = lambda: real() + rng.normal() * 1e9
                labels._now = lambda: f'{rng.integers(1000, 9999)}-01-01T00:00:00.000000+00:00'
            code = cli.main([str(w) for w in words])
        except SystemExit as e:
            code = e.code
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(code or 0)
    ended = 0
    if fault in FAULTS[:4]:
        time.sleep(after)
        for number in [getattr(signal, fault.split()[0])] * (1 + ('twice' in fault)):
            os.kill(pid, number)
            time.sleep(0.003)
    while not ended and time.monotonic() - began < 300:
        ended, status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.002)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status), (cwd / 'said').read_text(), time.monotonic() - began


def spoil_folder(there, fault, rng):
    """What the fault does to a run folder at rest; True if it could do anything."""
    paths = [there / name for name in runs.CHECKPOINTS if (there / name).exists()]
    if fault == 'damaged checkpoint':
        if len(paths) < 2:                                                # the only one: nothing to fall back to
            return False
        blob, at = paths[0].read_bytes(), int(rng.integers(100, 2000))
        paths[0].write_bytes(blob[:-at] if rng.integers(2) else blob[:at] + bytes([blob[at] ^ 64]) + blob[at + 1:])
    if fault == 'torn log' and there.exists():
        with open(there / 'log.jsonl', 'ab') as f:
            f.write([b'{"epoch": 2, "lo', b'\0' * 400, b'{"epoch": 9, "loss": NaN}\n'][rng.integers(3)])
    for path in there.glob('*') if fault == 'clock jumps' else ():
        os.utime(path, (int(rng.integers(0, 4e9)),) * 2)
    return True


def results(there):
    """{name: content without times} of all that a finished run leaves and that has to be the same."""
    found = {p.name: p.read_bytes() for p in there.iterdir() if p.suffix in ('.png', '.svg', '.csv', '.npz')}
    for path in there.glob('*.pt'):
        if path.name not in ('checkpoint.previous.pt', 'checkpoint.new.pt'):
            saved = {k: v for k, v in runs.load_checkpoint(path).items() if k != 'seconds'}
            found.update({f'{path.name}: {k}': runs.state_digest({k: v}).encode() for k, v in saved.items()})
    if (there / 'labels.sqlite').exists():
        with contextlib.closing(sqlite3.connect(there / 'labels.sqlite')) as db:
            found['labels.sqlite'] = repr([db.execute(f'SELECT {what} ORDER BY 1').fetchall() for what in (
                'number, id, label, round, guess, confidence, agreed, audit FROM queries', '* FROM rounds')]).encode()
    return {**found, 'log.jsonl': repr(logged(there)).encode(), 'metrics.json': repr(measured(there)).encode()}


def soak(minutes):
    """Break runs of every method at random for so long, resume each to its end, and compare it with its unbroken twin.
    Prints the figures; 1 if anything was lost."""
    seed = time.time_ns() % 10 ** 9
    print(f'seed {seed}', flush=True)
    rng, until, failures = np.random.default_rng(seed), time.monotonic() + 60 * minutes, []
    finished_runs = compared = 0
    survived, by_method, twins = dict.fromkeys(FAULTS, 0), {}, {}
    kinds = {**{m: tiny(m) for m in TRAINED}, 'conv, patience': tiny('conv', '--patience', 1, '--epochs', 4),
             'simclr, deterministic': tiny('simclr', '--deterministic'),
             'classify, sam': tiny('classify', '--sam', 0.1),
             'query, random': tiny('query', '--pick', 'random', '--closing', 1)}
    with folder() as cwd:
        write_npz(cwd / 'tiny.npz')
        run(*tiny('ae', '--name', 'warm'), cwd=cwd)          # what torch imports late is then there in each fork
        while time.monotonic() < until:
            kind = list(kinds)[rng.integers(len(kinds))]
            words, there = [*kinds[kind], '--name', 'r', '--resume', '--perplexity', 0], cwd / 'runs' / 'r'
            if kind not in twins:
                code, said, took = launch(words, cwd)
                assert code == 0, said
                twins[kind] = results(there), took, {p.name for p in there.iterdir()}
                shutil.rmtree(there)
            wanted, took, names = twins[kind]
            story = []
            for _ in range(rng.integers(1, 12)):
                fault = FAULTS[rng.integers(len(FAULTS))] if rng.integers(2) else 'SIGKILL'
                if not spoil_folder(there, fault, rng):
                    continue
                every = ['--save-every', [1e-9, 0.02, 60][rng.integers(3)]]
                code, said, _ = launch(words + every, cwd, fault, rng.uniform(0, 1.1 * took), rng)
                story.append((fault, code))
                fine = {'SIGKILL': [-9], 'SIGTERM': [-15, 130], 'SIGINT': [130], 'SIGINT twice': [130],
                        'disk full': [2]}.get(fault, [])
                if code not in [0, *fine] or 'Traceback' in said:
                    failures.append(f'{kind}: {story}: {said[-1500:]}')
                if code or fault in FAULTS[5:]:                           # else it came after the end
                    survived[fault] += 1
                    by_method[kind] = by_method.get(kind, 0) + 1
                if code == 0:
                    break
            code, said, _ = launch(words, cwd)
            if code:
                failures.append(f'{kind}: {story}: the last --resume ended with {code}: {said[-1500:]}')
            else:
                found = results(there)
                finished_runs, compared = finished_runs + 1, compared + sum(
                    (there / name.split(':')[0]).stat().st_size for name in {n.split(':')[0] for n in found})
                left = {p.name for p in there.iterdir()} - names - {'checkpoint.previous.pt'}
                if lost := sorted(n for n in {*wanted, *found} if wanted.get(n) != found.get(n)) or sorted(left):
                    failures.append(f'{kind}: {story}: {", ".join(lost)} is not as in its unbroken twin; look at what '
                                    'the last fault left behind')
            shutil.rmtree(there, ignore_errors=True)
    print('\n\n'.join(failures[:20]))
    print(f'{sum(survived.values()):,} faults in {finished_runs:,} runs, each resumed to its end: ' + ', '.join(
        f'{n:,} {fault}' for fault, n in survived.items()))
    print('by method: ' + ', '.join(f'{kind} {n:,}' for kind, n in by_method.items()))
    print(f'{compared:,} bytes of results compared with those of unbroken twins; {len(failures)} runs differ or failed'
          + ('' if failures else ': 0 bytes lost'))
    return 1 if failures else 0


# -------------------------------------------------------------------------------------------------------------

def main(words):
    if words[:1] in (['--fuzz'], ['--soak']):
        posix()
        return (fuzz_long if words[0] == '--fuzz' else soak)(float(words[1]) if words[1:] else 60)
    tests = {name: test for name, test in globals().items()
             if name.startswith('test_') and (not words or any(word in name for word in words))}
    if not tests:
        print(f'test_all.py: no test has {" or ".join(words)} in its name', file=sys.stderr)
        return 2
    passed = failed = 0
    for name, test in tests.items():
        began, error = time.monotonic(), None
        try:
            test()
            passed += 1
        except unittest.SkipTest as e:
            print(f'skipped {name}: {e}')
        except (Exception, SystemExit, Killed):
            failed, error = failed + 1, traceback.format_exc()
        took = time.monotonic() - began
        if error or took > 2:
            print(f'{"FAILED" if error else "slow  "} {took:5.1f} s  {name}\n{error or ""}', end='', flush=True)
    print(f'{passed} passed, {failed} failed')
    return 1 if failed else 0


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
