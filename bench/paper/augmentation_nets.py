"""The networks of learned augmentation: the U-Net that changes images, and the classifiers that train on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What the paper states for three channels; its two convolutions per level become one in the scaled protocol.
WEIGHTS = 6659
SCALED_WEIGHTS = 3009


class UNet(nn.Module):
    r"""Augmentation :math:`x + \tanh(u(x, z))`, with one number :math:`z \sim N(0, 1)` per image as a further channel.

    Two levels of 8 and 16 channels, largest values downwards, transposed convolution upwards, no normalisation: as in
    the paper's code.

    Args:
        channels: Channels of the images, ``(n, channels, height, width)``; height and width are even.
        convolutions: Convolutions per level.
    """

    def __init__(self, channels: int, convolutions: int) -> None:
        super().__init__()
        self.fine = _level(channels + 1, 8, convolutions)
        self.coarse = _level(8, 16, convolutions)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.merge = _level(16, 8, convolutions)
        self.last = nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        """Augment ``x`` with one number per image, ``noise``, shape ``(n,)``."""
        fine = self.fine(torch.cat([x, noise.view(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])], 1))
        coarse = self.coarse(F.max_pool2d(fine, 2))
        return x + torch.tanh(self.last(self.merge(torch.cat([self.up(coarse), fine], 1))))


def _level(inputs: int, outputs: int, convolutions: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for i in range(convolutions):
        layers += [nn.Conv2d(inputs if i == 0 else outputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


def small_cnn(channels: int, side: int) -> nn.Sequential:
    """Two convolutions, each with pooling, and a linear layer: the student of the scaled protocol."""
    return nn.Sequential(
        *(nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        nn.Linear(32 * (side // 4) ** 2, 10),
    )


class ResNet18(nn.Module):
    """He et al.'s ResNet-18 in its form for 32 x 32 images: a 3 x 3 stem without pooling.

    Args:
        width: Channels of the first of four stages; 64 gives the usual 11.2 million weights.
    """

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        blocks: list[nn.Module] = []
        inputs = width
        for stage in range(4):
            outputs = width * 2**stage
            blocks += [_Block(inputs, outputs, 1 if stage == 0 else 2), _Block(outputs, outputs, 1)]
            inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Linear(inputs, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, 10)`` of images ``(n, 3, 32, 32)``."""
        return self.last(self.blocks(self.stem(x)).mean((2, 3)))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(outputs)
        self.skip: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.skip = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second_norm(self.second(F.relu(self.first_norm(self.first(x)))))
        return F.relu(y + self.skip(x))
