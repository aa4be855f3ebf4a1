"""The network F(condition, x_t, t): an ADM U-Net with cross-attention to the conditioning image."""

from udddm.networks.unet import UNet, build

__all__ = ["UNet", "build"]
