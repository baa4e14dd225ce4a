"""POP: projection onto orthogonal prototypes (Liu et al., CVPR 2023), with the head in closed form.

Dimensions: B batch, C feature channels, Kb base classes, Kn novel classes, h x w feature size.
"""

import torch
import torch.nn.functional as F
from torch import nn


class POP(nn.Module):
    """Segmenter whose classes are orthogonal prototypes.

    A feature vector q is split into its projections on the normalised prototypes s_k and a residual,

        p_k = <s_k, q>,    q_k = p_k s_k,    r = q - sum_k q_k

    and scored by a small MLP phi: logit_k = phi(q_k) for class k, logit_0 = phi(r) for background. phi has no biases
    and only ReLUs, so phi(a s) = a phi(s) for a >= 0, and with that, exactly,

        logit_k = relu(p_k) phi(s_k) + relu(-p_k) phi(-s_k).

    phi is thus evaluated on 2K vectors instead of K feature maps; only the residual takes the dense MLP.

    With novel classes, phi (`classifier`) scores the base classes, a second MLP phi_n (`classifier_n`) the novel
    classes and the background.

    Args:
        backbone: [B, 3, H, W] -> [B, Cb, h, w]; carries `output_stride` for `feature_shape`.
        decoder: [B, Cb, h, w] -> [B, C, h, w]; carries `out_channels`.
        num_base: Kb >= 1.
        num_novel: Kn >= 0; 0 is the network of stage 1.
    """

    def __init__(self, backbone: nn.Module, decoder: nn.Module, num_base: int, num_novel: int = 0) -> None:
        super().__init__()
        if num_base < 1 or num_novel < 0:
            raise ValueError(f'got {num_base} base and {num_novel} novel classes; expected at least 1 and 0')
        channels = decoder.out_channels
        self.num_base, self.num_novel = num_base, num_novel
        self.backbone = backbone
        self.decoder = decoder
        self.classifier = _prototype_mlp(channels)
        self.base_emb = nn.Parameter(nn.init.orthogonal_(torch.empty(num_base, channels)))
        if num_novel:
            self.classifier_n = _prototype_mlp(channels)
            self.novel_emb = nn.Parameter(nn.init.orthogonal_(torch.empty(num_novel, channels)))
            self.start_novel_classifier()

    @property
    def num_logits(self) -> int:
        """1 + Kb + Kn."""
        return 1 + self.num_base + self.num_novel

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Segment images.

        Args:
            images: float [B, 3, H, W], normalised with ImageNet mean and std.

        Returns:
            Logits [B, 1 + Kb + Kn, h, w]: background, base classes, novel classes.
        """
        return self.classify(self.features(images))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Backbone and decoder: images [B, 3, H, W] to features [B, C, h, w]."""
        return self.decoder(self.backbone(images))

    def feature_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        """(C, h, w) of the features of images of size (H, W): each stride of 2 rounds up."""
        stride = self.backbone.output_stride
        return (self.decoder.out_channels, *(-(-side // stride) for side in size))

    def classify(self, features: torch.Tensor, scores: tuple[torch.Tensor, torch.Tensor] | None = None) -> torch.Tensor:
        """Prototype head: q to logit_k = relu(p_k) phi(s_k) + relu(-p_k) phi(-s_k) and logit_0 = phi(r).

        The decomposition runs in float32 also under autocast: the residual is a difference of nearly equal numbers.

        Args:
            features: float [B, C, h, w].
            scores: of `score_prototypes`; saves their computation while the head does not change.

        Returns:
            Logits [B, 1 + Kb + Kn, h, w].
        """
        with torch.autocast(features.device.type, enabled=False):
            q = features.double() if features.dtype == torch.float64 else features.float()
            q = q.permute(0, 2, 3, 1).flatten(0, 2)  # [N, C], N = B h w; no copy where channels are last in memory
            s = F.normalize(torch.cat(self.prototypes()), dim=1)  # [K, C]
            p = q @ s.T  # [N, K]
            r = q - p @ s  # [N, C]
            toward, away = scores or self.score_prototypes()  # [K]
            logits = F.relu(p) * toward + F.relu(-p) * away  # [N, K]
        background = _score(self._background_mlp, r)  # [N]; in mixed precision under autocast
        logits = torch.cat([background.to(logits.dtype)[:, None], logits], dim=1)  # [N, 1 + K]
        batch, _, height, width = features.shape
        return logits.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def score_prototypes(self) -> tuple[torch.Tensor, torch.Tensor]:
        """phi(s_k) and phi(-s_k), float32 [K] each; phi_n scores the novel prototypes."""
        mlps = (self.classifier, self.classifier_n) if self.num_novel else (self.classifier,)
        toward, away = [], []
        with torch.autocast(self.base_emb.device.type, enabled=False):
            for mlp, prototypes in zip(mlps, self.prototypes(), strict=True):
                s = F.normalize(prototypes, dim=1)
                scores = _score(mlp, torch.cat([s, -s]))  # [2 K]
                toward.append(scores[: len(s)])
                away.append(scores[len(s) :])
        return torch.cat(toward), torch.cat(away)

    def prototypes(self) -> tuple[torch.Tensor, ...]:
        """The base prototypes [Kb, C], followed by the novel ones [Kn, C] where there are any."""
        return (self.base_emb, self.novel_emb) if self.num_novel else (self.base_emb,)

    def start_from(self, base: 'POP') -> None:
        """Start stage 2 from a network of stage 1: its weights, and phi_n from phi."""
        self.load_state_dict(self.state_dict() | base.state_dict())
        self.start_novel_classifier()

    def start_novel_classifier(self) -> None:
        """Start phi_n from phi."""
        self.classifier_n.load_state_dict(self.classifier.state_dict())

    def freeze_base(self) -> None:
        """Stage 2: train nothing but the novel prototypes and phi_n."""
        self.requires_grad_(False)
        self.novel_emb.requires_grad_(True)
        self.classifier_n.requires_grad_(True)

    def fix_batch_norm(self) -> None:
        """Fix statistics and affine parameters of every batch normalisation."""
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> 'POP':
        """Set training mode; a batch normalisation that is not trained keeps its running statistics too."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
                module.eval()
        return self

    @property
    def _background_mlp(self):
        return self.classifier_n if self.num_novel else self.classifier


class Head(nn.Module):
    """The prototype head of a network as a module of its own: features [B, C, h, w] to logits [B, 1 + Kb + Kn, h, w].

    In stage 2 the features come from a frozen copy of the base network; this is the part that trains, and what
    DistributedDataParallel wraps.

    Args:
        net: whose head it is; parameters are shared, not copied.
    """

    def __init__(self, net: POP) -> None:
        super().__init__()
        self.net = net

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.net.classify(features)


def _score(mlp, vectors):
    """phi of vectors [N, C]: [N].

    Its 1x1 convolutions are applied as matrix products: these stay in float32 on GPUs, where cuDNN would round a
    convolution to TF32, take maps of any size without a search for the fastest kernel, and are fast for few vectors.
    """
    for layer in mlp:
        vectors = F.linear(vectors, layer.weight.flatten(1)) if isinstance(layer, nn.Conv2d) else layer(vectors)
    return vectors[:, 0]


def _prototype_mlp(channels):
    """phi: C -> C -> C -> 1 without biases, which makes it positively homogeneous."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, 1, 1, bias=False),
    )
