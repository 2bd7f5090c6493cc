"""Our server and its peers: how each is started, so that all do the same for the same client."""

from __future__ import annotations

import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from .variants import VARIANTS

HERE = Path(__file__).parent
OURS = "gosshd"
BUILD = HERE / ".build"
"""What the Go compiler makes."""

APT = (
    "apt-get install openssh-server openssh-client openssh-sftp-server dropbear-bin "
    "golang-go golang-golang-x-crypto-dev golang-github-creack-pty-dev"
)
"""Installs all peers on Debian."""

SERVER_CPU, CLIENT_CPU = 0, 1
"""Whom the two processors belong to; where there is only one, both have it."""

START_TIME = 20.0
"""Seconds in which a server must answer."""


class BenchmarkError(Exception):
    """Something cannot be measured; the text says what and why."""


@dataclass
class Site:
    """What all servers share: a folder, keys, a user, a home with nothing in it, and the clients."""

    folder: Path
    load: list[str]
    """The load generator's command."""
    user: str = field(default_factory=lambda: pwd.getpwuid(os.geteuid()).pw_name)

    def __post_init__(self) -> None:
        self.notes: dict[str, list[str]] = defaultdict(list)
        """By server: what it could not do."""
        self.failed = False
        """Whether one of our own could not be measured."""
        self.home = self.folder / "home"
        (self.home / ".ssh").mkdir(parents=True, mode=0o700)
        for name in ("host", "key"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / name))
        allowed = self.home / ".ssh" / "authorized_keys"
        shutil.copy(self.folder / "key.pub", allowed)
        allowed.chmod(0o600)
        self.home.chmod(0o700)

    @property
    def key(self) -> Path:
        """The private key that every server lets in."""
        return self.folder / "key"


@dataclass(frozen=True)
class Peer:
    """A server that can be measured. forks: a process for each connection, which is its own CPU."""

    name: str
    what: str
    forks: bool
    note: str = ""
    lacks: frozenset[str] = frozenset()
    """Metrics for which it lacks something."""


PEERS = {
    peer.name: peer
    for peer in (
        Peer("gosshd", "this server", forks=False),
        Peer("sshd", "OpenSSH's", forks=True),
        Peer(
            "dropbear", "the small one", forks=True, note="no AES-GCM, and not so many channels on one connection",
            lacks=frozenset({"aes128-gcm", "channels"}),
        ),
        Peer(
            "go", "of golang.org/x/crypto/ssh, as people write it", forks=False,
            note="leaves its shells behind when a client goes, and has no sftp",
            lacks=frozenset({"sftp"}),
        ),
        *(Peer(name, "this server, but for one thing", forks=False) for name in VARIANTS),
    )
}  # fmt: skip
USUAL = ("gosshd", "sshd", "dropbear", "go")
"""Those that are compared when nothing else is said."""


def why_not(peer: str) -> str:
    """Why a peer cannot be started here; empty: it can."""
    wanted = {"sshd": "/usr/sbin/sshd", "dropbear": "/usr/sbin/dropbear", "go": "go"}.get(peer)
    if wanted and not shutil.which(wanted):
        return f"{wanted} is not installed; {APT}"
    if peer == "no-uvloop" and importlib.util.find_spec("uvloop") is None:
        return "is what runs anyway; pip install uvloop"
    if peer in ("sshd", "dropbear") and os.geteuid() != 0:
        return "wants root, to give its user an empty home"
    return ""


