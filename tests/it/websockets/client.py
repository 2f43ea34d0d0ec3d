"""A strict client of PyPI's `websockets`: what is sent comes back. python3 client.py PORT"""

import asyncio, sys

from websockets.asyncio.client import connect


async def main():
    url = f"ws://localhost:{sys.argv[1]}/"
    for compression in [None, "deflate"]:
        async with connect(url, max_size=64 << 20, compression=compression) as socket:
            for message in ["", "日本語 🏺", b"\0\xff" * 1000, "x" * (17 << 20)]:
                await socket.send(message)
                assert await socket.recv() == message
            for number in range(10000):
                await socket.send(str(number))
            for number in range(10000):
                assert await socket.recv() == str(number)
            await (await socket.ping(b"p" * 125))
        assert socket.close_code == 1000
    print("fine")


asyncio.run(main())
