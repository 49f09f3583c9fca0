"""A run folder: config.json, log.jsonl, checkpoint.pt, metrics.json; and how to open a finished one.

Every file is written whole beside its place and then renamed into it, so that a kill at any moment leaves
the old file or the new one.

    run = runs.open_run('runs/simclr')
    features = run.encode(images)              # uint8 (N, H, W) or (N, H, W, C)
"""
import argparse
import csv
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import scipy
import torch

import augment
import data
import features
import nets
from device import autocast, pick_device, set_deterministic

try:
    import fcntl
except ImportError:                                     # Windows has no flock; there, no lock is taken
    fcntl = None

# arguments that say how a run is made, not what it is: they may change on --resume
NOT_IN_IDENTITY = {'name', 'resume', 'overwrite', 'device', 'data', 'port', 'tensorboard', 'search'}
TABLES = 'wanted.csv', 'labels.csv', 'predictions.csv', 'clusters.csv'         # that a run writes
CHECKPOINTS = ('checkpoint.new.pt', 'checkpoint.pt', 'checkpoint.previous.pt')          # newest first


# -------------------------------------------------------------------------------------------- files

@contextmanager
def writing(path):
    """An OSError inside, which may not know what was written, gets the name of the file."""
    try:
        yield
    except OSError as e:
        raise OSError(e.errno, e.strerror, str(path)) from None


def write_atomic(path, blob):
    """Write bytes to a temporary file in the same folder, fsync, rename. OSError leaves the old file."""
    path = Path(path)
    temporary = path.with_name(path.name + '.tmp')
    try:
        with writing(path), open(temporary, 'wb') as f:
            f.write(blob)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def csv_text(header, rows):
    """A table as the text of a CSV file."""
    text = io.StringIO()
    csv.writer(text, lineterminator='\n').writerows([header, *rows])
    return text.getvalue()


def write_csv(path, header, rows):
    """Atomically, as UTF-8 on any system."""
    write_atomic(path, csv_text(header, rows).encode(errors='surrogateescape'))


def write_json(path, value):
    """Atomically; a number that is not finite is written as null."""
    write_atomic(path, (json.dumps(_finite(value), indent=1) + '\n').encode())


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path):
    """Object in a JSON file; ValueError with one sentence if it is not one."""
    with data.naming(path):
        value = json.loads(Path(path).read_text('utf-8'))
        if not isinstance(value, dict):
            raise ValueError(f'it holds a {type(value).__name__}; wanted an object')
    return value


def read_log(folder):
    """Rows of log.jsonl up to the first line that is torn."""
    path, rows = Path(folder) / 'log.jsonl', []
    lines = path.read_text('utf-8', errors='replace').splitlines() if path.exists() else []
    for line in lines:
        try:
            row = json.loads(line)
            row['epoch'] + 1
        except (ValueError, TypeError, KeyError, RecursionError):
            break
        rows.append(row)
    return rows


def trained(rows):
    """The rows of a log that end an epoch; the others tell of an assignment to clusters."""
    return [row for row in rows if 'loss' in row]


def read_config(folder):
    """config.json of a run folder; ValueError with one sentence if it is not one."""
    folder = Path(folder)
    path = folder / 'config.json'
    if not path.exists():
        others = sorted(str(p.parent) for p in folder.parent.glob('*/config.json'))
        raise ValueError(f'{folder} is not a run folder: it has no config.json; the runs there: '
                         f'{", ".join(others[:20]) or "none"}')
    config = read_json(path)
    try:
        found = config['args']['method'], config['args']['seed'], config['data']['digest']
    except (KeyError, TypeError):
        found = ()
    if [type(value) for value in found] != [str, int, str]:
        raise ValueError(f'{path} lacks the arguments or the data; was it written by ssl.py?')
    return config


def read_finished(folder):
    """config.json of a finished run; ValueError with one sentence if it is none."""
    config = read_config(folder)
    if not (Path(folder) / 'metrics.json').exists():
        raise ValueError(f'{folder} is not finished; continue it with its command and --resume')
    return config


def in_rounds(args):
    """Are the epochs of these arguments (a dict or a Namespace) those of one round or iteration?"""
    return 'rounds' in args or 'iterations' in args