def run(*argv: str, **options: object) -> str:
    """What a command says. Raises BenchmarkError if it fails."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    except subprocess.TimeoutExpired as exc:
        raise BenchmarkError(f"{' '.join(argv)}: not done in {exc.timeout:.0f} s") from exc
    if done.returncode:
        raise BenchmarkError(f"{' '.join(argv[:3])} …: {done.stderr.strip()[-500:]}")
    text: str = done.stdout
    return text


def build() -> None:
    """Compile the Go programs, with the libraries that Debian packages. Raises BenchmarkError."""
    BUILD.mkdir(exist_ok=True)
    for program in ("server", "load"):
        environ = {**os.environ, "GO111MODULE": "off", "GOPATH": "/usr/share/gocode", "GOFLAGS": ""}
        environ.setdefault("GOCACHE", str(BUILD / "cache"))
        run(
            *("go", "build", "-o", str(BUILD / program), f"./{program}"),
            cwd=HERE / "go",
            env=environ,
        )


@dataclass
class Running:
    """A server that runs. pid: of its first process."""

    peer: Peer
    port: int
    pid: int
    site: Site
    started: float
    """Seconds from the start to its first words to a client."""

    def processes(self) -> list[int]:
        """Its own processes, the first one first; what it runs for clients are others."""
        own = Path(f"/proc/{self.pid}/exe").readlink().name
        found, ask = [], [self.pid]
        while ask:
            pid = ask.pop()
            with suppress(OSError):  # it has ended
                # OpenSSH's newer ones are sshd, sshd-session and sshd-auth.
                if Path(f"/proc/{pid}/exe").readlink().name.startswith(own):
                    found.append(pid)
                    ask += _children(pid)
        return found

    def cpu(self) -> float:
        """Seconds of processor time that its own processes have taken, with those that ended."""
        ticks = 0
        for pid in self.processes():
            with suppress(OSError):  # it has ended
                stat = _stat(pid)
                ticks += int(stat[11]) + int(stat[12])
                if self.peer.forks and pid == self.pid:
                    ticks += int(stat[13]) + int(stat[14])
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> float:
        """Proportional set size of its own processes, in KiB (proc_pid_smaps(5))."""
        total = 0
        for pid in self.processes():
            with suppress(OSError):  # it has ended
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += sum(
                    int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")
                )
        return total

    def settle(self) -> None:
        """Wait until the processes of former connections have ended, and what is left to do is done."""
        time.sleep(0.2)
        end = time.monotonic() + 10
        while self.peer.forks and len(self.processes()) > 1 and time.monotonic() < end:
            time.sleep(0.01)


@dataclass(frozen=True)
class Special:
    """What is special about a server, mostly about one of our own."""

    workers: int = 1
    trace: str = ""
    """The file."""
    ballast: int = 0
    """MiB that it is larger."""
    spawns: str = ""
    """A file for how many seconds each of its spawns took, a line for each."""
    at_home: bool = False
    """Of the peers: with the user's own home, since nobody logs in."""


@contextmanager
def serving(
    name: str, site: Site, special: Special = Special(), *, pinned: bool = True
) -> Iterator[Running]:
    """A server of this kind that answers. Raises BenchmarkError."""
    port = free_port()
    argv = _argv(name, port, site, special)
    environ = {**os.environ, "HOME": str(site.home)}
    if name == OURS or name in VARIANTS:
        environ["PYTHONPATH"] = str(HERE.parent)
        # Or it would compile all modules at each start.
        environ.pop("PYTHONDONTWRITEBYTECODE", None)
    log = site.folder / f"{name}.log"  # no pipe: a server waits for whoever does not read it
    began = time.monotonic()
    process = subprocess.Popen(
        [*pin(SERVER_CPU, pinned=pinned), *argv], env=environ, cwd=site.folder,
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log.open("wb"), start_new_session=True,
    )  # fmt: skip
    try:
        while not _answers(port):
            if process.poll() is not None or time.monotonic() - began > START_TIME:
                process.kill()
                words = log.read_text(errors="replace").strip()[-500:]
                raise BenchmarkError(f"{name} does not start: {words or 'it says nothing'}")
            time.sleep(0.001)
        yield Running(PEERS[name], port, process.pid, site, time.monotonic() - began)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End it, with the shells that it leaves behind (the plain Go server does): all are of its making."""
    tree = descendants(process.pid)
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for pid, began in tree.items():
        if _began(pid) == began:
            with suppress(ProcessLookupError):  # it has ended in this moment
                os.kill(pid, signal.SIGKILL)


def descendants(pid: int) -> dict[int, str]:
    """The processes below this one, and when each began, which tells it from a later one of its number."""
    found: dict[int, str] = {}
    ask = [pid]
    while ask:
        with suppress(OSError):  # it has ended
            for child in _children(ask.pop()):
                found[child] = _began(child)
                ask.append(child)
    return found


def _children(pid: int) -> list[int]:
    """Raises OSError where it has ended."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _stat(pid: int) -> list[str]:
    """proc_pid_stat(5) from the third field on. Raises OSError where it has ended."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _began(pid: int) -> str:
    try:
        return _stat(pid)[19]
    except OSError:
        return ""


def pin(cpu: int, *, pinned: bool = True) -> list[str]:
    """What stands before a command that shall have one processor for itself."""
    return ["taskset", "-c", str(cpu)] if pinned and can_pin() else []


def can_pin() -> bool:
    """Whether server and clients can have a processor each."""
    return {SERVER_CPU, CLIENT_CPU} <= os.sched_getaffinity(0)


def free_port() -> int:
    """A port that nobody has just now."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as sock:
            return sock.recv(4) == b"SSH-"
    except OSError:
        return False


