"""SIDETUNE: a small network beside the frozen one, and a learned mixture of their features (Zhang et al., 2020).

Features are a · ViT(x) + (1 - a) · side(x) with a = sigmoid(s), and s starts at 0. VPT's side network is an AlexNet
trained on ImageNet, with a linear layer to the ViT's width. Its weights cannot be had offline and would be a second
pretrained network that no other method has; ours is a smaller one that starts from random weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from hgprompt.backbone import FrozenViT
from hgprompt.tuning.config import TuneConfig
from hgprompt.tuning.method import Method, Prepared, Setting
from hgprompt.tuning.network_learner import NetworkLearner, generator

CHANNELS = (32, 64, 128, 256)
GRID = 2


class SideNetwork(nn.Module):
    """A ViT's features and the images, side by side in one row → mixed features [B, h].

    The side network: four times a 3×3 convolution of stride 2, GroupNorm and ReLU, then the mean in each cell of a 2×2
    grid, whatever the image's size, and a linear layer without a bias, as VPT's has none.
    """

    def __init__(self, width: int, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.width, self.image_shape = width, image_shape
        layers: list[nn.Module] = []
        for before, after in zip((image_shape[0], *CHANNELS), CHANNELS, strict=False):
            layers += [nn.Conv2d(before, after, 3, 2, 1, bias=False), nn.GroupNorm(8, after), nn.ReLU()]
        layers += [nn.AdaptiveAvgPool2d(GRID), nn.Flatten(), nn.Linear(CHANNELS[-1] * GRID**2, width, bias=False)]
        self.side = nn.Sequential(*layers)
        self.mix = nn.Parameter(torch.zeros((), dtype=torch.float32, device="cpu"))

    def forward(self, inputs: Tensor) -> Tensor:
        features, images = inputs[:, : self.width], inputs[:, self.width :].unflatten(1, self.image_shape)
        return torch.lerp(self.side(images), features, self.mix.sigmoid())

    def start(self, source: torch.Generator) -> dict[str, Tensor]:
        """First values of all parameters: He's for convolutions, nn.Linear's for the last layer."""
        values = {name: value.detach().cpu().clone() for name, value in self.named_parameters()}
        for value in values.values():
            if value.ndim == 4:
                nn.init.kaiming_normal_(value, nonlinearity="relu", generator=source)
            elif value.ndim == 2:
                nn.init.kaiming_uniform_(value, a=math.sqrt(5), generator=source)
        return values


class SideLearner(NetworkLearner):
    """R side networks. The ViT's features are computed once for every image, and travel with it."""

    caches: ClassVar[bool] = True

    def prepare(self, images: Tensor) -> Tensor:
        """Features and normalised images in one row, [B, h + 3·H·W], float32."""
        with torch.no_grad():
            return torch.cat([self.backbone(images).float(), super().prepare(images).flatten(1)], dim=1)


class SideTune(Method):
    """A convolutional network beside the ViT, and the weight of their mixture."""

    name = "SIDETUNE"
    kind = "linear"

    def prepare(self, setting: Setting, configs: Sequence[TuneConfig]) -> Prepared:
        backbone = setting.backbone
        network = _network(backbone)
        trained = [
            {name: value.to(backbone.device) for name, value in network.start(generator(config)).items()}
            for config in configs
        ]
        return Prepared(SideLearner(network, trained, configs, backbone, setting.num_classes, input_dims=2))

    def num_parameters(self, setting: Setting) -> int:
        channels = (setting.backbone.in_channels, *CHANNELS)
        convolutions = sum(9 * before * after + 2 * after for before, after in zip(channels, CHANNELS, strict=False))
        return convolutions + CHANNELS[-1] * GRID**2 * setting.backbone.width + 1


def _network(backbone: FrozenViT) -> SideNetwork:
    with torch.random.fork_rng(devices=[]):  # modules draw weights, to be replaced, from the global generator
        network = SideNetwork(backbone.width, (backbone.in_channels, *backbone.image_size))
    return network.to(backbone.device).eval().requires_grad_(False)
