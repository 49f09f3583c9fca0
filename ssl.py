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
    import errno
    import os
    import sys
    from pathlib import Path

    # Defaults that depend on the method; a method that is missing in a row does not take the flag.
    NETS = ('ae', 'conv', 'vae', 'simclr')
    HEADED = ('classify', 'query', 'cluster', 'scan')
    def all_headed(value, **others):
        return {**dict.fromkeys(HEADED, value), **others}

    PER_METHOD = {
        'net': dict(ae='fc', conv='resnet', vae='resnet', simclr='resnet', random='resnet', **all_headed('resnet')),
        'width': dict(ae=1.0, conv=0.5, vae=0.5, simclr=1.0, random=1.0, **all_headed(1.0)),
        'latent': dict(ae=64, conv=64, vae=64, pca=64),
        'val': dict.fromkeys(NETS + ('random', 'pixels', 'pca'), 5000),
        'epochs': dict(ae=5, conv=5, vae=5, simclr=7, classify=20, cluster=15, scan=2),
        'batch_size': dict(ae=128, conv=128, vae=128, simclr=512, **all_headed(256, classify=128)),
        'lr': dict(ae=1e-3, conv=2e-3, vae=2e-3, simclr=4e-3, **all_headed(1e-3)),
        'weight_decay': dict(ae=0.0, conv=0.0, vae=0.0, simclr=1e-4, **all_headed(5e-4)),
        'warmup': dict(ae=0.0, conv=0.5, vae=0.5, simclr=0.5, **all_headed(1.0)),
        'schedule': dict(ae='constant', conv='cosine', vae='cosine', simclr='cosine', classify='cosine'),
        'closing': dict(query=10, cluster=5, scan=2),
        'patience': dict(ae=5, conv=5, vae=5),
        'min_delta': dict(ae=0.001, conv=0.0, vae=0.0),
        'amp': dict.fromkeys(NETS + ('random',) + HEADED),
        'save_every': dict.fromkeys(NETS + HEADED, 60.0),
        'sam': all_headed(0.0),
        'noise': dict(ae=0.0, conv=0.0, simclr=0.0, **all_headed(0.0)),
        'beta': dict(vae=1.0),
        'likelihood': dict(vae='bernoulli'),
        'tau': dict(simclr=0.2),
        'encoder': dict(simclr=None, **all_headed(None)),
        'freeze': all_headed(False),
        'head': all_headed('linear'),
        'labels': dict(classify=0.1),
        'pick': dict(classify='random', query='informative'),
        'mixup': dict(classify=0.2, cluster=0.0),
        'oracle': dict(query='data'),
        'answers': dict(query=None),
        'classes': dict(query=None),
        'budget': dict(query=1000),
        'until': dict(query=None),
        'audit': dict(query=0.1),
        'rounds': dict(query=10),
        'round_epochs': dict(query=3),
        'threshold': dict(query=0.95, scan=0.95),
        'ema': dict(query=0.997, scan=0.997),
        'clusters': dict(cluster=10, scan=10),
        'iterations': dict(cluster=30, scan=2),
        'stable': dict(cluster=0.995, scan=0.995),
        'neighbours': dict(simclr=20, query=10, cluster=50, scan=50),
        'entropy': dict(cluster=5.0, scan=5.0),
        'heads': dict(scan=144),
        'crop': dict(simclr=0.3, **all_headed(0.5, classify=0.7)),
        'flip': dict(simclr=True, **all_headed(True)),
        'rotate': dict(simclr=10.0, **all_headed(10.0, classify=5.0)),
        'jitter': dict(simclr=0.4, **all_headed(0.4, classify=0.2)),
        'grey': dict(simclr=0.2, **all_headed(0.0)),
        'blur': dict(simclr=0.0, **all_headed(0.0)),
        'cutout': dict(simclr=0.0, **all_headed(0.4, classify=0.3)),
    }
    PLAIN = dict(data=None, dataset=None, limit=None, name=None, resume=False, overwrite=False, device=None, seed=0,
                 perplexity=30.0, tensorboard=False, deterministic=False)
    METHODS = {'ae': 'fully connected autoencoder', 'conv': 'convolutional residual autoencoder',
               'vae': 'variational autoencoder', 'simclr': 'contrastive learning',
               'classify': 'classifier from few labels', 'query': 'classifier that asks for its labels',
               'cluster': 'k-means and training on its clusters, in turns', 'scan': 'clusters of neighbours',
               'random': 'untrained encoder', 'pixels': 'raw pixels',
               'pca': 'principal components'}
    EPILOG = """examples, with what two CPU cores gave on Fashion-MNIST:
  python ssl.py --method ae                      5 epochs in about 10 s: test MSE .011, SSIM .68
  python ssl.py --method simclr                  7 epochs in about 8 min: probe 86 %, k-means ACC .62
  python ssl.py --method classify --encoder runs/simclr --labels 0.1     about 90 % of the test set right
  python ssl.py --method simclr --tau 0.5        another temperature, kept as runs/simclr-tau=0.5
  python ssl.py --method query --oracle web --data my.npz --classes cat,dog,other      label them yourself, on a page
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

    def path(text):
        """Type of a flag: anything but nothing; runs/x/ is runs/x."""
        if not text:
            raise argparse.ArgumentTypeError('it is empty; wanted a path')
        return Path(text).as_posix()                       # as it reads on any system

    def names(text):
        """Type of --classes: 'a,b,c', none empty or twice."""
        parts = [part.strip() for part in text.split(',')]
        if not all(parts) or len(set(parts)) < len(parts) or not text.isprintable():
            raise argparse.ArgumentTypeError(f'{text!r} is not understood; wanted different names as in cat,dog,other')
        return ','.join(parts)

    def hint(text, names):
        """'did you mean X? ' of the name nearest to a misspelt one, or nothing."""
        near = difflib.get_close_matches(text.lower(), names, 1)
        return f'did you mean {near[0]}? ' if near else ''

    def choice(*names):
        """Type of a flag: one of the names; a misspelt one is answered with the nearest."""
        def parse(text):
            if text not in names:
                raise argparse.ArgumentTypeError(f'{text!r} is not known; {hint(text, names)}wanted one of '
                                                 f'{", ".join(names)}')
            return text
        return parse

    def span(text):
        """Type of --over: 'lr=1e-4:1e-2' -> ('lr', '1e-4', '1e-2')."""
        key, _, ends = text.partition('=')
        if not key or ends.count(':') != 1:
            raise argparse.ArgumentTypeError(f'{text!r} is not understood; wanted for instance lr=1e-4:1e-2')
        return key.replace('-', '_'), *ends.split(':')

    def make_parser():
        p = Parser(prog='ssl.py', description=__doc__, epilog=EPILOG, allow_abbrev=False,
                   formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
        count, positive, share = number(int, 1, 10**9), number(float, 0, 1e9, above=True), number(float, 0, 1)

        def flag(group, name, help, **kwargs):
            """Add a flag; its help ends with its default, taken from where the default is kept."""
            key = name.strip('-').replace('-', '_')
            per, default = PER_METHOD.get(key), PLAIN.get(key) if not kwargs.get('action') else None
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
        flag(g, '--evaluate', 'measure a finished run again', type=path, metavar='RUN')
        flag(g, '--compare', 'print one table of these runs, all in runs/ when none is named, and write it with their '
             'curves to runs/report.html', nargs='*', metavar='RUN')
        flag(g, '--list', 'say of each run in runs/ whether it is finished, stopped or running', action='store_true')
        flag(g, '--export', 'write the features that a finished run gives all its pictures, with ids, labels (-1: not '
             'known) and split, as an .npz', nargs=2, type=path, metavar=('RUN', 'NPZ'))
        flag(g, '--predict', 'print what a finished classify or query run takes new pictures for, as CSV; they come as '
             'an .npz with x, x_train or x_test, or as an IDX file', nargs=2, type=path, metavar=('RUN', 'FILE'))
        flag(g, '--show-views', 'write originals and two augmented views of each as a PNG, and stop',
             nargs='?', const='views.png', metavar='PNG')
        flag(g, '--search', 'try N settings of the method, scored on validation, and print the best command',
             type=number(int, 1, 10**4), metavar='N')
        flag(g, '--over', 'what --search varies: any numeric flags and their ranges', nargs='+', type=span,
             metavar='FLAG=LOW:HIGH')
        flag(g, '--fetch', 'find or download the --dataset, say where it is, and stop', action='store_true')

        g = p.add_argument_group('data and run folder')
        flag(g, '--data', 'folder of IDX files, of STL-10\'s or of CIFAR-10\'s binary files, or an .npz with x_train '
             'and, optionally, y_train, x_test, y_test', type=path, metavar='PATH')
        flag(g, '--dataset', 'instead of --data: fashion-mnist, stl10 or cifar10, sought in data/ and downloaded if it '
             'is not there (default: fashion-mnist)', metavar='NAME',
             type=choice('fashion-mnist', 'stl10', 'cifar10'))
        flag(g, '--limit', 'use only the first N training pictures; those with labels come first',
             type=number(int, 20, 10**9), metavar='N')
        flag(g, '--val', 'training pictures kept for validation, a tenth of all at most', type=count, metavar='N')
        flag(g, '--name', 'run folder under runs/ (default: the method and what differs from its defaults; --epochs '
             'is in it for cluster and scan only)')
        flag(g, '--resume', 'continue an unfinished run to the same result; a finished one is left alone',
             action='store_true')
        flag(g, '--overwrite', 'start again in an existing run folder', action='store_true')
        flag(g, '--save-every', 'seconds between checkpoints', type=positive, metavar='S')
        flag(g, '--device', 'cuda, cuda:1, mps or cpu (default: cuda if there is a card, else cpu)', metavar='NAME')
        flag(g, '--seed', 'of weights, split, order, augmentation', type=number(int, 0, 2**31 - 1), metavar='N')
        flag(g, '--deterministic', 'only algorithms that give the same bits each time, on CUDA too; slower',
             action=argparse.BooleanOptionalAction)
        flag(g, '--perplexity', 'of the t-SNE in report.html, about how many neighbours a picture has; 0 is no t-SNE',
             type=number(float, 0, 1e4), metavar='N')
        flag(g, '--tensorboard', 'write the numbers, pictures and features for TensorBoard too, into the run folder, '
             'when the run is complete; needs the packages tensorboard and pillow', action='store_true')

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
        flag(g, '--encoder', 'run folder whose encoder to start from, without it from scratch; cluster and scan take '
             'several, and see neighbours in the features of all; query too, and hears neighbours in those of the '
             'others when it predicts; simclr goes on from a run of simclr, and pairs pictures with neighbours in the '
             'features of all', type=path, nargs='+', metavar='RUN')
        flag(g, '--labels', 'how many labels to pay for, or below 1 their share',
             type=number(float, 0, 1e9, above=True), metavar='N')
        flag(g, '--pick', 'which: random, coverage (classify: k-means medoids of the encoder\'s features), informative '
             '(query: where its errors are) or balanced (classify: as many of each class, for comparison with '
             'benchmarks: it looks at labels nobody paid for)',
             type=choice('random', 'coverage', 'balanced', 'informative'))
        flag(g, '--freeze', 'train only the head; the encoder keeps every bit', action=argparse.BooleanOptionalAction)
        flag(g, '--head', 'linear, or mlp of two layers', type=choice('linear', 'mlp'))
        flag(g, '--mixup', 'alpha of mixup; 0 is none', type=number(float, 0, 100), metavar='ALPHA')
        flag(g, '--sam', 'radius of sharpness-aware minimisation; 0 is none, else twice the time',
             type=number(float, 0, 100), metavar='RHO')

        g = p.add_argument_group('queries')
        flag(g, '--oracle', 'who answers: data (y_train), web (you, on a page that it serves to this machine alone) or '
             'file (an --answers CSV)', type=choice('data', 'web', 'file'), metavar='NAME')
        flag(g, '--answers', 'CSV of lines id,class, of names or indices, for --oracle file; it may grow between '
             '--resumes', type=path, metavar='CSV')
        flag(g, '--classes', 'what the classes are called; needed where no labels of the data tell', type=names,
             metavar='A,B,C')
        flag(g, '--budget', 'how many labels to pay for at most', type=count, metavar='N')
        flag(g, '--until', 'stop asking when the accuracy, estimated from the answers, is so high by a standard error',
             type=number(float, 0, 1, above=True), metavar='X')
        flag(g, '--audit', 'share of the queries drawn at random, from which the accuracy is estimated', type=share,
             metavar='X')
        flag(g, '--rounds', 'in how many parts the budget is spent', type=count, metavar='N')
        flag(g, '--round-epochs', 'epochs between two rounds', type=count, metavar='N')
        flag(g, '--closing', 'epochs after the last round, in which the learning rate falls', type=number(
             int, 0, 10**6), metavar='N')
        flag(g, '--threshold', 'how sure the teacher must be of a pseudo-label', type=share, metavar='P')
        flag(g, '--ema', 'decay of the teacher\'s weights a step', type=share, metavar='X')

        g = p.add_argument_group('clusters')
        flag(g, '--clusters', 'how many', type=number(int, 2, 10**4), metavar='K')
        flag(g, '--iterations', 'how often all pictures are assigned anew, every --epochs epochs; 0: once, and no '
             'network is trained', type=number(int, 0, 10**6), metavar='N')
        flag(g, '--stable', 'stop when this share of them is assigned as before; 0 never', type=share, metavar='X')
        flag(g, '--neighbours', 'of each picture, which should share its cluster, (query) vote on its class or (simclr '
             'with --encoder) be its other view', type=count, metavar='N')
        flag(g, '--entropy', 'weight of clusters being equally large', type=number(float, 0, 1e6), metavar='X')
        flag(g, '--heads', 'linear ones, of which the half that neighbours agree with most decides together',
             type=number(int, 1, 1000), metavar='N')

        g = p.add_argument_group('views')
        flag(g, '--crop', 'smallest share of the area a crop keeps; 1 is no crop', type=number(float, 0.01, 1),
             metavar='X')
        flag(g, '--flip', 'mirror left-right half of the time', action=argparse.BooleanOptionalAction)
        flag(g, '--rotate', 'degrees, either way', type=number(float, 0, 180), metavar='DEG')
        flag(g, '--jitter', 'brightness, contrast; on colour saturation and, a quarter of it, hue', type=share,
             metavar='X')
        flag(g, '--grey', 'share of colour pictures whose colours are taken out', type=share, metavar='X')
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
            parser.error(f'{unknown[0]} is not known; {hint(unknown[0].split("=")[0], flags) or "see --help"}'.strip())
        command = next((c for c in ('fetch', 'compare', 'list', 'evaluate', 'export', 'predict', 'show_views')
                        if c in typed), None)
        method = typed.get('method', 'simclr' if command == 'show_views' else None)
        if command == 'show_views' and method != 'simclr':
            parser.error('--show-views shows the views of --method simclr')
        with_it = {'fetch': ('dataset',), 'compare': (), 'list': (), 'export': ('device',), 'predict': ('device',),
                   'evaluate': ('device', 'perplexity', 'tensorboard')}.get(command, typed)
        for key in set(typed) - {command, *with_it}:
            parser.error(f'--{key.replace("_", "-")} does nothing with --{command}')
        if 'data' in typed and 'dataset' in typed:
            parser.error('--data and --dataset exclude each other; a --data folder is known by its files')
        if method is None and command is None:
            parser.error('say what to do; python ssl.py --method ae trains and measures an autoencoder in half a '
                         'minute (--help lists the rest)')
        ranged = {key for key, *_ in typed.get('over', ())}
        for key in {'net', 'width'} & {*typed, *ranged} if 'encoder' in typed else ():
            parser.error(f'--{key} is that of the --encoder run; leave it out')
        if typed.get('epochs') == 0 and method in ('cluster', 'scan'):
            parser.error(f'--epochs of --method {method} is the length of an iteration, so wanted from 1 up; '
                         '--iterations 0 trains nothing')
        for key in typed:
            if method and key in PER_METHOD and method not in PER_METHOD[key]:
                parser.error(f'--{key.replace("_", "-")} does nothing for --method {method}; '
                             f'it is for {", ".join(PER_METHOD[key])}')
        if typed.get('pick') in {'classify': ['informative'], 'query': ['coverage', 'balanced']}.get(method, []):
            parser.error(f'--pick {typed["pick"]} does nothing for --method {method}; see --help')
        if 'name' in typed and (Path(typed['name']).name != typed['name'] or typed['name'] in ('', '..')):
            parser.error(f'--name {typed["name"]!r} is not a plain folder name')
        if ('search' in typed) != ('over' in typed):
            parser.error('--search N and --over FLAG=LOW:HIGH go together')
        if ('answers' in typed) != (typed.get('oracle') == 'file') and 'resume' not in typed:
            parser.error('--oracle file and --answers CSV go together')
        if 'search' in typed and typed.get('oracle', 'data') != 'data':
            parser.error(f'--search would ask for labels in every trial; leave --oracle {typed["oracle"]} out')
        for key in {'perplexity', 'tensorboard'} & set(typed) if 'search' in typed else ():
            parser.error(f'--{key} does nothing with --search, whose trials are scored on validation alone')
        if 'search' in typed and method not in (*NETS, 'classify', 'query'):
            parser.error(f'--search has no score for --method {method}')
        types = {a.dest: a.type for a in parser._actions}
        for i, (key, *ends) in enumerate(typed.get('over', ())):
            over = '--over ' + key.replace('_', '-')
            if method not in PER_METHOD.get(key, ()) or 'number' not in getattr(types[key], '__qualname__', ''):
                near = hint(key, [k for k, per in PER_METHOD.items() if method in per
                                  and 'number' in getattr(types[k], '__qualname__', '')]).replace('_', '-')
                parser.error(f'{over} is no numeric flag of --method {method}; {near or "see --help"}'.strip())
            try:
                low, high = map(types[key], ends)
            except argparse.ArgumentTypeError as e:
                parser.error(f'{over}: {e}')
            if key == 'labels' and low >= 1:                                # a number of them, not a share
                low, high = round(low), round(high)
            if key in typed or not low < high:
                parser.error(f'{over} ' + ('is also given as a flag' if key in typed else
                                           'wants a lower end and a higher one'))
            typed['over'][i] = key, low, high
        least = [typed.get('epochs', 1), *(low for key, low, _ in typed.get('over', ()) if key == 'epochs')]
        if 'search' in typed and min(least) < 1:
            parser.error('--search scores a setting after each epoch, so it needs --epochs from 1 up')
        if 'resume' in typed and 'overwrite' in typed:
            parser.error('--resume and --overwrite exclude each other')
        if len(typed.get('encoder', ())) > 1 and method == 'classify':
            parser.error(f'--method classify starts from one --encoder, not {len(typed["encoder"])}')
        if len(typed.get('encoder', ())) == 1 and method in ('classify', 'query'):
            typed['encoder'] = typed['encoder'][0]
        if ('neighbours' in {*typed, *ranged} and method in ('query', 'simclr') and 'resume' not in typed
                and not isinstance(typed.get('encoder'), list)):
            parser.error(f'--neighbours of --method {method} are those in the features of '
                         f'{"a second" if method == "query" else "an"} --encoder; name one')
        own = {key: per[method] for key, per in PER_METHOD.items() if method in per}
        defaults = {'method': method, **PLAIN, **own}
        return argparse.Namespace(**{**defaults, **typed}), typed, defaults


# --------------------------------------------------------------------------------------- commands

    def told(e, again):
        """An error as a sentence; one of the system's with its file, a full disk with what to do."""
        if not isinstance(e, OSError) or e.strerror is None:
            return e
        if e.errno == errno.ENOSPC:
            return f'no space left on the disk; make some. {again}'.strip()
        return f'{e.filename}: {e.strerror}' if e.filename else e.strerror

    def main(argv=None):
        again = ''
        sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))   # noqa: SIM115
        try:
            given = parse(argv)
            again = 'Type the same command with --resume to continue.' if 'method' in given[1] else ''
            import recipes                                 # torch comes with it: only once the arguments are right
            code = recipes.main(*given)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)   # the reader (head, less) left: no traceback at exit
            return 141
        except (ValueError, OSError) as e:
            print(f'ssl.py: {told(e, again)}', file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f'\nstopped. {again}'.rstrip(), file=sys.stderr)
            return 130

    if __name__ == '__main__':
        sys.exit(main())
