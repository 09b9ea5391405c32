"""Every architecture of Hugging Face Transformers that computes attention through the library's
interface, tiny, ``eager`` beside fastattn.

    python tests/integrations/sweep_transformers.py [ARCHITECTURE ...]

writes sweep_transformers.csv, or the rows of the architectures that it is given. A number there is
the largest difference of an output to eager's, as a part of eager's largest: without a mask, with
one of ones, and, where tokens are real, with padding on the left and on the right; of gradients;
and, where eager's last token moves no earlier output, by how much it moves one here. ``-`` is what
a model has not, or what the last column says.
"""

import copy
import csv
import importlib
import inspect
import multiprocessing
import multiprocessing.connection
import os
import pathlib
import re
import resource
import signal
import sys
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from helpers.tiny_models import VARIANTS, inputs, tiny, with_weights

from fastattn.integrations import transformers as integration

TABLE = pathlib.Path(__file__).with_suffix(".csv")
MODELS = pathlib.Path(transformers.__file__).parent / "models"
COLUMNS = ["none", "ones", "left", "right", "future", "gradient", "last 4", "packed", "generated"]
HEADER = ["architecture", "model", "calls", *COLUMNS, "not compared"]
SECONDS, GIBIBYTES, PARAMETERS = 400, 12, 1e8
HEADS = re.compile(
    "For(Sequence|Token|Multiple|Question|Next|Image|Audio|XVector|Masked|PreTraining|CTC)"
    r"\w*$|Wrapper$|DoubleHeadsModel$|ForSemantic\w*$"
)


def architectures():
    """The modules whose source uses the interface, by the name of their folder."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        if "ALL_ATTENTION_FUNCTIONS" in path.read_text():
            found.setdefault(path.parent.name, []).append(path.stem)
    return found


def classes(folder, stems):
    """The models of an architecture, with their head of a language model where they have one."""
    for stem in stems:
        module = importlib.import_module(f"transformers.models.{folder}.{stem}")
        found = {
            name: x
            for name, x in vars(module).items()
            if isinstance(x, type) and issubclass(x, transformers.PreTrainedModel)
            if x.__module__ == module.__name__ and x.forward is not torch.nn.Module.forward
        }
        for name, x in found.items():
            bare = name.removesuffix("Model")
            headed = {bare + "ForCausalLM", bare + "ForConditionalGeneration"} & found.keys()
            if not HEADS.search(name) and not (name.endswith("Model") and headed):
                yield x


def made(model_class):
    """``(model, inputs)``, or why there are none."""
    reasons = []
    for variant in range(len(VARIANTS)):
        try:
            config = tiny(model_class.config_class, variant)
            with torch.device("meta"):
                empty = model_class._from_config(copy.deepcopy(config))
            size = sum(x.numel() for x in empty.parameters())
            if size > PARAMETERS:
                raise ValueError(f"{size / 1e6:.0f} million parameters")
            torch.manual_seed(0)
            model = with_weights(model_class._from_config(config, attn_implementation="eager"))
        except Exception as error:
            reasons.append(words_of(error))
            continue
        for given in inputs(model):
            try:
                with torch.no_grad():
                    if outputs(model, given):
                        return model, given
            except Exception as error:
                reasons.append(words_of(error))
        if not reasons:
            reasons.append("no inputs known for " + ", ".join(arguments(model)))
    return None, reasons[0]


def arguments(model):
    return inspect.signature(model.forward).parameters


def outputs(model, given):
    """The tensors of numbers among what the model returns."""
    torch.manual_seed(4)
    found = model(**given)
    return list(tensors(found.values() if hasattr(found, "values") else found))


def tensors(found):
    for x in [found] if isinstance(found, torch.Tensor) else found:
        if isinstance(x, torch.Tensor):
            if x.is_floating_point():
                yield x
        elif isinstance(x, tuple | list):
            yield from tensors(x)


class Pair:
    """One model, asked with ``eager`` and with fastattn."""

    def __init__(self, model):
        self.model, self.calls = model, 0

    def __call__(self, ask):
        found = []
        for implementation in ("eager", "fastattn"):
            self.model.set_attn_implementation(implementation)
            found.append(ask(self.model))
        return found

    def difference(self, given, real=None):
        """Of the outputs, of those at the real positions where these are given."""
        with torch.no_grad():
            eager, ours = self(lambda model: outputs(model, given))
        return worst(eager, ours, real)


def worst(eager, ours, real=None):
    if real is not None:
        eager, ours = ([x[real] for x in y if x.shape[:2] == real.shape] for y in (eager, ours))
    largest = 0.0
    for a, b in zip(eager, ours, strict=True):
        if a.numel() and not torch.equal(a, b):
            if not a.isfinite().all():
                raise FloatingPointError("eager is not finite")
            difference = (a - b).abs().max().item() / max(a.abs().max().item(), 1e-30)
            largest = max(largest, difference if difference == difference else float("inf"))
    return largest


def gradients(model, given):
    model.zero_grad()
    sum(x.square().mean() for x in outputs(model, given) if x.requires_grad).backward()
    found = [x.grad.clone() for x in model.parameters() if x.grad is not None]
    model.zero_grad()
    return [torch.cat([x.flatten() for x in found])]


def compare(pair, given):
    """The row of one model."""
    names = arguments(pair.model)
    yield "none", lambda: pair.difference(given)
    if "input_ids" in given and "attention_mask" in names:
        yield from compare_masks(pair, given)
    if "input_ids" in given:
        yield "future", lambda: future(pair, given)
    yield "gradient", lambda: worst(*pair(lambda model: gradients(model, given)))
    if "logits_to_keep" in names and "input_ids" in given:
        yield "last 4", lambda: pair.difference({**given, "logits_to_keep": 4})
    if "position_ids" in names and "input_ids" in given and "decoder_input_ids" not in given:
        places = torch.tensor([[*range(5), *range(7)]] * 2)
        packed = {**given, "position_ids": places}
        if "use_cache" in names or "past_key_values" in names:
            packed["use_cache"] = False
        yield "packed", lambda: pair.difference(packed)
    if pair.model.can_generate() and "input_ids" in given:
        yield "generated", lambda: worst(*pair(lambda model: generated(model, given)))


def compare_masks(pair, given):
    ones = torch.ones_like(given["input_ids"])
    left = ones.clone()
    left[1, :4] = 0
    for name, mask in {"ones": ones, "left": left, "right": left.flip(1)}.items():
        masked = {**given, "attention_mask": mask}
        yield name, lambda masked=masked, mask=mask: pair.difference(masked, mask.bool())


def future(pair, given):
    """How far the last token moves what is before it, where it moves nothing with eager."""
    name = "decoder_input_ids" if "decoder_input_ids" in given else "input_ids"
    other = given[name].clone()
    other[:, -1] = (other[:, -1] + 7) % 50 + 3

    def moved(model):
        with torch.no_grad():
            pairs = zip(outputs(model, given), outputs(model, {**given, name: other}), strict=True)
        length = other.shape[1]
        same = [[x[:, :-1] for x in y] for y in pairs if y[0].shape[1:2] == (length,)]
        if not same:
            return None
        return worst(*zip(*same, strict=True))

    eager, ours = pair(moved)
    return None if eager is None or eager > 1e-5 else ours


def generated(model, given):
    words = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": 2, "do_sample": False,
             "output_scores": True, "return_dict_in_generate": True}  # fmt: skip
    if model.config.is_encoder_decoder:
        words["decoder_start_token_id"] = 2
    mask = torch.ones_like(given["input_ids"])
    mask[1, :4] = 0
    with torch.no_grad():
        found = model.generate(given["input_ids"], attention_mask=mask, **words)
    return [x.where(x.isfinite(), 0) for x in found.scores]


def rows(folder, stems):
    """``(class, calls, {column: number or reason})`` of the architecture's models."""
    warnings.simplefilter("ignore")
    integration.register()
    calls = []
    inner = integration.attend
    integration.attend = lambda *args, **words: (calls.append(1), inner(*args, **words))[1]
    for model_class in classes(folder, stems):
        name = model_class.__name__
        model, given = made(model_class)
        if model is None:
            yield name, 0, {"not run": given}
            continue
        pair, found = Pair(model), {}
        calls.clear()
        for column, measure in compare(pair, given):
            found[column] = measured(pair, measure)
        yield name, len(calls), found


