"""A line between receivers and a sender that loses, repeats, holds up, cuts and makes up frames."""

from __future__ import annotations

import random
import threading
from collections import deque
from typing import Any

import msgspec
import zmq

from kvtransfer.protocol import (
    VERSION,
    Blocks,
    Follow,
    Group,
    Held,
    Open,
    Opened,
    Release,
    Renew,
    Sealed,
)
from tests.contract.numpy_kv import Cut

POLL_MS = 5
HELD_POLLS = 6
"""A frame that is held up comes after so many polls, or the next frame."""
FATES = {"deliver": 82, "lose": 4, "repeat": 4, "hold": 4, "cut": 2, "noise": 2, "forge": 2}


class BadLine:
    """Its fates follow from the seed and the order in which frames come."""

    def __init__(self, endpoint: str, seed: int, handles: list[str]) -> None:
        self._random, self._endpoint, self._handles = random.Random(seed), endpoint, handles
        self._context: zmq.Context[Any] = zmq.Context()
        self._front = self._context.socket(zmq.ROUTER)
        self._front.bind("tcp://127.0.0.1:*")
        self.endpoint = self._front.getsockopt_string(zmq.LAST_ENDPOINT)
        self._backs: dict[bytes, zmq.Socket[bytes]] = {}
        self._late: deque[tuple[int, bytes, bool, bytes]] = deque()
        self._polls = 0
        self.fates: dict[str, int] = dict.fromkeys(FATES, 0)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing.set()
        self._thread.join()
        for each in (self._front, *self._backs.values()):
            each.close(linger=0)
        self._context.term()

    def _run(self) -> None:
        while not self._closing.is_set():
            poller = zmq.Poller()
            for each in (self._front, *self._backs.values()):
                poller.register(each, zmq.POLLIN)
            ready = dict(poller.poll(POLL_MS))
            self._polls += 1
            while self._late and self._late[0][0] <= self._polls:
                self._pass(*self._late.popleft()[1:])
            if self._front in ready:
                who, frame = self._front.recv_multipart()
                self._decide(who, True, frame)
            for who, back in list(self._backs.items()):
                if back in ready:
                    self._decide(who, False, back.recv())

    def _decide(self, who: bytes, to_sender: bool, frame: bytes) -> None:
        (fate,) = self._random.choices(list(FATES), list(FATES.values()))
        self.fates[fate] += 1
        if fate == "hold":
            self._late.append((self._polls + HELD_POLLS, who, to_sender, frame))
            return
        if fate in ("cut", "noise", "forge"):
            if fate == "cut":
                frame = frame[: self._random.randrange(len(frame))]
            elif fate == "noise":
                self._pass(who, to_sender, self._random.randbytes(self._random.randrange(60)))
            else:
                made_up = self._to_sender() if to_sender else self._to_receiver()
                self._pass(who, to_sender, msgspec.msgpack.encode(made_up))
        if fate != "lose":
            self._pass(who, to_sender, frame)
        if fate == "repeat":
            self._pass(who, to_sender, frame)

    def _pass(self, who: bytes, to_sender: bool, frame: bytes) -> None:
        if not to_sender:
            self._front.send_multipart([who, frame])
            return
        if who not in self._backs:
            back = self._context.socket(zmq.DEALER)
            back.connect(self._endpoint)
            self._backs[who] = back
        self._backs[who].send(frame)

    def _number(self) -> int:
        return self._random.choice([0, 1, -1, 7, 2**31, -(2**62), 2**63 - 1])

    def _to_sender(self) -> Any:
        """Well-formed, of the right version and epoch, and senseless."""
        n, some = self._number, self._random.choice(self._handles)
        layout = self._layout()
        return self._random.choice([
            Open(n(), VERSION, layout, n()),
            Open(n(), n(), layout, 0),
            Follow(n(), "first", "a stranger's", n(), n()),
            Follow(n(), "first", some, n(), n()),
            Renew(n(), "first", some),
            Release("first", some, self._random.choice([1, 7, -1, 2**62])),
            Release("first", some),
        ])  # fmt: skip

    def _to_receiver(self) -> Any:
        n, some = self._number, self._random.choice(self._handles)
        ids = [
            [n() for _ in range(self._random.choice([1, 1, 1, 0, 2]))]
            for _ in range(self._random.randrange(3))
        ]
        links = self._random.randbytes(self._random.choice([0, 5, 16, 32]))
        return self._random.choice([
            Opened(n(), "first", self._layout(), 0.6, "off", []),
            Held(-5, some),
            Blocks(some, n(), n(), ids, links, []),
            Blocks(some, 0, n(), ids, b"", []),
            Blocks(some, n(), 0, [], b"", []),
            Sealed(some, n(), self._manifest()),
        ])  # fmt: skip

    def _layout(self) -> Any:
        n = self._number
        group = Group(self._random.choice(["full_attention", "mamba"]), n(), n(), [n(), 0])
        return msgspec.structs.replace(
            Cut().layout(), kv_heads=n(), ranks=n(), groups=[group], segments=[n(), 64]
        )

    def _manifest(self) -> Any:
        from kvtransfer.protocol import Manifest

        n = self._number
        return Manifest(n(), n(), self._random.randbytes(16), "model", "tok", None)
