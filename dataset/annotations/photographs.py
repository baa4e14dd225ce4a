"""Find the photographs that annotations name, wherever the folders of an export are now."""

import os
from collections import defaultdict
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath, PurePosixPath

from core.errors import InputError, some
from core.names import canonical, is_companion
from dataset.formats import SUFFIXES


class PhotographIndex:
    """The photographs in a folder and the folders in it.

    Args:
        root: the folder.
        leave_out: folders that are not searched.
        files: that are no photographs, such as colour masks.
    """

    def __init__(self, root: Path, leave_out: Collection[Path] = (), files: Collection[Path] = ()):
        self.root = root
        self.missing, self.used = [], set()
        self._by_stem = defaultdict(list)
        left_out, seen = {path.resolve() for path in leave_out}, set()
        others = {path.resolve() for path in files}
        if not root.is_dir():
            raise InputError(f'folder {root} of the photographs does not exist')
        for folder, folders, names in os.walk(root, followlinks=True):
            real = Path(folder).resolve()
            if real in seen or real in left_out:
                folders.clear()
                continue
            seen.add(real)  # links may lead back
            folders[:] = sorted(name for name in folders if not is_companion(name))
            for name in sorted(names):
                if name.lower().endswith(SUFFIXES) and not is_companion(name) and real / name not in others:
                    self._by_stem[canonical(Path(name).stem)].append(Path(folder) / name)

    def find(self, name: PurePosixPath, required: bool, any_suffix: bool = False) -> Path | None:
        """The photograph that a path of another system names; None, noted if it is required, if there is none.

        Among several of the name, the one with more of the same folders is meant.

        Args:
            name: folders are separated by '/'.
            required: it is an error if there is none.
            any_suffix: the suffix may be another.

        Raises:
            InputError: several are as good.
        """
        wanted = PurePosixPath(canonical(str(name)))
        of_stem = self._by_stem.get(wanted.stem, [])
        candidates = [p for p in of_stem if any_suffix or p.suffix.lower() == wanted.suffix.lower()]
        if not candidates:
            self.missing += [f'{name}{f" (there is {of_stem[0].name})" if of_stem else ""}'] * bool(required)
            return None
        scores = [_similarity(path, wanted) for path in candidates]
        best = [path for path, score in zip(candidates, scores, strict=True) if score == max(scores)]
        if len({path.resolve() for path in best}) > 1:
            raise InputError(
                f'{self.root} holds several photographs that {name} may mean: {some(map(str, best))}. Name their '
                'folder with --images, or import them one after the other.'
            )
        self.used.add(best[0].resolve())
        return best[0]

    def unused(self, used: Collection[Path] = ()) -> list[str]:
        """Names of the photographs that were not found by any annotation; others may know of more that are `used`."""
        used = {*used, *self.used}
        return [path.name for paths in self._by_stem.values() for path in paths if path.resolve() not in used]

    def raise_missing(self):
        """InputError where required photographs were not found."""
        if self.missing:
            raise InputError(
                f'{len(self.missing)} annotated photographs are missing in {self.root}: {some(self.missing)}. Name '
                'their folder with --images.'
            )


def made_folders(root: Path, out: Path) -> list[Path]:
    """The folders in `out` that an import makes; without images where the photographs of `root` may lie there."""
    inside = out.resolve() in (root.resolve(), *root.resolve().parents)
    return [out / 'masks', *([] if inside else [out / 'images'])]


class PhotographIndices(dict):
    """Root -> `PhotographIndex`, made when it is asked for; what an import to `out` makes is not searched."""

    def __init__(self, out: Path):
        super().__init__()
        self.out = out

    def __missing__(self, root: Path) -> PhotographIndex:
        self[root] = PhotographIndex(root, made_folders(root, self.out))
        return self[root]

    def unused(self) -> list[str]:
        """As `PhotographIndex.unused`, of all indices."""
        used = {path for index in self.values() for path in index.used}
        return sorted({name for index in self.values() for name in index.unused(used)})

    def raise_missing(self):
        """As `PhotographIndex.raise_missing`."""
        for index in self.values():
            index.raise_missing()


def _similarity(path, wanted):
    """(same name, number of equal folders before it)."""
    name = canonical(path.name)
    equal = 0
    for one, other in zip(reversed(path.parent.parts), reversed(wanted.parent.parts), strict=False):
        if canonical(one).casefold() != other.casefold():
            break
        equal += 1
    return name == wanted.name, name.casefold() == wanted.name.casefold(), equal


def unique_ids(paths: Sequence[PurePath]) -> list[str]:
    """Ids of photographs: their names without suffix; where these are equal, with as many folders as tell them apart.

    Raises:
        InputError: two differ by their suffix only.
    """
    parts = [[canonical(part) for part in (*path.parent.parts, path.stem) if part != path.anchor] for path in paths]
    depths = [1] * len(paths)
    while True:
        ids = ['_'.join(part[-depth:]) for part, depth in zip(parts, depths, strict=True)]
        groups = defaultdict(list)
        for place, image_id in enumerate(ids):
            groups[image_id].append(place)
        equal = [group for group in groups.values() if len(group) > 1]
        if not equal:
            return ids
        for group in equal:
            for place in group:
                depths[place] += 1
            if all(depths[place] > len(parts[place]) for place in group):
                raise InputError(
                    f'{some(str(paths[place]) for place in group)} differ by their suffix only; rename one of them'
                )
