"""The recipes: what each command of ssl.py does, step by step, with the other modules' functions.

Only here and in ssl.py is `args` known, the namespace of all flags; everything below gets plain values.
"""
import argparse
import csv
import io
import math
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import data
import distributed
import evaluate
import labels
import nets
import page
import report
import runs
import search as searching
import train


def main(args, typed, defaults):
    """Do what the arguments ask for; returns the exit code. ValueError or OSError for what a user can mend."""
    try:
        if 'fetch' in typed:
            print(f'Fashion-MNIST is in {data.find_fashion_mnist()}')
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
                    k: Path(v).stem if k in ('data', 'encoder') else v for k, v in typed.items()
                    if k not in runs.FREE | {'method', 'over'} and v != defaults.get(k)})
            search(args, typed) if 'search' in typed else run_method(args, typed)
    except train.Stopped as e:
        print(f'{e}; saved. Type the same command with --resume to continue.')
        return 130
    except (RuntimeError, MemoryError) as e:
        if isinstance(e, MemoryError) or 'memory' in str(e):
            raise ValueError('out of memory; try a smaller --batch-size, --width or --limit') from None
        if distributed.world() > 1 and 'peer' in str(e):
            raise ValueError('another process of the group has ended; --resume continues from the last '
                             'checkpoint') from None
        raise
    return 0


def run_method(args, typed, trial=None):
    """One run from the first byte to metrics.json: data, model, training, measures, pictures."""
    device = distributed.start(pick_device(args.device))
    first = distributed.rank() == 0
    folder = Path('runs') / args.name
    if args.resume and (folder / 'config.json').exists():                  # its data, unless other was typed
        before = runs.read_config(folder)['args']
        args.data, args.limit = (typed.get(key, before.get(key)) for key in ('data', 'limit'))
    ds = data.load(args.data, args.limit)
    if getattr(args, 'amp', False) is None:
        args.amp = args.net != 'fc' and train.amp_by_default(device)
    config = runs.describe(vars(args), ds, device)
    run = runs.Run(folder, config, typed, args.resume, args.overwrite) if first else runs.Silent(folder)
    resolved, finished = distributed.from_first((run.config['args'], run.finished) if first else None)
    args = argparse.Namespace(**resolved)
    if finished and not trial:
        print(f'{run.folder} is already finished; --evaluate {run.folder} measures it again')
    elif not finished:
        try:
            recipe = {'classify': classify, 'query': query}.get(args.method, represent)
            recipe(run, args, ds, device, **({'trial': trial} if trial else {}))
        except ValueError:
            run.withdraw()
            raise
    distributed.stop()


def represent(run, args, ds, device, trial=None):
    """Learn a representation from pictures alone, then measure it."""
    train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
    model, seconds = model_of(args, ds.shape, device), 0.0
    if 'epochs' in args:
        objective, x_val = objective_of(args), ds.x_train[val_ids].to(device)
        check = partial(train.validate, model, objective, x_val, args.batch_size, args.seed, args.amp)
        if trial:
            encode = representation(args, model, None, device)[0]
            check = trial.scored(check, partial(neighbours, ds, train_ids, val_ids, encode, model, device))
        seconds = train_model(run, args, model, objective, ds.x_train[train_ids].to(device), check=check,
                              plan=trial and partial(trial.plan, args.epochs))
    if trial:
        trial.complete(run, seconds)
    elif distributed.rank() == 0:
        finish(run, args, ds, model, device, seconds)


def neighbours(ds, train_ids, val_ids, encode, model, device):
    """Accuracy of kNN on the validation pictures: what --search goes by where losses can't be compared."""
    model.eval()
    h, h_val = (evaluate.in_chunks(encode, ds.x_train[ids].to(device)) for ids in (train_ids, val_ids))
    return (evaluate.knn(h, ds.y_train[train_ids].to(device), h_val).cpu() == ds.y_train[val_ids]).float().mean().item()


