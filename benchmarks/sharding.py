#!/usr/bin/env python3
"""What sharding the optimizer's state saves and costs: memory of a worker and time of a step, with and without.

    cargo build --release
    benchmarks/sharding.py [--workers 2 3 4] [--rounds 3] [--steps 12] [--program target/release/quintet]

Workers on this machine train a model of 38 million weights, each one short micro-batch a step, so that next to nothing
hides what the state costs. With and without take turns. Memory is the highest resident set of the worker that has most,
before the run's only checkpoint at its end. Only Python's standard library is needed.
"""

import argparse
import json
import os
import subprocess
import tempfile
import time

JOB = """output_dir = "run"
[model]
architecture = { d_model = 512, d_kv = 64, d_ff = 2048, num_layers = 4, num_decoder_layers = 4, num_heads = 8, feed_forward_proj = "gated-gelu" }
tokenizer = "byt5"
[data]
train = "builtin:cmudict"
input = "{letters}"
target = "{phonemes}"
max_source_length = 40
max_target_length = 40
[training]
micro_batch_size = 4
learning_rate = 1e-4
"""


def lines(path):
    try:
        with open(path, "rb") as file:
            return file.read().count(b"\n")
    except FileNotFoundError:
        return 0


def train(program, workers, zero_stage, steps):
    """Seconds from one commit to the next, the mean without the first two, and bytes of a worker."""
    with tempfile.TemporaryDirectory() as directory:
        with open(os.path.join(directory, "job.toml"), "w") as job:
            job.write(JOB)
        command = [program, "train", "job.toml", "--device", "cpu", "--workers", str(workers)]
        settings = {"zero_stage": zero_stage, "max_steps": steps, "global_batch_size": 4 * workers}
        for key, value in settings.items():
            command += ["--set", f"training.{key}={value}"]
        process = subprocess.Popen(command, cwd=directory, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ledger, began = os.path.join(directory, "run/ledger.jsonl"), {}
        while process.poll() is None and steps not in began:
            began.setdefault(lines(ledger), time.monotonic())
            time.sleep(0.002)
        if process.wait() != 0:
            raise SystemExit(f"exit code {process.returncode}")
        with open(os.path.join(directory, "run/metrics.jsonl")) as metrics:
            events = [event for event in map(json.loads, metrics) if event["event"] == "train"]
    return (began[steps] - began[2]) / (steps - 2), events[-1]["peak_memory_bytes"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="target/release/quintet")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    program = os.path.abspath(arguments.program)
    for workers in arguments.workers:
        for _ in range(arguments.rounds):
            for zero_stage in (0, 1):
                seconds, memory = train(program, workers, zero_stage, arguments.steps)
                row = {"workers": workers, "zero_stage": zero_stage, "step_seconds": seconds, "peak_memory_bytes": memory}
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
