"""`minray simulate`: what it prints, what it refuses, and the shapes of the paper's figures in small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from minray.policy import Policy
from minray.simulator.costs import Costs
from minray.simulator.report import main
from minray.simulator.workloads import run_fig8b, run_fig11a, run_fig11b

pytestmark = pytest.mark.one_python

FLOOD = ["--nodes", "4", "--tasks", "3000", "--seed", "7"]


def simulate(capsys: Any, *arguments: str) -> dict[str, Any]:
    assert main([*FLOOD, "--json", *arguments]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_it_prints_the_figures_and_draws_them(capsys: Any) -> None:
    assert main([*FLOOD, "--tasks", "20000", "--faults", "kill_node@0.3,join_node@0.6"]) == 0
    text = capsys.readouterr().out
    for figure in ("finished      True", "tasks_per_s", "utilisation", "recovery_s", "trace", "is killed", "joins"):
        assert figure in text
    assert "virtual time (s)" in text and "*" in text


def test_a_picture_is_drawn_into_a_file(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    # In a process of its own: matplotlib keeps files of fonts open.
    command = [sys.executable, "-m", "minray.command", "simulate", *FLOOD, "--plot", str(tmp_path / "picture.png")]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_arguments_give_the_same_run_whatever_the_seed_of_hashes() -> None:
    found = set()
    for hash_seed in ("1", "2"):
        command = [sys.executable, "-m", "minray.command", "simulate", *FLOOD, "--json", "--faults", "kill_node@0.05"]
        done = subprocess.run(command, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True, check=True)
        found.add(json.loads(done.stdout)["trace"])
    assert len(found) == 1


def test_another_seed_gives_another_run(capsys: Any) -> None:
    fault = ["--faults", "kill_node@0.05"]
    assert simulate(capsys, *fault)["trace"] != simulate(capsys, *fault, "--seed", "8")["trace"]


@pytest.mark.parametrize(
    "fault, says",
    [
        ("kill_node:3@0.05", "0.05 s: node n3 is killed"),
        ("join_node@0.05", "0.05 s: node n5 joins"),
        ("cut_node:0.5@0.05", "is cut off for 0.5 s"),
        ("slow_node:2@0.05", "runs 2 times slower"),
        ("kill_node:99@0.05", "0.05 s: kill_node did not happen: there is no node n99"),
        ("kill_node@1000", "1000 s: kill_node did not happen: all was done before"),
    ],
)
def test_faults_happen_or_it_is_said_that_they_did_not(capsys: Any, fault: str, says: str) -> None:
    found = simulate(capsys, "--faults", fault)
    assert found["finished"] and says in found["faults"][0]


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["kill_node@0.05"], "killed at 0.05 s: no rate to come back to: no whole 0.1 s"),
        (["kill_node@0.11", "--tasks", "900"], "killed at 0.11 s: no rate since: all was done at 0.1"),
    ],
)
def test_where_a_run_is_too_short_to_tell_the_recovery_it_is_said_why(capsys: Any, arguments: list[str], says: str) -> None:
    found = simulate(capsys, "--faults", *arguments)
    assert found["recovery_s"] == [None] and [why[: len(says)] for why in found["no_recovery_s"]] == [says]
    long = simulate(capsys, "--faults", "kill_node@0.3", "--tasks", "20000")
    assert long["recovery_s"] != [None] and "no_recovery_s" not in long


def test_nodes_that_are_not_there_cannot_be_killed(capsys: Any) -> None:
    happened = simulate(capsys, "--faults", ",".join(["kill_node@0.01"] * 5))["faults"]
    assert [("is killed" in what, "did not happen" in what) for what in happened] == [(True, False)] * 3 + [(False, True)] * 2


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["--nodes", "0"], "--nodes must be at least 1"),
        (["--task-ms", "-1"], "--task-ms must be a number from 0"),
        (["--task-ms", "nan"], "--task-ms must be a number from 0"),
        (["--faults", "burn_node@1"], "is no fault"),
        (["--faults", "kill_node"], "is no fault"),
        (["--faults", "kill_node@-1"], "is no fault"),
        (["--faults", "kill_node@nan"], "is no fault"),
        (["--faults", "kill_node@inf"], "is no fault"),
        (["--faults", "kill_node:@1"], "is no fault"),
        (["--faults", "kill_node:0@1"], "from 2"),
        (["--faults", "kill_node:1@1"], "the head"),
        (["--faults", "kill_node:2.5@1"], "number of a node"),
        (["--faults", "join_node:3@1"], "takes no argument"),
        (["--faults", "cut_node:-2@1"], "above 0"),
        (["--faults", "slow_node:nan@1"], "above 0"),
        (["--faults", "slow_node:0@1"], "above 0"),
        (["--faults", "kill_node@1", "--experiment", "fig11a"], "an experiment has its own faults"),
        (["--policy", "nowhere.py"], "nowhere.py"),
        (["--costs", "nowhere.json"], "nowhere.json"),
        (["--plot", "nowhere/picture.png"], "no such directory"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_simulated(capsys: Any, arguments: list[str], says: str) -> None:
    if "--plot" in arguments:
        pytest.importorskip("matplotlib")
    assert main([*FLOOD, *arguments]) == 2
    told = capsys.readouterr()
    assert says in told.err and not told.out


@pytest.mark.parametrize(
    "text, says",
    [
        ("costs", "is not JSON"),
        ("[1]", "must be a JSON object"),
        ('{"speed": 1}', "no such cost: speed"),
        ('{"row_s": -1}', "row_s must be a number from 0"),
        ('{"row_s": "1"}', "row_s must be a number from 0"),
        ('{"bandwidth": 0}', "bandwidth must be a number from 1"),
        ('{"row_s": NaN}', "row_s must be a number from 0"),
    ],
)
def test_costs_that_make_no_sense_are_refused(tmp_path: Any, capsys: Any, text: str, says: str) -> None:
    path = tmp_path / "costs.json"
    path.write_text(text)
    assert main([*FLOOD, "--costs", str(path)]) == 2
    assert says in (told := capsys.readouterr().err) and str(path) in told


def test_other_costs_and_another_policy_give_another_run(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "costs.json").write_text('{"hop_s": 0.001}')
    (tmp_path / "central.py").write_text(
        "from minray.policy import Policy\n"
        "class Central(Policy):\n"
        "    def keeps(self, waiting, mean_s, slots):\n"
        "        return False\n"
    )
    usual = simulate(capsys)
    slow = simulate(capsys, "--costs", str(tmp_path / "costs.json"))
    central = simulate(capsys, "--policy", str(tmp_path / "central.py"))
    assert slow["virtual_s"] > usual["virtual_s"]
    assert central["finished"] and central["head_busy"] > usual["head_busy"]


def test_bottom_up_grows_with_the_nodes_and_one_global_scheduler_does_not() -> None:
    figures = run_fig8b(0, Costs(), Policy, sizes=(2, 8)).figures
    assert figures["bottom-up, of linear"] > 0.8
    assert figures["one global scheduler, largest to smallest"] < 1.5


def test_what_dead_nodes_had_made_is_made_again_and_the_rate_comes_back() -> None:
    figures = run_fig11a(0, Costs(), Policy, num_nodes=5, seconds=30.0).figures
    assert figures["finished"] and figures["equal results"]
    assert figures["tasks/s with 3 nodes fewer"] < 0.6 * figures["tasks/s before"]
    assert figures["recovered"] > 0.95
    assert 0.7 < figures["utilisation"] < 1  # of the nodes that lived


def test_checkpoints_save_most_of_what_would_be_executed_again() -> None:
    assert run_fig11b(0, Costs(), Policy, num_nodes=5, num_actors=100).figures["ratio"] > 5
