"""What the recipes share: the data set, the network and the objective that flags stand for, training, completing.

Here, in the recipes and in ssl.py `args` is known, the namespace of all flags; everything below gets plain values.
"""
import argparse
import math
import os
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import board
import data
import distributed
import evaluate
import nets
import page
import report
import runs
import train


def load(args):
    """The data set of the flags, or of a run's config.json, which may be older than a flag; its classes named by
    --classes."""
    ds, names = data.load(args.data, args.limit, getattr(args, 'dataset', None)), getattr(args, 'classes', None)
    return data.named(ds, names) if names else ds


def determine(args):
    """Heed --deterministic; before CUDA starts, which reads this variable then."""
    os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')
    torch.use_deterministic_algorithms(bool(getattr(args, 'deterministic', False)))


def pick_device(name):
    """torch.device for --device, or CUDA if there is a card, else the CPU; under torchrun each process gets a card of
    its own. ValueError if it can't be used."""
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    try:
        device = distributed.own(torch.device(name))
        torch.zeros(1, device=device)
    except Exception as e:                                             # torch raises many types here
        raise ValueError(f'--device {name} can not be used here ({str(e).split(chr(10))[0][:80]}); '
                         'try cuda, mps or cpu') from None
    if device.type not in ('cuda', 'mps', 'cpu'):
        raise ValueError(f'--device {name} is not one that training runs on; try cuda, mps or cpu')
    train.heed_quota()
    train.keep_memory()
    return device


def network_of(config, device, each=16):
    """The network of a run, from its config.json alone: initialised by the seed, on the device; None if it has none.
    ValueError if memory does not hold it, `each` bytes a parameter: asked beforehand, since Linux kills who takes too
    much. 16 hold weights, gradients and AdamW's two moments; 4 the weights alone."""
    with torch.device('meta'):
        model = build(config)
    if model is None:
        return None
    need, free = each * nets.size(model), data.free_memory(torch.device(device))
    if need > free:
        raise ValueError(f'out of memory: {nets.size(model):,} parameters need {need / 2**30:.0f} GiB, and '
                         f'{free / 2**30:.0f} are free; try a smaller --width or --latent')
    return build(config).to(device, memory_format=nets.layout(torch.device(device)))


def build(config):
    """The network of a config.json, or None."""
    args, shape = argparse.Namespace(**config['args']), config['data']['shape']
    torch.manual_seed(args.seed)
    begun = config.get('encoder')
    if 'head' in args:
        encoder = nets.encoder_of(build(begun)) if begun else nets.Encoder(args.net, shape, args.width)
        torch.manual_seed(args.seed)                                   # the same head, whatever the encoder
        K = args.clusters if 'clusters' in args else len(config['data']['classes'])
        model = nets.Classifier(encoder, K, args.head, args.freeze)
        model = nets.MeanTeacher(model) if 'ema' in args else model
    elif begun:                                                        # simclr goes on with all of it
        model = build(begun)
    elif 'net' in args:
        model = nets.build(args.method, args.net, shape, args.width, getattr(args, 'latent', None))
    else:
        return None
    return model


def beginning(run, args, device):
    """The network that a run begins with: a fresh one, with the encoder of the first run --encoder if there is one; of
    simclr that whole run's."""
    before = None
    if getattr(args, 'encoder', None):
        folder = Path(args.encoder if isinstance(args.encoder, str) else args.encoder[0])
        before = load_model(folder, runs.read_config(folder), device)
        if args.method == 'simclr':
            return before
    model = network_of(run.config, device)
    if before:
        trained = nets.encoder_of(before).state_dict()
        for part in model.modules():                                   # a mean teacher holds two
            if isinstance(part, nets.Classifier):
                try:
                    part.encoder.load_state_dict(trained)
                except RuntimeError:
                    raise ValueError(f'{folder} was trained anew, with another network, since {run.folder} began; '
                                     '--overwrite starts this one again') from None
    return model


def look_around(folders, device, x=None, means=None):
    """(function from float pictures to the features in which neighbours are looked for, those of pictures x, means):
    the features of all these runs side by side, each centred by its mean over x, or `means`, and normalised; the pixels
    without a run."""
    encoders = [] if folders else [lambda x: x.flatten(1)]
    for folder in folders or ():
        config = runs.read_config(folder)
        model = load_model(Path(folder), config, device)
        encoders.append(representation(argparse.Namespace(**config['args']), model, None, device)[0])
    features = [evaluate.in_chunks(encode, x, device=device) for encode in encoders if x is not None]
    means = means or [h.mean(0) for h in features]
    def side_by_side(parts):
        return torch.cat([F.normalize(h - mean, dim=1) for h, mean in zip(parts, means)], 1)
    return (lambda x: side_by_side([encode(x) for encode in encoders]), side_by_side(features) if features else None,
            means)


