"""Read a COCO instances file and check all of it before anything is drawn.

    {"images":      [{"id": 7, "file_name": "7.jpg", "height": 480, "width": 640}, ...],
     "categories":  [{"id": 18, "name": "dog"}, ...],
     "annotations": [{"id": 1, "image_id": 7, "category_id": 18, "iscrowd": 0, "segmentation": ...}, ...]}

The file's ids are numbers. An image id of this project is the name of the photograph without folders and suffix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from core.errors import InputError, some
from core.names import canonical
from core.parallel import parallel_map
from dataset.annotations.entries import SIZE, TEXT, Fault, Faults, check_fields, read_json, shortened
from dataset.annotations.outlines import Outline, read_outline
from dataset.images import check_same_size, read_header

CROWD, BARE = 'crowd', 'without outline'


class Instance(NamedTuple):
    """An object with an outline.

    Attributes:
        number: id of the annotation in the file.
        category: its name.
        outline: polygons or run lengths, as `outlines.read_outline` returns them.
        crowd: it is a region of many objects; always False unless these are asked for.
    """

    number: int
    category: str
    outline: Outline
    crowd: bool = False


@dataclass(frozen=True)
class AnnotatedImage:
    """An image of the file.

    Attributes:
        number: its id in the file.
        file_name: as in the file; folders are separated by '/'.
        height, width: in pixels.
        instances: in the order of the file, in which they are drawn; may be empty.
    """

    number: int
    file_name: str
    height: int
    width: int
    instances: list[Instance]

    def __str__(self):
        return f'image {self.number} ({self.file_name})'


@dataclass(frozen=True)
class InstancesFile:
    """The checked content of a file.

    Attributes:
        path: of the file.
        categories: their names, in the order of the file, also of those without annotations.
        images: image id -> image, sorted by image id.
        left_out: why annotations are left out -> which these are, e.g. 'annotation 5 of image 7'.
    """

    path: Path
    categories: list[str]
    images: dict[str, AnnotatedImage]
    left_out: dict[str, list[str]]

    @property
    def annotated(self) -> dict[str, AnnotatedImage]:
        """The images that have instances."""
        return {image_id: image for image_id, image in self.images.items() if image.instances}

    def describe_left_out(self) -> str:
        """How many annotations are left out and why, with examples: '2 crowd (annotation 5 of image 7, ...)'."""
        counts = [f'{len(names)} {why} ({some(names, 2)})' for why, names in self.left_out.items() if names]
        return ', '.join(counts) or 'none'

    def class_ids(self, class_names: Sequence[str]) -> dict[str, int]:
        """Class ids of the categories, found by name.

        Args:
            class_names: names of class ids 1..N.

        Raises:
            InputError: the file has a category that is none of them.
        """
        known = {name: class_id for class_id, name in enumerate(class_names, 1)}
        if unknown := [name for name in self.categories if name not in known]:
            absent = [name for name in class_names if name not in self.categories]
            raise InputError(
                f'{self.path} has {len(unknown)} categories that are no classes of this data set: '
                f'{some(map(repr, unknown), 8)}. Classes that are no categories of the file: '
                f'{some(map(repr, absent), 8) or "none"}. Class ids follow from the names, so rename these categories '
                'in the file. For classes of your own, see docs/own_data.md.'
            )
        return {name: known[name] for name in self.categories}

    def check_sizes(self, photographs: Mapping[str, Path], workers: int | None = None):
        """Compare the sizes of the images that have instances with those in the headers of their photographs.

        Args:
            photographs: image id -> photograph.
            workers: number of processes; None: one per usable core.

        Raises:
            InputError: sizes differ, or a header cannot be read.
        """
        check_sizes(
            [
                (photographs[image_id], f'the size of {image} in {self.path}', (image.width, image.height))
                for image_id, image in self.annotated.items()
            ],
            workers,
        )


def check_sizes(jobs: Sequence[tuple[Path, str, tuple[int, int]]], workers: int | None = None):
    """Compare sizes in annotations with those in the headers of photographs.

    Args:
        jobs: photograph, what has the size in messages, (width, height).
        workers: number of processes; None: one per usable core.

    Raises:
        InputError: sizes differ, or a header cannot be read.
    """
    errors = [error for error in parallel_map(_size_error, jobs, 'reading headers', workers) if error]
    if errors:
        raise InputError(f'{errors[0]} Images that do not fit their annotations: {len(errors)} of {len(jobs)}.')


def _size_error(job):
    """Message where a photograph has another size than the file says, or None."""
    photograph, image, size = job
    try:
        check_same_size(photograph, read_header(photograph)[0], image, size)
    except InputError as error:
        return str(error)
    return None


def image_id_of(file_name: str) -> str:
    """Last name of a path with separators of Linux or Windows, without suffix; '' if there is none."""
    name = canonical(PurePosixPath(file_name.replace('\\', '/')).stem)
    return '' if name == '..' else name


_INTEGER = (lambda value: type(value) is int, 'an integer')
_SWITCH = (lambda value: type(value) is int and value in (0, 1), '0 or 1')
_FILE_NAME = (lambda value: isinstance(value, str) and image_id_of(value) != '', 'the name of a file')
# lists of the file -> what one entry is called, and what its fields must be
ENTRIES = {
    'categories': ('category', {'id': _INTEGER, 'name': TEXT}),
    'images': ('image', {'id': _INTEGER, 'file_name': _FILE_NAME, 'height': SIZE, 'width': SIZE}),
    'annotations': ('annotation', {'id': _INTEGER, 'image_id': _INTEGER, 'category_id': _INTEGER, 'iscrowd': _SWITCH}),
}
DEFAULTS = {'iscrowd': 0}  # tools without crowd regions omit it


def read_instances(path: Path, own: bool = False) -> InstancesFile:
    """Read and check an instances file.

    Args:
        path: of the file.
        own: a file of any tool. Images are known by their paths, categories without annotations may have the names of
            others, crowd regions are instances too, and there may be nothing to draw.

    Raises:
        InputError: the file cannot be read, does not follow the format (with the faults of all its entries), or has
            nothing to draw.
    """
    content = read_json(path, 'a COCO instances file')
    if not isinstance(content, dict) or not all(isinstance(content.get(kind), list) for kind in ENTRIES):
        found = f'an object of {", ".join(content) or "nothing"}' if isinstance(content, dict) else shortened(content)
        raise InputError(
            f'{path} is not a COCO instances file: it holds {found}; expected an object of images, categories and '
            'annotations, each a list. Files of captions, panoptic segments or results are something else.'
        )
    faults = Faults(f'{path} does not follow the COCO format')
    categories = {number: canonical(entry['name']) for number, entry in _checked(content, 'categories', faults)}
    names = list(categories.values())
    if own:  # Roboflow adds a category without annotations, which may have the name of another
        names = list(dict.fromkeys(name.strip() for name in names))
        used = [entry.get('category_id') for entry in content['annotations'] if isinstance(entry, dict)]
        used = {number for number in used if type(number) is int}
        categories = {number: name.strip() for number, name in categories.items() if number in used}
    faults.check_unique('category names', {f'category {number}': name for number, name in categories.items()})
    images = {
        number: AnnotatedImage(number, entry['file_name'].replace('\\', '/'), entry['height'], entry['width'], [])
        for number, entry in _checked(content, 'images', faults)
    }
    id_of = canonical if own else image_id_of
    ids = {str(image): id_of(image.file_name) for image in images.values()}
    faults.check_unique('file names' if own else 'file names, without folders and suffix,', ids)
    faults.raise_any()  # annotations refer to categories and images
    left_out = {CROWD: [], BARE: []}
    for number, entry in _checked(content, 'annotations', faults):
        image, category = images.get(entry['image_id']), categories.get(entry['category_id'])
        try:
            outline = _read_annotation(entry, image, category, crowds=own)
        except Fault as fault:
            faults.add(_name_of(entry, 'annotation'), fault)
            continue
        if outline is None:
            left_out[CROWD if entry.get('iscrowd') and not own else BARE].append(_name_of(entry, 'annotation'))
        else:
            image.instances.append(Instance(number, category, outline, bool(entry.get('iscrowd'))))
    faults.raise_any()
    by_id = {id_of(image.file_name): image for image in images.values()}
    instances = InstancesFile(path, names, dict(sorted(by_id.items())), left_out)
    _check_drawn(instances, may_be_empty=own)
    return instances


def _read_annotation(entry, image, category, crowds):
    """The outline of an annotation whose fields have the right types; None if it is a crowd region or has none."""
    for field, referred in (('image_id', image), ('category_id', category)):
        if referred is None:
            raise Fault(f'{field} must be the id of an entry of the file', shortened(entry[field]))
    if entry.get('iscrowd') and not crowds:
        return None
    return read_outline(entry.get('segmentation'), image.height, image.width)


def _check_drawn(instances, may_be_empty):
    """Raise InputError where there is nothing to draw, or all of it in one pixel."""
    annotated = instances.annotated
    if not annotated:
        if may_be_empty:
            return
        raise InputError(
            f'{instances.path} has nothing to draw: of {len(instances.images)} images, none has an object with an '
            f'outline. Annotations left out: {instances.describe_left_out()}. Export the outlines of the objects too.'
        )
    outlines = (instance.outline for image in annotated.values() for instance in image.instances)
    if all(isinstance(outline, list) and max(map(max, outline)) <= 1 for outline in outlines):
        raise InputError(
            f'{instances.path} has no coordinate above 1: they seem to be fractions of the image; expected pixels. '
            'Multiply them by its width and height.'
        )


def _checked(content, kind, faults):
    """(id, entry) of each entry of a list whose fields are what they must be."""
    noun, fields = ENTRIES[kind]
    seen = set()
    for place, entry in enumerate(content[kind]):
        try:
            check_fields(entry, fields, DEFAULTS)
            if entry['id'] in seen:
                raise Fault(f'{noun} ids must differ', 'the id of an earlier one')
        except Fault as fault:
            faults.add(_name_of(entry, noun) or f'{kind}[{place}]', fault)
        else:
            seen.add(entry['id'])
            yield entry['id'], entry


def _name_of(entry, noun):
    """How messages name an entry of a list; None where it has no id."""
    number = entry.get('id') if isinstance(entry, dict) else None
    if type(number) is not int:
        return None
    return f'{noun} {number}' + (f' of image {shortened(entry.get("image_id"))}' if noun == 'annotation' else '')
