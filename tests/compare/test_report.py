"""The report from finished runs on disk: what it says, that it stands alone, and what it does without parts."""

import csv
import html.parser
import io
import json
import math
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from jrlhf.compare import plots
from jrlhf.compare.report import print_table, write_report
from jrlhf.compare.samples import print_samples
from jrlhf.compare.statistics import difference_interval, mean_interval
from jrlhf.compare.summary import best_against_others, headline, pairs_found, seed_note, summarize
from jrlhf.config import UserError
from jrlhf.ops.pass_at_k import pass_at_k

TRAINED = ("sft", "ppo", "grpo", "dpo", "kto")


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
    run = finished_run(tmp_path / "runs", seeds=(0, 1, 2, 3, 4), policies=TRAINED, prompts=24)
    text, page = report([run], tmp_path / "report")
    seen = Page(text).text
    assert "5 seeds: intervals cover both training seeds and prompts." in seen
    assert "Several training runs and prompts are crossed random effects" in seen
    assert "All seeds share these stages, so their randomness is in no interval: reward_model, sft." in seen
    rows = json.loads((page.parent / "summary.json").read_text())["rows"]
    assert {(row["policy"], row["seeds"]) for row in rows} == {("sft", 1)} | {(p, 5) for p in TRAINED[1:]}
    assert all((row["middle"] is not None) == (row["policy"] != "sft") for row in rows)
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
        (lambda e: e["policies"].clear(), "no policy"),
        (lambda e: e["policies"]["sft"]["splits"].clear(), "policy 'sft' has no split"),
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


# --- training runs --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_policy_once(finished_run, tmp_path_factory):
    """Three seeds of ppo; ppo-strong does not depend on the seed, and is evaluated under each of them."""
    folder = tmp_path_factory.mktemp("once")
    policies = ("sft", "ppo", "ppo-strong")
    return finished_run(
        folder, policies=policies, seeds=(0, 1, 2), once=("ppo-strong",), prompts=48, curves=False
    )


def test_a_policy_trained_once_is_one_training_run_under_every_seed(one_policy_once):
    summary = summarize([one_policy_once])
    rows = {row.policy: row for row in summary.main}
    assert {name: row.seeds for name, row in rows.items()} == {"sft": 1, "ppo": 3, "ppo-strong": 1}
    assert rows["ppo-strong"].answers == 3 * rows["ppo"].answers  # of one model, under three seeds
    splits = {policy.name: policy.splits["eval"] for policy in summary.evaluations[0].policies}
    assert rows["ppo-strong"].gold == mean_interval([splits["ppo-strong"].gold[0]])
    assert rows["ppo-strong"].gain == difference_interval(splits["ppo-strong"].gold, splits["sft"].gold)


def test_what_covers_prompts_only_is_marked(one_policy_once, tmp_path):
    summary = summarize([one_policy_once])
    note = seed_note(summary)
    assert note.startswith("Training runs: 3 of ppo; one of ppo-strong.")
    assert "cover prompts only" in note
    assert "3 seeds: intervals cover both" not in note
    assert "(one training run)" in headline(summary)
    shown = printed(summary, 150)
    assert re.search(r"ppo-strong .* 1†", shown)
    assert re.search(r"ppo  .* 3 *\n", shown)
    text, page = report([one_policy_once], tmp_path)
    assert "1†" in Page(text).text
    pairs = {(p["a"], p["b"]): p for p in json.loads((page.parent / "summary.json").read_text())["pairs"]}
    pair = pairs.get(("ppo", "ppo-strong")) or pairs["ppo-strong", "ppo"]
    assert {pair["seeds_a"], pair["seeds_b"]} == {1, 3}
    assert pair["paired_by"] == "prompt"


# --- every two policies ---------------------------------------------------------------------------------


