"""What annotation tools export, in one form: photographs, with the objects or the colour mask of each.

COCO: instances files, also one for each split as Roboflow writes them. labelme: a JSON file for each photograph.
Colour masks: a PNG for each photograph, and a table of names and colours.
"""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np

from core.errors import InputError, some
from core.names import canonical, is_companion
from core.parallel import parallel_map
from dataset.annotations.coco import Instance, check_sizes, read_instances
from dataset.annotations.color_masks import TABLE, read_color_names, read_color_table
from dataset.annotations.entries import Faults
from dataset.annotations.labelme import displayed_size, embedded_photograph, read_labelme
from dataset.annotations.photographs import PhotographIndex, PhotographIndices, made_folders
from dataset.formats import undecodable
from dataset.images import check_same_size
from dataset.lists import read_lines

# names of splits: Train, training, valid, validation, val2017, test-dev
SPLITS = re.compile(r'(train|val|test)(ing|id|idation)?([-_ ]?(\d+|dev))*', re.IGNORECASE)
UNNAMED = 'photographs that no annotation names'
COLOR_FOLDERS = ('SegmentationClass', 'SegmentationObject')  # of VOC and CVAT


@dataclass(frozen=True)
class Source:
    """A photograph and its annotations.

    Attributes:
        where: what has a size, in messages, e.g. 'image 7 (7.jpg) of instances.json'.
        photograph: its file; where it is embedded, the name that the file would have.
        size: (width, height) that it must have.
        instances: objects in drawing order; empty for colour masks.
        colored: the colour mask, or None.
        names: names of the classes that it shows; name -> number of objects, or of 1 in colour masks.
        split: 'train', 'val' or 'test', or None where the tool does not say it.
        embedded: labelme's file that holds the photograph, or None.
    """

    where: str
    photograph: Path
    size: tuple[int, int]
    instances: Sequence[Instance] = ()
    colored: Path | None = None
    names: Counter = None
    split: str | None = None
    embedded: Path | None = None


@dataclass(frozen=True)
class Export:
    """All that was read.

    Attributes:
        sources: the photographs.
        class_names: of the classes, in the order of the tool.
        left_out: why annotations or files were left out -> which.
        colors: name -> RGB, for colour masks.
    """

    sources: list[Source]
    class_names: list[str]
    left_out: dict[str, list[str]]
    colors: dict[str, tuple[int, int, int]] | None = None


def split_of(name: str) -> str | None:
    """The split that the name of a folder or list means."""
    match = SPLITS.fullmatch(name)
    return match and match[1].lower()


def _count(instances):
    return Counter(instance.category for instance in instances)


def read_coco(paths: Iterable[Path], images: Path | None, out: Path, workers: int | None = None) -> Export:
    """Read COCO instances files.

    Args:
        paths: files, or folders of an export.
        images: folder of the photographs, or of folders of them; None: the export's.
        out: folder that gets the data set; what was made there is not searched.
        workers: not needed.

    Raises:
        InputError: as `read_instances`, or there is no such file, or not the photograph of an image with objects.
    """
    sources, names, left_out, indices = [], {}, defaultdict(list), PhotographIndices(out)
    for path in (file for given in paths for file in _coco_files(given)):
        root = path.parent.parent if path.parent.name == 'annotations' else path.parent
        stem = path.stem.removeprefix('instances').strip('_')
        split = split_of(path.parent.name if path.name.startswith('_annotations') else stem or root.name)
        read = read_instances(path, own=True)
        names |= dict.fromkeys(read.categories)
        for why, which in read.left_out.items():
            left_out[f'annotations {why}'] += which
        index = indices[images or root]
        for name, image in read.images.items():
            photograph = index.find(PurePosixPath(stem, name), required=image.instances)
            if photograph is None:  # of an image without objects
                left_out['images without objects, whose photographs are missing'].append(str(image))
            else:
                size = image.width, image.height
                where = f'{image} of {path}'
                sources.append(
                    Source(where, photograph, size, image.instances, names=_count(image.instances), split=split)
                )
    indices.raise_missing()
    left_out[UNNAMED] += indices.unused()
    return Export(sources, list(names), left_out)


def _coco_files(path):
    if not path.is_dir():
        return [path]
    for pattern in (
        '*/_annotations.coco.json', '_annotations.coco.json', 'annotations/instances*.json', 'instances*.json',
        '*/annotations/instances*.json', 'annotations/*.json', '*.json',
    ):  # fmt: skip
        if files := sorted(file for file in path.glob(pattern) if not is_companion(file.name)):
            if pattern == '*/_annotations.coco.json':
                files += sorted(path.glob('_annotations.coco.json'))
            return files
    raise InputError(
        f'{path} holds no COCO instances file; expected *.json in it, in annotations, or in folders of splits '
        '(train/_annotations.coco.json)'
    )


