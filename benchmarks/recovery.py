#!/usr/bin/env python3
"""What failures and checkpoints cost a run.

    cargo build --release && cargo test --release -p quintet-cli --test it --no-run
    benchmarks/recovery.py [PART …] [--program target/release/quintet]

A coordinator and two workers by hand, on loopback, train a small model, and a ledger that grows tells how it goes on.
The parts, all by default (about 11 minutes):

- standstill: how long the run stands still when something dies, from kill -9 (or SIGSTOP) to the next committed step.
- network: the same from the moment a host is cut off, or a link between two workers, to the first step that the others
  commit without it. The hosts are network namespaces; the tests `hosts` of tests/it make and measure them.
- goodput: committed steps while a worker is killed now and then (a Poisson process) and started again at once; compared
  with those of times without kills, which are measured before and after each.
- checkpoints: the same job with and without checkpoints, in turns, and by how much longer it takes with them; so both
  the copy, for which training waits, and the writing beside it count.

At the end the ledger must hold every step once. Only Python's standard library is needed; for network also cargo.
"""

import argparse
import json
import math
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time

JOB = """output_dir = "run"
[model]
architecture = {architecture}
tokenizer = "wordlevel"
[data]
train = "builtin:cmudict"
input = "{input}"
target = "{target}"
max_source_length = {source_length}
max_target_length = {target_length}
[training]
max_steps = 1000000
global_batch_size = {batch_size}
micro_batch_size = {half}
learning_rate = 1e-3
save_steps = {save_steps}
save_total_limit = 2
[cluster]
workers = 2
"""

# The small one has 1.2 million weights. Of t5-small (60.5 million, f32, AdamW) each row is of full length.
MODELS = {
    "small": {
        "architecture": "{ d_model = 128, d_kv = 32, d_ff = 384, num_layers = 3, num_decoder_layers = 2, num_heads = 4, "
        'feed_forward_proj = "gated-gelu" }',
        "input": "{letters}",
        "target": "{phonemes}",
        "source_length": 40,
        "target_length": 40,
        "batch_size": 32,
    },
    "t5-small": {
        "architecture": "{ vocab_size = 32128, d_model = 512, d_kv = 64, d_ff = 2048, num_layers = 6, num_heads = 8 }",
        "input": " ".join(["{letters}"] * 128),
        "target": " ".join(["{phonemes}"] * 32),
        "source_length": 128,
        "target_length": 32,
        "batch_size": 8,
    },
}
NEVER = 1000000