def test_every_two_policies_are_compared(one_seed, summary):
    """Differences and win rates of all pairs, against numpy on the scores themselves."""
    run, text, page = one_seed
    stage = json.loads((run / "stages.json").read_text())["evaluate"]["0"]
    evaluation = json.loads((run.parent / stage / "evaluation.json").read_text())
    gold = {name: np.array(p["splits"]["eval"]["gold"]) for name, p in evaluation["policies"].items()}
    pairs = json.loads((page.parent / "summary.json").read_text())["pairs"]
    assert len(pairs) == 15
    for pair in pairs:
        a, b = gold[pair["a"]], gold[pair["b"]]
        assert pair["difference"] == pytest.approx(a.mean() - b.mean())
        assert pair["difference"] >= 0  # the better first
        wins = (a[:, :, None] > b[:, None, :]) + 0.5 * (a[:, :, None] == b[:, None, :])
        assert pair["win"] == pytest.approx(wins.mean())
    matrix = re.search(r'id="pairs".*?</table>', text, flags=re.DOTALL).group()
    assert matrix.count("<tr>") == 7
    assert matrix.count("wins ") == 30
    level = [p for p in summary.pairs if not p.difference.excludes(0)]
    assert {p.a for p in level} | {p.b for p in level} >= {"sft", "kto"}
    assert matrix.count('class="level"') == 2 * len(level)


def test_the_best_is_held_against_each_other_policy(summary):
    best = best_against_others(summary)
    assert {p.a for p in best} == {"ppo"}
    assert [p.b for p in best] == ["best_of_16", "grpo", "dpo", "kto"]
    found = pairs_found(summary)
    for p in best:
        assert p.b in found.partition("cannot be told")[0 if p.difference.excludes(0) else 2]
    shown = printed(summary, 120)
    assert re.search(r"grpo +\+0\.\d\d \[\u2212?0\.\d\d, 0\.\d\d\] +\d\d% \[\d\d%, \d\d%\]", shown)


def test_what_cannot_be_told_apart_is_said(finished_run, tmp_path):
    run = finished_run(tmp_path, policies=("sft", "ppo", "ppo-twin"), prompts=16, curves=False)
    summary = summarize([run])
    (pair,) = best_against_others(summary)
    assert not pair.difference.excludes(0)
    assert f"{pair.a} cannot be told from {pair.b}" in headline(summary)
    assert "cannot be told apart" in printed(summary, 120)


def test_of_few_policies_every_pair_is_told(finished_run, tmp_path):
    """Of ppo, dpo and best-of-n also how ppo and dpo compare, whichever is best."""
    run = finished_run(tmp_path, policies=("sft", "ppo", "dpo", "best_of_16"), prompts=48, curves=False)
    summary = summarize([run])
    assert re.search(r"\bppo has more gold than (.* and )?dpo \(\+0\.\d\d \[", headline(summary))
    assert re.search(
        r"^ ?ppo +dpo +\+0\.\d\d \[.*\] +\d\d% \[.*\] +more", printed(summary, 150), re.MULTILINE
    )


def test_policies_of_two_runs_on_the_same_prompts_are_paired(finished_run, tmp_path):
    small = {"prompts": 24, "curves": False}
    a = finished_run(tmp_path, name="a", policies=("sft", "ppo"), **small)
    codes = {"evaluate": "bbbbbbbb"}
    b = finished_run(tmp_path, name="b", policies=("sft", "dpo"), codes=codes, **small)
    summary = summarize([a, b])
    assert {(p.a, p.b) for p in summary.pairs} >= {("ppo", "dpo")}
    again = finished_run(tmp_path, name="d", code="dddddddd", policies=("sft", "dpo"), **small)
    assert ("ppo (a)", "dpo (d)") in {(p.a, p.b) for p in summarize([a, again]).pairs}  # another baseline
    other = finished_run(tmp_path, name="c", code="cccccccc", policies=("sft", "dpo"), asked=3, **small)
    apart = summarize([a, other])
    assert not [p for p in apart.pairs if "(a)" in p.a and "(c)" in p.b]
    assert "A dash: the two answered different prompts." in Page(report([a, other], tmp_path / "r")[0]).text


