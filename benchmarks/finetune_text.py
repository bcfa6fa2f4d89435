"""Our loop and transformers' Trainer on the same job: python benchmarks/finetune_text.py [--rows N] [--epochs N]

The job: all weights of MiniLM on tweets, AdamW 5e-5 with a linear schedule, batches of 32 padded to their longest,
texts cut to 128 tokens, validation after every epoch, the best epoch's weights at the end. Sides: ours; Trainer,
saving every epoch what resuming needs, as ours does; Trainer, saving nothing, and so ending with the last epoch's
weights. The clock runs from a loaded network and raw examples to the last weights; `written s` is when our checkpoint
and its report are on the disk too.
"""

import argparse
import csv
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import turns
from examples.steps import minilm

SPLIT = (0.6, 0.1, 0.1, 0.2)


def prepare(options: argparse.Namespace) -> None:
    """Write the tweets, and their splits for those who cannot make them."""
    import random

    from examples.tweets import tweets
    from finetune.data import load_dataset
    from finetune.splits import make_splits

    rows = random.Random(0).sample(tweets(), options.rows)
    with (options.folder / "tweets.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    dataset = load_dataset(options.folder / "tweets.csv", "text")
    splits = make_splits(dataset, SPLIT, seed=options.seed)
    labels = dataset.targets[0].values
    for name in ("train", "validation", "gate"):
        chosen = splits.indices(dataset, name).tolist()
        texts = [dataset.raw(i).decode() for i in chosen]
        (options.folder / f"{name}.json").write_text(json.dumps({"texts": texts, "labels": labels[chosen].tolist()}))


def ours(options: argparse.Namespace) -> turns.Row:
    import tempfile

    from benchmarks.scored import train
    from finetune.config import TrainConfig

    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        return train(
            TrainConfig(
                model=f"transformers:{minilm()}",
                data=str(options.folder / "tweets.csv"),
                out=Path(out) / "checkpoint",
                strategy="full",
                split=SPLIT,
                seed=options.seed,
                optimizer="adamw",
                learning_rate=5e-5,
                class_weights="none",
                epochs=options.epochs,
                threads=options.threads,
                device="cpu",
            )
        )


class Tokens:
    """Token ids and labels, as Trainer wants to have them."""

    def __init__(self, tokenizer: Any, part: dict[str, list[Any]]) -> None:
        self.encoded = tokenizer(part["texts"], truncation=True, max_length=128)
        self.labels = part["labels"]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: values[index] for name, values in self.encoded.items()} | {"labels": self.labels[index]}


def trainer(options: argparse.Namespace, *, saving: bool) -> turns.Row:
    import tempfile

    import numpy as np
    import torch
    from torch import nn
    from transformers import (
        AutoModel,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        logging,
    )

    class Classifier(nn.Module):
        """The same network as ours: the mean of the last hidden states, dropout, a linear layer."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone = AutoModel.from_pretrained(minilm(), dtype=torch.float32, add_pooling_layer=False)
            self.dropout = nn.Dropout(0.1)
            self.head = nn.Linear(self.backbone.config.hidden_size, 3)

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor
        ) -> dict[str, torch.Tensor]:
            states = self.backbone(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
            mask = attention_mask[..., None].to(states.dtype)
            logits = self.head(self.dropout((states * mask).sum(1) / mask.sum(1)))
            return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}

    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    parts = {
        name: json.loads((options.folder / f"{name}.json").read_text()) for name in ("train", "validation", "gate")
    }
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(minilm())
    network = Classifier()
    with tempfile.TemporaryDirectory(dir=options.folder) as out:
        start = time.perf_counter()
        data = {name: Tokens(tokenizer, part) for name, part in parts.items()}
        steps = -(-len(data["train"]) // 32) * options.epochs
        arguments = TrainingArguments(
            output_dir=out,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=32,
            learning_rate=5e-5,
            weight_decay=0.01,
            warmup_steps=round(0.1 * steps),
            lr_scheduler_type="linear",
            max_grad_norm=1.0,
            eval_strategy="epoch",
            save_strategy="epoch" if saving else "no",
            save_total_limit=1,
            load_best_model_at_end=saving,
            metric_for_best_model="accuracy",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=options.seed,
        )
        loop = Trainer(
            model=network,
            args=arguments,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=DataCollatorWithPadding(tokenizer),
            compute_metrics=lambda said: {"accuracy": float((said.predictions.argmax(1) == said.label_ids).mean())},
        )
        loop.train()
        seconds = time.perf_counter() - start
        predicted = loop.predict(data["gate"]).predictions.argmax(1)
    return {"seconds": seconds, "accuracy": float((predicted == np.array(parts["gate"]["labels"])).mean())}


def main() -> None:
    parser = turns.parser(__doc__)
    parser.add_argument("--rows", type=int, default=2000, help="tweets (default 2000)")
    parser.add_argument("--epochs", type=int, default=2)
    sides = {
        "ours": ours,
        "Trainer": partial(trainer, saving=True),
        "Trainer, nothing saved": partial(trainer, saving=False),
    }
    turns.compare(parser.parse_args(), sides, prepare)


if __name__ == "__main__":
    main()
