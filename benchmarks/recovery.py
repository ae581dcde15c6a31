#!/usr/bin/env python3
"""What failures and checkpoints cost a run.

    cargo build --release
    benchmarks/recovery.py [--kills 20] [--coordinator-kills 20] [--stops 5] [--program target/release/quintet]
    benchmarks/recovery.py --goodput 30,10,3,1 [--seconds 20]
    benchmarks/recovery.py --checkpoints 8

A coordinator and two workers by hand, on loopback, train a small model, and a ledger that grows tells how it goes on.

- By default: how long the run stands still when something dies, from kill -9 (or SIGSTOP) to the next committed step.
- With --goodput: committed steps while a worker is killed now and then (a Poisson process; one number is the mean time
  between kills in seconds) and started again at once; to be compared with those of the same time without kills, which
  is measured before and after each.
- With --checkpoints: by how much longer a cycle of steps with a checkpoint takes than its steps take at their usual
  pace, so that both the copy, for which training waits, and the writing beside it count.

At the end the ledger must hold every step once. Only Python's standard library is needed.
"""

import argparse
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import tempfile
import time

JOB = """output_dir = "run"
[model]
architecture = {{ d_model = 128, d_kv = 32, d_ff = 384, num_layers = 3, num_decoder_layers = 2, num_heads = 4, feed_forward_proj = "gated-gelu" }}
tokenizer = "wordlevel"
[data]
train = "builtin:cmudict"
input = "{{letters}}"
target = "{{phonemes}}"
max_source_length = 40
max_target_length = 40
[training]
max_steps = 1000000
global_batch_size = 32
micro_batch_size = 16
learning_rate = 1e-3
save_steps = {save_steps}
save_total_limit = 2
[cluster]
workers = 2
"""


class Run:
    """A coordinator and its workers in a directory of their own."""

    def __init__(self, program, save_steps, folder=None):
        self.program = os.path.abspath(program)
        self.directory = tempfile.TemporaryDirectory(dir=folder)
        with open(self.path("job.toml"), "w") as job:
            job.write(JOB.format(save_steps=save_steps))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = "127.0.0.1:%d" % probe.getsockname()[1]
        self.token = None
        self.coordinator = self.start_coordinator()
        self.workers = [self.start_worker() for _ in range(2)]
        self.ledger = self.path("run/ledger.jsonl")

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
        try:
            with open(self.ledger, "rb") as ledger:
                return ledger.read().count(b"\n")
        except FileNotFoundError:
            return 0

    def wait_for(self, steps, limit=120.0):
        began = time.monotonic()
        while self.committed() < steps:
            if time.monotonic() - began > limit:
                raise SystemExit("the run does not go on")
            time.sleep(0.002)

    def last(self, key):
        with open(self.ledger, "rb") as ledger:
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

    def end(self):
        for process in [self.coordinator, *self.workers]:
            process.kill()
            process.wait()
        self.directory.cleanup()


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


def goodput(run, means, seconds):
    """Rows of committed steps a second, by the mean time between kills; 0 is no kills."""
    run.wait_for(run.committed() + 50)
    killed_in = 0
    for mean in [0, *(row for mean in means for row in (mean, 0))]:
        run.wait_until_full(killed_in)
        began, first, kills = time.monotonic(), run.committed(), 0
        next_kill = began + random.expovariate(1 / mean) if mean else float("inf")
        while time.monotonic() < began + seconds:
            time.sleep(0.002)
            if time.monotonic() < next_kill:
                continue
            next_kill += random.expovariate(1 / mean)
            # One that is left must hold the state; a kill that comes earlier waits for it.
            run.wait_until_full(killed_in)
            index, kills, killed_in = random.randrange(2), kills + 1, run.last("generation")
            run.workers[index].kill()
            run.workers[index].wait()
            run.workers[index] = run.start_worker()
        rate = (run.committed() - first) / (time.monotonic() - began)
        print(json.dumps({"mean_seconds_between_kills": mean, "kills": kills, "steps_per_second": rate}), flush=True)


def checkpoints(run, cycle, count):
    """Seconds of extra time a checkpoint costs, over so many, and of a usual step."""
    times = []
    while len(times) <= cycle * (count + 1):
        if run.committed() > len(times):
            now = time.monotonic()
            times.extend([now] * (run.committed() - len(times)))
        time.sleep(0.0005)
    steps = [after - before for before, after in zip(times, times[1:])]
    # steps[i] is that of step i + 2; a checkpoint follows each step that `cycle` divides.
    usual = statistics.median(steps[cycle:])
    extra = [sum(steps[at : at + cycle]) - cycle * usual for at in range(cycle - 1, cycle * count, cycle)]
    extra.sort()
    row = {"checkpoints": len(extra), "extra_seconds": statistics.mean(extra), "median": statistics.median(extra)}
    print(json.dumps({**row, "least": extra[0], "most": extra[-1], "usual_step_seconds": usual}), flush=True)


def measure(run, name, act, count):
    if count == 0:
        return
    seconds = []
    for _ in range(count):
        run.wait_for(run.committed() + 20)
        seconds.append(act(run))
    seconds.sort()
    p95 = seconds[min(len(seconds) - 1, int(0.95 * len(seconds)))]
    row = {"event": name, "count": count, "p50": statistics.median(seconds), "p95": p95, "max": seconds[-1]}
    print(json.dumps(row), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default="target/release/quintet")
    parser.add_argument("--kills", type=int, default=20, help="of a worker; 0 leaves them out")
    parser.add_argument("--coordinator-kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--goodput", metavar="SECONDS,…", help="mean times between kills")
    parser.add_argument("--seconds", type=float, default=20, help="of each row of --goodput")
    parser.add_argument("--checkpoints", type=int, metavar="N", help="measure so many of them")
    parser.add_argument("--cycle", type=int, default=50, help="steps between them")
    parser.add_argument("--folder", help="a folder of the file system to write to")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    save_steps = arguments.cycle if arguments.checkpoints else 1000000
    run = Run(arguments.program, save_steps, arguments.folder)
    try:
        if arguments.goodput:
            goodput(run, [float(mean) for mean in arguments.goodput.split(",")], arguments.seconds)
            return run.check()
        if arguments.checkpoints:
            checkpoints(run, arguments.cycle, arguments.checkpoints)
            return run.check()
        measure(run, "worker killed", kill_worker, arguments.kills)
        measure(run, "coordinator killed", kill_coordinator, arguments.coordinator_kills)
        measure(run, "worker stopped", stop_worker, arguments.stops)
        run.check()
    finally:
        run.end()


if __name__ == "__main__":
    main()
