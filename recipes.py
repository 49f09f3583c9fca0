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

import cluster
import data
import distributed
import evaluate
import labels
import nets
import oracle
import page
import report
import runs
import search as searching
import train


def main(args, typed, defaults):
    """Do what the arguments ask for; returns the exit code. ValueError or OSError for what a user can mend."""
    try:
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
                    k: '+'.join(Path(f).stem for f in ([v] if isinstance(v, str) else v))
                    if k in ('data', 'encoder') else v for k, v in typed.items()
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
        kept = [k for k in ('data', 'dataset', 'limit', 'classes') if k in args]
        vars(args).update({k: typed.get(k, before.get(k)) for k in kept})
    ds = load(args)
    if getattr(args, 'amp', False) is None:
        args.amp = args.net != 'fc' and train.amp_by_default(device)
    config = runs.describe(vars(args), ds, device)
    if getattr(args, 'encoder', None):
        config['encoder'] = [read_encoder(f, ds.shape) for f in np.atleast_1d(args.encoder).tolist()][0]
    run = runs.Run(folder, config, typed, args.resume, args.overwrite) if first else runs.Silent(folder)
    run.config, finished = distributed.from_first((run.config, run.finished) if first else None)
    args = argparse.Namespace(**run.config['args'])
    if finished and not trial:
        print(f'{run.folder} is already finished; --evaluate {run.folder} measures it again')
    elif not finished:
        try:
            recipe = RECIPES.get(args.method, represent)
            recipe(run, args, ds, device, **({'trial': trial} if trial else {}))
        except ValueError:
            run.withdraw()
            raise
    distributed.stop()


def load(args):
    """The data set of the flags, or of a run's config.json, which may be older than a flag; its classes named by
    --classes."""
    ds, names = data.load(args.data, args.limit, getattr(args, 'dataset', None)), getattr(args, 'classes', None)
    return data.named(ds, names) if names else ds


def represent(run, args, ds, device, trial=None):
    """Learn a representation from pictures alone, then measure it."""
    train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
    model, seconds = network_of(run.config, device), 0.0
    if 'epochs' in args:
        objective, x_val = objective_of(args), ds.x_train[val_ids].to(device)
        check = partial(train.validate, model, objective, x_val, args.batch_size, args.seed, args.amp)
        if trial:
            encode = representation(args, model, None, device)[0]
            check = trial.scored(check, partial(neighbours, ds, train_ids, val_ids, encode, model, device))
        seconds = train_model(run, args, model, objective, data.Pictures(ds.x_train, device, train_ids), check=check,
                              plan=trial and partial(trial.plan, args.epochs))
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


