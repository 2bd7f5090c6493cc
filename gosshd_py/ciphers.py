"""The two ciphers that everybody uses, with less work for each packet than asyncssh takes.

The same bytes on the wire (a test holds both against each other): asyncssh makes a new cipher for
each packet, three for ChaCha20; here one is kept for each direction. What asyncssh has made is
handed over by `quicker`, and is left as it is where it is not what this file knows.
"""

from __future__ import annotations

from typing import Any

from asyncssh.encryption import ChachaEncryption, Encryption, GCMEncryption
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.poly1305 import Poly1305

TAG = 16
"""Bytes of an authentication tag, of either cipher."""


def quicker(encryption: Encryption | None) -> Encryption | None:
    """The same encryption, quicker if that can be."""
    kept, *names = _KEPT.get(type(encryption), (None,))
    cipher: Any = getattr(encryption, "_cipher", None)
    parts = [getattr(cipher, name, None) for name in names]
    if kept is None or not all(isinstance(part, bytes) for part in parts):
        return encryption
    made: Encryption = kept(*parts)
    return made


def _stream(key: bytes) -> Any:
    return Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()


class KeptChacha(Encryption):
    """chacha20-poly1305@openssh.com (OpenSSH's PROTOCOL.chacha20poly1305).

    The nonce is the packet's number. Block 0 of the key stream gives the key of the tag, and the
    data follow from block 1 on: one stream for both. Lengths have a key and a stream of their own.
    """

    def __init__(self, key: bytes, length_key: bytes) -> None:
        self._body = _stream(key)
        self._length = _stream(length_key)

    def encrypt_packet(self, seq: int, header: bytes, packet: bytes) -> tuple[bytes, bytes]:
        """Encrypt header and packet. Returns them with their tag, and nothing behind."""
        nonce = seq.to_bytes(16, "big")  # a counter of 0, then the number
        self._length.reset_nonce(nonce)
        self._body.reset_nonce(nonce)
        tag_key = self._body.update(_BLOCK)[:32]
        sealed = self._length.update(header) + self._body.update(packet)
        return sealed + Poly1305.generate_tag(tag_key, sealed), b""

    def decrypt_header(self, seq: int, first_block: bytes, header_len: int) -> tuple[bytes, bytes]:
        """The length of a packet, which is read before its tag is known."""
        self._length.reset_nonce(seq.to_bytes(16, "big"))
        return first_block, self._length.update(first_block[:header_len])

    def decrypt_packet(
        self, seq: int, first: bytes, rest: bytes, header_len: int, mac: bytes
    ) -> bytes | None:
        """Decrypt a packet; None if its tag is wrong."""
        self._body.reset_nonce(seq.to_bytes(16, "big"))
        tag_key = self._body.update(_BLOCK)[:32]
        sealed = first + rest
        try:
            Poly1305.verify_tag(tag_key, sealed, mac)
        except InvalidSignature:
            return None
        decrypted: bytes = self._body.update(sealed[header_len:])
        return decrypted


_BLOCK = bytes(64)


class KeptGCM(Encryption):
    """AES-GCM (RFC 5647): the nonce is counted from what the key exchange gave."""

    def __init__(self, key: bytes, iv: bytes) -> None:
        self._cipher = AESGCM(key)
        self._fixed, self._count = iv[:4], int.from_bytes(iv[4:], "big")

    def _nonce(self) -> bytes:
        nonce = self._fixed + self._count.to_bytes(8, "big")
        self._count = (self._count + 1) & 0xFFFFFFFFFFFFFFFF
        return nonce

    def encrypt_packet(self, seq: int, header: bytes, packet: bytes) -> tuple[bytes, bytes]:
        """Encrypt a packet; its length stays readable. Returns it with its tag, and nothing behind."""
        return header + self._cipher.encrypt(self._nonce(), packet, header), b""

    def decrypt_header(self, seq: int, first_block: bytes, header_len: int) -> tuple[bytes, bytes]:
        """The length of a packet is not encrypted."""
        return first_block, first_block[:header_len]

    def decrypt_packet(
        self, seq: int, first: bytes, rest: bytes, header_len: int, mac: bytes
    ) -> bytes | None:
        """Decrypt a packet; None if its tag is wrong."""
        sealed = first[header_len:] + rest + mac
        try:
            return self._cipher.decrypt(self._nonce(), sealed, first[:header_len])
        except InvalidTag:
            return None


_KEPT: dict[Any, tuple[Any, ...]] = {GCMEncryption: (KeptGCM, "_key", "_iv")}
"""asyncssh's class → ours, and where it finds its parts in the cipher of the other."""
if hasattr(_stream(bytes(32)), "reset_nonce"):  # since cryptography 43
    _KEPT[ChachaEncryption] = (KeptChacha, "_key", "_adkey")
