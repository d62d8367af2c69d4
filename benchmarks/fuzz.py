"""Fuzz everything that reads bytes from outside, and write what came of it.

    python benchmarks/fuzz.py --cases 40000 --seconds 60 --out benchmarks/results/fuzz-2026-11.json

Two fuzzers over the targets of tests/hostile.py:

- made: mutations that know the formats, drawn from a seed. A child process reads a batch of them, each under a limit on
  its address space (what it has plus what the target may allocate) and on its processor time (5 s); a crash or a wait
  without end is the parent's to see, and is attributed to the case that was begun last.
- guided: atheris (libFuzzer) with the same mutations, guided by the coverage of hgprompt's and Pillow's Python code.

Allowed is success or an HGPromptError with a message of at most 4,000 characters. Anything else is a finding: the file
is written into tests/corpus/found, where a test replays it.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import mmap
import os
import platform
import random
import re
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))
SECONDS, WAIT, LONGEST = 5.0, 60.0, 4_000
BATCH, GROUP = 2000, 20
PAGE = resource.getpagesize()
SCRATCH = "/dev/shm" if Path("/dev/shm").is_dir() else None


class Hang(BaseException):
    """A case took more than SECONDS of processor time."""


def attempt(target: Any, place: Path, content: bytes) -> tuple[str, str]:
    """(outcome, what was wrong): an outcome of "ok" or an error's class is allowed, "finding" is not."""
    from hgprompt.errors import HGPromptError

    try:
        target.read(place, content)
    except HGPromptError as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, MemoryError):
                return "finding", f"allocation over the limit: {error!s:.300}"
            cause = cause.__cause__ or cause.__context__
        long = len(str(error)) > LONGEST
        return ("finding", f"message of {len(str(error))} characters") if long else (type(error).__name__, "")
    except Hang:
        return "finding", f"over {SECONDS} s"
    except (Exception, SystemExit) as error:
        return "finding", f"{type(error).__name__}: {error!s:.300}"
    return "ok", ""


