"""Extract the weights of a pickle that holds foreign objects, without running code of the file.

A pickle names the functions and classes that make its objects. Here it gets those that make tensors, arrays and plain
values (`weights.PLAIN_TYPES`). Everything else is a placeholder: a dict that keeps what its object would have been made
of. So neither the code of the file nor that of its libraries runs, and the libraries need not be installed.
"""

import collections
import functools
import io
import pickle
import types
import warnings
from pathlib import Path

import torch

from core.errors import InputError
from engine.weights import PLAIN_TYPES, check_is_weights, is_plain_pickle, is_safetensors, read_content

TENSOR_MAKERS = {
    f'torch._utils.{name}': getattr(torch._utils, name)
    for name in ('_rebuild_tensor', '_rebuild_tensor_v2', '_rebuild_parameter', '_rebuild_parameter_with_state')
}
TENSOR_MAKERS |= {f'builtins.{kind.__name__}': kind for kind in (set, frozenset, list, dict, complex, bytearray, slice)}
TENSOR_MAKERS |= {f'torch.{name}': value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
TENSOR_MAKERS |= {
    'torch.Size': torch.Size, 'torch.device': torch.device, 'collections.OrderedDict': collections.OrderedDict,
    # tensors of a subclass, as plain ones; tensors of `pickle.dump`
    '_codecs.encode': lambda text, encoding: text.encode('latin1'),  # bytes in pickles of protocol 2
    'torch._tensor._rebuild_from_type_v2': lambda make, kind, arguments, state: make(*arguments),
    'torch.storage._load_from_bytes': lambda content: torch.load(io.BytesIO(content), weights_only=True),
}  # fmt: skip


IMMUTABLE_TYPE, HEAP_TYPE = 1 << 8, 1 << 9  # flags of types: attributes cannot be set; made by a class statement


class Placeholder(dict):
    """Stands for an object: entries are its attributes and, of a mapping, its items."""

    def __init__(self, *arguments, **more):
        super().__init__()

    __hash__ = object.__hash__  # objects can be keys
    __eq__ = object.__eq__

    def __call__(self, *arguments, **more):
        return Placeholder()

    def __setstate__(self, state):
        for part in state if isinstance(state, tuple) else (state,):
            self.update(part if isinstance(part, dict) else {})

    def append(self, item):
        """Items of lists are left out."""

    def extend(self, items):
        """Items of lists are left out."""


def extract(path: Path | str) -> tuple[object, list[str]]:
    """Read a file like `weights.read_content`, with placeholders for foreign objects.

    Returns:
        What the file holds, modules as their state dicts; names of what placeholders stand for, classes and functions.

    Raises:
        InputError: the file is missing, damaged, or something else.
    """
    check_is_weights(path)
    if is_safetensors(path):  # they hold tensors only
        return read_content(path), []
    replaced = {}

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            full = f'{module}.{name}'.replace('__builtin__.', 'builtins.')
            if known := PLAIN_TYPES.get(full) or TENSOR_MAKERS.get(full):
                return _of_its_own(known)
            return replaced.setdefault(full, type(name.rpartition('.')[2], (Placeholder,), {}))

    unpickling = types.SimpleNamespace(
        Unpickler=Unpickler, load=lambda file, **options: Unpickler(file, **options).load(), __name__='placeholders'
    )
    try:
        if is_plain_pickle(path):
            with open(path, 'rb') as file:
                content = Unpickler(file).load()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                content = torch.load(path, map_location='cpu', pickle_module=unpickling, weights_only=False)
        return _state_dicts(content, set()), sorted(replaced)
    except Exception as error:  # a pickle can call the functions above with anything
        reason = (str(error).splitlines() or [''])[0]
        raise InputError(
            f'{path} is damaged, or no file of PyTorch tensors ({type(error).__name__}: {reason})'
        ) from error


def _of_its_own(known):
    """A function or class that does the same as one that is known: a pickle can set attributes of what it gets."""
    if isinstance(known, types.FunctionType):
        return functools.partial(known)
    if isinstance(known, type) and known.__flags__ & HEAP_TYPE and not known.__flags__ & IMMUTABLE_TYPE:
        return type(known.__name__, (known,), {})
    return known


def _state_dicts(value, outer):
    """The value with the state dict in place of each module; `outer` are the ids of the dicts that it is in."""
    if not isinstance(value, dict) or id(value) in outer:
        return None if isinstance(value, dict) else value
    if {'_parameters', '_modules'} <= value.keys():
        return dict(_tensors(value))
    return {name: _state_dicts(item, outer | {id(value)}) for name, item in value.items()}


def _tensors(module, prefix=''):
    """Names and tensors of a module's state dict, from the attributes of the module."""
    skipped = module.get('_non_persistent_buffers_set') or ()
    for kind in ('_parameters', '_buffers'):
        for name, tensor in (module.get(kind) or {}).items():
            if torch.is_tensor(tensor) and name not in skipped:
                yield prefix + name, tensor
    for name, child in module['_modules'].items():
        if isinstance(child, dict) and '_modules' in child:
            yield from _tensors(child, f'{prefix}{name}.')
