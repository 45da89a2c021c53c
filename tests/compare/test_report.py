"""The report from finished runs on disk: what it says, that it stands alone, and what it does without parts."""

import csv
import html.parser
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jrlhf.compare import plots
from jrlhf.compare.report import print_table, write_report
from jrlhf.compare.summary import headline, seed_note, summarize
from jrlhf.config import UserError


def report(runs, out) -> tuple[str, Path]:
    page = write_report(runs, out, Console(file=io.StringIO(), width=150))
    return page.read_text(), page


def printed(summary, width: int) -> str:
    stream = io.StringIO()
    print_table(Console(file=stream, width=width), summary)
    return stream.getvalue()


class Page(html.parser.HTMLParser):
    """Collects every attribute that could load something, the text, and whether tags balance."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr", "source"})
    LOADS = frozenset({"src", "href", "xlink:href", "srcset", "data", "poster", "action"})

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.ids: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in self.LOADS]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def one_seed(finished_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run = finished_run(folder / "runs")
    text, page = report([run], folder / "report")
    return run, text, page


@pytest.fixture(scope="module")
def summary(one_seed):
    return summarize([one_seed[0]])


def test_every_policy_and_section_is_there(one_seed):
    _, text, _ = one_seed
    page = Page(text)
    assert not page.open
    for words in (
        "sft",
        "ppo",
        "grpo",
        "dpo",
        "kto",
        "best_of_16",
        "held_out_four",
        "helpful",
        "reward_model",
    ):
        assert words in page.text
    for section in ("summary", "figures", "samples", "splits", "cost", "config", "reproduce"):
        assert section in page.ids
    assert "jrlhf run runs/ppo_vs_dpo-1a2b3c4d/config.json" in page.text
    assert "0123456789ab with uncommitted changes" in page.text
    assert "optimizer.beta" in page.text  # what differs
    assert text.count('class="sample"') == 12
    assert "12 of 16" in page.text


def test_the_page_stands_alone(one_seed):
    run, text, page = one_seed
    parsed = Page(text)
    assert all(value.startswith("#") for value in parsed.loads)
    assert {value[1:] for value in parsed.loads} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", text))
    assert "script" not in parsed.tags
    for folder in (run, page.parent, Path.home(), Path(__file__).parent):
        assert str(folder) not in text


def test_model_output_cannot_become_markup(one_seed):
    _, text, _ = one_seed
    assert "&lt;b&gt;great&lt;/b&gt;" in text
    assert "<b>great" not in text


def test_numbers_in_files_are_those_of_the_scores(one_seed):
    run, _, page = one_seed
    content = json.loads((page.parent / "summary.json").read_text())
    rows = {(row["policy"], row["split"]): row for row in content["rows"]}
    stage = json.loads((run / "stages.json").read_text())["evaluate"]["0"]
    evaluation = json.loads((run.parent / stage / "evaluation.json").read_text())
    for (policy, split), row in rows.items():
        scores = evaluation["policies"][policy]["splits"][split]
        base = evaluation["policies"]["sft"]["splits"][split]
        assert row["gold"] == pytest.approx(np.mean(scores["gold"]))
        assert row["gold_low"] < row["gold"] < row["gold_high"]
        assert row["length"] == pytest.approx(np.mean(scores["length"]))
        if policy != "sft":
            assert row["gain"] == pytest.approx(np.mean(scores["gold"]) - np.mean(base["gold"]))
            a, b = np.array(scores["gold"])[:, :, None], np.array(base["gold"])[:, None, :]
            assert row["win"] == pytest.approx(np.mean((a > b) + 0.5 * (a == b)))
            assert 0 <= row["win_low"] <= row["win"] <= row["win_high"] <= 1
    assert len(rows) == 18
    assert rows["ppo", "eval"]["share"] == pytest.approx(rows["ppo", "eval"]["gold"] / 1.9)
    assert rows["best_of_16", "eval"]["kl"] == pytest.approx(math.log(16) - 15 / 16)
    assert rows["best_of_16", "eval"]["kl_low"] is None
    assert rows["sft", "eval"]["gain"] is None
    with (page.parent / "summary.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [float(row["gold"]) for row in table] == [row["gold"] for row in content["rows"]]


def test_figures_are_also_files(one_seed):
    _, _, page = one_seed
    names = {file.name for file in (page.parent / "figures").iterdir()}
    for slug in ("frontier", "win_rates", "training_ppo", "best_of_n", "gold_by_split", "length"):
        assert {f"{slug}.svg", f"{slug}.png"} <= names


def test_the_page_swaps_every_colour_of_a_figure(one_seed):
    """A colour that stays fixed would vanish in the dark or the light."""
    _, text, _ = one_seed
    drawings = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    assert len(drawings) > 8
    assert not [c for drawing in drawings for c in re.findall(r"#[0-9a-f]{6}\b", drawing)]


def test_the_same_run_gives_the_same_page(one_seed, tmp_path):
    run, text, _ = one_seed
    assert report([run], tmp_path)[0] == text


def test_headline_is_honest_about_no_difference(summary):
    text = headline(summary)
    rows = {row.policy: row for row in summary.main}
    assert not rows["kto"].gain.excludes(0)
    assert "kto cannot be told from sft" in text
    assert re.search(r"ppo gains \+0\.\d\d \[0\.\d\d, 0\.\d\d\] at KL 1\.\d\d", text)
    assert "kto gains" not in text
    assert "kto loses" not in text


def test_one_seed_is_said_so_and_five_are_not(one_seed, finished_run, tmp_path):
    assert "One seed: intervals cover prompts only" in Page(one_seed[1]).text
    run = finished_run(tmp_path / "runs", seeds=(0, 1, 2, 3, 4), prompts=24)
    text, page = report([run], tmp_path / "report")
    seen = Page(text).text
    assert "5 seeds: intervals cover both training seeds and prompts." in seen
    assert "BCa" not in seen
    assert "All seeds share these stages, so their randomness is in no interval: reward_model, sft." in seen
    rows = json.loads((page.parent / "summary.json").read_text())["rows"]
    assert {row["seeds"] for row in rows} == {5}
    assert all(row["middle"] is not None for row in rows)
    assert 'class="warn"' not in text


def test_training_randomness_widens_the_interval(finished_run, tmp_path):
    """Three seeds have three times the answers, yet their spread is now part of the interval."""
    run = finished_run(tmp_path, seeds=(0, 1, 2), policies=("sft", "ppo"))
    summary = summarize([run])
    row = summary.main[1]
    nested = [np.mean(seed) for seed in summary.evaluations[0].policies[1].splits["eval"].gold]
    assert row.gold.value == pytest.approx(np.mean(nested))
    assert row.gold.high - row.gold.low > np.ptp(nested)
    assert "3 seeds" in seed_note(summary)


def test_two_seeds_carry_a_warning(finished_run, tmp_path):
    run = finished_run(tmp_path, seeds=(0, 1), policies=("sft", "ppo"), prompts=12, curves=False)
    assert "Two seeds say little" in seed_note(summarize([run]))


def test_missing_parts_are_named(finished_run, tmp_path):
    run = finished_run(
        tmp_path / "runs", proxy=False, best_of_n=False, curves=False, policies=("sft", "ppo"), prompts=8
    )
    text, _ = report([run], tmp_path / "report")
    seen = Page(text).text
    assert "The evaluation did not sample best-of-n." in seen
    assert "No evaluated policy logged rewards while training" in seen
    assert "No stage logged a metric that this report draws." in seen
    assert "proxy" not in re.findall(r"<th scope=.col.>(.*?)</th>", text)


def change_evaluation(run: Path, change) -> None:
    for where in json.loads((run / "stages.json").read_text())["evaluate"].values():
        file = run.parent / where / "evaluation.json"
        evaluation = json.loads(file.read_text())
        change(evaluation)
        file.write_text(json.dumps(evaluation))


def test_the_least_that_an_evaluation_may_hold(finished_run, tmp_path):
    """One policy, one split, one prompt, no KL, no maximum, no samples: a page all the same."""
    run = finished_run(
        tmp_path / "runs", policies=("sft",), prompts=1, answers=1, curves=False, best_of_n=False
    )

    def shrink(evaluation):
        split = evaluation["policies"]["sft"]["splits"]["eval"]
        evaluation["policies"]["sft"]["splits"] = {
            "eval": {key: split[key] for key in ("gold", "length", "ended")}
        }
        evaluation["gold_max"] = None
        for key in ("samples", "criteria", "best_of_n"):
            del evaluation[key]

    change_evaluation(run, shrink)
    text, _ = report([run], tmp_path / "report")
    seen = Page(text).text
    for words in (
        "recorded no KL",
        "Only the baseline was evaluated",
        "recorded no samples",
        "Only one split",
    ):
        assert words in seen


def test_runs_are_told_apart(finished_run, tmp_path):
    small = {"policies": ("sft", "ppo"), "prompts": 12, "curves": False}
    a = finished_run(tmp_path / "runs", name="short", code="aaaaaaaa", **small)
    b = finished_run(tmp_path / "runs", name="long", code="bbbbbbbb", **small)
    text, _ = report([a, b], tmp_path / "report")
    seen = Page(text).text
    for label in ("sft (short)", "ppo (short)", "sft (long)", "ppo (long)"):
        assert label in seen
    assert len(set(plots.policy_looks(summarize([a, b])).values())) == 3  # baselines look alike


def test_runs_under_different_gold_rewards_are_refused(finished_run, tmp_path):
    a = finished_run(tmp_path, name="a", policies=("sft", "ppo"), prompts=4)
    b = finished_run(
        tmp_path, name="b", code="bbbbbbbb", policies=("sft", "ppo"), prompts=4, reward_name="exact"
    )
    with pytest.raises(UserError, match="different gold rewards \\(exact, larder_gold\\)"):
        summarize([a, b])


def test_the_terminal_table_fits_its_terminal(summary):
    wide, narrow = printed(summary, 150), printed(summary, 80)
    assert "ended" in wide
    assert "ended" not in narrow
    for text, width in ((wide, 150), (narrow, 80)):
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
        assert all(policy in text for policy in ("sft", "ppo", "best_of_16"))


def test_an_unfinished_seed_is_left_out_and_named(finished_run, tmp_path):
    run = finished_run(tmp_path / "runs", seeds=(0, 1, 2), policies=("sft", "ppo"), prompts=8)
    where = json.loads((run / "stages.json").read_text())["evaluate"]["1"]
    (run.parent / where / "done.json").unlink()
    text, _ = report([run], tmp_path / "report")
    assert "Not finished, and left out: evaluate (seed 1, ppo_vs_dpo-1a2b3c4d)." in Page(text).text
    assert summarize([run]).seeds == 2


def test_a_wrong_folder_gets_a_suggestion(finished_run, tmp_path):
    run = finished_run(tmp_path, policies=("sft", "ppo"), prompts=4)
    with pytest.raises(UserError, match="Did you mean 'ppo_vs_dpo-1a2b3c4d'"):
        summarize([run.with_name("ppo_vs_dpo-1a2b3c4")])


def test_a_run_without_evaluation_says_what_is_unfinished(finished_run, tmp_path):
    run = finished_run(tmp_path, policies=("sft", "ppo"), prompts=4)
    where = json.loads((run / "stages.json").read_text())["evaluate"]["0"]
    (run.parent / where / "done.json").unlink()
    with pytest.raises(UserError, match=r"no finished evaluate stage.*evaluate \(seed 0\)"):
        summarize([run])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.pop("reward_name"), "'reward_name' is missing"),
        (lambda e: e["policies"]["ppo"]["splits"]["eval"]["gold"][2].clear(), "prompt 2 has no answers"),
        (lambda e: e["policies"]["ppo"]["splits"]["eval"]["kl"].__setitem__(1, [float("nan")]), "not finite"),
        (lambda e: e["policies"]["ppo"]["splits"]["eval"].pop("length"), "'eval' has no 'length'"),
    ],
)
def test_a_broken_evaluation_names_file_and_field(finished_run, tmp_path, change, message):
    run = finished_run(tmp_path, policies=("sft", "ppo"), prompts=4)
    change_evaluation(run, change)
    with pytest.raises(UserError, match=f"evaluation.json.*{message}"):
        summarize([run])


def test_gold_that_was_trained_on_is_not_called_a_proxy(finished_run, tmp_path):
    run = finished_run(
        tmp_path, policies=("sft", "ppo"), prompts=8, best_of_n=False, updates=30, trained_on="larder_gold"
    )
    summary = summarize([run])
    figure = plots.reward_and_kl(summary, plots.policy_looks(summary))
    assert "ppo: gold goes from" in figure.finding
    assert "trained on" not in figure.finding


def test_over_optimisation_is_named(summary):
    """The fixture's grpo rises and falls while its reward grows, ppo only rises."""
    finding = plots.reward_and_kl(summary, plots.policy_looks(summary)).finding
    assert re.search(
        r"grpo: gold peaks at 1\.\d\d near update [4-8]\d and ends at 1\.0\d; the reward trained on", finding
    )
    assert re.search(r"ppo: gold goes from 0\.\d\d to 1\.\d\d without a clear fall", finding)


def test_a_resumed_run_counts_a_step_once(finished_run, tmp_path):
    run = finished_run(tmp_path, policies=("sft", "ppo"), prompts=4, updates=3)
    file = run.parent / json.loads((run / "stages.json").read_text())["ppo"]["0"] / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "kl/ref_k1": 7.5}\n')
    stage = next(stage for stage in summarize([run]).runs[0].stages if stage.name == "ppo")
    steps, values = stage.curves["kl/ref_k1"]
    assert steps.tolist() == [1, 2, 3]
    assert values[-1] == 7.5
