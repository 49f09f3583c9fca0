"""The recipe of the methods that learn a representation: from pictures alone, then every measure of it."""
import math
import time
from functools import partial

import torch

import cluster
import data
import distributed
import evaluate
import nets
import report
import stages
import train


def check(args, ds):
    """ValueError for more principal components than there can be."""
    if args.method == 'pca' and args.latent > math.prod(ds.shape):
        raise ValueError(f'--latent {args.latent} is more than the {math.prod(ds.shape)} numbers of a picture')


def represent(run, args, ds, device, trial=None):
    """Learn a representation from pictures alone, then measure it."""
    train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
    model, seconds, more = stages.beginning(run, args, device), 0.0, {}
    if 'epochs' in args:
        objective, x_val = stages.objective_of(args), ds.x_train[val_ids].to(device)
        check = partial(train.validate, model, objective, x_val, args.batch_size, args.seed, args.amp)
        if trial:
            encode = stages.representation(args, model, None, device)[0]
            check = trial.scored(check, partial(neighbours, ds, train_ids, val_ids, encode, model, device))
        x = data.Pictures(ds.x_train, device, train_ids)
        if getattr(args, 'encoder', None):                                 # then neighbours are pairs
            h = stages.look_around(args.encoder, device, ds.x_train)[1][train_ids.to(device)]
            objective = partial(train.neighbouring, pictures=x.at, contrast=objective)
            more = {'y': cluster.neighbours(h, min(args.neighbours, len(h) - 1))}
        seconds = stages.train_model(run, args, model, objective, x, check=check,
                                     plan=trial and partial(trial.plan, args.epochs), **more)
    if trial:
        trial.complete(run, seconds)
    elif distributed.rank() == 0:
        finish(run, args, ds, model, device, seconds)


def neighbours(ds, train_ids, val_ids, encode, model, device):
    """Accuracy of kNN on the validation pictures: what --search goes by where losses can't be compared."""
    model.eval()
    train_ids, val_ids = ds.labelled(train_ids), ds.labelled(val_ids)
    h, h_val = (evaluate.in_chunks(encode, ds.x_train, ids=ids, device=device) for ids in (train_ids, val_ids))
    return (evaluate.knn(h, ds.y_train[train_ids].to(device), h_val).cpu() == ds.y_train[val_ids]).float().mean().item()


def finish(run, args, ds, model, device, seconds):
    """Pictures, then every measure (the test set is read here, once), then metrics.json."""
    train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
    x_train = ds.x_train[train_ids] if args.method == 'pca' else None      # a copy that only PCA needs
    encode, reconstruct = stages.representation(args, model, x_train, device)
    began = time.monotonic()
    metrics, shown = evaluate.measure(ds, train_ids, val_ids, encode, reconstruct, args.seed, device=device)
    few = data.to_float(ds.x_train[val_ids[:16]].to(device))
    with torch.no_grad():
        if reconstruct:
            report.write_png(run.folder / 'reconstructions.png', report.sheet(few, reconstruct(few)))
        if args.method == 'vae':
            mu = evaluate.in_chunks(encode, ds.x_train, ids=val_ids, device=device)
            metrics['active_units'] = evaluate.active_units(mu)
            rows = nets.samples(model, args.latent, 4 * 16, data.generator(device, args.seed, 'samples')).split(16)
            report.write_png(run.folder / 'samples.png', report.sheet(*rows))
            pairs = zip(few[0::2].split(1), few[1::2].split(1))
            rows = [nets.interpolation(model, x1, x2, 16) for x1, x2 in pairs]
            report.write_png(run.folder / 'interpolation.png', report.sheet(*rows))
    if 'crop' in args:                                                     # it learns from views
        stages.write_views(run.folder / 'views.png', few, stages.views_of(args), args.seed)
    stages.complete(run, args, ds, metrics, shown, seconds, began)
