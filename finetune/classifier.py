"""Image classifiers as backbones: what they must be like, and how their last layer is taken off."""

import torch
from torch import nn

from bundle.errors import ModelError


def cut_head(model: nn.Module, height: int, width: int, name: str) -> tuple[nn.Module, int, str]:
    """Replace the last nn.Linear of a classifier by the identity.

    Args:
        model: float32, takes pixels (N, 3, height, width); it is changed.
        height: of the images, pixels.
        width: of the images, pixels.
        name: for messages.

    Returns:
        The model, the number of its features, and the name of the layer that was cut.

    Raises:
        ModelError: it does not run, or does not end in an nn.Linear.
    """
    linears = [(path, module) for path, module in model.named_modules() if isinstance(module, nn.Linear) and path]
    if not linears:
        raise ModelError(f"{name} has no nn.Linear to replace by a new head. Choose another model.")
    path, head = linears[-1]
    model.eval()
    image = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        whole = _run(model, image, name)
        model.set_submodule(path, nn.Identity())
        features = _run(model, image, name)
        if features.shape != (2, head.in_features) or not torch.allclose(head(features), whole, atol=1e-4, rtol=1e-3):
            raise ModelError(
                f"{name} does not end in its last nn.Linear ({path}), so it cannot get a new head. "
                "Choose another model."
            )
    return model, head.in_features, path


def _run(model: nn.Module, image: torch.Tensor, name: str) -> torch.Tensor:
    try:
        output = model(image)
    except Exception as error:  # whatever a foreign forward raises
        raise ModelError(f"{name} cannot run on images of {tuple(image.shape[2:])} pixels: {error}") from error
    if not isinstance(output, torch.Tensor):
        raise ModelError(f"{name} gives {type(output).__name__}, not one tensor of logits. Choose another model.")
    return output