def test_training_runs_are_paired_where_the_seeds_are_the_same(finished_run, tmp_path):
    small = {"prompts": 12, "curves": False}
    a = finished_run(tmp_path, name="a", policies=("sft", "ppo", "dpo"), seeds=(0, 1), **small)
    b = finished_run(tmp_path, name="b", code="bbbbbbbb", policies=("sft", "kto"), seeds=(2, 3), **small)
    paired = {frozenset((p.a, p.b)): p.paired_runs for p in summarize([a, b]).pairs}
    assert paired[frozenset(("ppo (a)", "dpo (a)"))]
    assert not paired[frozenset(("ppo (a)", "kto (b)"))]  # as many training runs, of other seeds


# --- several runs ---------------------------------------------------------------------------------------


@pytest.fixture
def two_runs(finished_run, tmp_path):
    """Two runs that share all but ppo, as a run and its repetition with an override do."""
    a = finished_run(tmp_path, code="aaaaaaaa", policies=("sft", "ppo", "dpo"), prompts=24, updates=30)
    codes = dict.fromkeys(("sft", "dpo", "reward_model"), "aaaaaaaa")
    b = finished_run(
        tmp_path, code="bbbbbbbb", codes=codes, policies=("sft", "ppo", "dpo"), prompts=24, updates=30
    )
    return a, b


def test_a_stage_that_runs_share_is_one_row(two_runs, tmp_path):
    summary = summarize(list(two_runs))
    assert [row.label for row in summary.main] == ["sft", "ppo (aaaaaaaa)", "dpo", "ppo (bbbbbbbb)"]
    assert "sft and dpo are the same stage in several of the runs, and each one row." in summary.notices
    panels = {panel.slug: panel for figure in plots.all_figures(summary) for panel in figure.panels}
    assert panels["curve_rm_acc"].svg.count(">reward_model<") == 1
    text, page = report(list(two_runs), tmp_path / "report")
    costs = json.loads((page.parent / "summary.json").read_text())["seconds"]
    assert [cost["stage"] for cost in costs].count("dpo") == 1
    assert Page(text).text.count("ppo (bbbbbbbb)") > 5


def test_a_run_given_twice_is_read_once(two_runs):
    run = two_runs[0]
    summary = summarize([run, run.parent / "stages" / ".." / run.name])
    assert [row.label for row in summary.main] == ["sft", "ppo", "dpo"]
    assert summary.notices == ("ppo_vs_dpo-aaaaaaaa was given more than once and is read once.",)


def test_training_runs_of_one_stage_come_together(finished_run, tmp_path):
    """One run has seeds 0 and 1, another 0, 1 and 2 of the same stages: three training runs, one row."""
    small = {"policies": ("sft", "ppo"), "prompts": 12, "curves": False}
    a = finished_run(tmp_path, name="a", seeds=(0, 1), **small)
    b = finished_run(tmp_path, name="b", seeds=(0, 1, 2), codes={"evaluate": "bbbbbbbb"}, **small)
    summary = summarize([a, b])
    assert [(row.label, row.seeds) for row in summary.main] == [("sft", 1), ("ppo", 3)]


def test_long_and_many_names_leave_room_for_the_data(finished_run, tmp_path):
    """Each drawing's axes keep their width, and nothing warns (a warning fails the test)."""
    many = tuple(f"ppo-{i}" for i in range(9))
    a = finished_run(
        tmp_path,
        name="a_long_name_for_an_experiment",
        policies=("sft", *many, "dpo"),
        prompts=8,
        updates=12,
    )
    b = finished_run(
        tmp_path,
        name="another_long_name_for_an_experiment",
        code="bbbbbbbb",
        policies=("sft", "ppo-0", "grpo-with_a_name_that_says_every_setting_of_the_run", "dpo", "best_of_16"),
        prompts=8,
        updates=12,
    )
    for runs in ([a], [a, b]):
        for figure in plots.all_figures(summarize(runs)):
            for panel in figure.panels:
                width = float(re.search(r'width="([\d.]+)pt"', panel.svg).group(1))
                axes = re.search(r'id="patch_2">\s*<path d="M ([\d.]+) [\d.]+ *\n?L ([\d.]+)', panel.svg)
                left, right = map(float, axes.groups())
                assert right - left > 0.4 * width, panel.slug
                if panel.slug in ("win_rates", "length", "gold_by_split"):
                    assert closest_rows(panel.svg) > 7, panel.slug  # points; the type is 8 and larger


