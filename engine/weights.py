"""Files of weights, whoever wrote them: what they are, what they hold, and the state dict in it.

Read are files of `torch.save` in all of its formats, and safetensors. Nothing but tensors, plain values and a few plain
types (`PLAIN_TYPES`) is ever unpickled; `engine.placeholders` extracts the weights of files that hold other objects.
"""

import argparse
import datetime
import json
import pathlib
import re
import shlex
import struct
import tarfile
import types
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from core.errors import InputError, some
from core.files import what_begins_so

SUFFIXES = ('.pth', '.pt', '.safetensors')
MAGIC_NUMBER = bytes.fromhex('8a0a6cfc9c46f9206aa85019')  # of torch.save's older format, after the pickle protocol
MAX_HEADER = 10**8  # bytes of a header of safetensors
METADATA = 'pop'  # our entry of the metadata of safetensors, JSON

OTHER_FILES = (  # how files begin that are found in place of weights
    (rb'\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!', 'a compressed file. Unpack it'),
    (rb'\x89HDF', 'an HDF5 file, as Keras writes. Expected weights of PyTorch'),
    (rb'\x93NUMPY', 'a NumPy array. Expected parameter names with tensors'),
    (rb'\xff\xd8\xff|\x89PNG|RIFF....WEBP|II\*\0|MM\0\*', 'an image. Expected weights of PyTorch'),
    (rb'GGUF', 'a GGUF file. Expected weights of PyTorch'),
    (rb'(?i)\s*\{.*"weight_map"', 'an index of weights that are in several files. Expected one file with all of them'),
)
TEXT = rb'[\t\n\r -~]{16}'

# Entries of foreign checkpoints that hold the network, the best guess first, and names that wrappers add to keys
ENTRIES = ('model', 'state_dict', 'model_state_dict', 'model_state', 'net', 'network', 'module', 'weights', 'params')
WRAPPERS = {'module', '_orig_mod', '_forward_module', '_fsdp_wrapped_module', '_checkpoint_wrapped_module'}
OUTER_NAMES = {'model', 'net', 'network'}
WRAPPER_BUFFERS = {'n_averaged'}  # of torch.optim.swa_utils.AveragedModel


def _plain_types():
    """Types that are harmless to make from any values, by the names that pickles call them."""
    functions = {'scalar': np.float64().__reduce__()[0], '_reconstruct': np.empty(0).__reduce__()[0]}
    named = {f'numpy.{core}.multiarray.{name}': function
             for core in ('core', '_core') for name, function in functions.items()}  # fmt: skip
    named |= {'numpy.ndarray': np.ndarray, 'numpy.dtype': np.dtype}
    named |= {f'numpy.dtypes.{name}': kind for name, kind in vars(np.dtypes).items() if isinstance(kind, type)}
    named |= {'argparse.Namespace': argparse.Namespace, 'types.SimpleNamespace': types.SimpleNamespace}
    for module in ('pathlib', 'pathlib._local'):  # its name in some versions of Python
        for kind in ('Posix', 'Windows', 'PurePosix', 'PureWindows'):
            named[f'{module}.{kind}Path'] = getattr(pathlib, f'Pure{kind.removeprefix("Pure")}Path')
    return named | {'datetime.datetime': datetime.datetime}


PLAIN_TYPES = _plain_types()


def read_content(path: Path | str) -> object:
    """Read what a file holds onto the CPU, without running code of the file.

    Returns:
        What was saved; of safetensors, a state dict, or a checkpoint of ours where its metadata says so.

    Raises:
        InputError: the file is missing, damaged, or something else; says what it is, and how its weights can be read.
    """
    check_is_weights(path)
    if is_safetensors(path):
        return _read_safetensors(path)
    try:
        plain = torch.serialization.safe_globals([(kind, name) for name, kind in PLAIN_TYPES.items()])
        with plain, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # warnings precede errors, whose reasons are below
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:  # of many types
        raise InputError(_unreadable(path, str(error) or type(error).__name__)) from error


