"""POP: projection onto orthogonal prototypes (Liu et al., CVPR 2023), with the head in closed form.

Dimensions: B batch, C feature channels, Kb base classes, Kn novel classes, h x w feature size.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.losses import pop_losses, with_pseudo_labels
from model.network import Maps, Network, single


class POP(Network):
    """Segmenter whose classes are orthogonal prototypes.

    A feature vector q is split into its projections on the normalised prototypes s_k and a residual,

        p_k = <s_k, q>,    q_k = p_k s_k,    r = q - sum_k q_k

    and scored by a small MLP phi: logit_k = phi(q_k) for class k, logit_0 = phi(r) for background. phi has no biases
    and only ReLUs, so phi(a s) = a phi(s) for a >= 0, and with that, exactly,

        logit_k = relu(p_k) phi(s_k) + relu(-p_k) phi(-s_k).

    phi is thus evaluated on 2K vectors instead of K feature maps; only the residual takes the dense MLP.

    With novel classes, phi (`classifier`) scores the base classes, a second MLP phi_n (`classifier_n`) the novel
    classes and the background.

    Args: those of `Network`.

    Attributes:
        extra: channels that the novel prototypes have beyond those of the decoder; a variant may have some.
    """

    title = 'POP'
    STAGE_2_PREFIXES = ('novel_emb', 'classifier_n.')
    extra = 0

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0, **options) -> None:
        super().__init__(backbone, decoder, num_base, num_novel, **options)
        channels = decoder.out_channels
        self.classifier = _prototype_mlp(channels, channels)
        self.base_emb = nn.Parameter(nn.init.orthogonal_(torch.empty(num_base, channels)))
        self.novel_emb = None
        if num_novel:
            self.add_novel()
            self.start_novel()

    def add_novel(self) -> None:
        """Add the novel prototypes and phi_n."""
        channels = self.decoder.out_channels
        self.classifier_n = _prototype_mlp(channels + self.extra, channels)
        start = nn.init.orthogonal_(torch.empty(self.num_novel, channels))
        self.novel_emb = nn.Parameter(F.pad(start, (0, self.extra)))

    def maps(self, images: torch.Tensor) -> Maps:
        """What the head classifies: `decompose` of the features of images [B, 3, H, W]."""
        return self.decompose(self.features(images))

    def map_shapes(self, size: tuple[int, int]) -> dict[str, tuple[int, int, int]]:
        """Shape (channels, h, w) of each of the `maps` of images of size (H, W)."""
        shape = self.feature_size(size)
        return {'projections': (self.num_base, *shape), 'residual': (self.decoder.out_channels, *shape)}

    def decompose(self, features: torch.Tensor) -> Maps:
        """Split features by the base prototypes. In stage 2 this is constant for an image.

        It runs in float32 also under autocast: the residual is a difference of nearly equal numbers.

        Args:
            features: float [B, C, h, w].

        Returns:
            'projections' p_k [B, Kb, h, w] and 'residual' q - sum_k p_k s_k [B, C, h, w] over the base classes, float32
            (float64 for float64 features).
        """
        with torch.autocast(features.device.type, enabled=False):
            q = vectors(features)  # [N, C], N = B h w
            s = F.normalize(self.base_emb, dim=1)  # [Kb, C]
            p = q @ s.T  # [N, Kb]
            return {'projections': as_map(p, features), 'residual': as_map(q - p @ s, features)}

    def classify(self, maps: Maps, constants: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Prototype head: logit_k = relu(p_k) phi(s_k) + relu(-p_k) phi(-s_k) and logit_0 = phi(r).

        Args:
            maps: of `finish_maps`, in any floating type.
            constants: of `constants`; saves their computation while the head does not change.

        Returns:
            Logits [B, 1 + Kb + Kn, h, w].
        """
        with torch.autocast(self.base_emb.device.type, enabled=False):
            p, r = vectors(maps['projections']), vectors(maps['residual'])  # [N, Kb], [N, C]
            novel = None
            if self.novel_emb is not None:
                s = F.normalize(self.novel_emb, dim=1)
                novel = self.novel_projections(maps, p, r, s), s  # [N, Kn], [Kn, C + extra]
                p = torch.cat([p, novel[0]], dim=1)
            toward, away = constants or self.constants()  # [K]
            logits = F.relu(p) * toward + F.relu(-p) * away  # [N, K]
        background = self.score_background(maps, r, novel)  # [N]
        logits = torch.cat([background.to(logits.dtype)[:, None], logits], dim=1)  # [N, 1 + K]
        return as_map(logits, maps['residual'])

    def novel_projections(self, maps: Maps, p: torch.Tensor, r: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """Projections of q = residual + sum_k p_k s_k on the novel prototypes.

        Args:
            maps: as `classify` gets them.
            p, r: base projections [N, Kb] and residual [N, C] of their positions.
            s: the novel prototypes, normalised, [Kn, C + extra].

        Returns:
            [N, Kn].
        """
        return self.inner_products(p, r, s[:, : r.shape[1]])

    def inner_products(self, p: torch.Tensor, r: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """Of q = residual + sum_k p_k s_k, given by p [N, Kb] and r [N, C], with vectors [K, C]: [N, K]."""
        return r @ directions.T + p @ (F.normalize(self.base_emb, dim=1) @ directions.T)

    def score_background(
        self, maps: Maps, r: torch.Tensor, novel: tuple[torch.Tensor, torch.Tensor] | None
    ) -> torch.Tensor:
        """phi, in stage 2 phi_n, of what all prototypes leave; in mixed precision under autocast.

        Args:
            maps: as `classify` gets them.
            r: what the base prototypes leave, [N, C].
            novel: in stage 2 `novel_projections` [N, Kn], and the novel prototypes, normalised, [Kn, C + extra].

        Returns:
            [N].
        """
        if novel is None:
            return score(self.classifier, r)
        projections, s = novel
        with torch.autocast(r.device.type, enabled=False):
            r = r - projections @ s
        return score(self.classifier_n, r)

    def constants(self) -> tuple[torch.Tensor, torch.Tensor]:
        """phi(s_k) and phi(-s_k), float32 [K] each; phi_n scores the novel prototypes."""
        scored = [(self.classifier, self.base_emb)]
        if self.novel_emb is not None:
            scored.append((self.classifier_n, self.novel_emb))
        toward, away = [], []
        with torch.autocast(self.base_emb.device.type, enabled=False):
            for mlp, prototypes in scored:
                s = F.normalize(prototypes, dim=1)
                scores = score(mlp, torch.cat([s, -s]))  # [2 K]
                toward.append(scores[: len(s)])
                away.append(scores[len(s) :])
        return torch.cat(toward), torch.cat(away)

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """The base prototypes [Kb, C]; in stage 2 padded to [Kb, C + extra], and the novel ones [Kn, C + extra]."""
        return (F.pad(self.base_emb, (0, self.extra)), self.novel_emb) if self.num_novel else (self.base_emb,)

    @staticmethod
    def count_classes(state: dict[str, torch.Tensor]) -> tuple[int, int]:
        """(Kb, Kn) of a state dict; raises KeyError where it is of another method."""
        return len(state['base_emb']), len(state.get('novel_emb', ()))

    def base_losses(self, outputs: torch.Tensor, masks: torch.Tensor, **weights) -> dict[str, torch.Tensor]:
        """`losses.pop_losses` of logits [B, 1 + Kb, h, w]."""
        return pop_losses(outputs, masks, self.base_emb, **weights)

    def novel_losses(self, logits: torch.Tensor, masks: torch.Tensor, **weights) -> dict[str, torch.Tensor]:
        """`losses.pop_losses`, with the background of base images pseudo-labelled."""
        base, novel = self.prototypes()
        masks = with_pseudo_labels(logits, masks, self.num_base, self.first_label)
        return pop_losses(logits, masks, novel, base, **weights)

    def start_novel(self) -> None:
        """Start phi_n from phi; it ignores extra channels."""
        state = self.classifier.state_dict()
        state['0.weight'] = F.pad(state['0.weight'], (0, 0, 0, 0, 0, self.extra))  # [C, C + extra, 1, 1]
        self.classifier_n.load_state_dict(state)


def vectors(maps: torch.Tensor) -> torch.Tensor:
    """Maps [B, C, h, w] as vectors [B h w, C], float32 (float64 stays); no copy where channels are last in memory."""
    return single(maps).permute(0, 2, 3, 1).flatten(0, 2)


def as_map(vectors: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Vectors [B h w, K] as a map [B, K, h, w] of the batch and size of `like`."""
    batch, _, height, width = like.shape
    return vectors.view(batch, height, width, -1).permute(0, 3, 1, 2)


def score(mlp: nn.Sequential, vectors: torch.Tensor) -> torch.Tensor:
    """phi of vectors [N, C]: [N].

    Its 1x1 convolutions are applied as matrix products: these stay in float32 on GPUs, where cuDNN would round a
    convolution to TF32, take maps of any size without a search for the fastest kernel, and are fast for few vectors.
    """
    for layer in mlp:
        vectors = F.linear(vectors, layer.weight.flatten(1)) if isinstance(layer, nn.Conv2d) else layer(vectors)
    return vectors[:, 0]


def _prototype_mlp(in_channels, channels):
    """phi: C' -> C -> C -> 1 without biases, which makes it positively homogeneous."""
    return nn.Sequential(
        nn.Conv2d(in_channels, channels, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, 1, 1, bias=False),
    )
