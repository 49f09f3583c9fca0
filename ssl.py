"""Learn what pictures are without labels, and measure what was learned: the command line."""
if __name__ == 'ssl':   # imported, not run: torch, urllib and pip mean the standard library's ssl
    import os
    import sys
    from importlib.machinery import SourceFileLoader
    __file__ = os.path.join(os.path.dirname(os.__file__), 'ssl.py')
    SourceFileLoader('ssl', __file__).exec_module(sys.modules['ssl'])

else:
    import argparse
    import difflib
    import os
    import sys
    import time
    from functools import partial
    from pathlib import Path

    # Defaults that depend on the method; a method that is missing in a row does not take the flag.
    NETS = ('ae', 'conv', 'vae', 'simclr')
    PER_METHOD = {
        'net': dict(ae='fc', conv='resnet', vae='resnet', simclr='resnet', random='resnet', classify='resnet'),
        'width': dict(ae=1.0, conv=0.5, vae=0.5, simclr=1.0, random=1.0, classify=1.0),
        'latent': dict(ae=64, conv=64, vae=64, pca=64),
        'epochs': dict(ae=5, conv=5, vae=5, simclr=7, classify=20),
        'batch_size': dict(ae=128, conv=128, vae=128, simclr=512, classify=128),
        'lr': dict(ae=1e-3, conv=2e-3, vae=2e-3, simclr=4e-3, classify=1e-3),
        'weight_decay': dict(ae=0.0, conv=0.0, vae=0.0, simclr=1e-4, classify=5e-4),
        'warmup': dict(ae=0.0, conv=0.5, vae=0.5, simclr=0.5, classify=1.0),
        'schedule': dict(ae='constant', conv='cosine', vae='cosine', simclr='cosine', classify='cosine'),
        'patience': dict(ae=5, conv=5, vae=5),
        'min_delta': dict(ae=0.001, conv=0.0, vae=0.0),
        'noise': dict(ae=0.0, conv=0.0, simclr=0.0, classify=0.0),
        'beta': dict(vae=1.0),
        'likelihood': dict(vae='bernoulli'),
        'tau': dict(simclr=0.2),
        'crop': dict(simclr=0.3, classify=0.7),
        'flip': dict(simclr=True, classify=True),
        'rotate': dict(simclr=10.0, classify=5.0),
        'jitter': dict(simclr=0.4, classify=0.2),
        'blur': dict(simclr=0.0, classify=0.0),
        'cutout': dict(simclr=0.0, classify=0.3),
        'amp': dict.fromkeys(NETS + ('random', 'classify')),
        'save_every': dict.fromkeys(NETS + ('classify',), 60.0),
        'encoder': dict(classify=None),
        'labels': dict(classify=0.1),
        'pick': dict(classify='random'),
        'freeze': dict(classify=False),
        'head': dict(classify='linear'),
        'mixup': dict(classify=0.2),
    }
    METHODS = {'ae': 'fully connected autoencoder', 'conv': 'convolutional residual autoencoder',
               'vae': 'variational autoencoder', 'simclr': 'contrastive learning',
               'classify': 'classifier from few labels', 'random': 'untrained encoder', 'pixels': 'raw pixels',
               'pca': 'principal components'}
    EPILOG = """examples, with what two CPU cores gave on Fashion-MNIST:
  python ssl.py --method ae                      5 epochs in about 10 s
  python ssl.py --method simclr --tau 0.5        another temperature, kept as runs/simclr-tau=0.5
  python ssl.py --method conv --data my.npz      your own pictures: x_train (N, H, W) or (N, H, W, 3) uint8
  python ssl.py --compare                        one table of all finished runs"""


