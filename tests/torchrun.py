"""Two processes of torchrun on this machine, and a story that is small enough for them.

Run by torchrun, this file tells a story with `SMALL` in place of the constants of safety.py.
"""
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import safety  # noqa: E402
from data import run_program  # noqa: E402
from train import Stage  # noqa: E402

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
STORY = ["--threads=1", "--device=cpu", "--base.steps=10", "--base.rows=200", "--insert.steps=30",
         "--insert.rows=200", "--insert.lr=5e-3", "--sft.steps=4", "--sft.rows=100", "--sft.at=3",
         "--preference.steps=4", "--preference.rows=50", "--ppo.iterations=2", "--ppo.rollouts=16",
         "--ppo.minibatch=8", "--rl.at=1", "--red.rounds=2", "--red.proposals=11",
         "--adversarial.steps=4", "--adversarial.rows=50", "--adversarial.at=0",
         "--relearn.most=1", "--relearn.n=3", "--eval.n=7", "--eval.curve_n=3", "--eval.max_new=6",
         "--name=story"]


def two_epochs(defences):
    """`story_settings`, with a second epoch of PPO: its minibatches are shuffled."""
    config = STORY_SETTINGS(defences)
    return replace(config, ppo=replace(config.ppo, epochs=2))


STORY_SETTINGS = safety.story_settings
SMALL = {"PROPOSER": Stage(steps=10, batch=24, lr=2e-3, rows=100),
         "IMITATION": replace(safety.IMITATION, steps=4), "story_settings": two_epochs}

if __name__ == "__main__":
    for name, value in SMALL.items():
        setattr(safety, name, value)
    run_program(safety.main)
