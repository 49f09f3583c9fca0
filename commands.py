"""What ssl.py is asked to do: train a method and measure it, and what can be done with finished runs."""
import argparse
import io
import math
import sys
from pathlib import Path

import numpy as np
import torch

import cluster
import data
import distributed
import pretrain
import query
import report
import runs
import train
from device import amp_by_default, pick_device, prepare_cpu, set_deterministic

NO_MEMORY = ('out of memory', "can't allocate memory", 'not enough memory', 'bad_alloc')     # torch's words
# Steps of the optimizer, at least, in so many epochs; with fewer, little is learned.
LEAST_STEPS = {**dict.fromkeys(('ae', 'conv', 'vae', 'simclr'), {'epochs': 500}), 'cluster': {'epochs': 100},
               'query': {'epochs': 50, 'decay_epochs': 200}}
MODULES = {'classify': query, 'query': query, 'cluster': cluster, 'scan': cluster}      # all others: pretrain


def main(args, typed, defaults):
    """Do what the arguments ask for; returns the exit code. ValueError, OSError: what a user can mend."""
    try:
        if args.tensorboard:
            report.tensorboard_writer()                         # if it is missing, now rather than later
        run_command(args, typed, defaults)
    except train.Stopped as e:
        if distributed.rank() == 0:
            print(f'{e}; saved. Type the same command with --resume to continue.')
        return 130
    except (RuntimeError, MemoryError) as e:
        raise advice(e) from None
    except (LookupError, TypeError, AttributeError, ArithmeticError) as e:
        folder = args.evaluate or (args.export or args.predict or [''])[0]
        if not folder:
            raise
        raise ValueError(f'{folder} can not be used: does its config.json fit it? ({e!r})') from e
    return 0


def advice(e):
    """An error of torch that a user can do something about as a ValueError; any other as it is."""
    if 'deterministic implementation' in str(e):
        return ValueError(f'--deterministic can not be had: {str(e).split(". ")[0]}')
    if isinstance(e, MemoryError) or any(words in str(e) for words in NO_MEMORY):
        return ValueError('out of memory; try a smaller --batch-size, --width or --limit')
    if distributed.world() > 1 and 'peer' in str(e):
        return ValueError('another process has ended; --resume continues from the last checkpoint')
    return e


def run_command(args, typed, defaults):
    if args.compare is not None:
        compare(args.compare)
    elif args.evaluate:
        evaluate(args)
    elif args.export:
        export(*args.export, args=args)
    elif args.predict:
        predict(*args.predict, args=args)
    elif args.show_views:
        show_views(args, typed)
    else:
        args.name = args.name or run_name(args.method, typed, defaults)
        if args.search:
            search(args, typed)
        else:
            train_and_measure(args, typed)
        distributed.stop()


# ------------------------------------------------------------------------------------------ training

def run_name(method, typed, defaults):
    """Name of a run: its method and the arguments that differ from the defaults, or could on some data."""
    changed, fitted = {}, {*defaults.get('on_colour', {}), 'batch_size', *LEAST_STEPS.get(method, {})}
    for key, value in typed.items():
        in_name = key == 'data' or key not in runs.NOT_IN_IDENTITY | {'method'}
        if in_name and (key in fitted or value != defaults[key]):
            is_path = key in ('data', 'encoder', 'oracle')
            changed[key] = Path(value).name.removesuffix('.npz') if is_path else value
    return runs.default_name(method, changed)


def start_device(args):
    """The device of this process, set up; joins the other processes, if there are any."""
    set_deterministic(args.deterministic)
    prepare_cpu()
    return distributed.start(pick_device(args.device))


def load_data(args):
    classes = args.classes.split(',') if getattr(args, 'classes', None) else None
    return data.load(args.data, args.limit, classes, args.size)


