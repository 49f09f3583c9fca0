"""A classifier from few labels, each paid for: classify takes them at once, query asks in rounds for those that
say most, and learns from all other images too. `learn` trains, `measure` scores what came out.
"""
import math
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import augment
import data
import distributed
import evaluate
import features
import labels
import losses
import oracle
import report
import runs
import train
from device import clock
from pretrain import views_of

AUDIT_ROUNDS = 5                # the estimate of the accuracy goes by the random queries of so many last rounds
AUDITS_FOR_UNTIL = 30           # random queries a round, at least, where --until goes by that estimate
LEAST_EPOCH = 6000              # images that an epoch of classify shows, however few labels there are


# --------------------------------------------------------------------------------------- objectives

def classification(model, x, y, g, views=None, mixup=0.0):
    """Cross-entropy of a random view; with mixup (arXiv 1710.09412) of pairs of views, mixed by a share
    drawn from Beta(mixup, mixup) for the whole batch."""
    x = augment.augment(x, views, g)
    if not mixup:
        return losses.cross_entropy(model(x), y), {}
    share = float(np.random.default_rng(g.initial_seed()).beta(mixup, mixup))
    other = torch.randperm(len(x), generator=g, device=x.device)
    logits = model(torch.lerp(x[other], x, share))
    loss = share * losses.cross_entropy(logits, y) + (1 - share) * losses.cross_entropy(logits, y[other])
    return loss, {}


def consistency(model, x, g, labelled, views, threshold=0.95):
    """FixMatch (arXiv 2001.07685) with a mean teacher, model: nets.MeanTeacher.

    Cross-entropy of labelled images, a quarter as many as there are unlabelled x; plus, for x, that of the
    student's prediction for a strong view against the pseudo-label that the teacher gives a weak view, where it
    is more confident than `threshold`. labelled: (images uint8, labels) of those paid for. views: the strong ones.
    """
    x_labelled, y = labelled
    ids = torch.randint(len(y), (math.ceil(len(x) / 4),), generator=g, device=x.device)
    weak = augment.augment(x, augment.Views(crop=0.9, flip=views.flip, rotate=0, jitter=0), g)
    with torch.no_grad():
        confidence, pseudo_label = model.teacher(weak).float().softmax(1).max(1)
    strong = augment.augment(torch.cat([data.to_float(x_labelled[ids]), x]), views, g)
    logits = model.student(strong)
    accepted = (confidence > threshold).float()
    supervised = losses.cross_entropy(logits[:len(ids)], y[ids])
    unsupervised = losses.cross_entropy(logits[len(ids):], pseudo_label, accepted)
    return supervised + unsupervised, {'accepted': accepted.mean()}


# ------------------------------------------------------------------------------------------ classify

def check(args, ds):
    """ValueError for labels that can't be had."""
    known = args.oracle == 'data'
    if known and ds.y_train is None:
        raise ValueError(f'--method {args.method} needs labels, and the data has no y_train; '
                         + ('--oracle web asks you' if args.method == 'query' else '--answers CSV names a file'))
    if len(ds.classes) < 2:
        raise ValueError(f'--method {args.method} needs two classes or more, and the data names '
                         f'{len(ds.classes)}; say for instance --classes cat,dog,other')
    if not known and distributed.many():
        raise ValueError(f'--oracle {args.oracle} works with one process only')
    if args.method == 'classify':
        return number_of_labels(args, ds) if known else None
    most = len(ds.labelled()) if known else len(ds.x_train)
    if not len(ds.classes) <= args.budget <= most:
        raise ValueError(f'--budget {args.budget:,} is out of range; wanted from {len(ds.classes)}, the number of '
                         f'classes, to {most:,}, the number of images that can be asked about')
    if args.rounds > args.budget:
        raise ValueError(f'--rounds {args.rounds} is more than the --budget of {args.budget} labels')


def number_of_labels(args, ds):
    """How many labels --labels stands for; ValueError if they can't be had."""
    most = len(ds.labelled())
    n = round(args.labels * most) if args.labels < 1 else int(args.labels)
    if args.labels > 1 and n != args.labels:
        raise ValueError(f'--labels {args.labels:g} is neither a whole number nor a share below 1')
    if not len(ds.classes) <= n <= most:
        raise ValueError(f'--labels {args.labels:g} asks for {n:,} labels; wanted from {len(ds.classes)}, the '
                         f'number of classes, to {most:,}, the number of images that have one')
    return n


