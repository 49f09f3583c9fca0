"""A classifier from few labels, each paid for. classify takes them at once; query asks in rounds for those
that say most, and learns from all other images too. `learn` trains, `measure` scores what came out.
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
import labels
import losses
import oracle
import report
import runs
import train
from pretrain import views_of

LEAST_EPOCH = 6000              # images that an epoch of classify shows, however few labels there are
AUDIT_ROUNDS = 5                # the accuracy is estimated from the random queries of so many last rounds
AUDITS_FOR_UNTIL = 30           # random queries a round, at least, where --until goes by that estimate


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
    student's prediction for a strong view against the pseudo-label that the teacher gives a weak view, where
    it is more confident than `threshold`. labelled: (images uint8, labels). views: the strong ones.
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


# ---------------------------------------------------------------------------------------- what is asked

def check(args, ds):
    """ValueError for labels that can't be had."""
    K, from_data = len(ds.classes), args.oracle == 'data'
    if from_data and ds.y_train is None:
        raise ValueError(f'--method {args.method} needs labels, and the data has no y_train; '
                         '--oracle web (query) asks you, --oracle labels.csv reads a CSV')
    if K < 2:
        raise ValueError(f'--method {args.method} needs two classes or more, and the data names {K}; '
                         'say for instance --classes cat,dog,other')
    if not from_data and distributed.many():
        raise ValueError(f'--oracle {args.oracle} works with one process only')
    most = len(ds.labelled()) if from_data else len(ds.x_train)
    if args.method == 'classify' and not from_data:
        read_answers(args, ds)                                  # tells what is wrong in it
        return                                                  # as many labels as the file has
    if not from_data and Path(args.oracle).is_file():
        answers_file(None, '', args, ds).read()
    n = number_of_labels(args, ds)
    if not K <= n <= most:
        raise ValueError(f'--labels asks for {n:,} labels; wanted from {K}, the number of classes, to '
                         f'{most:,}, the number of images that can be asked about')
    if getattr(args, 'rounds', 1) > n:
        raise ValueError(f'--rounds {args.rounds} is more than the --labels {n}')


def number_of_labels(args, ds):
    """How many labels --labels stands for: a share below 1 of what can be asked about, or their number."""
    if args.labels > 1 and args.labels % 1:
        raise ValueError(f'--labels {args.labels:g} is neither a whole number nor a share below 1')
    images = ds.labelled() if args.oracle == 'data' else ds.x_train
    return int(args.labels) if args.labels >= 1 else round(args.labels * len(images))


def open_database(folder, ds, oracle=None, budget=0):
    """The labels of a run folder; without a budget to read those that are there."""
    return labels.LabelDatabase(folder / 'labels.sqlite', oracle, budget, ds.digest)


# ------------------------------------------------------------------------------------------ classify

def classify(run, args, ds, device):
    """Pay for labels and learn a classifier from those images alone; returns the network."""
    model = runs.initial_model(run.config, device)
    bought = buy_labels(run, args, ds, device) if distributed.rank() == 0 else None
    ids, y = distributed.from_first(bought)
    first = held_out(args, len(ids))
    ids, y = ids[first:], y[first:].to(device)
    repeat = math.ceil(LEAST_EPOCH / len(ids))
    x = data.Images(ds.x_train[ids], device, torch.arange(len(ids)).repeat(repeat))
    objective = partial(classification, views=views_of(args), mixup=args.mixup)
    trainer = train.start(run, args, model, x)
    trainer.fit(objective, x, last=args.epochs, epochs=args.epochs, y=y.repeat(repeat))
    return model


def buy_labels(run, args, ds, device):
    """(ids, labels) of --labels images picked by --pick, or of those in a CSV."""
    database = open_database(run.folder, ds, budget=len(ds.x_train))
    if database.rounds():                                       # a resumed run has asked
        return database.labels()
    if args.oracle != 'data':
        known = read_answers(args, ds)
        picked, ask = torch.tensor(sorted(known)), lambda ids: [known[i] for i in ids]
    else:
        pool, n = ds.labelled(), number_of_labels(args, ds)
        if args.pick == 'coverage':
            h = runs.start_network(run.config, device).encode(ds.x_train, pool)
            picked = pool[labels.pick_coverage(n, F.normalize(h, dim=1), args.seed)]
        else:
            picked = pool[labels.pick_random(n, len(pool), args.seed)]
        ask = ds.y_train.__getitem__
    database = open_database(run.folder, ds, ask, len(picked))
    database.query(picked)
    return database.labels()


def answers_file(database, folder, args, ds):
    """The CSV of --oracle."""
    return oracle.File(database, ds.x_train, ds.classes, args.oracle, folder, ds.names_train, ds.ids)


def read_answers(args, ds):
    """{id: label} of the CSV of --oracle, without those that could not be told."""
    if not Path(args.oracle).is_file():
        raise ValueError(f'--oracle {args.oracle}: there is no such file')
    answers = answers_file(None, '', args, ds).read()
    known = {i: label for i, label in answers.items() if label is not None}
    if not known:
        raise ValueError(f'{args.oracle} holds no label')
    return known


