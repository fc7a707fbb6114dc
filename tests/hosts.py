"""Hosts as Linux namespaces: each its own network, name, processes, shared memory and home, with a real sshd as PID 1.

Files are shared, as by NFS, except /dev/shm, /run, the home folder, /etc/{hosts,ssh,passwd} and what is `private`.
Needs root, iproute2, util-linux and openssh-server; no systemd. Nothing has a name on the machine (no `ip netns`, no
change of ~/.ssh), and all of it ends with this process, also when that is killed.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") or "/usr/sbin/sshd"
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PATH = f"{Path(sys.executable).parent}:{SYSTEM_PATH}"
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "ssh", "ssh-keygen", SSHD)
UNSHARE = ("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child")  # ends with us, also by SIGKILL
SPACES = ("--net", "--mount", "--uts", "--ipc", "--pid", "--mount-proc")
IS_ROOT = os.geteuid() == 0
Words = str | Sequence[str | Path]  # of a command; a str is for bash
WAY = "tests of several hosts need root for namespaces: sudo make test, or a container started with --privileged"
CLEAN = {  # what every process of a test job gets: CPU ranks, one thread each
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONPATH": str(ROOT),
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}


def check() -> None:
    """AssertionError that says why this machine cannot simulate hosts."""
    missing = [tool for tool in TOOLS if not shutil.which(tool, path=PATH)]
    assert not missing, f"no {', '.join(missing)}: scripts/setup dev installs what these tests need"
    probe = "ip link add v0 type veth peer name v1 && ip link add b0 type bridge"
    done = subprocess.run([*UNSHARE, *SPACES, "sh", "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, f"this kernel or container gives root no namespaces ({done.stderr.strip()}); {WAY}"


class Done(subprocess.CompletedProcess[str]):
    """How a command on a host ended; stdout holds both streams."""

    seconds: float


class Local:
    """This machine itself, where there is no root for more."""

    name, ip = "localhost", "127.0.0.1"

    def start(
        self,
        command: Words,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **kw: Any,
    ) -> subprocess.Popen[str]:
        """A process in a session of its own."""
        words = ["bash", "-c", command] if isinstance(command, str) else [str(word) for word in command]
        environment = {"PATH": PATH, "HOME": str(Path.home()), "LANG": "C.UTF-8", **(env or {})}
        return subprocess.Popen(words, cwd=cwd, env=environment, start_new_session=True, text=True, **kw)


class Host(Local):
    """One simulated machine."""

    def __init__(self, cluster: "Cluster", index: int, name: str, ip: str, private: Sequence[Path]):
        self.cluster, self.index, self.name, self.ip = cluster, index, name, ip
        self.folder = cluster.folder / name
        self.home = self.folder / "home"
        self.home.mkdir(parents=True, mode=0o700)
        for file in ("hosts", "known_hosts"):  # a host's own, so that a test can spoil one of them
            shutil.copy(cluster.folder / file, self.folder / file)
        users = Path("/etc/passwd").read_text().splitlines()  # sshd takes the home folder from there
        mine = [f"root:x:0:0:root:{self.home}:/bin/bash" if user.startswith("root:") else user for user in users]
        (self.folder / "passwd").write_text("\n".join(mine) + "\n")
        mounts = [f"mount -t tmpfs -o size=2g tmpfs {shlex.quote(str(p))}" for p in ("/dev/shm", "/run", *private)]
        binds = {
            cluster.folder / "ssh": "/etc/ssh",
            self.folder / "known_hosts": "/etc/ssh/known_hosts",
            self.folder / "hosts": "/etc/hosts",
            self.folder / "passwd": "/etc/passwd",
        }
        boot = [
            "set -e",
            f"hostname {name}",
            "mount -t sysfs sysfs /sys",
            *mounts,
            *(f"mount --bind {shlex.quote(str(source))} {target}" for source, target in binds.items()),
            "mkdir -p /run/sshd",
            "ip link set lo up",
            "while ! ip link show eth0 >/dev/null 2>&1; do sleep 0.01; done",
            f"ip addr add {ip}/24 dev eth0",
            "ip link set eth0 up",
            f"exec {SSHD} -D -E {shlex.quote(str(self.folder / 'sshd.log'))}",
        ]
        self._boot = "; ".join(boot)
        self.boot()

    def boot(self) -> None:
        """Switch it on, for the first time or again."""
        cluster, index = self.cluster, self.index
        cluster.ip_link("del", f"v{index}", check=False)  # of a host that was switched off a moment ago
        self.process, self.pid = _spawn(*SPACES, "sh", "-c", self._boot)
        card = ("name", "eth0", "address", f"02:00:00:00:00:{index + 1:02x}")  # it keeps its card: others remember it
        cluster.ip_link("add", f"v{index}", "type", "veth", "peer", *card, "netns", str(self.pid))
        cluster.ip_link("set", f"v{index}", "master", "br0", "up")

    def start(
        self,
        command: Words,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        **kw: Any,
    ) -> subprocess.Popen[str]:
        """A process on this host; it is in a session of its own."""
        words = ["bash", "-c", command] if isinstance(command, str) else [str(word) for word in command]
        into = ["nsenter", "-t", str(self.pid), "-m", "-u", "-i", "-n", "-p", f"--wd={cwd or self.home}", "--"]
        environment = {"PATH": PATH, "HOME": str(self.home), "LANG": "C.UTF-8", **(env or {})}
        process = subprocess.Popen([*into, *words], env=environment, start_new_session=True, text=True, **kw)
        self.cluster.processes.append(process)
        return process

    def run(self, command: Words, timeout: float = 300.0, check: bool = False, **kw: Any) -> Done:
        """Run to the end. AssertionError when it takes longer than `timeout`, or (with `check`) fails."""
        began = time.monotonic()
        process = self.start(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **kw)
        try:
            output, late = process.communicate(timeout=timeout)[0], False
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, late = process.communicate()[0], True
        assert not late, f"{self.name}: {command} still ran after {timeout:.0f} s:\n{output}"
        assert not (check and process.returncode), f"{self.name}: {command} ended with {process.returncode}:\n{output}"
        done = Done(command, process.returncode, output)
        done.seconds = time.monotonic() - began
        return done

    def processes(self, mark: str = "lora_scale") -> list[int]:
        """Processes of this host, by their numbers outside, whose command line holds `mark`."""
        found, space = [], os.readlink(f"/proc/{self.pid}/ns/pid")
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if os.readlink(folder / "ns/pid") == space and mark.encode() in (folder / "cmdline").read_bytes():
                    found.append(int(folder.name))
        return found

    def ranks(self) -> dict[int, int]:
        """Training processes of this host: rank to process number outside."""
        found = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
                rank = next((word[5:] for word in words if word.startswith(b"RANK=")), None)
                if rank is not None:
                    found[int(rank)] = pid
        return found

    def cut(self) -> None:
        """Pull the cable at the switch: packets vanish, nothing is refused."""
        self.cluster.ip_link("set", f"v{self.index}", "down")

    def slow_down(self, seconds: float) -> None:
        """Every frame to and from this host comes so much later: a relay stands between it and the switch."""
        script, name = str(ROOT / "tests" / "relay.py"), f"r{self.index}"
        for host in self.cluster.hosts:
            host.run(["python", script, "offload", "eth0"], check=True)
        self.cluster.ip_link("set", f"v{self.index}", "nomaster")
        self.cluster.ip_link("add", name, "type", "veth", "peer", "name", f"{name}b")
        self.cluster.ip_link("set", f"{name}b", "master", "br0", "up")
        self.cluster.ip_link("set", name, "up")
        for end in (f"v{self.index}", name):
            self.cluster.ip_link("set", end, "promisc", "on")
        into = ["nsenter", "-t", str(self.cluster.switch_pid), "-n", sys.executable, script]
        self.cluster.relays.append(subprocess.Popen([*into, f"v{self.index}", name, str(seconds)], text=True))

    def mend(self) -> None:
        self.cluster.ip_link("set", f"v{self.index}", "up")

    def power_off(self) -> None:
        """Every process of the host is gone at once, and its address is dark."""
        self.cut()
        os.kill(self.pid, signal.SIGKILL)
        self.process.wait(10)


class Cluster:
    """Hosts node-a, node-b, ... on one switch, reached from each other by ssh without a password."""

    def __init__(self, count: int, folder: Path, private: Sequence[Path] = (), subnet: str = "10.77.0"):
        self.folder = folder
        self.hosts: list[Host] = []
        self.processes: list[subprocess.Popen[str]] = []
        self.relays: list[subprocess.Popen[str]] = []
        names = [f"node-{chr(97 + index)}" for index in range(count)]
        self._write(names, subnet)
        self.switch, self.switch_pid = _spawn("--net", "sleep", "infinity")
        try:
            self.ip_link("add", "br0", "type", "bridge")
            self.ip_link("set", "br0", "up")
            for index, name in enumerate(names):
                self.hosts.append(Host(self, index, name, f"{subnet}.{index + 1}", private))
            for host in self.hosts:
                wait_for(lambda host=host: _answers(host), f"sshd of {host.name}")
        except BaseException:
            self.close()
            raise

    def _write(self, names: Sequence[str], subnet: str) -> None:
        (ssh := self.folder / "ssh").mkdir(parents=True)
        for key in ("id", "host_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh / key)], check=True)
        shutil.copy(ssh / "id.pub", ssh / "authorized_keys")
        (ssh / "known_hosts").touch()  # each host binds its own there
        (self.folder / "known_hosts").write_text(f"* {(ssh / 'host_key.pub').read_text()}")
        (ssh / "ssh_config").write_text(
            "IdentityFile /etc/ssh/id\nIdentitiesOnly yes\nStrictHostKeyChecking yes\n"
            "GlobalKnownHostsFile /etc/ssh/known_hosts\nBatchMode yes\nConnectTimeout 5\n"
        )
        (ssh / "sshd_config").write_text(
            "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized_keys\nStrictModes no\nUsePAM no\n"
            "PasswordAuthentication no\nPidFile none\nUseDNS no\nMaxStartups 100\n"
        )
        lines = [f"{subnet}.{index + 1} {name}" for index, name in enumerate(names)]
        (self.folder / "hosts").write_text("\n".join(["127.0.0.1 localhost", *lines]) + "\n")

    def __getitem__(self, index: int) -> Host:
        return self.hosts[index]

    def hostfile(self, path: Path, slots: int = 1) -> Path:
        path.write_text("".join(f"{host.name} slots={slots}\n" for host in self.hosts))
        return path

    def ip_link(self, *words: str, check: bool = True) -> None:
        command = ["nsenter", "-t", str(self.switch_pid), "-n", "ip", "link", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0 or not check, f"{' '.join(command)}: {done.stderr}"

    def close(self) -> None:
        for relay in self.relays:
            relay.kill()
            relay.wait(10)
        for process, pid in [(host.process, host.pid) for host in self.hosts] + [(self.switch, self.switch_pid)]:
            if process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)  # PID 1 of the host: the kernel ends everything else in it
        for process in [host.process for host in self.hosts] + [self.switch, *self.processes]:
            process.wait(10)
            if process.stdout:
                process.stdout.close()


def _answers(host: Host) -> bool:
    return host.run(f"exec 3<>/dev/tcp/{host.ip}/22").returncode == 0


def _spawn(*command: str) -> tuple[subprocess.Popen[str], int]:
    """unshare in the background, and the number of the process inside."""
    process = subprocess.Popen(
        [*UNSHARE, *command], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env={"PATH": PATH}, text=True
    )
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_for(lambda: children.read_text().split(), "unshare")
    return process, int(children.read_text().split()[0])


def wait_for(ready: Callable[[], object], what: str, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def cluster(count: int, folder: Path, private: Sequence[Path] = ()) -> Iterator[Cluster]:
    made = Cluster(count, folder, private)
    try:
        yield made
    finally:
        made.close()