def classify(run, args, ds, device, trial=None):
    """Pay for labels, learn a classifier from those pictures alone, and score it on the test set."""
    if ds.y_train is None:
        raise ValueError('--method classify needs labels, and the data has no y_train')
    n = round(args.labels * len(ds.x_train)) if args.labels < 1 else int(args.labels)
    if args.labels > 1 and n != args.labels:
        raise ValueError(f'--labels {args.labels:g} is neither a whole number nor a share below 1')
    if not len(ds.classes) <= n <= len(ds.x_train):
        raise ValueError(f'--labels {args.labels:g} asks for {n:,} labels; wanted from {len(ds.classes)}, the '
                         f'number of classes, to {len(ds.x_train):,}, the number of pictures')
    model = classifier_of(args, ds, device)
    if distributed.rank() == 0:
        oracle = ds.y_train.__getitem__
        paid = labels.LabelDatabase(run.folder / 'labels.sqlite', oracle, n, ds.digest)
        if paid.spent < n:                                             # not resumed: choose, then pay
            paid.reveal(pick(args, ds, model, n, device))
        chosen = paid.revealed()
    ids, y = distributed.from_first(chosen if distributed.rank() == 0 else None)
    x, y = ds.x_train[ids].to(device), y.to(device)
    more = {}
    if trial:                                                          # a fifth of what was paid for judges
        x_val, y_val, x, y = x[:n // 5], y[:n // 5], x[n // 5:], y[n // 5:]
        predict = representation(args, model, None, device, model.forward)[0]
        def accuracy():
            model.eval()
            return (evaluate.in_chunks(predict, x_val).argmax(1) == y_val).float().mean().item()
        more = {'check': trial.scored(None, accuracy), 'plan': partial(trial.plan, args.epochs)}
    repeat = -(-6000 // len(x))                                        # an epoch is 6,000 pictures or more
    seconds = train_model(run, args, model, objective_of(args), x.repeat(repeat, 1, 1, 1), y=y.repeat(repeat), **more)
    if trial:
        trial.complete(run, seconds)
    elif distributed.rank() == 0:
        score(run, args, ds, model, device, seconds)


def query(run, args, ds, device, trial=None):
    """From no label at all: ask for a few, learn from them and from all other pictures, ask for those that then
    say most, until the budget is spent or the accuracy reached; then close, and score on the test set."""
    if ds.y_train is None:
        raise ValueError('--method query needs labels to reveal, and the data has no y_train')
    if not len(ds.classes) <= args.budget <= len(ds.x_train):
        raise ValueError(f'--budget {args.budget:,} is out of range; wanted from {len(ds.classes)}, the number of '
                         f'classes, to {len(ds.x_train):,}, the number of pictures')
    if args.rounds > args.budget:
        raise ValueError(f'--rounds {args.rounds} is more than the --budget of {args.budget} labels')
    model = nets.MeanTeacher(classifier_of(args, ds, device))
    asking = Asking(run, args, ds, model, device)
    objective = partial(objective_of(args), labelled=lambda: asking.labelled)
    check = trial.scored(None, asking.estimate) if trial else None
    seconds = train_model(run, args, model, objective, asking.x, check=check, plan=asking.plan,
                          after_step=partial(model.follow, args.ema))
    if trial:
        trial.complete(run, seconds)
    elif distributed.rank() == 0:
        score(run, args, ds, model, device, seconds)


class Asking:
    """The rounds of --method query: every --round-epochs epochs a round asks for labels, the last asks for none,
    and --closing epochs follow. What was asked is in the database, so that a resumed run asks nothing twice and
    trains each epoch on the labels that it had."""

    def __init__(self, run, args, ds, model, device):
        self.args, self.ds, self.model, self.device, self.run = args, ds, model, device, run
        self.x, self.labelled = ds.x_train.to(device), None
        self.encode = representation(args, model, None, device)[0]
        if distributed.rank() == 0:
            self.paid = labels.LabelDatabase(run.folder / 'labels.sqlite', ds.y_train.__getitem__, args.budget,
                                             ds.digest)

    def plan(self, epoch, seconds):
        """train.fit's plan: asks where a round is due, sets `labelled`, returns the number of epochs."""
        answer = None
        if distributed.rank() == 0:
            now, inside = divmod(epoch - 1, self.args.round_epochs)
            rounds = self.paid.rounds()
            if inside == 0 and now not in rounds and all(asked for asked, _ in rounds.values()):
                self.ask(now, epoch, seconds)
                rounds = self.paid.rounds()
            ended = [r for r, (asked, _) in rounds.items() if not asked]
            last = ended[0] if ended else self.args.rounds
            answer = *self.paid.revealed(up_to=now), last * self.args.round_epochs + self.args.closing
        ids, y, epochs = distributed.from_first(answer)
        self.labelled = self.x[ids.to(self.device)], y.to(self.device)
        return epochs

    def estimate(self):
        """The newest estimate of the accuracy; 0 before there is one."""
        return max((r, estimate or 0.0) for r, (_, estimate) in self.paid.rounds().items())[1]

    def ask(self, now, epoch, seconds):
        """One round: predict all pictures, estimate the accuracy, choose whom to ask about, pay, say so."""
        args, beliefs, estimate = self.args, None, None
        n = args.budget * (now + 1) // args.rounds - self.paid.spent if now < args.rounds else 0
        known, y = (t.to(self.device) for t in self.paid.revealed())
        h = evaluate.in_chunks(self.encode, self.x)
        probs, h = self.model.teacher.head(h).softmax(1).detach(), F.normalize(h, dim=1)
        if now:
            ids, agreed = labels.pick_informative(n, probs, h, known, y, f'{args.seed} round {now}')
            estimate = labels.estimate_accuracy(probs, agreed, self.paid.surprises(now - 3))
            if args.until is not None and estimate is not None and estimate >= args.until:
                n, ids = 0, ids[:0]
        if args.pick == 'random':
            ids = labels.pick_random(len(self.x), len(self.x), args.seed)[self.paid.spent:][:n]
        elif not now:
            look = h if args.encoder else F.normalize(data.to_float(self.x).flatten(1), dim=1)   # untrained says less
            ids = labels.pick_coverage(n, look, args.seed)
        if now:
            sure, guess = probs[ids].max(1)
            beliefs = list(zip(guess.tolist(), sure.tolist(), agreed[ids].int().tolist()))
        got = self.paid.reveal(ids, now, beliefs, estimate)
        each = torch.bincount(self.paid.revealed()[1], minlength=len(self.ds.classes)).tolist()
        left = (args.rounds - now if n else 0) * args.round_epochs + args.closing
        print(f'round {now}: {len(got)} asked, {self.paid.spent} of {args.budget} spent, by class {each}'
              + (f', {100 * sum(g != b[0] for g, b in zip(got.tolist(), beliefs)) / len(got):.0f} % of them had been '
                 'wrong' if beliefs else '')
              + (f', estimated accuracy {100 * estimate:.1f} %' if estimate is not None else '')
              + (f', about {runs.clock(seconds / (epoch - 1) * left)} left' if now else ''), flush=True)


def score(run, args, ds, model, device, seconds):
    """Measure a classifier on the test set, once, and write metrics.json."""
    began = time.monotonic()
    paid = labels.LabelDatabase(run.folder / 'labels.sqlite', None, 0, ds.digest)
    metrics, shown = evaluate.measure_classifier(ds, answers(args, model, device), device, args.seed)
    rows = paid.asked()
    shown['asked'] = ds.x_train[[i for i, *_ in rows]], rows, paid.rounds()
    estimates = [estimate for _, estimate in paid.rounds().values() if estimate is not None]
    if estimates:
        metrics.update(estimate=estimates[-1], rounds=len(paid.rounds()))
    complete(run, args, ds, {'labels': paid.spent, **metrics}, shown, seconds, began)


def answers(args, model, device):
    """Function from float pictures to (B, K + D): class probabilities beside features. Where training mirrored
    pictures, probabilities are the mean of those of both ways round."""
    net = getattr(model, 'teacher', model)
    def forward(x):
        h = net.encode(x)
        return torch.cat([net.head(h), h], 1)
    K, both = net.head[-1].out_features, representation(args, model, None, device, forward)[0]
    def answer(x):
        out = both(x)
        probs = out[:, :K].softmax(1)
        if args.flip:
            probs = (probs + both(x.flip(3))[:, :K].softmax(1)) / 2
        return torch.cat([probs, out[:, K:]], 1)
    return answer


class Trial:
    """One setting of a --search: scored on validation after every epoch, stopped when hopeless, never tested."""

    def __init__(self, folder, others, by_loss):
        self.folder, self.others, self.by_loss = folder, others, by_loss

    @property
    def curve(self):
        """Score after each epoch so far, more is better."""
        return [row['score'] for row in runs.read_log(self.folder)]

    def scored(self, check, accuracy):
        """A check for train.fit that adds the score: minus the validation loss, or an accuracy."""
        def both():
            row = check() if check else {}
            return {**row, 'score': -row['val_loss'] if self.by_loss else accuracy()}
        return both

    def plan(self, epochs, epoch, seconds):
        """Number of epochs: as many as planned, or no more if it is hopeless."""
        curve = self.curve[:epoch - 1]
        return distributed.from_first(epoch - 1 if curve and searching.hopeless(curve, self.others) else epochs)

    def complete(self, run, seconds):
        """Write metrics.json without a look at the test set."""
        if distributed.rank() == 0:
            run.write_metrics({'method': run.config['args']['method'], 'split': 'validation',
                               'score': self.curve[-1], 'epochs': len(self.curve), 'seconds': round(seconds, 1)})


def search(args, typed):
    """Try --search settings from the ranges --over, each as a run of its own, and print them, the best first."""
    shapes_loss = {'tau', 'crop', 'rotate', 'jitter', 'blur', 'cutout', 'noise', 'beta'}
    by_loss = args.method in ('ae', 'conv', 'vae') and not shapes_loss & {key for key, *_ in args.over}
    by_knn = not by_loss and args.method not in ('classify', 'query')
    if by_knn and data.load(args.data, args.limit).y_train is None:
        raise ValueError('the losses of these settings can not be compared with each other, and the data has no labels '
                         'to judge by')
    print(f'{args.search} settings, scored by '
          + ('the validation loss' if by_loss else 'kNN on the validation pictures, for which all labels are looked at'
             if by_knn else {'classify': 'the accuracy on a fifth of the labels paid for',
                             'query': 'the accuracy estimated from the answers'}[args.method]))
    base, plain = ({k: v for k, v in of.items() if k not in ('search', 'over')} for of in (vars(args), typed))
    trials = []
    for i, setting in enumerate(searching.settings(args.over, args.search, args.seed)):
        name = f'{args.name}-{i:02}'
        own = argparse.Namespace(**{**base, **setting, 'name': name})
        run_method(own, {**plain, **setting}, Trial(Path('runs') / name, [t['curve'] for t in trials], by_loss))
        curve = Trial(Path('runs') / name, (), by_loss).curve
        trials.append({'setting': setting, 'curve': curve, 'stopped': len(curve) < getattr(own, 'epochs', 0)})
        print(f'{name}: ' + ', '.join(f'{k} {v:.4g}' for k, v in setting.items())
              + f': score {curve[-1]:.4f}' + (f', stopped after epoch {len(curve)}' if trials[-1]['stopped'] else ''))
    ranked = sorted(trials, key=lambda t: (t['stopped'], -t['curve'][-1]))
    print(searching.table(ranked))
    words = [runs.flag(k, v) for k, v in {**plain, **ranked[0]['setting']}.items()
             if k not in ('resume', 'overwrite', 'method', 'name')]
    print('best: python ssl.py --method', args.method, *words)


def train_model(run, args, model, objective, x, **more):
    """train.fit with the flags filled in, and more; says first what is trained on what."""
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


def pick(args, ds, model, n, device):
    """Ids (n,) of the pictures whose labels are asked for, by --pick."""
    if args.pick == 'balanced':
        return labels.pick_balanced(n, ds.y_train, args.seed)
    if args.pick == 'coverage':
        encode = representation(args, model, None, device)[0]
        h = evaluate.in_chunks(encode, ds.x_train.to(device))
        return labels.pick_coverage(n, F.normalize(h, dim=1), args.seed)
    return labels.pick_random(n, len(ds.x_train), args.seed)


def pick_device(name):
    """torch.device for --device, or the best there is; ValueError if it can't be used."""
    if name is None:
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except Exception as e:                                             # torch raises many types here
        raise ValueError(f'--device {name} can not be used here ({str(e).split(chr(10))[0][:80]}); '
                         'try cuda, mps or cpu') from None
    if device.type not in ('cuda', 'mps', 'cpu'):
        raise ValueError(f'--device {name} is not one that training runs on; try cuda, mps or cpu')
    return device


def views_of(args):
    """The augmentation flags as data.Views."""
    return data.Views(args.crop, args.flip, args.rotate, args.jitter, args.blur, args.cutout, args.noise)


def objective_of(args):
    """What the method minimises, with its flags filled in."""
    if args.method == 'vae':
        return partial(train.variational, beta=args.beta, likelihood=args.likelihood)
    if args.method == 'simclr':
        return partial(train.contrastive, tau=args.tau, views=views_of(args))
    if args.method == 'classify':
        return partial(train.classification, views=views_of(args), mixup=args.mixup)
    if args.method == 'query':
        return partial(train.consistency, views=views_of(args), threshold=args.threshold)
    return partial(train.autoencoding, noise=args.noise)


def model_of(args, shape, device):
    """The method's network on the device, initialised by the seed; None for pixels and pca."""
    if args.method not in ('ae', 'conv', 'vae', 'simclr', 'random'):
        return None
    torch.manual_seed(args.seed)
    model = nets.build(args.method, args.net, shape, args.width, getattr(args, 'latent', None))
    return model.to(device, memory_format=torch.channels_last)


def classifier_of(args, ds, device):
    """A classifier on the encoder of the run --encoder, or on a fresh one without it."""
    torch.manual_seed(args.seed)
    if args.encoder is None:
        encoder = nets.Encoder(args.net, ds.shape, args.width)
    else:
        config = runs.read_config(args.encoder)
        if tuple(config['data']['shape']) != ds.shape:
            raise ValueError(f'--encoder {args.encoder} was trained on pictures {tuple(config["data"]["shape"])}, '
                             f'and the data has {ds.shape}')
        encoder = nets.encoder_of(load_model(Path(args.encoder), config, torch.device('cpu')))
        torch.manual_seed(args.seed)                                   # the same head, whatever the encoder
    model = nets.Classifier(encoder, len(ds.classes), args.head, args.freeze)
    return model.to(device, memory_format=torch.channels_last)


def load_model(folder, config, device):
    """The network of a run folder, as trained."""
    model = model_of(argparse.Namespace(**config['args']), config['data']['shape'], device)
    if model is None:
        raise ValueError(f'{folder} holds no encoder: it is a run of --method {config["args"]["method"]}')
    return load_weights(model, folder) if 'epochs' in config['args'] else model


def load_weights(model, folder):
    """The model with the weights of the folder's newest whole checkpoint."""
    state = runs.newest_checkpoint(folder)
    if state is None:
        raise ValueError(f'{folder} has no checkpoint yet; train it first')
    try:
        model.load_state_dict(state['model'])
    except (KeyError, RuntimeError, AttributeError, TypeError):
        raise ValueError(f'{folder} holds a checkpoint of another network than its config.json says') from None
    return model


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


def reopen(folder, device):
    """(config, args, model or None, device) of a finished run."""
    config = runs.read_config(folder)
    args, device = argparse.Namespace(**config['args']), pick_device(device)
    if not (folder / 'metrics.json').exists():
        raise ValueError(f'{folder} is not finished; continue it with its command and --resume')
    if args.method in ('classify', 'query'):
        shape, classes = tuple(config['data']['shape']), config['data']['classes']
        model = classifier_of(args, argparse.Namespace(shape=shape, classes=classes), device)
        model = load_weights(nets.MeanTeacher(model) if args.method == 'query' else model, folder)
    else:
        model = load_model(folder, config, device) if 'net' in args else None
    return config, args, model, device


def data_of(folder, config):
    """The data set that a run was made from."""
    where, limit = (config['args'].get(key) for key in ('data', 'limit'))
    ds = data.load(where, limit)
    if ds.digest != config['data']['digest']:
        raise ValueError(f'{folder} was made from other data than {where or "Fashion-MNIST here"}')
    return ds


def evaluate_again(folder, now):
    """Load a finished run's checkpoint and write its measures, pictures and page anew."""
    config, args, model, device = reopen(folder, now.device)
    ds, args.perplexity = data_of(folder, config), now.perplexity
    run = runs.Run(folder, config, resume=True)
    seconds = runs.read_json(folder / 'metrics.json').get('seconds') or 0.0
    (score if args.method in ('classify', 'query') else finish)(run, args, ds, model, device, seconds)


def export(folder, path, device):
    """Write the features of all pictures of a finished run as an .npz, with ids, split and the labels that are known:
    of a classifier's training pictures those it paid for, -1 for the others."""
    config, args, model, device = reopen(folder, device)
    ds = data_of(folder, config)
    few = args.method in ('classify', 'query')
    train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
    encode = representation(args, model, ds.x_train[train_ids] if args.method == 'pca' else None, device)[0]
    split = np.full(len(ds.x_train), 'train', '<U10')
    if not few:
        split[val_ids] = 'validation'
    y = torch.full((len(ds.x_train),), -1) if few or ds.y_train is None else ds.y_train
    if few:
        ids, paid = labels.LabelDatabase(folder / 'labels.sqlite', None, 0, ds.digest).revealed()
        y[ids] = paid
    parts = [(ds.x_train, y, split)]
    if ds.x_test is not None:
        y_test = torch.full((len(ds.x_test),), -1) if ds.y_test is None else ds.y_test
        parts.append((ds.x_test, y_test, np.full(len(ds.x_test), 'test', '<U10')))
    with torch.no_grad():
        features = [evaluate.in_chunks(encode, x.to(device)).cpu().numpy() for x, _, _ in parts]
    blob = io.BytesIO()
    np.savez(blob, features=np.concatenate(features), ids=np.concatenate([np.arange(len(x)) for x, _, _ in parts]),
             labels=np.concatenate([y.numpy() for _, y, _ in parts]), split=np.concatenate([s for *_, s in parts]))
    runs.write_atomic(path, blob.getvalue())
    print(f'{sum(len(h) for h in features):,} features of {features[0].shape[1]} -> {path}')


def predict(folder, path, device):
    """Print the class that a finished classifier gives each picture of a file, as CSV."""
    config, args, model, device = reopen(folder, device)
    if args.method not in ('classify', 'query'):
        raise ValueError(f'{folder} holds no classifier: it is a run of --method {args.method}; wanted one of classify '
                         'or query')
    x, shape, classes = data.read_pictures(path), tuple(config['data']['shape']), config['data']['classes']
    if x.shape[1:] != shape:
        raise ValueError(f'{path} holds pictures {tuple(x.shape[1:])}, and {folder} was trained on {shape}')
    with torch.no_grad():
        sure, pred = evaluate.in_chunks(answers(args, model, device), x.to(device))[:, :len(classes)].max(1)
    out = csv.writer(sys.stdout, lineterminator='\n')
    out.writerow(['index', 'class', 'name', 'confidence'])
    out.writerows([i, k, classes[k], f'{p:.4f}'] for i, (k, p) in enumerate(zip(pred.tolist(), sure.tolist())))


def compare(folders):
    """Print one table of these runs and write runs/report.html about them."""
    folders = [f for f in folders if Path(f).name != 'report.html']        # which runs/* names too
    if not folders:
        return print('runs/ holds no finished run yet')
    print(report.table(report.compare(folders)))
    Path('runs').mkdir(exist_ok=True)
    page.write_comparison(Path('runs/report.html'), folders)
    print('-> runs/report.html')


def finish(run, args, ds, model, device, seconds):
    """Pictures, then every measure (the test set is read here, once), then metrics.json."""
    train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
    x_train = ds.x_train[train_ids] if args.method == 'pca' else None      # a copy that only PCA needs
    encode, reconstruct = representation(args, model, x_train, device)
    began = time.monotonic()
    metrics, shown = evaluate.measure(ds, train_ids, val_ids, encode, reconstruct, args.seed, device=device)
    few = data.to_float(ds.x_train[val_ids][:16].to(device))
    with torch.no_grad():
        if reconstruct:
            report.write_png(run.folder / 'reconstructions.png', report.sheet(few, reconstruct(few)))
        if args.method == 'vae':
            mu = evaluate.in_chunks(encode, ds.x_train[val_ids].to(device))
            metrics['active_units'] = evaluate.active_units(mu)
            rows = nets.samples(model, args.latent, 4 * 16, data.generator(device, args.seed, 'samples')).split(16)
            report.write_png(run.folder / 'samples.png', report.sheet(*rows))
            pairs = zip(few[0::2].split(1), few[1::2].split(1))
            rows = [nets.interpolation(model, x1, x2, 16) for x1, x2 in pairs]
            report.write_png(run.folder / 'interpolation.png', report.sheet(*rows))
    if args.method == 'simclr':
        write_views(run.folder / 'views.png', few, views_of(args), args.seed)
    complete(run, args, ds, metrics, shown, seconds, began)


def complete(run, args, ds, metrics, shown, seconds, began):
    """Write report.html and then metrics.json, which makes the run a finished one, and say what it holds."""
    rows = runs.read_log(run.folder)
    metrics.update(method=args.method, epochs=rows[-1]['epoch'] if rows else None, seconds=round(seconds, 1),
                   measuring_seconds=round(time.monotonic() - began, 1))
    page.write(run.folder, run.config, metrics, shown, ds.classes, args.perplexity)
    run.write_metrics(metrics)
    print(report.describe(metrics), f'-> {run.folder}/report.html', sep='\n')


def write_views(path, x, views, seed):
    """Originals above two views of each."""
    g = data.generator(x.device, seed, 'views')
    report.write_png(path, report.sheet(x, data.augment(x, views, g), data.augment(x, views, g)))


def show_views(args):
    ds = data.load(args.data, args.limit)
    write_views(Path(args.show_views), data.to_float(ds.x_train[:16]), views_of(args), args.seed)
    print(f'wrote {args.show_views}: originals above two views of each')
