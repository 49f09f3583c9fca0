"""The commands of ssl.py, each with the other modules' functions."""
import argparse
import contextlib
import csv
import io
import sqlite3
import sys
from pathlib import Path

import numpy as np
import torch

import board
import clustering
import data
import distributed
import evaluate
import labels
import page
import querying
import report
import represent
import runs
import search
import stages
import train


NO_MEMORY = ('out of memory', "can't allocate memory", 'not enough memory', 'bad_alloc')       # as torch says it


def main(args, typed, defaults):
    """Do what the arguments ask for; returns the exit code. ValueError or OSError for what a user can mend."""
    try:
        if args.tensorboard:
            board.writer()                                                 # if it is missing, now rather than later
        if 'fetch' in typed:
            name = args.dataset or 'fashion-mnist'
            print(f'{name} is in {data.find(name)}')
        elif 'compare' in typed:
            compare(args.compare or sorted(p.parent for p in Path('runs').glob('*/metrics.json')))
        elif 'list' in typed:
            folders = sorted(p.parent for p in Path('runs').glob('*/config.json'))
            print('\n'.join(f'{f}: {runs.state(f)}' for f in folders) or 'runs/ holds no run yet')
        elif 'evaluate' in typed:
            evaluate_again(Path(args.evaluate), args)
        elif 'export' in typed:
            export(Path(args.export[0]), args.export[1], args.device)
        elif 'predict' in typed:
            predict(Path(args.predict[0]), args.predict[1], args.device)
        elif 'show_views' in typed:
            show_views(args)
        else:
            if args.name is None:
                args.name = runs.default_name(args.method, {
                    k: '+'.join(Path(f).name.removesuffix('.npz') for f in ([v] if isinstance(v, str) else v))
                    if k in ('data', 'encoder') else v for k, v in typed.items()
                    if k not in runs.free(defaults) | {'method', 'over'} and v != defaults.get(k)})
            search.search(args, typed, run_method) if 'search' in typed else run_method(args, typed)
            distributed.stop()
    except train.Stopped as e:
        if distributed.rank() == 0:
            print(f'{e}; saved. Type the same command with --resume to continue.')
        return 130
    except sqlite3.Error as e:
        raise OSError(f'the labels could not be read or written ({e}); --resume continues') from None
    except (RuntimeError, MemoryError) as e:
        if 'deterministic implementation' in str(e):
            raise ValueError(f'--deterministic can not be had: {str(e).split(". ")[0].split(", ")[0]}') from None
        if isinstance(e, MemoryError) or any(words in str(e) for words in NO_MEMORY):
            raise ValueError('out of memory; try a smaller --batch-size, --width or --limit') from None
        if distributed.world() > 1 and 'peer' in str(e):
            raise ValueError('another process of the group has ended; --resume continues from the last '
                             'checkpoint') from None
        raise
    return 0


def run_method(args, typed, trial=None):
    """One run from the first byte to metrics.json: data, model, training, measures, pictures."""
    folder = Path('runs') / args.name
    if args.resume and (folder / 'config.json').exists():                  # its data, unless other was typed
        before = runs.read_config(folder)['args']
        kept = [k for k in ('data', 'dataset', 'limit', 'classes', 'deterministic') if k in args]
        vars(args).update({k: typed.get(k, before.get(k)) for k in kept})
    stages.determine(args)
    device = distributed.start(stages.pick_device(args.device))
    first = distributed.rank() == 0
    ds = stages.load(args)
    if getattr(args, 'amp', False) is None:
        args.amp = args.net != 'fc' and train.amp_by_default(device)
    config = runs.describe(vars(args), ds, device)
    if getattr(args, 'encoder', None):
        if args.overwrite and folder.resolve() in [Path(f).resolve() for f in np.atleast_1d(args.encoder).tolist()]:
            raise ValueError(f'{folder} is an --encoder of this run, so it can not be overwritten; use another --name')
        config['encoder'] = begun = [stages.read_encoder(f, ds.shape) for f in np.atleast_1d(args.encoder).tolist()][0]
        if args.method == 'simclr' != begun['args']['method']:
            raise ValueError(f'--method simclr goes on from a run of simclr, and {args.encoder[0]} is one of '
                             f'{begun["args"]["method"]}')
    recipe, _, check = RECIPES.get(args.method, REPRESENT)
    if not (args.resume and (folder / 'config.json').exists()):
        check(args, ds)                                                    # before --overwrite deletes the old run
    run = runs.Run(folder, config, typed, args.resume, args.overwrite) if first else runs.Silent(folder)
    run.config, finished = distributed.from_first((run.config, run.finished) if first else None)
    args = argparse.Namespace(**run.config['args'])
    if finished and not trial:
        print(f'{run.folder} is already finished; --evaluate {run.folder} measures it again')
    elif not finished:
        try:
            recipe(run, args, ds, device, **({'trial': trial} if trial else {}))
        except ValueError:
            run.withdraw()
            raise


