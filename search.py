"""Search of settings: a Sobol sequence over ranges of flags, hopeless trials stopped by the median rule."""
import argparse
import math
from pathlib import Path
from statistics import median

from scipy.stats import qmc

import distributed
import report
import runs
import stages
import train


def settings(ranges, n, seed):
    """n settings [{key: value}] that cover the ranges (key, low, high) evenly: the first n points of a scrambled
    Sobol sequence (Owen 1998). Between positive ends a factor of 8 or more apart it steps in logarithms; between
    whole ends, given as int, it takes whole numbers."""
    points = qmc.Sobol(len(ranges), seed=seed).random_base2(max(0, math.ceil(math.log2(n))))[:n]
    def value(u, low, high):
        v = low * (high / low) ** u if low > 0 and high / low >= 8 else low + (high - low) * u
        return round(v) if isinstance(low, int) else float(f'{v:.4g}')                # as it can be typed again
    return [{key: value(float(u), low, high) for u, (key, low, high) in zip(point, ranges)} for point in points]


def hopeless(curve, others):
    """True if a trial whose scores so far are `curve`, one an epoch, more is better, has not once been as good as the
    median of what the others, finished ones, had on average up to that epoch (Golovin et al. 2017, section 3.2).
    Judged from the third finished trial on."""
    means = [sum(other[:len(curve)]) / len(other[:len(curve)]) for other in others if len(other) >= len(curve)]
    return len(means) >= 3 and max(curve) < median(means)


class Trial:
    """One setting of a --search: scored on validation after every epoch, stopped when hopeless, never tested."""

    def __init__(self, folder, others, by_loss):
        self.folder, self.others, self.by_loss = folder, others, by_loss

    @property
    def curve(self):
        """Score after each epoch so far, more is better."""
        curve = [row['score'] for row in runs.read_log(self.folder) if row.get('score') is not None]
        if not curve and (self.folder / 'metrics.json').exists():
            raise ValueError(f'{self.folder}/log.jsonl has lost its scores; start again with --overwrite')
        return curve

    def scored(self, check, accuracy):
        """A check for train.fit that adds the score: minus the validation loss, or an accuracy."""
        def both():
            row = check() if check else {}
            return {**row, 'score': -row['val_loss'] if self.by_loss else accuracy()}
        return both

    def plan(self, epochs, epoch, seconds, pause):
        """Number of epochs: as many as planned, or no more if it is hopeless."""
        curve = self.curve[:epoch - 1]
        return distributed.from_first(epoch - 1 if curve and hopeless(curve, self.others) else epochs)

    def complete(self, run, seconds):
        """Write metrics.json without a look at the test set."""
        if distributed.rank() == 0:
            run.write_metrics({'method': run.config['args']['method'], 'split': 'validation',
                               'score': self.curve[-1], 'epochs': len(self.curve), 'seconds': round(seconds, 1)})


def search(args, typed, run):
    """Try --search settings from the ranges --over, each as a run of its own, and print them, the best first."""
    stages.determine(args)
    distributed.start(stages.pick_device(args.device))
    say = print if distributed.rank() == 0 else lambda *_: None
    shapes_loss = {'tau', 'crop', 'rotate', 'jitter', 'grey', 'blur', 'cutout', 'noise', 'beta'}
    by_loss = args.method in ('ae', 'conv', 'vae') and not shapes_loss & {key for key, *_ in args.over}
    by_knn = not by_loss and args.method not in ('classify', 'query')
    if args.method == 'query':
        least = {**vars(args), **{key: low for key, low, _ in args.over}}
        if least['rounds'] < 2 or not least['audit'] and args.pick != 'random':
            raise ValueError('--search of query goes by an estimate, which needs some queries drawn at random, --audit '
                             'above 0, and --rounds from 2 up')
    if by_knn and stages.load(args).y_train is None:
        raise ValueError('the losses of these settings can not be compared with each other, and the data has no labels '
                         'to judge by')
    say(f'{args.search} settings, scored by '
        + ('the validation loss' if by_loss else 'kNN on the validation pictures, for which all labels are looked at'
           if by_knn else {'classify': 'the accuracy on a fifth of the labels paid for',
                           'query': 'the accuracy estimated from the answers'}[args.method]))
    base, plain = ({k: v for k, v in of.items() if k not in ('search', 'over')} for of in (vars(args), typed))
    trials = []
    for i, setting in enumerate(settings(args.over, args.search, args.seed)):
        name = f'{args.name}-{i:02}'
        own = argparse.Namespace(**{**base, **setting, 'name': name})
        trial = Trial(Path('runs') / name, [t['curve'] for t in trials if t['end'] != 'diverged'], by_loss)
        try:
            run(own, {**plain, **setting}, trial)
            curve, end = trial.curve, ''
            if len(curve) < getattr(own, 'epochs', 0) and hopeless(curve, trial.others):   # not ended by --patience
                end = 'stopped'
        except train.Diverged as e:
            if distributed.world() > 1:                                    # the others may have seen nothing of it
                raise
            say(e)
            curve, end = [*trial.curve[:-1], -math.inf], 'diverged'
        trials.append({'name': name, 'setting': setting, 'curve': curve, 'end': end})
        say(f'{name}: ' + ', '.join(f'{k} {v:.4g}' for k, v in setting.items())
            + f': score {curve[-1]:.4f}' + (f', {end} after epoch {len(curve)}' if end else ''))
    ranked = sorted(trials, key=lambda t: (t['end'] != '', -t['curve'][-1]))
    if ranked[0]['end'] == 'diverged':
        raise ValueError('the training of every setting has diverged; try a lower --lr')
    say(report.table([['trial', *ranked[0]['setting'], 'score', 'epochs', '']] + [
        [t['name'], *(f'{v:.4g}' for v in t['setting'].values()), f'{t["curve"][-1]:.4f}', str(len(t['curve'])),
         t['end']] for t in ranked]))
    words = [runs.flag(k, v) for k, v in {**plain, **ranked[0]['setting']}.items()
             if k not in ('resume', 'overwrite', 'method', 'name')]
    say('best: python ssl.py --method', args.method, *words)