def open_database(run, ds, oracle=None, budget=0):
    """The labels of a run; without an oracle to read those that are there."""
    return labels.LabelDatabase(run.folder / 'labels.sqlite', oracle, budget, ds.digest)


def classify(run, args, ds, device):
    """Pay for labels and learn a classifier from those images alone; returns the network."""
    model = runs.initial_model(run.config, device)
    chosen = buy_labels(run, args, ds, model, device) if distributed.rank() == 0 else None
    ids, y = distributed.from_first(chosen)
    ids, y = ids[held_out(args, len(ids)):], y[held_out(args, len(y)):]
    repeat = math.ceil(LEAST_EPOCH / len(ids))
    x = data.Images(ds.x_train[ids], device, torch.arange(len(ids)).repeat(repeat))
    trainer = train.start(run, args, model, x)
    objective = partial(classification, views=views_of(args), mixup=args.mixup)
    trainer.fit(objective, x, last=args.epochs, of=args.epochs, y=y.to(device).repeat(repeat))
    return model


def buy_labels(run, args, ds, model, device):
    """(ids, labels) of --labels images picked by --pick, or of those in the --answers file."""
    if args.oracle == 'file':
        database = open_database(run, ds, budget=len(ds.x_train))
        known = oracle.File(database, ds.x_train, ds.classes, args.answers, run.folder, ds.names_train).read()
        known = {i: label for i, label in known.items() if label is not None}
        if not known:
            raise ValueError(f'{args.answers} holds no label')
        database = open_database(run, ds, lambda ids: [known[i] for i in ids], len(known))
        new = [i for i in sorted(known) if i not in set(database.asked().tolist())]
        database.query(new, round=0)
        return database.labels_of_round()
    n = number_of_labels(args, ds)
    database = open_database(run, ds, ds.y_train.__getitem__, n)
    if database.spent < n:                                      # not resumed: choose, then pay
        pool = ds.labelled()
        if args.pick == 'coverage':
            h = runs.Network(run.config, model, device).encode(ds.x_train, pool)
            picked = labels.pick_coverage(n, F.normalize(h, dim=1), args.seed)
        else:
            picked = labels.pick_random(n, len(pool), args.seed)
        database.query(pool[picked], round=0)
    return database.labels_of_round()


def held_out(args, n):
    """How many of n labels --search keeps to judge by."""
    return n // 5 if args.search else 0


# --------------------------------------------------------------------------------------------- query

def query(run, args, ds, device):
    """From no label at all: ask for a few, learn from them and from all other images, ask for those that then
    say most, until the budget is spent or the accuracy reached; then let the learning rate fall."""
    check(args, ds)                                             # also a resumed run: with other processes, say
    model = runs.initial_model(run.config, device)
    x = data.Images(ds.x_train, device)
    trainer = train.start(run, args, model, x)
    questions = Questions(run, args, ds, trainer) if distributed.rank() == 0 else None
    try:
        for now in range(args.rounds + 1):
            ids, y, more = distributed.from_first(questions.round(now) if questions else None)
            end = (now + 1) * args.round_epochs if more else now * args.round_epochs + args.decay_epochs
            planned = args.rounds * args.round_epochs + args.decay_epochs if more else end
            labelled = ds.x_train[ids].to(device), y.to(device)
            objective = partial(consistency, labelled=labelled, views=views_of(args), threshold=args.threshold)
            trainer.fit(objective, x, last=end, of=planned, after_step=partial(model.follow, args.ema))
            if not more:
                break
    finally:
        if questions:
            questions.close()
    return model