def state(folder):
    """One line about an unfinished run: running, or stopped, at which epoch; or what is wrong with it."""
    folder = Path(folder)
    try:
        args, rows = read_config(folder)['args'], trained(read_log(folder))
    except (ValueError, OSError) as e:
        return str(e)
    of = f' of {args["epochs"]}' if 'epochs' in args and not in_rounds(args) else ''
    return f'{"running" if locked(folder) else "stopped"} at epoch {rows[-1]["epoch"] if rows else 0}{of}'


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
        except OSError:                                 # some shared folders know no locks
            pass
    return False


# ------------------------------------------------------------------------------------- checkpoints

def write_state(path, state):
    """Write a nested state of tensors and plain types atomically."""
    blob = io.BytesIO()
    torch.save(state, blob)
    write_atomic(path, blob.getvalue())


def load_checkpoint(path):
    """State saved by write_state, on the CPU. ValueError, one sentence, when it is damaged.

    Only plain types and tensors are read (weights_only), so that a hostile file runs nothing. torch's
    format is a zip without packing: each part has a checksum, and what unpacks to more than the file is
    refused.
    """
    with data.naming(path):
        with zipfile.ZipFile(path) as z:
            unpacked = sum(part.file_size for part in z.infolist())
            if unpacked > Path(path).stat().st_size or z.testzip():
                raise ValueError('the checkpoint is damaged')
        return torch.load(path, map_location='cpu', weights_only=True)


def newest_checkpoint(folder):
    """State of the newest readable checkpoint or None; a damaged one is named and the one before it taken."""
    damaged = []
    for path in (Path(folder) / name for name in CHECKPOINTS):
        if not path.exists():
            continue
        try:
            found = load_checkpoint(path)
        except ValueError as e:
            damaged.append(str(e))
            continue
        if damaged:
            print(f'{damaged[0]}; the one before it is taken', file=sys.stderr)
        return found
    if damaged:
        raise ValueError(f'{damaged[0]}, and no other is left; start again with --overwrite')
    return None


# ------------------------------------------------------------------------------- the folder of a run

def flag(key, value):
    """How an argument is typed: ('batch_size', 64) -> '--batch-size 64', ('flip', False) -> '--no-flip'."""
    name = key.replace('_', '-')
    if isinstance(value, bool):
        return f'--{name}' if value else f'--no-{name}'
    return f'--{name} {shlex.quote(str(value))}'


def default_name(method, changed):
    """simclr-temperature=0.5-seed=1: the method and the arguments that differ from its defaults."""
    parts = [method]
    for key, value in changed.items():
        parts.append(f'{key.replace("_", "-")}={f"{value:g}" if isinstance(value, float) else value}')
    name = re.sub(r'[^\w.=+-]+', '_', '-'.join(parts))
    return name.encode()[:150].decode(errors='ignore')          # file systems allow 255 bytes


def config_of(args, ds, device):
    """config.json: every argument, what data, which versions, where."""
    return {
        'args': args,
        'data': {'name': ds.name, 'digest': ds.digest, 'shape': ds.shape, 'classes': ds.classes,
                 'ids': ds.ids, 'train': len(ds.x_train), 'test': 0 if ds.x_test is None else len(ds.x_test)},
        'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                     'numpy': np.__version__, 'scipy': scipy.__version__},
        'machine': {'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else str(device),
                    'system': platform.platform(), 'threads': torch.get_num_threads()},
        'command': shlex.join(['python', *sys.argv])}


