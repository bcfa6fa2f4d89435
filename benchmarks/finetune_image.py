"""Our loop and torchvision's reference recipe on the same job: python benchmarks/finetune_image.py [--epochs N]

The job: a ResNet18 from random weights on scikit-learn's digits as PNG files, 32 × 32 pixels, SGD with momentum 0.9
and weight decay 1e-4, a cosine schedule, batches of 32, no augmentation, validation and a saved state after every
epoch. The peer does what references/classification/train.py does on one machine: ImageFolder, DataLoader, loss and
top-1 accuracy read after every batch, model_N.pth and checkpoint.pth after every epoch. Both decode every image anew
in every epoch. The clock runs from a loaded network and raw examples to the last weights; `written s` is when our
checkpoint and its report are on the disk too.
"""

import argparse
import math
import shutil
import tempfile
import time
from pathlib import Path

from benchmarks import turns

SPLIT = (0.6, 0.1, 0.1, 0.2)
RATE = 0.02


def prepare(options: argparse.Namespace) -> None:
    """Write the images once for us, and once in the folders of their splits."""
    from examples.digits import digits, enlarged
    from finetune.data import load_dataset
    from finetune.splits import make_splits

    images, labels = digits()
    for number, image in enumerate(enlarged(images[: options.images], 48)):
        folder = options.folder / "images" / str(labels[number])
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number:04}.png")
    dataset = load_dataset(options.folder / "images", "image")
    splits = make_splits(dataset, SPLIT, seed=options.seed)
    for part in ("train", "validation", "gate"):
        for i in splits.indices(dataset, part).tolist():
            name = Path(dataset.names[i])
            folder = options.folder / part / name.parent
            folder.mkdir(parents=True, exist_ok=True)
            shutil.copy(options.folder / "images" / name, folder)


def ours(options: argparse.Namespace) -> turns.Row:
    from benchmarks.scored import train
    from finetune.config import TrainConfig

    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        return train(
            TrainConfig(
                model="torchvision:resnet18",
                data=str(options.folder / "images"),
                out=Path(out) / "checkpoint",
                strategy="full",
                split=SPLIT,
                seed=options.seed,
                weights="none",
                image_size=32,
                optimizer="sgd",
                learning_rate=RATE,
                momentum=0.9,
                weight_decay=1e-4,
                schedule="cosine",
                warmup=0.0,
                max_gradient_norm=math.inf,
                class_weights="none",
                epochs=options.epochs,
                threads=options.threads,
                device="cpu",
            )
        )


def recipe(options: argparse.Namespace) -> turns.Row:
    import torch
    from torch import nn
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.models import resnet18
    from torchvision.transforms import v2

    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    transform = v2.Compose(
        [
            v2.PILToTensor(),
            v2.Resize(37, antialias=True),
            v2.CenterCrop(32),
            v2.ToDtype(torch.float, scale=True),
            v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    loaders = {
        part: DataLoader(
            ImageFolder(options.folder / part, transform), 32, shuffle=part == "train", num_workers=options.workers
        )
        for part in ("train", "validation", "gate")
    }
    network = resnet18(weights=None, num_classes=10)
    criterion = nn.CrossEntropyLoss()

    def evaluate(part: str) -> float:
        network.eval()
        right, total = 0, 0
        with torch.inference_mode():
            for image, target in loaders[part]:
                output = network(image)
                criterion(output, target).item()
                right += int((output.argmax(1) == target).sum().item())
                total += len(target)
        return right / total

    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        start = time.perf_counter()
        optimizer = torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=options.epochs)
        for epoch in range(options.epochs):
            network.train()
            for image, target in loaders["train"]:
                output = network(image)
                optimizer.zero_grad()
                loss = criterion(output, target)
                loss.backward()
                optimizer.step()
                loss.item(), (output.argmax(1) == target).float().mean().item()  # what its logger asks for
            scheduler.step()
            evaluate("validation")
            state = {
                "model": network.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": scheduler.state_dict(),
                "epoch": epoch,
            }
            for name in (f"model_{epoch}.pth", "checkpoint.pth"):
                torch.save(state, Path(out) / name)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "accuracy": evaluate("gate")}


def main() -> None:
    parser = turns.parser(__doc__)
    parser.add_argument("--images", type=int, default=1797, help="of the digits (default all 1797)")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0, help="processes of the peer's DataLoader (default 0)")
    turns.compare(parser.parse_args(), {"ours": ours, "torchvision's recipe": recipe}, prepare)


if __name__ == "__main__":
    main()
