"""Links between ranks on one host: network namespaces on a bridge, each one's sending limited by tbf. Needs root.

The limit is of bandwidth; delay stays that of one kernel (tc netem is rarely built in). What leaves a rank leaves its
namespace through a token bucket, as through a network card of that rate.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

import plait

BRIDGE = "plaitbr"


def possible() -> bool:
    """Whether namespaces can be made here."""
    return os.geteuid() == 0 and all(shutil.which(tool) for tool in ("ip", "tc"))


def _sh(*words: str, check: bool = True) -> None:
    subprocess.run(words, check=check, capture_output=not check)


def up(ranks: int, rate: str) -> None:
    """Make a namespace a rank; what another run left is removed first."""
    down(ranks)
    _sh("ip", "link", "add", BRIDGE, "type", "bridge")
    _sh("ip", "link", "set", BRIDGE, "up")
    for rank in range(ranks):
        name, cable = f"plait{rank}", f"plaitv{rank}"
        _sh("ip", "netns", "add", name)
        _sh("ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
        _sh("ip", "link", "set", cable, "master", BRIDGE)
        _sh("ip", "link", "set", cable, "up")
        _sh("ip", "-n", name, "addr", "add", f"10.77.0.{rank + 1}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            _sh("ip", "-n", name, "link", "set", device, "up")
        # A bucket that fills while nothing is sent is a gift to whoever sends in pieces: keep it small, and the
        # packets that the kernel hands over smaller still.
        _sh("ip", "-n", name, "link", "set", "eth0", "gso_max_size", "16384")
        limit = ("rate", rate, "burst", "64kb", "latency", "200ms")
        _sh("ip", "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *limit)


def down(ranks: int) -> None:
    """Remove the namespaces; what is not there is passed over."""
    for rank in range(ranks):
        _sh("ip", "link", "del", f"plaitv{rank}", check=False)
        _sh("ip", "netns", "del", f"plait{rank}", check=False)
    _sh("ip", "link", "del", BRIDGE, check=False)


def run(script: str, arguments: Sequence[str], ranks: int, rate: str | None) -> None:
    """Run a script on some ranks, over loopback or (with a rate) each in its namespace; every core to one rank."""
    if rate is not None:
        up(ranks, rate)
    try:
        started = [_start(script, arguments, rank, ranks, rate) for rank in range(ranks)]
        codes = [process.wait() for process in started]
    finally:
        if rate is not None:
            down(ranks)
    if any(codes):
        raise SystemExit(f"ranks ended with {codes}")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of a benchmark over links."""
    parser.add_argument("--link", default="loopback", help="loopback, or tbf's rate, e.g. 1gbit")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--realtime", action="store_true")


def start(script: str, args: argparse.Namespace) -> None:
    """Run a script as its options say; real-time priority (root) is for machines that others use too."""
    slow = args.link != "loopback"
    if slow and not possible():
        raise SystemExit("a slow link needs root, ip and tc; hopb.py --model-link emulates one")
    if args.realtime:  # the ranks inherit it
        _prefer(20)
    with contextlib.suppress(KeyboardInterrupt):
        run(script, sys.argv[1:], args.ranks, args.link if slow else None)


@contextlib.contextmanager
def rank(args: argparse.Namespace, backend: str = "gloo") -> Iterator[None]:
    """Be a rank that `start` started: a core to itself, one thread, and the world for so long."""
    os.sched_setaffinity(0, {int(os.environ["RANK"]) % (os.cpu_count() or 1)})
    plait.init(backend)
    if args.realtime:  # the backend's threads keep 20, so that what arrives is taken in
        _prefer(10)
    torch.set_num_threads(1)
    yield
    if (
        args.realtime
    ):  # torch's store spins while it ends, and would starve a thread of less priority
        _prefer(20)
    dist.destroy_process_group()


def _prefer(priority: int) -> None:
    os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(priority))


def _start(
    script: str, arguments: Sequence[str], rank: int, ranks: int, rate: str | None
) -> subprocess.Popen[bytes]:
    inside = [] if rate is None else ["ip", "netns", "exec", f"plait{rank}"]
    environ = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1" if rate is None else "10.77.0.1",
        "MASTER_PORT": "29577",
        "GLOO_SOCKET_IFNAME": "lo" if rate is None else "eth0",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
        ),
    }
    return subprocess.Popen([*inside, sys.executable, script, *arguments], env=environ)
