# A libnbd client: keeps 32 requests in flight until a line arrives on stdin, and verifies every read.
# Usage: libnbd.py URI OFFSET. Any error ends it with an exception.
import random
import select
import sys
import time

import nbd

BLOCK = 8192
BLOCKS = 512
DEPTH = 32

handle = nbd.NBD()
handle.connect_uri(sys.argv[1])
base = int(sys.argv[2])
print("connected", flush=True)

version = [0] * BLOCKS  # the version that each block holds; 0: never written
pending = {}  # cookie: (block, buffer of a read or None)
done = 0
last = time.monotonic()
worst = 0.0


def content(block, number):
    return (b"%08d-%08d-" % (block, number)).ljust(32, b".") * (BLOCK // 32)


def submit():
    block = random.randrange(BLOCKS)
    if any(block == other for other, _ in pending.values()):
        return
    if version[block] and random.random() < 0.5:
        buffer = nbd.Buffer(BLOCK)
        pending[handle.aio_pread(buffer, base + block * BLOCK)] = (block, buffer)
    else:
        version[block] += 1
        data = nbd.Buffer.from_bytearray(bytearray(content(block, version[block])))
        pending[handle.aio_pwrite(data, base + block * BLOCK)] = (block, None)


def complete():
    global done, last, worst
    cookies = [cookie for cookie in pending if handle.aio_command_completed(cookie)]
    for cookie in cookies:
        block, buffer = pending.pop(cookie)
        if buffer and bytes(buffer.to_bytearray()) != content(block, version[block]):
            raise ValueError(f"block {block} does not hold its version {version[block]}")
    if cookies:
        now = time.monotonic()
        worst, last, done = max(worst, now - last), now, done + len(cookies)


while not select.select([sys.stdin], [], [], 0)[0]:
    while len(pending) < DEPTH:
        submit()
    if handle.poll(100) < 0:
        raise OSError("poll")
    complete()
while pending:
    handle.poll(100)
    complete()
handle.flush()
handle.shutdown()
print(f"libnbd: {done} requests, longest stall {worst * 1000:.0f} ms")
