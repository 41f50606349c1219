"""An image that has been encoded, to be swept or explained again and again."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from headoff.detector import Detector, DetectorOutput
from headoff.images import ImageSource, load_image


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """What no gate of the decoder changes. `headoff.sweep` and `headoff.explain` take it in the place of an image.

    It is computed when it is first needed, and holds as long as the detector's weights and attention stay the same.

    Attributes:
        detector: what encoded the image; results of another one would make no sense.
        picture: the image as RGB.
        resized: (height, width) of the picture as the detector saw it.
        features: see `Detector.features`.

    Example:
        >>> encoded = EncodedImage.of(detector, "street.jpg")
        >>> for head in range(8):
        ...     print(headoff.sweep(detector, encoded, f"H{head}").outcomes[0].counts)
    """

    detector: Detector
    picture: Image.Image
    resized: tuple[int, int]
    features: Any

    @classmethod
    def of(cls, detector: Detector, image: ImageSource) -> EncodedImage:
        """Run what comes before the encoder on an image. Raises ImageError."""
        picture = load_image(image)
        with torch.no_grad():
            pixels, _ = detector.preprocess([picture])
            features = detector.features(pixels)
        return cls(detector, picture, (pixels.shape[-2], pixels.shape[-1]), features)

    @cached_property
    def memory(self) -> Any:
        """The output of the encoder with everything on, see `Detector.encode_features`."""
        # Not in inference mode, whose tensors autograd cannot save.
        with torch.inference_mode(False), torch.no_grad():
            return self.detector.prepare(self.detector.encode_features(self.features))

    @cached_property
    def output(self) -> DetectorOutput:
        """What is found with everything on, see `Detector.decode`."""
        with torch.inference_mode(False), torch.no_grad():
            return self.detector.decode(self.memory)
