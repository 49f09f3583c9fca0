"""Learning without labels: autoencoders, the variational autoencoder, SimCLR; and what they compare with.

Each objective is (model, x, g) -> (loss, parts) as in train.py. `learn` trains, `measure` scores the result.
"""
import math
import time
from functools import partial

import torch

import augment
import data
import distributed
import evaluate
import features
import losses
import nets
import report
import runs
import train
from device import generator

VALIDATION = 5000                       # training images kept for validation, a tenth at most
SEARCH_EVERY = 3                        # epochs after which simclr finds the neighbours anew


# --------------------------------------------------------------------------------------- objectives

def autoencoding(model, x, g, noise=0.0):
    """Squared error of the reconstruction; with noise, from a noisy image back to the clean one."""
    noisy = augment.add_noise(x, noise, g) if noise else x
    return losses.mse(model(noisy), x), {}


def variational(model, x, g, beta=1.0, likelihood='bernoulli'):
    """Negative ELBO in nats."""
    logits, mu, logvar = model(x, g)
    loss, recon, kl = losses.elbo(logits, x, mu, logvar, beta=beta, likelihood=likelihood)
    return loss, {'recon': recon, 'kl': kl}


def contrastive(model, x, g, temperature=0.2, views=None, recon=0.0, other=None):
    """NT-Xent of two views of each image, or of one of it and one of its `other` (B, C, H, W).

    recon: weight of a reconstruction; with it the first view is the image itself, which the decoder has to
    give back from its features. Anchors are the images of this process, negatives those of all.
    """
    B, other = len(x), x if other is None else other
    if recon:
        seen = torch.cat([x, augment.augment(other, views, g)])
    else:
        seen = augment.augment(torch.cat([x, other]), views, g)
    h = model.encode(seen)
    z1, z2 = map(distributed.gather, model.head(h).chunk(2))
    own = torch.arange(B, device=x.device) + (B * distributed.rank() if len(z1) > B else 0)
    loss = losses.nt_xent(z1, z2, temperature, own)
    parts = {'chance': x.new_full((), math.log(max(1, 2 * len(z1) - 1)))}
    if recon:
        parts['recon'] = losses.mse(model.decode(h[:B]), x)
        loss = loss + recon * parts['recon']
    return loss, parts


def with_neighbours(model, x, near, g, images, objective):
    """`objective` of each image and one of its neighbours, drawn from near (B, k): the positives of NNCLR
    (arXiv 2104.14548). images: function from ids (B,) to uint8 images."""
    pick = torch.randint(near.shape[1], (len(x), 1), generator=g, device=x.device)
    return objective(model, x, g, other=data.to_float(images(near.gather(1, pick).squeeze(1))))


def objective_of(args):
    """What the method minimises, with its arguments filled in."""
    if args.method == 'vae':
        return partial(variational, beta=args.beta, likelihood=args.likelihood)
    if args.method == 'simclr':
        return partial(contrastive, temperature=args.temperature, views=views_of(args), recon=args.recon)
    return partial(autoencoding, noise=args.noise)


def views_of(args):
    """The augmentation flags as augment.Views."""
    return augment.Views(args.crop, args.flip, args.rotate, args.jitter, args.grey, args.blur, args.cutout,
                         args.noise)


# ------------------------------------------------------------------------------------------ the run

def check(args, ds):
    """ValueError for what can't be asked of the data."""
    pixels = math.prod(ds.shape)
    if args.method == 'pca' and args.latent > pixels:
        raise ValueError(f'--latent {args.latent} is more than the {pixels} numbers of an image')
    parts = data.split(len(ds.x_train), VALIDATION, args.seed)
    if args.method == 'simclr' and args.search and not all(len(ds.labelled(ids)) for ids in parts):
        raise ValueError('the losses of these settings can not be compared with each other, and there are '
                         'no labels, or too few, to judge by')


