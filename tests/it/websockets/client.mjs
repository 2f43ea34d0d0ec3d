// A client of npm's `ws`: what is sent comes back. node client.mjs FOLDER PORT
import assert from "node:assert";
import { once } from "node:events";
import { createRequire } from "node:module";

const WebSocket = createRequire(process.argv[2] + "/")("ws");
for (const perMessageDeflate of [false, { threshold: 0 }]) {
  const url = `ws://localhost:${process.argv[3]}/`;
  const socket = new WebSocket(url, { perMessageDeflate, maxPayload: 64 << 20 });
  const came = [];
  let wake = () => {};
  socket.on("message", (data, binary) => {
    came.push(binary ? data : data.toString());
    wake();
  });
  const next = async () => {
    while (came.length === 0) await new Promise((done) => (wake = done));
    return came.shift();
  };
  await once(socket, "open");
  for (const message of ["", "日本語 🏺", Buffer.alloc(2000, 255), "x".repeat(17 << 20)]) {
    socket.send(message);
    assert.deepStrictEqual(await next(), message);
  }
  for (let number = 0; number < 10000; number++) socket.send(String(number));
  for (let number = 0; number < 10000; number++) assert.equal(await next(), String(number));
  socket.ping(Buffer.alloc(125, 1));
  await once(socket, "pong");
  socket.close(1000);
  assert.equal((await once(socket, "close"))[0], 1000);
}
console.log("fine");