def held_out(args, n):
    """How many of n labels --search keeps to judge by."""
    return n // 5 if args.search else 0


# --------------------------------------------------------------------------------------------- query

def query(run, args, ds, device):
    """From no label at all: ask for a few, learn from them and from all other images, ask for those that then
    say most, until the budget is spent or the accuracy reached; then let the learning rate fall."""
    check(args, ds)                                             # a resumed run may have other processes
    model = runs.initial_model(run.config, device)
    x = data.Images(ds.x_train, device)
    trainer = train.start(run, args, model, x)
    questions = Questions(run, args, ds, trainer) if distributed.rank() == 0 else None
    try:
        for now in range(args.rounds + 1):
            ids, y, more = distributed.from_first(questions.round(now) if questions else None)
            rounds = args.rounds if more else now
            planned = rounds * args.epochs + args.decay_epochs
            objective = partial(consistency, labelled=(ds.x_train[ids].to(device), y.to(device)),
                                views=views_of(args), threshold=args.threshold)
            trainer.fit(objective, x, last=(now + 1) * args.epochs if more else planned, epochs=planned,
                        after_step=partial(model.follow, args.ema))
            if not more:
                break
        if questions:
            write_predictions(run, ds, model, device)
        if args.oracle == 'web':
            questions.person.done(run.folder / 'predictions.csv')
    finally:
        if args.oracle == 'web':
            questions.person.close()
    return model