def train_and_measure(args, typed):
    """One run from the first byte to metrics.json; returns the score if it is a trial of --search."""
    folder, module = Path('runs') / args.name, MODULES.get(args.method, pretrain)
    resumed = args.resume and (folder / 'config.json').exists()
    if resumed:
        args = continued(args, typed, folder)
    device = start_device(args)
    ds = load_data(args)
    if not resumed:
        fit_to_colour(args, typed, ds)
        fit_to_size(args, typed, ds)
        module.check(args, ds)                                  # before --overwrite deletes the old run
    vars(args).pop('on_colour', None)
    run = open_run_folder(folder, args, typed, ds, device)
    args = argparse.Namespace(**run.config['args'])             # the same on every rank
    if run.is_finished:
        if not args.search:
            print(f'{run.folder} is already finished; --evaluate {run.folder} measures it again')
            return
        score = runs.read_json(run.folder / 'metrics.json').get('score')
        if score is not None:                                   # --evaluate leaves none
            return score
    model = module.learn(run, args, ds, device)
    if args.search:
        return keep_score(run, args, *module.validation_score(run, args, ds, model, device))
    if distributed.rank() == 0:
        module.measure(run, args, ds, model, device)


def continued(args, typed, folder):
    """The arguments of a run that is resumed: those it was started with, and what was typed."""
    before = runs.read_config(folder)['args']
    now = {key: value for key, value in vars(args).items()
           if key in typed or key in runs.NOT_IN_IDENTITY - {'data'}}
    return argparse.Namespace(**{**vars(args), **before, **now})


def fit_to_colour(args, typed, ds):
    """Other defaults for images in colour, where they were not typed."""
    for key, value in getattr(args, 'on_colour', {}).items():
        if ds.shape[0] == 3 and key not in typed:
            setattr(args, key, value)