class Questions:
    """Which images to ask about, and the answers. All is in the database before it is used: a resumed run asks
    nothing twice, puts the questions that were open again, and trains each epoch on the labels that it had."""

    def __init__(self, run, args, ds, trainer):
        self.run, self.args, self.ds, self.trainer = run, args, ds, trainer
        self.device, self.network = trainer.device, runs.Network(run.config, trainer.model, trainer.device)
        self.pool = ds.labelled() if args.oracle == 'data' else torch.arange(len(ds.x_train))
        self.more, self.person = True, None
        ask_data = ds.y_train.__getitem__ if args.oracle == 'data' else None
        self.database = open_database(run, ds, ask_data, args.budget)
        if args.oracle == 'web':
            own = open_database(run, ds, budget=args.budget)    # for the threads that serve the page
            self.person = oracle.Web(own, ds.x_train, ds.classes, args.rounds, self.left, args.port)
        elif args.oracle == 'file':
            self.person = oracle.File(self.database, ds.x_train, ds.classes, args.answers, run.folder,
                                      ds.names_train)

    def close(self):
        if self.args.oracle == 'web':
            self.person.close()

    def left(self):
        """(seconds of training until the next questions or None, whether there will be any), for the page."""
        return self.trainer.time_left() or None, self.more

    def round(self, now):
        """(ids, labels) of all images paid for in the rounds up to this one, and whether it asked for any."""
        trained = self.trainer.epoch > now * self.args.round_epochs + 1 or self.trainer.step > 0
        if trained and now not in self.database.rounds():
            raise ValueError(f'{self.database.path} lost its labels, which --resume needs; '
                             '--overwrite starts again')
        while (now not in self.database.rounds() or self.database.unanswered(now)
               or not self.database.spent):
            if not self.database.unanswered(now):
                self.choose(now)
            if self.database.unanswered(now):
                self.trainer.save()                             # a person may take days
                if why_not := self.person.collect(now):
                    raise train.Stopped(why_not)
            self.say(now)
        asked, _ = self.database.rounds()[now]
        self.more = asked > 0 and now + 1 < self.args.rounds
        return *self.database.labels_of_round(now), asked > 0

    def choose(self, now):
        """Predict all images that can be asked about, estimate the accuracy, choose, and write it down.

        The ids in here are places in the pool of those images.
        """
        args, pool, seed = self.args, self.pool, f'{self.args.seed} round {now}'
        n = args.budget * (now + 1) // args.rounds - self.database.spent if now < args.rounds else 0
        taken = torch.searchsorted(pool, self.database.asked()).to(self.device)
        if len(taken) == len(pool) and not self.database.spent:
            raise ValueError('every image was skipped, so there is no label to learn from')
        order = labels.pick_random(len(pool), len(pool), seed).to(self.device)
        order = order[~torch.isin(order, taken)]
        if now == 0:
            ids, predictions, estimate = self.first(n, order), None, None
        else:
            ids, predictions, estimate = self.next(n, order, taken, seed, now)
        self.database.query(pool[ids.cpu()], now, predictions, estimate)

    def first(self, n, order):
        """Ids of the first round: random, or the k-means medoids of the features."""
        if self.args.pick == 'random':
            return order[:n]
        if self.args.encoder:
            h = F.normalize(self.network.encode(self.ds.x_train, self.pool), dim=1)
        else:                                                   # untrained features say less than pixels
            h = features.in_chunks(lambda x: F.normalize(x.flatten(1), dim=1), self.ds.x_train, ids=self.pool,
                                   device=self.device)
        ids = order.sort().values
        return ids[labels.pick_coverage(min(n, len(ids)), h[ids], self.args.seed)]

    def next(self, n, order, taken, seed, now):
        """(ids, what is predicted for each: (guess, confidence, agreed, audit), estimate) of a later round."""
        args = self.args
        h = self.network.encode(self.ds.x_train, self.pool)
        with torch.no_grad():
            probs = self.trainer.model.teacher.head(h).softmax(1)
        h = F.normalize(h, dim=1)
        audits = math.ceil(args.audit * n)
        if args.until is not None:
            audits = max(audits, min(AUDITS_FOR_UNTIL, n // 2))
        drawn = order[:n if args.pick == 'random' else audits]
        known, y = self.database.labels_of_round()
        known = torch.searchsorted(self.pool, known).to(self.device)
        ids, agreed = labels.pick_informative(n - len(drawn), probs, h, torch.cat([taken, drawn]), known,
                                              y.to(self.device), seed)
        ids = torch.cat([drawn, ids])
        estimate = labels.estimate_accuracy(self.database.audits(now - AUDIT_ROUNDS))
        if args.until is not None and estimate and estimate.low >= args.until:
            ids = ids[:0]
        confidence, guess = probs[ids].max(1)
        is_audit = torch.arange(len(ids)) < len(drawn)
        columns = guess, confidence, agreed[ids].int(), is_audit.int()
        return ids, list(zip(*(column.tolist() for column in columns))), estimate

    def say(self, now):
        """Print a round that is over."""
        args, seconds = self.args, self.trainer.seconds
        asked, given, skipped, wrong = self.database.round_counts(now)
        _, estimate = self.database.rounds()[now]
        by_class = torch.bincount(self.database.labels_of_round()[1], minlength=len(self.ds.classes)).tolist()
        parts = [f'round {now + 1}: {given} answered']
        if skipped:
            parts.append(f'{skipped} skipped')
        parts.append(f'{self.database.spent} of {args.budget} spent, by class {by_class}')
        if wrong is not None:
            parts.append(f'{wrong:.0%} of them had been predicted wrong')
        if now:
            parts.append(f'estimated accuracy {estimate or "not known: too few random answers"}')
            left = (args.rounds - now if asked else 0) * args.round_epochs + args.decay_epochs
            parts.append(f'about {clock(seconds / (self.trainer.epoch - 1) * left)} left')
        print(', '.join(parts), flush=True)


# ---------------------------------------------------------------------------------------- both of them

def learn(run, args, ds, device):
    """Train the classifier of --method classify or query; returns the network."""
    return classify(run, args, ds, device) if args.method == 'classify' else query(run, args, ds, device)


def validation_score(run, args, ds, model, device):
    """(score, what it is): more is better; what --search goes by."""
    database = open_database(run, ds)
    if args.method == 'query':
        estimate = database.rounds()[max(database.rounds())][1]
        if estimate is None:
            raise ValueError('--search of query goes by the estimated accuracy, and there are too few random '
                             'queries to tell; add --audit or --budget')
        return estimate.mean, 'the accuracy estimated from the random queries'
    ids, y = database.labels_of_round()
    n = held_out(args, len(ids))
    if not n:
        raise ValueError(f'--search judges by a fifth of the labels, and {len(ids)} are too few')
    pred = runs.Network(run.config, model, device).predict(ds.x_train[ids[:n]]).argmax(1).cpu()
    return (pred == y[:n]).float().mean().item(), 'the accuracy on a fifth of the labels paid for'


def measure(run, args, ds, model, device):
    """Score a classifier on the test set, once; write predictions.csv, report.html and metrics.json."""
    began, database = time.monotonic(), open_database(run, ds)
    network = runs.Network(run.config, model, device)
    if args.method == 'query':
        write_predictions(run.folder, network, ds, database)
    metrics, shown = evaluate.measure_classifier(ds, network.predict_batch, network.encode_batch, device, args.seed)
    history = database.history()
    shown['asked'] = ds.x_train[torch.tensor([row[0] for row in history])], history, database.rounds()
    metrics = {'labels': database.spent, **metrics}
    estimates = [estimate for _, estimate in database.rounds().values() if estimate]
    if estimates:
        last = estimates[-1]
        metrics.update(estimate=last.mean, estimate_low=last.low, estimate_high=last.high, audits=last.n)
    report.finish(run, ds, metrics, shown, began)


def write_predictions(folder, network, ds, database):
    """predictions.csv: of every training image its class and how confident that is (1 where the label was
    given); labels.csv: the labels that were given."""
    confidence, label = (t.cpu() for t in network.predict(ds.x_train).max(1))
    given, y = database.labels_of_round()
    confidence[given], label[given] = 1.0, y
    is_given = torch.zeros(len(label), dtype=torch.int64)
    is_given[given] = 1
    key, names = ('file', ds.names_train) if ds.names_train else ('id', range(len(label)))
    rows = [(name, ds.ids[k], ds.classes[k], f'{p:.4f}', g) for name, k, p, g in
            zip(names, label.tolist(), confidence.tolist(), is_given.tolist())]
    runs.write_csv(folder / 'predictions.csv', [key, 'label', 'class', 'confidence', 'given'], rows)
    rows = [(names[i], ds.classes[k]) for i, k in zip(given.tolist(), y.tolist())]
    runs.write_csv(folder / 'labels.csv', [key, 'class'], rows)
    print(f'-> {Path(folder) / "predictions.csv"}: the classes of all {len(label):,} training images')
