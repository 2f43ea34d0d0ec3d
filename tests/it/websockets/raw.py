"""Says frames of every kind to an echoing WebSocket server, right and wrong ones, and prints what
comes back, byte for byte: one line for each case. Through a proxy that is a tunnel the lines are
the same as without it.

    python3 raw.py HOST PORT [alone]

With `alone` only what is said in one go: a server that answers a message in a task of its own may
see a close before it has.
"""

import base64, hashlib, os, socket, struct, sys, zlib

HOST, PORT, ALONE = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["alone"]
MASK = b"\x11\x22\x33\x44"
TEXT, BINARY, CLOSE, PING, PONG = 1, 2, 8, 9, 10


def frame(opcode, payload=b"", fin=True, rsv=0, masked=True, length=None):
    size = len(payload) if length is None else length
    head = bytes([(0x80 if fin else 0) | rsv << 4 | opcode])
    bit = 0x80 if masked else 0
    if size < 126:
        head += bytes([bit | size])
    elif size < 65536:
        head += bytes([bit | 126]) + struct.pack(">H", size)
    else:
        head += bytes([bit | 127]) + struct.pack(">Q", size)
    if not masked:
        return head + payload
    key = (MASK * (len(payload) // 4 + 1))[: len(payload)]
    mixed = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big") if payload else 0
    return head + MASK + mixed.to_bytes(len(payload), "big")


def close(code=1000, reason=b""):
    return frame(CLOSE, struct.pack(">H", code) + reason)


def deflated(data, bits=15):
    squeeze = zlib.compressobj(9, zlib.DEFLATED, -bits)
    return (squeeze.compress(data) + squeeze.flush(zlib.Z_SYNC_FLUSH))[:-4]


def run(name, chunks, extensions=None):
    if ALONE and len(chunks) > 1 and chunks[-1][0] & 15 == CLOSE:
        return
    stream = socket.create_connection((HOST, PORT), timeout=60)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    key = base64.b64encode(b"the same nonce..").decode()
    lines = [
        "GET / HTTP/1.1",
        f"Host: localhost:{PORT}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        f"Sec-WebSocket-Key: {key}",
        "Sec-WebSocket-Version: 13",
    ]
    if extensions:
        lines.append(f"Sec-WebSocket-Extensions: {extensions}")
    stream.sendall("\r\n".join(lines + ["", ""]).encode())
    answer = b""
    while b"\r\n\r\n" not in answer:
        more = stream.recv(65536)
        if not more:
            break
        answer += more
    head, _, rest = answer.partition(b"\r\n\r\n")
    status = head.split(b"\r\n")[0].decode()
    agreed = [
        line.split(b": ", 1)[1].decode()
        for line in head.split(b"\r\n")
        if line.lower().startswith(b"sec-websocket-extensions:")
    ]
    digest, total = hashlib.sha256(rest), len(rest)
    shown = rest[:64]
    end = "closed"
    try:
        for chunk in chunks:
            stream.sendall(chunk)
        while True:
            more = stream.recv(1 << 20)
            if not more:
                break
            digest.update(more)
            total += len(more)
            shown = (shown + more)[:64]
    except (ConnectionResetError, BrokenPipeError):
        # Which of the two a peer sees that still sends is chance.
        pass
    except TimeoutError:
        end = "silent"
    print(name, status, agreed, total, digest.hexdigest()[:16], shown.hex(), end, flush=True)
    stream.close()


def main():
    for size in [0, 1, 125, 126, 127, 65535, 65536, 1 << 20, 16 << 20]:
        run(f"text of {size}", [frame(TEXT, b"*" * size), close()])
        run(f"binary of {size}", [frame(BINARY, b"\xfe" * size), close()])
    whole = frame(TEXT, b"in many pieces " * 20)
    run("byte by byte", [whole[i : i + 1] for i in range(len(whole))] + [close()])
    for size in [0, 1, 125]:
        run(f"ping of {size}", [frame(PING, b"p" * size), close()])
    run("ping of 126", [frame(PING, b"p" * 126), close()])
    run("ten pings", [frame(PING, bytes([n])) for n in range(10)] + [close()])
    run("pongs nobody asked for", [frame(PONG, b"x"), frame(TEXT, b"after"), close()])
    for rsv in range(1, 8):
        run(f"reserved bits {rsv}", [frame(TEXT, b"x", rsv=rsv)])
    for opcode in [3, 4, 5, 6, 7, 11, 12, 13, 14, 15]:
        run(f"opcode {opcode}", [frame(opcode, b"x")])
    run("unmasked", [frame(TEXT, b"x", masked=False)])
    run("two fragments", [frame(TEXT, b"a", fin=False), frame(0, b"b"), close()])
    run(
        "fragments with a ping within",
        [frame(TEXT, b"a", fin=False), frame(PING, b"p"), frame(0, b"b"), close()],
    )
    pieces = [frame(TEXT, b"a", fin=False)] + [frame(0, b"b", fin=False)] * 100
    run("a hundred fragments", pieces + [frame(0, b"c"), close()])
    run("empty fragments", [frame(TEXT, fin=False), frame(0, fin=False), frame(0), close()])
    run("a ping in fragments", [frame(PING, b"a", fin=False), frame(0, b"b")])
    run("a continuation of nothing", [frame(0, b"x")])
    run("a message within another", [frame(TEXT, b"a", fin=False), frame(TEXT, b"b")])
    good = ["κόσμε", "\U0010ffff", "\ud7ff\ue000", "日本語 🏺"]
    for number, text in enumerate(good):
        run(f"utf-8 {number}", [frame(TEXT, text.encode()), close()])
        data = text.encode()
        cut = [frame(TEXT, data[:1], fin=False), frame(0, data[1:])]
        run(f"utf-8 {number} cut within a character", cut + [close()])
    bad = [b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"abc\xce", b"\xc1\xbf"]
    for number, data in enumerate(bad):
        run(f"no utf-8 {number}", [frame(TEXT, data)])
        run(f"no utf-8 {number} in a close", [frame(CLOSE, b"\x03\xe8" + data)])
    run("close without a code", [frame(CLOSE)])
    run("close of one byte", [frame(CLOSE, b"\x03")])
    run("close with a long reason", [close(1000, b"r" * 123)])
    run("close with a longer reason", [close(1000, b"r" * 124)])
    run("two closes", [close() + close(1001)])
    run("text after a close", [close() + frame(TEXT, b"late")])
    codes = [0, 999, *range(1000, 1017), 1100, 1999, 2000, 2999, 3000, 3999, 4000, 4999, 5000, 65535]
    for code in codes:
        run(f"close {code}", [close(code, b"bye")])
    run("ten thousand messages", [b"".join(frame(TEXT, b"%d" % n) for n in range(10000)), close()])
    data = b"pots and bowls " * 400
    for bits in range(9, 16):
        offer = f"permessage-deflate; server_max_window_bits={bits}; client_max_window_bits={bits}"
        for extra in ["", "; server_no_context_takeover; client_no_context_takeover"]:
            squeezed = frame(TEXT, deflated(data, bits), rsv=4)
            run(f"deflate {bits}{extra}", [squeezed, close()], offer + extra)
    run("deflate that is none", [frame(TEXT, b"\x00garbage", rsv=4)], "permessage-deflate")
    bomb = frame(BINARY, deflated(b"\0" * (4 << 20)), rsv=4)
    run("deflate of 4 MB of nothing", [bomb, close()], "permessage-deflate")


main()
