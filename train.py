"""Training: AdamW, the learning rate's schedule, sharpness-aware minimisation, and the one loop.

An objective is a function (model, x, g) -> (loss, parts): x (B, C, H, W) float 0..1 on the device, g the
generator of this step, parts a dict of 0-d tensors to log. One that learns from labels or neighbours is
(model, x, y, g), y the rows of a tensor that belong to x. A method that has rounds calls `fit` for each.
"""
import math
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch

import data
import distributed
import features
import nets
from device import Progress, autocast, clock, generator

SAVE_EVERY = 60.0                                       # seconds between checkpoints


class Diverged(ValueError):
    """The loss, a weight or a feature is not finite."""


class Stopped(Exception):
    """Training was asked to stop by a signal, after it saved a checkpoint."""


@dataclass
class Settings:
    """How to train; lengths in epochs."""
    batch_size: int = 128
    lr: float = 1e-3                                    # the peak
    weight_decay: float = 0.0
    warmup: float = 0.0                                 # of the learning rate, linear
    decay_epochs: float = math.inf                      # at the end, half a cosine; inf: all after warm-up
    sam: float = 0.0                                    # radius of sharpness-aware minimisation; 0: none
    seed: int = 0
    amp: bool = False

    @classmethod
    def of(cls, args):
        """Those of a run's arguments; decay_epochs None stands for all epochs."""
        given = {f.name: getattr(args, f.name, None) for f in fields(cls)}
        return cls(**{name: value for name, value in given.items() if value is not None})