def check_is_weights(path: Path | str):
    """Raise InputError unless a file can hold weights: it is missing, incomplete, damaged or of another kind."""
    try:
        with open(path, 'rb') as file:
            start = file.read(512)
    except FileNotFoundError:
        raise InputError(f'checkpoint {path} does not exist') from None
    except IsADirectoryError:
        raise InputError(f'{path} is a folder; expected a checkpoint file, e.g. {path}/best.pth') from None
    except OSError as error:
        raise InputError(f'checkpoint {path} cannot be read: {error.strerror}') from None
    if not start:
        raise InputError(f'{path} is empty (0 bytes). Copy or download it again.')
    if kind := what_begins_so(start, OTHER_FILES) or (
        re.match(TEXT, start) and 'a text file. Expected weights of PyTorch'
    ):
        raise InputError(f'{path} is {kind}.')
    if start.startswith(b'PK'):
        _check_zip(path)
    elif _is_tar(path):
        try:
            with tarfile.open(path, 'r:') as archive:
                names = archive.getnames()
        except Exception as error:  # of many types
            raise _damaged(path, error) from error
        if not _is_oldest_format(names):
            raise InputError(_other_archive(path, 'tar', names))


def is_plain_pickle(path: Path | str) -> bool:
    """Whether `pickle.dump` wrote a file rather than `torch.save`."""
    with open(path, 'rb') as file:
        start = file.read(32)
    return start[:1] == b'\x80' and start[1:2] <= b'\x05' and MAGIC_NUMBER not in start


def _check_zip(path):
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            code = any(name.endswith('/constants.pkl') for name in names)
            weights = any(name.endswith('/data.pkl') for name in names) and not code
            wrong = archive.testzip() if weights else None  # PyTorch reads past wrong checksums
    except Exception as error:  # of many types
        early = f'it ends early, after {Path(path).stat().st_size:,} bytes' if 'not a zip file' in str(error) else error
        raise _damaged(path, early) from error
    if code:
        program = f'import torch; torch.save(torch.jit.load({str(path)!r}).state_dict(), "weights.pth")'
        raise InputError(
            f'{path} is a TorchScript archive, which holds code beside its weights. If you trust it, write its '
            f'weights alone: python -c {shlex.quote(program)}'
        )
    if not weights:
        raise InputError(_other_archive(path, 'zip', names))
    if wrong:
        raise _damaged(path, f'the checksum of {wrong} is wrong')


def _damaged(path, reason):
    return InputError(f'{path} is damaged: {str(reason) or type(reason).__name__}. Copy or download it again.')


def _other_archive(path, kind, names):
    """What an archive holds that is not a checkpoint itself."""
    inside = [name for name in names if name.endswith(SUFFIXES)]
    if inside:
        return f'{path} is a {kind} archive that holds {some(inside)}. Unpack it and give that file.'
    if names and all(name.endswith('.npy') for name in names):
        kind = 'NumPy (.npz)'
    return f'{path} is no checkpoint but a {kind} archive of {some(names) or "nothing"}. Expected weights of PyTorch.'


def _is_tar(path):
    with open(path, 'rb') as file:  # tarfile takes text and zeros for archives too
        return file.read(262)[257:] == b'ustar'


def _is_oldest_format(names):
    """Whether a tar archive with these files is of torch.save before it had a format of its own."""
    return {'pickle', 'storages', 'tensors'} <= set(names)


def is_safetensors(path: Path | str) -> bool:
    """Whether a file begins as safetensors do: the length of a header, and JSON."""
    with open(path, 'rb') as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b'{' and struct.unpack('<Q', start[:8])[0] <= MAX_HEADER


def _read_safetensors(path):
    try:
        from safetensors import SafetensorError  # here, as no other file needs it
        from safetensors.torch import load
    except ImportError as error:
        raise InputError(
            f'{path} is in the format safetensors, whose library is missing ({error}): pip install safetensors'
        ) from error
    try:
        content = Path(path).read_bytes()  # the library opens no file whose name is no UTF-8
        state = load(content)
        header = json.loads(content[8 : 8 + struct.unpack('<Q', content[:8])[0]])
        about = json.loads(header.get('__metadata__', {}).get(METADATA, '{}'))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f'{path} is damaged ({error}). Copy or download it again.') from error
    return {'format': 'pop', **about, 'model': state} if isinstance(about, dict) and about else state


