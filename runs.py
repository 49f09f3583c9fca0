"""The run folder: config.json, log.jsonl, checkpoint.pt, metrics.json, and a lock while a run is alive.

Every file is written whole beside its place and then renamed into it, so a kill at any moment leaves
either the old file or the new one.
"""
import difflib
import hashlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import sqlite3
import sys
import time
import zipfile
from contextlib import closing
from functools import partial
from pathlib import Path

import numpy as np
import scipy
import torch

import distributed

try:
    import fcntl
except ImportError:                                    # Windows has no flock; there, no lock is taken
    fcntl = None

HERE = {'name', 'resume', 'overwrite', 'device', 'save_every', 'perplexity', 'tensorboard'}    # how it is run, not what
CHECKPOINTS = ('checkpoint.new.pt', 'checkpoint.pt', 'checkpoint.previous.pt')      # newest first
MAY_CHANGE = ('epochs', 'answers', 'device', 'save_every', 'perplexity', 'tensorboard')            # on resume


def free(args):
    """Names of the arguments that may change on resume, or tell how it is run, not what; args: the run's. The --epochs
    of a clustering are the length of an iteration, and may not."""
    return HERE | set(MAY_CHANGE) - ({'epochs'} if 'iterations' in args else set())


def write_atomic(path, blob):
    """Write bytes to a temporary file in the same folder, fsync, rename. OSError leaves the old file."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with open(temporary, 'wb') as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, value):
    """Atomically, as strict JSON: a number that is not finite is written as null."""
    write_atomic(path, (json.dumps(_finite(value), indent=1) + '\n').encode())


def _finite(value):
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _parse(text):
    """Value of a JSON text; ValueError also for deep nesting and numbers no file of ours holds: nan, 1e999."""
    def number(text, kind=float):
        if not abs(value := kind(text)) < 1e300:
            raise ValueError(f'the number {text[:20]} in it')
        return value
    try:
        return json.loads(text, parse_float=number, parse_int=partial(number, kind=int), parse_constant=number)
    except RecursionError:
        raise ValueError('nested too deep') from None


def read_json(path):
    """Object in a JSON file; ValueError with one sentence if it is not one."""
    try:
        value = _parse(Path(path).read_text('utf-8'))
    except ValueError as e:                            # bad UTF-8, bad JSON, an endless number, deep nesting
        again = "; its run's command with --resume writes it anew" if Path(path).name == 'metrics.json' else ''
        raise ValueError(f'{path} is not readable JSON ({e}){again}') from None
    if not isinstance(value, dict):
        raise ValueError(f'{path} holds a {type(value).__name__}; wanted an object')
    return value


def flag(key, value):
    """How an argument is typed: ('batch_size', 64) -> '--batch-size 64', ('flip', False) -> '--no-flip'."""
    name = key.replace('_', '-')
    if isinstance(value, bool):
        return f'--{name}' if value else f'--no-{name}'
    words = [str(v) for v in (value if isinstance(value, (list, tuple)) else [value]) if v != '']
    return f'--{name} {shlex.join(words)}'


def describe(args, ds, device):
    """config.json: every argument, what data, which versions, where."""
    return {'args': args,
            'data': {'name': ds.name, 'digest': ds.digest, 'shape': ds.shape, 'train': len(ds.x_train),
                     'test': 0 if ds.x_test is None else len(ds.x_test), 'classes': ds.classes},
            'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                         'numpy': np.__version__, 'scipy': scipy.__version__},
            'machine': {'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device),
                        'system': platform.platform(), 'threads': torch.get_num_threads()},
            'command': shlex.join(['python', *sys.argv])}


def read_config(folder):
    """config.json of a run folder; ValueError with one sentence if it is not one."""
    path = Path(folder) / 'config.json'
    if not path.exists():
        others = [p.parent.name for p in Path(folder).parent.glob('*/config.json')]
        near = difflib.get_close_matches(Path(folder).name, others, 1)
        raise ValueError(f'{folder} is not a run folder: it has no config.json' + (
            f'; did you mean {Path(folder).with_name(near[0])}?' if near else ''))
    config = read_json(path)
    if config.pop('sha256', None) not in (None, _sha256(config)):          # older runs have none
        raise ValueError(f'{path} is damaged or was changed by hand: its content does not match its digest')
    args, pictures = config.get('args'), config.get('data')
    if not (isinstance(args, dict) and {'method', 'seed'} <= set(args)
            and isinstance(pictures, dict) and 'digest' in pictures):
        raise ValueError(f'{path} lacks the arguments or the data digest; was it written by ssl.py?')
    return config


def _sha256(config):
    return hashlib.sha256(json.dumps(_finite(config), sort_keys=True).encode()).hexdigest()


def _answered(path):
    """Does a label database hold an answer, or can't it be told?"""
    if not path.exists():
        return False
    try:
        with closing(sqlite3.connect(path)) as db:
            return bool(db.execute('SELECT count(time) FROM queries').fetchone()[0])
    except sqlite3.OperationalError as e:
        return 'no such table' not in str(e)
    except sqlite3.Error:
        return True


