"""Features of a frozen network, computed once: for every validation, and for training on kept views."""

import contextlib
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from core import IGNORE_INDEX
from core.errors import InputError, some
from core.ranks import is_main, local_world_size, rank, world_size
from engine.distributed import all_gather, barrier, broadcast, on_main
from engine.evaluation import interruptible
from engine.feature_store import GB, FeatureStore, checksum, digest
from engine.loaders import evaluation_loader
from engine.precision import autocast, to_device
from model import Network
from model.network import Labelled

PLACES = {'auto': '', 'gpu': 'kept on the GPU', 'disk': 'kept on disk', 'memory': 'kept in memory', 'off': ''}
IMAGES_AT_ONCE = {'cpu': 1, 'cuda': 32}  # of a kept batch
FORMAT = 1  # of what is kept; part of the names of the sets


class FrozenFeatures:
    """Batches of images with their maps, computed again in each pass.

    Args:
        frozen: `frozen.maps` gives the maps; it must not change any more.
        loader: from `loaders.evaluation_loader`.
        device, dtype: where and in which precision the network runs.
    """

    def __init__(self, frozen: Network, loader: DataLoader, device: torch.device, dtype: torch.dtype):
        self.frozen, self.loader, self.device, self.dtype = frozen, loader, device, dtype

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict]:
        """Yield the loader's batches with 'maps', name -> [B, channels, h, w] on the device, in place of 'image'."""
        for batch in self.loader:
            if batch['id']:
                with torch.no_grad(), autocast(self.device, self.dtype):
                    batch['maps'] = self.frozen.maps(to_device(batch.pop('image'), self.device))
            yield batch


