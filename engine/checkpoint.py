"""Checkpoints: written whole or not at all, loaded only where every key fits.

A checkpoint of ours is {'format': 'pop', 'config': {...}, 'model': state dict, 'epoch': int, 'metrics': {...}}, and in
all but `best` also 'training', from which a run resumes (`resume`); the published code's are flat state dicts.
Both hold the same keys (docs/checkpoints.md). `weights` reads the files of others. Loading never runs code of a file.
"""

import glob
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from core.errors import InputError, some
from core.files import atomic_write
from core.ranks import is_main
from engine.config import DEFAULT_MODEL, check_config
from engine.placeholders import extract
from engine.weights import METADATA, SUFFIXES, find_weights, read_content
from model import MODELS, Network, find_backbone

# what classification networks have beyond our backbones
CLASSIFIER_PREFIXES = ('fc.', 'classifier.', 'features.18.')


def save_checkpoint(
    path: Path,
    net: Network,
    config: dict,
    epoch: int,
    metrics: dict,
    training: dict | None = None,
    previous: Path | None = None,
):
    """Write a checkpoint; only the main process does.

    Args:
        path: of the file.
        net: the network, not wrapped.
        config: what the network is for (`from_flags.network_config`), checked when it is loaded.
        epoch: epochs done.
        metrics: validation metrics of these weights.
        training: what a run resumes from.
        previous: where the file that is replaced is kept.

    Raises:
        InputError: the file cannot be written; what was there before is still there.
    """
    if not is_main():
        return
    state = {'format': 'pop', 'config': config, 'model': net.state_dict(), 'epoch': epoch, 'metrics': metrics}
    if training is not None:
        state['training'] = training
    write_file(path, lambda file: torch.save(state, file), keep=previous)


def write_file(path, save: Callable, keep=None):
    """Call `save(file)` to write a file, whole or not at all; InputError where that fails."""
    try:
        with atomic_write(path, 'wb', keep=keep) as file:
            save(file)
    except (OSError, RuntimeError) as error:  # PyTorch reports a full disk as RuntimeError
        free = shutil.disk_usage(path.parent).free
        raise InputError(
            f'cannot write {path} ({free / 1e6:.0f} MB are free there): {str(error).splitlines()[0]}. '
            'The files that were there are intact: make room and run the same command again to resume.'
        ) from error


