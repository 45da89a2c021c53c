"""The benchmark beside peers: our side of every workload runs, and the guide's table is that of its results."""

import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SEGMENT = {"seconds": 2.0, "tokens": 100, "peak_rss_mb": 300.4}


def loaded(file: Path):
    spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def peers():
    return loaded(ROOT / "benchmarks" / "peers.py")


@pytest.fixture(scope="module")
def ours():
    sys.path.insert(0, str(ROOT / "benchmarks" / "peers"))
    yield loaded(ROOT / "benchmarks" / "peers" / "of_jrlhf.py")
    sys.path.remove(str(ROOT / "benchmarks" / "peers"))


def tiny(peers, name: str):
    workload = next(w for w in peers.WORKLOADS if w.name == name)
    sizes = {"batch": 8, "steps": 1, "prompt": 4, "length": 12, "epochs": min(workload.epochs, 2)}
    return peers.replace(workload, **sizes, new=8, rows=8 if workload.rows else 0)


CASES = [
    ("generate_8", ""), ("generate_skewed", ""), ("sft", ""), ("sft", "packed"), ("reward_model", ""),
    ("reward_model", "packed"), ("dpo", ""), ("dpo", "packed"), ("grpo", ""), ("ppo", ""),
]  # fmt: skip


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_our_side_takes_a_segment(peers, ours, tmp_path, name, variant):
    w = tiny(peers, name)
    shape = peers.Shape(layers=1, d=16, heads=2, kv_heads=1, ff=16, vocab=64, context=32)
    spec = peers.spec_of(w, shape, variant, 2, "none", tmp_path, tmp_path)
    answer = io.StringIO()
    gate = lambda versions, settings: ours.worker.Gate(versions, settings, answer, io.StringIO("go\nstop\n"))  # noqa: E731
    with pytest.raises(ours.worker.Stop):
        ours.run(spec, gate)
    ready, segment = map(json.loads, answer.getvalue().splitlines())
    assert len(ready["ready"]["warm_up_s"]) == ours.worker.WARM_UP
    assert "jax" in ready["ready"]["versions"]
    assert segment["seconds"] > 0
    assert segment["peak_rss_mb"] > 10
    rows = w.rows or w.batch * w.group
    tokens = {
        "generate_8": rows * w.new,
        "sft": w.batch * w.length,
        "reward_model": 2 * w.batch * w.length,
        "dpo": 2 * w.batch * w.length,
        "grpo": rows * (w.prompt + w.new),
        "ppo": rows * (w.prompt + w.new),
    }
    if name == "generate_skewed":  # half of the vocabulary ends an answer
        assert rows <= segment["tokens"] < rows * w.new / 2
    else:
        assert segment["tokens"] == tokens[name]


def test_every_workload_has_our_script(peers, ours):
    for w in peers.WORKLOADS:
        assert w.kind in ours.WORKLOADS
        assert {*w.variants} <= {*peers.LIBRARIES}


def entry(library: str, speeds: list[float], variant: str = "") -> dict:
    rounds = [SEGMENT | {"tokens": 2 * speed} for speed in speeds]
    return {"library": library, "variant": variant, "versions": {library: "1"}, "rounds": rounds}


def results(peers) -> dict:
    entries = {
        "jrlhf": entry("jrlhf", [100, 200, 300]),
        "trl": entry("trl", [50, 100, 300]),
        "trl/packing": entry("trl", [110, 120, 130], "packing"),
        "tunix": entry("tunix", [200, 100, 200]),
    }
    for e in entries.values():
        e |= peers.summary([9.0, 2.0], e["rounds"])
    failed = {"library": "tunix", "variant": "", "error": "Tunix has no such thing"}
    workloads = {
        "one": {"title": "a workload", "entries": entries} | peers.compared(entries),
        "two": {"title": "another", "entries": {"jrlhf": entries["jrlhf"], "tunix": failed}},
    }
    machine = {"cpu": "a CPU", "cores": 4, "cores_used": 2, "system": "Linux"}
    return {"machine": machine, "workloads": workloads}


def test_a_ratio_is_that_of_the_same_rounds_to_the_faster_peer(peers):
    found = results(peers)["workloads"]["one"]
    assert found["against"] == "tunix"
    assert found["ratio"] == 1.5  # of 0.5, 2 and 1.5
    assert found["entries"]["jrlhf"]["compile_s"] == 7.0


def test_the_table_shows_what_was_measured_and_what_failed(peers):
    text = "\n".join(peers.table(results(peers)))
    assert "| a workload | 200 | 120 (packing) | 200 | **1.50** |" in text
    assert "| a workload | 300 (7) | 300 (7) | 300 (7) |" in text
    assert "| another | 200 | - | failed | - |" in text
    assert "- another, tunix: Tunix has no such thing" in text
    assert "a CPU, 2 of 4 cores. jrlhf: jrlhf 1; TRL: trl 1; Tunix: tunix 1." in text


def test_nothing_to_compare_with_makes_no_ratio(peers):
    alone = {"jrlhf": entry("jrlhf", [1.0]) | {"tokens_per_s": 1.0}}
    assert peers.compared(alone) == {}


def test_the_guide_has_the_table_of_the_results(peers, tmp_path):
    guide = tmp_path / "performance.md"
    guide.write_text(peers.GUIDE.read_text(encoding="utf-8"), encoding="utf-8")
    found = json.loads(peers.RESULTS.read_text()) if peers.RESULTS.exists() else {}
    peers.write_guide(found, guide)
    assert guide.read_text(encoding="utf-8") == peers.GUIDE.read_text(encoding="utf-8")
    peers.write_guide(results(peers), guide)
    assert "a workload" in guide.read_text(encoding="utf-8")


def test_other_shapes_need_a_file_of_their_own(peers, capsys):
    with pytest.raises(SystemExit):
        peers.arguments(["run", "--layers", "8"])
    assert "--out" in capsys.readouterr().err
    asked = peers.arguments(["run", "--layers", "8", "--batch", "2", "--out", "other.json"])
    assert peers.changed(peers.Shape(), asked) == peers.Shape(layers=8)
    assert [peers.changed(w, asked).batch for w in peers.WORKLOADS] == [2] * len(peers.WORKLOADS)


def test_a_tokenizer_of_words(peers, tmp_path):
    from jrlhf.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(peers.write_tokenizer(tmp_path, 32))
    assert tokenizer.encode("w17 w4") == [17, 4]
    assert tokenizer.decode([17, 4]) == "w17 w4"
    assert tokenizer.vocab_size == 32


def test_dialogues_that_are_not_there_say_so(peers, tmp_path):
    workload = next(w for w in peers.WORKLOADS if w.real)
    with pytest.raises(FileNotFoundError, match="--data"):
        peers.real_data(workload, 64, tmp_path, tmp_path)


def test_dialogues_are_the_same_ids_for_all(peers, shared_data, tmp_path):
    sft, pairs = (w for w in peers.WORKLOADS if w.name in ("sft_real", "dpo_real"))
    found = peers.real_data(pairs, 512, shared_data, tmp_path)["pairs"]
    assert len(found) > 500
    for row in found:
        assert row["prompt"]
        assert row["chosen"][-1] == row["rejected"][-1] == 2
        assert len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) <= pairs.length
        assert 0 not in row["prompt"] + row["chosen"]  # padding
    examples = peers.real_data(sft, 512, shared_data, tmp_path)["examples"]
    assert [e["answer"] for e in examples] == [row["chosen"] for row in found]
