"""The way in (RFC 4252): how often a client may try, how long it waits, who it is in the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

import asyncssh
import structlog
from asyncssh.auth import KbdIntChallenge, KbdIntResponse
from asyncssh.saslprep import SASLPrepError, saslprep

from .authentication import Authenticator, Login, RejectedError
from .config import Address, Config
from .lifecycle import Trace
from .limits import Admission
from .local import allowed_owner
from .transport import Transport, Verify

log = structlog.get_logger()

PASSWORD_DELAY = 0.25
"""Seconds from a wrong password to the answer, for each try so far."""

SAME_KEY = 1.0
"""Seconds for which the answer to "would this key do?" holds; the signature comes right behind."""

KEY_DELAY = 0.02
"""Seconds from an unknown key to the answer, whether files had to be read or not."""


_NO_KEY = (b"", 0.0, None)


class Entrance(asyncssh.SSHServer):
    """What asyncssh asks until somebody has logged in. connection.py goes on from there."""

    # A session has one of these, and more than thirty attributes would take a kilobyte more.
    __slots__ = (
        *("_admission", "_answered", "_asked", "_authenticator", "_failed", "_name", "_not_before"),
        *("_questions", "_reason", "_timer", "_tries", "_waits"),
    )
    conn: Transport

    def __init__(self, config: Config, authenticator: Authenticator, admission: Admission) -> None:
        self.config = config
        self._authenticator = authenticator
        self._admission = admission
        self.host = ""
        self.ends = ("", 0, "", 0)
        """The client's address and port, and ours."""
        self.peer = ""
        """The client's address and port, for the log."""
        self.login: Login | None = None
        self._waits = True
        """Whether nobody has logged in yet."""
        self._name: str | None = None
        self._tries = 0
        self._asked = False
        self._not_before = 0.0
        """When the next password may be examined (monotonic clock)."""
        self._answered: tuple[bytes, float, tuple[Login, asyncssh.SSHKey] | None] = _NO_KEY
        """The last key that would do, until when, and for whom."""
        self._questions = 0
        self._failed = False
        """Whether a key was refused, which is penalised only if no other one is accepted."""
        self._timer: asyncio.TimerHandle | None = None
        self._reason = "by the client"
        """Why the connection has ended, if no error says it."""

    @property
    def trace(self) -> Trace:
        """Where the events of this connection are told."""
        return self.conn.trace

    @property
    def user(self) -> str | None:
        """Who has logged in."""
        return self.login.account.name if self.login else None

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """Count it, and give it time to log in."""
        assert isinstance(conn, Transport)  # noqa: S101
        self.conn = conn
        # Kept, since asyncssh does not know them any more once the connection has ended.
        self.host, port = conn.get_extra_info("peername")[:2]
        self.ends = (self.host, port, *conn.get_extra_info("sockname")[:2])
        self.peer = str(Address(self.host, port))
        self._admission.entered(self.host)
        self.limit_time(self.config.login_grace_time, self._grace_over)
        log.info("connection opened", peer=self.peer)

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        self.limit_time(0)
        self.conn.stop_timers()
        self._admission.gone(self.host)
        if self._waits:
            self._admission.logged_in(self.host)
            if self._failed:
                self._penalise(self.config.authfail_penalty)

    # -- limits -------------------------------------------------------------------------------

    def limit_time(self, seconds: float, action: Callable[[], None] = lambda: None) -> None:
        """Do something later, in place of what was to be done later; 0: nothing."""
        if self._timer is not None:
            self._timer.cancel()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(seconds, action) if seconds else None

    def _grace_over(self) -> None:
        if not self.config.open_mode:  # in which there is nothing to guess
            self._penalise(self.config.grace_exceeded_penalty)
        self.limit_hit("login_grace_time")
        self.disconnect(f"no login within {self.config.login_grace_time:g} s")

    def unused(self) -> None:
        """No channel has been open for too long."""
        self.limit_hit("unused_connection_timeout")
        self.disconnect(f"no channel for {self.config.unused_connection_timeout:g} s")

    def disconnect(self, reason: str) -> None:
        """Send SSH_MSG_DISCONNECT and close the connection, whatever is still open on it."""
        self._reason = reason
        self.conn.disconnect(asyncssh.DISC_BY_APPLICATION, reason)

    def _penalise(self, seconds: float) -> None:
        self._admission.penalise(self.config, self.host, seconds)
        self._failed = False

    def limit_hit(self, limit: str, **facts: object) -> None:
        """Log that a limit was reached."""
        self.trace("limit.hit", limit=limit)
        self.log_seldom(logging.WARNING, "limit hit", limit=limit, **facts)

    def request_refused(self, request: str, reason: str) -> None:
        """Log it."""
        self.log_seldom(logging.INFO, "request refused", request=request, reason=reason)

    def log_seldom(self, level: int, event: str, **facts: object) -> None:
        """Log what a client can cause again and again; many of one kind get few lines."""
        kind = str(facts.get("limit") or facts.get("request") or "")
        self._admission.throttle.log(
            level, event, (kind, self.peer), peer=self.peer, user=self.user, **facts
        )

    # -- RFC 4252 -----------------------------------------------------------------------------

    def asks_as(self, name: bytes) -> None:
        """Note who the client says it is, once and as it is: asyncssh makes admin of ａｄｍｉｎ."""
        as_text = name.decode("utf-8", "backslashreplace")
        if self._name not in (None, as_text):
            raise asyncssh.ProtocolError("the user name was changed")
        self._name = as_text

    def count_try(self, method: str) -> None:
        """Count a try, whether it will be answered or not. Asking for the methods by "none" is none."""
        if method == "none" and not self._asked:
            self._asked = True
            return
        self._tries += 1
        if 0 < self.config.max_auth_tries < self._tries:
            self._penalise(self.config.authfail_penalty)
            self.limit_hit("max_auth_tries", name=self._name)
            reason = "too many failed logins"
            raise asyncssh.DisconnectError(asyncssh.DISC_NO_MORE_AUTH_METHODS_AVAILABLE, reason)

    async def begin_auth(self, username: str) -> bool:
        """Open mode: a proper name is enough (method "none"). Returns whether more is needed."""
        if not self.config.open_mode:
            return True
        try:
            self.login = await self._open_login(self._name or "")
        except RejectedError as exc:
            await self._reject("none", exc, 0)
            self._check_alive()
            self.conn.send_auth_banner(f"gosshd: {exc}\r\n")
            return True  # and there is no other method
        self._check_alive()
        return False

    def _check_alive(self) -> None:
        """asyncssh would let in, and keep alive, a connection that has ended while we waited."""
        if self.conn.is_closed():
            raise asyncssh.ConnectionLost("while logging in")

    async def _open_login(self, name: str) -> Login:
        account = self._authenticator.account(name)
        if account is None:
            raise RejectedError("that is no login name; use letters and digits")
        open_to_all = self.config.open_to_local_users or self.config.open_to_network
        if not open_to_all and not await asyncio.to_thread(allowed_owner, *self.ends):
            raise RejectedError("this server is open only to the user who runs it")
        return Login(account, "none")

    def auth_completed(self) -> None:
        """Note who is in."""
        assert self.login is not None  # noqa: S101
        self._failed = False
        self._waits = False
        self._answered = _NO_KEY
        self._admission.logged_in(self.host)
        self.limit_time(0)
        self.trace("auth.completed", user=self.user, method=self.login.method)
        log.info(
            "authentication accepted", peer=self.peer, user=self.user, method=self.login.method,
            **self.login.facts,
        )  # fmt: skip

    async def _reject(self, method: str, exc: RejectedError, delay: float) -> bool:
        """Log a failed try and make its client wait for the answer."""
        self.trace("auth.rejected", method=method, reason=str(exc))
        log.info(
            "authentication rejected", peer=self.peer, name=self._name, method=method,
            tries=self._tries, reason=str(exc), **exc.facts,
        )  # fmt: skip
        await asyncio.sleep(delay)
        return False

    def public_key_auth_supported(self) -> bool:
        """With accounts, always: which of them have keys is nobody's business."""
        return True

    async def validate_key(self, key_data: bytes, signed: bool, verify: Verify) -> bool:
        """Whether a key may enter (RFC 4252 §7), and, if the request is signed, let it in."""
        answer_at = time.monotonic() + KEY_DELAY
        try:
            login, key = await self._judged(key_data)
            if signed and not verify(key):
                raise RejectedError("the signature is wrong", login.facts)
        except RejectedError as exc:
            self._failed = True
            return await self._reject("publickey", exc, answer_at - time.monotonic())
        if signed:
            self.login = login
        else:
            self._tries -= 1  # asking is no try if the answer is yes
        return True

    async def _judged(self, key_data: bytes) -> tuple[Login, asyncssh.SSHKey]:
        """Judge a key, once for the question and for the signature that follows it at once."""
        now = time.monotonic()
        asked, until, judged = self._answered
        if asked == key_data and now < until and judged is not None:
            return judged
        judged = await self._authenticator.public_key(self._name or "", key_data, self.host)
        self._answered = (key_data, now + SAME_KEY, judged)
        return judged

    def password_auth_supported(self) -> bool:
        """Whether any account has one."""
        return self._authenticator.has_passwords

    async def validate_password(self, username: str, password: str) -> bool:
        """RFC 4252 §8."""
        return await self._password(password, "password")

    async def change_password(self, username: str, old_password: str, new_password: str) -> bool:
        """Never: that is done in the configuration."""
        wish = RejectedError("passwords are not changed here")
        return await self._reject("password", wish, PASSWORD_DELAY * self._tries)

    async def _password(self, password: str, method: str) -> bool:
        # A client may cancel the answer by its next request, but not the time that it has to wait.
        now = time.monotonic()
        wait = max(self._not_before - now, 0)
        delay = PASSWORD_DELAY * self._tries + 2 * self._authenticator.password_seconds
        answer_at = self._not_before = now + wait + delay
        await asyncio.sleep(wait)
        try:
            async with self._admission.turn(self.host):
                self.login = await self._authenticator.password(self._name or "", password, method)
        except RejectedError as exc:
            self._penalise(self.config.authfail_penalty)
            return await self._reject(method, exc, answer_at - time.monotonic())
        return True

    def kbdint_auth_supported(self) -> bool:
        """The same passwords."""
        return self._authenticator.has_passwords

    def get_kbdint_challenge(self, username: str, lang: str, submethods: str) -> KbdIntChallenge:
        """One question, the same for everybody (RFC 4256)."""
        self._questions = 1
        return "", "", "", [("Password: ", False)]

    async def validate_kbdint_response(self, username: str, responses: KbdIntResponse) -> bool:
        """Take the one answer for what the password method would have got."""
        if self._questions == 0:
            raise asyncssh.ProtocolError("an answer without a question")
        self._questions = 0
        try:
            password = saslprep(responses[0]) if len(responses) == 1 else ""
        except SASLPrepError:
            password = ""
        return await self._password(password, "keyboard-interactive")
