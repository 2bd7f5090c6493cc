"""Our server without one of the things that make it fast, to see what each of them brings.

    python -m benchmarks --servers gosshd,no-quickack --metrics true,prompt

Each is a line of Python that is run before the server's own: the server itself has no switch for it.
"""

from __future__ import annotations

VARIANTS = {
    # The client's Nagle waits for our acknowledgement, and our kernel for more to acknowledge.
    "no-quickack": "import socket; socket.TCP_QUICKACK = socket.TCP_NODELAY",
    # Children by fork: the page tables of the whole server are copied.
    "no-vfork": "import subprocess; subprocess._USE_VFORK = False",
    # A shell between fork and exec even where it has nothing to do.
    "with-sh": "from gosshd_py import process; process.directly = lambda command: None",
    # A terminal gives 4 KiB a read, and each becomes a packet.
    "one-read": "from gosshd_py import process; process.PTY_MOST = 1 << 30",
    # asyncssh's own: a packet to be ignored before each packet.
    "msg-ignore": "from gosshd_py import transport; transport.MSG_IGNORE = -1",
    # asyncssh's own: new cipher objects for each packet.
    "new-ciphers": "from gosshd_py import transport; transport.quicker = lambda encryption: encryption",
    # asyncio's own: reads of 256 KiB. And small ones, as this server had once.
    "reads-256k": "from gosshd_py import listen; listen.READ_SIZE = 256 * 1024",
    "reads-8k": "from gosshd_py import listen; listen.READ_SIZE = 8 * 1024",
    # The garbage collector looks at all modules again and again.
    "no-freeze": "from gosshd_py import daemon; daemon.keep_what_is_loaded = lambda: None",
    # ptyprocess's own: two buffers for each terminal.
    "buffers": "from gosshd_py import pty; pty.PtyHandle.__init__ = pty.PtyProcess.__init__",
    # structlog's own: it imports rich.
    "rich": "import rich",
    # Pipes of 1 MiB between server and program instead of 64 KiB.
    "large-pipes": (
        "import fcntl, os; pipe = os.pipe\n"
        "def large():\n"
        "    ends = pipe()\n"
        "    fcntl.fcntl(ends[0], fcntl.F_SETPIPE_SZ, 1024 * 1024)\n"
        "    return ends\n"
        "os.pipe = large"
    ),
    # asyncio's loop even where libuv's is installed.
    "no-uvloop": "import sys; sys.modules['uvloop'] = None",
}  # fmt: skip
"""Name → what is run before."""