class Run:
    """One run folder, opened for writing and locked until the process ends."""

    def __init__(self, folder, config, typed=(), resume=False, overwrite=False):
        """config as from describe(); typed: names of the arguments that were typed. On resume the others
        come from the folder's config.json, and a typed one that differs from it is an error that names it."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        exists = (self.folder / 'config.json').exists()
        if exists and not (resume or overwrite):
            raise ValueError(f'{folder} exists; add --resume to continue it, --overwrite to start again, '
                             'or another --name')
        if exists and resume:
            old = read_config(self.folder)
            config = self._merge(old, config, typed)
            config = old if self.finished else config                        # the versions and machine that made it
        else:
            for old in ('log.jsonl', 'metrics.json', 'predictions.csv', 'predictions.npz', 'wanted.csv', 'report.html',
                        '*.png', '*.svg', '*.pt'):
                for path in self.folder.glob(old):
                    path.unlink()
            shutil.rmtree(self.folder / 'tensorboard', ignore_errors=True)
            aside = _answered(self.folder / 'labels.sqlite')                 # a person may have worked for hours on it
            for end in ('.sqlite', '.sqlite-journal'):
                now, before = self.folder / f'labels{end}', self.folder / f'labels.previous{end}'
                if aside and now.exists():
                    os.replace(now, before)
                else:
                    (before if aside else now).unlink(missing_ok=True)
        self.config = config
        write_json(self.folder / 'config.json', {**config, 'sha256': _sha256(config)})

    def _lock(self):
        if fcntl:
            self._held = open(self.folder / '.lock', 'w')        # noqa: SIM115 - held as long as the process
            try:
                fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ValueError(f'{self.folder} is in use by another process; wait for it or stop it') from None
            except OSError:                                                  # some shared folders know no locks
                pass

    def _merge(self, old, new, typed):
        before = old['args']
        for key in sorted(set(typed) - free(before)):
            if before.get(key) != new['args'][key]:
                may = ', '.join(flag(k, '').strip() for k in MAY_CHANGE if k in free(before))
                raise ValueError(f'{self.folder} was started with {flag(key, before.get(key))}, not '
                                 f'{flag(key, new["args"][key])}, which can not change on --resume; use another --name '
                                 f'({may} may change)')
        if old['data']['digest'] != new['data']['digest']:
            raise ValueError(f'{self.folder} was started on other data (its digest differs); use another --name')
        kept = {k: v for k, v in before.items() if k not in typed and k not in HERE}
        begun = {k: old[k] for k in ('encoder',) if k in old}                # what its network is, typed again or not
        return {**new, **begun, 'args': {**new['args'], **kept}}

    def withdraw(self):
        """Take back a folder in which nothing was learned or paid for yet, after a mistake that showed late."""
        if {p.name for p in self.folder.iterdir()} <= {'config.json', '.lock'}:
            for name in ('config.json', '.lock'):
                (self.folder / name).unlink(missing_ok=True)
            self.folder.rmdir()

    @property
    def finished(self):
        try:
            return read_json(self.folder / 'metrics.json') is not None
        except (ValueError, FileNotFoundError):        # torn: the run is measured again
            return False

    def log(self, row):
        """Append one line to log.jsonl."""
        with open(self.folder / 'log.jsonl', 'a') as f:
            f.write(json.dumps(_finite(row)) + '\n')
            f.flush()
            os.fsync(f.fileno())                       # before the checkpoint that counts this epoch as done

    def trim_log(self, epochs):
        """Drop rows after `epochs` finished epochs, and a torn last line: they will be written again."""
        rows = [row for row in read_log(self.folder) if row['epoch'] <= epochs]
        write_atomic(self.folder / 'log.jsonl', ''.join(json.dumps(row) + '\n' for row in rows).encode())

    def write_metrics(self, metrics):
        write_json(self.folder / 'metrics.json', metrics)

    def save(self, state):
        """Save a checkpoint; the one before it stays as checkpoint.previous.pt.

        Killed between the two renames, it is still there as checkpoint.new.pt.
        """
        path, new = self.folder / 'checkpoint.pt', self.folder / 'checkpoint.new.pt'
        write_state(new, state)
        if path.exists():
            os.replace(path, self.folder / 'checkpoint.previous.pt')
        os.replace(new, path)

    def load(self):
        return newest_checkpoint(self.folder)


def write_state(path, state):
    """Write a nested state of tensors and plain types, with its digest, atomically."""
    blob = io.BytesIO()
    torch.save({**state, 'digest': state_digest(state)}, blob)
    write_atomic(path, blob.getvalue())


def newest_checkpoint(folder):
    """State of the newest whole checkpoint or None; a damaged one is named and the one before it taken."""
    damaged = []
    for name in CHECKPOINTS:
        if (path := Path(folder) / name).exists():
            try:
                state = load_checkpoint(path)
            except ValueError as e:
                damaged.append(str(e))
            else:
                if damaged:
                    print(f'{damaged[0]}; the one before it is taken', file=sys.stderr)
                return state
    if damaged:
        raise ValueError(f'{damaged[0]}, and no whole one is left; start again with --overwrite')
    return None


def trained(rows):
    """The rows of a log that end an epoch; others tell of an assignment to clusters."""
    return [row for row in rows if 'loss' in row]


def state(folder):
    """One line about a run folder: running, finished, or stopped at which epoch, or what is wrong with it."""
    try:
        args, rows = read_config(folder)['args'], trained(read_log(folder))
    except ValueError as e:
        return str(e)
    of = f' of {args["epochs"]}' if 'epochs' in args and 'iterations' not in args else ''    # there it is of each
    at = f'epoch {rows[-1]["epoch"] if rows else 0}{of}'
    if (Path(folder) / 'metrics.json').exists():
        return 'finished' + (f' after {at}, {clock(rows[-1].get("seconds") or 0)}' if rows else '')
    return f'{"running" if locked(folder) else "stopped"} at {at}'


def locked(folder):
    """Is another process writing in this run folder?"""
    path = Path(folder) / '.lock'
    if not fcntl or not path.exists():
        return False
    with open(path) as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            pass
    return False


class Silent:
    """The run as the processes after the first see it: they know its folder and write nothing."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def nothing(self, *_):
        return None

    log = trim_log = save = load = withdraw = nothing


