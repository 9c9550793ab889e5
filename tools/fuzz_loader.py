"""Loads damaged files of every format that `reparam.load` reads, some thousands of them.

    python tools/fuzz_loader.py --count 10000 --seed 0 [--record tools/results/fuzz_loader.md]

Files are mutated as a whole (bytes changed, cut, doubled, inserted) and, for archives, inside: the text and the pickles
in them are changed while the archive around stays whole. A round may end in a model or in one sentence; anything else
(another exception, a dead process, a file that appears, more than a minute) is a fault and is printed with its
round, which is repeated by `--seed ROUND --count 1`. Exit status 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import io
import random
import resource
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from tools.record import engine_revision, first_line, write  # noqa: E402

SLOW = 60.0
"""Seconds after which a round is a fault."""
MEMORY = 8 << 30
"""Bytes of address space that loading may take, the interpreter included."""
WHOLE = ("module", "exported program", "TorchScript")
"""Forms that need nobody to build the model."""
OUTCOMES = ("model", "sentence", "fault")


@dataclass(frozen=True)
class Outcome:
    """What became of one round: a model, a sentence or a fault, with a line that says which."""

    kind: str
    form: str
    detail: str = ""


class _Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 1))


def network() -> nn.Module:
    """What all of the files hold."""
    return nn.Sequential(*_Net().children()).eval()


@cache
def originals() -> dict[str, bytes]:
    """One good file of each form."""
    from safetensors.torch import save

    torch.manual_seed(0)
    model = network()
    example = (torch.ones(2, 1, 6, 6),)
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    found = {
        "module": _saved(model),
        "state dict": _saved(model.state_dict()),
        "checkpoint": _saved({"model": model.state_dict(), "epoch": 3, "best": 0.5}),
        "old state dict": _saved(model.state_dict(), _use_new_zipfile_serialization=False),
        "safetensors": save(dict(model.state_dict())),
    }
    with warnings.catch_warnings(), io.BytesIO() as exported, io.BytesIO() as compiled:
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(model, example, dynamic_shapes=(sizes,)), exported)
        torch.jit.save(torch.jit.script(model), compiled)
        found |= {"exported program": exported.getvalue(), "TorchScript": compiled.getvalue()}
    return found


def _saved(content: object, **options: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def mutated(seed: int) -> tuple[str, bytes]:
    """The form and the content of the file of one round."""
    draw = random.Random(seed)
    form = draw.choice(list(originals()))
    content = originals()[form]
    if content[:2] == b"PK" and draw.random() < 0.75:
        return f"{form}, inside", _inside(content, draw)
    return form, _changed(content, draw)


def _changed(content: bytes, draw: random.Random) -> bytes:
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        at = draw.randrange(len(data)) if data else 0
        match draw.randrange(6):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([data[at] ^ 1 << draw.randrange(8)]) if data else b""
            case 2:
                del data[at : at + draw.randrange(1, 40)]
            case 3:
                data[at:at] = data[: draw.randrange(40)]
            case 4:
                del data[at:]
            case _:
                other = draw.randrange(len(data)) if data else 0
                data[at : at + 8] = data[other : other + 8]
    return bytes(data)


def _inside(content: bytes, draw: random.Random) -> bytes:
    """One or two of the entries changed; their numbers and words rather than their bytes, every other time."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    names = [name for name, data in entries.items() if data and "/data/" not in name.removesuffix(".pt")]
    for name in draw.sample(names, k=min(len(names), draw.choice((1, 1, 2)))):
        change = _reworded if draw.random() < 0.5 else _changed
        entries[name] = change(entries[name], draw)
    with io.BytesIO() as made:
        with zipfile.ZipFile(made, "w") as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return made.getvalue()


def _reworded(content: bytes, draw: random.Random) -> bytes:
    """A word in it replaced by another word of it, or by one that asks for trouble."""
    import re

    words = list(re.finditer(rb"[\w.]+", content))
    if not words:
        return _changed(content, draw)
    trouble = [b"-1", b"0", b"9" * 18, b"os.system", b"torch.os.system", b"__class__", b"null", b"[]", b"../x", b"\xff"]
    word = draw.choice(words)
    new = draw.choice(trouble) if draw.random() < 0.5 else draw.choice(words)[0]
    return content[: word.start()] + new + content[word.end() :]


def tried(seed: int) -> Outcome:
    """Loads the file of one round in an empty folder."""
    import reparam
    from reparam.errors import InputError

    form, content = mutated(seed)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pt"
        path.write_bytes(content)
        start = time.perf_counter()
        try:
            loaded = reparam.load(path, arch=None if form.startswith(WHOLE) else network)
            outcome = Outcome("model" if isinstance(loaded, nn.Module) else "fault", form, type(loaded).__name__)
        except InputError as error:
            outcome = Outcome("fault" if "\n" in str(error) else "sentence", form, str(error))
        except BaseException as error:
            outcome = Outcome("fault", form, first_line(error))
        if time.perf_counter() - start > SLOW:
            outcome = Outcome("fault", form, f"took {time.perf_counter() - start:.0f} s")
        if [entry.name for entry in Path(folder).iterdir()] != ["model.pt"]:
            outcome = Outcome("fault", form, "a file appeared")
    return outcome


def outcomes(count: int, seed: int) -> Iterator[tuple[int, Outcome]]:
    """Each round with its outcome, in processes of their own: a fault of the interpreter ends one of those."""
    rounds = iter(range(seed, seed + count))
    at = next(rounds, None)
    while at is not None:
        with ProcessPoolExecutor(1, initializer=_limited) as pool:
            try:
                while at is not None:
                    yield at, pool.submit(tried, at).result(timeout=4 * SLOW)
                    at = next(rounds, None)
            except (BrokenProcessPool, TimeoutError) as error:
                for process in (pool._processes or {}).values():
                    process.kill()
                yield at, Outcome("fault", mutated(at)[0], f"the process ended ({first_line(error)})")
                at = next(rounds, None)


def _limited() -> None:
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def _table(found: Counter[tuple[str, str]]) -> str:
    forms = sorted({form for form, _ in found})
    lines = ["| file | model | sentence | fault |", "|---|--:|--:|--:|"]
    lines += [f"| {form} | {' | '.join(str(found[form, kind]) for kind in OUTCOMES)} |" for form in forms]
    return "\n".join(lines)


def main() -> int:
    """Runs from the command line."""
    parser = argparse.ArgumentParser(description="Load damaged files.")
    parser.add_argument("--count", type=int, default=1000, help="rounds (default 1000)")
    parser.add_argument("--seed", type=int, default=0, help="of the first round; the others follow (default 0)")
    parser.add_argument("--record", type=Path, help="Markdown file for the outcome")
    options = parser.parse_args()
    found: Counter[tuple[str, str]] = Counter()
    start = time.perf_counter()
    for at, outcome in outcomes(options.count, options.seed):
        found[outcome.form, outcome.kind] += 1
        if outcome.kind == "fault":
            print(f"round {at}, {outcome.form}: {outcome.detail}", flush=True)
    seconds = time.perf_counter() - start
    print(_table(found))
    if options.record:
        command = f"python tools/fuzz_loader.py --count {options.count} --seed {options.seed}"
        write(
            options.record,
            f"# Damaged files, loaded\n\n`{command}`, reparam at {engine_revision()}, torch {torch.__version__}, "
            f"{seconds:.0f} s.\n\nA file may end in a model or in one sentence; anything else is a fault.\n\n"
            f"{_table(found)}\n",
        )
    return 1 if any(kind == "fault" for _, kind in found) else 0


if __name__ == "__main__":
    sys.exit(main())
