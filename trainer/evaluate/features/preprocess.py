"""Pixels to what networks take. Each way is pinned and has a name that goes into every result: a resize filter alone moves
FID by more than most papers claim (Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation").

All begin at 8-bit RGB, whatever the images are stored in, so an image in memory and its PNG are one. Shapes: pixels uint8
(B, 3, H, W); what comes out is float32.
"""

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.transforms import square_crop, training_image

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

Resize = Literal["training", "bicubic"]
RESIZES: dict[Resize, str] = {
    "training": "centre square, then as the trainer makes its images: area averages down, cubic up (OpenCV), 8 bits",
    "bicubic": "centre square, then Pillow's bicubic with antialiasing, 8 bits",
}
"""Images that are stored to those that are measured, at one size for real and generated ones; nothing where they have it."""


def evaluation_image(image_HWC: NDArray[np.uint8], size: int, resize: Resize) -> NDArray[np.uint8]:
    """The centre square at (size, size, 3). Decode without shrinking before: a JPEG that is shrunk while it is decoded has
    other pixels."""
    if resize == "training":
        return training_image(image_HWC, size)
    square = np.ascontiguousarray(square_crop(image_HWC))
    if square.shape[0] == size:
        return square
    return np.array(Image.fromarray(square).resize((size, size), Image.Resampling.BICUBIC))


def tf1_bilinear(pixels_BCHW: Tensor, side: int) -> Tensor:
    """Bilinear as TensorFlow 1 has it, float32 (B, 3, side, side) in [0, 255]: no antialiasing, and pixel i of the output lies
    at i * (input / side) of the input, without the half pixel. FID was defined on it (Heusel et al. 2017), and
    torch-fidelity computes it so, in this order of operations.
    """
    x = pixels_BCHW.float()
    for axis in (3, 2):
        length = x.shape[axis]
        at = torch.arange(side, dtype=torch.float32, device=x.device) * torch.tensor(length / side, dtype=torch.float32)
        low = at.long()
        weight = (at - low).view(-1, *[1] * (3 - axis))
        below, above = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp_max(length - 1))
        x = below + (above - below) * weight
    return x


def pillow_bicubic_float(pixels_BCHW: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing, each channel in float32, clipped to [0, 255] and not rounded: clean-fid's."""
    if pixels_BCHW.shape[-2:] == (side, side):
        return pixels_BCHW.float()  # Pillow's filter has no effect there, but clean-fid's result is this
    out = np.empty((*pixels_BCHW.shape[:2], side, side), np.float32)
    for image_CHW, pixels_CHW in zip(out, pixels_BCHW.cpu().numpy(), strict=True):
        for channel_HW, pixels_HW in zip(image_CHW, pixels_CHW, strict=True):
            resized = Image.fromarray(pixels_HW.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC)
            channel_HW[:] = np.asarray(resized).clip(0, 255)
    return torch.from_numpy(out).to(pixels_BCHW.device)


def pillow_bicubic_bytes(pixels_BCHW: Tensor, side: int) -> Tensor:
    """Bicubic with antialiasing in 8 bits, as CLIP and DINOv2 were published with: float32 in [0, 1]."""
    if pixels_BCHW.shape[-2:] != (side, side):
        images_BHWC = pixels_BCHW.permute(0, 2, 3, 1).cpu().numpy()
        resized = [
            np.asarray(Image.fromarray(np.ascontiguousarray(image)).resize((side, side), Image.Resampling.BICUBIC))
            for image in images_BHWC
        ]
        pixels_BCHW = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2).to(pixels_BCHW.device)
    return pixels_BCHW.float() / 255.0


def normalised(images_BCHW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Of images in [0, 1]."""
    mean_C, std_C = images_BCHW.new_tensor(mean), images_BCHW.new_tensor(std)
    return (images_BCHW - mean_C.view(3, 1, 1)) / std_C.view(3, 1, 1)