def fit_to_size(args, typed, ds):
    """Smaller batches and more epochs for a small set, where they were not typed; tells if steps are few."""
    if 'batch_size' not in args:
        return
    n = len(ds.x_train)
    if args.method not in MODULES:                              # which keep some for validation
        n = len(data.split(n, pretrain.VALIDATION, args.seed)[0])
    if 'batch_size' not in typed:
        args.batch_size = min(args.batch_size, max(16, n // 8))
    steps = data.steps_per_epoch(n, args.batch_size)
    for key, least in LEAST_STEPS.get(args.method, {}).items():
        epochs = getattr(args, key)
        too_few = key == 'epochs' and not runs.in_rounds(args) and epochs * steps < least
        if key not in typed:
            setattr(args, key, max(epochs, math.ceil(least / steps)))
        elif too_few and distributed.rank() == 0:
            print(f'only {epochs * steps} steps: little will be learned; more --epochs or a smaller '
                  '--batch-size make more of them')


def open_run_folder(folder, args, typed, ds, device):
    """The run on rank 0, what the others see of it elsewhere; with config and is_finished on all."""
    config = runs.config_of(vars(args), ds, device)             # holds args: what is set below is set in it
    if getattr(args, 'encoder', None):
        if args.overwrite and folder.resolve() == Path(args.encoder).resolve():
            raise ValueError(f'{folder} is the --encoder of this run, so it can not be overwritten; '
                             'use another --name')
        config['encoder'] = runs.encoder_config(args.encoder, ds.shape)
        if 'net' in args:
            args.net, args.width = runs.net_of(config)
    if 'amp' in args and args.amp is None:
        args.amp = getattr(args, 'net', '') != 'fc' and amp_by_default(device)
    answers = Path(getattr(args, 'oracle', 'data'))
    if answers.name in runs.TABLES and answers.resolve().parent == folder.resolve():
        raise ValueError(f'{answers} is a file that the run in that folder writes; copy it to another place')
    first = distributed.rank() == 0
    if first and args.resume and not folder.exists():
        print(f'{folder} is not there yet: it starts')
    run = runs.Run(folder, config, typed, args.resume, args.overwrite) if first else runs.SilentRun(folder)
    run.config, run.is_finished = distributed.from_first((run.config, run.finished) if first else None)
    return run


# ------------------------------------------------------------------------------------------- search

def settings(ranges, n, seed):
    """n settings [{key: value}] that cover the ranges (key, low, high) evenly: the first n points of a
    scrambled Sobol sequence (Owen 1998). Between positive ends a factor of 8 or more apart it steps in
    logarithms; between whole ends, given as int, it takes whole numbers."""
    from scipy.stats import qmc                                 # slow to import, and only needed here
    points = qmc.Sobol(len(ranges), seed=seed).random_base2(max(0, math.ceil(math.log2(n))))[:n]

    def value(u, low, high):
        v = low * (high / low) ** u if low > 0 and high / low >= 8 else low + (high - low) * u
        return round(v) if isinstance(low, int) else float(f'{v:.4g}')          # as it can be typed again
    return [{key: value(float(u), low, high) for u, (key, low, high) in zip(point, ranges)}
            for point in points]


def keep_score(run, args, score, what):
    """Write metrics.json of a trial, which never sees the test set; returns the score, on every rank."""
    if distributed.rank() == 0:
        run.write_metrics({'method': args.method, 'split': 'validation', 'score': score, 'scored_by': what})
    return distributed.from_first(score)


def search(args, typed):
    """Try settings from the ranges of --search, each as a run of its own, and print them, the best first."""
    start_device(args)
    say = print if distributed.rank() == 0 else lambda *_: None
    plain = {key: value for key, value in typed.items() if key != 'search'}
    trials = []
    n, *ranges = args.search
    for i, setting in enumerate(settings(ranges, n, args.seed)):
        name = f'{args.name}-{i:02}'
        trial = argparse.Namespace(**{**vars(args), **setting, 'name': name})
        try:
            score = train_and_measure(trial, {**plain, **setting})
        except train.Diverged as e:
            if distributed.world() > 1:                         # the others may have seen nothing of it
                raise
            say(e)
            score = -math.inf
        trials.append((score, name, setting))
        say(f'{name}: {setting}: score {score:.4f}')
    trials.sort(key=lambda trial: -trial[0])
    best_score, best_name, best = trials[0]
    if best_score == -math.inf:
        raise ValueError('the training of every setting has diverged; try a lower --lr')
    rows = [['trial', *best, 'score']]
    for score, name, setting in trials:
        rows.append([name, *(f'{v:.4g}' for v in setting.values()), f'{score:.4f}'])
    say(report.table(rows))
    say('score:', runs.read_json(Path('runs') / best_name / 'metrics.json')['scored_by'])
    words = [runs.flag(k, v) for k, v in {**plain, **best}.items()
             if k not in ('resume', 'overwrite', 'method', 'name')]
    say('best: python ssl.py --method', args.method, *words)


# ------------------------------------------------------------------------------------- finished runs

def data_of(folder, config, path):
    """The data set that a run was made from; path: where it is now, if it was moved."""
    args = argparse.Namespace(**config['args'])
    args.data = path or args.data
    ds = load_data(args)
    if ds.digest != config['data']['digest']:
        raise ValueError(f'{folder} was made from other data than {args.data}; --data says where it is now')
    return ds


def evaluate(args):
    """Load a finished run and write its measures, images and page anew."""
    folder = Path(args.evaluate)
    network = runs.open_run(folder, args.device)
    ds = data_of(folder, network.config, args.data)
    network.args.tensorboard = network.config['args']['tensorboard'] = args.tensorboard
    run = runs.Run(folder, network.config, resume=True)
    MODULES.get(network.args.method, pretrain).measure(run, network.args, ds, network.model, network.device)


def export(folder, path, new=None, args=None):
    """Write features as an .npz: of all images of a run's data, with ids, split and the labels that are known
    (-1: not known; of a classifier's training images those it paid for); or of new images."""
    if Path(path).exists() and not args.overwrite:              # it may be somebody's data
        raise ValueError(f'{path} exists; add --overwrite to replace it, or name another file')
    network = runs.open_run(folder, args.device)
    if new:
        C, H, _ = network.config['data']['shape']
        x, names = data.read_images(new, H, C)
        arrays = {'features': network.encode(x).cpu().numpy(), 'ids': np.arange(len(x))}
        if names:
            arrays['names'] = np.array(names)
    else:
        arrays = export_data(Path(folder), network, data_of(folder, network.config, args.data))
    blob = io.BytesIO()
    np.savez(blob, **arrays)
    runs.write_atomic(path, blob.getvalue())
    n, D = arrays['features'].shape
    print(f'{n:,} features of {D} -> {path}')


def export_data(folder, network, ds):
    split = np.full(len(ds.x_train), 'train', '<U10')
    if network.args.method not in MODULES:                      # the others learn from all images
        split[data.split(len(ds.x_train), pretrain.VALIDATION, network.args.seed)[1]] = 'validation'
    y = torch.full((len(ds.x_train),), -1) if ds.y_train is None else ds.y_train
    if network.args.method in ('classify', 'query'):
        ids, labels = query.open_database(folder, ds).labels()
        y = torch.full((len(ds.x_train),), -1)
        y[ids] = labels
    parts = [(ds.x_train, y, split, ds.names_train)]
    if ds.x_test is not None:
        y_test = torch.full((len(ds.x_test),), -1) if ds.y_test is None else ds.y_test
        parts.append((ds.x_test, y_test, np.full(len(ds.x_test), 'test', '<U10'), ds.names_test))
    arrays = {'features': np.concatenate([network.encode(x).cpu().numpy() for x, *_ in parts]),
              'ids': np.concatenate([np.arange(len(x)) for x, *_ in parts]),
              'labels': np.concatenate([user_ids(y, ds.ids) for _, y, *_ in parts]),
              'split': np.concatenate([s for _, _, s, _ in parts])}
    if ds.names_train:
        arrays['names'] = np.concatenate([names for *_, names in parts])
    return arrays


def user_ids(y, ids):
    """Dense labels (N,), -1 for none, as the ids that the user's data has."""
    return np.array([*ids, -1])[y.numpy()]


def predict(folder, path, args):
    """Print the class (or cluster) that a finished run gives each image of a file or folder, as CSV."""
    network = runs.open_run(folder, args.device)
    ids, classes = network.config['data']['ids'], network.config['data']['classes']
    if network.args.method in ('scan', 'cluster'):
        ids = range(network.args.clusters)
        classes = [f'cluster {k}' for k in ids]
    C, H, _ = network.config['data']['shape']
    x, names = data.read_images(path, H, C)
    confidence, pred = network.predict(x).max(1)
    rows = [(name, ids[k], classes[k], f'{p:.4f}') for name, k, p in
            zip(names or range(len(x)), pred.tolist(), confidence.tolist())]
    if hasattr(sys.stdout, 'reconfigure'):
        sys.stdout.reconfigure(encoding='utf-8', errors='surrogateescape')     # a CSV is whole on any system
    sys.stdout.write(runs.csv_text(['file' if names else 'index', 'class', 'name', 'confidence'], rows))


def compare(folders):
    """Print one table of these runs, by default all finished ones, with a line on each that is not finished;
    write runs/report.html about those of the table."""
    if not folders:
        there = sorted(path.parent for path in Path('runs').glob('*/config.json'))
        folders = [folder for folder in there if (folder / 'metrics.json').exists()]
        for folder in there:
            if folder not in folders:
                print(f'{folder}: {runs.state(folder)}')
    if not folders:
        return print('runs/ holds no finished run yet')
    print(report.table(report.compare(folders, 'runs/report.html')))
    print('-> runs/report.html')


def show_views(args, typed):
    """Write originals and two augmented views of each as a PNG."""
    path = Path(args.show_views)
    if path.suffix != '.png':                                   # it may be somebody's data
        raise ValueError(f'--show-views {path}: wanted a name that ends in .png')
    ds = load_data(args)
    fit_to_colour(args, typed, ds)
    pretrain.write_views(path, data.to_float(ds.x_train[:16]), pretrain.views_of(args), args.seed)
    print(f'wrote {path}: originals above two views of each')
