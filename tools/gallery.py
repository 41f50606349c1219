"""The gallery: what `headoff verify` says of public attention code.

    pip install -e .[test,gallery]
    python tools/gallery.py

runs `headoff verify` on every adapter in docs/gallery, one after the other, times each single call against torch's
SDPA, and writes docs/gallery.md. Results are kept in build/gallery, one file for each adapter, and used again until the
adapter, its package, torch or headoff's version changes, so that a run that was cut short goes on; `--again` runs all.
`--only NAME` runs some, `--page` none.

Where an attention is said to be wrong, docs/gallery/by_hand has a script of a few lines that shows it without headoff:
it calls the package and compares with torch's SDPA in float64. Its output is part of the page.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from headoff.wording import markdown_table  # noqa: E402

ADAPTERS = ROOT / "docs" / "gallery"
BY_HAND = ADAPTERS / "by_hand"
PAGE = ROOT / "docs" / "gallery.md"
RESULTS = ROOT / "build" / "gallery"
VERIFY = [sys.executable, "-c", "import sys, headoff.cli; sys.exit(headoff.cli.main())", "verify"]
SECONDS = 1.0
"""About the time of all rounds of one benchmark."""

LONGEST = 120
"""Characters of a cause in the table."""

TABLE = ("adapter", "code of", "verdict", "cause", "time, forward", "time, backward")


@dataclass(frozen=True)
class Entry:
    """An adapter, and how it is run.

    Attributes:
        name: of its file in docs/gallery.
        package: the distribution that the code is from.
        options: of `headoff verify`.
        suites: to get the verdict from; all by default.
        gpu: whether it runs on a GPU alone.
        note: what a person found out, for the page.
    """

    name: str
    package: str = "torch"
    options: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    gpu: bool = False
    note: str = ""

    @property
    def file(self) -> Path:
        return ADAPTERS / f"{self.name}.py"

    @property
    def is_deformable(self) -> bool:
        return self.name.startswith("deformable_")

    @property
    def callable(self) -> str:
        return f"docs/gallery/{self.name}.py:{'kernel' if self.is_deformable else 'attention'}"

    @property
    def all_options(self) -> list[str]:
        contract = ["--contract", "deformable"] if self.is_deformable else []
        return [*contract, *self.options, *(["--device", "cuda"] if self.gpu else [])]

    @property
    def command(self) -> str:
        return " ".join(["headoff verify", self.callable, *self.all_options, *self.only])

    @property
    def only(self) -> list[str]:
        return [word for suite in self.suites for word in ("--only", suite)]

    @property
    def title(self) -> str:
        return (ast.get_docstring(ast.parse(self.file.read_text())) or self.name).rstrip(".")

    @property
    def code(self) -> str:
        """The adapter without its docstring."""
        return self.file.read_text().split('"""', 2)[2].strip()

    @property
    def installed(self) -> str | None:
        """The package's version, or None."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


FORWARD = ("--forward-only",)
IN_THE_MODEL = ("calls", "detections")
COMPILED = (
    "Tried as the model calls it, and not in the hundreds of sizes of the suite `operator`, which take many minutes: "
    "this code is compiled, or traced, for each"
)
CRASH = (
    "By hand it ends its process as well, with 144 queries and keys and an additive mask of (1, 8, 144, 144), without "
    "gradients; without a mask it is right, and so is `flex_compiled`, which gives the mask to flex_attention itself"
)
XFORMERS = (
    "xformers is not among the packages of the extra, for each of its releases needs one release of torch. On a CPU it "
    "has no kernel: 0.0.32.post2 with torch 2.8.0 raises NotImplementedError"
)
MEMORY_EFFICIENT = "memory-efficient-attention-pytorch"
TWO_DIMENSIONS = (
    "The adapter expands every mask to four dimensions. A mask of two dimensions is one of keys to this code, (batch, "
    "keys), and one of (queries, keys) to torch's SDPA: given as it is, it raises, or is taken for the other where the "
    "numbers agree"
)
ENTRIES = (
    Entry("sdpa_math"),
    Entry("sdpa_flash"),
    Entry("sdpa_efficient", gpu=True),
    Entry("sdpa_cudnn", gpu=True),
    Entry("sdpa_compiled"),
    Entry("flex_eager", options=FORWARD, suites=IN_THE_MODEL, note=COMPILED),
    Entry("flex_compiled", options=FORWARD, suites=IN_THE_MODEL, note=COMPILED),
    Entry("multi_head_attention_forward"),
    Entry("multihead_attention_fast_path", options=FORWARD),
    Entry("transformers_eager", "transformers"),
    Entry("transformers_sdpa", "transformers"),
    Entry("transformers_flex", "transformers", FORWARD, IN_THE_MODEL, note=CRASH),
    Entry("timm_attention", "timm"),
    Entry("memory_efficient_attention_pytorch_plain", MEMORY_EFFICIENT),
    Entry("memory_efficient_attention_pytorch_flash", MEMORY_EFFICIENT, note=TWO_DIMENSIONS),
    Entry("memory_efficient_attention_pytorch_flash_tiles", MEMORY_EFFICIENT),
    Entry("memory_efficient_attention_pytorch_chunks", MEMORY_EFFICIENT),
    Entry("x_transformers_plain", "x-transformers"),
    Entry("x_transformers_flash", "x-transformers"),
    Entry("perceiver_pytorch_attention", "perceiver-pytorch"),
    Entry("vit_pytorch_simple_flash", "vit-pytorch"),
    Entry("kornia_loftr", "kornia"),
    Entry("kornia_loftr_keys_masked", "kornia"),
    Entry("ring_attention_pytorch_plain", "ring-attention-pytorch"),
    Entry("ring_attention_pytorch_flash", "ring-attention-pytorch"),
    Entry("flash_attention_softmax_n_flash", "flash-attention-softmax-n", gpu=True),
    Entry("xformers_memory_efficient", "xformers", gpu=True, note=XFORMERS),
    Entry("deformable_transformers", "transformers"),
    Entry("deformable_transformers_v2", "transformers"),
    Entry("deformable_rfdetr", "rfdetr"),
    Entry("deformable_kornia", "kornia"),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="run only this adapter; can be repeated"
    )
    parser.add_argument("--again", action="store_true", help="run also what there are results of")
    parser.add_argument(
        "--page", action="store_true", help="run nothing; write the page of the results there are"
    )
    given = parser.parse_args()
    known = {entry.name for entry in ENTRIES}
    if unknown := set(given.only or ()) - known:
        parser.error(
            f"there is no adapter {', '.join(sorted(unknown))}: use one of {', '.join(sorted(known))}"
        )
    wanted = [] if given.page else [entry for entry in ENTRIES if not given.only or entry.name in given.only]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for number, entry in enumerate(wanted, 1):
        print(f"[{number}/{len(wanted)}] {entry.name}: ", end="", flush=True)
        if result_of(entry) and not given.again:
            print("there is a result")
            continue
        result = run(entry)
        keep(entry, result)
        print(result["headline"], flush=True)
    for entry in ENTRIES:
        show_by_hand(entry)
    PAGE.write_text(page())
    print(f"wrote {PAGE.relative_to(ROOT)}")
    return 0


def fingerprint(entry: Entry) -> str:
    """Changes with all that a result depends on, but headoff's uncommitted changes."""
    import headoff

    parts = [
        entry.file.read_text(),
        entry.installed,
        entry.all_options,
        version("torch"),
        headoff.__version__,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def result_of(entry: Entry) -> dict[str, Any] | None:
    """The kept result, unless something that it depends on has changed."""
    file = RESULTS / f"{entry.name}.json"
    if not file.exists():
        return None
    result: dict[str, Any] = json.loads(file.read_text())
    return result if result["fingerprint"] == fingerprint(entry) else None


def run(entry: Entry) -> dict[str, Any]:
    """Verify it and time it."""
    import torch

    from headoff.timing.machine import cpu_model

    result: dict[str, Any] = {"fingerprint": fingerprint(entry), "version": entry.installed, "benchmarks": []}
    result |= {"by_hand": "", "machine": cpu_model(), "torch": torch.__version__}
    if entry.installed is None:
        return {**result, "verdict": "not run", "headline": f"{entry.package} is not installed"}
    if entry.gpu and not torch.cuda.is_available():
        return {**result, "verdict": "not run", "headline": "needs a GPU, not run"}
    result |= verify(entry, *entry.only)
    if result["verdict"] in ("right", "wrong"):
        only = "deformable_benchmark" if entry.is_deformable else "benchmark"
        timed = verify(
            entry, "--only", only, "--bench-seconds", str(SECONDS), "--", "-k", "attention and 0 and off"
        )
        result["benchmarks"] = timed["benchmarks"]
    return result


def show_by_hand(entry: Entry) -> None:
    """Run the script by hand where its output is not that of the result."""
    script, result = BY_HAND / entry.file.name, result_of(entry)
    if result is None or not script.exists() or entry.installed is None:
        return
    text = script.read_text()
    if result.get("script") != text:
        shown = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
        keep(entry, {**result, "script": text, "by_hand": shown.stdout.strip()})


def keep(entry: Entry, result: dict[str, Any]) -> None:
    (RESULTS / f"{entry.name}.json").write_text(json.dumps(result, indent=1))


def verify(entry: Entry, *options: str) -> dict[str, Any]:
    """Verdict, headline and benchmarks of one run of `headoff verify`."""
    before, separator, after = options, (), ()
    if "--" in options:
        at = options.index("--")
        before, separator, after = options[:at], ("--",), options[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.html"
        command = [*VERIFY, entry.callable, *entry.all_options, "--report", str(report), *before]
        done = subprocess.run(
            [*command, *separator, *after],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            capture_output=True,
            text=True,
        )
        if not report.with_suffix(".json").exists():
            lines = [line for line in done.stdout.splitlines() if line.startswith(entry.callable)]
            lines += [line for line in done.stderr.splitlines() if "error:" in line]
            said = (lines or [f"exit code {done.returncode}"])[0].split("error: ")[-1]
            return {"verdict": "no verdict", "headline": said, "benchmarks": []}
        document = json.loads(report.with_suffix(".json").read_text())
    verdict = "no verdict" if document["verdict"] == "incomplete" else document["verdict"]
    found = {"verdict": verdict, "headline": document["headline"], "benchmarks": document["benchmarks"]}
    # The property leads the headline's cause; its case says which call it was.
    causes = document["diagnosis"] or [one for test in document["tests"] for one in test["findings"]]
    found["case"] = causes[0]["case"] if verdict == "wrong" and causes else ""
    return found | {"notes": document["notes"]}


def ratio(result: dict[str, Any], direction: str) -> str:
    """The geometric mean of the ratios of single calls, and their range; nothing where none was timed."""
    ratios = [one["ratio"] for one in result["benchmarks"] if one["group"].endswith(direction)]
    if not ratios:
        return ""
    mean = statistics.geometric_mean(ratios)
    return f"{mean:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def cause(entry: Entry, result: dict[str, Any]) -> str:
    """What headoff says, without the name of what it says it of."""
    said = result["headline"].replace(" (forward pass only)", "", 1)
    for start in (
        f"{entry.callable} is wrong: ",
        f"{entry.callable} is ",
        f"{entry.callable}: ",
        f"{entry.callable} ",
    ):
        said = said.removeprefix(start)
    said = re.sub(r"/\S*/(docs/gallery|site-packages)/", r"\1/", said.removeprefix("no verdict, because "))
    where = f", for example in: {result['case']}" if result.get("case") and "cases tried" not in said else ""
    return said + where


def short(said: str) -> str:
    """What fits into a table, without places in files."""
    said = re.sub(r" ?\([^()]*(line \d+|cases?( tried)?)\)| when called as.*|, for example in.*", "", said)
    return said.replace("|", "\\|") if len(said) <= LONGEST else f"{said[:LONGEST].rsplit(' ', 1)[0]} ..."


def page() -> str:
    """docs/gallery.md."""
    rows, sections, dates = [], [], set()
    for entry in ENTRIES:
        result = result_of(entry)
        if result is None:
            result = {
                "verdict": "not run",
                "headline": "not run yet",
                "benchmarks": [],
                "by_hand": "",
                "version": "",
            }
        else:
            dates.add(f"{result['machine']}, torch {result['torch']}")
        verdict = result["verdict"]
        strong = f"**{verdict}**" if verdict in ("wrong", "no verdict") else verdict
        origin = f"{entry.package} {result['version'] or ''}".strip()
        said = cause(entry, result)
        if verdict == "right":
            said = "" if "but its" not in said else said
        times = (ratio(result, direction) for direction in ("forward", "backward"))
        rows.append((f"[{entry.name}](#{entry.name})", origin, strong, short(said), *times))
        sections.append(section(entry, result, said))
    return (
        HEAD
        + "\n".join([f"Measured on: {one}, one thread." for one in sorted(dates)])
        + "\n\n"
        + "\n".join(markdown_table(TABLE, rows, padded=False))
        + "\n\n"
        + "\n\n".join(sections)
        + "\n"
    )


def section(entry: Entry, result: dict[str, Any], said: str) -> str:
    """One adapter: what it calls, what headoff says, the adapter, and the fault by hand."""
    parts = [f"## {entry.name}", f"{entry.title}. **{result['verdict']}**" + (f": {said}" if said else "")]
    parts += [f"{entry.note}."] if entry.note else []
    parts += [f"    {entry.command}", f"```python\n{entry.code}\n```"]
    by_hand = BY_HAND / entry.file.name
    if by_hand.exists():
        parts += ["By hand, without headoff:", f"```python\n{by_hand.read_text().strip()}\n```"]
        if result["by_hand"]:
            parts.append("\n".join(f"    {line}" for line in result["by_hand"].splitlines()))
    return "\n\n".join(parts)


HEAD = """\
# Gallery: public attention code under `headoff verify`

Made by `pip install headoff[gallery]` and `python tools/gallery.py`, which runs `headoff verify` on every adapter in
[docs/gallery](gallery), float32 on a CPU, and times single calls. An adapter calls a package's public code with
headoff's contract; no code of a package is copied. A verdict is about that code under that contract: *wrong* means that
for a call that torch's SDPA answers it gives other numbers than SDPA in float64, or raises, and a few lines by hand
show it without headoff. It does not mean that the package's own models are wrong: most never make such a call, or throw
its result away (that of a query that may attend to no key, for example, which is zero by SDPA).

*No verdict* means that the code cannot be tested so: the sentence says why. What needs a GPU is listed and was not
run. Times are relative to torch's SDPA, for deformable attention to `grid_sample_attention`: the geometric mean of the
three sites (or three places) with no head off, and the least and the largest; above 1 is slower. The adapter is part of
the time.

"""

if __name__ == "__main__":
    sys.exit(main())