def peak() -> int:
    """Bytes of memory that this process had at most since the last `reset_peak`."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def child(name: str, seed: int, cases: range, begun: mmap.mmap, out: int) -> None:
    """Read a batch of cases and write a summary; never returns."""
    import hostile

    target = hostile.TARGETS[name]
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)  # libtiff's complaints
    warnings.simplefilter("ignore")

    def on_time(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGPROF, on_time)
    outcomes: Counter[str] = Counter()
    findings, slowest, largest, before, size = [], (0.0, 0), (0, 0), 0, 0
    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        place = Path(folder)
        for i in cases:
            content = target.make(random.Random(f"{seed}/{name}/{i}"))
            begun[:8] = i.to_bytes(8, "little")
            if i % GROUP == 0 or i == cases.start:  # reading /proc takes longer than reading a case
                largest = max(largest, (peak() - before, i - 1)) if i > cases.start else largest
                size = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
                reset_peak()
                before = peak()
            resource.setrlimit(resource.RLIMIT_AS, (size + target.limit(len(content)), resource.RLIM_INFINITY))
            start = time.process_time()
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            outcome, why = attempt(target, place, content)
            signal.setitimer(signal.ITIMER_PROF, 0)
            slowest = max(slowest, (time.process_time() - start, i))
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            outcomes[outcome] += 1
            if outcome == "finding":
                findings.append([i, why])
    largest = max(largest, (peak() - before, cases.stop - 1))
    os.write(out, json.dumps([outcomes, findings, slowest, largest]).encode())
    os._exit(0)


def run_batch(name: str, seed: int, cases: range) -> tuple[Counter[str], list[tuple[int, str]], Any, Any]:
    """A batch in a child process. A crash or a wait without end is a finding; the cases after it are read anew."""
    begun = mmap.mmap(-1, 8)
    begun[:8] = cases.start.to_bytes(8, "little")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            child(name, seed, cases, begun, writer)
        finally:
            os._exit(1)
    os.close(writer)
    answer, last, since, waited = b"", b"", time.monotonic(), False
    while True:
        ready, _, _ = select.select([reader], [], [], 1.0)
        if ready:
            part = os.read(reader, 1 << 20)
            if not part:
                break
            answer += part
        if begun[:8] != last:
            last, since = begun[:8], time.monotonic()
        elif time.monotonic() - since > WAIT:
            waited = True
            os.kill(pid, signal.SIGKILL)
            break
    os.close(reader)
    _, status = os.waitpid(pid, 0)
    if status == 0 and answer:
        outcomes, findings, slowest, largest = json.loads(answer)
        return Counter(outcomes), [(i, why) for i, why in findings], slowest, largest
    at = int.from_bytes(begun[:8], "little")
    why = f"waited over {WAIT} s" if waited else f"the process ended with status {status}"
    before = run_batch(name, seed, range(cases.start, at)) if at > cases.start else None
    after = run_batch(name, seed, range(at + 1, cases.stop)) if at + 1 < cases.stop else None
    total, found = Counter({"finding": 1}), [(at, why)]
    slowest, largest = (0.0, 0), (0, 0)
    for part in (before, after):
        if part is not None:
            total, found = total + part[0], found + part[1]
            slowest, largest = max(slowest, tuple(part[2])), max(largest, tuple(part[3]))
    return total, found, slowest, largest


def made(name: str, seed: int, count: int, found: Path) -> dict[str, Any]:
    """Read `count` made cases of a target."""
    import hostile

    with tempfile.TemporaryDirectory(dir=SCRATCH) as folder:
        for good in hostile.TARGETS[name].seeds():  # what is loaded with the first use is no case's allocation
            hostile.TARGETS[name].read(Path(folder), good)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    slowest, largest, start = (0.0, 0), (0, 0), time.monotonic()
    for first in range(0, count, BATCH):
        part = run_batch(name, seed, range(first, min(first + BATCH, count)))
        outcomes += part[0]
        slowest, largest = max(slowest, tuple(part[2])), max(largest, tuple(part[3]))
        for i, why in part[1]:
            reasons[why] += 1
            if reasons[why] == 1:
                keep(found, name, hostile.TARGETS[name].make(random.Random(f"{seed}/{name}/{i}")), why)
    return {
        "cases": count, "outcomes": dict(sorted(outcomes.items())), "findings": dict(reasons),
        "slowest_cpu_seconds": round(slowest[0], 4), "slowest_case": slowest[1],
        "largest_resident_growth_bytes": largest[0], "largest_case_of_20_before": largest[1],
        "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def keep(found: Path, name: str, content: bytes, why: str) -> None:
    """Save a file that was a finding."""
    found.mkdir(parents=True, exist_ok=True)
    (found / f"{name}-{hashlib.sha256(content).hexdigest()[:12]}").write_bytes(content)
    print(f"  FOUND {name}: {why}", flush=True)


def guided(name: str, seed: int, seconds: int, found: Path) -> dict[str, Any]:
    """Fuzz a target with atheris for so long, in a process of its own."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, __file__, "--guided-target", name, "--seed", str(seed), "--work", work]
        done = subprocess.run(
            [*command, "--seconds", str(seconds)], capture_output=True, text=True, errors="replace",
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        crashes = [p for p in Path(work).iterdir() if p.name.startswith(("crash-", "timeout-", "oom-", "leak-"))]
        for path in crashes:
            keep(found, name, path.read_bytes(), path.name.partition("-")[0])
        cases = re.search(r"stat::number_of_executed_units:\s+(\d+)", done.stderr)
        covered = re.findall(r"cov: (\d+)", done.stderr)
        peak_rss = re.search(r"stat::peak_rss_mb:\s+(\d+)", done.stderr)
        if cases is None and not crashes:
            raise SystemExit(f"atheris did not run {name}:\n{done.stderr[-2000:]}")
        slowest = re.search(r"stat::slowest_unit_time_sec:\s+(\d+)", done.stderr)
        return {
            "cases": int(cases[1]) if cases else None, "crashes": len(crashes), "seconds": seconds,
            "branches_first": int(covered[0]) if covered else None,
            "branches_last": int(covered[-1]) if covered else None,
            "slowest_whole_seconds": int(slowest[1]) if slowest else None,
            "peak_resident_mib": int(peak_rss[1]) if peak_rss else None,
        }  # fmt: skip


def fuzz_one(name: str, seed: int, seconds: int, work: Path) -> None:
    """The process that atheris runs in."""
    import atheris

    with atheris.instrument_imports(include=["hgprompt", "PIL"]):
        import hostile
        from PIL import Image

        Image.init()
    warnings.simplefilter("ignore")
    target = hostile.TARGETS[name]
    corpus = work / "corpus"
    corpus.mkdir()
    for i, content in enumerate(target.seeds()):
        (corpus / str(i)).write_bytes(content)
    place = Path(tempfile.mkdtemp(dir=SCRATCH))

    def read(content: bytes) -> None:
        outcome, why = attempt(target, place, content)
        if outcome == "finding":
            raise AssertionError(why)

    def mutate(content: bytes, max_size: int, number: int) -> bytes:
        rng = random.Random(number)
        if not content or rng.random() < 0.1:
            return target.make(rng)[:max_size]
        if rng.random() < 0.3:
            return atheris.Mutate(content, max_size)
        return target.change(content, rng)[:max_size]

    options = [f"-max_total_time={seconds}", f"-seed={seed + 1}", f"-timeout={SECONDS:.0f}", "-rss_limit_mb=4096"]
    options += [f"-artifact_prefix={work}/", "-print_final_stats=1", "-max_len=65536"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], read, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20_000, help="made cases of each target")
    parser.add_argument("--seconds", type=int, default=60, help="of guided fuzzing of each target; 0: none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", help="default: all")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--found", type=Path, default=ROOT / "tests" / "corpus" / "found")
    parser.add_argument("--guided-target", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.guided_target:
        fuzz_one(arguments.guided_target, arguments.seed, arguments.seconds, arguments.work)
        return
    import hostile

    names = arguments.targets or list(hostile.TARGETS)
    packages = ["torch", "numpy", "pillow", "rich"] + (["atheris"] if arguments.seconds else [])
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"], cwd=ROOT, capture_output=True, text=True
    )
    record: dict[str, Any] = {
        "commit": git.stdout.strip(), "seed": arguments.seed, "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "allowed": f"success or an HGPromptError of at most {LONGEST} characters",
        "limits": {
            "cpu_seconds": SECONDS, "wall_seconds": WAIT,
            "address_space": "what the process has, plus the target's limit (tests/hostile.py)",
        },
        "made": {}, "guided": {},
    }  # fmt: skip
    if arguments.out and arguments.out.exists():  # of a run with --seconds 0 or --cases 0: the other half is added
        before = json.loads(arguments.out.read_text())
        if (before["commit"], before["seed"]) == (record["commit"], record["seed"]):
            record["made"], record["guided"] = before["made"], before["guided"]
            record["versions"] |= before["versions"]
    for kind in ("made", "guided"):
        for name in names if (arguments.cases if kind == "made" else arguments.seconds) else ():
            if kind == "made":
                result = made(name, arguments.seed, arguments.cases, arguments.found)
            else:
                result = guided(name, arguments.seed, arguments.seconds, arguments.found)
            print(kind, name, json.dumps(result), flush=True)
            record[kind][name] = result
            if arguments.out:  # a run that is ended has what it has done
                arguments.out.write_text(json.dumps(summed(record), indent=1) + "\n")


def summed(record: dict[str, Any]) -> dict[str, Any]:
    """The record with the numbers of all cases and findings."""
    parts = [part for kind in ("made", "guided") for part in record[kind].values()]
    found = sum(sum(p["findings"].values()) if "findings" in p else p["crashes"] for p in parts)
    return record | {"cases": sum(part["cases"] or 0 for part in parts), "findings": found}


if __name__ == "__main__":
    main()