def learn(run, args, ds, device):
    """Learn a representation from images alone; returns the network."""
    model = runs.initial_model(run.config, device)
    train_ids, val_ids = data.split(len(ds.x_train), VALIDATION, args.seed)
    if args.method == 'pca':
        model.fit(data.to_float(ds.x_train[train_ids].to(device)).flatten(1))
    if 'epochs' not in args:                            # nothing to train; the network is saved all the same
        run.save({'model': model.state_dict()})
        return model
    objective = objective_of(args)
    x, x_val = data.Images(ds.x_train, device, train_ids), ds.x_train[val_ids].to(device)
    validate = partial(train.validate, model, objective, x_val, args.batch_size, args.seed, args.amp)
    trainer = train.start(run, args, model, x)
    alone = round(getattr(args, 'neighbours_from', 1) * args.epochs)    # epochs without neighbours
    trainer.fit(objective, x, last=alone, epochs=args.epochs, validate=validate)
    for first in range(alone + 1, args.epochs + 1, SEARCH_EVERY):
        last = min(first + SEARCH_EVERY - 1, args.epochs)
        if trainer.epoch > last:                                        # a resumed run has been here
            continue
        if trainer.epoch == first and trainer.step == 0:                # else it has found them
            find_neighbours(trainer, run, ds, train_ids, args.neighbours)
        trainer.fit(partial(with_neighbours, images=x.at, objective=objective), x, last=last,
                    epochs=args.epochs, y=trainer.kept['neighbours'].to(device), validate=validate)
    return model


def find_neighbours(trainer, run, ds, ids, k):
    """Keep with the state the places (N, k) of the nearest of the images `ids`, in the features of the
    network as it is now: a run that is resumed later has the same."""
    h = runs.Network(run.config, trainer.model, trainer.device).encode(ds.x_train, ids)
    near = features.neighbours(h - h.mean(0), k)
    trainer.kept['neighbours'] = distributed.from_first(near.cpu())


def validation_score(run, args, ds, model, device):
    """(score, what it is): more is better; what --search goes by. The loss cannot be compared between
    settings of SimCLR, so there it is kNN on the validation images, which looks at labels."""
    train_ids, val_ids = data.split(len(ds.x_train), VALIDATION, args.seed)
    if args.method != 'simclr':
        rows = runs.trained(runs.read_log(run.folder))
        return -rows[-1]['val_loss'], 'minus the validation loss'
    network = runs.Network(run.config, model, device)
    train_ids, val_ids = ds.labelled(train_ids), ds.labelled(val_ids)
    h, h_val = network.encode(ds.x_train, train_ids), network.encode(ds.x_train, val_ids)
    found = features.knn(h, ds.y_train[train_ids].to(device), h_val).cpu()
    return (found == ds.y_train[val_ids]).float().mean().item(), 'kNN on the validation images, by all labels'


def measure(run, args, ds, model, device):
    """Every measure (the test set is read here, once), images to look at, report.html and metrics.json."""
    began = time.monotonic()
    train_ids, val_ids = data.split(len(ds.x_train), VALIDATION, args.seed)
    network = runs.Network(run.config, model, device)
    reconstruct = network.reconstruct_batch if nets.can_decode(model) else None
    metrics, shown = evaluate.measure(ds, train_ids, val_ids, network.encode_batch, reconstruct, args.seed,
                                      device=device)
    some = data.to_float(ds.x_train[val_ids[:16]].to(device))
    with torch.no_grad():
        if reconstruct:
            report.write_png(run.folder / 'reconstructions.png', report.sheet(some, reconstruct(some)))
        if args.method == 'vae':
            metrics['active_units'] = evaluate.active_units(network.encode(ds.x_train, val_ids))
            draw_samples(run, args, model, some)
        if 'crop' in args:
            write_views(run.folder / 'views.png', some, views_of(args), args.seed)
    report.finish(run, ds, metrics, shown, began)


def draw_samples(run, args, model, x):
    """samples.png: images decoded from the prior; interpolation.png: on the way from one image to another."""
    samples = nets.samples(model, args.latent, 4 * 16, generator(x.device, args.seed, 'samples'))
    report.write_png(run.folder / 'samples.png', report.sheet(*samples.split(16)))
    pairs = zip(x[0::2].split(1), x[1::2].split(1))
    rows = [nets.interpolation(model, x1, x2, 16) for x1, x2 in pairs]
    report.write_png(run.folder / 'interpolation.png', report.sheet(*rows))


def write_views(path, x, views, seed):
    """Originals above two views of each."""
    g = generator(x.device, seed, 'views')
    report.write_png(path, report.sheet(x, augment.augment(x, views, g), augment.augment(x, views, g)))
