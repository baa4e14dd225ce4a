"""What the commands that make masks share: their flags, and the folder of the masks."""

import argparse
import filecmp
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np

from core.errors import InputError
from core.files import atomic_write, check_writable
from core.names import files_by_id
from dataset.classes import DATASETS
from utils.cli import positive


def add_output_flags(parser: argparse.ArgumentParser, dataset: str, root_flag: str):
    """Where masks and lists go, and how: --mask-root --list-dir --workers --overwrite.

    Args:
        parser: gets the flags.
        dataset: its folder of lists is the default.
        root_flag: names the folder of the data.
    """
    parser.add_argument(
        '--mask-root', type=Path,
        help='folder that gets the masks, and links to the photographs, so that it can be the --data-dir of other '
        f'commands; for data that is read-only (default: {root_flag})',
    )  # fmt: skip
    list_dir = DATASETS[dataset].train_list.parent
    parser.add_argument('--list-dir', type=Path, default=list_dir, help=f'default: dataset/list/{dataset}')
    parser.add_argument('--workers', type=positive, help='processes (default: one per core)')
    parser.add_argument('--overwrite', action='store_true', help='make existing masks and lists again')


def link_photographs(folder: Path, link: Path):
    """Make a link to a folder of photographs, unless it is there already or both paths are the same.

    Raises:
        InputError: something else is there, or the link cannot be made.
    """
    try:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(folder.resolve(), target_is_directory=True)
    except FileExistsError:
        if not (link.exists() and link.samefile(folder)):
            raise InputError(f'{link} exists and is no link to {folder}; choose another --mask-root') from None
    except OSError as error:
        raise InputError(f'cannot link {link} to {folder}: {error.strerror}. Choose another --mask-root.') from error


def place_photograph(source: Path, target: Path, copy: bool = False, overwrite: bool = False) -> str:
    """Link a photograph, or copy it, so that it has another name in another folder.

    Args:
        source: the photograph.
        target: its new place. Where symbolic links are not possible, it gets a hard link.
        copy: copy the file instead, also in place of a link to it.
        overwrite: replace another file that is there.

    Returns:
        'made', 'same' where it is there already, or 'differs' where another file is there and stays.

    Raises:
        InputError: neither link can be made, or the folder cannot be written to.
    """
    if target.exists():  # a link whose photograph has moved does not, and is made anew
        is_link = target.samefile(source)
        if (is_link and not (copy and target.is_symlink())) or (copy and not is_link and filecmp.cmp(source, target)):
            return 'same'
        if not is_link and not overwrite:
            return 'differs'
    if copy:
        with open(source, 'rb') as file, atomic_write(target, 'wb', sync=False) as copied:
            shutil.copyfileobj(file, copied)
        return 'made'
    beside = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    beside.unlink(missing_ok=True)
    try:
        try:
            beside.symlink_to(source.resolve())
        except OSError:
            os.link(source.resolve(), beside)
        os.replace(beside, target)
    except OSError as error:
        raise InputError(f'cannot link {target} to {source}: {error.strerror}. Use --copy.') from error
    return 'made'


def masks_to_make(folder: Path, ids: Iterable[str], overwrite: bool) -> list[str]:
    """The image ids that have no mask in a folder yet; all with `overwrite`.

    Raises:
        InputError: there are some, and the folder cannot be written to.
    """
    present = {} if overwrite else files_by_id(folder, '.png')
    missing = [image_id for image_id in ids if image_id not in present]
    if missing:
        try:
            check_writable(folder)
        except InputError as error:
            raise InputError(f'{error} --mask-root names one.') from error
    return missing


def write_mask(path: Path, mask: np.ndarray):
    """Write class ids, uint8 [H, W], as a greyscale PNG."""
    with atomic_write(path, 'wb', sync=False) as file:
        file.write(cv2.imencode('.png', mask)[1].tobytes())