class Run:
    """One run folder, opened for writing and locked until the process ends."""

    def __init__(self, folder, config, typed=(), resume=False, overwrite=False):
        """config: as from config_of(). typed: names of the arguments that were typed; on resume one that
        differs from the folder's config.json is an error that names it."""
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        exists = (self.folder / 'config.json').exists()
        if exists and not (resume or overwrite):
            raise ValueError(f'{folder} exists; add --resume to continue it, --overwrite to start again, '
                             'or another --name')
        if exists and resume:
            old = read_config(self.folder)
            self._check_same(old, config, typed)
            config = {**old, 'args': config['args']}            # the versions and machine that began it
        else:
            self._clear()
        self.config = config
        write_json(self.folder / 'config.json', config)

    def _lock(self):
        if not fcntl:
            return
        self._lock_file = open(self.folder / '.lock', 'w')      # noqa: SIM115 - open as long as the process
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f'{self.folder} is in use by another process; wait for it or stop it') from None
        except OSError:                                         # some shared folders know no locks
            pass

    def _check_same(self, old, new, typed):
        before = old['args']
        for key in sorted(set(typed) - NOT_IN_IDENTITY):
            if key == 'oracle' and not {'data', 'web'} & {before.get(key), new['args'][key]}:
                continue                                        # a CSV may move
            if before.get(key) != new['args'][key]:
                raise ValueError(f'{self.folder} was started with {flag(key, before.get(key))}, not '
                                 f'{flag(key, new["args"][key])}, which can not change on --resume; '
                                 'use another --name')
        if old['data']['digest'] != new['data']['digest']:
            raise ValueError(f'{self.folder} was started on other data (its digest differs); '
                             'use another --name')

    def _clear(self):
        """Delete what an earlier run left. Labels that a person gave are put aside under a number."""
        try:
            from_data = read_config(self.folder)['args'].get('oracle') == 'data'
        except ValueError:                                      # no run, or one that can't be read
            from_data = False
        number = 1
        while (self.folder / f'labels.{number}.sqlite').exists():
            number += 1
        for path in self.folder.glob('labels.sqlite*'):         # its journal, if there is one, belongs to it
            if from_data:
                path.unlink()
            else:
                aside = path.with_name(path.name.replace('labels', f'labels.{number}', 1))
                os.replace(path, aside)
                print(f'the labels given before are kept in {aside}')
        for pattern in 'log.jsonl', 'metrics.json', 'report.html', *TABLES, '*.png', '*.pt':
            for path in self.folder.glob(pattern):
                path.unlink()
        shutil.rmtree(self.folder / 'tensorboard', ignore_errors=True)

    @property
    def finished(self):
        try:
            return read_json(self.folder / 'metrics.json') is not None
        except (ValueError, FileNotFoundError):                 # torn: the run is measured again
            return False

    def log(self, row):
        """Append one line to log.jsonl."""
        path = self.folder / 'log.jsonl'
        with writing(path), open(path, 'a') as f:
            f.write(json.dumps(_finite(row)) + '\n')
            f.flush()
            os.fsync(f.fileno())                                # before the checkpoint that counts this epoch

    def trim_log(self, epochs):
        """Drop rows after `epochs` finished epochs, and a torn last line: they will be written again."""
        rows = [row for row in read_log(self.folder) if row['epoch'] <= epochs]
        write_atomic(self.folder / 'log.jsonl', ''.join(json.dumps(row) + '\n' for row in rows).encode())

    def write_metrics(self, metrics):
        """metrics.json, which makes the run a finished one."""
        write_json(self.folder / 'metrics.json', metrics)

    def save(self, state):
        """Save a checkpoint; the one before it stays. Killed between the renames, this one is still there."""
        path, new = self.folder / 'checkpoint.pt', self.folder / 'checkpoint.new.pt'
        write_state(new, state)
        if path.exists():
            os.replace(path, self.folder / 'checkpoint.previous.pt')
        os.replace(new, path)

    def load(self):
        """The newest readable checkpoint or None."""
        return newest_checkpoint(self.folder)


class SilentRun:
    """The run as the processes after the first see it: they know its folder and write nothing."""

    def __init__(self, folder):
        self.folder = Path(folder)

    def log(self, *_):
        return None

    trim_log = save = load = log


# --------------------------------------------------------------------------------- networks of runs

def net_of(config):
    """(--net, --width) of a config.json; of one with an encoder, those of that."""
    while 'encoder' in config:
        config = config['encoder']
    return config['args']['net'], config['args']['width']


def build(config, encoder=None):
    """The network of a config.json, initialised by its seed; encoder: a trained one to start from."""
    args, shape = config['args'], config['data']['shape']
    torch.manual_seed(args['seed'])
    if 'encoder' not in args:
        return nets.build(args['method'], args.get('net'), shape, args.get('width'), args.get('latent'),
                          bool(args.get('recon')))
    if encoder is None and 'encoder' in config:
        encoder = nets.encoder_of(build(config['encoder']))
    K = args['clusters'] if 'clusters' in args else len(config['data']['classes'])
    if args['method'] == 'scan':
        N = config['data']['train']
        return nets.NeighbourVote(encoder, torch.zeros(N, encoder.dim), torch.zeros(N, K))
    if encoder is None:
        encoder = nets.Encoder(args['net'], shape, args['width'])
    torch.manual_seed(args['seed'])                             # the same head, whatever the encoder
    model = nets.Classifier(encoder, K, args['freeze'])
    return nets.MeanTeacher(model) if args['method'] == 'query' else model


def initial_model(config, device):
    """The network that a run starts from: fresh, or with the trained encoder of the run --encoder."""
    encoder = None
    if config['args'].get('encoder'):
        encoder = nets.encoder_of(start_network(config, device).model)
    return build(config, encoder).to(device, memory_format=nets.layout(device))


