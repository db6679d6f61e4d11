"""Two examples: `teacher.factory: example.py:teacher`, `student.factory: example.py:student`. Copy this file and change the copy.

A module maps normalised images, float32 (B, 3, H, W), to pooled features (B, D). All of its state must be in its state dict.
"""

from torch import nn


def student() -> tuple[nn.Module, int]:
    """A small convolutional network, with seeded initial weights, and D."""
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 64


def teacher() -> tuple[nn.Module, int, list[float], list[float], int]:
    """The same network, D, the mean and std of each channel of its images, and their side in pixels. Load trained weights here."""
    module, feature_width = student()
    return module, feature_width, [0.5, 0.5, 0.5], [0.25, 0.25, 0.25], 32