def closest_rows(svg: str) -> float:
    """The least vertical distance, in points, of a line of a row's name from the next row's."""
    spans = []
    for group in re.split(r'<g id="(?=[a-z])', svg):
        if group.startswith("text_") and "text-anchor: middle" not in group:
            found = re.findall(r'<text [^>]*?(?:translate\(\S+ |y=")([\d.]+)[^>]*>', group)
            spans.append(tuple(map(float, found)))
    rows = sorted((min(ys), max(ys)) for ys in spans[: svg.count('id="ytick_')] if ys)
    return min((b[0] - a[1] for a, b in pairwise(rows)), default=np.inf)


# --- what the report says -------------------------------------------------------------------------------


@pytest.mark.parametrize("points", [1, 7, 40, 41, 50, 79, 119, 1000])
def test_a_curve_is_smoothed_evenly(points):
    """Every bin of 50 points in at most 40 holds two; one bin may not be much longer than another."""
    x, _ = plots._binned(np.arange(points), np.ones(points), 40)
    edges = np.diff(2 * x)  # the sum of two neighbours' lengths
    assert len(x) <= 40
    assert len(x) == points if points <= 40 else len(x) >= 20
    assert len(x) < 3 or edges.max() - edges.min() <= 2
    if points == 50:
        assert len(x) == 25
        assert set(edges) == {4}


def below_zero(evaluation):
    for policy in evaluation["policies"].values():
        for split in policy["splits"].values():
            split["gold"] = [[value - 3 for value in answers] for answers in split["gold"]]


def test_a_baseline_that_is_highest_is_not_left_out(finished_run, tmp_path):
    run = finished_run(tmp_path, policies=("sft", "ppo", "dpo"), prompts=16, curves=False)

    def worse(evaluation):
        for name, policy in evaluation["policies"].items():
            for split in policy["splits"].values():
                split["gold"] = [[value - 3 * (name != "sft") for value in v] for v in split["gold"]]

    change_evaluation(run, worse)
    summary = summarize([run])
    finding = plots.frontier(summary, plots.policy_looks(summary)).finding
    assert finding.startswith("None is above sft, the baseline (0.")
    assert "is highest" not in finding


def test_gold_below_zero_has_no_share_of_the_maximum(finished_run, tmp_path):
    run = finished_run(tmp_path, policies=("sft", "ppo"), prompts=16, curves=False)
    change_evaluation(run, below_zero)
    summary = summarize([run])
    assert all(row.share is None for row in summary.main)
    assert headline(summary).startswith("sft scores \u22122.")
    assert "of the maximum" not in headline(summary)
    assert not re.search(r"(?<![\w])-\d", headline(summary) + seed_note(summary) + printed(summary, 150))


def test_repeated_prompts_are_counted_and_named(finished_run, tmp_path):
    small = {"policies": ("sft", "ppo"), "prompts": 24, "curves": False}
    text, _ = report([finished_run(tmp_path / "a", asked=20, **small)], tmp_path / "report")
    seen = Page(text).text
    assert "24 prompts (20 distinct)" in seen
    assert "A prompt that was drawn more than once counts each time" in seen
    for other in ({}, {"asked": 20, "drawn": False}):  # all distinct, and not recorded
        run = finished_run(tmp_path / f"b{len(other)}", **small, **other)
        assert "distinct" not in printed(summarize([run]), 150)


def test_words_say_what_numbers_are(one_seed, summary):
    _, text, _ = one_seed
    seen = Page(text).text
    assert "gain (over sft)" in seen
    assert "win rate (over sft)" in seen
    assert "which add up to the gold reward" in seen
    assert re.search(r"helpful\u22120\.6 to 1\.\d", seen)  # the range of single answers
    criteria = text[text.index("<h3>Criteria</h3>") : text.index('<h2 id="figures">')]
    assert re.search(r"best_of_16</th><td>", criteria)
    assert "best_of_16: chosen by the proxy" in seen