class Run:
    """A coordinator and its workers in a directory of their own."""

    def __init__(self, arguments, model="small", save_steps=NEVER):
        self.program = os.path.abspath(arguments.program)
        self.directory = tempfile.TemporaryDirectory(dir=arguments.folder)
        settings = MODELS[model]
        with open(self.path("job.toml"), "w") as job:
            job.write(JOB.format(**settings, half=settings["batch_size"] // 2, save_steps=save_steps))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = "127.0.0.1:%d" % probe.getsockname()[1]
        self.ledger, self.seen = self.path("run/ledger.jsonl"), (None, 0, 0)
        self.coordinator, self.workers = None, []

    def __enter__(self):
        self.coordinator = self.start_coordinator()
        self.workers = [self.start_worker() for _ in range(2)]
        return self

    def __exit__(self, kind, *_):
        for process in [self.coordinator, *self.workers]:
            process.kill()
            process.wait()
        if kind is None:
            self.check()
        self.directory.cleanup()

    def path(self, name):
        return os.path.join(self.directory.name, name)

    def start_coordinator(self, *arguments):
        command = [self.program, "coordinator", "job.toml", "--listen", self.address, *arguments]
        process = subprocess.Popen(command, cwd=self.directory.name, stderr=subprocess.PIPE, text=True)
        for line in process.stderr:
            if "QUINTET_RUN_TOKEN=" in line:
                self.token = line.split("QUINTET_RUN_TOKEN=")[1].split()[0]
                break
        # Whoever writes to a pipe that nobody reads stops.
        subprocess.Popen(["cat"], stdin=process.stderr, stdout=subprocess.DEVNULL)
        return process

    def start_worker(self):
        command = [self.program, "worker", "--coordinator", "http://" + self.address, "--threads", "1"]
        environment = dict(os.environ, QUINTET_RUN_TOKEN=self.token)
        return subprocess.Popen(command, cwd=self.directory.name, env=environment, stderr=subprocess.DEVNULL)

    def committed(self):
        """Lines of the ledger. Only what is new is read: looking must not take the processor from those who train."""
        try:
            with open(self.ledger, "rb") as ledger:
                status = os.fstat(ledger.fileno())
                file, size, lines = self.seen
                if file != status.st_ino or size > status.st_size:
                    size, lines = 0, 0
                ledger.seek(size)
                news = ledger.read()
        except FileNotFoundError:
            return 0
        self.seen = (status.st_ino, size + len(news), lines + news.count(b"\n"))
        return self.seen[2]

    def wait_for(self, steps, limit=120.0):
        """Until so many steps are committed. None for longer than `limit` seconds is a failure."""
        last, since = -1, 0.0
        while (committed := self.committed()) < steps:
            if committed > last:
                last, since = committed, time.monotonic()
            if time.monotonic() - since > limit or self.coordinator.poll() is not None:
                raise SystemExit("the run does not go on")
            time.sleep(0.002)

    def last(self, key):
        with open(self.ledger, "rb") as ledger:
            ledger.seek(max(0, os.fstat(ledger.fileno()).st_size - 4096))
            return json.loads(ledger.read().rsplit(b"\n", 2)[-2])[key]

    def wait_until_full(self, since=0):
        """Until two workers have committed a step in a generation after `since`: both hold the state."""
        while self.last("workers") < 2 or self.last("generation") <= since:
            if self.coordinator.poll() is not None:
                raise SystemExit("the run has ended")
            time.sleep(0.005)

    def standstill(self, act):
        """Seconds from `act` to the next step."""
        before = self.committed()
        began = time.monotonic()
        act()
        # What was committed before the signal arrived does not count.
        after = max(self.committed(), before)
        self.wait_for(after + 1)
        return time.monotonic() - began

    def check(self):
        with open(self.ledger) as ledger:
            steps = [json.loads(line)["step"] for line in ledger if line.endswith("\n")]
        if steps != list(range(1, len(steps) + 1)):
            raise SystemExit("the ledger does not hold every step once")


def kill_worker(run):
    index = random.randrange(2)
    victim = run.workers[index]
    seconds = run.standstill(victim.kill)
    victim.wait()
    run.workers[index] = run.start_worker()
    run.wait_until_full()
    return seconds


def kill_coordinator(run):
    def act():
        run.coordinator.kill()
        run.coordinator.wait()
        run.coordinator = run.start_coordinator("--resume")

    pids = [worker.pid for worker in run.workers]
    seconds = run.standstill(act)
    assert pids == [worker.pid for worker in run.workers if worker.poll() is None], "a worker ended"
    run.wait_until_full()
    return seconds


def stop_worker(run):
    victim = run.workers[random.randrange(2)]
    seconds = run.standstill(lambda: victim.send_signal(signal.SIGSTOP))
    victim.send_signal(signal.SIGCONT)
    run.wait_until_full()
    return seconds


def show(**row):
    print(json.dumps(row), flush=True)


def show_times(event, seconds):
    seconds.sort()
    p95 = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
    show(event=event, count=len(seconds), p50=statistics.median(seconds), p95=p95, max=seconds[-1])


def standstill(arguments):
    events = [
        ("worker killed", kill_worker, arguments.kills),
        ("coordinator killed", kill_coordinator, arguments.coordinator_kills),
        ("worker stopped", stop_worker, arguments.stops),
    ]
    with Run(arguments) as run:
        for event, act, count in events:
            seconds = []
            for _ in range(count):
                run.wait_for(run.committed() + 20)
                seconds.append(act(run))
            if seconds:
                show_times(event, seconds)


def network(arguments):
    """As the integration tests say it: a line `MEASURED {"event", "seconds"}` for each."""
    repository = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")
    command = ["cargo", "test", "--release", "-q", "-p", "quintet-cli", "--test", "it", "--", "--test-threads", "1"]
    command += ["hosts::a_host_that_is_cut_off_is_gone_on_without", "hosts::two_hosts_that_cannot_reach_each_other"]
    seconds = {}
    for _ in range(arguments.cuts):
        tests = subprocess.run(command, cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if tests.returncode != 0 or "MEASURED " not in tests.stdout:
            raise SystemExit(tests.stdout)
        # What tests say stands on the same line as libtest's dots.
        for text in tests.stdout.split("MEASURED ")[1:]:
            measured, _ = json.JSONDecoder().raw_decode(text)
            seconds.setdefault(measured["event"], []).append(measured["seconds"])
    for event, values in sorted(seconds.items()):
        show_times(event, values)


def goodput(arguments):
    with Run(arguments) as run:
        run.wait_for(50)
        before = steps_without_kills(run, arguments.seconds)
        for mean in map(float, arguments.means.split(",")):
            seconds, steps = steps_under_kills(run, mean, arguments.kills)
            after = steps_without_kills(run, arguments.seconds)
            show(
                mean_seconds_between_kills=mean,
                kills=arguments.kills,
                seconds=seconds,
                steps_per_second=steps / seconds,
                without_kills=[before, after],
                goodput=steps / seconds / statistics.mean([before, after]),
            )
            before = after


def steps_without_kills(run, seconds):
    """Steps a second."""
    began, first = time.monotonic(), run.committed()
    time.sleep(seconds)
    return (run.committed() - first) / (time.monotonic() - began)


def steps_under_kills(run, mean, kills):
    """Seconds until as many kills, and the time to one more, are over; and steps committed in them."""
    began, first, killed_in = time.monotonic(), run.committed(), 0
    next_kill = began
    for _ in range(kills):
        next_kill += random.expovariate(1 / mean)
        time.sleep(max(0.0, next_kill - time.monotonic()))
        # One that is left must hold the state; a kill that comes earlier waits for it.
        run.wait_until_full(killed_in)
        index, killed_in = random.randrange(2), run.last("generation")
        run.workers[index].kill()
        run.workers[index].wait()
        run.workers[index] = run.start_worker()
    next_kill += random.expovariate(1 / mean)
    time.sleep(max(0.0, next_kill - time.monotonic()))
    result = time.monotonic() - began, run.committed() - first
    run.wait_until_full(killed_in)
    return result


def checkpoints(arguments):
    for model, cycle, count in [("small", 50, 10), ("t5-small", 8, 3)]:
        pairs = []
        for number in range(arguments.rounds):
            # A machine that gets slower or faster all the while does so to both.
            kinds = [NEVER, cycle] if number % 2 == 0 else [cycle, NEVER]
            times = {save_steps: cycles(arguments, model, save_steps, cycle, count) for save_steps in kinds}
            pairs.append((times[NEVER], times[cycle]))
        extra = [(with_them - without) / count for without, with_them in pairs]
        step = statistics.mean(without for without, _ in pairs) / (cycle * count)
        cost = statistics.mean(extra)
        show(
            model=model,
            checkpoints=count * len(pairs),
            seconds_without_and_with=pairs,
            step_seconds=step,
            extra_seconds=cost,
            standard_error=statistics.stdev(extra) / math.sqrt(len(extra)) if len(extra) > 1 else None,
            share_at_save_steps={str(steps): cost / (steps * step) for steps in (200, 500)},
        )


def cycles(arguments, model, save_steps, cycle, count):
    """Seconds of `count` cycles of steps; with a checkpoint each, they begin with it and end when it is long written."""
    with Run(arguments, model, save_steps) as run:
        run.wait_for(cycle)
        began = time.monotonic()
        run.wait_for(cycle * (count + 1))
        seconds = time.monotonic() - began
        last = run.path("run/checkpoints/step-%08d" % (cycle * count))
        if save_steps == cycle and not os.path.isdir(last):
            raise SystemExit(f"{last} is not written yet; a longer cycle is needed")
        return seconds


def main():
    parts = {"standstill": standstill, "network": network, "goodput": goodput, "checkpoints": checkpoints}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(parts))
    parser.add_argument("--program", default="target/release/quintet")
    parser.add_argument("--kills", type=int, default=20, help="of a worker, for standstill and each row of goodput")
    parser.add_argument("--coordinator-kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--cuts", type=int, default=5, help="of each kind, for network")
    parser.add_argument("--means", default="4,2,1", help="seconds between kills, for goodput")
    parser.add_argument("--seconds", type=float, default=15, help="without kills, for goodput")
    parser.add_argument("--rounds", type=int, default=2, help="with and without checkpoints")
    parser.add_argument("--folder", help="a folder of the file system to write to")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(parts)
    if unknown:
        parser.error(f"there is no part {unknown.pop()}")
    # Whoever ends this ends the run with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))
    for name, part in parts.items():
        if not arguments.parts or name in arguments.parts:
            random.seed(arguments.seed)
            part(arguments)


if __name__ == "__main__":
    main()