class KeptFeatures(Dataset):
    """Maps and masks of a data set's images, kept in half precision.

    Args:
        arrays: map name -> float16 [N, h, w, channels], on the CPU or a GPU; and 'mask' -> uint8 [N, H, W], padded with
            255, on the CPU.
        rows: row of the arrays -> 'id', 'shape' and 'canvas' of its image; images that were skipped have no row.
        share: the rows that this process evaluates.
        device: of the batches.
    """

    def __init__(
        self, arrays: dict[str, torch.Tensor], rows: dict[int, dict], share: Sequence[int], device: torch.device
    ):
        self.arrays, self.masks = arrays, arrays['mask']
        self.rows, self.device = rows, device
        self.share = [row for row in share if row in rows]
        self.images_at_once = IMAGES_AT_ONCE[device.type]

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return -(-len(self.share) // self.images_at_once)

    def __getitem__(self, row: int) -> dict:
        """An image for training: 'row' for `take`, 'mask' uint8 [H, W] on the CPU, 'id', and 'skipped', which is ''."""
        return {'row': row, 'mask': self.masks[row], 'id': self.rows[row]['id'], 'skipped': ''}

    def part(self, rows: Sequence[int]) -> 'KeptFeatures':
        """Some of the rows; the arrays are shared."""
        return KeptFeatures(self.arrays, {row: self.rows[row] for row in rows}, rows, self.device)

    def take(self, rows: torch.Tensor | slice) -> dict[str, torch.Tensor]:
        """Maps of rows on the device: name -> float16 [B, channels, h, w]."""
        return {name: self._rows_of(array, rows) for name, array in self.arrays.items() if name != 'mask'}

    def _rows_of(self, array, rows):
        if isinstance(rows, slice) or array.device == self.device:
            taken = array[rows if isinstance(rows, slice) else rows.to(array.device, non_blocking=True)]
        else:  # a copy to the GPU that does not wait needs pinned memory, which indexing does not give
            taken = torch.empty(len(rows), *array.shape[1:], dtype=array.dtype, pin_memory=True)
            torch.index_select(array, 0, rows, out=taken)
        # channels last in memory, as the head reads them
        return taken.permute(0, 3, 1, 2).to(self.device, non_blocking=True)

    def __iter__(self) -> Iterator[dict]:
        """Yield batches for `evaluation.evaluate`, with 'maps' in place of 'image'."""
        for start in range(0, len(self.share), self.images_at_once):
            chosen = self.share[start : start + self.images_at_once]
            known = [self.rows[row] for row in chosen]
            # neighbouring rows are not copied
            rows = (
                slice(chosen[0], chosen[-1] + 1) if chosen[-1] - chosen[0] + 1 == len(chosen) else torch.tensor(chosen)
            )
            yield {
                'maps': self.take(rows), 'mask': self.masks[rows], 'skipped': [],
                **{key: [row[key] for row in known] for key in ('id', 'shape', 'canvas')},
            }  # fmt: skip


@dataclass(kw_only=True)
class FeatureKeeper:
    """Computes maps of a frozen network once and chooses where they are kept, by what they need and what there is.

    Attributes:
        frozen: `frozen.maps` maps images to what is kept, and `frozen.map_shapes(size)` are the shapes.
        network: digest of the network's weights (`feature_store.digest`).
        device, dtype: where and in which precision the network runs.
        place: 'gpu', 'disk' (in `store`, for later runs too), 'memory', 'off', or 'auto': the first of these with room.
        memory_gb: memory for all maps of all processes of a host together, in 10^9 bytes.
        store: where they are kept on disk; None: never there.
        batch_size, num_workers: of the loaders.
        log: called with messages.
    """

    frozen: Network
    network: str
    device: torch.device
    dtype: torch.dtype
    place: str
    memory_gb: float
    store: FeatureStore | None
    batch_size: int | None = None
    num_workers: int = 0
    log: Callable[[str], None] = print
    # arrays by `id`, as long as they are used: what an earlier seed kept may be gone
    _in_memory: weakref.WeakValueDictionary = field(default_factory=weakref.WeakValueDictionary, init=False)

    def keep(
        self, dataset: Dataset, title: str, size: tuple[int, int], whole: bool = False
    ) -> KeptFeatures | FrozenFeatures:
        """Keep the maps of a data set.

        Args:
            dataset: evaluation items, and `fingerprint()`, what they depend on.
            title: what they are, for messages and names, e.g. 'validation'.
            size: (H, W) of the images and, at most, of the masks.
            whole: every process takes and goes through all rows; otherwise it goes through its share of them.

        Returns:
            Batches for `evaluation.evaluate`, computed again in each pass if they are not kept.

        Raises:
            InputError: the place that is asked for has no room, or there is no GPU.
        """
        shapes = kept_shapes(self.frozen, size)
        share = range(rank(), len(dataset), world_size())
        own = range(len(dataset)) if whole else share  # what a process keeps in memory of its own
        image_bytes = kept_bytes(self.frozen, size)
        name = self._set_name(dataset, title, size)
        place = self._choose(title, name, image_bytes * len(own), image_bytes * len(dataset))
        if place == 'off':
            return FrozenFeatures(self.frozen, self._loader(dataset, own, keep=True), self.device, self.dtype)
        about = f'{title} features: {len(dataset)} images, {image_bytes * len(dataset) / 1e6:,.0f} MB'
        if place == 'disk':
            arrays, rows = self._on_disk(dataset, name, _with_rows(shapes, len(dataset)), share, title, about)
            return KeptFeatures(arrays, rows, own, self.device)
        self.log(f'{about}, {PLACES[place]}')
        in_memory = {'pin_memory': self.device.type == 'cuda'}
        arrays = {
            array: torch.empty(
                shape, dtype=dtype, **({'device': self.device} if place == 'gpu' and array != 'mask' else in_memory)
            )
            for array, (dtype, shape) in _with_rows(shapes, len(own)).items()
        }
        if place == 'memory':
            self._in_memory.update({id(array): array for array in arrays.values()})
        rows = self._compute(dataset, own, arrays, {row: i for i, row in enumerate(own)}, title)
        return KeptFeatures(arrays, rows, range(len(own)), self.device)

    def _set_name(self, dataset, title, size):
        """Name of a set on disk: a digest of all that the maps depend on."""
        key = {
            'format': FORMAT, 'network': self.network, 'device': self.device.type, 'dtype': str(self.dtype),
            'data': dataset.fingerprint(), 'size': size, 'maps': self.frozen.map_shapes(size),
        }  # fmt: skip
        return f'{title.replace(" ", "_")}-{digest(key)[:16]}'

    def _choose(self, title, name, need, need_on_disk):
        """The place for maps that need so many bytes in each process, or on disk."""
        if self.place == 'off':
            return 'off'
        one_host = local_world_size() == world_size()
        room = {
            'gpu': torch.cuda.mem_get_info(self.device)[0] / 2 if self.device.type == 'cuda' else 0,
            'disk': self.store.room(name) if self.store and one_host else 0,
            'memory': self.memory_gb * GB / local_world_size() - sum(a.nbytes for a in self._in_memory.values()),
        }
        places = room if self.place == 'auto' else (self.place,)
        needs = {'gpu': need, 'disk': need_on_disk, 'memory': need}
        # decided once: a process that takes memory changes what the next one finds free
        chosen = broadcast(next((place for place in places if needs[place] <= room[place]), None))
        if chosen:
            return chosen
        shortage = (
            f'{title} features need {need / GB:.1f} GB in each process; there are {room["gpu"] / GB:.1f} GB for them '
            f'on the GPU, {room["disk"] / GB:.1f} GB on disk (--features-disk-gb) and '
            f'{room["memory"] / GB:.1f} GB in memory (--features-gb)'
        )
        if self.place != 'auto':
            raise InputError(f'--features {self.place}: {shortage}. Raise the limit, keep fewer images, or use auto.')
        self.log(f'{shortage}: not kept, so they are computed again each time')
        return 'off'

    def _loader(self, dataset, rows, keep=False):
        return evaluation_loader(
            dataset, self.batch_size, num_workers=self.num_workers, device=self.device, keep_workers=keep, rows=rows
        )  # fmt: skip

    def _on_disk(self, dataset, name, shapes, share, title, about):
        with contextlib.ExitStack() as stack:
            if is_main():
                stack.enter_context(self.store.using(name, self.log))
            if on_main(lambda: self.store.is_complete(name)):
                self.log(f'{about}, computed before: {self.store.folder / name}')
            else:
                self.log(f'{about}, {PLACES["disk"]}')
                folder = on_main(lambda: self.store.begin(name, shapes))
                try:
                    arrays = self.store.arrays(folder, shapes)
                    rows = self._compute(dataset, share, arrays, {row: row for row in share}, title)
                    for row, known in rows.items():
                        known['checksum'] = checksum({array: tensor[row] for array, tensor in arrays.items()})
                    rows = {row: known for part in all_gather(rows) for row, known in part.items()}
                    on_main(lambda: self.store.finish(folder, name, shapes, rows))
                except BaseException:
                    self.store.discard(folder)
                    raise
            barrier()
            arrays, rows = self.store.load(name)
            barrier()
        return arrays, rows

    def _compute(self, dataset, indices, arrays, row_of, title):
        """Fill arrays with maps and masks of some images; returns what is known of each row."""
        rows, skipped = {}, []
        loader = self._loader(dataset, indices)
        batches = FrozenFeatures(self.frozen, loader, self.device, self.dtype)
        bar = tqdm(batches, f'{title} features', leave=False, disable=None if is_main() else True)
        for batch in interruptible(bar):
            skipped += batch['skipped']
            if not batch['id']:
                continue
            chosen = [row_of[index] for index in batch['index']]
            height, width = batch['mask'].shape[1:]
            for name, maps in batch['maps'].items():
                values = maps.permute(0, 2, 3, 1).to(arrays[name].dtype)
                finite = values.isfinite().flatten(1).all(dim=1).tolist()  # where they are: a GPU is much faster at it
                if not all(finite):
                    raise InputError(
                        f'{title} features: those of image {batch["id"][finite.index(False)]} are too large for half '
                        'precision, in which they are kept. Has the training of the base network diverged? Otherwise '
                        'keep none (ft_pop.py --features off --views 0, train_base.py --no-memory).'
                    )
                arrays[name][chosen] = values.to(arrays[name].device)
            arrays['mask'][chosen] = IGNORE_INDEX  # beyond the images
            arrays['mask'][chosen, :height, :width] = batch['mask']
            for i, row in enumerate(chosen):
                rows[row] = {key: batch[key][i] for key in ('id', 'shape', 'canvas')}
        if skipped:
            self.log(f'{title}: {len(skipped)} images skipped: {some(skipped)}')
        return rows


def join(parts: Iterable[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Maps of several batches as one batch, in their type: autocast on CPUs joins no float16 tensors."""
    parts = list(parts)
    with torch.autocast(next(iter(parts[0].values())).device.type, enabled=False):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class LabelledFeatures:
    """Batches with 'maps' as methods learn from them outside of training steps.

    Attributes:
        batches: of `FrozenFeatures` or `KeptFeatures`.
        device: of the maps.
        hidden: ids of images whose labels are left out.
    """

    batches: Iterable[dict]
    device: torch.device
    hidden: Collection[str] = ()

    def __iter__(self) -> Iterator[Labelled]:
        for batch in interruptible(self.batches):
            if not batch['id']:  # all of its images were skipped
                continue
            height, width = batch['mask'].shape[1:]
            whole = batch['canvas'][0]  # that the maps cover
            masks = F.pad(batch['mask'], (0, whole[1] - width, 0, whole[0] - height), value=IGNORE_INDEX)
            masks = masks.to(self.device).long()
            for mask, image_id in zip(masks, batch['id'], strict=True):
                if image_id in self.hidden:
                    mask.fill_(IGNORE_INDEX)
            yield Labelled(batch['maps'], masks, batch['shape'])


def kept_shapes(frozen: Network, size: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Array -> type and shape of what is kept of an image of size (H, W)."""
    maps = {name: (torch.float16, (h, w, c)) for name, (c, h, w) in frozen.map_shapes(size).items()}
    return maps | {'mask': (torch.uint8, tuple(size))}


def kept_bytes(frozen: Network, size: tuple[int, int]) -> int:
    """How many bytes are kept of an image of size (H, W)."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in kept_shapes(frozen, size).values())


def _with_rows(shapes, count):
    """Types and shapes of arrays with so many rows of these types and shapes."""
    return {name: (dtype, (count, *shape)) for name, (dtype, shape) in shapes.items()}
