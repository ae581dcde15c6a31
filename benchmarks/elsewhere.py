#!/usr/bin/env python3
"""What it costs when a worker's machine has none of the run's files, on loopback.

    cargo build --release
    benchmarks/elsewhere.py [--program target/release/quintet]

A coordinator and a worker by hand, the worker once in the coordinator's folder and once in an empty one with a home of its
own: how fast a model is fetched, how long a checkpoint takes to be saved, how long 200,000 examples to validate with take
to come, and what a step takes while its examples do. Only Python's standard library is needed.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time

ARCHITECTURE = {
    "small": "d_model = 512, d_kv = 64, d_ff = 2048, num_layers = 6, num_decoder_layers = 6, num_heads = 8, vocab_size = 32128",
    "tiny": "d_model = 16, d_kv = 8, d_ff = 32, num_layers = 1, num_decoder_layers = 1, num_heads = 2",
}

JOB = """output_dir = "run"
[model]
{model}
tokenizer = "byt5"
[data]
train = "train.jsonl"
validation = "validation.jsonl"
input = "{{x}}"
target = "{{y}}"
max_source_length = 32
max_target_length = 8
[training]
max_steps = {steps}
global_batch_size = 64
micro_batch_size = 16
[evaluation]
max_examples = 1
[cluster]
workers = 1
"""


def write_examples(path, count, length):
    with open(path, "w") as file:
        for number in range(count):
            text = (" ".join(str(number * factor) for factor in range(3, 200)))[:length]
            file.write(json.dumps({"x": text, "y": str(number % 10)}) + "\n")


def run(program, folder, worker_folder, name):
    """One run; the moments of the lines that the coordinator says, and its folder."""
    environment = {**os.environ, "HOME": worker_folder, "XDG_CACHE_HOME": ""}
    command = [program, "coordinator", "job.toml", "--output", name, "--listen", "127.0.0.1:0"]
    coordinator = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    moments, worker = [], None
    for line in coordinator.stderr:
        moments.append((time.monotonic(), line.strip()))
        started = re.match(r"\s*QUINTET_RUN_TOKEN=(\w+) quintet worker --coordinator (\S+)", line)
        if started:
            environment["QUINTET_RUN_TOKEN"] = started.group(1)
            worker = [program, "worker", "--coordinator", started.group(2)]
            worker = subprocess.Popen(worker, cwd=worker_folder, env=environment, stderr=subprocess.DEVNULL)
    assert coordinator.wait() == 0 and worker.wait() == 0, moments
    return moments, os.path.join(folder, name)


def between(moments, first, last):
    moment = lambda text: next(at for at, line in moments if text in line)
    return moment(last) - moment(first)


def step_seconds(folder):
    events = [json.loads(line) for line in open(os.path.join(folder, "metrics.jsonl"))]
    return statistics.median(event["step_seconds"] for event in events if event["event"] == "train")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", default="target/release/quintet")
    program = os.path.abspath(parser.parse_args().program)
    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        write_examples(os.path.join(here, "train.jsonl"), 100_000, 500)
        write_examples(os.path.join(here, "validation.jsonl"), 10, 500)
        job = os.path.join(here, "job.toml")
        fresh = "architecture = { %s }"
        open(job, "w").write(JOB.format(model=fresh % ARCHITECTURE["small"], steps=1))
        saved = {}
        for place, folder in [("local", here), ("elsewhere", there)]:
            moments, _ = run(program, here, folder, "first-" + place)
            saved[place] = between(moments, "step 1/1", "step 1: checkpoint saved")
        print("a checkpoint of t5-small saved after %.2f s with the folder shared, %.2f s without" % (saved["local"], saved["elsewhere"]))
        open(job, "w").write(JOB.format(model='pretrained = "first-local/model"', steps=1))
        moments, _ = run(program, here, there, "second")
        print(next(line for _, line in moments if "reads the model" in line))

        open(job, "w").write(JOB.format(model=fresh % ARCHITECTURE["tiny"], steps=400))
        for place, folder in [("local", here), ("elsewhere", there)]:
            _, output = run(program, here, folder, "tiny-" + place)
            print("a step of a tiny model, %s: %.2f ms" % (place, 1000 * step_seconds(output)))

        write_examples(os.path.join(here, "validation.jsonl"), 200_000, 500)
        open(job, "w").write(JOB.format(model=fresh % ARCHITECTURE["tiny"], steps=1))
        for place, folder in [("local", here), ("elsewhere", there)]:
            moments, _ = run(program, here, folder, "large-" + place)
            seconds = between(moments, "waiting for 1 worker", "worker ready" if place == "local" else "reads the data")
            print("200000 examples to validate with, %s: ready after %.2f s" % (place, seconds))


if __name__ == "__main__":
    main()