# what to do for a method, how to measure it again, and what its flags must not ask of the data
REPRESENT = represent.represent, represent.finish, represent.check
RECIPES = {'classify': (querying.classify, querying.score, querying.number_of_labels),
           'query': (querying.query, querying.score, querying.check_query),
           **dict.fromkeys(['cluster', 'scan'], (clustering.find_clusters, clustering.score, clustering.check))}


def evaluate_again(folder, now):
    """Load a finished run's checkpoint and write its measures, pictures and page anew."""
    config, args, model, device = stages.reopen(folder, now.device)
    ds, args.perplexity, args.tensorboard = stages.data_of(folder, config), now.perplexity, now.tensorboard
    run = runs.Run(folder, config, resume=True)
    seconds = runs.read_json(folder / 'metrics.json').get('seconds')
    _, measure, _ = RECIPES.get(args.method, REPRESENT)
    measure(run, args, ds, model, device, seconds if isinstance(seconds, (int, float)) else 0.0)


def export(folder, path, device):
    """Write the features of all pictures of a finished run as an .npz, with ids, split and the labels that are known:
    of a classifier's training pictures those it paid for, -1 for the others."""
    may_write(path, 'an earlier export', lambda: {'features', 'ids', 'split'} <= set(np.load(path).files))
    config, args, model, device = stages.reopen(folder, device)
    ds = stages.data_of(folder, config)
    few, split, x_fit = args.method in ('classify', 'query'), np.full(len(ds.x_train), 'train', '<U10'), None
    if args.method not in RECIPES:                                         # the others learn from all pictures
        train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
        split[val_ids] = 'validation'
        x_fit = ds.x_train[train_ids] if args.method == 'pca' else None
    encode = stages.representation(args, model, x_fit, device)[0]
    y = torch.full((len(ds.x_train),), -1) if few or ds.y_train is None else ds.y_train
    if few:
        ids, paid = labels.LabelDatabase(folder / 'labels.sqlite', None, 0, *ds.key).revealed()
        y[ids] = paid
    parts = [(ds.x_train, y, split)]
    if ds.x_test is not None:
        y_test = torch.full((len(ds.x_test),), -1) if ds.y_test is None else ds.y_test
        parts.append((ds.x_test, y_test, np.full(len(ds.x_test), 'test', '<U10')))
    with torch.no_grad():
        features = [evaluate.in_chunks(encode, x, device=device).cpu().numpy() for x, _, _ in parts]
    blob = io.BytesIO()
    np.savez(blob, features=np.concatenate(features), ids=np.concatenate([np.arange(len(x)) for x, _, _ in parts]),
             labels=np.concatenate([y.numpy() for _, y, _ in parts]), split=np.concatenate([s for *_, s in parts]))
    runs.write_atomic(path, blob.getvalue())
    print(f'{sum(len(h) for h in features):,} features of {features[0].shape[1]} -> {path}')


def predict(folder, path, device):
    """Print the class that a finished classifier gives each picture of a file, as CSV."""
    config, args, model, device = stages.reopen(folder, device)
    if args.method not in ('classify', 'query'):
        raise ValueError(f'{folder} holds no classifier: it is a run of --method {args.method}; wanted one of classify '
                         'or query')
    x, shape, classes = data.read_pictures(path), tuple(config['data']['shape']), config['data']['classes']
    if x.shape[1:] != shape:
        raise ValueError(f'{path} holds pictures {tuple(x.shape[1:])}, and {folder} was trained on {shape}')
    with torch.no_grad():
        neighbours = querying.neighbours_of(folder, args, device)
        sure, pred = stages.probabilities(args, model, x, device, neighbours).max(1)
    out = csv.writer(sys.stdout, lineterminator='\n')
    out.writerow(['index', 'class', 'name', 'confidence'])
    out.writerows([i, k, classes[k], f'{p:.4f}'] for i, (k, p) in enumerate(zip(pred.tolist(), sure.tolist())))


def compare(folders):
    """Print one table of these runs and write runs/report.html about them."""
    folders = [f for f in folders if Path(f).name not in ('report.html', 'accuracy.svg')]    # which runs/* names too
    if not folders:
        return print('runs/ holds no finished run yet')
    print(report.table(report.compare(folders)))
    Path('runs').mkdir(exist_ok=True)
    page.write_comparison(Path('runs/report.html'), folders)
    print('-> runs/report.html')


def may_write(path, what, ours):
    """ValueError if there is no place for a file, or if there is one that ours() doesn't know as our own."""
    path = Path(path)
    if path.is_dir() or not path.parent.is_dir():
        raise ValueError(f'{path} can not be written: ' + ('it is a folder' if path.is_dir() else
                                                           f'there is no folder {path.parent}'))
    with contextlib.suppress(Exception):                                   # numpy raises many types of error
        if not path.exists() or path.is_file() and ours():
            return
    raise ValueError(f'{path} exists and is not {what}; it is kept: name another file')


def show_views(args):
    may_write(args.show_views, 'a PNG', lambda: Path(args.show_views).read_bytes().startswith(b'\x89PNG'))
    ds = stages.load(args)
    stages.write_views(Path(args.show_views), data.to_float(ds.x_train[:16]), stages.views_of(args), args.seed)
    print(f'wrote {args.show_views}: originals above two views of each')