def state_digest(state, most=math.inf):
    """SHA-256 over every name, number and tensor of a nested state; ValueError beyond `most` bytes of them."""
    sha, size = hashlib.sha256(), 0
    def visit(value):
        nonlocal size
        size += value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 1
        if size > most:                                # a few bytes can stand for a terabyte, or name each other
            raise ValueError('it holds more than its size')
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                sha.update(f'{key}:'.encode())
                visit(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        elif isinstance(value, torch.Tensor):
            sha.update(f'{value.dtype}{tuple(value.shape)}'.encode())
            sha.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:
            assert value is None or isinstance(value, (str, int, float))
            sha.update(repr(value).encode())
    visit(state)
    return sha.hexdigest()


def load_checkpoint(path):
    """State saved by write_state, on the CPU. Only plain types and tensors are read (weights_only), so a hostile file
    runs nothing; ValueError, one sentence, when it is damaged."""
    try:
        size = Path(path).stat().st_size
        with zipfile.ZipFile(path) as z:               # torch stores without packing; what unpacks to more is a bomb
            assert sum(i.file_size for i in z.infolist()) <= size
        state = torch.load(path, map_location='cpu', weights_only=True)
        digest = state.pop('digest')
        whole = digest == state_digest(state, most=2 * size)
    except OSError:
        raise
    except Exception as e:                             # torch.load raises nearly any type on a damaged file
        raise ValueError(f'{path} is not a readable checkpoint ({type(e).__name__})') from None
    if not whole:
        raise ValueError(f'{path} is damaged: its content does not match its digest')
    return state


def read_log(folder):
    """Rows of log.jsonl up to the first line that is torn."""
    path, rows = Path(folder) / 'log.jsonl', []
    for line in path.read_text(errors='replace').splitlines() if path.exists() else []:
        try:
            row = _parse(line)
        except ValueError:
            break
        if not isinstance(row, dict) or not isinstance(row.get('epoch'), int) or not all(
                isinstance(v, (int, float, type(None))) for k, v in row.items() if k != 'sizes'):
            break
        rows.append(row)
    return rows


def default_name(method, deviations):
    """simclr-tau=0.5-seed=1: the method and what was typed differently from its defaults."""
    parts = [method] + [f'{k.replace("_", "-")}={v:g}' if isinstance(v, float) else f'{k.replace("_", "-")}={v}'
                        for k, v in deviations.items()]
    return re.sub(r'[^\w.=+-]+', '_', '-'.join(parts))[:150]


class Progress:
    """A live line on a terminal; nothing when output is redirected, where only say() prints."""

    def __init__(self, every=0.5):
        self.quiet = distributed.rank() > 0
        self.live, self.every, self.last, self.width = sys.stdout.isatty() and not self.quiet, every, 0.0, 0

    def due(self):
        """True when the live line wants an update: ask before computing what it shows."""
        return self.live and time.monotonic() - self.last >= self.every

    def show(self, text):
        self.last, pad = time.monotonic(), max(0, self.width - len(text))
        self.width = len(text)
        print('\r' + text + ' ' * pad, end='', flush=True)

    def say(self, text):
        """Print a line that stays."""
        if self.quiet:
            return
        self.clear()
        print(text, flush=True)

    def clear(self):
        """Take the live line away."""
        if self.live and self.width:
            print('\r' + ' ' * self.width + '\r', end='', flush=True)
            self.width = 0


def progress(what, total):
    """Function to be told how much of the total is done: on a terminal, from the second second on, it keeps a live
    line with the time left, and takes it away when all is done."""
    line, began = Progress(), time.monotonic()
    def at(done):
        took = time.monotonic() - began
        if done < total and done and took > 1 and line.due():
            line.show(f'{what}: {done / total:.0%}, {clock(took / done * (total - done))} left')
        elif done >= total:
            line.clear()
    return at


def clock(seconds):
    """75 -> '1:15', 4000 -> '1:06:40'."""
    m, s = divmod(int(seconds), 60)
    h, m = divmod(m, 60)
    return f'{h}:{m:02}:{s:02}' if h else f'{m}:{s:02}'