def classify(run, args, ds, device, trial=None):
    """Pay for labels, learn a classifier from those pictures alone, and score it on the test set."""
    if ds.y_train is None:
        raise ValueError('--method classify needs labels, and the data has no y_train')
    most = len(ds.labelled())
    n = round(args.labels * most) if args.labels < 1 else int(args.labels)
    if args.labels > 1 and n != args.labels:
        raise ValueError(f'--labels {args.labels:g} is neither a whole number nor a share below 1')
    if not len(ds.classes) <= n <= most:
        raise ValueError(f'--labels {args.labels:g} asks for {n:,} labels; wanted from {len(ds.classes)}, the '
                         f'number of classes, to {most:,}, the number of pictures that have one')
    model = beginning(run, args, device)
    if distributed.rank() == 0:
        paid = labels.LabelDatabase(run.folder / 'labels.sqlite', ds.y_train.__getitem__, n, ds.digest)
        if paid.spent < n:                                             # not resumed: choose, then pay
            paid.reveal(pick(args, ds, model, n, device))
        chosen = paid.revealed()
    ids, y = distributed.from_first(chosen if distributed.rank() == 0 else None)
    x, y = ds.x_train[ids], y.to(device)
    more = {}
    if trial:                                                          # a fifth of what was paid for judges
        x_val, y_val, x, y = x[:n // 5], y[:n // 5], x[n // 5:], y[n // 5:]
        predict = representation(args, model, None, device, model.forward)[0]
        def accuracy():
            model.eval()
            return (evaluate.in_chunks(predict, x_val, device=device).argmax(1) == y_val).float().mean().item()
        more = {'check': trial.scored(None, accuracy), 'plan': partial(trial.plan, args.epochs)}
    repeat = -(-6000 // len(x))                                        # an epoch is 6,000 pictures or more
    x = data.Pictures(x, device, torch.arange(len(x)).repeat(repeat))
    seconds = train_model(run, args, model, objective_of(args), x, y=y.repeat(repeat), **more)
    if trial:
        trial.complete(run, seconds)
    elif distributed.rank() == 0:
        score(run, args, ds, model, device, seconds)


def query(run, args, ds, device, trial=None):
    """From no label at all: ask for a few, learn from them and from all other pictures, ask for those that then
    say most, until the budget is spent or the accuracy reached; then close, and score on the test set."""
    if args.oracle == 'data' and ds.y_train is None:
        raise ValueError('--method query needs labels to reveal, and the data has no y_train; --oracle web asks you')
    if args.oracle != 'data' and len(ds.classes) < 2:
        raise ValueError(f'--oracle {args.oracle} needs two classes or more, and the data names {len(ds.classes)}; '
                         'say for instance --classes cat,dog,other')
    if args.oracle != 'data' and distributed.world() > 1:
        raise ValueError(f'--oracle {args.oracle} works with one process only')
    most = len(ds.labelled() if args.oracle == 'data' else ds.x_train)
    if not len(ds.classes) <= args.budget <= most:
        raise ValueError(f'--budget {args.budget:,} is out of range; wanted from {len(ds.classes)}, the number of '
                         f'classes, to {len(ds.labelled()):,}, the number of pictures that have a label')
    if args.until is not None and not args.audit and args.pick != 'random':
        raise ValueError('--until goes by an estimate, which needs some queries drawn at random: --audit above 0')
    if args.rounds > args.budget:
        raise ValueError(f'--rounds {args.rounds} is more than the --budget of {args.budget} labels')
    model = beginning(run, args, device)
    asking = Asking(run, args, ds, model, device)
    objective = partial(objective_of(args), labelled=lambda: asking.labelled)
    check = trial.scored(None, asking.estimate) if trial else None
    try:
        seconds = train_model(run, args, model, objective, data.Pictures(ds.x_train, device), check=check,
                              plan=asking.plan, after_step=asking.after_step)
        if trial:
            trial.complete(run, seconds)
        elif distributed.rank() == 0:
            score(run, args, ds, model, device, seconds)
    finally:
        if args.oracle == 'web':
            asking.person.close()


class Asking:
    """The rounds of --method query: every --round-epochs epochs a round asks for labels, the last asks for none,
    and --closing epochs follow. What was asked is in the database, so that a resumed run asks nothing twice, puts
    the same questions again that were open, and trains each epoch on the labels that it had."""

    def __init__(self, run, args, ds, model, device):
        self.args, self.ds, self.model, self.device = args, ds, model, device
        self.pool = ds.labelled() if args.oracle == 'data' else torch.arange(len(ds.x_train))    # what can be asked
        self.labelled = None
        self.encode = representation(args, model, None, device)[0]
        self.done, self.began, self.ahead, self.more = 0, 0.0, 0, True
        if distributed.rank() == 0:
            reveal = ds.y_train.__getitem__ if args.oracle == 'data' else None
            def database():
                return labels.LabelDatabase(run.folder / 'labels.sqlite', reveal, args.budget, ds.digest)
            self.paid = database()
            if args.oracle == 'web':
                self.person = oracle.Web(database(), ds.x_train, ds.classes, args.rounds, self.left)
            elif args.oracle == 'file':
                self.person = oracle.File(self.paid, ds.x_train, ds.classes, args.answers, run.folder)

    def plan(self, epoch, seconds, pause):
        """train.fit's plan: asks where a round is due, sets `labelled`, returns the number of epochs."""
        answer = None
        if distributed.rank() == 0:
            now, inside = divmod(epoch - 1, self.args.round_epochs)
            rounds = self.paid.rounds()
            due = now not in rounds and all(asked for asked, _ in rounds.values())
            while inside == 0 and (due or self.paid.unanswered(now) or not self.paid.spent):
                if not self.paid.unanswered(now):
                    self.ask(now)
                if self.paid.unanswered(now):
                    with pause() as stop:
                        if why := self.person.collect(now, stop):
                            raise train.Stopped(why)
                self.say(now, epoch, seconds)
                due, rounds = False, self.paid.rounds()
            ended = [r for r, (asked, _) in rounds.items() if not asked]
            last = ended[0] if ended else self.args.rounds
            answer = *self.paid.revealed(up_to=now), last * self.args.round_epochs + self.args.closing
            self.more = now + 1 < last
            ends = (now + 1) * self.args.round_epochs if self.more else answer[2]
            self.ahead = (ends - epoch + 1) * data.steps_per_epoch(len(self.ds.x_train), self.args.batch_size)
        ids, y, epochs = distributed.from_first(answer)
        self.labelled = self.ds.x_train[ids].to(self.device), y.to(self.device)
        self.done, self.began = 0, time.monotonic()
        return epochs

    def after_step(self):
        args = self.args
        self.model.follow(args.ema)
        self.done += 1

    def left(self):
        """(seconds of training until the next questions or the end, or None where it is not known yet; whether
        there will be questions)."""
        done = self.done
        return (time.monotonic() - self.began) / done * max(0, self.ahead - done) if done else None, self.more

    def estimate(self):
        """The newest estimate of the accuracy; 0 before there is one."""
        return max((r, estimate or 0.0) for r, (_, estimate) in self.paid.rounds().items())[1]

    def ask(self, now):
        """One round: predict all pictures that can be asked about, estimate the accuracy, choose, write it down; pay,
        where the labels are at hand. The ids in it are places in the pool of those pictures."""
        args, beliefs, estimate = self.args, None, None
        n = args.budget * (now + 1) // args.rounds - self.paid.spent if now < args.rounds else 0
        known, y = self.paid.revealed()
        known, y = torch.searchsorted(self.pool, known).to(self.device), y.to(self.device)
        taken = torch.searchsorted(self.pool, self.paid.asked()).to(self.device)
        if len(taken) == len(self.pool) and not self.paid.spent:
            raise ValueError('every picture was skipped, so there is no label to learn from')
        order = labels.pick_random(len(self.pool), len(self.pool), f'{args.seed} round {now}').to(self.device)
        order = order[~torch.isin(order, taken)]
        h = evaluate.in_chunks(self.encode, self.ds.x_train, ids=self.pool, device=self.device)
        probs, h = self.model.teacher.head(h).softmax(1).detach(), F.normalize(h, dim=1)
        if now:
            drawn = order[:n if args.pick == 'random' else math.ceil(args.audit * n)]
            ids, agreed = labels.pick_informative(n - len(drawn), probs, h, torch.cat([taken, drawn]), known, y,
                                                  f'{args.seed} round {now}')
            ids = torch.cat([drawn, ids])
            estimate = labels.estimate_accuracy(probs, agreed, self.paid.surprises(now - 5))
            if args.until is not None and estimate is not None and estimate >= args.until:
                ids = ids[:0]
            sure, guess = probs[ids].max(1)
            beliefs = [(*belief, int(i < len(drawn))) for i, belief in enumerate(
                zip(guess.tolist(), sure.tolist(), agreed[ids].int().tolist()))]
        elif args.pick == 'random':
            ids = order[:n]
        else:
            if not args.encoder:                                           # untrained features say less than pixels
                h = evaluate.in_chunks(lambda x: F.normalize(x.flatten(1), dim=1), self.ds.x_train, ids=self.pool,
                                       device=self.device)
            ids = order.sort().values
            ids = ids[labels.pick_coverage(min(n, len(ids)), h[ids], args.seed)]
        (self.paid.reveal if args.oracle == 'data' else self.paid.ask)(self.pool[ids.cpu()], now, beliefs, estimate)

    def say(self, now, epoch, seconds):
        """Print a round that is over."""
        args, estimate = self.args, self.paid.rounds()[now][1]
        asked, given, skipped, wrong = self.paid.tally(now)
        each = torch.bincount(self.paid.revealed()[1], minlength=len(self.ds.classes)).tolist()
        left = (args.rounds - now if asked else 0) * args.round_epochs + args.closing
        print(f'round {now}: {given} asked, ' + (f'{skipped} skipped, ' if skipped else '')
              + f'{self.paid.spent} of {args.budget} spent, by class {each}'
              + (f', {100 * wrong:.0f} % of them had been wrong' if wrong is not None else '')
              + (f', estimated accuracy {100 * estimate:.1f} %' if estimate is not None else '')
              + (f', about {runs.clock(seconds / (epoch - 1) * left)} left' if now else ''), flush=True)


def score(run, args, ds, model, device, seconds):
    """Measure a classifier on the test set, once, and write metrics.json."""
    began, paid = time.monotonic(), labels.LabelDatabase(run.folder / 'labels.sqlite', None, 0, ds.digest)
    metrics, shown = evaluate.measure_classifier(ds, answers(args, model, device), device, args.seed)
    rows = paid.history()
    shown['asked'] = ds.x_train[torch.tensor([i for i, *_ in rows])], rows, paid.rounds()
    if args.method == 'query':
        write_predictions(run.folder, probabilities(args, model, ds.x_train, device).cpu(), paid, ds.classes)
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


def write_predictions(folder, probs, paid, classes):
    """predictions.csv and predictions.npz: of every training picture its class and how sure that is; where the
    oracle gave the label, that label, at confidence 1."""
    confidence, label = (probs / probs.sum(1, keepdim=True)).max(1)
    given, (ids, y) = torch.zeros(len(probs), dtype=torch.bool), paid.revealed()
    given[ids], confidence[ids], label[ids] = True, 1.0, y
    text, blob = io.StringIO(), io.BytesIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['id', 'label', 'class', 'confidence', 'given'])
    table.writerows([i, k, classes[k], f'{p:.4f}', int(g)] for i, (k, p, g) in
                    enumerate(zip(label.tolist(), confidence.tolist(), given.tolist())))
    np.savez(blob, label=label, confidence=confidence, given=given, classes=np.array(classes))
    runs.write_atomic(folder / 'predictions.csv', text.getvalue().encode())
    runs.write_atomic(folder / 'predictions.npz', blob.getvalue())


def find_clusters(run, args, ds, device):
    """--method cluster and scan: pseudo-labels from the pictures alone, a network trained on them, better ones."""
    if args.clusters > len(ds.x_train) // 2:
        raise ValueError(f'--clusters {args.clusters} is too many for {len(ds.x_train):,} pictures')
    near, h = look_around(args, ds, device)
    model = beginning(run, args, device)
    rounds = Clustering(run, args, ds, model, device, near, h)
    objective, more = objective_of(args), {'y': rounds.pred}
    if args.method == 'scan':
        objective, more = partial(objective, labelled=lambda: rounds.labelled), {
            'after_step': partial(model.follow, args.ema)}
    seconds = train_model(run, args, model, objective, data.Pictures(ds.x_train, device), plan=rounds.plan, **more)
    if distributed.rank() == 0:
        score_clusters(run, args, ds, model, device, seconds)


def look_around(args, ds, device):
    """(ids (N, k) of each picture's neighbours, features (N, D)): centred and normalised features of all --encoder
    runs side by side; of the pixels without one."""
    encoders = [] if args.encoder else [lambda x: x.flatten(1)]
    for folder in args.encoder or ():
        config = runs.read_config(folder)
        model = load_model(Path(folder), config, device)
        encoders.append(representation(argparse.Namespace(**config['args']), model, None, device)[0])
    features = [evaluate.in_chunks(encode, ds.x_train, device=device) for encode in encoders]
    h = torch.cat([F.normalize(h - h.mean(0), dim=1) for h in features], 1)
    return cluster.neighbours(h, min(args.neighbours, len(h) - 1)), h


MOST = 20000        # pictures that stand in for labelled ones, at most
HELD = 0.2          # an assignment whose criterion is that much worse than the one before is not learned from


class Clustering:
    """The iterations of find_clusters: every --epochs epochs all pictures are assigned anew, until that changes
    nothing or --iterations are over; --closing epochs follow. Each assignment is a file, so that a resumed run
    trains on the very same, and best.pt is the one with the lowest cluster.criterion, which sees no label."""

    def __init__(self, run, args, ds, model, device, near, h):
        self.run, self.args, self.ds, self.model, self.device, self.near, self.h = run, args, ds, model, device, near, h
        self.pred = torch.zeros(len(near), dtype=torch.int64, device=device)         # in place: train.fit holds it
        self.labelled = None

    def plan(self, epoch, seconds, pause):
        """train.fit's plan: assigns where an iteration begins; returns the number of epochs."""
        now, inside = divmod(epoch - 1, self.args.epochs)
        answer = None
        if distributed.rank() == 0:
            last = self.last()
            if inside == 0 and last is None and not self.file(now).exists():
                self.assign(now, epoch)
            state = runs.load_checkpoint(self.file(min(now, self.last() or now)))
            if inside == 0 and (last is None or now <= last):
                self.run.log({**state['row'], 'epoch': epoch})
            last = self.last()
            epochs = (self.args.iterations if last is None else last) * self.args.epochs + self.args.closing
            if epoch > epochs:
                self.finish()
            answer = state['pred'], state['chosen'], epochs
        pred, chosen, epochs = distributed.from_first(answer)
        self.pred.copy_(pred)
        if self.args.method == 'scan':
            self.labelled = self.ds.x_train[chosen].to(self.device), pred[chosen].to(self.device)
        return epochs

    def file(self, now):
        return self.run.folder / f'iteration-{now:02}.pt'

    def last(self):
        """Number of the iteration after which nothing is assigned anew, or None while that isn't known."""
        done = sorted(self.run.folder.glob('iteration-*.pt'))
        return len(done) - 1 if done and runs.load_checkpoint(done[-1])['row']['last'] else None

    def assign(self, now, epoch):
        """Assign all pictures and write that down, with the weights it came from."""
        args, before = self.args, self.pred
        if now:
            before = runs.load_checkpoint(self.file(now - 1))['pred'].to(self.device)
        if args.method == 'scan':
            probs = probabilities(args, self.model, self.ds.x_train, self.device) if now else cluster.scan_heads(
                self.h, self.near, args.clusters, args.heads, args.entropy, seed=args.seed)[0]
            pred, chosen = probs.argmax(1), cluster.reliable(probs, self.near, args.threshold)
            chosen = chosen[::math.ceil(len(chosen) / MOST)]
        else:
            encode = representation(args, self.model, None, self.device)[0]
            h = evaluate.in_chunks(encode, self.ds.x_train, device=self.device) if now else self.h
            pred = evaluate.kmeans(F.normalize(h, dim=1), args.clusters, seed=f'{args.seed} {now}')[0]
            pred = cluster.match(pred, before, args.clusters) if now else pred
            chosen = torch.arange(len(pred), device=self.device)
        judge = partial(cluster.criterion, near=self.near, K=args.clusters, entropy=args.entropy)
        stable, found, held = (pred == before).float().mean().item() if now else 0.0, judge(pred), False
        if now and found > judge(before) + HELD:                           # worse: go on with the one before
            pred, chosen, held = before, runs.load_checkpoint(self.file(now - 1))['chosen'], True
        sizes = torch.bincount(pred, minlength=args.clusters)
        row = {'iteration': now, 'stable': stable, 'live_clusters': int((sizes > 0).sum()), 'relied_on': len(chosen),
               'sizes': sizes.tolist(), 'criterion': found, 'held': held,
               'last': now == args.iterations or stable >= args.stable}
        if self.ds.y_train is not None:                                    # to be looked at, never used
            known = self.ds.labelled()
            both = pred.cpu()[known], self.ds.y_train[known]
            row.update(acc=float(evaluate.hungarian_accuracy(*both)[0]), nmi=evaluate.nmi(*both),
                       ari=evaluate.ari(*both), purity=evaluate.purity(*both))
        runs.write_state(self.file(now), {'model': self.model.state_dict(), 'pred': pred.cpu(), 'row': row,
                                          'chosen': chosen.cpu()})
        print(report.iteration(row), flush=True)

    def finish(self):
        """best.pt and final.pt: the final assignment is made by the network as it is now."""
        state = {'model': self.model.state_dict(),
                 'pred': probabilities(self.args, self.model, self.ds.x_train, self.device).argmax(1).cpu()}
        final = cluster.criterion(state['pred'].to(self.device), self.near, self.args.clusters, self.args.entropy)
        runs.write_state(self.run.folder / 'final.pt', {**state, 'criterion': final})
        trained = [runs.load_checkpoint(path) for path in sorted(self.run.folder.glob('iteration-*.pt'))[1:]]
        best = min(trained, key=lambda s: s['row']['criterion'], default=None)
        if best is not None and best['row']['criterion'] < final:
            state, final = {'model': best['model'], 'pred': best['pred']}, best['row']['criterion']
        runs.write_state(self.run.folder / 'best.pt', {**state, 'criterion': final})


def probabilities(args, model, x, device):
    """Class or cluster probabilities (N, K) of uint8 pictures x."""
    K = getattr(model, 'teacher', model).head[-1].out_features
    return evaluate.in_chunks(answers(args, model, device), x, device=device)[:, :K]


def score_clusters(run, args, ds, model, device, seconds):
    """Measure best.pt on the test set, once, and write metrics.json and pictures."""
    began, best = time.monotonic(), runs.load_checkpoint(run.folder / 'best.pt')
    model.load_state_dict(best['model'])
    metrics, shown = evaluate.measure_clusters(ds, answers(args, model, device), args.clusters, best['pred'], device)
    complete(run, args, ds, {**metrics, 'criterion': best['criterion']}, shown, seconds, began)


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

    def plan(self, epochs, epoch, seconds, pause):
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
    if by_knn and load(args).y_train is None:
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


RECIPES = {'classify': classify, 'query': query, 'cluster': find_clusters, 'scan': find_clusters}


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
    pool = ds.labelled()
    if args.pick == 'balanced':
        return pool[labels.pick_balanced(n, ds.y_train[pool], args.seed)]
    if args.pick == 'coverage':
        encode = representation(args, model, None, device)[0]
        h = evaluate.in_chunks(encode, ds.x_train, ids=pool, device=device)
        return pool[labels.pick_coverage(n, F.normalize(h, dim=1), args.seed)]
    return pool[labels.pick_random(n, len(pool), args.seed)]


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
    if args.method in ('classify', 'cluster'):
        return partial(train.classification, views=views_of(args), mixup=args.mixup)
    if args.method in ('query', 'scan'):
        return partial(train.consistency, views=views_of(args), threshold=args.threshold)
    return partial(train.autoencoding, noise=args.noise)


def network_of(config, device):
    """The network of a run, from its config.json alone: initialised by the seed, on the device; None if it has none."""
    args, shape = argparse.Namespace(**config['args']), config['data']['shape']
    torch.manual_seed(args.seed)
    if args.method in RECIPES:
        begun = config.get('encoder')
        encoder = nets.encoder_of(network_of(begun, 'cpu')) if begun else nets.Encoder(args.net, shape, args.width)
        torch.manual_seed(args.seed)                                   # the same head, whatever the encoder
        K = args.clusters if 'clusters' in args else len(config['data']['classes'])
        model = nets.Classifier(encoder, K, args.head, args.freeze)
        model = nets.MeanTeacher(model) if args.method in ('query', 'scan') else model
    elif 'net' in args:
        model = nets.build(args.method, args.net, shape, args.width, getattr(args, 'latent', None))
    else:
        return None
    return model.to(device, memory_format=torch.channels_last)


def beginning(run, args, device):
    """The classifier that a run begins with: on the encoder of the first run --encoder, or on a fresh one."""
    model = network_of(run.config, device)
    if args.encoder:
        folder = Path(args.encoder if isinstance(args.encoder, str) else args.encoder[0])
        trained = nets.encoder_of(load_model(folder, runs.read_config(folder), device)).state_dict()
        for classifier in [model.student, model.teacher] if args.method in ('query', 'scan') else [model]:
            classifier.encoder.load_state_dict(trained)
    return model


def read_encoder(folder, shape):
    """The part of a run's config.json that says what its encoder is; ValueError if it can't be begun with."""
    config = runs.read_config(folder)
    if tuple(config['data']['shape']) != tuple(shape):
        raise ValueError(f'--encoder {folder} was trained on pictures {tuple(config["data"]["shape"])}, '
                         f'and the data has {tuple(shape)}')
    if 'net' not in config['args']:
        raise ValueError(f'{folder} holds no encoder: it is a run of --method {config["args"]["method"]}')
    return {key: config[key] for key in ('args', 'data', 'encoder') if key in config}


def load_model(folder, config, device):
    """The network of a run folder, as trained."""
    model = network_of(config, device)
    return load_weights(model, folder) if 'lr' in config['args'] else model


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
    return config, args, load_model(folder, config, device) if 'net' in args else None, device


def data_of(folder, config):
    """The data set that a run was made from."""
    args = argparse.Namespace(**config['args'])
    ds = load(args)
    if ds.digest != config['data']['digest']:
        raise ValueError(f'{folder} was made from other data than '
                         f'{args.data or getattr(args, "dataset", None) or "Fashion-MNIST here"}')
    return ds


def evaluate_again(folder, now):
    """Load a finished run's checkpoint and write its measures, pictures and page anew."""
    config, args, model, device = reopen(folder, now.device)
    ds, args.perplexity = data_of(folder, config), now.perplexity
    run = runs.Run(folder, config, resume=True)
    seconds = runs.read_json(folder / 'metrics.json').get('seconds') or 0.0
    (score_clusters if args.method in ('cluster', 'scan') else score if args.method in RECIPES else finish)(
        run, args, ds, model, device, seconds)


def export(folder, path, device):
    """Write the features of all pictures of a finished run as an .npz, with ids, split and the labels that are known:
    of a classifier's training pictures those it paid for, -1 for the others."""
    config, args, model, device = reopen(folder, device)
    ds = data_of(folder, config)
    few = args.method in RECIPES
    train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
    encode = representation(args, model, ds.x_train[train_ids] if args.method == 'pca' else None, device)[0]
    split = np.full(len(ds.x_train), 'train', '<U10')
    if not few:
        split[val_ids] = 'validation'
    y = torch.full((len(ds.x_train),), -1) if few or ds.y_train is None else ds.y_train
    if args.method in ('classify', 'query'):
        ids, paid = labels.LabelDatabase(folder / 'labels.sqlite', None, 0, ds.digest).revealed()
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
    config, args, model, device = reopen(folder, device)
    if args.method not in ('classify', 'query'):
        raise ValueError(f'{folder} holds no classifier: it is a run of --method {args.method}; wanted one of classify '
                         'or query')
    x, shape, classes = data.read_pictures(path), tuple(config['data']['shape']), config['data']['classes']
    if x.shape[1:] != shape:
        raise ValueError(f'{path} holds pictures {tuple(x.shape[1:])}, and {folder} was trained on {shape}')
    with torch.no_grad():
        sure, pred = probabilities(args, model, x, device).max(1)
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
    ds = load(args)
    write_views(Path(args.show_views), data.to_float(ds.x_train[:16]), views_of(args), args.seed)
    print(f'wrote {args.show_views}: originals above two views of each')