def start_network(config, device):
    """The finished run --encoder, opened; without one a network whose features are the pixels."""
    folder = config['args'].get('encoder')
    if folder:
        return open_run(folder, device)
    return Network(config, nets.Pixels(), device)


class Network:
    """A network with what is needed to use it: config as in config.json. What open_run gives."""

    def __init__(self, config, model, device, folder=None):
        self.config, self.model, self.device, self.folder = config, model.eval(), device, folder
        self.args = argparse.Namespace(**config['args'])
        self.amp = bool(getattr(self.args, 'amp', False))

    def encode_batch(self, x):
        """Float images (B, C, H, W) in 0..1 -> features (B, D) float32."""
        with autocast(self.device, self.amp):
            return self.model.encode(x).float()

    def reconstruct_batch(self, x):
        """Float images (B, C, H, W) in 0..1 -> their reconstructions."""
        with autocast(self.device, self.amp):
            return self.model.decode(self.model.encode(x)).float()

    def predict_batch(self, x):
        """Float images (B, C, H, W) -> class probabilities (B, K), a mean over augment.fixed_views."""
        crop, flip = getattr(self.args, 'crop', 1) < 1, getattr(self.args, 'flip', False)
        probs = []
        for view in augment.fixed_views(x, crop, flip):
            with autocast(self.device, self.amp):
                logits = self.model(view)
            probs.append(logits.float().softmax(1))
        return torch.stack(probs).mean(0)

    def encode(self, images, ids=None):
        """Features (N, D) of uint8 images (N, H, W), (N, H, W, C) or (N, C, H, W); ids: of these rows."""
        return features.in_chunks(self.encode_batch, self._checked(images), ids=ids, device=self.device)

    def predict(self, images):
        """Class or cluster probabilities (N, K) of uint8 images; ValueError for a run without classes."""
        if not isinstance(self.model, (nets.Classifier, nets.MeanTeacher, nets.NeighbourVote)):
            raise ValueError(f'{self.folder} has no classes: it is a run of --method {self.args.method}; '
                             'wanted one of classify, query, scan or cluster')
        return features.in_chunks(self.predict_batch, self._checked(images), device=self.device)

    def _checked(self, images):
        shape = tuple(self.config['data']['shape'])
        tensor = isinstance(images, torch.Tensor)
        if tensor and (images.dtype != torch.uint8 or images.ndim == 3 or images.shape[3] in (1, 3)):
            images = images.cpu().numpy()
        if isinstance(images, np.ndarray):
            images = data.to_images('the array', images, 1)
        if tuple(images.shape[1:]) != shape:
            raise ValueError(f'the images are {tuple(images.shape[1:])}, and {self.folder or "this run"} was '
                             f'trained on {shape} (channels, height, width)')
        return images


def open_run(folder, device=None):
    """The network of a finished run, as trained: a Network with encode and predict.

    ValueError, one sentence, if the folder holds no finished run or its files don't fit each other.
    """
    config = read_finished(folder)
    set_deterministic(bool(config['args'].get('deterministic')))
    device = pick_device(device) if device is None or isinstance(device, str) else device
    best = Path(folder) / 'best.pt'                     # of cluster; the others have only the last
    state = load_checkpoint(best) if best.exists() else newest_checkpoint(folder)
    if state is None:
        raise ValueError(f'{folder} has no checkpoint; train it again with --overwrite')
    try:
        model = build(config)
        model.load_state_dict(state['model'])
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, RuntimeError) as e:
        reason = ' '.join(str(e).split())[:200]
        raise ValueError(f'{folder}: its checkpoint does not fit its config.json ({reason})') from None
    return Network(config, model.to(device, memory_format=nets.layout(device)), device, Path(folder))


def encoder_config(folder, shape):
    """The part of a finished run's config.json that says what its encoder is; ValueError if it has none."""
    config = read_finished(folder)
    if tuple(config['data']['shape']) != tuple(shape):
        raise ValueError(f'--encoder {folder} was trained on images {tuple(config["data"]["shape"])}, '
                         f'and the data has {tuple(shape)}')
    if config['args']['method'] in ('pixels', 'pca'):
        raise ValueError(f'--encoder {folder} holds no encoder: it is a run of '
                         f'--method {config["args"]["method"]}')
    return {key: config[key] for key in ('args', 'data', 'encoder') if key in config}