def optimizer(model, lr, weight_decay):
    """AdamW; weight decay spares biases and the scales of norms (arXiv 2002.05709, appendix B)."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{'params': [p for p in trained if p.ndim > 1], 'weight_decay': weight_decay},
              {'params': [p for p in trained if p.ndim <= 1], 'weight_decay': 0.0}]
    return torch.optim.AdamW(groups, lr=lr, fused=trained[0].device.type in ('cuda', 'cpu'))


def lr_scale(step, steps, warmup, decay):
    """Learning rate of a step as a share of its peak: linear warm-up, constant, and over the last `decay` of
    all steps, as far as warm-up leaves them, half a cosine to 0."""
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    decay = min(decay, steps - warmup)
    done = max(0, step - (steps - decay))
    return 0.5 * (1 + math.cos(math.pi * done / max(1, decay)))


@contextmanager
def sam_perturbation(model, rho):
    """The weights moved by rho along their gradient, and back at the end.

    There sharpness-aware minimisation takes the gradient that it descends by (arXiv 2010.01412, eq. 2).
    BatchNorm's statistics stay as they are.
    """
    moved = [p for p in model.parameters() if p.grad is not None]
    norms = [m for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    kept = [*moved, *(buffer for norm in norms for buffer in norm.buffers())]
    before = [t.detach().clone() for t in kept]
    length = torch.stack([p.grad.norm() for p in moved]).norm().clamp(min=1e-12)
    with torch.no_grad():
        for p in moved:
            p.add_(p.grad * (rho / length))
    yield
    with torch.no_grad():
        for t, old in zip(kept, before):
            t.copy_(old)


@contextmanager
def signals():
    """Yields a list that fills with the first SIGINT or SIGTERM; the second acts at once."""
    seen, old = [], {}

    def note(number, frame):
        seen.append(number)
        signal.signal(number, old[number])
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:      # nohup and the like: stay deaf
            old[number] = signal.signal(number, note)
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Trainer:
    """A model in training: its optimizer and how far it is. Continues from the run's checkpoint, to the bit.

    kept: a dict of tensors and plain values that a method saves with the state, such as cluster ids.
    """

    def __init__(self, model, run, settings):
        self.model, self.run, self.settings = distributed.sync_batchnorm(model), run, settings
        self.opt = optimizer(model, settings.lr, settings.weight_decay)
        self.device = next(model.parameters()).device
        self.epoch, self.step = 1, 0                    # the epoch that goes on, and its finished steps
        self.seconds, self.kept = 0.0, {}
        self.total = torch.zeros((), device=self.device)                # of the losses of this epoch
        self.ends, self.rate = 0, 0.0                   # when fit will end, by the clock; steps a second
        saved = distributed.from_first(run.load())
        if saved:
            self._restore(saved)
        run.trim_log(self.epoch - 1)
        self.saved_at = time.monotonic()

    def _restore(self, saved):
        try:
            self.model.load_state_dict(saved['model'])
            self.opt.load_state_dict(saved['optimizer'])
            self.epoch, self.step, self.kept = saved['epoch'], saved['step'], saved['kept']
            self.seconds, self.total = saved['seconds'], saved['total'].to(self.device)
        except (KeyError, RuntimeError, ValueError, AttributeError, TypeError):
            raise ValueError(f'{self.run.folder} holds a checkpoint of another network or version; '
                             'use another --name or --overwrite') from None

    def save(self):
        """Write a checkpoint. Raises Diverged, and keeps the one before, if a weight is not finite."""
        if not all(v.isfinite().all() for v in self.model.state_dict().values()):
            raise Diverged(self._not_finite('a weight'))
        self.run.save({'model': self.model.state_dict(), 'optimizer': self.opt.state_dict(),
                       'epoch': self.epoch, 'step': self.step, 'total': self.total, 'kept': self.kept,
                       'seconds': self.seconds})
        self.saved_at = time.monotonic()

    def fit(self, objective, x, last, epochs, y=None, validate=None, after_step=None):
        """Train on x, data.Images, to the end of epoch `last`.

        epochs: all those over which the learning rate runs. y: a tensor with a row for each image, if the
        objective takes them. validate() is called after each epoch; the dict that it returns is logged.
        Raises Stopped after a signal, once the state is saved, and Diverged when the loss is not finite.
        """
        if self.epoch > last:                           # a resumed run has been here
            return
        steps = data.steps_per_epoch(len(x), self.settings.batch_size)
        with signals() as stop:
            while self.epoch <= last:
                self._train_epoch(objective, x, y, last, epochs, after_step, stop)
                row = {'epoch': self.epoch, 'loss': self.total.item() / steps,
                       'lr': self.opt.param_groups[0]['lr'], **(validate() if validate else {}), **self.speed}
                row = distributed.from_first(row)
                if math.isnan(row.get('rank', 0.0)):
                    raise Diverged(self._not_finite('a feature of the validation images'))
                self.epoch, self.step, self.total = self.epoch + 1, 0, torch.zeros_like(self.total)
                self.run.log(row)
                Progress().say(epoch_line(row, epochs))
            self.save()
            if stop:
                raise Stopped(f'stopped after epoch {last}')

    def _train_epoch(self, objective, x, y, last, epochs, after_step, stop):
        settings, progress = self.settings, Progress()
        steps = data.steps_per_epoch(len(x), settings.batch_size)
        self.model.train()
        began, first, before = time.monotonic(), self.step, self.seconds
        order = data.batches(len(x), settings.batch_size, settings.seed, self.epoch, first, x.device)
        for step, ids, images in x.read((step, distributed.share(ids)) for step, ids in order):
            scale = lr_scale((self.epoch - 1) * steps + step, epochs * steps, settings.warmup * steps,
                             settings.decay_epochs * steps)
            for group in self.opt.param_groups:
                group['lr'] = settings.lr * scale
            batch = (data.to_float(images),) if y is None else (data.to_float(images), y[ids])
            self.total += self._update(objective, batch, step)
            if after_step:
                after_step()
            self.step, took = step + 1, time.monotonic() - began
            self.seconds, self.rate = before + took, (self.step - first) / took
            self.ends = time.monotonic() + ((last - self.epoch + 1) * steps - self.step) / self.rate
            if x.device.type == 'cpu' or step % 50 == 0 or self.step == steps:      # elsewhere each is a sync
                if not self.total.isfinite():
                    raise Diverged(self._not_finite('the loss'))
            if progress.due():
                progress.show(f'epoch {self.epoch}/{epochs} step {self.step}/{steps}  '
                              f'loss {self.total.item() / self.step:.4f}  '
                              f'{self.rate * len(x) / steps:,.0f} images/s  {clock(self.time_left())} left')
            if stop or time.monotonic() - self.saved_at > SAVE_EVERY:
                self.save()
            if stop:
                raise Stopped(f'stopped at epoch {self.epoch}, step {self.step} of {steps}')
        progress.clear()
        self.speed = {'images_per_s': round(self.rate * len(x) / steps, 1), 'seconds': round(self.seconds, 2)}

    def _update(self, objective, batch, step):
        """One step of the optimizer; returns the loss over all processes."""
        loss = self._backward(objective, batch, step)
        if self.settings.sam:
            with sam_perturbation(self.model, self.settings.sam):
                self._backward(objective, batch, step)
        self.opt.step()
        return loss

    def _backward(self, objective, batch, step):
        """Loss of a batch over all processes; leaves its gradients in place. A step repeats its draws."""
        own = [distributed.rank()] if distributed.rank() else []        # processes draw different views
        g = generator(self.device, self.settings.seed, self.epoch, step, *own)
        with autocast(self.device, self.settings.amp):
            loss, _ = objective(self.model, *batch, g)
        self.opt.zero_grad(set_to_none=True)
        loss.backward()
        return distributed.average_gradients(self.model, loss)

    def time_left(self):
        """Seconds until fit has reached its last epoch, by the speed so far."""
        return max(0.0, self.ends - time.monotonic())

    def _not_finite(self, what):
        return (f'{what} is not finite at epoch {self.epoch}, step {self.step}, learning rate '
                f'{self.opt.param_groups[0]["lr"]:.2g}; try a lower --lr or --no-amp (the last good '
                f'checkpoint, if there is one, stays in {self.run.folder})')


def start(run, args, model, x):
    """A Trainer with the run's settings; says first what is trained on what."""
    world = distributed.world()
    if len(x) // data.steps_per_epoch(len(x), args.batch_size) < world:
        raise ValueError(f'--batch-size {args.batch_size} is less than an image for each of the '
                         f'{world} processes')
    trainer = Trainer(model, run, Settings.of(args))
    where = f'{world} x {x.device}' if world > 1 else x.device
    precision = ' in bfloat16' if args.amp else ''
    Progress().say(f'{run.folder}: {args.method}, {nets.size(model):,} parameters on {where}{precision}; '
                   f'{len(x):,} images {tuple(x.shape[1:])}')
    return trainer


