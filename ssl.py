"""Learn what images show without labels, then do the job with few labels or none: the command line."""
if __name__ == 'ssl':   # imported, not run: torch, urllib and pip mean the standard library's ssl
    import os
    import sys
    from importlib.machinery import SourceFileLoader
    __file__ = os.path.join(os.path.dirname(os.__file__), 'ssl.py')
    SourceFileLoader('ssl', __file__).exec_module(sys.modules['ssl'])

else:
    import argparse
    import errno
    import os
    import signal
    import sys
    from pathlib import Path

    # ------------------------------------------------------------------- methods and their defaults
    # A method takes the flags that stand in its dict. Settings without a flag (warmup, the epochs in
    # which the learning rate rises; ema) are changed here. None: found out when the run starts.
    # on_colour: what is another default where the images are in colour.

    VIEWS = dict(crop=0.5, flip=True, rotate=10.0, jitter=0.4, grey=0.0, blur=0.0, cutout=0.4, noise=0.0)
    HEAD = dict(encoder=None, net='resnet', width=1.0, freeze=False, amp=None, lr=1e-3, weight_decay=5e-4,
                warmup=1.0, sam=0.0)                    # what classifiers and clusterings share
    LABELS = dict(oracle='data', classes=None)
    DEFAULTS = {
        'ae': dict(net='fc', width=1.0, latent=64, epochs=5, batch_size=128, lr=1e-3, weight_decay=0.0,
                   warmup=0.0, decay_epochs=0, amp=None, noise=0.0),
        'conv': dict(net='resnet', width=0.5, latent=64, epochs=5, batch_size=128, lr=2e-3, weight_decay=0.0,
                     warmup=0.5, decay_epochs=None, amp=None, noise=0.0),
        'vae': dict(net='resnet', width=0.5, latent=64, epochs=5, batch_size=128, lr=2e-3, weight_decay=0.0,
                    warmup=0.5, decay_epochs=None, amp=None, beta=1.0, likelihood='bernoulli'),
        'simclr': dict(net='resnet', width=0.5, latent=256, epochs=12, batch_size=256, lr=4e-3,
                       weight_decay=1e-4, warmup=0.5, decay_epochs=None, amp=None, temperature=0.2,
                       recon=100.0, neighbours_from=0.33, neighbours=20,
                       on_colour=dict(latent=0, recon=0.0, neighbours_from=1.0, crop=0.2),
                       **{**VIEWS, 'crop': 0.4, 'grey': 0.2, 'cutout': 0.0}),
        'classify': dict(**HEAD, **LABELS, labels=0.1, pick='random', epochs=20, batch_size=128,
                         decay_epochs=None, mixup=0.2,
                         **{**VIEWS, 'crop': 0.7, 'rotate': 5.0, 'jitter': 0.2, 'cutout': 0.3}),
        'query': dict(**HEAD, **LABELS, port=0, pick='informative', labels=1000, until=None, audit=0.1,
                      rounds=10, epochs=3, decay_epochs=10, batch_size=256, threshold=0.95, ema=0.997,
                      **VIEWS),
        'scan': dict(encoder=None, amp=None, clusters=10, neighbours=50),
        'cluster': dict(**HEAD, clusters=10, neighbours=50, iterations=30, epochs=1, decay_epochs=5,
                        batch_size=256, mixup=0.0, **VIEWS),
        'random': dict(net='resnet', width=1.0, latent=0, amp=None),
        'pca': dict(latent=64),
        'pixels': {},
    }
    DEFAULT_WORDS = dict(decay_epochs='all after warm-up', amp='where it is faster')         # for None
    COMMON = dict(data='fashion-mnist', size=None, limit=None, name=None, resume=False, overwrite=False,
                  device=None, seed=0, deterministic=False, tensorboard=False, search=None)
    COMMANDS = dict(evaluate=None, compare=None, export=None, predict=None, show_views=None)
    ABOUT = {'ae': 'fully connected autoencoder', 'conv': 'convolutional residual autoencoder',
             'vae': 'variational autoencoder', 'simclr': 'contrastive learning',
             'classify': 'classifier from few labels', 'query': 'classifier that asks for its labels',
             'scan': 'clusters that neighbours agree on',
             'cluster': 'pseudo-labelling, from k-means or from scan',
             'random': 'untrained encoder', 'pixels': 'raw pixels', 'pca': 'principal components'}
    EXAMPLES = """examples, with what two CPU cores gave on Fashion-MNIST:
  python ssl.py --method ae                      5 epochs in about 10 s: test MSE .011, SSIM .68
  python ssl.py --method simclr                  12 epochs in 10 to 30 min: kNN 89 %, probe 87 %
  python ssl.py --method classify --encoder runs/simclr --labels 0.1     about 90 % of the test set right
  python ssl.py --method simclr --temperature 0.5        kept as runs/simclr-temperature=0.5
  python ssl.py --method query --oracle web --data my.npz --classes cat,dog,other      label them on a page
  python ssl.py --method conv --data my.npz      your own images: x_train (N, H, W) or (N, H, W, 3) uint8
  python ssl.py --compare                        one table of all finished runs"""

    # -------------------------------------------------------------------------------- types of flags

    def number(kind, low, high, above=False):
        """Type of a flag: an int or float in low..high (above: low itself is refused)."""
        wanted = 'a whole number' if kind is int else 'a number'
        wanted = f'wanted {wanted} {"above" if above else "from"} {low:g} to {high:g}'

        def parse(text):
            try:
                value = kind(text)
            except ValueError:
                raise argparse.ArgumentTypeError(f'{text!r} is not a number; {wanted}') from None
            if not low <= value <= high or (above and value == low):             # also refuses nan
                raise argparse.ArgumentTypeError(f'{text} is out of range; {wanted}')
            return value
        parse.is_number = True
        return parse

    def path(text):
        """Type of a flag: anything but nothing; runs/x/ is runs/x."""
        if not text:
            raise argparse.ArgumentTypeError('it is empty; wanted a path')
        return Path(text).as_posix()

    def oracle(text):
        """Type of --oracle: data, web, or a file with a suffix."""
        if text not in ('data', 'web') and not Path(text).suffix:
            raise argparse.ArgumentTypeError(f'{text!r} is not known; wanted data, web or a CSV as a.csv')
        return text

    COUNT, SHARE = number(int, 1, 10**9), number(float, 0, 1)
    ON, YES_NO = {'action': 'store_true'}, {'action': argparse.BooleanOptionalAction}

    # ------------------------------------------------------------------------------------- the flags

    # Each flag: its name, its type (or the names that it takes, or argparse's options), its help.

    FLAGS = {
        'what to do': [
            ('--method', tuple(ABOUT), 'train it (the last three have nothing to train) and measure it: '
             + ', '.join(f'{k} = {v}' for k, v in ABOUT.items())),
            ('--evaluate', path, 'measure a finished RUN again'),
            ('--compare', dict(nargs='*', metavar='RUN'), 'print one table of these runs, and write '
             'runs/report.html; by default of all finished runs, and say how far the others are'),
            ('--export', dict(nargs='+', type=path, metavar=('RUN NPZ', 'NEW')), 'write the features that a '
             'finished run gives all its images, or those of a file or folder NEW, as an .npz'),
            ('--predict', dict(nargs=2, type=path, metavar=('RUN', 'FILE')), 'print what class or cluster a '
             'finished run gives new images (.npz with x, x_train or x_test, IDX file, folder of images), '
             'as CSV'),
            ('--show-views', dict(nargs='?', const='views.png', metavar='PNG'),
             'write images and two views of each as a PNG'),
            ('--search', dict(nargs='+', metavar=('N', 'FLAG=LOW:HIGH')), 'try N settings from these ranges, '
             'scored without the test set, and print the best command'),
        ],
        'data and run folder': [
            ('--data', path, 'fashion-mnist, stl10 or cifar10 (found in data/ or downloaded), a folder of '
             'images, of IDX files or of the binary files of STL-10 or CIFAR-10, or an .npz with x_train and '
             'optionally y_train, x_test, y_test'),
            ('--size', number(int, 8, 4096), 'height and width of the images of a folder (default: their '
             'median, 96 at most)'),
            ('--limit', number(int, 20, 10**9), 'use only so many training images: the first, of a '
             'folder of images some of each class'),
            ('--name', {}, 'run folder under runs/ (default: the method and what differs from its defaults)'),
            ('--resume', ON, 'continue an unfinished run, to the same result'),
            ('--overwrite', ON, 'start again in an existing run folder'),
            ('--device', {}, 'cuda, cuda:1, mps or cpu (default: cuda if there is a card, else cpu)'),
            ('--seed', number(int, 0, 2**31 - 1), 'of weights, split, order, augmentation'),
            ('--deterministic', YES_NO, 'only algorithms that give the same bits each time, on CUDA too; '
             'slower'),
            ('--tensorboard', ON, 'write the numbers, images and features for TensorBoard too; needs the '
             'packages tensorboard and pillow'),
        ],
        'network': [
            ('--net', ('fc', 'conv', 'resnet'), 'encoder: fc, conv or resnet'),
            ('--width', number(float, 0.1, 32), 'scales the units or channels of every layer'),
            ('--latent', number(int, 0, 4096), 'number of features; 0 (simclr, random): those of the '
             'average-pooled map'),
        ],
        'training': [
            ('--epochs', COUNT, 'passes over the images (cluster, query: of a round)'),
            ('--batch-size', number(int, 2, 10**6), 'images a step, of all processes together'),
            ('--lr', number(float, 0, 1e9, above=True), 'peak learning rate of AdamW'),
            ('--weight-decay', number(float, 0, 10), 'not applied to norms and biases'),
            ('--decay-epochs', number(int, 0, 10**6), 'epochs at the end in which the learning rate falls '
             'to 0 by half a cosine'),
            ('--amp', YES_NO, 'bfloat16 in the network, losses in float32'),
        ],
        'methods': [
            ('--noise', number(float, 0, 10), 'std of noise added to the input (ae, conv: denoising) or to '
             'each view, on the 0..1 scale'),
            ('--beta', number(float, 0, 1e6), 'weight of the KL term'),
            ('--likelihood', ('bernoulli', 'gaussian'), 'of a pixel: bernoulli or gaussian'),
            ('--temperature', number(float, 0.001, 100), 'of NT-Xent'),
            ('--recon', number(float, 0, 1e6), 'weight of the squared error of a decoder beside NT-Xent; 0: '
             'no decoder'),
            ('--neighbours-from', SHARE, 'after this share of the epochs the second view is of a '
             'neighbour of the image; 1: never'),
        ],
        'few labels': [
            ('--encoder', path, 'finished run whose encoder to start from; without it from scratch'),
            ('--labels', number(float, 0, 1e9, above=True), 'how many labels to pay for (query: at '
             'most), or below 1 their share'),
            ('--pick', ('random', 'coverage', 'informative'), 'which: random, coverage (classify: '
             'k-means medoids) or informative (query: likely errors)'),
            ('--freeze', YES_NO, 'train only the head; the encoder keeps every bit'),
            ('--mixup', number(float, 0, 100), 'alpha of mixup; 0 is none'),
            ('--sam', number(float, 0, 100), 'radius of sharpness-aware minimisation; 0 is none, else twice '
             'the time'),
        ],
        'queries': [
            ('--oracle', oracle, 'who gives the labels: data (y_train), web (you, on a page that it serves '
             'to this machine alone) or the name of a CSV: id or file name, class'),
            ('--classes', {}, 'what the classes are called, as in cat,dog,other; needed where no '
             'labels of the data tell'),
            ('--port', number(int, 0, 65535), 'of the page; 0: any that is free'),
            ('--until', number(float, 0, 1, above=True), 'stop asking when the interval of the estimated '
             'accuracy lies above this'),
            ('--audit', SHARE, 'share of the queries drawn at random, from which the accuracy is estimated'),
            ('--rounds', COUNT, 'in how many parts the labels are asked for'),
            ('--threshold', SHARE, 'how confident the teacher must be of a pseudo-label'),
        ],
        'clusters': [
            ('--clusters', number(int, 2, 10**4), 'how many'),
            ('--iterations', COUNT, 'how often a network is trained on the clusters and all images are '
             'assigned anew'),
            ('--neighbours', COUNT, 'of each image, which should share its cluster or (simclr) be its '
             'other view'),
        ],
        'views': [
            ('--crop', number(float, 0.01, 1), 'least share of the area a crop keeps, about; 1 is no crop'),
            ('--flip', YES_NO, 'mirror left-right half of the time'),
            ('--rotate', number(float, 0, 180), 'degrees, either way'),
            ('--jitter', SHARE, 'brightness, contrast; on colour saturation and, a quarter of it, hue'),
            ('--grey', SHARE, 'share of colour images whose colours are taken out'),
            ('--blur', SHARE, 'share of images blurred'),
            ('--cutout', SHARE, 'side of an erased square as a share of the image'),
        ],
    }

    class Parser(argparse.ArgumentParser):
        def error(self, message):
            self.exit(2, f'ssl.py: {message}\n')           # one sentence, without the usage lines

    def default_text(key, method):
        """' (default: ...)' of a flag: that of the method, else the one that all methods have in common."""
        if key in ('data', 'seed'):
            return f' (default: {COMMON[key]})'
        values = {}
        for name in takers(key):
            value = DEFAULTS[name][key]
            if method in (None, name) and (value is not None or key in DEFAULT_WORDS):
                values[name] = DEFAULT_WORDS[key] if value is None else value
                on_colour = DEFAULTS[name].get('on_colour', {})
                if key in on_colour:
                    values[name] = f'{value}, on colour images {on_colour[key]}'
        if len(set(map(str, values.values()))) != 1:
            return ''
        names = '' if method else f'; for {", ".join(values)}'
        return f' (default: {next(iter(values.values()))}{names})'

    def make_parser(method=None):
        """The parser; with a method its help shows only what that takes."""
        p = Parser(prog='ssl.py', usage='ssl.py [--method NAME] [flags]', description=__doc__,
                   epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter,
                   allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
        p.add_argument('-h', '--help', **ON, help='show this, or what --method NAME takes')
        for title, flags in FLAGS.items():
            group = p.add_argument_group(title)
            for name, kind, help in flags:
                key = name.strip('-').replace('-', '_')
                if method and takers(key) and method not in takers(key):
                    continue
                if isinstance(kind, tuple):
                    kind = {'choices': kind, 'metavar': 'NAME'}
                options = kind if isinstance(kind, dict) else {'type': kind, 'metavar': 'X'}
                help += default_text(key, method)
                group.add_argument(name, help=help.replace('%', '%%'), **options)
        return p

    def takers(key):
        """Names of the methods that take a flag; none if it is not a method's."""
        return [name for name, own in DEFAULTS.items() if key in own]

    # -------------------------------------------------------------------------------------- parsing

    def typed_flag(key):
        return '--' + key.replace('_', '-')

    def parse(argv):
        """(args with every default filled in, dict of what was typed, defaults); exits with a sentence on a
        mistake."""
        parser = make_parser()
        typed = vars(parser.parse_args(argv))
        if 'help' in typed:
            make_parser(typed.get('method')).print_help()
            parser.exit()
        command = next((key for key in COMMANDS if key in typed), None)
        method = typed.get('method', 'simclr' if command == 'show_views' else None)
        if method is None and command is None:
            parser.error('say what to do; python ssl.py --method ae trains and measures an autoencoder in '
                         'half a minute (--help lists the rest)')
        if command:
            check_command(parser, command, typed)
        if method:
            check_method(parser, method, typed)
        check_pairs(parser, method, typed)
        if 'search' in typed:
            check_search(parser, method, typed)
        defaults = {'method': method, **COMMANDS, **COMMON, **DEFAULTS.get(method, {})}
        args = {**defaults, **typed}
        if command in ('evaluate', 'export') and 'data' not in typed:
            args['data'] = None                            # where the run found it
        return argparse.Namespace(**args), typed, defaults

    def check_command(parser, command, typed):
        """What is typed must do something with the command."""
        takes = {'compare': (), 'export': ('device', 'data', 'overwrite'), 'predict': ('device',),
                 'evaluate': ('device', 'data', 'tensorboard')}.get(command, typed)
        for key in typed:
            if key != command and key not in takes:
                parser.error(f'{typed_flag(key)} does nothing with {typed_flag(command)}')
        if command == 'show_views' and typed.get('method', 'simclr') != 'simclr':
            parser.error('--show-views shows the views of --method simclr')
        if command == 'export' and not 2 <= len(typed['export']) <= 3:
            parser.error('--export wants RUN NPZ or RUN NPZ NEW')

    def check_method(parser, method, typed):
        """What is typed must do something for the method."""
        for key in typed:
            if takers(key) and method not in takers(key):
                parser.error(f'{typed_flag(key)} does nothing for --method {method}; '
                             f'it is for {", ".join(takers(key))}')
        picks = {'classify': 'coverage', 'query': 'informative'}.get(method)
        if typed.get('pick', 'random') not in ('random', picks):
            parser.error(f'--pick {typed["pick"]} does nothing for --method {method}; '
                         f'wanted random or {picks}')
        if method in ('ae', 'conv', 'vae', 'pca') and typed.get('latent') == 0:
            parser.error(f'--latent of --method {method} is wanted from 1 up')

    def check_pairs(parser, method, typed):
        """Flags that need or exclude each other."""
        if 'resume' in typed and 'overwrite' in typed:
            parser.error('--resume and --overwrite exclude each other')
        if 'name' in typed and (Path(typed['name']).name != typed['name'] or typed['name'] in ('', '..')):
            parser.error(f'--name {typed["name"]!r} is not a plain folder name')
        for key in {'net', 'width'} & {*typed}:
            if 'encoder' in typed:
                parser.error(f'--{key} is that of the --encoder run; leave it out')
        if method == 'classify' and typed.get('oracle') == 'web':
            parser.error('--oracle web asks in rounds; use --method query')
        if method == 'classify' and typed.get('oracle', 'data') != 'data' and 'labels' in typed:
            parser.error('--labels does nothing with a CSV: all its labels are used')

    def check_search(parser, method, typed):
        """--search needs a score, and numeric flags of the method. Fills in [N, (flag, low, high), ...]."""
        scored = 'ae', 'conv', 'vae', 'simclr', 'classify', 'query'
        if method not in scored or typed.get('oracle', 'data') != 'data':
            parser.error(f'--search has no score here: it is for {", ".join(scored)}, with --oracle data')
        types = {action.dest: action.type for action in parser._actions}
        fixed = {*typed, 'port', *(['width'] if 'encoder' in typed else [])}
        if method != 'simclr':                             # others are scored by the loss, which these change
            fixed |= {'beta', 'noise'}
        numeric = [key for key in DEFAULTS[method]
                   if getattr(types.get(key), 'is_number', False) and key not in fixed]
        n, *texts = typed['search']
        if not texts:
            parser.error('--search wants N FLAG=LOW:HIGH ..., as in --search 20 lr=1e-4:1e-2')
        try:
            found = [number(int, 1, 10**4)(n)]
            for text in texts:
                name, _, ends = text.partition('=')
                key = name.replace('-', '_')
                if key not in numeric:
                    parser.error(f'--search {text}: wanted one of {", ".join(numeric)}, as in lr=1e-4:1e-2')
                low, _, high = ends.partition(':')
                low, high = types[key](low), types[key](high)
                if not low < high:
                    parser.error(f'--search {text} wants a lower end and a higher one')
                if key == 'labels' and low >= 1:           # a number of them, not a share
                    low, high = round(low), round(high)
                found.append((key, low, high))
        except argparse.ArgumentTypeError as e:
            parser.error(f'--search {" ".join(typed["search"])}: {e}')
        typed['search'] = found

    # ----------------------------------------------------------------------------------------- main

    FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}     # a disk that takes no more

    def sentence(e, again):
        """An error as a sentence; one of the system's with its file and what to do."""
        if not isinstance(e, OSError) or e.strerror is None:
            return e
        text = f'{e.filename}: {e.strerror}' if e.filename else e.strerror
        return f'{text}; make room on the disk. {again}'.strip() if e.errno in FULL else text

    def main(argv=None):
        again = ''
        sys.stdout, sys.stderr = (stream or open(os.devnull, 'w') for stream in (sys.stdout, sys.stderr))
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, 'reconfigure'):
                stream.reconfigure(errors='replace')       # a terminal that can't show a character shows '?'
        folder = os.path.dirname(os.path.abspath(__file__))
        if folder not in sys.path:                         # python -P leaves it out
            sys.path.insert(0, folder)
        signal.signal(signal.SIGTERM, signal.default_int_handler)       # as Ctrl-C: told in a sentence
        try:
            args, typed, defaults = parse(argv)
            again = 'Type the same command with --resume to continue.' if 'method' in typed else ''
            import commands                                # with torch: only once the flags are right
            code = commands.main(args, typed, defaults)
            sys.stdout.flush()
            return code
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)   # the reader (head, less) left: no traceback
            return 141
        except (ValueError, OSError) as e:
            print(f'ssl.py: {sentence(e, again)}', file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f'\nstopped. {again}'.rstrip(), file=sys.stderr)
            return 130

    if __name__ == '__main__':
        sys.exit(main())
