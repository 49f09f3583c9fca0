"""The recipe of cluster and scan: pseudo-labels from the pictures alone, a network trained on them, better ones."""
import math
import time
from functools import partial

import torch
import torch.nn.functional as F

import cluster
import data
import distributed
import evaluate
import report
import runs
import stages


def find_clusters(run, args, ds, device):
    """--method cluster and scan: pseudo-labels from the pictures alone, a network trained on them, better ones."""
    _, h, _ = stages.look_around(args.encoder, device, ds.x_train)
    near = cluster.neighbours(h, min(args.neighbours, len(h) - 1))
    model = stages.beginning(run, args, device)
    rounds = Clustering(run, args, ds, model, device, near, h)
    objective, more = stages.objective_of(args), {'y': rounds.pred}
    if args.method == 'scan':
        objective, more = partial(objective, labelled=lambda: rounds.labelled), {
            'after_step': partial(model.follow, args.ema)}
    x = data.Pictures(ds.x_train, device)
    seconds = stages.train_model(run, args, model, objective, x, plan=rounds.plan, **more)
    if distributed.rank() == 0:
        score(run, args, ds, model, device, seconds)


def check(args, ds):
    """ValueError for clusters that can't be found."""
    if args.clusters > len(ds.x_train) // 2:
        raise ValueError(f'--clusters {args.clusters} is too many for {len(ds.x_train):,} pictures')


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
            done = 1 + max((int(p.stem[10:]) for p in self.run.folder.glob('iteration-*.pt')), default=-1)
            newest = runs.load_checkpoint(self.file(done - 1)) if done else None
            over = bool(newest and newest['row']['last'])                  # nothing is assigned anew after it
            if not over and (done < now or inside and done == now):
                raise ValueError(f'{self.run.folder} has lost its iteration-*.pt, which --resume needs; --overwrite '
                                 'starts again')
            if inside == 0 and now == done and not over:
                newest, done = self.assign(now, newest), done + 1
                over = newest['row']['last']
            at = min(now, done - 1)
            state = newest if at == done - 1 else runs.load_checkpoint(self.file(at))
            if inside == 0 and at == now:
                self.run.log({**state['row'], 'epoch': epoch})
            closing = self.args.closing if self.args.iterations else 0
            epochs = (done - 1 if over else self.args.iterations) * self.args.epochs + closing
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

    def assign(self, now, previous):
        """Assign all pictures, write that down with the weights it came from, and return it; previous: the state so
        returned by the iteration before, None in the first."""
        args, before = self.args, previous['pred'].to(self.device) if now else self.pred
        if args.method == 'scan':
            probs = stages.probabilities(args, self.model, self.ds.x_train, self.device) if now else cluster.scan_heads(
                self.h, self.near, args.clusters, args.heads, args.entropy, seed=args.seed)
            pred, chosen = probs.argmax(1), cluster.reliable(probs, self.near)
            chosen = chosen[::math.ceil(len(chosen) / MOST)]
        else:
            encode = stages.representation(args, self.model, None, self.device)[0]
            h = evaluate.in_chunks(encode, self.ds.x_train, device=self.device) if now else self.h
            pred = evaluate.kmeans(F.normalize(h, dim=1), args.clusters, seed=f'{args.seed} {now}')[0]
            pred = cluster.match(pred, before, args.clusters) if now else pred
            chosen = torch.arange(len(pred), device=self.device)
        judge = partial(cluster.criterion, near=self.near, K=args.clusters, entropy=args.entropy)
        own = pred
        stable, found, held = (pred == before).float().mean().item() if now else 0.0, judge(pred), False
        if now and found > judge(before) + HELD:                           # worse: go on with the one before
            pred, chosen, held = before, previous['chosen'], True
        sizes = torch.bincount(pred, minlength=args.clusters)
        row = {'iteration': now, 'stable': stable, 'live_clusters': int((sizes > 0).sum()), 'relied_on': len(chosen),
               'sizes': sizes.tolist(), 'criterion': found, 'held': held,
               'last': now == args.iterations or stable >= args.stable > 0}
        if self.ds.y_train is not None:                                    # to be looked at, never used
            known = self.ds.labelled()
            both = pred.cpu()[known], self.ds.y_train[known]
            row.update(acc=float(evaluate.hungarian_accuracy(*both)[0]), nmi=evaluate.nmi(*both),
                       ari=evaluate.ari(*both), purity=evaluate.purity(*both))
        state = {'model': self.model.state_dict(), 'pred': pred.cpu(), 'own': own.cpu(), 'row': row,
                 'chosen': chosen.cpu()}
        runs.write_state(self.file(now), state)
        print(report.iteration(row), flush=True)
        return state

    def finish(self):
        """final.pt, the network as it is now, and best.pt, the assignment with the lowest criterion; 'voted' tells that
        no network made it: it is the first, from the neighbours alone. With --iterations 0 there is no other."""
        best = {'criterion': math.inf}
        if self.args.iterations:
            pred = stages.probabilities(self.args, self.model, self.ds.x_train, self.device).argmax(1)
            best = {'model': self.model.state_dict(), 'pred': pred.cpu(), 'voted': False,
                    'criterion': cluster.criterion(pred, self.near, self.args.clusters, self.args.entropy)}
            runs.write_state(self.run.folder / 'final.pt', best)
        for path in sorted(self.run.folder.glob('iteration-*.pt')):
            state = runs.load_checkpoint(path)
            if state['row']['criterion'] < best['criterion']:
                best = {'model': state['model'], 'pred': state['own'], 'voted': state['row']['iteration'] == 0,
                        'criterion': state['row']['criterion']}
        runs.write_state(self.run.folder / 'best.pt', best)


def score(run, args, ds, model, device, seconds):
    """Measure best.pt on the test set, once, and write metrics.json and pictures."""
    began, best = time.monotonic(), runs.load_checkpoint(run.folder / 'best.pt')
    model.load_state_dict(best['model'])
    if best['voted']:
        encode, h, _ = stages.look_around(args.encoder, device, ds.x_train)
        answer = stages.Neighbours(encode, h, F.one_hot(best['pred'], args.clusters).float().to(device),
                                   cluster.CLOSE).say
    else:
        answer = stages.answers(args, model, device)
    metrics, shown = evaluate.measure_clusters(ds, answer, args.clusters, best['pred'], device)
    stages.complete(run, args, ds, {**metrics, 'criterion': best['criterion'], 'voted': best['voted']}, shown, seconds,
                    began)