def test_samples_in_the_terminal_name_their_score(finished_run, tmp_path):
    run = finished_run(tmp_path, policies=("sft", "ppo", "best_of_16"), prompts=4, curves=False)
    file = run.parent / json.loads((run / "stages.json").read_text())["evaluate"]["0"] / "evaluation.json"
    stream = io.StringIO()
    print_samples(Console(file=stream, width=100), file, count=2)
    lines = stream.getvalue().splitlines()
    assert sum(line.split() == ["policy", "gold", "answer"] for line in lines) == 2
    assert "of best_of_16 the evaluation keeps scores and no texts" in stream.getvalue()
    text, _ = report([run], tmp_path / "report")
    assert "No texts were kept of best_of_16." in Page(text).text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium, which lays the page out")
@pytest.mark.parametrize("width", [900, 1200])
def test_no_column_is_cut_off(finished_run, tmp_path, width):
    """Three-seed and two-run pages have the most columns and the longest names."""
    small = {"prompts": 8, "curves": False, "best_of_n": False, "seeds": (0, 1, 2, 3)}
    a = finished_run(tmp_path, name="larder-dpo-beta", policies=("sft", "ppo", "dpo"), **small)
    codes = dict.fromkeys(("sft", "reward_model"), "1a2b3c4d")
    b = finished_run(
        tmp_path, name="larder-ppo-gold", code="bbbbbbbb", codes=codes, policies=("sft", "ppo"), **small
    )
    text, page = report([a, b], tmp_path / "report")
    measure = """<script>document.title = "cut:" + [...document.querySelectorAll(".numbers")].map(
      table => Math.max(0, table.scrollWidth - table.parentElement.clientWidth)).join()</script>"""
    page.write_text(text.replace("</body>", measure + "</body>"))
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'chrome'}",
    ]
    command += [f"--window-size={width},900", "--dump-dom", page.as_uri()]
    seen = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    cut = re.search(r"<title>cut:([\d,]+)</title>", seen).group(1).split(",")
    assert len(cut) >= 4
    assert set(cut) == {"0"}


# --- files ----------------------------------------------------------------------------------------------


def test_another_report_is_replaced_whole_and_said_so(finished_run, tmp_path):
    small = {"prompts": 8, "updates": 12}
    a = finished_run(tmp_path / "runs", name="a", policies=("sft", "ppo"), best_of_n=False, **small)
    b = finished_run(tmp_path / "runs", name="b", code="bbbbbbbb", policies=("sft", "dpo"), **small)
    out, stream = tmp_path / "report", io.StringIO()
    report([a], out)
    (out / "figures" / "mine.png").write_text("not ours")
    assert (out / "figures" / "training_ppo.svg").exists()
    write_report([b], out, Console(file=stream, width=200))
    names = {file.name for file in (out / "figures").iterdir()}
    assert not [name for name in names if "training_ppo" in name]
    assert {"mine.png", "best_of_n.svg"} <= names
    assert f"{out}: replaced the report of a-1a2b3c4d" in stream.getvalue().replace("\n", "")
    again = io.StringIO()
    write_report([b], out, Console(file=again, width=200))
    assert "replaced" not in again.getvalue()


def test_files_of_others_are_not_overwritten(finished_run, tmp_path):
    run = finished_run(tmp_path / "runs", policies=("sft", "ppo"), prompts=4, curves=False)
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "summary.csv").write_text("a year's work")
    with pytest.raises(UserError, match=r"report holds summary\.csv, which no comparison wrote"):
        report([run], tmp_path / "report")
    assert (tmp_path / "report" / "summary.csv").read_text() == "a year's work"
    with pytest.raises(UserError, match="is a file"):
        report([run], tmp_path / "report" / "summary.csv")
    assert sorted(file.name for file in (tmp_path / "report").iterdir()) == ["summary.csv"]


# --- right and wrong answers ----------------------------------------------------------------------------