def read_finished(folder):
    """config.json of a finished run; ValueError if it is none."""
    config = runs.read_config(folder)
    if not (Path(folder) / 'metrics.json').exists():
        raise ValueError(f'{folder} is not finished; continue it with its command and --resume')
    return config


def read_encoder(folder, shape):
    """The part of a run's config.json that says what its encoder is; ValueError if it can't be begun with."""
    config = read_finished(folder)
    if tuple(config['data']['shape']) != tuple(shape):
        raise ValueError(f'--encoder {folder} was trained on pictures {tuple(config["data"]["shape"])}, '
                         f'and the data has {tuple(shape)}')
    if 'net' not in config['args']:
        raise ValueError(f'{folder} holds no encoder: it is a run of --method {config["args"]["method"]}')
    return {key: config[key] for key in ('args', 'data', 'encoder') if key in config}


@contextmanager
def believing(folder):
    """What is done in the block with the config.json of a run folder may fail: somebody else may have written it."""
    try:
        yield
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as e:
        why = ' '.join(str(e).split())[:200]
        raise ValueError(f'{folder}/config.json describes nothing that is here ({why})') from None


def load_model(folder, config, device):
    """The network of a run folder, as trained."""
    with believing(folder), torch.device('meta'):
        build(config)
    model = network_of(config, device, each=4)
    return load_weights(model, folder) if 'lr' in config['args'] else model


def load_weights(model, folder):
    """The model with the weights of the folder's newest whole checkpoint."""
    state = runs.newest_checkpoint(folder)
    if state is None:
        raise ValueError(f'{folder} has no checkpoint; train it again with --overwrite')
    try:
        model.load_state_dict(state['model'])
    except (KeyError, RuntimeError, AttributeError, TypeError):
        raise ValueError(f'{folder} holds a checkpoint of another network than its config.json says') from None
    return model


def weights_digest(folder):
    """SHA-256 of the weights of a run folder, as trained."""
    return runs.state_digest(load_model(Path(folder), runs.read_config(folder), torch.device('cpu')).state_dict())


def reopen(folder, device):
    """(config, args, model or None, device) of a finished run."""
    config = read_finished(folder)
    args = argparse.Namespace(**config['args'])
    determine(args)
    device = pick_device(device)
    return config, args, load_model(folder, config, device) if 'net' in args else None, device


def data_of(folder, config):
    """The data set that a run was made from."""
    args = argparse.Namespace(**config['args'])
    with believing(folder):
        ds = load(args)
    if ds.digest != config['data']['digest']:
        raise ValueError(f'{folder} was made from other data than '
                         f'{args.data or getattr(args, "dataset", None) or "Fashion-MNIST here"}')
    return ds


def views_of(args):
    """The augmentation flags as data.Views."""
    grey = getattr(args, 'grey', 0.0)                                      # older runs have none
    return data.Views(args.crop, args.flip, args.rotate, args.jitter, grey, args.blur, args.cutout, args.noise)


def objective_of(args):
    """What the method minimises, with its flags filled in."""
    if args.method == 'vae':
        return partial(train.variational, beta=args.beta, likelihood=args.likelihood)
    if args.method == 'simclr':
        return partial(train.contrastive, tau=args.tau, views=views_of(args))
    if args.method in ('classify', 'cluster'):
        return partial(train.classification, views=views_of(args), mixup=args.mixup)
    if args.method in ('query', 'scan'):
        return partial(train.consistency, views=views_of(args), threshold=args.threshold)
    return partial(train.autoencoding, noise=args.noise)


