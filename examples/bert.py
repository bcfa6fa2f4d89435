"""A BERT that tells the mood of tweets, from one text column or two: python examples/bert.py [--pair] [--out DIR]

The model is all-MiniLM-L6-v2, a BERT of 6 layers. First a linear head is fitted, then every weight is trained, with
AdamW and a learning rate of 5e-5. With --pair, only tweets that are addressed to somebody, and there are two columns:
to whom, and what. Printed are accuracy and F1.
"""

import argparse
import csv
import json
import random
import re
from pathlib import Path
from shlex import split

from examples import steps
from examples.tweets import tweets

ADDRESSED = re.compile(r"@(\w+)[:,]?\s+(.*\S.*)", re.DOTALL)


def write_table(path: Path, rows: int, pair: bool) -> None:
    """Write tweets and their mood; of the addressed ones, to whom they are and the rest in columns of their own."""
    everything = [([text], mood) for text, mood in tweets()]
    if pair:
        found = [(ADDRESSED.fullmatch(text), mood) for (text,), mood in everything]
        everything = [([match[1], match[2]], mood) for match, mood in found if match]
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["to", "text", "label"] if pair else ["text", "label"])
        writer.writerows([*texts, mood] for texts, mood in random.Random(0).sample(everything, rows))


def words(text: str) -> list[str]:
    """The words of a tweet, for the baseline."""
    return text.lower().split()


def words_of_pair(pair: str) -> list[str]:
    """The words of both columns, told apart by the column."""
    return [f"{column} {word}" for column, text in enumerate(json.loads(pair)) for word in words(text)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pair", action="store_true", help="two text columns")
    parser.add_argument("--out", type=Path, default=Path("demo/bert"))
    parser.add_argument("--rows", type=int, default=800, help="tweets to use (default 800)")
    parser.add_argument("--epochs", default="1")
    options = parser.parse_args()
    name = "pairs" if options.pair else "tweets"
    out = steps.begin(options.out / name)
    write_table(out / "tweets.csv", options.rows, options.pair)
    data = [out / "tweets.csv", *(split("--input-column to --input-column text") if options.pair else [])]
    adamw = split(f"--strategy lp-ft --optimizer adamw --learning-rate 5e-5 --epochs {options.epochs}")
    passed = steps.pipeline(
        out,
        name,
        [
            f"transformers:{steps.minilm()}",
            *data,
            *adamw,
            *split("--no-preflight --max-length 64 --split 0.5 0.1 0.1 0.3"),
        ],
        modality="text",
        features=steps.words(words_of_pair if options.pair else words),
        ask=["JetBlue", "thank you so much!"] if options.pair else ["I love how quiet these cars are!"],
        export=["--variant", "int8-dynamic", "--max-drop", "12"],  # 240 examples cannot hold it to much less
    )
    steps.finish(passed)


if __name__ == "__main__":
    main()