def measured(pair, measure):
    try:
        return measure()
    except Exception as error:
        reason = words_of(error)
        ours = pair.model.config._attn_implementation == "fastattn"
        return f"{'fastattn' if ours else 'eager'}: {reason}"


def words_of(error):
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:160]


def main(wanted):
    every = architectures()
    table = read() if wanted and TABLE.exists() else {}
    for folder, found in finished([(x, every[x]) for x in wanted or every]):
        table[folder] = [line(folder, *row) for row in found]
        write(table)
        print(*map("  ".join, table[folder]), sep="\n", flush=True)


def finished(queue):
    """``(architecture, rows)`` as they come, two at a time."""
    context, running = multiprocessing.get_context("fork"), {}
    while queue or running:
        while queue and len(running) < 2:
            item = queue.pop(0)
            receiver, sender = context.Pipe(False)
            process = context.Process(target=work, args=(sender, item))
            process.start()
            sender.close()
            running[receiver] = item[0], process
        for receiver in multiprocessing.connection.wait(running):
            folder, process = running.pop(receiver)
            try:
                found = receiver.recv()
            except EOFError:
                found = [("", 0, {"not run": "the process died or took too long"})]
            process.join()
            yield folder, found


def work(sender, item):
    """Send the rows of one architecture, from a process of its own."""
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (GIBIBYTES << 30,) * 2)
    torch.set_num_threads(1)
    sender.send(list(rows(*item)))


def line(folder, name, calls, row):
    reasons = [f"{k}: {x}" for k, x in row.items() if isinstance(x, str)]
    cells = [f"{row[k]:.0e}" if isinstance(row.get(k), float) else "-" for k in COLUMNS]
    return [folder, name, str(calls), *cells, "; ".join(reasons)]


def read():
    table = {}
    with TABLE.open(newline="") as file:
        for row in list(csv.reader(file))[1:]:
            table.setdefault(row[0], []).append(row)
    return table


def write(table):
    with TABLE.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(row for folder in sorted(table) for row in table[folder])


if __name__ == "__main__":
    main(sys.argv[1:])