def train_model(run, args, model, objective, x, **more):
    """train.fit with the flags filled in, and more; says first what is trained on what."""
    if len(x) // data.steps_per_epoch(len(x), args.batch_size) < distributed.world():
        raise ValueError(f'--batch-size {args.batch_size} is less than a picture for each of the '
                         f'{distributed.world()} processes')
    if distributed.rank() == 0:
        where = f'{distributed.world()} x {x.device}' if distributed.world() > 1 else x.device
        print(f'{run.folder}: {args.method}, {nets.size(model):,} parameters on {where}'
              f'{" in bfloat16" if args.amp else ""}; {len(x):,} pictures {tuple(x.shape[1:])}', flush=True)
    closing = args.closing if 'closing' in args else 0 if args.schedule == 'constant' else math.inf
    return train.fit(
        distributed.sync_batchnorm(model), objective, x, run, epochs=getattr(args, 'epochs', 0),
        batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay, warmup=args.warmup, closing=closing,
        sam=getattr(args, 'sam', 0.0), patience=getattr(args, 'patience', 0),
        min_delta=getattr(args, 'min_delta', 0.0), seed=args.seed, amp=args.amp, save_every=args.save_every, **more)


def representation(args, model, x_train, device, forward=None):
    """(encode, reconstruct or None): float pictures (B, C, H, W) to features (B, D), and to themselves.

    forward stands in for model.encode, to get a classifier's logits the same way.
    """
    if args.method == 'pixels':
        return lambda x: x.flatten(1), None
    if args.method == 'pca':
        pca = evaluate.PCA(data.to_float(x_train.to(device)).flatten(1), args.latent)
        return (lambda x: pca.encode(x.flatten(1)),
                lambda x: pca.decode(pca.encode(x.flatten(1))).view_as(x).clamp(0, 1))
    model.eval()
    def encode(x):
        with train.autocast(device, args.amp):
            return (forward or model.encode)(x).float()
    def reconstruct(x):
        with train.autocast(device, args.amp):
            return model.decode(model.encode(x)).float()
    return encode, reconstruct if hasattr(model, 'decode') else None


def answers(args, model, device, neighbours=None):
    """Function from float pictures to (B, K + D): class probabilities, the mean of those of data.fixed_views of the
    kinds that training saw, beside features. neighbours: Neighbours, to be pooled with."""
    net = getattr(model, 'teacher', model)
    def forward(x):
        h = net.encode(x)
        return torch.cat([net.head(h), h], 1)
    K, both = net.head[-1].out_features, representation(args, model, None, device, forward)[0]
    def answer(x):
        out = [both(view) for view in data.fixed_views(x, args.crop < 1, args.flip)]
        probs = torch.stack([o[:, :K].softmax(1) for o in out]).mean(0)
        if neighbours:
            probs = evaluate.pool(probs, neighbours.vote(neighbours.encode(x)))
        return torch.cat([probs, out[0][:, K:]], 1)
    return answer


def probabilities(args, model, x, device, neighbours=None):
    """Class or cluster probabilities (N, K) of uint8 pictures x."""
    K = getattr(model, 'teacher', model).head[-1].out_features
    return evaluate.in_chunks(answers(args, model, device, neighbours), x, device=device)[:, :K]


class Neighbours:
    """What is said of the k training pictures that are nearest in the features of other runs: `encode` and h (N, D) as
    from look_around, said (N, K)."""

    def __init__(self, encode, h, said, k):
        self.encode, self.h, self.said, self.k = encode, h, said, k

    def vote(self, h):
        """Features (B, D) of pictures -> (B, K): the mean over their neighbours."""
        return self.said[evaluate.most_similar(h, self.h, self.k)[1]].mean(1)

    def say(self, x):
        """Float pictures (B, C, H, W) -> (B, K + D): their vote beside their features."""
        h = self.encode(x)
        return torch.cat([self.vote(h), h], 1)


def complete(run, args, ds, metrics, shown, seconds, began):
    """Write report.html, for TensorBoard too if asked, and then metrics.json, which makes the run a finished one, and
    say what it holds."""
    rows = runs.trained(runs.read_log(run.folder))
    metrics.update(method=args.method, epochs=rows[-1]['epoch'] if rows else None, seconds=round(seconds, 1),
                   measuring_seconds=round(time.monotonic() - began, 1))
    page.write(run.folder, run.config, metrics, shown, ds.classes, args.perplexity)
    if args.tensorboard:
        board.write(run.folder, metrics, shown, ds.classes, args.seed)
    run.write_metrics(metrics)
    print(report.describe(metrics), f'-> {run.folder}/report.html', sep='\n')


def write_views(path, x, views, seed):
    """Originals above two views of each."""
    g = data.generator(x.device, seed, 'views')
    report.write_png(path, report.sheet(x, data.augment(x, views, g), data.augment(x, views, g)))