def read_state(path: Path | str) -> dict:
    """Read all of a checkpoint that a run can resume from.

    Returns:
        What `save_checkpoint` wrote.

    Raises:
        InputError: missing, damaged or foreign file, or one without the state of training.
    """
    content = read_content(path)
    if not isinstance(content, dict) or content.get('format') != 'pop' or 'training' not in content:
        raise InputError(
            f'{path} is no checkpoint that training can resume from; expected last.pth or epoch_N.pth of a run. '
            'To start from its weights, use --restore-from.'
        )
    return content


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        path: of the file, or another name of the source for messages.
        state: parameter name -> tensor, without what wrappers add to the names.
        config: what the network is for (`from_flags.network_config`); empty for files of other code.
        epoch, metrics: as in `save_checkpoint`, where the file has them.
        entries: name -> type of what the file holds, tensors left out; and what placeholders stand for (`extract`).
        unfinished: it was saved before its run had finished, as `last` of an interrupted run and `epoch_N` are.
    """

    path: Path | str
    state: dict
    config: dict
    epoch: int | None = None
    metrics: dict = field(default_factory=dict)
    entries: dict[str, str] = field(default_factory=dict)
    unfinished: bool = False

    @property
    def unfinished_note(self) -> str:
        """What to say of weights that are not the end of a run; '' where they may be."""
        note = f'{self.path} was saved after epoch {self.epoch}, before its run had finished'
        return note if self.unfinished else ''

    @property
    def holds_network(self) -> bool:
        """Whether this is a whole network rather than a bare backbone."""
        return any(key.startswith(('backbone.', 'decoder.', 'base_emb')) for key in self.state)

    @property
    def model(self) -> str:
        """One of `MODELS`.

        Raises:
            InputError: the file is of another one.
        """
        name = self.config.get('model', DEFAULT_MODEL)
        if name not in MODELS:
            raise InputError(f'{self.path} is of --model {name}; this version has {", ".join(MODELS)}')
        return name

    def expect_pop(self, command: str):
        """Raise InputError where the network is none of POP, the only method that a command handles."""
        if self.model != DEFAULT_MODEL:
            raise InputError(f'{self.path} is of --model {self.model}; {command} takes {DEFAULT_MODEL} only')

    @property
    def class_counts(self) -> tuple[int, int]:
        """(Kb, Kn); Kn is 0 for stage 1.

        Raises:
            InputError: the parameters that tell are not there.
        """
        method = MODELS[self.model]
        try:
            return method.count_classes(self.state)
        except KeyError as error:
            found = find_backbone(self.state)
            hint = f'. It holds weights of {found}, from which train_base.py starts' if found else ''
            raise InputError(f'{self.path} is no checkpoint of a {method.title} network: it has no {error.args[0]}, '
                             f'but {some(self.state)}{hint}') from None  # fmt: skip

    def load_into(self, net: Network, expected: dict | None = None) -> list[str]:
        """Load a checkpoint of ours or of the published code into a network.

        Args:
            net: changed in place.
            expected: config entries that the file must agree with where it has them.

        Returns:
            Names of the parameters that the file does not hold and that keep their values: the parts that stage 2
            adds, when a stage-1 checkpoint is loaded into a network with novel classes (`Network.start_novel`).

        Raises:
            InputError: a key is missing or unexpected, a shape differs, or the file is for something else.
        """
        check_config(self.path, self.config, expected or {})
        added = [key for key in net.state_dict() if key.startswith(net.STAGE_2_PREFIXES)]
        absent = [key for key in added if key not in self.state]
        self._load_network(net, self.state, may_miss=added if len(absent) == len(added) else ())
        if absent:
            net.start_novel()
        return absent

    def load_base_into(self, net: Network, expected: dict | None = None):
        """Load the base parts of a network of either stage into one of stage 1; errors as in `load_into`."""
        check_config(self.path, self.config, expected or {})
        state = {key: value for key, value in self.state.items() if not key.startswith(net.STAGE_2_PREFIXES)}
        self._load_network(net, state)

    def _load_network(self, net, state, may_miss=()):
        """`_load_exactly`; what only the training of stage 1 has may be missing on either side."""
        wanted = net.state_dict()
        of_stage_1 = [key for key in (*state, *wanted) if key.startswith(net.STAGE_1_PREFIXES)]
        state = {key: value for key, value in state.items() if key in wanted or key not in of_stage_1}
        _load_exactly(net, state, self.path, (*may_miss, *of_stage_1))

    def load_backbone_into(self, net: Network):
        """Load the weights of a classification network or bare backbone into the backbone of a network.

        Raises:
            InputError: the keys do not fit.
        """
        state = {key: value for key, value in self.state.items() if not key.startswith(CLASSIFIER_PREFIXES)}
        try:
            _load_exactly(net.backbone, state, self.path)
        except InputError as error:
            found = find_backbone(state)
            raise InputError(f'{self.path} holds {found}: give --backbone {found}') if found else error from None


def read_checkpoint(path: Path | str, entry: str | None = None, placeholders: bool = False) -> Checkpoint:
    """Read a checkpoint file onto the CPU.

    Args:
        path: of a checkpoint of ours, or of weights in any format of `weights`.
        entry: of the file that holds the weights, where it has several sets of them.
        placeholders: read files with foreign Python objects too (`placeholders.extract`).

    Raises:
        InputError: missing, damaged or foreign file.
    """
    content, replaced = extract(path) if placeholders else (read_content(path), [])
    state = find_weights(path, content, entry)
    if not isinstance(content, dict):
        content = {}
    entries = {str(name): type(value).__name__ for name, value in content.items() if not torch.is_tensor(value)}
    entries |= dict.fromkeys(replaced, 'placeholder')
    if content.get('format') != 'pop':
        return Checkpoint(path, state, {}, entries=entries)
    config, epoch, metrics = (content.get(name) for name in ('config', 'epoch', 'metrics'))
    progress = content.get('training', {}).get('progress', {})
    unfinished = not progress.get('finished', True)
    return Checkpoint(path, state, config or {}, epoch, metrics or {}, entries, unfinished)


def write_weights(path: Path, checkpoint: Checkpoint):
    """Write the weights of a checkpoint and what they are for, without the state of training.

    Args:
        path: *.safetensors, or any other name for a file of `torch.save`.
        checkpoint: of ours or of others.

    Raises:
        InputError: the file cannot be written.
    """
    # safetensors takes no tensors that share memory or are strided
    state = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in checkpoint.state.items()
    }
    about = {'config': checkpoint.config, 'epoch': checkpoint.epoch, 'metrics': checkpoint.metrics}
    if path.suffix != '.safetensors':
        content = {'format': 'pop', **about, 'model': state} if checkpoint.config else state
        write_file(path, lambda file: torch.save(content, file))
        return
    from safetensors.torch import save  # here, as in `weights`

    metadata = {'format': 'pt'} | ({METADATA: json.dumps(about)} if checkpoint.config else {})
    write_file(path, lambda file: file.write(save(state, metadata)))


def of_seeds(path: Path) -> list[Path]:
    """The existing files of stage 2 that PATH stands for: best_123.pth for best.pth."""
    return sorted(
        other for other in path.parent.glob(f'{glob.escape(path.stem)}_*{glob.escape(path.suffix)}')
        if re.fullmatch(r'\d+', other.stem.removeprefix(f'{path.stem}_'))
    )  # fmt: skip


def resolve_checkpoint(source: str | Path, select: str = 'best', seed: int | None = None) -> Path:
    """Find the file that a --restore-from means.

    Args:
        source: a file, or a snapshot folder. DIR/best.pth means DIR/best_{seed}.pth where that exists.
        select: 'best' or 'last', for folders; the last one where there is no best, as without a validation list.
        seed: of stage 2. Without it, a folder means its only seed where it holds no other network.

    Returns:
        An existing file.

    Raises:
        InputError: there is none; names what was looked for and what is there.
    """
    path = Path(source)
    if path.is_dir():
        best, last = (any([p.is_file(), *of_seeds(p)]) for p in (path / 'best.pth', path / 'last.pth'))
        path = path / f'{"last" if last and not best else select}.pth'
    candidates = [path]
    if seed is not None:
        candidates.insert(0, path.with_name(f'{path.stem}_{seed}{path.suffix}'))
        if of_seeds(path):  # a folder of stage 2: no other file stands in for a seed
            candidates.pop()
    elif not path.is_file():
        candidates += of_seeds(path)
        if len(candidates) > 2:
            raise InputError(f'--restore-from {source} means several files: {some(map(str, candidates[1:]))}; give one')
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    present = sorted(file.name for suffix in SUFFIXES for file in path.parent.glob(f'*{suffix}'))
    raise InputError(
        f'--restore-from {source}: there is no {" and no ".join(map(str, candidates))}; '
        f'{path.parent} holds {some(present) if present else "no checkpoint"}'
    )


def _load_exactly(module, state, path, may_miss=()):
    """Load a state dict of which every key must be accounted for.

    Files of PyTorch before 0.4.1 lack batch normalisation's step counters, which nothing here reads.
    """
    wanted = module.state_dict()
    missing = [k for k in wanted if k not in state and k not in may_miss and not k.endswith('num_batches_tracked')]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f'{key} {list(state[key].shape)}, expected {list(wanted[key].shape)}'
        for key in wanted if key in state and state[key].shape != wanted[key].shape
    ]  # fmt: skip
    problems = [f'missing: {some(missing)}'] if missing else []
    problems += [f'unexpected: {some(unexpected)}'] if unexpected else []
    problems += [f'of another shape: {some(shapes)}'] if shapes else []
    if problems:
        raise InputError(
            f'{path} does not fit the network. {"; ".join(problems)}. '
            'Check --backbone, --dataset and --fold, and that the file is of the right stage.'
        )
    module.load_state_dict(state, strict=False)