def verify(run: Path, answers: int) -> dict[str, np.ndarray]:
    """Make the gold of a finished run a verdict, 1 or 0; returns the main split's by policy, [P, answers]."""
    (file,) = run.parent.glob("stages/evaluate-*/evaluation.json")
    content = json.loads(file.read_text())
    rng = np.random.default_rng(0)
    kept = {}
    for rate, (policy, measured) in zip((0.3, 0.8, 0.5), content["policies"].items(), strict=True):
        for name, split in measured["splits"].items():
            prompts = len(split["gold"])
            right = (rng.random((prompts, answers)) < rate).astype(float)
            if policy.startswith("best_of"):  # the expected gold of the chosen one
                right = rng.random((prompts, 1)).round(3)
            kept.setdefault(policy, right)
            split["gold"] = right.tolist()
            if name == "eval":
                kept[f"{policy} length"] = np.asarray(split["length"])
    content |= {"gold_max": 1.0, "criteria": {}}
    file.write_text(json.dumps(content))
    return kept


def test_right_and_wrong_answers_are_reported_by_pass_at_k(finished_run, tmp_path):
    run = finished_run(
        tmp_path / "runs", policies=("sft", "ppo", "best_of_16"), prompts=24, answers=5, updates=12
    )
    kept = verify(run, 5)
    summary = summarize([run])
    sft, ppo, best = summary.main
    for row, right in ((sft, kept["sft"]), (ppo, kept["ppo"])):
        assert list(row.pass_at) == [1, 2, 4]
        assert row.pass_at[1].value == pytest.approx(right.mean())
        assert row.pass_at[1] == pytest.approx(row.gold)
        assert row.pass_at[4].value == pytest.approx(pass_at_k(right, 4).mean())
        assert row.pass_at[2].low < row.pass_at[2].value < row.pass_at[2].high <= 1
        alike = (right.sum(axis=1) == 0) | (right.sum(axis=1) == 5)
        assert row.zero_variance.value == pytest.approx(alike.mean())
        lengths = kept[f"{row.label} length"]
        assert row.length_right == pytest.approx(lengths[right == 1].mean())
        assert row.length_wrong == pytest.approx(lengths[right == 0].mean())
    # Of best-of-n only expectations are kept: it takes no verdict away from the others and has none.
    assert (best.pass_at, best.zero_variance, best.length_right) == ({}, None, None)
    text, page = report([run], tmp_path / "report")
    heading = "Right and wrong answers"
    assert heading in Page(text).text
    for width in (80, 200):
        shown = printed(summary, width)
        assert all(f"pass@{k}" in shown for k in (1, 2, 4))
        assert f"{ppo.pass_at[4].value:.0%}" in shown
    with (page.parent / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["pass_at_2"]) == pytest.approx(sft.pass_at[2].value)
    assert float(rows[0]["pass_at_2_low"]) == pytest.approx(sft.pass_at[2].low)
    assert float(rows[0]["zero_variance"]) == pytest.approx(sft.zero_variance.value)


def test_intervals_of_pass_at_k_are_clustered_by_prompt(finished_run, tmp_path):
    """Copies of every answer say nothing new: the interval of pass@1 stays, that of independent answers shrinks."""
    run = finished_run(tmp_path / "runs", policies=("sft", "ppo"), prompts=24, answers=2, best_of_n=False)
    (file,) = run.parent.glob("stages/evaluate-*/evaluation.json")
    content = json.loads(file.read_text())
    right = (np.random.default_rng(1).random((24, 1)) < 0.4).astype(float)
    widths = []
    for copies in (2, 20):
        for measured in content["policies"].values():
            for split in measured["splits"].values():
                split |= {"proxy": None, "kl": None}
                split |= dict.fromkeys(("gold", "length", "ended"), np.repeat(right, copies, 1).tolist())
        file.write_text(json.dumps(content | {"criteria": {}}))
        interval = summarize([run]).main[0].pass_at[1]
        widths.append(interval.high - interval.low)
    assert widths[0] == pytest.approx(widths[1])
    assert widths[0] > 0.3


def test_other_rewards_have_no_pass_at_k(one_seed, summary):
    assert all(row.pass_at == {} and row.length_right is None for row in summary.rows)
    assert "pass@" not in printed(summary, 200)
    assert "Right and wrong answers" not in one_seed[1]