def read_labelme_files(paths: Iterable[Path], images: Path | None, out: Path, workers: int | None = None) -> Export:
    """Read labelme's files; arguments as `read_coco`, and `workers` processes.

    Raises:
        InputError: as `read_labelme`, or there is no such file, or its photograph is neither found nor embedded.
    """
    files = []
    for path in paths:
        inside = sorted(path.rglob('*.json')) if path.is_dir() else [path]
        files += [(path if path.is_dir() else path.parent, file) for file in inside if not is_companion(file.name)]
    contents = parallel_map(read_labelme, [file for _, file in files], 'reading files', workers)
    if not any(contents):
        raise InputError(f'{some(map(str, paths))}: no file of labelme (*.json with "shapes") is there')
    faults = Faults(f'{len([c for c in contents if c and c.faults])} files do not follow the format of labelme')
    for content in filter(None, contents):
        for where, fault in content.faults:
            faults.add(where, fault)
    faults.raise_any()
    sources, left_out, indices = [], defaultdict(list), PhotographIndices(out)
    for (root, file), content in zip(files, contents, strict=True):
        if content is None:
            left_out['files that are not of labelme'].append(str(file))
            continue
        left_out['shapes without area (points and lines)'] += content.left_out
        photograph, embedded = file.parent / content.image_path, None
        index = indices[images or root]
        if images or not os.path.isfile(photograph):  # False for names that no disk can hold
            found = index.find(content.image_path, required=not content.embedded)
            photograph, embedded = found or photograph, None if found else file
        index.used.add(photograph.resolve())
        split = split_of(file.relative_to(root).parts[0]) if file.parent != root else None
        sources.append(
            Source(
                f'the photograph of {file}', photograph, content.size, content.instances,
                names=_count(content.instances), split=split, embedded=embedded,
            )
        )  # fmt: skip
    indices.raise_missing()
    left_out[UNNAMED] += indices.unused()
    names = sorted({name for source in sources for name in source.names}, key=lambda name: (name.casefold(), name))
    return Export(sources, names, left_out)


def read_colors(paths: Sequence[Path], images: Path | None, out: Path, workers: int | None = None) -> Export:
    """Read colour masks: a folder with the table of colours, and the masks in it or in SegmentationClass.

    Arguments and errors as `read_labelme_files`; InputError too where a mask has an unknown colour.
    """
    if len(paths) > 1 or not paths[0].is_dir():
        raise InputError(f'--annotations {some(map(str, paths))}: expected one folder of colour masks and {TABLE}')
    table = read_color_table(paths[0] / TABLE)
    folder = paths[0] / COLOR_FOLDERS[0]
    folder = folder if folder.is_dir() else paths[0]
    masks = sorted(path for path in folder.rglob('*.[pP][nN][gG]') if not is_companion(path.name))
    made = [each.resolve() for each in made_folders(folder, out)]
    masks = [path for path in masks if not set(made) & set(path.resolve().parents)]
    if not images and folder == paths[0]:
        raise InputError(f'{paths[0]} holds no folder {COLOR_FOLDERS[0]}; give the photographs of its masks: --images')
    if not masks:
        raise InputError(f'{folder} holds no colour mask; expected *.png')
    read = parallel_map(partial(_color_source, table=table), masks, 'reading masks', workers)
    index = PhotographIndex(images or paths[0], (*made, *(paths[0] / name for name in COLOR_FOLDERS)), files=masks)
    splits = _voc_splits(paths[0] / 'ImageSets' / 'Segmentation')
    sources = []
    for path, source in zip(masks, read, strict=True):
        name = canonical(path.relative_to(folder).with_suffix('').as_posix())
        photograph = index.find(PurePosixPath(name + path.suffix), required=True, any_suffix=True)
        sources.append(replace(source, photograph=photograph, split=splits.get(name)))
    index.raise_missing()
    return Export(sources, list(table), {UNNAMED: index.unused()}, table)


def _color_source(path, table):
    places, names = read_color_names(path, table)
    shown = np.bincount(places.ravel(), minlength=len(names)) > 0
    counter = Counter(dict.fromkeys((name for name, there in zip(names, shown, strict=True) if there), 1))
    return Source(str(path), path, places.shape[::-1], colored=path, names=counter)


def _voc_splits(folder):
    """Name of a mask -> its split, by the lists of VOC and CVAT; those of other names tell nothing."""
    splits = {}
    for path in sorted(folder.glob('*.txt')):
        if split := split_of(path.stem):
            splits |= dict.fromkeys(map(canonical, read_lines(path)), split)  # names may have folders: sub/a
    return splits


def check_photographs(sources: Sequence[Source], workers: int | None = None):
    """Compare the sizes of all photographs with those of their annotations. Raises InputError where they differ."""
    check_sizes([(s.photograph, f'the size of {s.where}', s.size) for s in sources if not s.embedded], workers)
    parallel_map(_check_embedded, [s for s in sources if s.embedded], 'reading embedded images', workers)


def _check_embedded(source):
    content = embedded_photograph(source.embedded)
    size = displayed_size(content)
    if not size:
        raise undecodable(source.photograph.name, f'{source.where}: embedded image', content)
    check_same_size(source.photograph, size, f'the size of {source.where}', source.size)


READERS = {'coco': read_coco, 'labelme': read_labelme_files, 'colors': read_colors}
