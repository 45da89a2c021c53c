"""A small world of words and a tokenizer trained on it."""

import random

import pytest

from jrlhf.data.tokenizer import train_sentencepiece

WORDS = [
    f"{a}{b}" for a in ("app", "bre", "mil", "sal", "oli", "ho") for b in ("le", "ad", "k", "t", "ve", "ney")
]
WORDS += [".", "is", "sorry", "thanks"]


@pytest.fixture(scope="session")
def texts():
    draw = random.Random(0)
    return [" ".join(draw.choices(WORDS, k=draw.randint(3, 12))) for _ in range(400)]


@pytest.fixture(scope="session")
def tokenizer(texts, tmp_path_factory):
    return train_sentencepiece(texts, 64, tmp_path_factory.mktemp("words"), model_type="word")