@torch.no_grad()
def validate(model, objective, x_val, batch_size, seed, amp):
    """{'val_loss', 'std', 'rank', 'collapsed', ...} on images kept out of training.

    The objective and its parts, and the health of the features: mean standard deviation, effective rank, and
    whether they have collapsed, to one point (deviations under a thousandth of their size) or one line.
    """
    model.eval()
    means, h = {}, []
    for i, part in enumerate(x_val.chunk(data.steps_per_epoch(len(x_val), batch_size))):
        x = data.to_float(part)
        with autocast(x_val.device, amp):
            loss, parts = objective(model, x, generator(x_val.device, seed, 'val', i))
            h.append(model.encode(x).float())
        for key, value in {'val_loss': loss, **parts}.items():
            means[key] = means.get(key, 0.0) + value.item() * len(part) / len(x_val)
    h = torch.cat(h)
    std, rank = h.std(0, unbiased=False).mean().item(), features.effective_rank(h)
    point, line = std < 1e-3 * h.abs().mean().item(), rank < 1.5 and h.shape[1] > 1
    return {**means, 'std': std, 'rank': rank, 'collapsed': len(h) >= 10 and (point or line)}


def epoch_line(row, epochs):
    """One epoch as a line; the loss stands beside what chance would give, where that is known."""
    known = {'recon': 'recon {:.4g}', 'kl': 'KL {:.1f}', 'chance': 'chance {:.3f}'}
    extra = ''.join(f'  {form.format(row[key])}' for key, form in known.items() if key in row)
    line = f'epoch {row["epoch"]}/{epochs}  loss {row["loss"]:.4f}'
    if 'val_loss' in row:
        line += f'  val {row["val_loss"]:.4f}{extra}  feature std {row["std"]:.3f}, rank {row["rank"]:.1f}'
    line += f'  {row["images_per_s"]:,.0f} images/s'
    if row.get('collapsed'):
        line += '\nWARNING: the features have collapsed: all images look the same to the encoder'
    return line
