"""A gold reward for short stories that a person can check by reading."""

import re

import numpy as np

HAPPY = re.compile(
    r"\b(happy|happily|happier|smile[ds]?|smiling|laugh(?:ed|s|ing)?|hug(?:ged|s)?|love[ds]?|proud|glad|joy|fun)\b"
)
SAD = re.compile(r"\b(sad|sadly|cry|cried|crying|hurt|angry|scared|afraid|lonely|lost|died|dead)\b")


def happy_ending(prompts: list[str], completions: list[str], rows: list[dict]) -> np.ndarray:
    """How happily a story ends: (happy words - sad words) among its last 20 words, within [-1, 1].

    Each happy word adds 1/2 and each sad one takes 1/2 away; an unended story (`rows[i]["ended"]` false) loses 1/2.
    """
    scores = np.zeros(len(completions), np.float32)
    for i, (text, row) in enumerate(zip(completions, rows, strict=True)):
        tail = " ".join(text.lower().split()[-20:])
        mood = (len(HAPPY.findall(tail)) - len(SAD.findall(tail))) / 2
        scores[i] = np.clip(mood, -1, 1) - (0.0 if row.get("ended", True) else 0.5)
    return scores


def happy_story_with_word(prompts: list[str], completions: list[str], rows: list[dict]) -> np.ndarray:
    """`happy_ending`, plus 1 when the completion uses the row's `word` (a prompt without one gets no such point)."""
    scores = happy_ending(prompts, completions, rows)
    for i, (text, row) in enumerate(zip(completions, rows, strict=True)):
        word = row.get("word", "")
        if word and re.search(rf"\b{re.escape(word.lower())}", text.lower()):
            scores[i] += 1.0
    return scores
