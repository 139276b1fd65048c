"""Several nodes, each in a network namespace of its own, joined by a bridge in one more.

Nothing here touches the machine's own network: interfaces and rules live in namespaces that go
with the test, and those of a test run that was killed go with the next one.
"""

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness import HERE, until

TOOLS = ("ip", "tc", "nft")
SUBNET = "10.77.0"
PORT = 7800
LINK_PORT = 9999
_counter = itertools.count()


def lacking() -> str:
    """Why this machine has no network namespaces for tests; empty if it has."""
    if os.getuid() != 0:
        return "network namespaces need root"
    for tool in TOOLS:
        if shutil.which(tool) is None:
            return f"network namespaces need {tool} (Debian: iproute2, nftables)"
    name = f"evn{os.getpid()}-probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", name], check=True)
    return ""


def clear_stale() -> None:
    """Remove namespaces of test runs that are gone."""
    for path in Path("/run/netns").glob("evn*-*"):
        pid = path.name[3:].partition("-")[0]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            subprocess.run(["ip", "netns", "del", path.name], check=False)


def _do(*command: str, text: str = "") -> str:
    ran = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise OSError(f"{' '.join(command)}: {ran.stderr.strip()}\n{text}")
    return ran.stdout


class Network:
    """Namespaces of nodes on one bridge, and everything that can be wrong with it.

    Rules are those of a node's namespace, at its way in, so that each direction of each link can
    be broken alone. They add up until `heal`.
    """

    def __init__(self, node_ids: tuple[str, ...]) -> None:
        self._prefix = f"evn{os.getpid()}-{next(_counter)}"
        self._hosts = {node_id: f"{SUBNET}.{i + 1}" for i, node_id in enumerate(node_ids)}
        self._made: list[str] = []
        self._rules: dict[str, list[str]] = {node_id: [] for node_id in node_ids}
        self._limited: set[str] = set()
        self._links: dict[str, subprocess.Popen[str]] = {}
        try:
            self._build()
        except BaseException:
            self.close()
            raise

    def _build(self) -> None:
        switch = self._add("switch")
        batch = ["link add br0 type bridge", "link set br0 up"]
        for number, (node_id, host) in enumerate(self._hosts.items()):
            name = self._add(node_id)
            batch += [
                f"link add p{number} type veth peer name eth0 netns {name}",
                f"link set p{number} master br0 up",
            ]
            own = ["link set lo up", f"addr add {host}/24 dev eth0", "link set eth0 up"]
            _do("ip", "-n", switch, "-batch", "-", text="\n".join(batch))
            _do("ip", "-n", name, "-batch", "-", text="\n".join(own))
            batch = []
            self._nft(node_id, "add table inet fault")
            self._nft(node_id, "add chain inet fault in { type filter hook input priority 0 ; }")

    def _add(self, name: str) -> str:
        full = f"{self._prefix}-{name}"
        _do("ip", "netns", "add", full)
        self._made.append(full)
        return full

    def namespace(self, node_id: str) -> str:
        """Its name, as `ip netns` knows it."""
        return f"{self._prefix}-{node_id}"

    def host(self, node_id: str) -> str:
        """The node's own address."""
        return self._hosts[node_id]

    def address(self, node_id: str) -> str:
        """Where the node's agent listens."""
        return f"{self._hosts[node_id]}:{PORT}"

    def cut(self, source: str, target: str) -> None:
        """What one node sends does not get to another; what that one sends does."""
        self._rule(target, f"ip saddr {self._hosts[source]} drop")

    def split(self, *sides: tuple[str, ...]) -> None:
        """Nodes of different sides do not hear each other."""
        for one, other in itertools.permutations(sides, 2):
            for source, target in itertools.product(one, other):
                self.cut(source, target)

    def lose(self, node_id: str, percent: int) -> None:
        """Of what comes to a node, some is lost at random."""
        self._rule(node_id, f"numgen random mod 100 < {percent} drop")

    def swallow(self, node_id: str, size_bytes: int) -> None:
        """Packets to a node that are larger than this vanish, and nobody is told."""
        self._rule(node_id, f"ip length > {size_bytes} drop")

    def reset(self, source: str, target: str) -> None:
        """Connections between two nodes are torn down as soon as anything comes over them."""
        host = self._hosts[source]
        self._rule(target, f"ip saddr {host} meta l4proto tcp reject with tcp reset")

    def limit(self, node_id: str, bits_s: str) -> None:
        """A node's link has this bandwidth in each direction, e.g. "8mbit"."""
        shape = ["root", "tbf", "rate", bits_s, "burst", "32kbit", "latency", "400ms"]
        port = f"p{list(self._hosts).index(node_id)}"
        _do("tc", "-n", self.namespace("switch"), "qdisc", "replace", "dev", port, *shape)
        _do("tc", "-n", self.namespace(node_id), "qdisc", "replace", "dev", "eth0", *shape)
        self._limited.add(node_id)

    def delay(
        self, node_id: str, least_s: float, most_s: float, seed: int = 1, flips: int = 0
    ) -> None:
        """New connections of a node are late by a random time, each piece anew.

        With `flips`, each so many streams of the bulk plane bring it one wrong bit.
        """
        command = [sys.executable, str(HERE / "slow_link.py"), str(LINK_PORT)]
        command = ["ip", "netns", "exec", self.namespace(node_id), *command]
        link = subprocess.Popen(
            [*command, str(least_s), str(most_s), str(seed), str(flips)],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._links[node_id] = link
        assert link.stdout is not None and link.stdout.readline() == "ready\n"
        target = f"ip daddr {SUBNET}.0/24 ip daddr != {self._hosts[node_id]} meta l4proto tcp"
        self._nft(node_id, "add table ip late")
        hook = "type nat hook output priority -100"
        self._nft(node_id, f"add chain ip late out {{ {hook} ; }}")
        self._nft(node_id, f"add rule ip late out meta mark != 7 {target} redirect to :{LINK_PORT}")

    def heal(self) -> None:
        """Everything is as it was; connections over links that were late are gone."""
        for node_id, rules in self._rules.items():
            if rules:
                rules.clear()
                self._nft(node_id, "flush chain inet fault in")
        for node_id in self._limited:
            port = f"p{list(self._hosts).index(node_id)}"
            _do("tc", "-n", self.namespace("switch"), "qdisc", "del", "dev", port, "root")
            _do("tc", "-n", self.namespace(node_id), "qdisc", "del", "dev", "eth0", "root")
        self._limited.clear()
        for node_id in list(self._links):
            self._nft(node_id, "delete table ip late")
            self._end_link(node_id)

    def _end_link(self, node_id: str) -> None:
        link = self._links.pop(node_id)
        link.kill()
        link.wait()
        if link.stdout is not None:
            link.stdout.close()

    def _rule(self, node_id: str, rule: str) -> None:
        self._rules[node_id].append(rule)
        self._nft(node_id, f"add rule inet fault in {rule}")

    def _nft(self, node_id: str, command: str) -> None:
        name = self.namespace(node_id)
        _do("ip", "netns", "exec", name, "nft", "-f", "-", text=command + "\n")

    def close(self) -> None:
        """Remove everything; processes inside must have ended."""
        for node_id in list(self._links):
            self._end_link(node_id)
        while self._made:
            subprocess.run(["ip", "netns", "del", self._made.pop()], check=False)


@contextlib.contextmanager
def stopped_in_turns(pids: list[int], run_s: float, pause_s: float) -> Iterator[None]:
    """Processes that run only part of the time: a node that is slow."""
    script = (
        "import os, signal, sys, time, ctypes\n"
        "ctypes.CDLL(None).prctl(1, 9)\n"
        "run_s, pause_s, *pids = map(float, sys.argv[1:])\n"
        "while True:\n"
        "    for number, rest_s in ((signal.SIGSTOP, pause_s), (signal.SIGCONT, run_s)):\n"
        "        for pid in pids:\n"
        "            os.kill(int(pid), number)\n"
        "        time.sleep(rest_s)\n"
    )
    numbers = [str(run_s), str(pause_s), *map(str, pids)]
    throttle = subprocess.Popen([sys.executable, "-c", script, *numbers])
    try:
        until(lambda: throttle.poll() is None, "the throttle")
        yield
    finally:
        throttle.kill()
        throttle.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