# ------------------------------------------------------------------------------------- arguments

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f'ssl.py: {message}\n')           # one sentence, without the usage lines

    def number(kind, low, high, above=False):
        """Type of a flag: an int or float in low..high (above: low itself is refused)."""
        def parse(text):
            wanted = f'wanted {"a whole number" if kind is int else "a number"} ' \
                     f'{"above" if above else "from"} {low:g} to {high:g}'
            try:
                value = kind(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f'{text!r} is not a number; {wanted}') from None
            if not low <= value <= high or (above and value == low):             # also refuses nan
                raise argparse.ArgumentTypeError(f'{text} is out of range; {wanted}')
            return value
        return parse

    def choice(*names):
        """Type of a flag: one of the names; a misspelt one is answered with the nearest."""
        def parse(text):
            if text not in names:
                near = difflib.get_close_matches(text, names, 1)
                hint = f'did you mean {near[0]}? ' if near else ''
                raise argparse.ArgumentTypeError(f'{text!r} is not known; {hint}wanted one of {", ".join(names)}')
            return text
        return parse

    def make_parser():
        p = Parser(prog='ssl.py', description=__doc__, epilog=EPILOG, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
        count, positive, share = number(int, 1, 10**9), number(float, 0, 1e9, above=True), number(float, 0, 1)

        def flag(group, name, help, default=None, **kwargs):
            """Add a flag; its help ends with its default, taken from where the default is kept."""
            per = PER_METHOD.get(name.strip('-').replace('-', '_'))
            if per and next(iter(per.values())) is not None:
                values = set(map(str, per.values()))
                one = next(iter(per.values()))
                default = one if len(values) == 1 and set(per) >= set(NETS) else ', '.join(
                    f'{m} {v}' for m, v in per.items()) if len(values) > 1 else f'{one}; {", ".join(per)} only'
            suffix = f' (default: {default})' if default is not None else ''
            group.add_argument(name, help=(help + suffix).replace('%', '%%'), **kwargs)

        g = p.add_argument_group('what to do')
        flag(g, '--method', 'train it (or, for the last three, just measure): ' + ', '.join(
            f'{k} = {v}' for k, v in METHODS.items()), type=choice(*METHODS), metavar='NAME')
        flag(g, '--evaluate', 'measure a finished run again', metavar='RUN')
        flag(g, '--compare', 'print one table of these runs; all in runs/ when none is named', nargs='*', metavar='RUN')
        flag(g, '--show-views', 'write originals and two augmented views of each as a PNG, and stop',
             nargs='?', const='views.png', metavar='PNG')
        flag(g, '--fetch', 'find or download Fashion-MNIST, say where it is, and stop', action='store_true')

        g = p.add_argument_group('data and run folder')
        flag(g, '--data', 'folder of IDX files or an .npz with x_train and, optionally, y_train, x_test, y_test '
             '(default: Fashion-MNIST, downloaded if it is nowhere)', metavar='PATH')
        flag(g, '--limit', 'use only the first N training pictures', type=number(int, 20, 10**9), metavar='N')
        flag(g, '--val', 'training pictures kept for validation, a tenth of all at most', 5000, type=count, metavar='N')
        flag(g, '--name', 'run folder under runs/ (default: the method and what differs from its defaults)')
        flag(g, '--resume', 'continue an unfinished run to the same result; a finished one is left alone',
             action='store_true')
        flag(g, '--overwrite', 'start again in an existing run folder', action='store_true')
        flag(g, '--save-every', 'seconds between checkpoints', type=positive, metavar='S')
        flag(g, '--device', 'cuda, cuda:1, mps or cpu (default: the best there is)', metavar='NAME')
        flag(g, '--seed', 'of weights, split, order, augmentation', 0, type=number(int, 0, 2**31 - 1), metavar='N')

        g = p.add_argument_group('network')
        flag(g, '--net', 'encoder: fc, conv or resnet', type=choice('fc', 'conv', 'resnet'))
        flag(g, '--width', 'scales the units or channels of every layer', type=number(float, 0.1, 32), metavar='X')
        flag(g, '--latent', 'size of the code', type=number(int, 1, 4096), metavar='D')

        g = p.add_argument_group('training')
        flag(g, '--epochs', 'passes over the training pictures', type=number(int, 0, 10**6), metavar='N')
        flag(g, '--batch-size', 'pictures a step', type=number(int, 2, 10**6), metavar='B')
        flag(g, '--lr', 'peak learning rate of AdamW', type=positive)
        flag(g, '--weight-decay', 'not applied to norms and biases', type=number(float, 0, 10), metavar='X')
        flag(g, '--warmup', 'epochs of linear warm-up', type=number(float, 0, 1e6), metavar='N')
        flag(g, '--schedule', 'learning rate after warm-up, per step', type=choice('constant', 'cosine'),
             metavar='NAME')
        flag(g, '--patience', 'stop after N epochs without a better validation loss; 0 never',
             type=number(int, 0, 10**6), metavar='N')
        flag(g, '--min-delta', 'what counts as better', type=number(float, 0, 1e6), metavar='X')
        flag(g, '--amp', 'bfloat16 in the network, losses in float32 (default: where it is faster)',
             action=argparse.BooleanOptionalAction)

        g = p.add_argument_group('methods')
        flag(g, '--noise', 'std of noise added to the input (ae, conv: denoising) or to each view (simclr), on the '
             '0..1 scale', type=number(float, 0, 10), metavar='STD')
        flag(g, '--beta', 'weight of the KL term', type=number(float, 0, 1e6))
        flag(g, '--likelihood', 'of a pixel: bernoulli or gaussian', type=choice('bernoulli', 'gaussian'),
             metavar='NAME')
        flag(g, '--tau', 'temperature of NT-Xent', type=number(float, 0.001, 100), metavar='T')

        g = p.add_argument_group('few labels')
        flag(g, '--encoder', 'run folder whose encoder to start from; without it from scratch', metavar='RUN')
        flag(g, '--labels', 'how many labels to pay for, or below 1 their share',
             type=number(float, 0, 1e9, above=True), metavar='N')
        flag(g, '--pick', 'which: random, coverage (k-means medoids of the encoder\'s features) or balanced (as many '
             'of each class, for comparison with benchmarks: it looks at labels nobody paid for)',
             type=choice('random', 'coverage', 'balanced'))
        flag(g, '--freeze', 'train only the head; the encoder keeps every bit', action=argparse.BooleanOptionalAction)
        flag(g, '--head', 'linear, or mlp of two layers', type=choice('linear', 'mlp'))
        flag(g, '--mixup', 'alpha of mixup; 0 is none', type=number(float, 0, 100), metavar='ALPHA')

        g = p.add_argument_group('views')
        flag(g, '--crop', 'smallest share of the area a crop keeps; 1 is no crop', type=number(float, 0.01, 1),
             metavar='X')
        flag(g, '--flip', 'mirror left-right half of the time', action=argparse.BooleanOptionalAction)
        flag(g, '--rotate', 'degrees, either way', type=number(float, 0, 180), metavar='DEG')
        flag(g, '--jitter', 'brightness, contrast; on colour saturation and, a quarter of it, hue', type=share,
             metavar='X')
        flag(g, '--blur', 'share of pictures blurred', type=share, metavar='X')
        flag(g, '--cutout', 'side of an erased square as a share of the picture', type=share, metavar='X')
        return p

    def parse(argv):
        """(args with every default resolved, dict of what was typed); exits with a sentence on a mistake."""
        parser = make_parser()
        typed, unknown = parser.parse_known_args(argv)
        typed = vars(typed)
        if unknown:
            flags = [o for a in parser._actions for o in a.option_strings]
            near = difflib.get_close_matches(unknown[0].split('=')[0], flags, 1)
            parser.error(f'{unknown[0]} is not known' + (f'; did you mean {near[0]}?' if near else '; see --help'))
        method = typed.get('method', 'simclr' if 'show_views' in typed else None)
        if method is None and not {'evaluate', 'compare', 'fetch'} & set(typed):
            parser.error('say what to do, for instance: python ssl.py --method simclr (--help lists the rest)')
        for key in {'net', 'width'} & set(typed) if 'encoder' in typed else ():
            parser.error(f'--{key} is that of the --encoder run; leave it out')
        for key in typed:
            if method and key in PER_METHOD and method not in PER_METHOD[key]:
                parser.error(f'--{key.replace("_", "-")} does nothing for --method {method}; '
                             f'it is for {", ".join(PER_METHOD[key])}')
        if 'name' in typed and (not typed['name'] or Path(typed['name']).name != typed['name']):
            parser.error(f'--name {typed["name"]!r} is not a plain folder name')
        if 'resume' in typed and 'overwrite' in typed:
            parser.error('--resume and --overwrite exclude each other')
        plain = dict(method=method, data=None, limit=None, val=5000, name=None, resume=False, overwrite=False,
                     device=None, seed=0)
        own = {key: per[method] for key, per in PER_METHOD.items() if method in per}
        return argparse.Namespace(**{**plain, **own, **typed}), typed, {**plain, **own}


# --------------------------------------------------------------------------------------- commands

    def main(argv=None):
        args, typed, defaults = parse(argv)
        try:
            import data
            import distributed
            import report
            import runs
            import train
            try:
                if 'fetch' in typed:
                    print(f'Fashion-MNIST is in {data.find_fashion_mnist()}')
                elif 'compare' in typed:
                    folders = args.compare or sorted(p.parent for p in Path('runs').glob('*/metrics.json'))
                    print(report.compare(folders) if folders else 'runs/ holds no finished run yet')
                elif 'evaluate' in typed:
                    evaluate_again(Path(args.evaluate), args.device)
                elif 'show_views' in typed:
                    show_views(args)
                else:
                    if args.name is None:
                        args.name = runs.default_name(args.method, {
                            k: Path(v).stem if k in ('data', 'encoder') else v for k, v in typed.items()
                            if k not in runs.FREE | {'method'} and v != defaults[k]})
                    run_method(args, typed)
                return 0
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
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)   # the reader (head, less) left: no traceback at exit
            return 141
        except (ValueError, OSError) as e:
            print(f'ssl.py: {e}', file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print('\nstopped. Type the same command with --resume to continue.', file=sys.stderr)
            return 130

    def run_method(args, typed):
        """One run from the first byte to metrics.json: data, model, training, measures, pictures."""
        import data
        import distributed
        import runs
        import train
        device = distributed.start(pick_device(args.device))
        first = distributed.rank() == 0
        ds = data.load(args.data, args.limit)
        if getattr(args, 'amp', False) is None:
            args.amp = args.net != 'fc' and train.amp_by_default(device)
        folder, config = Path('runs') / args.name, runs.describe(vars(args), ds, device)
        run = runs.Run(folder, config, typed, args.resume, args.overwrite) if first else runs.Silent(folder)
        resolved, finished = distributed.from_first((run.config['args'], run.finished) if first else None)
        args = argparse.Namespace(**resolved)
        if finished:
            print(f'{run.folder} is already finished; --evaluate {run.folder} measures it again')
        else:
            (classify if args.method == 'classify' else represent)(run, args, ds, device)
        distributed.stop()

    def represent(run, args, ds, device):
        """Learn a representation from pictures alone, then measure it."""
        import data
        import distributed
        train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
        model, seconds = model_of(args, ds.shape, device), 0.0
        if 'epochs' in args:
            x, x_val = ds.x_train[train_ids].to(device), ds.x_train[val_ids].to(device)
            seconds = train_model(run, args, model, objective_of(args), x, x_val)
        if distributed.rank() == 0:
            finish(run, args, ds, model, device, seconds)

    def classify(run, args, ds, device):
        """Pay for labels, learn a classifier from those pictures alone, and score it on the test set."""
        import distributed
        import labels
        if ds.y_train is None:
            raise ValueError('--method classify needs labels, and the data has no y_train')
        n = round(args.labels * len(ds.x_train)) if args.labels < 1 else int(args.labels)
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
        repeat = -(-6000 // n)                                             # an epoch is 6,000 pictures or more
        seconds = train_model(run, args, model, objective_of(args), ds.x_train[ids].repeat(repeat, 1, 1, 1).to(device),
                              y=y.repeat(repeat).to(device))
        if distributed.rank() == 0:
            score(run, args, ds, model, device, seconds)

    def score(run, args, ds, model, device, seconds):
        """Measure a classifier on the test set, once, and write metrics.json."""
        import evaluate
        import labels
        began, logits = time.monotonic(), representation(args, model, None, device, model.forward)[0]
        paid = labels.LabelDatabase(run.folder / 'labels.sqlite', None, 0, ds.digest)
        metrics = {'labels': paid.spent, **evaluate.measure_classifier(ds, logits, device)}
        complete(run, args, metrics, seconds, began)

    def train_model(run, args, model, objective, x, x_val=None, y=None):
        """train.fit with the flags filled in; says first what is trained on what."""
        import distributed
        import nets
        import train
        if distributed.rank() == 0:
            where = f'{distributed.world()} x {x.device}' if distributed.world() > 1 else x.device
            print(f'{run.folder}: {args.method}, {nets.size(model):,} parameters on {where}'
                  f'{" in bfloat16" if args.amp else ""}; {len(x):,} pictures {tuple(x.shape[1:])}', flush=True)
        return train.fit(
            distributed.sync_batchnorm(model), objective, x, x_val, run, y=y, epochs=args.epochs,
            batch_size=args.batch_size, lr=args.lr, weight_decay=args.weight_decay, warmup=args.warmup,
            schedule=args.schedule, patience=getattr(args, 'patience', 0), min_delta=getattr(args, 'min_delta', 0.0),
            seed=args.seed, amp=args.amp, save_every=args.save_every)

    def pick(args, ds, model, n, device):
        """Ids (n,) of the pictures whose labels are asked for, by --pick."""
        import torch

        import evaluate
        import labels
        if args.pick == 'balanced':
            return labels.pick_balanced(n, ds.y_train, args.seed)
        if args.pick == 'coverage':
            encode = representation(args, model, None, device)[0]
            h = evaluate.in_chunks(encode, ds.x_train.to(device))
            return labels.pick_coverage(n, torch.nn.functional.normalize(h, dim=1), args.seed)
        return labels.pick_random(n, len(ds.x_train), args.seed)

    def pick_device(name):
        """torch.device for --device, or the best there is; ValueError if it can't be used."""
        import torch
        if name is None:
            name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
        try:
            device = torch.device(name)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError) as e:
            raise ValueError(f'--device {name} can not be used here ({str(e).splitlines()[0][:80]}); '
                             'try cuda, mps or cpu') from None
        return device

    def views_of(args):
        """The augmentation flags as data.Views."""
        import data
        return data.Views(args.crop, args.flip, args.rotate, args.jitter, args.blur, args.cutout, args.noise)

    def objective_of(args):
        """What the method minimises, with its flags filled in."""
        import train
        if args.method == 'vae':
            return partial(train.variational, beta=args.beta, likelihood=args.likelihood)
        if args.method == 'simclr':
            return partial(train.contrastive, tau=args.tau, views=views_of(args))
        if args.method == 'classify':
            return partial(train.classification, views=views_of(args), mixup=args.mixup)
        return partial(train.autoencoding, noise=args.noise)

    def model_of(args, shape, device):
        """The method's network on the device, initialised by the seed; None for pixels and pca."""
        import torch

        import nets
        if args.method not in ('ae', 'conv', 'vae', 'simclr', 'random'):
            return None
        torch.manual_seed(args.seed)
        model = nets.build(args.method, args.net, shape, args.width, getattr(args, 'latent', None))
        return model.to(device, memory_format=torch.channels_last)

    def classifier_of(args, ds, device):
        """A classifier on the encoder of the run --encoder, or on a fresh one without it."""
        import torch

        import nets
        import runs
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
        import runs
        state = runs.newest_checkpoint(folder)
        if state is None:
            raise ValueError(f'{folder} has no checkpoint yet; train it first')
        model.load_state_dict(state['model'])
        return model

    def representation(args, model, x_train, device, forward=None):
        """(encode, reconstruct or None): float pictures (B, C, H, W) to features (B, D), and to themselves.

        forward stands in for model.encode, to get a classifier's logits the same way.
        """
        import data
        import evaluate
        import train
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

    def evaluate_again(folder, device):
        """Load a finished run's checkpoint and write its measures and pictures anew."""
        import data
        import runs
        config = runs.read_config(folder)
        args = argparse.Namespace(**config['args'])
        device = pick_device(device)
        ds = data.load(args.data, args.limit)
        if ds.digest != config['data']['digest']:
            raise ValueError(f'{folder} was made from other data than {args.data or "Fashion-MNIST here"}')
        run = runs.Run(folder, config, resume=True)
        if not run.finished:
            raise ValueError(f'{folder} is not finished; continue it with its command and --resume')
        seconds = runs.read_json(folder / 'metrics.json').get('seconds') or 0.0
        if args.method == 'classify':
            score(run, args, ds, load_weights(classifier_of(args, ds, device), folder), device, seconds)
        elif 'net' in args:
            finish(run, args, ds, load_model(folder, config, device), device, seconds)
        else:
            finish(run, args, ds, None, device, seconds)

    def finish(run, args, ds, model, device, seconds):
        """Pictures, then every measure (the test set is read here, once), then metrics.json."""
        import torch

        import data
        import evaluate
        import nets
        import report
        train_ids, val_ids = data.split(len(ds.x_train), args.val, args.seed)
        encode, reconstruct = representation(args, model, ds.x_train[train_ids], device)
        began = time.monotonic()
        metrics = evaluate.measure(ds, train_ids, val_ids, encode, reconstruct, args.seed, device=device)
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
        complete(run, args, metrics, seconds, began)

    def complete(run, args, metrics, seconds, began):
        """Write metrics.json, which makes the run a finished one, and say what it holds."""
        import report
        import runs
        rows = runs.read_log(run.folder)
        metrics.update(method=args.method, epochs=rows[-1]['epoch'] if rows else None, seconds=round(seconds, 1),
                       measuring_seconds=round(time.monotonic() - began, 1))
        run.write_metrics(metrics)
        print(report.describe(metrics), f'-> {run.folder}', sep='\n')

    def write_views(path, x, views, seed):
        """Originals above two views of each."""
        import data
        import report
        g = data.generator(x.device, seed, 'views')
        report.write_png(path, report.sheet(x, data.augment(x, views, g), data.augment(x, views, g)))

    def show_views(args):
        import data
        ds = data.load(args.data, args.limit)
        write_views(Path(args.show_views), data.to_float(ds.x_train[:16]), views_of(args), args.seed)
        print(f'wrote {args.show_views}: originals above two views of each')

    if __name__ == '__main__':
        sys.exit(main())
