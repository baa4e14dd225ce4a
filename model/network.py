"""What all methods share, and how the scripts train and use a network; docs/extend.md shows how to add a method.

Dimensions: B batch, C feature channels, Kb base classes, Kn novel classes, h x w feature size, H x W image size.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from model.losses import cross_entropy, with_pseudo_labels

AUXILIARY_WEIGHT = 0.4
AUXILIARY_CHANNELS = 256
Maps = dict[str, torch.Tensor]  # name -> [B, channels, h, w]


class Labelled(NamedTuple):
    """Images that a method learns from outside of training steps.

    Attributes:
        maps: of `Network.maps`, not finished.
        masks: labels, int64 [B, H, W]; 255: not labelled, or outside of the image.
        shapes: (height, width) of each image, in pixels of the masks; the rest is padding.
    """

    maps: Maps
    masks: torch.Tensor
    shapes: list[tuple[int, int]]


class Network(nn.Module):
    """Segmenter of base and novel classes. A method is a subclass of its own and a row of `model.MODELS`.

    A method makes the parameters of its head in `__init__`, and defines `classify`, `prototypes` and `count_classes`.
    The defaults of the rest suit a method whose stages both minimise cross-entropy on the decoder's features.

    Args:
        backbone: [B, 3, H, W] -> [B, Cb, h, w]; carries `output_stride` for `map_shapes`.
        decoder: [B, Cb, h, w] -> [B, C, h, w]; carries `out_channels`.
        num_base: Kb >= 1.
        num_novel: Kn >= 0; 0 is the network of stage 1.
        options: name=choice of `OPTIONS`; only methods that have any take them.

    Attributes:
        title: name of the method in tables.
        STAGE_1_PREFIXES: of the names of parameters that only the training of stage 1 has (`start_base`).
        STAGE_2_PREFIXES: of the names of parameters and buffers that stage 2 adds.
        COMPILED: names of the methods that run backbone and decoder, which --compile compiles. `maps` and `forward` of
            a method call one of them.
        OPTIONS: what a run can choose of the method: name, a flag of ft_pop.py, -> choice -> its meaning; the first
            choice is the default.
        options: name -> choice.
        auxiliary: a head that only the training of stage 1 has, where the method has one (`start_base`).
        background: False: every pixel is of a class, so that label 0 is never predicted (`first_label`).
        POSITIONWISE: the logits of a position depend on the maps at this position only. False: on the whole image, so
            that `classify` gets it without padding.
        BASE_LEARNING_RATE: default of stage 1, of the backbone.
        BASE_MODEL: row of `model.MODELS` whose networks of stage 1 this method starts from; None: it has its own.
        BATCH_UNIT: number of images of which a batch of stage 1 must be a multiple.
        TRAINS_NOVEL: stage 2 takes steps. False: `start_from_supports` is all that it does.
    """

    title: str
    STAGE_1_PREFIXES: tuple[str, ...] = ()
    STAGE_2_PREFIXES: tuple[str, ...] = ()
    COMPILED = ('features', 'features_and_layers', 'backbone_features')
    OPTIONS: Mapping[str, Mapping[str, str]] = MappingProxyType({})
    POSITIONWISE = True
    BASE_LEARNING_RATE = 1e-3
    BASE_MODEL: str | None = None
    BATCH_UNIT = 1
    TRAINS_NOVEL = True

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__()
        if num_base < 1 or num_novel < 0:
            raise ValueError(f'got {num_base} base and {num_novel} novel classes; expected at least 1 and 0')
        self.num_base, self.num_novel = num_base, num_novel
        self.background = True
        self.backbone = backbone
        self.decoder = decoder
        self.auxiliary = None
        self.options = self.choose(options)

    @classmethod
    def choose(cls, options: Mapping[str, str] | None = None) -> dict[str, str]:
        """All `OPTIONS` with the given choices, or the default ones. Raises ValueError for other choices."""
        options = dict(options or {})
        for name, choice in options.items():
            if choice not in cls.OPTIONS.get(name, ()):
                known = ', '.join(f'{name} {"|".join(choices)}' for name, choices in cls.OPTIONS.items())
                raise ValueError(f'{cls.title} has no {name} {choice}; it has {known or "no options"}')
        return {name: options.get(name, next(iter(choices))) for name, choices in cls.OPTIONS.items()}

    @classmethod
    def best_options(cls, shot: int) -> dict[str, str]:
        """Those of `OPTIONS` that gave the best results with so many support images of a class, where they differ from
        the default ones: what `--recipe best` chooses."""
        return {}

    @classmethod
    def described(cls, options: Mapping[str, str] | None = None) -> str:
        """`title`, with the choices that differ from the default ones."""
        default, chosen = cls.choose(), cls.choose(options)
        different = [f'{name} {choice}' for name, choice in chosen.items() if choice != default[name]]
        return f'{cls.title} ({", ".join(different)})' if different else cls.title

    @classmethod
    def uses_base_views(cls, options: Mapping[str, str]) -> bool:
        """Whether `start_from_supports` and `calibrate` get base views, with these options."""
        return False

    @property
    def keeps_base(self) -> bool:
        """Whether stage 2 leaves all that stage 1 learned as it is."""
        return True

    @property
    def first_label(self) -> int:
        """The lowest label that is predicted: 1 where every pixel is of a class, so that there is no background."""
        return 0 if self.background else 1

    @property
    def num_logits(self) -> int:
        """1 + Kb + Kn."""
        return 1 + self.num_base + self.num_novel

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images; in training, what `base_losses` takes, which is the same here.

        Args:
            images: float [B, 3, H, W], normalised with ImageNet mean and std.

        Returns:
            Logits [B, 1 + Kb + Kn, h, w]: background, base classes, novel classes.
        """
        return self.classify(self.finish_maps(self.maps(images)))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Backbone and decoder: images [B, 3, H, W] to features [B, C, h, w]."""
        return self.decoder(self.backbone(images))

    def features_and_layers(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`features`, and those of the backbone's last two layers, [B, Cm, h', w'] and [B, Cb, h, w]."""
        middle = self.backbone.middle(images)
        last = self.backbone.dilatable_layers[1](middle)
        return self.decoder(last), middle, last

    def backbone_features(self, images: torch.Tensor) -> torch.Tensor:
        """Backbone: images [B, 3, H, W] to features [B, Cb, h, w]."""
        return self.backbone(images)

    def maps(self, images: torch.Tensor) -> Maps:
        """What the frozen network of stage 2 computes of images [B, 3, H, W], and what is kept of them."""
        return {'features': self.features(images)}

    def map_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Shape (channels, h, w) of each of the `maps` of images of size (H, W)."""
        return {'features': (self.decoder.out_channels, *self.feature_size(size))}

    def feature_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of images of size (H, W): each stride of 2 rounds up."""
        height, width = (-(-side // self.backbone.output_stride) for side in size)
        return height, width

    def finish_maps(self, maps: Maps) -> Maps:
        """Do what needs whole maps, padding included: `classify` may get only the part that shows the image.

        Args:
            maps: of `maps`, in any floating type.

        Returns:
            What `classify` takes; the first of the maps has the size of the logits.
        """
        return maps

    def classify(self, maps: Maps, constants: object = None) -> torch.Tensor:
        """Head.

        Args:
            maps: of `finish_maps`, in any floating type.
            constants: of `constants`; saves their computation while the head does not change.

        Returns:
            Logits [B, 1 + Kb + Kn, h, w], float32.
        """
        raise NotImplementedError

    def constants(self) -> object:
        """What `classify` needs that does not depend on the image; None: nothing."""
        return None

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """The vectors of the base classes [Kb, C], followed by those of the novel ones [Kn, C] where there are any."""
        raise NotImplementedError

    @staticmethod
    def count_classes(state: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(Kb, Kn) of a state dict; raises KeyError where it is of another method."""
        raise NotImplementedError

    def start_base(self) -> None:
        """Before stage 1: add what only stage 1 has, such as an auxiliary head."""

    def base_losses(
        self, outputs: object, masks: torch.Tensor, *, pixel_weight: float | None = None, micro_batches: int = 1
    ) -> dict[str, torch.Tensor]:
        """Terms of stage 1's objective, whose sum is minimised: cross-entropy.

        Args:
            outputs: of `forward` in training.
            masks: int64 [B, H, W].
            pixel_weight, micro_batches: as in `losses.pop_losses`.
        """
        return {'ce': cross_entropy(outputs, masks, pixel_weight)}

    def start_from(self, base: 'Network') -> None:
        """Start stage 2 from a network of stage 1."""
        known = self.state_dict()
        self.load_state_dict(known | {key: value for key, value in base.state_dict().items() if key in known})
        self.start_novel()

    def start_novel(self) -> None:
        """Start what stage 2 adds from what stage 1 has learned."""

    def start_from_supports(self, supports: Iterable[Labelled], base_views: Iterable[Labelled]) -> None:
        """Before stage 2 takes steps: learn from whole support images, without gradients.

        Args:
            supports: the support images of each novel class, a batch per class in the order of the labels. (For
                `utils.teach`, a method must take them in any batches.)
            base_views: where the method `uses_base_views`; those that show a support image have no labels.
        """

    def freeze_base(self) -> None:
        """Stage 2: train nothing but what it adds."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.startswith(self.STAGE_2_PREFIXES))

    def novel_losses(
        self, logits: torch.Tensor, masks: torch.Tensor, *, pixel_weight: float | None = None, micro_batches: int = 1
    ) -> dict[str, torch.Tensor]:
        """Terms of stage 2's objective: cross-entropy, with the background of base images pseudo-labelled.

        Args:
            logits: [2 B, 1 + Kb + Kn, h, w] of B support images, followed by B base images.
            masks: int64 [2 B, H, W] of the same images.
            pixel_weight, micro_batches: as in `losses.pop_losses`.
        """
        masks = with_pseudo_labels(logits, masks, self.num_base, self.first_label)
        return {'ce': cross_entropy(logits, masks, pixel_weight)}

    def calibrate(self, views: Iterable[Labelled]) -> None:
        """After steps of stage 2, before an evaluation: fit what only evaluation uses to the weights.

        Args:
            views: base views, as `start_from_supports` gets them.
        """

    def fix_batch_norm(self) -> None:
        """Fix statistics and affine parameters of every batch normalisation."""
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'Network':
        """Set training mode; a batch normalisation that is not trained keeps its running statistics too."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self


class Head(nn.Module):
    """The head of a network as a module of its own: `maps` to logits [B, 1 + Kb + Kn, h, w].

    In stage 2 the maps come from a frozen copy of the base network; this is the part that trains, and what
    DistributedDataParallel wraps.

    Args:
        net: whose head it is; parameters are shared, not copied.
    """

    def __init__(self, net: Network) -> None:
        super().__init__()
        self.net = net

    def forward(self, maps: Maps) -> torch.Tensor:
        return self.net.classify(self.net.finish_maps(maps))


def auxiliary_head(in_channels: int) -> nn.Sequential:
    """PSPNet's auxiliary head without its classifier: [B, Cm, h, w] -> [B, 256, h, w]."""
    return nn.Sequential(
        nn.Conv2d(in_channels, AUXILIARY_CHANNELS, 3, padding=1, bias=False),
        nn.BatchNorm2d(AUXILIARY_CHANNELS),
        nn.ReLU(inplace=True),
        nn.Dropout2d(0.1),
    )


def single(maps: torch.Tensor) -> torch.Tensor:
    """Maps in float32; float64 stays."""
    return maps if maps.dtype == torch.float64 else maps.float()


def labels_at(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Labels at the positions of maps.

    Args:
        masks: [B, H, W].
        size: (h, w) of the maps. They are upsampled with align_corners=True, which puts position (i, j) on the pixel
            (i (H - 1) / (h - 1), j (W - 1) / (w - 1)).

    Returns:
        [B, h, w].
    """
    rows, columns = (
        torch.linspace(0, whole - 1, count, device=masks.device).round().long()
        for whole, count in zip(masks.shape[1:], size, strict=True)
    )
    return masks[:, rows[:, None], columns]


def covered_mean(features: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Mean feature [C], each position weighted by its share of true pixels: for objects smaller than a position.

    Args:
        features: [B, C, h, w].
        where: bool [B, H, W]; true somewhere.
    """
    share = F.adaptive_avg_pool2d(where[:, None].to(features), features.shape[2:])
    return (share * features).sum(dim=(0, 2, 3)) / share.sum()
