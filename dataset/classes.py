"""Which data sets there are: built-in ones, and those of cards. Only cards say which classes are novel."""

from pathlib import Path

from core.errors import InputError
from dataset.cards import BUILT_IN, FILE_NAME, read_card
from dataset.spec import DatasetSpec

DATASETS = {spec.name: spec for spec in (read_card(BUILT_IN / f'{name}.yaml') for name in ('voc', 'coco', 'shapes'))}


def find_dataset(text: str) -> DatasetSpec:
    """The data set that --dataset names: a built-in one, a card, or the folder of one. Raises InputError."""
    if text in DATASETS:
        return DATASETS[text]
    path = Path(text)
    if path.is_dir():
        path = path / FILE_NAME
    if not path.is_file():
        raise InputError(
            f'got {text!r}; expected one of {", ".join(DATASETS)}, the folder of a {FILE_NAME}, or such a file '
            f'(docs/own_data.md); there is no file {path}'
        )
    spec = read_card(path)
    if spec.name in DATASETS:
        raise InputError(
            f'{path}: the name {spec.name!r} is that of a built-in data set; give it another: name: my_data'
        )
    return spec
