"""The recipes of classify and query: a classifier from labels that are paid for, one by one."""
import csv
import io
import math
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
import oracle
import runs
import stages
import train


def classify(run, args, ds, device, trial=None):
    """Pay for labels, learn a classifier from those pictures alone, and score it on the test set."""
    n = number_of_labels(args, ds)
    if trial and n < 5:
        raise ValueError(f'--search judges by a fifth of the labels, so --labels {n} is too few; wanted 5 or more')
    model = stages.beginning(run, args, device)
    if distributed.rank() == 0:
        paid = labels.LabelDatabase(run.folder / 'labels.sqlite', ds.y_train.__getitem__, n, *ds.key)
        if paid.spent < n:                                             # not resumed: choose, then pay
            paid.reveal(pick(args, ds, model, n, device))
        chosen = paid.revealed()
    ids, y = distributed.from_first(chosen if distributed.rank() == 0 else None)
    x, y = ds.x_train[ids], y.to(device)
    more = {}
    if trial:                                                          # a fifth of what was paid for judges
        x_val, y_val, x, y = x[:n // 5], y[:n // 5], x[n // 5:], y[n // 5:]
        predict = stages.representation(args, model, None, device, model.forward)[0]
        def accuracy():
            model.eval()
            return (evaluate.in_chunks(predict, x_val, device=device).argmax(1) == y_val).float().mean().item()
        more = {'check': trial.scored(None, accuracy), 'plan': partial(trial.plan, args.epochs)}
    repeat = -(-6000 // len(x))                                        # an epoch is 6,000 pictures or more
    x = data.Pictures(x, device, torch.arange(len(x)).repeat(repeat))
    seconds = stages.train_model(run, args, model, stages.objective_of(args), x, y=y.repeat(repeat), **more)
    if trial:
        trial.complete(run, seconds)
    elif distributed.rank() == 0:
        score(run, args, ds, model, device, seconds)


def number_of_labels(args, ds):
    """How many labels --labels stands for; ValueError if they can't be had."""
    if ds.y_train is None:
        raise ValueError('--method classify needs labels, and the data has no y_train')
    most = len(ds.labelled())
    n = round(args.labels * most) if args.labels < 1 else int(args.labels)
    if args.labels > 1 and n != args.labels:
        raise ValueError(f'--labels {args.labels:g} is neither a whole number nor a share below 1')
    if not len(ds.classes) <= n <= most:
        raise ValueError(f'--labels {args.labels:g} asks for {n:,} labels; wanted from {len(ds.classes)}, the '
                         f'number of classes, to {most:,}, the number of pictures that have one')
    return n


def pick(args, ds, model, n, device):
    """Ids (n,) of the pictures whose labels are asked for, by --pick."""
    pool = ds.labelled()
    if args.pick == 'balanced':
        return pool[labels.pick_balanced(n, ds.y_train[pool], args.seed)]
    if args.pick == 'coverage':
        encode = stages.representation(args, model, None, device)[0]
        h = evaluate.in_chunks(encode, ds.x_train, ids=pool, device=device)
        return pool[labels.pick_coverage(n, F.normalize(h, dim=1), args.seed)]
    return pool[labels.pick_random(n, len(pool), args.seed)]


def query(run, args, ds, device, trial=None):
    """From no label at all: ask for a few, learn from them and from all other pictures, ask for those that then
    say most, until the budget is spent or the accuracy reached; then close, and score on the test set."""
    check_query(args, ds)                                              # also of a resumed run: with other processes
    model = stages.beginning(run, args, device)
    asking = Asking(run, args, ds, model, device)
    objective = partial(stages.objective_of(args), labelled=lambda: asking.labelled)
    check = trial.scored(None, asking.estimate) if trial else None
    try:
        seconds = stages.train_model(run, args, model, objective, data.Pictures(ds.x_train, device), check=check,
                              plan=asking.plan, after_step=asking.after_step)
        if trial:
            trial.complete(run, seconds)
        elif distributed.rank() == 0:
            score(run, args, ds, model, device, seconds)
    finally:
        if args.oracle == 'web':
            asking.person.close()


def check_query(args, ds):
    """ValueError for a query that can't be made."""
    if args.oracle == 'data' and ds.y_train is None:
        raise ValueError('--method query needs labels to reveal, and the data has no y_train; --oracle web asks you')
    if args.oracle == 'file' and Path(args.answers).is_dir():
        raise ValueError(f'--answers {args.answers} is a folder; wanted a CSV file, which need not exist yet')
    if len(ds.classes) < 2:
        raise ValueError(f'--method query needs two classes or more, and the data names {len(ds.classes)}; '
                         'say for instance --classes cat,dog,other')
    if args.oracle != 'data' and distributed.world() > 1:
        raise ValueError(f'--oracle {args.oracle} works with one process only')
    most = len(ds.labelled() if args.oracle == 'data' else ds.x_train)
    if len(ds.classes) > most:
        raise ValueError(f'the data names {len(ds.classes):,} classes, more than the {most:,} pictures that can be '
                         'asked about')
    if not len(ds.classes) <= args.budget <= most:
        raise ValueError(f'--budget {args.budget:,} is out of range; wanted from {len(ds.classes)}, the number of '
                         f'classes, to {most:,}, the number of pictures that can be asked about')
    if args.until is not None and not args.audit and args.pick != 'random':
        raise ValueError('--until goes by an estimate, which needs some queries drawn at random: --audit above 0')
    if args.rounds > args.budget:
        raise ValueError(f'--rounds {args.rounds} is more than the --budget of {args.budget} labels')


class Asking:
    """The rounds of --method query: every --round-epochs epochs a round asks for labels, the last asks for none,
    and --closing epochs follow. What was asked is in the database, so that a resumed run asks nothing twice, puts
    the same questions again that were open, and trains each epoch on the labels that it had."""

    def __init__(self, run, args, ds, model, device):
        self.args, self.ds, self.model, self.device = args, ds, model, device
        self.pool = ds.labelled() if args.oracle == 'data' else torch.arange(len(ds.x_train))    # what can be asked
        self.labelled = None
        self.encode = stages.representation(args, model, None, device)[0]
        self.done, self.began, self.ahead, self.more, self.error = 0, 0.0, 0, True, None
        if distributed.rank() == 0:
            reveal = ds.y_train.__getitem__ if args.oracle == 'data' else None
            def database():
                return labels.LabelDatabase(run.folder / 'labels.sqlite', reveal, args.budget, *ds.key)
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
            if epoch > 1 and not rounds:
                raise ValueError(f'{self.paid.path} lost its labels, which --resume needs; --overwrite starts again')
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
        newest = max(self.paid.rounds().items())[1][1] if distributed.rank() == 0 else None
        return distributed.from_first(newest) or 0.0

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
            estimate, self.error = labels.estimate_accuracy(probs, agreed, self.paid.surprises(now - 5))
            if args.until is not None and estimate is not None and estimate - self.error >= args.until:
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
              + (f', estimated accuracy {100 * estimate:.1f}' if estimate is not None else '')
              + (f' +- {100 * self.error:.1f}' if self.error is not None else '') + ' %' * (estimate is not None)
              + (f', about {runs.clock(seconds / (epoch - 1) * left)} left' if now else ''), flush=True)


def score(run, args, ds, model, device, seconds):
    """Measure a classifier on the test set, once, and write metrics.json."""
    began, paid = time.monotonic(), labels.LabelDatabase(run.folder / 'labels.sqlite', None, 0, *ds.key)
    neighbours = write_predictions(run.folder, args, model, ds, device, paid) if args.method == 'query' else None
    answer = stages.answers(args, model, device, neighbours)
    metrics, shown = evaluate.measure_classifier(ds, answer, device, args.seed)
    rows = paid.history()
    shown['asked'] = ds.x_train[torch.tensor([i for i, *_ in rows])], rows, paid.rounds()
    estimates = [estimate for _, estimate in paid.rounds().values() if estimate is not None]
    if estimates:
        metrics.update(estimate=estimates[-1], rounds=len(paid.rounds()))
    stages.complete(run, args, ds, {'labels': paid.spent, **metrics}, shown, seconds, began)


def neighbours_of(folder, args, device):
    """stages.Neighbours of a query with more than one --encoder, as write_predictions left them; None of others."""
    if args.method != 'query' or not isinstance(args.encoder, list):
        return None
    path = folder / 'neighbours.pt'
    state = runs.load_checkpoint(path) if path.exists() else {}
    if not {'h', 'means', 'said', 'encoders'} <= state.keys():
        raise ValueError(f'{path} is missing or of another kind; --evaluate {folder} writes it anew')
    for encoder, digest in zip(args.encoder[1:], state['encoders']):
        if stages.weights_digest(encoder) != digest:
            raise ValueError(f'{encoder} was trained anew since; --evaluate {folder} measures this run with it')
    encode, _, _ = stages.look_around(args.encoder[1:], device, means=[mean.to(device) for mean in state['means']])
    return stages.Neighbours(encode, state['h'].to(device), state['said'].to(device), args.neighbours)


def write_predictions(folder, args, model, ds, device, paid):
    """predictions.csv and predictions.npz: of every training picture its class and how sure that is; where the
    oracle gave the label, that label, at confidence 1. With a second --encoder also neighbours.pt: what is so said by
    the network alone, beside the features by which neighbours are found; returns those stages.Neighbours, else None."""
    probs, classes = stages.probabilities(args, model, ds.x_train, device), ds.classes
    given, (ids, y), neighbours = torch.zeros(len(probs), dtype=torch.bool), paid.revealed(), None
    if isinstance(args.encoder, list):
        encode, h, means = stages.look_around(args.encoder[1:], device, ds.x_train)
        probs[ids.to(device)] = F.one_hot(y, len(classes)).to(probs)
        runs.write_state(folder / 'neighbours.pt', {'h': h.cpu(), 'means': [mean.cpu() for mean in means],
                                                    'said': probs.cpu(), 'encoders': [
                                                        stages.weights_digest(f) for f in args.encoder[1:]]})
        neighbours = stages.Neighbours(encode, h, probs, args.neighbours)
        probs = evaluate.pool(probs, neighbours.vote(h))
    confidence, label = (probs.cpu() / probs.cpu().sum(1, keepdim=True)).max(1)
    given[ids], confidence[ids], label[ids] = True, 1.0, y
    text, blob = io.StringIO(), io.BytesIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['id', 'label', 'class', 'confidence', 'given'])
    table.writerows([i, k, classes[k], f'{p:.4f}', int(g)] for i, (k, p, g) in
                    enumerate(zip(label.tolist(), confidence.tolist(), given.tolist())))
    np.savez(blob, label=label, confidence=confidence, given=given, classes=np.array(classes))
    runs.write_atomic(folder / 'predictions.csv', text.getvalue().encode())
    runs.write_atomic(folder / 'predictions.npz', blob.getvalue())
    return neighbours