def _argv(name: str, port: int, site: Site, special: Special) -> list[str]:
    if name == "go":
        return [str(BUILD / "server"), f"127.0.0.1:{port}", str(site.folder / "host"), f"{site.key}.pub"]  # fmt: skip
    if name == OURS or name in VARIANTS:
        return _gosshd(VARIANTS.get(name, ""), port, site, special)
    serve = _sshd(port, site) if name == "sshd" else _dropbear(port, site)
    if special.at_home:
        return serve
    # These two take the home from the password file: they get an empty one in a mount namespace.
    home = pwd.getpwnam(site.user).pw_dir
    return ["unshare", "-m", "sh", "-c", f'mount --bind {site.home} {home} && exec "$@"', "sh", *serve]  # fmt: skip


def _gosshd(before: str, port: int, site: Site, special: Special) -> list[str]:
    off = (
        *("max_startups", "per_source_max_startups", "max_connections", "per_source_max_connections"),
        *("total_max_sessions", "connection_max_sessions", "max_penalty"),
    )  # fmt: skip
    file = site.folder / f"gosshd-{port}.toml"
    file.write_text(
        "".join(f"{limit} = 0\n" for limit in off)
        + f'listen = ["127.0.0.1:{port}"]\nhostkeys = "{site.folder}/hostkeys"\n'
        f'pid_file = "{site.folder}/gosshd-{port}.pid"\nhome = "{site.home}"\nworkers = {special.workers}\n'
        + (f'trace_file = "{special.trace}"\n' if special.trace else "")
        + f'[accounts.{site.user}]\nauthorized_keys = ["{site.key}.pub"]\n'
    )
    if special.ballast:
        before += f"\nb = bytearray({special.ballast} * 2**20)\nb[::4096] = b'x' * len(b[::4096])"
    if special.spawns:
        before += TIMED_SPAWNS.format(special.spawns)
    if before:
        code = f"{before}\nfrom gosshd_py.cli import main\nmain()"
        return [sys.executable, "-c", code, "--config", str(file)]
    return [sys.executable, "-m", "gosshd_py", "--config", str(file)]


# Not by a trace: it is written in a thread, for which the spawn would have to wait sometimes.
TIMED_SPAWNS = """
import subprocess, time
class Timed(subprocess.Popen):
    def __init__(self, *args, **options):
        began = time.monotonic()
        super().__init__(*args, **options)
        took = time.monotonic() - began
        with open({!r}, "a") as file:
            print(took, file=file)
subprocess.Popen = Timed
"""


def _sshd(port: int, site: Site) -> list[str]:
    Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where it confines itself before the login
    settings = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": site.folder / "host",
        "AuthorizedKeysFile": f"{site.key}.pub", "StrictModes": "no", "UsePAM": "no", "PidFile": "none",
        "PermitRootLogin": "yes", "PasswordAuthentication": "no", "MaxStartups": 10000, "MaxSessions": 1000,
        "PrintMotd": "no", "PrintLastLog": "no", "UseDNS": "no", "Subsystem": "sftp /usr/lib/openssh/sftp-server",
    }  # fmt: skip
    file = site.folder / "sshd_config"
    file.write_text("".join(f"{key} {value}\n" for key, value in settings.items()))
    return ["/usr/sbin/sshd", "-D", "-e", "-q", "-f", str(file)]


def _dropbear(port: int, site: Site) -> list[str]:
    converted = site.folder / "dropbear_host"
    if not converted.exists():
        run("/usr/lib/dropbear/dropbearconvert", "openssh", "dropbear", f"{site.folder}/host", str(converted))  # fmt: skip
    return ["/usr/sbin/dropbear", "-F", "-E", "-r", str(converted), "-p", f"127.0.0.1:{port}", "-P", f"{site.folder}/dropbear.pid"]  # fmt: skip