class Questions:
    """Which images to ask about, and the answers. All is in the database before it is used: a resumed run
    asks nothing twice, puts open questions again, and trains each epoch on the labels that it had."""

    def __init__(self, run, args, ds, trainer):
        self.run, self.args, self.ds, self.trainer, self.device = run, args, ds, trainer, trainer.device
        ask_data = ds.y_train.__getitem__ if args.oracle == 'data' else None
        self.pool = ds.labelled() if ask_data else torch.arange(len(ds.x_train))        # what can be asked
        self.budget = number_of_labels(args, ds)
        self.database = open_database(run.folder, ds, ask_data, self.budget)
        self.more = True
        if args.oracle == 'web':
            own = open_database(run.folder, ds, budget=self.budget)     # for the threads that serve the page
            self.person = oracle.Web(own, ds.x_train, ds.classes, args.rounds, self.left, args.port)
        elif args.oracle != 'data':
            self.person = answers_file(self.database, run.folder, args, ds)

    def left(self):
        """(seconds of training until the next questions or None, whether there will be any), for the page."""
        return self.trainer.time_left() or None, self.more

    def round(self, now):
        """(ids, labels) of all images paid for in the rounds up to this one, and did it ask for any?"""
        database, trainer = self.database, self.trainer
        begun = trainer.epoch > now * self.args.epochs + 1 or trainer.step > 0
        if begun and now not in database.rounds():
            raise ValueError(f'{database.path} lost its labels, which --resume needs; '
                             '--overwrite starts again')
        while now not in database.rounds() or database.unanswered(now) or not database.spent:
            if not database.unanswered(now):
                self.choose(now)
            if database.unanswered(now):
                trainer.save()                                  # a person may take days
                if why_not := self.person.collect(now):
                    raise train.Stopped(why_not)
            self.say(now)
        asked, _ = database.rounds()[now]
        self.more = asked > 0 and now + 1 < self.args.rounds
        return *database.labels(up_to=now), asked > 0

    def choose(self, now):
        """Choose the questions of a round and write them down. The ids in here are places in the pool."""
        args, pool, seed = self.args, self.pool, f'{self.args.seed} round {now}'
        n = self.budget * (now + 1) // args.rounds - self.database.spent if now < args.rounds else 0
        taken = torch.searchsorted(pool, self.database.asked()).to(self.device)
        if len(taken) == len(pool) and not self.database.spent:
            raise ValueError('every image was skipped, so there is no label to learn from')
        order = labels.pick_random(len(pool), len(pool), seed).to(self.device)
        order = order[~torch.isin(order, taken)]
        if now:
            ids, predictions, estimate = self.next(n, order, taken, seed, now)
        else:
            ids, predictions, estimate = self.first(n, order), None, None
        self.database.query(pool[ids.cpu()], now, predictions, estimate)

    def first(self, n, order):
        """Ids of the first round: random, or the k-means medoids of the features that the run starts from."""
        if self.args.pick == 'random':
            return order[:n]
        start = runs.start_network(self.run.config, self.device)
        h = F.normalize(start.encode(self.ds.x_train, self.pool), dim=1)
        ids = order.sort().values
        return ids[labels.pick_coverage(min(n, len(ids)), h[ids], self.args.seed)]

    def next(self, n, order, taken, seed, now):
        """(ids, (guess, confidence, agreed, audit) of each, Estimate or None) of a later round."""
        args, network = self.args, runs.Network(self.run.config, self.trainer.model, self.device)
        h = network.encode(self.ds.x_train, self.pool)
        with torch.no_grad():
            probs = self.trainer.model.teacher.head(h).softmax(1)
        audits = math.ceil(args.audit * n)
        if args.until is not None:
            audits = max(audits, min(AUDITS_FOR_UNTIL, n // 2))
        drawn = order[:n if args.pick == 'random' else audits]
        known, y = self.database.labels()
        known = torch.searchsorted(self.pool, known).to(self.device)
        ids, agreed = labels.pick_informative(n - len(drawn), probs, F.normalize(h, dim=1),
                                              torch.cat([taken, drawn]), known, y.to(self.device), seed)
        ids = torch.cat([drawn, ids])
        estimate = labels.estimate_accuracy(self.database.audits(now - AUDIT_ROUNDS))
        if args.until is not None and estimate and estimate.low >= args.until:
            ids = ids[:0]                                       # good enough: nothing more is asked
        confidence, guess = probs[ids].max(1)
        is_audit = (torch.arange(len(ids)) < len(drawn)).int()
        columns = guess, confidence, agreed[ids].int(), is_audit
        return ids, list(zip(*(column.tolist() for column in columns))), estimate

    def say(self, now):
        """Print a round that is over."""
        _, given, skipped, wrong = self.database.round_counts(now)
        _, estimate = self.database.rounds()[now]
        by_class = torch.bincount(self.database.labels()[1], minlength=len(self.ds.classes)).tolist()
        asked = f'round {now + 1}: {given} labels, {skipped} skipped' if given or skipped else 'the end'
        line = f'{asked}, {self.database.spent} of {self.budget} spent, by class {by_class}'
        if wrong is not None:
            line += f', {wrong:.0%} of them had been predicted wrong'
        if now:
            line += f', estimated accuracy {estimate or "not known: too few random answers"}'
        print(line, flush=True)


# ---------------------------------------------------------------------------------------- both of them

def learn(run, args, ds, device):
    """Train the classifier of --method classify or query; returns the network."""
    return classify(run, args, ds, device) if args.method == 'classify' else query(run, args, ds, device)


def validation_score(run, args, ds, model, device):
    """(score, what it is): more is better; what --search goes by."""
    database = open_database(run.folder, ds)
    if args.method == 'query':
        estimate = database.rounds()[max(database.rounds())][1]
        if estimate is None:
            raise ValueError('--search of query goes by the estimated accuracy, and there are too few random '
                             'queries to tell; add --audit or --labels')
        return estimate.mean, 'the accuracy estimated from the random queries'
    ids, y = database.labels()
    n = held_out(args, len(ids))
    if not n:
        raise ValueError(f'--search judges by a fifth of the labels, and {len(ids)} are too few')
    pred = runs.Network(run.config, model, device).predict(ds.x_train[ids[:n]]).argmax(1).cpu()
    return (pred == y[:n]).float().mean().item(), 'the accuracy on a fifth of the labels paid for'


def measure(run, args, ds, model, device):
    """Score a classifier on the test set, once; write report.html and metrics.json."""
    began, database = time.monotonic(), open_database(run.folder, ds)
    network = runs.Network(run.config, model, device)
    metrics, shown = evaluate.measure_classifier(ds, network.predict_batch, network.encode_batch, device,
                                                 args.seed)
    history, rounds = database.history(), database.rounds()
    shown['asked'] = ds.x_train[torch.tensor([row[0] for row in history])], history, rounds
    metrics = {'labels': database.spent, **metrics}
    _, estimate = rounds[max(rounds)]
    if estimate:
        metrics.update(estimate=estimate.mean, estimate_low=estimate.low, estimate_high=estimate.high,
                       audits=estimate.n)
    report.finish(run, ds, metrics, shown, began)


def write_predictions(run, ds, model, device):
    """predictions.csv: of every training image its class and how confident that is, 1 where the label was
    given; labels.csv: the labels that were given."""
    folder, network = run.folder, runs.Network(run.config, model, device)
    confidence, label = (t.cpu() for t in network.predict(ds.x_train).max(1))
    given, y = open_database(folder, ds).labels()
    confidence[given], label[given] = 1.0, y
    is_given = torch.zeros(len(label), dtype=torch.int64)
    is_given[given] = 1
    key, names = ds.row_names()
    rows = [(name, ds.ids[k], ds.classes[k], f'{p:.4f}', g) for name, k, p, g in
            zip(names, label.tolist(), confidence.tolist(), is_given.tolist())]
    runs.write_csv(folder / 'predictions.csv', [key, 'label', 'class', 'confidence', 'given'], rows)
    rows = [(names[i], ds.classes[k]) for i, k in zip(given.tolist(), y.tolist())]
    runs.write_csv(folder / 'labels.csv', [key, 'class'], rows)
    print(f'-> {folder / "predictions.csv"}: the classes of all {len(label):,} training images')