def _unreadable(path, error):
    """Why torch.load cannot read a file, and what to do."""
    if found := re.search(r'GLOBAL (\S+)|Unsupported (?:class|type) (\S+)', error):
        name = found[1] or found[2]
        return (
            f'{path} holds Python objects ({name}) beside its weights or instead of them. They are not loaded, as '
            f'code of theirs would run. {extraction(path)}'
        )
    if _is_tar(path):
        return f'{path} is in the oldest format of torch.save, a tar archive. {extraction(path)}'
    if is_plain_pickle(path) or ('Weights only load failed' in error and zipfile.is_zipfile(path)):
        return f'{path} is a pickle that PyTorch does not read without running its code. {extraction(path)}'
    # PyTorch's message goes on with the advice to load the file unsafely
    reason = re.split(r'\. |\n', error)[0]
    return f'{path} is damaged, or no file of PyTorch tensors ({reason}). Copy or download it again.'


def extraction(path: Path | str) -> str:
    """The command that writes the weights of a file alone, as a sentence."""
    command = shlex.join(['python', '-m', 'utils.checkpoint', str(path), '--extract', '--to', 'weights.safetensors'])
    return f'To write the weights alone: {command}'


def find_weights(path: Path | str, content: object, entry: str | None = None) -> dict[str, torch.Tensor]:
    """Find the state dict in what a file holds.

    Args:
        path: for messages.
        content: of the file.
        entry: name of the entry that holds the weights, where there are several.

    Returns:
        Parameter name -> tensor, without what wrappers (DataParallel, torch.compile, ...) add to the names.

    Raises:
        InputError: there is none, or more than one.
    """
    if entry is not None:
        if entry not in sets_of_weights(content):
            raise InputError(f'{path} has no entry {entry!r} with weights; it has {some(sets_of_weights(content))}')
        content = content[entry]
    while _holds_tensors(content):
        nested = sets_of_weights(content)
        known = [name for name in ENTRIES if name in nested]
        state = {name: _as_tensor(value) for name, value in content.items() if isinstance(name, str)}
        state = {name: tensor for name, tensor in state.items() if tensor is not None}
        if not known and (any('.' in name for name in state) or not nested):
            return _without_wrappers(path, state)
        if not known and len(nested) > 1:
            raise InputError(
                f'{path} holds several sets of weights: {some(nested)}. To write one of them alone: '
                f'{shlex.join(["python", "-m", "utils.checkpoint", str(path), "--entry", nested[0]])} --to weights.pth'
            )
        content = content[(known or nested)[0]]
    what = f'has {some(map(str, content), 8)}' if isinstance(content, dict) else f'is of type {type(content).__name__}'
    raise InputError(f'{path} holds no state dict: what it holds {what}. Expected parameter names with tensors.')


def sets_of_weights(content: object) -> list[str]:
    """Names of the entries that hold weights, if a file holds several things."""
    items = content.items() if isinstance(content, dict) else ()
    return [name for name, value in items if isinstance(name, str) and _holds_tensors(value)]


def _holds_tensors(value):
    """Whether this is a dict with tensors, or with such dicts; an optimiser's states have numbers for names."""
    return isinstance(value, dict) and any(
        isinstance(name, str) and (_as_tensor(item) is not None or _holds_tensors(item)) for name, item in value.items()
    )


def _as_tensor(value):
    """A tensor, also of an array; None for anything else."""
    if isinstance(value, np.ndarray) and value.dtype.kind in 'fiub' and value.dtype.isnative:
        return torch.from_numpy(np.ascontiguousarray(value))
    return value if torch.is_tensor(value) else None


def _without_wrappers(path, state):
    clean = {}
    for key, tensor in state.items():
        parts = [part for part in key.split('.') if part not in WRAPPERS]
        while len(parts) > 1 and parts[0] in OUTER_NAMES:
            parts.pop(0)
        name = '.'.join(parts)
        if name in clean:
            raise InputError(
                f'{path} holds two tensors for {name}; one of them is called {key}. Remove one of the two.'
            )
        if name not in WRAPPER_BUFFERS:
            clean[name] = tensor
    return clean
